"""Jobs of Slurm without Slurm: profiles, scripts, submission, what a supervisor concludes."""

import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import yaml

from configs import make_config
from launch.folder import Beat
from launch.job import Order, expand_sweep, read_order, script_of
from launch.profile import Profile, load_profile, seconds_of
from launch.script import Job, render
from launch.slurm import SlurmError
from launch.supervise import (
    Attempt,
    Listener,
    Outcome,
    Record,
    affordable,
    choose,
    explain,
    hold,
    leave_blamed,
    numbers,
    own_job,
    requeue,
    step_of,
)
from launch.watchdog import Watchdog, without_stacks
from megarecur.config.load import to_yaml
from megarecur.errors import ConfigError, MegarecurError

JOB = Job("tiny", 2, 4, Path("/runs/tiny/logs/slurm-%j.log"), Path("/work"), Path("/runs/code"))


def test_a_script_is_a_pure_function_of_job_and_profile() -> None:
    profile = Profile(
        partition="gpu",
        account="lab",
        time="1-00:00:00",
        gpu_type="h100",
        cpus_per_task=8,
        exclude=("bad1",),
        options=("--switches=1",),
        modules=("cuda/12",),
        setup=("ulimit -n 4096",),
        environment={"WORD": "two words", "N": 1},
        nccl={"IB_HCA": "mlx5"},
        interface="ib0",
        requeue=False,
    )
    job = Job(**{**vars(JOB), "gpus_per_node": 4, "exclude": ("bad2",), "dependency": "afterany:1"})
    assert render(job, profile, ["python", "supervise", "a b", "$RUN"]).splitlines() == [
        "#!/bin/bash",
        "#SBATCH --job-name=tiny",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gpus-per-node=h100:4",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --time=1-00:00:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=lab",
        "#SBATCH --exclude=bad1,bad2",
        "#SBATCH --dependency=afterany:1",
        "#SBATCH --kill-on-invalid-dep=yes",
        "#SBATCH --signal=B:USR1@180",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=/runs/tiny/logs/slurm-%j.log",
        "#SBATCH --no-requeue",
        "#SBATCH --switches=1",
        "",
        "set -e",
        "module load cuda/12",
        "ulimit -n 4096",
        "export NCCL_IB_HCA=mlx5",
        "export NCCL_SOCKET_IFNAME=ib0",
        "export GLOO_SOCKET_IFNAME=ib0",
        "export WORD='two words'",
        "export N=1",
        "export PYTHONPATH=/runs/code${PYTHONPATH:+:$PYTHONPATH}",
        "cd /work",
        "exec python supervise 'a b' \"$RUN\"",
    ]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:01", 7201), ("1-2", 93_600), ("1-02:03:04", 93_784)],
)
def test_time_limits(text, seconds) -> None:
    assert seconds_of(text) == seconds


def test_sweeps_are_all_combinations() -> None:
    points = expand_sweep(["optimizer.lr=1e-3,3e-4", "model.tied=true,[1,2]"])
    assert points[1] == ["optimizer.lr=1e-3", "model.tied=[1, 2]"] and len(points) == 4
    assert expand_sweep([]) == [[]]
    with pytest.raises(ConfigError, match="--sweep lr: must be"):
        expand_sweep(["lr"])


# -------------------------------------------------------------------------------- the command line


FAKE_SBATCH = """#!/bin/sh
for last; do :; done
if [ "$1" = --test-only ]; then cat > /dev/null; echo "sbatch: Job 7 to start now" >&2; exit 0; fi
cp "$last" "$(dirname "$0")/submitted.sh"; echo "Submitted batch job 17"
"""


@pytest.fixture
def desk(tmp_path, corpus) -> Any:
    """A config, a profile, an sbatch that keeps what it is given, and how to call the command."""
    (tmp_path / "bin").mkdir()
    for program, text in (("sbatch", FAKE_SBATCH), ("srun", "#!/bin/sh\nexit 1\n")):
        (tmp_path / "bin" / program).write_text(text)
        (tmp_path / "bin" / program).chmod(0o755)
    (tmp_path / "profile.yaml").write_text("partition: main\ntime: '60'\n")
    data = {"train": [{"path": str(corpus / "train")}], "tokenizer": "bytes", "seq_length": 32}
    train = {"steps": 4, "global_batch_size": 8, "micro_batch_size": 1}
    config = make_config(run_dir=str(tmp_path / "run"), data=data, train=train)
    (tmp_path / "config.yaml").write_text(to_yaml(config))

    def launch(*options: str, path: str = f"{tmp_path / 'bin'}:{os.environ['PATH']}") -> Any:
        words = [sys.executable, "-m", "launch.cli", "launch", str(tmp_path / "config.yaml")]
        environ = {**os.environ, "PATH": path}
        return subprocess.run([*words, *options], capture_output=True, text=True, env=environ)

    return SimpleNamespace(folder=tmp_path, launch=launch)


