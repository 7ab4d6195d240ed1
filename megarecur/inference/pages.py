"""A bounded pool of pages of keys and values, shared by the requests of an engine.

A page has room for the keys and values of P consecutive tokens of a text, at every step of the map.
A full page is found again by the hash of all tokens up to its end, so texts that begin alike share
pages; a page counts its users. A page without users keeps its contents until the pool needs it.

Shapes: P tokens of a page, N key heads, H head_dim.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import torch


class PagePool:
    """A fixed number of pages, and their keys and values.

    Args:
        num_pages: number of pages; the pool never has more.
        page_size: tokens of a page.
        num_steps: steps of the map that keep keys and values.
        num_heads: key heads of this rank.
        head_dim: channels of a head.
        dtype: dtype of keys and values.
        device: device of keys and values.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_steps: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        # Zeros, because attention multiplies what it masks: NaN times zero would spread.
        shape = (num_steps * num_pages + 1, page_size, num_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        """[steps pages + 1, P, N, H]; page i of step s has index s pages + i. The last page belongs
        to no text: padded rows write to it (`graphs`)."""
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.rows = self.keys.flatten(0, 1), self.values.flatten(0, 1)
        """Keys and values by place, [(steps pages + 1) P, N, H]; place i of step s has index
        s num_slots + i."""
        self.free = list(range(num_pages))[::-1]
        """Pages without contents."""
        self.users = [0] * num_pages
        self.found: dict[bytes, int] = {}
        """Full pages by the hash of the tokens up to their end."""
        self.hashes: dict[int, bytes] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()
        """Full pages without users, least recently used first."""

    @property
    def num_slots(self) -> int:
        """Number of tokens for which the pages have room."""
        return self.num_pages * self.page_size

    def write(self, places_T: torch.Tensor, k_TNH: torch.Tensor, v_TNH: torch.Tensor) -> None:
        """Write keys and values to places."""
        self.rows[0].index_copy_(0, places_T, k_TNH)
        self.rows[1].index_copy_(0, places_T, v_TNH)

    @property
    def available(self) -> int:
        """Number of pages that `take` can hand out."""
        return len(self.free) + len(self.idle)

    @property
    def num_used(self) -> int:
        """Number of pages with users."""
        return self.num_pages - self.available

    def take(self) -> int | None:
        """Return a page for one user, without contents; None if all pages have users."""
        if self.free:
            page = self.free.pop()
        elif self.idle:
            page, _ = self.idle.popitem(last=False)
            del self.found[self.hashes.pop(page)]
        else:
            return None
        self.users[page] = 1
        return page

    def find(self, digest: bytes) -> int | None:
        """Return the full page of a hash, and add a user to it; None if there is none."""
        page = self.found.get(digest)
        if page is not None:
            self.users[page] += 1
            self.idle.pop(page, None)
        return page

    def publish(self, page: int, digest: bytes) -> None:
        """Let others find a full page by its hash, unless they find another one."""
        if digest not in self.found and page not in self.hashes:
            self.found[digest], self.hashes[page] = page, digest

    def release(self, page: int) -> None:
        """Remove a user of a page."""
        self.users[page] -= 1
        assert self.users[page] >= 0, f"page {page} has no user"
        if self.users[page]:
            return
        if page in self.hashes:
            self.idle[page] = None
        else:
            self.free.append(page)


def hash_page(before: bytes, tokens: Sequence[int]) -> bytes:
    """Return the hash of all tokens of a text up to the end of a page.

    Args:
        before: the hash of the page before; for the first page, a salt of whatever else keys and
            values depend on, such as the number of loops.
        tokens: the tokens of the page.
    """
    text = ",".join(map(str, tokens)).encode()
    return blake2b(before + b":" + text, digest_size=16).digest()
