"""The section `optimizer`: AdamW, Muon and the learning rate schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megarecur.config.base import Coefficient, Count, PositiveCount, Probability, Rate, Section


class Constant(Section):
    """Linear warm-up, then a constant learning rate."""

    kind: Literal["constant"]
    """Name of the schedule."""
    warmup_steps: Count = 0
    """Optimizer steps of linear warm-up. Default: none."""


class Cosine(Section):
    """Linear warm-up, then decay along half a cosine (Loshchilov & Hutter 2017)."""

    kind: Literal["cosine"]
    """Name of the schedule."""
    warmup_steps: Count = 0
    """Optimizer steps of linear warm-up. Default: none."""
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Learning rate at train.steps, relative to the peak."""


class WarmupStableDecay(Section):
    """Linear warm-up, a constant rate, then linear decay over the last decay_steps (Hu et al. 2024,
    MiniCPM)."""

    kind: Literal["wsd"]
    """Name of the schedule."""
    warmup_steps: Count = 0
    """Optimizer steps of linear warm-up. Default: none."""
    decay_steps: PositiveCount
    """Optimizer steps of the decay, which ends at train.steps."""
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Learning rate at train.steps, relative to the peak."""


class InverseSqrt(Section):
    """Linear warm-up, then lr sqrt(warmup_steps / step) (Vaswani et al. 2017; `inverse_sqrt` of
    fairseq, whose lr is also the peak)."""

    kind: Literal["inverse_sqrt"]
    """Name of the schedule."""
    warmup_steps: PositiveCount
    """Optimizer steps of linear warm-up; the learning rate peaks at their end."""


ScheduleConfig = Annotated[
    Constant | Cosine | WarmupStableDecay | InverseSqrt, Field(discriminator="kind")
]


class MuonConfig(Section):
    """Muon (Jordan et al. 2024) for the matrices of blocks; AdamW keeps all other parameters."""

    lr: Rate = 0.02
    """Peak learning rate; optimizer.schedule gives its course over training."""
    momentum: Probability = 0.95
    """Momentum of the gradient."""
    nesterov: bool = True
    """Use Nesterov momentum."""
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = 5
    """Newton-Schulz iterations, in bf16."""
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 0.1
    """Decoupled weight decay."""
    adjust_lr: Literal["original", "match_rms_adamw"] = "original"
    """Learning rate of a matrix [A, B]. original: lr sqrt(max(1, A/B)). match_rms_adamw: 0.2 lr
    sqrt(max(A, B)), whose updates are as large as AdamW's (Liu et al. 2025), so that lr can be
    AdamW's too."""
    exclude: tuple[str, ...] = ()
    """Patterns of matrices left to AdamW."""


class OptimizerConfig(Section):
    """AdamW (Loshchilov & Hutter 2019), which with weight_decay 0 is Adam. Patterns match global
    parameter names; `*` matches any text."""

    lr: Rate
    """Peak learning rate."""
    betas: tuple[Probability, Probability] = (0.9, 0.95)
    """Decay rates of the first and second moments."""
    eps: Annotated[float, Field(ge=1e-30, le=1e3)] = 1e-8
    """Epsilon of the denominator."""
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 0.1
    """Decoupled weight decay of matrices; norms, biases and other vectors are never decayed."""
    no_decay: tuple[str, ...] = ()
    """Patterns of further parameters without weight decay, such as `embedding.*`."""
    lr_multipliers: dict[str, Coefficient] = Field({})
    """Factor on the learning rate by pattern; the last pattern that matches wins."""
    frozen: tuple[str, ...] = ()
    """Patterns of parameters that are not trained."""
    clip_norm: Annotated[float, Field(ge=1e-30, le=1e30)] | None = 1.0
    """Maximum global norm of the gradient; null: no clipping."""
    muon: MuonConfig | None = None
    """Muon for the matrices of blocks. Default: AdamW alone."""
    schedule: ScheduleConfig = Constant(kind="constant")
    """Course of the learning rate over training."""
