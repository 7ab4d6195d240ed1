"""Parity of a mesh with one process: configs, traces of optimizer steps, and whole runs."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.configs import make_config
from support.harness import Trace
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from megarecur.checkpoint.load import load_model
from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.data.open import open_data
from megarecur.model.compile import CompiledModel
from megarecur.model.transformer import Transformer
from megarecur.optim.build import build_engine
from megarecur.optim.engine import Engine
from megarecur.parallel.mesh import Mesh, build_mesh
from megarecur.parallel.pipeline import Pipeline
from megarecur.plan.predict import cost_stages
from megarecur.plan.schedule import Schedules
from megarecur.plan.simulate import simulate
from megarecur.train.metrics import read_rows
from megarecur.train.report import StepResult
from megarecur.train.step import build_model, forward_backward, sum_losses

MESHES: dict[tuple[int | None, ...], Mesh] = {}
"""Meshes of this process by shape: a world's groups are made once."""

UNSHARDED = {
    "zero_stage": 0, "zero_engine": "native", "offload_optimizer": False, "shard_group": None,
    "gathered_blocks": None, "reduce_dtype": "fp32",
}  # fmt: skip
"""Fields of `parallel` for the plain engine."""

SCHEDULES: dict[str, Schedules] = {}


def mesh_of(config: Config) -> Mesh:
    """Return this process's mesh, with one set of process groups per shape."""
    if not dist.is_initialized():
        return Mesh()
    own = config.parallel
    key = own.tensor, own.pipeline, own.context, own.shard_group, own.shards_natively
    if key not in MESHES:
        MESHES[key] = build_mesh(config, torch.device("cpu"))
    return MESHES[key]


def build_on_mesh(config: Config) -> tuple[Config, Transformer, Engine, Mesh, Any]:
    """Return (config with its vocabulary, model, engine, mesh, loader) of this rank."""
    mesh = mesh_of(config)
    data = open_data(config, mesh)
    model = build_model(data.config, mesh, Schedules(data.config))
    return data.config, model, build_engine(model, data.config, mesh), mesh, data.loader


def step_of(model, engine, config, loader, step, mesh) -> StepResult:
    """Run forward and backward of one optimizer step, by the schedules of the config."""
    schedules = SCHEDULES.setdefault(config.model_dump_json(), Schedules(config))
    return forward_backward(
        model, engine, config, loader.batch(step), step, mesh, schedules=schedules
    )


def gather_whole(model: Transformer, mesh: Mesh, tensors: dict[str, torch.Tensor]) -> dict:
    """Each tensor put together from the parts of the ranks, in the inventory's order."""
    shards = {name: model.shard(name, tensor) for name, tensor in tensors.items()}
    own = {name: (shard.global_shape, shard.chunks[0]) for name, shard in shards.items()}
    whole: dict[str, torch.Tensor] = {}
    for parts in mesh.gather_objects(own):
        for name, (shape, (offset, sizes, values)) in parts.items():
            tensor = whole.setdefault(name, torch.full(shape, float("nan"), dtype=values.dtype))
            tensor[tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))] = values
    return {name: whole[name] for name in model.inventory if name in whole}


def trace(config: Config, num_steps: int) -> Trace:
    """(loss, raw gradients of whole tensors, norm, skipped) of each optimizer step."""
    return trace_steps(build_on_mesh(config), num_steps)


def trace_steps(built: tuple[Config, Transformer, Engine, Mesh, Any], num_steps: int) -> Trace:
    config, model, engine, mesh, loader = built
    found: Trace = []
    for step in range(num_steps):
        result = step_of(model, engine, config, loader, step, mesh)
        loss = sum_losses(result, mesh)
        gradients = gather_whole(model, mesh, engine.gradients())
        norm, skipped = engine.step(config.optimizer.lr)
        found.append((loss, gradients, norm, skipped))
    return found


