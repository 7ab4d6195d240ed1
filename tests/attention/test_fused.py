"""Attention on CUDA without torch's MATH kernel, as far as a CPU tells: which kernels the call
allows, that it asks for nothing that the fused ones lack, and its values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.decoding import build_decoder, disturb
from torch import Tensor
from torch.backends import cuda

from megarecur.attention import fused
from megarecur.attention.attend import attend_plain
from megarecur.attention.dense import attend_dense
from megarecur.attention.plan import Choice
from megarecur.attention.scores import Scores
from megarecur.errors import ConfigError
from megarecur.inference.engine import Engine
from megarecur.inference.generate import generate
from megarecur.inference.request import Request


class Calls:
    """The calls of torch's attention: whether each allowed the MATH kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allowed: list[bool] = []
        attend = F.scaled_dot_product_attention

        def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **given: Any) -> Any:
            self.allowed.append(cuda.math_sdp_enabled())
            if not self.allowed[-1] and given["enable_gqa"]:
                # The flash kernel alone shares key heads, without masks.
                assert mask is None and q.dtype in (torch.bfloat16, torch.float16)
            return attend(q, k, v, mask, **given)

        monkeypatch.setattr(F, "scaled_dot_product_attention", call)
        monkeypatch.setattr(fused, "needs_kernel", lambda q: True)


def draw(queries: int, keys: int, key_heads: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Queries of four heads, keys and values."""
    torch.manual_seed(0)
    shapes = (2, queries, 4, 8), (2, keys, key_heads, 8), (2, keys, key_heads, 8)
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("masked", [None, (1, 1), (2, 1), (1, 4)])
def test_values_are_those_of_the_math_kernel(key_heads, queries, masked, monkeypatch) -> None:
    """Of grouped heads too, with masks of one row for all, per sample, and per head."""
    calls, keys = Calls(monkeypatch), 7
    qkv = q, k, v = draw(queries, keys, key_heads, torch.float64)
    mask = None
    if masked is not None:
        mask = torch.randn(*masked, queries, keys, dtype=torch.float64)
        mask[..., 3] = -torch.inf
    scores = (q.transpose(1, 2) @ k.repeat_interleave(4 // key_heads, 2).permute(0, 2, 3, 1)) * 0.3
    weights = (scores if mask is None else scores + mask).softmax(-1)
    expected = weights @ v.repeat_interleave(4 // key_heads, 2).transpose(1, 2)
    for allows_math in (False, True):
        found = attend_dense(qkv, Scores(0.3), mask, False, None, allows_math)
        torch.testing.assert_close(found, expected.transpose(1, 2), rtol=0, atol=1e-12)
    assert calls.allowed == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_samples_allow_no_math(dtype, monkeypatch) -> None:
    q, k, v = draw(7, 7, 2, dtype)
    expected = F.scaled_dot_product_attention(
        *(t.double().transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True, scale=0.3
    ).transpose(1, 2)
    calls = Calls(monkeypatch)
    found = attend_plain((q, k, v), Scores(0.3), True)
    error = (found.double() - expected).norm() / expected.norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert calls.allowed == [False]


def test_a_missing_kernel_is_an_error(monkeypatch) -> None:
    def refuse(*args: Any, **given: Any) -> Tensor:
        assert not cuda.math_sdp_enabled()
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    monkeypatch.setattr(fused, "needs_kernel", lambda q: True)
    qkv, mask = draw(3, 3, 2, torch.float32), torch.zeros(1, 1, 3, 3)
    with pytest.raises(ConfigError, match=r"float32 with 4 .* heads and 2 .* and a mask .*dense"):
        attend_dense(qkv, Scores(0.3), mask, False, None)


MODEL = {"num_heads": 4, "num_kv_heads": 2, "positions": "alibi", "sliding_window": 4,
         "attention_types": ["sliding", "full"]}  # fmt: skip


@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_generation_and_serving_allow_no_math(backend: str, monkeypatch) -> None:
    """With a cache of keys and values, and with pages; `train.attention: dense` allows it."""
    recurrence = {"kind": "cycle", "num_blocks": 2, "depth": 4}
    model = disturb(build_decoder(recurrence, precision="fp64", **MODEL))
    model.attention = Choice(backend, "the test's")  # type: ignore[arg-type]
    request = Request(tokens=(1, 2, 3, 4, 5, 6), max_new_tokens=4, temperature=0.0)

    def run() -> list[list[int]]:
        engine = Engine(model)
        handle = engine.submit(request)
        while engine.step():
            pass
        served = [event.token for event in handle if event.token is not None]
        return [list(generate(model, request.tokens, max_new_tokens=4, temperature=0.0)), served]

    expected = run()
    calls = Calls(monkeypatch)
    assert run() == expected
    assert {*calls.allowed} == {backend == "dense"} and len(calls.allowed) == 2 * 4 * 4
