"""The run folder, with its lease and config, and the state of a run."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megarecur.config.load import changed_fixed_fields, to_yaml, validate
from megarecur.config.locate import record_origin
from megarecur.config.run import Config
from megarecur.data.tokenizer import copy_tokenizer_files
from megarecur.errors import (
    SHORTAGES,
    CheckpointError,
    ConfigError,
    DataError,
    explain_os_error,
)
from megarecur.files import replace_file
from megarecur.lease import Lease
from megarecur.parallel.mesh import Mesh, same_error
from megarecur.plan.cost import count_tokens_per_step
from megarecur.reading import escape, read_json
from megarecur.recurrence.schemes import build_map

NEEDED = ("config", "tokenizer", "step", "mesh", "order_hash", "data")
"""Entries of a checkpoint's state that a run resumes from."""
FOLDERS = ("checkpoints", "logs", "plots")
"""Subfolders created at the start; the writers of other files create their own."""
KEPT = ("config.yaml", "origin.json", "identity.json")
"""Files that are recreated with their content if they are deleted during the run."""


@dataclass(frozen=True)
class TrainState:
    """Progress of a run."""

    step: int = 0
    """Finished optimizer steps, including skipped ones."""
    tokens: int = 0
    """Tokens read."""
    skipped: int = 0
    """Steps without an update: a non-finite gradient, or listed in skipped_steps.json."""
    interval: dict[str, Any] = field(default_factory=dict)
    """Sums since the last log step, if a checkpoint falls inside an interval (`Interval.carry`)."""
    roll_backs: int = 0
    """Number of roll-backs to earlier checkpoints."""
    rolled_back_at: int = 0
    """Step of the last roll-back."""

    def advance(self, config: Config, skipped: bool) -> TrainState:
        """Return the state after one more optimizer step."""
        tokens = count_tokens_per_step(config)
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + tokens,
            skipped=self.skipped + skipped,
            interval={},
        )

    def rolled_back(self) -> TrainState:
        """Return the state after a roll-back: the position in data and schedule does not change."""
        return replace(self, roll_backs=self.roll_backs + 1, rolled_back_at=self.step)


def save_state(
    state: TrainState, config: Config, mesh: Mesh, data: dict[str, Any], tokenizer: str, order: str
) -> dict[str, Any]:
    """Return the JSON state of a checkpoint; `order` is the next step's pipeline order hash."""
    return {
        **asdict(state),
        "data": data,
        "config": config.model_dump(mode="json"),
        # For readers of index.json; resuming compares `config`.
        "layer_map": [step.block for step in build_map(config)],
        "mesh": mesh.shape,
        "order_hash": order,
        "tokenizer": tokenizer,
        "versions": {"megarecur": version("megarecur"), "torch": torch.__version__},
    }


def check_resume(saved: dict[str, Any], config: Config, tokenizer: str, path: Path) -> TrainState:
    """Check that a checkpoint fits the config; returns the state to resume from.

    Raises:
        ConfigError: fixed fields have changed, all of which are listed, or the run is past its last
            step.
        CheckpointError: the state is incomplete, or the tokenizer differs from the run's.
    """
    former = validate(saved.get("config") or {}, f"{path}/index.json")
    changed = changed_fixed_fields(former, config)
    if changed:
        lines = "".join(f"\n  {line}" for line in changed)
        raise ConfigError(
            f"{path} belongs to a run of another config; set these back, or choose another run_dir "
            f"for a new run (init_from starts it from the parameters of this one):{lines}"
        )
    missing = [key for key in NEEDED if key not in saved]
    if missing:
        raise CheckpointError(
            f"{path}/index.json: its state lacks {', '.join(missing)}, so that it cannot be "
            "resumed; use another checkpoint, or start a new run"
        )
    if saved["tokenizer"] != tokenizer:
        raise CheckpointError(
            f"{path} was trained with a tokenizer of fingerprint {saved['tokenizer']}, "
            f"data.tokenizer={config.data.tokenizer} has {tokenizer}; use the run's own"
        )
    if saved["step"] > config.train.steps:
        raise ConfigError(
            f"train.steps={config.train.steps}: the run has {saved['step']} steps behind it "
            f"({path}); raise train.steps to at least {saved['step']}, or choose another run_dir "
            "for a new run (init_from: RUN@STEP starts it from a checkpoint of this one)"
        )
    return TrainState(**{f.name: saved[f.name] for f in fields(TrainState) if f.name in saved})


