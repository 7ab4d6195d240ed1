"""Phi-3 (Abdin et al. 2024) in Hugging Face's format: a Llama with fused matrices.

Its `longrope`, which scales every dim by its own factor, is not supported.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarecur.config.model import ModelConfig
from megarecur.convert import llama
from megarecur.convert.architecture import (
    Architecture,
    Entry,
    Names,
    Values,
    entry,
    find_mixed_windows,
    read_rope,
    wanted,
)


def read_config(values: Values, problems: list[str]) -> Values:
    """Return our `model` section for a Phi-3's config.json."""
    rope = read_rope(values, problems, kinds=("default",), fractions=("partial_rotary_factor",))
    model = llama.read_common(values, problems, rope, eps=1e-5)
    model["dropout"] = values.get("resid_pdrop", 0.0)
    if values.get("sliding_window") is not None:
        model |= {"sliding_window": values["sliding_window"], "attention_types": ["sliding"]}
    return model


def write_config(model: ModelConfig, blocks: list[int]) -> Values:
    """Return Phi-3's config.json."""
    values = llama.write_common(model)
    return values | {
        "original_max_position_embeddings": values["max_position_embeddings"],
        "partial_rotary_factor": model.rope_fraction,
        "sliding_window": model.sliding_window,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
    }


def split_heads(fused: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """Split the rows of query, key and value."""
    heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    return torch.split(fused, [count * model.head_dim for count in heads])


def split_halves(fused: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """Split the rows of gate and up."""
    return fused.chunk(2)


def join(parts: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    """Join rows again."""
    return torch.cat(parts)


def names(model: ModelConfig) -> Names:
    """Return Llama's names, with matrices of the same input fused."""
    names = llama.common_names(model, "", False)
    heads = tuple(f"attention.{name}.weight" for name in ("query", "key", "value"))
    gated = tuple(f"feed_forward.{name}.weight" for name in ("gate", "up"))
    layer = [
        entry("input_layernorm.weight", "attention_norm.weight"),
        Entry("self_attn.qkv_proj.weight", heads, split_heads, join),
        entry("self_attn.o_proj.weight", "attention.output.weight"),
        entry("post_attention_layernorm.weight", "feed_forward_norm.weight"),
        Entry("mlp.gate_up_proj.weight", gated, split_halves, join),
        entry("mlp.down_proj.weight", "feed_forward.down.weight"),
    ]
    return Names(names.layers, layer, names.first, names.last, names.head, names.ignored)


PHI3 = Architecture(
    model_type="phi3",
    hf_class="Phi3ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    wanted=wanted(
        ("rope_fraction", "sliding_window"), attention_bias=("none",), feed_forward_bias=(False,)
    ),
    names=names,
    obstacles=lambda model: find_mixed_windows("Phi3", model),
    accepted={"hidden_act": ("silu", "swish", None)},
)
