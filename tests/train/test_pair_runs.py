"""Runs of encoder-decoders on a corpus of sentence pairs: resumed, on ranks, scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.meshes import later
from support.pairs import pair_config
from support.sentences import write_pair_corpus

from megarecur.checkpoint.load import load_model
from megarecur.config.run import Config
from megarecur.data.open import open_data
from megarecur.data.pairs import PairCorpus
from megarecur.errors import DataError
from megarecur.launch.configs import see_corpora
from megarecur.parallel.mesh import Mesh
from megarecur.train.metrics import read_rows
from megarecur.train.trainer import FINISHED, train

CYCLE = {"kind": "cycle", "num_blocks": 2, "depth": 4}
UNIFORM = {"sampler": "uniform", "min": 1, "max": 3}
LOOP = {"kind": "loop", "prelude": 1, "core": 1, "coda": 0, "num_loops": UNIFORM}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair_corpus(tmp_path_factory.mktemp("pairs") / "pairs", count=120, num_val=20)


def make(pairs: Path, run_dir: Path, steps: int, eval_bleu: int = 4, **sections: Any) -> Config:
    return pair_config(
        CYCLE, LOOP, "fp32", run_dir=str(run_dir),
        model={"vocab_size": None, "dropout": 0.1, "init_std": 0.02} | sections.pop("model", {}),
        data={"train": [{"path": str(pairs / "train")}], "val": [{"path": str(pairs / "val")}],
              "tokenizer": str(pairs / "joint.model"), "seq_length": 48},
        objective={"label_smoothing": 0.1},
        train={"steps": steps, "global_batch_size": 2, "batch_tokens": 400, "log_every": 1,
               "eval_bleu": eval_bleu, "eval_every": 0},
        checkpoint={"every": 3, "keep_last": 4},
        **sections,
    )  # fmt: skip


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    rows = read_rows(run_dir / "metrics.jsonl")
    return [
        {k: v for k, v in row.items() if not k.startswith(("speed/", "memory/"))} for row in rows
    ]


def test_a_run_resumes_in_the_middle_of_an_epoch(pairs: Path, tmp_path: Path) -> None:
    """Bit for bit: batches, drawn depths, dropout and moments."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(make(pairs, whole, 8)) == FINISHED
    for steps in (3, 8):
        assert train(make(pairs, parts, steps)) == FINISHED
    expected, found = rows_of(whole), rows_of(parts)
    last = [row for row in found if row["step"] == 8]
    assert last == [row for row in expected if row["step"] == 8]
    (one, _), (other, _) = load_model(whole), load_model(parts)
    for name, parameter in one.parameters_by_name.items():
        assert torch.equal(other.parameters_by_name[name], parameter), name
    values: dict[str, float] = {}
    for row in expected:
        values |= row
    assert {"train/loss", "train/smoothed_loss", "val/loss", "val/bleu"} <= values.keys()
    assert {"recurrence/num_loops", "recurrence/residual_norm/00.00"} <= values.keys()
    assert values["train/smoothed_loss"] > values["train/loss"] * 0.5


def train_on_ranks(pairs: str, run_dir: str, parallel: dict[str, Any]) -> bool:
    eval_bleu = 0 if "pipeline" in parallel else 4
    config = make(Path(pairs), Path(run_dir), 4, eval_bleu, parallel=parallel)
    return train(config) == FINISHED and dist.get_world_size() == 2


@pytest.mark.parametrize("parallel", [later({}), {"pipeline": 2}, {"tensor": 2}])
def test_two_ranks_train_as_one_does(
    pairs: Path, tmp_path: Path, world: Any, parallel: dict[str, Any]
) -> None:
    """The same batches, losses and scores, on replicas, pipeline and tensor ranks."""
    assert train(make(pairs, tmp_path / "one", 4)) == FINISHED
    run = str(tmp_path / "two")
    assert all(world(2).run(train_on_ranks, str(pairs), run, parallel))
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for expected, found in zip(one, two, strict=True):
        assert expected.keys() - found.keys() <= {"val/bleu"}
        for key, value in expected.items():
            if key == "val/bleu" and "pipeline" in parallel:
                continue
            assert found[key] == pytest.approx(value, rel=2e-4, abs=1e-6), key


def test_check_reads_the_lengths_of_pairs(pairs: Path, tmp_path: Path) -> None:
    config = make(pairs, tmp_path, 1)
    corpus = PairCorpus(pairs / "train")
    source, target = corpus.lengths_P2.T
    seen = see_corpora(config)
    assert seen is not None
    assert seen.cross == pytest.approx((source * target).sum() / target.sum())
    assert seen.encoder == pytest.approx((source**2).sum() / target.sum())
    assert seen.source_share == pytest.approx(source.sum() / target.sum())
    assert seen.full == pytest.approx((target * (target + 1) / 2).sum() / target.sum())


def test_an_embedding_of_sources_has_a_row_for_every_id(pairs: Path, tmp_path: Path) -> None:
    config = make(pairs, tmp_path, 1, model={"tie": "none", "source_vocab_size": 3})
    assert config.model.vocab_size is None
    with pytest.raises(DataError, match="source_vocab_size=3 is below the 330 ids"):
        open_data(config, Mesh())
