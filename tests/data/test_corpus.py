"""Corpora on disk: what was written is what is read, and damage is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megarecur.data.corpus import Corpus, check_tokenizer, read_manifest
from megarecur.data.formats import open_corpus
from megarecur.data_prep.readers import Reading
from megarecur.data_prep.shards import prepare_shards
from megarecur.errors import DataError

LENGTHS = [1, 700, 16383, 40000, 3, 16384]


@pytest.fixture(scope="module")
def documents() -> list[bytes]:
    rng = np.random.default_rng(0)
    return [rng.integers(97, 123, n - 1, np.uint8).tobytes() + b"\n" for n in LENGTHS]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, documents: list[bytes]) -> Path:
    """Documents of bytes, in shards of a few chunks each."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "text.txt").write_bytes(b"\0\n".join(documents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megarecur.data_prep.shards.SHARD_BYTES", 70_000)
        prepare_shards(
            [folder / "text.txt"], folder / "out", "bytes",
            Reading(text_split="separator", separator="\0"), workers=1, part_bytes=20_000,
        )  # fmt: skip
    return folder / "out" / "train"


def test_reads_what_was_written(prepared: Path, documents: list[bytes]) -> None:
    stream = np.concatenate([[*document, 256] for document in documents])
    corpus = Corpus(prepared)
    assert len(corpus.shards) > 2
    assert corpus.num_tokens == len(stream) == sum(LENGTHS) + len(LENGTHS)
    assert corpus.num_documents == len(LENGTHS)
    assert corpus.num_bytes == sum(LENGTHS)
    assert (corpus.read(0, len(stream)) == stream).all()
    assert corpus.documents.tolist() == np.cumsum([0, *(n + 1 for n in LENGTHS)])[:-1].tolist()
    rng = np.random.default_rng(1)
    for _ in range(300):
        start = int(rng.integers(len(stream)))
        n = int(rng.integers(min(len(stream) - start, 50_000) + 1))
        assert (corpus.read(start, n) == stream[start : start + n]).all()
    assert corpus.read(len(stream), 0).size == 0
    with pytest.raises(DataError, match="requested"):
        corpus.read(0, len(stream) + 1)


def test_streaming_reads_the_same(prepared: Path) -> None:
    from megarecur.data.torchvision_stub import make_torchvision_importable

    make_torchvision_importable()
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=str(prepared), batch_size=1)
    corpus = Corpus(prepared)
    tokens = np.concatenate([dataset[i]["tokens"] for i in range(len(dataset))])
    assert (tokens[: corpus.num_tokens] == corpus.read(0, corpus.num_tokens)).all()
    assert (tokens[corpus.num_tokens :] == corpus.eos_id).all()
    assert len(tokens) % 16384 == 0


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def test_the_identity_is_the_content(copy: Path, prepared: Path) -> None:
    assert Corpus(copy).fingerprint == Corpus(prepared).fingerprint
    values = json.loads((copy / "manifest.json").read_text())
    # A manifest of the first releases, which has no hash of its own.
    (copy / "manifest.json").write_text(json.dumps(values | {"num_bytes": 1, "identity": ""}))
    assert read_manifest(copy).fingerprint != Corpus(prepared).fingerprint


@pytest.mark.parametrize("name", ["shard.00001.mds", "documents.npy", "index.json"])
def test_damage_is_named(copy: Path, name: str) -> None:
    file = copy / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"{file} does not match its hash.*; copy it again"):
        Corpus(copy)
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match=f"{file} has .* bytes instead of"):
        Corpus(copy, verify=False)
    file.unlink()
    with pytest.raises(DataError, match=f"{file} is missing"):
        Corpus(copy, verify=False)


def test_each_file_is_hashed_by_one_of_the_parts(copy: Path) -> None:
    names = sorted(read_manifest(copy).files)
    assert len(names) > 4
    for number, name in enumerate(names):
        if name == "index.json":
            continue
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        for part in range(3):
            if number % 3 == part:
                with pytest.raises(DataError, match=f"{copy / name} does not match its hash"):
                    Corpus(copy, part=part, num_parts=3)
            else:
                Corpus(copy, part=part, num_parts=3)
        (copy / name).write_bytes(content)
    # Sizes are compared by all, and damage that only shows when a file is used has a name too.
    (copy / "index.json").write_bytes((copy / "index.json").read_bytes().replace(b"{", b"x", 1))
    fingerprint = read_manifest(copy).tokenizer_fingerprint
    for part in range(3):
        with pytest.raises(DataError, match=f"{copy}.*; copy it again"):
            open_corpus(copy, "bytes", fingerprint, part=part, num_parts=3)
    with pytest.raises(DataError, match=f"{copy / 'index.json'}: cannot be used"):
        Corpus(copy, verify=False)
    shard = copy / names[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    for part in range(3):
        with pytest.raises(DataError, match=f"{shard} has .* bytes instead of"):
            Corpus(copy, part=part, num_parts=3)


def test_a_damaged_manifest_is_named(copy: Path) -> None:
    file = copy / "manifest.json"
    values = json.loads(file.read_text())
    for text, reason in (
        ("{", "damaged"),
        ("[]", "version 'list'"),
        (json.dumps(values | {"version": 99}), "version 99"),
        (json.dumps(values | {"surprise": 1}), "damaged"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=f"{file}: {reason}"):
            read_manifest(copy)


def test_what_is_no_corpus_is_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no corpus"):
        Corpus(tmp_path)
    with pytest.raises(DataError, match=f"give {prepared}"):
        Corpus(prepared.parent)


def test_another_tokenizer_is_refused(prepared: Path) -> None:
    manifest = read_manifest(prepared)
    check_tokenizer(prepared, manifest, "bytes", manifest.tokenizer_fingerprint)
    with pytest.raises(DataError, match="was made with another tokenizer"):
        check_tokenizer(prepared, manifest, "other.model", "0123")


def test_reading_a_manifest_imports_nothing_heavy(prepared: Path) -> None:
    program = (
        "import sys\nfrom megarecur.data.corpus import read_manifest\n"
        f"read_manifest({str(prepared)!r})\n"
        "heavy = {'torch', 'streaming', 'torchvision', 'sentencepiece', 'tokenizers'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
