"""Processes on this machine: torchrun's agent starts them, signals reach every one of them."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from megarecur.config.mesh import check_world
from megarecur.config.schema import Config
from megarecur.train.signals import STOP_SIGNALS

USER_ERROR, STOPPED = 2, 3


def launch_local(config: Config, command: Sequence[str], nproc: int, nodes: int = 1) -> int:
    """Run a command of megarecur in nproc processes that know of each other. Returns the exit code:
    the workers' own where they agree.

    Args:
        config: of the run.
        command: the arguments of megarecur.
        nproc: processes on this machine.
        nodes: machines that this is called on, meeting at MASTER_ADDR:MASTER_PORT where they are
            several.

    Raises:
        MeshError: a world that does not fit the config.
    """
    check_world(config, nproc * nodes)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What went wrong is said by the workers; the agent's own account of it is noise.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    threads = max(len(os.sched_getaffinity(0)) // nproc, 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    alone, environ = nodes == 1, os.environ
    endpoint = "127.0.0.1:0" if alone else f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
    settings = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=nproc,
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        # Names of nodes need not be those of hosts, by which torch would decide it.
        rdzv_configs={} if alone else {"is_host": environ.get("SLURM_NODEID", "0") == "0"},
        local_addr="127.0.0.1" if alone else None,
        run_id=str(os.getpid()) if alone else endpoint,
        max_restarts=0,
        monitor_interval=0.1,
        # SIGTERM and SIGINT are ours to forward: the agent would end workers that are saving.
        signals_to_handle="SIGHUP,SIGQUIT",
    )
    try:
        with forward_signals():
            elastic_launch(settings, sys.executable)("-m", "launch.cli", *command)
    except ChildFailedError as error:
        # The agent ends with SIGTERM the workers that are slower to leave than the first.
        codes = {failure.exitcode for failure in error.failures.values()} - {-signal.SIGTERM}
        return codes.pop() if codes in ({USER_ERROR}, {STOPPED}) else 1
    return 0


@contextmanager
def forward_signals() -> Iterator[None]:
    """Pass stop signals on to the workers, which save and end by themselves.

    The agent's own handlers would end the workers after a grace period, saved or not. Signals are
    held back in this process and taken by a thread; workers start with them held back too, so that
    none is lost, or kills, before a worker is ready to note it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=forward_for_ever, daemon=True).start()
    yield


def forward_for_ever() -> None:
    """Send each stop signal to every worker, as soon as there are any."""
    while True:
        number = signal.sigwait(STOP_SIGNALS)
        while not (children := child_processes()):
            time.sleep(0.05)
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def child_processes() -> list[int]:
    """Process ids of this process's children."""
    children: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        children += map(int, (task / "children").read_text().split())
    return children
