"""Fixtures of every test: worlds of processes, a Slurm cluster, and the development data where it
is there."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is imported: tests run tiny products, and several processes at once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from cluster import Cluster, NoCluster
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
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte corpus of real text, `train` (some 9,000 tokens) and `val`, under this folder."""
    from configs import TEXT
    from data_prep.readers import Reading
    from data_prep.shards import prepare_shards

    folder = tmp_path_factory.mktemp("corpus")
    source = folder / "text.txt"
    source.write_text(TEXT, encoding="utf-8")
    prepare_shards(
        [source],
        folder / "bytes",
        "bytes",
        Reading(text_split="blank_line"),
        val_fraction=0.1,
        workers=1,
    )
    return folder / "bytes"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm cluster for tests marked by `on_cluster`; commands and jobs find it, and `megarecur`.

    Where it cannot be made, tests skip and say what is missing.
    """
    try:
        cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    except NoCluster as error:
        pytest.skip(f"no Slurm cluster: {error}")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]:
            patch.delenv(name)  # Of a job that these tests run in.
        patch.setenv("SLURM_CONF", str(cluster.conf))
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        try:
            yield cluster
        finally:
            cluster.close()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The development data: MEGARECUR_DATA, or ../shared/data beside the repository."""
    named = os.environ.get("MEGARECUR_DATA")
    path = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no development data at {path}; set MEGARECUR_DATA to where it lies")
    return path
