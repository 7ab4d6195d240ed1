"""Read input files as documents: files, globs and folders of txt; jsonl, csv, tsv; parquet, Arrow,
MDS.

All except the last three may be plain, gz, xz, zst or bz2. `hf:...` is a split of a Hugging Face
dataset.

A document is its checked UTF-8 bytes. Skipped documents, and rows whose quotation marks join
several lines, are counted in `Notes`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megarecur.data.mapped_files import hash_file
from megarecur.data_prep.compressed import open_whole, plain_suffix
from megarecur.data_prep.hub import PREFIX, HubShard, digest_again, find_shards, read_shard
from megarecur.data_prep.listing import (
    EXCLUDED,
    METADATA,
    Listing,
    is_excluded,
    list_folder,
    list_matches,
)
from megarecur.data_prep.tables import (
    BINARY_SUFFIXES,
    CSV_DELIMITERS,
    MDS_SUFFIX,
    MISSING,
    drop_copies,
    fields_of,
    fill,
    is_mds,
    look_up,
    read_arrow,
    read_csv,
    read_mds,
)
from megarecur.errors import DataError, refuse_undecodable
from megarecur.reading import parse_lenient

log = logging.getLogger(__name__)

Source = Path | HubShard
"""The source of one task: a file, or a shard of a Hugging Face dataset."""
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
FOLDER_SUFFIXES = (".txt", ".text", *JSON_SUFFIXES, *CSV_DELIMITERS, *BINARY_SUFFIXES, MDS_SUFFIX)
OTHER_KINDS = "of other kinds"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SHORTEST_HOLE = 8
HOLE = re.compile(rb"\0{%d,}" % SHORTEST_HOLE)
"""Zero bytes that a crash or a full disk left; text has no such run."""
NOT_UTF8, HOLES, NULL = "not UTF-8", "with holes of zero bytes", "null"
SURROGATES = "with lone surrogates"
JOINED = "rows that quotation marks join of several lines"


class Notes(dict[str, tuple[int, str]]):
    """Skipped or remarkable content, by kind: how often, and the first place."""

    def add(self, kind: str, place: str, count: int = 1) -> None:
        """Count an occurrence at a place."""
        before, first = self.get(kind, (0, place))
        self[kind] = before + count, first

    def merge(self, other: Notes | dict[str, Any]) -> None:
        """Add the counts of another, whose places come later."""
        for kind, (count, place) in other.items():
            self.add(kind, place, count)

    def tell(self) -> None:
        """Log a line for each kind."""
        for kind, (count, place) in sorted(self.items()):
            what = f"{count:,} {kind}" if kind == JOINED else f"skipped {count:,} documents: {kind}"
            log.warning("%s (first: %s)", what, place)


@dataclass(frozen=True)
class Reading:
    """Options for reading files as documents."""

    text_key: str = "text"
    """Field of a row that holds the text; `outer.inner` is a field within a field."""
    text_split: Literal["file", "line", "blank_line", "separator"] = "file"
    """End of a document in a txt file: its end, each line, blank lines, or lines equal to
    `separator`."""
    separator: str = ""
    errors: Literal["fail", "skip", "replace"] = "fail"
    """Treatment of content that is not text (bytes that are not UTF-8, holes of zero bytes, null in
    a row): fail, skip the document, or replace such bytes by U+FFFD."""
    exclude: tuple[str, ...] = ()
    """Patterns of files and folders to exclude."""
    template: str = ""
    """Text of a row made from several fields: "{title}\\n\\n{text}". Replaces text_key."""
    quoting: Literal["auto", "quoted", "none"] = "auto"
    """Whether cells of csv and tsv may be quoted; `auto` allows quotes in csv only."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a row that are read."""
        return fields_of(self.template) if self.template else (self.text_key,)

    def is_quoted(self, path: Path) -> bool:
        """Return True if cells of a csv or tsv file may be quoted."""
        return self.quoting == "quoted" or (self.quoting == "auto" and plain_suffix(path) == ".csv")

    def __post_init__(self) -> None:
        for name in ("text_key", "separator", "template"):
            refuse_undecodable(f"--{name.replace('_', '-')}", getattr(self, name))
        if self.template:
            fields_of(self.template)
        if (self.text_split == "separator") != bool(self.separator):
            raise DataError(
                f"text_split={self.text_split} with separator={self.separator!r}: "
                "use a separator only with text_split=separator"
            )
        if "\n" in self.separator or "\r" in self.separator:
            raise DataError(f"separator={self.separator!r}: holds the end of a line; remove it")


