"""Texts of models that keep no keys and values of every token: with halting or a temporal memory.

Each step continues one text by one token, in turn, so that no text waits for more than one token of
each other one. Shapes: S positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

import torch
from torch import Tensor

from megarecur.inference.cache import Cache, context_after
from megarecur.inference.generate import choose, next_logits, run_forward
from megarecur.inference.request import (
    Counts,
    Event,
    Handle,
    Request,
    Score,
    count_pages,
    score_tokens,
)
from megarecur.model.transformer import Transformer
from megarecur.parallel.mesh import Mesh
from megarecur.plan.schedule import Scheduled, Schedules


class PlainText:
    """A text that is continued.

    Args:
        handle: its request.
        model: the model.
        missing: ids never chosen.
    """

    def __init__(self, handle: Handle, model: Transformer, missing: Collection[int]) -> None:
        self.handle, self.model, self.missing = handle, model, missing
        self.mesh = Mesh(device=next(model.parameters()).device)
        self.tokens = list(handle.request.tokens)
        # With a temporal memory, a cache has a memory and one chunk. With halting, all tokens are
        # computed anew (`generate.refuse_cache`).
        self.cache = Cache() if model.config.halting is None else None

    @property
    def request(self) -> Request:
        """The request."""
        return self.handle.request

    def advance(self, scheduled: Scheduled) -> bool:
        """Continue the text by one token; returns True if it has ended."""
        request, handle = self.request, self.handle
        if request.score_prompt and len(self.tokens) == len(request.tokens):
            self.score_prompt(scheduled)
        first = 0 if self.cache is None else self.cache.length
        new_1S = torch.tensor([self.tokens[first:]], device=self.mesh.device)
        sample_1 = torch.tensor([request.sample], device=self.mesh.device)
        logits_1V = next_logits(
            self.model, self.mesh, scheduled, new_1S, self.cache, request.seed, sample_1
        )
        assert logits_1V is not None, "the engine has the whole model"
        unused = torch.tensor(sorted({*self.missing} - request.eos_ids), dtype=torch.long)
        chosen = choose(
            logits_1V.index_fill(-1, unused.to(logits_1V.device), -torch.inf),
            sample_1,
            torch.full_like(sample_1, len(self.tokens)),
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=request.seed,
        )
        token = int(chosen.item())
        if token in request.eos_ids:
            handle.events.put(Event(reason="stop"))
            return True
        self.tokens.append(token)
        ends = len(self.tokens) == len(request.tokens) + request.max_new_tokens
        score: Score | None = None
        if request.logprobs is not None:
            (score,) = score_tokens(logits_1V, [token], request.logprobs, self.missing)
        handle.events.put(Event(token, 0, "length" if ends else None, score))
        return ends

    def score_prompt(self, scheduled: Scheduled) -> None:
        """Score the prompt's tokens by one pass over it."""
        request = self.request
        tokens_1S = torch.tensor([request.tokens], device=self.mesh.device)
        sample_1 = torch.tensor([request.sample], device=self.mesh.device)
        ctx = context_after(self.model, tokens_1S, None, request.seed, sample_1)
        with self.model.tp.whole_sequences():
            x = run_forward(self.model, self.mesh, scheduled, tokens_1S, ctx)
            assert x is not None, "the engine has the whole model"
            logits_SV: Tensor = self.model.all_logits(x)[0]
        self.handle.prompt_scores += score_tokens(
            logits_SV[:-1], request.tokens[1:], request.logprobs or 0, self.missing
        )


class PlainTexts:
    """Waiting and running texts. Those that run have at most `max_texts` texts, and tokens
    of `num_pages` pages together, which bounds their memory.

    Args:
        model: the model.
        max_texts: maximum number of running texts.
        num_pages: tokens of all running texts, counted in pages.
        page_size: tokens of a page.
        missing: ids never chosen.
    """

    def __init__(
        self,
        model: Transformer,
        max_texts: int,
        num_pages: int,
        page_size: int,
        missing: Collection[int],
    ) -> None:
        self.model, self.missing, self.schedules = model, missing, Schedules(model.config)
        self.max_texts, self.num_pages, self.page_size = max_texts, num_pages, page_size
        self.waiting: deque[Handle] = deque()
        """In the order of their requests."""
        self.running: deque[PlainText] = deque()
        """The next one first."""

    def count_pages(self, request: Request) -> int:
        """Return the pages that the tokens of a request would fill."""
        return count_pages(request.most_tokens, self.page_size)

    @property
    def num_used(self) -> int:
        """Number of pages that the tokens of running texts would fill in the end."""
        return sum(self.count_pages(text.request) for text in self.running)

    def receive(self, handle: Handle) -> None:
        """Let a text wait."""
        self.waiting.append(handle)

    def end_cancelled(self) -> None:
        """End cancelled texts."""
        kept = deque(text for text in self.running if not text.handle.cancelled.is_set())
        waiting = deque(handle for handle in self.waiting if not handle.cancelled.is_set())
        ended = {*self.waiting, *(text.handle for text in self.running)}
        ended -= {*waiting, *(text.handle for text in kept)}
        for handle in sorted(ended, key=lambda handle: handle.number):
            handle.events.put(Event(reason="cancelled"))
        self.waiting, self.running = waiting, kept

    def admit(self) -> None:
        """Let texts run that fit, in the order of their requests."""
        while self.waiting and len(self.running) < self.max_texts:
            needed = self.count_pages(self.waiting[0].request)
            if self.num_used + needed > self.num_pages:
                return
            self.running.append(PlainText(self.waiting.popleft(), self.model, self.missing))

    def step(self, counts: Counts) -> bool:
        """Continue the next text by one token; returns False if there is none."""
        self.end_cancelled()
        self.admit()
        if not self.running:
            return False
        text = self.running.popleft()
        scheduled, length = self.schedules.forward(text.request.num_loops), len(text.tokens)
        if not text.advance(scheduled):
            self.running.append(text)
        counts.tokens += len(text.tokens) - length
        return True
