"""Folders as users have them: links, circles, hidden files, metadata, exclusions; all counted."""

from __future__ import annotations

import glob
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from megarecur.data.corpus import read_manifest
from megarecur.data_prep.readers import Reading, find_sources
from megarecur.data_prep.shards import prepare_shards
from megarecur.data_prep.tasks import TaskRequest, prepare_task
from megarecur.data_prep.tokenizer import train_tokenizer
from megarecur.errors import DataError


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"the text of {name}\n")
    return folder


def found(folder: Path, entry: str = ".", **options: Any) -> list[str]:
    paths = find_sources([folder / entry], **options)
    return [Path(str(path)).relative_to(folder).as_posix() for path in paths]


LEFT_OUT = {
    "hidden": [".git/config.txt", ".ipynb_checkpoints/a.txt", "b/._a.txt", ".hidden.txt"],
    "metadata": [
        "dataset_infos.json", "ds/dataset_dict.json", "ds/dataset_info.json", "__MACOSX/a.txt",
        "_delta_log/00.json", "b/_SUCCESS", "b/part-0.crc", "Thumbs.db", "__pycache__/a.txt",
    ],
    "of other kinds": ["README.md", "b/program.py", "b/noname"],
}  # fmt: skip


def test_hidden_files_and_metadata_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "a.txt", "b/c.jsonl", *(name for names in LEFT_OUT.values() for name in names))
    assert found(tmp_path) == ["a.txt", "b/c.jsonl"]
    told = caplog.messages[-1]
    assert "4 hidden" in told and "9 metadata" in told and "3 of other kinds" in told
    assert ".git" in told and "README.md" in told and str(tmp_path) in told
    for name in ("b/._a.txt", "dataset_infos.json", "README.md"):  # A file that is named is read.
        assert found(tmp_path, name) == [name]
    (tmp_path / ".cache").mkdir()
    assert found(fill(tmp_path / ".cache", "x.txt")) == ["x.txt"]


def test_links_are_followed_and_everything_is_read_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A link out of the folder, one to a sub-folder, one around in a circle, one that leads
    nowhere, one to a file; a folder that lies there itself keeps its own name."""
    fill(tmp_path / "elsewhere", "x.txt", "deep/y.txt")
    folder = fill(tmp_path / "in", "z/a.txt", "b.txt")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(folder / "z")
    (folder / "z" / "around").symlink_to(folder)
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to(folder / "linked")
    (folder / "c.txt").symlink_to(folder / "b.txt")
    (folder / "gone.txt").symlink_to(folder / "nothing")
    assert found(folder) == ["b.txt", "linked/deep/y.txt", "linked/x.txt", "z/a.txt"]
    assert "3 reached again by a link" in caplog.text
    assert "1 broken links (gone.txt)" in caplog.text
    assert "1 input files were found more than once" in caplog.text
    # The folder itself may be a link, and a glob finds the same.
    (tmp_path / "way").symlink_to(folder)
    assert len(found(tmp_path, "way")) == 4
    for pattern in ("in/**/*.txt", "in/**", "i*/**/*.txt"):
        assert found(tmp_path, pattern) == [f"in/{name}" for name in found(folder)]


def test_globs_match_as_those_of_a_shell(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Compared with the standard library's, which does not end on links in circles."""
    fill(
        tmp_path, "a.txt", "b/a.txt", "b/c/a.txt", "b/c/d.txt", "x/c/a.txt", ".h/a.txt", "b/.a.txt",
        "b/.h/a.txt", "b/.h/c/a.txt",
    )  # fmt: skip
    patterns = (
        "*", "*.txt", "*/*", "**", "**/*.txt", "**/c/*", "b/**", "*/**/a.txt", "b/**/c/**/*.txt",
        "**/.*", "**/.h/*", "**/.h/**/a.txt", "**/**/d.txt", "[bx]/**/?.txt", "**/c", ".h/*",
    )  # fmt: skip
    for pattern in patterns:
        names = glob.glob(f"{tmp_path}/{pattern}", recursive=True)
        wanted = sorted({os.path.relpath(n, tmp_path) for n in names if os.path.isfile(n)})
        if wanted:
            assert found(tmp_path, pattern) == wanted, pattern
        else:
            with pytest.raises(DataError, match="no such file"):
                found(tmp_path, pattern)
    assert "folders that the glob matches (b, x)" in caplog.text
    fill(tmp_path, "dataset_infos.json")
    assert found(tmp_path, "**/dataset_infos.json") == ["dataset_infos.json"]
    with pytest.raises(DataError, match=r"1 metadata \(dataset_infos.json\)"):
        found(tmp_path, "*.json")


