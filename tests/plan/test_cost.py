"""Parameters, executed FLOPs, memory and tokens (recurrence.md, section 1.2)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.engines import aot_eager
from support.models import make_batch, step_once
from support.pictures import make_pictures, picture_config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megarecur.config.load import validate
from megarecur.config.run import Config
from megarecur.config.train import RecomputeLoops
from megarecur.launch.drawing import MAX_COLUMNS, draw_layer_map
from megarecur.model.compile import CompiledModel
from megarecur.model.transformer import Transformer
from megarecur.plan.cost import (
    LOGIT_SLICE,
    Seen,
    chunk_tokens,
    count_flops,
    count_head_flops,
    count_parameters,
    count_remade_bytes,
    count_step_flops,
    count_tokens_per_step,
    count_total_tokens,
    count_unrolled_parameters,
    dense_twin,
    estimate_memory,
    is_chunked,
    with_recompute,
)
from megarecur.plan.describe import resolve_vocab_size
from megarecur.recurrence.layer_map import LayerMap, from_order, mark
from megarecur.recurrence.schemes import layer_map

SMALL = {"hidden_size": 128, "num_heads": 4, "ffn_hidden_size": 512, "vocab_size": 1024}
LARGE = {"hidden_size": 768, "num_heads": 8, "ffn_hidden_size": 3072, "vocab_size": 32000}


def config_and_map(
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
    config, steps = config_and_map(reuse(*uses), model)
    pairs = Seen(config.data.seq_length, config.data.seq_length)  # all S x S, as papers count
    flops, dense = (count_flops(config, each, pairs) for each in (steps, dense_twin(steps)))
    assert flops.forward / dense.forward == pytest.approx(ratio, abs=0.005)
    assert flops.train == 3 * flops.forward
    again = count_head_flops(config) if is_chunked(config) else 0
    assert flops.hardware == flops.train + again


def test_forward_flops_are_the_formula() -> None:
    """2 [sum r (4 d^2 + 3 d f) + V d] + sum r 4 d (S + 1) / 2: half of the pairs are causal."""
    config, steps = config_and_map(reuse(4, 2, 1, 1))
    d, f, vocab, seq_length = 128, 512, 1024, 1024
    expected = 2 * (8 * (4 * d * d + 3 * d * f) + vocab * d) + 8 * 2 * (seq_length + 1) * d
    assert count_flops(config, steps).forward == expected


def test_flops_are_linear_in_the_uses() -> None:
    totals = [count_flops(*config_and_map(reuse(r, 1, 1, 1))).forward for r in (1, 2, 3)]
    assert totals[1] - totals[0] == totals[2] - totals[1] > 0


def test_the_adapter_counts_at_each_use() -> None:
    values = {"kind": "loop", "prelude": 1, "core": 1, "coda": 0, "num_loops": 3}
    linear, steps = config_and_map({**values, "injection": "linear"})
    added, _ = config_and_map({**values, "injection": "add"})
    extra = [a - b for a, b in zip(count_step_flops(linear, steps), count_step_flops(added, steps),
                                   strict=True)]  # fmt: skip
    assert extra == [0, *[2 * 128 * 256] * 3]
    assert (
        count_flops(linear, dense_twin(steps)).forward
        == count_flops(added, dense_twin(steps)).forward
    )


def test_steps_without_gradient_and_recompute() -> None:
    config, steps = config_and_map(reuse(2, 1), recompute=True)
    steps = mark(steps, 0, grad=False)
    flops, per_step = count_flops(config, steps), count_step_flops(config, steps)
    head = count_head_flops(config)
    assert flops.train == per_step[0] + 3 * (per_step[1] + per_step[2] + head)
    assert flops.hardware == flops.train + per_step[1] + per_step[2]


def test_an_exit_pays_for_its_head() -> None:
    config, steps = config_and_map(reuse(2, 1))
    early = mark(mark(steps, 0, exit=True), 2, exit=True)  # the last step has the head anyway
    extra = count_flops(config, early).forward - count_flops(config, steps).forward
    assert extra == count_head_flops(config)


def test_parameters_unique_and_unrolled() -> None:
    config, steps = config_and_map(reuse(4, 2, 1, 1))
    unique, unrolled = count_parameters(config), count_unrolled_parameters(config, steps)
    assert (unique.total, unique.non_embedding) == (1_180_800, 1_180_800 - 1024 * 128)
    block = (unique.non_embedding - 128) // 4
    assert unrolled.total == unique.total + 4 * block
    assert unrolled.non_embedding == unique.non_embedding + 4 * block
    dense, dense_steps = config_and_map({"kind": "dense", "num_layers": 4})
    assert count_unrolled_parameters(dense, dense_steps) == count_parameters(dense) == unique


def test_memory_by_kind() -> None:
    config, steps = config_and_map(reuse(4, 2, 1, 1))
    memory = estimate_memory(config, steps)
    assert memory.parameters == memory.gradients == 4 * 1_180_800
    assert (memory.moments, memory.copies) == (8 * 1_180_800, 0)
    assert memory.logits == 8 * 1024 * 1024 * 8
    assert memory.mask == 0  # documents are attended to by themselves
    dense = config.model_copy(
        update={"train": config.train.model_copy(update={"attention": "dense"})}
    )
    assert estimate_memory(dense, steps).mask == 8 * 1024 * 1024 * 4  # whatever the head
    assert memory.total == memory.state + memory.activations + memory.logits + memory.mask


def test_logits_of_chunks_are_counted_once_and_computed_twice() -> None:
    """8 x 1,024 tokens at 32,000 ids are 8 chunks; a vocabulary cut over 16 ranks is one."""
    config, steps = config_and_map(reuse(2, 1), LARGE)
    assert chunk_tokens(8192, 32000) == 1024 and is_chunked(config)
    memory = estimate_memory(config, steps)
    assert memory.logits == 4 * 1024 * 32000 + 4 * LOGIT_SLICE
    flops = count_flops(config, steps)
    assert flops.recompute == count_head_flops(config)
    cut = config.model_copy(
        update={
            "model": config.model.model_copy(update={"num_heads": 16, "num_kv_heads": 16}),
            "parallel": config.parallel.model_copy(update={"tensor": 16}),
        }
    )
    assert not is_chunked(cut) and count_flops(cut, steps).recompute == 0
    assert estimate_memory(cut, steps).logits == 4 * 8192 * 2000 + 4 * LOGIT_SLICE


def test_memory_follows_the_unrolled_depth_and_recompute_saves() -> None:
    kept = [estimate_memory(*config_and_map(reuse(r, 1))).activations for r in (1, 2, 3)]
    assert kept[1] - kept[0] == kept[2] - kept[1] > 0
    config, steps = config_and_map(reuse(8, 8), recompute=True)
    whole = estimate_memory(with_recompute(config, "none"), steps).activations
    some = estimate_memory(with_recompute(config, RecomputeLoops(loops=(1, 2))), steps).activations
    selective = estimate_memory(with_recompute(config, "selective"), steps).activations
    full = estimate_memory(config, steps).activations
    assert full < whole / 3 < selective < some < whole
    forward_only = tuple(replace(step, grad=False) for step in steps[:-1]) + steps[-1:]
    assert estimate_memory(with_recompute(config, "none"), forward_only).activations < whole / 8


def test_moved_activations_are_not_on_the_device() -> None:
    config, steps = config_and_map(reuse(8, 8), recompute="none", offload_activations=True)
    memory = estimate_memory(config, steps)
    stays = config.model_copy(
        update={"train": config.train.model_copy(update={"offload_activations": False})}
    )
    assert memory.activations < estimate_memory(stays, steps).activations / 6
    assert memory.total - memory.activations == (
        estimate_memory(stays, steps).total - estimate_memory(stays, steps).activations
    )


def test_precision_and_frozen_parameters_change_memory() -> None:
    wide, steps = config_and_map(reuse(1, 1), precision="fp64")
    assert estimate_memory(wide, steps).parameters == 8 * count_parameters(wide).total
    half, _ = config_and_map(reuse(1, 1), precision="bf16")
    vectors = 5 * 128  # gains of the norms
    assert estimate_memory(half, steps).copies == 2 * (count_parameters(half).total - vectors)
    frozen = half.model_copy(
        update={"optimizer": half.optimizer.model_copy(update={"frozen": ("blocks.*",)})}
    )
    assert estimate_memory(frozen, steps).gradients == 4 * (1024 * 128 + 128)
    assert estimate_memory(frozen, steps).parameters == estimate_memory(half, steps).parameters


def test_tokens() -> None:
    config, _ = config_and_map(reuse(1))
    assert count_tokens_per_step(config) == 64 * 1024
    assert count_total_tokens(config) == 10 * 64 * 1024


def test_the_vocabulary_comes_from_the_tokenizer_when_left_out() -> None:
    config, _ = config_and_map(reuse(1), {k: v for k, v in SMALL.items() if k != "vocab_size"})
    resolved = resolve_vocab_size(config, {"bytes": 300}.__getitem__)
    assert resolved.model.vocab_size == 300 and config.model.vocab_size is None
    assert resolve_vocab_size(resolved, {}.__getitem__) == resolved


# ---------------------------------------------------------------------------- against the model


LOOP = {"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": 4}


def halting(mode: str) -> dict[str, Any]:
    return {"kind": "universal", "depth": 4, "halting": {"mode": mode, "threshold": 1.0}}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("recompute", ["none", "selective", "full", {"loops": [0]}])
@pytest.mark.parametrize(
    ("recurrence", "model"),
    [
        (reuse(2, 1, 1), {"dropout": 0.1}),
        ({"kind": "dense", "num_layers": 3}, {"num_kv_heads": 1}),
        (reuse(2, 1), {"num_kv_heads": 2, "head_dim": 48, "norm_position": "sandwich"}),
        (reuse(2, 1), {"feed_forward": "gelu", "norm_position": "post", "tie_embeddings": False}),
        (LOOP, {}),
        (reuse(2, 1), {"norm_position": "peri", "feed_forward": "geglu_tanh", "qk_norm": True}),
        (reuse(2, 1), {"norm_position": "output", "qk_norm": True, "qk_norm_over": "all"}),
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
    recurrence: dict[str, Any], model: dict[str, Any], recompute: Any
) -> None:
    """Torch's own counter sees the products; a dispatch mode sees what is alive after forward."""
    config, steps = config_and_map(
        recurrence, {**SMALL, **model}, micro_batch_size=2, recompute=recompute
    )
    config = config.model_copy(update={"data": config.data.model_copy(update={"seq_length": 64})})
    tokens = 2 * 64
    # The oracle computes all pairs. Fused kernels are opaque to the counter, and the other backends
    # compute scores again in backward, which by convention does not count.
    dense = config.model_copy(
        update={"train": config.train.model_copy(update={"attention": "dense"})}
    )
    flops, memory = count_flops(config, steps, Seen(64, 64)), estimate_memory(config, steps)
    with sdpa_kernel(SDPBackend.MATH):
        forward, everything, _ = step_once(dense)
    assert forward == tokens * flops.forward
    assert everything == pytest.approx(tokens * flops.hardware, rel=2e-3)
    _, _, kept = step_once(config)
    logits, remade = tokens * 1024 * 4, tokens * count_remade_bytes(config, steps)
    assert memory.activations - remade == pytest.approx(kept - logits, rel=0.06)


