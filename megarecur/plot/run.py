"""Pictures of a run, from its folder alone: metrics.jsonl and config.yaml.

megarecur plot runs/quickstart
megarecur plot runs/shallow runs/deep
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from megarecur.config.load import load_config
from megarecur.config.recurrence import Looped
from megarecur.config.run import Config
from megarecur.errors import DataError
from megarecur.plan.describe import count_noun, describe_schemes
from megarecur.plot.layer_map import ACCENT, BLOCK_COLOURS, INK, SOFT, draw_config, save
from megarecur.reading import parse_metrics
from megarecur.recurrence.depth import default_depth
from megarecur.recurrence.layer_map import LayerMap
from megarecur.recurrence.schemes import build_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

Row = dict[str, Any]
"""Metrics of one log step: `step`, `tokens` and flat keys."""

TRAIN_COLOUR = "#4477aa"
DEPTH_KEY = re.compile(r"val/depth_(\d+)/loss")


def plot_run(run: Path, out: Path | None = None) -> list[Path]:
    """Draw all that the run has logged so far; return the files written.

    Raises:
        DataError: there is nothing to draw.
    """
    rows = read_metrics(run / "metrics.jsonl")
    if not rows:
        raise DataError(f"{run / 'metrics.jsonl'}: holds no metrics yet; train for a few steps")
    if not (run / "config.yaml").is_file():
        raise DataError(f"{run}: is not the folder of a run, it has no config.yaml")
    config = load_config(run / "config.yaml")
    steps = build_map(config, deepest(rows, config))
    figures = {
        "loss": draw_loss(rows, config),
        "optimizer": draw_optimizer(rows),
        "speed": draw_speed(rows),
        "recurrence": draw_recurrence(rows, steps),
        "depth": draw_depths(rows),
        "layer_map": draw_config(config),
    }
    return save_figures(figures, out or run / "plots")


def deepest(rows: Sequence[Row], config: Config) -> int | None:
    """Return the maximum number of loops that any row has measured; None if the scheme has no
    loops. Those of an encoder do not count."""
    recurrence, first = config.recurrence, config.num_blocks - config.recurrence.num_blocks
    if not isinstance(recurrence, Looped):
        return None
    keys = [key for row in rows for key in row if key.startswith("recurrence/resid")]
    steps = (key.rpartition("/")[2].split(".") for key in keys)
    loops = [int(loop) for block, loop in steps if int(block) >= first]
    return 1 + max(loops, default=default_depth(recurrence).num_loops - 1)


def plot_runs(runs: Sequence[Path], out: Path) -> list[Path]:
    """Draw several runs together; return the files written.

    Raises:
        DataError: a run has no metrics.
    """
    whole = [run.resolve() for run in runs]
    shared = os.path.commonpath([run.parent for run in whole])
    figure = draw_runs(
        {str(run.relative_to(shared)): read_metrics(run / "metrics.jsonl") for run in whole}
    )
    if figure is None:
        raise DataError(f"{', '.join(map(str, runs))}: hold no losses yet; train for a few steps")
    return save_figures({"runs": figure}, out)


def save_figures(figures: Mapping[str, Figure | None], folder: Path) -> list[Path]:
    """Write each figure as PNG and SVG; return the files written."""
    written = []
    for name, figure in figures.items():
        if figure is not None:
            paths = [folder / f"{name}.png", folder / f"{name}.svg"]
            save(figure, *paths)
            written += paths
    return written


def read_metrics(path: Path) -> list[Row]:
    """Return one row per step, in order of steps.

    A run that resumed may have logged a step twice: the later value of a key wins. Incomplete lines
    of a killed process are skipped.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a run's folder") from None
    merged: dict[int, Row] = {}
    for number, line in enumerate(lines, 1):
        row = parse_metrics(line)
        if row is None:
            if number < len(lines) and line.strip():
                logger.warning("%s: line %d is not a row of metrics, passed over", path, number)
            continue
        merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]


# -------------------------------------------------------------------------------------- figures


