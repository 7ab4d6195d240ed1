"""launch against its neighbours: who may connect, and what becomes of ranks that are cut off."""

from __future__ import annotations

import base64
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from support.cluster import PATIENCE
from support.ports import listeners

from megarecur.launch.local import EndOrder, Watch
from megarecur.launch.profile import ClusterProfile
from megarecur.parallel.mesh import listen_on

LAUNCH = """
import sys
from megarecur.config.run import Config
from megarecur.launch import local
from unittest import mock
with mock.patch.object(local, "check_world"):
    command = sys.argv[2:]
    with mock.patch.object(local.sys, "executable", {program!r}):
        sys.exit(local.launch_local(None, command, {nproc}, int(sys.argv[1])))
"""
"""Launch a program with the environment of ranks in the place of Python."""


def launch(
    program: Path, nproc: int, nodes: int, *words: object, **environ: str
) -> subprocess.Popen[str]:
    source = LAUNCH.format(program=str(program), nproc=nproc)
    return subprocess.Popen(
        [sys.executable, "-c", source, str(nodes), *map(str, words)],
        env=os.environ | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return process.returncode, output


def write_program(folder: Path, script: str) -> Path:
    """Return an executable that runs a shell script; its words begin after `-m MODULE`."""
    path = folder / "program"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


def test_on_one_machine_the_launcher_listens_nowhere(tmp_path: Path) -> None:
    """The ranks meet in a file that only this user can open."""
    script = f'echo "$MEGARECUR_STORE" > {tmp_path}/rank-$RANK.aside\n'
    script += f"mv {tmp_path}/rank-$RANK.aside {tmp_path}/rank-$RANK\n"
    script += f"while [ ! -e {tmp_path}/go ]; do sleep 0.1; done"
    (tmp_path / "shared").mkdir()
    environ = {"TMPDIR": str(tmp_path / "shared")}
    process = launch(write_program(tmp_path, script), 2, 1, **environ)
    ranks = [tmp_path / "rank-0", tmp_path / "rank-1"]
    wait_until(lambda: all(rank.exists() for rank in ranks), process)
    assert listeners(process.pid) == []
    (store,) = {Path(rank.read_text().strip()) for rank in ranks}
    for folder in (store.parent, store.parent.parent, store.parent.parent.parent):
        assert folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "go").touch()
    assert finish(process) == (0, "")
    assert not store.parent.exists()


class Attack:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def test_a_stranger_in_the_store_of_several_nodes_is_ignored(tmp_path: Path) -> None:
    """He reads every key, and writes a pickle under each name of torch's dynamic rendezvous."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    script = f"touch {tmp_path}/rank-$RANK-of-$WORLD_SIZE"
    program = write_program(tmp_path, script)
    first = launch(program, 1, 2, SLURM_NODEID="0", **place)
    wait_until(lambda: bool(listeners(first.pid)), first)
    (bound,) = listeners(first.pid)
    assert bound == ("0100007F", port), "it listens on the interface of MASTER_ADDR alone"
    stranger = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=PATIENCE))
    loaded = tmp_path / "loaded"
    state = base64.b64encode(pickle.dumps(Attack(loaded)))
    endpoint = f"127.0.0.1:{port}"
    for name in (endpoint, f"torch.rendezvous.{endpoint}", *stranger.list_keys()):
        if "role_info" not in name:  # he may stop a job from starting, but not run anything
            stranger.set(name, state)
            stranger.set(f"{name}.{endpoint}", state)
    second = launch(program, 1, 2, SLURM_NODEID="1", **place)
    for process in (second, first):
        code, output = finish(process)
        assert code == 0 and "error:" not in output, output  # torch may warn of the lost stranger
    assert (tmp_path / "rank-0-of-2").exists() and (tmp_path / "rank-1-of-2").exists()
    assert not loaded.exists()


def test_the_interface_of_an_address() -> None:
    with listen_on("127.0.0.1", 0) as listener:  # type: ignore[union-attr]
        address, port = listener.getsockname()
        assert address == "127.0.0.1"
        with pytest.raises(RuntimeError, match=f"in use .127.0.0.1:{port}"):
            listen_on("127.0.0.1", port)
    # An address of another machine, as a router may translate it.
    assert listen_on("192.0.2.1", 0) is None


@pytest.mark.parametrize(
    ("ending", "named"),
    [
        ("kill -KILL $$", "was ended by SIGKILL"),
        ("exit 5", "was the first to end, with exit code 5"),
    ],
)
def test_the_rank_that_ends_first_is_named(tmp_path: Path, ending: str, named: str) -> None:
    """The other one fails because the first is gone."""
    pid = tmp_path / "pid"
    script = f"""if [ $RANK = 1 ]; then sleep 2; echo $$ > {pid}; {ending}; fi
while [ ! -e {pid} ]; do sleep 0.05; done
sleep 0.5; exit 1"""
    code, output = finish(launch(write_program(tmp_path, script), 2, 1))
    assert code == 1 and f"error: rank 1 (process {pid.read_text().strip()}) {named}" in output
    assert "rank 0" not in output


def test_all_that_end_with_a_code_of_their_own_are_not_blamed() -> None:
    order = EndOrder()
    order.first = 8
    assert order.describe({0: (7, 2), 1: (8, 2)}) == order.describe({0: (7, 1), 1: (8, 3)}) == []
    assert order.describe({0: (7, 1), 1: (8, 1)})[0].startswith("rank 1 (process 8) was the first")


def test_a_stopped_rank_is_warned_of_and_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Long before the others' collectives give up, and not while a debugger holds it."""
    environ = {**os.environ, "RANK": "3"}
    with subprocess.Popen(["sleep", "600"], env=environ) as child:
        watch = Watch(tmp_path, ClusterProfile(), 4, tmp_path)
        now = 0.0
        watch.clock = lambda: now  # type: ignore[method-assign]
        try:
            assert watch.stopped() == ""
            child.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
            assert watch.stopped() == "" and capsys.readouterr().err == ""
            now = 6.0
            assert watch.stopped() == watch.stopped() == ""
            warning = capsys.readouterr().err
            assert warning.count("rank 3") == 1 and "kill -CONT" in warning
            child.send_signal(signal.SIGCONT)
            os.waitid(os.P_PID, child.pid, os.WCONTINUED)
            now = 31.0
            assert watch.stopped() == ""
            child.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
            assert watch.stopped() == ""
            now = 62.0
            assert watch.stopped() == f"stopped for 31 s: rank 3 (process {child.pid})"
        finally:
            child.kill()


ORPHAN = """
import os, signal, sys, time
from megarecur.train.signals import LAUNCHER_VARIABLE, die_with_launcher
if os.fork() == 0:
    os.environ[LAUNCHER_VARIABLE] = str(os.getppid())
    def stop(*_):
        print("stopped", flush=True)
        os._exit(0)
    signal.signal(signal.SIGTERM, stop)
    die_with_launcher()
    print(os.getpid(), LAUNCHER_VARIABLE in os.environ, flush=True)
    time.sleep(600)
    os._exit(1)
time.sleep(600)
"""


def test_a_rank_is_told_to_stop_when_its_launcher_is_killed() -> None:
    launcher = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    assert launcher.stdout.readline().endswith("False\n")
    launcher.kill()
    assert launcher.stdout.readline() == "stopped\n"
    launcher.wait()