WHOLE_FILES = Reading()


def find_sources(inputs: Sequence[str | Path], exclude: Sequence[str] = ()) -> list[Source]:
    """Return the files that inputs (files, globs, folders) match, sorted, each once.

    After them, in the order given, the shards of Hugging Face datasets (`hf:...`).

    A folder matches the files below it whose names end in FOLDER_SUFFIXES, compressed or not,
    except hidden ones and metadata (`listing.list_folder`); a glob (`**` for any depth) may match
    files of any name. `exclude` patterns match a whole path, one below its folder, or a name, of
    files and folders. Excluded files are logged.

    Raises:
        DataError: an input matches no file.
    """
    if isinstance(inputs, (str, Path)):
        inputs = [inputs]
    found: list[Path] = []
    shards: dict[HubShard, None] = {}
    excluded = 0
    for entry in map(str, inputs):
        refuse_empty(entry)
        if entry.startswith(PREFIX):
            shards.update(dict.fromkeys(find_shards(entry)))
            continue
        listing = _list(Path(entry), entry, exclude)
        told = listing.describe()
        if told:
            log.warning("%s: %s", entry, told)
        excluded += len(listing.left_out.get(EXCLUDED, ()))
        found += listing.files
    if excluded and not found:
        raise DataError(f"all input files are excluded by {list(exclude)}; exclude fewer")
    unique = {path.resolve(): path for path in sorted(found, reverse=True)}
    if again := len(found) - len(unique):
        log.warning("%d input files were found more than once, and are read once", again)
    return [*sorted(unique.values()), *shards]


def refuse_empty(entry: str) -> None:
    """Reject an empty input, which would mean the current folder.

    Raises:
        DataError: the input is empty.
    """
    if not entry:
        raise DataError(
            "an input is '', perhaps from an unset variable; name a file, glob or folder"
        )


def _list(path: Path, entry: str, exclude: Sequence[str]) -> Listing:
    """Return the files of one input.

    Raises:
        DataError: the input has no files.
    """
    hint = "no such file"
    if path.is_dir():
        listing = list_folder(path, exclude)
        listing.keep(lambda p: plain_suffix(p) in FOLDER_SUFFIXES or is_mds(p), OTHER_KINDS)
        saved = any(p.suffix == ".arrow" for p in listing.files)
        copies = set(listing.files) - set(drop_copies(listing.files))
        listing.keep(lambda p: p not in copies and not (saved and p.name == "state.json"), METADATA)
        hint = f"no {', '.join(FOLDER_SUFFIXES)} files below; use a glob for others"
    elif path.exists():
        listing = Listing([path])
        if is_excluded(path, path, exclude):
            listing.keep(lambda _: False, EXCLUDED)
        elif not path.is_file():
            raise DataError(f"{entry}: is neither a file nor a folder; write it to a file first")
    else:
        listing = list_matches(entry, exclude)
    if not listing.files and EXCLUDED not in listing.left_out:
        told = f" ({listing.describe()})" if listing.left_out else ""
        raise DataError(f"{entry}: {hint}{told}; name files, globs or folders")
    return listing


def size_of(source: Source) -> int:
    """Return the stored bytes of a source."""
    return source.size if isinstance(source, HubShard) else source.stat().st_size


def hash_of(source: Source) -> str:
    """Return the identity of a source's content: for a file, its xxh64."""
    return source.digest if isinstance(source, HubShard) else hash_file(source)


def hash_again(source: Source) -> str:
    """Return the identity of a source's current bytes; a shard of a dataset keeps its recorded
    one."""
    return digest_again(source) if isinstance(source, HubShard) else hash_file(source)


