"""Metrics of a run: accumulated between log steps, reduced once, written by rank 0."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megarecur.config.base import MOST_STEPS
from megarecur.config.recurrence import Looped
from megarecur.config.run import Config
from megarecur.errors import CheckpointError, ConfigError, MegarecurError, explain_os_error
from megarecur.model.compile import CompiledModel
from megarecur.model.telemetry import name_measures
from megarecur.parallel.loss import IGNORED
from megarecur.parallel.mesh import Mesh
from megarecur.plan.cost import (
    FlopEstimate,
    Seen,
    count_flops,
    count_head_flops,
    count_memory_flops,
    count_patch_flops,
    count_step_flops,
    estimate_memory,
)
from megarecur.plan.describe import format_bytes
from megarecur.recurrence.depth import Depth
from megarecur.recurrence.layer_map import LayerMap, StackName
from megarecur.recurrence.schemes import build_map
from megarecur.train.evaluate import short_names
from megarecur.train.metrics import HALTED_AT, Metrics, Progress, read_rows
from megarecur.train.signals import StopFlag
from megarecur.train.speed import peak_flops, peak_memory
from megarecur.train.state import RunFolder, TrainState

EXIT_LOSS = re.compile(r"exit_[0-9]+/loss")
EXECUTED = "recurrence/executed_share"
STEPS = "/steps"
"""Suffix of the entry that holds the share of an interval's steps with a given exit."""


@dataclass
class StepResult:
    """Results of one optimizer step on this rank.

    Losses are sums over its micro batches, each divided by its global denominator. Telemetry holds
    sums over its tokens by (block, loop).
    """

    depth: Depth | None
    """Number of loops; None for schemes without loops."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    telemetry: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    sources: Tensor | None = None
    """[2, sources]: summed loss and number of counted tokens per corpus, if there are several."""
    num_sources: int = 1
    counts: Tensor | None = None
    """With halting: tokens by steps, then computed and possible steps (`Mixture.finish`)."""
    encoder_counts: Tensor | None = None
    """`counts` of an encoder that halts."""
    places: float = 0.0
    """Computed tokens of the global batch, including the padding of a task's batches."""
    keys: tuple[float, ...] = (0.0,) * 5
    """Keys that all queries of the global batch see: in blocks without and with a window, in an
    encoder, in attention to it; and the number of source tokens."""
    lr: float = 0.0
    grad_norm: float = 0.0
    skipped: bool = False
    data_seconds: float = 0.0
    """Seconds spent waiting for the loader."""
    seconds: float = 0.0

    def add_sources(self, sources_B: Tensor, labels_BS: Tensor, losses_N: Tensor | None) -> None:
        """Add the losses of a micro batch, at this rank's labels, to those of its samples'
        corpora."""
        count = self.num_sources
        if count < 2 or losses_N is None:
            return
        counted_BS = labels_BS != IGNORED
        sums = torch.zeros(2, count, dtype=torch.float64, device=losses_N.device)
        losses_B = losses_N.view_as(counted_BS).sum(1, dtype=torch.float64)
        sums[0].index_add_(0, sources_B, losses_B)
        sums[1].index_add_(0, sources_B, counted_BS.sum(1, dtype=torch.float64))
        self.sources = sums if self.sources is None else self.sources + sums

    def add_counts(self, counts: list[Tensor], stack: StackName = "decoder") -> None:
        """Add the counts of micro batches to those of a stack, and clear the list."""
        name = "counts" if stack == "decoder" else "encoder_counts"
        while counts:
            own, before = counts.pop(), getattr(self, name)
            setattr(self, name, own if before is None else before + own)

    def count_exits(self, mesh: Mesh) -> None:
        """Record which exits this step had, beside the losses, if that varies from step to step.

        An exit's mean loss over an interval then covers only the steps that had the exit.
        """
        for name in [name for name in self.losses if EXIT_LOSS.fullmatch(name)]:
            steps = torch.full((), 1.0 / mesh.dp, dtype=torch.float64, device=mesh.device)
            self.losses[name.replace("/loss", STEPS)] = steps


