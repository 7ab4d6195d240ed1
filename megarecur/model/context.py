"""What a step of the map may know beside the hidden state: built on every rank, never sent.

Shapes: B samples, S positions, K keys (S, or the cache's length), N heads, H head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from megarecur.config.schema import ModelConfig
from megarecur.model.positions import alibi_bias, alibi_slopes, decay, rotation, sinusoidal
from megarecur.model.telemetry import Telemetry
from megarecur.parallel.random import key, key_words
from megarecur.parallel.regions import ALONE, TensorParallel
from megarecur.recurrence.layer_map import Step

if TYPE_CHECKING:
    from megarecur.model.temporal import Chunks

Keys = dict[str, Tensor]
"""Of dropout at one step of the map, by site: `key_words`."""


class KeysAndValues(Protocol):
    """What attention asks of a cache."""

    length: int
    """Tokens cached before this call."""

    def append(self, key: tuple[int, int], k_BSNH: Tensor, v_BSNH: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one step of the map, (block, loop): all so far, [B, K, N, H]."""


@dataclass(frozen=True)
class Context:
    """One micro batch's surroundings; equal on every rank that works on it."""

    seed: int
    step: int
    """Optimizer step."""
    training: bool
    sample_ids_B: Tensor
    """Global sample ids."""
    positions_BS: Tensor
    """Restarting with each document where documents are masked."""
    mask: Tensor | None
    """Added to attention scores, broadcast to [B, N, S, K]; None: what
    `is_causal` says, or nothing to mask."""
    is_causal: bool
    rotation: tuple[Tensor, Tensor] | None
    """cos and sin [B or 1, S, 1, H/2], of the dims that rotate."""
    cache: KeysAndValues | None = None
    telemetry: Telemetry | None = None
    """Where the steps of the map are measured, if wanted."""
    states: list[Tensor] | None = None
    """The output of every step of the map, if wanted."""
    tp: TensorParallel = ALONE
    """The ranks that share its matrices."""
    places: Tensor | None = None
    """Sinusoids of positions [B or 1, S, D], to be added before every step with its level's."""
    sliding: Context | None = None
    """The same with mask and rotation of blocks that see a window, where they differ."""
    key_rotation: tuple[Tensor, Tensor] | None = None
    """Of keys, where it is not that of queries."""
    source_BSD: Tensor | None = None
    """What keys and values of a step are made of, where that is not what queries are made of."""
    documents_BS: Tensor | None = None
    """Which document a token belongs to, -1 at padding; None: one document per sample."""
    counts: list[Tensor] = field(default_factory=list)
    """Appended to where tokens halt (`Mixture.finish`)."""
    first: Tensor | None = None
    """[], where in the sample this chunk of it begins; None: at its start. A number would be a
    constant of a compiled graph."""
    memory_BMD: Tensor | None = None
    """What this chunk reads (`model.temporal`): the memory, or that and the initial one."""
    memory_mask: Tensor | None = None
    """Added to the scores of that reading, [B, 1, S, M]; None: all is read."""
    shares_BS: Tensor | None = None
    """What halting in this chunk counts for, of a token: 1 over the chunks of its document."""
    chunks: Chunks | None = None
    """How the sample is read, where the model has a temporal memory."""

    @property
    def real_BS(self) -> Tensor | None:
        """Which tokens are not padding; None: all."""
        return None if self.documents_BS is None else self.documents_BS >= 0

    def rows(self) -> tuple[Tensor, Tensor]:
        """(sample, position) coordinates of random values of the residual stream, broadcasting to
        its [B, S], which may be this rank's positions only."""
        samples, positions = self.all_rows()
        return samples, self.tp.own(positions)

    def all_rows(self) -> tuple[Tensor, Tensor]:
        """The same where all positions are, as in attention."""
        length = self.positions_BS.shape[1]
        positions = torch.arange(length, device=self.sample_ids_B.device)
        if self.first is not None:
            positions = positions + self.first
        return self.sample_ids_B[:, None], positions[None]

    def encoding(self, step: Step) -> Tensor:
        """Sinusoids of positions and of a step's level, [B or 1, S, D], or of this rank's
        positions."""
        assert self.places is not None
        level = torch.full((1, 1), step.loop_index, device=self.places.device)
        code = sinusoidal(level, self.places.shape[-1], self.places.dtype)
        return self.tp.own(self.places) + code

    def select(self, rows_b: Tensor) -> Context:
        """The surroundings of some of the samples, in this order."""
        size = len(self.sample_ids_B)

        def pick(table: Tensor | None) -> Tensor | None:
            """Tables of which one row serves all stay."""
            if table is None or table.ndim < 3 or len(table) != size:
                return table
            return table.index_select(0, rows_b)

        def pick_pair(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
            if pair is None or len(pair[0]) != size:
                return pair
            return pair[0][rows_b], pair[1][rows_b]

        return replace(
            self,
            sample_ids_B=self.sample_ids_B[rows_b],
            positions_BS=self.positions_BS[rows_b],
            mask=pick(self.mask),
            places=pick(self.places),
            rotation=pick_pair(self.rotation),
            key_rotation=pick_pair(self.key_rotation),
            documents_BS=None if self.documents_BS is None else self.documents_BS[rows_b],
            memory_BMD=pick(self.memory_BMD),
            memory_mask=pick(self.memory_mask),
            sliding=None if self.sliding is None else self.sliding.select(rows_b),
        )

    def where(self, site: str, step: Step | None = None) -> int:
        """The key of a site's random values in this optimizer step."""
        place = () if step is None else (step.block, step.loop_index)
        return key(self.seed, self.step, site, *place)

    def keys(self, step: Step, rates: dict[str, float]) -> Keys:
        """The keys of dropout at a step of the map, as tensors, so that one compiled graph serves
        all steps; none outside of training.

        Args:
            step: of the map.
            rates: probability by site.
        """
        device = self.sample_ids_B.device
        dropped = [site for site, rate in rates.items() if self.training and rate > 0.0]
        return {site: key_words(self.where(site, step), device) for site in dropped}


def build_context(
    model: ModelConfig,
    positions_BS: Tensor,
    dtype: torch.dtype,
    *,
    documents_BS: Tensor | None = None,
    sample_ids_B: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    training: bool = False,
    cache: KeysAndValues | None = None,
    telemetry: Telemetry | None = None,
    states: list[Tensor] | None = None,
    tp: TensorParallel = ALONE,
) -> Context:
    """Masks and rotations of a micro batch, made once for all steps of the map.

    Args:
        model: shapes and position scheme.
        positions_BS: position of every token.
        dtype: compute dtype, for the mask.
        documents_BS: which document a token belongs to; None: one document per sample.
            -1 is padding, which sees padding and is seen by none else.
        sample_ids_B: global sample ids; None: 0, 1, ...
        seed: the run's seed.
        step: the optimizer step.
        training: whether dropout is on.
        cache: keys and values of earlier tokens.
        telemetry: filled by the blocks, if given.
        states: appended to by the blocks, if given.
        tp: the ranks that share matrices.
    """
    batch, length = positions_BS.shape
    device = positions_BS.device
    if sample_ids_B is None:
        sample_ids_B = torch.arange(batch, device=device)
    past = cache.length if cache is not None else 0
    query = torch.arange(past, past + length, device=device)
    keys = torch.arange(past + length, device=device)
    same = None
    if documents_BS is not None:
        same = documents_BS[:, None, :, None] == documents_BS[:, None, None, :]
    needs_bias = model.positions == "alibi"
    is_plain = same is None and not needs_bias

    def make_mask(window: int | None) -> Tensor | None:
        """None where causality says all, or a token sees all."""
        cut = window is not None and past + length > window
        if is_plain and not cut and (past == 0 or length == 1 or not model.causal):
            return None
        allowed = keys[None, :] <= query[:, None]
        if not model.causal:
            allowed = torch.ones_like(allowed)
        if window is not None and cut:
            allowed &= keys[None, :] > query[:, None] - window
        if same is not None:
            allowed = same & allowed
        mask = torch.zeros(allowed.shape, dtype=dtype, device=device)
        mask.masked_fill_(~allowed, float("-inf"))
        if needs_bias:
            heads = model.num_heads // tp.size
            slopes = alibi_slopes(model.num_heads)[tp.rank * heads :][:heads]
            mask = mask + alibi_bias(slopes, query, keys).to(dtype)
        return mask

    # Without restarts every row is alike: one row of the tables serves all.
    rows = positions_BS if documents_BS is not None else positions_BS[:1]
    wide = torch.promote_types(dtype, torch.float32)
    places = None
    if model.level_encoding == "sinusoidal":
        places = sinusoidal(rows, model.hidden_size, wide)

    def make_rotation(theta: float, factor: float) -> tuple[Tensor, Tensor] | None:
        if model.positions not in ("rope", "xpos"):
            return None
        return rotation(rows, model.rotary_dims, theta, wide, factor)

    mask, rotated = make_mask(None), make_rotation(model.rope_theta, model.rope_scaling_factor)
    is_causal = model.causal and mask is None and past == 0
    ctx = Context(
        seed, step, training, sample_ids_B, positions_BS, mask, is_causal, rotated, cache,
        telemetry, states, tp, places, documents_BS=documents_BS,
    )  # fmt: skip
    if model.positions == "xpos" and rotated is not None:
        cos, sin = rotated
        scale = decay(rows, model.rotary_dims, model.xpos_scale_base, wide)
        ctx = replace(
            ctx, rotation=(cos * scale, sin * scale), key_rotation=(cos / scale, sin / scale)
        )
    local, window = model.rope_theta_local, model.sliding_window
    cuts = window is not None and past + length > window
    if not cuts and local is None:
        return ctx
    if cuts:
        mask = make_mask(window)
    if local is not None:
        rotated = make_rotation(local, 1.0)
    is_causal = mask is None and past == 0
    own = replace(ctx, mask=mask, is_causal=is_causal)
    return replace(ctx, sliding=own if local is None else replace(own, rotation=rotated))
