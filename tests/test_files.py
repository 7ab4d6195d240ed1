"""files.py: what appears is whole and synced, and what fails leaves nothing behind."""

from __future__ import annotations

import json
import os
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