class Interval:
    """Sums since the last log step, in fp64. Skipped steps count for time but not for losses."""

    def __init__(self) -> None:
        self.losses: dict[str, Tensor] = {}
        self.num_losses = self.num_steps = 0
        self.data_seconds = self.seconds = self.places = 0.0
        self.keys = [0.0] * 6
        """Sums of `StepResult.keys`, and the number of queries."""
        self.depths: list[Depth | None] = []
        self.sources: Tensor | None = None
        self.counts: Tensor | None = None
        self.encoder_counts: Tensor | None = None

    def add(self, result: StepResult) -> None:
        """Add the result of an optimizer step."""
        self.num_steps += 1
        self.data_seconds += result.data_seconds
        self.seconds += result.seconds
        self.places += result.places
        seen = (*result.keys, result.places)
        self.keys = [keys + more for keys, more in zip(self.keys, seen, strict=True)]
        self.depths.append(result.depth)
        if result.skipped:
            return
        self.num_losses += 1
        for name in SUMMED:
            own, before = getattr(result, name), getattr(self, name)
            if own is not None:
                setattr(self, name, own if before is None else before + own)
        for name, value in result.losses.items():
            total = self.losses.get(name, torch.zeros((), dtype=torch.float64, device=value.device))
            self.losses[name] = total + value

    def carry(self, mesh: Mesh) -> dict[str, Any]:
        """Return the state that a checkpoint inside an interval keeps of it; collective.

        The sums of each rank are kept separately. If they were added over ranks here, rounding
        would differ from that of an uninterrupted run.
        """
        own: dict[str, Any] = {"losses": {n: float(v) for n, v in self.losses.items()}}
        for name in SUMMED:
            if (sums := getattr(self, name)) is not None:
                own[name] = sums.tolist()
        ranks = mesh.gather_objects(own)[:: mesh.tp]  # Tensor ranks hold the same values.
        return {
            "num_losses": self.num_losses,
            "depths": self.depths,
            "keys": self.keys,
            "mesh": [mesh.dp, mesh.pp],
            "ranks": ranks,
        }

    def restore(self, carried: dict[str, Any], mesh: Mesh) -> None:
        """Resume inside an interval from the state of `carry`.

        Each rank gets its own sums; on another mesh, the first rank gets the sums of all ranks.

        Raises:
            CheckpointError: the state has another form.
        """
        try:
            self._restore(carried, mesh)
            loops = [number for depth in self.depths for number in depth or ()]
            sound = all(type(value) in (int, float) for value in (self.num_losses, *self.keys))
            if not sound or any(type(n) is not int or not 0 <= n <= MOST_STEPS for n in loops):
                raise TypeError("a value is no number, or no depth")
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError):
            raise CheckpointError(
                "state.interval of the checkpoint's index.json is not what `carry` writes; resume "
                "from another checkpoint"
            ) from None

    def _restore(self, carried: dict[str, Any], mesh: Mesh) -> None:
        self.num_losses = carried.get("num_losses", 0)
        self.depths = [depth and Depth(*depth) for depth in carried.get("depths", [])]
        *seen, queries = carried.get("keys", self.keys)
        self.keys = [*seen, *[0.0] * (len(self.keys) - 1 - len(seen)), queries]
        # Older checkpoints hold only the sums over all ranks.
        ranks, place = carried.get("ranks", [carried]), mesh.rank // mesh.tp
        same = carried.get("mesh") == [mesh.dp, mesh.pp]
        sums = ranks[place] if same else {
            "losses": add_up([rank.get("losses", {}) for rank in ranks]),
            **add_up([{n: r[n] for n in SUMMED if n in r} for r in ranks]),
        }  # fmt: skip

        def share(value: Any) -> Tensor:
            """Return the value; zeros on ranks without a share, as all reduce the same names."""
            tensor = torch.tensor(value, dtype=torch.float64, device=mesh.device)
            return tensor if same or place == 0 else torch.zeros_like(tensor)

        self.losses = {name: share(value) for name, value in sums.get("losses", {}).items()}
        for name in SUMMED:
            if name in sums:
                setattr(self, name, share(sums[name]))


