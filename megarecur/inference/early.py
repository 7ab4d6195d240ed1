"""Early exit: a token that is confident after a few loops skips the others.

A new token runs loop after loop. After each loop except the last, the final norm and the head give
a distribution, and a rule decides whether the token exits with it. Later tokens also attend to it
in the skipped loops: their keys and values come from the hidden state with which it exited, as if
that were the input of each skipped step (Schuster et al. 2022, CALM). The prompt runs all loops.
A coda runs before the head after each of these loops (Geiping et al. 2025, Huginn); its keys and
values are those of the last time, with which the token exits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from megarecur.config.run import Config
from megarecur.errors import ConfigError
from megarecur.inference.cache import Cache, context_after
from megarecur.inference.visits import count_coda, mark_loops, refuse_exits
from megarecur.model.runner import Runner
from megarecur.model.transformer import Transformer
from megarecur.recurrence.layer_map import LayerMap

Kind = Literal["confidence", "kl", "entropy"]
RULES: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class ExitRule:
    """The rule by which a token exits. It uses the model's own distribution, whatever the sampling
    temperature."""

    kind: Kind
    """Criterion. confidence: the likeliest token has at least the threshold's probability. kl: the
    divergence from the previous loop's distribution, in nats, is at most the threshold; hence
    not before the second loop. entropy: the entropy in nats is at most the threshold."""
    threshold: float
    loops: list[int] = field(default_factory=list)
    """Filled with the number of loops that each new token ran."""

    def leaves(self, log_p_V: Tensor, before_V: Tensor | None) -> bool:
        """Return True if a token exits with this distribution, given that of the previous loop."""
        before = None if before_V is None else before_V[None]
        return bool(decide_exits(self.kind, self.threshold, log_p_V[None], before)[0])


def decide_exits(
    kind: Kind, threshold: float, log_p_BV: Tensor, before_BV: Tensor | None
) -> list[bool]:
    """Return whether each token exits with its distribution; see `ExitRule`.

    Args:
        log_p_BV: log probabilities after this loop.
        before_BV: those after the previous loop; None: this is the first.
    """
    if kind == "kl":
        if before_BV is None:
            return [False] * len(log_p_BV)
        exits_B = (log_p_BV.exp() * (log_p_BV - before_BV)).sum(-1) <= threshold
    elif kind == "confidence":
        exits_B = log_p_BV.amax(-1).exp() >= threshold
    else:
        exits_B = torch.special.entr(log_p_BV.exp()).sum(-1) <= threshold
    return [bool(exits) for exits in exits_B.tolist()]


def make_rule(kind: str | None, threshold: float | None) -> ExitRule | None:
    """Return the rule of command-line options; None if none is requested.

    Raises:
        ConfigError: an unknown rule, a threshold without a rule, or a rule without a threshold.
    """
    if kind is None:
        if threshold is not None:
            raise ConfigError(f"exit_threshold={threshold} needs a rule; add --exit confidence")
        return None
    if kind not in RULES:
        raise ConfigError(f"exit={kind} is none of {', '.join(RULES)}; choose one")
    if threshold is None and kind != "confidence":
        raise ConfigError(f"exit={kind} needs a threshold in nats; add --exit-threshold 0.1")
    return ExitRule(cast(Kind, kind), 0.9 if threshold is None else threshold)


def refuse_rule(rule: ExitRule, config: Config, num_loops: int | None) -> str:
    """Return why a model cannot use the rule; "" if it can."""
    if not math.isfinite(rule.threshold) or rule.threshold < 0.0:
        return f"exit_threshold={rule.threshold} must be a number of at least 0"
    if rule.kind == "confidence" and not 0.0 < rule.threshold <= 1.0:
        return f"exit_threshold={rule.threshold} is a probability; it must be above 0, at most 1"
    return refuse_exits(config, num_loops)


class Loops(NamedTuple):
    """The map of a model with exits."""

    loops: list[LayerMap]
    """The steps of each loop; those of a prelude are part of the first."""
    coda: LayerMap
    """The steps after all loops, which run after an exit too."""


def cut_loops(config: Config, num_loops: int | None) -> Loops:
    """Return the map, cut after each loop."""
    steps = mark_loops(config.recurrence, num_loops)
    coda = len(steps) - count_coda(config.recurrence)
    ends = [0, *(i + 1 for i, step in enumerate(steps) if step.exit), coda]
    return Loops([steps[a:b] for a, b in pairwise(ends)], steps[coda:])


@torch.no_grad()
def early_logits(
    model: Transformer,
    cut: Loops,
    tokens_11: Tensor,
    cache: Cache,
    rule: ExitRule,
    seed: int = 0,
    samples_1: Tensor | None = None,
) -> Tensor:
    """Return logits [1, V] of the token that follows one new token, from the loop after which it
    exits."""
    ctx = context_after(model, tokens_11, cache, seed, samples_1)
    reads: dict[str, Tensor] = {}
    before_V: Tensor | None = None
    loops, coda = cut
    with model.tp.whole_sequences():
        x = model.embed(tokens_11, ctx)
        for number, steps in enumerate(loops, 1):
            x, _ = model.run(steps, x, ctx, reads)
            left = model.run(coda, x, ctx, reads)[0] if coda else x
            logits_1V = model.all_logits(left)[:, 0]
            if number == len(loops):
                break
            log_p_V = logits_1V[0].to(torch.promote_types(logits_1V.dtype, torch.float32))
            log_p_V = log_p_V.log_softmax(-1)
            if rule.leaves(log_p_V, before_V):
                assert isinstance(model.runner, Runner), "exits exclude a temporal memory"
                for skipped in loops[number:]:
                    model.runner.remember(skipped, x, ctx, reads)
                break
            before_V = log_p_V
        cache.advance(1)
    rule.loops.append(number)
    return logits_1V
