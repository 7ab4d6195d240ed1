"""Supervise a job in its batch script: start the run, watch it, requeue it.

It runs outside the training processes, on the job's first node, with only light imports. One
attempt is one `srun`. However it ends, the reason is recorded in RUN/attempts.jsonl before any
action:

    finished, bad input, diverged, cancelled     the end
    time limit, SIGUSR2, asked to stop           the job is requeued
    preempted, requeued, outage                  Slurm requeues it, or an administrator did
    out of time                                  not saved before the limit; requeued
    crash, supervisor killed                     once in place, then requeued
    stalled, node failure                        requeued, without the nodes that are to blame

Slurm requeues by itself when a node goes down. Failures in a row without a newer checkpoint are
bounded by the profile's `retries`. `attempts.py` keeps the record, `outcome.py` says how an attempt
ended, `reasons.py` finds the cause of a crash.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from megarecur.errors import ConfigError
from megarecur.files import replace_file
from megarecur.launch.attempts import (
    OUTSIDE,
    Attempt,
    Outcome,
    Record,
    failing_step,
    launch_of_job,
    newest_step,
    own_job,
    own_output,
)
from megarecur.launch.folder import read_beat
from megarecur.launch.job import JobSpec, read_spec, resubmit
from megarecur.launch.outcome import (
    BAD_INPUT,
    ENDED_VARIABLE,
    LAST_WORDS_SECONDS,
    Listener,
    blame_stall,
    close_lost,
    ended_by,
    explain,
    is_cancelled,
    is_requeued,
    named,
    notices,
)
from megarecur.launch.output import say
from megarecur.launch.reasons import count_oom_kills
from megarecur.launch.slurm import SlurmError, ask, describe_job, expand, step_of
from megarecur.launch.watchdog import Watchdog, ask_for_stacks
from megarecur.lease import Lease
from megarecur.private import make_secret
from megarecur.reading import escape, read_json
from megarecur.train.heartbeat import EVERY_STEP
from megarecur.train.signals import STACKS_VARIABLE

POLL_SECONDS = 0.2
EARLY_SECONDS = 75.0
FINAL = {"finished": 0, "bad input": BAD_INPUT, "diverged": 1, "cancelled": 1}
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
"""Signals forwarded to the run. SIGUSR1 comes from --signal, SIGTERM from Slurm as it ends the
job."""
CONTROLLER_PATIENCE = 4.0
"""Seconds to wait for Slurm while it is about to kill this process."""


def supervise(job_folder: Path) -> int:
    """Run a job until it is done or returned to Slurm. Returns the exit code.

    Args:
        job_folder: RUN/launch/jobs/ID, which no later launch changes.

    Raises:
        ConfigError: the job does not exist or has other nodes, or another job holds its run for too
        long.
    """
    spec = read_spec(job_folder)
    run_dir = spec.run_dir
    record = Record(run_dir)
    told = note_signals()
    with hold(run_dir, spec.profile.start_seconds):
        end_leftovers()
        record.keep_reserve()
        close_lost(record)
        if len(record.failures()) > spec.profile.retries:
            say(f"given up: too many ends without a newer checkpoint, see {record.path}")
            return 1
        nodes = expand(os.environ["SLURM_JOB_NODELIST"])
        if len(nodes) != spec.nodes:
            raise ConfigError(
                f"job {own_job()} has {len(nodes)} nodes, it was submitted for {spec.nodes}; give "
                "it that many, or launch the run again with another --nodes"
            )
        if requeue_without_bad_nodes(spec, record, nodes, told):
            return 0
        while True:
            attempt = record.begin(nodes)
            outcome = run_attempt(spec, record, attempt, told)
            action = choose(outcome, record, spec, attempt, told)
            record.end(attempt, outcome, action)
            if action == "restarted":
                continue
            if action == "requeued":
                undone = requeue(spec, attempt.ends, affordable(spec, record), told)
                if undone:
                    record.revise(attempt, undone)
                return 1 if undone else 0
            return FINAL.get(outcome.reason, 1)


@contextmanager
def hold(run_dir: Path, patience: float) -> Iterator[None]:
    """Hold a run folder exclusively; wait for another job that holds it.

    Raises:
        ConfigError: the other job still holds it after `patience` seconds.
    """
    folder = run_dir / "launch"  # The ranks lock the run folder itself.
    folder.mkdir(parents=True, exist_ok=True)
    lease = Lease(run_dir / "supervisor.lease", folder)
    until, waited = time.monotonic() + patience, False
    try:
        while holder := lease.take(f"job {os.environ['SLURM_JOB_ID']} on {socket.gethostname()}"):
            holder = escape(holder[:1000], keep="")
            if time.monotonic() > until:
                raise ConfigError(
                    f"run_dir={run_dir} is in use by {holder}; end that job, "
                    "or choose another run_dir"
                )
            if not waited:
                say(f"waiting for {holder} to leave {run_dir}", flush=True)
            waited = True
            time.sleep(1.0)
        yield
    finally:
        lease.release()


def note_signals() -> list[int]:
    """Return the list that stop signals are appended to from now on, with those that the script
    received before this process began."""
    early = os.environ.pop("MEGARECUR_EARLY_SIGNALS", "").split()
    told: list[int] = [signal.Signals[f"SIG{name}"] for name in early]
    for number in SIGNALS:
        signal.signal(number, lambda received, frame: told.append(received))
    return told


def run_attempt(spec: JobSpec, record: Record, attempt: Attempt, told: list[int]) -> Outcome:
    """Start the run and wait until it has ended, for any reason."""
    beat_before, oom_kills = read_beat(spec.run_dir), count_oom_kills()
    again = {EVERY_STEP: "1"} if record.failures() else {}
    process = subprocess.Popen(
        spec.srun(attempt.logs, attempt.number),
        env={**os.environ, **rendezvous(attempt), **again},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # The terminal's and Slurm's signals reach it only through this process.
        start_new_session=True,
    )
    said = Listener(process)
    watchdog = Watchdog(spec.profile, lambda: read_beat(spec.run_dir))
    forwarded, noted, failed_at = 0, False, 0.0
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        if any(is_time(number, attempt, spec) for number in told[forwarded:]):
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGUSR1)
            forwarded = len(told)
        if signal.SIGTERM in told and not noted:
            record.told(attempt)
            record.told(attempt, ended_by(told, attempt, CONTROLLER_PATIENCE))
            noted = True
        if said.failed() and not failed_at:
            failed_at = time.monotonic()
        if failed_at and time.monotonic() - failed_at > LAST_WORDS_SECONDS:
            end_step(attempt, process)
        elif 0 < attempt.ends - spec.profile.save_seconds / 4 < time.monotonic():
            end_step(attempt, process)  # before Slurm ends this process too
        elif not failed_at and (stall := watchdog.stalled()):
            if watchdog.over:
                end_step(attempt, process)
                continue
            silent = ask_for_stacks(attempt.job, attempt.logs, spec.world)
            end_step(attempt, process)
            said.join()
            return blame_stall(stall, silent, spec, attempt)
    said.join()
    beat = read_beat(spec.run_dir)
    phase = beat.phase if beat and beat != beat_before else None
    attempt.oom_kills = count_oom_kills() - oom_kills
    return explain(process.returncode, phase, said, told, spec, attempt)


def is_time(number: int, attempt: Attempt, spec: JobSpec) -> bool:
    """Return True if a signal should be forwarded now. Slurm announces the time limit up to a
    minute early; until then the run may continue."""
    early = attempt.ends - time.monotonic() - spec.profile.save_seconds
    return number != signal.SIGUSR1 or not 0.0 < early < EARLY_SECONDS


def rendezvous(attempt: Attempt) -> dict[str, str]:
    """Return the variables by which ranks meet: the first node, at a port that is free now, and
    the secret by which they know each other's messages."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return {
        "MASTER_ADDR": attempt.nodes[0],
        "MASTER_PORT": str(port),
        STACKS_VARIABLE: str(attempt.logs),
        **make_secret(),
    }


