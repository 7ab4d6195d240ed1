"""Grouped-query attention. Shapes: B samples, S positions, D hidden, N heads, H head_dim."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarecur.config.schema import ModelConfig
from megarecur.model.adapters import Adapter, deltas_of, norms_of
from megarecur.model.context import Context, Keys
from megarecur.model.norm import build_norm
from megarecur.model.positions import rotate
from megarecur.parallel.linear import Linear, MakeParameter, apply_all
from megarecur.parallel.random import dropout
from megarecur.parallel.regions import ALONE, TensorParallel
from megarecur.recurrence.inventory import HEAD_NORMS, biased_projections
from megarecur.recurrence.layer_map import Step


class MultiHead(nn.Module):
    """The four matrices of an attention, of the heads that this rank holds, and what queries read
    of values: query head i reads key head i // (num_heads / num_kv_heads) (Ainslie et al. 2023)."""

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
        self.scale = model.attention_scale or model.head_dim**-0.5
        self.softcap, self.dropout = model.attention_softcap, model.attention_dropout
        # A key head may be held by other ranks too.
        num_heads, num_kv_heads = (
            len(layer.weight.parameter) // model.head_dim for layer in (self.query, self.key)
        )
        self.groups = num_heads // num_kv_heads
        self.first_head = tp.rank * num_heads

    def attend(
        self,
        qkv: Iterable[Tensor],
        mask: Tensor | None,
        where: Tensor | None,
        rows: tuple[Tensor, Tensor] | None,
        is_causal: bool = False,
    ) -> Tensor:
        """[B, S, N H], before the output's matrix.

        Args:
            qkv: queries [B, S, N, H], keys and values [B, K, N or fewer, H].
            mask: added to scores, broadcasts to [B, N, S, K].
            where: the key of dropout of attention weights, if there is any.
            rows: its coordinates, (sample, position) of queries; None where there is none.
            is_causal: without a mask, a query sees keys up to its own place.
        """
        # In the dtype of products, which a CPU without bf16 instructions takes wider.
        q, k, v = (t.transpose(1, 2).to(self.query.weight.product_dtype) for t in qkv)
        mask = None if mask is None else mask.to(q.dtype)
        if where is None and self.softcap is None:
            out = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=is_causal, scale=self.scale, enable_gqa=self.groups > 1
            )
            return out.transpose(1, 2).flatten(2)
        # The math path: for a cap of scores, or since dropout is a function of coordinates.
        k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
        scores = scores * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if mask is not None:
            scores = scores + mask
        elif is_causal:
            length = scores.shape[-1]
            future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        weights = scores.softmax(-1)
        if where is not None:
            assert rows is not None
            samples, positions = rows
            heads = torch.arange(weights.shape[1], device=weights.device)[None, :, None]
            places = (samples[:, :, None], heads + self.first_head, positions[:, None, :])
            weights = dropout(weights, self.dropout, where, places)
        return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


class Attention(MultiHead):
    """Of a sequence to itself, with positions and a cache."""

    def __init__(
        self,
        name: str,
        make: MakeParameter,
        model: ModelConfig,
        dtype: torch.dtype,
        tp: TensorParallel = ALONE,
        own_norms: bool = True,
    ) -> None:
        super().__init__(name, make, model, dtype, tp)
        self.interleaved = model.rope_interleaved
        self.norms = nn.ModuleDict()
        """Of queries and keys, over head_dim, where there are such and no loop has its own."""
        for norm in HEAD_NORMS if model.qk_norm and own_norms else ():
            self.norms[norm] = build_norm("rms", f"{name}.{norm}", make, model.norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        ctx: Context,
        step: Step,
        keys: Keys,
        adapter: Adapter | None,
        stream_BSD: Tensor | None = None,
    ) -> Tensor:
        """[B, S, D] to [B, S, D]; keys and values of earlier tokens come from ctx.cache. The stream
        is what x is the norm of, which some adapters read; None: x."""
        qkv = self.project(x_BSD, ctx, step, adapter, stream_BSD)
        where = keys.get("attention")
        rows = None if where is None else ctx.all_rows()
        mixed = self.attend(qkv, ctx.mask, where, rows, ctx.is_causal)
        return self.output(mixed.to(x_BSD.dtype), *deltas_of(adapter, "output"))

    def project(
        self,
        x_BSD: Tensor,
        ctx: Context,
        step: Step,
        adapter: Adapter | None,
        stream_BSD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, S, N, H] of these tokens, keys and values [B, K, N, H] of all so far, the new
        ones kept in ctx.cache."""
        deltas = deltas_of(adapter, "query", "key", "value")
        if ctx.source_BSD is None:
            tap = stream_BSD if adapter is not None and adapter.reads_stream else None
            qkv = apply_all((self.query, self.key, self.value), x_BSD, deltas, tap)
        else:
            assert adapter is None, "maps that halt have no adapters"
            of_source = apply_all((self.key, self.value), ctx.source_BSD)
            qkv = (self.query(x_BSD), *of_source)
        q_BSNH, k_BSNH, v_BSNH = (t.unflatten(-1, (-1, self.head_dim)) for t in qkv)
        norms = norms_of(adapter, self.norms)
        if "query_norm" in norms:
            q_BSNH, k_BSNH = norms["query_norm"](q_BSNH), norms["key_norm"](k_BSNH)
        if ctx.rotation is not None:
            q_BSNH = rotate(q_BSNH, ctx.rotation, self.interleaved)
            k_BSNH = rotate(k_BSNH, ctx.key_rotation or ctx.rotation, self.interleaved)
        if ctx.cache is not None:
            k_BSNH, v_BSNH = ctx.cache.append((step.block, step.loop_index), k_BSNH, v_BSNH)
        return q_BSNH, k_BSNH, v_BSNH
