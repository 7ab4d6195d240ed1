"""Drawing of a layer map: blocks as rows, unrolled depth as columns, the walk as a line.

megarecur check configs/quickstart.yaml --draw map.svg
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarecur.config.recurrence import BlockRecurrence, Loop
from megarecur.config.run import Config
from megarecur.plan.cost import (
    count_flops,
    count_parameters,
    count_unrolled_parameters,
    dense_twin,
)
from megarecur.plan.describe import count_noun, describe_schemes, format_count
from megarecur.recurrence.depth import default_depth
from megarecur.recurrence.layer_map import LayerMap, count_uses
from megarecur.recurrence.schemes import build_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, ACCENT = "#1f2933", "#9aa5b1", "#c2410c"
BLOCK_COLOURS = (
    "#4477aa",
    "#228833",
    "#ccbb44",
    "#ee6677",
    "#aa3377",
    "#66ccee",
    "#8c6d46",
    "#667788",
)
"""Tol's bright scheme, safe for colour-blind readers; larger maps use a continuous one."""


@dataclass(frozen=True, slots=True)
class Span:
    """A named range of the map, drawn as a bracket above it."""

    name: str
    start: int
    stop: int


def draw_config(config: Config) -> Figure:
    """Return a figure of a config's map, with its scheme and, if vocab_size is known, its
    counts."""
    steps = build_map(config)
    subtitle = f"{count_noun(len(count_uses(steps)), 'block')}, depth {len(steps)}"
    if config.model.vocab_size is not None:
        unique, unrolled = count_parameters(config), count_unrolled_parameters(config, steps)
        dense = count_flops(config, dense_twin(steps)).forward
        ratio = count_flops(config, steps).forward / dense
        subtitle += (
            f"  ·  {format_count(unique.total)} parameters "
            f"({format_count(unrolled.total)} unrolled)  ·  {ratio:.2f} x the FLOPs of dense"
        )
    return draw_layer_map(steps, describe_schemes(config), subtitle, spans(config))


def spans(config: Config) -> tuple[Span, ...]:
    """Return the parts of a map: its stacks, or prelude, loops and coda of one that repeats a
    group."""
    if config.encoder is not None:
        steps = build_map(config)
        first = sum(step.stack == "encoder" for step in steps)
        return Span("encoder", 0, first), Span("decoder", first, len(steps))
    recurrence = config.recurrence
    if isinstance(recurrence, BlockRecurrence):
        start, length, coda = 0, recurrence.num_blocks, 0
    elif isinstance(recurrence, Loop):
        start, length, coda = recurrence.prelude, recurrence.core, recurrence.coda
    else:
        return ()
    loops = default_depth(recurrence).num_loops
    end = start + length * loops
    parts = [Span("prelude", 0, start)]
    if length * loops <= 4 * loops and loops > 12:  # Brackets are too narrow for a name each.
        parts.append(Span(f"core, {loops} loops", start, end))
    else:
        for i in range(loops):
            parts.append(Span(f"loop {i}", start + i * length, start + (i + 1) * length))
    parts.append(Span("coda", end, end + coda))
    return tuple(part for part in parts if part.stop > part.start)


