"""FLOPs of attention: the pairs that causality, documents and windows leave."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from support.configs import make_config
from support.models import VOCABULARY
from support.pairs import DENSE, collate, make_pairs, objective, pair_config
from torch.utils.flop_counter import FlopCounterMode

from megarecur.attention.documents import from_lengths
from megarecur.config.run import Config
from megarecur.data.corpus import Manifest
from megarecur.data.loader import MicroBatch
from megarecur.launch.configs import measure_documents, see_corpora
from megarecur.model.transformer import Transformer
from megarecur.plan import cost
from megarecur.plan.cost import Seen, count_flops, count_pairs, count_seen, see_samples
from megarecur.recurrence.schemes import build_map
from megarecur.train.report import Report
from megarecur.train.step import count_keys

WINDOW = {"sliding_window": 4, "attention_types": ["sliding", "full"], "vocab_size": 96}


def make_batch(lengths: list[int], shape: tuple[int, int]) -> MicroBatch:
    """Zeros in documents of these lengths."""
    zeros = torch.zeros(shape, dtype=torch.int64)
    rows = torch.zeros(shape[0], dtype=torch.int64)
    return MicroBatch(
        zeros, zeros, zeros, zeros, rows, rows, False,
        boundaries=from_lengths(np.array(lengths), *shape),
    )  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 20])
def test_pairs_are_those_of_a_mask(causal: bool, window: int | None) -> None:
    for length in range(10):
        visible = sum(
            (not causal) or (k <= q and (window is None or k > q - window))
            for q in range(length)
            for k in range(length)
        )
        assert count_pairs(length, causal, window) == visible


def test_the_documents_of_batches_are_counted() -> None:
    config = make_config(scheme="dense", model=WINDOW, data={"seq_length": 16})
    whole = make_batch([16, 16], (2, 16))
    full, sliding, *of_pairs = count_keys(config, [whole])
    assert of_pairs == [0.0, 0.0, 0.0]
    assert (full, sliding) == (2 * count_pairs(16, True), 2 * count_pairs(16, True, 4))
    assert Seen(full / 32, sliding / 32) == see_samples(config)
    cut = make_batch([2, 5, 9, 16], (2, 16))
    assert count_keys(config, [whole, cut])[0] == pytest.approx(
        sum(count_pairs(n, True) for n in (16, 16, 2, 5, 9, 16))
    )
    assert count_keys(config, []) == (0.0,) * 5


def test_documents_of_equal_length_are_counted_once(monkeypatch) -> None:
    """A global batch may have 100,000 documents; Python runs for each length, not for each."""
    counted: list[int] = []

    def count(length: int, causal: bool, window: int | None = None) -> int:
        counted.append(length)
        return count_pairs(length, causal, window)

    monkeypatch.setattr(cost, "count_pairs", count)
    config = make_config(scheme="dense", model=WINDOW, data={"seq_length": 16})
    full, sliding, *_ = count_keys(config, [make_batch([5, 11] * 50, (50, 16))] * 3)
    assert full == pytest.approx(150 * (count_pairs(5, True) + count_pairs(11, True)))
    assert sliding == pytest.approx(150 * (count_pairs(5, True, 4) + count_pairs(11, True, 4)))
    assert sorted(counted) == [5, 5, 11, 11]


def test_pairs_of_sentences_are_counted() -> None:
    """The keys of the encoder, of cross-attention, and source tokens; padding where it computes."""
    config = pair_config(DENSE, DENSE)
    batch = collate(*make_pairs(3, seed=1))
    source = batch.source
    assert source is not None
    _, _, of_encoder, crossed, tokens = count_keys(config, [batch, batch])
    lengths = (source.documents_BS >= 0).sum(1).tolist()
    span, length = source.tokens_BS.shape[1], batch.tokens_BS.shape[1]
    assert of_encoder == 2 * sum(n * n + (span - n) ** 2 for n in lengths)
    assert crossed == 2 * length * sum(lengths) and tokens == 2 * 3 * span


def test_flops_of_pairs_are_those_that_torch_counts() -> None:
    """Of the products of one sentence pair; torch does not count a CPU's fused attention."""
    config = pair_config(DENSE, {"kind": "cycle", "num_blocks": 2, "depth": 4}, "fp32")
    (source,), (target,) = make_pairs(1, seed=2)
    model, batch = Transformer(config), collate([source], [target])
    length, span = len(target) - 1, len(source)
    with FlopCounterMode(display=False) as counter:
        objective(model, batch)
    seen = Seen(0.0, 0.0, 0.0, 0.0, span / length)
    found = count_flops(config, build_map(config), seen).forward * length
    head = 2 * config.model.hidden_size * VOCABULARY * length
    assert found == pytest.approx(counter.get_total_flops() - head, rel=1e-4)


def test_mfu_counts_what_the_batches_need() -> None:
    config = make_config(scheme="dense", model=WINDOW)
    report = Report.__new__(Report)
    report.config, report.flops, report.always, report.peak = config, {}, 0, 1e6
    seen, steps = Seen(7.5, 3.25), build_map(config)
    work = report.count_work([None], 10.0, seen)
    flops = count_flops(config, steps, seen).train
    assert work["speed/flops_per_token"] == pytest.approx(flops)
    assert work["speed/mfu"] == pytest.approx(flops * 10.0 / 1e6)
    heads = config.model.num_heads * config.model.head_dim
    slides = [config.model.slides(step.block) for step in steps]
    scores = sum(3 * 4 * heads * (seen.sliding if s else seen.full) for s in slides)
    none = count_flops(config, steps, Seen(0, 0)).train
    assert flops - none == pytest.approx(scores) and {*slides} == {True, False}


def write_corpus(path: Path, starts: list[int], tokens: int) -> None:
    path.mkdir()
    listed = {"bytes": 0, "xxh64": "0" * 16}
    manifest = Manifest(
        version=1, split="train", tokenizer="bytes", tokenizer_fingerprint="", vocab_size=96,
        eos_id=0, dtype="uint16", num_tokens=tokens, num_documents=len(starts), num_bytes=tokens,
        duplicates_removed=0, documents_skipped=0, preparation="", sources=[],
        files={"index.json": listed, "documents.npy": listed},
    )  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(asdict(manifest)))
    np.save(path / "documents.npy", np.array(starts, np.int64))


def test_check_and_plan_see_the_documents_of_corpora(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", [0, 3, 20], 40)
    write_corpus(tmp_path / "b", [0], 32)

    def config(**data: object) -> Config:
        sources = [{"path": str(tmp_path / "a"), "weight": 3}, {"path": str(tmp_path / "b")}]
        values = {"train": sources, "seq_length": 16, **data}
        return make_config(scheme="dense", model=WINDOW, data=values)

    assert list(measure_documents(tmp_path / "a", config())) == [3, 13, 4, 12, 8]
    assert list(measure_documents(tmp_path / "none", config())) == []
    of_a = count_seen(config(), [3, 13, 4, 12, 8])
    of_b = count_seen(config(), [16, 16])
    mean = Seen(*((3 * a + b) / 4 for a, b in zip(of_a, of_b, strict=True)))
    assert see_corpora(config()) == pytest.approx(mean)
    assert see_corpora(config(mask_documents=False)) is None
    assert see_corpora(config(train=[{"path": str(tmp_path / "none")}])) is None
