"""Picture of the cross-attention of a translation: one panel per use of a decoder block.

megarecur translate runs/de-en --source val.de --draw attention.png
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from megarecur.plot.layer_map import ACCENT, INK, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
"""Panels side by side."""
MOST_LABELS = 60
"""Tokens of a side that are named; more of them would overlap."""


class Panel(NamedTuple):
    """The attention of one use of a block."""

    block: int
    loop: int
    weights: Any
    """Array [target tokens, source tokens]; rows sum to 1."""


def draw_cross_attention(
    panels: Sequence[Panel], source: Sequence[str], target: Sequence[str], title: str = ""
) -> Figure:
    """Return a figure with a heat map for each panel, in the order of the map.

    The source token with the largest weight of each row has a frame, so that the alignment is
    visible where weights are small.

    Args:
        source: the source tokens, columns of the panels.
        target: the predicted tokens, rows of the panels.
    """
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = 1.2 + 0.2 * min(len(source), MOST_LABELS)
    height = 1.2 + 0.2 * min(len(target), MOST_LABELS)
    figure = Figure(
        figsize=(columns * width + 0.8, rows * height + 0.5), facecolor="white",
        layout="constrained",
    )  # fmt: skip
    image = None
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        image = axes.imshow(panel.weights, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
        axes.set_title(f"block {panel.block}, loop {panel.loop}", fontsize=9, color=INK)
        _name_tokens(axes, source, target, number % columns == 0)
        _frame_largest(axes, panel.weights)
    if image is not None:
        figure.colorbar(image, ax=figure.axes, shrink=0.6, label="weight, mean over heads")
    if title:
        figure.suptitle(title, fontsize=10, color=INK)
    return figure


def _name_tokens(
    axes: Axes, source: Sequence[str], target: Sequence[str], names_target: bool
) -> None:
    """Write tokens at the ticks, as plain text whatever they contain."""
    shows_target = names_target and len(target) <= MOST_LABELS
    axis: Any
    for axis, tokens, shows in (
        (axes.xaxis, source, len(source) <= MOST_LABELS),
        (axes.yaxis, target, shows_target),
    ):
        axis.set_ticks(range(len(tokens)) if shows else [])
        if shows:
            axis.set_ticklabels([_plain(token) for token in tokens])
            for label in axis.get_ticklabels():
                label.set(fontsize=7, parse_math=False)
    axes.tick_params(axis="x", rotation=90, length=0)
    axes.tick_params(axis="y", length=0)
    for spine in axes.spines.values():
        spine.set_color(SOFT)


def _plain(token: str) -> str:
    """Return a token without characters that no font has."""
    return "".join(c if c.isprintable() else "�" for c in token.replace("▁", "_")) or " "


def _frame_largest(axes: Axes, weights: Any) -> None:
    """Frame the largest weight of each row."""
    from matplotlib.patches import Rectangle

    for row, values in enumerate(weights):
        column = int(values.argmax())
        axes.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1.0, 1.0, fill=False, edgecolor=ACCENT, lw=0.6)
        )
