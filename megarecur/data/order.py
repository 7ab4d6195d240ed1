"""Which sample is read at which position: pure functions of (seed, epoch, position).

Positions count samples of all global batches from the start of the run. Two questions are answered
for any block of positions, without reading the ones before it:

    mixture   which source a position belongs to, and how many samples that source gave before it
    permute   which of a source's n windows its k-th sample of an epoch is
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15


def mix64(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit integers that scatters them (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def epoch_keys(seed: int, source: int, epochs: np.ndarray) -> np.ndarray:
    """One 64-bit key per epoch (any shape, uint64) for a source of a run."""
    # Arrays of one element, not scalars: numpy warns when scalars wrap around, as they do here.
    key = np.array([seed % 2**64], np.uint64)
    for part in (np.array([source], np.uint64), np.atleast_1d(epochs).astype(np.uint64)):
        key = mix64(key + np.uint64(_GOLDEN)) ^ mix64(~part)
    return mix64(key)


def permute(indices: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Shuffle indices of range(n), each under its own key: a bijection of range(n) for every key.

    A Feistel network permutes the smallest power of two that holds n; results of n or more are put
    through it again until they fall below (cycle walking): less than two passes on average.

    Args:
        indices: any shape, values in [0, n).
        n: how many there are, at least 1.
        keys: uint64, the shape of `indices` or one that broadcasts to it.

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
            # Each half is changed by a function of the other alone, which can be undone.
            key = key + np.uint64(_GOLDEN)
            if i % 2:
                high = high ^ (mix64(low ^ key) & high_mask)
            else:
                low = low ^ (mix64(high ^ key) & low_mask)
        x[todo] = high << low_bits | low
        todo = x >= n
    return x.astype(np.int64)


def mixture(start: int, stop: int, weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The source of each position in [start, stop), and its number among that source's samples.

    Sample i of a source of share w (of 1) is due at time (i + 1/2) / w; positions follow the order
    of due times, lower source first. Of any first p positions, a source of k has p w within
    (1 + k w) / 2, whatever the block that is asked for.

    Returns:
        (sources, numbers), int64, each of length stop - start.
    """
    if len(weights) == 1:
        return np.zeros(stop - start, np.int64), np.arange(start, stop)
    shares = np.array(weights, np.float64) / sum(weights)
    # By time t, the sources have given t samples, give or take half a sample each.
    slack = len(shares) / 2 + 1
    begin = [_count_due(share, start - slack) for share in shares]
    end = [_count_due(share, stop + slack) for share in shares]
    sources = np.repeat(np.arange(len(shares)), np.subtract(end, begin))
    numbers = np.concatenate([np.arange(b, e) for b, e in zip(begin, end, strict=True)])
    order = np.lexsort((sources, _due(shares[sources], numbers)))
    kept = order[start - sum(begin) :][: stop - start]
    return sources[kept], numbers[kept]


def counts_before(position: int, weights: Sequence[float]) -> list[int]:
    """How many samples each source gave before a position; they sum to `position`."""
    if len(weights) == 1 or position == 0:
        return [position] + [0] * (len(weights) - 1)
    counts = []
    sources, numbers = mixture(position - 1, position, weights)
    slack = len(weights) / 2 + 1
    shares = np.array(weights, np.float64) / sum(weights)
    # The last position before: everything due no later than it (ties: lower sources) came before.
    last, due = sources[0], _due(shares[sources[0]], numbers[0])
    for source, share in enumerate(shares):
        begin = _count_due(share, position - slack)
        later = np.arange(begin, _count_due(share, position + slack))
        times = _due(share, later)
        before = times <= due if source <= last else times < due
        counts.append(begin + int(np.count_nonzero(before)))
    return counts


def _due(share: np.ndarray | float, number: np.ndarray | int) -> np.ndarray:
    """When a sample is due. The only place where this is computed, so that it rounds in one way."""
    return np.asarray((number + 0.5) / share)


def _count_due(share: float, time: float) -> int:
    """How many samples of a source are due before a time."""
    count = max(int(time * share + 0.5), 0)
    while count > 0 and _due(share, count - 1) >= time:
        count -= 1
    while _due(share, count) < time:
        count += 1
    return count
