"""The temporal latent bottleneck: a memory of a few slots, carried from chunk to chunk of a text
(Didolkar et al. 2022; Ray Chowdhury & Caragea 2024, section 3).

A fast stream, the layer map, reads one chunk of tokens at a time; in every step it also attends to
the memory. A slow stream, the update layers, then writes the memory from what the chunk came out
as. Cost grows linearly with the length of a text, and no token sees another chunk but through the
memory.

Shapes: B samples, S positions of a sample, C positions of a chunk, M slots, D hidden, N heads, H
head_dim. A document ends inside a sample only where documents are given; then the initial memory
lies behind the carried one, 2 M slots, and every token reads that of its own document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from megarecur.config.schema import Config, ModelConfig, TemporalConfig
from megarecur.errors import ConfigError
from megarecur.model.attention import MultiHead
from megarecur.model.context import Context, Keys, KeysAndValues, build_context
from megarecur.model.feed_forward import FEED_FORWARDS
from megarecur.model.halting import find_documents
from megarecur.model.norm import build_norm
from megarecur.parallel.linear import MakeParameter, apply_all
from megarecur.parallel.random import dropout, key_words
from megarecur.parallel.regions import ALONE, TensorParallel


class OpenChunk(KeysAndValues, Protocol):
    """The cache of a chunk that is not complete yet."""

    def advance(self, num_tokens: int) -> None:
        """A forward pass over so many tokens is over."""

    def clear(self) -> None:
        """The next chunk begins."""


@dataclass
class Carried:
    """What is carried on where a text is read piece by piece: give the same object to the context
    of every piece. Of samples of equal length, one document each, outside of the graph."""

    memory_BMD: Tensor | None = None
    """Written by the chunks that are complete; None: the initial one."""
    length: int = 0
    """Tokens so far."""
    outputs: list[Tensor] = field(default_factory=list)
    """What the tokens of the open chunk came out as, [B, ., D] each piece."""
    cache: OpenChunk | None = None
    """Keys and values of the open chunk. None: every piece but the last is whole chunks."""

    def end_piece(self, length: int, complete: bool, memory_BMD: Tensor) -> None:
        """So many tokens have run, which complete their chunk or do not."""
        self.length += length
        self.memory_BMD = memory_BMD.detach()
        if complete:
            self.outputs = []
        if self.cache is not None:
            self.cache.advance(length)
            if complete:
                self.cache.clear()


@dataclass(frozen=True)
class Chunk:
    """A chunk of every sample, or the part of it that a call reads."""

    start: int
    stop: int
    """Its positions among those of the call."""
    offset: int
    """Tokens of the same chunk that were read before."""
    ctx: Context
    """Of these positions alone, which restart; the memory comes in when it is read."""
    read_mask: Tensor | None = None
    """Added to scores of reading, [B, 1, C, 2 M]; None: all of the one memory is read."""
    write_mask: Tensor | None = None
    """Added to scores of writing, [B, 1, 1 or M, C]; None: all tokens are written."""
    fresh_B: Tensor | None = None
    """Samples whose memory is of another document than what this chunk writes."""
    real_B: Tensor | None = None
    """Samples of which this chunk has a token; others keep their memory and their tokens."""
    cut_B: Tensor | None = None
    """Samples whose memory is cut from its past before this chunk (`backward_chunks`)."""


@dataclass(frozen=True)
class Chunks:
    """How the samples of a call are read, and what was carried there."""

    chunks: tuple[Chunk, ...]
    carried: Carried | None = None


def build_chunks(
    config: Config,
    positions_BS: Tensor,
    dtype: torch.dtype,
    *,
    documents_BS: Tensor | None = None,
    carried: Carried | None = None,
    lengths: Sequence[int] | None = None,
    **surroundings: object,
) -> Context:
    """The context of samples that are read chunk by chunk (`context.build_context`).

    Args:
        config: with a section `temporal`.
        positions_BS: position of every token in its document; those in their chunks follow.
        dtype: compute dtype, for the masks.
        documents_BS: which document a token belongs to, -1 for padding; None: one per sample.
        carried: of the tokens before these, and to be carried on.
        lengths: of the chunks instead of `temporal.chunk_length`, for comparison with code that
            cuts otherwise.
        surroundings: further arguments of `build_context`.

    Raises:
        ConfigError: pieces of a text that only whole chunks of can be read.
    """
    temporal = config.temporal
    assert temporal is not None
    batch, length = positions_BS.shape
    device = positions_BS.device
    past = carried.length if carried is not None else 0
    offset = past % temporal.chunk_length
    if offset and carried is not None and carried.cache is None:
        raise ConfigError(
            f"{past} tokens were read before, which are no whole chunks of temporal.chunk_length="
            f"{temporal.chunk_length}; end every piece but the last with a chunk"
        )
    if config.halting is not None and carried is not None and carried.cache is not None:
        raise ConfigError(
            f"recurrence.halting.mode={config.halting.mode} needs the states of all tokens of a "
            "chunk at every step; carry no cache, and read whole chunks"
        )
    spans = cut(length, offset, temporal.chunk_length, lengths)
    starts = torch.tensor([a - (offset if i == 0 else 0) for i, (a, _) in enumerate(spans)])
    sizes = torch.tensor([b - a for a, b in spans])
    within_S = torch.arange(length) - starts.repeat_interleave(sizes)
    within_BS = torch.minimum(positions_BS, within_S.to(device)) if past == 0 else None
    if within_BS is None:  # One document, so that its chunks alone tell positions.
        within_BS = within_S.to(device).expand(batch, -1)
    surroundings = {**surroundings, "documents_BS": None}
    shared: dict[int, Context] = {}

    def context(index: int) -> Context:
        """Chunks of one length without documents differ in nothing but where they begin."""
        start, stop = spans[index]
        resumed = carried.cache if carried is not None and index == 0 else None
        found = shared.get(stop - start) if documents_BS is None and resumed is None else None
        if found is None:
            own = dict(surroundings)
            if documents_BS is not None:
                own["documents_BS"] = documents_BS[:, start:stop]
            found = build_context(
                config.model,
                within_BS[:, start:stop],
                dtype,
                cache=resumed,
                **own,  # type: ignore[arg-type]
            )
            if documents_BS is None and resumed is None:
                shared[stop - start] = found
        first = torch.tensor(past + start, device=device)
        found = replace(found, first=first, cache=carried.cache if carried is not None else None)
        if found.sliding is not None:
            found = replace(found, sliding=replace(found.sliding, first=first, cache=found.cache))
        return found

    chunks = [
        Chunk(start, stop, offset if i == 0 else 0, context(i))
        for i, (start, stop) in enumerate(spans)
    ]
    if documents_BS is not None:
        chunks = mask_documents(chunks, documents_BS, temporal.num_slots, dtype)
    if config.halting is not None:
        chunks = share_halting(chunks, documents_BS, batch)
    if temporal.backward_chunks is not None:
        chunks = cut_past(chunks, temporal.backward_chunks, batch, device)
    counts: list[Tensor] = []  # of halting, in all chunks
    chunks = [replace(chunk, ctx=replace(chunk.ctx, counts=counts)) for chunk in chunks]
    # Of the whole call: embedding, dropout there, and what the loss is told.
    whole = replace(
        chunks[0].ctx,
        positions_BS=within_BS,
        mask=None,
        rotation=None,
        key_rotation=None,
        sliding=None,
        first=None if past == 0 else torch.tensor(past, device=device),
        documents_BS=documents_BS,
    )
    return replace(whole, chunks=Chunks(tuple(chunks), carried))


def cut(
    length: int, offset: int, chunk_length: int, lengths: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """(start, stop) of each chunk of a call over `length` tokens, the first of which continues one
    that has `offset` tokens."""
    if lengths is not None:
        assert sum(lengths) == length, "chunks must make up the sample"
        ends = torch.tensor(lengths).cumsum(0).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))
    ends = [*range(chunk_length - offset, length, chunk_length), length]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def mask_documents(
    chunks: Sequence[Chunk], documents_BS: Tensor, num_slots: int, dtype: torch.dtype
) -> list[Chunk]:
    """The chunks with what keeps documents apart, and padding out of the memory.

    The memory belongs to the document of the last real token that was written. Tokens of that one
    read it, others read the initial memory; a document that goes on in the next chunk is written on
    top of its memory, another one on top of the initial memory.
    """
    owner_B = documents_BS[:, 0]  # Before the first chunk both are the initial memory.
    made = []
    for chunk in chunks:
        documents_BC = documents_BS[:, chunk.start : chunk.stop]
        real_BC = documents_BC >= 0
        order = torch.arange(1, documents_BC.shape[1] + 1, device=documents_BC.device)
        last_B1 = (real_BC * order).argmax(1, keepdim=True)
        writer_B = documents_BC.gather(1, last_B1)[:, 0]
        real_B = real_BC.any(1)
        carried_BC = documents_BC == owner_B[:, None]
        allowed_BCM = torch.stack((carried_BC, ~carried_BC), -1).repeat_interleave(num_slots, -1)
        written_BC = documents_BC == writer_B[:, None]
        made.append(
            replace(
                chunk,
                read_mask=additive(allowed_BCM[:, None], dtype),
                write_mask=additive(written_BC[:, None, None], dtype),
                fresh_B=writer_B != owner_B,
                real_B=real_B,
            )
        )
        owner_B = torch.where(real_B, writer_B, owner_B)
    return made


def share_halting(chunks: Sequence[Chunk], documents_BS: Tensor | None, batch: int) -> list[Chunk]:
    """The chunks with what the cost of halting there counts for, so that the cost of a document is
    the mean over its chunks."""
    device = chunks[0].ctx.positions_BS.device
    sizes = torch.tensor([chunk.stop - chunk.start for chunk in chunks], device=device)
    if documents_BS is None:
        shares_BS = torch.full((batch, int(sizes.sum())), 1.0 / len(chunks), device=device)
    else:
        documents = find_documents(documents_BS, documents_BS)
        chunk_S = torch.arange(len(chunks), device=device).repeat_interleave(sizes)
        last_BS = documents.start_BS + documents.length_BS - 1
        shares_BS = 1.0 / (chunk_S[last_BS] - chunk_S[documents.start_BS] + 1)
    return [
        replace(c, ctx=replace(c.ctx, shares_BS=shares_BS[:, c.start : c.stop])) for c in chunks
    ]


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed, -inf elsewhere."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, float("-inf"))


def cut_past(
    chunks: Sequence[Chunk], backward_chunks: int, batch: int, device: torch.device
) -> list[Chunk]:
    """The chunks with the samples whose memory is cut before each: every so many chunks, counted
    from a sample's last one that is not padding, so that padding changes nothing."""
    first = chunks[0]
    if first.real_B is None:
        count_B = torch.full((batch,), len(chunks), device=device)
    else:
        count_B = sum(
            (chunk.real_B.long() for chunk in chunks if chunk.real_B is not None),
            torch.zeros(batch, dtype=torch.long, device=device),
        )
    made = [first]
    for i, chunk in enumerate(chunks[1:], 1):
        cut_B = ((count_B - i) % backward_chunks == 0) & (count_B > i)
        made.append(replace(chunk, cut_B=cut_B))
    return made


