"""Plans of saving and loading: which rank writes which chunk, and which parts of chunks it reads.

A rank describes its chunks as compressed JSON, its layout. The group's first rank gathers the
distinct layouts, checks that they tile every tensor, and tells each rank which of its chunks to
write. While no rank's layout changes, the plan stands and nothing is sent but one number; when some
change, only theirs travel. Loading needs no communication: each rank knows the index.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from megarecur.checkpoint.failures import one_error
from megarecur.checkpoint.index import (
    DTYPE_NAMES,
    DTYPES,
    ChunkRecord,
    DtypeName,
    without_collections,
)
from megarecur.errors import CheckpointError
from megarecur.parallel.shards import Box, TensorShard, tiling_fault
from megarecur.parallel.tree import gather_bytes, group_rank, reduce_max, scatter_bytes

Values = Callable[[str], Tensor]
"""Function that returns the values of a `meta` tensor by name."""

Holders = dict[str, dict[Box, tuple[tuple[int, int], ...]]]
"""By tensor and rectangle: the layouts that hold it, with its place in each.

Of tuples, which the garbage collector soon stops to follow: it would hold up all threads."""

Kinds = dict[str, set[tuple[DtypeName, tuple[int, ...]]]]
"""Dtype and shape of the whole tensor by name, as the ranks describe them."""

WrittenEntry = tuple[str, DtypeName, list[int], list[tuple[list[int], list[int]]]]
"""Name, dtype and shape of a tensor, and (offset, sizes) of chunks, in a layout."""


class Chunk(NamedTuple):
    """A rectangle of a tensor, as a layout describes it."""

    name: str
    dtype: DtypeName
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.sizes) * DTYPES[self.dtype].itemsize


# ------------------------------------------------------------------------------------------ saving


class SavePlanner:
    """Plans the saves of one group of ranks, and keeps the plan while the layout stands.

    Args:
        group: the ranks that save together, over gloo; None: all.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.layout: bytes | None = None
        """This rank's layout in the last plan."""
        self.own: list[tuple[int, Chunk]] = []
        """The chunks that this rank writes, with their places in its layout."""
        self.layouts: list[bytes] = []
        """On the first rank: the layout of every rank; equal ones are one object."""
        self.masks: list[bytes] = []
        """On the first rank: bits of the chunks of each rank's layout that the rank writes."""
        self.num_plans = 0
        """Number of times that a plan was made."""

    def plan(self, shards: dict[str, TensorShard], doing: str) -> list[tuple[Chunk, Tensor]]:
        """Return the chunks that this rank writes, with their tensors; collective.

        Each rectangle is written once, by the holder with the fewest bytes assigned so far.

        Args:
            doing: opening of error messages, such as `cannot save PATH`.

        Raises:
            CheckpointError: on every rank, if a tensor cannot be saved, or chunks of all ranks do
                not tile it.
        """
        with one_error(doing, self.group):
            layout, tensors = describe_layout(shards)
        changed = layout != self.layout
        if reduce_max(torch.tensor([int(changed)]), self.group)[0]:
            self._make(layout, changed, doing)
        return [(chunk, tensors[place]) for place, chunk in self.own]

    def _make(self, layout: bytes, changed: bool, doing: str) -> None:
        first = group_rank(self.group) == 0
        own = xxhash.xxh3_128_digest(layout) if changed else b""
        stamps, wanted = gather_bytes(own, self.group), []
        if first:
            senders = {stamp: rank for rank, stamp in reversed(list(enumerate(stamps))) if stamp}
            wanted = [b"x" if senders.get(stamp) == k else b"" for k, stamp in enumerate(stamps)]
        asked = scatter_bytes(wanted, self.group)
        sent = gather_bytes(layout if asked else b"", self.group)
        masks: list[bytes] = []
        with one_error(doing, self.group):
            if first:
                known = {stamp: sent[senders[stamp]] for stamp in senders}
                former = self.layouts or [b""] * len(stamps)
                layouts = [known.get(s, f) for s, f in zip(stamps, former, strict=True)]
                with without_collections():
                    masks = assign_writers(layouts)
        mask = bits(scatter_bytes(masks, self.group))
        self.own = [(place, c) for place, c in enumerate(decode_layout(layout)) if mask[place]]
        self.layout, self.num_plans = layout, self.num_plans + 1
        if first:
            self.layouts, self.masks = layouts, masks

    def written(self) -> Iterator[tuple[int, list[WrittenEntry]]]:
        """Yield each rank that writes, with its entries in the order of its file; on the first
        rank."""
        last, entries = b"", []  # type: tuple[bytes, list[WrittenEntry]]
        for rank, (layout, mask) in enumerate(zip(self.layouts, self.masks, strict=True)):
            if not any(mask):
                continue
            if layout is not last:
                last, entries = layout, read_layout(layout)
            found, own = [], iter(bits(mask))
            for name, dtype, shape, boxes in entries:
                if mine := [box for box in boxes if next(own)]:
                    found.append((name, dtype, shape, mine))
            yield rank, found


def describe_layout(shards: dict[str, TensorShard]) -> tuple[bytes, list[Tensor]]:
    """Return a rank's layout, and the tensors of its chunks in the same order.

    Raises:
        CheckpointError: a chunk has another shape than given, or a dtype that cannot be saved.
    """
    entries: list[Any] = []
    tensors = []
    for name, shard in shards.items():
        chunks = list(_filled(shard)) if shard.written else []
        for _, sizes, tensor in chunks:
            if tuple(tensor.shape) != sizes:
                raise CheckpointError(
                    f"{name}: a chunk of sizes {sizes} is given as {tuple(tensor.shape)}"
                )
            if tensor.dtype not in DTYPE_NAMES:
                raise CheckpointError(f"{name}: {tensor.dtype} cannot be saved; convert it")
            tensors.append(tensor)
        for dtype in dict.fromkeys(tensor.dtype for *_, tensor in chunks):
            boxes = [box for *box, tensor in chunks if tensor.dtype == dtype]
            entries.append([name, DTYPE_NAMES[dtype], shard.global_shape, boxes])
    return zlib.compress(json.dumps(entries, separators=(",", ":")).encode(), 1), tensors


