"""Runs that classify: the same on any mesh, whatever the padding; they resume, learn and score."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.configs import make_config
from support.harness import compare
from support.meshes import build_on_mesh, later, reference, trace

from megarecur.config.load import validate
from megarecur.config.objective import TaskConfig
from megarecur.config.run import Config
from megarecur.data.open import open_data
from megarecur.data.samples import TaskBatch, TaskCorpus, TaskLoader, collate
from megarecur.data_prep.pixels import prepare_pixels
from megarecur.data_prep.tasks import TaskRequest, prepare_task
from megarecur.errors import ConfigError, DataError
from megarecur.launch.cli import main
from megarecur.model.transformer import Transformer
from megarecur.objective.by_class import BINS, ClassSums
from megarecur.objective.extremes import Extremes
from megarecur.parallel.mesh import Mesh
from megarecur.plan.cost import count_flops, count_logits, count_parameters, estimate_memory
from megarecur.recurrence.inventory import build_inventory
from megarecur.recurrence.layer_map import LayerMap
from megarecur.recurrence.schemes import layer_map
from megarecur.train.evaluate import evaluate_corpus
from megarecur.train.metrics import read_rows
from megarecur.train.trainer import FINISHED, train

SEQUENCE = {"kind": "sequence", "num_classes": 10, "augment": True, "pooling": "end"}
PAIR = {"kind": "pair", "num_classes": 7}
TOKEN = {"kind": "token", "num_classes": 2}
ENCODER = {"causal": False}


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small corpora: listops (of up to 28 tokens), logic and flip_flop."""
    folder = tmp_path_factory.mktemp("tasks")
    listops = {"train": 400, "val": 60, "max_length": 28, "min_length": 2}
    for name, options in (
        ("listops", listops),
        ("logic", {"train": 1500, "train_operators": 3}),
        ("flip_flop", {"train": 300, "val": 40, "length": 16, "tests": ("0.1x12",),
                       "test_count": 20}),
    ):  # fmt: skip
        prepare_task(TaskRequest(name, **options), folder / name)
    return folder


def task_config(
    tasks: Path, name: str, task: dict[str, Any] | None, scheme: str = "cycle", **sections: Any
) -> Config:
    """A tiny run on one of the corpora; the task section is `tasks/sections` for make_config."""
    folder = tasks / name
    data = {
        "train": [{"path": f"{folder}/train"}], "val": [{"path": f"{folder}/val"}],
        "tokenizer": f"{folder}/tokenizer.words",
        "seq_length": {"listops": 28, "logic": 24, "flip_flop": 16}[name],
        **sections.pop("data", {}),
    }  # fmt: skip
    train = {"global_batch_size": 8, "micro_batch_size": 2, **sections.pop("train", {})}
    optimizer = {"lr": 1e-4, "clip_norm": 0.5, **sections.pop("optimizer", {})}
    config = make_config("none", scheme, data=data, train=train, optimizer=optimizer)
    values = config.model_dump()
    values["task"] = task and dict(task)
    for section, update in sections.items():
        plain = isinstance(update, dict) and "kind" not in update
        values[section] = {**(values[section] or {}), **update} if plain else update
    return validate(values, "test")


# -------------------------------------------------------------------------------------- meshes


DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}
GUT = {"gate": True, "positions": "xpos", "norm": "layer", "feed_forward": "gelu"}
MESHES = [
    ("listops", SEQUENCE, 2, {}, {**ENCODER, **DROPOUT}),
    ("logic", PAIR, 2, {"tensor": 2, "sequence_parallel": True}, {**ENCODER, **DROPOUT}),
    ("flip_flop", TOKEN, 2, {"tensor": 2}, DROPOUT),
    ("logic", PAIR, 2, {"zero_stage": 1}, ENCODER),
    ("listops", {**SEQUENCE, "pooling": "mean"}, 2, {"pipeline": 2}, {**ENCODER, **DROPOUT}),
    later("logic", PAIR, 2, {"tensor": 2}, ENCODER),
    later(
        "listops", SEQUENCE, 2, {"tensor": 2, "sequence_parallel": True},
        {**ENCODER, "positions": "learned"},
    ),
    later("listops", SEQUENCE, 2, {"zero_stage": 3}, ENCODER),
    later("flip_flop", {"kind": "token", "targets": "next_token"}, 2, {"pipeline": 2}, {}),
    later(
        "listops", {**SEQUENCE, "head_size": 0, "pooling": "first"}, 4,
        {"tensor": 2, "pipeline": 2}, ENCODER,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "task", "processes", "parallel", "model"), MESHES)
