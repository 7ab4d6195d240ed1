"""Parameters that each loop of a block owns: low-rank deltas of linear layers and norms (Bae et al.
2025, Relaxed Recursive Transformers), level signals (Heo et al. 2025, RingFormer), and residual
scales (Liu et al. 2020, Admin)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from megarecur.model.norm import build_head_norm, build_norm
from megarecur.parallel.linear import (
    LowRank,
    MakeParameter,
    MaskedLowRank,
    MixedLowRank,
    product,
)
from megarecur.parallel.regions import ALONE, TensorParallel
from megarecur.recurrence.inventory import (
    HEAD_NORMS,
    SIGNALS,
    adapter_targets,
    biased_targets,
    has_own_norms,
    norm_names,
    scale_names,
    signal_names,
)
from megarecur.recurrence.stacks import Stack


class ResidualScale(nn.Module):
    """Residual connection x omega + f(x), which weighs the stream against a branch (Liu et al.
    2020, Admin)."""

    def __init__(self, name: str, make: MakeParameter) -> None:
        super().__init__()
        self.weight = make(name + ".weight")

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return x omega + branch: [..., D] each to [..., D]."""
        return (x * self.weight + branch).to(x.dtype)


class Adapter(nn.Module):
    """The parameters that one (block, loop) owns: deltas by the name of their layer, such as
    `query`, and norms by their name.

    Args:
        name: global prefix of its parameter names, such as blocks.3.loops.1.
        stack: the stack of the block.
    """

    def __init__(
        self,
        name: str,
        make: MakeParameter,
        stack: Stack,
        dtype: torch.dtype,
        tp: TensorParallel = ALONE,
    ) -> None:
        super().__init__()
        config = stack.config
        model, adapters = config.model, config.adapters
        self.deltas = nn.ModuleDict()
        if adapters is not None:
            biased = biased_targets(config) if adapters.biases else ()
            for target in adapter_targets(config):
                self.deltas[target] = LowRank(
                    f"{name}.{target}", make, dtype, adapters.scale, target in biased
                )
        self.signal: LowRank | None = None
        """Low-rank signal added to the input of the feed-forward layer, if any."""
        self.reads_stream = False
        """If True, deltas of queries, keys and values read the stream before its norm."""
        for target in signal_names(config):
            signal = LowRank(f"{name}.signal_{target}", make, dtype, factors=("b", "a"))
            if target == SIGNALS[-1]:
                self.signal = signal
            else:
                self.deltas[target] = signal
                self.reads_stream = model.norm_position == "pre"
        own = norm_names(model, stack.cross) if has_own_norms(config) else ()
        self.norms = nn.ModuleDict(
            {norm: build_norm(model.norm, f"{name}.{norm}", make, model.norm_eps) for norm in own}
        )
        for norm in HEAD_NORMS if own and model.qk_norm else ():
            self.norms[norm] = build_head_norm(model, f"{name}.{norm}", make, tp)
        self.scales = nn.ModuleDict(
            {
                scale: ResidualScale(f"{name}.{scale}", make)
                for scale in scale_names(model, stack.cross)
            }
        )


class MixedAdapter(Adapter):
    """The adapters of several loops of a block, for one sample [1, T, ...] whose rows are sorted by
    loop.

    Args:
        parts: the adapter of each loop.
        counts: number of consecutive rows of each loop; the caller may change them between uses.
    """

    def __init__(self, parts: Sequence[Adapter], counts: list[int]) -> None:
        self._mix(
            parts,
            lambda deltas: MixedLowRank(deltas, counts),
            lambda modules: MixedRows(modules, counts),
        )

    def _mix(
        self,
        parts: Sequence[Adapter],
        mix_deltas: Callable[[Sequence[LowRank]], LowRank],
        mix_modules: Callable[[Sequence[nn.Module]], nn.Module],
    ) -> None:
        nn.Module.__init__(self)
        first = parts[0]
        self.reads_stream = first.reads_stream

        def deltas_named(name: str) -> list[LowRank]:
            return [cast(LowRank, part.deltas[name]) for part in parts]

        self.deltas = nn.ModuleDict({n: mix_deltas(deltas_named(n)) for n in first.deltas})
        self.signal = None
        if first.signal is not None:
            self.signal = mix_deltas([cast(LowRank, part.signal) for part in parts])
        self.norms = nn.ModuleDict(
            {name: mix_modules([part.norms[name] for part in parts]) for name in first.norms}
        )
        self.scales = nn.ModuleDict(
            {name: mix_modules([part.scales[name] for part in parts]) for name in first.scales}
        )


