"""What one loop of a block has of its own: low-rank deltas of its linear layers and norms (Bae et
al. 2025, Relaxed Recursive Transformers), level signals (Heo et al. 2025, RingFormer), residual
scales (Liu et al. 2020, Admin)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from megarecur.config.schema import Config
from megarecur.model.norm import build_norm
from megarecur.parallel.linear import LowRank, MakeParameter, product
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


class ResidualScale(nn.Module):
    """x omega + f(x): how one use of a block weighs the stream against a branch (Liu et al. 2020,
    Admin)."""

    def __init__(self, name: str, make: MakeParameter) -> None:
        super().__init__()
        self.weight = make(name + ".weight")

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """[..., D] each to [..., D]."""
        return (x * self.weight + branch).to(x.dtype)


class Adapter(nn.Module):
    """Of one (block, loop): deltas by the name of the layer, such as `query`, and norms by theirs.

    Args:
        name: global, of its parameters: blocks.3.loops.1.
        make: makes them.
        config: the run's.
        dtype: of what products take and give.
    """

    def __init__(self, name: str, make: MakeParameter, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        model, adapters = config.model, config.adapters
        self.deltas = nn.ModuleDict()
        if adapters is not None:
            biased = biased_targets(config) if adapters.biases else ()
            for target in adapter_targets(config):
                self.deltas[target] = LowRank(
                    f"{name}.{target}", make, dtype, adapters.scale, target in biased
                )
        self.signal: LowRank | None = None
        """What is added to the feed-forward's input."""
        self.reads_stream = False
        """Deltas of queries, keys and values read the stream as it is before its norm."""
        for target in signal_names(config):
            signal = LowRank(f"{name}.signal_{target}", make, dtype, factors=("b", "a"))
            if target == SIGNALS[-1]:
                self.signal = signal
            else:
                self.deltas[target] = signal
                self.reads_stream = model.norm_position == "pre"
        own = norm_names(model) if has_own_norms(config) else ()
        self.norms = nn.ModuleDict(
            {norm: build_norm(model.norm, f"{name}.{norm}", make, model.norm_eps) for norm in own}
        )
        for norm in HEAD_NORMS if own and model.qk_norm else ():
            self.norms[norm] = build_norm("rms", f"{name}.{norm}", make, model.norm_eps)

        self.scales = nn.ModuleDict(
            {scale: ResidualScale(f"{name}.{scale}", make) for scale in scale_names(model)}
        )


def join(x: Tensor, branch: Tensor, adapter: Adapter | None, name: str) -> Tensor:
    """x + branch, or by the loop's own residual scale of that name."""
    if adapter is None or not adapter.scales:
        return x + branch
    joined: Tensor = adapter.scales[name](x, branch)
    return joined


def norms_of(adapter: Adapter | None, shared: nn.ModuleDict) -> nn.ModuleDict:
    """The loop's own norms, or else those that the block's loops share."""
    return adapter.norms if adapter is not None and adapter.norms else shared


def informed(x: Tensor, adapter: Adapter | None) -> Tensor:
    """What enters the feed-forward or its norm: x + M x where the loop has such a signal
    (recurrence.md, sections 3.1 and 3.2)."""
    if adapter is None or adapter.signal is None:
        return x
    return x + product(product(x, adapter.signal.a), adapter.signal.b)


def deltas_of(adapter: Adapter | None, *layers: str) -> list[LowRank | None]:
    """What an adapter adds to each of these layers, None where it adds nothing."""
    if adapter is None:
        return [None] * len(layers)
    return [cast(LowRank, adapter.deltas[n]) if n in adapter.deltas else None for n in layers]
