"""Pipeline parallelism with one owner per block: the same losses and gradients as one process."""

import contextlib
import math
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.configs import ENTRY, make_config
from support.harness import assert_gradients_close, compare
from support.meshes import (
    SEQUENCE,
    build_on_mesh,
    check_same_run,
    config_of,
    gather_whole,
    later,
    measure_activations,
    mesh_of,
    reference,
    step_of,
    trace,
)
from support.once import make_once
from support.walks import loops
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    _Action,
    _ComputationType,
    _PipelineScheduleRuntime,
)

from megarecur.checkpoint import checkpoint
from megarecur.checkpoint.load import load_model
from megarecur.config.run import Config
from megarecur.data.open import with_vocab_size
from megarecur.errors import ConfigError
from megarecur.inference.generate import generate
from megarecur.model.context import build_context
from megarecur.model.transformer import Transformer
from megarecur.parallel import channels as channels_module
from megarecur.parallel import pipeline as pipeline_module
from megarecur.parallel.loss import LossTerm
from megarecur.parallel.mesh import Mesh
from megarecur.parallel.pipeline import Pipeline, PipelineError
from megarecur.parallel.shards import whole
from megarecur.plan.order import Op, StageCost, order_hash, validate_order
from megarecur.plan.schedule import Schedules
from megarecur.plan.simulate import simulate
from megarecur.plan.walk import Stage, forward_only
from megarecur.recurrence.inventory import build_inventory
from megarecur.train.metrics import read_rows
from megarecur.train.state import is_reordered
from megarecur.train.step import forward_backward, sum_losses
from megarecur.train.trainer import FINISHED, train

DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}


def piped(corpus: Path, scheme: str, pipeline: int, micro: int = 1, **sections: Any):
    """A parity config of `micro` micro batches per replica of one."""
    tensor = sections.get("parallel", {}).get("tensor", 1)
    sections["parallel"] = {"pipeline": pipeline, **sections.get("parallel", {})}
    return config_of(corpus, scheme, tensor, **sections)


COVERING = [
    ("dense", 2, 2, {}),
    ("cycle", 2, 2, {"model": DROPOUT}),
    ("cycle_reverse", 2, 2, {"model": DROPOUT}),
    ("sequence", 2, 4, {}),
    ("reuse_map", 2, 2, {"recurrence": ENTRY}),
    ("block_recurrence", 2, 2, {"model": DROPOUT}),
    ("loop", 3, 3, {"model": DROPOUT}),
    ("custom", 3, 3, {"model": {"tie_embeddings": False}}),
]


@pytest.mark.parametrize(("scheme", "pipeline", "processes", "extra"), COVERING)
def test_ranks_equal_one_process(world, corpus, scheme, pipeline, processes, extra) -> None:
    train = {"micro_batch_size": 1, "global_batch_size": 4}
    config = piped(corpus, scheme, pipeline, train=train, **extra)
    compare(world(processes).run(trace, config, 5)[0], reference(config, 5))


MAPS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense", "num_layers": 4},
    "sequence": {"kind": "sequence", "num_blocks": 3, "depth": 6},
    "cycle": {"kind": "cycle", "num_blocks": 3, "depth": 6},
    "cycle_reverse": {"kind": "cycle_reverse", "num_blocks": 3, "depth": 6},
    "custom": {"kind": "custom", "order": [0, 1, 2, 0, 1, 2, 2, 1, 0]},
    "reuse_map": {"kind": "reuse_map", "reuse_map": [4, 2, 1, 1], "injection": "add"},
    "loop": {"kind": "loop", "prelude": 1, "core": 2, "coda": 1, "num_loops": 3},
    "sampled": {"kind": "loop", "prelude": 1, "core": 2, "coda": 1, "backward_loops": 2,
                "num_loops": {"sampler": "uniform", "min": 1, "max": 4}},
    "truncated": {"kind": "loop", "prelude": 1, "core": 1, "coda": 2, "num_loops": 4,
                  "backward_loops": 1, "initial_state": "random"},
    "huginn": {"kind": "loop", "prelude": 1, "core": 2, "coda": 1, "num_loops": 3,
               "final_norm_after_core": True, "initial_state": "random"},
}  # fmt: skip


ORDERS = ["auto", "1f1b", "interleaved", "interleaved_zero_bubble", "zbv", "greedy"]


