"""What the folder of a run says of it, read from outside: nothing is written, torch is not needed.

    attempts.jsonl     starts under Slurm, and how each of them ended
    heartbeat.json     what the run was at last
    metrics.jsonl      its numbers
    checkpoints/       what it would go on from
    lease              the process that trains

A run may be writing any of them: what is half there is passed over.
"""

from __future__ import annotations

import json
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

MARKS = ("config.yaml", "attempts.jsonl", "launch/config.yaml")
"""Any of these makes a folder a run: the last one is there before the first start."""
CHECKPOINT = re.compile(r"step-(\d{8})")
ATTEMPT = re.compile(r"attempt-(\d+)")
OVER = ("done", "stopped", "diverged")
"""Phases after which a run does nothing more."""


@dataclass(frozen=True)
class Beat:
    """What a run last said of itself."""

    time: float
    """UNIX seconds, by the clock of rank 0's node."""
    step: int
    """Optimizer steps done."""
    phase: str
    """start, train, evaluate, save, done, stopped or diverged."""


@dataclass(frozen=True)
class PastAttempt:
    """One start under Slurm; without `ended` it runs, or went away with its node."""

    number: int
    job: str
    began: float
    """UNIX seconds, as `ended`."""
    nodes: tuple[str, ...] = ()
    first_step: int = 0
    """Of the checkpoint that it went on from."""
    ended: float | None = None
    last_step: int | None = None
    """Of the newest checkpoint when it ended."""
    reason: str = ""
    detail: str = ""
    action: str = ""
    """What was done about its end, such as requeued or given up."""

    @property
    def why(self) -> str:
        """Reason and detail of its end."""
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    step: int
    saved: float
    """UNIX seconds."""


def is_run(folder: Path) -> bool:
    """Whether a folder belongs to a run, begun or only submitted."""
    return any((folder / mark).is_file() for mark in MARKS)


def check_run(folder: Path) -> Path:
    """The folder, if it is one of a run.

    Raises:
        ConfigError: no such folder, or no run in it.
    """
    if not folder.exists():
        raise ConfigError(f"{folder}: no such folder; give the run_dir of a run")
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is a file; give the run_dir of a run")
    if not is_run(folder):
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and is_run(path))
        hint = f"it holds the runs {', '.join(inside[:8])}" if inside else "it has no config.yaml"
        more = ", ..." if len(inside) > 8 else ""
        raise ConfigError(f"{folder}: is not the folder of a run, {hint}{more}; give a run_dir")
    return folder


def read_config(run: Path) -> dict[str, Any]:
    """The config's sections, not validated: the run's own, or that of a job yet to begin, whichever
    was written last; {} before there is any.

    Raises:
        ConfigError: it is no YAML.
    """
    paths = [
        path for path in (run / "config.yaml", run / "launch" / "config.yaml") if path.exists()
    ]
    return read_sections(max(paths, key=lambda path: path.stat().st_mtime)) if paths else {}


def read_beat(run: Path) -> Beat | None:
    """The heartbeat; None where there is none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((run / "heartbeat.json").read_text(encoding="utf-8"))
        return Beat(float(found["time"]), int(found["step"]), str(found["phase"]))
    return None


def read_attempts(run: Path) -> list[PastAttempt]:
    """All starts under Slurm, the oldest first; none for a run that was never there."""
    attempts: dict[int, PastAttempt] = {}
    for line in read_text(run / "attempts.jsonl").splitlines():
        # A line cut short, or one of another version, is not worth losing the others for.
        with suppress(ValueError, KeyError, TypeError):
            _note_event(attempts, json.loads(line))
    return [attempts[number] for number in sorted(attempts)]


def _note_event(attempts: dict[int, PastAttempt], row: dict[str, Any]) -> None:
    number = int(row["attempt"])
    if row["event"] == "start":
        attempts[number] = PastAttempt(
            number=number,
            job=str(row["job"]),
            began=float(row["time"]),
            nodes=tuple(row.get("nodes") or ()),
            first_step=int(row.get("step") or 0),
        )
    elif row["event"] == "end":
        attempts[number] = replace(
            attempts[number],
            ended=float(row["time"]),
            last_step=int(row.get("step") or 0),
            reason=str(row.get("reason") or "?"),
            detail=str(row.get("detail") or ""),
            action=str(row.get("action") or ""),
        )


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint; its bytes are not checked."""
    found: list[tuple[int, Path]] = []
    with suppress(FileNotFoundError):
        for path in (run / "checkpoints").iterdir():
            if match := CHECKPOINT.fullmatch(path.name):
                found.append((int(match[1]), path))
    for step, path in sorted(found, reverse=True):
        with suppress(FileNotFoundError):  # Retention may delete it meanwhile.
            return Checkpoint(step, path.stat().st_mtime)
    return None


def find_logs(run: Path) -> dict[int, Path]:
    """Folders of the ranks' output, by attempt, in order."""
    found: dict[int, Path] = {}
    with suppress(FileNotFoundError):
        for path in (run / "logs").iterdir():
            if (match := ATTEMPT.fullmatch(path.name)) and path.is_dir():
                found[int(match[1])] = path
    return dict(sorted(found.items()))


def read_text(path: Path) -> str:
    """Of a file that may not be there yet: then nothing."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def last_sign(run: Path) -> float | None:
    """When the run last wrote a heartbeat or a row of metrics, in UNIX seconds; None: never."""
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
    """None: it cannot be seen from this machine."""


def read_holder(run: Path) -> Holder | None:
    """Who trains, or trained last; None where nobody ever did.

    The lock itself is not tried: taking it even for a moment could refuse a run that starts.
    """
    path = run / "lease"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        host, pid, since = str(found["host"]), int(found["pid"]), path.stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError):
        return None
    alive = _holds(pid, path) if host == socket.gethostname() else None
    return Holder(host, pid, since, alive)


def _holds(pid: int, path: Path) -> bool | None:
    """Whether a process of this machine has a file open: its number may be another one's by now."""
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
    """Seconds since then; clocks of nodes may run a little ahead of this one's."""
    return max(time.time() - moment, 0.0)
