"""Local files of evaluation tasks: JSONL with the fields of the harness' own data sets, or those of
llm-foundry (query, choices, gold), which are rewritten into the former.

    rows = read_task("arc_easy", find_task_file(folder, "arc_easy"))
"""

from __future__ import annotations

import importlib.util
import lzma
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from megarecur.errors import ConfigError, DataError
from megarecur.reading import ZSTD_WINDOW, parse_json, read_bytes

Row = dict[str, Any]
UNREADABLE = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error, zstandard.ZstdError)
DATA = "MEGARECUR_DATA"
"""Environment variable that names a folder of data; its `eval` has the files of tasks."""
SUFFIXES = (".jsonl", ".jsonl.xz", ".jsonl.gz", ".jsonl.zst")
MAX_BYTES = 1 << 28
"""Maximum size of a task's file, packed or not. The harness' own are below 2^24."""
BLOCK_BYTES = 1 << 12
"""Packed bytes that are unpacked at a time; zst grows zeros 30,000 times."""
DECODERS: dict[str, Callable[[], Any]] = {
    ".xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 30),
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj(),
}
QUERY = ("query", "choices", "gold")


class Form(NamedTuple):
    """The fields of a task's documents."""

    folder: str
    """Folder of the task's definition, below the harness' tasks."""
    fields: tuple[str, ...]
    """Fields that the definition reads."""
    foundry: tuple[str, ...]
    """Fields of llm-foundry's file of the same task."""
    rewrite: Callable[[Row], Row]
    """Function that turns the latter into the former."""


def find_task_file(folder: Path, task: str) -> Path | None:
    """Return the file of a task in a folder; None if there is none."""
    paths = [folder / f"{task}{suffix}" for suffix in SUFFIXES]
    return next((path for path in paths if path.is_file()), None)


def read_task(task: str, path: Path) -> list[Row]:
    """Return the documents of a task, with the fields of the harness' own data set.

    Raises:
        DataError: the file cannot be read, is no JSONL, has no rows, or lacks fields; the message
            names the line.
    """
    rows = read_rows(path)
    form = FORMS.get(task)
    if form is None:
        return rows
    found = []
    for number, row in enumerate(rows, 1):
        if not (missing := [field for field in form.fields if field not in row]):
            found.append(row)
            continue
        if any(field not in row for field in form.foundry):
            raise DataError(
                f"{path}:{number}: a document of {task} has no {', '.join(missing)}, but "
                f"{', '.join(row) or 'no field'}; give it the fields {', '.join(form.fields)}, or "
                f"{', '.join(form.foundry)}"
            )
        try:
            found.append(form.rewrite(row))
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            raise DataError(
                f"{path}:{number}: a document of {task} cannot be read ({error}); correct its "
                f"fields {', '.join(form.foundry)}"
            ) from None
    return found


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a JSONL file, compressed or not.

    Raises:
        DataError: see `read_task`.
    """
    try:
        text = unpack(path).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 ({error}); convert it") from None
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read ({error}); restore the file") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(
                f"{path}:{number}: is no JSON ({error}); write one object a line"
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: is no JSON object; write one a line")
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: has no documents; restore the file")
    return rows


def unpack(path: Path) -> bytes:
    """Return the content of a file, decompressed by its suffix. A truncated file is an error.

    Raises:
        ValueError: it has more than MAX_BYTES, packed or not.
    """
    packed = read_bytes(path, MAX_BYTES)
    if path.suffix not in DECODERS:
        return packed
    content, member = bytearray(), None
    for at in range(0, len(packed), BLOCK_BYTES):
        block = packed[at : at + BLOCK_BYTES]
        while block := block if member else block.lstrip(b"\0"):  # Tapes end in zeros.
            member = member or DECODERS[path.suffix]()
            content += member.decompress(block)
            if len(content) > MAX_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_BYTES} bytes")
            block = member.unused_data if member.eof else b""
            member = None if member.eof else member
    if member is not None:
        raise EOFError("it ends inside a frame")
    return bytes(content)


# ------------------------------------------------------------------------------- llm-foundry


def strip_question(row: Row) -> str:
    """Return a query without its heading and end, which the harness' prompt adds again."""
    return str(row["query"]).removeprefix("Question: ").removesuffix("\n")


