"""The model: embed, run steps of the layer map, loss. Shapes: B samples, S positions, D hidden,
V vocabulary, N = B S tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megarecur.config.schema import Config, ExitConfig, Loop
from megarecur.model.block import Block
from megarecur.model.context import Context, build_context
from megarecur.model.halting import HaltingHead, Mixture
from megarecur.model.norm import build_norm
from megarecur.model.positions import sinusoidal
from megarecur.model.task_head import END, START, TaskHead
from megarecur.model.telemetry import Telemetry, named
from megarecur.model.temporal import Carried, Memory, build_chunks
from megarecur.parallel.linear import DeferredProducts, MakeParameter, Weight, product
from megarecur.parallel.loss import EAGER, cross_entropy, distillation
from megarecur.parallel.random import dropout, initial_values, truncated_normal
from megarecur.parallel.regions import ALONE, TensorParallel
from megarecur.parallel.shards import Shard
from megarecur.plan.placement import Placement
from megarecur.recurrence.inventory import (
    Inventory,
    build_inventory,
    count_own_loops,
    feed_forward_owner,
)
from megarecur.recurrence.layer_map import Step

COMPUTE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


class Batch(Protocol):
    """What the model reads of a micro batch."""

    @property
    def tokens_BS(self) -> Tensor:
        """Ids."""

    @property
    def labels_BS(self) -> Tensor:
        """The next token's id, or IGNORED."""

    @property
    def positions_BS(self) -> Tensor:
        """Position in its document."""

    @property
    def documents_BS(self) -> Tensor:
        """Which document of the sample a token belongs to."""

    @property
    def sample_ids_B(self) -> Tensor:
        """Global sample ids."""

    @property
    def single_document(self) -> bool:
        """Whether no document ends inside a sample."""


class LossTerm(NamedTuple):
    """A part of the objective: weight x total / (global count of the named denominator)."""

    total: Tensor
    denominator: str
    weight: float = 1.0
    per_token: Tensor | None = None
    """[B S], what each token adds to the total; has no gradient."""