class Counted:
    """Copies to the host that stay where they are, and the bytes of all of them."""

    num_bytes = 0

    def leaves(self, tensor: Tensor) -> bool:
        return True

    def out(self, flat: Tensor) -> Tensor:
        self.num_bytes += flat.nbytes
        return flat

    def back(self, host: Tensor, device: torch.device) -> Tensor:
        return host

    def wait(self, fetched: Tensor) -> Tensor:
        return fetched


@pytest.mark.parametrize(
    ("recompute", "model"),
    [("none", {}), ("selective", {"dropout": 0.1}),
     ("selective", {"num_kv_heads": 2, "norm_position": "sandwich", "qk_norm": True})],
)  # fmt: skip
def test_compiled_blocks_keep_what_check_says(recompute: str, model: dict[str, Any]) -> None:
    """The compiler chooses what it keeps, and `selective` tells it to keep little."""
    config, steps = config_and_map(
        reuse(2, 1), {**SMALL, **model}, micro_batch_size=2, recompute=recompute
    )
    config = config.model_copy(update={"data": config.data.model_copy(update={"seq_length": 64})})
    built, batch, copies = Transformer(config), make_batch(2, 64), Counted()
    built.host_copies = copies
    CompiledModel(built, aot_eager)
    ctx = built.context(batch, step=0, training=True)
    x, _ = built.run(steps, built.embed(batch.tokens_BS, ctx), ctx, {})
    remade = 2 * 64 * count_remade_bytes(config, steps)
    planned = estimate_memory(config, steps).activations - remade
    assert copies.num_bytes == pytest.approx(planned, rel=0.1)
    x.sum().backward()


