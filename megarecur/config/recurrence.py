"""The section `recurrence`: one class for each scheme."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from megarecur.config.base import (
    MOST_BLOCKS,
    Blocks,
    Coefficient,
    Deviation,
    MaybeBlocks,
    Section,
    SectionError,
    derived,
)
from megarecur.config.depth import (
    DepthCurriculum,
    NumLoops,
    Poisson,
    PoissonLogNormal,
    Split,
    find_excess,
    find_zero,
    most_of,
)


class Dense(Section):
    """An ordinary Transformer: every block runs once."""

    kind: Literal["dense"]
    """Name of the scheme."""
    num_layers: Blocks
    """Number of blocks."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks, one per layer."""
        return self.num_layers


class Shared(Section):
    """Blocks shared by several layers, in the order that kind names (Takase & Kiyono 2021)."""

    num_blocks: Blocks
    """Number of blocks."""
    depth: Blocks
    """Unrolled depth, in layers; at least num_blocks."""

    def find_problems(self) -> Iterator[str]:
        """Yield a depth at which a block never runs."""
        if self.depth < self.num_blocks:
            yield (
                f"depth={self.depth} leaves some of num_blocks={self.num_blocks} unused; raise "
                "depth to at least num_blocks, or lower num_blocks"
            )


class Sequence(Shared):
    """Each block repeated in a row: 0 0 1 1 2 2 (Takase & Kiyono 2021, SEQUENCE)."""

    kind: Literal["sequence"]
    """Name of the scheme."""


class Cycle(Shared):
    """The stack of blocks repeated: 0 1 2 0 1 2 (Takase & Kiyono 2021, CYCLE)."""

    kind: Literal["cycle"]
    """Name of the scheme."""


class CycleReverse(Shared):
    """The stack forwards, then backwards: 0 1 2 2 1 0 (Takase & Kiyono 2021, CYCLE (REV))."""

    kind: Literal["cycle_reverse"]
    """Name of the scheme."""


class ReuseMap(Section):
    """Intra-layer recurrence (Nguyen & Lin 2025): block i runs reuse_map[i] times in a row."""

    kind: Literal["reuse_map"]
    """Name of the scheme."""
    reuse_map: Annotated[tuple[Blocks, ...], Field(min_length=1, max_length=MOST_BLOCKS)]
    """Number of runs of each block."""
    injection: Literal["none", "add"] = "none"
    """Injection of the input. add: the input of a block's first repetition is added to the input of
    each later one (the authors' unpublished switch)."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks, one per entry."""
        return len(self.reuse_map)

    def find_problems(self) -> Iterator[str]:
        """Yield a layer map that is too long."""
        yield from find_excess("reuse_map", sum(self.reuse_map))


class Looped(Section):
    """A group of blocks that runs num_loops times."""

    num_loops: NumLoops
    """Number of loops, or a sampler {sampler: uniform | poisson | poisson_lognormal | split, ...}
    that draws it for every optimizer step from (seed, step). Evaluation runs the rounded mean."""
    backward_loops: Blocks | None = None
    """Truncated backward: number of last loops that carry gradient. Default: all."""
    curriculum: DepthCurriculum | None = None
    """Growth of the number of loops over training. Default: none."""

    @property
    def most_loops(self) -> int | None:
        """Maximum number of loops of an optimizer step; None if it has no bound."""
        return most_of(self.num_loops)

    def find_problems(self) -> Iterator[str]:
        """Yield depths that cannot run, and truncation that has no effect."""
        loops, backward = self.num_loops, self.backward_loops
        yield from find_zero("num_loops", loops)
        blocks = getattr(self, "core", 0) or getattr(self, "num_blocks", 1)
        usual = self.most_loops or math.ceil(getattr(loops, "mean", 1.0))
        yield from find_excess("num_loops", blocks * usual)
        if backward is not None and isinstance(loops, Split):
            yield (
                f"backward_loops={backward} with num_loops.sampler=split: num_loops draws loops "
                "with gradient by itself; leave backward_loops out"
            )
        most, often = self.most_loops, "at most"
        if isinstance(loops, Poisson | PoissonLogNormal) and most is None:
            # Without a bound any depth may be drawn, but very rarely one above twice the mean.
            most, often = math.ceil(2 * loops.mean), "with rare exceptions"
        if backward is not None and most is not None and backward > most:
            yield (
                f"backward_loops={backward} is more than the {most} loops that run {often}; "
                "lower it, or omit it for the full backward"
            )
        start = self.curriculum.start if self.curriculum is not None else 1
        if most is not None and start > most:
            yield (
                f"curriculum.start={start} is more than the {most} loops that run {often}; lower it"
            )
        grows = self.curriculum is not None and self.curriculum.over == "backward"
        truncated = backward is not None or isinstance(loops, Split) or grows
        if truncated and getattr(self, "injection", None) == "none":
            yield (
                "injection=none with loops without gradient would not train what comes before "
                "the loop; choose an injection, or the full backward"
            )


