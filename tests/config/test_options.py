"""Options of the model that other families have: on any mesh, compiled, in bf16, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import packed_logits
from support.configs import make_config
from support.engines import trace_compiled
from support.harness import compare
from support.meshes import SEQUENCE, config_of, later, reference, trace

from megarecur.config.run import Config
from megarecur.errors import ConfigError
from megarecur.inference.generate import generate
from megarecur.model.context import build_context
from megarecur.model.feed_forward import _GeGLU
from megarecur.model.transformer import Transformer
from megarecur.plan.cost import count_flops, count_mask_heads, count_parameters
from megarecur.recurrence.schemes import layer_map

DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}
GEMMA: dict[str, Any] = {
    "norm_position": "peri",
    "feed_forward": "geglu_tanh",
    "qk_norm": True,
    "scale_embeddings": True,
    "attention_scale": 0.3,
    "attention_softcap": 2.0,
    "logit_softcap": 3.0,
    "sliding_window": 5,
    "attention_types": ["sliding", "full"],
    "rope_theta_local": 100.0,
    "rope_scaling_factor": 2.0,
}
NEOX: dict[str, Any] = {
    "norm": "layer",
    "parallel_residual": True,
    "rope_fraction": 0.5,
    "feed_forward": "gelu_tanh",
    "attention_bias": "all",
    "feed_forward_bias": True,
    "tie_embeddings": False,
}
OLMO: dict[str, Any] = {
    "norm_position": "output",
    "qk_norm": True,
    "qk_norm_over": "all",
    "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_positions": 8},
    "sliding_window": 5,
    "attention_types": ["sliding", "full"],
    "rope_theta_local": 100.0,
}
FP64 = {"train": {"precision": "fp64"}}


OWN_NORMS = {"rank": 4, "norms": True}


@pytest.mark.parametrize(
    ("scheme", "tensor", "processes", "extra"),
    [
        ("cycle", 2, 2, {**FP64, "model": GEMMA}),
        later("cycle", 2, 2, {**FP64, **SEQUENCE, "model": {**NEOX, **DROPOUT}}),
        later("loop", 4, 4, {**FP64, "model": {**GEMMA, **DROPOUT, "attention_softcap": None}}),
        later("loop", 4, 4, {**FP64, **SEQUENCE, "model": GEMMA}),
        later("cycle", 2, 4, {"model": GEMMA, "parallel": {"zero_stage": 1}}),
        later("cycle", 2, 4, {"model": GEMMA, "parallel": {"zero_stage": 3}}),
        ("cycle", 4, 4, {**FP64, "model": OLMO}),
        later("cycle", 2, 2, {**FP64, "model": {**OLMO, **DROPOUT}, "adapters": OWN_NORMS}),
        later("loop", 4, 4, {**FP64, **SEQUENCE, "model": OLMO}),
        later("cycle", 2, 4, {"model": OLMO, "parallel": {"zero_stage": 1}}),
        later("cycle", 2, 4, {"model": OLMO, "parallel": {"zero_stage": 3}}),
        later("cycle", 1, 2, {**FP64, "model": GEMMA, "parallel": {"pipeline": 2}}),
        later("cycle", 2, 4, {**FP64, "model": NEOX, "parallel": {"pipeline": 2}}),
    ],
)
def test_ranks_equal_one_process(world, corpus, scheme, tensor, processes, extra) -> None:
    """Four ranks of two key heads too, whose gains are the same parameter."""
    config = config_of(corpus, scheme, tensor, **extra)
    tolerances = (1e-11, 1e-11) if config.train.precision == "fp64" else (2e-6, 2e-5)
    compare(world(processes).run(trace, config, 3)[0], reference(config, 3), *tolerances)


@pytest.mark.parametrize(
    ("model", "masked"),
    [later(GEMMA, False), later(GEMMA, True), later(NEOX, False), later(OLMO, True)],
)
def test_one_graph_serves_blocks_of_all_types(corpus, model, masked) -> None:
    """With and without a window; compiled equals eager."""
    model = {**model, "attention_softcap": None} if masked else model
    config = config_of(corpus, "cycle", 1, model=model, data={"mask_documents": masked})
    found, graphs = trace_compiled(config, 3)
    compare(found, reference(config, 3))
    assert graphs == 1


@pytest.mark.slow
@pytest.mark.parametrize("model", [{**GEMMA, **DROPOUT}, {**NEOX, **DROPOUT}, {**OLMO, **DROPOUT}])
def test_recompute_and_bf16(corpus, model) -> None:
    """Recomputed, to the last digits; in bf16, as near as bf16 is."""
    kept = reference(config_of(corpus, "cycle", 1, model=model), 3)
    again = config_of(corpus, "cycle", 1, model=model, train={"recompute": True})
    compare(reference(again, 3), kept)
    half = config_of(corpus, "cycle", 1, model=model, train={"precision": "bf16"})
    for (loss, _, norm, _), (wanted, _, wide, _) in zip(reference(half, 3), kept, strict=True):
        assert abs(loss - wanted) < 0.02 * wanted and abs(norm - wide) < 0.1 * wide


def hidden_of(config: Config, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Output [B, S, D] of the last step of the map."""
    model = Transformer(config)
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    ctx = build_context(config.model, positions_BS, model.dtype)
    with torch.no_grad():
        x, _ = model.run(layer_map(config.recurrence), model.embed(tokens_BS, ctx), ctx, {})
    return x


