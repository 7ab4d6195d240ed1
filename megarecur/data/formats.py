"""Which class reads a corpus: ours, one that is fetched from a remote, or another program's."""

from __future__ import annotations

from pathlib import Path

from megarecur.data.corpus import Corpus, check_tokenizer, read_manifest
from megarecur.data.foreign import ForeignCorpus, is_foreign
from megarecur.data.remote import RemoteCorpus
from megarecur.data.tokenizer import load_tokenizer


def open_corpus(
    path: str | Path,
    tokenizer: str,
    fingerprint: str,
    verify: bool = True,
    part: int = 0,
    num_parts: int = 1,
    remote: str | None = None,
    cache_gb: float | None = None,
) -> Corpus:
    """Open a corpus that was made with this tokenizer; see `Corpus` and `RemoteCorpus` for the
    rest.

    A folder with an index.json but no manifest.json was written by another program: see
    `ForeignCorpus`.

    Raises:
        ConfigError: the limit of the cache is too small.
        DataError: the tokenizer differs, or a file is missing or damaged.
    """
    if remote is not None:
        corpus = RemoteCorpus(path, remote, cache_gb, verify)
        check_tokenizer(remote, corpus.manifest, tokenizer, fingerprint)
        return corpus
    if is_foreign(path):
        return ForeignCorpus(path, load_tokenizer(tokenizer), verify, part, num_parts)
    check_tokenizer(path, read_manifest(path), tokenizer, fingerprint)
    return Corpus(path, verify, part, num_parts)
