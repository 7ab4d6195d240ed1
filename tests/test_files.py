"""files.py: what appears is whole and synced, and what fails leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megarecur import files


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(what, name) of each fsync and rename, in order."""
    made: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def record_fsync(descriptor: int) -> None:
        made.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        made.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    return made


@pytest.mark.parametrize("data", ["text é\n", b"\x00\xff", ""])
def test_a_file_is_synced_before_it_gets_its_name(
    tmp_path: Path, calls: list[tuple[str, str]], data: str | bytes
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    files.replace_file(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert calls == [("fsync", "file.tmp"), ("rename", "file"), ("fsync", tmp_path.name)]
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_need_not_survive_a_power_failure_is_not_synced(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    files.replace_file(tmp_path / "file", "new", durable=False)
    assert (tmp_path / "file").read_text() == "new"
    assert calls == [("rename", "file")]


@pytest.mark.parametrize("shared", [False, True])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.open_replacement(path, shared) as file:
        file.write(b"half")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_is_synced_before_it_gets_its_name(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    with files.create_folder(tmp_path / "folder") as aside:
        (aside / "inside").mkdir()
        (aside / "inside" / "file").write_text("x")
        (aside / "link").symlink_to("nowhere")
    assert (tmp_path / "folder" / "inside" / "file").read_text() == "x"
    *first, aside_synced, renamed, parent_synced = calls
    assert sorted(first) == [("fsync", "file"), ("fsync", "inside")]
    assert aside_synced == ("fsync", "folder.tmp")
    assert (renamed, parent_synced) == (("rename", "folder"), ("fsync", tmp_path.name))


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder.tmp").mkdir()  # Left by a process that was killed.
    (tmp_path / "folder.tmp" / "stale").touch()
    with pytest.raises(OSError), files.create_folder(tmp_path / "folder") as aside:
        assert os.listdir(aside) == []
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_a_new_file_replaces_nothing(tmp_path: Path) -> None:
    files.create_file(tmp_path / "file", "one")
    with pytest.raises(FileExistsError):
        files.create_file(tmp_path / "file", "two")
    assert (tmp_path / "file").read_text() == "one"


def test_rows_are_appended_after_a_row_that_was_cut_short(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    path = tmp_path / "rows.jsonl"
    files.append_row(path, {"a": 1})
    assert calls == [("fsync", "rows.jsonl"), ("fsync", tmp_path.name)]
    with path.open("a") as file:
        file.write('{"b": ')
    files.append_row(path, {"c": 3})
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in (lines[0], lines[2])] == [{"a": 1}, {"c": 3}]
    assert len(calls) == 3, "the name of a file that was there is on the disk"


def test_a_deleted_folder_is_never_seen_in_part(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    (tmp_path / "folder.tmp").mkdir()
    files.delete_folder(tmp_path / "folder")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("hard", [True, False])
def test_a_link_under_the_temporary_name_is_not_written_through(
    tmp_path: Path, durable: bool, hard: bool
) -> None:
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_text("mine")
    aside = files.aside_of(path)
    aside.hardlink_to(victim) if hard else aside.symlink_to(victim)
    files.replace_file(path, "new", durable)
    assert (victim.read_text(), path.read_text()) == ("mine", "new")
    assert not path.is_symlink() and not aside.exists()


def fail_rename(
    monkeypatch: pytest.MonkeyPatch, number: int, times: int, done: bool = False
) -> list[str]:
    """Let `os.rename` fail `times` times, after it has renamed if `done`; return its targets."""
    calls: list[str] = []
    rename = os.rename

    def fail_first(source: Path, target: Path) -> None:
        calls.append(Path(target).name)
        if len(calls) > times:
            rename(source, target)
            return
        if done and len(calls) == 1:
            rename(source, target)
        raise OSError(number, os.strerror(number), str(source), None, str(target))

    monkeypatch.setattr(os, "rename", fail_first)
    monkeypatch.setattr(files, "RENAME_PAUSES", (0.0, 0.0))
    return calls


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE, errno.EIO, errno.EBUSY])
def test_a_rename_that_succeeded_on_the_server_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, folder: bool
) -> None:
    """The reply was lost, and the repeated request found nothing to rename."""
    path = tmp_path / "path"
    calls = fail_rename(monkeypatch, number, 1, done=True)
    if folder:
        with files.create_folder(path) as aside:
            (aside / "file").write_text("new")
        path = path / "file"
    else:
        path.write_text("old")
        files.replace_file(path, "new")
    assert path.read_text() == "new" and len(calls) == 1
    assert os.listdir(tmp_path) == ["path"]


@pytest.mark.parametrize(
    ("number", "times", "fails"),
    [
        (errno.ESTALE, 1, False),
        (errno.EIO, 2, False),
        (errno.EBUSY, 3, True),
        (errno.ENOENT, 1, False),
        (errno.ENOSPC, 1, True),
    ],
)
def test_a_rename_is_tried_again_while_that_may_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, times: int, fails: bool
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    calls = fail_rename(monkeypatch, number, times)
    if fails:
        with pytest.raises(OSError) as caught:
            files.replace_file(path, "new")
        assert caught.value.errno == number and path.read_text() == "old"
    else:
        files.replace_file(path, "new")
        assert path.read_text() == "new" and len(calls) == times + 1
    assert os.listdir(tmp_path) == ["file"]


def take_away(path: Path) -> None:
    """Delete what is about to be renamed, as another process may."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("delete", [take_away, lambda path: None])
def test_a_folder_that_is_gone_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delete: Callable[[Path], None]
) -> None:
    rename, folder = os.rename, tmp_path / "folder"
    folder.mkdir()

    def delete_first(source: Path, target: Path) -> None:
        delete(source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", delete_first)
    files.delete_folder(folder)
    files.delete_folder(folder)
    assert not os.listdir(tmp_path)


def test_what_another_process_deletes_is_not_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file lies under the final name: it is not taken for the one that was written."""
    path = tmp_path / "file"
    path.write_text("old")
    rename = os.rename

    def delete_first(source: Path, target: Path) -> None:
        take_away(source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", delete_first)
    with pytest.raises(FileNotFoundError):
        files.replace_file(path, "new")
    assert path.read_text() == "old"