def draw(number: int, corpus: Path) -> tuple[Config, int]:
    """(a config, its number of processes); numbers walk through the maps."""
    rng = random.Random(number)
    name = list(MAPS)[number % len(MAPS)]
    tensor, pipeline, dp = rng.choice(
        [(1, 2, 1), (1, 3, 1), (1, 2, 2), (2, 2, 1), (1, 3, 1), (1, 2, 1)]
    )
    num_microbatches = rng.choice([1, 3, 8])
    stage = rng.choice([0, 0, 1, 2, 3, 3])
    parallel = {"tensor": tensor, "pipeline": pipeline, "zero_stage": stage,
                "sequence_parallel": tensor > 1 and rng.random() < 0.5,
                "split_backward": rng.random() < 0.7}  # fmt: skip
    if stage:
        parallel["shard_group"] = rng.choice([None, 1, dp])
    if stage == 3:
        parallel["gathered_blocks"] = rng.choice([None, 1])
    train = {"micro_batch_size": 1, "global_batch_size": dp * num_microbatches,
             "recompute": rng.random() < 0.3,
             "precision": "fp64" if rng.random() < 0.4 else "fp32"}  # fmt: skip
    model = {**DROPOUT, "tie_embeddings": rng.random() < 0.5,
             "norm_position": rng.choice(["pre", "sandwich"]),
             "positions": rng.choice(["rope", "learned", "alibi"])}  # fmt: skip
    for order in rng.sample(ORDERS, len(ORDERS)):
        sections = {"parallel": {**parallel, "order": order}, "train": train, "model": model}
        with contextlib.suppress(ConfigError):  # Until one suits the walk.
            config = config_of(corpus, "dense", tensor, recurrence=MAPS[name], **sections)
            Schedules(with_vocab_size(config, 257))
            return config, dp * pipeline * tensor
    raise AssertionError("greedy suits every walk")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(MAPS)))
