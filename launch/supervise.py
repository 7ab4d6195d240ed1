"""The batch script's part of a job: start the run, watch it, bring it back.

It runs outside the training processes, on the job's first node, and imports nothing heavy. One
attempt is one `srun`. However it ends, the reason is recorded in RUN/attempts.jsonl before anything
is done about it:

    finished, bad input, diverged, cancelled     the end
    time limit, preempted, SIGUSR2, asked to stop    the job is requeued
    out of time                                  not saved before the limit; requeued
    crash                                        once in place, then requeued
    stalled, node failure                        requeued, without the nodes that are to blame

Slurm requeues by itself when a node goes down. Failures in a row without a newer checkpoint are
bounded by the profile's `retries`. A crash is a node's fault only if the rank was killed there.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from launch.folder import newest_checkpoint, read_beat
from launch.job import Order, read_order, submit_order
from launch.slurm import SlurmError, ask, describe_job, expand
from launch.watchdog import Watchdog, ask_for_stacks
from megarecur.errors import ConfigError

POLL_SECONDS = 0.2
LAST_WORDS_SECONDS = 45.0
"""What srun may take to end the other ranks, once one has ended badly."""
EARLY_SECONDS = 75.0
BAD_INPUT = 2

FAILURES = ("crash", "stalled", "node failure", "out of time")
OUTSIDE = ("preempted", "SIGUSR2", "asked to stop")
"""Ends that say nothing of the run: they may come as often as they like."""
FINAL = {"finished": 0, "bad input": BAD_INPUT, "diverged": 1, "cancelled": 1}
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
"""Passed on to the run. SIGUSR1 comes from --signal, SIGTERM from Slurm as it ends the job."""

EXITED = re.compile(r"(?:(\S+): )?tasks? ([\d,\-\[\] ]+): (.*)")
NODE_FAILED = re.compile(r"[Nn]ode failure on (\S+)")


@dataclass
class Outcome:
    """How an attempt ended."""

    reason: str
    detail: str = ""
    nodes: list[str] = field(default_factory=list)
    """Those to blame."""


@dataclass
class Attempt:
    """One start of the run."""

    number: int
    job: str
    nodes: list[str]
    logs: Path
    began: int
    """Step of the newest checkpoint when it began."""
    ends: float = 0.0
    """When its job does, in Unix seconds."""
    started: float = field(default_factory=time.time)


def supervise(run_dir: Path) -> int:
    """Run the job of a run folder until it is done or handed back to Slurm. Returns the exit code.

    Raises:
        ConfigError: no job was made for this folder, or another one holds it for too long.
    """
    order = read_order(run_dir)
    record = Record(run_dir)
    told = note_signals()
    with hold(run_dir, order.profile.start_seconds):
        record.close_lost()
        if len(record.failures()) > order.profile.retries:
            print(f"given up: too many ends without a newer checkpoint, see {record.path}")
            return 1
        nodes = expand(os.environ["SLURM_JOB_NODELIST"])
        if len(nodes) != order.nodes:
            raise ConfigError(
                f"{run_dir}: was launched again, for {order.nodes} nodes, after this job of "
                f"{len(nodes)}; cancel one of the two jobs"
            )
        if leave_blamed(order, record, nodes):
            return 0
        while True:
            attempt = record.begin(nodes)
            outcome = run_attempt(order, record, attempt, told)
            action = choose(outcome, record, order, attempt, told)
            record.end(attempt, outcome, action)
            if action == "restarted":
                continue
            if action == "requeued":
                return 0 if requeue(order, attempt.ends, affordable(order, record)) else 1
            return FINAL.get(outcome.reason, 1)


# ---------------------------------------------------------------------------------------- record


class Record:
    """RUN/attempts.jsonl: when the run was started, and how each start ended."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.path = run_dir, run_dir / "attempts.jsonl"

    def rows(self) -> list[dict[str, Any]]:
        """All events; a line cut short by a crash is left out."""
        rows = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            with suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return [row for row in rows if isinstance(row, dict)]

    def append(self, row: Mapping[str, Any]) -> None:
        """One event, durable when this returns. A line that was cut short is ended first."""
        with self.path.open("a+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def begin(self, nodes: list[str]) -> Attempt:
        """Make the folder of a new attempt."""
        number = 1 + sum(row["event"] == "start" for row in self.rows())
        name = f"logs/attempt-{number:03}"
        (self.run_dir / name).mkdir(parents=True, exist_ok=True)
        step = newest_step(self.run_dir)
        self.append(
            {"event": "start", "attempt": number, "job": os.environ["SLURM_JOB_ID"],
             "time": time.time(), "nodes": nodes, "step": step, "logs": name,
             "batch_node": os.environ.get("SLURMD_NODENAME")}
        )  # fmt: skip
        job = own_job()
        return Attempt(number, job, nodes, self.run_dir / name, step, end_of(job))

    def told(self, attempt: Attempt) -> None:
        """Slurm wants the job to end; there may be no time to say more."""
        self.append({"event": "told", "attempt": attempt.number, "time": time.time()})

    def end(self, attempt: Attempt, outcome: Outcome, action: str) -> None:
        """Say how an attempt ended, and what is done about it."""
        self.append(
            {"event": "end", "attempt": attempt.number, "time": time.time(),
             "began": attempt.began, "step": newest_step(self.run_dir),
             "reached": step_reached(self.run_dir, attempt.started),
             "reason": outcome.reason, "detail": outcome.detail, "nodes": outcome.nodes,
             "action": action}
        )  # fmt: skip
        print(f"attempt {attempt.number}: {outcome.reason}: {outcome.detail}; {action}", flush=True)

    def close_lost(self) -> None:
        """End attempts that ended without a word: their batch node went away, or Slurm killed the
        job before this process could say more."""
        rows = self.rows()
        ended = {row["attempt"] for row in rows if row["event"] == "end"}
        told = {row["attempt"] for row in rows if row["event"] == "told"}
        for row in [r for r in rows if r["event"] == "start" and r["attempt"] not in ended]:
            node = row["batch_node"]
            outcome = Outcome(
                "node failure", f"ended without a word: {node}, its batch node, went away", [node]
            )
            if row["attempt"] in told:
                outcome = Outcome("preempted", "killed by Slurm before it could say more")
            lost = Attempt(
                row["attempt"], row["job"], row["nodes"], Path(), row["step"], started=row["time"]
            )
            self.end(lost, outcome, "requeued")

    def ends(self) -> list[dict[str, Any]]:
        """How attempts ended, the latest first."""
        return [row for row in reversed(self.rows()) if row["event"] == "end"]

    def failures(self) -> list[dict[str, Any]]:
        """The latest ends in a row without a newer checkpoint, but for those from outside."""
        fruitless = itertools.takewhile(lambda row: row["step"] <= row["began"], self.ends())
        return [row for row in fruitless if row["reason"] not in OUTSIDE]

    def blamed(self) -> list[str]:
        """Nodes that the latest failures in a row are put down to, the latest first."""
        failed = itertools.takewhile(lambda row: row["reason"] in FAILURES, self.ends())
        return list(dict.fromkeys(node for row in failed for node in row["nodes"]))


def newest_step(run_dir: Path) -> int:
    """Of the newest whole checkpoint; 0 without any."""
    newest = newest_checkpoint(run_dir)
    return newest.step if newest else 0


def step_reached(run_dir: Path, since: float) -> int | None:
    """Optimizer steps done, by the run's last word; None where it has said nothing since."""
    beat = read_beat(run_dir)
    return beat.step if beat and beat.time > since else None


@contextmanager
def hold(run_dir: Path, patience: float) -> Iterator[None]:
    """Be the only job on a run folder; waits for another one.

    Raises:
        ConfigError: it is still there after `patience` seconds.
    """
    with (run_dir / "supervisor.lease").open("a+", encoding="utf-8") as file:
        until, waited = time.monotonic() + patience, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another job"
                if time.monotonic() > until:
                    raise ConfigError(
                        f"run_dir={run_dir} is in use by {holder}; end that job, "
                        "or choose another run_dir"
                    ) from None
                if not waited:
                    print(f"waiting for {holder} to leave {run_dir}", flush=True)
                waited = True
                time.sleep(1.0)
        file.seek(0)
        file.truncate()
        file.write(f"job {os.environ['SLURM_JOB_ID']} on {socket.gethostname()}")
        file.flush()
        yield


# --------------------------------------------------------------------------------------- attempt


def note_signals() -> list[int]:
    """The stop signals that come from now on, in order."""
    told: list[int] = []
    for number in SIGNALS:
        signal.signal(number, lambda received, frame: told.append(received))
    return told


def run_attempt(order: Order, record: Record, attempt: Attempt, told: list[int]) -> Outcome:
    """Start the run and stay until it has ended, however that may be."""
    beat_before = read_beat(order.run_dir)
    process = subprocess.Popen(
        order.srun(attempt.logs, attempt.number),
        env={**os.environ, **rendezvous(attempt)},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # The terminal's and Slurm's signals come to it from here only.
    )
    said = Listener(process)
    watchdog = Watchdog(order.profile, lambda: read_beat(order.run_dir))
    forwarded, noted, failed_at = 0, False, 0.0
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        if any(is_time(number, attempt, order) for number in told[forwarded:]):
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGUSR1)
            forwarded = len(told)
        if signal.SIGTERM in told and not noted:
            record.told(attempt)
            noted = True
        if said.failed() and not failed_at:
            failed_at = time.monotonic()
        if failed_at and time.monotonic() - failed_at > LAST_WORDS_SECONDS:
            end_step(attempt, process)
        elif 0 < attempt.ends - order.profile.save_seconds / 4 < time.time():
            end_step(attempt, process)  # Before Slurm ends this process too.
        elif not failed_at and (stall := watchdog.stalled()):
            if watchdog.over:
                end_step(attempt, process)
                continue
            silent = ask_for_stacks(attempt, order.world)
            end_step(attempt, process)
            said.join()
            return blame_stall(stall, silent, order, attempt)
    said.join()
    beat = read_beat(order.run_dir)
    phase = beat.phase if beat and beat != beat_before else None
    return explain(process.returncode, phase, said, told, order, attempt)


