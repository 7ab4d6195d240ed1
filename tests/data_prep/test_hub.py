"""Hugging Face datasets, streamed: the corpus that the plain files give, whatever the workers."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from support.preparing import OPTIONS, kill_once, marks, texts, tree, wait_for_workers

from megarecur.data.corpus import Corpus
from megarecur.data_prep import hub
from megarecur.data_prep.array import begin, run_task
from megarecur.data_prep.plan import Request
from megarecur.data_prep.readers import Reading, find_sources, read_documents
from megarecur.data_prep.shards import prepare_shards
from megarecur.data_prep.tokenizer import train_tokenizer
from megarecur.errors import ConfigError, DataError
from megarecur.launch.cli import main

pytest.importorskip("datasets", reason="needs the extra hub")

FILES = 4
HEAVY = ["parquet", pytest.param("jsonl", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, and no cache but the test's; for this process and those it starts."""
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub._load.cache_clear()
    yield
    hub._load.cache_clear()


def rows_of(split: str, number: int) -> list[dict[str, Any]]:
    rng = random.Random(f"{split}{number}")
    words = [f"word{i}" for i in range(40)]
    return [
        {
            "text": " ".join(rng.choices(words, k=rng.randint(1, 120))),
            "title": f"{split} {number} {i}",
            "meta": {"n": i},
        }
        for i in range(40)
    ]


