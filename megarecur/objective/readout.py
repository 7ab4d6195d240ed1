"""Computation of logits from hidden states, for objectives.

Shapes: B samples, S positions, D hidden, V vocabulary, C classes, M labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from megarecur.batch import Batch
from megarecur.config.run import Config
from megarecur.parallel.context import ContextParallel
from megarecur.parallel.head_loss import ChunkedLoss, Target, compute_logits
from megarecur.parallel.linear import Weight
from megarecur.parallel.loss import EAGER, LossKernels, Shares
from megarecur.parallel.regions import TensorParallel
from megarecur.plan.cost import chunk_tokens


class Readout:
    """The final norm and the heads of a model, on the ranks that have them.

    Args:
        config: the run.
        tp: the ranks that share the vocabulary.
        cp: the ranks that share each sequence; hidden states are of this rank's positions.
        bounds: first id of each rank's vocabulary shard and, last, the end of the vocabulary.
        norm: the final norm, if the model has one.
        project: computes logits of tokens; None for a model that classifies.
        task_head: computes logits of classes; None for a model that predicts text.
    """

    def __init__(
        self,
        config: Config,
        tp: TensorParallel,
        cp: ContextParallel,
        bounds: Sequence[int],
        norm: nn.Module | None,
        project: nn.Module | None,
        task_head: nn.Module | None,
    ) -> None:
        self.config, self.tp, self.cp, self.bounds = config, tp, cp, bounds
        self.norm, self.project, self.task_head = norm, project, task_head
        self.compiled: LossKernels | None = None
        """Compiled kernels of the loss, used in training (`model.compile`)."""

    @property
    def first(self) -> int:
        """The first id of this rank's vocabulary shard."""
        return self.bounds[self.tp.rank]

    @property
    def kernels(self) -> LossKernels:
        """The kernels of the loss: compiled ones if given and autograd is on, else eager ones."""
        compiled = self.compiled if torch.is_grad_enabled() else None
        return EAGER if compiled is None else compiled

    def logits(self, x: Tensor) -> Tensor:
        """Return logits of tokens: [B, S, D] to [B, S, V], or this rank's shard of V."""
        assert self.project is not None
        logits: Tensor = self.project(self.norm(x) if self.norm is not None else x)
        cap = self.config.model.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def is_chunked(self, tokens: int) -> bool:
        """Return True if the loss never holds the logits of that many tokens at a time."""
        return self.chunk_length(tokens) < tokens

    def chunk_length(self, tokens: int) -> int:
        """Return the number of tokens whose logits exist at a time in the loss, of `tokens`."""
        # Ranks of different shards take the same chunks.
        largest = max(b - a for a, b in pairwise(self.bounds))
        return chunk_tokens(tokens, largest)

    def sums(
        self,
        x: Tensor,
        labels_N: Tensor,
        target: Target | None = None,
        temperature: float = 1.0,
        smoothing: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the losses of tokens, as `ChunkedLoss` does: by chunks of logits.

        Args:
            x: [B, S, D], a hidden state.
            target: the teacher; None: no distillation.
            smoothing: label smoothing.
        """
        assert self.project is not None
        shares = Shares(self.kernels, self.tp, self.first, temperature, smoothing, self.bounds[-1])
        loss = ChunkedLoss(
            labels_N, shares, self.chunk_length(len(labels_N)), self.config.model.logit_softcap,
            target,
        )  # fmt: skip
        sums: tuple[Tensor, Tensor, Tensor, Tensor]
        sums = self.project(self.norm(x) if self.norm is not None else x, loss)
        return sums

    @torch.no_grad()
    def target(self, x: Tensor) -> Target:
        """Return a function that computes the logits of a slice of tokens from x, [B, S, D].

        The head's table must be whole when it is called (ZeRO 3): in a call of `sums`.
        """
        assert self.project is not None and isinstance(self.project.weight, Weight)
        x_ND = self.tp.enter(self.norm(x) if self.norm is not None else x).flatten(0, 1).detach()
        weight, softcap = self.project.weight, self.config.model.logit_softcap
        bias_V = self.project.bias
        assert bias_V is None or isinstance(bias_V, Tensor)
        return lambda part: compute_logits(x_ND[part], weight, softcap, bias_V)

    def all_logits(self, x: Tensor) -> Tensor:
        """Return logits of all of V on every rank, [B, S, D] to [B, S, V]; outside of the graph."""
        return self.tp.gather_last(self.logits(x), [b - a for a, b in pairwise(self.bounds)])

    def class_logits(self, x: Tensor, batch: Batch) -> Tensor:
        """Return logits of classes, [M, C] on every rank, for the batch's M labels.

        Args:
            x: output of the map [B, S, D], or pooled memories [B, D].
            batch: the micro batch, which tells padding from tokens.
        """
        assert self.task_head is not None
        logits: Tensor
        if self.config.reads_memory:
            logits = self.task_head(x, None)
            return logits
        real_BS = None if batch.single_document else batch.documents_BS >= 0
        logits = self.task_head(self.norm(x) if self.norm is not None else x, real_BS)
        return logits
