"""ZeRO 1, 2 and 3 along the layer map: each block's masters, gradients and moments are flat shards.

Rajbhandari et al. 2020; with groups of replicas, HSDP (Zhao et al. 2023). Stage 1 shards the fp32
masters and the moments, stage 2 the gradients too, stage 3 also the copies in the compute dtype.
Masters never travel: a unit, usually a block, is gathered in the compute dtype, straight into the
copies that its `Weight`s multiply with. At stage 3 that happens once per pass, ahead of the unit's
first use, and the copies are freed after its last one; below, once per optimizer step. A unit's
gradient is reduce-scattered after its last use in backward, at any depth (`optim.uses`). With a
pipeline, whose passes interleave, an optimizer step counts as one pass.

What products do not read stays whole: norms, biases, residual scales, learned positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megarecur.config.run import Config
from megarecur.model.runner import ChunkedRunner
from megarecur.model.transformer import Transformer
from megarecur.optim.engine import (
    UPDATES,
    Gradients,
    Outputs,
    build_muon,
    build_optimizers,
    flat_shard,
    global_norm,
    moments_of,
    set_rates,
    set_state,
    sum_partial,
)
from megarecur.optim.muon import Part
from megarecur.optim.uses import ENDS, HEAD, Uses, unit_of
from megarecur.parallel.linear import Weight, is_hollow, make_hollow
from megarecur.parallel.mesh import Mesh, Peers
from megarecur.parallel.shards import TensorShard, whole
from megarecur.recurrence.inventory import check_patterns, is_frozen
from megarecur.recurrence.layer_map import Step

ALIGNMENT = 32
"""Elements that a matrix begins at a multiple of: 64 bytes of bf16, as kernels like them."""
TIED = "tied table"
"""The unit of a table that two pipeline ranks have: both must cut it at the same places."""
MOST_REDUCTIONS = 2
"""Maximum pending reductions; each holds a whole gradient of a unit."""


@dataclass(frozen=True)
class Piece:
    """The part of one parameter in this rank's shard of a flat: elements [start, stop) of its
    tensor-parallel rank's part, at `offset` of the shard."""

    name: str
    start: int
    stop: int
    offset: int

    @property
    def place(self) -> slice:
        """The elements of the shard."""
        return slice(self.offset, self.offset + self.stop - self.start)


