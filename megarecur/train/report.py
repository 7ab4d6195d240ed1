"""The numbers of a run: gathered between log steps, reduced once, written by rank 0."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarecur.config.schema import Config
from megarecur.data.loader import MicroBatch
from megarecur.errors import ConfigError
from megarecur.model.compile import CompiledModel
from megarecur.model.telemetry import name_measures
from megarecur.parallel.loss import IGNORED
from megarecur.parallel.mesh import Mesh
from megarecur.plan.cost import (
    FlopEstimate,
    count_flops,
    count_head_flops,
    count_memory_flops,
    estimate_memory,
)
from megarecur.plan.describe import format_bytes
from megarecur.recurrence.depth import Depth
from megarecur.recurrence.layer_map import LayerMap
from megarecur.recurrence.schemes import build_map
from megarecur.train.evaluate import short_names
from megarecur.train.metrics import HALTED_AT, Metrics, Progress, read_rows
from megarecur.train.signals import StopFlag
from megarecur.train.speed import peak_flops, peak_memory
from megarecur.train.state import TrainState

EXIT_LOSS = re.compile(r"exit_[0-9]+/loss")
EXECUTED = "recurrence/executed_share"
STEPS = "/steps"
"""Ends the name of the share of an interval's steps that had an exit."""


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
    sources: Tensor | None = None
    """[2, sources]: loss and counted tokens of each corpus, where there are several."""
    num_sources: int = 1
    counts: Tensor | None = None
    """Tokens by the steps they took, and what was computed (`Mixture.finish`), where they halt."""
    places: float = 0.0
    """Tokens of the global batch that are computed, padding of a task's batches included."""
    lr: float = 0.0
    grad_norm: float = 0.0
    skipped: bool = False
    data_seconds: float = 0.0
    """Waiting for the loader."""
    seconds: float = 0.0

    def add_sources(self, batch: MicroBatch, losses_N: Tensor | None) -> None:
        """Add a micro batch's losses to those of the corpora that its samples are of."""
        count = self.num_sources
        if count < 2 or losses_N is None:
            return
        counted_BS = batch.labels_BS != IGNORED
        sums = torch.zeros(2, count, dtype=torch.float64, device=losses_N.device)
        losses_B = losses_N.view_as(counted_BS).sum(1, dtype=torch.float64)
        sums[0].index_add_(0, batch.sources_B, losses_B)
        sums[1].index_add_(0, batch.sources_B, counted_BS.sum(1, dtype=torch.float64))
        self.sources = sums if self.sources is None else self.sources + sums

    def add_counts(self, counts: list[Tensor]) -> None:
        """Add what a micro batch counted, and forget it there."""
        while counts:
            own = counts.pop()
            self.counts = own if self.counts is None else self.counts + own

    def count_exits(self, mesh: Mesh) -> None:
        """Note which exits this step had, where that differs from step to step: beside the losses,
        so that their mean over an interval is over the steps that had them."""
        for name in [name for name in self.losses if EXIT_LOSS.fullmatch(name)]:
            steps = torch.tensor(1.0 / mesh.dp, dtype=torch.float64, device=mesh.device)
            self.losses[name.replace("/loss", STEPS)] = steps


class Interval:
    """Sums since the last log step. Skipped steps count for time, not for losses."""

    def __init__(self) -> None:
        self.losses: dict[str, Tensor] = {}
        self.num_losses = self.num_steps = 0
        self.data_seconds = self.seconds = self.places = 0.0
        self.depths: list[Depth | None] = []
        self.sources: Tensor | None = None
        self.counts: Tensor | None = None

    def add(self, result: StepResult) -> None:
        """One optimizer step."""
        self.num_steps += 1
        self.data_seconds += result.data_seconds
        self.seconds += result.seconds
        self.places += result.places
        self.depths.append(result.depth)
        if result.skipped:
            return
        self.num_losses += 1
        if result.counts is not None:
            self.counts = result.counts if self.counts is None else self.counts + result.counts
        if result.sources is not None:
            self.sources = result.sources if self.sources is None else self.sources + result.sources
        for name, value in result.losses.items():
            self.losses[name] = self.losses[name] + value if name in self.losses else value

    def carry(self, mesh: Mesh) -> dict[str, Any]:
        """What a checkpoint inside an interval keeps, for its mean loss to survive; collective."""
        own = {n: mesh.sum_over_dp(v.clone()) for n, v in self.losses.items()}
        if self.sources is not None:
            own["sources"] = mesh.sum_over_dp(self.sources.clone())
        if self.counts is not None:
            own["counts"] = mesh.sum_over_dp(self.counts.clone())
        carried = add_up(mesh.gather_over_pp({name: sums.tolist() for name, sums in own.items()}))
        apart = {name: carried.pop(name) for name in ("sources", "counts") if name in carried}
        return {"losses": carried, "num_losses": self.num_losses} | apart

    def restore(self, carried: dict[str, Any], mesh: Mesh) -> None:
        """Go on inside an interval. The sums are given to one replica's first pipeline rank, as
        they are over all."""
        self.num_losses = carried.get("num_losses", 0)
        if mesh.pp_rank:
            return
        for name in ("sources", "counts"):
            if name in carried:
                sums = torch.tensor(carried[name], dtype=torch.float64, device=mesh.device)
                setattr(self, name, sums if mesh.dp_rank == 0 else torch.zeros_like(sums))
        for name, value in carried.get("losses", {}).items():
            self.losses[name] = torch.tensor(value if mesh.dp_rank == 0 else 0.0).to(mesh.device)


