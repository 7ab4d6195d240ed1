"""The run folder: its lease, its config, and where a run stands."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megarecur.config.load import changed_fixed_fields, to_yaml, validate
from megarecur.config.schema import Config
from megarecur.config.write import write_aside
from megarecur.errors import CheckpointError, ConfigError
from megarecur.parallel.mesh import Mesh, same_error
from megarecur.plan.cost import count_tokens_per_step
from megarecur.recurrence.schemes import layer_map


@dataclass(frozen=True)
class TrainState:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    tokens: int = 0
    """Tokens read."""
    skipped: int = 0
    """Steps whose gradient was not finite, or that were left out."""
    interval: dict[str, Any] = field(default_factory=dict)
    """Losses since the last log step, where a checkpoint falls inside an interval."""
    roll_backs: int = 0
    """Times that an alarm brought an earlier checkpoint back."""
    rolled_back_at: int = 0
    """Step of the last one."""

    def advance(self, config: Config, skipped: bool) -> TrainState:
        """One optimizer step later."""
        tokens = count_tokens_per_step(config)
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + tokens,
            skipped=self.skipped + skipped,
            interval={},
        )

    def rolled_back(self) -> TrainState:
        """The same place in data and schedule, with an earlier checkpoint's parameters."""
        return replace(self, roll_backs=self.roll_backs + 1, rolled_back_at=self.step)


def save_state(
    state: TrainState, config: Config, mesh: Mesh, data: dict[str, Any], tokenizer: str, order: str
) -> dict[str, Any]:
    """What a checkpoint keeps beside tensors, as JSON; `order` names that of the next step."""
    return {
        **asdict(state),
        "data": data,
        "config": config.model_dump(mode="json"),
        # For readers of index.json; resuming compares `config`.
        "layer_map": [step.block for step in layer_map(config.recurrence)],
        "mesh": mesh.shape,
        "order_hash": order,
        "tokenizer": tokenizer,
        "versions": {"megarecur": version("megarecur"), "torch": torch.__version__},
    }


def check_resume(saved: dict[str, Any], config: Config, tokenizer: str, path: Path) -> TrainState:
    """Where to go on from, once the config is found to be that of the run.

    Raises:
        ConfigError: listing every fixed field that changed.
        CheckpointError: a tokenizer other than the run's.
    """
    former = validate(saved["config"], f"{path}/index.json")
    changed = changed_fixed_fields(former, config)
    if changed:
        lines = "".join(f"\n  {line}" for line in changed)
        raise ConfigError(
            f"{path} belongs to a run of another config; set these back, or choose another run_dir "
            f"for a new run (init_from starts it from the parameters of this one):{lines}"
        )
    if saved["tokenizer"] != tokenizer:
        raise CheckpointError(
            f"{path} was trained with a tokenizer of fingerprint {saved['tokenizer']}, "
            f"data.tokenizer={config.data.tokenizer} has {tokenizer}; use the run's own"
        )
    return TrainState(**{f.name: saved[f.name] for f in fields(TrainState) if f.name in saved})


def is_reordered(saved: dict[str, Any], config: Config, mesh: Mesh, order: str) -> bool:
    """Whether the next step sums in another order than it would have when it was saved, though the
    mesh is the same: another version chose it, or a cluster's description changed."""
    micro = saved["config"]["train"]["micro_batch_size"]
    same = saved["mesh"] == mesh.shape and micro == config.train.micro_batch_size
    return same and saved["order_hash"] not in (None, order)


def write_config(run_dir: Path, config: Config) -> None:
    """The resolved config, which re-runs the job."""
    write_aside(run_dir / "config.yaml", to_yaml(config))


def steps_left_out(run_dir: Path, mesh: Mesh) -> frozenset[int]:
    """Steps (0: the first) whose samples are not trained on: those that failed again and again, as
    whoever starts the run has listed them in RUN/skipped_steps.json. Collective.

    Raises:
        ConfigError: the file is no list of numbers.
    """
    path, steps = run_dir / "skipped_steps.json", []
    with same_error(mesh):
        if mesh.rank == 0 and path.exists():
            try:
                steps = [int(step) for step in json.loads(path.read_text())]
            except (TypeError, ValueError):
                raise ConfigError(f"{path}: must be a list of steps such as [41]") from None
    return frozenset(mesh.broadcast_object(steps))


@contextmanager
def open_run(config: Config, mesh: Mesh) -> Iterator[Path]:
    """The run folder, made and leased to this job by rank 0 until the context ends.

    The lease is a lock of the operating system on `lease`: it ends with its process, however that
    ends.

    Raises:
        ConfigError: another job holds the folder, it cannot be written, or its disk is full.
    """
    run_dir, refusal, file = Path(config.run_dir), "", None
    if mesh.rank == 0:
        try:
            for name in ("checkpoints", "logs", "plots"):
                (run_dir / name).mkdir(parents=True, exist_ok=True)
            file = (run_dir / "lease").open("a+", encoding="utf-8")
            refusal = take_lease(file, run_dir)
        except OSError as error:
            refusal = f"run_dir={run_dir}: cannot be written ({error.strerror})"
    refusal = mesh.broadcast_object(refusal)
    try:
        if refusal:
            raise ConfigError(refusal)
        yield run_dir
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(
            f"run_dir={run_dir}: {error.strerror}; free some space and start again, "
            "checkpoints already there are untouched"
        ) from None
    finally:
        if file is not None:
            file.close()


def take_lease(file: Any, run_dir: Path) -> str:
    """Lock an open lease file for this process; returns who holds it otherwise."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        return (
            f"run_dir={run_dir} is in use by {holder}; "
            "wait for that job, end it, or choose another run_dir"
        )
    file.seek(0)
    file.truncate()
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    file.flush()
    return ""
