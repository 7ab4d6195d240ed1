"""RUN/attempts.jsonl: when the run was started, and how each start ended."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from megarecur.files import append_row
from megarecur.launch.folder import Beat, find_logs, newest_checkpoint, read_beat, read_text
from megarecur.launch.job import LAUNCH_VARIABLE
from megarecur.launch.output import say
from megarecur.launch.slurm import SlurmError, describe_job
from megarecur.reading import parse_row

FAILURES = ("crash", "stalled", "node failure", "out of time", "supervisor killed")
OUTSIDE = ("preempted", "requeued", "outage", "SIGUSR2", "asked to stop")
"""Ends that do not count as failures of the run, however often they occur."""
RESERVE_BYTES = 1 << 16
"""Bytes reserved on the disk for final records, in case it fills up."""
KINDS = {"event": str, "attempt": int, "time": int | float, "step": int, "began": int,
         "nodes": list, "reason": str, "job": str, "beat": int | float}  # fmt: skip
"""Types of the event fields that are read from attempts.jsonl."""


@dataclass
class Outcome:
    """The end of an attempt, with its cause and nodes to blame."""

    reason: str
    detail: str = ""
    nodes: list[str] = field(default_factory=list)
    """Nodes to blame."""


@dataclass
class Attempt:
    """One start of the run."""

    number: int
    job: str
    nodes: list[str]
    logs: Path
    began: int
    """Step of the newest checkpoint at its start."""
    ends: float = 0.0
    """End of its job, in seconds of this process's monotonic clock; 0 if unknown."""
    started: float = field(default_factory=time.time)
    beat: float | None = None
    """Time in the last heartbeat before it, 0 if there was none; None if unknown."""
    oom_kills: int = 0
    """Processes that the kernel of the batch node killed for memory meanwhile."""


class Record:
    """The record in RUN/attempts.jsonl: when the run was started, and how each start ended."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.path = run_dir, run_dir / "attempts.jsonl"
        self.reserve = run_dir / "launch" / "reserve"

    def rows(self) -> list[dict[str, Any]]:
        """Return all events, without truncated or damaged lines."""
        rows = []
        for line in read_text(self.path).splitlines():
            if (row := parse_row(line)) is not None:
                rows.append(row)
        return [row for row in rows if is_event(row)]

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one event, durable when this returns. On a full disk, the reserved space is used;
        if that is gone too, only the output of the job has the event."""
        try:
            append_row(self.path, row)
        except OSError as error:
            say(f"{self.path}: {error.strerror}; {json.dumps(row)}", flush=True)
            if self.reserve.exists():
                self.reserve.unlink()
                self.append(row)

    def keep_reserve(self) -> None:
        """Reserve some disk space for final records."""
        with suppress(OSError):
            if not self.reserve.exists():
                self.reserve.write_bytes(os.urandom(RESERVE_BYTES))

    def begin(self, nodes: list[str]) -> Attempt:
        """Create the folder of a new attempt."""
        begun = [row["attempt"] for row in self.rows() if row["event"] == "start"]
        number = 1 + max([*begun, *find_logs(self.run_dir)], default=0)
        name = f"logs/attempt-{number:03}"
        (self.run_dir / name).mkdir(parents=True, exist_ok=True)
        step, last = newest_step(self.run_dir), read_beat(self.run_dir)
        beat = last.time if last else 0.0
        self.append(
            {"event": "start", "attempt": number, "job": os.environ["SLURM_JOB_ID"],
             "time": time.time(), "nodes": nodes, "step": step, "logs": name,
             "launch": launch_of_job(), "output": own_output(), "beat": beat,
             "batch_node": os.environ.get("SLURMD_NODENAME")}
        )  # fmt: skip
        job = own_job()
        logs = self.run_dir / name
        return Attempt(number, job, nodes, logs, step, end_of(job), beat=beat)

    def told(self, attempt: Attempt, why: str = "") -> None:
        """Record that Slurm wants the job to end, and the reason once known; there may be no time
        to record more."""
        row = {"event": "told", "attempt": attempt.number, "time": time.time(), "why": why}
        self.append(row)

    def end(self, attempt: Attempt, outcome: Outcome, action: str) -> None:
        """Record how an attempt ended, and the action taken."""
        self.append(
            {"event": "end", "attempt": attempt.number, "time": time.time(),
             "began": attempt.began, "step": newest_step(self.run_dir),
             "reached": step_reached(self.run_dir, attempt),
             "failing": failing_step(self.run_dir, attempt),
             "reason": outcome.reason, "detail": outcome.detail, "nodes": outcome.nodes,
             "action": action}
        )  # fmt: skip
        detail = f": {outcome.detail}" if outcome.detail else ""
        done = "" if action == "done" else f"; {action}"
        say(f"attempt {attempt.number}: {outcome.reason}{detail}{done}", flush=True)

    def revise(self, attempt: Attempt, action: str) -> None:
        """Record that the planned action after an attempt's end was not taken."""
        self.append(
            {"event": "revised", "attempt": attempt.number, "time": time.time(), "action": action}
        )
        say(f"attempt {attempt.number}: {action}", flush=True)

    def ends(self) -> list[dict[str, Any]]:
        """Return how attempts ended, the latest first."""
        told = {"reason", "step", "began", "nodes"}
        return [r for r in reversed(self.rows()) if r["event"] == "end" and told <= r.keys()]

    def failures(self) -> list[dict[str, Any]]:
        """Return the latest consecutive failures without a newer checkpoint, excluding outside
        causes and those before this launch, whose cause may have been fixed."""
        launch = launch_of_job()
        starts = [row for row in self.rows() if row["event"] == "start"]
        own = {row["attempt"] for row in starts if row.get("launch", launch) == launch}
        ends = itertools.takewhile(lambda row: row["attempt"] in own, self.ends())
        fruitless = itertools.takewhile(lambda row: row["step"] <= row["began"], ends)
        return [row for row in fruitless if row["reason"] not in OUTSIDE]

    def blamed(self) -> list[str]:
        """Return the nodes blamed for the latest consecutive failures, the latest first."""
        failed = itertools.takewhile(lambda row: row["reason"] in FAILURES, self.ends())
        return list(dict.fromkeys(node for row in failed for node in row["nodes"]))


