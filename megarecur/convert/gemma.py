"""Gemma 1, 2 and 3 (text) (Gemma Team 2024, 2024, 2025) as Hugging Face spells them.

Their RMS norms multiply with 1 + weight. Our gain is that sum, in fp32, which is exact for stored
values of up to 8 bits of precision (bf16) that are 0 or at least 2^-16; others lose what lies below
2^-23.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megarecur.config.schema import ModelConfig
from megarecur.convert import llama
from megarecur.convert.architecture import Architecture, Entry, Names, Values, read_rope, wanted
from megarecur.convert.qwen import QK_NORMS

ACTIVATIONS = {"gelu_pytorch_tanh": "geglu_tanh", "gelu": "geglu"}
"""Theirs to our `feed_forward`."""


def read_common(values: Values, problems: list[str]) -> Values:
    """What the generations have in common."""
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
    return llama.read_common(values, problems) | {
        "feed_forward": ACTIVATIONS.get(activation or "", "geglu_tanh"),
        "attention_bias": "all" if values.get("attention_bias") else "none",
        "tie_embeddings": bool(values.get("tie_word_embeddings", True)),
        "scale_embeddings": True,
    }


def write_common(model: ModelConfig) -> Values:
    """What `read_common` reads."""
    activation = next(a for a, ours in ACTIVATIONS.items() if ours == model.feed_forward)
    return llama.write_common(model) | {
        "hidden_act": activation,
        "hidden_activation": activation,
        "attention_bias": model.attention_bias != "none",
    }


def add_one(weight: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """Theirs to our gain."""
    return (weight + 1.0,)


def subtract_one(parts: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    """Back."""
    return parts[0] - 1.0


def gain(theirs: str, ours: str) -> Entry:
    """An RMS norm's."""
    return Entry(theirs, (ours,), add_one, subtract_one)


def gemma_names(model: ModelConfig) -> Names:
    """Llama's, with gains that start from 1."""
    return common_names(model, {"input_layernorm": "attention_norm",
                                "post_attention_layernorm": "feed_forward_norm"})  # fmt: skip


def common_names(model: ModelConfig, norms: dict[str, str]) -> Names:
    """Llama's linears, and norms of which each layer's are given, theirs to ours."""
    names = llama.common_names(model, "qkvo" if model.attention_bias != "none" else "", False)
    layer = [e for e in names.layer if not e.ours[0].endswith("_norm.weight")]
    layer += [gain(f"{theirs}.weight", f"{ours}.weight") for theirs, ours in norms.items()]
    last = [gain("model.norm.weight", "final_norm.weight"), *names.last[1:]]
    return Names(names.layers, layer, names.first, last, names.head, names.ignored)


REQUIRED = (*llama.LLAMA.required, "num_key_value_heads", "head_dim")
SCALED: dict[str, tuple[Any, ...]] = {
    "scale_embeddings": (True,),
    "feed_forward": tuple(ACTIVATIONS.values()),
    "feed_forward_bias": (False,),
}

GEMMA = Architecture(
    model_type="gemma",
    hf_class="GemmaForCausalLM",
    read_config=read_common,
    write_config=lambda model, blocks: write_common(model),
    wanted=wanted(**SCALED),
    names=gemma_names,
    required=REQUIRED,
)


# ------------------------------------------------------------------------------- Gemma 2 and 3

TYPES = {"sliding_attention": "sliding", "full_attention": "full"}
"""Theirs to ours."""


def read_gemma2(values: Values, problems: list[str]) -> Values:
    """Our `model` section for a Gemma 2's config.json."""
    model = read_common(values, problems) | read_attention(values, problems, period=2)
    return model | {
        "norm_position": "peri",
        "attention_softcap": values.get("attn_logit_softcapping", 50.0),
        "logit_softcap": values.get("final_logit_softcapping", 30.0),
    }


def read_attention(values: Values, problems: list[str], period: int) -> Values:
    """Scale of scores, window, and which layers see it: all but each last of a period."""
    head_dim, layers = values.get("head_dim"), values.get("num_hidden_layers") or 0
    scalar = values.get("query_pre_attn_scalar", 256)
    types = values.get("layer_types") or [
        "sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)
    ]
    if not (isinstance(scalar, int | float) and scalar > 0):
        problems.append(f"query_pre_attn_scalar={scalar!r} is not supported; it must be above 0")
        scalar = head_dim
    fits = isinstance(types, list) and len(types) == layers
    if not fits or any(t not in TYPES for t in map(str, types)):
        problems.append(
            f"layer_types={types!r} is not supported; only a model with {layers} of "
            f"{', '.join(TYPES)} converts"
        )
        return {}
    window = values.get("sliding_window", 4096)
    ours = [TYPES[t] for t in types]
    if "sliding" not in ours:
        window = None
    shortest = next(p for p in range(1, layers + 1)
                    if all(ours[i] == ours[i % p] for i in range(layers)))  # fmt: skip
    return {
        "attention_scale": None if scalar == head_dim else scalar**-0.5,
        "sliding_window": window,
        "attention_types": ours[:shortest],
    }


