"""Decode and augment pictures; numpy and Pillow alone, so that worker processes start quickly.

An augmented picture is a pure function of (seed, source, picture, epoch): its random numbers are a
block of uniform draws of numpy's Philox, keyed by seed and source, at the counter of (picture,
epoch). Each purpose has draws of its own, so that switching one augmentation on leaves the others'
random choices as they are.

Definitions follow torchvision 0.28 (transforms.RandomCrop, RandomResizedCrop, RandomHorizontalFlip,
TrivialAugmentWide, Resize, CenterCrop on pictures of Pillow). Shapes: H, W pixels, C channels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from megarecur.data.mapped_files import MappedFiles, find_fault
from megarecur.errors import refuse_shortage

COLUMNS = {"image": "bytes", "label": "int32"}
"""Columns of the shards: JPEG or PNG, and the class."""
FORMATS = ("JPEG", "PNG")
MAX_PIXELS = 89_478_485
"""Maximum pixels of a picture, stored or resized: 256 MiB in RGB. Pillow only warns above it; it
refuses twice as many."""
TRIES = 10
"""Attempts of RandomResizedCrop at a window inside the picture."""
FLIP, OPERATION, MAGNITUDE, SIGN, ROW, COLUMN, WINDOWS = range(7)
"""Places of the draws; those of windows take the rest."""
NUM_DRAWS = WINDOWS + 2 * TRIES
BILINEAR, NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST
BINS = 31
"""Magnitudes of each operation of TrivialAugmentWide."""


@dataclass(frozen=True)
class Recipe:
    """The way from a picture to pixels of a fixed size, with the fields of `data.images`."""

    size: int
    """Height and width of the result."""
    channels: int
    training: bool
    """False: the short side is resized to `resize`, and the centre cut out."""
    crop: str = "none"
    padding: int = 0
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: float = 0.0
    trivial_augment: bool = False
    resize: int = 0

    @property
    def bytes_per_picture(self) -> int:
        """Bytes of the result."""
        return self.channels * self.size**2


class PictureShards:
    """The encoded pictures of a corpus, mapped into memory.

    Args:
        folder: of the shards.
        files: bytes and xxh64 of each shard, of columns COLUMNS, in order.

    Raises:
        ValueError, IndexError, OSError: a shard is damaged, or cannot be read.
    """

    def __init__(self, folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
        self.facts = files
        self.shards: list[NDArray[np.uint8]] = []
        self.offsets: list[NDArray[np.uint32]] = []
        self._files = [folder / name for name in files]
        self._mapped = MappedFiles(lambda file: find_fault(file, files[file.name], hashed=True))
        for file in self._files:
            if fault := find_fault(file, files[file.name], hashed=False):
                raise ValueError(f"{file} {fault}")
            # A plain array over the mapped file: slices of np.memmap cost several microseconds.
            content = np.asarray(np.memmap(self._mapped.add(file), np.uint8, "r"))
            count = int(content[:4].view(np.uint32)[0])
            self.offsets.append(content[4 : 8 + 4 * count].view(np.uint32))
            self.shards.append(content)
        self.sizes = [len(offsets) - 1 for offsets in self.offsets]
        self.starts = np.cumsum([0, *self.sizes])

    def read(self, number: int) -> bytes:
        """Return the content of a picture.

        Raises:
            DataError: the shard was cut or rewritten since it was mapped.
            IndexError: there is no such picture.
        """
        k = int(self.starts.searchsorted(number, "right")) - 1
        self._mapped.refuse_change(self._files[k])
        place = number - int(self.starts[k])
        begin = int(self.offsets[k][place])
        # A sample is the size of its only column of variable size, then its columns.
        head = self.shards[k][begin : begin + 4].tobytes()
        return self.shards[k][begin + 4 : begin + 4 + int.from_bytes(head, "little")].tobytes()


def check_columns(shard: dict[str, Any]) -> None:
    """Reject a shard of the index that does not hold pictures.

    Raises:
        ValueError: with its columns.
    """
    columns = dict(zip(shard["column_names"], shard["column_encodings"], strict=True))
    if columns != COLUMNS:
        raise ValueError(f"its columns are {json.dumps(columns)} instead of {json.dumps(COLUMNS)}")


def decode(content: bytes, channels: int) -> Image.Image:
    """Return a decoded picture in mode L (1 channel) or RGB (3).

    Raises:
        ValueError: the content is damaged, or has too many pixels.
    """
    try:
        image = open_picture(content)
        mode = "L" if channels == 1 else "RGB"
        if image.mode != mode:
            return image.convert(mode)
        image.load()
        return image
    except Exception as error:  # Pillow's plugins raise whatever damaged bytes lead them to.
        refuse_shortage(error, "a picture")
        raise ValueError(str(error) or type(error).__name__) from None


def open_picture(content: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open a picture, which is not decoded yet.

    Raises:
        ValueError: its header claims more than MAX_PIXELS.
        Exception: Pillow's own, of content that is no picture.
    """
    try:
        image: Image.Image = Image.open(BytesIO(content), formats=formats)
    except Image.DecompressionBombError:
        raise ValueError(f"a decompression bomb: more than {MAX_PIXELS:,} pixels") from None
    refuse_bomb(image.size)
    return image


