"""Sentence pairs: each once an epoch, in batches by tokens that no mesh changes."""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.configs import make_config
from support.sentences import write_pair_corpus

from megarecur.config.load import changed_fixed_fields
from megarecur.config.run import Config
from megarecur.config.train import TrainConfig
from megarecur.data.corpus import Corpus
from megarecur.data.loader import MicroBatch
from megarecur.data.open import build_loader, open_data, open_sources, read_in_order
from megarecur.data.order import BatchOrder, cut_batches
from megarecur.data.pairs import PairCorpus, PairLoader, cut_for_scoring, pair_batches
from megarecur.data.tokenizer import load_tokenizer
from megarecur.data_prep.tokenizer import train_tokenizer
from megarecur.errors import DataError, MegarecurError
from megarecur.parallel.loss import IGNORED
from megarecur.parallel.mesh import Mesh

S, TOKENS = 64, 256


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train` (200 pairs), `val` (31), and the vocabulary joint.model."""
    return write_pair_corpus(tmp_path_factory.mktemp("data") / "pairs", num_val=31)


def make_train(batch_tokens: int | None = TOKENS, **values: Any) -> TrainConfig:
    defaults = {"steps": 9, "global_batch_size": 4, "micro_batch_size": 1 if batch_tokens else 2}
    return TrainConfig(**{**defaults, "batch_tokens": batch_tokens, **values})


def make_loader(
    corpora: Sequence[PairCorpus], train: TrainConfig, rank: int = 0, dp: int = 1, **options: Any
) -> PairLoader:
    weights = [1.0, 0.5][: len(corpora)]
    options = {"seq_length": S, "seed": 7, **options}
    sources = list(zip(corpora, weights, strict=True))
    return PairLoader(sources, train, dp_rank=rank, dp_size=dp, **options)


def sentences(batch: MicroBatch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Source and target of each pair, with their ends."""
    assert batch.source is not None
    sources, labels = batch.source.tokens_BS, batch.labels_BS
    return [
        (tuple(source[real].tolist()), tuple(label[label != IGNORED].tolist()))
        for source, real, label in zip(sources, batch.source.documents_BS == 0, labels, strict=True)
    ]


def all_pairs(corpus: PairCorpus) -> list[tuple[tuple[int, ...], ...]]:
    numbers = range(corpus.num_pairs)
    return [tuple(tuple(side.tolist()) for side in corpus.pair(n, S)) for n in numbers]


def equal(one: MicroBatch, other: MicroBatch) -> bool:
    mine, theirs = list(one.tensors()), list(other.tensors())
    return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


# -------------------------------------------------------------------------------------- batcher

lengths = st.lists(st.tuples(st.integers(2, 40), st.integers(2, 40)), min_size=1, max_size=300)


@given(lengths, st.integers(80, 600), st.booleans(), st.integers(0, 2**40))
def test_every_pair_is_in_one_batch_of_an_epoch(
    drawn: list[tuple[int, int]], most: int, shuffle: bool, seed: int
) -> None:
    lengths_P2 = np.array(drawn)
    order = BatchOrder(lengths_P2, most, shuffle, seed, source=1)
    batches = np.arange(order.num_windows)
    for epoch in (0, 1, 5):
        windows = order.windows(batches + epoch * order.num_windows)
        found = [order.pairs(epoch, window) for window in windows.tolist()]
        assert sorted(np.concatenate(found).tolist()) == list(range(len(drawn)))
        for batch in found:
            assert len(batch) * lengths_P2[batch].max(axis=0).sum() <= most
        again = BatchOrder(lengths_P2, most, shuffle, seed, source=1)
        last = int(windows[-1])
        assert (again.pairs(epoch, last) == found[-1]).all()


@given(lengths, st.integers(1, 300))
def test_batches_are_cut_as_large_as_they_may_be(drawn: list[tuple[int, int]], most: int) -> None:
    lengths_P2 = np.array(drawn)
    firsts = cut_batches(lengths_P2, most).tolist()
    assert firsts[0] == 0 and firsts[-1] == len(drawn)

    def size(first: int, end: int) -> int:
        return (end - first) * int(lengths_P2[first:end].max(axis=0).sum())

    for first, end in pairwise(firsts):
        assert first < end and (size(first, end) <= most or end == first + 1)
        assert end == len(drawn) or size(first, end + 1) > most


def test_epochs_seeds_and_sources_shuffle_differently() -> None:
    rng = np.random.default_rng(0)
    lengths_P2 = rng.integers(5, 9, (600, 2))

    def order(seed: int, source: int, epoch: int) -> list[list[int]]:
        found = BatchOrder(lengths_P2, 256, True, seed, source)
        windows = found.windows(np.arange(found.num_windows) + epoch * found.num_windows)
        return [found.pairs(epoch, window).tolist() for window in windows.tolist()]

    keys = [(seed, source, epoch) for seed in (0, 3) for source in (0, 1) for epoch in (0, 1, 2)]
    orders = [order(*key) for key in keys]
    together = {tuple(sorted(batch)) for found in orders for batch in found}
    assert len(together) > 0.9 * sum(map(len, orders))  # Batches differ, not only their order.
    sizes = [[len(batch) for batch in found] for found in orders]
    assert len(set(map(tuple, sizes))) == len(keys)


def test_padding_of_multi30k_is_at_most_five_percent(data_dir: Path, tmp_path: Path) -> None:
    folder = data_dir / "translation" / "multi30k"
    files = [folder / f"train.{side}.xz" for side in ("de", "en")]
    if missing := [str(file) for file in files if not file.is_file()]:
        pytest.skip(f"no {' nor '.join(missing)}; set MEGARECUR_DATA to the data")
    options = {"vocab_size": 8000, "sample_bytes": 1 << 20}
    tokenizer = load_tokenizer(train_tokenizer(files, tmp_path / "joint.model", **options))
    sides = []
    for file in files:
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            sides.append([tokenizer.encode_array(line.strip()).size + 1 for line in lines])
    lengths_P2 = np.array(sides).T
    order = BatchOrder(lengths_P2, 4096, True, 1, 0)
    padded = sum(
        len(batch) * lengths_P2[batch].max(axis=0).sum()
        for batch in (order.pairs(3, window) for window in range(order.num_windows))
    )
    assert len(lengths_P2) == 29_000
    assert 1 - lengths_P2.sum() / padded < 0.05


# --------------------------------------------------------------------------------------- loader


def test_a_batch_is_what_encoder_and_decoder_read(pairs: Path) -> None:
    corpus = PairCorpus(pairs / "train")
    tokenizer = load_tokenizer(pairs / "joint.model")
    for train in (make_train(), make_train(None)):
        for batch in make_loader([corpus], train, multiple=4).batch(3):
            source = batch.source
            assert source is not None and source.tokens_BS.shape[0] == len(batch.tokens_BS)
            for side in (source, batch):
                real = side.documents_BS == 0
                B, length = side.tokens_BS.shape
                assert length % 4 == 0 and length - 4 < int(real.sum(1).max()) <= length
                assert (side.tokens_BS[~real] == tokenizer.pad_id).all()
                assert (side.documents_BS[~real] == -1).all() and real[:, 0].all()
                assert (real.long().diff(dim=1) <= 0).all()
                assert (side.positions_BS == torch.arange(length)).all()
                assert side.single_document == bool(real.all())
                assert side.boundaries is not None and side.boundaries.batch == B
                ends = real.sum(1).tolist()
                assert side.boundaries.count == B + sum(end < length for end in ends)
            for b, (_, target) in enumerate(sentences(batch)):
                assert target[-1] == tokenizer.eos_id and len(target) == ends[b]
                assert batch.tokens_BS[b, : ends[b]].tolist() == [tokenizer.bos_id, *target[:-1]]
            assert batch.num_tokens == int((batch.documents_BS == 0).sum())
            assert set(sentences(batch)) <= set(all_pairs(corpus))


@pytest.mark.parametrize("batch_tokens", [TOKENS, None])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_pair_once_an_epoch_on_any_number_of_ranks(
    pairs: Path, batch_tokens: int | None, shuffle: bool
) -> None:
    corpus, train = PairCorpus(pairs / "train"), make_train(batch_tokens)
    whole = make_loader([corpus], train, shuffle=shuffle)
    n, size = whole.num_windows[0], train.global_batch_size
    steps = range(-(-3 * n // size))  # three epochs, and the beginning of the next
    given = [row for step in steps for batch in whole.batch(step) for row in rows_of(batch)]
    ids = [i for i, _ in given]
    assert len(set(ids)) == len(ids)
    first = 3 * corpus.num_pairs
    assert sorted(pair for _, pair in given[:first]) == sorted(3 * all_pairs(corpus))
    for start in range(0, first, corpus.num_pairs):
        epoch = [pair for _, pair in given[start : start + corpus.num_pairs]]
        assert sorted(epoch) == sorted(all_pairs(corpus))
        in_order = epoch == all_pairs(corpus)
        assert in_order is not shuffle
    for dp in (2, 4):
        micro = train.model_copy(update={"micro_batch_size": 1})  # no matter without batch_tokens
        ranks = [make_loader([corpus], micro, r, dp, shuffle=shuffle) for r in range(dp)]
        for step in (0, 1, len(steps) - 1):
            own = [batch for rank in ranks for batch in rank.batch(step)]
            assert [r for b in own for r in rows_of(b)] == [
                r for b in whole.batch(step) for r in rows_of(b)
            ]
            if batch_tokens:
                assert all(map(equal, own, whole.batch(step)))


def rows_of(batch: MicroBatch) -> list[tuple[int, Any]]:
    return list(zip(batch.sample_ids_B.tolist(), sentences(batch), strict=True))


def test_batches_have_at_most_batch_tokens(pairs: Path) -> None:
    loader = make_loader([PairCorpus(pairs / "train")], make_train())
    batches = [batch for step in range(20) for batch in loader.batch(step)]
    sizes = [b.tokens_BS.numel() + b.source.tokens_BS.numel() for b in batches if b.source]
    assert max(sizes) <= TOKENS < 1.5 * np.mean(sizes)


def test_a_resumed_run_reads_what_an_uninterrupted_one_reads(pairs: Path, tmp_path: Path) -> None:
    """Also in the middle of epochs of different lengths, of a mixture."""
    other = write_pair_corpus(tmp_path / "other", 77, 5, 2, str(pairs / "joint.model"))
    corpora = [PairCorpus(pairs / "train"), PairCorpus(other / "train")]
    for train in (make_train(), make_train(None)):
        loader = make_loader(corpora, train)
        n = max(loader.num_windows)
        batches = [loader.batch(step) for step in range(n)]
        sources = torch.cat([batch.sources_B for step in batches for batch in step])
        assert set(sources.tolist()) == {0, 1}
        ids = torch.cat([batch.sample_ids_B for step in batches for batch in step]).tolist()
        assert len(set(ids)) == len(ids)
        for step in (1, n // 2, n - 1):
            state = loader.state(step)
            assert state["samples"] == step * train.global_batch_size
            fresh = make_loader(corpora, train)
            fresh.check_state(state)
            assert all(map(equal, fresh.batch(step), batches[step]))
        loader.prefetch(2)
        assert all(map(equal, loader.batch(2), batches[2]))
        loader.close()
        with pytest.raises(DataError, match="other corpora"):
            make_loader(corpora[:1], train).check_state(loader.state(1))


def test_batch_tokens_may_not_change_when_a_run_resumes() -> None:
    config = make_translation("p", train={"batch_tokens": 512})
    other = make_translation("p", train={"batch_tokens": 1024})
    (text,) = changed_fixed_fields(config, other)
    assert "train.batch_tokens" in text


def test_the_first_samples_are_the_same_on_every_rank(pairs: Path) -> None:
    corpus = PairCorpus(pairs / "train")
    for train in (make_train(), make_train(None)):
        ranks = [make_loader([corpus], train, rank, 2).first_samples(3) for rank in (0, 1)]
        assert equal(*ranks) and set(sentences(ranks[0])) <= set(all_pairs(corpus))
    assert len(ranks[0].tokens_BS) == 3


def test_long_sides_are_cut_and_keep_their_end(pairs: Path) -> None:
    corpus = PairCorpus(pairs / "train")
    for number in range(20):
        for whole, cut in zip(corpus.pair(number, S), corpus.pair(number, 5), strict=True):
            if whole.size <= 5:
                assert (cut == whole).all()
            else:
                assert cut.tolist() == [*whole[:4].tolist(), corpus.eos_id]
                assert cut.dtype == whole.dtype
    loader = make_loader([corpus], make_train(64), seq_length=5)
    batches = [batch for step in range(5) for batch in loader.batch(step)]
    assert max(batch.tokens_BS.shape[1] for batch in batches) == 5
    assert max(batch.tokens_BS.numel() for batch in batches) <= 64


# ------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("batch_tokens", [TOKENS, None])
@pytest.mark.parametrize("dp", [1, 3])
def test_scoring_reads_every_pair_once_in_equally_many_batches(
    pairs: Path, batch_tokens: int | None, dp: int
) -> None:
    corpus, train = PairCorpus(pairs / "val"), make_train(batch_tokens)
    for most in (0, 10):
        failures: list[MegarecurError] = []
        cut = cut_for_scoring(corpus, train, S, most)
        ranks = [
            list(pair_batches(corpus, cut, seq_length=S, dp_rank=r, dp_size=dp, failures=failures))
            for r in range(dp)
        ]
        assert len({len(rank) for rank in ranks}) == 1 and not failures
        rows = [row for rank in ranks for batch in rank for row in sentences(batch)]
        counted = [row for row in rows if row[1]]
        assert sorted(counted) == sorted(all_pairs(corpus)[: most or None])
        if batch_tokens is None and dp == 1:
            assert counted == all_pairs(corpus)[: most or None]


def test_a_corpus_that_cannot_be_read_gives_empty_batches(
    pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, failures = PairCorpus(pairs / "val"), []
    cut = cut_for_scoring(corpus, make_train(None), S)
    read = corpus.pair

    def fail(number: int, most: int) -> Any:
        if number > 5:
            raise DataError("damaged")
        return read(number, most)

    monkeypatch.setattr(corpus, "pair", fail)
    batches = list(pair_batches(corpus, cut, seq_length=S, failures=failures))
    assert len(batches) == len(cut) and [str(f) for f in failures] == ["damaged"]
    assert [batch.num_tokens > 0 for batch in batches] == [True] * 3 + [False] * (len(cut) - 3)


# ------------------------------------------------------------------------------- fit to a config


def make_translation(folder: Path | str, **sections: Any) -> Config:
    values = {
        "encoder": {"kind": "dense", "num_layers": 2},
        "recurrence": {"kind": "dense", "num_layers": 2},
        "data": {"tokenizer": f"{folder}/joint.model", "seq_length": S},
        "train": {"micro_batch_size": 1, "batch_tokens": TOKENS},
    }
    merged = {key: {**values.get(key, {}), **sections.get(key, {})} for key in values}
    return make_config(folder, **merged)


def refusal(config: Config) -> str:
    mesh = Mesh(device=torch.device("cpu"))
    with pytest.raises(DataError) as caught:
        open_data(config, mesh)
    return str(caught.value)


def test_a_config_with_an_encoder_reads_pairs(pairs: Path) -> None:
    mesh = Mesh(device=torch.device("cpu"))
    config = make_translation(pairs)
    data = open_data(config, mesh)
    assert isinstance(data.loader, PairLoader) and isinstance(data.validation[0], PairCorpus)
    assert data.config.model.vocab_size == 330
    batches, count = read_in_order(data.config, data.validation[0], mesh, 0, [])
    assert count == len(list(batches))
    plain = make_translation(pairs, train={"batch_tokens": None, "micro_batch_size": 2})
    batches, count = read_in_order(plain, data.validation[0], mesh, 0, [])
    assert len(list(batches)) == 16 and count == 32
    corpora: list[Corpus] = [PairCorpus(pairs / "train")]
    assert isinstance(build_loader(plain, corpora, mesh), PairLoader)


def test_corpora_that_do_not_fit_are_named_with_a_remedy(pairs: Path, corpus: Path) -> None:
    text = {"train": [{"path": f"{corpus}/train"}], "val": [], "tokenizer": "bytes"}
    assert "holds text, but a config with an encoder" in refusal(make_translation(pairs, data=text))
    plain = make_config(pairs, data={"tokenizer": f"{pairs}/joint.model"})
    message = refusal(plain)
    assert message.count("holds pairs of sentences, but the config has no encoder") == 2
    lengths_P2 = PairCorpus(pairs / "train").lengths_P2
    longest, pair = int(lengths_P2.max()), int(lengths_P2.sum(axis=1).max())
    message = refusal(make_translation(pairs, data={"seq_length": longest - 1}))
    assert f"its longest sentence has {longest} tokens" in message
    assert f"data.seq_length={longest - 1}; raise seq_length to {longest}" in message
    message = refusal(make_translation(pairs, train={"batch_tokens": pair - 1}))
    assert f"its longest pair has {pair} tokens" in message
    assert f"raise batch_tokens to at least {pair}" in message
    cut = {"seq_length": 4, "truncate": True}
    mesh = Mesh(device=torch.device("cpu"))
    open_data(make_translation(pairs, data=cut, train={"batch_tokens": 8}), mesh)
    assert "its longest pair has 8 tokens" in refusal(
        make_translation(pairs, data=cut, train={"batch_tokens": 7})
    )


def test_labelled_samples_and_pairs_are_told_apart(pairs: Path, tmp_path: Path) -> None:
    task = {"kind": "pair", "num_classes": 2}
    config = make_config(pairs, data={"tokenizer": f"{pairs}/joint.model"}, task=task)
    with pytest.raises(DataError, match="holds pairs of sentences, but the config has no encoder"):
        open_sources(config, config.data.train, load_tokenizer(pairs / "joint.model"))
