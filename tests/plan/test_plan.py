"""Plans against closed forms by hand; the search against all layouts; the command, its picture."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.commands import CHECK_WITHOUT_TORCH, megarecur
from support.configs import SCHEMES, make_config

from megarecur.config.run import Config
from megarecur.errors import ConfigError, MegarecurError, MeshError
from megarecur.plan.cluster import (
    PRESETS,
    Cluster,
    Link,
    Peak,
    Rates,
    load_cluster,
    read_curve,
)
from megarecur.plan.cost import (
    Seen,
    count_flops,
    count_parameters,
    count_tokens_per_step,
    estimate_memory,
)
from megarecur.plan.muon import count_orthogonalization
from megarecur.plan.pointwise import EAGER_LAUNCHES, count_pointwise_bytes
from megarecur.plan.predict import (
    Layout,
    LayoutPlan,
    complete,
    count_ranks,
    count_stage_flops,
    make_draft,
)
from megarecur.plan.search import MOST_PLANS, list_contexts, list_layouts, search
from megarecur.plan.simulate import choose_order
from megarecur.plot.layer_map import save
from megarecur.plot.timeline import COLOURS, draw_plan
from megarecur.recurrence.schemes import layer_map

ANY_SCHEME = pytest.mark.parametrize("scheme", list(SCHEMES))
FREE_LINK = Link(bandwidth_gb_s=1e9, latency_us=0.0)
IDEAL = Cluster(
    name="ideal",
    ranks_per_node=1024,
    peak_tflops=Peak(bf16=1, fp32=1, fp64=1),
    attainable=1.0,
    memory_gb=1000,
    node=FREE_LINK,
    network=FREE_LINK,
)
"""Nothing but FLOPs takes time."""


def sized_config(scheme: str = "cycle", **sections: Any) -> Config:
    """With its vocabulary, as `plan` is given it."""
    model = {"vocab_size": 96, **sections.pop("model", {})}
    return make_config(scheme=scheme, model=model, **sections)


def plan_of(config: Config, layout: Layout, cluster: Cluster = PRESETS["h100"]) -> LayoutPlan:
    return complete(make_draft(config, layout, cluster))


# ------------------------------------------------------------------------------------ the cluster


def test_presets_are_data_sheets() -> None:
    assert {name: c.peak("bf16") for name, c in PRESETS.items() if name != "cpu"} == {
        "a100": 312e12,
        "h100": 989e12,
        "h200": 989e12,
    }
    assert [PRESETS[n].memory_gb for n in ("a100", "h100", "h200")] == [80, 80, 141]
    assert [PRESETS[n].node.bandwidth_gb_s for n in ("a100", "h100", "h200")] == [300, 450, 450]
    assert all(c.ranks_per_node == 8 for name, c in PRESETS.items() if name != "cpu")
    assert all(load_cluster(name) is PRESETS[name] for name in PRESETS)


def test_a_cluster_of_your_own(tmp_path: Path) -> None:
    values = PRESETS["a100"].model_dump(exclude={"name"}, exclude_none=True) | {"ranks_per_node": 4}
    path = tmp_path / "mine.yaml"
    path.write_text(str(values))
    cluster = load_cluster(str(path))
    assert cluster == PRESETS["a100"].model_copy(update={"name": "mine", "ranks_per_node": 4})
    del values["memory_gb"]
    values |= {"ranks_per_nod": 3, "node": {"bandwidth_gb_s": -1, "latency_us": 0}}
    path.write_text(str(values))
    with pytest.raises(ConfigError) as refused:
        load_cluster(str(path))
    message = str(refused.value)
    assert message.startswith(f"{path}: 3 problems\n")
    assert "memory_gb: required, but missing" in message
    assert "ranks_per_nod: unknown key; did you mean 'ranks_per_node'?" in message
    assert "node.bandwidth_gb_s" in message and "-1" in message
    values = PRESETS["a100"].model_dump(exclude={"name"}, exclude_none=True)
    path.write_text(str(values | {"rates": {"products": {"fp33": {256: 1}}, "pointwise_gb_s": {}}}))
    with pytest.raises(ConfigError) as refused:
        load_cluster(str(path))
    assert "rates.products.fp33" in str(refused.value)
    assert "rates.pointwise_gb_s" in str(refused.value)
    with pytest.raises(ConfigError, match=r"--hardware a1000: is none of cpu, a100, h100, h200"):
        load_cluster("a1000", "--hardware ")


def test_links_are_those_of_the_slowest_member() -> None:
    cluster = PRESETS["h100"]
    assert cluster.link(8, 1, 64) is cluster.node
    assert cluster.link(3, 1, 48) is cluster.network, "some groups of 3 cross a border of 8"
    assert cluster.link(2, 4, 8) is cluster.node and cluster.link(2, 8, 16) is cluster.network
    link = Link(bandwidth_gb_s=10, latency_us=2, attainable=0.5)
    assert link.time(5e9) == pytest.approx(1 + 2e-6)
    assert link.reduce_time(5e9, 1) == 0.0
    assert link.reduce_time(5e9, 4) == pytest.approx(2 * 3 / 4 + 4 * 2e-6)


def test_groups_use_the_rails_of_their_members() -> None:
    """Eight members in a node share its eight interfaces; what leaves them passes NVLink once."""
    cluster = PRESETS["h100"]
    whole = cluster.link(64, 1, 64)
    assert whole.bandwidth_gb_s == min(8 * 50, 450) * 0.8 and whole.latency_us == 15
    assert cluster.link(32, 2, 64).bandwidth_gb_s == 4 * 50 * 0.8
    assert cluster.link(8, 8, 64) is cluster.network, "one member in a node has one interface"
    assert cluster.link(5, 4, 40) is cluster.network, "groups that begin inside a node"
    fat = cluster.model_copy(update={"network": Link(bandwidth_gb_s=400, latency_us=15)})
    assert fat.link(64, 1, 64).bandwidth_gb_s == 450 * 0.8, "the link inside is the slower one"


# ------------------------------------------------------------------------------- separate rates

MEASURED = Rates(
    products={"fp32": {256: 1.0, 1024: 4.0}},
    attention={"segments": {"fp32": {512: 0.5}}, "dense": {"fp32": {512: 0.5}}},
    pointwise_gb_s={1: 100.0},
)


def measured(**rates: Any) -> Cluster:
    """A cluster of one machine with separate rates."""
    values = MEASURED.model_dump() | rates
    return IDEAL.model_copy(update={"device": "cpu", "rates": Rates(**values)})


def test_rates_are_interpolated_by_logarithms() -> None:
    curve = {256: 1.0, 1024: 4.0}
    assert [read_curve(curve, s) for s in (1, 256, 512, 1024, 9999)] == pytest.approx(
        [1, 1, 2, 4, 4]
    )
    assert read_curve({7: 3.0}, 1) == read_curve({7: 3.0}, 100) == 3.0


def test_each_kind_of_work_has_its_rate() -> None:
    """A step is products, attention, pointwise work and the update, each linear in its own rate."""
    config = sized_config("dense", train={"global_batch_size": 4, "micro_batch_size": 4})

    def time(**rates: Any) -> float:
        return plan_of(config, Layout(1, 1, 1), measured(**rates)).step_time

    endless = {"products": {"fp32": {1: 1e9}}, "attention": {"segments": {"fp32": {1: 1e9}}},
               "pointwise_gb_s": {1: 1e9}}  # fmt: skip
    assert time(**endless) < 1e-9
    flops = count_flops(config, layer_map(config.recurrence))
    tokens = count_tokens_per_step(config)
    products = time(**endless | {"products": {"fp32": {1: 1.0}}})
    attention = time(**endless | {"attention": {"segments": {"fp32": {1: 1.0}}}})
    assert products + attention == pytest.approx(flops.hardware * tokens / 1e12, rel=1e-4)
    model = config.model
    keys = (config.data.seq_length + 1) / 2
    scores = 3 * 4 * keys * model.num_heads * model.head_dim * len(layer_map(config.recurrence))
    assert attention == pytest.approx(scores * tokens / 1e12, rel=1e-4)
    slow, slower = (time(**endless | {"pointwise_gb_s": {1: speed}}) for speed in (2.0, 1.0))
    assert slower == pytest.approx(2 * slow)


def test_dense_attention_computes_what_documents_do_not_need() -> None:
    cluster, few = measured(pointwise_gb_s={1: 1e9}), Seen(4, 4)

    def work(attention: str, seen: Seen | None = None) -> float:
        config = sized_config("dense", train={"attention": attention})
        return make_draft(config, Layout(1, 1, 1), cluster, seen=seen).ranks[0].work

    assert work("dense") > work("auto") > work("auto", few)
    assert work("dense", few) == pytest.approx(work("dense"), rel=1e-4), "all pairs in any case"


def test_an_eager_host_bounds_small_steps() -> None:
    config = sized_config("dense", train={"compile": False})
    gpu = measured(launch_us=1000.0).model_copy(update={"device": "cuda"})
    draft = make_draft(config, Layout(1, 1, 1), gpu)
    steps = len(layer_map(config.recurrence))
    assert draft.ranks[0].work == pytest.approx(steps * sum(EAGER_LAUNCHES) * 1e-3, rel=1e-3)
    fused = make_draft(sized_config("dense", train={"compile": True}), Layout(1, 1, 1), gpu)
    assert fused.ranks[0].work < draft.ranks[0].work


def test_compiled_blocks_and_narrow_numbers_move_fewer_bytes() -> None:
    eager, fused = (count_pointwise_bytes(sized_config("dense"), fused) for fused in (False, True))
    assert all(few < many for few, many in zip(fused, eager, strict=True))
    d, f, heads = 32, 64, 32 + 16  # 2 of 4 key heads
    assert eager == (4 * (2 * 5 * d + 2 * 3 * d + 5 * f + 5 * heads),
                     4 * (2 * 14 * d + 2 * 3 * d + 11 * f + 5 * heads))  # fmt: skip


# --------------------------------------------------------------------------- against closed forms


@ANY_SCHEME
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_and_flop_is_on_one_rank(scheme: str, tied: bool) -> None:
    config = sized_config(scheme, model={"tie_embeddings": tied}, train={"recompute": True})
    for layout in (Layout(1, 2, 2), Layout(2, 2, 1), Layout(1, 1, 4)):
        draft = make_draft(config, layout, IDEAL)
        assert sum(rank.unique for rank in draft.ranks) == count_parameters(config).total
        assert sorted(b for rank in draft.ranks for b in rank.blocks) == sorted(
            {step.block for step in layer_map(config.recurrence)}
        )
        flops = count_stage_flops(config, draft.walk)
        expected = count_flops(config, layer_map(config.recurrence)).hardware
        assert sum(map(sum, flops)) == expected
        tokens = config.train.micro_batch_size * config.data.seq_length
        seconds = tokens * expected / layout.tensor / 1e12
        assert sum(rank.work for rank in draft.ranks) == pytest.approx(seconds, rel=1e-3)


@ANY_SCHEME
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_without_a_pipeline_memory_is_that_of_check(scheme: str, stage: int) -> None:
    for layout in (Layout(1, 1, 2, stage), Layout(2, 1, 2, stage)):
        for recompute in (False, True):
            config = sized_config(
                scheme, train={"recompute": recompute, "micro_batch_size": 1, "precision": "bf16"}
            )
            plan = plan_of(config, layout)
            steps = layer_map(config.recurrence)
            memory = estimate_memory(plan.draft.config, steps, dp=2)
            assert plan.memory == (memory.total,)


def test_a_pipeline_keeps_every_block_once_and_zero_shares_out_its_moments() -> None:
    config = sized_config("dense", recurrence={"kind": "dense", "num_layers": 4})
    block = 4 * 1 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32)  # bytes, 2 of 4 kv heads
    table = 4 * (96 * 32)
    first, *middle, last = make_draft(config, Layout(1, 4, 2), IDEAL).ranks
    assert [rank.parameters for rank in middle] == [block, block]
    assert first.parameters == block + table
    assert last.parameters == block + table + 4 * 32, "tied: its head is a copy"
    assert last.unique * 4 == block + 4 * 32, "which is counted once"
    for rank, shared in zip(
        make_draft(config, Layout(1, 4, 2), IDEAL).ranks,
        make_draft(config, Layout(1, 4, 2, 2), IDEAL).ranks,
        strict=True,
    ):
        norms = 4 * 32 * (3 if rank.rank == 3 else 2)  # They stay whole.
        assert rank.moments == 2 * rank.parameters and rank.gradients == rank.parameters
        assert shared.moments == 2 * shared.gradients == rank.parameters + norms
        whole = rank.parameters - norms
        assert shared.workspace == rank.workspace + whole, "summed over the order, then reduced"


def test_bytes_of_the_pipeline_are_hops_times_micro_batches_times_size() -> None:
    config = sized_config("cycle", recurrence={"kind": "cycle", "num_blocks": 2, "depth": 6})
    draft = make_draft(config, Layout(1, 2, 2), IDEAL)
    hops, microbatches, size = 5, 2, 2 * 32 * 32 * 4
    assert [stage.rank for stage in draft.walk] == [0, 1] * 3
    sent = [rank.traffic.pipeline for rank in draft.ranks]
    assert sum(sent) == 2 * hops * microbatches * size
    assert sent == [microbatches * size * 5] * 2  # 3 forward and 2 back; 2 forward and 3 back
    cut = sized_config(
        "cycle",
        recurrence={"kind": "cycle", "num_blocks": 2, "depth": 6},
        parallel={"tensor": 2, "sequence_parallel": True},
    )
    halves = make_draft(cut, Layout(2, 2, 2), IDEAL)
    assert [rank.traffic.pipeline * 2 for rank in halves.ranks] == sent


def test_values_that_travel_along_are_counted() -> None:
    """A walk by hand: a value goes with the hidden state, its gradient comes back, or does not."""
    dense = {"kind": "dense", "num_layers": 2}
    draft = make_draft(sized_config("dense", recurrence=dense), Layout(1, 2, 1), IDEAL)
    size = 4 * 2 * 32 * 32 * 4  # micro batches x samples x positions x channels x bytes

    def sent(**back: Any) -> list[int]:
        first, last = draft.walk
        walk = (replace(first, sends=("a",)), replace(last, receives=("a",), **back))
        ranks = count_ranks(
            draft.config, draft.layout, draft.placement, walk, draft.costs, draft.cluster
        )
        return [rank.traffic.pipeline // size for rank in ranks]

    assert sent() == [2, 1]
    assert sent(returns=("a",)) == [2, 2]
    assert sent(returns_x=False) == [2, 0]


def test_bytes_of_collectives() -> None:
    config = sized_config("sequence")  # 2 blocks, depth 4
    rank = make_draft(config, Layout(2, 1, 2), IDEAL).ranks[0]
    stream, microbatches = 2 * 32 * 32 * 4, 2
    # Two all-reduces for every step and direction, the embedding's and the head's.
    assert rank.traffic.tensor == microbatches * (4 * 4 + 2) * stream * 2 * 1 // 2
    again = sized_config("sequence", train={"recompute": True})
    assert make_draft(again, Layout(2, 1, 2), IDEAL).ranks[0].traffic.tensor == (
        microbatches * (6 * 4 + 2) * stream
    )
    plain = make_draft(config, Layout(1, 1, 4), IDEAL).ranks[0]
    assert plain.traffic.tensor == plain.traffic.pipeline == 0
    assert plain.traffic.data == plain.gradients * 2 * 3 // 4
    gathered = make_draft(config, Layout(1, 1, 2, 3), IDEAL).ranks[0]
    whole = plain.gradients
    matrices = whole - 4 * 5 * 32  # Five norms stay whole.
    # 2 micro batches: gathered for each forward and backward pass, reduced after each.
    assert gathered.traffic.data == (2 * 2 * matrices + 2 * whole) // 2


def test_muon_takes_time_which_owners_share() -> None:
    """Five iterations of a square matrix of n take 30 n^3 FLOPs."""
    assert count_orthogonalization((8, 8), 5) == 30 * 8**3
    assert count_orthogonalization((16, 8), 5) == count_orthogonalization((8, 16), 5) == 5 * 5120
    plain, muon = sized_config(), sized_config(optimizer={"muon": {}})
    update = {
        layout: make_draft(muon, layout, IDEAL).update_time
        - make_draft(plain, layout, IDEAL).update_time
        for layout in (Layout(1, 1, 4), Layout(1, 1, 4, 1), Layout(4, 1, 1))
    }
    alone, sharded, cut = update.values()
    assert 0.2 * alone < sharded < 0.5 * alone and sharded == pytest.approx(cut)
    assert make_draft(muon, Layout(1, 1, 4), IDEAL).ranks[0].traffic.muon == 0
    assert make_draft(plain, Layout(4, 1, 1), IDEAL).ranks[0].traffic.muon == 0


def test_a_tied_embedding_is_reduced_only_where_its_ends_are_apart() -> None:
    apart = make_draft(sized_config("cycle"), Layout(1, 2, 1), PRESETS["h100"])
    steps = [step.block for step in layer_map(sized_config("cycle").recurrence)]
    assert steps[0] == steps[-1] == 0 and apart.tied_time == 0.0
    even = {"kind": "cycle", "num_blocks": 2, "depth": 4}
    apart = make_draft(sized_config("cycle", recurrence=even), Layout(1, 2, 1), PRESETS["h100"])
    assert apart.tied_time > 0.0
    assert [rank.traffic.tied for rank in apart.ranks] == [96 * 32 * 4] * 2
    free = sized_config("cycle", recurrence=even, model={"tie_embeddings": False})
    assert make_draft(free, Layout(1, 2, 1), PRESETS["h100"]).tied_time == 0.0
    vee = make_draft(sized_config("cycle_reverse"), Layout(1, 2, 1), PRESETS["h100"])
    assert vee.tied_time == 0.0 and sum(rank.traffic.tied for rank in vee.ranks) == 0


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (4, 16)])
def test_the_bubble_of_1f1b(ranks: int, microbatches: int) -> None:
    """(p - 1) / (m + p - 1), where stages are alike and nothing else takes time."""
    config = sized_config(
        "dense",
        recurrence={"kind": "dense", "num_layers": 4},
        model={"vocab_size": 2, "hidden_size": 128, "ffn_hidden_size": 512},
        train={"global_batch_size": microbatches, "micro_batch_size": 1},
        parallel={"order": "1f1b"},
    )
    plan = plan_of(config, Layout(1, ranks, 1), IDEAL)
    assert plan.choice.name == "1f1b"
    assert plan.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1), rel=5e-3)


def test_time_tokens_and_mfu_agree() -> None:
    config = sized_config("reuse_map")
    for layout in (Layout(1, 1, 1), Layout(2, 2, 1), Layout(1, 3, 1)):
        plan = plan_of(config, layout)
        flops = count_flops(config, layer_map(config.recurrence)).train
        tokens = count_tokens_per_step(config)
        assert plan.tokens_per_second * plan.step_time == pytest.approx(tokens)
        done = plan.mfu * plan.step_time * layout.world * PRESETS["h100"].peak("fp32")
        assert done == pytest.approx(flops * tokens)
    alone = plan_of(config, Layout(1, 1, 1), IDEAL)
    assert alone.mfu == pytest.approx(1.0) and alone.bubble == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("order", ["1f1b", "interleaved_zero_bubble", "greedy"])
@pytest.mark.parametrize("cluster", [IDEAL, PRESETS["cpu"], PRESETS["h100"]], ids=lambda c: c.name)
def test_more_micro_batches_are_extrapolated(order: str, cluster: Cluster) -> None:
    """On the presets this small model waits for hops; on the ideal cluster it computes."""
    config = sized_config(
        "dense",
        recurrence={"kind": "dense", "num_layers": 4},
        train={"global_batch_size": 96, "micro_batch_size": 1},
        parallel={"order": order},
    )
    draft = make_draft(config, Layout(1, 4, 1), cluster)
    plan = complete(draft, most_operations=0)
    assert plan.simulated == 12 and draft.num_microbatches == 96
    whole = choose_order(draft.walk, 96, draft.costs, wanted=order)
    near = 0.08 if order == "greedy" else 0.02  # a greedy order repeats itself less
    assert plan.pipeline_time == pytest.approx(whole.timeline.makespan, rel=near)


def test_the_deepest_step_decides_memory() -> None:
    loops = {"sampler": "uniform", "min": 1, "max": 5}
    loop = {"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": loops}
    long = {"steps": 100}  # enough to draw every depth
    sampled = plan_of(sized_config("loop", recurrence=loop, train=long), Layout(1, 2, 1))
    deep = plan_of(sized_config("loop", recurrence={**loop, "num_loops": 5}), Layout(1, 2, 1))
    mean = plan_of(sized_config("loop", recurrence={**loop, "num_loops": 3}), Layout(1, 2, 1))
    if sampled.draft.placement == deep.draft.placement == mean.draft.placement:
        assert sampled.activations == deep.activations > mean.activations
        assert sampled.step_time == pytest.approx(mean.step_time)
    else:
        pytest.fail("the depths of this test should be placed alike")


# ------------------------------------------------------------------------------------- the search


def test_the_search_finds_what_trying_everything_finds() -> None:
    config = sized_config(
        "reuse_map",
        train={"global_batch_size": 16, "micro_batch_size": 1},
        model={"num_kv_heads": 4},
    )
    cluster = PRESETS["h100"].model_copy(update={"ranks_per_node": 2})
    tried = []
    for layout in (layout for n in (1, 2, 4, 8) for layout in list_layouts(8, context=n)):
        try:
            draft = make_draft(config, layout, cluster)
        except MegarecurError:
            continue
        plan = complete(draft)
        assert plan.step_time >= draft.least_time * (1 - 1e-9), draft.layout
        assert max(plan.memory) >= draft.least_memory
        tried.append(plan)
    tried.sort(key=lambda plan: plan.step_time)
    assert {plan.layout.context for plan in tried} == {1, 2, 4}
    for keep in (1, 3, 10):
        found = search(config, cluster, 8, keep=keep)
        assert [p.layout for p in found.best] == [p.layout for p in tried[:keep]]
        lost = [layout for family in found.families for layout in family.layouts]
        assert len(found.best) + len(lost) == found.layouts == len({*lost}) + len(found.best)
        assert found.simulated <= len(tried)


def test_long_sequences_are_shared_if_that_pays() -> None:
    """Two samples on 8 ranks: what is left is to cut them, or their matrices."""
    batch = {"global_batch_size": 2, "micro_batch_size": 1, "precision": "bf16"}
    config = sized_config("dense", train=batch, data={"seq_length": 4096})
    fast = PRESETS["h100"]
    slow = fast.model_copy(update={"node": fast.node.model_copy(update={"latency_us": 1e6})})
    found = search(config, fast, 8, tensor=1, pipeline=1)
    assert [plan.layout for plan in found.best] == [Layout(1, 1, 2, context=4)]
    half, quarter = (complete(make_draft(config, Layout(1, 1, 2, context=n), fast)) for n in (2, 4))
    assert quarter.activations[0] == pytest.approx(half.activations[0] / 2, rel=0.15)
    (rank,) = found.best[0].draft.ranks
    assert 0.0 < rank.exchanges < rank.work
    priced = search(config, slow, 2, keep=1, pipeline=1)
    assert priced.best[0].layout == Layout(1, 1, 2)
    (family,) = (f for f in priced.families if "exchange of heads over context" in f.reason)
    assert family.layouts == (Layout(1, 1, 1, context=2),) and family.name == "1 x 1 x 2"
    fixed = search(config, fast, 8, context=2)
    assert {plan.layout.context for plan in fixed.best} == {2}


@pytest.mark.parametrize(
    ("scheme", "sections", "expected"),
    [
        ("dense", {}, [1, 2, 4]),
        ("dense", {"data": {"seq_length": 6}}, [1, 2]),
        ("dense", {"model": {"num_heads": 12, "num_kv_heads": 4, "hidden_size": 48}}, [1, 2, 4]),
        ("dense", {"recurrence": {"kind": "universal", "depth": 2,
                                      "halting": {"mode": "token"}}}, [1]),
    ],
)  # fmt: skip
def test_sequences_are_cut_as_the_rules_allow(
    scheme: str, sections: dict[str, Any], expected: list[int]
) -> None:
    assert list_contexts(sized_config(scheme, **sections), 8) == expected


def test_layouts_that_do_not_fit_take_zero_or_say_by_how_much() -> None:
    config = sized_config("dense", train={"micro_batch_size": 1})
    plain = make_draft(config, Layout(1, 1, 4), IDEAL).least_memory
    shared = make_draft(config, Layout(1, 1, 4, 1), IDEAL).least_memory

    def with_memory(num_bytes: int) -> Cluster:
        return IDEAL.model_copy(update={"memory_gb": (num_bytes + 1) / 1e9, "usable_memory": 1.0})

    options: dict[str, Any] = {"tensor": 1, "pipeline": 1, "context": 1}
    assert search(config, with_memory(plain), 4, **options).best[0].layout.zero_stage == 0
    assert search(config, with_memory(shared), 4, **options).best[0].layout.zero_stage == 1
    nothing = search(config, with_memory(shared), 4, zero_stage=0, **options)
    assert nothing.best == () and nothing.simulated == 0
    (family,) = nothing.families
    assert family.name == "1 x 1" and "too much" in family.reason
    assert search(config, with_memory(1000), 4).best == ()


def test_every_reason_is_told() -> None:
    config = sized_config("reuse_map", train={"global_batch_size": 4, "micro_batch_size": 1})
    found = search(config, PRESETS["h100"], 16)
    reasons = {family.name: family.reason for family in found.families}
    text = "\n".join(reasons.values())
    assert "exceeds the number of blocks" in text
    assert "does not divide model.num_heads=4" in text
    assert "train.global_batch_size=4 does not divide into 16 replicas" in text
    hot = sized_config(
        "reuse_map",
        recurrence={"kind": "reuse_map", "reuse_map": [9, 1, 1]},
        train={"global_batch_size": 64},
    )
    slow = search(hot, IDEAL, 2, keep=1)
    assert slow.best[0].layout.pipeline == 1
    (family,) = (f for f in slow.families if "busiest rank" in f.reason)
    assert "which owns block 0" in family.reason and "expensive block" in family.reason


def test_a_search_simulates_few_of_many_layouts() -> None:
    config = sized_config(
        "dense",
        recurrence={"kind": "dense", "num_layers": 8},
        train={"global_batch_size": 4096, "micro_batch_size": 1},
        model={"num_heads": 8, "num_kv_heads": 8},
    )
    found = search(config, PRESETS["h100"], 4096, keep=2)
    assert found.layouts == 91 + 33 + 21 + 10  # context 1, 2, 4, 8
    assert found.simulated <= 10 and len(found.best) == 2


def large(blocks: int, depth: int) -> Config:
    """Of some 10^10 parameters, for thousands of ranks."""
    return sized_config(
        "cycle",
        recurrence={"kind": "cycle", "num_blocks": blocks, "depth": depth},
        model={"hidden_size": 8192, "num_heads": 64, "num_kv_heads": 8, "ffn_hidden_size": 28672,
               "vocab_size": 128256},
        data={"seq_length": 4096},
        train={"global_batch_size": 2048, "micro_batch_size": 1, "precision": "bf16"},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("blocks", "depth"), [(64, 128), (16, 256)])
def test_thousands_of_ranks_take_few_simulations(blocks: int, depth: int) -> None:
    found = search(large(blocks, depth), PRESETS["h100"], 4096)
    assert found.layouts == 273 and found.best
    assert found.simulated <= MOST_PLANS
    assert all(plan.fits for plan in found.best)


# ------------------------------------------------------------------------------------ the command

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
WITH_VOCABULARY = (QUICKSTART, "model.vocab_size=2048", "--world-size", 4)


def test_a_layout_is_planned_without_importing_torch() -> None:
    arguments = map(str, ["plan", *WITH_VOCABULARY, "--tensor", 1, "--pipeline", 2])
    command = [sys.executable, "-c", CHECK_WITHOUT_TORCH, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]", "heavy imports"
    for part in ("tensor 1 x pipeline 2 x data 2", "placement of blocks", "2,557,632 parameters",
                 "the walk, 2 stages", "tokens per second", "MFU"):  # fmt: skip
        assert part in done.stdout, part


def test_a_search_ranks_and_explains(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "new" / "plan.png"
    code, out, err = megarecur(
        capsys, "plan", *WITH_VOCABULARY, "--hardware", "a100", "--out", picture
    )
    assert code == 0, err
    assert "best of 10 layouts of 4 ranks" in out and "rejected layouts" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--tensor", 3], "--world-size 4 is not a multiple of tensor=3"),
        (["--context", 3], "tensor=1 x pipeline=1 x context=3 = 3; choose a multiple of 3"),
        (["--pipeline", 4, "--tensor", 2], "tensor=2 x pipeline=4 = 8; choose a multiple of 8"),
        (["--tensor", 1, "--pipeline", 1], "train.global_batch_size=8 does not divide into 4 repl"),
        (["--hardware", "none"], "--hardware none: is none of cpu, a100"),
        (["--cluster", "h100"], "name the hardware of a plan with --hardware h100"),
        (["--hardware", "no.yaml"], "no.yaml: cannot be read"),
        (["--out", "plan.gif"], "--out plan.gif: the name must end in .png or .svg"),
        (["--zero", 4], "--zero"),
        (
            ["--pipeline", 2, "--tensor", 2, "parallel.order=zbv"],
            "parallel.order=zbv requires a walk",
        ),
        (["train.steps=0"], "train.steps"),
    ],
)
def test_mistakes_in_plans(
    capsys: pytest.CaptureFixture[str], arguments: list[Any], part: str
) -> None:
    code, _, err = megarecur(capsys, "plan", *WITH_VOCABULARY, *arguments)
    assert code == 2 and part in err and "Traceback" not in err, err


def test_a_world_that_nothing_fits_exits_with_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cluster = tmp_path / "tiny.yaml"
    cluster.write_text(
        str(PRESETS["cpu"].model_dump(exclude={"name"}, exclude_none=True) | {"memory_gb": 1e-6})
    )
    code, out, err = megarecur(capsys, "plan", *WITH_VOCABULARY, "--hardware", cluster)
    assert code == 2 and "none of its 10 layouts can run this config on tiny" in err
    assert "no layout of 4 ranks fits" in out and "too much" in out
    code, out, _ = megarecur(
        capsys, "plan", *WITH_VOCABULARY, "--hardware", cluster, "--tensor", 2, "--pipeline", 1
    )
    assert code == 0 and "DOES NOT FIT" in out


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(MeshError, match="does not divide into 3 replicas"):
        make_draft(sized_config(), Layout(1, 1, 3), IDEAL)


# ------------------------------------------------------------------------------------ the picture


@pytest.mark.parametrize("scheme", ["cycle", "cycle_reverse", "loop", "dense"])
def test_a_timeline_has_a_box_for_every_operation(scheme: str, tmp_path: Path) -> None:
    plan = plan_of(sized_config(scheme), Layout(1, 2, 1), IDEAL)
    figure = draw_plan(plan)
    (axes,) = figure.axes
    timeline = plan.choice.timeline
    boxes = sum(timed.op.kind in COLOURS for ops in timeline.ranks for timed in ops)
    idle, drawn = axes.collections
    assert len(idle.get_paths()) == 2 and len(drawn.get_paths()) == boxes
    words = [text.get_text() for text in (*axes.texts, *figure.texts)]
    assert any(f"bubbles are {plan.bubble:.1%}" in word for word in words)
    assert {"rank 0", "rank 1", "0", "3"} <= {*words}
    save(figure, tmp_path / "a.png", tmp_path / "a.svg")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_many_micro_batches_are_drawn_in_part() -> None:
    config = sized_config("cycle", train={"global_batch_size": 2048})
    figure = draw_plan(plan_of(config, Layout(1, 2, 1), IDEAL))
    words = [text.get_text() for text in figure.texts]
    assert any("6 of 1024 micro batches" in word for word in words), words
    assert figure.get_size_inches()[0] <= 24


def test_layouts_of_a_world_have_what_is_given() -> None:
    assert list(list_layouts(4, pipeline=2)) == [Layout(1, 2, 2), Layout(2, 2, 1)]
    assert list(list_layouts(4, tensor=2)) == [Layout(2, 1, 2), Layout(2, 2, 1)]
    assert list(list_layouts(12, pipeline=4)) == [Layout(1, 4, 3), Layout(3, 4, 1)]
    assert list(list_layouts(8, 2, 2, 2)) == [Layout(2, 2, 1, context=2)]
    assert all(
        layout.world == 12 for context in (1, 3) for layout in list_layouts(12, None, None, context)
    )