def is_time(number: int, attempt: Attempt, order: Order) -> bool:
    """Whether a signal is to be passed on now. Slurm tells of the time limit up to a minute too
    early; until then the run may go on."""
    early = attempt.ends - time.time() - order.profile.save_seconds
    return number != signal.SIGUSR1 or not 0.0 < early < EARLY_SECONDS


def own_job() -> str:
    """This job, as commands take it: one task of an array must not mean the whole array."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def end_of(job: str) -> float:
    """When Slurm will end a job, in Unix seconds; 0 where it does not say."""
    with suppress(SlurmError, ValueError):
        return datetime.fromisoformat(describe_job(job).get("EndTime", "")).timestamp()
    return 0.0


def rendezvous(attempt: Attempt) -> dict[str, str]:
    """Where the ranks of one attempt meet: the first node, at a port that is free here now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return {
        "MASTER_ADDR": attempt.nodes[0],
        "MASTER_PORT": str(port),
        "MEGARECUR_STACKS": str(attempt.logs),
    }


class Listener:
    """What srun itself says: which task ended how, first to last."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.ends: list[tuple[str, list[int], str]] = []
        """(node, tasks, how) of each end that was not 0."""
        self.lost_nodes: list[str] = []
        """As Slurm writes lists."""
        self.thread = threading.Thread(target=self.listen, args=(process,), daemon=True)
        self.thread.start()

    def listen(self, process: subprocess.Popen[str]) -> None:
        """Read to the end."""
        assert process.stderr is not None
        for line in process.stderr:
            sys.stderr.write(line)
            sys.stderr.flush()
            text = line.removeprefix("srun: ").removeprefix("error: ").strip()
            if found := NODE_FAILED.search(text):
                self.lost_nodes.append(found[1])
            elif found := EXITED.fullmatch(text):
                self.ends.append((found[1] or "", numbers(found[2]), found[3]))

    def failed(self) -> bool:
        """Whether any task ended badly, or any node went away."""
        return bool(self.lost_nodes or any("exit code 3" not in how for _, _, how in self.ends))

    def join(self) -> None:
        """Wait for its last words."""
        self.thread.join(LAST_WORDS_SECONDS)


def numbers(text: str) -> list[int]:
    """1, 3 to 5 of `[1,3-5]`."""
    found: list[int] = []
    for part in text.strip("[] ").split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def end_step(attempt: Attempt, process: subprocess.Popen[str]) -> None:
    """Kill what is left of the ranks, stopped ones too, then srun where it waits for lost nodes."""
    with suppress(SlurmError):
        ask("scancel", "--signal=KILL", step_of(attempt.job))
    try:
        process.wait(LAST_WORDS_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def step_of(job: str) -> str:
    """The job's newest step: the one of srun."""
    steps = ask("squeue", "--noheader", "--steps", "--jobs", job, "--format=%i").split()
    ids = [s for s in steps if s.startswith(f"{job}.") and s.rpartition(".")[2].isdigit()]
    return max(ids, key=lambda step: int(step.rpartition(".")[2]), default=f"{job}.0")


