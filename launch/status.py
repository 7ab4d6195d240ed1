"""Show the state of runs, `megarecur status`, from their folders and Slurm's queue.

A run folder suffices; if Slurm exists, it reports whether a job waits, runs or has ended.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megarecur.config.load import read_sections
from megarecur.errors import ConfigError, MegarecurError
from megarecur.launch.folder import (
    OVER,
    Beat,
    Checkpoint,
    Holder,
    PastAttempt,
    age,
    check_run,
    is_run,
    last_sign,
    newest_checkpoint,
    points_of,
    read_attempts,
    read_beat,
    read_config,
    read_holder,
    read_identity,
)
from megarecur.launch.output import say
from megarecur.launch.profile import ClusterProfile
from megarecur.launch.queue import (
    GOING,
    PATIENCE,
    WAITING,
    Queue,
    QueuedJob,
    ask_queue,
    find_job,
    folder_of,
    queue_of,
    run_of,
    why_pending,
)
from megarecur.launch.slurm import SlurmError, describe_jobs
from megarecur.launch.terminal import make_console
from megarecur.launch.waiting import describe_waiting, read_reports
from megarecur.plan.describe import count_noun, format_count
from megarecur.train.metrics import duration, read_rows

TAIL_BYTES = 1 << 19
"""Bytes read from the end of metrics.jsonl: hundreds of rows, however long the run."""
MOST_ATTEMPTS = 8
"""Number of latest attempts shown."""

PHASES = {
    "start": "starting",
    "train": "training",
    "evaluate": "evaluating",
    "save": "saving a checkpoint",
    "done": "finishing",
    "stopped": "stopping",
    "diverged": "stopping",
}
COLOURS = {"running": "green", "pending": "yellow", "stalled?": "bold red", "ended": "dim",
           "not started": "dim", "unknown": "yellow"}  # fmt: skip


@dataclass(frozen=True)
class Status:
    """The current state of one run."""

    run: Path
    state: str
    """One of running, pending, not started, ended, stalled? and unknown."""
    why: str = ""
    job: QueuedJob | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    val_loss: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    """Model FLOPs utilisation, 0 to 1."""
    left: float | None = None
    """Estimated seconds of training to the last step, at the latest pace."""
    attempts: list[PastAttempt] = field(default_factory=list)
    checkpoint: Checkpoint | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def restarts(self) -> int:
        """Number of starts after the first."""
        return max(len(self.attempts) - 1, 0)


def show_status(what: str | None) -> None:
    """Print one run, the run of a job, or all runs in the user's queue.

    Args:
        what: the folder of a run or of a sweep, the id of a job, or None for all.

    Raises:
        ConfigError: the folder, run or job does not exist, or all runs were requested without
        Slurm.
    """
    console = make_console()
    if what is None:
        jobs = ask_queue(f"--user={os.getuid()}")
        pairs = [(job, run) for job in jobs if (run := run_of(job)) is not None]
        if not pairs:
            _plain(
                console,
                "no job of a run of megarecur is in the queue; of a run that has ended, or never "
                "was a job, its folder tells: megarecur status RUN",
            )
            return
        print_table([status_or_note(run, Queue(jobs), job) for job, run in pairs], console)
    elif what.isdigit():
        found = statuses_of_job(what)
        if len(found) > 1:
            print_table(found, console)
        else:
            print_status(found[0], console)
    elif points := points_of(Path(what)):
        queue = queue_of(Path(what))
        print_table([status_or_note(run, queue) for run in points], console)
        for note in filter(None, [queue.unknown]):
            _plain(console, f"note: {note}")
    else:
        run = check_run(Path(what))
        print_status(read_status(run, queue_of(run)), console)


# ------------------------------------------------------------------------------- several runs


def statuses_of_job(job: str) -> list[Status]:
    """Return the run of a job, or the runs of an array.

    Raises:
        ConfigError: Slurm is missing or does not know the job, or the job belongs to no run.
    """
    try:
        shown = describe_jobs(job, PATIENCE)
    except SlurmError as error:
        raise ConfigError(
            f"job {job}: {error}; Slurm forgets jobs some minutes after their end, then give the "
            f"run's folder (one that is named {job}: ./{job})"
        ) from None
    found = []
    for fields in shown:
        output = fields.get("StdOut", "")
        run = folder_of(fields.get("Comment", ""), Path(output), fields.get("JobId", job))
        if run is None:
            raise ConfigError(
                f"job {job} ({fields.get('JobName', '?')}): belongs to no run of megarecur, "
                f"its output goes to {output or '?'}; give the job of a run, or its folder"
            )
        found.append((fields.get("JobId", job), run))
    queue = queue_of(found[0][1])
    own = {each.id: each for each in queue.jobs}
    return [
        status_or_note(run, queue, None if is_run(run) else own.get(number))
        for number, run in found
    ]


def status_or_note(run: Path, queue: Queue, job: QueuedJob | None = None) -> Status:
    """Return the status of a run, or why it is unknown, for a table that must not fail."""
    if not is_run(run):
        waits = job is not None and job.state in WAITING
        why = why_pending(job) if job is not None and waits else "its run has not begun"
        return Status(run, "pending", why, job)
    try:
        return read_status(run, queue, job)
    except (MegarecurError, OSError) as error:
        return Status(run, "unknown", str(error), job)


# ----------------------------------------------------------------------------------------- a run


def read_status(run: Path, queue: Queue, job: QueuedJob | None = None) -> Status:
    """Return everything known about a run.

    Raises:
        ConfigError: its config is not YAML.
    """
    config, attempts = read_config(run), read_attempts(run)
    rows = read_rows(run / "metrics.jsonl", TAIL_BYTES)
    trained = [row for row in rows if "train/loss" in row]
    row = trained[-1] if trained else {}
    paces = [r["speed/step_seconds"] for r in trained[-20:] if _has(r, "speed/step_seconds")]
    pace = float(statistics.median(paces)) if paces else None
    beat, checkpoint, holder = read_beat(run), newest_checkpoint(run), read_holder(run)
    began = [attempt.began for attempt in attempts[-1:]]
    began += [holder.since] if holder is not None and holder.alive else []
    if beat is not None and beat.time < max(began, default=0.0):
        beat = None
    # Quick steps mostly send no heartbeat; metrics have log steps only.
    told = [s for s in (beat.step if beat else None, _whole(row.get("step"))) if s is not None]
    step = max(told) if told else checkpoint.step if checkpoint else None
    steps = _whole(_section(config, "train").get("steps"))
    job = job or find_job(run, attempts, queue.jobs)
    known = Known(
        run, attempts, beat, checkpoint, job, not queue.unknown, holder, began, pace, steps
    )
    state, why = judge(known)
    notes = [queue.unknown, describe_waiting(read_reports(run, beat, max(began, default=0.0)))]
    left = None
    if pace is not None and steps is not None and step is not None and step < steps:
        left = pace * (steps - step)
    scores = [r["val/loss"] for r in rows if _has(r, "val/loss")]
    return Status(
        run=run,
        state=state,
        why=why,
        job=job,
        step=step,
        steps=steps,
        loss=_number(row, "train/loss"),
        val_loss=scores[-1] if scores else None,
        tokens_per_second=_number(row, "speed/tokens_per_second"),
        mfu=_number(row, "speed/mfu"),
        left=left,
        attempts=attempts,
        checkpoint=checkpoint,
        notes=list(filter(None, notes)),
    )


@dataclass(frozen=True)
class Known:
    """The facts from which a run's state is derived."""

    run: Path
    attempts: Sequence[PastAttempt]
    beat: Beat | None
    """None if the heartbeat belongs to an earlier start."""
    checkpoint: Checkpoint | None
    job: QueuedJob | None
    asked: bool
    """True if Slurm answered: then a job that it does not show has ended."""
    holder: Holder | None
    began: Sequence[float]
    """Start of the newest attempt, and of the process at work here, in UNIX seconds."""
    pace: float | None
    """Seconds per step."""
    steps: int | None

    @property
    def over(self) -> PastAttempt | None:
        """The newest attempt, if its end is recorded and there was no later sign of the run."""
        last = self.attempts[-1] if self.attempts else None
        if last is None or last.ended is None:
            return None
        return None if self.beat is not None and self.beat.time > last.ended else last


