"""The training step that benchmarks measure: one process, the plain engine, one micro batch."""

from __future__ import annotations

import torch
from torch import Tensor

from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.model.compile import CompiledModel
from megarecur.model.transformer import Transformer
from megarecur.optim.plain import PlainEngine
from megarecur.parallel.mesh import Mesh
from megarecur.recurrence.depth import Depth
from megarecur.recurrence.schemes import layer_map


class Trained:
    """A model and its engine on a device."""

    def __init__(self, config: Config, device: torch.device, compiled: bool = False) -> None:
        self.config = config
        self.model = Transformer(config, device)
        self.engine = PlainEngine(self.model, config, Mesh(device=device))
        self.compiled = CompiledModel(self.model) if compiled else None

    def step(self, batch: MicroBatch, depth: Depth | None = None) -> Tensor:
        """Run an optimizer step; returns the loss, on the device."""
        with torch.autograd.profiler.record_function("forward and backward"):
            loss = self.differentiate(batch, depth)
        self.engine.step(self.config.optimizer.lr)
        return loss.detach()

    def differentiate(self, batch: MicroBatch, depth: Depth | None = None) -> Tensor:
        """Run the forward and the backward pass."""
        steps = layer_map(self.config.recurrence, depth)
        ctx = self.model.context(batch, step=0, training=True)
        x, _ = self.model.run(steps, self.model.embed(batch.tokens_BS, ctx), ctx, {})
        loss = self.model.loss(x, batch)["loss"].total / batch.tokens_BS.numel()
        self.engine.backward(loss)
        return loss
