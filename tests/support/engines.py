"""Parity of an engine with the plain one: optimizer steps by hand, each with its layer map."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from support.configs import make_config
from support.harness import Trace, World, compare
from support.meshes import UNSHARDED, aot_eager, build_on_mesh, mesh_of
from torch import Tensor

from megarecur.checkpoint import checkpoint
from megarecur.config.run import Config
from megarecur.data.open import open_data
from megarecur.model.compile import CompiledModel
from megarecur.model.transformer import Transformer
from megarecur.optim.engine import Engine
from megarecur.optim.sharded import Flat, ShardedEngine
from megarecur.parallel.shards import tiling_fault, whole
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
        with mock.patch("megarecur.optim.deepspeed.anchor_runner"):
            config, model, engine = build_engine_of(config)
    else:
        config, model, engine = build_engine_of(config)
    if fault == "head only, nothing forgotten":
        engine.forget_gradients = lambda: None
    if fault == "loss not multiplied by dp":
        engine.loss_scale /= mesh_of(config).dp
    return run_steps(config, model, engine, range(num_steps), maps, fault)


def engine_config(
    corpus: Path, scheme: str, stage: int, micro: int, engine: str = "deepspeed", **sections: dict
) -> Config:
    """A parity config whose clipping is active at every step."""
    sections = {name: dict(update) for name, update in sections.items()}
    sections["data"] = {"seq_length": 16}
    sections["train"] = {"micro_batch_size": micro, **sections.get("train", {})}
    sections["optimizer"] = {"clip_norm": 0.5, **sections.get("optimizer", {})}
    own = {"zero_stage": stage, "zero_engine": engine}
    sections["parallel"] = {**own, **sections.get("parallel", {})}
    return make_config(corpus, scheme, **sections)


def plain(config: Config) -> Config:
    """Return the config with the plain engine."""
    parallel = config.parallel.model_copy(update=UNSHARDED)
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


@contextlib.contextmanager
def recorded(engine: ShardedEngine) -> Iterator[list[str]]:
    """Record what a sharded engine gathers and reduces inside the context, in order."""
    found: list[str] = []
    units = {id(flat): unit for unit, flats in engine.units.items() for flat in flats}

    def gather(flat: Flat, run=Flat.gather) -> None:
        waits = flat.work
        run(flat)
        if waits is None and flat.work is not None:
            found.append(f"gather {units[id(flat)]}")

    def reduce(flat: Flat, dtype: torch.dtype, run=Flat.reduce) -> Any:
        begun = run(flat, dtype)
        if begun is not None:
            found.append(f"reduce {units[id(flat)]}")
        return begun

    with mock.patch.object(Flat, "gather", gather), mock.patch.object(Flat, "reduce", reduce):
        yield found


Chunks = dict[str, list[tuple[tuple[int, ...], tuple[int, ...], Tensor]]]


def load_step(engine: Engine, root: Path, step: int, group: Any) -> Chunks:
    """Load a step's checkpoint unless it is 0; gives what the engine holds then."""
    if step:
        shards = engine.shards()
        checkpoint.load(root / f"step-{step:08d}", shards, group=group)
        engine.load(shards)
    shards = engine.shards()
    return {name: [(o, s, t.clone()) for o, s, t in shards[name].chunks] for name in shards}


def skip_one(config: Config) -> tuple[Trace, float, bool]:
    config, model, engine = build_engine_of(config)
    found = run_steps(config, model, engine, range(3), (), "not finite")
    held = [t for shard in engine.shards().values() for *_, t in shard.chunks]
    return found, float(engine.updates), all(bool(t.isfinite().all()) for t in held)


def go_on(config: Config, root: Path, first: int, last: int) -> tuple[Chunks, Trace]:
    """Load step `first` unless it is 0, take steps up to `last`, save. Gives what was loaded."""
    group = dist.group.WORLD if dist.is_initialized() else None
    config, model, engine = build_engine_of(config)
    loaded = load_step(engine, root, first, group)
    found = run_steps(config, model, engine, range(first, last))
    checkpoint.save(root, last, engine.shards(), {}, group=group).result()
    return loaded, found


def assemble(ranks: Sequence[Chunks]) -> dict[str, Tensor]:
    """Whole tensors from what ranks hold, which tiles them."""
    found = {}
    for name in ranks[0]:
        chunks = {(o, s): t for rank in ranks for o, s, t in rank[name]}
        shape = tuple(
            max(o[dim] + s[dim] for o, s in chunks) for dim in range(len(next(iter(chunks))[0]))
        )
        assert tiling_fault(shape, list(chunks)) == ""
        found[name] = torch.full(shape, float("nan"))
        for (offset, sizes), tensor in chunks.items():
            part = tuple(slice(o, o + s) for o, s in zip(offset, sizes, strict=True))
            found[name][part] = tensor
    return found


def read(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors, whole."""
    tensors = {name: torch.full_like(tensor, float("nan")) for name, tensor in like.items()}
    checkpoint.load(path, {name: whole(tensor) for name, tensor in tensors.items()})
    return tensors


def check_changing_depth(world: World, config: Config) -> None:
    """Compare steps whose depth and truncation change from one to the next with a plain engine."""
    maps = maps_of(config, [3, 1, 5, 2, 4], backward=2)
    # Nothing of the core or before it carries a gradient, then all of it does again.
    maps += maps_of(config, [3], backward=0) + maps_of(config, [2, 6])
    expected = reference_maps(config, len(maps), maps)
    unused = expected[5][1]["blocks.1.attention.query.weight"]
    assert not unused.any() and expected[4][1]["blocks.1.attention.query.weight"].any()
    compare(world.run(trace_maps, config, len(maps), maps)[0], expected)


def check_resumed(
    world: Callable[[int], World], configs: Sequence[tuple[int, Config]], folder: Path
) -> None:
    """Take two steps by each (number of processes, config) in turn, from checkpoint to checkpoint.

    What is loaded is what was saved, and the steps are those of one plain process.
    """
    before = False
    for i, (dp, config) in enumerate(configs):
        first, last = 2 * i, 2 * i + 2
        if config.parallel.zero_stage == 0 and dp == 1:
            ranks = [go_on(config, folder, first, last)]
        else:
            ranks = world(dp).run(go_on, config, folder, first, last)
        if before:
            loaded = assemble([chunks for chunks, _ in ranks])
            saved = read(folder / f"step-{first:08d}", loaded)
            assert saved.keys() == loaded.keys()
            assert all(torch.equal(saved[name], loaded[name]) for name in saved)
            assert saved["optimizer.updates"].item() == first
            # The next steps are those of one plain process that goes on from there.
            (folder / f"twin-{i}").mkdir()
            os.symlink(folder / f"step-{first:08d}", folder / f"twin-{i}/step-{first:08d}")
            _, twin = go_on(plain(config), folder / f"twin-{i}", first, last)
            bf16 = config.train.precision == "bf16"
            compare(ranks[0][1], twin, 2e-6, 2e-2 if bf16 else 2e-5)
            assert abs(ranks[0][1][0][0] - twin[0][0]) <= 1e-6 * twin[0][0]
        before = True


def trace_compiled(
    config: Config, num_steps: int, maps: Sequence[LayerMap] = (), inductor: bool = False
) -> tuple[Trace, int]:
    """The steps' trace, and how many graphs of the block were made."""
    config, model, engine = build_engine_of(config)
    compiled = CompiledModel(model, None if inductor else aot_eager)
    return run_steps(config, model, engine, range(num_steps), maps), compiled.graphs
