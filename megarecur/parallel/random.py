"""Stateless randomness: every random value is a pure function of (seed, what, where).

No generator state exists to save, restore or keep in step between ranks: recomputation, resuming
and any mesh see the same values. Shapes: B samples, S positions, D channels.
"""

from __future__ import annotations

import math

import torch
import xxhash
from torch import Tensor

from megarecur.recurrence.inventory import ParameterSpec

_INT32_RANGE, _INT16_RANGE = 1 << 32, 1 << 16


def key(*parts: int | str) -> int:
    """A 64-bit key from the parts of a name, the same on every machine."""
    return xxhash.xxh3_64_intdigest("\x1f".join(map(str, parts)).encode())


def initial_values(spec: ParameterSpec, seed: int, dtype: torch.dtype) -> Tensor:
    """Initial value of a parameter, whole, on the CPU: a function of (seed, name) alone."""
    if spec.std == 0.0:
        return torch.full(spec.shape, spec.mean, dtype=dtype)
    generator = torch.Generator().manual_seed(key(seed, "init", spec.name) >> 1)
    values = torch.randn(spec.shape, generator=generator, dtype=torch.float32)
    return (spec.mean + spec.std * values).to(dtype)


def _signed(value: int) -> int:
    value %= _INT32_RANGE
    return value - _INT32_RANGE if value >= _INT32_RANGE // 2 else value


def _scramble(x: Tensor) -> Tensor:
    """The lowbias32 finaliser (C. Wellons) on an int32 tensor; shifts made logical by masks."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _fold(x: Tensor) -> Tensor:
    """int64 to int32, both halves kept."""
    low, high = x & 0xFFFFFFFF, x >> 32
    folded = (low ^ (high * 0x9E3779B1)) & 0xFFFFFFFF
    return torch.where(folded >= 1 << 31, folded - _INT32_RANGE, folded).to(torch.int32)


def key_words(where: int, device: torch.device) -> Tensor:
    """A key as a tensor, int32 [2]: for rows and for columns. A compiled graph takes it as an
    input, where a number would be a constant of the graph."""
    words = (_signed(where ^ (where >> 32)), _signed(where >> 17))
    return torch.tensor(words, dtype=torch.int32, device=device)


def random_bits(
    where: int | Tensor, rows: tuple[Tensor, ...], num_columns: int, first_column: int = 0
) -> Tensor:
    """int32 bits, uniform, one for each (row, column); separable, so any shard makes its own.

    Args:
        where: a 64-bit key, or its `key_words`: seed, step, site.
        rows: integer tensors that broadcast to the leading shape, such as samples [B, 1] and
            positions [B, S].
        num_columns: size of the last dim.
        first_column: where this part of the last dim begins.
    """
    device = rows[0].device
    row, column = (key_words(where, device) if isinstance(where, int) else where).unbind()
    for part in rows:
        row = _scramble(row ^ _scramble(_fold(part.to(torch.int64))))
    columns = torch.arange(first_column, first_column + num_columns, device=device)
    bits = row.unsqueeze(-1) ^ _scramble(columns.to(torch.int32) + column)
    # In place and as few passes as do: these are the ones that cost something. The arithmetic
    # shift makes rows that are each other's complement equal, which is as rare as equal rows.
    bits.mul_(_signed(0x9E3779B1))
    bits.bitwise_xor_(bits >> 15)
    return bits.mul_(_signed(0x85EBCA6B))


def drop_share(probability: float) -> float:
    """The probability as 16 bits hold it, which is the one that masks have."""
    return min(round(probability * _INT16_RANGE), _INT16_RANGE - 1) / _INT16_RANGE


def keep_mask(
    probability: float,
    where: int | Tensor,
    rows: tuple[Tensor, ...],
    num_columns: int,
    first_column: int = 0,
) -> Tensor:
    """bool, True with 1 - drop_share(probability); coordinates as those of `random_bits`."""
    if torch.compiler.is_compiling():
        assert isinstance(where, Tensor)
        return _opaque_mask(probability, where, list(rows), num_columns, first_column)
    # Each word serves two columns; the multiplication leaves its lower half to be mixed.
    first_word, first = divmod(first_column, 2)
    words = random_bits(where, rows, (first + num_columns + 1) // 2, first_word)
    words.bitwise_xor_((words >> 16).bitwise_and_(0xFFFF))
    halves = words.view(torch.int16)
    threshold = round(drop_share(probability) * _INT16_RANGE) - _INT16_RANGE // 2
    return halves[..., first : first + num_columns] >= threshold


@torch.library.custom_op(
    "megarecur::keep_mask",
    mutates_args=(),
    schema="(float probability, Tensor where, Tensor[] rows, int columns, int first) -> Tensor",
)
def _opaque_mask(
    probability: float, where: Tensor, rows: list[Tensor], columns: int, first: int
) -> Tensor:
    """`keep_mask` as one operation of a compiled graph. Hashes overflow, which C++, what a compiled
    graph becomes on a CPU, leaves undefined for signed numbers: other masks came of it."""
    return keep_mask(probability, where, tuple(rows), columns, first)


@_opaque_mask.register_fake
def _(probability: float, where: Tensor, rows: list[Tensor], columns: int, first: int) -> Tensor:
    shape = torch.broadcast_shapes(*(row.shape for row in rows))
    return where.new_empty((*shape, columns), dtype=torch.bool)


def dropout(x: Tensor, probability: float, where: int | Tensor, rows: tuple[Tensor, ...]) -> Tensor:
    """Inverted dropout of x [..., D] with the mask of (where, rows, channel)."""
    mask = keep_mask(probability, where, rows, x.shape[-1])
    return torch.where(mask, x * (1.0 / (1.0 - drop_share(probability))), 0.0)


def truncated_normal(
    where: int,
    rows: tuple[Tensor, ...],
    num_columns: int,
    first_column: int = 0,
    cut: float = 3.0,
) -> Tensor:
    """Standard normal cut at +-cut, fp32, by inversion of the bits."""
    uniform = (
        random_bits(where, rows, num_columns, first_column).to(torch.float64) + 0.5
    ) / _INT32_RANGE + 0.5
    low = 0.5 * (1.0 + math.erf(-cut / math.sqrt(2.0)))
    quantile = low + (1.0 - 2.0 * low) * uniform
    return (torch.erfinv(2.0 * quantile - 1.0) * math.sqrt(2.0)).to(torch.float32)
