"""Keys and values of earlier tokens, and of source sentences, one entry per step of the map.

A block that runs r times sees r different hidden states per token, so that r sets of keys and
values exist: an entry belongs to (block, loop_index), never to a block.
Shapes: B samples, S new tokens, K tokens so far, N key heads, H head_dim.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megarecur.batch import Sentences
from megarecur.model.context import Context, CrossView, build_context, see_source
from megarecur.model.temporal import Carried, build_chunks
from megarecur.model.transformer import Transformer

SMALLEST_CAPACITY = 64


class Cache:
    """Keys and values of earlier tokens during generation, for samples of equal length.

    One forward pass over S tokens appends S keys and values to every executed step of the map; its
    caller then calls `advance(S)`.

    Args:
        capacity: tokens to allocate room for; further tokens cost a copy.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.length = 0
        """Tokens of the completed forward passes."""
        self.entries: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        """Keys and values [B, capacity, N, H] by (block, loop_index)."""
        self.capacity = max(capacity, SMALLEST_CAPACITY)
        self.carried: Carried | None = None
        """State of a model with a temporal memory: the memory, and the cache of the incomplete
        chunk; `entries` then belongs to that chunk."""
        self.of_source: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        """Keys and values of source sentences [B, K, N, H] by (block, loop_index)."""

    def find(self, step: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """Return the keys and values of source sentences of a step of the map, if kept."""
        return self.of_source.get(step)

    def keep(self, step: tuple[int, int], made: tuple[Tensor, Tensor]) -> None:
        """Keep the keys and values of source sentences of a step of the map."""
        self.of_source[step] = made

    def select(self, rows_b: Tensor, of_source: bool = True) -> None:
        """Keep the samples `rows_b`, in this order; a sample may occur several times.

        Args:
            of_source: False leaves the keys and values of source sentences as they are, since every
                row has the sentence that it had.
        """

        def reorder(buffer: Tensor) -> Tensor:
            chosen = buffer.new_empty(len(rows_b), *buffer.shape[1:])
            chosen[:, : self.length] = buffer[:, : self.length].index_select(0, rows_b)
            return chosen

        for step, (k, v) in self.entries.items():
            self.entries[step] = reorder(k), reorder(v)
        for step, (k, v) in self.of_source.items() if of_source else ():
            self.of_source[step] = k.index_select(0, rows_b), v.index_select(0, rows_b)

    def append(
        self, step: tuple[int, int], k_BSNH: Tensor, v_BSNH: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens; returns all so far, [B, K, N, H] each.

        Args:
            step: (block, loop_index) of the step of the map.
        """
        total = self.length + k_BSNH.shape[1]
        while self.capacity < total:
            self.capacity *= 2
        kept = []
        for i, new in enumerate((k_BSNH, v_BSNH)):
            buffer = self.entries[step][i] if step in self.entries else None
            if buffer is None or buffer.shape[1] < total:
                buffer = self.grow(buffer, new)
            buffer[:, self.length : total] = new
            kept.append(buffer)
        self.entries[step] = kept[0], kept[1]
        return kept[0][:, :total], kept[1][:, :total]

    def grow(self, buffer: Tensor | None, like: Tensor) -> Tensor:
        """Return a buffer of the current capacity with the contents of the old one."""
        grown = like.new_empty(like.shape[0], self.capacity, *like.shape[2:])
        if buffer is not None:
            grown[:, : self.length] = buffer[:, : self.length]
        return grown

    def advance(self, num_tokens: int) -> None:
        """Record that a forward pass over `num_tokens` tokens has ended."""
        self.length += num_tokens

    def clear(self) -> None:
        """Remove all tokens, but keep the allocated memory."""
        self.length = 0

    def carry(self) -> Carried:
        """Return the state carried from chunk to chunk."""
        if self.carried is None:
            self.carried = Carried(cache=Cache())
        return self.carried


def context_after(
    model: Transformer,
    tokens_BS: Tensor,
    cache: Cache | None,
    seed: int = 0,
    samples_B: Tensor | None = None,
    source: Sentences | None = None,
) -> Context:
    """Return the context of tokens that follow the cached ones; those of a translation attend to
    the sentences `source`."""
    batch, length = tokens_BS.shape
    past = cache.length if cache is not None else 0
    positions_BS = torch.arange(past, past + length, device=tokens_BS.device).expand(batch, -1)
    if model.config.temporal is not None:
        return build_chunks(
            model.config,
            positions_BS,
            model.dtype,
            backend=model.attention.backend,
            carried=None if cache is None else cache.carry(),
            sample_ids_B=samples_B,
            seed=seed,
            tp=model.tp,
        )
    ctx = build_context(
        model.config.model,
        positions_BS,
        model.dtype,
        backend=model.attention.backend,
        sample_ids_B=samples_B,
        seed=seed,
        cache=cache,
        tp=model.tp,
    )
    if source is None:
        return ctx
    seen = see_source(source, (batch, length), model.attention.backend, model.dtype)
    return replace(ctx, cross=CrossView(seen, cache))