def test_meshes_equal_one_process(world, tasks, name, task, processes, parallel, model) -> None:
    config = task_config(tasks, name, task, parallel=parallel, model=model)
    compare(world(processes).run(trace, config, 3)[0], reference(config, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pooling", "parallel"), [(None, {}), ("mean", {"tensor": 2}), ("mean", {"zero_stage": 3})]
)
def test_encoders_with_a_memory_equal_one_process(world, tasks, pooling, parallel) -> None:
    """Of a chunk or of several, as the longest sequence of a replica's micro batch has it."""
    temporal = {"chunk_length": 12, "num_slots": 3, "pooling": pooling}
    config = task_config(
        tasks, "listops", {**SEQUENCE, "pooling": "mean"}, temporal=temporal, parallel=parallel,
        model={**ENCODER, **DROPOUT}, train={"micro_batch_size": 1},
    )  # fmt: skip
    compare(world(2).run(trace, config, 3)[0], reference(config, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recurrence", "model", "parallel"),
    [
        ({"kind": "universal", "depth": 4, "halting": {"mode": "global"}}, GUT, {}),
        ({"kind": "universal", "depth": 4, "halting": {"mode": "token"}}, GUT, {"tensor": 2}),
        ({"kind": "ring", "depth": 3, "level_rank": 4}, {"norm_position": "post"}, {"tensor": 2}),
        ({"kind": "cycle", "num_blocks": 1, "depth": 3},
         {"norm_position": "post", "residual": "admin"}, {"zero_stage": 1}),
    ],
)  # fmt: skip
def test_encoders_of_other_systems_equal_one_process(
    world, tasks, recurrence, model, parallel
) -> None:
    config = task_config(
        tasks, "listops", SEQUENCE, recurrence=recurrence, model={**ENCODER, **model},
        parallel=parallel,
    )  # fmt: skip
    compare(world(2).run(trace, config, 3)[0], reference(config, 3))


def test_recompute_and_other_maps(tasks) -> None:
    """Every parameter is trained, in every scheme, and with recompute alike."""
    for scheme in ("loop", "custom"):
        config = task_config(tasks, "listops", SEQUENCE, scheme, model=ENCODER)
        found = trace(config, 2)
        assert all(bool(g.abs().sum() > 0) for g in found[0][1].values())
        again = task_config(
            tasks, "listops", SEQUENCE, scheme, model=ENCODER, train={"recompute": True}
        )
        compare(trace(again, 2), found)


# ----------------------------------------------------------------------- padding and neighbours


@pytest.mark.parametrize(
    ("name", "task", "model"),
    [
        ("listops", {**SEQUENCE, "pooling": "mean"}, ENCODER),
        ("logic", PAIR, {**ENCODER, "positions": "learned"}),
        ("flip_flop", TOKEN, {"positions": "alibi"}),
        later("listops", SEQUENCE, {}),
        later("listops", {**SEQUENCE, "augment": False, "pooling": "first"}, ENCODER),
    ],
)
def test_padding_and_neighbours_change_nothing(tasks, name, task, model) -> None:
    """A sample alone, among others, and among others padded further: the same logits; and the same
    gradients for any micro batch size."""
    config = task_config(tasks, name, task, model=model, train={"precision": "fp64"})
    config = open_data(config, Mesh()).config
    network = Transformer(config)
    corpus = TaskCorpus(tasks / name / "train")

    def logits(numbers: list[int], multiple: int = 1) -> torch.Tensor:
        ids = np.array(numbers)
        batch = collate(
            [(corpus, n) for n in numbers], ids, ids * 0, config.task, config.data.seq_length,
            multiple,
        )  # fmt: skip
        ctx = network.context(batch, 0, training=False)
        x = network.embed(batch.tokens_BS, ctx)
        x, _ = network.run(layer_map(config.recurrence), x, ctx, {})
        classes = network.readout.class_logits(x, batch)
        return classes.view(len(numbers), -1, classes.shape[-1]) if len(numbers) else classes

    together, wide = logits([0, 1, 2, 3]), logits([0, 1, 2, 3], config.num_positions)
    assert together.abs().max() > 1e-3
    for number in range(4):
        alone = logits([number])
        length = alone.shape[1]
        torch.testing.assert_close(alone[0], together[number, :length], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(alone[0], wide[number, :length], rtol=1e-11, atol=1e-13)
    traces = [
        trace(task_config(tasks, name, task, model={**model, **DROPOUT},
                          train={"precision": "fp64", "micro_batch_size": size}), 2)
        for size in (1, 8)
    ]  # fmt: skip
    compare(*traces, 1e-11, 1e-11)


def test_one_logit_is_binary_cross_entropy(tasks) -> None:
    config = open_data(task_config(tasks, "flip_flop", TOKEN, train={"precision": "fp64"}), Mesh())
    network, batch = Transformer(config.config), config.loader.batch(0)[0]
    ctx = network.context(batch, 0, training=False)
    x = network.embed(batch.tokens_BS, ctx)
    x, _ = network.run(layer_map(config.config.recurrence), x, ctx, {})
    logit = network.readout.class_logits(x, batch)[:, 1]
    counted = batch.labels_BS.flatten() >= 0
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logit[counted], batch.labels_BS.flatten()[counted].double(), reduction="sum"
    )
    torch.testing.assert_close(network.loss(x, batch)["loss"].total, expected)


# ---------------------------------------------------------------------------------------- data


def test_the_order_is_a_function_of_seed_epoch_and_position(tasks) -> None:
    """Every sample once an epoch; the same ones for any number of replicas, from any step on."""
    corpora = [(TaskCorpus(tasks / "listops/train"), 1.0)]

    def loader(rank: int, size: int, micro: int) -> TaskLoader:
        return TaskLoader(
            corpora, TaskConfig(**SEQUENCE), seq_length=28, global_batch_size=8,
            micro_batch_size=micro, dp_rank=rank, dp_size=size, seed=3,
        )  # fmt: skip

    def rows(loader: TaskLoader, step: int) -> list[tuple[tuple[int, ...], int, int]]:
        return [
            (tuple(t[d >= 0].tolist()), int(label), int(number))
            for batch in loader.batch(step)
            for t, d, label, number in zip(
                batch.tokens_BS, batch.documents_BS, batch.labels_BS, batch.sample_ids_B,
                strict=True,
            )
        ]  # fmt: skip

    alone = loader(0, 1, 8)
    epoch = [row[:2] for step in range(50) for row in rows(alone, step)]
    assert len(set(epoch)) == 400
    assert sorted(epoch) == sorted(row[:2] for s in range(50, 100) for row in rows(alone, s))
    assert epoch != [row[:2] for s in range(50, 100) for row in rows(alone, s)]
    for step in (0, 7, 60):
        both = rows(loader(0, 2, 2), step) + rows(loader(1, 2, 2), step)
        assert both == rows(alone, step)
    state = alone.state(60)
    loader(0, 2, 2).check_state(state)
    assert state["samples"] == 480


def test_truncation(tasks) -> None:
    short = {"seq_length": 12}
    with pytest.raises(
        DataError, match=r"train: its longest sequence has 28 tokens(.|\n)*val: its"
    ):
        open_data(task_config(tasks, "listops", SEQUENCE, data=short), Mesh())
    task = {**SEQUENCE, "truncate": True}
    batch = open_data(task_config(tasks, "listops", task, data=short), Mesh()).loader.batch(0)[0]
    assert batch.tokens_BS.shape[1] <= 14 and batch.lengths_N.max() <= 12


def test_mixtures(tasks) -> None:
    sources = [{"path": f"{tasks}/flip_flop/{s}", "weight": w}
               for s, w in (("train", 3.0), ("test_0.1x12", 1.0))]  # fmt: skip
    config = task_config(tasks, "flip_flop", TOKEN, data={"train": sources})
    batches = open_data(config, Mesh()).loader.batch(0)
    counts = torch.cat([batch.sources_B for batch in batches]).bincount()
    assert counts.tolist() == [6, 2]
    trace(config, 1)


# ----------------------------------------------------------------------------------- whole runs


def test_resume_is_bit_identical(tasks, tmp_path) -> None:
    rows = {}
    for name, stops in (("straight", [4]), ("resumed", [2, 4])):
        for steps in stops:
            config = task_config(
                tasks, "listops", SEQUENCE, run_dir=str(tmp_path / name), model=ENCODER,
                train={"steps": steps, "eval_every": 2},
            )  # fmt: skip
            assert train(config) == FINISHED
        found = read_rows(tmp_path / name / "metrics.jsonl")
        rows[name] = [
            {k: v for k, v in row.items() if not k.startswith(("speed/", "memory/", "save/"))}
            for row in found if row["step"] in (3, 4)
        ]  # fmt: skip
    keys = ("train/loss", "val/loss", "val/accuracy", "optim/grad_norm")
    for key in keys:
        values = {n: [row[key] for row in found if key in row] for n, found in rows.items()}
        assert values["straight"] and values["straight"] == values["resumed"], key


@pytest.mark.parametrize("name", ["flip_flop", later("listops")])
def test_a_tiny_model_learns(tasks, tmp_path, name) -> None:
    """Better than always the largest class, and the metrics say how much better, by length too."""
    if name == "listops":
        prepare_task(
            TaskRequest("listops", train=240, val=100, max_depth=2, max_args=2, min_length=4,
                        seed=2), tmp_path / name,
        )  # fmt: skip
    else:
        prepare_task(
            TaskRequest("flip_flop", train=600, val=100, length=16, p_ignore=0.3), tmp_path / name
        )
    task, model = (SEQUENCE, ENCODER) if name == "listops" else (TOKEN, {})
    # Trees learn at 1e-3 on any machine; at 4e-3 rounding decides whether they do.
    steps, rate = (250, 1e-3) if name == "listops" else (80, 4e-3)
    run = tmp_path / "run"
    config = task_config(
        tmp_path, name, task, run_dir=str(run), model=model,
        data={"seq_length": 16}, optimizer={"lr": rate, "clip_norm": 1.0},
        train={"steps": steps, "global_batch_size": 32, "micro_batch_size": 32, "log_every": 50},
    )  # fmt: skip
    assert train(config) == FINISHED
    counts = TaskCorpus(tmp_path / name / "val").manifest.task["of_classes"]
    values = [row for row in read_rows(run / "metrics.jsonl") if "val/accuracy" in row][-1]
    assert values["val/accuracy"] > max(counts) / sum(counts) + 0.1
    if name == "flip_flop":
        assert values["val/glitch_rate"] == pytest.approx(1 - values["val/accuracy"])
        assert values["val/last_accuracy"] > 0.6
    assert any(key.startswith("val/accuracy_by_length/") for key in values)


def test_commands_on_a_run_that_classifies(tasks, tmp_path, capsys, monkeypatch) -> None:
    """`eval` tells its accuracy; it neither writes nor is exported."""
    run = tmp_path / "run"
    config = task_config(
        tasks, "listops", SEQUENCE, run_dir=str(run), model=ENCODER, train={"steps": 1}
    )
    assert train(config) == FINISHED

    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["megarecur", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    capsys.readouterr()
    code, out, _ = command("eval", run)
    row = [row for row in read_rows(run / "metrics.jsonl") if "val/accuracy" in row][-1]
    assert code == 0 and f"accuracy {row['val/accuracy']:.4f}  (60 predictions, step 1)" in out
    assert "tokens: accuracy" in out
    for words, text in (
        (("generate", run, "[MAX 1 2 ]"), "task: the run is a classifier"),
        (("export", run, tmp_path / "out", "--to", "hf", "--unrolled"), "has its head; --compact"),
        (("eval", run, "--data", tasks / "logic/val"), "made with another tokenizer"),
        (("prep", "task", "lisops", "--out", tmp_path / "x"), "choose one of listops, logic"),
    ):
        code, _, error = command(*words)
        assert code == 2 and text in error and "Traceback" not in error


def test_scores_by_hand(tasks) -> None:
    """Against a loop over single samples, and the same over replicas' cuts and maxima."""
    config = task_config(tasks, "flip_flop", TOKEN)
    config = open_data(config, Mesh()).config
    network, corpus = Transformer(config), TaskCorpus(tasks / "flip_flop/test_0.1x12")
    score = evaluate_corpus(network, corpus, config, Mesh(), 0)
    right = scored = last = 0
    for number in range(corpus.num_samples):
        zero = np.zeros(1, np.int64)
        batch = collate([(corpus, number)], zero, zero, config.task, 16)
        ctx = network.context(batch, 0, training=False)
        x = network.embed(batch.tokens_BS, ctx)
        x, _ = network.run(layer_map(config.recurrence), x, ctx, {})
        guesses = (network.readout.class_logits(x, batch)[:, 1] > 0).long()
        asked = batch.labels_BS[0] >= 0
        hits = guesses[asked] == batch.labels_BS[0][asked]
        right, scored, last = right + int(hits.sum()), scored + len(hits), last + int(hits[-1])
    assert (score.right, score.scored, score.last_right, score.samples) == (right, scored, last, 20)
    assert score.by_length[4] == (right, scored)
    some = evaluate_corpus(network, corpus, config, Mesh(), 5)
    assert some.samples == 5


def make_batch(labels: list[int], sides: int = 1, **tensors: torch.Tensor) -> TaskBatch:
    """A batch of samples with these labels; -100 stands for a missing sample."""
    labels_N1, rows = torch.tensor(labels)[:, None], len(labels) * sides
    tokens_BS = tensors.pop("tokens_BS", torch.zeros(rows, 4, dtype=torch.long))
    return TaskBatch(
        tokens_BS, labels_N1, torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS),
        torch.zeros_like(tokens_BS), torch.arange(rows), torch.zeros(len(labels), dtype=torch.long),
        True, lengths_N=torch.full((len(labels),), 4), scored=labels_N1 != -100, **tensors,
    )  # fmt: skip


def test_sums_by_class_by_hand() -> None:
    """Against loops over samples; missing ones are left out, and the order makes no difference."""
    generator = torch.Generator().manual_seed(3)
    logits = 3.0 * torch.randn(200, 8, generator=generator)
    labels = torch.randint(8, (200,), generator=generator)
    labels[::9] = -100
    steps = 5.0 * torch.rand(200, generator=generator)
    flat = torch.zeros(ClassSums.size(8), dtype=torch.float64)
    turned = torch.zeros_like(flat)
    for sums, order in ((flat, range(0, 200, 25)), (turned, range(175, -1, -25))):
        for first in order:
            part = slice(first, first + 25)
            batch = make_batch(labels[part].tolist())
            ClassSums.over(sums, 8).add(logits[part], batch, steps[part])
    assert torch.equal(flat, turned)
    score = ClassSums.over(flat, 8).score([f"c{n}" for n in range(8)])
    confusion, top, bins = np.zeros((8, 8), int), 0, np.zeros((3, BINS))
    for row, label in zip(logits.double().numpy(), labels.tolist(), strict=True):
        if label < 0:
            continue
        shares = np.exp(row) / np.exp(row).sum()
        confusion[label, row.argmax()] += 1
        top += label in np.argsort(-row)[:5]
        place = int(np.ceil(shares.max() * BINS)) - 1
        bins[:, place] += 1, row.argmax() == label, shares.max()
    assert (score.confusion == confusion).all() and score.in_top == top
    samples, right, confidence = bins
    taken = samples > 0
    error = np.abs(right[taken] / samples[taken] - confidence[taken] / samples[taken])
    expected = (error * samples[taken] / samples.sum()).sum()
    assert score.calibration_error == pytest.approx(expected, abs=1e-6)
    assert score.values["top5_accuracy"] == top / samples.sum()
    for number in range(8):
        own = labels == number
        assert score.mean_steps is not None
        assert score.mean_steps[number] == pytest.approx(steps[own].mean().item(), abs=1e-5)
        assert score.accuracies[number] == confusion[number, number] / own.sum().item()
    both = score + score
    assert (both.confusion == 2 * confusion).all()
    assert both.calibration_error == pytest.approx(score.calibration_error)
    assert len(score.table()) == 9 and "c7" in score.table()[-1]
    json.dumps(score.describe())
    many = replace(
        score, classes=tuple(f"n{n}" for n in range(50)), steps=None,
        confusion=np.diag(np.arange(50)) + np.eye(50, k=1, dtype=int),
    )  # fmt: skip
    assert many.table()[0].endswith("(the lowest of 50)") and len(many.table()) == 41
    assert many.table()[1].split() == ["n0", "1", "0.0000"]
    assert many.table()[2].split() == ["n1", "2", "0.5000"]


def test_extreme_samples_by_hand() -> None:
    """The most confident mistakes and the steps of pictures, of pairs and of grey sequences."""
    logits = torch.tensor([[4.0, 0.0], [1.0, 0.0], [0.0, 3.0], [9.0, 0.0], [0.0, 9.0]])
    labels, steps = [1, 1, 1, -100, 0], torch.tensor([1.0, 2.0, 5.0, 9.0, 3.0])
    pixels = torch.rand(5, 3, 4, 4)
    found = Extremes(most=2)
    found.add(logits, make_batch(labels, pixels_BCHW=pixels), steps)
    assert [shown.number for shown in found.mistakes] == [4, 0]
    assert [shown.number for shown in found.slowest] == [2, 4]
    assert [shown.number for shown in found.fastest] == [0, 1]
    worst = found.mistakes[0]
    assert (worst.label, worst.predicted) == (0, 1) and worst.pixels_CHW is not None
    assert np.array_equal(worst.pixels_CHW, pixels[4].numpy())
    assert worst.confidence == pytest.approx(1 / (1 + np.exp(-9.0)))
    pairs = Extremes()
    pairs.add(logits[:2], make_batch([0, 1], sides=2), torch.tensor([1.0, 3.0, 2.0, 2.5]))
    assert [(shown.number, shown.steps) for shown in pairs.slowest] == [(1, 2.25), (0, 2.0)]
    assert pairs.slowest[0].pixels_CHW is None
    grey = torch.tensor([[-1, 2, 257, 4, 5, -2], [2, 2, 2, 2, 2, 2]])
    sequences = Extremes(first_grey=2)
    sequences.add(logits[:2], make_batch([1, 1], tokens_BS=grey), None)
    first, second = sequences.mistakes
    assert first.pixels_CHW is not None and second.pixels_CHW is None
    assert (first.pixels_CHW * 255).round().tolist() == [[[0, 255], [2, 3]]]


def halting_config(tasks: Path, mode: str = "token", **sections: Any) -> Config:
    """A pair task whose samples halt at different steps."""
    recurrence = {"kind": "universal", "depth": 4, "halting": {"mode": mode, "threshold": 0.9}}
    return task_config(tasks, "logic", PAIR, recurrence=recurrence, model=ENCODER, **sections)


def unsettle(model: Transformer) -> None:
    """Let tokens halt at different steps."""
    for name in ("up", "down"):
        weight = model.parameters_by_name[f"blocks.0.halting.{name}.weight"].data
        weight.copy_(20.0 * torch.sin(torch.arange(weight.numel()) * 0.7).view_as(weight))
    model.refresh()


def score_on_mesh(config: Config, corpus: Path) -> tuple[Any, ...]:
    """The sums of an evaluation on this mesh."""
    config, model, _, mesh, _ = build_on_mesh(config)
    unsettle(model)
    score = evaluate_corpus(model, TaskCorpus(corpus), config, mesh, 37)
    by_class = score.by_class
    assert by_class is not None and by_class.steps is not None
    arrays = by_class.confusion, by_class.bins, by_class.steps
    return score.samples, by_class.in_top, *(array.tolist() for array in arrays)


@pytest.mark.parametrize("parallel", [{}, later({"tensor": 2})])
def test_scores_by_class_are_the_same_on_two_ranks(world, tasks, parallel) -> None:
    """To the last bit, where the ranks have other samples; also where the last ones are missing."""
    corpus = tasks / "logic/val"
    config = halting_config(tasks, train={"precision": "fp64"})
    alone = score_on_mesh(config, corpus)
    on_two = halting_config(tasks, train={"precision": "fp64"}, parallel=parallel)
    for found in world(2).run(score_on_mesh, on_two, corpus):
        assert found == alone
    samples, _, confusion, bins, steps = alone
    assert samples % 2 and samples == sum(map(sum, confusion)) == sum(bins[0])
    means = [total / max(sum(row), 1) for total, row in zip(steps, confusion, strict=True)]
    assert len({round(mean, 3) for mean in means}) > 2


def test_steps_of_samples_are_those_of_their_tokens(tasks) -> None:
    """Alone and in a batch, in one piece and in chunks of a temporal memory."""
    temporal = {"chunk_length": 6, "num_slots": 3}
    for sections in ({}, {"mode": "global", "temporal": temporal}):
        config = open_data(halting_config(tasks, **sections), Mesh()).config
        network, corpus = Transformer(config), TaskCorpus(tasks / "logic/train")
        unsettle(network)
        ids = np.arange(4)

        def steps(numbers: Any, config=config, network=network, corpus=corpus) -> torch.Tensor:
            batch = collate(
                [(corpus, int(n)) for n in numbers], numbers, numbers * 0, config.task,
                config.data.seq_length,
            )  # fmt: skip
            ctx = network.context(batch, 0, training=False)
            with torch.no_grad():
                x = network.embed(batch.tokens_BS, ctx)
                network.run(layer_map(config.recurrence), x, ctx, {})
            taken, tokens = torch.stack(ctx.recorder.taken).sum(0).unbind(1)
            assert torch.equal(tokens, (batch.documents_BS >= 0).sum(1))
            by_steps = torch.stack(ctx.recorder.counts).sum(0)[:-2]
            assert (by_steps * torch.arange(len(by_steps))).sum() == taken.sum()
            return taken

        together = steps(ids)
        assert len(set(together.tolist())) > 1
        assert torch.equal(torch.cat([steps(ids[n : n + 1]) for n in ids]), together)


def test_a_classifier_is_drawn(tmp_path, capsys, monkeypatch) -> None:
    """`eval --draw` writes scores and pictures of grey sequences, mistakes and steps among them."""
    rng = np.random.default_rng(0)
    pictures = [(rng.integers(0, 256, (6, 6), np.uint8), n % 6) for n in range(36)]
    classes = [f"kind {n}" for n in range(6)]
    parts = {"train": lambda: pictures, "val": lambda: pictures[:30]}
    prepare_pixels(tmp_path / "listops", parts, classes, "stamp")
    recurrence = {"kind": "universal", "depth": 3, "halting": {"mode": "global"}}
    run, folder = tmp_path / "run", tmp_path / "scores"
    config = task_config(
        tmp_path, "listops", {**SEQUENCE, "num_classes": 6}, run_dir=str(run), model=ENCODER,
        recurrence=recurrence, data={"seq_length": 36}, train={"steps": 1, "eval_every": 1},
    )  # fmt: skip
    assert train(config) == FINISHED
    (row,) = (row for row in read_rows(run / "metrics.jsonl") if "val/accuracy" in row)

    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["megarecur", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    capsys.readouterr()
    code, out, _ = command("eval", run, "--draw", folder)
    assert code == 0 and "kind 5" in out and "calibration error" in out
    names = ["confusion.png", "mistakes.png", "scores.json", "steps.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    values = json.loads((folder / "scores.json").read_text())
    assert np.array(values["confusion"]).sum() == values["samples"] == 30
    for name in ("accuracy", "calibration_error", "top5_accuracy", "halting_depth"):
        assert values[name] == pytest.approx(row[f"val/{name}"], abs=1e-9), name
    depth = sum(entry["steps"] * entry["samples"] for entry in values["classes"]) / 30
    assert depth == pytest.approx(values["halting_depth"])
    code, _, error = command("eval", run, "--draw", tmp_path / "scores.png")
    assert code == 2 and "a run with a task writes several files; name a folder" in error


# ------------------------------------------------------------------------------------ refusals


def test_configs_that_cannot_be(tasks) -> None:
    teacher = {"teacher": "x"}
    for task, sections, text in (
        (None, {"model": ENCODER}, "model.causal=false sees the next token"),
        (SEQUENCE, {"exits": {}, "distill": teacher}, "exits are for runs that predict text"),
        (SEQUENCE, {"exits": {}, "distill": teacher}, "distill is for runs that predict text"),
        (SEQUENCE, {"train": {"sample_prompts": ["a"]}}, "a classifier writes no text"),
        ({**PAIR, "num_classes": 1}, {}, "num_classes=1 must be at least 2"),
        ({"kind": "pair", "targets": "next_token"}, {}, "targets=next_token is for kind=token"),
        ({**TOKEN, "augment": True}, {}, "leave augment and pooling out"),
        (
            {"kind": "token", "targets": "next_token"},
            {"model": ENCODER},
            "task.targets=next_token asks for",
        ),
        (
            SEQUENCE,
            {"model": {"positions": "learned", "max_positions": 28}},
            "with a task's START and END",
        ),
        (SEQUENCE, {"data": {"mask_documents": False}}, "samples never read each other"),
    ):
        with pytest.raises(ConfigError) as caught:
            task_config(tasks, "listops", task, **sections)
        assert text in str(caught.value), caught.value


def test_corpora_that_do_not_fit(tasks, corpus) -> None:
    with pytest.raises(DataError) as caught:
        open_data(task_config(tasks, "listops", {**PAIR, "num_classes": 9}), Mesh())
    for text in (
        "kind sequence, but task.kind=pair",
        "has 10 classes",
        "task.num_classes=9; set it to",
    ):
        assert text in str(caught.value)
    data = {"train": [{"path": f"{corpus}/train"}], "val": [], "tokenizer": "bytes"}
    with pytest.raises(DataError, match="text without labels"):
        open_data(task_config(tasks, "listops", SEQUENCE, data=data), Mesh())
    with pytest.raises(DataError, match="train: its labels are tokens that follow"):
        open_data(task_config(tasks, "flip_flop", TOKEN, model=ENCODER), Mesh())


def test_costs_count_the_head(tasks) -> None:
    config = open_data(task_config(tasks, "logic", PAIR, model=ENCODER), Mesh()).config
    inventory = build_inventory(config)
    assert inventory["task.hidden.weight"].shape == (32, 128) and "head.weight" not in inventory
    total = sum(p.numel() for p in Transformer(config).parameters())
    assert count_parameters(config).total == total
    steps: LayerMap = layer_map(config.recurrence)
    body = count_flops(config.model_copy(update={"task": None}), steps)
    vocabulary = 2 * config.model.vocab_size * 32
    head = 2 * (32 * 128 + 7 * 32) // config.tokens_per_sample
    assert count_flops(config, steps).forward == body.forward - vocabulary + head
    assert estimate_memory(config, steps).parameters == 4 * total
    assert count_logits(config, 3 * config.tokens_per_sample) == 3 * 7


def test_the_first_samples_are_those_of_the_first_step(tasks) -> None:
    """What residual scales are profiled on: padded, with their ends."""
    config = task_config(tasks, "listops", SEQUENCE, model=ENCODER, train={"micro_batch_size": 8})
    loader = open_data(config, Mesh()).loader
    (batch,) = loader.batch(0)
    first = loader.first_samples(8)
    for name in ("tokens_BS", "labels_BS", "documents_BS"):
        assert torch.equal(getattr(first, name), getattr(batch, name)), name
    assert (first.documents_BS < 0).any()


def test_a_classifier_may_read_the_memory(tasks) -> None:
    temporal = {"chunk_length": 8, "num_slots": 3, "pooling": "mean"}
    config = task_config(tasks, "listops", {**SEQUENCE, "pooling": "mean"}, model=ENCODER,
                         temporal=temporal)  # fmt: skip
    gradients = trace(config, 1)[0][1]
    assert gradients["temporal.norm.weight"].norm() > 0
    assert gradients["task.output.weight"].norm() > 0
