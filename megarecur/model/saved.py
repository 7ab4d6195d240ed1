"""The tensors that autograd saves in a forward pass for backward, remade or moved to the host.

`saving` is open while the steps of the map run. With `train.recompute: selective`, code that makes
a cheap tensor (a norm, an activation, a rotation) from saved ones calls `mark`; backward makes the
tensor again instead of keeping it. With `train.offload_activations`, all that is kept moves to the
host and comes back before backward needs it. Both leave values and gradients as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

Function = Callable[..., Tensor]


class Recipe:
    """A tensor that backward makes again: a function of kept tensors and of other recipes."""

    def __init__(self, function: Function, inputs: tuple[Any, ...]) -> None:
        self.function, self.inputs = function, inputs
        self.versions = [i._version if isinstance(i, Tensor) else 0 for i in inputs]

    def make(self) -> Tensor:
        """Make the tensor."""
        for value, version in zip(self.inputs, self.versions, strict=True):
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                assert value._version == version, "a kept tensor was overwritten"
        with torch.no_grad():
            return self.function(*(i.make() if isinstance(i, View) else i for i in self.inputs))


class View:
    """A view of a tensor that is made again."""

    def __init__(self, recipe: Recipe, of: Tensor) -> None:
        self.recipe = recipe
        self.place = of.size(), of.stride(), of.storage_offset()

    def make(self) -> Tensor:
        """Make the tensor and return the view."""
        return self.recipe.make().as_strided(*self.place)


class Storages:
    """Entries by storage. An entry ends with its storage, whose address another one may take."""

    def __init__(self) -> None:
        self.entries: dict[int, tuple[StorageWeakRef, Any]] = {}

    def find(self, tensor: Tensor) -> Any:
        """Return the entry of a tensor's storage, None if there is none."""
        reference, entry = self.entries.get(tensor.untyped_storage()._cdata, (None, None))
        return None if reference is None or reference.expired() else entry

    def add(self, tensor: Tensor, entry: Any) -> None:
        """Set the entry of a tensor's storage."""
        reference = StorageWeakRef(tensor.untyped_storage())
        self.entries[tensor.untyped_storage()._cdata] = reference, entry


class HostCopies(Protocol):
    """Copies between a device and the host that run beside its compute."""

    def leaves(self, tensor: Tensor) -> bool:
        """Return True if a tensor is worth moving."""

    def out(self, flat: Tensor) -> Tensor:
        """Begin to copy a tensor [n] to the host; returns the copy."""

    def back(self, host: Tensor, device: torch.device) -> Any:
        """Begin to copy a tensor back; returns what `wait` takes."""

    def wait(self, fetched: Any) -> Tensor:
        """Return the tensor [n] on the device, which the compute that follows may read."""


