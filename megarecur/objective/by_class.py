"""Scores of a classification by class: confusion matrix, top-5 accuracy, calibration, steps.

Everything is a sum over samples, added up in fp64 from values that are rounded so that no addition
rounds. A score is therefore the same for every number of replicas, to the last bit.

Shapes: N samples, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megarecur.data.samples import TaskBatch

BINS = 15
"""Bins of confidence, of equal width (Guo et al. 2017)."""
GRAIN = 1 << 20
"""Confidences and numbers of steps are rounded to multiples of 1 / GRAIN before they are summed."""
TOP = 5
MOST_ROWS = 40
"""Classes that `megarecur eval` prints."""


@dataclass(frozen=True, eq=False)
class ClassScore:
    """Sums over the samples of a corpus, by class."""

    classes: tuple[str, ...]
    """Names of the classes."""
    confusion: NDArray[np.int64]
    """Samples by class and predicted class, [C, C]."""
    in_top: int
    """Samples whose class is among the TOP likeliest."""
    bins: NDArray[np.float64]
    """Samples, correct ones and the sum of confidences by bin of confidence, [3, BINS]. The
    confidence is the probability of the predicted class."""
    steps: NDArray[np.float64] | None
    """Sum over the samples of each class of the mean number of steps of their tokens, [C]; None
    without halting."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of samples of each class, [C]."""
        found: NDArray[np.int64] = self.confusion.sum(1)
        return found

    @property
    def accuracies(self) -> NDArray[np.float64]:
        """Accuracy on the samples of each class, [C]; nan without samples."""
        return divide(np.diag(self.confusion), self.counts)

    @property
    def mean_steps(self) -> NDArray[np.float64] | None:
        """Mean number of steps of the samples of each class, [C]; nan without samples."""
        return None if self.steps is None else divide(self.steps, self.counts)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error (Guo et al. 2017, equation 3): the difference of accuracy and
        mean confidence of a bin, its absolute value averaged over samples."""
        samples, right, confidence = self.bins
        return float(np.abs(right - confidence).sum() / max(samples.sum(), 1.0))

    @property
    def values(self) -> dict[str, float]:
        """Metrics by name. Top-5 accuracy is given of more than five classes."""
        total = max(int(self.confusion.sum()), 1)
        found = {}
        if len(self.classes) > TOP:
            found["top5_accuracy"] = self.in_top / total
        found["calibration_error"] = self.calibration_error
        if self.steps is not None:
            found["halting_depth"] = float(self.steps.sum()) / total
        return found

    def table(self) -> list[str]:
        """Return a line for each class: its name, samples, accuracy, and mean steps with halting.
        Of many classes these are the MOST_ROWS with the lowest accuracy."""
        counts, accuracies, steps = self.counts, self.accuracies, self.mean_steps
        numbers = list(range(len(counts)))
        if len(counts) > MOST_ROWS:
            numbers = np.argsort(accuracies, kind="stable")[:MOST_ROWS].tolist()  # nan comes last.
        width = max(5, *(len(self.classes[number]) for number in numbers))
        head = f"{'class':<{width}}  samples  accuracy" + "  steps" * (steps is not None)
        if len(counts) > MOST_ROWS:
            head += f"  (the lowest of {len(counts)})"
        lines = [head]
        for number in numbers:
            line = f"{self.classes[number]:<{width}}  {counts[number]:>7}  "
            line += f"{accuracies[number]:>8.4f}"
            lines.append(line if steps is None else f"{line}  {steps[number]:>5.2f}")
        return lines

    def describe(self) -> dict[str, Any]:
        """Return the score as plain values for a JSON file; None stands for nan."""
        steps = self.mean_steps
        counts, accuracies, rows = self.counts, self.accuracies, []
        for number, name in enumerate(self.classes):
            row = {"class": name, "samples": int(counts[number]),
                   "accuracy": plain(accuracies[number])}  # fmt: skip
            rows.append(row if steps is None else row | {"steps": plain(steps[number])})
        return {**self.values, "classes": rows, "confusion": self.confusion.tolist()}

    def __add__(self, other: ClassScore) -> ClassScore:
        """Return the combined score of two corpora."""
        steps = self.steps
        if steps is not None and other.steps is not None:
            steps = steps + other.steps
        return ClassScore(
            self.classes,
            self.confusion + other.confusion,
            self.in_top + other.in_top,
            self.bins + other.bins,
            steps,
        )


@dataclass
class ClassSums:
    """The sums of a `ClassScore` as tensors, to which micro batches are added."""

    confusion: Tensor
    """fp64 [C, C]."""
    in_top: Tensor
    """fp64 [1]."""
    bins: Tensor
    """fp64 [3, BINS]."""
    steps: Tensor
    """fp64 [C]."""
    halts: Tensor
    """fp64 [1], the number of samples whose steps are known."""

    @staticmethod
    def size(num_classes: int) -> int:
        """Return how many numbers the sums are."""
        return num_classes * num_classes + 3 * BINS + num_classes + 2

    @classmethod
    def over(cls, flat: Tensor, num_classes: int) -> ClassSums:
        """Return the sums as views of a flat tensor, fp64 [size]."""
        C = num_classes
        parts = flat.split([C * C, 1, 3 * BINS, C, 1])
        return cls(parts[0].view(C, C), parts[1], parts[2].view(3, BINS), parts[3], parts[4])

    def add(self, logits_NC: Tensor, batch: TaskBatch, steps_B: Tensor | None) -> None:
        """Add the predictions of a micro batch.

        Args:
            logits_NC: logits of its samples.
            batch: the micro batch; samples without a label are not counted.
            steps_B: mean number of steps of the tokens of each row, with halting.
        """
        kept = batch.scored.flatten()
        labels, logits = batch.labels_BS.flatten()[kept], logits_NC[kept].to(torch.float64)
        predicted = logits.argmax(-1)
        confidence = round_to_grain(logits.softmax(-1).gather(1, predicted[:, None])[:, 0])
        ones = torch.ones_like(confidence)
        C = len(self.confusion)
        self.confusion.view(-1).index_add_(0, labels * C + predicted, ones)
        likeliest = logits.topk(min(TOP, C), dim=-1).indices
        self.in_top += (likeliest == labels[:, None]).sum()
        bin_of = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
        right = (predicted == labels).to(torch.float64)
        for row, values in zip(self.bins, (ones, right, confidence), strict=True):
            row.index_add_(0, bin_of, values)
        if steps_B is not None:
            steps = steps_of_samples(steps_B, batch)[kept]
            self.steps.index_add_(0, labels, round_to_grain(steps))
            self.halts += len(steps)

    def score(self, classes: list[str]) -> ClassScore:
        """Return the sums as a score."""
        numbers = {n: getattr(self, n).cpu().numpy() for n in ("confusion", "bins", "steps")}
        return ClassScore(
            tuple(classes),
            np.rint(numbers["confusion"]).astype(np.int64),
            round(self.in_top.item()),
            numbers["bins"],
            numbers["steps"] if self.halts.item() else None,
        )


def steps_of_samples(steps_B: Tensor, batch: TaskBatch) -> Tensor:
    """Return the mean number of steps of each sample, fp64 [N]; the mean of both sides of a
    pair."""
    return steps_B.to(torch.float64).view(len(batch.lengths_N), -1).mean(1)


def round_to_grain(values: Tensor) -> Tensor:
    """Round values to multiples of 1 / GRAIN, whose sums in fp64 are exact."""
    return (values * GRAIN).round() / GRAIN


def divide(sums: NDArray[Any], counts: NDArray[Any]) -> NDArray[np.float64]:
    """Return sums / counts; nan where a count is 0."""
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def plain(value: float) -> float | None:
    """Return a number for JSON, which has no nan."""
    return None if np.isnan(value) else float(value)
