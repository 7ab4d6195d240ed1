"""The section `parallel`: how processes divide the model and its state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megarecur.config.base import Ranks, Section, free, show


class ParallelConfig(Section):
    """The mesh; data-parallel size = world size / (tensor x pipeline x context)."""

    tensor: Ranks = free(1)
    """Ranks that share each matrix (Shoeybi et al. 2019): heads, feed-forward and vocabulary are
    split among them."""
    pipeline: Ranks = free(1)
    """Ranks that the blocks are divided among. Each block, its gradient and its moments stay on one
    of them, however often it runs; activations are sent."""
    context: Ranks = free(1)
    """Ranks that share each sequence: every rank holds consecutive positions, and attention
    exchanges heads for positions (DeepSpeed-Ulysses, Jacobs et al. 2023). Divides the memory of
    activations, for long sequences."""
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
    1, the optimizer's moments and fp32 masters; 2, gradients too; 3, the weights in the compute
    dtype too, each block gathered once per forward and backward pass."""
    zero_engine: Literal["native", "deepspeed"] = free("native")
    """Code that shards: native, along the layer map; or DeepSpeed, which can offload moments to the
    CPU: pip install 'megarecur[zero]'."""
    shard_group: Ranks | None = free(None)
    """Neighbouring replicas that shard their state among themselves; between groups it is
    replicated (HSDP). It divides the number of replicas. Default: all of them."""
    gathered_blocks: Annotated[int, Field(ge=1, lt=1 << 20)] | None = free(None)
    """Max blocks whose weights are whole at once at zero_stage 3. Blocks that a pass uses again may
    then be gathered again. Default: each is gathered once per pass."""
    bucket_mb: Annotated[float, Field(gt=0.0, le=1 << 20)] = free(25.0)
    """Megabytes of gradients that zero_stage 0 reduces at once, as soon as they are complete in a
    step's last backward pass."""
    reduce_dtype: Literal["fp32", "bf16"] = free("fp32")
    """Dtype in which gradients travel between replicas. bf16 halves the traffic and rounds each
    replica's sum once more."""
    offload_optimizer: bool = free(False)
    """Keep the optimizer's moments in CPU memory, and run its step there. Needs zero_stage 1 or 2
    and zero_engine=deepspeed."""
    sequence_parallel: bool = free(False)
    """Also shard the residual stream over tensor-parallel ranks, by position (Korthikanti et al.
    2022): less memory, equal communication."""

    @property
    def shards_natively(self) -> bool:
        """Whether the native engine shards the state of replicas."""
        return self.zero_stage > 0 and self.zero_engine == "native"

    @property
    def replica(self) -> int:
        """Number of processes that read the same samples."""
        return self.tensor * self.pipeline * self.context

    def find_problems(self) -> Iterator[str]:
        """Yield settings that contradict each other, and invalid ranks of the placement."""
        if self.offload_optimizer and self.zero_stage not in (1, 2):
            yield (
                f"offload_optimizer=true needs zero_stage 1 or 2, not {self.zero_stage}; set "
                "zero_stage to one of them, or offload_optimizer to false"
            )
        if self.offload_optimizer and self.zero_engine == "native":
            yield (
                "offload_optimizer=true needs zero_engine=deepspeed, not native; set zero_engine "
                "to deepspeed, or offload_optimizer to false"
            )
        unused = [
            name
            for name, is_used in (
                ("shard_group", self.shard_group is None or self.shards_natively),
                ("gathered_blocks", self.gathered_blocks is None or (
                    self.shards_natively and self.zero_stage == 3
                )),
                ("reduce_dtype", self.reduce_dtype == "fp32" or self.zero_engine == "native"
                 or self.zero_stage == 0),
            )
            if not is_used
        ]  # fmt: skip
        for name in unused:
            stage = "3" if name == "gathered_blocks" else "1, 2 or 3"
            yield (
                f"{name}={getattr(self, name)} needs zero_stage {stage} and zero_engine=native, "
                f"not zero_stage={self.zero_stage} and zero_engine={self.zero_engine}; set them, "
                f"or omit {name}"
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
