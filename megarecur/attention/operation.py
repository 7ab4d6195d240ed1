"""Attention of documents by themselves as one operation with a gradient.

A compiled graph calls it as one node: the documents of a micro batch are data of the operation, not
a part of the graph. Eager code uses the same two functions with less overhead.
Shapes: B samples, S queries, K keys, N query heads, M key heads, H head_dim.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from megarecur.attention import segments, varlen
from megarecur.attention.segments import Task

Kernel = Literal["segments", "varlen"]

KERNELS = {"segments": segments, "varlen": varlen}


def attend_documents(q: Tensor, k: Tensor, v: Tensor, task: Task, kernel: Kernel) -> Tensor:
    """Return the mixed values [B, S, N, H].

    Args:
        q: queries [B, S, N, H].
        k: keys [B, K, M, H].
        v: values [B, K, M, H].
        task: documents and scores.
        kernel: the code that runs.
    """
    if torch.compiler.is_compiling():
        out: Tensor = _attend(q, k, v, *unpack(task), kernel)[0]
        return out
    mixed: Tensor = _Attend.apply(q, k, v, task, kernel)  # type: ignore[no-untyped-call]
    return mixed


def unpack(task: Task) -> tuple[Any, ...]:
    """Return the fields of a task in order."""
    return tuple(getattr(task, name) for name in Task.__dataclass_fields__)


def flatten(x_BSNH: Tensor) -> Tensor:
    """Return rows [B S, N, H], of which kernels read each head's channels side by side."""
    rows = x_BSNH.flatten(0, 1)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def run_forward(q: Tensor, k: Tensor, v: Tensor, task: Task, kernel: str) -> tuple[Tensor, Tensor]:
    """Return mixed values [B, S, N, H] and the logarithm of each softmax's sum, [B S, N] or, of
    varlen, [N, B S]."""
    rows = [flatten(t) for t in (q, k, v)]
    out, lse = KERNELS[kernel].forward(*rows, task)
    return out.reshape(q.shape), lse


def run_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    task: Task,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values in their shapes."""
    rows = [flatten(t) for t in (grad, q, k, v, out)]
    dq, dk, dv = KERNELS[kernel].backward(*rows, lse, task)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


class _Attend(torch.autograd.Function):
    """The operation in eager code."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, task: Task, kernel: str) -> Tensor:
        out, lse = run_forward(q, k, v, task, kernel)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.task, ctx.kernel = task, kernel
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        found = run_backward(grads[0], q, k, v, out, lse, ctx.task, ctx.kernel)
        return *found, None, None


SCHEMA = (
    "Tensor cu_q, Tensor cu_k, Tensor device_cu_q, Tensor device_cu_k, Tensor window, "
    "Tensor? slopes, Tensor? key, Tensor? samples, Tensor? positions, bool causal, float scale, "
    "float? softcap, float rate, int first_head, str kernel"
)


@torch.library.custom_op(
    "megarecur::attend_documents",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {SCHEMA}) -> (Tensor, Tensor)",
)
def _attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Compute `run_forward` as one operation of a compiled graph."""
    return run_forward(q, k, v, Task(*rest[:-1]), rest[-1])


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    shape = (q.shape[0] * q.shape[1], q.shape[2])
    lse = q.new_empty(shape[::-1] if rest[-1] == "varlen" else shape, dtype=wide)
    return q.new_empty(q.shape), lse


@torch.library.custom_op(
    "megarecur::attend_documents_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def _differentiate(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `run_backward` as one operation of a compiled graph."""
    return run_backward(grad, q, k, v, out, lse, Task(*rest[:-1]), rest[-1])


@_differentiate.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *rest = inputs
    tensors = [part for part in rest if isinstance(part, Tensor)]
    ctx.save_for_backward(q, k, v, *output, *tensors)
    ctx.rest = [None if isinstance(part, Tensor) else part for part in rest]
    ctx.is_tensor = [isinstance(part, Tensor) for part in rest]


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    first, tensors = ctx.saved_tensors[:5], iter(ctx.saved_tensors[5:])
    rest = [
        next(tensors) if is_tensor else part
        for part, is_tensor in zip(ctx.rest, ctx.is_tensor, strict=True)
    ]
    return *_differentiate(grad, *first, *rest), *(None for _ in rest)


_attend.register_autograd(_backward, setup_context=_save)
