"""Find how an attempt ended, by what its ranks, srun and Slurm know.

`megarecur.launch.reasons` finds the cause of a crash. This file handles the ends that Slurm, its
users or its nodes bring about.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from megarecur.launch.attempts import (
    Attempt,
    Outcome,
    Record,
    newest_step,
    own_output,
    unsaved_steps,
)
from megarecur.launch.job import JobSpec
from megarecur.launch.reasons import (
    DISK_FAILS,
    DISK_FULL,
    GPU_FAILS,
    Cause,
    Evidence,
    TaskEnd,
    code_of,
    find_cause,
)
from megarecur.launch.slurm import PATIENCE, SlurmError, ask, describe_job, describe_nodes, expand
from megarecur.reading import read_object

LAST_WORDS_SECONDS = 45.0
"""Seconds that srun may take to end the other ranks, once one has failed."""
BAD_INPUT, STOPPED = 2, 3
"""Exit codes of a rank."""
ENDED_VARIABLE = "MEGARECUR_SUPERVISOR_ENDED"
"""End of the previous supervisor, set by the batch script that started both: in bash's form, 128
plus the signal."""
NOTICE = re.compile(r"\*\*\* JOB \S+ ON \S+ CANCELLED AT (\S+?)(?: DUE TO ([A-Z ]+?))? \*\*\*")
"""Slurm's message in a job's output as it ends the batch script."""
NOTICES = {
    "": "cancelled", "PREEMPTION": "preempted", "JOB REQUEUE": "requeued",
    "TIME LIMIT": "time limit", "NODE FAILURE": "node failure",
}  # fmt: skip
EXITED = re.compile(r"(?:(\S+): )?tasks? ([\d,\-\[\] ]+): (.*)")
NODE_FAILED = re.compile(r"[Nn]ode failure on (\S+)")


class Listener:
    """The messages of srun: which task ended how, in order."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.ends: list[tuple[str, list[int], str]] = []
        """(node, tasks, how) of each failed end."""
        self.lost_nodes: list[str] = []
        """Lost nodes, in Slurm's list format."""
        self.lines: list[str] = []
        self.thread = threading.Thread(target=self.listen, args=(process,), daemon=True)
        self.thread.start()

    def listen(self, process: subprocess.Popen[str]) -> None:
        """Read until the end of the output."""
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
            self.lines.append(line.strip())
            text = line.removeprefix("srun: ").removeprefix("error: ").strip()
            if found := NODE_FAILED.search(text):
                self.lost_nodes.append(found[1])
            elif found := EXITED.fullmatch(text):
                self.ends.append((found[1] or "", numbers(found[2]), found[3]))

    def failed(self) -> bool:
        """Return True if any task failed, or any node was lost."""
        return bool(self.lost_nodes) or any(code_of(how) != STOPPED for _, _, how in self.ends)

    def join(self) -> None:
        """Wait for srun's last output."""
        self.thread.join(LAST_WORDS_SECONDS)


def numbers(text: str) -> list[int]:
    """Parse 1, 3, 4, 5 from `[1,3-5]`."""
    found: list[int] = []
    for part in text.strip("[] ").split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def explain(
    code: int, phase: str | None, said: Listener, told: Sequence[int], spec: JobSpec,
    attempt: Attempt,
) -> Outcome:  # fmt: skip
    """Return why an attempt ended.

    Args:
        phase: last phase that the run reported, if any.
        told: signals that this process received.
    """
    if phase == "done":
        return Outcome("finished")
    if said.lost_nodes:
        nodes = [node for node in attempt.nodes if node in named(said.lost_nodes)]
        return Outcome("node failure", f"Slurm lost {', '.join(nodes)}", nodes)
    by = ended_by(told, attempt)
    ended = ("requeued", "outage", "node failure")
    if by in ended and (down := down_nodes(attempt.nodes)):
        return Outcome("node failure", f"Slurm requeued the job without {', '.join(down)}", down)
    if phase == "stopped":
        return Outcome(by or "asked to stop", f"saved at step {newest_step(spec.run_dir)}")
    if phase == "diverged":
        return Outcome("diverged", "an alarm ended the run")
    error = last_error(attempt)
    if error and any(code_of(how) == BAD_INPUT for _, _, how in said.ends):
        if unfit := unfit_nodes(spec.run_dir, attempt):
            return Outcome("node failure", error, unfit)
        # Failures of disks and GPUs may not recur.
        if cause_of(said, spec, attempt).kind not in (DISK_FAILS, GPU_FAILS):
            return Outcome("bad input", error)
    if by == "time limit":
        return Outcome("out of time", f"save_seconds={spec.profile.save_seconds} did not do")
    if by:
        return Outcome(by, unsaved_steps(spec.run_dir, attempt))
    cause = cause_of(said, spec, attempt)
    if cause.kind == DISK_FULL:
        return Outcome("bad input", cause.text)
    first = said.ends[0] if said.ends else ("", [], f"srun ended with exit code {code}")
    node, tasks, how = first
    heard = {task for _, ended, _ in said.ends for task in ended}
    silent = silent_nodes(heard, spec.tasks_per_node, attempt) if said.ends else []
    where = f"rank {tasks[0]} on {node}: " if tasks else ""
    if silent:
        detail = f"{where}{how}; nothing was heard of {', '.join(silent)}"
        return Outcome("node failure", detail, silent)
    return Outcome("crash", cause.text or f"{where}{how}", list(cause.nodes))


