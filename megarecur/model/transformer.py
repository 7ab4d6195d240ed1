"""The model, which embeds tokens or pictures, runs steps of the layer map, and computes the loss.

Shapes: B samples, S positions, D hidden, V vocabulary, N = B S tokens, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megarecur.attention.plan import choose_backend
from megarecur.batch import Batch, Sentences
from megarecur.config.run import Config
from megarecur.model.block import Block
from megarecur.model.context import (
    Context,
    CrossView,
    DropoutKeys,
    build_context,
    see_source,
)
from megarecur.model.embedding import Embedding, Head
from megarecur.model.norm import build_norm
from megarecur.model.patches import Patches
from megarecur.model.positions import sinusoidal
from megarecur.model.runner import ChunkedRunner, Runner, build_runner, initial_site
from megarecur.model.saved import CudaCopies, HostCopies, saving
from megarecur.model.task_head import TaskHead
from megarecur.model.telemetry import Telemetry
from megarecur.model.temporal import Carried, build_chunks
from megarecur.objective.readout import Readout
from megarecur.objective.task import build_objective
from megarecur.parallel.context import WHOLE, ContextParallel
from megarecur.parallel.head_loss import Target
from megarecur.parallel.linear import DeferredProducts, Weight, make_hollow
from megarecur.parallel.loss import LossTerm
from megarecur.parallel.random import draw_keys, dropout, initial_values
from megarecur.parallel.regions import ALONE, TensorParallel
from megarecur.parallel.residence import Residence
from megarecur.parallel.shards import TensorShard
from megarecur.plan.cost import has_copy
from megarecur.plan.placement import Placement
from megarecur.recurrence.inventory import (
    ENCODER_NORM,
    Inventory,
    build_inventory,
    embedding_names,
)
from megarecur.recurrence.layer_map import ENCODER, TARGET, Step
from megarecur.recurrence.stacks import list_stacks

COMPUTE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


class Transformer(nn.Module):
    """A model, or the part of a model on one pipeline rank.

    Args:
        config: the run, with model.vocab_size resolved, unless it reads pictures.
        placement: the blocks of each pipeline rank; None: this rank has the whole model.
        pp_rank: this pipeline rank.
        tp: the ranks that share matrices, and this rank's place among them.
        cp: the ranks that share each sequence. Batches hold whole sequences on all of them, hidden
            states the positions of this rank.
        hollow: give matrices no values, because an engine will draw its shards of them
            (`optim.sharded`).
    """

    def __init__(
        self,
        config: Config,
        device: torch.device | str = "cpu",
        *,
        placement: Placement | None = None,
        pp_rank: int = 0,
        tp: TensorParallel = ALONE,
        cp: ContextParallel = WHOLE,
        hollow: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.tp, self.cp = config, tp, cp
        self.inventory: Inventory = build_inventory(config)
        self.dtype = COMPUTE_DTYPE[config.train.precision]
        self.parameters_by_name: dict[str, nn.Parameter] = {}
        model = config.model
        self.master_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32

        def make(name: str) -> nn.Parameter:
            spec = self.inventory[name]
            if hollow and has_copy(spec):
                own = make_hollow(spec.part(tp.rank, tp.size)[1], self.master_dtype, device)
            else:
                own = self.draw(name, device)
            parameter = nn.Parameter(own)
            self.parameters_by_name[name] = parameter
            return parameter

        blocks = sorted({s.block for s in self.inventory.values() if s.block is not None})
        if placement is None:
            placement = Placement(1, (0,) * len(blocks), 0, 0)
        has_embedding, has_head = placement.embedding == pp_rank, placement.head == pp_rank
        tied = config.ties_embeddings and has_head
        self.tied = ""
        """Name of the tied table if embedding and head are on two pipeline ranks, else empty."""
        self.tied_peer = placement.embedding if has_head else placement.head
        """The other pipeline rank that has the tied table."""
        if config.ties_embeddings and placement.embedding != placement.head:
            self.tied = "embedding.weight" if has_embedding or has_head else ""
        self.embedding: Weight | None = None
        """The table of tokens, if this rank has it."""
        if (has_embedding or tied) and not config.reads_images:
            self.embedding = Weight(make("embedding.weight"), self.dtype)
        self.stacks = list_stacks(config)
        own_blocks = set(placement.blocks(pp_rank))
        runners = [
            build_runner(stack, make, self.dtype, sorted(own_blocks & set(stack.blocks)), tp)
            for stack in self.stacks
        ]
        self.runner = runners[-1]
        """Runs the steps of the decoder, or of the only stack."""
        self.encoder = runners[0] if len(runners) > 1 else None
        self.encoder_norm: nn.Module | None = None
        """Norm of the encoder's output, on the rank of the decoder's first block."""
        if f"{ENCODER_NORM}.weight" in self.inventory and self.stacks[-1].first in own_blocks:
            eps = model.final_norm_eps or model.norm_eps
            self.encoder_norm = build_norm(model.norm, ENCODER_NORM, make, eps)
        self.final_norm: nn.Module | None = None
        self.head: Weight | None = None
        self.memory_norm: nn.Module | None = None
        """Norm of the temporal memory that a classifier reads, if any."""
        if config.temporal is not None and config.temporal.pooling is not None:
            self.memory_norm = build_norm(model.norm, "temporal.norm", make, model.norm_eps)
        if has_head and config.has_final_norm:
            eps = model.final_norm_eps or model.norm_eps
            self.final_norm = build_norm(model.norm, "final_norm", make, eps)
        if has_head and not config.classifies:
            self.head = self.embedding if tied else Weight(make("head.weight"), self.dtype)
        self.look_up: Embedding | None = None
        self.look_up_source: Embedding | None = None
        """Embeds source sentences, with the table of targets or with its own."""
        if self.embedding is not None and has_embedding:
            scale = model.hidden_size**0.5 if model.scale_embeddings else 1.0
            names = ("task.start", "task.end") if "task.start" in self.inventory else ()
            ends = [make(name) for name in names]
            learned = model.positions == "learned"
            for name in embedding_names(config):
                table, first = self.embedding, self.first_id(tp.rank)
                if name != "embedding" and config.separate_source:
                    table = Weight(make(f"{name}.weight"), self.dtype)
                    first = self.first_id(tp.rank, f"{name}.weight")
                positions = make(f"{name}.positions") if learned else None
                embedding = Embedding(table, positions, scale, tp, first, ends)
                if name == "embedding":
                    self.look_up = embedding
                else:
                    self.look_up_source = embedding
        self.patches: Patches | None = None
        """Embeds pictures, on the rank of the embedding."""
        if has_embedding and config.reads_images:
            self.patches = Patches(config, make, self.dtype, tp)
        self.project: Head | None = None
        if self.head is not None:
            bias = make("head.bias") if model.head_bias else None
            self.project = Head(self.head, tp, bias)
        self.task_head: TaskHead | None = None
        if has_head and config.classifies and config.task is not None:
            own = self.inventory["task.output.weight"].place(tp.rank, tp.size)[1]
            has_hidden = "task.hidden.weight" in self.inventory
            self.task_head = TaskHead(config.task, make, self.dtype, tp, own, has_hidden)
        self.residence = Residence()
        """Makes weights present while they are used; see `attach`."""
        self.deferred = DeferredProducts()
        for weight in self.weights():
            weight.deferred = self.deferred
        has_table = "embedding.weight" in self.inventory
        bounds = [self.first_id(rank) if has_table else 0 for rank in range(tp.size + 1)]
        self.readout = Readout(
            config, tp, cp, bounds, self.final_norm, self.project, self.task_head
        )
        self.objective = build_objective(config, self.readout)
        """The objective, which computes loss terms and scores."""
        offloads = config.train.offload_activations and torch.device(device).type == "cuda"
        self.host_copies: HostCopies | None = CudaCopies() if offloads else None
        """Moves what the steps of the map keep for backward to the host; None: it stays."""
        self.attention = choose_backend(config, torch.device(device).type)
        """The attention backend, and why it was chosen."""
        self.always_separates = False
        """If True, micro batches of single documents are treated in training as those of several,
        so that one graph serves all."""

    def draw(
        self, name: str, device: torch.device | str, rows: tuple[int, int] | None = None
    ) -> Tensor:
        """Return the initial value of this rank's part of a parameter.

        Args:
            rows: first row of the part to draw, and the end; None: all.
        """
        spec = self.inventory[name]
        place = spec.place(self.tp.rank, self.tp.size)
        if rows is not None:
            first, *rest = place
            place = (slice(first.start + rows[0], first.start + rows[1]), *rest)
        return initial_values(spec, self.config.seed, self.master_dtype, place, device)

    def first_id(self, rank: int, table: str = "embedding.weight") -> int:
        """Return the first id of a tensor-parallel rank's shard of a vocabulary; for rank = size,
        the end of the vocabulary."""
        return self.inventory[table].shape[0] * rank // self.tp.size

    def shard(self, name: str, tensor: Tensor) -> TensorShard:
        """Return this rank's shard of a parameter, or of an optimizer moment of it, with its place
        in the whole."""
        spec = self.inventory[name]
        return TensorShard(spec.shape, [(*spec.part(self.tp.rank, self.tp.size), tensor)])

    def runners(self) -> Iterator[Runner | ChunkedRunner]:
        """Yield the runners of this model's stacks, in the order in which they run."""
        yield from (runner for runner in (self.encoder, self.runner) if runner is not None)

    def blocks(self) -> dict[int, Block]:
        """Return the blocks of this rank by number."""
        found = {}
        for runner in self.runners():
            for number, block in runner.blocks.items():
                assert isinstance(block, Block)
                found[int(number)] = block
        return found

    @property
    def entry(self) -> nn.Module | None:
        """The module that a pass over the model calls first, if this rank has it."""
        return self.look_up_source or self.look_up or self.patches

    def hidden_shape(
        self, tokens_BS: Tensor, cp: ContextParallel | None = None
    ) -> tuple[int, int, int]:
        """Return the shape of the hidden state: [B, S, D], or this rank's positions of it.

        Args:
            cp: the ranks that share each sequence; None: those of the model.
        """
        batch, length = tokens_BS.shape
        length = (cp or self.cp).span(length)[1]
        return batch, self.tp.span(length)[1], self.config.model.hidden_size

    def weights(self) -> list[Weight]:
        """Return every unique matrix with a compute copy."""
        return [module for module in self.modules() if isinstance(module, Weight)]

    def attach(self, residence: Residence) -> None:
        """Let an engine's residence make weights present while they are used."""
        self.residence = residence
        for runner in self.runners():
            (runner.runner if isinstance(runner, ChunkedRunner) else runner).residence = residence

    def refresh(self) -> None:
        """Renew all compute copies. Call it after every optimizer step and load."""
        for weight in self.weights():
            weight.refresh()

    def context(
        self,
        batch: Batch,
        step: int,
        training: bool,
        telemetry: Telemetry | None = None,
        states: list[Tensor] | None = None,
        drawn: Mapping[int, Tensor] | None = None,
    ) -> Context:
        """Return the context of a micro batch.

        Args:
            drawn: words of random keys on the device (`draw_keys`), if they were drawn before.
            telemetry: measures the steps of the map, if given.
            states: list to which the output of every step is appended, if given.
        """
        always = training and self.always_separates
        options: dict[str, Any] = {
            "sample_ids_B": batch.sample_ids_B,
            "step": step,
            "training": training,
            "drawn": drawn,
            "telemetry": telemetry,
            "states": states,
        }
        given = self._surroundings(batch, always) | options
        if self.config.temporal is not None:
            return build_chunks(self.config, batch.positions_BS, self.dtype, **given)
        ctx = build_context(self.config.model, batch.positions_BS, self.dtype, cp=self.cp, **given)
        if batch.source is None:
            return ctx
        # Each stack counts its own tokens, so the recorders differ.
        own = self._source_context(batch.source, always, **options)
        shape = tuple(batch.tokens_BS.shape)
        seen = see_source(batch.source, shape, self.attention.backend, self.dtype, always)
        return replace(ctx, source=own, cross=CrossView(seen))

    def _source_context(
        self, source: Sentences, separates: bool = False, **options: Any
    ) -> Context:
        """Return the context of source sentences; options: of `build_context`."""
        model = self.stacks[0].config.model
        given = self._surroundings(source, separates) | options
        return build_context(model, source.positions_BS, self.dtype, **given)

    def _surroundings(self, read: Sentences, separates: bool) -> dict[str, Any]:
        """Return the arguments of `build_context` that are the same for every reader.

        Args:
            separates: treat samples of single documents as those of several.
        """
        separates = separates or not read.single_document
        return {
            "documents_BS": read.documents_BS if separates else None,
            "boundaries": read.boundaries if separates else None,
            "backend": self.attention.backend,
            "seed": self.config.seed,
            "tp": self.tp,
        }

    def draw_keys(
        self, steps: Iterable[Step], optimizer_step: int, device: torch.device
    ) -> dict[int, Tensor]:
        """Return the random keys of training on some steps of the map, in one table on the
        device."""
        keys = DropoutKeys(self.config.seed, optimizer_step, True)
        blocks = self.blocks()
        places: list[tuple[str, Step | None]] = [(n, None) for n in embedding_names(self.config)]
        places += [(initial_site(stack), None) for stack in self.stacks]
        if isinstance(self.runner, ChunkedRunner):
            places += [(site, None) for site in self.runner.memory.sites()]
        for step in steps:
            rates = blocks[step.block].rates
            places += [(site, step) for site, rate in rates.items() if rate > 0.0]
        return draw_keys((keys.key(*place) for place in places), device)

    @torch.no_grad()
    def read_piece(self, steps: Sequence[Step], tokens_BS: Tensor, carried: Carried) -> Tensor:
        """Return hidden states [B, S, D] of the next piece of a text, and update `carried`.

        Reading a text piece by piece gives the result of reading it in one call.

        Args:
            tokens_BS: the tokens that follow those already read.
            carried: the state of the tokens already read.

        Raises:
            ConfigError: see `temporal.build_chunks`.
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
            backend=self.attention.backend,
            tp=self.tp,
            seed=self.config.seed,
        )
        return self.run(steps, self.embed(tokens_BS, ctx), ctx, {})[0]

    def pool_memory(self, memory_BMD: Tensor) -> Tensor:
        """Pool the last memory for a classifier by `temporal.pooling`: [B, M, D] to [B, D]."""
        assert self.memory_norm is not None, "temporal.pooling is left out"
        assert self.config.temporal is not None
        normed_BMD: Tensor = self.memory_norm(memory_BMD)
        mean = self.config.temporal.pooling == "mean"
        return normed_BMD.mean(1) if mean else normed_BMD[:, -1]

    def enter(
        self,
        tokens_BS: Tensor,
        ctx: Context,
        reads: dict[str, Tensor],
        source: Sentences | None = None,
        pixels_BCHW: Tensor | None = None,
    ) -> Tensor:
        """Return the input of the map's first step, [B, S, D]: embedded tokens or pictures; of an
        encoder-decoder, embedded source sentences, with the embedded target added to `reads`."""
        if pixels_BCHW is not None:
            return self.embed_pictures(pixels_BCHW, ctx)
        if source is None or ctx.source is None:
            return self.embed(tokens_BS, ctx)
        x = self.embed_source(source.tokens_BS, ctx.source)
        reads[TARGET] = self.embed(tokens_BS, ctx)
        return x

    def embed(self, tokens_BS: Tensor, ctx: Context) -> Tensor:
        """Embed ids: [B, S] to [B, S, D], or this rank's positions of it, in the compute dtype."""
        assert self.look_up is not None
        return self._embed(self.look_up, tokens_BS, ctx, "embedding")

    def embed_source(self, tokens_BS: Tensor, ctx: Context) -> Tensor:
        """Embed the ids of source sentences, as `embed` does; ctx is their own context."""
        assert self.look_up_source is not None
        return self._embed(self.look_up_source, tokens_BS, ctx, "source_embedding")

    def embed_pictures(self, pixels_BCHW: Tensor, ctx: Context) -> Tensor:
        """Embed pictures: [B, C, H, W] to [B, S, D], or this rank's positions of it, in the compute
        dtype."""
        assert self.patches is not None
        self.residence.enter_ends()
        return self._drop(self.patches(pixels_BCHW), ctx, "embedding")

    def _embed(self, look_up: Embedding, tokens_BS: Tensor, ctx: Context, site: str) -> Tensor:
        model = self.config.model
        self.residence.enter_ends()
        own, index_BS = ctx.positions.cp.own, ctx.positions.index_BS
        x: Tensor = look_up(own(tokens_BS), own(index_BS))
        if model.positions == "sinusoidal":
            index_BS = ctx.positions.own(index_BS)
            x = x + sinusoidal(index_BS, model.hidden_size, x.dtype, model.sinusoid_layout)
        return self._drop(x.to(self.dtype), ctx, site)

    def _drop(self, x: Tensor, ctx: Context, site: str) -> Tensor:
        rate = self.config.model.dropout
        if not ctx.dropout.training or rate == 0.0:
            return x
        return dropout(x, rate, ctx.dropout.words(site, x.device), ctx.positions.rows())

    def run(
        self, steps: Sequence[Step], x: Tensor, ctx: Context, reads: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, LossTerm]]:
        """Run consecutive steps of the map; arguments as in `Runner.forward`.

        Returns:
            x [B, S, D], or the pooled temporal memory [B, D] if a classifier reads it; and
            auxiliary losses by name.
        """
        terms: dict[str, LossTerm] = {}
        self.residence.begin([step.block for step in steps])
        self.residence.enter_ends()
        below = [step for step in steps if step.stack == "encoder"]
        above = steps[len(below) :]
        with saving(self.config.train.recompute == "selective", self.host_copies):
            if below:
                assert self.encoder is not None and ctx.source is not None
                found: dict[str, LossTerm] = {}
                x = self.encoder(below, x, ctx.source, reads, None, found)
                terms |= {f"encoder_{name}": term for name, term in found.items()}
            if above and TARGET in above[0].reads:
                x = self.begin_decoder(x, reads)
            if above or not below:
                x = self.runner(above, x, ctx, reads, self.final_norm, terms)
        self.residence.end()
        return (self.pool_memory(x) if self.config.reads_memory else x), terms

    @torch.no_grad()
    def encode(
        self, steps: Sequence[Step], source: Sentences, samples_B: Tensor | None = None
    ) -> Tensor:
        """Return the output of the encoder [B, K, D], or this rank's positions of it.

        Args:
            steps: the map of an optimizer step or evaluation; those of the encoder run.
            source: the source sentences.
            samples_B: numbers of the sentences, on which a random initial state depends; None: 0,
                1, ...
        """
        assert self.encoder is not None
        ctx = self._source_context(source, sample_ids_B=samples_B)
        x = self.embed_source(source.tokens_BS, ctx)
        below = [step for step in steps if step.stack == "encoder"]
        self.residence.begin([step.block for step in below])
        encoded: Tensor = self.encoder(below, x, ctx, {}, None, {})
        self.residence.end()
        return encoded if self.encoder_norm is None else self.encoder_norm(encoded)

    @torch.no_grad()
    def decode(
        self, steps: Sequence[Step], tokens_BS: Tensor, encoded: Tensor, ctx: Context
    ) -> Tensor:
        """Return the output of the decoder [B, S, D], or this rank's positions of it.

        Args:
            steps: as for `encode`; those of the decoder run.
            tokens_BS: target tokens, those that follow the cached ones.
            encoded: [B, K, D], from `encode`.
            ctx: the context of the tokens (`inference.cache.context_after`).
        """
        reads = {ENCODER: encoded, TARGET: self.embed(tokens_BS, ctx)}
        above = [step for step in steps if step.stack == "decoder"]
        return self.run(above, reads[TARGET], ctx, reads)[0]

    def begin_decoder(self, x: Tensor, reads: dict[str, Tensor]) -> Tensor:
        """Return the input of the decoder, the embedded target [B, S, D], and add the output of the
        encoder, [B, K, D], to `reads`, unless it is there already."""
        if ENCODER not in reads:
            reads[ENCODER] = x if self.encoder_norm is None else self.encoder_norm(x)
        return reads[TARGET]

    def logits(self, x: Tensor) -> Tensor:
        """Return logits of tokens: [B, S, D] to [B, S, V], or this rank's shard of V."""
        self.residence.enter_ends()
        return self.readout.logits(x)

    def all_logits(self, x: Tensor) -> Tensor:
        """Return logits of all of V on every rank, [B, S, D] to [B, S, V]; outside of the graph."""
        self.residence.enter_ends()
        return self.readout.all_logits(x)

    def loss(
        self,
        x: Tensor,
        batch: Batch,
        exits: Mapping[str, Tensor] | None = None,
        target: Target | None = None,
    ) -> dict[str, LossTerm]:
        """Return the loss terms of a micro batch; see `NextToken.terms` and `Task.terms`.

        Args:
            x: output of the map [B, S, D], or pooled memories [B, D].
            exits: hidden states after earlier loops, by name, in order.
            target: the logits of a teacher, sharded like this model's logits.
        """
        self.residence.enter_ends()
        return self.objective.terms(x, batch, exits, target)
