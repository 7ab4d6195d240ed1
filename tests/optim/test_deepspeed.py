"""ZeRO 1, 2, 3 against the plain engine in one process: losses, gradients, norms, checkpoints."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from unittest import mock

import pytest
from support.configs import ENTRY, make_config
from support.engines import (
    build_engine_of,
    check_changing_depth,
    check_resumed,
    engine_config,
    maps_of,
    plain,
    reference_maps,
    run_steps,
    skip_one,
    trace_maps,
)
from support.harness import WorldError, compare
from support.meshes import later, mesh_of

from megarecur.config.load import to_yaml
from megarecur.config.run import Config
from megarecur.data.open import open_data
from megarecur.errors import ConfigError
from megarecur.model.transformer import Transformer
from megarecur.optim.build import build_engine
from megarecur.parallel.mesh import Mesh
from megarecur.plan.cost import estimate_memory
from megarecur.recurrence.schemes import layer_map
from megarecur.train.metrics import read_rows
from megarecur.train.step import objective
from megarecur.train.trainer import train

FIRST, LATER = 2e-6, 2e-5


DROPOUT = {"model": {"dropout": 0.1, "attention_dropout": 0.1}}
PATTERNS = {
    "frozen": ["blocks.0.attention.key.*", "blocks.1.feed_forward_norm.weight"],
    "lr_multipliers": {"blocks.*": 0.5, "embedding.*": 2.0},
}
COVERING = [
    (1, 2, "reuse_map", 2, DROPOUT),
    (2, 4, "cycle", 1, {"model": {"dropout": 0.1}, "train": {"recompute": True}}),
    (3, 2, "loop", 2, {"model": {"dropout": 0.1}, "train": {"recompute": True}}),
    (3, 4, "reuse_map", 1, {"recurrence": ENTRY, "model": {"positions": "learned", "norm": "layer",
                                      "tie_embeddings": False}, "optimizer": PATTERNS}),
    (2, 2, "loop", 2, {"parallel": {"offload_optimizer": True}, "model": {"z_loss": 1e-3}}),
    (1, 4, "sequence", 2, {"optimizer": PATTERNS, "parallel": {"offload_optimizer": True}}),
    later(1, 2, "cycle_reverse", 1, {"optimizer": PATTERNS}),
    later(3, 2, "block_recurrence", 4, {"optimizer": {"frozen": ["embedding.*"],
                                                      "clip_norm": 0.1}}),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "dp", "scheme", "micro", "extra"), COVERING)
def test_shards_equal_the_plain_engine(world, corpus, stage, dp, scheme, micro, extra) -> None:
    config = engine_config(corpus, scheme, stage, micro, **extra)
    expected = reference_maps(config, 10)
    assert min(norm for _, _, norm, _ in expected) > config.optimizer.clip_norm
    compare(world(dp).run(trace_maps, config, 10)[0], expected)


PAIRS = [
    (("reuse_map", "cycle", "loop")[(stage + place) % 3], stage, dp)
    for stage in range(4)
    for place, dp in enumerate((1, 2, 4))
]
"""A Latin square: every pair of a scheme, a stage and a number of processes once or more."""


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "stage", "dp"), PAIRS)
def test_every_stage_and_world_equals_the_plain_engine(world, corpus, scheme, stage, dp) -> None:
    """10 steps; those of `loop` have depths of their own, and truncated backwards."""
    extra = {"train": {"recompute": dp == 2}} if scheme == "loop" else {}
    config = engine_config(corpus, scheme, stage, 1, model={"dropout": 0.1}, **extra)
    depths = [3, 1, 5, 2, 4, 1, 6, 2, 3, 4]
    maps = maps_of(config, depths, backward=2) if scheme == "loop" else []
    compare(world(dp).run(trace_maps, config, 10, maps)[0], reference_maps(config, 10, maps))


# ----------------------------------------------------------------- depth, truncation, unused blocks


@pytest.mark.parametrize(
    ("stage", "dp", "extra"),
    [(1, 2, {}), later(2, 2, {"parallel": {"offload_optimizer": True}}), (3, 4, {}),
     (3, 2, {"optimizer": {"frozen": ["embedding.*"]}})],
)  # fmt: skip
def test_depth_and_truncation_may_change_from_step_to_step(world, corpus, stage, dp, extra) -> None:
    config = engine_config(corpus, "loop", stage, 1 if dp == 4 else 2, **extra)
    check_changing_depth(world(dp), config)


def test_gradients_of_an_earlier_step_are_forgotten(world, corpus) -> None:
    """DeepSpeed keeps them, and would step again by what a step leaves unused."""
    offloaded = {"parallel": {"offload_optimizer": True}}
    for stage, extra in [(2, offloaded), (3, {"model": {"tie_embeddings": False}})]:
        config = engine_config(corpus, "loop", stage, 2, **extra)
        expected = reference_maps(config, 3, (), "head only")
        compare(world(2).run(trace_maps, config, 3, (), "head only")[0], expected)
        with pytest.raises(AssertionError) as caught:
            compare(
                world(2).run(trace_maps, config, 3, (), "head only, nothing forgotten")[0], expected
            )
        assert not isinstance(caught.value, WorldError)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [["embedding.*"], []])
def test_without_its_anchor_the_stack_fails(world, corpus, frozen) -> None:
    """Its gradients would be reduced before they are there, or never."""
    config = engine_config(corpus, "loop", 3, 2, optimizer={"frozen": frozen})
    maps = maps_of(config, [2]) + maps_of(config, [2], backward=0) + maps_of(config, [2])
    expected = reference_maps(config, 3, maps)
    compare(world(2).run(trace_maps, config, 3, maps)[0], expected)
    with pytest.raises(AssertionError):
        compare(world(2).run(trace_maps, config, 3, maps, "input not anchored")[0], expected)


def test_a_stack_without_any_gradient_leaves_zeros(world, corpus) -> None:
    config = engine_config(corpus, "reuse_map", 3, 2, model={"tie_embeddings": False})
    steps = layer_map(config.recurrence)
    maps = [steps, tuple(replace(step, grad=False) for step in steps), steps]
    expected = reference_maps(config, 3, maps)
    assert not expected[1][1]["embedding.weight"].any() and expected[1][1]["head.weight"].any()
    compare(world(2).run(trace_maps, config, 3, maps)[0], expected)


# --------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(("stage", "dp"), [(1, 2), (3, 2)])
def test_bf16_equals_the_plain_engine(world, corpus, stage, dp) -> None:
    config = engine_config(corpus, "loop", stage, 2, train={"precision": "bf16"})
    expected = reference_maps(config, 5)
    # The first step multiplies the same bf16 numbers and sums in fp32: as close as in fp32. Later
    # weights differ in the last fp32 digit, which turns a few of the bf16 copies by 4e-3.
    compare(world(dp).run(trace_maps, config, 5)[0], expected, FIRST, 2e-2)


# ----------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("fault", "stage"),
    [("loss not multiplied by dp", 1), later("loss not multiplied by dp", 3),
     later("microbatch dropped", 1), ("microbatch dropped", 3)],
)  # fmt: skip
def test_planted_faults_are_caught(world, corpus, stage, fault) -> None:
    config = engine_config(corpus, "reuse_map", stage, 2)
    expected = reference_maps(config, 1)
    compare(world(2).run(trace_maps, config, 1)[0], expected)
    with pytest.raises(AssertionError) as caught:
        compare(world(2).run(trace_maps, config, 1, (), fault)[0], expected)
    assert not isinstance(caught.value, WorldError)


@pytest.mark.parametrize(
    ("stage", "offload"),
    [(1, False), later(1, True), later(2, False), (2, True), (3, False)],
)
def test_a_gradient_that_is_not_finite_skips_the_step_on_every_rank(
    world, corpus, stage, offload
) -> None:
    config = engine_config(corpus, "reuse_map", stage, 2, parallel={"offload_optimizer": offload})
    found = world(2).run(skip_one, config)
    for steps, updates, finite in found:
        assert [skipped for *_, skipped in steps] == [False, True, False]
        assert updates == 2.0 and finite
    # The step after the skipped one starts from the weights before it.
    compare(found[0][0][2:], reference_maps(config, 3, (), "not finite")[2:], LATER)


# ------------------------------------------------------------------------------ gathers, stage 3


def gathers(config: Config, depth: int, marked: bool) -> list[int]:
    """Elements of each all-gather of one training pass, in the order that it was recorded in."""
    from deepspeed.comm.torch import TorchBackend

    with contextlib.ExitStack() as patches:
        if not marked:
            patches.enter_context(mock.patch("deepspeed.utils.set_z3_leaf_modules"))
        config, model, engine = build_engine_of(config)
        maps = maps_of(config, [depth] * 3)
        run_steps(config, model, engine, range(2), maps)
        (batch,) = open_data(config, mesh_of(config)).loader.batch(2)
        called = patches.enter_context(mock.patch.object(
            TorchBackend, "all_gather_into_tensor", autospec=True,
            side_effect=TorchBackend.all_gather_into_tensor,
        ))  # fmt: skip
        ctx = model.context(batch, 2, training=True)
        x, _ = model.run(maps[2], model.embed(batch.tokens_BS, ctx), ctx, {})
        engine.backward(objective(model.loss(x, batch), {"tokens": 1.0}))
    return [call.kwargs["output_tensor"].numel() for call in called.call_args_list]


def test_stage_3_gathers_a_shared_block_once_at_any_depth(world, corpus) -> None:
    config = engine_config(corpus, "loop", 3, 4)
    shallow, deep = (world(2).run(gathers, config, depth, True)[0] for depth in (2, 6))
    assert shallow == deep
    # The embedding is also the head: it and the stack are gathered, nothing else.
    matrices = 257 * 32, 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64) + 2 * 32 * 32
    assert sorted(shallow) == sorted(matrices), (shallow, matrices)


def test_a_stack_that_is_no_leaf_fails(world, corpus) -> None:
    """Without the mark only called modules are gathered for, and a `Weight` is never called."""
    for message in world(2).run(fails_to_gather, engine_config(corpus, "loop", 3, 4)):
        assert "size" in message or "shape" in message, message


def fails_to_gather(config: Config) -> str:
    try:
        return f"gathered {gathers(config, 2, False)}"
    except RuntimeError as error:
        return str(error)


# ----------------------------------------------------------------------------------- checkpoints


CHAINS = [
    [(0, 1), (3, 4), (1, 2), (0, 1)],
    [(2, 2), (3, 2), (0, 2), (1, 4), (2, 4), (3, 1), (2, 1), (1, 1)],
]


@pytest.mark.parametrize("chain", [CHAINS[0], later(CHAINS[1])])
@pytest.mark.parametrize("precision", ["fp32", later("bf16")])
def test_any_stage_and_world_resumes_from_any(world, corpus, tmp_path, chain, precision) -> None:
    optimizer = {"frozen": ["blocks.0.attention.value.*"], "lr_multipliers": {"blocks.*": 0.5}}
    train_config = {"precision": precision}
    configs = [
        (dp, engine_config(corpus, "loop", stage, 1, optimizer=optimizer, train=train_config))
        for stage, dp in chain
    ]
    check_resumed(world, configs, tmp_path)


def train_here(config: Config) -> int:
    return train(config)


def test_a_run_changes_its_stage(world, corpus, tmp_path) -> None:
    for stage, dp, steps in [(3, 2, 4), (1, 2, 6), (2, 2, 8)]:
        train_config = {"steps": steps, "eval_every": 2, "precision": "bf16"}
        config = engine_config(corpus, "reuse_map", stage, 2, train=train_config)
        config = config.model_copy(update={"run_dir": str(tmp_path / "run")})
        assert world(dp).run(train_here, config) == [0] * dp
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    scores = [row["val/loss"] for row in rows if "val/loss" in row]
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert len(scores) == 4 and scores[-1] < scores[0]


# ---------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("stage", [1, later(2), 3])
def test_each_process_holds_its_share_of_the_state(world, corpus, stage) -> None:
    config = engine_config(corpus, "reuse_map", stage, 2)
    parameters, moments = zip(*world(4).run(count_elements, config), strict=True)
    whole_size = sum(
        t.numel() for t in build_engine_of(plain(config))[1].parameters_by_name.values()
    )
    assert sum(moments) == 2 * whole_size and max(moments) < 0.3 * 2 * whole_size
    assert max(parameters) < (0.3 if stage == 3 else 1.1) * whole_size
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"vocab_size": 257})}
    )
    estimate = estimate_memory(config, layer_map(config.recurrence), dp=4)
    assert estimate.moments == pytest.approx(4 * max(moments), rel=0.1)
    assert estimate.parameters == pytest.approx(4 * max(parameters), rel=0.1)


def count_elements(config: Config) -> tuple[int, int]:
    """Elements of parameters that are held between passes, and of moments without padding."""
    config, model, engine = build_engine_of(config)
    run_steps(config, model, engine, range(1))
    if config.parallel.zero_stage == 3:
        engine.optimizer._partition_all_parameters()
        held = sum(p.ds_tensor.numel() + p.numel() for p in engine.trained.values())
    else:
        tensors = [*model.parameters(), *engine.flats]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        held = sum(storages.values()) // 4
    shards = engine.shards()
    names = [name for name in shards if name.startswith("exp_avg")]
    return held, sum(t.numel() for name in names for *_, t in shards[name].chunks)


# ------------------------------------------------------------------------------- alone, and refused


@pytest.mark.parametrize("stage", [later(1), 3])
def test_one_process_needs_no_launcher_and_keeps_quiet(corpus, tmp_path, stage) -> None:
    config = engine_config(corpus, "reuse_map", stage, 4, train={"steps": 2})
    config = config.model_copy(update={"run_dir": str(tmp_path / "run")})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    bare = {k: v for k, v in os.environ.items() if "RANK" not in k and "WORLD" not in k}
    done = subprocess.run(
        [sys.executable, "-m", "megarecur.launch.cli", "train", str(tmp_path / "config.yaml")],
        env=bare, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    for word in ("DeepSpeed", "deepspeed", "Warning", "WARNING", "INFO"):
        assert word not in output, output


@pytest.mark.parametrize("found", [PackageNotFoundError("deepspeed"), "0.18.0"])
def test_another_deepspeed_is_refused(found) -> None:
    config = make_config(
        parallel={"zero_stage": 2, "zero_engine": "deepspeed"}, model={"vocab_size": 257}
    )
    refused = pytest.raises(ConfigError, match=r"zero_stage=2 needs deepspeed 0\.19\.8.*\[zero\]")
    with mock.patch("megarecur.optim.deepspeed.version", side_effect=[found]), refused:
        build_engine(Transformer(config), config, Mesh())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"parallel": {"zero_stage": 3, "pipeline": 2, "zero_engine": "deepspeed"}},
            "zero_stage=3 with parallel.pipeline=2",
        ),
        ({"parallel": {"offload_optimizer": True}}, "needs zero_stage 1 or 2, not 0"),
        ({"parallel": {"zero_stage": 3, "offload_optimizer": True}}, "1 or 2, not 3"),
        (
            {
                "parallel": {"zero_stage": 1, "zero_engine": "deepspeed"},
                "train": {"precision": "fp64"},
            },
            "fp32 or bf16",
        ),
        ({"parallel": {"zero_stage": 4}}, "zero_stage"),
    ],
)
def test_what_cannot_be_is_refused(sections, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(**sections)
