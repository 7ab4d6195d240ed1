"""Divergence: what raises an alarm, and what is then done, on real runs over a damaged corpus."""

import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support.configs import TEXT, make_config
from support.harness import World
from support.runs import weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megarecur import files
from megarecur.checkpoint import checkpoint
from megarecur.config.run import Config
from megarecur.config.train import AlarmConfig
from megarecur.data_prep.readers import Reading
from megarecur.data_prep.shards import prepare_shards
from megarecur.errors import ConfigError
from megarecur.train.alarms import Alarms
from megarecur.train.metrics import read_rows
from megarecur.train.trainer import DIVERGED, FINISHED, read_batches, train

BATCH_TOKENS = 8 * 32
BAD_STEP = 22
"""The optimizer step (counted from 1) whose samples are noise."""


def row(step: int, loss: float | None, residual: float | None = 1.0, skipped: int = 0) -> Any:
    """One log step, as training writes it."""
    return {
        "step": step,
        "train/loss": loss,
        "optim/skipped": skipped,
        "recurrence/residual_norm/00.00": residual,
    }


def after_history(**config: Any) -> Alarms:
    """Alarms after twenty steps whose loss falls from 4 to 2."""
    rows = [row(i, 4 - i / 10, 1 + i / 20) for i in range(20)]
    return Alarms(AlarmConfig(**config), rows)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (row(21, 9.0), "train/loss is 9"),
        (row(21, math.nan), "train/loss is nan"),
        (row(21, 2.0, 30.0), "the residual norm is 30"),
        (row(21, 2.0, math.nan), "the residual norm is nan"),
        (row(21, 2.0, None), "the residual norm is nan"),
        (row(21, 2.0, 1.0, skipped=5), "5 gradients were not finite"),
        (row(21, 9.0, 30.0, skipped=5), "5 gradients"),
    ],
)
def test_what_is_out_of_the_ordinary_is_named(values: Any, text: str) -> None:
    alarms = after_history()
    reasons = alarms.check(21, values)
    assert any(text in reason for reason in reasons) and alarms.healthy_step == 19
    assert len(reasons) == (3 if "30" in str(values) and "9.0" in str(values) else 1)
    off = after_history(loss_spike=None, residual_growth=None, non_finite=None)
    assert off.check(21, values) == []


@pytest.mark.parametrize("values", [row(21, 2.0), row(21, 4.2), row(21, 0.1), row(21, 2.0, 5.0)])
def test_ordinary_steps_raise_nothing(values: Any) -> None:
    alarms = after_history()
    assert alarms.check(21, values) == [] and alarms.healthy_step == 21


def test_there_is_no_alarm_before_there_is_history() -> None:
    alarms = Alarms(AlarmConfig(), [row(i, 3.0) for i in range(9)])
    assert alarms.check(9, row(9, 50.0, 1000.0)) == []


def test_skipped_steps_count_from_the_last_log_step() -> None:
    alarms = Alarms(AlarmConfig(non_finite=2))
    assert [len(alarms.check(i, row(i, 2.0, skipped=n))) for i, n in enumerate((1, 2, 4, 5))] == [
        0, 0, 1, 0
    ]  # fmt: skip


def test_alarms_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"alarms\.action='rollback' is unknown; choose 'warn'"):
        make_config(alarms={"action": "rollback"})


# ------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text with one batch of noise in it, read in order."""
    folder = tmp_path_factory.mktemp("noisy")
    size, text = (BAD_STEP - 1) * BATCH_TOKENS, TEXT.encode("ascii", "ignore").decode()
    letters = random.Random(1)
    noise = "".join(chr(letters.randrange(1, 128)) for _ in range(BATCH_TOKENS - 2))
    source = folder / "text.txt"
    source.write_text(text[:size] + noise + text[size:], encoding="utf-8", newline="")
    prepare_shards([source], folder / "corpus", "bytes", Reading(), workers=1)
    return folder / "corpus"


def noisy_config(corpus: Path, run_dir: Path, **alarms: Any) -> Config:
    """A run that meets the noise at BAD_STEP, with a checkpoint every 5 steps."""
    return make_config(
        corpus, "loop", run_dir=str(run_dir),
        data={"train": [{"path": str(corpus / "train")}], "val": [], "shuffle": False},
        optimizer={"lr": 1e-2}, train={"steps": 30}, checkpoint={"every": 5, "keep_last": 9},
        alarms={"loss_spike": 4.0, "window": 10, **alarms},
    )  # fmt: skip


def events(run_dir: Path) -> list[dict[str, Any]]:
    """What was recorded."""
    path = run_dir / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_warning_changes_nothing(noisy, tmp_path) -> None:
    assert train(noisy_config(noisy, tmp_path / "warned")) == FINISHED
    (event,) = events(tmp_path / "warned")
    assert (event["step"], event["action"]) == (BAD_STEP, "warn")
    assert event["alarms"][0].startswith("train/loss is 7")
    assert train(noisy_config(noisy, tmp_path / "deaf", loss_spike=None)) == FINISHED
    assert not events(tmp_path / "deaf")
    assert weights(tmp_path / "warned", 30) == weights(tmp_path / "deaf", 30)