def test_a_larger_sample_equals_one_process(world, corpus, number) -> None:
    config, processes = draw(number, corpus)
    tolerances = (1e-11, 1e-11) if config.train.precision == "fp64" else (2e-6, 2e-5)
    compare(world(processes).run(trace, config, 5)[0], reference(config, 5), *tolerances)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_microbatches"), [("reuse_map", 1), ("loop", 4), ("reuse_map", 8)]
)
def test_four_ranks_equal_one_process(world, corpus, name, num_microbatches) -> None:
    """As many micro batches as one, as there are ranks, and twice as many."""
    train = {"micro_batch_size": 1, "global_batch_size": num_microbatches}
    config = piped(corpus, "dense", 4, train=train, model=DROPOUT, recurrence=MAPS[name])
    compare(world(4).run(trace, config, 3)[0], reference(config, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage", "sequence"),
    [("cycle", 3, True), ("huginn", 0, False), ("cycle_reverse", 2, True)],
)
def test_all_axes_at_once(world, corpus, name, stage, sequence) -> None:
    """dp 2 x pp 2 x tp 2."""
    parallel = {"tensor": 2, "pipeline": 2, "zero_stage": stage, "sequence_parallel": sequence}
    train = {"micro_batch_size": 1, "global_batch_size": 6}
    sections = {"parallel": parallel, "train": train, "model": DROPOUT, "recurrence": MAPS[name]}
    config = config_of(corpus, "dense", 2, **sections)
    traces = world(8).run(trace, config, 5)
    compare(traces[0], reference(config, 5))
    assert len({tuple(norm for _, _, norm, _ in each) for each in traces}) == 1


MESHES = [
    # scheme, (tensor, pipeline, processes), ZeRO stage, sections
    ("cycle", (1, 2, 4), 1, {"model": DROPOUT}),
    ("cycle_reverse", (2, 2, 4), 0, {**SEQUENCE, "model": DROPOUT}),
    ("loop", (2, 2, 4), 1, {**SEQUENCE, "model": DROPOUT}),
    ("cycle", (1, 2, 4), 3, {"model": {"tie_embeddings": True}}),
    ("loop", (1, 2, 4), 3, {"parallel": {"gathered_blocks": 1}, "train": {"recompute": True}}),
    ("reuse_map", (1, 2, 4), 2, {"train": {"recompute": True}}),
    ("dense", (1, 2, 2), 1, {"model": {"positions": "learned", "norm": "layer"}}),
]


@pytest.mark.parametrize(("scheme", "mesh", "stage", "extra"), MESHES)
def test_pipelines_with_other_axes(world, corpus, scheme, mesh, stage, extra) -> None:
    tensor, pipeline, processes = mesh
    parallel = {"tensor": tensor, "zero_stage": stage, **extra.get("parallel", {})}
    train = {"micro_batch_size": 1, "global_batch_size": 6, **extra.get("train", {})}
    config = piped(corpus, scheme, pipeline, **{**extra, "train": train, "parallel": parallel})
    compare(world(processes).run(trace, config, 5)[0], reference(config, 5))


# -------------------------------------------------------------------------------------- whole runs


def run_of(corpus: Path, run_dir: Path, steps: int, pipeline: int, **parallel: Any) -> Config:
    train = {
        "steps": steps,
        "sample_prompts": ["def ", "str"],
        "sample_tokens": 8,
        "eval_every": 2,
        "eval_depths": [1, 4],
    }
    parallel = {"pipeline": pipeline, **parallel}
    sections = {"parallel": parallel, "train": train, "checkpoint": {"every": 2}}
    return config_of(corpus, "loop", parallel.get("tensor", 1), run_dir=str(run_dir), **sections)


def test_a_pipelined_run_evaluates_talks_and_goes_on_on_other_meshes(
    world, corpus, tmp_path
) -> None:
    alone, mesh = tmp_path / "alone", tmp_path / "mesh"
    assert train(run_of(corpus, alone, 8, 1)) == FINISHED
    on_four = run_of(corpus, mesh, 4, 2, tensor=2, sequence_parallel=True)
    on_three = run_of(corpus, mesh, 6, 3)
    assert set(world(4).run(train, on_four)) == {FINISHED}
    few = Schedules(with_vocab_size(on_four, 257)).describe(None, 1)
    assert "fewer micro batches than ranks" in few and "1 micro batches" in few
    assert set(world(3).run(train, on_three)) == {FINISHED}
    assert train(run_of(corpus, mesh, 8, 1)) == FINISHED
    check_same_run(alone, mesh, 8)


# ------------------------------------------------------------------- one owner, and what travels


def take_a_step(config: Config) -> dict[str, Any]:
    """One optimizer step of this rank: what it holds, runs, keeps and sends."""
    config, model, engine, mesh, loader = build_on_mesh(config)
    scheduled = Schedules(config).training(None, len(loader.batch(0)))
    seen: dict[str, Any] = {"ops": [], "reduced": []}
    whole, runs, reduce = Pipeline.run, Pipeline.run_one, dist.all_reduce

    def run(pipeline: Pipeline, ops: Any) -> None:
        whole(pipeline, ops)
        seen["live"], seen["sent"] = pipeline.most_live, pipeline.bytes_sent

    def run_one(pipeline: Pipeline, op: Any) -> None:
        seen["ops"].append(op)
        runs(pipeline, op)

    def all_reduce(tensor: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        across = group in (mesh.pp_group, mesh.replica_group, None, dist.group.WORLD)
        seen["reduced"] += [tensor.numel()] if across else []
        return reduce(tensor, *args, group=group, **kwargs)

    with (
        mock.patch.object(Pipeline, "run", run),
        mock.patch.object(Pipeline, "run_one", run_one),
        mock.patch.object(dist, "all_reduce", all_reduce),
    ):
        forward_backward(model, engine, config, loader.batch(0), 0, mesh)
        seen["norm"], _ = engine.step(0.1)
    seen["names"] = {name: p.numel() for name, p in model.parameters_by_name.items()}
    seen["order"], seen["walk"] = scheduled.order[mesh.pp_rank], scheduled.walk
    unit = (StageCost(1.0, 1.0, 1.0),) * len(scheduled.walk)
    timeline = simulate(scheduled.order, scheduled.walk, unit)
    seen["expected"] = timeline.peak_live[mesh.pp_rank]
    seen["shape"] = model.hidden_shape(loader.batch(0)[0].tokens_BS)
    return seen


@pytest.mark.parametrize(
    ("scheme", "pipeline", "order", "micro"),
    [("cycle", 2, "auto", 1), ("cycle", 2, "greedy", 1), ("cycle_reverse", 2, "zbv", 1),
     ("reuse_map", 2, "1f1b", 1), ("reuse_map", 3, "interleaved_zero_bubble", 1),
     ("loop", 3, "greedy", 2), ("custom", 3, "auto", 1), ("sequence", 2, "1f1b", 2)],
)  # fmt: skip
def test_blocks_have_one_owner_and_orders_are_kept(
    world, corpus, scheme, pipeline, order, micro
) -> None:
    train = {"micro_batch_size": micro, "global_batch_size": 8}
    parallel = {"order": order}
    config = piped(corpus, scheme, pipeline, train=train, parallel=parallel)
    ranks = world(pipeline).run(take_a_step, config)
    names = [name for rank in ranks for name in rank["names"]]
    walk = ranks[0]["walk"]
    tied_apart = walk[0].rank != walk[-1].rank
    twice = {name for name in names if names.count(name) > 1}
    assert twice == ({"embedding.weight"} if tied_apart else set())
    whole = build_inventory(build_on_mesh(config_of(corpus, scheme, 1, train=train))[0])
    assert set(names) == set(whole)
    for number, rank in enumerate(ranks):
        blocks = {step.block for stage in walk if stage.rank == number for step in stage.steps}
        held = {int(name.split(".")[1]) for name in rank["names"] if name.startswith("blocks.")}
        assert held == blocks
        # What all-reduces cross stages are few numbers: the nine counts of what is read, the norm.
        assert all(size <= 9 for size in rank["reduced"])
        assert rank["ops"] == list(rank["order"]) and rank["live"] == rank["expected"]
        assert rank["norm"] == ranks[0]["norm"]
        hops = sum(op.kind.startswith("SEND") for op in rank["order"])
        assert rank["sent"] == hops * 4 * math.prod(rank["shape"])


# ------------------------------------------------------------------------------------- directions


def record_messages(config: Config) -> list[tuple[int, int, str]]:
    """(sender, receiver, group) of each message of a step."""
    config, model, engine, mesh, loader = build_on_mesh(config)
    assert mesh.channels is not None
    names = {id(mesh.channels.up): "up", id(mesh.channels.down): "down"}
    forward_backward(model, engine, config, loader.batch(0), 0, mesh)  # Opens the communicators.
    found, send, receive = [], dist.isend, dist.irecv

    def isend(tensor: Tensor, to: int, group: Any) -> Any:
        found.append((mesh.rank, to, names[id(group)]))
        return send(tensor, to, group=group)

    def irecv(tensor: Tensor, source: int, group: Any) -> Any:
        found.append((source, mesh.rank, names[id(group)]))
        return receive(tensor, source, group=group)

    with mock.patch.object(dist, "isend", isend), mock.patch.object(dist, "irecv", irecv):
        forward_backward(model, engine, config, loader.batch(1), 1, mesh)
    return found


def test_no_communicator_has_messages_of_two_directions(world, corpus) -> None:
    """nccl opens one per group and pair of ranks."""
    sections = {"train": {"micro_batch_size": 1, "global_batch_size": 4}}
    config = piped(corpus, "dense", 3, recurrence=MAPS["custom"], **sections)
    directions: dict[tuple[str, frozenset[int]], set[tuple[int, int]]] = {}
    for found in world(3).run(record_messages, config):
        for sender, receiver, group in found:
            pair = group, frozenset((sender, receiver))
            directions.setdefault(pair, set()).add((sender, receiver))
    assert len(directions) == 6 and all(len(each) == 1 for each in directions.values())


class Halves:
    """Stages that halve their input and add the number of the micro batch."""

    def __init__(self) -> None:
        self.outputs: dict[int, float] = {}

    def forget(self, microbatch: int) -> None:
        """Keeps nothing."""

    def shape(self, microbatch: int, stack: str) -> tuple[int, ...]:
        return (2, 256, 1024)  # gloo holds a message of this size until its receive is posted.

    def forward(
        self, stage: Stage, microbatch: int, x: Tensor | None, reads: dict[str, Tensor]
    ) -> tuple[Tensor, None]:
        x = torch.zeros(self.shape(microbatch, "decoder")) if x is None else x
        x = x / 2 + microbatch
        if stage.last:
            self.outputs[microbatch] = x.mean().item()
        return x, None


def run_orders(made: list[tuple[Any, Any]]) -> list[dict[int, float]]:
    """Outputs of orders on this rank, with receives posted where the order has them."""
    config = make_config(Path("none"), "dense", parallel={"pipeline": 2})
    mesh, found = mesh_of(config), []
    with mock.patch.object(pipeline_module, "AHEAD", 1):
        for walk, order in made:
            program = Halves()
            Pipeline(mesh, walk, program, torch.float32).run(order[mesh.pp_rank])
            found.append(program.outputs)
    return found


def test_ranks_run_what_the_validator_accepts(world) -> None:
    """Both ranks send before they receive; as many sends as may be unfinished; a receive far ahead
    of its message, before sends to the same rank."""
    walk = forward_only(loops(2, 2))

    def run(stage: int, numbers: Any) -> list[Op]:
        kinds = ("RECV_F", "F", "SEND_F")[stage == 0 : 3 - (stage == 3)]
        return [Op(kind, stage, j) for j in numbers for kind in kinds]

    both = ([*run(0, [0, 1]), *run(2, [0, 1])], [*run(1, [0]), *run(1, [1]), *run(3, [0, 1])])
    most = ([*run(0, range(9)), *run(2, range(9))], [*run(1, range(9)), *run(3, range(9))])
    early = [Op("RECV_F", 2, 0), *(op for op in most[0] if op != Op("RECV_F", 2, 0))]
    made = [(walk, both), (walk, most), (walk, (early, most[1]))]
    for _, order in made:
        num = sum(op.kind == "F" for op in order[0]) // 2
        assert validate_order(tuple(map(tuple, order)), walk, num) == []
    _, found = world(2).run(run_orders, made)
    for outputs, num in zip(found, (2, 9, 9), strict=True):
        assert outputs == {j: j * (1 + 1 / 2 + 1 / 4 + 1 / 8) for j in range(num)}


def create_groups(bound: Any) -> tuple[Any, Any]:
    """The device that the world is bound to, while groups are created and afterwards."""
    world = SimpleNamespace(bound_device_id=bound)
    group = mock.patch.object(channels_module.dist, "group", SimpleNamespace(WORLD=world))
    with group, channels_module.unbound():
        during = world.bound_device_id
    return during, world.bound_device_id


def test_groups_of_messages_are_not_split_off_a_bound_world() -> None:
    device = torch.device("cuda", 0)
    assert create_groups(device) == (None, device)
    assert create_groups(None) == (None, None)


# --------------------------------------------------------------------------------------- failures


def train_until(config: Config, rank: int, kind: str, after: int, fault: str) -> int:
    """Train; on one rank, something happens in the operation of a kind that comes `after` others of
    its kind."""
    seen, runs = [0], Pipeline.run_one

    def run_one(pipeline: Pipeline, op: Any) -> None:
        training = pipeline.backward is not None
        if dist.get_rank() == rank and op.kind == kind and training:
            seen[0] += 1
            if seen[0] > after and fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if seen[0] > after:
                raise PipelineError("planted")
        runs(pipeline, op)

    with mock.patch.object(Pipeline, "run_one", run_one):
        return train(config)


@pytest.fixture(scope="module")
def straight(world, corpus, tmp_path_factory) -> Callable[[bool], Path]:
    """The run of `killable_run` that nobody kills, for each value of `split`."""

    def by_split(split: bool) -> Path:
        def make(folder: Path) -> None:
            config = killable_run(corpus, folder / "run", split)
            assert set(world(2).run(train, config)) == {FINISHED}

        return make_once(tmp_path_factory, f"straight-{split}", make) / "run"

    return by_split


def killable_run(corpus: Path, run_dir: Path, split: bool) -> Config:
    """Six steps on two stages, with a checkpoint after every second."""
    parallel = {"pipeline": 2, "split_backward": split,
                "order": "greedy" if split else "1f1b"}  # fmt: skip
    sections = {
        "parallel": parallel,
        "train": {"steps": 6, "micro_batch_size": 1, "global_batch_size": 4},
        "checkpoint": {"every": 2},
    }
    return config_of(corpus, "sequence", 1, run_dir=str(run_dir), **sections)


# The first stage receives no activations and sends no gradients, the last one the reverse.
@pytest.mark.parametrize(
    ("kind", "rank"),
    [("F", 1), ("RECV_B", 0),
     *[later(*case) for case in (("F", 0), ("SEND_F", 0), ("RECV_F", 1), ("B", 1), ("I", 0),
                                 ("W", 1), ("SEND_B", 1))]],
)  # fmt: skip
def test_a_rank_that_is_killed_ends_the_job_which_resumes(
    world, corpus, straight, tmp_path, kind, rank
) -> None:
    """In an operation of each kind in the fourth step, after the checkpoint of the second."""
    split = kind in ("I", "W")
    config = killable_run(corpus, tmp_path / "run", split)
    order = Schedules(with_vocab_size(config, 257)).training(None, 4).order[rank]
    each = sum(op.kind == kind for op in order)
    assert each
    job = world(2)
    job.submit(train_until, config, rank, kind, 3 * each + 1, "killed")
    errors = [error for error, _ in job.collect(timeout=600, grace=240)]
    assert "still running" not in "".join(errors) and all(errors), "\n".join(errors)
    told, named = errors[1 - rank], f"rank {1 - rank} (pipeline rank {1 - rank}), "
    # The survivor may have done all its operations where those of the other one feed nobody.
    waiting = split and f"{named}reduction and update of step 4" in told
    assert waiting or (f"{named}stage " in told and " of micro batch " in told)
    assert set(world(2).run(train, config)) == {FINISHED}
    losses = [
        {row["step"]: row["train/loss"] for row in read_rows(folder / "metrics.jsonl")
         if "train/loss" in row}
        for folder in (tmp_path / "run", straight(split))
    ]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_rank_that_raises_ends_the_job(corpus, tmp_path) -> None:
    """Processes of their own, as a launcher starts them: none outlives another's error."""
    parallel = {"pipeline": 2, "split_backward": False}
    sections = {"parallel": parallel, "train": {"steps": 6}}
    config = config_of(corpus, "cycle", 1, run_dir=str(tmp_path / "run"), **sections)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    call = "train_until(make(open('config.json').read()), 0, 'B', 3, 'raises')"
    code = f"from test_pipeline import *; make = Config.model_validate_json; {call}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    jobs = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_PORT": port}
        environment = {
            **os.environ,
            **place,
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        }
        jobs.append(subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment,
                                     stderr=subprocess.PIPE, text=True))  # fmt: skip
    errors = [job.communicate(timeout=800)[1] for job in jobs]
    assert all(job.returncode not in (0, FINISHED) for job in jobs)
    assert "PipelineError: planted" in errors[0]
    assert "rank 1 (pipeline rank 1), stage " in errors[1]


