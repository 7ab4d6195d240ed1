"""Pipelines of shared blocks: one owner against tied replicas, accuracy of the simulator, overhead.

    python benchmarks/pipeline.py [owner] [crossover] [clock] [overhead] [evaluate] [score]
        [--rounds 5]

owner: a cycle of 2 blocks run twice (hidden 384, feed-forward 1,536, sequence 256, 8 micro batches
of 2, vocabulary 1,024, untied, fp32) on 2 processes of one thread each. Three sides, ours and
DeepSpeed's, alternate in the same processes: our placement (walk 0 1 0 1, each block on one rank);
our executor with both blocks on both ranks, whose gradients are reduced between them; DeepSpeed's
PipelineModule with TiedLayerSpec. All three run the same block code.

crossover: the first two placements with increasing numbers of micro batches. One owner sends more
activations, tied replicas reduce the blocks' gradients: 2 (v - 1) T h a bytes against 2 (v - 1) (M
/ p) 12 h^2 g, equal at T = 12 h (g / a) (M / p) tokens per step. Bytes are counted.

clock: 4 processes whose stages sleep (5 ms forward, inputs and weights each) with messages of 1
MiB. The time of an optimizer step is compared with two simulations: one with 5 ms and hops as
measured before, one with the operations' own times, measured in a separate step without waits.

overhead: the same orders with empty stages against a hand-written loop of the same messages.

evaluate: forward passes of 32 micro batches on 4 processes, several in flight as in evaluation,
against one order per micro batch, as evaluation ran before, and against one rank at a time. Stages
sleep 40 ms per step of the map, so that ranks do not compete for cores and handing over messages
matters little. The simulator's ratios are those of the same orders.

score: evaluation of a real model (hidden 384, one block per rank, the walks of `evaluate`), whose
four processes share the cores of this machine, in tokens per second.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.model.block import Block
from megarecur.model.context import build_context
from megarecur.model.transformer import Transformer
from megarecur.objective.next_token import NextToken
from megarecur.optim.plain import PlainEngine
from megarecur.parallel.linear import DeferredProducts
from megarecur.parallel.mesh import Mesh, build_mesh
from megarecur.parallel.pipeline import Pipeline
from megarecur.plan.order import Op, PipelineOrder, StageCost
from megarecur.plan.placement import Placement
from megarecur.plan.schedule import Schedules
from megarecur.plan.simulate import Timeline, choose_order, lower_bound, simulate
from megarecur.plan.walk import Stage, Walk, build_walk
from megarecur.recurrence.layer_map import StackName, Step, from_order
from megarecur.train import evaluate
from megarecur.train.report import StepResult
from megarecur.train.step import Training, build_model

LENGTH, MICRO, NUM_MICRO, VOCABULARY = 256, 2, 8, 1024
WORK, MESSAGE = 0.005, (1, 256, 1024)
PARTS = ("owner", "crossover", "clock", "overhead", "evaluate", "score")
CROSSING = (2, 4, 6, 8, 10, 12, 16)
"""Numbers of micro batches."""


def start(rank: int, world: int, folder: str, name: str) -> None:
    """Join a process group over loopback, with one thread."""
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo", LOCAL_RANK=str(rank), RANK=str(rank),
                      WORLD_SIZE=str(world), DS_ACCELERATOR="cpu")  # fmt: skip
    store = dist.FileStore(f"{folder}/{name}", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)


# ------------------------------------------------------------------------------------------ owner


def make_config(recurrence: dict[str, Any], placement: tuple[int, ...]) -> Config:
    """Return the model's config, with its blocks on these pipeline ranks."""
    return Config.model_validate({
        "run_dir": "run",
        "model": {"hidden_size": 384, "num_heads": 6, "ffn_hidden_size": 1536,
                  "vocab_size": VOCABULARY, "tie_embeddings": False},
        "recurrence": recurrence,
        "data": {"train": [{"path": "none"}], "tokenizer": "bytes", "seq_length": LENGTH},
        "optimizer": {"lr": 1e-4},
        "parallel": {"pipeline": 1 + max(placement), "placement": placement},
        "train": {"steps": 1, "global_batch_size": MICRO * NUM_MICRO, "micro_batch_size": MICRO},
    })  # fmt: skip


