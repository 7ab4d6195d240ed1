"""Pieces of a text: stop strings, characters of several tokens, offsets, names of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from megarecur.data.tokenizer import ByteTokenizer
from megarecur.inference.request import Event, Reason, Score
from megarecur.serving.choice import (
    Choice,
    Options,
    Piece,
    TokenNames,
    describe_logprobs,
    find_stop,
)

BYTES = ByteTokenizer()
PROMPT = BYTES.encode("é:")


def answer(
    text: str, options: Options, reason: Reason = "length", scores: Sequence[Score] = ()
) -> tuple[Piece, list[Piece]]:
    """The whole answer, and its pieces, of a text that arrives byte by byte."""
    choice, pieces = Choice(BYTES, PROMPT, options), []
    ids = BYTES.encode(text)
    events = [Event(i, 1 + n % 3, score=Score(-1.0, ())) for n, i in enumerate(ids)]
    if reason == "length":
        events[-1] = Event(ids[-1], 1, "length", Score(-1.0, ()))
    else:
        events.append(Event(reason=reason))
    for event in events:
        pieces.append(choice.add(event, scores))
        if choice.finished:
            break
    whole = Piece()
    for piece in pieces:
        whole.extend(piece)
    return whole, pieces


def cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the stop string that is complete first, character by character."""
    for end in range(len(text) + 1):
        found = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: min(found)]
    return text


@pytest.mark.parametrize("number", range(20))
def test_texts_end_before_the_first_stop_string(number: int) -> None:
    """And no piece ever has text that a stop string then takes back."""
    random = Random(number)
    for _ in range(20):
        text = "".join(random.choice("abé") for _ in range(random.randint(1, 14)))
        stops = ["".join(random.choice("abé") for _ in range(random.randint(1, 4)))
                 for _ in range(random.randint(0, 4))]  # fmt: skip
        whole, pieces = answer(text, Options(stops), random.choice(["length", "stop"]))
        assert whole.text == cut(text, stops)
        assert whole.reason is not None and all(piece.reason is None for piece in pieces[:-1])
        if whole.text != text:
            assert whole.reason == "stop"
        assert all(token.offset < max(len(whole.text), 1) for token in whole.tokens)


def test_the_first_complete_stop_string_wins() -> None:
    assert find_stop("abcdef", ["abcdef", "cd"]) == 2
    assert find_stop("abcd", ["bcd", "d"]) == 1, "both are complete at once"
    assert find_stop("abc", ["x"]) is None


def test_a_character_of_several_tokens_is_one_piece() -> None:
    whole, pieces = answer("a世b", Options())
    assert [piece.text for piece in pieces] == ["a", "", "", "世", "b"]
    assert [len(piece.tokens) for piece in pieces] == [1, 0, 0, 3, 1]
    assert [token.offset for token in whole.tokens] == [0, 1, 1, 1, 2]
    assert whole.reason == "length"


def test_bytes_that_end_inside_a_character_are_shown() -> None:
    choice = Choice(BYTES, PROMPT, Options())
    assert choice.add(Event(0xE4, 1)).text == ""
    piece = choice.add(Event(reason="stop"))
    assert (piece.text, piece.reason, len(piece.tokens)) == ("\ufffd", "stop", 1)


def test_the_prompt_is_echoed_once_with_its_scores() -> None:
    scores = [Score(-0.5, ((7, -0.1),)), Score(-0.25, ())]
    whole, pieces = answer("ab", Options(echo="é:", logprobs=1), scores=scores)
    assert whole.text == "é:ab" and pieces[0].text == "é:a"
    assert [token.score for token in whole.tokens[:3]] == [None, *scores]
    assert [token.loops for token in whole.tokens] == [None, None, None, 1, 1]
    assert [token.offset for token in whole.tokens] == [0, 0, 1, 2, 3]
    alone, _ = answer("ab", Options(echo="é:", logprobs=1, silent=True), scores=scores)
    assert (alone.text, alone.reason, len(alone.tokens)) == ("é:", "length", 3)


def test_tokens_are_named_by_text_or_by_id() -> None:
    names = TokenNames(BYTES)
    assert [names[i] for i in (ord("b"), 0xE4, 256)] == ["b", "token_id:228", "token_id:256"]
    names.known[5] = "b"
    assert names.name_all([(ord("b"), -1.0), (5, -2.0)]) == {"b": -1.0, "token_id:5": -2.0}


def test_log_probabilities_have_the_chosen_token() -> None:
    whole, _ = answer("b", Options(logprobs=2))
    whole.tokens[0].score = Score(-3.0, ((97, -0.1), (99, -2.0)))
    found = describe_logprobs(whole.tokens, TokenNames(BYTES), 2)
    assert found is not None and found["top_logprobs"] == [{"a": -0.1, "c": -2.0, "b": -3.0}]
    assert found["tokens"] == ["b"] and found["token_logprobs"] == [-3.0]
    assert describe_logprobs(whole.tokens, TokenNames(BYTES), None) is None
    without = describe_logprobs(whole.tokens, TokenNames(BYTES), 0)
    assert without is not None and without["top_logprobs"] is None
