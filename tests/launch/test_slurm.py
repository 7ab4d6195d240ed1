"""Under Slurm: joining a step, and whole runs on a cluster of virtual nodes."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support.cluster import PATIENCE, on_cluster
from support.configs import TEXT, make_config
from support.runs import losses

from megarecur.config.load import to_yaml
from megarecur.errors import MeshError
from megarecur.parallel.mesh import join_slurm_step, world_size

TEMPLATES = Path(__file__).resolve().parents[2] / "slurm"

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


# --------------------------------------------------------------------------------- a real cluster


def write_config(corpus: Path, folder: Path, **train: Any) -> Path:
    """The config of a run with dropout; its run_dir is for an override to say."""
    train = {"global_batch_size": 8, "micro_batch_size": 2, "log_every": 1, **train}
    config = make_config(corpus, "loop", run_dir="unnamed", model={"dropout": 0.1}, train=train)
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder / "config.yaml"


def tensors(run_dir: Path, step: int) -> dict[str, bytes]:
    """The files of a checkpoint that hold tensors, moments included."""
    files = (run_dir / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")
    return {file.name: file.read_bytes() for file in files}


def assert_equal_runs(found: Path, expected: Path, step: int) -> None:
    """Bit for bit: losses, weights and moments at the end."""
    assert list(losses(found)) == list(range(1, step + 1))
    assert losses(found) == losses(expected)
    assert tensors(found, step) == tensors(expected, step) != {}


@on_cluster
def test_a_step_on_two_nodes_equals_a_launch(slurm, corpus, tmp_path) -> None:
    config = write_config(corpus, tmp_path, steps=6)
    said = slurm.run("srun", "-N2", "-n4", "megarecur", "train", config, f"run_dir={tmp_path}/step")
    assert "done: 6 steps" in said
    slurm.run("megarecur", "launch", config, f"run_dir={tmp_path}/launch", "--nproc", 4)
    assert len(tensors(tmp_path / "step", 6)) == 4
    assert_equal_runs(tmp_path / "step", tmp_path / "launch", 6)


@on_cluster
def test_the_templates_train_go_on_and_evaluate(slurm, corpus, tmp_path) -> None:
    config, steps = write_config(corpus, tmp_path, steps=100), 100
    train = ("--chdir", tmp_path, TEMPLATES / "train.sbatch", config)
    straight = slurm.submit(*train, f"run_dir={tmp_path}/straight")
    slurm.wait(straight, "COMPLETED")
    assert "answered 0" in slurm.log(straight)

    disturbed = slurm.submit(*train, f"run_dir={tmp_path}/disturbed")

    def until(said: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not said():
            assert time.monotonic() < deadline, slurm.describe(disturbed)
            time.sleep(0.1)

    # Told as soon as the script listens, before megarecur does.
    until(lambda: "turn 0" in slurm.log(disturbed))
    slurm.run("scancel", "--signal=USR1", "--batch", disturbed)
    until(lambda: "turn 1" in slurm.log(disturbed))
    # Then at some step: tasks are held there while the script is told, and passes it on.
    begun = max(losses(tmp_path / "disturbed"), default=0)
    until(lambda: max(losses(tmp_path / "disturbed"), default=0) > begun)
    slurm.run("scancel", "--signal=STOP", disturbed)
    slurm.run("scancel", "--signal=USR1", "--batch", disturbed)
    time.sleep(5)
    slurm.run("scancel", "--signal=CONT", disturbed)
    slurm.wait(disturbed, "COMPLETED")
    log = slurm.log(disturbed)
    assert slurm.show(disturbed)["Restarts"] == "2" and "turn 2" in log
    assert log.count("answered 3") == 2 and log.count("answered 0") == 1
    saved = [int(part.split()[0]) for part in log.split("saved at step ")[1:]]
    assert saved[0] < saved[1] < steps
    assert_equal_runs(tmp_path / "disturbed", tmp_path / "straight", steps)

    run = tmp_path / "disturbed"
    scores = slurm.submit("--chdir", tmp_path, TEMPLATES / "eval.sbatch", run, "--samples", 2)
    slurm.wait(scores, "COMPLETED")
    assert "bits per byte" in slurm.log(scores) and f"step {steps})" in slurm.log(scores)


@on_cluster
def test_the_template_that_trains_stays_cancelled_and_tells_failures(
    slurm, corpus, tmp_path
) -> None:
    config = write_config(corpus, tmp_path, steps=100_000)
    train = ("--chdir", tmp_path, TEMPLATES / "train.sbatch", config)
    cancelled = slurm.submit(*train, f"run_dir={tmp_path}/cancelled")
    wrong = slurm.submit(*train, f"run_dir={tmp_path}/wrong", "train.micro_batch_size=8")
    slurm.wait(wrong, "FAILED")
    assert slurm.show(wrong)["ExitCode"] == "2:0" and "8 does not divide" in slurm.log(wrong)

    deadline = time.monotonic() + PATIENCE
    while not losses(tmp_path / "cancelled"):
        assert time.monotonic() < deadline, slurm.describe(cancelled)
        time.sleep(0.3)
    slurm.run("scancel", cancelled)
    slurm.wait(cancelled, "CANCELLED")
    assert slurm.show(cancelled)["Restarts"] == "0"


@on_cluster
def test_the_template_that_prepares_makes_corpora(slurm, tmp_path) -> None:
    files = [tmp_path / f"{n}.txt" for n in range(3)]
    for n, file in enumerate(files):
        file.write_text(f"{n} {TEXT}")
    out = tmp_path / "corpus"
    options = ("--chdir", tmp_path, "--array=0-1", "--cpus-per-task=1", TEMPLATES / "prep.sbatch")
    job = slurm.submit(*options, *files, env={**os.environ, "SHARES": "2", "OUT": str(out)})
    slurm.wait(job, "COMPLETED")
    manifests = [json.loads((out / f"{n}/train/manifest.json").read_text()) for n in range(2)]
    assert [manifest["num_documents"] for manifest in manifests] == [2, 1]
