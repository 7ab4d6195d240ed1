"""Corpora from elsewhere: no name leads outside, no byte of a manifest changes unnoticed, no bomb
fills memory."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import zstandard

from megarecur.data.corpus import Corpus, read_manifest, write_manifest
from megarecur.data.foreign import ForeignCorpus, missing_files
from megarecur.data.formats import open_corpus
from megarecur.data.mapped_files import hash_file
from megarecur.data.remote import RemoteCorpus
from megarecur.data.shard_index import read_index
from megarecur.data.tokenizer import load_tokenizer
from megarecur.data_prep.readers import Reading
from megarecur.data_prep.shards import prepare_shards
from megarecur.errors import DataError

FLIPS = 400
OUTSIDE = ["/etc/passwd", "../victim/x", "a/../../victim/x", "..", ".", "", "a//b", "a\0b",
           "a\x1bb", "x" * 300, "sub/" * 400 + "x", 7, None, ["x"], {"a": 1}]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of two shards."""
    folder = tmp_path_factory.mktemp("made")
    text = "".join(f"line {i} of some text\n\n" for i in range(1200))
    (folder / "text.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megarecur.data_prep.shards.SHARD_BYTES", 34_000)
        prepare_shards([folder / "text.txt"], folder / "out", "bytes",
                       Reading(text_split="blank_line"), workers=1)  # fmt: skip
    return folder / "out" / "train"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "corpus"))


def read(folder: Path) -> Corpus:
    return open_corpus(folder, "bytes", load_tokenizer("bytes").fingerprint)


