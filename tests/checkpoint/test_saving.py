"""Saving beside training, which checkpoints stay, the mirror, and starting from another run."""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.checkpoints import (
    assert_step,
    check_survivors,
    flip,
    make_shards,
    names,
    place,
    run_on,
    save_steps,
    wait_for_new,
)
from support.configs import make_config
from support.harness import World
from support.runs import weights

from megarecur import files
from megarecur.checkpoint import checkpoint, mirror
from megarecur.checkpoint.index import unseal
from megarecur.checkpoint.load import load_model
from megarecur.checkpoint.mirror import Mirror, Place, fetch_newest
from megarecur.checkpoint.retention import best_steps, remove_old, steps_to_keep
from megarecur.checkpoint.saving import Saver
from megarecur.config.checkpoint import CheckpointConfig
from megarecur.config.load import to_yaml
from megarecur.config.run import Config
from megarecur.convert.hf import convert_hf, export_hf
from megarecur.data.loader import Loader
from megarecur.data.open import open_data
from megarecur.errors import CheckpointError, ConfigError
from megarecur.launch.cli import main
from megarecur.optim.plain import PlainEngine
from megarecur.parallel.mesh import Mesh, saving_apart
from megarecur.parallel.shards import whole
from megarecur.train import trainer
from megarecur.train.metrics import read_rows
from megarecur.train.step import forward_backward
from megarecur.train.trainer import FINISHED, STOPPED, train

WRITE_ALL = files.write_all


def saving_run(corpus: Path, run_dir: Path, scheme: str = "cycle", **sections: Any) -> Config:
    """A run of 4 steps that saves every 2."""
    sections["train"] = {"steps": 4, "micro_batch_size": 4, **sections.get("train", {})}
    sections.setdefault("checkpoint", {"every": 2, "keep_last": 5})
    return make_config(corpus, scheme, run_dir=str(run_dir), **sections)


def logged(run_dir: Path, key: str = "train/loss") -> dict[int, float]:
    return {r["step"]: r[key] for r in read_rows(run_dir / "metrics.jsonl") if key in r}


def steps_in(run_dir: Path) -> list[int]:
    return [int(p.name[5:]) for p in checkpoint.list_checkpoints(run_dir / "checkpoints")]


def write_slowly(seconds: float) -> Any:
    """What to write files with, so that a save takes longer than a step."""

    def write_all(*args: Any) -> None:
        time.sleep(seconds)
        WRITE_ALL(*args)

    return write_all


# ------------------------------------------------------------------------------ beside training


def save_and_change(root: Path, layout: str) -> int:
    """Save three steps while the tensors change; returns the bytes this rank keeps copies in."""
    rank, size = place()
    config = make_config(checkpoint={"every": 1, "keep_last": 5}, run_dir=str(root))
    mesh = Mesh(size, rank=rank, dp_group=dist.group.WORLD)
    with saving_apart(mesh) as mesh, Saver(root, config, mesh) as saver:
        files.write_all = write_slowly(0.005)
        try:
            live = make_shards(layout, rank, size, step=0)
            saver.prepare(live)
            for step in (1, 2, 3):
                for name, shard in make_shards(layout, rank, size, step=step).items():
                    for (*_, mine), (*_, value) in zip(
                        live[name].chunks, shard.chunks, strict=True
                    ):
                        mine.copy_(value)
                saver.save(step, live, {"step": step})
                for shard in live.values():
                    for *_, tensor in shard.chunks:
                        tensor.zero_()
                dist.all_reduce(torch.ones(3))  # of training, meanwhile
            saver.finish()
        finally:
            files.write_all = WRITE_ALL
    for step in (1, 2, 3):
        target = make_shards("columns", rank, size)
        checkpoint.load(root / "checkpoints" / f"step-{step:08d}", target)
        assert_step(target, step)
    assert saver.staging is not None
    assert saver.planner.num_plans == 1, "the plan stands from the copies to the last save"
    return sum(buffer.nbytes for buffer in saver.staging._buffers.values())


