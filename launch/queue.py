"""Read jobs from squeue and find their runs; accounting (sacct) is not needed."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megarecur.launch.folder import PastAttempt, is_run, read_attempts, read_submitted
from megarecur.launch.profile import seconds_of
from megarecur.launch.slurm import SlurmError, ask, describe_jobs
from megarecur.reading import read_json

PATIENCE = 5.0
"""Seconds to wait for Slurm; then only folders are read."""
COLUMNS = (
    "JobID", "JobArrayID", "State", "TimeLeft", "StartTime", "NodeList", "Reason", "Comment",
    "StdOut",
)  # fmt: skip
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT",
           "RESV_DEL_HOLD")  # fmt: skip
GOING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")

TASKS_FILE = "tasks.json"
"""Beside the script of an array of runs: their folders, in the order of its tasks."""
NEWEST = 20
"""Number of latest recorded jobs of a run to query by id."""
ENDING_SECONDS = 180.0
"""Seconds that Slurm may take to clean up after an ended job."""

REASONS = {
    "None": "Slurm has not considered it yet",
    "Priority": "other jobs go first",
    "Resources": "waits for nodes to become free",
    "DependencyNeverSatisfied": "the job it waits for ended otherwise; cancel it",
    "Dependency": "waits for another job",
    "BeginTime": "may not start before its time, as after a requeue",
    "JobHeldUser": "held; scontrol release lets it go",
    "JobHeldAdmin": "held by an administrator",
    "JobHoldMaxRequeue": "held after too many requeues; scontrol release lets it go",
    "JobArrayTaskLimit": "as many tasks of its array run as may",
    "ReqNodeNotAvail": "a node it needs is down or reserved",
    "PartitionTimeLimit": "its time limit is above the partition's",
    "PartitionNodeLimit": "it asks for more nodes than the partition gives",
    "PartitionDown": "its partition is down",
    "Reservation": "waits for its reservation",
    "Licenses": "waits for licenses",
    "launch failed": "its nodes could not start it; held",
    "QOS": "a limit of the QOS is reached",
    "Assoc": "a limit of the account is reached",
    "Max": "a limit of the cluster is reached",
}
"""Explanations of Slurm's reasons for waiting, by their beginnings."""


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue shows it."""

    id: str
    """SLURM_JOB_ID; the array's id for an array that has not started."""
    label: str
    """Label such as 17 or 17_[0-3]."""
    state: str
    left: float | None
    """Seconds to the time limit; None if there is no limit or it is unknown."""
    start: str
    """Start or expected start, in Slurm's format; empty if unknown."""
    nodes: str
    """Nodes in Slurm's list format."""
    reason: str
    comment: str
    output: Path

    @property
    def number(self) -> int:
        """Number that orders jobs by age."""
        return int(self.id) if self.id.isdigit() else 0


@dataclass(frozen=True)
class Queue:
    """The jobs of a user, or the reason why they are unknown."""

    jobs: Sequence[QueuedJob] = ()
    unknown: str = ""


def ask_queue(*options: str) -> list[QueuedJob]:
    """Return the jobs that squeue shows; by default only waiting or running ones.

    Raises:
        SlurmError: squeue is missing or does not answer.
    """
    columns = "--Format=" + ",".join(f"{column}:|" for column in COLUMNS)
    text = ask("squeue", "--noheader", *options, columns, patience=PATIENCE)
    jobs = []
    for line in text.splitlines():
        # The path comes last, because it may contain any character.
        words = [word.strip() for word in line.strip().removesuffix("|").split("|", 8)]
        if len(words) == len(COLUMNS):
            job, label, state, left, start, nodes, reason, comment, output = words
            start = "" if start in ("N/A", "Unknown") else start
            comment = "" if comment == "(null)" else comment
            jobs.append(
                QueuedJob(job, label, state, _seconds(left), start, nodes, reason, comment,
                          Path(output))
            )  # fmt: skip
    return sorted(jobs, key=lambda job: (job.number, job.label))


def _seconds(left: str) -> float | None:
    try:
        # Slurm shows at least minutes and seconds; a plain number would be minutes.
        seconds = seconds_of(left)
    except ValueError:
        return None
    return None if math.isinf(seconds) else seconds


def folder_of(comment: str, output: Path, job: str) -> Path | None:
    """Return the run folder of a job: its comment if that is one, otherwise the folder of its
    output RUN/logs. Runs of an array write beside the runs' folders: then the run that this job
    started, or before that the folder of all runs.

    Returns None for jobs that are not megarecur runs.
    """
    named = Path(comment)
    if comment and named.is_absolute() and is_run(named):
        return named
    above = output.parent.parent
    if output.parent.name != "logs" or not output.is_absolute():
        return None
    if is_run(above):
        return above
    if not above.is_dir():
        return None
    runs = [path for path in sorted(above.iterdir()) if path.is_dir() and is_run(path)]
    own = [run for run in runs if any(a.job == job for a in read_attempts(run)[-1:])]
    if own:
        return own[0]
    return above if any((run / "launch").is_dir() for run in runs) else None


