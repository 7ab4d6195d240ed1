"""A frozen teacher: the same losses and gradients on any mesh, and nothing of it is trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from support.harness import Trace, assert_gradients_close, compare
from support.meshes import build_on_mesh, config_of, gather_whole, later

from megarecur.checkpoint import checkpoint
from megarecur.config.load import to_yaml
from megarecur.config.run import Config
from megarecur.data.open import open_data, with_vocab_size
from megarecur.data.tokenizer import ByteTokenizer
from megarecur.errors import ConfigError, DataError
from megarecur.launch import prep
from megarecur.parallel.loss import IGNORED
from megarecur.parallel.mesh import Mesh
from megarecur.plan.schedule import Schedules
from megarecur.recurrence.schemes import build_map
from megarecur.train.distill import load_teacher, with_teacher
from megarecur.train.metrics import read_rows
from megarecur.train.step import forward_backward, sum_losses
from megarecur.train.trainer import FINISHED, train
from megarecur.train.verify import certified

CYCLE = {"kind": "cycle", "num_blocks": 2, "depth": 4}


@pytest.fixture(scope="module")
def teacher(corpus, tmp_path_factory) -> Path:
    """A dense run, wider than its pupils."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    model = {"hidden_size": 48, "ffn_hidden_size": 96, "dropout": 0.1, "tie_embeddings": False}
    assert train(config_of(corpus, "dense", 1, run_dir=str(run), model=model,
                           optimizer={"lr": 1e-2}, train={"steps": 3})) == FINISHED  # fmt: skip
    return run


def pupil_of(corpus: Path | str, teacher: Path | str, tensor: int = 1, **sections: Any) -> Config:
    distill = {"teacher": str(teacher), "weight": 0.6, "temperature": 2.0}
    distill |= sections.pop("distill", {})
    sections = {"recurrence": CYCLE, "distill": distill, **sections}
    return config_of(corpus, "cycle", tensor, **sections)


def trace(config: Config, num_steps: int) -> Trace:
    """(loss, raw gradients of whole tensors, norm, skipped) of each optimizer step; the loss is
    cross-entropy and divergence together."""
    config, model, engine, mesh, loader = build_on_mesh(config)
    taught = load_teacher(config, mesh, model.project is not None)
    schedules, found = Schedules(config), []
    for step in range(num_steps):
        result = forward_backward(
            model, engine, config, loader.batch(step), step, mesh, False, None, schedules, taught
        )
        loss = sum_losses(result, mesh) + sum_losses(result, mesh, "distill")
        gradients = gather_whole(model, mesh, engine.gradients())
        norm, skipped = engine.step(config.optimizer.lr)
        found.append((loss, gradients, norm, skipped))
    assert (taught is None) == (model.project is None)
    return found


RELAXED = {"exits": {"coefficient": 0.3, "distill": True}, "adapters": {"rank": 3, "norms": True}}
MESHES = [
    (2, {"tensor": 2}, {"model": {"z_loss": 1e-3}, "exits": {"distill": True}}),
    later(2, {"tensor": 2, "sequence_parallel": True}, {"model": {"dropout": 0.1}, **RELAXED}),
    (2, {"pipeline": 2}, RELAXED),
    later(2, {"context": 2}, {"model": {"dropout": 0.1}, **RELAXED}),
    later(2, {"zero_stage": 1}, {"train": {"recompute": True}}),
    later(2, {"zero_stage": 2}, RELAXED),
    later(2, {"zero_stage": 3}, {"train": {"recompute": True}, **RELAXED}),
    later(4, {"pipeline": 2, "tensor": 2, "zero_stage": 1}, RELAXED),
]


@pytest.mark.parametrize(("processes", "parallel", "extra"), MESHES)
def test_a_pupil_on_any_mesh_equals_one_process(
    world, corpus, teacher, processes, parallel, extra
) -> None:
    size = {"micro_batch_size": 1, "global_batch_size": 4, **extra.get("train", {})}
    sections = {**extra, "train": size}
    config = pupil_of(corpus, teacher, parallel.get("tensor", 1), parallel=parallel, **sections)
    found = world(processes).run(trace, config, 3)[0]
    compare(found, trace(pupil_of(corpus, teacher, **sections), 3))


