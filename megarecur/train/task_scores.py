"""Scores of a task: accuracy, by length too, and how often a remembered bit is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megarecur.config.schema import Config
from megarecur.data.samples import TaskBatch, TaskCorpus, scored_batches
from megarecur.errors import MegarecurError
from megarecur.model.transformer import Transformer
from megarecur.parallel.mesh import Mesh, raise_first
from megarecur.plan.schedule import Schedules
from megarecur.train.evaluate import bit_lengths, run_batches, short_names
from megarecur.train.signals import StopFlag


@dataclass(frozen=True)
class TaskScore:
    """How well the classes of a corpus are predicted. Sums, so that scores can be added."""

    kind: str
    loss: float
    """Sum over labels, nats."""
    labels: int
    right: int
    """Of the predictions that are scored."""
    scored: int
    by_length: tuple[tuple[int, int], ...]
    """(right, scored) of samples of 0, 1, 2 to 3, 4 to 7, ... tokens."""
    last_right: int = 0
    """Samples whose last scored prediction is right; of kind token."""
    samples: int = 0

    @property
    def values(self) -> dict[str, float]:
        """As metrics; `glitch_rate`: the share of reads that are wrong (Liu et al. 2023)."""
        found = {
            "loss": self.loss / max(self.labels, 1),
            "accuracy": self.right / max(self.scored, 1),
        }
        if self.kind == "token":
            found["glitch_rate"] = 1.0 - found["accuracy"]
            found["last_accuracy"] = self.last_right / max(self.samples, 1)
        for bits, (right, scored) in enumerate(self.by_length):
            if scored:
                low, high = (1 << bits) >> 1, (1 << bits) - 1
                found[f"accuracy_by_length/{low}-{high}"] = right / scored
        return found

    def __add__(self, other: TaskScore) -> TaskScore:
        """Of both corpora together."""
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
        )


@torch.no_grad()
def score_task(
    model: Transformer,
    corpus: TaskCorpus,
    config: Config,
    mesh: Mesh,
    max_samples: int,
    stop: StopFlag | None = None,
    num_loops: int | None = None,
    schedules: Schedules | None = None,
) -> TaskScore | None:
    """One pass over (the start of) a corpus; None when stopped. Collective.

    Raises:
        MegarecurError: on every rank, why one could not read the corpus.
    """
    assert config.task is not None
    scheduled = (schedules or Schedules(config)).forward(num_loops, exits=True)
    buckets = config.data.seq_length.bit_length() + 1
    # Right and scored predictions by bit length; then loss, labels, last ones right, samples.
    by_length = torch.zeros(2, buckets, dtype=torch.float64, device=mesh.device)
    sums = torch.zeros(5, dtype=torch.float64, device=mesh.device)
    failures: list[MegarecurError] = []
    batches = scored_batches(
        corpus,
        config.task,
        seq_length=config.data.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        multiple=config.parallel.tensor if config.parallel.sequence_parallel else 1,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp,
        max_samples=max_samples,
        failures=failures,
    )
    for ran in run_batches(model, mesh, scheduled, batches, failures, stop):
        if ran is None:
            return None
        batch, x, _ = ran
        if x is not None:  # Else it ends on another pipeline rank.
            add_batch(model, x, batch, by_length, sums)
    sums[4] += len(failures)
    counts = mesh.sum_over_world(torch.cat([by_length.flatten(), sums])) / mesh.tp
    *lengths, loss, labels, last_right, samples, failed = counts.tolist()
    if failed:
        raise_first(failures[0] if failures else None, mesh)
    pairs = tuple(
        (round(right), round(scored))
        for right, scored in zip(lengths[:buckets], lengths[buckets:], strict=True)
    )
    right, scored = (sum(column) for column in zip(*pairs, strict=True))
    return TaskScore(
        corpus.kind, loss, round(labels), right, scored, pairs, round(last_right), round(samples)
    )


def add_batch(
    model: Transformer,
    x: torch.Tensor,
    batch: TaskBatch,
    by_length: torch.Tensor,
    sums: torch.Tensor,
) -> None:
    """Count the predictions of a micro batch."""
    logits = model.class_logits(x, batch) if model.task_head else model.all_logits(x).flatten(0, 1)
    right = (logits.argmax(-1).view_as(batch.labels_BS) == batch.labels_BS) & batch.scored
    bucket_N = bit_lengths(batch.lengths_N)
    by_length[0].index_add_(0, bucket_N, right.sum(1, dtype=torch.float64))
    by_length[1].index_add_(0, bucket_N, batch.scored.sum(1, dtype=torch.float64))
    sums[0] += model.loss(x, batch)["loss"].total
    sums[1] += batch.num_tokens
    places = torch.arange(batch.scored.shape[1], device=x.device)
    last_N1 = torch.where(batch.scored, places, 0).amax(1, keepdim=True)
    sums[2] += right.gather(1, last_N1).sum()
    sums[3] += batch.scored.any(1).sum()


def task_values(scores: Sequence[TaskScore], paths: Sequence[str]) -> dict[str, float]:
    """Scores as metrics: `val/accuracy` over all corpora, and each by name if there are several."""
    total = scores[0]
    for score in scores[1:]:
        total += score
    values = {f"val/{name}": value for name, value in total.values.items()}
    if len(scores) > 1:
        for corpus, score in zip(short_names(paths), scores, strict=True):
            values |= {f"val/{corpus}/{name}": value for name, value in score.values.items()}
    return values
