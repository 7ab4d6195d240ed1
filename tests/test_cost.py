"""Parameters, executed FLOPs, memory and tokens (recurrence.md, section 1.2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megarecur.config.load import validate
from megarecur.config.schema import Config
from megarecur.model.transformer import Transformer
from megarecur.plan.cost import (
    count_flops,
    count_head_flops,
    count_kept_elements,
    count_parameters,
    count_step_flops,
    count_tokens_per_step,
    count_total_tokens,
    count_unrolled_parameters,
    dense_twin,
    estimate_memory,
)
from megarecur.plan.describe import MAX_COLUMNS, draw_layer_map, resolve_vocab_size
from megarecur.recurrence.layer_map import LayerMap, from_order, mark
from megarecur.recurrence.schemes import layer_map

SMALL = {"hidden_size": 128, "num_heads": 4, "ffn_hidden_size": 512, "vocab_size": 1024}
LARGE = {"hidden_size": 768, "num_heads": 8, "ffn_hidden_size": 3072, "vocab_size": 32000}


def build(
    recurrence: dict[str, Any], model: dict[str, Any] = SMALL, **train: Any
) -> tuple[Config, LayerMap]:
    config = validate(
        {
            "run_dir": "r",
            "model": model,
            "recurrence": recurrence,
            "data": {"train": [{"path": "a"}], "tokenizer": "bytes", "seq_length": 1024},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 10, "global_batch_size": 64, "micro_batch_size": 8, **train},
        },
        "test",
    )
    return config, layer_map(config.recurrence)


def reuse(*uses: int) -> dict[str, Any]:
    return {"kind": "reuse_map", "reuse_map": list(uses)}


@pytest.mark.parametrize(
    ("uses", "model", "ratio"),
    [
        ((2, 1, 1, 1), SMALL, 1.24),
        ((4, 2, 1, 1), SMALL, 1.94),
        ((1, 1, 2, 4), SMALL, 1.94),
        ((1, 2, 1, 1, 1, 1, 1, 1), LARGE, 1.10),
    ],
)
def test_compute_relative_to_dense(
    uses: tuple[int, ...], model: dict[str, Any], ratio: float
) -> None:
    config, steps = build(reuse(*uses), model)
    flops, dense = count_flops(config, steps), count_flops(config, dense_twin(steps))
    assert flops.forward / dense.forward == pytest.approx(ratio, abs=0.005)
    assert flops.train == 3 * flops.forward == flops.hardware


def test_forward_flops_are_the_formula() -> None:
    """2 [sum r (4 d^2 + 3 d f) + V d] + sum r 4 S d."""
    config, steps = build(reuse(4, 2, 1, 1))
    d, f, vocab, seq_length = 128, 512, 1024, 1024
    expected = 2 * (8 * (4 * d * d + 3 * d * f) + vocab * d) + 8 * 4 * seq_length * d
    assert count_flops(config, steps).forward == expected


def test_flops_are_linear_in_the_uses() -> None:
    totals = [count_flops(*build(reuse(r, 1, 1, 1))).forward for r in (1, 2, 3)]
    assert totals[1] - totals[0] == totals[2] - totals[1] > 0


def test_the_adapter_counts_at_each_use() -> None:
    values = {"kind": "loop", "prelude": 1, "core": 1, "coda": 0, "num_loops": 3}
    linear, steps = build({**values, "injection": "linear"})
    added, _ = build({**values, "injection": "add"})
    extra = [a - b for a, b in zip(count_step_flops(linear, steps), count_step_flops(added, steps),
                                   strict=True)]  # fmt: skip
    assert extra == [0, *[2 * 128 * 256] * 3]
    assert (
        count_flops(linear, dense_twin(steps)).forward
        == count_flops(added, dense_twin(steps)).forward
    )


def test_steps_without_gradient_and_recompute() -> None:
    config, steps = build(reuse(2, 1), recompute=True)
    steps = mark(steps, 0, grad=False)
    flops, per_step = count_flops(config, steps), count_step_flops(config, steps)
    head = count_head_flops(config)
    assert flops.train == per_step[0] + 3 * (per_step[1] + per_step[2] + head)
    assert flops.hardware == flops.train + per_step[1] + per_step[2]


def test_an_exit_pays_for_its_head() -> None:
    config, steps = build(reuse(2, 1))
    early = mark(mark(steps, 0, exit=True), 2, exit=True)  # the last step has the head anyway
    extra = count_flops(config, early).forward - count_flops(config, steps).forward
    assert extra == count_head_flops(config)


def test_parameters_unique_and_unrolled() -> None:
    config, steps = build(reuse(4, 2, 1, 1))
    unique, unrolled = count_parameters(config), count_unrolled_parameters(config, steps)
    assert (unique.total, unique.non_embedding) == (1_180_800, 1_180_800 - 1024 * 128)
    block = (unique.non_embedding - 128) // 4
    assert unrolled.total == unique.total + 4 * block
    assert unrolled.non_embedding == unique.non_embedding + 4 * block
    dense, dense_steps = build({"kind": "dense", "num_layers": 4})
    assert count_unrolled_parameters(dense, dense_steps) == count_parameters(dense) == unique


def test_memory_by_kind() -> None:
    config, steps = build(reuse(4, 2, 1, 1))
    memory = estimate_memory(config, steps)
    assert memory.parameters == memory.gradients == 4 * 1_180_800
    assert (memory.moments, memory.copies) == (8 * 1_180_800, 0)
    assert memory.logits == 8 * 1024 * 1024 * 8
    assert memory.mask == 8 * 1024 * 1024 * 4  # documents, whatever the head
    assert memory.total == memory.state + memory.activations_kept + memory.logits + memory.mask


def test_memory_follows_the_unrolled_depth_and_recompute_saves() -> None:
    kept = [estimate_memory(*build(reuse(r, 1))).activations_kept for r in (1, 2, 3)]
    assert kept[1] - kept[0] == kept[2] - kept[1] > 0
    config, steps = build(reuse(8, 8), recompute=True)
    memory = estimate_memory(config, steps)
    assert memory.activations == memory.activations_recomputed < memory.activations_kept / 3
    forward_only = tuple(replace(step, grad=False) for step in steps[:-1]) + steps[-1:]
    assert estimate_memory(config, forward_only).activations_kept < memory.activations_kept / 8


def test_precision_and_frozen_parameters_change_memory() -> None:
    wide, steps = build(reuse(1, 1), precision="fp64")
    assert estimate_memory(wide, steps).parameters == 8 * count_parameters(wide).total
    half, _ = build(reuse(1, 1), precision="bf16")
    vectors = 5 * 128  # gains of the norms
    assert estimate_memory(half, steps).copies == 2 * (count_parameters(half).total - vectors)
    frozen = half.model_copy(
        update={"optimizer": half.optimizer.model_copy(update={"frozen": ("blocks.*",)})}
    )
    assert estimate_memory(frozen, steps).gradients == 4 * (1024 * 128 + 128)
    assert estimate_memory(frozen, steps).parameters == estimate_memory(half, steps).parameters


def test_tokens() -> None:
    config, _ = build(reuse(1))
    assert count_tokens_per_step(config) == 64 * 1024
    assert count_total_tokens(config) == 10 * 64 * 1024


def test_the_vocabulary_comes_from_the_tokenizer_when_left_out() -> None:
    config, _ = build(reuse(1), {k: v for k, v in SMALL.items() if k != "vocab_size"})
    resolved = resolve_vocab_size(config, {"bytes": 300}.__getitem__)
    assert resolved.model.vocab_size == 300 and config.model.vocab_size is None
    assert resolve_vocab_size(resolved, {}.__getitem__) == resolved


# ---------------------------------------------------------------------------- against the model


@dataclass
class Batch:
    """What the model reads of a micro batch."""

    tokens_BS: torch.Tensor
    labels_BS: torch.Tensor
    positions_BS: torch.Tensor
    documents_BS: torch.Tensor
    sample_ids_B: torch.Tensor
    single_document: bool = True


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def in_place_flops(_: object, left: list[int], right: list[int], **kwargs: object) -> int:
    """Torch's counter knows addmm, but not addmm_."""
    return 2 * left[0] * left[1] * right[1]


