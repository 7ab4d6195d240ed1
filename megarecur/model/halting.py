"""Dynamic halting: the stick-breaking mixture of the states that a shared block visits.

This is section 3 of Ray Chowdhury & Caragea 2024 (Investigating Recurrent Transformers with Dynamic
Halt), as their code computes it. Let h_0 be the input and h_{l+1} = Block(h_l). A head predicts
p_l, the probability of stopping before step l given that no earlier step stopped, and

    c_l = p_l (1 - p_0) ... (1 - p_{l-1}),        T = sum of c_k up to l
    o_{l+1} = sum_k c_k h_k + (1 - T) h_{l+1},    cost = sum_k c_k (k + 1) + (1 - T) (l + 1)

A step at which T reaches the threshold is discarded: h, o and cost keep their values. An encoder
also discards steps beyond length + 1. The authors' causal models have this limit too, which makes
the outputs for a prefix depend on the length of the whole text. Causal models have no limit here.
Documents packed into one sample halt independently.

Shapes: B samples, S positions, D hidden, U max documents per sample.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarecur.config.recurrence import HaltingConfig
from megarecur.model.context import Positions
from megarecur.model.documents import find_documents, mean_of_documents, mean_so_far
from megarecur.parallel.linear import Linear, MakeParameter


class HaltingHead(nn.Module):
    """The head sigmoid(w2 gelu(W1 z + b1) + b2), with D or 2 D inputs and D hidden channels."""

    def __init__(self, name: str, make: MakeParameter, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = Linear(f"{name}.up", make, dtype, True)
        self.down = Linear(f"{name}.down", make, dtype, True)

    def forward(self, z: Tensor) -> Tensor:
        """Return probabilities: [..., D or 2 D] to [...], in promote(dtype, fp32)."""
        logits = self.down(F.gelu(self.up(z))).squeeze(-1)
        return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))


class Mixture:
    """The mixture of states of one micro batch, updated step by step.

    `drop_halted` removes samples whose tokens have all halted, so that later steps compute only on
    the b others; `rows_b` holds their rows.

    Args:
        head: predicts the probabilities of stopping.
        causal: whether a token must not depend on later ones.
        shares_BS: weight of each token's cost in this chunk of a text; None: 1.
    """

    def __init__(
        self,
        config: HaltingConfig,
        head: HaltingHead,
        x_BSD: Tensor,
        positions: Positions,
        causal: bool,
        depth: int,
        shares_BS: Tensor | None = None,
    ) -> None:
        self.config, self.head, self.causal, self.depth = config, head, causal, depth
        self.tp, self.shares_BS = positions.tp, shares_BS
        self.dtype = torch.promote_types(x_BSD.dtype, torch.float32)
        self.documents = find_documents(positions.documents_BS, positions.index_BS)
        self.whole = self.documents
        """The documents of all samples, those that were dropped included."""
        zeros_BS = torch.zeros(x_BSD.shape[:2], dtype=self.dtype, device=x_BSD.device)
        self.step = 0
        """The index l of the next step."""
        self.rows_b = torch.arange(len(x_BSD), device=x_BSD.device)
        self.running = self.documents.real_BS
        """Mask of tokens whose last step was accepted and that may take another."""
        self.taken = torch.zeros_like(positions.index_BS)
        """Number of accepted steps of each token."""
        self.h = self.o = x_BSD
        self.p = self.stopped = self.spent = self.cost = zeros_BS
        """p_l, T, sum_k c_k (k + 1), and the cost. The first three include discarded steps."""
        self.left = zeros_BS + 1.0
        """Product of 1 - p over the steps so far."""
        self.sum = torch.zeros_like(x_BSD, dtype=self.dtype)
        """The sum over k of c_k h_k."""
        self.done: list[tuple[Tensor, ...]] = []
        """Rows, mixture, cost and accepted steps of samples that were dropped."""
        self.executed = 0
        """Number of samples computed, summed over steps."""
        self.of_rows: Tensor | None = None
        """Steps that the tokens of each sample took, and their number, [B, 2]; set by `finish`."""

    @property
    def source(self) -> Tensor | None:
        """The mixture, if keys and values of the next step are made of it; None: of the state."""
        return self.o if self.config.mode == "token" and self.step else None

    def begin_step(self) -> bool:
        """Halt documents that have reached the step limit and return whether any token continues.

        Only an encoder has the limit: a causal model must not depend on the length of a document.
        """
        if not self.causal:
            self.running = self.running & (self.step < self.documents.length_BS + 1)
        return bool(self.running.any())

    def drop_halted(self) -> Tensor | None:
        """Drop halted samples. Return the indices of the kept ones among those present before; None
        if nothing changes: no sample or every sample has halted."""
        alive_b = self.running.any(1)
        kept, gone = alive_b.nonzero().squeeze(1), (~alive_b).nonzero().squeeze(1)
        if not len(gone) or not len(kept):
            return None
        self.set_aside(gone)
        self.rows_b, self.documents = self.rows_b[kept], self.documents.select(kept)
        self.running, self.taken = self.running[kept], self.taken[kept]
        for name in ("h", "stopped", "spent", "cost", "left", "sum", "p"):
            setattr(self, name, getattr(self, name).index_select(0, kept))
        self.o = self.o.index_select(0, kept)
        return kept

    def set_aside(self, rows: Tensor | None = None) -> None:
        """Store the results of some of the present samples; None: of all."""
        parts = (self.rows_b, self.o, self.cost, self.taken)
        self.done.append(parts if rows is None else tuple(p.index_select(0, rows) for p in parts))

    def hazard(self, candidate: Tensor) -> Tensor:
        """Return p_l of every token, [b, S]."""
        read = [self.h, candidate] if self.config.transition else [self.h]
        if self.config.mode == "token":
            token_p: Tensor = self.head(torch.cat(read, -1))
            return token_p
        mean = mean_so_far if self.causal else mean_of_documents
        means = [mean(x.to(self.dtype), self.documents) for x in read]
        p: Tensor = self.head(torch.cat(means, -1).to(self.h.dtype))
        return p if self.causal else p.gather(1, self.documents.number_BS)

    def advance(self, candidate: Tensor) -> None:
        """Take the step to `candidate` [b, S, D] for the tokens that accept it."""
        number = self.step + 1
        self.executed += len(candidate)
        self.p = self.hazard(candidate)
        c = self.left * self.p
        self.sum = self.sum + c[..., None] * self.h.to(self.dtype)
        self.stopped, self.left = self.stopped + c, self.left * (1.0 - self.p)
        self.spent = self.spent + c * number
        rest = 1.0 - self.stopped
        mixed = self.sum + rest[..., None] * candidate.to(self.dtype)
        self.running = self.running & ~self.has_stopped()
        moves = self.running[..., None]
        self.o = torch.where(moves, mixed.to(self.o.dtype), self.o)
        self.h = torch.where(moves, candidate, self.h)
        self.cost = torch.where(self.running, self.spent + rest * number, self.cost)
        self.taken = self.taken + self.running
        self.step = number

    def has_stopped(self) -> Tensor:
        """Return a mask of tokens whose T has reached the threshold.

        It is equal on all tensor-parallel ranks, even if rounding differs between them, because
        they must run the same steps.
        """
        stopped = self.stopped.detach() >= self.config.threshold
        if self.tp.size == 1:
            return stopped
        return self.tp.max(stopped.to(torch.int32)) > 0

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the results of all samples in their original order.

        Returns:
            The mixture [B, S, D]; the cost, summed over documents of the mean over their tokens
            (weighted by `shares_BS`); and counts, fp64 [depth + 3]: tokens by number of accepted
            steps [depth + 1], the steps x tokens that were computed, and the steps x tokens in all.
        """
        self.set_aside()
        order = torch.cat([rows for rows, *_ in self.done]).argsort()
        o, cost, taken = (
            torch.cat(parts).index_select(0, order) if len(self.done) > 1 else parts[0]
            for parts in list(zip(*self.done, strict=True))[1:]
        )
        real_BS = self.whole.real_BS
        self.of_rows = torch.stack([(taken * real_BS).sum(1), real_BS.sum(1)], 1)
        if self.shares_BS is not None:
            cost = cost * self.shares_BS
        total = torch.where(real_BS, cost / self.whole.length_BS, 0.0).sum()
        counts = torch.zeros(self.depth + 3, dtype=torch.float64, device=o.device)
        counts.index_add_(0, taken.flatten(), real_BS.flatten().to(counts.dtype))
        length = o.shape[1]
        counts[-2], counts[-1] = self.executed * length, len(o) * self.depth * length
        return o, total, counts
