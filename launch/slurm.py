"""Talking to Slurm: submit, ask, requeue. Its own words are shown where it refuses."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megarecur.errors import ConfigError

PATIENCE = 60.0
"""Seconds for an answer of the controller."""
FIELD = re.compile(r"(?:^| )([A-Z][\w/:]*)=")
"""The name of a field as scontrol writes it; values may hold blanks."""


class SlurmError(ConfigError):
    """Slurm is not there, or refuses."""


def ask(*command: str, patience: float = PATIENCE) -> str:
    """What a command of Slurm prints, if it does within `patience` seconds.

    Raises:
        SlurmError: it is not there, does not answer, or refuses, in its own words.
    """
    if shutil.which(command[0]) is None:
        raise SlurmError(
            f"{command[0]}: not found on PATH; run this on a login node of a Slurm cluster "
            "(slurm/cluster.sh makes one of virtual nodes)"
        )
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, timeout=patience, check=False
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: no answer for {patience:.0f} s; try again") from None
    if found.returncode:
        said = (found.stderr or found.stdout).strip()
        raise SlurmError(f"{' '.join(command)}: {said}")
    return found.stdout


def submit(script: str, folder: Path) -> str:
    """Submit a script as it stands, by submitit, which keeps it in `folder`. Returns the job's id.

    Raises:
        SlurmError: there is no sbatch, or it refuses, in its own words.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.slurm.slurm import SlurmExecutor

    class ScriptExecutor(SlurmExecutor):
        """submitit's, but for the text: its own has no signals to the batch script."""

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return script

    for program in ("sbatch", "srun"):  # submitit asks for both.
        if shutil.which(program) is None:
            ask(program)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return str(ScriptExecutor(folder)._submit_command("").job_id)
    except (FailedJobError, FailedSubmissionError) as error:
        raise SlurmError(f"sbatch: {error}") from None


def check(script: str) -> str:
    """Whether and when Slurm could run a script, in its words; nothing is submitted.

    Raises:
        SlurmError: it could not.
    """
    if shutil.which("sbatch") is None:
        ask("sbatch")
    found = subprocess.run(
        ["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False
    )
    said = (found.stderr or found.stdout).strip()
    if found.returncode:
        raise SlurmError(said)
    return said


def describe_job(job: str) -> dict[str, str]:
    """The fields that scontrol shows of a job; of an array's own id, those of that one task."""
    found = describe_jobs(job)
    return next((fields for fields in found if fields.get("JobId") == job), found[0])


def describe_jobs(job: str, patience: float = PATIENCE) -> list[dict[str, str]]:
    """The fields that scontrol shows of a job, or of every task of an array.

    Raises:
        SlurmError: there is no such job.
    """
    text = ask("scontrol", "--oneliner", "show", "job", job, patience=patience)
    found = []
    for line in text.splitlines():
        _, *words = FIELD.split(line.strip())
        if words:
            found.append(dict(zip(words[::2], map(str.strip, words[1::2]), strict=True)))
    if not found:
        raise SlurmError(f"scontrol show job {job}: shows nothing of it")
    return found


def expand(nodes: str) -> list[str]:
    """The names in a list of nodes as Slurm writes it."""
    return ask("scontrol", "show", "hostnames", nodes).split() if nodes else []


def cancel(job: str, *options: Sequence[str]) -> None:
    """End a job, or signal it."""
    ask("scancel", *map(str, options), job)