# --------------------------------------------------------------------------------------- reasons


def explain(
    code: int, phase: str | None, said: Listener, told: Sequence[int], order: Order,
    attempt: Attempt,
) -> Outcome:  # fmt: skip
    """Why an attempt ended.

    Args:
        code: of srun.
        phase: what the run said of itself, if it said anything.
        said: what srun said.
        told: signals that this process got.
    """
    if phase == "done":
        return Outcome("finished")
    if said.lost_nodes:
        nodes = [node for node in attempt.nodes if node in named(said.lost_nodes)]
        return Outcome("node failure", f"Slurm lost {', '.join(nodes)}", nodes)
    by = ended_by(told, attempt)
    if phase == "stopped":
        return Outcome(by or "asked to stop", f"saved at step {newest_step(order.run_dir)}")
    if phase == "diverged":
        return Outcome("diverged", "an alarm ended the run")
    error = last_error(attempt)
    if error and any(f"exit code {BAD_INPUT}" in how for _, _, how in said.ends):
        unfit = unfit_nodes(order.run_dir, attempt)
        return Outcome("node failure" if unfit else "bad input", error, unfit)
    if by == "time limit":
        return Outcome("out of time", f"save_seconds={order.profile.save_seconds} did not do")
    if by:
        return Outcome(by, "not saved in time")
    first = said.ends[0] if said.ends else ("", [], f"srun ended with exit code {code}")
    node, tasks, how = first
    heard = {task for _, ended, _ in said.ends for task in ended}
    silent = silent_nodes(heard, order.tasks_per_node, attempt) if said.ends else []
    where = f"rank {tasks[0]} on {node}: " if tasks else ""
    if silent:
        detail = f"{where}{how}; nothing was heard of {', '.join(silent)}"
        return Outcome("node failure", detail, silent)
    # Killed from outside, it may be the node's fault; a program that fails does so anywhere.
    return Outcome("crash", f"{where}{how}", [node] if node and "exit code" not in how else [])