def judge(known: Known) -> tuple[str, str]:
    """Return (state, reason) of a run, as in `Status`."""
    job, holder, over = known.job, known.holder, known.over
    if job is not None and job.state in WAITING:
        return "pending", why_pending(job) + (f"; before: {over.why}" if over else "")
    if job is not None and job.state in GOING:
        return judge_going(known, job)
    if holder is not None and holder.alive:
        return judge_life(known, f"process {holder.pid} of this machine")
    if over is not None:
        if over.action not in ("requeued", "restarted"):
            told = f"; {over.action}" if over.action not in ("done", "stopped") else ""
            return "ended", over.why + told
        if not known.asked:
            return "unknown", (
                f"{over.action} after: {over.why}; whether its job waits or has failed since, "
                "Slurm does not say"
            )
        return "ended", (
            f"{over.why}; it was {over.action}, but job {over.job} is {_fate(job)}: submit it again"
        )
    last = known.attempts[-1] if known.attempts else None
    if last is None or last.ended is not None:
        return judge_alone(known)
    if not known.asked:
        return judge_life(known, f"job {last.job}, if its last word still holds")
    if known.beat is not None and known.beat.phase == "done":
        return "ended", "finished"
    return "ended", (
        f"job {last.job} is {_fate(job)}, attempt {last.number} left no last word; "
        "launch it again to resume"
    )


