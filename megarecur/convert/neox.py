"""GPT-NeoX and Pythia (Black et al. 2022, Biderman et al. 2023) as Hugging Face spells them."""

from __future__ import annotations

import torch
from torch import Tensor

from megarecur.config.schema import ModelConfig
from megarecur.convert.architecture import (
    Architecture,
    Entry,
    Names,
    Values,
    entry,
    linear,
    read_rope,
    wanted,
)

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
"""Theirs to our `feed_forward`; the last three are one formula."""


def read_config(values: Values, problems: list[str]) -> Values:
    """Our `model` section for a GPT-NeoX's config.json."""
    theta, _ = read_rope(values, problems)
    rope = values.get("rope_parameters") or {}
    fraction = values.get("rotary_pct", rope.get("partial_rotary_factor", 0.25))
    return {
        "hidden_size": values.get("hidden_size"),
        "num_heads": values.get("num_attention_heads"),
        "ffn_hidden_size": values.get("intermediate_size"),
        "vocab_size": values.get("vocab_size"),
        "positions": "rope",
        "rope_theta": values.get("rotary_emb_base") or theta,
        "rope_fraction": fraction,
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
    """GPT-NeoX's config.json."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_heads,
        "hidden_act": next(a for a, ours in ACTIVATIONS.items() if ours == model.feed_forward),
        "rotary_pct": model.rope_fraction,
        "rotary_emb_base": model.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": model.max_positions,
        "initializer_range": model.init_std,
        "layer_norm_eps": model.norm_eps,
        "use_parallel_residual": model.parallel_residual,
        "attention_bias": model.attention_bias != "none",
        "hidden_dropout": model.dropout,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": model.tie_embeddings,
    }


def split(fused: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """Rows [heads x (q, k, v) x head_dim] of weight or bias to those of query, key and value."""
    return tuple(
        part.flatten(0, 1).contiguous()
        for part in fused.unflatten(0, (model.num_heads, 3, model.head_dim)).unbind(1)
    )


def join(parts: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    """Back."""
    heads = [part.unflatten(0, (model.num_heads, model.head_dim)) for part in parts]
    return torch.stack(heads, dim=1).flatten(0, 2)


def names(model: ModelConfig) -> Names:
    """Biases are everywhere, or everywhere but in attention."""
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
    """Every head has a key and value of its own, and together they are as wide as the model."""
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
        free=("rope_fraction", "parallel_residual"),
        norm=("layer",),
        feed_forward=("gelu", "gelu_tanh"),
    ),
    names=names,
    accepted={"hidden_act": (*ACTIVATIONS, None)},
    obstacles=find_obstacles,
)