def letter_choices(row: Row) -> Row:
    """Return choices and the answer as ARC and OpenBookQA have them."""
    letters = [chr(ord("A") + number) for number in range(len(row["choices"]))]
    choices = {"text": list(row["choices"]), "label": letters}
    return {"choices": choices, "answerKey": letters[row["gold"]]}


def rewrite_arc(row: Row) -> Row:
    """Return a document of ARC."""
    return {"question": strip_question(row), **letter_choices(row)}


def rewrite_openbook(row: Row) -> Row:
    """Return a document of OpenBookQA."""
    return {"question_stem": strip_question(row), **letter_choices(row)}


def rewrite_piqa(row: Row) -> Row:
    """Return a document of PIQA."""
    first, second = row["choices"]
    return {"goal": strip_question(row), "sol1": first, "sol2": second, "label": row["gold"]}


def rewrite_boolq(row: Row) -> Row:
    """Return a document of BoolQ."""
    passage, mark, question = str(row["query"]).rpartition("\nQuestion: ")
    if not mark:
        raise ValueError("query has no line `Question: ...`")
    return {
        "passage": passage.removeprefix("Passage: "),
        "question": question.removesuffix("?"),
        "label": ["no", "yes"].index(row["choices"][row["gold"]]),
    }


def rewrite_winogrande(row: Row) -> Row:
    """Return a document of WinoGrande, whose options end the two contexts."""
    first, second = row["context_options"]
    start = common_words(first, second)
    return {
        "sentence": f"{first[:start]}_ {row['continuation']}",
        "option1": first[start:],
        "option2": second[start:],
        "answer": str(row["gold"] + 1),
    }


def common_words(first: str, second: str) -> int:
    """Return the length of the words with which both texts begin."""
    same = 0
    while same < min(len(first), len(second)) and first[same] == second[same]:
        same += 1
    return first[:same].rfind(" ") + 1


def rewrite_lambada(row: Row) -> Row:
    """Return a document of LAMBADA."""
    return {"text": f"{row['context']} {row['continuation']}"}


FORMS = {
    "arc_easy": Form("arc", ("question", "choices", "answerKey"), QUERY, rewrite_arc),
    "arc_challenge": Form("arc", ("question", "choices", "answerKey"), QUERY, rewrite_arc),
    "openbookqa": Form(
        "openbookqa", ("question_stem", "choices", "answerKey"), QUERY, rewrite_openbook
    ),
    "piqa": Form("piqa", ("goal", "sol1", "sol2", "label"), QUERY, rewrite_piqa),
    "boolq": Form("super_glue/boolq", ("passage", "question", "label"), QUERY, rewrite_boolq),
    "winogrande": Form(
        "winogrande", ("sentence", "option1", "option2", "answer"),
        ("context_options", "continuation", "gold"), rewrite_winogrande,
    ),
    "lambada_openai": Form(
        "lambada", ("text",), ("context", "continuation"), rewrite_lambada
    ),
}  # fmt: skip
"""Tasks whose files may have either form; files of other tasks have the harness' own."""


def check_harness(option: str) -> None:
    """Check that lm-evaluation-harness is installed.

    Raises:
        ConfigError: it is not; the message names the extra.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"{option}: needs lm-evaluation-harness, which is not installed; install it with "
            "`pip install 'megarecur[eval]'`"
        )


def choose_folder(named: str | Path | None) -> tuple[Path | None, bool]:
    """Return the folder of tasks' files, and whether it must have all of them.

    Args:
        named: the folder that the user names; None: `eval` below MEGARECUR_DATA if it exists, else
            none.
    """
    if named is not None:
        return Path(named), True
    data = os.environ.get(DATA)
    folder = Path(data) / "eval" if data else None
    return (folder if folder is not None and folder.is_dir() else None), False


def find_missing(folder: Path, tasks: Sequence[str]) -> None:
    """Check that a folder has a file for every task.

    Raises:
        ConfigError: listing the missing files.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name the one with the files of the tasks")
    missing = [task for task in tasks if find_task_file(folder, task) is None]
    if missing:
        raise ConfigError(
            "missing files of tasks:"
            + "".join(
                f"\n  {folder / task}.jsonl (or .xz, .gz, .zst): no such file; add it, or omit "
                f"{task}"
                for task in missing
            )
        )
