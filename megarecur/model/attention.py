"""Grouped-query attention. Shapes: B samples, S positions, D hidden, N heads, H head_dim."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megarecur.attention.attend import attend
from megarecur.attention.scores import Drop, Scores
from megarecur.attention.visibility import Visibility
from megarecur.config.model import ModelConfig
from megarecur.model.adapters import Adapter, deltas_of, norms_of
from megarecur.model.context import AttentionView, CrossView, Positions, SiteKeys
from megarecur.model.norm import build_head_norm
from megarecur.model.positions import rotate
from megarecur.parallel.context import WHOLE, ContextParallel
from megarecur.parallel.linear import Linear, MakeParameter, apply_all
from megarecur.parallel.regions import ALONE, TensorParallel
from megarecur.recurrence.inventory import HEAD_NORMS, biased_projections
from megarecur.recurrence.layer_map import Step


class MultiHead(nn.Module):
    """The four matrices of attention for this rank's heads, and the attention operation.

    Query head i reads key head i // (num_heads / num_kv_heads) (Ainslie et al. 2023).
    """

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
        scale = model.attention_scale or model.head_dim**-0.5
        self.scores, self.dropout = Scores(scale, model.attention_softcap), model.attention_dropout
        self.first_head = tp.rank * (len(self.query.weight.parameter) // model.head_dim)

    def attend(
        self,
        qkv: Iterable[Tensor],
        seen: Visibility,
        where: Tensor | None,
        rows: tuple[Tensor, Tensor] | None,
        cp: ContextParallel = WHOLE,
    ) -> Tensor:
        """Return the mixed values [B, S, N H], before the output projection.

        Args:
            qkv: queries [B, S, N, H], keys and values [B, K, N or fewer, H].
            seen: which keys each query sees.
            where: random key for dropout of attention weights; None: no dropout.
            rows: (sample, position) of queries, the coordinates of dropout; None: no dropout.
            cp: the ranks that share each sequence; S, K and the result are this rank's positions,
                `seen` and `rows` are of all positions.
        """
        q, k, v = cp.gather_positions(*qkv)
        # Products use `product_dtype`: a CPU without bf16 instructions multiplies in fp32.
        q, k, v = (t.to(self.query.weight.product_dtype) for t in (q, k, v))
        drop = None
        if where is not None:
            assert rows is not None
            first = self.first_head + cp.rank * q.shape[2]
            drop = Drop(self.dropout, where, *rows, first)
        return cp.gather_heads(attend((q, k, v), self.scores, seen, drop)).flatten(2)


class CrossAttention(MultiHead):
    """Attention of one sequence to another, without positions."""

    def forward(
        self,
        x_BSD: Tensor,
        source_BKD: Tensor,
        view: CrossView,
        where: Tensor | None,
        rows: tuple[Tensor, Tensor],
        step: Step | None = None,
    ) -> Tensor:
        """Attend from [B, S, D] to [B, K, D]; returns [B, S, D].

        Args:
            x_BSD: input of the queries.
            source_BKD: input of keys and values.
            view: which keys each query sees, and the cache of keys and values.
            where: random key for dropout of attention weights; None: no dropout.
            rows: (sample, position) of x, the coordinates of dropout.
            step: the step of the map, if there is a cache.
        """
        q_BSNH = self.query(x_BSD).unflatten(-1, (-1, self.head_dim))
        mixed = self.attend((q_BSNH, *self.read(source_BKD, view, step)), view.seen, where, rows)
        out: Tensor = self.output(mixed.to(x_BSD.dtype))
        return out

    def read(self, source_BKD: Tensor, view: CrossView, step: Step | None) -> tuple[Tensor, Tensor]:
        """Return keys and values, [B, K, N, H] each: kept ones if the cache has them."""
        cache, place = view.cache, (-1, -1)
        if cache is not None:
            assert step is not None
            place = step.block, step.loop_index
            if (kept := cache.find(place)) is not None:
                return kept
        k_BKNH, v_BKNH = (
            t.unflatten(-1, (-1, self.head_dim))
            for t in apply_all((self.key, self.value), source_BKD)
        )
        if cache is not None:
            cache.keep(place, (k_BKNH, v_BKNH))
        return k_BKNH, v_BKNH


class Attention(MultiHead):
    """Self-attention with positions and a cache of keys and values."""

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
        """Norms of queries and keys, if the model has them and loops do not own them."""
        for norm in HEAD_NORMS if model.qk_norm and own_norms else ():
            self.norms[norm] = build_head_norm(model, f"{name}.{norm}", make, tp)

    def forward(
        self,
        x_BSD: Tensor,
        view: AttentionView,
        positions: Positions,
        step: Step,
        keys: SiteKeys,
        adapter: Adapter | None,
        stream_BSD: Tensor | None = None,
        source_BSD: Tensor | None = None,
    ) -> Tensor:
        """Attend to these tokens and to cached ones: [B, S, D] to [B, S, D].

        Args:
            x_BSD: input of the queries, and of keys and values if `source_BSD` is None.
            view: visible keys, rotation and cache.
            positions: positions of the tokens, for dropout.
            step: the step of the map.
            keys: keys of dropout by site.
            adapter: adapter of this loop, if loops have adapters.
            stream_BSD: the stream before its norm, which some adapters read; None: x.
            source_BSD: input of keys and values; None: x.
        """
        qkv = self.project(x_BSD, view, step, adapter, stream_BSD, source_BSD)
        if view.pages is not None:
            dtype = self.query.weight.product_dtype
            mixed = view.pages.attend(step.block, qkv[0], self.scores, dtype).flatten(2)
        else:
            where = keys.get("attention")
            rows = None if where is None else positions.all_rows()
            mixed = self.attend(qkv, view.seen, where, rows, positions.cp)
        out: Tensor = self.output(mixed.to(x_BSD.dtype), *deltas_of(adapter, "output"))
        return out

    def project(
        self,
        x_BSD: Tensor,
        view: AttentionView,
        step: Step,
        adapter: Adapter | None,
        stream_BSD: Tensor | None = None,
        source_BSD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B, S, N, H] of these tokens, and keys and values [B, K, N, H] of all so
        far, or of these tokens alone if keys are paged. New keys and values are added to the view's
        cache or pages. Arguments: see `forward`."""
        deltas = deltas_of(adapter, "query", "key", "value")
        if source_BSD is None:
            tap = stream_BSD if adapter is not None and adapter.reads_stream else None
            qkv = apply_all((self.query, self.key, self.value), x_BSD, deltas, tap)
        else:
            assert adapter is None, "maps that halt have no adapters"
            of_source = apply_all((self.key, self.value), source_BSD)
            qkv = (self.query(x_BSD), *of_source)
        q_BSNH, k_BSNH, v_BSNH = (t.unflatten(-1, (-1, self.head_dim)) for t in qkv)
        norms = norms_of(adapter, self.norms)
        if "query_norm" in norms:
            q_BSNH, k_BSNH = norms["query_norm"](q_BSNH), norms["key_norm"](k_BSNH)
        if view.pages is not None and view.rotation is not None and view.key_rotation is None:
            # One small operation on all heads costs half of two.
            both = rotate(torch.cat((q_BSNH, k_BSNH), 2), view.rotation, self.interleaved)
            q_BSNH, k_BSNH = both.split_with_sizes([q_BSNH.shape[2], k_BSNH.shape[2]], 2)
        elif view.rotation is not None:
            q_BSNH = rotate(q_BSNH, view.rotation, self.interleaved)
            k_BSNH = rotate(k_BSNH, view.key_rotation or view.rotation, self.interleaved)
        return q_BSNH, *keep(view, step, k_BSNH, v_BSNH)

    def remember(
        self,
        x_BSD: Tensor,
        view: AttentionView,
        step: Step,
        adapter: Adapter | None,
        stream_BSD: Tensor,
    ) -> None:
        """Add the keys and values of these tokens to the view's cache or pages, without queries.
        Arguments: see `forward`."""
        deltas = deltas_of(adapter, "key", "value")
        tap = stream_BSD if adapter is not None and adapter.reads_stream else None
        kv = apply_all((self.key, self.value), x_BSD, deltas, tap)
        k_BSNH, v_BSNH = (t.unflatten(-1, (-1, self.head_dim)) for t in kv)
        norms = norms_of(adapter, self.norms)
        if "key_norm" in norms:
            k_BSNH = norms["key_norm"](k_BSNH)
        if view.rotation is not None:
            k_BSNH = rotate(k_BSNH, view.key_rotation or view.rotation, self.interleaved)
        keep(view, step, k_BSNH, v_BSNH)


def keep(view: AttentionView, step: Step, k_BSNH: Tensor, v_BSNH: Tensor) -> tuple[Tensor, Tensor]:
    """Add keys and values of new tokens to the view's cache or pages. Returns all so far, [B, K, N,
    H] each; those of the new tokens if keys are paged or not kept."""
    if view.cache is not None:
        return view.cache.append((step.block, step.loop_index), k_BSNH, v_BSNH)
    if view.pages is not None:
        view.pages.write(step.block, k_BSNH, v_BSNH)
    return k_BSNH, v_BSNH
