"""The pictures of a run: what is read, what is written, what is left out."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from megarecur.config.load import load_config, to_yaml
from megarecur.errors import DataError
from megarecur.plot.layer_map import draw_config, draw_layer_map, save, spans
from megarecur.plot.run import (
    draw_depths,
    draw_loss,
    draw_recurrence,
    draw_speed,
    plot_run,
    plot_runs,
    read_metrics,
)
from megarecur.recurrence.layer_map import from_order, mark

CONFIG = """
run_dir: runs/quickstart
model: {hidden_size: 64, num_heads: 4, vocab_size: 256}
recurrence: {kind: reuse_map, reuse_map: [2, 1]}
data: {train: [{path: a}], tokenizer: bytes, seq_length: 64}
optimizer: {lr: 3.0e-3}
train: {steps: 40, global_batch_size: 2, micro_batch_size: 1}
"""


def row(step: int) -> dict[str, Any]:
    """One log step as training writes it."""
    values: dict[str, Any] = {
        "step": step,
        "tokens": 128 * step,
        "train/loss": 5.0 * math.exp(-step / 20) + 2.0,
        "optim/lr": 1e-3 * step,
        "optim/grad_norm": 1.0 + 1.0 / step,
        "optim/skipped": int(step > 20),
        "speed/tokens_per_second": 1000.0,
        "speed/mfu": 0.4,
        "speed/data_wait": 0.001,
    }
    for position, key in enumerate(("00.00", "00.01", "01.00")):
        values[f"recurrence/residual_norm/{key}"] = 1.0 + position
        values[f"recurrence/relative_update/{key}"] = 0.5 / (1 + position)
    return values


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = tmp_path / "source.yaml"
    config.write_text(CONFIG)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(load_config(config)))
    lines = [json.dumps(row(step)) for step in range(5, 45, 5)]
    lines.append(json.dumps({"step": 40, "tokens": 5120, "val/loss": 2.5, "val/a/loss": 2.4}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_every_picture_is_written_as_png_and_svg(run: Path) -> None:
    written = plot_run(run)
    names = ["loss", "optimizer", "speed", "recurrence", "layer_map"]
    assert written == [run / "plots" / f"{n}.{s}" for n in names for s in ("png", "svg")]
    for path in written:
        head = path.read_bytes()[:200]
        assert head.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in head


def test_later_rows_win_and_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 1, "train/loss": 9.0},
        {"step": 2, "train/loss": 8.0},
        {"step": 2, "val/loss": 7.5},
        {"step": 3, "train/loss": 7.0},
        {"step": 2, "train/loss": 8.5},  # the run resumed from step 1
    ]
    text = "\n".join(map(json.dumps, rows)) + '\n{"step": 3, "tr{"x"\n[1]\n\n'
    path.write_bytes(text.encode() + b'{"step": 4, "train/lo\xff')
    assert read_metrics(path) == [
        {"step": 1, "train/loss": 9.0},
        {"step": 2, "train/loss": 8.5, "val/loss": 7.5},
        {"step": 3, "train/loss": 7.0},
    ]


def test_nothing_to_draw_is_an_error_that_says_so(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: cannot be read"):
        plot_run(tmp_path / "absent")
    (run / "config.yaml").unlink()
    with pytest.raises(DataError, match=r"no config\.yaml"):
        plot_run(run)
    (run / "metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(DataError, match="no metrics yet"):
        plot_run(run)


def test_figures_without_their_metrics_are_left_out(run: Path) -> None:
    rows = [{"step": 1, "tokens": 9, "memory/peak_bytes": 5}]
    config = load_config(run / "config.yaml")
    steps = from_order([0, 0, 1])
    assert draw_loss(rows, config) is draw_speed(rows) is draw_recurrence(rows, steps) is None


def test_values_that_are_no_numbers_leave_gaps(run: Path, tmp_path: Path) -> None:
    rows = [row(5), {**row(10), "train/loss": float("nan")}, {**row(15), "train/loss": None}]
    rows[1].update({"recurrence/residual_norm/00.01": float("inf")})
    del rows[2]["recurrence/residual_norm/01.00"]  # another depth was sampled
    figure = draw_loss(rows, load_config(run / "config.yaml"))
    assert figure is not None
    assert len(figure.axes[0].lines[0].get_xdata()) == 1
    heat = draw_recurrence(rows, from_order([0, 0, 1]))
    assert heat is not None
    save(heat, tmp_path / "heat.png")


def test_depths_and_several_runs_have_pictures(run: Path, tmp_path: Path) -> None:
    rows = [{**row(5 * i), "val/depth_1/loss": 4 - i, "val/depth_4/loss": 3 - i} for i in (1, 2)]
    figure = draw_depths(rows)
    assert figure is not None
    left, right = figure.axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["1 loop", "4 loops"]
    assert right.lines[0].get_xydata().tolist() == [[1, 2], [4, 1]]
    assert draw_depths([row(5)]) is None
    losses = draw_loss(rows, load_config(run / "config.yaml"))
    assert losses is not None
    assert "depth" not in str([t.get_text() for t in losses.axes[0].get_legend().get_texts()])
    other = tmp_path / "other" / "run"
    shutil.copytree(run, other)
    names = [path.name for path in plot_runs([run, other], tmp_path / "out")]
    assert names == ["runs.png", "runs.svg"] and (tmp_path / "out" / "runs.png").stat().st_size
    (other / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match=r"other/run/metrics.jsonl: cannot be read"):
        plot_runs([run, other], tmp_path / "out")


def test_layer_maps_of_every_size(tmp_path: Path) -> None:
    config = load_config_text(tmp_path, "{kind: loop, prelude: 1, core: 2, coda: 1, num_loops: 2}")
    assert [span.name for span in spans(config)] == ["prelude", "loop 0", "loop 1", "coda"]
    texts = [text.get_text() for text in draw_config(config).axes[0].texts]
    assert "prelude" in texts and texts.count("block 1") == 1
    for order in ([0], [0] * 64, list(range(64)), [0, 1, 2, 3] * 2):
        figure = draw_layer_map(mark(from_order(order), 0, grad=False, exit=True), "title")
        width, height = figure.get_size_inches()
        assert 7 <= width <= 18 and 1 <= height <= 18


def load_config_text(folder: Path, recurrence: str) -> Any:
    path = folder / "c.yaml"
    path.write_text(CONFIG)
    return load_config(path, [f"recurrence={recurrence}"])


def test_pictures_are_the_same_every_time(tmp_path: Path) -> None:
    pictures = []
    for name in ("a.svg", "b.svg"):
        config = load_config_text(tmp_path, "{kind: cycle, num_blocks: 2, depth: 4}")
        save(draw_config(config), tmp_path / name)
        pictures.append((tmp_path / name).read_text())
    assert pictures[0] == pictures[1]
