"""Run processes on this machine by torchrun's agent, and forward signals to all of them."""

from __future__ import annotations

import itertools
import logging
import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from megarecur.config.mesh import check_world
from megarecur.config.run import Config
from megarecur.files import raise_file_limit
from megarecur.launch.configs import load_run_config
from megarecur.launch.folder import read_beat
from megarecur.launch.inputs import check_inputs, print_unchecked
from megarecur.launch.output import say
from megarecur.launch.profile import ClusterProfile, load_profile
from megarecur.launch.queue import live_jobs
from megarecur.launch.reasons import HINTS, OUT_OF_MEMORY, count_oom_kills
from megarecur.launch.slurm import SlurmError
from megarecur.launch.submit import refuse_jobs, refuse_processes
from megarecur.launch.watchdog import Watchdog, wait_for_stacks
from megarecur.private import SECRET_VARIABLE, make_secret
from megarecur.train.signals import LAUNCHER_VARIABLE, STACKS_VARIABLE, STOP_SIGNALS

USER_ERROR, STOPPED, FAILED = 2, 3, 1
POLL_SECONDS = 0.5
WARN_SECONDS, STOPPED_SECONDS = 5.0, 30.0
"""Seconds after which a stopped rank is reported, and after which the run ends."""
AWAKE_SECONDS = 5.0
"""If the watch is later than this, it was itself stopped, for example by Ctrl-Z."""


def train_local(
    path: Path, overrides: Sequence[str], nproc: int, nodes: int, cluster: str | None
) -> int:
    """Train in nproc processes of this machine; end a run that stalls. Returns the exit code.

    Args:
        nodes: machines that this is called on, which meet at MASTER_ADDR:MASTER_PORT.
        cluster: a profile, whose stall_factor, stall_seconds and start_seconds apply.

    Raises:
        ConfigError: the profile does not exist, the config has conflicts, an input is missing, or
        the run is already running.
    """
    config = load_run_config(path, overrides, nproc * nodes)
    profile = load_profile(cluster) if cluster else ClusterProfile()
    command = ["train", str(path), *overrides]
    if STACKS_VARIABLE in os.environ:  # A supervisor has started this process and watches it.
        return launch_local(config, command, nproc, nodes)
    run_dir = Path(config.run_dir).absolute()
    print_unchecked(check_inputs([config]))
    refuse_processes([run_dir])
    with suppress(SlurmError):  # Without Slurm, the lease of the run folder suffices.
        if jobs := live_jobs([run_dir]):
            raise refuse_jobs(run_dir, [job for _, job in jobs])
    with watched(run_dir, profile, nproc) as watch:
        code = launch_local(config, command, nproc, nodes, lambda: watch.killed)
    return FAILED if watch.stalled else code


