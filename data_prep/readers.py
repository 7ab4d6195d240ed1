"""Input files to documents: files, globs and folders of txt; jsonl, csv, tsv; parquet, Arrow, MDS.

All but the last three may be plain, gz, xz or zst. `hf:...` is a split of a Hugging Face dataset.

A document is its UTF-8 bytes, checked. Whether a file is compressed is decided by its first bytes,
and a name that says otherwise is an error, since half of such files are truncated or mistaken.
"""

from __future__ import annotations

import fnmatch
import glob
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from data_prep.hub import PREFIX, HubShard, digest_again, find_shards, read_shard
from data_prep.tables import (
    BINARY_SUFFIXES,
    CSV_DELIMITERS,
    MDS_SUFFIX,
    drop_copies,
    fields_of,
    fill,
    is_mds,
    look_up,
    read_arrow,
    read_csv,
    read_mds,
)
from megarecur.data.corpus import hash_file
from megarecur.errors import DataError

Source = Path | HubShard
"""What one task reads: a file, or a shard of a Hugging Face dataset."""
COMPRESSIONS = {".gz": b"\x1f\x8b", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd"}
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
FOLDER_SUFFIXES = (".txt", ".text", *JSON_SUFFIXES, *CSV_DELIMITERS, *BINARY_SUFFIXES, MDS_SUFFIX)
DATASET_FILES = ("state.json", "dataset_info.json", "dataset_dict.json")
"""What Hugging Face's save_to_disk writes beside the data."""
FOREIGN = {
    b"PK\x03\x04": "a zip archive",
    b"PAR1\x15": "a parquet file",
    b"BZh91AY&SY": "bzip2",
    b"%PDF-1.": "a PDF",
    b"\x89PNG": "a PNG picture",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
BLOCK_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Reading:
    """How files become documents."""

    text_key: str = "text"
    """Field of a row that holds the text, `outer.inner` for a field within a field."""
    text_split: Literal["file", "blank_line", "separator"] = "file"
    """What ends a document in a txt file: its end, blank lines, or lines equal to `separator`."""
    separator: str = ""
    errors: Literal["fail", "skip", "replace"] = "fail"
    """Bytes that are not UTF-8: fail, skip the document, or put U+FFFD in their place."""
    exclude: tuple[str, ...] = ()
    """Patterns of paths or file names to leave out."""
    template: str = ""
    """A row's text, made of several fields: "{title}\\n\\n{text}". Replaces text_key."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a row that are read."""
        return fields_of(self.template) if self.template else (self.text_key,)

    def __post_init__(self) -> None:
        if self.template:
            fields_of(self.template)
        if (self.text_split == "separator") != bool(self.separator):
            raise DataError(
                f"text_split={self.text_split} with separator={self.separator!r}: "
                "give a separator with text_split=separator, and only with it"
            )
        if "\n" in self.separator or "\r" in self.separator:
            raise DataError(
                f"separator={self.separator!r}: holds the end of a line; give the line without it"
            )


WHOLE_FILES = Reading()


def find_sources(inputs: Sequence[str | Path], exclude: Sequence[str] = ()) -> list[Source]:
    """The files that inputs (files, globs, folders) stand for, sorted, each once.

    After them, in the order given, the shards of Hugging Face datasets (`hf:...`).

    A folder stands for the files below it whose names end as FOLDER_SUFFIXES do, compressed or not;
    a glob (`**` for any depth) may match files of any name. `exclude` patterns match a whole path
    or a file name.

    Raises:
        DataError: an input stands for no file.
    """
    if isinstance(inputs, (str, Path)):
        inputs = [inputs]
    found: dict[Path, None] = {}
    shards: dict[HubShard, None] = {}
    for entry in map(str, inputs):
        if entry.startswith(PREFIX):
            shards.update(dict.fromkeys(find_shards(entry)))
            continue
        path = Path(entry)
        if path.is_dir():
            files = [p for p in path.rglob("*") if _plain_suffix(p) in FOLDER_SUFFIXES or is_mds(p)]
            if any(p.suffix == ".arrow" for p in files):
                files = [p for p in files if p.name not in DATASET_FILES]
            files = drop_copies(files)
            hint = f"no {', '.join(FOLDER_SUFFIXES)} files below; name others by a glob"
        elif path.exists():
            files, hint = [path], ""
        else:
            files, hint = [Path(p) for p in glob.glob(entry, recursive=True)], "no such file"
        files = [p for p in files if p.is_file()]
        if not files:
            raise DataError(f"{entry}: {hint}; give files, globs or folders")
        found.update(dict.fromkeys(files))
    kept = [
        path
        for path in found
        if not any(
            fnmatch.fnmatch(path.as_posix(), e) or fnmatch.fnmatch(path.name, e) for e in exclude
        )
    ]
    if found and not kept:
        raise DataError(f"all {len(found)} input files are excluded by {list(exclude)}")
    unique = {path.resolve(): path for path in sorted(kept, reverse=True)}
    return [*sorted(unique.values()), *shards]


def size_of(source: Source) -> int:
    """Bytes of a source as it lies there."""
    return source.size if isinstance(source, HubShard) else source.stat().st_size


def hash_of(source: Source) -> str:
    """The identity of a source's content: for a file, its xxh64."""
    return source.digest if isinstance(source, HubShard) else hash_file(source)


def hash_again(source: Source) -> str:
    """The same, from the bytes as they are now: a shard of a dataset knows what it was found as."""
    return digest_again(source) if isinstance(source, HubShard) else hash_file(source)


def _plain_suffix(path: Path) -> str:
    """The suffix of a name, that of its compression left out."""
    path = Path(path.name.lower())
    return (path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix


def open_source(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed.

    Raises:
        DataError: it cannot be opened, or is not what its name says.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    is_packed = next((s for s, magic in COMPRESSIONS.items() if head.startswith(magic)), "")
    named = path.suffix.lower() if path.suffix.lower() in COMPRESSIONS else ""
    foreign = next((text for magic, text in FOREIGN.items() if head.startswith(magic)), "")
    if head[257:262] == b"ustar":
        foreign = "a tar archive"
    if foreign:
        raise DataError(f"{path}: is {foreign}, not text; convert it to UTF-8 txt or jsonl")
    if is_packed != named and (named or _plain_suffix(path)):
        what = f"is {is_packed[1:]}-compressed" if is_packed else f"is not {named[1:]}-compressed"
        raise DataError(
            f"{path}: is not what its name says: it {what}; rename it after what it is"
            if head
            else f"{path}: is empty, which no {named[1:]} file is; make it again"
        )
    if is_packed == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if is_packed == ".xz":
        return lzma.open(path, "rb")  # type: ignore[return-value]
    if is_packed == ".zst":
        return io.BufferedReader(ZstdFile(path), BLOCK_BYTES)
    return open(path, "rb")


class ZstdFile(io.RawIOBase):
    """A zst file, decompressed; unlike zstandard's own reader, it notices when one is cut short."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "rb")  # noqa: SIM115 (closed by close)
        self.frame: Any = None
        self.ready = b""

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with decompressed bytes; 0 at the end."""
        import zstandard

        while not self.ready:
            block = self.frame.unused_data if self.frame and self.frame.eof else b""
            block = block or self.file.read(BLOCK_BYTES)
            if not block:
                if self.frame and not self.frame.eof:
                    raise EOFError("the last frame has no end")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = zstandard.ZstdDecompressor().decompressobj()
            self.ready = self.frame.decompress(block)
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        super().close()


@contextmanager
def open_whole(path: Path) -> Iterator[BinaryIO]:
    """The same, for reading to the end.

    Raises:
        DataError: also while it is read, since its compressed data is damaged.
    """
    import zstandard

    with open_source(path) as stream:
        try:
            yield stream
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as e:
            raise DataError(
                f"{path}: its compressed data is damaged or cut short ({e}); make it again"
            ) from None


def read_documents(path: Source, reading: Reading) -> Iterator[bytes | None]:
    """The documents of one source in order, as UTF-8; None for one that was skipped.

    Raises:
        DataError: the file is damaged, is not what its name says, or holds bytes that are not
            UTF-8 (with errors=fail); the message names the file and the byte or line.
    """
    if isinstance(path, HubShard):
        for place, row in read_shard(path, reading.fields):
            yield from _text_of(row, place, reading)
        return
    if path.suffix.lower() in BINARY_SUFFIXES or is_mds(path):
        rows = (read_mds if is_mds(path) else read_arrow)(path, reading.fields)
        for place, row in rows:
            yield from _text_of(row, place, reading)
        return
    with open_whole(path) as stream:
        if _plain_suffix(path) in JSON_SUFFIXES:
            yield from _read_json_lines(path, stream, reading)
        elif delimiter := CSV_DELIMITERS.get(_plain_suffix(path)):

            def decode(content: bytes, place: str, offset: int) -> bytes | None:
                return _decode(content, place, offset, reading.errors)

            for place, cells in read_csv(path, stream, delimiter, decode):
                yield from [None] if cells is None else _text_of(cells, place, reading)
        else:
            for offset, content in _split_text(stream, reading):
                yield _decode(content, f"{path}", offset, reading.errors)


def _decode(content: bytes, place: str, offset: int, errors: str) -> bytes | None:
    """Check that content is UTF-8, and do as `errors` says where it is not."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        if errors == "fail":
            raise DataError(
                f"{place}: byte {offset + error.start} (0x{content[error.start]:02x}) is not "
                "UTF-8; convert the file, or use --errors skip or --errors replace"
            ) from None
        return content.decode(errors="replace").encode() if errors == "replace" else None
    return content


def _split_text(stream: BinaryIO, reading: Reading) -> Iterator[tuple[int, bytes]]:
    """The (offset, content) of every document of a txt file that is not empty."""
    if reading.text_split == "file":
        pieces = iter([(0, stream.read())])
    else:
        pieces = _split_at_lines(stream, reading.separator.encode())
    for offset, content in pieces:
        if offset == 0 and content.startswith(BYTE_ORDER_MARK):
            offset, content = len(BYTE_ORDER_MARK), content[len(BYTE_ORDER_MARK) :]
        if content:
            yield offset, content


def _split_at_lines(stream: BinaryIO, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """What lies between lines that are the separator, or blank where there is none."""
    begin = end = 0
    lines: list[bytes] = []
    for line in stream:
        end += len(line)
        if (line.rstrip(b"\r\n") == separator) if separator else not line.strip():
            yield begin, b"".join(lines)
            begin, lines = end, []
        else:
            lines.append(line)
    yield begin, b"".join(lines)


def _read_json_lines(path: Path, stream: BinaryIO, reading: Reading) -> Iterator[bytes | None]:
    """The texts of a jsonl file."""
    offset = 0
    for number, line in enumerate(stream, 1):
        begin, offset = offset, offset + len(line)
        if number == 1 and line.startswith(BYTE_ORDER_MARK):
            line = line[len(BYTE_ORDER_MARK) :]
            begin += len(BYTE_ORDER_MARK)
        if not line.strip():
            continue
        checked = _decode(line, f"{path}: line {number}", begin, reading.errors)
        if checked is None:
            yield None
            continue
        try:
            value = json.loads(checked)
        except ValueError as error:
            raise DataError(
                f"{path}: line {number} (byte {begin}) is not JSON ({error}); a jsonl file holds "
                "one object per line"
            ) from None
        yield from _text_of(value, f"{path}: line {number} (byte {begin})", reading)


def _text_of(row: Any, place: str, reading: Reading) -> Iterator[bytes | None]:
    """The text of a row, None if it is skipped, nothing if it is empty."""
    if not isinstance(row, dict):
        raise DataError(
            f"{place} has no text under text_key={reading.text_key!r}, nor any fields "
            f"(found {repr(row)[:40]}); a jsonl file holds one object per line"
        )
    if reading.template:
        text, missing = fill(reading.template, row)
    else:
        text = look_up(row, reading.text_key)
        missing = [] if isinstance(text, str) else [reading.text_key]
    if missing:
        raise DataError(
            f"{place} has no text under text_key={missing[0]!r} (found keys {sorted(row)[:8]}); "
            "name the key by --text-key, or several by --template"
        )
    try:
        content = text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        if reading.errors == "fail":
            raise DataError(
                f"{place} holds a lone surrogate (\\u{ord(text[error.start]):04x}), which is not "
                "text; use --errors skip or --errors replace"
            ) from None
        if reading.errors == "skip":
            yield None
            return
        content = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    if content:
        yield content
