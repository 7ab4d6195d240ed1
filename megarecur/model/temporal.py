"""The temporal latent bottleneck: a memory of a few slots, carried from chunk to chunk of a text
(Didolkar et al. 2022; Ray Chowdhury & Caragea 2024, section 3).

The fast stream is the layer map. It reads one chunk of tokens at a time and attends to the memory
in every step. The slow stream is the update layers. They write the memory from the chunk's outputs.
Cost grows linearly with the length of a text. Tokens see other chunks only through the memory.

Shapes: B samples, S positions of a sample, C positions of a chunk, M slots, D hidden, N heads, H
head_dim. Documents end inside a sample only if `documents_BS` is given. Then the initial memory is
appended to the carried one, 2 M slots in all, and every token reads the one of its own document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from megarecur.attention.documents import Boundaries, count_boundaries, from_lengths
from megarecur.attention.visibility import Visibility, see_documents, see_whole
from megarecur.config.model import ModelConfig
from megarecur.config.rules_attention import Backend
from megarecur.config.run import Config
from megarecur.config.temporal import TemporalConfig
from megarecur.errors import ConfigError
from megarecur.model.attention import CrossAttention
from megarecur.model.context import (
    Context,
    CrossView,
    DropoutKeys,
    KeysAndValues,
    MemoryView,
    Positions,
    SiteKeys,
    build_context,
)
from megarecur.model.documents import find_documents
from megarecur.model.feed_forward import FEED_FORWARDS
from megarecur.model.norm import build_norm
from megarecur.parallel.linear import MakeParameter
from megarecur.parallel.random import dropout
from megarecur.parallel.regions import ALONE, TensorParallel
from megarecur.parallel.transfer import send


class OpenChunk(KeysAndValues, Protocol):
    """Interface of the cache of an incomplete chunk."""

    def advance(self, num_tokens: int) -> None:
        """Count the tokens of a finished forward pass as cached."""

    def clear(self) -> None:
        """Empty the cache before the next chunk."""


@dataclass
class Carried:
    """The state carried between calls that read a text piece by piece.

    Pass the same object to the context of every piece. Samples have equal lengths and one document
    each. The state is outside of the graph.
    """

    memory_BMD: Tensor | None = None
    """The memory after the last complete chunk; None: the initial memory."""
    length: int = 0
    """Number of tokens read so far."""
    outputs: list[Tensor] = field(default_factory=list)
    """Outputs of the tokens of the incomplete chunk, [B, ., D] for each piece."""
    cache: OpenChunk | None = None
    """Keys and values of the incomplete chunk; None: every piece but the last is whole chunks."""

    def end_piece(self, length: int, complete: bool, memory_BMD: Tensor) -> None:
        """Record the end of a piece.

        Args:
            length: number of tokens of the piece.
            complete: whether the piece completes its chunk.
            memory_BMD: the memory after the piece.
        """
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
    """The chunk is positions start to stop of the call."""
    offset: int
    """Number of tokens of the same chunk that earlier calls read."""
    ctx: Context
    """Context of these positions only, which restart here; `Memory.given` adds the memory."""
    reads: Visibility | None = None
    """Which of 2 M slots each token reads; None: all M slots."""
    writes: Visibility | None = None
    """Which tokens are written to the slots; None: all."""
    fresh_B: Tensor | None = None
    """Mask of samples whose memory belongs to another document than the one this chunk writes."""
    real_B: Tensor | None = None
    """Mask of samples with a real token in this chunk; others keep their memory and states."""
    cut_B: Tensor | None = None
    """Mask of samples whose memory is detached from the graph before this chunk
    (`backward_chunks`)."""


@dataclass(frozen=True)
class Chunks:
    """The chunks of a call, and the state carried into it."""

    chunks: tuple[Chunk, ...]
    carried: Carried | None = None


def build_chunks(
    config: Config,
    positions_BS: Tensor,
    dtype: torch.dtype,
    *,
    documents_BS: Tensor | None = None,
    boundaries: Boundaries | None = None,
    backend: Backend = "segments",
    carried: Carried | None = None,
    lengths: Sequence[int] | None = None,
    **surroundings: object,
) -> Context:
    """Return the context of samples that are read chunk by chunk (see `context.build_context`).

    Args:
        config: a run with a section `temporal`.
        positions_BS: position of every token in its document; positions in chunks are derived.
        dtype: compute dtype.
        documents_BS: document number of every token, -1 for padding; None: one per sample.
        boundaries: the boundaries of these documents; None: they are counted here.
        backend: the code that attends.
        carried: state of the tokens before these; running the map on these updates it.
        lengths: lengths of the chunks, for comparison with code that cuts differently; None:
            `temporal.chunk_length`.
        surroundings: further arguments of `build_context`.

    Raises:
        ConfigError: the tokens before these end inside a chunk and no cache was carried, or a cache
            is carried although the model halts, which needs whole chunks.
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
    within_S = send(torch.arange(length) - starts.repeat_interleave(sizes), device)
    within_BS = torch.minimum(positions_BS, within_S) if past == 0 else None
    if within_BS is None:  # One document: positions follow from its chunks alone.
        within_BS = within_S.expand(batch, -1)
    surroundings = {**surroundings, "documents_BS": None, "backend": backend}
    if documents_BS is not None and boundaries is None:
        boundaries = count_boundaries(documents_BS)
    shared: dict[int, Context] = {}

    def context(index: int) -> Context:
        """Return the context of a chunk. Without documents, chunks of one length share a context
        except for their start."""
        start, stop = spans[index]
        resumed = carried.cache if carried is not None and index == 0 else None
        found = shared.get(stop - start) if documents_BS is None and resumed is None else None
        if found is None:
            own = dict(surroundings)
            if documents_BS is not None:
                assert boundaries is not None
                own["documents_BS"] = documents_BS[:, start:stop]
                own["boundaries"] = boundaries.narrow(start, stop)
            found = build_context(
                config.model,
                within_BS[:, start:stop],
                dtype,
                cache=resumed,
                **own,  # type: ignore[arg-type]
            )
            if documents_BS is None and resumed is None:
                shared[stop - start] = found
        first = torch.full((), past + start, device=device)
        cache, sliding = carried.cache if carried is not None else None, found.sliding
        return replace(
            found,
            positions=replace(found.positions, first=first),
            attention=replace(found.attention, cache=cache),
            sliding=None if sliding is None else replace(sliding, cache=cache),
        )

    chunks = [
        Chunk(start, stop, offset if i == 0 else 0, context(i))
        for i, (start, stop) in enumerate(spans)
    ]
    if documents_BS is not None:
        chunks = separate_documents(chunks, documents_BS, temporal.num_slots, dtype, backend)
    if config.halting is not None:
        chunks = share_halting(chunks, documents_BS, batch)
    if temporal.backward_chunks is not None:
        chunks = cut_past(chunks, temporal.backward_chunks, batch, device)
    context_0 = chunks[0].ctx
    recorder = context_0.recorder  # All chunks share one.
    chunks = [replace(chunk, ctx=replace(chunk.ctx, recorder=recorder)) for chunk in chunks]
    # Positions of the whole call, for the embedding and its dropout.
    positions = replace(
        context_0.positions,
        index_BS=within_BS,
        first=None if past == 0 else torch.full((), past, device=device),
        documents_BS=documents_BS,
    )
    seen = Visibility(backend=backend)  # Of no token: only chunks attend.
    unmasked = replace(context_0.attention, seen=seen, rotation=None, key_rotation=None)
    return Context(
        unmasked, positions, context_0.dropout, recorder, chunks=Chunks(tuple(chunks), carried)
    )


