"""Pictures of classifications: confusion matrices of any size, samples with captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megarecur.plot.classes import MOST_NUMBERS, Tile, denormalise, draw_confusion, draw_tiles
from megarecur.plot.layer_map import save


@pytest.mark.parametrize("number", [2, 10, 100])
def test_a_confusion_matrix_of_any_size(tmp_path: Path, number: int) -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 30, (number, number)) + 90 * np.eye(number, dtype=int)
    counts[0] = 0  # a class without samples
    names = [f"class ${n}" for n in range(number)]
    figure = draw_confusion(counts, names, "data/" * 40 + "val")
    axes = figure.axes[0]
    texts = [text.get_text() for text in axes.texts]
    assert len(texts) == (np.count_nonzero(counts) if number <= MOST_NUMBERS else 0)
    assert (str(counts[1, 1]) in texts) == (number <= MOST_NUMBERS)
    assert f"{100 * np.trace(counts) / counts.sum():.1f} %" in axes.get_title(loc="left")
    assert "data/val\n" in axes.get_title(loc="left") and len(axes.get_title(loc="left")) < 200
    save(figure, tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").stat().st_size > 1000


def test_tiles_are_the_pictures_before_normalisation(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    picture = rng.random((5, 4, 3))
    pixels = ((picture - mean) / std).transpose(2, 0, 1)
    assert np.allclose(denormalise(pixels, mean, std), picture)
    assert denormalise(pixels[:1], mean[:1], std[:1]).shape == (5, 4)
    tiles = [Tile(picture, "3: cat\ndog $99.1 %", True)] * 9
    figure = draw_tiles([("mistakes", tiles), ("nothing", []), ("steps", tiles[:2])])
    drawn = [axes for axes in figure.axes if axes.images]
    assert len(drawn) == 11 and np.allclose(drawn[0].images[0].get_array(), picture)
    assert drawn[0].get_title() == "3: cat\ndog $99.1 %"
    save(figure, tmp_path / "tiles.png")
