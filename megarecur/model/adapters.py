"""What one loop of a block has of its own: low-rank deltas of its linear layers, and norms
(Bae et al. 2025, Relaxed Recursive Transformers, section 3)."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from megarecur.config.schema import Config
from megarecur.model.norm import build_norm
from megarecur.parallel.linear import LowRank, MakeParameter
from megarecur.recurrence.inventory import (
    HEAD_NORMS,
    adapter_targets,
    biased_targets,
    has_own_norms,
    norm_names,
)


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
        assert config.adapters is not None
        model, scale = config.model, config.adapters.scale
        biased = biased_targets(config) if config.adapters.biases else ()
        self.deltas = nn.ModuleDict(
            {
                target: LowRank(f"{name}.{target}", make, dtype, scale, target in biased)
                for target in adapter_targets(config)
            }
        )
        own = norm_names(model) if has_own_norms(config) else ()
        self.norms = nn.ModuleDict(
            {norm: build_norm(model.norm, f"{name}.{norm}", make, model.norm_eps) for norm in own}
        )
        for norm in HEAD_NORMS if own and model.qk_norm else ():
            self.norms[norm] = build_norm("rms", f"{name}.{norm}", make, model.norm_eps)


def norms_of(adapter: Adapter | None, shared: nn.ModuleDict) -> nn.ModuleDict:
    """The loop's own norms, or else those that the block's loops share."""
    return adapter.norms if adapter is not None and adapter.norms else shared


def deltas_of(adapter: Adapter | None, *layers: str) -> list[LowRank | None]:
    """What an adapter adds to each of these layers, None where it adds nothing."""
    if adapter is None:
        return [None] * len(layers)
    return [cast(LowRank, adapter.deltas[n]) if n in adapter.deltas else None for n in layers]
