"""The model against its twins: unrolled, untied, cut, padded, packed, recomputed.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.harness import assert_gradients_close
from support.models import (
    SCHEMES,
    VOCABULARY,
    Batch,
    assert_same,
    build,
    gradients,
    make_batch,
    make_model_config,
    objective,
    run,
)
from torch import Tensor, nn

from megarecur.config.run import Config
from megarecur.model.telemetry import Telemetry, name_measures
from megarecur.model.transformer import Transformer
from megarecur.parallel import linear
from megarecur.parallel.linear import Linear
from megarecur.plan.placement import Placement
from megarecur.recurrence.depth import Depth
from megarecur.recurrence.layer_map import LayerMap, Step
from megarecur.recurrence.schemes import layer_map

FP32_TOL, FP64_TOL = 2e-6, 1e-11

POSITIONS = ("rope", "xpos", "alibi", "learned", "sinusoidal", "none")
NORM_POSITIONS = ("pre", "post", "sandwich")
# What a cell of the covering set varies beside scheme, positions and norm position.
SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"num_kv_heads": 2, "norm": "layer", "attention_bias": "all", "tie_embeddings": False},
    {"feed_forward": "gelu", "feed_forward_bias": True, "attention_bias": "qk"},
    {"head_dim": 6, "rope_interleaved": True, "num_kv_heads": 1, "scale_embeddings": True},
)


def covering_set() -> list[Any]:
    """Every scheme with every position scheme; norm positions and shapes take turns, so that every
    pair of values of any two of the four occurs."""
    pairs = list(itertools.product(SCHEMES, POSITIONS))
    cells = []
    for i, (scheme, positions) in enumerate(pairs):
        row, column = divmod(i, len(POSITIONS))
        norm_position = NORM_POSITIONS[(row + column) % 3]
        if SCHEMES[scheme].get("final_norm_after_core") and norm_position == "post":
            norm_position = "sandwich"  # post-norm has no final norm
        shape = SHAPES[(row // 3 + column + 2 * (row % 3 == 1)) % 4]
        cells.append(pytest.param(scheme, positions, norm_position, shape,
                                  id=f"{scheme}-{positions}-{norm_position}"))  # fmt: skip
    return cells


def test_covering_set_covers() -> None:
    cells = [cell.values for cell in covering_set()]
    values = [(c[0], c[1], c[2], SHAPES.index(c[3])) for c in cells]
    for scheme in SCHEMES:
        norms = {v[2] for v in values if v[0] == scheme}
        assert norms == set(NORM_POSITIONS) - (
            {"post"} if SCHEMES[scheme].get("final_norm_after_core") else set()
        )
        assert {v[3] for v in values if v[0] == scheme} == set(range(len(SHAPES)))
    pairs = {(v[a], v[b]) for v in values for a, b in ((1, 2), (1, 3), (2, 3))}
    for left, right in ((POSITIONS, NORM_POSITIONS), (POSITIONS, range(4)),
                        (NORM_POSITIONS, range(4))):  # fmt: skip
        assert set(itertools.product(left, right)) <= pairs


# ------------------------------------------------------------------- equal maps, unrolled twins


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_reuse_map_of_ones_is_dense(precision: str) -> None:
    ones = make_model_config({"kind": "reuse_map", "reuse_map": [1, 1, 1]}, precision)
    dense = make_model_config({"kind": "dense", "num_layers": 3}, precision)
    assert_same(run(ones, make_batch()), run(dense, make_batch()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sequence_is_its_reuse_map(precision: str) -> None:
    sequence = make_model_config({"kind": "sequence", "num_blocks": 2, "depth": 6}, precision)
    reuse = make_model_config({"kind": "reuse_map", "reuse_map": [3, 3]}, precision)
    assert_same(run(sequence, make_batch()), run(reuse, make_batch()))


@pytest.mark.parametrize("kind", ["sequence", "cycle", "cycle_reverse"])
def test_as_many_blocks_as_steps_is_dense(kind: str) -> None:
    shared = make_model_config({"kind": kind, "num_blocks": 3, "depth": 3}, "fp32")
    dense = make_model_config({"kind": "dense", "num_layers": 3}, "fp32")
    assert_same(run(shared, make_batch()), run(dense, make_batch()))


def test_one_block_makes_all_schemes_one() -> None:
    kinds = ("sequence", "cycle", "cycle_reverse")
    runs = [
        run(make_model_config({"kind": k, "num_blocks": 1, "depth": 4}, "fp32"), make_batch())
        for k in kinds
    ]
    assert_same(runs[1], runs[0])
    assert_same(runs[2], runs[0])


def test_uses_of_an_identity_block_change_nothing() -> None:
    results = []
    for uses in (1, 4):
        config = make_model_config({"kind": "reuse_map", "reuse_map": [1, uses, 1]}, "fp32")
        model = build(config)
        for name in ("attention.output", "feed_forward.down"):
            model.parameters_by_name[f"blocks.1.{name}.weight"].data.zero_()
        results.append(objective(model, layer_map(config.recurrence), make_batch())[1])
    assert torch.equal(results[0], results[1])


def unroll(config: Config, shared: Transformer) -> tuple[Transformer, LayerMap, list[str]]:
    """(twin with a block of its own for every step, its map, the shared name of each twin name)."""
    steps = layer_map(config.recurrence)
    dense = {"kind": "dense", "num_layers": len(steps)}
    twin = Transformer(
        make_model_config(dense, config.train.precision, **config.model.model_dump())
    )
    twin.runner.config = config  # the initial state follows the recurrence
    for i, step in enumerate(steps):
        adapter = shared.runner.blocks[str(step.block)].injection
        if adapter is None or not step.reads:
            continue

        values = {"weight": adapter.weight.parameter, "bias": adapter.bias}

        def make(name: str, values: dict[str, Tensor] = values) -> nn.Parameter:
            value = values[name.rpartition(".")[2]]
            twin.parameters_by_name[name] = nn.Parameter(value.detach().clone())
            return twin.parameters_by_name[name]

        block, bias = twin.runner.blocks[str(i)], adapter.bias is not None
        block.injection = Linear(f"blocks.{i}.injection", make, twin.dtype, bias)
    origins = []
    for name, parameter in twin.parameters_by_name.items():
        origin = name
        if name.startswith("blocks."):
            _, i, rest = name.split(".", 2)
            origin = f"blocks.{steps[int(i)].block}.{rest}"
        parameter.data.copy_(shared.parameters_by_name[origin].data)
        origins.append(origin)
    twin.refresh()
    untied = tuple(replace(step, block=i, loop_index=0) for i, step in enumerate(steps))
    return twin, untied, origins


def summed_twin_gradients(twin: Transformer, origins: list[str]) -> dict[str, Tensor]:
    """The sum over the copies of every shared parameter."""
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    for origin, gradient in zip(origins, gradients(twin).values(), strict=True):
        sums[origin] = sums[origin] + gradient
    return dict(sums)


@pytest.mark.parametrize("scheme, positions, norm_position, shape", covering_set())
def test_shared_gradient_is_the_sum_over_the_unrolled_twin(
    scheme: str, positions: str, norm_position: str, shape: dict[str, Any]
) -> None:
    for precision, tol in (("fp32", FP32_TOL), ("fp64", FP64_TOL)):
        config = make_model_config(
            SCHEMES[scheme], precision, positions=positions, norm_position=norm_position,
            z_loss=0.1, **shape,
        )  # fmt: skip
        shared, batch = build(config), make_batch()
        loss, logits, actual = run(config, batch, model=shared)
        twin, steps, origins = unroll(config, shared)
        twin_loss, twin_logits = objective(twin, steps, batch)
        twin_loss.backward()
        assert torch.equal(loss, twin_loss.detach())
        assert torch.equal(logits, twin_logits)
        assert_gradients_close(actual, summed_twin_gradients(twin, origins), tol)


def test_twin_comparison_catches_a_lost_use() -> None:
    config = make_model_config({"kind": "reuse_map", "reuse_map": [3, 1]}, "fp32")
    shared, batch = build(config), make_batch()
    actual = run(config, batch, model=shared)[2]
    twin, steps, origins = unroll(config, shared)
    objective(twin, steps, batch)[0].backward()
    for name in ("blocks.1.attention.query.weight", "blocks.2.feed_forward_norm.weight"):
        saved = twin.parameters_by_name[name].grad
        assert saved is not None
        twin.parameters_by_name[name].grad = torch.zeros_like(saved)
        with pytest.raises(AssertionError, match=r"blocks\.0"):
            assert_gradients_close(actual, summed_twin_gradients(twin, origins), FP32_TOL)
        twin.parameters_by_name[name].grad = saved
    assert_gradients_close(actual, summed_twin_gradients(twin, origins), FP32_TOL)


@pytest.mark.parametrize(
    "options",
    [
        {"norm_position": "sandwich"},
        {"norm_position": "output", "qk_norm": True, "qk_norm_over": "all", "num_kv_heads": 2}
        | {"rope_scaling": {"kind": "dynamic", "factor": 3.0, "original_positions": 4}},
        {"norm_position": "peri", "feed_forward": "geglu_tanh", "qk_norm": True}
        | {"attention_softcap": 2.0, "logit_softcap": 3.0, "attention_scale": 0.3}
        | {"sliding_window": 3, "attention_types": ["full", "sliding"], "rope_theta_local": 9.0},
        {"norm": "layer", "parallel_residual": True, "rope_fraction": 0.5}
        | {"feed_forward": "gelu_tanh", "feed_forward_bias": True, "attention_bias": "all"},
    ],
)
def test_gradients_by_finite_differences(options: dict[str, Any]) -> None:
    """The model in fp64: the derivative along a random direction of each of its parameters."""
    config = make_model_config(SCHEMES["loop_linear_random"] | {"core": 1}, z_loss=0.1, **options)
    model, batch = build(config), make_batch()
    run(config, batch, model=model)
    steps, epsilon = layer_map(config.recurrence), 1e-5
    for name, parameter in model.parameters_by_name.items():
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        direction = direction.to(parameter.dtype) / direction.norm()
        values = []
        for sign in (1, -1):
            parameter.data += sign * epsilon * direction
            values.append(objective(model, steps, batch)[0].item())
            parameter.data -= sign * epsilon * direction
        assert parameter.grad is not None
        expected = (values[0] - values[1]) / (2 * epsilon)
        actual = (parameter.grad * direction).sum().item()
        assert actual == pytest.approx(expected, rel=1e-6, abs=1e-6), name


# ----------------------------------------------------------- cut, padded, packed, recomputed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("scheme", ["reuse_map", "block_recurrence", "loop_linear_random"])
def test_recompute_is_bit_equal(scheme: str, precision: str) -> None:
    both = [
        run(
            make_model_config(
                SCHEMES[scheme], precision, recompute, dropout=0.3, attention_dropout=0.2
            ),
            make_batch(),
            training=True,
        )
        for recompute in (False, True)
    ]
    assert_same(both[1], both[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recompute_is_bit_equal_when_gradients_are_summed_in_place(precision: str) -> None:
    results = []
    for recompute in (False, True):
        config = make_model_config(SCHEMES["reuse_map"], precision, recompute, dropout=0.3)
        model = build(config)
        for weight in model.weights():
            weight.sum_in_place = True
            weight.parameter.grad = torch.zeros_like(weight.parameter)
        results.append(run(config, make_batch(), training=True, model=model))
    assert_same(results[1], results[0])


def test_dropout_is_on_in_training_only() -> None:
    config = make_model_config(SCHEMES["reuse_map"], "fp32", dropout=0.3, attention_dropout=0.2)
    plain = make_model_config(SCHEMES["reuse_map"], "fp32")
    assert_same(run(config, make_batch()), run(plain, make_batch()))
    assert not torch.equal(run(config, make_batch(), training=True)[0], run(plain, make_batch())[0])


def test_attention_dropout_path_without_dropout_is_attention() -> None:
    """The math path at a vanishing probability equals the fused path."""
    for positions in ("rope", "alibi"):
        config = make_model_config(SCHEMES["reuse_map"], num_kv_heads=2, positions=positions,
                                   attention_dropout=1e-12)  # fmt: skip
        actual, expected = (run(config, make_batch(), training=t) for t in (True, False))
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-11, atol=1e-11)
        assert_gradients_close(actual[2], expected[2], 1e-10)


@pytest.mark.parametrize("precision, tol", [("fp32", FP32_TOL), ("fp64", FP64_TOL)])
@pytest.mark.parametrize("scheme", ["reuse_map", "cycle", "loop_linear_random"])
def test_micro_batch_size_does_not_matter(scheme: str, precision: str, tol: float) -> None:
    config = make_model_config(
        SCHEMES[scheme], precision, dropout=0.3, attention_dropout=0.2, z_loss=0.1
    )
    batch = make_batch(batch=8)
    loss, _, expected = run(config, batch, training=True)
    for size in (1, 2):
        model, total = build(config), torch.zeros(())
        for start in range(0, 8, size):
            part, _ = objective(
                model, layer_map(config.recurrence), batch.rows(start, start + size), True
            )
            part.backward()
            total = total + part.detach()
        torch.testing.assert_close(total, loss, rtol=tol, atol=0, check_dtype=False)
        assert_gradients_close(gradients(model), expected, tol)


@pytest.mark.parametrize("positions", POSITIONS)
def test_padding_does_not_matter(positions: str) -> None:
    config = make_model_config(SCHEMES["loop_linear_random"], positions=positions, dropout=0.3,
                               z_loss=0.1)  # fmt: skip
    batch = make_batch(length=7)
    long = make_batch(length=11, seed=5)
    padded = replace(long, tokens_BS=torch.cat([batch.tokens_BS, long.tokens_BS[:, 7:]], 1))
    padded.labels_BS = torch.full_like(padded.tokens_BS, -100)
    padded.labels_BS[:, :7] = batch.labels_BS
    actual, expected = (run(config, b, training=True) for b in (padded, batch))
    torch.testing.assert_close(actual[0], expected[0], rtol=FP64_TOL, atol=0)
    assert_gradients_close(actual[2], expected[2], FP64_TOL)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("scheme", ["reuse_map", "loop_add_zero", "block_recurrence"])
def test_packing_does_not_matter(scheme: str, positions: str) -> None:
    """Documents of 4, 6 and 1 tokens in one sample equal the documents alone."""
    config = make_model_config(SCHEMES[scheme], positions=positions, num_kv_heads=2, z_loss=0.1)
    packed, lengths = make_batch(batch=2, length=11), (4, 6, 1)
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    positions_S = torch.cat([torch.arange(n) for n in lengths])
    packed = replace(
        packed,
        documents_BS=documents.expand(2, 11),
        positions_BS=positions_S.expand(2, 11),
        single_document=False,
    )
    loss, _, actual = run(config, packed)
    alone, total, start = build(config), torch.zeros(()), 0
    for length in lengths:
        part = slice(start, start + length)
        document = replace(
            packed.rows(0, 2),
            tokens_BS=packed.tokens_BS[:, part],
            labels_BS=packed.labels_BS[:, part],
            positions_BS=packed.positions_BS[:, part],
            documents_BS=packed.documents_BS[:, part],
            single_document=True,
        )
        term, _ = objective(alone, layer_map(config.recurrence), document)
        term.backward()
        total, start = total + term.detach(), start + length
    torch.testing.assert_close(total, loss, rtol=FP64_TOL, atol=0, check_dtype=False)
    assert_gradients_close(actual, gradients(alone), FP64_TOL)


@pytest.mark.parametrize("positions", POSITIONS)
def test_encoders_see_all_of_their_document_and_no_padding(positions: str) -> None:
    """A document of 4 tokens, padded to 7: the last one moves the first one's state, padding none,
    and all is as without padding."""
    config = make_model_config(SCHEMES["cycle"], positions=positions, causal=False)
    whole = make_batch()
    documents = torch.where(torch.arange(7) < 4, 0, -1).expand(2, 7)
    padded = replace(whole, documents_BS=documents, single_document=False)
    short = replace(
        whole,
        **{name: getattr(whole, name)[:, :4] for name in vars(whole) if name.endswith("_BS")},
    )

    def states(batch: Batch) -> Tensor:
        model = build(config)
        ctx = model.context(batch, 0, training=False)
        x = model.embed(batch.tokens_BS, ctx)
        return model.run(layer_map(config.recurrence), x, ctx, {})[0].detach()

    def changed(batch: Batch, position: int) -> Batch:
        tokens = batch.tokens_BS.clone()
        tokens[:, position] = (tokens[:, position] + 1) % VOCABULARY
        return replace(batch, tokens_BS=tokens)

    expected = states(short)
    torch.testing.assert_close(states(padded)[:, :4], expected, rtol=FP64_TOL, atol=1e-12)
    moved = states(changed(padded, 5))[:, :4]
    torch.testing.assert_close(moved, expected, rtol=FP64_TOL, atol=1e-12)
    assert (states(changed(short, 3))[:, 0] - expected[:, 0]).abs().max() > 1e-3


# ----------------------------------------------------------------------------- parts and values


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    config = make_model_config(SCHEMES["custom"], "fp32", tie_embeddings=False)
    whole = Transformer(config).parameters_by_name
    placement = Placement(2, (0, 1, 1), embedding=0, head=1)
    part = Transformer(config, placement=placement, pp_rank=1).parameters_by_name
    assert {name.split(".")[1] for name in part if name.startswith("blocks")} == {"1", "2"}
    assert "head.weight" in part and "embedding.weight" not in part
    for name, parameter in part.items():
        assert torch.equal(parameter, whole[name]), name
    # Another map over the same names, hence another order of building, has the same values.
    reuse = make_model_config(SCHEMES["reuse_map"], "fp32", tie_embeddings=False)
    for name, parameter in Transformer(reuse).parameters_by_name.items():
        assert torch.equal(parameter, whole[name]), name
    other = Transformer(config.model_copy(update={"seed": 2})).parameters_by_name
    same = [n for n, p in other.items() if p.ndim == 2 and torch.equal(p, whole[n])]
    assert not same
    matrices = [p.flatten()[:1000] for p in whole.values() if p.ndim == 2 and p.numel() >= 1000]
    correlation = torch.corrcoef(torch.stack(matrices)) - torch.eye(len(matrices))
    assert correlation.abs().max() < 0.2  # no two names share their values


def test_initial_scale() -> None:
    for scaling, factor in (("none", 1.0), ("depth", (2 * 6) ** -0.5)):
        scales = {"init_scaling": scaling, "init_std": 0.05, "hidden_size": 64}
        config = make_model_config(SCHEMES["reuse_map"], "fp32", **scales)
        for name, parameter in Transformer(config).parameters_by_name.items():
            if parameter.ndim == 1:
                assert torch.equal(parameter, torch.ones_like(parameter))
                continue
            scaled = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
            expected = 0.05 * (factor if scaled else 1.0)
            assert parameter.std().item() == pytest.approx(expected, rel=0.08), name
            assert abs(parameter.mean().item()) < 5 * expected / parameter.numel() ** 0.5, name


def test_parts_run_as_the_whole() -> None:
    config = make_model_config(SCHEMES["cycle"], "fp32")
    batch, steps = make_batch(), layer_map(config.recurrence)
    loss = run(config, batch)[0]
    placement = Placement(2, (0, 1), embedding=0, head=steps[-1].block)
    parts = {b: build(config, placement=placement, pp_rank=b) for b in (0, 1)}
    ctx = parts[0].context(batch, step=3, training=False)
    x = parts[0].embed(batch.tokens_BS, ctx)
    for step in steps:
        x, _ = parts[step.block].run((step,), x, ctx, {})
    terms = parts[steps[-1].block].loss(x, batch)
    assert torch.equal(terms["loss"].total.detach(), loss)


def test_number_of_parameters_does_not_depend_on_uses() -> None:
    counts = {
        sum(p.numel() for p in Transformer(make_model_config(recurrence)).parameters())
        for recurrence in (
            {"kind": "dense", "num_layers": 2},
            {"kind": "reuse_map", "reuse_map": [5, 1]},
            {"kind": "cycle_reverse", "num_blocks": 2, "depth": 7},
        )
    }
    assert len(counts) == 1


@pytest.mark.parametrize("scheme", ["reuse_map", "loop_linear_random"])
def test_every_tensor_is_fp64_under_fp64(scheme: str) -> None:
    """No step passes through a narrower dtype: the graph holds fp64 only."""
    config = make_model_config(SCHEMES[scheme], "fp64", dropout=0.2, z_loss=0.1, norm="layer")
    states: list[Tensor] = []
    model, batch = build(config), make_batch()
    ctx = model.context(batch, step=0, training=True, states=states)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x, _ = model.run(layer_map(config.recurrence), model.embed(batch.tokens_BS, ctx), ctx, {})
        loss = model.loss(x, batch)["loss"].total
    assert loss.dtype == torch.float64
    assert all(s.dtype == torch.float64 for s in states)
    floating = {t.dtype for t in saved if t.is_floating_point()}
    assert floating == {torch.float64}


def test_bf16_activations_and_wide_loss() -> None:
    config = make_model_config(SCHEMES["reuse_map"], "bf16", z_loss=0.1)
    model, batch, states = build(config), make_batch(), []
    ctx = model.context(batch, step=0, training=False, states=states)
    x, _ = model.run(layer_map(config.recurrence), model.embed(batch.tokens_BS, ctx), ctx, {})
    terms = model.loss(x, batch)
    assert {s.dtype for s in states} == {torch.bfloat16}
    assert {t.total.dtype for t in terms.values()} == {torch.float32}
    sum(t.total for t in terms.values()).backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("has_bf16", [False, True])
@pytest.mark.parametrize("positions", ["rope", "alibi"])
@pytest.mark.parametrize("attention_dropout", [0.0, 0.2])
def test_bf16_is_near_fp32(
    attention_dropout: float, positions: str, has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss within bf16's resolution, gradients within a few of them; two documents packed."""
    monkeypatch.setattr(linear, "has_bf16_products", lambda device: has_bf16)
    batch = make_batch(length=7)
    batch.documents_BS = (torch.arange(7) >= 4).long().expand(2, 7)
    batch.single_document = False
    loss, gradient = {}, {}
    for precision in ("bf16", "fp32"):
        config = make_model_config(
            SCHEMES["reuse_map"], precision, positions=positions, num_kv_heads=2, init_std=0.08,
            attention_dropout=attention_dropout,
        )  # fmt: skip
        loss[precision], _, gradient[precision] = run(config, batch, training=True)
    assert loss["bf16"].item() == pytest.approx(loss["fp32"].item(), rel=1e-2)
    for name, expected in gradient["fp32"].items():
        assert (gradient["bf16"][name] - expected).norm() <= 0.05 * expected.norm(), name


