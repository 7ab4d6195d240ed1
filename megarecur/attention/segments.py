"""Attention of documents by themselves, on every device: no tensor has a row per pair of tokens.

Documents of equal length are attended to in one call. Short ones are gathered, padded to a common
length; longer ones are read and written where they lie, which spares copies, and share a call if
they follow one another. How a document is padded and computed depends on it alone: results of a
sample do not depend on the other samples of its micro batch. Where scores need a bias, a window, a
softcap or dropout, queries are processed in blocks, against the keys in their reach only.

Shapes: T tokens of a micro batch (B S), N query heads, M key heads, H head_dim, L queries and K
keys of a document, U documents of a group, P rows of gathered groups with padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megarecur.attention.documents import used_edges
from megarecur.parallel.random import drop_share, keep_mask
from megarecur.parallel.transfer import send

SHORT = 32
"""Documents of up to this many tokens are gathered: a call for each would take longer than that."""
WIDE = 128
"""Documents of up to this many tokens are differentiated in fp32 (`differentiate_block`)."""
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
    """First row of the group: among the P rows of queries and of keys, or in the micro batch."""
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
    """The order of gathered rows."""

    order_P: Tensor
    """The token from which each row is read."""
    target_P: Tensor
    """The token to which each row is written; T for padding."""
    padding: Tensor
    """Rows that are padding of a group."""
    unseen: Tensor
    """Tokens that are in no document."""

    def gather(self, x_TNH: Tensor, zero_padding: bool = False) -> Tensor:
        """Return the rows of tokens."""
        rows = x_TNH.index_select(0, self.order_P)
        if zero_padding and len(self.padding):
            rows.index_fill_(0, self.padding, 0.0)
        return rows

    def allocate(self, x_TNH: Tensor) -> Tensor:
        """Return a contiguous tensor of T + 1 tokens to write to, where those that are in no
        document are zero. The last one takes padding."""
        made = x_TNH.new_empty(len(x_TNH) + 1, *x_TNH.shape[1:])
        if len(self.unseen):
            made.index_fill_(0, self.unseen, 0.0)
        return made


@dataclass(frozen=True)
class Layout:
    """The groups of a micro batch."""

    gathered: tuple[Group, ...]
    """Groups of the P rows."""
    in_place: tuple[Group, ...]
    """Groups of documents that follow one another in the micro batch."""
    queries: Rows
    keys: Rows


def padded_length(length: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the lengths to which documents are padded: multiples of 8 between 16 and `SHORT`."""
    short = (length > 16) & (length <= SHORT)
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
    lengths_U2 = np.stack((np.diff(edges_q), np.diff(edges_k)), 1)
    padded_U2 = padded_length(lengths_U2) if pads else lengths_U2
    is_present = lengths_U2.all(1)
    present = np.flatnonzero(is_present)

    def make_group(documents: NDArray[np.int64], first_query: int, first_key: int) -> Group:
        u, (queries_of, keys_of) = documents[0], map(int, padded_U2[documents[0]])
        starts = int(edges_q[u]), int(edges_k[u])
        return Group(len(documents), queries_of, keys_of, first_query, first_key, *starts)

    in_place, short = list[Group](), list[int]()
    follows = np.diff(present) == 1
    for run in split_runs(present, lengths_U2[present], follows & (not alone)):
        u, rows = run[0], lengths_U2[run].sum(0).max()
        if alone or (rows > SHORT and np.array_equal(lengths_U2[u], padded_U2[u])):
            in_place.append(make_group(run, int(edges_q[u]), int(edges_k[u])))
        else:
            short.extend(run)
    order = np.array(short, np.int64)
    order = order[np.lexsort(padded_U2[order].T)]
    gathered, first_query, first_key = [], 0, 0
    for documents in split_runs(order, padded_U2[order]):
        group = make_group(documents, first_query, first_key)
        gathered.append(group)
        first_query, first_key = group.query_rows.stop, group.key_rows.stop
    of_queries = order_rows(edges_q, padded_U2[:, 0], order, is_present, int(edges_q[-1]), device)
    of_keys = of_queries
    if keys:
        of_keys = order_rows(edges_k, padded_U2[:, 1], order, is_present, total_keys, device)
    return Layout(tuple(gathered), tuple(in_place), of_queries, of_keys)


