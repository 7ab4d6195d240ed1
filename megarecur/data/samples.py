"""Labelled samples of variable length: corpora of `megarecur prep task`, and padded batches.

    data/listops/train/
      ...            as every corpus: shards, documents.npy, tokenizer.words, manifest.json
      labels.npy int32, the class of each sample; for kind `token` int8, one per token of the
      stream, -1 for tokens without a label

A sample is a document, or the two consecutive documents of a pair. The order of samples is that of
text: a pure function of (seed, epoch, position). Shapes: N samples, B rows (N, or 2 N for pairs,
whose sides are neighbours), S positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megarecur.attention.documents import count_boundaries
from megarecur.batch import END, START
from megarecur.config.objective import TaskConfig
from megarecur.config.run import Config
from megarecur.data.corpus import MEND, Corpus
from megarecur.data.fit import check_fit
from megarecur.data.loader import MicroBatch, PaddedLoader
from megarecur.data.order import SampleOrder, WholeOrder
from megarecur.errors import DataError, MegarecurError
from megarecur.parallel.loss import IGNORED

LABELS = "labels.npy"


@dataclass(frozen=True)
class TaskBatch(MicroBatch):
    """A micro batch of samples. Padding has document -1. Labels are [N, 1], or [B, S] for kind
    token; sources belong to samples, sample ids to rows."""

    lengths_N: Tensor
    """Number of tokens of each sample, int64; for a pair, of its longer side."""
    scored: Tensor
    """Predictions that are scored, bool, of the labels' shape."""


class TaskCorpus(Corpus):
    """An open corpus of labelled samples; arguments and errors are those of `Corpus`."""

    def __init__(
        self, path: str | Path, verify: bool = True, part: int = 0, num_parts: int = 1
    ) -> None:
        super().__init__(path, verify, part, num_parts)
        task = self.manifest.task
        if task is None:
            raise DataError(
                f"{self.path}: holds text without labels, and the config has a task; prepare a "
                "corpus with `megarecur prep task`, or remove the task section"
            )
        self.kind: str = task["kind"]
        self.classes: list[str] = task["classes"]
        self.num_samples: int = task["num_samples"]
        self.longest: int = task["longest"]
        """Number of tokens of the longest sequence."""
        self.ahead: bool = task.get("ahead", False)  # The first corpora lack this key.
        """True if labels are later tokens, which only a causal model does not see."""
        self.sides = 2 if self.kind == "pair" else 1
        try:
            file = self._mapped.add(self.path / LABELS)
            self._labels = np.asarray(np.load(file, mmap_mode="r"))
        except (ValueError, OSError) as error:
            raise DataError(f"{self.path / LABELS}: damaged ({error}); {MEND}") from None
        expected = self.num_tokens if self.kind == "token" else self.num_samples
        if self._labels.shape != (expected,) or self.num_documents != self.sides * self.num_samples:
            raise DataError(f"{self.path / LABELS}: has {self._labels.shape} labels; {MEND}")

    @property
    def labels(self) -> NDArray[Any]:
        """The class of each sample, or of each token of the stream.

        Raises:
            DataError: its file was cut or rewritten since it was mapped.
        """
        self._mapped.refuse_change(self.path / LABELS)
        return self._labels

    def document(self, number: int, most: int) -> tuple[NDArray[Any], int]:
        """Return (at most `most` ids, start in the stream) of a document."""
        starts = self.documents
        begin = int(starts[number])
        last = number + 1 == self.num_documents
        end = self.num_tokens if last else int(starts[number + 1])
        return self.read(begin, min(end - begin - 1, most)), begin


def open_scored(
    config: Config,
    paths: Sequence[str],
    tokenizer: str,
    verify: bool = True,
    part: int = 0,
    num_parts: int = 1,
) -> list[TaskCorpus]:
    """Open corpora of a task, checked together.

    Raises:
        DataError: a corpus that is damaged, made with another tokenizer, or does not fit the task;
            all those that do not fit are reported.
    """
    check_fit(config, paths, tokenizer)
    return [TaskCorpus(path, verify, part, num_parts) for path in paths]


