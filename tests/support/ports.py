"""Ports on which processes listen, from the kernel's tables."""

from __future__ import annotations

import os
from pathlib import Path

LISTENING = "0A"
LOOPBACK = "0100007F"
"""127.0.0.1, as the kernel writes it."""


def listeners(pid: int) -> list[tuple[str, int]]:
    """(address as the kernel writes it, port) of each socket on which a process listens."""
    own = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            own.add(os.readlink(link))
        except FileNotFoundError:
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTENING and f"socket:[{words[9]}]" in own:
                address, _, port = words[1].rpartition(":")
                found.append((address, int(port, 16)))
    return found