def cause_of(said: Listener, spec: JobSpec, attempt: Attempt) -> Cause:
    """Return the most specific cause of an attempt's end that ranks, srun or Slurm report."""
    return find_cause(
        Evidence(
            logs=attempt.logs,
            nodes=attempt.nodes,
            per_node=spec.tasks_per_node,
            ends=[TaskEnd(node, tuple(tasks), how) for node, tasks, how in said.ends],
            said=said.lines,
            job=job_fields(attempt.job),
            oom_kills=attempt.oom_kills,
        )
    )


def job_fields(job: str, patience: float = PATIENCE) -> dict[str, str]:
    """Return Slurm's fields of a job; empty if it does not answer."""
    with suppress(SlurmError):
        return describe_job(job, patience)
    return {}


def ended_by(told: Sequence[int], attempt: Attempt, patience: float = PATIENCE) -> str:
    """Return the outside reason for ending the run; empty if there is none.

    Slurm shows COMPLETING for jobs that are requeued by an administrator, preempted or cancelled.
    The notice in the job's output distinguishes them, even if the controller does not answer.
    """
    fields = job_fields(attempt.job, patience)
    state, notice = fields.get("JobState", ""), read_notice(own_output(), attempt.started)
    if signal.SIGUSR1 in told or state == "TIMEOUT" or 0 < attempt.ends < time.monotonic():
        return "time limit"
    if signal.SIGUSR2 in told:
        return "SIGUSR2"
    if is_cancelled(fields):
        return "cancelled"
    if notice:
        return notice
    if fields.get("PreemptTime", "None") != "None" or state == "PREEMPTED":
        return "preempted"
    if is_requeued(fields):
        return "requeued"
    return "outage" if signal.SIGTERM in told and not fields else ""


def notices(output: str, since: float) -> list[str]:
    """Return why Slurm ended a job, by the notices in its output after a moment in UNIX seconds, in
    order; an empty string means cancelled."""
    text, found = "", []
    with suppress(OSError, ValueError):
        text = Path(output).read_text(errors="replace") if Path(output).is_file() else ""
    for moment, why in NOTICE.findall(text):
        with suppress(ValueError):
            found += [why] * (datetime.fromisoformat(moment).timestamp() >= int(since))
    return found


def read_notice(output: str, since: float) -> str | None:
    """Return why Slurm ended a job, by the last notice in its output after a moment in UNIX
    seconds; None if there is none."""
    return next((NOTICES.get(why, why.lower()) for why in notices(output, since)[::-1]), None)


def is_cancelled(fields: Mapping[str, str]) -> bool:
    """Return True if this job was cancelled.

    Until this process ends, Slurm shows COMPLETING, as for a requeued job; but a requeued job ends
    in the future, at its next time limit. A preempted one has an end too.
    """
    if fields.get("JobState") == "CANCELLED":
        return True
    if fields.get("JobState") != "COMPLETING" or fields.get("PreemptTime", "None") != "None":
        return False
    with suppress(ValueError):
        return datetime.fromisoformat(fields.get("EndTime", "")).timestamp() <= time.time() + 1.0
    return False


def is_requeued(fields: Mapping[str, str]) -> bool:
    """Return True if Slurm has requeued this job: until this process ends, it shows COMPLETING, but
    its restarts are counted."""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    counted = int(fields.get("Restarts", "0")) > restarts or fields.get("JobState") == "PENDING"
    return counted and not is_cancelled(fields)


def down_nodes(nodes: Sequence[str]) -> list[str]:
    """Return the nodes that Slurm shows as down or not responding."""
    try:
        states = ask("sinfo", "-h", "--Node", f"--nodes={','.join(nodes)}", "--format=%N %T")
    except SlurmError:
        return []
    found = dict(line.split(None, 1) for line in states.splitlines() if " " in line)
    return [node for node in nodes if found.get(node, "").startswith("down")
            or found.get(node, "").rstrip().endswith("*")]  # fmt: skip