class CrossAttention(MultiHead):
    """Attention of one sequence to another, without positions."""

    def forward(
        self,
        x_BSD: Tensor,
        source_BKD: Tensor,
        mask: Tensor | None,
        where: Tensor | None,
        rows: tuple[Tensor, Tensor],
    ) -> Tensor:
        """What [B, S, D] reads of [B, K, D].

        Args:
            x_BSD: queries are of these.
            source_BKD: keys and values are of these.
            mask: added to scores, broadcasts to [B, N, S, K].
            where: the key of dropout of attention weights, if there is any.
            rows: its coordinates, (sample, position) of x.
        """
        made = (self.query(x_BSD), *apply_all((self.key, self.value), source_BKD))
        qkv = [t.unflatten(-1, (-1, self.head_dim)) for t in made]
        return self.output(self.attend(qkv, mask, where, rows).to(x_BSD.dtype))


class MemoryReader(nn.Module):
    """What a block adds to its stream: CrossAttention(N1(x) -> N2(memory))."""

    def __init__(
        self,
        name: str,
        make: MakeParameter,
        model: ModelConfig,
        dtype: torch.dtype,
        tp: TensorParallel = ALONE,
    ) -> None:
        super().__init__()
        self.norm = build_norm(model.norm, f"{name}.memory_attention_norm", make, model.norm_eps)
        self.source_norm = build_norm(model.norm, f"{name}.memory_norm", make, model.norm_eps)
        self.attention = CrossAttention(f"{name}.memory_attention", make, model, dtype, tp)

    def forward(self, x_BCD: Tensor, ctx: Context, keys: Keys) -> Tensor:
        """[B, C, D] to [B, C, D]."""
        assert ctx.memory_BMD is not None
        return self.attention(
            self.norm(x_BCD),
            self.source_norm(ctx.memory_BMD),
            ctx.memory_mask,
            keys.get("read_attention"),
            ctx.all_rows(),
        )


