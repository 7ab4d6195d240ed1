"""Build the batches of a step from corpora: a pure function of (step, seed) on any mesh.

A sample of a corpus is a window of S + 1 tokens: S inputs, and the same shifted by one as labels.
The global batch of a step is `global_batch_size` samples in the order of `order.py`. Data-parallel
rank r takes rows [r k, (r + 1) k), cut into micro batches. So the samples of a step depend neither
on the number of ranks nor on the micro batch size, and the only state is the step.

Shapes: B samples of a micro batch, S sequence length.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megarecur.attention.documents import (
    Boundaries,
    count_documents,
    from_lengths,
    whole_samples,
)
from megarecur.data.corpus import Corpus
from megarecur.data.fit import find_short
from megarecur.data.order import SampleOrder, ShardOrder, WholeOrder, counts_before, mixture
from megarecur.data.remote import RemoteCorpus
from megarecur.errors import ConfigError, DataError, MegarecurError
from megarecur.parallel.loss import IGNORED
from megarecur.parallel.transfer import open_stream, receive, send

log = logging.getLogger(__name__)

BLOCK_SAMPLES = 4096
PREFETCH_DEPTH = 2
MOST_SAMPLES = 1 << 53
"""Samples that a run can have read; numbers of doubles are exact below it."""


@dataclass(frozen=True)
class SourceSentences:
    """The source sentences of a micro batch (`batch.Sentences`), padded to the longest."""

    tokens_BS: Tensor
    """int64."""
    positions_BS: Tensor
    """int64, from 0."""
    documents_BS: Tensor
    """int32, 0, and -1 for padding."""
    single_document: bool
    """True if there is no padding."""
    boundaries: Boundaries
    """The boundaries of sentences and padding, counted on the CPU."""

    def to(self, device: torch.device | str) -> SourceSentences:
        """Return the sentences on a device, to which they are copied without waiting."""
        return replace(
            self,
            tokens_BS=send(self.tokens_BS, device),
            positions_BS=send(self.positions_BS, device),
            documents_BS=send(self.documents_BS, device),
            boundaries=self.boundaries.to(device),
        )


@dataclass(frozen=True)
class MicroBatch:
    """The inputs of one forward pass of one process. Tensors may be shared: do not write to
    them."""

    tokens_BS: Tensor
    """int64."""
    labels_BS: Tensor
    """Next token, int64; -100 if it is not counted."""
    positions_BS: Tensor
    """Position in the document, int64, from 0 in every document of the sample."""
    documents_BS: Tensor
    """Index of the token's document in its sample, int32, from 0."""
    sample_ids_B: Tensor
    """Global sample id, int64: step * global_batch_size + row of the global batch."""
    sources_B: Tensor
    """Index of a sample's corpus in the mixture, int64."""
    single_document: bool
    """True if no document ends inside any sample: causal attention needs no further mask."""
    boundaries: Boundaries | None = field(default=None, kw_only=True)
    """The boundaries of the documents, counted on the CPU. Must fit `documents_BS`."""
    source: SourceSentences | None = field(default=None, kw_only=True)
    """The source sentences, if the samples are pairs of sentences; all else is of the target."""
    pixels_BCHW: Tensor | None = field(default=None, kw_only=True)
    """Normalised pictures, float32, if the samples are pictures; tokens are then 0, one per
    position."""
    num_tokens: int = field(init=False)
    """Number of counted labels, counted on the CPU."""
    num_documents: int = field(init=False)
    """Number of documents; the part of a document in one sample counts as one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_tokens", int((self.labels_BS != IGNORED).sum()))
        object.__setattr__(self, "num_documents", count_documents(self.documents_BS))

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors on the device."""
        for part in (self, self.source):
            if part is not None:
                yield from (value for value in vars(part).values() if isinstance(value, Tensor))
                if part.boundaries is not None:
                    yield part.boundaries.on_device

    def to(self, device: torch.device | str) -> Self:
        """Return the micro batch on a device, to which it is copied without waiting."""
        moved: dict[str, Any] = {
            name: send(value, device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        if self.boundaries is not None:
            moved["boundaries"] = self.boundaries.to(device)
        if self.source is not None:
            moved["source"] = self.source.to(device)
        batch = copy(self)  # `replace` would count again, on the device.
        vars(batch).update(moved)
        return batch


Arriving = tuple[list[MicroBatch], torch.cuda.Event | None]
"""Micro batches, and the event of their arrival on a GPU."""


class Loader:
    """The training data of one data-parallel rank.

    Args:
        sources: corpora and their weights in the mixture.
        seq_length: S.
        global_batch_size: samples per step over all ranks.
        micro_batch_size: B.
        dp_rank: data-parallel rank of this process.
        dp_size: number of data-parallel ranks.
        seed: seed of the order.
        shuffle: read the samples of each epoch of each corpus in a random order.
        shuffle_shards: shuffle in blocks of this many shards; 0 shuffles over the whole corpus.
        mask_documents: number the documents of a sample, restart positions at each, and ignore
        labels of another document.
        device: device of the batches. A GPU's are copied ahead, with those of the next steps.

    Raises:
        ConfigError: the global batch is not divisible by ranks and micro batches, or the local
        cache of a remote corpus is too small.
        DataError: a corpus is shorter than one sample.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Corpus, float]],
        *,
        seq_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        shuffle: bool = True,
        shuffle_shards: int = 0,
        mask_documents: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        if global_batch_size % (dp_size * micro_batch_size):
            raise ConfigError(
                f"train.global_batch_size={global_batch_size} cannot be divided among {dp_size} "
                f"data-parallel process(es) in micro batches of train.micro_batch_size="
                f"{micro_batch_size}; make it a multiple of {dp_size * micro_batch_size}"
            )
        self.corpora = [corpus for corpus, _ in sources]
        self.weights = [weight for _, weight in sources]
        self.seq_length, self.seed = seq_length, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.dp_rank, self.rank_batch_size = dp_rank, global_batch_size // dp_size
        self.mask_documents = mask_documents
        self.orders: list[SampleOrder] = []
        for source, corpus in enumerate(self.corpora):
            order = self._order(source, corpus, shuffle, shuffle_shards)
            if isinstance(corpus, RemoteCorpus):
                samples = global_batch_size * self.weights[source] / sum(self.weights)
                corpus.check_room(order.shards_at_once(samples))
            self.orders.append(order)
        self._steps_per_block = max(BLOCK_SAMPLES // self.rank_batch_size, 1)
        self._sample_blocks: dict[int, Samples] = {}
        self._blocks: dict[int, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = {}
        self.device, self._stream = torch.device(device), open_stream(torch.device(device))
        self._pending: dict[int, Future[Arriving]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def _order(
        self, source: int, corpus: Corpus, shuffle: bool, shuffle_shards: int
    ) -> SampleOrder:
        """Return the order of a corpus's windows."""
        place = corpus.starts, corpus.num_tokens, self.seq_length
        order: SampleOrder = (
            ShardOrder(*place, shuffle_shards, self.seed, source)
            if shuffle and shuffle_shards
            else WholeOrder(*place, shuffle, self.seed, source)
        )
        _check_length(corpus, order, self.seq_length)
        return order

    def sample_ids(self, step: int) -> NDArray[np.int64]:
        """Return the ids of all samples of a step's global batch, in order: int64."""
        return np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)

    @property
    def num_windows(self) -> list[int]:
        """Number of samples in an epoch of each corpus."""
        return [order.num_windows for order in self.orders]

    def windows(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the source of each sample and its window of that source; `ids` must ascend by
        one."""
        sources, _, windows = self._find(ids)
        return sources, windows

    def _find(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
        """Return each sample's source, its number among the source's samples, and its window."""
        first, last = int(ids[0]), int(ids[-1])
        blocks = [self._block(b) for b in range(first // BLOCK_SAMPLES, last // BLOCK_SAMPLES + 1)]
        found: tuple[NDArray[np.int64], ...] = blocks[0]
        if len(blocks) > 1:
            found = tuple(np.concatenate(parts) for parts in zip(*blocks, strict=True))
        begin = first % BLOCK_SAMPLES
        return tuple(values[begin:][: len(ids)] for values in found)

    def _block(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return `_find` of a block of consecutive samples; the last few are cached."""
        found = self._blocks.get(number)
        if found is not None:
            return found
        start = number * BLOCK_SAMPLES
        sources, numbers = mixture(start, start + BLOCK_SAMPLES, self.weights)
        windows = np.empty_like(numbers)
        for source, order in enumerate(self.orders):
            own = sources == source
            windows[own] = order.windows(numbers[own])
        while len(self._blocks) > 4:
            self._blocks.pop(next(iter(self._blocks)), None)
        self._blocks[number] = sources, numbers, windows
        return sources, numbers, windows

    def batch(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro batches of a step, on the device."""
        pending = self._pending.pop(step, None)
        batches, arrived = self._copy(step) if pending is None else pending.result()
        if arrived is not None:
            receive((tensor for batch in batches for tensor in batch.tensors()), arrived)
        return batches

    def prefetch(self, step: int) -> None:
        """Start building the batches of `step` and the next one in the background."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        wanted = range(step, step + PREFETCH_DEPTH)
        for other in [s for s in self._pending if s not in wanted]:
            self._pending.pop(other).cancel()
        for s in wanted:
            if s not in self._pending:
                self._pending[s] = self._pool.submit(self._copy, s)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop building batches and fetching shards in the background."""
        self._pending.clear()
        for corpus in self.corpora:
            corpus.close()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _copy(self, step: int) -> Arriving:
        """Build the batches of a step, and begin to copy them to the device."""
        batches = self._build(step)
        if self.device.type == "cpu":
            return batches, None
        with torch.cuda.stream(self._stream):
            moved = [batch.to(self.device) for batch in batches]
            return moved, None if self._stream is None else self._stream.record_event()

    def _build(self, step: int) -> list[MicroBatch]:
        block, place = divmod(step, self._steps_per_block)
        samples = self._samples(block)
        first = place * self.rank_batch_size
        rows = range(first, first + self.rank_batch_size, self.micro_batch_size)
        return [_cut(samples, row, row + self.micro_batch_size) for row in rows]

    def _samples(self, block: int) -> Samples:
        """Return this rank's samples of a block of consecutive steps; the last few are cached.

        Finding the documents of many samples at once is much cheaper than one by one.
        """
        found = self._sample_blocks.get(block)
        if found is not None:
            return found
        steps = np.arange(block * self._steps_per_block, (block + 1) * self._steps_per_block)
        batch, own = self.global_batch_size, self.dp_rank * self.rank_batch_size
        ids = np.arange(steps[0] * batch, (steps[-1] + 1) * batch)
        mine = slice(own, own + self.rank_batch_size)
        ids_R, sources_R, numbers_R, windows_R = (
            values.reshape(-1, batch)[:, mine].flatten() for values in (ids, *self._find(ids))
        )
        found = self._lay_out(ids_R, sources_R, numbers_R, windows_R)
        while len(self._sample_blocks) > 1:
            self._sample_blocks.pop(next(iter(self._sample_blocks)), None)
        self._sample_blocks[block] = found
        return found

    def first_samples(self, count: int) -> MicroBatch:
        """Return the first samples of the run, the same on every rank."""
        ids = np.arange(count)
        return _cut(self._lay_out(ids, *self._find(ids)), 0, count)

    def _lay_out(
        self,
        ids_R: NDArray[np.int64],
        sources_R: NDArray[np.int64],
        numbers_R: NDArray[np.int64],
        windows_R: NDArray[np.int64],
    ) -> Samples:
        """Lay out samples by id, source, number among the source's samples, and window."""
        starts_R = np.empty_like(windows_R)
        for source, (corpus, order) in enumerate(zip(self.corpora, self.orders, strict=True)):
            own = sources_R == source
            starts_R[own] = order.starts(windows_R[own])
            if isinstance(corpus, RemoteCorpus) and own.any():
                numbers = numbers_R[own]
                corpus.follow(order.blocks(int(numbers[0]), int(numbers[-1])))
        S, masked = self.seq_length, self.mask_documents
        return _lay_out(self.corpora, sources_R, starts_R, ids_R, S, masked)

    def state(self, step: int) -> dict[str, Any]:
        """Return the state of a checkpoint before `step`: samples read, in total and of each
        corpus.

        Corpora are listed in their order (as lists, which JSON keeps), since the order of the
        samples of a corpus depends on its place.
        """
        samples = step * self.global_batch_size
        counts = counts_before(samples, self.weights)
        fingerprints = [corpus.fingerprint for corpus in self.corpora]
        pairs = zip(fingerprints, counts, strict=True)
        return {"samples": samples, "sources": [list(pair) for pair in pairs]}

    def check_state(self, state: dict[str, Any]) -> None:
        """Reject a state with other corpora, weights or batch size.

        Raises:
            DataError: the message names the difference.
        """
        if not isinstance(state.get("sources"), list):
            raise DataError(
                "data.train: this checkpoint has no data cursor: it was converted, not trained; "
                "to train from its parameters, set run_dir to another folder and init_from to this "
                "one, which is for evaluation and generation"
            )
        samples = state.get("samples")
        sound = type(samples) is int and 0 <= samples <= MOST_SAMPLES
        sound = sound and all(
            isinstance(pair, list) and list(map(type, pair)) == [str, int]
            for pair in state["sources"]
        )
        if not sound:
            raise DataError(
                "data.train: the data cursor of this checkpoint is damaged; use another checkpoint"
            )
        saved = [fingerprint for fingerprint, _ in state["sources"]]
        given = [corpus.fingerprint for corpus in self.corpora]
        if saved != given:
            named = [f"{corpus.path} ({corpus.fingerprint[:12]})" for corpus in self.corpora]
            problem = (
                "the same corpora in another order"
                if sorted(saved) == sorted(given)
                else "other corpora"
            )
            raise DataError(
                f"data.train: the checkpoint was trained on {problem}: "
                f"{', '.join(f[:12] for f in saved)} instead of {', '.join(named)}; "
                "use the same corpora in the same order, or set run_dir to another folder"
            )
        step, rest = divmod(state["samples"], self.global_batch_size)
        if rest or self.state(step) != state:
            raise DataError(
                f"data.train: the checkpoint has read {state['samples']} samples, "
                f"{[count for _, count in state['sources']]} of each corpus, which these weights "
                f"and global_batch_size={self.global_batch_size} do not match; restore its values, "
                "or set run_dir to another folder"
            )


def validation_batches(
    corpus: Corpus,
    *,
    seq_length: int,
    micro_batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    mask_documents: bool = True,
    max_samples: int = 0,
    failures: list[MegarecurError] | None = None,
) -> Iterator[MicroBatch]:
    """Yield a corpus in order, with each token except the first predicted once, cut over
    data-parallel ranks.

    Every rank yields the same number of micro batches, all of the same shape; missing labels of the
    last ones are -100. `max_samples` of 0 means all.

    Args:
        failures: receives the reason why the corpus cannot be read, instead of an exception; all
        further micro batches are empty. Other ranks may wait for this one in a forward pass.

    Raises:
        DataError: the corpus has no token to predict, or cannot be read.
    """
    if corpus.num_tokens < 2:
        raise DataError(
            f"{corpus.path}: has {corpus.num_tokens} token(s), none to predict; use a longer corpus"
        )
    num_samples = count_samples(corpus, seq_length, max_samples)
    stride = dp_size * micro_batch_size
    for first in range(0, num_samples, stride):
        ids = np.arange(micro_batch_size) + first + dp_rank * micro_batch_size
        # Samples beyond the last one start at the end of the corpus, and none of their labels
        # count.
        readable = ids < (0 if failures else num_samples)
        try:
            batch = _cut_at(corpus, ids, readable, seq_length, mask_documents)
        except MegarecurError as error:
            if failures is None:
                raise
            failures.append(error)
            batch = _cut_at(corpus, ids, readable & False, seq_length, mask_documents)
        yield batch


def count_samples(corpus: Corpus, seq_length: int, max_samples: int = 0) -> int:
    """Return the number of samples of a corpus read in order, at most `max_samples` if not 0."""
    whole = -(-(corpus.num_tokens - 1) // seq_length)
    return min(whole, max_samples or whole)


def _cut_at(
    corpus: Corpus,
    ids: NDArray[np.int64],
    readable: NDArray[np.bool_],
    seq_length: int,
    mask_documents: bool,
) -> MicroBatch:
    """Return samples of a corpus in order; those not to be read are empty."""
    starts = np.where(readable, ids * seq_length, corpus.num_tokens)
    samples = _lay_out([corpus], np.zeros_like(ids), starts, ids, seq_length, mask_documents)
    return _cut(samples, 0, len(ids))


class PaddedLoader(Loader, ABC):
    """A loader whose samples have lengths of their own: a micro batch is padded to its longest."""

    def _build(self, step: int) -> list[MicroBatch]:
        first = step * self.global_batch_size + self.dp_rank * self.rank_batch_size
        rows = range(first, first + self.rank_batch_size, self.micro_batch_size)
        return [self._collate(np.arange(row, row + self.micro_batch_size)) for row in rows]

    def first_samples(self, count: int) -> MicroBatch:
        """Return the first samples of the run, the same on every rank."""
        return self._collate(np.arange(count))

    @abstractmethod
    def _collate(self, ids: NDArray[Any]) -> MicroBatch:
        """Collate samples by their ids, which ascend by one."""


def _check_length(corpus: Corpus, order: SampleOrder, seq_length: int) -> None:
    """Reject a corpus without a single sample; warn if many tokens are in no sample."""
    lost = 1.0 - order.num_windows * seq_length / max(corpus.num_tokens, 1)
    if isinstance(order, ShardOrder) and order.num_windows < 1:
        raise DataError(
            f"{corpus.path}: none of its shards holds one sample of data.seq_length={seq_length} "
            "and its next token, and data.shuffle_shards keeps samples inside shards; set "
            "shuffle_shards to 0, or lower seq_length"
        )
    if isinstance(order, ShardOrder) and lost > 0.1:
        log.warning(
            "%s: %.0f %% of its tokens are never read: data.shuffle_shards keeps samples of "
            "data.seq_length=%d inside shards, which are short",
            corpus.path, 100 * lost, seq_length,
        )  # fmt: skip
    if short := find_short(corpus.path, corpus.num_tokens, seq_length):
        raise DataError(short[0])


@dataclass(frozen=True)
class Samples:
    """R samples laid end to end, with the starts of documents in them."""

    corpora: Sequence[Corpus]
    seq_length: int
    sources_R: NDArray[np.int64]
    starts_R: NDArray[np.int64]
    """Corpus and first token of each sample."""
    ids_R: NDArray[np.int64]
    begins: NDArray[np.int64]
    """Positions where documents begin at inputs 1 to S of a sample (S: its last label),
    ascending."""
    edges: NDArray[np.int64]
    """Positions where samples or documents begin, ascending, and the end of the last sample."""
    numbers: NDArray[np.int32]
    """Index within its sample, int32, of the document that begins at each edge except the last."""


def _lay_out(
    corpora: Sequence[Corpus],
    sources_R: NDArray[np.int64],
    starts_R: NDArray[np.int64],
    ids_R: NDArray[np.int64],
    seq_length: int,
    mask_documents: bool,
) -> Samples:
    """Find the documents of some samples; without a mask, each sample is one document."""
    R, S = len(ids_R), seq_length
    found = [np.empty(0, np.int64)]
    for source, corpus in enumerate(corpora if mask_documents else ()):
        rows = np.flatnonzero(sources_R == source)
        starts = starts_R[rows]
        low, high = corpus.documents.searchsorted(np.add.outer((1, S + 1), starts))
        counts = high - low
        # Documents low[i] to high[i] of each row i, concatenated.
        documents = np.arange(counts.sum()) + np.repeat(high - counts.cumsum(), counts)
        found.append(corpus.documents[documents] + np.repeat(rows * S - starts, counts))
    begins = np.sort(np.concatenate(found))
    edges = np.union1d(begins, np.arange(R + 1) * S)
    first = edges.searchsorted(edges[:-1] // S * S)
    numbers = (np.arange(edges.size - 1) - first).astype(np.int32)
    return Samples(corpora, S, sources_R, starts_R, ids_R, begins, edges, numbers)


def _cut(samples: Samples, row: int, end: int) -> MicroBatch:
    """Read samples [row, end); tokens beyond a corpus's end are not counted."""
    B, S = end - row, samples.seq_length
    rows = [samples.corpora[source] for source in samples.sources_R[row:end].tolist()]
    # Gathered in the corpora's own narrow type: to widen all rows at once is cheaper than each.
    window_BT = np.empty((B, S + 1), np.result_type(*{corpus.dtype for corpus in rows}))
    short = []
    for b, (corpus, start) in enumerate(zip(rows, samples.starts_R[row:end].tolist(), strict=True)):
        n = min(S + 1, corpus.num_tokens - start)
        if n:  # Reading nothing would fetch the last shard of a remote corpus.
            window_BT[b, :n] = corpus.read(start, n)
        if n <= S:
            window_BT[b, n:] = corpus.eos_id
            short.append((b, max(n - 1, 0)))
    tokens_BS = window_BT[:, :-1].astype(np.int64)
    labels_BS = window_BT[:, 1:].astype(np.int64)
    for b, counted in short:
        labels_BS[b, counted:] = IGNORED
    low, high = samples.begins.searchsorted((row * S, end * S), "right")
    labels_BS.reshape(-1)[samples.begins[low:high] - (row * S + 1)] = IGNORED
    positions, documents, boundaries = _number_documents(samples, row, end)
    return MicroBatch(
        tokens_BS=torch.from_numpy(tokens_BS),
        labels_BS=torch.from_numpy(labels_BS),
        positions_BS=positions,
        documents_BS=documents,
        sample_ids_B=torch.from_numpy(samples.ids_R[row:end]),
        sources_B=torch.from_numpy(samples.sources_R[row:end]),
        single_document=boundaries.count == B,
        boundaries=boundaries,
    )


def _number_documents(samples: Samples, row: int, end: int) -> tuple[Tensor, Tensor, Boundaries]:
    """Return positions, document numbers, and the boundaries of documents."""
    B, S = end - row, samples.seq_length
    whole_positions, whole_documents = _one_document(B, S)
    low, high = samples.edges.searchsorted((row * S, end * S))
    if high - low == B:
        return whole_positions, whole_documents, whole_samples(B, S, torch.device("cpu"))
    lengths = np.diff(samples.edges[low : high + 1])
    positions = np.repeat(samples.edges[low:high] % S, lengths)
    np.subtract(whole_positions.numpy().reshape(-1), positions, out=positions)
    documents = np.repeat(samples.numbers[low:high], lengths)
    return (
        torch.from_numpy(positions.reshape(B, S)),
        torch.from_numpy(documents.reshape(B, S)),
        from_lengths(lengths, B, S),
    )


_whole: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


def _one_document(B: int, S: int) -> tuple[Tensor, Tensor]:
    """Return positions and document numbers of samples without a boundary; made once per shape."""
    if (B, S) not in _whole:
        _whole[B, S] = torch.arange(S).repeat(B, 1), torch.zeros(B, S, dtype=torch.int32)
    return _whole[B, S]
