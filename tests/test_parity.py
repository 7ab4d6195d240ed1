"""Parity with the authors' own code: tiny models they ran, with weights, states and gradients.

Every case is found by its JSON under the development data; options and shapes are read from it.
A system is one function from a case's `config` to ours, and one from their parameter names to ours.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import assert_gradients_close
from safetensors.torch import load_file
from test_model import Batch
from torch import Tensor

from megarecur.config.schema import Config
from megarecur.model.context import Context
from megarecur.model.halting import Mixture
from megarecur.model.temporal import Chunk, additive, build_chunks
from megarecur.model.transformer import Transformer
from megarecur.recurrence.depth import Depth
from megarecur.recurrence.inventory import build_inventory
from megarecur.recurrence.layer_map import LayerMap
from megarecur.recurrence.schemes import layer_map

Case = dict[str, Any]
FP32_TOL, FP64_FORWARD_TOL, FP64_TOL = 1e-4, 1e-12, 1e-11


def cases(system: str, prefix: str = "") -> list[Any]:
    """The cases of a system, or of one kind; one that skips, saying why, where there are none."""
    named = os.environ.get("MEGARECUR_DATA")
    data = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    found = sorted((data / "parity" / system).glob(f"{prefix}*.json"))
    if not found:
        missing = f"no {system} cases under {data / 'parity'}; set MEGARECUR_DATA to the data"
        return [pytest.param(Path(), marks=pytest.mark.skip(reason=missing), id="missing")]
    return [pytest.param(path, id=path.stem) for path in found]


ENCODER: dict[str, Any] = {"task": {"kind": "token", "num_classes": 2, "head_size": 0}}
"""An encoder needs a task; heads are made in the tests, of the cases' weights."""


def make_config(
    case: Case,
    precision: str,
    model: Case,
    recurrence: Case,
    adapters: Case | None = None,
    **sections: Any,
) -> Config:
    """Their shapes in our words."""
    c = case["config"]
    shape = {"hidden_size": c["d"], "num_heads": c["h"], "head_dim": c["head_dim"],
             "ffn_hidden_size": c["ffn"], "vocab_size": c["V"],
             "norm_eps": case["eps"]}  # fmt: skip
    return Config.model_validate({
        "run_dir": "run", "model": shape | model, "recurrence": recurrence,
        "adapters": adapters,
        "data": {"train": [{"path": "none"}], "tokenizer": "bytes", "seq_length": c["T"]},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1,
                  "precision": precision},
        **sections,
    })  # fmt: skip


# --------------------------------------------------------------------- the systems in our words


def reuse_config(case: Case, precision: str) -> Config:
    """Intra-layer recurrence, and its baseline that repeats the whole stack."""
    c = case["config"]
    positions = {"nope": "none", "rope": "rope", "ape": "learned", "alibi": "alibi"}[c["pe"]]
    recurrence = {"kind": "reuse_map", "reuse_map": c["map"]}
    if c["seq"]:
        recurrence = {"kind": "block_recurrence", "num_blocks": c["L"], "num_loops": c["loops"],
                      "injection": "add" if c["inj"] else "none"}  # fmt: skip
    model = {"positions": positions, "num_kv_heads": c["kv"], "max_positions": c["maxpos"],
             "rope_theta": c["rope_theta"], "tie_embeddings": True}  # fmt: skip
    return make_config(case, precision, model, recurrence)


def reuse_names(case: Case, name: str) -> list[str]:
    """Our parameters that make theirs, row after row."""
    outer = {
        "embed_tokens": "embedding.weight",
        "embed_positions": "embedding.positions",
        "norm": "final_norm.weight",
    }
    inner = {
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.output",
        "mlp.gate_proj": "feed_forward.gate",
        "mlp.up_proj": "feed_forward.up",
        "mlp.down_proj": "feed_forward.down",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "feed_forward_norm",
    }
    name = name.removeprefix("model.").removesuffix(".weight")
    if name in outer:
        return [outer[name]]
    match = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
    assert match, name
    return [f"blocks.{match[1]}.{inner[match[2]]}.weight"]


