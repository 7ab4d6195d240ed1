"""The part of a tensor that a rank owns: rectangles of it, under the tensor's global name.

Tensor parallelism cuts rows or columns, ZeRO cuts flat slices; both are lists of rectangles, so a
checkpoint written on one mesh can be read on any other.
"""

from dataclasses import dataclass
from math import prod

import numpy as np
from torch import Tensor

Box = tuple[tuple[int, ...], tuple[int, ...]]  # (offset, sizes) within the whole tensor

MANY = 16
"""Number of chunks above which a shortcut is worth trying."""


@dataclass(frozen=True)
class TensorShard:
    """The part of one unique tensor on this rank: rectangles (offset, sizes, tensor) of
    `global_shape`.

    Ranks with replicas have equal rectangles, which are written once. If replicas are cut in
    different places, only one of them is `written`; the others are only read.
    """

    global_shape: tuple[int, ...]
    chunks: list[tuple[tuple[int, ...], tuple[int, ...], Tensor]]
    written: bool = True


def whole(tensor: Tensor) -> TensorShard:
    """Return the shard of a rank that holds all of `tensor`."""
    shape = tuple(tensor.shape)
    return TensorShard(shape, [((0,) * len(shape), shape, tensor)])


def boxes(global_shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Cut elements [start, stop) of a row-major tensor into at most 2*ndim-1 boxes, in order."""
    if start >= stop:
        return []
    if not global_shape:
        return [((), ())]
    rest = global_shape[1:]
    row = prod(rest)
    first, last = start // row, -(-stop // row)  # rows touched: [first, last)
    if last - first == 1 and stop - start < row:
        return _within_row(first, rest, start - first * row, stop - first * row)
    found: list[Box] = []
    if start > first * row:
        found += _within_row(first, rest, start - first * row, row)
        first += 1
    tail = stop - (last - 1) * row
    whole_end = last if tail == row else last - 1
    if first < whole_end:
        found.append(((first, *(0,) * len(rest)), (whole_end - first, *rest)))
    if tail < row:
        found += _within_row(last - 1, rest, 0, tail)
    return found


def _within_row(row: int, rest: tuple[int, ...], start: int, stop: int) -> list[Box]:
    return [((row, *offset), (1, *sizes)) for offset, sizes in boxes(rest, start, stop)]


def tiling_fault(global_shape: tuple[int, ...], chunks: list[Box]) -> str:
    """Return why `chunks` do not tile `global_shape` exactly; "" if they do."""
    shape = tuple(global_shape)
    if len(chunks) > MANY and _follow_in_memory(shape, chunks):
        return ""
    for offset, sizes in chunks:
        fits = len(offset) == len(sizes) == len(shape) and all(
            o >= 0 and s >= 0 and o + s <= g for o, s, g in zip(offset, sizes, shape, strict=True)
        )
        if not fits:
            return f"chunk {span(offset, sizes)} does not fit the shape {list(shape)}"
    filled = [(offset, sizes) for offset, sizes in chunks if prod(sizes)]
    if shape:
        fault = _overlap(len(shape), filled)
        if fault:
            return fault
    covered = sum(prod(sizes) for _, sizes in filled)
    if covered != prod(shape):
        return f"chunks hold {covered} of {prod(shape)} elements"
    return ""


def _follow_in_memory(shape: tuple[int, ...], chunks: list[Box]) -> bool:
    """Return True if chunks are consecutive in memory and tile the shape; False is no answer.

    A shortcut for the many slices of rows or of flat tensors over thousands of ranks.
    """
    try:
        starts, sizes = np.array(chunks, np.int64).reshape(len(chunks), 2, -1).swapaxes(0, 1)
    except (ValueError, OverflowError):
        return False
    if starts.shape[1] != len(shape) or prod(shape) >= 1 << 62:
        return False
    if (starts < 0).any() or (sizes < 1).any() or (starts + sizes > shape).any():
        return False
    strides = np.array([prod(shape[dim + 1 :]) for dim in range(len(shape))], np.int64)
    first = starts @ strides
    end = (starts + sizes - 1) @ strides + 1
    if (end - first != sizes.prod(1)).any():
        return False
    order = np.argsort(first)
    edges = np.append(first[order], prod(shape))
    return bool(edges[0] == 0 and (edges[1:] == end[order]).all())


def _overlap(ndim: int, chunks: list[Box]) -> str:
    """Find two chunks that share an element, by a sweep along the dim that separates most of them.

    Comparing volumes is not enough: a duplicate chunk can hide a missing one.
    """
    dim = max(range(ndim), key=lambda d: len({offset[d] for offset, _ in chunks}))
    active: list[Box] = []
    for offset, sizes in sorted(chunks, key=lambda chunk: chunk[0][dim]):
        active = [(o, s) for o, s in active if o[dim] + s[dim] > offset[dim]]
        for other, other_sizes in active:
            if all(
                a < b + t and b < a + s
                for a, s, b, t in zip(offset, sizes, other, other_sizes, strict=True)
            ):
                return f"chunks {span(other, other_sizes)} and {span(offset, sizes)} overlap"
        active.append((offset, sizes))
    return ""


def span(offset: tuple[int, ...] | list[int], sizes: tuple[int, ...] | list[int]) -> str:
    """Write a rectangle as a slice: "[0:96,0:64]"."""
    return "[" + ",".join(f"{o}:{o + s}" for o, s in zip(offset, sizes, strict=False)) + "]"