def run_of(job: QueuedJob) -> Path | None:
    """Return the run folder of a job in the queue; None for other jobs."""
    return folder_of(job.comment, job.output, job.id)


def queue_of(run: Path) -> Queue:
    """Return the jobs of the owner of a run's folder, just-ended ones too, and the recorded job of
    the run, started by any user."""
    try:
        jobs = ask_queue("--array", f"--user={run.stat().st_uid}", "--states=all")
    except SlurmError as error:
        return Queue(unknown=f"only the folder was read: {error}")
    last = read_attempts(run)[-1:]
    if last and last[0].ended is None and last[0].job not in {job.id for job in jobs}:
        with suppress(SlurmError):  # It fails if the job is long gone.
            jobs += ask_queue(f"--jobs={last[0].job}", "--states=all")
    return Queue(jobs)


def find_job(
    run: Path, attempts: Sequence[PastAttempt], jobs: Sequence[QueuedJob]
) -> QueuedJob | None:
    """Return the job of a run: the running one, else the waiting one, else the newest ended one."""
    numbers, recorded = {attempt.job for attempt in attempts}, read_submitted(run)
    own = [job for job in jobs if job.id in numbers or belongs(job, run, recorded)]
    return max(
        own, key=lambda job: (job.state in GOING, job.state in WAITING, job.number), default=None
    )


def live_jobs(runs: Sequence[Path]) -> list[tuple[Path, QueuedJob]]:
    """List the jobs that train in some run folders, or wait to, each with its folder; tasks of
    arrays are separate.

    Slurm is queried only if a folder shows an earlier submission.

    Raises:
        SlurmError: Slurm does not answer.
    """
    recorded = {run: read_submitted(run) for run in runs if (run / "launch" / "jobs").is_dir()}
    if not recorded:
        return []
    users = {os.getuid(), *(run.stat().st_uid for run in recorded)}
    found = ask_queue("--array", f"--user={','.join(map(str, sorted(users)))}")
    numbers = [job for jobs in recorded.values() for job in jobs[-NEWEST:]]
    if missing := sorted(set(numbers) - {job.label for job in found}):
        with suppress(SlurmError):  # It fails if all of them are long gone.
            found += ask_queue("--array", f"--jobs={','.join(missing)}")
    return [
        (run, job)
        for run, labels in recorded.items()
        for job in {each.label: each for each in found}.values()
        if belongs(job, run, labels)
    ]


def belongs(job: QueuedJob, run: Path, recorded: Sequence[str]) -> bool:
    """Return True if a job, or a task of an array, belongs to a run with these submitted jobs."""
    run = run.resolve()
    logs = Path(str(job.output).replace("%%", "%")).parent
    above = logs.parent.resolve() if logs.name == "logs" else None
    places = {above, Path(job.comment).resolve() if job.comment.startswith("/") else None}
    if "_" not in job.label:
        return run in places
    # The output of an array is beside the folders of its runs.
    return run.parent in places and (job.label in recorded or run == run_of_task(job.label))


def run_of_task(label: str) -> Path | None:
    """Return the run folder of a task of an array, ARRAY_TASK, by the list beside its script: where
    sbatch was silent, no run has recorded the array. None where Slurm or the list do not say."""
    array, _, task = label.partition("_")
    runs = runs_of_array(array)
    return runs[int(task)] if task.isdigit() and int(task) < len(runs) else None


@functools.cache
def runs_of_array(array: str) -> tuple[Path, ...]:
    """List the run folders of an array's tasks, in their order; none where that is not known."""
    with suppress(SlurmError, OSError, ValueError):
        script = Path(describe_jobs(array)[0].get("Command", ""))
        return tuple(map(Path, read_json(script.with_name(TASKS_FILE))))
    return ()


def wait_for_ends(ask: Callable[[], list[QueuedJob]]) -> list[QueuedJob]:
    """Query jobs repeatedly while all of them are ending; return those that remain.

    A job that is being requeued is ending too, and then waits.
    """
    until = time.monotonic() + ENDING_SECONDS
    while (jobs := ask()) and all(job.state == "COMPLETING" for job in jobs):
        if time.monotonic() > until:
            break
        time.sleep(1.0)
    return jobs


def why_pending(job: QueuedJob) -> str:
    """Return Slurm's reason, explained, and the expected start of the job."""
    if job.state == "CONFIGURING":
        return "its nodes are being prepared"
    told = next((text for word, text in REASONS.items() if job.reason.startswith(word)), "")
    reason = f"{job.reason} ({told})" if told else job.reason
    if job.state != "PENDING":
        reason = f"{job.state}, {reason}"
    return f"{reason}, expected to start {job.start}" if job.start else reason
