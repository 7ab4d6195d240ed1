"""Gemma 1, 2 and 3 (text) (Gemma Team 2024, 2024, 2025) in Hugging Face's format.

Their RMS norms multiply with 1 + weight. Our gain is that sum, in fp32, which is exact for stored
values of up to 8 bits of precision (bf16) that are 0 or at least 2^-16; others lose what lies below
2^-23.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megarecur.config.model import ModelConfig
from megarecur.convert import llama
from megarecur.convert.architecture import (
    SCALED,
    Architecture,
    Entry,
    Names,
    Values,
    find_scaled_windows,
    read_layer_ropes,
    read_rope,
    read_windows,
    wanted,
    write_types,
)
from megarecur.convert.qwen import QK_NORMS

ACTIVATIONS = {"gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu"}
"""Activations, from theirs to our `feed_forward`."""


def read_common(values: Values, problems: list[str], rope: Values | None = None) -> Values:
    """Return the values common to all generations; `rope`: see `llama.read_common`."""
    activation = values.get("hidden_activation") or values.get("hidden_act")
    if values.get("hidden_activation") is None and values.get("hidden_act") == "gelu":
        problems.append(
            "hidden_act='gelu' without hidden_activation: says the exact GELU, and is in files of "
            "models trained with the one by tanh; name the one meant as hidden_activation, for "
            "Google's models 'gelu_pytorch_tanh'"
        )
    elif activation not in (*ACTIVATIONS, None):
        problems.append(
            f"hidden_activation={activation!r} is not supported; only a model with "
            f"{' or '.join(map(repr, ACTIVATIONS))} converts"
        )
    if rope is None:
        rope = read_rope(values, problems, kinds=("default",))
    return llama.read_common(values, problems, rope) | {
        "feed_forward": ACTIVATIONS.get(activation or "", "geglu_tanh"),
        "attention_bias": "all" if values.get("attention_bias") else "none",
        "tie_embeddings": bool(values.get("tie_word_embeddings", True)),
        "scale_embeddings": True,
    }


def write_common(model: ModelConfig) -> Values:
    """Return the values that `read_common` reads."""
    activation = next(a for a, ours in ACTIVATIONS.items() if ours == model.feed_forward)
    return llama.write_common(model) | {
        "hidden_act": activation,
        "hidden_activation": activation,
        "attention_bias": model.attention_bias != "none",
    }


def add_one(weight: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """Convert their weight to our gain."""
    return (weight + 1.0,)


def subtract_one(parts: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    """Convert our tensors to theirs."""
    return parts[0] - 1.0


def gain(theirs: str, ours: str) -> Entry:
    """Return the entry of an RMS norm's gain."""
    return Entry(theirs, (ours,), add_one, subtract_one)


def gemma_names(model: ModelConfig) -> Names:
    """Return Llama's names, with gains that start from 1."""
    return common_names(model, {"input_layernorm": "attention_norm",
                                "post_attention_layernorm": "feed_forward_norm"})  # fmt: skip


def common_names(model: ModelConfig, norms: dict[str, str]) -> Names:
    """Return Llama's linears, and each layer's given norms, from theirs to ours."""
    names = llama.common_names(model, "qkvo" if model.attention_bias != "none" else "", False)
    layer = [e for e in names.layer if not e.ours[0].endswith("_norm.weight")]
    layer += [gain(f"{theirs}.weight", f"{ours}.weight") for theirs, ours in norms.items()]
    last = [gain("model.norm.weight", "final_norm.weight"), *names.last[1:]]
    return Names(names.layers, layer, names.first, last, names.head, names.ignored)


REQUIRED = (*llama.LLAMA.required, "num_key_value_heads", "head_dim")
GEMMAS: dict[str, tuple[Any, ...]] = {
    "scale_embeddings": (True,),
    "feed_forward": tuple(ACTIVATIONS.values()),
    "feed_forward_bias": (False,),
}

GEMMA = Architecture(
    model_type="gemma",
    hf_class="GemmaForCausalLM",
    read_config=read_common,
    write_config=lambda model, blocks: write_common(model),
    wanted=wanted(**GEMMAS),
    names=gemma_names,
    required=REQUIRED,
)


# ------------------------------------------------------------------------------- Gemma 2 and 3


def read_gemma2(values: Values, problems: list[str]) -> Values:
    """Return our `model` section of a Gemma 2's config.json."""
    model = read_common(values, problems) | read_attention(values, problems, period=2)
    return model | {
        "norm_position": "peri",
        "attention_softcap": values.get("attn_logit_softcapping", 50.0),
        "logit_softcap": values.get("final_logit_softcapping", 30.0),
    }


