"""Picture of a fold: the layers of each block, the residuals, and the share that adapters keep.

Drawn from RUN/fold.json, which `megarecur convert --scheme` writes.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarecur.errors import DataError
from megarecur.plot.layer_map import ACCENT, INK, SOFT, save
from megarecur.reading import read_object

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REPORT = "fold.json"


def plot_fold(run: Path, out: Path | None = None) -> list[Path]:
    """Draw the fold that made a run; return the files written.

    Raises:
        DataError: the run was not folded, or its report cannot be read.
    """
    path = run / REPORT
    try:
        report = read_object(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); fold the model again") from None
    folder = out or run / "plots"
    paths = [folder / "fold.png", folder / "fold.svg"]
    save(draw_fold(report), *paths)
    return paths


def draw_fold(report: dict[str, Any]) -> Figure:
    """Return a figure of the layers of each block, the residuals and the share that adapters
    keep."""
    from matplotlib.figure import Figure

    matrices = report["matrices"]
    shares = {key: m["residual_norm"] / max(m["weight_norm"], 1e-30) for key, m in _by_step(report)}
    energy = {
        key: m["energy"] for key, m in _by_step(report) if m["rank"] and m["residual_norm"] > 0
    }
    panels = [any(shares.values()), bool(energy)]
    steps, num_blocks = len(report["steps"]), len(report["blocks"])
    above, below = 1.1 + 0.22 * num_blocks, (1.3 + 0.2 * steps) * any(panels)
    figure = Figure(figsize=(9.0, above + below), facecolor="white", layout="constrained")
    rows, columns = 1 + any(panels), max(sum(panels), 1)
    grid = figure.add_gridspec(rows, columns, height_ratios=[above, below][:rows])
    _draw_sources(figure.add_subplot(grid[0, :]), report)
    if panels[0]:
        axes = figure.add_subplot(grid[1, 0])
        _draw_heat(axes, report, shares, "Residual |W − W′| / |W|", "magma_r", None)
    if panels[1]:
        ranks = sorted({m["rank"] for m in matrices if m["rank"]})
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        title = f"Share that adapters of rank {rank} hold"
        _draw_heat(figure.add_subplot(grid[1, 1]), report, energy, title, "viridis", 1.0)
    return figure


def _by_step(report: dict[str, Any]) -> list[tuple[tuple[int, str], dict[str, Any]]]:
    """Return a list of ((step, linear), matrix)."""
    places = {(s["block"], s["loop"]): i for i, s in enumerate(report["steps"])}
    return [((places[m["block"], m["loop"]], m["linear"]), m) for m in report["matrices"]]


def _draw_sources(axes: Axes, report: dict[str, Any]) -> None:
    """Draw a row per block: dots for layers that it was made of, rings for those that it
    replaces."""
    uses = Counter((step["source"], step["block"]) for step in report["steps"])
    for (layer, block), count in uses.items():
        axes.plot(layer, block, "o", ms=11, mfc="none", mec="#4477aa", mew=1.5)
        if count > 1:
            axes.text(layer + 0.12, block, f"× {count}", va="center", size=8, color=INK)
    for entry in report["blocks"]:
        layers = entry["made_of"]
        axes.plot(layers, [entry["block"]] * len(layers), "o", ms=6, color="#4477aa", ls="none")
    for layer in report["dropped"]:
        axes.axvline(layer, color=ACCENT, lw=0.9, ls=(0, (2, 3)))
    num_layers, num_blocks = report["num_layers"], len(report["blocks"])
    axes.set_xlim(-0.7, num_layers - 0.3)
    axes.set_ylim(num_blocks - 0.4, -0.6)
    axes.set_xticks(range(0, num_layers, max(num_layers // 20, 1)))
    axes.set_yticks(range(0, num_blocks, max(num_blocks // 12, 1)))
    axes.set_xlabel("source layer", color=INK, size=9)
    axes.set_ylabel("block", color=INK, size=9)
    note = "dot: made of it; ring: stands for it"
    note += "; dashed: dropped" if report["dropped"] else ""
    _finish(axes, f"Source layers of each block  ({note})")


def _draw_heat(
    axes: Axes,
    report: dict[str, Any],
    values: dict[tuple[int, str], float],
    title: str,
    colours: str,
    top: float | None,
) -> None:
    """Draw a heat map with steps as rows and linears as columns."""
    linears = list(dict.fromkeys(m["linear"] for m in report["matrices"]))
    steps = len(report["steps"])
    table = [[values.get((i, name), float("nan")) for name in linears] for i in range(steps)]
    largest = top or max(max(values.values(), default=1.0), 1e-9)
    image = axes.imshow(table, aspect="auto", cmap=colours, vmin=0.0, vmax=largest)
    if steps <= 24:
        for i, row in enumerate(table):
            for j, value in enumerate(row):
                dark = value > 0.55 * largest if top is None else value < 0.5 * largest
                text = f"{value:.2f}" if value == value else "–"
                axes.text(j, i, text, ha="center", va="center", size=7,
                          color="white" if dark else INK)  # fmt: skip
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02).ax.tick_params(labelsize=7)
    axes.set_xticks(range(len(linears)), linears, rotation=40, ha="right")
    every = max(steps // 24, 1)
    labels = [f"{s['block']}.{s['loop']} ← {s['source']}" for s in report["steps"]]
    axes.set_yticks(range(0, steps, every), labels[::every])
    axes.set_ylabel("block.loop ← layer", color=INK, size=9)
    _finish(axes, title)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", size=10, weight="bold", color=INK)
    axes.tick_params(colors=INK, labelsize=8, length=2)
    for spine in axes.spines.values():
        spine.set_color(SOFT)
