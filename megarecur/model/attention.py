"""Causal grouped-query attention. Shapes: B samples, S positions, D hidden, N heads, H head_dim."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarecur.config.schema import ModelConfig
from megarecur.model.context import Context, Keys
from megarecur.model.positions import rotate
from megarecur.parallel.linear import Linear, MakeParameter, apply_all
from megarecur.parallel.random import dropout
from megarecur.parallel.regions import ALONE, TensorParallel
from megarecur.recurrence.inventory import biased_projections
from megarecur.recurrence.layer_map import Step


class Attention(nn.Module):
    """Query head i reads key head i // (num_heads / num_kv_heads) (Ainslie et al. 2023)."""

    def __init__(
        self,
        name: str,
        make: MakeParameter,
        model: ModelConfig,
        dtype: torch.dtype,
        tp: TensorParallel = ALONE,
    ) -> None:
        super().__init__()
        biased = biased_projections(model)
        self.query = Linear(f"{name}.query", make, dtype, "q" in biased, tp, "outputs")
        self.key = Linear(f"{name}.key", make, dtype, "k" in biased, tp, "outputs")
        self.value = Linear(f"{name}.value", make, dtype, "v" in biased, tp, "outputs")
        self.output = Linear(f"{name}.output", make, dtype, "o" in biased, tp, "inputs")
        self.head_dim = model.head_dim
        # Of this rank, which may hold a key head that others hold too.
        num_heads, num_kv_heads = (
            len(layer.weight.parameter) // model.head_dim for layer in (self.query, self.key)
        )
        self.groups = num_heads // num_kv_heads
        self.first_head = tp.rank * num_heads
        self.interleaved = model.rope_interleaved
        self.dropout = model.attention_dropout

    def forward(self, x_BSD: Tensor, ctx: Context, step: Step, keys: Keys) -> Tensor:
        """[B, S, D] to [B, S, D]; keys and values of earlier tokens come from ctx.cache."""
        q, k, v = (t.transpose(1, 2) for t in self.project(x_BSD, ctx, step))
        if "attention" in keys:
            out = self.attend_with_dropout(q, k, v, ctx, keys["attention"])
        else:
            # In the dtype of products, which a CPU without bf16 instructions takes wider.
            q, k, v = (t.to(self.query.weight.product_dtype) for t in (q, k, v))
            mask = None if ctx.mask is None else ctx.mask.to(q.dtype)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=ctx.is_causal, enable_gqa=self.groups > 1
            )
        return self.output(out.transpose(1, 2).flatten(2).to(x_BSD.dtype))

    def project(self, x_BSD: Tensor, ctx: Context, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, S, N, H] of these tokens, keys and values [B, K, N, H] of all so far, the new
        ones kept in ctx.cache."""
        qkv = apply_all((self.query, self.key, self.value), x_BSD)
        q_BSNH, k_BSNH, v_BSNH = (t.unflatten(-1, (-1, self.head_dim)) for t in qkv)
        if ctx.rotation is not None:
            q_BSNH = rotate(q_BSNH, ctx.rotation, self.interleaved)
            k_BSNH = rotate(k_BSNH, ctx.rotation, self.interleaved)
        if ctx.cache is not None:
            k_BSNH, v_BSNH = ctx.cache.append((step.block, step.loop_index), k_BSNH, v_BSNH)
        return q_BSNH, k_BSNH, v_BSNH

    def attend_with_dropout(
        self, q_BNSH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, ctx: Context, where: Tensor
    ) -> Tensor:
        """The math path: weights are materialised, as their mask is a function of coordinates."""
        k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k_BNSH, v_BNSH))
        wide = torch.promote_types(q_BNSH.dtype, torch.float32)
        scores = (q_BNSH @ k.transpose(-1, -2)).to(wide) / math.sqrt(self.head_dim)
        if ctx.mask is not None:
            scores = scores + ctx.mask
        elif ctx.is_causal:
            length = scores.shape[-1]
            future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        weights = scores.softmax(-1)
        heads = torch.arange(q_BNSH.shape[1], device=scores.device)[None, :, None]
        heads = heads + self.first_head
        samples, positions = ctx.all_rows()
        rows = (samples[:, :, None], heads, positions[:, None, :])
        weights = dropout(weights, self.dropout, where, rows)
        return weights.to(v.dtype) @ v