def make_batch(number: int) -> MicroBatch:
    """Return a micro batch of random tokens."""
    generator = torch.Generator().manual_seed(number)
    both = torch.randint(VOCABULARY, (2, MICRO, LENGTH), generator=generator)
    positions = torch.arange(LENGTH).expand(MICRO, LENGTH)
    zeros, samples = torch.zeros_like(both[0]), torch.arange(MICRO)
    return MicroBatch(both[0], both[1], positions, zeros, samples, torch.zeros_like(samples), True)


class Ours:
    """Our executor. With `tied`, the blocks of the second loop are copies on the other rank, whose
    gradients are reduced with the originals' after the backward passes."""

    def __init__(self, tied: bool, num_micro: int = NUM_MICRO) -> None:
        self.num_micro = num_micro
        recurrence = {"kind": "cycle", "num_blocks": 2, "depth": 4}
        if tied:
            recurrence = {"kind": "dense", "num_layers": 4}
        self.tied = tied
        self.config = make_config(recurrence, (0, 0, 1, 1) if tied else (0, 1))
        self.mesh = build_mesh(self.config, torch.device("cpu"))
        schedules = Schedules(self.config)
        self.model = build_model(self.config, self.mesh, schedules)
        self.engine = PlainEngine(self.model, self.config, self.mesh)
        self.scheduled = schedules.training(None, num_micro)
        self.reduced_bytes = self.sent_bytes = 0
        if tied:
            with torch.no_grad():
                for name, parameter in self.model.parameters_by_name.items():
                    if name.startswith("blocks."):
                        dist.broadcast(parameter, 0)
            self.model.refresh()

    def step(self) -> float:
        """Run one optimizer step; return the loss on the rank of the head, 0 on the other."""
        batches, result = [make_batch(i) for i in range(self.num_micro)], StepResult(None)
        tokens = {"tokens": float(self.num_micro * MICRO * LENGTH)}
        program = Training(self.model, batches, 0, tokens, result, False)
        pipeline = Pipeline(self.mesh, self.scheduled.walk, program, self.model.dtype,
                            self.engine.backward, self.model.deferred)  # fmt: skip
        pipeline.run(self.scheduled.order[self.mesh.pp_rank])
        self.sent_bytes, self.reduced_bytes = pipeline.bytes_sent, 0
        if self.tied:
            own = [p.grad for n, p in self.model.parameters_by_name.items() if "blocks." in n]
            flat = torch.cat([g.flatten() for g in own if g is not None])
            dist.all_reduce(flat)
            self.reduced_bytes = flat.nbytes
            pieces = flat.split([g.numel() for g in own if g is not None])
            for gradient, piece in zip(own, pieces, strict=True):
                assert gradient is not None
                gradient.copy_(piece.view_as(gradient))
        self.engine.step(1e-4)
        return float(result.losses.get("loss", torch.zeros(())))

    def state_bytes(self) -> int:
        """Return the bytes of parameters and moments on this rank."""
        tensors = [*self.model.parameters(), *self.engine.moments.values()]
        return sum(tensor.nbytes for tensor in tensors)


class BlockLayer(nn.Module):
    """One of our blocks as a DeepSpeed layer."""

    def __init__(self, config: Config, number: int) -> None:
        super().__init__()

        def make(name: str) -> nn.Parameter:
            return model.parameters_by_name[name]

        from megarecur.model.transformer import Transformer

        model = Transformer(config)
        self.block = Block(number, make, config.model, torch.float32, False)
        positions = torch.arange(LENGTH).expand(MICRO, LENGTH)
        self.ctx = build_context(config.model, positions, torch.float32, training=True)
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, self.ctx, Step(self.number, 0), None)


