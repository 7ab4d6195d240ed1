"""Compressed files: whatever their own tools find intact is read, whatever they find damaged is
refused, and the layouts of files from elsewhere are read byte for byte."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megarecur.data_prep import compressed
from megarecur.data_prep.compressed import open_whole
from megarecur.data_prep.readers import Reading, find_sources, read_documents
from megarecur.errors import DataError

CHECKED = zstandard.ZstdCompressor(write_checksum=True)
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda content: gzip.compress(content, mtime=0),
    "xz": lzma.compress,
    "zst": CHECKED.compress,
    "bz2": bz2.compress,
}
TOOLS = {
    "gz": ["gzip", "-t"], "xz": ["xz", "-qt"], "zst": ["zstd", "-qt", "--long=31"],
    "bz2": ["bzip2", "-qt"],
}  # fmt: skip


def unpack(path: Path) -> bytes:
    with open_whole(path) as stream:
        return stream.read()


def skippable(content: bytes, number: int = 0) -> bytes:
    return struct.pack("<II", 0x184D2A50 + number, len(content)) + content


members = st.just(b"") | st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), max_size=20
).map(
    lambda text: f"t{text}".encode()  # Else it might begin as a file that is no text does.
)
layouts = st.lists(members | st.integers(0, 9), max_size=5)
"""Members of a file, and between them numbers: of the zero words of xz, of the frames zst skips."""


@pytest.mark.parametrize("kind", PACK)
@settings(max_examples=60)
@given(layout=layouts, trailing=st.integers(0, 3000))
@example(layout=[3, b"after a frame to be skipped", 2, b"", 5], trailing=4)
@example(layout=[b"a", b"b"], trailing=1)
def test_any_layout_of_members_is_read(
    kind: str, layout: list[bytes | int], trailing: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Members anywhere, frames to be skipped first, between and last, padding after any member."""
    content, parts = b"", list[bytes]()
    for part in layout:
        if isinstance(part, bytes):
            content += part
            parts.append(PACK[kind](part))
        elif kind == "zst":
            parts.append(skippable(b"x" * part, part))
        elif kind == "xz" and parts:
            parts.append(bytes(4 * part))
    packed = b"".join(parts)
    if packed and kind in ("gz", "bz2", "xz"):
        packed += bytes(trailing if kind != "xz" else trailing // 4 * 4)
    path = tmp_path_factory.mktemp("layout") / f"a.txt.{kind}"
    path.write_bytes(packed)
    if packed:
        assert unpack(path) == content
    else:
        with pytest.raises(DataError, match=f"{path}: is empty, so it is not a {kind} file"):
            unpack(path)


@pytest.mark.parametrize("kind", PACK)
def test_damage_is_refused_wherever_it_is(kind: str, tmp_path: Path) -> None:
    """Every cut of the last member, every way to go on with what is none; in one line."""
    first, second = PACK[kind](b"first " * 9), PACK[kind](b"second")
    wrong = [first + second[:cut] for cut in range(1, len(second))]
    wrong += [first + b"\0\0\0\0garbage", first + b"garbage, longer than a header of any of these"]
    wrong += [first[:20] + bytes([first[20] ^ 0x40]) + first[21:-1]]
    wrong += [first + b"\0\0\0\0\0" + second]
    if kind == "xz":
        wrong += [first + b"\0\0\0", first + b"\0" + second]
    if kind == "zst":
        wrong += [first + b"\0" * 4, first + skippable(b"abc")[:-1], skippable(b"abc")[:5]]
    path = tmp_path / f"a.txt.{kind}"
    for packed in wrong:
        path.write_bytes(packed)
        with pytest.raises(
            DataError, match=rf"{path}: its compressed data is damaged or"
        ) as caught:
            unpack(path)
        assert "\n" not in str(caught.value)


def test_the_longest_window_of_zst(tmp_path: Path) -> None:
    """As `zstd --long=31 --ultra` writes public dumps, streamed, hence without their size."""
    parameters = zstandard.ZstdCompressionParameters(window_log=31, write_checksum=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = compressor.compress(b'{"text": "far"}\n' * 9) + compressor.flush()
    assert zstandard.get_frame_parameters(packed).window_size == 1 << 31
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert list(read_documents(tmp_path / "a.jsonl.zst", Reading())) == [b"far"] * 9


def test_content_that_grows_as_no_text_does(tmp_path: Path) -> None:
    """One kilobyte that unpacks to gigabytes; each piece is small."""
    compressor, path = zstandard.ZstdCompressor().compressobj(), tmp_path / "a.txt.zst"
    packed = b"".join(compressor.compress(bytes(1 << 24)) for _ in range(40)) + compressor.flush()
    path.write_bytes(packed)
    assert len(packed) < 1 << 17
    largest = total = 0
    refused = pytest.raises(DataError, match=r"a.txt.zst: .* unpack to more .* as no text does")
    with refused, open(path, "rb") as file:
        for piece in compressed.unpack(path, file, "zst"):
            largest, total = max(largest, len(piece)), total + len(piece)
    assert largest <= 1 << 27 and total <= compressed.FREE_BYTES + largest


def test_content_larger_than_any_buffer(tmp_path: Path) -> None:
    content = os.urandom(300_000) + bytes(3 << 20)
    for kind, pack in PACK.items():
        path = tmp_path / f"a.txt.{kind}"
        path.write_bytes(pack(content) + pack(content[:99]))
        assert unpack(path) == content + content[:99], kind


@pytest.mark.parametrize("kind", PACK)
def test_the_formats_own_tool_agrees(kind: str, tmp_path: Path) -> None:
    """Where it is installed: what it tests as intact is read, what it tests as damaged is not."""
    if shutil.which(TOOLS[kind][0]) is None:
        pytest.skip(f"{TOOLS[kind][0]} is not installed")
    one, two = PACK[kind](b"one " * 9), PACK[kind](b"two")
    path = tmp_path / f"a.txt.{kind}"
    zeros = [one + bytes(n) + rest for n in (1, 3, 4, 5, 8, 512) for rest in (b"", two)]
    others = [one, one + two, one[:-1], two[:3], bytes(8) + one, b"\0" * 512, b"plain text"]
    others += [skippable(b"abc") + one, one + skippable(b""), skippable(b"abc"), one + b"\x50"]
    for packed in [*zeros, *others]:
        path.write_bytes(packed)
        tested = subprocess.run([*TOOLS[kind], path], capture_output=True, check=False)
        if kind == "bz2" and packed.startswith(one) and packed not in (one, one + two):
            continue  # It ignores whatever follows the last stream, even half of another.
        try:
            unpack(path)
            read = True
        except DataError:
            read = False
        assert read == (tested.returncode == 0), (packed, tested)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt.gz", b"\0" * 4096, "begins with 512 zero bytes instead of gz data: a hole"),
        ("a.txt.bz2", b"plain", "it is not bz2-compressed; rename it"),
        ("a.txt", bz2.compress(b"x"), "it is bz2-compressed; rename it"),
        ("a.txt", skippable(b"x") + zstandard.compress(b"x"), "it is zst-compressed; rename it"),
        ("a.jsonl.lz4", b"\x04\x22\x4d\x18....", "is lz4-compressed, not text; unpack it"),
        ("a.jsonl.lzma", lzma.compress(b"x" * 99, lzma.FORMAT_ALONE), "is an lzma file of before"),
        ("a.tar.gz", gzip.compress(b"x" * 257 + b"ustar\0", mtime=0), "is a tar archive"),
        ("a.parquet.gz", gzip.compress(b"PAR1\x15\0", mtime=0), "is a parquet file"),
        ("a.txt", "no mark\n".encode("utf-16-le"), "is UTF-16 text without a byte-order mark"),
        ("a.csv.gz", gzip.compress("a,b\n".encode("utf-16"), mtime=0), "is UTF-16 text"),
        ("a.txt", "a".encode("utf-32"), "is UTF-32 text, not"),
        ("a.txt", b"\0\0\xfe\xff" + "a".encode("utf-32-be"), "is UTF-32 text, not"),
        ("a.txt", "no mark, еще\n".encode("utf-32-le"), "is UTF-32 text without a byte-order mark"),
        ("a.txt", "no mark, еще\n".encode("utf-32-be"), "is UTF-32 text without a byte-order mark"),
    ],
)
def test_what_is_in_a_file_decides(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_documents(tmp_path / name, Reading(errors="skip")))
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_other_names_of_compressions(tmp_path: Path) -> None:
    (tmp_path / "a.txt.ZST").write_bytes(CHECKED.compress(b"a"))
    (tmp_path / "b.txt.zstd").write_bytes(CHECKED.compress(b"b"))
    (tmp_path / "c.txt.bz2").write_bytes(bz2.compress(b"c"))
    sources = find_sources([tmp_path])
    assert [d for s in sources for d in read_documents(s, Reading())] == [b"a", b"b", b"c"]
