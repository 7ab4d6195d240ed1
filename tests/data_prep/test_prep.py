"""Preparing a corpus: readers, splits, duplicates, any number of workers, and any kill."""

from __future__ import annotations

import errno
import gzip
import io
import json
import lzma
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from rich.console import Console
from support.preparing import OPTIONS, Mark, kill_once, marks, texts, tree, wait_for_workers

from megarecur.data.corpus import Corpus
from megarecur.data_prep.inspect import inspect_corpus, render_inspection
from megarecur.data_prep.progress import ProgressReport
from megarecur.data_prep.readers import WHOLE_FILES, Reading, find_sources, read_documents
from megarecur.data_prep.shards import prepare_shards
from megarecur.data_prep.stdlib import prepare_quickstart, standard_library_sources
from megarecur.errors import DataError
from megarecur.launch.cli import main


def read(path: Path, **options: Any) -> list[bytes | None]:
    return list(read_documents(path, Reading(**options)))


def prepare(
    inputs: list[Path], out: Path, reading: Reading = WHOLE_FILES, **options: Any
) -> Corpus:
    prepare_shards(inputs, out, "bytes", reading, **({"workers": 1} | options))
    return Corpus(out / "train")


# ------------------------------------------------------------------------------------------ readers

PACK = {
    "": lambda b: b,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda b: zstandard.compress(b[:9]) + zstandard.compress(b[9:]),
}


@pytest.mark.parametrize("suffix", PACK)
def test_formats(tmp_path: Path, suffix: str) -> None:
    lines = b'{"text": "one\\nmore"}\n\n{"body": 1, "text": "zwei \xc3\xa9"}\n{"text": ""}'
    (tmp_path / f"a.jsonl{suffix}").write_bytes(PACK[suffix](lines))
    (tmp_path / f"b.txt{suffix}").write_bytes(PACK[suffix](b"one\r\n\n \ntwo\n"))
    assert read(tmp_path / f"a.jsonl{suffix}") == [b"one\nmore", "zwei é".encode()]
    file = tmp_path / f"b.txt{suffix}"
    assert read(file) == [b"one\r\n\n \ntwo\n"]
    assert read(file, text_split="line") == [b"one", b" ", b"two"]
    assert read(file, text_split="blank_line") == [b"one\r\n", b"two\n"]
    assert read(file, text_split="separator", separator=" ") == [b"one\r\n\n", b"two\n"]
    (tmp_path / f"nameless{suffix}").write_bytes(PACK[suffix](b"x"))
    assert read(tmp_path / f"nameless{suffix}") == [b"x"]


