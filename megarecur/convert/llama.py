"""Llama (Touvron et al. 2023) in Hugging Face's format: config keys and tensors."""

from __future__ import annotations

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


def read_config(values: Values, problems: list[str]) -> Values:
    """Return our `model` section of a Llama's config.json."""
    model = read_common(values, problems)
    model["attention_bias"] = "all" if values.get("attention_bias") else "none"
    model["feed_forward_bias"] = bool(values.get("mlp_bias"))
    return model


def read_common(
    values: Values, problems: list[str], rope: Values | None = None, eps: float = 1e-6
) -> Values:
    """Return the values that Llama and its relatives share: everything except biases.

    Args:
        rope: our keys of rotary positions, if they are not read like Llama's.
        eps: epsilon of norms if the file has none.
    """
    model = {
        "hidden_size": values.get("hidden_size"),
        "num_heads": values.get("num_attention_heads"),
        "ffn_hidden_size": values.get("intermediate_size"),
        "vocab_size": values.get("vocab_size"),
        "positions": "rope",
        "max_positions": values.get("max_position_embeddings", 2048),
        "norm": "rms",
        "norm_eps": values.get("rms_norm_eps", eps),
        "norm_position": "pre",
        "feed_forward": "swiglu",
        "tie_embeddings": bool(values.get("tie_word_embeddings")),
        "attention_dropout": values.get("attention_dropout", 0.0),
        "init_std": values.get("initializer_range", 0.02),
    } | (read_rope(values, problems) if rope is None else rope)
    # Omitted keys follow from the others, as in Llama.
    for theirs, ours in (("num_key_value_heads", "num_kv_heads"), ("head_dim", "head_dim")):
        if values.get(theirs) is not None:
            model[ours] = values[theirs]
    return model


def write_config(model: ModelConfig, blocks: list[int]) -> Values:
    """Return Llama's config.json."""
    return write_common(model) | {
        "attention_bias": model.attention_bias != "none",
        "mlp_bias": model.feed_forward_bias,
    }


def write_common(model: ModelConfig) -> Values:
    """Return the values that `read_common` reads."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": written_positions(model),
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": model.tie_embeddings,
    } | write_rope(model)


def names(model: ModelConfig) -> Names:
    """Return Llama's names, with biases on all four projections of attention or on none."""
    biased = "qkvo" if model.attention_bias != "none" else ""
    return common_names(model, biased, model.feed_forward_bias)


def common_names(model: ModelConfig, biased: str, feed_forward_bias: bool) -> Names:
    """Return the tensors of Llama and its relatives.

    Args:
        biased: initials of the projections (q, k, v, o) that carry a bias.
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
    wanted=wanted(SCALED),
    names=names,
    accepted={
        "hidden_act": ("silu", "swish", None),
        "sliding_window": (None,),
    },
)
