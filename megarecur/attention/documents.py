"""The boundaries of documents in a micro batch, counted on the CPU.

The samples of a micro batch are laid end to end: token (b, s) is row b S + s of B S rows. A
document never crosses the end of a sample. Shapes: B samples, S positions, U documents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megarecur.parallel.transfer import send


@dataclass(frozen=True, eq=False)
class Boundaries:
    """The rows at which the documents of a micro batch begin and end. A run of padding is a
    document too."""

    cu_seqlens: Tensor
    """int32 [B S + 1] on the CPU: the first row of each document, then B S repeated. Its size does
    not depend on the number of documents, so that one compiled graph serves every micro batch."""
    on_device: Tensor
    """`cu_seqlens` on the device of the tokens."""
    longest: int
    """Tokens of the longest document."""
    batch: int
    """B."""
    length: int
    """S."""
    count: int
    """U."""
    per_sample: int = 0
    """Documents of every sample, empty ones included, if all samples have equally many; else 0."""

    @property
    def edges(self) -> NDArray[np.int32]:
        """The first row of each document, and B S, as int32 [U + 1]."""
        edges: NDArray[np.int32] = self.cu_seqlens.numpy()
        return edges[: self.count + 1]

    def lengths_within(self, span: int) -> NDArray[np.int64]:
        """Return the tokens of each document, cut every `span` positions of its sample."""
        if span >= self.length:
            return np.diff(self.edges).astype(np.int64)
        samples = np.arange(self.batch) * self.length
        cuts = samples[:, None] + np.arange(0, self.length, span)
        return np.diff(np.unique(np.concatenate((self.edges, cuts.ravel()))))

    def to(self, device: torch.device | str) -> Boundaries:
        """Return the boundaries with their copy on a device."""
        return replace(self, on_device=send(self.cu_seqlens, device))

    def select(self, rows_b: Tensor) -> Boundaries:
        """Return the boundaries of the samples `rows_b`, in this order. Waits for the device."""
        edges, rows, each = self.edges, np.array(rows_b.tolist(), np.int64), self.per_sample
        if each:
            starts, stops = rows * each, (rows + 1) * each
        else:
            starts = edges.searchsorted(rows * self.length)
            stops = edges.searchsorted((rows + 1) * self.length)
        lengths = np.diff(edges)
        parts = [lengths[a:b] for a, b in zip(starts, stops, strict=True)]
        found = from_lengths(np.concatenate(parts), len(rows), self.length, each)
        return found.to(self.on_device.device)

    def narrow(self, start: int, stop: int) -> Boundaries:
        """Return the boundaries of positions `start` to `stop` of every sample."""
        edges, length = self.edges, self.length
        firsts = np.clip(edges[:-1] % length, start, stop)
        ends = np.clip((edges[1:] - 1) % length + 1, start, stop)
        lengths = (ends - firsts)[ends > firsts]
        found = from_lengths(lengths, self.batch, stop - start)
        return found.to(self.on_device.device)


def used_edges(cu_seqlens: Tensor) -> NDArray[np.int32]:
    """Return the part of `Boundaries.cu_seqlens` before its end repeats, as int32 [U + 1]."""
    edges: NDArray[np.int32] = cu_seqlens.numpy()
    return edges[: int(edges.searchsorted(edges[-1])) + 1]


def from_lengths(lengths: NDArray[Any], batch: int, length: int, per_sample: int = 0) -> Boundaries:
    """Return the boundaries of documents by their lengths, which make up B samples of S tokens."""
    edges = np.full(max(batch * length, len(lengths)) + 1, batch * length, np.int32)
    edges[0] = 0
    np.cumsum(lengths, out=edges[1 : len(lengths) + 1])
    cu_seqlens = torch.from_numpy(edges)
    longest = int(lengths.max()) if len(lengths) else 0
    return Boundaries(cu_seqlens, cu_seqlens, longest, batch, length, len(lengths), per_sample)


@lru_cache(maxsize=64)
def whole_samples(batch: int, length: int, device: torch.device) -> Boundaries:
    """Return the boundaries of samples that are one document each."""
    return from_lengths(np.full(batch, length), batch, length).to(device)


def count_documents(documents_BS: Tensor) -> int:
    """Count the documents of a micro batch on the CPU; padding (-1) is none, and the part of a
    document in one sample counts as one."""
    numbers = documents_BS.numpy()
    begins = numbers >= 0
    begins[:, 1:] &= numbers[:, 1:] != numbers[:, :-1]
    return int(begins.sum())


def count_boundaries(documents_BS: Tensor) -> Boundaries:
    """Return the boundaries of documents by number. A document is a run of equal numbers in a
    sample. Waits for the device, so the loader counts the boundaries of training data instead."""
    batch, length = documents_BS.shape
    numbers = documents_BS.cpu().numpy()
    begins = np.ones((batch, length), bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    edges = np.append(np.flatnonzero(begins), batch * length)
    return from_lengths(np.diff(edges), batch, length).to(documents_BS.device)