def draw_loss(rows: Sequence[Row], config: Config) -> Figure | None:
    """Plot training loss (raw and smoothed) and validation losses over tokens."""
    tokens, losses = _series(rows, "train/loss", "tokens")
    keys = {k for row in rows for k in row if not k.startswith("val/depth_")}
    names = sorted(k for k in keys if k.startswith("val/") and k.endswith("loss"))
    if not tokens and not names:
        return None
    names.sort(key=lambda name: name != "val/loss")
    figure, (axes,) = new_panels(1, width=8.0, height=4.6)
    if tokens:
        axes.plot(tokens, losses, color=TRAIN_COLOUR, lw=0.8, alpha=0.35)
        axes.plot(tokens, _smooth(losses), color=TRAIN_COLOUR, lw=1.8, label="train")
    colours = [ACCENT, *BLOCK_COLOURS[1:]]
    for i, name in enumerate(names):
        x, y = _series(rows, name, "tokens")
        label = name.removesuffix("/loss").replace("/", " ")
        axes.plot(x, y, color=colours[i % len(colours)], lw=1.4, marker="o", ms=4, label=label)
        if x and i == 0:
            axes.annotate(f"{y[-1]:.3f}", (x[-1], y[-1]), xytext=(6, 4), color=ACCENT,
                          textcoords="offset points", size=10, weight="bold")  # fmt: skip
    axes.set_ylim(*_loss_limits([*losses, *(v for n in names for v in _series(rows, n)[1])]))
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(_engineering())
    axes.margins(x=0.04)
    axes.legend(frameon=False)
    set_title(axes, describe_schemes(config))
    return figure


def draw_depths(rows: Sequence[Row]) -> Figure | None:
    """Plot validation loss by number of loops: over training, and at the last evaluation."""
    keys = {key: int(m[1]) for row in rows for key in row if (m := DEPTH_KEY.fullmatch(key))}
    if not keys:
        return None
    figure, (left, right) = _beside(2)
    last: list[tuple[int, float]] = []
    for i, key in enumerate(sorted(keys, key=lambda key: keys[key])):
        x, y = _series(rows, key, "tokens")
        if not x:
            continue
        colour = BLOCK_COLOURS[i % len(BLOCK_COLOURS)]
        left.plot(x, y, color=colour, lw=1.4, marker="o", ms=3, label=count_noun(keys[key], "loop"))
        last.append((keys[key], y[-1]))
    right.plot(*zip(*last, strict=True), color=ACCENT, lw=1.4, marker="o", ms=5)
    left.xaxis.set_major_formatter(_engineering())
    left.set_xlabel("tokens")
    left.set_ylabel("validation loss (nats per token)")
    left.legend(frameon=False)
    right.set_xlabel("loops")
    right.set_xticks([depth for depth, _ in last])
    set_title(left, "validation loss by depth")
    set_title(right, "at the last evaluation")
    return figure


