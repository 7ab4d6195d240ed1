"""Qwen2 and Qwen3 (Qwen Team 2024, 2025) in Hugging Face's format.

Both are Llamas with biases on query, key and value (Qwen2), or normed queries and keys (Qwen3).
"""

from __future__ import annotations

from typing import Any

from megarecur.config.model import ModelConfig
from megarecur.convert import llama
from megarecur.convert.architecture import (
    SCALED,
    Architecture,
    Names,
    Values,
    entry,
    read_windows,
    wanted,
    write_types,
)

ACCEPTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "use_sliding_window": (False, True, None),
}


def read_qwen2(values: Values, problems: list[str]) -> Values:
    """Return our `model` section of a Qwen2's config.json."""
    model = llama.read_common(values, problems) | read_qwen_windows(values, problems)
    return model | {"attention_bias": "qkv"}


def read_qwen_windows(values: Values, problems: list[str]) -> Values:
    """Return our keys of sliding windows: without a list of types, layers from number
    `max_window_layers` on have one."""
    slides = values.get("use_sliding_window") and values.get("sliding_window", 4096) is not None
    layers, first = values.get("num_hidden_layers") or 0, values.get("max_window_layers", 28)
    types = values.get("layer_types")
    if not slides:
        if isinstance(types, list) and "sliding_attention" in types:
            problems.append(
                "layer_types has sliding_attention, but use_sliding_window or sliding_window is "
                "off; set both, or all types to full_attention"
            )
        return {}
    defaults = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return read_windows(values, problems, defaults, values.get("sliding_window", 4096))


def write_qwen2(model: ModelConfig, blocks: list[int]) -> Values:
    """Return Qwen2's config.json."""
    types = write_types(model, blocks)
    values = llama.write_common(model) | {
        "use_sliding_window": model.sliding_window is not None,
        "sliding_window": model.sliding_window,
        "layer_types": types,
    }
    first = types.index("sliding_attention") if "sliding_attention" in types else len(types)
    if model.sliding_window is not None and "full_attention" not in types[first:]:
        # For readers that do not support a list of types.
        values["max_window_layers"] = first
    return values


def qwen2_names(model: ModelConfig) -> Names:
    """Return Llama's names, with biases."""
    return llama.common_names(model, "qkv", False)


QWEN2 = Architecture(
    model_type="qwen2",
    hf_class="Qwen2ForCausalLM",
    read_config=read_qwen2,
    write_config=write_qwen2,
    wanted=wanted((*SCALED, "sliding_window"), attention_bias=("qkv",), feed_forward_bias=(False,)),
    names=qwen2_names,
    accepted=ACCEPTED,
)


def read_qwen3(values: Values, problems: list[str]) -> Values:
    """Return our `model` section of a Qwen3's config.json."""
    model = llama.read_common(values, problems) | read_qwen_windows(values, problems)
    return model | {
        "attention_bias": "all" if values.get("attention_bias") else "none",
        # Unlike Llama's, it does not follow from the others.
        "head_dim": values.get("head_dim") or 128,
        "qk_norm": True,
    }


def write_qwen3(model: ModelConfig, blocks: list[int]) -> Values:
    """Return Qwen3's config.json."""
    return write_qwen2(model, blocks) | {"attention_bias": model.attention_bias != "none"}


def qwen3_names(model: ModelConfig) -> Names:
    """Return Llama's names, with norms of queries and keys."""
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
    wanted=wanted((*SCALED, "sliding_window"), qk_norm=(True,), feed_forward_bias=(False,)),
    names=qwen3_names,
    accepted=ACCEPTED,
)