def add_up(parts: Sequence[Mapping[Any, Any]]) -> dict[Any, Any]:
    """Numbers, and lists of them, summed by key."""
    total: dict[Any, Any] = {}
    for key, value in (item for part in parts for item in part.items()):
        if key in total:
            wide = torch.float64
            both = torch.tensor(total[key], dtype=wide) + torch.tensor(value, dtype=wide)
            value = both.tolist()
        total[key] = value
    return total


def name_counts(counts: Sequence[float]) -> dict[str, float]:
    """As metrics: mean steps of a token, the share of all steps that was computed, and of tokens
    the share that took 0, 1, ... steps; none of no counts (`Mixture.finish`)."""
    *by_steps, executed, possible = counts or [0.0, 0.0]
    tokens = sum(by_steps)
    if not tokens:
        return {}
    mean = sum(steps * count for steps, count in enumerate(by_steps)) / tokens
    return {
        "recurrence/halting_depth": mean,
        EXECUTED: executed / possible,
        **{f"{HALTED_AT}/{steps:02d}": n / tokens for steps, n in enumerate(by_steps)},
    }


class Report:
    """Turns intervals into metrics; rank 0 writes them, and a line that tells how the run goes."""

    def __init__(self, run_dir: Path, config: Config, state: TrainState, mesh: Mesh) -> None:
        self.config, self.mesh, self.run_dir = config, mesh, run_dir
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.peak = peak_flops(mesh.device, dtype) * mesh.world
        self.sources = short_names([source.path for source in config.data.train])
        self.flops: dict[Depth | None, FlopEstimate] = {}
        """Executed per token, by depth."""
        self.told = False
        self.interval = Interval()
        self.interval.restore(state.interval, mesh)
        self.next_beat = 0.0
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
        own: dict[Any, Tensor] = {n: v / interval.num_losses for n, v in interval.losses.items()}
        if interval.sources is not None:
            own["sources"] = interval.sources
        if interval.counts is not None:
            own["counts"] = interval.counts
        for key, measures in last.telemetry.items():
            if self.config.parallel.sequence_parallel:  # Each rank measured its own positions.
                self.mesh.sum_over_tp(measures)
            own[key] = measures
        reduced = self.reduce(own)
        for name in [name for name in reduced if isinstance(name, str) and name.endswith(STEPS)]:
            share, prefix = reduced.pop(name), name.removesuffix(STEPS) + "/"
            of_exit = [n for n in reduced if isinstance(n, str) and n.startswith(prefix)]
            reduced |= {other: reduced[other] / share for other in of_exit}
        sources, halted = reduced.pop("sources", []), name_counts(reduced.pop("counts", []))
        telemetry = {key: reduced.pop(key) for key in list(reduced) if isinstance(key, tuple)}
        rate = interval.places / interval.seconds
        values = {f"train/{name}": loss for name, loss in reduced.items()}
        values |= {
            "optim/lr": last.lr,
            "optim/grad_norm": last.grad_norm,
            "optim/skipped": state.skipped,
            "speed/tokens_per_second": rate,
            **self.count_work(interval.depths, rate, halted.get(EXECUTED, 1.0)),
            **halted,
            "speed/data_wait": interval.data_seconds / interval.seconds,
            "speed/step_seconds": interval.seconds / interval.num_steps,
        }
        order = [(step.block, step.loop_index) for step in build_map(self.config, last.depth)]
        keys = [key for key in order if key in telemetry]
        values |= name_measures(keys, [telemetry[key] for key in keys], round(last.places))
        for name, loss, counted in zip(self.sources, *sources, strict=True) if sources else ():
            if counted:
                values[f"train/loss_of/{name}"] = loss / counted
        return values

    def reduce(self, own: Mapping[Any, Tensor]) -> dict[Any, Any]:
        """Sums over replicas and pipeline ranks, as lists; collective, one reduction of each kind.

        Pipeline ranks may know of different things, replicas do not.
        """
        sums = [tensor.to(torch.float64).flatten() for tensor in own.values()]
        flat = self.mesh.sum_over_dp(torch.cat(sums)) if sums else torch.empty(0)
        pieces = flat.split([tensor.numel() for tensor in own.values()])
        lists = {
            key: piece.view(tensor.shape).tolist()
            for (key, tensor), piece in zip(own.items(), pieces, strict=True)
        }
        return add_up(self.mesh.gather_over_pp(lists))

    def count_work(
        self, depths: Sequence[Depth | None], rate: float, executed: float = 1.0
    ) -> dict[str, float]:
        """FLOPs per token that steps of these depths executed, those of recompute left out; as
        shares of the hardware's peak, apart for loops without gradient and for recompute; and
        their mean depth.

        Args:
            depths: of each optimizer step.
            rate: tokens per second.
            executed: share of the steps of the map that was computed, where tokens halt.
        """
        for depth in set(depths) - set(self.flops):
            steps = build_map(self.config, depth)
            self.flops[depth] = count_flops(self.config, steps)

        def count(kind: str) -> float:
            """Executed per token. Maps that halt have no exits: the head is applied once."""
            flops = sum(getattr(self.flops[depth], kind) for depth in depths) / len(depths)
            always = 0.0
            if kind in ("train", "hardware"):
                always = 3 * (count_head_flops(self.config) + count_memory_flops(self.config))
            return float(always + executed * (flops - always))

        def share(kind: str) -> float:
            return count(kind) * rate / self.peak

        work = {"speed/flops_per_token": count("train"), "speed/mfu": share("train")}
        if share("forward_only"):
            work["speed/mfu_forward_only"] = share("forward_only")
        if share("recompute"):
            work["speed/mfu_with_recompute"] = share("hardware")
        loops = [depth for depth in depths if depth is not None]
        if loops:
            work["recurrence/num_loops"] = sum(d.num_loops for d in loops) / len(loops)
            work["recurrence/backward_loops"] = sum(d.backward_loops for d in loops) / len(loops)
        return work

    def tell_memory(self, held: Mapping[str, int], steps: LayerMap) -> Mapping[str, float]:
        """What the process holds, as metrics; once, also as a line beside the estimate."""
        peak = peak_memory(self.mesh.device)
        if not self.told:
            self.told = True
            parts = ", ".join(f"{kind} {format_bytes(count)}" for kind, count in held.items())
            what = "on the GPU" if self.mesh.device.type == "cuda" else "of the process"
            line = f"memory: {parts}; peak {what} {format_bytes(peak)}"
            if self.mesh.pp == 1:  # Of pipeline ranks, `megarecur plan` tells.
                estimate = estimate_memory(self.config, steps, self.mesh.dp)
                line += (
                    f"; estimated {format_bytes(estimate.total)}, of it activations "
                    f"{format_bytes(estimate.activations)}, logits {format_bytes(estimate.logits)}"
                )
            self.note(line)
        return {"memory/peak_bytes": peak, **{f"memory/{kind}": n for kind, n in held.items()}}

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

    def tell_graphs(self, compiled: CompiledModel | None) -> dict[str, float]:
        """Graphs of the block made so far, as a metric; of those made after warming up, a line."""
        if compiled is None:
            return {}
        if news := compiled.news():
            self.note(news)
        return {"speed/graphs": float(compiled.graphs)}

    def beat(self, step: int, phase: str) -> None:
        """Say in RUN/heartbeat.json what the run is at, for those who watch it from outside; of
        training as often as it costs a hundredth of the time, or every 5 seconds.

        Args:
            step: optimizer steps done.
            phase: train, evaluate, save, done, stopped or diverged.
        """
        now = time.monotonic()
        if self.metrics is None or (phase == "train" and now < self.next_beat):
            return
        beat = {"time": time.time(), "step": step, "phase": phase}
        with suppress(OSError):  # A full disk is told of where something is lost by it.
            aside = self.run_dir / "heartbeat.json.tmp"
            aside.write_text(json.dumps(beat))
            aside.rename(self.run_dir / "heartbeat.json")
        done = time.monotonic()
        self.next_beat = done + min(100 * (done - now), 5.0)

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