def draw_positions(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Plot loss over the position in the document; a curve's values are for positions 0, 1, 2-3,
    ..."""
    figure, (axes,) = new_panels(1, width=8.0, height=4.6)
    for i, (name, losses) in enumerate(curves.items()):
        middles = [0.5, *(1.5 * 2**k - 0.5 for k in range(len(losses) - 1))]
        points = [(x, y) for x, y in zip(middles, losses, strict=True) if math.isfinite(y)]
        colour = BLOCK_COLOURS[i % len(BLOCK_COLOURS)]
        axes.plot(*zip(*points, strict=True), color=colour, lw=1.4, marker="o", ms=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position in the document")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    plain_numbers(axes.xaxis)
    set_title(axes, "validation loss by position")
    return figure


def draw_runs(runs: Mapping[str, Sequence[Row]]) -> Figure | None:
    """Plot smoothed training losses, and validation losses, of several runs over tokens."""
    figure, (axes,) = new_panels(1, width=8.0, height=4.6)
    drawn: list[float] = []
    for i, (name, rows) in enumerate(runs.items()):
        colour = BLOCK_COLOURS[i % len(BLOCK_COLOURS)]
        tokens, losses = _series(rows, "train/loss", "tokens")
        axes.plot(tokens, _smooth(losses), color=colour, lw=1.6, label=name)
        x, y = _series(rows, "val/loss", "tokens")
        axes.plot(x, y, color=colour, lw=0.9, ls="--", marker="o", ms=4)
        drawn += [*losses, *y]
    if not drawn:
        return None
    axes.set_ylim(*_loss_limits(drawn))
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(_engineering())
    axes.legend(frameon=False)
    set_title(axes, "training loss (lines) and validation loss (dots)")
    return figure


def draw_optimizer(rows: Sequence[Row]) -> Figure | None:
    """Plot learning rate and gradient norm over steps, and mark skipped steps."""
    lr, norm = _series(rows, "optim/lr"), _series(rows, "optim/grad_norm")
    if not lr[0] and not norm[0]:
        return None
    figure, (top, bottom) = new_panels(2)
    top.plot(*lr, color=TRAIN_COLOUR, lw=1.6)
    set_title(top, "learning rate")
    top.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    top.set_ylim(bottom=0)
    bottom.plot(*norm, color=SOFT, lw=0.9)
    bottom.plot(norm[0], _smooth(norm[1]), color=INK, lw=1.6)
    if norm[1] and min(norm[1]) > 0:
        bottom.set_yscale("log")
        plain_numbers(bottom.yaxis)
    set_title(bottom, "gradient norm before clipping")
    _mark_skipped(bottom, rows)
    bottom.set_xlabel("step")
    return figure


def draw_speed(rows: Sequence[Row]) -> Figure | None:
    """Plot tokens per second, MFU by executed FLOPs, and the share of time spent waiting for
    data."""
    wanted = [
        ("speed/tokens_per_second", "tokens per second", 1.0),
        ("speed/mfu", "MFU (executed FLOPs), %", 100.0),
        ("speed/data_wait", "data wait, % of the time", 100.0),
    ]
    panels = [(title, scale, _series(rows, key)) for key, title, scale in wanted]
    panels = [panel for panel in panels if panel[2][0]]
    if not panels:
        return None
    figure, all_axes = new_panels(len(panels), height=1.9 * len(panels) + 0.5)
    for axes, (title, scale, (x, y)) in zip(all_axes, panels, strict=True):
        values = [scale * value for value in y]
        axes.plot(x, values, color=SOFT, lw=0.9)
        axes.plot(x, _smooth(values), color=TRAIN_COLOUR, lw=1.6)
        axes.set_ylim(0, 1.15 * _percentile(values, 0.99) or 1.0)
        set_title(axes, title)
    if panels[0][0].startswith("tokens"):
        all_axes[0].yaxis.set_major_formatter(_engineering())
    all_axes[-1].set_xlabel("step")
    return figure


def draw_recurrence(rows: Sequence[Row], steps: LayerMap) -> Figure | None:
    """Plot the effect of every step of the map on the residual stream, over training."""
    wanted = [
        ("recurrence/residual_norm/", "norm of the residual stream after each step of the map"),
        ("recurrence/relative_update/", "relative update: |change| / |state|"),
        ("recurrence/fixed_point_distance/", "distance to the block's visit before"),
        ("recurrence/gradient_share/", "share of each visit in its block's gradient"),
    ]
    keys = [(step.block, step.loop_index) for step in steps]
    # Include rows in which a panel has no value, so that their columns stay empty.
    rows = [row for row in rows if any(key.startswith(wanted[0][0]) for key in row)]
    grids = [(title, *_grid(rows, prefix, keys)) for prefix, title in wanted]
    grids = [grid for grid in grids if grid[1]]
    if not grids:
        return None
    depth = max(len(values) for _, _, values in grids)
    height = min(max(0.22 * depth, 1.8), 24.0 / len(grids)) + 0.7
    figure, all_axes = new_panels(len(grids), height=height * len(grids))
    for axes, (title, x, values) in zip(all_axes, grids, strict=True):
        _draw_heat(axes, x, values)
        _label_steps(axes, steps)
        set_title(axes, title)
    all_axes[-1].set_xlabel("step")
    return figure


# ---------------------------------------------------------------------------------------- parts


def new_panels(count: int, width: float = 8.0, height: float = 4.8) -> tuple[Figure, list[Axes]]:
    """Return a new figure with axes one above the other, which share x."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    all_axes = list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])
    for axes in all_axes:
        _style(axes)
    return figure, all_axes


def _beside(count: int) -> tuple[Figure, list[Axes]]:
    """Return a new figure with axes side by side, which share y."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 3.8), facecolor="white", layout="constrained")
    all_axes = list(figure.subplots(1, count, sharey=True, squeeze=False)[0])
    for axes in all_axes:
        _style(axes)
    return figure, all_axes


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)
    axes.tick_params(colors=INK, length=3, labelsize=9)
    axes.grid(axis="y", color=SOFT, alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)


def set_title(axes: Axes, text: str) -> None:
    """Set the title of axes, in the style of all pictures."""
    axes.set_title(text, loc="left", size=11, weight="bold", color=INK)


def _series(rows: Sequence[Row], key: str, x: str = "step") -> tuple[list[float], list[float]]:
    """Return (x, y) of a key at the rows where both are finite numbers."""
    points = [(row.get(x), row.get(key)) for row in rows]
    kept = [(float(a), float(b)) for a, b in points if _is_number(a) and _is_number(b)]
    return [a for a, _ in kept], [b for _, b in kept]


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _smooth(values: Sequence[float]) -> list[float]:
    """Return a bias-corrected moving average over about a fiftieth of the curve."""
    keep = 1 - 1 / max(len(values) / 50, 1.0)
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)] if values else 0.0


def _loss_limits(values: Sequence[float]) -> tuple[float, float]:
    """Return y limits that exclude a lone spike, but never the start of the curve or its
    minimum."""
    if not values:
        return 0.0, 1.0
    high = max(_percentile(values, 0.995), values[0])
    low = min(values)
    pad = 0.06 * (high - low) or 0.5
    return low - pad, high + pad


def _engineering() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis with 0.6 instead of 6 x 10^-1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _mark_skipped(axes: Axes, rows: Sequence[Row]) -> None:
    """Mark the steps at which the count of skipped steps has grown, along the bottom."""
    before = 0.0
    marks = []
    for step, count in zip(*_series(rows, "optim/skipped"), strict=True):
        if count > before:
            marks.append(step)
        before = count
    if marks:
        axes.plot(marks, [0.03] * len(marks), "v", color=ACCENT, ms=6, label="steps skipped",
                  transform=axes.get_xaxis_transform())  # fmt: skip
        axes.legend(frameon=False)


def _grid(
    rows: Sequence[Row], prefix: str, keys: Sequence[tuple[int, int]]
) -> tuple[list[int], list[list[float]]]:
    """Return (steps, one list of values per step of the map); NaN where a step of the map did not
    run."""
    names = [f"{prefix}{block:02d}.{loop:02d}" for block, loop in keys]
    if not any(name in row for row in rows for name in names):
        return [], []
    values = [
        [float(value) if _is_number(value := row.get(name)) else math.nan for row in rows]
        for name in names
    ]
    return [row["step"] for row in rows], values


def _draw_heat(axes: Axes, x: list[int], values: list[list[float]]) -> None:
    """Draw a heat map on a logarithmic scale; each column spans from the previous step to its
    own."""
    from matplotlib.colors import LogNorm

    flat = [v for line in values for v in line if v > 0]
    low, high = (min(flat), max(flat)) if flat else (0.5, 1.0)
    width = x[1] - x[0] if len(x) > 1 else max(x[0], 1)
    edges = [x[0] - width, *x]
    norm = LogNorm(low, high if high > low else low * 1.01)
    rows = [i - 0.5 for i in range(len(values) + 1)]
    mesh = axes.pcolormesh(edges, rows, values, norm=norm, cmap="viridis", rasterized=True)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.grid(False)
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.015, aspect=14)
    bar.outline.set_visible(False)
    plain_numbers(bar.ax.yaxis)
    bar.ax.tick_params(labelsize=8, colors=INK, length=2, which="both")


def _label_steps(axes: Axes, steps: LayerMap) -> None:
    """Label each step of the map with its block and loop, or every n-th one of a long map."""
    every = max(math.ceil(len(steps) / 24), 1)
    ticks = list(range(0, len(steps), every))
    again = {step.block for step in steps if step.loop_index}
    names = [
        f"block {steps[i].block}" + f" · {steps[i].loop_index}" * (steps[i].block in again)
        for i in ticks
    ]
    axes.set_yticks(ticks, names, size=8)
