"""Rendezvous of a launch's processes, without unpickling what arrives over a port.

Torch's dynamic rendezvous keeps its state as a pickle in a store that anyone who reaches its port
may write, and runs whatever is put there. The number of nodes never changes here, so every place is
known beforehand. On one machine nothing listens at all: the agent is alone, and the ranks meet in a
file of a private folder. Across nodes, the first node's store listens on the interface of the
job's address, and holds numbers and addresses only.

Torch is imported here, so import this module when processes are started.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

from megarecur.parallel.mesh import TIMEOUT, open_store
from megarecur.private import private_folder

BACKEND = "megarecur"
"""Name in torch's registry of rendezvous."""


class FixedRendezvous(RendezvousHandler):
    """The meeting of a fixed number of nodes, each of which knows its place.

    Args:
        address: of the first node; not used by one node alone.
        node: place of this node, from 0.
    """

    def __init__(self, address: str, port: int, node: int, nodes: int) -> None:
        self.address, self.port, self.node, self.nodes = address, port, node, nodes

    def get_backend(self) -> str:
        """Return the name of this kind of rendezvous."""
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """Return True if the ranks use the store of the agents too."""
        return self.nodes > 1

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait until the store can be reached; return it with this node's place."""
        if self.nodes == 1:
            store: dist.Store = dist.HashStore()
        else:
            store = open_store(self.address, self.port, self.nodes, self.node == 0)
        store.set_timeout(TIMEOUT)
        place = RendezvousStoreInfo(self.address, self.port)
        return RendezvousInfo(dist.PrefixStore(BACKEND, store), self.node, self.nodes, place)

    def is_closed(self) -> bool:
        """Return False: one meeting is all there is."""
        return False

    def set_closed(self) -> None:
        """Do nothing, see `is_closed`."""

    def num_nodes_waiting(self) -> int:
        """Return 0: the number of nodes is fixed."""
        return 0

    def get_run_id(self) -> str:
        """Return the name of the meeting."""
        return BACKEND

    def shutdown(self) -> bool:
        """Return True: there is nothing to end."""
        return True


def create_handler(parameters: RendezvousParameters) -> FixedRendezvous:
    """Return the rendezvous of a launch; torch calls this."""
    address, _, port = parameters.endpoint.rpartition(":")
    node = int(parameters.config["node"])
    return FixedRendezvous(address, int(port), node, parameters.max_nodes)


def register() -> str:
    """Make `FixedRendezvous` known to torch; return its name."""
    rendezvous_handler_registry.register(BACKEND, create_handler)
    return BACKEND


@contextmanager
def store_file() -> Iterator[Path]:
    """Make a private folder for the file in which the ranks of one machine meet; yield its path.

    Raises:
        UnsafeFolder: see `private_folder`.
        OSError: it cannot be made.
    """
    with tempfile.TemporaryDirectory(dir=private_folder("meet")) as folder:
        yield Path(folder) / "store"