def cut(
    length: int, offset: int, chunk_length: int, lengths: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """Return (start, stop) of each chunk of a call over `length` tokens. The first chunk continues
    one that already has `offset` tokens."""
    if lengths is not None:
        assert sum(lengths) == length, "chunks must make up the sample"
        ends = torch.tensor(lengths).cumsum(0).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))
    ends = [*range(chunk_length - offset, length, chunk_length), length]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def separate_documents(
    chunks: Sequence[Chunk],
    documents_BS: Tensor,
    num_slots: int,
    dtype: torch.dtype,
    backend: Backend,
) -> list[Chunk]:
    """Return the chunks with visibilities that separate documents and keep padding out of the
    memory.

    The memory belongs to the document of the last real token that was written. Tokens of this
    document read it; others read the initial memory. A document that continues in the next chunk
    updates its memory; another document updates the initial memory.
    """
    owner_B = documents_BS[:, 0]  # Before the first chunk the carried memory is the initial one.
    made = []
    for chunk in chunks:
        documents_BC = documents_BS[:, chunk.start : chunk.stop]
        real_BC = documents_BC >= 0
        order = torch.arange(1, documents_BC.shape[1] + 1, device=documents_BC.device)
        last_B1 = (real_BC * order).argmax(1, keepdim=True)
        writer_B = documents_BC.gather(1, last_B1)[:, 0]
        real_B = real_BC.any(1)
        carried_BC = documents_BC == owner_B[:, None]
        written_BC = documents_BC == writer_B[:, None]
        if backend == "dense":
            allowed_BCM = torch.stack((carried_BC, ~carried_BC), -1).repeat_interleave(
                num_slots, -1
            )
            reads = Visibility(mask=additive(allowed_BCM[:, None], dtype), backend=backend)
            writes = Visibility(mask=additive(written_BC[:, None, None], dtype), backend=backend)
        else:
            reads = see_memory(carried_BC, num_slots, backend)
            writes = see_written(written_BC, num_slots, backend)
        made.append(
            replace(chunk, reads=reads, writes=writes, fresh_B=writer_B != owner_B, real_B=real_B)
        )
        owner_B = torch.where(real_B, writer_B, owner_B)
    return made