class BlockRecurrence(Looped):
    """The whole stack, repeated num_loops times: 0 1 2 3 0 1 2 3."""

    kind: Literal["block_recurrence"]
    """Name of the scheme."""
    num_blocks: Blocks
    """Blocks of the stack."""
    injection: Literal["none", "add"] = "add"
    """Injection of the embedding. add: the embedding is added to the state at the start of each
    later loop."""


class Loop(Looped):
    """Prelude, a core repeated num_loops times, coda (Geiping et al. 2025, Huginn)."""

    kind: Literal["loop"]
    """Name of the scheme."""
    prelude: MaybeBlocks
    """Blocks before the core."""
    core: Blocks
    """Blocks of the repeated core."""
    coda: MaybeBlocks
    """Blocks after the core."""
    injection: Literal["none", "add", "linear"] = "linear"
    """Injection of the prelude's output e into the state s at the start of each loop. add: s + e;
    linear: a learned adapter W [s, e] from 2 hidden_size to hidden_size."""
    injection_bias: bool = False
    """Give the adapter of linear injection a bias."""
    initial_state: Literal["prelude", "zero", "random"] = derived()
    """State before the first loop. random: a truncated normal of (seed, step, sample, position,
    channel). Default: zero with an injection, the prelude's output without."""
    initial_state_std: Deviation = derived()
    """Standard deviation of the random initial state. Default: sqrt(2/5), as in Huginn."""
    final_norm_after_core: bool = False
    """Apply the final norm also to the output of the core (Huginn). Needs a coda."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks of prelude, core and coda."""
        return self.prelude + self.core + self.coda

    @model_validator(mode="before")
    @classmethod
    def fill_in(cls, values: Any) -> Any:
        """Fill in the initial state."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        injected = values.get("injection", "linear") != "none"
        values.setdefault("initial_state", "zero" if injected else "prelude")
        values.setdefault("initial_state_std", 0.4**0.5)
        return values

    def find_problems(self) -> Iterator[str]:
        """Yield loops that would never see their input, and options without effect."""
        yield from super().find_problems()
        if self.injection == "none" and self.initial_state != "prelude":
            yield (
                f"injection=none with initial_state={self.initial_state} never reads the input; "
                "choose an injection, or set initial_state to prelude"
            )
        if self.injection_bias and self.injection != "linear":
            yield (
                f"injection_bias=true with injection={self.injection}: only an adapter has a bias; "
                "set injection to linear, or leave injection_bias out"
            )
        if self.final_norm_after_core and not self.coda:
            yield (
                "final_norm_after_core=true with coda=0 would norm the same state twice; raise "
                "coda, or leave final_norm_after_core out"
            )


class Custom(Section):
    """An arbitrary order of blocks."""

    kind: Literal["custom"]
    """Name of the scheme."""
    order: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=MOST_BLOCKS)], ...],
        Field(min_length=1, max_length=MOST_BLOCKS),
    ]
    """Block of each layer; blocks are numbered from 0 without gaps."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks that the order names."""
        return max(self.order) + 1

    def find_problems(self) -> Iterator[str]:
        """Yield blocks that are never used."""
        missing = sorted(set(range(max(self.order) + 1)) - set(self.order))
        if missing:
            yield f"order never runs block(s) {missing}; number blocks from 0 without gaps"


