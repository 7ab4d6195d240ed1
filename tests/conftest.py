"""Fixtures of every test: worlds of processes, and the development data where it is there."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import World


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """`world(4).run(case, ...)`: worlds by size, each started by its first case and then kept."""
    worlds: dict[int, World] = {}

    def of_size(size: int) -> World:
        return worlds.setdefault(size, World(size))

    yield of_size
    for each in worlds.values():
        each.close()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The development data: MEGARECUR_DATA, or ../shared/data beside the repository."""
    named = os.environ.get("MEGARECUR_DATA")
    path = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no development data at {path}; set MEGARECUR_DATA to where it lies")
    return path