def read_layout(layout: bytes) -> list[WrittenEntry]:
    """Return the entries of a layout: name, dtype, shape, and (offset, sizes) of each chunk."""
    entries: list[WrittenEntry] = json.loads(zlib.decompress(layout))
    return entries


def decode_layout(layout: bytes) -> list[Chunk]:
    """Return the chunks of a layout."""
    return [
        Chunk(name, dtype, tuple(shape), tuple(offset), tuple(sizes))
        for name, dtype, shape, boxes in read_layout(layout)
        for offset, sizes in boxes
    ]


def bits(mask: bytes) -> list[int]:
    """Return the bits of a mask, padded with zeros."""
    found: list[int] = np.unpackbits(np.frombuffer(mask, np.uint8)).tolist()
    return found


def assign_writers(layouts: Sequence[bytes]) -> list[bytes]:
    """Return, for each rank's layout, the bits of the chunks that the rank writes.

    Raises:
        CheckpointError: ranks disagree on a tensor, or its chunks do not tile it.
    """
    ranks_of: dict[bytes, list[int]] = {}
    for rank, layout in enumerate(layouts):
        ranks_of.setdefault(layout, []).append(rank)
    lengths: list[int] = []
    kinds: Kinds = {}
    holders: Holders = {}
    for number, layout in enumerate(ranks_of):
        place = 0
        for name, dtype, shape, boxes in read_layout(layout):
            kinds.setdefault(name, set()).add((dtype, tuple(shape)))
            of_tensor = holders.setdefault(name, {})
            for start, extent in boxes:
                box, holder = (tuple(start), tuple(extent)), (number, place)
                of_tensor[box] = (*of_tensor[box], holder) if box in of_tensor else (holder,)
                place += 1
        lengths.append(place)
    if faults := find_faults(kinds, holders):
        raise CheckpointError("\n  ".join(faults))
    groups, assigned = list(ranks_of.values()), [0] * len(layouts)
    masks = [bytearray() for _ in layouts]
    for ranks, length in zip(groups, lengths, strict=True):
        for rank in ranks:
            masks[rank] = bytearray(length)
    for name in list(holders):
        of_tensor = holders.pop(name)  # Freed one by one: all at once would stop other threads.
        itemsize = DTYPES[next(iter(kinds[name]))[0]].itemsize
        for (_, sizes), held in of_tensor.items():
            # Each group's rank with the fewest bytes, then the best of those.
            best = [
                (min(groups[number], key=assigned.__getitem__), where) for number, where in held
            ]
            rank, where = min(best, key=lambda found: (assigned[found[0]], found[0]))
            assigned[rank] += prod(sizes) * itemsize
            masks[rank][where] = 1
    return [np.packbits(np.frombuffer(mask, np.uint8)).tobytes() for mask in masks]


def find_faults(kinds: Kinds, holders: Holders) -> list[str]:
    """Return, by name, disagreements between ranks and tensors that the chunks do not tile."""
    faults = []
    for name, found in kinds.items():
        if len(found) > 1:
            named = sorted((str(DTYPES[dtype]), shape) for dtype, shape in found)
            faults.append(f"{name}: ranks disagree on dtype and shape: {named}")
        elif fault := tiling_fault(next(iter(found))[1], sorted(holders[name])):
            faults.append(f"{name}: {fault}")
    return faults


# ----------------------------------------------------------------------------------------- loading


@dataclass(frozen=True)
class Part:
    """The part of a saved chunk that a rank wants, and where it goes."""

    target: Tensor
    """Receives the part; of its shape."""
    start: tuple[int, ...]
    """Offset of the part within the chunk."""


def plan_reads(
    chunks: Sequence[ChunkRecord], shard: TensorShard
) -> list[tuple[ChunkRecord, list[Part]]]:
    """Return the saved chunks of a tensor that meet a rank's rectangles, with the parts to copy."""
    wanted = list(_filled(shard))
    if not wanted:
        return []
    starts, shapes = (
        np.array([getattr(chunk, field) for chunk in chunks], np.int64).reshape(
            len(chunks), len(shard.global_shape)
        )
        for field in ("offset", "shape")
    )
    parts: dict[int, list[Part]] = {}
    for offset, sizes, tensor in wanted:
        low = np.maximum(starts, offset)
        high = np.minimum(starts + shapes, np.add(offset, sizes))
        for k in np.flatnonzero((low < high).all(1)).tolist():
            target = tensor.detach()
            for dim, (a, b) in enumerate(zip(low[k].tolist(), high[k].tolist(), strict=True)):
                target = target.narrow(dim, a - offset[dim], b - a)
            parts.setdefault(k, []).append(Part(target, tuple((low[k] - starts[k]).tolist())))
    return [(chunks[k], parts[k]) for k in sorted(parts)]


def _filled(shard: TensorShard) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], Tensor]]:
    """Yield the non-empty chunks; an empty one would share its offset with a full one."""
    for offset, sizes, tensor in shard.chunks:
        if tensor.numel():
            yield tuple(offset), tuple(sizes), tensor
