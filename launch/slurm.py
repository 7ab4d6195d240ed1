"""Run Slurm commands: submit, query, requeue. Errors show Slurm's own words."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megarecur.errors import ConfigError

PATIENCE = 60.0
"""Seconds to wait for the controller."""
FIELD = re.compile(r"(?:^| )([A-Z][\w/:]*)=")
"""Name of a field in scontrol's output; values may contain blanks."""


class SlurmError(ConfigError):
    """Slurm is missing or rejects a request."""


class NoAnswer(SlurmError):
    """Slurm did not answer in time; it may still carry out the request."""


def run(
    *command: str, patience: float = PATIENCE, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command to its end.

    Args:
        patience: maximum seconds.

    Raises:
        NoAnswer: the command does not end in time.
        SlurmError: the command is missing.
    """
    if shutil.which(command[0]) is None:
        raise SlurmError(
            f"{command[0]}: not found on PATH; run this on a login node of a Slurm cluster "
            "(slurm/cluster.sh makes one of virtual nodes)"
        )
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=patience, check=False, input=text
        )
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{command[0]}: no answer for {patience:.0f} s; try again") from None


def ask(*command: str, patience: float = PATIENCE) -> str:
    """Return the standard output of a Slurm command.

    Raises:
        NoAnswer: the command does not end within `patience` seconds.
        SlurmError: the command is missing or fails; the message has its own words.
    """
    found = run(*command, patience=patience)
    if found.returncode:
        raise SlurmError(f"{' '.join(command)}: {own_words(found)}")
    return found.stdout


def own_words(found: subprocess.CompletedProcess[str]) -> str:
    """Return the error output of a Slurm command, without its name and `error:` before each
    line."""
    program = Path(found.args[0]).name
    lines = (found.stderr or found.stdout).strip().splitlines()
    prefix = re.compile(rf"^({re.escape(program)}: |error: )+")
    said = list(dict.fromkeys(prefix.sub("", line.strip()) for line in lines))
    return "; ".join(filter(None, said)) or f"exit code {found.returncode}"


def submit(script: Path, patience: float = PATIENCE) -> str:
    """Submit a script by sbatch. Returns the job's id.

    Raises:
        NoAnswer: sbatch was silent for `patience` seconds; the job may have been accepted.
        SlurmError: sbatch is missing or rejects the job; the message has its own words.
    """
    found = run("sbatch", "--parsable", str(script), patience=patience)
    if found.returncode:
        raise SlurmError(f"sbatch rejected the job: {own_words(found)}")
    return job_in(found.stdout)


def job_in(answer: str) -> str:
    """Return the id in the output of `sbatch --parsable`: ID or ID;CLUSTER.

    Raises:
        SlurmError: the output has another form.
    """
    found = re.search(r"(\d+)(;\S+)?\s*$", answer)
    if found is None:
        raise SlurmError(f"sbatch answered {answer.strip()!r}, which names no job; see squeue")
    return found[1]


def check(script: str) -> str:
    """Check with Slurm whether and when it could run a script, without submitting it.

    Raises:
        SlurmError: it could not; the message has its own words.
    """
    found = run("sbatch", "--test-only", text=script)
    if found.returncode:
        raise SlurmError(f"sbatch --test-only rejected the job: {own_words(found)}")
    return (found.stderr or found.stdout).strip()


def describe_job(job: str, patience: float = PATIENCE) -> dict[str, str]:
    """Return the fields that scontrol shows of a job; for an array's own id, of that one task."""
    found = describe_jobs(job, patience)
    return next((fields for fields in found if fields.get("JobId") == job), found[0])


def describe_jobs(job: str, patience: float = PATIENCE) -> list[dict[str, str]]:
    """Return the fields that scontrol shows of a job, or of every task of an array.

    Raises:
        SlurmError: the job does not exist.
    """
    found = read_fields(ask("scontrol", "--oneliner", "show", "job", job, patience=patience))
    if not found:
        raise SlurmError(f"scontrol show job {job}: shows nothing of it")
    return found


def describe_nodes(nodes: Sequence[str]) -> list[dict[str, str]]:
    """Return the fields that scontrol shows of nodes.

    Raises:
        SlurmError: Slurm does not answer, or does not know a node.
    """
    return read_fields(ask("scontrol", "--oneliner", "show", "node", ",".join(nodes)))


def read_fields(text: str) -> list[dict[str, str]]:
    """Parse scontrol's output into names and values, one dict per line."""
    found = []
    for line in text.splitlines():
        _, *words = FIELD.split(line.strip())
        if words:
            found.append(dict(zip(words[::2], map(str.strip, words[1::2]), strict=True)))
    return found


def expand(nodes: str) -> list[str]:
    """Return the names in a Slurm node list."""
    return ask("scontrol", "show", "hostnames", nodes).split() if nodes else []


def cancel(job: str, *options: Sequence[str]) -> None:
    """Cancel a job, or signal it."""
    ask("scancel", *map(str, options), job)


def step_of(job: str) -> str:
    """The job's newest step: the one of srun."""
    steps = ask("squeue", "--noheader", "--steps", "--jobs", job, "--format=%i").split()
    ids = [s for s in steps if s.startswith(f"{job}.") and s.rpartition(".")[2].isdigit()]
    return max(ids, key=lambda step: int(step.rpartition(".")[2]), default=f"{job}.0")