def is_event(row: Any) -> bool:
    """Return True if a row of attempts.jsonl has valid types."""
    return (
        isinstance(row, dict)
        and "event" in row
        and (row["event"] == "moved" or "attempt" in row)
        and all(isinstance(row[name], kind) for name, kind in KINDS.items() if name in row)
    )


def newest_step(run_dir: Path) -> int:
    """Return the step of the newest complete checkpoint; 0 if there is none."""
    newest = newest_checkpoint(run_dir)
    return newest.step if newest else 0


def beat_of(run_dir: Path, attempt: Attempt) -> Beat | None:
    """Return the last heartbeat of an attempt; None if it has sent none.

    It has another time than the last one before; a later time would need a clock that was never set
    back.
    """
    beat = read_beat(run_dir)
    if beat is None:
        return None
    known = attempt.beat is not None
    return beat if (beat.time != attempt.beat if known else beat.time > attempt.started) else None


def step_reached(run_dir: Path, attempt: Attempt) -> int | None:
    """Return the optimizer steps done, by an attempt's last heartbeat; None if it has sent none."""
    beat = beat_of(run_dir, attempt)
    return beat.step if beat else None


def failing_step(run_dir: Path, attempt: Attempt) -> int | None:
    """Return the optimizer step (0: the first) at an attempt's last heartbeat; None if it was in
    another phase, such as an evaluation."""
    beat = beat_of(run_dir, attempt)
    return beat.step if beat and beat.phase == "train" else None


def unsaved_steps(run_dir: Path, attempt: Attempt) -> str:
    """Describe the work of an attempt that was lost."""
    saved, reached = newest_step(run_dir), step_reached(run_dir, attempt)
    if reached is None:
        return "before it had started to train"
    if reached <= saved:
        return f"nothing was unsaved, at step {saved}"
    steps = f"steps {saved + 1} to {reached}" if reached > saved + 1 else f"step {reached}"
    return f"{steps} not saved"


def own_job() -> str:
    """Return this job's id for commands; for one task of an array, not the whole array's."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def launch_of_job() -> str | None:
    """Return the job that the user submitted: this one, or the one that it continues."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    return os.environ.get(LAUNCH_VARIABLE) or own_job()


def end_of(job: str) -> float:
    """Return when Slurm will end a job, by this process's monotonic clock; 0 if unknown.

    Later changes of the machine's time do not move it.
    """
    with suppress(SlurmError, ValueError):
        end = datetime.fromisoformat(describe_job(job).get("EndTime", "")).timestamp()
        return time.monotonic() + end - time.time()
    return 0.0


def own_output() -> str:
    """Return the file that this process, like every job, writes to."""
    with suppress(OSError):
        return str(Path("/proc/self/fd/1").readlink())
    return ""
