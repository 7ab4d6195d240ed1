"""What several workers of pytest need, made by the first of them that asks."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that `make` has filled, once per run of pytest; only read from it.

    Others wait for the worker that makes it. A worker that fails leaves it to the next one, which
    is given an empty folder of another name.
    """
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    own = shared / f"once-{name}"
    own.mkdir(exist_ok=True)
    with (own / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (done := own / "done").exists():
            folder = own / f"made-{len(list(own.glob('made-*')))}"
            folder.mkdir()
            make(folder)
            done.write_text(folder.name)
        return own / done.read_text()
