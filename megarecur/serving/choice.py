"""One text of a completion: events of the engine in, pieces of text out.

A piece has the text that became complete, and the tokens, loops and log probabilities behind it.
Text that may be the beginning of a stop string is held back until that is decided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megarecur.data.tokenizer import Tokenizer
from megarecur.inference.generate import REPLACEMENT, TextStream
from megarecur.inference.request import Event, Score
from megarecur.serving.protocol import FinishReason


class TokenNames:
    """Names of single tokens in answers with log probabilities: their text inside a sentence, or
    `token_id:N` for a token that has none of its own, such as a byte of a longer character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.before = tokenizer.encode("a")
        self.text_before = tokenizer.decode(self.before)
        self.known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self.known:
            text = self.tokenizer.decode([*self.before, token])
            own = text.removeprefix(self.text_before)
            usable = own and REPLACEMENT not in own and text.startswith(self.text_before)
            self.known[token] = own if usable else f"token_id:{token}"
        return self.known[token]

    def name_all(self, scored: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Return log probabilities by name; tokens of equal text keep their ids."""
        named: dict[str, float] = {}
        for token, logprob in scored:
            name = self[token]
            named[f"token_id:{token}" if name in named else name] = logprob
        return named


@dataclass
class Token:
    """A token of an answer."""

    id: int
    offset: int
    """Characters of the text before it."""
    loops: int | None
    """Loops after which it was chosen; None for a token of the prompt."""
    score: Score | None


@dataclass
class Piece:
    """A part of a choice."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    reason: FinishReason | None = None

    def extend(self, other: Piece) -> None:
        """Append the piece that follows."""
        self.text += other.text
        self.tokens += other.tokens
        self.reason = other.reason


@dataclass(frozen=True)
class Options:
    """The options of a choice that the engine does not see."""

    stops: Sequence[str] = ()
    logprobs: int | None = None
    echo: str | None = None
    """The text to put in front; None: none."""
    silent: bool = False
    """Leave out the new tokens: max_tokens is 0."""


class Choice:
    """A text as it is generated.

    Args:
        tokenizer: the run's.
        prompt: ids of the prompt.
        options: how to answer.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], options: Options) -> None:
        self.prompt, self.options = prompt, options
        self.stream = TextStream(tokenizer, prompt)
        self.tokenizer = tokenizer
        self.num_new = 0
        self.finished = False
        self.begun = False
        self.released = 0
        """Characters in pieces so far."""
        self.held = ""
        """Text that may begin a stop string."""
        self.waiting: list[Token] = []
        """Tokens whose text is not released."""

    def add(self, event: Event, prompt_scores: Sequence[Score] = ()) -> Piece:
        """Return what an event releases; a piece with a reason is the last one."""
        piece = Piece()
        if not self.begun and self.options.echo is not None:
            piece = self._echo(self.options.echo, prompt_scores)
        self.begun = True
        if self.options.silent:
            self.finished, piece.reason = True, "length"
            return piece
        if event.token is not None:
            self.num_new += 1
            offset = self.released + len(self.held)
            self.waiting.append(Token(event.token, offset, event.loops, event.score))
            self.held += self.stream.add(event.token)
        if event.finished:
            self.held += self.stream.end()
        end = find_stop(self.held, self.options.stops)
        if end is not None:
            text, self.held, piece.reason = self.held[:end], "", "stop"
        elif event.finished:
            text, self.held = self.held, ""
            piece.reason = "stop" if event.reason == "stop" else "length"
        else:
            count = len(self.held) - count_held(self.held, self.options.stops)
            text, self.held = self.held[:count], self.held[count:]
        self.finished = piece.reason is not None
        self.released += len(text)
        piece.text += text
        self._release_tokens(piece, stopped=end is not None)
        return piece

    def _release_tokens(self, piece: Piece, stopped: bool) -> None:
        """Move to a piece the tokens that begin in released text; at the end of the text the others
        too, unless a stop string cut them off."""
        rest = self.finished and not stopped
        ready = [token for token in self.waiting if token.offset < self.released or rest]
        piece.tokens += ready
        self.waiting = self.waiting[len(ready) :]

    def _echo(self, text: str, scores: Sequence[Score]) -> Piece:
        """Return the prompt as a piece."""
        piece = Piece(text)
        self.released = len(text)
        if self.options.logprobs is None:
            return piece
        stream, offset = TextStream(self.tokenizer, []), 0
        for token, score in zip(self.prompt, [None, *scores], strict=True):
            piece.tokens.append(Token(token, min(offset, len(text)), None, score))
            offset += len(stream.add(token))
        return piece


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return the index at which a text is cut: where the stop string begins that is complete first;
    None if there is none. The cut is a function of the text, not of its tokens."""
    found = [(i + len(stop), i) for stop in stops if (i := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def count_held(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest end of a text that begins a stop string."""
    most = min(len(text), max((len(stop) - 1 for stop in stops), default=0))
    for count in range(most, 0, -1):
        if any(stop.startswith(text[-count:]) for stop in stops):
            return count
    return 0


def describe_logprobs(
    tokens: Sequence[Token], names: TokenNames, logprobs: int | None
) -> dict[str, Any] | None:
    """Return the log probabilities of tokens as OpenAI's API writes them; None if not requested."""
    if logprobs is None:
        return None
    top: list[dict[str, float] | None] | None = None
    if logprobs:
        top = [
            None
            if token.score is None
            else names.name_all(
                token.score.top
                if any(i == token.id for i, _ in token.score.top)
                else [*token.score.top, (token.id, token.score.logprob)]
            )
            for token in tokens
        ]
    return {
        "tokens": [names[token.id] for token in tokens],
        "token_logprobs": [None if t.score is None else t.score.logprob for t in tokens],
        "top_logprobs": top,
        "text_offset": [token.offset for token in tokens],
    }
