"""The command line as users run it: processes, signals, exit codes."""

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from support.cluster import PATIENCE
from support.configs import make_config
from support.forks import Forks
from support.ports import LOOPBACK, listeners

from megarecur.config.load import load_config, to_yaml
from megarecur.errors import MeshError
from megarecur.launch.local import describe_kills, process_state, watched
from megarecur.launch.profile import ClusterProfile
from megarecur.parallel import mesh
from megarecur.train.metrics import read_rows
from megarecur.train.trainer import train

ROOT = Path(__file__).resolve().parents[2]


def start(*words: object) -> subprocess.Popen[str]:
    """`megarecur` with these words."""
    command = [sys.executable, "-m", "megarecur.launch.cli", *map(str, words)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], seconds: float = PATIENCE) -> tuple[int, str]:
    """(exit code, everything printed)."""
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, output


def write_config(corpus: Path, folder: Path, steps: int) -> Path:
    """The config of a run in folder/run."""
    path = folder / "config.yaml"
    train = {"steps": steps, "global_batch_size": 8, "micro_batch_size": 4, "log_every": 5}
    path.write_text(to_yaml(make_config(corpus, run_dir=str(folder / "run"), train=train)))
    return path


def until_logged(process: subprocess.Popen[str], folder: Path, step: int = 1) -> None:
    """Wait for a row of the run from this step on, as long as the run gets on; otherwise its
    processes are ended."""
    seen, since = -1, time.monotonic()
    try:
        while seen < step:
            newest = max((r["step"] for r in read_rows(folder / "run/metrics.jsonl")), default=-1)
            if newest > seen:
                seen, since = newest, time.monotonic()
            assert process.poll() is None, process.communicate()
            assert time.monotonic() - since < PATIENCE, f"no step after {seen}"
            time.sleep(0.05)
    except BaseException:
        process.terminate()  # The launch ends its ranks.
        raise


