"""A run folder works from any directory, and after it or all around it has moved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.configs import TEXT, make_config
from typer.testing import CliRunner

from megarecur.checkpoint.load import open_run_folder, open_tokenizer
from megarecur.config.load import load_config
from megarecur.data_prep.readers import Reading
from megarecur.data_prep.shards import prepare_shards
from megarecur.data_prep.tokenizer import train_tokenizer
from megarecur.errors import CheckpointError, ConfigError
from megarecur.launch.cli import app
from megarecur.train.trainer import FINISHED, train


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with corpora, a tokenizer and a run that knows them by relative paths."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    Path("text.txt").write_text(TEXT)
    Path("data").mkdir()
    train_tokenizer([Path("text.txt")], Path("own.model"), vocab_size=400)
    reading = Reading(text_split="blank_line")
    prepare_shards(["text.txt"], "data", "own.model", reading, val_fraction=0.1, workers=1)
    config = make_config(
        "data", run_dir="runs/a", data={"tokenizer": "own.model"},
        train={"steps": 2, "global_batch_size": 2}, checkpoint={"every": 1},
    )  # fmt: skip
    assert train(config) == FINISHED
    return home


def use(run: Path, out: Path) -> None:
    """Every command that reads a run, and one more step of training."""
    for command in (
        ["eval", str(run), "--samples", "2"],
        ["generate", str(run), "str", "--max-new-tokens", "2"],
        ["export", str(run), "--to", "hf", str(out)],
        ["plot", str(run)],
    ):
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        assert result.exit_code == 0, (command, result.output)
    assert (out / "tokenizer.json").is_file()
    steps = open_run_folder(run).state["step"] + 1
    resumed = load_config(run / "config.yaml", [f"train.steps={steps}"])
    assert Path(resumed.run_dir).resolve() == run.resolve()
    assert train(resumed) == FINISHED
    assert open_run_folder(run).state["step"] == steps


def test_from_any_directory_and_moved(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From elsewhere; renamed; moved away from its corpora; moved with them, the old place gone."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    # What is called the same here is something else.
    shutil.copytree(project / "data/val", elsewhere / "data/val")
    manifest = elsewhere / "data/val/manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    run = project / "runs/a"
    use(run, elsewhere / "out1")
    run = run.rename(project / "runs/b")
    use(run, elsewhere / "out2")
    run = Path(shutil.move(run, elsewhere / "moved"))
    use(run, elsewhere / "out3")
    shutil.move(run, project / "runs/a")
    monkeypatch.chdir(project)
    use(Path("runs/a"), elsewhere / "out4")
    monkeypatch.chdir(tmp_path)
    project = project.rename(tmp_path / "new home")
    use(project / "runs/a", elsewhere / "out5")


def test_a_changed_tokenizer_and_a_damaged_record_are_named(project: Path) -> None:
    """Neither is used in silence."""
    run = project / "runs/a"
    train_tokenizer([Path("text.txt")], run / "own.model", vocab_size=390)
    with pytest.raises(CheckpointError, match=r"own\.model has fingerprint"):
        open_tokenizer(open_run_folder(run))
    (run / "origin.json").write_text(json.dumps({"workdir": "/"}))
    with pytest.raises(ConfigError, match=r"origin\.json: is damaged"):
        load_config(run / "config.yaml")
