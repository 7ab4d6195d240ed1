"""Drawing of a pipeline order: a row per pipeline rank, a box per operation, time to the right.

megarecur plan configs/quickstart.yaml --world-size 4 --pipeline 2 --out plan.svg
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megarecur.plan.describe import ORDER_NAMES, list_blocks
from megarecur.plan.order import Timed
from megarecur.plan.predict import LayoutPlan, complete
from megarecur.plan.simulate import Timeline
from megarecur.plan.walk import Walk
from megarecur.plot.layer_map import INK, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"F": "#0072b2", "B": "#d55e00", "I": "#e69f00", "W": "#009e73"}
"""Okabe and Ito's colours, safe for colour-blind readers."""
IDLE = "#eceff2"
NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "backward, inputs",
    "W": "backward, weights",
}
LIGHTEST = 0.62
"""Share of white in the boxes of the last loop."""
MOST_BOXES = 260
"""Maximum boxes per row in the picture of a plan."""
SMALLEST = 4.2
"""Minimum size of a legible number, in points."""


def draw_plan(plan: LayoutPlan) -> Figure:
    """Return a figure of a plan's order, titled with its name and its bubbles."""
    draft, shown = plan.draft, plan
    if 3 * len(draft.walk) * plan.simulated > MOST_BOXES * draft.layout.pipeline:
        shown = complete(draft, most_operations=0)  # The fewest micro batches with a steady state.
    of = f"{shown.simulated} of " * (shown.simulated < draft.num_microbatches)
    subtitle = (
        f"{draft.layout} on {draft.cluster.name}  ·  {of}{draft.num_microbatches} micro batches"
        "  ·  predicted, not measured"
    )
    title = f"{ORDER_NAMES[plan.choice.name]}: bubbles are {plan.bubble:.1%} of all ranks' time"
    rows = [list_blocks(rank.blocks) for rank in draft.ranks]
    return draw_timeline(shown.choice.timeline, draft.walk, title, subtitle, rows)


def draw_timeline(
    timeline: Timeline,
    walk: Walk,
    title: str = "",
    subtitle: str = "",
    rows: Sequence[str] = (),
) -> Figure:
    """Return a figure of a simulated order, legible up to about 8 ranks of 32 micro batches.

    Args:
        timeline: times in seconds.
        walk: the order's stages; later stages of a rank in a micro batch are drawn lighter.
    """
    from matplotlib.figure import Figure

    ranks, span = len(timeline.ranks), timeline.makespan
    boxes = max(sum(timed.end > timed.start for timed in ops) for ops in timeline.ranks)
    width = min(max(8.0, 0.135 * boxes + 2.6), 24.0)  # Inches.
    row = min(max(0.2, 4.2 / ranks), 0.46)
    top, bottom = (0.8 if title else 0.15), 0.92
    height = ranks * row + top + bottom
    left, right = 1.05 if rows else 0.75, 0.75
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, ranks * row / height)
    )
    axes.set_xlim(0, span)
    axes.set_ylim(ranks - 0.5, -0.5)
    inch = (width - left - right) / span  # Inches per second.
    loops = _number_loops(walk)
    _draw_boxes(axes, timeline, loops, span, inch)
    _draw_numbers(axes, timeline, loops, inch, row)
    size = min(max(row * 21, 6.0), 9.5)
    for rank in range(ranks):
        idle = 1 - timeline.busy[rank] / span
        axes.text(span + 0.09 / inch, rank, f"{idle:.0%} idle", va="center", size=size, color=INK)
        label = f"rank {rank}"
        axes.text(-0.09 / inch, rank - (0.2 if rows and row > 0.3 else 0), label, ha="right",
                  va="center", size=size, weight="bold", color=INK)  # fmt: skip
        if rows and row > 0.3:
            axes.text(-0.09 / inch, rank + 0.22, rows[rank], ha="right", va="center",
                      size=size * 0.75, color=INK)  # fmt: skip
    _draw_axis(axes, span)
    _draw_legend(figure, timeline, max(loops.values()), width, height)
    if title:
        figure.text(0.16 / width, 1 - 0.14 / height, title, size=13, weight="bold", color=INK,
                    va="top")  # fmt: skip
        figure.text(0.16 / width, 1 - 0.44 / height, subtitle, size=9.5, color=INK, va="top")
    return figure


