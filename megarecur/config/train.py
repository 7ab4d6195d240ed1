"""The sections `train`, `alarms` and `health`: the training loop, and the checks on it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megarecur.config.base import (
    Blocks,
    Count,
    Length,
    PositiveCount,
    Section,
    Threshold,
    free,
)


class ProfileConfig(Section):
    """Optimizer steps that torch's profiler records, into RUN/profile; on CUDA with a snapshot of
    memory."""

    start: Count = 10
    """First recorded step, counted from 0."""
    steps: PositiveCount = 3
    """Number of recorded steps."""
    all_ranks: bool = False
    """Record every process; false: the first one only."""


class EvalTasksConfig(Section):
    """Tasks of lm-evaluation-harness (the extra `eval`) that score the run during training."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of tasks, such as arc_easy."""
    every: Count = 0
    """Optimizer steps between scores. 0: score at the end only."""
    limit: PositiveCount | None = None
    """Documents of each task, the first ones. Default: all."""
    shots: Count = 0
    """Examples in front of each question."""
    tasks_from: str | None = None
    """Folder with a file NAME.jsonl (or .jsonl.xz, .gz, .zst) of each task. Default: eval below
    MEGARECUR_DATA, if the environment names it; other data are fetched by the harness."""


class RecomputeLoops(Section):
    """Recompute of some uses of the map."""

    loops: Annotated[tuple[Count, ...], Field(min_length=1)]
    """Loops whose steps are recomputed whole, counted from 0: uses of a block after that many
    earlier ones."""


def read_recompute(value: object) -> object:
    """Return the policy of `train.recompute` that older configs write as true or false."""
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


Recompute = Annotated[
    Literal["none", "full", "selective"] | RecomputeLoops, BeforeValidator(read_recompute)
]


