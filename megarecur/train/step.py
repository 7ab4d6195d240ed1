"""One optimizer step: the global batch through the stages of this rank, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megarecur.config.schema import Config
from megarecur.data.loader import MicroBatch
from megarecur.errors import MegarecurError
from megarecur.model.context import Context
from megarecur.model.halting import begin_BS
from megarecur.model.telemetry import Telemetry, named
from megarecur.model.transformer import LossTerm, Transformer
from megarecur.optim.engine import Engine
from megarecur.parallel.mesh import Mesh, raise_first
from megarecur.parallel.pipeline import Pipeline
from megarecur.plan.schedule import Schedules
from megarecur.plan.walk import Stage
from megarecur.recurrence.depth import is_sampled, sample_depth
from megarecur.train.distill import Teacher
from megarecur.train.report import StepResult


class Training:
    """What the stages compute in an optimizer step (`parallel.pipeline.Program`).

    Args:
        model: this rank's part.
        batches: all micro batches of the replica.
        step: the optimizer step.
        denominators: counts over the global batch, by name.
        result: told of losses and, where `telemetry`, of what steps of the map do.
        teacher: whom it learns from, on ranks of the head.
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
    ) -> None:
        self.teacher = teacher
        self.model, self.batches, self.step = model, batches, step
        self.denominators, self.result, self.telemetry = denominators, result, telemetry
        self.contexts: dict[int, Context] = {}
        self.seen: list[Telemetry] = []

    def shape(self, microbatch: int) -> tuple[int, ...]:
        """Of the hidden state, on this rank."""
        return self.model.hidden_shape(self.batches[microbatch].tokens_BS)

    def context(self, microbatch: int) -> Context:
        """Made at a micro batch's first stage here, for all of them."""
        if microbatch not in self.contexts:
            seen = Telemetry() if self.telemetry else None
            self.seen += [seen] if seen else []
            self.contexts[microbatch] = self.model.context(
                self.batches[microbatch], self.step, training=True, telemetry=seen
            )
        return self.contexts[microbatch]

    def forward(
        self, stage: Stage, microbatch: int, x: Tensor | None, reads: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """(hidden state that leaves, this stage's share of the objective)."""
        batch, ctx = self.batches[microbatch], self.context(microbatch)
        with named("forward"):
            if stage.first:
                x = self.model.embed(batch.tokens_BS, ctx)
            assert x is not None
            x, terms = self.model.run(stage.steps, x, ctx, reads)
            self.result.add_counts(ctx.counts)
            if stage.last:
                terms = self.loss(x, batch, {n: reads[n] for n in stage.exits}) | terms
        for name, term in terms.items():
            share = term.total.detach() / self.denominators[term.denominator]
            self.result.losses[name] = self.result.losses.get(name, 0.0) + share
        if stage.last:
            self.result.add_sources(batch, terms["loss"].per_token)
        return x, objective(terms, self.denominators) if terms else None

    def loss(
        self, x: Tensor, batch: MicroBatch, exits: Mapping[str, Tensor]
    ) -> dict[str, LossTerm]:
        """The terms of the last stage."""
        if self.teacher is None:
            return self.model.loss(x, batch, exits)
        with named("teacher"):
            logits_NV = self.teacher.logits(batch)
        return self.model.loss(x, batch, exits, logits_NV)

    def forget(self, microbatch: int) -> None:
        """Let go of masks, and of what telemetry compares visits with."""
        ctx = self.contexts.pop(microbatch)
        if ctx.telemetry is not None:
            ctx.telemetry.visits.clear()

    def finish(self) -> None:
        """Add up the telemetry; gradients are in it once the backward passes are done."""
        for seen in self.seen:
            for key, sums in seen.sums.items():
                before = self.result.telemetry.get(key)
                self.result.telemetry[key] = sums if before is None else before + sums


def build_model(config: Config, mesh: Mesh, schedules: Schedules) -> Transformer:
    """This process's part of the model."""
    return Transformer(
        config,
        mesh.device,
        placement=schedules.placement,
        pp_rank=mesh.pp_rank,
        tp=mesh.tensor_parallel(config.parallel.sequence_parallel),
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
    """Gradients of the objective over the global batch, left in the engine.

    The objective divides sums by counts over the global batch, known before the forward pass, so
    that it depends on neither dp, micro batch size nor padding.

    Raises:
        MegarecurError: on every rank, why one could not read its batches (`unread`).
        PipelineError: an operation of the order failed, here or on another rank.
    """
    depth = sample_depth(config.recurrence, config.seed, step)
    denominators = count_denominators(batches, mesh, unread)
    scheduled = (schedules or Schedules(config)).training(depth, len(batches))
    result = StepResult(depth, num_sources=len(config.data.train), places=denominators["places"])
    program = Training(model, batches, step, denominators, result, telemetry, teacher)

    def backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        with named("backward"):
            engine.backward(outputs, gradients)

    pipeline = Pipeline(mesh, scheduled.walk, program, model.dtype, backward, model.deferred)
    pipeline.run(scheduled.order[mesh.pp_rank])
    program.finish()
    if is_sampled(config.recurrence):
        result.count_exits(mesh)
    return result


def sum_losses(result: StepResult, mesh: Mesh, name: str = "loss") -> float:
    """A loss over the global batch, on every rank; collective."""
    own = result.losses.get(name, torch.zeros((), device=mesh.device)).to(torch.float64)
    return float(mesh.sum_over_world(own) / mesh.tp)


def count_denominators(
    batches: Sequence[MicroBatch], mesh: Mesh, unread: MegarecurError | None = None
) -> dict[str, float]:
    """Counted tokens (labels) and documents of the global batch, at least 1, and `places`, all that
    is computed, padding included; one all-reduce, of failures to read too.

    Raises:
        MegarecurError: on every rank, why one could not read its batches.
    """
    own = [
        sum(batch.num_tokens for batch in batches),
        sum(count_documents(batch) for batch in batches),
        sum(batch.tokens_BS.numel() for batch in batches),
        unread is not None,
    ]
    counts = mesh.sum_over_world(torch.tensor(own, dtype=torch.float64).to(mesh.device))
    tokens, documents, places, failures = counts.tolist()
    if failures:
        raise_first(unread, mesh)
    # Every rank of a replica reads, and counts, the same samples.
    share = mesh.dp / mesh.world
    return {
        "tokens": max(tokens * share, 1.0),
        "documents": max(documents * share, 1.0),
        "places": places * share,
    }


def count_documents(batch: MicroBatch) -> int:
    """Documents of a micro batch; what a sample has of one counts as one."""
    if batch.single_document:
        return len(batch.documents_BS)
    return int(begin_BS(batch.documents_BS).sum())


def objective(terms: Mapping[str, LossTerm], denominators: Mapping[str, float]) -> Tensor:
    """The weighted sum of all loss terms."""
    parts = [t.total * (t.weight / denominators[t.denominator]) for t in terms.values()]
    return torch.stack(parts).sum()
