"""Inputs and unfinished work that are damaged or hostile: one error that names the file."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from support.image_corpora import draw_pixels, encode

from megarecur.data_prep import image_inputs, list_ops
from megarecur.data_prep.image_encoding import AS_STORED, DamagedPicture, encode_picture
from megarecur.data_prep.image_inputs import Unit, read_unit
from megarecur.data_prep.images import load_index
from megarecur.data_prep.labelled import Mistakes
from megarecur.data_prep.list_ops import Trees, draw_tree
from megarecur.data_prep.plan import Request, read_record
from megarecur.data_prep.shards import read_decision
from megarecur.data_prep.tables import read_shape
from megarecur.errors import DataError

DAMAGED = [b"", b"{", b"[]", b"7", b"{}", b'{"request": 1}', b'{"a": ' * 100_000, b"\xff\xfe",
           b"9" * 5000]  # fmt: skip
WORK: dict[str, Callable[[Path], Any]] = {
    "plan.json": lambda file: read_record(file, Request(("x",), "bytes")),
    "decision.json": lambda file: read_decision(file.parent),
    "0.npz": lambda file: load_index(file.with_suffix(""), "train"),
}
"""Readers of files of unfinished work, by the file's name."""


@pytest.mark.parametrize("name", WORK)
def test_damaged_work_files_are_named(tmp_path: Path, name: str) -> None:
    for content in DAMAGED:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: (is damaged|was submitted with) .*again"):
            WORK[name](tmp_path / name)


def test_a_table_names_no_file_outside_its_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "outside.png"
    inside.mkdir()
    picture = encode(draw_pixels(1))
    outside.write_bytes(picture)
    (inside / "own.png").write_bytes(picture)
    (inside / "link.png").symlink_to(outside)
    table = inside / "x.parquet"
    for name in ("own.png", "./own.png", "a/../own.png", b"own.png"):
        assert image_inputs._find_beside(table, name) == inside / "own.png"
    for name in (str(outside), "../outside.png", "link.png", b"../outside.png"):
        with pytest.raises(ValueError, match=r"outside|absolute|link|\.\."):
            image_inputs._find_beside(table, name)
    for name in ("missing.png", "", None, 7):
        assert image_inputs._find_beside(table, name) is None


def test_a_picture_is_a_regular_file_of_bounded_size(tmp_path: Path) -> None:
    huge = tmp_path / "huge.png"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    for path in (huge, Path("/dev/zero")):
        with pytest.raises(DamagedPicture):
            encode_picture(path, AS_STORED)


def test_a_member_of_an_archive_claims_no_more_than_the_limit(tmp_path: Path) -> None:
    path, member = tmp_path / "x.tar", tarfile.TarInfo("a.jpg")
    member.size = 1 << 40
    path.write_bytes(member.tobuf() + bytes(1024))
    with pytest.raises(DataError, match=r"x\.tar: is damaged .*claims 1099511627776 bytes"):
        list(read_unit(Unit("tar", (path,)), Mistakes()))


def test_members_of_one_sample_are_bounded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_inputs, "MAX_BYTES", 1500)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for suffix in ("jpg", "json", "cls", "mp4"):
            member = tarfile.TarInfo(f"a.{suffix}")
            member.size = 700
            archive.addfile(member, io.BytesIO(bytes(700)))
    with pytest.raises(DataError, match="claims 2100 bytes"):
        list(read_unit(Unit("tar", (tmp_path / "x.tar",)), Mistakes()))


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"info": 1}', b"\xff", json.dumps([1])])
def test_a_description_of_a_table_that_cannot_be_read_is_ignored(
    tmp_path: Path, text: bytes
) -> None:
    schema = pyarrow.schema([("a", pyarrow.int64())], metadata={b"huggingface": text})
    parquet.write_table(pyarrow.table({"a": [1]}, schema=schema), tmp_path / "x.parquet")
    shape = read_shape(tmp_path / "x.parquet")
    assert shape.features == {} and list(shape.types) == ["a"]


def test_trees_that_grow_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_ops, "LONGEST", 10_000)
    rng = random.Random(1)
    with pytest.raises(DataError, match="--max-args 900 with --max-depth 200 gives trees of more"):
        for _ in range(100):
            draw_tree(rng, Trees(200, 900))