def step_once(config: Config) -> tuple[int, int, int]:
    """(forward FLOPs, all FLOPs, bytes kept for backward by the steps of the map)."""
    size = (config.train.micro_batch_size, config.data.seq_length)
    tokens = torch.zeros(size, dtype=torch.long)
    positions = torch.arange(size[1]).expand(size)
    batch = Batch(tokens, tokens, positions, torch.zeros_like(tokens), torch.arange(size[0]))
    model = Transformer(config)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own |= {weight.value().untyped_storage().data_ptr() for weight in model.weights()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ctx = model.context(batch, step=0, training=True)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_flops})
    with counter, saved_tensors_hooks(keep, lambda t: t):
        x = model.embed(batch.tokens_BS, ctx)
        x, _ = model.run(layer_map(config.recurrence), x, ctx, {})
        terms = model.loss(x, batch)
        forward = counter.get_total_flops()
        num_bytes = sum(storage.nbytes() for storage in kept.values())
        torch.stack([term.weight * term.total for term in terms.values()]).sum().backward()
    return forward, counter.get_total_flops(), num_bytes


LOOP = {"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": 4}


def halting(mode: str) -> dict[str, Any]:
    return {"kind": "universal", "depth": 4, "halting": {"mode": mode, "threshold": 1.0}}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("recurrence", "model"),
    [
        (reuse(2, 1, 1), {}),
        (reuse(2, 1), {"num_kv_heads": 2, "head_dim": 48, "norm_position": "sandwich"}),
        (reuse(2, 1), {"feed_forward": "gelu", "norm_position": "post", "tie_embeddings": False}),
        (LOOP, {}),
        (reuse(2, 1), {"norm_position": "peri", "feed_forward": "geglu_tanh", "qk_norm": True}),
        (reuse(2, 1), {"norm": "layer", "feed_forward": "gelu_tanh", "parallel_residual": True}
                      | {"rope_fraction": 0.5}),
        (reuse(2, 1), {"norm": "layer", "feed_forward": "gelu", "feed_forward_bias": True}
                      | {"gate": True, "gate_hidden_size": 320, "positions": "xpos"}),
        (halting("global"), {"norm": "layer", "gate": True}),
        (halting("token"), {}),
        (reuse(2, 1), {"attention_softcap": 2.0, "sliding_window": 9}
                      | {"attention_types": ["full", "sliding"]}),
    ],
)  # fmt: skip
def test_flops_and_activations_are_those_of_the_model(
    recurrence: dict[str, Any], model: dict[str, Any], recompute: bool
) -> None:
    """Torch's own counter sees the products; its hooks see what autograd keeps."""
    config, steps = build(recurrence, {**SMALL, **model}, micro_batch_size=2, recompute=recompute)
    config = config.model_copy(update={"data": config.data.model_copy(update={"seq_length": 64})})
    tokens = 2 * 64
    flops, memory = count_flops(config, steps), estimate_memory(config, steps)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel is opaque to the counter
        forward, everything, _ = step_once(config)
    assert forward == tokens * flops.forward
    assert everything == pytest.approx(tokens * flops.hardware, rel=2e-3)
    _, _, kept = step_once(config)
    logits = tokens * 1024 * 4
    if recompute:
        per_step = count_kept_elements(config.model, 64, config.parallel) * 4 * tokens
        assert memory.activations - per_step == pytest.approx(kept - logits, rel=0.25)
    else:
        assert memory.activations == pytest.approx(kept - logits, rel=0.03)


