"""Placements, without torch: the partition, what stays together, how even it is."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import make_config

from megarecur.config.load import validate
from megarecur.config.run import Config
from megarecur.errors import PlacementError
from megarecur.plan.cost import count_flops, count_parameters, count_step_flops, expect_flops
from megarecur.plan.placement import (
    Placement,
    balance,
    count_block_costs,
    partition,
    place,
    weigh_blocks,
)
from megarecur.plan.walk import build_walk, cuts_for_v
from megarecur.recurrence.schemes import layer_map


def reuse(*uses: int) -> dict[str, Any]:
    return {"kind": "reuse_map", "reuse_map": list(uses)}


REVERSE = {"kind": "cycle_reverse", "num_blocks": 3, "depth": 6}
SAMPLED = {"sampler": "uniform", "max": 5}
DENSE = {"kind": "dense", "num_layers": 4}
LOOP = {"kind": "loop", "prelude": 1, "core": 2, "coda": 3, "num_loops": 1}
NORMED = {**LOOP, "final_norm_after_core": True}


def placed_config(recurrence: dict[str, Any], pipeline: int, **sections: Any) -> Config:
    """A tiny run of 16 ids; keyword arguments update model, parallel and train."""
    values = make_config().model_dump(mode="json")
    values |= {"recurrence": recurrence, "parallel": {"pipeline": pipeline}}
    values["model"]["vocab_size"] = 16
    for section, update in sections.items():
        values[section] |= update
    return validate(values, "test")


def place_config(config: Config, **wishes: Any) -> Placement:
    return place(config, layer_map(config.recurrence), **wishes)


def cut(costs: list[float], ranks: int) -> list[float]:
    """The loads of the best partition."""
    ends = partition(lambda a, b: sum(costs[a:b]), len(costs), ranks)
    assert ends is not None
    return [sum(costs[a:b]) for a, b in pairwise((0, *ends))]


# -------------------------------------------------------------------------------------- partition


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=8),
    st.integers(1, 8),
    st.one_of(st.none(), st.integers(1, 40)),
)
def test_the_partition_is_the_best_of_all(
    parts: list[tuple[int, int]], ranks: int, cap: int | None
) -> None:
    costs, sizes = zip(*parts, strict=True)
    found = partition(
        lambda a, b: sum(costs[a:b]),
        len(parts),
        ranks,
        lambda a, b: cap is None or sum(sizes[a:b]) <= cap,
    )
    cuts = [
        [*pairwise((0, *inner, len(parts)))]
        for inner in combinations(range(1, len(parts)), ranks - 1)
    ]
    loads = [
        max(sum(costs[a:b]) for a, b in runs)
        for runs in cuts
        if cap is None or all(sum(sizes[a:b]) <= cap for a, b in runs)
    ]
    if not loads:
        assert found is None
        return
    assert found is not None and len(found) == ranks and found[-1] == len(parts)
    runs = [*pairwise((0, *found))]
    assert all(a < b for a, b in runs)
    assert max(sum(costs[a:b]) for a, b in runs) == min(loads)
    assert cap is None or all(sum(sizes[a:b]) <= cap for a, b in runs)


def test_partitions_of_the_reference() -> None:
    """pipeline.md, section 7: what is executed is shared out, not what is stored."""
    assert cut([4, 2, 1, 1], 2) == [4, 4]
    assert max(cut([4, 2, 1, 1], 4)) == 4  # The hot block: half of 2 is the best average.
    assert max(cut([4] * 3 + [2] * 3 + [1] * 6, 4)) == 8  # Of 24 in all: at best 75 %.
    assert cut([1] * 6, 4) == [1, 1, 2, 2]


# -------------------------------------------------------------------------------------- placement


@pytest.mark.parametrize(
    ("recurrence", "pipeline", "owners", "ends", "walk"),
    [
        (DENSE, 2, (0, 0, 1, 1), (0, 1), [0, 1]),
        ({"kind": "cycle", "num_blocks": 4, "depth": 8}, 2, (0, 0, 1, 1), (0, 1), [0, 1, 0, 1]),
        (REVERSE, 3, (0, 1, 2), (0, 0), [0, 1, 2, 1, 0]),
        ({"kind": "sequence", "num_blocks": 2, "depth": 6}, 2, (0, 1), (0, 1), [0, 1]),
        (reuse(4, 2, 1, 1), 2, (0, 1, 1, 1), (0, 1), [0, 1]),
        ({"kind": "custom", "order": [1, 0, 1]}, 2, (0, 1), (1, 1), [1, 0, 1]),
    ],
)  # fmt: skip
def test_where_blocks_live_and_what_walk_follows(
    recurrence: dict[str, Any],
    pipeline: int,
    owners: tuple[int, ...],
    ends: tuple[int, int],
    walk: list[int],
) -> None:
    config = placed_config(recurrence, pipeline)
    steps = layer_map(config.recurrence)
    placement = place(config, steps)
    assert placement == Placement(pipeline, owners, *ends)
    assert [stage.rank for stage in build_walk(steps, placement)] == walk
    assert [b for r in range(pipeline) for b in placement.blocks(r)] == list(range(len(owners)))


def test_the_tip_of_a_v_is_cut_in_its_middle() -> None:
    config = placed_config({"kind": "cycle_reverse", "num_blocks": 4, "depth": 8}, 2)
    steps = layer_map(config.recurrence)
    placement = place(config, steps)
    cuts = cuts_for_v(steps, placement)
    assert [len(stage.steps) for stage in build_walk(steps, placement)] == [2, 4, 2]
    walk = build_walk(steps, placement, cuts)
    assert [(stage.rank, len(stage.steps)) for stage in walk] == [(0, 2), (1, 2), (1, 2), (0, 2)]
    for other in (
        {"kind": "cycle", "num_blocks": 4, "depth": 8},
        DENSE,
    ):
        config = placed_config(other, 2)
        steps = layer_map(config.recurrence)
        assert cuts_for_v(steps, place(config, steps)) == ()
    one = Placement(1, (0,) * 4, 0, 0)
    assert cuts_for_v(steps, one) == ()


def test_the_head_weighs_on_the_rank_that_owns_it() -> None:
    """A large vocabulary: the last block alone with the head, whatever the others are."""
    config = placed_config({"kind": "dense", "num_layers": 8}, 2, model={"vocab_size": 4096})
    assert place_config(config).owners == (0,) * 7 + (1,)
    assert (
        place_config(placed_config({"kind": "dense", "num_layers": 8}, 2)).owners
        == (0,) * 4 + (1,) * 4
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "recurrence",
    [
        reuse(4, 2, 1, 1),
        {**LOOP, "num_loops": 6, "backward_loops": 2},
        {**LOOP, "num_loops": SAMPLED},
    ],
    ids=["reuse", "truncated", "sampled"],
)  # fmt: skip
def test_costs_of_blocks_add_up_to_what_the_run_executes(
    recurrence: dict[str, Any], recompute: bool
) -> None:
    config = placed_config(recurrence, 2, train={"recompute": recompute, "steps": 50})
    steps = layer_map(config.recurrence)
    costs = count_block_costs(config, steps)
    assert sum(costs) == pytest.approx(expect_flops(config).hardware, rel=1e-6)
    if recurrence["kind"] == "reuse_map":
        assert sum(costs) == count_flops(config, steps).hardware
        assert costs[0] == 4 * (3 + recompute) * count_step_flops(config, steps)[0]


def test_bytes_are_counted_once_per_block_and_a_tied_table_where_its_ends_are() -> None:
    for tied in (True, False):
        config = placed_config(
            {"kind": "cycle", "num_blocks": 2, "depth": 8}, 2, model={"tie_embeddings": tied}
        )
        weigh, parameters = (
            weigh_blocks(config, layer_map(config.recurrence)),
            count_parameters(config),
        )
        assert weigh([0, 1]) == 16 * parameters.total
        table = 16 * 16 * config.model.hidden_size
        assert weigh([0]) + weigh([1]) == weigh([0, 1]) + (table if tied else 0)  # fmt: skip


def test_memory_moves_blocks_and_is_refused_with_the_numbers() -> None:
    config = placed_config(reuse(6, 1, 1, 1), 2)
    steps = layer_map(config.recurrence)
    weigh = weigh_blocks(config, steps)
    assert place(config, steps).owners == (0, 1, 1, 1)
    cap = max(weigh([0, 1]), weigh([2, 3]))
    assert place(config, steps, memory_cap=cap).owners == (0, 0, 1, 1)
    least = max(weigh([0, 1]), weigh([2, 3]))
    with pytest.raises(PlacementError) as caught:
        place(config, steps, memory_cap=least - 1)
    assert f"needs {least:,} bytes" in str(caught.value)
    assert f"has room for {least - 1:,}" in str(caught.value)
    with pytest.raises(PlacementError, match=r"pipeline rank 1 needs"):
        place(
            placed_config(reuse(6, 1, 1, 1), 2, parallel={"placement": [0, 1, 1, 1]}),
            steps,
            memory_cap=cap,
        )


def test_a_placement_by_hand_is_taken() -> None:
    config = placed_config(reuse(4, 2, 1, 1), 2, parallel={"placement": [1, 0, 0, 1]})
    assert place_config(config) == Placement(2, (1, 0, 0, 1), 1, 1)


def test_blocks_after_the_final_norm_stay_with_the_head() -> None:
    config = placed_config(NORMED, 3)
    placement = place_config(config)
    assert len({placement.owners[block] for block in (3, 4, 5)}) == 1
    assert placement.head == placement.owners[3] == 2
    assert place_config(placed_config(LOOP, 3)).owners == (0, 0, 1, 1, 2, 2)
    steps = layer_map(config.recurrence)
    apart = placed_config(LOOP, 3, parallel={"placement": [0, 0, 1, 1, 2, 2]})
    with pytest.raises(PlacementError, match=r"separates blocks \[3, 4, 5\]"):
        place(apart, steps)
    with pytest.raises(PlacementError, match=r"exceeds the 4 part\(s\)"):
        place(placed_config(LOOP, 5), steps)


# ---------------------------------------------------------------------------------------- balance


def test_an_even_placement_needs_no_advice() -> None:
    config = placed_config({"kind": "cycle", "num_blocks": 4, "depth": 16}, 2)
    steps = layer_map(config.recurrence)
    found = balance(config, place(config, steps), steps)
    assert found.efficiency == pytest.approx(1.0, abs=0.02) and found.advice == ""
    assert sum(found.loads) == sum(count_block_costs(config, steps))


def test_a_hot_block_is_named_with_what_would_help() -> None:
    config = placed_config(reuse(4, 2, 1, 1), 4)
    steps = layer_map(config.recurrence)
    found = balance(config, place(config, steps), steps)
    assert found.efficiency == pytest.approx(0.5, abs=0.02) and found.block == 0
    assert found.advice.startswith("parallel.pipeline=4 keeps its ranks at most 50% busy")
    assert "in block 0; parallel.pipeline=2 would give" in found.advice
    assert "parallel.tensor or data parallelism" in found.advice
    config = placed_config(reuse(9, 1), 2)
    steps = layer_map(config.recurrence)
    assert "set parallel.pipeline to 1" in balance(config, place(config, steps), steps).advice


def test_a_poor_placement_by_hand_is_told_of_the_better_one() -> None:
    config = placed_config(DENSE, 2, parallel={"placement": [0, 1, 1, 1]})
    steps = layer_map(config.recurrence)
    found = balance(config, place(config, steps), steps)
    assert found.efficiency < 0.8 and "omit parallel.placement" in found.advice
    assert found.block in (1, 2, 3)
    assert "other ranks" not in found.advice
