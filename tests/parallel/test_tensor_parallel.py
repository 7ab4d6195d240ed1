"""Tensor parallelism: the same losses, gradients, checkpoints and texts as one process."""

import contextlib
import random
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import xxhash
from pydantic import TypeAdapter
from support.configs import ENTRY, SCHEMES
from support.engines import load_step
from support.harness import Trace, WorldError, compare
from support.meshes import (
    SEQUENCE,
    build_on_mesh,
    check_same_run,
    config_of,
    later,
    reference,
    step_of,
    trace,
)

from megarecur.checkpoint import checkpoint
from megarecur.checkpoint.index import read_index
from megarecur.config.recurrence import RecurrenceConfig
from megarecur.config.run import Config
from megarecur.optim.plain import PlainEngine
from megarecur.parallel import regions
from megarecur.parallel.shards import TensorShard
from megarecur.plan.cost import estimate_memory
from megarecur.recurrence.depth import sample_depth
from megarecur.recurrence.inventory import ParameterSpec
from megarecur.recurrence.schemes import layer_map
from megarecur.train.speed import measure_state
from megarecur.train.step import objective, sum_losses
from megarecur.train.trainer import FINISHED, train

DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}
COVERING = [
    ("reuse_map", 2, 2, {"model": DROPOUT, "recurrence": ENTRY}),
    ("loop", 2, 2, {**SEQUENCE, "model": {**DROPOUT, "attention_bias": "all"}}),
    ("loop", 4, 4, {**SEQUENCE, "model": {**DROPOUT, "feed_forward_bias": True}}),
    ("cycle", 2, 4, {**SEQUENCE, "model": {"norm": "layer", "positions": "learned",
                                           "tie_embeddings": False, **DROPOUT}}),
    ("block_recurrence", 4, 4, {"model": {"positions": "alibi", "z_loss": 1e-3, **DROPOUT}}),
    ("custom", 2, 4, {**SEQUENCE, "train": {"recompute": True, "micro_batch_size": 4,
                                            "global_batch_size": 8},
                      "model": {"norm_position": "sandwich", **DROPOUT}}),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "tensor", "processes", "extra"), COVERING)
def test_ranks_equal_one_process(world, corpus, scheme, tensor, processes, extra) -> None:
    config = config_of(corpus, scheme, tensor, **extra)
    compare(world(processes).run(trace, config, 5)[0], reference(config, 5))


@pytest.mark.parametrize(
    ("stage", "tensor", "processes", "extra"),
    [(1, 2, 4, SEQUENCE), (3, 2, 4, SEQUENCE),
     (2, 2, 4, {"parallel": {"offload_optimizer": True, "zero_engine": "deepspeed"}}),
     (3, 2, 4, {"parallel": {"zero_engine": "deepspeed", "sequence_parallel": True}}),
     (1, 4, 4, {}), later(2, 2, 2, SEQUENCE), later(3, 4, 4, {})],
)  # fmt: skip
def test_zero_on_the_mesh_equals_one_process(
    world, corpus, stage, tensor, processes, extra
) -> None:
    """Four ranks of two key heads too: each head is held twice."""
    parallel = {**extra.get("parallel", {}), "zero_stage": stage}
    config = config_of(corpus, "loop", tensor, model=DROPOUT, parallel=parallel)
    compare(world(processes).run(trace, config, 5)[0], reference(config, 5))


SAMPLED = {
    "kind": "loop", "prelude": 1, "core": 1, "coda": 1, "backward_loops": 2,
    "num_loops": {"sampler": "poisson", "mean": 3, "min": 1, "max": 6},
}  # fmt: skip


@pytest.mark.parametrize(
    ("tensor", "processes", "stage", "extra"),
    [(2, 2, 0, {**SEQUENCE, "train": {"recompute": True}}),
     (2, 4, 3, {"train": {"recompute": True}}),
     (4, 4, 1, {**SEQUENCE, "model": {"num_kv_heads": 1}})],
)  # fmt: skip
def test_sampled_and_truncated_depth(world, corpus, tensor, processes, stage, extra) -> None:
    parallel = {**extra.get("parallel", {}), "zero_stage": stage}
    config = config_of(corpus, "loop", tensor, **{**extra, "parallel": parallel})
    config = config.model_copy(
        update={"recurrence": TypeAdapter(RecurrenceConfig).validate_python(SAMPLED)}
    )
    depths = {sample_depth(config.recurrence, config.seed, step) for step in range(5)}
    assert len(depths) > 2
    compare(world(processes).run(trace, config, 5)[0], reference(config, 5))


