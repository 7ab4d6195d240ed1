"""Stateless randomness: every random value is a pure function of (seed, purpose, place).

No generator state must be saved, restored or synchronised between ranks: recomputation, resuming
and any mesh see the same values. Shapes: B samples, S positions, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import xxhash
from torch import Tensor

from megarecur.parallel.transfer import send
from megarecur.recurrence.inventory import ParameterSpec

_INT32_RANGE, _INT16_RANGE = 1 << 32, 1 << 16


def key(*parts: int | str) -> int:
    """Hash the parts of a name to a 64-bit key, the same on every machine."""
    return xxhash.xxh3_64_intdigest("\x1f".join(map(str, parts)).encode())


DRAWN_AT_ONCE = 1 << 21
"""Elements of initial values drawn on the CPU at once (fp32: 8 MB); the last draw of a parameter
has at most twice as many."""


def initial_values(
    spec: ParameterSpec,
    seed: int,
    dtype: torch.dtype,
    part: tuple[slice, ...] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the initial value of a parameter, or of a part of it: a function of (seed, name) and
    of the place in the whole alone.

    The whole is drawn piece by piece and only the part is kept, so a large parameter never exists
    beside its parts.

    Args:
        spec: the parameter.
        seed: the run's seed.
        dtype: dtype of the result; values are drawn in fp32.
        part: slices of the whole, as `ParameterSpec.place` returns them; None: the whole.
        device: device of the result.
    """
    spans = [s.indices(n) for s, n in zip(part or (), spec.shape, strict=part is not None)]
    spans = spans or [(0, n, 1) for n in spec.shape]
    out = torch.full([b - a for a, b, _ in spans], spec.mean, dtype=dtype, device=device)
    if spec.std == 0.0:
        return out
    generator = torch.Generator().manual_seed(key(seed, "init", spec.name) >> 1)
    (first, end, _), columns = spans[0], tuple(slice(a, b) for a, b, _ in spans[1:])
    row = 0
    for rows in _drawn_rows(spec.shape):
        if row >= end:
            break
        values = torch.randn((rows, *spec.shape[1:]), generator=generator, dtype=torch.float32)
        a, b = max(first, row), min(end, row + rows)
        if a < b:
            own = values[(slice(a - row, b - row), *columns)]
            out[a - first : b - first] = (spec.mean + spec.std * own).to(dtype)
        row += rows
    return out