class DeepSpeed:
    """PipelineModule with both blocks tied over both ranks."""

    def __init__(self) -> None:
        import deepspeed
        import deepspeed.ops
        from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

        deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        config = make_config({"kind": "cycle", "num_blocks": 2, "depth": 4}, (0, 1))
        hidden = config.model.hidden_size
        names = [n for n, _ in BlockLayer(config, 0).named_parameters()]
        blocks = [
            TiedLayerSpec(f"block{i}", BlockLayer, config, i, tied_weight_attr=names)
            for i in (0, 1, 0, 1)
        ]
        layers = [LayerSpec(nn.Embedding, VOCABULARY, hidden), *blocks,
                  LayerSpec(nn.RMSNorm, hidden),
                  LayerSpec(nn.Linear, hidden, VOCABULARY, bias=False)]  # fmt: skip

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

        torch.manual_seed(0)
        module = PipelineModule(
            layers, num_stages=2, loss_fn=loss, partition_method="type:BlockLayer"
        )
        optimizer = torch.optim.AdamW(module.parameters(), 1e-4, fused=True)
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config={"train_micro_batch_size_per_gpu": MICRO,
                    "gradient_accumulation_steps": NUM_MICRO, "gradient_clipping": 1.0,
                    "steps_per_print": 10**9},
        )  # fmt: skip

    def step(self) -> float:
        """Run one optimizer step; return the loss."""
        batches = [make_batch(i) for i in range(NUM_MICRO)]
        return float(self.engine.train_batch(iter([(b.tokens_BS, b.labels_BS) for b in batches])))

    def state_bytes(self) -> int:
        """Return the bytes of parameters and moments on this rank."""
        parameters = {id(p): p for p in self.engine.module.parameters()}.values()
        moments = [t for state in self.optimizer.state.values() for t in state.values()]
        return sum(tensor.nbytes for tensor in (*parameters, *moments) if tensor.numel() > 1)