def end_step(attempt: Attempt, process: subprocess.Popen[str]) -> None:
    """Kill the remaining ranks, stopped ones too, then srun if it waits for lost nodes."""
    with suppress(SlurmError):
        ask("scancel", "--signal=KILL", step_of(attempt.job))
    try:
        process.wait(LAST_WORDS_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_leftovers() -> None:
    """End the ranks of this job's killed supervisor, which still hold the run folder."""
    if ENDED_VARIABLE not in os.environ:
        return
    job, until = own_job(), time.monotonic() + LAST_WORDS_SECONDS
    with suppress(SlurmError):
        while time.monotonic() < until:
            listed = ask("squeue", "--noheader", "--steps", "--jobs", job, "--format=%i").split()
            steps = [step for step in listed if step.rpartition(".")[2].isdigit()]
            if not steps:
                return
            for step in steps:
                with suppress(SlurmError):  # it may have ended meanwhile
                    ask("scancel", "--signal=KILL", step)
            time.sleep(1.0)


def choose(
    outcome: Outcome, record: Record, spec: JobSpec, attempt: Attempt, told: Sequence[int]
) -> str:
    """Choose the action: `done`, `stopped`, `given up`, `restarted` (in place) or `requeued`.
    Further remarks are added to the outcome's detail."""
    if outcome.reason in FINAL:
        return "done" if outcome.reason == "finished" else "stopped"
    if outcome.reason in OUTSIDE:
        return "requeued"
    fruitless = newest_step(spec.run_dir) <= attempt.began
    before = record.failures() if fruitless else []
    if fruitless and len(before) >= spec.profile.retries:
        outcome.detail += f"; {len(before) + 1} times in a row without a newer checkpoint"
        return "given up"
    if outcome.reason in ("crash", "stalled"):
        failing = failing_step(spec.run_dir, attempt)
        last = next((row for row in record.ends() if row["reason"] not in OUTSIDE), {})
        if failing is not None and last.get("failing") == failing:
            outcome.detail += f"; step {failing + 1} has failed twice"
            if spec.profile.skip_failing_step:
                outcome.detail += f", {skip_step(spec.run_dir, failing)}"
    in_place = outcome.reason == "crash" and not before and not told
    return "restarted" if in_place else "requeued"


def skip_step(run_dir: Path, step: int) -> str:
    """Let the run skip the samples of a step (0: the first); returns what came of it.

    A damaged list stays, for it may name other steps: the run refuses it.
    """
    path = run_dir / "skipped_steps.json"
    try:
        steps = [int(each) for each in read_json(path)] if path.exists() else []
    except (OSError, ValueError, TypeError, OverflowError):
        return f"it cannot be left out: {path} is damaged; correct or delete it"
    replace_file(path, json.dumps(sorted({*steps, step})))
    return "it is left out from now on"


def requeue(spec: JobSpec, ends: float, exclude: Sequence[str], told: Sequence[int]) -> str:
    """Return the job to Slurm, or resubmit it if requeueing is not allowed. Returns why it was not:
    it is cancelled, or Slurm did not answer until shortly before the job's end; otherwise empty.

    Slurm ends this process when it requeues; until then this process can still exclude nodes.
    """
    job, began = own_job(), time.time()
    until = max(ends, time.monotonic() + 60.0) - 2.0
    while True:
        try:
            signals = len(told)
            fields = describe_job(job)
            if is_cancelled(fields) and not 0 < ends < time.monotonic():
                return "cancelled"
            if len(told) > signals:  # It may have been cancelled meanwhile.
                continue
            if not spec.profile.requeue:
                launch = launch_of_job() or job
                forget_job()
                new = resubmit(spec, job, exclude, launch)
                say(f"submitted anew as job {new}", flush=True)
                return ""
            if not is_requeued(fields):  # Slurm requeues by itself when a node fails.
                ask("scontrol", "requeue", job)
            if "" in notices(own_output(), began):
                # The requeue came later, and would restart the job.
                ask("scancel", job)
                return "cancelled"
            break
        except SlurmError as error:
            say(f"not requeued yet: {error}", flush=True)
            if time.monotonic() > until:
                return f"not requeued: {error}"
            time.sleep(5.0)
    everyone = [*named(spec.profile.exclude), *exclude]
    for _ in range(50 if exclude else 0):
        try:
            ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(everyone)}")
            break
        except SlurmError:
            time.sleep(0.2)
    return ""


