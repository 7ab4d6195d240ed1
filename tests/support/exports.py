"""Runs with random parameters to export, and what their folders hold and compute.

Shapes: B samples, S positions, V ids.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megarecur.checkpoint import checkpoint
from megarecur.checkpoint.load import load_model
from megarecur.config.load import to_yaml, validate
from megarecur.config.run import Config
from megarecur.data.tokenizer import tokenizer_fingerprint
from megarecur.inference.generate import next_logits, run_forward
from megarecur.model.context import build_context
from megarecur.model.transformer import Transformer
from megarecur.parallel.mesh import Mesh
from megarecur.parallel.shards import whole
from megarecur.plan.schedule import Schedules

TOKENS_BS = torch.arange(24).view(2, 12) * 11 % 97


def run_logits(run_dir: Path) -> Tensor:
    """Logits [B, S, V] of a run's newest checkpoint at TOKENS_BS."""
    model, _ = load_model(run_dir)
    return all_logits(model, TOKENS_BS)


@torch.no_grad()
def all_logits(model: Transformer, tokens_BS: Tensor) -> Tensor:
    scheduled = Schedules(model.config).forward()
    starts = [tokens_BS[:, : i + 1] for i in range(tokens_BS.shape[1])]
    return torch.stack([next_logits(model, Mesh(), scheduled, s) for s in starts], dim=1)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face folder, whatever its shards."""
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def assert_same_tensors(folder: Path, other: Path) -> None:
    """The same names, dtypes and bytes."""
    ours, theirs = tensors_of(folder), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


def write_run(
    run_dir: Path,
    recurrence: dict[str, Any],
    step: int = 7,
    adapters: dict[str, Any] | None = None,
    tokenizer: str = "bytes",
    **model: Any,
) -> Config:
    """A run folder as training leaves it, with random parameters."""
    shape: dict[str, Any] = {"hidden_size": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
    values = {
        "run_dir": str(run_dir),
        "model": shape | {"ffn_hidden_size": 32, "vocab_size": 97, "init_std": 0.2} | model,
        "recurrence": recurrence,
        "adapters": adapters,
        "data": {"train": [{"path": "data/train"}], "tokenizer": tokenizer, "seq_length": 64},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 9, "global_batch_size": 1, "micro_batch_size": 1},
    }
    return save_run(validate(values, "test"), run_dir, step)


def save_run(
    config: Config,
    run_dir: Path,
    step: int = 7,
    change: Callable[[Transformer], object] = lambda model: None,
) -> Config:
    """A run folder of a config, with random parameters, which `change` may alter."""
    model = Transformer(config)
    parameters = model.parameters_by_name
    generator = torch.Generator().manual_seed(step)
    shards = {}
    for name, parameter in parameters.items():
        if name.endswith(".bias"):
            parameter.data.normal_(generator=generator)
        if ".loops." in name:  # Loops differ: neither B nor the differences of gains are zero.
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    change(model)
    for name, parameter in parameters.items():
        for prefix in ("", "exp_avg."):
            shards[prefix + name] = whole(parameter.detach())
    known = Path(config.data.tokenizer).is_file()
    name = config.data.tokenizer if known else "bytes"
    state = {"step": step, "tokenizer": tokenizer_fingerprint(name)}
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    checkpoint.save(run_dir / "checkpoints", step, shards, state).result()
    return config


REUSE_MAP = {"kind": "reuse_map", "reuse_map": [3, 1, 2]}


DENSE = {"kind": "dense", "num_layers": 2}


CYCLE = {"kind": "cycle", "num_blocks": 2, "depth": 5}


LOOP = {"kind": "loop", "prelude": 1, "core": 2, "coda": 1, "num_loops": 3}


REPEATED = {"kind": "block_recurrence", "num_blocks": 2, "num_loops": 3}


ADAPTERS = {"rank": 3, "scale": 0.7, "norms": True}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]] = {
    "cycle": (CYCLE, {"rank": 4, "targets": ["query", "down"]}, {"rope_interleaved": True}),
    "loop": (
        LOOP,
        {"rank": 3, "biases": True},
        {"attention_bias": "qkv", "feed_forward_bias": True},
    ),
    "reuse_map": (
        REUSE_MAP,
        ADAPTERS,
        {"norm_position": "peri", "qk_norm": True, "scale_embeddings": True}
        | {"attention_softcap": 2.0, "logit_softcap": 3.0, "attention_scale": 0.5}
        | {"sliding_window": 5, "attention_types": ["sliding", "full"], "rope_theta_local": 50.0}
        | {"feed_forward": "geglu_tanh", "rope_scaling_factor": 2.0},
    ),
    "loop, huginn": (
        LOOP | {"final_norm_after_core": True, "injection": "add"},
        None,
        {"norm_position": "sandwich", "attention_bias": "qk", "tie_embeddings": False},
    ),
    "loop, from the prelude": (
        LOOP | {"initial_state": "prelude", "injection": "none"},
        None,
        {"num_heads": 3, "num_kv_heads": 1, "sliding_window": 4},
    ),
    "embedding again": (
        REPEATED,
        {"rank": 20, "norms": True},
        {"positions": "learned", "norm": "layer", "feed_forward": "gelu", "max_positions": 80},
    ),
    "cycle_reverse, alibi": (
        {"kind": "cycle_reverse", "num_blocks": 2, "depth": 4},
        None,
        {"positions": "alibi", "norm_position": "post", "feed_forward": "gelu_tanh"}
        | {"num_heads": 6, "head_dim": 4},
    ),
    "custom, sinusoidal": (
        {"kind": "custom", "order": [1, 0, 1, 2, 0]},
        {"rank": 2, "norms": True},
        {"positions": "sinusoidal", "norm": "layer", "attention_bias": "all"}
        | {"feed_forward": "geglu", "tie_embeddings": False, "head_bias": True}
        | {"sinusoid_layout": "interleaved"},
    ),
    "dense": (
        DENSE,
        None,
        {"parallel_residual": True, "positions": "none", "norm": "layer", "norm_eps": 1e-3},
    ),
    "loop, random": (
        LOOP | {"initial_state": "random", "initial_state_std": 0.7},
        None,
        {"norm_position": "sandwich", "scale_embeddings": True, "tie_embeddings": False},
    ),
    "ring, post": (
        {"kind": "ring", "depth": 4, "level_rank": 3},
        None,
        {"norm": "layer", "norm_position": "post", "feed_forward": "gelu", "qk_norm": True}
        | {"positions": "sinusoidal", "head_bias": True},
    ),
    "ring, pre": (
        {"kind": "ring", "depth": 3, "level_rank": 2, "feed_forward_rank": 5},
        None,
        {"final_norm_eps": 1e-3},
    ),
    "levels": (
        {"kind": "universal", "depth": 4},
        None,
        {"level_encoding": "sinusoidal", "positions": "none", "norm_position": "post"}
        | {"residual": "admin"},
    ),
    "one wide, gate": (
        DENSE,
        {"rank": 2, "targets": ["query", "output"]},
        {"shared_feed_forward": True, "gate": True, "gate_hidden_size": 7, "positions": "xpos"}
        | {"xpos_scale_base": 20.0, "final_norm": False},
    ),
    "norms of outputs, yarn": (
        CYCLE,
        None,
        {"norm_position": "output", "qk_norm": True, "qk_norm_over": "all"}
        | {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_positions": 8}},
    ),
    "norms of outputs, own": (
        CYCLE,
        ADAPTERS,
        {"norm_position": "output", "qk_norm": True, "qk_norm_over": "all"}
        | {"sliding_window": 5, "attention_types": ["sliding", "full"], "rope_theta_local": 50.0}
        | {"rope_scaling": {"kind": "llama3", "factor": 4.0, "original_positions": 8}},
    ),
    "dynamic": (
        CYCLE,
        None,
        {"rope_scaling": {"kind": "dynamic", "factor": 4.0, "original_positions": 30}},
    ),
    "entry again": (
        REUSE_MAP | {"injection": "add"},
        None,
        {"norm": "layer", "attention_bias": "all"},
    ),
    "loop, bias": (
        LOOP | {"injection": "linear", "injection_bias": True},
        {"rank": 2},
        {},
    ),
    "sequence": (
        {"kind": "sequence", "num_blocks": 2, "depth": 4},
        {"rank": 5, "norms": True},
        {"rope_fraction": 0.7, "qk_norm": True, "rope_interleaved": True},
    ),
}
"""Recurrence, adapters, and our `model` section as `write_run` takes it."""


@torch.no_grad()
def our_logits(run_dir: Path, tokens_BS: Tensor = TOKENS_BS, seed: int = 0) -> Tensor:
    """The same of a run, in one pass."""
    model, run = load_model(run_dir)
    positions_BS = torch.arange(tokens_BS.shape[1]).expand(tokens_BS.shape)
    ctx = build_context(run.config.model, positions_BS, model.dtype, seed=seed)
    x = run_forward(model, Mesh(), Schedules(run.config).forward(), tokens_BS, ctx)
    assert x is not None
    return model.all_logits(x)