def close_lost(record: Record) -> None:
    """Close attempts that ended without a record."""
    rows = record.rows()
    ended = [row["attempt"] for row in rows if row["event"] == "end"]
    last = max(ended, default=0)  # the ends of earlier attempts were recorded
    told = {row["attempt"]: row.get("why", "") for row in rows if row["event"] == "told"}
    for row in [r for r in rows if r["event"] == "start" and r["attempt"] > last]:
        if not row.keys() >= {"job", "nodes", "step", "time"}:
            continue
        number = row["attempt"]
        why = read_notice(row.get("output", ""), row["time"]) or told.get(number)
        outcome = explain_loss(row) if why is None else Outcome(
            {"": "requeued", "time limit": "out of time"}.get(why, why),
            "killed by Slurm before it could say more",
        )  # fmt: skip
        logs = record.run_dir / row.get("logs", "")
        lost = Attempt(number, row["job"], row["nodes"], logs, row["step"], started=row["time"],
                       beat=row.get("beat"))  # fmt: skip
        record.end(lost, outcome, "stopped" if outcome.reason == "cancelled" else "requeued")


def explain_loss(row: Mapping[str, Any]) -> Outcome:
    """Return why an attempt ended without a record, by the row of its start.

    The batch script restarts a killed supervisor, and Slurm restarts a job whose batch node was
    lost; Slurm reports the end of any other job. Only a lost batch node is to blame.
    """
    code, node, job = (
        int(os.environ.get(ENDED_VARIABLE, "0")),
        row.get("batch_node", "?"),
        row["job"],
    )
    if job != os.environ.get("SLURM_JOB_ID", job):
        fields = job_fields(job)
        state = fields.get("JobState", "")
        if state == "CANCELLED":
            return Outcome("cancelled", f"job {job} was cancelled")
        if state == "NODE_FAIL":
            return Outcome("node failure", f"Slurm lost a node of job {job}", [])
        told = f"job {job} is {state}, exit code {fields.get('ExitCode')}" if state else (
            f"Slurm no longer knows job {job}")  # fmt: skip
        return Outcome("supervisor killed", f"ended without a word; {told}")
    if code:
        what = f"signal {code - 128}" if code > 128 else f"exit code {code}"
        return Outcome("supervisor killed", f"ended by {what}; the ranks were ended too")
    anew = started_anew(row["nodes"], row["time"])
    if len(anew) > 1 and 2 * len(anew) > len(row["nodes"]):  # Many nodes do not fail at once.
        return Outcome("outage", f"ended without a word; {', '.join(anew)} have started anew since")
    return Outcome(
        "node failure", f"ended without a word: {node}, its batch node, went away", [node]
    )


def started_anew(nodes: Sequence[str], since: float) -> list[str]:
    """Return the nodes whose Slurm daemon started after a moment in UNIX seconds."""
    found = []
    with suppress(SlurmError):
        for fields in describe_nodes(nodes):
            with suppress(ValueError):
                start = datetime.fromisoformat(fields.get("SlurmdStartTime", "")).timestamp()
                found += [fields.get("NodeName", "?")] * (start > since)
    return found


def silent_nodes(heard: set[int], per_node: int, attempt: Attempt) -> list[str]:
    """Return the nodes none of whose ranks, `per_node` each, sent a sign of life."""
    return [
        node
        for i, node in enumerate(attempt.nodes)
        if heard.isdisjoint(range(i * per_node, (i + 1) * per_node))
    ]


def unfit_nodes(run_dir: Path, attempt: Attempt) -> list[str]:
    """Return the nodes of this attempt that failed its health check, unless all of them did: then
    no node is blamed."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        found = read_object(run_dir / "health.json")
        if found["time"] > attempt.started:
            unfit = [node for node, figures in found["nodes"].items() if figures["faults"]]
            return unfit if len(unfit) < len(attempt.nodes) else []
    return []


def blame_stall(stall: str, silent: Sequence[int], spec: JobSpec, attempt: Attempt) -> Outcome:
    """Return the outcome of a stalled run: the ranks without a sign of life, and nodes where all
    ranks are silent."""
    per_node = spec.processes_per_node
    named = [f"{rank} on {attempt.nodes[rank // per_node]}" for rank in silent]
    nodes = silent_nodes(set(range(spec.world)) - set(silent), per_node, attempt)
    if 2 * len(nodes) > len(attempt.nodes):  # Many nodes do not fail at once.
        nodes = []
    told = f"silent: rank {', '.join(named)}" if named else "every rank answered"
    return Outcome("stalled", f"{stall}; {told}; stacks in {attempt.logs}", nodes)


def last_error(attempt: Attempt) -> str:
    """Return the last error that a rank reported, in one line, and its log; empty if there is
    none."""
    for path in sorted(attempt.logs.glob("rank-*.log")):
        lines = path.read_text(errors="replace").strip().splitlines()
        lines = [line.strip() for line in lines if not line.startswith("slurmstepd")]
        errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
        if errors:
            return f"{' '.join(lines[errors[-1] :])} ({path})"
    return ""


def named(lists: Sequence[str]) -> set[str]:
    """Return the nodes in Slurm lists; the lists themselves if Slurm does not answer."""
    try:
        return {node for nodes in lists for node in expand(nodes)}
    except SlurmError:
        return {node for nodes in lists for node in nodes.split(",")}