def test_launch_stops_on_a_signal_and_goes_on(corpus, tmp_path) -> None:
    path = write_config(corpus, tmp_path, 100_000)
    process = start("launch", path, "--nproc", 2)
    until_logged(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 3, output
    assert "saved at step" in output and "Traceback" not in output
    step = int(output.split("saved at step ")[1].split()[0])
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()

    # Here, as one process: what two have written goes on anywhere.
    assert train(load_config(path, [f"train.steps={step + 5}"])) == 0
    assert read_rows(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == step + 5


def test_a_world_that_nobody_started_is_named(corpus, tmp_path, monkeypatch, caplog) -> None:
    """WORLD_SIZE left in the environment, alone and with all that belongs to it."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)  # Of other tests of this process.
    monkeypatch.setattr(mesh.dist, "is_initialized", lambda: False)  # Nor is their group wanted.
    monkeypatch.setenv("WORLD_SIZE", "2")
    path = write_config(corpus, tmp_path, 5)
    with pytest.raises(MeshError, match=r"WORLD_SIZE=2 is set.*RANK and MASTER_ADDR and MASTER_P"):
        train(load_config(path))
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(MeshError, match="WORLD_SIZE=two in the environment is not a number"):
        train(load_config(path))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    monkeypatch.setattr(mesh, "TIMEOUT", timedelta(seconds=2))
    for rank, who, why in (("0", "ranks 1, 2", "did not connect"), ("1", "rank 0", "cannot reach")):
        for name, value in (place | {"RANK": rank}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(MeshError, match=why) as error:
            mesh.meet(3, patience=0.2)
        assert f"WORLD_SIZE=3, RANK={rank} in the environment" in str(error.value)
        assert f"waiting for {who} at 127.0.0.1:{port}" in caplog.text
    assert not (tmp_path / "run").exists()


def test_a_renamed_run_goes_on_in_its_new_folder(corpus, tmp_path, monkeypatch) -> None:
    path = write_config(corpus, tmp_path, 2)
    assert train(load_config(path)) == 0
    old, new = tmp_path / "run", tmp_path / "renamed"
    own = yaml.safe_load((old / "config.yaml").read_text())
    assert load_config(old / "config.yaml").run_dir == str(old)
    old.rename(new)
    monkeypatch.chdir(new)
    assert train(load_config("config.yaml", ["train.steps=3"])) == 0
    assert not old.exists() and read_rows(new / "metrics.jsonl")[-1]["step"] == 3
    # Anywhere else, and where it is asked for, the folder is the one that is named.
    assert load_config("config.yaml", [f"run_dir={old}"]).run_dir == str(old)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(own))
    assert load_config(tmp_path / "config.yaml").run_dir == str(old)


STALLS = {"data": [], "tensor": ["parallel.tensor=2"], "pipeline": ["parallel.pipeline=2"]}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_stopped_rank_ends_the_job(corpus, tmp_path) -> None:
    """Whatever the ranks share. While one job is silent for as long as it may be, the next starts,
    so that the waits overlap and only one job computes."""
    profile = tmp_path / "profile.yaml"
    profile.write_text("stall_seconds: 20\nstart_seconds: 240")
    jobs = {}
    for shares, words in STALLS.items():
        (folder := tmp_path / shares).mkdir()
        path = write_config(corpus, folder, 100_000)
        process = start("launch", path, "--nproc", 2, "--cluster", profile, *words)
        until_logged(process, folder, 60)
        stopped = ranks_of(process.pid)[1]
        os.kill(stopped, signal.SIGSTOP)
        jobs[shares] = process, stopped
    for shares, (process, stopped) in jobs.items():
        code, output = finish(process, PATIENCE)
        assert code == 1, output
        assert f"silent: rank 1 (process {stopped}, stopped)" in output, shares
        (folder,) = (tmp_path / shares / "run" / "logs").glob("local-*")
        assert "trainer.py" in (folder / "stacks-0.txt").read_text()
        assert not (folder / "stacks-1.txt").read_text() and not Path(f"/proc/{stopped}").exists()


def ranks_of(parent: int) -> dict[int, int]:
    """Process ids of the ranks that a process has started."""
    found = {}
    for task in Path(f"/proc/{parent}/task").iterdir():
        for pid in (task / "children").read_text().split():
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(word[5:]): int(pid) for word in environ if word.startswith(b"RANK=")}
    return found


def test_killed_workers_are_told_with_what_may_have_killed_them() -> None:
    ends = {0: (7, 1), 1: (8, -signal.SIGKILL), 2: (9, -signal.SIGTERM), 3: (10, -signal.SIGBUS)}
    killed, bus = describe_kills(ends, 0)
    assert killed.startswith("rank 1 (process 8) was ended by SIGKILL, as the kernel does")
    assert bus.startswith("rank 3 (process 10) was ended by SIGBUS, ") and "/dev/shm" in bus
    assert "out of memory, the kernel killed it" in describe_kills(ends, 1)[0]


def test_logs_that_are_deleted_under_a_launch_fail_nothing(tmp_path) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        with watched(tmp_path, ClusterProfile(), 1):
            shutil.rmtree(tmp_path / "logs")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.slow
def test_a_worker_that_dies_fails_the_launch(corpus, tmp_path) -> None:
    path = write_config(corpus, tmp_path, 100_000)
    process = start("launch", path, "--nproc", 2)
    until_logged(process, tmp_path)
    holder = json.loads((tmp_path / "run" / "lease").read_text())
    os.kill(holder["pid"], signal.SIGKILL)
    code, output = finish(process)
    assert code == 1, output
    assert f"error: rank 0 (process {holder['pid']}) was ended by SIGKILL" in output


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_stranger_disturbs_no_rank_and_a_killed_launcher_leaves_none(corpus, tmp_path) -> None:
    """He connects to every port of the job, and sends what a rank might, or nothing sensible."""
    path = write_config(corpus, tmp_path, 100_000)
    process = start("launch", path, "--nproc", 2)
    until_logged(process, tmp_path)
    ranks = ranks_of(process.pid)
    doors = [door for pid in ranks.values() for door in listeners(pid)]
    assert listeners(process.pid) == [] and {address for address, _ in doors} <= {LOOPBACK}
    for _, port in doors:
        for words in (bytes(8), b"\x00\xff" * 5000, b"set key " + pickle.dumps(print)):
            with socket.create_connection(("127.0.0.1", port)) as link:
                link.sendall(words)
    newest = max(row["step"] for row in read_rows(tmp_path / "run/metrics.jsonl"))
    until_logged(process, tmp_path, newest + 10)
    process.kill()
    deadline = time.monotonic() + PATIENCE
    while any(process_state(pid) not in ("", "Z") for pid in ranks.values()):
        assert time.monotonic() < deadline, "ranks train on without their launcher"
        time.sleep(0.1)
    assert list((tmp_path / "run" / "checkpoints").glob("step-*")), "they have saved"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_rank_that_a_signal_stops_is_named_and_ends_the_run(corpus, tmp_path) -> None:
    """At the start too, where silence of twenty minutes is no stall."""
    path = write_config(corpus, tmp_path, 100_000)
    process = start("launch", path, "--nproc", 2)
    until_logged(process, tmp_path)
    stopped = ranks_of(process.pid)[1]
    os.kill(stopped, signal.SIGSTOP)
    code, output = finish(process)
    assert code == 1 and f"stopped by a signal: rank 1 (process {stopped})" in output, output
    assert f"silent: rank 1 (process {stopped}, stopped)" in output
    assert not Path(f"/proc/{stopped}").exists()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_at_five_steps(tmp_path, request) -> None:
    forks = Forks(tmp_path)
    request.addfinalizer(forks.close)

    def run(*words: object) -> str:
        process = subprocess.run(
            [forks.folder / "megarecur", *map(str, words)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert process.returncode == 0, process.stderr
        return process.stdout

    config = ROOT / "configs" / "quickstart.yaml"
    assert "documents" in run("prep", "quickstart")
    assert "reuse map" in run("check", config)
    few = ("train.steps=5", "train.eval_final=32", "optimizer.schedule.warmup_steps=2")
    assert "done: 5 steps" in run("train", config, "train.global_batch_size=16", *few)
    assert "bits per byte" in run("eval", "runs/quickstart", "--samples", 32)
    assert run("generate", "runs/quickstart", "def main(", "--max-new-tokens", 8)
    assert "loss.png" in run("plot", "runs/quickstart")
