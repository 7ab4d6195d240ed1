"""The texts of an engine: which of them have pages, and which run next.

Texts are admitted in the order of their requests. A text that needs a page when the pool is empty
takes those of the youngest text, which waits and is recomputed later; so the oldest text always
gets on, and none is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megarecur.inference.pages import PagePool, hash_page
from megarecur.inference.passes import Item
from megarecur.inference.request import Handle, Request, count_pages
from megarecur.inference.visits import Group, Route


@dataclass(eq=False)
class Text:
    """A text that is being continued."""

    handle: Handle
    route: Route
    table: Tensor
    """Pages of the text, and room for those that it will need."""
    salt: bytes
    """Everything besides tokens on which their keys and values depend."""
    tokens: list[int]
    """The prompt and the new tokens."""
    exits: dict[int, int] = field(default_factory=dict)
    """Number of loops after which the token at a position left, if not all ran."""
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose keys and values are complete."""
    digests: list[bytes] = field(default_factory=list)
    """Hashes of the first pages of the text."""
    published: int = 0
    """Number of first pages that others may find."""
    item: Item | None = None
    """The tokens on their way through the map."""
    mode: Literal["known", "draft", "verify"] = "known"
    """Kind of the item: known tokens, a drafted one, or drafted ones at full depth."""
    waited: int = 0
    """Number of the pass at which the item began to wait."""
    judged: Item | None = None
    """The new token after an earlier loop, while its copy runs to the head to be judged."""
    exited_after: int = 0
    """Number of loops after which the new token has exited; 0: it has not."""
    exited_items: list[Item] = field(default_factory=list)
    """Known tokens that exited before the others of their item, and wait for them."""
    before_V: Tensor | None = None
    """Log probabilities after the previous loop, for exits by divergence."""
    trail: list[tuple[Item, Tensor]] = field(default_factory=list)
    """The new token after each earlier loop, and its logits [V], for exits by the oracle."""
    unfilled: list[Item] = field(default_factory=list)
    """Tokens that left early, and whose keys and values of the visits that they skip are missing:
    they are made when another token reads them."""
    first_unfilled: float = math.inf
    """The least index of a visit that one of them skips."""
    shallow: list[Item] = field(default_factory=list)
    """Drafted tokens after the loops of a draft."""
    proposals: list[int] = field(default_factory=list)
    """Tokens that they propose."""

    def fill_later(self, item: Item) -> None:
        """Let a copy of an item wait until the keys and values of its further visits are read."""
        self.unfilled.append(item.copy())
        self.first_unfilled = min(self.first_unfilled, item.index)

    @property
    def request(self) -> Request:
        """The request."""
        return self.handle.request

    @property
    def num_new(self) -> int:
        """Number of new tokens."""
        return len(self.tokens) - len(self.request.tokens)

    def forget_item(self) -> None:
        """Forget the tokens that are on their way through the map."""
        self.item, self.judged, self.before_V, self.exited_after = None, None, None, 0
        for kept in (self.exited_items, self.trail, self.shallow, self.proposals):
            kept.clear()

    def extend_digests(self, count: int, page_size: int) -> None:
        """Hash the first `count` pages, which are full."""
        while len(self.digests) < count:
            before = self.digests[-1] if self.digests else self.salt
            begin = len(self.digests) * page_size
            self.digests.append(hash_page(before, self.tokens[begin : begin + page_size]))


