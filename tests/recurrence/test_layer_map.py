"""Layer maps and inventories, without torch (recurrence.md, sections 1.2, 5.1, 5.6, 6.5)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from megarecur.config.load import validate
from megarecur.config.recurrence import RecurrenceConfig
from megarecur.config.run import Config
from megarecur.recurrence.inventory import build_inventory, is_embedding
from megarecur.recurrence.layer_map import LayerMap, Step, count_uses, from_order
from megarecur.recurrence.schemes import LOOPED, SCHEMES, layer_map

ADAPTER: TypeAdapter[Any] = TypeAdapter(RecurrenceConfig)


def map_of(kind: str, run_depth: int | None = None, **values: object) -> LayerMap:
    return layer_map(ADAPTER.validate_python({"kind": kind, **values}), run_depth)


def order(kind: str, **values: object) -> list[int]:
    return [step.block for step in map_of(kind, **values)]


def shared(kind: str, num_blocks: int, depth: int) -> list[int]:
    return order(kind, num_blocks=num_blocks, depth=depth)


def digits(text: str) -> list[int]:
    """1-based digits of recurrence.md to 0-based blocks."""
    return [int(digit) - 1 for digit in text]


@pytest.mark.parametrize(
    ("kind", "num_blocks", "depth", "expected"),
    [
        ("sequence", 3, 6, "112233"),
        ("cycle", 3, 6, "123123"),
        ("cycle_reverse", 3, 6, "123321"),
        ("sequence", 6, 12, "112233445566"),
        ("cycle", 6, 12, "123456123456"),
        ("cycle_reverse", 6, 12, "123456654321"),
        ("sequence", 6, 18, "111222333444555666"),
        ("cycle", 6, 18, "123456123456123456"),
        ("cycle_reverse", 6, 18, "123456123456654321"),
        ("sequence", 4, 7, "1122334"),
        ("cycle", 4, 7, "1234123"),
        ("cycle_reverse", 4, 7, "1234432"),
        ("sequence", 4, 10, "1112223334"),
        ("cycle", 4, 10, "1234123412"),
        ("cycle_reverse", 4, 10, "1234124321"),
    ],
)
def test_lists_of_the_authors(kind: str, num_blocks: int, depth: int, expected: str) -> None:
    """(N, k) of section 5.6 as replayed in section 5.1, also where M does not divide N."""
    assert shared(kind, num_blocks, depth) == digits(expected)


def test_table_of_the_design() -> None:
    assert order("dense", num_layers=4) == [0, 1, 2, 3]
    assert order("reuse_map", reuse_map=[4, 2, 1, 1]) == [0, 0, 0, 0, 1, 1, 2, 3]
    assert order("block_recurrence", num_blocks=4, num_loops=2) == [0, 1, 2, 3, 0, 1, 2, 3]
    loop = order("loop", prelude=2, core=2, coda=2, num_loops=3)
    assert loop == [0, 1, 2, 3, 2, 3, 2, 3, 4, 5]
    assert order("custom", order=[0, 1, 2, 2, 1, 0, 0]) == [0, 1, 2, 2, 1, 0, 0]


def test_steps_of_a_reuse_map() -> None:
    assert map_of("reuse_map", reuse_map=[2, 1]) == (Step(0, 0), Step(0, 1), Step(1, 0))
    kept, read = {"writes": ("entry",)}, {"reads": ("entry",)}
    assert map_of("reuse_map", reuse_map=[3, 1, 2], injection="add") == (
        Step(0, 0, **kept), Step(0, 1, **read), Step(0, 2, **read),
        Step(1, 0), Step(2, 0, **kept), Step(2, 1, **read),
    )  # fmt: skip
    dense = map_of("reuse_map", reuse_map=[1, 1], injection="add")
    assert dense == map_of("reuse_map", reuse_map=[1, 1])


def test_block_recurrence_reads_the_embedding_at_each_later_loop() -> None:
    steps = map_of("block_recurrence", num_blocks=2, num_loops=3)
    assert [step.writes for step in steps] == [("embedding",), *[()] * 5]
    assert [step.reads for step in steps] == [(), (), ("embedding",), (), ("embedding",), ()]
    for plain in (
        map_of("block_recurrence", num_blocks=2, num_loops=3, injection="none"),
        map_of("block_recurrence", num_blocks=2, num_loops=1),
    ):
        assert not any(step.reads or step.writes for step in plain)


def test_every_loop_of_the_core_reads_the_prelude() -> None:
    steps = map_of("loop", prelude=1, core=2, coda=1, num_loops=2, final_norm_after_core=True)
    assert [step.reads for step in steps] == [(), ("prelude",), (), ("prelude",), (), ()]
    assert [step.writes for step in steps] == [(), ("prelude",), (), (), (), ()]
    assert [step.normalize for step in steps] == [False] * 5 + [True]
    assert [step.loop_index for step in steps] == [0, 0, 0, 1, 1, 0]


def test_depth_replaces_the_number_of_loops_where_a_group_repeats() -> None:
    values: dict[str, object] = {"prelude": 1, "core": 2, "coda": 1}
    assert map_of("loop", 5, **values, num_loops=2) == map_of("loop", **values, num_loops=5)
    assert map_of("block_recurrence", 1, num_blocks=3, num_loops=4) == from_order(range(3))
    assert map_of("dense", 9, num_layers=3) == from_order(range(3))


# ----------------------------------------------------------------------------------- properties

SHARED = ("sequence", "cycle", "cycle_reverse")
sizes = st.integers(1, 12).flatmap(lambda m: st.tuples(st.just(m), st.integers(m, 60)))
small = st.integers(1, 5)
configs = st.one_of(
    st.builds(lambda n: {"kind": "dense", "num_layers": n}, small),
    st.builds(
        lambda kind, size: {"kind": kind, "num_blocks": size[0], "depth": size[1]},
        st.sampled_from(SHARED),
        sizes,
    ),
    st.builds(
        lambda uses: {"kind": "reuse_map", "reuse_map": uses}, st.lists(small, min_size=1)
    ),
    st.builds(
        lambda n, r, i: {
            "kind": "block_recurrence", "num_blocks": n, "num_loops": r, "injection": i
        },
        small,
        small,
        st.sampled_from(["none", "add"]),
    ),
    st.builds(
        lambda p, c, k, r, i: {
            "kind": "loop", "prelude": p, "core": c, "coda": k, "num_loops": r, "injection": i
        },
        st.integers(0, 3),
        small,
        st.integers(0, 3),
        small,
        st.sampled_from(["none", "add", "linear"]),
    ),
)  # fmt: skip


@given(configs)
def test_every_scheme_makes_a_sound_map(values: dict[str, Any]) -> None:
    steps = map_of(**values)
    blocks = {step.block for step in steps}
    assert blocks == set(range(len(blocks)))
    assert len({(step.block, step.loop_index) for step in steps}) == len(steps)
    seen: Counter[int] = Counter()
    written: set[str] = set()
    for step in steps:
        assert step.loop_index == seen[step.block]
        seen[step.block] += 1
        written |= set(step.writes)
        assert set(step.reads) <= written, "read before it was written"
    assert count_uses(steps) == dict(sorted(seen.items()))


@given(sizes)
def test_shared_schemes_use_every_block_and_fill_the_depth(size: tuple[int, int]) -> None:
    num_blocks, depth = size
    for kind in SHARED:
        blocks = shared(kind, num_blocks, depth)
        assert len(blocks) == depth and set(blocks) == set(range(num_blocks))
    assert shared("sequence", num_blocks, depth) == sorted(shared("sequence", num_blocks, depth))


@given(st.integers(1, 40))
def test_as_many_blocks_as_steps_is_dense(count: int) -> None:
    for kind in SHARED:
        assert map_of(kind, num_blocks=count, depth=count) == map_of("dense", num_layers=count)


@given(st.integers(1, 40))
def test_one_block_makes_all_schemes_the_same(depth: int) -> None:
    assert len({map_of(kind, num_blocks=1, depth=depth) for kind in SHARED}) == 1


@given(st.integers(1, 12), st.integers(1, 6))
def test_sequence_equals_its_reuse_map(num_blocks: int, uses: int) -> None:
    sequence = map_of("sequence", num_blocks=num_blocks, depth=num_blocks * uses)
    assert sequence == map_of("reuse_map", reuse_map=[uses] * num_blocks)


@given(st.integers(1, 12), st.integers(1, 6))
def test_cycle_equals_block_recurrence_without_injection(num_blocks: int, loops: int) -> None:
    plain = map_of("block_recurrence", num_blocks=num_blocks, num_loops=loops, injection="none")
    assert plain == map_of("cycle", num_blocks=num_blocks, depth=num_blocks * loops)


@given(st.integers(1, 12))
def test_cycle_reverse_of_twice_the_depth_is_a_palindrome(num_blocks: int) -> None:
    blocks = shared("cycle_reverse", num_blocks, 2 * num_blocks)
    assert blocks == blocks[::-1]


def test_every_kind_of_the_schema_has_a_scheme() -> None:
    assert len(SCHEMES | LOOPED) == len(ADAPTER.json_schema()["discriminator"]["mapping"])


# ------------------------------------------------------------------------------------ inventory


def config(recurrence: dict[str, Any], **model: Any) -> Config:
    shape = {"hidden_size": 128, "num_heads": 4, "ffn_hidden_size": 512, "vocab_size": 1024}
    return validate(
        {
            "run_dir": "r",
            "model": {**shape, **model},
            "recurrence": recurrence,
            "data": {"train": [{"path": "a"}], "tokenizer": "bytes", "seq_length": 1024},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
        },
        "test",
    )


def count(recurrence: dict[str, Any], **model: Any) -> int:
    return sum(spec.size for spec in build_inventory(config(recurrence, **model)).values())


SMALL = {"kind": "reuse_map", "reuse_map": [4, 2, 1, 1]}
LARGE = {"kind": "reuse_map", "reuse_map": [1, 2, 1, 1, 1, 1, 1, 1]}
LARGE_MODEL = {"hidden_size": 768, "num_heads": 8, "ffn_hidden_size": 3072, "vocab_size": 32000}


def test_counts_of_the_paper() -> None:
    """recurrence.md, section 1.2."""
    assert count(SMALL) == 1_180_800
    assert count(SMALL, positions="learned") == 1_311_872
    assert count(LARGE, **LARGE_MODEL) == 100_086_528
    assert count(LARGE, **LARGE_MODEL, positions="learned") == 100_872_960


@pytest.mark.parametrize(
    ("recurrence", "model"),
    [
        (SMALL, {}),
        (SMALL, {"norm": "layer", "feed_forward": "gelu", "attention_bias": "all",
                 "feed_forward_bias": True}),
        (SMALL, {"norm_position": "sandwich", "num_kv_heads": 2, "tie_embeddings": False}),
        ({"kind": "loop", "prelude": 1, "core": 2, "coda": 1, "num_loops": 3}, {}),
    ],
)  # fmt: skip
def test_names_and_owners(recurrence: dict[str, Any], model: dict[str, Any]) -> None:
    inventory = build_inventory(config(recurrence, **model))
    for name, spec in inventory.items():
        assert spec.name == name
        owner = int(name.split(".")[1]) if name.startswith("blocks.") else None
        assert spec.block == owner
    assert {spec.block for spec in inventory.values()} == {None, 0, 1, 2, 3}
    outside = {name for name in inventory if is_embedding(name)}
    assert outside == {"embedding.weight"} | (
        set() if model.get("tie_embeddings", True) else {"head.weight"}
    )


def test_shapes_of_one_block() -> None:
    inventory = build_inventory(config(SMALL, num_kv_heads=2, head_dim=16))
    shapes = {n.removeprefix("blocks.3."): s.shape for n, s in inventory.items() if s.block == 3}
    assert shapes == {
        "attention_norm.weight": (128,),
        "attention.query.weight": (64, 128),
        "attention.key.weight": (32, 128),
        "attention.value.weight": (32, 128),
        "attention.output.weight": (128, 64),
        "feed_forward_norm.weight": (128,),
        "feed_forward.gate.weight": (512, 128),
        "feed_forward.up.weight": (512, 128),
        "feed_forward.down.weight": (128, 512),
    }


def test_the_adapter_lives_with_the_first_block_of_the_core() -> None:
    inventory = build_inventory(
        config({"kind": "loop", "prelude": 1, "core": 2, "coda": 1, "num_loops": 3})
    )
    adapters = [name for name in inventory if "injection" in name]
    assert adapters == ["blocks.1.injection.weight"]
    assert inventory[adapters[0]].shape == (128, 256)


@given(st.lists(st.integers(1, 9), min_size=4, max_size=4))
def test_inventory_does_not_depend_on_the_reuse_map(uses: list[int]) -> None:
    dense = build_inventory(config({"kind": "dense", "num_layers": 4}))
    assert build_inventory(config({"kind": "reuse_map", "reuse_map": uses})) == dense


@given(st.integers(1, 9))
def test_inventory_does_not_depend_on_the_number_of_loops(loops: int) -> None:
    values = {"kind": "loop", "prelude": 1, "core": 2, "coda": 1}
    once = build_inventory(config({**values, "num_loops": 1}))
    assert build_inventory(config({**values, "num_loops": loops})) == once


def test_schemes_of_equal_blocks_have_equal_inventories() -> None:
    inventories = [
        build_inventory(config({"kind": kind, "num_blocks": 3, "depth": 6})) for kind in SHARED
    ]
    assert inventories[0] == inventories[1] == inventories[2]


def test_initial_values_scale_with_the_unrolled_depth_when_asked() -> None:
    inventory = build_inventory(config(SMALL, init_scaling="depth"))
    assert inventory["blocks.0.attention.query.weight"].std == 0.02
    assert inventory["blocks.0.attention.output.weight"].std == pytest.approx(0.02 / 4)
    assert inventory["final_norm.weight"].mean == 1.0


def test_initial_values_of_xavier() -> None:
    gut = {"kind": "universal", "depth": 3, "halting": {"mode": "global"}}
    gated = config(gut, init_scaling="xavier", gate=True, tie_embeddings=False, final_norm=False)
    inventory, plain = build_inventory(gated), build_inventory(config(gut))
    for name, spec in inventory.items():
        if name in ("embedding.weight", "head.weight"):
            assert spec.std == 0.02
        elif len(spec.shape) == 2:
            narrow = name.split(".")[-2] in ("query", "key", "value")
            gain = 2**-0.5 if narrow else 1.0
            assert spec.std == pytest.approx(gain * (2 / (spec.shape[0] + spec.shape[1])) ** 0.5)
        else:
            assert spec.std == 0.0
    assert "final_norm.weight" in plain and "final_norm.weight" not in inventory
