"""Stateless randomness: functions of coordinates alone, as random as independent draws.

Shapes: B samples, S positions, D channels.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megarecur.parallel import random
from megarecur.parallel.random import (
    drop_share,
    dropout,
    initial_values,
    keep_mask,
    key,
    random_bits,
    truncated_normal,
)
from megarecur.recurrence.inventory import ParameterSpec

PROBABILITIES = (0.02, 0.1, 0.5)
KNOWN_BITS = [
    -2144715574,
    -93230209,
    1663680250,
    -1741995666,
    -1083396328,
    1565912091,
    1720518609,
    -724546243,
]
KNOWN_NORMALS = [0.40630001, -0.02435091, 0.09773083]


def grid(samples: int, positions: int, first_sample: int = 0) -> tuple[Tensor, Tensor]:
    """(sample, position) coordinates that broadcast to [B, S]."""
    return torch.arange(first_sample, first_sample + samples)[:, None], torch.arange(positions)[
        None
    ]


def centred(mask: Tensor, probability: float) -> Tensor:
    """The mask with mean 0 and variance 1, if it is what it should be."""
    p = drop_share(probability)
    return (mask.double() - (1.0 - p)) / math.sqrt(p * (1.0 - p))


# ------------------------------------------------------------------------ coordinates alone


@settings(max_examples=50)
@given(
    samples=st.lists(st.integers(0, 2**62), min_size=1, max_size=4),
    span=st.tuples(st.integers(0, 20), st.integers(1, 20)),
    columns=st.tuples(st.integers(0, 30), st.integers(1, 30)),
    where=st.integers(0, 2**64 - 1),
)
def test_any_slice_is_computable_alone(
    samples: list[int], span: tuple[int, int], columns: tuple[int, int], where: int
) -> None:
    samples_B1, positions_1S = torch.tensor(samples)[:, None], torch.arange(40)[None]
    first, count = columns
    for draw in (
        lambda rows, n, first=0: keep_mask(0.3, where, rows, n, first),
        lambda rows, n, first=0: random_bits(where, rows, n, first),
        lambda rows, n, first=0: truncated_normal(where, rows, n, first),
    ):
        whole = draw((samples_B1, positions_1S), 60)
        assert whole.shape == (len(samples), 40, 60)
        for i in range(len(samples)):
            alone = draw(
                (samples_B1[i : i + 1], positions_1S[:, span[0] : sum(span)]), count, first
            )
            assert torch.equal(alone[0], whole[i, span[0] : sum(span), first : first + count])


@pytest.mark.parametrize("size", [1, 2, 8])
def test_mask_does_not_depend_on_micro_batch_size(size: int) -> None:
    x = torch.randn(8, 16, 33)
    samples, positions = torch.randint(10**9, (8, 1)), torch.arange(16)[None]
    whole = dropout(x, 0.4, 7, (samples, positions))
    parts = [
        dropout(x[i : i + size], 0.4, 7, (samples[i : i + size], positions))
        for i in range(0, 8, size)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_every_coordinate_matters() -> None:
    rows = grid(4, 32)
    base = keep_mask(0.5, key(1, 2, "mix", 0, 0), rows, 64)
    others = [
        keep_mask(0.5, where, rows, 64)
        for where in (
            key(2, 2, "mix", 0, 0),
            key(1, 3, "mix", 0, 0),
            key(1, 2, "feed", 0, 0),
            key(1, 2, "mix", 1, 0),
            key(1, 2, "mix", 0, 1),
        )
    ]
    others += [
        keep_mask(0.5, key(1, 2, "mix", 0, 0), (rows[0] + 2**32, rows[1]), 64),
        keep_mask(0.5, key(1, 2, "mix", 0, 0), (rows[0], rows[1] + 1), 64),
    ]
    for other in others:
        assert 0.45 < (other == base).double().mean() < 0.55
    assert key(1, "ab") != key(1, "a", "b") != key("1", "a", "c")


def test_known_values() -> None:
    """Resumed runs draw the same masks in every version of this code."""
    rows = (torch.tensor([[0], [123456789012]]), torch.tensor([[0, 511]]))
    bits = random_bits(key(1, 2, "mix", 3, 4), rows, 2, 7)
    assert bits.flatten().tolist() == KNOWN_BITS
    values = initial_values(ParameterSpec("blocks.0.x", (3,), 0, std=1.0), 1, torch.float32)
    torch.testing.assert_close(values, torch.tensor(KNOWN_NORMALS), rtol=1e-6, atol=0)


def test_a_table_of_keys_holds_those_of_each() -> None:
    places = [random.key(3, site) for site in ("mix", "feed", "mix", "embedding")]
    table = random.draw_keys(places, torch.device("cpu"))
    assert len(table) == 3 and random.draw_keys([], torch.device("cpu")) == {}
    for where, words in table.items():
        assert torch.equal(words, random.key_words(where, torch.device("cpu")))
        assert words.data_ptr() % 16 == 0


# --------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("probability", [*PROBABILITIES, 0.9])
def test_mean_and_variance(probability: float) -> None:
    p = drop_share(probability)
    assert abs(p - probability) < 1e-5
    mask = keep_mask(probability, key(1, 2, "mix", 0, 0), grid(8, 256), 512)
    count = mask.numel()
    z = (mask.double().mean().item() - (1.0 - p)) * math.sqrt(count / (p * (1.0 - p)))
    assert abs(z) < 4
    # Rows and columns vary by no more than chance: variance of their sums.
    for dims in ((0, 1), (2,)):
        sums = centred(mask, probability).mean(dims).flatten() * math.sqrt(
            count / mask.sum(dims).numel()
        )
        spread = (sums.var().item() - 1.0) * math.sqrt(sums.numel() / 2)
        assert abs(spread) < 4.5, dims


def test_dropout_keeps_the_mean_and_its_gradient() -> None:
    x = torch.ones(4, 128, 256, requires_grad=True)
    y = dropout(x, 0.1, 5, grid(4, 128))
    assert y.mean().item() == pytest.approx(1.0, abs=5 * math.sqrt(0.11 / y.numel()))
    assert y.unique().tolist() == [0.0, pytest.approx(1.0 / (1.0 - drop_share(0.1)))]
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    with torch.no_grad():
        assert dropout(x.bfloat16(), 0.1, 5, grid(4, 128)).dtype == torch.bfloat16


@pytest.mark.parametrize("probability", PROBABILITIES)
def test_rows_and_channels_are_uncorrelated(probability: float) -> None:
    """All pairs of 1024 rows, and of 1024 channels: no more large correlations than by chance."""
    rows = centred(keep_mask(probability, key(3, 1), grid(8, 128), 4096), probability).reshape(
        1024, -1
    )
    columns = centred(
        keep_mask(probability, key(3, 2), grid(32, 128), 1024), probability
    ).reshape(4096, -1).T  # fmt: skip
    for vectors in (rows, columns):
        z = (vectors @ vectors.T) / math.sqrt(vectors.shape[1])
        z = z[torch.ones_like(z, dtype=torch.bool).triu(1)]
        assert abs(z.mean().item()) * math.sqrt(z.numel()) < 4.5
        assert z.var().item() == pytest.approx(1.0, abs=0.01)
        # By chance 4.9 for normals, more for the skewed sums of sparse masks.
        assert z.abs().max().item() < (9.0 if probability < 0.1 else 7.0)


@pytest.mark.parametrize("probability", PROBABILITIES)
def test_steps_sites_uses_and_neighbours_are_uncorrelated(probability: float) -> None:
    places = [key(1, 2, "mix", 0, 0), key(1, 3, "mix", 0, 0), key(1, 2, "feed", 0, 0),
              key(1, 2, "mix", 0, 1), key(1, 2, "mix", 1, 0), key(2, 2, "mix", 0, 0)]  # fmt: skip
    masks = [centred(keep_mask(probability, w, grid(4, 128), 512), probability)
             for w in places]  # fmt: skip
    first = masks[0]
    for other in masks[1:]:
        assert abs((first * other).mean().item()) * math.sqrt(first.numel()) < 4.5
    for left, right in (
        (first[1:], first[:-1]),  # samples
        (first[:, 1:], first[:, :-1]),  # positions
        (first[..., 1:], first[..., :-1]),  # channels
        (first[..., 0::2], first[..., 1::2]),  # the two halves of one word
        (first[..., 256:], first[..., :256]),
        (first[:, 1:, 1:], first[:, :-1, :-1]),
    ):
        assert abs((left * right).mean().item()) * math.sqrt(left.numel()) < 4.5


@pytest.mark.parametrize("probability", PROBABILITIES)
def test_joint_patterns_by_chi_square(probability: float) -> None:
    """2 x 2 squares of (row, channel): a hash that is separable is weakest there."""
    p = drop_share(probability)
    for distance in ((1, 1), (1, 2), (64, 128), (16, 256)):
        counts = torch.zeros(16, dtype=torch.float64)
        for step in range(6):
            mask = keep_mask(probability, key(1, step), grid(4, 256, 1000 * step), 512).int()
            down, right = distance
            top = mask.unfold(1, 2 * down, 2 * down)[..., :down]
            bottom = mask.unfold(1, 2 * down, 2 * down)[..., down:]
            corners = [
                half.unfold(2, 2 * right, 2 * right)[..., part]
                for half in (top, bottom)
                for part in (slice(None, right), slice(right, None))
            ]
            code = sum(corner << i for i, corner in enumerate(corners))
            counts += torch.bincount(code.flatten(), minlength=16).double()
        kept = torch.tensor([bin(i).count("1") for i in range(16)], dtype=torch.float64)
        expected = counts.sum() * (1.0 - p) ** kept * p ** (4.0 - kept)
        enough = expected >= 5
        chi_square = ((counts - expected).square() / expected)[enough].sum().item()
        freedom = int(enough.sum()) - 1
        assert chi_square < freedom + 4.5 * math.sqrt(2 * freedom), distance


def test_bits_are_uniform() -> None:
    """Each bit is fair, and bytes of the word are equidistributed."""
    bits = random_bits(key(9), grid(4, 256), 512).flatten().long() & 0xFFFFFFFF
    count = bits.numel()
    for i in range(1, 32):
        z = (((bits >> i) & 1).double().mean().item() - 0.5) * 2 * math.sqrt(count)
        assert abs(z) < 4.5, i
    for shift in (16, 24):
        histogram = torch.bincount((bits >> shift) & 0xFF, minlength=256).double()
        chi_square = ((histogram - count / 256).square() / (count / 256)).sum().item()
        assert chi_square < 255 + 4.5 * math.sqrt(2 * 255), shift


@pytest.mark.slow
@pytest.mark.parametrize("probability", PROBABILITIES)
def test_many_rows_are_uncorrelated(probability: float) -> None:
    mask = keep_mask(probability, key(3, 1), grid(8, 512), 8192).reshape(4096, -1)
    vectors = centred(mask, probability).float()
    z = ((vectors @ vectors.T) / math.sqrt(vectors.shape[1])).fill_diagonal_(0.0)
    assert z.var().item() == pytest.approx(1.0, abs=0.003)
    assert z.abs().max().item() < (9.0 if probability < 0.1 else 7.0)


# -------------------------------------------------------------------------------------- normals


def test_truncated_normal_moments() -> None:
    values = truncated_normal(key(4), grid(8, 256), 512).double().flatten()
    cut, count = 3.0, values.numel()
    density = math.exp(-cut * cut / 2) / math.sqrt(2 * math.pi)
    mass = math.erf(cut / math.sqrt(2))
    variance = 1 - 2 * cut * density / mass
    fourth = 3 * variance - 2 * cut**3 * density / mass
    assert values.abs().max().item() <= cut
    assert abs(values.mean().item()) * math.sqrt(count / variance) < 4.5
    error = values.square().mean().item() - variance
    assert abs(error) * math.sqrt(count / (fourth - variance**2)) < 4.5
    assert abs(values.pow(3).mean().item()) * math.sqrt(count / 15) < 4.5
    # The whole distribution, by Kolmogorov and Smirnov.
    ordered = values.sort().values
    exact = 0.5 + 0.5 * torch.erf(ordered / math.sqrt(2)) / mass
    distance = (exact - torch.arange(count) / count).abs().max().item()
    assert distance * math.sqrt(count) < 2.0


def test_initial_values() -> None:
    spec = ParameterSpec("blocks.3.attention.query.weight", (64, 64), 3, std=0.02)
    assert torch.equal(
        initial_values(spec, 1, torch.float32), initial_values(spec, 1, torch.float32)
    )
    assert not torch.equal(
        initial_values(spec, 1, torch.float32), initial_values(spec, 2, torch.float32)
    )
    wide = initial_values(spec, 1, torch.float64)
    assert torch.equal(wide.float(), initial_values(spec, 1, torch.float32))
    constant = initial_values(ParameterSpec("norm", (4,), None, mean=1.0), 1, torch.float32)
    assert constant.tolist() == [1.0] * 4


def drawn_whole(spec: ParameterSpec, seed: int, dtype: torch.dtype) -> Tensor:
    """The oracle: the whole parameter from one draw."""
    generator = torch.Generator().manual_seed(key(seed, "init", spec.name) >> 1)
    values = torch.randn(spec.shape, generator=generator, dtype=torch.float32)
    return (spec.mean + spec.std * values).to(dtype)


class Sizes(TorchDispatchMode):
    """Records the elements of the largest tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize("cut", [None, 0, 1])
