"""Early exits: losses after each loop, on any mesh; and what one distribution teaches another."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.harness import assert_gradients_close, compare
from support.meshes import build_on_mesh, config_of, later, measure_activations, reference, trace
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from typer.testing import CliRunner

from megarecur.checkpoint.load import load_model
from megarecur.config.load import changed_fixed_fields
from megarecur.config.run import Config
from megarecur.data.formats import open_corpus
from megarecur.data.open import with_vocab_size
from megarecur.data.tokenizer import ByteTokenizer
from megarecur.errors import ConfigError, PlacementError
from megarecur.launch.cli import app
from megarecur.launch.drawing import draw_layer_map
from megarecur.parallel.loss import IGNORED, cross_entropy, distillation
from megarecur.parallel.mesh import Mesh
from megarecur.plan.cost import count_flops, count_head_flops
from megarecur.plan.predict import count_stage_flops
from megarecur.plan.schedule import Schedules
from megarecur.recurrence.schemes import build_map, layer_map
from megarecur.train.evaluate import evaluate_corpus
from megarecur.train.metrics import read_rows
from megarecur.train.report import Interval, StepResult
from megarecur.train.step import objective
from megarecur.train.trainer import FINISHED, train

CYCLE = {"kind": "cycle", "num_blocks": 2, "depth": 6}
AGAIN = {"kind": "block_recurrence", "num_blocks": 2, "num_loops": 3}
LOOP = {"kind": "loop", "prelude": 1, "core": 2, "coda": 0, "num_loops": 3}
SAMPLED = {**LOOP, "core": 1, "num_loops": {"sampler": "uniform", "min": 1, "max": 4}}
DISTILLED = {"coefficient": 0.3, "distill": True, "distill_weight": 0.7}
DROPOUT = {"dropout": 0.1}


def exits_of(corpus: Path | str, tensor: int = 1, exits: Any = DISTILLED, **sections: Any):
    recurrence = sections.pop("recurrence", CYCLE)
    exits = {"exits": exits} if exits is not None else {}
    return config_of(corpus, "cycle", tensor, recurrence=recurrence, **exits, **sections)


MESHES = [
    # processes, parallel, other sections
    (2, {"tensor": 2}, {"model": {"z_loss": 1e-3, **DROPOUT}}),
    later(2, {"tensor": 2, "sequence_parallel": True}, {"model": DROPOUT, "recurrence": LOOP}),
    (2, {"pipeline": 2}, {"model": DROPOUT}),
    later(4, {"pipeline": 2, "tensor": 2}, {"train": {"recompute": True},
                                            "model": {"tie_embeddings": False}}),
    later(2, {"zero_stage": 1}, {"model": DROPOUT}),
    later(2, {"zero_stage": 2}, {"train": {"recompute": True}}),
    (2, {"zero_stage": 3}, {"train": {"recompute": True}, "model": DROPOUT}),
    later(2, {"zero_stage": 3}, {"model": {"tie_embeddings": False}}),
    later(4, {"pipeline": 2, "zero_stage": 1}, {"recurrence": AGAIN,
                                                "exits": {"mode": "weighted"}}),
    later(3, {"pipeline": 3, "order": "greedy"}, {"recurrence": LOOP}),
    later(2, {"pipeline": 2}, {"recurrence": SAMPLED}),
]  # fmt: skip


@pytest.mark.parametrize(("processes", "parallel", "extra"), MESHES)
def test_exits_on_any_mesh_equal_one_process(world, corpus, processes, parallel, extra) -> None:
    """Micro batches of one sample, several per step and replica."""
    size = {"micro_batch_size": 1, "global_batch_size": 4, **extra.get("train", {})}
    sections = {**extra, "train": size, "parallel": parallel}
    config = exits_of(corpus, parallel.get("tensor", 1), **sections)
    expected = reference(config, 3)
    compare(world(processes).run(trace, config, 3)[0], expected)
    alone = exits_of(corpus, parallel.get("tensor", 1), **{**sections, "exits": None})
    with pytest.raises(AssertionError):  # The exits do take part in what was compared.
        compare(reference(alone, 1), expected[:1])


@pytest.mark.parametrize("scheme", [CYCLE, LOOP])
def test_a_last_loop_alone_is_plain_training_to_the_bit(corpus, scheme) -> None:
    vector = exits_of(corpus, exits={"coefficient": [0.0, 0.0, 1.0]}, recurrence=scheme)
    found, expected = trace(vector, 3), trace(exits_of(corpus, exits=None, recurrence=scheme), 3)
    for (loss, gradients, norm, _), (loss_0, gradients_0, norm_0, _) in zip(
        found, expected, strict=True
    ):
        assert (loss, norm) == (loss_0, norm_0)
        assert all(torch.equal(gradients[name], gradients_0[name]) for name in gradients_0)


# ------------------------------------------------------------------------------ against autograd


def losses_of(config: Config, detach: bool) -> tuple[float, dict[str, Tensor]]:
    """(objective, gradients) of the first step's one micro batch, by autograd on whole logits."""
    config, model, _, _, loader = build_on_mesh(config)
    (batch,) = loader.batch(0)
    ctx, reads = model.context(batch, 0, training=True), {}
    x, _ = model.run(build_map(config), model.embed(batch.tokens_BS, ctx), ctx, reads)
    labels_N, final = batch.labels_BS.flatten(), model.logits(x).flatten(0, 1)
    total, exits = F.cross_entropy(final, labels_N, ignore_index=IGNORED), config.exits
    teacher = (final.detach() if detach else final).log_softmax(-1)
    for i in (1, 2):
        logits = model.logits(reads[f"exit_{i}"]).flatten(0, 1)
        hard = F.cross_entropy(logits, labels_N, ignore_index=IGNORED)
        soft = (teacher.exp() * (teacher - logits.log_softmax(-1))).sum(-1)
        soft = soft[labels_N != IGNORED].mean()
        share = exits.distill_weight if exits.distill else 0.0
        total = total + exits.coefficient * ((1 - share) * hard + share * soft)
    for parameter in model.parameters():
        parameter.grad = None
    for weight in model.weights():
        weight.sum_in_place = False
    total.backward()
    return total.item(), {n: p.grad for n, p in model.parameters_by_name.items()}