# --------------------------------------------------------------------------- loops and states


def states_of(config: Config, batch: Batch, steps: LayerMap | None = None) -> list[Tensor]:
    """The output of every step of the map."""
    states: list[Tensor] = []
    model = build(config)
    ctx = model.context(batch, step=3, training=False, states=states)
    model.run(steps or layer_map(config.recurrence), model.embed(batch.tokens_BS, ctx), ctx, {})
    return states


def test_injection() -> None:
    """Each loop of the core starts from s, s + e or W [s, e]."""
    batch = make_batch()
    for injection in ("none", "add", "linear"):
        recurrence = {"kind": "loop", "prelude": 1, "core": 1, "coda": 0, "num_loops": 2,
                      "injection": injection, "initial_state": "prelude"}  # fmt: skip
        config = make_model_config(recurrence)
        model, states = build(config), states_of(config, batch)
        e, s = states[0], states[1]
        entering = {
            "none": lambda s, e: s,
            "add": lambda s, e: s + e,
            "linear": lambda s, e: (
                torch.cat([s, e], -1) @ model.parameters_by_name["blocks.1.injection.weight"].T  # noqa: B023
            ),
        }[injection]
        ctx = model.context(batch, step=3, training=False)
        for state, before in ((states[1], e), (states[2], s)):
            expected, _ = model.run((Step(1, 0),), entering(before, e), ctx, {})
            torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)


