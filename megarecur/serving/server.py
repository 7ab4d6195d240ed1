"""The server's process: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn

from megarecur.errors import ConfigError
from megarecur.serving.app import make_app
from megarecur.serving.service import Service

BACKLOG = 2048
SECONDS_TO_CLOSE = 5
"""Seconds that connections have to close after the last answer."""


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ConfigError: the port is in use or forbidden, or the host is not an address of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host}: {error}; name an address of this machine") from None
    family, kind, protocol, _, address = found[0]
    opened = socket.socket(family, kind, protocol)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind(address)
        # Listens at once: of two servers that start together, the second one fails here.
        opened.listen(BACKLOG)
    except OSError as error:
        opened.close()
        remedy = {
            errno.EADDRINUSE: "choose another one with --port",
            errno.EACCES: "choose one above 1023 with --port",
            errno.EADDRNOTAVAIL: "name an address of this machine with --host",
        }.get(error.errno or 0, "choose another one with --host and --port")
        raise ConfigError(f"{host}:{port}: {error.strerror}; {remedy}") from None
    return opened


class Server(uvicorn.Server):
    """A server whose first signal lets running requests finish; a second one ends them."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.service, self.ready = service, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections, and say so."""
        await super().startup(sockets)
        self.ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals in the event loop, while it serves."""
        # The library's handlers close the socket at once; then new requests get no answer.
        loop, signals = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self.receive_signal)
        self.service.on_idle = partial(setattr, self, "should_exit", True)
        self.service.start()
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def receive_signal(self) -> None:
        """Refuse new requests; exit when those that run are done, or now if this was said."""
        if self.service.draining:
            self.should_exit = self.force_exit = True
        self.service.drain()


def serve_forever(service: Service, listening: socket.socket, ready: Callable[[], None]) -> int:
    """Serve until a signal; returns the exit code: 0, or 1 if the engine failed.

    Args:
        ready: called once connections are accepted.
    """
    config = uvicorn.Config(
        make_app(service), http="h11", ws="none", lifespan="off", loop="asyncio",
        log_config=None, log_level="warning", access_log=False, server_header=False,
        proxy_headers=False, timeout_graceful_shutdown=SECONDS_TO_CLOSE,
    )  # fmt: skip
    Server(config, service, ready).run(sockets=[listening])
    service.stop()
    return 0 if service.failure is None else 1
