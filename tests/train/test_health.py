"""The health check before training: who is named, for what, and when it is not run at all."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.configs import make_config

from megarecur.config.run import Config
from megarecur.config.train import HealthConfig
from megarecur.errors import DataError, MegarecurError, MeshError
from megarecur.parallel.mesh import Mesh, agree_on_devices, build_mesh
from megarecur.progress import WAITING
from megarecur.train import health
from megarecur.train.health import Figures, check_health, find_faults, find_slow, ring_rounds
from megarecur.train.trainer import FINISHED, train

SLEEP = 0.08


def break_rank(fault: str, patch: pytest.MonkeyPatch) -> None:
    """Plant a fault in this process."""
    multiply, links = health.multiply, health.exchange

    def slow_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        time.sleep(SLEEP)
        return multiply(a, b)

    def wrong_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = multiply(a, b)
        product[7, 3] += 1
        return product

    def no_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: unspecified launch failure\nlong advice")

    def slow_link(tensor: torch.Tensor, found: torch.Tensor, peer: int) -> None:
        time.sleep(SLEEP)
        links(tensor, found, peer)

    def wrong_sum(tensor: torch.Tensor, *rest: Any) -> float:
        seconds = time_all_reduce(tensor, *rest)
        tensor[5] = 1.5
        return seconds

    time_all_reduce = health.time_best
    listed = os.listdir
    plants: dict[str, tuple[Any, str, Any]] = {
        "slow product": (health, "multiply", slow_product),
        "wrong product": (health, "multiply", wrong_product),
        "no product": (health, "multiply", no_product),
        "slow link": (health, "exchange", slow_link),
        "no disk": (health, "free_disk", lambda path: 5_000_000),
        "no shard": (
            os,
            "listdir",
            lambda path: [name for name in listed(path) if name != "shard.00000.mds"],
        ),
        "no run folder": (health, "free_disk", lambda path: shutil.disk_usage("/nowhere").free),
    }
    patch.setattr(*plants[fault])


def check(
    config: Config, hosts: list[str], faults: dict[int, list[str]], patience: float = 30.0
) -> tuple[str, str]:
    """(line, error) of one check on this rank, with faults planted by rank."""
    mesh = build_mesh(config, torch.device("cpu"))
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    with pytest.MonkeyPatch.context() as patch:
        for fault in faults.get(mesh.rank, ()):
            break_rank(fault, patch)
        try:
            return check_health(config, run_dir, mesh, hosts[mesh.rank], patience), ""
        except MegarecurError as error:
            return "", f"{type(error).__name__}: {error}"


PAIR = ["vn1", "vn2"]
QUAD = ["vn1", "vn1", "vn2", "vn2"]


@pytest.fixture
def checked(world, corpus, tmp_path) -> Callable[..., tuple[str, str, dict[str, Any]]]:
    """Check a world of fake nodes: (rank 0's line, the one error, health.json)."""

    def run(
        hosts: list[str], faults: dict[int, list[str]] | None = None, **settings: Any
    ) -> tuple[str, str, dict[str, Any]]:
        # On a busy machine the chance alone may make a product twice as slow.
        settings = {"slow_factor": 10.0, "min_free_disk_gb": 0.01, **settings}
        config = make_config(corpus, run_dir=str(tmp_path / "run"), health=settings)
        found = world(len(hosts)).run(check, config, hosts, faults or {})
        assert len({error for _, error in found}) == 1, found
        written = tmp_path / "run" / "health.json"
        text = json.loads(written.read_text()) if written.exists() else {}
        return *found[0], text

    return run


def test_a_healthy_world_passes_within_seconds(checked) -> None:
    line, error, found = checked(QUAD)
    assert not error and line.startswith("health: 4 processes on 2 nodes, "), error
    for what in ("matrix product", "within nodes", "between nodes", "across all", "free disk"):
        assert what in line
    assert found["seconds"] < 5 and abs(found["time"] - time.time()) < 60
    assert found["nodes"].keys() == {"vn1", "vn2"} and found["allreduce_seconds"] > 0
    for node in found["nodes"].values():
        assert node["faults"] == [] and node["free_disk_bytes"] > 0
        assert min(node[f"{name}_seconds"] for name in ("gemm", "allreduce", "link")) > 0


def test_a_slow_rank_is_named_and_stops_the_run_only_if_so_wished(checked) -> None:
    slow = {3: ["slow product"]}
    line, error, found = checked(QUAD, slow)
    assert line and not error
    assert found["nodes"]["vn1"]["slow"] == found["nodes"]["vn2"]["faults"] == []
    (text,) = found["nodes"]["vn2"]["slow"]
    assert "a matrix product took" in text and "the job's median is" in text
    assert found["nodes"]["vn2"]["gemm_seconds"] >= SLEEP > found["nodes"]["vn1"]["gemm_seconds"]

    _, error, found = checked(QUAD, slow, on_slow="stop")
    assert error.startswith("MeshError: ") and "\n  vn2 (rank 3): a matrix product took" in error
    assert found["nodes"]["vn2"]["faults"] and not found["nodes"]["vn1"]["faults"]


def test_the_slower_of_two_processes_is_named(checked) -> None:
    _, error, _ = checked(PAIR, {0: ["slow product"]}, on_slow="stop")
    assert "vn1 (rank 0): a matrix product took" in error and "vn2" not in error


def test_a_slow_connection_is_told_from_those_of_its_neighbours(checked) -> None:
    hosts = ["vn1", "vn2", "vn3", "vn4"]
    _, error, _ = checked(hosts, {2: ["slow link"]}, on_slow="stop")
    assert "vn3 (rank 2): an exchange with the faster of its neighbouring nodes took" in error
    assert "1 fault;" in error


def test_a_wrong_product_is_an_error_on_every_rank(checked) -> None:
    _, error, found = checked(PAIR, {1: ["wrong product"]})
    assert "vn2 (rank 1): 1 of 320 rows of a product of small integers came out wrong" in error
    assert found["nodes"]["vn2"]["faults"] and not found["nodes"]["vn1"]["faults"]


def test_shards_that_one_node_does_not_see(checked, corpus) -> None:
    _, error, found = checked(QUAD, {2: ["no shard"], 3: ["no shard"]})
    assert error.startswith("DataError: ") and "vn1" not in error
    for name in ("train", "val"):
        assert f"vn2 (ranks 2-3): {corpus}/{name}: shard.00000.mds missing; copy" in error
    assert len(found["nodes"]["vn2"]["faults"]) == 2


def test_a_disk_that_is_too_small(checked) -> None:
    _, error, found = checked(PAIR, {1: ["no disk"]})
    assert "vn2 (rank 1): run_dir=" in error
    assert "has 0.005 GB left, less than health.min_free_disk_gb=0.01" in error
    assert found["nodes"]["vn2"]["free_disk_bytes"] == 5_000_000


def test_all_faults_of_all_nodes_are_in_one_message(checked) -> None:
    faults = {
        0: ["no product"],
        1: ["wrong product"],
        2: ["no disk", "no shard"],
        3: ["wrong product"],
    }
    _, error, found = checked(QUAD, faults)
    assert error.startswith("MeshError: the health check before training found 5 faults;")
    for part in (
        "vn1 (rank 0): a matrix product on cpu failed (CUDA error: unspecified launch failure);",
        "vn1 (rank 1), vn2 (rank 3): 1 of 320 rows",
        "vn2 (ranks 2-3): run_dir=",
        "/train: shard.00000.mds missing",
        "/val: shard.00000.mds missing",
    ):
        assert part in error, error
    assert [len(node["faults"]) for node in found["nodes"].values()] == [2, 4]


def test_a_run_folder_that_one_node_does_not_see(checked) -> None:
    _, error, _ = checked(PAIR, {1: ["no run folder"]})
    assert "vn2 (rank 1): run_dir=" in error and "choose a folder that all nodes share" in error


@pytest.mark.parametrize(
    ("hosts", "enabled", "runs"),
    [
        (["vn1"] * 2, "auto", False),
        (PAIR, "auto", True),
        (PAIR, False, False),
        (["a"] * 2, True, 1),
    ],
)
def test_when_it_runs(checked, hosts, enabled, runs) -> None:
    faults = {1: [] if runs else ["wrong product"]}
    line, error, found = checked(hosts, faults, enabled=enabled)
    assert not error and bool(line) == bool(found) == bool(runs)


def test_one_process_looks_at_disk_and_corpora_only(corpus, tmp_path, monkeypatch) -> None:
    def config(**settings: Any) -> Config:
        return make_config(corpus, run_dir=str(tmp_path), health=settings)

    monkeypatch.setattr(health, "multiply", None)
    assert check_health(config(), tmp_path, Mesh()) == ""
    line = check_health(config(enabled=True, min_free_disk_gb=0), tmp_path, Mesh(), "vn1")
    assert line.startswith("health: 1 process on 1 node, 0.0 s, free disk ")
    with pytest.raises(MeshError, match=r"health.min_free_disk_gb=1e\+09; free some space"):
        check_health(config(enabled=True, min_free_disk_gb=1e9), tmp_path, Mesh())
    gone = {"train": [{"path": str(tmp_path / "gone")}]}
    lost = make_config(corpus, data=gone, health={"enabled": True, "min_free_disk_gb": 0})
    with pytest.raises(DataError, match="gone: there is no corpus"):
        check_health(lost, tmp_path, Mesh())
    remote = {"train": [{"path": str(tmp_path / "cache"), "remote": "s3://bucket/x"}], "val": []}
    away = make_config(corpus, data=remote, health={"enabled": True, "min_free_disk_gb": 0})
    assert check_health(away, tmp_path, Mesh())


def train_on(config: Config, hosts: list[str]) -> int | str:
    """A whole run whose ranks believe to be on these nodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURMD_NODENAME", hosts[dist.get_rank()])
        if dist.get_rank() == 1 and hosts[1] == "bad":
            break_rank("no shard", patch)
        try:
            return train(config)
        except MegarecurError as error:
            return str(error)


def test_training_begins_with_it(world, corpus, tmp_path) -> None:
    steps = {"steps": 1, "micro_batch_size": 4}
    config = make_config(corpus, run_dir=str(tmp_path / "run"), train=steps,
                         health={"min_free_disk_gb": 0.01})  # fmt: skip
    found = world(2).run(train_on, config, ["vn1", "bad"])
    assert found[0] == found[1] and "bad (rank 1): " in str(found[0])
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert world(2).run(train_on, config, PAIR) == [FINISHED, FINISHED]
    assert json.loads((tmp_path / "run" / "health.json").read_text())["nodes"].keys() == {*PAIR}


def hang(config: Config) -> str:
    """Check with a patience that rank 1 overdraws: it hangs until rank 0 has given up."""
    store, over = dist.distributed_c10d._get_default_store(), f"{config.run_dir}: over"
    group = dist.new_group(backend="gloo")
    mesh = replace(build_mesh(config, torch.device("cpu")), save_group=group)
    place, notes = (Path(config.run_dir), mesh, PAIR[mesh.rank]), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        if mesh.rank == 1:
            patch.setattr(health, "measure_device", lambda *_: store.wait([over]))
        with pytest.raises(MeshError) as caught:
            check_health(config, *place, patience=0.5, note=notes.append)
    store.set(over, "")
    assert notes == [WAITING], "`status` tells by it who waits"
    return str(caught.value)


def test_a_process_that_hangs_is_named(world, corpus, tmp_path) -> None:
    config = make_config(corpus, run_dir=str(tmp_path), health={"min_free_disk_gb": 0})
    first, second = world(2).run(hang, config)
    assert first.startswith("vn2 (rank 1): did not finish the health check in 0.5 s")
    assert second == first


def test_processes_without_a_gpu_are_named_before_any_of_them_waits_for_the_others(
    monkeypatch,
) -> None:
    def agree(*found: tuple[str, str]) -> list[str]:
        """The error of each rank."""
        store, errors = dist.HashStore(), [""] * len(found)

        def ask(rank: int) -> None:
            try:
                agree_on_devices(store, rank, len(found), *found[rank])
            except MeshError as error:
                errors[rank] = str(error)

        threads = [Thread(target=ask, args=(rank,)) for rank in range(len(found))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return errors

    monkeypatch.setenv("SLURMD_NODENAME", "vn7")
    assert agree(("cuda", ""), ("cuda", "")) == agree(("cpu", ""), ("cpu", "")) == ["", ""]
    errors = agree(("cuda", ""), ("cpu", ""), ("", "process 2 of this machine has no GPU"))
    assert len(set(errors)) == 1
    assert "vn7 (rank 1): torch finds no CUDA device, which other processes have" in errors[0]
    assert "vn7 (rank 2): process 2 of this machine has no GPU" in errors[0]


# ------------------------------------------------------------------- judging, in one process


def nodes_of(*hosts: str, **values: list[Any]) -> list[Figures]:
    """Figures by rank."""
    return [
        Figures(host, rank, **{name: of[rank] for name, of in values.items()})
        for rank, host in enumerate(hosts)
    ]


def texts(found: list[health.Finding], every: list[Figures]) -> list[str]:
    return [finding.describe([figures.host for figures in every]) for finding in found]


def test_gpus_that_are_missing_shared_or_taken() -> None:
    gpus = {"gpu": ["a", "b", "c", None], "num_gpus": [2, 2, 1, 0]}
    every = nodes_of(*QUAD, **gpus, free_gpu_bytes=[80 << 30, 79 << 30, 30 << 30, None])
    missing = texts(find_faults(every), every)
    assert any(text.startswith("vn2 (rank 3): no GPU is seen") for text in missing)
    (slow,) = texts(find_slow(every, HealthConfig()), every)
    assert slow.startswith(
        "vn2 (rank 2): a GPU has 30.0 GiB of memory free, the job's median is 79"
    )
    every = nodes_of(*QUAD, gpu=["a", "b", "c", "c"], num_gpus=[2, 2, 1, 1])
    (shared,) = texts(find_faults(every), every)
    assert shared.startswith("vn2 (ranks 2-3): 2 processes share 1 GPU(s)")
    # One GPU visible to each process, but another one.
    assert not find_faults(nodes_of(*PAIR, gpu=["a", "b"], num_gpus=[1, 1]))


def test_a_slow_node_is_one_finding_and_compared_with_nodes_of_its_size() -> None:
    hosts = ["a", "a", "b", "b", "c", "c", "d", "d", "d"]
    times = [0.01, 0.01, 0.05, 0.06, 0.01, 0.011, 0.3, 0.3, 0.3]
    every = nodes_of(*hosts, allreduce_seconds=times)
    (slow,) = texts(find_slow(every, HealthConfig()), every)
    assert slow.startswith("b (ranks 2-3): an all-reduce within the node took 60 ms, the job's ")
    assert "median is 10 ms (health.slow_factor=2)" in slow
    tiny = nodes_of(*hosts, allreduce_seconds=[t * 1e-3 for t in times])
    assert not find_slow(tiny, HealthConfig())  # Below a millisecond it is chance.


@pytest.mark.parametrize("count", range(1, 9))
def test_rings_pair_all_neighbours_once(count) -> None:
    rounds = ring_rounds(count)
    ring = {frozenset((k, (k + 1) % count)) for k in range(count)} if count > 1 else set()
    pairs = [frozenset(pair) for each in rounds for pair in each]
    assert len(pairs) == len(set(pairs)) and set(pairs) == ring
    for each in rounds:
        busy = [node for pair in each for node in pair]
        assert len(busy) == len(set(busy))


def test_shards_of_other_programs_are_looked_for_too(tmp_path) -> None:
    def shard(name: str, packed: bool) -> dict[str, Any]:
        zipped = {"basename": f"{name}.zstd", "bytes": 9} if packed else None
        names = {"column_names": ["tokens"], "column_sizes": [None]}
        encodings = {"column_encodings": ["bytes"], "format": "mds"}
        raw = {"basename": name, "bytes": 99}
        kind = {"compression": "zstd"} if packed else {}
        return {"raw_data": raw, "zip_data": zipped, "samples": 1, **kind, **names, **encodings}

    (tmp_path / "0").mkdir()
    entries = [shard("a.mds", False), shard("0/b.mds", True), shard("1/c.mds", False)]
    (tmp_path / "index.json").write_text(json.dumps({"shards": entries}))
    assert health.missing_files(tmp_path) == ["a.mds", "0/b.mds.zstd", "1/c.mds"]
    for name in ("a.mds", "0/b.mds.zstd"):
        (tmp_path / name).touch()
    assert health.missing_files(tmp_path) == ["1/c.mds"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_small_integers_are_exact(dtype) -> None:
    seconds, wrong = health.time_gemm(torch.device("cpu"), dtype)
    assert 0 < seconds < 1 and wrong == 0


def test_what_is_missing_everywhere_is_no_fault_of_a_node() -> None:
    hosts = ["a", "a", "b", "b"]
    found = health.one_error([health.Finding("data", "/c: there is no corpus", (0, 2))], hosts)
    assert isinstance(found, DataError) and "every node: /c: there is no corpus" in str(found)
    assert "without those nodes" not in str(found)
    found = health.one_error([health.Finding("data", "/c: there is no corpus", (2,))], hosts)
    assert "b (rank 2): /c" in str(found) and "start without those nodes" in str(found)
