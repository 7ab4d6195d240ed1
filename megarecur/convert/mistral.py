"""Mistral (Jiang et al. 2023) in Hugging Face's format: a Llama whose layers may have a window."""

from __future__ import annotations

from megarecur.config.model import ModelConfig
from megarecur.convert import llama
from megarecur.convert.architecture import (
    SCALED,
    Architecture,
    Names,
    Values,
    find_mixed_windows,
    wanted,
)


def read_config(values: Values, problems: list[str]) -> Values:
    """Return our `model` section for a Mistral's config.json."""
    # An omitted key means eight key heads and a window; null means neither.
    values = {"num_key_value_heads": 8, "sliding_window": 4096} | values
    model = llama.read_common(values, problems)
    if values["sliding_window"] is not None:
        model |= {"sliding_window": values["sliding_window"], "attention_types": ["sliding"]}
    return model


def write_config(model: ModelConfig, blocks: list[int]) -> Values:
    """Return Mistral's config.json."""
    return llama.write_common(model) | {"sliding_window": model.sliding_window}


def names(model: ModelConfig) -> Names:
    """Return Llama's names, without biases."""
    return llama.common_names(model, "", False)


MISTRAL = Architecture(
    model_type="mistral",
    hf_class="MistralForCausalLM",
    read_config=read_config,
    write_config=write_config,
    wanted=wanted(
        (*SCALED, "sliding_window"), attention_bias=("none",), feed_forward_bias=(False,)
    ),
    names=names,
    obstacles=lambda model: find_mixed_windows("Mistral", model),
    accepted={"hidden_act": ("silu", "swish", None), "layer_types": (None,)},
)
