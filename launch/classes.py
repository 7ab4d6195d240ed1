"""Write the score of a classifier to files: `megarecur eval RUN --draw FOLDER`.

    scores.json     accuracy, calibration, scores of classes, confusion matrix
    confusion.png   the confusion matrix
    mistakes.png    the most confident mistakes, if samples are pictures
    steps.png       pictures that take the most and the fewest steps, with halting

Each corpus and depth has a folder of its own if there are several.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megarecur.files import open_replacement
from megarecur.objective.extremes import Extremes, Shown
from megarecur.objective.task import TaskScore
from megarecur.plot.classes import Tile, denormalise, draw_confusion, draw_tiles, shorten
from megarecur.plot.layer_map import save


@dataclass(frozen=True)
class Scored:
    """The score of a corpus, and the samples that pictures show."""

    name: str
    """Name of its folder, if there are several."""
    title: str
    score: TaskScore
    extremes: Extremes
    mean: Sequence[float]
    """Mean of each channel that normalisation subtracts from pictures."""
    std: Sequence[float]


def write_scores(folder: Path, found: Sequence[Scored]) -> list[Path]:
    """Write the scores of some corpora; return the files written."""
    written = []
    for scored in found:
        own = folder / scored.name if len(found) > 1 else folder
        own.mkdir(parents=True, exist_ok=True)
        written += write_score(own, scored)
    return written


def write_score(folder: Path, scored: Scored) -> list[Path]:
    """Write the score of one corpus; return the files written."""
    by_class = scored.score.by_class
    assert by_class is not None
    classes = by_class.classes
    values = {"corpus": scored.title, "samples": scored.score.samples, **scored.score.values}
    files = [folder / "scores.json", folder / "confusion.png"]
    with open_replacement(files[0]) as file:
        file.write(json.dumps(values | by_class.describe(), indent=1).encode())
    save(draw_confusion(by_class.confusion, classes, scored.title), files[1])
    extremes = scored.extremes

    def tiles(found: Sequence[Shown]) -> list[Tile]:
        return [tile(shown, classes, scored.mean, scored.std) for shown in found
                if shown.pixels_CHW is not None]  # fmt: skip

    for name, groups in (
        ("mistakes", [("The most confident mistakes", tiles(extremes.mistakes))]),
        (
            "steps",
            [
                ("The most steps", tiles(extremes.slowest)),
                ("The fewest steps", tiles(extremes.fastest)),
            ],
        ),
    ):
        if any(group for _, group in groups):
            files.append(folder / f"{name}.png")
            save(draw_tiles(groups), files[-1])
    return files


def tile(shown: Shown, classes: Sequence[str], mean: Sequence[float], std: Sequence[float]) -> Tile:
    """Return a sample as a tile of a picture."""
    assert shown.pixels_CHW is not None
    label, predicted = (shorten(classes[i], 16) for i in (shown.label, shown.predicted))
    wrong = shown.label != shown.predicted
    lines = [f"{shown.number}: {label}"]
    lines.append(f"{predicted} {100 * shown.confidence:.1f} %" if wrong else "right")
    if shown.steps is not None:
        lines.append(f"{shown.steps:.2f} steps")
    return Tile(denormalise(shown.pixels_CHW, mean, std), "\n".join(lines), wrong)
