"""Numbers of loops: fixed, drawn for every optimizer step, or increased by a curriculum."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from megarecur.config.base import (
    MOST_BLOCKS,
    MOST_STEPS,
    Blocks,
    MaybeBlocks,
    PositiveCount,
    Section,
)


class Uniform(Section):
    """An integer from min to max, all equally likely."""

    sampler: Literal["uniform"]
    """Name of the distribution."""
    min: MaybeBlocks = 1
    """Smallest number."""
    max: MaybeBlocks
    """Largest number."""

    def find_problems(self) -> Iterator[str]:
        """Yield an empty range."""
        if self.max < self.min:
            yield f"max={self.max} is below min={self.min}; raise max, or lower min"


class AroundMean(Section):
    """An integer of at least min around a mean; values above max are clipped to max."""

    mean: Annotated[float, Field(gt=0.0, le=MOST_BLOCKS)]
    """Mean of the distribution; above min."""
    min: MaybeBlocks = 1
    """Smallest number."""
    max: Blocks | None = None
    """Largest number. Default: 4096."""

    def find_problems(self) -> Iterator[str]:
        """Yield a mean that no integer in range can have."""
        if self.mean <= self.min:
            yield f"mean={self.mean} must be above min={self.min}; raise mean, or lower min"
        if self.max is not None and self.max < self.mean:
            yield f"max={self.max} must not be below mean={self.mean}; raise max, or lower mean"


class Poisson(AroundMean):
    """min + Poisson(mean - min)."""

    sampler: Literal["poisson"]
    """Name of the distribution."""


class PoissonLogNormal(AroundMean):
    """min + Poisson(e^t), t ~ N(log(mean - min) - sigma^2/2, sigma).

    With min 1 this is the sampler of Geiping et al. 2025, section 3.3, whose "targeted mean
    recurrence r + 1" is the mean here.
    """

    sampler: Literal["poisson_lognormal"]
    """Name of the distribution."""
    sigma: Annotated[float, Field(gt=0.0, le=5.0)] = 0.5
    """Standard deviation of the normal distribution."""


def sampler_tag(value: Any) -> str | None:
    """Return the tag of the alternative (number or sampler) that a value of the file selects."""
    if isinstance(value, dict):
        return value.get("sampler")
    return getattr(value, "sampler", "number")


Sampler = (
    Annotated[Uniform, Tag("uniform")]
    | Annotated[Poisson, Tag("poisson")]
    | Annotated[PoissonLogNormal, Tag("poisson_lognormal")]
)
BY_SAMPLER = Field(discriminator=Discriminator(sampler_tag))
NumForwardOnly = Annotated[Annotated[MaybeBlocks, Tag("number")] | Sampler, BY_SAMPLER]
NumWithGradient = Annotated[Annotated[Blocks, Tag("number")] | Sampler, BY_SAMPLER]


class Split(Section):
    """Loops without and loops with gradient, drawn separately; both are drawn from (seed, step)."""

    sampler: Literal["split"]
    """Name of the distribution."""
    forward_only: NumForwardOnly
    """Loops without gradient, which run first: a number, or a sampler."""
    with_gradient: NumWithGradient
    """Loops with gradient: a number, or a sampler; at least 1."""

    def find_problems(self) -> Iterator[str]:
        """Yield ranges that include optimizer steps without gradient."""
        yield from find_zero("with_gradient", self.with_gradient)


NumLoops = Annotated[
    Annotated[Blocks, Tag("number")] | Sampler | Annotated[Split, Tag("split")], BY_SAMPLER
]


def find_excess(name: str, steps: int) -> Iterator[str]:
    """Yield an error if a layer map would have more steps than the planner supports."""
    if steps > MOST_STEPS:
        yield f"{name} makes {steps} steps of the layer map; lower it to at most {MOST_STEPS} steps"


def find_zero(name: str, number: Any) -> Iterator[str]:
    """Yield an error if a sampler may return 0."""
    if getattr(number, "min", 1) < 1:
        yield f"{name}.min=0 would run no loop at some steps; set it to at least 1"


def most_of(number: Any) -> int | None:
    """Return the maximum of a number of loops or of its sampler; None if it has no bound."""
    if isinstance(number, Split):
        parts = most_of(number.forward_only), most_of(number.with_gradient)
        return None if parts[0] is None or parts[1] is None else parts[0] + parts[1]
    return number if isinstance(number, int) else number.max


class DepthCurriculum(Section):
    """Growth of the loops from `start` to the number drawn, over the first `steps` optimizer
    steps."""

    kind: Literal["linear", "1-sqrt"]
    """Shape of the growth after a share u of the steps: u, or 1 - sqrt(1 - u), which stays shallow
    longer (McLeish et al. 2025)."""
    steps: PositiveCount
    """Optimizer steps over which the loops grow."""
    over: Literal["forward", "backward", "both"] = "both"
    """Loops that grow: those that run, those that carry gradient, or both."""
    start: Blocks = 1
    """Loops at the first step."""
