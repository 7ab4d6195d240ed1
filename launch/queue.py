"""Jobs as squeue shows them, and the runs that they belong to; accounting (sacct) is not needed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launch.folder import PastAttempt, is_run, read_attempts
from launch.profile import seconds_of
from launch.slurm import SlurmError, ask

PATIENCE = 5.0
"""Seconds for an answer of Slurm; then only folders are read."""
COLUMNS = (
    "JobID", "JobArrayID", "State", "TimeLeft", "StartTime", "NodeList", "Reason", "Comment",
    "StdOut",
)  # fmt: skip
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT",
           "RESV_DEL_HOLD")  # fmt: skip
GOING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")

REASONS = {
    "None": "Slurm has not looked at it yet",
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
"""Of Slurm's words why a job waits, by how they begin."""


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue shows it."""

    id: str
    """SLURM_JOB_ID; of an array not yet begun, the array's."""
    label: str
    """Such as 17 or 17_[0-3]."""
    state: str
    left: float | None
    """Seconds to its time limit; None: no limit, or not known."""
    start: str
    """When it started or may start, in Slurm's words; empty where it cannot say."""
    nodes: str
    """As Slurm writes a list of nodes."""
    reason: str
    comment: str
    output: Path

    @property
    def number(self) -> int:
        """To tell the newer of two."""
        return int(self.id) if self.id.isdigit() else 0


@dataclass(frozen=True)
class Queue:
    """The jobs of a user, or why they are not known."""

    jobs: Sequence[QueuedJob] = ()
    unknown: str = ""


def ask_queue(*options: str) -> list[QueuedJob]:
    """The jobs that squeue shows, by number; of itself only those that wait or run.

    Raises:
        SlurmError: there is no squeue, or it does not answer.
    """
    columns = "--Format=" + ",".join(f"{column}:|" for column in COLUMNS)
    text = ask("squeue", "--noheader", *options, columns, patience=PATIENCE)
    jobs = []
    for line in text.splitlines():
        # The path comes last, for it may hold anything.
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
        # Slurm shows minutes and seconds at least; a plain number would be minutes.
        return float(seconds_of(left))
    except ValueError:
        return None


def folder_of(comment: str, output: Path, job: str) -> Path | None:
    """The run folder of a job: its comment, where that is one; else where its output lies, in
    RUN/logs. Runs of an array write theirs beside the runs' folders: then the run that was begun by
    this job, or the folder of all of them before.

    Returns None for a job of something else.
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
    """The run folder of a job in the queue; None for a job of something else."""
    return folder_of(job.comment, job.output, job.id)


def queue_of(run: Path) -> Queue:
    """The jobs of whoever owns a run's folder, those that have just ended too, and the one that is
    recorded as being at work on it, whoever started that."""
    try:
        jobs = ask_queue(f"--user={run.stat().st_uid}", "--states=all")
    except SlurmError as error:
        return Queue(unknown=f"only the folder was read: {error}")
    last = read_attempts(run)[-1:]
    if last and last[0].ended is None and last[0].job not in {job.id for job in jobs}:
        with suppress(SlurmError):  # Which it is when the job is long gone.
            jobs += ask_queue(f"--jobs={last[0].job}", "--states=all")
    return Queue(jobs)


def find_job(
    run: Path, attempts: Sequence[PastAttempt], jobs: Sequence[QueuedJob]
) -> QueuedJob | None:
    """The job of a run: the one that runs, else that waits, else the newest that has ended."""
    numbers = {attempt.job for attempt in attempts}
    whole = run.resolve()
    own = []
    for job in jobs:
        named = job.comment and Path(job.comment).is_absolute() and Path(job.comment) == whole
        logs = job.output.parent
        if job.id in numbers or named or (logs.name == "logs" and logs.parent.resolve() == whole):
            own.append(job)
    return max(
        own, key=lambda job: (job.state in GOING, job.state in WAITING, job.number), default=None
    )


def why_pending(job: QueuedJob) -> str:
    """Slurm's reason, explained, and when the job may start."""
    if job.state == "CONFIGURING":
        return "its nodes are being made ready"
    told = next((text for word, text in REASONS.items() if job.reason.startswith(word)), "")
    reason = f"{job.reason} ({told})" if told else job.reason
    if job.state != "PENDING":
        reason = f"{job.state}, {reason}"
    return f"{reason}, expected to start {job.start}" if job.start else reason