def split_runs(
    documents: NDArray[np.int64],
    lengths: NDArray[np.int64],
    follows: NDArray[np.bool_] | bool = True,
) -> list[NDArray[np.int64]]:
    """Return runs of documents of equal lengths.

    Args:
        documents: indices.
        lengths: of each, one row per document.
        follows: whether each, from the second on, may join the run of the one before.
    """
    if not len(documents):
        return []
    joins = follows & (np.diff(lengths, axis=0) == 0).all(1)
    return np.split(documents, np.flatnonzero(~joins) + 1)


def order_rows(
    edges: NDArray[np.int64],
    padded: NDArray[np.int64],
    documents: NDArray[np.int64],
    is_present: NDArray[np.bool_],
    total: int,
    device: torch.device,
) -> Rows:
    """Return the rows of documents in the given order, each repeated at its end to its padded
    length.

    Args:
        edges: first tokens of all documents, and the last one's end.
        padded: padded lengths of all documents.
        documents: those that are gathered, in order.
        is_present: whether each of all documents is attended to at all.
        total: number of tokens.
        device: device of the tables.
    """
    lengths, sizes = np.diff(edges), padded[documents]
    starts = sizes.cumsum() - sizes
    place = np.arange(sizes.sum()) - starts.repeat(sizes)
    length = lengths[documents].repeat(sizes)
    order = edges[documents].repeat(sizes) + np.minimum(place, length - 1)
    is_real, unseen = place < length, np.ones(total, bool)
    unseen[: edges[-1]] = ~is_present.repeat(lengths)

    def table(values: NDArray[np.int64]) -> Tensor:
        return send(torch.from_numpy(values), device)

    target, padding = np.where(is_real, order, total), np.flatnonzero(~is_real)
    return Rows(table(order), table(target), table(padding), table(np.flatnonzero(unseen)))


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
    out = layout.queries.allocate(q)
    lse = layout.queries.allocate(q.new_empty(*q.shape[:2], 1, dtype=wide))
    attend_groups(layout.in_place, (q, k, v), (out, lse), task)
    if layout.gathered:
        rows = layout.queries.gather(q), layout.keys.gather(k), layout.keys.gather(v)
        made = torch.empty_like(rows[0]), rows[0].new_empty(*rows[0].shape[:2], 1, dtype=wide)
        attend_groups(layout.gathered, rows, made, task)
        for of_rows, of_tokens in zip(made, (out, lse), strict=True):
            of_tokens.index_copy_(0, layout.queries.target_P, of_rows)
    return out[:-1], lse[:-1, :, 0]


