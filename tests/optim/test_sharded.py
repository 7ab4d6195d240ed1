"""Native sharding along the layer map against the plain engine in one process."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
from support.configs import ENTRY
from support.engines import (
    build_engine_of,
    check_changing_depth,
    check_resumed,
    engine_config,
    maps_of,
    plain,
    recorded,
    reference_maps,
    run_steps,
    skip_one,
    trace_compiled,
    trace_maps,
)
from support.harness import Trace, WorldError, compare
from support.meshes import build_on_mesh, later, mesh_of, reference, trace_steps
from torch import Tensor

from megarecur.config.run import Config
from megarecur.optim.sharded import Flat
from megarecur.parallel import linear
from megarecur.parallel.mesh import Mesh
from megarecur.plan.cost import estimate_memory
from megarecur.recurrence.schemes import build_map

DROPOUT = {"model": {"dropout": 0.1, "attention_dropout": 0.1}}
PATTERNS = {
    "frozen": ["blocks.0.attention.key.*", "blocks.1.feed_forward_norm.weight"],
    "lr_multipliers": {"blocks.*": 0.5, "embedding.*": 2.0},
}
COVERING = [
    (1, 2, "reuse_map", 2, DROPOUT),
    (2, 4, "cycle", 1, {"model": {"dropout": 0.1}, "train": {"recompute": True},
                        "parallel": {"shard_group": 2}}),
    (3, 2, "loop", 2, {"model": {"dropout": 0.1}, "train": {"recompute": True}}),
    (3, 4, "reuse_map", 1, {"recurrence": ENTRY, "model": {"positions": "learned", "norm": "layer",
                                      "tie_embeddings": False}, "optimizer": PATTERNS}),
    (2, 2, "loop", 2, {"model": {"z_loss": 1e-3}}),
    (1, 4, "sequence", 2, {"optimizer": PATTERNS}),
    (3, 4, "cycle", 1, {"parallel": {"shard_group": 2, "gathered_blocks": 1}}),
    later(1, 2, "cycle_reverse", 1, {"optimizer": PATTERNS}),
    later(3, 2, "block_recurrence", 4, {"optimizer": {"frozen": ["embedding.*"],
                                                      "clip_norm": 0.1}}),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "dp", "scheme", "micro", "extra"), COVERING)
def test_shards_equal_the_plain_engine(world, corpus, stage, dp, scheme, micro, extra) -> None:
    config = engine_config(corpus, scheme, stage, micro, "native", **extra)
    expected = reference_maps(config, 10)
    assert min(norm for _, _, norm, _ in expected) > config.optimizer.clip_norm
    compare(world(dp).run(trace_maps, config, 10)[0], expected)


@pytest.mark.parametrize(
    ("stage", "dp", "extra"),
    [(1, 2, {}), (3, 4, {}), (3, 2, {"optimizer": {"frozen": ["embedding.*"]}}),
     (2, 4, {"parallel": {"shard_group": 2}})],
)  # fmt: skip
def test_depth_and_truncation_may_change_from_step_to_step(world, corpus, stage, dp, extra) -> None:
    config = engine_config(corpus, "loop", stage, 1 if dp == 4 else 2, "native", **extra)
    check_changing_depth(world(dp), config)


# ------------------------------------------------------------------------------ gathers and memory


def collectives(config: Config, depth: int) -> list[str]:
    """What one micro batch gathers and reduces, in a second step."""
    config, model, engine = build_engine_of(config)
    maps = maps_of(config, [depth] * 2) if config.recurrence.kind == "loop" else []
    run_steps(config, model, engine, [0], maps)
    with recorded(engine) as found:
        run_steps(config, model, engine, [1], maps)
    return found


def test_a_block_is_gathered_once_per_pass_at_any_depth(world, corpus) -> None:
    """Ahead of its use: the next one before the present one runs. Gradients leave one block after
    they are complete."""
    config = engine_config(corpus, "loop", 3, 4, "native")
    expected = [
        "gather ends", "gather block 0", "gather block 1", "gather block 2",
        "gather block 1", "reduce block 2", "gather block 0", "reduce block 1",
        "reduce block 0", "reduce ends",
    ]  # fmt: skip
    for depth in (1, 6):
        assert world(2).run(collectives, config, depth) == [expected] * 2


def test_a_cycle_is_gathered_whole_unless_bound(world, corpus) -> None:
    shape = {"recurrence": {"kind": "cycle", "num_blocks": 3, "depth": 6}}
    config = engine_config(corpus, "cycle", 3, 4, "native", **shape)
    (found, _) = world(2).run(collectives, config, 0)
    gathers = [line for line in found if line.startswith("gather block")]
    # Forward; and backward, without the last block, which is still there.
    assert gathers == [f"gather block {b}" for b in (0, 1, 2, 1, 0)]
    reduced = [line for line in found if line.startswith("reduce")]
    assert reduced == [f"reduce {unit}" for unit in ("block 2", "block 1", "block 0", "ends")]


def test_a_bound_gathers_again_what_is_needed_last(world, corpus) -> None:
    shape = {"recurrence": {"kind": "cycle", "num_blocks": 4, "depth": 8}}
    bound = {"gathered_blocks": 3}
    config = engine_config(corpus, "cycle", 3, 4, "native", parallel=bound, **shape)
    (found, _) = world(2).run(collectives, config, 0)
    gathers = [line for line in found if line.startswith("gather block")]
    assert 4 + 3 < len(gathers) < 2 * 8 - 1  # Not once per pass, nor at every use.
    reduced = [line for line in found if line.startswith("reduce")]
    assert reduced == [f"reduce {unit}" for unit in ("block 3", "block 2", "block 1", "block 0",
                                                     "ends")]  # fmt: skip


@pytest.mark.parametrize("stage", [1, 2])
def test_lower_stages_gather_once_per_step(world, corpus, stage) -> None:
    config = engine_config(corpus, "loop", stage, 1, "native")  # 4 micro batches per replica.
    (found, _) = world(2).run(collectives, config, 3)
    assert sorted(line for line in found if line.startswith("gather")) == [
        f"gather {unit}" for unit in ("block 0", "block 1", "block 2", "ends")
    ]
    assert found.count("reduce block 1") == (1 if stage == 1 else 4)


def trace_crossings(config: Config) -> tuple[Trace, list[tuple[str, bool]]]:
    """(trace of two steps; the units whose shards are summed over groups, in order, and whether a
    backward pass was running)."""
    built, found = build_on_mesh(config), []
    engine = built[2]
    units = {flat.own_gradient.data_ptr(): unit for unit, flats in engine.units.items()
             for flat in flats}  # fmt: skip

    def start(mesh: Mesh, shard: Tensor, run=Mesh.start_sum_over_groups) -> Any:
        found.append((units[shard.data_ptr()], engine.uses.differentiating))
        return run(mesh, shard)

    with mock.patch.object(Mesh, "start_sum_over_groups", start):
        return trace_steps(built, 2), found


@pytest.mark.parametrize(
    ("stage", "parallel", "order", "late"),
    [
        # A unit leaves when its reduce-scatter is waited for; two of those may be pending.
        (3, {"shard_group": 2}, ["head", "block 2", "block 1", "block 0", "ends"], 2),
        (1, {"shard_group": 1}, ["head", "block 2", "block 1", "block 0", "ends"], 0),
        later(
            1,
            {"shard_group": 1, "pipeline": 2, "placement": [0, 0, 1], "split_backward": False},
            ["head", "block 2"],
            0,
        ),
    ],
)
def test_sums_over_groups_begin_during_backward(
    world, corpus, stage, parallel, order, late
) -> None:
    config = engine_config(
        corpus, "dense", stage, 1, "native", model={"tie_embeddings": False}, parallel=parallel
    )
    traces = world(4).run(trace_crossings, config)
    compare(traces[0][0], reference(config, 2), 2e-6, 2e-5)
    early = [(unit, place < len(order) - late) for place, unit in enumerate(order)]
    assert traces[-1][1] == early * 2


CYCLE = {"recurrence": {"kind": "cycle", "num_blocks": 8, "depth": 16}, "train": {
    "precision": "bf16"}}  # fmt: skip


def live_bytes(config: Config) -> tuple[int, int, int]:
    """(masters with moments and the largest sum of gathered copies; the most bytes of state and of
    gathered weights and gradients at any time; the estimate of it)."""
    with mock.patch.object(linear, "has_bf16_products", lambda _: True):
        config, model, engine = build_engine_of(config)
    flats, small = list(engine.flats()), sum(p.nbytes for p in engine.small.values())
    kept = sum(flat.master.nbytes for flat in flats) + small
    kept += sum(moment.nbytes for moment in engine.moments.values())
    most = [0, 0]

    def look() -> None:
        copies = [f.copy.untyped_storage().nbytes() for f in flats if f.copy is not None]
        whole = {
            f.gradient.untyped_storage().data_ptr(): f.gradient.untyped_storage().nbytes()
            for f in flats
            if f.gradient is not None
        }
        pending = sum(flat.size * 4 for flat, *_ in engine.pending)
        most[0] = max(most[0], sum(copies))
        most[1] = max(most[1], sum(copies) + sum(whole.values()) + pending)

    def looked(function):
        def call(*args):
            found = function(*args)
            look()
            return found

        return call

    names = ("gather", "receive", "reduce")
    with contextlib.ExitStack() as patches:
        for name in names:
            patches.enter_context(mock.patch.object(Flat, name, looked(getattr(Flat, name))))
        run_steps(config, model, engine, range(2))
    state = kept + engine.gradient_bytes()
    dp = mesh_of(config).dp
    estimate = estimate_memory(config, build_map(config), dp)
    return kept + most[0], state + most[1], estimate.state + estimate.gathered


@pytest.mark.parametrize(
    ("stage", "extra"),
    [(1, {}), (2, {}), (3, {}), (3, {"gathered_blocks": 2}), (3, {"shard_group": 2})],
)
def test_live_bytes_are_those_of_the_plan(world, corpus, stage, extra) -> None:
    config = engine_config(corpus, "cycle", stage, 2, "native", parallel=extra, **CYCLE)
    for _, live, estimate in world(4).run(live_bytes, config):
        assert live == pytest.approx(estimate, rel=0.1)


def test_stage_3_holds_its_share(world, corpus) -> None:
    """Masters, moments and at most two whole blocks: 0.30 of what a plain process has."""
    bound, wide = {"gathered_blocks": 2}, {"hidden_size": 128, "ffn_hidden_size": 256}
    config = engine_config(corpus, "cycle", 3, 2, "native", parallel=bound, model=wide, **CYCLE)
    alone = build_engine_of(plain(config))[1].parameters_by_name
    whole = 12 * sum(parameter.numel() for parameter in alone.values())
    for held, _, _ in world(4).run(live_bytes, config):
        assert held <= 0.30 * whole


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(("stage", "dp"), [(1, 2), (3, 2)])
def test_bf16_equals_the_plain_engine(world, corpus, stage, dp) -> None:
    config = engine_config(corpus, "loop", stage, 2, "native", train={"precision": "bf16"})
    expected = reference_maps(config, 5)
    # The first step multiplies the same bf16 numbers and sums in fp32: as close as in fp32.
    compare(world(dp).run(trace_maps, config, 5)[0], expected, 2e-6, 2e-2)


@pytest.mark.parametrize("stage", [2, 3])
def test_double_precision_equals_to_the_last_digits(world, corpus, stage) -> None:
    config = engine_config(corpus, "loop", stage, 2, "native", train={"precision": "fp64"})
    compare(world(2).run(trace_maps, config, 3)[0], reference_maps(config, 3), 1e-11, 1e-11)


@pytest.mark.parametrize("stage", [1, 3])
def test_gradients_that_travel_in_bf16_are_close(world, corpus, stage) -> None:
    """The sum of two numbers of 8 bits is rounded again: 2^-8 of each, at most."""
    config = engine_config(corpus, "loop", stage, 2, "native", parallel={"reduce_dtype": "bf16"})
    expected = reference_maps(config, 1)
    found = world(2).run(trace_maps, config, 1)[0]
    compare(found, expected, 6e-3)
    with pytest.raises(AssertionError):
        compare(found, expected)


# ---------------------------------------------------------------------------- faults, skipped steps


@pytest.mark.parametrize("stage", [1, 3])
def test_planted_faults_are_caught(world, corpus, stage) -> None:
    config = engine_config(corpus, "reuse_map", stage, 2, "native")
    expected = reference_maps(config, 1)
    compare(world(2).run(trace_maps, config, 1)[0], expected)
    with pytest.raises(AssertionError) as caught:
        compare(world(2).run(trace_maps, config, 1, (), "microbatch dropped")[0], expected)
    assert not isinstance(caught.value, WorldError)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_gradient_that_is_not_finite_skips_the_step_on_every_rank(world, corpus, stage) -> None:
    config = engine_config(corpus, "reuse_map", stage, 2, "native")
    found = world(2).run(skip_one, config)
    for steps, updates, finite in found:
        assert [skipped for *_, skipped in steps] == [False, True, False]
        assert updates == 2.0 and finite
    # The step after the skipped one starts from the weights before it.
    compare(found[0][0][2:], reference_maps(config, 3, (), "not finite")[2:], 2e-5)


@pytest.mark.parametrize(("stage", "extra"), [(1, {}), (3, {"train": {"recompute": True}})])
def test_compiled_blocks_use_gathered_weights(world, corpus, stage, extra) -> None:
    """Graphs keep the copies for backward, after they were freed and gathered again."""
    config = engine_config(corpus, "reuse_map", stage, 2, "native", **extra)
    found, graphs = world(2).run(trace_compiled, config, 4)[0]
    assert graphs > 0
    compare(found, reference_maps(config, 4))


# -------------------------------------------------------------------------------------- checkpoints

CHAINS = [
    [(0, 1, {}), (3, 4, {"shard_group": 2}), (1, 2, {}), (0, 1, {})],
    [(3, 2, {}), (2, 2, {"zero_engine": "deepspeed"}), (3, 4, {}),
     (3, 2, {"zero_engine": "deepspeed"}), (2, 1, {}), (1, 4, {"shard_group": 1})],
]  # fmt: skip


@pytest.mark.parametrize("chain", [CHAINS[0], later(CHAINS[1])])
def test_any_engine_and_world_resumes_from_any(world, corpus, tmp_path, chain) -> None:
    optimizer = {"frozen": ["blocks.0.attention.value.*"], "lr_multipliers": {"blocks.*": 0.5}}
    configs = [
        (dp, engine_config(
            corpus, "loop", stage, 1, "native", optimizer=optimizer, parallel=extra
        ))
        for stage, dp, extra in chain
    ]  # fmt: skip
    check_resumed(world, configs, tmp_path)