@pytest.mark.parametrize("layout", ["replicated", "mixed"])
def test_a_checkpoint_holds_the_values_of_its_step(world, tmp_path, layout) -> None:
    kept = world(4).run(save_and_change, tmp_path, layout)
    once = sum(t.nbytes for s in make_shards("replicated", step=0).values() for *_, t in s.chunks)
    assert sum(kept) == once and max(kept) < once / 2


def test_saving_beside_training_changes_nothing(corpus, tmp_path, monkeypatch) -> None:
    """The same run, saved beside training and in between, with a disk that is slow."""
    monkeypatch.setattr(files, "write_all", write_slowly(0.004))
    for name, asynchronous in (("beside", True), ("between", False)):
        saving = {"every": 2, "keep_last": 5, "asynchronous": asynchronous}
        config = saving_run(corpus, tmp_path / name, train={"steps": 6}, checkpoint=saving)
        assert train(config) == FINISHED
        assert steps_in(tmp_path / name) == [2, 4, 6]
    beside, between = tmp_path / "beside", tmp_path / "between"
    assert logged(beside) == logged(between)
    for step in (2, 4, 6):
        assert weights(beside, step) == weights(between, step)
    blocked, written = logged(beside, "speed/save_seconds"), logged(between, "speed/write_seconds")
    assert set(blocked) == set(written) == {3, 5}
    assert blocked[3] < 0.5 * written[3]


def fail_later(config: Config, full_rank: int) -> tuple[str, int]:
    """Train on a disk that is full for one rank from the second save on: (error, last step)."""

    def write_all(file: Any, data: Any, path: Path) -> None:
        if "step-00000004" in str(path):
            raise OSError(28, "No space left on device", str(path))
        WRITE_ALL(file, data, path)

    if place()[0] == full_rank:
        files.write_all = write_all
    try:
        with pytest.raises(CheckpointError) as caught:
            train(config)
    finally:
        files.write_all = WRITE_ALL
    return str(caught.value), max(logged(Path(config.run_dir)))


@pytest.mark.parametrize("size", [1, 2])
def test_a_failed_save_ends_the_run_everywhere_and_loses_nothing(
    world, corpus, tmp_path, size
) -> None:
    config = saving_run(
        corpus, tmp_path / "run", train={"steps": 1000}, checkpoint={"every": 2, "keep_last": 1}
    )
    answers = run_on(world, size, fail_later, config, size - 1)
    assert len({message for message, _ in answers}) == 1
    message, last = answers[0]
    assert "no space left" in message and "step-00000004" in message
    assert last <= 6, "noticed no later than by the next save"
    assert names(tmp_path / "run" / "checkpoints") == ["latest", "step-00000002"]
    more = config.model_copy(update={"train": config.train.model_copy(update={"steps": 5})})
    assert train(more) == FINISHED
    assert logged(tmp_path / "run").keys() == {1, 2, 3, 4, 5}


