"""Cluster profiles: the common settings of jobs on one Slurm cluster, as YAML."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from megarecur.config.base import Section
from megarecur.config.load import read_sections, validate_section
from megarecur.errors import ConfigError

FOLDER = Path("configs/cluster")
"""Profiles of your own, relative to where the command is run; they come before those shipped."""
SHIPPED = Path(__file__).parent / "clusters"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
UNLIMITED = ("unlimited", "infinite", "-1")
"""Time limits that are none, in lower case."""
DIGITS = re.compile(r"[0-9]{1,9}")
MOST_SECONDS = 366 * 86400
"""Upper bound on time limits of jobs and of their phases."""


class Container(Section):
    """An image that tasks run in, by the pyxis plugin of srun."""

    image: str
    mounts: tuple[str, ...] = ()
    """Mounts, each SOURCE:TARGET[:FLAGS]."""
    workdir: str | None = None

    def srun_options(self, workdir: str | None = None) -> list[str]:
        """Return the options of srun that start tasks inside; `workdir` serves where the profile
        names none."""
        words = [f"--container-image={self.image}"]
        words += [f"--container-mounts={','.join(self.mounts)}"] if self.mounts else []
        workdir = self.workdir or workdir
        return words + ([f"--container-workdir={workdir}"] if workdir else [])


class ClusterProfile(Section):
    """Settings for submitting jobs to one cluster, and for their recovery."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str = "24:00:00"
    """Limit of a job: minutes, MM:SS, HH:MM:SS, D-HH[:MM[:SS]] or UNLIMITED."""
    cpus_per_task: Annotated[int, Field(gt=0, le=1 << 16)] | None = None
    mem: str | None = None
    """Memory per node, such as 200G; 0 means all of it."""
    gpu_type: str | None = None
    """Requests GPUs of this type, as --gpus-per-node=TYPE:N."""
    gpu_request: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """Option that requests GPUs; gres uses --gres=gpu:N, for clusters that support nothing else."""
    exclusive: bool = False
    exclude: tuple[str, ...] = ()
    """Nodes never to use."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, each as written after #SBATCH."""
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    """Lines of bash that run first."""
    environment: dict[str, str | int | float] = Field(default_factory=dict)
    nccl: dict[str, str | int] = Field(default_factory=dict)
    """NCCL_... settings, without the prefix."""
    container: Container | None = None
    python: str | None = None
    """The interpreter on the nodes (default: the submitting one)."""
    node_paths: tuple[str, ...] = ()
    """Folders that only the nodes see; `launch` does not check paths inside them."""
    srun_options: tuple[str, ...] = ()
    style: Literal["srun", "torchrun"] = "srun"
    """Starter of processes: by srun each, or by a torchrun agent per node."""
    interface: str | None = None
    """The network interface of gloo and nccl."""

    requeue: bool = True
    """Allow Slurm to requeue jobs; otherwise they are resubmitted."""
    save_seconds: Annotated[int, Field(ge=10, le=MOST_SECONDS)] = 180
    """Seconds before its time limit at which a run is signalled to save."""
    retries: Annotated[int, Field(ge=0, le=1_000_000)] = 3
    """Maximum consecutive failures without a newer checkpoint that are retried."""
    skip_failing_step: bool = False
    """Skip the samples of a step that fails twice, instead of only reporting it."""
    stall_factor: Annotated[float, Field(gt=1.0, le=1e6)] = 10.0
    """A run stalls if no step ends within this many times the median step."""
    stall_seconds: Annotated[float, Field(gt=0.0, le=MOST_SECONDS)] = 120.0
    """Minimum seconds before a run counts as stalled."""
    start_seconds: Annotated[float, Field(gt=0.0, le=MOST_SECONDS)] = 1200.0
    """A run stalls if it sends no heartbeat for this many seconds while it starts: before it
    trains, and until three optimizer steps have shown their duration."""
    evaluate_seconds: Annotated[float, Field(gt=0.0, le=MOST_SECONDS)] = 600.0
    """The limit during an evaluation, where every batch sends a heartbeat."""
    checkpoint_seconds: Annotated[float, Field(gt=0.0, le=MOST_SECONDS)] = 1800.0
    """The limit while training waits for a checkpoint or its mirror; every tensor that rank 0
    writes, and every copied block, sends a heartbeat."""

    @field_validator("time")
    @classmethod
    def _check_time(cls, value: str) -> str:
        seconds_of(value)
        return value

    @field_validator("environment", "nccl")
    @classmethod
    def _check_names(cls, value: dict[str, str]) -> dict[str, str]:
        wrong = [name for name in value if not NAME.fullmatch(name)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not a name of a variable; correct it")
        return value

    @property
    def variables(self) -> dict[str, str]:
        """Variables that jobs get."""
        found = {f"NCCL_{name.removeprefix('NCCL_')}": str(v) for name, v in self.nccl.items()}
        if self.interface is not None:
            found |= {"NCCL_SOCKET_IFNAME": self.interface, "GLOO_SOCKET_IFNAME": self.interface}
        return found | {name: str(value) for name, value in self.environment.items()}

    def stall_limit(self, phase: str, pace: float | None) -> tuple[str, float]:
        """Return the key that limits the silence of a phase, and its seconds.

        Args:
            pace: seconds per optimizer step, if known.
        """
        if phase == "train" and pace is not None:
            return "stall_seconds", max(self.stall_seconds, self.stall_factor * pace)
        keys = {"evaluate": "evaluate_seconds", "save": "checkpoint_seconds"}
        key = keys.get(phase, "start_seconds")
        return key, float(getattr(self, key))


def seconds_of(time: str) -> float:
    """Return the seconds of a time limit as Slurm writes them; infinity where there is none.

    Raises:
        ValueError: the format is invalid.
    """
    if time.strip().lower() in UNLIMITED:
        return math.inf
    days, dash, rest = time.rpartition("-")
    parts = rest.split(":")
    numbers = [*([days] if dash else []), *parts]
    if not all(DIGITS.fullmatch(part) for part in numbers) or len(parts) > 3:
        raise ValueError(
            f"{time!r} is not a time limit; write minutes, HH:MM:SS, D-HH:MM:SS or UNLIMITED"
        )
    values = [int(part) for part in parts]
    if dash:
        hours, minutes, seconds = [*values, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(values) == 1:
        return 60 * values[0]
    hours, minutes, seconds = [0, *values][-3:]
    return (hours * 60 + minutes) * 60 + seconds


def load_profile(name: str) -> ClusterProfile:
    """Load a profile by its name in configs/cluster, or by the path of a YAML file.

    Raises:
        ConfigError: the profile does not exist, or the file has mistakes (all are listed).
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        known = {p.stem: p for folder in (SHIPPED, FOLDER) for p in sorted(folder.glob("*.yaml"))}
        if name not in known:
            raise ConfigError(
                f"--cluster {name}: is no profile of {FOLDER} or of those shipped "
                f"({', '.join(sorted(known))}), nor a .yaml file; choose one of them"
            )
        path = known[name]
    return validate_section(ClusterProfile, read_sections(path), str(path))
