"""Loading: every sample once an epoch, in an order that depends on the seed and the step alone."""

from __future__ import annotations

import copy
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megarecur.data.corpus import Corpus
from megarecur.data.loader import Loader, MicroBatch, validation_batches
from megarecur.data.order import counts_before, epoch_keys, mixture, permute
from megarecur.data_prep.readers import Reading
from megarecur.data_prep.shards import prepare_shards
from megarecur.errors import ConfigError, DataError

S = 32

# -------------------------------------------------------------------------------------------- order

weights = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=5)


@given(st.integers(1, 3000), st.integers(0, 2**70), st.integers(0, 9), st.integers(0, 10**9))
def test_permute_is_a_bijection(n: int, seed: int, source: int, epoch: int) -> None:
    order = permute(np.arange(n), n, epoch_keys(seed, source, np.array([epoch])))
    assert sorted(order.tolist()) == list(range(n))


def test_permute_depends_on_each_part_of_its_key() -> None:
    def order(seed: int, source: int, epoch: int) -> tuple[int, ...]:
        keys = epoch_keys(seed, source, np.array([epoch]))
        return tuple(permute(np.arange(100), 100, keys).tolist())

    keys = [(s, c, e) for s in (0, 1, 7) for c in (0, 1, 7) for e in (0, 1, 7)]
    assert len({order(*key) for key in keys}) == len(keys)


