"""Initialization of a new run from the parameters of another run (`init_from`)."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from megarecur.checkpoint import checkpoint
from megarecur.checkpoint.identity import owner_in
from megarecur.checkpoint.index import Index, read_index
from megarecur.config.load import validate
from megarecur.config.run import Config
from megarecur.errors import CheckpointError, ConfigError
from megarecur.optim.engine import Engine
from megarecur.parallel.mesh import Mesh, same_error
from megarecur.recurrence.inventory import build_inventory

log = logging.getLogger(__name__)

RUN_AT_STEP = re.compile(r"(.+)@([0-9]+)")


def load_initial(config: Config, engine: Engine, tokenizer: str, mesh: Mesh) -> str:
    """Load the parameters from config.init_from; moments and counters keep their values.

    Parameter names are global, so that another layer map over the same blocks can load them
    unchanged.

    Returns:
        Where the parameters are from, in words: step, run and its ID.

    Raises:
        ConfigError: init_from does not name a run folder.
        CheckpointError: the checkpoint does not exist, is damaged, or its parameters do not fit.
    """
    assert config.init_from is not None
    path = find_source(config.init_from, mesh)
    with same_error(mesh):
        index = read_index(path)
        check_fit(path, index, config)
    if mesh.rank == 0 and index.state.get("tokenizer") not in (None, "", tokenizer):
        log.warning(
            "init_from=%s was trained with a tokenizer of fingerprint %s, data.tokenizer=%s has "
            "%s: its embeddings mean other tokens",
            config.init_from, index.state["tokenizer"], config.data.tokenizer, tokenizer,
        )  # fmt: skip
    shards = engine.shards()
    parameters = {name: shards[name] for name in build_inventory(config) if name in shards}
    checkpoint.load(path, parameters, group=mesh.save_group, partial=True)
    engine.load(shards)
    run, step = path.parent.parent.resolve(), checkpoint.step_of(path.name)
    return f"step {step} of run {run.name} (ID {owner_in(index.state) or 'not recorded'}), {path}"


def find_source(source: str, mesh: Mesh, field: str = "init_from") -> Path:
    """Return the checkpoint that RUN or RUN@STEP names; without a step, the newest undamaged one.

    Raises:
        ConfigError: RUN is not a run folder.
        CheckpointError: there is no such checkpoint, or no undamaged one.
    """
    named = (Path(source) / "config.yaml").is_file()  # a folder may have an @ in its name
    match = None if named else RUN_AT_STEP.fullmatch(source)
    run, step = (match[1], int(match[2])) if match else (source, None)
    root = Path(run) / "checkpoints"
    with same_error(mesh):
        if not (Path(run) / "config.yaml").is_file():
            raise ConfigError(
                f"{field}={source}: {run} is no run folder (it has no config.yaml); name the "
                "run_dir of a training run, or of `megarecur convert`"
            )
    if step is None:
        path, damaged = checkpoint.find_checkpoint(root, group=mesh.save_group)
        for message in damaged if mesh.rank == 0 else []:
            log.warning(message)
        if path is None:
            reason = "; ".join(damaged) or "it has none"
            raise CheckpointError(f"{field}={source}: no checkpoint can be used ({reason})")
        return path
    path = root / f"step-{step:08d}"
    with same_error(mesh):
        if not path.is_dir():
            kept = ", ".join(
                str(checkpoint.step_of(p.name)) for p in checkpoint.list_checkpoints(root)
            )
            raise CheckpointError(
                f"{field}={source}: {root} has no checkpoint of step {step}; kept: {kept or 'none'}"
            )
    return path


def check_fit(path: Path, index: Index, config: Config) -> None:
    """Check that the parameters of a checkpoint and of a config have the same names and shapes.

    Raises:
        CheckpointError: listing all that are missing, superfluous or of another shape.
    """
    theirs = build_inventory(validate(index.state.get("config") or {}, f"{path}/index.json"))
    found = {name: list(index.tensors[name].shape) for name in theirs if name in index.tensors}
    wanted = {name: list(spec.shape) for name, spec in build_inventory(config).items()}
    lines = [f"{name}: not in {path}" for name in sorted(wanted.keys() - found.keys())]
    lines += [f"{name}: not in this model" for name in sorted(found.keys() - wanted.keys())]
    lines += [
        f"{name}: shape {found[name]} there, {wanted[name]} here"
        for name in sorted(wanted.keys() & found.keys())
        if wanted[name] != found[name]
    ]
    if lines:
        raise CheckpointError(
            f"init_from={config.init_from}: {len(lines)} parameter(s) of {path} do not fit this "
            "model; give it the same blocks (in any order and depth) and sizes, or leave init_from "
            "out:" + "".join(f"\n  {line}" for line in lines)
        )
