"""Reading what others may have written: limits of size, depth and names; escaped characters."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import json
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path
from random import Random

import brotli
import pytest
import snappy
import zstandard

from megarecur import reading
from megarecur.errors import ShortageError
from megarecur.reading import (
    check_inside,
    check_name,
    decompress,
    escape,
    escape_logs,
    find_inside,
    open_tensors,
    parse_json,
    parse_lenient,
    parse_metrics,
    parse_row,
    read_bytes,
    read_json,
)

DEEP = ["[" * n for n in (65, 5000, 5_000_000)]
DEEP += ["[" * 65 + "]" * 65, '{"a":' * 5000 + "1" + "}" * 5000]


NO_JSON = [*DEEP, "9" * 5000, '{"a": 1, "a": 2}', "{", "", "\ufeff1", "\ud800"]


@pytest.mark.parametrize("text", NO_JSON, ids=range(len(NO_JSON)))
def test_what_json_may_not_be(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)
    assert parse_row(text) is None
    assert parse_json("[" * 64 + "]" * 64) == json.loads("[" * 64 + "]" * 64)


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.write_bytes(b"12345")
    assert read_bytes(file, 5) == b"12345" and read_json(file) == 12345
    os.mkfifo(pipe)
    with file.open("r+b") as handle:
        handle.truncate(1 << 40)
    for path in (file, pipe, Path("/dev/zero")):
        with pytest.raises(ValueError, match=r"no regular file|more than"):
            read_bytes(path)
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)


def test_a_process_without_descriptors_blames_no_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("1")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        with pytest.raises(ShortageError, match=r"Too many open files\); raise the limit"):
            read_bytes(file)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert read_bytes(file) == b"1"


@pytest.mark.parametrize("name", ["a", "a/b.txt", "a b", "é", "..a", "a..", "x" * 255])
def test_names_inside(tmp_path: Path, name: str) -> None:
    assert find_inside(tmp_path, name) == tmp_path / name
    check_inside(tmp_path, [name, name])


@pytest.mark.parametrize(
    "name",
    [
        "/a",
        "../a",
        "a/../../b",
        "a/..",
        ".",
        "",
        "a/",
        "a//b",
        "a\nb",
        "a\0",
        "a\\b",
        "x" * 256,
        "a/" * 600 + "b",
        "\x1b[2J",
        "\u202ea",
        "\ud800",
        None,
        1,
        b"a",
        ["a"],
    ],
)
def test_names_outside(tmp_path: Path, name: object) -> None:
    for check in (
        check_name,
        lambda n: find_inside(tmp_path, n),
        lambda n: check_inside(tmp_path, [n]),
    ):
        with pytest.raises(ValueError):
            check(name)


def test_links_on_the_way_are_seen(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    (other / "x").touch()
    (folder / "sub").symlink_to(other)
    (folder / "up").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    for name in ("sub/x", "sub", "up/other/x"):
        with pytest.raises(ValueError, match="leads outside its folder"):
            find_inside(folder, name)
        with pytest.raises(ValueError, match="leads outside its folder"):
            check_inside(folder, [name])
    check_inside(folder, ["absent", "loop"])
    (tmp_path / "alias").symlink_to(folder)
    (folder / "real").touch()
    (folder / "inner").symlink_to("real")
    check_inside(tmp_path / "alias", ["real", "inner"])


PACK = {
    "zstd": lambda content: zstandard.compress(content),
    "zstd:7": lambda content: zstandard.compress(content, 7),
    "gz": gzip.compress,
    "bz2:9": bz2.compress,
    "br": brotli.compress,
    "snappy": snappy.compress,
}


@pytest.mark.parametrize("kind", PACK)
def test_compressed_content_has_the_promised_size(kind: str) -> None:
    content = Random(1).randbytes(300_000) + bytes(3_000_000)
    packed = PACK[kind](content)
    pieces = list(decompress(kind, io.BytesIO(packed), len(content)))
    assert b"".join(pieces) == content
    for wrong in (0, len(content) - 1, len(content) + 1, 1 << 50):
        with pytest.raises(ValueError, match="unpacks to"):
            list(decompress(kind, io.BytesIO(packed), wrong))
    for damaged in (packed[: len(packed) // 2], b"", b"\xff" * 50):
        with pytest.raises(ValueError):
            list(decompress(kind, io.BytesIO(damaged), len(content)))
    for unknown in ("lz4", "", None, "zst"):
        with pytest.raises(ValueError, match="is unknown"):
            list(decompress(unknown, io.BytesIO(packed), 1))  # type: ignore[arg-type]


def test_members_follow_each_other() -> None:
    for kind in ("gz", "bz2:9", "zstd"):
        content = PACK[kind](b"abc") + PACK[kind](b"defg")
        assert b"".join(decompress(kind, io.BytesIO(content), 7)) == b"abcdefg"


def test_terminals_get_nothing_to_obey() -> None:
    assert escape("plain é 漢字\n\ttext\u00a0x") == "plain é 漢字\n\ttext\u00a0x"
    assert escape("\x1b[2J\x9b1m\r\x07\x00\u202e\ud800") == (
        "\\x1b[2J\\x9b1m\\r\\x07\\x00\\u202e\\ud800"
    )
    every = "".join(map(chr, range(0x110000)))
    shown = escape(every, keep="")
    assert shown.isprintable() or set(filter(lambda c: not c.isprintable(), shown)) <= set(
        reading.SPACES
    )
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown)


def test_error_messages_are_escaped(tmp_path: Path) -> None:
    code = "from megarecur.launch.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "check", str(tmp_path / "a\x1b[2Jb.yaml")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "\x1b" not in done.stderr
    assert "a\\x1b[2Jb.yaml: cannot be read" in done.stderr


ROWS = [
    "12",
    "null",
    "[]",
    '"x"',
    "{}",
    '{"step": "3"}',
    '{"step": true}',
    '{"step": -1}',
    '{"step": 1.5}',
    '{"step": null}',
    '{"step": 3, "val/loss": "x"}',
    '{"step": 3, "val/loss": [1]}',
    '{"stop": 3}',
    '{"step": 3, "val/loss": {}}',
    '{"step": 3',
    "\x00",
    '{"step": 99999999999999999999}',
    '{"step": 3, "a\\u001b": 1}',
    '{"step": 3, "step": 4}',
    '{"step": ' + "9" * 5000 + "}",
    '{"step": 3, "x": ' + "[" * 70 + "]" * 70 + "}",
    '{"step": 3, "x": ' + "[" * 100000,
]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_damaged_rows_of_metrics(row: str) -> None:
    assert parse_metrics(row) is None
    assert parse_metrics(row.encode()) is None
    assert parse_metrics('{"step": 3, "val/loss": null, "x": 1.5, "y": NaN}') is not None


def test_shortages_have_remedies() -> None:
    from megarecur.errors import SHORTAGES, refuse_shortage

    assert set(SHORTAGES) == {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
    refuse_shortage(FileNotFoundError(2, "x"), "path")
    with pytest.raises(ShortageError, match=r"path: cannot be opened .* free memory"):
        refuse_shortage(MemoryError(), "path")


def test_logged_warnings_are_escaped() -> None:
    escape_logs()
    assert logging.lastResort is not None
    record = logging.LogRecord("x", logging.WARNING, "", 1, "%s is odd", ("a\x1b[2Jb",), None)
    assert logging.lastResort.format(record) == "a\\x1b[2Jb is odd"


def test_lines_of_corpora_may_be_odd_but_not_endless() -> None:
    assert parse_lenient('{"a": 1, "a": 2}') == {"a": 2}
    assert str(parse_lenient("9" * 5000)) == "9" * 5000
    deep = parse_lenient('{"a": ' + "[" * 200_000 + "]" * 200_000 + ', "b": 1}')
    assert deep["b"] == 1


# ------------------------------------------------------------------------------------- safetensors


def tensor_file(header: bytes, data: bytes = b"", claimed: int | None = None) -> bytes:
    size = len(header) if claimed is None else claimed
    return size.to_bytes(8, "little") + header + data


def describe(shape: list[int], end: int) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()


HOSTILE_TENSORS = {
    "empty": b"",
    "short": b"\x01\x00",
    "header of terabytes": tensor_file(b"{}", claimed=1 << 42),
    "header beyond the file": tensor_file(b"{}", claimed=90_000_000),
    "largest header": tensor_file(b"{}", claimed=(1 << 64) - 1),
    "tensor of terabytes": tensor_file(describe([1 << 40], 1 << 42), bytes(16)),
    "overflow": tensor_file(describe([1 << 62, 4], 16), bytes(16)),
    "cut": tensor_file(describe([4], 16), bytes(12)),
    "deep": tensor_file(b'{"a":' + b"[" * 100_000),
}


@pytest.mark.parametrize("kind", HOSTILE_TENSORS)
def test_a_tensor_file_claims_no_more_than_it_holds(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(HOSTILE_TENSORS[kind])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 36, limits[1]))
        with pytest.raises(ValueError, match="header"), open_tensors(file):
            pytest.fail("it was opened")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_a_tensor_file_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="is no regular file"), open_tensors(path):
            pytest.fail("it was opened")
    file = tmp_path / "sound.safetensors"
    file.write_bytes(tensor_file(describe([4], 16), bytes(16)))
    with open_tensors(file) as tensors:
        assert tensors.get_slice("a").get_shape() == [4]
        with pytest.raises(ValueError), open_tensors(file) as again:
            again.get_slice("missing")
