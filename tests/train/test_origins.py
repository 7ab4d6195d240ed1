"""The first lines of a run, and `megarecur status`, say which run it is and where it comes from."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from support.configs import make_config

from megarecur.config.load import to_yaml
from megarecur.launch.cli import main


def call(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    """The lines that a command prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["megarecur", *map(str, words)])
        try:
            main()
        except SystemExit as ended:
            assert ended.code == 0, capsys.readouterr().err
    return capsys.readouterr().out.splitlines()


def read_id(run: Path) -> str:
    return str(json.loads((run / "identity.json").read_text())["run"])


def test_a_run_says_which_one_it_is_and_where_it_comes_from(corpus, tmp_path, capsys) -> None:
    (tmp_path / "config.yaml").write_text(
        to_yaml(make_config(corpus, data={"val": []}, train={"steps": 1, "log_every": 1}))
    )

    def train(run: Path, *more: str) -> str:
        """The line about the run, which comes before the first step."""
        lines = call(capsys, "train", tmp_path / "config.yaml", f"run_dir={run}", *more)
        first = next(i for i, line in enumerate(lines) if line.startswith("step "))
        (line,) = [line for line in lines[:first] if line.startswith("run ")]
        return line

    first, second, copy = tmp_path / "first", tmp_path / "second", tmp_path / "copy"
    assert train(first) == f"run first (ID {read_id(first)}) starts"
    source = f"step 1 of run first (ID {read_id(first)}), {first}/checkpoints/step-00000001"
    said = train(second, f"init_from={first}")
    assert said == f"run second (ID {read_id(second)}) starts from the parameters of {source}"
    said = train(second, f"init_from={first}", "train.steps=2")
    assert said.startswith(f"run second (ID {read_id(second)}) resumes at step 1, from {second}/")
    told = call(capsys, "status", second)
    assert told[:2] == [f"run: {second} (ID {read_id(second)})", f"source: {source}"]
    shutil.copytree(second, copy)
    said = train(copy, f"init_from={first}", "train.steps=3")
    assert said.startswith(f"run copy (ID {read_id(second)}) resumes at step 2")
    assert said.endswith(f"; {copy} is a copy of {second}: now ID {read_id(copy)}")
    told = call(capsys, "status", copy)
    assert told[:2] == [
        f"run: {copy} (ID {read_id(copy)})",
        f"source: copied from {second} (run {read_id(second)})",
    ]