def aot_eager(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> object:
    from torch._dynamo.backends.debugging import aot_eager

    return aot_eager(graph, inputs)


class Found(NamedTuple):
    """A trace, the graphs of the block, the products that waited for W, and the lengths seen."""

    trace: Trace
    graphs: int
    postponed: int
    lengths: set[int]


def trace_both(config: Config, num_steps: int) -> tuple[Found, Found]:
    """Return the same steps of this mesh, compiled and eager. The compiled graphs run as traced."""
    made = []
    for compiles in (True, False):
        postponed, whole = [0], Pipeline.run_weights

        def run_weights(pipeline: Pipeline, stage: Any, j: int, counts=postponed, run=whole):
            counts[0] += len(pipeline.left[stage.index, j])
            run(pipeline, stage, j)

        built = build_on_mesh(config)
        compiled = CompiledModel(built[1], aot_eager) if compiles else None
        with mock.patch.object(Pipeline, "run_weights", run_weights):
            found = trace_steps(built, num_steps)
        batches = [batch for step in range(num_steps) for batch in built[4].batch(step)]
        lengths = {batch.tokens_BS.shape[1] for batch in batches}
        made.append(Found(found, compiled.graphs if compiled else 0, postponed[0], lengths))
    return made[0], made[1]


def config_of(corpus: Path, scheme: str, tensor: int, **sections: Any) -> Config:
    """Return a tiny config with active clipping and a rate that keeps rounding from growing."""
    sections = {n: dict(v) if isinstance(v, dict) else v for n, v in sections.items()}
    sections["parallel"] = {"tensor": tensor, **sections.get("parallel", {})}
    sections["data"] = {"seq_length": 16, **sections.get("data", {})}
    sections["train"] = {"global_batch_size": 4, **sections.get("train", {})}
    sections["optimizer"] = {"lr": 1e-4, "clip_norm": 0.5, **sections.get("optimizer", {})}
    return make_config(corpus, scheme, **sections)


def reference(config: Config, num_steps: int) -> Trace:
    """Return the trace of one process, remembered by config."""
    alone = {**UNSHARDED, "tensor": 1, "sequence_parallel": False, "pipeline": 1, "context": 1,
             "placement": None, "order": "auto"}  # fmt: skip
    parallel = config.parallel.model_copy(update=alone)
    return trace_alone(
        config.model_copy(update={"parallel": parallel}).model_dump_json(), num_steps
    )


@functools.cache
def trace_alone(config: str, num_steps: int) -> Trace:
    return trace(Config.model_validate_json(config), num_steps)


def later(*values: object) -> object:
    """A case for `make test-all`."""
    return pytest.param(*values, marks=pytest.mark.slow)


SEQUENCE = {"parallel": {"sequence_parallel": True}}


def check_same_run(alone: Path, mesh: Path, steps: int) -> None:
    """The same metrics of every step, and the same texts."""
    rows, texts = {}, {}
    for run in (alone, mesh):
        found = [row for row in read_rows(run / "metrics.jsonl") if "train/loss" in row]
        rows[run] = {row["step"]: row for row in found}
        board = EventAccumulator(str(run / "tensorboard")).Reload()
        events = board.Tensors("samples/0/text_summary")
        texts[run] = [event.tensor_proto.string_val[0] for event in events]
    assert set(rows[mesh]) == set(rows[alone]) == set(range(1, steps + 1))
    for step, row in rows[alone].items():
        for key, value in row.items():
            if key.startswith(("train/", "recurrence/")) or key == "optim/grad_norm":
                assert rows[mesh][step][key] == pytest.approx(value, rel=2e-4, abs=1e-7), key
    assert texts[alone] == texts[mesh] and len(texts[mesh]) == steps // 2
    _, run = load_model(mesh)
    assert run.state["step"] == steps


def measure_activations(config: Config) -> tuple[int, int]:
    """(most bytes that autograd holds on this rank in a step, the plan's figure)."""
    config, model, engine, mesh, loader = build_on_mesh(config)
    batches = loader.batch(0)
    schedules = Schedules(config)
    scheduled = schedules.training(None, len(batches))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    live: dict[tuple[int, int], dict[int, int]] = {}
    peak, whole = [0], Pipeline.run_one

    def run_one(pipeline: Pipeline, op: Any) -> None:
        if op.kind != "F":
            whole(pipeline, op)
            live.pop((op.stage, op.microbatch), None) if op.kind == "B" else None
            return
        held = live.setdefault((op.stage, op.microbatch), {})

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            whole(pipeline, op)
        union: dict[int, int] = {}
        for each in live.values():
            union |= each
        peak[0] = max(peak[0], sum(union.values()))

    with mock.patch.object(Pipeline, "run_one", run_one):
        forward_backward(model, engine, config, batches, 0, mesh, schedules=schedules)
    costs = cost_stages(config, scheduled.walk, schedules.layout, schedules.cluster)
    return peak[0], simulate(scheduled.order, scheduled.walk, costs).peak_bytes[mesh.pp_rank]


def trace_engine(
    config: Config,
    read: Callable[[Config, int, int, int], Sequence[MicroBatch]],
    steps: int,
    prepare: Callable[[Transformer], None] | None = None,
    shared: frozenset[str] = frozenset(),
) -> Trace:
    """(loss, raw gradients of whole tensors, norm, skipped) of each optimizer step.

    Args:
        read: micro batches of a config, a step, a reader of samples and the number of readers.
        prepare: changes the model before its engine is made.
        shared: parameters that two pipeline ranks may have.
    """
    mesh, schedules = mesh_of(config), Schedules(config)
    model = build_model(config, mesh, schedules)
    if prepare is not None:
        prepare(model)
    engine = build_engine(model, config, mesh)
    owned = mesh.gather_over_pp(list(model.parameters_by_name))
    names = [name for own in owned for name in own]
    assert {name for name in names if names.count(name) > 1} <= shared
    found: Trace = []
    for step in range(steps):
        batches = read(config, step, mesh.reader, mesh.readers)
        result = forward_backward(model, engine, config, batches, step, mesh, schedules=schedules)
        loss = sum_losses(result, mesh)
        gradients = gather_whole(model, mesh, engine.gradients())
        found.append((loss, gradients, *engine.step(config.optimizer.lr)))
    schedules.close()
    return found


def count_graphs(
    trace: Callable[[Config, Callable[[Transformer], None]], Trace], config: Config
) -> tuple[Trace, int]:
    """The trace with compiled blocks, and the number of their graphs."""
    graphs: list[CompiledModel] = []
    found = trace(config, lambda model: graphs.append(CompiledModel(model, aot_eager)))
    return found, graphs[0].graphs
