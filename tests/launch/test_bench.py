"""`bench hardware`: the description that it writes, which `plan` reads; figures are not judged."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.commands import megarecur

from megarecur.launch import bench
from megarecur.plan.cluster import PRESETS, load_cluster

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny sizes, three repetitions each."""
    sizes = {
        "SIDES": (32, 64), "DOCUMENTS": (8, 16), "SAMPLE": 16, "HEADS": (2, 8), "TENSORS": (1,),
        "COLD_MIB": 0,
    }  # fmt: skip
    for name, value in sizes.items():
        monkeypatch.setattr(bench, name, {"cpu": value})
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    monkeypatch.setattr(bench, "LONGEST", 100.0)


def test_the_description_is_read_by_plan(
    small: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "new" / "mine.yaml"
    code, out, err = megarecur(capsys, "bench", "hardware", "--out", path, "--device", "cpu")
    assert code == 0, err
    assert out == path.read_text() and "# node: not measured" in out
    assert not list(path.parent.glob("*.tmp"))
    values = yaml.safe_load(out)
    rates = values["rates"]
    assert {name: set(curve) for name, curve in rates["products"].items()} == {
        name: {32, 64} for name in ("bf16", "fp32", "fp64")
    }
    assert {b: set(by_dtype) for b, by_dtype in rates["attention"].items()} == {
        b: {"bf16", "fp32"} for b in ("dense", "segments")
    }
    cluster = load_cluster(str(path))
    assert cluster.name == "mine" and cluster.device == "cpu" and cluster.ranks_per_node == 1
    assert cluster.rates is not None and cluster.rates.pointwise_gb_s[1] > 0
    assert cluster.peak("fp32") == max(rates["products"]["fp32"].values()) * 1e12
    assert cluster.network == PRESETS["cpu"].network
    code, out, err = megarecur(
        capsys, "plan", QUICKSTART, "model.vocab_size=2048", "--world-size", 1, "--tensor", 1,
        "--pipeline", 1, "--hardware", path,
    )  # fmt: skip
    assert code == 0, err
    assert "on mine" in out and "optimizer" in out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--out", "a.txt"], "--out a.txt: must name a .yaml file"),
        (["--out", "a.yaml", "--device", "tpu"], "device 'tpu' is unknown"),
        (["--out", "a.yaml", "--device", "cpu", "--ranks", 999], "--ranks 999: exceeds the"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[Any], part: str) -> None:
    code, _, err = megarecur(capsys, "bench", "hardware", *arguments)
    assert code == 2 and part in err and "Traceback" not in err, err


def test_larger_sizes_are_skipped_once_one_takes_long() -> None:
    seconds, seen = {1: 0.0, 2: bench.LONGEST, 4: 0.0}, []
    curve = bench.measure(seconds, lambda n: (float(n), seconds[n]), seen.append)
    assert curve == {1: 1.0, 2: 2.0} and sum(seen) == 3


@pytest.mark.parametrize(
    ("device", "threads", "clock"),
    [("cpu", 1, time.process_time), ("cpu", 2, time.perf_counter), ("cuda", 1, time.perf_counter)],
)
def test_one_thread_is_timed_by_its_processor_time(monkeypatch, device, threads, clock) -> None:
    """Other work on the machine does not count then. A GPU's work is no processor time."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert bench.pick_clock(torch.device(device)) is clock


def test_all_reduces_of_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "MESSAGE_MIB", 1)
    bench.reduce_together(0, 1, "cpu", str(tmp_path))
    assert len(json.loads((tmp_path / "seconds.json").read_text())) == 2


@pytest.mark.slow
def test_the_link_of_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    link = bench.measure_link(2, "cpu")
    assert link["bandwidth_gb_s"] > 0 and link["latency_us"] > 0 and link["attainable"] == 1.0
