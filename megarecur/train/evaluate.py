"""Validation: loss, perplexity and bits per byte of whole corpora, over the replicas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megarecur.config.schema import Config
from megarecur.data.corpus import Corpus
from megarecur.data.loader import validation_batches
from megarecur.model.transformer import Transformer
from megarecur.parallel.mesh import Mesh
from megarecur.recurrence.schemes import layer_map


@dataclass(frozen=True)
class Score:
    """How well a corpus is predicted, in nats per counted token."""

    loss: float
    tokens: int
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


def evaluate(
    model: Transformer, corpora: Sequence[Corpus], config: Config, mesh: Mesh, max_samples: int = 0
) -> list[Score]:
    """Score every corpus; collective over dp. max_samples 0: all of it."""
    return [score_corpus(model, corpus, config, mesh, max_samples) for corpus in corpora]


@torch.no_grad()
def score_corpus(
    model: Transformer, corpus: Corpus, config: Config, mesh: Mesh, max_samples: int
) -> Score:
    """One pass over (the start of) a corpus, every token predicted once."""
    steps = layer_map(config.recurrence)
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for batch in validation_batches(
        corpus,
        seq_length=config.data.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp,
        mask_documents=config.data.mask_documents,
        max_samples=max_samples,
    ):
        batch = batch.to(mesh.device)
        ctx = model.context(batch, step=0, training=False)
        x, _ = model.run(steps, model.embed(batch.tokens_BS, ctx), ctx, {})
        sums[0] += model.loss(x, batch)["loss"].total
        sums[1] += batch.num_tokens
    total, tokens = mesh.sum_over_dp(sums).tolist()
    loss = total / max(tokens, 1.0)
    bytes_per_token = corpus.num_bytes / corpus.num_tokens
    return Score(loss, int(tokens), loss / math.log(2.0) / bytes_per_token)


def score_values(scores: Sequence[Score], names: Sequence[str]) -> dict[str, float]:
    """Scores as metrics: `val/loss` over all corpora, and each by name where there are several."""
    tokens = sum(score.tokens for score in scores)
    loss = sum(score.loss * score.tokens for score in scores) / max(tokens, 1)
    bits = sum(score.bits_per_byte * score.tokens for score in scores) / max(tokens, 1)
    values = {"val/loss": loss, "val/bits_per_byte": bits}
    if len(scores) > 1:
        for name, score in zip(names, scores, strict=True):
            values[f"val/{name}/loss"] = score.loss
            values[f"val/{name}/bits_per_byte"] = score.bits_per_byte
    return values
