"""Tiny encoder-decoders, and batches of pairs of sentences.

Shapes: B pairs, S target positions, K source positions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from support.models import VOCABULARY, gradients
from torch import Tensor

from megarecur.attention.documents import count_boundaries
from megarecur.config.load import validate
from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch, SourceSentences
from megarecur.model.transformer import Transformer
from megarecur.recurrence.layer_map import LayerMap
from megarecur.recurrence.schemes import build_map

DENSE = {"kind": "dense", "num_layers": 2}


def pair_config(
    encoder: dict[str, Any], recurrence: dict[str, Any], precision: str = "fp64", **sections: Any
) -> Config:
    """A tiny encoder-decoder. Weights start large, so that every term of the model matters."""
    model = {"hidden_size": 32, "num_heads": 4, "ffn_hidden_size": 48, "vocab_size": VOCABULARY,
             "max_positions": 32, "init_std": 0.15, "norm": "layer"}  # fmt: skip
    values = {
        "run_dir": "run", "recurrence": recurrence, "encoder": encoder,
        "model": model | sections.pop("model", {}),
        "data": {"train": [{"path": "none"}], "tokenizer": "bytes", "seq_length": 16},
        "optimizer": {"lr": 1e-4, "clip_norm": 0.5, "eps": 1e-5} | sections.pop("optimizer", {}),
        "train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 1,
                  "precision": precision} | sections.pop("train", {}),
        **sections,
    }  # fmt: skip
    return validate(values, "test")


def collate(
    sources: list[Tensor], targets: list[Tensor], first: int = 0, multiple: int = 1
) -> MicroBatch:
    """Sentences padded to the longest of their side; the target's next tokens are its labels."""

    def pad(rows: list[Tensor], value: int) -> Tensor:
        length = -(-max(map(len, rows)) // multiple) * multiple
        whole = torch.full((len(rows), length), value, dtype=torch.long)
        for row, own in zip(whole, rows, strict=True):
            row[: len(own)] = own
        return whole

    def side(rows: list[Tensor]) -> dict[str, Any]:
        documents_BS = pad([torch.zeros_like(row) for row in rows], -1).int()
        return {
            "tokens_BS": pad(rows, 0),
            "positions_BS": torch.arange(documents_BS.shape[1]).repeat(len(rows), 1),
            "documents_BS": documents_BS,
            "single_document": bool((documents_BS >= 0).all()),
            "boundaries": count_boundaries(documents_BS),
        }

    return MicroBatch(
        **side([target[:-1] for target in targets]),
        labels_BS=pad([target[1:] for target in targets], -100),
        sample_ids_B=torch.arange(first, first + len(targets)),
        sources_B=torch.zeros(len(targets), dtype=torch.long),
        source=SourceSentences(**side(sources)),
    )


def make_pairs(count: int, seed: int = 0, longest: int = 9) -> tuple[list[Tensor], list[Tensor]]:
    """Random source and target sentences of 2 to `longest` tokens."""
    generator = np.random.default_rng(seed)
    sides: tuple[list[Tensor], list[Tensor]] = [], []
    for _ in range(count):
        for side in sides:
            length = int(generator.integers(2, longest + 1))
            side.append(torch.from_numpy(generator.integers(0, VOCABULARY, length)))
    return sides


def make_pair_batch(count: int = 3, seed: int = 0, first: int = 100) -> MicroBatch:
    """A batch of random pairs."""
    return collate(*make_pairs(count, seed), first)


def objective(
    model: Transformer, batch: MicroBatch, training: bool = False, steps: LayerMap | None = None
) -> tuple[Tensor, Tensor]:
    """(weighted sum of the loss terms, logits)."""
    ctx, reads = model.context(batch, step=3, training=training), dict[str, Tensor]()
    x = model.enter(batch.tokens_BS, ctx, reads, batch.source)
    x, terms = model.run(steps or build_map(model.config), x, ctx, reads)
    logits = model.logits(x).detach().clone()
    terms |= model.loss(x, batch)
    return sum((t.weight * t.total for t in terms.values()), torch.zeros(())), logits


def run(
    model: Transformer, batch: MicroBatch, training: bool = False, steps: LayerMap | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, logits, gradients by name) of one micro batch."""
    model.zero_grad()
    loss, logits = objective(model, batch, training, steps)
    loss.backward()
    return loss.detach(), logits, gradients(model)


def with_section(config: Config, section: str, **update: Any) -> Config:
    """The config with fields of one section replaced, unchecked."""
    return config.model_copy(update={section: getattr(config, section).model_copy(update=update)})


def rows_of(batch: MicroBatch, kept: list[int]) -> MicroBatch:
    """Some pairs of a batch, with its padding."""
    assert batch.source is not None
    index = torch.tensor(kept)
    source = replace(
        batch.source,
        tokens_BS=batch.source.tokens_BS[index],
        positions_BS=batch.source.positions_BS[index],
        documents_BS=batch.source.documents_BS[index],
        boundaries=count_boundaries(batch.source.documents_BS[index]),
    )
    return replace(
        batch,
        **{name: getattr(batch, name)[index] for name in (
            "tokens_BS", "labels_BS", "positions_BS", "documents_BS", "sample_ids_B", "sources_B",
        )},
        boundaries=count_boundaries(batch.documents_BS[index]),
        source=source,
    )  # fmt: skip