@pytest.mark.parametrize("positions", ["rope", "alibi"])
def test_window_reaches_so_far_and_no_farther(positions: str) -> None:
    """One block that runs once: a token that changes reaches window - 1 tokens further."""
    model = {"sliding_window": 4, "positions": positions, "vocab_size": 9}
    config = make_config(model=model, recurrence={"kind": "dense", "num_layers": 1})
    assert config.model.attention_types == ("sliding",)
    tokens_BS = torch.arange(12)[None] % 9
    other_BS = tokens_BS.clone()
    other_BS[0, 3] = 8
    changed = (hidden_of(config, tokens_BS) != hidden_of(config, other_BS)).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [3, 4, 5, 6]


@pytest.mark.parametrize("model", [GEMMA, NEOX, OLMO])
def test_shared_blocks_continue_with_a_cache_as_without(model: dict[str, Any]) -> None:
    """The same samples, past the window too."""
    shape = {"vocab_size": 31, "init_std": 0.3, "num_kv_heads": 4, **model}
    transformer = Transformer(make_config(scheme="cycle", model=shape)).eval()
    said = [
        list(generate(transformer, [1, 2], max_new_tokens=20, seed=1, use_cache=cached))
        for cached in (True, False)
    ]
    assert said[0] == said[1] and len(set(said[0])) > 2


def test_types_belong_to_blocks_not_to_layers() -> None:
    """A block that sees a window does so whenever it runs; what is behind the list starts over."""
    model = make_config(model={"sliding_window": 2, "attention_types": ["sliding", "full"]}).model
    assert [model.slides(block) for block in range(4)] == [True, False, True, False]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gated_gelu_has_the_gradient_of_its_formula(approximate: str) -> None:
    gate, up = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    inputs = gate.detach().requires_grad_(), up.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda g, u: _GeGLU.apply(g, u, approximate), inputs)


