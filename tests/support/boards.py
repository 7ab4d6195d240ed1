"""The curves of a run as TensorBoard reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megarecur.train.metrics import read_rows


def open_board(folder: Path, **options: Any) -> Any:
    """TensorBoard's own reader, which keeps every event."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"tensors": 0}, **options)


def curves_of(board: Any) -> dict[str, list[int]]:
    """Steps by tag, after reading what is new."""
    board.Reload()
    return {tag: [e.step for e in board.Tensors(tag)] for tag in board.Tags()["tensors"]}


def assert_one_line(board: Any, run_dir: Path) -> None:
    """Every tag has each step once, in order; scalars are those of metrics.jsonl."""
    curves = curves_of(board)
    twice = {tag: steps for tag, steps in curves.items() if steps != sorted(set(steps))}
    assert not twice
    rows = read_rows(run_dir / "metrics.jsonl")
    for tag in {tag for row in rows for tag in row} - {"step", "tokens"}:
        assert curves[tag] == [row["step"] for row in rows if row.get(tag) is not None], tag
