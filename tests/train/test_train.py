"""Whole runs: resuming exactly, elastically and after signals, kills and damage."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.configs import make_config
from support.harness import fork_context
from support.runs import losses, weights

from megarecur.checkpoint import checkpoint
from megarecur.config.run import Config
from megarecur.data.loader import Loader
from megarecur.data.open import open_data
from megarecur.errors import CheckpointError, ConfigError, DataError
from megarecur.model.transformer import Transformer
from megarecur.optim.plain import PlainEngine
from megarecur.parallel.loss import IGNORED
from megarecur.parallel.mesh import Mesh
from megarecur.train.metrics import read_rows
from megarecur.train.state import open_run
from megarecur.train.trainer import FINISHED, STOPPED, train

# 12 steps of 32 samples are more than an epoch of the corpus.
TRAIN = {"steps": 12, "global_batch_size": 32, "micro_batch_size": 16}
DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}


def dropout_run(corpus: Path, run_dir: Path, **sections: Any) -> Config:
    """A short run with dropout, over more than one epoch."""
    sections.setdefault("checkpoint", {"every": 6, "keep_last": 5})
    sections["train"] = {**TRAIN, **sections.get("train", {})}
    sections["model"] = {**DROPOUT, **sections.get("model", {})}
    return make_config(corpus, run_dir=str(run_dir), **sections)


def keep_only(run_dir: Path, step: int) -> None:
    """Forget the checkpoints after a step, as if the run had died then."""
    for path in checkpoint.list_checkpoints(run_dir / "checkpoints"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    (run_dir / "checkpoints" / "latest").unlink()


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption."""
    run_dir = tmp_path_factory.mktemp("straight")
    assert train(dropout_run(corpus, run_dir)) == FINISHED
    return run_dir


def test_the_run_reads_more_than_one_epoch(corpus, straight) -> None:
    state = checkpoint.read_state(straight / "checkpoints" / "step-00000012")
    tokens = json.loads((corpus / "train" / "manifest.json").read_text())["num_tokens"]
    assert state["data"]["samples"] == 12 * 32 > tokens // 32