def ended_by(told: Sequence[int], attempt: Attempt) -> str:
    """Who outside the run wants it to end; empty: nobody."""
    fields: dict[str, str] = {}
    with suppress(SlurmError):
        fields = describe_job(attempt.job)
    state = fields.get("JobState", "")
    if signal.SIGUSR1 in told or state == "TIMEOUT" or 0 < attempt.ends < time.time():
        return "time limit"
    if signal.SIGUSR2 in told:
        return "SIGUSR2"
    preempted = fields.get("PreemptTime", "None") != "None" or state == "PREEMPTED"
    if preempted or is_requeued(fields):
        return "preempted"
    return "cancelled" if state in ("CANCELLED", "COMPLETING") else ""


def is_requeued(fields: Mapping[str, str]) -> bool:
    """Whether Slurm has put this job back into the queue. Until this process is gone it is called
    COMPLETING, as a cancelled one is, but its restarts are counted."""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return int(fields.get("Restarts", "0")) > restarts or fields.get("JobState") == "PENDING"


def silent_nodes(heard: set[int], per_node: int, attempt: Attempt) -> list[str]:
    """Nodes none of whose ranks, so many each, has been heard of."""
    return [
        node
        for i, node in enumerate(attempt.nodes)
        if heard.isdisjoint(range(i * per_node, (i + 1) * per_node))
    ]


def unfit_nodes(run_dir: Path, attempt: Attempt) -> list[str]:
    """Nodes of this attempt that its health check found broken, unless all of them were: then what
    is broken is no node's."""
    with suppress(OSError, ValueError, KeyError):
        found = json.loads((run_dir / "health.json").read_text())
        if found["time"] > attempt.started:
            unfit = [node for node, figures in found["nodes"].items() if figures["faults"]]
            return unfit if len(unfit) < len(attempt.nodes) else []
    return []


def blame_stall(stall: str, silent: Sequence[int], order: Order, attempt: Attempt) -> Outcome:
    """A stalled run: which ranks gave no sign of life, and the nodes that wholly did not."""
    per_node = order.processes_per_node
    named = [f"{rank} on {attempt.nodes[rank // per_node]}" for rank in silent]
    nodes = silent_nodes(set(range(order.world)) - set(silent), per_node, attempt)
    if 2 * len(nodes) > len(attempt.nodes):  # So many do not break at once.
        nodes = []
    told = f"silent: rank {', '.join(named)}" if named else "every rank answered"
    return Outcome("stalled", f"{stall}; {told}; stacks in {attempt.logs}", nodes)


def last_error(attempt: Attempt) -> str:
    """The last error that a rank told its user of, in one line; empty if there is none."""
    for path in sorted(attempt.logs.glob("rank-*.log")):
        lines = path.read_text(errors="replace").strip().splitlines()
        lines = [line.strip() for line in lines if not line.startswith("slurmstepd")]
        errors = [i for i, line in enumerate(lines) if line.startswith("error: ")]
        if errors:
            return " ".join(lines[errors[-1] :])
    return ""