@pytest.mark.parametrize("pooling", ["mean", "class_token"])
def test_pictures_cost_what_torch_counts(pooling: str) -> None:
    """Patches are projected once, and pixels need no gradient."""
    config = picture_config(
        {"kind": "cycle", "num_blocks": 1, "depth": 2}, "fp32",
        model={"hidden_size": 64, "ffn_hidden_size": 96},
        task={"image_size": 16, "patch_size": 2, "channels": 3, "pooling": pooling},
        train={"micro_batch_size": 2},
    )  # fmt: skip
    steps, batch = layer_map(config.recurrence), make_pictures(config, 2)
    tokens = 2 * config.num_positions
    dense = config.model_copy(
        update={"train": config.train.model_copy(update={"attention": "dense"})}
    )
    flops, memory = count_flops(config, steps), estimate_memory(config, steps)
    with sdpa_kernel(SDPBackend.MATH):
        forward, everything, _ = step_once(dense, batch)
    assert forward == pytest.approx(tokens * flops.forward, rel=1e-3)
    assert everything == pytest.approx(tokens * flops.hardware, rel=1e-3)
    _, _, kept = step_once(config, batch)
    assert memory.activations == pytest.approx(kept, rel=0.06)


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
    _, steps = config_and_map({"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": 3,
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