@pytest.mark.parametrize(("tensor", "processes", "stage"), [(2, 2, 0), (2, 4, 2)])
def test_bf16_equals_one_process(world, corpus, tensor, processes, stage) -> None:
    """Within what bf16 sums differ by when they are cut: a share of the products rounds apart."""
    config = config_of(
        corpus, "loop", tensor, train={"precision": "bf16"}, parallel={"zero_stage": stage}
    )
    compare(world(processes).run(trace, config, 3)[0], reference(config, 3), 2e-2, 2e-2)


def draw(number: int) -> tuple[str, int, int, dict[str, Any]]:
    """A combination of (scheme, tensor, processes, sections); numbers walk through the schemes."""
    rng = random.Random(number)
    processes, tensor = rng.choice([(2, 2), (4, 2), (4, 4)])
    parallel = {"sequence_parallel": rng.random() < 0.5, "zero_stage": rng.randrange(4)}
    if parallel["zero_stage"]:
        parallel["shard_group"] = rng.choice([None, 1, processes // tensor])
    model = {
        **DROPOUT,
        "norm": rng.choice(["rms", "layer"]),
        "norm_position": rng.choice(["pre", "sandwich"]),
        "positions": rng.choice(["rope", "learned", "alibi"]),
        "num_kv_heads": rng.choice([1, 2, 4]),
        "tie_embeddings": rng.random() < 0.5,
    }
    train = {
        **rng.choice([{"micro_batch_size": 1}, {"micro_batch_size": 4, "global_batch_size": 8}]),
        "recompute": rng.random() < 0.3,
        "precision": "fp64" if rng.random() < 0.5 else "fp32",
    }
    sections = {"parallel": parallel, "model": model, "train": train}
    return list(SCHEMES)[number % len(SCHEMES)], tensor, processes, sections


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SCHEMES)))
def test_a_larger_sample_of_meshes_equals_one_process(world, corpus, number) -> None:
    scheme, tensor, processes, sections = draw(number)
    config = config_of(corpus, scheme, tensor, **sections)
    tolerances = (1e-11, 1e-11) if config.train.precision == "fp64" else (2e-6, 2e-5)
    compare(world(processes).run(trace, config, 5)[0], reference(config, 5), *tolerances)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "tensor", "stage", "sequence"), [("loop", 4, 1, True), ("reuse_map", 2, 3, False)]
)
def test_eight_processes_equal_one(world, corpus, scheme, tensor, stage, sequence) -> None:
    parallel = {"zero_stage": stage, "sequence_parallel": sequence}
    train = {"micro_batch_size": 1, "global_batch_size": 8}
    config = config_of(corpus, scheme, tensor, parallel=parallel, model=DROPOUT, train=train)
    found = world(8).run(trace, config, 5)[0]
    compare(found, reference(config, 5))


@pytest.mark.parametrize("extra", [{}, SEQUENCE])
def test_double_precision_equals_to_the_last_digits(world, corpus, extra) -> None:
    config = config_of(corpus, "loop", 4, train={"precision": "fp64"}, model=DROPOUT, **extra)
    compare(world(4).run(trace, config, 3)[0], reference(config, 3), 1e-11, 1e-11)


# ------------------------------------------------------------------------------------------ faults


def trace_with(config: Config, fault: str) -> Trace:
    with contextlib.ExitStack() as patches:
        if fault == "gradients of norms not reduced":
            patches.enter_context(mock.patch.object(PlainEngine, "reduce_over_tp"))
        if fault == "shards not marked":
            patches.enter_context(mock.patch.object(ParameterSpec, "holders", lambda *_: 2))
        return trace(config, 2)


@pytest.mark.parametrize(
    ("fault", "extra"),
    [("gradients of norms not reduced", SEQUENCE), ("shards not marked", {})],
)
def test_planted_faults_are_caught(world, corpus, fault, extra) -> None:
    config = config_of(corpus, "loop", 2, model={"dropout": 0.1}, **extra)
    compare(world(2).run(trace_with, config, "")[0], reference(config, 2))
    with pytest.raises(AssertionError) as caught:
        compare(world(2).run(trace_with, config, fault)[0], reference(config, 2))
    assert not isinstance(caught.value, WorldError)


# ------------------------------------------------------------------------------------- collectives


def count_traffic(config: Config, gather_logits: bool = False) -> dict[str, int]:
    """Elements and calls of the collectives over tensor-parallel ranks in one micro batch."""
    config, model, engine, _, loader = build_on_mesh(config)
    batch, calls = loader.batch(0)[0], []

    def count(owner: Any, name: str, tensor: int) -> Any:
        whole = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(args[tensor].numel())
            return whole(*args, **kwargs)

        return mock.patch.object(owner, name, call)

    with (
        count(dist, "all_reduce", 0),
        count(regions, "all_gather", 0),
        count(dist, "all_gather", 1),
    ):
        ctx = model.context(batch, 0, training=True)
        x, _ = model.run(layer_map(config.recurrence), model.embed(batch.tokens_BS, ctx), ctx, {})
        if gather_logits:
            with torch.no_grad():
                model.all_logits(x)
        engine.backward(objective(model.loss(x, batch), {"tokens": 1.0}))
    return {"calls": len(calls), "elements": sum(calls)}


