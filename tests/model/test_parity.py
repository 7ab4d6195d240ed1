"""Parity with the authors' own code: tiny models they ran, with weights, states and gradients.

Every case is found by its JSON under the development data; options and shapes are read from it.
A system is one function from a case's `config` to ours, and one from their parameter names to ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from support.harness import assert_gradients_close
from support.models import Batch
from support.parity import FP32_TOL, FP64_FORWARD_TOL, FP64_TOL, Case, batch_of, cases, read_case
from torch import Tensor

from megarecur.attention.visibility import Visibility
from megarecur.config.run import Config
from megarecur.data.samples import TaskBatch, TaskCorpus, collate
from megarecur.model.context import Context
from megarecur.model.halting import Mixture
from megarecur.model.temporal import Chunk, additive, build_chunks
from megarecur.model.transformer import Transformer
from megarecur.parallel.loss import LossTerm
from megarecur.recurrence.depth import Depth
from megarecur.recurrence.inventory import build_inventory
from megarecur.recurrence.layer_map import LayerMap
from megarecur.recurrence.schemes import layer_map


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
        recurrence = {"kind": "block_recurrence", "num_blocks": c["L"], "num_loops": c["loops"]}
    recurrence["injection"] = "add" if c["inj"] else "none"
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
    recurrence = {
        "kind": "loop", "prelude": c["P"], "core": c["C"], "coda": c["D"],
        "num_loops": c["num_steps_no_grad"] + c["num_steps_with_grad"],
        "injection": "linear", "initial_state": "random", "final_norm_after_core": True,
        "injection_bias": c["bias"],
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
        "adapter.bias": f"blocks.{c['P']}.injection.bias",
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


def task_of(case: Case) -> Case:
    """A class per token or sequence, or of pairs."""
    c = case["config"]
    if c["causal"]:
        return {"kind": "token", "num_classes": 2}
    kind = "pair" if c["batch_pair"] else "sequence"
    pooling = "end" if c["pooling"] == "last" else c["pooling"]
    return {"kind": kind, "num_classes": c["classes"], "pooling": pooling, "augment": True}


HEADS = {"classifier_block.0": "task.hidden", "classifier_block.2": "task.output"}


class Samples:
    """What `collate` reads of a corpus: the real tokens of a case."""

    def __init__(self, case: Case, arrays: dict[str, Tensor]) -> None:
        c = case["config"]
        sides = ["1", "2"] if c["batch_pair"] else [""]
        read = [(arrays[f"in/sequences{side}_vec" if side else "in/sequences_vec"],
                 arrays[f"in/input_masks{side}"].bool()) for side in sides]  # fmt: skip
        pairs = zip(*(zip(*side, strict=True) for side in read), strict=True)
        self.rows = [tokens[mask].numpy() for sample in pairs for tokens, mask in sample]
        self.labels = arrays["in/labels"].numpy()
        if c["causal"]:
            asked = arrays["in/loss_masks"].bool()
            labels = torch.where(asked, arrays["in/labels"].long(), -1)
            self.labels = labels[read[0][1]].numpy()

    def document(self, number: int, most: int) -> tuple[np.ndarray, int]:
        """As `TaskCorpus.document`."""
        assert len(self.rows[number]) <= most
        return self.rows[number], sum(map(len, self.rows[:number]))

    def batch(self, config: Config) -> TaskBatch:
        """All samples."""
        assert config.task is not None
        ids = np.arange(len(self.rows) // (2 if config.task.kind == "pair" else 1))
        numbered = [(cast(TaskCorpus, self), int(i)) for i in ids]
        return collate(numbered, ids, np.zeros_like(ids), config.task, config.data.seq_length)


def side_by_side(arrays: dict[str, Tensor]) -> None:
    """Both sides of a pair as neighbours; theirs are all first sides, then all second ones."""
    order = torch.arange(len(arrays["mid/block_mask"])).view(2, -1).T.flatten()
    for key in arrays:
        if key.startswith("halt/"):
            dim = 0 if key == "halt/num_steps" else 1
        elif key.startswith(("mid/", "out/")) and arrays[key].shape[:1] == order.shape:
            dim = 0
        else:
            continue
        arrays[key] = arrays[key].index_select(dim, order)


def compare_loss(
    model: Transformer,
    o: Tensor,
    terms: dict[str, LossTerm],
    batch: TaskBatch,
    arrays: dict[str, Tensor],
) -> Tensor:
    """Logits, and losses as training weighs them, of which the sum is given."""
    logits = model.readout.class_logits(o, batch)
    if model.config.task is not None and model.config.task.num_classes == 2:
        logits = (logits[:, 1] - logits[:, 0])[:, None]
    expected = arrays["out/logits"]
    if expected.ndim == 3:  # of tokens
        real = (batch.documents_BS >= 0).flatten()
        logits, expected = logits[real], expected.flatten(0, 1)[real]
    actual = {"out/logits": logits}
    actual["out/loss_task"] = loss = model.loss(o, batch)["loss"].total / batch.num_tokens
    if "halting" in terms:
        actual["out/aux_loss"] = terms["halting"].weight * terms["halting"].total / len(o)
        loss = loss + actual["out/aux_loss"]
    actual["out/loss_total"] = loss
    for name, value in actual.items():
        torch.testing.assert_close(
            value.detach().double(), (expected if name == "out/logits" else arrays[name]).double(),
            rtol=FP32_TOL, atol=FP32_TOL, msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip
    return loss


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
    model["final_norm"] = False
    task = task_of(case) | {"augment": False}
    return make_config(case, precision, model, recurrence, temporal=temporal, task=task)


def temporal_names(case: Case, name: str) -> list[str]:
    """Our parameters that make theirs."""
    outer = {"encoder.memory": "temporal.memory", "word_embedding.weight": "embedding.weight"}
    if name.startswith("classifier"):
        stem, _, kind = name.rpartition(".")
        return [f"{HEADS[stem]}.{kind}"]
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
    reads, writes = (Visibility(mask=additive(seen, dtype)) for seen in (read, earlier))
    return replace(chunk, reads=reads, writes=writes)


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
        model.runner.initial_state = lambda x, ctx: given  # type: ignore[method-assign]

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

    assert prefix + "logits" in arrays and prefix + "loss" in arrays
    actual["loss"].backward()
    compare_gradients(model, case, arrays, our_names, prefix + "grad.", gradient_tol)


def compare_gradients(
    model: Transformer,
    case: Case,
    arrays: dict[str, Tensor],
    our_names: Callable[[Case, str], list[str]],
    prefix: str,
    tol: float,
) -> None:
    """All that are stored."""
    stored = {key: value for key, value in arrays.items() if key.startswith(prefix)}
    assert stored
    ours = {}
    for key, expected in stored.items():
        names = our_names(case, key.removeprefix(prefix))
        parts = [model.parameters_by_name[name].grad for name in names]
        flat = torch.cat([part.flatten() for part in parts if part is not None])
        ours[key] = flat.view(expected.shape)
        if key.endswith("word_embedding.weight"):
            ours[key][0] = 0.0  # their padding index
    assert_gradients_close(ours, stored, tol)


def load_weights(
    model: Transformer,
    case: Case,
    arrays: dict[str, Tensor],
    our_names: Callable[[Case, str], list[str]],
    prefix: str = "weight.",
) -> None:
    """Copy every weight of the case; none of theirs and none of ours is left over."""
    missing = set(model.parameters_by_name)
    for key, value in arrays.items():
        name = key.removeprefix(prefix)
        if name == key or name in case.get("unused_weights", ()):
            continue
        parameters = [model.parameters_by_name[ours] for ours in our_names(case, name)]
        pieces = value.flatten().split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.data.copy_(piece.view_as(parameter))
        missing -= set(our_names(case, name))
    assert not missing
    model.refresh()


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("path", cases("intra_layer_recurrence"))
def test_parity_intra_layer_recurrence(path: Path, precision: str) -> None:
    case, arrays = read_case(path)
    config = reuse_config(case, precision)
    labels_BS = torch.full_like(arrays["labels"], -100)
    labels_BS[:, :-1] = arrays["labels"][:, 1:]  # their loss shifts by one
    batch = batch_of(arrays["input_ids"], labels_BS)
    compare(case, arrays, config, reuse_names, layer_map(config.recurrence), batch)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("path", cases("huginn"))
def test_parity_huginn(path: Path, precision: str) -> None:
    case, arrays = read_case(path)
    config = loop_config(case, precision)
    c = case["config"]
    backward = c["num_steps_with_grad"]
    steps = layer_map(config.recurrence, Depth(c["num_steps_no_grad"] + backward, backward))
    batch = batch_of(arrays["input_ids"], arrays["labels"])
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
    batch = batch_of(arrays["input_ids"], labels_BS)
    compare(case, arrays, config, relaxed_names, layer_map(config.recurrence), batch)


# ------------------------------------------------------------------------------- dynamic halting


def halting_config(case: Case, precision: str, length: int) -> Config:
    """UT and GUT: one pre-norm block with xPos, gated or not, and how it halts."""
    c, task = case["config"], task_of(case)
    assert set(case["eps"].values()) == {1e-5} and c["embd_dim"] == c["hidden_size"]
    case = {"config": {"d": c["hidden_size"], "h": c["heads"], "head_dim": c["head_dim"],
                       "ffn": c["ffn_dim"], "V": c["vocab"], "T": length},
            "eps": 1e-5}  # fmt: skip
    gate = c["block"] == "GatedTransformerBlock"
    model = {"positions": "xpos", "rope_interleaved": True, "norm": "layer", "gate": gate,
             "feed_forward": "gelu", "feed_forward_bias": True, "causal": c["causal"],
             "gate_hidden_size": c["ffn_gate_dim"] if gate else None,
             "final_norm": False}  # fmt: skip
    halting = {"mode": "global" if c["global_halt"] else "token",
               "transition": c["transition_based_halt"], "coefficient": c["penalty_gamma"],
               "threshold": 0.999}  # fmt: skip
    recurrence = {"kind": "universal", "depth": c["layers"], "halting": halting}
    return make_config(case, precision, model, recurrence, task=task)


HALTING_NAMES = HEADS | {
    "encoder.START": "task.start",
    "encoder.END": "task.end",
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


def halting_names(case: Case, name: str) -> list[str]:
    """Our parameters that make theirs."""
    stem, _, kind = name.rpartition(".")
    return [HALTING_NAMES.get(name) or f"{HALTING_NAMES[stem]}.{kind}"]


def load_case(
    case: Case, config: Config, arrays: dict[str, Tensor], names: Callable[[Case, str], list[str]]
) -> Transformer:
    """The model with their weights."""
    model = Transformer(config)
    ends = ("w/encoder.START", "w/encoder.END") if case["config"]["causal"] else ()
    unused = [key for key in arrays if key.endswith("xpos.scale") or key in ends]
    case["unused_weights"] = [key.removeprefix("w/") for key in unused]
    load_weights(model, case, arrays, names, "w/")
    return model


def step_through(
    model: Transformer,
    x: Tensor,
    ctx: Context,
    arrays: dict[str, Tensor],
    real: Tensor,
    part: str = "",
) -> Tensor:
    """Every step of the authors' loop on all samples, or in a chunk of them: probabilities, states,
    mixtures, costs. Gives the accepted steps of every token, 0 of what is not real."""
    halting = model.config.halting
    # In a chunk, the runner of one chunk.
    runner = model.runner.runner if model.config.temporal else model.runner
    assert halting is not None
    steps = layer_map(model.config.recurrence)
    mixture = Mixture(
        halting, runner.halting, x, ctx.positions, model.config.model.causal, len(steps)
    )

    def of_tokens(value: Tensor) -> Tensor:
        return value[:, None].expand_as(real) if value.ndim == 1 else value

    def check(name: str, value: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(
            value[real].double(), of_tokens(expected)[real].double(), rtol=FP32_TOL, atol=FP32_TOL,
            msg=lambda text: f"{part} step {index}, {name}: {text}",
        )  # fmt: skip

    halt = {key.rpartition("/")[2]: value for key, value in arrays.items()
            if key.startswith(f"halt/{part}")}  # fmt: skip
    for index, step in enumerate(steps[: len(halt["p"])]):
        mixture.begin_step()
        candidate = runner.blocks["0"](mixture.h, ctx, step, None, mixture.source)
        mid = f"mid/{part}step{index}/"
        if f"{mid}candidate" in arrays:
            check("candidate", candidate, arrays[f"{mid}candidate"])
        before = mixture.stopped
        mixture.advance(candidate)
        check("p", mixture.p, halt["p"][index])
        check("c", mixture.stopped - before, halt["c"][index])
        check("T", mixture.stopped, halt["T"][index])
        check("h", mixture.h, arrays[f"{mid}h"])
        check("o", mixture.o, arrays[f"{mid}o"])
        check("cost", mixture.cost, halt["pen"][index] + halt["slack"][index])
        assert torch.equal(mixture.running[real], of_tokens(halt["update_flag"][index])[real] > 0)
    assert torch.equal(mixture.taken * real, of_tokens(halt["num_steps"]) * real)
    return mixture.taken * real


@pytest.fixture
def halts_as_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of n tokens takes at most n + 1 steps in causal models too, which so look ahead."""

    def begin_step(self: Mixture) -> bool:
        self.running = self.running & (self.step < self.documents.length_BS + 1)
        return bool(self.running.any())

    monkeypatch.setattr(Mixture, "begin_step", begin_step)