def forget_job() -> None:
    """Remove this job's variables from the environment, which sbatch passes to the next job."""
    own = ("SLURM_", "SLURMD_", ENDED_VARIABLE)
    for name in [name for name in os.environ if name.startswith(own)]:
        if name != "SLURM_CONF":
            del os.environ[name]


def requeue_without_bad_nodes(
    spec: JobSpec, record: Record, nodes: Sequence[str], told: Sequence[int]
) -> bool:
    """Requeue at once if Slurm gave the job a blamed node again: Slurm requeues by itself when a
    node fails. This is done once; if it has no effect, it is not repeated."""
    exclude = affordable(spec, record)
    rows = record.rows()
    if not set(exclude) & set(nodes) or not spec.profile.requeue or rows[-1]["event"] == "moved":
        return False
    record.append({"event": "moved", "time": time.time(), "exclude": exclude})
    say(f"requeued at once, to exclude {', '.join(exclude)}", flush=True)
    if undone := requeue(spec, 0.0, exclude, told):
        say(undone, flush=True)
    return undone in ("", "cancelled")


def affordable(spec: JobSpec, record: Record) -> list[str]:
    """Return the blamed nodes that can be excluded: the newest first, while enough nodes are
    left."""
    blamed = record.blamed()
    if not blamed:
        return []
    partition = os.environ.get("SLURM_JOB_PARTITION", "")
    states = "--states=idle,mixed,allocated,completing"
    try:
        listed = ask("sinfo", "-h", "--Node", f"--partition={partition}", states, "--format=%N")
    except SlurmError:
        return []
    profile = spec.profile
    there = set(listed.split()) - named(profile.exclude)
    spare = len(there) - spec.nodes
    if profile.constraint or profile.gpu_type or profile.options:  # Not all of them are suitable.
        spare = min(spare, max(1, spec.nodes // 4))
    return blamed[: max(spare, 0)]
