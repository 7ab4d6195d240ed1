"""A trained model from its run folder, for evaluation, generation and export."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarecur.config.load import load_config
from megarecur.config.schema import Config, ParallelConfig
from megarecur.data.tokenizer import BYTES, Tokenizer, load_tokenizer
from megarecur.errors import CheckpointError, ConfigError
from megarecur.model.transformer import Transformer
from megarecur.parallel.shards import whole
from megarecur.train import checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run folder, at one of its checkpoints."""

    config: Config
    checkpoint: Path
    state: dict[str, Any]
    """What the checkpoint keeps beside tensors."""
    tokenizer: str
    """Path of the tokenizer, or `bytes`."""


def open_run_folder(run_dir: str | Path, step: int | None = None) -> Run:
    """Find the newest undamaged checkpoint of a run, or that of an optimizer step.

    Raises:
        ConfigError: not a run folder.
        CheckpointError: no checkpoint, none that is undamaged, or none of this step.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(
            f"{run_dir}: is no run folder (it has no config.yaml); give the run_dir of a training "
            "run, or of `megarecur convert`"
        )
    config = load_config(run_dir / "config.yaml")
    # One process reads all of it, whatever mesh wrote it.
    config = config.model_copy(update={"parallel": ParallelConfig()})
    path = find_step(run_dir, step)
    return Run(config, path, checkpoint.read_state(path), find_tokenizer(run_dir, config))


def find_step(run_dir: Path, step: int | None) -> Path:
    """The checkpoint of a step, undamaged; None: the newest one, damaged ones reported."""
    root = run_dir / "checkpoints"
    if step is None:
        path, damaged = checkpoint.find_checkpoint(root)
        for message in damaged:
            log.warning(message)
        if path is None:
            reason = f" ({'; '.join(damaged)})" if damaged else "; train the run first"
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
    """The tokenizer's path: the run folder's own copy where it has one, so that it may be moved."""
    name = config.data.tokenizer
    own = run_dir / Path(name).name
    return str(own) if name != BYTES and own.is_file() else name


def load_model(
    run_dir: str | Path, step: int | None = None, device: torch.device | str = "cpu"
) -> tuple[Transformer, Run]:
    """Build a run's model with the parameters of a checkpoint; moments are not read.

    Raises:
        ConfigError: not a run folder.
        CheckpointError: a checkpoint that cannot be used.
    """
    run = open_run_folder(run_dir, step)
    model = Transformer(run.config, device)
    read_parameters(run.checkpoint, model.parameters_by_name)
    model.refresh()
    return model, run


def read_parameters(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill tensors, by global name, from a checkpoint that was found undamaged."""
    shards = {name: whole(tensor.detach()) for name, tensor in tensors.items()}
    # Every byte was verified when the checkpoint was found.
    checkpoint.load(path, shards, partial=True, verify=False)


def special_ids(run: Run, tokenizer: Tokenizer) -> tuple[int | None, list[int]]:
    """The id that every text begins with, if any, and the ids that end one.

    Corpora made here have no begin of text; a converted model was trained with one.
    """
    origin = run.state.get("hugging_face", {})
    end = origin.get("eos_token_id")
    if end is None:
        end = tokenizer.eos_id
    return origin.get("bos_token_id"), end if isinstance(end, list) else [end]


def open_tokenizer(run: Run) -> Tokenizer:
    """The tokenizer of a run.

    Raises:
        DataError: there is none.
        CheckpointError: it is not the one that the checkpoint was trained with.
    """
    tokenizer = load_tokenizer(run.tokenizer)
    trained_with = run.state.get("tokenizer")
    if trained_with and trained_with != tokenizer.fingerprint:
        raise CheckpointError(
            f"{run.tokenizer} has fingerprint {tokenizer.fingerprint}, but {run.checkpoint} was "
            f"trained with {trained_with}; put the run's own tokenizer back"
        )
    return tokenizer
