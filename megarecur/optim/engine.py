"""The engine: from a loss to updated weights, over the data-parallel replicas.

The trainer, checkpoints and verification use only these calls. The plain engine is the reference:
AdamW on whole parameters, and a sum over dp. The sharded engine and DeepSpeed must equal it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from megarecur.config.optimizer import OptimizerConfig
from megarecur.model.transformer import Transformer
from megarecur.optim.adamw import AdamW
from megarecur.optim.groups import build_groups, build_muon_groups
from megarecur.optim.muon import Part, SharedMuon
from megarecur.parallel.mesh import Mesh, Peers
from megarecur.parallel.regions import TensorParallel
from megarecur.parallel.shards import TensorShard, boxes
from megarecur.recurrence.inventory import ParameterSpec, uses_muon
from megarecur.recurrence.layer_map import Step

ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")
NORM_ROW = 4096
UPDATES = "optimizer.updates"
"""Checkpoint entry that counts the applied optimizer steps; skipped ones are not counted."""


Optimizer = AdamW | torch.optim.Optimizer
Outputs = Tensor | Sequence[Tensor]
Gradients = Sequence[Tensor | None] | None


class Engine(Protocol):
    """The interface of an engine that the trainer uses."""

    def expect(self, stages: Iterable[Sequence[Step]], num_microbatches: int) -> None:
        """Announce the backward passes of an optimizer step, so that gradients can leave early.

        Args:
            stages: the steps of the map in each stage of this rank that has a backward pass.
            num_microbatches: the number of micro batches that pass through each.
        """

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

    def gradient_bytes(self) -> int:
        """Return the bytes of gradients that this process keeps between passes."""


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
    config: OptimizerConfig, parameters: Mapping[str, nn.Parameter], ndims: Mapping[str, int]
) -> list[Optimizer]:
    """Build AdamW for its parameters; those of Muon are built by `build_muon`.

    Args:
        parameters: parameters, or one-dimensional pieces of them, by name.
        ndims: number of dims of each whole parameter.
    """
    groups = build_groups(config, parameters, ndims)
    return [AdamW(groups, config.betas, config.eps)] if groups else []


def build_muon(
    config: OptimizerConfig,
    parameters: Mapping[str, nn.Parameter],
    specs: Sequence[ParameterSpec],
    parts: Mapping[str, Sequence[Part]] | None,
    peers: Peers,
    tp: int,
) -> list[Optimizer]:
    """Build Muon, if the config uses it: torch's for whole matrices, ours for parts of them.

    Args:
        parameters: this rank's matrices, or parts of them, by name.
        specs: the trained parameters of this pipeline rank, in the same order on every rank.
        parts: the part of each on each of the peers; None: what tensor parallelism cuts.
        peers: the ranks that hold parts of the same matrices.
        tp: number of tensor-parallel ranks.
    """
    muon, own = config.muon, [s for s in specs if uses_muon(config, s.name, len(s.shape))]
    if muon is None or not own:
        return []
    ndims = {spec.name: len(spec.shape) for spec in specs}
    groups = build_muon_groups(config, parameters, ndims)
    if peers.size > 1 or parts is not None:
        cut = {
            spec.name: [Part(0, math.prod(spec.part(rank, tp)[1])) for rank in range(tp)]
            for spec in own
        }
        dtype = next(iter(parameters.values())).dtype
        return [SharedMuon(groups, muon, own, parts or cut, parameters, peers, tp, dtype)]
    return [
        torch.optim.Muon(
            groups,
            muon.lr,
            momentum=muon.momentum,
            nesterov=muon.nesterov,
            ns_steps=muon.ns_steps,
            adjust_lr_fn=muon.adjust_lr,
        )
    ]


def flat_shard(
    model: Transformer,
    mesh: Mesh,
    name: str,
    shape: tuple[int, ...],
    start: int,
    stop: int,
    values: Tensor,
) -> TensorShard:
    """Return a one-dimensional slice as rectangles of the whole tensor, without copying.

    Args:
        name: the parameter.
        shape: shape of its part on this tensor-parallel rank.
        start: first element of the slice in that part.
        stop: the end of the slice.
        values: its elements.
    """
    spec = model.inventory[name]
    origin, _ = spec.part(mesh.tp_rank, mesh.tp)
    chunks, first = [], 0
    for offset, sizes in boxes(shape, start, stop):
        size = math.prod(sizes)
        place = tuple(a + b for a, b in zip(origin, offset, strict=True))
        chunks.append((place, sizes, values[first : first + size].view(sizes)))
        first += size
    # Ranks with the same parameters have vectors of other lengths, cut at other places.
    first_holder = mesh.tp_rank % spec.holders(mesh.tp) == 0
    if name == model.tied:
        first_holder = first_holder and mesh.pp_rank < model.tied_peer
    return TensorShard(spec.shape, chunks, written=first_holder)


def moments_of(config: OptimizerConfig, name: str, ndim: int) -> tuple[str, ...]:
    """Return the names of the moments that the parameter's optimizer keeps."""
    return ("momentum",) if uses_muon(config, name, ndim) else ADAMW_MOMENTS


def set_state(
    optimizers: Sequence[Optimizer],
    parameters: Mapping[str, nn.Parameter],
    moments: Mapping[str, Tensor],
    num_steps: Tensor,
) -> None:
    """Let the optimizers use our moments; each parameter has its own count of updates."""
    names = {parameter: name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            name = names[parameter]
            if isinstance(optimizer, torch.optim.Muon | SharedMuon):
                state = {"momentum_buffer": moments[f"momentum.{name}"]}
            else:
                state = {m: moments[f"{m}.{name}"] for m in ADAMW_MOMENTS}
                state["step"] = num_steps.clone()
            optimizer.state[parameter] = state


def set_rates(optimizers: Sequence[Optimizer], lr: float) -> None:
    """Set the learning rate of every group, a multiple of `lr`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
