"""The objective of a task on labelled samples: its loss terms and its score on a corpus.

Shapes: B samples, S positions, D hidden, M labels, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megarecur.batch import Batch
from megarecur.config.run import Config
from megarecur.data.corpus import Corpus
from megarecur.data.samples import TaskBatch, TaskCorpus
from megarecur.objective.auxiliary import z_terms
from megarecur.objective.by_class import ClassScore, ClassSums
from megarecur.objective.extremes import Extremes
from megarecur.objective.next_token import (
    STEPS,
    AddUp,
    NextToken,
    Ran,
    TextScore,
    bit_lengths,
)
from megarecur.objective.readout import Readout
from megarecur.parallel.head_loss import Target
from megarecur.parallel.loss import LossTerm, cross_entropy


@dataclass(frozen=True)
class TaskScore:
    """The score of a task on a corpus. Its fields are sums, so that scores can be added."""

    kind: str
    loss: float
    """Sum over labels, in nats."""
    labels: int
    right: int
    """Number of correct scored predictions."""
    scored: int
    """Number of scored predictions."""
    by_length: tuple[tuple[int, int], ...]
    """(right, scored) for samples of 0, 1, 2 to 3, 4 to 7, ... tokens."""
    last_right: int = 0
    """Number of samples whose last scored prediction is correct, used for kind token."""
    samples: int = 0
    by_class: ClassScore | None = None
    """The score by class, of tasks that classify whole samples."""

    @property
    def values(self) -> dict[str, float]:
        """Metrics by name. `glitch_rate` is the share of wrong reads (Liu et al. 2023)."""
        found = {
            "loss": self.loss / max(self.labels, 1),
            "accuracy": self.right / max(self.scored, 1),
        }
        if self.kind == "token":
            found["glitch_rate"] = 1.0 - found["accuracy"]
            found["last_accuracy"] = self.last_right / max(self.samples, 1)
        if self.by_class is not None:
            found |= self.by_class.values
        for bits, (right, scored) in enumerate(self.by_length):
            if scored and self.kind != "image":  # All pictures have one size.
                low, high = (1 << bits) >> 1, (1 << bits) - 1
                found[f"accuracy_by_length/{low}-{high}"] = right / scored
        return found

    def lines(self, title: str, step: int) -> list[str]:
        """Return the lines that `megarecur eval` prints, each with a title such as the corpus's
        path."""
        values = self.values
        by_length = {name: values.pop(name) for name in list(values) if "/" in name}
        by_class = {} if self.by_class is None else self.by_class.values
        values = {name: value for name, value in values.items() if name not in by_class}
        further = "  ".join(f"{name.replace('_', ' ')} {v:.4f}" for name, v in by_class.items())
        table = [] if self.by_class is None else self.by_class.table()
        text = "  ".join(f"{name.replace('_', ' ')} {v:.4f}" for name, v in values.items())
        return [
            f"{title} {text}  ({self.scored} predictions, step {step})",
            *(
                f"{title} {name.partition('/')[2]} tokens: accuracy {value:.4f}"
                for name, value in by_length.items()
            ),
            *([f"{title} {further}"] if further else []),
            *(f"  {line}" for line in table),
        ]

    def __add__(self, other: TaskScore) -> TaskScore:
        """Return the combined score of two corpora."""
        longest = max(len(self.by_length), len(other.by_length))
        parts = [(*s.by_length, *[(0, 0)] * (longest - len(s.by_length))) for s in (self, other)]
        return TaskScore(
            self.kind,
            self.loss + other.loss,
            self.labels + other.labels,
            self.right + other.right,
            self.scored + other.scored,
            tuple((a + c, b + d) for (a, b), (c, d) in zip(*parts, strict=True)),
            self.last_right + other.last_right,
            self.samples + other.samples,
            self.by_class and other.by_class and self.by_class + other.by_class,
        )


class Task:
    """Objective of a task: cross-entropy of classes, or of the next token if that is the target.

    Args:
        config: the run, with a task.
    """

    def __init__(self, config: Config, readout: Readout) -> None:
        self.config, self.readout = config, readout
        self.text = None if config.classifies else NextToken(config, readout)

    def terms(
        self,
        x: Tensor,
        batch: Batch,
        exits: Mapping[str, Tensor] | None = None,
        target: Target | None = None,
    ) -> dict[str, LossTerm]:
        """Return the loss terms of a micro batch: sums over its labels, with denominators.

        Args:
            x: output of the map [B, S, D], or pooled memories [B, D].
            exits: see `NextToken.terms`.
            target: see `NextToken.terms`.
        """
        if self.text is not None:
            return self.text.terms(x, batch, exits, target)
        logits_MC = self.readout.class_logits(x, batch)
        total, square, losses_M = cross_entropy(logits_MC, batch.labels_BS.flatten())
        terms = {"loss": LossTerm(total, "tokens", 1.0, losses_M)}
        return terms | z_terms(square, self.config.model.z_loss)

    def score(
        self,
        batches: Iterable[Ran],
        corpus: Corpus,
        add_up: AddUp,
        exit_names: Sequence[str] = (),
        extremes: Extremes | None = None,
    ) -> TaskScore:
        """Return the score of a corpus. All replicas must call this, because of `add_up`.

        Args:
            batches: micro batches of the corpus, with the outputs of the map.
            add_up: sums a tensor over replicas.
            exit_names: ignored; a task does not score early exits.
            extremes: receives the samples of this process that a picture shows.
        """
        assert isinstance(corpus, TaskCorpus)
        buckets = self.config.data.seq_length.bit_length() + 1
        classes = 0 if corpus.kind == "token" or self.text else len(corpus.classes)
        sizes = [2 * buckets, 4, ClassSums.size(classes) if classes else 0]
        # Correct and scored predictions by bit length; loss, labels, correct last ones, samples;
        # sums by class.
        sums = torch.zeros(sum(sizes), dtype=torch.float64)
        for batch, x, others in batches:
            sums = sums.to(batch.tokens_BS.device)
            if x is not None:
                assert isinstance(batch, TaskBatch)
                by_length, whole, by_class = sums.split(sizes)
                logits = self.count(x, batch, by_length.view(2, buckets), whole)
                if classes:
                    ClassSums.over(by_class, classes).add(logits, batch, others.get(STEPS))
                if classes and extremes is not None:
                    extremes.add(logits, batch, others.get(STEPS))
        by_length, whole, by_class = add_up(sums).split(sizes)
        lengths = by_length.tolist()
        loss, labels, last_right, samples = whole.tolist()
        pairs = tuple(
            (round(right), round(scored))
            for right, scored in zip(lengths[:buckets], lengths[buckets:], strict=True)
        )
        right, scored = (sum(column) for column in zip(*pairs, strict=True))
        return TaskScore(
            corpus.kind, loss, round(labels), right, scored, pairs, round(last_right),
            round(samples),
            ClassSums.over(by_class, classes).score(corpus.classes) if classes else None,
        )  # fmt: skip

    def count(self, x: Tensor, batch: TaskBatch, by_length: Tensor, sums: Tensor) -> Tensor:
        """Add the predictions of a micro batch to the sums of `score`; returns their logits.

        Args:
            x: output of the map [B, S, D], or pooled memories [B, D].
            by_length: fp64 [2, buckets], correct and scored predictions by the bit length of the
                sample's number of tokens.
            sums: fp64 [4]: loss, labels, samples whose last scored prediction is correct, samples.
        """
        if self.text is None:
            logits = self.readout.class_logits(x, batch)
        else:
            logits = self.readout.all_logits(x).flatten(0, 1)
        found = logits.argmax(-1).view_as(batch.labels_BS)
        right = (found == batch.labels_BS) & batch.scored
        bucket_N = bit_lengths(batch.lengths_N)
        by_length[0].index_add_(0, bucket_N, right.sum(1, dtype=torch.float64))
        by_length[1].index_add_(0, bucket_N, batch.scored.sum(1, dtype=torch.float64))
        sums[0] += self.terms(x, batch)["loss"].total
        sums[1] += batch.num_tokens
        places = torch.arange(batch.scored.shape[1], device=x.device)
        last_N1 = torch.where(batch.scored, places, 0).amax(1, keepdim=True)
        sums[2] += right.gather(1, last_N1).sum()
        sums[3] += batch.scored.any(1).sum()
        return logits

    def metrics(self, scores: Sequence[TaskScore], names: Sequence[str]) -> dict[str, float]:
        """Return scores as metrics: `accuracy` and others over all corpora and, if there are
        several, of each corpus by name."""
        if not scores:
            return {}
        total = scores[0]
        for score in scores[1:]:
            total += score
        values = dict(total.values)
        if len(scores) > 1:
            for name, score in zip(names, scores, strict=True):
                values |= {f"{name}/{key}": value for key, value in score.values.items()}
        return values


Score = TextScore | TaskScore


class Objective(Protocol):
    """Interface of an objective, which computes loss terms and scores: `NextToken` or `Task`."""

    def terms(
        self,
        x: Tensor,
        batch: Batch,
        exits: Mapping[str, Tensor] | None = None,
        target: Target | None = None,
    ) -> dict[str, LossTerm]:
        """Return the loss terms of a micro batch."""

    def score(
        self,
        batches: Iterable[Ran],
        corpus: Corpus,
        add_up: AddUp,
        exit_names: Sequence[str] = (),
    ) -> Score:
        """Return the score of a corpus from the outputs of the map on its micro batches."""

    def metrics(self, scores: Sequence[Any], names: Sequence[str]) -> dict[str, float]:
        """Return scores as metrics, over all corpora and by name."""


def build_objective(config: Config, readout: Readout) -> Objective:
    """Return the objective of a config."""
    return NextToken(config, readout) if config.task is None else Task(config, readout)
