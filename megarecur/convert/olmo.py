"""OLMo 2 and 3 (OLMo Team 2024, 2025) in Hugging Face's format.

Norms come after attention and feed-forward, and queries and keys are normed over all heads. OLMo 3
has layers with a window, whose rotation is not scaled.
"""

from __future__ import annotations

from megarecur.config.model import ModelConfig
from megarecur.convert import llama
from megarecur.convert.architecture import (
    SCALED,
    TYPES,
    Architecture,
    Names,
    Values,
    entry,
    find_scaled_windows,
    read_layer_ropes,
    read_windows,
    wanted,
    write_types,
)
from megarecur.convert.qwen import QK_NORMS


def read_olmo2(values: Values, problems: list[str], rope: Values | None = None) -> Values:
    """Return our `model` section for an OLMo 2's config.json."""
    return llama.read_common(values, problems, rope, eps=1e-5) | {
        "attention_bias": "all" if values.get("attention_bias") else "none",
        "norm_position": "output",
        "qk_norm": True,
        "qk_norm_over": "all",
    }


def write_olmo2(model: ModelConfig, blocks: list[int]) -> Values:
    """Return OLMo 2's config.json."""
    values = llama.write_common(model) | {"attention_bias": model.attention_bias != "none"}
    rope = values["rope_scaling"]
    if rope is not None and len(rope) == 2:
        # transformers 4 accepts only these two, under their old names.
        values["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
    return values


def names(model: ModelConfig) -> Names:
    """Return Llama's names with OLMo's norms."""
    names = llama.common_names(model, "qkvo" if model.attention_bias != "none" else "", False)
    layer = [e for e in names.layer if not e.ours[0].endswith("_norm.weight")]
    layer += [
        entry("post_attention_layernorm.weight", "attention_output_norm.weight"),
        entry("post_feedforward_layernorm.weight", "feed_forward_output_norm.weight"),
        *QK_NORMS,
    ]
    return Names(names.layers, layer, names.first, names.last, names.head, names.ignored)


OLMO2 = Architecture(
    model_type="olmo2",
    hf_class="Olmo2ForCausalLM",
    read_config=read_olmo2,
    write_config=write_olmo2,
    wanted=wanted(
        SCALED,
        norm_position=("output",),
        qk_norm=(True,),
        qk_norm_over=("all",),
        feed_forward_bias=(False,),
    ),
    names=names,
    accepted={"hidden_act": ("silu", "swish", None)},
)


def read_olmo3(values: Values, problems: list[str]) -> Values:
    """Return our `model` section for an OLMo 3's config.json."""
    layers = values.get("num_hidden_layers") or 0
    defaults = ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(layers)]
    windows = read_windows(values, problems, defaults, values.get("sliding_window", 4096))
    if values.get("rope_theta") is None and not values.get("rope_parameters"):
        problems.append(
            "rope_theta: required, as versions of transformers differ in what is meant without it"
        )
    rope = read_layer_ropes(values, problems, dict.fromkeys(TYPES, 5e5))
    if not windows.get("sliding_window") or unscaled(rope):
        rope["rope_theta_local"] = None
    return read_olmo2(values, problems, rope) | windows


def unscaled(rope: Values) -> bool:
    """Return True if all layers have the same rotation."""
    scaled = rope["rope_scaling_factor"] != 1.0 or rope["rope_scaling"] is not None
    return not scaled and rope["rope_theta_local"] == rope["rope_theta"]


def write_olmo3(model: ModelConfig, blocks: list[int]) -> Values:
    """Return OLMo 3's config.json.

    The rotation is written for transformers 4 and for 5, which ignores the base of layers with a
    window in the older keys.
    """
    values = llama.write_common(model)
    base = {"rope_type": "default", "rope_theta": model.rope_theta}
    by_type = {"full_attention": base | (values["rope_scaling"] or {}), "sliding_attention": base}
    return values | {
        "rope_parameters": by_type,
        "attention_bias": model.attention_bias != "none",
        # The key is required even if no layer has a window.
        "sliding_window": model.sliding_window or 4096,
        "layer_types": write_types(model, blocks),
    }


def find_obstacles(model: ModelConfig) -> list[str]:
    """Return the obstacle that all layers have one base."""
    local = model.rope_theta_local
    if local not in (None, model.rope_theta):
        return [
            f"model.rope_theta_local={local}: all layers of OLMo3 have one base; such a model "
            "stays a megarecur run"
        ]
    return find_scaled_windows("Olmo3", model)


OLMO3 = Architecture(
    model_type="olmo3",
    hf_class="Olmo3ForCausalLM",
    read_config=read_olmo3,
    write_config=write_olmo3,
    wanted=wanted(
        (*SCALED, "sliding_window", "rope_theta_local"),
        norm_position=("output",),
        qk_norm=(True,),
        qk_norm_over=("all",),
        feed_forward_bias=(False,),
    ),
    names=names,
    obstacles=find_obstacles,
    accepted={"hidden_act": ("silu", "swish", None)},
)
