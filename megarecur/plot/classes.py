"""Pictures of a classification: its confusion matrix, and single samples with their predictions.

megarecur eval runs/cifar10 --draw scores/
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megarecur.plot.layer_map import ACCENT, INK, SOFT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_NAMES, MOST_NUMBERS = 60, 20
"""Classes up to which they are named, and up to which cells have a number."""
COLUMNS = 8
"""Samples side by side."""


class Tile(NamedTuple):
    """A sample in a picture."""

    pixels: NDArray[Any]
    """[H, W, 3], or [H, W] of a grey picture, with values in [0, 1]."""
    caption: str
    wrong: bool = False
    """Whether the caption is coloured."""


def draw_confusion(counts: NDArray[np.int64], classes: Sequence[str], title: str = "") -> Figure:
    """Return a figure of a confusion matrix: rows are classes, columns are predictions.

    Colours are shares of a row. Numbers are counts; classes of many are neither named nor numbered.

    Args:
        counts: [C, C].
    """
    from matplotlib.figure import Figure

    number = len(classes)
    size = min(max(0.42 * number, 3.0), 12.0)
    names = [shorten(name) for name in classes]
    margin = 0.085 * max(map(len, names)) if number <= MOST_NAMES else 0.3
    figure = Figure(
        figsize=(size + margin + 1.7, size + margin + 1.0), facecolor="white", layout="constrained"
    )
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    largest = 1.0 if number <= MOST_NUMBERS else max(float(shares.max()), 1e-3)
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=largest)
    if number <= MOST_NUMBERS:
        for row, column in np.argwhere(counts).tolist():
            colour = "white" if shares[row, column] > 0.55 else INK
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", size=7,
                      color=colour)  # fmt: skip
    shows = number <= MOST_NAMES
    axes.set_xticks(range(number) if shows else [], names if shows else [], rotation=90)
    axes.set_yticks(range(number) if shows else [], names if shows else [])
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set(fontsize=8 if number <= 30 else 6, parse_math=False)
    axes.tick_params(length=0, colors=INK)
    for spine in axes.spines.values():
        spine.set_color(SOFT)
    axes.set_xlabel("predicted class", color=INK, size=9)
    axes.set_ylabel("class", color=INK, size=9)
    right, room = np.trace(counts) / max(counts.sum(), 1), int((size + margin) / 0.1)
    title = title if len(title) <= room else f"…{title[1 - room :]}"
    axes.set_title(
        f"{title}\n{100 * right:.1f} % of {counts.sum():,} right".strip(), loc="left", size=10,
        weight="bold", color=INK,
    )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, shrink=0.7, label="share of the class")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=INK, length=2)
    return figure


def draw_tiles(groups: Sequence[tuple[str, Sequence[Tile]]]) -> Figure:
    """Return a figure of samples with captions, group below group, each with a title."""
    from matplotlib.figure import Figure

    groups = [(title, tiles) for title, tiles in groups if tiles]
    heights = [math.ceil(len(tiles) / COLUMNS) for _, tiles in groups]
    figure = Figure(
        figsize=(1.25 * COLUMNS, sum(1.75 * height + 0.4 for height in heights)),
        facecolor="white", layout="constrained",
    )  # fmt: skip
    parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (title, tiles), height in zip(parts, groups, heights, strict=True):
        part.suptitle(title, x=0.01, ha="left", size=10, weight="bold", color=INK)
        all_axes = part.subplots(height, COLUMNS, squeeze=False)
        for axes in all_axes.flat:
            axes.axis("off")
        for axes, tile in zip(all_axes.flat, tiles, strict=False):
            axes.imshow(tile.pixels, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
            colour = ACCENT if tile.wrong else INK
            axes.set_title(tile.caption, size=7, color=colour, parse_math=False)
    return figure


def shorten(name: str, most: int = 24) -> str:
    """Return a name of at most some characters."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def denormalise(
    pixels_CHW: NDArray[Any], mean: Sequence[float], std: Sequence[float]
) -> NDArray[Any]:
    """Return a picture as it was before normalisation, for `Tile.pixels`.

    Args:
        pixels_CHW: (x - mean) / std by channel, of x in [0, 1].
        mean: mean of each channel.
        std: standard deviation of each channel.
    """
    scaled = pixels_CHW * np.reshape(std, (-1, 1, 1)) + np.reshape(mean, (-1, 1, 1))
    picture: NDArray[Any] = np.clip(scaled, 0.0, 1.0).transpose(1, 2, 0)
    return picture[..., 0] if picture.shape[-1] == 1 else picture