def loop_config(case: Case, precision: str) -> Config:
    """Huginn: prelude, core, coda; sandwich norms; the final norm twice."""
    c = case["config"]
    assert not c["bias"], "the adapter of this case has a bias, which ours lacks"
    recurrence = {
        "kind": "loop", "prelude": c["P"], "core": c["C"], "coda": c["D"],
        "num_loops": c["num_steps_no_grad"] + c["num_steps_with_grad"],
        "injection": "linear", "initial_state": "random", "final_norm_after_core": True,
    }  # fmt: skip
    model = {"positions": "rope", "rope_interleaved": True, "rope_theta": c["theta"],
             "norm_position": "sandwich", "attention_bias": "qk" if c["qk_bias"] else "none",
             "tie_embeddings": c["tie"], "scale_embeddings": True}  # fmt: skip
    return make_config(case, precision, model, recurrence)


def loop_names(case: Case, name: str) -> list[str]:
    """Our parameters that make theirs, row after row."""
    c = case["config"]
    name = name.removeprefix("transformer.")
    outer = {
        "wte.weight": "embedding.weight",
        "ln_f.weight": "final_norm.weight",
        "lm_head.weight": "head.weight",
        "adapter.weight": f"blocks.{c['P']}.injection.weight",
    }
    inner = {
        "norm_1.weight": ["attention_norm.weight"],
        "norm_2.weight": ["attention_output_norm.weight"],
        "norm_3.weight": ["feed_forward_norm.weight"],
        "norm_4.weight": ["feed_forward_output_norm.weight"],
        "attn.Wqkv.weight": [f"attention.{part}.weight" for part in ("query", "key", "value")],
        "attn.qk_bias": ["attention.query.bias", "attention.key.bias"],
        "attn.proj.weight": ["attention.output.weight"],
        "mlp.fc.weight": ["feed_forward.gate.weight", "feed_forward.up.weight"],
        "mlp.proj.weight": ["feed_forward.down.weight"],
    }
    if name in outer:
        return [outer[name]]
    match = re.fullmatch(r"(prelude|core_block|coda)\.(\d+)\.(.*)", name)
    assert match, name
    first = {"prelude": 0, "core_block": c["P"], "coda": c["P"] + c["C"]}[match[1]]
    return [f"blocks.{first + int(match[2])}.{part}" for part in inner[match[3]]]


def relaxed_config(case: Case, precision: str) -> Config:
    """Relaxed Recursive Transformers: any map, adapters of some layers, norms tied or not."""
    c, ties = case["config"], case["tie_first_index"]
    assert c["target_modules"] and len(set(case["lora_scaling"].values())) == 1
    model = {"num_kv_heads": c["kv_heads"], "rope_theta": c["rope_theta"], "tie_embeddings": False}
    case["config"] = c | {"h": c["heads"]}
    recurrence = {"kind": "custom", "order": case["order"]}
    adapters = {
        "rank": c["rank_requested"],
        "scale": next(iter(case["lora_scaling"].values())),
        "targets": [RELAXED_TARGETS[name] for name in c["target_modules"]],
        "norms": ties["norms"] != ties["linears"],
    }
    return make_config(case, precision, model, recurrence, adapters)


RELAXED_TARGETS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output",
                   "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}  # fmt: skip


def relaxed_names(case: Case, name: str) -> list[str]:
    """Our parameters that make theirs, which are named by unrolled layer."""
    if name == "lm_head.weight":
        return ["head.weight"]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
    if match is None:
        return reuse_names(case, name)
    layer, rest = int(match[1]), match[2]
    block, loop = case["order"][layer], case["order"][:layer].count(case["order"][layer])
    if factor := re.fullmatch(r"(?:.*\.)?(\w+)\.lora_([AB])\.weight", rest):
        target = RELAXED_TARGETS[factor[1]]
        return [f"blocks.{block}.loops.{loop}.{target}.lora_{factor[2].lower()}"]
    ours = reuse_names(case, f"model.layers.{block}.{rest}")[0]
    ties = case["tie_first_index"]
    if "norm" in rest and ties["norms"] != ties["linears"]:
        ours = ours.replace(f"blocks.{block}.", f"blocks.{block}.loops.{loop}.")
    return [ours]


