"""Read pairs of sentences: two text files line by line, or the rows of a table.

A pair of text files has a sentence per line, of which line n of one file translates line n of the
other. A row of a table has both sentences, in two fields or in a `translation` column as Hugging
Face datasets have it: {"translation": {"de": ..., "en": ...}}.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megarecur.data_prep.compressed import open_whole, plain_suffix
from megarecur.data_prep.hub import HubShard, read_column_names
from megarecur.data_prep.labelled import Mistakes
from megarecur.data_prep.readers import (
    NULL,
    Notes,
    Reading,
    Source,
    find_sources,
    holds_rows,
    read_lines,
    read_rows,
    size_of,
    to_text,
)
from megarecur.data_prep.tables import (
    BINARY_SUFFIXES,
    CSV_DELIMITERS,
    MISSING,
    column_names,
    is_mds,
    look_up,
)
from megarecur.errors import ConfigError, DataError

NESTED = "translation"
"""The column that holds both sentences in datasets of translations."""
BLOCK_BYTES = 1 << 20
Sentences = tuple[str | None, str | None]
"""Source and target; None for one that is skipped because it is not text."""


@dataclass(frozen=True)
class Bitext:
    """The inputs of one split: text files of both sides in order, or tables."""

    sources: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()


@dataclass(frozen=True)
class Keys:
    """The fields of a row with the two sentences, and names of columns without a header."""

    source: str = "source"
    target: str = "target"
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """Some pairs in order: two text files, or one table."""

    files: tuple[Source, ...]
    """One table, or the files of source and target."""
    num_lines: int = 0
    """Lines of each text file; 0 for a table."""

    @property
    def size(self) -> int:
        """Stored bytes."""
        return sum(map(size_of, self.files))


def find_parts(split: str, bitext: Bitext, exclude: Sequence[str] = ()) -> list[Part]:
    """Return the files of a split in order.

    Raises:
        ConfigError: only one side, both sides and tables, or not the same number of files.
        DataError: an input matches no file, or is a table where text is expected or the reverse.
    """
    prefix = "" if split == "train" else f"{split}-"
    source, target = f"--{prefix}source", f"--{prefix}target"
    table = "INPUT" if split == "train" else f"--{split}"
    if bool(bitext.sources) != bool(bitext.targets):
        given, other = (source, target) if bitext.sources else (target, source)
        raise ConfigError(f"{given} without {other}: a pair has two sides; add {other}")
    if bitext.sources and bitext.tables:
        raise ConfigError(
            f"{source} and {table} {bitext.tables[0]}: both name the pairs of {split}; give text "
            "files of the two sides, or tables that hold both"
        )
    if bitext.tables:
        tables = [p for entry in bitext.tables for p in find_sources([entry], exclude)]
        for path in tables:
            if isinstance(path, Path) and not holds_rows(path):
                raise DataError(
                    f"{path}: is not a table (jsonl, csv, tsv, parquet, arrow, mds), which holds "
                    f"both sides; name text files by {source} and {target}"
                )
        return [Part((path,)) for path in tables]
    sides = [
        [path for entry in entries for path in find_sources([entry], exclude)]
        for entries in (bitext.sources, bitext.targets)
    ]
    for path in (path for side in sides for path in side):
        if not isinstance(path, Path) or holds_rows(path):
            raise DataError(
                f"{path}: is a table, and {source} and {target} name text files with a sentence "
                f"per line; name it as {table}, with --source-key and --target-key"
            )
    if len(sides[0]) != len(sides[1]):
        raise ConfigError(
            f"{source} names {len(sides[0])} files and {target} {len(sides[1])}; name the files "
            "of both sides in the same order"
        )
    return [Part(files) for files in zip(*sides, strict=True)]


def count_lines(path: Path) -> int:
    """Return the number of lines of a text file, plain or compressed; an end without a line break
    counts.

    Raises:
        DataError: the file cannot be read, or is damaged.
    """
    count, last = 0, b"\n"
    with open_whole(path) as stream:
        while block := stream.read(BLOCK_BYTES):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")


def read_part(
    part: Part, keys: Keys, reading: Reading, mistakes: Mistakes, notes: Notes
) -> Iterator[Sentences]:
    """Yield the pairs of some files, without the white space around sentences.

    Args:
        mistakes: receives rows without the fields.
        notes: counts skipped sentences.

    Raises:
        DataError: a file is damaged, not text, or not a table; the message names the line or row.
    """
    if len(part.files) == 1:
        yield from _read_table(part.files[0], keys, reading, mistakes, notes)
        return
    sides = [read_lines(Path(str(path)), reading, notes) for path in part.files]
    for (_, source), (_, target) in zip(*sides, strict=True):
        yield _strip(source), _strip(target)


def _strip(text: str | None) -> str | None:
    return None if text is None else text.strip()


def _read_table(
    path: Source, keys: Keys, reading: Reading, mistakes: Mistakes, notes: Notes
) -> Iterator[Sentences]:
    """Yield the pairs of a table."""
    if keys.columns and (isinstance(path, HubShard) or plain_suffix(path) not in CSV_DELIMITERS):
        raise DataError(
            f"{path}: --column names the columns of csv and tsv files, and this is neither; omit "
            "--column, or pass only such files"
        )
    names = _column_names(path)
    fields = [_place(key, names) for key in (keys.source, keys.target)]
    lacking = [f for f in fields if names and f not in names and f.split(".")[0] not in names]
    if lacking:
        raise DataError(
            f"{path}: has no column {' nor '.join(lacking)} (it has {', '.join(names or ())}); "
            "name the columns by --source-key and --target-key"
        )
    for place, row in read_rows(path, reading, fields, notes, keys.columns):
        if row is None:
            yield None, None
            continue
        values = [look_up(row, _place(field, list(row))) for field in fields]
        named = list(zip((keys.source, keys.target), values, strict=True))
        missing = [key for key, value in named if value is MISSING]
        nulls = [key for key, value in named if value is None]
        if missing:
            mistakes.add(
                f"{place} has no {' nor '.join(map(repr, missing))} (found {_show(row)}); name "
                "the fields by --source-key and --target-key"
            )
        elif nulls and reading.errors != "skip":
            mistakes.add(
                f"{place} has null for {' and '.join(map(repr, nulls))}; correct the row, or skip "
                "such rows by --errors skip"
            )
        elif nulls:
            notes.add(NULL, place)
            yield None, None
        else:
            source, target = (_strip(to_text(v, place, reading, notes)) for v in values)
            yield source, target


def _place(key: str, names: Sequence[str] | None) -> str:
    """Return the path of a field: inside the `translation` column where it is no column itself."""
    if names is None or key in names or key.split(".")[0] in names or NESTED not in names:
        return key
    return f"{NESTED}.{key}"


def _column_names(path: Source) -> list[str] | None:
    """Return the columns of a table that has them; None for rows that each name their own."""
    if isinstance(path, HubShard):
        return read_column_names(path)
    if path.suffix.lower() in BINARY_SUFFIXES or is_mds(path):
        return column_names(path)
    return None


def _show(row: dict[str, object]) -> str:
    """Return the fields of a row, those of its `translation` column too."""
    inner = row.get(NESTED)
    nested = [f"{NESTED}.{key}" for key in inner] if isinstance(inner, dict) else []
    return f"{sorted([*row, *nested])[:8]}"