def read_documents(
    path: Source, reading: Reading, notes: Notes | None = None
) -> Iterator[bytes | None]:
    """Yield the documents of one source in order, as UTF-8; None for a skipped one.

    Args:
        notes: counts skipped documents, and rows that span lines.

    Raises:
        DataError: the file is damaged, contradicts its name, or is not text (with errors=fail); the
        message names the file and the byte, line or row.
    """
    notes = Notes() if notes is None else notes
    if isinstance(path, Path) and not holds_rows(path):
        yield from read_text(path, reading, notes)
        return
    for place, row in read_rows(path, reading, reading.fields, notes):
        if row is None:
            yield None
        else:
            yield from _text_of(row, place, reading, notes)


def read_text(path: Path, reading: Reading, notes: Notes) -> Iterator[bytes | None]:
    """Yield the documents of a txt file, whatever its name; None for a skipped one."""
    with open_whole(path) as stream:
        for offset, content in _split_text(stream, reading):
            yield _check(content, f"{path}", offset, reading, notes)


def read_lines(path: Path, reading: Reading, notes: Notes) -> Iterator[tuple[str, str | None]]:
    """Yield (place, text) of every line of a text file, empty ones included; None for a skipped
    one.

    Raises:
        DataError: see `read_documents`.
    """
    with open_whole(path) as stream:
        for number, (offset, line) in enumerate(_split_lines(stream), 1):
            if offset == 0:
                line = line.removeprefix(BYTE_ORDER_MARK)
            place = f"{path}: line {number}"
            checked = _check(line, place, offset, reading, notes)
            yield place, None if checked is None else checked.decode()


def holds_rows(path: Path) -> bool:
    """Return True if a file is a table by its name."""
    suffix = plain_suffix(path)
    tables = (*JSON_SUFFIXES, *CSV_DELIMITERS)
    return suffix in tables or path.suffix.lower() in BINARY_SUFFIXES or is_mds(path)


def read_rows(
    path: Source,
    reading: Reading,
    fields: Sequence[str],
    notes: Notes,
    columns: Sequence[str] = (),
) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a table; None for a skipped row.

    Args:
        notes: counts rows that are skipped or span lines.
        columns: columns of a csv or tsv file without a header.

    Raises:
        DataError: see `read_documents`.
    """
    if isinstance(path, HubShard):
        yield from read_shard(path, fields)
    elif is_mds(path):
        yield from read_mds(path, fields)
    elif path.suffix.lower() in BINARY_SUFFIXES:
        yield from read_arrow(path, fields)
    elif delimiter := CSV_DELIMITERS.get(plain_suffix(path)):

        def check(content: bytes, place: str, offset: int) -> bytes | None:
            return _check(content, place, offset, reading, notes)

        def join(place: str) -> None:
            notes.add(JOINED, place)

        with open_whole(path) as stream:
            quoted = reading.is_quoted(path)
            yield from read_csv(path, stream, delimiter, quoted, check, join, columns)
    else:
        with open_whole(path) as stream:
            yield from _read_json_lines(path, stream, reading, notes)


def _check(content: bytes, place: str, offset: int, reading: Reading, notes: Notes) -> bytes | None:
    """Check that content is UTF-8 without holes; otherwise do as `reading.errors` says."""
    remedy = "use --errors skip or --errors replace"
    if b"\0" * SHORTEST_HOLE in content:
        hole = HOLE.search(content)
        assert hole is not None
        if reading.errors == "fail":
            raise DataError(
                f"{place}: byte {offset + hole.start()} begins a hole of {len(hole[0])} zero "
                f"bytes, as a crash or a full disk leaves it; create the file again, or {remedy}"
            )
        if reading.errors == "skip":
            notes.add(HOLES, f"{place}, byte {offset + hole.start()}")
            return None
        content = HOLE.sub("\ufffd".encode(), content)
    try:
        content.decode()
    except UnicodeDecodeError as error:
        where = f"byte {offset + error.start} (0x{content[error.start]:02x})"
        if reading.errors == "fail":
            raise DataError(
                f"{place}: {where} is not UTF-8; convert the file, or {remedy}"
            ) from None
        if reading.errors == "skip":
            notes.add(NOT_UTF8, f"{place}, {where}")
            return None
        return content.decode(errors="replace").encode()
    return content


def _split_text(stream: BinaryIO, reading: Reading) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, content) of every document of a txt file that is not empty."""
    if reading.text_split == "file":
        pieces = iter([(0, stream.read())])
    elif reading.text_split == "line":
        pieces = _split_lines(stream)
    else:
        pieces = _split_at_lines(stream, reading.separator.encode())
    for offset, content in pieces:
        if offset == 0 and content.startswith(BYTE_ORDER_MARK):
            offset, content = len(BYTE_ORDER_MARK), content[len(BYTE_ORDER_MARK) :]
        if content:
            yield offset, content