class Scheduler:
    """Waiting and running texts over one pool.

    Args:
        pool: the pages.
        max_texts: maximum number of running texts.
        max_rows: maximum rows of a pass, unless one item has more.
    """

    def __init__(self, pool: PagePool, max_texts: int, max_rows: int) -> None:
        self.pool, self.max_texts, self.max_rows = pool, max_texts, max_rows
        self.waiting: list[Text] = []
        """In the order of their requests."""
        self.running: list[Text] = []
        self.making: dict[bytes, Text] = {}
        """The running text that computes each page that others may want."""
        self.passes = 0
        """Number of passes so far."""
        self.preemptions = 0

    def wait(self, text: Text) -> None:
        """Let a text wait for pages."""
        self.waiting.append(text)
        self.waiting.sort(key=lambda text: text.handle.number)

    def admit(self) -> None:
        """Let texts run whose pages fit, in the order of their requests.

        A text whose beginning another one computes at the moment waits for it.
        """
        for text in list(self.waiting):
            if len(self.running) >= self.max_texts:
                return
            shared = self.find_shared(text)
            if shared is None:
                continue
            needed = count_pages(len(text.tokens), self.pool.page_size) - len(shared)
            if needed > self.pool.available:
                for page in shared:
                    self.pool.release(page)
                return
            self.waiting.remove(text)
            self.running.append(text)
            text.pages, text.published = shared, len(shared)
            text.computed = len(shared) * self.pool.page_size
            text.table[: len(shared)] = torch.tensor(shared, dtype=torch.long)
            for digest in text.digests[len(shared) :]:
                self.making.setdefault(digest, text)

    def find_shared(self, text: Text) -> list[int] | None:
        """Return the pages that a text shares, with a user added to each; None if it should wait
        for a text that computes the next one."""
        # The last token is always computed, because its logits are needed.
        # Keys and values of new tokens that exit early are not those of all loops.
        known = len(text.request.tokens) if text.request.exit else len(text.tokens)
        if text.request.score_prompt:
            known = 0  # Pages have no logits.
        size = self.pool.page_size
        text.digests.clear()
        text.extend_digests(min(known, len(text.tokens) - 1) // size, size)
        shared = list[int]()
        for digest in text.digests:
            page = self.pool.find(digest)
            if page is None and digest in self.making:
                for page in shared:
                    self.pool.release(page)
                return None
            if page is None:
                break
            shared.append(page)
        return shared

    def publish(self, text: Text) -> None:
        """Let others find the full pages of a text that are complete."""
        size = self.pool.page_size
        known = len(text.request.tokens) if text.request.exit else len(text.tokens)
        full = min(text.computed, known) // size
        text.extend_digests(full, size)
        for number in range(text.published, full):
            self.pool.publish(text.pages[number], text.digests[number])
            self.forget(text, text.digests[number])
        text.published = max(text.published, full)

    def forget(self, text: Text, digest: bytes) -> None:
        """Remove a page from those that a text computes."""
        if self.making.get(digest) is text:
            del self.making[digest]

    def reserve(self, text: Text, num_tokens: int) -> bool:
        """Give a text the pages of its first `num_tokens` tokens. Returns False if the text has to
        wait, because it is the youngest and all pages are taken."""
        while len(text.pages) < count_pages(num_tokens, self.pool.page_size):
            page = self.pool.take()
            if page is None:
                youngest = max(self.running, key=lambda other: other.handle.number)
                self.preempt(youngest)
                if youngest is text:
                    return False
                continue
            text.table[len(text.pages)] = page
            text.pages.append(page)
        return True

    def preempt(self, text: Text) -> None:
        """Take all pages of a running text, which waits and is recomputed later."""
        self.preemptions += 1
        self.end(text)
        self.wait(text)

    def end(self, text: Text) -> None:
        """Remove a text, and free its pages."""
        if text in self.waiting:
            self.waiting.remove(text)
            return
        self.running.remove(text)
        for page in text.pages[::-1]:
            self.pool.release(page)
        for digest in text.digests:
            self.forget(text, digest)
        text.pages, text.computed, text.published = [], 0, 0
        text.forget_item()
        text.unfilled.clear()
        text.first_unfilled = math.inf

    def next_batch(self, patience: int) -> list[Text]:
        """Return the texts whose items run next: those that wait for the group for which most wait,
        or for that of an item that has waited for more than `patience` passes."""
        by_group = dict[Group, list[Text]]()
        for text in self.running:
            if text.item is not None:
                by_group.setdefault(text.item.visit.group, []).append(text)
        if not by_group:
            return []
        self.passes += 1
        oldest = min(
            (text for texts in by_group.values() for text in texts), key=lambda text: text.waited
        )
        if self.passes - oldest.waited > patience:
            assert oldest.item is not None
            chosen = by_group[oldest.item.visit.group]
        else:
            chosen = max(by_group.values(), key=len)
        return self.cut(sorted(chosen, key=lambda text: (text.waited, text.handle.number)))

    def cut(self, texts: Sequence[Text]) -> list[Text]:
        """Return the first texts whose items have at most `max_rows` rows together, at least one
        text."""
        rows, found = 0, list[Text]()
        for text in texts:
            assert text.item is not None
            rows += len(text.item.positions)
            if found and rows > self.max_rows:
                break
            found.append(text)
        return found
