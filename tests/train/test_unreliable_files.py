"""Disks, file servers and limits that fail under a run: one error that names the file, the reason
and a remedy, or the run goes on; the newest good checkpoint is still there."""

from __future__ import annotations

import errno
import io
import itertools
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.boards import assert_one_line, open_board
from support.configs import make_config
from support.faults import failing

from megarecur import files
from megarecur.checkpoint import checkpoint
from megarecur.config.load import to_yaml
from megarecur.launch.cli import main
from megarecur.parallel.mesh import Mesh, annotate_rank_errors
from megarecur.train import trainer
from megarecur.train.metrics import Progress, read_rows

GOES_ON = ""
SPACE, LIMIT, SERVER = "free some", "raise the limit of open files", "check the"
CASES: list[tuple[str, str, int, str, int]] = [
    # event, path, errno, remedy, step of the newest checkpoint afterwards
    ("open", "run/lease", errno.EMFILE, LIMIT, 0),
    ("os.scandir", "bytes/train", errno.EIO, SERVER, 0),
    ("open", "train/manifest.json", errno.EMFILE, LIMIT, 0),
    ("open", "run/identity.json.tmp", errno.EIO, SERVER, 0),
    ("open", "run/config.yaml.tmp", errno.EDQUOT, SPACE, 0),
    ("open", "run/metrics.jsonl", errno.ESTALE, SERVER, 0),
    ("os.mkdir", "run/tensorboard", errno.EMFILE, GOES_ON, 2),
    ("open", "step-00000002.tmp/*.safetensors", errno.EIO, SERVER, 1),
    ("os.rename", "step-00000002.tmp", errno.ESTALE, SERVER, 1),
    ("open", "latest.tmp", errno.EDQUOT, SPACE, 0),
    ("os.rename", "step-00000001", errno.EACCES, "allow access to it", 2),
    ("os.rmdir", "step-00000001.tmp", errno.ENOTEMPTY, GOES_ON, 2),
]  # fmt: skip


def write_config(corpus: Path, folder: Path) -> Path:
    """A run of two steps, which saves after each."""
    config = make_config(corpus, run_dir=str(folder / "run"), data={"val": []},
                         train={"steps": 2}, checkpoint={"every": 1, "keep_last": 1})  # fmt: skip
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder / "config.yaml"


def newest_checkpoint(folder: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none; all are intact."""
    found, damaged = checkpoint.find_checkpoint(folder / "run" / "checkpoints")
    assert not damaged
    return checkpoint.step_of(found.name) if found else 0


@pytest.mark.parametrize(("event", "path", "number", "remedy", "newest"), CASES)
def test_what_fails_is_named_and_no_checkpoint_is_lost(
    event: str, path: str, number: int, remedy: str, newest: int,
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["megarecur", "train", str(write_config(corpus, tmp_path))])
    monkeypatch.setattr(files, "RENAME_PAUSES", (0.0,))
    with failing(event, path, number, math.inf) as failed, pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert failed and "Traceback" not in error
    if remedy:
        assert ended.value.code == 2 and error.startswith("error: "), error
        assert re.search(remedy, error) and Path(failed[0]).name in error, error
    else:
        assert not ended.value.code, error
    assert newest_checkpoint(tmp_path) == newest


def test_an_allocation_that_fails_is_one_error(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    forward_backward = trainer.forward_backward

    def run_out(*args: Any) -> Any:
        if args[4] == 1:
            with annotate_rank_errors(Mesh(), "F of micro batch 0"):
                torch.empty(1 << 60, dtype=torch.uint8)
        return forward_backward(*args)

    monkeypatch.setattr(trainer, "forward_backward", run_out)
    monkeypatch.setattr(sys, "argv", ["megarecur", "train", str(write_config(corpus, tmp_path))])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 1 and "Traceback" not in error
    assert re.fullmatch(r"error: out of memory: .*allocate.* \(rank 0 .*micro batch 0\); lower "
                        r"train\.micro_batch_size, .*\n", error)  # fmt: skip
    assert newest_checkpoint(tmp_path) == 1


class Lost(io.StringIO):
    """A terminal that was closed."""

    def flush(self) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_terminal_that_is_gone_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Lost())
    progress = Progress(2)
    progress.note("said to nobody")
    progress.note("and again")
    progress.stream.close()


def test_a_clock_that_goes_back_disturbs_no_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an hour whenever it is read; leases and heartbeats of the future lock no process out."""
    now, run = time.time() + 1e6, tmp_path / "run"
    hours = itertools.count()
    config = str(write_config(corpus, tmp_path))
    monkeypatch.setattr(time, "time", lambda: now - 3600.0 * next(hours))
    for steps in (2, 3):
        monkeypatch.setattr(sys, "argv", ["megarecur", "train", config, f"train.steps={steps}"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        for path in run.iterdir():
            os.utime(path, (now + 1e6, now + 1e6))
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0.0 < row["speed/step_seconds"] < 3600.0 for row in rows)
    assert_one_line(open_board(run / "tensorboard"), run)
    assert newest_checkpoint(tmp_path) == 3
