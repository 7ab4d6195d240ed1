"""Pages of keys and values: who has them, and attention to them."""

from __future__ import annotations

from random import Random

import pytest
import torch

from megarecur.attention.dense import attend_dense
from megarecur.attention.scores import Scores
from megarecur.inference.paged import FilledRows, Rows, group_texts
from megarecur.inference.pages import PagePool, hash_page
from megarecur.model.positions import alibi_bias, alibi_slopes


@pytest.mark.parametrize("number", range(4))
def test_every_page_is_free_idle_or_used(number: int) -> None:
    """Random users take, share, publish and release pages; a model of sets agrees all the time."""
    random, pool = Random(number), PagePool(6, 2, 1, 1, 1)
    holders: list[int] = []
    for _ in range(400):
        action = random.choice(["take", "take", "find", "publish", "release", "release"])
        digest = hash_page(b"", [random.randrange(5)])
        if action == "take":
            page = pool.take()
            assert (page is None) == (len(set(holders)) == 6)
            if page is not None:
                assert page not in holders
                holders.append(page)
        elif action == "find":
            page = pool.find(digest)
            if page is not None:
                assert pool.hashes[page] == digest
                holders.append(page)
        elif action == "publish" and holders:
            pool.publish(random.choice(holders), digest)
        elif action == "release" and holders:
            pool.release(holders.pop(random.randrange(len(holders))))
        assert [pool.users[page] for page in range(6)] == [holders.count(p) for p in range(6)]
        assert pool.num_used == len(set(holders))
        assert sorted([*pool.free, *pool.idle, *set(holders)]) == list(range(6))
        assert {page: key for key, page in pool.found.items()} == pool.hashes


def test_pages_without_users_keep_their_contents_until_needed() -> None:
    pool = PagePool(2, 2, 1, 1, 1)
    first, second = pool.take(), pool.take()
    assert first is not None and second is not None
    pool.publish(first, b"first")
    pool.release(second)
    pool.release(first)
    assert pool.available == 2 and pool.find(b"first") == first
    pool.release(first)
    # The page without contents goes first.
    assert pool.take() == second
    assert pool.take() == first
    assert pool.find(b"first") is None and pool.take() is None


