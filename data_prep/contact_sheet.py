"""Draw pictures of a corpus with their classes, for a look at what a model will read."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megarecur.data.corpus import read_manifest
from megarecur.data.fit import IMAGE
from megarecur.data.images import ImageCorpus
from megarecur.errors import DataError
from megarecur.files import replace_file

COLUMNS, ROWS = 10, 6
CELL, GAP, TEXT = 112, 8, 18
"""Pixels of a picture's side, between pictures, and of a line of text."""


def draw_corpus(path: str | Path, file: Path, seed: int = 1) -> None:
    """Write a contact sheet: pictures drawn from all classes in turn, each above its class.

    Args:
        file: a .png file.

    Raises:
        DataError: the corpus holds no pictures or is damaged, or the file has another suffix.
    """
    held = read_manifest(path).task
    if held is None or held["kind"] != IMAGE:
        raise DataError(f"{path}: holds no pictures to draw; leave --draw out")
    if file.suffix.lower() != ".png":
        raise DataError(f"--draw {file}: a contact sheet is a .png; name such a file")
    corpus = ImageCorpus(path, verify=False)
    numbers = choose(corpus, COLUMNS * ROWS, seed)
    rows = -(-len(numbers) // COLUMNS)
    step, height = CELL + GAP, CELL + GAP + TEXT
    sheet = Image.new("RGB", (GAP + COLUMNS * step, GAP + TEXT + GAP + rows * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    title = f"{corpus.path}: {len(numbers)} of {corpus.num_samples:,} pictures"
    pen.text((GAP, GAP), title, fill="black", font=font)
    for place, number in enumerate(numbers):
        left = GAP + place % COLUMNS * step
        top = GAP + TEXT + GAP + place // COLUMNS * height
        picture = fit(corpus.picture(number))
        sheet.paste(picture, (left, top + CELL - picture.height))
        name = shorten(corpus.classes[int(corpus.labels[number])], font)
        pen.text((left, top + CELL), name, fill="black", font=font)
    content = BytesIO()
    sheet.save(content, "PNG")
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, content.getvalue())


def choose(corpus: ImageCorpus, count: int, seed: int) -> list[int]:
    """Return numbers of pictures, one of each class in turn, until there are `count`."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(corpus.num_samples)
    labels = corpus.labels[order]
    # The place of each picture among those of its class, in this random order.
    by_class = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[by_class], labels[by_class])
    ranks = np.empty_like(by_class)
    ranks[by_class] = np.arange(len(order)) - starts
    chosen: list[int] = order[np.lexsort((labels, ranks))[:count]].tolist()
    return chosen


def fit(picture: Image.Image) -> Image.Image:
    """Return a picture that fills a cell: small ones are enlarged by a whole factor, unblurred."""
    factor = CELL // max(picture.size)
    if factor:
        return picture.resize((picture.width * factor, picture.height * factor), 0)
    copy = picture.copy()
    copy.thumbnail((CELL, CELL))
    return copy


def shorten(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Return the beginning of a name that fits below a picture."""
    if font.getlength(name) <= CELL:
        return name
    while name and font.getlength(name + "...") > CELL:
        name = name[:-1]
    return name + "..."
