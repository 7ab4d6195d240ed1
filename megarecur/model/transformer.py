"""The model, which embeds tokens, runs steps of the layer map, and computes the loss.

Shapes: B samples, S positions, D hidden, V vocabulary, N = B S tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megarecur.attention.plan import choose_backend
from megarecur.batch import Batch
from megarecur.config.run import Config
from megarecur.model.block import Block
from megarecur.model.context import Context, DropoutKeys, build_context
from megarecur.model.embedding import Embedding, Head
from megarecur.model.norm import build_norm
from megarecur.model.positions import sinusoidal
from megarecur.model.runner import ChunkedRunner, build_runner
from megarecur.model.saved import CudaCopies, HostCopies, saving
from megarecur.model.task_head import TaskHead
from megarecur.model.telemetry import Telemetry
from megarecur.model.temporal import Carried, build_chunks
from megarecur.objective.readout import Readout
from megarecur.objective.task import build_objective
from megarecur.parallel.head_loss import Target
from megarecur.parallel.linear import DeferredProducts, Weight
from megarecur.parallel.loss import LossTerm
from megarecur.parallel.random import draw_keys, dropout, initial_values
from megarecur.parallel.regions import ALONE, TensorParallel
from megarecur.parallel.shards import TensorShard
from megarecur.plan.placement import Placement
from megarecur.recurrence.inventory import Inventory, build_inventory
from megarecur.recurrence.layer_map import Step

COMPUTE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


class Transformer(nn.Module):
    """A model, or the part of a model on one pipeline rank.

    Args:
        config: the run, with model.vocab_size resolved.
        placement: the blocks of each pipeline rank; None: this rank has the whole model.
        pp_rank: this pipeline rank.
        tp: the ranks that share matrices, and this rank's place among them.
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
            place = spec.place(tp.rank, tp.size)
            own = initial_values(spec, config.seed, self.master_dtype, place, device)
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
        self.embedding = (
            Weight(make("embedding.weight"), self.dtype) if has_embedding or tied else None
        )
        learned = has_embedding and model.positions == "learned"
        positions = make("embedding.positions") if learned else None
        self.runner = build_runner(config, make, self.dtype, placement.blocks(pp_rank), tp)
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
        bounds = [self.first_id(rank) for rank in range(tp.size + 1)]
        self.readout = Readout(config, tp, bounds, self.final_norm, self.project, self.task_head)
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

    def first_id(self, rank: int) -> int:
        """Return the first id of a tensor-parallel rank's vocabulary shard; for rank = size, the
        end of the vocabulary."""
        return self.inventory["embedding.weight"].shape[0] * rank // self.tp.size

    def shard(self, name: str, tensor: Tensor) -> TensorShard:
        """Return this rank's shard of a parameter, or of an optimizer moment of it, with its place
        in the whole."""
        spec = self.inventory[name]
        return TensorShard(spec.shape, [(*spec.part(self.tp.rank, self.tp.size), tensor)])

    def hidden_shape(self, tokens_BS: Tensor) -> tuple[int, int, int]:
        """Return the shape of the hidden state: [B, S, D], or this rank's positions of it."""
        batch, length = tokens_BS.shape
        return batch, self.tp.span(length)[1], self.config.model.hidden_size

    def weights(self) -> list[Weight]:
        """Return every unique matrix with a compute copy."""
        return [module for module in self.modules() if isinstance(module, Weight)]

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
        separates = not batch.single_document or (training and self.always_separates)
        options: dict[str, Any] = {
            "documents_BS": batch.documents_BS if separates else None,
            "boundaries": batch.boundaries if separates else None,
            "backend": self.attention.backend,
            "sample_ids_B": batch.sample_ids_B,
            "seed": self.config.seed,
            "step": step,
            "training": training,
            "drawn": drawn,
            "telemetry": telemetry,
            "states": states,
            "tp": self.tp,
        }
        if self.config.temporal is not None:
            return build_chunks(self.config, batch.positions_BS, self.dtype, **options)
        return build_context(self.config.model, batch.positions_BS, self.dtype, **options)

    def draw_keys(
        self, steps: Iterable[Step], optimizer_step: int, device: torch.device
    ) -> dict[int, Tensor]:
        """Return the random keys of training on some steps of the map, in one table on the
        device."""
        keys = DropoutKeys(self.config.seed, optimizer_step, True)
        places: list[tuple[str, Step | None]] = [("embedding", None), ("initial state", None)]
        if isinstance(self.runner, ChunkedRunner):
            places += [(site, None) for site in self.runner.memory.sites()]
        for step in steps:
            block = self.runner.blocks[str(step.block)]
            assert isinstance(block, Block)
            places += [(site, step) for site, rate in block.rates.items() if rate > 0.0]
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

    def embed(self, tokens_BS: Tensor, ctx: Context) -> Tensor:
        """Embed ids: [B, S] to [B, S, D], or this rank's positions of it, in the compute dtype."""
        assert self.look_up is not None
        model = self.config.model
        x: Tensor = self.look_up(tokens_BS, ctx.positions.index_BS)
        if model.positions == "sinusoidal":
            x = x + sinusoidal(ctx.positions.index_BS, model.hidden_size, x.dtype)
        x = x.to(self.dtype)
        if ctx.dropout.training and model.dropout > 0.0:
            where = ctx.dropout.words("embedding", x.device)
            x = dropout(x, model.dropout, where, ctx.positions.rows())
        return x

    def run(
        self, steps: Sequence[Step], x: Tensor, ctx: Context, reads: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, LossTerm]]:
        """Run consecutive steps of the map; arguments as in `Runner.forward`.

        Returns:
            x [B, S, D], or the pooled temporal memory [B, D] if a classifier reads it; and
            auxiliary losses by name.
        """
        terms: dict[str, LossTerm] = {}
        with saving(self.config.train.recompute == "selective", self.host_copies):
            x = self.runner(steps, x, ctx, reads, self.final_norm, terms)
        return (self.pool_memory(x) if self.config.reads_memory else x), terms

    def logits(self, x: Tensor) -> Tensor:
        """Return logits of tokens: [B, S, D] to [B, S, V], or this rank's shard of V."""
        return self.readout.logits(x)

    def all_logits(self, x: Tensor) -> Tensor:
        """Return logits of all of V on every rank, [B, S, D] to [B, S, V]; outside of the graph."""
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
        return self.objective.terms(x, batch, exits, target)
