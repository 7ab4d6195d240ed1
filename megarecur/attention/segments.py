"""Attention of documents by themselves, on every device: no tensor has a row per pair of tokens.

Documents of equal length are attended to in one call. Short ones are padded to a common length,
which depends on the document alone: results of a sample do not depend on the other samples of its
micro batch. Where scores need a bias, a window, a softcap or dropout, queries are processed in
blocks, against the keys in their reach only.

Shapes: T tokens of a micro batch (B S), N query heads, M key heads, H head_dim, L queries and K
keys of a document, U documents of a group, P rows of all groups with padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megarecur.attention.documents import used_edges
from megarecur.parallel.random import drop_share, keep_mask
from megarecur.parallel.transfer import send

LONG = 128
"""Documents of more tokens are not padded: few have equal lengths, and a call has work enough."""
BLOCK_ELEMENTS = 1 << 20
"""Max scores of a block of queries, to which documents and heads are limited."""


@dataclass(frozen=True)
class Task:
    """The arguments of the operation other than queries, keys and values."""

    cu_q: Tensor
    """The edges of the queries' documents, int32 on the CPU (`Boundaries.cu_seqlens`)."""
    cu_k: Tensor
    """The edges of the keys' documents. Queries of document u see keys of document u."""
    device_cu_q: Tensor
    device_cu_k: Tensor
    """Both on the device."""
    window: Tensor
    """int32 [] on the CPU: keys that a query sees, itself included; 0: all. It is a tensor so that
    blocks with and without a window share a compiled graph."""
    slopes_N: Tensor | None
    """ALiBi slopes."""
    key: Tensor | None
    """Random key of dropout; None: no dropout."""
    samples_B1: Tensor | None
    positions_1S: Tensor | None
    """Coordinates of dropout (`scores.Drop`)."""
    causal: bool
    """Whether a query sees only keys up to its own position in the document."""
    scale: float
    softcap: float | None
    rate: float
    first_head: int
    """Constants (`scores.Scores`, `scores.Drop`)."""

    @property
    def window_size(self) -> int:
        """The window as a number."""
        return int(self.window.numpy())

    @property
    def num_keys(self) -> int:
        """Rows of keys."""
        return int(self.cu_k.numpy()[-1])

    @property
    def is_fused(self) -> bool:
        """Whether a fused kernel computes these scores: that of CPUs, which takes a bias."""
        on_cpu = self.device_cu_q.device.type == "cpu"
        return on_cpu and self.key is None and self.softcap is None


@dataclass(frozen=True)
class Group:
    """Documents that are attended to together."""

    documents: int
    """U."""
    queries: int
    """L."""
    keys: int
    """K."""
    first_query: int
    first_key: int
    """First row of the group among the P rows of queries, and of keys."""
    query_start: int
    key_start: int
    """First row of its first document in the micro batch."""

    @property
    def query_rows(self) -> slice:
        """The group's rows of queries."""
        return slice(self.first_query, self.first_query + self.documents * self.queries)

    @property
    def key_rows(self) -> slice:
        """The group's rows of keys."""
        return slice(self.first_key, self.first_key + self.documents * self.keys)


@dataclass(frozen=True)
class Rows:
    """The order of rows by group, and back."""

    order_P: Tensor | None
    """The token of each row; None: rows are tokens in order."""
    inverse_T: Tensor
    """The row of each token."""
    padding: Tensor
    """Rows that are padding of a group."""
    unseen: Tensor
    """Tokens that are in no document."""

    def gather(self, x_TNH: Tensor, zero_padding: bool = False) -> Tensor:
        """Return the rows of tokens."""
        if self.order_P is None:
            return x_TNH
        rows = x_TNH.index_select(0, self.order_P)
        if zero_padding and len(self.padding):
            rows.index_fill_(0, self.padding, 0.0)
        return rows

    def scatter(self, x_PNH: Tensor) -> Tensor:
        """Return the tokens of rows; a token of no document is zero."""
        if self.order_P is None:
            return x_PNH
        tokens = x_PNH.index_select(0, self.inverse_T)
        if len(self.unseen):
            tokens.index_fill_(0, self.unseen, 0.0)
        return tokens


@dataclass(frozen=True)
class Layout:
    """The groups of a micro batch."""

    groups: tuple[Group, ...]
    queries: Rows
    keys: Rows


