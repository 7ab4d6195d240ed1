"""The parity certificate: equal where it is equal, and every planted fault is found."""

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support.commands import megarecur
from support.meshes import SEQUENCE, aot_eager, config_of, later

from megarecur.config.load import to_yaml
from megarecur.config.parallel import ParallelConfig
from megarecur.config.run import Config
from megarecur.data.open import with_vocab_size
from megarecur.launch.verify import print_rows
from megarecur.optim.plain import PlainEngine
from megarecur.recurrence.inventory import ParameterSpec, build_inventory
from megarecur.train.verify import certified, compare, record


def test_a_mesh_is_certified(corpus, tmp_path, capfd) -> None:
    config = config_of(corpus, "loop", 2, model={"dropout": 0.1}, **SEQUENCE)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    code, said, _ = megarecur(capfd, "verify", path, "--steps", "2", "--small")
    assert code == 0
    assert "equal to one process" in said and "NOT" not in said and "DIFFERS" not in said
    assert all(
        said.count(f"{name}  ") >= 1 for name in build_inventory(with_vocab_size(config, 257))
    )
    code, _, err = megarecur(capfd, "verify", path, "--nproc", "3")
    assert code == 2 and "3 processes do not divide" in err


def test_small_keeps_the_scheme_and_the_mesh() -> None:
    config = config_of("none", "reuse_map", 2, model={"hidden_size": 64}, train={"compile": False})
    small = certified(config, True, 2)
    assert small.recurrence == config.recurrence and small.parallel == config.parallel
    assert small.model.num_heads == config.model.num_heads and small.model.hidden_size == 32
    assert small.optimizer.eps == 1e-5 and small.train.global_batch_size == 4


def record_with(config: Config, folder: Path, fault: str) -> None:
    with contextlib.ExitStack() as patches:
        if fault == "gradients of norms not reduced":
            patches.enter_context(mock.patch.object(PlainEngine, "reduce_over_tp"))
        if fault == "shards not marked":
            patches.enter_context(mock.patch.object(ParameterSpec, "holders", lambda *_: 2))
        if fault == "shared gradient divided":
            patches.enter_context(mock.patch.object(PlainEngine, "gradients", divided))
        if fault == "microbatch dropped":
            patches.enter_context(
                mock.patch("megarecur.data.loader.Loader.batch", without_the_last)
            )
        record(config, 2, folder)


def divided(engine: PlainEngine, gradients: Any = PlainEngine.gradients) -> Any:
    found = gradients(engine)
    found["blocks.0.attention.query.weight"] /= 2
    return found


def without_the_last(loader: Any, step: int) -> Any:
    return loader._build(step)[:-1]


def record_compiled(config: Config, folder: Path) -> None:
    with mock.patch("megarecur.train.compiler.find_obstacle", return_value=None):
        record(config, 2, folder, aot_eager)


@pytest.mark.parametrize(
    ("tensor", "pipeline"), [later(2, 1), later(1, 2), (2, 2)], ids=["tensor", "pipeline", "both"]
)
def test_compiled_meshes_are_certified(world, corpus, tmp_path, capsys, tensor, pipeline) -> None:
    """Compiled on the mesh, eager in one process."""
    sections = {"train": {"compile": True}, "parallel": {"pipeline": pipeline}}
    config = config_of(corpus, "loop", tensor, model={"dropout": 0.1}, **sections)
    config = certified(with_vocab_size(config, 257), False, 1)
    assert config.train.compile is True
    eager = config.train.model_copy(update={"compile": False})
    alone = config.model_copy(update={"parallel": ParallelConfig(), "train": eager})
    record(alone, 2, tmp_path / "alone")
    world(tensor * pipeline).run(record_compiled, config, tmp_path / "mesh")
    rows = compare(config, 2, tmp_path / "alone", tmp_path / "mesh")
    print_rows(rows, config)
    assert all(row.equal for row in rows)
    assert "equal to one process (fp32, compiled)" in capsys.readouterr().out


FAULTS = ["gradients of norms not reduced", "shards not marked", "shared gradient divided",
          "microbatch dropped"]  # fmt: skip


def test_planted_faults_are_found(world, corpus, tmp_path, capsys) -> None:
    config = with_vocab_size(config_of(corpus, "reuse_map", 2, **SEQUENCE), 257)
    config = certified(config, False, 1)
    alone = config.model_copy(update={"parallel": ParallelConfig()})
    record(alone, 2, tmp_path / "alone")
    for fault in ("", *FAULTS):
        folder = tmp_path / (fault or "mesh")
        world(2).run(record_with, config, folder, fault)
        rows = compare(config, 2, tmp_path / "alone", folder)
        assert all(row.equal for row in rows) == (fault == ""), fault
        print_rows(rows, config)
        assert ("NOT equal" in capsys.readouterr().out) == (fault != ""), fault
