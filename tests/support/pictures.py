"""Tiny models of pictures, and batches of random pictures.

Shapes: B pictures, C channels, H and W pixels, S positions.
"""

from __future__ import annotations

from typing import Any

import torch
from support.models import gradients
from torch import Tensor

from megarecur.config.load import validate
from megarecur.config.run import Config
from megarecur.data.samples import TaskBatch
from megarecur.model.transformer import Transformer
from megarecur.recurrence.layer_map import LayerMap
from megarecur.recurrence.schemes import build_map

TASK = {"kind": "image", "num_classes": 5, "image_size": 8, "patch_size": 2}
DENSE = {"kind": "dense", "num_layers": 2}


def picture_config(recurrence: Any = DENSE, precision: str = "fp64", **sections: Any) -> Config:
    """A tiny run on pictures. Weights start large, so that every term of the model matters."""
    model = {"hidden_size": 32, "num_heads": 4, "ffn_hidden_size": 48, "init_std": 0.15,
             "norm": "layer", "causal": False, "positions": "learned"}  # fmt: skip
    values = {
        "run_dir": "run", "recurrence": recurrence,
        "model": model | sections.pop("model", {}),
        "task": TASK | sections.pop("task", {}),
        "data": {"train": [{"path": "none"}]},
        "optimizer": {"lr": 1e-4, "clip_norm": 0.5, "eps": 1e-5} | sections.pop("optimizer", {}),
        "train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 1,
                  "precision": precision} | sections.pop("train", {}),
        **sections,
    }  # fmt: skip
    return validate(values, "test")


def make_pictures(config: Config, count: int = 3, first: int = 100) -> TaskBatch:
    """A batch of random pictures with labels, each a function of its number; `first` is that of the
    first one."""
    task, length = config.task, config.data.seq_length
    assert task is not None and task.image_size is not None and task.num_classes is not None
    shape, pixels, labels = (task.num_channels, task.image_size, task.image_size), [], []
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        pixels.append(torch.randn(shape, generator=generator))
        labels.append(torch.randint(task.num_classes, (1,), generator=generator))
    return batch_pictures(torch.stack(pixels), torch.stack(labels), length, first)


def batch_pictures(
    pixels_BCHW: Tensor, labels_B1: Tensor, length: int, first: int = 0
) -> TaskBatch:
    """A batch of given pictures of `length` positions."""
    count = len(pixels_BCHW)
    tokens_BS = torch.zeros(count, length, dtype=torch.long)
    return TaskBatch(
        tokens_BS=tokens_BS,
        labels_BS=labels_B1,
        positions_BS=torch.arange(length).expand(count, -1),
        documents_BS=tokens_BS.int(),
        sample_ids_B=torch.arange(first, first + count),
        sources_B=torch.zeros(count, dtype=torch.long),
        single_document=True,
        pixels_BCHW=pixels_BCHW,
        lengths_N=torch.full((count,), length),
        scored=labels_B1 >= 0,
    )


def objective(
    model: Transformer, batch: TaskBatch, training: bool = False, steps: LayerMap | None = None
) -> tuple[Tensor, Tensor]:
    """(weighted sum of the loss terms, logits of classes)."""
    ctx, reads = model.context(batch, step=3, training=training), dict[str, Tensor]()
    x = model.enter(batch.tokens_BS, ctx, reads, None, batch.pixels_BCHW)
    x, terms = model.run(steps or build_map(model.config), x, ctx, reads)
    logits = model.readout.class_logits(x, batch).detach().clone()
    terms |= model.loss(x, batch)
    return sum((t.weight * t.total for t in terms.values()), torch.zeros(())), logits


def run(
    model: Transformer, batch: TaskBatch, training: bool = False, steps: LayerMap | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, logits, gradients by name) of one micro batch."""
    model.zero_grad()
    loss, logits = objective(model, batch, training, steps)
    loss.backward()
    return loss.detach(), logits, gradients(model)