def test_costs_follow_the_options() -> None:
    """Gates and norms are counted; masks of two kinds, if any; scores inside of windows."""
    plain, gemma = (make_config(model={"vocab_size": 9, **m}) for m in ({}, GEMMA))
    blocks, head = 3, plain.model.head_dim
    more = count_parameters(gemma).total - count_parameters(plain).total
    assert more == blocks * (2 * plain.model.hidden_size + 2 * head)
    steps = layer_map(plain.recurrence)
    length, window = plain.data.seq_length, gemma.model.sliding_window
    hidden = sum(max(0, position + 1 - window) for position in range(length)) / length
    sliding = sum(gemma.model.slides(step.block) for step in steps)
    saved = sliding * round(4 * hidden * plain.model.num_heads * head)
    assert sliding and saved
    flops = count_flops(gemma, steps), count_flops(plain, steps)
    assert flops[0].forward == pytest.approx(flops[1].forward - saved, abs=sliding)
    assert flops[0].train == pytest.approx(flops[1].train - 3 * saved, abs=3 * sliding)
    assert (count_mask_heads(plain), count_mask_heads(gemma)) == (0, 0)
    dense = (
        make_config(model={"vocab_size": 9, **m}, train={"attention": "dense"}) for m in ({}, GEMMA)
    )
    assert [count_mask_heads(config) for config in dense] == [1, 2]


def test_dynamic_scaling_goes_by_the_length_of_each_document() -> None:
    """A document rotates the same alone, packed and in a batch; a short one as without scaling."""
    shape = {"vocab_size": 31, "init_std": 0.3, "num_kv_heads": 4}
    scaling = {"kind": "dynamic", "factor": 3.0, "original_positions": 8}
    scaled = Transformer(make_config(scheme="cycle", model={**shape, "rope_scaling": scaling}))
    plain = Transformer(make_config(scheme="cycle", model=shape))
    documents = [torch.arange(n) * 7 % 31 for n in (5, 8, 15)]
    packed = packed_logits(scaled, documents).split([5, 8, 15])
    for document, found in zip(documents, packed, strict=True):
        alone = packed_logits(scaled, [document])
        torch.testing.assert_close(found, alone, rtol=0.0, atol=2e-5)
        same = torch.allclose(alone, packed_logits(plain, [document]), atol=1e-4)
        assert same == (len(document) <= 8)


YARN = {"kind": "yarn", "factor": 4.0, "original_positions": 8}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"rope_fraction": 0.4}, "rope_fraction=0.4 of head_dim=8 rotates 3 dims"),
        ({"rope_fraction": 0.1}, "rotates 0 dims"),
        ({"rope_fraction": 1.5}, "rope_fraction"),
        ({"positions": "alibi", "rope_fraction": 0.5}, "rope_fraction=0.5 needs positions=rope"),
        ({"norm_position": "post", "parallel_residual": True}, "needs norm_position=pre, not post"),
        ({"attention_types": ["sliding"]}, "sliding blocks without a sliding_window"),
        ({"attention_types": []}, "attention_types"),
        ({"sliding_window": 4, "attention_types": ["full"]}, "needs a sliding block"),
        ({"rope_theta_local": 10.0}, "rope_theta_local=10.0 needs sliding blocks"),
        ({"attention_softcap": 0.0}, "attention_softcap"),
        ({"qk_norm_over": "all"}, "qk_norm_over=all needs qk_norm=true"),
        ({"rope_scaling": {"kind": "longrope"}}, "rope_scaling.*'longrope'"),
        (
            {"rope_scaling": {**YARN, "factor": 0.5}},
            "rope_scaling.factor=0.5 .*set it to at least 1",
        ),
        ({"rope_scaling": {**YARN, "original_positions": 0}}, "original_positions"),
        (
            {"rope_scaling": {**YARN, "attention_factor": 1e6}},
            "attention_factor=.* set it to at most",
        ),
        (
            {"rope_scaling": YARN, "positions": "alibi"},
            "rope_scaling.kind=yarn needs positions=rope",
        ),
        ({"rope_scaling": YARN, "rope_scaling_factor": 2.0}, "two ways to scale exclude"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta=1.0 with .*yarn: must be above 1"),
        ({"rope_scaling": {**YARN, "kind": "dynamic"}, "rope_fraction": 0.25}, "more than 2 rota"),
        (
            {"rope_scaling": {**YARN, "kind": "llama3", "low_freq_factor": 4.0}},
            "high_freq_factor=4.0 must be above low_freq_factor=4.0",
        ),
    ],
)
def test_options_that_exclude_each_other_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(Path("corpus"), model=model)
