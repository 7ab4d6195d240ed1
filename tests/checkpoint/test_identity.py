"""A run knows its own checkpoints, in its folder and in its mirror, and lets all others be."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.configs import make_config

from megarecur.checkpoint import checkpoint
from megarecur.checkpoint.identity import identify, owner_of
from megarecur.checkpoint.mirror import ForeignMirror, Mirror, Place, check_mirror
from megarecur.checkpoint.retention import remove_old
from megarecur.checkpoint.saving import Saver
from megarecur.config.checkpoint import CheckpointConfig
from megarecur.errors import ConfigError
from megarecur.lease import Lease
from megarecur.parallel.mesh import Mesh
from megarecur.parallel.shards import whole
from megarecur.train.state import RunFolder


def save(root: Path, step: int, run: str | None) -> Path:
    state = {"step": step} | ({"run": run} if run else {})
    return checkpoint.write(root, step, {"a": whole(torch.full((2,), float(step)))}, state)


def steps(root: Path) -> list[int]:
    return [checkpoint.step_of(path.name) for path in checkpoint.list_checkpoints(root)]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_only_checkpoints_of_this_run_are_deleted(tmp_path: Path) -> None:
    """Others may lie there: copied by hand, or written by an earlier version."""
    for step, run in ((1, "theirs"), (2, None), (3, "ours"), (4, "ours"), (9, "theirs")):
        save(tmp_path, step, run)
    remove_old(tmp_path, CheckpointConfig(keep_last=1), run="ours")
    assert steps(tmp_path) == [1, 2, 4, 9]


@pytest.mark.parametrize("run", ["theirs", None])
def test_the_mirror_of_another_run_is_left_alone(tmp_path: Path, run: str | None) -> None:
    ours, far = tmp_path / "ours", tmp_path / "far"
    save(ours, 8, "ours")
    for step in (1, 2, 3):
        save(far, step, run)
    before = contents(far)
    mirror = Mirror(str(far), ours, CheckpointConfig(keep_last=1), dict, run="ours")
    for attempt in (mirror.check, mirror.synchronise):
        with pytest.raises(ForeignMirror, match=r"step-00000001 there is of .*this is run ours"):
            attempt()
    assert contents(far) == before


def test_the_unfinished_upload_of_another_run_is_left_alone(tmp_path: Path) -> None:
    ours, far = tmp_path / "ours", tmp_path / "far"
    save(ours, 1, "ours")
    shutil.copytree(save(tmp_path / "theirs", 1, "theirs"), far / "step-00000001")
    (far / "step-00000001" / "index.xxh3").unlink()
    mirror = Mirror(str(far), ours, CheckpointConfig(), dict, run="ours")
    for mark, whose in (("", "not recorded"), ("theirs", "of run theirs")):
        if mark:
            (far / "step-00000001" / "run").write_text(mark)
            mirror.owners.clear()
        before = contents(far)
        with pytest.raises(ForeignMirror, match=whose):
            mirror.synchronise()
        assert contents(far) == before
    shutil.rmtree(far / "step-00000001")
    (far / "step-00000001").mkdir()  # Nobody's: its run was killed before it wrote anything.
    mirror.owners.clear()
    mirror.synchronise()
    assert Place(str(far)).owner("step-00000001") == "ours"


def test_a_mirror_of_this_run_is_kept_by_its_rule(tmp_path: Path) -> None:
    ours, far = tmp_path / "ours", tmp_path / "far"
    mirror = Mirror(str(far), ours, CheckpointConfig(keep_last=1), dict, run="ours")
    mirror.check()
    save(ours, 1, "theirs")
    for step in (2, 3):
        save(ours, step, "ours")
        mirror.synchronise()
    assert Place(str(far)).folders() == ["step-00000003"]
    mirror.check()


def test_a_run_is_refused_the_mirror_of_another_before_it_writes(tmp_path: Path) -> None:
    far = tmp_path / "far"
    save(far, 1, "theirs")
    before = contents(far)
    config = make_config(checkpoint={"mirror": str(far)}, run_dir=str(tmp_path / "run"))
    saver = Saver(tmp_path / "run", config, Mesh())
    with pytest.raises(ConfigError, match="is of run theirs, and this is run ours"):
        saver.identify("ours")
    assert contents(far) == before


def test_mirrors_that_keep_nothing_or_are_the_run_itself_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    root.mkdir(parents=True)
    (tmp_path / "link").symlink_to(root)
    own = (str(root), str(root / "below"), f"file://{root}", str(tmp_path / "link"))
    for url, fault in (
        *((url, "where the run itself saves") for url in own),
        ("memory://run", "memory of this process"),
        (" ", "is blank"),
    ):
        with pytest.raises(ConfigError, match=fault):
            check_mirror(url, root)
    check_mirror(str(tmp_path / "far"), root)


def test_a_folder_keeps_its_identity_and_a_copy_gets_its_own(tmp_path: Path) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    original.mkdir()
    first = identify(original, None)
    assert first == identify(original, None) and first.copy_of == ""
    shutil.copytree(original, copy)
    second = identify(copy, None)
    assert second.run != first.run and second.copy_of == str(original)
    assert identify(copy, None).run == second.run and identify(original, None) == first
    moved = original.rename(tmp_path / "moved")
    assert identify(moved, None) == first
    (tmp_path / "elsewhere").symlink_to(moved)
    assert identify(tmp_path / "elsewhere", None) == first


def test_a_folder_without_an_identity_takes_that_of_its_checkpoint(tmp_path: Path) -> None:
    """As one that was fetched from a mirror."""
    path = save(tmp_path / "checkpoints", 4, "fetched")
    assert identify(tmp_path, path).run == owner_of(path) == "fetched"
    (tmp_path / "identity.json").unlink()
    path = save(tmp_path / "checkpoints", 5, None)
    assert owner_of(path) is None and identify(tmp_path, path).run not in ("fetched", "")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff", b'{"run": 3, "folder": "a"}', b"[" * 9999]
)
def test_a_damaged_identity_is_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "identity.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"identity.json: is damaged .*delete it"):
        identify(tmp_path, None)


def test_a_saver_writes_the_identity(tmp_path: Path) -> None:
    config = make_config(checkpoint={"asynchronous": False}, run_dir=str(tmp_path))
    with Saver(tmp_path, config, Mesh()) as saver:
        saver.identify("ours")
        saver.save(3, {"a": whole(torch.zeros(2))}, {"step": 3})
    (path,) = checkpoint.list_checkpoints(tmp_path / "checkpoints")
    assert owner_of(path) == "ours"
    assert json.loads((path / "index.json").read_text())["state"] == {"step": 3, "run": "ours"}


def test_a_deleted_lease_lets_no_second_writer_in(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    assert first.open() == ""
    assert "is in use by" in second.open()
    (tmp_path / "run" / "lease").unlink()
    assert "is in use by another process" in second.open()
    assert first.restore() == [str(tmp_path / "run" / "lease")]
    assert '"pid"' in second.open(), "the first has made its lease again"
    first.close()
    assert second.open() == ""
    second.close()


def test_a_run_folder_that_was_deleted_is_locked_again(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    assert first.open() == ""
    shutil.rmtree(tmp_path / "run")
    first.restore()
    (tmp_path / "run" / "lease").unlink()
    assert "is in use by" in second.open()
    first.close()


def test_where_folders_cannot_be_locked_the_first_writer_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS: its lease was deleted, and another process has taken the run."""
    flock = fcntl.flock

    def lock_files(file: Any, how: int) -> None:
        if isinstance(file, int):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", lock_files)
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    assert first.open() == ""
    assert "is in use by" in second.open()
    (tmp_path / "run" / "lease").unlink()
    assert second.open() == ""
    with pytest.raises(ConfigError, match="is in use by"):
        first.restore()
    first.close()
    second.close()


def test_a_lease_that_is_deleted_while_it_is_taken_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking, or each time on a file system that shows two numbers for one."""
    flock, lease, deleted = fcntl.flock, Lease(tmp_path / "lease", tmp_path), []

    def delete_first(file: Any, how: int) -> None:
        if not isinstance(file, int) and len(deleted) < 1:
            deleted.append(lease.path.unlink())
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", delete_first)
    assert lease.take("first") == "" and not lease.is_lost()
    assert lease.path.read_text() == "first"
    monkeypatch.setattr(Lease, "is_lost", lambda self: True)
    assert lease.take("first") == ""
    lease.release()