def draw_layer_map(
    steps: LayerMap, title: str = "", subtitle: str = "", spans: Sequence[Span] = ()
) -> Figure:
    """Return a figure of the map, legible from 4 to about 64 steps.

    A filled square is a step, its number the loop index; hollow squares run forward only. Arrows
    lead from the step that stores a value to the steps that read it; the final norm is a dashed
    line.
    """
    from matplotlib.figure import Figure

    blocks, depth = sorted(count_uses(steps)), len(steps)
    rows = {block: row for row, block in enumerate(blocks)}
    names = sorted({name for step in steps for name in step.writes})
    normed = any(step.normalize for step in steps)
    cell = max(min(0.62, 15.0 / depth, 10.0 / len(blocks)), 0.2)  # Inches per step and per block.
    size = min(max(cell * 18, 7.0), 10.0)  # Points.
    line = size / 72 * 1.9 / cell  # Height of a line of text, in cells.
    left, right, top, bottom = 1.0 / cell, 0.7 / cell, 0.1 / cell, 0.1 / cell
    top += (line + 0.4) if spans else 0.0
    bottom += line + (line + 0.9) * len(names) + (line if normed and not names else 0.0)
    width = max((depth + left + right) * cell, 7.0)  # Inches.
    height = (len(blocks) + top + bottom) * cell
    head = 0.75 if title else 0.0
    figure = Figure(figsize=(width, height + head), facecolor="white")
    axes = figure.add_axes((0.0, 0.0, 1.0, height / (height + head)))
    axes.set_xlim(-0.5 - left, width / cell - 0.5 - left)
    axes.set_ylim(len(blocks) - 0.5 + bottom, -0.5 - top)
    axes.axis("off")

    colours, base = _colours(len(blocks)), len(blocks) - 0.5
    _draw_rows(axes, steps, rows, colours, size)
    for i, name in enumerate(names):
        _draw_reads(axes, steps, rows, name, base + line + 0.7 + (line + 0.9) * i, cell, size)
    _draw_norm(axes, steps, base, base + line + (0.7 if names else 0.3), size)
    _draw_walk(axes, steps, rows, cell)
    _draw_steps(axes, steps, rows, colours, cell, size)
    _draw_spans(axes, spans, size)
    _draw_positions(axes, depth, base, size)
    if title:
        figure.text(0.16 / width, 1 - 0.12 / (height + head), title, size=13, weight="bold",
                    color=INK, va="top")  # fmt: skip
        figure.text(0.16 / width, 1 - 0.42 / (height + head), subtitle, size=9.5, color=INK,
                    va="top")  # fmt: skip
    return figure


def save(figure: Figure, *paths: Path) -> None:
    """Write a figure to each path; the suffix is the format."""
    from matplotlib import rc_context

    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "megarecur"}):
            undated = {"Date": None} if path.suffix == ".svg" else None  # reproducible
            figure.savefig(path, dpi=160, facecolor="white", metadata=undated)
        figure.set_layout_engine("none")  # Compute the layout once, not for each format.


def _colours(count: int) -> list[Any]:
    if count <= len(BLOCK_COLOURS):
        return list(BLOCK_COLOURS[:count])
    import matplotlib

    scale = matplotlib.colormaps["viridis"]
    return [scale(0.9 * i / (count - 1)) for i in range(count)]


def _draw_rows(
    axes: Axes, steps: LayerMap, rows: dict[int, int], colours: list[Any], size: float
) -> None:
    """Draw a pale band per block, with its name on the left and its number of uses on the right."""
    from matplotlib.patches import Rectangle

    depth = len(steps)
    every = 1 if len(rows) <= 40 else 4
    for block, uses in count_uses(steps).items():
        row = rows[block]
        band = Rectangle((-0.5, row - 0.5), depth, 1, facecolor=colours[row], alpha=0.10, lw=0)
        axes.add_patch(band)
        if row % every == 0 or row == len(rows) - 1:
            axes.text(-0.75, row, f"block {block}", ha="right", va="center", size=size, color=INK)
            axes.text(depth - 0.25, row, f"× {uses}", va="center", size=size, color=INK)


def _draw_walk(axes: Axes, steps: LayerMap, rows: dict[int, int], cell: float) -> None:
    """Draw the line from each step to the next, lighter where it skips a row."""
    for i, (step, after) in enumerate(pairwise(steps)):
        start, end = rows[step.block], rows[after.block]
        back = abs(end - start) > 1
        axes.plot(
            [i, i + 1],
            [start, end],
            color=SOFT if back else INK,
            lw=max(cell * (2.4 if back else 3.2), 0.7),
            zorder=2,
            solid_capstyle="round",
        )


