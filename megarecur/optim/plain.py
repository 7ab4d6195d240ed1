"""The plain engine, the reference: AdamW and Muon on whole parameters, gradients summed over dp."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megarecur.config.run import Config
from megarecur.model.transformer import Transformer
from megarecur.optim.engine import (
    UPDATES,
    Gradients,
    Outputs,
    build_muon,
    build_optimizers,
    global_norm,
    moments_of,
    set_rates,
    set_state,
    sum_partial,
)
from megarecur.optim.uses import HEAD, Uses, unit_of
from megarecur.parallel.mesh import Mesh
from megarecur.parallel.shards import TensorShard, whole
from megarecur.recurrence.inventory import check_patterns, is_frozen
from megarecur.recurrence.layer_map import Step


@dataclass
class Bucket:
    """Units whose gradients are reduced at once: a range of the flat buffer."""

    names: list[str] = field(default_factory=list)
    """Parameters, those with equal numbers of copies adjacent."""
    waits_for: set[str] = field(default_factory=set)
    """Its units."""
    size: int = 0
    """Number of elements."""
    place: int = 0
    """Place in the order in which backward passes end."""
    left: bool = False
    """Whether its reduction has begun in this step."""


class Departures(Uses):
    """Tells the engine when the gradients of units are complete in an optimizer step."""

    def __init__(self, engine: PlainEngine, needed: Mapping[int, tuple[str, ...]]) -> None:
        super().__init__(needed)
        self.engine = engine
        self.done: set[str] = set()

    def complete(self, unit: str) -> None:
        """Reduce the buckets whose units are done, the first ones first."""
        later = self.engine.model.deferred.open
        if later is not None:  # Products of weight gradients are still to come.
            later.append(partial(self.complete, unit))
            return
        if self.is_last(unit):
            self.done.add(unit)
            for number, bucket in enumerate(self.engine.buckets):
                if bucket.waits_for & set(self.expected) <= self.done:
                    self.engine.start_reduction(number)

    def forget(self) -> None:
        """Forget the passes of an optimizer step that is over."""
        super().forget()
        self.done.clear()


class PlainEngine:
    """AdamW, and Muon, on whole parameters.

    Gradients live in one flat buffer. It is divided into buckets, in the order in which backward
    passes end with their units: the head, blocks, the embedding. Each is summed over dp when its
    units are done in the step's last backward pass, while that pass goes on.
    """

    def __init__(self, model: Transformer, config: Config, mesh: Mesh) -> None:
        optimizer = config.optimizer
        check_patterns(optimizer, model.inventory)
        self.model, self.mesh, self.clip_norm = model, mesh, optimizer.clip_norm
        self.shares_feed_forward = config.model.shared_feed_forward
        self.reduce_dtype = torch.bfloat16 if config.parallel.reduce_dtype == "bf16" else None
        self.trained = {}
        for name, parameter in model.parameters_by_name.items():
            parameter.requires_grad_(not is_frozen(optimizer, name))
            if parameter.requires_grad:
                self.trained[name] = parameter
        self.holders = {n: model.inventory[n].holders(mesh.tp) for n in self.trained}
        """Number of tensor-parallel ranks that hold each element."""
        self.copies = {n: held * (1 + (n == model.tied)) for n, held in self.holders.items()}
        """Number of ranks of a replica that hold each element."""
        self.buckets = self.divide(config.parallel.bucket_mb if mesh.dp > 1 else float("inf"))
        self.flat = self.allocate_gradients()
        self.parts = self.flat.split([bucket.size for bucket in self.buckets])
        """Gradients of each bucket."""
        for weight in model.weights():
            weight.sum_in_place = weight.parameter.requires_grad
        ndims = {name: parameter.ndim for name, parameter in model.parameters_by_name.items()}
        self.optimizers = build_optimizers(optimizer, model.parameters_by_name, ndims)
        specs = [model.inventory[name] for name in self.trained]
        self.optimizers += build_muon(
            optimizer, self.trained, specs, None, mesh.peers(sharded=False), mesh.tp
        )
        self.moments = {
            f"{moment}.{name}": torch.zeros_like(parameter)
            for name, parameter in self.trained.items()
            for moment in moments_of(optimizer, name, parameter.ndim)
        }
        self.num_steps = torch.zeros((), dtype=torch.float32, device=self.flat.device)
        set_state(self.optimizers, self.trained, self.moments, self.num_steps)
        self.updates = torch.zeros(1, dtype=torch.float32)
        self.pending: list[tuple[int, Tensor, Any]] = []
        """Reductions that have begun: bucket, what is summed, what to wait for."""
        self.reduced = False
        self.uses: Departures | None = None
        """Follows the passes, if there is anything to reduce."""
        if mesh.dp > 1:
            names = {parameter: name for name, parameter in self.trained.items()}
            needed = {
                number: tuple(dict.fromkeys(
                    self.unit(names[p]) for p in block.parameters() if p in names
                ))
                for number, block in model.blocks().items()
            }  # fmt: skip
            self.uses = Departures(self, needed)
            model.attach(self.uses)

    def unit(self, name: str) -> str:
        """Return the unit of a parameter."""
        if name == self.model.tied and self.model.look_up is None:
            return HEAD  # The embedding looks up the table on another pipeline rank.
        return unit_of(self.model.inventory[name], self.shares_feed_forward)

    def divide(self, megabytes: float) -> list[Bucket]:
        """Return the buckets in the order in which backward passes end with them: the head, blocks
        from the last to the first, the embedding."""
        last = len(self.model.inventory)
        units: dict[str, Bucket] = {}
        for name, parameter in self.trained.items():
            unit = self.unit(name)
            part = units.setdefault(unit, Bucket())
            part.names.append(name)
            part.size += parameter.numel()
            block = self.model.inventory[name].block
            part.place = -last if unit == HEAD else last if block is None else -block
        buckets, most = [Bucket()], megabytes * 1e6 / self.model.master_dtype.itemsize
        for unit, part in sorted(units.items(), key=lambda item: item[1].place):
            if buckets[-1].size >= most:
                buckets.append(Bucket())
            bucket = buckets[-1]
            bucket.names += part.names
            bucket.size += part.size
            bucket.waits_for.add(unit)
        order = {name: i for i, name in enumerate(self.trained)}
        for bucket in buckets:
            bucket.names.sort(key=lambda name: (self.copies[name], order[name]))
        return buckets

    def allocate_gradients(self) -> Tensor:
        """Return one zeroed buffer with every `.grad` a view of it, so that unused parameters have
        gradient 0."""
        parameters = [self.trained[name] for bucket in self.buckets for name in bucket.names]
        size = sum(p.numel() for p in parameters)
        flat = torch.zeros(size, dtype=self.model.master_dtype, device=self.mesh.device)
        pieces = flat.split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        return flat

    def expect(self, stages: Iterable[Sequence[Step]], num_microbatches: int) -> None:
        """Announce the backward passes of an optimizer step; see `Uses.expect`."""
        if self.uses is not None:
            self.uses.expect(stages, num_microbatches)

    def backward(self, outputs: Outputs, gradients: Gradients = None) -> None:
        """Add the gradient of a micro batch's share of the objective."""
        assert not self.reduced, "gradients() ends a step's backward passes"
        if self.uses is not None:
            self.uses.begin_backward()
        torch.autograd.backward(outputs, gradients)
        if self.uses is not None:
            self.uses.end_backward()

    def start_reduction(self, number: int) -> None:
        """Begin to sum the gradients of a bucket over dp, unless that was begun before."""
        bucket = self.buckets[number]
        if bucket.left:
            return
        bucket.left = True
        self.reduce_over_tp(bucket.names)
        gradient = self.parts[number]
        if self.reduce_dtype is not None:
            gradient = gradient.to(self.reduce_dtype)
        self.pending.append((number, gradient, self.mesh.start_sum_over_dp(gradient)))

    def reduce(self) -> None:
        """Sum gradients over all ranks that hold the same parameters, once per step."""
        if self.reduced:
            return
        for number in range(len(self.buckets)):
            self.start_reduction(number)
        for number, total, work in self.pending:
            if work is not None:
                work.wait()
            if self.reduce_dtype is not None:
                self.parts[number].copy_(total)
        self.pending.clear()
        self.join_tied()  # last, so that both ends are equal bit for bit
        self.reduced = True

    def reduce_over_tp(self, names: Iterable[str]) -> None:
        """Sum the gradients of which each tensor-parallel rank has a part."""
        sum_partial({name: self.trained[name] for name in names}, self.model)

    def join_tied(self) -> None:
        """Sum the two gradients of a tied table whose ends, embedding and head, are on two pipeline
        ranks: the only weights that two of them hold."""
        if self.model.tied in self.trained:
            gradient = self.trained[self.model.tied].grad
            assert gradient is not None
            gradient += self.mesh.exchange(gradient, self.model.tied_peer)

    def norm(self) -> float:
        """Return the norm of all gradients, each element counted once."""
        squares = self.flat.new_zeros(())
        for bucket, part in zip(self.buckets, self.parts, strict=True):
            counts: dict[int, int] = {}
            for name in bucket.names:
                copies = self.copies[name]
                counts[copies] = counts.get(copies, 0) + self.trained[name].numel()
            for each, copies in zip(part.split(list(counts.values())), counts, strict=True):
                squares += global_norm(each).square() / copies
        return float(self.mesh.sum_over_replica(squares).sqrt())

    def gradients(self) -> dict[str, Tensor]:
        """Return copies of raw gradients by global name, summed over replicas."""
        self.reduce()
        return {n: p.grad.clone() for n, p in self.trained.items() if p.grad is not None}

    def gradient_bytes(self) -> int:
        """Return the bytes of gradients that this process keeps between passes."""
        return self.flat.nbytes

    def step(self, lr: float) -> tuple[float, bool]:
        """Reduce, clip and update. Returns (global norm before clipping, skipped because not
        finite)."""
        self.reduce()
        norm = self.norm()
        skipped = not norm < float("inf")
        if not skipped:
            if self.clip_norm is not None and norm > self.clip_norm:
                self.flat.mul_(self.clip_norm / norm)
            set_rates(self.optimizers, lr)
            for optimizer in self.optimizers:
                optimizer.step()
            self.updates += 1
            self.model.refresh()
        self.flat.zero_()
        for bucket in self.buckets:
            bucket.left = False
        if self.uses is not None:
            self.uses.forget()
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
        set_state(self.optimizers, self.trained, self.moments, self.num_steps)
        self.model.refresh()