WHOLE = {"train": {"micro_batch_size": 4, "precision": "fp64"}}


@pytest.mark.parametrize("exits", [DISTILLED, {"coefficient": 0.2}])
def test_gradients_are_autograds_and_none_reaches_the_teacher(corpus, exits) -> None:
    config = exits_of(corpus, exits=exits, **WHOLE)
    ((_, found, _, _),) = trace(config, 1)
    _, expected = losses_of(config, detach=True)
    assert_gradients_close(found, expected, 1e-11)
    if exits is DISTILLED:  # A last loop that learns from its exits is another gradient.
        with pytest.raises(AssertionError):
            assert_gradients_close(found, losses_of(config, detach=False)[1], 1e-3)


def plain_distillation(
    logits_NV: Tensor, labels_N: Tensor, teacher_NV: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    """`distillation` at temperature 1 by autograd, which would follow the teacher's graph."""
    p, q = teacher_NV.log_softmax(-1), logits_NV.log_softmax(-1)
    losses_N = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORED, reduction="none")
    soft = (p.exp() * (p - q)).sum(-1)[labels_N != IGNORED].sum()
    return losses_N.sum(), logits_NV.new_zeros(()), soft, losses_N


def gradients_of(config: Config) -> dict[str, Tensor]:
    """Of the model's own objective in the first step, distillation left to autograd."""
    config, model, _, _, loader = build_on_mesh(config)
    (batch,) = loader.batch(0)
    ctx, reads = model.context(batch, 0, training=True), {}
    x, _ = model.run(build_map(config), model.embed(batch.tokens_BS, ctx), ctx, reads)
    for parameter in model.parameters():
        parameter.grad = None
    for weight in model.weights():
        weight.sum_in_place = False
    with mock.patch("megarecur.objective.exits.distillation", plain_distillation):
        terms = model.loss(x, batch, reads)
        objective(terms, {"tokens": batch.num_tokens}).backward()
    return {n: p.grad for n, p in model.parameters_by_name.items()}


def test_the_last_loops_logits_are_detached(corpus) -> None:
    """Planted: without the detach, gradients reach the last loop through its exits."""
    config = exits_of(corpus, **WHOLE)
    _, expected = losses_of(config, detach=True)
    assert_gradients_close(gradients_of(config), expected, 1e-11)
    with mock.patch.object(Tensor, "detach", lambda tensor: tensor):
        leaking = gradients_of(config)
    with pytest.raises(AssertionError):
        assert_gradients_close(leaking, expected, 1e-3)
    assert_gradients_close(leaking, losses_of(config, detach=False)[1], 1e-11)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2.0**-7)]
)
def test_distillation_against_torch(temperature, dtype, tol) -> None:
    generator = torch.Generator().manual_seed(5)
    student, teacher = (2 * torch.randn(300, 41, generator=generator).to(dtype) for _ in range(2))
    labels_N = torch.randint(41, (300,), generator=generator)
    labels_N[::3] = IGNORED
    wide = student.clone().double().requires_grad_()
    target = (teacher.double() / temperature).log_softmax(-1)
    q = (wide / temperature).log_softmax(-1)
    kl = temperature**2 * F.kl_div(q, target, log_target=True, reduction="none").sum(-1)
    expected = (
        F.cross_entropy(wide, labels_N, reduction="sum", ignore_index=IGNORED),
        wide.logsumexp(-1).square()[labels_N != IGNORED].sum(),
        kl[labels_N != IGNORED].sum(),
    )
    leaf, source = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    *found, losses_N = distillation(leaf * 1.0, labels_N, source * 1.0, temperature)
    weights = (0.3, 0.01, 0.6)
    sum(w * total for w, total in zip(weights, expected, strict=True)).backward()
    sum(w * total for w, total in zip(weights, found, strict=True)).backward()
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=max(1e-14, min(tol, 2e-6)), atol=0)
    assert source.grad is None
    error = (leaf.grad.double() - wide.grad).norm() / wide.grad.norm()
    assert error < tol
    torch.testing.assert_close(losses_N, cross_entropy(student * 1.0, labels_N)[2])