@pytest.fixture(scope="module", params=["parquet", "jsonl"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of several files of each of two splits."""
    folder = tmp_path_factory.mktemp("hub") / "stories"
    folder.mkdir()
    for split in ("train", "test"):
        for i in range(FILES):
            file = folder / f"{split}-{i:05}-of-{FILES:05}.{request.param}"
            if request.param == "parquet":
                table = pyarrow.Table.from_pylist(rows_of(split, i))
                parquet.write_table(table, file, row_group_size=10)
            else:
                file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(split, i)))
    return folder


def documents(entry: str, **options: Any) -> list[str]:
    found = [d for s in find_sources([entry]) for d in read_documents(s, Reading(**options))]
    return [document.decode() for document in found if document is not None]


def corpora(out: Path) -> dict[str, bytes]:
    """The files of a result that do not name its inputs."""
    return {name: data for name, data in tree(out).items() if not name.endswith("manifest.json")}


def test_splits_and_their_shards(dataset: Path) -> None:
    shards = find_sources([f"hf:{dataset}@test"])
    assert [str(s) for s in shards] == [f"hf:stories@test/{i:05}-of-00004" for i in range(FILES)]
    for split in ("train", "test"):
        rows = [row for i in range(FILES) for row in rows_of(split, i)]
        assert documents(f"hf:{dataset}@{split}") == [row["text"] for row in rows]
        filled = documents(f"hf://{dataset}@{split}", template="{title} {meta.n}: {text}")
        assert filled == [f"{r['title']} {r['meta']['n']}: {r['text']}" for r in rows]
        assert documents(f"hf:{dataset}@{split}", text_key="title")[0] == f"{split} 0 0"
    assert documents(f"hf:{dataset}") == documents(f"hf:{dataset}:default@train")


@pytest.mark.parametrize("dataset", HEAVY, indirect=True)
def test_shards_are_those_of_the_plain_files(dataset: Path, tmp_path: Path) -> None:
    """Whatever the workers; the tokenizer too."""
    for workers in (1, 2):
        out = tmp_path / f"hub{workers}"
        prepare_shards([f"hf:{dataset}@train"], out, "bytes", workers=workers, **OPTIONS)
    plain = sorted(dataset.glob("train-*"))
    prepare_shards(plain, tmp_path / "plain", "bytes", workers=1, **OPTIONS)
    assert tree(tmp_path / "hub1") == tree(tmp_path / "hub2")
    assert corpora(tmp_path / "hub1") == corpora(tmp_path / "plain")
    manifest = Corpus(tmp_path / "hub1" / "train").manifest
    assert [s["documents"] for s in manifest.sources] == [40] * FILES
    options = {"vocab_size": 280}
    first = train_tokenizer([f"hf:{dataset}@train"], tmp_path / "a.model", **options)
    second = train_tokenizer(plain, tmp_path / "b.model", **options)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("dataset", HEAVY, indirect=True)
def test_a_kill_loses_nothing(dataset: Path, tmp_path: Path) -> None:
    entry, out, partial = f"hf:{dataset}@train", tmp_path / "out", tmp_path / "out.partial"
    assert kill_once([entry], out, lambda: len(marks(partial)) >= 2)
    wait_for_workers(partial)
    kept = marks(partial)
    assert len(kept) >= 2 and not out.exists()
    again: list[dict[str, Any]] = []
    original = os.rename

    def rename(source: Any, target: Any) -> None:
        again.append({"name": Path(target).name})
        original(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.rename", rename)
        prepare_shards([entry], out, "bytes", workers=1, **OPTIONS)
    assert not {each["name"] for each in again} & set(kept), "finished work was done again"
    prepare_shards([entry], tmp_path / "straight", "bytes", workers=1, **OPTIONS)
    assert tree(out) == tree(tmp_path / "straight")


def test_other_content_is_another_corpus(dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "stories"
    copy.mkdir()
    for file in dataset.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    out = tmp_path / "out"
    prepare_shards([f"hf:{dataset}@train"], out, "bytes", workers=1)
    prepare_shards([f"hf:{copy}@train"], out, "bytes", workers=1)  # the same, elsewhere
    hub._load.cache_clear()
    first, second = sorted(copy.glob("train-*"))[:2]
    first.write_bytes(second.read_bytes())
    with pytest.raises(DataError, match=r"other content of hf:stories@train/00000-of-00004"):
        prepare_shards([f"hf:{copy}@train"], out, "bytes", workers=1)


def test_a_dataset_saved_to_disk(tmp_path: Path) -> None:
    import datasets

    rows = rows_of("train", 0)
    both = datasets.DatasetDict({"a": datasets.Dataset.from_list(rows[:30])})
    both["b"] = datasets.Dataset.from_list(rows[30:])
    both.save_to_disk(tmp_path / "saved@once", num_shards={"a": 3, "b": 1})
    assert len(find_sources([f"hf:{tmp_path}/saved@once@a"])) == 3
    for split, part in (("a", rows[:30]), ("b", rows[30:])):
        found = documents(f"hf:{tmp_path}/saved@once@{split}")
        assert found == [row["text"] for row in part]
    assert documents(f"hf:{tmp_path}/saved@once/b") == [row["text"] for row in rows[30:]]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("hf:{folder}@nope", "has no split nope, but train, test"),
        ("hf:{folder}@train[:10%]", r"has no split train\[:10%\], but train, test"),
        ("hf:{folder}:other@train", "BuilderConfig 'other' not found"),
        ("hf:{folder}/none@train", "datasets cannot open it"),
        ("hf://nobody/nothing", "datasets cannot open it"),
        ("hf:", "names no dataset"),
        ("hf:@train", "names no dataset"),
        ("hf:{folder}@", "names no dataset"),
    ],
)
def test_what_does_not_exist_is_one_error(dataset: Path, entry: str, message: str) -> None:
    entry = entry.format(folder=dataset)
    with pytest.raises(DataError, match=rf"{message}.*use hf://NAME\[:CONFIG\]") as error:
        find_sources([entry])
    assert str(error.value).startswith(entry) and "\n" not in str(error.value)


def test_columns_and_damage_are_named(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"@test/00000.*has no column body; it has .*--text-key"):
        documents(f"hf:{dataset}@test", text_key="body")
    with pytest.raises(DataError, match=r"@test/00000-of-00004: row 1 has no text .*meta\.x"):
        documents(f"hf:{dataset}@test", template="{meta.x}")
    for file in dataset.glob("train-*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    sorted(tmp_path.glob("train-*"))[2].write_bytes(b"{ damaged")
    with pytest.raises(DataError, match=r"train/00002-of-00004: datasets cannot read on"):
        documents(f"hf:{tmp_path}@train")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megarecur.data_prep.hub.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'megarecur\[hub\]'"):
        find_sources(["hf://allenai/c4:en@train"])


def test_a_remote_dataset_is_pinned_to_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the library: what is listed is what every task reads."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    files = [f"hf://datasets/who/what@{commit}/en/{i}.json.gz" for i in range(2)]
    opened = []

    class Files(list):  # type: ignore[type-arg]
        origin_metadata = (("who/what", commit),) * 2

    class Stand:
        num_shards = 2
        config = type("Config", (), {"data_files": {"train": Files(files)}})
        info = type("Info", (), {"splits": {"train": type("Split", (), {"num_bytes": 2000})}})

        @staticmethod
        def load_dataset_builder(path: str, name: str | None) -> Any:
            assert (path, name) == ("who/what", "en")
            return Stand

        @staticmethod
        def load_dataset(**options: Any) -> Any:
            opened.append(options)
            return Stand

    monkeypatch.setattr("megarecur.data_prep.hub._import", lambda: Stand)
    first, second = hub.find_shards("hf://who/what:en@train")
    assert opened == [
        {"path": "who/what", "name": "en", "split": "train", "streaming": True, "revision": commit}
    ]
    assert first.revision == commit and first.digest != second.digest and first.size == 1000
    assert first.name == "hf:who/what:en@train/00000-of-00002"


def test_the_command_line(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = ["--tokenizer", "bytes", "--out", str(tmp_path / "out"), "--workers", "1"]
    words = ["prep", "shards", f"hf:{dataset}@test", *options, "--template", "{title}"]
    monkeypatch.setattr(sys, "argv", ["megarecur", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None), capsys.readouterr().err
    found = texts(Corpus(tmp_path / "out" / "train"))
    assert found == [row["title"] for i in range(FILES) for row in rows_of("test", i)]


def test_tasks_of_an_array_read_the_files_that_were_submitted(
    dataset: Path, tmp_path: Path
) -> None:
    folder = tmp_path / dataset.name
    shutil.copytree(dataset, folder)
    prepare_shards([f"hf:{folder}"], tmp_path / "one", "bytes", **OPTIONS, workers=1)
    request = Request((f"hf:{folder}",), "bytes", **OPTIONS)
    with begin(request, tmp_path / "out", 2):
        pass
    first, *_, last = sorted(folder.glob("train*"))
    before = last.read_bytes()
    last.write_bytes(first.read_bytes())
    with pytest.raises(DataError, match=r"stories.*changed since this work was submitted"):
        for task in (0, 1):
            run_task(request, tmp_path / "out", "read", task, 2, workers=1)
    last.write_bytes(before)
    for phase in ("read", "tokenise", "assemble"):
        for task in range(1 if phase == "assemble" else 2):
            run_task(request, tmp_path / "out", phase, task, 2, workers=1)
    assert tree(tmp_path / "out") == tree(tmp_path / "one")
