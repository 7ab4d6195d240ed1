"""The head of a task, which classifies sequences, pairs of sequences, pictures, or tokens.

Shapes: B sequences, S positions, P positions of this rank, D hidden, F features, C classes, M
labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarecur.config.objective import TaskConfig
from megarecur.parallel.linear import MakeParameter, Weight, product
from megarecur.parallel.regions import ALONE, TensorParallel


class TaskHead(nn.Module):
    """The head of a task: pools hidden states and computes logits of classes.

    With tensor parallelism the hidden layer is sharded by outputs and the output layer by inputs.
    Every rank computes its share of the logits, and the sum is equal on all ranks. Parameters are
    direct attributes, as in `embedding.Embedding`.

    Args:
        make: makes this rank's shards of the parameters by name.
        own_features: features that this rank's shard of the output layer reads if there is no
            hidden layer.
        has_hidden: whether there is a hidden layer.
    """

    def __init__(
        self,
        task: TaskConfig,
        make: MakeParameter,
        dtype: torch.dtype,
        tp: TensorParallel = ALONE,
        own_features: slice = slice(None),
        has_hidden: bool = True,
    ) -> None:
        super().__init__()
        self.task, self.tp, self.own_features = task, tp, own_features
        self.hidden: Weight | None = None
        if has_hidden:
            self.hidden = Weight(make("task.hidden.weight"), dtype)
            self.hidden_table = self.hidden.parameter
            self.hidden_bias = make("task.hidden.bias")
        self.output = Weight(make("task.output.weight"), dtype)
        self.output_table = self.output.parameter
        self.output_bias = make("task.output.bias")

    def forward(self, x: Tensor, real_BS: Tensor | None) -> Tensor:
        """Return logits of classes, [M, C].

        Args:
            x: [B, P, D] after the final norm, or [B, D] of pooled states.
            real_BS: mask of tokens that are not padding; None: no token is padding.
        """
        features = self.features(self.tp.enter(x), real_BS)
        if self.hidden is None:
            features = features[:, self.own_features]
        else:
            features = F.relu(product(features, self.hidden, self.hidden_bias))
        logits = product(features, self.output)
        logits = logits + (self.output_bias / self.tp.size).to(logits.dtype)
        with self.tp.whole_sequences():  # Dim 1 of the logits is not a position.
            logits = self.tp.leave(logits)
        if logits.shape[-1] > 1:
            return logits
        # One logit z of two classes: the softmax of [0, z] is the sigmoid of z.
        return torch.cat([torch.zeros_like(logits), logits], dim=-1)

    def features(self, x_BSD: Tensor, real_BS: Tensor | None) -> Tensor:
        """Return the features, [M, F].

        They are the states of tokens, the pooled states of sequences or pictures, or [u; v; u*v;
        |u-v|] of pairs, where u and v are the pooled states of neighbouring sequences.
        """
        if self.task.kind == "token":
            return x_BSD.flatten(0, 1)
        pooled_BD = x_BSD if x_BSD.ndim == 2 else pool(x_BSD, real_BS, self.task.pooling)
        if self.task.kind in ("sequence", "image"):
            return pooled_BD
        u, v = pooled_BD[0::2], pooled_BD[1::2]
        return torch.cat([u, v, u * v, (u - v).abs()], dim=-1)


def pool(x_BSD: Tensor, real_BS: Tensor | None, pooling: str) -> Tensor:
    """Return [B, D]: the mean, the last or the first of the states that are not padding; the first
    is that of a class token."""
    if pooling in ("first", "class_token"):
        return x_BSD[:, 0]
    if real_BS is None:
        return x_BSD[:, -1] if pooling == "end" else x_BSD.mean(1)
    lengths_B = real_BS.sum(1)
    if pooling == "end":
        return x_BSD[torch.arange(len(x_BSD), device=x_BSD.device), lengths_B - 1]
    wide = torch.promote_types(x_BSD.dtype, torch.float32)
    total_BD = torch.where(real_BS[..., None], x_BSD, 0.0).sum(1, dtype=wide)
    return (total_BD / lengths_B[:, None]).to(x_BSD.dtype)
