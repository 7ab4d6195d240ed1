"""The head of a task: classes of sequences, of pairs of them, or of tokens.

Shapes: B sequences, S positions, P of them on this rank, D hidden, F features, C logits, M labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarecur.config.schema import TaskConfig
from megarecur.parallel.linear import MakeParameter, Weight, product
from megarecur.parallel.regions import ALONE, TensorParallel

START, END = -1, -2
"""In the place of ids: where a sequence's learned START and END stand."""


class TaskHead(nn.Module):
    """Pools states, and turns them into logits of classes.

    With tensor parallelism the hidden layer is cut by its outputs and the classes by their inputs:
    every rank adds its share of the logits, which are then the same on all. It holds its parameters
    itself, for the reason that `transformer.Embedding` gives.

    Args:
        task: what is classified.
        make: makes its parameters, those that are cut as this rank holds them.
        dtype: of what products take and give.
        tp: the ranks that share them.
        own_features: which of the features the classes read here, where there is no hidden layer.
    """

    def __init__(
        self,
        task: TaskConfig,
        make: MakeParameter,
        dtype: torch.dtype,
        tp: TensorParallel = ALONE,
        own_features: slice = slice(None),
    ) -> None:
        super().__init__()
        self.task, self.tp, self.own_features = task, tp, own_features
        self.hidden: Weight | None = None
        if task.head_size != 0:
            self.hidden = Weight(make("task.hidden.weight"), dtype)
            self.hidden_table = self.hidden.parameter
            self.hidden_bias = make("task.hidden.bias")
        self.output = Weight(make("task.output.weight"), dtype)
        self.output_table = self.output.parameter
        self.output_bias = make("task.output.bias")

    def forward(self, x: Tensor, real_BS: Tensor | None) -> Tensor:
        """[B, P, D] after the final norm, or [B, D] that is pooled, to [M, C]; real_BS says what is
        not padding, None: all."""
        features = self.features(self.tp.enter(x), real_BS)
        if self.hidden is None:
            features = features[:, self.own_features]
        else:
            features = F.relu(product(features, self.hidden, self.hidden_bias))
        logits = product(features, self.output)
        logits = logits + (self.output_bias / self.tp.size).to(logits.dtype)
        with self.tp.whole_sequences():  # These are no positions.
            logits = self.tp.leave(logits)
        if logits.shape[-1] > 1:
            return logits
        # One logit z of two classes: the softmax of [0, z] is the sigmoid of z.
        return torch.cat([torch.zeros_like(logits), logits], dim=-1)

    def features(self, x_BSD: Tensor, real_BS: Tensor | None) -> Tensor:
        """[M, F]: of tokens their states, of sequences a pooled one; of pairs, whose sides are
        neighbours, [u; v; u*v; |u-v|]."""
        if self.task.kind == "token":
            return x_BSD.flatten(0, 1)
        pooled_BD = x_BSD if x_BSD.ndim == 2 else pool(x_BSD, real_BS, self.task.pooling)
        if self.task.kind == "sequence":
            return pooled_BD
        u, v = pooled_BD[0::2], pooled_BD[1::2]
        return torch.cat([u, v, u * v, (u - v).abs()], dim=-1)


def pool(x_BSD: Tensor, real_BS: Tensor | None, pooling: str) -> Tensor:
    """[B, D]: the mean of the states that are no padding, the last or the first of them."""
    if pooling == "first":
        return x_BSD[:, 0]
    if real_BS is None:
        return x_BSD[:, -1] if pooling == "end" else x_BSD.mean(1)
    lengths_B = real_BS.sum(1)
    if pooling == "end":
        return x_BSD[torch.arange(len(x_BSD), device=x_BSD.device), lengths_B - 1]
    wide = torch.promote_types(x_BSD.dtype, torch.float32)
    total_BD = torch.where(real_BS[..., None], x_BSD, 0.0).sum(1, dtype=wide)
    return (total_BD / lengths_B[:, None]).to(x_BSD.dtype)
