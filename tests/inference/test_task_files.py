"""Files of evaluation tasks: both forms of their fields, every compression, and damage."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import zstandard

from megarecur.errors import ConfigError, DataError
from megarecur.inference import task_files
from megarecur.inference.task_files import FORMS, find_missing, find_task_file, read_task

CHOICES = {"query": "Question: Is it?", "choices": ["so", "not so"], "gold": 1}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "arc_easy": (
        CHOICES,
        {
            "question": "Is it?",
            "choices": {"text": ["so", "not so"], "label": ["A", "B"]},
            "answerKey": "B",
        },
    ),
    "openbookqa": (
        CHOICES | {"query": "It is"},
        {
            "question_stem": "It is",
            "choices": {"text": ["so", "not so"], "label": ["A", "B"]},
            "answerKey": "B",
        },
    ),
    "piqa": (
        CHOICES | {"query": "Question: do it \n"},
        {"goal": "do it ", "sol1": "so", "sol2": "not so", "label": 1},
    ),
    "boolq": (
        {
            "query": "Passage: A\nQuestion: b?\nc\nQuestion: is it so?",
            "choices": ["yes", "no"],
            "gold": 0,
        },
        {"passage": "A\nQuestion: b?\nc", "question": "is it so", "label": 1},
    ),
    "winogrande": (
        {
            "context_options": ["Ann met Beth, but the bed", "Ann met Beth, but the big room"],
            "continuation": "was full.",
            "gold": 0,
        },
        {
            "sentence": "Ann met Beth, but the _ was full.",
            "option1": "bed",
            "option2": "big room",
            "answer": "1",
        },
    ),
    "lambada_openai": (
        {"context": "I don't care about", "continuation": "signs"},
        {"text": "I don't care about signs"},
    ),
}
PAIRS["arc_challenge"] = PAIRS["arc_easy"]


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("task", sorted(FORMS))
def test_both_forms_are_read_as_the_harness_own(task: str, tmp_path: Path) -> None:
    foundry, own = PAIRS[task]
    path = write(tmp_path / "rows.jsonl", foundry, own | {"more": 1})
    assert read_task(task, path) == [own, own | {"more": 1}]


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
def test_compressed_files_are_found_and_read(suffix: str, tmp_path: Path) -> None:
    pack = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".zst": zstandard.compress}
    text = json.dumps({"text": "naïve words"}) + "\n\n" + json.dumps({"text": "b"}) + "\n"
    path = tmp_path / f"lambada_openai.jsonl{suffix}"
    path.write_bytes(pack[suffix](text.encode()))
    assert find_task_file(tmp_path, "lambada_openai") == path
    assert read_task("lambada_openai", path) == [{"text": "naïve words"}, {"text": "b"}]
    if suffix:
        path.write_bytes(path.read_bytes()[:-7])
        with pytest.raises(DataError, match=f"{path}: cannot be read"):
            read_task("lambada_openai", path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no documents"),
        (b'{"text": "a"}\n{"text"\n', r":2: is no JSON \("),
        (b'["text"]\n', ":1: is no JSON object"),
        (b'{"text": "\xff"}\n', "is not UTF-8"),
        (b'{"text": "a"}\n{"query": "a"}\n',
         ":2: a document of lambada_openai has no text, but query; give it the fields text, or "
         "context, continuation"),
    ],
)  # fmt: skip
def test_damage_is_reported_with_its_place(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path}:?.*{said}"):
        read_task("lambada_openai", path)


def test_fields_with_wrong_values_are_reported(tmp_path: Path) -> None:
    wrong = {
        "boolq": {"query": "no mark", "choices": ["no", "yes"], "gold": 0},
        "piqa": {"query": "Question: a", "choices": ["b"], "gold": 0},
        "arc_easy": {"query": "Question: a", "choices": ["b"], "gold": 4},
        "winogrande": {"context_options": [1, 2], "continuation": "a", "gold": 0},
    }
    for task, row in wrong.items():
        path = write(tmp_path / "a.jsonl", row)
        with pytest.raises(DataError, match=f":1: a document of {task} cannot be read"):
            read_task(task, path)


def test_missing_files_are_listed(tmp_path: Path) -> None:
    write(tmp_path / "piqa.jsonl", {})
    find_missing(tmp_path, ["piqa"])
    with pytest.raises(ConfigError) as caught:
        find_missing(tmp_path, ["boolq", "piqa", "mmlu"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and "boolq.jsonl" in lines[1] and "omit mmlu" in lines[2]
    with pytest.raises(ConfigError, match="no such folder"):
        find_missing(tmp_path / "none", ["piqa"])


@pytest.mark.parametrize("task", sorted(set(FORMS) - {"openbookqa"}))
def test_the_files_on_hand_are_read(task: str, data_dir: Path) -> None:
    """Rewritten documents say what the files say."""
    path = find_task_file(data_dir / "eval", task)
    assert path is not None
    rows = read_task(task, path)
    assert len(rows) > 1000 and all(set(FORMS[task].fields) <= set(row) for row in rows)


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zst"])
def test_a_file_that_unpacks_without_end_is_refused(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = {".xz": lzma.compress, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    monkeypatch.setattr(task_files, "MAX_BYTES", 1 << 20)
    path = tmp_path / f"piqa.jsonl{suffix}"
    row = b'{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n'
    path.write_bytes(pack(row + b" " * (1 << 20)))
    with pytest.raises(DataError, match=rf"piqa\.jsonl{suffix}: cannot be read .*more than"):
        task_files.read_rows(path)
    path.write_bytes(pack(row) + pack(row))
    assert len(task_files.read_rows(path)) == 2
    path.write_bytes(pack(row)[:-3])
    with pytest.raises(DataError, match="cannot be read"):
        task_files.read_rows(path)