def test_gradients_are_autograds_and_the_teacher_has_none(corpus, teacher) -> None:
    values = {"train": {"micro_batch_size": 4, "precision": "fp64"}}
    config = pupil_of(corpus, teacher, **values)
    ((_, found, _, _),) = trace(config, 1)
    config, model, _, mesh, loader = build_on_mesh(config)
    taught = load_teacher(config, mesh, True)
    assert taught is not None
    (batch,) = loader.batch(0)
    ctx = model.context(batch, 0, training=True)
    x, _ = model.run(build_map(config), model.embed(batch.tokens_BS, ctx), ctx, {})
    logits, target = model.logits(x).flatten(0, 1), taught.target(batch)(slice(None))
    assert not target.requires_grad and torch.equal(
        target, taught.target(batch)(slice(None))
    )  # no dropout
    labels_N = batch.labels_BS.flatten()
    hard = F.cross_entropy(logits, labels_N, ignore_index=IGNORED)
    p, q = (target.double() / 2.0).log_softmax(-1), (logits / 2.0).log_softmax(-1)
    soft = 4.0 * (p.exp() * (p - q)).sum(-1)[labels_N != IGNORED].mean()
    for weight in model.weights():
        weight.sum_in_place = False
    (0.4 * hard + 0.6 * soft).backward()
    expected = {n: p.grad for n, p in model.parameters_by_name.items()}
    assert_gradients_close(found, expected, 1e-11)
    assert all(p.grad is None and not p.requires_grad for p in taught.model.parameters())
    assert not {id(p) for p in taught.model.parameters()} & {id(p) for p in model.parameters()}


def test_a_run_learns_goes_on_and_keeps_its_teacher(corpus, teacher, tmp_path) -> None:
    run = tmp_path / "run"
    sections = {"run_dir": str(run), "train": {"steps": 2}, "exits": {"coefficient": 0.2}}
    before = (teacher / "checkpoints/step-00000003/index.json").read_bytes()
    assert train(pupil_of(corpus, f"{teacher}@3", **sections)) == FINISHED
    made = yaml.safe_load((run / "config.yaml").read_text())["distill"]
    assert made["teacher"] == f"{teacher}@3" and len(made["fingerprint"]) == 32
    row = next(row for row in read_rows(run / "metrics.jsonl") if "train/distill" in row)
    assert row["train/distill"] > 0.0 and {"train/loss", "train/exit_1/loss"} <= row.keys()
    assert "val/exit_1/loss" in read_rows(run / "metrics.jsonl")[-1]
    config = pupil_of(corpus, teacher, **{**sections, "train": {"steps": 3}})
    assert train(config) == FINISHED  # The same checkpoint by another name.
    _, model, *_ = build_on_mesh(config)
    names = checkpoint.read_names(run / "checkpoints/step-00000003")
    parameters = {name for name in names if not name.startswith(("exp_avg", "optimizer."))}
    assert parameters == set(model.parameters_by_name)
    assert (teacher / "checkpoints/step-00000003/index.json").read_bytes() == before
    with pytest.raises(ConfigError, match=r"distill.fingerprint"):
        train(pupil_of(corpus, run, **{**sections, "train": {"steps": 4}}))


def test_certificates_have_the_teacher_too(corpus, teacher) -> None:
    assert certified(pupil_of(corpus, teacher), small=True, dp=1).distill is not None


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"model": {"vocab_size": 300}}, "vocabulary of 257, this run one of 300"),
        ({"distill": {"teacher": "nowhere"}}, "distill.teacher=nowhere: nowhere is no run folder"),
        ({"distill": {"fingerprint": "0" * 32}}, "is another teacher's"),
        ({"distill": {"weight": 0.0}}, "distill.weight"),
        ({"distill": {"temperature": 0}}, "distill.temperature"),
        ({"distill": {"kind": "reverse_kl"}}, "distill.kind"),
    ],
)
def test_teachers_that_cannot_be_are_refused(corpus, teacher, sections, told) -> None:
    with pytest.raises(ConfigError, match=told):
        config = pupil_of(corpus, teacher, **sections)
        data = open_data(config, Mesh())
        with_teacher(data.config, data.tokenizer, data.loader.corpora, Mesh())


def test_a_teacher_of_another_tokenizer_is_refused(corpus, teacher) -> None:
    config = with_vocab_size(pupil_of(corpus, teacher), 257)
    with pytest.raises(ConfigError, match=r"trained with a tokenizer of fingerprint .* has other"):
        with_teacher(config, "other", [], Mesh())
    parallel = config.parallel.model_copy(update={"tensor": 3})
    heads = config.model_copy(update={"parallel": parallel})
    with pytest.raises(ConfigError, match=r"parallel.tensor=3 does not divide model.num_heads=4"):
        with_teacher(heads, ByteTokenizer().fingerprint, [], Mesh())


# ------------------------------------------------------------------------- stored beforehand


def store(corpus: Path, teacher: Path, out: Path, top_k: int, **sections: Any) -> Path:
    """What the teacher says about two steps of the pupil, by the command."""
    out.parent.mkdir(parents=True, exist_ok=True)
    config = out.with_suffix(".yaml")
    config.write_text(to_yaml(pupil_of(corpus, teacher, **{"train": {"steps": 2}, **sections})))
    prep.teacher(str(config), [], out, top_k)
    return out


@pytest.fixture(scope="module")
def stored(corpus, teacher, tmp_path_factory) -> Path:
    """All of the vocabulary, so that nothing is lost but half precision's rounding."""
    return store(corpus, teacher, tmp_path_factory.mktemp("stored") / "all", 257)


def pupil_of_stored(corpus: Path, folder: Path, tensor: int = 1, **sections: Any) -> Config:
    distill = {"teacher": None, "stored": str(folder)}
    sections = {"train": {"steps": 2}, **sections}
    return pupil_of(corpus, "", tensor, distill=distill, **sections)


