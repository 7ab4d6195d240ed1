"""The section `checkpoint`: intervals between saves, and retention."""

from __future__ import annotations

from megarecur.config.base import Count, PositiveCount, Section, free


class CheckpointConfig(Section):
    """Intervals between saves, and retention."""

    every: Count = free(0)
    """Optimizer steps between checkpoints. 0: save at the end and on a signal only."""
    asynchronous: bool = free(True)
    """Write while training continues, from in-memory copies of the parameters and moments that this
    process writes. false: training waits until everything is on disk."""
    keep_last: PositiveCount = free(2)
    """Number of newest checkpoints to keep."""
    keep_every: Count = free(0)
    """Keep checkpoints of steps that are multiples of this permanently; 0: none."""
    keep_best: Count = free(0)
    """Number of checkpoints with the lowest val/loss to keep; the file `best` names the first of
    them (true: 1). Only checkpoints whose own step was evaluated count: evaluate at the steps at
    which you save."""
    mirror: str | None = free(None, min_length=1)
    """A folder or fsspec URL that belongs to this run alone, to which complete checkpoints are
    copied. A run folder without a valid checkpoint resumes from there. If it cannot be reached, a
    warning is logged and the next save tries again. Default: no copies."""
