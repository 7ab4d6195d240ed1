"""Parity of an engine with the plain one: optimizer steps by hand, each with its layer map."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from support.configs import make_config
from support.harness import Trace
from support.meshes import aot_eager, build_on_mesh, mesh_of
from torch import Tensor

from megarecur.checkpoint import checkpoint
from megarecur.config.run import Config
from megarecur.data.open import open_data
from megarecur.model.compile import CompiledModel
from megarecur.model.transformer import Transformer
from megarecur.optim.engine import Engine
from megarecur.recurrence.layer_map import LayerMap
from megarecur.recurrence.schemes import build_map, layer_map
from megarecur.train.step import count_denominators, objective


def run_steps(
    config: Config,
    model: Transformer,
    engine: Engine,
    steps: Sequence[int],
    maps: Sequence[LayerMap] = (),
    fault: str = "",
) -> Trace:
    """(loss, raw gradients, norm, skipped) of optimizer steps on this rank's mesh."""
    mesh = mesh_of(config)
    data = open_data(config, mesh)
    found: Trace = []
    for step in steps:
        batches = data.loader.batch(step)
        denominators = count_denominators(batches, mesh)
        if fault == "microbatch dropped" and mesh.rank == mesh.dp - 1:
            batches = [*batches[:-1], batches[0]]
        loss = torch.zeros(())
        for batch in batches:
            ctx = model.context(batch, step, training=True)
            blocks = maps[step] if maps else build_map(config)
            reads: dict[str, torch.Tensor] = {}
            x, _ = model.run(blocks, model.embed(batch.tokens_BS, ctx), ctx, reads)
            exits = {s.exit_name: reads[s.exit_name] for s in blocks if s.exit}
            if fault.startswith("head only") and step == 1:
                x = x.detach()
            part = objective(model.loss(x, batch, exits), denominators)
            broken = fault == "not finite" and mesh.rank == mesh.dp - 1 and step == 1
            engine.backward(part * float("nan") if broken else part)
            loss += part.detach()
        gradients = engine.gradients()
        norm, skipped = engine.step(config.optimizer.lr)
        loss = mesh.sum_over_dp(loss)
        found.append((float(loss), gradients if mesh.rank == 0 else {}, norm, skipped))
    return found


def build_engine_of(config: Config) -> tuple[Config, Transformer, Engine]:
    """Return (config with its vocabulary, model, engine) of this rank."""
    return build_on_mesh(config)[:3]


def trace_maps(
    config: Config, num_steps: int, maps: Sequence[LayerMap] = (), fault: str = ""
) -> Trace:
    """Return the trace of `num_steps` steps, with a map for each and one planted fault."""
    if fault == "input not anchored":
        with mock.patch("megarecur.optim.zero.anchor_runner"):
            config, model, engine = build_engine_of(config)
    else:
        config, model, engine = build_engine_of(config)
    if fault == "head only, nothing forgotten":
        engine.forget_gradients = lambda: None
    if fault == "loss not multiplied by dp":
        engine.loss_scale /= mesh_of(config).dp
    return run_steps(config, model, engine, range(num_steps), maps, fault)


def engine_config(corpus: Path, scheme: str, stage: int, micro: int, **sections: dict) -> Config:
    """A parity config whose clipping is active at every step."""
    sections = {name: dict(update) for name, update in sections.items()}
    sections["data"] = {"seq_length": 16}
    sections["train"] = {"micro_batch_size": micro, **sections.get("train", {})}
    sections["optimizer"] = {"clip_norm": 0.5, **sections.get("optimizer", {})}
    sections["parallel"] = {"zero_stage": stage, **sections.get("parallel", {})}
    return make_config(corpus, scheme, **sections)


def plain(config: Config) -> Config:
    """Return the config with the plain engine."""
    parallel = config.parallel.model_copy(update={"zero_stage": 0, "offload_optimizer": False})
    return config.model_copy(update={"parallel": parallel})


def reference_maps(
    config: Config, num_steps: int, maps: Sequence[LayerMap] = (), fault: str = ""
) -> Trace:
    """The plain engine's trace in this process, remembered."""
    return trace_plain(plain(config).model_dump_json(), num_steps, tuple(maps), fault)


@functools.cache
def trace_plain(config: str, num_steps: int, maps: tuple[LayerMap, ...], fault: str) -> Trace:
    return trace_maps(Config.model_validate_json(config), num_steps, maps, fault)


def maps_of(config: Config, depths: Sequence[int], backward: int = 9) -> list[LayerMap]:
    """A map per optimizer step; the core's loops before the last `backward` carry no gradient."""
    found = []
    for depth in depths:
        steps = layer_map(config.recurrence.model_copy(update={"num_loops": depth}))
        core = config.recurrence.prelude
        found.append(tuple(
            replace(s, grad=False) if s.block == core and s.loop_index < depth - backward else s
            for s in steps
        ))  # fmt: skip
    return found


Chunks = dict[str, list[tuple[tuple[int, ...], tuple[int, ...], Tensor]]]


def load_step(engine: Engine, root: Path, step: int, group: Any) -> Chunks:
    """Load a step's checkpoint unless it is 0; gives what the engine holds then."""
    if step:
        shards = engine.shards()
        checkpoint.load(root / f"step-{step:08d}", shards, group=group)
        engine.load(shards)
    shards = engine.shards()
    return {name: [(o, s, t.clone()) for o, s, t in shards[name].chunks] for name in shards}


def trace_compiled(
    config: Config, num_steps: int, maps: Sequence[LayerMap] = (), inductor: bool = False
) -> tuple[Trace, int]:
    """The steps' trace, and how many graphs of the block were made."""
    config, model, engine = build_engine_of(config)
    compiled = CompiledModel(model, None if inductor else aot_eager)
    return run_steps(config, model, engine, range(num_steps), maps), compiled.graphs
