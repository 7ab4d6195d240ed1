"""Random models of Hugging Face's architectures, small enough for tests.

Shapes: B samples, S positions, V ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megarecur.model.context import build_context
from megarecur.model.transformer import Transformer
from megarecur.recurrence.schemes import layer_map

COMMON = {"vocab_size": 97, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3}


COMMON |= {"num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1}


COMMON |= {"eos_token_id": 2, "pad_token_id": 0}


SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "rope_theta": 500.0}),
    "qwen2, tied": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 14}),
    "qwen3, tied, biases": (
        "Qwen3",
        {"num_key_value_heads": 4, "head_dim": 6, "tie_word_embeddings": True}
        | {"attention_bias": True},
    ),
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.4, "rotary_emb_base": 500.0}),
    "gpt_neox, tied, in a row, tanh": (
        "GPTNeoX",
        {"rotary_pct": 1.0, "tie_word_embeddings": True, "use_parallel_residual": False}
        | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3},
    ),
    "gemma": ("Gemma", {"num_key_value_heads": 1, "head_dim": 14}),
    "gemma, untied, biases": (
        "Gemma",
        {"num_key_value_heads": 2, "head_dim": 6, "attention_bias": True}
        | {"tie_word_embeddings": False},
    ),
    "gemma2": (
        "Gemma2",
        {"num_key_value_heads": 2, "head_dim": 14, "query_pre_attn_scalar": 10}
        | {"sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2, untied, without caps": (
        "Gemma2",
        {"num_key_value_heads": 1, "head_dim": 6, "query_pre_attn_scalar": 6}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
        | {"sliding_window": 9, "tie_word_embeddings": False}
        | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    ),
    "gemma3_text": (
        "Gemma3Text",
        {"num_key_value_heads": 2, "head_dim": 14, "query_pre_attn_scalar": 10}
        | {"sliding_window": 5, "rope_local_base_freq": 50.0, "rope_theta": 3000.0}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "gemma3_text, untied, scaled": (
        "Gemma3Text",
        {"num_key_value_heads": 1, "head_dim": 6, "query_pre_attn_scalar": 6}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "tie_word_embeddings": False}
        | {"final_logit_softcapping": 3.0, "sliding_window": 30, "num_hidden_layers": 7},
    ),
    "gpt_neox, fewer biases": ("GPTNeoX", {"rotary_pct": 0.2, "attention_bias": False}),
    "qwen2, windows": (
        "Qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5}
        | {"max_window_layers": 1, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    ),
    "qwen3, windows by layer": (
        "Qwen3",
        {"num_key_value_heads": 2, "head_dim": 14, "use_sliding_window": True, "sliding_window": 5}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
    "mistral, no window": (
        "Mistral",
        {"num_key_value_heads": 1, "sliding_window": None, "head_dim": 14}
        | {"rope_theta": 500.0, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
    ),
    "olmo2": ("Olmo2", {"num_key_value_heads": 2, "rope_theta": 500.0}),
    "olmo2, biases": (
        "Olmo2",
        {"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True}
        | {"rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "olmo3": (
        "Olmo3",
        {"num_key_value_heads": 2, "sliding_window": 5, "num_hidden_layers": 5}
        | {
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 20.0}
            | {"original_max_position_embeddings": 16, "attention_factor": 1.3}
        },
    ),
    "phi3": (
        "Phi3",
        {"num_key_value_heads": 2, "sliding_window": 5, "partial_rotary_factor": 0.6}
        | {"original_max_position_embeddings": 64},
    ),
    "phi3, no window": (
        "Phi3",
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 500.0}
        | {"original_max_position_embeddings": 64},
    ),
    "llama, llama3": (
        "Llama",
        {"num_key_value_heads": 2, "rope_theta": 500.0, "head_dim": 14}
        | {
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
            | {"high_freq_factor": 4.0, "original_max_position_embeddings": 20}
        },
    ),
    "llama, dynamic": (
        "Llama",
        {"num_key_value_heads": 4, "max_position_embeddings": 16}
        | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "llama, yarn": (
        "Llama",
        {"num_key_value_heads": 2, "head_dim": 22}
        | {
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False}
            | {"original_max_position_embeddings": 16}
        },
    ),
    "llama, linear, smollm": (
        "Llama",
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_interleaved": False}
        | {"is_llama_config": True, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "gemma3_text, llama3": (
        "Gemma3Text",
        {"num_key_value_heads": 2, "head_dim": 14, "query_pre_attn_scalar": 10}
        | {"sliding_window": 5, "rope_local_base_freq": 50.0, "rope_theta": 3000.0}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
        | {
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
            | {"high_freq_factor": 4.0, "original_max_position_embeddings": 20}
        },
    ),
    "gpt_neox, yarn": (
        "GPTNeoX",
        {
            "rotary_pct": 0.6,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0}
            | {"original_max_position_embeddings": 16},
        },
    ),
}
"""Class of transformers without ForCausalLM, and what its config has beyond COMMON."""


def save_source(
    transformers: Any, folder: Path, name: str, dtype: torch.dtype = torch.float32
) -> Any:
    """A random model, every tensor random, saved as transformers saves it."""
    kind, changes = SOURCES[name]
    config = getattr(transformers, kind + "Config")
    model = getattr(transformers, kind.removesuffix("Text") + "ForCausalLM")
    source = model(config(**COMMON | changes, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in source.named_parameters():
            mean = 1.0 if "norm" in key and key.endswith("weight") else 0.0
            mean -= "gemma" in name and mean == 1.0
            value = mean + 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(value.to(torch.bfloat16))
    source.to(dtype).save_pretrained(folder, safe_serialization=True)
    return source.float()


@torch.no_grad()
def packed_logits(model: Transformer, documents: list[torch.Tensor]) -> torch.Tensor:
    """Logits [S, V] of documents one after the other in a sample, masked from one another."""
    tokens_BS = torch.cat(documents)[None]
    positions_BS = torch.cat([torch.arange(len(d)) for d in documents])[None]
    documents_BS = torch.cat([torch.full_like(d, i) for i, d in enumerate(documents)])[None]
    ctx = build_context(model.config.model, positions_BS, model.dtype, documents_BS=documents_BS)
    x, _ = model.run(layer_map(model.config.recurrence), model.embed(tokens_BS, ctx), ctx, {})
    return model.all_logits(x)[0]
