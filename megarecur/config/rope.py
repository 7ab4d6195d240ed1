"""Scalings of rotary positions (`model.rope_scaling`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megarecur.config.base import Factor, Length, Section


class RopeScaling(Section):
    """A change of rotary frequencies that extends a model beyond the positions of pretraining."""

    factor: Annotated[float, Field(ge=1.0, le=1e6)]
    """Factor by which the context grows."""
    original_positions: Length
    """Longest document of pretraining, in tokens."""


class DynamicRope(RopeScaling):
    """NTK-aware scaling by length: a document longer than original_positions rotates by a base that
    grows with its length. Cached keys stay as they were rotated, as in transformers."""

    kind: Literal["dynamic"]
    """Name of the scaling."""


class YarnRope(RopeScaling):
    """YaRN (Peng et al. 2023): slow dims are interpolated, fast dims are kept, and both cos and sin
    are multiplied by attention_factor."""

    kind: Literal["yarn"]
    """Name of the scaling."""
    beta_fast: Factor = 32.0
    """Rotations over original_positions from which a dim counts as fast."""
    beta_slow: Factor = 1.0
    """Rotations over original_positions up to which a dim counts as slow."""
    attention_factor: Annotated[float, Field(ge=0.01, le=100.0)] | None = None
    """Factor on cos and sin. Default: 1 + 0.1 ln(factor)."""
    truncate: bool = True
    """Round the range of dims between slow and fast to whole numbers."""


class Llama3Rope(RopeScaling):
    """Llama 3.1 (Dubey et al. 2024): wavelengths above original_positions / low_freq_factor are
    stretched by factor, those below original_positions / high_freq_factor are kept."""

    kind: Literal["llama3"]
    """Name of the scaling."""
    low_freq_factor: Factor = 1.0
    """Divisor of original_positions that gives the longest wavelength of the transition."""
    high_freq_factor: Factor = 4.0
    """Divisor of original_positions that gives the shortest wavelength of the transition; above
    low_freq_factor."""

    def find_problems(self) -> Iterator[str]:
        """Yield a transition that is empty or reversed."""
        if self.high_freq_factor <= self.low_freq_factor:
            yield (
                f"high_freq_factor={self.high_freq_factor} must be above low_freq_factor="
                f"{self.low_freq_factor}; raise it, or lower low_freq_factor"
            )


AnyRopeScaling = Annotated[DynamicRope | YarnRope | Llama3Rope, Field(discriminator="kind")]