def test_resume_is_bit_identical(corpus, straight, tmp_path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    keep_only(tmp_path / "run", 6)
    assert train(dropout_run(corpus, tmp_path / "run")) == FINISHED
    assert losses(tmp_path / "run") == losses(straight)
    assert weights(tmp_path / "run", 12) == weights(straight, 12)


def train_recording(config: Config) -> tuple[int, list[list[int]]]:
    """Train, noting which windows of the corpus each step of the global batch reads."""
    read = []
    original = Loader.batch

    def batch(self: Loader, step: int) -> Any:
        read.append(self.windows(self.sample_ids(step))[1].tolist())
        return original(self, step)

    Loader.batch = batch
    try:
        return train(config), read
    finally:
        Loader.batch = original


def test_resume_with_another_number_of_processes(world, corpus, straight, tmp_path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    keep_only(tmp_path / "run", 6)
    config = dropout_run(corpus, tmp_path / "run", train={"micro_batch_size": 8})
    results = world(2).run(train_recording, config)
    assert [code for code, _ in results] == [FINISHED, FINISHED]
    single = train_recording(dropout_run(corpus, tmp_path / "again"))[1]
    assert results[0][1] == results[1][1] == single[6:]
    expected, found = losses(straight), losses(tmp_path / "run")
    assert abs(found[7] - expected[7]) <= 1e-6 * expected[7]
    for step in range(8, 13):
        assert abs(found[step] - expected[step]) <= 1e-4 * expected[step]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_save_at_the_step_boundary(corpus, straight, tmp_path, number, monkeypatch) -> None:
    original = Loader.batch

    def batch(self: Loader, step: int) -> Any:
        if step == 4:
            os.kill(os.getpid(), number)
        return original(self, step)

    config = dropout_run(corpus, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "batch", batch)
        assert train(config) == STOPPED
    assert (tmp_path / "run" / "checkpoints" / "step-00000005").is_dir()
    if number == signal.SIGUSR1:
        assert train(config) == FINISHED
        assert losses(tmp_path / "run") == losses(straight)
        assert weights(tmp_path / "run", 12) == weights(straight, 12)


def stop_one_rank(config: Config) -> int:
    """Train, with a signal that only the last rank receives."""
    original = Loader.batch

    def batch(self: Loader, step: int) -> Any:
        if step == 5 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return original(self, step)

    Loader.batch = batch
    try:
        return train(config)
    finally:
        Loader.batch = original


def test_a_signal_on_one_rank_stops_all(world, corpus, tmp_path) -> None:
    config = dropout_run(corpus, tmp_path / "run", train={"steps": 100}, checkpoint={})
    assert world(2).run(stop_one_rank, config) == [STOPPED, STOPPED]
    steps = [int(p.name[5:]) for p in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert steps == [6] and max(losses(tmp_path / "run")) == 6


def kill_and_resume(corpus: Path, run_dir: Path, rng: random.Random) -> None:
    """Start a run in a process of its own, SIGKILL it at a random moment; it must go on."""
    config = dropout_run(
        corpus, run_dir, train={"steps": 100_000}, checkpoint={"every": 2, "keep_last": 2}
    )
    root = run_dir / "checkpoints"
    before = [int(p.name[5:]) for p in checkpoint.list_checkpoints(root)]
    process = fork_context().Process(target=train, args=(config,))
    process.start()
    deadline = time.monotonic() + 200
    wanted = max(before, default=0) + rng.randrange(1, 6)
    while time.monotonic() < deadline and process.is_alive():
        rows = read_rows(run_dir / "metrics.jsonl")
        if rows and rows[-1]["step"] >= wanted:
            break
        time.sleep(0.01)
    time.sleep(rng.random() * 0.1)
    assert process.is_alive(), f"the run ended by itself with {process.exitcode}"
    process.kill()
    process.join()
    path, damaged = checkpoint.find_checkpoint(root)
    assert not damaged
    step = int(path.name[5:]) if path else 0
    logged = read_rows(run_dir / "metrics.jsonl")[-1]["step"]
    # What was logged is at most the steps since the checkpoint before the one under way.
    assert logged - 4 <= step <= logged + 1
    assert step >= max(before, default=0)


def kill_often(corpus: Path, run_dir: Path, times: int) -> None:
    """Kill a run again and again, then let it end: as if it had never been killed."""
    rng = random.Random(times)
    for _ in range(times):
        kill_and_resume(corpus, run_dir, rng)
    last = int(checkpoint.list_checkpoints(run_dir / "checkpoints")[-1].name[5:]) + 2
    for folder in (run_dir, run_dir.with_name("straight")):
        assert train(dropout_run(corpus, folder, train={"steps": last})) == FINISHED
    assert losses(run_dir) == losses(run_dir.with_name("straight"))
    assert weights(run_dir, last) == weights(run_dir.with_name("straight"), last)


def test_sigkill_at_random_moments(corpus, tmp_path) -> None:
    kill_often(corpus, tmp_path / "run", 3)


@pytest.mark.slow
def test_sigkill_at_many_random_moments(corpus, tmp_path) -> None:
    kill_often(corpus, tmp_path / "run", 10)


def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(
    corpus, straight, tmp_path, caplog
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    file = run_dir / "checkpoints" / "step-00000012" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    assert train(dropout_run(corpus, run_dir)) == FINISHED
    assert "step-00000012 is damaged" in caplog.text and "rank-00000" in caplog.text
    assert weights(run_dir, 12) == weights(straight, 12)


def fail_to_train(config: Config) -> str:
    """The error that a rank raises."""
    with pytest.raises(DataError) as caught:
        train(config)
    return str(caught.value)


def test_a_damaged_shard_is_named_on_every_rank(world, corpus, tmp_path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(corpus, broken)
    shard = broken / "train" / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    config = dropout_run(broken, tmp_path / "run")
    for message in world(2).run(fail_to_train, config):
        assert str(shard) in message


def test_a_run_folder_in_use_is_refused(corpus, tmp_path) -> None:
    config = dropout_run(corpus, tmp_path / "run")
    with open_run(config, Mesh()), pytest.raises(ConfigError, match=f"in use by.*{os.getpid()}"):
        train(config)


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"model": {"hidden_size": 64}}, ["model.hidden_size: 64", "with 32"]),
        ({"recurrence": {"reuse_map": [1, 1, 1]}}, ["recurrence.reuse_map: (1, 1, 1)"]),
        ({"seed": 4, "optimizer": {"lr": 1.0}}, ["seed: 4", "optimizer.lr: 1.0"]),
        ({"train": {"global_batch_size": 48}}, ["train.global_batch_size: 48"]),
        ({"data": {"seq_length": 16}}, ["data.seq_length: 16"]),
    ],
)
def test_changed_fixed_fields_are_all_named(corpus, straight, sections, named) -> None:
    with pytest.raises(ConfigError) as caught:
        train(dropout_run(corpus, straight, **sections))
    for text in named:
        assert text in str(caught.value)


def test_free_fields_may_change(corpus, straight, tmp_path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    shutil.copytree(corpus, tmp_path / "moved")
    config = dropout_run(
        tmp_path / "moved",
        tmp_path / "run",
        train={"steps": 13, "micro_batch_size": 32, "recompute": True, "log_every": 1},
    )
    assert train(config) == FINISHED
    assert max(losses(tmp_path / "run")) == 13


def test_another_corpus_is_refused(corpus, straight, tmp_path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copytree(corpus / "val", other / "train")
    shutil.copytree(corpus / "val", other / "val")
    with pytest.raises(DataError, match="other corpora"):
        train(dropout_run(other, straight, data={"seq_length": 32}))


def test_a_full_disk_loses_nothing(corpus, straight, tmp_path, monkeypatch) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    for place, error in (
        ("megarecur.files.write_all", CheckpointError),
        ("megarecur.train.metrics.Metrics.write", ConfigError),
        ("megarecur.train.state.replace_file", ConfigError),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(error, match=r"(No|no) space left|free some space"):
                train(dropout_run(corpus, run_dir, train={"steps": 14}))
    assert weights(run_dir, 12) == weights(straight, 12)
    assert train(dropout_run(corpus, run_dir, train={"steps": 14})) == FINISHED


def test_bf16_trains(corpus, tmp_path) -> None:
    config = dropout_run(corpus, tmp_path / "run", train={"precision": "bf16"})
    assert train(config) == FINISHED
    found = losses(tmp_path / "run")
    assert found[12] < found[1]
    metadata = json.loads((tmp_path / "run/checkpoints/step-00000012/index.json").read_text())
    assert {t["dtype"] for t in metadata["tensors"].values()} == {"F32"}
    assert torch.get_default_dtype() == torch.float32


def test_resume_inside_a_log_interval_keeps_its_mean_loss(corpus, straight, tmp_path) -> None:
    sections = {"train": {"log_every": 4}, "checkpoint": {"every": 6, "keep_last": 5}}
    assert train(dropout_run(corpus, tmp_path / "straight", **sections)) == FINISHED
    shutil.copytree(tmp_path / "straight", tmp_path / "run")
    keep_only(tmp_path / "run", 6)
    assert train(dropout_run(corpus, tmp_path / "run", **sections)) == FINISHED
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    single = losses(straight)
    mean = sum(single[step] for step in range(5, 9)) / 4
    assert losses(tmp_path / "run")[8] == pytest.approx(mean, rel=1e-6)


def test_steps_that_a_run_is_told_to_leave_out(corpus, tmp_path) -> None:
    """Their samples are passed over, and nothing is learnt from them."""
    config = dropout_run(
        corpus, tmp_path, train={"steps": 4}, checkpoint={"every": 1, "keep_last": 9}
    )
    (tmp_path / "skipped_steps.json").write_text("[2]")
    assert train(config) == FINISHED
    assert weights(tmp_path, 2) == weights(tmp_path, 3) != weights(tmp_path, 4)
    assert sorted(losses(tmp_path)) == [1, 2, 4]
    (tmp_path / "skipped_steps.json").write_text("two")
    with pytest.raises(ConfigError, match=r"skipped_steps.json: must be a list of steps"):
        train(config)


def test_nothing_but_damaged_checkpoints_is_refused(corpus, straight, tmp_path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    rows = (run_dir / "metrics.jsonl").read_text()
    for file in run_dir.glob("checkpoints/step-*/rank-*.safetensors"):
        file.write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"(?s)step-00000012.*step-00000006.*start over"):
        train(dropout_run(corpus, run_dir))
    assert (run_dir / "metrics.jsonl").read_text() == rows


def test_a_run_that_dies_in_its_last_evaluation_has_saved(corpus, tmp_path, monkeypatch) -> None:
    config = dropout_run(corpus, tmp_path / "run", checkpoint={})
    with monkeypatch.context() as patch:
        patch.setattr("megarecur.train.trainer.validate", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    assert (tmp_path / "run" / "checkpoints" / "step-00000012").is_dir()
    assert train(config) == FINISHED
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "val/loss" in row] == [12]


def test_a_signal_ends_an_evaluation(corpus, tmp_path, monkeypatch) -> None:
    sections = {"train": {"micro_batch_size": 4, "steps": 2}, "checkpoint": {}}
    config = dropout_run(corpus, tmp_path / "run", **sections)
    seen = []
    original = Transformer.context

    def context(self: Transformer, *args: Any, training: bool, **options: Any) -> Any:
        if not training:
            seen.append(1)
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, training=training, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "context", context)
        assert train(config) == STOPPED
    assert len(seen) < 9
    assert train(config) == FINISHED
    assert "val/loss" in read_rows(tmp_path / "run" / "metrics.jsonl")[-1]


def test_two_validation_corpora_keep_their_own_scores(corpus, tmp_path) -> None:
    shutil.copytree(corpus, tmp_path / "other")
    val = [{"path": f"{corpus}/val"}, {"path": f"{tmp_path}/other/val"}]
    train(dropout_run(corpus, tmp_path / "run", data={"val": val}, train={"steps": 2}))
    row = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    names = {key for key in row if key.startswith("val/") and key.endswith("/loss")}
    assert names == {"val/loss", "val/bytes.val/loss", "val/other.val/loss"}
    assert row["val/loss"] == pytest.approx(row["val/other.val/loss"])


def test_frozen_parameters_stay_and_the_rest_resumes(corpus, tmp_path) -> None:
    optimizer = {"frozen": ["blocks.0.attention.*"], "lr_multipliers": {"embedding.*": 0.1}}
    train(dropout_run(corpus, tmp_path / "whole", optimizer=optimizer))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    keep_only(tmp_path / "run", 6)
    assert train(dropout_run(corpus, tmp_path / "run", optimizer=optimizer)) == FINISHED
    assert weights(tmp_path / "run", 12) == weights(tmp_path / "whole", 12)
    index = json.loads((tmp_path / "run/checkpoints/step-00000012/index.json").read_text())
    names = set(index["tensors"])
    assert "exp_avg.blocks.0.attention.query.weight" not in names
    assert "exp_avg.blocks.0.feed_forward.up.weight" in names


def test_steps_that_are_not_finite_leave_valid_json(corpus, tmp_path, monkeypatch) -> None:
    original = PlainEngine.step

    def step(self: PlainEngine, lr: float) -> tuple[float, bool]:
        self.flat[0] = float("inf")
        return original(self, lr)

    monkeypatch.setattr(PlainEngine, "step", step)
    train(dropout_run(corpus, tmp_path / "run", train={"steps": 3, "log_every": 2}))
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["optim/skipped"] for row in rows if "optim/lr" in row] == [2, 3]


def two_sources(corpus: Path, run_dir: Path, **train_section: Any) -> Config:
    """A mixture of two corpora, logged every 3 steps and saved inside an interval."""
    sources = [{"path": f"{corpus}/train", "weight": 2.0}, {"path": f"{corpus}/val"}]
    return make_config(
        corpus, run_dir=str(run_dir), data={"train": sources, "val": []},
        checkpoint={"every": 4, "keep_last": 9},
        train={"steps": 6, "log_every": 3, "micro_batch_size": 4, **train_section},
    )  # fmt: skip


def train_on_ranks(corpus: str, run_dir: str) -> int:
    """On every rank."""
    return train(two_sources(Path(corpus), Path(run_dir)))


def test_loss_of_each_source(corpus, tmp_path, world) -> None:
    """By its own tokens; the same over ranks, and after a resume inside an interval."""
    assert train(two_sources(corpus, tmp_path / "run", log_every=1)) == FINISHED
    rows = [r for r in read_rows(tmp_path / "run" / "metrics.jsonl") if "train/loss" in r]
    with open_loader(two_sources(corpus, tmp_path / "run")) as loader:
        for row in rows:
            counts = [0.0, 0.0]
            for batch in loader.batch(row["step"] - 1):
                for source, labels_S in zip(batch.sources_B, batch.labels_BS, strict=True):
                    counts[int(source)] += int((labels_S != IGNORED).sum())
            whole = sum(
                count * row[f"train/loss_of/{name}"]
                for name, count in zip(("train", "val"), counts, strict=True)
                if count
            )
            assert whole / sum(counts) == pytest.approx(row["train/loss"], rel=1e-6)

    def by_source(name: str) -> list[list[float]]:
        rows = read_rows(tmp_path / name / "metrics.jsonl")
        return [[row["train/loss_of/train"], row["train/loss_of/val"]] for row in rows
                if "train/loss" in row]  # fmt: skip

    assert train(two_sources(corpus, tmp_path / "straight")) == FINISHED
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    keep_only(tmp_path / "resumed", 4)
    assert train(two_sources(corpus, tmp_path / "resumed")) == FINISHED
    assert by_source("resumed") == by_source("straight")
    assert world(2).run(train_on_ranks, str(corpus), str(tmp_path / "ranks")) == [FINISHED] * 2
    for row, expected in zip(by_source("ranks"), by_source("straight"), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def open_loader(config: Config) -> Loader:
    """The data of a config, for one process."""
    return open_data(config, Mesh()).loader