def test_what_was_stored_teaches_as_the_teacher_does(corpus, teacher, stored) -> None:
    expected = trace(pupil_of(corpus, teacher, train={"steps": 2}), 2)
    found = trace(pupil_of_stored(corpus, stored), 2)
    for (loss, gradients, *_), (other, others, *_) in zip(found, expected, strict=True):
        assert loss == pytest.approx(other, rel=1e-3)
        assert_gradients_close(gradients, others, 1e-2)
    forgotten = trace(pupil_of(corpus, teacher, distill={"weight": 1e-6}, train={"steps": 2}), 1)
    with pytest.raises(AssertionError):  # What is compared is the teacher's.
        assert_gradients_close(found[0][1], forgotten[0][1], 1e-2)


def test_the_likeliest_are_kept_and_the_rest_is_spread(corpus, teacher, tmp_path) -> None:
    folder = store(corpus, teacher, tmp_path / "top", 5)
    config, _, _, mesh, loader = build_on_mesh(pupil_of_stored(corpus, folder))
    taught = load_teacher(config, mesh, True)
    live = load_teacher(pupil_of(corpus, teacher).model_copy(update={"model": config.model}), mesh,
                        True)  # fmt: skip
    assert taught is not None and live is not None
    for step in range(2):
        for batch in loader.batch(step):
            p, q = (t.target(batch)(slice(None)).double().softmax(-1) for t in (live, taught))
            top = p.topk(5)
            torch.testing.assert_close(q.gather(-1, top.indices), top.values, rtol=5e-3, atol=1e-6)
            rest = q.scatter(-1, top.indices, torch.nan)
            left = (1.0 - top.values.sum(-1, keepdim=True)) / (257 - 5)
            torch.testing.assert_close(rest.nanmean(-1, keepdim=True), left, rtol=1e-2, atol=1e-6)
            assert (rest.nan_to_num(-1).amax(-1) - rest.nan_to_num(2).amin(-1)).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("processes", "parallel"),
    [(2, {"tensor": 2}), later(2, {"pipeline": 2}), later(2, {"zero_stage": 3})],
)
def test_a_pupil_of_stored_words_on_any_mesh_equals_one_process(
    world, corpus, stored, processes, parallel
) -> None:
    size = {"micro_batch_size": 1, "global_batch_size": 4, "steps": 2}
    tensor = parallel.get("tensor", 1)
    config = pupil_of_stored(corpus, stored, tensor, train=size, parallel=parallel)
    found = world(processes).run(trace, config, 2)[0]
    compare(found, trace(pupil_of_stored(corpus, stored, train=size), 2))


def test_a_run_takes_its_words_from_the_folder(corpus, stored, tmp_path) -> None:
    run = tmp_path / "run"
    config = pupil_of_stored(corpus, stored, run_dir=str(run))
    assert train(config) == FINISHED
    made = yaml.safe_load((run / "config.yaml").read_text())["distill"]["fingerprint"]
    assert made.endswith("-top257") and "train/distill" in read_rows(run / "metrics.jsonl")[0]


def test_files_that_are_complete_are_not_made_again(corpus, teacher, tmp_path) -> None:
    folder = store(corpus, teacher, tmp_path / "words", 3)
    (file,) = folder.glob("*.safetensors")
    before = file.stat().st_mtime_ns
    store(corpus, teacher, folder, 3)
    assert file.stat().st_mtime_ns == before
    store(corpus, teacher, folder, 3, train={"steps": 3})  # The file has room for more.
    assert train(pupil_of_stored(corpus, folder, train={"steps": 3}, run_dir=str(tmp_path / "r")))\
        == FINISHED  # fmt: skip
    with pytest.raises(ConfigError, match="was begun with another config"):
        store(corpus, teacher, folder, 4)


def test_words_about_other_samples_are_refused(corpus, stored) -> None:
    config = pupil_of_stored(corpus, stored, seed=9, train={"steps": 5})
    with pytest.raises(ConfigError) as caught:
        build_with_teacher(config)
    told = str(caught.value)
    assert "seed is 9" in told and "train.steps=5, they end with step 2" in told


def test_damaged_words_are_refused(corpus, stored, tmp_path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(stored, folder)
    file = folder / "samples-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="does not match its hash"):
        build_with_teacher(pupil_of_stored(corpus, folder))
    (folder / "teacher.json").unlink()
    with pytest.raises(DataError, match="megarecur prep teacher"):
        build_with_teacher(pupil_of_stored(corpus, folder))


def build_with_teacher(config: Config) -> Config:
    data = open_data(config, Mesh())
    return with_teacher(data.config, data.tokenizer, data.loader.corpora, Mesh())


def test_a_teacher_is_a_run_or_a_folder(corpus) -> None:
    for distill in ({"teacher": None}, {"teacher": "a", "stored": "b"}):
        with pytest.raises(ConfigError, match="one of them must be set"):
            pupil_of(corpus, "", distill=distill)
