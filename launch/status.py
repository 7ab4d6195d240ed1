"""How runs are doing: `megarecur status`, from their folders and what Slurm's queue says of them.

A run folder is enough; Slurm is asked, where it is there, whether a job waits, runs or is gone.
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

from launch.folder import (
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
    read_attempts,
    read_beat,
    read_config,
    read_holder,
)
from launch.profile import Profile
from launch.queue import (
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
from launch.slurm import SlurmError, describe_jobs
from megarecur.config.load import read_sections
from megarecur.errors import ConfigError, MegarecurError
from megarecur.plan.describe import count_noun, format_count, make_console
from megarecur.train.metrics import duration, read_rows

TAIL_BYTES = 1 << 19
"""Of metrics.jsonl: hundreds of rows, however long the run."""
MOST_ATTEMPTS = 8
"""Shown of a run, the latest."""

PHASES = {
    "start": "starting",
    "train": "training",
    "evaluate": "evaluating",
    "save": "saving a checkpoint",
    "done": "finishing",
    "stopped": "stopping",
    "diverged": "stopping",
}
COLOURS = {"running": "green", "pending": "yellow", "stalled?": "bold red", "ended": "dim"}


@dataclass(frozen=True)
class Status:
    """One run, as it is now."""

    run: Path
    state: str
    """running, pending, ended, stalled? or unknown."""
    why: str = ""
    job: QueuedJob | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    val_loss: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    """Of the hardware's peak, 0 to 1."""
    left: float | None = None
    """Seconds of training to the last step at the pace of the latest ones."""
    attempts: list[PastAttempt] = field(default_factory=list)
    checkpoint: Checkpoint | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def restarts(self) -> int:
        """Starts after the first."""
        return max(len(self.attempts) - 1, 0)


def show_status(what: str | None) -> None:
    """Print one run, the run of a job, or all runs in the user's queue.

    Args:
        what: a folder, the id of a job, or None for all.

    Raises:
        ConfigError: no such folder, no run in it, no such job; all of them, but no Slurm to ask.
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
    else:
        run = check_run(Path(what))
        print_status(read_status(run, queue_of(run)), console)


# ------------------------------------------------------------------------------- several runs


def statuses_of_job(job: str) -> list[Status]:
    """The run of a job, or the runs of an array.

    Raises:
        ConfigError: Slurm does not know the job, or is not there, or the job is no run's.
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


def status_or_note(run: Path, queue: Queue, job: QueuedJob | None) -> Status:
    """The status of a run, or why it cannot be told, for a table that must not fail for one."""
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
    """All that can be told of a run.

    Args:
        run: its folder.
        queue: where its job is looked for.
        job: its job, where that is known.

    Raises:
        ConfigError: its config is no YAML.
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
    # The heartbeat is left out after most quick steps; metrics have log steps only.
    told = [s for s in (beat.step if beat else None, _whole(row.get("step"))) if s is not None]
    step = max(told) if told else checkpoint.step if checkpoint else None
    steps = _whole(_section(config, "train").get("steps"))
    job = job or find_job(run, attempts, queue.jobs)
    known = Known(
        run, attempts, beat, checkpoint, job, not queue.unknown, holder, began, pace, steps
    )
    state, why = judge(known)
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
        notes=[queue.unknown] if queue.unknown else [],
    )


@dataclass(frozen=True)
class Known:
    """What a run's state is judged by."""

    run: Path
    attempts: Sequence[PastAttempt]
    beat: Beat | None
    """None too where it is that of a start before the newest one."""
    checkpoint: Checkpoint | None
    job: QueuedJob | None
    asked: bool
    """Whether Slurm answered: then a job that it does not show is gone."""
    holder: Holder | None
    began: Sequence[float]
    """When the newest attempt began, and the process that is at work here, in UNIX seconds."""
    pace: float | None
    """Seconds per step."""
    steps: int | None

    @property
    def over(self) -> PastAttempt | None:
        """The newest attempt, where its end is recorded and nothing was heard of the run since."""
        last = self.attempts[-1] if self.attempts else None
        if last is None or last.ended is None:
            return None
        return None if self.beat is not None and self.beat.time > last.ended else last


def judge(known: Known) -> tuple[str, str]:
    """(state, why) of a run: running, pending, ended or stalled?."""
    job, holder, over = known.job, known.holder, known.over
    if job is not None and job.state in WAITING:
        return "pending", why_pending(job) + (f"; before: {over.why}" if over else "")
    if job is not None and job.state in GOING:
        return judge_going(known, job)
    if holder is not None and holder.alive:
        return judge_life(known, f"process {holder.pid} of this machine")
    if over is not None:
        if over.action not in ("requeued", "restarted"):
            told = f"; {over.action}" if over.action == "given up" else ""
            return "ended", over.why + told
        if not known.asked:
            return "pending", f"{over.action} after: {over.why}"
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
    return "ended", f"job {last.job} is {_fate(job)}, attempt {last.number} left no last word"


def _fate(job: QueuedJob | None) -> str:
    return f"{job.state} in Slurm's words" if job else "no longer in the queue"