def test_logits_of_one_exit_are_there_at_a_time(corpus) -> None:
    """Of all logits, those of the last loop alone are kept for the backward pass."""
    config, model, _, _, loader = build_on_mesh(exits_of(corpus, **WHOLE))
    (batch,) = loader.batch(0)
    ctx, reads, kept = model.context(batch, 0, training=True), {}, []
    x, _ = model.run(build_map(config), model.embed(batch.tokens_BS, ctx), ctx, reads)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model.loss(x, batch, reads)
    assert sum(shape[-1:] == (257,) and shape[0] == 64 for shape in kept) == 1, kept


# --------------------------------------------------------------------------------- whole runs


def test_losses_of_exits_are_measured(corpus, tmp_path) -> None:
    """An exit's validation loss is that of as many loops, where nothing else differs."""
    values = {"steps": 4, "log_every": 2, "eval_every": 4}
    config = exits_of(corpus, recurrence=AGAIN, run_dir=str(tmp_path / "run"), train=values)
    assert train(config) == FINISHED
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    logged = [row for row in rows if "train/loss" in row]
    for row in logged:
        assert {f"train/exit_{i}/{n}" for i in (1, 2) for n in ("loss", "distill")} <= row.keys()
        assert row["train/exit_1/loss"] > 1.0 and row["train/exit_1/distill"] >= 0.0
    scored = next(row for row in rows if "val/loss" in row)
    model, run = load_model(tmp_path / "run")
    part = open_corpus(corpus / "val", "bytes", ByteTokenizer().fingerprint)
    for i in (1, 2):
        alone = evaluate_corpus(model, part, run.config, Mesh(), num_loops=i)
        assert scored[f"val/exit_{i}/loss"] == pytest.approx(alone.loss, rel=1e-6)
        assert len(alone.exits) == i - 1
    assert scored["val/loss"] != scored["val/exit_2/loss"]


def test_the_command_line_scores_exits_and_leaves_by_them(corpus, tmp_path) -> None:
    """Of exits that are trained after the model was."""
    before, run = str(tmp_path / "before"), tmp_path / "run"
    once = {"train": {"steps": 1}}
    assert train(exits_of(corpus, exits=None, run_dir=before, **once)) == FINISHED
    assert train(exits_of(corpus, run_dir=str(run), init_from=before, **once)) == FINISHED
    runner = CliRunner()
    scored = runner.invoke(app, ["eval", str(run)]).output
    assert re.search(r"exit 1: loss 5\.\d{4}\n.*exit 2: loss 5\.\d{4}\n", scored), scored
    options = ["--max-new-tokens", "6", "--exit", "confidence", "--exit-threshold", "1e-6"]
    said = runner.invoke(app, ["generate", str(run), "def", *options])
    assert said.exit_code == 0 and "1.00 loops a token, over" in said.output
    refused = runner.invoke(app, ["generate", str(run), "def", "--exit", "kl"])
    assert "needs a threshold" in str(refused.exception)
    drawn = runner.invoke(app, ["check", str(run / "config.yaml")]).output
    assert "exit" in drawn and "▼" in drawn


def test_means_are_over_the_steps_that_had_an_exit(corpus, tmp_path) -> None:
    """Where depth is drawn, an interval's steps differ in their exits."""
    result = StepResult(None, losses={"loss": torch.ones(()), "exit_1/loss": torch.ones(())})
    result.count_exits(Mesh())
    assert set(result.losses) == {"loss", "exit_1/loss", "exit_1/steps"}
    interval = Interval()
    interval.add(result)
    interval.add(StepResult(None, losses={"loss": torch.ones(())}))
    assert float(interval.losses["exit_1/steps"]) == 1.0 and interval.num_losses == 2
    train_ = {"steps": 8, "log_every": 8}
    config = exits_of(corpus, recurrence=SAMPLED, run_dir=str(tmp_path / "run"), train=train_)
    assert train(config) == FINISHED
    row = next(row for row in read_rows(tmp_path / "run/metrics.jsonl") if "train/loss" in row)
    for i in (1, 2):  # Of bytes, before anything is learned.
        assert 5.0 < row[f"train/exit_{i}/loss"] < 6.0
    assert not any("steps" in name and "exit" in name for name in row)


