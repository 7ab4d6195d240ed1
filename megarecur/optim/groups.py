"""Parameter groups: which parameters are trained, decayed, and with which learning rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from megarecur.config.optimizer import OptimizerConfig
from megarecur.recurrence.inventory import is_frozen, uses_muon


def build_groups(
    optimizer: OptimizerConfig,
    parameters: Mapping[str, nn.Parameter],
    ndims: Mapping[str, int],
) -> list[dict[str, Any]]:
    """Return the parameters that AdamW trains as torch groups, each with weight_decay and
    `lr_multiplier`.

    Matrices decay, vectors do not. Frozen parameters are in no group.

    Args:
        parameters: parameters, or one-dimensional pieces of them, by name.
        ndims: number of dims of each whole parameter.
    """
    names = [name for name in parameters if not uses_muon(optimizer, name, ndims[name])]
    return _group(optimizer, parameters, ndims, names, optimizer.weight_decay, 1.0)


def build_muon_groups(
    optimizer: OptimizerConfig,
    parameters: Mapping[str, nn.Parameter],
    ndims: Mapping[str, int],
) -> list[dict[str, Any]]:
    """Return the groups of parameters that Muon trains; their rate is a multiple of AdamW's."""
    if optimizer.muon is None:
        return []
    names = [name for name in parameters if uses_muon(optimizer, name, ndims[name])]
    rate = optimizer.muon.lr / optimizer.lr
    return _group(optimizer, parameters, ndims, names, optimizer.muon.weight_decay, rate)


def _group(
    optimizer: OptimizerConfig,
    parameters: Mapping[str, nn.Parameter],
    ndims: Mapping[str, int],
    names: Iterable[str],
    weight_decay: float,
    rate: float,
) -> list[dict[str, Any]]:
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name in names:
        if is_frozen(optimizer, name):
            continue
        parameter = parameters[name]
        kept = ndims[name] < 2 or any(fnmatchcase(name, p) for p in optimizer.no_decay)
        multiplier = 1.0
        for pattern, factor in optimizer.lr_multipliers.items():
            multiplier = factor if fnmatchcase(name, pattern) else multiplier
        key = (0.0 if kept else weight_decay, rate * multiplier)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "lr_multiplier": multiplier}
        for (decay, multiplier), members in groups.items()
    ]
