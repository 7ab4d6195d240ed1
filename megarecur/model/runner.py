"""Runners, which execute consecutive steps of a layer map.

`build_runner` chooses one when the model is built. `Runner` executes every step once.
`HaltingRunner` lets documents or tokens halt early. `ChunkedRunner` calls one of these for each
chunk of a text and carries a memory from chunk to chunk. All have the same `forward`.

Shapes: B samples, S positions, D hidden, M memory slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megarecur.config.recurrence import Loop
from megarecur.config.run import Config
from megarecur.model.block import Block
from megarecur.model.context import Context
from megarecur.model.halting import HaltingHead, Mixture
from megarecur.model.telemetry import named
from megarecur.model.temporal import Memory
from megarecur.objective.auxiliary import halting_terms
from megarecur.parallel.linear import MakeParameter
from megarecur.parallel.loss import LossTerm
from megarecur.parallel.random import truncated_normal
from megarecur.parallel.regions import ALONE, TensorParallel
from megarecur.parallel.residence import Residence
from megarecur.recurrence.inventory import count_own_loops, feed_forward_owner
from megarecur.recurrence.layer_map import ENCODER, Step
from megarecur.recurrence.stacks import Stack


def build_runner(
    stack: Stack,
    make: MakeParameter,
    dtype: torch.dtype,
    blocks: Iterable[int],
    tp: TensorParallel = ALONE,
) -> Runner | ChunkedRunner:
    """Return the runner of a stack, with its blocks.

    Args:
        stack: the stack.
        make: makes parameters by name.
        dtype: compute dtype.
        blocks: the blocks that this rank owns.
        tp: the ranks that share matrices.
    """
    config = stack.config
    kind = Runner if config.halting is None else HaltingRunner
    runner = kind(stack, make, dtype, blocks, tp)
    return runner if config.temporal is None else ChunkedRunner(runner, config, make, dtype, tp)


class Runner(nn.Module):
    """Runner that executes every step of the map once.

    One call of this module contains all uses of its blocks. ZeRO 3 therefore gathers their weights
    once per forward pass, regardless of the number of uses.
    """

    def __init__(
        self,
        stack: Stack,
        make: MakeParameter,
        dtype: torch.dtype,
        blocks: Iterable[int],
        tp: TensorParallel = ALONE,
    ) -> None:
        super().__init__()
        self.stack, self.config = stack, stack.config
        self.residence = Residence()
        """Makes the weights of blocks present while they are used."""
        loops = count_own_loops(stack)
        self.blocks = nn.ModuleDict()
        for b in blocks:
            owner = str(feed_forward_owner(stack, b))
            shared = self.blocks[owner].feed_forward if owner in self.blocks else None
            block = Block(b, make, stack, dtype, loops.get(b, 0), tp, shared)  # type: ignore[arg-type]
            self.blocks[str(b)] = block

    def forward(
        self,
        steps: Sequence[Step],
        x: Tensor,
        ctx: Context,
        reads: dict[str, Tensor],
        final_norm: nn.Module | None,
        terms: dict[str, LossTerm],
    ) -> Tensor:
        """Run consecutive steps of the map.

        Args:
            steps: the steps.
            x: [B, S, D], the input of the first step.
            ctx: the context of the micro batch.
            reads: values that steps read, by name. Values that steps write and hidden states of
                exits are added.
            final_norm: applied before steps that normalize their input.
            terms: auxiliary losses by name; those of this pass are added.

        Returns:
            [B, S, D], the output of the last step.
        """
        for step in steps:
            if step.normalize:
                assert final_norm is not None
                x = final_norm(x)
            for name in step.kept:
                reads[name] = x
            if step.begins_core:
                x = self.initial_state(x, ctx)
            injected = None if step.injected is None else reads[step.injected]
            encoded = reads[ENCODER] if ENCODER in step.reads else None
            before = x
            with torch.set_grad_enabled(step.grad and torch.is_grad_enabled()):
                x = self.run_block(step, x, ctx, injected, encoded=encoded)
            observe(ctx, step, before, x)
            if step.exit:
                reads[step.exit_name] = x
        return x

    def run_block(
        self,
        step: Step,
        x: Tensor,
        ctx: Context,
        injected: Tensor | None = None,
        source: Tensor | None = None,
        encoded: Tensor | None = None,
    ) -> Tensor:
        """Run the block of one step: [B, S, D] to [B, S, D].

        With `train.recompute: full`, or for the loops that it names, backward runs the block again
        instead of keeping what is in it. Arguments: see `Block.forward`.
        """
        block = self.blocks[str(step.block)]
        self.residence.enter(step.block)
        y: Tensor
        with named(f"block {step.block} loop {step.loop_index}"):
            if self.config.train.recomputes(step.loop_index) and torch.is_grad_enabled():
                # Random values are functions of keys, so no generator state needs saving.
                y = checkpoint(
                    block, x, ctx, step, injected, source, encoded,
                    use_reentrant=False, preserve_rng_state=False,
                )  # fmt: skip
            else:
                y = block(x, ctx, step, injected, source, encoded)
        return self.residence.leave(step.block, y)

    def remember(
        self, steps: Sequence[Step], x: Tensor, ctx: Context, reads: dict[str, Tensor]
    ) -> None:
        """Fill the cache for skipped steps as if x, [B, S, D], were the input of each."""
        for step in steps:
            block = self.blocks[str(step.block)]
            assert isinstance(block, Block)
            self.residence.enter(step.block)
            block.remember(x, ctx, step, None if step.injected is None else reads[step.injected])

    def initial_state(self, x: Tensor, ctx: Context) -> Tensor:
        """Return the input of a core's first loop, [B, S, D] (Geiping et al. 2025, section 3.2)."""
        recurrence = self.config.recurrence
        if not isinstance(recurrence, Loop) or recurrence.initial_state == "prelude":
            return x
        if recurrence.initial_state == "zero":
            return torch.zeros_like(x)
        where = ctx.dropout.words(initial_site(self.stack), x.device)
        positions = ctx.positions
        samples, places = positions.rows()
        # index_BS continues after cached tokens; in a chunk it restarts, and rows() continues.
        if positions.first is None:
            places = positions.own(positions.index_BS)
        noise = truncated_normal(where, (samples, places), x.shape[-1])
        return (noise * recurrence.initial_state_std).to(x.dtype)


