"""Forward and backward pass of an optimizer step: the global batch through this rank's stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from megarecur.attention.documents import whole_samples
from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.errors import MegarecurError
from megarecur.model.context import Context
from megarecur.model.telemetry import Telemetry, named
from megarecur.model.transformer import Transformer
from megarecur.objective.teacher import Teacher
from megarecur.optim.engine import Engine
from megarecur.parallel.loss import LossTerm
from megarecur.parallel.mesh import Mesh, raise_first
from megarecur.parallel.pipeline import Pipeline
from megarecur.plan.cost import count_seen
from megarecur.plan.schedule import Schedules
from megarecur.plan.walk import Stage
from megarecur.recurrence.depth import draw_depth, draws_depth
from megarecur.recurrence.layer_map import StackName
from megarecur.train.report import StepResult

SEEN = ("keys", "window_keys", "encoder_keys", "cross_keys", "source_tokens")
"""Sums over a global batch from which `Seen` is computed."""


class Training:
    """Computation of the stages in an optimizer step (`parallel.pipeline.Program`).

    Args:
        denominators: counts over the global batch, by name.
        result: receives the losses and, if `telemetry`, the measures of the steps of the map.
        telemetry: whether to measure the steps of the map.
        teacher: source of the teacher's logits, on ranks of the head; None: no distillation.
        drawn: random keys of this rank's steps of the map (`Transformer.draw_keys`).
    """

    def __init__(
        self,
        model: Transformer,
        batches: Sequence[MicroBatch],
        step: int,
        denominators: Mapping[str, float],
        result: StepResult,
        telemetry: bool,
        teacher: Teacher | None = None,
        drawn: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.teacher, self.drawn = teacher, drawn
        self.model, self.batches, self.step = model, batches, step
        self.denominators, self.result, self.telemetry = denominators, result, telemetry
        self.contexts: dict[int, Context] = {}
        self.seen: list[Telemetry] = []

    def shape(self, microbatch: int, stack: StackName) -> tuple[int, ...]:
        """Return the shape of the hidden state of a stack on this rank."""
        batch = self.batches[microbatch]
        read = batch.source if stack == "encoder" and batch.source is not None else batch
        return self.model.hidden_shape(read.tokens_BS)

    def context(self, microbatch: int) -> Context:
        """Return the context of a micro batch; its first stage here creates it."""
        if microbatch not in self.contexts:
            seen = Telemetry() if self.telemetry else None
            self.seen += [seen] if seen else []
            self.contexts[microbatch] = self.model.context(
                self.batches[microbatch],
                self.step,
                training=True,
                telemetry=seen,
                drawn=self.drawn,
            )
        return self.contexts[microbatch]

    def forward(
        self, stage: Stage, microbatch: int, x: Tensor | None, reads: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Return (outgoing hidden state, this stage's share of the objective or None)."""
        batch, ctx = self.batches[microbatch], self.context(microbatch)
        with named("forward"):
            if stage.first:
                x = self.model.enter(batch.tokens_BS, ctx, reads, batch.source, batch.pixels_BCHW)
            assert x is not None
            x, terms = self.model.run(stage.steps, x, ctx, reads)
            self.result.add_counts(ctx.recorder.counts)
            if ctx.source is not None:
                self.result.add_counts(ctx.source.recorder.counts, "encoder")
            if stage.last:
                terms = self.loss(x, batch, {n: reads[n] for n in stage.exits}) | terms
        for name, term in terms.items():
            share = term.total.detach() / self.denominators[term.denominator]
            self.result.losses[name] = self.result.losses.get(name, 0.0) + share
        if stage.last:
            labels_BS = self.model.cp.own(batch.labels_BS)
            self.result.add_sources(batch.sources_B, labels_BS, terms["loss"].per_token)
        return x, objective(terms, self.denominators) if terms else None

    def loss(
        self, x: Tensor, batch: MicroBatch, exits: Mapping[str, Tensor]
    ) -> dict[str, LossTerm]:
        """Return the loss terms of the last stage."""
        if self.teacher is None:
            return self.model.loss(x, batch, exits)
        with named("teacher"):
            target = self.teacher.target(batch)
        return self.model.loss(x, batch, exits, target)

    def forget(self, microbatch: int) -> None:
        """Free a micro batch's context, and the visits that its telemetry keeps for comparison."""
        telemetry = self.contexts.pop(microbatch).recorder.telemetry
        if telemetry is not None:
            telemetry.visits.clear()

    def finish(self) -> None:
        """Add up the telemetry, which includes gradients after the backward passes."""
        for seen in self.seen:
            for key, sums in seen.sums.items():
                before = self.result.telemetry.get(key)
                self.result.telemetry[key] = sums if before is None else before + sums


def build_model(config: Config, mesh: Mesh, schedules: Schedules) -> Transformer:
    """Build this process's part of the model."""
    return Transformer(
        config,
        mesh.device,
        placement=schedules.placement,
        pp_rank=mesh.pp_rank,
        tp=mesh.tensor_parallel(config.parallel.sequence_parallel),
        cp=mesh.context_parallel(),
        hollow=config.parallel.shards_natively,
    )


