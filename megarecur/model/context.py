"""The context of a forward pass: all inputs of the map's steps other than the hidden state.

Every rank builds the context; it is never sent. Each reader takes only its own part of `Context`.
Attention takes an `AttentionView`, dropout takes `DropoutKeys` and the `Positions` of tokens,
readers of the temporal memory take a `MemoryView`, and the runner takes a `Recorder`.

Shapes: B samples, S positions, K keys (S, or the cache's length), N heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from megarecur.attention.documents import (
    Boundaries,
    count_boundaries,
    from_lengths,
    whole_samples,
)
from megarecur.attention.scores import Scores
from megarecur.attention.visibility import (
    Visibility,
    has_plain_kernel,
    see_documents,
    see_whole,
    select_rows,
)
from megarecur.batch import Sentences
from megarecur.config.model import ModelConfig
from megarecur.config.rules_attention import Backend
from megarecur.model.positions import (
    SinusoidLayout,
    alibi_bias,
    alibi_slopes,
    decay,
    rotation,
    sinusoidal,
)
from megarecur.model.telemetry import Telemetry
from megarecur.parallel.context import WHOLE, ContextParallel
from megarecur.parallel.random import key, key_words
from megarecur.parallel.regions import ALONE, TensorParallel
from megarecur.parallel.transfer import send
from megarecur.recurrence.layer_map import Step

if TYPE_CHECKING:
    from megarecur.model.temporal import Chunks

SiteKeys = dict[str, Tensor]
"""Random keys of dropout at one step of the map, by site (`key_words`)."""


class KeysAndValues(Protocol):
    """Interface of a cache of keys and values that attention uses."""

    length: int
    """Number of tokens cached before this call."""

    def append(self, key: tuple[int, int], k_BSNH: Tensor, v_BSNH: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values of a step of the map, (block, loop), and return those of all tokens
        so far, [B, K, N, H] each."""


class PagedKeys(Protocol):
    """Interface of paged keys and values of rows of several texts, for the inference engine. The
    rows are one sample, [1, T, ...], and each has its own text, position and loop."""

    def write(self, block: int, k_1TNH: Tensor, v_1TNH: Tensor) -> None:
        """Write the keys and values of the rows at their loops of a block."""

    def attend(self, block: int, q_1TNH: Tensor, scores: Scores, dtype: torch.dtype) -> Tensor:
        """Attend from each row to the tokens of its text so far, itself included, at its loop of a
        block; returns mixed values [1, T, N, H].

        Args:
            block: the block.
            q_1TNH: queries.
            scores: how scores are computed.
            dtype: dtype of products.
        """