def _draw_steps(
    axes: Axes,
    steps: LayerMap,
    rows: dict[int, int],
    colours: list[Any],
    cell: float,
    size: float,
) -> None:
    from matplotlib.patches import FancyBboxPatch

    shared = max(count_uses(steps).values()) > 1
    for i, step in enumerate(steps):
        row = rows[step.block]
        colour = colours[row]
        axes.add_patch(
            FancyBboxPatch(
                (i - 0.3, row - 0.3),
                0.6,
                0.6,
                boxstyle="round,pad=0.02,rounding_size=0.14",
                facecolor=colour if step.grad else "white",
                edgecolor=colour if not step.grad else "white",
                lw=max(cell * 2.5, 0.6),
                zorder=3,
            )
        )
        if shared and cell >= 0.24:
            ink = "white" if step.grad and not _is_light(colour) else INK
            axes.text(i, row + 0.02, str(step.loop_index), ha="center", va="center",
                      size=size * 0.9, color=ink, zorder=4)  # fmt: skip
        if step.exit:
            axes.plot([i], [row - 0.45], marker="v", ms=size * 0.6, color=ACCENT, zorder=4)


def _is_light(colour: Any) -> bool:
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return bool(0.299 * red + 0.587 * green + 0.114 * blue > 0.62)


def _draw_spans(axes: Axes, spans: Sequence[Span], size: float) -> None:
    for span in spans:
        start, end, y = span.start - 0.38, span.stop - 0.62, -0.78
        axes.plot([start, start, end, end], [y + 0.14, y, y, y + 0.14], color=SOFT, lw=1.0)
        axes.text((start + end) / 2, y - 0.12, span.name, ha="center", va="bottom",
                  size=size * 0.9, color=INK)  # fmt: skip


def _draw_positions(axes: Axes, depth: int, base: float, size: float) -> None:
    every = next(e for e in (1, 2, 4, 8, 16, 32, depth) if depth / e <= 33)
    for i in range(0, depth, every):
        axes.text(i, base + 0.15, str(i), ha="center", va="top", size=size * 0.8, color=SOFT,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # fmt: skip
    axes.text(-0.75, base + 0.15, "step", ha="right", va="top", size=size * 0.8, color=SOFT)


def _draw_reads(
    axes: Axes,
    steps: LayerMap,
    rows: dict[int, int],
    name: str,
    y: float,
    cell: float,
    size: float,
) -> None:
    """Draw a rail below the map, from each step that stores a value to the last step that reads it,
    with an arrow to every step that reads it."""
    from matplotlib.patches import FancyArrowPatch

    thin = max(cell * 2, 0.8)
    sources = [i for i, step in enumerate(steps) if name in step.writes]
    readers = [i for i, step in enumerate(steps) if name in step.reads]
    for source, following in pairwise([*sources, len(steps)]):
        last = max((i for i in readers if source <= i < following), default=source)
        axes.plot([source, last], [y, y], color=ACCENT, lw=thin)
    for i in readers:
        row = rows[steps[i].block]
        arrow = FancyArrowPatch(
            (i, y),
            (i, row + 0.34),
            connectionstyle="arc3,rad=0",
            arrowstyle="-|>",
            mutation_scale=max(cell * 16, 5),
            color=ACCENT,
            alpha=0.75,
            lw=thin * 0.8,
            shrinkA=0,
            shrinkB=0,
            zorder=1.5,
        )
        axes.add_patch(arrow)
    axes.plot(sources, [y] * len(sources), "D", ms=size * 0.5, color=ACCENT)
    axes.text(-0.75, y, name, ha="right", va="center", size=size, color=ACCENT)


def _draw_norm(axes: Axes, steps: LayerMap, base: float, y: float, size: float) -> None:
    """Draw a dashed line where the hidden state passes the final norm."""
    for i, step in enumerate(steps):
        if step.normalize:
            axes.plot([i - 0.5] * 2, [-0.5, y - 0.3], color=ACCENT, lw=1.2, ls=(0, (3, 2)))
            axes.text(i - 0.5, y, "final norm", ha="center", va="center", size=size * 0.9,
                      color=ACCENT)  # fmt: skip
