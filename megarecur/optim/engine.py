"""The engine: from a loss to updated weights, over the data-parallel replicas.

The trainer, checkpoints and verification use only these five calls. The plain engine is the
reference: AdamW and one reduction over dp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from megarecur.config.optimizer import OptimizerConfig
from megarecur.config.run import Config
from megarecur.model.transformer import Transformer
from megarecur.optim.groups import build_groups, build_muon_groups
from megarecur.parallel.mesh import Mesh
from megarecur.parallel.regions import TensorParallel
from megarecur.parallel.shards import TensorShard, whole
from megarecur.recurrence.inventory import ParameterSpec, check_patterns, is_frozen, uses_muon

ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
NORM_ROW = 4096
UPDATES = "optimizer.updates"
"""Checkpoint entry that counts the applied optimizer steps; skipped ones are not counted."""


Outputs = Tensor | Sequence[Tensor]
Gradients = Sequence[Tensor | None] | None


class Engine(Protocol):
    """The interface of an engine that the trainer uses."""

    def backward(self, outputs: Outputs, gradients: Gradients = None) -> None:
        """Add the gradient of a micro batch's share of the objective.

        Args:
            outputs: the share, or the tensors that lead to it if it ends on another pipeline rank.
            gradients: gradients of the outputs; None for a share of the objective.
        """

    def gradients(self) -> dict[str, Tensor]:
        """Return raw gradients of the step so far by global name, summed over replicas,
        unclipped."""

    def step(self, lr: float) -> tuple[float, bool]:
        """Reduce, clip and update. Returns (global norm before clipping, skipped because not
        finite)."""

    def shards(self) -> dict[str, TensorShard]:
        """Return checkpoint entries: parameters by name, moments as `exp_avg.NAME`,
        `exp_avg_sq.NAME` or, for Muon, `momentum.NAME`."""

    def load(self, shards: dict[str, TensorShard]) -> None:
        """Load entries of `shards()` that were filled from a checkpoint."""


def global_norm(flat: Tensor) -> Tensor:
    """Return the Euclidean norm of all gradients.

    A CPU's vector norm adds sequentially and loses 3e-3 of the norm over 50M elements in fp32. So
    norms of short rows are computed, and added pairwise.
    """
    if flat.device.type != "cpu":
        norm: Tensor = torch.linalg.vector_norm(flat)
        return norm
    rows = flat[: flat.numel() // NORM_ROW * NORM_ROW].view(-1, NORM_ROW)
    rest = torch.linalg.vector_norm(flat[rows.numel() :], keepdim=True)
    norms = torch.cat([torch.linalg.vector_norm(rows, dim=1), rest])
    return norms.square().sum().sqrt()


def is_partial(spec: ParameterSpec, tp: TensorParallel) -> bool:
    """Return True if several tensor-parallel ranks hold the same part of a parameter and each
    computes a part of its gradient. That is true of everything uncut under sequence parallelism,
    of key heads held by several ranks, and of gains that each rank uses for its own heads."""
    shared = tp.size > 1 and spec.holders(tp.size) > 1
    return shared and (spec.partial or spec.cut is not None or tp.sequence)


def sum_over_holders(
    gradients: Sequence[tuple[Tensor, ParameterSpec]], tp: TensorParallel
) -> list[Tensor]:
    """Return gradients summed over the tensor-parallel ranks that hold the same part of a
    parameter.

    Takes one call: each rank puts its own at their places in a buffer of the whole tensors.
    """
    buffer = gradients[0][0].new_zeros(sum(spec.size for _, spec in gradients))
    pieces = buffer.split([spec.size for _, spec in gradients])
    parts = [
        piece.view(spec.shape)[spec.place(tp.rank, tp.size)]
        for piece, (_, spec) in zip(pieces, gradients, strict=True)
    ]
    for part, (gradient, _) in zip(parts, gradients, strict=True):
        part.copy_(gradient)
    tp.sum(buffer)
    return parts


def sum_partial(trained: Mapping[str, nn.Parameter], model: Transformer) -> None:
    """Sum the gradients of partial parameters over tensor parallelism, in place, in one call."""
    partial = []
    for name, parameter in trained.items():
        spec = model.inventory[name]
        if is_partial(spec, model.tp):
            assert parameter.grad is not None
            partial.append((parameter.grad, spec))
    totals = sum_over_holders(partial, model.tp) if partial else []
    for (gradient, _), total in zip(partial, totals, strict=True):
        gradient.copy_(total)


def build_optimizers(
    config: OptimizerConfig, parameters: Mapping[str, nn.Parameter]
) -> list[torch.optim.Optimizer]:
    """Build AdamW, and Muon if the config uses it, each for its own parameters."""
    optimizers: list[torch.optim.Optimizer] = []
    if groups := build_groups(config, parameters):
        optimizers.append(
            torch.optim.AdamW(groups, config.lr, config.betas, config.eps, fused=True)
        )
    if config.muon is not None and (groups := build_muon_groups(config, parameters)):
        muon = torch.optim.Muon(
            groups,
            config.muon.lr,
            momentum=config.muon.momentum,
            nesterov=config.muon.nesterov,
            ns_steps=config.muon.ns_steps,
            adjust_lr_fn=config.muon.adjust_lr,
        )
        optimizers.append(muon)
    return optimizers


def moments_of(config: OptimizerConfig, name: str, parameter: nn.Parameter) -> tuple[str, ...]:
    """Return the names of the moments that the parameter's optimizer keeps."""
    return ("momentum",) if uses_muon(config, name, parameter.ndim) else ADAMW_MOMENTS


