"""What a start costs in a large world: object gathers, and descriptors that may be missing."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from threading import Thread
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from support.configs import make_config

from megarecur.config.load import load_config
from megarecur.config.run import Config
from megarecur.errors import ConfigError, MeshError
from megarecur.parallel import mesh
from megarecur.parallel.mesh import agree_on_devices, reserve_descriptors
from megarecur.train import trainer
from megarecur.train.trainer import FINISHED, train

GATHERS = ("all_gather_object", "gather_object", "scatter_object_list")
MOST_GATHERS, MOST_BYTES = 3, 2048


def start(config: Config, resume: bool) -> list[tuple[str, int]]:
    """(function, bytes of this rank) of each object gather of the whole world in a start."""
    found = []

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            group = named.get("group")
            if dist.get_world_size(group) == dist.get_world_size():
                value = named.get("obj", args[1] if name == "all_gather_object" else args[0])
                found.append((name, len(pickle.dumps(value))))
            return function(*args, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in GATHERS:
            patch.setattr(dist, name, counted(name, getattr(dist, name)))
        if resume:
            patch.setattr(trainer, "loop", lambda run: FINISHED)
        assert train(config) == FINISHED
    return found


def test_object_gathers_of_a_start(world, corpus, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"), "data": {"seq_length": 16},
        "train": {"steps": 2, "micro_batch_size": 1, "eval_every": 0},
        "health": {"enabled": True, "slow_factor": 1e6, "min_free_disk_gb": 0},
        "checkpoint": {"every": 2},
    }  # fmt: skip
    world(2).run(start, make_config(corpus, **sections), False)
    sections["train"]["steps"] = 4
    for gathers in world(2).run(start, make_config(corpus, **sections), True):
        assert len(gathers) <= MOST_GATHERS
        assert all(size <= MOST_BYTES for _, size in gathers), gathers


def test_too_few_descriptors_are_one_error_on_every_rank(monkeypatch) -> None:
    monkeypatch.setattr(mesh, "raise_file_limit", lambda wanted: min(wanted, 300))
    reserve_descriptors(1024, 5)
    store, errors = dist.HashStore(), [""] * 2

    def meet(rank: int) -> None:
        problem = ""
        try:
            reserve_descriptors(1024, rank)
        except MeshError as error:
            problem = str(error)
        try:
            agree_on_devices(store, rank, 2, "cpu", problem)
        except MeshError as error:
            errors[rank] = str(error)

    with mock.patch.dict("os.environ", SLURMD_NODENAME="vn7"):
        threads = [Thread(target=meet, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert errors[0] == errors[1]
    assert "vn7 (rank 0): RLIMIT_NOFILE=300 is too low: rank 0 of 1024 needs 2304" in errors[0]
    assert "ulimit -n 2304" in errors[0]


QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["parallel={zero_stage: 1, shard_group: 3}"], "shard_group=3 does not divide the 2 repl"),
        (["parallel.context=2", "model.num_heads=3", "model.num_kv_heads=3"],
         "parallel.context=2 does not divide the 3 head(s)"),
        (["optimizer.muon={}", "parallel={zero_stage: 1, zero_engine: deepspeed}"],
         "optimizer.muon needs whole matrices"),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_be_is_one_error_on_every_rank(
    monkeypatch, overrides, fault, rank
) -> None:
    """Before any process group is made: no rank waits for another."""
    place = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((ConfigError, MeshError), match=re.escape(fault)):  # exit code 2
        train(load_config(QUICKSTART, overrides))
