"""What backward makes again, or fetches from the host: gradients to the last bit, and what is kept.

Bytes against the estimates of `check` are in tests/plan/test_cost.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.configs import SCHEMES as MAPS
from support.models import SCHEMES, LiveStorages, assert_same, build, make_batch, make_model_config
from support.models import run as run_once
from torch import Tensor

from megarecur.config.run import Config
from megarecur.config.train import TrainConfig
from megarecur.errors import ConfigError
from megarecur.model.saved import AHEAD, mark, saving
from megarecur.model.transformer import Transformer
from megarecur.plan.cost import check_size
from megarecur.recurrence.schemes import layer_map

DROPOUT = {"dropout": 0.3, "attention_dropout": 0.2}
MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("reuse_map", "fp32", DROPOUT),
    ("loop_linear_random", "bf16", {"num_kv_heads": 2, "qk_norm": True, "norm": "layer"}),
    ("cycle", "fp32", {"norm_position": "sandwich", "qk_norm": True, "rope_fraction": 0.5}),
    ("block_recurrence", "fp32", {"norm_position": "post", "feed_forward": "relu"}),
    ("sequence", "bf16", {"norm_position": "peri", "feed_forward": "geglu_tanh", **DROPOUT}),
    ("custom", "fp32", {"norm_position": "output", "qk_norm": True, "qk_norm_over": "all"}),
    ("reuse_map", "fp32", {"parallel_residual": True, "positions": "xpos"}),
    ("cycle", "fp32", {"gate": True, "norm": "layer", "feed_forward": "gelu_tanh"}),
]
LEAST = 256
"""Bytes from which on `Copies` moves a tensor."""


class Copies:
    """Copies to NumPy, which are no tensors, in the order of a `log`."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def leaves(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().nbytes() >= LEAST

    def out(self, flat: Tensor) -> Any:
        self.log.append("out")
        return flat.dtype, flat.view(torch.uint8).numpy().copy()

    def back(self, host: Any, device: torch.device) -> Tensor:
        self.log.append("back")
        dtype, values = host
        return torch.from_numpy(np.array(values)).view(dtype)

    def wait(self, fetched: Tensor) -> Tensor:
        self.log.append("wait")
        return fetched


def gradients_of(
    scheme: str, precision: str, model: dict[str, Any], policy: Any, copies: Copies | None = None
) -> tuple[Any, ...]:
    config = make_model_config(SCHEMES[scheme], precision, policy, **model)
    built = build(config)
    built.host_copies = copies
    return run_once(config, make_batch(), training=True, model=built)


@pytest.mark.parametrize(("scheme", "precision", "model"), MODELS)
def test_every_policy_has_the_same_gradients(scheme: str, precision: str, model: Any) -> None:
    expected = gradients_of(scheme, precision, model, "none")
    for policy in ("selective", "full", {"loops": [0]}):
        assert_same(gradients_of(scheme, precision, model, policy), expected)
    for policy in ("none", "selective", "full"):
        copies = Copies()
        assert_same(gradients_of(scheme, precision, model, policy, copies), expected)
        assert copies.log.count("out") > 0


def kept(policy: Any, copies: Copies | None = None) -> int:
    """Bytes alive after the steps of the map, their input and output included."""
    config = make_model_config(SCHEMES["cycle"], "fp32", policy)
    model, batch = build(config), make_batch()
    model.host_copies = copies
    ctx = model.context(batch, step=3, training=True)
    x = model.embed(batch.tokens_BS, ctx)
    with LiveStorages([*model.parameters(), x]) as live:
        out, _ = model.run(layer_map(config.recurrence), x, ctx, {})
    assert out.requires_grad
    return live.count_bytes()


def test_what_moved_is_not_on_the_device() -> None:
    everything, out = kept("none"), 2 * 7 * 32 * 4
    assert kept("selective") < 0.75 * everything
    # Numbers per row are too small to move, and the output is alive.
    assert kept("none", Copies()) < out + 0.05 * everything


def test_each_storage_moves_once_and_returns_ahead_of_its_use() -> None:
    copies = Copies()
    gradients_of("cycle", "fp32", {}, "none", copies)
    first = copies.log.index("back")
    assert "back" not in copies.log[:first] and "out" not in copies.log[first:]
    assert copies.log.count("back") == copies.log.count("out") < copies.log.count("wait")
    # The first tensor that backward reads waits after those before it are on their way.
    assert copies.log[first : first + AHEAD + 2] == ["back"] * (AHEAD + 1) + ["wait"]


def test_a_second_backward_pass_fetches_again() -> None:
    config = make_model_config(SCHEMES["cycle"], "fp32", "selective")
    model, batch = build(config), make_batch()
    model.host_copies = Copies()
    ctx = model.context(batch, step=3, training=True)
    x, _ = model.run(layer_map(config.recurrence), model.embed(batch.tokens_BS, ctx), ctx, {})
    x.square().sum().backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    x.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in once:
            torch.testing.assert_close(parameter.grad, 2 * once[name])


def test_a_kept_tensor_must_not_be_overwritten() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    with saving(remakes=True, copies=None):
        base = x * 2.0
        y = mark(base.exp(), torch.exp, base)
        loss = (y * y).sum()
    base.mul_(3.0)
    with pytest.raises(AssertionError, match="overwritten"):
        loss.backward()


def test_old_configs_and_loops_load() -> None:
    def train(**values: Any) -> TrainConfig:
        return TrainConfig(steps=1, global_batch_size=1, micro_batch_size=1, **values)

    assert train(recompute=True) == train(recompute="full")
    assert train(recompute=False) == train(recompute="none") == train()
    some = train(recompute={"loops": [1, 3]})
    assert [some.recomputes(loop) for loop in range(4)] == [False, True, False, True]


def test_loops_that_do_not_exist_are_refused() -> None:
    config: Config = make_model_config(MAPS["cycle"], "fp32", {"loops": [0, 9]})
    with pytest.raises(ConfigError, match=r"train.recompute.loops=\[0, 9\] names loop 9, but no"):
        check_size(config)


def test_a_cpu_moves_nothing() -> None:
    config = make_model_config(SCHEMES["cycle"])
    train = config.train.model_copy(update={"offload_activations": True})
    assert Transformer(config.model_copy(update={"train": train})).host_copies is None