class MaskedAdapter(MixedAdapter):
    """The adapters of several loops of a block, for one sample [1, T, ...] whose rows are in any
    order; see `MaskedLowRank`.

    Args:
        parts: the adapter of each loop.
        masks: the rows of each loop, [1, T, 1]; the caller may change the list between uses.
    """

    def __init__(self, parts: Sequence[Adapter], masks: list[Tensor]) -> None:
        self._mix(
            parts,
            lambda deltas: MaskedLowRank(deltas, masks),
            lambda modules: MaskedRows(modules, masks),
        )


class MixedRows(nn.Module):
    """A module per loop for one sample [1, T, ...] whose rows are sorted by loop; see
    `MixedAdapter`."""

    def __init__(self, parts: Sequence[nn.Module], counts: list[int]) -> None:
        super().__init__()
        self.parts, self.counts = list(parts), counts

    def forward(self, *tensors: Tensor) -> Tensor:
        """Apply the module of each loop to its rows of the tensors, [1, T, ...] each."""
        rows = zip(*(tensor.split(self.counts, 1) for tensor in tensors), strict=True)
        return torch.cat([part(*own) for part, own in zip(self.parts, rows, strict=True)], 1)


class MaskedRows(nn.Module):
    """A module per loop for one sample [1, T, ...] whose rows are in any order; see
    `MaskedAdapter`."""

    def __init__(self, parts: Sequence[nn.Module], masks: list[Tensor]) -> None:
        super().__init__()
        self.parts, self.masks = list(parts), masks

    def forward(self, *tensors: Tensor) -> Tensor:
        """Apply the module of each loop to all rows of the tensors, [1, T, ...] each, and keep the
        results of its own rows."""
        out: Tensor = self.parts[0](*tensors)
        for part, mask in zip(self.parts[1:], self.masks[1:], strict=True):
            out = torch.where(mask.view(1, -1, *[1] * (out.dim() - 2)), part(*tensors), out)
        return out


def join(x: Tensor, branch: Tensor, adapter: Adapter | None, name: str) -> Tensor:
    """Return x + branch, or x omega + branch if the loop has a residual scale of that name."""
    if adapter is None or not adapter.scales:
        return x + branch
    joined: Tensor = adapter.scales[name](x, branch)
    return joined


def norms_of(adapter: Adapter | None, shared: nn.ModuleDict) -> nn.ModuleDict:
    """Return the loop's own norms if it has any, else the norms that the block's loops share."""
    return adapter.norms if adapter is not None and adapter.norms else shared


def informed(x: Tensor, adapter: Adapter | None) -> Tensor:
    """Return the input of the feed-forward layer or of its norm: x + M x if the loop has a
    feed-forward signal M, else x (recurrence.md, sections 3.1 and 3.2)."""
    if adapter is None or adapter.signal is None:
        return x
    if isinstance(adapter.signal, MixedLowRank):
        return adapter.signal.add_to(x.clone(), x)
    return x + product(product(x, adapter.signal.a), adapter.signal.b)


def deltas_of(adapter: Adapter | None, *layers: str) -> list[LowRank | None]:
    """Return the adapter's delta of each of these layers, or None where it has no delta."""
    if adapter is None:
        return [None] * len(layers)
    return [cast(LowRank, adapter.deltas[n]) if n in adapter.deltas else None for n in layers]