def see_memory(carried_BC: Tensor, num_slots: int, backend: Backend) -> Visibility:
    """Return the visibility of a chunk's tokens: those of the carried document, which come first,
    see the first `num_slots` slots, others the rest. Waits for the device."""
    batch, length = carried_BC.shape
    counts_B = carried_BC.sum(1).cpu().numpy()
    tokens = from_lengths(np.stack((counts_B, length - counts_B), 1).ravel(), batch, length, 2)
    slots = from_lengths(np.full(2 * batch, num_slots), batch, 2 * num_slots, 2)
    device = carried_BC.device
    return see_documents(tokens.to(device), slots.to(device), backend, device)


def see_written(written_BC: Tensor, num_slots: int, backend: Backend) -> Visibility:
    """Return the visibility of the slots, which see a chunk's tokens of one document. Waits for the
    device."""
    batch, length = written_BC.shape
    written = written_BC.cpu().numpy()
    first_B, count_B = written.argmax(1), written.sum(1)
    # Tokens before and after the document are seen by no slot.
    parts = np.stack((first_B, count_B, length - first_B - count_B), 1)
    slots = from_lengths(np.tile([0, num_slots, 0], batch), batch, num_slots, 3)
    device = written_BC.device
    tokens = from_lengths(parts.ravel(), batch, length, 3)
    return see_documents(slots.to(device), tokens.to(device), backend, device)


def share_halting(chunks: Sequence[Chunk], documents_BS: Tensor | None, batch: int) -> list[Chunk]:
    """Return the chunks with weights of the halting cost, so that the cost of a document is the
    mean over its chunks."""
    device = chunks[0].ctx.positions.index_BS.device
    sizes = torch.tensor([chunk.stop - chunk.start for chunk in chunks])
    if documents_BS is None:
        shares_BS = torch.full((batch, int(sizes.sum())), 1.0 / len(chunks), device=device)
    else:
        documents = find_documents(documents_BS, documents_BS)
        chunk_S = send(torch.arange(len(chunks)).repeat_interleave(sizes), device)
        last_BS = documents.start_BS + documents.length_BS - 1
        shares_BS = 1.0 / (chunk_S[last_BS] - chunk_S[documents.start_BS] + 1)
    return [
        replace(c, ctx=replace(c.ctx, shares_BS=shares_BS[:, c.start : c.stop])) for c in chunks
    ]


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an additive mask: 0 where allowed, -inf elsewhere."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, float("-inf"))


def cut_past(
    chunks: Sequence[Chunk], backward_chunks: int, batch: int, device: torch.device
) -> list[Chunk]:
    """Return the chunks with a mask of the samples whose memory is detached before each.

    It is detached every `backward_chunks` chunks, counted back from a sample's last chunk with a
    real token, so that padding has no effect.
    """
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


class MemoryReader(nn.Module):
    """The branch CrossAttention(N1(x) -> N2(memory)) of a block."""

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

    def forward(
        self, x_BCD: Tensor, memory: MemoryView, positions: Positions, keys: SiteKeys
    ) -> Tensor:
        """Attend from [B, C, D] to the memory; returns [B, C, D]."""
        read: Tensor = self.attention(
            self.norm(x_BCD),
            self.source_norm(memory.memory_BMD),
            CrossView(memory.seen),
            keys.get("read_attention"),
            positions.all_rows(),
        )
        return read


