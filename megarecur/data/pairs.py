"""Pairs of sentences: corpora of `megarecur prep pairs`, and batches of an encoder-decoder.

    data/multi30k/train/
      ...            as every corpus: shards, documents.npy, tokenizer.model, manifest.json

A pair is two consecutive documents, source and target, each with its end token. The decoder reads
[start, y1, ..., yn] and predicts [y1, ..., yn, end]. Both sides of a micro batch are padded to
their longest sentence. Shapes: P pairs of a corpus, B pairs of a micro batch, S positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megarecur.attention.documents import count_boundaries
from megarecur.config.run import Config
from megarecur.config.train import TrainConfig
from megarecur.data.corpus import MEND, Corpus
from megarecur.data.fit import TRANSLATION, check_fit, explain_long_pair
from megarecur.data.loader import MicroBatch, PaddedLoader, SourceSentences
from megarecur.data.order import BatchOrder, SampleOrder, WholeOrder, cut_batches, sort_by_length
from megarecur.data.tokenizer import load_tokenizer
from megarecur.errors import DataError, MegarecurError
from megarecur.parallel.loss import IGNORED

Pair = tuple[NDArray[Any], NDArray[Any]]
"""Ids of the source and of the target, each with the end token."""


class PairCorpus(Corpus):
    """An open corpus of pairs of sentences; arguments and errors are those of `Corpus`."""

    def __init__(
        self, path: str | Path, verify: bool = True, part: int = 0, num_parts: int = 1
    ) -> None:
        super().__init__(path, verify, part, num_parts)
        held = self.manifest.task
        if held is None or held["kind"] != TRANSLATION:
            raise DataError(
                f"{self.path}: holds no pairs of sentences; prepare a corpus with `megarecur prep "
                "pairs`"
            )
        self.num_pairs: int = held["num_pairs"]
        self.start_id: int = held["start_id"]
        """Id of the first token that the decoder reads."""
        self.pad_id: int = held["pad_id"]
        if self.num_documents != 2 * self.num_pairs:
            raise DataError(
                f"{self.path}: has {self.num_documents} sentences for {self.num_pairs} pairs; "
                f"{MEND}"
            )

    @property
    def bytes_per_label(self) -> float:
        """Bytes of text per token of the targets, ends included."""
        held = self.manifest.task or {}
        if "target_bytes" not in held:  # The first corpora of pairs lack it.
            return super().bytes_per_label
        return float(held["target_bytes"] / held["target_tokens"])

    @cached_property
    def lengths_P2(self) -> NDArray[np.int64]:
        """Tokens of source and target of each pair, ends included, int64."""
        return np.diff(self.documents, append=self.num_tokens).reshape(-1, 2)

    def pair(self, number: int, most: int) -> Pair:
        """Return a pair, each side cut to at most `most` tokens, the last of them its end."""
        source, target = (self._sentence(2 * number + side, most) for side in (0, 1))
        return source, target

    def _sentence(self, document: int, most: int) -> NDArray[Any]:
        starts = self.documents
        begin = int(starts[document])
        last = document + 1 == self.num_documents
        end = self.num_tokens if last else int(starts[document + 1])
        if end - begin <= most:
            return self.read(begin, end - begin)
        return np.append(self.read(begin, most - 1), np.array(self.eos_id, self.dtype))


def open_pairs(
    config: Config,
    paths: Sequence[str],
    tokenizer: str,
    verify: bool = True,
    part: int = 0,
    num_parts: int = 1,
) -> list[PairCorpus]:
    """Open corpora of pairs, checked together.

    Raises:
        DataError: a corpus that is damaged, made with another tokenizer, or does not fit the
            config; all those that do not fit are reported.
    """
    check_fit(config, paths, tokenizer)
    corpora = [PairCorpus(path, verify, part, num_parts) for path in paths]
    end = load_tokenizer(tokenizer).eos_id
    problems = [
        f"{corpus.path}: its sentences end with id {corpus.eos_id}, but data.tokenizer={tokenizer} "
        f"ends texts with {end}, at which translations would not stop; set data.tokenizer to the "
        "corpus's copy of it"
        for corpus in corpora
        if corpus.eos_id != end
    ]
    if problems:
        raise DataError("\n".join(problems))
    return corpora


class PairLoader(PaddedLoader):
    """The training data of one data-parallel rank; other arguments are those of `Loader`.

    With `train.batch_tokens`, a sample is a batch of pairs (see `BatchOrder`), and weights of
    corpora are shares of the batches. Otherwise a sample is a pair.

    Args:
        seq_length: most tokens of a side, its end included; longer sides are cut.
        multiple: the length of a padded side is a multiple of it.

    Raises:
        DataError: a pair has more than batch_tokens tokens.
    """

    def __init__(
        self,
        sources: Sequence[tuple[PairCorpus, float]],
        train: TrainConfig,
        *,
        multiple: int = 1,
        seq_length: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        shuffle: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self.batch_tokens, self.multiple = train.batch_tokens, multiple
        self.pair_corpora = [corpus for corpus, _ in sources]
        super().__init__(
            sources, seq_length=seq_length, global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size, dp_rank=dp_rank, dp_size=dp_size, seed=seed,
            shuffle=shuffle, device=device,
        )  # fmt: skip

    def _order(
        self, source: int, corpus: Corpus, shuffle: bool, shuffle_shards: int
    ) -> SampleOrder:
        """Return an order whose windows are pairs, or batches of them."""
        own = self.pair_corpora[source]
        if self.batch_tokens is None:
            n = own.num_pairs
            return WholeOrder((0, n), n + 1, 1, shuffle, self.seed, source)
        lengths_P2 = np.minimum(own.lengths_P2, self.seq_length)
        longest = int(lengths_P2.sum(axis=1).max())
        if longest > self.batch_tokens:
            raise DataError(explain_long_pair(own.path, longest, self.batch_tokens))
        return BatchOrder(lengths_P2, self.batch_tokens, shuffle, self.seed, source)

    def first_samples(self, count: int) -> MicroBatch:
        """Return the first pairs of the run, or its first batch with `train.batch_tokens`; the same
        on every rank."""
        return super().first_samples(count if self.batch_tokens is None else 1)

    def _collate(self, ids: NDArray[np.int64]) -> MicroBatch:
        """Collate samples by their ids, which ascend by one."""
        sources, numbers, windows = self._find(ids)
        if self.batch_tokens is not None:
            source, (window,) = int(sources[0]), windows.tolist()
            order = self.orders[source]
            assert isinstance(order, BatchOrder)
            epoch = int(numbers[0]) // order.num_windows
            windows = order.pairs(epoch, window)
            # Place among all pairs that the corpora ever give.
            places = epoch * order.num_pairs + order.firsts[window] + np.arange(len(windows))
            ids, sources = places * len(self.orders) + source, np.full(len(windows), source)
        pairs = [
            self.pair_corpora[source].pair(number, self.seq_length)
            for source, number in zip(sources.tolist(), windows.tolist(), strict=True)
        ]
        return collate(pairs, ids, sources, self.pair_corpora[0], self.multiple)


def collate(
    pairs: Sequence[Pair | None],
    ids_B: NDArray[np.int64],
    sources_B: NDArray[np.int64],
    corpus: PairCorpus,
    multiple: int = 1,
) -> MicroBatch:
    """Collate pairs into one padded batch; None gives a pair of one token each without a label.

    Args:
        ids_B: global ids of the pairs.
        sources_B: index of their corpus in the mixture.
        corpus: names the start token and the padding.
        multiple: the length of a side is a multiple of it.
    """
    start = np.array([corpus.start_id])
    nothing = np.array([corpus.eos_id])
    sources = [nothing if pair is None else pair[0] for pair in pairs]
    inputs = [start if pair is None else np.append(start, pair[1][:-1]) for pair in pairs]
    labels = [np.empty(0, np.int64) if pair is None else pair[1] for pair in pairs]
    tokens_BS, documents_BS = _pad(inputs, corpus.pad_id, multiple)
    labels_BS = torch.full_like(tokens_BS, IGNORED)
    for row_S, label in zip(labels_BS.numpy(), labels, strict=True):
        row_S[: label.size] = label
    B, S = tokens_BS.shape
    return MicroBatch(
        tokens_BS=tokens_BS,
        labels_BS=labels_BS,
        positions_BS=torch.arange(S).repeat(B, 1),
        documents_BS=documents_BS,
        sample_ids_B=torch.from_numpy(ids_B),
        sources_B=torch.from_numpy(np.ascontiguousarray(sources_B)),
        single_document=bool((documents_BS == 0).all()),
        boundaries=count_boundaries(documents_BS),
        source=pad_sources(sources, corpus.pad_id, multiple),
    )


def pad_sources(
    sentences: Sequence[NDArray[Any]], pad_id: int, multiple: int = 1
) -> SourceSentences:
    """Return source sentences, each with its end token, padded to the longest.

    Args:
        multiple: the padded length is a multiple of it.
    """
    tokens_BS, documents_BS = _pad(sentences, pad_id, multiple)
    B, S = tokens_BS.shape
    return SourceSentences(
        tokens_BS=tokens_BS,
        positions_BS=torch.arange(S).repeat(B, 1),
        documents_BS=documents_BS,
        single_document=bool((documents_BS == 0).all()),
        boundaries=count_boundaries(documents_BS),
    )


def _pad(sentences: Sequence[NDArray[Any]], pad_id: int, multiple: int) -> tuple[Tensor, Tensor]:
    """Return (tokens, document numbers, which are -1 for padding), int64 and int32 [B, S]."""
    length = -(-max(sentence.size for sentence in sentences) // multiple) * multiple
    tokens_BS = np.full((len(sentences), length), pad_id, np.int64)
    documents_BS = np.full((len(sentences), length), -1, np.int32)
    for b, sentence in enumerate(sentences):
        tokens_BS[b, : sentence.size] = sentence
        documents_BS[b, : sentence.size] = 0
    return torch.from_numpy(tokens_BS), torch.from_numpy(documents_BS)


def cut_for_scoring(
    corpus: PairCorpus, train: TrainConfig, seq_length: int, max_pairs: int = 0
) -> list[NDArray[np.int64]]:
    """Return the micro batches, as numbers of pairs, in which (the start of) a corpus is scored: in
    its order, or by length with `train.batch_tokens`.

    Args:
        max_pairs: pairs to read at most, from the start of the corpus; 0: all.
    """
    count = min(corpus.num_pairs, max_pairs or corpus.num_pairs)
    numbers, size = np.arange(count), train.micro_batch_size
    firsts = np.append(np.arange(0, count, size), count)
    if train.batch_tokens is not None:
        lengths_P2 = np.minimum(corpus.lengths_P2[:count], seq_length)
        numbers = sort_by_length(lengths_P2)
        firsts = cut_batches(lengths_P2[numbers], train.batch_tokens)
    return np.split(numbers, firsts[1:-1])


def pair_batches(
    corpus: PairCorpus,
    cut: Sequence[NDArray[np.int64]],
    *,
    seq_length: int,
    multiple: int = 1,
    dp_rank: int = 0,
    dp_size: int = 1,
    failures: list[MegarecurError],
) -> Iterator[MicroBatch]:
    """Yield a rank's share of the micro batches of `cut_for_scoring`. Each rank yields the same
    number of micro batches; the missing last ones have a pair without a label.

    Args:
        failures: receives the reason why the corpus cannot be read; all further batches are empty.
    """
    empty = np.zeros(1, np.int64)
    for first in range(0, len(cut), dp_size):
        own = first + dp_rank
        numbers = cut[own] if own < len(cut) and not failures else None
        if numbers is not None:
            try:
                pairs = [corpus.pair(number, seq_length) for number in numbers.tolist()]
                yield collate(pairs, numbers, np.zeros_like(numbers), corpus, multiple)
                continue
            except MegarecurError as error:
                failures.append(error)
        yield collate([None], empty, empty, corpus, multiple)
