"""Dynamic halting: the mixture, its limits, skipping, and every mesh."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.engines import recorded
from support.harness import assert_gradients_close, compare
from support.meshes import build_on_mesh, config_of, later, reference, step_of, trace
from support.models import VOCABULARY, Batch, build, gradients, make_batch, make_model_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from megarecur.attention.documents import count_documents
from megarecur.config.load import validate
from megarecur.config.recurrence import HaltingConfig
from megarecur.config.run import Config
from megarecur.data.open import open_data
from megarecur.errors import ConfigError
from megarecur.inference.generate import generate
from megarecur.model.block import Block
from megarecur.model.context import build_context
from megarecur.model.halting import Mixture
from megarecur.model.transformer import Transformer
from megarecur.parallel.loss import LossTerm
from megarecur.parallel.mesh import Mesh
from megarecur.plan.cost import count_flops, count_head_flops, count_parameters
from megarecur.recurrence.schemes import layer_map
from megarecur.train.metrics import read_rows
from megarecur.train.report import Interval, StepResult, name_counts
from megarecur.train.step import objective
from megarecur.train.trainer import FINISHED, train

DEPTH = 6
UT = {"positions": "xpos", "norm": "layer", "feed_forward": "gelu", "feed_forward_bias": True}
GUT = {**UT, "gate": True}
MODES = [("global", True), ("global", False), ("token", True)]
"""(mode, causal)"""


def universal(mode: str, depth: int = DEPTH, **halting: Any) -> dict[str, Any]:
    return {"kind": "universal", "depth": depth, "halting": {"mode": mode, **halting}}


def halting_model(
    mode: str, causal: bool = True, precision: str = "fp64", recompute: bool = False, **halting: Any
) -> Transformer:
    """One whose tokens halt after different numbers of steps."""
    model = build(
        make_model_config(universal(mode, **halting), precision, recompute, causal=causal, **GUT)
    )
    scale(model, 30.0, 0.5)
    return model


def scale(model: Transformer, factor: float, shift: float) -> None:
    """Let the head's logits vary by factor around shift."""
    model.parameters_by_name["blocks.0.halting.down.weight"].data.mul_(factor)
    model.parameters_by_name["blocks.0.halting.down.bias"].data.fill_(shift)
    model.refresh()


def settle(model: Transformer, logit: float) -> None:
    """The head says the same everywhere."""
    scale(model, 0.0, logit)


def forward(
    model: Transformer, batch: Batch, training: bool = False
) -> tuple[Tensor, LossTerm, Tensor]:
    """(what leaves the map, the term of halting, its counts)"""
    ctx = model.context(batch, 0, training=training)
    with torch.set_grad_enabled(training):
        x = model.embed(batch.tokens_BS, ctx)
        x, terms = model.run(layer_map(model.config.recurrence), x, ctx, {})
    return x, terms["halting"], ctx.recorder.counts[0]


def backward(model: Transformer, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """(what leaves the map, gradients of an objective of all there is)"""
    x, term, _ = forward(model, batch, training=True)
    for parameter in model.parameters():
        parameter.grad = None
    weights = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)
    (model.loss(x, batch)["loss"].total + term.weight * term.total + (x * weights).sum()).backward()
    return x.detach(), gradients(model)


def padded(lengths: Sequence[int] = (7, 4, 1, 5)) -> Batch:
    """Samples of different lengths."""
    batch = make_batch(len(lengths), max(lengths))
    places = torch.arange(max(lengths))[None]
    documents = torch.where(places < torch.tensor(lengths)[:, None], 0, -1)
    labels = torch.where(documents < 0, -100, batch.labels_BS)
    return replace(batch, documents_BS=documents, labels_BS=labels, single_document=False)


def cut(batch: Batch, row: int, columns: slice) -> Batch:
    """A part of one sample, as a sample of its own."""
    one = batch.rows(row, row + 1)
    parts = {n: v[:, columns] for n, v in vars(one).items() if n.endswith("_BS")}
    length = parts["tokens_BS"].shape[1]
    parts["positions_BS"] = torch.arange(length)[None]
    return replace(one, **parts, single_document=True)


# ------------------------------------------------------------------------------------ its limits