class Stack(nn.Module):
    """All uses of a group of blocks run inside this one module, so that a gather of its weights
    (ZeRO 3) happens once per forward, however often a block is used."""

    def __init__(
        self,
        config: Config,
        make: MakeParameter,
        dtype: torch.dtype,
        blocks: Iterable[int],
        tp: TensorParallel = ALONE,
    ) -> None:
        super().__init__()
        self.config = config
        loops = count_own_loops(config)
        self.blocks = nn.ModuleDict()
        for b in blocks:
            owner = str(feed_forward_owner(config.model, b))
            shared = self.blocks[owner].feed_forward if owner in self.blocks else None
            block = Block(b, make, config, dtype, loops.get(b, 0), tp, shared)  # type: ignore[arg-type]
            self.blocks[str(b)] = block
        self.halting: HaltingHead | None = None
        if config.halting is not None:
            self.halting = HaltingHead("blocks.0.halting", make, dtype)
        self.compact = True
        """Leave samples behind that have halted; else all are computed and what is too much is
        thrown away."""
        self.memory = None if config.temporal is None else Memory(config, make, dtype, tp)

    def forward(
        self,
        steps: Sequence[Step],
        x: Tensor,
        ctx: Context,
        reads: dict[str, Tensor],
        final_norm: nn.Module | None,
        terms: dict[str, LossTerm] | None = None,
    ) -> Tensor:
        """Run consecutive steps of the map; with a temporal memory the whole map, chunk by chunk,
        and `memory` is then among `reads`, and is returned if a classifier reads that: ZeRO 3
        gathers parameters when the gradient of what is returned comes. Auxiliary losses are put
        into `terms`."""
        if self.memory is None:
            return self.run_steps(steps, x, ctx, reads, final_norm, terms)
        terms = {} if terms is None else terms
        x = self.run_chunks(self.memory, steps, x, ctx, reads, final_norm, terms)
        return reads["memory"] if self.config.reads_memory else x

    def run_chunks(
        self,
        memory: Memory,
        steps: Sequence[Step],
        x: Tensor,
        ctx: Context,
        reads: dict[str, Tensor],
        final_norm: nn.Module | None,
        terms: dict[str, LossTerm],
    ) -> Tensor:
        """The map for every chunk; the memory is read in every step and written after the last."""
        assert ctx.chunks is not None, "a temporal memory needs the context of `build_chunks`"
        carried, chunk_length = ctx.chunks.carried, memory.config.chunk_length
        memory_BMD = memory.initial(len(x))
        if carried is not None and carried.memory_BMD is not None:
            memory_BMD = carried.memory_BMD
        left: dict[str, list[Tensor]] = {step.exit_name: [] for step in steps if step.exit}
        left |= {name: [] for step in steps for name in step.writes}
        outputs = []
        for number, chunk in enumerate(ctx.chunks.chunks):
            if ctx.telemetry is not None:
                ctx.telemetry.visits.clear()  # Those of the chunk before are of other tokens.
            memory_BMD = memory.cut(chunk, memory_BMD)
            own: dict[str, Tensor] = {}
            before = x[:, chunk.start : chunk.stop].contiguous()  # as what steps are given later
            parts: dict[str, LossTerm] = {}
            present = memory.given(chunk, memory_BMD)
            after = self.run_steps(steps, before, present, own, final_norm, parts)
            for name, part in parts.items():
                total = terms[name].total + part.total if name in terms else part.total
                terms[name] = part._replace(total=total)
            if chunk.real_B is not None:
                after = torch.where(chunk.real_B[:, None, None], after, before)
            outputs.append(after)
            for name, states in left.items():
                states.append(own[name])
            if carried is None:
                memory_BMD = memory.write(memory_BMD, after, chunk, number)
                continue
            carried.outputs.append(after.detach())
            length = chunk.stop - chunk.start
            complete = chunk.offset + length == chunk_length
            if complete or carried.cache is None:
                written = torch.cat(carried.outputs, 1)
                memory_BMD = memory.write(memory_BMD, written, chunk, number)
            carried.end_piece(length, complete, memory_BMD)
        if len(outputs) == 1 and carried is None and torch.is_grad_enabled():
            # Batches of a task differ in chunks: what writes the memory has a gradient, if of 0, on
            # every replica, or their reductions would not be of the same parameters.
            outputs[0] = outputs[0] + 0.0 * memory_BMD.sum()
        reads |= {name: torch.cat(states, 1) for name, states in left.items()}
        reads["memory"] = memory_BMD
        return torch.cat(outputs, 1)

    def run_steps(
        self,
        steps: Sequence[Step],
        x: Tensor,
        ctx: Context,
        reads: dict[str, Tensor],
        final_norm: nn.Module | None,
        terms: dict[str, LossTerm] | None = None,
    ) -> Tensor:
        """Run consecutive steps of the map; values that steps write, and the hidden states of
        exits, are put into `reads`, auxiliary losses into `terms`."""
        if self.halting is not None:
            return self.halt(steps, x, ctx, {} if terms is None else terms)
        recompute = self.config.train.recompute and torch.is_grad_enabled()
        for step in steps:
            if step.normalize:
                assert final_norm is not None
                x = final_norm(x)
            for name in step.writes:
                reads[name] = x
            if "prelude" in step.writes:  # The core starts here, from a state of its own.
                x = self.initial_state(x, ctx)
            assert len(step.reads) <= 1, "one value is injected per step"
            injected = reads[step.reads[0]] if step.reads else None
            block = self.blocks[str(step.block)]
            before = x
            grad = torch.set_grad_enabled(step.grad and torch.is_grad_enabled())
            with grad, named(f"block {step.block} loop {step.loop_index}"):
                if recompute and step.grad:
                    # Nothing random is stateful, so no generator state needs keeping.
                    x = checkpoint(
                        block, x, ctx, step, injected, use_reentrant=False, preserve_rng_state=False
                    )
                else:
                    x = block(x, ctx, step, injected)
            observe(ctx, step, before, x)
            if step.exit:
                reads[step.exit_name] = x
        return x

    def halt(
        self, steps: Sequence[Step], x: Tensor, ctx: Context, terms: dict[str, LossTerm]
    ) -> Tensor:
        """Run the steps of a map that halts as far as any token goes. How far that is may differ
        between replicas: but for tensor parallelism nothing is communicated here."""
        halting, block = self.config.halting, self.blocks[str(steps[0].block)]
        assert halting is not None and self.halting is not None
        recompute = self.config.train.recompute and torch.is_grad_enabled()
        whole, watched = x, ctx.telemetry is not None or ctx.states is not None
        mixture = Mixture(halting, self.halting, x, ctx, self.config.model.causal, len(steps))
        present = ctx
        for step in steps:
            # The first runs always: every parameter is used on every rank.
            if not (mixture.begin_step() or step.loop_index == 0):
                break
            if self.compact and (kept := mixture.drop_halted()) is not None:
                present = present.select(kept)
            source, inputs = mixture.source, (mixture.h, present, step, None)
            if source is not None:
                inputs = (mixture.h, replace(present, source_BSD=source), step, None)
            with named(f"block {step.block} loop {step.loop_index}"):
                if recompute:
                    candidate = checkpoint(
                        block, *inputs, use_reentrant=False, preserve_rng_state=False
                    )
                else:
                    candidate = block(*inputs)
                mixture.advance(candidate)
            if watched:
                before, whole = whole, whole.detach().clone()
                whole[mixture.rows_b] = mixture.h.detach()
                observe(ctx, step, before, whole)
        for step in steps[mixture.step :] if watched else ():
            observe(ctx, step, whole, whole)
        x, cost, counts = mixture.finish()
        terms["halting"] = LossTerm(cost, "documents", halting.coefficient)
        ctx.counts.append(counts)
        return x

    def remember(
        self, steps: Sequence[Step], x: Tensor, ctx: Context, reads: dict[str, Tensor]
    ) -> None:
        """Fill ctx.cache for steps that are skipped, as if x were what enters each of them."""
        for step in steps:
            block = self.blocks[str(step.block)]
            assert isinstance(block, Block)
            block.remember(x, ctx, step, reads[step.reads[0]] if step.reads else None)

    def initial_state(self, x: Tensor, ctx: Context) -> Tensor:
        """What the first loop of a core starts from (Geiping et al. 2025, section 3.2)."""
        recurrence = self.config.recurrence
        if not isinstance(recurrence, Loop) or recurrence.initial_state == "prelude":
            return x
        if recurrence.initial_state == "zero":
            return torch.zeros_like(x)
        where = ctx.where("initial state")
        samples, places = ctx.rows()
        if ctx.first is None:  # A cached text goes on where it was; positions of a chunk restart.
            places = ctx.tp.own(ctx.positions_BS)
        noise = truncated_normal(where, (samples, places), x.shape[-1])
        return (noise * recurrence.initial_state_std).to(x.dtype)


