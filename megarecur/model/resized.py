"""A trained model of pictures, evaluated on pictures of another size."""

from __future__ import annotations

import torch
from torch import Tensor

from megarecur.config.load import validate
from megarecur.config.run import Config
from megarecur.errors import ConfigError
from megarecur.model.patches import resize_positions
from megarecur.model.transformer import Transformer


def resize_config(config: Config, image_size: int) -> Config:
    """Return the config of the same model for pictures of another size.

    Raises:
        ConfigError: the model reads no pictures, its patches do not divide the size, or another
            rule is broken.
    """
    option = f"--image-size {image_size}"
    if not config.reads_images:
        raise ConfigError(f"{option}: the run classifies no pictures; omit it")
    values = config.model_dump(mode="json")
    values["task"]["image_size"] = image_size
    if config.data.images is not None and config.data.images.eval_resize is not None:
        assert config.task is not None and config.task.image_size is not None
        # The same share of a picture is cut out.
        scaled = config.data.images.eval_resize * image_size / config.task.image_size
        values["data"]["images"]["eval_resize"] = round(scaled)
    del values["data"]["seq_length"], values["model"]["max_positions"]
    return validate(values, option)


@torch.no_grad()
def resize_model(model: Transformer, image_size: int, device: torch.device | str) -> Transformer:
    """Return a whole model with the parameters of another one, for pictures of another size.
    Learned positions are interpolated (`patches.resize_positions`); fixed ones are computed anew.

    Raises:
        ConfigError: see `resize_config`.
    """
    resized = Transformer(resize_config(model.config, image_size), device)
    task = resized.config.task
    assert task is not None
    for name, parameter in resized.parameters_by_name.items():
        value: Tensor = model.parameters_by_name[name]
        if name == "embedding.positions":
            value = resize_positions(value, int(task.has_class_token), task.grid_size)
        parameter.copy_(value)
    resized.refresh()
    return resized