# ------------------------------------------------------------------------------ plan and mistakes


def test_a_plan_counts_the_heads_of_exits(corpus) -> None:
    pipelined = exits_of(corpus, parallel={"pipeline": 2}, train={"global_batch_size": 4})
    config = with_vocab_size(pipelined, 257)
    steps, plain = build_map(config), layer_map(config.recurrence)
    assert [i for i, step in enumerate(steps) if step.exit] == [1, 3]
    assert "▼" in draw_layer_map(steps).plain
    flops, head = count_flops(config, steps), count_head_flops(config)
    without = count_flops(config, plain)
    assert flops.train - without.train == 2 * 3 * head and flops.recompute == 2 * head
    walk = Schedules(config).training(None, 2).walk
    stages = count_stage_flops(config, walk)
    assert sum(map(sum, stages)) == flops.hardware
    assert walk[-1].exits == ("exit_1", "exit_2") and walk[1].leaves == ("exit_1",)
    assert not Schedules(config).forward().walk[-1].exits


@pytest.mark.slow
@pytest.mark.parametrize("exits", [{"coefficient": 0.3}, DISTILLED])
def test_the_plan_foretells_what_exits_keep(world, corpus, exits) -> None:
    sections = {
        "parallel": {"pipeline": 2, "order": "greedy", "split_backward": False},
        "train": {"micro_batch_size": 2, "global_batch_size": 12},
        "model": {"hidden_size": 64, "ffn_hidden_size": 192},
        "data": {"seq_length": 64, "mask_documents": False},
    }
    for held, planned in world(2).run(
        measure_activations, exits_of(corpus, exits=exits, **sections)
    ):
        assert planned == pytest.approx(held, rel=0.02)


def test_a_run_keeps_its_exits() -> None:
    saved, other = exits_of("corpus"), exits_of("corpus", exits={"coefficient": 0.2})
    assert changed_fixed_fields(saved, saved) == []
    lines = changed_fixed_fields(saved, other)
    assert [line.split(":")[0] for line in lines] == [
        "exits.coefficient", "exits.distill", "exits.distill_weight",
    ]  # fmt: skip


def test_exits_without_a_gradient_are_left_out_of_training(corpus) -> None:
    config = exits_of(corpus, exits={}, recurrence={**LOOP, "num_loops": 4, "backward_loops": 2})
    assert [step.exit_name for step in build_map(config) if step.exit] == ["exit_3"]
    scored = Schedules(with_vocab_size(config, 257)).forward(exits=True).steps
    assert [step.exit_name for step in scored if step.exit] == ["exit_1", "exit_2", "exit_3"]


@pytest.mark.parametrize(
    ("recurrence", "exits", "told"),
    [
        (
            {"kind": "dense", "num_layers": 2},
            {},
            "kind=dense has no.*cycle, block_recurrence",
        ),
        ({"kind": "cycle_reverse", "num_blocks": 2, "depth": 4}, {}, "kind=cycle_reverse"),
        ({**LOOP, "coda": 1}, {}, "recurrence.coda=1"),
        ({**CYCLE, "depth": 2}, {}, "runs one loop"),
        (CYCLE, {"coefficient": [0.1, 1.0]}, "2 numbers for 3 loops"),
        (SAMPLED, {"coefficient": [0.1, 1.0]}, "differs from step to step"),
        (CYCLE, {"coefficient": [0.1, 1.0, 0.0]}, "must be above 0"),
        (CYCLE, {"coefficient": -0.1}, "exits.coefficient"),
        (CYCLE, {"mode": "weighted", "coefficient": 0.2}, "mode=weighted"),
        (CYCLE, {"distill_weight": 0.5}, "without distill"),
        (CYCLE, {"distil": True}, "distil"),
    ],
)
def test_exits_that_cannot_be_are_refused(recurrence, exits, told) -> None:
    with pytest.raises(ConfigError, match=told):
        exits_of("corpus", exits=exits, recurrence=recurrence)


def test_exits_away_from_the_head_are_refused() -> None:
    sections = {"recurrence": {**CYCLE, "depth": 5}, "parallel": {"pipeline": 2}}
    config = with_vocab_size(exits_of("corpus", **sections), 257)
    with pytest.raises(PlacementError, match=r"after block 1, on pipeline rank 1.*on rank 0"):
        Schedules(config)
