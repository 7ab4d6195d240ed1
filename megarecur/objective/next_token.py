"""The objective of next-token prediction: its loss terms and its score on a corpus.

Shapes: B samples, S positions, D hidden, V vocabulary, N = B S tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarecur.batch import Batch
from megarecur.config.run import Config
from megarecur.data.corpus import Corpus
from megarecur.objective.auxiliary import z_terms
from megarecur.objective.exits import exit_terms, target_of, weigh_exits
from megarecur.objective.readout import Readout
from megarecur.parallel.head_loss import Target
from megarecur.parallel.loss import IGNORED, LossTerm, cross_entropy, distillation

Ran = tuple[Batch, Tensor | None, Mapping[str, Tensor]]
"""A micro batch, the output of the map [B, S, D] (None if another pipeline rank has it), and the
hidden states of early exits by name. With halting, the name STEPS has the mean number of steps of
the tokens of each row, [B]."""
STEPS = "steps"

AddUp = Callable[[Tensor], Tensor]
"""Function that sums a tensor over replicas."""


@dataclass(frozen=True)
class TextScore:
    """The score of next-token prediction on a corpus."""

    loss: float
    """Mean loss in nats per counted token."""
    tokens: int
    """Number of counted tokens."""
    num_bytes: float
    """Bytes of text of the counted tokens, estimated by the corpus's mean bytes per token."""
    by_position: tuple[float, ...] = ()
    """Mean loss at positions 0, 1, 2 to 3, 4 to 7, ... of a document; nan without tokens."""
    exits: tuple[float, ...] = ()
    """Mean loss in nats per counted token at each early exit, in order of depth."""

    @property
    def perplexity(self) -> float:
        """Perplexity, exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, comparable between tokenizers."""
        return self.loss * self.tokens / math.log(2.0) / max(self.num_bytes, 1e-9)

    def lines(self, title: str, step: int) -> list[str]:
        """Return the lines that `megarecur eval` prints, each with a title such as the corpus's
        path."""
        whole = (
            f"{title} loss {self.loss:.4f}  perplexity {self.perplexity:.2f}  "
            f"bits per byte {self.bits_per_byte:.4f}  ({self.tokens} tokens, step {step})"
        )
        return [whole, *(f"{title} exit {i}: loss {x:.4f}" for i, x in enumerate(self.exits, 1))]