def forward_backward(
    model: Transformer,
    engine: Engine,
    config: Config,
    batches: Sequence[MicroBatch],
    step: int,
    mesh: Mesh,
    telemetry: bool = False,
    unread: MegarecurError | None = None,
    schedules: Schedules | None = None,
    teacher: Teacher | None = None,
) -> StepResult:
    """Compute the gradients of the objective over the global batch; they stay in the engine.

    The objective divides sums by counts over the global batch. The counts are known before the
    forward pass, so that the objective does not depend on dp, micro batch size or padding.

    Raises:
        MegarecurError: on every rank, the reason why a rank could not read its batches (`unread`).
        PipelineError: an operation of the pipeline order failed, here or on another rank.
    """
    depth = draw_depth(config, step)
    denominators = count_denominators(batches, mesh, unread, count_keys(config, batches))
    scheduled = (schedules or Schedules(config)).training(depth, len(batches))
    result = StepResult(
        depth,
        num_sources=len(config.data.train),
        places=denominators["places"],
        keys=tuple(denominators[name] for name in SEEN),
    )
    stages = [stage for stage in scheduled.walk if stage.rank == mesh.pp_rank]
    mine = [each for stage in stages for each in stage.steps]
    engine.expect([stage.steps for stage in stages if stage.backward], len(batches))
    drawn = model.draw_keys(mine, step, mesh.device)
    program = Training(model, batches, step, denominators, result, telemetry, teacher, drawn)

    def backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        with named("backward"):
            engine.backward(outputs, gradients)

    pipeline = Pipeline(mesh, scheduled.walk, program, model.dtype, backward, model.deferred)
    pipeline.run(scheduled.order[mesh.pp_rank])
    program.finish()
    if draws_depth(config):
        result.count_exits(mesh)
    return result


def sum_losses(result: StepResult, mesh: Mesh, name: str = "loss") -> float:
    """Return a loss over the global batch, on every rank; collective."""
    own = result.losses.get(name, torch.zeros((), device=mesh.device)).to(torch.float64)
    return float(mesh.sum_over_world(own) / mesh.tp)


def count_denominators(
    batches: Sequence[MicroBatch],
    mesh: Mesh,
    unread: MegarecurError | None = None,
    keys: Sequence[float] = (0.0,) * len(SEEN),
) -> dict[str, float]:
    """Count tokens, documents and places of the global batch; collective, one all-reduce.

    Tokens are those with labels. Tokens and documents are at least 1. Places are all computed
    tokens, including padding. The all-reduce also counts the ranks that failed to read, and sums
    `keys`, those that this rank's queries see (`count_keys`). Nothing is read from the device: the
    loader has counted.

    Raises:
        MegarecurError: on every rank, the reason why a rank could not read its batches.
    """
    own = [
        sum(batch.num_tokens for batch in batches),
        sum(batch.num_documents for batch in batches),
        sum(batch.tokens_BS.numel() for batch in batches),
        unread is not None,
        *keys,
    ]
    tokens, documents, places, failures, *seen = mesh.count_over_world(own)
    if failures:
        raise_first(unread, mesh)
    # All ranks that work on the same samples count them.
    share = mesh.readers / mesh.world
    return {
        "tokens": max(tokens * share, 1.0),
        "documents": max(documents * share, 1.0),
        "places": places * share,
        **{name: count * share for name, count in zip(SEEN, seen, strict=True)},
    }


def count_keys(config: Config, batches: Sequence[MicroBatch]) -> tuple[float, ...]:
    """Return the keys that all queries of these batches see, by the names in `SEEN`: what attention
    must compute of the documents, padding included; and the number of source tokens."""
    lengths: list[int] = []
    for batch in batches:
        rows, length = batch.tokens_BS.shape
        documents = batch.boundaries or whole_samples(rows, length, torch.device("cpu"))
        span = length if config.temporal is None else config.temporal.chunk_length
        lengths += documents.lengths_within(span).tolist()
    seen = count_seen(config, lengths)
    found = [seen.full * sum(lengths), seen.sliding * sum(lengths)]
    sources = [(batch.source, batch.tokens_BS.shape[1]) for batch in batches if batch.source]
    of_encoder = crossed = tokens = 0
    for source, length in sources:
        rows, span = source.tokens_BS.shape
        firsts, each = source.boundaries.edges[:-1], np.diff(source.boundaries.edges)
        each = each.astype(np.int64)
        of_encoder += int((each * each).sum())
        # The first document of each row is its sentence, a second one padding.
        crossed += length * int(each[firsts % span == 0].sum())
        tokens += rows * span
    return *found, float(of_encoder), float(crossed), float(tokens)


def objective(terms: Mapping[str, LossTerm], denominators: Mapping[str, float]) -> Tensor:
    """Return the weighted sum of all loss terms."""
    parts = [t.total * (t.weight / denominators[t.denominator]) for t in terms.values()]
    return torch.stack(parts).sum()
