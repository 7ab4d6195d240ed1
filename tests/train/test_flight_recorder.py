"""The flight recorder and the memory snapshot, with torch's CUDA functions replaced."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from megarecur.config.train import ProfileConfig
from megarecur.launch import watchdog
from megarecur.parallel.mesh import Mesh
from megarecur.train import flight_recorder, signals
from megarecur.train.profile import Profiler

CUDA = torch.device("cuda")


def test_the_record_follows_the_stacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(flight_recorder, "find_dump", lambda: lambda: b"record")
    monkeypatch.setattr(flight_recorder, "POLL_SECONDS", 0.001)
    monkeypatch.setenv(signals.STACKS_VARIABLE, str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    stacks = tmp_path / "stacks-3.txt"
    stacks.touch()
    record = flight_recorder.watch_for_hangs(CUDA)
    assert record == tmp_path / "nccl-3.pickle" and record.read_bytes() == b""
    stacks.write_text("File ...")
    for thread in threading.enumerate():
        if thread.name.endswith("(write_after)"):
            thread.join(10)
    assert record.read_bytes() == b"record"


def test_nothing_is_recorded_without_cuda_or_a_watcher(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(signals.STACKS_VARIABLE, str(tmp_path))
    assert flight_recorder.watch_for_hangs(torch.device("cpu")) is None
    monkeypatch.setattr(flight_recorder, "find_dump", lambda: None)
    assert flight_recorder.watch_for_hangs(CUDA) is None, "a build of torch without NCCL"
    monkeypatch.setattr(flight_recorder, "find_dump", lambda: lambda: b"")
    monkeypatch.delenv(signals.STACKS_VARIABLE)
    assert flight_recorder.watch_for_hangs(CUDA) is None
    assert not list(tmp_path.iterdir())


def test_watchers_wait_for_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "stacks-0.txt").write_text("File ...")
    (tmp_path / "nccl-0.pickle").touch()
    monkeypatch.setattr(watchdog, "STACK_SECONDS", 0.0)
    assert watchdog.wait_for_stacks(tmp_path, 2) == [1]
    monkeypatch.setattr(watchdog, "STACK_SECONDS", 60.0)
    threading.Timer(0.05, (tmp_path / "nccl-0.pickle").write_bytes, (b"record",)).start()
    assert watchdog.wait_for_stacks(tmp_path, 1) == []
    assert (tmp_path / "nccl-0.pickle").read_bytes() == b"record"


def test_a_watched_run_keeps_its_last_collectives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mine = {signals.STACKS_VARIABLE: str(tmp_path), "TORCH_FR_BUFFER_SIZE": "7"}
    monkeypatch.setattr(os, "environ", mine)
    try:
        signals.write_stacks_on_demand()
    finally:
        faulthandler.unregister(signal.SIGQUIT)
    assert mine["TORCH_FR_BUFFER_SIZE"] == "7", "the user's own value stays"
    assert mine["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert mine["TORCH_FR_DUMP_TEMP_FILE"] == str(tmp_path / "nccl-timeout-")


class FakeProfile:
    def __init__(self, **_: Any) -> None: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def export_chrome_trace(self, path: str) -> None:
        Path(path).write_text("{}")


def test_a_profile_on_cuda_has_a_snapshot_of_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.profiler, "profile", FakeProfile)
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options)
    )
    monkeypatch.setattr(
        torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot")
    )
    profiler = Profiler(ProfileConfig(start=1, steps=1), tmp_path, Mesh(device=CUDA))
    profiler.begin(0)
    assert not calls
    profiler.begin(1)
    note = profiler.end(1)
    assert [options.get("enabled", True) for options in calls] == [True, None]
    snapshot = tmp_path / "profile" / "rank-00000.memory.pickle"
    assert snapshot.read_bytes() == b"snapshot" and str(snapshot) in note
    assert (tmp_path / "profile" / "rank-00000.json.gz").exists()
