"""Scores on tasks of lm-evaluation-harness during training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.configs import make_config
from support.harness import World

from megarecur.config.run import Config
from megarecur.errors import ConfigError
from megarecur.train.metrics import read_rows
from megarecur.train.trainer import train

LOOP = {"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": 2}


def test_tasks_score_a_run_during_training(
    world: Callable[[int], World], corpus: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    rows = [{"text": text} for text in ("one two three", "red green", "a dog ran")]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "lambada_openai.jsonl").write_text(text, encoding="utf-8")
    asked = {"tasks": ["lambada_openai"], "every": 2, "limit": 2, "tasks_from": str(tmp_path)}

    def make(folder: str, steps: int, **more: object) -> Config:
        return make_config(
            corpus, recurrence=LOOP, run_dir=str(tmp_path / folder),
            train={"steps": steps, "eval_tasks": {**asked, **more}},
        )  # fmt: skip

    def read(folder: str) -> list[dict[str, float]]:
        found = read_rows(tmp_path / folder / "metrics.jsonl")
        return [row for row in found if any(key.startswith("task/") for key in row)]

    def run(steps: int, **more: object) -> list[dict[str, float]]:
        assert train(make("run", steps, **more)) == 0
        return read("run")

    scored = run(3)
    # The scores of the last step are those of the command, on the checkpoint of that step.
    from megarecur.launch.tasks import score_run_on_tasks

    wanted = score_run_on_tasks(tmp_path / "run", "lambada_openai", folder=tmp_path, limit=2)
    assert [row["step"] for row in scored] == [2, 3]
    for row in wanted:
        assert scored[-1][f"task/lambada_openai/{row['metric']}"] == row["value"]
    assert world(2).run(train, make("two", 2)) == [0, 0]
    (row,) = read("two")
    for key in (key for key in row if key.startswith("task/")):
        assert row[key] == pytest.approx(scored[0][key], rel=1e-4)
    # A finished run is not scored again; one that goes on is.
    assert [row["step"] for row in run(3)] == [2, 3]
    assert [row["step"] for row in run(4)] == [2, 3, 4]
    with pytest.raises(ConfigError, match=r"piqa\.jsonl.*no such file"):
        run(5, tasks=["piqa"])
