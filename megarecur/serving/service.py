"""The engine in a thread of its own, and jobs whose events arrive in the event loop.

One thread steps the engine. After each step it hands all new events to the event loop in one call,
so handlers wait without blocking. Everything else here runs in the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from queue import Empty

from megarecur.checkpoint.load import Run, special_ids
from megarecur.data.tokenizer import Tokenizer
from megarecur.errors import ConfigError, MegarecurError
from megarecur.inference.engine import Engine
from megarecur.inference.generate import encode_prompt
from megarecur.inference.request import Event, Handle, Request, find_route
from megarecur.serving.protocol import RequestError

log = logging.getLogger(__name__)

RETRY_AFTER = 1
"""Seconds after which a client may try again: a text of the queue has probably ended."""


def check_libraries() -> None:
    """Reject the command if its libraries are missing.

    Raises:
        ConfigError: the message names the extra to install.
    """
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"serve needs {' and '.join(missing)}, not installed; pip install 'megarecur[serve]'"
        )


@dataclass(frozen=True)
class Limits:
    """Limits of what a client may ask for."""

    max_queue: int = 256
    """Texts that may wait besides those that run."""
    max_body: int = 1 << 20
    """Bytes of a body."""
    max_new_tokens: int = 4096
    """New tokens of a text."""


@dataclass(eq=False)
class Job:
    """The texts of one request.

    Iterate over `events` for (index of the text, event); `close` when no more are wanted.
    """

    service: Service
    handles: list[Handle] = field(default_factory=list)
    inbox: asyncio.Queue[tuple[int, Event] | None] = field(default_factory=asyncio.Queue)

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """Yield events of all texts until each has ended.

        Raises:
            RequestError: 500, the engine failed.
        """
        left = len(self.handles)
        while left:
            arrived = await self.inbox.get()
            if arrived is None:
                raise RequestError(500, "the engine failed; see the log of the server")
            left -= arrived[1].finished
            yield arrived

    def cancel(self, index: int) -> None:
        """End a text, which frees its pages."""
        self.handles[index].cancel()
        self.service.wake.set()

    def close(self) -> None:
        """End all texts."""
        for handle in self.handles:
            handle.cancel()
        self.service.wake.set()
        self.service.leave(self)


class Service:
    """A run that is served.

    Args:
        engine: the engine over the run's model.
        tokenizer: the run's tokenizer.
        run: the run, for its special tokens.
        name: name of the model for clients.
        limits: limits of requests.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, run: Run, name: str, limits: Limits
    ) -> None:
        self.engine, self.tokenizer, self.name, self.limits = engine, tokenizer, name, limits
        self.bos_id, eos_ids = special_ids(run, tokenizer)
        self.eos_ids = frozenset(eos_ids)
        self.num_loops = find_route(engine.config, engine.max_loops).num_loops
        """Most loops after which a token may be chosen."""
        self.draining = False
        self.failure: BaseException | None = None
        self.on_idle: Callable[[], None] = lambda: None
        """Called in the event loop when the last job has left a service that drains or failed."""
        self.jobs: set[Job] = set()
        self.statuses: Counter[int] = Counter()
        """Answers to requests for completions, by HTTP status; 499: the client left first."""
        self.prompt_tokens = 0
        self.exits: Counter[int] = Counter()
        """New tokens by the loops after which they were chosen."""
        self.wake = threading.Event()
        self.stopped = False
        self._lock = threading.Lock()
        self._alive: dict[Handle, tuple[Job, int]] = {}
        """Texts whose end has not arrived here."""
        # One thread: two would only take the cores of the engine.
        self._encoding = ThreadPoolExecutor(1, "tokenizer")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -------------------------------------------------------------------------- the event loop

    def start(self) -> None:
        """Start the engine's thread; called in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the engine's thread after its current step."""
        self.stopped = True
        self.wake.set()
        self._thread.join()
        self._encoding.shutdown()

    def drain(self) -> None:
        """Refuse new requests, and finish those that run."""
        self.draining = True
        self._report_idle()

    def check_open(self, num_texts: int = 1) -> None:
        """Reject requests that cannot be served now.

        Raises:
            RequestError: 503 when the server stops, 429 when its queue is full, 400 if a request
                has more texts than the queue can ever take.
        """
        if self.draining or self.failure is not None:
            raise RequestError(503, "the server is stopping; try another", code="stopping")
        most = self.engine.max_texts + self.limits.max_queue
        if num_texts > most:
            line = f"the request has {num_texts} texts, more than the {most} of the queue; split it"
            raise RequestError(400, line, param="prompt")
        if len(self._alive) + num_texts > most:
            line = f"the queue of {most} texts is full; try again later"
            raise RequestError(429, line, code="queue_full", retry_after=RETRY_AFTER)

    async def encode(self, prompt: str | list[int]) -> list[int]:
        """Return the ids of a prompt.

        Raises:
            RequestError: 400, the text is not valid Unicode.
        """
        if not isinstance(prompt, str):
            return prompt
        try:
            return await self._loop.run_in_executor(
                self._encoding, encode_prompt, self.tokenizer, prompt, self.bos_id
            )
        except MegarecurError as error:
            raise RequestError(400, str(error), param="prompt") from None

    def submit(self, requests: Sequence[Request]) -> Job:
        """Submit the texts of a request: all of them, or none.

        Raises:
            RequestError: see `check_open`; 400, the engine rejects one.
        """
        self.check_open(len(requests))
        for request in dict.fromkeys(requests):
            try:
                self.engine.check(request)
            except ConfigError as error:
                lines = [line.strip() for line in str(error).splitlines()[1:]]
                raise RequestError(400, "; ".join(lines) or str(error)) from None
        job = Job(self)
        with self._lock:
            for index, request in enumerate(requests):
                handle = self.engine.submit(request)
                job.handles.append(handle)
                self._alive[handle] = job, index
        self.jobs.add(job)
        self.wake.set()
        return job

    def leave(self, job: Job) -> None:
        """Forget a job that was answered or given up."""
        self.jobs.discard(job)
        self._report_idle()

    def _report_idle(self) -> None:
        if not self.jobs and (self.draining or self.failure is not None):
            self.on_idle()

    def _deliver(self, arrived: Sequence[tuple[Job, int, Event]]) -> None:
        for job, index, event in arrived:
            if event.token is not None:
                self.exits[event.loops] += 1
            job.inbox.put_nowait((index, event))

    def _fail(self) -> None:
        for job in self.jobs:
            job.inbox.put_nowait(None)
        self._report_idle()

    # --------------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        try:
            while not self.stopped:
                self.wake.clear()
                busy = self.engine.step()
                if arrived := self._collect():
                    self._loop.call_soon_threadsafe(self._deliver, arrived)
                if not busy:
                    self.wake.wait()
        except BaseException as error:
            log.exception("the engine failed")
            self.failure = error
            self._loop.call_soon_threadsafe(self._fail)

    def _collect(self) -> list[tuple[Job, int, Event]]:
        """Return the events that wait in the queues of texts."""
        arrived = []
        with self._lock:
            for handle, (job, index) in list(self._alive.items()):
                while handle in self._alive:
                    try:
                        event = handle.events.get_nowait()
                    except Empty:
                        break
                    arrived.append((job, index, event))
                    if event.finished:
                        del self._alive[handle]
        return arrived