def test_permute_scatters() -> None:
    n = 100_003
    order = permute(np.arange(n), n, epoch_keys(1, 0, np.array([0])))
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.02
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02
    assert np.abs(np.bincount(order[: n // 2] * 10 // n) / (n // 20) - 1).max() < 0.05


@settings(max_examples=60)
@given(weights, st.integers(0, 10**12), st.integers(0, 3000), st.data())
def test_mixture_can_start_anywhere(w: list[float], start: int, n: int, data: Any) -> None:
    sources, numbers = mixture(start, start + n, w)
    assert len(sources) == len(numbers) == n
    a = data.draw(st.integers(0, n))
    b = data.draw(st.integers(a, n))
    part = mixture(start + a, start + b, w)
    assert (part[0] == sources[a:b]).all() and (part[1] == numbers[a:b]).all()
    # Each source's samples are numbered on from what it gave before.
    before = counts_before(start, w)
    assert sum(before) == start
    for source, count in enumerate(before):
        own = numbers[sources == source]
        assert (own == np.arange(count, count + own.size)).all()


@settings(max_examples=60)
@given(weights)
def test_mixture_is_exact_over_every_prefix(w: list[float]) -> None:
    n = 2000
    sources, _ = mixture(0, n, w)
    for source, share in enumerate(np.array(w) / sum(w)):
        given_ = np.cumsum(sources == source)
        bound = (1 + len(w) * share) / 2 + 1e-6
        assert np.abs(given_ - share * np.arange(1, n + 1)).max() <= bound


# ------------------------------------------------------------------------------------------- loader


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Corpus]:
    """Two corpora of random documents of 1 to 90 bytes: about 9,000 and 3,000 tokens."""
    rng, found = np.random.default_rng(0), []
    for number, count in enumerate((200, 60)):
        folder = tmp_path_factory.mktemp(f"corpus{number}")
        documents = [rng.integers(97, 123, rng.integers(1, 89), np.uint8) for _ in range(count)]
        (folder / "text.txt").write_bytes(b"\n\0\n".join(d.tobytes() for d in documents))
        reading = Reading(text_split="separator", separator="\0")
        prepare_shards([folder / "text.txt"], folder / "out", "bytes", reading, workers=1)
        found.append(Corpus(folder / "out" / "train"))
    return found


def make(corpora: list[Corpus], **changes: Any) -> Loader:
    options = {
        "seq_length": S, "global_batch_size": 8, "micro_batch_size": 4, "dp_rank": 0, "dp_size": 1,
        "seed": 1,
    }  # fmt: skip
    sources = list(zip(corpora, (0.7, 0.3), strict=False))
    return Loader(sources, **(options | changes))  # type: ignore[arg-type]


def joined(batches: list[MicroBatch]) -> dict[str, torch.Tensor]:
    names = ("tokens_BS", "labels_BS", "positions_BS", "documents_BS", "sample_ids_B")
    return {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}


def assert_equal(a: list[MicroBatch], b: list[MicroBatch]) -> None:
    left, right = joined(a), joined(b)
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("mask_documents", [True, False])
def test_samples_are_windows_of_the_corpus(corpora: list[Corpus], mask_documents: bool) -> None:
    loader = make(corpora, mask_documents=mask_documents)
    streams = [corpus.read(0, corpus.num_tokens).astype(np.int64) for corpus in corpora]
    for step in (0, 1, 33, 1000):
        sources, windows = loader.windows(loader.sample_ids(step))
        got = joined(loader.batch(step))
        assert got["sample_ids_B"].tolist() == loader.sample_ids(step).tolist()
        for row, (source, window) in enumerate(zip(sources, windows, strict=True)):
            stream, start = streams[source], window * S
            tokens = stream[start : start + S]
            labels = stream[start + 1 : start + S + 1].copy()
            document, position = np.zeros(S), np.arange(S)
            if mask_documents:
                labels[tokens == 256] = -100
                document = np.concatenate([[0], np.cumsum(tokens == 256)[:-1]])
                for i in range(1, S):
                    position[i] = 0 if tokens[i - 1] == 256 else position[i - 1] + 1
            assert got["tokens_BS"][row].tolist() == tokens.tolist()
            assert got["labels_BS"][row].tolist() == labels.tolist()
            assert got["documents_BS"][row].tolist() == document.tolist()
            assert got["positions_BS"][row].tolist() == position.tolist()


def test_single_document_says_whether_a_document_ends_inside(corpora: list[Corpus]) -> None:
    loader = make(corpora[:1], micro_batch_size=1)
    batches = [batch for step in range(20) for batch in loader.batch(step)]
    for batch in batches:
        assert batch.single_document == (int(batch.documents_BS.max()) == 0)
        assert batch.documents_BS.dtype == torch.int32
        assert batch.tokens_BS.is_contiguous() and batch.labels_BS.is_contiguous()
    assert {batch.single_document for batch in batches} == {True, False}
    assert all(b.single_document for b in make(corpora, mask_documents=False).batch(0))


def test_corpora_of_different_types_share_a_batch(corpora: list[Corpus]) -> None:
    wide = copy.copy(corpora[1])
    wide.dtype = np.dtype(np.uint32)
    wide.shards = [shard.astype(np.uint32) + 70_000 for shard in wide.shards]
    narrow, mixed = make(corpora, micro_batch_size=8), make([corpora[0], wide], micro_batch_size=8)
    for step in range(5):
        sources, _ = narrow.windows(narrow.sample_ids(step))
        expected = joined(narrow.batch(step))
        shift = torch.from_numpy(sources * 70_000)[:, None]
        expected["tokens_BS"] += shift
        expected["labels_BS"] += shift * (expected["labels_BS"] >= 0)
        for name, value in joined(mixed.batch(step)).items():
            assert torch.equal(value, expected[name]), name


def test_neither_ranks_nor_micro_batches_change_a_step(corpora: list[Corpus]) -> None:
    for step in (0, 7, 600):
        whole = make(corpora, micro_batch_size=8).batch(step)
        for dp_size, micro_batch_size in ((1, 1), (2, 2), (4, 1), (4, 2), (8, 1)):
            parts = [
                batch
                for rank in range(dp_size)
                for batch in make(
                    corpora, dp_rank=rank, dp_size=dp_size, micro_batch_size=micro_batch_size
                ).batch(step)
            ]
            assert_equal(whole, parts)


def test_every_epoch_reads_every_sample_once_in_another_order(corpora: list[Corpus]) -> None:
    loader = make(corpora[:1])
    n = loader.num_windows[0]
    ids = np.arange(3 * n)
    sources, windows = loader.windows(ids)
    epochs = windows.reshape(3, n)
    assert (sources == 0).all()
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    unshuffled = make(corpora[:1], shuffle=False).windows(ids)[1]
    assert (unshuffled == np.tile(np.arange(n), 3)).all()
    assert (make(corpora[:1], seed=2).windows(ids)[1] != windows).any()


def test_blocks_of_the_order_are_seamless(corpora: list[Corpus]) -> None:
    ids = np.arange(4096 * 7 + 20)
    whole = make(corpora).windows(ids)
    loader = make(corpora)
    for first in (4090, 0, 4096 * 6 + 4095, 17):
        part = loader.windows(ids[first : first + 16])
        assert all((a[first : first + 16] == b).all() for a, b in zip(whole, part, strict=True))


def test_prefetch_gives_the_same_and_closes(corpora: list[Corpus]) -> None:
    plain, loader = make(corpora), make(corpora)
    loader.prefetch(0)
    for step in (0, 1, 2, 5, 3):
        loader.prefetch(step + 1)
        assert_equal(loader.batch(step), plain.batch(step))
    loader.close()
    assert_equal(loader.batch(9), plain.batch(9))
    loader.close()
    with make(corpora) as held:
        held.prefetch(0)
        pool = held._pool
        assert pool is not None
    assert held._pool is None
    with pytest.raises(RuntimeError, match="shutdown"):
        pool.submit(print)


def test_state(corpora: list[Corpus]) -> None:
    loader = make(corpora)
    state = json.loads(json.dumps(loader.state(100)))
    assert state["samples"] == 800
    sources, _ = loader.windows(np.arange(800))
    counts = [[c.fingerprint, int((sources == i).sum())] for i, c in enumerate(corpora)]
    assert state["sources"] == counts
    loader.check_state(state)
    make(corpora, dp_rank=1, dp_size=2).check_state(state)
    with pytest.raises(DataError, match=r"other corpora.* run_dir"):
        make(corpora[:1]).check_state(state)
    with pytest.raises(DataError, match=r"these weights.* run_dir"):
        weighted(corpora, 1.0, 1.0).check_state(state)
    with pytest.raises(DataError, match="global_batch_size=16"):
        make(corpora, global_batch_size=16).check_state(loader.state(3))


def weighted(corpora: list[Corpus], *weights: float) -> Loader:
    return Loader(
        list(zip(corpora, weights, strict=True)), seq_length=S, global_batch_size=8,
        micro_batch_size=4, dp_rank=0, dp_size=1, seed=1,
    )  # fmt: skip


def test_the_order_of_equal_corpora_is_part_of_the_state(corpora: list[Corpus]) -> None:
    loader, swapped = weighted(corpora, 1.0, 1.0), weighted(corpora[::-1], 1.0, 1.0)
    assert not torch.equal(loader.batch(7)[0].tokens_BS, swapped.batch(7)[0].tokens_BS)
    loader.check_state(loader.state(7))
    with pytest.raises(DataError, match=r"the same corpora in another order.* run_dir"):
        swapped.check_state(loader.state(7))
    twice = weighted([corpora[0], corpora[0]], 1.0, 3.0)
    twice.check_state(twice.state(10))
    assert [count for _, count in twice.state(10)["sources"]] == [20, 60]


def test_a_state_without_a_cursor_is_refused(corpora: list[Corpus]) -> None:
    with pytest.raises(DataError, match=r"no data cursor: it was converted, .* run_dir"):
        make(corpora).check_state({})


def test_a_cursor_of_wrong_types_is_refused(corpora: list[Corpus]) -> None:
    loader = make(corpora)
    sound = loader.state(3)
    loader.check_state(sound)
    wrong = [None, True, -1, 1.5, 1 << 70, "x", [], {}, [1], [["x"]], [[1, "x"]], [["x", "y"]]]
    for key in ("samples", "sources"):
        for value in wrong:
            with pytest.raises(DataError, match=r"data\.train: "):
                loader.check_state(sound | {key: value})
    fingerprint = sound["sources"][0][0]
    for pair in ([fingerprint, 1.5], [fingerprint, True], [fingerprint], fingerprint, None):
        with pytest.raises(DataError, match="the data cursor of this checkpoint is damaged"):
            loader.check_state(sound | {"sources": [pair, *sound["sources"][1:]]})


def test_a_batch_the_world_cannot_divide_is_refused(corpora: list[Corpus]) -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size=8 .* 3 .*a multiple of 12"):
        make(corpora, dp_size=3)
    with pytest.raises(ConfigError, match=r"micro_batch_size=3"):
        make(corpora, micro_batch_size=3)


def test_a_corpus_shorter_than_a_sample_is_refused(corpora: list[Corpus]) -> None:
    tokens = corpora[1].num_tokens
    assert make(corpora[1:], seq_length=tokens - 1).num_windows == [1]
    with pytest.raises(DataError, match=rf"{tokens} tokens, too few .*seq_length={tokens}"):
        make(corpora[1:], seq_length=tokens)


# --------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("dp_size", [1, 3])
@pytest.mark.parametrize("seq_length", [7, 32, 50_000])
def test_validation_predicts_every_token_once(
    corpora: list[Corpus], dp_size: int, seq_length: int
) -> None:
    corpus = corpora[1]
    ranks = [
        list(
            validation_batches(
                corpus, seq_length=seq_length, micro_batch_size=4, dp_rank=rank, dp_size=dp_size,
                mask_documents=False,
            )
        )
        for rank in range(dp_size)
    ]  # fmt: skip
    assert len({len(batches) for batches in ranks}) == 1
    rows = [batch for group in zip(*ranks, strict=True) for batch in group]
    got = joined(rows)
    assert got["sample_ids_B"].tolist() == list(range(len(got["sample_ids_B"])))
    labels = got["labels_BS"].flatten()
    assert labels[labels >= 0].tolist() == corpus.read(1, corpus.num_tokens - 1).tolist()
    assert {batch.tokens_BS.shape for batch in rows} == {(4, seq_length)}


def test_validation_masks_documents_and_stops(corpora: list[Corpus]) -> None:
    corpus = corpora[1]
    batches = list(validation_batches(corpus, seq_length=S, micro_batch_size=4))
    counted = sum(int((batch.labels_BS >= 0).sum()) for batch in batches)
    assert counted == corpus.num_tokens - corpus.num_documents
    few = list(validation_batches(corpus, seq_length=S, micro_batch_size=4, max_samples=5))
    assert len(few) == 2
    assert_equal(few[:1], batches[:1])
    assert (few[1].labels_BS[1:] == -100).all() and (few[1].labels_BS[0] >= 0).any()


def test_real_text(data_dir: Path, tmp_path: Path) -> None:
    text = lzma.decompress((data_dir / "lm_en" / "botchan.txt.xz").read_bytes()).decode()
    lines = [json.dumps({"text": line}) for line in text.splitlines()]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    prepare_shards(
        [tmp_path / "lines.jsonl"], tmp_path / "out",
        data_dir / "tokenizers" / "sentencepiece_test_model.model", workers=1,
    )  # fmt: skip
    corpus = Corpus(tmp_path / "out" / "train")
    assert corpus.num_documents > 100
    loader = make([corpus], seq_length=128)
    batch = loader.batch(3)[0]
    assert int(batch.tokens_BS.max()) < corpus.vocab_size
    ends = (batch.tokens_BS == corpus.eos_id) & (batch.labels_BS != -100)
    assert not ends.any()