class TaskLoader(PaddedLoader):
    """The training data of one data-parallel rank; arguments are those of `Loader`.

    A micro batch is padded to its longest sequence, in multiples of `multiple`.
    """

    def __init__(
        self,
        sources: Sequence[tuple[TaskCorpus, float]],
        task: TaskConfig,
        *,
        multiple: int = 1,
        seq_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        shuffle: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self.task, self.multiple = task, multiple
        self.task_corpora = [corpus for corpus, _ in sources]
        super().__init__(
            sources, seq_length=seq_length, global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size, dp_rank=dp_rank, dp_size=dp_size, seed=seed,
            shuffle=shuffle, device=device,
        )  # fmt: skip

    def _order(
        self, source: int, corpus: Corpus, shuffle: bool, shuffle_shards: int
    ) -> SampleOrder:
        """Return an order whose windows are the samples of the corpus."""
        n = self.task_corpora[source].num_samples
        return WholeOrder((0, n), n + 1, 1, shuffle, self.seed, source)

    def _collate(self, ids: NDArray[Any]) -> MicroBatch:
        """Collate samples by their ids, which ascend by one."""
        sources, numbers = self.windows(ids)
        pairs = zip(sources.tolist(), numbers.tolist(), strict=True)
        samples = [(self.task_corpora[source], number) for source, number in pairs]
        return collate(samples, ids, sources, self.task, self.seq_length, self.multiple)


def collate(
    samples: Sequence[tuple[TaskCorpus, int] | None],
    ids_N: NDArray[Any],
    sources_N: NDArray[Any],
    task: TaskConfig,
    seq_length: int,
    multiple: int = 1,
) -> TaskBatch:
    """Collate samples, given by corpus and number, into one padded batch; None gives one without a
    label.

    Args:
        ids_N: global ids of the samples.
        sources_N: index of their corpus in the mixture.
        task: decides what the labels are, and whether START and END are added.
        seq_length: maximum number of tokens read of a sequence.
        multiple: the batch's length is a multiple of it.
    """
    sides = 2 if task.kind == "pair" else 1
    ends = (START, END) if task.augment else ()
    rows: list[tuple[NDArray[Any], NDArray[Any] | None]] = []
    labels_N = np.full(len(samples), IGNORED, np.int64)
    lengths_N = np.zeros(len(samples), np.int64)
    for n, sample in enumerate(samples):
        for side in range(sides):
            if sample is None:
                rows.append((np.zeros(1, np.int64), None))
                continue
            corpus, number = sample
            tokens, begin = corpus.document(sides * number + side, seq_length)
            lengths_N[n] = max(lengths_N[n], tokens.size)
            own = corpus.labels[begin : begin + tokens.size] if task.kind == "token" else None
            tokens = tokens.astype(np.int64)
            if ends:
                tokens = np.concatenate([ends[:1], tokens, ends[1:]])
            rows.append((tokens, own))
        if sample is not None and task.kind != "token":
            labels_N[n] = sample[0].labels[sample[1]]
    length = -(-max(max(tokens.size for tokens, _ in rows), 1) // multiple) * multiple
    B = len(rows)
    tokens_BS = np.zeros((B, length), np.int64)
    documents_BS = np.full((B, length), -1, np.int32)
    labels = np.full((B, length), IGNORED, np.int64) if task.kind == "token" else labels_N[:, None]
    scored = labels != IGNORED
    for b, (tokens, targets) in enumerate(rows):
        tokens_BS[b, : tokens.size] = tokens
        documents_BS[b, : tokens.size] = 0
        if targets is not None:
            asked = targets >= 0
            scored[b, : tokens.size] = asked
            if task.targets == "next_token":
                labels[b, : tokens.size - 1] = tokens[1:]
                scored[b, tokens.size - 1] = False
            else:
                labels[b, : tokens.size] = np.where(asked, targets, IGNORED)
    return TaskBatch(
        tokens_BS=torch.from_numpy(tokens_BS),
        labels_BS=torch.from_numpy(labels),
        positions_BS=torch.arange(length).repeat(B, 1),
        documents_BS=torch.from_numpy(documents_BS),
        sample_ids_B=torch.from_numpy((sides * ids_N[:, None] + np.arange(sides)).reshape(-1)),
        sources_B=torch.from_numpy(np.ascontiguousarray(sources_N)),
        single_document=bool((documents_BS == 0).all()),
        boundaries=count_boundaries(torch.from_numpy(documents_BS)),
        lengths_N=torch.from_numpy(lengths_N),
        scored=torch.from_numpy(scored),
    )


def scored_batches(
    corpus: TaskCorpus,
    task: TaskConfig,
    *,
    seq_length: int,
    micro_batch_size: int,
    multiple: int = 1,
    dp_rank: int = 0,
    dp_size: int = 1,
    max_samples: int = 0,
    failures: list[MegarecurError],
) -> Iterator[TaskBatch]:
    """Yield a corpus in order, cut over data-parallel ranks. Each rank yields the same number of
    micro batches; missing samples of the last ones have no label.

    Args:
        failures: receives the reason why the corpus cannot be read; all further batches are empty.
    """
    count = min(corpus.num_samples, max_samples or corpus.num_samples)
    stride = dp_size * micro_batch_size
    for first in range(0, count, stride):
        ids = np.arange(micro_batch_size) + first + dp_rank * micro_batch_size
        samples = [(corpus, int(i)) if i < count and not failures else None for i in ids]
        sources = np.zeros(len(ids), np.int64)
        try:
            yield collate(samples, ids, sources, task, seq_length, multiple)
        except MegarecurError as error:
            failures.append(error)
            yield collate([None] * len(ids), ids, sources, task, seq_length, multiple)
