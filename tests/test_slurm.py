"""Under Slurm."""

import os
from pathlib import Path
from unittest import mock

import pytest

from megarecur.errors import MeshError
from megarecur.parallel.mesh import join_slurm_step, world_size

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n[3-4]",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "1",
}


def join(folder: Path, scontrol: str, **environ: str) -> dict[str, str]:
    """The environment after joining, with a `scontrol` of this text on the path."""
    (folder / "scontrol").write_text(f"#!/bin/sh\n{scontrol}\n")
    (folder / "scontrol").chmod(0o755)
    environ |= {"PATH": f"{folder}:/usr/bin:/bin"}
    with mock.patch.dict(os.environ, environ, clear=True):
        join_slurm_step()
        return dict(os.environ) | {"world": str(world_size())}


def test_a_step_of_several_tasks_is_a_world(tmp_path) -> None:
    found = join(tmp_path, 'test "$3" = "n[3-4]" && printf "n3\\nn4\\n"', **STEP)
    place = {"RANK": "2", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "n3", "world": "4"}
    assert place.items() <= found.items() and 20_000 <= int(found["MASTER_PORT"]) < 32_000
    other = join(tmp_path, "echo n3", **STEP | {"SLURM_STEP_ID": "1"})
    assert other["MASTER_PORT"] != found["MASTER_PORT"]


@pytest.mark.parametrize("more", [{"SLURM_STEP_NUM_TASKS": "1"}, {"RANK": "0", "WORLD_SIZE": "2"}])
def test_one_task_or_torchrun_goes_first(tmp_path, more) -> None:
    found = join(tmp_path, "exit 1", **STEP | more)
    assert found["world"] == more.get("WORLD_SIZE", "1") and "MASTER_ADDR" not in found


def test_a_list_that_slurm_refuses_is_one_error(tmp_path) -> None:
    with pytest.raises(MeshError, match=r"n\[3-4\].*slow controller.*set MASTER_ADDR"):
        join(tmp_path, "echo slow controller >&2; exit 1", **STEP)
