"""Reports of ranks in phases that take long: when they are written, and who is called behind."""

from __future__ import annotations

import json
import time
from pathlib import Path
from unittest import mock

import torch

from megarecur.checkpoint.checkpoint import write
from megarecur.launch.folder import Beat
from megarecur.launch.waiting import describe_waiting, read_reports
from megarecur.parallel.mesh import Mesh
from megarecur.parallel.shards import whole
from megarecur.progress import REPORTS, WAITING
from megarecur.train import waiting
from megarecur.train.heartbeat import Heartbeat
from megarecur.train.waiting import LONG_SECONDS, RankReport, reporting_long_phases


def report_of(run: Path, rank: int, phase: str, *details: str, world: int = 4) -> RankReport:
    """Write the report of a rank that has been in a phase of step 7 for a minute."""
    beat = Heartbeat(run, speaks=False)
    beat.enter(phase, 7)
    for detail in details:
        beat.advance(phase, detail)
    report = RankReport(beat, run, Mesh(world, rank=rank))
    report.look(beat.since + 60)
    return report


def tell(run: Path, phase: str, began: float = 0.0) -> str:
    return describe_waiting(read_reports(run, Beat(time.time(), 7, phase), began))


def test_only_a_long_phase_is_reported_and_ever_more_rarely(tmp_path) -> None:
    beat = Heartbeat(tmp_path, speaks=False)
    report = RankReport(beat, tmp_path, Mesh(4, rank=2))
    file = tmp_path / REPORTS / "rank-00002.json"
    beat.enter("evaluate", 7)
    beat.since = 1000.0
    report.look(beat.since + LONG_SECONDS - 1)
    assert not file.parent.exists()
    times = []
    for seconds in range(30, 1500, 5):
        file.unlink(missing_ok=True)
        report.look(beat.since + seconds)
        if file.exists():
            times.append(seconds)
            found = json.loads(file.read_text())
            assert (found["rank"], found["world"], found["phase"], found["step"]) == (
                2, 4, "evaluate", 7,
            )  # fmt: skip
    assert times == [30, 60, 120, 240, 480, 780, 1080, 1380]
    file.touch()
    beat.enter("train", 8)
    report.look(beat.since + 1000)
    assert not file.exists(), "training has its own watch"


def test_the_rank_that_others_wait_for_is_named(tmp_path) -> None:
    assert tell(tmp_path, "save") == ""
    for rank in (0, 1, 3):
        report_of(tmp_path, rank, "save", f"rank-0000{rank}.safetensors, 9 of 9 bytes", WAITING)
    with mock.patch.object(waiting, "node_name", lambda: "vn2"):
        report_of(tmp_path, 2, "save", "rank-00002.safetensors, 5 of 9 bytes")
    text = tell(tmp_path, "save")
    assert text.startswith("over 60 s in this phase: rank 2 on vn2 is behind (rank-00002.saf")
    assert text.endswith("; ranks 0-1, 3 wait")
    assert tell(tmp_path, "evaluate") == "", "reports of another phase"
    assert tell(tmp_path, "save", time.time() + 9) == "", "reports of an earlier attempt"
    (tmp_path / REPORTS / "rank-00001.json").write_text('{"rank": 1')
    assert "rank 1 sent no report, and may hang or be past it; ranks 0, 3 wait" in tell(
        tmp_path, "save"
    )


def test_a_rank_that_has_written_its_part_of_a_checkpoint_waits(tmp_path) -> None:
    notes: list[str] = []
    write(tmp_path, 1, {"a": whole(torch.zeros(2))}, {}, note=notes.append)
    assert notes[-1] == WAITING and len(notes) > 1


def test_where_none_waits_the_one_with_the_least_progress_is_behind(tmp_path) -> None:
    for rank in range(4):
        details = [f"val: batch {k} of 9" for k in range(1, 3 if rank == 1 else 4)]
        report_of(tmp_path, rank, "evaluate", *details)
    assert "rank 1 on" in (text := tell(tmp_path, "evaluate"))
    assert "is behind (val: batch 2 of 9)" in text and "rank 0" not in text
    report_of(tmp_path, 1, "evaluate", *[f"val: batch {k} of 9" for k in (1, 2, 3)])
    assert tell(tmp_path, "evaluate").endswith("ranks 0-3 are equally far")


def test_progress_in_the_background_is_kept_for_the_phase(tmp_path) -> None:
    beat = Heartbeat(tmp_path, speaks=False)
    beat.enter("train", 6)
    beat.advance("save", WAITING)
    beat.enter("save", 7)
    assert beat.detail == WAITING and beat.count == 0


def test_the_thread_writes_and_cleans_up(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(waiting, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(waiting, "LONG_SECONDS", 0.02)
    beat = Heartbeat(tmp_path, speaks=False)
    beat.enter("start", 0, "health check")
    with reporting_long_phases(beat, tmp_path, Mesh(2, rank=1)):
        file = tmp_path / REPORTS / "rank-00001.json"
        deadline = time.monotonic() + 100
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert json.loads(file.read_text())["detail"] == "health check"
    assert not file.exists()