def refuse_bomb(size: tuple[int, int]) -> None:
    """Reject a picture of more than MAX_PIXELS before it is decoded or resized.

    Raises:
        ValueError: with its size.
    """
    width, height = size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"a decompression bomb: {width:,} x {height:,} pixels, above the limit of "
            f"{MAX_PIXELS:,}"
        )


class Draws:
    """The random numbers of pictures.

    Args:
        seed: seed of the run, in [0, 2^64).
        source: place of the corpus in the mixture.
    """

    def __init__(self, seed: int, source: int) -> None:
        self._philox = np.random.Philox(key=np.array([seed, source], np.uint64))
        self._generator = np.random.Generator(self._philox)
        self._state = self._philox.state

    def of(self, picture: int, epoch: int) -> list[float]:
        """Return NUM_DRAWS numbers, uniform in [0, 1)."""
        # Setting the counter of one generator costs a quarter of making a new one.
        self._state["state"]["counter"][:] = (0, picture, epoch, 0)
        self._state["buffer_pos"] = 4
        self._philox.state = self._state
        drawn: list[float] = self._generator.random(NUM_DRAWS).tolist()
        return drawn


def write_pixels(
    content: bytes, recipe: Recipe, draws: Sequence[float], out_CHW: NDArray[np.uint8]
) -> None:
    """Write the pixels of an encoded picture, augmented in training.

    Raises:
        OSError, SyntaxError, ValueError: the content is damaged, or the picture does not fit.
    """
    image = decode(content, recipe.channels)
    if not recipe.training:
        copy_pixels(cut_centre(image, recipe.size, recipe.resize), False, out_CHW)
        return
    flip = draws[FLIP] < recipe.flip
    if recipe.trivial_augment:
        image = crop(image, recipe, draws)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        copy_pixels(trivial_augment(image, draws), False, out_CHW)
    elif recipe.crop == "padded":
        copy_padded(image, recipe, draws, flip, out_CHW)
    else:
        copy_pixels(crop(image, recipe, draws), flip, out_CHW)


def copy_pixels(image: Image.Image, flip: bool, out_CHW: NDArray[np.uint8]) -> None:
    """Copy the pixels of a picture of the right size."""
    values = np.asarray(image)
    if values.shape[:2] != out_CHW.shape[1:]:
        height, width = values.shape[:2]
        raise ValueError(
            f"it has {height} x {width} pixels (height x width), and {out_CHW.shape[1]} x "
            f"{out_CHW.shape[2]} are read"
        )
    if flip:
        values = values[:, ::-1]
    out_CHW[:] = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


# ------------------------------------------------------------------------------------------- crop


def crop(image: Image.Image, recipe: Recipe, draws: Sequence[float]) -> Image.Image:
    """Return the random window of a picture that training reads."""
    if recipe.crop == "resized":
        return crop_resized(image, recipe, draws)
    if recipe.crop == "padded":
        top, left = padded_offset(image.size, recipe, draws)
        left, top = left - recipe.padding, top - recipe.padding
        return image.crop((left, top, left + recipe.size, top + recipe.size))  # black outside
    return image


def padded_offset(size: tuple[int, int], recipe: Recipe, draws: Sequence[float]) -> tuple[int, int]:
    """Return (top, left) of a window of the padded picture (torchvision's RandomCrop).

    Raises:
        ValueError: the padded picture is smaller than the window.
    """
    width, height = (side + 2 * recipe.padding for side in size)
    if min(width, height) < recipe.size:
        raise ValueError(
            f"it has {size[1]} x {size[0]} pixels (height x width), too few for a window of "
            f"{recipe.size} with a padding of {recipe.padding}"
        )
    return (
        int(draws[ROW] * (height - recipe.size + 1)),
        int(draws[COLUMN] * (width - recipe.size + 1)),
    )


