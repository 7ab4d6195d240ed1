"""One block: attention and feed-forward with residuals. Shapes: [B, S, D]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megarecur.config.schema import ModelConfig
from megarecur.model.attention import Attention
from megarecur.model.context import Context
from megarecur.model.feed_forward import GELU, SwiGLU
from megarecur.model.norm import build_norm
from megarecur.parallel.linear import Linear, MakeParameter
from megarecur.parallel.random import dropout
from megarecur.recurrence.layer_map import Step


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
    ) -> None:
        super().__init__()
        prefix, eps = f"blocks.{block}", model.norm_eps
        feed_forward = {"swiglu": SwiGLU, "gelu": GELU}[model.feed_forward]
        self.injection = Linear(f"{prefix}.injection", make, dtype, False) if has_adapter else None
        self.norm_position, self.dropout = model.norm_position, model.dropout
        self.attention_norm = build_norm(model.norm, f"{prefix}.attention_norm", make, eps)
        self.attention = Attention(f"{prefix}.attention", make, model, dtype)
        self.feed_forward_norm = build_norm(model.norm, f"{prefix}.feed_forward_norm", make, eps)
        self.feed_forward = feed_forward(f"{prefix}.feed_forward", make, model, dtype)
        if model.norm_position == "sandwich":
            self.attention_output_norm = build_norm(
                model.norm, f"{prefix}.attention_output_norm", make, eps
            )
            self.feed_forward_output_norm = build_norm(
                model.norm, f"{prefix}.feed_forward_output_norm", make, eps
            )

    def forward(self, x: Tensor, ctx: Context, step: Step, injected: Tensor | None) -> Tensor:
        """One step of the map; `injected` is added, or mixed in by the adapter, first."""
        if injected is not None:
            x = self.inject(x, injected)
        if self.norm_position == "pre":
            x = x + self.drop(self.attention(self.attention_norm(x), ctx, step), ctx, step, "mix")
            return x + self.drop(self.feed_forward(self.feed_forward_norm(x)), ctx, step, "feed")
        if self.norm_position == "post":
            x = x + self.drop(self.attention(x, ctx, step), ctx, step, "mix")
            x = self.attention_norm(x)
            x = x + self.drop(self.feed_forward(x), ctx, step, "feed")
            return self.feed_forward_norm(x)
        x = x + self.drop(self.attention(self.attention_norm(x), ctx, step), ctx, step, "mix")
        x = self.attention_output_norm(x)
        x = x + self.drop(self.feed_forward(self.feed_forward_norm(x)), ctx, step, "feed")
        return self.feed_forward_output_norm(x)

    def inject(self, x: Tensor, injected: Tensor) -> Tensor:
        """x + e, or W [x, e]."""
        if self.injection is None:
            return x + injected
        return self.injection(torch.cat([x, injected], dim=-1))

    def drop(self, x: Tensor, ctx: Context, step: Step, site: str) -> Tensor:
        """Dropout of a residual branch."""
        if not ctx.training or self.dropout == 0.0:
            return x
        return dropout(x, self.dropout, ctx.where(site, step), ctx.rows())