@pytest.mark.parametrize(
    ("mode", "causal", "options"),
    [
        *((*case, {}) for case in MODES),
        ("token", True, {"level_encoding": "sinusoidal"}),
        ("token", True, {"sliding_window": 3}),
    ],
)
def test_a_head_that_never_stops_is_fixed_depth(
    mode: str, causal: bool, options: dict[str, Any]
) -> None:
    """Also: the threshold is never reached."""
    options = {**GUT, **options}
    model = build(make_model_config(universal(mode), causal=causal, **options))
    settle(model, -1e4)
    batch = make_batch(2, 7)
    x, term, counts = forward(model, batch)
    fixed = build(make_model_config(universal("none"), causal=causal, **options))
    for name, parameter in fixed.parameters_by_name.items():
        parameter.data.copy_(model.parameters_by_name[name].data)
    fixed.refresh()
    ctx = fixed.context(batch, 0, training=False)
    expected, terms = fixed.run(
        layer_map(fixed.config.recurrence), fixed.embed(batch.tokens_BS, ctx), ctx, {}
    )
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)
    assert not terms and term.denominator == "documents"
    assert float(term.total) == pytest.approx(2 * DEPTH) and term.weight == 0.1
    assert counts[DEPTH] == 14 and counts[-2] == counts[-1] == 2 * 7 * DEPTH


@pytest.mark.parametrize(("mode", "causal"), MODES)
def test_a_head_that_stops_at_once_gives_the_embedding_at_no_cost(mode: str, causal: bool) -> None:
    model, batch = halting_model(mode, causal), make_batch(2, 7)
    settle(model, 1e4)
    x, term, counts = forward(model, batch)
    ctx = model.context(batch, 0, training=False)
    torch.testing.assert_close(x, model.embed(batch.tokens_BS, ctx), rtol=0, atol=0)
    assert float(term.total) == 0.0
    assert counts[0] == 14 and counts[-2] == 14  # one step was computed, and thrown away


def test_cost_of_even_odds_tends_to_two() -> None:
    model, batch = halting_model("global", threshold=1.0), make_batch(2, 15)
    settle(model, 0.0)
    assert float(forward(model, batch)[1].total) / 2 == pytest.approx(2.0, abs=0.04)


def test_no_more_steps_than_tokens_and_one() -> None:
    model = halting_model("global", False)
    settle(model, -1e4)
    _, term, counts = forward(model, padded((7, 4, 1, 5)))
    assert counts[:-2].tolist() == [0, 0, 1, 0, 0, 4, 7 + 5]  # 1 token: 2 steps; 4: 5; others 6
    assert float(term.total) == pytest.approx(6 + 5 + 2 + 6)
    assert counts[-2] == 7 * (4 + 4 + 3 + 3 + 3 + 2)  # who may not go on is not computed


class Hazards:
    """A head that says what it is told, step after step."""

    def __init__(self, p_LBS: Tensor) -> None:
        self.p_LBS, self.step = p_LBS, 0

    def __call__(self, z: Tensor) -> Tensor:
        self.step += 1
        return self.p_LBS[self.step - 1]


def test_the_mixture_is_the_mean_over_random_stopping_times() -> None:
    """States are unit vectors, so that the mixture is its weights: they add up to one, and are how
    often a walk that stops with those probabilities stops there."""
    steps, batch, length = 5, 2, 6
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(steps, batch, length, generator=generator, dtype=torch.float64) ** 2
    states = torch.eye(steps + 1, dtype=torch.float64)[:, None, None].expand(-1, batch, length, -1)
    model = make_model_config(universal("token"), **UT).model
    ctx = build_context(model, torch.arange(length).expand(batch, length), torch.float64)
    config = HaltingConfig(mode="token", threshold=0.97)
    mixture = Mixture(config, Hazards(p), states[0], ctx.positions, True, steps)  # type: ignore[arg-type]
    for step in range(steps):
        mixture.begin_step()
        mixture.advance(states[step + 1])
    o, cost, _ = mixture.finish()
    torch.testing.assert_close(o.sum(-1), torch.ones(batch, length, dtype=torch.float64))
    trials = 40_000
    draws = torch.rand(trials, steps, batch, length, generator=generator, dtype=torch.float64)
    stops = torch.cat([draws < p, torch.ones(trials, 1, batch, length, dtype=torch.bool)], 1)
    stopped_at = stops.int().argmax(1)
    # Whoever has not stopped when steps end to be accepted is where the last one led.
    last = mixture.taken
    found = torch.nn.functional.one_hot(torch.minimum(stopped_at, last), steps + 1)
    torch.testing.assert_close(found.double().mean(0), o, rtol=0, atol=0.02)
    assert 0 < int((last < steps).sum()) < last.numel()
    paid = torch.minimum(stopped_at + 1, last).double().mean((0, 2)).sum()
    assert float(cost) == pytest.approx(float(paid), rel=0.02)