def on(desk: Any, *options: str, **more: Any) -> Any:
    profile = f"--cluster={desk.folder / 'profile.yaml'}"
    return desk.launch("--nodes=2", "--processes-per-node=2", profile, *options, **more)


def test_what_a_dry_run_prints_is_what_is_submitted(desk) -> None:
    before = sorted(desk.folder.rglob("*"))
    printed = on(desk, "--dry-run")
    asked = on(desk, "--dry-run=check")
    assert asked.stdout == printed.stdout + "sbatch: Job 7 to start now\n"
    assert sorted(desk.folder.rglob("*")) == before, "a dry run writes nothing"
    done = on(desk)
    assert done.returncode == 0 and "job 17" in done.stdout, done.stderr
    assert (desk.folder / "bin/submitted.sh").read_text() == printed.stdout
    order = read_order(desk.folder / "run")
    assert (order.world, order.tasks, order.profile.partition) == (4, 4, "main")
    assert script_of(order) == printed.stdout
    # The job imports the snapshot, whatever becomes of the code that submitted it.
    snapshot = subprocess.run(
        [*order.python()[:-1], "launch.supervise"],
        env={**os.environ, "PYTHONPATH": str(order.code)},
        cwd=order.workdir,
    )
    assert snapshot.returncode == 0
    assert (order.code / "megarecur/train/trainer.py").exists()
    assert not list(order.code.rglob("*.tmp"))


def test_a_sweep_is_one_array(desk) -> None:
    done = on(desk, "--sweep", "optimizer.lr=1e-3,3e-4", "--at-once", "1")
    assert done.returncode == 0, done.stderr
    script = (desk.folder / "bin/submitted.sh").read_text()
    assert "#SBATCH --array=0-1%1" in script and 'supervise "$RUN"' in script
    for lr in ("1e-3", "3e-4"):
        order = read_order(desk.folder / "run" / f"optimizer.lr={lr}")
        values = yaml.safe_load(order.config.read_text())
        assert values["optimizer"]["lr"] == float(lr) and values["run_dir"] == str(order.run_dir)