def test_a_page_is_found_by_all_tokens_before_it() -> None:
    salted = [hash_page(salt, [1, 2]) for salt in (b"1", b"2")]
    assert len({*salted, hash_page(b"1", [1, 22]), hash_page(b"1", [12])}) == 4
    assert hash_page(salted[0], [3]) != hash_page(salted[1], [3])
    assert hash_page(salted[0], [3]) == hash_page(hash_page(b"1", [1, 2]), [3])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("has_slopes", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    "lengths",
    [[(4, 1), (9, 1), (1, 1)], [(7, 3), (2, 1), (6, 3), (5, 5)], [(8, 1)], [(7, 3)]],
)
def test_paged_attention_equals_dense_attention(
    window: int | None, has_slopes: bool, kv_heads: int, lengths: list[tuple[int, int]]
) -> None:
    """Texts of (length, last rows that are queries), at several loops of two blocks, scattered over
    pages that hold garbage elsewhere. A single text whose pages follow each other is read in
    place."""
    generator = torch.Generator().manual_seed(5)
    pool = PagePool(16, 2, 5, kv_heads, 6, torch.float64)
    for kept in (pool.keys, pool.values):
        kept.copy_(torch.randn(kept.shape, generator=generator, dtype=torch.float64))
    step_of = torch.tensor([[4, 1, 3], [0, 2, 2]])
    loops = [min(i, 2) for i in range(len(lengths))]
    pages = torch.randperm(16, generator=generator).tolist()
    if len(lengths) == 1:
        pages = list(range(3, 16))[::-1]
    tables, texts = [], []
    for (length, _), loop in zip(lengths, loops, strict=True):
        own = [pages.pop() for _ in range(-(-length // 2))]
        tables.append(torch.tensor([*own, 0, 0]))
        k_KNH, v_KNH = torch.randn(2, length, kv_heads, 6, generator=generator).double()
        for position in range(length):
            place = 16 * int(step_of[0, loop]) + own[position // 2], position % 2
            pool.keys[place], pool.values[place] = k_KNH[position], v_KNH[position]
        texts.append((k_KNH, v_KNH))
    slopes = alibi_slopes(4) if has_slopes else None
    positions = [list(range(length - count, length)) for length, count in lengths]
    rows = Rows(pool, step_of, slopes, tables, positions, loops)
    assert rows.buckets[0].first == (3 if len(lengths) == 1 else None)
    total = sum(count for _, count in lengths)
    q_1TNH = torch.randn(1, total, 4, 6, generator=generator).double()
    # The rows' own keys are written by the batch itself.
    written = [torch.cat([t[i][-n:] for t, (_, n) in zip(texts, lengths, strict=True)])[None]
               for i in (0, 1)]  # fmt: skip
    for (length, count), table, loop in zip(lengths, tables, loops, strict=True):
        for position in range(length - count, length):
            pool.keys[16 * int(step_of[0, loop]) + int(table[position // 2]), position % 2] = 0
    view = rows.see(window)
    view.write(0, *written)
    for scores in (Scores(0.3), Scores(0.3, 1.5)):
        mixed = view.attend(0, q_1TNH, scores, torch.float64)
        parts = zip(q_1TNH.split([n for _, n in lengths], 1), texts, positions, strict=True)
        expected = []
        for q_1SNH, (k_KNH, v_KNH), places in parts:
            keys, queries = torch.arange(len(k_KNH)), torch.tensor(places)
            hidden = keys > queries[:, None]
            if window is not None:
                hidden |= keys <= queries[:, None] - window
            mask = torch.zeros(hidden.shape).double().masked_fill(hidden, -torch.inf)[None, None]
            if slopes is not None:
                mask = mask + alibi_bias(slopes, queries, keys)
            qkv = q_1SNH, k_KNH[None], v_KNH[None]
            expected.append(attend_dense(qkv, scores, mask, False, None))
        torch.testing.assert_close(mixed, torch.cat(expected, 1), rtol=0, atol=1e-12)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(view.attend(1, q_1TNH, scores, torch.float64), mixed)


def test_copies_between_loops() -> None:
    pool = PagePool(4, 2, 3, 1, 1)
    pool.keys[:4] = torch.arange(8.0).view(4, 2, 1, 1)
    pool.values[:4] = -pool.keys[:4]
    tables, step_of = [torch.tensor([2, 1]), torch.tensor([3])], torch.tensor([[0, 1, 2]])
    rows = Rows(pool, step_of, None, tables, [[2], [0, 1]], [1, 2])
    FilledRows(rows, [[1], [2]]).copy(0, [0, 0])
    # Page 1 holds positions 2 and 3 of the first text, page 3 those of the second.
    assert pool.keys[4:8].flatten().tolist() == [0, 0, 2, 0, 0, 0, 0, 0]
    assert pool.values[8:12].flatten().tolist() == [0, 0, 0, 0, 0, 0, -6, -7]
    FilledRows(rows, [[2], [1, 2]]).copy(0, [0, 0])
    assert pool.keys[4:8].flatten().tolist() == [0, 0, 2, 0, 0, 0, 6, 7]
    assert pool.keys[8:12].flatten().tolist() == [0, 0, 2, 0, 0, 0, 6, 7]


def test_texts_of_different_lengths_are_padded_apart() -> None:
    """Only where that saves enough pages."""
    pages = [2, 9, 2, 10, 3, 9]
    assert group_texts([1] * 6, pages, 99) == [[0, 2, 4, 1, 5, 3]]
    assert group_texts([1] * 6, pages, 10) == [[0, 2, 4], [1, 5, 3]]
    assert group_texts([1] * 6, pages, 2) == [[0, 2], [4], [1, 5], [3]]
    assert group_texts([2, 1, 2], [1, 4, 1], 99) == [[0, 2], [1]]
    assert group_texts([1, 3, 1, 1], [5, 1, 7, 5], 0) == [[0, 3], [2], [1]]
