"""RingFormer (Heo et al. 2025; recurrence.md, section 3): parity with the authors' code, and what
its levels are equal to."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.configs import make_config
from support.decoding import VOCAB, compare_with_recomputation
from support.harness import Trace, assert_gradients_close, compare
from support.meshes import config_of, later, reference, trace
from support.models import assert_same, build, make_batch, make_model_config, objective, run
from support.pairs import collate, pair_config
from support.parity import FP32_TOL, cases, read_case
from support.pictures import batch_pictures, picture_config
from torch import Tensor, nn

from megarecur.config.run import Config
from megarecur.convert.hf import layers_of
from megarecur.convert.llama import LLAMA
from megarecur.errors import ConfigError
from megarecur.inference.cache import Cache
from megarecur.model.adapters import Adapter, informed
from megarecur.model.block import Block
from megarecur.model.compile import CompiledModel
from megarecur.model.transformer import Transformer
from megarecur.parallel import random
from megarecur.parallel.linear import product
from megarecur.plan.cost import count_flops, count_parameters
from megarecur.recurrence.inventory import ParameterSpec, build_inventory, is_embedding
from megarecur.recurrence.layer_map import from_order
from megarecur.recurrence.schemes import build_map, layer_map
from megarecur.train.verify import certified

RING = {"kind": "ring", "depth": 3, "level_rank": 3, "feed_forward_rank": 2}
FORMS: list[dict[str, Any]] = [
    {"norm_position": "post", "norm": "layer", "feed_forward": "gelu"},
    {"norm_position": "pre", "norm": "layer", "feed_forward": "gelu", "attention_bias": "all",
     "feed_forward_bias": True, "num_kv_heads": 2},
]  # fmt: skip


def noisy(spec: ParameterSpec, *args: Any) -> Tensor:
    """Initial values with signals that matter."""
    if ".signal_" in spec.name:
        spec = replace(spec, std=0.15)
    return random.initial_values(spec, *args)


def build_noisy(config: Config) -> Transformer:
    with mock.patch("megarecur.model.parts.initial_values", noisy):
        return build(config)


def ring(model: dict[str, Any], precision: str = "fp64", **recurrence: Any) -> Config:
    return make_model_config({**RING, **recurrence}, precision, **model)


# ---------------------------------------------------------------------------------------- parity

SIGNALS = {"Q": "query", "K": "key", "V": "value", "F": "feed_forward"}


class Theirs:
    """What of a case has no counterpart here, as leaves, and everything stored of it."""

    def __init__(self, path: Path, precision: str) -> None:
        self.case, arrays = read_case(path)
        dtype = torch.float64 if precision == "fp64" else torch.float32
        self.arrays = {k: v.to(dtype) if v.is_floating_point() else v for k, v in arrays.items()}
        self.weights = {
            k.removeprefix("w/"): v.clone().requires_grad_()
            for k, v in self.arrays.items() if k.startswith("w/")
        }  # fmt: skip

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.weights.items() if k.startswith(prefix)}

    def check(self, name: str, actual: Tensor, real: Tensor | None = None) -> None:
        expected = self.arrays[name]
        if real is not None:
            actual, expected = actual[real], expected[real]
        torch.testing.assert_close(
            actual.detach(), expected, rtol=FP32_TOL, atol=FP32_TOL,
            msg=lambda text: f"{name}: {text}",
        )  # fmt: skip

    def check_gradients(self, ours: dict[str, Tensor]) -> None:
        """All that are stored; those of key biases, which are zero, absolutely."""
        stored = {
            k.removeprefix("grad/"): v for k, v in self.arrays.items() if k.startswith("grad/")
        }
        own = {k: w.grad for k, w in self.weights.items() if w.grad is not None}
        found = {name: (ours | own)[name] for name in stored}
        zero = [name for name in stored if re.search(r"(k_proj|key)\.bias$", name)]
        for name in zero:
            torch.testing.assert_close(
                found.pop(name), torch.zeros_like(stored.pop(name)), rtol=0, atol=1e-6
            )
        assert_gradients_close(found, stored, FP32_TOL)


TRANSLATION = {
    "emb_layer.emb_layer": "embedding", "masked_self_attention": "attention",
    "self_attention": "attention", "enc_dec_attention": "cross_attention",
    "positionWiseFeedForward.FFN1.0": "feed_forward.up",
    "positionWiseFeedForward.FFN2.0": "feed_forward.down", "q_proj": "query", "k_proj": "key",
    "v_proj": "value", "attn_proj": "output",
}  # fmt: skip
NORMS = {  # of the encoder and of the decoder, by their number
    "encoder": ("attention_norm", "feed_forward_norm"),
    "decoder": ("attention_norm", "cross_attention_norm", "feed_forward_norm"),
}


def names_in_pair(name: str, levels: int) -> list[str]:
    """Our parameters that make theirs, one of each level where theirs holds all."""
    side, _, rest = name.partition(".")
    if side == "fc":
        return [f"head.{rest}"]
    block = 0 if side == "encoder" else 1
    if rest.startswith("emb_layer"):
        return ["source_embedding.weight" if side == "encoder" else "embedding.weight"]
    if match := re.fullmatch(r"layer_norms_0(\d)\.(\d+)\.(\w+)", rest):
        norm = NORMS[side][int(match[1]) - 1]
        return [f"blocks.{block}.loops.{match[2]}.{norm}.{match[3]}"]
    if match := re.fullmatch(r"lev_param_(?:SA_)?([QKVF])F?_0([12])", rest):
        of = f"signal_{SIGNALS[match[1]]}.{'ab'[int(match[2]) - 1]}"
        return [f"blocks.{block}.loops.{level}.{of}" for level in range(levels)]
    path = rest.split(".", 2)[2]
    for theirs, ours in TRANSLATION.items():
        path = path.replace(theirs, ours)
    return [f"blocks.{block}.{path}"]


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("path", cases("ringformer", "translation"))
def test_parity_ringformer_translation(path: Path, precision: str) -> None:
    """The whole model is ours: both embeddings, encoder, decoder and the biased head."""
    theirs = Theirs(path, precision)
    c, arrays, weights = theirs.case["config"], theirs.arrays, theirs.weights
    levels = {"encoder": c["enc_levels"], "decoder": c["dec_levels"]}
    ring = {"kind": "ring", "level_rank": c["rank"], "feed_forward_rank": c["rank"]}
    config = pair_config(
        {**ring, "depth": c["enc_levels"]}, {**ring, "depth": c["dec_levels"]}, precision,
        model={
            "hidden_size": c["d"], "num_heads": c["heads"], "head_dim": c["head_dim"],
            "ffn_hidden_size": c["ffn"], "feed_forward": "gelu", "norm_position": "post",
            "positions": "sinusoidal", "sinusoid_layout": "interleaved", "tie": "none",
            "head_bias": True,
            "attention_bias": "all" if c["bias"] else "none", "feed_forward_bias": c["bias"],
            "vocab_size": c["trg_vocab"], "source_vocab_size": c["src_vocab"],
        },
    )  # fmt: skip
    model = Transformer(config)
    given, missing = model.parameters_by_name, set(model.parameters_by_name)
    known = {
        name: names_in_pair(name, levels.get(name.partition(".")[0], 0))
        for name in weights if "pos_layer" not in name
    }  # fmt: skip
    for name, ours in known.items():
        values = weights[name].detach()
        for parameter, value in zip(
            (given[one] for one in ours), values if len(ours) > 1 else [values], strict=True
        ):
            parameter.data.copy_(value.T if parameter.shape != value.shape else value)
        missing -= set(ours)
    assert not missing
    model.refresh()
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _m, _i, out: seen[name].append(out))

    for number, side in enumerate(levels):
        block = model.blocks()[number]
        watch(f"{side} self_attn_branch", block.attention)
        watch(f"{side} ffn_branch", block.feed_forward)
        if block.cross_attention is not None:
            watch(f"{side} cross_attn_branch", block.cross_attention)
        for loop in block.adapters:
            assert isinstance(loop, Adapter)
            watch(f"{side} after_self_attn_ln", loop.norms["attention_norm"])
            if side == "decoder":
                watch(f"{side} after_cross_attn_ln", loop.norms["cross_attention_norm"])
    source, target = (
        [row[row != c["pad_id"]] for row in arrays[name]] for name in ("in/src", "in/trg")
    )
    batch = collate(source, target)  # Their last token is a label only.
    real_source, real = batch.source.documents_BS >= 0, batch.documents_BS >= 0
    states: list[Tensor] = []
    ctx, reads = model.context(batch, step=0, training=False, states=states), dict[str, Tensor]()
    x = model.enter(batch.tokens_BS, ctx, reads, batch.source)
    theirs.check("mid/enc/input_state", x)
    x, _ = model.run(build_map(config), x, ctx, reads)

    def check(name: str, actual: Tensor) -> None:
        """The positions that are read here, of all that they computed."""
        expected = arrays[name][:, : actual.shape[1]]
        kept = real_source if "enc" in name else real
        torch.testing.assert_close(
            actual.detach()[kept], expected[kept], rtol=FP32_TOL, atol=FP32_TOL,
            msg=lambda text: f"{name}: {text}",
        )  # fmt: skip

    check("out/encoder", reads["encoder"])
    check("out/decoder", x)
    check("out/logits", model.logits(x))
    watched = {name: list(found) for name, found in seen.items()}
    watched["encoder out"], watched["decoder out"] = (
        states[: c["enc_levels"]], states[c["enc_levels"] :],
    )  # fmt: skip
    for name, found in watched.items():
        side, _, branch = name.partition(" ")
        assert len(found) == levels[side], name
        for level, value in enumerate(found):
            check(f"mid/{side[:3]}/level{level}/{branch}", value)
    term = model.loss(x, batch)["loss"]
    loss = term.total / batch.num_tokens
    theirs.check("out/loss", loss)
    loss.backward()
    gradients = {}
    for name, ours in known.items():
        parts = [given[one].grad for one in ours]
        parts = [g.T if name.endswith("_01") else g for g in parts]
        gradients[name] = torch.stack(parts) if len(ours) > 1 else parts[0]
    theirs.check_gradients(gradients)


VISION = {
    "transformer.embeddings.patch_embeddings": "patches",
    "transformer.embeddings.cls_token": "class_token",
    "transformer.encoder.encoder_norm": "final_norm",
    "transformer.encoder.layers.0.attn.out": "blocks.0.attention.output",
    "transformer.encoder.layers.0.attn": "blocks.0.attention",
    "transformer.encoder.layers.0.ffn.fc1": "blocks.0.feed_forward.up",
    "transformer.encoder.layers.0.ffn.fc2": "blocks.0.feed_forward.down",
    "head": "task.output",
}
NORMS_OF_VISION = {"ATTN": "attention_norm", "FF": "feed_forward_norm"}


def names_in_vision(name: str, levels: int) -> list[str]:
    """Our parameters that make theirs, one of each level where theirs holds all."""
    if match := re.search(r"(\w+)_layer_norms\.(\d+)\.(\w+)$", name):
        return [f"blocks.0.loops.{match[2]}.{NORMS_OF_VISION[match[1]]}.{match[3]}"]
    if match := re.search(r"lev_embed_([QKVF])F?_0([12])$", name):
        of = f"signal_{SIGNALS[match[1]]}.{'ab'[int(match[2]) - 1]}"
        return [f"blocks.0.loops.{level}.{of}" for level in range(levels)]
    theirs = next(theirs for theirs in VISION if name.startswith(theirs))
    return [name.replace(theirs, VISION[theirs])]


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("path", cases("ringformer", "vision"))
def test_parity_ringformer_vision(path: Path, precision: str) -> None:
    """From pixels to gradients, the whole model is ours: patches, class token, positions, levels
    and the head of classes."""
    theirs = Theirs(path, precision)
    c, arrays, weights = theirs.case["config"], theirs.arrays, theirs.weights
    ring = {"kind": "ring", "depth": c["levels"], "level_rank": c["attn_signal_rank"],
            "feed_forward_rank": c["ffn_signal_rank"]}  # fmt: skip
    config = picture_config(
        ring, precision,
        task={
            "num_classes": c["classes"], "image_size": c["image"], "patch_size": c["patch"],
            "channels": c["channels"], "pooling": "class_token",
        },
        model={
            "hidden_size": c["d"], "num_heads": c["heads"], "head_dim": c["head_dim"],
            "ffn_hidden_size": c["ffn"], "feed_forward": "gelu", "norm_position": "pre",
            "positions": "sinusoidal", "sinusoid_layout": "interleaved",
            "attention_bias": "all", "feed_forward_bias": True, "final_norm_eps": 1e-6,
        },
    )  # fmt: skip
    model = Transformer(config)
    given, missing = model.parameters_by_name, set(model.parameters_by_name)
    known = {
        name: names_in_vision(name, c["levels"]) for name in weights if "pos_embed" not in name
    }
    for name, ours in known.items():
        values = weights[name].detach()
        for parameter, value in zip(
            (given[one] for one in ours), values if len(ours) > 1 else [values], strict=True
        ):
            value = value.T if name.endswith("_01") else value
            parameter.data.copy_(value.reshape(parameter.shape))
        missing -= set(ours)
    assert not missing
    model.refresh()
    seen: dict[str, list[Tensor]] = defaultdict(list)

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _m, _i, out: seen[name].append(out))

    block = model.blocks()[0]
    watch("attn_branch", block.attention)
    watch("ffn_branch", block.feed_forward)
    for loop in block.adapters:
        assert isinstance(loop, Adapter)
        watch("attn_norm_out", loop.norms["attention_norm"])
        watch("ff_norm_out", loop.norms["feed_forward_norm"])
    batch = batch_pictures(arrays["in/images"], arrays["in/labels"][:, None], config.num_positions)
    states: list[Tensor] = []
    ctx = model.context(batch, step=0, training=False, states=states)
    x = model.enter(batch.tokens_BS, ctx, {}, None, batch.pixels_BCHW)
    theirs.check("mid/input_state", x)
    x, _ = model.run(build_map(config), x, ctx, {})
    assert model.final_norm is not None
    theirs.check("out/encoded", model.final_norm(x))
    theirs.check("out/logits", model.readout.class_logits(x, batch))
    seen["out"] = states
    for name, found in seen.items():
        assert len(found) == c["levels"], name
        for level, value in enumerate(found):
            theirs.check(f"mid/level{level}/{name}", value)
    loss = model.loss(x, batch)["loss"].total / batch.num_tokens
    theirs.check("out/loss", loss)
    loss.backward()
    gradients = {}
    for name, ours in known.items():
        parts = [given[one].grad for one in ours]
        parts = [g.T if name.endswith("_01") else g for g in parts]
        whole = torch.stack(parts) if len(ours) > 1 else parts[0]
        gradients[name] = whole.reshape(weights[name].shape)
    theirs.check_gradients(gradients)


# --------------------------------------------------------------------- what levels are equal to


@pytest.mark.parametrize("form", FORMS)
def test_signals_of_zero_leave_a_cycle_with_norms_of_its_own(form: dict[str, Any]) -> None:
    """Section 3.8, check 1, and 6.5b: A = 0, as it starts, is CYCLE(1, N) with adapters whose rank
    adds nothing and norms per loop; with one set of norms, the plain CYCLE(1, N)."""
    batch = make_batch()
    loss, logits, grads = run(ring(form, "fp32"), batch)
    cycle = make_model_config({"kind": "cycle", "num_blocks": 1, "depth": 3}, "fp32", **form)
    relaxed = Config.model_validate(
        {**cycle.model_dump(), "adapters": {"rank": 2, "targets": ["down"], "norms": True}}
    )
    other = run(relaxed, batch)
    shared = {name: grads[name] for name in other[2] if name in grads}
    assert len(shared) == len(grads) - 4 * 3 * 2
    assert_same((loss, logits, shared), (*other[:2], {name: other[2][name] for name in shared}))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("depth", [1, 3])
def test_copied_norms_and_no_signals_leave_the_tied_layer(form, depth) -> None:
    """Check 2; one level is one layer of the vanilla model. Also 6.5b: the gradient of each shared
    parameter, and of copied norms together, is that of the tied layer."""
    batch, config = make_batch(), ring(form, "fp64", depth=depth)
    plain = {"kind": "cycle", "num_blocks": 1, "depth": depth}
    if depth == 1:
        plain = {"kind": "dense", "num_layers": 1}
    tied = build(make_model_config(plain, "fp64", **form))
    model = Transformer(config)
    for name, parameter in model.parameters_by_name.items():
        if ".signal_" not in name:
            parameter.data.copy_(tied.parameters_by_name[re.sub(r"loops\.\d\.", "", name)].data)
        elif name.endswith("a"):
            assert not parameter.any()
    loss, logits, grads = run(config, batch, False, model)
    expected = run(tied.config, batch, False, tied)
    torch.testing.assert_close((loss, logits), expected[:2], rtol=1e-12, atol=1e-12)
    summed: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    for name, grad in grads.items():
        if ".signal_" not in name:
            name = re.sub(r"loops\.\d\.", "", name)
            summed[name] = summed[name] + grad
    assert_gradients_close(dict(summed), expected[2], 1e-11)


def unrolled(model: Transformer) -> tuple[Transformer, Any]:
    """Check 3: the post-norm twin without signals. Layers have W + A^T B and W_1 (I + A^T B)."""
    depth = model.config.recurrence.depth
    form = model.config.model.model_dump()
    dense = make_model_config({"kind": "dense", "num_layers": depth}, "fp64", **form)
    twin, ours = Transformer(dense), model.parameters_by_name
    for name, parameter in twin.parameters_by_name.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.*)", name)
        if match is None:
            parameter.data.copy_(ours[name].data)
            continue
        level, rest = match.groups()
        own = f"blocks.0.loops.{level}."
        parameter.data.copy_(ours.get(own + rest, ours.get("blocks.0." + rest)).data)
        kind = rest.split(".")[1]
        if rest.endswith("weight") and own + f"signal_{kind}.a" in ours:
            a, b = (ours[own + f"signal_{kind}.{factor}"].data for factor in "ab")
            parameter.data += a @ b
        if rest == "feed_forward.up.weight":
            a, b = (ours[own + f"signal_feed_forward.{factor}"].data for factor in "ab")
            parameter.data += parameter.data @ (a @ b)
    twin.refresh()
    return twin, from_order(range(depth))


def test_post_norm_signals_are_deltas_of_matrices() -> None:
    model, batch = build_noisy(ring(FORMS[0])), make_batch()
    twin, steps = unrolled(model)
    loss, logits = objective(model, layer_map(model.config.recurrence), batch)
    expected = objective(twin, steps, batch)
    torch.testing.assert_close((loss, logits), expected, rtol=1e-11, atol=1e-11)
    with pytest.raises(AssertionError):
        ours = model.parameters_by_name["blocks.0.loops.2.signal_value.a"]
        ours.data.zero_()
        model.refresh()
        again = objective(model, layer_map(model.config.recurrence), batch)
        torch.testing.assert_close(again, expected, rtol=1e-11, atol=1e-11)


def loops_of(model: Transformer) -> tuple[Block, list[Adapter]]:
    block = model.runner.blocks["0"]
    assert isinstance(block, Block)
    return block, [loop for loop in block.adapters if isinstance(loop, Adapter)]


def test_thin_products_are_those_of_the_whole_matrix() -> None:
    """Check 4: M x = A^T (B x), of attention and of the feed-forward."""
    model = build_noisy(ring(FORMS[1]))
    _, (loop, *_) = loops_of(model)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    for name in ("query", "key", "value", "feed_forward"):
        a, b = (
            model.parameters_by_name[f"blocks.0.loops.0.signal_{name}.{factor}"] for factor in "ab"
        )
        assert a.shape == ({"key": 16, "value": 16}.get(name, 32), b.shape[0])
        signal = loop.signal if name == "feed_forward" else loop.deltas[name]
        thin = product(product(x, signal.a), signal.b)  # type: ignore[union-attr, arg-type]
        torch.testing.assert_close(thin, x @ (a @ b).T)
        assert thin.norm() > 0.1
    torch.testing.assert_close(informed(x, loop), x + thin)


def test_the_feed_forward_signal_enters_the_branch_only() -> None:
    """Check 6: with W_2 = 0 a level gives LN(a), a being what attention leaves."""
    model, batch = build_noisy(ring(FORMS[0], depth=1)), make_batch()
    _, (loop,) = loops_of(model)
    model.parameters_by_name["blocks.0.feed_forward.down.weight"].data.zero_()
    model.refresh()
    seen: list[Tensor] = []
    loop.norms["attention_norm"].register_forward_hook(lambda _m, _i, out: seen.append(out))
    states: list[Tensor] = []
    ctx = model.context(batch, step=0, training=False, states=states)
    model.run(from_order([0]), model.embed(batch.tokens_BS, ctx), ctx, {})
    torch.testing.assert_close(states[0], loop.norms["feed_forward_norm"](seen[0]))


def test_pre_norm_signals_read_the_stream_itself() -> None:
    """Check 8: a stream twice as large leaves LN(x) as it is, and queries change by M x alone."""
    model, batch = build_noisy(ring({**FORMS[1], "positions": "none"})), make_batch()
    block, (loop, *_) = loops_of(model)
    ctx = model.context(batch, step=0, training=False)
    step = layer_map(model.config.recurrence)[0]
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    normed = loop.norms["attention_norm"](x)
    once, twice = (
        block.attention.project(normed, ctx.view(False), step, loop, c * x) for c in (1, 2)
    )
    for name, before, after in zip(("query", "key", "value"), once, twice, strict=True):
        signal = loop.deltas[name]
        moved = product(product(x, signal.a), signal.b)  # type: ignore[arg-type]
        torch.testing.assert_close((after - before).flatten(2), moved)
        assert moved.norm() > 0.1


# -------------------------------------------------------------------------------------- inventory


def decoder_size(d: int, f: int, levels: int, rank: int) -> int:
    """8 d^2 + 2 d f + N (6 d + 8 r d): of a decoder with cross-attention (recurrence.md, 3.4)."""
    return 8 * d * d + 2 * d * f + levels * (6 * d + 8 * rank * d)


@pytest.mark.parametrize(
    ("d", "encoder", "whole"), [(512, 3_944_448, 8_943_616), (1024, 15_753_216, 35_713_024)]
)
def test_sizes_are_those_of_the_paper(d: int, encoder: int, whole: int) -> None:
    """Bias-free, r = d / 16, f = 4 d, N = 6: 8.94M and 35.71M with the decoder's formula. Our
    inventory has the encoder's part, 4 d^2 + 2 d f + N (4 d + 8 r d)."""
    recurrence = {"kind": "ring", "depth": 6, "level_rank": d // 16}
    form = {**FORMS[0], "hidden_size": d, "num_heads": 8, "ffn_hidden_size": 4 * d, "causal": False}
    config = make_model_config(recurrence, "fp32", **form)
    heads = [s.size for s in build_inventory(config).values() if s.name.startswith("task.")]
    size = count_parameters(config).non_embedding - sum(heads)
    assert size == encoder == 4 * d * d + 8 * d * d + 6 * (4 * d + 8 * d // 16 * d)
    assert size + decoder_size(d, 4 * d, 6, d // 16) == whole
    signals = [s.size for s in build_inventory(config).values() if ".signal_" in s.name]
    assert 2 * sum(signals) == 6 * d * d  # N d^2 with the decoder's


def test_size_with_biases_is_the_formula_of_vision() -> None:
    """Section 3.4: configuration B, without patches, class token and head."""
    d, f, levels, rank = 1284, 5120, 12, 80
    shape = {"num_heads": 12, "num_kv_heads": 12, "hidden_size": d, "ffn_hidden_size": f}
    form = {**FORMS[1], **shape, "positions": "none"}
    config = make_model_config(
        {"kind": "ring", "depth": levels, "level_rank": rank}, "fp32", **form
    )
    size = sum(s.size for s in build_inventory(config).values() if not is_embedding(s.name))
    block = 4 * d * d + 4 * d + 2 * d * f + f + d
    assert size == block + 8 * levels * rank * d + 4 * levels * d + 2 * d


def test_levels_cost_their_thin_products() -> None:
    """8 r d multiply-adds per token and level (section 3.4)."""
    config, none = ring(FORMS[0]), ring(FORMS[0], level_rank=0, feed_forward_rank=0)
    steps = layer_map(config.recurrence)
    extra = 3 * 2 * 32 * (3 * 3 + 2)
    assert count_parameters(config).total - count_parameters(none).total == extra
    assert count_flops(config, steps).forward - count_flops(none, steps).forward == 2 * extra


def test_initial_signals() -> None:
    """A 0; B as the authors', or scaled."""
    for how, std in (("authors", 1e-6), ("scaled", 32**-0.5)):
        model = Transformer(ring(FORMS[0], signal_init=how, level_rank=16))
        values = model.parameters_by_name
        assert not any(p.any() for n, p in values.items() if n.endswith(".a"))
        b = values["blocks.0.loops.1.signal_key.b"]
        assert 0.9 * std < b.std().item() < 1.1 * std


# ---------------------------------------------------------------------------------------- engines


def noisy_trace(config: Config, num_steps: int) -> Trace:
    with mock.patch("megarecur.model.parts.initial_values", noisy):
        return trace(config, num_steps)


def noisy_reference(config: Config, num_steps: int) -> Trace:
    with mock.patch("megarecur.model.parts.initial_values", noisy):
        return reference(config, num_steps)


POST, PRE = FORMS
ENGINES = [
    # processes, parallel, model, other sections
    (2, {"tensor": 2}, PRE, {}),
    (2, {"tensor": 2, "sequence_parallel": True}, POST, {}),
    later(2, {}, POST, {}),
    later(2, {"zero_stage": 1}, PRE, {}),
    later(2, {"zero_stage": 3}, POST, {"train": {"recompute": True}}),
    later(2, {"tensor": 2, "sequence_parallel": True}, PRE, {"train": {"precision": "fp64"}}),
    later(4, {"tensor": 2, "zero_stage": 3, "sequence_parallel": True}, PRE, {}),
]


@pytest.mark.parametrize(("processes", "parallel", "form", "extra"), ENGINES)
def test_ranks_equal_one_process(world, corpus, processes, parallel, form, extra) -> None:
    model = {**form, **extra.get("model", {})}
    config = config_of(
        corpus, "dense", 1, recurrence=RING, parallel=parallel, **{**extra, "model": model}
    )
    tolerances = (1e-11, 1e-11) if config.train.precision == "fp64" else (2e-6, 2e-5)
    traces = world(processes).run(noisy_trace, config, 3)
    compare(traces[0], noisy_reference(config, 3), *tolerances)
    gradients = traces[0][0][1]
    assert all(g.norm() > 0 for name, g in gradients.items() if ".signal_" in name)


@pytest.mark.parametrize("form", FORMS)
def test_cached_keys_and_values_are_those_of_levels(form) -> None:
    model = build_noisy(ring({**form, "vocab_size": VOCAB}, "fp32"))
    compare_with_recomputation(model, Cache())


@pytest.mark.parametrize("form", FORMS)
def test_one_graph_serves_all_levels(form) -> None:
    found = []
    for compiled in (False, True):
        model = build_noisy(ring(form))
        parts = CompiledModel(model, lambda graph, inputs: graph) if compiled else None
        found.append(run(model.config, make_batch(), True, model))
    assert parts is not None and parts.graphs == 1
    assert_gradients_close(found[1][2], found[0][2], 1e-11)


# ------------------------------------------------------------------------------- mistakes, exports


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"recurrence": {**RING, "level_rank": 33}}, "level_rank=33 is above model.hidden_size=32"),
        ({"recurrence": {**RING, "feed_forward_rank": 40}}, "recurrence.feed_forward_rank=40 is "),
        ({"recurrence": {**RING, "level_rank": -1}}, "recurrence.level_rank"),
        ({"recurrence": {"kind": "ring", "depth": 3}}, "recurrence.level_rank: required"),
        ({"recurrence": {**RING, "signal_init": "zero"}}, "recurrence.signal_init"),
        ({"recurrence": RING, "model": {"norm_position": "peri"}}, "norm_position post and pre"),
        ({"recurrence": RING, "model": {"parallel_residual": True}}, "parallel_residual=true: lev"),
        ({"recurrence": RING, "adapters": {"rank": 2, "norms": True}}, "adapters.norms=true: wit"),
        ({"recurrence": RING, "adapters": {"rank": 2}}, "key, query, value have level signals"),
        ({"recurrence": RING, "parallel": {"pipeline": 2}}, "pipeline=2 exceeds the number of blo"),
    ],
)  # fmt: skip
def test_mistakes_are_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(**sections)
    assert said in str(caught.value)


def test_other_layers_may_have_adapters_beside_signals() -> None:
    config = make_config(
        recurrence=RING, adapters={"rank": 2, "targets": ["up"]}, model={"vocab_size": 9}
    )
    names = [name for name in build_inventory(config) if "loops.1." in name]
    assert {"blocks.0.loops.1.up.lora_a", "blocks.0.loops.1.signal_query.a"} <= set(names)


def test_the_parity_certificate_has_room_for_small_ranks() -> None:
    config = make_config(recurrence={**RING, "level_rank": 32}, model={"hidden_size": 128})
    assert certified(config, small=True, dp=1).recurrence.level_rank == 8


def test_no_architecture_of_other_libraries_has_level_signals() -> None:
    config = make_config(recurrence=RING, model={"vocab_size": 9})
    with pytest.raises(ConfigError, match="has no level signals"):
        layers_of(config, LLAMA)
