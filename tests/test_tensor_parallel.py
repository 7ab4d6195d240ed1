"""Tensor parallelism: the same losses, gradients, checkpoints and texts as one process."""

import contextlib
import functools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import xxhash
from harness import Trace, WorldError, compare
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs import make_config
from megarecur.config.schema import Config
from megarecur.model.transformer import Transformer
from megarecur.optim.engine import Engine, PlainEngine, build_engine
from megarecur.parallel.mesh import Mesh, build_mesh
from megarecur.parallel.shards import Shard
from megarecur.plan.cost import estimate_memory
from megarecur.recurrence.inventory import ParameterSpec
from megarecur.recurrence.schemes import layer_map
from megarecur.train import checkpoint
from megarecur.train.checkpoint_index import read_index
from megarecur.train.load import load_model
from megarecur.train.metrics import read_rows
from megarecur.train.speed import measure_state
from megarecur.train.trainer import FINISHED, forward_backward, objective, open_data, train

MESHES: dict[tuple[int, int], Mesh] = {}
"""Of this process, by (tensor, pipeline): a world's groups are made once."""


def mesh_of(config: Config) -> Mesh:
    if not dist.is_initialized():
        return Mesh()
    key = config.parallel.tensor, config.parallel.pipeline
    if key not in MESHES:
        MESHES[key] = build_mesh(config, torch.device("cpu"))
    return MESHES[key]


def build(config: Config) -> tuple[Config, Transformer, Engine, Mesh, Any]:
    mesh = mesh_of(config)
    data = open_data(config, mesh)
    tp = mesh.tensor_parallel(config.parallel.sequence_parallel)
    model = Transformer(data.config, tp=tp)
    return data.config, model, build_engine(model, data.config, mesh), mesh, data.loader


def gather_whole(model: Transformer, mesh: Mesh, tensors: dict[str, torch.Tensor]) -> dict:
    """Each tensor put together from the parts of the ranks."""
    found = {}
    for name, tensor in tensors.items():
        shard = model.shard(name, tensor)
        whole = torch.full(shard.global_shape, float("nan"), dtype=tensor.dtype)
        for offset, sizes, values in mesh.gather_objects(shard.chunks[0]):
            whole[tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))] = values
        found[name] = whole
    return found


def trace(config: Config, num_steps: int, fault: str = "") -> Trace:
    """(loss, raw gradients of whole tensors, norm, skipped) of each optimizer step."""
    config, model, engine, mesh, loader = build(config)
    found: Trace = []
    for step in range(num_steps):
        result = forward_backward(model, engine, config, loader.batch(step), step, mesh)
        loss = float(mesh.sum_over_dp(result.losses["loss"].clone()))
        gradients = gather_whole(model, mesh, engine.gradients())
        norm, skipped = engine.step(config.optimizer.lr)
        found.append((loss, gradients, norm, skipped))
    return found


def config_of(corpus: Path, scheme: str, tensor: int, **sections: Any) -> Config:
    sections = {n: dict(v) if isinstance(v, dict) else v for n, v in sections.items()}
    sections["parallel"] = {"tensor": tensor, **sections.get("parallel", {})}
    sections["data"] = {"seq_length": 16, **sections.get("data", {})}
    sections["optimizer"] = {"lr": 1e-4, "clip_norm": 0.5, **sections.get("optimizer", {})}
    return make_config(corpus, scheme, **sections)


def reference(config: Config, num_steps: int) -> Trace:
    parallel = config.parallel.model_copy(update={"tensor": 1, "sequence_parallel": False})
    return trace_alone(
        config.model_copy(update={"parallel": parallel}).model_dump_json(), num_steps
    )


@functools.cache
def trace_alone(config: str, num_steps: int) -> Trace:
    return trace(Config.model_validate_json(config), num_steps)


SEQUENCE = {"parallel": {"sequence_parallel": True}}
DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}
COVERING = [
    ("reuse_map", 2, 2, {"model": DROPOUT}),
    ("loop", 2, 2, {**SEQUENCE, "model": {**DROPOUT, "attention_bias": "all"}}),
    ("loop", 4, 4, {**SEQUENCE, "model": {**DROPOUT, "feed_forward_bias": True}}),
    ("cycle", 2, 4, {**SEQUENCE, "model": {"norm": "layer", "positions": "learned",
                                           "tie_embeddings": False, **DROPOUT}}),
    ("block_recurrence", 4, 4, {"model": {"positions": "alibi", "z_loss": 1e-3, **DROPOUT}}),
    ("custom", 2, 4, {**SEQUENCE, "train": {"recompute": True, "micro_batch_size": 1},
                      "model": {"norm_position": "sandwich", **DROPOUT}}),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "tensor", "processes", "extra"), COVERING)
