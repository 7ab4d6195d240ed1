"""One block: attention and feed-forward with residuals. Shapes: [B, S, D]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megarecur.config.schema import ModelConfig
from megarecur.model.attention import Attention
from megarecur.model.context import Context, Keys
from megarecur.model.feed_forward import GELU, SwiGLU
from megarecur.model.norm import build_norm
from megarecur.parallel.linear import Linear, MakeParameter, Weight
from megarecur.parallel.random import dropout
from megarecur.parallel.regions import ALONE, TensorParallel
from megarecur.recurrence.layer_map import Step

Body = Callable[["Block", Tensor, Context, Step, Keys], Tensor]


class Block(nn.Module):
    """One set of Transformer weights, used by any number of steps of the map.

    Norm positions: pre, x + f(N(x)); post, N(x + f(x)); sandwich, N2(x + f(N1(x))), as in Huginn.
    """

    def __init__(
        self,
        block: int,
        make: MakeParameter,
        model: ModelConfig,
        dtype: torch.dtype,
        has_adapter: bool,
        tp: TensorParallel = ALONE,
    ) -> None:
        super().__init__()
        prefix, eps = f"blocks.{block}", model.norm_eps
        feed_forward = {"swiglu": SwiGLU, "gelu": GELU}[model.feed_forward]
        self.injection = Linear(f"{prefix}.injection", make, dtype, False) if has_adapter else None
        self.norm_position = model.norm_position
        self.rates = {"mix": model.dropout, "feed": model.dropout,
                      "attention": model.attention_dropout}  # fmt: skip
        self.compiled: Body | None = None
        """Runs `body` in training (`model.compile`)."""
        self.attention_norm = build_norm(model.norm, f"{prefix}.attention_norm", make, eps)
        self.attention = Attention(f"{prefix}.attention", make, model, dtype, tp)
        self.feed_forward_norm = build_norm(model.norm, f"{prefix}.feed_forward_norm", make, eps)
        self.feed_forward = feed_forward(f"{prefix}.feed_forward", make, model, dtype, tp)
        if model.norm_position == "sandwich":
            self.attention_output_norm = build_norm(
                model.norm, f"{prefix}.attention_output_norm", make, eps
            )
            self.feed_forward_output_norm = build_norm(
                model.norm, f"{prefix}.feed_forward_output_norm", make, eps
            )
        self.weights = [module for module in self.modules() if isinstance(module, Weight)]

    def forward(self, x: Tensor, ctx: Context, step: Step, injected: Tensor | None) -> Tensor:
        """One step of the map; `injected` is added, or mixed in by the adapter, first."""
        if injected is not None:
            x = self.inject(x, injected)
        keys = ctx.keys(step, self.rates)
        if self.compiled is None or not ctx.training:
            return self.body(x, ctx, step, keys)
        for weight in self.weights:
            weight.value()  # A gathered one has no copy yet; a graph takes what is there.
        return self.compiled(self, x, ctx, step, keys)

    def body(self, x: Tensor, ctx: Context, step: Step, keys: Keys) -> Tensor:
        """What is compiled: one graph for all blocks and steps of the map, hence nothing here may
        depend on which of them it is, but for tensors."""
        if self.norm_position == "pre":
            mixed = self.attention(self.attention_norm(x), ctx, step, keys)
            x = x + self.drop(mixed, ctx, keys, "mix")
            return x + self.drop(self.feed_forward(self.feed_forward_norm(x)), ctx, keys, "feed")
        if self.norm_position == "post":
            x = x + self.drop(self.attention(x, ctx, step, keys), ctx, keys, "mix")
            x = self.attention_norm(x)
            x = x + self.drop(self.feed_forward(x), ctx, keys, "feed")
            return self.feed_forward_norm(x)
        mixed = self.attention(self.attention_norm(x), ctx, step, keys)
        x = self.attention_output_norm(x + self.drop(mixed, ctx, keys, "mix"))
        x = x + self.drop(self.feed_forward(self.feed_forward_norm(x)), ctx, keys, "feed")
        return self.feed_forward_output_norm(x)

    def remember(self, x: Tensor, ctx: Context, step: Step, injected: Tensor | None) -> None:
        """Of a step that is skipped, put into ctx.cache the keys and values that it would have made
        of x."""
        if injected is not None:
            x = self.inject(x, injected)
        x = x if self.norm_position == "post" else self.attention_norm(x)
        self.attention.project(x, ctx, step)

    def inject(self, x: Tensor, injected: Tensor) -> Tensor:
        """x + e, or W [x, e]."""
        if self.injection is None:
            return x + injected
        return self.injection(torch.cat([x, injected], dim=-1))

    def drop(self, x: Tensor, ctx: Context, keys: Keys, site: str) -> Tensor:
        """Dropout of a residual branch."""
        if site not in keys:
            return x
        return dropout(x, self.rates[site], keys[site], ctx.rows())
