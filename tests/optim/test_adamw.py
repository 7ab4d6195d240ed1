"""AdamW without torch's base class: the same bits, and no import of torch._dynamo."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from support.configs import make_config

from megarecur.optim.adamw import AdamW
from megarecur.train.trainer import FINISHED, train

BETAS, EPS = (0.9, 0.95), 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_updates_equal_those_of_torch(dtype: torch.dtype) -> None:
    """Two groups, rates that change, and a parameter without a gradient in some steps."""
    random = torch.Generator().manual_seed(1)
    shapes = [(5, 3), (7,), (1, 33)]
    values = [torch.randn(shape, generator=random, dtype=dtype) for shape in shapes]
    theirs = [torch.nn.Parameter(value.clone()) for value in values]
    ours = [torch.nn.Parameter(value.clone()) for value in values]
    groups = [
        [{"params": p[:2], "weight_decay": 0.1}, {"params": p[2:], "weight_decay": 0.0}]
        for p in (theirs, ours)
    ]
    expected = torch.optim.AdamW(groups[0], betas=BETAS, eps=EPS, fused=True)
    optimizer = AdamW(groups[1], BETAS, EPS)
    for parameter in ours:
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {**moments, "step": torch.zeros(())}
    for step in range(6):
        for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
            gradient = torch.randn(a.shape, generator=random, dtype=dtype)
            a.grad, b.grad = (None, None) if (i, step % 3) == (1, 0) else (gradient, gradient)
        for rule in (expected, optimizer):
            for scale, group in enumerate(rule.param_groups, 1):
                group["lr"] = scale * 1e-2 / (step + 1)
            rule.step()
    for a, b, value in zip(theirs, ours, values, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, value)
        for name, state in expected.state[a].items():
            assert torch.equal(state, optimizer.state[b][name]), name


def test_training_imports_no_compiler(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of torch's own optimizers imports torch._dynamo, each time anew."""
    asked, true_import = set(), builtins.__import__

    def recorded(name: str, *args: Any, **named: Any) -> Any:
        own = args[2] if len(args) > 2 else named.get("fromlist")
        asked.update([name, *(f"{name}.{each}" for each in own or ())])
        return true_import(name, *args, **named)

    config = make_config(corpus, "dense", run_dir=str(tmp_path / "run"), train={"steps": 2})
    monkeypatch.setattr(builtins, "__import__", recorded)
    assert train(config) == FINISHED
    assert asked and not {name for name in asked if name.startswith("torch._dynamo")}
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    torch.optim.AdamW([parameter], fused=True).step()
    assert "torch._dynamo" in asked