def test_a_failed_save_is_the_users_to_mend(corpus, tmp_path, monkeypatch, capsys) -> None:
    """Exit code 2 and one message, although it failed beside training."""

    def write_all(file: Any, data: Any, path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "write_all", write_all)
    config = saving_run(corpus, tmp_path / "run", train={"steps": 1000})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    monkeypatch.setattr(sys, "argv", ["megarecur", "train", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot save") and "no space left" in error
    assert "Traceback" not in error


@pytest.mark.cuda
def test_copies_of_a_gpu_are_those_of_the_step(tmp_path) -> None:
    config = make_config(checkpoint={"every": 1, "keep_last": 5}, run_dir=str(tmp_path))
    live = torch.zeros(1 << 24, device="cuda")
    with Saver(tmp_path, config, Mesh(device=live.device)) as saver:
        saver.prepare({"w": whole(live)})
        for step in (1, 2, 3):
            live.fill_(step)
            saver.save(step, {"w": whole(live)}, {})
            live.fill_(-1)
        saver.finish()
    for step in (1, 2, 3):
        found = torch.zeros(1 << 24)
        path = tmp_path / "checkpoints" / f"step-{step:08d}"
        checkpoint.load(path, {"w": whole(found)})
        assert bool((found == step).all())


def test_a_signal_waits_for_the_save_under_way(corpus, tmp_path, monkeypatch) -> None:
    original = Loader.batch

    def batch(self: Loader, step: int) -> Any:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step)

    monkeypatch.setattr(Loader, "batch", batch)
    monkeypatch.setattr(files, "write_all", write_slowly(0.01))
    saving = {"every": 4, "keep_last": 5}
    config = saving_run(corpus, tmp_path / "run", train={"steps": 100}, checkpoint=saving)
    assert train(config) == STOPPED
    assert steps_in(tmp_path / "run") == [4]
    assert checkpoint.verify(tmp_path / "run" / "checkpoints" / "step-00000004") == []


def save_beside_until_killed(root: Path, step: int) -> None:
    """As training does: a save under way, and collectives of its own, at all times."""
    rank, size = place()
    mesh = Mesh(size, rank=rank, dp_group=dist.group.WORLD)
    config = make_config(checkpoint={"every": 1, "keep_last": 2}, run_dir=str(root.parent))
    with saving_apart(mesh) as mesh, Saver(root.parent, config, mesh) as saver:
        while True:
            saver.save(step, make_shards("mixed", rank, size, step=step), {"step": step})
            for _ in range(10):
                dist.all_reduce(torch.ones(1000))
            step += 1


@pytest.mark.parametrize(
    ("kills", "seed"), [(1, 0), *[pytest.param(5, s, marks=pytest.mark.slow) for s in (1, 2, 3, 4)]]
)
def test_ranks_killed_while_saving_beside_training(tmp_path, kills, seed) -> None:
    rng, step, root = random.Random(seed), 0, tmp_path / "checkpoints"
    for _ in range(kills):
        world, since = World(4), time.time()
        world.submit(save_beside_until_killed, root, step + 1)
        wait_for_new(root, since, ("",))
        time.sleep(rng.uniform(0, 0.4))
        os.kill(world.pids[rng.randrange(4)], signal.SIGKILL)
        outcomes = world.collect(timeout=30)
        assert all(error for error, _ in outcomes)
        step = check_survivors(root, step)
    assert step > 0


# ------------------------------------------------------------------------------------- retention


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ({"keep_last": 2}, {80, 90}),
        ({"keep_last": 1, "keep_every": 30}, {30, 60, 90}),
        ({"keep_last": 1, "keep_best": 2}, {20, 50, 90}),
        ({"keep_last": 1, "keep_best": True, "keep_every": 40}, {20, 40, 80, 90}),
        ({"keep_last": 20}, set(range(10, 100, 10))),
    ],
)
def test_which_steps_stay(rule, kept) -> None:
    scores = {20: 1.5, 35: 0.1, 40: 1.7, 50: 1.6, 60: 1.7}  # 35 has no checkpoint
    assert steps_to_keep(range(10, 100, 10), CheckpointConfig(**rule), scores) == kept


def test_of_equal_scores_the_later_is_best() -> None:
    rule = CheckpointConfig(keep_best=1)
    assert best_steps([1, 2, 3], rule, {1: 2.0, 2: 1.0, 3: 1.0}) == [3]


def test_best_is_named_and_guarded(tmp_path) -> None:
    save_steps(tmp_path, 1, 2, 3)
    remove_old(tmp_path, CheckpointConfig(keep_last=1, keep_best=1), {1: 0.5, 2: 0.7})
    assert names(tmp_path) == ["best", "latest", "step-00000001", "step-00000003"]
    assert unseal(tmp_path / "best") == "step-00000001"
    flip(tmp_path / "best", 3)
    path, (message,) = checkpoint.find_checkpoint(tmp_path)
    assert path == tmp_path / "step-00000003" and str(tmp_path / "best") in message
    remove_old(tmp_path, CheckpointConfig(keep_last=1))
    assert names(tmp_path) == ["latest", "step-00000003"]


