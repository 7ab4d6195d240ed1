"""Pictures of a run's scores: on tasks by depth, and perplexity by length of the samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megarecur.plot.layer_map import ACCENT, BLOCK_COLOURS
from megarecur.plot.run import new_panels, plain_numbers, set_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]
"""A row of scores.jsonl."""


def draw_scores(rows: Sequence[Row], title: str) -> Figure:
    """Plot the scores of tasks by depth with their standard errors, a panel for each metric.

    Args:
        rows: one row for each task, metric and depth; a depth of None has no loops.
    """
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    depths = sorted({row["depth"] for row in rows if row["depth"] is not None})
    figure, all_axes = new_panels(len(metrics), height=2.6 * len(metrics) + 0.8)
    for axes, metric in zip(all_axes, metrics, strict=True):
        for number, task in enumerate(tasks):
            own = [row for row in rows if (row["task"], row["metric"]) == (task, metric)]
            points = sorted((row["depth"] or 0, row["value"], row["stderr"] or 0.0) for row in own)
            points = [point for point in points if math.isfinite(point[1])]
            if not points:
                continue
            at, y, errors = zip(*points, strict=True)
            # Equal scores of several tasks stay visible side by side.
            x = [loops + 0.03 * (number - (len(tasks) - 1) / 2) for loops in at]
            colour = BLOCK_COLOURS[number % len(BLOCK_COLOURS)]
            axes.errorbar(x, y, errors, color=colour, lw=1.4, marker="o", ms=4, capsize=3,
                          label=task)  # fmt: skip
        axes.set_ylabel(metric)
        if metric.startswith("perplexity"):
            axes.set_yscale("log")
            plain_numbers(axes.yaxis)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    set_title(all_axes[0], title)
    all_axes[-1].set_xticks(depths or [0], [str(depth) for depth in depths] or ["no loops"])
    all_axes[-1].set_xlabel("loops")
    all_axes[-1].margins(x=0.1)
    return figure


def draw_lengths(perplexities: Mapping[str, Mapping[int, float]]) -> Figure:
    """Plot perplexity over the length of the samples.

    Args:
        perplexities: perplexity by length, by title.
    """
    figure, (axes,) = new_panels(1, width=8.0, height=4.6)
    for number, (title, values) in enumerate(perplexities.items()):
        colour = [ACCENT, *BLOCK_COLOURS[1:]][number % len(BLOCK_COLOURS)]
        axes.plot(list(values), list(values.values()), color=colour, lw=1.4, marker="o", ms=4,
                  label=title)  # fmt: skip
    lengths = sorted({length for values in perplexities.values() for length in values})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("tokens of a sample")
    axes.set_ylabel("perplexity")
    axes.legend(frameon=False)
    set_title(axes, "perplexity by length of the samples")
    return figure
