"""Read a run folder from outside: nothing is written, and torch is not needed.

A run may be writing any of these files; half-written rows are skipped.
"""

from __future__ import annotations

import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megarecur.config.load import read_sections
from megarecur.errors import ConfigError
from megarecur.reading import escape, parse_object, read_object

FILES = {
    "config.yaml": "the resolved config; `megarecur train RUN/config.yaml` resumes the run",
    "metrics.jsonl": "one JSON object per log step: the record of the run",
    "tensorboard/": "the same numbers for TensorBoard, with sampled texts",
    "checkpoints/": "`step-XXXXXXXX/` (safetensors with checksums), `latest` and `best`",
    "plots/": "pictures that `megarecur plot` and `megarecur eval` draw",
    "scores.jsonl": "scores on tasks: one JSON object per task, depth and metric (`eval --tasks`)",
    "tokenizer.model": "a copy of the tokenizer (or `tokenizer.json` and what lies beside it)",
    "generation_config.json": "of a converted model: its special ids, as Hugging Face has them",
    "origin.json": "where the run was started, and hashes by which its corpora are found again",
    "identity.json": "the ID of the run, which its checkpoints carry",
    "events.jsonl": "alarms, and what was done about them",
    "heartbeat.json": "phase and step of the run, with the time",
    "health.json": "figures and faults of every node, from the health check",
    "attempts.jsonl": "under Slurm: every start and every end with its cause",
    "skipped_steps.json": "under Slurm: optimizer steps skipped because they failed twice",
    "logs/": "output and stacks of the ranks by attempt, and of evaluation jobs",
    "launch/": "jobs of Slurm with their configs, scripts and code",
    "profile/": "traces of torch's profiler (`train.profile`)",
    "lease": "locked by the process that trains",
    "supervisor.lease": "locked by the supervisor of the run",
    "fold.txt": "report of `convert --scheme`",
    "fold.json": "the same report, as data",
}
"""Files of a run folder and their contents."""
MARKS = ("config.yaml", "attempts.jsonl", "launch/config.yaml")
"""Any of these files makes a folder a run; the last one exists before the first start."""
CHECKPOINT = re.compile(r"step-(\d{8})")
ATTEMPT = re.compile(r"attempt-(\d+)")
PHASES = {
    "start": "the start",
    "train": "training",
    "evaluate": "evaluation",
    "save": "saving",
    "done": "the end",
    "stopped": "the end",
    "diverged": "the end",
}
LATEST = 1e11
"""UNIX seconds in the year 5138; later times are damaged."""
OVER = ("done", "stopped", "diverged")
"""Phases after which a run does nothing more."""


@dataclass(frozen=True)
class Beat:
    """The last heartbeat of a run."""

    time: float
    """UNIX seconds, by the clock of rank 0's node."""
    step: int
    """Number of finished optimizer steps."""
    phase: str
    """start, train, evaluate, save, done, stopped or diverged."""
    detail: str = ""
    """Progress within the phase, such as `batch 3 of 80`."""

    @property
    def doing(self) -> str:
        """The phase, its step and its progress, in words."""
        words = f"{PHASES.get(self.phase, self.phase)} at step {self.step}"
        return f"{words} ({self.detail})" if self.detail else words


@dataclass(frozen=True)
class PastAttempt:
    """One start under Slurm; without `ended` it runs, or was lost with its node."""

    number: int
    job: str
    began: float
    """UNIX seconds, like `ended`."""
    nodes: tuple[str, ...] = ()
    first_step: int = 0
    """Step of the checkpoint from which it resumed."""
    ended: float | None = None
    last_step: int | None = None
    """Step of the newest checkpoint when it ended."""
    reason: str = ""
    detail: str = ""
    action: str = ""
    """The action after its end, such as requeued or given up."""

    @property
    def why(self) -> str:
        """Reason and detail of its end."""
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    step: int
    saved: float
    """UNIX seconds."""


def is_run(folder: Path) -> bool:
    """Return True if a folder belongs to a run, started or only submitted."""
    return any((folder / mark).is_file() for mark in MARKS)


def check_run(folder: Path) -> Path:
    """Return the folder if it is one of a run.

    Raises:
        ConfigError: the folder does not exist, or has no run.
    """
    if not folder.exists():
        raise ConfigError(f"{folder}: no such folder; name the run_dir of a run")
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; name the run_dir of a run")
    if not is_run(folder):
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and is_run(path))
        hint = f"it holds the runs {', '.join(inside[:8])}" if inside else "it has no config.yaml"
        more = ", ..." if len(inside) > 8 else ""
        raise ConfigError(f"{folder}: is not the folder of a run, {hint}{more}; name a run_dir")
    return folder


def read_config(run: Path) -> dict[str, Any]:
    """Return the config's sections, not validated: the run's own, or those of a job yet to start,
    whichever was written last; {} if there is none.

    Raises:
        ConfigError: the file is not YAML.
    """
    paths = [
        path for path in (run / "config.yaml", run / "launch" / "config.yaml") if path.exists()
    ]
    return read_sections(max(paths, key=lambda path: path.stat().st_mtime)) if paths else {}


