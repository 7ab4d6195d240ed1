"""Qwen2 and Qwen3 (Qwen Team 2024, 2025) as Hugging Face spells them.

Both are Llamas but for biases on query, key and value (Qwen2), or normed queries and keys (Qwen3).
"""

from __future__ import annotations

from typing import Any

from megarecur.config.schema import ModelConfig
from megarecur.convert import llama
from megarecur.convert.architecture import Architecture, Names, Values, entry, wanted

ACCEPTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (None, 1.0),
}


def read_qwen2(values: Values, problems: list[str]) -> Values:
    """Our `model` section for a Qwen2's config.json."""
    return llama.read_common(values, problems) | {"attention_bias": "qkv"}


def write_qwen2(model: ModelConfig, blocks: list[int]) -> Values:
    """Qwen2's config.json."""
    return llama.write_common(model) | {
        "rope_scaling": None,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * len(blocks),
    }


def qwen2_names(model: ModelConfig) -> Names:
    """Llama's, with biases."""
    return llama.common_names(model, "qkv", False)


QWEN2 = Architecture(
    model_type="qwen2",
    hf_class="Qwen2ForCausalLM",
    read_config=read_qwen2,
    write_config=write_qwen2,
    wanted=wanted(attention_bias=("qkv",), feed_forward_bias=(False,)),
    names=qwen2_names,
    accepted=ACCEPTED,
)


def read_qwen3(values: Values, problems: list[str]) -> Values:
    """Our `model` section for a Qwen3's config.json."""
    return llama.read_common(values, problems) | {
        "attention_bias": "all" if values.get("attention_bias") else "none",
        # Unlike Llama's it does not follow from the others.
        "head_dim": values.get("head_dim") or 128,
        "qk_norm": True,
    }


def write_qwen3(model: ModelConfig, blocks: list[int]) -> Values:
    """Qwen3's config.json."""
    return write_qwen2(model, blocks) | {"attention_bias": model.attention_bias != "none"}


def qwen3_names(model: ModelConfig) -> Names:
    """Llama's, with norms of queries and keys."""
    names = llama.common_names(model, "qkvo" if model.attention_bias != "none" else "", False)
    names.layer.extend(QK_NORMS)
    return names


QK_NORMS = [
    entry("self_attn.q_norm.weight", "attention.query_norm.weight"),
    entry("self_attn.k_norm.weight", "attention.key_norm.weight"),
]

QWEN3 = Architecture(
    model_type="qwen3",
    hf_class="Qwen3ForCausalLM",
    read_config=read_qwen3,
    write_config=write_qwen3,
    wanted=wanted(qk_norm=(True,), feed_forward_bias=(False,)),
    names=qwen3_names,
    accepted=ACCEPTED,
)