# ---------------------------------------------------------------------------------------- oracle


class StageModule(nn.Module):
    """A stage for torch.distributed.pipelining; blocks are shared between the stages of a rank."""

    def __init__(self, model: Transformer, stage: Stage) -> None:
        super().__init__()
        self.model, self.stage = model, stage

    def forward(self, x: Tensor, *, positions: Tensor, documents: Tensor) -> Tensor:
        ctx = build_context(
            self.model.config.model, positions, self.model.dtype, documents_BS=documents
        )
        if self.stage.first:
            x = self.model.embed(x, ctx)
        return self.model.run(self.stage.steps, x, ctx, {})[0].clone()


def gradients_by_torch(config: Config) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This rank's gradients of one step, by torch's runtime and by ours, from the same order."""
    config, model, engine, mesh, loader = build_on_mesh(config)
    batches = loader.batch(0)
    scheduled = Schedules(config).training(None, len(batches))
    forward_backward(model, engine, config, batches, 0, mesh)
    ours = engine.gradients()
    engine.step(0.0)
    tokens = sum(batch.num_tokens for batch in batches)

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        return model.loss(x, SimpleNamespace(labels_BS=labels))["loss"].total / tokens

    shape, walk = batches[0].tokens_BS.shape, scheduled.walk
    hidden = torch.empty(*shape, config.model.hidden_size, device="meta", requires_grad=True)
    stages = [
        PipelineStage(
            StageModule(model, stage), stage.index, len(walk), mesh.device,
            input_args=(batches[0].tokens_BS.to("meta") if stage.first else hidden,),
            output_args=(hidden,),
        )
        for stage in walk if stage.rank == mesh.pp_rank
    ]  # fmt: skip
    runtime = _PipelineScheduleRuntime(stages, len(batches), loss, scale_grads=False)
    kinds = {"F": _ComputationType.FORWARD, "B": _ComputationType.FULL_BACKWARD}
    runtime.pipeline_order = {
        rank: [_Action(op.stage, kinds[op.kind], op.microbatch) for op in ops if op.kind in kinds]
        for rank, ops in enumerate(scheduled.order)
    }
    runtime._prepare_schedule_with_comms(runtime.pipeline_order)

    def every(name: str) -> Tensor:
        return torch.cat([getattr(batch, name) for batch in batches])

    runtime.step(
        *((every("tokens_BS"),) if walk[0].rank == mesh.pp_rank else ()),
        target=every("labels_BS") if walk[-1].rank == mesh.pp_rank else None,
        losses=[],
        positions=every("positions_BS"),
        documents=every("documents_BS"),
    )
    return engine.gradients(), ours


@pytest.mark.parametrize(
    ("name", "pipeline", "order"),
    [("cycle", 3, "interleaved"), ("custom", 3, "greedy"), ("cycle_reverse", 3, "greedy"),
     later("cycle", 2, "greedy"), later("reuse_map", 2, "1f1b"), later("dense", 4, "1f1b")],
)  # fmt: skip
def test_torch_runs_the_same_orders_to_the_same_gradients(
    world, corpus, name, pipeline, order
) -> None:
    parallel = {"pipeline": pipeline, "order": order, "split_backward": False}
    train = {"micro_batch_size": 1, "global_batch_size": 6}
    sections = {"parallel": parallel, "train": train, "recurrence": MAPS[name]}
    config = config_of(corpus, "dense", 1, **sections)
    for theirs, ours in world(pipeline).run(gradients_by_torch, config):
        assert_gradients_close(ours, theirs, 2e-6)


@pytest.mark.parametrize(
    ("name", "pipeline", "order"),
    [("cycle", 3, "greedy"), ("reuse_map", 2, "1f1b"), ("loop", 2, "greedy")],
)
def test_the_plan_foretells_what_autograd_holds(world, corpus, name, pipeline, order) -> None:
    parallel = {"pipeline": pipeline, "order": order, "split_backward": False}
    sections = {
        "parallel": parallel,
        "train": {"micro_batch_size": 2, "global_batch_size": 12},
        "recurrence": MAPS[name],
        "model": {"hidden_size": 64, "ffn_hidden_size": 192},
        "data": {"seq_length": 64, "mask_documents": False},
    }
    for held, planned in world(pipeline).run(
        measure_activations, config_of(corpus, "dense", 1, **sections)
    ):
        assert planned == pytest.approx(held, rel=0.1)


# ------------------------------------------------------- ragged micro batches, losses on the way


def auxiliary_run(model: Transformer, steps: Any, x: Tensor, ctx: Any, reads: Any) -> Any:
    """Every step of the map adds to a loss of its own."""
    total = torch.zeros((), dtype=x.dtype)
    for step in steps:
        x = model.runner((step,), x, ctx, reads, model.final_norm, {})
        total = total + 1e-2 * x.square().sum()
    return x, {"size": LossTerm(total, "tokens")}


def trace_ragged(config: Config) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and gradients of one step whose micro batches have lengths of their own."""
    config, model, engine, mesh, loader = build_on_mesh(config)
    names = ("tokens_BS", "labels_BS", "positions_BS", "documents_BS")
    batches = [
        replace(batch, **{name: getattr(batch, name)[:, : 16 - 4 * (i % 3)] for name in names})
        for i, batch in enumerate(loader.batch(0))
    ]
    with mock.patch.object(Transformer, "run", auxiliary_run):
        result = forward_backward(model, engine, config, batches, 0, mesh)
    losses = {name: sum_losses(result, mesh, name) for name in ("loss", "size")}
    return losses, gather_whole(model, mesh, engine.gradients())


