"""The sbatch script of a job, as text: what `--dry-run` prints is what is submitted."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.profile import Profile


@dataclass(frozen=True)
class Job:
    """What one job asks Slurm for, beside its cluster's profile."""

    name: str
    nodes: int
    tasks_per_node: int
    """Of Slurm: processes, or agents of torchrun."""
    output: Path
    """Of the batch script; %j and %a are Slurm's."""
    workdir: Path
    code: Path
    """The snapshot that Python imports from."""
    gpus_per_node: int = 0
    time: str | None = None
    array: str | None = None
    """Such as 0-3%2."""
    dependency: str | None = None
    """Such as afterok:17; a job whose dependency can never be met is ended."""
    exclude: tuple[str, ...] = ()
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Variables that each task of an array has a value of its own for."""
    signal: bool = True
    """Whether the batch script is told before the time limit."""


def render(job: Job, profile: Profile, command: Sequence[str]) -> str:
    """The script that runs `command` on the first node of a job; a pure function.

    Words of the command are quoted but for those that begin with `$`, which bash fills in.
    """
    exclude = [*profile.exclude, *job.exclude]
    gpus = f"{profile.gpu_type}:{job.gpus_per_node}" if profile.gpu_type else job.gpus_per_node
    asked = {
        "job-name": job.name,
        "array": job.array,
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks_per_node,
        "gpus-per-node": gpus if job.gpus_per_node else None,
        "cpus-per-task": profile.cpus_per_task,
        "mem": profile.mem,
        "time": job.time or profile.time,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": ",".join(exclude) or None,
        "dependency": job.dependency,
        "kill-on-invalid-dep": "yes" if job.dependency else None,
        "signal": f"B:USR1@{profile.save_seconds}" if job.signal else None,
        "open-mode": "append",
        "output": job.output,
    }
    flags = ["requeue" if profile.requeue else "no-requeue"]
    flags += ["exclusive"] if profile.exclusive else []
    lines = ["#!/bin/bash"]
    lines += [
        f"#SBATCH --{key}={shlex.quote(str(value))}"
        for key, value in asked.items()
        if value is not None
    ]
    lines += [f"#SBATCH --{flag}" for flag in flags]
    lines += [f"#SBATCH {option}" for option in profile.options]
    lines += ["", "set -e"]
    lines += [f"module load {shlex.quote(module)}" for module in profile.modules]
    lines += profile.setup
    lines += [f"export {name}={shlex.quote(text)}" for name, text in profile.variables.items()]
    lines.append(f"export PYTHONPATH={shlex.quote(str(job.code))}${{PYTHONPATH:+:$PYTHONPATH}}")
    for name, values in job.choices.items():
        lines.append(f"{name}=({' '.join(map(shlex.quote, values))})")
        lines.append(f"{name}=${{{name}[$SLURM_ARRAY_TASK_ID]}}")
    lines.append(f"cd {shlex.quote(str(job.workdir))}")
    words = (f'"{word}"' if word.startswith("$") else shlex.quote(word) for word in command)
    lines.append(f"exec {' '.join(words)}")
    return "\n".join(lines) + "\n"
