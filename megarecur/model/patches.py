"""The embedding of pictures, which are cut into patches (Dosovitskiy et al. 2021).

Shapes: B pictures, C channels, H and W pixels, N patches, S positions (patches, and a class token
before them), P positions of this rank, F values of a patch, D hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megarecur.config.run import Config
from megarecur.model.positions import sinusoidal, sinusoidal_2d
from megarecur.parallel.linear import MakeParameter, Weight, product
from megarecur.parallel.regions import ALONE, TensorParallel
from megarecur.recurrence.inventory import CLASS_TOKEN


class Patches(nn.Module):
    """The embedding of pictures: a linear layer of every patch, a class token, positions.

    Tensor-parallel ranks hold all parameters. Parameters are direct attributes, as in
    `embedding.Embedding`.

    Args:
        config: the run.
        make: makes the parameters by name.
        dtype: compute dtype.
        tp: the ranks that share matrices and, under sequence parallelism, positions.
    """

    def __init__(
        self,
        config: Config,
        make: MakeParameter,
        dtype: torch.dtype,
        tp: TensorParallel = ALONE,
    ) -> None:
        super().__init__()
        assert config.task is not None and config.task.patch_size is not None
        self.config, self.tp, self.size = config, tp, config.task.patch_size
        self.weight = Weight(make("patches.weight"), dtype)
        self.table = self.weight.parameter
        self.bias = make("patches.bias")
        has_token, is_learned = config.task.has_class_token, config.model.positions == "learned"
        self.class_token: nn.Parameter | None = make(CLASS_TOKEN) if has_token else None
        self.positions: nn.Parameter | None = make("embedding.positions") if is_learned else None

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Embed pictures: [B, C, H, W] to [B, S, D], or this rank's positions of it, in the compute
        dtype."""
        rows_BNF = cut_patches(pixels_BCHW, self.size)
        batch, patches = rows_BNF.shape[:2]
        tokens = int(self.class_token is not None)
        start, count = self.tp.span(patches + tokens)
        own = rows_BNF[:, max(start - tokens, 0) : start + count - tokens]
        x = product(own.to(self.weight.compute_dtype), self.weight, self.bias)
        if self.class_token is not None:
            # Every rank computes with the token, so that every rank has a gradient of it, which is
            # zero where the token is another rank's.
            token = self.class_token.expand(batch, 1, -1)
            x = torch.cat((token, x.to(token.dtype)), 1)[:, -count:]
        if self.positions is not None:
            x = x + self.tp.own(self.positions, dim=0)
        fixed = fixed_positions(self.config, torch.promote_types(x.dtype, torch.float32), x.device)
        if fixed is not None:
            x = x + self.tp.own(fixed)
        return x.to(self.weight.compute_dtype)


def cut_patches(pixels_BCHW: Tensor, size: int) -> Tensor:
    """Cut pictures into square patches, row after row: [B, C, H, W] to [B, N, F], with the values
    of a patch by channel, row and column."""
    cut = pixels_BCHW.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [B, C, H/p, p, W/p, p]
    patches: Tensor = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return patches


def fixed_positions(config: Config, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Return the sinusoids of the positions of a picture, [1, S, D]; None without."""
    model, task = config.model, config.task
    assert task is not None
    if model.positions == "sinusoidal":
        places = torch.arange(config.num_positions, device=device)[None]
        return sinusoidal(places, model.hidden_size, dtype, model.sinusoid_layout)
    if model.positions == "sinusoidal_2d":
        of_patches = sinusoidal_2d(task.grid_size, model.hidden_size, dtype, device)
        return F.pad(of_patches, (0, 0, int(task.has_class_token), 0))[None]
    return None


def resize_positions(positions_SD: Tensor, tokens: int, grid_size: int) -> Tensor:
    """Interpolate learned positions for pictures of another size, bicubically and without
    antialiasing, as Hugging Face's ViT and DeiT do.

    Args:
        positions_SD: positions of `tokens` class tokens, which stay, and of a square of patches.
        grid_size: patches in a row of the new pictures.

    Returns:
        [tokens + grid_size^2, D].
    """
    first, of_patches = positions_SD[:tokens], positions_SD[tokens:]
    side = round(len(of_patches) ** 0.5)
    grid = of_patches.unflatten(0, (side, side)).permute(2, 0, 1)[None]
    size = (grid_size, grid_size)
    resized = F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
    return torch.cat((first, resized[0].flatten(1).T))