class SourceKeys(Protocol):
    """Interface of a cache of the keys and values of source sentences, for cross-attention."""

    def find(self, step: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """Return the keys and values of a step of the map, (block, loop), [B, K, N, H] each; None
        if they are not kept yet."""

    def keep(self, step: tuple[int, int], made: tuple[Tensor, Tensor]) -> None:
        """Keep the keys and values of a step of the map."""


@dataclass(frozen=True)
class AttentionView:
    """The inputs of attention over a micro batch besides the hidden state."""

    seen: Visibility
    """Which keys each query sees."""
    rotation: tuple[Tensor, Tensor] | None
    """cos and sin [B or 1, P, 1, dims/2] of the dims that rotate, at this context rank's P
    positions; None: nothing rotates."""
    key_rotation: tuple[Tensor, Tensor] | None = None
    """The rotation of keys, if it differs from the rotation of queries."""
    cache: KeysAndValues | None = None
    pages: PagedKeys | None = None
    """Paged keys and values, in place of `seen` and `cache`."""

    def select(self, rows_b: Tensor, size: int) -> AttentionView:
        """Return the view of the samples `rows_b`, out of `size`, in this order."""
        return replace(
            self,
            seen=self.seen.select(rows_b, size),
            rotation=select_pair(self.rotation, rows_b, size),
            key_rotation=select_pair(self.key_rotation, rows_b, size),
        )


@dataclass(frozen=True)
class Positions:
    """The sample, the document and the position of each token of a micro batch."""

    sample_ids_B: Tensor
    """Global sample ids."""
    index_BS: Tensor
    """Position of each token; restarts with each document if documents are masked."""
    documents_BS: Tensor | None = None
    """Document number of each token, -1 for padding; None: one document per sample."""
    first: Tensor | None = None
    """[], the position in the sample at which this chunk begins; None: 0. It is a tensor because a
    compiled graph would treat a number as a constant."""
    sinusoids_BSD: Tensor | None = None
    """Sinusoids of this context rank's positions [B or 1, P, D], added before every step with those
    of its level."""
    sinusoid_layout: SinusoidLayout = "split"
    """Layout of these sinusoids."""
    tp: TensorParallel = ALONE
    """The ranks that share matrices and, under sequence parallelism, positions."""
    cp: ContextParallel = WHOLE
    """The ranks that share each sequence."""

    def own(self, values: Tensor) -> Tensor:
        """Return this rank's positions of values [B, S, ...] known for all positions."""
        return self.tp.own(self.cp.own(values))

    @property
    def real_BS(self) -> Tensor | None:
        """Mask of tokens that are not padding; None: no token is padding."""
        return None if self.documents_BS is None else self.documents_BS >= 0

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return (sample, position), the coordinates of random values in the residual stream. They
        broadcast to its [B, S], where S may be this rank's positions only."""
        samples, positions = self.all_rows()
        return samples, self.own(positions)

    def all_rows(self) -> tuple[Tensor, Tensor]:
        """Return (sample, position) of all positions, as attention uses them."""
        length = self.index_BS.shape[1]
        positions = torch.arange(length, device=self.sample_ids_B.device)
        if self.first is not None:
            positions = positions + self.first
        return self.sample_ids_B[:, None], positions[None]

    def encoding(self, step: Step) -> Tensor:
        """Return the sinusoids of this rank's positions plus those of a step's level, [B or 1, P,
        D]."""
        assert self.sinusoids_BSD is not None
        level = torch.full((1, 1), step.loop_index, device=self.sinusoids_BSD.device)
        table = self.sinusoids_BSD
        code = sinusoidal(level, table.shape[-1], table.dtype, self.sinusoid_layout)
        return self.tp.own(self.sinusoids_BSD) + code

    def select(self, rows_b: Tensor) -> Positions:
        """Return the positions of the samples `rows_b`, in this order."""
        return replace(
            self,
            sample_ids_B=self.sample_ids_B[rows_b],
            index_BS=self.index_BS[rows_b],
            documents_BS=None if self.documents_BS is None else self.documents_BS[rows_b],
            sinusoids_BSD=select_rows(self.sinusoids_BSD, rows_b, len(self.sample_ids_B)),
        )


@dataclass(frozen=True)
class DropoutKeys:
    """Random keys of a forward pass: functions of seed, optimizer step and place in the model."""

    seed: int
    optimizer_step: int
    training: bool
    """Whether dropout is active."""
    drawn: Mapping[int, Tensor] = field(default_factory=dict)
    """Words of keys on the device (`draw_keys`); those of other keys are copied at each use."""

    def key(self, site: str, step: Step | None = None) -> int:
        """Return the random key of a site, at a step of the map if given."""
        place = () if step is None else (step.block, step.loop_index)
        return key(self.seed, self.optimizer_step, site, *place)

    def at(self, step: Step, rates: dict[str, float], device: torch.device) -> SiteKeys:
        """Return the random keys of dropout at a step of the map; empty outside of training.

        The keys are tensors, so that one compiled graph serves all steps.

        Args:
            step: the step of the map.
            rates: probability of dropout by site.
            device: device of the keys.
        """
        dropped = [site for site, rate in rates.items() if self.training and rate > 0.0]
        return {site: self.words(site, device, step) for site in dropped}

    def words(self, site: str, device: torch.device, step: Step | None = None) -> Tensor:
        """Return the random key of a site on a device (`key_words`)."""
        where = self.key(site, step)
        found = self.drawn.get(where)
        return key_words(where, device) if found is None else found


@dataclass(frozen=True)
class MemoryView:
    """The temporal memory that a chunk of tokens reads (`model.temporal`)."""

    memory_BMD: Tensor
    """The memory, or the memory followed by the initial memory."""
    seen: Visibility
    """Which slots each token reads."""

    def select(self, rows_b: Tensor, size: int) -> MemoryView:
        """Return the view of the samples `rows_b`, out of `size`, in this order."""
        memory_BMD = select_rows(self.memory_BMD, rows_b, size)
        assert memory_BMD is not None
        return MemoryView(memory_BMD, self.seen.select(rows_b, size))


@dataclass(frozen=True)
class CrossView:
    """The inputs of a decoder's attention to source sentences besides their encoding."""

    seen: Visibility
    """Which source tokens each target token sees: all of its sentence pair, no padding."""
    cache: SourceKeys | None = None
    """Keys and values kept between calls, in translation."""

    def select(self, rows_b: Tensor, size: int) -> CrossView:
        """Return the view of the samples `rows_b`, out of `size`, in this order."""
        assert self.cache is None, "samples with a cache are not selected here"
        return CrossView(self.seen.select(rows_b, size))


@dataclass(frozen=True)
class Recorder:
    """Receivers of measurements of a forward pass."""

    telemetry: Telemetry | None = None
    """Measures the steps of the map, if given."""
    states: list[Tensor] | None = None
    """Receives the output of every step of the map, if given."""
    counts: list[Tensor] = field(default_factory=list)
    """Receives counts of tokens by the number of steps they took (`Mixture.finish`)."""
    taken: list[Tensor] = field(default_factory=list)
    """Receives the steps that the tokens of each row took, and the number of tokens, [B, 2] each;
    only while autograd is off."""


@dataclass(frozen=True)
class Context:
    """The context of a forward pass over one micro batch. Except for tables of a context rank's
    positions, it is equal on all ranks that process the micro batch."""

    attention: AttentionView
    positions: Positions
    dropout: DropoutKeys
    recorder: Recorder
    sliding: AttentionView | None = None
    """The view of blocks with a sliding window, if it differs from `attention`."""
    memory: MemoryView | None = None
    """The memory that a chunk reads, if the model has a temporal memory."""
    shares_BS: Tensor | None = None
    """Weight of each token's halting cost in this chunk: 1 over its document's number of chunks."""
    chunks: Chunks | None = None
    """The chunks of the samples, if the model has a temporal memory."""
    source: Context | None = None
    """The context of the source sentences, if the model has an encoder."""
    cross: CrossView | None = None
    """The view of attention to them."""

    def view(self, slides: bool) -> AttentionView:
        """Return the view of a block; `slides`: whether it has a sliding window."""
        return self.sliding if slides and self.sliding is not None else self.attention

    def select(self, rows_b: Tensor) -> Context:
        """Return the context of the samples `rows_b`, in this order."""
        size = len(self.positions.sample_ids_B)
        return replace(
            self,
            attention=self.attention.select(rows_b, size),
            positions=self.positions.select(rows_b),
            sliding=None if self.sliding is None else self.sliding.select(rows_b, size),
            memory=None if self.memory is None else self.memory.select(rows_b, size),
            cross=None if self.cross is None else self.cross.select(rows_b, size),
        )


def select_pair(
    pair: tuple[Tensor, Tensor] | None, rows_b: Tensor, size: int
) -> tuple[Tensor, Tensor] | None:
    """Return rows of both tables of a rotation; see `select_rows`."""
    if pair is None or len(pair[0]) != size:
        return pair
    return pair[0][rows_b], pair[1][rows_b]


@dataclass(frozen=True)
class MaskBuilder:
    """Builder of masks of all pairs of queries and keys, for the oracle and for generation."""

    model: ModelConfig
    past: int
    """Number of cached tokens."""
    length: int
    """S."""
    dtype: torch.dtype
    documents_BS: Tensor | None
    slopes_N: Tensor | None
    device: torch.device
    backend: Backend

    def see(self, window: int | None) -> Visibility:
        """Return the visibility of blocks with a window, or without one (None)."""
        mask = self.build(window)
        is_causal = self.model.causal and mask is None and self.past == 0
        return Visibility(is_causal, mask, backend=self.backend)

    def build(self, window: int | None) -> Tensor | None:
        """Return the additive mask; None if causality suffices or every token sees all."""
        past, length, causal = self.past, self.length, self.model.causal
        query = torch.arange(past, past + length, device=self.device)
        keys = torch.arange(past + length, device=self.device)
        is_plain = self.documents_BS is None and self.slopes_N is None
        cut = window is not None and past + length > window
        if is_plain and not cut and (past == 0 or length == 1 or not causal):
            return None
        allowed = keys[None, :] <= query[:, None]
        if not causal:
            allowed = torch.ones_like(allowed)
        if window is not None and cut:
            allowed &= keys[None, :] > query[:, None] - window
        if self.documents_BS is not None:
            same = self.documents_BS[:, None, :, None] == self.documents_BS[:, None, None, :]
            allowed = same & allowed
        mask = torch.zeros(allowed.shape, dtype=self.dtype, device=self.device)
        mask.masked_fill_(~allowed, float("-inf"))
        if self.slopes_N is not None:
            mask = mask + alibi_bias(self.slopes_N, query, keys).to(self.dtype)
        return mask


def build_context(
    model: ModelConfig,
    positions_BS: Tensor,
    dtype: torch.dtype,
    *,
    documents_BS: Tensor | None = None,
    boundaries: Boundaries | None = None,
    backend: Backend = "segments",
    sample_ids_B: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    training: bool = False,
    drawn: Mapping[int, Tensor] | None = None,
    cache: KeysAndValues | None = None,
    telemetry: Telemetry | None = None,
    states: list[Tensor] | None = None,
    tp: TensorParallel = ALONE,
    cp: ContextParallel = WHOLE,
) -> Context:
    """Return the context of a micro batch. Its tables are built once for all steps of the map.

    Args:
        model: shapes and position scheme.
        positions_BS: position of every token.
        dtype: compute dtype.
        documents_BS: document number of every token; None: one document per sample. Runs of equal
            numbers are documents. -1 is padding, which sees only padding of its run, and which no
            other token sees.
        boundaries: the boundaries of these documents; None: they are counted here, which waits for
            the device.
        backend: the code that attends. `dense`, and every call with a cache, builds masks of all
            pairs.
        sample_ids_B: global sample ids; None: 0, 1, ...
        seed: the run's seed.
        step: the optimizer step.
        training: whether dropout is active.
        drawn: words of random keys on the device (`DropoutKeys.drawn`).
        cache: keys and values of earlier tokens.
        telemetry: filled by the runner, if given.
        states: list to which the runner appends the output of every step, if given.
        tp: the ranks that share matrices.
        cp: the ranks that share each sequence. All arguments are of whole sequences.
    """
    batch, length = positions_BS.shape
    device = positions_BS.device
    if sample_ids_B is None:
        sample_ids_B = torch.arange(batch, device=device)
    past = cache.length if cache is not None else 0
    slopes_N = None
    if model.positions == "alibi":
        heads = model.num_heads // (tp.size * cp.size)
        first = (tp.rank * cp.size + cp.rank) * heads
        slopes_N = send(alibi_slopes(model.num_heads)[first:][:heads], device)
    if cache is not None or backend == "dense":
        see = MaskBuilder(
            model, past, length, dtype, documents_BS, slopes_N, device, backend
        ).see  # fmt: skip
    else:
        documents = boundaries or (
            whole_samples(batch, length, device)
            if documents_BS is None
            else count_boundaries(documents_BS)
        )

        def see(window: int | None) -> Visibility:
            """Return the visibility by documents."""
            cut = window is not None and documents.longest > window
            is_plain = documents_BS is None and not cut and slopes_N is None
            return see_documents(
                documents, documents, backend, device, causal=model.causal,
                window=window if window is not None and cut else 0, slopes_N=slopes_N,
                is_plain=is_plain and has_plain_kernel(backend, device),
            )  # fmt: skip

    # Without documents all rows are equal, so one row of the tables serves all samples.
    rows = positions_BS if documents_BS is not None else positions_BS[:1]
    wide = torch.promote_types(dtype, torch.float32)
    sinusoids = None
    if model.level_encoding == "sinusoidal":
        sinusoids = sinusoidal(cp.own(rows), model.hidden_size, wide, model.sinusoid_layout)

    def rotate_own(local: bool = False) -> tuple[Tensor, Tensor]:
        """Return the rotation of this context rank's positions."""
        cos, sin = rotation(rows, model, wide, local)  # A base may depend on whole documents.
        return cp.own(cos).contiguous(), cp.own(sin).contiguous()

    rotates = model.positions in ("rope", "xpos")
    rotated = rotate_own() if rotates else None
    of_keys = None
    if model.positions == "xpos" and rotated is not None:
        cos, sin = rotated
        scale = decay(cp.own(rows), model.rotary_dims, model.xpos_scale_base, wide)
        rotated, of_keys = (cos * scale, sin * scale), (cos / scale, sin / scale)
    view = AttentionView(see(None), rotated, of_keys, cache)
    sliding = None
    local, window = model.rope_theta_local, model.sliding_window
    cuts = window is not None and past + length > window
    if cuts or local is not None:
        sliding = replace(view, seen=see(window) if cuts else view.seen)
    if sliding is not None and local is not None:
        sliding = replace(sliding, rotation=rotate_own(local=True))
    return Context(
        view,
        Positions(
            sample_ids_B, positions_BS, documents_BS, None, sinusoids, model.sinusoid_layout, tp, cp
        ),
        DropoutKeys(seed, step, training, drawn or {}),
        Recorder(telemetry, states),
        sliding,
    )


def see_source(
    source: Sentences,
    targets: tuple[int, ...],
    backend: Backend,
    dtype: torch.dtype,
    separates: bool = False,
) -> Visibility:
    """Return the visibility in which every target token sees the tokens of its source sentence.

    Args:
        source: the source sentences, [B, K].
        targets: B and S of the target.
        backend: the code that attends.
        dtype: compute dtype.
        separates: treat sentences without padding as those with padding.
    """
    device, (batch, keys) = source.tokens_BS.device, source.tokens_BS.shape
    if source.single_document and not separates:
        return see_whole(batch, targets[1], keys, backend, device)
    if backend == "dense":
        mask = torch.zeros(batch, 1, 1, keys, dtype=dtype, device=device)
        mask.masked_fill_(source.documents_BS[:, None, None] < 0, float("-inf"))
        return Visibility(mask=mask, backend=backend)
    edges = (source.boundaries or count_boundaries(source.documents_BS)).edges
    starts = np.arange(batch) * keys
    lengths = edges[edges.searchsorted(starts) + 1] - starts
    # Every sample has two documents: its pair of sentences, and padding that no token attends to.
    of_keys = np.stack((lengths, keys - lengths), 1)
    of_queries = np.broadcast_to(np.array([targets[1], 0]), of_keys.shape)
    both = [
        from_lengths(found.reshape(-1), batch, length, 2).to(device)
        for found, length in ((of_queries, targets[1]), (of_keys, keys))
    ]
    return see_documents(both[0], both[1], backend, device)
