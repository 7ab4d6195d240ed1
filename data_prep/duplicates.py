"""Near-duplicates by MinHash and locality-sensitive hashing, with the library datasketch.

Two documents are as similar as the sets of five words in a row that they are made of: the size of
what both have over the size of what any has (Jaccard). A signature of NUM_HASHES numbers estimates
it with a standard deviation of at most 0.045 (Broder 1997).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec

import numpy as np
import xxhash

from megarecur.errors import ConfigError

WORDS, NUM_HASHES = 5, 128


def check_library() -> None:
    """Refuse to begin where the library is missing.

    Raises:
        ConfigError: naming the extra to install.
    """
    if find_spec("datasketch") is None:
        raise ConfigError(
            "near_duplicates needs the library datasketch, which is not installed; "
            "pip install 'megarecur[dedup]', or leave --near-duplicates out"
        )


def signature(document: bytes) -> np.ndarray:
    """NUM_HASHES uint32; equal sets of shingles have equal signatures."""
    from datasketch import MinHash

    words = document.lower().split()
    shingles = {b" ".join(words[i : i + WORDS]) for i in range(max(len(words) - WORDS + 1, 1))}
    found = MinHash(NUM_HASHES, seed=1, hashfunc=xxhash.xxh32_intdigest)
    found.update_batch(sorted(shingles))
    return np.asarray(found.hashvalues).astype(np.uint32)


def find_near_duplicates(
    signatures: Sequence[np.ndarray], order: Iterable[int], threshold: float
) -> list[int]:
    """Which documents are at least as similar as the threshold to one before them that is kept.

    Args:
        signatures: of all documents.
        order: numbers of the documents to consider, in the order that decides which one stays.
        threshold: similarity, above 0 and below 1.
    """
    from datasketch import MinHash, MinHashLSH

    lookup = MinHashLSH(threshold, NUM_HASHES)
    dropped = []
    for i in order:
        one = MinHash(NUM_HASHES, seed=1)
        one.hashvalues = signatures[i].astype(one.hashvalues.dtype)
        # Candidates share a band of the signature; the whole signature decides.
        if any(np.mean(signatures[i] == signatures[j]) >= threshold for j in lookup.query(one)):
            dropped.append(i)
        else:
            lookup.insert(i, one)
    return dropped
