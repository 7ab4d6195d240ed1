"""The parts of a model that one pipeline rank has: embedding, blocks in runners, head, parameters.

Shapes: B samples, S positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megarecur.attention.plan import choose_backend
from megarecur.config.run import Config
from megarecur.model.block import Block
from megarecur.model.embedding import Embedding, Head
from megarecur.model.norm import build_norm
from megarecur.model.patches import Patches
from megarecur.model.runner import ChunkedRunner, Runner, build_runner
from megarecur.model.saved import CudaCopies, HostCopies
from megarecur.model.task_head import TaskHead
from megarecur.objective.readout import Readout
from megarecur.objective.task import build_objective
from megarecur.parallel.context import WHOLE, ContextParallel
from megarecur.parallel.linear import DeferredProducts, Weight, make_hollow
from megarecur.parallel.random import initial_values
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
from megarecur.recurrence.stacks import list_stacks

COMPUTE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


class Parts(nn.Module):
    """The parameters and modules of a model, or of the part of it on one pipeline rank.

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
