"""The choice between compiled and eager blocks, the same on every rank."""

from __future__ import annotations

from megarecur.config.rules import find_compile_conflict
from megarecur.config.run import Config
from megarecur.errors import ConfigError
from megarecur.model.compile import find_obstacle
from megarecur.parallel.mesh import Mesh, same_error


def choose_compiler(config: Config, mesh: Mesh) -> tuple[bool, str]:
    """Decide whether all ranks compile; collective.

    Returns:
        Whether to compile, and why not if `auto` decided against it, else "".

    Raises:
        ConfigError: train.compile=true, but a requirement of torch.compile is missing.
    """
    wish = config.train.compile
    if wish is None:
        wish = "auto" if mesh.device.type == "cuda" else False
    obstacle = (find_compile_conflict(config) or find_obstacle(mesh.device)) if wish else None
    with same_error(mesh):
        if wish is True and obstacle is not None:
            raise ConfigError(
                f"train.compile=true: {obstacle}; or run eagerly: train.compile=false"
            )
    obstacle = mesh.first_over_world(obstacle)
    if obstacle is not None:
        return False, f"train.compile=auto: running eagerly, as {obstacle}"
    return bool(wish), ""
