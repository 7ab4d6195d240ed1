"""private.py: a folder whose name everyone can guess is used only if it is ours alone."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from megarecur.errors import DataError
from megarecur.private import (
    UnsafeFolder,
    make_private,
    open_lock,
    place_compile_cache,
    private_folder,
    read_inside,
)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder such as /tmp."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def test_a_folder_is_made_for_its_user_alone(shared: Path) -> None:
    folder = make_private(shared, "mine", "below")
    assert folder == shared / "mine" / "below" == make_private(shared, "mine", "below")
    for path in (folder, folder.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_folder_that_others_can_only_read_is_closed_to_them(shared: Path) -> None:
    (shared / "mine").mkdir(mode=0o755)
    assert stat.S_IMODE(make_private(shared, "mine").stat().st_mode) == 0o700


def link(path: Path) -> None:
    path.parent.joinpath("elsewhere").mkdir(mode=0o700)
    path.symlink_to(path.parent / "elsewhere")


def dangling(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def file(path: Path) -> None:
    path.touch()


def fifo(path: Path) -> None:
    os.mkfifo(path)


def group_writable(path: Path) -> None:
    path.mkdir()
    path.chmod(0o770)


PLANTED = {link: "is a symbolic link", dangling: "is a symbolic link", file: "is not a folder",
           fifo: "is not a folder", group_writable: "is writable by other users"}  # fmt: skip


@pytest.mark.parametrize("plant", PLANTED)
@pytest.mark.parametrize("below", [(), ("inner",)])
def test_what_others_may_have_made_is_refused(
    shared: Path, plant: Callable[[Path], None], below: tuple[str, ...]
) -> None:
    names = ("mine", *below)
    path = shared.joinpath(*names)
    if below:
        path.parent.mkdir(mode=0o700)
    plant(path)
    with pytest.raises(UnsafeFolder, match=f"{path}: {PLANTED[plant]}.*set TMPDIR"):
        make_private(shared, *names, "deeper")


def test_the_folder_of_another_user_is_refused(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shared / "mine").mkdir(mode=0o700)
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises(UnsafeFolder, match="belongs to user"):
        make_private(shared, "mine")


def test_a_shared_folder_in_which_others_can_rename_is_refused(shared: Path) -> None:
    shared.chmod(0o777)
    with pytest.raises(UnsafeFolder, match="without the sticky bit"):
        make_private(shared, "mine")
    assert not (shared / "mine").exists()


def test_a_lock_follows_no_link(shared: Path) -> None:
    (shared / "victim").write_text("mine")
    (shared / "lock").symlink_to(shared / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        open_lock(shared / "lock")
    with open_lock(shared / "new") as lock:
        assert stat.S_IMODE(os.fstat(lock.fileno()).st_mode) == 0o600


def test_tmpdir_decides(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    assert private_folder("a") == shared / f"megarecur-{os.geteuid()}" / "a"


def test_torch_compiles_into_a_private_folder(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anyone can make its default, a name below /tmp, first; torch runs what is there."""
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "of the user")
    place_compile_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "of the user"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    place_compile_cache()
    folder = shared / f"megarecur-{os.geteuid()}" / "inductor"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    folder.chmod(0o777)
    with pytest.raises(UnsafeFolder, match="is writable by other users"):
        place_compile_cache()


def test_a_file_of_others_is_no_link_to_a_file_of_ours(tmp_path: Path) -> None:
    """What a downloaded folder links to would be copied into runs and exports."""
    folder, secret = tmp_path / "downloaded", tmp_path / "secret"
    folder.mkdir()
    secret.write_text("mine")
    (folder / "real.json").write_text("{}")
    (folder / "linked.json").symlink_to("real.json")
    assert read_inside(folder / "real.json") == read_inside(folder / "linked.json") == b"{}"
    for target in (secret, Path("../secret"), folder / "hop"):
        (folder / "hop").unlink(missing_ok=True)
        (folder / "hop").symlink_to(secret)
        (folder / "tokenizer.json").unlink(missing_ok=True)
        (folder / "tokenizer.json").symlink_to(target)
        led = r"tokenizer.json.* is a link that leads outside its folder, to .*secret"
        with pytest.raises(DataError, match=led):
            read_inside(folder / "tokenizer.json")


def test_links_of_the_cache_of_hugging_face_are_followed(tmp_path: Path) -> None:
    model = tmp_path / "models--tiny"
    (model / "blobs").mkdir(parents=True)
    (model / "snapshots" / "0a1b").mkdir(parents=True)
    (model / "blobs" / "77").write_bytes(b"{}")
    link = model / "snapshots" / "0a1b" / "tokenizer.json"
    link.symlink_to("../../blobs/77")
    assert read_inside(link) == b"{}"
    link.unlink()
    (tmp_path / "secret").touch()
    link.symlink_to("../../blobs/../../secret")
    with pytest.raises(DataError, match="outside its folder"):
        read_inside(link)
