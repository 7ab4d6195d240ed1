"""The baselines of RingFormer (recurrence.md, section 3.5): one layer with encodings of position
and level, and one feed-forward for all layers. The vanilla one is `kind: dense`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.configs import make_config
from support.decoding import VOCAB, compare_with_recomputation
from support.harness import assert_gradients_close, compare
from support.meshes import SEQUENCE, config_of, later, reference, trace
from support.models import build, make_batch, make_model_config, objective, run
from support.models import gradients as gradients_of
from torch import Tensor

from megarecur.config.run import Config
from megarecur.convert import compact
from megarecur.convert.hf import choose_architecture
from megarecur.errors import ConfigError
from megarecur.inference.cache import Cache
from megarecur.model.transformer import Transformer
from megarecur.plan.cost import (
    count_flops,
    count_parameters,
    count_unrolled_parameters,
    estimate_memory,
)
from megarecur.recurrence.inventory import build_inventory
from megarecur.recurrence.layer_map import from_order
from megarecur.recurrence.schemes import layer_map

UNIVERSAL = {"kind": "cycle", "num_blocks": 1, "depth": 3}
ENCODED = {"level_encoding": "sinusoidal", "positions": "none", "norm_position": "post"}
WIDE = {"shared_feed_forward": True, "feed_forward": "gelu", "feed_forward_bias": True}
DENSE = {"kind": "dense", "num_layers": 3}


# ------------------------------------------------------------------------------------- universal


def code(place: int, size: int) -> list[float]:
    """Sines, then cosines, of one place."""
    rates = [10000.0 ** (-i / (size // 2 - 1)) for i in range(size // 2)]
    return [math.sin(place * r) for r in rates] + [math.cos(place * r) for r in rates]


@pytest.mark.parametrize("packed", [False, True])
def test_position_and_level_are_added_before_every_level(packed: bool) -> None:
    """What enters each level is the state before it, plus both codes; also where documents restart
    positions."""
    batch = make_batch()
    if packed:
        positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 2, 3]])
        batch = replace(batch, positions_BS=positions, single_document=False)
    model = build(make_model_config(UNIVERSAL, "fp64", **ENCODED))
    block = model.runner.blocks["0"]
    entered: list[Tensor] = []
    body = block.body
    block.body = lambda x, *rest: (entered.append(x), body(x, *rest))[1]  # type: ignore
    states: list[Tensor] = []
    ctx = model.context(batch, step=0, training=False, states=states)
    x = model.embed(batch.tokens_BS, ctx)
    model.run(layer_map(model.config.recurrence), x, ctx, {})
    for level, (before, after) in enumerate(zip([x, *states], entered, strict=False)):
        for b, s in ((0, 0), (0, 6), (1, 2), (1, 4)):
            place = int(batch.positions_BS[b, s])
            expected = torch.tensor(code(place, 32), dtype=torch.float64)
            expected += torch.tensor(code(level, 32), dtype=torch.float64)
            torch.testing.assert_close(after[b, s] - before[b, s], expected)


def test_the_encoding_has_no_parameters_and_tells_levels_apart() -> None:
    plain = make_model_config(UNIVERSAL, "fp64", positions="none", norm_position="post")
    encoded = make_model_config(UNIVERSAL, "fp64", **ENCODED)
    assert build_inventory(encoded) == build_inventory(plain)
    losses = [run(config, make_batch())[0] for config in (plain, encoded)]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_generation_with_a_cache_encodes_levels_too() -> None:
    config = make_model_config(UNIVERSAL, "fp32", **{**ENCODED, "vocab_size": VOCAB})
    compare_with_recomputation(build(config), Cache())


# -------------------------------------------------------------------------- one wide feed-forward


def untied(model: Transformer) -> Transformer:
    """The twin whose layers have copies of the feed-forward."""
    form = {**model.config.model.model_dump(), "shared_feed_forward": False}
    twin = Transformer(make_model_config(DENSE, "fp64", **form))
    for name, parameter in twin.parameters_by_name.items():
        _, _, rest = name.partition(".feed_forward.")
        ours = f"blocks.0.feed_forward.{rest}" if rest else name
        parameter.data.copy_(model.parameters_by_name[ours].data)
    twin.refresh()
    return twin


@pytest.mark.parametrize("form", [{}, {"norm_position": "post", "norm": "layer"}])
def test_one_feed_forward_is_its_untied_twin(form: dict[str, Any]) -> None:
    """The same output; its gradient is the sum over the layers that use it."""
    batch = make_batch()
    model = build(make_model_config(DENSE, "fp64", **{**WIDE, **form}))
    names = [name for name in model.parameters_by_name if ".feed_forward." in name]
    assert names and all(name.startswith("blocks.0.") for name in names)
    twin = untied(model)
    found = [objective(m, from_order(range(3)), batch) for m in (model, twin)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    for loss, _ in found:
        loss.backward()
    of_twin, expected = gradients_of(twin), {}
    for name in model.parameters_by_name:
        _, _, rest = name.partition("blocks.0.feed_forward.")
        parts = [f"blocks.{b}.feed_forward.{rest}" for b in range(3)] if rest else [name]
        expected[name] = sum((of_twin[part] for part in parts), torch.zeros(()))
    assert_gradients_close(gradients_of(model), expected, 1e-11)


def test_costs_count_one_feed_forward_and_all_its_uses() -> None:
    """Parameters and moments once, FLOPs at each use."""
    wide, plain = (make_model_config(DENSE, "fp32", **{**WIDE, "shared_feed_forward": shared})
                   for shared in (True, False))  # fmt: skip
    steps = layer_map(wide.recurrence)
    feed_forward = 2 * 32 * 48 + 48 + 32
    assert count_parameters(plain).total - count_parameters(wide).total == 2 * feed_forward
    assert count_flops(wide, steps) == count_flops(plain, steps)
    assert count_unrolled_parameters(wide, steps) == count_unrolled_parameters(plain, steps)
    memory, more = estimate_memory(wide, steps), estimate_memory(plain, steps)
    assert more.moments - memory.moments == 2 * 4 * 2 * feed_forward
    assert more.activations == memory.activations


# ------------------------------------------------------------------------------- engines, mistakes

ENGINES = [
    # scheme, tensor, processes, other sections
    ("dense", 2, 2, {**SEQUENCE, "model": WIDE}),
    ("cycle", 2, 2, {**SEQUENCE, "model": ENCODED}),
    later("dense", 1, 2, {"model": WIDE, "parallel": {"zero_stage": 3}}),
    later("dense", 1, 2, {"model": WIDE, "parallel": {"zero_stage": 1}}),
    later("dense", 1, 2, {"model": {**WIDE, **ENCODED}}),
    later("cycle", 1, 2, {"model": ENCODED, "parallel": {"zero_stage": 1}}),
    later("cycle", 1, 2, {"model": ENCODED, "parallel": {"zero_stage": 3}}),
]


@pytest.mark.parametrize(("scheme", "tensor", "processes", "extra"), ENGINES)
def test_ranks_equal_one_process(world, corpus, scheme, tensor, processes, extra) -> None:
    config = config_of(corpus, scheme, tensor, **extra)
    compare(world(processes).run(trace, config, 3)[0], reference(config, 3))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"shared_feed_forward": True}, "parallel": {"pipeline": 2}},
         "model.shared_feed_forward=true with parallel.pipeline=2 would use one feed"),
        ({"model": {"shared_feed_forward": True}, "adapters": {"rank": 2}},
         "adapters.targets: down, gate, up of one feed-forward for all blocks"),
        ({"model": {"level_encoding": "learned"}}, "model.level_encoding"),
    ],
)  # fmt: skip
def test_mistakes_are_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(**sections)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "option", [{"shared_feed_forward": True}, {"level_encoding": "sinusoidal"}]
)
def test_exports_say_what_they_compute(option: dict[str, Any]) -> None:
    """With the modelling file anything goes; no architecture of transformers has these."""
    config: Config = make_config(scheme="dense", model={"vocab_size": 9, **option})
    ((name, value),) = option.items()
    assert compact.config_values(config)["block"][name] == value
    with pytest.raises(ConfigError, match=f"model.{name}="):
        choose_architecture(config, None)
