"""The profiler's window and the memory report: what they name, and that the numbers are so."""

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from support.configs import make_config
from support.runs import losses

from megarecur.data.open import with_vocab_size
from megarecur.parallel.linear import has_bf16_products
from megarecur.recurrence.inventory import build_inventory
from megarecur.train.metrics import read_rows
from megarecur.train.trainer import FINISHED, train


def profiled(corpus: Path, run_dir: Path, profile: Any) -> Any:
    """A short run of a loop model, recorded or not."""
    return make_config(
        corpus, "loop", run_dir=str(run_dir), data={"val": []}, checkpoint={"every": 3},
        train={"steps": 6, "profile": profile, "recompute": True},
    )  # fmt: skip


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


def test_the_memory_report_counts_what_is_held(corpus, tmp_path, capsys) -> None:
    config = make_config(
        corpus, "loop", run_dir=str(tmp_path / "run"), data={"val": []},
        train={"steps": 2, "recompute": True, "precision": "bf16"},
    )  # fmt: skip
    assert train(config) == FINISHED
    inventory = build_inventory(with_vocab_size(config, 257))
    size = sum(spec.size for spec in inventory.values())
    # Copies are of matrices, in the dtype of products; the embedding is the head too.
    matrices = sum(spec.size for spec in inventory.values() if len(spec.shape) == 2)
    wide = 2 if has_bf16_products(torch.device("cpu")) else 4
    for row in read_rows(tmp_path / "run" / "metrics.jsonl"):
        assert row["memory/parameters"] == row["memory/gradients"] == 4 * size
        assert row["memory/moments"] == 2 * 4 * size + 4  # and the count of updates
        assert row["memory/copies"] == wide * matrices
        assert row["memory/peak_bytes"] > 1e8
        assert row["speed/mfu_with_recompute"] > row["speed/mfu"] > 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory:")]
    assert len(lines) == 1 and "peak of the process" in lines[0] and "activations" in lines[0]
