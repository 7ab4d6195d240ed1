"""Measures of the effect of each step of the layer map on the residual stream, taken on log steps.

Measures are sums over the tokens of one micro batch, so micro batches and replicas can be added.
|x| is the root mean square of a vector over its channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.profiler import record_function

from megarecur.recurrence.layer_map import Step

MEASURES = (
    "residual_norm",  # |x_out|
    "relative_update",  # |x_out - x_in| / |x_in|
    "residual_ratio",  # |x_out| / |x_in|; above 1 the stream grows
    "fixed_point_distance",  # |x_out - x_out of the block's last visit| / |x_out|; 0 at the first
    "gradient_square",  # squared norm of the objective's gradient with respect to x_out
)


@dataclass
class Telemetry:
    """The measures of one micro batch, by (block, loop) in the order of the map."""

    sums: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """[len(MEASURES)] for each (block, loop); backward adds the last measure."""
    visits: dict[int, Tensor] = field(default_factory=dict)
    """The output of each block at its last visit."""

    def record(self, step: Step, before: Tensor, after: Tensor) -> None:
        """Measure one step of the map.

        Args:
            before: the residual stream before the step, [B, S, D] or a chunk of it.
            after: the residual stream after the step, of the same shape.
        """
        wide = torch.promote_types(after.dtype, torch.float32)
        last = self.visits.get(step.block)
        empty = torch.zeros(len(MEASURES), dtype=wide, device=after.device)
        sums = self.sums.setdefault((step.block, step.loop_index), empty)
        with torch.no_grad():
            x_in, x_out = before.to(wide), after.to(wide)
            norm = rms(x_out)
            # A core may start from zero; the relative update of its first step is then 1.
            scale = rms(x_in)
            scale = torch.where(scale > 0, scale, norm).clamp(min=1e-30)
            sums[0] += norm.sum()
            sums[1] += (rms(x_out - x_in) / scale).sum()
            sums[2] += (norm / scale).sum()
            if last is not None:
                sums[3] += (rms(x_out - last.to(wide)) / norm.clamp(min=1e-30)).sum()
        self.visits[step.block] = after.detach()
        if after.requires_grad:

            def measure(gradient: Tensor) -> None:
                sums[-1] += gradient.to(wide).square().sum()

            after.register_hook(measure)


def named(name: str) -> AbstractContextManager[object]:
    """Return a named range for the profiler's trace, or a null context if no trace is recorded."""
    return record_function(name) if torch.autograd._profiler_enabled() else nullcontext()


def rms(x: Tensor) -> Tensor:
    """Return the root mean square over the last dim: [..., D] to [...]."""
    return x.square().mean(-1).sqrt()


def name_measures(
    keys: Sequence[tuple[int, int]], sums: Sequence[Sequence[float]], tokens: Sequence[int]
) -> dict[str, float]:
    """Return metrics by block and loop, such as `recurrence/residual_norm/02.00`.

    A name means the same step at every depth. Values are means per token; gradients are given as
    each visit's share of its block's gradient.

    Args:
        keys: (block, loop) of each step of the map.
        sums: the measures of each step, summed over the global batch.
        tokens: number of tokens of the global batch that each step read.
    """
    values: dict[str, float] = {}
    gradients = [max(row[-1], 0.0) ** 0.5 for row in sums]
    of_block: dict[int, float] = {}
    for (block, _), gradient in zip(keys, gradients, strict=True):
        of_block[block] = of_block.get(block, 0.0) + gradient
    for (block, loop), row, gradient, count in zip(keys, sums, gradients, tokens, strict=True):
        shown = MEASURES[: 4 if loop else 3]
        for name, value in zip(shown, row, strict=False):
            values[f"recurrence/{name}/{block:02d}.{loop:02d}"] = value / count
        if of_block[block] > gradient:
            share = gradient / of_block[block]
            values[f"recurrence/gradient_share/{block:02d}.{loop:02d}"] = share
    return values
