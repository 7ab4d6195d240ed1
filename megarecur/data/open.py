"""Opening what a run reads: its tokenizer, the loader of training data, corpora to score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megarecur.config.data import Source
from megarecur.config.run import Config
from megarecur.data.corpus import Corpus, warn_of_other_ends
from megarecur.data.fit import IMAGE, find_misfits
from megarecur.data.formats import open_corpus
from megarecur.data.images import (
    ImageCorpus,
    ImageLoader,
    open_images,
    scored_images,
    with_statistics,
)
from megarecur.data.loader import Loader, MicroBatch, count_samples, validation_batches
from megarecur.data.pairs import PairCorpus, PairLoader, cut_for_scoring, open_pairs, pair_batches
from megarecur.data.samples import TaskCorpus, TaskLoader, open_scored, scored_batches
from megarecur.data.tokenizer import Tokenizer, load_tokenizer
from megarecur.errors import DataError, MegarecurError
from megarecur.parallel.mesh import Mesh, same_error


@dataclass(frozen=True)
class Data:
    """The data of a run, and its config with the derived values filled in."""

    config: Config
    loader: Loader
    validation: list[Corpus]
    tokenizer: str
    """Fingerprint."""

    def close(self) -> None:
        """Stop reading ahead."""
        self.loader.close()
        for corpus in self.validation:
            corpus.close()


def open_data(config: Config, mesh: Mesh) -> Data:
    """Open and check tokenizer and corpora; collective.

    Raises:
        DataError: on every rank, when any of them finds damage, a tokenizer that differs, or
            corpora that do not fit the task.
    """
    with same_error(mesh):
        tokenizer = load_tokenizer(config.data.tokenizer)
        sources = [*config.data.train, *config.data.val]
        corpora = open_sources(
            config, sources, tokenizer, config.data.verify, part=mesh.dp_rank, num_parts=mesh.dp
        )
        if mesh.rank == 0 and config.task is None and config.encoder is None:
            warn_of_other_ends(corpora, tokenizer, config.data.tokenizer)
        config = with_vocab_size(config, tokenizer.vocab_size)
        num_trained = len(config.data.train)
        config = with_statistics(config, corpora[:num_trained])
        loader = build_loader(config, corpora[:num_trained], mesh)
    return Data(config, loader, corpora[num_trained:], tokenizer.fingerprint)


def open_sources(
    config: Config,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    verify: bool = True,
    *,
    name: str | None = None,
    part: int = 0,
    num_parts: int = 1,
) -> list[Corpus]:
    """Open corpora of text, of pairs of sentences where the config has an encoder, or of labelled
    samples or pictures where it has a task.

    Args:
        tokenizer: the tokenizer that they must have been made with.
        verify: whether shards are compared with their hashes.
        name: path of the tokenizer; None: that of the config.
        part: which part of the hashes this process compares.

    Raises:
        DataError: damage, another tokenizer, or a corpus that does not fit the encoder or the
            task.
    """
    name, paths = name or config.data.tokenizer, [source.path for source in sources]
    if config.encoder is not None:
        return list(open_pairs(config, paths, name, verify, part, num_parts))
    if config.task is not None and config.task.kind == IMAGE:
        return list(open_images(config, paths, verify, part, num_parts))
    if config.task is not None:
        return list(open_scored(config, paths, name, verify, part, num_parts))
    corpora = [
        open_corpus(
            source.path,
            name,
            tokenizer.fingerprint,
            verify,
            part=part,
            num_parts=num_parts,
            remote=source.remote,
            cache_gb=source.cache_gb,
        )
        for source in sources
    ]
    if problems := [
        problem
        for corpus in corpora
        if (manifest := getattr(corpus, "manifest", None)) is not None and manifest.task is not None
        for problem in find_misfits(corpus.path, manifest, config, trained=False)
    ]:
        raise DataError("\n".join(problems))
    return corpora


def build_loader(config: Config, corpora: Sequence[Corpus], mesh: Mesh) -> Loader:
    """Return the loader of a rank's training data, from the corpora of data.train."""
    pairs = zip(corpora, config.data.train, strict=True)
    sources = [(corpus, source.weight) for corpus, source in pairs]
    train = config.train
    place: dict[str, Any] = {
        "seq_length": config.data.seq_length,
        "dp_rank": mesh.reader,
        "dp_size": mesh.readers,
        "seed": config.seed,
        "shuffle": config.data.shuffle,
        "device": mesh.device,
    }
    sizes: dict[str, Any] = {
        "global_batch_size": train.global_batch_size,
        "micro_batch_size": train.micro_batch_size,
    }
    if config.encoder is not None:
        return PairLoader(
            [(corpus, weight) for corpus, weight in sources if isinstance(corpus, PairCorpus)],
            train,
            multiple=length_multiple(config),
            **place,
        )
    if config.task is not None and config.task.kind == IMAGE:
        return ImageLoader(
            [(corpus, weight) for corpus, weight in sources if isinstance(corpus, ImageCorpus)],
            config.task,
            config.data.images,
            **sizes,
            **place,
        )
    if config.task is not None:
        return TaskLoader(
            [(corpus, weight) for corpus, weight in sources if isinstance(corpus, TaskCorpus)],
            config.task,
            multiple=length_multiple(config),
            **sizes,
            **place,
        )
    return Loader(
        sources,
        shuffle_shards=config.data.shuffle_shards,
        mask_documents=config.data.mask_documents,
        **sizes,
        **place,
    )