def most_traffic(config: Config, sequence: bool) -> dict[str, int]:
    """Narayanan et al. 2021, section 3.2: two all-reduces of [B, S, D] per layer and direction; one
    for the embedding, one for what the head gives back; of the loss three values per token. With
    sequence parallelism each all-reduce is a gather and a scatter, and backward gathers the inputs
    of products cut by output again, instead of keeping them (Korthikanti et al. 2022, 4.2.2)."""
    train, depth = config.train, len(layer_map(config.recurrence))
    stream = train.micro_batch_size * config.data.seq_length * config.model.hidden_size
    reduces = 4 * depth + 2
    again = 2 * depth + 1 if sequence else 0
    tokens = train.micro_batch_size * config.data.seq_length
    return {
        "calls": reduces * (1 + sequence) + again + 2,
        "elements": (reduces * (1 + sequence) + again) * stream + 3 * tokens,
    }


@pytest.mark.parametrize("extra", [{}, SEQUENCE])
def test_no_more_is_sent_than_megatron_sends(world, corpus, extra) -> None:
    config = config_of(corpus, "reuse_map", 2, **extra)
    most = most_traffic(config, bool(extra))
    for found in world(2).run(count_traffic, config):
        assert found["calls"] <= most["calls"] and found["elements"] <= most["elements"], found
    # Logits that are gathered, 257 values per token, are noticed.
    for found in world(2).run(count_traffic, config, True):
        assert found["elements"] > most["elements"]


# ------------------------------------------------------------------------------ data and memory


def what_is_read(config: Config) -> list[Any]:
    """Of each step: the replica, its sample ids, and its tokens as bytes."""
    _, _, _, mesh, loader = build_on_mesh(config)
    steps = []
    for step in (0, 1, 40):
        batches = loader.batch(step)
        ids = [i for batch in batches for i in batch.sample_ids_B.tolist()]
        tokens = b"".join(batch.tokens_BS.numpy().tobytes() for batch in batches)
        steps.append((mesh.dp_rank, ids, xxhash.xxh3_128_hexdigest(tokens)))
    return steps


def test_ranks_of_a_replica_read_the_same_samples(world, corpus) -> None:
    ranks = world(4).run(what_is_read, config_of(corpus, "loop", 2))
    assert ranks[0] == ranks[1] and ranks[2] == ranks[3]
    alone = what_is_read(config_of(corpus, "loop", 1))
    for (_, first, _), (_, second, _), (_, ids, _) in zip(ranks[0], ranks[2], alone, strict=True):
        assert first + second == ids and not set(first) & set(second)


def measure(config: Config) -> tuple[dict[str, int], Any]:
    config, model, engine, _, _ = build_on_mesh(config)
    estimate = estimate_memory(config, layer_map(config.recurrence))
    return measure_state(model, engine), estimate


@pytest.mark.parametrize("tensor", [2, 4])
def test_a_rank_holds_its_share_and_the_estimate_says_so(world, corpus, tensor) -> None:
    held = world(tensor).run(measure, config_of(corpus, "loop", tensor))
    whole, _ = measure(config_of(corpus, "loop", 1))
    most = max(found["parameters"] for found, _ in held)
    assert most == held[-1][1].parameters and held[-1][0]["gradients"] == held[-1][1].gradients
    assert held[-1][0]["moments"] == held[-1][1].moments + 4  # and the count of updates
    # The injection's matrix, norms, and key heads beyond their number are not divided.
    assert whole["parameters"] / tensor < most < 1.35 * whole["parameters"] / tensor


# ------------------------------------------------------------------------------------- checkpoints


def go_on(config: Config, root: Path, first: int, last: int) -> tuple[Any, list, Trace]:
    """Load step `first` unless it is 0, take steps up to `last`, save.

    Gives what was loaded, and of each step the sample ids of all replicas, loss and norm.
    """
    config, model, engine, mesh, loader = build_on_mesh(config)
    group = dist.group.WORLD if dist.is_initialized() else None
    loaded = load_step(engine, root, first, group)
    found: Trace = []
    ids = []
    for step in range(first, last):
        batches = loader.batch(step)
        own = [i for batch in batches for i in batch.sample_ids_B.tolist()]
        ids.append([i for each in mesh.gather_objects(own)[:: mesh.tp] for i in each])
        result = step_of(model, engine, config, loader, step, mesh)
        loss = sum_losses(result, mesh)
        norm, skipped = engine.step(config.optimizer.lr)
        found.append((loss, {}, norm, skipped))
    checkpoint.save(root, last, engine.shards(), {"step": last}, group=group).result()
    return loaded, ids, found


