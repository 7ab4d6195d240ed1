"""Tiny models in this process: built, given a random batch, run, and compared bit by bit.

Shapes: B samples, S positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from support import configs
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from megarecur.config.run import Config
from megarecur.model.transformer import Transformer
from megarecur.recurrence.layer_map import LayerMap
from megarecur.recurrence.schemes import layer_map

VOCABULARY = 23


SCHEMES: dict[str, dict[str, Any]] = {
    **{name: scheme for name, scheme in configs.SCHEMES.items() if name != "loop"},
    "loop_none": {"kind": "loop", "prelude": 1, "core": 2, "coda": 1, "num_loops": 2,
                  "injection": "none"},
    "loop_add_zero": {"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": 3,
                      "injection": "add"},
    "loop_linear_random": {"kind": "loop", "prelude": 1, "core": 2, "coda": 1, "num_loops": 2,
                           "injection": "linear", "initial_state": "random",
                           "final_norm_after_core": True},
    "loop_linear_prelude": {"kind": "loop", "prelude": 1, "core": 1, "coda": 0, "num_loops": 2,
                            "injection": "linear", "injection_bias": True,
                            "initial_state": "prelude"},
    "reuse_map_add": {"kind": "reuse_map", "reuse_map": [3, 1, 2], "injection": "add"},
    "loop_no_prelude": {"kind": "loop", "prelude": 0, "core": 1, "coda": 1, "num_loops": 3},
}  # fmt: skip


@dataclass
class Batch:
    """What the model reads of a micro batch."""

    tokens_BS: Tensor
    labels_BS: Tensor
    positions_BS: Tensor
    documents_BS: Tensor
    sample_ids_B: Tensor
    single_document: bool = True
    boundaries: None = None
    source: None = None
    pixels_BCHW: None = None

    def rows(self, start: int, stop: int) -> Batch:
        """Some of the samples."""
        parts = {k: v[start:stop] for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **parts)


def make_batch(batch: int = 2, length: int = 7, seed: int = 0) -> Batch:
    """Random tokens and labels, one label in five ignored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (batch, length), generator=generator)
    labels = torch.randint(VOCABULARY, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < 0.2] = -100
    positions = torch.arange(length).expand(batch, length)
    return Batch(tokens, labels, positions, torch.zeros_like(tokens), torch.arange(batch) + 100)


def make_model_config(
    recurrence: dict[str, Any], precision: str = "fp64", recompute: bool = False, **model: Any
) -> Config:
    """A tiny run. Weights start large, so that every term of the model matters."""
    shape = {"hidden_size": 32, "num_heads": 4, "ffn_hidden_size": 48, "vocab_size": VOCABULARY,
             "max_positions": 32, "init_std": 0.15}  # fmt: skip
    # An encoder needs a task.
    task = {"kind": "token", "num_classes": VOCABULARY, "head_size": 0}
    task = None if model.get("causal", True) else task
    return Config.model_validate({
        "run_dir": "run", "model": shape | model, "recurrence": recurrence, "task": task,
        "data": {"train": [{"path": "none"}], "tokenizer": "bytes", "seq_length": 16},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1,
                  "precision": precision, "recompute": recompute},
    })  # fmt: skip


def build(config: Config, **kwargs: Any) -> Transformer:
    """The model, its norms and biases moved off the values that would hide a mistake."""
    model = Transformer(config, **kwargs)
    for name, parameter in model.parameters_by_name.items():
        if parameter.ndim == 1:
            generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.2 * noise.to(parameter.dtype)
    return model


def objective(
    model: Transformer, steps: LayerMap, batch: Batch, training: bool = False
) -> tuple[Tensor, Tensor]:
    """(weighted sum of the loss terms, logits)."""
    ctx = model.context(batch, step=3, training=training)
    x, terms = model.run(steps, model.embed(batch.tokens_BS, ctx), ctx, {})
    logits = model.logits(x).detach().clone()
    terms |= model.loss(x, batch)
    return sum((t.weight * t.total for t in terms.values()), torch.zeros(())), logits


def run(
    config: Config, batch: Batch, training: bool = False, model: Transformer | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, logits, gradients by name) of one micro batch."""
    model = model or build(config)
    loss, logits = objective(model, layer_map(config.recurrence), batch, training)
    loss.backward()
    return loss.detach(), logits, gradients(model)


def gradients(model: Transformer) -> dict[str, Tensor]:
    """Gradients by global name; a parameter that was not used has gradient zero."""
    named = model.parameters_by_name.items()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}


def assert_same(actual: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    """Bit equality of (loss, logits, gradients)."""
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert actual[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        assert torch.equal(actual[2][name], gradient), name


def in_place_flops(_: object, left: list[int], right: list[int], **kwargs: object) -> int:
    """Torch's counter knows addmm, but not addmm_."""
    return 2 * left[0] * left[1] * right[1]


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of the tensors made inside it that are still alive, whoever keeps them;
    `known` were there before."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known | self.made.keys():
                    self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def count_bytes(self) -> int:
        """Bytes of the storages that are alive."""
        return sum(size for reference, size in self.made.values() if not reference.expired())


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(made) if isinstance(t, Tensor)]
        self.elements = max([self.elements, *sizes])
        return made


def step_once(config: Config, batch: Any = None) -> tuple[int, int, int]:
    """(forward FLOPs, all FLOPs, bytes kept for backward by the steps of the map), by default over
    tokens."""
    size = (config.train.micro_batch_size, config.data.seq_length)
    if batch is None:
        tokens = torch.zeros(size, dtype=torch.long)
        positions = torch.arange(size[1]).expand(size)
        batch = Batch(tokens, tokens, positions, torch.zeros_like(tokens), torch.arange(size[0]))
    model = Transformer(config)
    ctx = model.context(batch, step=0, training=True)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_flops})
    with counter:
        with LiveStorages([*model.parameters(), *(w.value() for w in model.weights())]) as live:
            x = model.enter(batch.tokens_BS, ctx, {}, None, batch.pixels_BCHW)
            x, _ = model.run(layer_map(config.recurrence), x, ctx, {})
            terms = model.loss(x, batch)
        forward = counter.get_total_flops()
        num_bytes = live.count_bytes()
        torch.stack([term.weight * term.total for term in terms.values()]).sum().backward()
    return forward, counter.get_total_flops(), num_bytes
