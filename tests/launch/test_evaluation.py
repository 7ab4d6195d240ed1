"""Evaluation as a job: by submitit's local executor, and on a real cluster."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.cluster import on_cluster
from support.configs import make_config

from megarecur.errors import ConfigError
from megarecur.launch.evaluation import parameters_of, submit_evaluation
from megarecur.launch.profile import ClusterProfile
from megarecur.train.trainer import train


@pytest.fixture
def trained(corpus, tmp_path) -> Path:
    """A run of two steps."""
    assert train(make_config(corpus, run_dir=str(tmp_path / "run"), train={"steps": 2})) == 0
    return tmp_path / "run"


def test_a_job_prints_what_the_command_prints(trained, monkeypatch, capfd) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    job = submit_evaluation(trained, ["--samples=4"], executor="local")
    said = job.result()
    assert "bits per byte" in said and "step 2)" in said
    (code,) = (trained / "launch").glob("code-*")
    assert (code / "megarecur/launch/cli.py").is_file()
    assert "bits per byte" in job.stdout()


def test_what_cannot_be_submitted_leaves_nothing(trained, monkeypatch, tmp_path) -> None:
    before = sorted(trained.rglob("*"))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="sbatch: not found on PATH"):
        submit_evaluation(trained, [])
    with pytest.raises(ConfigError, match="no such folder"):
        submit_evaluation(tmp_path / "nothing", [])
    for program, text in {
        "sbatch": "test $1 = --version || { echo 'sbatch: error: no' >&2; exit 1; }",
        "srun": "exit 0",
    }.items():
        (tmp_path / program).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ConfigError, match=r"sbatch rejected the job.*no"):
        submit_evaluation(trained, [])
    assert not list(trained.rglob("*.py"))
    assert {path for path in trained.rglob("*") if path.is_dir()} <= {
        *before,
        trained / "logs/eval",
    }


def test_a_profile_in_submitits_words() -> None:
    profile = ClusterProfile(
        partition="p", time="1:30", mem="4G", gpu_request="gres", exclude=("a", "b"),
        modules=("m",), setup=("x",), environment={"A": 1}, options=("--switches=1", "--x11"),
    )  # fmt: skip
    found = parameters_of(profile, Path("/r/un"), 2)
    assert found["timeout_min"] == 2 and found["slurm_gres"] == "gpu:2"
    assert found["slurm_setup"] == ["module load m", "x", "export A='1'"]
    assert found["slurm_exclude"] == "a,b" and found["slurm_mem"] == "4G"
    assert found["slurm_additional_parameters"] == {"switches": "1", "x11": True}
    assert "gpus_per_node" not in found and found["slurm_comment"] == "/r/un"
    container = {"image": "i", "workdir": "/w"}
    inside = ClusterProfile.model_validate({"container": container, "time": "UNLIMITED"})
    found = parameters_of(inside, Path("/r/un"), 0)
    assert found["slurm_srun_args"] == ["--container-image=i", "--container-workdir=/w"]
    assert found["slurm_additional_parameters"] == {"time": "UNLIMITED"}
    odd = ClusterProfile(gpu_type="h200", environment={"A": "it's $(date)"}, exclusive=True)
    found = parameters_of(odd, Path("/r/un"), 2)
    assert found["slurm_setup"] == ["export A='it'\\''s $(date)'"] and found["slurm_exclusive"]
    assert found["slurm_additional_parameters"] == {"gpus-per-node": "h200:2"}
    assert "gpus_per_node" not in found
    by_gres = parameters_of(odd.model_copy(update={"gpu_request": "gres"}), Path("/r/un"), 2)
    assert by_gres["slurm_gres"] == "gpu:h200:2" and "slurm_additional_parameters" not in by_gres
    with pytest.raises(ConfigError, match="must be written --KEY=VALUE"):
        parameters_of(ClusterProfile(options=("-p main",)), Path("run"), 0)


@on_cluster
def test_a_job_of_slurm_evaluates(slurm, trained) -> None:
    command = [sys.executable, "-m", "megarecur.launch.cli", "eval", str(trained), "--samples=4"]
    command += ["--launch=slurm", "--cluster=virtual"]
    root = Path(__file__).resolve().parents[2]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environ)
    assert done.returncode == 0, done.stderr
    job = re.match(r"submitted job (\d+)", done.stdout)[1]
    slurm.wait(job, "COMPLETED")
    assert slurm.show(job)["Comment"] == str(trained)
    assert "bits per byte" in (trained / f"logs/eval/{job}_0_log.out").read_text()