@pytest.mark.usefixtures("halts_as_theirs")
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("path", cases("dynamic_halt"))
def test_parity_dynamic_halt(path: Path, precision: str, compact: bool) -> None:
    """From the tokens of samples to the losses of a task: states, probabilities, step counts,
    outputs and gradients."""
    case, arrays = read_case(path)
    if case["config"]["batch_pair"]:
        side_by_side(arrays)
    config = halting_config(case, precision, arrays["mid/block_mask"].shape[1])
    model = load_case(case, config, arrays, halting_names)
    model.runner.compact = compact
    batch = Samples(case, arrays).batch(config)
    real = batch.documents_BS >= 0
    assert torch.equal(real, arrays["mid/block_mask"].bool())
    ctx = model.context(batch, step=0, training=True)
    x = model.embed(batch.tokens_BS, ctx)
    torch.testing.assert_close(x[real].float(), arrays["mid/h0"][real])
    with torch.no_grad():
        taken = step_through(model, x, ctx, arrays, real)

    o, terms = model.run(layer_map(config.recurrence), x, ctx, {})
    (counts,) = ctx.recorder.counts
    by_steps = torch.bincount(taken[real], minlength=case["config"]["layers"] + 1)
    assert torch.equal(counts[:-2].long(), by_steps)
    assert (counts[-2] < counts[-1]) if compact else counts[-2] <= counts[-1]
    torch.testing.assert_close(
        o[real].float(), arrays["out/sequence"][real], rtol=FP32_TOL, atol=FP32_TOL
    )
    compare_loss(model, o, terms, batch, arrays).backward()
    compare_gradients(model, case, arrays, halting_names, "grad/", FP32_TOL)


