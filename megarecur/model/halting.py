"""Dynamic halting: the stick-breaking mixture of the states that a shared block visits.

Ray Chowdhury & Caragea 2024 (Investigating Recurrent Transformers with Dynamic Halt), section 3,
as their code computes it. With h_0 the input and h_{l+1} = Block(h_l), a head gives p_l, the
probability of stopping before step l, having come so far, and

    c_l = p_l (1 - p_0) ... (1 - p_{l-1}),        T = sum of c_k up to l
    o_{l+1} = sum_k c_k h_k + (1 - T) h_{l+1},    cost = sum_k c_k (k + 1) + (1 - T) (l + 1)

A step with T at the threshold is discarded: h, o and cost stay what they were. So is one beyond
length + 1 steps in an encoder; the authors' causal models have that limit too, and are other models
of a text's beginning once the text goes on. Documents that are packed into one sample halt each by
themselves.

Shapes: B samples, S positions, D hidden, U documents of a sample at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarecur.config.schema import HaltingConfig
from megarecur.model.context import Context
from megarecur.parallel.linear import Linear, MakeParameter


class HaltingHead(nn.Module):
    """sigmoid(w2 gelu(W1 z + b1) + b2), from 2 D or D channels by way of D."""

    def __init__(self, name: str, make: MakeParameter, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = Linear(f"{name}.up", make, dtype, True)
        self.down = Linear(f"{name}.down", make, dtype, True)

    def forward(self, z: Tensor) -> Tensor:
        """[..., D or 2 D] to [...], in promote(dtype, fp32)."""
        logits = self.down(F.gelu(self.up(z))).squeeze(-1)
        return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))


@dataclass(frozen=True)
class Documents:
    """The documents of each sample: what halts together, and whose means are read."""

    real_BS: Tensor
    """Which tokens are no padding."""
    length_BS: Tensor
    """Tokens of a token's document; 1 at padding."""
    start_BS: Tensor
    """Where it begins."""
    number_BS: Tensor
    """Which of the sample's it is, from 0."""
    most: int
    """U."""

    def select(self, rows: Tensor) -> Documents:
        """Of some of the samples."""
        return Documents(
            self.real_BS[rows],
            self.length_BS[rows],
            self.start_BS[rows],
            self.number_BS[rows],
            self.most,
        )


def begin_BS(documents_BS: Tensor) -> Tensor:
    """Where documents begin, padding (-1) apart."""
    before_BS = F.pad(documents_BS[:, :-1], (1, 0), value=-1)
    return (documents_BS >= 0) & (documents_BS != before_BS)


def find_documents(documents_BS: Tensor | None, positions_BS: Tensor) -> Documents:
    """Runs of equal numbers; None: every sample is one document."""
    batch, length = positions_BS.shape
    if documents_BS is None:
        zeros_BS = torch.zeros_like(positions_BS)
        real_BS = torch.ones_like(positions_BS, dtype=torch.bool)
        return Documents(real_BS, zeros_BS + length, zeros_BS, zeros_BS, 1)
    begins_BS, real_BS = begin_BS(documents_BS), documents_BS >= 0
    number_BS = (begins_BS.cumsum(1) - 1).clamp(min=0)
    most = int(number_BS.max()) + 1
    counts_BU = torch.zeros(batch, most, dtype=torch.long, device=documents_BS.device)
    counts_BU.scatter_add_(1, number_BS, real_BS.long())
    places = torch.arange(length, device=documents_BS.device)
    start_BS = torch.where(begins_BS, places, 0).cummax(1).values
    return Documents(
        real_BS, counts_BU.gather(1, number_BS).clamp(min=1), start_BS, number_BS, most
    )


def mean_so_far(x_BSD: Tensor, documents: Documents) -> Tensor:
    """[B, S, D]: of every token, the mean over its document up to itself."""
    sums_BSD = x_BSD.cumsum(1)
    places_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
    counts_BS = places_S - documents.start_BS + 1
    if documents.most > 1:
        before_BS = (documents.start_BS - 1).clamp(min=0)
        index = before_BS[..., None].expand_as(sums_BSD)
        first = (documents.start_BS == 0)[..., None]
        sums_BSD = sums_BSD - torch.where(first, 0.0, sums_BSD.gather(1, index))
    return sums_BSD / counts_BS[..., None]


def mean_of_documents(x_BSD: Tensor, documents: Documents) -> Tensor:
    """[B, U, D]: the mean over every document's tokens; 0 for those that a sample has not."""
    shares_BS = documents.real_BS / documents.length_BS.to(x_BSD.dtype)
    own = torch.arange(documents.most, device=x_BSD.device)[None, :, None]
    shares_BUS = torch.where(documents.number_BS[:, None, :] == own, shares_BS[:, None, :], 0.0)
    return shares_BUS @ x_BSD


