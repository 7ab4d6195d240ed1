"""Initial values of residual scales (model.residual: admin), by a pass over the first samples.

Admin (Liu et al. 2020) sets them such that, at the start of training, no branch
outweighs the stream, however deep the map. In the order of the map, over attention and feed-forward
of each step: omega_1 = 1, omega_{i+1} = sqrt(Var(x_i omega_i) + Var(f_i(x_i))) (Takase & Kiyono
2021; recurrence.md, section 5.2). Each scale is used as soon as it is set, so that what follows
sees the stream as training will.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megarecur.config.schema import Config, Looped
from megarecur.data.loader import Loader
from megarecur.model.adapters import ResidualScale
from megarecur.model.transformer import Transformer
from megarecur.parallel.mesh import Mesh, same_error
from megarecur.recurrence.inventory import scale_names
from megarecur.recurrence.schemes import layer_map

TOKENS = 4096
"""About so many, in whole samples, and at most a global batch."""


class Profile:
    """Sets the scales of a model while it runs, each at its first use.

    Args:
        mesh: its processes run the same tokens, or parts of them.
        real_BS: which of these are not padding; None: all.
    """

    def __init__(self, mesh: Mesh, real_BS: Tensor | None) -> None:
        self.mesh, self.real_BS = mesh, real_BS
        self.ratio = 1.0
        """The next scale."""
        self.done: set[ResidualScale] = set()

    def __call__(self, scale: ResidualScale, inputs: tuple[Tensor, Tensor]) -> None:
        """A forward pre-hook: x and f(x) are known, their sum is not."""
        if scale in self.done:
            return
        self.done.add(scale)
        scale.weight.data.fill_(self.ratio)
        x, branch = inputs
        self.ratio = math.sqrt(self.variance(x * scale.weight) + self.variance(branch))

    def variance(self, x: Tensor) -> float:
        """Of all elements of [B, S, D] that are not padding. Every process has the same one to the
        last digit: parts and copies are summed over all of them, by which a share of two sums does
        not change."""
        values = (x if self.real_BS is None else x[self.real_BS]).double()
        size = values.new_tensor(float(values.numel()))
        sums = self.mesh.sum_over_world(torch.stack([size, values.sum(), values.square().sum()]))
        count, first, second = sums.tolist()
        return max(second / count - (first / count) ** 2, 0.0)


@torch.no_grad()
def profile_scales(model: Transformer, config: Config, loader: Loader, mesh: Mesh) -> None:
    """Set the initial residual scales of a model that has some; collective.

    Every replica runs the same samples, whatever the mesh and the micro batch size. A part of a
    pipeline runs all of the model, made for this pass.

    Raises:
        MegarecurError: on every rank, why one could not read its samples.
    """
    if not scale_names(config.model):
        return
    count = min(config.train.global_batch_size, -(-TOKENS // config.data.seq_length))
    with same_error(mesh):
        batch = loader.first_samples(count).to(mesh.device)
    whole = model if mesh.pp == 1 else Transformer(config, mesh.device, tp=model.tp)
    recurrence = config.recurrence
    most = recurrence.most_loops if isinstance(recurrence, Looped) else None
    ctx = whole.context(batch, step=0, training=False)
    real_BS = None if ctx.real_BS is None else ctx.tp.own(ctx.real_BS)
    profile = Profile(mesh, real_BS)
    scales = [module for module in whole.modules() if isinstance(module, ResidualScale)]
    hooks = [scale.register_forward_pre_hook(profile) for scale in scales]
    whole.run(layer_map(recurrence, most), whole.embed(batch.tokens_BS, ctx), ctx, {})
    for hook in hooks:
        hook.remove()
    for name, parameter in model.parameters_by_name.items() if whole is not model else ():
        parameter.data.copy_(whole.parameters_by_name[name].data)  # All but scales as they were.
