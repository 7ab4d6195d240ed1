"""Requests of the engine, and the events that answer them.

A handle may be used by any thread: iterate over it for events, or cancel it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Literal, get_args

import torch
from torch import Tensor

from megarecur.config.run import Config
from megarecur.inference.early import ExitRule, refuse_rule
from megarecur.inference.visits import Route, cut_visits, refuse_exits

ExitKind = Literal["confidence", "kl", "entropy", "loop", "oracle"]
Fill = Literal["state", "share"]
Reason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Exit:
    """The rule by which new tokens of a request exit after an earlier loop, and the rule that fills
    the keys and values of the loops that they skip. The prompt runs all loops."""

    kind: ExitKind
    """Criterion. confidence, kl, entropy: see `early.ExitRule`. loop: always after `threshold`
    loops. oracle: after the first loop whose likeliest token is that of all loops, which runs all
    loops to know it (Bae et al. 2025, appendix K); for studies."""
    threshold: float = 0.9
    """Bound of the criterion: a probability, nats, or a number of loops."""
    fill: Fill = "state"
    """Keys and values of a skipped step. state: those that the step makes of the state with which
    the token exits (Schuster et al. 2022, CALM). share: those that the same block made for the
    token in the last loop it ran, at the cost of a copy."""


@dataclass(frozen=True)
class Draft:
    """Self-speculation: the first loops propose tokens, and the other loops verify all of them in
    one pass. The text is that of full depth, greedy or sampled, because a proposal counts only if
    full depth chooses it."""

    loops: int = 1
    """Loops of a proposal."""
    tokens: int = 4
    """Number of proposals per verification."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A text to continue; options as of `generate.generate`.

    All choices are functions of (seed, sample, position), so a text does not depend on the other
    requests.
    """

    tokens: tuple[int, ...]
    """Ids of the prompt, at least one."""
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    sample: int = 0
    eos_ids: frozenset[int] = frozenset()
    """Ids that end the text and are no part of it."""
    num_loops: int | None = None
    """Loops to run instead of the trained number."""
    exit: Exit | None = None
    draft: Draft | None = None
    logprobs: int | None = None
    """Likeliest tokens to report with the score of each new token; None: no scores."""
    score_prompt: bool = False
    """Fill `Handle.prompt_scores`; then the prompt shares no pages that others computed."""

    @property
    def most_tokens(self) -> int:
        """Number of tokens that need keys and values; the last new one is never read."""
        return len(self.tokens) + self.max_new_tokens - 1


@dataclass(frozen=True)
class Score:
    """Log probabilities at one token, by the model's distribution before temperature, top_k and
    top_p, over all rows of the vocabulary."""

    logprob: float
    """Log probability of the token, in nats."""
    top: tuple[tuple[int, float], ...]
    """The likeliest ids and their log probabilities, likeliest first."""


@dataclass(frozen=True)
class Event:
    """A new token of a request, its end, or both."""

    token: int | None = None
    """Id of the token; None at an end without one."""
    loops: int = 0
    """Number of loops after which the token was chosen; 0 for models without exits."""
    reason: Reason | None = None
    """Reason of the end; None while the text goes on."""
    score: Score | None = None
    """Score of the token, if the request has `logprobs`."""

    @property
    def finished(self) -> bool:
        """Whether the request has ended."""
        return self.reason is not None


@dataclass(eq=False)
class Handle:
    """A submitted request."""

    request: Request
    number: int
    """Number of the request in the order of submission."""
    events: SimpleQueue[Event] = field(default_factory=SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    prompt_scores: list[Score] = field(default_factory=list)
    """Scores of the prompt's tokens from the second on, if the request has `score_prompt`; complete
    when the first event arrives."""

    def cancel(self) -> None:
        """End the request at the engine's next step, which frees its pages."""
        self.cancelled.set()

    def __iter__(self) -> Iterator[Event]:
        """Yield events until the end. Another thread must step the engine, or must have."""
        while True:
            event = self.events.get()
            yield event
            if event.finished:
                return


@dataclass
class Counts:
    """Counts of an engine's work."""

    passes: int = 0
    rows: int = 0
    """Rows of all passes."""
    tokens: int = 0
    """New tokens."""
    loops: int = 0
    """Sum of the loops after which they were chosen."""
    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that full depth confirmed."""
        return self.accepted / self.drafted if self.drafted else 0.0


def find_route(config: Config, num_loops: int | None) -> Route:
    """Return the visits of a request."""
    return cut_visits(config.recurrence, num_loops, not refuse_exits(config, num_loops))


def refuse_exit(exit_: Exit, config: Config, num_loops: int | None) -> str:
    """Return why a model cannot use an exit rule; "" if it can."""
    kind, threshold = exit_.kind, exit_.threshold
    if kind not in get_args(ExitKind):
        return f"exit={kind} is none of {', '.join(get_args(ExitKind))}; choose one"
    if exit_.fill not in get_args(Fill):
        return f"fill={exit_.fill} is none of {', '.join(get_args(Fill))}; choose one"
    if kind in ("loop", "oracle"):
        if refusal := refuse_exits(config, num_loops):
            return refusal
        most = find_route(config, num_loops).num_loops
        if kind == "loop" and threshold not in range(1, most + 1):
            return f"exit_threshold={threshold:g} must be a number of loops from 1 to {most}"
        return ""
    return refuse_rule(ExitRule(kind, threshold), config, num_loops)  # type: ignore[arg-type]


def refuse_draft(request: Request, config: Config) -> str:
    """Return why a model cannot draft for a request; "" if it can."""
    draft = request.draft
    assert draft is not None
    if request.exit is not None:
        return "draft with exit: a draft is verified at full depth; omit one of the two"
    if refusal := refuse_exits(config, request.num_loops):
        return refusal.replace("exit:", "draft:").replace("omit exit", "omit draft")
    most = find_route(config, request.num_loops).num_loops - 1
    if not 1 <= draft.loops <= most:
        return f"draft.loops={draft.loops} must be from 1 to {most}, less than all loops"
    if draft.tokens < 1:
        return f"draft.tokens={draft.tokens} must be at least 1"
    return ""


def score_tokens(
    logits_SV: Tensor, tokens: Sequence[int], count: int, missing: Collection[int]
) -> list[Score]:
    """Return the scores of tokens, given the logits that chose them.

    Args:
        logits_SV: logits [S, V].
        tokens: S ids.
        count: number of likeliest ids of a score.
        missing: ids that are never among the likeliest.
    """
    wide = torch.promote_types(logits_SV.dtype, torch.float32)
    log_p_SV = logits_SV.log_softmax(-1, dtype=wide)
    own_S1 = log_p_SV.gather(-1, torch.tensor(tokens, device=log_p_SV.device)[:, None])
    if missing:
        unused = torch.tensor(sorted(missing), device=log_p_SV.device)
        log_p_SV = log_p_SV.index_fill(-1, unused, -torch.inf)
    top = log_p_SV.topk(min(count, log_p_SV.shape[-1] - len(missing)))
    rows = zip(own_S1[:, 0].tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    return [Score(own, tuple(zip(ids, values, strict=True))) for own, ids, values in rows]


def count_pages(tokens: int, page_size: int) -> int:
    """Return the number of pages for some tokens."""
    return math.ceil(tokens / page_size)
