"""AdamW for the engines, by torch's own fused update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw


class AdamW:
    """AdamW (Loshchilov & Hutter 2019), equal to `torch.optim.AdamW(..., fused=True)` in every bit.

    A `torch.optim.Optimizer` imports torch._dynamo when it is made, which takes three seconds of
    processor time in each process. This class calls the same update without that base class.

    Args:
        groups: parameter groups, each with `params`, `weight_decay` and, at a step, `lr`.
        betas: decay rates of the first and the second moment.
        eps: the term that is added to the denominator.
    """

    def __init__(
        self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float
    ) -> None:
        self.param_groups = groups
        self.betas = betas
        self.eps = eps
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        """`exp_avg`, `exp_avg_sq` and `step`, the number of updates, by parameter."""

    def step(self) -> None:
        """Update the parameters that have a gradient."""
        with torch.no_grad(), torch.profiler.record_function("Optimizer.step#AdamW.step"):
            for group in self.param_groups:
                parameters = [p for p in group["params"] if p.grad is not None]
                states = [self.state[p] for p in parameters]
                adamw(
                    parameters,
                    [p.grad for p in parameters],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [],
                    [state["step"] for state in states],
                    fused=True,
                    amsgrad=False,
                    beta1=self.betas[0],
                    beta2=self.betas[1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=self.eps,
                    maximize=False,
                )
