"""Boundaries of documents: counted, selected, cut, and those of the loader; and the choice of a
backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import make_config
from support.models import SCHEMES, make_batch, make_model_config, run
from torch import Tensor

from megarecur.attention.documents import Boundaries, count_boundaries, from_lengths, whole_samples
from megarecur.attention.plan import choose_backend, describe_choices
from megarecur.config.run import Config
from megarecur.data.open import open_data
from megarecur.errors import ConfigError
from megarecur.parallel.mesh import Mesh


def assert_same(found: Boundaries, expected: Boundaries) -> None:
    assert torch.equal(found.cu_seqlens, expected.cu_seqlens)
    assert torch.equal(found.on_device, expected.on_device)
    for name in ("longest", "batch", "length", "count"):
        assert getattr(found, name) == getattr(expected, name), name


@st.composite
def documents(draw: st.DrawFn) -> Tensor:
    """Document numbers, padding at the end."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    rows = []
    for _ in range(batch):
        begins = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        numbers = np.cumsum(begins)
        numbers[length - draw(st.integers(0, length)) :] = -1
        rows.append(numbers)
    return torch.tensor(np.stack(rows))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(documents_BS=documents(), chosen=st.data())
def test_parts_of_boundaries_are_those_of_the_parts(documents_BS: Tensor, chosen) -> None:
    found = count_boundaries(documents_BS)
    batch, length = documents_BS.shape
    lengths = [len(list(run)) for row in documents_BS.tolist() for run in runs(row)]
    assert np.diff(found.edges).tolist() == lengths and found.longest == max(lengths)
    assert len(found.cu_seqlens) == batch * length + 1
    start = chosen.draw(st.integers(0, length - 1))
    stop = chosen.draw(st.integers(start + 1, length))
    assert_same(found.narrow(start, stop), count_boundaries(documents_BS[:, start:stop]))
    spans = [slice(first, first + stop) for first in range(0, length, stop)]
    pieces = [
        len(list(run)) for row in documents_BS.tolist() for span in spans for run in runs(row[span])
    ]
    assert found.lengths_within(stop).tolist() == pieces
    rows = torch.tensor(chosen.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=5)))
    assert_same(found.select(rows), count_boundaries(documents_BS[rows]))


def runs(row: list[int]) -> list[list[int]]:
    """Cut a row into runs of equal numbers."""
    cut: list[list[int]] = []
    for number in row:
        if not cut or cut[-1][-1] != number:
            cut.append([])
        cut[-1].append(number)
    return cut


def test_whole_samples_are_one_document_each() -> None:
    found = whole_samples(3, 5, torch.device("cpu"))
    assert_same(found, from_lengths(np.array([5, 5, 5]), 3, 5))
    assert_same(found, count_boundaries(torch.zeros(3, 5)))


def test_micro_batches_carry_their_boundaries(corpus) -> None:
    """On the CPU, and with their device's copy after a move; of single documents too."""
    singles = set()
    for seq_length in (8, 64):
        config = make_config(corpus, "dense", data={"seq_length": seq_length})
        data = open_data(config, Mesh())
        for step in range(6):
            for batch in data.loader.batch(step):
                assert batch.boundaries is not None
                assert_same(batch.boundaries, count_boundaries(batch.documents_BS))
                assert_same(batch.to("cpu").boundaries, batch.boundaries)
                singles.add(batch.single_document)
                assert batch.single_document == (batch.boundaries.count == len(batch.tokens_BS))
        data.close()
    assert singles == {True, False}


# ------------------------------------------------------------------------------------------- choice


def config_of(precision: str = "bf16", attention: str = "auto", **model: object) -> Config:
    config = make_model_config(SCHEMES["cycle"], precision, hidden_size=32, **model)
    train = config.train.model_copy(update={"attention": attention})
    return config.model_copy(update={"train": train})


@pytest.mark.parametrize(
    ("device", "config", "backend", "reason"),
    [
        ("cpu", config_of(), "segments", "the fastest on cpu"),
        ("cuda", config_of(), "varlen", "the fastest on cuda"),
        ("cuda", config_of("fp32"), "flex", "not varlen: its kernel needs train.precision=bf16"),
        ("cuda", config_of("fp64"), "segments", "not flex: it has no train.precision=fp64"),
        ("cuda", config_of(attention_softcap=2.0), "flex", "it has no softcap"),
        ("cuda", config_of(positions="alibi"), "flex", "model.positions=alibi"),
        ("cuda", config_of(head_dim=12), "flex", "a head_dim that 8 divides, at most 256, not 12"),
        ("cuda", config_of(attention_dropout=0.1), "segments", "scores are computed in PyTorch"),
        ("cpu", config_of(attention_dropout=0.1), "segments", "attention_dropout=0.1 in PyTorch"),
        ("cpu", config_of(attention="dense"), "dense", "as train.attention=dense"),
    ],
)  # fmt: skip
def test_the_choice_follows_from_config_and_device(device, config, backend, reason) -> None:
    choice = choose_backend(config, device)
    assert choice.backend == backend and reason in choice.reason, choice
    assert choice.describe().startswith(f"attention: {backend} (")


def test_what_a_device_cannot_run_is_refused() -> None:
    for name in ("varlen", "flex"):
        with pytest.raises(ConfigError, match=f"train.attention={name}: it needs a GPU"):
            choose_backend(config_of(attention=name), "cpu")
    with pytest.raises(ConfigError, match=r"flex: it has no dropout.*set attention to auto"):
        choose_backend(config_of(attention="flex", attention_dropout=0.1), "cuda")
    lines = describe_choices(config_of())
    assert [line.split()[0] for line in lines] == ["segments", "varlen"]
    assert len(describe_choices(config_of(attention="varlen"))) == 1


HALTING = {"kind": "universal", "depth": 3, "halting": {"mode": "token"}}


@pytest.mark.parametrize("recurrence", [SCHEMES["cycle"], HALTING], ids=["cycle", "halting"])
@pytest.mark.parametrize(
    "model",
    [{}, {"positions": "alibi"}, {"attention_dropout": 0.2},
     {"attention_types": ["sliding", "full"], "sliding_window": 3, "attention_softcap": 2.0}],
    ids=str,
)  # fmt: skip
def test_models_equal_their_dense_twins(recurrence: dict, model: dict) -> None:
    """Loss, logits and gradients of packed and padded documents, in training."""
    batch = make_batch(3, 11)
    numbers = torch.tensor([[0] * 4 + [1] * 6 + [2], [0] * 11, [0] * 2 + [1] * 5 + [-1] * 4])
    first = (numbers[:, :, None] == numbers[:, None, :]).long().argmax(-1)
    batch.documents_BS, batch.positions_BS = numbers, torch.arange(11) - first
    batch.single_document = False
    batch.labels_BS = batch.labels_BS.masked_fill(numbers < 0, -100)
    config = make_model_config(recurrence, "fp64", num_kv_heads=2, **model)
    found = []
    for attention in ("auto", "dense"):
        train = config.train.model_copy(update={"attention": attention})
        twin = config.model_copy(update={"train": train})
        found.append(run(twin, batch, training=True))
    assert found[0][0].isfinite() and torch.allclose(found[0][0], found[1][0], rtol=1e-12)
    assert torch.allclose(found[0][1][numbers >= 0], found[1][1][numbers >= 0], rtol=1e-10)
    for name, gradient in found[1][2].items():
        assert (found[0][2][name] - gradient).norm() <= 1e-11 * max(gradient.norm(), 1e-3), name