class Mixture:
    """The states of one micro batch on their way through the steps.

    Samples all of whose tokens have halted can be left behind (`drop_halted`), so that later steps
    compute on the others alone; `rows_b` says which those are.

    Args:
        config: how to halt.
        head: of the probabilities.
        x_BSD: what enters the first step.
        ctx: of the micro batch.
        causal: whether a token may know of later ones.
        depth: steps that there are.
    """

    def __init__(
        self,
        config: HaltingConfig,
        head: HaltingHead,
        x_BSD: Tensor,
        ctx: Context,
        causal: bool,
        depth: int,
    ) -> None:
        self.config, self.head, self.causal, self.depth, self.tp = (
            config,
            head,
            causal,
            depth,
            ctx.tp,
        )
        self.dtype = torch.promote_types(x_BSD.dtype, torch.float32)
        self.documents = find_documents(ctx.documents_BS, ctx.positions_BS)
        self.shares_BS = ctx.shares_BS
        self.whole = self.documents
        """Of all samples."""
        zeros_BS = torch.zeros(x_BSD.shape[:2], dtype=self.dtype, device=x_BSD.device)
        self.step = 0
        """l."""
        self.rows_b = torch.arange(len(x_BSD), device=x_BSD.device)
        self.going = self.documents.real_BS
        """Tokens whose last step was accepted, and that may take one more."""
        self.taken = torch.zeros_like(ctx.positions_BS)
        """Accepted steps."""
        self.h = self.o = x_BSD
        self.p = self.stopped = self.spent = self.cost = zeros_BS
        """p_l, T, sum_k c_k (k + 1), and the cost; the first three also of discarded steps."""
        self.left = zeros_BS + 1.0
        """Product of 1 - p so far."""
        self.sum = torch.zeros_like(x_BSD, dtype=self.dtype)
        """sum_k c_k h_k."""
        self.done: list[tuple[Tensor, ...]] = []
        """Of samples left behind: rows, mixture, cost, accepted steps."""
        self.executed = 0
        """Samples that steps were computed for."""

    @property
    def source(self) -> Tensor | None:
        """What attention reads at the step to come, where it is not the state: the mixture."""
        return self.o if self.config.mode == "token" and self.step else None

    def begin_step(self) -> bool:
        """Halt documents of an encoder that have taken as many steps as they may; a causal model
        must not know how long they will be. Whether any token goes on."""
        if not self.causal:
            self.going = self.going & (self.step < self.documents.length_BS + 1)
        return bool(self.going.any())

    def drop_halted(self) -> Tensor | None:
        """Leave halted samples behind. Which of those before go on; None: all."""
        alive_b = self.going.any(1)
        kept, gone = alive_b.nonzero().squeeze(1), (~alive_b).nonzero().squeeze(1)
        if not len(gone) or not len(kept):
            return None
        self.set_aside(gone)
        self.rows_b, self.documents = self.rows_b[kept], self.documents.select(kept)
        self.going, self.taken = self.going[kept], self.taken[kept]
        for name in ("h", "stopped", "spent", "cost", "left", "sum", "p"):
            setattr(self, name, getattr(self, name).index_select(0, kept))
        self.o = self.o.index_select(0, kept)
        return kept

    def set_aside(self, rows: Tensor | None = None) -> None:
        """Keep what is final of these of the present samples; None: of all."""
        parts = (self.rows_b, self.o, self.cost, self.taken)
        self.done.append(parts if rows is None else tuple(p.index_select(0, rows) for p in parts))

    def hazard(self, candidate: Tensor) -> Tensor:
        """p_l of every token [b, S]."""
        read = [self.h, candidate] if self.config.transition else [self.h]
        if self.config.mode == "token":
            return self.head(torch.cat(read, -1))
        mean = mean_so_far if self.causal else mean_of_documents
        means = [mean(x.to(self.dtype), self.documents) for x in read]
        p = self.head(torch.cat(means, -1).to(self.h.dtype))
        return p if self.causal else p.gather(1, self.documents.number_BS)

    def advance(self, candidate: Tensor) -> None:
        """Take the step that leads to `candidate` [b, S, D] where it is accepted."""
        number = self.step + 1
        self.executed += len(candidate)
        self.p = self.hazard(candidate)
        c = self.left * self.p
        self.sum = self.sum + c[..., None] * self.h.to(self.dtype)
        self.stopped, self.left = self.stopped + c, self.left * (1.0 - self.p)
        self.spent = self.spent + c * number
        rest = 1.0 - self.stopped
        mixed = self.sum + rest[..., None] * candidate.to(self.dtype)
        self.going = self.going & ~self.has_stopped()
        moves = self.going[..., None]
        self.o = torch.where(moves, mixed.to(self.o.dtype), self.o)
        self.h = torch.where(moves, candidate, self.h)
        self.cost = torch.where(self.going, self.spent + rest * number, self.cost)
        self.taken = self.taken + self.going
        self.step = number

    def has_stopped(self) -> Tensor:
        """Where T has reached the threshold, on every tensor-parallel rank alike: they go on
        together, and must not part over a last digit."""
        stopped = self.stopped.detach() >= self.config.threshold
        if self.tp.size == 1:
            return stopped
        return self.tp.max(stopped.to(torch.int32)) > 0

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """What leaves, of all samples in their order: the mixture [B, S, D]; the sum over documents
        of the mean cost of their tokens, in a chunk its share; and counts, fp64: tokens by accepted
        steps [depth + 1], then steps x tokens that were computed, and all that there are."""
        self.set_aside()
        order = torch.cat([rows for rows, *_ in self.done]).argsort()
        o, cost, taken = (
            torch.cat(parts).index_select(0, order) if len(self.done) > 1 else parts[0]
            for parts in list(zip(*self.done, strict=True))[1:]
        )
        real_BS = self.whole.real_BS
        if self.shares_BS is not None:
            cost = cost * self.shares_BS
        total = torch.where(real_BS, cost / self.whole.length_BS, 0.0).sum()
        counts = torch.zeros(self.depth + 3, dtype=torch.float64, device=o.device)
        counts.index_add_(0, taken.flatten(), real_BS.flatten().to(counts.dtype))
        length = o.shape[1]
        counts[-2], counts[-1] = self.executed * length, len(o) * self.depth * length
        return o, total, counts