def _split_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield every line of a txt file without its end."""
    offset = 0
    for line in stream:
        yield offset, line.rstrip(b"\r\n")
        offset += len(line)


def _split_at_lines(stream: BinaryIO, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the text between lines equal to the separator, or between blank lines without one."""
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


def _read_json_lines(
    path: Path, stream: BinaryIO, reading: Reading, notes: Notes
) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) of a jsonl file, skipping blank lines."""
    offset = 0
    for number, line in enumerate(stream, 1):
        begin, offset = offset, offset + len(line)
        if number == 1 and line.startswith(BYTE_ORDER_MARK):
            line = line[len(BYTE_ORDER_MARK) :]
            begin += len(BYTE_ORDER_MARK)
        if not line.strip():
            continue
        place = f"{path}: line {number}"
        checked = _check(line, place, begin, reading, notes)
        if checked is None:
            yield place, None
            continue
        try:
            row = parse_lenient(checked.decode())
        except ValueError as error:
            if hole := HOLE.search(line):
                raise DataError(
                    f"{place} holds a hole of {len(hole[0])} zero bytes from byte "
                    f"{begin + hole.start()} on, which cannot be replaced; use --errors skip"
                ) from None
            raise DataError(
                f"{place} (byte {begin}) is not JSON ({error}); a jsonl file holds one object per "
                "line"
            ) from None
        if not isinstance(row, dict):
            raise DataError(
                f"{place} has no text under text_key={reading.text_key!r}, nor any fields "
                f"(found {checked[:40].decode(errors='replace')!r}); a jsonl file holds one object "
                "per line"
            )
        yield place, row


def _text_of(row: Any, place: str, reading: Reading, notes: Notes) -> Iterator[bytes | None]:
    """Yield the text of a row, None if it is skipped, nothing if it is empty."""
    values = {field: look_up(row, field) for field in reading.fields}
    for field, value in values.items():
        if value is MISSING:
            raise DataError(
                f"{place} has no text under text_key={field!r} (found keys {sorted(row)[:8]}); "
                "name the key by --text-key, or several by --template"
            )
        if value is None:
            if reading.errors != "skip":
                raise DataError(
                    f"{place} has no text: {field!r} is null; correct the row, or skip such rows "
                    "by --errors skip"
                )
            notes.add(NULL, place)
            yield None
            return
        if isinstance(value, bytes):
            checked = to_text(value, place, reading, notes)
            if checked is None:
                yield None
                return
            values[field] = checked
    if reading.template:
        text = fill(reading.template, values, place)
    else:
        text = values[reading.text_key]
        if not isinstance(text, str):
            raise DataError(
                f"{place} has no text under text_key={reading.text_key!r}, but "
                f"{type(text).__name__} {str(text)[:40]}; to convert it to text, use "
                f"--template '{{{reading.text_key}}}'"
            )
    content: bytes | None
    try:
        content = text.encode()
    except UnicodeEncodeError:
        mended = to_text(text, place, reading, notes)
        content = None if mended is None else mended.encode()
    if content != b"":
        yield content


def to_text(value: Any, place: str, reading: Reading, notes: Notes) -> str | None:
    """Return a value of a row as UTF-8 text; None if the row is skipped."""
    if isinstance(value, bytes):
        checked = _check(value, place, 0, reading, notes)
        return None if checked is None else checked.decode()
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can contain half a surrogate pair
        if reading.errors == "fail":
            raise DataError(
                f"{place} holds a lone surrogate (\\u{ord(text[error.start]):04x}), which is not "
                "text; use --errors skip or --errors replace"
            ) from None
        if reading.errors == "skip":
            notes.add(SURROGATES, place)
            return None
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
