"""What users get wrong: one clear error with path, value and remedy, exit code 2, no traceback."""

import gzip
import shutil
import sys
from pathlib import Path

import pytest
from support.configs import TEXT, make_config

from megarecur.config.load import to_yaml
from megarecur.errors import MeshError
from megarecur.launch.cli import main
from megarecur.parallel.mesh import pick_device
from megarecur.train.trainer import train


@pytest.fixture
def command(capsys, monkeypatch):
    """Run the command line in this process: (exit code, stderr)."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["megarecur", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


@pytest.fixture
def refused(command):
    """Run a command that must be refused, with all of these texts in its message."""

    def run(*words: object, naming: tuple[str, ...]) -> None:
        code, message = command(*words)
        assert code == 2, message
        assert message.startswith("error: ") and "Traceback" not in message
        for text in naming:
            assert text in message, f"{text!r} is not in: {message}"

    return run


@pytest.fixture
def config_file(corpus, tmp_path) -> Path:
    """The config of a short run on the test corpus."""
    path = tmp_path / "config.yaml"
    train = {"steps": 2, "global_batch_size": 8, "micro_batch_size": 8}
    path.write_text(to_yaml(make_config(corpus, run_dir=str(tmp_path / "run"), train=train)))
    return path


def test_empty_corpus(refused, tmp_path) -> None:
    (tmp_path / "empty.txt").write_text("")
    words = ("prep", "shards", tmp_path / "empty.txt", "--out", tmp_path / "out")
    refused(*words, "--tokenizer", "bytes", naming=("out/train", "empty", "1 input file"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["text.txt.gz", "text.txt.xz", "text.txt.zst"])
def test_file_that_is_not_what_its_name_says(refused, tmp_path, name) -> None:
    (tmp_path / name).write_text(TEXT)
    words = ("prep", "shards", tmp_path / name, "--out", tmp_path / "out")
    refused(*words, "--tokenizer", "bytes", naming=(name,))


def test_truncated_archive(refused, tmp_path) -> None:
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(TEXT.encode())[:-20])
    words = ("prep", "shards", tmp_path / "text.txt.gz", "--out", tmp_path / "out")
    refused(*words, "--tokenizer", "bytes", naming=("text.txt.gz",))


def test_undecodable_bytes(refused, command, tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good text \xff more")
    (tmp_path / "b.txt").write_text(TEXT)
    words = ("prep", "shards", tmp_path / "a.txt", tmp_path / "b.txt", "--tokenizer", "bytes")
    refused(*words, "--out", tmp_path / "out", naming=("a.txt", "10", "--errors"))
    for choice in ("skip", "replace"):
        assert command(*words, "--out", tmp_path / choice, "--errors", choice)[0] == 0


def test_input_that_does_not_exist(refused, tmp_path) -> None:
    words = ("prep", "shards", tmp_path / "none*.txt", "--out", tmp_path / "out")
    refused(*words, "--tokenizer", "bytes", naming=("none*.txt",))


def test_too_large_a_vocabulary(refused, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("ab " * 100)
    words = ("prep", "tokenizer", tmp_path / "a.txt", "--out", tmp_path / "t.model")
    refused(*words, "--vocab-size", 5000, naming=("5000", "vocab"))
    assert not (tmp_path / "t.model").exists()


def test_tokenizer_that_does_not_match_the_shards(refused, config_file, tmp_path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    words = ("prep", "tokenizer", tmp_path / "a.txt", "--out", tmp_path / "t.model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["megarecur", *map(str, words), "--vocab-size", "400"])
        with pytest.raises(SystemExit):
            main()
    override = f"data.tokenizer={tmp_path / 't.model'}"
    refused("train", config_file, override, naming=("another tokenizer", "t.model", "bytes"))


def test_tokenizer_that_is_not_one(refused, config_file, tmp_path) -> None:
    (tmp_path / "t.model").write_text("no model")
    refused("train", config_file, f"data.tokenizer={tmp_path / 't.model'}", naming=("t.model",))
    refused("train", config_file, "data.tokenizer=missing.model", naming=("missing.model",))


def test_sequence_longer_than_the_corpus(refused, config_file) -> None:
    refused("train", config_file, "data.seq_length=100000", naming=("100000", "tokens"))


def test_batch_the_world_cannot_divide(refused, config_file) -> None:
    refused("launch", config_file, "--nproc", 3, naming=("global_batch_size=8", "3 replicas"))


def test_vocabulary_smaller_than_the_tokenizer(refused, config_file) -> None:
    refused("train", config_file, "model.vocab_size=200", naming=("model.vocab_size=200", "257"))


def test_missing_corpus(refused, config_file) -> None:
    refused("train", config_file, "data.val=[{path: nowhere}]", naming=("nowhere",))


def test_damaged_shard(refused, config_file, corpus, tmp_path) -> None:
    shutil.copytree(corpus, tmp_path / "broken")
    shard = tmp_path / "broken" / "train" / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 4
    shard.write_bytes(content)
    override = f"data.train=[{{path: {tmp_path / 'broken' / 'train'}}}]"
    refused("train", config_file, override, naming=(str(shard),))
    shard.unlink()
    refused("train", config_file, override, naming=(str(shard),))


def test_patterns_that_match_nothing(refused, config_file) -> None:
    override = "optimizer.frozen=['blocks.7.*']"
    refused("train", config_file, override, naming=("optimizer.frozen", "blocks.7.*"))


def test_resume_of_another_layer_map(refused, config_file, corpus, tmp_path) -> None:
    train(make_config(corpus, run_dir=str(tmp_path / "run"), train={"steps": 2}))
    refused(
        "train",
        config_file,
        "recurrence={kind: cycle, num_blocks: 3, depth: 6}",
        "optimizer.lr=5",
        naming=("recurrence.kind", "'cycle'", "'reuse_map'", "optimizer.lr: 5.0", "run_dir"),
    )


def test_devices_that_are_none() -> None:
    for name in ("gpu", "cuda:1", ""):
        with pytest.raises(MeshError, match=f"device '{name}' is unknown; set it to auto"):
            pick_device(name)


def test_run_folders_that_cannot_be_made(refused, config_file) -> None:
    """`check` says so already."""
    run = f"run_dir={config_file}/run"
    refused("check", config_file, run, naming=(f"{run}: {config_file} is a file",))
    refused("train", config_file, run, naming=(f"{run}: cannot be written", "choose another"))
    long = "a" * 300
    refused("check", config_file, f"run_dir={long}", naming=(long, "too long; choose another"))
    named = f"data.train.0.path={long}"
    refused("check", config_file, named, naming=(long, "too long; choose another"))


def test_run_folders_that_are_none(refused, tmp_path) -> None:
    refused("eval", tmp_path, naming=(str(tmp_path),))
    refused("generate", tmp_path, "text", naming=(str(tmp_path),))
    refused("plot", tmp_path, naming=(str(tmp_path),))


def test_all_damaged_checkpoints(refused, corpus, tmp_path) -> None:
    run_dir = tmp_path / "run"
    train(make_config(corpus, run_dir=str(run_dir), train={"steps": 2}))
    for file in run_dir.glob("checkpoints/step-*/rank-00000.safetensors"):
        file.write_bytes(b"broken")
    refused("eval", run_dir, naming=("rank-00000.safetensors",))
