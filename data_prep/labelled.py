"""Labelled samples of files: the shipped files of ListOps and logical inference, rows of jsonl, csv
or tsv, and folders of class sub-folders. Mistakes are gathered and told together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from data_prep import list_ops, logic
from data_prep.readers import find_sources, open_whole
from data_prep.tables import CSV_DELIMITERS, look_up, read_csv
from megarecur.errors import DataError

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SHOWN = 5
"""Mistakes that are told in full."""
Row = tuple[str, tuple[str, ...], str]
"""(place, texts, label)."""


class Mistakes:
    """What is wrong in some files, told together."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.count = 0

    def add(self, text: str) -> None:
        """One mistake: place, value and remedy."""
        self.count += 1
        if len(self.told) < SHOWN:
            self.told.append(text)

    def raise_if_any(self) -> None:
        """Raises DataError with all of them."""
        if not self.count:
            return
        more = f"\n  and {self.count - len(self.told)} more" if self.count > SHOWN else ""
        plural = "s" if self.count > 1 else ""
        lines = "".join(f"\n  {line}" for line in self.told)
        raise DataError(f"{self.count} mistake{plural} in the samples{lines}{more}")


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of a text file, plain or compressed, without empty lines.

    Raises:
        DataError: it cannot be read, is damaged or is not UTF-8.
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
    """(tokens, answer) of a file of lines `label TAB tree`, or with the columns the other way round
    under a header Source, Target (Long Range Arena). Labels are checked."""
    swapped = False
    for place, line in read_lines(path):
        cells = line.split("\t")
        if cells[:2] == ["Source", "Target"]:
            swapped = True
            continue
        if len(cells) != 2:
            mistakes.add(f"{place} has {len(cells)} column(s), not label TAB tree; mend the line")
            continue
        label, tree = reversed(cells) if swapped else cells
        tokens = list_ops.flatten(tree)
        try:
            answer = list_ops.evaluate(tokens)
        except ValueError as error:
            mistakes.add(f"{place}: {error} ({tree[:40]!r}); mend the line")
            continue
        if label != str(answer):
            mistakes.add(
                f"{place} has label {label!r}, but its tree gives {answer}; mend the label, or "
                "leave the line out"
            )
            continue
        yield tokens, answer


def read_logic(path: Path, mistakes: Mistakes) -> Iterator[tuple[str, str, str]]:
    """(relation, left, right) of a file of such lines. Relations are checked."""
    for place, line in read_lines(path):
        cells = line.split("\t")
        if len(cells) != 3:
            mistakes.add(
                f"{place} has {len(cells)} column(s), not relation TAB left TAB right; mend the "
                "line"
            )
            continue
        relation, left, right = cells
        try:
            found = logic.relate(logic.evaluate(left), logic.evaluate(right))
        except (ValueError, RecursionError) as error:
            mistakes.add(f"{place} is no pair of formulas: {error}; mend the line")
            continue
        if relation != found:
            mistakes.add(
                f"{place} has relation {relation!r}, but its formulas are {found!r}; mend the "
                "relation, or leave the line out"
            )
            continue
        yield relation, left, right


def read_labelled(
    inputs: Sequence[str],
    text_keys: Sequence[str],
    label_key: str,
    mistakes: Mistakes,
    wanted: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> Iterator[Row]:
    """The samples of jsonl, csv and tsv files and of folders with one sub-folder per class, whose
    files are a text each.

    Args:
        inputs: files, globs, or folders.
        text_keys: one field, or two for pairs.
        label_key: the field of the label.
        mistakes: told of rows without them.
        wanted: classes that are read; none: all.
        columns: of csv and tsv files without a header.
    """
    for entry in inputs:
        classes = [p for p in sorted(Path(entry).glob("*/")) if p.is_dir()]
        if classes:
            if len(text_keys) > 1:
                raise DataError(f"{entry}: a file of a class's folder is one text, not a pair")
            for folder in classes:
                if not wanted or folder.name in wanted:
                    yield from _read_class(folder)
            continue
        for source in find_sources([entry]):
            assert isinstance(source, Path)
            for place, row in _read_rows(source, columns):
                texts = [look_up(row, key) for key in text_keys]
                label = look_up(row, label_key)
                missing = [
                    key
                    for key, value in zip((*text_keys, label_key), (*texts, label), strict=True)
                    if value is None or value == ""
                ]
                if missing:
                    mistakes.add(
                        f"{place} has no {' nor '.join(map(repr, missing))} (found "
                        f"{sorted(row)[:8]}); name the fields by --text-key and --label-key"
                    )
                    continue
                if not wanted or str(label) in wanted:
                    yield place, tuple(map(str, texts)), str(label)


def _read_class(folder: Path) -> Iterator[Row]:
    """The texts of one class."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open_whole(path) as stream:
            try:
                text = stream.read().decode()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}: byte {error.start} is not UTF-8; convert the file"
                ) from None
        if text:
            yield str(path), (text,), folder.name


def _read_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, fields) of the rows of a table; columns are those of one without a header."""
    suffix = Path(path.name.removesuffix(".gz").removesuffix(".xz").removesuffix(".zst")).suffix
    if columns and suffix not in CSV_DELIMITERS:
        raise DataError(
            f"{path}: --column names the columns of csv and tsv files, and this is none; leave "
            "--column out, or give such files alone"
        )
    if suffix in JSON_SUFFIXES:
        for place, line in read_lines(path):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place} is not JSON ({error}); mend the line") from None
            if not isinstance(row, dict):
                raise DataError(f"{place} is no object with fields; mend the line")
            yield place, row
        return
    if suffix not in CSV_DELIMITERS:
        raise DataError(
            f"{path}: labelled samples are read from jsonl, csv, tsv, and folders with one "
            "sub-folder per class; convert it"
        )

    def decode(content: bytes, place: str, offset: int) -> bytes:
        try:
            content.decode()
        except UnicodeDecodeError as error:
            fail(f"{place}: byte {offset + error.start} is not UTF-8; convert the file")
        return content

    with open_whole(path) as stream:
        for place, cells in read_csv(path, stream, CSV_DELIMITERS[suffix], decode, columns):
            assert cells is not None
            yield place, cells


def fail(text: str) -> NoReturn:
    """Raises DataError."""
    raise DataError(text)


def collect(
    rows: Iterable[Row], mistakes: Mistakes, wanted: Sequence[str] = ()
) -> tuple[list[str], int]:
    """(classes in order, rows) of some samples; numbers are ordered as numbers.

    Raises:
        DataError: mistakes, no rows, fewer than two classes, or none of a class that is wanted.
    """
    count, found = 0, set()
    for _, _, label in rows:
        found.add(label)
        count += 1
    mistakes.raise_if_any()
    if missing := sorted(set(wanted) - found):
        raise DataError(
            f"--class {', '.join(missing)}: no sample has that label; give labels as the files "
            "have them"
        )
    if len(found) < 2:
        raise DataError(
            f"the samples have {len(found)} class(es) ({', '.join(sorted(found)) or 'no sample'}); "
            "give files with at least two"
        )
    try:
        return sorted(found, key=float), count
    except ValueError:
        return sorted(found), count