def temporal_config(case: Case, precision: str) -> Config:
    """Temporal latent bottleneck; their "global positions" change nothing, xPos being relative."""
    c = case["config"]
    case["config"] = c | {"d": c["hidden_size"], "h": c["heads"], "ffn": c["ffn_dim"],
                          "V": c["vocab"], "T": max(c["lengths"])}  # fmt: skip
    case["eps"] = case["eps"]["all LayerNorms"]
    model = {"positions": "xpos", "rope_interleaved": True, "norm": "layer", "feed_forward": "gelu",
             "feed_forward_bias": True, "causal": c["causal"]}  # fmt: skip
    temporal = {"chunk_length": c["model_chunk_size"], "num_slots": c["memory_size"],
                "updates": c["update_layers"], "pooling": c["pooling"],
                "initial_memory": "zero" if c.get("zero_memory") else "random"}  # fmt: skip
    recurrence: Case = {"kind": "dense", "num_layers": c["layers"]}
    if c["encoder_type"] == "UTLBEncoder":
        assert c["global_halt"] and c["transition_based_halt"] and c["block"] == "GatedTLBBlock"
        halting = {"mode": "global", "coefficient": c["penalty_gamma"],
                   "threshold": case["halt_threshold"]}  # fmt: skip
        recurrence = {"kind": "universal", "depth": c["layers"], "halting": halting}
        model |= {"gate": True, "gate_hidden_size": c["ffn_gate_dim"]}
    sections = {"temporal": temporal, **({} if c["causal"] else ENCODER)}
    return make_config(case, precision, model, recurrence, **sections)


def temporal_names(case: Case, name: str) -> list[str]:
    """Our parameters that make theirs."""
    outer = {"encoder.memory": "temporal.memory", "word_embedding.weight": "embedding.weight"}
    name = name.replace("halt_layers.0", "TLBBlocks.0.halting.up")
    name = name.replace("halt_layers.2", "TLBBlocks.0.halting.down")
    name = re.sub(r"TLBBlocks\.(?=\D)", "TLBBlocks.0.", name)  # there is one
    inner = {"FFN_gate.0": "gate.up", "FFN_gate.3": "gate.down",
             "halting.up": "halting.up", "halting.down": "halting.down",
             "FFN.0": "feed_forward.up", "FFN.3": "feed_forward.down", "LN2": "feed_forward_norm",
             "LN0": "attention_norm", "LN11": "memory_attention_norm", "LN12": "memory_norm",
             "attention": "attention", "cross_attention": "memory_attention"}  # fmt: skip
    layers = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}
    if name in outer:
        return [outer[name]]
    if name.startswith("encoder.LN."):
        return [name.replace("encoder.LN", "temporal.norm")]
    match = re.fullmatch(r"encoder\.(TLBBlocks|update_layers)\.(\d+)\.(.*)\.(weight|bias)", name)
    assert match, name
    own = {"LN11": "memory_norm", "LN12": "input_norm"} if match[1] == "update_layers" else {}
    part, _, layer = match[3].rpartition(".") if "_proj" in match[3] else (match[3], "", "")
    prefix = "blocks" if match[1] == "TLBBlocks" else "temporal.updates"
    ours = f"{prefix}.{match[2]}.{(inner | own)[part]}"
    return [f"{ours}.{layers[layer]}.{match[4]}" if layer else f"{ours}.{match[4]}"]


def check_accepted_steps(case: Case, ctx: Context, real_BS: Tensor) -> None:
    """How many tokens took how many steps, over all chunks."""
    assert ctx.chunks is not None
    expected = torch.zeros(case["config"]["layers"] + 1, dtype=torch.long)
    for number, chunk in enumerate(ctx.chunks.chunks):
        real_BC = real_BS[:, chunk.start : chunk.stop]
        steps = torch.tensor(case["halting"][f"num_steps_chunk{number}"])
        steps = steps.expand_as(real_BC) if steps.ndim == 2 else steps[:, None].expand_as(real_BC)
        expected += torch.bincount(steps[real_BC], minlength=len(expected))
    assert torch.equal(sum(ctx.counts)[:-2].long(), expected)


