"""Attention of documents by themselves on CUDA: the flash kernel behind
`torch.nn.attention.varlen`, called directly so that it is part of one opaque operation.

Shapes: T tokens of a micro batch, N query heads, M key heads, H head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megarecur.attention.documents import used_edges
from megarecur.attention.segments import Task


def arguments(task: Task) -> tuple[Tensor, Tensor, int, int]:
    """Return edges of queries and keys on the device, and the longest document of each."""
    edges = used_edges(task.cu_q)
    edges_k = task.cu_k.numpy()[: len(edges)]
    longest = [int((each[1:] - each[:-1]).max()) for each in (edges, edges_k)]
    count = len(edges)
    return task.device_cu_q[:count], task.device_cu_k[:count], longest[0], longest[1]


def end_of_keys(task: Task) -> int:
    """Return the end of the keys of the last document that has queries."""
    return int(task.cu_k.numpy()[len(used_edges(task.cu_q)) - 1])


def window_of(task: Task) -> dict[str, int]:
    """Return the keys that a query sees before and after itself; -1: all."""
    window = task.window_size
    before = window - 1 if window and task.causal else -1
    return {"window_size_left": before, "window_size_right": 0 if task.causal else -1}


def forward(q: Tensor, k: Tensor, v: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Return mixed values [T, N, H], and the logarithm of each softmax's sum [N, T]."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *arguments(task), 0.0, task.causal, False, scale=task.scale, **window_of(task)
    )
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, task: Task
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values."""
    state = torch.empty(2, dtype=torch.uint64, device=q.device)  # Read with dropout only.
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, *arguments(task), 0.0, task.causal,
        state, torch.empty(0, device=q.device), scale=task.scale, **window_of(task),
    )  # fmt: skip
    # The kernel leaves rows of keys behind the last document with queries as they were allocated.
    end = end_of_keys(task)
    for unread in (dk, dv):
        unread.narrow(0, end, len(unread) - end).zero_()
    return dq, dk, dv