def add_up(parts: Sequence[Mapping[Any, Any]]) -> dict[Any, Any]:
    """Sum numbers, and lists of numbers elementwise, by key."""
    total: dict[Any, Any] = {}
    for key, value in (item for part in parts for item in part.items()):
        if key in total:
            wide = torch.float64
            both = torch.tensor(total[key], dtype=wide) + torch.tensor(value, dtype=wide)
            value = both.tolist()
        total[key] = value
    return total


SUMMED = ("sources", "counts", "encoder_counts")
"""Sums of a step that an interval adds up, each None if there is nothing to count."""


def name_counts(counts: Sequence[float], stack: str = "") -> dict[str, float]:
    """Return the metrics of halting; none if no tokens were counted (`Mixture.finish`).

    They are the mean number of steps of a token, the share of all steps that was computed, and the
    share of tokens that took 0, 1, ... steps.
    """
    *by_steps, executed, possible = counts or [0.0, 0.0]
    tokens = sum(by_steps)
    if not tokens:
        return {}
    mean = sum(steps * count for steps, count in enumerate(by_steps)) / tokens
    values = {
        "recurrence/halting_depth": mean,
        EXECUTED: executed / possible,
        **{f"{HALTED_AT}/{steps:02d}": n / tokens for steps, n in enumerate(by_steps)},
    }
    return {name.replace("/", f"/{stack}", 1): value for name, value in values.items()}


