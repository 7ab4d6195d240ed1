"""Read labelled samples from files: ListOps and logical inference as shipped, rows of tables, and
folders with a sub-folder per class. Mistakes are collected and reported together."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megarecur.data_prep import list_ops, logic
from megarecur.data_prep.compressed import open_whole, plain_suffix
from megarecur.data_prep.listing import list_folder
from megarecur.data_prep.readers import (
    NULL,
    Notes,
    Reading,
    find_sources,
    holds_rows,
    read_rows,
    read_text,
    refuse_empty,
    to_text,
)
from megarecur.data_prep.tables import CSV_DELIMITERS, MISSING, look_up
from megarecur.errors import DataError

log = logging.getLogger(__name__)

SHOWN = 5
"""Number of mistakes that are reported in full."""
Row = tuple[str, tuple[str, ...], str]
"""A row: (place, texts, label)."""
Found = list[tuple[Path, str | None]]
"""Files of an input, with their classes if folders define them."""


class Mistakes:
    """Mistakes in some files, reported together."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.count = 0

    def add(self, text: str) -> None:
        """Add one mistake with place, value and remedy."""
        self.count += 1
        if len(self.told) < SHOWN:
            self.told.append(text)

    def raise_if_any(self) -> None:
        """Raise DataError with all mistakes, if there are any."""
        if not self.count:
            return
        more = f"\n  and {self.count - len(self.told)} more" if self.count > SHOWN else ""
        plural = "s" if self.count > 1 else ""
        lines = "".join(f"\n  {line}" for line in self.told)
        raise DataError(f"{self.count} mistake{plural} in the samples{lines}{more}")


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (place, line) of a text file, plain or compressed, without empty lines.

    Raises:
        DataError: the file cannot be read, is damaged or is not UTF-8.
    """
    place = f"{path}"
    with open_whole(path) as stream:
        try:
            for number, content in enumerate(stream, 1):
                place = f"{path}: line {number}"
                if line := content.decode().rstrip("\r\n"):
                    yield place, line
        except UnicodeDecodeError:
            raise DataError(f"{place} is not UTF-8; convert the file") from None


def read_list_ops(path: Path, mistakes: Mistakes) -> Iterator[tuple[list[str], int]]:
    """Yield (tokens, answer) of a file of lines `label TAB tree`, or with columns reversed under a
    header Source, Target (Long Range Arena). Labels are checked."""
    swapped = False
    for place, line in read_lines(path):
        cells = line.split("\t")
        if cells[:2] == ["Source", "Target"]:
            swapped = True
            continue
        if len(cells) != 2:
            mistakes.add(
                f"{place} has {len(cells)} column(s), not label TAB tree; correct the line"
            )
            continue
        label, tree = reversed(cells) if swapped else cells
        tokens = list_ops.flatten(tree)
        try:
            answer = list_ops.evaluate(tokens)
        except ValueError as error:
            mistakes.add(f"{place}: {error} ({tree[:40]!r}); correct the line")
            continue
        if label != str(answer):
            mistakes.add(
                f"{place} has label {label!r}, but its tree gives {answer}; correct the label, or "
                "remove the line"
            )
            continue
        yield tokens, answer


def read_logic(path: Path, mistakes: Mistakes) -> Iterator[tuple[str, str, str]]:
    """Yield (relation, left, right) of a file of such lines. Relations are checked."""
    for place, line in read_lines(path):
        cells = line.split("\t")
        if len(cells) != 3:
            mistakes.add(
                f"{place} has {len(cells)} column(s), not relation TAB left TAB right; correct the "
                "line"
            )
            continue
        relation, left, right = cells
        try:
            found = logic.relate(logic.evaluate(left), logic.evaluate(right))
        except (ValueError, RecursionError) as error:
            mistakes.add(f"{place} is not a pair of formulas: {error}; correct the line")
            continue
        if relation != found:
            mistakes.add(
                f"{place} has relation {relation!r}, but its formulas are {found!r}; correct the "
                "relation, or remove the line"
            )
            continue
        yield relation, left, right


@dataclass(frozen=True)
class LabelledInputs:
    """The files with labelled samples, and how they are read."""

    text_keys: Sequence[str]
    """One field, or two for pairs."""
    label_key: str
    reading: Reading
    """Quoting, errors and exclusions."""
    wanted: Sequence[str] = ()
    """Classes that are read; empty means all."""
    columns: Sequence[str] = ()
    """Column names of csv and tsv files without a header."""

    def find(self, entry: str) -> Found:
        """Return the files of an input (a file, a glob, a folder of files, or one with a sub-folder
        per class) and the class of each, None if its rows define it. Excluded files are logged.

        Raises:
            DataError: no file was found, or files of classes were given for pairs.
        """
        refuse_empty(entry)
        folder = Path(entry)
        if not folder.is_dir():
            return [(Path(str(source)), None) for source in find_sources([entry], self.exclude)]
        listing = list_folder(folder, self.exclude)
        if all(path.parent == folder for path in listing.files):
            return [(Path(str(source)), None) for source in find_sources([entry], self.exclude)]
        if len(self.text_keys) > 1:
            raise DataError(f"{entry}: a file of a class's folder is one text, not a pair")
        listing.keep(lambda path: path.parent != folder, "beside the folders of classes")
        if told := listing.describe():
            log.warning("%s: %s", entry, told)
        found = [(path, path.relative_to(folder).parts[0]) for path in listing.files]
        return [(path, c) for path, c in found if not self.wanted or c in self.wanted]

    @property
    def exclude(self) -> tuple[str, ...]:
        """Patterns of files and folders to exclude."""
        return self.reading.exclude

    def read(self, files: Found, mistakes: Mistakes, notes: Notes) -> Iterator[Row]:
        """Yield the samples of files.

        Args:
            files: files with their classes (see `find`).
            mistakes: receives rows without the fields.
            notes: counts skipped samples.

        Raises:
            DataError: a file is damaged, not text, or not a table.
        """
        for path, label in files:
            if label is not None:
                text = self._read_text(path, notes)
                if text:
                    yield str(path), (text,), label
                continue
            for place, texts, found in self._read_table(path, mistakes, notes):
                if not self.wanted or found in self.wanted:
                    yield place, texts, found

    def _read_text(self, path: Path, notes: Notes) -> str:
        """Return the text of a file of a class; "" if it is skipped or empty."""
        found = list(read_text(path, self.reading, notes))
        return (found[0] or b"").decode() if found else ""

    def _read_table(self, path: Path, mistakes: Mistakes, notes: Notes) -> Iterator[Row]:
        """Yield the samples of the rows of a table, of all classes."""
        if self.columns and plain_suffix(path) not in CSV_DELIMITERS:
            raise DataError(
                f"{path}: --column names the columns of csv and tsv files, and this is neither; "
                "omit "
                "--column, or pass only such files"
            )
        if not holds_rows(path):
            raise DataError(
                f"{path}: labelled samples are read from jsonl, csv, tsv, parquet, Arrow files, "
                "and folders with one sub-folder per class; convert it"
            )
        keys = (*self.text_keys, self.label_key)
        for place, row in read_rows(path, self.reading, keys, notes, self.columns):
            if row is None:
                continue
            values = [look_up(row, key) for key in keys]
            missing = [k for k, v in zip(keys, values, strict=True) if v is MISSING or v == ""]
            empty = [k for k, v in zip(keys, values, strict=True) if v is None]
            if missing:
                mistakes.add(
                    f"{place} has no {' nor '.join(map(repr, missing))} (found "
                    f"{sorted(row)[:8]}); name the fields by --text-key and --label-key"
                )
            elif empty and self.reading.errors == "skip":
                notes.add(NULL, place)
            elif empty:
                mistakes.add(
                    f"{place} has null for {' and '.join(map(repr, empty))}; correct the row, or "
                    "skip such rows by --errors skip"
                )
            else:
                texts = [to_text(v, place, self.reading, notes) for v in values]
                if None not in texts:
                    yield place, tuple(map(str, texts[:-1])), str(texts[-1])


def fail(text: str) -> NoReturn:
    """Raise DataError."""
    raise DataError(text)


def collect(
    rows: Iterable[Row], mistakes: Mistakes, wanted: Sequence[str] = ()
) -> tuple[list[str], int]:
    """Return (classes in order, rows) of some samples; numbers are sorted as numbers.

    Raises:
        DataError: mistakes, no rows, fewer than two classes, or none of a requested class.
    """
    count, found = 0, set()
    for _, _, label in rows:
        found.add(label)
        count += 1
    mistakes.raise_if_any()
    if missing := sorted(set(wanted) - found):
        raise DataError(
            f"--class {', '.join(missing)}: no sample has that label; spell labels as the files do"
        )
    if len(found) < 2:
        raise DataError(
            f"the samples have {len(found)} class(es) ({', '.join(sorted(found)) or 'no sample'}); "
            "use files with at least two"
        )
    ordered = sorted(found)
    with suppress(ValueError):
        numbers = {label: float(label) for label in ordered}
        if not any(math.isnan(number) for number in numbers.values()):  # NaN has no order
            ordered.sort(key=numbers.__getitem__)
    return ordered, count