@pytest.mark.usefixtures("halts_as_theirs")
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("path", cases("tlb"))
def test_parity_temporal_latent_bottleneck(path: Path, precision: str) -> None:
    """Sequences, memories and states of every chunk, its probabilities and step counts too where it
    halts; losses and gradients through our classifier."""
    case, arrays = read_case(path)
    config = temporal_config(case, precision)
    model = load_case(case, config, arrays, temporal_names)
    batch, steps = Samples(case, arrays).batch(config), layer_map(config.recurrence)
    real_BS = arrays["in/input_masks"].bool()
    assert torch.equal(batch.documents_BS >= 0, real_BS)
    memories: list[Tensor] = []
    memory = model.runner.memory
    assert memory is not None
    write = memory.write
    memory.write = lambda *args: memories.append(write(*args)) or memories[-1]  # type: ignore
    sequences: list[Tensor] = []
    run_chunks = model.runner.run_chunks
    model.runner.run_chunks = (  # type: ignore[method-assign]
        lambda *args: sequences.append(run_chunks(*args)) or sequences[-1]
    )

    ctx, reads = temporal_context(case, model, real_BS), {}
    entered = model.embed(batch.tokens_BS, ctx)
    o, terms = model.run(steps, entered, ctx, reads)
    assert torch.equal(reads["memory"], memories[-1])
    actual = {"out/sequence": sequences[0][real_BS],
              "out/global_state": model.pool_memory(reads["memory"])}  # fmt: skip
    arrays["out/sequence"] = arrays["out/sequence"][real_BS]
    assert ctx.recorder.states is not None and ctx.chunks is not None
    states = iter(ctx.recorder.states)
    for number, chunk in enumerate(ctx.chunks.chunks):
        part, real_BC = f"chunk{number}/", real_BS[:, chunk.start : chunk.stop]
        actual[f"mid/{part}memory_after"] = memories[number]
        if config.halting is None:
            for layer in range(len(steps)):
                name = f"mid/{part}layer{layer}/out"
                actual[name], arrays[name] = next(states)[real_BC], arrays[name][real_BC]
            continue
        before = memories[number - 1] if number else memory.initial(len(real_BS))
        with torch.no_grad():
            x = entered[:, chunk.start : chunk.stop]
            taken = step_through(model, x, memory.given(chunk, before), arrays, real_BC, part)
        by_steps = torch.bincount(taken[real_BC], minlength=len(steps) + 1)
        assert torch.equal(ctx.recorder.counts[number][:-2].long(), by_steps)
    for name, value in actual.items():
        torch.testing.assert_close(
            value.detach().double(), arrays[name].double(), rtol=FP32_TOL, atol=FP32_TOL,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip
    stepped = re.compile(r"mid/chunk\d+/step")  # compared by `step_through`
    assert {n for n in arrays if n.startswith("mid/chunk") and not stepped.match(n)} <= set(actual)

    compare_loss(model, o, terms, batch, arrays).backward()
    compare_gradients(model, case, arrays, temporal_names, "grad/", FP32_TOL)
