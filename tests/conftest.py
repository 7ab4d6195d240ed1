"""Fixtures of every test: worlds of processes, a Slurm cluster, and the development data where it
is there."""

import multiprocessing.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

# Before torch is imported, and whatever the shell says: tests run tiny products, and several
# processes at once. With two threads each, exports of tiny models took nine times as long.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import typer.main
from hypothesis import HealthCheck, settings
from support.cluster import Cluster, NoCluster
from support.harness import World
from support.once import make_once

# A shared machine may stall: no drawn example fails for its time.
settings.register_profile("megarecur", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("megarecur")

# Tests run hundreds of commands in this process: the tree of commands and options is built once.
typer.main.get_command = cache(typer.main.get_command)


@pytest.hookimpl(trylast=True)  # After tests were deselected.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that wait first: those of Slurm, then the other ones of launching.

    `make` lets workers steal from the ends of each other's lists. One worker then starts the only
    Slurm cluster and spends its time waiting for jobs, one after the other, while the rest
    compute; a long test of Slurm that came last would leave the machine idle.
    """

    def rank(item: pytest.Item) -> int:
        if is_slurm(item):
            return 0
        return 1 if "launch" in item.path.parts else 2

    items.sort(key=rank)
    if any(item.get_closest_marker("cuda") for item in items) and not has_cuda():
        skip = pytest.mark.skip(reason="needs a CUDA device; torch finds none here")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)  # Before fixtures start a cluster.
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let tests that compute give way to jobs of Slurm: those wait for each other, and are timed.

    Any worker may meet the tests of Slurm, first or by stealing them. A worker that has given way
    gets its priority back where it runs as root; elsewhere its jobs take longer.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ or not is_slurm(item.session.items[0]):
        return
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, 0 if is_slurm(item) else 10)


def is_slurm(item: pytest.Item) -> bool:
    """Return True if a test runs jobs on a Slurm cluster."""
    return item.get_closest_marker("slurm") is not None


def has_cuda() -> bool:
    """Return True if torch finds a CUDA device."""
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """`world(4).run(case, ...)`: worlds by size, each started by its first case and then kept."""
    # Before a test replaces the folder of temporary files: paths of sockets must be short.
    multiprocessing.util.get_temp_dir()
    worlds: dict[int, World] = {}

    def of_size(size: int) -> World:
        return worlds.setdefault(size, World(size))

    yield of_size
    for each in worlds.values():
        each.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors of tiny models only wait for each other's threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte corpus of real text, `train` (some 9,000 tokens) and `val`, under this folder.

    `MEGARECUR_TEST_CORPUS` names one that is made already, where streaming is not installed.
    """
    from support.configs import write_corpus

    if made := os.environ.get("MEGARECUR_TEST_CORPUS"):
        return Path(made)
    return make_once(tmp_path_factory, "corpus", lambda to: write_corpus(to / "bytes")) / "bytes"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm cluster; where it cannot be made, tests skip and say what is missing."""
    try:
        made = Cluster(tmp_path_factory.mktemp("slurm"))
    except NoCluster as error:
        pytest.skip(f"no Slurm cluster: {error}")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def slurm(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster for tests marked by `on_cluster`; commands and jobs find it, and `megarecur`.

    Later tests of the process do not: most of them run without Slurm.
    """
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)  # Of a job that these tests run in.
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    return cluster


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The development data: MEGARECUR_DATA, or ../shared/data beside the repository."""
    named = os.environ.get("MEGARECUR_DATA")
    path = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no development data at {path}; set MEGARECUR_DATA to where it lies")
    return path
