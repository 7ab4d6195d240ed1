"""Grey pictures as text: a word for each grey value, row by row, as Long Range Arena reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

WORDS = tuple(map(str, range(256)))
"""Words of the tokenizer, by grey value."""
SPELLING = np.array(WORDS)


def to_grey(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the grey values, uint8 [H, W], of a picture [H, W, 3] of red, green and blue.

    These are the bytes of `tf.image.rgb_to_grayscale`, with which Long Range Arena reads CIFAR-10:
    0.2989 R + 0.5870 G + 0.1140 B of values in [0, 1], times 255.5, cut to a whole number.
    """
    weights = np.array([0.2989, 0.5870, 0.1140], np.float32)
    shares = picture.astype(np.float32) / np.float32(255.0)
    grey: NDArray[Any] = shares @ weights * np.float32(255.5)
    return grey.astype(np.uint8)


def spell(picture: NDArray[np.uint8]) -> str:
    """Return the text of a grey picture [H, W]: its values from left to right, row by row."""
    return " ".join(SPELLING[picture.reshape(-1)].tolist())