def judge_going(known: Known, job: QueuedJob) -> tuple[str, str]:
    """A job that has nodes: it runs, is stalled, or is about to be gone."""
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
    """A run that should be at work: when did it last say so?"""
    beat = known.beat
    sign = beat.time if beat else last_sign(known.run)
    signs = [*known.began] + ([sign] if sign is not None else [])
    phase = beat.phase if beat else "start"
    # Without a heartbeat only the metrics tell that more than that happens.
    begun = beat is None and sign is not None and sign > max(known.began, default=0.0)
    doing = "at work" if begun else PHASES.get(phase, phase)
    if not signs:
        return "running", f"{doing}; {where}"
    silent = age(max(signs))
    told = f"{doing}; {where}; last sign of life {duration(silent)} ago"
    return ("stalled?" if silent > patience_for(known, phase) else "running"), told


def judge_alone(known: Known) -> tuple[str, str]:
    """A run that no job and no process that can be seen from here is at work on."""
    beat, holder, saved = known.beat, known.holder, known.checkpoint
    gone = f"; job {known.job.label} is {_fate(known.job)}" if known.job else ""
    if beat is not None and beat.phase in OVER:
        words = {"done": "finished", "stopped": "saved and stopped by a signal"}
        return "ended", words.get(beat.phase, "stopped by an alarm, unsaved")
    if known.steps is not None and saved is not None and saved.step >= known.steps:
        return "ended", "finished"
    sign = last_sign(known.run)
    if sign is None and holder is None:
        return "ended", "nothing has begun" + gone
    if holder is not None and holder.alive is None:
        return judge_life(known, f"process {holder.pid} of {holder.host}, unseen from here")
    silent = f", {duration(age(sign))} ago" if sign is not None else ""
    return "ended", f"without a last word{silent}{gone}"


def patience_for(known: Known, phase: str) -> float:
    """Seconds of silence after which a run may hang, by its job's profile or the defaults."""
    profile = read_profile(known.run)
    if phase != "train" or known.pace is None:
        return profile.start_seconds
    return max(profile.stall_seconds, profile.stall_factor * known.pace)


def read_profile(run: Path) -> Profile:
    """The profile that a run was submitted with; the defaults for one that never was."""
    path = run / "launch" / "order.json"
    if not path.exists():
        return Profile()
    try:
        values = read_sections(path)["profile"]  # JSON is YAML.
        return Profile.model_validate(values)
    except (ConfigError, KeyError, ValueError):
        return Profile()


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _has(row: dict[str, Any], key: str) -> bool:
    """Whether a row has a number there; null is for what was not finite."""
    return isinstance(row.get(key), int | float)


def _number(row: dict[str, Any], key: str) -> float | None:
    """A metric; NaN for null, None where the row has none."""
    if key not in row:
        return None
    return float(row[key]) if _has(row, key) else math.nan


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


# --------------------------------------------------------------------------------------- printed


def describe(status: Status) -> list[tuple[str, str]]:
    """What there is to say of one run, as (name, text)."""
    lines = [("run", str(status.run)), ("state", f"{status.state}: {status.why}")]
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


def describe_attempt(attempt: PastAttempt) -> tuple[str, str, str, str, str, str]:
    """Number, job, when, nodes, steps and end of an attempt."""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(attempt.began))
    if attempt.ended is not None:
        when += f" for {duration(attempt.ended - attempt.began)}"
    few = len(attempt.nodes) <= 3
    nodes = " ".join(attempt.nodes) if few else count_noun(len(attempt.nodes), "node")
    last = "" if attempt.last_step is None else str(attempt.last_step)
    action = f"; {attempt.action}" if attempt.action else ""
    end = "no end is recorded" if attempt.ended is None else f"{attempt.why}{action}"
    return str(attempt.number), attempt.job, when, nodes, f"{attempt.first_step}-{last}", end


def print_status(status: Status, console: Console) -> None:
    """One run: a table on a terminal, `name: text` lines elsewhere."""
    attempts = status.attempts[-MOST_ATTEMPTS:]
    if not console.is_terminal:
        for name, text in describe(status):
            _plain(console, f"{name}: {text}")
        for attempt in attempts:
            number, job, when, nodes, steps, end = describe_attempt(attempt)
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
            starts.add_row(*map(Text, describe_attempt(attempt)))
        console.print()
        console.print(starts)


def print_table(found: Sequence[Status], console: Console) -> None:
    """A row for each run: a table on a terminal, lines elsewhere."""
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
    """One line, however long: pipes are not wrapped."""
    print(" ".join(line.splitlines()), file=console.file)


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
    """How many, and the reasons of the ends before them."""
    if not status.restarts:
        return "0"
    reasons = [attempt.reason or "no last word" for attempt in status.attempts[:-1]]
    counts = {reason: reasons.count(reason) for reason in reasons}
    told = ", ".join(f"{reason} x {n}" if n > 1 else reason for reason, n in counts.items())
    return f"{status.restarts} ({told})"


def _near(run: Path) -> str:
    """A path from here, where it lies below."""
    here = Path.cwd()
    return str(run.relative_to(here)) if run.is_relative_to(here) else str(run)
