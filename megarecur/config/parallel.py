"""The section `parallel`: how processes divide the model and its state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megarecur.config.base import Ranks, Section, free, show


class ParallelConfig(Section):
    """The mesh; data-parallel size = world size / (tensor x pipeline)."""

    tensor: Ranks = free(1)
    """Ranks that share each matrix (Shoeybi et al. 2019): heads, feed-forward and vocabulary are
    split among them."""
    pipeline: Ranks = free(1)
    """Ranks that the blocks are divided among. Each block, its gradient and its moments stay on one
    of them, however often it runs; activations are sent."""
    placement: tuple[Annotated[int, Field(ge=0, lt=1 << 20)], ...] | None = free(None)
    """Pipeline rank of each block. Default: neighbouring blocks together, with the largest compute
    of a rank minimised."""
    order: Literal["auto", "1f1b", "interleaved", "interleaved_zero_bubble", "zbv", "greedy"] = (
        free("auto")
    )
    """Pipeline order; auto: the fastest in simulation."""
    split_backward: bool = free(True)
    """Let orders compute the gradients of weights after those of inputs, to fill idle time."""
    cluster: str = free("h100")
    """Hardware whose speeds decide between orders: the name of a built-in description, or a YAML
    file (see `megarecur plan`)."""
    zero_stage: Literal[0, 1, 2, 3] = free(0)
    """State that data-parallel replicas shard instead of replicating it (Rajbhandari et al. 2020):
    1, the optimizer's moments; 2, gradients too; 3, parameters too, gathered for each forward and
    backward pass. Above 0 needs DeepSpeed: pip install 'megarecur[zero]'."""
    offload_optimizer: bool = free(False)
    """Keep the optimizer's moments in CPU memory, and run its step there. Needs zero_stage 1 or
    2."""
    sequence_parallel: bool = free(False)
    """Also shard the residual stream over tensor-parallel ranks, by position (Korthikanti et al.
    2022): less memory, equal communication."""

    def find_problems(self) -> Iterator[str]:
        """Yield settings that contradict each other, and invalid ranks of the placement."""
        if self.offload_optimizer and self.zero_stage not in (1, 2):
            yield (
                f"offload_optimizer=true needs zero_stage 1 or 2, not {self.zero_stage}; set "
                "zero_stage to one of them, or offload_optimizer to false"
            )
        if self.order in ("interleaved_zero_bubble", "zbv") and not self.split_backward:
            yield (
                f"order={self.order} computes gradients of weights apart from those of inputs, "
                "which split_backward=false forbids; set split_backward to true, or order to auto"
            )
        if self.sequence_parallel and self.tensor == 1:
            yield (
                "sequence_parallel=true needs tensor above 1, not tensor=1; set sequence_parallel "
                "to false, or raise tensor"
            )
        if self.placement is None:
            return
        beyond = sorted({rank for rank in self.placement if rank >= self.pipeline})
        used = set(self.placement)
        idle = [rank for rank in range(min(self.pipeline, 100)) if rank not in used]
        if beyond or idle:
            wrong = f"ranks {beyond} do not exist" if beyond else f"ranks {idle} have no block"
            yield (
                f"placement={show(self.placement)}: {wrong}; use every rank from 0 to "
                f"{self.pipeline - 1} (pipeline={self.pipeline})"
            )
