"""Run the tasks of a phase of work over processes that live as long as the work."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any

from megarecur.data_prep.progress import ProgressReport, report_phase
from megarecur.errors import DataError
from megarecur.reading import escape_logs


class Workers:
    """A pool that runs tasks whose results are files; existing results are not made again.

    Args:
        number: processes; with 1, tasks run in this one.
    """

    def __init__(self, number: int, progress: ProgressReport | None) -> None:
        self.number, self.progress = number, progress
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(
        self,
        name: str,
        do: Callable[[Any], int],
        tasks: Sequence[Any],
        suffix: str,
        sizes: Sequence[int],
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Run one phase.

        Args:
            do: runs a task and returns its number of tokens.
            suffix: suffix of the target's file that exists once a task is done.
            meanwhile: a function that this process runs while others work; it must not fail.
        """
        todo, done = [], 0
        for task, size in zip(tasks, sizes, strict=True):
            if task.target.with_suffix(suffix).exists():
                done += size
            else:
                todo.append((task, size))
        inline = self.number == 1 or len(todo) <= 1
        if not inline:
            self._start()  # before a progress bar and its thread exist
        with report_phase(self.progress, name, sum(sizes)) as advance:
            advance(done, resumed=True)
            if inline:
                for task, size in todo:
                    advance(size, do(task))
                return
            beside = threading.Thread(target=meanwhile)
            beside.start()
            try:
                for size, tokens in self._distribute(do, todo):
                    advance(size, tokens)
            finally:
                beside.join()

    def _start(self) -> None:
        """Start the processes, by a fork if that is quick and safe: no threads, no torch."""
        if self._pool is not None:
            return
        alone = threading.active_count() == 1 and "torch" not in sys.modules
        method = "fork" if alone and sys.platform == "linux" else "spawn"
        self._pool = ProcessPoolExecutor(
            self.number,
            mp_context=multiprocessing.get_context(method),
            initializer=end_with_parent,
        )
        self._pool.submit(os.getpid)

    def _distribute(
        self, do: Callable[[Any], int], todo: Sequence[tuple[Any, int]]
    ) -> Iterator[tuple[int, int]]:
        """Yield (size, result) of each task as it ends."""
        assert self._pool is not None
        waiting = iter(todo)
        running: dict[Future[int], int] = {}
        try:
            while True:
                for task, size in waiting:
                    running[self._pool.submit(do, task)] = size
                    if len(running) >= 4 * self.number:
                        break
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise DataError(
                "a worker process was killed, perhaps for lack of memory; run again with fewer "
                "--workers; finished work is kept"
            ) from None


def end_with_parent() -> None:
    """End this worker when its parent has ended; it would wait for tasks forever.

    Its warnings are escaped as those of its parent are.
    """
    escape_logs()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
