"""The engine: from a loss to updated weights, over the data-parallel replicas.

The trainer, checkpoints and verification know these five calls and nothing else. The plain engine
is the reference: AdamW, one reduction over dp.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megarecur.config.schema import Config
from megarecur.model.transformer import Transformer
from megarecur.optim.groups import build_groups
from megarecur.parallel.mesh import Mesh
from megarecur.parallel.shards import Shard, whole
from megarecur.recurrence.inventory import check_patterns, is_frozen

UPDATES = "optimizer.updates"
"""Entry that counts the optimizer steps applied, skipped ones left out."""


class Engine(Protocol):
    """What a trainer needs."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro batch's share of the objective."""

    def gradients(self) -> dict[str, Tensor]:
        """Raw gradients of the step so far by global name, summed over replicas, unclipped."""

    def step(self, lr: float) -> tuple[float, bool]:
        """Reduce, clip, update. Returns (global norm before clipping, skipped as not finite)."""

    def shards(self) -> dict[str, Shard]:
        """Checkpoint entries: parameters by name, moments as `exp_avg.NAME`, `exp_avg_sq.NAME`."""

    def load(self, shards: dict[str, Shard]) -> None:
        """Take over entries of `shards()` that were filled from a checkpoint."""


def build_engine(model: Transformer, config: Config, mesh: Mesh) -> Engine:
    """The engine that `parallel.zero_stage` asks for.

    Raises:
        ConfigError: ZeRO without the DeepSpeed it needs; patterns that match no parameter.
    """
    if config.parallel.zero_stage == 0:
        return PlainEngine(model, config, mesh)
    from megarecur.optim.zero import ZeroEngine

    return ZeroEngine(model, config, mesh)


def global_norm(flat: Tensor) -> Tensor:
    """The Euclidean norm of all gradients.

    A CPU's vector norm adds one by one: 3e-3 of the norm is lost over 50M elements in fp32. Its sum
    adds in pairs.
    """
    if flat.device.type != "cpu":
        return torch.linalg.vector_norm(flat)
    return torch.stack([piece.square().sum() for piece in flat.split(1 << 15)]).sum().sqrt()


class PlainEngine:
    """AdamW on whole parameters; gradients live in one flat buffer, reduced by one call."""

    def __init__(self, model: Transformer, config: Config, mesh: Mesh) -> None:
        optimizer = config.optimizer
        check_patterns(optimizer, model.parameters_by_name)
        self.model, self.mesh, self.clip_norm = model, mesh, optimizer.clip_norm
        self.trained = {}
        for name, parameter in model.parameters_by_name.items():
            parameter.requires_grad_(not is_frozen(optimizer, name))
            if parameter.requires_grad:
                self.trained[name] = parameter
        self.flat = self.allocate_gradients()
        for weight in model.weights():
            weight.sum_in_place = weight.parameter.requires_grad
        self.optimizer = torch.optim.AdamW(
            build_groups(optimizer, model.parameters_by_name),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        )
        for parameter in self.trained.values():
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self.updates = torch.zeros(1, dtype=torch.float32)
        self.reduced = False

    def allocate_gradients(self) -> Tensor:
        """One zeroed buffer with every `.grad` a view of it: unused parameters have gradient 0."""
        parameters = list(self.trained.values())
        size = sum(p.numel() for p in parameters)
        flat = torch.zeros(size, dtype=parameters[0].dtype, device=parameters[0].device)
        pieces = flat.split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        return flat

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro batch's share of the objective."""
        assert not self.reduced, "gradients() ends a step's backward passes"
        loss.backward()

    def reduce(self) -> None:
        """Sum gradients over replicas, once per step."""
        if not self.reduced:
            self.mesh.sum_over_dp(self.flat)
            self.reduced = True

    def gradients(self) -> dict[str, Tensor]:
        """Raw gradients by global name, summed over replicas; copies."""
        self.reduce()
        return {n: p.grad.clone() for n, p in self.trained.items() if p.grad is not None}

    def step(self, lr: float) -> tuple[float, bool]:
        """Reduce, clip, update. Returns (global norm before clipping, skipped as not finite)."""
        self.reduce()
        norm = global_norm(self.flat).item()
        skipped = not norm < float("inf")
        if not skipped:
            if self.clip_norm is not None and norm > self.clip_norm:
                self.flat.mul_(self.clip_norm / norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["lr_multiplier"]
            self.optimizer.step()
            self.updates += 1
            self.model.refresh()
        self.flat.zero_()
        self.reduced = False
        return norm, skipped

    def shards(self) -> dict[str, Shard]:
        """Checkpoint entries; they alias the live tensors."""
        entries = {n: whole(p.detach()) for n, p in self.model.parameters_by_name.items()}
        for name, parameter in self.trained.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                entries[f"{moment}.{name}"] = whole(self.optimizer.state[parameter][moment])
        entries[UPDATES] = whole(self.updates)
        return entries

    def load(self, shards: dict[str, Shard]) -> None:
        """Take over entries of `shards()` that were filled from a checkpoint."""
        for parameter in self.trained.values():
            self.optimizer.state[parameter]["step"].fill_(self.updates.item())
        self.model.refresh()