def test_a_checkpoint_that_is_being_read_stays(tmp_path) -> None:
    save_steps(tmp_path, 1, 2, 3)
    remove_old(tmp_path, CheckpointConfig(keep_last=1), busy=tmp_path / "step-00000001")
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000003"]


def test_the_best_of_a_run_stays(corpus, tmp_path, monkeypatch) -> None:
    """Scores come after the checkpoint they belong to, the last one after the last save."""
    given = {2: 3.0, 4: 1.0, 6: 2.0, 8: None, 10: 0.5}

    def validate(model: Any, data: Any, mesh: Any, plan: Any, state: Any, *rest: Any) -> Any:
        score = given[state.step]
        loss = float("nan") if score is None else score
        return {"val/loss": loss, "val/bits_per_byte": loss}, 0

    monkeypatch.setattr(trainer, "validate", validate)
    saving = {"every": 2, "keep_last": 1, "keep_best": 1, "keep_every": 6}
    sections = {"train": {"steps": 8, "eval_every": 2}, "checkpoint": saving}
    run_dir = tmp_path / "run"
    assert train(saving_run(corpus, run_dir, **sections)) == FINISHED
    assert steps_in(run_dir) == [4, 6, 8]
    assert unseal(run_dir / "checkpoints" / "best") == "step-00000004"
    sections["train"]["steps"] = 10
    assert train(saving_run(corpus, run_dir, **sections)) == FINISHED
    assert steps_in(run_dir) == [6, 10]
    assert unseal(run_dir / "checkpoints" / "best") == "step-00000010"


def test_the_best_without_validation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.keep_best=1 needs data.val"):
        make_config(data={"val": []}, checkpoint={"keep_best": True})


# ---------------------------------------------------------------------------------------- mirror


@pytest.fixture(params=["path", "file", "memory"])
def far(request, tmp_path, monkeypatch) -> str:
    """Where a mirror may be; memory stands for object stores, which rename nothing."""
    monkeypatch.setattr(mirror, "VOLATILE", ())
    return {
        "path": str(tmp_path / "far" / "run"),
        "file": f"file://{tmp_path}/far/run",
        "memory": f"memory://{tmp_path.name}/run",
    }[request.param]


def mirrored(url: str) -> list[str]:
    there = Place(url)
    return [name for name in there.folders() if there.seal(name)]


def damage(url: str, step: int) -> None:
    """Flip a bit of a mirrored checkpoint."""
    there = Place(url)
    file = there.path(f"step-{step:08d}", "rank-00000.safetensors")
    content = bytearray(there.files.cat_file(file))
    content[-1] ^= 1
    there.files.pipe_file(file, bytes(content))


def test_a_run_is_mirrored_and_goes_on_from_there(corpus, tmp_path, far, caplog) -> None:
    saving = {"every": 2, "keep_last": 2, "mirror": far}
    straight = saving_run(corpus, tmp_path / "run", train={"steps": 6}, checkpoint=saving)
    assert train(straight) == FINISHED
    assert mirrored(far) == ["step-00000004", "step-00000006"]
    wanted = weights(tmp_path / "run", 6)
    shutil.rmtree(tmp_path / "run")
    damage(far, 6)
    assert train(straight) == FINISHED
    assert logged(tmp_path / "run").keys() == {5, 6}
    assert weights(tmp_path / "run", 6) == wanted
    assert f"{far}/step-00000006 is damaged" in caplog.text
    assert f"{far}/step-00000006/rank-00000.safetensors: checksum mismatch" in caplog.text
    # Saved anew, the damaged one was replaced there as well.
    assert mirrored(far) == ["step-00000004", "step-00000006"]
    assert fetch_newest(far, tmp_path / "again")[0] == tmp_path / "again" / "step-00000006"
    assert "the copy is damaged and is made anew" in caplog.text


