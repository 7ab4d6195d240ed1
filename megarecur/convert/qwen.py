"""Qwen2 and Qwen3 (Qwen Team 2024, 2025) as Hugging Face spells them.

Both are Llamas but for biases on query, key and value (Qwen2) or a norm of queries and keys (Qwen3).
"""

from __future__ import annotations

from typing import Any

from megarecur.config.schema import ModelConfig
from megarecur.convert import llama
from megarecur.convert.architecture import Architecture, Names, Values

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
    wanted=llama.LLAMA.wanted | {"attention_bias": ("qkv",), "feed_forward_bias": (False,)},
    names=qwen2_names,
    accepted=ACCEPTED,
)