class Embedding(nn.Module):
    """Looks tokens and learned positions up.

    It holds the parameters themselves, and is called: where they are sharded (ZeRO 3) they are
    gathered for a module's call, and only those that are directly its own.
    """

    def __init__(
        self,
        weight: Weight,
        positions: nn.Parameter | None,
        scale: float,
        tp: TensorParallel = ALONE,
        first: int = 0,
        ends: Sequence[nn.Parameter] = (),
    ) -> None:
        super().__init__()
        self.table, self.positions, self.scale = weight.parameter, positions, scale
        self.tp, self.first = tp, first
        self.start: nn.Parameter | None = ends[0] if ends else None
        self.end: nn.Parameter | None = ends[1] if ends else None
        """START and END of a task's sequences."""

    def forward(self, tokens_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """[B, S] ids to [B, S, D], or this rank's positions of it, in the parameters' dtype."""
        x = self.look_up(tokens_BS if self.start is None else tokens_BS.clamp(min=0))
        if self.scale != 1.0:
            x = x * self.scale
        if self.start is not None and self.end is not None:
            own = self.tp.own(tokens_BS).unsqueeze(-1)
            x = torch.where(own == START, self.start, torch.where(own == END, self.end, x))
        if self.positions is not None:
            x = x + F.embedding(self.tp.own(positions_BS), self.positions)
        return x

    def look_up(self, tokens_BS: Tensor) -> Tensor:
        """Rows of the table; of a table cut by ids, each comes from the rank that has it."""
        if self.tp.size == 1:
            return F.embedding(tokens_BS, self.table)
        rows_BS = tokens_BS - self.first
        own_BS = (rows_BS >= 0) & (rows_BS < len(self.table))
        x = F.embedding(torch.where(own_BS, rows_BS, 0), self.table)
        return self.tp.leave(torch.where(own_BS[..., None], x, 0.0))


class Head(nn.Module):
    """Logits; the parameter is its own too, for the reason that `Embedding` gives."""

    def __init__(self, weight: Weight, tp: TensorParallel = ALONE) -> None:
        super().__init__()
        self.table, self.weight, self.tp = weight.parameter, weight, tp

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] to [B, S, V], or to this rank's shard of the vocabulary."""
        return product(self.tp.enter(x), self.weight)