def padded_length(length: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the lengths to which documents are padded: multiples of 8 between 16 and `LONG`."""
    short = (length > 16) & (length <= LONG)
    return np.where(short, -(-length // 8) * 8, length)


def find_layout(task: Task, device: torch.device) -> Layout:
    """Return the layout of a task's documents."""
    edges_q, edges_k = used_edges(task.cu_q), task.cu_k.numpy()
    edges_k = edges_k[: len(edges_q)]
    same = task.cu_q is task.cu_k or np.array_equal(edges_q, edges_k)
    keys, drops = b"" if same else edges_k.tobytes(), task.key is not None
    alone = drops and not are_whole(task, edges_q, edges_k)
    return build_layout(
        edges_q.tobytes(), keys, task.num_keys, task.causal and not drops, alone, device
    )


def are_whole(task: Task, edges_q: NDArray[np.int32], edges_k: NDArray[np.int32]) -> bool:
    """Return True if every sample is one document, of as many keys as the others: then document
    u of dropout's coordinates is sample u."""
    assert task.samples_B1 is not None
    samples = np.arange(len(task.samples_B1) + 1)
    return all(
        len(edges) == len(samples) and np.array_equal(edges, samples * edges[1])
        for edges in (edges_q, edges_k)
    )


@lru_cache(maxsize=32)
def build_layout(
    queries: bytes, keys: bytes, total_keys: int, pads: bool, alone: bool, device: torch.device
) -> Layout:
    """Group documents. All steps of the map use the layout of a micro batch, hence the cache.

    Args:
        queries: edges of the queries' documents, int32.
        keys: edges of the keys' documents; empty: those of the queries.
        total_keys: rows of keys.
        pads: whether short documents are padded, so that padding after the keys is never seen.
        alone: whether every document is a group of its own.
        device: device of the tables.
    """
    edges_q = np.frombuffer(queries, np.int32).astype(np.int64)
    edges_k = np.frombuffer(keys, np.int32).astype(np.int64) if keys else edges_q
    lengths_q, lengths_k = np.diff(edges_q), np.diff(edges_k)
    padded_q, padded_k = lengths_q, lengths_k
    if pads:
        padded_q = padded_k = padded_length(lengths_q)
    present = np.flatnonzero((lengths_q > 0) & (lengths_k > 0))
    if alone:
        members = [np.array([u]) for u in present]
    else:
        pairs = np.stack((padded_q[present], padded_k[present]), 1)
        _, number = np.unique(pairs, axis=0, return_inverse=True)
        order = number.argsort(kind="stable")
        cuts = np.flatnonzero(np.diff(number[order])) + 1
        members = np.split(present[order], cuts) if len(present) else []
    groups, first_q, first_k = [], 0, 0
    for documents in members:
        u, count = int(documents[0]), len(documents)
        queries_of, keys_of = int(padded_q[u]), int(padded_k[u])
        groups.append(
            Group(count, queries_of, keys_of, first_q, first_k, int(edges_q[u]), int(edges_k[u]))
        )
        first_q, first_k = first_q + count * queries_of, first_k + count * keys_of
    ordered = np.concatenate(members) if members else present
    of_queries = order_rows(edges_q, padded_q, ordered, int(edges_q[-1]), device)
    if not keys:
        return Layout(tuple(groups), of_queries, of_queries)
    of_keys = order_rows(edges_k, padded_k, ordered, total_keys, device)
    return Layout(tuple(groups), of_queries, of_keys)


def order_rows(
    edges: NDArray[np.int64],
    padded: NDArray[np.int64],
    documents: NDArray[np.int64],
    total: int,
    device: torch.device,
) -> Rows:
    """Return the rows of documents in the given order, each repeated at its end to its padded
    length."""
    sizes = padded[documents]
    starts = sizes.cumsum() - sizes
    place = np.arange(sizes.sum()) - starts.repeat(sizes)
    length = np.diff(edges)[documents].repeat(sizes)
    order = edges[documents].repeat(sizes) + np.minimum(place, length - 1)
    real = place < length
    inverse, seen = np.zeros(total, np.int64), np.zeros(total, bool)
    inverse[order[real]] = np.flatnonzero(real)
    seen[order] = True
    identity = bool(len(order) == total and np.array_equal(order, np.arange(total)))

    def table(values: NDArray[np.int64]) -> Tensor:
        return send(torch.from_numpy(values), device)

    padding, unseen = np.flatnonzero(~real), np.flatnonzero(~seen)
    return Rows(None if identity else table(order), table(inverse), table(padding), table(unseen))


# ------------------------------------------------------------------------------------- operation


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Return mixed values [T, N, H], and the logarithm of each softmax's sum [T, N].

    Args:
        q: queries [T, N, H].
        k: keys [rows of keys, M, H].
        v: values, as keys.
        task: the other arguments.
    """
    layout, wide = find_layout(task, q.device), torch.promote_types(q.dtype, torch.float32)
    q_PNH = layout.queries.gather(q)
    k_PMH, v_PMH = layout.keys.gather(k), layout.keys.gather(v)
    rows = sum(group.documents * group.queries for group in layout.groups)
    out_PNH, lse_PN = q.new_empty(rows, *q.shape[1:]), q.new_empty(rows, q.shape[1], dtype=wide)
    for group, documents in slices(layout, q, task):
        heads = Heads(group, documents, q.shape[1] // k.shape[1])
        q_4, k_4, v_4 = heads.queries(q_PNH), heads.keys(k_PMH), heads.keys(v_PMH)
        for block in blocks(group, task):
            queries, keys = block
            out, lse = attend_block(
                q_4[:, :, queries], k_4[:, :, keys], v_4[:, :, keys], task, heads, block
            )
            heads.write(out_PNH, out, queries)
            heads.write(lse_PN[..., None], lse[..., None], queries)
    return layout.queries.scatter(out_PNH), layout.queries.scatter(lse_PN)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, task: Task
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values; see `forward`."""
    layout = find_layout(task, q.device)
    grad_PNH = layout.queries.gather(grad, zero_padding=True)
    q_PNH, out_PNH, lse_PN = (layout.queries.gather(t) for t in (q, out, lse))
    k_PMH, v_PMH = layout.keys.gather(k), layout.keys.gather(v)
    dq_PNH = torch.empty_like(q_PNH, memory_format=torch.contiguous_format)
    dk_PMH, dv_PMH = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (k_PMH, v_PMH)
    )
    for group, documents in slices(layout, q, task):
        heads = Heads(group, documents, q.shape[1] // k.shape[1])
        k_4, v_4 = heads.keys(k_PMH), heads.keys(v_PMH)
        of_queries = [heads.queries(t) for t in (grad_PNH, q_PNH, out_PNH)]
        lse_4 = heads.queries(lse_PN[..., None])[..., 0]
        dk_4: Tensor | None = None
        dv_4: Tensor | None = None
        for block in blocks(group, task):
            queries, keys = block
            grad_4, q_4, out_4 = (t[:, :, queries] for t in of_queries)
            dq, dk, dv = differentiate_block(
                grad_4, q_4, k_4[:, :, keys], v_4[:, :, keys], out_4, lse_4[:, :, queries],
                task, heads, block,
            )  # fmt: skip
            heads.write(dq_PNH, dq, queries)
            if dk_4 is None and keys == slice(0, group.keys):
                dk_4, dv_4 = dk, dv
                continue
            if dk_4 is None or dv_4 is None:
                shape = (*dk.shape[:2], group.keys, dk.shape[3])
                dk_4, dv_4 = dk.new_zeros(shape), dv.new_zeros(shape)
            dk_4[:, :, keys] += dk
            dv_4[:, :, keys] += dv
        assert dk_4 is not None and dv_4 is not None
        heads.write_keys(dk_PMH, dk_4)
        heads.write_keys(dv_PMH, dv_4)
    return layout.queries.scatter(dq_PNH), layout.keys.scatter(dk_PMH), layout.keys.scatter(dv_PMH)


@dataclass(frozen=True)
class Heads:
    """Views of a group's rows as [batch, heads, rows, H], as kernels read them.

    Query heads that share a key head (G of them) become the batch, so that keys and values are read
    with stride 0 instead of being repeated.
    """

    group: Group
    documents: slice
    """The documents of the group that are processed."""
    shared: int
    """G."""

    def split(self, x_PNH: Tensor, rows: slice) -> Tensor:
        """Return the group's documents, [U, rows, N, H]."""
        documents: Tensor = x_PNH[rows].unflatten(0, (self.group.documents, -1))
        return documents[self.documents]

    def queries(self, x_PNH: Tensor) -> Tensor:
        """Return [U, N, L, H], or [G, U M, L, H] if query heads share key heads."""
        x = self.split(x_PNH, self.group.query_rows)
        if self.shared == 1:
            return x.transpose(1, 2)
        of_shared: Tensor = x.unflatten(2, (-1, self.shared))
        return of_shared.permute(3, 0, 2, 1, 4).flatten(1, 2)

    def keys(self, x_PMH: Tensor) -> Tensor:
        """Return [U, M, K, H], or [G, U M, K, H] with stride 0 in G."""
        x = self.split(x_PMH, self.group.key_rows).transpose(1, 2)
        return x if self.shared == 1 else x.flatten(0, 1).expand(self.shared, -1, -1, -1)

    def write(self, rows_PNH: Tensor, x: Tensor, queries: slice) -> None:
        """Write a block of queries, as `queries` returns it, to its rows."""
        target = self.split(rows_PNH, self.group.query_rows)[:, queries]
        if self.shared == 1:
            target.copy_(x.transpose(1, 2))
            return
        of_shared = target.unflatten(2, (-1, self.shared)).permute(3, 0, 2, 1, 4)
        of_shared.copy_(x.unflatten(1, of_shared.shape[1:3]))

    def write_keys(self, rows_PMH: Tensor, x: Tensor) -> None:
        """Write gradients of keys to their rows, summed over query heads that share them."""
        target = self.split(rows_PMH, self.group.key_rows)
        if self.shared > 1:
            x = x.sum(0).unflatten(0, (target.shape[0], -1))
        target.copy_(x.transpose(1, 2))


Block = tuple[slice, slice]
"""Queries of a document, and the keys in their reach."""


def is_blocked(group: Group, task: Task) -> bool:
    """Return True if queries are processed in blocks."""
    window = task.window_size
    cut = task.causal and 0 < window < group.keys
    return cut or task.slopes_N is not None or not task.is_fused


def block_size(group: Group, task: Task) -> int:
    """Return the queries of a block. It depends on the document alone."""
    window = task.window_size
    reach = min(group.keys, window + 256) if window and task.causal else group.keys
    return min(256, max(32, (1 << 18) // reach))


def blocks(group: Group, task: Task) -> Iterator[Block]:
    """Yield the blocks of queries of a group's documents with the keys that they may see."""
    if not is_blocked(group, task):
        yield slice(0, group.queries), slice(0, group.keys)
        return
    size, window = block_size(group, task), task.window_size
    for first in range(0, group.queries, size):
        last = min(first + size, group.queries)
        low = max(0, first - window + 1) if window and task.causal else 0
        yield slice(first, last), slice(low, last if task.causal else group.keys)


def slices(layout: Layout, q: Tensor, task: Task) -> Iterator[tuple[Group, slice]]:
    """Yield groups, cut into few documents at a time where scores of blocks exist."""
    for group in layout.groups:
        most = group.documents
        if is_blocked(group, task):
            per_document = q.shape[1] * min(block_size(group, task), group.queries) * group.keys
            most = max(1, BLOCK_ELEMENTS // per_document)
        for first in range(0, group.documents, most):
            yield group, slice(first, min(first + most, group.documents))


def bias_block(task: Task, heads: Heads, block: Block, q: Tensor) -> Tensor | None:
    """Return what is added to the scores of a block, which broadcasts to them; None: nothing."""
    queries, keys = block
    row = torch.arange(queries.start, queries.stop, device=q.device)[:, None]
    column = torch.arange(keys.start, keys.stop, device=q.device)[None]
    bias: Tensor | None = None
    if task.slopes_N is not None:
        slopes_N11 = task.slopes_N.to(q.device)[:, None, None]
        bias = (-slopes_N11 * (row - column).abs().to(torch.float32)).to(q.dtype)
        if heads.shared > 1:
            count = heads.documents.stop - heads.documents.start
            bias = bias.unflatten(0, (-1, heads.shared)).transpose(0, 1)
            bias = bias.repeat(1, count, 1, 1)
        else:
            bias = bias[None]
    if task.causal:
        hidden, window = column > row, task.window_size
        if window:
            hidden = hidden | (column <= row - window)
        if bias is None:
            bias = torch.zeros(1, 1, *hidden.shape, dtype=q.dtype, device=q.device)
        bias = bias.masked_fill(hidden, float("-inf"))
    return bias


def attend_block(
    q: Tensor, k: Tensor, v: Tensor, task: Task, heads: Heads, block: Block
) -> tuple[Tensor, Tensor]:
    """Return mixed values and the logarithms of the sums of a block, in the shapes of `Heads`."""
    if task.is_fused:
        plain = not is_blocked(heads.group, task)
        bias = None if plain else bias_block(task, heads, block, q)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, plain and task.causal, attn_mask=bias, scale=task.scale
        )
        return out, lse
    scores, _ = score_block(q, k, task, heads, block)
    lse = scores.logsumexp(-1)
    weights = drop_block((scores - lse[..., None]).exp(), task, heads, block)
    return weights.to(v.dtype) @ v, lse


def differentiate_block(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    task: Task,
    heads: Heads,
    block: Block,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a block's queries, keys and values, in the shapes of `Heads`."""
    if task.is_fused:
        plain = not is_blocked(heads.group, task)
        bias = None if plain else bias_block(task, heads, block, q)
        dtype = q.dtype
        if max(q.shape[-2], k.shape[-2]) <= LONG:
            # The backward kernel of bf16 packs its operands anew for each document: of up to 128
            # tokens it takes 1.3 to 9 times as long as the one of fp32.
            wide = torch.promote_types(dtype, torch.float32)
            grad, q, k, v, out = (part.to(wide) for part in (grad, q, k, v, out))
            bias = None if bias is None else bias.to(wide)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, plain and task.causal, attn_mask=bias, scale=task.scale
        )
        return dq.to(dtype), dk.to(dtype), dv.to(dtype)
    scores, slope = score_block(q, k, task, heads, block)
    weights = (scores - lse[..., None]).exp()
    dropped = drop_block(weights, task, heads, block)
    dv = dropped.to(grad.dtype).transpose(-1, -2) @ grad
    dweights = drop_block((grad @ v.transpose(-1, -2)).to(weights.dtype), task, heads, block)
    dscores = weights * (dweights - (dweights * weights).sum(-1, keepdim=True))
    if slope is not None:
        dscores = dscores * slope
    dproducts = (dscores * task.scale).to(q.dtype)
    return dproducts @ k, dproducts.transpose(-1, -2) @ q, dv


def score_block(
    q: Tensor, k: Tensor, task: Task, heads: Heads, block: Block
) -> tuple[Tensor, Tensor | None]:
    """Return the scores of a block, and the derivative of its softcap, if any."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores, slope = (q @ k.transpose(-1, -2)).to(wide) * task.scale, None
    if task.softcap is not None:
        capped = torch.tanh(scores / task.softcap)
        scores, slope = task.softcap * capped, 1.0 - capped.square()
    bias = bias_block(task, heads, block, q)
    return (scores if bias is None else scores + bias), slope


def drop_block(weights: Tensor, task: Task, heads: Heads, block: Block) -> Tensor:
    """Apply dropout to the weights of a block, which belong to one document, or to whole
    samples."""
    if task.key is None:
        return weights
    assert task.samples_B1 is not None and task.positions_1S is not None
    batch, length = len(task.samples_B1), task.positions_1S.shape[-1]
    sample, start = divmod(heads.group.query_start, length)
    key_start = heads.group.key_start % (task.num_keys // batch)
    queries, keys = block
    positions = task.positions_1S[0, start + queries.start : start + queries.stop]
    count = heads.documents.stop - heads.documents.start
    first = sample + heads.documents.start
    samples_U1 = task.samples_B1[first : first + count]
    if heads.shared > 1:  # Query head n is the n mod G-th that reads key head n // G.
        number = torch.arange(weights.shape[0] * weights.shape[1] // count, device=weights.device)
        number = number.unflatten(0, (-1, heads.shared)).t()
        samples_U1 = samples_U1.repeat_interleave(number.shape[1], 0).t()
        number = number.repeat(1, count)
    else:
        number = torch.arange(weights.shape[1], device=weights.device)[None]
    kept = keep_mask(
        task.rate,
        task.key,
        (
            samples_U1[..., None],
            (number + task.first_head)[..., None],
            positions[None, None],
        ),
        keys.stop - keys.start,
        key_start + keys.start,
    )
    return torch.where(kept, weights * (1.0 / (1.0 - drop_share(task.rate))), 0.0)