def read_beat(run: Path) -> Beat | None:
    """Return the last heartbeat; None if there is none."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        found = read_object(run / "heartbeat.json")
        detail = str(found.get("detail", ""))
        return Beat(moment_of(found["time"]), int(found["step"]), str(found["phase"]), detail)
    return None


def read_identity(run: Path) -> tuple[str, str]:
    """Return the ID of a run, and the run that it has its parameters from in words; "" each if it
    is not recorded."""
    with suppress(OSError, ValueError):
        found = read_object(run / "identity.json")
        return escape(str(found.get("run", ""))), escape(str(found.get("source", "")))
    return "", ""


def read_attempts(run: Path) -> list[PastAttempt]:
    """Return all starts under Slurm, the oldest first; empty for a run that was never there."""
    attempts: dict[int, PastAttempt] = {}
    for line in read_text(run / "attempts.jsonl").splitlines():
        # One truncated line, or one of another version, must not hide the others.
        with suppress(ValueError, KeyError, TypeError, OverflowError):
            _note_event(attempts, parse_object(line))
    return [attempts[number] for number in sorted(attempts)]


def points_of(folder: Path) -> list[Path]:
    """List the run folders of a sweep; empty if the folder is not that of a sweep."""
    if is_run(folder) or not (folder / "launch" / "sweep.json").is_file():
        return []
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and is_run(path)]


def read_submitted(run: Path) -> list[str]:
    """List the jobs that were submitted for a run, the oldest first; tasks of arrays as 17_3."""
    jobs = []
    for line in read_text(run / "launch" / "submitted.jsonl").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            jobs.append(str(parse_object(line)["job"]))
    return jobs


def has_finished(run: Path) -> bool:
    """Return True if the newest start of a run finished all of its steps."""
    attempts, beat = read_attempts(run), read_beat(run)
    last = attempts[-1] if attempts else None
    if last is not None and (beat is None or beat.time < (last.ended or last.began)):
        return last.reason == "finished"
    return beat is not None and beat.phase == "done"


def moment_of(value: Any) -> float:
    """Return a time in UNIX seconds.

    Raises:
        ValueError: the value is not a plausible time.
    """
    if not 0.0 <= (moment := float(value)) <= LATEST:
        raise ValueError(f"{value} is not a time")
    return moment


def _note_event(attempts: dict[int, PastAttempt], row: dict[str, Any]) -> None:
    number = int(row["attempt"])
    if row["event"] == "start":
        attempts[number] = PastAttempt(
            number=number,
            job=str(row["job"]),
            began=moment_of(row["time"]),
            nodes=tuple(row.get("nodes") or ()),
            first_step=int(row.get("step") or 0),
        )
    elif row["event"] == "end":
        attempts[number] = replace(
            attempts[number],
            ended=moment_of(row["time"]),
            last_step=int(row.get("step") or 0),
            reason=str(row.get("reason") or "?"),
            detail=str(row.get("detail") or ""),
            action=str(row.get("action") or ""),
        )
    elif row["event"] == "revised":
        attempts[number] = replace(attempts[number], action=str(row["action"]))


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint, without checking its bytes."""
    found: list[tuple[int, Path]] = []
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in (run / "checkpoints").iterdir():
            if match := CHECKPOINT.fullmatch(path.name):
                found.append((int(match[1]), path))
    for step, path in sorted(found, reverse=True):
        with suppress(FileNotFoundError):  # retention may delete it meanwhile
            return Checkpoint(step, path.stat().st_mtime)
    return None


def find_logs(run: Path) -> dict[int, Path]:
    """Return the folders of the ranks' output by attempt, in order."""
    found: dict[int, Path] = {}
    with suppress(FileNotFoundError):
        for path in (run / "logs").iterdir():
            if (match := ATTEMPT.fullmatch(path.name)) and path.is_dir():
                found[int(match[1])] = path
    return dict(sorted(found.items()))


def read_text(path: Path) -> str:
    """Return the text of a file; "" if it does not exist yet."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def last_sign(run: Path) -> float | None:
    """Return when the run last wrote a heartbeat or metrics, in UNIX seconds; None if never."""
    beat = read_beat(run)
    signs = [beat.time] if beat else []
    with suppress(OSError):
        signs.append((run / "metrics.jsonl").stat().st_mtime)
    return max(signs, default=None)


@dataclass(frozen=True)
class Holder:
    """The process that last took the lease of a run folder."""

    host: str
    pid: int
    since: float
    """UNIX seconds."""
    alive: bool | None
    """None if this machine cannot see the process."""


def read_holder(run: Path) -> Holder | None:
    """Return the process that trains, or trained last; None if there never was one.

    The lock itself is not tried: taking it even briefly could block a starting run.
    """
    path = run / "lease"
    try:
        found = read_object(path)
        host, pid, since = str(found["host"]), int(found["pid"]), path.stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError):
        return None
    alive = _holds(pid, path) if host == socket.gethostname() else None
    return Holder(host, pid, since, alive)


def _holds(pid: int, path: Path) -> bool | None:
    """Return whether a process of this machine has the file open; its number may have been
    reused."""
    try:
        files = list(Path(f"/proc/{pid}/fd").iterdir())
    except PermissionError:
        return None
    except OSError:
        return False
    for file in files:
        with suppress(OSError):
            if os.path.samefile(file, path):
                return True
    return False


def age(moment: float) -> float:
    """Return the seconds since a moment; clocks of nodes may be slightly ahead of this one's."""
    return max(time.time() - moment, 0.0)
