"""Token corpora of other programs: read as they are, equal to our own shards of the same tokens."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.configs import TEXT, make_config
from support.runs import losses, weights

from megarecur.checkpoint.load import load_model
from megarecur.data.corpus import Corpus
from megarecur.data.foreign import ForeignCorpus
from megarecur.data.formats import open_corpus
from megarecur.data.loader import Loader
from megarecur.data.open import open_data
from megarecur.data.tokenizer import load_tokenizer
from megarecur.data.torchvision_stub import make_torchvision_importable
from megarecur.data_prep.readers import Reading
from megarecur.data_prep.shards import prepare_shards
from megarecur.errors import DataError
from megarecur.launch.cli import main
from megarecur.parallel.mesh import Mesh, build_mesh
from megarecur.train.evaluate import evaluate_corpus
from megarecur.train.trainer import FINISHED, train

ROW = 64
HASHES = ["sha1", "xxh64"]
TOKENIZER = load_tokenizer("bytes")

KINDS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "int64 bytes": ({"tokens": "bytes"}, {"hashes": HASHES}),
    "int32": ({"tokens": "ndarray:int32"}, {"hashes": ["xxh3_64"]}),
    "zstd": ({"tokens": "bytes"}, {"hashes": HASHES, "compression": "zstd"}),
    "static": ({"input_ids": f"ndarray:uint16:{ROW}"}, {"hashes": ["sha256"]}),
    "beside others": (
        {"id": "str", "tokens": "ndarray", "a": "int", "z": "bytes"},
        {"compression": "zstd:3"},
    ),
    "documents": ({"tokens": "ndarray:int32"}, {"hashes": HASHES}),
    "documents, any type": ({"tokens": "ndarray"}, {"compression": "gz", "hashes": HASHES}),
    "documents of bytes": ({"x": "str", "tokens": "bytes"}, {}),
}
"""Columns and options as llm-foundry's converters and others write them."""
EVERY_OTHER = ["int32", "static", "beside others", "documents", "documents of bytes"]


def write(folder: Path, samples: list[np.ndarray], kind: str) -> Path:
    """Some samples as an MDS folder of several shards."""
    make_torchvision_importable()
    from streaming import MDSWriter

    columns, options = KINDS[kind]
    with MDSWriter(out=str(folder), columns=columns, size_limit=9000, **options) as writer:
        for i, ids in enumerate(samples):
            fill: dict[str, Any] = {"id": f"s{i}", "x": "x" * (i % 5), "a": i, "z": b"z" * (i % 3)}
            for name, encoding in columns.items():
                if name not in fill:
                    number = np.int64 if encoding == "bytes" else np.int32
                    number = np.uint16 if "uint16" in encoding else number
                    if encoding == "ndarray" and i % 2:
                        number = np.int64
                    ids = ids.astype(number)
                    fill[name] = ids.tobytes() if encoding == "bytes" else ids
            writer.write({name: fill[name] for name in columns})
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Our shards of a text whose tokens are a number of whole rows."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "text.txt").write_text(TEXT + "\n", encoding="utf-8")
    reading = Reading(text_split="blank_line")

    def prepare(name: str) -> Corpus:
        prepare_shards([folder / "text.txt"], folder / name, "bytes", reading, workers=1)
        return Corpus(folder / name / "train")

    missing = -prepare("first").num_tokens % ROW
    with (folder / "text.txt").open("a", encoding="utf-8") as file:
        file.write("\n" + "x" * (missing + ROW - 2) + "\n")
    corpus = prepare("second")
    assert corpus.num_tokens % ROW == 0 and corpus.num_documents > 40
    return corpus


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, own: Corpus) -> dict[str, Path]:
    """The same tokens in every kind of folder."""
    tokens = own.read(0, own.num_tokens)
    rows = list(tokens.reshape(-1, ROW))
    documents = np.split(tokens, own.documents[1:])
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("foreign") / "train"
        made[kind] = write(folder, documents if "documents" in kind else rows, kind)
        assert len(list(folder.glob("shard.*"))) > 1
    return made


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where compressed shards are unpacked."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def open_foreign(folder: Path, **options: Any) -> ForeignCorpus:
    corpus = open_corpus(folder, "bytes", TOKENIZER.fingerprint, **options)
    assert isinstance(corpus, ForeignCorpus)
    return corpus


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Any:
    """A copy of a folder to damage."""

    def of(kind: str) -> Path:
        return Path(shutil.copytree(folders[kind], tmp_path / "copy" / kind / "train"))

    return of


