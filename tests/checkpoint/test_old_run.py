"""Resume a run that commit 3751331 wrote: `old_run/README.md` says how it was made."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megarecur.checkpoint import checkpoint
from megarecur.config.load import load_config
from megarecur.data.open import with_vocab_size
from megarecur.optim.build import build_engine
from megarecur.parallel.mesh import Mesh
from megarecur.plan.schedule import Schedules
from megarecur.train.metrics import read_rows
from megarecur.train.step import build_model
from megarecur.train.trainer import FINISHED, train

LOSSES = {4: 5.5496416091918945, 5: 5.121098041534424, 6: 5.408775329589844}
"""Of the steps that the commit took when it resumed the run."""


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, whose paths are relative to it."""
    folder = tmp_path / "old"
    shutil.copytree(Path(__file__).parent / "old_run", folder)
    monkeypatch.chdir(folder)
    return folder


def test_its_resolved_config_loads_as_it_was(old_run: Path) -> None:
    resolved, written = load_config("run/config.yaml"), load_config("config.yaml")
    assert resolved.model_copy(update={"train": written.train}) == with_vocab_size(written, 257)


def test_its_tensors_are_read_bit_for_bit(old_run: Path) -> None:
    config = with_vocab_size(load_config("config.yaml"), 257)
    path = old_run / "run/checkpoints/step-00000003"
    engine = build_engine(build_model(config, Mesh(), Schedules(config)), config, Mesh())
    shards = engine.shards()
    checkpoint.load(path, shards)
    engine.load(shards)
    written = load_file(path / "rank-00000.safetensors")
    found = {name: shard.chunks[0][2] for name, shard in engine.shards().items()}
    assert found.keys() == written.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.view_as(written[name]), written[name]), name


def test_it_resumes_with_the_losses_that_the_commit_got(old_run: Path) -> None:
    """Bits of sums depend on the CPU; a state that is wrong anywhere shows far above 1e-6."""
    assert train(load_config("config.yaml")) == FINISHED
    rows = read_rows(old_run / "run/metrics.jsonl")
    losses = {row["step"]: row["train/loss"] for row in rows if row["step"] in LOSSES}
    assert losses == pytest.approx(LOSSES, rel=1e-6)
