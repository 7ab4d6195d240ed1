"""Rows of tables as documents, templates, and near-duplicates."""

import csv
import gzip
import io
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from support.configs import TEXT

from megarecur.data.corpus import Corpus, read_manifest
from megarecur.data.tokenizer import load_tokenizer
from megarecur.data.torchvision_stub import make_torchvision_importable
from megarecur.data_prep.readers import Reading, find_sources, read_documents
from megarecur.data_prep.shards import prepare_shards
from megarecur.data_prep.tasks import TaskRequest, prepare_task
from megarecur.errors import DataError
from megarecur.launch.cli import main

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
    quoted = {"quoting": "quoted"} if suffix == ".tsv" else {}
    assert read(path, **quoted) == [b'one, "two"\nthree', "zwei é".encode()]
    assert read(path, text_key="title", **quoted) == [b"A", b"B", b"C"]
    filled = read(path, template="# {title}\n{text}{{}}", **quoted)
    assert filled == [b'# A\none, "two"\nthree{}', "# B\nzwei é{}".encode(), b"# C\n{}"]
    if suffix not in (".csv", ".tsv"):
        assert read(path, template="{title} {meta.year}") == [b"A 1999", b"B 2001", b"C 7"]
    with pytest.raises(DataError, match=rf"a\{suffix}.*body") as error:
        read(path, text_key="body", **quoted)
    assert "title" in str(error.value) and "--text-key" in str(error.value)


def test_compressed_csv_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbftext,n\nx,1\n\ny,2\n"))
    assert read(tmp_path / "a.csv.gz") == [b"x", b"y"]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.csv", b"text,n\nx\n", {}, r"a\.csv: line 2 has 1 cells, but there are names for 2"),
        ("a.csv", b'text\n"x\ny\n', {}, r"a\.csv: line 2 is not csv: it opens .*up to line 3"),
        ("a.csv", b'text\n"x"y\n', {}, r"a\.csv: line 2 is not csv \(.* use --quoting none"),
        ("a.csv", b"text,n\rx,1\ry,2\r", {}, r"a\.csv: line 1 holds a carriage return"),
        ("a.tsv", b"text\tn\nx\ry\t1\n", {}, r"a\.tsv: line 2 holds a carriage return"),
        ("a.tsv", b'text\tn\n"x\ny"\t1\n', {}, r"a\.tsv: line 2 has 1 .*use --quoting quoted"),
        ("a.csv", b"text,n\nx,1,2\n", {"errors": "skip"}, r"a\.csv: line 2 has 3 cells"),
        ("a.jsonl", b'{"text": null}\n', {}, r"a\.jsonl: line 1 has no text: 'text' is null.*skip"),
        ("a.jsonl", b'{"a": null}\n', {"template": "{a.b}"}, r"line 1 has no text: 'a\.b' is null"),
        ("a.jsonl", b'{"text": 3}\n', {}, r"line 1 has no text under .*'text', but int 3; .*templ"),
        ("a.jsonl", b'{"text": ' + b"7" * 5000 + b"}", {}, r"line 1 has no text under .*LongInteg"),
        (
            "a.jsonl",
            b'{"text": "a"}\n' + bytes(99) + b"\n",
            {},
            r"byte 14 begins a hole of 99",
        ),
        ("a.jsonl", b'{"text": "a", "b": ' + b"[" * 5000, {}, r"line 1 .*is not JSON \(5001 brack"),
        ("a.jsonl", b"{" + bytes(9) + b"}\n", {"errors": "replace"}, r"hole of 9 .*from byte 1 on"),
        ("a.csv", b"text,n,n\nx,1,2\n", {}, r"a\.csv: line 1 names n twice"),
        ("a.txt", b"text" + bytes(4096), {}, r"a\.txt: byte 4 begins a hole of 4096 zero bytes"),
        ("a.csv", b"text\nok\nb\xffd\n", {}, r"a\.csv: line 3: byte 9 \(0xff\) is not UTF-8"),
        ("a.parquet", b"text", {}, r"a\.parquet: is not a valid parquet file, or damaged"),
        ("a.arrow", b"text", {}, r"a\.arrow: is not a valid arrow file, or damaged"),
        ("a.parquet", b"", {}, r"a\.parquet: is not a valid parquet file, or damaged"),
        ("a.jsonl", b'{"a": 1}\n', {"template": "{a.b}"}, r"no text under text_key='a\.b'"),
    ],
)
def test_what_a_table_must_not_be(
    tmp_path: Path, name: str, content: bytes, options: dict[str, Any], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, **options)


