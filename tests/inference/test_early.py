"""Leaving early when a text is continued: rules, and what is kept of the loops that are skipped."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from support.decoding import build_decoder

from megarecur.errors import ConfigError
from megarecur.inference.cache import Cache
from megarecur.inference.early import ExitRule, Loops, cut_loops, early_logits, make_rule
from megarecur.inference.generate import generate, next_logits
from megarecur.parallel.mesh import Mesh
from megarecur.plan.schedule import Schedules

SCHEMES: list[dict[str, Any]] = [
    {"kind": "cycle", "num_blocks": 2, "depth": 6},
    {"kind": "block_recurrence", "num_blocks": 2, "num_loops": 3},
    {"kind": "loop", "prelude": 1, "core": 1, "coda": 0, "num_loops": 3},
    {"kind": "loop", "prelude": 1, "core": 2, "coda": 2, "num_loops": 3, "injection": "linear"},
]
PROMPT = [1, 5, 2, 7]


def texts(model: Any, rule: ExitRule | None, **options: Any) -> list[int]:
    options = {"max_new_tokens": 12, "temperature": 0.0, **options}
    return list(generate(model, PROMPT, exit_rule=rule, **options))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_rule_that_is_never_met_changes_nothing(scheme) -> None:
    model = build_decoder(scheme)
    for kind in ("kl", "entropy"):
        rule = ExitRule(kind, 0.0)
        assert texts(model, rule) == texts(model, None)
        assert rule.loops == [3] * 11  # The first new token comes of the prompt, which runs all.


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rules_let_tokens_leave(scheme) -> None:
    model = build_decoder(scheme)
    found = {}
    for kind, threshold in (("confidence", 1e-6), ("entropy", 99.0), ("kl", 99.0)):
        rule = ExitRule(kind, threshold)
        texts(model, rule)
        found[kind] = set(rule.loops)
    # Successive loops are compared from the second on.
    assert found == {"confidence": {1}, "entropy": {1}, "kl": {2}}


def test_rules_by_hand() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.5, 0.3, 0.2]).log()
    assert ExitRule("confidence", 0.69).leaves(p, None)
    assert not ExitRule("confidence", 0.71).leaves(p, None)
    entropy, divergence = 0.80182, 0.08512
    assert ExitRule("entropy", entropy + 1e-4).leaves(p, None)
    assert not ExitRule("entropy", entropy - 1e-4).leaves(p, None)
    assert ExitRule("kl", divergence + 1e-4).leaves(p, q)
    assert not ExitRule("kl", divergence - 1e-4).leaves(p, q)
    assert not ExitRule("kl", 99.0).leaves(p, None)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model_options", [{}, {"norm_position": "post"}, {"norm": "layer"}])
@pytest.mark.parametrize("adapters", [None, {"rank": 3, "norms": True}])
def test_skipped_loops_keep_what_the_hidden_state_would_make(
    scheme, model_options, adapters
) -> None:
    """Keys and values of every skipped step are its own products of the state that left."""
    model = build_decoder(scheme, adapters, positions="none", **model_options)
    for name, parameter in model.parameters_by_name.items():
        if name.endswith("lora_b") or "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    config, mesh, cache = model.config, Mesh(), Cache()
    next_logits(model, mesh, Schedules(config).forward(), torch.tensor([PROMPT]), cache)
    (loops, coda), states, reads = cut_loops(config, None), [], {}
    whole = model.runner.forward

    def record(*args: Any) -> torch.Tensor:
        states.append(whole(*args))
        reads.update(args[3])
        return states[-1]

    rule = ExitRule("kl", 99.0)
    with mock.patch.object(model.runner, "forward", record):
        early_logits(model, Loops(loops, coda), torch.tensor([[3]]), cache, rule)
    assert rule.loops == [2] and cache.length == len(PROMPT) + 1
    # A coda runs after each loop that ran.
    entered = states[2 if coda else 1]
    for step in loops[2]:
        block, x = model.runner.blocks[str(step.block)], entered
        if step.reads:
            x = block.inject(x, reads[step.reads[0]])
        adapter = block.adapters[step.loop_index] if adapters else None
        norms = adapter.norms if adapter else block.norms
        x = x if config.model.norm_position == "post" else norms["attention_norm"](x)
        kept = cache.entries[step.block, step.loop_index]
        for name, values in zip(("key", "value"), kept, strict=True):
            weight = getattr(block.attention, name).weight.parameter
            if adapter:
                delta = adapter.deltas[name]
                weight = weight + delta.b.parameter @ delta.a.parameter
            expected = (x @ weight.t())[0, 0].detach()
            torch.testing.assert_close(values[0, len(PROMPT)].flatten(), expected)
    every = {(step.block, step.loop_index) for steps in (*loops, coda) for step in steps}
    assert set(cache.entries) == every


def test_mistakes_are_told() -> None:
    looped, dense = build_decoder(SCHEMES[1]), build_decoder({"kind": "dense", "num_layers": 2})
    once = build_decoder({"kind": "cycle", "num_blocks": 2, "depth": 2})
    for model, rule, options, told in (
        (dense, ExitRule("kl", 0.1), {}, "kind=dense has no loops"),
        (once, ExitRule("kl", 0.1), {}, "recurrence runs one loop, which has no earlier one"),
        (looped, ExitRule("confidence", 1.5), {}, "exit_threshold=1.5 is a probability"),
        (looped, ExitRule("entropy", -1.0), {}, "exit_threshold=-1.0"),
        (looped, ExitRule("entropy", 1.0), {"use_cache": False}, "needs the cache"),
        (looped, ExitRule("entropy", 1.0), {"num_loops": 1}, "no earlier loop"),
    ):
        with pytest.raises(ConfigError, match=told):
            texts(model, rule, **options)
    for kind, threshold, told in (
        ("sure", None, "exit=sure is none of confidence, kl, entropy"),
        ("kl", None, "needs a threshold in nats"),
        (None, 0.5, "needs a rule"),
    ):
        with pytest.raises(ConfigError, match=told):
            make_rule(kind, threshold)
    assert make_rule(None, None) is None
    assert make_rule("confidence", None) == ExitRule("confidence", 0.9)