def draw_mesh(rng: random.Random) -> tuple[int, int, dict[str, Any]]:
    """(processes, tensor, sections)"""
    processes, tensor = rng.choice([(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (4, 4)])
    sequence = tensor > 1 and rng.random() < 0.5
    stage = rng.randrange(4) if processes > 1 else 0
    parallel = {"zero_stage": stage, "sequence_parallel": sequence}
    return processes, tensor, {"parallel": parallel}


def draw_pair(seed: int) -> tuple[Any, Any]:
    """Two meshes with different tensor parallelism: to save on, and to load on."""
    rng = random.Random(seed)
    saved_on, loaded_on = draw_mesh(rng), draw_mesh(rng)
    while saved_on[1] == loaded_on[1]:
        loaded_on = draw_mesh(rng)
    return saved_on, loaded_on


@pytest.mark.parametrize("seed", [2, 10, *[later(n) for n in (1, 3, 4, 5, 6, 7, 19)]])
def test_any_mesh_resumes_from_any_other(world, corpus, tmp_path, seed) -> None:
    saved_on, loaded_on = draw_pair(seed)

    def run(place: Any, first: int, last: int) -> list[tuple[Any, list, Trace]]:
        processes, tensor, extra = place
        train = {"micro_batch_size": 1, "global_batch_size": 4}
        config = config_of(corpus, "loop", tensor, model={"dropout": 0.1}, train=train, **extra)
        if processes == 1:
            return [go_on(config, tmp_path, first, last)]
        return world(processes).run(go_on, config, tmp_path, first, last)

    alone = config_of(corpus, "loop", 1, model={"dropout": 0.1})
    loaded, ids, straight = go_on(alone, tmp_path / "alone", 0, 14)
    run(saved_on, 0, 3)
    resumed = run(loaded_on, 3, 14)
    whole = {name: torch.zeros(tuple(shape)) for name, shape in shapes_of(tmp_path).items()}
    shards = {name: TensorShard(tuple(t.shape), [((0,) * t.ndim, tuple(t.shape), t)])
              for name, t in whole.items()}  # fmt: skip
    checkpoint.load(tmp_path / "step-00000003", shards)
    assert set(whole) == set(loaded)
    for chunks, read, _ in resumed:
        assert read == ids[3:]
        for name, parts in chunks.items():
            for offset, sizes, values in parts:
                place = tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))
                assert torch.equal(whole[name][place], values), name
    for i, (found, expected) in enumerate(zip(resumed[0][2], straight[3:], strict=True)):
        assert found[0] == pytest.approx(expected[0], rel=1e-4 if i else 1e-6)
        assert found[2] == pytest.approx(expected[2], rel=1e-4)


def shapes_of(root: Path) -> dict[str, Any]:
    index = read_index(root / "step-00000003")
    return {name: entry.shape for name, entry in index.tensors.items()}


# -------------------------------------------------------------------------------------- whole runs


def run_on_mesh(config: Config) -> int:
    return train(config)


def run_of(corpus: Path, run_dir: Path, steps: int, tensor: int, extra: dict[str, Any]) -> Config:
    train = {"steps": steps, "sample_prompts": ["def ", "str"], "sample_tokens": 8, "eval_every": 2}
    sections = {**extra, "train": train, "checkpoint": {"every": 2}}
    return config_of(corpus, "loop", tensor, run_dir=str(run_dir), **sections)


def test_a_run_evaluates_and_talks_on_its_mesh_and_goes_on_on_others(
    world, corpus, tmp_path
) -> None:
    """4 processes, then 2, then 1: the same samples, metrics and texts as one process all along."""
    alone, mesh = tmp_path / "alone", tmp_path / "mesh"
    assert train(run_of(corpus, alone, 8, 1, {})) == FINISHED
    on_four = run_of(corpus, mesh, 4, 2, SEQUENCE)
    on_two = run_of(corpus, mesh, 6, 1, {"parallel": {"zero_stage": 1}})
    assert set(world(4).run(run_on_mesh, on_four)) == {FINISHED}
    assert set(world(2).run(run_on_mesh, on_two)) == {FINISHED}
    assert train(run_of(corpus, mesh, 8, 1, {})) == FINISHED
    check_same_run(alone, mesh, 8)
