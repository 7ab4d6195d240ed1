"""Which parameters are trained, decayed, and at which share of the learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from megarecur.config.schema import OptimizerConfig
from megarecur.recurrence.inventory import is_frozen


def build_groups(
    optimizer: OptimizerConfig, parameters: Mapping[str, nn.Parameter]
) -> list[dict[str, Any]]:
    """Trained parameters in torch's groups, each with weight_decay and `lr_multiplier`.

    Matrices decay, vectors do not. Frozen parameters are in no group.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if is_frozen(optimizer, name):
            continue
        kept = parameter.ndim < 2 or any(fnmatchcase(name, p) for p in optimizer.no_decay)
        multiplier = 1.0
        for pattern, factor in optimizer.lr_multipliers.items():
            multiplier = factor if fnmatchcase(name, pattern) else multiplier
        decay = 0.0 if kept else optimizer.weight_decay
        groups.setdefault((decay, multiplier), []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "lr_multiplier": multiplier}
        for (decay, multiplier), members in groups.items()
    ]