def _number_loops(walk: Walk) -> dict[int, int]:
    """Return, by stage, the number of stages that its rank has run before in the micro batch."""
    seen: dict[int, int] = defaultdict(int)
    loops = {}
    for stage in walk:
        loops[stage.index] = seen[stage.rank]
        seen[stage.rank] += 1
    return loops


def _shade(kind: str, loop: int, loops: int) -> tuple[float, float, float]:
    """Return the colour of an operation, lighter in later loops."""
    from matplotlib.colors import to_rgb

    share = LIGHTEST * loop / loops if loops else 0.0
    red, green, blue = (value + (1 - value) * share for value in to_rgb(COLOURS[kind]))
    return red, green, blue


def _boxes(ops: Sequence[Timed]) -> list[Timed]:
    """Return the operations that take time on a rank."""
    return [timed for timed in ops if timed.op.kind in COLOURS and timed.end > timed.start]


def _draw_boxes(
    axes: Axes, timeline: Timeline, loops: dict[int, int], span: float, inch: float
) -> None:
    from matplotlib.collections import PolyCollection

    most = max(loops.values())
    idle, corners, colours = [], [], []
    for rank, ops in enumerate(timeline.ranks):
        idle.append(_corners(0, span, rank))
        for (kind, stage, _), start, end in _boxes(ops):
            gap = min(0.006 / inch, 0.1 * (end - start))  # A thin gap separates the boxes.
            corners.append(_corners(start + gap, end - gap, rank))
            colours.append(_shade(kind, loops[stage], most))
    axes.add_collection(PolyCollection(idle, facecolors=IDLE, linewidths=0))
    axes.add_collection(PolyCollection(corners, facecolors=colours, linewidths=0))


def _corners(start: float, end: float, rank: int) -> list[tuple[float, float]]:
    low, high = rank - 0.44, rank + 0.44
    return [(start, low), (end, low), (end, high), (start, high)]


def _draw_numbers(
    axes: Axes, timeline: Timeline, loops: dict[int, int], inch: float, row: float
) -> None:
    """Write the micro batch into every box, if nearly all boxes have room for it."""
    most = max(loops.values())
    texts = []
    for rank, ops in enumerate(timeline.ranks):
        for (kind, stage, microbatch), start, end in _boxes(ops):
            text = str(microbatch)
            size = min((end - start) * inch * 72 * 0.92 / (0.62 * len(text)), row * 36, 8.5)
            texts.append((size, (start + end) / 2, rank, text, _shade(kind, loops[stage], most)))
    sizes = sorted(size for size, *_ in texts)
    if sizes[len(sizes) // 10] < SMALLEST:
        return
    common = sizes[len(sizes) // 4]  # One size for all boxes but the narrowest.
    for size, x, rank, text, colour in texts:
        if size >= SMALLEST:
            ink = INK if _luminance(colour) > 0.3 else "white"
            axes.text(
                x, rank + 0.02, text, ha="center", va="center", size=min(size, common), color=ink
            )


def _luminance(colour: tuple[float, float, float]) -> float:
    """Return the relative luminance (WCAG 2)."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _draw_axis(axes: Axes, span: float) -> None:
    """Draw the time axis at the bottom, in s, ms or µs."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    power, unit = next(
        ((p, u) for p, u in ((1.0, "s"), (1e-3, "ms")) if span >= 2 * p), (1e-6, "µs")
    )
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / power:g}"))
    axes.set_yticks([])
    axes.tick_params(axis="x", colors=INK, labelsize=8.5, length=3)
    axes.set_xlabel(f"predicted time ({unit})", size=9, color=INK)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)


def _draw_legend(
    figure: Figure, timeline: Timeline, loops: int, width: float, height: float
) -> None:
    from matplotlib.patches import Patch

    found = {timed.op.kind for ops in timeline.ranks for timed in ops}
    handles: list[Any] = [
        Patch(facecolor=COLOURS[kind], label=f"{kind}  {name}")
        for kind, name in NAMES.items()
        if kind in found
    ]
    handles.append(Patch(facecolor=IDLE, edgecolor=SOFT, lw=0.5, label="idle"))
    if loops:
        lighter = _shade("F", loops, loops)
        handles.append(Patch(facecolor=lighter, label="lighter: later stages of the rank"))
    figure.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0.1 / width, 0.04 / height),
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        handlelength=1.1,
        handleheight=1.0,
        columnspacing=1.6,
        labelcolor=INK,
    )