class Report:
    """Conversion of intervals into metrics; rank 0 writes them and shows the progress line."""

    def __init__(self, folder: RunFolder, config: Config, state: TrainState, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.folder, self.run_dir = folder, folder.path
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.peak = peak_flops(mesh.device, dtype) * mesh.world
        self.sources = short_names([source.path for source in config.data.train])
        self.flops: dict[Depth | None, tuple[FlopEstimate, ...]] = {}
        """Executed FLOPs per token by depth: without attention scores and source tokens, and with
        one unit of each field of `Seen`."""
        self.always = 3 * (count_head_flops(config) + count_memory_flops(config))
        self.always += 2 * count_patch_flops(config)
        """Part of the training FLOPs that is executed however early tokens halt."""
        self.has_reported_memory = False
        self.interval = Interval()
        self.interval.restore(state.interval, mesh)
        self.metrics: Metrics | None = None
        self.progress: Progress | None = None
        if mesh.rank == 0:
            self.metrics = Metrics(self.run_dir, config, state.step)
            self.progress = Progress(config.train.steps)
            if state.step:
                self.progress.note(f"resumed {self.run_dir} at step {state.step}")

    def close_interval(self, state: TrainState, last: StepResult) -> dict[str, float]:
        """Return the interval's metrics, and start a new one; collective, one reduction."""
        interval, self.interval = self.interval, Interval()
        own: dict[Any, Tensor] = {n: v / interval.num_losses for n, v in interval.losses.items()}
        if interval.sources is not None:
            own["sources"] = interval.sources
        for name in ("counts", "encoder_counts"):
            if (counts := getattr(interval, name)) is not None:
                own[name] = counts
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
        halted |= name_counts(reduced.pop("encoder_counts", []), "encoder_")
        telemetry = {key: reduced.pop(key) for key in list(reduced) if isinstance(key, tuple)}
        rate = interval.places / interval.seconds
        values = {f"train/{name}": loss for name, loss in reduced.items()}
        values |= {
            "optim/lr": last.lr,
            "optim/grad_norm": last.grad_norm,
            "optim/skipped": state.skipped,
            "speed/tokens_per_second": rate,
            **self.count_work(
                interval.depths,
                rate,
                Seen(*(keys / max(interval.keys[-1], 1.0) for keys in interval.keys[:-1])),
                halted.get(EXECUTED, 1.0),
                halted.get(EXECUTED.replace("/", "/encoder_"), 1.0),
            ),
            **halted,
            "speed/data_wait": interval.data_seconds / interval.seconds,
            "speed/step_seconds": interval.seconds / interval.num_steps,
        }
        steps = build_map(self.config, last.depth)
        order = {(step.block, step.loop_index): step.stack for step in steps}
        keys = [key for key in order if key in telemetry]
        read = {"decoder": round(last.places), "encoder": round(last.keys[-1])}
        tokens = [read[order[key]] for key in keys]
        values |= name_measures(keys, [telemetry[key] for key in keys], tokens)
        for name, loss, counted in zip(self.sources, *sources, strict=True) if sources else ():
            if counted:
                values[f"train/loss_of/{name}"] = loss / counted
        return values

    def reduce(self, own: Mapping[Any, Tensor]) -> dict[Any, Any]:
        """Sum over replicas and pipeline ranks, as lists; collective, one reduction of each kind.

        Pipeline ranks may have different keys, replicas have the same.
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
        self,
        depths: Sequence[Depth | None],
        rate: float,
        seen: Seen,
        executed: float = 1.0,
        of_encoder: float = 1.0,
    ) -> dict[str, float]:
        """Return executed FLOPs per token, MFU and the mean depth of optimizer steps.

        FLOPs exclude recompute, and count of attention what the documents and windows of the
        batches need. MFU is the share of the hardware's peak; loops without gradient, and
        recompute, have separate metrics.

        Args:
            depths: the number of loops of each optimizer step.
            rate: tokens per second.
            seen: mean keys that a query saw.
            executed: share of the steps of the map that was computed, with halting.
            of_encoder: the same share of an encoder's steps.
        """
        nothing = (0.0,) * len(seen)
        units = [tuple(float(i == k) for k in range(len(seen))) for i in range(len(seen))]
        for depth in set(depths) - set(self.flops):
            steps = build_map(self.config, depth)
            self.flops[depth] = tuple(
                count_flops(self.config, steps, Seen(*keys)) for keys in (nothing, *units)
            )
        shares = {depth: self.weigh_encoder(depth, seen) for depth in set(depths)}
        share_of_encoder = sum(shares[depth] for depth in depths) / len(depths)
        executed += share_of_encoder * (of_encoder - executed)

        def count(kind: str) -> float:
            """Return executed FLOPs per token. Maps that halt apply the head once: no exits."""
            flops = 0.0
            for depth in depths:
                base, *each = (getattr(flops, kind) for flops in self.flops[depth])
                flops += base
                flops += sum(n * (one - base) for n, one in zip(seen, each, strict=True))
            flops /= len(depths)
            always = self.always if kind in ("train", "hardware") else 0
            return float(always + executed * (flops - always))

        def share(kind: str) -> float:
            return count(kind) * rate / self.peak

        work = {"speed/flops_per_token": count("train"), "speed/mfu": share("train")}
        if share("forward_only"):
            work["speed/mfu_forward_only"] = share("forward_only")
        if share("recompute"):
            work["speed/mfu_with_recompute"] = share("hardware")
        loops = [depth for depth in depths if depth is not None]
        of_stacks = {"": self.config.recurrence, "encoder_": self.config.encoder}
        for stack, scheme in of_stacks.items():
            if loops and isinstance(scheme, Looped):
                drawn = [d[2:] if stack else d[:2] for d in loops]
                for i, name in enumerate(("num_loops", "backward_loops")):
                    work[f"recurrence/{stack}{name}"] = sum(d[i] for d in drawn) / len(loops)
        return work

    def weigh_encoder(self, depth: Depth | None, seen: Seen) -> float:
        """Return an encoder's share of the FLOPs of the map's steps; 0 without one."""
        if self.config.encoder is None:
            return 0.0
        steps = build_map(self.config, depth)
        flops = count_step_flops(self.config, steps, seen)
        pairs = zip(steps, flops, strict=True)
        return float(sum(n for step, n in pairs if step.stack == "encoder") / sum(flops))

    def report_memory(self, held: Mapping[str, int], steps: LayerMap) -> Mapping[str, float]:
        """Return the memory metrics; the first call prints them beside the estimate."""
        peak = peak_memory(self.mesh.device)
        if not self.has_reported_memory:
            self.has_reported_memory = True
            parts = ", ".join(f"{kind} {format_bytes(count)}" for kind, count in held.items())
            what = "on the GPU" if self.mesh.device.type == "cuda" else "of the process"
            line = f"memory: {parts}; peak {what} {format_bytes(peak)}"
            if self.mesh.pp == 1:  # `megarecur plan` estimates pipeline ranks.
                estimate = estimate_memory(self.config, steps, self.mesh.dp)
                line += (
                    f"; estimated {format_bytes(estimate.total)}, of it activations "
                    f"{format_bytes(estimate.activations)}, logits {format_bytes(estimate.logits)}"
                )
            self.note(line)
        return {"memory/peak_bytes": peak, **{f"memory/{kind}": n for kind, n in held.items()}}

    def write(self, state: TrainState, values: dict[str, float], stop: StopFlag) -> None:
        """Write one row and one line; a write error ends the run on every rank."""
        if self.metrics is None or self.progress is None:
            return
        with self.failing(stop):
            self.restore()
            self.metrics.write(state.step, state.tokens, values)
        self.progress.show(state.step, values)

    def write_texts(self, state: TrainState, texts: dict[str, str], stop: StopFlag) -> None:
        """Write texts by tag to TensorBoard."""
        if self.metrics is not None:
            with self.failing(stop):
                self.restore()
                self.metrics.write_texts(state.step, texts)

    @contextmanager
    def failing(self, stop: StopFlag) -> Iterator[None]:
        """Turn an error of the body into a stop of the run on every rank."""
        try:
            yield
        except MegarecurError as error:
            stop.fail(error)
        except OSError as error:
            stop.fail(ConfigError(explain_os_error(error, self.run_dir)))

    def restore(self) -> None:
        """Recreate deleted files of the run folder, and print a note for each."""
        assert self.metrics is not None
        if place := self.folder.lease.moved_to():
            self.note(
                f"{self.run_dir} was renamed to {place} under the run, which goes on in "
                f"{self.run_dir}; earlier checkpoints lie in {place}"
            )
        for path in [*self.folder.restore(), *self.metrics.restore()]:
            self.note(f"{path} was deleted under the run; it is made again")

    def count_graphs(self, compiled: CompiledModel | None) -> dict[str, float]:
        """Return the number of compiled graphs; print a note on those made after warm-up."""
        if compiled is None:
            return {}
        if news := compiled.news():
            self.note(news)
        return {"speed/graphs": float(compiled.graphs)}

    def note(self, text: str) -> None:
        """Print text on a separate line."""
        if self.progress is not None:
            self.progress.note(text)

    def rows(self) -> list[dict[str, Any]]:
        """Return the last rows of the metrics, the same on every rank; collective."""
        rows = read_rows(self.run_dir / "metrics.jsonl")[-500:] if self.mesh.rank == 0 else []
        return list(self.mesh.broadcast_object(rows))

    def is_validated(self, step: int, prefix: str = "val/loss") -> bool:
        """Return True, on every rank, if the metrics hold scores of this step; collective.

        Args:
            prefix: beginning of the scores' names.
        """
        rows = read_rows(self.run_dir / "metrics.jsonl") if self.mesh.rank == 0 else []
        own = [key for row in rows if row["step"] == step for key in row]
        found = any(key.startswith(prefix) for key in own)
        return bool(self.mesh.max_over_world(int(found)))

    def finish(self, text: str) -> None:
        """Close the metrics and print how the run ended."""
        if self.metrics is not None and self.progress is not None:
            self.restore()  # A file deleted after the last row would be lost.
            self.metrics.close()
            self.progress.note(text)