class PlainEngine:
    """AdamW, and Muon, on whole parameters; gradients live in one flat buffer and are reduced at
    once."""

    def __init__(self, model: Transformer, config: Config, mesh: Mesh) -> None:
        optimizer = config.optimizer
        check_patterns(optimizer, model.inventory)
        self.model, self.mesh, self.clip_norm = model, mesh, optimizer.clip_norm
        self.trained = {}
        for name, parameter in model.parameters_by_name.items():
            parameter.requires_grad_(not is_frozen(optimizer, name))
            if parameter.requires_grad:
                self.trained[name] = parameter
        self.holders = {n: model.inventory[n].holders(mesh.tp) for n in self.trained}
        """Number of tensor-parallel ranks that hold each element."""
        self.copies = {n: held * (1 + (n == model.tied)) for n, held in self.holders.items()}
        """Number of ranks of a replica that hold each element."""
        self.flat = self.allocate_gradients()
        for weight in model.weights():
            weight.sum_in_place = weight.parameter.requires_grad
        self.optimizers = build_optimizers(optimizer, model.parameters_by_name)
        self.moments = {
            f"{moment}.{name}": torch.zeros_like(parameter)
            for name, parameter in self.trained.items()
            for moment in moments_of(optimizer, name, parameter)
        }
        self.num_steps = torch.zeros((), dtype=torch.float32, device=self.flat.device)
        self.give_state()
        self.updates = torch.zeros(1, dtype=torch.float32)
        self.reduced = False

    def give_state(self) -> None:
        """Let the optimizers use our moments; each parameter has its own count of updates."""
        names = {parameter: name for name, parameter in self.trained.items()}
        for optimizer in self.optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                name = names[parameter]
                if isinstance(optimizer, torch.optim.Muon):
                    state = {"momentum_buffer": self.moments[f"momentum.{name}"]}
                else:
                    state = {m: self.moments[f"{m}.{name}"] for m in ADAMW_MOMENTS}
                    state["step"] = self.num_steps.clone()
                optimizer.state[parameter] = state

    def allocate_gradients(self) -> Tensor:
        """Return one zeroed buffer with every `.grad` a view of it, so that unused parameters have
        gradient 0.

        Parameters with equal numbers of copies are adjacent.
        """
        parameters = [
            self.trained[name] for name in sorted(self.trained, key=self.copies.__getitem__)
        ]
        size = sum(p.numel() for p in parameters)
        flat = torch.zeros(size, dtype=self.model.master_dtype, device=self.mesh.device)
        pieces = flat.split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        return flat

    def backward(self, outputs: Outputs, gradients: Gradients = None) -> None:
        """Add the gradient of a micro batch's share of the objective."""
        assert not self.reduced, "gradients() ends a step's backward passes"
        torch.autograd.backward(outputs, gradients)

    def reduce(self) -> None:
        """Sum gradients over all ranks that hold the same parameters, once per step."""
        if not self.reduced:
            self.reduce_over_tp()
            self.mesh.sum_over_dp(self.flat)
            self.join_tied()  # last, so that both ends are equal bit for bit
            self.reduced = True

    def reduce_over_tp(self) -> None:
        """Sum the gradients of which each tensor-parallel rank has a part."""
        sum_partial(self.trained, self.model)

    def join_tied(self) -> None:
        """Sum the two gradients of a tied table whose ends, embedding and head, are on two pipeline
        ranks: the only weights that two of them hold."""
        if self.model.tied in self.trained:
            gradient = self.trained[self.model.tied].grad
            assert gradient is not None
            gradient += self.mesh.exchange(gradient, self.model.tied_peer)

    def norm(self) -> float:
        """Return the norm of all gradients, each element counted once."""
        counts = dict.fromkeys(sorted(self.copies.values()), 0)
        for name, copies in self.copies.items():
            counts[copies] += self.trained[name].numel()
        squares = self.flat.new_zeros(())
        for part, copies in zip(self.flat.split(list(counts.values())), counts, strict=True):
            squares += global_norm(part).square() / copies
        return float(self.mesh.sum_over_replica(squares).sqrt())

    def gradients(self) -> dict[str, Tensor]:
        """Return copies of raw gradients by global name, summed over replicas."""
        self.reduce()
        return {n: p.grad.clone() for n, p in self.trained.items() if p.grad is not None}

    def step(self, lr: float) -> tuple[float, bool]:
        """Reduce, clip and update. Returns (global norm before clipping, skipped because not
        finite)."""
        self.reduce()
        norm = self.norm()
        skipped = not norm < float("inf")
        if not skipped:
            if self.clip_norm is not None and norm > self.clip_norm:
                self.flat.mul_(self.clip_norm / norm)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["lr_multiplier"]
                optimizer.step()
            self.updates += 1
            self.model.refresh()
        self.flat.zero_()
        self.reduced = False
        return norm, skipped

    def shards(self) -> dict[str, TensorShard]:
        """Return checkpoint entries; they alias the live tensors."""
        entries = {
            name: self.model.shard(name, parameter.detach())
            for name, parameter in self.model.parameters_by_name.items()
        }
        for entry, moment in self.moments.items():
            _, _, name = entry.partition(".")
            entries[entry] = self.model.shard(name, moment)
        entries[UPDATES] = whole(self.updates)
        return entries

    def load(self, shards: dict[str, TensorShard]) -> None:
        """Load entries of `shards()` that were filled from a checkpoint."""
        self.num_steps.fill_(self.updates.item())
        self.give_state()
        self.model.refresh()