def test_ranks_equal_one_process(world, corpus, scheme, tensor, processes, extra) -> None:
    config = config_of(corpus, scheme, tensor, **extra)
    compare(world(processes).run(trace, config, 5)[0], reference(config, 5))


@pytest.mark.parametrize(
    ("stage", "tensor", "processes", "extra"),
    [(1, 2, 4, SEQUENCE), (2, 2, 2, SEQUENCE), (3, 2, 4, SEQUENCE), (1, 4, 4, {}), (3, 4, 4, {}),
     (2, 2, 4, {"parallel": {"offload_optimizer": True}})],
)  # fmt: skip
def test_zero_on_the_mesh_equals_one_process(
    world, corpus, stage, tensor, processes, extra
) -> None:
    """Four ranks of two key heads too: each head is held twice."""
    parallel = {**extra.get("parallel", {}), "zero_stage": stage}
    config = config_of(corpus, "loop", tensor, model=DROPOUT, parallel=parallel)
    alone = config.parallel.model_copy(update={"zero_stage": 0, "offload_optimizer": False})
    expected = reference(config.model_copy(update={"parallel": alone}), 5)
    compare(world(processes).run(trace, config, 5)[0], expected)


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
    config, model, engine, _, loader = build(config)
    batch, calls = loader.batch(0)[0], []

    def count(kind: str, tensor: int) -> Any:
        whole = getattr(dist, kind)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((kind, args[tensor].numel()))
            return whole(*args, **kwargs)

        return mock.patch.object(dist, kind, call)

    with count("all_reduce", 0), count("all_gather_into_tensor", 0), count("all_gather", 1):
        ctx = model.context(batch, 0, training=True)
        x, _ = model.run(layer_map(config.recurrence), model.embed(batch.tokens_BS, ctx), ctx, {})
        if gather_logits:
            with torch.no_grad():
                model.all_logits(x)
        engine.backward(objective(model.loss(x, batch), {"tokens": 1.0}))
    return {"calls": len(calls), "elements": sum(n for _, n in calls)}