def test_columns_without_names_are_not_read(tmp_path: Path) -> None:
    """Spreadsheets write such, and pandas its index."""
    (tmp_path / "a.csv").write_text(",text,,\n0,one,,\n1,two,x,\n")
    assert read(tmp_path / "a.csv") == [b"one", b"two"]


def test_undecodable_rows_are_skipped_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\none\nb\xffd\nthree\n")
    assert read(tmp_path / "a.csv", errors="skip") == [b"one", None, b"three"]
    assert read(tmp_path / "a.csv", errors="replace") == [b"one", "b\ufffdd".encode(), b"three"]


TEXTS = st.text(
    st.sampled_from("ab\"',;\t\n\r \0\u2028\x85\x0bé漢\ufeff") | st.characters(codec="utf-8"),
    max_size=12,
)


@settings(max_examples=50)
@given(rows=st.lists(st.tuples(TEXTS, TEXTS), max_size=6), end=st.sampled_from(["\n", "\r\n"]))
def test_drawn_tables_come_back(
    rows: list[tuple[str, str]], end: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every table that can be written is read as it was, row for row; quoted, unquoted, as JSON
    lines, in columns of Arrow. Half of the files lack the last end of line."""
    folder = tmp_path_factory.mktemp("drawn")
    wanted = [text.encode() for text, _ in rows if text]
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        lines = io.StringIO()
        writer = csv.writer(lines, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writerows([("text", "label"), *rows])
        (folder / f"quoted{suffix}").write_bytes(lines.getvalue().encode())
        assert read(folder / f"quoted{suffix}", quoting="quoted") == wanted
        kept = [r for r in rows if not set("".join(r)) & {delimiter, "\n", "\r"}]
        plain = end.join(map(delimiter.join, [("text", "label"), *kept]))
        (folder / f"plain{suffix}").write_bytes(plain.encode())
        found = read(folder / f"plain{suffix}", quoting="none")
        assert found == [text.encode() for text, _ in kept if text]
    for ascii_only in (True, False):
        lines_of = [json.dumps({"text": t, "n": n}, ensure_ascii=ascii_only) for t, n in rows]
        (folder / "a.jsonl").write_bytes(end.join(lines_of).encode())
        assert read(folder / "a.jsonl") == wanted
    table = pyarrow.table({"text": [t for t, _ in rows], "label": [n for _, n in rows]})
    if rows:
        parquet.write_table(table, folder / "a.parquet")
        assert read(folder / "a.parquet") == wanted


def test_rows_of_a_tsv_never_merge(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Cells that begin or end with a quotation mark are five documents; of a csv, where they are
    three, it is told."""
    lines = 'text\n"one\ntwo\nthree"\nfour "4"\nfive\n'
    (tmp_path / "a.tsv").write_text(lines)
    assert read(tmp_path / "a.tsv") == [b'"one', b"two", b'three"', b'four "4"', b"five"]
    (tmp_path / "a.csv").write_text(lines)
    assert read(tmp_path / "a.csv", quoting="none") == read(tmp_path / "a.tsv")
    prepare_shards([tmp_path / "a.csv"], tmp_path / "out", "bytes", workers=1)
    assert read_manifest(tmp_path / "out/train").num_documents == 3
    assert "1 rows that quotation marks join of several lines" in caplog.text
    assert f"{tmp_path / 'a.csv'}: lines 2 to 4" in caplog.text
    # Another way of reading is another corpus.
    with pytest.raises(DataError, match="with another tokenizer or other options"):
        prepare_shards(
            [tmp_path / "a.csv"], tmp_path / "out", "bytes", Reading(quoting="none"), workers=1
        )
    rows = "".join(f'"{i}\t{i % 2}\n' if i % 2 else f'{i}"\t{i % 2}\n' for i in range(6))
    (tmp_path / "b.tsv").write_text("text\tlabel\n" + rows)
    request = TaskRequest("labelled", (str(tmp_path / "b.tsv"),))
    assert prepare_task(request, tmp_path / "task")["train"].num_documents == 6


def test_a_row_that_is_skipped_keeps_its_quotation_marks(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(
        b'text,n\n"b\xffd\nmore, and","1"\nok,2\n"' + bytes(9) + b'",3\n'
    )
    assert read(tmp_path / "a.csv", errors="skip") == [None, b"ok", None]
    replaced = ["b\ufffdd\nmore, and".encode(), b"ok", "\ufffd".encode()]
    assert read(tmp_path / "a.csv", errors="replace") == replaced


def test_rows_without_text_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Null, undecodable, with holes: one line each, with the first place."""
    hole = b'{"te' + bytes(4096) + b'b"}'
    rows = [b'{"text": "a"}', b'{"text": null}', b'{"text": "\xff"}', hole, b'{"text": null}']
    rows += [b'{"text": "\\ud800"}', b'{"text": "b"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    table = pyarrow.table({"text": pyarrow.array(["c", None, "d"])})
    parquet.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: row 2 has no text: 'text' is null"):
        read(tmp_path / "b.parquet")
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.parquet"]
    for workers in (1, 2):
        caplog.clear()
        out = tmp_path / f"out{workers}"
        prepare_shards(inputs, out, "bytes", Reading(errors="skip"), workers=workers)
        assert texts(Corpus(out / "train")) == ["a", "b", "c", "d"]
        assert read_manifest(out / "train").documents_skipped == 6
        for told in (
            "skipped 3 documents: null (first: {}: line 2)", "skipped 1 documents: not UTF-8",
            "1 documents: with holes of zero bytes (first: {}: line 4, byte 47)",
            "skipped 1 documents: with lone surrogates (first: {}: line 6)",
        ):  # fmt: skip
            assert told.format(inputs[0]) in caplog.text
    # Labelled samples know the same.
    labelled = [{"text": t, "label": i} for t, i in (("x", 0), (None, 1), ("y", 1), ("z", None))]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    request = TaskRequest("labelled", (str(tmp_path / "c.jsonl"),))
    with pytest.raises(
        DataError, match=r"2 mistakes(.|\n)*line 2 has null for 'text'.*--errors skip"
    ):
        prepare_task(request, tmp_path / "task")
    made = prepare_task(replace(request, errors="skip"), tmp_path / "task")["train"]
    assert made.num_documents == 2 and "skipped 2 documents: null" in caplog.text


def test_json_beside_the_text_does_not_matter(tmp_path: Path) -> None:
    """However deep, however many digits, however odd, as long as it is JSON."""
    deep = "[" * 20_000 + '"a ] b"' + "]" * 20_000
    beside = [deep, "7" * 5000, "-" + "7" * 5000, "NaN", "-Infinity", "1e9999", '"\\u0000"']
    beside.append('{"a": ' * 3000 + "{}" + "}" * 3000)
    lines = [f'{{"n": {value}, "text": "t{i} ]"}}' for i, value in enumerate(beside)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read(tmp_path / "a.jsonl") == [f"t{i} ]".encode() for i in range(len(beside))]
    (tmp_path / "b.jsonl").write_text(lines[1])
    assert read(tmp_path / "b.jsonl", template="{n}") == [b"7" * 5000]
    for wrong in ("[" * 2000 + "}" * 2000, "[" * 2000, "[" * 2000 + "]" * 2001):
        (tmp_path / "c.jsonl").write_text(f'{{"text": "t", "n": {wrong}}}')
        with pytest.raises(DataError, match=r"c\.jsonl: line 1 \(byte 0\) is not JSON"):
            read(tmp_path / "c.jsonl")


def test_values_that_python_lacks_are_named(tmp_path: Path) -> None:
    """They do not matter in a column that is not read."""
    unknown = pyarrow.timestamp("us", tz="Mars/Phobos")
    for kind, number in ((pyarrow.date32(), 2**30), (pyarrow.timestamp("ms"), 2**52), (unknown, 1)):
        path = tmp_path / "far.parquet"
        rows = {"text": ["t"], "day": pyarrow.array([number], kind)}
        parquet.write_table(pyarrow.table(rows), path)
        assert read(path) == [b"t"]
        with pytest.raises(
            DataError, match=r"far\.parquet: column 'day', .*cannot be converted to"
        ):
            read(path, template="{day}: {text}")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_text_in_columns_of_any_type(tmp_path: Path, suffix: str) -> None:
    """Bytes that are UTF-8 are text; strings that are not are found, as files need not check."""
    written = ["one", "zwei é", None, ""]
    kinds = [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary()]
    kinds += [pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
    if suffix == ".arrow":
        kinds += [pyarrow.string_view(), pyarrow.binary_view()]
    wrong = pyarrow.array([b"fine", b"b\xffd"], pyarrow.binary())
    columns = [(pyarrow.array(written).cast(kind), str(kind)) for kind in kinds]
    columns.append((wrong, "wrong bytes"))
    columns.append((pyarrow.Array.from_buffers(pyarrow.string(), 2, wrong.buffers()), "wrong text"))
    for column, name in columns:
        path = tmp_path / f"a{suffix}"
        table = pyarrow.table({"text": column, "n": range(len(column))})
        if suffix == ".parquet":
            parquet.write_table(table, path)
        else:
            with (
                pyarrow.OSFile(str(path), "wb") as sink,
                pyarrow.ipc.new_file(sink, table.schema) as f,
            ):
                f.write_table(table)
        if name.startswith("wrong"):
            with pytest.raises(DataError, match=r"row 2: byte 1 \(0xff\) is not UTF-8"):
                read(path)
            assert read(path, errors="skip") == [b"fine", None]
            assert read(path, template="{n} {text}", errors="skip") == [b"0 fine", None]
        else:
            assert read(path, errors="skip") == [b"one", "zwei é".encode(), None], name
            found = read(path, template="{n} {text}", errors="skip")
            assert found == [b"0 one", "1 zwei é".encode(), None, b"3 "], name


def test_damaged_files_are_read_or_named(tmp_path: Path) -> None:
    """Any flip, cut, hole, repetition or foreign byte: documents, or one line that names the file;
    damaged offsets of Arrow files would let the library read anywhere."""
    rows = [{"text": f'text {i} é, "q"\t{"x" * (i % 50)}', "n": i} for i in range(60)]
    rng = random.Random(7)
    whole = {}
    for name in ("a.jsonl", "a.csv", "a.parquet", "a.arrow"):
        if name == "a.csv":
            rows = [row | {"title": "t"} for row in rows]
        whole[name] = write(tmp_path / name, rows).read_bytes()
    whole["a.jsonl.gz"] = gzip.compress(whole["a.jsonl"])
    whole["a.tsv"] = b"text\tn\n" + b'"a\tb"\n' * 60
    named = 0
    for name in [*whole] * 100:
        content = bytearray(whole[name])
        begin = rng.randrange(len(content))
        end = begin + rng.randint(1, 500)
        change = rng.choice(("flip", "cut", "hole", "repeat", "insert"))
        if change == "flip":
            content[begin] ^= 1 << rng.randrange(8)
        elif change == "cut":
            del content[begin:]
        elif change == "hole":
            content[begin:end] = bytes(len(content[begin:end]))
        elif change == "repeat":
            content[begin:begin] = content[begin:end]
        else:
            content[begin:begin] = rng.choice((b'"', b"\r", b"\n", b"\0", b"\t", b"[", b"\xff"))
        (tmp_path / name).write_bytes(content)
        try:
            read(tmp_path / name, errors=rng.choice(("fail", "skip", "replace")))
        except DataError as error:
            named += 1
            assert str(tmp_path / name) in str(error) and "\n" not in str(error), (name, change)
    assert 100 < named < 600


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
