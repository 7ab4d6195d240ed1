"""Find why an attempt ended: the most specific cause that any rank or Slurm reports.

A cause that a log names (memory, disk, GPU) precedes an exception, an exception precedes a lost
connection (which usually only shows that another rank ended first), and all precede signals and
exit codes. Nodes are blamed only for causes of their own: a failing program, a full disk and a lack
of memory would occur on any node.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

TAIL_BYTES = 1 << 18
"""Bytes read of each log."""
MOST_CHARACTERS = 300
"""Maximum characters of a quoted line."""

DISK_FULL = "no space left on a disk"
GPU_FAILS, DISK_FAILS = "a GPU fails", "a disk fails"
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class TaskEnd:
    """The end of tasks as srun reported it."""

    node: str
    """Empty if srun did not name the node."""
    tasks: tuple[int, ...]
    how: str
    """End of the tasks, such as `Exited with exit code 1`, `Killed` or `Out Of Memory`."""

    @property
    def code(self) -> int | None:
        """The exit code; None after a signal."""
        return code_of(self.how)


def code_of(how: str) -> int | None:
    """Return the exit code in srun's report of an end; None after a signal."""
    found = re.search(r"exit code (\d+)", how)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class Evidence:
    """The known facts about the end of an attempt."""

    logs: Path
    """The folder of the ranks' output."""
    nodes: Sequence[str]
    """Nodes of the attempt, in the order of their ranks."""
    per_node: int
    """Log files of a node, one for each of its Slurm tasks."""
    ends: Sequence[TaskEnd] = ()
    """Ends of tasks in the order in which srun reported them."""
    said: Sequence[str] = ()
    """All output of srun."""
    job: Mapping[str, str] = field(default_factory=dict)
    """Fields of `scontrol show job`; empty if Slurm did not answer."""
    oom_kills: int = 0
    """Processes that the kernel of the batch node killed for memory during the attempt."""


@dataclass(frozen=True)
class Cause:
    """The cause of an attempt's end."""

    kind: str
    """Kind such as `out of memory` or `exception`."""
    text: str
    """Description with the line that shows the cause, and its place."""
    nodes: tuple[str, ...] = ()
    """Nodes that may be to blame."""


@dataclass(frozen=True)
class Symptom:
    """The meaning of a matching log line."""

    kind: str
    pattern: re.Pattern[str]
    blames_node: bool = False


SYMPTOMS = (
    Symptom(GPU_FAILS, re.compile(
        r"\bXid\b|uncorrectable ECC|GPU has fallen off the bus|CUDA-capable device\(s\) is/are busy"
        r"|CUDA error: (unspecified launch failure|unknown error|uncorrectable|hardware)"
        r"|CUDA unknown error|GPU is lost|No CUDA GPUs are available"
        r"|NVLink error|cudaErrorECCUncorrectable|no CUDA-capable device"), True),
    Symptom("out of GPU memory", re.compile(
        r"(CUDA|HIP) out of memory|OutOfMemoryError|CUDA_ERROR_OUT_OF_MEMORY"
        r"|CUBLAS_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation|CUDA error: out of memory")),
    Symptom(OUT_OF_MEMORY, re.compile(
        r"out[ _-]of[ _-](shared )?memory|\boom[-_ ]?kill|(cannot|can't) allocate memory"
        r"|unable to allocate [\d.]+ \wi?b|MemoryError\b|std::bad_alloc|exceeded \w+ memory limit"
        r"|\bENOMEM\b|no memory for the copies", re.IGNORECASE)),
    Symptom(DISK_FULL, re.compile(
        r"no space left|\bENOSPC\b|disk quota exceeded|\bEDQUOT\b|file too large"
        r"|free some (space|of the quota)", re.IGNORECASE)),
    Symptom("a disk cannot be written", re.compile(r"read-only file system|\bEROFS\b", re.I)),
    Symptom(DISK_FAILS, re.compile(
        r"input/output error|\bEIO\b|stale file handle|\bESTALE\b|remote i/o error"
        r"|device or resource busy|\bEBUSY\b|transport endpoint|\bENOTCONN\b|\bESHUTDOWN\b",
        re.I), True),
    Symptom("too many open files", re.compile(r"too many open files|\bEMFILE\b|\bENFILE\b", re.I)),
    Symptom("the program cannot be started", re.compile(
        r"execve\(\)|couldn't chdir to|cannot execute|ModuleNotFoundError|: command not found"
        r"|error while loading shared libraries|Unable to create step|Task launch for \S+ failed"
        r"|GLIBC\w*_[\d.]+' not found")),
)  # fmt: skip
"""Causes that logs name, the more specific ones first."""
CONNECTION = re.compile(
    r"NCCL|nccl\w*Error|DistBackendError|DistNetworkError|DistStoreError|c10d|gloo"
    r"|connection (closed|reset|refused|timed out)|connection was (closed|likely closed)"
    r"|socket timeout|broken pipe|timed out|no route to host|BrokenPipeError"
    r"|PipelineError|ConnectionError", re.IGNORECASE,
)  # fmt: skip
"""Errors that ranks usually report after another rank has ended."""
EXCEPTION = re.compile(
    r"(?:[A-Za-z_]\w*\.)*_*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Failure|Warning)(?:: .*|)$"
)
"""The last line of a traceback, whose exception name shows its kind."""
TRACEBACK = "Traceback (most recent call last):"
OF_RANK = re.compile(r"\[rank\d+\]: ?")
"""Torch's prefix of each line of an exception, with several ranks."""
SAID = re.compile(r"error: ")
FATAL = re.compile(r"Fatal Python error: |terminate called after|.*: Assertion .* failed")
PROGRESS = re.compile(r"step \d+/\d+ ")
"""A line of a healthy run: earlier reports did not end it."""
CONSEQUENCES = re.compile(r"slurmstepd: error: \*\*\*|srun: (Job step aborted|Terminating)|Killed$")
"""Slurm's messages as it ends the other tasks."""

