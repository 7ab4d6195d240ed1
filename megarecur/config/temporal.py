"""The section `temporal`: a memory carried from chunk to chunk."""

from __future__ import annotations

from typing import Literal

from megarecur.config.base import Blocks, Length, Section, Size, derived


class TemporalConfig(Section):
    """Temporal latent bottleneck (Didolkar et al. 2022; Ray Chowdhury & Caragea 2024): tokens are
    read in chunks. Every step of the layer map also attends to a memory, and the output of a chunk
    is written to the memory for the next one. Compute grows linearly with the length of a text.

    Attention and positions stay inside a chunk. If documents are masked, each document starts with
    the initial memory.
    """

    chunk_length: Length
    """Tokens per chunk, for texts of any length; only the last chunk may be shorter."""
    num_slots: Length
    """Vectors of width model.hidden_size in the memory."""
    updates: Blocks = 1
    """Layers that write the memory, in sequence: attention to the chunk, feed-forward."""
    update_ffn_hidden_size: Size = derived()
    """Width of the feed-forward of these layers. Default: model.hidden_size."""
    initial_memory: Literal["random", "zero"] = "random"
    """Initial value of the learned memory before the first chunk. random: standard normal. zero, as
    in the authors' code: all slots then stay equal, unless there is dropout."""
    backward_chunks: Length | None = None
    """Truncated backward: interval, in chunks counted from the end of a text, at which the memory
    is detached from its past. Default: gradients pass through all chunks."""
    pooling: Literal["mean", "last"] | None = None
    """Input of a classifier of sequences or pairs, after a norm, instead of the states of tokens:
    the mean over slots, or the last slot. Default: only later chunks read the memory."""
