"""Talking to Slurm: submit, ask, requeue. Its own words are shown where it refuses."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from megarecur.errors import ConfigError

PATIENCE = 60.0
"""Seconds for an answer of the controller."""


class SlurmError(ConfigError):
    """Slurm is not there, or refuses."""


def ask(*command: str) -> str:
    """What a command of Slurm prints.

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
            command, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: no answer for {PATIENCE:.0f} s; try again") from None
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

    if shutil.which("sbatch") is None:
        ask("sbatch")
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
    """The fields that scontrol shows of a job."""
    text = ask("scontrol", "--oneliner", "show", "job", job)
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def expand(nodes: str) -> list[str]:
    """The names in a list of nodes as Slurm writes it."""
    return ask("scontrol", "show", "hostnames", nodes).split() if nodes else []


def cancel(job: str, *options: Sequence[str]) -> None:
    """End a job, or signal it."""
    ask("scancel", *map(str, options), job)
