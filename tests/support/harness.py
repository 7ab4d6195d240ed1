"""A world of processes, started once, that runs many cases; and how gradients are compared.

    def case(x):                         # a function of a test module: sent by name, not by value
        return dist.get_rank() * x

    def test_case(world):
        assert world(4).run(case, 10) == [0, 10, 20, 30]

Importing torch costs seconds per process, so ranks are forked from one server that has done it.
A case that fails or hangs names its ranks, with tracebacks or stacks; the world then restarts.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

STACKS = signal.SIGRTMIN  # not among the signals that training answers to
CASE_TIMEOUT = 600.0
"""Seconds of a case: minutes pass on a busy machine where a quiet one needs seconds."""
GROUP_TIMEOUT = timedelta(seconds=CASE_TIMEOUT)
GRACE_SECONDS = 2.0  # for the other ranks, once one has failed
SETTLE_SECONDS = 0.3  # for a rank to write its stacks


PRELOADED = [
    "hypothesis.strategies",
    "pytest",
    "megarecur.train.trainer",
    "torch._dynamo",  # recomputation and DeepSpeed import it: 1.4 s per rank
    "tensorboard.backend.event_processing.event_accumulator",
]


def fork_context() -> ForkServerContext:
    """Return the context whose server has imported PRELOADED. The server starts with its first
    process, and one that was started otherwise would leave the imports to each process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class WorldError(AssertionError):
    """A case failed on some ranks."""


