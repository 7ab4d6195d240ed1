"""Loading of a trained model from its run folder, for evaluation, generation and export."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarecur.checkpoint import checkpoint
from megarecur.config.load import changed_fixed_fields, load_config, validate
from megarecur.config.locate import NOT_A_FILE
from megarecur.config.parallel import ParallelConfig
from megarecur.config.run import Config
from megarecur.data.tokenizer import Tokenizer, load_tokenizer
from megarecur.errors import CheckpointError, ConfigError
from megarecur.model.transformer import Transformer
from megarecur.parallel.shards import whole

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run folder opened at one of its checkpoints."""

    config: Config
    checkpoint: Path
    state: dict[str, Any]
    """State saved with the checkpoint beside the tensors."""
    tokenizer: str
    """Path of the tokenizer, or `bytes`."""


def open_run_folder(run_dir: str | Path, step: int | None = None) -> Run:
    """Open a run folder at the checkpoint of a step, or at the newest undamaged one.

    Raises:
        ConfigError: run_dir is not a run folder.
        CheckpointError: there is no checkpoint, no undamaged one, or none of this step.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(
            f"{run_dir}: is no run folder (it has no config.yaml); give the run_dir of a training "
            "run, or of `megarecur convert`"
        )
    config = load_config(run_dir / "config.yaml")
    # One process reads the whole model, whatever mesh wrote it.
    config = config.model_copy(update={"parallel": ParallelConfig()})
    path = find_step(run_dir, step)
    state = checkpoint.read_state(path)
    check_config(run_dir / "config.yaml", config, path, state)
    return Run(config, path, state, find_tokenizer(run_dir, config))


def check_config(file: Path, config: Config, path: Path, state: Mapping[str, Any]) -> None:
    """Check that a config's fixed fields equal those that the checkpoint was written with.

    Raises:
        ConfigError: listing every field that differs.
    """
    if not state.get("config"):
        return
    former = validate(state["config"], f"{path}/index.json")
    if changed := changed_fixed_fields(former, config):
        lines = "".join(f"\n  {line}; set it back" for line in changed)
        raise ConfigError(f"{file}: damaged or edited since {path.name} was written{lines}")


def find_step(run_dir: Path, step: int | None) -> Path:
    """Return the undamaged checkpoint of a step.

    None: the newest undamaged one; damaged ones are logged as warnings.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    root = run_dir / "checkpoints"
    if step is None:
        path, damaged = checkpoint.find_checkpoint(root)
        for message in damaged:
            log.warning(message)
        if path is None:
            reason = "; train the run first"
            if damaged:
                reason = f" ({'; '.join(damaged)}); restore one, from a mirror or a copy"
            raise CheckpointError(f"{root}: has no checkpoint to load{reason}")
        return path
    path = root / f"step-{step:08d}"
    if not path.is_dir():
        kept = ", ".join(str(checkpoint.step_of(p.name)) for p in checkpoint.list_checkpoints(root))
        raise CheckpointError(f"{root}: has no checkpoint of step {step}; kept: {kept or 'none'}")
    damage = checkpoint.verify(path)
    if damage:
        raise CheckpointError(f"{path} is damaged: {'; '.join(damage)}; choose another step")
    return path


def find_tokenizer(run_dir: Path, config: Config) -> str:
    """Return the tokenizer's path: the copy in the run folder if there is one, else the config's.

    The copy lets a run folder be moved.
    """
    name = config.data.tokenizer
    own = run_dir / Path(name).name
    return str(own) if name not in NOT_A_FILE and own.is_file() else name


def load_model(
    run_dir: str | Path, step: int | None = None, device: torch.device | str = "cpu"
) -> tuple[Transformer, Run]:
    """Build a run's model and load the parameters of a checkpoint; moments are not read.

    Raises:
        ConfigError: run_dir is not a run folder.
        CheckpointError: the checkpoint cannot be used.
    """
    run = open_run_folder(run_dir, step)
    model = Transformer(run.config, device)
    read_parameters(run.checkpoint, model.parameters_by_name)
    model.refresh()
    return model, run


def read_parameters(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, by global name, from a checkpoint whose bytes were already verified."""
    shards = {name: whole(tensor.detach()) for name, tensor in tensors.items()}
    # Every byte was verified when the checkpoint was found.
    checkpoint.load(path, shards, partial=True, verify=False)


def special_ids(run: Run, tokenizer: Tokenizer) -> tuple[int | None, list[int]]:
    """Return the begin-of-text id, None if there is none, and the list of end-of-text ids.

    Corpora prepared by megarecur have no begin-of-text token; converted models may have one.
    """
    origin = run.state.get("hugging_face", {})
    end = origin.get("eos_token_id")
    if end is None:
        end = tokenizer.eos_id
    return origin.get("bos_token_id"), end if isinstance(end, list) else [end]


def open_tokenizer(run: Run) -> Tokenizer:
    """Load the tokenizer of a run.

    Raises:
        DataError: the tokenizer is missing.
        CheckpointError: its fingerprint differs from the one the checkpoint was trained with.
    """
    tokenizer = load_tokenizer(run.tokenizer)
    trained_with = run.state.get("tokenizer")
    if trained_with and trained_with != tokenizer.fingerprint:
        raise CheckpointError(
            f"{run.tokenizer} has fingerprint {tokenizer.fingerprint}, but {run.checkpoint} was "
            f"trained with {trained_with}; put the run's own tokenizer back"
        )
    return tokenizer
