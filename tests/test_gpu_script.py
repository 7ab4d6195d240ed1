"""benchmarks/gpu.py with small shapes on this machine's CPU: rows, resumed sections, faults."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks/gpu.py"


@pytest.mark.slow
def test_sections_are_measured_once(tmp_path) -> None:
    def run(*sections: str) -> dict[str, list[dict]]:
        command = [sys.executable, SCRIPT, "--tiny", "--out", tmp_path, "--sections", *sections]
        subprocess.run(command, check=True, capture_output=True)
        return json.loads((tmp_path / "gpu.json").read_text())["sections"]

    found = run("attention", "weight_gradients")
    assert found["weight_gradients"][0]["ratio"] <= 1.2
    rows = {(row["kind"], row["backend"]): row for row in found["attention"]}
    for kind in ("plain", "GQA", "window"):
        assert "NotImplementedError" in rows[kind, "varlen"]["error"]  # CUDA only.
        assert rows[kind, "dense"]["difference from the first"] < 2e-2
    (tmp_path / "attention.jsonl").write_text('{"kept": 1}\n')
    assert run("attention") == {"attention": [{"kept": 1}]}
    assert "| kept |" in (tmp_path / "gpu.md").read_text()


def test_without_a_gpu_it_says_so(tmp_path) -> None:
    command = [sys.executable, SCRIPT, "--out", tmp_path]
    environ = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no CUDA device; --tiny" in done.stderr
