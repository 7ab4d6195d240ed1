"""One block: attention and feed-forward with residuals. Shapes: [B, S, D]."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from megarecur.model.adapters import Adapter, informed, join, norms_of
from megarecur.model.attention import Attention, CrossAttention
from megarecur.model.context import (
    AttentionView,
    Context,
    CrossView,
    MemoryView,
    Positions,
    SiteKeys,
)
from megarecur.model.feed_forward import FEED_FORWARDS, Gate
from megarecur.model.norm import build_norm
from megarecur.model.temporal import MemoryReader
from megarecur.parallel.linear import Linear, MakeParameter, Weight
from megarecur.parallel.random import dropout
from megarecur.parallel.regions import ALONE, TensorParallel
from megarecur.recurrence.inventory import (
    CROSS_SCALE,
    SCALES,
    has_injection_bias,
    has_own_norms,
    injection_block,
    norm_names,
)
from megarecur.recurrence.layer_map import Step
from megarecur.recurrence.stacks import Stack

Body = Callable[..., Tensor]
"""Function with the arguments of `Block.body`, preceded by the block."""


class Block(nn.Module):
    """One set of Transformer weights, used by any number of steps of the map.

    Norm positions: pre, x + f(N(x)); post, N(x + f(x)), or N(x omega + f(x)) with residual
    scales; sandwich, N2(x + f(N1(x))), as in Huginn; peri, x + N2(f(N1(x))), as in Gemma 2;
    output, x + N(f(x)), as in OLMo 2.
    """

    def __init__(
        self,
        block: int,
        make: MakeParameter,
        stack: Stack,
        dtype: torch.dtype,
        num_loops: int = 0,
        tp: TensorParallel = ALONE,
        shared: nn.Module | None = None,
    ) -> None:
        """Build the block.

        Args:
            block: number of the block.
            make: makes parameters by name.
            stack: the stack that it belongs to.
            dtype: compute dtype.
            num_loops: number of loops that have an adapter.
            tp: the ranks that share matrices.
            shared: feed-forward layer of another block, used instead of an own one.
        """
        super().__init__()
        config = stack.config
        model, prefix = config.model, f"blocks.{block}"
        feed_forward = FEED_FORWARDS[model.feed_forward]
        self.injection: Linear | None = None
        if block == injection_block(stack):
            bias = has_injection_bias(config.recurrence)
            self.injection = Linear(f"{prefix}.injection", make, dtype, bias)
        self.norm_position, self.parallel = model.norm_position, model.parallel_residual
        self.slides = model.slides(block - stack.first)
        self.rates = {"mix": model.dropout, "feed": model.dropout,
                      "attention": model.attention_dropout}  # fmt: skip
        self.reader: MemoryReader | None = None
        if config.temporal is not None:
            self.reader = MemoryReader(prefix, make, model, dtype, tp)
            self.rates |= {"read": model.dropout, "read_attention": model.attention_dropout}
        self.cross_attention: CrossAttention | None = None
        """Attention to the output of the encoder, in the decoder of an encoder-decoder."""
        if stack.cross:
            name = f"{prefix}.cross_attention"
            self.cross_attention = CrossAttention(name, make, model, dtype, tp)
            self.rates |= {"cross": model.dropout, "cross_attention": model.attention_dropout}
        self.compiled: Body | None = None
        """Compiled `body`, used in training (`model.compile`)."""
        own_norms = has_own_norms(config)
        self.norms = nn.ModuleDict(
            {
                name: build_norm(model.norm, f"{prefix}.{name}", make, model.norm_eps)
                for name in (() if own_norms else norm_names(model, stack.cross))
            }
        )
        self.attention = Attention(f"{prefix}.attention", make, model, dtype, tp, not own_norms)
        self.feed_forward = shared or feed_forward(f"{prefix}.feed_forward", make, model, dtype, tp)
        self.gate = Gate(f"{prefix}.gate", make, dtype, tp) if model.gate else None
        self.adapters = nn.ModuleList(
            Adapter(f"{prefix}.loops.{loop}", make, stack, dtype, tp) for loop in range(num_loops)
        )
        self.weights = [module for module in self.modules() if isinstance(module, Weight)]

    def forward(
        self,
        x: Tensor,
        ctx: Context,
        step: Step,
        injected: Tensor | None,
        source: Tensor | None = None,
        encoded: Tensor | None = None,
    ) -> Tensor:
        """Run one step of the map, [B, S, D] to [B, S, D].

        Args:
            x: the residual stream.
            ctx: the context of the micro batch.
            step: the step of the map.
            injected: [B, S, D], combined with x first (see `inject`), before the encoding of
                position and level is added; None: nothing is injected.
            source: [B, S, D], input of keys and values; None: x.
            encoded: [B, K, D], the output of the encoder, for a block that attends to it.
        """
        x = self.enter(x, ctx.positions, step, injected)
        keys = ctx.dropout.at(step, self.rates, x.device)
        adapter = self.adapter(step)
        if source is not None:
            source = self.enter(source, ctx.positions, step, None)
            if self.norm_position not in ("post", "output"):
                source = norms_of(adapter, self.norms)["attention_norm"](source)
        compiled = self.compiled if ctx.dropout.training else None
        if compiled is not None and torch.is_grad_enabled() and not x.requires_grad:
            # The first step with gradient after steps without: it shares the graph of the others.
            x = x.detach().requires_grad_(any(w.parameter.requires_grad for w in self.weights))
        view = ctx.view(self.slides)
        parts = (
            x, view, ctx.positions, ctx.memory, step, keys, adapter, source, ctx.cross, encoded
        )  # fmt: skip
        if compiled is None:
            return self.body(*parts)
        for weight in self.weights:
            weight.value()  # Make the copy of a weight that ZeRO 3 gathered; a graph makes none.
        return compiled(self, *parts)

    def body(
        self,
        x: Tensor,
        view: AttentionView,
        positions: Positions,
        memory: MemoryView | None,
        step: Step,
        keys: SiteKeys,
        adapter: Adapter | None,
        source: Tensor | None,
        cross: CrossView | None,
        encoded: Tensor | None,
    ) -> Tensor:
        """Run attention and feed-forward, [B, S, D] to [B, S, D]. This is the compiled function.

        One graph serves all blocks and steps of the map, so only tensors may depend on the block
        or step.
        """
        norms = norms_of(adapter, self.norms)
        seen = (view, positions, step, keys, adapter)

        def look(x: Tensor) -> Tensor:
            """Return the branch that attends to the encoder's output."""
            assert self.cross_attention is not None and cross is not None and encoded is not None
            where, rows = keys.get("cross_attention"), positions.all_rows()
            found: Tensor = self.cross_attention(x, encoded, cross, where, rows, step)
            return found

        if self.norm_position == "pre":
            mixed = self.attention(norms["attention_norm"](x), *seen, x, source)
            if self.parallel:
                fed = self.feed_forward(norms["feed_forward_norm"](x), adapter)
                x = x + self.drop(mixed, positions, keys, "mix")
                return x + self.drop(fed, positions, keys, "feed")
            a = x + self.drop(mixed, positions, keys, "mix")
            if self.reader is not None:
                assert memory is not None
                a = a + self.drop(self.reader(a, memory, positions, keys), positions, keys, "read")
            if self.cross_attention is not None:
                looked = look(norms["cross_attention_norm"](a))
                a = a + self.drop(looked, positions, keys, "cross")
            u = norms["feed_forward_norm"](informed(a, adapter))
            fed = a + self.drop(self.feed_forward(u, adapter), positions, keys, "feed")
            return fed if self.gate is None else torch.lerp(x, fed, self.gate(u))
        if self.norm_position in ("peri", "output"):
            before = self.norm_position == "peri"
            u = norms["attention_norm"](x) if before else x
            mixed = self.attention(u, *seen, None, source)
            x = x + self.drop(norms["attention_output_norm"](mixed), positions, keys, "mix")
            if self.cross_attention is not None:
                u = norms["cross_attention_norm"](x) if before else x
                looked = norms["cross_attention_output_norm"](look(u))
                x = x + self.drop(looked, positions, keys, "cross")
            u = norms["feed_forward_norm"](x) if before else x
            fed = self.feed_forward(u, adapter)
            return x + self.drop(norms["feed_forward_output_norm"](fed), positions, keys, "feed")
        if self.norm_position == "post":
            mixed = self.drop(self.attention(x, *seen, None, source), positions, keys, "mix")
            x = norms["attention_norm"](join(x, mixed, adapter, SCALES[0]))
            if self.cross_attention is not None:
                looked = self.drop(look(x), positions, keys, "cross")
                x = norms["cross_attention_norm"](join(x, looked, adapter, CROSS_SCALE))
            fed = self.drop(
                self.feed_forward(informed(x, adapter), adapter), positions, keys, "feed"
            )
            normed: Tensor = norms["feed_forward_norm"](join(x, fed, adapter, SCALES[1]))
            return normed
        mixed = self.attention(norms["attention_norm"](x), *seen, None, source)
        x = norms["attention_output_norm"](x + self.drop(mixed, positions, keys, "mix"))
        if self.cross_attention is not None:
            looked = self.drop(look(norms["cross_attention_norm"](x)), positions, keys, "cross")
            x = norms["cross_attention_output_norm"](x + looked)
        fed = self.feed_forward(norms["feed_forward_norm"](x), adapter)
        out: Tensor = norms["feed_forward_output_norm"](x + self.drop(fed, positions, keys, "feed"))
        return out

    def remember(self, x: Tensor, ctx: Context, step: Step, injected: Tensor | None) -> None:
        """Cache the keys and values that a skipped step would compute from x, [B, S, D]."""
        x = self.enter(x, ctx.positions, step, injected)
        self.remember_entered(x, ctx.view(self.slides), step, self.adapter(step))

    def remember_entered(
        self, x: Tensor, view: AttentionView, step: Step, adapter: Adapter | None
    ) -> None:
        """Cache the keys and values of a step whose input, from `enter`, is x, [B, S, D]."""
        stream = x
        if self.norm_position not in ("post", "output"):
            x = norms_of(adapter, self.norms)["attention_norm"](x)
        self.attention.remember(x, view, step, adapter, stream)

    def adapter(self, step: Step) -> Adapter | None:
        """Return the adapter of the step's loop, if loops have adapters."""
        return cast(Adapter, self.adapters[step.loop_index]) if self.adapters else None

    def enter(self, x: Tensor, positions: Positions, step: Step, injected: Tensor | None) -> Tensor:
        """Return the step's input [B, S, D]: x with the injected state and the level encoding."""
        if injected is not None:
            x = self.inject(x, injected)
        return x if positions.sinusoids_BSD is None else x + positions.encoding(step).to(x.dtype)

    def inject(self, x: Tensor, injected: Tensor) -> Tensor:
        """Return x + e, or W [x, e] + b if the block has an injection layer."""
        if self.injection is None:
            return x + injected
        mixed: Tensor = self.injection(torch.cat([x, injected], dim=-1))
        return mixed

    def drop(self, x: Tensor, positions: Positions, keys: SiteKeys, site: str) -> Tensor:
        """Apply dropout to a residual branch."""
        if site not in keys:
            return x
        return dropout(x, self.rates[site], keys[site], positions.rows())