def test_exclude_is_for_files_and_folders(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt", "drafts/b.txt", "c/drafts/d.txt", "c/e.txt", "c/f.old.txt")
    assert found(tmp_path, exclude=["drafts"]) == ["a.txt", "c/e.txt", "c/f.old.txt"]
    assert found(tmp_path, exclude=["drafts/"]) == ["a.txt", "c/e.txt", "c/f.old.txt"]
    assert found(tmp_path, exclude=["c/drafts", "*.old.txt"]) == [
        "a.txt",
        "c/e.txt",
        "drafts/b.txt",
    ]
    assert found(tmp_path, exclude=["c"]) == ["a.txt", "drafts/b.txt"]
    assert found(tmp_path, exclude=[f"{tmp_path}/c/*"]) == ["a.txt", "drafts/b.txt"]
    # A glob goes through the same folders; those above it count for nothing.
    assert found(tmp_path, "**/*.txt", exclude=["drafts"]) == ["a.txt", "c/e.txt", "c/f.old.txt"]
    assert len(found(tmp_path, "**/*.txt", exclude=[tmp_path.name])) == 5
    with pytest.raises(DataError, match=r"excluded by \['\*'\]"):
        found(tmp_path, exclude=["*"])


def test_what_is_no_input_is_refused_with_what_is_there(tmp_path: Path) -> None:
    fill(tmp_path, "in/.hidden.txt", "in/a.md")
    with pytest.raises(DataError, match=r"in: no \.txt.*1 hidden \(\.hidden\.txt\).*a\.md"):
        find_sources([tmp_path / "in"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: is neither a file nor a folder"):
        find_sources([tmp_path / "pipe"])
    (tmp_path / "gone").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"gone: no such file.*broken links"):
        find_sources([tmp_path / "gone"])
    with pytest.raises(DataError, match="an input is '', perhaps from an unset variable"):
        find_sources(["", tmp_path / "in"])


def test_the_same_rules_everywhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """For shards, tokenizers and labelled samples: the same files, told the same way."""
    folder = fill(tmp_path / "in", "a.txt", ".git/b.txt", "drafts/c.txt", "Thumbs.db")
    reading = Reading(exclude=("drafts",))
    prepare_shards([folder], tmp_path / "out", "bytes", reading, workers=1)
    assert [s["name"] for s in read_manifest(tmp_path / "out/train").sources] == ["a.txt"]
    assert "1 hidden" in caplog.text and "1 excluded" in caplog.text
    caplog.clear()
    train_tokenizer([folder], tmp_path / "t.model", reading, vocab_size=270)
    assert "1 hidden" in caplog.text and "1 excluded" in caplog.text

    classes = fill(
        tmp_path / "classes", "good/1", "good/._1", "bad/2", ".git/HEAD", "bad/drafts/3", "notes"
    )
    (classes / "ugly").symlink_to(fill(tmp_path / "elsewhere", "4", ".DS_Store"))
    caplog.clear()
    caplog.set_level(logging.WARNING)
    request = TaskRequest("labelled", (str(classes),), exclude=("drafts",))
    made = prepare_task(request, tmp_path / "labelled")["train"]
    assert made.task and made.task["classes"] == ["bad", "good", "ugly"]
    assert sorted(s["name"] for s in made.sources) == ["1", "2", "4"]
    for text in ("3 hidden", "1 excluded (drafts)", "1 beside the folders of classes (notes)"):
        assert text in caplog.text
    # A hidden folder makes no classes of a folder of tables.
    tables = fill(tmp_path / "tables", ".git/config")
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(4)]
    (tables / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = prepare_task(TaskRequest("labelled", (str(tables),)), tmp_path / "rows")["train"]
    assert made.task and made.task["num_samples"] == 4