def temporal_context(case: Case, model: Transformer, real_BS: Tensor) -> Context:
    """As the authors cut samples: into equal chunks of the padded length."""
    c, (batch, length) = case["config"], real_BS.shape
    num_chunks = -(-length // c["model_chunk_size"])
    lengths = [len(part) for part in torch.arange(length).chunk(num_chunks)]
    ctx = build_chunks(
        model.config, torch.arange(length).expand(batch, -1), model.dtype,
        documents_BS=real_BS.long() - 1, lengths=lengths, states=[],
    )  # fmt: skip
    if c["causal"] and lengths[0] == c["memory_size"]:
        assert ctx.chunks is not None
        chunks = tuple(as_if_causal(chunk, real_BS, model.dtype) for chunk in ctx.chunks.chunks)
        ctx = replace(ctx, chunks=replace(ctx.chunks, chunks=chunks))
    return ctx


def as_if_causal(chunk: Chunk, real_BS: Tensor, dtype: torch.dtype) -> Chunk:
    """Their quirk: attention between as many slots as a chunk has tokens is causal too."""
    slots = chunk.stop - chunk.start
    real_BC = real_BS[:, chunk.start : chunk.stop]
    assert (real_BC.all(1) | ~real_BC.any(1)).all(), "the last real token is the last"
    earlier = torch.ones(slots, slots, dtype=torch.bool).tril().expand(len(real_BS), 1, -1, -1)
    read = torch.cat((earlier, torch.zeros_like(earlier)), -1)
    return replace(chunk, read_mask=additive(read, dtype), write_mask=additive(earlier, dtype))


# -------------------------------------------------------------------------------- the comparison


def compare(
    case: Case,
    arrays: dict[str, Tensor],
    config: Config,
    our_names: Callable[[Case, str], list[str]],
    steps: LayerMap,
    batch: Batch,
) -> None:
    """Run the case in `config.train.precision` and compare everything stored in that precision."""
    double = config.train.precision == "fp64"
    prefix = "f64." if double else ""
    forward_tol, gradient_tol = (FP64_FORWARD_TOL, FP64_TOL) if double else (FP32_TOL, FP32_TOL)
    model = Transformer(config)
    load_weights(model, case, arrays, our_names)
    if "initial_state" in arrays:
        given = arrays["initial_state"].to(model.dtype)
        model.stack.initial_state = lambda x, ctx: given  # type: ignore[method-assign]

    states: list[Tensor] = []
    ctx = model.context(batch, step=0, training=False, states=states)
    x, _ = model.run(steps, model.embed(batch.tokens_BS, ctx), ctx, {})
    actual = {"logits": model.logits(x), "hidden_last": x}
    total = model.loss(x, batch)["loss"].total
    actual["loss"] = total / (batch.labels_BS != -100).sum()
    assert [s.block for s in steps] == case["order"]
    if not double:
        actual["hidden"] = torch.stack(states)
    for i, step in enumerate(steps):
        if step.normalize:
            assert model.final_norm is not None
            actual["latent_states"] = model.final_norm(states[i - 1])
    for name in actual.keys() & {key.removeprefix(prefix) for key in arrays}:
        if prefix + name in arrays:
            torch.testing.assert_close(
                actual[name].detach(), arrays[prefix + name], rtol=forward_tol, atol=forward_tol,
                msg=lambda text, name=name: f"{prefix}{name}: {text}",
            )  # fmt: skip

    actual["loss"].backward()
    stored = {k: v for k, v in arrays.items() if k.startswith(prefix + "grad.")}
    assert stored and prefix + "logits" in arrays and prefix + "loss" in arrays
    ours = {}
    for key, expected in stored.items():
        names = our_names(case, key.removeprefix(prefix + "grad."))
        parts = [model.parameters_by_name[name].grad for name in names]
        flat = torch.cat([part.flatten() for part in parts if part is not None])
        ours[key] = flat.view(expected.shape)
    assert_gradients_close(ours, stored, gradient_tol)


def load_weights(
    model: Transformer,
    case: Case,
    arrays: dict[str, Tensor],
    our_names: Callable[[Case, str], list[str]],
) -> None:
    """Copy every weight of the case; none of theirs and none of ours is left over."""
    missing = set(model.parameters_by_name)
    for key, value in arrays.items():
        name = key.removeprefix("weight.")
        if name == key or name in case.get("unused_weights", ()):
            continue
        parameters = [model.parameters_by_name[ours] for ours in our_names(case, name)]
        pieces = value.flatten().split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.data.copy_(piece.view_as(parameter))
        missing -= set(our_names(case, name))
    assert not missing
    model.refresh()


def read_case(path: Path) -> tuple[Case, dict[str, Tensor]]:
    """The JSON and the arrays beside it."""
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


def make_batch(tokens_BS: Tensor, labels_BS: Tensor) -> Batch:
    """One document per sample."""
    batch, length = tokens_BS.shape
    positions_BS = torch.arange(length).expand(batch, length)
    return Batch(
        tokens_BS, labels_BS, positions_BS, torch.zeros_like(tokens_BS), torch.arange(batch)
    )


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("path", cases("intra_layer_recurrence"))
def test_parity_intra_layer_recurrence(path: Path, precision: str) -> None:
    case, arrays = read_case(path)
    config = reuse_config(case, precision)
    labels_BS = torch.full_like(arrays["labels"], -100)
    labels_BS[:, :-1] = arrays["labels"][:, 1:]  # their loss shifts by one
    batch = make_batch(arrays["input_ids"], labels_BS)
    compare(case, arrays, config, reuse_names, layer_map(config.recurrence), batch)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("path", cases("huginn"))
def test_parity_huginn(path: Path, precision: str) -> None:
    case, arrays = read_case(path)
    config = loop_config(case, precision)
    c = case["config"]
    backward = c["num_steps_with_grad"]
    steps = layer_map(config.recurrence, Depth(c["num_steps_no_grad"] + backward, backward))
    batch = make_batch(arrays["input_ids"], arrays["labels"])
    compare(case, arrays, config, loop_names, steps, batch)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("path", cases("relaxed_recursive", "forward"))
def test_parity_relaxed_recursive(path: Path, precision: str) -> None:
    case, arrays = read_case(path)
    first = case["tie_first_index"]["linears"]
    case["order"] = [sorted(set(first)).index(tied) for tied in first]
    config = relaxed_config(case, precision)
    for key in [key for key in arrays if key.startswith("lora.")]:
        _, layer, group, name, factor = key.split(".")
        weight = f"weight.model.layers.{layer}.{group}.{name}.lora_{factor}.weight"
        arrays[weight] = arrays.pop(key)
    for name, spec in build_inventory(
        config
    ).items():  # Their layers outside of the loop have none.
        if name.endswith(("lora_a", "lora_b")) and case["order"].count(spec.block) == 1:
            layer = case["order"].index(spec.block)
            target = next(theirs for theirs, ours in RELAXED_TARGETS.items() if f".{ours}." in name)
            theirs = f"model.layers.{layer}.{target}.lora_{name[-1].upper()}.weight"
            assert relaxed_names(case, theirs) == [name]
            arrays[f"weight.{theirs}"] = torch.zeros(spec.shape)
    labels_BS = torch.full_like(arrays["labels"], -100)
    labels_BS[:, :-1] = arrays["labels"][:, 1:]  # their loss shifts by one
    batch = make_batch(arrays["input_ids"], labels_BS)
    compare(case, arrays, config, relaxed_names, layer_map(config.recurrence), batch)


# ------------------------------------------------------------------------------- dynamic halting


def halting_config(case: Case, precision: str, length: int) -> Config:
    """UT and GUT: one pre-norm block with xPos, gated or not, and how it halts."""
    c = case["config"]
    assert set(case["eps"].values()) == {1e-5} and c["embd_dim"] == c["hidden_size"]
    case = {"config": {"d": c["hidden_size"], "h": c["heads"], "head_dim": c["head_dim"],
                       "ffn": c["ffn_dim"], "V": c["vocab"], "T": length},
            "eps": 1e-5}  # fmt: skip
    gate = c["block"] == "GatedTransformerBlock"
    model = {"positions": "xpos", "rope_interleaved": True, "norm": "layer", "gate": gate,
             "feed_forward": "gelu", "feed_forward_bias": True, "causal": c["causal"],
             "gate_hidden_size": c["ffn_gate_dim"] if gate else None}  # fmt: skip
    halting = {"mode": "global" if c["global_halt"] else "token",
               "transition": c["transition_based_halt"], "coefficient": c["penalty_gamma"],
               "threshold": 0.999}  # fmt: skip
    recurrence = {"kind": "universal", "depth": c["layers"], "halting": halting}
    return make_config(case, precision, model, recurrence, **({} if c["causal"] else ENCODER))


HALTING_NAMES = {
    "word_embedding.weight": "embedding.weight",
    "encoder.halt_layers.0": "blocks.0.halting.up",
    "encoder.halt_layers.2": "blocks.0.halting.down",
    "encoder.TransformerLayer.FFN.0": "blocks.0.feed_forward.up",
    "encoder.TransformerLayer.FFN.3": "blocks.0.feed_forward.down",
    "encoder.TransformerLayer.FFN_gate.0": "blocks.0.gate.up",
    "encoder.TransformerLayer.FFN_gate.3": "blocks.0.gate.down",
    "encoder.TransformerLayer.LN1": "blocks.0.attention_norm",
    "encoder.TransformerLayer.LN2": "blocks.0.feed_forward_norm",
    "encoder.TransformerLayer.attention.q_proj": "blocks.0.attention.query",
    "encoder.TransformerLayer.attention.k_proj": "blocks.0.attention.key",
    "encoder.TransformerLayer.attention.v_proj": "blocks.0.attention.value",
    "encoder.TransformerLayer.attention.out_proj": "blocks.0.attention.output",
}


def halting_parameters(
    model: Transformer, arrays: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Their weights, loaded: (ours by their names, those of heads that the test makes itself)."""
    shared, own = {}, {}
    for key in [key for key in arrays if key.startswith("w/") and not key.endswith("xpos.scale")]:
        name = key.removeprefix("w/")
        stem, _, kind = name.rpartition(".")
        ours = HALTING_NAMES.get(name) or f"{HALTING_NAMES.get(stem)}.{kind}"
        if ours in model.parameters_by_name:
            model.parameters_by_name[ours].data.copy_(arrays[key])
            shared[name] = model.parameters_by_name[ours]
        else:
            assert name.startswith(("classifier", "encoder.START", "encoder.END")), name
            own[name] = arrays[key].to(model.dtype).requires_grad_()
    model.refresh()
    missing = set(model.parameters_by_name) - {n for n, p in model.parameters_by_name.items()
                                               if any(p is q for q in shared.values())}  # fmt: skip
    missing = {name for name in missing if not name.startswith("task.")}
    assert missing == {"final_norm.weight", "final_norm.bias"}
    return shared, own


def embed_case(
    model: Transformer, own: dict[str, Tensor], tokens_BS: Tensor, mask_BS: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """h_0 and its mask: START in front and END after the last token, where not causal."""
    # Their embedding has a padding row, which is read but gets no gradient.
    table = model.parameters_by_name["embedding.weight"]
    x = torch.nn.functional.embedding(tokens_BS, table, padding_idx=0)
    if causal:
        return x, mask_BS
    batch, length, _ = x.shape
    start, end = own["encoder.START"], own["encoder.END"]
    x = torch.cat([start.expand(batch, 1, -1), x, torch.zeros_like(x[:, :1])], 1)
    last_B = mask_BS.sum(1).long() + 1
    is_last = torch.arange(length + 2)[None] == last_B[:, None]
    x = torch.where(is_last[..., None], end, x)
    return x, (torch.arange(length + 2)[None] <= last_B[:, None]).to(mask_BS.dtype)


def halting_batch(mask_BS: Tensor) -> Batch:
    """What the model reads of it beside the embeddings."""
    tokens_BS = torch.zeros_like(mask_BS, dtype=torch.long)
    documents_BS = torch.where(mask_BS > 0, 0, -1)
    return replace(make_batch(tokens_BS, tokens_BS), documents_BS=documents_BS,
                   single_document=False)  # fmt: skip


def step_through(
    model: Transformer, x: Tensor, ctx: Context, arrays: dict[str, Tensor], tol: float
) -> Tensor:
    """Every step of the authors' loop on all samples: probabilities, states, mixtures, costs. Gives
    the accepted steps of every token."""
    halting, stack = model.config.halting, model.stack
    assert halting is not None and stack.halting is not None
    steps = layer_map(model.config.recurrence)
    mixture = Mixture(halting, stack.halting, x, ctx, model.config.model.causal, len(steps))
    real = arrays["mid/block_mask"].bool()

    def check(name: str, value: Tensor, index: int | None = None) -> None:
        expected = arrays[name] if index is None else arrays[name][index]
        if expected.ndim == 1:  # of a whole sample
            expected = expected[:, None].expand_as(real)
        torch.testing.assert_close(
            value[real], expected[real].to(value.dtype), rtol=tol, atol=tol,
            msg=lambda text: f"{name} {index}: {text}",
        )  # fmt: skip

    taken = 0
    for step in steps[: len(arrays["halt/p"])]:
        mixture.begin_step()
        source = mixture.source
        present = ctx if source is None else replace(ctx, source_BSD=source)
        candidate = stack.blocks["0"](mixture.h, present, step, None)
        if f"mid/step{mixture.step}/candidate" in arrays:
            check(f"mid/step{mixture.step}/candidate", candidate)
        mixture.advance(candidate)
        index = mixture.step - 1
        check("halt/p", mixture.p, index)
        check("halt/T", mixture.stopped, index)
        check(f"mid/step{index}/h", mixture.h)
        check(f"mid/step{index}/o", mixture.o)
        expected = arrays["halt/pen"][index] + arrays["halt/slack"][index]
        if expected.ndim == 1:
            expected = expected[:, None].expand_as(real)
        torch.testing.assert_close(
            mixture.cost[real], expected[real].to(mixture.cost.dtype), rtol=tol, atol=tol
        )
        taken = taken + mixture.going.long()
        assert torch.equal(mixture.taken, taken)
    return mixture.taken


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("path", cases("dynamic_halt"))
def test_parity_dynamic_halt(path: Path, precision: str, compact: bool) -> None:
    """States, probabilities, step counts, outputs, losses and gradients; heads, and the tokens that
    mark start and end, are made here of the case's weights."""
    case, arrays = read_case(path)
    c = case["config"]
    sides = ["1", "2"] if c["batch_pair"] else [""]
    read = {side: (arrays[f"in/sequences{side}_vec" if side else "in/sequences_vec"],
                   arrays[f"in/input_masks{side}"]) for side in sides}  # fmt: skip
    length = arrays["mid/block_mask"].shape[1]
    config = halting_config(case, precision, length)
    model = Transformer(config)
    shared, own = halting_parameters(model, arrays)
    model.stack.compact = compact
    parts = [embed_case(model, own, *read[side], c["causal"]) for side in sides]
    most = max(x.shape[1] for x, _ in parts)
    x = torch.cat([torch.nn.functional.pad(x, (0, 0, 0, most - x.shape[1])) for x, _ in parts])
    mask_BS = torch.cat([torch.nn.functional.pad(m, (0, most - m.shape[1])) for _, m in parts])
    real = mask_BS.bool()
    assert torch.equal(mask_BS, arrays["mid/block_mask"])

    def check(name: str, value: Tensor) -> None:
        torch.testing.assert_close(
            value.to(arrays[name].dtype), arrays[name], rtol=FP32_TOL, atol=FP32_TOL,
            msg=lambda text: f"{name}: {text}",
        )  # fmt: skip

    torch.testing.assert_close(x[real].float(), arrays["mid/h0"][real])
    batch = halting_batch(mask_BS)
    ctx = model.context(batch, step=0, training=True)
    with torch.no_grad():
        taken = step_through(model, x, ctx, arrays, FP32_TOL)
    expected_taken = arrays["halt/num_steps"]
    if expected_taken.ndim == 1:
        expected_taken = expected_taken[:, None]
    assert torch.equal(taken * real, expected_taken * real)

    o, terms = model.run(layer_map(config.recurrence), x, ctx, {})
    (counts,) = ctx.counts
    by_steps = torch.bincount(taken[real], minlength=c["layers"] + 1)
    assert torch.equal(counts[:-2].long(), by_steps)
    assert (counts[-2] < counts[-1]) if compact else counts[-2] <= counts[-1]
    aux = terms["halting"].weight * terms["halting"].total / len(x)
    if "out/sequence" in arrays:
        torch.testing.assert_close(
            o[real].float(), arrays["out/sequence"][real], rtol=FP32_TOL, atol=FP32_TOL
        )
    check("out/aux_loss", aux)
    logits, task = classify(case, own, o, mask_BS, arrays, check)
    check("out/logits", logits)
    check("out/loss_task", task)
    check("out/loss_total", task + aux)
    (task + aux).backward()
    ours = {name: p.grad for name, p in {**shared, **own}.items() if p.grad is not None}
    stored = {key.removeprefix("grad/"): v for key, v in arrays.items() if key.startswith("grad/")}
    assert_gradients_close(ours, stored, FP32_TOL)


def classify(
    case: Case,
    own: dict[str, Tensor],
    o: Tensor,
    mask_BS: Tensor,
    arrays: dict[str, Tensor],
    check: Callable[[str, Tensor], None],
) -> tuple[Tensor, Tensor]:
    """(logits, task loss) of the authors' heads."""
    c = case["config"]
    F = torch.nn.functional

    def head(x: Tensor) -> Tensor:
        names = [f"classifier_block.{i}" for i in (0, 2)]
        (w1, b1), (w2, b2) = ((own[f"{n}.weight"], own[f"{n}.bias"]) for n in names)
        return F.linear(torch.relu(F.linear(x, w1, b1)), w2, b2)

    labels = arrays["in/labels"]
    if c["causal"]:
        logits = head(o)
        losses = F.binary_cross_entropy_with_logits(
            logits.squeeze(-1), labels.to(o.dtype), reduction="none"
        )
        masks = arrays["in/loss_masks"].to(o.dtype)
        return logits, (losses * masks).sum() / masks.sum()
    if c["pooling"] == "mean":
        pooled = (o * mask_BS[..., None]).sum(1) / mask_BS.sum(1, keepdim=True)
    else:
        pooled = o[torch.arange(len(o)), mask_BS.sum(1).long() - 1]
    if c["batch_pair"]:
        u, v = pooled.chunk(2)
        pooled = torch.cat([u, v, u * v, (u - v).abs()], -1)
    elif "out/global_state" in arrays:
        check("out/global_state", pooled)
    logits = head(pooled)
    if c["classes"] == 2 and logits.shape[-1] == 1:
        losses = F.binary_cross_entropy_with_logits(logits.squeeze(-1), labels.to(o.dtype))
        return logits, losses
    return logits, F.cross_entropy(logits, labels)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("path", cases("tlb"))
def test_parity_temporal_latent_bottleneck(path: Path, precision: str) -> None:
    """Sequences, memories and states of every chunk; logits and gradients through a classifier that
    is theirs."""
    case, arrays = read_case(path)
    config = temporal_config(case, precision)
    model = Transformer(config)
    weights = {k.removeprefix("w/"): v.to(model.dtype) for k, v in arrays.items() if k[:2] == "w/"}
    for name, value in weights.items():
        if not name.startswith("classifier") and not name.endswith("xpos.scale"):
            model.parameters_by_name[temporal_names(case, name)[0]].data.copy_(value)
    model.refresh()
    head = {k: v.requires_grad_() for k, v in weights.items() if k.startswith("classifier")}
    real_BS = arrays["in/input_masks"].bool()
    memories: list[Tensor] = []
    ours = model.stack.memory
    assert ours is not None
    write = ours.write
    ours.write = lambda *args: memories.append(write(*args)) or memories[-1]  # type: ignore

    ctx, reads = temporal_context(case, model, real_BS), {}
    x = model.embed(arrays["in/sequences_vec"], ctx)
    x, terms = model.run(layer_map(config.recurrence), x, ctx, reads)
    pooled = model.pool_memory(reads["memory"])
    assert torch.equal(reads["memory"], memories[-1])
    classified = x if "in/loss_masks" in arrays else pooled
    hidden = F.linear(
        classified, head["classifier_block.0.weight"], head["classifier_block.0.bias"]
    )
    logits = F.linear(
        hidden.relu(), head["classifier_block.2.weight"], head["classifier_block.2.bias"]
    )
    labels = arrays["in/labels"]
    if "in/loss_masks" in arrays:
        counted = arrays["in/loss_masks"].to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(
            logits[..., 0], labels.to(logits.dtype), reduction="none"
        )
        loss = (losses * counted).sum() / counted.sum()
        logits = logits[real_BS]
        arrays["out/logits"] = arrays["out/logits"][real_BS]
    else:
        loss = F.cross_entropy(logits, labels)
    actual = {"out/sequence": x[real_BS], "out/global_state": pooled, "out/logits": logits}
    if config.halting is not None:
        actual["out/aux_loss"] = terms["halting"].weight * terms["halting"].total / len(x)
        loss = loss + actual["out/aux_loss"]
    actual["out/loss_total"] = loss
    arrays["out/sequence"] = arrays["out/sequence"][real_BS]
    assert ctx.states is not None and ctx.chunks is not None
    states = iter(ctx.states)
    for number, chunk in enumerate(ctx.chunks.chunks):
        real_BC = real_BS[:, chunk.start : chunk.stop]
        for layer in range(len(layer_map(config.recurrence))):
            halts, state = config.halting is not None, next(states)
            name = f"mid/chunk{number}/" + (f"step{layer}/h" if halts else f"layer{layer}/out")
            if not halts or name in arrays:  # they stop once all have halted
                actual[name], arrays[name] = state[real_BC], arrays[name][real_BC]
        actual[f"mid/chunk{number}/memory_after"] = memories[number]
    compared = {n for n in arrays if n.startswith(("out/", "mid/chunk")) and n[-2:] != "/o"}
    beside = {"out/encoder_mask", "out/loss_task", "out/aux_per_sample"}
    assert compared - actual.keys() - beside == set()
    if config.halting is not None:
        check_accepted_steps(case, ctx, real_BS)
    for name, value in actual.items():
        torch.testing.assert_close(
            value.detach().to(torch.float64), arrays[name].to(torch.float64), rtol=FP32_TOL,
            atol=FP32_TOL, msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip

    loss.backward()
    assert model.embedding is not None
    stored = {k.removeprefix("grad/"): v for k, v in arrays.items() if k.startswith("grad/")}
    found = {}
    for name in stored:
        gradient = head[name].grad if name in head else None
        if name not in head:
            gradient = model.parameters_by_name[temporal_names(case, name)[0]].grad
        assert gradient is not None
        found[name] = gradient
    found["word_embedding.weight"][0] = 0.0  # their padding index
    assert_gradients_close(found, stored, FP32_TOL)