@pytest.mark.parametrize(
    ("options", "profile", "message"),
    [
        ((), "partitoin: main", "partitoin: unknown key; did you mean 'partition'?"),
        ((), "time: soon", "'soon' is no time limit"),
        (("--time=21",), "", "is shorter than starting and saving once"),
        (("--processes-per-node=3",), "", "global_batch_size=8 does not divide into 6 replicas"),
        (("parallel.tensor=4", "--nodes=3"), "", "6 processes do not divide into replicas"),
        (("--cluster=nowhere",), "", "--cluster nowhere: is no profile of configs/cluster"),
        (("--dry-run=maybe",), "", "must be --dry-run or --dry-run=check"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(desk, options, profile, message) -> None:
    (desk.folder / "profile.yaml").write_text(profile or "time: '60'\n")
    done = on(desk, *options)
    assert done.returncode == 2 and message in " ".join(done.stderr.split()), done.stderr
    assert "Traceback" not in done.stderr and not (desk.folder / "run").exists()


def test_no_sbatch_and_an_sbatch_that_refuses(desk) -> None:
    done = on(desk, path="/usr/bin:/bin" if not Path("/usr/bin/sbatch").exists() else "/nowhere")
    assert done.returncode == 2 and "sbatch: not found on PATH" in done.stderr
    refusal = "sbatch: error: invalid partition specified: main"
    (desk.folder / "bin/sbatch").write_text(f"#!/bin/sh\necho '{refusal}' >&2\nexit 1\n")
    for options in ((), ("--dry-run=check",)):
        done = on(desk, *options)
        assert done.returncode == 2 and "invalid partition specified: main" in done.stderr
        assert "Traceback" not in done.stderr


def test_nodes_or_processes(desk) -> None:
    for options in ((), ("--nodes=2", "--nproc=2")):
        done = desk.launch(*options)
        assert done.returncode == 2 and "give --nproc for this machine, or --nodes" in done.stderr


# --------------------------------------------------------------------------------- conclusions


def make_order(run_dir: Path, **profile: Any) -> Order:
    code = run_dir / "code"
    return Order(run_dir, run_dir / "c.yaml", run_dir, code, 2, 2, 0, Profile(**profile))


def listener(*lines: str) -> Listener:
    process = SimpleNamespace(stderr=[line + "\n" for line in lines])
    found = Listener(process)
    found.thread.join()
    return found


def concluded(
    tmp_path: Path, *lines: str, phase: str | None = "train", told=(), code=1, **fields: str
) -> Outcome:
    attempt = Attempt(1, "17", ["a", "b"], tmp_path, 0)
    with (
        mock.patch("launch.supervise.describe_job", lambda job: fields),
        mock.patch("launch.supervise.expand", lambda nodes: [nodes]),
    ):
        said = listener(*lines)
        return explain(code, phase, said, list(told), make_order(tmp_path), attempt)


def test_why_an_attempt_ended(tmp_path) -> None:
    """The lines are srun's own."""
    crash = concluded(
        tmp_path,
        "srun: error: b: task 2: Killed",
        "srun: launch/slurm: _step_signal: Terminating StepId=17.0",
        "srun: error: a: tasks 0-1: Exited with exit code 1",
        "srun: error: b: task 3: Exited with exit code 1",
    )
    assert crash == Outcome("crash", "rank 2 on b: Killed", ["b"])
    lost = concluded(tmp_path, "srun: error: a: tasks 0-1: Exited with exit code 1")
    assert lost.reason == "node failure" and lost.nodes == ["b"]
    gone = concluded(tmp_path, "srun: error: Node failure on b")
    assert gone == Outcome("node failure", "Slurm lost b", ["b"])
    (tmp_path / "rank-0000.log").write_text("step 1\nerror: no such corpus\n")
    wrong = concluded(tmp_path, "srun: error: a: tasks 0-3: Exited with exit code 2", phase=None)
    assert wrong == Outcome("bad input", "error: no such corpus")
    for faults, reason, nodes in (({"b": ["disk"]}, "node failure", ["b"]),
                                  ({"a": ["disk"], "b": ["disk"]}, "bad input", [])):  # fmt: skip
        found = {node: {"faults": faults.get(node, [])} for node in ("a", "b")}
        health = {"time": time.time() + 60, "nodes": found}
        (tmp_path / "health.json").write_text(json.dumps(health))
        line = "srun: error: a: tasks 0-3: Exited with exit code 2"
        unfit = concluded(tmp_path, line, phase=None)
        assert (unfit.reason, unfit.nodes) == (reason, nodes)
    assert concluded(tmp_path, phase="done", code=0).reason == "finished"
    assert concluded(tmp_path, phase="diverged").reason == "diverged"
    for told, fields, reason in (
        ([10], {}, "time limit"),
        ([12], {}, "SIGUSR2"),
        ([15], {"JobState": "COMPLETING", "PreemptTime": "2026-01-02T03:04:05"}, "preempted"),
        ([15], {"JobState": "PENDING"}, "preempted"),
        ([15], {"JobState": "COMPLETING", "Restarts": "1"}, "preempted"),
        ([15], {"JobState": "COMPLETING", "Restarts": "0", "PreemptTime": "None"}, "cancelled"),
        ([], {"JobState": "CANCELLED"}, "cancelled"),
        ([], {"JobState": "RUNNING", "PreemptTime": "None"}, "asked to stop"),
    ):
        found = concluded(tmp_path, phase="stopped", told=told, code=3, **fields)
        assert found.reason == reason, (told, fields)
    unsaved = concluded(tmp_path, phase="save", told=[10], JobState="COMPLETING")
    assert unsaved.reason == "out of time"
    assert numbers("[0,3-5]") == [0, 3, 4, 5]


class History:
    """Attempts of a run as its folder records them."""

    def __init__(self, folder: Path, **profile: Any) -> None:
        self.folder, self.record = folder, Record(folder)
        self.order = make_order(folder, **profile)

    def add(self, reason: str, checkpoint: int, reached: int, told=(), nodes=()) -> str:
        """One attempt that ended so; what is done about it."""
        step = max((int(p.name[5:]) for p in self.folder.glob("checkpoints/*")), default=0)
        attempt = Attempt(len(self.record.rows()) // 2 + 1, "17", ["a", "b"], self.folder, step)
        self.record.append({"event": "start", "attempt": attempt.number, "step": step})
        (self.folder / f"checkpoints/step-{checkpoint:08d}").mkdir(parents=True, exist_ok=True)
        beat = {"time": time.time() + 60.0, "step": reached, "phase": "train"}
        (self.folder / "heartbeat.json").write_text(json.dumps(beat))
        self.outcome = Outcome(reason, "", list(nodes))
        action = choose(self.outcome, self.record, self.order, attempt, told)
        self.record.end(attempt, self.outcome, action)
        return action


def test_only_failures_without_progress_are_counted(tmp_path) -> None:
    history = History(tmp_path, retries=2)
    assert history.add("crash", 10, 12) == "restarted"
    assert history.add("crash", 20, 25) == "restarted"  # A newer checkpoint each time.
    assert history.add("crash", 20, 21) == "restarted"
    assert history.add("crash", 20, 23, nodes=["b"]) == "requeued"
    assert history.record.blamed() == ["b"]
    for _ in range(5):
        assert history.add("preempted", 20, 22) == "requeued"
    assert history.add("stalled", 20, 24) == "given up"
    assert "3 times in a row without a newer checkpoint" in history.outcome.detail
    assert history.add("time limit", 30, 30) == "requeued"
    assert history.add("crash", 30, 31, told=[10]) == "requeued"  # No time to start here again.
    assert history.add("finished", 40, 40) == "done"
    assert history.add("bad input", 40, 40) == "stopped"


def test_a_step_that_fails_twice_is_told_and_left_out(tmp_path) -> None:
    history = History(tmp_path, skip_failing_step=True)
    history.add("crash", 10, 12)
    assert "twice" not in history.outcome.detail
    history.add("crash", 10, 12)
    assert "step 13 has failed twice, it is left out" in history.outcome.detail
    assert json.loads((tmp_path / "skipped_steps.json").read_text()) == [12]
    history = History(tmp_path / "other")
    (tmp_path / "other").mkdir()
    history.add("crash", 10, 12), history.add("crash", 10, 12)
    assert "step 13 has failed twice" in history.outcome.detail
    assert not (tmp_path / "other/skipped_steps.json").exists()


def test_an_attempt_that_ended_without_a_word_is_put_down_to_its_batch_node(tmp_path) -> None:
    record = Record(tmp_path)
    start = {"event": "start", "attempt": 1, "job": "17", "nodes": ["a"], "batch_node": "a"}
    record.append(start | {"step": 0, "time": 1.0})
    with record.path.open("a") as file:
        file.write('{"event": "en')  # A power cut.
    record.close_lost()
    (end,) = record.ends()
    assert (end["attempt"], end["reason"], end["nodes"]) == (1, "node failure", ["a"])


def test_an_attempt_that_slurm_killed_is_not_put_down_to_a_node(tmp_path) -> None:
    record = Record(tmp_path)
    start = {"event": "start", "attempt": 1, "job": "17", "nodes": ["a"], "batch_node": "a"}
    record.append(start | {"step": 0, "time": 1.0})
    record.told(Attempt(1, "17", ["a"], tmp_path, 0))
    record.close_lost()
    assert [(row["reason"], row["nodes"]) for row in record.ends()] == [("preempted", [])]
    assert not record.failures() and not record.blamed()


def slurm_says(answers: dict[str, str]) -> Any:
    """In place of `ask`: answers by the first word, and what was asked."""
    asked: list[tuple[str, ...]] = []

    def ask(*command: str, **_: Any) -> str:
        asked.append(command)
        if command[0] == "sinfo" and "sinfo" not in answers:
            raise SlurmError("sinfo: no answer")
        return answers.get(" ".join(command[:2]), answers.get(command[0], ""))

    return mock.patch.multiple("launch.supervise", ask=ask), asked


ARRAY = {"SLURM_JOB_ID": "18", "SLURM_ARRAY_JOB_ID": "18", "SLURM_ARRAY_TASK_ID": "3"}


def test_a_run_of_a_sweep_leaves_its_sisters_alone(tmp_path) -> None:
    """One task of an array has the array's own number."""
    patch, asked = slurm_says({"squeue": "18_1.4\n18_3.0\n18_3.1\n18_3.batch\n"})
    fields = {"JobState": "RUNNING"}
    with (
        patch,
        mock.patch.dict(os.environ, ARRAY),
        mock.patch("launch.supervise.describe_job", lambda job: fields),
        mock.patch("launch.supervise.expand", lambda nodes: [nodes]),
        mock.patch("signal.signal"),
    ):
        assert step_of(own_job()) == "18_3.1"
        assert requeue(make_order(tmp_path, exclude=("c",)), 0.0, ["b"])
    assert ("scontrol", "requeue", "18_3") in asked
    assert asked[-1] == ("scontrol", "update", "JobId=18_3", "ExcNodeList=c,b")
    fields["JobState"] = "CANCELLED"
    with (
        patch,
        mock.patch.dict(os.environ, ARRAY),
        mock.patch("launch.supervise.describe_job", lambda job: fields),
        mock.patch("signal.signal"),
    ):
        assert not requeue(make_order(tmp_path), 0.0, [])


def test_nodes_are_left_out_while_enough_are_left(tmp_path) -> None:
    record, order = Record(tmp_path), make_order(tmp_path)
    assert affordable(order, record) == [], "nobody is asked where nobody is blamed"
    for number, node in enumerate("cba"):
        lost = Attempt(number, "17", ["a", "b"], tmp_path, 0)
        record.end(lost, Outcome("node failure", "", [node]), "requeued")
    for listed, left_out in (
        ("a b c d", ["a", "b"]),
        ("a b", []),
        ("a b c d e f", ["a", "b", "c"]),
    ):
        patch, _ = slurm_says({"sinfo": listed})
        with patch, mock.patch("launch.supervise.expand", str.split):
            assert affordable(order, record) == left_out
    with slurm_says({})[0]:
        assert affordable(order, record) == [], "a controller that does not answer"
    with slurm_says({"sinfo": "a b c d"})[0], mock.patch("launch.supervise.requeue") as again:
        assert leave_blamed(order, record, ["a", "d"])
        assert not leave_blamed(order, record, ["a", "d"]), "once"
    assert again.call_count == 1


def test_one_job_at_a_time_holds_a_run(tmp_path) -> None:
    with (
        mock.patch.dict(os.environ, SLURM_JOB_ID="17"),
        hold(tmp_path, 0.0),
        pytest.raises(ConfigError, match="is in use by job 17"),
        hold(tmp_path, 0.5),
    ):
        pass


def test_the_watchdog_knows_a_stall_from_a_slow_phase(tmp_path) -> None:
    now, beat = [0.0], [Beat(0.0, 7, "train")]
    profile = Profile(stall_factor=5.0, stall_seconds=2.0, start_seconds=100.0)
    dog = Watchdog(profile, lambda: beat[0], lambda: now[0])

    def later(seconds: float, **said: Any) -> str:
        now[0] += seconds
        beat[0] = replace(beat[0], **said)
        return dog.stalled()

    assert not later(99.0), "an old heartbeat is none"
    for step in range(8, 14):
        assert not later(1.0, step=step)
    assert not later(4.9) and "no sign of life for 5 s at step 13 (train)" in later(0.2)
    assert not later(0.0, step=14)
    assert not later(50.0, phase="save") and not later(60.0)
    assert not later(1.0, phase="train", step=15) and later(6.0)
    clock = itertools.count(0, 101)
    assert Watchdog(profile, lambda: None, lambda: next(clock)).stalled()
    (tmp_path / "stacks-1.txt").write_text("Thread")
    (tmp_path / "stacks-2.txt").touch()
    assert without_stacks(tmp_path, 4) == [0, 2, 3]


def test_a_profile_by_name_and_its_mistakes_together(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs/cluster"
    folder.mkdir(parents=True)
    (folder / "ours.yaml").write_text("account: lab")
    assert load_profile("ours").account == "lab"
    (folder / "ours.yaml").write_text("retries: -1\nstyle: mpirun\nenvironment: {1x: 2}")
    with pytest.raises(MegarecurError) as error:
        load_profile("ours")
    assert all(word in str(error.value) for word in ("3 problems", "retries", "style", "1x"))