# ---------------------------------------------------------------------------------- the drawing


def drawn(order: list[int], width: int = 96) -> list[str]:
    return [line.rstrip() for line in draw_layer_map(from_order(order), width).plain.splitlines()]


def test_drawing_of_a_walk() -> None:
    assert drawn([0, 0, 1, 2, 0]) == [
        "step        0   1   2   3   4",
        "block 0     ●───●─╮       ╭─●     x3",
        "block 1           ╰─●─╮   │       x1",
        "block 2               ╰─●─╯       x1",
    ]


def test_drawing_of_reads_and_of_the_final_norm() -> None:
    _, steps = build({"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": 3,
                      "final_norm_after_core": True})  # fmt: skip
    lines = [line.rstrip() for line in draw_layer_map(steps).plain.splitlines()]
    assert "prelude         ◆   ▲   ▲" in lines
    assert "final norm                  N" in lines


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize(
    "order",
    [
        [*range(64)],
        [0] * 64,
        [i // 2 for i in range(64)],
        [*range(16), *range(15, -1, -1)],
        [0, *([1, 2, 3] * 40), 4],
        [*range(120)] * 2,
    ],
)
def test_drawings_fit_their_width_and_mark_every_step(order: list[int], width: int) -> None:
    lines = drawn(order, width)
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("step")
    marks = sum(line.count("●") for line in lines)
    assert marks == len(order) or len(order) > MAX_COLUMNS
    uses = [line for line in lines if "block" in line and " x" in line]
    assert uses, "the last band says how often each row ran"