def test_a_head_learns_though_no_threshold_is_reached() -> None:
    model = halting_model("global", threshold=1.0, coefficient=0.0)
    scale(model, 0.1, -3.0)
    batch = make_batch(2, 7)
    _, _, counts = forward(model, batch)
    assert counts[DEPTH] == 14
    _, found = backward(model, batch)
    for name, gradient in found.items():
        if ".halting." in name:
            assert gradient.norm() > 1e-6, name


# ---------------------------------------------------------------------- who may know of what


@pytest.mark.parametrize(("mode", "causal"), [*MODES, ("token", False)])
def test_neighbours_padding_and_packing_do_not_matter(mode: str, causal: bool) -> None:
    """Samples beside slow ones, and documents beside others in a sample, are as they are alone."""
    model, batch = halting_model(mode, causal), padded((7, 4, 1, 5))
    x, term, counts = forward(model, batch)
    assert (counts[:-2] > 0).sum() > 2  # they do differ
    total = 0.0
    for row, length in enumerate((7, 4, 1, 5)):
        alone, own, _ = forward(model, cut(batch, row, slice(length)))
        torch.testing.assert_close(x[row, :length], alone[0], rtol=1e-10, atol=1e-10)
        total += float(own.total)
    assert float(term.total) == pytest.approx(total, rel=1e-10)
    assert count_documents(batch.documents_BS) == 4
    packed = replace(
        make_batch(1, 7),
        documents_BS=torch.tensor([[0, 0, 0, 0, 3, 3, -1]]),
        positions_BS=torch.tensor([[0, 1, 2, 3, 0, 1, 0]]),
        single_document=False,
    )
    x, term, _ = forward(model, packed)
    parts = [forward(model, cut(packed, 0, part)) for part in (slice(0, 4), slice(4, 6))]
    both = torch.cat([part[0] for part in parts], 1)
    torch.testing.assert_close(x[:, :6], both, rtol=1e-10, atol=1e-10)
    assert float(term.total) == pytest.approx(sum(float(p[1].total) for p in parts), rel=1e-10)
    assert count_documents(packed.documents_BS) == 2


@pytest.mark.parametrize("mode", ["global", "token"])
def test_causal_models_do_not_look_ahead(mode: str) -> None:
    model, batch = halting_model(mode), make_batch(3, 9)
    tokens = batch.tokens_BS.clone()
    tokens[:, 5] = (tokens[:, 5] + 1) % VOCABULARY
    x, changed = (forward(model, b)[0] for b in (batch, replace(batch, tokens_BS=tokens)))
    torch.testing.assert_close(x[:, :5], changed[:, :5], rtol=1e-12, atol=1e-12)
    assert ((x - changed).abs().amax((0, 2))[5:] > 1e-6).all()