def count_reduced(step: Callable[[], float]) -> int:
    """Return the bytes of all-reduces between the two ranks in a step.

    All-reduces of fewer than 8 numbers are not counted.
    """
    total, whole = [0], dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        group = kwargs.get("group")
        alone = group is not None and dist.get_world_size(group) == 1
        total[0] += 0 if alone or tensor.numel() < 8 else tensor.nbytes
        return whole(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        step()
    finally:
        dist.all_reduce = whole
    return total[0]


def run_owner(rank: int, folder: str, rounds: int) -> None:
    """Run one of the two processes of `owner`; its three sides alternate."""
    start(rank, 2, folder, "owner")
    sides: dict[str, Any] = {"one owner": Ours(False), "tied replicas": Ours(True),
                             "DeepSpeed": DeepSpeed()}  # fmt: skip
    reduced = {}
    for name, side in sides.items():
        side.step()
        reduced[name] = count_reduced(side.step)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            dist.barrier()
            began = time.perf_counter()
            side.step()
            dist.barrier()
            times[name].append(time.perf_counter() - began)
    own = {name: side.state_bytes() for name, side in sides.items()}
    every: list[Any] = [None, None]
    dist.all_gather_object(every, own)
    if rank:
        return
    order = sides["one owner"].scheduled
    print(f"one owner: walk {' '.join(str(s.rank) for s in order.walk)}, order {order.name}; "
          f"tied: order {sides['tied replicas'].scheduled.name}")  # fmt: skip
    for name, own_times in times.items():
        of = {
            other: statistics.median(a / b for a, b in zip(own_times, theirs, strict=True))
            for other, theirs in times.items()
        }
        sent = getattr(sides[name], "sent_bytes", 0)
        states = " and ".join(f"{each[name] / 2**20:.1f}" for each in every)
        print(
            f"{name:14} {statistics.median(own_times):7.3f} s per step, "
            f"{of['DeepSpeed']:.3f} of DeepSpeed, {of['tied replicas']:.3f} of tied; weights and "
            f"moments {states} MiB; reduced {reduced[name] / 2**20:.1f} MiB; sent by rank 0 "
            + (f"{sent / 2**20:.1f} MiB" if sent else "not counted")
        )


# -------------------------------------------------------------------------------------- crossover


def run_crossover(rank: int, folder: str, rounds: int) -> None:
    """Run one of the two processes of `crossover`; its two placements alternate."""
    start(rank, 2, folder, "crossover")
    tokens, excess, ratios, reduced = [], [], [], 0.0
    for num_micro in CROSSING:
        sides = [Ours(False, num_micro), Ours(True, num_micro)]
        times: list[list[float]] = [[], []]
        for i in range(rounds + 1):
            for side, took in zip(sides, times, strict=True):
                dist.barrier()
                began = time.perf_counter()
                side.step()
                dist.barrier()
                took += [time.perf_counter() - began] * bool(i)
        sent = torch.tensor([side.sent_bytes for side in sides], dtype=torch.float64)
        dist.all_reduce(sent)
        # In a ring over two ranks, each of them sends as many bytes as it reduces.
        reduced = float(sides[1].reduced_bytes)
        tokens.append(num_micro * MICRO * LENGTH)
        excess.append(float(sent[0] - sent[1]) / 2)
        ratios.append(statistics.median(a / b for a, b in zip(*times, strict=True)))
        if rank == 0:
            print(
                f"{tokens[-1]:6} tokens: one owner sends {excess[-1] / 2**20:6.2f} MiB more per "
                f"rank, tied replicas reduce {reduced / 2**20:.2f} MiB; "
                f"time {ratios[-1]:.3f} of tied"
            )
    if rank == 0:
        config = make_config({"kind": "cycle", "num_blocks": 2, "depth": 4}, (0, 1))
        formula = 12 * config.model.hidden_size
        found = reduced / (excess[0] / tokens[0])
        print(f"equal bytes at {found:.0f} tokens; 12 h (g / a) (M / p): {formula}")


# -------------------------------------------------------------------------------- clock, overhead

WALKS: dict[str, tuple[Sequence[int], int]] = {
    "1f1b": ((0, 1, 2, 3), 8),
    "interleaved": ((0, 1, 2, 3) * 2, 8),
    "interleaved_zero_bubble": ((0, 1, 2, 3) * 2, 8),
    "zbv": ((0, 1, 2, 3, 3, 2, 1, 0), 8),
    "greedy": ((0, 1, 2, 3, 0, 1, 2, 3, 3, 2, 1, 0), 8),
}
"""Blocks in their order, block b on rank b; and number of micro batches."""


class Sleep(torch.autograd.Function):
    """Simulated work: backward sleeps for inputs, then for weights, or defers the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, work: float, deferred: DeferredProducts) -> Tensor:
        time.sleep(work)
        ctx.work, ctx.deferred = work, deferred
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.work)
        if ctx.deferred.open is None:
            time.sleep(ctx.work)
        else:
            ctx.deferred.open.append(lambda: time.sleep(ctx.work))
        return grads[0], None, None


class Sleeping:
    """Stages that sleep, a `parallel.pipeline.Program`."""

    def __init__(self, work: float) -> None:
        self.work, self.deferred = work, DeferredProducts()
        self.first = torch.zeros(MESSAGE, requires_grad=True)

    def forget(self, microbatch: int) -> None:
        """Do nothing: no state is kept."""

    def shape(self, microbatch: int, stack: StackName) -> tuple[int, ...]:
        """Return the shape of a message."""
        return MESSAGE

    def forward(
        self, stage: Stage, microbatch: int, x: Tensor | None, reads: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Sleep once for each step; without work, return the input unchanged."""
        x = self.first if x is None else x
        for _ in stage.steps if self.work else ():
            x = Sleep.apply(x, self.work, self.deferred)
        return x, x.sum() if stage.last else None


def make_order(name: str, hop: float, work: float) -> tuple[Walk, PipelineOrder, Timeline, float]:
    """Return (walk, order, simulated timeline, lower bound of the time of any order)."""
    blocks, num_microbatches = WALKS[name]
    placement = Placement(4, (0, 1, 2, 3), 0, blocks[-1])
    cuts = [i for i in range(1, len(blocks)) if blocks[i] == blocks[i - 1]]
    walk = build_walk(from_order(blocks), placement, cuts)
    costs = tuple(
        StageCost(*(3 * [len(stage.steps) * work]), hop=hop, activation=len(stage.steps))
        for stage in walk
    )
    choice = choose_order(walk, num_microbatches, costs, wanted=name)  # type: ignore[arg-type]
    split = name not in ("1f1b", "interleaved")
    least = lower_bound(walk, costs, num_microbatches, split)
    return walk, choice.order, simulate(choice.order, walk, costs), least


class Watched(Pipeline):
    """A pipeline that records the time of each operation, without waits."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.took: dict[tuple[str, int], list[float]] = {}
        self.waited = 0.0

    def run_one(self, op: Op) -> None:
        """Run one operation, and record its time."""
        self.waited, began = 0.0, time.perf_counter()
        super().run_one(op)
        own = time.perf_counter() - began - self.waited
        self.took.setdefault((op.kind, op.stage), []).append(own)

    def wait(self, works: Sequence[Any], op: Op) -> None:
        """Wait for messages, and record the time."""
        began = time.perf_counter()
        super().wait(works, op)
        self.waited += time.perf_counter() - began


def measure_costs(
    mesh: Mesh, walk: Walk, order: PipelineOrder, hop: float
) -> tuple[StageCost, ...]:
    """Return the measured costs of the stages' operations, including the posting of their
    messages."""
    program = Sleeping(WORK)
    watched = Watched(mesh, walk, program, torch.float32, torch.autograd.backward, program.deferred)
    watched.run(order[mesh.pp_rank])
    every: list[Any] = [None] * mesh.pp
    dist.all_gather_object(every, {k: statistics.median(v) for k, v in watched.took.items()})
    took = {key: seconds for rank in every for key, seconds in rank.items()}
    costs = []
    for stage in range(len(walk)):
        f, i, w, b = (took.get((kind, stage), 0.0) for kind in ("F", "I", "W", "B"))
        sends = [took.get((kind, stage), 0.0) for kind in ("SEND_F", "SEND_B")]
        half = b / 2
        costs.append(StageCost(f + sends[0], (i or half) + sends[1], w or half, hop, 1))
    return tuple(costs)


def run_step(mesh: Mesh, walk: Walk, order: PipelineOrder, work: float) -> float:
    """Return the wall time of one step on all ranks, in seconds."""
    program = Sleeping(work)
    pipeline = Pipeline(
        mesh, walk, program, torch.float32, torch.autograd.backward, program.deferred
    )
    dist.barrier()
    began = time.perf_counter()
    pipeline.run(order[mesh.pp_rank])
    dist.barrier()
    return time.perf_counter() - began


def run_loop(mesh: Mesh, walk: Walk, order: PipelineOrder) -> float:
    """Return the wall time of the same messages in a hand-written loop, in seconds."""
    works: list[Any] = []
    arrived: dict[tuple[str, int, int], Any] = {}
    tensor = torch.zeros(MESSAGE)
    dist.barrier()
    began = time.perf_counter()
    for kind, stage, j in order[mesh.pp_rank]:
        step = {"SEND_F": 1, "RECV_F": -1, "SEND_B": -1, "RECV_B": 1}.get(kind)
        if step is not None:
            peer = walk[stage + step].rank
            if kind.startswith("SEND"):
                works.append((dist.isend(tensor.clone(), peer), tensor))
            else:
                arrived[kind, stage, j] = dist.irecv(torch.empty(MESSAGE), peer)
        elif kind != "W":
            wait = arrived.pop(("RECV_F" if kind == "F" else "RECV_B", stage, j), None)
            if wait is not None:
                wait.wait()
    for work, _ in works:
        work.wait()
    dist.barrier()
    return time.perf_counter() - began


def measure_hop() -> float:
    """Return the seconds that a message takes to the next rank: half of a round trip."""
    tensor, rank, times = torch.zeros(MESSAGE), dist.get_rank(), []
    for _ in range(50):
        dist.barrier()
        began = time.perf_counter()
        if rank == 0:
            dist.send(tensor, 1)
            dist.recv(tensor, 1)
        elif rank == 1:
            dist.recv(tensor, 0)
            dist.send(tensor, 0)
        times.append((time.perf_counter() - began) / 2)
    hop = torch.tensor([statistics.median(times)], dtype=torch.float64)
    dist.broadcast(hop, 0)
    return float(hop)


def run_clock(rank: int, folder: str, rounds: int) -> None:
    """Run one of the four processes of `clock`, whose stages sleep."""
    start(rank, 4, folder, "clock")
    config = make_config({"kind": "dense", "num_layers": 4}, (0, 1, 2, 3))
    mesh = build_mesh(config, torch.device("cpu"))
    hop = measure_hop()
    if rank == 0:
        print(f"clock: 4 processes, {WORK * 1000:.0f} ms, hops of 1 MiB in {hop * 1e3:.2f} ms")
    for name in WALKS:
        walk, order, simulated, least = make_order(name, hop, WORK)
        expected = simulated.makespan
        busy = (1 - simulated.bubble) * expected
        run_step(mesh, walk, order, WORK)
        found = statistics.median(run_step(mesh, walk, order, WORK) for _ in range(rounds))
        measured = simulate(order, walk, measure_costs(mesh, walk, order, hop)).makespan
        if rank == 0:
            print(
                f"{name:24} {found * 1000:7.1f} ms; simulator, 5 ms: {expected * 1000:7.1f} ms, "
                f"ratio {found / expected:.3f}; as measured: {measured * 1000:7.1f} ms, "
                f"ratio {found / measured:.3f}; bubble {1 - busy / found:.1%}, by the simulator "
                f"{simulated.bubble:.1%}; least possible {least * 1000:.1f} ms"
            )


def run_overhead(rank: int, folder: str, rounds: int) -> None:
    """Run one of the four processes of `overhead`, whose stages are empty."""
    start(rank, 4, folder, "overhead")
    config = make_config({"kind": "dense", "num_layers": 4}, (0, 1, 2, 3))
    mesh = build_mesh(config, torch.device("cpu"))
    for name in WALKS:
        walk, order, *_ = make_order(name, 0.0, WORK)
        pairs = []
        for _ in range(4 * rounds + 1):
            pairs.append((run_step(mesh, walk, order, 0.0), run_loop(mesh, walk, order)))
        ratio = statistics.median(a / b for a, b in pairs[1:])
        ours, loop = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
        if rank == 0:
            print(f"overhead {name:24} {ours * 1000:6.1f} ms, by hand {loop * 1000:6.1f} ms, "
                  f"ratio {ratio:.2f}")  # fmt: skip


# --------------------------------------------------------------------------------------- evaluate

EVALUATED: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense", "num_layers": 4},
    "cycle, 2 loops": {"kind": "cycle", "num_blocks": 4, "depth": 8},
    "cycle, 3 loops": {"kind": "cycle", "num_blocks": 4, "depth": 12},
    "cycle_reverse": {"kind": "cycle_reverse", "num_blocks": 4, "depth": 8},
}
SCORED = 32
"""Number of micro batches."""
SIDES = ("one rank at a time", "one order at a time", "16 in flight")
SLEEP = 0.04
"""Seconds of a step of the map in `evaluate`."""


def run_forwards(mesh: Mesh, schedules: Schedules, in_flight: int) -> float:
    """Return the wall time of the forward passes of all micro batches, in seconds.

    Args:
        in_flight: micro batches of an order; 0: one, and the next starts when all ranks are done.
    """
    alone, in_flight = in_flight == 0, max(in_flight, 1)
    scheduled = schedules.forward(num_microbatches=in_flight)
    dist.barrier()
    began = time.perf_counter()
    for _ in range(SCORED // in_flight):
        pipeline = Pipeline(mesh, scheduled.walk, Sleeping(SLEEP), torch.float32)
        pipeline.run(scheduled.order[mesh.pp_rank])
        if alone:
            dist.barrier()
    dist.barrier()
    return time.perf_counter() - began


def score(
    config: Config, model: Transformer, mesh: Mesh, schedules: Schedules, in_flight: int
) -> float:
    """Return the wall time of scoring all micro batches, in seconds."""
    batches = [make_batch(i) for i in range(SCORED)]
    sums = torch.zeros(2, LENGTH.bit_length() + 1, dtype=torch.float64)
    schedule = partial(schedules.forward, None, True)
    dist.barrier()
    began = time.perf_counter()
    # One at a time: evaluation starts anew for each micro batch.
    for some in [batches] if in_flight > 1 else [[batch] for batch in batches]:
        with torch.no_grad():
            for batch, x, _ in evaluate.run_batches(model, mesh, schedule, some, [], None):
                if x is not None:
                    NextToken(config, model.readout).count(batch, x, [], sums)
    dist.barrier()
    return time.perf_counter() - began


def run_evaluate(rank: int, folder: str, rounds: int) -> None:
    """Run one of the four processes of `evaluate`, whose stages sleep."""
    start(rank, 4, folder, "evaluate")
    many = 4 * evaluate.IN_FLIGHT
    for name, recurrence in EVALUATED.items():
        config = make_config(recurrence, (0, 1, 2, 3))
        mesh, schedules = build_mesh(config, torch.device("cpu")), Schedules(config)
        one, several = schedules.forward(), schedules.forward(num_microbatches=many)
        costs = [StageCost(len(stage.steps) * SLEEP, 0.0, 0.0, 0.001) for stage in one.walk]
        in_turn = tuple(
            tuple(op._replace(microbatch=j) for j in range(many) for op in ops) for ops in one.order
        )
        simulated = [simulate(order, one.walk, costs) for order in (in_turn, several.order)]
        makespans = [many * simulate(one.order, one.walk, costs).makespan]
        makespans += [timeline.makespan for timeline in simulated]
        times: list[list[float]] = [[], [], []]
        for _ in range(rounds + 1):
            for side, in_flight in zip(times, (0, 1, many), strict=True):
                side.append(run_forwards(mesh, schedules, in_flight))
        if rank:
            continue
        work = SCORED * SLEEP * sum(len(stage.steps) for stage in one.walk) / 4
        medians = [statistics.median(side[1:]) for side in times]
        print(f"evaluate {name}")
        for how, seconds, makespan in zip(SIDES, medians, makespans, strict=True):
            print(
                f"  {how:24} {seconds * 1e3:6.0f} ms, {seconds / medians[-1]:.2f} times the last, "
                f"by the simulator {makespan / makespans[-1]:.2f}; ranks idle "
                f"{1 - work / seconds:.0%}",
                flush=True,
            )


def run_score(rank: int, folder: str, rounds: int) -> None:
    """Run one of the four processes of `score`, which compute."""
    start(rank, 4, folder, "score")
    many = 4 * evaluate.IN_FLIGHT
    for name, recurrence in EVALUATED.items():
        config = make_config(recurrence, (0, 1, 2, 3))
        mesh, schedules = build_mesh(config, torch.device("cpu")), Schedules(config)
        model = build_model(config, mesh, schedules)
        times: list[list[float]] = [[], []]
        for _ in range(rounds + 1):
            for side, in_flight in zip(times, (1, many), strict=True):
                side.append(score(config, model, mesh, schedules, in_flight))
        if rank == 0:
            before, after = (statistics.median(side[1:]) for side in times)
            tokens = SCORED * MICRO * LENGTH
            print(
                f"score {name:16} {tokens / before:.0f} tokens/s one at a time, "
                f"{tokens / after:.0f} with {many} in flight, {before / after:.2f} times as fast",
                flush=True,
            )


def main() -> None:
    """Start the processes of the parts named on the command line, or of all parts."""
    rounds = int(sys.argv[sys.argv.index("--rounds") + 1]) if "--rounds" in sys.argv else 5
    parts = [part for part in PARTS if part in sys.argv] or list(PARTS)
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            run, world = {
                "owner": (run_owner, 2),
                "crossover": (run_crossover, 2),
                "clock": (run_clock, 4),
                "overhead": (run_overhead, 4),
                "evaluate": (run_evaluate, 4),
                "score": (run_score, 4),
            }[part]
            mp.spawn(run, (folder, rounds), nprocs=world)


if __name__ == "__main__":
    main()