def test_entry_state_is_added_to_later_repetitions() -> None:
    """Nguyen & Lin's switch: x + the state on leaving the block before, from the second use on."""
    batch = make_batch()
    config = make_model_config(SCHEMES["reuse_map_add"], "fp64")
    model, states = build(config), states_of(config, batch)
    ctx = model.context(batch, step=3, training=False)
    x, order = model.embed(batch.tokens_BS, ctx), iter(states)
    for block, uses in enumerate((3, 1, 2)):
        entry = x
        for use in range(uses):
            x, _ = model.run((Step(block, use),), x + entry if use else x, ctx, {})
            torch.testing.assert_close(next(order), x, rtol=0, atol=0)


def test_initial_states() -> None:
    batch = make_batch(batch=64, length=16)
    firsts = {}
    for initial in ("zero", "random", "prelude"):
        recurrence = {"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": 1,
                      "injection": "add", "initial_state": initial}  # fmt: skip
        config = make_model_config(recurrence)
        model = Transformer(config)
        ctx = model.context(batch, step=3, training=False)
        x = model.embed(batch.tokens_BS, ctx)
        firsts[initial] = model.runner.initial_state(x, ctx)
        if initial == "prelude":
            assert torch.equal(firsts[initial], x)
    assert not firsts["zero"].any()
    noise = firsts["random"]
    assert noise.std().item() == pytest.approx(0.4**0.5 * 0.98658, rel=0.02)
    assert noise.abs().max().item() <= 3 * 0.4**0.5
    # A sample's state is its own, whatever surrounds it; and each sample's differs.
    ctx = model.context(batch.rows(5, 6), step=3, training=False)
    config = make_model_config(recurrence | {"initial_state": "random"})
    alone = Transformer(config).runner.initial_state(x[5:6], ctx)
    assert torch.equal(alone[0], noise[5])
    assert not torch.equal(noise[4], noise[5])


