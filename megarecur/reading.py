"""Bounded reading of files that others may have written.

    read_json(path)              one value; limits of size, depth and digits
    parse_json(line)             the same for bytes or text
    parse_metrics(line)          a row of metrics.jsonl, or None
    parse_lenient(line)          a line of a corpus
    read_bytes(path)             a regular file, no larger than a limit
    find_inside(folder, name)    the path of a name that a file in `folder` gives
    check_inside(folder, names)  the same check of many names
    open_tensors(path)           a safetensors file, whose header claims no more than it holds
    decompress(kind, ...)        pieces of a compressed file, up to the size that its index promises
    escape(text)                 text without control characters
    escape_logs()                the same for warnings on stderr

Every function raises ValueError for content that is wrong and OSError for a file that cannot be
read. A process that lacks descriptors or memory gets ShortageError instead: the file is then not at
fault.
"""

from __future__ import annotations

import bz2
import errno
import json
import logging
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megarecur.errors import refuse_shortage

MAX_BYTES = 1 << 28
"""Maximum size of a file that is read whole: more than the index of a million shards."""
MAX_DEPTH = 64
"""Maximum nesting of JSON; files of this project and of Hugging Face stay below 12."""
MAX_NAME_BYTES, MAX_PART_BYTES = 1024, 255
BLOCK_BYTES = 1 << 16
PIECE_BYTES = 1 << 20
ZSTD_WINDOW = 1 << 27
"""Maximum window of zstd: that of the program `zstd` without --long."""


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file of at most `most` bytes.

    Raises:
        ValueError: it is a device or pipe, which may never end, or larger.
        OSError: it cannot be read.
        ShortageError: the process lacks descriptors or memory.
    """
    try:
        # O_NONBLOCK: opening a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb", buffering=0) as file:
            found = os.fstat(descriptor)
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("is no regular file")
            if found.st_size > most:
                raise ValueError(f"has {found.st_size} bytes, more than {most}")
            content = b""
            while block := file.read(max(found.st_size + 1 - len(content), BLOCK_BYTES)):
                content = content + block if content else block
                if len(content) > most:
                    raise ValueError(f"has more than {most} bytes")
            return content
    except (OSError, MemoryError) as error:
        refuse_shortage(error, path)
        raise


def read_text(path: Path, most: int = MAX_BYTES) -> str:
    """Return the UTF-8 text of a file; see `read_bytes`."""
    return read_bytes(path, most).decode("utf-8")


def read_json(path: Path, most: int = MAX_BYTES, depth: int = MAX_DEPTH) -> Any:
    """Return the value of a JSON file; see `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(path, most), depth)


def read_object(path: Path, most: int = MAX_BYTES, depth: int = MAX_DEPTH) -> dict[str, Any]:
    """Return the value of a JSON file that must be an object; see `read_json`."""
    return parse_object(read_bytes(path, most), depth)


def parse_json(content: bytes | str, depth: int = MAX_DEPTH) -> Any:
    """Return the value of JSON, nested at most `depth` times.

    Raises:
        ValueError: it is not JSON, nested too deeply, repeats a key, or holds a number of more than
            4,300 digits.
    """
    try:
        value = json.loads(content, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"is nested more than {depth} times") from None
    level = [value]
    for _ in range(depth + 1):
        if not level:
            return value
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    raise ValueError(f"is nested more than {depth} times")


def parse_object(content: bytes | str, depth: int = MAX_DEPTH) -> dict[str, Any]:
    """Return the value of JSON that must be an object; see `parse_json`."""
    value = parse_json(content, depth)
    if not isinstance(value, dict):
        raise ValueError(f"holds {type(value).__name__} instead of an object")
    return value


def parse_row(line: bytes | str) -> dict[str, Any] | None:
    """Return one line of a .jsonl file; None if it is not a JSON object."""
    try:
        return parse_object(line)
    except ValueError:
        return None


def parse_metrics(line: bytes | str) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl; None if it is not one.

    It has a `step`, a whole number of at least 0, and every other value is a number or null.
    """
    row = parse_row(line)
    if row is None or type(row.get("step")) is not int or not 0 <= row["step"] < 1 << 62:
        return None
    for key, value in row.items():
        number = type(value) in (int, float, type(None), bool)
        if not number or (type(value) is int and abs(value) >= 1 << 62) or not key.isprintable():
            return None
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!a:.80} is written twice")
    return values


DEEPEST_JSON = 100
CLOSERS = {"[": "]", "{": "}"}
JSON_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"|[][{}]', re.DOTALL)
"""Strings, to ignore the brackets inside them, and brackets."""


def parse_lenient(text: str) -> Any:
    """Return the value of a line of a corpus: numbers of any length, any depth, keys that repeat.

    An integer with more digits than Python converts keeps its digits. Values deeper than
    DEEPEST_JSON, which are not read, become null.

    Raises:
        ValueError: the text is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # too many digits
        return json.loads(text, parse_int=_to_int)
    except RecursionError:
        return json.loads(_cut_depth(text), parse_int=_to_int)


@dataclass(frozen=True)
class LongInteger:
    """An integer with more digits than Python converts."""

    digits: str

    def __str__(self) -> str:
        return self.digits


def _to_int(digits: str) -> int | LongInteger:
    try:
        return int(digits)
    except ValueError:
        return LongInteger(digits)


def _cut_depth(text: str) -> str:
    """Return a JSON text with null for values deeper than DEEPEST_JSON; brackets must pair."""
    kept, closers, end = [], "", 0
    for token in JSON_BRACKETS.finditer(text):
        mark = token[0]
        if mark in CLOSERS:
            if len(closers) == DEEPEST_JSON:
                kept.append(text[end : token.start()])
            closers += CLOSERS[mark]
        elif mark in "]}":
            if not closers.endswith(mark):
                raise ValueError(f"{mark!r} at character {token.start()} closes nothing")
            closers = closers[:-1]
            if len(closers) == DEEPEST_JSON:
                kept.append("null")
                end = token.end()
    if closers:
        raise ValueError(f"{len(closers)} brackets are not closed")
    return "".join([*kept, text[end:]])


# -------------------------------------------------------------------------------------------- names


def check_name(name: Any) -> str:
    """Return a relative path that stays below the folder that it is joined to.

    Raises:
        ValueError: it is no text, empty, absolute, too long, contains `..`, or contains characters
            that no file name should.
    """
    if not isinstance(name, str):
        raise ValueError(f"{name!a:.80} is no name of a file")
    if not name or not name.isprintable() or "\\" in name:
        raise ValueError(f"{name!a:.80} is no name of a file")
    parts = name.split("/")
    longest = max(len(part.encode()) for part in parts)
    if len(name.encode()) > MAX_NAME_BYTES or longest > MAX_PART_BYTES:
        raise ValueError(f"{name!a:.80} is too long for the name of a file")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name!a:.80} leads outside its folder, or names a folder")
    return name


def check_plain_name(name: Any) -> str:
    """Return a name without folders that does not begin with a dot; see `check_name`."""
    if "/" in check_name(name) or name.startswith("."):
        raise ValueError(f"{name!a:.80} is no plain name of a file")
    return str(name)


def find_inside(folder: Path, name: Any) -> Path:
    """Return folder/name, for a name that a file in the folder gives.

    A link may lead to another file of the folder, or to the blobs of the Hugging Face cache that
    the folder is a snapshot of. The file need not exist.

    Raises:
        ValueError: the name, or a link on its way, leads outside the folder.
    """
    path = folder / check_name(name)
    check_links(folder, path)
    return path


def check_inside(folder: Path, names: Iterable[Any]) -> None:
    """Check the names of many files that a file in the folder gives; see `find_inside`.

    Lists each folder once instead of asking for every file, which network file systems answer
    slowly.

    Raises:
        ValueError: a name, or a link on its way, leads outside the folder.
    """
    below: dict[str, set[str]] = {}
    for name in names:
        parent, _, last = check_name(name).rpartition("/")
        below.setdefault(parent, set()).add(last)
        while parent:
            parent, _, last = parent.rpartition("/")
            below.setdefault(parent, set()).add(last)
    for parent, wanted in below.items():
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder / parent) as found:
            for entry in found:
                if entry.name in wanted and entry.is_symlink():
                    check_links(folder, Path(entry.path))


def check_links(folder: Path, path: Path) -> None:
    """Reject a path below a folder that a link leads outside; see `find_inside`.

    Raises:
        ValueError: with the place to which it leads.
    """
    root, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    if real.is_relative_to(root):
        return
    for parent in root.parents:
        # MODEL/snapshots/REVISION/FILE -> MODEL/blobs/HASH
        if parent.name == "snapshots" and real.is_relative_to(parent.parent / "blobs"):
            return
    raise ValueError(f"{str(path)!a} is a link that leads outside its folder, to {str(real)!a}")


# ------------------------------------------------------------------------------------- safetensors


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file as `safe_open(path, "pt")` does.

    Raises:
        ValueError: its header claims more than the file holds, here or while tensors are read.
        OSError: it cannot be read.
        ShortageError: the process lacks descriptors or memory.
    """
    from safetensors import SafetensorError, safe_open

    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("is no regular file")
        with open(path, "rb", buffering=0) as file:
            claimed = int.from_bytes(file.read(8), "little")
        if found.st_size < 8 or claimed > found.st_size - 8:
            raise ValueError(f"its header claims {claimed} bytes, and the file has {found.st_size}")
        # The library checks that the tensors of the header cover the rest of the file.
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (OSError, MemoryError) as error:
        refuse_shortage(error, path)
        raise
    except SafetensorError as error:
        raise ValueError(str(error)) from None


# ------------------------------------------------------------------------------------- compression


def decompress(kind: str, file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield the content of a compressed shard in pieces, exactly `size` bytes in total.

    Args:
        kind: mosaicml-streaming's name of the compression, such as `zstd` or `gz:6`.
        file: open at its start.

    Raises:
        ValueError: unknown compression, damaged content, or content of another size.
    """
    family = kind.partition(":")[0] if isinstance(kind, str) else ""
    if family not in DECODERS:
        raise ValueError(f"its compression {kind!a:.80} is unknown; known: {', '.join(DECODERS)}")
    left = size
    try:
        for piece in DECODERS[family](file):
            left -= len(piece)
            if left < 0:
                raise ValueError(f"it unpacks to more than {size} bytes")
            if piece:
                yield piece
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # Each compression raises its own; bz2 an OSError without number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(str(error) or type(error).__name__) from None
    if left:
        raise ValueError(f"it unpacks to {size - left} bytes instead of {size}")


def _members(file: BinaryIO, new: Callable[[], Any]) -> Iterator[bytes]:
    """Yield the content of consecutive gz or bz2 members in pieces of bounded size."""
    block = file.read(BLOCK_BYTES)
    while block:
        decoder = new()
        while not decoder.eof:
            if not block and getattr(decoder, "needs_input", True):
                block = file.read(BLOCK_BYTES)
                if not block:
                    raise ValueError("it ends before its data does")
            yield decoder.decompress(block, PIECE_BYTES)
            # bz2 keeps what it has not decoded, zlib returns it.
            block = getattr(decoder, "unconsumed_tail", b"")
        block = decoder.unused_data or file.read(BLOCK_BYTES)


def _gz(file: BinaryIO) -> Iterator[bytes]:
    return _members(file, lambda: zlib.decompressobj(wbits=31))


def _bz2(file: BinaryIO) -> Iterator[bytes]:
    return _members(file, bz2.BZ2Decompressor)


def _zstd(file: BinaryIO) -> Iterator[bytes]:
    import zstandard

    decoder = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW)
    with decoder.stream_reader(file, read_across_frames=True, closefd=False) as reader:
        while piece := reader.read(PIECE_BYTES):
            yield piece


def _br(file: BinaryIO) -> Iterator[bytes]:
    import brotli

    decoder = brotli.Decompressor()
    while block := file.read(BLOCK_BYTES):
        yield decoder.process(block, output_buffer_limit=PIECE_BYTES)
        while not decoder.can_accept_more_data():
            yield decoder.process(b"", output_buffer_limit=PIECE_BYTES)
    while not decoder.is_finished():
        piece = decoder.process(b"", output_buffer_limit=PIECE_BYTES)
        if not piece:
            raise ValueError("it ends before its data does")
        yield piece


def _snappy(file: BinaryIO) -> Iterator[bytes]:
    import snappy

    # A block of snappy has no stream: its head states its size, a varint of at most 2^32.
    content = file.read()
    size = shift = 0
    for byte in content[:5]:
        size |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    # The format grows content at most 64 times (a copy of 64 bytes takes 3).
    if size > 64 * len(content):
        raise ValueError(f"it claims {size} bytes, more than it can hold")
    yield snappy.decompress(content)


DECODERS: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {
    "br": _br, "bz2": _bz2, "gz": _gz, "snappy": _snappy, "zstd": _zstd,
}  # fmt: skip
"""Decoders of mosaicml-streaming's compressions by their names."""


# ---------------------------------------------------------------------------------------- terminals


def escape(text: str, keep: str = "\n\t") -> str:
    r"""Return text with control characters, and those that reorder text, written as \x1b or \u202e.

    Terminals obey such characters: a file name could clear the screen, or write to the clipboard.

    Args:
        keep: control characters that stay.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c in keep or c.isprintable() or c in SPACES else c.encode("unicode_escape").decode()
        for c in text
    )


def escape_logs() -> None:
    """Escape the log records that go to stderr for lack of other handlers."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_EscapedRecord())


class _EscapedRecord(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return escape(super().format(record))


SPACES = "\u00a0\u200b\u200c\u200d\u2009\u202f\u3000\ufeff\u00ad"
"""Invisible characters that stand in ordinary text; none of them moves a cursor."""