def is_reordered(saved: dict[str, Any], config: Config, mesh: Mesh, order: str) -> bool:
    """Return True if the pipeline order of the next step has changed, though the mesh is the same.

    Sums then differ in their last bits. The order changes if another version of megarecur chose it,
    or the cluster's description was edited.
    """
    micro = saved["config"]["train"]["micro_batch_size"]
    same = saved["mesh"] == mesh.shape and micro == config.train.micro_batch_size
    return same and saved["order_hash"] not in (None, order)


def steps_left_out(run_dir: Path, mesh: Mesh) -> frozenset[int]:
    """Return the steps (0: the first) whose samples are not trained on; collective.

    A supervisor lists steps that failed repeatedly in RUN/skipped_steps.json.

    Raises:
        ConfigError: the file is not a list of numbers.
    """
    path, steps = run_dir / "skipped_steps.json", []
    with same_error(mesh):
        if mesh.rank == 0 and path.exists():
            try:
                steps = [int(step) for step in read_json(path)]
            except (TypeError, ValueError, OverflowError):
                raise ConfigError(f"{path}: must be a list of steps such as [41]") from None
    return frozenset(mesh.broadcast_object(steps))


class RunFolder:
    """The folder of a run; rank 0 leases it and recreates deleted files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lease = Lease(path / "lease", path)
        self.tokenizer = ""
        self.kept: dict[str, bytes] = {}
        """Contents of `KEPT` by name; empty before they are written."""

    def open(self) -> str:
        """Create the folder and take its lease; returns the reason if that fails, else ""."""
        try:
            self.make_folders()
            return self.take_lease()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, *SHORTAGES):
                return explain_os_error(error, self.path)
            return (
                f"run_dir={self.path}: cannot be written ({error.strerror}); choose another run_dir"
            )

    def make_folders(self) -> list[str]:
        """Create missing subfolders; returns their paths."""
        missing = [self.path / name for name in FOLDERS if not (self.path / name).is_dir()]
        for folder in missing:
            folder.mkdir(parents=True, exist_ok=True)
        return [str(folder) for folder in missing]

    def take_lease(self) -> str:
        """Take the lease; returns an error message that names the holder, "" on success."""
        holder = self.lease.take(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        if not holder:
            return ""
        return (
            f"run_dir={self.path} is in use by {escape(holder[:1000], keep='')}; "
            "wait for that job, end it, or choose another run_dir"
        )

    def write_config(self, config: Config) -> None:
        """Write the resolved config, the origin of its paths, and a copy of the tokenizer.

        With these, the folder can be used and the job repeated anywhere.
        """
        self.tokenizer = config.data.tokenizer
        copy_tokenizer_files(self.tokenizer, self.path)
        record_origin(self.path, config)
        replace_file(self.path / "config.yaml", to_yaml(config))
        files = {name: self.path / name for name in KEPT}
        self.kept = {name: file.read_bytes() for name, file in files.items() if file.exists()}

    def restore(self) -> list[str]:
        """Recreate files deleted during the run; returns the missing paths.

        Raises:
            ConfigError: the lease was deleted, and another job holds it now.
            OSError: a file cannot be created.
        """
        missing = self.make_folders()
        if self.lease.is_lost():
            missing.append(str(self.lease.path))
            if refusal := self.take_lease():
                raise ConfigError(refusal)
        for name in [name for name in self.kept if not (self.path / name).exists()]:
            missing.append(str(self.path / name))
            replace_file(self.path / name, self.kept[name])
        if str(self.path / "config.yaml") in missing:
            with suppress(OSError, DataError):  # The original may be gone too.
                copy_tokenizer_files(self.tokenizer, self.path)
        return missing

    def close(self) -> None:
        """Release the lease."""
        self.lease.release()


@contextmanager
def open_run(config: Config, mesh: Mesh) -> Iterator[RunFolder]:
    """Create and lease the run folder; rank 0 holds the lease until the context ends.

    Raises:
        ConfigError: another job holds the folder, or a file of the run cannot be read or written.
    """
    folder = RunFolder(Path(config.run_dir))
    refusal = mesh.broadcast_object(folder.open() if mesh.rank == 0 else "")
    try:
        if refusal:
            raise ConfigError(refusal)
        yield folder
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise  # It is no file's, but a connection's.
        raise ConfigError(
            f"{explain_os_error(error, folder.path)}; checkpoints already in {folder.path} are "
            "untouched"
        ) from None
    finally:
        folder.close()