def test_forward_only_steps_get_no_gradient() -> None:
    """Truncated backward equals a run that starts from the detached state."""
    config = make_model_config(SCHEMES["loop_linear_random"] | {"num_loops": 3}, "fp64")
    batch, steps = make_batch(), layer_map(config.recurrence)
    cut = 1 + 2 * 2  # the last loop alone is differentiated
    truncated = layer_map(config.recurrence, Depth(3, 1))
    assert [step.grad for step in truncated] == [not 1 <= i < cut for i in range(len(steps))]
    model = build(config)
    loss, _ = objective(model, truncated, batch)
    loss.backward()
    twin = build(config)
    ctx = twin.context(batch, step=3, training=False)
    reads: dict[str, Tensor] = {}
    x, _ = twin.run(steps[:1], twin.embed(batch.tokens_BS, ctx), ctx, reads)
    x, _ = twin.run(steps[1:cut], x, ctx, reads)
    x, _ = twin.run(steps[cut:], x.detach(), ctx, reads)
    expected = twin.loss(x, batch)["loss"].total
    expected.backward()
    assert torch.equal(loss.detach(), expected.detach())
    assert_gradients_close(gradients(model), gradients(twin), FP64_TOL)
    full = run(config, batch)[2]
    with pytest.raises(AssertionError):
        assert_gradients_close(gradients(model), full, FP64_TOL)


