"""Cluster profiles: what jobs on one Slurm cluster have in common, as YAML."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator

from megarecur.config.load import read_sections, validate_section
from megarecur.config.schema import Section
from megarecur.errors import ConfigError

FOLDER = Path("configs/cluster")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Container(Section):
    """An image that tasks run in, by the pyxis plugin of srun."""

    image: str
    mounts: tuple[str, ...] = ()
    """SOURCE:TARGET[:FLAGS] each."""
    workdir: str | None = None


class Profile(Section):
    """How jobs are submitted to one cluster, and how they survive there."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str = "24:00:00"
    """Limit of a job: minutes, MM:SS, HH:MM:SS or D-HH[:MM[:SS]]."""
    cpus_per_task: PositiveInt | None = None
    mem: str | None = None
    """Per node, such as 200G; 0: all of it."""
    gpu_type: str | None = None
    """Asks for --gpus-per-node=TYPE:N."""
    exclusive: bool = False
    exclude: tuple[str, ...] = ()
    """Nodes never to use."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, each as it stands after #SBATCH."""
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    """Lines of bash before anything starts."""
    environment: dict[str, str | int | float] = Field(default_factory=dict)
    nccl: dict[str, str | int] = Field(default_factory=dict)
    """NCCL_... settings, without the prefix."""
    container: Container | None = None
    python: str | None = None
    """The interpreter on the nodes; the one that submits if left out."""
    srun_options: tuple[str, ...] = ()
    style: Literal["srun", "torchrun"] = "srun"
    """Who starts processes: srun each of them, or torchrun's agent, one per node."""
    interface: str | None = None
    """The network interface of gloo and nccl."""

    requeue: bool = True
    """Whether Slurm may requeue jobs here; otherwise they are submitted anew."""
    save_seconds: Annotated[int, Field(ge=10)] = 180
    """A run is told to save this long before its time limit."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Failures in a row, without a newer checkpoint, that are tried again."""
    skip_failing_step: bool = False
    """Leave out the samples of a step that fails twice, instead of only reporting it."""
    stall_factor: Annotated[float, Field(gt=1.0)] = 10.0
    """A run stalls when no step ends for this many times the median step."""
    stall_seconds: Annotated[float, Field(gt=0.0)] = 120.0
    """But never earlier than this."""
    start_seconds: Annotated[float, Field(gt=0.0)] = 1200.0
    """What starting, a checkpoint or an evaluation may take at most."""

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
            raise ValueError(f"{wrong[0]!r} is no name of a variable")
        return value

    @property
    def variables(self) -> dict[str, str]:
        """All variables that jobs get."""
        found = {f"NCCL_{name.removeprefix('NCCL_')}": str(v) for name, v in self.nccl.items()}
        if self.interface is not None:
            found |= {"NCCL_SOCKET_IFNAME": self.interface, "GLOO_SOCKET_IFNAME": self.interface}
        return found | {name: str(value) for name, value in self.environment.items()}


def seconds_of(time: str) -> int:
    """Seconds of a time limit as Slurm writes them.

    Raises:
        ValueError: it is written otherwise.
    """
    days, dash, rest = time.rpartition("-")
    parts = rest.split(":")
    numbers = [*([days] if dash else []), *parts]
    if not all(part.isdigit() for part in numbers) or len(parts) > 3:
        raise ValueError(f"{time!r} is no time limit; write minutes, HH:MM:SS or D-HH:MM:SS")
    values = [int(part) for part in parts]
    if dash:
        hours, minutes, seconds = [*values, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(values) == 1:
        return 60 * values[0]
    hours, minutes, seconds = [0, *values][-3:]
    return (hours * 60 + minutes) * 60 + seconds


def load_profile(name: str) -> Profile:
    """A profile by its name in configs/cluster, or by the path of a YAML file.

    Raises:
        ConfigError: no such profile, every mistake of the file.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        known = sorted(file.stem for file in FOLDER.glob("*.yaml"))
        path = FOLDER / f"{name}.yaml"
        if name not in known:
            raise ConfigError(
                f"--cluster {name}: is no profile of {FOLDER} "
                f"({', '.join(known) or 'which holds none'}), nor a .yaml file; choose one"
            )
    return validate_section(Profile, read_sections(path), str(path))
