"""Damaged lines of metrics.jsonl are passed over by all who read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megarecur.checkpoint.retention import read_scores
from megarecur.plot.run import read_metrics
from megarecur.train.metrics import Board, drop_after, read_rows

DAMAGED = ["12", "null", "[]", '{"st\u0001ep": 2}', '{"step": "2", "val/loss": 1.0}', "\xff\xfe",
           '{"step": 2, "val/loss": "low"}', '{"step": 2, "val/loss": [' + "[" * 2000,
           '{"step": true, "val/loss": 0.0}', '{"val/loss": 0.1}', '"val/loss"']  # fmt: skip


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_is_passed_over(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "tokens": 8 * step, "val/loss": 1.0 / step} for step in (1, 2, 3)]
    lines = [json.dumps(row) for row in rows]
    for place in range(4):
        path.write_bytes("\n".join([*lines[:place], line, *lines[place:], ""]).encode("latin-1"))
        assert read_rows(path) == read_metrics(path) == rows
        assert read_scores(path) == {1: 1.0, 2: 0.5, 3: 1 / 3}
        drop_after(path, 2)
        assert read_rows(path) == rows[:2]


def test_tensorboard_that_fails_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    board = Board(tmp_path / "tensorboard", 0)
    board.add_scalar("x", 1.0, 1)
    board.add_text("t", "a", 1)
    board.flush()
    assert not board.is_gone()
    board.close()
    assert caplog.text.count("training continues without TensorBoard") == 1
