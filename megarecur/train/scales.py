"""Initialization of residual scales (model.residual: admin) by a pass over the first samples.

Admin (Liu et al. 2020) chooses the scales such that no branch outweighs the stream at the start of
training, however deep the map. In the order of the map, over attention and feed-forward of each
step: omega_1 = 1, omega_{i+1} = sqrt(Var(x_i omega_i) + Var(f_i(x_i))) (Takase & Kiyono 2021;
recurrence.md, section 5.2). Each scale is applied as soon as it is set, so that later layers see
the stream as in training.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megarecur.config.run import Config
from megarecur.data.loader import Loader
from megarecur.model.adapters import ResidualScale
from megarecur.model.transformer import Transformer
from megarecur.parallel.linear import is_hollow
from megarecur.parallel.mesh import Mesh, same_error
from megarecur.recurrence.inventory import scale_names
from megarecur.recurrence.schemes import longest_map

TOKENS = 4096
"""Approximate number of tokens of the pass: whole samples, at most a global batch."""


class ScaleSetter:
    """Forward pre-hook that sets each residual scale of a stack at its first use.

    Args:
        mesh: its processes run the same tokens, or parts of them.
        real_BS: mask of the tokens that are not padding; None: all.
    """

    def __init__(self, mesh: Mesh, real_BS: Tensor | None) -> None:
        self.mesh, self.real_BS = mesh, real_BS
        self.ratio = 1.0
        """Value of the next scale."""
        self.done: set[ResidualScale] = set()

    def __call__(self, scale: ResidualScale, inputs: tuple[Tensor, Tensor]) -> None:
        """Set the scale, given its inputs x and f(x) before they are added."""
        if scale in self.done:
            return
        self.done.add(scale)
        scale.weight.data.fill_(self.ratio)
        x, branch = inputs
        self.ratio = math.sqrt(self.variance(x * scale.weight) + self.variance(branch))

    def variance(self, x: Tensor) -> float:
        """Return the variance of all elements of [B, S, D] that are not padding.

        The result is bitwise the same on every process. Parts and copies are summed over all
        processes; copies leave the ratios of the sums unchanged.
        """
        values = (x if self.real_BS is None else x[self.real_BS]).double()
        size = values.new_tensor(float(values.numel()))
        sums = self.mesh.sum_over_world(torch.stack([size, values.sum(), values.square().sum()]))
        count, first, second = map(float, sums.tolist())
        return max(second / count - (first / count) ** 2, 0.0)


@torch.no_grad()
def profile_scales(model: Transformer, config: Config, loader: Loader, mesh: Mesh) -> None:
    """Set the initial residual scales of a model that has some; collective.

    Every replica runs the same samples, whatever the mesh and the micro batch size. A pipeline rank
    builds the whole model for this pass, and so does one whose matrices have no values yet.

    Raises:
        MegarecurError: on every rank, the reason why a rank could not read its samples.
    """
    if not scale_names(config.model):
        return
    count = min(config.train.global_batch_size, -(-TOKENS // config.data.seq_length))
    with same_error(mesh):
        batch = loader.first_samples(count).to(mesh.device)
    whole = model
    if mesh.pp > 1 or any(weight.hollow for weight in model.weights()):
        whole = Transformer(config, mesh.device, tp=model.tp, cp=model.cp)
    ctx = whole.context(batch, step=0, training=False)
    hooks = []
    for runner in whole.runners():  # Each stack begins with a scale of 1.
        positions = (ctx if runner is whole.runner else ctx.source or ctx).positions
        real_BS = None if positions.real_BS is None else positions.own(positions.real_BS)
        setter = ScaleSetter(mesh, real_BS)
        scales = [module for module in runner.modules() if isinstance(module, ResidualScale)]
        hooks += [scale.register_forward_pre_hook(setter) for scale in scales]
    reads: dict[str, Tensor] = {}
    x = whole.enter(batch.tokens_BS, ctx, reads, batch.source, batch.pixels_BCHW)
    whole.run(longest_map(config), x, ctx, reads)
    for hook in hooks:
        hook.remove()
    for name, parameter in model.parameters_by_name.items() if whole is not model else ():
        if not is_hollow(parameter):
            parameter.data.copy_(whole.parameters_by_name[name].data)  # Only scales have changed.