def test_a_separator_is_a_whole_line(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes(b"<end>\none <end> two\n\n <end>\n<end>\r\n<end>\nthree\n<end>more\n<end>")
    split = {"text_split": "separator", "separator": "<end>"}
    assert read(file, **split) == [b"one <end> two\n\n <end>\n", b"three\n<end>more\n"]
    file.write_bytes(b"a\n<end>\nb\n<end>\nc\xff")
    with pytest.raises(DataError, match=rf"{file}: byte 17 \(0xff\)"):
        read(file, **split)
    for line in ("a\nb", "a\n", "\r\n"):
        with pytest.raises(DataError, match="holds the end of a line"):
            Reading(text_split="separator", separator=line)
    with pytest.raises(DataError, match="use a separator only with text_split=separator"):
        Reading(separator="<end>")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt.gz", b"plain", "is not what its name says: it is not gz-compressed"),
        ("a.txt", gzip.compress(b"x", mtime=0), "is not what its name says: it is gz-compressed"),
        (
            "a.jsonl.xz",
            gzip.compress(b"x", mtime=0),
            "is not what its name says: it is gz-compressed",
        ),
        ("a.txt.gz", b"", "is empty"),
        ("a.txt", b"PK\x03\x04...", "is a zip archive, not text"),
        ("a.txt", "x".encode("utf-16"), "is UTF-16 text"),
        ("a.txt.gz", gzip.compress(os.urandom(999))[:-30], "damaged or truncated"),
        ("a.txt.xz", lzma.compress(os.urandom(999))[:-30], "damaged or truncated"),
        ("a.txt.zst", zstandard.compress(os.urandom(999))[:-30], "damaged or truncated"),
        ("a.jsonl", b'{"text": "a"}\nhello\n', r"line 2 \(byte 14\) is not JSON"),
        ("a.jsonl", b'{"body": "a"}\n', r"line 1 .* no text under text_key='text' .*body"),
        ("a.jsonl", b'{"text": 3}\n', "no text under"),
        ("a.jsonl", b"[1]\n", "no text under"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{tmp_path / name}: .*{message}".replace(": .*", ":? .*")):
        read(tmp_path / name, errors="skip")


def test_undecodable_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(
        "\ufeffé\n\nba\xffd\n\nfine".encode("latin-1", "ignore").replace(b"\xe9", b"e")
    )
    split = {"text_split": "blank_line"}
    with pytest.raises(DataError, match=rf"{file}: byte 5 \(0xff\) is not UTF-8"):
        read(file, **split)
    assert read(file, **split, errors="skip") == [b"e\n", None, b"fine"]
    assert read(file, **split, errors="replace") == [b"e\n", "ba\ufffdd\n".encode(), b"fine"]
    lines = tmp_path / "b.jsonl"
    lines.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b\\ud800"}\n{"text": "c"}\n')
    with pytest.raises(DataError, match=rf"{lines}: line 2: byte 24 \(0xff\) is not UTF-8"):
        read(lines)
    assert read(lines, errors="skip") == [b"a", None, None, b"c"]
    replaced = [b"a", "\ufffd".encode(), "b\ufffd".encode(), b"c"]
    assert read(lines, errors="replace") == replaced
    corpus = prepare([lines], tmp_path / "out", Reading(errors="skip"))
    assert corpus.manifest.documents_skipped == 2


def test_sources(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.jsonl.gz", "a/d.py", "a/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")

    def found(*inputs: str, **options: Any) -> list[str]:
        paths = find_sources([tmp_path / i for i in inputs], **options)
        return [path.relative_to(tmp_path).as_posix() for path in paths]

    assert found(".") == ["a/c.jsonl.gz", "a/e.txt", "b.txt"]
    # Of several names of a file, the first in order stays.
    assert found("**/*.py", "b.txt", "a/../b.txt") == ["a/../b.txt", "a/d.py"]
    assert found(".", exclude=["*.txt"]) == ["a/c.jsonl.gz"]
    assert found(".", exclude=["*/a/*"]) == ["b.txt"]
    with pytest.raises(DataError, match="no such file"):
        found("nothing*")
    with pytest.raises(DataError, match="excluded"):
        found("b.txt", exclude=["b*"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no \.txt"):
        found("empty")


# ------------------------------------------------------------------------------------------- shards


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight files of documents, some of them twice: in one file, and in two."""
    folder, rng = tmp_path_factory.mktemp("inputs"), random.Random(0)
    words = [f"word{i}" for i in range(40)]
    documents = [" ".join(rng.choices(words, k=rng.randint(1, 200))) for _ in range(300)]
    for i in range(8):
        some = [json.dumps({"text": text}) for text in rng.choices(documents, k=60)]
        (folder / f"{i}.jsonl.xz").write_bytes(lzma.compress("\n".join(some).encode()))
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def expected(inputs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "out"
    prepare(inputs, out, **OPTIONS)
    return tree(out)


def test_duplicates_and_splits(
    inputs: list[Path], expected: dict[str, bytes], tmp_path: Path
) -> None:
    everything = [d.decode() for path in inputs for d in read(path) if d is not None]
    first = list(dict.fromkeys(everything))
    corpora = {s: Corpus(write(expected, tmp_path) / s) for s in ("train", "val")}
    train, val = (texts(corpora[s]) for s in ("train", "val"))
    assert not set(train) & set(val) and len(train) + len(val) == len(first)
    assert 10 < len(val) < 60
    assert train == [text for text in first if text in set(train)]
    assert val == [text for text in first if text in set(val)]
    for name, documents in (("train", train), ("val", val)):
        manifest = corpora[name].manifest
        assert manifest.duplicates_removed == len(everything) - len(first)
        assert manifest.num_bytes == sum(len(text) for text in documents)
        assert manifest.num_tokens == manifest.num_bytes + len(documents)
        assert [s["documents"] for s in manifest.sources] == [60] * 8
    kept = prepare(inputs, tmp_path / "kept", deduplicate=False)
    assert texts(kept) == everything


def write(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_neither_workers_nor_places_change_a_byte(
    inputs: list[Path], expected: dict[str, bytes], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in inputs:
        (elsewhere / path.name).write_bytes(path.read_bytes())
    prepare(sorted(elsewhere.iterdir()), tmp_path / "out", **OPTIONS, workers=2)
    assert tree(tmp_path / "out") == expected
    assert not (tmp_path / "out.partial").exists()


class Watch(ProgressReport):
    """Takes the marks of unfinished work when it is about to be assembled."""

    def __init__(self, partial: Path) -> None:
        super().__init__(Console(file=io.StringIO()))
        self.partial, self.marks = partial, dict[str, Mark]()

    @contextmanager
    def phase(self, name: str, total_bytes: int, unit: str = "") -> Iterator[None]:
        if name == "val":
            self.marks = marks(self.partial)
        with super().phase(name, total_bytes):
            yield


def test_three_kills_lose_nothing(
    inputs: list[Path], expected: dict[str, bytes], tmp_path: Path
) -> None:
    sys.stdout.write(f"seed {(seed := 5)}\n")
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    kept: dict[str, Mark] = {}
    # One kill among the parts that are read, two among those that are tokenised.
    for some in sorted(random.Random(seed).sample(range(2, 70), 3)):
        assert kill_once(inputs, out, lambda n=some: len(marks(partial)) >= n)
        wait_for_workers(partial)
        found = marks(partial)
        assert len(found) >= some and not out.exists()
        assert kept.items() <= found.items()
        kept = found
    watch = Watch(partial)
    prepare(inputs, out, **OPTIONS, progress=watch)
    assert kept.items() <= watch.marks.items() and len(watch.marks) > len(kept)
    assert tree(out) == expected
    assert not partial.exists()


@pytest.mark.slow
def test_twenty_kills_lose_nothing(
    inputs: list[Path], expected: dict[str, bytes], tmp_path: Path
) -> None:
    """At any moment: before the first file, between phases, while the result is assembled."""
    sys.stdout.write(f"seed {(seed := 6)}\n")
    rng = random.Random(seed)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    hits, kept, seconds = 0, dict[str, Mark](), 1.0
    while hits < 20:
        began, delay = time.monotonic(), rng.uniform(0.05, seconds)
        if kill_once(inputs, out, lambda end=began + delay: time.monotonic() > end):
            hits += 1
            wait_for_workers(partial)
            found = marks(partial)
            # Gone as a whole when the result is there, or else all there and untouched.
            assert kept.items() <= found.items() or (out / "train").exists()
            kept = found
            seconds *= 1.2  # further, as no moment of a run that takes long would be met otherwise
        else:
            assert tree(out) == expected
            shutil.rmtree(out)
            kept, seconds = {}, max(time.monotonic() - began, 1.0)
    prepare(inputs, out, **OPTIONS)
    assert tree(out) == expected
    assert not partial.exists()


def test_preparing_again_does_nothing_and_replaces_nothing(tmp_path: Path) -> None:
    file, out = tmp_path / "a.txt", tmp_path / "out"
    file.write_text("some text")
    first = prepare([file], out)
    shard = out / "train" / "shard.00000.mds"
    before = shard.stat().st_mtime_ns
    assert prepare([file], out).fingerprint == first.fingerprint
    assert shard.stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"other options; delete it, or choose another"):
        prepare([file], out, deduplicate=False)
    os.utime(file, (time.time() + 9, time.time() + 9))
    assert prepare([file], out).fingerprint == first.fingerprint
    # Other content of the same size, with a time before the corpus was made.
    file.write_text("more text")
    os.utime(file, (1, 1))
    with pytest.raises(DataError, match=f"was prepared from other content of {file}; delete it"):
        prepare([file], out)
    (tmp_path / "b.txt").write_text("some text")
    with pytest.raises(DataError, match="was prepared from other files, with another tokenizer"):
        prepare([tmp_path / "b.txt"], out)


def test_changed_inputs_discard_unfinished_work(tmp_path: Path) -> None:
    file, out = tmp_path / "a.txt", tmp_path / "out"
    file.write_bytes(b"good \xff")
    with pytest.raises(DataError, match="not UTF-8"):
        prepare([file], out)
    assert (tmp_path / "out.partial").exists() and not out.exists()
    file.write_bytes(b"good !")
    assert texts(prepare([file], out)) == ["good !"]


def test_nothing_left_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"")
    with pytest.raises(DataError, match="would be empty"):
        prepare([file], tmp_path / "out")
    file.write_bytes(b"one document")
    with pytest.raises(DataError, match=r"val: the corpus would be empty.*val-fraction"):
        prepare([file], tmp_path / "out2", val_fraction=0.001)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out2").exists()


def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    (tmp_path / "a.txt").write_text("x" * 100_000)

    def fill(*_: Any, **__: Any) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    monkeypatch.setattr("numpy.savez", fill)
    with pytest.raises(DataError, match=r"the disk is full; free some space and run again"):
        prepare([tmp_path / "a.txt"], tmp_path / "out")
    monkeypatch.undo()
    assert prepare([tmp_path / "a.txt"], tmp_path / "out").num_documents == 1


@pytest.fixture
def usage_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Run a `megarecur prep` command that must end with 2 and no traceback; its message."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["megarecur", "prep", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        message = capsys.readouterr().err
        assert ended.value.code == 2 and "Traceback" not in message, message
        return message

    return run


def test_outputs_that_cannot_be_written(
    usage_error: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("some text " * 300)
    monkeypatch.setattr(
        "megarecur.data_prep.stdlib.standard_library_sources", lambda: [Path(json.__file__)]
    )
    shards = ("shards", file, "--tokenizer", "bytes")
    train = ("tokenizer", file, "--vocab-size", 270)
    quickstart = ("quickstart", "--vocab-size", 400)
    for command in (shards, train, quickstart):
        message = usage_error(*command, "--out", file / "below")
        assert f"{file}" in message and "--out" in message
    assert "is a file" in usage_error(*shards, "--out", file)
    assert "is a folder" in usage_error(*train, "--out", tmp_path)
    assert "no corpus" in usage_error("inspect", tmp_path / "none")
    assert file.read_text() == "some text " * 300

    def refuse(number: int) -> Callable[..., None]:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError(number, os.strerror(number), str(tmp_path / "place"))

        return fail

    for number, text in ((errno.ENOSPC, "the disk is full"), (errno.EACCES, "Permission denied")):
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", refuse(number))
            for command in (shards, train, quickstart):
                message = usage_error(*command, "--out", tmp_path / "out" / f"{command[0]}.model")
                assert f"{tmp_path / 'place'}" in message and text in message


def test_numbers_that_make_no_sense(usage_error: Callable[..., str], tmp_path: Path) -> None:
    file, out = tmp_path / "a.txt", tmp_path / "out"
    file.write_text("some text")
    shards = ("shards", file, "--tokenizer", "bytes", "--out", out)
    train = ("tokenizer", file, "--out", out)
    for words in (
        (*shards, "--workers", -3),
        (*shards, "--val-fraction", -0.5),
        (*shards, "--val-fraction", 1.0),
        (*train, "--vocab-size", 0),
        (*train, "--vocab-size", 300, "--sample-bytes", -1),
        (*train, "--vocab-size", 300, "--seed", -1),
        (*train, "--vocab-size", 300, "--character-coverage", 1.5),
        ("quickstart", "--out", out, "--vocab-size", -1),
        ("inspect", out, "--samples", -1),
    ):
        assert str(words[-2]).strip("-") in usage_error(*words).replace("_", "-")
    with pytest.raises(DataError, match="workers=-3"):
        prepare([file], out, workers=-3)
    prepare([file], out)
    with pytest.raises(DataError, match="num_samples=-1"):
        inspect_corpus(out / "train", num_samples=-1)
    assert inspect_corpus(out / "train", num_samples=0).samples == []


def test_quickstart_refuses_a_tokenizer_of_another_size(
    usage_error: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "megarecur.data_prep.stdlib.standard_library_sources", lambda: [Path(json.__file__)]
    )
    made = prepare_quickstart(tmp_path, vocab_size=400, val_fraction=0.0)
    message = usage_error("quickstart", "--out", tmp_path, "--vocab-size", 410)
    assert f"{tmp_path / 'tokenizer.model'}: has 400 ids, not" in message and "410" in message
    assert prepare_quickstart(tmp_path, vocab_size=400, val_fraction=0.0) == made


def test_a_vocabulary_above_16_bits_is_stored_in_32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("wide")
    monkeypatch.setattr("megarecur.data.tokenizer.ByteTokenizer.dtype", np.uint32)
    corpus = prepare([tmp_path / "a.txt"], tmp_path / "out")
    assert corpus.dtype == np.uint32 and texts(corpus) == ["wide"]


def test_progress_tells_of_every_phase_that_takes_long(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(out: Path) -> str:
        console = Console(file=(lines := io.StringIO()))
        prepare(inputs, out, **OPTIONS, progress=ProgressReport(console))
        return lines.getvalue()

    monkeypatch.setattr("megarecur.data_prep.progress.SECONDS_BETWEEN_LINES", 3600.0)
    assert shown(tmp_path / "quick") == ""
    monkeypatch.setattr("megarecur.data_prep.progress.SECONDS_BETWEEN_LINES", 0.0)
    lines = shown(tmp_path / "slow")
    for phase in ("read", "tokenise", "val", "train"):
        assert f"{phase}: " in lines
    assert "MB/s" in lines and "s left" in lines


# --------------------------------------------------------------------------------- inspect, stdlib


def test_inspect(expected: dict[str, bytes], tmp_path: Path) -> None:
    found = inspect_corpus(write(expected, tmp_path) / "train", num_samples=2)
    assert found.bytes_per_token == 1.0
    assert sum(count for _, count in found.histogram) == found.manifest.num_documents
    assert len(found.samples) == 2
    console = Console(file=io.StringIO(), width=100)
    console.print(render_inspection(found))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert found.fingerprint in shown and "Lengths of documents" in shown


def test_the_standard_library_is_a_corpus_without_tests() -> None:
    sources = standard_library_sources()
    names = {path.name for path in sources}
    assert {"argparse.py", "_pydecimal.py"} <= names and len(sources) > 100
    assert not any(part in ("test", "tests", "idle_test") for p in sources for part in p.parts)
    assert sources == sorted(sources)
