"""Beam search against exhaustive search and a plain reading of its rules, on drawn distributions.

A distribution is a function of the hypothesis so far, so that a decoder that follows the wrong
parents gives other results. Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megarecur.inference.beam import Hypothesis, LengthPenalty, beam_search, sample

START, END = 0, 1
WU, FAIRSEQ = LengthPenalty("wu", 0.6), LengthPenalty("fairseq", 1.0)


class Source:
    """A sentence: log probabilities after any tokens, drawn by a seed; `levels` > 0 makes ties."""

    def __init__(self, seed: int, vocabulary: int, levels: int = 0) -> None:
        self.seed, self.vocabulary, self.levels = seed, vocabulary, levels

    def log_p(self, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
        random = np.random.default_rng([self.seed, *tokens])
        if self.levels:
            p = 2.0 ** -random.integers(1, 1 + self.levels, self.vocabulary)
            return np.log(p).astype(np.float32)  # Sums need not be 1 for a search.
        x = random.normal(size=self.vocabulary) * 1.5
        return (x - np.log(np.exp(x).sum())).astype(np.float32)


class Table:
    """A decoder of some sources, which records how many rows it was asked for."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self.rows: list[tuple[int, tuple[int, ...]]] = [(i, ()) for i in range(len(sources))]
        self.calls: list[int] = []

    def advance(self, tokens_R: Tensor, parents_R: Tensor) -> Tensor:
        assert tokens_R.dtype == parents_R.dtype == torch.long
        tokens, parents = tokens_R.tolist(), parents_R.tolist()
        assert self.calls or set(tokens) == {START}
        rows = [self.rows[parent] for parent in parents]
        assert [i for i, _ in rows] == sorted(i for i, _ in rows)
        if self.calls:
            rows = [(i, (*before, t)) for (i, before), t in zip(rows, tokens, strict=True)]
        self.rows = rows
        self.calls.append(len(rows))
        return torch.from_numpy(np.stack([self.sources[i].log_p(text) for i, text in rows]))


def search(sources: Sequence[Source], **options: Any) -> list[list[Hypothesis]]:
    options = {"penalty": WU, "max_lengths": [5] * len(sources), **options}
    return beam_search(Table(sources), len(sources), start=START, end=END, **options)


