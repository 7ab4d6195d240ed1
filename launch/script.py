"""The sbatch script of a job as text; `--dry-run` prints exactly what is submitted."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megarecur.errors import ConfigError
from megarecur.launch.profile import ClusterProfile


@dataclass(frozen=True)
class Job:
    """The Slurm request of one job, beside its cluster's profile."""

    name: str
    nodes: int
    tasks_per_node: int
    """Slurm tasks per node: processes, or torchrun agents."""
    logs: Path
    """Folder of the batch script's output."""
    log: str
    """Name of the output file; Slurm replaces %j, %A and %a."""
    workdir: Path
    code: Path
    """The snapshot that Python imports from."""
    comment: str | None = None
    """Comment shown in queue and accounting: the folder of the run."""
    gpus_per_node: int = 0
    array: str | None = None
    """Array such as 0-3%2."""
    dependency: str | None = None
    """Dependency such as afterok:17; a job whose dependency can never be met is ended."""
    exclude: tuple[str, ...] = ()
    choices: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Variables with a separate value for each task of an array."""
    supervised: bool = True
    """True if the command is a supervisor: signalled before the time limit, and restarted if it is
    killed."""


VARIABLE = re.compile(r"\$[A-Za-z_][A-Za-z0-9_]*")
"""A word of a command that bash expands."""
FORWARD = """
# Forward signals to the supervisor, those too that come before it has begun.
pass_on() {
    caught=1
    if [ "$supervisor" ]; then kill -"$1" $supervisor 2>/dev/null || true; else early+=" $1"; fi
}
for signal in USR1 USR2 TERM; do trap "pass_on $signal" $signal; done
"""
"""Part of the script of a supervised job before its setup, which may take long."""

SUPERVISE = """
# If the supervisor is killed, for example for lack of memory, restart it: it ends the remaining
# ranks, and resumes the run.
set +e
for turn in {{1..10}}; do
    given=$early
    MEGARECUR_EARLY_SIGNALS=$given {command} &
    supervisor=$!
    for signal in ${{early#"$given"}}; do kill -$signal $supervisor 2>/dev/null; done
    caught=1
    while [ "$caught" ]; do
        caught=
        wait $supervisor
        now=$?
        [ $now = 127 ] || code=$now
    done
    supervisor= early=
    if [ $code -le 128 ] || [ $code = 143 ]; then break; fi
    export MEGARECUR_SUPERVISOR_ENDED=$code
done
exit $code
"""
"""End of the script of a supervised job; `wait` returns early on a signal."""


def render(job: Job, profile: ClusterProfile, command: Sequence[str]) -> str:
    """Return the script that runs `command` on the first node of a job; a pure function.

    Words of the command are quoted, except those such as `$NAME`, which bash expands.

    Raises:
        ConfigError: a value for sbatch contains a line break, which would end its line.
    """
    exclude = [*profile.exclude, *job.exclude]
    gpus = f"{profile.gpu_type}:{job.gpus_per_node}" if profile.gpu_type else job.gpus_per_node
    by_gres = profile.gpu_request == "gres"
    asked = {
        "job-name": job.name,
        # squeue separates its columns by |
        "comment": None if "|" in (job.comment or "|") else job.comment,
        "array": job.array,
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks_per_node,
        "gpus-per-node": gpus if job.gpus_per_node and not by_gres else None,
        "gres": f"gpu:{gpus}" if job.gpus_per_node and by_gres else None,
        "cpus-per-task": profile.cpus_per_task,
        "mem": profile.mem,
        "time": profile.time,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": ",".join(exclude) or None,
        "dependency": job.dependency,
        "kill-on-invalid-dep": "yes" if job.dependency else None,
        "signal": f"B:USR1@{profile.save_seconds}" if job.supervised else None,
        "open-mode": "append",
        "output": f"{escape(job.logs)}/{job.log}",
    }
    for key, value in [*asked.items(), *(("option", option) for option in profile.options)]:
        refuse_line_break(key, str(value))
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
    # splitlines() would also break a path at the separators of Unicode.
    lines += FORWARD.removesuffix("\n").split("\n") if job.supervised else []
    lines += ["", "set -e"]
    lines += [f"module load {shlex.quote(module)}" for module in profile.modules]
    lines += profile.setup
    lines += [f"export {name}={shlex.quote(text)}" for name, text in profile.variables.items()]
    lines.append(f"export PYTHONPATH={shlex.quote(str(job.code))}${{PYTHONPATH:+:$PYTHONPATH}}")
    for name, values in job.choices.items():
        lines.append(f"{name}=({' '.join(map(shlex.quote, values))})")
        lines.append(f"{name}=${{{name}[$SLURM_ARRAY_TASK_ID]}}")
    lines.append(f"cd {shlex.quote(str(job.workdir))}")
    quoted = (f'"{w}"' if VARIABLE.fullmatch(w) else shlex.quote(w) for w in command)
    words = " ".join(quoted)
    end = SUPERVISE.removesuffix("\n").format(command=words)
    lines += end.split("\n") if job.supervised else [f"exec {words}"]
    return "\n".join(lines) + "\n"


def refuse_line_break(key: str, value: str) -> None:
    """Reject a value for a line of #SBATCH that would end the line: bash runs the rest.

    Raises:
        ConfigError: the message names the value.
    """
    if len(value.splitlines()) > 1 or value.endswith(("\n", "\r")):
        raise ConfigError(f"{key}={value!r}: contains a line break; write it in one line")


def escape(path: Path) -> str:
    """Return a path for an option in which Slurm replaces patterns that begin with %."""
    return str(path).replace("%", "%%")