def test_stop_ends_the_run_unsaved(noisy, tmp_path) -> None:
    assert train(noisy_config(noisy, tmp_path / "run", action="stop")) == DIVERGED
    assert events(tmp_path / "run")[-1]["action"] == "stop"
    names = [path.name for path in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert names[-1] == "step-00000020"


def test_a_roll_back_skips_the_data_and_is_recorded(noisy, tmp_path) -> None:
    """Parameters of step 20, data and schedule of step 22; nothing read twice, no step twice."""
    config = noisy_config(noisy, tmp_path / "run", action="roll_back")
    assert train(config) == FINISHED
    (event,) = events(tmp_path / "run")
    assert (event["step"], event["action"], event["from"]) == (22, "roll_back", "step-00000020")
    root = tmp_path / "run" / "checkpoints"
    saved = checkpoint.read_state(root / "step-00000022")
    assert (saved["step"], saved["roll_backs"]) == (22, 1)
    assert saved["data"]["samples"] == 22 * 8
    assert weights(tmp_path / "run", 22) == weights(tmp_path / "run", 20)

    rows = [r for r in read_rows(tmp_path / "run" / "metrics.jsonl") if "train/loss" in r]
    assert [r["step"] for r in rows] == list(range(1, 31))
    assert [r["step"] for r in rows if r["alarms/raised"]] == [22]
    assert rows[-1]["tokens"] == 30 * BATCH_TOKENS
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("train/loss")] == list(range(1, 31))


def test_a_run_that_dies_after_a_roll_back_goes_on_behind_it(noisy, tmp_path) -> None:
    straight = noisy_config(noisy, tmp_path / "straight", action="roll_back")
    assert train(straight) == FINISHED
    for steps in (22, 30):
        config = noisy_config(noisy, tmp_path / "resumed", action="roll_back")
        limited = config.train.model_copy(update={"steps": steps})
        assert train(config.model_copy(update={"train": limited})) == FINISHED
    assert len(events(tmp_path / "resumed")) == 1
    assert weights(tmp_path / "resumed", 30) == weights(tmp_path / "straight", 30)


def die_after_rolling_back(config: Config) -> None:
    """Writing is slow, and the machine goes down at the step after."""

    def write_slowly(file: Any, data: Any, path: Any) -> None:
        time.sleep(0.01)
        written(file, data, path)

    def read(loader: Any, step: int, mesh: Any) -> Any:
        return os._exit(9) if step == BAD_STEP else read_batches(loader, step, mesh)

    written = files.write_all
    with (
        mock.patch.object(files, "write_all", write_slowly),
        mock.patch("megarecur.train.trainer.read_batches", read),
    ):
        train(config)


@pytest.mark.slow
def test_a_kill_right_after_a_roll_back_reads_nothing_twice(noisy, tmp_path) -> None:
    straight = noisy_config(noisy, tmp_path / "straight", action="roll_back")
    config = noisy_config(noisy, tmp_path / "killed", action="roll_back")
    world = World(1)
    world.submit(die_after_rolling_back, config)
    ((error, _),) = world.collect(timeout=600)
    assert "exit code 9" in error
    assert train(straight) == train(config) == FINISHED
    assert len(events(tmp_path / "killed")) == 1
    assert weights(tmp_path / "killed", 30) == weights(tmp_path / "straight", 30)


def test_what_was_rolled_back_to_stays_good_after_a_resume() -> None:
    rows = [row(step, 3.0) | {"step": step} for step in range(1, 22)]
    assert Alarms(AlarmConfig(), rows).healthy_step == 21
    assert Alarms(AlarmConfig(), rows, rolled_back_at=22).healthy_step == 22


@pytest.mark.parametrize(
    ("saving", "text"),
    [({"every": 0}, "set checkpoint.every"),
     ({"every": 5, "keep_last": 1}, "has nothing left from the log step before")],
)  # fmt: skip
def test_a_roll_back_that_cannot_be_is_refused(saving, text) -> None:
    sections = {"alarms": {"action": "roll_back"}, "train": {"log_every": 100, "steps": 500}}
    with pytest.raises(ConfigError, match=text):
        make_config(checkpoint=saving, **sections)
    make_config(checkpoint={"every": 5, "keep_last": 1, "keep_every": 50}, **sections)


def test_roll_backs_are_bounded_and_need_a_checkpoint(noisy, tmp_path) -> None:
    config = noisy_config(noisy, tmp_path / "run", action="roll_back")
    rare = config.checkpoint.model_copy(update={"every": 0})
    assert train(config.model_copy(update={"checkpoint": rare})) == DIVERGED
    assert "there is no checkpoint from before" in str(events(tmp_path / "run"))
    # A residual alarm at every log step from the tenth on.
    always = noisy_config(
        noisy, tmp_path / "always", action="roll_back", residual_growth=1e-3, max_roll_backs=2
    )
    assert train(always) == DIVERGED
    assert [e["action"] for e in events(tmp_path / "always")] == ["roll_back"] * 2 + ["stop"]
    assert "max_roll_backs=2 are used up" in str(events(tmp_path / "always")[-1])


def rolled_back_on_ranks(corpus: str, run_dir: str) -> int:
    """The same on every rank."""
    return train(noisy_config(Path(corpus), Path(run_dir), action="roll_back"))


def test_ranks_roll_back_together(noisy, tmp_path, world) -> None:
    codes = world(2).run(rolled_back_on_ranks, str(noisy), str(tmp_path / "run"))
    assert codes == [FINISHED, FINISHED]
    (event,) = events(tmp_path / "run")
    assert (event["step"], event["from"]) == (22, "step-00000020")