def read_in_order(
    config: Config,
    corpus: Corpus,
    mesh: Mesh,
    max_samples: int,
    failures: list[MegarecurError],
) -> tuple[Iterator[MicroBatch], int]:
    """Return micro batches of (the start of) a corpus in order, and how many samples it has; with
    `train.batch_tokens`, these are batches of pairs.

    Args:
        corpus: opened by `open_sources`.
        mesh: the processes, each of which gets its share in equally many micro batches.
        max_samples: samples to read at most; 0: all.
        failures: why the corpus cannot be read is appended here; all further batches are empty.
    """
    seq_length, size = config.data.seq_length, config.train.micro_batch_size
    if isinstance(corpus, PairCorpus):
        cut = cut_for_scoring(corpus, config.train, seq_length, max_samples)
        of_pairs = pair_batches(
            corpus,
            cut,
            seq_length=seq_length,
            multiple=length_multiple(config),
            dp_rank=mesh.reader,
            dp_size=mesh.readers,
            failures=failures,
        )
        return of_pairs, len(cut) * size
    if config.task is not None and isinstance(corpus, ImageCorpus):
        of_images = scored_images(
            corpus,
            config.task,
            config.data.images,
            seq_length=seq_length,
            micro_batch_size=size,
            dp_rank=mesh.reader,
            dp_size=mesh.readers,
            max_samples=max_samples,
            failures=failures,
        )
        return of_images, min(corpus.num_samples, max_samples or corpus.num_samples)
    if config.task is not None and isinstance(corpus, TaskCorpus):
        batches: Iterator[MicroBatch] = scored_batches(
            corpus,
            config.task,
            seq_length=seq_length,
            micro_batch_size=size,
            multiple=length_multiple(config),
            dp_rank=mesh.reader,
            dp_size=mesh.readers,
            max_samples=max_samples,
            failures=failures,
        )
        return batches, min(corpus.num_samples, max_samples or corpus.num_samples)
    batches = validation_batches(
        corpus,
        seq_length=seq_length,
        micro_batch_size=size,
        dp_rank=mesh.reader,
        dp_size=mesh.readers,
        mask_documents=config.data.mask_documents,
        max_samples=max_samples,
        failures=failures,
    )
    return batches, count_samples(corpus, seq_length, max_samples)


def length_multiple(config: Config) -> int:
    """Return what the length of padded batches is a multiple of."""
    return config.parallel.tensor if config.parallel.sequence_parallel else 1


def with_vocab_size(config: Config, vocab_size: int) -> Config:
    """Return the config with model.vocab_size resolved, which a model of pictures has not.

    Raises:
        DataError: fewer rows than the tokenizer has ids.
    """
    if config.model.vocab_size is None and not config.reads_images:
        model = config.model.model_copy(update={"vocab_size": vocab_size})
        config = config.model_copy(update={"model": model})
    check_rows(config, vocab_size, config.data.tokenizer)
    return config


def check_rows(config: Config, vocab_size: int, tokenizer: str) -> None:
    """Refuse a tokenizer with more ids than the model has rows.

    Raises:
        DataError: with both numbers.
    """
    for key in ("vocab_size", "source_vocab_size"):
        rows = getattr(config.model, key)
        if rows is not None and rows < vocab_size:
            raise DataError(
                f"model.{key}={rows} is below the {vocab_size} ids of data.tokenizer={tokenizer}; "
                "raise or omit it, or use the tokenizer that a converted model was trained with"
            )
