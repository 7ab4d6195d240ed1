"""The profiler's window: which steps it records, what it names, what it costs."""

import gzip
import json
from pathlib import Path
from typing import Any

from configs import make_config
from megarecur.train.metrics import read_rows
from megarecur.train.trainer import FINISHED, train


def profiled(corpus: Path, run_dir: Path, profile: Any) -> Any:
    """A short run of a loop model, recorded or not."""
    return make_config(
        corpus, "loop", run_dir=str(run_dir), data={"val": []}, checkpoint={"every": 3},
        train={"steps": 6, "profile": profile, "recompute": True},
    )  # fmt: skip


def losses(run_dir: Path) -> list[float]:
    """By step."""
    return [row["train/loss"] for row in read_rows(run_dir / "metrics.jsonl")]


def test_a_window_is_recorded_with_named_ranges(corpus, tmp_path) -> None:
    assert train(profiled(corpus, tmp_path / "run", {"start": 2, "steps": 2})) == FINISHED
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    # Two steps of four micro batches; recompute runs blocks in backward, outside their ranges.
    assert [names.count(name) for name in ("data", "optimizer", "save")] == [2, 2, 1]
    assert names.count("forward") == names.count("backward") == 8
    assert names.count("block 1 loop 2") == names.count("block 0 loop 0") == 8
    assert train(profiled(corpus, tmp_path / "plain", None)) == FINISHED
    assert not (tmp_path / "plain" / "profile").exists()
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


def test_a_window_that_the_run_ends_in_is_written(corpus, tmp_path) -> None:
    assert train(profiled(corpus, tmp_path / "run", {"start": 5, "steps": 9})) == FINISHED
    assert (tmp_path / "run" / "profile" / "rank-00000.json.gz").stat().st_size
