"""Adapters of loops: a model with them is the model whose matrices they were added to."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from support.configs import make_config
from support.decoding import VOCAB, compare_with_recomputation
from support.harness import Trace, assert_gradients_close, compare
from support.meshes import config_of, later, reference, trace
from support.models import (
    assert_same,
    build,
    gradients,
    make_batch,
    make_model_config,
    objective,
    run,
)
from torch import Tensor

from megarecur.checkpoint.checkpoint import read_names
from megarecur.checkpoint.load import load_model
from megarecur.config.run import Config
from megarecur.convert.folding import LINEARS as MATRICES
from megarecur.errors import ConfigError
from megarecur.inference.cache import Cache
from megarecur.launch.check import describe_ranks
from megarecur.model.compile import CompiledModel
from megarecur.model.transformer import Transformer
from megarecur.parallel import linear, random, regions
from megarecur.plan.cost import count_flops, count_parameters
from megarecur.recurrence.depth import refuse_depth
from megarecur.recurrence.inventory import ParameterSpec, build_inventory
from megarecur.recurrence.layer_map import LayerMap
from megarecur.recurrence.schemes import layer_map
from megarecur.train.trainer import FINISHED, train
from megarecur.train.verify import certified

CYCLE = {"kind": "cycle", "num_blocks": 2, "depth": 6}
LOOP = {"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": 3}


def adapted(
    recurrence: dict[str, Any],
    precision: str = "fp64",
    adapters: dict[str, Any] | None = None,
    recompute: bool = False,
    **model: Any,
) -> Config:
    """A tiny config of test_model with adapters."""
    config = make_model_config(recurrence, precision, recompute, num_kv_heads=2, **model)
    section = {"rank": 3, "scale": 1.5, **(adapters or {})}
    return Config.model_validate({**config.model_dump(), "adapters": section})


def noisy(spec: ParameterSpec, *args: Any) -> Tensor:
    """Initial values whose B is not zero, for what is multiplied by it to matter."""
    if spec.name.endswith(("lora_b", "lora_bias")):
        spec = replace(spec, std=0.05)
    return random.initial_values(spec, *args)


def build_noisy(config: Config) -> Transformer:
    with mock.patch("megarecur.model.parts.initial_values", noisy):
        return build(config)


# ------------------------------------------------------------------------------------- the model


def fold(model: Transformer) -> tuple[Transformer, LayerMap]:
    """The twin that has a block for every step of the map, adapters added to its matrices."""
    config, steps = model.config, layer_map(model.config.recurrence)
    scale = config.adapters.scale
    dense = {"kind": "dense", "num_layers": len(steps)}
    twin = Transformer(
        make_model_config(dense, config.train.precision, **config.model.model_dump())
    )
    ours = model.parameters_by_name
    for name, parameter in twin.parameters_by_name.items():
        block, loop, rest = "", 0, name
        if name.startswith("blocks."):
            _, i, rest = name.split(".", 2)
            block, loop = f"blocks.{steps[int(i)].block}.", steps[int(i)].loop_index
        own = f"{block}loops.{loop}."
        parameter.data.copy_(ours[own + rest if own + rest in ours else block + rest].data)
        target = next((t for t, m in MATRICES.items() if rest == m + ".weight"), "")
        if own + target + ".lora_a" in ours:
            a, b = (ours[f"{own}{target}.lora_{factor}"].data for factor in "ab")
            parameter.data += scale * b @ a
        biased = next((t for t, m in MATRICES.items() if rest == m + ".bias"), "")
        if own + biased + ".lora_bias" in ours:
            parameter.data += ours[own + biased + ".lora_bias"].data
    twin.refresh()
    return twin, tuple(replace(s, block=i, loop_index=0) for i, s in enumerate(steps))


def expected_gradients(model: Transformer, twin: Transformer) -> dict[str, Tensor]:
    """By the chain rule from those of the twin: dW = sum dW_i, dA = s B^T dW_i, dB = s dW_i A^T."""
    steps, scale = layer_map(model.config.recurrence), model.config.adapters.scale
    of_twin, ours = gradients(twin), model.parameters_by_name
    found = {}
    for name in ours:
        if not name.startswith("blocks."):
            found[name] = of_twin[name]
            continue
        _, block, rest = name.split(".", 2)
        uses = [i for i, step in enumerate(steps) if step.block == int(block)]
        if rest.startswith("loops."):
            _, loop, rest = rest.split(".", 2)
            uses = [i for i in uses if steps[i].loop_index == int(loop)]
        target, _, factor = rest.partition(".lora_")
        kind = "bias" if factor == "bias" else "weight"
        matrix = f"{MATRICES[target]}.{kind}" if factor else rest
        total = sum((of_twin[f"blocks.{i}.{matrix}"] for i in uses), torch.zeros(()))
        if factor in ("a", "b"):
            other = ours[f"{name[:-1]}{'b' if factor == 'a' else 'a'}"].data
            total = scale * (other.T @ total if factor == "a" else total @ other.T)
        found[name] = total
    return found


VARIANTS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (CYCLE, {}, {}),
    (CYCLE, {"norms": True, "biases": True},
     {"norm_position": "sandwich", "attention_bias": "all"}),
    ({"kind": "reuse_map", "reuse_map": [3, 1, 2]}, {"targets": ["query", "down"]},
     {"norm": "layer", "norm_position": "post"}),
    ({"kind": "custom", "order": [0, 1, 1, 0, 2]}, {"norms": True, "biases": True, "scale": 1.0},
     {"feed_forward": "gelu", "feed_forward_bias": True, "tie_embeddings": False}),
]  # fmt: skip


@pytest.mark.parametrize(("recurrence", "adapters", "model"), VARIANTS)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_with_adapters_is_its_folded_twin(recurrence, adapters, model, recompute) -> None:
    """So that the adapter of a loop has a gradient from that loop alone."""
    config = adapted(recurrence, "fp64", adapters, recompute, **model)
    ours, batch = build_noisy(config), make_batch()
    loss, logits, actual = run(config, batch, True, ours)
    twin, steps = fold(ours)
    twin_loss, twin_logits = objective(twin, steps, batch)
    twin_loss.backward()
    torch.testing.assert_close(loss, twin_loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(logits, twin_logits, rtol=1e-11, atol=1e-11)
    expected = expected_gradients(ours, twin)
    assert_gradients_close(actual, expected, 1e-11)
    expected["blocks.0.loops.0.query.lora_a"] = expected["blocks.0.loops.1.query.lora_a"]
    with pytest.raises(AssertionError, match=r"loops\.0"):
        assert_gradients_close(actual, expected, 1e-11)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_of_zero_change_nothing(precision) -> None:
    config = adapted(CYCLE, precision)
    with_adapters = run(config, make_batch())
    without = run(config.model_copy(update={"adapters": None}), make_batch())
    shared = {name: with_adapters[2][name] for name in without[2]}
    assert_same((*with_adapters[:2], shared), without)


def test_an_adapter_is_as_exact_in_bf16_after_many_uses() -> None:
    """The fp32 sum of a factor's gradient: 64 uses are at most twice as far off as one."""
    errors = []
    for uses in (1, 64):
        weights = [
            linear.Weight(torch.nn.Parameter(torch.randn(shape) / 8), torch.bfloat16)
            for shape in ((48, 32), (4, 32), (48, 4))
        ]
        exact = [w.parameter.detach().double().requires_grad_() for w in weights]
        for _ in range(uses):
            x, dy = (torch.randn(16, n).bfloat16() for n in (32, 48))
            (u,) = linear.multiply(x, weights[1:2], [None])
            (y,) = linear.multiply(x, weights[:1], [None], [(u, weights[2])])
            y.backward(dy)
            w, a, b = exact
            (x.double() @ w.T + x.double() @ a.T @ b.T).backward(dy.double())
        pairs = list(zip(weights, exact, strict=True))[1:]
        errors.append([float((w.parameter.grad - e.grad).norm() / e.grad.norm()) for w, e in pairs])
    assert all(many <= 2 * one for one, many in zip(*errors, strict=True)), errors


