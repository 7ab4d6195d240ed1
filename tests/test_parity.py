"""Parity with the authors' own code: tiny models they ran, with weights, states and gradients.

Every case is found by its JSON under the development data; options and shapes are read from it.
A system is one function from a case's `config` to ours, and one from their parameter names to ours.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_gradients_close
from safetensors.torch import load_file
from test_model import Batch
from torch import Tensor

from megarecur.config.schema import Config
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


def make_config(
    case: Case, precision: str, model: Case, recurrence: Case, adapters: Case | None = None
) -> Config:
    """Their shapes in our words."""
    c = case["config"]
    shape = {"hidden_size": c["d"], "num_heads": c["h"], "head_dim": c["head_dim"],
             "ffn_hidden_size": c["ffn"], "vocab_size": c["V"],
             "norm_eps": case["eps"]}  # fmt: skip
    return Config.model_validate({
        "run_dir": "run", "model": shape | model, "recurrence": recurrence, "adapters": adapters,
        "data": {"train": [{"path": "none"}], "tokenizer": "bytes", "seq_length": c["T"]},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1,
                  "precision": precision},
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
