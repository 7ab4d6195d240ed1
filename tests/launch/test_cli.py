"""The command line as users run it: what it prints, how it ends, what it imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from support.commands import CHECK_WITHOUT_TORCH, megarecur

from megarecur.launch.cli import app

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG = """
run_dir: runs/quickstart
model: {hidden_size: 128, num_heads: 4, ffn_hidden_size: 512, vocab_size: 1024}
recurrence: {kind: reuse_map, reuse_map: [4, 2, 1, 1]}
data: {train: [{path: a}], tokenizer: absent.model, seq_length: 1024}
optimizer: {lr: 3.0e-3}
train: {steps: 400, global_batch_size: 16, micro_batch_size: 8}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def test_check_explains_a_run_without_importing_torch(config: Path) -> None:
    command = [sys.executable, "-c", CHECK_WITHOUT_TORCH, "check", str(config), "train.steps=7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]", "heavy imports"
    words = done.stdout.split()
    for word in ("●───●───●───●─╮", "1,180,800", "1,049,728", "2,230,400", "1.92", "114,688"):
        assert word in words, word


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_that_come_along_are_valid(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_text = "tokenizer:" in path.read_text()  # Its file is made by a command.
    code, out, err = megarecur(
        capsys, "check", path, *(["model.vocab_size=2048"] if of_text else [])
    )
    assert code == 0 and "layer map" in out, err


def test_mistakes_are_one_message_and_exit_code_2(config: Path) -> None:
    mistakes = ["model.vocab_sise=3", "train.steps=0"]
    command = [sys.executable, "-m", "megarecur.launch.cli", "check", str(config), *mistakes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {config}: 2 problems\n")
    assert "did you mean 'vocab_size'?" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["check", "{tmp}/absent.yaml"], "cannot be read"),
        (["check", "{tmp}/config.yaml", "model.vocab_size=null"], "set model.vocab_size"),
        (["check", "{tmp}/config.yaml", "--draw", "map.gif"], "must end in .png or .svg"),
        (["plot", "{tmp}"], "metrics.jsonl"),
        (["check"], "Missing argument"),
        (["chek"], "No such command"),
        (["check", "{tmp}/config.yaml", "--wrong"], "No such option"),
    ],
)
def test_user_errors(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    code, _, err = megarecur(capsys, *(a.format(tmp=config.parent) for a in arguments))
    assert code == 2 and part in err and "Traceback" not in err


def test_the_vocabulary_of_bytes_needs_no_file(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = megarecur(capsys, "check", config, "model.vocab_size=", "data.tokenizer=bytes")
    assert code == 0, err
    assert "model.vocab_size" in out


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_check_draws(config: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    picture = config.parent / "new" / f"map.{suffix}"
    code, out, err = megarecur(capsys, "check", config, "--draw", picture)
    assert code == 0, err
    assert str(picture) in out.replace("\n", "") and picture.stat().st_size > 5_000


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = megarecur(capsys, "--help")
    assert code == 0 and "check" in out and "plot" in out


COMMANDS: Any = typer.main.get_command(app)
COUNTS: dict[str, tuple[list[str], list[str]]] = {
    "plan x --world-size 2": (["tensor", "pipeline", "context", "zero"],
                              ["tensor", "pipeline", "context"]),
    "launch x": (["nproc", "nodes", "gpus-per-node", "processes-per-node", "at-once"],
                 ["nproc", "nodes", "processes-per-node"]),
    "verify x": (["nproc", "steps"], ["nproc", "steps"]),
    "logs x": (["attempt", "rank"], ["attempt"]),
    "eval x": (["step", "samples", "image-size", "shots", "limit", "gpus"],
               ["image-size", "limit"]),
    "generate x text": (["max-new-tokens", "top-k", "samples", "step"], ["samples"]),
    "serve x": (["step", "pages", "max-texts", "max-queue", "max-new-tokens", "max-body"],
                ["pages", "max-texts", "max-new-tokens", "max-body"]),
    "translate x --source y": (["top-k", "draw-line", "step"], []),
    "convert x --to y": (["loops", "layers", "lora-rank"], []),
    "merge x --out y": (["last"], []),
    "export x --to hf y": (["step"], []),
    "prep shards x": (["workers", "tasks", "at-once"], ["tasks", "at-once"]),
    "prep pairs x y": (["workers", "max-length"], []),
    "prep task listops": (["train", "val", "max-depth", "max-args", "min-length", "max-length",
                           "length", "contour-length", "train-operators"], []),
    "prep images x": (["workers", "resize", "channels"], ["resize", "channels"]),
    "prep inspect x": (["samples"], []),
    "prep tokenizer x": (["vocab-size"], ["vocab-size"]),
    "prep teacher x": (["top-k"], ["top-k"]),
    "bench hardware": (["ranks"], ["ranks"]),
}  # fmt: skip
"""Options by command: those that refuse 10^12, and those that refuse 0 as they are read."""


@pytest.mark.parametrize("command", COUNTS)
def test_absurd_numbers_are_refused_before_anything_is_done(command: str) -> None:
    for number, options in zip((10**12, 0), COUNTS[command], strict=True):
        for option in options:
            words = [*command.split(), f"--{option}", str(number)]
            with pytest.raises(Exception, match=r"Input should be|not in the range") as error:
                COMMANDS.main(words, "megarecur", standalone_mode=False)
            assert f"Invalid value for '--{option}'" in error.value.format_message()
