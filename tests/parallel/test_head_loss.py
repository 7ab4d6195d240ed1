"""The loss whose logits exist by chunks of tokens against the loss of whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.harness import compare
from support.meshes import config_of, reference, trace
from support.models import VOCABULARY, LiveStorages, gradients, make_batch, make_model_config
from support.models import build as build_model
from torch import Tensor

from megarecur.config.run import Config
from megarecur.model.transformer import Transformer
from megarecur.objective.exits import target_of
from megarecur.parallel.linear import DeferredProducts
from megarecur.plan import cost
from megarecur.recurrence.schemes import layer_map

SAMPLES, LENGTH = 3, 7
TOKENS = SAMPLES * LENGTH
CHUNK = 5
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("fp64", {}, {}),
    ("fp64", {"z_loss": 0.1, "logit_softcap": 3.0, "tie_embeddings": False}, {}),
    ("fp64", {"z_loss": 0.1}, {"exits": {"coefficient": 0.3}}),
    ("fp64", {"logit_softcap": 3.0}, {"exits": {"coefficient": 0.3, "distill": True}}),
    ("fp64", {}, {"distill": {"teacher": "none", "weight": 0.4, "temperature": 2.0}}),
    ("fp32", {"z_loss": 0.1}, {"exits": {"coefficient": 0.3, "distill": True}}),
    ("fp64", {"z_loss": 0.1, "logit_softcap": 3.0}, {"objective": {"label_smoothing": 0.2}}),
    ("bf16", {"z_loss": 0.1}, {}),
    ("fp64", {"head_bias": True, "logit_softcap": 3.0}, {"exits": {"distill": True}}),
    ("bf16", {"head_bias": True}, {}),
]
TOLERANCE = {"fp64": 1e-12, "fp32": 2e-6, "bf16": 6e-3}


def make_config(precision: str, model: dict[str, Any], sections: dict[str, Any]) -> Config:
    recurrence = {"kind": "cycle", "num_blocks": 1, "depth": 3}
    config = make_model_config(recurrence, precision, **model)
    values = {**config.model_dump(), **sections}
    if sections:
        values["adapters"] = None
    return Config.model_validate(values)


def losses(
    config: Config, in_place: bool, postponed: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """(terms by name, gradients, losses of tokens) of one micro batch."""
    model = build_model(config)
    model.deferred = DeferredProducts()
    for weight in model.weights():
        weight.sum_in_place, weight.deferred = in_place, model.deferred
        if in_place:
            weight.parameter.grad = torch.zeros_like(weight.parameter)
    batch = make_batch(SAMPLES, LENGTH)
    ctx, reads = model.context(batch, step=3, training=True), {}
    x, _ = model.run(layer_map(config.recurrence), model.embed(batch.tokens_BS, ctx), ctx, reads)
    exits = {name: state for name, state in reads.items() if name.startswith("exit_")}
    target = None
    if config.distill is not None:
        generator = torch.Generator().manual_seed(9)
        noise = torch.randn(TOKENS, VOCABULARY, generator=generator)
        target = target_of(3.0 * noise.to(x.dtype))
    terms = model.loss(x, batch, exits, target)
    total = torch.stack([term.weight * term.total for term in terms.values()]).sum()
    if postponed:
        with model.deferred.collect() as products:
            total.backward()
        assert len(products) > 0
        for product in products:
            product()
    else:
        total.backward()
    per_token = terms["loss"].per_token
    assert per_token is not None
    return {n: t.total.detach() for n, t in terms.items()}, gradients(model), per_token


def make_chunks(monkeypatch: pytest.MonkeyPatch, length: int = CHUNK) -> None:
    monkeypatch.setattr(cost, "MOST_LOGITS", length * VOCABULARY)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("precision", "model", "sections"), CASES)
def test_chunks_equal_whole_logits(
    monkeypatch: pytest.MonkeyPatch, precision: str, model: Any, sections: Any, in_place: bool
) -> None:
    config = make_config(precision, model, sections)
    expected = losses(config, in_place)
    make_chunks(monkeypatch)
    assert cost.chunk_tokens(TOKENS, VOCABULARY) == CHUNK  # and a last one of 1
    found = losses(config, in_place)
    tolerance = TOLERANCE[precision]
    assert found[0].keys() == expected[0].keys()
    for name, total in expected[0].items():
        torch.testing.assert_close(found[0][name], total, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[2], expected[2], rtol=tolerance, atol=tolerance)
    whole = torch.stack([g.double().norm() for g in expected[1].values()]).norm()
    for name, gradient in expected[1].items():
        error = (found[1][name] - gradient).norm() / max(gradient.norm(), 1e-3 * whole)
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("chunked", [False, True])
def test_smoothed_loss_of_a_model_is_that_of_torch(
    monkeypatch: pytest.MonkeyPatch, chunked: bool
) -> None:
    config = make_config("fp64", {}, {"objective": {"label_smoothing": 0.2}})
    model, batch = build_model(config), make_batch(SAMPLES, LENGTH)
    ctx = model.context(batch, step=3, training=True)
    steps = layer_map(config.recurrence)
    x, _ = model.run(steps, model.embed(batch.tokens_BS, ctx), ctx, {})
    labels = batch.labels_BS.flatten()
    expected = [
        F.cross_entropy(model.logits(x).flatten(0, 1), labels, reduction="sum", label_smoothing=e)
        for e in (0.0, 0.2)
    ]
    expected_x = torch.autograd.grad(expected[1], x, retain_graph=True)[0]
    if chunked:
        make_chunks(monkeypatch)
    terms = model.loss(x, batch)
    assert {name: term.weight for name, term in terms.items()} == {"loss": 0, "smoothed_loss": 1}
    found = terms["loss"].total, terms["smoothed_loss"].total
    torch.testing.assert_close(found, tuple(expected), rtol=1e-12, atol=0)
    x_gradient = torch.autograd.grad(terms["smoothed_loss"].total, x)[0]
    torch.testing.assert_close(x_gradient, expected_x, rtol=1e-11, atol=1e-14)


def test_one_chunk_is_the_whole_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("fp32", {"z_loss": 0.1}, {})
    expected = losses(config, True)
    make_chunks(monkeypatch, TOKENS)
    found = losses(config, True)
    for kind in (0, 1):
        for name, tensor in expected[kind].items():
            assert torch.equal(found[kind][name], tensor), name


def test_products_of_chunks_are_not_postponed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("fp64", {}, {})
    expected = losses(config, True)
    make_chunks(monkeypatch)
    found = losses(config, True, postponed=True)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-11, atol=1e-12)


class Largest(LiveStorages):
    """Records the elements of the largest tensor of logits: with 512 columns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if not isinstance(tensor, Tensor) or tensor.shape[-1:] != (512,):
                continue
            if tensor.shape != (32, 512):  # the table, or a share of its gradient
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("sections", [{}, {"exits": {"coefficient": 0.3, "distill": True}}])
def test_whole_logits_never_exist(monkeypatch: pytest.MonkeyPatch, sections: Any) -> None:
    """512 ids, 24 tokens in chunks of 6."""
    base = make_config("fp32", {"z_loss": 0.1, "logit_softcap": 3.0, "vocab_size": 512}, sections)
    monkeypatch.setattr(cost, "MOST_LOGITS", 6 * 512)
    model, batch = Transformer(base), make_batch(3, 8)
    for weight in model.weights():
        weight.sum_in_place, weight.parameter.grad = True, torch.zeros_like(weight.parameter)
    ctx, reads = model.context(batch, step=3, training=True), {}
    with Largest(model.parameters()) as largest:
        x, _ = model.run(layer_map(base.recurrence), model.embed(batch.tokens_BS, ctx), ctx, reads)
        exits = {name: state for name, state in reads.items() if name.startswith("exit_")}
        terms = model.loss(x, batch, exits)
        torch.stack([term.weight * term.total for term in terms.values()]).sum().backward()
    assert largest.elements == 6 * 512


