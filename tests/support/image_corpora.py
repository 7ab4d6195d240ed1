"""Tiny pictures for tests, and corpora of them."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from support.configs import make_config

from megarecur.config.run import Config
from megarecur.data_prep.images import ImageRequest, prepare_images


def draw_pixels(number: int, size: tuple[int, int] = (8, 8), channels: int = 3) -> NDArray[Any]:
    """Smooth random pixels [H, W, C], or [H, W] of one channel."""
    small = np.random.default_rng(number).integers(0, 256, (3, 3, channels), np.uint8)
    image = Image.fromarray(small if channels > 1 else small[..., 0])
    return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))


def encode(pixels: NDArray[Any], kind: str = "PNG", **options: Any) -> bytes:
    """The file of some pixels."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def write_folders(
    folder: Path, classes: int = 3, each: int = 4, size: tuple[int, int] = (8, 8), first: int = 0
) -> Path:
    """A folder of PNG pictures with a sub-folder for each class."""
    for c in range(classes):
        (folder / f"class_{c}").mkdir(parents=True, exist_ok=True)
        for i in range(each):
            pixels = draw_pixels(first + c * each + i, size)
            (folder / f"class_{c}" / f"{i}.png").write_bytes(encode(pixels))
    return folder


def make_corpus(folder: Path, **options: Any) -> Path:
    """A corpus of tiny pictures, with a validation split."""
    source = write_folders(folder / "source" / "train", **options)
    val = write_folders(folder / "source" / "val", **{**options, "each": 2, "first": 1000})
    prepare_images(ImageRequest((str(source),), (str(val),)), folder / "corpus", workers=1)
    return folder / "corpus"


def make_image_config(corpus: Path, **sections: dict[str, Any]) -> Config:
    """A tiny run that classifies pictures of 8 x 8 pixels in patches of 4."""
    task = {"kind": "image", "num_classes": 3, "image_size": 8, "patch_size": 4}
    data = {"tokenizer": "none", "seq_length": 4, "images": {"workers": 0}}
    return make_config(
        corpus,
        model={"causal": False, **sections.pop("model", {})},
        task={**task, **sections.pop("task", {})},
        data={**data, **sections.pop("data", {})},
        **sections,
    )
