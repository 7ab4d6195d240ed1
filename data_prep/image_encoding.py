"""Turn a picture of any format into the bytes that a corpus keeps, and measure it.

JPEG and PNG are kept byte for byte unless a picture must change: a rotation by its EXIF tag, alpha,
16 bits, CMYK, a new size. Then JPEG becomes JPEG again, all else PNG, which loses nothing.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps

from megarecur.data.pictures import open_picture, refuse_bomb
from megarecur.errors import ConfigError
from megarecur.reading import read_bytes

QUALITY = 95
KEPT_MODES = ("1", "L", "RGB", "P")
UNSAFE = ("EPS", "WMF", "PDF", "MPEG")
"""Formats that are not pictures, or that Pillow hands to another program."""
LEVELS = np.arange(256, dtype=np.int64)


class DamagedPicture(Exception):
    """Raised for content that cannot be decoded; the message says why."""


@dataclass(frozen=True)
class Encoding:
    """Options of what becomes of a picture.

    Raises:
        ConfigError: the background is no colour, or the size is out of range.
    """

    channels: int | None = None
    """Channels that statistics are measured of: 1 or 3. None: grey ones count for all channels."""
    resize: int | None = None
    """Pixels of the short side; None keeps the size."""
    background: str = "white"
    """Colour below transparent pixels, as CSS names it or as #rrggbb."""

    def __post_init__(self) -> None:
        try:
            ImageColor.getrgb(self.background)
        except ValueError:
            raise ConfigError(
                f"--background {self.background}: is no colour; name one, such as white or #808080"
            ) from None


AS_STORED = Encoding()


@dataclass(frozen=True)
class Picture:
    """A picture as it is kept."""

    content: bytes
    """JPEG or PNG."""
    height: int
    width: int
    grey: bool
    sums_3: NDArray[np.int64]
    """Sum of the values (0 to 255) of each channel; grey counts three times."""
    squares_3: NDArray[np.int64]
    """Sum of their squares."""


@cache
def readable_formats() -> tuple[str, ...]:
    """Return the formats that Pillow decodes by itself."""
    Image.init()
    return tuple(name for name in Image.ID if name not in UNSAFE)


@cache
def readable_suffixes() -> frozenset[str]:
    """Return the suffixes of such files, in lower case."""
    formats = readable_formats()
    return frozenset(s for s, name in Image.registered_extensions().items() if name in formats)


def encode_picture(source: bytes | Path | NDArray[Any], encoding: Encoding) -> Picture:
    """Decode a picture, to be sure that it is whole, and return what is kept of it.

    Args:
        source: a file, its content, or pixels [H, W] or [H, W, C], uint8.

    Raises:
        DamagedPicture: truncated or unknown content, a decompression bomb, no regular file, or one
            of more than reading.MAX_BYTES.
        OSError: the file cannot be read.
    """
    if isinstance(source, Path):
        try:
            source = read_bytes(source)
        except ValueError as error:
            raise DamagedPicture(str(error)) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of tags that it cannot read.
            if isinstance(source, np.ndarray):
                return _encode(Image.fromarray(np.ascontiguousarray(source)), b"", encoding)
            with open_picture(source, readable_formats()) as image:
                image.load()
                return _encode(image, source, encoding)
    except DamagedPicture:
        raise
    except Image.UnidentifiedImageError:
        raise DamagedPicture("it is no picture of a known format") from None
    except Exception as error:  # Pillow's plugins raise whatever damaged bytes lead them to.
        reason = str(error) or type(error).__name__
        raise DamagedPicture(reason.replace("\n", " ")) from None


def _encode(image: Image.Image, content: bytes, encoding: Encoding) -> Picture:
    """Return what is kept of a decoded picture."""
    lossy = image.format in ("JPEG", "MPO")
    kept = image.format in ("JPEG", "PNG") and not getattr(image, "is_animated", False)
    kept = kept and image.mode in KEPT_MODES and "transparency" not in image.info
    upright = _turn_upright(image)
    kept = kept and upright is image
    flat = flatten(upright, encoding.background)
    if encoding.resize is not None and min(flat.size) != encoding.resize:
        size = size_of_short_side(flat.size, encoding.resize)
        refuse_bomb(size)
        flat, kept = flat.resize(size, BILINEAR), False
    grey = flat.mode == "L"
    measured = flat
    if encoding.channels is not None:
        measured = to_channels(flat, encoding.channels)
    counts = np.array(measured.histogram(), np.int64).reshape(-1, 256)
    ones = np.ones((3 // len(counts), 1), np.int64)
    return Picture(
        content=content if kept else _write(flat, lossy),
        height=flat.height,
        width=flat.width,
        grey=grey,
        sums_3=(ones * (counts @ LEVELS)).reshape(3),
        squares_3=(ones * (counts @ LEVELS**2)).reshape(3),
    )


BILINEAR = Image.Resampling.BILINEAR


def size_of_short_side(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Return (width, height) of a picture whose short side is resized, as torchvision's Resize
    rounds it: the long side is truncated."""
    width, height = size
    if width <= height:
        return short, max(int(short * height / width), short)
    return max(int(short * width / height), short), short


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Return a picture with 1 channel (mode L) or 3 (mode RGB)."""
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _turn_upright(image: Image.Image) -> Image.Image:
    """Return a picture turned as its EXIF tag says; the picture itself if it has none."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # A damaged tag beside sound pixels.
        return image
    return image if orientation not in range(2, 9) else ImageOps.exif_transpose(image)


def flatten(image: Image.Image, background: str) -> Image.Image:
    """Return a picture in mode L or RGB: palettes resolved, 16 bits scaled to 8, transparent pixels
    composited on a background.

    Raises:
        DamagedPicture: pixels without a fixed range.
    """
    mode = image.mode
    if mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if mode == "1":
        return image.convert("L")
    if mode.startswith("I") or mode == "F":
        return _scale(image)
    if mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        below = Image.new("RGBA", layer.size, ImageColor.getrgb(background))
        whole = Image.alpha_composite(below, layer).convert("RGB")
        colour = ImageColor.getrgb(background)
        is_grey = mode in ("L", "LA", "La") and len(set(colour[:3])) == 1
        return whole.getchannel(0) if is_grey else whole
    return image.convert("RGB")


def _scale(image: Image.Image) -> Image.Image:
    """Return a picture of 16 bits as one of 8."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
        raise DamagedPicture(
            f"mode {image.mode} with values from {values.min():g} to {values.max():g}, which is "
            "neither 8 nor 16 bits"
        )
    return Image.fromarray(np.round(values / 257.0).astype(np.uint8))


def _write(image: Image.Image, lossy: bool) -> bytes:
    """Return a picture as JPEG or as PNG."""
    file = BytesIO()
    if lossy:
        image.save(file, "JPEG", quality=QUALITY, subsampling=0)
    else:
        Image.fromarray(np.asarray(image)).save(file, "PNG")  # without its metadata
    return file.getvalue()
