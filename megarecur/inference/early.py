"""Leaving early: a token that is sure after a few loops skips the others.

A new token runs loop after loop. After each but the last, the final norm and the head give a
distribution, and a rule decides whether the token leaves with it. Later tokens attend to it in the
loops that it skipped too: their keys and values are made of the hidden state that it left with, as
if that were what enters each skipped step (Schuster et al. 2022, CALM). The prompt runs all loops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from megarecur.config.schema import Config, ExitConfig, Looped, refuse_exits
from megarecur.errors import ConfigError
from megarecur.inference.cache import Cache, context_after
from megarecur.model.transformer import Transformer
from megarecur.recurrence.depth import default_depth
from megarecur.recurrence.layer_map import LayerMap
from megarecur.recurrence.schemes import layer_map, mark_exits

Kind = Literal["confidence", "kl", "entropy"]
RULES: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class ExitRule:
    """When a token leaves. Distributions are the model's own, whatever the sampling temperature."""

    kind: Kind
    """confidence: the likeliest token has a probability of at least the threshold. kl: the
    divergence of this loop's distribution from that of the loop before, in nats, is at most the
    threshold; hence not before the second loop. entropy, in nats: at most the threshold."""
    threshold: float
    loops: list[int] = field(default_factory=list)
    """Filled with the number of loops that each new token ran."""

    def leaves(self, log_p_V: Tensor, before_V: Tensor | None) -> bool:
        """Whether a token leaves with this distribution, given that of the loop before."""
        p_V = log_p_V.exp()
        if self.kind == "confidence":
            return bool(p_V.max() >= self.threshold)
        if self.kind == "entropy":
            return bool(torch.special.entr(p_V).sum() <= self.threshold)
        return before_V is not None and bool((p_V * (log_p_V - before_V)).sum() <= self.threshold)


def make_rule(kind: str | None, threshold: float | None) -> ExitRule | None:
    """The rule of a command line; None where none is asked for.

    Raises:
        ConfigError: an unknown rule, or a threshold without a rule, or a rule without one.
    """
    if kind is None:
        if threshold is not None:
            raise ConfigError(f"exit_threshold={threshold} needs a rule; add --exit confidence")
        return None
    if kind not in RULES:
        raise ConfigError(f"exit={kind} is none of {', '.join(RULES)}")
    if threshold is None and kind != "confidence":
        raise ConfigError(f"exit={kind} needs a threshold in nats; add --exit-threshold 0.1")
    return ExitRule(cast(Kind, kind), 0.9 if threshold is None else threshold)


def refuse_rule(rule: ExitRule, config: Config, num_loops: int | None) -> str:
    """Why a model cannot be left by a rule; "" if it can."""
    if not math.isfinite(rule.threshold) or rule.threshold < 0.0:
        return f"exit_threshold={rule.threshold} must be a number of at least 0"
    if rule.kind == "confidence" and not 0.0 < rule.threshold <= 1.0:
        return f"exit_threshold={rule.threshold} is a probability; it must be above 0, at most 1"
    if config.temporal is not None:
        return (
            "exit: a token that left early would not be written to the temporal memory as trained; "
            "leave exit out"
        )
    if num_loops == 1:
        return "exit: depth 1 has no earlier loop to leave after; leave exit out"
    return refuse_exits(ExitConfig(), config.recurrence)


def cut_loops(config: Config, num_loops: int | None) -> list[LayerMap]:
    """The map, cut after each loop."""
    recurrence = config.recurrence
    if isinstance(recurrence, Looped):
        num_loops = num_loops or default_depth(recurrence).num_loops
    steps = mark_exits(layer_map(recurrence, num_loops))
    ends = [0, *(i + 1 for i, step in enumerate(steps) if step.exit), len(steps)]
    return [steps[a:b] for a, b in pairwise(ends)]


@torch.no_grad()
def early_logits(
    model: Transformer,
    loops: list[LayerMap],
    tokens_11: Tensor,
    cache: Cache,
    rule: ExitRule,
    seed: int = 0,
    samples_1: Tensor | None = None,
) -> Tensor:
    """Logits [1, V] of the token that follows one new token, from the loop that it leaves after."""
    ctx = context_after(model, tokens_11, cache, seed, samples_1)
    reads: dict[str, Tensor] = {}
    before_V = None
    with model.tp.whole_sequences():
        x = model.embed(tokens_11, ctx)
        for number, steps in enumerate(loops, 1):
            x, _ = model.run(steps, x, ctx, reads)
            logits_1V = model.all_logits(x)[:, 0]
            if number == len(loops):
                break
            log_p_V = logits_1V[0].to(torch.promote_types(logits_1V.dtype, torch.float32))
            log_p_V = log_p_V.log_softmax(-1)
            if rule.leaves(log_p_V, before_V):
                for skipped in loops[number:]:
                    model.stack.remember(skipped, x, ctx, reads)
                break
            before_V = log_p_V
        cache.advance(1)
    rule.loops.append(number)
    return logits_1V