def test_compiled_blocks_with_adapters_share_one_graph() -> None:
    def eager(graph: Any, inputs: Any) -> Any:
        return graph

    found = []
    for compiled in (False, True):
        config = adapted(CYCLE, "fp64")
        model = build_noisy(config)
        parts = CompiledModel(model, eager) if compiled else None
        found.append(run(config, make_batch(), True, model))
    assert parts is not None and parts.graphs == 1
    assert_gradients_close(found[1][2], found[0][2], 1e-11)


@pytest.mark.parametrize("recurrence", [CYCLE, LOOP])
def test_cached_keys_and_values_are_those_of_adapters(recurrence) -> None:
    compare_with_recomputation(build_noisy(adapted(recurrence, "fp32", vocab_size=VOCAB)), Cache())


# ------------------------------------------------------------------------------------ inventory


def test_ranks_are_capped_matrix_by_matrix() -> None:
    """[r, in] and [out, r] of each; keys and values are narrow here."""
    config = adapted(CYCLE, adapters={"rank": 24})  # hidden 32, keys 16, feed-forward 48
    inventory = build_inventory(config)
    assert inventory["blocks.1.loops.2.query.lora_a"].shape == (24, 32)
    assert inventory["blocks.1.loops.2.query.lora_b"].shape == (32, 24)
    assert inventory["blocks.1.loops.2.key.lora_a"].shape == (16, 32)
    assert inventory["blocks.1.loops.2.down.lora_a"].shape == (24, 48)
    assert {spec.block for name, spec in inventory.items() if ".loops." in name} == {0, 1}
    assert "blocks.1.loops.3.query.lora_a" not in inventory
    pairs = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    extra = 6 * sum(min(24, *sides) * sum(sides) for sides in pairs)
    plain = config.model_copy(update={"adapters": None})
    assert count_parameters(config).total - count_parameters(plain).total == extra
    steps = layer_map(config.recurrence)
    assert count_flops(config, steps).forward - count_flops(plain, steps).forward == 2 * extra


