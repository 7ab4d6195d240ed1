"""Blocks with a gate, and xPos (Ray Chowdhury & Caragea 2024; Sun et al. 2023)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.models import build, make_batch, make_model_config
from torch import Tensor

from megarecur.config.model import ModelConfig
from megarecur.model.context import build_context
from megarecur.model.positions import rotate
from megarecur.model.transformer import Transformer
from megarecur.plan.cost import count_parameters
from megarecur.recurrence.layer_map import Step
from megarecur.recurrence.schemes import layer_map

CYCLE = {"kind": "cycle", "num_blocks": 2, "depth": 3}
PLAIN = {"norm": "layer", "feed_forward": "gelu", "feed_forward_bias": True, "positions": "xpos"}


def leave(model: Transformer) -> Tensor:
    """What leaves the map."""
    batch = make_batch()
    ctx = model.context(batch, 0, training=False)
    x = model.embed(batch.tokens_BS, ctx)
    return model.run(layer_map(model.config.recurrence), x, ctx, {})[0]


def gated(open_by: float) -> Transformer:
    """Its gates are sigmoid(open_by) everywhere."""
    model = build(make_model_config(CYCLE, gate=True, gate_hidden_size=20, **PLAIN))
    for name, parameter in model.parameters_by_name.items():
        if ".gate.down." in name:
            parameter.data.fill_(open_by if name.endswith("bias") else 0.0)
    model.refresh()
    return model


def test_a_closed_gate_is_identity_and_an_open_one_the_plain_block() -> None:
    shut, ajar = gated(-1e4), gated(1e4)
    batch = make_batch()
    x = shut.embed(batch.tokens_BS, shut.context(batch, 0, training=False))
    torch.testing.assert_close(leave(shut), x, rtol=0, atol=0)
    plain = build(make_model_config(CYCLE, **PLAIN))
    for name, parameter in plain.parameters_by_name.items():
        parameter.data.copy_(ajar.parameters_by_name[name].data)
    torch.testing.assert_close(leave(ajar), leave(plain), rtol=1e-12, atol=1e-12)
    assert (leave(gated(0.0)) - leave(plain)).abs().max() > 1e-2


def test_a_gate_has_its_parameters() -> None:
    """2 D f + f + D on top of 4 D h d_h + (2 D f + f + D) + 4 D (recurrence.md, section 4.4)."""
    one = {"kind": "custom", "order": [0]}
    hidden, ffn, gate = 32, 48, 20
    block = 4 * hidden * hidden + 2 * hidden * ffn + ffn + hidden + 4 * hidden
    final = 2 * hidden
    plain = count_parameters(make_model_config(one, **PLAIN)).non_embedding
    assert plain == block + final
    with_gate = count_parameters(make_model_config(one, gate=True, gate_hidden_size=gate, **PLAIN))
    assert with_gate.non_embedding == plain + 2 * hidden * gate + gate + hidden
    default = make_model_config(one, gate=True, **PLAIN).model
    assert default.gate_hidden_size == default.ffn_hidden_size


def scores(positions: list[int], interleaved: bool) -> Tensor:
    """q k^T of fixed vectors at these positions."""
    model = ModelConfig(hidden_size=8, num_heads=1, positions="xpos", rope_interleaved=interleaved)
    positions_BS = torch.tensor([positions])
    view = build_context(model, positions_BS, torch.float64).attention
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, len(positions), 1, 8, generator=generator, dtype=torch.float64)
    assert view.rotation is not None and view.key_rotation is not None
    q, k = rotate(q, view.rotation, interleaved), rotate(k, view.key_rotation, interleaved)
    return (q[0, :, 0] @ k[0, :, 0].T).detach()


@pytest.mark.parametrize("interleaved", [False, True])
def test_xpos_depends_on_distance_alone_and_decays(interleaved: bool) -> None:
    """Sun et al. 2023, eq. 12: the score of dims (2i, 2i + 1) is RoPE's, times
    ((2i + 0.4 H) / (1.4 H)) ** (distance / 512)."""
    near = scores([0, 3, 700], interleaved)
    torch.testing.assert_close(near, scores([1000, 1003, 1700], interleaved), rtol=1e-9, atol=1e-12)
    model = ModelConfig(hidden_size=8, num_heads=1, positions="xpos")
    positions_BS = torch.tensor([[0, 3, 700]])
    scaled = build_context(model, positions_BS, torch.float64).attention
    plain = build_context(
        model.model_copy(update={"positions": "rope"}), positions_BS, torch.float64
    ).attention
    assert plain.rotation is not None and scaled.rotation is not None and scaled.key_rotation
    for i in range(4):
        factor = ((2 * i + 0.4 * 8) / (1.4 * 8)) ** (700 / 512)
        torch.testing.assert_close(
            scaled.rotation[0][0, 2, 0, i], plain.rotation[0][0, 2, 0, i] * factor
        )
        torch.testing.assert_close(
            scaled.key_rotation[1][0, 2, 0, i], plain.rotation[1][0, 2, 0, i] / factor
        )


@pytest.mark.parametrize(
    ("model", "naming"),
    [
        ({"gate": True, "norm_position": "post"}, ("gate=true", "norm_position=pre", "post")),
        ({"gate": True, "parallel_residual": True}, ("gate=true", "parallel_residual")),
        ({"gate_hidden_size": 8}, ("gate_hidden_size=8", "gate=true")),
        ({"xpos_scale_base": 8.0}, ("xpos_scale_base=8.0", "positions=xpos")),
        ({"positions": "xpos", "head_dim": 5}, ("positions=xpos", "head_dim=5")),
        ({"positions": "xpos", "rope_fraction": 0.5}, ("rope_fraction=0.5", "xpos")),
    ],
)
def test_options_that_cannot_be_are_refused(model: dict[str, Any], naming: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        make_model_config(CYCLE, **model)
    assert str(caught.value).count("Value error") == 1
    for text in naming:
        assert text in str(caught.value)


def test_step_of_a_gated_block_decodes_with_a_cache() -> None:
    """xPos and the gate token by token."""
    from megarecur.inference.cache import Cache, context_after

    model = build(make_model_config(CYCLE, gate=True, **PLAIN))
    tokens_BS = make_batch().tokens_BS[:1]
    steps: tuple[Step, ...] = layer_map(model.config.recurrence)

    def forward(tokens: Tensor, cache: Cache | None) -> Tensor:
        ctx = context_after(model, tokens, cache)
        x, _ = model.run(steps, model.embed(tokens, ctx), ctx, {})
        if cache is not None:
            cache.advance(tokens.shape[1])
        return x

    cache = Cache(7)
    parts = [forward(tokens_BS[:, :4], cache)]
    parts += [forward(tokens_BS[:, i : i + 1], cache) for i in range(4, 7)]
    torch.testing.assert_close(torch.cat(parts, 1), forward(tokens_BS, None), rtol=1e-9, atol=1e-11)
