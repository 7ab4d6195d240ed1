"""The engine that a config asks for."""

from __future__ import annotations

from megarecur.config.run import Config
from megarecur.model.transformer import Transformer
from megarecur.optim.engine import Engine, PlainEngine
from megarecur.parallel.mesh import Mesh


def build_engine(model: Transformer, config: Config, mesh: Mesh) -> Engine:
    """Return the engine that `parallel.zero_stage` asks for.

    Raises:
        ConfigError: ZeRO without the DeepSpeed it needs; patterns that match no parameter.
    """
    if config.parallel.zero_stage == 0:
        return PlainEngine(model, config, mesh)
    from megarecur.optim.zero import ZeroEngine

    return ZeroEngine(model, config, mesh)