class CudaCopies:
    """Copies through pinned host memory, on a CUDA stream of their own."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def leaves(self, tensor: Tensor) -> bool:
        """Return True for tensors on the GPU of at least 64 KiB."""
        return tensor.is_cuda and tensor.untyped_storage().nbytes() >= 1 << 16

    def out(self, flat: Tensor) -> Tensor:
        """Begin to copy a tensor [n] to the host; returns the copy."""
        host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            host.copy_(flat, non_blocking=True)
        flat.record_stream(self.stream)  # Its memory is not reused before the copy has ended.
        return host

    def back(self, host: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event]:
        """Begin to copy a tensor back; returns it with the event of its arrival."""
        with torch.cuda.stream(self.stream):
            flat = host.to(device, non_blocking=True)
            return flat, self.stream.record_event()

    def wait(self, fetched: Any) -> Tensor:
        """Return the tensor [n]; the current stream waits for it."""
        flat: Tensor
        flat, event = fetched
        torch.cuda.current_stream().wait_event(event)
        flat.record_stream(torch.cuda.current_stream())
        return flat


AHEAD = 8
"""Storages that backward fetches from the host before it needs them: about one step of the map."""


class Moved:
    """A storage on the host, and on the device while backward needs it."""

    def __init__(self, number: int, host: Tensor, device: torch.device) -> None:
        self.number, self.host, self.device = number, host, device
        self.uses = 0
        """Number of saved tensors in this storage that backward has yet to read."""
        self.fetched: Any = None


class Offload:
    """The storages that one forward pass moved to the host, in order.

    Args:
        copies: copies between device and host.
    """

    def __init__(self, copies: HostCopies) -> None:
        self.copies, self.storages = copies, Storages()
        self.moved: list[Moved] = []

    def pack(self, tensor: Tensor) -> Tensor | Callable[[], Tensor]:
        """Return a function that fetches the tensor; the tensor itself if it stays."""
        if isinstance(tensor, nn.Parameter) or not self.copies.leaves(tensor):
            return tensor
        moved: Moved | None = self.storages.find(tensor)
        if moved is None:
            storage = tensor.untyped_storage()
            flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            flat.set_(storage, 0, (storage.nbytes() // tensor.element_size(),))  # type: ignore[call-overload]
            moved = Moved(len(self.moved), self.copies.out(flat.detach()), tensor.device)
            self.storages.add(tensor, moved)
            self.moved.append(moved)
        moved.uses += 1
        place = tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()
        return partial(self.unpack, moved.number, *place)

    def unpack(self, number: int, dtype: torch.dtype, *place: Any) -> Tensor:
        """Return a saved tensor on the device, and begin to fetch those before it."""
        for moved in self.moved[max(number - AHEAD, 0) : number + 1][::-1]:
            if moved.fetched is None and moved.uses > 0:
                moved.fetched = self.copies.back(moved.host, moved.device)
        moved = self.moved[number]
        if moved.fetched is None:  # A second backward pass reads it again.
            moved.fetched = self.copies.back(moved.host, moved.device)
        flat = self.copies.wait(moved.fetched)
        moved.uses -= 1
        if moved.uses <= 0:
            moved.fetched = None
        return flat.view(dtype).as_strided(*place)


class Saving:
    """Hooks for the tensors that autograd saves: see the module's docstring.

    Args:
        remakes: remake marked tensors.
        copies: moves what is kept to the host; None: it stays.
    """

    def __init__(self, remakes: bool, copies: HostCopies | None) -> None:
        self.remakes, self.recipes = remakes, Storages()
        self.offload = None if copies is None else Offload(copies)

    def pack(self, tensor: Tensor) -> Any:
        """Return what autograd keeps in place of a tensor."""
        recipe = self.recipes.find(tensor)
        if recipe is not None:
            return View(recipe, tensor).make
        return tensor if self.offload is None else self.offload.pack(tensor)

    def unpack(self, packed: Any) -> Tensor:
        """Return the tensor."""
        tensor: Tensor = packed if isinstance(packed, Tensor) else packed()
        return tensor


_open: Saving | None = None


@contextmanager
def saving(remakes: bool, copies: HostCopies | None) -> Iterator[None]:
    """Remake or move, as `Saving` does, what autograd saves inside this context."""
    global _open
    if not (remakes or copies is not None) or not torch.is_grad_enabled():
        yield
        return
    before, _open = _open, Saving(remakes, copies)
    try:
        with saved_tensors_hooks(_open.pack, _open.unpack):
            yield
    finally:
        _open = before


def is_marked(tensor: Tensor) -> bool:
    """Return True if backward makes this tensor again."""
    return _open is not None and _open.recipes.find(tensor) is not None


def mark(out: Tensor, function: Function, *inputs: Any) -> Tensor:
    """Return `out`, which backward may make again as function(*inputs) instead of keeping it.

    Args:
        out: the tensor, alone in its storage.
        function: makes it, to the last bit and in the same layout.
        inputs: its arguments; tensors among them are kept by autograd anyway, or are marked.
    """
    if _open is None or not _open.remakes or not torch.is_grad_enabled():
        return out
    kept = []
    for value in inputs:
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            recipe = _open.recipes.find(value)
            value = value.detach() if recipe is None else View(recipe, value)
        kept.append(value)
    _open.recipes.add(out, Recipe(function, tuple(kept)))
    return out
