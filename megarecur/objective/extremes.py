"""The samples of a corpus that are most worth a look: confident mistakes, and most or fewest steps.

Shapes: N samples, B rows, C classes or channels, H and W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megarecur.data.samples import TaskBatch
from megarecur.objective.by_class import steps_of_samples


@dataclass(frozen=True, eq=False)
class Shown:
    """A sample and its prediction."""

    number: int
    """Number of the sample in its corpus."""
    label: int
    predicted: int
    confidence: float
    """Probability of the predicted class."""
    steps: float | None
    """Mean number of steps of its tokens, with halting."""
    pixels_CHW: NDArray[np.float32] | None
    """The picture, normalised as the model reads it; None if the sample is none."""


class Extremes:
    """Collector of the samples of one process that a picture shows.

    Args:
        most: number of samples of each kind.
        first_grey: id of the token of black, if samples are sequences of pixels: square pictures of
            256 grey values. None: they are not.
    """

    def __init__(self, most: int = 16, first_grey: int | None = None) -> None:
        self.most, self.first_grey = most, first_grey
        self.mistakes: list[Shown] = []
        """The most confident mistakes, the worst first."""
        self.slowest: list[Shown] = []
        """Samples with the most steps, with halting."""
        self.fastest: list[Shown] = []
        """Samples with the fewest steps."""

    def add(self, logits_NC: Tensor, batch: TaskBatch, steps_B: Tensor | None) -> None:
        """Add the samples of a micro batch; those without a label are left out.

        Args:
            logits_NC: logits of its samples.
            steps_B: mean number of steps of the tokens of each row, with halting.
        """
        sides = len(batch.sample_ids_B) // len(batch.lengths_N)
        numbers_N = batch.sample_ids_B[::sides] // sides
        confidence_N, predicted_N = logits_NC.double().softmax(-1).max(-1)
        steps_N = None if steps_B is None else steps_of_samples(steps_B, batch)
        found = []
        for n in batch.scored.flatten().nonzero()[:, 0].tolist():
            pixels = self.picture(batch, n)
            found.append(
                Shown(
                    int(numbers_N[n]),
                    int(batch.labels_BS[n, 0]),
                    int(predicted_N[n]),
                    float(confidence_N[n]),
                    None if steps_N is None else float(steps_N[n]),
                    pixels,
                )
            )
        wrong = [shown for shown in found if shown.predicted != shown.label]
        self.mistakes = self.keep(self.mistakes + wrong, lambda shown: -shown.confidence)
        if steps_N is not None:
            self.slowest = self.keep(self.slowest + found, lambda shown: -(shown.steps or 0.0))
            self.fastest = self.keep(self.fastest + found, lambda shown: shown.steps or 0.0)

    def picture(self, batch: TaskBatch, n: int) -> NDArray[np.float32] | None:
        """Return the picture that a row of a micro batch is; None if it is none."""
        if batch.pixels_BCHW is not None:
            pixels: NDArray[np.float32] = batch.pixels_BCHW[n].cpu().numpy()
            return pixels
        if self.first_grey is None:
            return None
        row = batch.tokens_BS[n][batch.documents_BS[n] >= 0]
        grey = row[row >= 0].cpu().numpy() - self.first_grey  # START and END are below 0.
        side = math.isqrt(grey.size)
        if side * side != grey.size:
            return None
        return (grey.reshape(1, side, side) / 255.0).astype(np.float32)

    def keep(self, found: list[Shown], key: Callable[[Shown], float]) -> list[Shown]:
        """Return the first samples by a key; those of equal keys in the order of the corpus."""
        return sorted(found, key=lambda shown: (key(shown), shown.number))[: self.most]
