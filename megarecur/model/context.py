"""What a step of the map may know beside the hidden state: built on every rank, never sent.

Shapes: B samples, S positions, K keys (S, or the cache's length), N heads, H head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from megarecur.config.schema import ModelConfig
from megarecur.model.positions import alibi_bias, alibi_slopes, rotation
from megarecur.model.telemetry import Telemetry
from megarecur.parallel.random import key, key_words
from megarecur.parallel.regions import ALONE, TensorParallel
from megarecur.recurrence.layer_map import Step

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
    """Added to attention scores, broadcast to [B, N, S, K]; None: causal, or nothing to mask."""
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
    sliding: Context | None = None
    """The same with mask and rotation of blocks that see a window, where they differ."""

    def rows(self) -> tuple[Tensor, Tensor]:
        """(sample, position) coordinates of random values of the residual stream, broadcasting to
        its [B, S], which may be this rank's positions only."""
        samples, positions = self.all_rows()
        return samples, self.tp.own(positions)

    def all_rows(self) -> tuple[Tensor, Tensor]:
        """The same where all positions are, as in attention."""
        length = self.positions_BS.shape[1]
        positions = torch.arange(length, device=self.sample_ids_B.device)
        return self.sample_ids_B[:, None], positions[None]

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
        """None where causality says all, or a single token sees all."""
        cut = window is not None and past + length > window
        if is_plain and not cut and (past == 0 or length == 1):
            return None
        allowed = keys[None, :] <= query[:, None]
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

    def make_rotation(theta: float, factor: float) -> tuple[Tensor, Tensor] | None:
        if model.positions != "rope":
            return None
        # Without restarts every row is alike: one row of the table serves all.
        rows = positions_BS if documents_BS is not None else positions_BS[:1]
        wide = torch.promote_types(dtype, torch.float32)
        return rotation(rows, model.rotary_dims, theta, wide, factor)

    mask, rotated = make_mask(None), make_rotation(model.rope_theta, model.rope_scaling_factor)
    ctx = Context(
        seed, step, training, sample_ids_B, positions_BS, mask, mask is None and past == 0,
        rotated, cache, telemetry, states, tp,
    )  # fmt: skip
    local, window = model.rope_theta_local, model.sliding_window
    cuts = window is not None and past + length > window
    if not cuts and local is None:
        return ctx
    if cuts:
        mask = make_mask(window)
    if local is not None:
        rotated = make_rotation(local, 1.0)
    is_causal = mask is None and past == 0
    return replace(ctx, sliding=replace(ctx, mask=mask, is_causal=is_causal, rotation=rotated))
