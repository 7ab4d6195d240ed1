"""Planners: which rank writes which chunk of a tensor, and which parts of saved chunks it reads.

torch.distributed.checkpoint does the planning: it writes each replica once and reshards. These
planners reject plans that it would save or load wrongly without an error.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megarecur.checkpoint.index import DTYPE_NAMES
from megarecur.errors import CheckpointError
from megarecur.parallel.shards import Box, TensorShard, tiling_fault

Values = Callable[[str], Tensor]
"""Function that returns the values of a `meta` tensor by name."""


class ShardSavePlanner(DefaultSavePlanner):
    """Save planner that writes each rectangle of `shards` once, whichever ranks hold it.

    The values of whole tensors on `meta` come from `values` at the time of writing.
    """

    # Passed here and not as the state dict, each entry of which costs a log record or two.
    def __init__(self, shards: dict[str, TensorShard], values: Values | None = None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards = shards
        self._values = values
        self._tensors: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        """Return a plan with one item per rectangle of this rank."""
        items = []
        for name, shard in self._shards.items():
            for offset, sizes, tensor in _filled(shard) if shard.written else ():
                if tuple(tensor.shape) != sizes:
                    raise CheckpointError(
                        f"{name}: a chunk of sizes {sizes} is given as {tuple(tensor.shape)}"
                    )
                if tensor.dtype not in DTYPE_NAMES:
                    raise CheckpointError(f"{name}: {tensor.dtype} cannot be saved; convert it")
                self._tensors[name, offset] = tensor
                items.append(_write_item(name, shard.global_shape, offset, sizes, tensor.dtype))
        self.plan = SavePlan(items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Reject plans that the default planner would save wrongly without an error, then plan."""
        faults = _plan_faults(all_plans)
        if faults:
            raise CheckpointError("\n  ".join(faults))
        return super().create_global_plan(all_plans)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the tensor of a rectangle."""
        assert index.offset is not None
        tensor = self._tensors[index.fqn, tuple(index.offset)]
        if not tensor.is_meta:
            return tensor
        assert self._values is not None, index.fqn
        made = self._values(index.fqn)
        if made.shape != tensor.shape or made.dtype != tensor.dtype:
            raise CheckpointError(
                f"{index.fqn}: planned as {tensor.dtype} {list(tensor.shape)}, "
                f"made as {made.dtype} {list(made.shape)}"
            )
        return made


class ShardLoadPlanner(DefaultLoadPlanner):
    """Load planner that reads the parts of saved chunks that lie in rectangles of `shards`."""

    def __init__(self, shards: dict[str, TensorShard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards = shards
        self._tensors: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def create_local_plan(self) -> LoadPlan:
        """Return a plan with read items for every rectangle of this rank."""
        assert self.metadata is not None
        items = []
        for name, shard in self._shards.items():
            saved = self.metadata.state_dict_metadata[name]
            assert isinstance(saved, TensorStorageMetadata)
            wanted = []
            for offset, sizes, tensor in _filled(shard):
                self._tensors[name, offset] = tensor
                wanted.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes)))
            items += create_read_items_for_chunk_list(name, saved, wanted)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the tensor of a rectangle."""
        assert index.offset is not None
        return self._tensors[index.fqn, tuple(index.offset)]


def _filled(shard: TensorShard) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Tensor]]:
    """Yield the non-empty chunks; an empty one would share its offset with a full one."""
    for offset, sizes, tensor in shard.chunks:
        if tensor.numel():
            yield tuple(offset), tuple(sizes), tensor


def _write_item(
    name: str,
    global_shape: tuple[int, ...],
    offset: tuple[int, ...],
    sizes: tuple[int, ...],
    dtype: torch.dtype,
) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(name, offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes)),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size(global_shape),
        ),
    )


def _plan_faults(plans: list[SavePlan]) -> list[str]:
    """Return, by name, disagreements between ranks and tensors that the chunks do not tile."""
    kinds: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
    tiles: dict[str, set[Box]] = {}
    for item in (item for plan in plans for item in plan.items):
        name, data = item.index.fqn, item.tensor_data
        assert data is not None
        kind = (str(data.properties.dtype), tuple(data.size))
        kinds.setdefault(name, set()).add(kind)
        tiles.setdefault(name, set()).add((tuple(data.chunk.offsets), tuple(data.chunk.sizes)))
    faults = []
    for name, found in kinds.items():
        if len(found) > 1:
            faults.append(f"{name}: ranks disagree on dtype and shape: {sorted(found)}")
        elif fault := tiling_fault(next(iter(found))[1], sorted(tiles[name])):
            faults.append(f"{name}: {fault}")
    return faults
