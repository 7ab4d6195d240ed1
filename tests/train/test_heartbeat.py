"""Heartbeats: whatever takes long sends them, so that silence means a hang."""

import json
import re
from typing import Any
from unittest import mock

import pytest
from support.configs import make_config

from megarecur.config.load import validate
from megarecur.errors import ConfigError
from megarecur.launch.folder import read_beat
from megarecur.launch.profile import ClusterProfile as Profile
from megarecur.train import heartbeat
from megarecur.train.heartbeat import Heartbeat
from megarecur.train.trainer import FINISHED, train


@pytest.fixture
def beats(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, str]]:
    """(phase, step, detail) of every heartbeat, those that are left out for speed too."""
    found: list[tuple[str, int, str]] = []
    write, advance = Heartbeat._write, Heartbeat.advance

    def note_advance(self: Heartbeat, phase: str, detail: str) -> None:
        """Also those of what goes on in the background."""
        if phase != self.phase:
            found.append((f"background {phase}", self.step, detail))
        advance(self, phase, detail)

    monkeypatch.setattr(Heartbeat, "advance", note_advance)

    def note(self: Heartbeat, detail: str, at_once: bool) -> None:
        found.append((self.phase, self.step, detail))
        write(self, detail, at_once)

    monkeypatch.setattr(Heartbeat, "_write", note)
    return found


def test_everything_that_takes_long_sends_heartbeats(corpus, tmp_path, beats) -> None:
    config = make_config(
        corpus, run_dir=str(tmp_path / "run"), data={"seq_length": 16},
        train={"steps": 4, "eval_every": 2, "eval_samples": 5, "micro_batch_size": 2,
               "sample_prompts": ["def"], "sample_tokens": 3, "eval_final": 7},
        checkpoint={"every": 2, "mirror": str(tmp_path / "mirror"), "asynchronous": False},
    )  # fmt: skip
    assert train(config) == FINISHED
    assert [phase for phase, _, _ in beats][:3] == ["start"] * 3
    assert [step for phase, step, detail in beats if phase == "train" and not detail] == [
        0,
        1,
        2,
        3,
    ]
    # Every batch of every evaluation: 5 samples, then 7 of the last one, in batches of two.
    batches = [(step, detail.partition(": ")[2]) for phase, step, detail in beats
               if phase == "evaluate" and ": batch" in detail]  # fmt: skip
    assert batches == [(2, f"batch {n} of 3") for n in (1, 2, 3)] + [
        (4, f"batch {n} of 4") for n in (1, 2, 3, 4)
    ]
    assert all(str(corpus / "val") in d for p, _, d in beats if p == "evaluate" and "batch" in d)
    assert any("prompt 1 of 1" in detail for phase, _, detail in beats if phase == "evaluate")
    saved = [detail for phase, step, detail in beats if phase.endswith("save") and step == 4]
    assert any(re.fullmatch(r"rank-00000\.safetensors, \d+ of \d+ bytes", d) for d in saved)
    assert any(f"copying step-00000004 to {tmp_path / 'mirror'}" in detail for detail in saved)
    beat = read_beat(tmp_path / "run")
    assert beat is not None and (beat.phase, beat.step) == ("done", 4)

    beats.clear()
    assert train(config.model_copy(update={"run_dir": str(tmp_path / "other")})) == FINISHED
    started = [detail for phase, _, detail in beats if phase == "start"]
    assert started[0] == "health check"
    beats.clear()
    assert train(config) == FINISHED
    assert any(f"loading {tmp_path}" in detail for phase, _, detail in beats if phase == "start")


def test_the_last_evaluation_reads_all_unless_told_otherwise(corpus, tmp_path, beats) -> None:
    def last_batches(**train_section: Any) -> int:
        beats.clear()
        config = make_config(
            corpus, run_dir=str(tmp_path / str(len(list(tmp_path.iterdir())))),
            train={"steps": 1, "eval_samples": 2, **train_section},
        )  # fmt: skip
        assert train(config) == FINISHED
        return sum(": batch" in detail for phase, _, detail in beats if phase == "evaluate")

    whole = last_batches()
    assert whole > 4 and last_batches(eval_final="all") == whole
    assert last_batches(eval_final=3) == 2
    assert last_batches(eval_final=10**6) == whole
    for wrong in (0, "some", -1):
        values = make_config(corpus).model_dump(mode="json")
        values["train"]["eval_final"] = wrong
        with pytest.raises(ConfigError, match=r"train\.eval_final"):
            validate(values, "test")


def test_a_phase_in_the_background_says_nothing_for_the_one_in_front(tmp_path) -> None:
    beat = Heartbeat(tmp_path, speaks=True)
    beat.enter("evaluate", 7)
    beat.advance("save", "a file")
    assert read_beat(tmp_path).detail == ""
    beat._next = 0.0
    beat.note("evaluate", "val: ")("batch 3 of 80")
    found = read_beat(tmp_path)
    assert found.doing == "evaluation at step 7 (val: batch 3 of 80)"
    assert set(json.loads((tmp_path / "heartbeat.json").read_text())) == {
        "time", "step", "phase", "detail",
    }  # fmt: skip
    silent = Heartbeat(tmp_path / "other", speaks=False)
    silent.enter("train", 1)
    assert not (tmp_path / "other").exists()


def test_steps_are_written_as_often_as_is_cheap_or_each_where_one_has_failed(tmp_path) -> None:
    written: list[int] = []
    clock = iter(range(10**6))
    with (
        mock.patch.object(heartbeat, "replace_file", lambda *_, durable: written.append(1)),
        mock.patch.object(heartbeat.time, "monotonic", lambda: float(next(clock))),
    ):
        quick = Heartbeat(tmp_path, speaks=True)
        for step in range(50):
            quick.enter("train", step)
        few, written[:] = len(written), []
        with mock.patch.dict("os.environ", {heartbeat.EVERY_STEP: "1"}):
            exact = Heartbeat(tmp_path, speaks=True)
        for step in range(50):
            exact.enter("train", step)
    assert 1 < few < 50 == len(written)


def test_each_phase_has_its_own_limit() -> None:
    profile = Profile(
        stall_seconds=1, stall_factor=3, start_seconds=2, evaluate_seconds=4, checkpoint_seconds=8
    )
    assert profile.stall_limit("train", 5.0) == ("stall_seconds", 15.0)
    assert profile.stall_limit("train", 0.1) == ("stall_seconds", 1.0)
    assert profile.stall_limit("train", None) == ("start_seconds", 2.0)
    assert profile.stall_limit("start", 5.0) == ("start_seconds", 2.0)
    assert profile.stall_limit("evaluate", 5.0) == ("evaluate_seconds", 4.0)
    assert profile.stall_limit("save", None) == ("checkpoint_seconds", 8.0)
