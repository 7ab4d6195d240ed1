"""A run's validation loss against interpolated bigram and trigram models.

    python benchmarks/ngram.py runs/quickstart

The n-gram models are counted on exactly the tokens that training consumed, and predict exactly the
tokens that `megarecur eval` counts. Each order is interpolated with the one below by a weight per
bucket of context counts, fitted by EM on the validation tokens themselves, which favours the
n-grams.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megarecur.checkpoint.load import load_model
from megarecur.data.loader import validation_batches
from megarecur.data.open import open_data
from megarecur.parallel.mesh import Mesh
from megarecur.train.evaluate import evaluate_corpus

Ints = NDArray[np.int64]
NO_CONTEXT = -1


class Counts:
    """Number of occurrences of keys."""

    def __init__(self, keys: Ints) -> None:
        self.keys, self.counts = np.unique(keys, return_counts=True)

    def of(self, keys: Ints) -> NDArray[np.float64]:
        """Return the number of occurrences of each key."""
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, self.counts[at], 0).astype(np.float64)


def predictions(batch: object) -> tuple[Ints, Ints, Ints]:
    """Return (token before last, last token, token to predict) of every counted token of a batch.

    The token before last is NO_CONTEXT at a sample's or a document's first position.
    """
    tokens, labels = batch.tokens_BS.numpy(), batch.labels_BS.numpy()
    before = np.full_like(tokens, NO_CONTEXT)
    same = batch.documents_BS.numpy()[:, 1:] == batch.documents_BS.numpy()[:, :-1]
    before[:, 1:] = np.where(same, tokens[:, :-1], NO_CONTEXT)
    counted = labels >= 0
    return before[counted], tokens[counted], labels[counted]


def gather(batches: list[object]) -> tuple[Ints, Ints, Ints]:
    """Return the predictions of many batches, concatenated."""
    parts = [predictions(batch) for batch in batches]
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def interpolate(
    seen: NDArray[np.float64], context: NDArray[np.float64], lower: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the interpolation w c(context, token) / c(context) + (1 - w) lower.

    The weight w is fitted by EM, per bucket of log2 c(context).
    """
    high = np.divide(seen, context, out=np.zeros_like(seen), where=context > 0)
    bucket = np.where(context > 0, 1 + np.log2(np.maximum(context, 1)).astype(int), 0)
    mixed = lower.copy()
    for b in range(1, bucket.max() + 1):
        rows = bucket == b
        weight = 0.5
        for _ in range(50 if rows.any() else 0):
            top = weight * high[rows]
            weight = float(np.mean(top / (top + (1 - weight) * lower[rows])))
        mixed[rows] = weight * high[rows] + (1 - weight) * lower[rows]
    return mixed


def ngram_losses(train: tuple[Ints, ...], val: tuple[Ints, ...], vocab: int) -> tuple[float, float]:
    """Return mean negative log probability per token of the bigram and the trigram model, in
    nats."""
    (t0, t1, t2), (v0, v1, v2) = train, val
    unigram = (Counts(t2).of(v2) + 1.0) / (len(t2) + vocab)
    bigram = interpolate(Counts(t1 * vocab + t2).of(v1 * vocab + v2), Counts(t1).of(v1), unigram)
    full = t0 != NO_CONTEXT
    pair, triple = t0 * vocab + t1, (t0 * vocab + t1) * vocab + t2
    v_pair, v_triple = v0 * vocab + v1, (v0 * vocab + v1) * vocab + v2
    context = np.where(v0 == NO_CONTEXT, 0.0, Counts(pair[full]).of(v_pair))
    trigram = interpolate(Counts(triple[full]).of(v_triple), context, bigram)
    return float(-np.log(bigram).mean()), float(-np.log(trigram).mean())


def main(run_dir: Path) -> None:
    """Print the run's loss, both n-gram losses and both gaps."""
    model, run = load_model(run_dir)
    mesh = Mesh()
    data = open_data(run.config, mesh)
    config = data.config
    consumed = [b for step in range(run.state["step"]) for b in data.loader.batch(step)]
    val = validation_batches(
        data.validation[0],
        seq_length=config.data.seq_length,
        micro_batch_size=64,
        mask_documents=config.data.mask_documents,
    )
    score = evaluate_corpus(model, data.validation[0], config, mesh)
    train_tokens, val_tokens = gather(consumed), gather(list(val))
    assert len(val_tokens[0]) == score.tokens, "both must predict the same tokens"
    bigram, trigram = ngram_losses(train_tokens, val_tokens, config.model.vocab_size)
    print(f"tokens consumed {len(train_tokens[0])}, validation tokens {score.tokens}")
    print(f"{'model':>8}  {score.loss:.4f} nats per token")
    for name, loss in (("bigram", bigram), ("trigram", trigram)):
        print(f"{name:>8}  {loss:.4f} nats per token, gap {loss - score.loss:+.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