class UpdateLayer(nn.Module):
    """One layer of the slow stream: m + CrossAttention(N1(m) -> N2(x)), then m + FFN(N3(m))."""

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
        seen: Visibility,
        keys: DropoutKeys,
        rows: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Update the memory: [B, M, D] to [B, M, D].

        Args:
            memory_BMD: the memory.
            x_BCD: outputs of the chunk.
            seen: which tokens each slot reads.
            keys: random keys of dropout.
            rows: (sample, slot), the coordinates of dropout; slots are numbered over all chunks.
        """
        rate, attention_rate = self.rates

        def where(site: str, probability: float) -> Tensor | None:
            if not (keys.training and probability > 0.0):
                return None
            return keys.words(f"{self.name} {site}", memory_BMD.device)

        def drop(branch: Tensor, site: str) -> Tensor:
            place = where(site, rate)
            return branch if place is None else dropout(branch, rate, place, rows)

        place = where("attention", attention_rate)
        read = self.attention(
            self.memory_norm(memory_BMD), self.input_norm(x_BCD), CrossView(seen), place, rows
        )
        memory_BMD = memory_BMD + drop(read, "mix")
        fed = self.feed_forward(self.feed_forward_norm(memory_BMD))
        return memory_BMD + drop(fed, "feed")


class Memory(nn.Module):
    """The initial memory, and the layers that update the memory."""

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

    def sites(self) -> list[str]:
        """Return the sites of dropout."""
        names = [update.name for update in self.updates if isinstance(update, UpdateLayer)]
        return [f"{name} {site}" for name in names for site in ("mix", "feed", "attention")]

    def initial(self, batch: int) -> Tensor:
        """Return the initial memory [B, M, D], which is equal for all samples."""
        return self.slots_MD.to(self.dtype).repeat(batch, 1, 1)

    def given(self, chunk: Chunk, memory_BMD: Tensor) -> Context:
        """Return the context of a chunk with the memory that it reads."""
        seen = chunk.reads
        if seen is None:
            seen = self.see_all(chunk, len(memory_BMD), chunk.stop - chunk.start, self.slots)
        else:
            memory_BMD = torch.cat((memory_BMD, self.initial(len(memory_BMD))), 1)
        return replace(chunk.ctx, memory=MemoryView(memory_BMD, seen))

    @property
    def slots(self) -> int:
        """M."""
        return self.config.num_slots

    def see_all(self, chunk: Chunk, batch: int, queries: int, keys: int) -> Visibility:
        """Return the visibility in which every query sees all keys."""
        device = chunk.ctx.positions.index_BS.device
        return see_whole(batch, queries, keys, chunk.ctx.attention.seen.backend, device)

    def cut(self, chunk: Chunk, memory_BMD: Tensor) -> Tensor:
        """Return the memory, detached from the graph for samples whose backward is truncated
        here."""
        if chunk.cut_B is None:
            return memory_BMD
        return torch.where(chunk.cut_B[:, None, None], memory_BMD.detach(), memory_BMD)

    def write(self, memory_BMD: Tensor, x_BCD: Tensor, chunk: Chunk, number: int) -> Tensor:
        """Return the memory after a chunk, [B, M, D].

        Args:
            memory_BMD: the memory before the chunk.
            x_BCD: outputs of the chunk.
            chunk: the chunk.
            number: number of chunks before it in this call.
        """
        before_BMD = memory_BMD
        if chunk.fresh_B is not None:
            fresh = chunk.fresh_B[:, None, None]
            memory_BMD = torch.where(fresh, self.initial(len(memory_BMD)), memory_BMD)
        batch, slots = len(x_BCD), self.slots
        seen = chunk.writes or self.see_all(chunk, batch, slots, x_BCD.shape[1])
        places = torch.arange(number * slots, (number + 1) * slots, device=x_BCD.device)
        rows = chunk.ctx.positions.sample_ids_B[:, None], places[None]
        for update in self.updates:
            memory_BMD = update(memory_BMD, x_BCD, seen, chunk.ctx.dropout, rows)
        if chunk.real_B is None:
            return memory_BMD
        return torch.where(chunk.real_B[:, None, None], memory_BMD, before_BMD)