class Ring(Section):
    """RingFormer (Heo et al. 2025): one block runs depth times. Every use, a level, has its own
    norms and low-rank level signals M x = A^T B x: of the block's input, added to queries, keys and
    values after their projection; and of the feed-forward's input, added to it.

    model.norm_position post matches their translation model. pre matches their vision model: the
    signals of attention read the stream before its norm, and that of the feed-forward is added
    before the norm, inside the branch.
    """

    kind: Literal["ring"]
    """Name of the scheme."""
    depth: Blocks
    """Number of levels."""
    level_rank: Annotated[int, Field(ge=0, le=1 << 22)]
    """Rank of M; the paper uses hidden_size / 16. 0: no signals."""
    feed_forward_rank: Annotated[int, Field(ge=0, le=1 << 22)] = derived()
    """Rank of the feed-forward's signal. Default: level_rank."""
    signal_init: Literal["authors", "scaled"] = "authors"
    """Initial B; A starts at 0. authors: normal with standard deviation 1e-6 (the first gradients
    of A may then vanish in AdamW's eps). scaled: normal with standard deviation hidden_size **
    -0.5."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks: one, which runs depth times."""
        return 1

    @model_validator(mode="before")
    @classmethod
    def fill_in(cls, values: Any) -> Any:
        """Fill in the rank of the feed-forward's signal."""
        if not isinstance(values, dict):
            return values
        return {"feed_forward_rank": values.get("level_rank", 0), **values}


class HaltingConfig(Section):
    """Adaptive depth: a head predicts the probability of stopping before each step, and the output
    is the expected state (Ray Chowdhury & Caragea 2024, section 3)."""

    mode: Literal["none", "token", "global"] = "none"
    """Unit that halts. token: every token by its own state, with attention to the mixture so far
    (Universal Transformer). global: by means over its document, in a causal model over the tokens
    before it (Gated Universal Transformer). none: all steps run."""
    transition: bool = True
    """Let the head read the state before and after the step; false: before alone."""
    threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.999
    """Cumulative probability of stopping at which no further step is taken."""
    coefficient: Coefficient = 0.1
    """Coefficient of the expected number of steps in the loss."""


class Universal(Section):
    """Universal Transformer: one block runs at most depth times, 0 0 0 (Dehghani et al. 2019)."""

    kind: Literal["universal"]
    """Name of the scheme."""
    depth: Blocks
    """Maximum number of steps. If an encoder halts, a document of n tokens takes at most n + 1."""
    halting: HaltingConfig = HaltingConfig()
    """Adaptive depth."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks: one, which all steps share."""
        return 1


def refuse_halting(values: Any) -> Any:
    """Reject a section `halting` in a scheme that cannot halt."""
    if isinstance(values, dict) and "halting" in values:
        kind = values.get("kind")
        if kind in KINDS_WITHOUT_HALTING:
            raise SectionError(
                [f"halting: kind={kind} cannot halt; set kind to universal, or leave halting out"]
            )
    return values


RecurrenceConfig = Annotated[
    Dense
    | Sequence
    | Cycle
    | CycleReverse
    | ReuseMap
    | BlockRecurrence
    | Loop
    | Custom
    | Ring
    | Universal,
    Field(discriminator="kind"),
    BeforeValidator(refuse_halting),
]
KINDS_WITHOUT_HALTING = (
    "dense", "sequence", "cycle", "cycle_reverse", "reuse_map", "block_recurrence", "loop",
    "custom", "ring",
)  # fmt: skip
