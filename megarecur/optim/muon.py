"""Muon (Jordan et al. 2024) for matrices of which every rank holds a part.

Momentum is kept in parts. For an update, each matrix has one owner among the ranks that hold its
parts: the owner receives the parts of the momentum, orthogonalizes the matrix once, and sends the
parts of the result back. All matrices travel in two exchanges per optimizer step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from megarecur.config.optimizer import MuonConfig
from megarecur.parallel.mesh import Peers
from megarecur.plan.muon import divide_matrices
from megarecur.recurrence.inventory import ParameterSpec

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration; torch's default, as is the smallest norm."""
SMALLEST_NORM = 1e-7


@dataclass(frozen=True)
class Part:
    """Elements [start, stop) of a tensor-parallel rank's part of a matrix, flattened."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start


class SharedMuon(torch.optim.Optimizer):
    """Muon on parts of matrices.

    Args:
        groups: torch groups of this rank's parts, with `weight_decay` and `lr_multiplier`.
        config: the options of Muon.
        specs: all matrices that Muon trains on this pipeline rank, in the same order on every rank.
        parts: the part of each matrix on each of the peers, by name.
        parameters: this rank's parts by name.
        peers: the ranks that hold parts of the same matrices.
        tp: number of tensor-parallel ranks, neighbours among the peers.
        dtype: dtype of momentum.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        config: MuonConfig,
        specs: Sequence[ParameterSpec],
        parts: Mapping[str, Sequence[Part]],
        parameters: Mapping[str, nn.Parameter],
        peers: Peers,
        tp: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(groups or [{"params": []}], {"lr": config.lr})
        self.config, self.parts, self.peers, self.tp, self.dtype = config, parts, peers, tp, dtype
        self.specs = {spec.name: spec for spec in specs}
        self.names = {parameters[name]: name for name in self.specs if name in parameters}
        self.owned = [[spec.name for spec in owned] for owned in divide_matrices(specs, peers.size)]
        """Names of the matrices that each peer owns."""

    def sends(self, name: str, rank: int) -> bool:
        """Return True if no lower tensor-parallel rank holds the same part of a matrix."""
        return rank % self.tp % self.specs[name].holders(self.tp) == 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the momentum, orthogonalize it, and apply the update to this rank's parts."""
        found = self.orthogonalize(self.advance_momentum())
        for group in self.param_groups:
            for parameter in group["params"]:
                name = self.names[parameter]
                rate = _adjust_lr(
                    group["lr"], self.config.adjust_lr, torch.Size(self.specs[name].shape)
                )
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(found[name].view_as(parameter), alpha=-rate)

    def advance_momentum(self) -> dict[str, Tensor]:
        """Return what to orthogonalize, by name: this rank's parts."""
        momentum, found = self.config.momentum, {}
        for parameter, name in self.names.items():
            gradient, kept = parameter.grad, self.state[parameter]["momentum_buffer"]
            assert gradient is not None
            kept.lerp_(gradient, 1 - momentum)
            found[name] = gradient.lerp(kept, momentum) if self.config.nesterov else kept
        return found

    def orthogonalize(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's parts of the orthogonalized matrices, in bf16; collective."""
        rank, parts, mine = self.peers.rank, self.parts, self.owned[self.peers.rank]
        order = [name for names in self.owned for name in names]
        first = {n: self.sends(n, rank) for n in order}
        sent = [own[n].flatten() for n in order if n in own and first[n]]
        arrived = self.peers.exchange(
            torch.cat([torch.empty(0, dtype=self.dtype, device=self.peers.device), *sent]),
            [
                sum(parts[n][rank].size for n in names if self.sends(n, rank))
                for names in self.owned
            ],
            [sum(parts[n][i].size for n in mine if self.sends(n, i)) for i in self.peers.ranks],
        )
        wholes = self.assemble(arrived)
        results = [self.cut(wholes[n], n, i) for i in self.peers.ranks for n in mine]
        returned = self.peers.exchange(
            torch.cat([arrived.new_empty(0, dtype=torch.bfloat16), *results]),
            [sum(parts[n][i].size for n in mine) for i in self.peers.ranks],
            [sum(parts[n][rank].size for n in names) for names in self.owned],
        )
        pieces = returned.split([parts[n][rank].size for n in order])
        return dict(zip(order, pieces, strict=True))

    def assemble(self, arrived: Tensor) -> dict[str, Tensor]:
        """Return the orthogonalized matrices that this rank owns, from the parts of all peers."""
        mine = self.owned[self.peers.rank]
        came = [(i, n) for i in self.peers.ranks for n in mine if self.sends(n, i)]
        pieces = arrived.split([self.parts[name][i].size for i, name in came])
        found = {name: arrived.new_empty(self.specs[name].shape) for name in mine}
        by_part: dict[tuple[int, str], list[Tensor]] = {}
        for (i, name), piece in zip(came, pieces, strict=True):
            by_part.setdefault((i % self.tp, name), []).append(piece)
        for (tensor_rank, name), shards in by_part.items():
            spec = self.specs[name]
            sizes = spec.part(tensor_rank, self.tp)[1]
            found[name][spec.place(tensor_rank, self.tp)] = torch.cat(shards).view(sizes)
        return {
            name: _zeropower_via_newtonschulz(
                whole, COEFFICIENTS, self.config.ns_steps, SMALLEST_NORM
            )
            for name, whole in found.items()
        }

    def cut(self, whole: Tensor, name: str, rank: int) -> Tensor:
        """Return a peer's part of a matrix, flattened."""
        part = self.parts[name][rank]
        place = self.specs[name].place(rank % self.tp, self.tp)
        return whole[place].flatten()[part.start : part.stop]