@pytest.mark.parametrize("shape", [(3,), (97,), (333, 7), (64, 48), (1000, 13), (5, 200)])
def test_parts_drawn_in_pieces_equal_the_whole_draw(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], cut: int | None
) -> None:
    """Bit by bit, for every tensor-parallel rank, when no piece holds more than 512 elements."""
    monkeypatch.setattr(random, "DRAWN_AT_ONCE", 512)
    cut = None if cut is not None and cut >= len(shape) else cut
    spec = ParameterSpec("blocks.0.x", shape, 0, std=0.3, mean=0.1, cut=cut)
    for dtype in (torch.float32, torch.float64):
        whole = drawn_whole(spec, 7, dtype)
        assert torch.equal(initial_values(spec, 7, dtype), whole)
        for rank, size in ((0, 2), (1, 2), (2, 3)):
            place = spec.place(rank, size)
            part = initial_values(spec, 7, dtype, place)
            assert part.is_contiguous() and torch.equal(part, whole[place])


def test_a_part_is_drawn_without_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "DRAWN_AT_ONCE", 1 << 12)
    spec = ParameterSpec("blocks.0.x", (4096, 64), 0, std=1.0, cut=0)
    sizes = Sizes()
    with sizes:
        part = initial_values(spec, 1, torch.float32, spec.place(5, 16))
    assert sizes.largest == part.numel() == spec.size // 16