class World:
    """`size` processes in one gloo group over loopback; started by the first case, then reused."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.pids: list[int] = []
        self._ranks: list[tuple[BaseProcess, Connection]] = []
        self._folder = Path()

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = CASE_TIMEOUT
    ) -> list[Any]:
        """Call `function(*args)` on every rank and return the results by rank.

        Raises WorldError, with what each rank has to say, if any raises, dies or takes longer than
        `timeout` seconds; the next case then gets a fresh world.
        """
        self.submit(function, *args)
        outcomes = self.collect(timeout)
        if any(error for error, _ in outcomes):
            text = "\n".join(
                f"--- rank {rank} of {self.size}: {error or 'done'}"
                for rank, (error, _) in enumerate(outcomes)
            )
            raise WorldError(f"{function.__name__} failed\n{text}")
        return [value for _, value in outcomes]

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        """Start a case; `pids` are then the processes of the ranks."""
        if not self._ranks:
            self._start()
        message = pickle.dumps((function, args))
        for _, connection in self._ranks:
            connection.send_bytes(message)

    def collect(self, timeout: float, grace: float = GRACE_SECONDS) -> list[tuple[str, Any]]:
        """Wait for the case: (error, "" if none; result) by rank. Restarts the world on errors,
        which leave the other ranks `grace` seconds."""
        outcomes: dict[int, tuple[str, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(outcomes) < self.size and time.monotonic() < deadline:
            pending = {r: self._ranks[r] for r in range(self.size) if r not in outcomes}
            handles = [h for process, c in pending.values() for h in (c, process.sentinel)]
            ready = wait(handles, timeout=max(0.0, deadline - time.monotonic()))
            for rank, (process, connection) in pending.items():
                if connection in ready:
                    try:
                        outcomes[rank] = pickle.loads(connection.recv_bytes())
                        continue
                    except (EOFError, ConnectionError):
                        process.join(1)
                if connection in ready or process.sentinel in ready:
                    outcomes[rank] = (f"died with exit code {process.exitcode}", None)
            if any(error for error, _ in outcomes.values()):
                deadline = min(deadline, time.monotonic() + grace)
        if len(outcomes) < self.size:
            outcomes |= self._stacks_of_pending(outcomes)
        if any(error for error, _ in outcomes.values()):
            for rank, (error, _) in outcomes.items():
                if error:
                    outcomes[rank] = (error + self._log_of(rank), None)
            self.close()
        return [outcomes[rank] for rank in range(self.size)]

    def close(self) -> None:
        """End the processes of this world; a later case starts new ones."""
        for _, connection in self._ranks:
            connection.close()  # a rank that waits for a case leaves when this end is gone
        for process, _ in self._ranks:
            process.join(0.5)
            if process.is_alive():
                process.kill()
                process.join()
        if self._ranks:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._ranks, self.pids = [], []

    def _start(self) -> None:
        context = fork_context()
        self._folder = Path(tempfile.mkdtemp(prefix="world-"))
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, self._folder, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
        self.pids = [process.pid or 0 for process, _ in self._ranks]

    def _stacks_of_pending(self, outcomes: dict[int, Any]) -> dict[int, tuple[str, Any]]:
        pending = [rank for rank in range(self.size) if rank not in outcomes]
        for rank in pending:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[rank], STACKS)
        time.sleep(SETTLE_SECONDS)
        return {
            rank: ("still running\n" + _tail(self._folder / f"stacks-{rank}"), None)
            for rank in pending
        }

    def _log_of(self, rank: int) -> str:
        log = _tail(self._folder / f"log-{rank}")
        return f"\n(its output ends)\n{log}" if log else ""


def _tail(path: Path, length: int = 6000) -> str:
    return path.read_text(errors="replace")[-length:] if path.exists() else ""


def _serve(rank: int, size: int, folder: Path, connection: Connection) -> None:
    """Answer cases until the other end is closed."""
    log = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    stacks = open(folder / f"stacks-{rank}", "w")  # noqa: SIM115 (lives as long as the process)
    faulthandler.register(STACKS, file=stacks, all_threads=True)
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo", RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    home = os.getcwd()
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=GROUP_TIMEOUT)
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, ConnectionError):
            os._exit(0)  # without waiting for peers that may be gone
        try:
            os.chdir(home)
            function, args = pickle.loads(message)
            answer = pickle.dumps(("", function(*args)))
        except BaseException:
            answer = pickle.dumps((traceback.format_exc(), None))
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send_bytes(answer)


def assert_gradients_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tol: float
) -> None:
    """Assert ‖g − g₀‖ ≤ tol · max(‖g₀‖, 1e-3 · ‖G‖) for every name, G being all of `expected`.

    Norms are of fp64. Compare raw gradients, before clipping and stepping: Adam hides scale.
    """
    assert actual.keys() == expected.keys(), (
        f"missing {sorted(expected.keys() - actual.keys())}, "
        f"unexpected {sorted(actual.keys() - expected.keys())}"
    )
    norms = {name: g.detach().double().norm().item() for name, g in expected.items()}
    floor = 1e-3 * sum(norm**2 for norm in norms.values()) ** 0.5
    errors = {}
    for name, reference in expected.items():
        assert actual[name].shape == reference.shape, (
            f"{name}: shape {tuple(actual[name].shape)}, expected {tuple(reference.shape)}"
        )
        difference = actual[name].detach().double() - reference.detach().double()
        scale = max(norms[name], floor)
        distance = difference.norm().item()
        errors[name] = distance / scale if scale else (0.0 if distance == 0 else float("inf"))
    wrong = {name: e for name, e in errors.items() if not e <= tol}  # so that NaN is wrong
    worst = sorted(wrong, key=lambda name: (wrong[name] == wrong[name], -wrong[name]))[:10]
    assert not wrong, f"{len(wrong)} of {len(errors)} gradients differ by more than {tol}:\n" + (
        "\n".join(f"  {name}: {wrong[name]:.3g} (norm {norms[name]:.3g})" for name in worst)
    )


Trace = list[tuple[float, dict[str, Tensor], float, bool]]
"""(loss, raw gradients, norm, skipped) of each optimizer step."""


def compare(actual: Trace, expected: Trace, first: float = 2e-6, later: float = 2e-5) -> None:
    """Losses, gradients and norms of every step, by design.md's measure."""
    assert len(actual) == len(expected)
    for step, (a, e) in enumerate(zip(actual, expected, strict=True)):
        tolerance = later if step else first
        assert abs(a[0] - e[0]) <= tolerance * abs(e[0]), f"loss of step {step}: {a[0]} {e[0]}"
        assert_gradients_close(a[1], e[1], tolerance)
        assert abs(a[2] - e[2]) <= tolerance * abs(e[2]), f"norm of step {step}: {a[2]} {e[2]}"
        assert a[3] == e[3]