class HaltingRunner(Runner):
    """Runner of a map with halting, which stops once every token has halted.

    Replicas may run different numbers of steps, because only tensor-parallel ranks communicate
    here.
    """

    def __init__(
        self,
        stack: Stack,
        make: MakeParameter,
        dtype: torch.dtype,
        blocks: Iterable[int],
        tp: TensorParallel = ALONE,
    ) -> None:
        super().__init__(stack, make, dtype, blocks, tp)
        self.halting: HaltingHead | None = None
        """The head, on the rank of the stack's block."""
        if str(stack.first) in self.blocks:
            self.halting = HaltingHead(f"blocks.{stack.first}.halting", make, dtype)
        self.compact = True
        """If True, compute only on samples that have not halted; else on all, with excess results
        discarded."""

    def forward(
        self,
        steps: Sequence[Step],
        x: Tensor,
        ctx: Context,
        reads: dict[str, Tensor],
        final_norm: nn.Module | None,
        terms: dict[str, LossTerm],
    ) -> Tensor:
        """Run the steps; see `Runner.forward`. Adds the term `halting`, the expected depth."""
        halting = self.config.halting
        assert halting is not None and self.halting is not None
        recorder = ctx.recorder
        whole, watched = x, recorder.telemetry is not None or recorder.states is not None
        mixture = Mixture(
            halting, self.halting, x, ctx.positions, self.config.model.causal, len(steps),
            ctx.shares_BS,
        )  # fmt: skip
        present = ctx
        for step in steps:
            # The first step always runs, so that every rank uses every parameter.
            if not (mixture.begin_step() or step.loop_index == 0):
                break
            if self.compact and (kept := mixture.drop_halted()) is not None:
                present = present.select(kept)
            encoded = reads[ENCODER] if ENCODER in step.reads else None
            if encoded is not None and len(encoded) != len(mixture.rows_b):
                encoded = encoded[mixture.rows_b]
            advanced = self.run_block(step, mixture.h, present, None, mixture.source, encoded)
            mixture.advance(advanced)
            if watched:
                before, whole = whole, whole.detach().clone()
                whole[mixture.rows_b] = mixture.h.detach()
                observe(ctx, step, before, whole)
        for step in steps[mixture.step :] if watched else ():
            observe(ctx, step, whole, whole)
        x, cost, counts = mixture.finish()
        terms |= halting_terms(cost, halting)
        recorder.counts.append(counts)
        if not torch.is_grad_enabled() and mixture.of_rows is not None:
            recorder.taken.append(mixture.of_rows)
        return x


