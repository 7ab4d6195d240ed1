"""The command line as users run it: processes, signals, exit codes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import make_config
from megarecur.config.load import load_config, to_yaml
from megarecur.train.metrics import read_rows
from megarecur.train.trainer import train

ROOT = Path(__file__).resolve().parents[1]


def start(*words: object) -> subprocess.Popen[str]:
    """`megarecur` with these words."""
    command = [sys.executable, "-m", "launch.cli", *map(str, words)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str]:
    """(exit code, everything printed)."""
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, output


def write_config(corpus: Path, folder: Path, steps: int) -> Path:
    """The config of a run in folder/run."""
    path = folder / "config.yaml"
    train = {"steps": steps, "global_batch_size": 8, "micro_batch_size": 4, "log_every": 5}
    path.write_text(to_yaml(make_config(corpus, run_dir=str(folder / "run"), train=train)))
    return path


def until_logged(process: subprocess.Popen[str], folder: Path) -> None:
    """Wait for the run's first row; the process is ended if that fails."""
    deadline = time.monotonic() + 90
    try:
        while not read_rows(folder / "run" / "metrics.jsonl"):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
    except BaseException:
        process.kill()
        raise


def test_launch_stops_on_a_signal_and_goes_on(corpus, tmp_path) -> None:
    path = write_config(corpus, tmp_path, 100_000)
    process = start("launch", path, "--nproc", 2)
    until_logged(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 3, output
    assert "saved at step" in output and "Traceback" not in output
    step = int(output.split("saved at step ")[1].split()[0])
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").is_dir()

    # Here, as one process: what two have written goes on anywhere.
    assert train(load_config(path, [f"train.steps={step + 5}"])) == 0
    assert read_rows(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == step + 5


@pytest.mark.slow
def test_a_worker_that_dies_fails_the_launch(corpus, tmp_path) -> None:
    path = write_config(corpus, tmp_path, 100_000)
    process = start("launch", path, "--nproc", 2)
    until_logged(process, tmp_path)
    holder = json.loads((tmp_path / "run" / "lease").read_text())
    os.kill(holder["pid"], signal.SIGKILL)
    code, output = finish(process)
    assert code == 1, output


@pytest.mark.slow
def test_the_demo_at_five_steps(tmp_path) -> None:
    def run(*words: object) -> str:
        process = subprocess.run(
            [sys.executable, "-m", "launch.cli", *map(str, words)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stderr
        return process.stdout

    config = ROOT / "configs" / "quickstart.yaml"
    assert "documents" in run("prep", "quickstart")
    assert "reuse map" in run("check", config)
    assert "done: 5 steps" in run("train", config, "train.steps=5", "train.global_batch_size=16",
                                  "optimizer.schedule.warmup_steps=2")  # fmt: skip
    assert "bits per byte" in run("eval", "runs/quickstart", "--samples", 32)
    assert run("generate", "runs/quickstart", "def main(", "--max-new-tokens", 8)
    assert "loss.png" in run("plot", "runs/quickstart")