def _fate(job: QueuedJob | None) -> str:
    return f"{job.state} in Slurm's words" if job else "no longer in the queue"


def judge_going(known: Known, job: QueuedJob) -> tuple[str, str]:
    """Return the state of a job with nodes: it runs, is stalled, or is ending."""
    over = known.over
    if job.state in ("SUSPENDED", "STOPPED"):
        return "pending", f"{job.state.lower()} by Slurm, with its nodes"
    if job.state == "COMPLETING" and over is not None:
        again = over.action == "requeued"
        return ("pending", f"being requeued after: {over.why}") if again else ("ended", over.why)
    limit = f", {duration(job.left)} to its time limit" if job.left is not None else ""
    where = f"job {job.label} on {job.nodes or '?'}{limit}"
    if over is not None:
        return "running", f"between two attempts, after: {over.why}; {where}"
    return judge_life(known, where)


def judge_life(known: Known, where: str) -> tuple[str, str]:
    """Return the state of a run that should be at work, by its last sign of life."""
    beat = known.beat
    sign = beat.time if beat else last_sign(known.run)
    signs = [*known.began] + ([sign] if sign is not None else [])
    phase = beat.phase if beat else "start"
    # Without a heartbeat, only metrics show progress.
    begun = beat is None and sign is not None and sign > max(known.began, default=0.0)
    doing = "at work" if begun else PHASES.get(phase, phase)
    doing += f" ({beat.detail})" if beat and beat.detail else ""
    if not signs:
        return "running", f"{doing}; {where}"
    silent = age(max(signs))
    told = f"{doing}; {where}; last sign of life {duration(silent)} ago"
    return ("stalled?" if silent > patience_for(known, phase) else "running"), told


def judge_alone(known: Known) -> tuple[str, str]:
    """Return the state of a run without a job or visible process."""
    beat, holder, saved = known.beat, known.holder, known.checkpoint
    gone = f"; job {known.job.label} is {_fate(known.job)}" if known.job else ""
    if beat is not None and beat.phase in OVER:
        words = {"done": "finished", "stopped": "saved and stopped by a signal"}
        return "ended", words.get(beat.phase, "stopped by an alarm, unsaved")
    if known.steps is not None and saved is not None and saved.step >= known.steps:
        return "ended", "finished"
    sign = last_sign(known.run)
    if sign is None and holder is None:
        return "not started", "its first attempt has not begun" + gone
    if holder is not None and holder.alive is None:
        return judge_life(known, f"process {holder.pid} of {holder.host}, unseen from here")
    silent = f", {duration(age(sign))} ago" if sign is not None else ""
    return "ended", f"without a last word{silent}{gone}"


def patience_for(known: Known, phase: str) -> float:
    """Return the seconds of silence after which a run may hang, by its job's profile or the
    defaults."""
    return read_profile(known.run).stall_limit(phase, known.pace)[1]


def read_profile(run: Path) -> ClusterProfile:
    """Return the profile with which a run was submitted, or the defaults."""
    path = run / "launch" / "job.json"
    if not path.exists():
        return ClusterProfile()
    try:
        values = read_sections(path)["profile"]  # JSON is YAML
        return ClusterProfile.model_validate(values)
    except (ConfigError, KeyError, ValueError):
        return ClusterProfile()


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _has(row: dict[str, Any], key: str) -> bool:
    """Return True if a row has a number for the key; null means not finite."""
    return isinstance(row.get(key), int | float)


def _number(row: dict[str, Any], key: str) -> float | None:
    """Return a metric; NaN for null, None if the row has none."""
    if key not in row:
        return None
    return float(row[key]) if _has(row, key) else math.nan


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


# --------------------------------------------------------------------------------------- printed


def describe(status: Status) -> list[tuple[str, str]]:
    """Return the lines about one run, as (name, text)."""
    identity, source = read_identity(status.run)
    lines = [("run", f"{status.run} (ID {identity})" if identity else str(status.run))]
    lines += [("source", source)] if source else []
    lines.append(("state", f"{status.state}: {status.why}"))
    lines.append(("step", _steps(status)))
    if status.loss is not None:
        score = "" if status.val_loss is None else f"  (validation {status.val_loss:.4f})"
        lines.append(("loss", f"{status.loss:.4f}{score}"))
    if status.tokens_per_second is not None:
        lines.append(("tokens/s", format_count(status.tokens_per_second)))
    if status.mfu is not None:
        lines.append(("MFU", f"{100 * status.mfu:.1f}%"))
    if status.left is not None:
        lines.append(("time left", f"{duration(status.left)} of training{_limit(status)}"))
    saved = status.checkpoint
    told = f"step {saved.step}, {duration(age(saved.saved))} ago" if saved else "none yet"
    lines.append(("checkpoint", told))
    lines.append(("restarts", _restarts(status)))
    lines += [("note", note) for note in status.notes]
    return lines


