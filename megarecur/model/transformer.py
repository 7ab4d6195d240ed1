"""The model, which embeds tokens or pictures, runs steps of the layer map, and computes the loss.

Shapes: B samples, S positions, D hidden, V vocabulary, N = B S tokens, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megarecur.batch import Batch, Sentences
from megarecur.model.context import Context, CrossView, DropoutKeys, build_context, see_source
from megarecur.model.embedding import Embedding
from megarecur.model.parts import Parts
from megarecur.model.positions import sinusoidal
from megarecur.model.runner import ChunkedRunner, initial_site
from megarecur.model.saved import saving
from megarecur.model.telemetry import Telemetry
from megarecur.model.temporal import Carried, build_chunks
from megarecur.parallel.context import WHOLE
from megarecur.parallel.head_loss import Target
from megarecur.parallel.loss import LossTerm
from megarecur.parallel.random import draw_keys, dropout
from megarecur.recurrence.inventory import embedding_names
from megarecur.recurrence.layer_map import ENCODER, TARGET, Step


class Transformer(Parts):
    """A model, or the part of a model on one pipeline rank; arguments as of `Parts`."""

    def context(
        self,
        batch: Batch,
        step: int,
        training: bool,
        telemetry: Telemetry | None = None,
        states: list[Tensor] | None = None,
        drawn: Mapping[int, Tensor] | None = None,
        whole: bool = False,
    ) -> Context:
        """Return the context of a micro batch.

        Args:
            whole: let every context-parallel rank compute all positions.
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
        cp = WHOLE if whole else self.cp
        ctx = build_context(self.config.model, batch.positions_BS, self.dtype, cp=cp, **given)
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
        terms = self.objective.terms(x, batch, exits, target)
        self.residence.leave_head(term.total for term in terms.values())
        return terms
