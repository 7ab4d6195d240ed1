"""Watching runs: their state from folder and queue, the output of their ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from support.commands import megarecur

from megarecur.launch import status
from megarecur.launch.slurm import describe_job
from megarecur.parallel.mesh import Mesh
from megarecur.progress import WAITING
from megarecur.train.heartbeat import Heartbeat
from megarecur.train.waiting import RankReport

ROW = {
    "step": 40,
    "tokens": 10240,
    "train/loss": 2.5,
    "speed/tokens_per_second": 12345.6,
    "speed/mfu": 0.415,
    "speed/step_seconds": 3.0,
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`slurm(squeue, scontrol)`: what these commands print; None: they refuse. Without a call, they
    are not there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/nowhere")

    def install(squeue: str | None = "", scontrol: str | None = None) -> None:
        for name, text in (("squeue", squeue), ("scontrol", scontrol)):
            answer = "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1"
            if text is not None:
                (folder / f"{name}.txt").write_text(text)
                answer = f"/bin/cat {folder}/{name}.txt"
            (folder / name).write_text(f"#!/bin/sh\n{answer}\n")
            (folder / name).chmod(0o755)

    return install


def squeue_line(run: Path, job: str = "17", state: str = "RUNNING", **more: str) -> str:
    """As squeue --Format prints it, for a run that `megarecur launch` submitted."""
    fields = {"label": job, "left": "1:30:00", "start": "N/A", "nodes": "vn[1-2]",
              "reason": "None", "comment": "(null)",
              "output": f"{run}/logs/slurm-%j.log"} | more  # fmt: skip
    words = [job, fields.pop("label"), state, *fields.values()]
    return "|".join(words) + "|\n"


def start(number: int, ago: float = 600.0, job: str = "17", **more: Any) -> dict[str, Any]:
    row = {"event": "start", "attempt": number, "job": job, "time": -ago, "step": 20}
    return row | {"nodes": ["vn1", "vn2"], "logs": f"logs/attempt-{number:03}"} | more


def end(number: int, reason: str, action: str, ago: float = 300.0, **more: Any) -> dict[str, Any]:
    return {"event": "end", "attempt": number, "time": -ago, "step": 40, "reason": reason,
            "detail": "", "action": action} | more  # fmt: skip


def make_run(run: Path, *attempts: dict[str, Any], beat: tuple[float, str] | None = None) -> Path:
    """A folder at step 40 of 160. Times of attempts count from now; `beat`: seconds ago, phase."""
    (run / "checkpoints" / "step-00000040").mkdir(parents=True)
    (run / "checkpoints" / "step-00000020").mkdir()
    (run / "checkpoints" / "step-00000060.tmp").mkdir()
    (run / "logs").mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"train": {"steps": 160}}))
    rows = [ROW | {"step": 39}, ROW, {"step": 40, "tokens": 10240, "val/loss": 2.75}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(text + '{"step": 41, "train/l')  # Killed while writing.
    now = time.time()
    os.utime(run / "metrics.jsonl", (now - 5000, now - 5000))
    if attempts:
        lines = [json.dumps(row | {"time": now + row["time"]}) for row in attempts]
        (run / "attempts.jsonl").write_text("\n".join(lines) + '\n{"event": "st')
    if beat:
        told = {"time": now - beat[0], "step": 47, "phase": beat[1]}
        (run / "heartbeat.json").write_text(json.dumps(told))
    return run


# ---------------------------------------------------------------------------------------- status


def tell(capsys: pytest.CaptureFixture[str], what: Path | str) -> dict[str, str]:
    """What `megarecur status` says, by name."""
    code, out, err = megarecur(capsys, "status", what)
    assert code == 0, err
    return dict(line.split(": ", 1) for line in out.splitlines())


def test_a_run_at_work(tmp_path, slurm, capsys) -> None:
    attempts = [start(1, 6000), end(1, "time limit", "requeued", 5000, step=20), start(2, 4000),
                end(2, "crash", "restarted", 3000, detail="vn1, rank 2: exit code 1"),
                start(3, 700)]  # fmt: skip
    run = make_run(tmp_path / "my run", *attempts, beat=(2.0, "train"))
    slurm(squeue_line(tmp_path / "other", "99") + squeue_line(run))
    said = tell(capsys, run)
    limit = "job 17 on vn[1-2], 1h30m to its time limit"
    assert said["state"].startswith(f"running: training; {limit}; last sign of life ")
    assert said["step"] == "47 of 160" and said["loss"] == "2.5000  (validation 2.7500)"
    assert said["tokens/s"] == "12,346" and said["MFU"] == "41.5%"
    assert said["time left"].startswith("5m39s of training; its time limit is in 1h30m, enough")
    assert said["checkpoint"].startswith("step 40, ")
    assert said["restarts"] == "2 (time limit, crash)"
    assert "vn1 vn2, checkpoints 20-40: crash: vn1, rank 2: exit code 1; res" in said["attempt 2"]
    assert said["attempt 3"].endswith("checkpoints 20-: running") and "note" not in said


@pytest.mark.parametrize("phase", ["evaluate", "save", "start"])
def test_ranks_that_wait_in_a_long_phase_are_named(tmp_path, slurm, capsys, phase) -> None:
    """In evaluation, saving, and the health check of a start."""
    run = make_run(tmp_path / "run", start(1, 700), beat=(2.0, phase))
    slurm(squeue_line(run))
    for rank in range(4):
        beat = Heartbeat(run, speaks=False)
        beat.enter(phase, 47)
        beat.advance(phase, "part 3 of 9" if rank == 2 else WAITING)
        RankReport(beat, run, Mesh(4, rank=rank)).look(beat.since + 60)
    note = tell(capsys, run)["note"]
    assert note.startswith("over 60 s in this phase: rank 2 on ") and "(part 3 of 9)" in note
    assert note.endswith("; ranks 0-1, 3 wait")


STATES: dict[str, tuple[str | None, list[Any], tuple[float, str] | None, str, str]] = {
    # name: (state in the queue, attempts, heartbeat, state, part of why)
    "never started": ("PENDING", [], None, "pending", "Resources (waits for nodes to become free)"),
    "requeued": (
        "PENDING", [start(1), end(1, "preempted", "requeued")], (310, "save"), "pending",
        "before: preempted",
    ),
    "configuring": ("CONFIGURING", [start(1)], None, "pending", "prepared"),
    "starting": (
        "RUNNING", [start(1), end(1, "crash", "restarted"), start(2, 30)], (400, "train"),
        "running", "starting; job 17 on vn[1-2], 1h30m",
    ),
    "silent": ("RUNNING", [start(1)], (200, "train"), "stalled?", "last sign of life 3m"),
    "slow to save": ("RUNNING", [start(1)], (200, "save"), "running", "saving a checkpoint"),
    "never spoke": ("RUNNING", [start(1, 1300)], None, "stalled?", "starting"),
    "between": (
        "RUNNING", [start(1), end(1, "crash", "restarted", 1)], (5, "train"), "running",
        "between two attempts, after: crash",
    ),
    "suspended": ("SUSPENDED", [start(1)], (200, "train"), "pending", "suspended"),
    "being requeued": (
        "COMPLETING", [start(1), end(1, "stalled", "requeued", 1)], (200, "train"), "pending",
        "being requeued after: stalled",
    ),
    "finished": (None, [start(1), end(1, "finished", "done")], (310, "done"), "ended", "finished"),
    "gave up": (
        None, [start(1), end(1, "crash", "given up", detail="exit code 1")], (310, "train"),
        "ended", "crash: exit code 1; given up",
    ),
    "lost": (None, [start(1)], (200, "train"), "ended", "job 17 is no longer in the queue"),
    "failed": ("NODE_FAIL", [start(1)], (200, "train"), "ended", "job 17 is NODE_FAIL"),
    "cancelled while it waited": (
        "CANCELLED", [start(1), end(1, "time limit", "requeued")], (310, "stopped"), "ended",
        "it was requeued, but job 17 is CANCELLED in Slurm's words: submit it again",
    ),
    "gone on without Slurm": (
        None, [start(1), end(1, "finished", "done")], (10, "done"), "ended", "finished",
    ),
}  # fmt: skip


def test_a_run_that_has_not_started(tmp_path, slurm, capsys) -> None:
    run = tmp_path / "run"
    (run / "launch").mkdir(parents=True)
    (run / "launch" / "config.yaml").write_text("{}")
    slurm("")
    assert tell(capsys, run)["state"] == "not started: its first attempt has not begun"


def test_what_became_of_a_job_is_not_known_while_the_controller_is_away(
    tmp_path, slurm, capsys
) -> None:
    run = make_run(tmp_path / "run", start(1), end(1, "crash", "requeued", detail="odd"))
    slurm(None)
    said = tell(capsys, run)
    assert said["state"].startswith("unknown: requeued after: crash: odd; whether its job waits")
    assert "only the folder was read" in said["note"]


def test_what_was_not_done_after_all_is_told(tmp_path, slurm, capsys) -> None:
    """A finished attempt says so once; one whose requeue failed does not wait."""
    revised = {
        "event": "revised",
        "attempt": 2,
        "time": -100.0,
        "action": "not requeued: no answer",
    }
    attempts = [
        start(1),
        end(1, "finished", "done"),
        start(2),
        end(2, "crash", "requeued"),
        revised,
    ]
    run = make_run(tmp_path / "run", *attempts)
    slurm("")
    said = tell(capsys, run)
    assert said["state"] == "ended: crash; not requeued: no answer"
    assert said["attempt 1"].endswith(": finished")
    assert said["attempt 2"].endswith(": crash; not requeued: no answer")


@pytest.mark.parametrize("case", STATES)
def test_states(tmp_path, slurm, capsys, case: str) -> None:
    queued, attempts, beat, state, why = STATES[case]
    run = make_run(tmp_path / "run", *attempts, beat=beat)
    slurm(squeue_line(run, "17", queued, reason="Resources") if queued else "")
    said = tell(capsys, run)["state"]
    assert said.startswith(f"{state}: ") and why in said


def test_the_profile_of_a_job_says_what_silence_is_too_long(tmp_path, slurm, capsys) -> None:
    run = make_run(tmp_path / "run", start(1), beat=(200.0, "train"))
    slurm(squeue_line(run))
    (run / "launch").mkdir()
    (run / "launch" / "job.json").write_text(json.dumps({"profile": {"stall_seconds": 300}}))
    assert tell(capsys, run)["state"].startswith("running: ")


def test_reasons_of_waiting_are_explained(tmp_path, slurm, capsys) -> None:
    run = make_run(tmp_path / "run")
    at = "2026-11-21T14:05:43"
    for reason, told in {
        "Priority": "other jobs go first",
        "QOSMaxNodePerUserLimit": "a limit of the QOS is reached",
        "ReqNodeNotAvail, UnavailableNodes:vn2": "a node it needs is down or reserved",
        "DependencyNeverSatisfied": "cancel it",
        "BrandNew": f"BrandNew, expected to start {at}",
    }.items():
        slurm(squeue_line(run, "17", "PENDING", reason=reason, start=at, nodes="", left="1:00"))
        said = tell(capsys, run)["state"]
        assert said.startswith(f"pending: {reason}") and told in said and said.endswith(at)


def test_the_folder_is_enough(tmp_path, slurm, capsys) -> None:
    run = make_run(tmp_path / "run", start(1), beat=(5.0, "train"))
    said = tell(capsys, run)
    assert said["state"].startswith("running: training; job 17, if its last word still holds")
    assert said["note"].startswith("only the folder was read: squeue: not found on PATH")
    slurm(None)
    assert "only the folder was read: squeue --noheader" in tell(capsys, run)["note"]


def test_a_run_that_was_never_under_slurm(tmp_path, slurm, capsys) -> None:
    run = make_run(tmp_path / "run")
    assert tell(capsys, run)["state"].startswith("ended: without a last word")
    assert "attempt 1" not in tell(capsys, run) and tell(capsys, run)["restarts"] == "0"
    (run / "config.yaml").write_text("train: {steps: 40}")
    assert tell(capsys, run)["state"] == "ended: finished"
    (run / "config.yaml").write_text("train: {steps: 160}")
    lease = (run / "lease").open("w+")
    lease.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    lease.flush()
    assert tell(capsys, run)["state"].startswith(f"running: starting; process {os.getpid()} of")
    lease.close()  # The process lives on, but it is not that of the run.
    assert tell(capsys, run)["state"].startswith("ended: without a last word")
    (run / "lease").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    assert "process 1 of elsewhere, unseen from here" in tell(capsys, run)["state"]
    (run / "metrics.jsonl").unlink()
    assert tell(capsys, run)["step"] == "40 of 160"


def test_a_run_that_only_waits_in_the_queue(tmp_path, slurm, capsys) -> None:
    run = tmp_path / "run"
    (run / "launch").mkdir(parents=True)
    (run / "launch" / "config.yaml").write_text("train: {steps: 160}")
    slurm(squeue_line(run, "17", "PENDING", reason="Priority"))
    said = tell(capsys, run)
    assert said["state"].startswith("pending: Priority") and said["step"] == "? of 160"
    assert said["checkpoint"] == "none yet"


SCONTROL = "JobId={} JobName=a b NodeList=vn1 Comment={} StdIn=/dev/null StdOut={} Power=\n"


def test_a_job_leads_to_its_run(tmp_path, slurm, capsys) -> None:
    run = make_run(tmp_path / "my run", start(1), beat=(5.0, "train"))
    slurm(squeue_line(run), SCONTROL.format(17, "(null)", run / "logs" / "slurm-17.log"))
    assert tell(capsys, "17")["run"] == str(run)
    slurm(squeue_line(run), SCONTROL.format(17, run, "/dev/null"))
    assert tell(capsys, "17")["run"] == str(run)


def test_the_jobs_of_an_array_are_told_apart(tmp_path, slurm, capsys) -> None:
    base, lines, shown = tmp_path / "sweep", "", ""
    for task, job in enumerate(("18", "17")):  # Slurm gives the array's own id to its last task.
        run = make_run(base / f"lr={task}", start(1, job=job), beat=(5.0, "train"))
        (run / "launch").mkdir()
        output = str(base / "logs" / "slurm-%A_%a.log")
        lines += squeue_line(run, job, label=f"17_{task}", output=output)
        shown += SCONTROL.format(job, "(null)", base / "logs" / f"slurm-17_{task}.log")
    waiting = {"state": "PENDING", "label": "17_[2-3]", "reason": "JobArrayTaskLimit"}
    slurm(lines + squeue_line(base, "19", output=output, **waiting), shown)
    for arguments in ([], ["17"]):
        code, out, err = megarecur(capsys, "status", *arguments)
        assert code == 0, err
        rows = out.splitlines()
        found = {row.split("  ")[0]: row for row in rows}
        assert f"{base}/lr=1  running  step 47 of 160" in found["job 17_1"]
        assert f"{base}/lr=0  running" in found["job 17_0"]
    code, out, err = megarecur(capsys, "status")
    assert f"job 17_[2-3]  {base}  pending" in out
    assert describe_job("17")["StdOut"].endswith("slurm-17_1.log")


def test_the_folder_of_a_sweep_shows_its_points(tmp_path, slurm, capsys) -> None:
    base, lines = tmp_path / "sweep", ""
    output = str(base / "logs" / "slurm-%A_%a.log")
    ends = [end(1, "finished", "done"), end(1, "crash", "given up"), None, None]
    for task, ended in enumerate(ends):
        run = base / f"lr={task}"
        (run / "launch").mkdir(parents=True)
        (run / "launch" / "config.yaml").write_text("train: {steps: 160}")
        (run / "launch" / "submitted.jsonl").write_text(json.dumps({"job": f"17_{task}"}) + "\n")
        if ended:
            make_run(run, start(1, job=str(18 + task)), ended)
            continue
        state = {"state": "PENDING", "reason": "Priority"} if task == 2 else {}
        lines += squeue_line(base, "17", label=f"17_{task}", output=output, **state)
    slurm(lines)
    code, _, err = megarecur(capsys, "status", base)
    assert code == 2 and "it holds the runs" in err
    (base / "launch").mkdir()
    (base / "launch" / "sweep.json").write_text("{}")
    code, out, err = megarecur(capsys, "status", base)
    assert code == 0, err
    rows = [row.split("  ")[:3] for row in out.splitlines()]
    assert [row[2] for row in rows] == ["ended", "ended", "pending", "running"]
    assert [row[0] for row in rows] == ["job -", "job -", "job 17_2", "job 17_3"]
    slurm(None)
    assert "note: only the folder was read" in megarecur(capsys, "status", base)[1]


def test_all_runs_in_the_queue(tmp_path, slurm, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = make_run(tmp_path / "a", start(1), beat=(5.0, "train"))
    second = make_run(tmp_path / "b")
    (second / "config.yaml").write_text("train: [")  # One that cannot be told hides no other.
    slurm(squeue_line(first) + squeue_line(second, "18") + squeue_line(tmp_path / "c", "19")
          + squeue_line(first, "20", "PENDING", reason="Dependency"))  # fmt: skip
    code, out, err = megarecur(capsys, "status")
    assert code == 0, err
    rows = out.splitlines()
    assert [row.split("  ")[:3] for row in rows] == [
        ["job 17", "a", "running"], ["job 18", "b", "unknown"], ["job 20", "a", "pending"],
    ]  # fmt: skip
    assert "not valid YAML" in rows[1] and "waits for another job" in rows[2]
    slurm("")
    assert "no job of a run of megarecur" in megarecur(capsys, "status")[1]


def test_a_terminal_gets_tables(tmp_path, slurm, capsys, monkeypatch) -> None:
    run = make_run(tmp_path / "run", start(1), beat=(5.0, "train"))
    slurm(squeue_line(run))
    monkeypatch.setattr(status, "make_console", lambda: Console(force_terminal=True, width=160))
    for arguments in ([str(run)], []):
        code, out, err = megarecur(capsys, "status", *arguments)
        assert code == 0 and "\x1b[32mrunning" in out and "47 of 160" in out, err
        plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
        assert max(map(len, plain.splitlines())) <= 160, "wrapped by the terminal"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["status", "{tmp}/absent"], "absent: no such folder; name the run_dir of a run"),
        (["status", "{tmp}"], "is not the folder of a run, it holds the runs run"),
        (["status", "{tmp}/run/config.yaml"], "is a file"),
        (["status", "{tmp}/run/logs"], "it has no config.yaml"),
        (["status", "4711"], "job 4711: scontrol --oneliner show job 4711: slurm_load_jobs error"),
        (["logs", "{tmp}/absent"], "no such folder"),
        (["logs", "{tmp}/run"], "its output went to the terminal or file of the command"),
        (["logs", "{tmp}/run", "--follow"], "its output went to the terminal"),
    ],
)
def test_bad_input_is_one_error(tmp_path, slurm, capsys, arguments, part) -> None:
    make_run(tmp_path / "run")
    slurm("")
    code, out, err = megarecur(capsys, *(word.format(tmp=tmp_path) for word in arguments))
    assert code == 2 and out == "" and part in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_job_of_something_else_and_no_slurm(tmp_path, slurm, capsys) -> None:
    code, _, err = megarecur(capsys, "status", "17")
    assert code == 2 and "scontrol: not found on PATH" in err and "give the run's folder" in err
    code, _, err = megarecur(capsys, "status")
    assert code == 2 and "squeue: not found on PATH" in err
    slurm("", SCONTROL.format(17, "(null)", "/home/me/slurm-17.out"))
    code, _, err = megarecur(capsys, "status", "17")
    assert code == 2 and "job 17 (a b): belongs to no run of megarecur" in err


def test_status_imports_no_torch(tmp_path) -> None:
    run = make_run(tmp_path / "run", start(1), beat=(5.0, "train"))
    code = (
        "import sys; sys.argv = ['megarecur', 'status', sys.argv[1]]\n"
        "from megarecur.launch.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("[]\n"), done.stdout + done.stderr


# ------------------------------------------------------------------------------------------ logs


def write_logs(run: Path, attempt: int, **ranks: str) -> Path:
    """Output by rank, as `r0="...", r1="..."`."""
    folder = run / "logs" / f"attempt-{attempt:03}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in ranks.items():
        with (folder / f"rank-{int(name[1:]):04}.log").open("a", newline="") as file:
            file.write(text)
    return folder


def note_event(run: Path, event: dict[str, Any]) -> None:
    with (run / "attempts.jsonl").open("a") as file:
        file.write("\n" + json.dumps(event | {"time": time.time()}) + "\n")


def test_ranks_are_merged_rank_by_rank(tmp_path, capsys) -> None:
    run = make_run(tmp_path / "run", start(1))
    write_logs(run, 1, r0="old\n")
    write_logs(run, 2, r2="a\nb\n", r10="c\r\n1%\r2%\n", r0="d\n\nhalf a li")
    (run / "logs" / "attempt-002" / "stacks-0.txt").write_text("no rank's output")
    code, out, _ = megarecur(capsys, "logs", run)
    assert (code, out) == (0, "[0] d\n[0] \n[2] a\n[2] b\n[10] c\n[10] 2%\n")
    assert megarecur(capsys, "logs", run, "--attempt", "1")[1] == "[0] old\n"
    assert megarecur(capsys, "logs", run, "--rank", "2")[1] == "[2] a\n[2] b\n"
    note_event(run, start(2))
    note_event(run, end(2, "crash", "given up"))
    assert "[0] half a li\n" in megarecur(capsys, "logs", run)[1], "nothing more will come of it"
    for option, part in {
        "--attempt": "no attempt 3; there are 1, 2",
        "--rank": "ranks 0 to 10",
    }.items():
        code, out, err = megarecur(capsys, "logs", run, option, "3")
        assert code == 2 and part in err


class Follower:
    """`megarecur logs --follow` as a process of its own, and what it printed so far."""

    def __init__(self, *words: object) -> None:
        command = [
            sys.executable,
            "-u",
            "-m",
            "megarecur.launch.cli",
            "logs",
            *map(str, words),
            "--follow",
        ]
        # A shell that started the tests in its background lets all ignore Ctrl-C.
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.text = ""

    def until(self, text: str) -> None:
        """Wait for it."""
        until = time.monotonic() + 200
        while text not in self.text:
            assert time.monotonic() < until and self.process.poll() is None, self.text
            time.sleep(0.02)
            self.text += (self.process.stdout.read() or b"").decode()

    def end(self) -> tuple[int, str, str]:
        """(exit code, stdout, stderr) once it has ended by itself."""
        code = self.process.wait(60)
        self.text += (self.process.stdout.read() or b"").decode()
        return code, self.text, self.process.stderr.read().decode()


@pytest.fixture
def follow() -> Iterator[Callable[..., Follower]]:
    followers: list[Follower] = []

    def begin(*words: object) -> Follower:
        followers.append(Follower(*words))
        return followers[-1]

    yield begin
    for each in followers:
        each.process.kill()
        each.process.wait()


def test_a_run_is_followed_over_attempts_to_its_end(tmp_path, follow) -> None:
    run = make_run(tmp_path / "run", beat=(5.0, "done"))  # Of an earlier, shorter run.
    note_event(run, start(1))
    write_logs(run, 1, r0="one\n", r1="hal")
    follower = follow(run)
    follower.until("[0] one\n")
    write_logs(run, 1, r1="f\n", r3="three\n")
    follower.until("[1] half\n[3] three\n")
    write_logs(run, 1, r0="last wor")
    note_event(run, end(1, "crash", "restarted"))
    follower.until("[0] last wor\n")
    note_event(run, start(2))
    write_logs(run, 2, r0="two\n")
    follower.until("[0] two\n")
    beat = {"time": time.time(), "step": 160, "phase": "done"}
    (run / "heartbeat.json").write_text(json.dumps(beat))
    write_logs(run, 2, r0="done: 160 steps\n")  # Said after the heartbeat.
    code, out, err = follower.end()
    assert code == 0
    assert out == "[0] one\n[1] half\n[3] three\n[0] last wor\n[0] two\n[0] done: 160 steps\n"
    assert "--- attempt 1 ended: crash; restarted\n--- attempt 2\n" in err


def test_following_ends_where_nothing_more_can_come(tmp_path, capsys) -> None:
    run = make_run(tmp_path / "run", start(1), end(1, "crash", "given up"))
    write_logs(run, 1, r0="one\n")
    code, out, err = megarecur(capsys, "logs", run, "--follow")
    assert (code, out) == (0, "[0] one\n") and "crash; given up" in err


def test_ctrl_c_ends_following_quietly(tmp_path, follow) -> None:
    run = make_run(tmp_path / "run", start(1))
    write_logs(run, 1, r0="one\n")
    follower = follow(run)
    follower.until("[0] one\n")
    follower.process.send_signal(signal.SIGINT)
    code, _, err = follower.end()
    assert code == 0 and err == "--- attempt 1\n"


def test_a_reader_that_goes_away_is_no_error(tmp_path) -> None:
    run = make_run(tmp_path / "run", start(1))
    write_logs(run, 1, r0="one\n" * 100_000)
    command = (
        f"{sys.executable} -m megarecur.launch.cli logs {run} | head -n 1; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=600)
    assert (done.stdout, done.stderr) == ("[0] one\n0\n", "")


def test_logs_before_the_first_attempt(tmp_path, capsys) -> None:
    run = make_run(tmp_path / "run")
    (run / "launch").mkdir()
    assert "its job has not begun" in megarecur(capsys, "logs", run)[2]
    (run / "logs" / "slurm-17.log").write_text("module: no such module")
    assert "slurm-17.log" in megarecur(capsys, "logs", run)[2]
    (run / "logs" / "attempt-001").mkdir()
    code, out, err = megarecur(capsys, "logs", run)
    assert (code, out) == (0, "") and "written nothing yet" in err
