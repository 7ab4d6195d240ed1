"""Llama (Touvron et al. 2023) as Hugging Face spells it: config keys and tensors."""

from __future__ import annotations

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


def read_config(values: Values, problems: list[str]) -> Values:
    """Our `model` section for a Llama's config.json."""
    model = read_common(values, problems)
    model["attention_bias"] = "all" if values.get("attention_bias") else "none"
    model["feed_forward_bias"] = bool(values.get("mlp_bias"))
    return model


def read_common(values: Values, problems: list[str]) -> Values:
    """What the relatives of Llama have in common with it: everything but biases."""
    model = {
        "hidden_size": values.get("hidden_size"),
        "num_heads": values.get("num_attention_heads"),
        "ffn_hidden_size": values.get("intermediate_size"),
        "vocab_size": values.get("vocab_size"),
        "positions": "rope",
        "rope_theta": read_rope(values, problems)[0],
        "max_positions": values.get("max_position_embeddings", 2048),
        "norm": "rms",
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "norm_position": "pre",
        "feed_forward": "swiglu",
        "tie_embeddings": bool(values.get("tie_word_embeddings")),
        "attention_dropout": values.get("attention_dropout", 0.0),
        "init_std": values.get("initializer_range", 0.02),
    }
    # Left out, they follow from the others as they do in Llama.
    for theirs, ours in (("num_key_value_heads", "num_kv_heads"), ("head_dim", "head_dim")):
        if values.get(theirs) is not None:
            model[ours] = values[theirs]
    return model


def write_config(model: ModelConfig, blocks: list[int]) -> Values:
    """Llama's config.json."""
    return write_common(model) | {
        "rope_scaling": None,
        "attention_bias": model.attention_bias != "none",
        "mlp_bias": model.feed_forward_bias,
    }


def write_common(model: ModelConfig) -> Values:
    """What `read_common` reads."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": model.tie_embeddings,
    }


def names(model: ModelConfig) -> Names:
    """Biases are on all four projections of attention, or on none."""
    biased = "qkvo" if model.attention_bias != "none" else ""
    return common_names(model, biased, model.feed_forward_bias)


def common_names(model: ModelConfig, biased: str, feed_forward_bias: bool) -> Names:
    """The tensors of Llama and its relatives.

    Args:
        model: whose embedding may be tied.
        biased: initials of the projections (q, k, v, o) that carry a bias.
        feed_forward_bias: whether the feed-forward's do.
    """
    layer: list[Entry] = [entry("input_layernorm.weight", "attention_norm.weight")]
    for name in ("query", "key", "value", "output"):
        layer += linear(f"self_attn.{name[0]}_proj", f"attention.{name}", name[0] in biased)
    layer.append(entry("post_attention_layernorm.weight", "feed_forward_norm.weight"))
    for name in ("gate", "up", "down"):
        layer += linear(f"mlp.{name}_proj", f"feed_forward.{name}", feed_forward_bias)
    last = [entry("model.norm.weight", "final_norm.weight")]
    if not model.tie_embeddings:
        last.append(entry("lm_head.weight", "head.weight"))
    return Names(
        layers="model.layers",
        layer=layer,
        first=[entry("model.embed_tokens.weight", "embedding.weight")],
        last=last,
        head="lm_head.weight",
        ignored=("rotary_emb.inv_freq",),
    )


LLAMA = Architecture(
    model_type="llama",
    hf_class="LlamaForCausalLM",
    read_config=read_config,
    write_config=write_config,
    wanted=wanted(),
    names=names,
    accepted={
        "hidden_act": ("silu", "swish", None),
        "sliding_window": (None,),
        "partial_rotary_factor": (None, 1.0),
    },
)