def rewrite(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit index.json as an attacker would, with a manifest that agrees."""
    index = json.loads((folder / "index.json").read_text())
    edit(index)
    (folder / "index.json").write_text(json.dumps(index))
    values = json.loads((folder / "manifest.json").read_text())
    for file in folder.iterdir():
        if file.name in values["files"]:
            values["files"][file.name] = {
                "bytes": file.stat().st_size, "xxh64": hash_file(file)
            }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(values | {"identity": ""}))


# -------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("listed", [True, False])
def test_a_remote_deletes_nothing_outside_its_cache(
    copy: Path, tmp_path: Path, listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megarecur.data.remote.PAUSES", ())
    victim = tmp_path / "victim"
    (victim / "1").mkdir(parents=True)
    (victim / "1" / "dear").write_text("kept")
    for name in (str(victim), "../../../victim", str(victim / "1" / "dear")):
        folder = tmp_path / "hostile"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(copy, folder)
        rewrite(folder, lambda i: i["shards"][0]["raw_data"].update(basename=name))  # noqa: B023
        if listed:
            values = json.loads((folder / "manifest.json").read_text())
            values["files"][name] = values["files"]["shard.00000.mds"]
            (folder / "manifest.json").write_text(json.dumps(values))
        with pytest.raises(DataError, match=r"manifest|index"):
            corpus = RemoteCorpus(tmp_path / "cache", str(folder))
            corpus.read(0, 10)
        assert (victim / "1" / "dear").read_text() == "kept"
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_of_an_index_leads_outside(copy: Path, name: Any) -> None:
    """In corpora of our own and of others."""
    rewrite(copy, lambda index: index["shards"][1]["raw_data"].update(basename=name))
    with pytest.raises(DataError, match=r"index\.json: cannot be used"):
        Corpus(copy, verify=False)
    (copy / "manifest.json").unlink()
    (copy / "documents.npy").unlink()
    for look in (read_index, missing_files, read):
        with pytest.raises(DataError, match=r"index\.json: cannot be used"):
            look(copy)


def test_a_manifest_names_plain_files(copy: Path) -> None:
    values = json.loads((copy / "manifest.json").read_text()) | {"identity": ""}
    facts = values["files"]["documents.npy"]
    for name in (*(n for n in OUTSIDE if isinstance(n, str)), ".cache", "sub/x"):
        (copy / "manifest.json").write_text(
            json.dumps(values | {"files": values["files"] | {name: facts}})
        )
        with pytest.raises(DataError, match=r"manifest\.json: damaged"):
            read_manifest(copy)


def test_links_lead_outside_only_to_the_blobs_of_a_cache(copy: Path, tmp_path: Path) -> None:
    shard, blob = copy / "shard.00001.mds", tmp_path / "elsewhere" / "blob"
    blob.parent.mkdir()
    shutil.copy(shard, blob)
    shard.unlink()
    shard.symlink_to(blob)
    with pytest.raises(DataError, match="is a link that leads outside its folder"):
        Corpus(copy)
    shard.unlink()
    shutil.copy(blob, copy / "inner")
    shard.symlink_to("inner")
    assert Corpus(copy).read(0, 5).size == 5
    hub = tmp_path / "models--x"
    (hub / "blobs").mkdir(parents=True)
    snapshot = Path(shutil.copytree(copy, hub / "snapshots" / "abc", symlinks=True))
    shutil.copy(blob, hub / "blobs" / "0f")
    (snapshot / shard.name).unlink()
    (snapshot / shard.name).symlink_to("../../blobs/0f")
    assert Corpus(snapshot).read(0, 5).size == 5


def test_an_index_lists_each_shard_of_the_manifest_once(copy: Path) -> None:
    original = (copy / "index.json").read_bytes()
    edits: list[Callable[[dict[str, Any]], None]] = [
        lambda index: index["shards"].append(index["shards"][0]),
        lambda index: index["shards"][0]["raw_data"].update(basename="documents.npy"),
        lambda index: index["shards"][0]["raw_data"].update(bytes=1),
        lambda index: index["shards"][0].update(samples=-1),
        lambda index: index["shards"][0].update(samples=True),
        lambda index: index["shards"][0].update(column_encodings=["pkl"]),
        lambda index: index["shards"][0].update(column_encodings=[3]),
        lambda index: index["shards"][0].update(raw_data=[]),
        lambda index: index.update(shards={"a": 1}),
        lambda index: index.pop("shards"),
    ]
    for edit in edits:
        (copy / "index.json").write_bytes(original)
        rewrite(copy, edit)
        with pytest.raises(DataError, match=r"index\.json"):
            Corpus(copy)


# --------------------------------------------------------------------------------------- manifests


def test_no_change_of_a_byte_of_a_manifest_is_silent(copy: Path) -> None:
    """Bits, bytes, cuts, insertions and swaps."""
    file, rng = copy / "manifest.json", Random(5)
    whole = file.read_bytes()
    for number in range(FLIPS):
        content = bytearray(whole)
        at = rng.randrange(len(content))
        kind = number % 4
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at] = (content[at] + rng.randrange(1, 256)) % 256
        elif kind == 2:
            content[at:at] = bytes([rng.choice(b' \n\t0{}[]",:1e')])
        else:
            del content[at : at + rng.choice((1, 2, 30))]
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"manifest\.json: "):
            read_manifest(copy)
    file.write_bytes(whole)
    assert read_manifest(copy).identity == read_manifest(copy).fingerprint


WRONG = [None, True, -1, 1.5, 1 << 70, "", "x", [], [1], {}, {"a": 1}, float("inf")]


def test_wrong_types_in_an_unsealed_manifest_are_named(copy: Path) -> None:
    """Without a seal, so that only the types can tell."""
    file = copy / "manifest.json"
    values = json.loads(file.read_text()) | {"identity": ""}
    free = {("split", "x"), ("preparation", "x"), ("tokenizer_fingerprint", "x"), ("task", None),
            ("split", ""), ("preparation", ""), ("tokenizer_fingerprint", ""), ("identity", ""),
            ("tokenizer", "x")}  # fmt: skip
    for key in values:
        for wrong in WRONG:
            accepted = (key, wrong) in free if isinstance(wrong, str | None) else False
            accepted |= key == "sources" and wrong == []
            if accepted:
                continue
            file.write_text(json.dumps(values | {key: wrong}))
            with pytest.raises(DataError, match=r"manifest\.json: (damaged|version)"):
                read_manifest(copy)
    for wrong in WRONG:
        for facts in ({"bytes": wrong, "xxh64": "0" * 16}, {"bytes": 1, "xxh64": wrong}, wrong):
            file.write_text(json.dumps(values | {"files": {"documents.npy": facts}}))
            with pytest.raises(DataError, match=r"manifest\.json: damaged"):
                read_manifest(copy)


def test_old_manifests_open_with_a_warning(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = json.loads((copy / "manifest.json").read_text())
    identity = values.pop("identity")
    assert Corpus(copy).fingerprint == identity and not caplog.records
    (copy / "manifest.json").write_text(json.dumps(values))
    with caplog.at_level(logging.WARNING):
        assert Corpus(copy).fingerprint == identity
    assert "has no hash of its own" in caplog.text
    (copy / "manifest.json").write_bytes(write_manifest(values | {"num_tokens": 7}))
    with pytest.raises(DataError, match="starts at"):
        Corpus(copy)


# ------------------------------------------------------------------------------------------- bombs


def foreign_bomb(folder: Path, kind: str, packed: bytes, claimed: int) -> Path:
    """An index of a compressed shard that unpacks to more than it says."""
    folder.mkdir()
    (folder / f"shard.00000.mds.{kind}").write_bytes(packed)
    entry = {
        "format": "mds", "version": 2, "samples": 1, "compression": kind, "hashes": [],
        "column_names": ["tokens"], "column_encodings": ["bytes"], "column_sizes": [None],
        "raw_data": {"basename": "shard.00000.mds", "bytes": claimed, "hashes": {}},
        "zip_data": {"basename": f"shard.00000.mds.{kind}", "bytes": len(packed), "hashes": {}},
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": [entry]}))
    return folder


def pack_zeros(kind: str, size: int) -> bytes:
    zeros = bytes(1 << 20)
    if kind == "zstd":
        packer = zstandard.ZstdCompressor().compressobj()
        return b"".join(packer.compress(zeros) for _ in range(size >> 20)) + packer.flush()
    if kind == "br":
        import brotli

        stream = brotli.Compressor(quality=1)
        return b"".join(stream.process(zeros) for _ in range(size >> 20)) + stream.finish()
    if kind == "snappy":
        return b"\xff\xff\xff\xff\x0f" + bytes(100)  # a head of 4 GiB
    return gzip.compress(bytes(size), 1) if kind == "gz" else bz2.compress(bytes(size), 1)


LIMITED = """
import resource, sys
from megarecur.data.foreign import ForeignCorpus
from megarecur.data.tokenizer import load_tokenizer
from megarecur.errors import DataError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for folder in sys.argv[1:]:
    try:
        ForeignCorpus(folder, load_tokenizer("bytes"))
    except DataError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def test_bombs_end_at_the_size_that_the_index_promises(tmp_path: Path) -> None:
    kinds = ("zstd", "gz", "bz2", "br", "snappy")
    size = 256 << 20
    folders = [foreign_bomb(tmp_path / kind, kind, pack_zeros(kind, size), 5000) for kind in kinds]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, folders)],
        capture_output=True, text=True, env=clean_env(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *errors, grown = done.stdout.splitlines()
    assert len(errors) == len(kinds), done.stdout
    for kind, error in zip(kinds, errors, strict=True):
        assert f"shard.00000.mds.{kind} is damaged (it " in error
    assert int(grown) < 64, f"{grown} MiB"


def clean_env(folder: Path) -> dict[str, str]:
    (folder / "tmp").mkdir()
    return os.environ | {"TMPDIR": str(folder / "tmp")}


def test_headers_that_claim_terabytes_end_in_one_error(copy: Path) -> None:
    """Of documents.npy and of a shard; the limit of address space shows an allocation."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    for shape in ("(1099511627776,)", "(3,)", "(-1,)", "(2, 2)"):
        head = b"{'descr': '<i8', 'fortran_order': False, 'shape': " + shape.encode() + b", }"
        head = head.ljust(117) + b"\n"
        magic = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little")
        (copy / "documents.npy").write_bytes(magic + head + bytes(64))
        rewrite(copy, lambda index: None)
        try:
            resource.setrlimit(resource.RLIMIT_AS, (1 << 36, limits[1]))
            with pytest.raises(DataError, match="damaged"):
                Corpus(copy)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
    values = np.zeros(1200, np.float64)
    np.save(copy / "documents.npy", values)
    rewrite(copy, lambda index: None)
    with pytest.raises(DataError, match=r"documents\.npy holds float64"):
        Corpus(copy)


def test_offsets_of_a_shard_stay_inside(copy: Path) -> None:
    shard = copy / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[4:8] = (len(content) - 2).to_bytes(4, "little")
    shard.write_bytes(content)
    rewrite(copy, lambda index: None)
    with pytest.raises(DataError, match=r"damaged|holds"):
        Corpus(copy)


# ------------------------------------------------------------------------------- while it is read


def test_a_shard_that_is_cut_or_rewritten_while_it_is_read_is_named(copy: Path) -> None:
    corpus = Corpus(copy)
    expected = corpus.read(0, corpus.num_tokens).copy()
    shard = copy / "shard.00000.mds"
    whole = shard.read_bytes()
    shard.write_bytes(whole)  # The same content is no harm.
    os.utime(shard, ns=(1, 1))
    assert (corpus.read(0, 100) == expected[:100]).all()
    with shard.open("r+b") as file:
        file.seek(len(whole) // 2)
        file.write(b"other")
    os.utime(shard, ns=(2, 2))
    with pytest.raises(DataError, match=r"shard\.00000\.mds: was rewritten while it was read"):
        corpus.read(0, 100)
    os.truncate(shard, 1000)
    with pytest.raises(DataError, match=r"has 1000 bytes instead of .* while it was read"):
        corpus.read(16_000, 100)
    last = corpus.read(corpus.num_tokens - 100, 100)
    assert (last == expected[-100:]).all()


def test_starts_that_are_cut_while_they_are_read_are_named(copy: Path) -> None:
    corpus = Corpus(copy)
    os.truncate(copy / "documents.npy", 0)  # Reading it would kill the process.
    with pytest.raises(DataError, match=r"documents\.npy: has 0 bytes instead of .* while it was"):
        int(corpus.documents[3])


def test_a_cached_shard_that_is_cut_while_it_is_read_is_named(copy: Path, tmp_path: Path) -> None:
    with closing(RemoteCorpus(tmp_path / "cache", str(copy))) as corpus:
        corpus.read(0, 10)
        os.utime(tmp_path / "cache" / "shard.00000.mds")  # As every use of a cache does.
        corpus.read(0, 10)
        os.truncate(tmp_path / "cache" / "shard.00000.mds", 0)
        with pytest.raises(DataError, match=r"shard\.00000\.mds: has 0 bytes instead of"):
            corpus.read(0, 10)


@pytest.mark.parametrize("hashed", [True, False])
def test_a_foreign_shard_that_is_rewritten_while_it_is_read_is_named(
    copy: Path, hashed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("manifest.json", "documents.npy"):
        (copy / name).unlink()
    shard = copy / "shard.00000.mds"
    index = json.loads((copy / "index.json").read_text())
    for entry in index["shards"] if not hashed else []:
        entry["raw_data"]["hashes"] = {}
    (copy / "index.json").write_text(json.dumps(index))
    corpus = read(copy)
    assert isinstance(corpus, ForeignCorpus) and corpus.read(0, 10).size == 10
    os.utime(shard, ns=(1, 1))
    corpus._sample.cache_clear()
    assert corpus.read(0, 10).size == 10, "it was only touched"
    assert hashed or "without a hash nothing tells" in caplog.text
    with shard.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"other")
        file.truncate(shard.stat().st_size - (not hashed))
    os.utime(shard, ns=(2, 2))
    corpus._sample.cache_clear()
    fault = "was rewritten" if hashed else r"has \d+ bytes instead of \d+"
    with pytest.raises(DataError, match=rf"shard\.00000\.mds: {fault} while it was read"):
        corpus.read(0, 10)


def test_a_corpus_that_is_deleted_or_renamed_is_read_on(copy: Path, tmp_path: Path) -> None:
    corpus = Corpus(copy)
    expected = corpus.read(0, corpus.num_tokens).copy()
    copy.rename(tmp_path / "elsewhere")
    assert (corpus.read(0, corpus.num_tokens) == expected).all()
    shutil.rmtree(tmp_path / "elsewhere")
    assert (corpus.read(0, corpus.num_tokens) == expected).all()