class NextToken:
    """Objective of next-token prediction, with label smoothing, z-loss, early exits and
    distillation. A translation's target is predicted in the same way."""

    def __init__(self, config: Config, readout: Readout) -> None:
        self.config, self.readout = config, readout

    def terms(
        self,
        x: Tensor,
        batch: Batch,
        exits: Mapping[str, Tensor] | None = None,
        target: Target | None = None,
    ) -> dict[str, LossTerm]:
        """Return the loss terms of a micro batch: sums over its counted tokens, with denominators.

        The term `loss` is the cross-entropy with the labels. With label smoothing its weight is 0,
        and `smoothed_loss` is minimized.

        Args:
            x: output of the map, [B, S, D].
            exits: hidden states after earlier loops, by name, in order; their terms are named
                `exit_1/loss` and so on.
            target: the logits of a teacher, sharded like this model's logits.
        """
        config, readout = self.config, self.readout
        weights = weigh_exits(config.exits, len(exits or ()))
        labels_N = readout.cp.own(batch.labels_BS).flatten()
        distill = config.distill if target is not None else None
        final: Target | None = None
        smoothing = config.objective.label_smoothing
        if readout.is_chunked(len(labels_N)):
            temperature = 1.0 if distill is None else distill.temperature
            total, square, divergence, losses_N = readout.sums(
                x, labels_N, target, temperature, smoothing
            )
            if exits and config.exits is not None and config.exits.distill:
                final = readout.target(x)
        else:
            logits_NV = readout.logits(x).flatten(0, 1)
            final = target_of(logits_NV)
            if target is None:
                total, square, losses_N = cross_entropy(
                    logits_NV, labels_N, readout.kernels, readout.tp, readout.first, smoothing,
                    readout.bounds[-1],
                )  # fmt: skip
            else:
                assert distill is not None
                total, square, divergence, losses_N = distillation(
                    logits_NV, labels_N, target(slice(None)), distill.temperature, readout.tp,
                    readout.first,
                )  # fmt: skip
        share = 0.0 if distill is None else distill.weight
        terms = {"loss": LossTerm(total, "tokens", weights[-1] * (1.0 - share), losses_N)}
        if smoothing > 0.0:
            terms = {
                "loss": LossTerm(losses_N.sum(), "tokens", 0.0, losses_N),
                "smoothed_loss": LossTerm(total, "tokens", weights[-1]),
            }
        if distill is not None:
            terms["distill"] = LossTerm(divergence, "tokens", weights[-1] * share)
        terms |= z_terms(square, config.model.z_loss, weights[-1])
        for (name, state), weight in zip((exits or {}).items(), weights, strict=False):
            assert config.exits is not None
            terms |= exit_terms(config.exits, readout, name, state, labels_N, weight, final)
        return terms

    def score(
        self,
        batches: Iterable[Ran],
        corpus: Corpus,
        add_up: AddUp,
        exit_names: Sequence[str] = (),
    ) -> TextScore:
        """Return the score of a corpus. All replicas must call this, because of `add_up`.

        Args:
            batches: micro batches of the corpus, with the outputs of the map.
            add_up: sums a tensor over replicas.
            exit_names: the early exits to score.
        """
        buckets = self.config.data.seq_length.bit_length() + 1
        sums = torch.zeros(2 + len(exit_names), buckets, dtype=torch.float64)
        for batch, x, exits in batches:
            sums = sums.to(batch.tokens_BS.device)
            if x is not None:
                self.count(batch, x, [exits[name] for name in exit_names], sums)
        losses, counts, *of_exits = add_up(sums).tolist()
        return make_score(corpus, losses, counts, of_exits)

    def count(self, batch: Batch, x: Tensor, exits: Sequence[Tensor], sums: Tensor) -> None:
        """Add a micro batch to the sums of `score`.

        Args:
            x: output of the map, [B, S, D].
            exits: hidden states of the scored exits, [B, S, D] each.
            sums: fp64 [2 + exits, buckets]. Rows 0 and 1 are losses and counted tokens by the bit
                length of the position; column 0 of the other rows is the loss of each exit.
        """
        losses_N = self.terms(x, batch)["loss"].per_token
        assert losses_N is not None
        own = self.readout.cp.own
        bucket_N = bit_lengths(own(batch.positions_BS).flatten())
        sums[0].index_add_(0, bucket_N, losses_N.to(torch.float64))
        counted_N = (own(batch.labels_BS) != IGNORED).flatten()
        sums[1].index_add_(0, bucket_N, counted_N.to(torch.float64))
        for row, state in enumerate(exits, 2):
            sums[row, 0] += self.terms(state, batch)["loss"].total

    def metrics(self, scores: Sequence[TextScore], names: Sequence[str]) -> dict[str, float]:
        """Return scores as metrics: `loss` and others over all corpora and, if there are several,
        of each corpus by name."""
        if not scores:
            return {}
        tokens = sum(score.tokens for score in scores)
        loss = sum(score.loss * score.tokens for score in scores) / max(tokens, 1)
        whole = TextScore(loss, tokens, sum(score.num_bytes for score in scores))
        values = {"loss": whole.loss, "bits_per_byte": whole.bits_per_byte}
        for i in range(len(scores[0].exits)):
            total = sum(score.exits[i] * score.tokens for score in scores)
            values[f"exit_{i + 1}/loss"] = total / max(tokens, 1)
        if len(scores) > 1:
            for name, score in zip(names, scores, strict=True):
                values[f"{name}/loss"] = score.loss
                values[f"{name}/bits_per_byte"] = score.bits_per_byte
        return values


def make_score(
    corpus: Corpus,
    losses: Sequence[float],
    counts: Sequence[float],
    of_exits: Sequence[Sequence[float]] = (),
) -> TextScore:
    """Return a score from sums over a corpus.

    Args:
        losses: summed losses by the bit length of the position.
        counts: counted tokens by the bit length of the position.
        of_exits: summed losses of each exit.
    """
    tokens = sum(counts)
    num_bytes = tokens * corpus.bytes_per_label
    parts = tuple(a / n if n else math.nan for a, n in zip(losses, counts, strict=True))
    early = tuple(sum(row) / max(tokens, 1.0) for row in of_exits)
    return TextScore(sum(losses) / max(tokens, 1.0), int(tokens), num_bytes, parts, early)


def bit_lengths(numbers: Tensor) -> Tensor:
    """Return bit lengths: 0 for 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7, ..."""
    return torch.frexp(numbers.to(torch.float64)).exponent.long()  # Fractions are in [1/2, 1).
