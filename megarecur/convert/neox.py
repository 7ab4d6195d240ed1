"""GPT-NeoX and Pythia (Black et al. 2022, Biderman et al. 2023) in Hugging Face's format."""

from __future__ import annotations

import torch
from torch import Tensor

from megarecur.config.model import ModelConfig
from megarecur.convert.architecture import (
    SCALED,
    Architecture,
    Entry,
    Names,
    Values,
    entry,
    linear,
    read_rope,
    wanted,
    write_rope,
    written_positions,
)

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
"""Activations, from theirs to our `feed_forward`; the last three are one formula."""


def read_config(values: Values, problems: list[str]) -> Values:
    """Return our `model` section of a GPT-NeoX's config.json."""
    rope = read_rope(
        values,
        problems,
        thetas=("rotary_emb_base", "rope_theta"),
        fractions=("rotary_pct",),
        defaults=(10000.0, 0.25),
    )
    return rope | {
        "hidden_size": values.get("hidden_size"),
        "num_heads": values.get("num_attention_heads"),
        "ffn_hidden_size": values.get("intermediate_size"),
        "vocab_size": values.get("vocab_size"),
        "positions": "rope",
        "max_positions": values.get("max_position_embeddings", 2048),
        "norm": "layer",
        "norm_eps": values.get("layer_norm_eps", 1e-5),
        "norm_position": "pre",
        "parallel_residual": values.get("use_parallel_residual", True),
        "feed_forward": ACTIVATIONS.get(values.get("hidden_act", "gelu"), "gelu"),
        "attention_bias": "all" if values.get("attention_bias", True) else "none",
        "feed_forward_bias": True,
        "tie_embeddings": bool(values.get("tie_word_embeddings")),
        "dropout": values.get("hidden_dropout", 0.0),
        "attention_dropout": values.get("attention_dropout", 0.0),
        "init_std": values.get("initializer_range", 0.02),
    }


def write_config(model: ModelConfig, blocks: list[int]) -> Values:
    """Return GPT-NeoX's config.json."""
    rope = write_rope(model)
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_heads,
        "hidden_act": next(a for a, ours in ACTIVATIONS.items() if ours == model.feed_forward),
        "rotary_pct": model.rope_fraction,
        "rotary_emb_base": rope["rope_theta"],
        "rope_scaling": rope["rope_scaling"],
        "max_position_embeddings": written_positions(model),
        "initializer_range": model.init_std,
        "layer_norm_eps": model.norm_eps,
        "use_parallel_residual": model.parallel_residual,
        "attention_bias": model.attention_bias != "none",
        "hidden_dropout": model.dropout,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": model.tie_embeddings,
    }


def split(fused: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """Split rows [heads x (q, k, v) x head_dim] of a weight or bias into query, key and value."""
    return tuple(
        part.flatten(0, 1).contiguous()
        for part in fused.unflatten(0, (model.num_heads, 3, model.head_dim)).unbind(1)
    )


def join(parts: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    """Convert our tensors to theirs."""
    heads = [part.unflatten(0, (model.num_heads, model.head_dim)) for part in parts]
    return torch.stack(heads, dim=1).flatten(0, 2)


def names(model: ModelConfig) -> Names:
    """Return the names, with biases everywhere or everywhere except in attention."""
    biased = model.attention_bias != "none"
    layer = linear("input_layernorm", "attention_norm", True)
    for kind in ("weight", "bias") if biased else ("weight",):
        parts = tuple(f"attention.{name}.{kind}" for name in ("query", "key", "value"))
        layer.append(Entry(f"attention.query_key_value.{kind}", parts, split, join))
    layer += linear("attention.dense", "attention.output", biased)
    layer += linear("post_attention_layernorm", "feed_forward_norm", True)
    layer += linear("mlp.dense_h_to_4h", "feed_forward.up", True)
    layer += linear("mlp.dense_4h_to_h", "feed_forward.down", True)
    last = linear("gpt_neox.final_layer_norm", "final_norm", True)
    if not model.tie_embeddings:
        last.append(entry("embed_out.weight", "head.weight"))
    return Names(
        layers="gpt_neox.layers",
        layer=layer,
        first=[entry("gpt_neox.embed_in.weight", "embedding.weight")],
        last=last,
        head="embed_out.weight",
        ignored=("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"),
    )


def find_obstacles(model: ModelConfig) -> list[str]:
    """Return the obstacles: every head has its own key and value, and heads together are as wide as
    the model."""
    problems = []
    if model.num_kv_heads != model.num_heads:
        problems.append(
            f"model.num_kv_heads={model.num_kv_heads}: GPTNeoX has as many as num_heads="
            f"{model.num_heads}; such a model stays a megarecur run"
        )
    if model.head_dim * model.num_heads != model.hidden_size:
        problems.append(
            f"model.head_dim={model.head_dim}: GPTNeoX has hidden_size / num_heads only; such a "
            "model stays a megarecur run"
        )
    return problems


NEOX = Architecture(
    model_type="gpt_neox",
    hf_class="GPTNeoXForCausalLM",
    read_config=read_config,
    write_config=write_config,
    wanted=wanted(
        free=(*SCALED, "rope_fraction", "parallel_residual"),
        norm=("layer",),
        feed_forward=("gelu", "gelu_tanh"),
    ),
    names=names,
    accepted={"hidden_act": (*ACTIVATIONS, None)},
    obstacles=find_obstacles,
)