def _drawn_rows(shape: tuple[int, ...]) -> Iterator[int]:
    """Yield the numbers of rows to draw at once. Torch draws 16 elements together and ends a draw
    of another size differently, so every draw but the last one is a multiple of 16 rows, and the
    last one is not a short one."""
    most = max(DRAWN_AT_ONCE // math.prod(shape[1:]) // 16, 1) * 16
    left = shape[0]
    while left > 2 * most:
        yield most
        left -= most
    yield left


def _signed(value: int) -> int:
    value %= _INT32_RANGE
    return value - _INT32_RANGE if value >= _INT32_RANGE // 2 else value


def _scramble(x: Tensor) -> Tensor:
    """Apply the lowbias32 finaliser (C. Wellons) to an int32 tensor; masks make shifts logical."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _fold(x: Tensor) -> Tensor:
    """Fold int64 to int32, using both halves."""
    low, high = x & 0xFFFFFFFF, x >> 32
    folded = (low ^ (high * 0x9E3779B1)) & 0xFFFFFFFF
    return torch.where(folded >= 1 << 31, folded - _INT32_RANGE, folded).to(torch.int32)


def key_words(where: int, device: torch.device) -> Tensor:
    """Return a key as an int32 tensor [2]: a word for rows and one for columns. A compiled graph
    takes it as an input, where a number would be a constant of the graph."""
    return send(torch.tensor(split_key(where), dtype=torch.int32), device)


def draw_keys(places: Iterable[int], device: torch.device) -> dict[int, Tensor]:
    """Return the `key_words` of many keys: views of one table, which takes one copy."""
    keys = list(dict.fromkeys(places))
    # Rows of 16 bytes: a compiled graph would copy an input that is aligned to less.
    table = torch.tensor([[*split_key(where), 0, 0] for where in keys], dtype=torch.int32)
    return dict(zip(keys, send(table.view(-1, 4), device)[:, :2].unbind(), strict=True))


def split_key(where: int) -> list[int]:
    """Return the two words of a key that random bits are made of: for rows and for columns."""
    return [_signed(where ^ (where >> 32)), _signed(where >> 17)]


def random_bits(
    where: int | Tensor, rows: tuple[Tensor, ...], num_columns: int, first_column: int = 0
) -> Tensor:
    """Return uniform int32 bits for each (row, column); separable, so any shard computes its own.

    Args:
        where: a 64-bit key of seed, step and site, or its `key_words`.
        rows: integer tensors that broadcast to the leading shape, such as samples [B, 1] and
            positions [B, S].
        first_column: where this part of the last dim begins.
    """
    device = rows[0].device
    row, column = (key_words(where, device) if isinstance(where, int) else where).unbind()
    for part in rows:
        row = _scramble(row ^ _scramble(_fold(part.to(torch.int64))))
    columns = torch.arange(first_column, first_column + num_columns, device=device)
    bits = row.unsqueeze(-1) ^ _scramble(columns.to(torch.int32) + column)
    # In place and in few passes, because this is the expensive part. The arithmetic shift makes
    # complementary rows equal, which is as rare as equal rows.
    bits.mul_(_signed(0x9E3779B1))
    bits.bitwise_xor_(bits >> 15)
    return bits.mul_(_signed(0x85EBCA6B))


def drop_share(probability: float) -> float:
    """Return the probability rounded to 16 bits, which is the one that masks realise."""
    return min(round(probability * _INT16_RANGE), _INT16_RANGE - 1) / _INT16_RANGE


def keep_mask(
    probability: float,
    where: int | Tensor,
    rows: tuple[Tensor, ...],
    num_columns: int,
    first_column: int = 0,
) -> Tensor:
    """Return a bool mask, True with probability 1 - drop_share(probability); coordinates are those
    of `random_bits`."""
    if torch.compiler.is_compiling():
        assert isinstance(where, Tensor)
        mask: Tensor = _opaque_mask(probability, where, list(rows), num_columns, first_column)
        return mask
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
    schema="(float probability, Tensor where, Tensor[] rows, SymInt columns, SymInt first)"
    " -> Tensor",
)
def _opaque_mask(
    probability: float, where: Tensor, rows: list[Tensor], columns: int, first: int
) -> Tensor:
    """Compute `keep_mask` as one operation of a compiled graph. Hashes overflow, which is undefined
    for signed numbers in C++, the target of compiled CPU graphs, and gave other masks."""
    return keep_mask(probability, where, tuple(rows), columns, first)


@_opaque_mask.register_fake
def _(probability: float, where: Tensor, rows: list[Tensor], columns: int, first: int) -> Tensor:
    shape = torch.broadcast_shapes(*(row.shape for row in rows))
    return where.new_empty((*shape, columns), dtype=torch.bool)


def dropout(x: Tensor, probability: float, where: int | Tensor, rows: tuple[Tensor, ...]) -> Tensor:
    """Apply inverted dropout to x [..., D] with the mask of (where, rows, channel)."""
    mask = keep_mask(probability, where, rows, x.shape[-1])
    return torch.where(mask, x * (1.0 / (1.0 - drop_share(probability))), 0.0)


def truncated_normal(
    where: int | Tensor,
    rows: tuple[Tensor, ...],
    num_columns: int,
    first_column: int = 0,
    cut: float = 3.0,
) -> Tensor:
    """Return a standard normal truncated at +-cut, fp32, by inversion of the bits."""
    uniform = (
        random_bits(where, rows, num_columns, first_column).to(torch.float64) + 0.5
    ) / _INT32_RANGE + 0.5
    low = 0.5 * (1.0 + math.erf(-cut / math.sqrt(2.0)))
    quantile = low + (1.0 - 2.0 * low) * uniform
    return (torch.erfinv(2.0 * quantile - 1.0) * math.sqrt(2.0)).to(torch.float32)