def every_text(
    source: Source, most: int, prefix: tuple[int, ...] = ()
) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every text of at most `most` tokens with its end, and its log probability."""
    others = [token for token in range(source.vocabulary) if token != END]
    for length in range(most):
        for text in itertools.product(others, repeat=length):
            if text[: len(prefix)] == prefix:
                whole = (*text, END)
                yield text, math.fsum(float(source.log_p(whole[:i])[whole[i]])
                                      for i in range(len(whole)))  # fmt: skip


def search_plainly(
    source: Source, beam: int, most: int, penalty: LengthPenalty, prefix: tuple[int, ...] = ()
) -> list[Hypothesis]:
    """The rules of the module, one hypothesis after the other."""
    live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    finished: list[Hypothesis] = []
    for length in range(1, most + 1):
        offers = []
        for rank, (text, total) in enumerate(live):
            log_p = source.log_p(text)
            ids = sorted(range(source.vocabulary), key=lambda i: (-log_p[i], i))[: 2 * beam]
            if length <= len(prefix):
                ids = [prefix[length - 1]]
            elif length == most:
                ids = [END]
            offers += [(-(total + float(log_p[i])), rank, k, i) for k, i in enumerate(ids)]
        best = sorted(offers)[: 2 * beam]
        for total, rank, _, token in best[:beam]:
            if token == END and len(finished) < beam:
                score = -total / penalty.of(length)
                finished.append(Hypothesis(live[rank][0], -total, score))
        live = [((*live[rank][0], i), -total) for total, rank, _, i in best if i != END][:beam]
        if len(finished) >= beam or not live:
            break
    return sorted(finished, key=lambda h: -h.score)


@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.integers(2, 4),
    most=st.integers(1, 4),
    penalty=st.sampled_from([WU, FAIRSEQ, LengthPenalty("wu", 0.0), LengthPenalty("fairseq", 2)]),
    prefix=st.lists(st.sampled_from([0, 2]), max_size=2),
)
@settings(max_examples=60)
def test_a_wide_beam_finds_the_best_of_all_texts(
    seed: int, vocabulary: int, most: int, penalty: LengthPenalty, prefix: list[int]
) -> None:
    source = Source(seed, vocabulary)
    forced = tuple(token for token in prefix if token < vocabulary)[: most - 1]
    texts = dict(every_text(source, most, forced))
    (found,) = search(
        [source], beam=200, nbest=200, max_lengths=[most], penalty=penalty, prefixes=[forced]
    )
    assert len(found) == len(texts) < 200
    for hypothesis in found:
        assert hypothesis.log_p == pytest.approx(texts[hypothesis.tokens], rel=1e-12, abs=1e-12)
        divisor = penalty.of(len(hypothesis.tokens) + 1)
        assert hypothesis.score == pytest.approx(hypothesis.log_p / divisor, rel=1e-12)
    scores = [hypothesis.score for hypothesis in found]
    assert scores == sorted(scores, reverse=True)


@given(
    seeds=st.lists(st.integers(0, 10**6), min_size=1, max_size=5),
    beam=st.integers(1, 5),
    vocabulary=st.integers(2, 9),
    levels=st.sampled_from([0, 1, 3]),
    most=st.lists(st.integers(3, 7), min_size=5, max_size=5),
    prefixes=st.lists(st.lists(st.sampled_from([0, 2]), max_size=2), min_size=5, max_size=5),
)
@settings(max_examples=60)
@example([1], 4, 9, 1, [7] * 5, [[]] * 5)  # every token is equally likely
def test_many_at_once_follow_the_rules_one_by_one(
    seeds: list[int],
    beam: int,
    vocabulary: int,
    levels: int,
    most: list[int],
    prefixes: list[list[int]],
) -> None:
    """With ties too; hence a sentence does not depend on the others."""
    sources = [Source(seed, vocabulary, levels) for seed in seeds]
    forced = [tuple(t for t in p if t < vocabulary) for p in prefixes[: len(seeds)]]
    lengths = most[: len(seeds)]
    found = search(sources, beam=beam, nbest=beam, max_lengths=lengths, prefixes=forced)
    for source, ours, length, prefix in zip(sources, found, lengths, forced, strict=True):
        assert ours == search_plainly(source, beam, length, WU, prefix)
        assert all(h.tokens[: len(prefix)] == prefix for h in ours)
        assert all(len(h.tokens) < length and END not in h.tokens for h in ours)


@given(st.integers(0, 10**6), st.integers(2, 9), st.sampled_from([0, 2]))
@settings(max_examples=40)
def test_a_beam_of_one_is_greedy(seed: int, vocabulary: int, levels: int) -> None:
    source = Source(seed, vocabulary, levels)
    text: tuple[int, ...] = ()
    while len(text) < 7 and (token := int(source.log_p(text).argmax())) != END:
        text = (*text, token)
    assert search([source], beam=1, max_lengths=[8])[0][0].tokens == text


def test_rows_of_sentences_that_have_ended_are_not_computed() -> None:
    sources = [Source(seed, 6) for seed in range(6)]
    decoder = Table(sources)
    beam_search(decoder, 6, beam=3, start=START, end=END, max_lengths=[2, 3, 4, 5, 9, 9])
    assert decoder.calls[:2] == [6, 18] and decoder.calls == sorted(decoder.calls[:2]) + sorted(
        decoder.calls[2:], reverse=True
    )
    assert decoder.calls[-1] < 18


def test_penalties_are_those_of_the_papers() -> None:
    assert LengthPenalty("wu", 0.6).of(7) == pytest.approx(2.0**0.6)
    assert LengthPenalty("fairseq", 0.6).of(7) == pytest.approx(7.0**0.6)
    assert LengthPenalty("wu", 0.0).of(7) == LengthPenalty("fairseq", 0.0).of(7) == 1.0
    assert str(WU) == "wu 0.6"


def draw(sources: Sequence[Source], ids: Sequence[int], **options: Any) -> list[list[Hypothesis]]:
    options = {"num_samples": 3, "max_lengths": [6] * len(sources), **options}
    return sample(Table(sources), len(sources), start=START, end=END, sentence_ids=ids, **options)


def test_samples_do_not_depend_on_their_batch() -> None:
    sources = [Source(seed, 7) for seed in range(5)]
    together = draw(sources, range(5), seed=3)
    assert len({h.tokens for each in together for h in each}) > 5
    for i, source in enumerate(sources):
        assert draw([source], [i], seed=3) == [together[i]]
        (fewer,) = draw([source], [i], seed=3, num_samples=2)
        assert fewer == together[i][:2]
    for source, each in zip(sources, together, strict=True):
        for h in each:
            whole = (*h.tokens, END) if h.ended else h.tokens
            assert len(whole) <= 6 and (h.ended or len(whole) == 6)
            total = sum(float(source.log_p(whole[:i])[whole[i]]) for i in range(len(whole)))
            assert h.log_p == pytest.approx(total)


def test_samples_follow_the_distribution() -> None:
    source = Source(5, 4)
    (found,) = draw([source], [0], num_samples=4000, max_lengths=[1])
    counts = np.bincount([END if h.ended else h.tokens[0] for h in found], minlength=4)
    np.testing.assert_allclose(counts / 4000, np.exp(source.log_p(())), atol=0.03)
    (coldest,) = draw([source], [0], temperature=0.0)
    assert coldest[0].tokens == search([source], beam=1, max_lengths=[7])[0][0].tokens[:6]
    (narrow,) = draw([source], [0], top_k=1)
    assert {h.tokens for h in narrow} == {coldest[0].tokens}


def test_samples_begin_with_the_prefix() -> None:
    for each in draw([Source(1, 6), Source(2, 6)], [0, 1], prefixes=[[2, 3], []])[:1]:
        assert all(h.tokens[:2] == (2, 3) for h in each)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam": 0}, "beam=0"),
        ({"beam": 2, "nbest": 3}, "nbest=3 must be from 1 to beam=2"),
        ({"beam": 2, "max_lengths": [2], "prefixes": [[3, 3]]}, "leaves no room"),
        ({"beam": 2, "prefixes": [[3, END]]}, "contains the end token"),
        ({"beam": 2, "max_lengths": [2, 3]}, "for every sentence"),
    ],
)
def test_wrong_calls_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search([Source(1, 5)], **options)