def test_every_loop_that_may_run_has_adapters(corpus) -> None:
    sampled = {**LOOP, "num_loops": {"sampler": "uniform", "min": 1, "max": 4}}
    names = build_inventory(adapted(sampled))
    loops = {name.split(".")[3] for name in names if name.startswith("blocks.1.loops.")}
    assert loops == {"0", "1", "2", "3"}
    assert {name.split(".")[3] for name in names if name.startswith("blocks.2.loops.")} == {"0"}


# --------------------------------------------------------------------------------------- engines


def noisy_trace(config: Config, num_steps: int, fault: str = "") -> Trace:
    """As `trace`; the fault: what a factor A makes of x does not enter the ranks' products."""
    whole = linear.add_deltas
    with contextlib.ExitStack() as patches:
        enter = patches.enter_context
        enter(mock.patch("megarecur.model.parts.initial_values", noisy))
        if fault:
            alone = lambda deltas, x, tp: whole(deltas, x, regions.ALONE)  # noqa: E731
            enter(mock.patch.object(linear, "add_deltas", alone))
        return trace(config, num_steps)


def noisy_reference(config: Config, num_steps: int) -> Trace:
    with mock.patch("megarecur.model.parts.initial_values", noisy):
        return reference(config, num_steps)


SAMPLED = {**LOOP, "num_loops": {"sampler": "uniform", "min": 1, "max": 3}}
BIASED = {"model": {"attention_bias": "all", "feed_forward_bias": True}}
ENGINES = [
    # processes, parallel, recurrence, other sections
    (2, {"tensor": 2}, CYCLE, BIASED),
    (2, {"tensor": 2, "sequence_parallel": True}, CYCLE, {"model": {"num_kv_heads": 1}}),
    (2, {"pipeline": 2}, CYCLE, {"train": {"micro_batch_size": 1}}),
    (2, {"zero_stage": 1}, SAMPLED, {}),
    (2, {"zero_stage": 2}, SAMPLED, {"train": {"recompute": True}}),
    (2, {"zero_stage": 3}, SAMPLED, BIASED),
    later(4, {"tensor": 2, "pipeline": 2}, CYCLE, {"train": {"precision": "fp64"}}),
    later(4, {"tensor": 2, "zero_stage": 2, "sequence_parallel": True}, SAMPLED, {}),
    later(
        4,
        {"tensor": 4, "sequence_parallel": True},
        CYCLE,
        {"train": {"precision": "fp64"}, **BIASED},
    ),
    later(4, {"tensor": 2, "zero_stage": 3}, SAMPLED, {}),
    later(4, {"pipeline": 2, "zero_stage": 1}, CYCLE, {"train": {"recompute": True}}),
]