class Watch:
    """A thread that ends the processes of a stalled run, and reports the silent ones.

    A stopped rank (SIGSTOP) has the run end sooner: it will not go on by itself, and the others
    wait for it.
    """

    def __init__(self, run_dir: Path, profile: ClusterProfile, nproc: int, stacks: Path) -> None:
        self.nproc, self.stacks = nproc, stacks
        self.stalled = self.killed = False
        self.over = threading.Event()
        self.awake, self.looked = 0.0, time.monotonic()
        self.since: dict[int, float] = {}
        """Moment at which each stopped process was first seen stopped."""
        self.warned = False
        self.watchdog = Watchdog(profile, lambda: read_beat(run_dir), self.clock)

    def clock(self) -> float:
        """Return the seconds that this process was awake: a run stopped by Ctrl-Z has not
        stalled."""
        now = time.monotonic()
        self.awake += min(now - self.looked, AWAKE_SECONDS)
        self.looked = now
        return self.awake

    def run(self) -> None:
        """Watch until the processes have ended."""
        while not self.over.wait(POLL_SECONDS):
            stall = self.watchdog.stalled() or self.stopped()
            workers = ranks_of_children() if stall else {}
            if not workers:
                continue
            self.stalled = not self.watchdog.over
            if self.stalled:
                self.report(stall, workers)
            self.killed = True
            for pid in workers.values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def stopped(self) -> str:
        """Return which ranks are stopped, once they have been for long; warn before that."""
        now, workers = self.clock(), ranks_of_children()
        stopped = {rank: pid for rank, pid in workers.items() if is_stopped(pid)}
        self.since = {pid: self.since.get(pid, now) for pid in stopped.values()}
        named = ", ".join(f"rank {rank} (process {pid})" for rank, pid in sorted(stopped.items()))
        longest = max((now - since for since in self.since.values()), default=0.0)
        if longest < WARN_SECONDS:
            self.warned = False
        elif not self.warned:
            self.warned = True
            say(
                f"warning: stopped by a signal: {named}; `kill -CONT` lets it go on, else the run "
                f"ends in {STOPPED_SECONDS - WARN_SECONDS:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        return f"stopped for {longest:.0f} s: {named}" if longest >= STOPPED_SECONDS else ""

    def report(self, stall: str, workers: dict[int, int]) -> None:
        """Let every process write its stacks, and print which did not."""
        for pid in workers.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGQUIT)
        silent = wait_for_stacks(self.stacks, self.nproc)
        named = ", ".join(f"rank {rank} ({describe_process(workers.get(rank))})" for rank in silent)
        say(
            f"error: {stall}; {f'silent: {named}' if silent else 'every rank answered'}; "
            f"stacks in {self.stacks}",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def watched(run_dir: Path, profile: ClusterProfile, nproc: int) -> Iterator[Watch]:
    """Watch the processes started in this context."""
    name = f"local-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    stacks = make_folder(run_dir / "logs" / name)
    os.environ[STACKS_VARIABLE] = str(stacks)
    watch = Watch(run_dir, profile, nproc, stacks)
    # Otherwise the thread would receive, and die of, signals meant for the workers.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.over.set()
        thread.join()
        del os.environ[STACKS_VARIABLE]
        with suppress(FileNotFoundError):  # the folder may have been deleted during the run
            if not any(file.stat().st_size for file in stacks.iterdir()):
                shutil.rmtree(stacks, ignore_errors=True)


def make_folder(path: Path) -> Path:
    """Create a folder and return its path; with a number behind its name if there is one already.

    That takes a clock that was set back, and a container in which process ids repeat.
    """
    for number in itertools.count(2):
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            path = path.with_name(f"{path.name.partition('.')[0]}.{number}")
    raise AssertionError("the count has no end")


def ranks_of_children() -> dict[int, int]:
    """Return the process ids of this process's training children, by rank."""
    found = {}
    for pid in child_processes():
        with suppress(OSError):
            for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if variable.startswith(b"RANK="):
                    found[int(variable[5:])] = pid
    return found


def describe_process(pid: int | None) -> str:
    """Return the id of a process, and whether it is stopped."""
    if pid is None:
        return "gone"
    if state := process_state(pid):
        return f"process {pid}{', stopped' if state in 'Tt' else ''}"
    return f"process {pid}, gone"


def is_stopped(pid: int) -> bool:
    """Return True if a signal has stopped a process; False if a debugger has."""
    return process_state(pid) == "T"


def process_state(pid: int) -> str:
    """Return the letter of a process's state; "" if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def launch_local(
    config: Config,
    command: Sequence[str],
    nproc: int,
    nodes: int = 1,
    told: Callable[[], bool] = lambda: False,
) -> int:
    """Run a command of megarecur in nproc processes of one world. Returns the exit code: the
    workers' own if they agree.

    Args:
        nodes: machines that this is called on; several meet at MASTER_ADDR:MASTER_PORT.
        told: True if it was already reported that workers were killed.

    Raises:
        MeshError: the world does not fit the config.
    """
    check_world(config, nproc * nodes)
    raise_file_limit()  # the store of all nodes may be in this process
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from megarecur.launch.rendezvous import register, store_file
    from megarecur.parallel.mesh import STORE_VARIABLE

    # The workers report errors; the agent's own report is noise.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    threads = max(len(os.sched_getaffinity(0)) // nproc, 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    alone, environ = nodes == 1, os.environ
    # Alone, the ranks meet in a file, and torch only hands the address on.
    endpoint = "127.0.0.1:1" if alone else f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}"
    settings = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=nproc,
        rdzv_backend=register(),
        rdzv_endpoint=endpoint,
        rdzv_configs={"node": 0 if alone else environ.get("SLURM_NODEID", "0")},
        local_addr="127.0.0.1" if alone else None,
        run_id=str(os.getpid()) if alone else endpoint,
        max_restarts=0,
        monitor_interval=0.1,
        # This process forwards SIGTERM and SIGINT; the agent would end workers that are saving.
        signals_to_handle="SIGHUP,SIGQUIT",
    )
    oom_kills = count_oom_kills()
    ends = EndOrder()
    try:
        with ExitStack() as stack:
            environ[LAUNCHER_VARIABLE] = str(os.getpid())
            stack.callback(environ.pop, LAUNCHER_VARIABLE, None)
            if alone:
                if SECRET_VARIABLE not in environ:  # Nodes share that of their supervisor.
                    environ.update(make_secret())
                    stack.callback(environ.pop, SECRET_VARIABLE, None)
                environ[STORE_VARIABLE] = str(stack.enter_context(store_file()))
                stack.callback(environ.pop, STORE_VARIABLE, None)
                # By default both listen on the interface that the host's name stands for.
                for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                    environ.setdefault(variable, "lo")
            stack.enter_context(forward_signals())
            stack.enter_context(ends)  # Its thread starts with the signals blocked.
            elastic_launch(settings, sys.executable)("-m", "megarecur.launch.cli", *command)
    except ChildFailedError as error:
        codes_of = {rank: (end.pid, end.exitcode) for rank, end in error.failures.items()}
        kills = describe_kills(codes_of, count_oom_kills() - oom_kills)
        for line in [] if told() else kills or ends.describe(codes_of):
            say(f"error: {line}", file=sys.stderr, flush=True)
        # The agent sends SIGTERM to workers that end later than the first.
        codes = {failure.exitcode for failure in error.failures.values()} - {-signal.SIGTERM}
        return codes.pop() if codes in ({USER_ERROR}, {STOPPED}) else 1
    return 0


class EndOrder:
    """A thread that notes which rank ends first: the others fail because it is gone."""

    def __init__(self) -> None:
        self.first: int | None = None
        """Process id."""
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def watch(self) -> None:
        """Wait for the first of the children to end, by descriptors of the processes."""
        poll, known = select.poll(), dict[int, int]()
        try:
            while self.first is None and not self.over.is_set():
                for pid in set(ranks_of_children().values()) - set(known.values()):
                    with suppress(OSError):
                        descriptor = os.pidfd_open(pid)
                        known[descriptor] = pid
                        poll.register(descriptor, select.POLLIN)
                ended = poll.poll(1000 * POLL_SECONDS)
                self.first = known[ended[0][0]] if ended else None
        finally:
            for descriptor in known:
                os.close(descriptor)

    def describe(self, ends: Mapping[int, tuple[int, int]]) -> list[str]:
        """Name the rank that ended first, if others may have failed because of it.

        Args:
            ends: as in `describe_kills`.
        """
        return [
            f"rank {rank} (process {pid}) was the first to end, with exit code {code}; the errors "
            "of the others may follow from that"
            for rank, (pid, code) in ends.items()
            if pid == self.first and code > 0 and code not in (USER_ERROR, STOPPED)
        ]

    def __enter__(self) -> EndOrder:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()


def describe_kills(ends: Mapping[int, tuple[int, int]], oom_kills: int) -> list[str]:
    """Describe which workers were killed, since they could not report it themselves.

    Args:
        ends: process id and exit code by rank; the agent itself sends SIGTERM to the others.
        oom_kills: processes that the kernel killed for memory meanwhile.
    """
    lines = []
    for rank, (pid, code) in sorted(ends.items()):
        if code >= 0 or code == -signal.SIGTERM:
            continue
        number = signal.Signals(-code)
        if oom_kills and number == signal.SIGKILL:
            why = f": {OUT_OF_MEMORY}, the kernel killed it"
        else:
            why = f", {HINTS[number]}" if number in HINTS else ""
        lines.append(f"rank {rank} (process {pid}) was ended by {number.name}{why}")
    return lines


@contextmanager
def forward_signals() -> Iterator[None]:
    """Forward stop signals to the workers, which save and end by themselves.

    The agent's own handlers would end the workers after a grace period, saved or not. Signals are
    blocked in this process and received by a thread. Workers start with them blocked too, so that
    no signal is lost, or kills a worker, before it handles signals.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=forward_for_ever, daemon=True).start()
    yield


def forward_for_ever() -> None:
    """Forward each stop signal to every worker, once there are any."""
    while True:
        number = signal.sigwait(STOP_SIGNALS)
        while not (children := child_processes()):
            time.sleep(0.05)
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def child_processes() -> list[int]:
    """Return the process ids of this process's children."""
    children: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        children += map(int, (task / "children").read_text().split())
    return children