class Flat:
    """Weights that are gathered and reduced together, as one vector that is cut evenly.

    Args:
        weights: the weights by name, all trained or all frozen.
        mesh: its shard group cuts the vector.
        trained: whether the weights have gradients.
        dtype: dtype of masters and gradients.
    """

    def __init__(
        self, weights: Mapping[str, Weight], mesh: Mesh, trained: bool, dtype: torch.dtype
    ) -> None:
        self.weights, self.mesh, self.trained, self.dtype = dict(weights), mesh, trained, dtype
        first = next(iter(weights.values()))
        self.compute_dtype, self.product_dtype = first.compute_dtype, first.product_dtype
        self.shapes = {name: tuple(w.parameter.shape) for name, w in weights.items()}
        self.starts: dict[str, int] = {}
        """First element of each weight."""
        size = 0
        for name, shape in self.shapes.items():
            self.starts[name] = size
            size += -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT
        share = ALIGNMENT * mesh.shards
        self.size = -(-size // share) * share
        """Elements of the whole vector, with padding."""
        self.shard_size = self.size // mesh.shards
        self.master = torch.zeros(self.shard_size, dtype=dtype, device=mesh.device)
        self.own_gradient: Tensor | None = None
        """This rank's shard of the gradient, summed over replicas; a part of the engine's."""
        self.gradient: Tensor | None = None
        """The whole gradient of this rank, while backward passes add to it."""
        self.copy: Tensor | None = None
        self.copies: dict[str, Tensor] = {}
        """Parts of `copy` by weight. Graphs keep them for backward, so freeing empties their
        memory, and gathering fills the same tensors again."""
        self.work: Any = None
        self.sent: Tensor | None = None
        self.is_whole = False

    def pieces(self) -> Iterator[Piece]:
        """Yield the parts of the weights in this rank's shard."""
        first = self.mesh.shard_rank * self.shard_size
        for name, shape in self.shapes.items():
            begin, size = self.starts[name], math.prod(shape)
            start = min(max(first - begin, 0), size)
            stop = min(max(first + self.shard_size - begin, 0), size)
            if start < stop:
                yield Piece(name, start, stop, begin + start - first)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the parts of a whole vector by weight."""
        return {
            name: flat[start : start + math.prod(self.shapes[name])].view(self.shapes[name])
            for name, start in self.starts.items()
        }

    # -------------------------------------------------------------------------------- weights

    @torch.no_grad()
    def gather(self) -> None:
        """Begin to gather the weights, unless they are whole or on their way."""
        if self.is_whole or self.work is not None:
            return
        if self.copy is None:
            self.copy = self.master.new_empty(self.size, dtype=self.product_dtype)
            self.copies = self.views(self.copy)
        storage = self.copy.untyped_storage()
        storage.resize_(self.copy.nbytes)
        own = self.master.to(self.compute_dtype).to(self.product_dtype)
        # Tensors kept for backward hold the same values again, whatever their version says.
        with torch.autograd._unsafe_preserve_version_counter(self.copy):
            if self.mesh.shards == 1:
                self.copy.copy_(own)
                self.lend()
                return
            self.work = self.mesh.start_gather(self.copy, own)
        self.sent = own  # in memory until the message is complete

    def wait(self) -> None:
        """Wait for the weights that `gather` began to gather."""
        if self.work is not None:
            self.work.wait()
            self.work = self.sent = None
            self.lend()

    def lend(self) -> None:
        """Let the weights use the gathered copies."""
        self.is_whole = True
        for name, weight in self.weights.items():
            weight.copy = self.copies[name]

    def withdraw(self, frees: bool) -> None:
        """Take the copies away, because they are not needed, or are out of date.

        Args:
            frees: also free their memory.
        """
        self.wait()
        self.is_whole = False
        for weight in self.weights.values():
            weight.copy = None
        if frees and self.copy is not None:
            self.copy.untyped_storage().resize_(0)

    # ------------------------------------------------------------------------------ gradients

    def receive(self) -> None:
        """Allocate the whole gradient, zeroed, unless it is there."""
        if not self.trained or self.gradient is not None:
            return
        alone = self.mesh.shards == 1
        self.gradient = self.own_gradient if alone else self.master.new_zeros(self.size)
        assert self.gradient is not None
        for name, view in self.views(self.gradient).items():
            self.weights[name].parameter.grad = view

    def reduce(self, dtype: torch.dtype) -> tuple[Tensor, Any] | None:
        """Begin to sum the gradient over the shard group, and forget it.

        Args:
            dtype: dtype in which it travels.

        Returns:
            This rank's shard, and what to wait for; None if the gradient is all its own.
        """
        gradient, self.gradient = self.gradient, None
        for weight in self.weights.values():
            weight.parameter.grad = None
        if self.mesh.shards == 1 or gradient is None:
            return None
        gradient = gradient.to(dtype)
        own = gradient.new_empty(self.shard_size)
        return own, self.mesh.start_reduce_scatter(own, gradient)

    def gather_gradient(self) -> dict[str, Tensor]:
        """Return copies of the whole summed gradients by name; collective."""
        assert self.own_gradient is not None
        found = self.master.new_empty(self.size)
        if self.mesh.shards == 1:
            found.copy_(self.own_gradient)
        else:
            self.mesh.start_gather(found, self.own_gradient).wait()
        return self.views(found)


class Reduction(NamedTuple):
    """A sum over the shard group that has begun."""

    flat: Flat
    own: Tensor
    """This rank's shard of it."""
    work: Any
    """The handle of the collective."""
    last: bool
    """Whether nothing more is added to the gradient in this step."""


class Gathers(Uses):
    """Gathers units for their uses, and hands completed gradients to the engine."""

    def __init__(
        self,
        engine: ShardedEngine,
        needed: Mapping[int, tuple[str, ...]],
        holds: bool,
        bound: int | None,
    ) -> None:
        super().__init__(needed, holds)
        self.engine, self.bound = engine, bound
        self.blocks = list(dict.fromkeys(unit for units in needed.values() for unit in units))
        """The units of blocks."""

    def present(self, block: int, ahead: Sequence[int]) -> None:
        """Gather what the block needs, and begin with the first block ahead that is not here; at a
        bound, only with the next one, since others would take the room of blocks used before."""
        needed = self.needed[block]
        self.gather(needed, needed, ahead)
        for number, following in enumerate(ahead if self.bound is None else ahead[:1]):
            missing = [unit for unit in self.needed[following] if not self.engine.is_here(unit)]
            if missing:
                self.gather(missing, (*needed, *missing), ahead[number:], may_wait=True)
                break
        for unit in needed:
            self.engine.wait(unit)

    def gather(
        self,
        units: Iterable[str],
        kept: Sequence[str],
        ahead: Sequence[int],
        may_wait: bool = False,
    ) -> None:
        """Begin to gather units. At the bound, those leave whose next use is farthest (Belady).

        Args:
            kept: units that must stay.
            ahead: blocks whose uses follow.
            may_wait: do not gather if all others are used before.
        """
        for unit in units:
            if self.engine.is_here(unit):
                continue
            while self.bound is not None and not self.holds:
                here = [u for u in self.blocks if self.engine.is_here(u)]
                if len(here) < self.bound:
                    break
                leaving = [u for u in here if u not in kept]
                if not leaving:
                    if may_wait:
                        return
                    break
                distances = {u: self.distance(u, ahead) for u in leaving}
                victim = max(leaving, key=distances.__getitem__)
                if may_wait and distances[victim] == 0:
                    return
                self.engine.withdraw(victim)
            self.engine.gather(unit)

    def distance(self, unit: str, ahead: Sequence[int]) -> int:
        """Return the number of uses before the next use of a unit."""
        each = (i for i, block in enumerate(ahead) if unit in self.needed[block])
        return next(each, len(ahead))

    def enter_ends(self) -> None:
        """Gather what belongs to no block, for the rest of the pass."""
        for unit in (ENDS, TIED, HEAD):
            self.engine.gather(unit)
            self.engine.wait(unit)

    def receive(self, units: Iterable[str]) -> None:
        """Allocate gradients."""
        self.engine.receive(units)

    def free(self, unit: str) -> None:
        """Free a unit, if copies do not stay until the end of the step."""
        if not self.engine.keeps:
            self.engine.withdraw(unit)

    def complete(self, unit: str) -> None:
        """Reduce a gradient, if nothing more is added to it."""
        engine = self.engine
        later = engine.model.deferred.open
        if later is not None:  # Products of weight gradients are still to come.
            later.append(partial(self.complete, unit))
            return
        last = self.is_last(unit)
        if engine.per_pass or last:
            engine.reduce_unit(unit, last)


class ShardedEngine:
    """The engine that shards the state of each unit over a shard group."""

    def __init__(self, model: Transformer, config: Config, mesh: Mesh) -> None:
        check_patterns(config.optimizer, model.inventory)
        self.model, self.mesh, self.optimizer = model, mesh, config.optimizer
        parallel = config.parallel
        self.stage = parallel.zero_stage
        self.keeps = self.stage < 3 or mesh.pp > 1
        """Whether copies stay until the end of the step."""
        self.per_pass = self.stage >= 2 and mesh.pp == 1 and mesh.shards > 1
        """Whether gradients are reduced after each micro batch, and freed."""
        self.reduce_dtype = torch.bfloat16 if parallel.reduce_dtype == "bf16" else None
        self.weights = self.find_weights()
        frozen = {n for n in model.parameters_by_name if is_frozen(config.optimizer, n)}
        for name, parameter in model.parameters_by_name.items():
            parameter.requires_grad_(name not in frozen)
        self.units = self.divide(frozen)
        """The flats of each unit: trained weights, frozen ones."""
        self.small = {
            name: parameter
            for name, parameter in model.parameters_by_name.items()
            if name not in self.weights and name not in frozen
        }
        """Trained parameters that stay whole."""
        self.copies = {
            name: model.inventory[name].holders(mesh.tp) * (1 + (name == model.tied))
            for name in model.parameters_by_name
        }
        """Number of ranks of a replica that hold each element."""
        self.own_gradients, self.small_gradients = self.allocate_gradients()
        self.fill()
        self.pieces = {
            piece.name: (flat, piece) for flat in self.flats() for piece in flat.pieces()
        }
        self.parts: dict[str, nn.Parameter] = dict(self.small)
        """Parameters of the optimizers on this rank: pieces of matrices, and whole small ones."""
        for name, (flat, piece) in self.pieces.items():
            if flat.trained:
                assert flat.own_gradient is not None
                self.parts[name] = nn.Parameter(flat.master[piece.place])
                self.parts[name].grad = flat.own_gradient[piece.place]
        ndims = {name: len(spec.shape) for name, spec in model.inventory.items()}
        self.optimizers = build_optimizers(config.optimizer, self.parts, ndims)
        specs = [model.inventory[n] for n in model.parameters_by_name if n not in frozen]
        peers = mesh.peers(sharded=True)
        parts = self.find_parts(peers) if config.optimizer.muon is not None else {}
        self.optimizers += build_muon(config.optimizer, self.parts, specs, parts, peers, mesh.tp)
        self.moments = {
            f"{moment}.{name}": torch.zeros_like(part)
            for name, part in self.parts.items()
            for moment in moments_of(config.optimizer, name, ndims[name])
        }
        self.num_steps = torch.zeros((), dtype=torch.float32, device=mesh.device)
        set_state(self.optimizers, self.parts, self.moments, self.num_steps)
        self.updates = torch.zeros(1, dtype=torch.float32)
        for weight in model.weights():
            weight.sum_in_place = weight.parameter.requires_grad
        self.pending: list[Reduction] = []
        """Reductions over the shard group that have begun, oldest first."""
        self.crossing: dict[Flat, Any] = {}
        """Sums over the shard groups that have begun, and what to wait for."""
        self.reduced = False
        needed = {b: self.units_of(block.weights) for b, block in model.blocks().items()}
        holds = isinstance(model.runner, ChunkedRunner)
        self.uses = Gathers(self, needed, holds, parallel.gathered_blocks)
        model.attach(self.uses)

    # ----------------------------------------------------------------------------------- units

    def find_weights(self) -> dict[str, Weight]:
        """Return the matrices of this rank by name."""
        names = {parameter: name for name, parameter in self.model.parameters_by_name.items()}
        return {names[weight.parameter]: weight for weight in self.model.weights()}

    def unit(self, name: str) -> str:
        """Return the unit that a matrix belongs to."""
        if name == self.model.tied:
            return TIED
        shares = self.model.config.model.shared_feed_forward
        return unit_of(self.model.inventory[name], shares)

    def units_of(self, weights: Iterable[Weight]) -> tuple[str, ...]:
        """Return the units of some weights, each once."""
        own = {weight.parameter for weight in weights}
        units = [self.unit(n) for n, weight in self.weights.items() if weight.parameter in own]
        return tuple(dict.fromkeys(unit for unit in units if unit != ENDS))

    def divide(self, frozen: set[str]) -> dict[str, list[Flat]]:
        """Return the flats of each unit, in the order of blocks; within a flat, matrices with
        equal numbers of holders are adjacent."""
        sorted_names = sorted(
            self.weights, key=lambda n: self.model.inventory[n].holders(self.mesh.tp)
        )
        units: dict[str, dict[bool, dict[str, Weight]]] = {ENDS: {}, TIED: {}, HEAD: {}}
        for name in self.weights:
            units.setdefault(self.unit(name), {})
        for name in sorted_names:
            part = units[self.unit(name)].setdefault(name not in frozen, {})
            part[name] = self.weights[name]
        return {
            unit: [
                Flat(weights, self.mesh, trained, self.model.master_dtype)
                for trained, weights in parts.items()
            ]
            for unit, parts in units.items()
        }

    def flats(self) -> Iterator[Flat]:
        """Yield all flats, in the same order on every rank of a shard group."""
        for flats in self.units.values():
            yield from flats

    def find_parts(self, peers: Peers) -> dict[str, list[Part]]:
        """Return the part of each trained matrix on each of the ranks that hold parts of it."""
        own = [(name, piece.start, piece.stop) for name, (_, piece) in self.pieces.items()]
        found: dict[str, list[Part]] = {
            name: [Part(0, 0)] * peers.size
            for flat in self.flats()
            if flat.trained
            for name in flat.weights
        }
        for rank, theirs in enumerate(peers.gather_objects(own)):
            for name, start, stop in theirs:
                if name in found:
                    found[name][rank] = Part(start, stop)
        return found

    def allocate_gradients(self) -> tuple[Tensor, Tensor]:
        """Return the buffers of gradient shards and of gradients of whole parameters, zeroed."""
        wide, device = self.model.master_dtype, self.mesh.device
        trained = [flat for flat in self.flats() if flat.trained]
        shards = torch.zeros(sum(f.shard_size for f in trained), dtype=wide, device=device)
        for flat, part in zip(trained, shards.split([f.shard_size for f in trained]), strict=True):
            flat.own_gradient = part
        small = torch.zeros(sum(p.numel() for p in self.small.values()), dtype=wide, device=device)
        parts = small.split([p.numel() for p in self.small.values()])
        for parameter, part in zip(self.small.values(), parts, strict=True):
            parameter.grad = part.view_as(parameter)
        return shards, small

    @torch.no_grad()
    def fill(self) -> None:
        """Fill the masters with initial values: those of the parameters, or drawn for this shard.
        The parameters give up their values."""
        for flat in self.flats():
            for piece in flat.pieces():
                own: Tensor = flat.weights[piece.name].parameter
                first = 0
                if is_hollow(own):
                    columns = math.prod(own.shape[1:])
                    rows = piece.start // columns, -(-piece.stop // columns)
                    own = self.model.draw(piece.name, self.mesh.device, rows)
                    first = rows[0] * columns
                flat.master[piece.place] = own.flatten()[piece.start - first : piece.stop - first]
            for weight in flat.weights.values():
                weight.parameter.data = make_hollow(
                    weight.parameter.shape, flat.dtype, self.mesh.device
                )
                weight.hollow, weight.copy = True, None

    # ----------------------------------------------------------------------- weights, gradients

    def is_here(self, unit: str) -> bool:
        """Return True if a unit is whole, or on its way."""
        return all(flat.is_whole or flat.work is not None for flat in self.units[unit])

    def gather(self, unit: str) -> None:
        """Begin to gather a unit."""
        for flat in self.units[unit]:
            flat.gather()

    def wait(self, unit: str) -> None:
        """Wait until a unit is whole."""
        for flat in self.units[unit]:
            flat.wait()

    def withdraw(self, unit: str) -> None:
        """Free a unit."""
        for flat in self.units[unit]:
            flat.withdraw(frees=True)

    def receive(self, units: Iterable[str]) -> None:
        """Allocate the whole gradients of units, and of what belongs to no block."""
        for unit in (*units, TIED):
            for flat in self.units[unit]:
                flat.receive()

    def reduce_unit(self, unit: str, last: bool) -> None:
        """Begin to sum the gradient of a unit over the shard group.

        Args:
            last: whether nothing more is added to it in this step.
        """
        for flat in self.units[unit]:
            if flat.gradient is None:
                continue
            trained = {name: weight.parameter for name, weight in flat.weights.items()}
            sum_partial(trained, self.model)
            started = flat.reduce(self.reduce_dtype or flat.dtype)
            if started is not None:
                self.pending.append(Reduction(flat, *started, last))
            elif last:
                self.start_crossing(flat)
            while len(self.pending) > MOST_REDUCTIONS:
                self.finish_reduction()

    def finish_reduction(self) -> None:
        """Wait for the oldest reduction, and add its sum."""
        flat, own, work, last = self.pending.pop(0)
        work.wait()
        assert flat.own_gradient is not None
        flat.own_gradient.add_(own)
        if last:
            self.start_crossing(flat)

    def start_crossing(self, flat: Flat) -> None:
        """Begin to sum this rank's shard of a gradient over the shard groups, once per step."""
        if flat in self.crossing:
            return
        assert flat.own_gradient is not None
        self.crossing[flat] = self.mesh.start_sum_over_groups(flat.own_gradient)

    # ------------------------------------------------------------------------------- the engine

    def expect(self, stages: Iterable[Sequence[Step]], num_microbatches: int) -> None:
        """Announce the backward passes of an optimizer step; see `Uses.expect`."""
        self.uses.expect(stages, num_microbatches)

    def gradient_bytes(self) -> int:
        """Return the bytes of gradients that this process keeps between passes."""
        return self.own_gradients.nbytes + self.small_gradients.nbytes

    def backward(self, outputs: Outputs, gradients: Gradients = None) -> None:
        """Add the gradient of a micro batch's share of the objective."""
        assert not self.reduced, "gradients() ends a step's backward passes"
        self.uses.begin_backward()
        torch.autograd.backward(outputs, gradients)
        self.uses.end_backward()
        if not self.keeps:
            for unit in self.units:
                self.withdraw(unit)

    def reduce(self) -> None:
        """Sum gradients over all ranks that hold the same parameters, once per step."""
        if self.reduced:
            return
        if self.model.tied in self.weights:
            table = self.weights[self.model.tied].parameter
            self.receive([])
            if table.grad is not None:
                table.grad += self.mesh.exchange(table.grad, self.model.tied_peer)
        for unit in self.units:
            self.reduce_unit(unit, last=True)
        sum_partial(self.small, self.model)
        self.mesh.sum_over_dp(self.small_gradients)
        while self.pending:
            self.finish_reduction()
        for flat in self.flats():
            if flat.trained:
                self.start_crossing(flat)
        for work in self.crossing.values():
            if work is not None:
                work.wait()
        self.crossing.clear()
        self.reduced = True

    def gradients(self) -> dict[str, Tensor]:
        """Return copies of raw gradients by global name, summed over replicas. Collective."""
        self.reduce()
        found = {n: p.grad.clone() for n, p in self.small.items() if p.grad is not None}
        for flat in self.flats():
            if flat.trained:
                found |= flat.gather_gradient()
        return {name: found[name] for name in self.model.parameters_by_name if name in found}

    def norm(self) -> float:
        """Return the norm of all gradients, each element counted once."""
        shares = [(self.small[n].grad, self.copies[n]) for n in self.small]
        own = [
            (self.parts[name].grad, self.copies[name])
            for name, (flat, _) in self.pieces.items()
            if flat.trained
        ]
        squares = self.mesh.sum_over_shards(self.add_squares(own)) + self.add_squares(shares)
        return float(self.mesh.sum_over_replica(squares).sqrt())

    def add_squares(self, gradients: Iterable[tuple[Tensor | None, int]]) -> Tensor:
        """Return the sum of squares of gradients, each divided by its number of copies."""
        total = self.own_gradients.new_zeros(())
        for gradient, copies in gradients:
            assert gradient is not None
            total += global_norm(gradient.flatten()).square() / copies
        return total

    def step(self, lr: float) -> tuple[float, bool]:
        """Reduce, clip and update. Returns (global norm before clipping, skipped because not
        finite)."""
        self.reduce()
        norm, clip = self.norm(), self.optimizer.clip_norm
        skipped = not norm < float("inf")
        if not skipped:
            if clip is not None and norm > clip:
                self.own_gradients.mul_(clip / norm)
                self.small_gradients.mul_(clip / norm)
            set_rates(self.optimizers, lr)
            for optimizer in self.optimizers:
                optimizer.step()
            self.updates += 1
            self.renew()
        self.own_gradients.zero_()
        self.small_gradients.zero_()
        self.uses.forget()
        self.reduced = False
        return norm, skipped

    def renew(self) -> None:
        """Discard copies of weights that have changed; those that stay are gathered at once."""
        for flat in self.flats():
            flat.withdraw(frees=self.stage == 3)
        if self.stage < 3:
            for unit in self.units:
                self.gather(unit)

    def shards(self) -> dict[str, TensorShard]:
        """Return checkpoint entries; they alias the live tensors. Nothing is gathered."""
        entries: dict[str, TensorShard] = {}
        flat_of = {name: flat for flat in self.flats() for name in flat.weights}
        for name, parameter in self.model.parameters_by_name.items():
            flat, trained = flat_of.get(name), parameter.requires_grad
            of_moments = moments_of(self.optimizer, name, parameter.ndim) if trained else ()
            if flat is None:
                entries[name] = self.model.shard(name, parameter.detach())
                for moment in (f"{each}.{name}" for each in of_moments):
                    entries[moment] = self.model.shard(name, self.moments[moment])
                continue
            _, piece = self.pieces.get(name, (flat, Piece(name, 0, 0, 0)))
            shape, nothing = flat.shapes[name], flat.master[:0]
            entries[name] = self.cut(piece, shape, flat.master[piece.place])
            for moment in (f"{each}.{name}" for each in of_moments):
                entries[moment] = self.cut(piece, shape, self.moments.get(moment, nothing))
        entries[UPDATES] = whole(self.updates)
        return entries

    def cut(self, piece: Piece, shape: tuple[int, ...], values: Tensor) -> TensorShard:
        """Return values of a piece as rectangles of the whole tensor, without copying."""
        return flat_shard(self.model, self.mesh, piece.name, shape, piece.start, piece.stop, values)

    def load(self, shards: dict[str, TensorShard]) -> None:
        """Load entries of `shards()` that were filled from a checkpoint."""
        self.num_steps.fill_(self.updates.item())
        set_state(self.optimizers, self.parts, self.moments, self.num_steps)
        self.renew()
