"""Batches of a step, cut from corpora: a pure function of (step, seed), whatever the mesh.

Sample i of a corpus is tokens [i S, i S + S]: S inputs, and the same shifted by one as labels. The
global batch of a step is `global_batch_size` samples in an order that `order.py` gives; rank r of
data parallelism takes rows [r k, (r + 1) k), cut in micro batches. So which samples a step reads
depends neither on the number of ranks nor on the micro batch size, and the only state is the step.

Shapes: B samples of a micro batch, S sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megarecur.data.corpus import Corpus
from megarecur.data.order import counts_before, epoch_keys, mixture, permute
from megarecur.errors import ConfigError, DataError
from megarecur.parallel.loss import IGNORED

BLOCK_SAMPLES = 4096
PREFETCH_DEPTH = 2


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of one process reads. Tensors may be shared: do not write to them."""

    tokens_BS: Tensor
    """int64."""
    labels_BS: Tensor
    """int64, the next token; -100 where it is not counted."""
    positions_BS: Tensor
    """int64, from 0 in every document of the sample."""
    documents_BS: Tensor
    """int32, which document of the sample a token belongs to, from 0."""
    sample_ids_B: Tensor
    """int64, step * global_batch_size + row of the global batch."""
    single_document: bool
    """No document ends inside any sample: causal attention needs no further mask."""

    @property
    def num_tokens(self) -> int:
        """Labels that count."""
        return int((self.labels_BS != IGNORED).sum())

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same on a device."""
        names = ("tokens_BS", "labels_BS", "positions_BS", "documents_BS", "sample_ids_B")
        return replace(
            self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names}
        )


class Loader:
    """The training data of one data-parallel rank.

    Args:
        sources: corpora and their weights in the mixture.
        seq_length: S.
        global_batch_size: samples per step over all ranks.
        micro_batch_size: B.
        dp_rank: this process's place among the data-parallel ranks.
        dp_size: how many of those there are.
        seed: of the order.
        shuffle: read the samples of each epoch of each corpus in a random order.
        mask_documents: number the documents of a sample, restart positions with them, and count no
            label that belongs to another document.

    Raises:
        ConfigError: the ranks or micro batches do not divide the global batch.
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
        mask_documents: bool = True,
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
        self.shuffle, self.mask_documents = shuffle, mask_documents
        self.num_windows = [_count_windows(corpus, seq_length) for corpus in self.corpora]
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._pending: dict[int, Future[list[MicroBatch]]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def sample_ids(self, step: int) -> np.ndarray:
        """The ids of all samples of a step's global batch, in order: int64."""
        return np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)

    def windows(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sample, and which window of that source it is; `ids` ascend by one."""
        first, last = int(ids[0]), int(ids[-1])
        blocks = [self._block(b) for b in range(first // BLOCK_SAMPLES, last // BLOCK_SAMPLES + 1)]
        sources, windows = blocks[0]
        if len(blocks) > 1:
            sources, windows = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        begin = first % BLOCK_SAMPLES
        return sources[begin:][: len(ids)], windows[begin:][: len(ids)]

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and windows of a block of consecutive samples; the last few are kept."""
        found = self._blocks.get(number)
        if found is not None:
            return found
        start = number * BLOCK_SAMPLES
        sources, numbers = mixture(start, start + BLOCK_SAMPLES, self.weights)
        windows = np.empty_like(numbers)
        for source, n in enumerate(self.num_windows):
            own = sources == source
            epochs, indices = np.divmod(numbers[own], n)
            if self.shuffle:
                indices = permute(indices, n, epoch_keys(self.seed, source, epochs))
            windows[own] = indices
        while len(self._blocks) > 4:
            self._blocks.pop(next(iter(self._blocks)), None)
        self._blocks[number] = sources, windows
        return sources, windows

    def batch(self, step: int) -> list[MicroBatch]:
        """This rank's micro batches of a step."""
        pending = self._pending.pop(step, None)
        return self._build(step) if pending is None else pending.result()

    def prefetch(self, step: int) -> None:
        """Begin to build the batches of `step` and the one after it in the background."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        wanted = range(step, step + PREFETCH_DEPTH)
        for other in [s for s in self._pending if s not in wanted]:
            self._pending.pop(other).cancel()
        for s in wanted:
            if s not in self._pending:
                self._pending[s] = self._pool.submit(self._build, s)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop building batches in the background."""
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _build(self, step: int) -> list[MicroBatch]:
        begin = step * self.global_batch_size + self.dp_rank * self.rank_batch_size
        ids = np.arange(begin, begin + self.rank_batch_size)
        sources, windows = self.windows(ids)
        size = self.micro_batch_size
        batches = []
        for row in range(0, self.rank_batch_size, size):
            rows = slice(row, row + size)
            batches.append(
                _cut(
                    [self.corpora[source] for source in sources[rows].tolist()],
                    windows[rows] * self.seq_length,
                    ids[rows],
                    self.seq_length,
                    self.mask_documents,
                )
            )
        return batches

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint before `step` holds: samples read, in all and of each corpus.

        Corpora are listed in their order (as lists, which JSON keeps), since the order of the
        samples of a corpus depends on its place.
        """
        samples = step * self.global_batch_size
        counts = counts_before(samples, self.weights)
        fingerprints = [corpus.fingerprint for corpus in self.corpora]
        pairs = zip(fingerprints, counts, strict=True)
        return {"samples": samples, "sources": [list(pair) for pair in pairs]}

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse to go on from a state of other corpora, or of other weights or batch size.

        Raises:
            DataError: naming what differs.
        """
        if not isinstance(state.get("sources"), list):
            raise DataError(
                "data.train: this checkpoint has no data cursor: it was converted, not trained; "
                "set run_dir to another folder to train, this one is for evaluation and generation"
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
                "give those it had, in their order, or set run_dir to another folder"
            )
        step, rest = divmod(state["samples"], self.global_batch_size)
        if rest or self.state(step) != state:
            raise DataError(
                f"data.train: the checkpoint has read {state['samples']} samples, "
                f"{[count for _, count in state['sources']]} of each corpus, which these weights "
                f"and global_batch_size={self.global_batch_size} do not give; give those it had, "
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
) -> Iterator[MicroBatch]:
    """A corpus in order, each token (but the first) predicted once, cut over data-parallel ranks.

    Every rank yields the same number of micro batches, all of the same shape: what is missing in
    the last ones has label -100. `max_samples` of 0: all.

    Raises:
        DataError: the corpus has no token to predict.
    """
    if corpus.num_tokens < 2:
        raise DataError(f"{corpus.path}: has {corpus.num_tokens} token(s), none to predict")
    num_samples = -(-(corpus.num_tokens - 1) // seq_length)
    num_samples = min(num_samples, max_samples or num_samples)
    stride = dp_size * micro_batch_size
    for first in range(0, num_samples, stride):
        ids = np.arange(micro_batch_size) + first + dp_rank * micro_batch_size
        # Samples beyond the last one start at the end of the corpus: nothing in them is counted.
        starts = np.where(ids < num_samples, ids * seq_length, corpus.num_tokens)
        yield _cut([corpus] * len(starts), starts, ids, seq_length, mask_documents)


def _count_windows(corpus: Corpus, seq_length: int) -> int:
    """How many samples an epoch of a corpus has."""
    n = (corpus.num_tokens - 1) // seq_length
    if n < 1:
        raise DataError(
            f"{corpus.path}: has {corpus.num_tokens} tokens, too few for one sample of "
            f"data.seq_length={seq_length} and its next token; lower seq_length, or add text"
        )
    return n


def _cut(
    corpora: Sequence[Corpus],
    starts_B: np.ndarray,
    ids_B: np.ndarray,
    seq_length: int,
    mask_documents: bool,
) -> MicroBatch:
    """Read one sample per (corpus, start); what lies beyond a corpus's end is not counted."""
    B, S = len(corpora), seq_length
    # Gathered in the corpora's own narrow type: to widen all rows at once is cheaper than each.
    window_BT = np.empty((B, S + 1), np.result_type(*{corpus.dtype for corpus in corpora}))
    short = []
    for b, (corpus, start) in enumerate(zip(corpora, starts_B.tolist(), strict=True)):
        n = min(S + 1, corpus.num_tokens - start)
        window_BT[b, :n] = corpus.read(start, n)
        if n <= S:
            window_BT[b, n:] = corpus.eos_id
            short.append((b, max(n - 1, 0)))
    tokens_BS = window_BT[:, :-1].astype(np.int64)
    labels_BS = window_BT[:, 1:].astype(np.int64)
    for b, counted in short:
        labels_BS[b, counted:] = IGNORED
    begins = _find_begins(corpora, starts_B, S) if mask_documents else np.empty(0, np.int64)
    labels_BS.reshape(-1)[begins - 1] = IGNORED
    positions, documents, single = _number_documents(begins, B, S)
    return MicroBatch(
        tokens_BS=torch.from_numpy(tokens_BS),
        labels_BS=torch.from_numpy(labels_BS),
        positions_BS=positions,
        documents_BS=documents,
        sample_ids_B=torch.from_numpy(ids_B),
        single_document=single,
    )


def _find_begins(corpora: Sequence[Corpus], starts_B: np.ndarray, S: int) -> np.ndarray:
    """Where documents begin at inputs 1 to S of the rows (S: the label of the last input).

    As indices into the rows laid end to end, in no particular order.
    """
    found = []
    for corpus in dict.fromkeys(corpora):
        rows = np.array([b for b, other in enumerate(corpora) if other is corpus])
        starts = starts_B[rows]
        low, high = corpus.documents.searchsorted(np.add.outer((1, S + 1), starts))
        counts = high - low
        # Documents low[i] to high[i] of each row i, side by side.
        numbers = np.arange(counts.sum()) + np.repeat(high - counts.cumsum(), counts)
        found.append(corpus.documents[numbers] + np.repeat(rows * S - starts, counts))
    return np.concatenate(found)


def _number_documents(begins: np.ndarray, B: int, S: int) -> tuple[Tensor, Tensor, bool]:
    """Positions, document numbers, and whether no document begins inside a row.

    All rows are worked on as one, where every row begins a document.
    """
    edge = np.zeros(B * S + 1, bool)
    edge[begins] = edge[::S] = True
    edges = edge.nonzero()[0]
    whole_positions, whole_documents = _one_document(B, S)
    if edges.size == B + 1:
        return whole_positions, whole_documents, True
    begins, lengths = edges[:-1], np.diff(edges)
    positions = whole_positions.numpy().reshape(-1) - np.repeat(begins % S, lengths)
    numbers = np.arange(begins.size) - np.searchsorted(begins, begins // S * S)
    documents = np.repeat(numbers.astype(np.int32), lengths)
    return (
        torch.from_numpy(positions.reshape(B, S)),
        torch.from_numpy(documents.reshape(B, S)),
        False,
    )


_whole: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


def _one_document(B: int, S: int) -> tuple[Tensor, Tensor]:
    """Positions and document numbers of samples without a boundary; made once per shape."""
    if (B, S) not in _whole:
        _whole[B, S] = torch.arange(S).repeat(B, 1), torch.zeros(B, S, dtype=torch.int32)
    return _whole[B, S]