def most_traffic(config: Config, sequence: bool) -> dict[str, int]:
    """Narayanan et al. 2021, section 3.2: two all-reduces of [B, S, D] per layer and direction; one
    for the embedding, one for what the head gives back; of the loss three values per token. With
    sequence parallelism each all-reduce is a gather and a scatter (Korthikanti et al. 2022)."""
    train, depth = config.train, len(layer_map(config.recurrence))
    stream = train.micro_batch_size * config.data.seq_length * config.model.hidden_size
    reduces = 4 * depth + 2
    tokens = train.micro_batch_size * config.data.seq_length
    return {
        "calls": reduces * (1 + sequence) + 2,
        "elements": reduces * stream * (1 + sequence) + 3 * tokens,
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
    _, _, _, mesh, loader = build(config)
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
    config, model, engine, _, _ = build(config)
    estimate = estimate_memory(config, layer_map(config.recurrence))
    return measure_state(model, engine.shards()), estimate


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


def go_on(config: Config, root: Path, first: int, last: int) -> tuple[Any, Trace]:
    """Load step `first` unless it is 0, take steps up to `last`, save. Gives what was loaded."""
    config, model, engine, mesh, loader = build(config)
    group = dist.group.WORLD if dist.is_initialized() else None
    if first:
        shards = engine.shards()
        checkpoint.load(root / f"step-{first:08d}", shards, group=group)
        engine.load(shards)
    shards = engine.shards()
    loaded = {name: [(o, s, t.clone()) for o, s, t in shards[name].chunks] for name in shards}
    found: Trace = []
    for step in range(first, last):
        result = forward_backward(model, engine, config, loader.batch(step), step, mesh)
        loss = float(mesh.sum_over_dp(result.losses["loss"].clone()))
        norm, skipped = engine.step(config.optimizer.lr)
        found.append((loss, {}, norm, skipped))
    checkpoint.save(root, last, engine.shards(), {"step": last}, group=group).result()
    return loaded, found


def zero(stage: int) -> dict[str, Any]:
    return {"parallel": {"zero_stage": stage, "sequence_parallel": True}}


PAIRS = [
    ((2, 2, {}), (1, 1, {})),
    ((1, 1, {}), (4, 4, SEQUENCE)),
    ((4, 2, zero(1)), (4, 4, {})),
    ((4, 4, {}), (4, 2, zero(3))),
    ((2, 1, {}), (2, 2, SEQUENCE)),
    ((4, 2, zero(3)), (2, 1, {})),
    ((4, 4, SEQUENCE), (4, 2, zero(2))),
]
"""(processes, tensor, sections) to save on, and to load on."""


@pytest.mark.parametrize(
    ("saved_on", "loaded_on"),
    [pair if i in (2, 3) else pytest.param(*pair, marks=pytest.mark.slow)
     for i, pair in enumerate(PAIRS)],
)  # fmt: skip
def test_any_mesh_resumes_from_any_other(world, corpus, tmp_path, saved_on, loaded_on) -> None:
    def run(place: Any, first: int, last: int) -> list[tuple[Any, Trace]]:
        processes, tensor, extra = place
        config = config_of(corpus, "loop", tensor, model={"dropout": 0.1}, **extra)
        if processes == 1:
            return [go_on(config, tmp_path, first, last)]
        return world(processes).run(go_on, config, tmp_path, first, last)

    (loaded, straight), *_ = [go_on(config_of(corpus, "loop", 1, model={"dropout": 0.1}),
                                    tmp_path / "alone", 0, 14)]  # fmt: skip
    run(saved_on, 0, 3)
    resumed = run(loaded_on, 3, 14)
    whole = {name: torch.zeros(tuple(shape)) for name, shape in shapes_of(tmp_path).items()}
    shards = {name: Shard(tuple(t.shape), [((0,) * t.ndim, tuple(t.shape), t)])
              for name, t in whole.items()}  # fmt: skip
    checkpoint.load(tmp_path / "step-00000003", shards)
    assert set(whole) == set(loaded)
    for chunks, _ in resumed:
        for name, parts in chunks.items():
            for offset, sizes, values in parts:
                place = tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))
                assert torch.equal(whole[name][place], values), name
    for i, (found, expected) in enumerate(zip(resumed[0][1], straight[3:], strict=True)):
        assert found[0] == pytest.approx(expected[0], rel=1e-4 if i else 1e-6)
        assert found[2] == pytest.approx(expected[2], rel=1e-4)


def shapes_of(root: Path) -> dict[str, Any]:
    index = read_index(root / "step-00000003")
    return {name: entry.shape for name, entry in index.tensors.items()}


# -------------------------------------------------------------------------------------- whole runs


def run_on_mesh(config: Config) -> int:
    return train(config)


def test_a_run_evaluates_and_talks_on_its_mesh_and_goes_on_alone(world, corpus, tmp_path) -> None:
    sections: Any = {
        "train": {"steps": 4, "sample_prompts": ["def ", "str"], "sample_tokens": 8,
                  "eval_every": 2},
        "checkpoint": {"every": 2},
    }  # fmt: skip
    rows: dict[str, dict[int, Any]] = {}
    texts = {}
    for name, processes, extra in (("alone", 1, {}), ("mesh", 4, SEQUENCE)):
        config = config_of(corpus, "loop", min(processes, 2), run_dir=str(tmp_path / name),
                           **sections, **extra)  # fmt: skip
        codes = [train(config)] if processes == 1 else world(4).run(run_on_mesh, config)
        assert set(codes) == {FINISHED}
        rows[name] = {row["step"]: row for row in read_rows(tmp_path / name / "metrics.jsonl")
                      if "train/loss" in row}  # fmt: skip
        board = EventAccumulator(str(tmp_path / name / "tensorboard")).Reload()
        texts[name] = [
            e.tensor_proto.string_val[0] for e in board.Tensors("samples/0/text_summary")
        ]
    for step, row in rows["alone"].items():
        for key, value in row.items():
            if key.startswith(("train/", "recurrence/")) or key == "optim/grad_norm":
                assert rows["mesh"][step][key] == pytest.approx(value, rel=2e-4, abs=1e-7), key
    assert texts["alone"] == texts["mesh"] and len(texts["mesh"]) == 2
    longer = config_of(corpus, "loop", 1, run_dir=str(tmp_path / "mesh"),
                       **{**sections, "train": {**sections["train"], "steps": 6}})  # fmt: skip
    assert train(longer) == FINISHED
    _, run = load_model(tmp_path / "mesh")
    assert run.state["step"] == 6
