"""The section `data`: corpora, tokenizer and sequence length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from megarecur.config.base import Count, Length, Section, derived, free
from megarecur.config.images import ImagesConfig

REMOTE_SCHEMES = ("s3", "gs", "sftp", "hf", "oci", "azure", "azure-dl", "dbfs", "alipan")


class Source(Section):
    """One corpus and its share of the samples. A corpus is identified by the hash of its manifest,
    not by its path."""

    path: str = free(min_length=1)
    """Folder of the corpus; with a remote, the folder of the local cache."""
    weight: Annotated[float, Field(ge=1e-9, le=1e9)] = 1.0
    """Share of the samples, relative to the other corpora."""
    remote: str | None = free(None, min_length=1)
    """Location of the corpus, if not `path`: a path, or a URL that mosaicml-streaming downloads
    from (s3://, gs://, sftp://, hf://, ...). Shards are fetched before they are read. Default: the
    corpus is in `path`."""
    cache_gb: Annotated[float, Field(gt=0.0, le=1e9)] | None = free(None)
    """Maximum size of the local cache, in 10^9 bytes. Default: all fetched shards are kept."""

    def find_problems(self) -> Iterator[str]:
        """Yield a bound without a cache, and URLs whose scheme is not supported."""
        if self.cache_gb is not None and self.remote is None:
            yield (
                f"cache_gb={self.cache_gb:g} bounds the cache of a remote; set remote, or leave "
                "cache_gb out"
            )
        scheme, found, _ = (self.remote or "").partition("://")
        if found and scheme not in REMOTE_SCHEMES:
            yield (
                f"remote={self.remote}: {scheme}:// is not read; use one of "
                f"{', '.join(REMOTE_SCHEMES)}, or a path"
            )


class DataConfig(Section):
    """Corpora, tokenizer and sequence length."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Corpora to train on."""
    val: tuple[Source, ...] = free(())
    """Corpora to evaluate on. Default: none."""
    tokenizer: str = Field(json_schema_extra={"resume": "free", "derived": True}, min_length=1)
    """A sentencepiece model, a Hugging Face tokenizer.json, or `bytes`. The path may change when a
    run resumes; the content may not. Of images it is `none`, and may be omitted."""
    seq_length: Length = derived()
    """Tokens per sample; with an encoder, most tokens of a sentence, its end included. Of images it
    is the number of patches, plus the class token, and may be omitted."""
    truncate: bool = False
    """Cut longer sentences of an encoder-decoder to seq_length, their end included; false: they are
    an error before training."""
    images: ImagesConfig | None = None
    """Reading and augmentation of pictures. Default: for task.kind image, pictures as they are,
    normalised by the statistics of the training corpora."""
    shuffle: bool = True
    """Read samples in an order drawn from (seed, epoch); false: in the order of the corpus."""
    shuffle_shards: Count = 0
    """Shards per shuffled block. 0: shuffle over the whole corpus. n: shuffle in blocks of n
    shards, each shard once an epoch, so that a cache of two blocks is enough; no sample then
    crosses the end of a shard."""
    mask_documents: bool = True
    """Keep attention inside a document, and restart positions at its start."""
    verify: bool = free(True)
    """Check every shard against its hash before training; with a remote, check the shards in the
    cache before they are read."""

    def find_problems(self) -> Iterator[str]:
        """Yield orders that a bounded cache cannot follow, and caches that sources would share."""
        if self.shuffle_shards and not self.shuffle:
            yield (
                f"shuffle_shards={self.shuffle_shards} needs shuffle=true; set shuffle_shards to 0 "
                "to read in order"
            )
        for i, source in enumerate(self.train):
            if source.cache_gb is not None and self.shuffle and not self.shuffle_shards:
                yield (
                    f"train.{i}.cache_gb={source.cache_gb:g} with shuffle_shards=0: a shuffle over "
                    "the whole corpus needs all of its shards at any time; set data.shuffle_shards "
                    f"to 4, for example, or leave data.train.{i}.cache_gb out"
                )
        sources = (*self.train, *self.val)
        paths = [source.path for source in sources]
        shared = {s.path: s for s in sources if s.remote is not None and paths.count(s.path) > 1}
        for source in shared.values():
            yield (
                f"path={source.path} is the cache of {source.remote} and is named more than "
                "once in train and val; give each source a folder of its own"
            )