def describe_attempt(attempt: PastAttempt, going: str = "") -> tuple[str, str, str, str, str, str]:
    """Return number, job, time, nodes, steps and end of an attempt; `going` is its state before its
    end is recorded."""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(attempt.began))
    if attempt.ended is not None:
        when += f" for {duration(attempt.ended - attempt.began)}"
    few = len(attempt.nodes) <= 3
    nodes = " ".join(attempt.nodes) if few else count_noun(len(attempt.nodes), "node")
    last = "" if attempt.last_step is None else str(attempt.last_step)
    action = f"; {attempt.action}" if attempt.action not in ("", "done") else ""
    end = f"{attempt.why}{action}" if attempt.ended is not None else going or "no end is recorded"
    return str(attempt.number), attempt.job, when, nodes, f"{attempt.first_step}-{last}", end


def print_status(status: Status, console: Console) -> None:
    """Print one run: a table on a terminal, otherwise `name: text` lines."""
    attempts = [
        describe_attempt(attempt, status.state if attempt is status.attempts[-1] else "")
        for attempt in status.attempts[-MOST_ATTEMPTS:]
    ]
    if not console.is_terminal:
        for name, text in describe(status):
            _plain(console, f"{name}: {text}")
        for attempt in attempts:
            number, job, when, nodes, steps, end = attempt
            _plain(
                console,
                f"attempt {number}: job {job}, {when}, on {nodes or '?'}, checkpoints {steps}: "
                f"{end}",
            )
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, text in describe(status):
        style = COLOURS.get(status.state, "") if name == "state" else ""
        table.add_row(name, Text(text, style=style))
    console.print(table)
    if attempts:
        starts = Table(box=None, padding=(0, 1), header_style="dim", title_justify="left")
        for column in ("attempt", "job", "began", "nodes", "checkpoints", "end"):
            starts.add_column(column, overflow="fold")
        for attempt in attempts:
            starts.add_row(*map(Text, attempt))
        console.print()
        console.print(starts)


def print_table(found: Sequence[Status], console: Console) -> None:
    """Print a row for each run: a table on a terminal, otherwise lines."""
    header = ("job", "run", "state", "step", "loss", "tokens/s", "MFU", "left", "restarts",
              "checkpoint", "why")  # fmt: skip
    rows = []
    for status in found:
        rows.append(
            (
                status.job.label if status.job else "-",
                _near(status.run),
                status.state,
                _steps(status),
                "-" if status.loss is None else f"{status.loss:.4f}",
                "-" if status.tokens_per_second is None else format_count(status.tokens_per_second),
                "-" if status.mfu is None else f"{100 * status.mfu:.1f}%",
                "-" if status.left is None else duration(status.left),
                _restarts(status),
                str(status.checkpoint.step) if status.checkpoint else "-",
                status.why,
            )
        )
    if not console.is_terminal:
        for row in rows:
            named = (f"{name} {text}" for name, text in zip(header[3:], row[3:], strict=True))
            _plain(console, f"job {row[0]}  {row[1]}  {row[2]}  " + "  ".join(named))
        return
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        style = COLOURS.get(row[2], "")
        table.add_row(*(Text(text, style=style if i == 2 else "") for i, text in enumerate(row)))
    console.print(table)


def _plain(console: Console, line: str) -> None:
    """Print one line without wrapping."""
    say(" ".join(line.splitlines()), file=console.file)


def _steps(status: Status) -> str:
    step = "?" if status.step is None else str(status.step)
    return step if status.steps is None else f"{step} of {status.steps}"


def _limit(status: Status) -> str:
    job = status.job
    if job is None or job.left is None or job.state not in GOING or status.left is None:
        return ""
    short = "too short for all of it" if job.left < status.left else "enough"
    return f"; its time limit is in {duration(job.left)}, {short}"


def _restarts(status: Status) -> str:
    """Return the number of restarts, and the reasons for the previous ends."""
    if not status.restarts:
        return "0"
    reasons = [attempt.reason or "no last word" for attempt in status.attempts[:-1]]
    counts = {reason: reasons.count(reason) for reason in reasons}
    told = ", ".join(f"{reason} x {n}" if n > 1 else reason for reason, n in counts.items())
    return f"{status.restarts} ({told})"


def _near(run: Path) -> str:
    """Return a path relative to here, if it is below."""
    here = Path.cwd()
    return str(run.relative_to(here)) if run.is_relative_to(here) else str(run)