def test_z_loss_is_the_mean_square_of_logsumexp() -> None:
    config = make_model_config(SCHEMES["dense"], z_loss=0.25)
    model, batch = build(config), make_batch()
    ctx = model.context(batch, step=0, training=False)
    x, _ = model.run(layer_map(config.recurrence), model.embed(batch.tokens_BS, ctx), ctx, {})
    counted = batch.labels_BS != -100
    expected = model.logits(x)[counted].logsumexp(-1).square().sum()
    term = model.loss(x, batch)["z_loss"]
    torch.testing.assert_close(term.total, expected, rtol=1e-12, atol=0)
    assert (term.weight, term.denominator) == (0.25, "tokens")
    assert "z_loss" not in build(make_model_config(SCHEMES["dense"])).loss(x, batch)


def test_telemetry_measures_every_step_of_the_map() -> None:
    """Each measure by its definition."""
    config = make_model_config(SCHEMES["reuse_map"], "fp64")
    model, batch, telemetry = build(config), make_batch(), Telemetry()
    states: list[Tensor] = []
    steps = layer_map(config.recurrence)
    ctx = model.context(batch, 0, False, telemetry=telemetry, states=states)
    x = model.embed(batch.tokens_BS, ctx)
    out, _ = model.run(steps, x, ctx, {})
    total = model.loss(out, batch)["loss"].total
    gradients = torch.autograd.grad(total, states)
    keys = [(s.block, s.loop_index) for s in steps]
    assert list(telemetry.sums) == keys
    last: dict[int, Tensor] = {}
    for step, before, after, gradient, sums in zip(
        steps, [x, *states], states, gradients, telemetry.sums.values(), strict=False
    ):
        before_N, after_N = before.norm(dim=-1), after.norm(dim=-1)
        since_N = (after - last.get(step.block, after)).norm(dim=-1)
        expected = [
            after.shape[-1] ** -0.5 * after_N.sum(),
            ((after - before).norm(dim=-1) / before_N).sum(),
            (after_N / before_N).sum(),
            (since_N / after_N).sum(),
            gradient.square().sum(),
        ]
        torch.testing.assert_close(sums, torch.stack(expected))
        last[step.block] = after
    found = [sums.tolist() for sums in telemetry.sums.values()]
    values = name_measures(keys, found, [10] * len(keys))
    shares = [values[f"recurrence/gradient_share/00.{i:02d}"] for i in range(3)]
    assert sum(shares) == pytest.approx(1.0) and min(shares) > 0
    assert "recurrence/fixed_point_distance/00.00" not in values
    assert values["recurrence/fixed_point_distance/00.01"] > 0
