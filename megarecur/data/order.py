"""The order of samples: pure functions of (seed, epoch, position).

Positions count samples of all global batches from the start of the run. Two functions work on any
block of positions without reading earlier ones:

    mixture the source of a position, and the number of samples that source gave before it permute
    the window, of a source's n windows, of its k-th sample in an epoch

A `SampleOrder` (`WholeOrder`, `ShardOrder`, `BatchOrder`) of one corpus maps each sample to its
window, the window's start and the shards it needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
Epoch = tuple[list[NDArray[np.int64]], NDArray[np.int64], NDArray[np.uint64]]
"""The parts of one epoch of a `ShardOrder`."""


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scatter 64-bit integers by a bijection (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def epoch_keys(seed: int, source: int, epochs: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return one 64-bit key per epoch (any shape, uint64) for a source of a run."""
    # Arrays of one element, not scalars: numpy warns when scalars wrap around, as they do here.
    key = np.array([seed % 2**64], np.uint64)
    for part in (np.array([source], np.uint64), np.atleast_1d(epochs).astype(np.uint64)):
        key = _join(key, part)
    return mix64(key)


def _join(key: NDArray[np.uint64], part: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a key that depends on another one and on a number."""
    joined: NDArray[np.uint64] = mix64(key + np.uint64(_GOLDEN)) ^ mix64(~part)
    return joined


def permute(indices: NDArray[np.int64], n: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Shuffle indices of range(n), each under its own key: a bijection of range(n) for every key.

    A Feistel network permutes the smallest power of two that holds n; results of n or more are put
    through it again until they fall below (cycle walking): less than two passes on average.

    Args:
        indices: any shape, values in [0, n).
        n: size of the range, at least 1.
        keys: uint64, of the shape of `indices` or one that broadcasts to it.

    Returns:
        int64, the shape of `indices`.
    """
    x = np.array(indices, np.uint64)
    bits = max((n - 1).bit_length(), 2)
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    keys = np.broadcast_to(keys, x.shape)
    todo = np.ones(x.shape, bool)
    while todo.any():
        value, key = x[todo], keys[todo]
        high, low = value >> low_bits, value & low_mask
        for i in range(ROUNDS):
            # Each half is changed by a function of the other alone, which is invertible.
            key = key + np.uint64(_GOLDEN)
            if i % 2:
                high = high ^ (mix64(low ^ key) & high_mask)
            else:
                low = low ^ (mix64(high ^ key) & low_mask)
        x[todo] = high << low_bits | low
        todo = x >= n
    return x.astype(np.int64)


class SampleOrder(ABC):
    """The order of one corpus's samples, which are numbered on through the epochs."""

    num_windows: int
    """Number of samples in an epoch."""

    @abstractmethod
    def windows(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the windows, int64 in [0, num_windows), of samples by their numbers."""

    @abstractmethod
    def starts(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the token at which each window starts, int64."""

    @abstractmethod
    def blocks(self, first: int, last: int) -> list[Sequence[int]]:
        """Return the shards that samples first to last need together, block by block in reading
        order, followed by later blocks."""

    @abstractmethod
    def shards_at_once(self, samples: float) -> int:
        """Return how many shards a local cache must hold if a step reads `samples` samples."""


class WholeOrder(SampleOrder):
    """Windows of one stream of tokens, in order or shuffled each epoch over the whole corpus.

    Args:
        shard_starts: first token of each shard, and the end of the last.
        source: the corpus's place in the mixture.
    """

    def __init__(
        self,
        shard_starts: Sequence[int],
        num_tokens: int,
        seq_length: int,
        shuffle: bool,
        seed: int,
        source: int,
    ) -> None:
        self.shard_starts = np.asarray(shard_starts)
        self.seq_length, self.shuffle, self.seed, self.source = seq_length, shuffle, seed, source
        self.num_windows = (num_tokens - 1) // seq_length

    def windows(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the windows of samples; see `SampleOrder`."""
        epochs, indices = np.divmod(numbers, self.num_windows)
        if not self.shuffle:
            return indices
        return permute(indices, self.num_windows, epoch_keys(self.seed, self.source, epochs))

    def starts(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the starts of windows; see `SampleOrder`."""
        return windows * self.seq_length

    def blocks(self, first: int, last: int) -> list[Sequence[int]]:
        """Return the shards needed together: all of them if shuffled, otherwise one after
        another."""
        shards = range(len(self.shard_starts) - 1)
        if self.shuffle:
            return [shards]
        epochs, windows = np.divmod([first, last], self.num_windows)
        places = self.shard_starts.searchsorted(self.starts(windows), "right") - 1
        begin, end = epochs * len(shards) + places
        return [[shard % len(shards)] for shard in range(begin, end + 2)]

    def shards_at_once(self, samples: float) -> int:
        """Return the number of shards needed at once; see `SampleOrder`."""
        num_shards = len(self.shard_starts) - 1
        if self.shuffle:
            return num_shards
        return 1 + ceil(samples * num_shards / self.num_windows)


class BatchOrder(WholeOrder):
    """Batches of sentence pairs of like length, by their number of tokens; windows are batches.

    Pairs are sorted by length and cut into batches, once for the run, so that an epoch has a fixed
    number of batches and any position is found without counting earlier epochs. Each epoch shuffles
    the batches, and the pairs of equal source and target length among each other. Without
    shuffling, consecutive pairs of the corpus are cut, whatever their lengths.

    Args:
        lengths_P2: tokens of the source and the target of each pair.
        batch_tokens: most tokens of a batch, padding included; see `cut_batches`.
        shuffle, seed, source: see `WholeOrder`.
    """

    def __init__(
        self, lengths_P2: NDArray[Any], batch_tokens: int, shuffle: bool, seed: int, source: int
    ) -> None:
        self.num_pairs = len(lengths_P2)
        self.order = sort_by_length(lengths_P2) if shuffle else np.arange(self.num_pairs)
        """Pair at each place of the sorted corpus, int64 [num_pairs]."""
        sorted_P2 = lengths_P2[self.order]
        self.firsts = cut_batches(sorted_P2, batch_tokens)
        """Place of the first pair of each batch, int64 [num_windows + 1]."""
        changes = (sorted_P2[1:] != sorted_P2[:-1]).any(axis=1)
        self.cells = np.concatenate([[0], np.flatnonzero(changes) + 1, [self.num_pairs]])
        """Place of the first pair of each run of equal lengths, and the number of pairs."""
        n = len(self.firsts) - 1
        super().__init__((0, n), n + 1, 1, shuffle, seed, source)

    def pairs(self, epoch: int, batch: int) -> NDArray[np.int64]:
        """Return the pairs of a batch in an epoch, int64."""
        first, last = self.firsts[batch : batch + 2].tolist()
        places = np.arange(first, last)
        if not self.shuffle:
            return places
        low, high = self.cells.searchsorted((first, last - 1), "right")
        key = epoch_keys(self.seed, self.source, np.array([epoch]))
        for cell in range(low - 1, high):
            begin, end = self.cells[cell : cell + 2].tolist()
            if end - begin > 1:
                own = slice(max(begin - first, 0), end - first)
                keys = mix64(_join(key, np.array([cell], np.uint64)))
                places[own] = begin + permute(places[own] - begin, end - begin, keys)
        return self.order[places]


def sort_by_length(lengths_P2: NDArray[Any]) -> NDArray[np.int64]:
    """Return pairs by source length, and among equal ones by target length, ascending and
    descending in turns: neighbours then have like lengths on both sides.
    """
    sources_P, targets_P = lengths_P2[:, 0], lengths_P2[:, 1]
    turned_P = np.where(sources_P % 2, targets_P, -targets_P)
    order: NDArray[np.int64] = np.lexsort((turned_P, sources_P))
    return order


def cut_batches(lengths_P2: NDArray[Any], batch_tokens: int) -> NDArray[np.int64]:
    """Cut pairs into batches of consecutive ones, each as large as batch_tokens allows.

    A batch of n pairs has n x (longest source + longest target) tokens. A pair that exceeds
    batch_tokens is a batch of its own.

    Returns:
        int64, the first pair of each batch, and the number of pairs.
    """
    firsts, n = [0], len(lengths_P2)
    while firsts[-1] < n:
        first = firsts[-1]
        # The first pair alone bounds the number of pairs.
        most = max(batch_tokens // int(lengths_P2[first].sum()), 1)
        longest = np.maximum.accumulate(lengths_P2[first : first + most])
        sizes = longest.sum(axis=1) * np.arange(1, len(longest) + 1)
        firsts.append(first + max(int(sizes.searchsorted(batch_tokens, "right")), 1))
    return np.array(firsts)


class ShardOrder(SampleOrder):
    """Windows inside shards, each epoch shuffled in blocks of whole shards.

    Each epoch the shards are permuted and cut in blocks; the windows of each block are permuted
    among themselves. So blocks are read one by one, and each needs only its own shards. A shard of
    T tokens has (T - 1) // seq_length windows, none of which crosses its end; windows are numbered
    through all shards.

    Args:
        shard_starts, num_tokens, seq_length, seed, source: see `WholeOrder`.
        shards_per_block: shards of each block; the last block of an epoch has the remainder.
    """

    def __init__(
        self,
        shard_starts: Sequence[int],
        num_tokens: int,
        seq_length: int,
        shards_per_block: int,
        seed: int,
        source: int,
    ) -> None:
        ends = np.minimum(np.asarray(shard_starts, np.int64), num_tokens)
        self.shard_starts, self.seq_length = ends[:-1], seq_length
        self.sizes = np.maximum(np.diff(ends) - 1, 0) // seq_length
        self.firsts = self.sizes.cumsum() - self.sizes
        self.num_windows = int(self.sizes.sum())
        self.filled = np.flatnonzero(self.sizes)
        """Shards that have at least one window."""
        self.num_blocks = -(-self.filled.size // shards_per_block)
        self.shards_per_block, self.seed, self.source = shards_per_block, seed, source
        self._epochs: dict[int, Epoch] = {}

    def windows(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the windows of samples; see `SampleOrder`."""
        epochs, indices = np.divmod(numbers, self.num_windows)
        windows = np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            blocks, begins, key = self._epoch(epoch)
            own = np.flatnonzero(epochs == epoch)
            numbers_of_blocks = begins.searchsorted(indices[own], "right") - 1
            for number in np.unique(numbers_of_blocks).tolist():
                rows, shards = own[numbers_of_blocks == number], blocks[number]
                begin, n = int(begins[number]), int(self.sizes[shards].sum())
                keys = mix64(_join(key, np.array([number], np.uint64)))
                inside = permute(indices[rows] - begin, n, keys)
                ends = self.sizes[shards].cumsum()
                place = ends.searchsorted(inside, "right")
                windows[rows] = inside + (self.firsts[shards] - ends + self.sizes[shards])[place]
        return windows

    def starts(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the starts of windows; see `SampleOrder`."""
        shards = self.firsts.searchsorted(windows, "right") - 1
        starts = self.shard_starts[shards] + (windows - self.firsts[shards]) * self.seq_length
        return np.asarray(starts, np.int64)

    def blocks(self, first: int, last: int) -> list[Sequence[int]]:
        """Return the shards needed together, block by block; see `SampleOrder`."""
        begin, end = self._count_blocks(first), self._count_blocks(last) + 2
        places = [divmod(block, self.num_blocks) for block in range(begin, end)]
        return [self._epoch(epoch)[0][place].tolist() for epoch, place in places]

    def _count_blocks(self, number: int) -> int:
        """Return the number of blocks, over all epochs, before that of a sample."""
        epoch, index = divmod(number, self.num_windows)
        place = int(self._epoch(epoch)[1].searchsorted(index, "right")) - 1
        return epoch * self.num_blocks + place

    def shards_at_once(self, samples: float) -> int:
        """Return the shards of two blocks, or of as many more as a step reads from."""
        at_once = 1 + ceil(samples * self.num_blocks / self.num_windows)
        return min(at_once * self.shards_per_block, self.filled.size)

    def _epoch(self, epoch: int) -> Epoch:
        """Return the blocks of an epoch, the first sample of each, and the epoch's key; some are
        cached."""
        if epoch not in self._epochs:
            key, n = epoch_keys(self.seed, self.source, np.array([epoch])), self.filled.size
            shards = self.filled[permute(np.arange(n), n, key)]
            blocks = np.split(shards, range(self.shards_per_block, n, self.shards_per_block))
            ends = np.array([self.sizes[block].sum() for block in blocks]).cumsum()
            while len(self._epochs) > 4:
                self._epochs.pop(next(iter(self._epochs)), None)
            self._epochs[epoch] = blocks, np.concatenate([[0], ends[:-1]]), key
        return self._epochs[epoch]


def mixture(
    start: int, stop: int, weights: Sequence[float]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the source of each position in [start, stop), and its number among that source's
    samples.

    Sample i of a source of share w (of 1) is due at time (i + 1/2) / w; positions follow the order
    of due times, lower source first. Among the first p positions, each of k sources has p w samples
    within (1 + k w) / 2, whatever the requested block.

    Returns:
        (sources, numbers), int64, each of length stop - start.
    """
    if len(weights) == 1:
        return np.zeros(stop - start, np.int64), np.arange(start, stop)
    shares = np.array(weights, np.float64) / sum(weights)
    # By time t, the sources have given t samples, within half a sample each.
    slack = len(shares) / 2 + 1
    begin = [_count_due(share, start - slack) for share in shares]
    end = [_count_due(share, stop + slack) for share in shares]
    sources = np.repeat(np.arange(len(shares)), np.subtract(end, begin))
    numbers = np.concatenate([np.arange(b, e) for b, e in zip(begin, end, strict=True)])
    order = np.lexsort((sources, _due(shares[sources], numbers)))
    kept = order[start - sum(begin) :][: stop - start]
    return sources[kept], numbers[kept]


def counts_before(position: int, weights: Sequence[float]) -> list[int]:
    """Return how many samples each source gave before a position; they sum to `position`."""
    if len(weights) == 1 or position == 0:
        return [position] + [0] * (len(weights) - 1)
    counts = []
    sources, numbers = mixture(position - 1, position, weights)
    slack = len(weights) / 2 + 1
    shares = np.array(weights, np.float64) / sum(weights)
    # Everything due no later than the previous position (ties: lower sources) came before.
    last, due = sources[0], _due(shares[sources[0]], numbers[0])
    for source, share in enumerate(shares):
        begin = _count_due(share, position - slack)
        later = np.arange(begin, _count_due(share, position + slack))
        times = _due(share, later)
        before = times <= due if source <= last else times < due
        counts.append(begin + int(np.count_nonzero(before)))
    return counts


def _due(share: NDArray[Any] | float, number: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Return when a sample is due. Only this function computes it, so rounding is consistent."""
    return np.asarray((number + 0.5) / share)


def _count_due(share: float, time: float) -> int:
    """Return how many samples of a source are due before a time."""
    count = max(int(time * share + 0.5), 0)
    while count > 0 and _due(share, count - 1) >= time:
        count -= 1
    while _due(share, count) < time:
        count += 1
    return count
