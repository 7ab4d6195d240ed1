"""Losses of early exits. Shapes: B samples, S positions, D hidden, V vocabulary, N = B S tokens."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megarecur.config.objective import ExitConfig
from megarecur.objective.auxiliary import z_terms
from megarecur.objective.readout import Readout
from megarecur.parallel.head_loss import Target
from megarecur.parallel.loss import LossTerm, cross_entropy, distillation


def weigh_exits(config: ExitConfig | None, num_exits: int) -> list[float]:
    """Return the weights of each exit's loss and, last, of the last loop's loss."""
    if config is None:
        return [1.0]
    if config.mode == "weighted":
        total = (num_exits + 1) * (num_exits + 2) / 2
        return [(i + 1) / total for i in range(num_exits + 1)]
    if isinstance(config.coefficient, tuple):
        return list(config.coefficient[-1 - num_exits :])
    return [config.coefficient] * num_exits + [1.0]


def exit_terms(
    config: ExitConfig,
    readout: Readout,
    name: str,
    x: Tensor,
    labels_N: Tensor,
    weight: float,
    final: Target | None,
) -> dict[str, LossTerm]:
    """Return the terms of an early exit.

    Backward recomputes the logits, so logits of several exits never exist at the same time. An exit
    with weight 0 is measured without gradient.

    Args:
        x: [B, S, D], the hidden state after its loop.
        final: logits of the last loop, outside of the graph, if the exit learns from them.
    """
    chunked = readout.is_chunked(len(labels_N))
    sums: tuple[Tensor, ...]
    with torch.set_grad_enabled(weight > 0.0 and torch.is_grad_enabled()):
        if chunked:
            sums = readout.sums(x, labels_N, final if config.distill else None)[:3]
        elif torch.is_grad_enabled():
            head = partial(sum_whole, config.distill, readout, labels_N, final)
            sums = checkpoint(head, x, use_reentrant=False, preserve_rng_state=False)
        else:
            sums = sum_whole(config.distill, readout, labels_N, final, x)
    share = config.distill_weight if config.distill else 0.0
    terms = {f"{name}/loss": LossTerm(sums[0], "tokens", weight * (1.0 - share))}
    if config.distill:
        terms[f"{name}/distill"] = LossTerm(sums[2], "tokens", weight * share)
    return terms | z_terms(sums[1], readout.config.model.z_loss, weight, f"{name}/")


def target_of(logits_NV: Tensor) -> Target:
    """Return the target that whole logits are, until backward overwrites them."""
    final_NV, version = logits_NV.detach(), logits_NV._version

    def target(part: slice) -> Tensor:
        assert final_NV._version == version, "the last loop's logits have been consumed"
        return final_NV[part]

    return target


def sum_whole(
    distill: bool, readout: Readout, labels_N: Tensor, final: Target | None, x: Tensor
) -> tuple[Tensor, ...]:
    """Return the sums of an exit's losses from its whole logits."""
    logits_NV = readout.logits(x).flatten(0, 1)
    if not distill:
        return cross_entropy(logits_NV, labels_N, readout.kernels, readout.tp, readout.first)[:2]
    assert final is not None
    final_NV = final(slice(None))
    return distillation(logits_NV, labels_N, final_NV, 1.0, readout.tp, readout.first)[:3]
