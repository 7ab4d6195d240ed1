"""Whether a world suits a config: asked before any process is started."""

from __future__ import annotations

from megarecur.config.schema import Config
from megarecur.errors import MeshError


def check_world(config: Config, world: int) -> None:
    """Refuse a world that does not fit the config, before any process group is made.

    Raises:
        MeshError: naming the numbers.
    """
    replica = config.parallel.tensor * config.parallel.pipeline
    if world % replica:
        raise MeshError(
            f"{world} processes do not divide into replicas of tensor={config.parallel.tensor} x "
            f"pipeline={config.parallel.pipeline} = {replica}; start a multiple of {replica}"
        )
    dp, batch, micro = (
        world // replica,
        config.train.global_batch_size,
        config.train.micro_batch_size,
    )
    if batch % (dp * micro):
        fitting = [d for d in range(1, batch // micro + 1) if (batch // micro) % d == 0]
        raise MeshError(
            f"train.global_batch_size={batch} does not divide into {dp} replicas x "
            f"train.micro_batch_size={micro}; use {', '.join(map(str, fitting))} replica(s), "
            "or another micro batch size"
        )
