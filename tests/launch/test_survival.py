"""Runs on a real Slurm cluster of virtual nodes, ended in every way, brought back by themselves.

Each is compared with an undisturbed run on as many processes: losses and final tensors bit for bit.
"""

import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.cluster import PATIENCE
from support.configs import make_config
from support.once import make_once

from megarecur.checkpoint import checkpoint
from megarecur.checkpoint.index import DTYPES, read_index
from megarecur.config.load import to_yaml
from megarecur.launch.attempts import newest_step
from megarecur.parallel.shards import whole
from megarecur.train.metrics import read_rows

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(3000)]

STEPS, SHORT, EVERY = 160, 80, 10
"""Steps of runs that are disturbed often or late, of the others, and between checkpoints. The rate
is constant, so that a short run is the beginning of a long one."""
PROFILE = {
    "partition": "main",
    "time": "00:10:00",
    "start_seconds": 240,
    "save_seconds": 25,
    "stall_seconds": 20,
    "stall_factor": 20,
    "environment": {"OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "lo"},
}
COMMAND = [sys.executable, "-m", "megarecur.launch.cli"]

Undisturbed = tuple[dict[int, Any], Path]
"""Rows of losses by step, and the run folder with its checkpoints of SHORT and of the last step."""


class Run:
    """One run folder, and the job that trains in it."""

    def __init__(self, slurm: Any, folder: Path, corpus: Path) -> None:
        self.slurm, self.folder, self.path = slurm, folder, folder / "run"
        self.steps = STEPS
        write_config(folder / "config.yaml", self.path, corpus)
        self.job, self.profile = "", dict(PROFILE)
        self.per_node = 1

    def launch(self, nodes: int = 2, *options: str) -> None:
        """Submit it."""
        (self.folder / "profile.yaml").write_text(yaml.safe_dump(self.profile))
        words = ["launch", str(self.folder / "config.yaml"), f"--nodes={nodes}"]
        words += [f"--processes-per-node={self.per_node}", *options]
        words += [f"--cluster={self.folder / 'profile.yaml'}"]
        if self.steps != STEPS:
            words.append(f"train.steps={self.steps}")
        said = subprocess.run([*COMMAND, *words], capture_output=True, text=True, check=True)
        self.job = re.search(r"job (\d+)", said.stdout)[1]

    def beat(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            return json.loads((self.path / "heartbeat.json").read_text())
        return {}

    def rows(self, event: str | None = None) -> list[dict[str, Any]]:
        return read_attempts(self.path, event)

    def until(self, what: Callable[[], Any]) -> Any:
        """Wait for something, as long as the run gets on; explain the run if it does not."""
        seen, since = None, time.monotonic()
        while not (found := what()):
            if (now := (self.rows(), self.beat())) != seen:
                seen, since = now, time.monotonic()
            assert time.monotonic() - since < PATIENCE, self.explain()
            time.sleep(0.1)
        return found

    def until_step(self, step: int) -> None:
        """Wait until the newest attempt has got there."""

        def there() -> bool:
            beat, starts = self.beat(), self.rows("start")
            fresh = starts and beat.get("time", 0) > starts[-1]["time"]
            return fresh and beat["phase"] == "train" and beat["step"] >= step

        self.until(there)

    def until_finished(self) -> None:
        self.until(lambda: any(r["reason"] == "finished" for r in self.rows("end")))

    def explain(self) -> str:
        texts = [f"{self.slurm.run('squeue')}", f"{self.beat()}"]
        logs = sorted((self.path / "logs").rglob("*.*"))
        for path in filter(Path.exists, [self.path / "attempts.jsonl", *logs]):
            texts += [f"--- {path}", *path.read_text(errors="replace").splitlines()[-12:]]
        return "\n".join(texts)

    def ranks(self) -> dict[int, int]:
        """Process ids by rank."""
        return {rank: pid for pid, rank in processes(self.path) if rank is not None}

    def assert_equal(self, expected: Undisturbed) -> None:
        """Losses and tensors of the undisturbed run; nothing is left behind."""
        losses, undisturbed = expected
        found = read_rows(self.path / "metrics.jsonl")
        steps = [row["step"] for row in found if "train/loss" in row]
        assert steps == list(range(1, self.steps + 1)), self.explain()
        for row in found:
            for key in ("train/loss", "optim/grad_norm", "val/loss"):
                if key in row:
                    assert row[key] == losses[row["step"]].get(key, row[key]), (row["step"], key)
        tensors = saved_tensors(undisturbed, self.steps)
        for name, tensor in saved_tensors(self.path, self.steps).items():
            assert torch.equal(tensor, tensors[name]), name
        self.until(lambda: not processes(self.path))


def read_attempts(run: Path, event: str | None = None) -> list[dict[str, Any]]:
    """What a run has recorded; only of one kind of event, if given."""
    path = run / "attempts.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if event in (None, row["event"])]


def processes(run: Path) -> Iterator[tuple[int, int | None]]:
    """(pid, rank) of the processes that belong to a run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (folder / "cmdline").read_bytes().split(b"\0")
            if not any(str(run).encode() in word for word in command):
                continue
            environ = dict(
                word.split(b"=", 1)
                for word in (folder / "environ").read_bytes().split(b"\0")
                if b"=" in word
            )
            training = b"train" in command and b"srun" not in command[0]
            rank = int(environ[b"SLURM_PROCID"]) if training else None
            found.append((int(folder.name), rank))
    return found


def write_config(path: Path, run_dir: Path, corpus: Path) -> None:
    config = make_config(
        run_dir=str(run_dir),
        data={
            "train": [{"path": str(corpus / "train")}],
            "val": [{"path": str(corpus / "val")}],
            "tokenizer": "bytes",
            "seq_length": 32,
        },
        train={
            "steps": STEPS,
            "global_batch_size": 8,
            "micro_batch_size": 1,
            "eval_every": SHORT,
            "log_every": 1,
        },
        checkpoint={"every": EVERY, "keep_every": SHORT},
    )
    path.write_text(to_yaml(config))


def saved_tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Parameters and moments of a checkpoint, whatever its files."""
    path = run / "checkpoints" / f"step-{step:08d}"
    found = {
        name: torch.empty(record.shape, dtype=DTYPES[record.dtype])
        for name, record in read_index(path).tensors.items()
    }
    checkpoint.load(path, {name: whole(tensor) for name, tensor in found.items()})
    return found


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> Callable[..., Undisturbed]:
    """The run of some processes that nobody disturbs."""

    def by_processes(number: int, steps: int = STEPS) -> Undisturbed:
        def launch(folder: Path) -> None:
            write_config(folder / "config.yaml", folder / "run", corpus)
            command = [*COMMAND, "launch", str(folder / "config.yaml"), f"--nproc={number}"]
            environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            subprocess.run(
                [*command, f"train.steps={steps}"], check=True, env=environ, capture_output=True
            )

        own = make_once(tmp_path_factory, f"undisturbed-{number}-{steps}", launch)
        rows = read_rows(own / "run" / "metrics.jsonl")
        return {row["step"]: row for row in rows if "train/loss" in row}, own / "run"

    return by_processes


@pytest.fixture
def run(slurm, corpus, tmp_path, tmp_path_factory) -> Iterator[Run]:
    """One at a time, whatever the workers of pytest: four ranks want all of a small machine."""
    with (tmp_path_factory.getbasetemp().parent / "survival.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        each = Run(slurm, tmp_path, corpus)
        yield each
        slurm.cancel_all()
        each.until(lambda: not processes(each.path))


def kill_a_rank(run: Run) -> None:
    os.kill(sorted(run.ranks().items())[-2][1], signal.SIGKILL)


def stop_a_rank(run: Run) -> None:
    os.kill(sorted(run.ranks().items())[-1][1], signal.SIGSTOP)


def ask_to_stop(run: Run) -> None:
    run.slurm.run("scancel", "--signal=USR2", "--batch", run.job)


def preempt(run: Run) -> None:
    run.slurm.run(
        "sbatch", "-p", "high", "-N4", "--exclusive", "-t1", "-o/dev/null", "--wrap=sleep 3"
    )


def crash_another_node(run: Run) -> None:
    node, ends = run.rows("start")[-1]["nodes"][1], len(run.rows("end"))
    run.slurm.crash(node)
    run.until(lambda: len(run.rows("end")) > ends)
    run.slurm.start(node)


def crash_batch_node(run: Run) -> None:
    node, restarts = run.rows("start")[-1]["batch_node"], run.slurm.show(run.job)["Restarts"]
    run.slurm.crash(node)
    run.until(lambda: run.slurm.show(run.job).get("Restarts", restarts) != restarts)
    run.slurm.start(node)


def crash_and_return(run: Run) -> None:
    node = run.rows("start")[-1]["nodes"][1]
    run.slurm.crash(node)
    run.slurm.start(node)


def kill_supervisor(run: Run) -> None:
    """Its ranks go on without it."""
    pids = [int(p.name) for p in Path("/proc").glob("[0-9]*") if is_supervisor(p, run.path)]
    assert pids, run.explain()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def is_supervisor(process: Path, run: Path) -> bool:
    """Whether a process supervises a run, and is no shell."""
    with suppress(OSError):
        words = (process / "cmdline").read_bytes().split(b"\0")
        return b"supervise" in words and any(str(run).encode() in word for word in words)
    return False


def requeue_by_hand(run: Run) -> None:
    run.slurm.run("scontrol", "requeue", run.job)


DISTURBANCES = {
    "supervisor": (kill_supervisor, "supervisor killed"),
    "administrator": (requeue_by_hand, "requeued"),
    "usr2": (ask_to_stop, "SIGUSR2"),
    "preemption": (preempt, "preempted"),
    "sigkill": (kill_a_rank, "crash"),
    "sigstop": (stop_a_rank, "stalled"),
    "node": (crash_another_node, "node failure"),
    "batch_node": (crash_batch_node, "node failure"),
    "returned_node": (crash_and_return, "node failure"),
}


@pytest.mark.parametrize(
    "names",
    [("supervisor", "administrator", "usr2", "preemption", "sigkill", "sigstop", "node",
      "batch_node"), ("returned_node",)],
    ids=" ".join,
)  # fmt: skip
def test_a_run_comes_back(run, undisturbed, names) -> None:
    """After each disturbance in turn. A node that failed is not tried again: two a run of four."""
    draw = random.Random(" ".join(names))
    run.profile["retries"] = 2 * len(names)
    run.steps = STEPS if len(names) > 1 else SHORT
    run.launch()
    for done, name in enumerate(names):
        run.until(lambda done=done: len(run.rows("start")) > done)
        run.until_step(run.rows("start")[-1]["step"] + draw.randrange(8, 22))
        DISTURBANCES[name][0](run)
        run.until(lambda done=done: len(run.rows("end")) > done)
    run.until_finished()
    ends, starts = run.rows("end"), run.rows("start")
    reasons = [DISTURBANCES[name][1] for name in names]
    assert [end["reason"] for end in ends] == [*reasons, "finished"], run.explain()
    for i, name in enumerate(names):
        # Nothing beyond the last checkpoint is lost; one may have been under way.
        end = ends[i]
        assert starts[i + 1]["step"] == end["step"] > end["reached"] - 2 * EVERY
        if name == "sigstop":
            assert_silent(run, starts[i], end)
        if name in ("supervisor", "administrator"):
            assert not end["nodes"], run.explain()
        if "node" in name:
            assert end["nodes"][0] not in starts[-1]["nodes"], run.explain()
    run.assert_equal(undisturbed(2))


def assert_silent(run: Run, start: dict[str, Any], end: dict[str, Any]) -> None:
    """The last rank is blamed, and the stacks of all others are kept."""
    last = 2 * run.per_node - 1
    assert f"silent: rank {last} on {start['nodes'][1]}; stacks in" in end["detail"]
    texts = [(run.path / start["logs"] / f"stacks-{n}.txt").read_text() for n in range(last + 1)]
    assert all("trainer.py" in text for text in texts[:last]) and not texts[last]


def test_a_time_limit_of_two_minutes(run, undisturbed) -> None:
    run.profile |= {"time": "2", "start_seconds": 100, "save_seconds": 10, "retries": 10}
    # The first attempt has too little time on any machine.
    run.profile["setup"] = ["sleep $(( ${SLURM_RESTART_COUNT:-0} ? 0 : 90 ))"]
    run.launch()
    run.until_finished()
    first, *others, last = [row["reason"] for row in run.rows("end")]
    assert first in ("time limit", "out of time") and last == "finished", run.explain()
    # Where many others compute, a start may take longer than it is given here.
    assert set(others) <= {"time limit", "out of time", "stalled"}, run.explain()
    run.assert_equal(undisturbed(2))


def test_a_job_that_may_not_be_requeued_is_submitted_anew(run, undisturbed) -> None:
    run.profile["requeue"], run.steps = False, SHORT
    run.launch()
    run.until_step(20)
    ask_to_stop(run)
    run.until_finished()
    assert len({row["job"] for row in run.rows("start")}) == 2
    run.assert_equal(undisturbed(2))


def test_torchrun_style(run, undisturbed) -> None:
    run.per_node, run.steps = 2, SHORT
    run.profile["style"] = "torchrun"
    run.launch()
    run.until_step(20)
    ask_to_stop(run)
    run.until_finished()
    assert [row["reason"] for row in run.rows("end")] == ["SIGUSR2", "finished"]
    run.assert_equal(undisturbed(4, SHORT))


def test_soak(run, undisturbed) -> None:
    """Disturbances of every kind at random moments: SOAK of them, 3 if it is not set."""
    draw, wanted = random.Random(8), int(os.environ.get("SOAK", "3"))
    kinds = [ask_to_stop, kill_a_rank, stop_a_rank, preempt, crash_and_return]
    run.per_node, run.steps = 2, SHORT if wanted <= 3 else STEPS
    run.profile |= {"retries": 2 * wanted, "stall_seconds": 15}
    run.launch()
    for done in range(wanted):
        run.until(lambda done=done: len(run.rows("start")) > done)
        # Once it trains again, somewhere before or after its next checkpoint.
        run.until_step(run.rows("start")[-1]["step"] + draw.randrange(5, 18))
        (kind := draw.choice(kinds))(run)
        run.until(lambda done=done: len(run.rows("end")) > done)
        if kind is stop_a_rank:
            assert_silent(run, run.rows("start")[done], run.rows("end")[done])
    run.until_finished()
    assert len(run.rows("end")) == wanted + 1, run.explain()
    run.assert_equal(undisturbed(4, run.steps))


def test_other_numbers_of_nodes(run, undisturbed) -> None:
    """Two nodes, one, two: the same samples, losses to rounding."""
    for nodes, step in ((2, 40), (1, 90), (2, STEPS)):
        run.launch(nodes)
        if step == STEPS:
            run.until_finished()
            break
        run.until_step(step)
        run.slurm.run("scancel", run.job)
        run.until(lambda: not processes(run.path))
    starts = run.rows("start")
    assert [len(row["nodes"]) for row in starts] == [2, 1, 2]
    losses, _ = undisturbed(2)
    found = {r["step"]: r["train/loss"] for r in read_rows(run.path / "metrics.jsonl")
             if "train/loss" in r}  # fmt: skip
    assert found.keys() == losses.keys()
    for row in starts[1:]:
        first = row["step"] + 1
        assert found[first] == pytest.approx(losses[first]["train/loss"], rel=1e-6)
    for step, loss in found.items():
        assert loss == pytest.approx(losses[step]["train/loss"], rel=1e-4)


def refused(run: Run, *options: str) -> str:
    """What a launch says that must be refused."""
    with pytest.raises(subprocess.CalledProcessError) as error:
        run.launch(2, *options)
    assert error.value.returncode == 2 and "Traceback" not in error.value.stderr
    return error.value.stderr


def test_a_second_launch_is_refused_or_waits(run, undisturbed) -> None:
    """What is launched in vain changes nothing: the job is requeued, and goes on as it was."""
    run.launch()
    run.until_step(10)
    first, files = run.job, sorted((run.path / "launch").rglob("*"))
    assert f"is that of job {first} (running)" in refused(run, "optimizer.lr=0.5")
    said = refused(run, "optimizer.lr=0.5", f"--after={first}", "--partition=nowhere")
    assert said.startswith("error: sbatch rejected the job: invalid partition specified: nowhere")
    assert sorted((run.path / "launch").rglob("*")) == files
    run.launch(2, f"--after={first}", "--name", "second turn")
    second, run.job = run.job, first
    assert run.slurm.show(second)["Comment"] == str(run.path)
    ask_to_stop(run)
    run.until(lambda: len(run.rows("start")) == 2)
    assert run.slurm.state(second) == "PENDING", "a job that is requeued has not ended"
    run.until_finished()
    run.until(lambda: run.slurm.state(second) == "COMPLETED")
    assert {row["job"] for row in run.rows("start")} == {first, second}
    run.assert_equal(undisturbed(2))


def test_a_launch_in_the_place_of_another(run, undisturbed) -> None:
    """In a folder whose name Slurm would read something into, with GPUs asked for by gres."""
    run.per_node, run.steps = 2, SHORT
    run.path = run.folder / "run %j 50%"
    run.profile["gpu_request"] = "gres"
    options = (f"run_dir={run.path}", "--gpus-per-node=2")
    run.launch(1, *options)
    run.until_step(25)
    first = run.job
    run.launch(1, *options, "--replace")
    assert run.job != first and run.slurm.state(first) == "CANCELLED"
    assert run.slurm.show(run.job)["TresPerNode"] == "gres:gpu:2"
    run.until_finished()
    assert [row["job"] for row in run.rows("start")] == [first, run.job]
    logs = sorted(path.name for path in (run.path / "logs").iterdir())
    wanted = [f"attempt-00{n}" for n in (1, 2)] + [f"slurm-{job}.log" for job in (first, run.job)]
    assert logs == wanted
    run.assert_equal(undisturbed(2))


def test_a_sweep_side_by_side_on_the_same_nodes(run) -> None:
    run.launch(2, "--sweep", "optimizer.lr=1e-3,3e-4", "train.steps=40")
    folders = [run.path / f"optimizer.lr={lr}" for lr in ("1e-3", "3e-4")]

    def done() -> bool:
        last = [read_attempts(folder)[-1:] for folder in folders]
        return all(rows and "reason" in rows[0] for rows in last)

    run.until(done)
    (start, end), (other, other_end) = map(read_attempts, folders)
    assert end["reason"] == other_end["reason"] == "finished", run.explain()
    assert start["nodes"] == other["nodes"] and other["time"] < end["time"]
    losses = [read_rows(folder / "metrics.jsonl")[-1]["val/loss"] for folder in folders]
    assert losses[0] != losses[1]


def test_cancelled_tasks_of_an_array_stay_cancelled(run) -> None:
    """One before it is requeued, the other after, while Slurm still clears up."""
    run.launch(2, "--sweep", "optimizer.lr=1e-3,3e-4", "train.steps=100000")
    now, later = (run.path / f"optimizer.lr={lr}" for lr in ("1e-3", "3e-4"))
    run.until(lambda: newest_step(now) > 0 and newest_step(later) > 0)
    run.slurm.run("scancel", f"{run.job}_0")
    run.slurm.run("scancel", "--signal=USR2", "--batch", f"{run.job}_1")
    run.until(lambda: read_attempts(later, "end"))
    run.slurm.run("scancel", f"{run.job}_1")
    for task in (0, 1):
        run.until(lambda task=task: run.slurm.state(f"{run.job}_{task}") == "CANCELLED")
    time.sleep(15)  # More than Slurm takes to start what was requeued.
    for task, folder in enumerate((now, later)):
        assert run.slurm.state(f"{run.job}_{task}") == "CANCELLED", run.explain()
        assert len(read_attempts(folder, "start")) == 1, run.explain()
    assert [row["reason"] for row in read_attempts(now, "end")] in ([], ["cancelled"])


def refuse(run: Run, message: str) -> None:
    """The run is stopped by one clear message, once."""
    run.until(lambda: run.rows("end") and run.slurm.state(run.job) in ("FAILED", "COMPLETED"))
    last = run.rows("end")[-1]
    assert (last["reason"], last["action"]) == ("bad input", "stopped"), run.explain()
    assert message in last["detail"], run.explain()
    logs = run.path / run.rows("start")[-1]["logs"]
    texts = [path.read_text() for path in logs.glob("rank-*.log")]
    assert texts and not any("Traceback" in text for text in texts)


@pytest.mark.parametrize(
    ("options", "message"), [("size=600k", "no space left"), ("ro", "Read-only file system")]
)
def test_a_folder_that_cannot_be_written(run, options, message) -> None:
    """Of one node, which mounts it for itself."""
    if "MODE=ns" not in (run.slurm.folder / "run/settings").read_text():
        pytest.skip("this kernel gives virtual nodes no mounts of their own")
    folder = run.path / "checkpoints"
    run.profile["setup"] = [f"mkdir -p {folder}", f"mount -t tmpfs -o {options} tmpfs {folder}"]
    run.launch(1)
    refuse(run, message)


def test_shards_that_vanish(run, corpus, tmp_path) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    write_config(run.folder / "config.yaml", run.path, tmp_path / "corpus")
    run.launch()
    run.until_step(15)
    (tmp_path / "corpus/train").rename(tmp_path / "corpus/gone")
    kill_a_rank(run)
    refuse(run, str(tmp_path / "corpus/train"))
    saved = checkpoint.find_checkpoint(run.path / "checkpoints")
    assert saved[0] is not None and not saved[1], "nothing is damaged"