@pytest.mark.parametrize(("processes", "parallel", "recurrence", "extra"), ENGINES)
def test_ranks_equal_one_process(world, corpus, processes, parallel, recurrence, extra) -> None:
    config = config_of(
        corpus, "dense", 1, recurrence=recurrence, parallel=parallel,
        adapters={"rank": 4, "norms": True, "biases": True}, **extra,
    )  # fmt: skip
    tolerances = (1e-11, 1e-11) if config.train.precision == "fp64" else (2e-6, 2e-5)
    traces = world(processes).run(noisy_trace, config, 5)
    compare(traces[0], noisy_reference(config, 5), *tolerances)
    gradients = traces[0][0][1]
    assert any(g.norm() > 0 for name, g in gradients.items() if name.endswith("lora_a"))


def test_a_factor_that_does_not_enter_is_caught(world, corpus) -> None:
    config = config_of(corpus, "cycle", 2, adapters={"rank": 4})
    with pytest.raises(AssertionError, match="lora_a"):
        compare(world(2).run(noisy_trace, config, 1, "x")[0], noisy_reference(config, 1))


# --------------------------------------------------------------------------------- runs, mistakes


def test_a_run_with_adapters_resumes_generates_and_goes_on_elsewhere(corpus, tmp_path) -> None:
    """Checkpoints hold every factor once, under its name."""
    sections = {"recurrence": SAMPLED, "adapters": {"rank": 4, "norms": True}}
    runs = {}
    for name, stops in (("whole", (6,)), ("halves", (3, 6))):
        for steps in stops:
            config = make_config(
                corpus, run_dir=str(tmp_path / name), train={"steps": steps}, **sections
            )
            assert train(config) == FINISHED
        runs[name], _ = load_model(tmp_path / name)
    for name, parameter in runs["whole"].parameters_by_name.items():
        assert torch.equal(parameter, runs["halves"].parameters_by_name[name]), name
    saved = read_names(tmp_path / "whole" / "checkpoints" / "step-00000006")
    assert set(build_inventory(runs["whole"].config)) <= set(saved)
    moved = runs["whole"].parameters_by_name["blocks.1.loops.2.query.lora_b"]
    assert moved.norm() > 0


def test_the_parity_certificate_has_room_for_small_ranks(corpus) -> None:
    config = make_config(corpus, "cycle", adapters={"rank": 32})
    assert certified(config, small=True, dp=1).adapters.rank == 8


def test_a_rank_is_clipped_to_the_full_rank_of_each_matrix() -> None:
    """And `check` says so, where any matrix has less."""
    config = make_config(adapters={"rank": 65}, model={"vocab_size": 256})
    shapes = {n.split(".")[-2]: s.shape[0] for n, s in build_inventory(config).items()
              if n.endswith("lora_a")}  # fmt: skip
    assert shapes == {"query": 32, "key": 16, "value": 16, "output": 32,
                      "gate": 32, "up": 32, "down": 32}  # fmt: skip
    (line,) = describe_ranks(config)
    assert line.plain.endswith(
        "rank 65 is clipped to the full rank of smaller matrices: "
        "key, value: 16; query, output, gate, up, down: 32"
    )
    targets = {"adapters": {"rank": 20, "targets": ["query"]}, "model": {"vocab_size": 256}}
    assert describe_ranks(make_config(**targets)) == []


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"adapters": {"rank": 4, "targets": ["query", "query"]}}, "names a layer twice"),
        ({"adapters": {"rank": 4, "targets": ["gate"]}, "model": {"feed_forward": "gelu"}},
         "model.feed_forward=gelu has no gate"),
        ({"adapters": {"rank": 4}, "recurrence": {**LOOP, "num_loops": {
            "sampler": "poisson", "mean": 4}}}, "give its sampler a max"),
        ({"adapters": {"rank": 4}, "recurrence": LOOP, "train": {"eval_depths": [2, 4]}},
         "train.eval_depths=[4]: adapters are there for 3 loops"),
        ({"adapters": {"rank": 4, "targets": ["queries"]}}, "adapters.targets.0"),
    ],
)  # fmt: skip
def test_mistakes_are_refused(sections, said) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(**sections)
    assert said in str(caught.value)


def test_loops_without_adapters_cannot_be_asked_for() -> None:
    config = adapted(LOOP)
    assert refuse_depth(config, 3) == ""
    assert "adapters exist for 3 loops" in refuse_depth(config, 4)
