"""Rows of metrics.jsonl after a resume inside a log interval: those of an undisturbed run, bit for
bit, wherever it was cut."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.configs import make_config

from megarecur.checkpoint import checkpoint
from megarecur.config.run import Config
from megarecur.errors import CheckpointError
from megarecur.parallel.mesh import Mesh
from megarecur.train.metrics import read_rows
from megarecur.train.report import Interval, StepResult
from megarecur.train.trainer import FINISHED, train

STEPS, EVERY = 6, 3
TIMES = ("speed/data_wait", "speed/mfu", "speed/save", "speed/step", "speed/tokens", "speed/write",
         "memory/")  # fmt: skip
"""Metrics that differ from run to run."""

SAMPLED = {"kind": "loop", "prelude": 1, "core": 1, "coda": 1,
           "num_loops": {"sampler": "uniform", "min": 1, "max": 4}}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {"recurrence": SAMPLED | {"coda": 0}, "exits": {}},
    "zero": {"recurrence": SAMPLED, "parallel": {"zero_stage": 2}},
    "pipeline": {"parallel": {"pipeline": 2}},
    "tensor": {"recurrence": SAMPLED, "parallel": {"tensor": 2}},
}


def make_run(corpus: str, run_dir: Path, every: int = 0, **sections: Any) -> Config:
    """Two corpora, logged every few steps."""
    sources = [{"path": f"{corpus}/train", "weight": 2.0}, {"path": f"{corpus}/val"}]
    return make_config(
        corpus, run_dir=str(run_dir), data={"train": sources, "val": []},
        checkpoint={"every": every, "keep_last": 99, "asynchronous": False},
        optimizer={"lr": 3e-2}, train={"steps": STEPS, "log_every": EVERY}, **sections,
    )  # fmt: skip


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    """The rows, without times and memory."""
    rows = read_rows(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def cut_everywhere(corpus: str, folder: str, sections: dict[str, Any]) -> dict[int, Any]:
    """Train, forget what is after a step, and resume; the rows by step of the cut (0: none)."""
    straight = Path(folder) / "straight"
    assert train(make_run(corpus, straight, every=1, **sections)) == FINISHED
    found = {0: numbers(straight)}
    for cut in (step for step in range(STEPS) if step % EVERY):
        run = Path(folder) / f"cut-{cut}"
        if not dist.is_initialized() or dist.get_rank() == 0:
            shutil.copytree(straight, run)
            for path in checkpoint.list_checkpoints(run / "checkpoints")[cut:]:
                shutil.rmtree(path)
            (run / "checkpoints" / "latest").unlink()
        if dist.is_initialized():
            dist.barrier()
        assert train(make_run(corpus, run, **sections)) == FINISHED
        found[cut] = numbers(run)
    return found


def test_rows_are_those_of_an_undisturbed_run(corpus, tmp_path) -> None:
    assert_equal_rows(cut_everywhere(str(corpus), str(tmp_path), LAYOUTS["data"]), exits=True)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_on_ranks_are_those_of_an_undisturbed_run(layout, corpus, tmp_path, world) -> None:
    found = world(2).run(cut_everywhere, str(corpus), str(tmp_path), LAYOUTS[layout])[0]
    assert_equal_rows(found, exits=layout == "data")


def assert_equal_rows(found: dict[int, Any], exits: bool) -> None:
    rows = found[0]
    assert [row["step"] for row in rows] == [EVERY, STEPS]
    assert any(key.startswith("train/loss_of/") for key in rows[0])
    assert exits == any("exit_" in key for key in rows[0])
    for cut, others in found.items():
        assert others == rows, cut


class Place(Mesh):
    """A rank of a mesh, and what the others would send."""

    def gather_objects(self, value: Any) -> list[Any]:
        return PARTS


PARTS: list[dict[str, Any]] = [
    {"losses": {"z": 1.5}}, {"losses": {"loss": 0.5}, "sources": [[1.0], [2.0]]},
    {"losses": {"z": 2.5}}, {"losses": {"loss": 0.25}, "sources": [[3.0], [4.0]]},
]  # fmt: skip


def restore(carried: dict[str, Any], **place: int) -> Interval:
    interval = Interval()
    interval.restore(carried, Mesh(**place))
    return interval


def test_sums_on_another_mesh_are_all_on_the_first_rank() -> None:
    before = Interval()
    before.add(StepResult(None))
    carried = before.carry(Place(dp=2, pp=2))
    for rank, part in enumerate(PARTS):
        same = restore(carried, dp=2, pp=2, rank=rank)
        assert {n: float(v) for n, v in same.losses.items()} == part["losses"]
        assert (same.sources is None) == ("sources" not in part)
    for older in ({}, {"ranks": None}):  # None: as older checkpoints have it.
        content = carried if not older else {
            "num_losses": 1, "losses": {"z": 4.0, "loss": 0.75}, "sources": [[4.0], [6.0]]
        }  # fmt: skip
        first, second = (restore(content, dp=2, rank=rank) for rank in (0, 1))
        assert first.num_losses == 1 and first.losses == {"z": 4.0, "loss": 0.75}
        assert first.sources is not None and first.sources.tolist() == [[4.0], [6.0]]
        # A replica without a share takes part in the same reductions.
        assert second.losses == {"z": 0.0, "loss": 0.0}
        assert second.sources is not None and not torch.any(second.sources)


def test_an_interval_of_wrong_types_is_refused() -> None:
    """As a crafted checkpoint has it."""
    sound = {"num_losses": 1, "depths": [[2, 1, 0, 0]], "keys": [1.0] * 6, "mesh": [1, 1],
             "ranks": [{"losses": {"loss": 1.5}}]}  # fmt: skip
    Interval().restore(sound, Mesh())
    wrong = [None, True, "x", "1", [], {}, ["x"], [["x"]], [[1]], [{"losses": {"loss": "x"}}],
             [{"losses": [1]}], [{"losses": {"loss": 1.0}, "sources": "x"}], [None],
             [[1 << 40, 1]]]  # fmt: skip
    sound_too = {"depths": ([], {}, [None])}
    for key in ("num_losses", "depths", "keys", "ranks"):
        for value in wrong:
            if value in sound_too.get(key, ()):
                continue
            with pytest.raises(CheckpointError, match=r"state\.interval"):
                Interval().restore(sound | {key: value}, Mesh())
