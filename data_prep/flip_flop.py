"""Flip-flop language (Liu, Ash, Goel, Krishnamurthy & Zhang 2023): remember the last written bit.

    w 1 i 0 i 1 r 1 w 0 r 0

A string consists of pairs of an instruction and a bit. The first instruction is w, the last r; each
other one is i with probability p_i, otherwise w or r. The bit after r is that of the latest w.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from megarecur.errors import DataError

WORDS = ("w", "r", "i", "0", "1")
WRITE, READ, IGNORE = range(3)
ROWS = 256
"""Number of strings drawn together."""
MOST_IN_VAIN = 100_000


def draw_strings(
    rng: np.random.Generator, p_ignore: float, length: int, rows: int
) -> NDArray[np.int8]:
    """Draw strings as int8 [rows, length]: instructions 0 to 2 (w, r, i) at even places, bits at
    odd."""
    pairs = length // 2
    drawn = rng.random((rows, pairs))
    # [0, p) is ignore; the rest is halved between w and r.
    written = drawn < p_ignore + (1.0 - p_ignore) / 2
    instructions = np.where(drawn < p_ignore, IGNORE, np.where(written, WRITE, READ))
    instructions[:, 0], instructions[:, -1] = WRITE, READ
    bits = rng.integers(0, 2, (rows, pairs))
    places = np.where(instructions == WRITE, np.arange(pairs), 0)
    latest = np.maximum.accumulate(places, axis=1)
    remembered = np.take_along_axis(bits, latest, axis=1)
    bits = np.where(instructions == READ, remembered, bits)
    strings = np.stack([instructions, bits], axis=-1).reshape(rows, length)
    return np.asarray(strings, np.int8)


def draw_distinct(
    rng: np.random.Generator, p_ignore: float, length: int, seen: set[bytes]
) -> Iterator[tuple[NDArray[np.int8], NDArray[np.int8]]]:
    """Yield (string, targets), both int8 [length], of strings not in `seen`, and add them to it.
    The target at an r is the bit that follows, elsewhere -1.

    Raises:
        DataError: an impossible probability or length, or no further strings exist.
    """
    import xxhash

    if not 0.0 <= p_ignore <= 1.0:
        raise DataError(f"--p-ignore {p_ignore} must be a probability, between 0 and 1")
    if length < 4 or length % 2:
        raise DataError(f"--length {length} must be even and at least 4: w, a bit, r, a bit")
    vain = 0
    while True:
        for string in draw_strings(rng, p_ignore, length, ROWS):
            key = xxhash.xxh3_128_digest(string.tobytes())
            if key in seen:
                vain += 1
                if vain == MOST_IN_VAIN:
                    raise DataError(
                        f"flip_flop: no further strings of --length {length} were found after "
                        f"{len(seen):,}; request fewer or longer ones"
                    )
                continue
            vain = 0
            seen.add(key)
            yield string, find_targets(string)


def find_targets(string: NDArray[np.int8]) -> NDArray[np.int8]:
    """Return int8 [length]: at every r the bit that follows it, elsewhere -1."""
    targets = np.full(string.size, -1, np.int8)
    reads = np.flatnonzero(string[::2] == READ) * 2
    targets[reads] = string[reads + 1]
    return targets
