"""The engine that a config asks for."""

from __future__ import annotations

from megarecur.config.run import Config
from megarecur.model.transformer import Transformer
from megarecur.optim.engine import Engine
from megarecur.optim.plain import PlainEngine
from megarecur.optim.sharded import ShardedEngine
from megarecur.parallel.mesh import Mesh


def build_engine(model: Transformer, config: Config, mesh: Mesh) -> Engine:
    """Return the engine that `parallel.zero_stage` and `parallel.zero_engine` ask for.

    Raises:
        ConfigError: DeepSpeed is missing; patterns that match no parameter.
    """
    if config.parallel.zero_stage == 0:
        return PlainEngine(model, config, mesh)
    if config.parallel.shards_natively:
        return ShardedEngine(model, config, mesh)
    from megarecur.optim.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(model, config, mesh)
