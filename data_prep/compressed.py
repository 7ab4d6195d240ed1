"""Read compressed and plain files as streams of bytes, like the tools of their formats.

A gz, xz, zst or bz2 file is a sequence of members, each with an end: concatenated files are one
file, and a truncated file is an error. The formats allow skippable frames between members of zst,
zero bytes in multiples of four in xz, and trailing zero bytes, as tapes leave them, in gz and bz2.
Any other content after the last member is an error too, because a member whose first bytes are
damaged looks the same.

The first bytes decide whether a file is compressed. A name that contradicts them is an error,
because such files are often truncated or mistaken.
"""

from __future__ import annotations

import bz2
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from megarecur.errors import DataError

COMPRESSIONS = {".gz": "gz", ".xz": "xz", ".zst": "zst", ".zstd": "zst", ".bz2": "bz2"}
"""Compression format of each suffix."""
MAGIC = {
    "gz": re.compile(rb"\x1f\x8b"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zst": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame, or one to skip
    "bz2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
}
LARGEST_WINDOW = 1 << 31
"""Maximum window of zst content in bytes: that of `zstd --long=31`, its maximum."""
DECODERS: dict[str, Callable[[], Any]] = {
    "gz": lambda: zlib.decompressobj(wbits=31),
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
    "zst": lambda: zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj(),
    "bz2": bz2.BZ2Decompressor,
}
FOREIGN = {
    rb"PK\x03\x04|PK\x05\x06": "a zip archive",
    rb"7z\xbc\xaf\x27\x1c": "a 7z archive",
    rb"Rar!\x1a\x07": "a rar archive",
    rb".{257}ustar": "a tar archive",
    rb"\x04\x22\x4d\x18|\x02\x21\x4c\x18": "lz4-compressed",
    rb"[\x22-\x27]\xb5\x2f\xfd": "zst-compressed by a version before 0.8",
    rb"\x1f\x9d": "compressed by `compress`",
    rb"LZIP\x01": "lzip-compressed",
    rb"\xff\x06\x00\x00sNaPpY": "snappy-compressed",
    rb"\x5d\x00\x00.{2}(?:\xff{8}|.{5}\x00{3})": "an lzma file of before xz",
    rb"PAR1\x15": "a parquet file",
    rb"ARROW1\x00\x00": "an Arrow file",
    rb"SQLite format 3\x00": "an SQLite database",
    rb"%PDF-1\.": "a PDF",
    rb"\x89PNG": "a PNG picture",
    rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff": "UTF-32 text",
    rb"\xff\xfe|\xfe\xff": "UTF-16 text",
}
FOREIGN_MAGIC = [(re.compile(magic, re.DOTALL), text) for magic, text in FOREIGN.items()]
HEAD_BYTES = 512
BLOCK_BYTES = {"gz": 1 << 16, "xz": 1 << 16, "bz2": 1 << 16, "zst": 1 << 12}
"""Compressed bytes unpacked at a time, by format. The library of zst returns all of their content
at once, and zeros grow 30,000 times."""
MOST_GROWTH, FREE_BYTES = 2000, 1 << 28
"""A file may unpack to `FREE_BYTES`, and beyond that to `MOST_GROWTH` times what was read of it.
Text grows less than 100 times."""
PIECE_BYTES = 1 << 20
BUFFER_BYTES = 1 << 20
ERRORS = (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, EOFError, MemoryError)
"""Errors that the libraries raise for damaged data; bz2 raises OSError."""


def uncompressed(path: Path) -> Path:
    """Return the path without its compression suffix."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path


def plain_suffix(path: Path) -> str:
    """Return the lower-case suffix of a name without its compression suffix."""
    return uncompressed(path).suffix.lower()


@contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file to be read to its end, decompressed.

    Raises:
        DataError: the file cannot be opened or contradicts its name; also raised while reading, if
        its compressed data is damaged.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    with file:
        head = file.read(HEAD_BYTES)
        file.seek(0)
        kind = _check_name(path, head)
        if not kind:
            _refuse_foreign(path, head)
            yield file
            return
        stream = io.BufferedReader(Unpacked(path, file, kind), BUFFER_BYTES)
        _refuse_foreign(path, stream.peek(HEAD_BYTES)[:HEAD_BYTES])
        yield stream


def _check_name(path: Path, head: bytes) -> str:
    """Return the compression of a file by its first bytes, "" if none; reject contradicting
    names."""
    kind = next((kind for kind, magic in MAGIC.items() if magic.match(head)), "")
    suffix = path.suffix.lower()
    named = COMPRESSIONS.get(suffix, "")
    if kind == named or not (named or suffix):
        return kind
    if not head:
        raise DataError(f"{path}: is empty, so it is not a {named} file; create it again")
    if not kind and not head.strip(b"\0"):
        raise DataError(
            f"{path}: begins with {len(head)} zero bytes instead of {named} data: a hole, as a "
            "crash or a full disk leaves it; create it again"
        )
    _refuse_foreign(path, head)
    what = f"is {kind}-compressed" if kind else f"is not {named}-compressed"
    raise DataError(f"{path}: is not what its name says: it {what}; rename it accordingly")


def _refuse_foreign(path: Path, head: bytes) -> None:
    """Reject content that is not text, by its first bytes."""
    found = next((text for magic, text in FOREIGN_MAGIC if magic.match(head)), "")
    if not found and _alternates_zeros(head):
        found = "UTF-16 text without a byte-order mark"
    if not found and _has_empty_halves(head):
        found = "UTF-32 text without a byte-order mark"
    if found:
        raise DataError(
            f"{path}: is {found}, not text; unpack it or convert it to UTF-8 txt or jsonl"
        )


def _alternates_zeros(head: bytes) -> bool:
    """Return True if mostly every second byte is zero, and hardly any between, as in UTF-16 of
    ASCII."""
    counts = sorted(head[i::2].count(0) for i in (0, 1))
    return counts[0] <= len(head) // 32 and counts[1] > max(len(head) // 4, 1)


def _has_empty_halves(head: bytes) -> bool:
    """Whether of every four bytes the upper two are zero and the lowest hardly ever, as in UTF-32
    of most texts."""
    zeros, count = [head[i::4].count(0) for i in range(4)], len(head) // 4
    few, most = count // 16, count - count // 16
    return count >= 4 and any(
        zeros[lowest] <= few and min(zeros[upper], zeros[upper + 1]) >= most
        for lowest, upper in ((0, 2), (3, 0))
    )


class Unpacked(io.RawIOBase):
    """The decompressed content of a compressed file.

    Args:
        file: file open at its start; the caller closes it.
    """

    def __init__(self, path: Path, file: BinaryIO, kind: str) -> None:
        self.pieces = unpack(path, file, kind)
        self.ready = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with decompressed bytes; 0 at the end."""
        while not self.ready:
            piece = next(self.pieces, None)
            if piece is None:
                return 0
            self.ready = memoryview(piece)
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count


def unpack(path: Path, file: BinaryIO, kind: str) -> Iterator[bytes]:
    """Yield the decompressed content of a file in pieces.

    Raises:
        DataError: the file is damaged, truncated, or followed by other content; or it grows as no
            text does.
    """
    block, grown = file.read(BLOCK_BYTES[kind]), 0
    while block:
        decoder = DECODERS[kind]()
        while True:
            try:
                for piece in _feed(kind, decoder, block):
                    grown += len(piece)
                    if grown > max(FREE_BYTES, MOST_GROWTH * file.tell()):
                        raise DataError(
                            f"{path}: {file.tell()} bytes of it unpack to more than {grown}, as "
                            "no text does; unpack it beforehand, if it is meant"
                        )
                    yield piece
            except ERRORS as error:
                raise _explain(path, error) from None
            if decoder.eof:
                break
            block = file.read(BLOCK_BYTES[kind])
            if not block:
                raise _explain(path, EOFError("it ends before its data does"))
        block = _skip_zeros(path, file, kind, decoder.unused_data)


def _feed(kind: str, decoder: Any, block: bytes) -> Iterator[bytes]:
    """Yield a decoder's output for more bytes, in pieces of bounded size."""
    if kind == "zst":
        yield decoder.decompress(block)
        return
    piece = decoder.decompress(block, PIECE_BYTES)
    yield piece
    while len(piece) == PIECE_BYTES and not decoder.eof:
        piece = decoder.decompress(getattr(decoder, "unconsumed_tail", b""), PIECE_BYTES)
        yield piece


def _skip_zeros(path: Path, file: BinaryIO, kind: str, block: bytes) -> bytes:
    """Skip the zero bytes after a member; return the bytes after them, empty at the end of the
    file."""
    block = block or file.read(BLOCK_BYTES[kind])
    zeros = 0
    while block and kind != "zst":
        rest = block.lstrip(b"\0")
        zeros += len(block) - len(rest)
        if rest:
            block = rest
            break
        block = file.read(BLOCK_BYTES[kind])
    if zeros and (zeros % 4 if kind == "xz" else block):
        raise _explain(path, EOFError(f"{zeros} zero bytes where a {kind} file may have none"))
    return block


def _explain(path: Path, error: BaseException) -> DataError:
    """Return an error with a library's message about damaged data and a remedy."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or "memory" in reason.lower():
        return DataError(
            f"{path}: not enough memory to unpack it ({reason}); use fewer "
            "--workers, or compress it again with a smaller window"
        )
    if "dictionary" in reason.lower():
        return DataError(
            f"{path}: was compressed with a dictionary ({reason}); unpack it with `zstd -d -D`"
        )
    return DataError(
        f"{path}: its compressed data is damaged or truncated ({reason}); create it again"
    )