def test_windows_stay_inside_the_shards_of_others(folders: dict[str, Path]) -> None:
    corpus = open_foreign(folders["int64 bytes"])
    options: Any = {"global_batch_size": 8, "micro_batch_size": 8, "dp_rank": 0, "dp_size": 1,
                    "seed": 1, "shuffle_shards": 2}  # fmt: skip
    loader = Loader([(corpus, 1.0)], seq_length=24, **options)
    (order,) = loader.orders
    starts = np.sort(order.starts(order.windows(np.arange(order.num_windows))))
    shards = np.searchsorted(corpus.starts, starts, "right")
    assert (shards == np.searchsorted(corpus.starts, starts + 24, "right")).all()
    assert len(np.unique(starts)) == order.num_windows and len(np.unique(shards)) > 1
    tokens_BS = loader.batch(0)[0].tokens_BS.numpy()
    begins = order.starts(order.windows(np.arange(8))).tolist()
    assert (tokens_BS == [corpus.read(begin, 24) for begin in begins]).all()
    with pytest.raises(DataError, match="set shuffle_shards to 0"):
        Loader([(corpus, 1.0)], seq_length=corpus.starts[1] + 1, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_equal_those_of_our_shards(
    own: Corpus, folders: dict[str, Path], kind: str, scratch: Path
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folders[kind].iterdir()}
    corpus = open_foreign(folders[kind])
    assert (corpus.num_tokens, corpus.dtype) == (own.num_tokens, own.dtype)
    assert corpus.documents.tolist() == own.documents.tolist()
    rng = np.random.default_rng(0)
    for _ in range(100):
        start = int(rng.integers(own.num_tokens))
        n = int(rng.integers(min(own.num_tokens - start, 500) + 1))
        assert (corpus.read(start, n) == own.read(start, n)).all()
    with pytest.raises(DataError, match="requested"):
        corpus.read(own.num_tokens, 1)
    for rank in range(2):
        loaders = [
            Loader([(each, 1.0)], seq_length=24, global_batch_size=8, micro_batch_size=2,
                   dp_rank=rank, dp_size=2, seed=1)
            for each in (own, corpus)
        ]  # fmt: skip
        for step in (0, 1, 200):
            for mine, theirs in zip(*(loader.batch(step) for loader in loaders), strict=True):
                assert (mine.boundaries.edges == theirs.boundaries.edges).all()
                for name in vars(mine).keys() - {"boundaries"}:
                    a, b = getattr(mine, name), getattr(theirs, name)
                    assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name
    assert abs(corpus.num_bytes / own.num_bytes - 1) < 0.01
    after = {path.name: path.stat().st_mtime_ns for path in folders[kind].iterdir()}
    assert before == after, "the folder itself is never written to"
    unpacked = list(scratch.rglob("*.mds"))
    assert bool(unpacked) == ("compression" in KINDS[kind][1])


def plant_link(shard: Path, victim: Path) -> None:
    shard.parent.mkdir(parents=True)
    shard.with_name(shard.name + ".tmp").symlink_to(victim)


def plant_shard(shard: Path, victim: Path) -> None:
    shard.parent.mkdir(parents=True)
    shard.write_bytes(bytes(victim.stat().st_size))


def plant_linked_folder(shard: Path, victim: Path) -> None:
    (victim.parent / "theirs").mkdir()
    shard.parent.parent.mkdir(parents=True)
    shard.parent.symlink_to(victim.parent / "theirs")


@pytest.mark.parametrize("plant", [plant_link, plant_shard, plant_linked_folder])
@pytest.mark.parametrize("verify", [True, False])
def test_what_a_neighbour_has_prepared_is_never_used(
    folders: dict[str, Path],
    scratch: Path,
    plant: Callable[[Path, Path], None],
    verify: bool,
) -> None:
    """He knows the names, as everyone does, and comes first."""
    packed = next(kind for kind in KINDS if "compression" in KINDS[kind][1])
    expected = open_foreign(folders[packed]).read(0, 500)
    shard = next(scratch.rglob("*.mds"))
    victim = scratch.parent / "victim"
    victim.write_bytes(b"mine" * (shard.stat().st_size // 4) + b"." * (shard.stat().st_size % 4))
    before = victim.read_bytes()
    shutil.rmtree(shard.parents[2])
    plant(shard, victim)
    for folder in (shard.parents[2], shard.parents[1], shard.parent):
        if not folder.is_symlink():
            folder.chmod(0o700)
    if plant is plant_linked_folder:
        with pytest.raises(DataError, match="is a symbolic link"):
            open_foreign(folders[packed], verify=verify)
        assert not list((victim.parent / "theirs").iterdir())
    else:
        corpus = open_foreign(folders[packed], verify=verify)
        assert (corpus.read(0, 500) == expected).all()
    assert victim.read_bytes() == before
    shutil.rmtree(shard.parents[2])
    shard.parent.mkdir(parents=True)
    shard.parents[2].chmod(0o777)
    with pytest.raises(DataError, match="is writable by other users"):
        open_foreign(folders[packed], verify=verify)


def foreign_config(folder: Path, run_dir: Path, **sections: Any) -> Any:
    data = {"train": [{"path": str(folder)}], "val": []}
    sections.setdefault("train", {"steps": 4})
    return make_config(run_dir=str(run_dir), data=data, **sections)


def test_training_is_that_on_our_shards(
    own: Corpus, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The same losses, scores and, resumed in the middle, the same weights."""
    assert train(foreign_config(own.path, tmp_path / "own")) == FINISHED
    for kind in ("int64 bytes", "documents, any type"):
        run = tmp_path / kind
        assert train(foreign_config(folders[kind], run, train={"steps": 2})) == FINISHED
        assert train(foreign_config(folders[kind], run)) == FINISHED
        assert losses(run) == losses(tmp_path / "own")
        assert weights(run, 4) == weights(tmp_path / "own", 4)
        model, loaded = load_model(run)
        corpora = [own, open_foreign(folders[kind])]
        first, second = (
            evaluate_corpus(model, corpus, loaded.config, Mesh(), 8) for corpus in corpora
        )
        assert first.loss == second.loss
        assert abs(first.bits_per_byte / second.bits_per_byte - 1) < 0.01


@pytest.mark.parametrize("kind", EVERY_OTHER)
def test_every_other_kind_trains(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    assert train(foreign_config(folders[kind], tmp_path / "run", train={"steps": 1})) == FINISHED


def test_the_command_line_trains_on_it(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = foreign_config(folders["zstd"], tmp_path / "run", train={"steps": 1})
    file = tmp_path / "config.yaml"
    file.write_text(config.model_dump_json(exclude_unset=True))  # JSON is YAML
    monkeypatch.setattr("sys.argv", ["megarecur", "train", str(file)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and list(losses(tmp_path / "run")) == [1]


def samples_of_rank(config: Any) -> list[tuple[list[int], list[list[int]]]]:
    """(sample ids, tokens) of some steps on this rank."""
    data = open_data(config, build_mesh(config, torch.device("cpu")))
    found = []
    for step in range(3):
        for batch in data.loader.batch(step):
            found += list(zip(batch.sample_ids_B.tolist(), batch.tokens_BS.tolist(), strict=True))
    return found


def error_of_rank(config: Any) -> str:
    try:
        open_data(config, build_mesh(config, torch.device("cpu")))
    except DataError as error:
        return str(error)
    return ""


def test_two_processes_read_the_same_samples(
    world: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    for kind in ("zstd", "documents"):
        config = foreign_config(folders[kind], tmp_path / "run")
        alone = open_data(config, Mesh()).loader
        expected = [
            pair
            for step in range(3)
            for batch in alone.batch(step)
            for pair in zip(batch.sample_ids_B.tolist(), batch.tokens_BS.tolist(), strict=True)
        ]
        found = [pair for rank in world(2).run(samples_of_rank, config) for pair in rank]
        assert sorted(found) == expected


def test_damage_is_one_error_on_every_rank(world: Any, copy: Any, tmp_path: Path) -> None:
    """Each shard is hashed by one of the ranks, and both say what it found."""
    folder = copy("int64 bytes")
    for name in ("shard.00001.mds", "shard.00002.mds"):
        shard = folder / name
        content = shard.read_bytes()
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        errors = world(2).run(error_of_rank, foreign_config(folder, tmp_path / "run"))
        assert errors[0] == errors[1]
        assert f"{shard} does not match its hash" in errors[0]
        shard.write_bytes(content)
    assert world(2).run(error_of_rank, foreign_config(folder, tmp_path / "run")) == ["", ""]


@pytest.mark.parametrize("kind", ["int32", "zstd"])
def test_missing_and_damaged_shards_are_named(copy: Any, kind: str) -> None:
    folder = copy(kind)
    shard = sorted(folder.glob("shard.*"))[1]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=f"{shard} (does not match its hash|is damaged)"):
        open_foreign(folder)
    shard.write_bytes(content[:-1])
    with pytest.raises(DataError, match=f"{shard} has .* bytes instead of"):
        open_foreign(folder, verify=False)
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard} is missing; copy it again"):
        open_foreign(folder, verify=False)


def test_a_shard_that_goes_while_it_is_read_is_named(copy: Any) -> None:
    folder = copy("int32")
    corpus = open_foreign(folder)
    corpus.read(0, 10)
    (folder / "shard.00001.mds").unlink()
    with pytest.raises(DataError, match=r"shard\.00001\.mds is missing"):
        corpus.read(0, corpus.num_tokens)


def test_damage_without_hashes_shows_in_the_layout(
    copy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy("documents of bytes")
    with caplog.at_level(logging.WARNING):
        open_foreign(folder)
        open_foreign(folder, part=1, num_parts=2)
    assert [r.getMessage() for r in caplog.records if "no hashes" in r.getMessage()] == [
        f"{folder}: index.json holds no hashes of its shards: damage inside them may go unnoticed"
    ]
    shard = folder / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    start = int(np.frombuffer(content[4:8], np.uint32)[0])
    content[start] ^= 1  # the size of a column
    shard.write_bytes(content)
    with pytest.raises(DataError, match=f"{shard}: damaged .*do not add up"):
        open_foreign(folder)


@pytest.mark.parametrize("kind", ["int64 bytes", "documents"])
def test_a_vocabulary_too_small_names_the_sample(tmp_path: Path, kind: str) -> None:
    samples = [np.arange(5) + 8 * i for i in range(30)]
    samples[7] = samples[7][: None if kind == "int64 bytes" else 3]
    samples[26][3] = 70_000
    folder = write(tmp_path / "train", samples, kind)
    message = r"sample 26 \(shard\.00000\.mds\) holds id 70000, but .* bytes has ids 0 to 256"
    with pytest.raises(DataError, match=message):
        open_foreign(folder)
    samples[26][3] = -1
    folder = write(tmp_path / "negative", samples, kind)
    with pytest.raises(DataError, match=r"sample 26 .* holds id -1"):
        open_foreign(folder)
    if kind == "documents":  # not compared when opened, so when it is read
        corpus = open_foreign(folder, verify=False)
        corpus.read(0, 20)
        with pytest.raises(DataError, match=r"sample 26 .* holds id -1"):
            corpus.read(0, corpus.num_tokens)


def test_the_identity_is_the_index(copy: Any, own: Corpus, tmp_path: Path) -> None:
    folder = copy("int32")
    first = open_foreign(folder).fingerprint
    assert open_foreign(Path(shutil.copytree(folder, tmp_path / "b"))).fingerprint == first
    tokens = own.read(0, own.num_tokens).reshape(-1, ROW)
    assert open_foreign(write(tmp_path / "c", list(tokens[::-1]), "int32")).fingerprint != first
    train(foreign_config(folder, tmp_path / "run", train={"steps": 1}))
    with pytest.raises(DataError, match="trained on other corpora"):
        train(foreign_config(tmp_path / "c", tmp_path / "run", train={"steps": 2}))


@pytest.mark.parametrize(
    ("columns", "sample", "message"),
    [
        ({"text": "str"}, {"text": "a"}, "it holds text: make shards .*prep shards"),
        ({"tokens": "str"}, {"tokens": "a"}, "column tokens is of type str"),
        ({"tokens": "ndarray"}, {"tokens": np.ones(3, np.float32)}, "does not hold integers"),
        ({"a": "pkl"}, {"a": 1}, "a column is pickled"),
        ({"a": "int"}, {"a": 1}, r"has no column of ids, but a \(int\); name the column"),
        ({"tokens": "bytes"}, {"tokens": b"12345"}, "is cut short, or is not of this type"),
    ],
)
def test_what_is_no_corpus_of_tokens(
    tmp_path: Path, columns: dict[str, str], sample: dict[str, Any], message: str
) -> None:
    make_torchvision_importable()
    from streaming import MDSWriter

    with MDSWriter(out=str(tmp_path / "train"), columns=columns) as writer:
        writer.write(sample)
    with pytest.raises(DataError, match=message):
        open_foreign(tmp_path / "train")
    with pytest.raises(DataError, match=f"it holds corpora: give {tmp_path / 'train'}"):
        open_corpus(tmp_path, "bytes", TOKENIZER.fingerprint)


def test_a_damaged_index_is_named(copy: Any) -> None:
    folder = copy("int32")
    file = folder / "index.json"
    values = json.loads(file.read_text())
    outside = json.loads(file.read_text())
    outside["shards"][0]["raw_data"]["basename"] = "../x"
    for text in ("{", "[]", '{"shards": []}', '{"shards": [1]}', json.dumps(outside)):
        file.write_text(text)
        with pytest.raises(DataError, match=f"{file}: "):
            open_foreign(folder)
    values["shards"][1]["samples"] += 1
    file.write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"shard\.00001\.mds: damaged .*does not hold"):
        open_foreign(folder)