class UpdateLayer(nn.Module):
    """m + CrossAttention(N1(m) -> N2(x)), then m + FFN(N3(m)): one layer of the slow stream."""

    def __init__(
        self,
        name: str,
        make: MakeParameter,
        model: ModelConfig,
        dtype: torch.dtype,
        tp: TensorParallel = ALONE,
    ) -> None:
        super().__init__()
        self.name, self.rates = name, (model.dropout, model.attention_dropout)
        self.memory_norm = build_norm(model.norm, f"{name}.memory_norm", make, model.norm_eps)
        self.input_norm = build_norm(model.norm, f"{name}.input_norm", make, model.norm_eps)
        self.attention = CrossAttention(f"{name}.attention", make, model, dtype, tp)
        self.feed_forward_norm = build_norm(
            model.norm, f"{name}.feed_forward_norm", make, model.norm_eps
        )
        feed_forward = FEED_FORWARDS[model.feed_forward]
        self.feed_forward = feed_forward(f"{name}.feed_forward", make, model, dtype, tp)

    def forward(
        self,
        memory_BMD: Tensor,
        x_BCD: Tensor,
        mask: Tensor | None,
        ctx: Context,
        rows: tuple[Tensor, Tensor],
    ) -> Tensor:
        """[B, M, D] to [B, M, D]; rows: (sample, slot of a chunk), for dropout."""
        rate, attention_rate = self.rates

        def where(site: str, probability: float) -> Tensor | None:
            if not (ctx.training and probability > 0.0):
                return None
            return key_words(ctx.where(f"{self.name} {site}"), memory_BMD.device)

        def drop(branch: Tensor, site: str) -> Tensor:
            place = where(site, rate)
            return branch if place is None else dropout(branch, rate, place, rows)

        place = where("attention", attention_rate)
        read = self.attention(
            self.memory_norm(memory_BMD), self.input_norm(x_BCD), mask, place, rows
        )
        memory_BMD = memory_BMD + drop(read, "mix")
        fed = self.feed_forward(self.feed_forward_norm(memory_BMD))
        return memory_BMD + drop(fed, "feed")