def test_lengths_may_differ_and_every_stage_may_add_to_the_loss(world, corpus) -> None:
    train = {"micro_batch_size": 1, "global_batch_size": 5}
    sections = {"train": train, "recurrence": MAPS["huginn"]}
    config = config_of(corpus, "dense", 1, parallel={"pipeline": 2}, **sections)
    losses, gradients = world(2).run(trace_ragged, config)[0]
    expected, of_one = trace_ragged(config_of(corpus, "dense", 1, **sections))
    assert losses == pytest.approx(expected, rel=2e-6) and losses["size"] > 0.0
    assert_gradients_close(gradients, of_one, 2e-6)


def skip_a_step(config: Config) -> list[tuple[float, bool, float]]:
    """(norm, skipped, sum of the parameters) of steps; at the second a gradient is not finite."""
    config, model, engine, mesh, loader = build_on_mesh(config)
    found = []
    for step in range(3):
        forward_backward(model, engine, config, loader.batch(step), step, mesh)
        if step == 1 and mesh.pp_rank == mesh.pp - 1:
            engine.reduce()
            gradient = engine.own_gradients if config.parallel.zero_stage else engine.flat
            gradient[0] = float("inf")
        norm, skipped = engine.step(0.1)
        held = engine.shards()
        parts = [t for name in model.parameters_by_name for *_, t in held[name].chunks]
        whole = sum(part.double().sum().item() for part in parts)
        found.append((norm, skipped, whole))
    return found


