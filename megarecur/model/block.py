"""One block: attention and feed-forward with residuals. Shapes: [B, S, D]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from megarecur.config.schema import Config
from megarecur.model.adapters import Adapter, informed, join, norms_of
from megarecur.model.attention import Attention
from megarecur.model.context import Context, Keys
from megarecur.model.feed_forward import FEED_FORWARDS, Gate
from megarecur.model.norm import build_norm
from megarecur.model.temporal import MemoryReader
from megarecur.parallel.linear import Linear, MakeParameter, Weight
from megarecur.parallel.random import dropout
from megarecur.parallel.regions import ALONE, TensorParallel
from megarecur.recurrence.inventory import SCALES, has_own_norms, injection_block, norm_names
from megarecur.recurrence.layer_map import Step

Body = Callable[["Block", Tensor, Context, Step, Keys, Adapter | None], Tensor]


class Block(nn.Module):
    """One set of Transformer weights, used by any number of steps of the map.

    Norm positions: pre, x + f(N(x)); post, N(x + f(x)), or N(x omega + f(x)) with residual
    scales; sandwich, N2(x + f(N1(x))), as in Huginn; peri, x + N2(f(N1(x))), as in Gemma 2.
    """

    def __init__(
        self,
        block: int,
        make: MakeParameter,
        config: Config,
        dtype: torch.dtype,
        num_loops: int = 0,
        tp: TensorParallel = ALONE,
        shared: nn.Module | None = None,
    ) -> None:
        """`shared`: the feed-forward of another block, in place of one of its own."""
        super().__init__()
        model, prefix = config.model, f"blocks.{block}"
        feed_forward = FEED_FORWARDS[model.feed_forward]
        self.injection: Linear | None = None
        if block == injection_block(config.recurrence):
            self.injection = Linear(f"{prefix}.injection", make, dtype, False)
        self.norm_position, self.parallel = model.norm_position, model.parallel_residual
        self.slides = model.slides(block)
        self.rates = {"mix": model.dropout, "feed": model.dropout,
                      "attention": model.attention_dropout}  # fmt: skip
        self.reader: MemoryReader | None = None
        if config.temporal is not None:
            self.reader = MemoryReader(prefix, make, model, dtype, tp)
            self.rates |= {"read": model.dropout, "read_attention": model.attention_dropout}
        self.compiled: Body | None = None
        """Runs `body` in training (`model.compile`)."""
        own_norms = has_own_norms(config)
        self.norms = nn.ModuleDict(
            {
                name: build_norm(model.norm, f"{prefix}.{name}", make, model.norm_eps)
                for name in (() if own_norms else norm_names(model))
            }
        )
        self.attention = Attention(f"{prefix}.attention", make, model, dtype, tp, not own_norms)
        self.feed_forward = shared or feed_forward(f"{prefix}.feed_forward", make, model, dtype, tp)
        self.gate = Gate(f"{prefix}.gate", make, dtype, tp) if model.gate else None
        self.adapters = nn.ModuleList(
            Adapter(f"{prefix}.loops.{loop}", make, config, dtype) for loop in range(num_loops)
        )
        self.weights = [module for module in self.modules() if isinstance(module, Weight)]

    def forward(self, x: Tensor, ctx: Context, step: Step, injected: Tensor | None) -> Tensor:
        """One step of the map; `injected` is added, or mixed in by the adapter, first, and then
        the level's encoding."""
        x = self.enter(x, ctx, step, injected)
        ctx = self.seen(ctx)
        keys = ctx.keys(step, self.rates)
        adapter = self.adapter(step)
        if ctx.source_BSD is not None:
            source = self.enter(ctx.source_BSD, ctx, step, None)
            if self.norm_position != "post":
                source = norms_of(adapter, self.norms)["attention_norm"](source)
            ctx = replace(ctx, source_BSD=source)
        if self.compiled is None or not ctx.training:
            return self.body(x, ctx, step, keys, adapter)
        for weight in self.weights:
            weight.value()  # A gathered one has no copy yet; a graph takes what is there.
        return self.compiled(self, x, ctx, step, keys, adapter)

    def body(
        self, x: Tensor, ctx: Context, step: Step, keys: Keys, adapter: Adapter | None
    ) -> Tensor:
        """What is compiled: one graph for all blocks and steps of the map, hence nothing here may
        depend on which of them it is, but for tensors."""
        norms = norms_of(adapter, self.norms)
        if self.norm_position == "pre":
            mixed = self.attention(norms["attention_norm"](x), ctx, step, keys, adapter, x)
            if self.parallel:
                fed = self.feed_forward(norms["feed_forward_norm"](x), adapter)
                x = x + self.drop(mixed, ctx, keys, "mix")
                return x + self.drop(fed, ctx, keys, "feed")
            a = x + self.drop(mixed, ctx, keys, "mix")
            if self.reader is not None:
                a = a + self.drop(self.reader(a, ctx, keys), ctx, keys, "read")
            u = norms["feed_forward_norm"](informed(a, adapter))
            fed = a + self.drop(self.feed_forward(u, adapter), ctx, keys, "feed")
            return fed if self.gate is None else torch.lerp(x, fed, self.gate(u))
        if self.norm_position == "peri":
            mixed = self.attention(norms["attention_norm"](x), ctx, step, keys, adapter)
            x = x + self.drop(norms["attention_output_norm"](mixed), ctx, keys, "mix")
            fed = self.feed_forward(norms["feed_forward_norm"](x), adapter)
            return x + self.drop(norms["feed_forward_output_norm"](fed), ctx, keys, "feed")
        if self.norm_position == "post":
            mixed = self.drop(self.attention(x, ctx, step, keys, adapter), ctx, keys, "mix")
            x = norms["attention_norm"](join(x, mixed, adapter, SCALES[0]))
            fed = self.drop(self.feed_forward(informed(x, adapter), adapter), ctx, keys, "feed")
            return norms["feed_forward_norm"](join(x, fed, adapter, SCALES[1]))
        mixed = self.attention(norms["attention_norm"](x), ctx, step, keys, adapter)
        x = norms["attention_output_norm"](x + self.drop(mixed, ctx, keys, "mix"))
        fed = self.feed_forward(norms["feed_forward_norm"](x), adapter)
        return norms["feed_forward_output_norm"](x + self.drop(fed, ctx, keys, "feed"))

    def remember(self, x: Tensor, ctx: Context, step: Step, injected: Tensor | None) -> None:
        """Of a step that is skipped, put into ctx.cache the keys and values that it would have made
        of x."""
        x = self.enter(x, ctx, step, injected)
        ctx = self.seen(ctx)
        adapter, stream = self.adapter(step), x
        if self.norm_position != "post":
            x = norms_of(adapter, self.norms)["attention_norm"](x)
        self.attention.project(x, ctx, step, adapter, stream)

    def seen(self, ctx: Context) -> Context:
        """What tokens see from this block: a window, if it has one."""
        if not self.slides or ctx.sliding is None:
            return ctx
        if ctx.source_BSD is None:
            return ctx.sliding
        return replace(ctx.sliding, source_BSD=ctx.source_BSD)

    def adapter(self, step: Step) -> Adapter | None:
        """Of this loop, if loops have one."""
        return cast(Adapter, self.adapters[step.loop_index]) if self.adapters else None

    def enter(self, x: Tensor, ctx: Context, step: Step, injected: Tensor | None) -> Tensor:
        """What the step starts from."""
        if injected is not None:
            x = self.inject(x, injected)
        return x if ctx.places is None else x + ctx.encoding(step).to(x.dtype)

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