def attend_groups(
    groups: Iterable[Group],
    qkv: tuple[Tensor, Tensor, Tensor],
    made: tuple[Tensor, Tensor],
    task: Task,
) -> None:
    """Write mixed values [rows, N, H] and logarithms of sums [rows, N, 1] of groups of rows."""
    (q_RNH, k_RMH, v_RMH), (out_RNH, lse_RN1) = qkv, made
    for group, documents in slices(groups, q_RNH.shape[1], task):
        heads = Heads(group, documents, q_RNH.shape[1] // k_RMH.shape[1])
        q_4, k_4, v_4 = heads.queries(q_RNH), heads.keys(k_RMH), heads.keys(v_RMH)
        for block in blocks(group, task):
            queries, keys = block
            out, lse = attend_block(
                cut(q_4, 2, queries), cut(k_4, 2, keys), cut(v_4, 2, keys), task, heads, block
            )
            heads.write(out_RNH, out, queries)
            heads.write(lse_RN1, lse[..., None], queries)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, task: Task
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values; see `forward`."""
    layout = find_layout(task, q.device)
    queries, keys = layout.queries, layout.keys
    read = grad, q, k, v, out, lse[..., None]
    made = queries.allocate(q), keys.allocate(k), keys.allocate(v)
    differentiate_groups(layout.in_place, read, made, task)
    if layout.gathered:
        rows = (
            queries.gather(grad, zero_padding=True), queries.gather(q), keys.gather(k),
            keys.gather(v), queries.gather(out), queries.gather(read[-1]),
        )  # fmt: skip
        of_rows = tuple(map(torch.empty_like, rows[1:4]))
        differentiate_groups(layout.gathered, rows, of_rows, task)
        for order, x, of_tokens in zip((queries, keys, keys), of_rows, made, strict=True):
            of_tokens.index_copy_(0, order.target_P, x)
    return made[0][:-1], made[1][:-1], made[2][:-1]


def differentiate_groups(
    groups: Iterable[Group], read: Sequence[Tensor], made: Sequence[Tensor], task: Task
) -> None:
    """Write the gradients of queries, keys and values of groups of rows.

    Args:
        groups: what is differentiated.
        read: gradient, queries, keys, values, mixed values, logarithms of sums [rows, N, 1].
        made: gradients of queries, keys and values.
        task: the other arguments.
    """
    grad_RNH, q_RNH, k_RMH, v_RMH, out_RNH, lse_RN1 = read
    dq_RNH, dk_RMH, dv_RMH = made
    for group, documents in slices(groups, q_RNH.shape[1], task):
        heads = Heads(group, documents, q_RNH.shape[1] // k_RMH.shape[1])
        k_4, v_4 = heads.keys(k_RMH), heads.keys(v_RMH)
        of_queries = [heads.queries(t) for t in (grad_RNH, q_RNH, out_RNH)]
        lse_4 = heads.queries(lse_RN1)[..., 0]
        dk_4: Tensor | None = None
        dv_4: Tensor | None = None
        for block in blocks(group, task):
            queries, keys = block
            grad_4, q_4, out_4 = (cut(t, 2, queries) for t in of_queries)
            dq, dk, dv = differentiate_block(
                grad_4, q_4, cut(k_4, 2, keys), cut(v_4, 2, keys), out_4, cut(lse_4, 2, queries),
                task, heads, block,
            )  # fmt: skip
            heads.write(dq_RNH, dq, queries)
            if dk_4 is None and keys == slice(0, group.keys):
                dk_4, dv_4 = dk, dv
                continue
            if dk_4 is None or dv_4 is None:
                shape = (*dk.shape[:2], group.keys, dk.shape[3])
                dk_4, dv_4 = dk.new_zeros(shape), dv.new_zeros(shape)
            dk_4[:, :, keys] += dk
            dv_4[:, :, keys] += dv
        assert dk_4 is not None and dv_4 is not None
        heads.write_keys(dk_RMH, dk_4)
        heads.write_keys(dv_RMH, dv_4)


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

    def split(self, x_RNH: Tensor, rows: slice) -> Tensor:
        """Return the documents that are processed, [U, rows, N, H], as one view: of short documents
        there are many."""
        length, row = (rows.stop - rows.start) // self.group.documents, x_RNH.stride(0)
        first, last = self.documents.start, self.documents.stop
        return x_RNH.as_strided(
            (last - first, length, *x_RNH.shape[1:]),
            (length * row, *x_RNH.stride()),
            x_RNH.storage_offset() + (rows.start + first * length) * row,
        )

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
        target = cut(self.split(rows_PNH, self.group.query_rows), 1, queries)
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


def cut(x: Tensor, dim: int, rows: slice) -> Tensor:
    """Return the rows of a dimension; `x` itself if that is all, as it is in most calls."""
    length = rows.stop - rows.start
    return x if length == x.shape[dim] else x.narrow(dim, rows.start, length)


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


def slices(groups: Iterable[Group], heads: int, task: Task) -> Iterator[tuple[Group, slice]]:
    """Yield groups, cut into few documents at a time where scores of blocks exist."""
    for group in groups:
        most = group.documents
        if is_blocked(group, task):
            per_document = heads * min(block_size(group, task), group.queries) * group.keys
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
        if max(q.shape[-2], k.shape[-2]) <= WIDE:
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