class TrainConfig(Section):
    """Steps, batches, precision, device and evaluation."""

    steps: PositiveCount = free()
    """Optimizer steps of the run."""
    global_batch_size: Length
    """Samples per optimizer step, over all processes."""
    micro_batch_size: Length = free()
    """Samples per forward pass of one process; divides global_batch_size."""
    batch_tokens: Length | None = None
    """Batches by tokens, for pairs of sentences: a batch is sentences of like length with at most
    this many tokens, source and target and their padding counted. global_batch_size then counts
    batches, and micro_batch_size is 1. Default: batches of micro_batch_size sentences."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Precision of compute. Parameters, gradients and optimizer state are fp32 (fp64 with fp64,
    which is for tests)."""
    device: Literal["auto", "cpu", "cuda"] = free("auto")
    """Device of compute; auto: cuda if torch finds a GPU, else cpu."""
    attention: Literal["auto", "dense", "segments", "varlen", "flex"] = free("auto")
    """Code that computes attention. dense: scores of all pairs of tokens, hidden by a mask.
    segments: each document by itself, grouped by length. varlen: each document by itself, in a
    flash kernel (CUDA, bf16). flex: the same in a generated kernel, with softcaps and ALiBi (CUDA).
    auto: the first of varlen, flex and segments that supports the config; `check` says which."""
    recompute: Recompute = free("none")
    """Activations that backward computes again. none: nothing; selective: norms, activations
    and rotations, while outputs of matrix products and of attention are kept; full: every step of
    the layer map; {loops: [0, 2]}: every step of these loops, nothing of others. Results do not
    depend on it."""
    offload_activations: bool = free(False)
    """Move what backward needs of the layer map to pinned host memory, and back before it is
    needed. CUDA only: on a CPU, activations are in host memory already and stay where they are."""
    compile: Literal[False, True, "auto"] | None = free(None)
    """Compile the block with torch.compile: one graph for all blocks, loops and depths, on any
    mesh. Needs a C++ compiler (CPU) or Triton and a C compiler (CUDA), and takes up to minutes at
    the start; auto: run eagerly if they are missing. Default: auto on CUDA, false on CPUs."""
    log_every: PositiveCount = free(10)
    """Optimizer steps between log lines and rows of metrics.jsonl."""
    eval_every: Count = free(0)
    """Optimizer steps between evaluations. 0: evaluate at the end only."""
    eval_samples: Count = free(0)
    """Samples (pairs of sentences, with an encoder) of each validation corpus read per evaluation
    during training; 0: all."""
    eval_final: Literal["all"] | PositiveCount = free("all")
    """Samples of each validation corpus read by the evaluation after the last step, regardless of
    eval_samples; Megatron's --eval-iters N are N x global_batch_size samples. all: the whole
    corpus, which may take as long as many steps of training."""
    eval_bleu: Count = free(0)
    """Pairs of each validation corpus that are translated greedily at every evaluation, for
    val/bleu; the first ones. 0: none."""
    eval_depths: tuple[Blocks, ...] = free(())
    """Additional numbers of loops to evaluate at, for schemes that repeat a group of blocks.
    Default: the config's own alone."""
    eval_tasks: EvalTasksConfig | None = free(None)
    """Tasks that score the run during training, by all processes. Default: none."""
    profile: ProfileConfig | None = free(None)
    """Steps to record with torch's profiler. Default: none."""
    sample_prompts: tuple[str, ...] = free(())
    """Texts that the model continues at every evaluation, shown in TensorBoard. Default: none."""
    sample_tokens: Length = free(64)
    """Tokens of each continuation."""

    def recomputes(self, loop_index: int) -> bool:
        """Return True if backward runs the whole block of a step with this `loop_index` again."""
        if isinstance(self.recompute, RecomputeLoops):
            return loop_index in self.recompute.loops
        return self.recompute == "full"

    def find_problems(self) -> Iterator[str]:
        """Yield batches that cannot be divided into micro batches."""
        batch, micro = self.global_batch_size, self.micro_batch_size
        if batch % micro:
            small = [size for size in range(1, math.isqrt(batch) + 1) if batch % size == 0]
            divisors = (*small, *(batch // size for size in small))
            yield (
                f"micro_batch_size={micro} must divide train.global_batch_size={batch}; set it to "
                f"{max(size for size in divisors if size <= micro)}, or change global_batch_size"
            )


class AlarmConfig(Section):
    """Criteria of divergence at a log step, and the action taken. null disables an alarm."""

    loss_spike: Threshold | None = 8.0
    """Alarm if the loss exceeds its mean over the window by this many standard deviations."""
    residual_growth: Threshold | None = 10.0
    """Alarm if the largest norm of the residual stream exceeds this multiple of its median over the
    window."""
    non_finite: PositiveCount | None = 5
    """Alarm if this many gradients in a row, or since the last log step, were not finite. Nothing
    is saved until one is finite again."""
    window: Annotated[int, Field(ge=10, le=1_000_000)] = 50
    """Length of the window, in log steps without alarm."""
    action: Literal["warn", "roll_back", "stop"] = "warn"
    """Action at an alarm. warn: log a warning. roll_back: load the parameters of the last
    checkpoint from before the alarm and continue with the next samples; those in between are
    skipped. stop: exit with code 1, without saving."""
    max_roll_backs: PositiveCount = 3
    """Maximum roll backs of a run; the next alarm stops it."""


class HealthConfig(Section):
    """Checks of every process before training, which take seconds; see train/health.py."""

    enabled: Literal[False, True, "auto"] = free("auto")
    """Check before training. auto: with more than one node, or with several processes on CUDA."""
    slow_factor: Annotated[float, Field(gt=1.0, le=1e9)] = free(2.0)
    """A rank is slow if it takes more than slow_factor x the job's median for a matrix product, or
    for communication within a node or with its neighbours."""
    on_slow: Literal["warn", "stop"] = free("warn")
    """Action at a slow rank. A failed check stops the run in any case."""
    min_free_gpu: Annotated[float, Field(ge=0.0, lt=1.0)] = free(0.8)
    """A rank is slow if its GPU has less free memory than this share of the job's median."""
    min_free_disk_gb: Annotated[float, Field(ge=0.0, le=1e9)] = free(1.0)
    """Minimum free disk space of the run folder, in 10^9 bytes."""