def test_a_mirror_without_a_good_checkpoint_is_an_error(corpus, tmp_path, far) -> None:
    saving = {"keep_last": 1, "mirror": far}
    config = saving_run(corpus, tmp_path / "run", train={"steps": 1}, checkpoint=saving)
    assert train(config) == FINISHED
    damage(far, 1)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(CheckpointError, match="step-00000001 is damaged"):
        train(config)


def test_ranks_go_on_from_a_mirror_together(world, corpus, tmp_path) -> None:
    far = str(tmp_path / "far")
    for steps, run_dir in ((2, "one"), (4, "two")):
        saving = {"mirror": far}
        config = saving_run(corpus, tmp_path / run_dir, train={"steps": steps}, checkpoint=saving)
        assert world(2).run(train, config) == [FINISHED] * 2
    assert logged(tmp_path / "two").keys() == {3, 4}
    assert mirrored(far) == ["step-00000002", "step-00000004"]


def test_a_mirror_that_is_down_is_a_warning_and_tried_again(
    corpus, tmp_path, caplog, monkeypatch
) -> None:
    original, calls = Place.upload, []

    def upload(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("the line is dead")
        original(*args)

    monkeypatch.setattr(Place, "upload", upload)
    far = str(tmp_path / "far")
    batch = Loader.batch

    def batch_later(self: Loader, step: int) -> Any:
        deadline = time.monotonic() + 200
        while step == 3 and not calls:  # the first attempt comes before the second save
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return batch(self, step)

    monkeypatch.setattr(Loader, "batch", batch_later)
    saving = {"every": 2, "keep_last": 5, "mirror": far}
    assert train(saving_run(corpus, tmp_path / "run", checkpoint=saving)) == FINISHED
    assert f"checkpoint.mirror={far}: the line is dead; the next save tries again" in caplog.text
    assert mirrored(far) == ["step-00000002", "step-00000004"]


def test_a_copy_that_is_damaged_on_the_way_is_not_published(
    tmp_path, far, caplog, monkeypatch
) -> None:
    root = tmp_path / "checkpoints"
    save_steps(root, 1)
    original = Place.upload

    def upload(self: Place, source: Path, name: str, note: Any) -> None:
        original(self, source, name, note)
        if source.suffix == ".safetensors":
            damage(far, 1)

    keeper = Mirror(far, root, CheckpointConfig(), dict)
    with monkeypatch.context() as patch:
        patch.setattr(Place, "upload", upload)
        keeper.start()
        while keeper.wait(0.1):
            pass
    assert "the copy is damaged" in caplog.text and "rank-00000.safetensors" in caplog.text
    assert mirrored(far) == [] and Place(far).folders() == ["step-00000001"]
    keeper.synchronise()
    assert mirrored(far) == ["step-00000001"]


def test_a_damaged_checkpoint_is_not_mirrored_and_the_good_copy_stays(tmp_path, far) -> None:
    root = tmp_path / "checkpoints"
    keeper = Mirror(far, root, CheckpointConfig(keep_last=1), dict)
    save_steps(root, 1)
    keeper.synchronise()
    save_steps(root, 2)
    flip(root / "step-00000002" / "rank-00000.safetensors", -1)
    with pytest.raises(CheckpointError, match=r"step-00000002 is damaged.* not copied"):
        keeper.synchronise()
    assert mirrored(far) == ["step-00000001"]


def test_a_mirror_keeps_what_the_rule_keeps(tmp_path, far) -> None:
    root, rule = tmp_path / "checkpoints", CheckpointConfig(keep_last=1, keep_every=2)
    keeper = Mirror(far, root, rule, dict)
    for step in (1, 2, 3):
        save_steps(root, step)
        keeper.synchronise()
    assert mirrored(far) == ["step-00000002", "step-00000003"]
    assert keeper.busy is not None


def test_mirrors_that_cannot_be_are_refused(corpus, tmp_path) -> None:
    own = tmp_path / "run" / "checkpoints"
    for url, reason in (("nowhere://x", "nowhere"), (str(own), "another folder")):
        config = saving_run(corpus, tmp_path / "run", checkpoint={"mirror": url})
        with pytest.raises(ConfigError, match=rf"checkpoint.mirror={url}: .*{reason}|{reason}"):
            train(config)


def test_a_slow_mirror_is_waited_for_and_a_dead_one_is_not(tmp_path, monkeypatch, caplog) -> None:
    root = tmp_path / "checkpoints"
    save_steps(root, 1)
    original = Place.upload

    def upload(*args: Any) -> None:
        time.sleep(0.3)
        original(*args)

    monkeypatch.setattr(Place, "upload", upload)
    keeper = Mirror(str(tmp_path / "far"), root, CheckpointConfig(), dict)
    keeper.start()
    monkeypatch.setattr(mirror, "STALLED_SECONDS", 0.05)
    while keeper.wait(0.1):
        pass
    assert "does not answer" in caplog.text
    monkeypatch.setattr(mirror, "STALLED_SECONDS", 10.0)
    while keeper.wait(0.1):
        pass
    assert mirrored(str(tmp_path / "far")) == ["step-00000001"]


# -------------------------------------------------------------------------------------- init_from


@pytest.fixture(scope="module")
def source(corpus, tmp_path_factory) -> Path:
    """A run over blocks 0 1 0 1, saved at steps 2 and 4."""
    run_dir = tmp_path_factory.mktemp("source") / "run"
    sections = {"optimizer": {"lr": 1e-2}}
    assert train(saving_run(corpus, run_dir, **sections)) == FINISHED
    return run_dir


def first_loss(config: Config, run_dir: Path, step: int | None = None) -> float:
    """The loss of a run's parameters on the first batch of a config, under its layer map."""
    model, _ = load_model(run_dir, step)
    mesh = Mesh()
    data = open_data(config, mesh)
    engine = PlainEngine(model, data.config, mesh)
    with data.loader as loader:
        result = forward_backward(model, engine, data.config, loader.batch(0), 0, mesh)
    return float(result.losses["loss"])


@pytest.mark.parametrize(("at", "step"), [("", 4), ("@2", 2)])
def test_a_run_starts_from_the_parameters_of_another(corpus, source, tmp_path, at, step) -> None:
    sections = {"train": {"steps": 1, "global_batch_size": 16}, "seed": 9}
    init_from = f"{source}{at}"
    config = saving_run(corpus, tmp_path / "run", init_from=init_from, **sections)
    assert train(config) == FINISHED
    assert logged(tmp_path / "run")[1] == pytest.approx(first_loss(config, source, step), rel=1e-6)
    state = checkpoint.read_state(tmp_path / "run" / "checkpoints" / "step-00000001")
    assert state["step"] == 1 and state["tokens"] == 16 * 32


def test_names_are_global_over_layer_maps(corpus, source, tmp_path) -> None:
    """From 0 1 0 1 to 0 0 0 1 1 1."""
    recurrence = {"kind": "sequence", "num_blocks": 2, "depth": 6}
    config = saving_run(
        corpus, tmp_path / "run", recurrence=recurrence, init_from=str(source), train={"steps": 1}
    )
    assert train(config) == FINISHED
    model, _ = load_model(tmp_path / "run")
    start, _ = load_model(source)
    moved = 0.0
    for name, parameter in model.parameters_by_name.items():
        change = parameter.detach() - start.parameters_by_name[name].detach()
        moved = max(moved, change.abs().max().item())
    assert 0 < moved < 2e-3, "one step of AdamW at a learning rate of 1e-3"


def test_a_run_with_checkpoints_ignores_it(corpus, tmp_path, source) -> None:
    assert train(saving_run(corpus, tmp_path / "run", train={"steps": 1})) == FINISHED
    config = saving_run(corpus, tmp_path / "run", init_from="nowhere", train={"steps": 2})
    assert train(config) == FINISHED
    assert logged(tmp_path / "run").keys() == {1, 2}


def test_ranks_start_from_another_run_together(world, corpus, source, tmp_path) -> None:
    config = saving_run(corpus, tmp_path / "run", init_from=str(source), train={"steps": 1})
    assert world(2).run(train, config) == [FINISHED] * 2
    assert logged(tmp_path / "run")[1] == pytest.approx(first_loss(config, source), rel=1e-6)


def init_error(config: Config) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        train(config)
    return str(caught.value)


@pytest.mark.parametrize("size", [1, 2])
def test_parameters_that_do_not_fit_are_all_named(world, corpus, source, tmp_path, size) -> None:
    config = saving_run(
        corpus,
        tmp_path / "run",
        recurrence={"num_blocks": 3, "depth": 4},
        model={"ffn_hidden_size": 32, "attention_bias": "qk"},
        init_from=str(source),
    )
    messages = run_on(world, size, init_error, config)
    assert len(set(messages)) == 1
    message = messages[0]
    assert message.startswith(f"init_from={source}: ") and "step-00000004" in message
    assert "blocks.2.attention.query.weight: not in" in message
    assert "blocks.0.attention.query.bias: not in" in message
    assert "blocks.1.feed_forward.up.weight: shape [64, 32] there, [32, 32] here" in message


def test_superfluous_parameters_are_named(corpus, source, tmp_path) -> None:
    recurrence = {"num_blocks": 1, "depth": 4}
    config = saving_run(corpus, tmp_path / "run", recurrence=recurrence, init_from=str(source))
    message = init_error(config)
    assert "blocks.1.attention.query.weight: not in this model" in message
    assert "exp_avg" not in message and "optimizer.updates" not in message


def test_sources_that_are_none(corpus, source, tmp_path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text(to_yaml(make_config(corpus)))
    for init_from, reason in (
        ("nowhere", "is no run folder"),
        (f"{source}@3", "no checkpoint of step 3; kept: 2, 4"),
        (str(empty), "no checkpoint can be used"),
    ):
        config = saving_run(corpus, tmp_path / "run", init_from=init_from)
        message = init_error(config)
        assert f"init_from={init_from}" in message and reason in message


def test_a_damaged_source_is_named(corpus, source, tmp_path) -> None:
    shutil.copytree(source, tmp_path / "source")
    index = json.loads((tmp_path / "source/checkpoints/step-00000004/index.json").read_text())
    chunk = index["tensors"]["embedding.weight"]["chunks"][0]
    flip(tmp_path / "source/checkpoints/step-00000004/rank-00000.safetensors", chunk["bytes"][0])
    config = saving_run(corpus, tmp_path / "run", init_from=f"{tmp_path}/source@4")
    assert "checksum mismatch in embedding.weight" in init_error(config)
    config = saving_run(corpus, tmp_path / "run", init_from=f"{tmp_path}/source")
    assert train(config) == FINISHED  # from step 2, saying so


def test_a_converted_model_is_trained_by_init_from(corpus, tmp_path) -> None:
    dense = {"recurrence": {"kind": "dense", "num_layers": 2}}
    sections = {"train": {"steps": 2}, "checkpoint": {}}
    ours = make_config(corpus, "dense", run_dir=str(tmp_path / "dense"), **dense, **sections)
    assert train(ours) == FINISHED
    export_hf(tmp_path / "dense", tmp_path / "hf", unrolled=True)
    convert_hf(tmp_path / "hf", tmp_path / "converted")
    sections["train"] = {"steps": 1}
    changes = {"init_from": str(tmp_path / "converted"), **dense, **sections}
    config = make_config(corpus, "dense", run_dir=str(tmp_path / "run"), **changes)
    assert train(config) == FINISHED
    wanted = first_loss(config, tmp_path / "converted")
    assert logged(tmp_path / "run")[1] == pytest.approx(wanted, rel=1e-6)
    # To train in the converted run's own folder is refused, naming the way.
    there = make_config(corpus, "dense", run_dir=str(tmp_path / "converted"), **dense)
    with pytest.raises(ConfigError, match="init_from"):
        train(there)