def read_attention(values: Values, problems: list[str], period: int) -> Values:
    """Return the scale of scores, the window, and which layers have it: all but the last of each
    period."""
    head_dim, layers = values.get("head_dim"), values.get("num_hidden_layers") or 0
    scalar = values.get("query_pre_attn_scalar", 256)
    defaults = ["sliding_attention" if (i + 1) % period else "full_attention"
                for i in range(layers)]  # fmt: skip
    if not (isinstance(scalar, int | float) and scalar > 0):
        problems.append(f"query_pre_attn_scalar={scalar!r} is not supported; it must be above 0")
        scalar = head_dim
    windows = read_windows(values, problems, defaults, values.get("sliding_window", 4096))
    return windows | {"attention_scale": None if scalar == head_dim else scalar**-0.5}


def write_attention(model: ModelConfig, blocks: list[int]) -> Values:
    """Return the values that `read_attention` reads; a layer has the type of the block it runs."""
    scalar: float = model.head_dim
    if model.attention_scale is not None:
        scalar = model.attention_scale**-2
        if abs(scalar - round(scalar)) < 1e-9 * scalar:
            scalar = round(scalar)
    return {
        "query_pre_attn_scalar": scalar,
        # The key is required even if no layer has a window.
        "sliding_window": model.sliding_window or 4096,
        "layer_types": write_types(model, blocks),
    }


def write_gemma2(model: ModelConfig, blocks: list[int]) -> Values:
    """Return Gemma 2's config.json."""
    return (
        write_common(model)
        | write_attention(model, blocks)
        | {
            "attn_logit_softcapping": model.attention_softcap,
            "final_logit_softcapping": model.logit_softcap,
        }
    )


def gemma2_names(model: ModelConfig) -> Names:
    """Return the names with two norms around each branch."""
    norms = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_output_norm",
        "pre_feedforward_layernorm": "feed_forward_norm",
        "post_feedforward_layernorm": "feed_forward_output_norm",
    }
    return common_names(model, norms)


GEMMA2 = Architecture(
    model_type="gemma2",
    hf_class="Gemma2ForCausalLM",
    read_config=read_gemma2,
    write_config=write_gemma2,
    wanted=wanted(
        free=("attention_scale", "attention_softcap", "logit_softcap", "sliding_window"),
        norm_position=("peri",),
        **GEMMAS,
    ),
    names=gemma2_names,
    required=REQUIRED,
)


def read_gemma3(values: Values, problems: list[str]) -> Values:
    """Return our `model` section of the config.json of a text-only Gemma 3."""
    # transformers ignores `_sliding_window_pattern`, which files also contain.
    period = values.get("sliding_window_pattern") or 6
    attention = read_attention(values, problems, period)
    defaults = {"full_attention": 1e6, "sliding_attention": 1e4}
    rope = read_layer_ropes(values, problems, defaults, "rope_local_base_freq")
    if not attention.get("sliding_window"):
        rope["rope_theta_local"] = None
    return (
        read_common(values, problems, rope)
        | attention
        | {
            "norm_position": "peri",
            "qk_norm": True,
            "logit_softcap": values.get("final_logit_softcapping"),
        }
    )


def write_gemma3(model: ModelConfig, blocks: list[int]) -> Values:
    """Return Gemma 3's config.json."""
    return (
        write_common(model)
        | write_attention(model, blocks)
        | {
            "rope_local_base_freq": model.rope_theta_local or model.rope_theta,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": model.logit_softcap,
        }
    )


def gemma3_names(model: ModelConfig) -> Names:
    """Return Gemma 2's names, with gains of queries and keys."""
    names = gemma2_names(model)
    names.layer.extend(gain(e.theirs, e.ours[0]) for e in QK_NORMS)
    return names


def find_obstacles(model: ModelConfig) -> list[str]:
    """Return the obstacle that layers with a window use unscaled positions."""
    return find_scaled_windows("Gemma3", model)


GEMMA3 = Architecture(
    model_type="gemma3_text",
    hf_class="Gemma3ForCausalLM",
    read_config=read_gemma3,
    write_config=write_gemma3,
    wanted=wanted(
        free=(
            "attention_scale",
            "logit_softcap",
            "sliding_window",
            "rope_theta_local",
            *SCALED,
        ),
        norm_position=("peri",),
        qk_norm=(True,),
        **GEMMAS,
    ),
    names=gemma3_names,
    obstacles=find_obstacles,
    required=REQUIRED,
    accepted={
        "use_bidirectional_attention": (False, None),
        "attn_logit_softcapping": (None,),
    },
)