@pytest.mark.parametrize("stage", [0, 1])
def test_what_is_not_finite_anywhere_is_skipped_everywhere(world, corpus, stage) -> None:
    parallel = {"pipeline": 2, "zero_stage": stage}
    train = {"micro_batch_size": 1, "global_batch_size": 4}
    config = config_of(corpus, "cycle", 1, parallel=parallel, train=train)
    for rank in world(4).run(skip_a_step, config):
        assert [skipped for _, skipped, _ in rank] == [False, True, False]
        assert rank[0][2] == rank[1][2] != rank[2][2]


def test_an_order_that_suits_only_some_depths_is_refused_at_once() -> None:
    config = with_vocab_size(
        config_of(
            Path("x"), "dense", 1, parallel={"pipeline": 2, "order": "1f1b"},
            recurrence={**MAPS["sampled"], "prelude": 2, "coda": 2},
        ), 257,
    )  # fmt: skip
    placed = {"placement": (0, 0, 0, 1, 1, 1)}
    parallel = config.parallel.model_copy(update=placed)
    with pytest.raises(ConfigError, match="this one visits 0 1 0 1"):
        Schedules(config.model_copy(update={"parallel": parallel}))


# ------------------------------------------------------------------- a table with two ends


def train_tied(config: Config) -> tuple[int, Tensor | None]:
    """Train on this mesh; gives the table of embedding and head, where this rank has it."""
    config, model, engine, mesh, loader = build_on_mesh(config)
    for step in range(4):
        step_of(model, engine, config, loader, step, mesh)
        engine.step(0.01)
    shards = engine.shards()
    checkpoint.save(Path(config.run_dir), 4, shards, {"step": 4}, group=dist.group.WORLD).result()
    model.residence.enter_ends()
    table = model.embedding
    return mesh.pp_rank, None if table is None else table.value().detach().clone()


