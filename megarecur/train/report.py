"""The numbers of a run: gathered between log steps, reduced once, written by rank 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarecur.config.schema import Config
from megarecur.errors import ConfigError
from megarecur.model.telemetry import MEASURES, name_measures
from megarecur.parallel.mesh import Mesh
from megarecur.plan.cost import FlopEstimate, count_flops
from megarecur.recurrence.depth import Depth
from megarecur.recurrence.schemes import layer_map
from megarecur.train.metrics import Metrics, Progress, read_rows
from megarecur.train.signals import StopFlag
from megarecur.train.speed import peak_flops, peak_memory
from megarecur.train.state import TrainState


@dataclass
class StepResult:
    """One optimizer step on this rank.

    Losses are sums over its micro batches, each divided by its global denominator; telemetry, by
    (block, loop), sums over its tokens.
    """

    depth: Depth | None
    """Loops; None for schemes without."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    telemetry: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    lr: float = 0.0
    grad_norm: float = 0.0
    skipped: bool = False
    data_seconds: float = 0.0
    """Waiting for the loader."""
    seconds: float = 0.0


class Interval:
    """Sums since the last log step. Skipped steps count for time, not for losses."""

    def __init__(self) -> None:
        self.losses: dict[str, Tensor] = {}
        self.num_losses = self.num_steps = 0
        self.data_seconds = self.seconds = 0.0
        self.depths: list[Depth | None] = []

    def add(self, result: StepResult) -> None:
        """One optimizer step."""
        self.num_steps += 1
        self.data_seconds += result.data_seconds
        self.seconds += result.seconds
        self.depths.append(result.depth)
        if result.skipped:
            return
        self.num_losses += 1
        for name, value in result.losses.items():
            self.losses[name] = self.losses[name] + value if name in self.losses else value

    def carry(self, mesh: Mesh) -> dict[str, Any]:
        """What a checkpoint inside an interval keeps, for its mean loss to survive; collective."""
        losses = {n: float(mesh.sum_over_dp(v.clone())) for n, v in self.losses.items()}
        return {"losses": losses, "num_losses": self.num_losses}

    def restore(self, carried: dict[str, Any], mesh: Mesh) -> None:
        """Go on inside an interval. The sums are given to one replica, as they are over all."""
        self.num_losses = carried.get("num_losses", 0)
        for name, value in carried.get("losses", {}).items():
            self.losses[name] = torch.tensor(value if mesh.dp_rank == 0 else 0.0).to(mesh.device)


class Report:
    """Turns intervals into metrics; rank 0 writes them, and a line that tells how the run goes."""

    def __init__(self, run_dir: Path, config: Config, state: TrainState, mesh: Mesh) -> None:
        self.config, self.mesh, self.run_dir = config, mesh, run_dir
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.peak = peak_flops(mesh.device, dtype) * mesh.dp
        self.flops: dict[Depth | None, FlopEstimate] = {}
        """Executed per token, by depth."""
        self.interval = Interval()
        self.interval.restore(state.interval, mesh)
        self.metrics: Metrics | None = None
        self.progress: Progress | None = None
        if mesh.rank == 0:
            self.metrics = Metrics(run_dir, config, state.step)
            self.progress = Progress(config.train.steps)
            if state.step:
                self.progress.note(f"resumed {run_dir} at step {state.step}")

    def close_interval(self, state: TrainState, last: StepResult) -> dict[str, float]:
        """The interval as metrics, reduced over replicas; collective, one reduction."""
        interval, self.interval = self.interval, Interval()
        names = list(interval.losses)
        sums = [interval.losses[name] / interval.num_losses for name in names]
        for measures in last.telemetry.values():
            sums += measures.unbind()
        reduced = self.mesh.sum_over_dp(torch.stack([s.to(torch.float64) for s in sums])).tolist()
        tokens = self.config.train.global_batch_size * self.config.data.seq_length
        rate = tokens * interval.num_steps / interval.seconds
        values = {f"train/{name}": reduced[i] for i, name in enumerate(names)}
        values |= {
            "optim/lr": last.lr,
            "optim/grad_norm": last.grad_norm,
            "optim/skipped": state.skipped,
            "speed/tokens_per_second": rate,
            **self.count_work(interval.depths, rate),
            "speed/data_wait": interval.data_seconds / interval.seconds,
            "speed/step_seconds": interval.seconds / interval.num_steps,
            "memory/peak_bytes": peak_memory(self.mesh.device),
        }
        rest, width = reduced[len(names) :], len(MEASURES)
        rows = [rest[i * width :][:width] for i in range(len(last.telemetry))]
        values |= name_measures(list(last.telemetry), rows, tokens)
        return values

    def count_work(self, depths: Sequence[Depth | None], rate: float) -> dict[str, float]:
        """Shares of the hardware's peak by the FLOPs that steps of these depths executed, apart for
        loops without gradient and for recompute; and their mean depth.

        Args:
            depths: of each optimizer step.
            rate: tokens per second.
        """
        for depth in set(depths) - set(self.flops):
            steps = layer_map(self.config.recurrence, depth)
            self.flops[depth] = count_flops(self.config, steps)

        def share(kind: str) -> float:
            flops = sum(getattr(self.flops[depth], kind) for depth in depths) / len(depths)
            return float(flops * rate / self.peak)

        work = {"speed/mfu": share("train")}
        if share("forward_only"):
            work["speed/mfu_forward_only"] = share("forward_only")
        if share("recompute"):
            work["speed/mfu_with_recompute"] = share("hardware")
        loops = [depth for depth in depths if depth is not None]
        if loops:
            work["recurrence/num_loops"] = sum(d.num_loops for d in loops) / len(loops)
            work["recurrence/backward_loops"] = sum(d.backward_loops for d in loops) / len(loops)
        return work

    def write(self, state: TrainState, values: dict[str, float], stop: StopFlag) -> None:
        """One row and one line; a row that cannot be written ends the run on every rank."""
        if self.metrics is None or self.progress is None:
            return
        try:
            self.metrics.write(state.step, state.tokens, values)
        except OSError as error:
            reason = f"{error.strerror}; free some space and start again"
            stop.fail(ConfigError(f"{self.metrics.path}: {reason}"))
        self.progress.show(state.step, values)

    def write_texts(self, state: TrainState, texts: dict[str, str]) -> None:
        """Texts for TensorBoard, by tag."""
        if self.metrics is not None:
            self.metrics.write_texts(state.step, texts)

    def note(self, text: str) -> None:
        """A line of its own."""
        if self.progress is not None:
            self.progress.note(text)

    def rows(self) -> list[dict[str, Any]]:
        """The last rows of the metrics, on every rank alike; collective."""
        rows = read_rows(self.run_dir / "metrics.jsonl")[-500:] if self.mesh.rank == 0 else []
        return list(self.mesh.broadcast_object(rows))

    def is_validated(self, step: int) -> bool:
        """Whether the metrics hold scores of this step, on every rank alike; collective."""
        rows = read_rows(self.run_dir / "metrics.jsonl") if self.mesh.rank == 0 else []
        found = any(row["step"] == step and "val/loss" in row for row in rows)
        return bool(self.mesh.max_over_world(int(found)))

    def finish(self, text: str) -> None:
        """Say how the run ended."""
        if self.metrics is not None and self.progress is not None:
            self.metrics.close()
            self.progress.note(text)