SIGNALS = {
    "Killed": signal.SIGKILL, "Segmentation fault": signal.SIGSEGV, "Bus error": signal.SIGBUS,
    "Aborted": signal.SIGABRT, "Floating point exception": signal.SIGFPE,
    "Illegal instruction": signal.SIGILL, "Terminated": signal.SIGTERM, "Hangup": signal.SIGHUP,
    "Interrupt": signal.SIGINT, "Quit": signal.SIGQUIT, "Trace/breakpoint trap": signal.SIGTRAP,
}  # fmt: skip
"""Signals by srun's words for them."""
HINTS = {
    signal.SIGKILL: "as the kernel does if memory is short; see dmesg on that node",
    signal.SIGBUS: "as if /dev/shm or a disk is full",
}


@dataclass(frozen=True)
class Line:
    """A line of a log."""

    text: str
    path: Path
    number: int
    rank: int | None
    """None for Slurm's output."""
    raised: bool = False
    """True if the line follows a traceback, so that it names an exception, whatever its name."""


def find_cause(evidence: Evidence) -> Cause:
    """Return the most specific cause that the evidence shows."""
    lines = [line for log in read_logs(evidence) for line in log]
    for symptom in SYMPTOMS:
        found = [line for line in lines if symptom.pattern.search(line.text)]
        if found:  # An error on several nodes, for example one raised on all ranks, blames none.
            alone = len({_node_of(line, evidence) for line in found}) == 1
            return _say(symptom.kind, found[0], evidence, symptom.blames_node and alone)
    if cause := _memory_of_slurm(evidence):
        return cause
    for kind, patterns, connection in (
        ("error", (SAID,), False), ("exception", (EXCEPTION, FATAL), False),
        ("communication failed", (CONNECTION,), True),
    ):  # fmt: skip
        found = [line for line in lines if any(p.match(line.text) for p in patterns)
                 or (connection and CONNECTION.search(line.text))
                 or (kind == "exception" and line.raised)]  # fmt: skip
        found = [line for line in found if connection or not CONNECTION.search(line.text)]
        if found:
            return _say(kind, _of_first(found, evidence), evidence)
    return _by_end(evidence, lines)


def read_logs(evidence: Evidence) -> Iterator[list[Line]]:
    """Yield the last lines of each rank's log, after its last progress, and those of srun."""
    for path in sorted(evidence.logs.glob("rank-*.log")):
        rank = int("".join(filter(str.isdigit, path.stem)) or 0)
        size = path.stat().st_size
        with path.open("rb") as file:
            before = 0
            if size > TAIL_BYTES:
                before = sum(block.count(b"\n") for block in _blocks(file, size - TAIL_BYTES))
            texts = file.read().decode(errors="replace").split("\n")
        lines = list(_number(texts, path, before, rank))
        last = max((i for i, line in enumerate(lines) if PROGRESS.match(line.text)), default=-1)
        yield [line for line in lines[last + 1 :] if not CONSEQUENCES.search(line.text)]
    yield [Line(text, evidence.logs, 0, None) for text in evidence.said
           if not CONSEQUENCES.search(text)]  # fmt: skip