def named(lists: Sequence[str]) -> set[str]:
    """The nodes in lists as Slurm writes them; those lists themselves if it does not answer."""
    try:
        return {node for nodes in lists for node in expand(nodes)}
    except SlurmError:
        return {node for nodes in lists for node in nodes.split(",")}


# --------------------------------------------------------------------------------------- actions


def choose(
    outcome: Outcome, record: Record, order: Order, attempt: Attempt, told: Sequence[int]
) -> str:
    """What to do: `done`, `stopped`, `given up`, `restarted` (in place) or `requeued`. What else
    there is to say is added to the outcome's detail."""
    if outcome.reason in FINAL:
        return "done" if outcome.reason == "finished" else "stopped"
    if outcome.reason in OUTSIDE:
        return "requeued"
    fruitless = newest_step(order.run_dir) <= attempt.began
    before = record.failures() if fruitless else []
    if fruitless and len(before) >= order.profile.retries:
        outcome.detail += f"; {len(before) + 1} times in a row without a newer checkpoint"
        return "given up"
    if outcome.reason in ("crash", "stalled"):
        reached = step_reached(order.run_dir, attempt.started)
        last = next((row for row in record.ends() if row["reason"] not in OUTSIDE), {})
        if reached is not None and last.get("reached") == reached:
            outcome.detail += f"; step {reached + 1} has failed twice"
            if order.profile.skip_failing_step:
                skip_step(order.run_dir, reached)
                outcome.detail += ", it is left out from now on"
    in_place = outcome.reason == "crash" and not before and not told
    return "restarted" if in_place else "requeued"


def skip_step(run_dir: Path, step: int) -> None:
    """Let the run leave out the samples of a step (0: the first)."""
    path = run_dir / "skipped_steps.json"
    steps = json.loads(path.read_text()) if path.exists() else []
    aside = path.with_suffix(".tmp")
    with aside.open("w") as file:
        json.dump(sorted({*steps, step}), file)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def requeue(order: Order, ends: float, exclude: Sequence[str]) -> bool:
    """Hand the job back to Slurm, or submit it anew where that is not allowed; False: it could not
    be, until shortly before the job's end.

    Slurm ends this process when it requeues; until then it can still name nodes to leave out.
    """
    job, until = own_job(), max(ends, time.time() + 60.0) - 2.0
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        try:
            if not order.profile.requeue:
                forget_job()
                new = submit_order(order, dependency=f"afterany:{job}", exclude=exclude)
                print(f"submitted anew as job {new}", flush=True)
                return True
            fields = describe_job(job)
            if fields.get("JobState") == "CANCELLED":
                return False
            if not is_requeued(fields):  # As Slurm does by itself when a node fails.
                ask("scontrol", "requeue", job)
            break
        except SlurmError as error:
            print(f"not requeued yet: {error}", flush=True)
            if time.time() > until:
                return False
            time.sleep(5.0)
    everyone = [*named(order.profile.exclude), *exclude]
    for _ in range(50 if exclude else 0):
        try:
            ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(everyone)}")
            break
        except SlurmError:
            time.sleep(0.2)
    return True


def forget_job() -> None:
    """Leave nothing of this job's in the environment, which sbatch hands to the next."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SLURMD_"))]:
        if name != "SLURM_CONF":
            del os.environ[name]


def leave_blamed(order: Order, record: Record, nodes: Sequence[str]) -> bool:
    """Requeue at once where Slurm gave the job a node again that it is better off without: Slurm
    requeues by itself when a node fails, and does not ask. Once: what has no effect is not tried
    again."""
    exclude = affordable(order, record)
    rows = record.rows()
    if not set(exclude) & set(nodes) or not order.profile.requeue or rows[-1]["event"] == "moved":
        return False
    record.append({"event": "moved", "time": time.time(), "exclude": exclude})
    print(f"requeued at once, to leave out {', '.join(exclude)}", flush=True)
    return requeue(order, 0.0, exclude)


def affordable(order: Order, record: Record) -> list[str]:
    """Those of the blamed nodes that can be left out: the newest first, while enough are left."""
    blamed = record.blamed()
    if not blamed:
        return []
    partition = os.environ.get("SLURM_JOB_PARTITION", "")
    states = "--states=idle,mixed,allocated,completing"
    try:
        listed = ask("sinfo", "-h", "--Node", f"--partition={partition}", states, "--format=%N")
    except SlurmError:
        return []
    profile = order.profile
    there = set(listed.split()) - named(profile.exclude)
    spare = len(there) - order.nodes
    if profile.constraint or profile.gpu_type or profile.options:  # Not all of them will do.
        spare = min(spare, max(1, order.nodes // 4))
    return blamed[: max(spare, 0)]
