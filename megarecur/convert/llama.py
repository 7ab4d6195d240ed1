"""How Llama (Hugging Face) spells what we call by other names: config keys and tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megarecur.config.schema import Config, ModelConfig
from megarecur.errors import ConfigError
from megarecur.recurrence.layer_map import count_uses
from megarecur.recurrence.schemes import layer_map

BLOCK_TENSORS = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "post_attention_layernorm": "feed_forward_norm",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
}

REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
)

ACCEPTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "architectures": (None, ["LlamaForCausalLM"]),
    "hidden_act": ("silu", "swish"),
    "sliding_window": (None,),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
}
"""Keys whose other values change what is computed."""
DEFAULTS = {"hidden_act": "silu"}


def tensor_names(blocks: list[int], bias: dict[str, bool], tied: bool) -> dict[str, str]:
    """Llama's tensors in their order, each with the global name of its values.

    Args:
        blocks: the block that each layer runs.
        bias: whether linears of "self_attn" and "mlp" carry one.
        tied: whether the head is the embedding.
    """
    names = {"model.embed_tokens.weight": "embedding.weight"}
    for layer, block in enumerate(blocks):
        for theirs, ours in BLOCK_TENSORS.items():
            for kind in ("weight", "bias") if bias.get(theirs.split(".")[0]) else ("weight",):
                names[f"model.layers.{layer}.{theirs}.{kind}"] = f"blocks.{block}.{ours}.{kind}"
    names["model.norm.weight"] = "final_norm.weight"
    if not tied:
        names["lm_head.weight"] = "head.weight"
    return names


def model_from_llama(values: dict[str, Any], origin: str) -> tuple[dict[str, Any], int]:
    """Our `model` section for a Llama's config.json, and its number of layers.

    Raises:
        ConfigError: naming every key whose value is not supported, with the remedy.
    """
    problems = [f"{key}: required, but missing" for key in REQUIRED if values.get(key) is None]
    for key, accepted in ACCEPTED.items():
        value = values.get(key, DEFAULTS.get(key))
        if value not in accepted:
            wanted = next(a for a in accepted if a is not None) if any(accepted) else "null"
            problems.append(
                f"{key}={value!r} is not supported; only a model with {key}={wanted!r} converts"
            )
    # Newer files keep everything of the rotation in one place.
    rope: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        found = values.get(key) or {}
        if not isinstance(found, dict):
            found = {"rope_type": found}
        kind = found.get("rope_type", found.get("type", "default"))
        if kind != "default":
            problems.append(
                f"{key}: rope_type={kind!r} is not supported; only plain rotary positions "
                "convert, choose a model without context extension"
            )
        rope |= found
    if problems:
        raise ConfigError(f"{origin}: cannot be converted" + "".join(f"\n  {p}" for p in problems))
    theta = values.get("rope_theta") or rope.get("rope_theta") or 10000.0
    model = {
        "hidden_size": values["hidden_size"],
        "num_heads": values["num_attention_heads"],
        "ffn_hidden_size": values["intermediate_size"],
        "vocab_size": values["vocab_size"],
        "positions": "rope",
        "rope_theta": theta,
        "max_positions": values.get("max_position_embeddings", 2048),
        "norm": "rms",
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "norm_position": "pre",
        "feed_forward": "swiglu",
        "attention_bias": "all" if values.get("attention_bias") else "none",
        "feed_forward_bias": bool(values.get("mlp_bias")),
        "tie_embeddings": bool(values.get("tie_word_embeddings")),
        "attention_dropout": values.get("attention_dropout", 0.0),
        "init_std": values.get("initializer_range", 0.02),
    }
    # Left out, they follow from the others as they do in Llama.
    for theirs, ours in (("num_key_value_heads", "num_kv_heads"), ("head_dim", "head_dim")):
        if values.get(theirs) is not None:
            model[ours] = values[theirs]
    return model, values["num_hidden_layers"]


def llama_blocks(config: Config, unrolled: bool) -> list[int]:
    """The block that each layer of the Llama runs.

    Raises:
        ConfigError: naming every key whose value Llama cannot express, with the remedy.
    """
    model, steps = config.model, layer_map(config.recurrence)
    problems = []
    expressible = {
        "positions": "rope",
        "norm": "rms",
        "norm_position": "pre",
        "feed_forward": "swiglu",
        "scale_embeddings": False,
    }
    for key, wanted in expressible.items():
        value = getattr(model, key)
        if value != wanted:
            problems.append(
                f"model.{key}={value!r}: Llama has {key}={wanted!r} only; such a model stays a "
                "megarecur run"
            )
    if any(step.reads or step.writes for step in steps):
        injection = getattr(config.recurrence, "injection", None)
        problems.append(
            f"recurrence.injection={injection!r}: a Llama layer reads the layer below and nothing "
            "else; only injection='none' can be exported"
        )
    if any(step.normalize for step in steps):
        problems.append(
            "recurrence.final_norm_after_core=True: Llama has no norm between layers; only False "
            "can be exported"
        )
    shared = {block: uses for block, uses in count_uses(steps).items() if uses > 1}
    if shared and not unrolled:
        problems.append(
            f"recurrence.kind={config.recurrence.kind}: runs {len(shared)} block(s) more than "
            f"once, Llama layers share nothing; pass --unrolled to write {len(steps)} layers"
        )
    if problems:
        raise ConfigError("cannot export to Llama:" + "".join(f"\n  {p}" for p in problems))
    return [step.block for step in steps]


def config_to_llama(config: Config, num_layers: int, dtype: str) -> dict[str, Any]:
    """Llama's config.json for a model that `llama_blocks` accepts, special tokens apart."""
    model = config.model
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions or config.data.seq_length,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "attention_bias": model.attention_bias != "none",
        "attention_dropout": model.attention_dropout,
        "mlp_bias": model.feed_forward_bias,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def to_half_split(rows: Tensor, model: ModelConfig) -> Tensor:
    """Reorder the rows of a query or key weight (or bias) that rotates dims (2i, 2i + 1) as pairs.

    Llama rotates (i, i + head_dim/2). Queries and keys are reordered alike, which leaves their
    products as they were.
    """
    order = torch.arange(model.head_dim).view(-1, 2).t().flatten()
    return rows.unflatten(0, (-1, model.head_dim))[:, order].flatten(0, 1)