def _number(texts: Sequence[str], path: Path, before: int, rank: int) -> Iterator[Line]:
    """Yield lines as a terminal shows them; `before` is the number of lines above them."""
    traced = False
    for number, text in enumerate(texts, before + 1):
        text = OF_RANK.sub("", text.rstrip().rpartition("\r")[2], count=1)
        inside = not text or text[0].isspace()
        yield Line(text.strip(), path, number, rank, raised=traced and not inside)
        traced = text == TRACEBACK or (traced and inside)


def _blocks(file: object, size: int) -> Iterator[bytes]:
    while size > 0 and (block := file.read(min(size, 1 << 20))):  # type: ignore[attr-defined]
        size -= len(block)
        yield block


def _of_first(lines: Sequence[Line], evidence: Evidence) -> Line:
    """Return, of lines of several ranks, the last one of the rank that ended first."""
    order = [task for end in evidence.ends for task in end.tasks]
    ranks = {line.rank for line in lines}
    first = next((rank for rank in order if rank in ranks), lines[0].rank)
    return [line for line in lines if line.rank == first][-1]


def _say(kind: str, line: Line, evidence: Evidence, blames_node: bool = False) -> Cause:
    text = line.text[:MOST_CHARACTERS] + ("..." if len(line.text) > MOST_CHARACTERS else "")
    node = _node_of(line, evidence)
    where = f"rank {line.rank} on {node}: " if node else "Slurm: "
    place = f" ({line.path}:{line.number})" if line.rank is not None else ""
    nodes = (node,) if node and blames_node else ()
    named = f"{kind}: " if kind not in ("error", "exception") else ""
    return Cause(kind, f"{named}{where}{text}{place}", nodes)


def _node_of(line: Line, evidence: Evidence) -> str:
    """Return the node of the rank that wrote a line; empty for Slurm's output."""
    place = len(evidence.nodes) if line.rank is None else line.rank // evidence.per_node
    return evidence.nodes[place] if place < len(evidence.nodes) else ""


def _memory_of_slurm(evidence: Evidence) -> Cause | None:
    """Return a lack of memory that Slurm or the kernel saw, and no rank could report."""
    for end in evidence.ends:
        by_kernel = evidence.oom_kills and end.how.startswith("Killed")
        if "Out Of Memory" in end.how or by_kernel:
            by = "the kernel killed it" if by_kernel else end.how
            return Cause(
                OUT_OF_MEMORY, f"{OUT_OF_MEMORY}: {_where(end)}{by}{_log_of(end, evidence)}"
            )
    state = evidence.job.get("JobState", "")
    if "OUT_OF_MEMORY" in (state, evidence.job.get("Reason", "").upper()):
        return Cause(OUT_OF_MEMORY, f"{OUT_OF_MEMORY}: Slurm says {state}")
    return None


def _by_end(evidence: Evidence, lines: Sequence[Line]) -> Cause:
    """Return the cause by signals and exit codes alone, with the rank's last line."""
    # A killed task explains the exit codes of those that lost it.
    ends = sorted(evidence.ends, key=lambda end: end.code is not None)
    if not ends:
        reason = evidence.job.get("Reason", "None")
        return Cause("unknown", f"Slurm's reason is {reason}" if reason != "None" else "")
    end = ends[0]
    name = end.how.split(" (")[0]
    text = f"{_where(end)}{end.how}"
    if name in SIGNALS:
        hint = HINTS.get(SIGNALS[name], "")
        text += f" ({SIGNALS[name].name}{', ' + hint if hint else ''})"
        return Cause("signal", text + _log_of(end, evidence))
    own = [line for line in lines if line.rank in end.tasks and line.text]
    if own:
        return Cause("exit code", f"{text}, after: {own[-1].text[:MOST_CHARACTERS]} "
                                  f"({own[-1].path}:{own[-1].number})")  # fmt: skip
    return Cause("exit code", text + _log_of(end, evidence))


def _where(end: TaskEnd) -> str:
    return f"rank {end.tasks[0]} on {end.node}: " if end.tasks and end.node else ""


def _log_of(end: TaskEnd, evidence: Evidence) -> str:
    if not end.tasks:
        return ""
    return f"; log: {evidence.logs / f'rank-{end.tasks[0]:04}.log'}"


def count_oom_kills() -> int:
    """Return how many processes this machine's kernel has killed for lack of memory since boot."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