@pytest.mark.parametrize("mode", ["global", "token"])
def test_a_text_begins_the_same_however_it_goes_on(mode: str) -> None:
    """Also where it is shorter than the steps are many."""
    model, batch = halting_model(mode), make_batch(3, 9)
    settle(model, -4.0)
    x = forward(model, batch)[0]
    for length in (1, 2, 4):
        start = replace(batch, **{name: value[:, :length] for name, value in vars(batch).items()
                                  if isinstance(value, Tensor) and value.ndim == 2})  # fmt: skip
        found = forward(model, start)[0]
        torch.testing.assert_close(found, x[:, :length], rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------- skipping


@pytest.mark.parametrize(
    ("mode", "causal", "precision", "tol"),
    [(*mode, "fp64", 1e-11) for mode in MODES] + [(*mode, "fp32", 1e-6) for mode in MODES],
)
def test_skipping_changes_no_output_and_no_gradient(mode, causal, precision, tol) -> None:
    model = halting_model(mode, causal, precision)
    batch = padded((7, 4, 1, 5, 2, 6))
    rows: list[int] = []
    whole = Block.forward

    def count(self: Block, x: Tensor, *rest: Any) -> Tensor:
        rows.append(len(x))
        return whole(self, x, *rest)

    with mock.patch.object(Block, "forward", count):
        x, found = backward(model, batch)
    computed = sum(rows)
    assert forward(model, batch)[2][-2] == computed * 7
    assert computed < 6 * DEPTH and rows == sorted(rows, reverse=True) and len(set(rows)) > 2
    model.runner.compact = False
    expected, expected_gradients = backward(model, batch)
    real = batch.documents_BS >= 0
    torch.testing.assert_close(x[real], expected[real], rtol=tol, atol=tol)
    # In fp32 rounding, which a head of large weights multiplies.
    assert_gradients_close(found, expected_gradients, tol if precision == "fp64" else 2e-5)
    assert forward(model, batch)[2][-2] > computed * 7


@pytest.mark.parametrize(("mode", "causal"), MODES)
def test_recompute_and_dropout_while_skipping(mode: str, causal: bool) -> None:
    batch = padded((7, 4, 1, 5))
    found = []
    for recompute, compact in ((False, True), (True, True), (False, False)):
        model = build(
            make_model_config(universal(mode), "fp64", recompute, causal=causal, dropout=0.2, **GUT)
        )
        scale(model, 30.0, 0.5)
        model.runner.compact = compact
        found.append(backward(model, batch))
    real = batch.documents_BS >= 0
    for x, grads in found[1:]:
        torch.testing.assert_close(x[real], found[0][0][real], rtol=1e-11, atol=1e-11)
        assert_gradients_close(grads, found[0][1], 1e-11)


# ----------------------------------------------------------------------------------- what it costs


def test_parameters_are_those_of_the_paper() -> None:
    """Section 4.4: halting head c D^2 + 2 D + 1; GUT of ListOps 3.68M, of flip-flop 5.78M."""

    def count(mode: str, gate: bool, ffn: int = 1024, **halting: Any) -> int:
        config = make_model_config(
            universal(mode, **halting), hidden_size=512, num_heads=8, ffn_hidden_size=ffn,
            **UT, gate=gate,
        )  # fmt: skip
        return count_parameters(config).non_embedding - 2 * 512  # without the final norm

    hidden, ffn = 512, 1024
    block = 4 * hidden**2 + (2 * hidden * ffn + ffn + hidden) + 4 * hidden
    gate = 2 * hidden * ffn + ffn + hidden
    assert count("none", False) == block
    head = hidden**2 + 2 * hidden + 1
    assert count("token", False, transition=False) == block + head
    assert count("global", True) == block + gate + head + hidden**2
    assert count("global", True) == pytest.approx(3.68e6, rel=2e-3)
    assert count("global", True, 2048) == pytest.approx(5.78e6, rel=2e-3)


def test_flops_count_the_head_at_every_step() -> None:
    steps = layer_map(make_model_config(universal("none")).recurrence)
    token, none = (count_flops(make_model_config(universal(m)), steps) for m in ("token", "none"))
    assert token.forward - none.forward == DEPTH * 2 * (2 * 32 * 32 + 32)
    per_document, none = (
        count_flops(make_model_config(universal(m), causal=False), steps)
        for m in ("global", "none")
    )
    assert per_document.forward - none.forward == DEPTH * (2 * (2 * 32 * 32 + 32) // 16)


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("sections", "naming"),
    [
        ({"recurrence": {"kind": "cycle", "num_blocks": 1, "depth": 2, "halting": {}}},
         ("halting", "kind=cycle", "cannot halt")),
        ({"recurrence": universal("token", threshold=0.0)}, ("threshold=0.0", "set it above 0")),
        ({"recurrence": universal("token", threshold=1.5)}, ("threshold", "1.5")),
        ({"recurrence": universal("token", coefficient=-1.0)}, ("coefficient", "-1.0")),
        ({"recurrence": universal("token"), "parallel": {"pipeline": 2}},
         ("parallel.pipeline=2", "set it to at most 1", "universal")),
        ({"recurrence": universal("token"), "train": {"compile": True}},
         ("train.compile", "token")),
        ({"recurrence": universal("token"), "adapters": {"rank": 2}}, ("adapters", "token")),
        ({"recurrence": universal("token"), "exits": {}}, ("exits", "universal")),
        ({"recurrence": universal("global"), "parallel": {"tensor": 2, "sequence_parallel": True}},
         ("sequence_parallel", "global")),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_once(sections: dict[str, Any], naming: tuple[str, ...]) -> None:
    from support import configs

    values = configs.make_config().model_dump(mode="json") | sections
    values["train"] = {"steps": 1, "global_batch_size": 2, "micro_batch_size": 1} | sections.get(
        "train", {}
    )
    with pytest.raises(ConfigError) as caught:
        validate(values, "test")
    message = str(caught.value)
    assert message.startswith("test: 1 problem\n"), message
    for text in naming:
        assert text in message


def test_generation_keeps_no_cache() -> None:
    model = halting_model("global")
    with pytest.raises(ConfigError, match=r"halting.mode=global.*--no-cache"):
        generate(model, [1, 2], max_new_tokens=3)
    ids = list(generate(model, [1, 2], max_new_tokens=3, temperature=0.0, use_cache=False))
    known = [1, 2]
    for found in ids:
        tokens = torch.tensor([known])
        batch = replace(make_batch(1, len(known)), tokens_BS=tokens)
        assert int(model.logits(forward(model, batch)[0])[0, -1].argmax()) == found
        known.append(found)


# --------------------------------------------------------------------------------- every mesh


def mesh_config(corpus: Path, tensor: int, mode: str = "global", **sections: Any) -> Config:
    """Large weights and a low threshold, so that depths differ."""
    halting = {"threshold": 0.8, **sections.pop("halting", {})}
    model = {**GUT, "init_std": 0.15, **sections.pop("model", {})}
    return config_of(
        corpus,
        "dense",
        tensor,
        recurrence=universal(mode, 5, **halting),
        model=model,
        **sections,
    )


@pytest.mark.parametrize(
    ("tensor", "processes", "stage", "mode", "extra"),
    [
        (1, 2, 0, "global", {"model": {"dropout": 0.1}}),
        (2, 2, 0, "token", {"model": {"dropout": 0.1, "attention_dropout": 0.1}}),
        (1, 2, 1, "token", {}),
        (1, 2, 3, "global", {"train": {"recompute": True}}),
        later(2, 2, 0, "global", {"model": {"dropout": 0.1}}),
        later(1, 2, 0, "token", {"model": {"gate": False}, "halting": {"transition": False}}),
        later(1, 2, 1, "global", {}),
        later(1, 2, 2, "global", {}),
        later(2, 4, 3, "token", {}),
    ],
)
def test_ranks_equal_one_process(world, corpus, tensor, processes, stage, mode, extra) -> None:
    """In double precision where there is no ZeRO: large weights multiply rounding."""
    precision, tolerances = ("fp32", (2e-6, 2e-5)) if stage else ("fp64", (1e-11, 1e-11))
    extra = {**extra, "train": {**extra.get("train", {}), "precision": precision}}
    config = mesh_config(corpus, tensor, mode, parallel={"zero_stage": stage}, **extra)
    compare(world(processes).run(trace, config, 4)[0], reference(config, 4), *tolerances)


def counts_of_ranks(config: Config) -> list[float]:
    config, model, engine, mesh, loader = build_on_mesh(config)
    result = step_of(model, engine, config, loader, 0, mesh)
    engine.step(0.0)
    assert result.counts is not None
    return result.counts.tolist()


def test_replicas_run_different_depths_and_tensor_ranks_the_same(world, corpus) -> None:
    ranks = world(4).run(counts_of_ranks, mesh_config(corpus, 2, train={"micro_batch_size": 1}))
    assert ranks[0] == ranks[1] and ranks[2] == ranks[3] and ranks[0] != ranks[2]
    (alone,) = [counts_of_ranks(mesh_config(corpus, 1, train={"micro_batch_size": 1}))]
    assert [a + b for a, b in zip(ranks[0], ranks[2], strict=True)] == alone


def test_micro_batch_size_does_not_matter(corpus) -> None:
    traces = [
        trace(mesh_config(corpus, 1, train={"micro_batch_size": size, "precision": "fp64"}), 2)
        for size in (1, 4)
    ]
    compare(traces[0], traces[1], 1e-10, 1e-10)


def test_stage_3_gathers_once_whatever_the_depth(world, corpus) -> None:
    for shallow, deep in world(2).run(gathers, mesh_config(corpus, 1, parallel={"zero_stage": 3})):
        # The ends, and the block, which backward uses at once.
        assert shallow == deep == ["gather ends", "gather block 0", "reduce block 0", "reduce ends"]


def gathers(config: Config) -> tuple[list[str], list[str]]:
    """Collectives of a training pass, of few and of many steps of the map."""
    config, model, engine, _, loader = build_on_mesh(config)
    found = []
    for step, threshold in enumerate((1e-9, 1.0)):
        halting = config.halting.model_copy(update={"threshold": threshold})
        recurrence = config.recurrence.model_copy(update={"halting": halting})
        model.runner.config = config.model_copy(update={"recurrence": recurrence})
        for batch in loader.batch(step):
            with recorded(engine) as called:
                ctx = model.context(batch, step, training=True)
                x, terms = model.run(
                    layer_map(config.recurrence), model.embed(batch.tokens_BS, ctx), ctx, {}
                )
                terms |= model.loss(x, batch)
                engine.backward(objective(terms, {"tokens": 1.0, "documents": 1.0}))
            found.append(called)
        engine.step(0.0)
    return found[0], found[-1]


# ----------------------------------------------------------------------------------- whole runs


def halting_run(corpus: Path, run_dir: Path, steps: int) -> Config:
    train = {"steps": steps, "eval_every": 3, "log_every": 3, "sample_prompts": ["def "]}
    return mesh_config(
        corpus, 1, run_dir=str(run_dir), train={**train, "sample_tokens": 4},
        checkpoint={"every": 3},
    )  # fmt: skip


def test_runs_resume_and_tell_how_deep_tokens_went(corpus, tmp_path) -> None:
    for name, ends in (("whole", [6]), ("resumed", [3, 6])):
        for end in ends:
            assert train(halting_run(corpus, tmp_path / name, end)) == FINISHED
    rows = {}
    for name in ("whole", "resumed"):
        found = [r for r in read_rows(tmp_path / name / "metrics.jsonl") if "train/halting" in r]
        rows[name] = {row["step"]: row for row in found}
    for step in (3, 6):
        whole, resumed = (rows[name][step] for name in ("whole", "resumed"))
        bars = [whole[f"recurrence/halted_at/{i:02d}"] for i in range(6)]
        assert sum(bars) == pytest.approx(1.0) and max(bars) < 1.0
        depth = sum(i * bar for i, bar in enumerate(bars))
        assert whole["recurrence/halting_depth"] == pytest.approx(depth)
        assert 0.0 < whole["recurrence/executed_share"] < 1.0
        config = open_data(halting_run(corpus, tmp_path / "whole", 6), Mesh()).config
        most, head = count_flops(config, layer_map(config.recurrence)), count_head_flops(config)
        share = whole["recurrence/executed_share"]
        expected = 3 * head + share * (most.train - 3 * head)
        assert whole["speed/flops_per_token"] == pytest.approx(expected)
        assert 0.0 < whole["train/halting"] < 5.0
        for key in whole:
            if key.startswith(("train/", "recurrence/")):
                assert resumed[key] == pytest.approx(whole[key], rel=1e-5, abs=1e-9), key
    board = EventAccumulator(str(tmp_path / "whole" / "tensorboard"), {"histograms": 0}).Reload()
    drawn = board.Histograms("recurrence/halted_at")
    assert [event.step for event in drawn] == [3, 6]
    found = read_rows(tmp_path / "whole" / "metrics.jsonl")
    assert [row["step"] for row in found if "val/loss" in row] == [3, 6]


def test_a_checkpoint_inside_an_interval_keeps_its_counts() -> None:
    mesh, before, after = Mesh(), Interval(), Interval()
    for counts in ([4.0, 4.0, 16.0, 16.0], [8.0, 0.0, 8.0, 16.0]):
        result = StepResult(None)
        result.add_counts([torch.tensor(counts, dtype=torch.float64)])
        before.add(result)
    after.restore(json.loads(json.dumps(before.carry(mesh))), mesh)
    assert after.counts is not None and after.counts.tolist() == [12.0, 4.0, 24.0, 32.0]
    found = name_counts(after.counts.tolist())
    assert found == {"recurrence/halting_depth": 0.25, "recurrence/executed_share": 0.75,
                     "recurrence/halted_at/00": 0.75, "recurrence/halted_at/01": 0.25}  # fmt: skip