class ChunkedRunner(nn.Module):
    """Runner that executes the whole map on each chunk of a text in turn, with a temporal memory.

    Args:
        runner: executes the map on one chunk.
        config: the run.
        make: makes the parameters of the memory by name.
        dtype: compute dtype.
        tp: the ranks that share matrices.
    """

    def __init__(
        self,
        runner: Runner,
        config: Config,
        make: MakeParameter,
        dtype: torch.dtype,
        tp: TensorParallel = ALONE,
    ) -> None:
        super().__init__()
        self.runner, self.memory = runner, Memory(config, make, dtype, tp)
        self.returns_memory = config.reads_memory

    @property
    def blocks(self) -> nn.ModuleDict:
        """The blocks of the inner runner."""
        return self.runner.blocks

    def forward(
        self,
        steps: Sequence[Step],
        x: Tensor,
        ctx: Context,
        reads: dict[str, Tensor],
        final_norm: nn.Module | None,
        terms: dict[str, LossTerm],
    ) -> Tensor:
        """Run the map on every chunk; see `Runner.forward`. Adds the last `memory` to `reads`.

        Returns:
            [B, S, D], or the last memory [B, M, D] if a classifier reads it. The memory must be
            the return value because ZeRO 3 gathers parameters when its gradient arrives.
        """
        x = self.run_chunks(steps, x, ctx, reads, final_norm, terms)
        return reads["memory"] if self.returns_memory else x

    def run_chunks(
        self,
        steps: Sequence[Step],
        x: Tensor,
        ctx: Context,
        reads: dict[str, Tensor],
        final_norm: nn.Module | None,
        terms: dict[str, LossTerm],
    ) -> Tensor:
        """Return [B, S, D]. Every step reads the memory, which is written after each chunk."""
        assert ctx.chunks is not None, "a temporal memory needs the context of `build_chunks`"
        memory, carried = self.memory, ctx.chunks.carried
        memory_BMD = memory.initial(len(x))
        if carried is not None and carried.memory_BMD is not None:
            memory_BMD = carried.memory_BMD
        left: dict[str, list[Tensor]] = {step.exit_name: [] for step in steps if step.exit}
        left |= {name: [] for step in steps for name in step.writes}
        outputs = []
        for number, chunk in enumerate(ctx.chunks.chunks):
            if ctx.recorder.telemetry is not None:
                # Visits of the previous chunk belong to other tokens.
                ctx.recorder.telemetry.visits.clear()
            memory_BMD = memory.cut(chunk, memory_BMD)
            own: dict[str, Tensor] = {}
            before = x[:, chunk.start : chunk.stop].contiguous()  # as later steps receive it
            parts: dict[str, LossTerm] = {}
            present = memory.given(chunk, memory_BMD)
            after = self.runner(steps, before, present, own, final_norm, parts)
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
            complete = chunk.offset + length == memory.config.chunk_length
            if complete or carried.cache is None:
                written = torch.cat(carried.outputs, 1)
                memory_BMD = memory.write(memory_BMD, written, chunk, number)
            carried.end_piece(length, complete, memory_BMD)
        if len(outputs) == 1 and carried is None and torch.is_grad_enabled():
            # Batches of a task differ in their number of chunks. The layers that write the memory
            # need a gradient on every replica, even a zero one, or replicas would reduce different
            # parameters.
            outputs[0] = outputs[0] + 0.0 * memory_BMD.sum()
        reads |= {name: torch.cat(states, 1) for name, states in left.items()}
        reads["memory"] = memory_BMD
        return torch.cat(outputs, 1)


def initial_site(stack: Stack) -> str:
    """Return the name of the random key of a stack's initial state."""
    return "initial state" if stack.name == "decoder" else f"{stack.name} initial state"


def observe(ctx: Context, step: Step, before: Tensor, after: Tensor) -> None:
    """Pass the residual stream before and after a step, [B, S, D] each, to the recorder."""
    recorder = ctx.recorder
    if recorder.telemetry is not None:
        recorder.telemetry.record(step, before, after)
    if recorder.states is not None:
        recorder.states.append(after)
