"""Files deleted under a run at work: what can be made again is made again, and the run says what
was missing."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support.boards import assert_one_line, open_board
from support.configs import make_config

from megarecur.checkpoint import checkpoint
from megarecur.checkpoint.identity import identify, owner_of
from megarecur.errors import ConfigError, explain_os_error
from megarecur.train import metrics, trainer
from megarecur.train.metrics import read_rows
from megarecur.train.state import RunFolder
from megarecur.train.trainer import FINISHED, train

DELETED: dict[str, Callable[[Path], Any]] = {
    "metrics.jsonl": lambda run: (run / "metrics.jsonl").unlink(),
    "events.out.tfevents": lambda run: shutil.rmtree(run / "tensorboard"),
    "config.yaml": lambda run: (run / "config.yaml").unlink(),
    "lease": lambda run: (run / "lease").unlink(),
    "plots": lambda run: shutil.rmtree(run / "plots"),
    "logs": lambda run: shutil.rmtree(run / "logs"),
    "checkpoints": lambda run: shutil.rmtree(run / "checkpoints", ignore_errors=True),
}


def train_and_disturb(config: Any, disturbances: dict[int, Callable[[Path], Any]]) -> int:
    """Train; before optimizer steps of these numbers something happens to the run's folder."""
    read = trainer.read_batches

    def read_batches(loader: Any, step: int, mesh: Any) -> Any:
        if step in disturbances:
            disturbances[step](Path(config.run_dir))
        return read(loader, step, mesh)

    with mock.patch.object(trainer, "read_batches", read_batches):
        return train(config)


@pytest.mark.parametrize("whole", [False, True])
def test_what_was_deleted_is_made_again(whole, corpus, tmp_path, capfd) -> None:
    run, steps = tmp_path / "run", len(DELETED) + 2
    config = make_config(
        corpus, run_dir=str(run), train={"steps": steps, "eval_every": 4, "eval_samples": 8},
        checkpoint={"every": steps - 1, "asynchronous": False},
    )  # fmt: skip
    disturbances = dict(enumerate(DELETED.values(), 1))
    assert train_and_disturb(config, {5: shutil.rmtree} if whole else disturbances) == FINISHED
    found = [row["step"] for row in read_rows(run / "metrics.jsonl") if "train/loss" in row]
    assert found == list(range(1, steps + 1))
    assert_one_line(open_board(run / "tensorboard"), run)
    kept = checkpoint.list_checkpoints(run / "checkpoints")
    assert [checkpoint.step_of(path.name) for path in kept] == [steps - 1, steps]
    for folder in ("plots", "logs"):
        assert (run / folder).is_dir()
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err
    for each in DELETED:
        assert f"/{each}" in said.out
    assert "was deleted under the run; it is made again" in said.out
    assert json.loads((run / "lease").read_text())["pid"]
    assert train(config) == FINISHED, "config.yaml and checkpoints are those of the run"


def rename(run: Path) -> None:
    run.rename(run.with_name("renamed"))


@pytest.mark.parametrize("disturb", [DELETED["checkpoints"], rename])
def test_another_checkpoint_follows_at_once_where_one_is_lost(
    disturb, corpus, tmp_path, capfd
) -> None:
    run, renamed = tmp_path / "run", tmp_path / "renamed"
    config = make_config(
        corpus, run_dir=str(run), data={"val": []}, train={"steps": 5},
        checkpoint={"every": 3, "keep_last": 9, "asynchronous": False},
    )  # fmt: skip
    assert train_and_disturb(config, {3: disturb}) == FINISHED
    kept = checkpoint.list_checkpoints(run / "checkpoints")
    assert [checkpoint.step_of(path.name) for path in kept] == [4, 5]
    said = capfd.readouterr().out
    assert "step-00000003 was deleted under the run; another one is saved now" in said
    if disturb is rename:
        assert f"{run} was renamed to {renamed} under the run, which goes on in {run}" in said
        first, second = identify(run, None), identify(renamed, None)
        assert first.run == owner_of(kept[0]) != second.run, "of two runs, one is a copy"


def test_what_was_deleted_after_the_last_row_is_made_again(corpus, tmp_path) -> None:
    run = tmp_path / "run"
    config = make_config(corpus, run_dir=str(run), data={"val": []}, train={"steps": 2})
    finish = trainer.Saver.finish

    def delete_first(self: Any) -> None:
        (run / "metrics.jsonl").unlink()
        shutil.rmtree(run / "tensorboard")
        finish(self)

    with mock.patch.object(trainer.Saver, "finish", delete_first):
        assert train(config) == FINISHED
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [1, 2]
    assert_one_line(open_board(run / "tensorboard"), run)


def test_a_folder_that_another_job_has_taken_meanwhile_ends_the_run(corpus, tmp_path) -> None:
    config = make_config(
        corpus, run_dir=str(tmp_path / "run"), data={"val": []},
        checkpoint={"every": 3, "asynchronous": False},
    )  # fmt: skip
    other = RunFolder(Path(config.run_dir))

    def take(run: Path) -> None:
        shutil.rmtree(run)
        assert other.open() == ""

    with pytest.raises(ConfigError, match="is in use by"):
        train_and_disturb(config, {5: take})
    assert not checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints"), "it is the other's"
    other.close()


def test_a_checkpoint_deleted_while_it_is_written_is_written_again(
    corpus, tmp_path, caplog
) -> None:
    config = make_config(corpus, run_dir=str(tmp_path), data={"val": []}, train={"steps": 2})
    sync, calls = checkpoint.FolderWriter.finish, []

    def delete_first(self: Any, *args: Any, **named: Any) -> None:
        calls.append(self)
        if len(calls) == 1:
            shutil.rmtree(self.temporary)
        sync(self, *args, **named)

    with mock.patch.object(checkpoint.FolderWriter, "finish", delete_first):
        assert train(config) == FINISHED
    assert len(calls) == 2 and "it was deleted meanwhile and is written once more" in caplog.text
    assert checkpoint.find_checkpoint(tmp_path / "checkpoints") == (
        tmp_path / "checkpoints" / "step-00000002", []
    )  # fmt: skip


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "free some space"), (errno.EROFS, "mount it for writing"),
     (errno.EACCES, "allow access to it"), (errno.EIO, "check the disk"),
     (errno.EMFILE, "raise the limit of open files"), (errno.ENOTDIR, "fix the cause")],
)  # fmt: skip
def test_an_error_of_the_disk_names_its_remedy(number, remedy, corpus, tmp_path) -> None:
    config = make_config(corpus, run_dir=str(tmp_path), data={"val": []})

    def fail(*_: Any) -> None:
        raise OSError(number, "the system's words", str(tmp_path / "metrics.jsonl"))

    with (
        mock.patch.object(metrics.Metrics, "draw", fail),
        pytest.raises(ConfigError, match=rf"metrics\.jsonl: the system's words; {remedy}"),
    ):
        train(config)
    assert explain_os_error(OSError("odd"), "here") == "here: odd; fix the cause and start again"