class Memory(nn.Module):
    """The initial memory, and the layers that write it."""

    def __init__(
        self, config: Config, make: MakeParameter, dtype: torch.dtype, tp: TensorParallel = ALONE
    ) -> None:
        super().__init__()
        assert config.temporal is not None
        self.config: TemporalConfig = config.temporal
        self.dtype = dtype
        self.slots_MD = make("temporal.memory")
        self.updates = nn.ModuleList(
            UpdateLayer(f"temporal.updates.{layer}", make, config.model, dtype, tp)
            for layer in range(self.config.updates)
        )

    def initial(self, batch: int) -> Tensor:
        """[B, M, D], the same for every sample."""
        return self.slots_MD.to(self.dtype).repeat(batch, 1, 1)

    def given(self, chunk: Chunk, memory_BMD: Tensor) -> Context:
        """The context of a chunk, with the memory that it reads."""
        if chunk.read_mask is not None:
            memory_BMD = torch.cat((memory_BMD, self.initial(len(memory_BMD))), 1)
        ctx = replace(chunk.ctx, memory_BMD=memory_BMD, memory_mask=chunk.read_mask)
        if ctx.sliding is not None:
            sliding = replace(ctx.sliding, memory_BMD=memory_BMD, memory_mask=chunk.read_mask)
            ctx = replace(ctx, sliding=sliding)
        return ctx

    def cut(self, chunk: Chunk, memory_BMD: Tensor) -> Tensor:
        """The same memory, without a past where backward is truncated."""
        if chunk.cut_B is None:
            return memory_BMD
        return torch.where(chunk.cut_B[:, None, None], memory_BMD.detach(), memory_BMD)

    def write(self, memory_BMD: Tensor, x_BCD: Tensor, chunk: Chunk, number: int) -> Tensor:
        """The memory after a chunk that came out as x, `number` being how many were before it."""
        before_BMD = memory_BMD
        if chunk.fresh_B is not None:
            fresh = chunk.fresh_B[:, None, None]
            memory_BMD = torch.where(fresh, self.initial(len(memory_BMD)), memory_BMD)
        slots = self.config.num_slots
        places = torch.arange(number * slots, (number + 1) * slots, device=x_BCD.device)
        rows = chunk.ctx.sample_ids_B[:, None], places[None]
        for update in self.updates:
            memory_BMD = update(memory_BMD, x_BCD, chunk.write_mask, chunk.ctx, rows)
        if chunk.real_B is None:
            return memory_BMD
        return torch.where(chunk.real_B[:, None, None], memory_BMD, before_BMD)
