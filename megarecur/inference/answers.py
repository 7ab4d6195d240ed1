"""Answers to a harness' requests, by one process or by all processes of a mesh together.

    answers = Answers(model, tokenizer, mesh, schedules)
    if mesh.rank == 0:
        try:
            found = answers.score(pairs)      # any number of calls
        finally:
            answers.close()
    else:
        answers.follow()

The first process asks; the others repeat its calls, each for the part of the model or of the
requests that is theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

import torch

from megarecur.config.recurrence import Looped
from megarecur.data.tokenizer import Tokenizer
from megarecur.errors import MegarecurError
from megarecur.inference.engine import Engine
from megarecur.inference.generate import TextStream, generate
from megarecur.inference.likelihood import (
    Advance,
    Likelihood,
    Pair,
    advance_nothing,
    score_continuations,
)
from megarecur.inference.request import Request, count_pages
from megarecur.model.transformer import Transformer
from megarecur.parallel.mesh import Mesh
from megarecur.plan.schedule import Schedules
from megarecur.recurrence.depth import default_depth

PAGE = 16
TEXTS = 32
"""Maximum number of texts that are generated at a time."""

Asked = Sequence[tuple[Request, Sequence[str]]]
"""Requests with their stop strings."""


class Answers:
    """The model of a run with its tokenizer.

    Args:
        model: this rank's part of the model.
        tokenizer: the tokenizer.
        mesh: the ranks; None: this process has the whole model.
        schedules: the walks of the run; None builds them.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        mesh: Mesh | None = None,
        schedules: Schedules | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.mesh = mesh or Mesh(device=next(model.parameters()).device)
        self.schedules = schedules or Schedules(model.config)

    def score(
        self, pairs: Sequence[Pair], advance: Advance = advance_nothing, **options: Any
    ) -> list[Likelihood]:
        """Return the log-likelihoods of continuations; options: of `score_continuations`."""
        self.mesh.broadcast_object((True, pairs, options))
        return self._score(pairs, options, advance)

    def continue_texts(self, asked: Asked, advance: Advance = advance_nothing) -> list[str]:
        """Return the continuations of texts, each up to a stop string or the end of its request.

        Raises:
            ConfigError: the model cannot run a request.
        """
        self.mesh.broadcast_object((False, asked, {}))
        return self._continue(asked, advance)

    def follow(self) -> None:
        """Repeat the calls of the first process until it calls `close`."""
        while (order := self.mesh.broadcast_object(None)) is not None:
            scores, given, options = order
            with suppress(MegarecurError):  # The first process raises the same, and reports it.
                if scores:
                    self._score(given, options)
                else:
                    self._continue(given)

    def close(self) -> None:
        """Let the other processes return from `follow`."""
        self.mesh.broadcast_object(None)

    def _score(
        self, pairs: Sequence[Pair], options: dict[str, Any], advance: Advance = advance_nothing
    ) -> list[Likelihood]:
        return score_continuations(
            self.model, pairs, advance=advance, mesh=self.mesh, schedules=self.schedules, **options
        )

    def _continue(self, asked: Asked, advance: Advance = advance_nothing) -> list[str]:
        parallel, mesh = self.model.config.parallel, self.mesh
        if mesh.pp > 1 or parallel.zero_stage == 3:
            # Stages, and gathers of weights, need all ranks for every token.
            return [self._continue_together(*each, advance) for each in asked]
        self._make_present()
        engine = self._open_engine(asked)
        for request, _ in asked:  # A mistake is found on every rank, and parts none.
            engine.check(request)
        own = self._continue_alone(engine, asked[mesh.dp_rank :: mesh.dp], advance)
        texts = [""] * len(asked)
        for rank, found in mesh.gather_objects((mesh.dp_rank, own)):
            texts[rank :: mesh.dp] = found
        return texts

    def _continue_together(self, request: Request, stops: Sequence[str], advance: Advance) -> str:
        """Continue one text on all ranks."""
        text = Continued(self.tokenizer, request.tokens, stops)
        ids = generate(
            self.model, request.tokens, max_new_tokens=request.max_new_tokens,
            temperature=request.temperature, top_k=request.top_k, top_p=request.top_p,
            seed=request.seed, sample=request.sample, eos_ids=request.eos_ids,
            missing_ids=self._missing_ids(), num_loops=request.num_loops,
            use_cache=self.model.config.halting is None, mesh=self.mesh, schedules=self.schedules,
        )  # fmt: skip
        while not text.ended:
            text.add(next(ids, None))
        advance(1)
        return text.text

    def _make_present(self) -> None:
        """Make all weights present, which an engine that shards moments gathers after a step."""
        residence, blocks = self.model.residence, list(self.model.blocks())
        with torch.no_grad():
            residence.begin(blocks)
            for block in blocks:
                residence.enter(block)
            residence.enter_ends()
            residence.end()

    def _open_engine(self, asked: Asked) -> Engine:
        """Return an engine with room for any of the requests."""
        most = max((request.most_tokens for request, _ in asked), default=1)
        recurrence = self.model.config.recurrence
        loops: int | None = None
        if isinstance(recurrence, Looped):
            usual = default_depth(recurrence).num_loops
            loops = max((request.num_loops or usual for request, _ in asked), default=usual)
        # An engine of training may move weights between calls, and captures cost memory.
        return Engine(
            self.model, num_pages=TEXTS * count_pages(most, PAGE), page_size=PAGE,
            max_texts=TEXTS, max_loops=loops, missing_ids=self._missing_ids(), cuda_graphs=False,
        )  # fmt: skip

    def _continue_alone(self, engine: Engine, asked: Asked, advance: Advance) -> list[str]:
        """Continue texts by the engine, on the ranks that share each matrix."""
        texts = {
            engine.submit(request): Continued(self.tokenizer, request.tokens, stops)
            for request, stops in asked
        }
        running, busy = dict(texts), True
        while busy:
            busy = engine.step()
            for handle, text in list(running.items()):
                while not text.ended and not handle.events.empty():
                    event = handle.events.get()
                    text.add(event.token)
                    if event.finished:
                        text.end()
                if text.ended:
                    del running[handle]
                    handle.cancel()
                    advance(1)
        return [text.text for text in texts.values()]

    def _missing_ids(self) -> Collection[int]:
        return self.tokenizer.missing_ids(self.model.config.model.vocab_size or 0)


class Continued:
    """A text while it is generated.

    Args:
        prompt: ids of the prompt.
        stops: strings at which the text ends; they are no part of it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]) -> None:
        # The text of a token depends on those before it.
        self.stream, self.stops = TextStream(tokenizer, prompt[-PAGE:]), stops
        self.text, self.ended = "", False

    def add(self, token: int | None) -> None:
        """Take the next token; None: there is none."""
        if token is None:
            self.end()
        else:
            self._append(self.stream.add(token))

    def end(self) -> None:
        """Take the rest of the text."""
        if not self.ended:
            self._append(self.stream.end())
        self.ended = True

    def _append(self, piece: str) -> None:
        self.text += piece
        found = [place for stop in self.stops if (place := self.text.find(stop)) >= 0]
        if piece and found:
            self.text, self.ended = self.text[: min(found)], True