@pytest.mark.parametrize(("stage", "processes"), [(0, 6), (1, 4)])
def test_both_ends_of_a_tied_table_stay_the_same(world, corpus, tmp_path, stage, processes) -> None:
    """And are saved as one, though ZeRO cuts them at different places."""
    parallel = {"pipeline": 2, "zero_stage": stage, "placement": (0, 0, 0, 1)}
    train = {"micro_batch_size": 1, "global_batch_size": 12}
    sections = {"parallel": parallel, "train": train, "recurrence": MAPS["dense"]}
    config = config_of(corpus, "dense", 1, run_dir=str(tmp_path), **sections)
    tables = [table for _, table in world(processes).run(train_tied, config) if table is not None]
    assert len(tables) == processes and all(torch.equal(table, tables[0]) for table in tables)
    saved = torch.empty_like(tables[0])
    checkpoint.load(tmp_path / "step-00000004", {"embedding.weight": whole(saved)}, partial=True)
    assert torch.equal(saved, tables[0])


def test_a_run_of_a_pipeline_is_read_by_one_process(world, corpus, tmp_path) -> None:
    config = run_of(corpus, tmp_path / "run", 2, 2)
    assert set(world(2).run(train, config)) == {FINISHED}
    model, run = load_model(tmp_path / "run")
    assert run.config.parallel.pipeline == 1
    assert len(list(generate(model, [1, 2, 3], max_new_tokens=4))) == 4


def test_the_order_is_named_in_checkpoints(world, corpus, tmp_path) -> None:
    config = run_of(corpus, tmp_path / "run", 2, 2)
    world(2).run(train, config)
    saved = checkpoint.read_state(tmp_path / "run" / "checkpoints" / "step-00000002")
    num_microbatches = config.train.global_batch_size // config.train.micro_batch_size
    mesh, (kept, other) = (
        Mesh(dp=1, pp=2),
        (
            order_hash(Schedules(with_vocab_size(c, 257)).training(None, num_microbatches).order)
            for c in (config, run_of(corpus, tmp_path / "run", 2, 2, order="1f1b"))
        ),
    )
    assert saved["order_hash"] == kept and not is_reordered(saved, config, mesh, kept)
    assert is_reordered(saved, config, mesh, other) and kept != other
    assert not is_reordered(saved, config, Mesh(), other)