class Transformer(nn.Module):
    """A model, or the part of one that a subset of blocks makes.

    Args:
        config: with model.vocab_size resolved.
        device: where parameters live.
        placement: which pipeline rank has which blocks; None: all is here.
        pp_rank: this one.
        tp: the ranks that share its matrices, and this one's place among them.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device | str = "cpu",
        *,
        placement: Placement | None = None,
        pp_rank: int = 0,
        tp: TensorParallel = ALONE,
    ) -> None:
        super().__init__()
        self.config, self.tp = config, tp
        self.inventory: Inventory = build_inventory(config)
        self.dtype = COMPUTE_DTYPE[config.train.precision]
        self.parameters_by_name: dict[str, nn.Parameter] = {}
        model = config.model
        self.master_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32

        def make(name: str) -> nn.Parameter:
            spec = self.inventory[name]
            own = initial_values(spec, config.seed, self.master_dtype)[spec.place(tp.rank, tp.size)]
            parameter = nn.Parameter(own.to(device, copy=tp.size > 1).contiguous())
            self.parameters_by_name[name] = parameter
            return parameter

        blocks = sorted({s.block for s in self.inventory.values() if s.block is not None})
        if placement is None:
            placement = Placement(1, (0,) * len(blocks), 0, 0)
        has_embedding, has_head = placement.embedding == pp_rank, placement.head == pp_rank
        tied = config.ties_embeddings and has_head
        self.tied = ""
        """The table of embedding and head, where they lie on two pipeline ranks."""
        self.tied_peer = placement.embedding if has_head else placement.head
        """Which other rank has it too."""
        if config.ties_embeddings and placement.embedding != placement.head:
            self.tied = "embedding.weight" if has_embedding or has_head else ""
        self.embedding = (
            Weight(make("embedding.weight"), self.dtype) if has_embedding or tied else None
        )
        learned = has_embedding and model.positions == "learned"
        positions = make("embedding.positions") if learned else None
        self.stack = Stack(config, make, self.dtype, placement.blocks(pp_rank), tp)
        self.final_norm: nn.Module | None = None
        self.head: Weight | None = None
        self.memory_norm: nn.Module | None = None
        """Of what a classifier reads of the temporal memory."""
        if config.temporal is not None and config.temporal.pooling is not None:
            self.memory_norm = build_norm(model.norm, "temporal.norm", make, model.norm_eps)
        if has_head and config.has_final_norm:
            eps = model.final_norm_eps or model.norm_eps
            self.final_norm = build_norm(model.norm, "final_norm", make, eps)
        if has_head and not config.classifies:
            self.head = self.embedding if tied else Weight(make("head.weight"), self.dtype)
        self.look_up: Embedding | None = None
        if self.embedding is not None and has_embedding:
            scale = model.hidden_size**0.5 if model.scale_embeddings else 1.0
            names = ("task.start", "task.end") if "task.start" in self.inventory else ()
            ends = [make(name) for name in names]
            first = self.first_id(tp.rank)
            self.look_up = Embedding(self.embedding, positions, scale, tp, first, ends)
        self.project = None if self.head is None else Head(self.head, tp)
        self.task_head: TaskHead | None = None
        if has_head and config.classifies and config.task is not None:
            own = self.inventory["task.output.weight"].place(tp.rank, tp.size)[1]
            self.task_head = TaskHead(config.task, make, self.dtype, tp, own)
        self.deferred = DeferredProducts()
        for weight in self.weights():
            weight.deferred = self.deferred
        self.loss_kernels = EAGER
        """In training (`model.compile`)."""
        self.always_mask = False
        """Give micro batches of single documents a mask too, so that one graph serves all."""

    def first_id(self, rank: int) -> int:
        """Where a tensor-parallel rank's shard of the vocabulary begins; at size, its end."""
        return self.inventory["embedding.weight"].shape[0] * rank // self.tp.size

    def shard(self, name: str, tensor: Tensor) -> Shard:
        """What this rank has of a parameter, or of a moment of it, as its part of the whole."""
        spec = self.inventory[name]
        return Shard(spec.shape, [(*spec.part(self.tp.rank, self.tp.size), tensor)])

    def hidden_shape(self, tokens_BS: Tensor) -> tuple[int, int, int]:
        """Of the hidden state on this rank: [B, S, D], or its positions of it."""
        batch, length = tokens_BS.shape
        return batch, self.tp.span(length)[1], self.config.model.hidden_size

    def weights(self) -> list[Weight]:
        """Every unique matrix with a compute copy."""
        return [module for module in self.modules() if isinstance(module, Weight)]

    def refresh(self) -> None:
        """Make all compute copies anew: after every step and load."""
        for weight in self.weights():
            weight.refresh()

    def context(
        self,
        batch: Batch,
        step: int,
        training: bool,
        telemetry: Telemetry | None = None,
        states: list[Tensor] | None = None,
    ) -> Context:
        """The context of a micro batch; training switches dropout on."""
        masked = not batch.single_document or (training and self.always_mask)
        options: dict[str, Any] = {
            "documents_BS": batch.documents_BS if masked else None,
            "sample_ids_B": batch.sample_ids_B,
            "seed": self.config.seed,
            "step": step,
            "training": training,
            "telemetry": telemetry,
            "states": states,
            "tp": self.tp,
        }
        if self.config.temporal is not None:
            return build_chunks(self.config, batch.positions_BS, self.dtype, **options)
        return build_context(self.config.model, batch.positions_BS, self.dtype, **options)

    @torch.no_grad()
    def read_piece(self, steps: Sequence[Step], tokens_BS: Tensor, carried: Carried) -> Tensor:
        """Hidden states [B, S, D] of the tokens that follow those which `carried` has, which is
        then that of these too; a text read piece by piece is as if read in one call.

        Raises:
            ConfigError: the pieces before were no whole chunks, and no cache was carried.
        """
        batch, length = tokens_BS.shape
        positions_BS = torch.arange(
            carried.length, carried.length + length, device=tokens_BS.device
        ).expand(batch, -1)
        ctx = build_chunks(
            self.config,
            positions_BS,
            self.dtype,
            carried=carried,
            tp=self.tp,
            seed=self.config.seed,
        )
        return self.run(steps, self.embed(tokens_BS, ctx), ctx, {})[0]

    def pool_memory(self, memory_BMD: Tensor) -> Tensor:
        """[B, D] for a classifier, of the memory after the last chunk: `temporal.pooling`."""
        assert self.memory_norm is not None, "temporal.pooling is left out"
        assert self.config.temporal is not None
        normed_BMD: Tensor = self.memory_norm(memory_BMD)
        mean = self.config.temporal.pooling == "mean"
        return normed_BMD.mean(1) if mean else normed_BMD[:, -1]

    def embed(self, tokens_BS: Tensor, ctx: Context) -> Tensor:
        """[B, S] ids to [B, S, D] in the compute dtype."""
        assert self.look_up is not None
        model = self.config.model
        x = self.look_up(tokens_BS, ctx.positions_BS)
        if model.positions == "sinusoidal":
            x = x + sinusoidal(ctx.positions_BS, model.hidden_size, x.dtype)
        x = x.to(self.dtype)
        if ctx.training and model.dropout > 0.0:
            x = dropout(x, model.dropout, ctx.where("embedding"), ctx.rows())
        return x

    def run(
        self, steps: Sequence[Step], x: Tensor, ctx: Context, reads: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, LossTerm]]:
        """Run consecutive steps of the map. Returns x, or [B, D] of the temporal memory where a
        classifier reads that, and auxiliary losses by name."""
        terms: dict[str, LossTerm] = {}
        x = self.stack(steps, x, ctx, reads, self.final_norm, terms)
        return (self.pool_memory(x) if self.config.reads_memory else x), terms

    def logits(self, x: Tensor) -> Tensor:
        """[B, S, D] to [B, S, V], or to this rank's shard of the vocabulary."""
        assert self.project is not None
        logits = self.project(self.final_norm(x) if self.final_norm is not None else x)
        cap = self.config.model.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def all_logits(self, x: Tensor) -> Tensor:
        """[B, S, D] to [B, S, V] on every rank; outside of the graph."""
        ids = [self.first_id(rank) for rank in range(self.tp.size + 1)]
        return self.tp.gather_last(self.logits(x), [b - a for a, b in pairwise(ids)])

    def class_logits(self, x: Tensor, batch: Batch) -> Tensor:
        """[B, S, D], or [B, D] of pooled memories, to [M, C], the classes of what the batch's M
        labels are of, on every rank."""
        assert self.task_head is not None
        if self.config.reads_memory:
            return self.task_head(x, None)
        real_BS = None if batch.single_document else batch.documents_BS >= 0
        return self.task_head(self.final_norm(x) if self.final_norm is not None else x, real_BS)

    def loss(
        self,
        x: Tensor,
        batch: Batch,
        exits: Mapping[str, Tensor] | None = None,
        teacher_NV: Tensor | None = None,
    ) -> dict[str, LossTerm]:
        """Sums over the counted tokens of a micro batch, each with its denominator.

        Args:
            x: [B, S, D], what leaves the map.
            batch: its labels.
            exits: hidden states after earlier loops, by name, in order; their terms are
                `exit_1/loss` and so on.
            teacher_NV: the logits of a teacher, cut as this model's own.
        """
        if self.task_head is not None:
            logits_MC = self.class_logits(x, batch)
            total, square, losses_M = cross_entropy(logits_MC, batch.labels_BS.flatten())
            terms = {"loss": LossTerm(total, "tokens", 1.0, losses_M)}
            if self.config.model.z_loss > 0.0:
                terms["z_loss"] = LossTerm(square, "tokens", self.config.model.z_loss)
            return terms
        weights = weigh_exits(self.config.exits, len(exits or ()))
        logits_NV = self.logits(x).flatten(0, 1)
        labels_N, first = batch.labels_BS.flatten(), self.first_id(self.tp.rank)
        if teacher_NV is None:
            kernels = self.loss_kernels if torch.is_grad_enabled() else EAGER
            total, square, losses_N = cross_entropy(logits_NV, labels_N, kernels, self.tp, first)
            terms = {"loss": LossTerm(total, "tokens", weights[-1], losses_N)}
        else:
            distill = self.config.distill
            assert distill is not None
            total, square, divergence, losses_N = distillation(
                logits_NV, labels_N, teacher_NV, distill.temperature, self.tp, first
            )
            own = weights[-1] * (1.0 - distill.weight)
            terms = {"loss": LossTerm(total, "tokens", own, losses_N)}
            terms["distill"] = LossTerm(divergence, "tokens", weights[-1] * distill.weight)
        if self.config.model.z_loss > 0.0:
            terms["z_loss"] = LossTerm(square, "tokens", weights[-1] * self.config.model.z_loss)
        for (name, state), weight in zip((exits or {}).items(), weights, strict=False):
            terms |= self.exit_loss(name, state, batch, weight, logits_NV.detach())
        return terms

    def exit_loss(
        self, name: str, x: Tensor, batch: Batch, weight: float, final_NV: Tensor
    ) -> dict[str, LossTerm]:
        """The terms of an early exit.

        Its logits are let go of and made again in backward, so that those of several exits are
        never there at once. An exit of weight 0 is measured without gradient.

        Args:
            name: of the exit.
            x: [B, S, D], the hidden state after its loop.
            batch: its labels.
            weight: of all its terms together.
            final_NV: the last loop's logits, outside of the graph.
        """
        config = self.config.exits
        assert config is not None
        labels_N, first = batch.labels_BS.flatten(), self.first_id(self.tp.rank)
        kernels = self.loss_kernels if torch.is_grad_enabled() else EAGER
        version = final_NV._version

        def head(x: Tensor) -> tuple[Tensor, ...]:
            logits_NV = self.logits(x).flatten(0, 1)
            if not config.distill:
                return cross_entropy(logits_NV, labels_N, kernels, self.tp, first)[:2]
            assert final_NV._version == version, "the last loop's logits have been consumed"
            return distillation(logits_NV, labels_N, final_NV, 1.0, self.tp, first)[:3]

        if weight > 0.0 and torch.is_grad_enabled():
            sums = checkpoint(head, x, use_reentrant=False, preserve_rng_state=False)
        else:
            with torch.no_grad():
                sums = head(x)
        share = config.distill_weight if config.distill else 0.0
        terms = {f"{name}/loss": LossTerm(sums[0], "tokens", weight * (1.0 - share))}
        if config.distill:
            terms[f"{name}/distill"] = LossTerm(sums[2], "tokens", weight * share)
        if self.config.model.z_loss > 0.0:
            z_weight = weight * self.config.model.z_loss
            terms[f"{name}/z_loss"] = LossTerm(sums[1], "tokens", z_weight)
        return terms


def observe(ctx: Context, step: Step, before: Tensor, after: Tensor) -> None:
    """Tell those who watch the residual stream of a step; before and after: [B, S, D]."""
    if ctx.telemetry is not None:
        ctx.telemetry.record(step, before, after)
    if ctx.states is not None:
        ctx.states.append(after)


def weigh_exits(config: ExitConfig | None, num_exits: int) -> list[float]:
    """What each exit's loss and, last, that of the last loop counts for in the objective."""
    if config is None:
        return [1.0]
    if config.mode == "weighted":
        total = (num_exits + 1) * (num_exits + 2) / 2
        return [(i + 1) / total for i in range(num_exits + 1)]
    if isinstance(config.coefficient, tuple):
        return list(config.coefficient[-1 - num_exits :])
    return [config.coefficient] * num_exits + [1.0]