def write_attention(model: ModelConfig, blocks: list[int]) -> Values:
    """What `read_attention` reads; a layer's type is that of the block it runs."""
    scalar: float = model.head_dim
    if model.attention_scale is not None:
        scalar = model.attention_scale**-2
        if abs(scalar - round(scalar)) < 1e-9 * scalar:
            scalar = round(scalar)
    theirs = {ours: name for name, ours in TYPES.items()}
    return {
        "query_pre_attn_scalar": scalar,
        # A window that no layer sees must be there too.
        "sliding_window": model.sliding_window or 4096,
        "layer_types": [theirs["sliding" if model.slides(b) else "full"] for b in blocks],
    }


def write_gemma2(model: ModelConfig, blocks: list[int]) -> Values:
    """Gemma 2's config.json."""
    return (
        write_common(model)
        | write_attention(model, blocks)
        | {
            "attn_logit_softcapping": model.attention_softcap,
            "final_logit_softcapping": model.logit_softcap,
        }
    )


def gemma2_names(model: ModelConfig) -> Names:
    """Two norms around each branch."""
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
        **SCALED,
    ),
    names=gemma2_names,
    required=REQUIRED,
)


def read_gemma3(values: Values, problems: list[str]) -> Values:
    """Our `model` section for the config.json of a Gemma 3 that reads text."""
    period = values.get("sliding_window_pattern") or values.get("_sliding_window_pattern") or 6
    attention = read_attention(values, problems, period)
    rope, local = values.get("rope_parameters") or {}, values.get("rope_local_base_freq", 1e4)
    if isinstance(rope, dict) and "sliding_attention" in rope:
        # Newer files have a rotation for each type of layer.
        sliding: list[str] = []
        local, factor = read_rope({"rope_parameters": rope["sliding_attention"]}, sliding)
        problems += sliding
        values = values | {"rope_parameters": rope.get("full_attention")}
    theta, factor = read_rope({"rope_theta": 1e6} | values, problems, ("default", "linear"))
    return (
        read_common(values | {"rope_scaling": None, "rope_parameters": None}, problems)
        | attention
        | {
            "rope_theta": theta,
            "rope_scaling_factor": factor,
            "rope_theta_local": local if attention.get("sliding_window") else None,
            "norm_position": "peri",
            "qk_norm": True,
            "logit_softcap": values.get("final_logit_softcapping"),
        }
    )


def write_gemma3(model: ModelConfig, blocks: list[int]) -> Values:
    """Gemma 3's config.json."""
    factor = model.rope_scaling_factor
    return (
        write_common(model)
        | write_attention(model, blocks)
        | {
            "rope_local_base_freq": model.rope_theta_local or model.rope_theta,
            "rope_scaling": None if factor == 1.0 else {"rope_type": "linear", "factor": factor},
            "attn_logit_softcapping": None,
            "final_logit_softcapping": model.logit_softcap,
        }
    )


def gemma3_names(model: ModelConfig) -> Names:
    """Gemma 2's, and gains of queries and keys."""
    names = gemma2_names(model)
    names.layer.extend(gain(e.theirs, e.ours[0]) for e in QK_NORMS)
    return names


def find_obstacles(model: ModelConfig) -> list[str]:
    """Layers that see a window rotate by positions as they are."""
    scaled = model.rope_scaling_factor != 1.0 and model.sliding_window is not None
    if scaled and model.rope_theta_local is None:
        return [
            f"model.rope_scaling_factor={model.rope_scaling_factor}: Gemma3 scales no layers that "
            "see a window, which it does without rope_theta_local; such a model stays a megarecur "
            "run"
        ]
    return []


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
            "rope_scaling_factor",
        ),
        norm_position=("peri",),
        qk_norm=(True,),
        **SCALED,
    ),
    names=gemma3_names,
    obstacles=find_obstacles,
    required=REQUIRED,
    accepted={
        "use_bidirectional_attention": (False, None),
        "attn_logit_softcapping": (None,),
    },
)
