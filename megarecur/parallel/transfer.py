"""Copies from the host to the device that wait for neither."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def send(host: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor of the CPU on a device.

    A copy from pageable memory waits until the device has done all earlier work, so what goes to a
    GPU is pinned first.
    """
    if torch.device(device).type == "cuda" and host.device.type == "cpu":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def open_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return a stream for copies to a GPU, which then overlap with compute; None elsewhere."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def receive(tensors: Iterable[Tensor], arrived: torch.cuda.Event) -> None:
    """Let the current stream use tensors that another stream copied, once they have arrived."""
    for tensor in tensors:
        present = torch.cuda.current_stream(tensor.device)
        present.wait_event(arrived)
        tensor.record_stream(present)  # Its memory is not reused before this use has ended.