def trace_in_chunks(config: Config, num_steps: int) -> Any:
    """`trace`, on every rank by chunks of tokens."""
    before, cost.MOST_LOGITS = cost.MOST_LOGITS, 1 << 12
    try:
        assert cost.is_chunked(config)
        return trace(config, num_steps)
    finally:
        cost.MOST_LOGITS = before


SHARDED = {"model": {"z_loss": 1e-2, "tie_embeddings": True, "vocab_size": 257}}
SMOOTH = {"objective": {"label_smoothing": 0.2}}


@pytest.mark.parametrize(
    ("processes", "parallel", "sections"),
    [
        (2, {"tensor": 2}, {}),
        (2, {"tensor": 2}, SMOOTH),
        (2, {"tensor": 2, "sequence_parallel": True}, {}),
        (2, {"pipeline": 2}, {}),
        (2, {"zero_stage": 1}, {}),
        (2, {"zero_stage": 2}, {}),
        (2, {"zero_stage": 3}, {}),
    ],
)
def test_ranks_in_chunks_equal_one_process_with_whole_logits(
    world: Any, corpus: Any, processes: int, parallel: dict[str, Any], sections: dict[str, Any]
) -> None:
    sections = {**SHARDED, **sections, "parallel": parallel}
    config = config_of(corpus, "cycle", parallel.get("tensor", 1), **sections)
    compare(world(processes).run(trace_in_chunks, config, 2)[0], reference(config, 2))
