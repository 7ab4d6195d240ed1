"""Rows of tables as documents, templates, and near-duplicates."""

import csv
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from configs import TEXT
from data_prep.readers import Reading, find_sources, read_documents
from data_prep.shards import prepare_shards
from launch.cli import main
from megarecur.data.corpus import Corpus, read_manifest
from megarecur.data.tokenizer import load_tokenizer
from megarecur.data.torchvision_stub import make_torchvision_importable
from megarecur.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"text": 'one, "two"\nthree', "title": "A", "meta": {"year": 1999}},
    {"text": "zwei é", "title": "B", "meta": {"year": 2001}},
    {"text": "", "title": "C", "meta": {"year": 7}},
]


def write(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """A table of rows in the format of its name; csv has flat fields only."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
            writer.writerow(["text", "title"])
            writer.writerows([row["text"], row["title"]] for row in rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        table = pyarrow.Table.from_pylist(rows)
        if path.suffix == ".parquet":
            parquet.write_table(table, path, row_group_size=2)
        else:
            sink = pyarrow.OSFile(str(path), "wb")
            with sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
    return path


def read(path: Path, **options: Any) -> list[bytes | None]:
    return list(read_documents(path, Reading(**options)))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".arrow"])
def test_every_format_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}")
    assert read(path) == [b'one, "two"\nthree', "zwei é".encode()]
    assert read(path, text_key="title") == [b"A", b"B", b"C"]
    filled = read(path, template="# {title}\n{text}{{}}")
    assert filled == [b'# A\none, "two"\nthree{}', "# B\nzwei é{}".encode(), b"# C\n{}"]
    if suffix not in (".csv", ".tsv"):
        assert read(path, template="{title} {meta.year}") == [b"A 1999", b"B 2001", b"C 7"]
    with pytest.raises(DataError, match=rf"a\{suffix}.*body") as error:
        read(path, text_key="body")
    assert "title" in str(error.value) and "--text-key" in str(error.value)


def test_compressed_csv_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbftext,n\nx,1\n\ny,2\n"))
    assert read(tmp_path / "a.csv.gz") == [b"x", b"y"]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.csv", b"text,n\nx\n", {}, r"a\.csv: line 2 has 1 cells, but there are names for 2"),
        ("a.csv", b'text\n"x\n', {}, r"a\.csv: line 2 is not csv"),
        ("a.csv", b"text\nok\nb\xffd\n", {}, r"a\.csv: line 3: byte 9 \(0xff\) is not UTF-8"),
        ("a.parquet", b"text", {}, r"a\.parquet: is no parquet file, or damaged"),
        ("a.arrow", b"text", {}, r"a\.arrow: is no arrow file, or damaged"),
        ("a.parquet", b"", {}, r"a\.parquet: is no parquet file, or damaged"),
        ("a.jsonl", b'{"a": 1}\n', {"template": "{a.b}"}, r"no text under text_key='a\.b'"),
    ],
)
def test_what_a_table_must_not_be(
    tmp_path: Path, name: str, content: bytes, options: dict[str, Any], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, **options)


def test_undecodable_rows_are_skipped_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\none\nb\xffd\nthree\n")
    assert read(tmp_path / "a.csv", errors="skip") == [b"one", None, b"three"]
    assert read(tmp_path / "a.csv", errors="replace") == [b"one", "b\ufffdd".encode(), b"three"]


@pytest.mark.parametrize("template", ["no field", "{", "{}", "{a:>3}", "{a!r}"])
def test_templates_that_mean_nothing_are_refused(template: str) -> None:
    with pytest.raises(DataError, match="--template"):
        Reading(template=template)


def test_a_folder_saved_by_datasets(tmp_path: Path) -> None:
    """Its Arrow files are data, its JSON files are not."""
    folder = tmp_path / "ds" / "train"
    folder.mkdir(parents=True)
    write(folder / "data-00000-of-00002.arrow", ROWS[:1])
    write(folder / "data-00001-of-00002.arrow", ROWS[1:])
    for name in ("state.json", "dataset_info.json"):
        (folder / name).write_text("{}")
    names = [path.name for path in find_sources([folder])]
    assert names == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]


def write_mds(folder: Path, columns: dict[str, str], rows: list[Any], **options: Any) -> Path:
    """Rows as an MDS folder of several shards, as llm-foundry writes text it does not tokenise."""
    make_torchvision_importable()
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns=columns, size_limit=400, **options) as writer:
        for row in rows:
            writer.write({name: row[name] for name in columns})
    return folder


@pytest.mark.parametrize("compression", [None, "zstd", "gz"])
def test_text_in_mds(tmp_path: Path, compression: str | None) -> None:
    """The documents of such folders, one split or several, are those of the rows."""
    rows = [{"text": f"text {i} é", "title": f"T{i}", "n": i} for i in range(50)]
    options = {"compression": compression, "hashes": ["sha1", "xxh64"]}
    columns = {"text": "str", "title": "str", "n": "int"}
    for name, part in (("train", rows[:40]), ("val", rows[40:])):
        write_mds(tmp_path / "in" / name, columns, part, **options)
    sources = find_sources([tmp_path / "in"])
    assert len(sources) > 4 and all(".mds" in path.name for path in sources)
    found = [document for path in sources for document in read(path)]
    assert found == [row["text"].encode() for row in rows]
    filled = [d for path in sources for d in read(path, template="{title}: {text} {n}")]
    assert filled[3] == "T3: text 3 é 3".encode()
    with pytest.raises(DataError, match=r"mds.*has no column body; it has n, text, title"):
        read(sources[0], text_key="body")
    out = tmp_path / "out"
    prepare_shards([tmp_path / "in"], out, "bytes", workers=2)
    assert texts(Corpus(out / "train")) == [row["text"] for row in rows]
    content = sources[1].read_bytes()
    sources[1].write_bytes(content[:-9] + b"123456789")
    with pytest.raises(DataError, match=f"{sources[1]} does not match its hash"):
        read(sources[1])
    (sources[1].parent / "index.json").write_text('{"version": 2, "shards": []}')
    with pytest.raises(DataError, match="lists no shards"):
        read(sources[1])
    (sources[1].parent / "index.json").unlink()
    with pytest.raises(DataError, match=r"has no index\.json beside it"):
        read(sources[1])


def test_shards_that_lie_there_unpacked_too_are_read_once(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}" * 9} for i in range(20)]
    folder = write_mds(tmp_path / "in", {"text": "str"}, rows, compression="zstd")
    first = sorted(folder.glob("*.zstd"))[0]
    first.with_suffix("").write_bytes(zstandard.decompress(first.read_bytes()))
    sources = find_sources([folder])
    assert first not in sources and first.with_suffix("") in sources
    assert [d for p in sources for d in read(p)] == [row["text"].encode() for row in rows]


def texts(corpus: Corpus) -> list[str]:
    """Every document of a corpus of bytes."""
    tokens = corpus.read(0, corpus.num_tokens)
    ends = [*corpus.documents[1:].tolist(), corpus.num_tokens]
    decode = load_tokenizer("bytes").decode
    starts = corpus.documents.tolist()
    return [decode(tokens[a : b - 1].tolist()) for a, b in zip(starts, ends, strict=True)]


def test_near_duplicates_are_dropped_for_any_number_of_workers(tmp_path: Path) -> None:
    """The first stays; a document that shares nothing stays; an exact copy counts as exact."""
    words = TEXT.split()[:300]
    close = [*words[:100], "changed", *words[101:]]  # 5 of 296 shingles differ on each side
    half = [*words[:150], *reversed(words[:150])]
    documents = [" ".join(each) for each in (words, half, close, words)] + ["short", "short one"]
    for i, text in enumerate(documents):
        (tmp_path / f"{i}.txt").write_text(text)
    made = {}
    for workers in (1, 2):
        out = tmp_path / f"out{workers}"
        prepare_shards(
            sorted(tmp_path.glob("*.txt")), out, "bytes", near_duplicates=0.8, workers=workers,
            part_bytes=4096,
        )  # fmt: skip
        made[workers] = (out / "train" / "shard.00000.mds").read_bytes()
        manifest = read_manifest(out / "train")
        assert (manifest.duplicates_removed, manifest.near_duplicates_removed) == (1, 1)
        assert texts(Corpus(out / "train")) == [documents[i] for i in (0, 1, 4, 5)]
    assert made[1] == made[2]
    prepare_shards(sorted(tmp_path.glob("*.txt")), tmp_path / "all", "bytes", workers=1)
    assert len(texts(Corpus(tmp_path / "all" / "train"))) == 5
    shutil.rmtree(tmp_path / "all")


def test_the_command_line_takes_templates(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    write(tmp_path / "a.parquet")
    options = ["--tokenizer", "bytes", "--out", str(tmp_path / "out"), "--workers", "1"]
    options += ["--template", r"{title}\n{text}"]
    arguments = ["prep", "shards", str(tmp_path / "a.parquet"), *options]
    monkeypatch.setattr("sys.argv", ["megarecur", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None), capsys.readouterr().err
    assert texts(Corpus(tmp_path / "out" / "train"))[1] == "B\nzwei é"