def copy_padded(
    image: Image.Image, recipe: Recipe, draws: Sequence[float], flip: bool,
    out_CHW: NDArray[np.uint8],
) -> None:  # fmt: skip
    """Copy a window of the padded picture, without making the padded picture."""
    top, left = padded_offset(image.size, recipe, draws)
    top, left = top - recipe.padding, left - recipe.padding
    values = np.asarray(image)
    rows = slice(max(top, 0), min(top + recipe.size, values.shape[0]))
    columns = slice(max(left, 0), min(left + recipe.size, values.shape[1]))
    inside = values[rows, columns]
    inside_CHW = inside[None] if inside.ndim == 2 else inside.transpose(2, 0, 1)
    if inside.shape[:2] != out_CHW.shape[1:]:
        out_CHW[:] = 0
    target = out_CHW[:, :, ::-1] if flip else out_CHW
    target[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = (
        inside_CHW
    )


def crop_resized(image: Image.Image, recipe: Recipe, draws: Sequence[float]) -> Image.Image:
    """Return a random window of random area and aspect ratio, resized (torchvision's
    RandomResizedCrop; Szegedy et al. 2015)."""
    left, top, width, height = resized_window(image.size, recipe, draws)
    window = image.crop((left, top, left + width, top + height))
    size = (recipe.size, recipe.size)
    return window if window.size == size else window.resize(size, BILINEAR)


def resized_window(
    size: tuple[int, int], recipe: Recipe, draws: Sequence[float]
) -> tuple[int, int, int, int]:
    """Return (left, top, width, height) of the window: the first of TRIES that lies inside the
    picture, or else the largest one in its centre."""
    width, height = size
    low, high = math.log(recipe.ratio[0]), math.log(recipe.ratio[1])
    for i in range(WINDOWS, NUM_DRAWS, 2):
        share = recipe.scale[0] + draws[i] * (recipe.scale[1] - recipe.scale[0])
        area, aspect = width * height * share, math.exp(low + draws[i + 1] * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(draws[ROW] * (height - h + 1)), int(draws[COLUMN] * (width - w + 1))
            return left, top, w, h
    w, h = width, height
    if width / height < recipe.ratio[0]:
        h = round(width / recipe.ratio[0])
    elif width / height > recipe.ratio[1]:
        w = round(height * recipe.ratio[1])
    return (width - w) // 2, (height - h) // 2, w, h


def cut_centre(image: Image.Image, size: int, resize: int) -> Image.Image:
    """Return the centre of a picture whose short side is resized (torchvision's Resize and
    CenterCrop)."""
    width, height = image.size
    short = min(width, height)
    if short != resize:
        width, height = (
            resize if side == short else int(resize * side / short) for side in image.size
        )
        refuse_bomb((width, height))
        image = image.resize((width, height), BILINEAR)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image.crop((left, top, left + size, top + size))


# ------------------------------------------------------------------------------ TrivialAugmentWide

Apply = Callable[[Image.Image, float], Image.Image]


def affine(image: Image.Image, matrix: Sequence[float]) -> Image.Image:
    """Return a picture whose pixel (x, y) is the input's pixel at [x, y, 1] times the rows of a
    2 x 3 matrix; black outside."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, NEAREST)


def _slope(magnitude: float) -> float:
    """Return the tangent of the angle that torchvision makes of a magnitude, as it rounds."""
    return math.tan(math.radians(math.degrees(math.atan(magnitude))))


def _posterize(image: Image.Image, bits: float) -> Image.Image:
    return ImageOps.posterize(image, int(bits))


OPERATIONS: tuple[tuple[str, Apply, float, float, bool], ...] = (
    ("Identity", lambda image, _: image, 0.0, 0.0, False),
    ("ShearX", lambda image, m: affine(image, (1, _slope(m), 0, 0, 1, 0)), 0.0, 0.99, True),
    ("ShearY", lambda image, m: affine(image, (1, 0, 0, _slope(m), 1, 0)), 0.0, 0.99, True),
    ("TranslateX", lambda image, m: affine(image, (1, 0, -int(m), 0, 1, 0)), 0.0, 32.0, True),
    ("TranslateY", lambda image, m: affine(image, (1, 0, 0, 0, 1, -int(m))), 0.0, 32.0, True),
    ("Rotate", lambda image, m: image.rotate(m, NEAREST), 0.0, 135.0, True),
    ("Brightness", lambda image, m: ImageEnhance.Brightness(image).enhance(1 + m), 0, 0.99, True),
    ("Color", lambda image, m: ImageEnhance.Color(image).enhance(1 + m), 0.0, 0.99, True),
    ("Contrast", lambda image, m: ImageEnhance.Contrast(image).enhance(1 + m), 0.0, 0.99, True),
    ("Sharpness", lambda image, m: ImageEnhance.Sharpness(image).enhance(1 + m), 0, 0.99, True),
    ("Posterize", _posterize, 8.0, 2.0, False),
    ("Solarize", lambda image, m: ImageOps.solarize(image, math.ceil(m)), 255.0, 0.0, False),
    ("AutoContrast", lambda image, _: ImageOps.autocontrast(image), 0.0, 0.0, False),
    ("Equalize", lambda image, _: ImageOps.equalize(image), 0.0, 0.0, False),
)
"""Name, function, first and last magnitude, and whether a magnitude may be negative: the wide space
of Müller and Hutter 2021, table 5, as torchvision has it."""


@cache
def magnitudes(operation: int) -> list[float]:
    """Return the BINS magnitudes of an operation, evenly spaced; those of Posterize are whole."""
    name, _, first, last, _ = OPERATIONS[operation]
    values = np.linspace(first, last, BINS)
    spaced: list[float] = (np.round(values) if name == "Posterize" else values).tolist()
    return spaced


def trivial_augment(image: Image.Image, draws: Sequence[float]) -> Image.Image:
    """Return a picture after one random operation of random magnitude."""
    operation = int(draws[OPERATION] * len(OPERATIONS))
    _, apply, _, _, signed = OPERATIONS[operation]
    magnitude = magnitudes(operation)[int(draws[MAGNITUDE] * BINS)]
    return apply(image, -magnitude if signed and draws[SIGN] < 0.5 else magnitude)
