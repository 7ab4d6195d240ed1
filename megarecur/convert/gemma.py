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
from megarecur.convert.architecture import Architecture, Entry, Names, Values, wanted

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
