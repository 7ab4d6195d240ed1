"""slurm/cluster.sh: clusters beside each other, crashes, and what is left of them: nothing."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.cluster import SCRIPT, Cluster, NoCluster, on_cluster

TASK = "sleep 4242.25"


def traces(folder: Path) -> list[str]:
    """The command lines and mounts of this machine that name a folder, and those of TASK."""
    found = Path("/proc/mounts").read_text().splitlines()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return [line for line in found if str(folder) in line or TASK in line]


def run_script(folder: Path, *words: str, **options: str) -> tuple[int, str]:
    """(exit code, everything printed) of the script."""
    environ = {**os.environ, "SLURM_CLUSTER_DIR": str(folder), **options}
    found = subprocess.run([SCRIPT, *words], env=environ, capture_output=True, text=True)
    return found.returncode, found.stdout + found.stderr


def test_the_script_tells_what_is_missing(tmp_path) -> None:
    code, said = run_script(tmp_path, "status")
    assert code == 1 and said == f"cluster.sh: no cluster is up in {tmp_path}\n"
    assert run_script(tmp_path, "down") == (0, "")
    code, said = run_script(tmp_path)
    assert code == 2 and "start-node vn2" in said
    code, said = run_script(Path("/tmp") / ("x" * 66), "up")
    assert code == 1 and "use at most 70 letters" in said
    if os.geteuid() == 0:
        nobody = ["setpriv", "--reuid", "65534", "--clear-groups", "bash", "-s", "up"]
        with open(SCRIPT) as script:
            found = subprocess.run(nobody, stdin=script, capture_output=True, text=True)
        assert found.returncode == 1 and "must be done by root" in found.stderr


@on_cluster
@pytest.mark.parametrize("mode", ["ns", "plain"])
def test_a_second_cluster_leaves_nothing(
    slurm, tmp_path, tmp_path_factory, monkeypatch, mode
) -> None:
    hosts = Path("/etc/hosts").read_text()
    monkeypatch.setenv("SLURM_CLUSTER_MODE", mode)
    try:
        second = Cluster(tmp_path_factory.mktemp("second"))
    except NoCluster as error:
        pytest.skip(f"no second cluster in mode {mode}: {error}")
    try:
        first = slurm.submit("--wrap", "sleep 300", cwd=tmp_path)
        with monkeypatch.context() as patch:
            patch.setenv("SLURM_CONF", str(second.conf))
            assert sorted(second.run("srun", "-N2", "printenv", "SLURMD_NODENAME").split()) == [
                "vn1",
                "vn2",
            ]
            job = second.submit("-N2", "--wrap", f"srun -N2 {TASK}; {TASK}", cwd=tmp_path)
            second.wait(job, "RUNNING")
        slurm.wait(first, "RUNNING")
        assert traces(second.folder) and traces(slurm.folder)
    finally:
        second.close()
    assert traces(second.folder) == []
    assert {path.name for path in second.folder.iterdir()} == {".slurm-cluster", "log"}
    assert Path("/etc/hosts").read_text() == hosts
    assert slurm.state(first) == "RUNNING"
    slurm.cancel_all()


@on_cluster
def test_a_job_survives_the_crash_of_its_node(slurm, tmp_path) -> None:
    job = slurm.submit("-w", "vn2", "--requeue", "--wrap", "sleep 600", cwd=tmp_path)
    slurm.wait(job, "RUNNING")
    slurm.crash("vn2")
    slurm.wait(job, "PENDING")
    slurm.start("vn2")
    slurm.wait(job, "RUNNING")
    assert slurm.show(job)["Restarts"] == "1"
    slurm.cancel_all()


def kill_daemon(slurm: Cluster, name: str) -> None:
    """Kill a daemon, and wait until it is gone."""
    pid, _ = (slurm.folder / "run" / f"{name}.pid").read_text().split()
    os.kill(int(pid), signal.SIGKILL)
    while f"{name}: not running" not in run_script(slurm.folder, "status")[1]:
        time.sleep(0.1)


@on_cluster
@pytest.mark.parametrize("dead", [["slurmctld"], ["munged", "slurmctld", "vn3"]])
def test_up_repairs_what_is_there(slurm, tmp_path, dead) -> None:
    """Ports, key, nodes and running jobs stay."""
    files = [slurm.folder / "etc" / name for name in ("slurm.conf", "munge.key")]
    before = [file.read_bytes() for file in files]
    job = slurm.submit("-w", "vn2", "--wrap", "sleep 600", cwd=tmp_path)
    slurm.wait(job, "RUNNING")
    waiting = slurm.submit("-w", "vn2", "-c4", "--hold", "--wrap", "true", cwd=tmp_path)
    state, now = slurm.folder / "state" / "job_state", time.time()
    while not state.exists() or state.stat().st_mtime <= now + 1.0:
        slurm.run("scontrol", "update", f"JobId={waiting}", "Comment=x")  # A reason to save it.
        time.sleep(0.3)
    for name in dead:
        kill_daemon(slurm, name)
    slurm.script("up")
    assert [file.read_bytes() for file in files] == before
    assert slurm.state(job) == "RUNNING" and slurm.state(waiting) == "PENDING"
    said = slurm.run("srun", "-N4", "--overlap", "printenv", "SLURMD_NODENAME")
    assert sorted(said.split()) == ["vn1", "vn2", "vn3", "vn4"]
    assert slurm.show(job)["Restarts"] == "0"
    slurm.cancel_all()


@on_cluster
def test_up_resumes_drained_nodes(slurm, tmp_path) -> None:
    slurm.run("scontrol", "update", "NodeName=vn[2,4]", "State=DRAIN", "Reason=test")
    assert "drain" in slurm.run("sinfo", "-h", "-n", "vn2", "-o", "%T")
    slurm.script("up")
    states = slurm.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T").split()
    assert states == ["idle"] * 4


@on_cluster
def test_the_controller_goes_and_comes_back(slurm, tmp_path) -> None:
    job = slurm.submit("--wrap", "sleep 600", cwd=tmp_path)
    slurm.wait(job, "RUNNING")
    slurm.script("stop-controller")
    assert "not running" in run_script(slurm.folder, "status")[1]
    for _ in range(2):  # Whether it is there or not.
        slurm.script("restart-controller")
        assert slurm.state(job) == "RUNNING"
    slurm.cancel_all()


@on_cluster
def test_short_jobs_end_after_a_minute(slurm, tmp_path) -> None:
    job = slurm.submit("-p", "short", "--wrap", "sleep 600", cwd=tmp_path)
    assert slurm.show(job)["TimeLimit"] == "00:01:00"
    slurm.cancel_all()
