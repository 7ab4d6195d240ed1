"""A small model to decode with, and its cache against full recomputation."""

from __future__ import annotations

from typing import Any

import torch

from megarecur.config.load import validate
from megarecur.inference.cache import Cache
from megarecur.inference.generate import next_logits
from megarecur.model.transformer import Transformer
from megarecur.parallel.mesh import Mesh
from megarecur.parallel.regions import ALONE, TensorParallel
from megarecur.plan.schedule import Schedules

VOCAB = 53


def build_decoder(
    recurrence: dict[str, Any],
    adapters: dict[str, Any] | None = None,
    precision: str = "fp32",
    tp: TensorParallel = ALONE,
    temporal: dict[str, Any] | None = None,
    **model: Any,
) -> Transformer:
    """A small model whose logits are far enough apart for a wrong key to change the tokens."""
    shape: dict[str, Any] = {"hidden_size": 24, "num_heads": 4, "head_dim": 6}
    # A tied head would mostly repeat the last token.
    shape |= {"ffn_hidden_size": 32, "tie_embeddings": False}
    values = {
        "run_dir": "unused",
        "model": shape | {"vocab_size": VOCAB, "init_std": 0.2} | model,
        "recurrence": recurrence,
        "adapters": adapters,
        "temporal": temporal,
        "data": {"train": [{"path": "unused"}], "tokenizer": "bytes", "seq_length": 160},
        "optimizer": {"lr": 1e-3},
        "train": {
            "steps": 1,
            "global_batch_size": 1,
            "micro_batch_size": 1,
            "precision": precision,
        },
    }
    return Transformer(validate(values, "test"), tp=tp)


def disturb(model: Transformer) -> Transformer:
    """Give what loops own, and norms, values that matter; they start at zero or at one."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.parameters_by_name.items():
        if any(part in name for part in ("lora", "signal", "norm", "loops")):
            shard = model.shard(name, parameter.data)
            noise = torch.randn(shard.global_shape, generator=generator, dtype=torch.float32)
            for offset, sizes, own in shard.chunks:
                part = tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))
                own += 0.3 * noise[part].to(own.dtype)
    for weight in model.weights():
        weight.refresh()
    return model


def compare_with_recomputation(model: Transformer, cache: Cache) -> None:
    """Prefill, then decode token by token, two samples at once; fails where logits differ."""
    scheduled = Schedules(model.config).forward()
    prompt = torch.arange(10).view(2, 5) * 7 % VOCAB
    tokens, new = prompt, prompt
    for _ in range(3):
        cached = next_logits(model, Mesh(), scheduled, new, cache, seed=3)
        full = next_logits(model, Mesh(), scheduled, tokens, None, seed=3)
        torch.testing.assert_close(cached, full, rtol=0.0, atol=1e-5)
        assert cached.argmax(-1).tolist() == full.argmax(-1).tolist()
        new = full.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, new], dim=1)
    assert cache.length == tokens.shape[1] - 1
    assert sorted(cache.entries) == sorted((s.block, s.loop_index) for s in scheduled.steps)
