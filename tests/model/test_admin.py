"""Admin's residual scales (recurrence.md, sections 5.2, 5.6): what they compute, how they start."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support import meshes
from support.configs import make_config
from support.harness import Trace, compare
from support.meshes import config_of, gather_whole, later, mesh_of, reference, trace
from support.models import assert_same, build, make_batch, make_model_config, objective, run
from torch import Tensor

from megarecur.checkpoint.checkpoint import read_names
from megarecur.checkpoint.load import load_model
from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.data.open import open_data
from megarecur.errors import ConfigError, DataError
from megarecur.model.adapters import ResidualScale
from megarecur.model.transformer import Transformer
from megarecur.optim.build import build_engine
from megarecur.parallel.mesh import Mesh
from megarecur.plan.cost import count_flops, count_parameters
from megarecur.plan.schedule import Schedules
from megarecur.recurrence.depth import refuse_depth
from megarecur.recurrence.inventory import SCALES, build_inventory
from megarecur.recurrence.schemes import layer_map
from megarecur.train import trainer
from megarecur.train.scales import profile_scales
from megarecur.train.step import build_model
from megarecur.train.trainer import FINISHED, train

CYCLE = {"kind": "cycle", "num_blocks": 2, "depth": 5}
POST = {"norm_position": "post", "norm": "layer"}
ADMIN = {**POST, "residual": "admin"}


def scales_of(model: Transformer) -> list[ResidualScale]:
    """In the order of the map."""
    modules = {id(m.weight): m for m in model.modules() if isinstance(m, ResidualScale)}
    return [
        modules[
            id(model.parameters_by_name[f"blocks.{s.block}.loops.{s.loop_index}.{name}.weight"])
        ]
        for s in layer_map(model.config.recurrence)
        for name in SCALES
    ]


def begin(config: Config) -> tuple[Config, Transformer, Mesh, Any]:
    """A model whose scales are set as a run sets them."""
    mesh = mesh_of(config)
    data = open_data(config, mesh)
    model = build_model(data.config, mesh, Schedules(data.config))
    profile_scales(model, data.config, data.loader, mesh)
    return data.config, model, mesh, data.loader


def profiled(config: Config) -> tuple[Config, Transformer, Any, Mesh, Any]:
    """As `meshes.build_on_mesh`, with such a model."""
    config, model, mesh, loader = begin(config)
    return config, model, build_engine(model, config, mesh), mesh, loader


# ------------------------------------------------------------------------------------ what they do


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scales_of_one_are_a_plain_residual(precision: str) -> None:
    """In bf16 the sum is rounded once, as the plain one."""
    batch = make_batch()
    model = Transformer(make_model_config(CYCLE, precision, **ADMIN))
    plain = Transformer(make_model_config(CYCLE, precision, **POST))
    loss, logits, grads = run(model.config, batch, True, model)
    expected = run(plain.config, batch, True, plain)
    assert_same((loss, logits, {name: grads[name] for name in expected[2]}), expected)


def test_a_step_is_the_formula_with_scales_of_its_own() -> None:
    """x' = N(x w + f(x)), twice per step of the map; no two steps share a scale."""
    model, batch = build(make_model_config(CYCLE, "fp64", **ADMIN)), make_batch()
    states: list[Tensor] = []
    ctx = model.context(batch, step=0, training=False, states=states)
    steps = layer_map(model.config.recurrence)
    x = model.embed(batch.tokens_BS, ctx)
    model.run(steps, x, ctx, {})
    used = set()
    for step, state in zip(steps, states, strict=True):
        block = model.runner.blocks[str(step.block)]
        first, second = (
            model.parameters_by_name[f"blocks.{step.block}.loops.{step.loop_index}.{name}.weight"]
            for name in SCALES
        )
        used |= {id(first), id(second)}
        mixed = block.attention(x, ctx.view(False), ctx.positions, step, {}, None)
        x = block.norms["attention_norm"](x * first + mixed)
        x = block.norms["feed_forward_norm"](x * second + block.feed_forward(x))
        torch.testing.assert_close(x, state, rtol=1e-12, atol=1e-12)
    assert len(used) == 2 * len(steps)


def test_they_are_two_vectors_per_step_of_the_map() -> None:
    """N d 2 (section 5.2), which live with their block; vectors, so they do not decay."""
    admin, plain = (make_model_config(CYCLE, **form) for form in (ADMIN, POST))
    assert count_parameters(admin).total - count_parameters(plain).total == 5 * 32 * 2
    new = build_inventory(admin).keys() - build_inventory(plain).keys()
    assert {build_inventory(admin)[name].block for name in new} == {0, 1}
    assert "blocks.1.loops.1.feed_forward_residual.weight" in new
    assert "blocks.1.loops.2.feed_forward_residual.weight" not in new


# ------------------------------------------------------------------------------ sharing (5.6)


def test_sharing_schemes_cost_the_same() -> None:
    """Check 4: parameters and FLOPs of SEQUENCE, CYCLE and CYCLE (REV), scales included."""
    counts = []
    for kind in ("sequence", "cycle", "cycle_reverse"):
        config = make_model_config({"kind": kind, "num_blocks": 3, "depth": 6}, **ADMIN)
        counts.append((count_parameters(config), count_flops(config, layer_map(config.recurrence))))
    assert counts[0] == counts[1] == counts[2]


def test_what_is_loaded_is_shared_still(corpus, tmp_path) -> None:
    """Check 6: a checkpoint has each tensor once, and to change a loaded one changes all its uses:
    a block that is made an identity leaves the other blocks' steps alone."""
    config = make_config(corpus, "cycle", run_dir=str(tmp_path), train={"steps": 1})
    assert train(config) == FINISHED
    model, _ = load_model(tmp_path)
    saved = read_names(tmp_path / "checkpoints" / "step-00000001")
    assert set(build_inventory(model.config)) <= set(saved) and len(set(saved)) == len(list(saved))
    for name in ("attention.output", "feed_forward.down"):
        model.parameters_by_name[f"blocks.0.{name}.weight"].data.zero_()
    model.refresh()
    steps, batch = layer_map(config.recurrence), make_batch()
    assert [step.block for step in steps] == [0, 1, 0, 1, 0]
    whole = objective(model, steps, batch)
    without = objective(model, tuple(step for step in steps if step.block), batch)
    torch.testing.assert_close(whole, without)


# ----------------------------------------------------------------------------------- how they start


def test_initial_values_follow_the_recursion(corpus: Path) -> None:
    """Section 5.6, check 7: w_1 = 1, w_{i+1} = sqrt(Var(x_i w_i) + Var(f_i(x_i))), in the order of
    the map, on the first samples of the corpus."""
    config = config_of(corpus, "cycle", 1, model={**ADMIN, "init_std": 0.3})
    config, model, _, loader = begin(config)
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        scale.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs))
        for scale in scales_of(model)
    ]
    batch = loader.first_samples(4)  # The global batch is less than 4,096 tokens.
    assert torch.equal(batch.tokens_BS, torch.cat([b.tokens_BS for b in loader.batch(0)]))
    ctx = model.context(batch, step=0, training=False)
    with torch.no_grad():
        model.run(layer_map(config.recurrence), model.embed(batch.tokens_BS, ctx), ctx, {})
    expected = 1.0
    found = [scale.weight.detach() for scale in scales_of(model)]
    for weight, (x, branch) in zip(found, seen, strict=True):
        torch.testing.assert_close(weight, torch.full_like(weight, expected), rtol=1e-6, atol=0)
        stream = (x * weight).double().var(correction=0)
        expected = math.sqrt(stream + branch.double().var(correction=0))
    assert expected > 1.5, "branches must matter"
    for hook in hooks:
        hook.remove()


def test_padding_does_not_count(corpus: Path) -> None:
    """Samples with padding behind them give the scales of the samples without."""
    config = config_of(corpus, "cycle", 1, model={**ADMIN, "positions": "none"})
    found = []
    for length in (16, 12):
        mesh = Mesh()
        data = open_data(config, mesh)
        first = data.loader.first_samples(2)
        documents = torch.zeros_like(first.documents_BS)
        documents[:, 12:] = -1
        cut = {
            name: getattr(first, name)[:, :length]
            for name in ("tokens_BS", "labels_BS", "positions_BS")
        }
        batch = MicroBatch(
            **cut, documents_BS=documents[:, :length], sample_ids_B=first.sample_ids_B,
            sources_B=first.sources_B, single_document=False,
        )  # fmt: skip
        model = Transformer(data.config)
        loader = mock.Mock(first_samples=lambda count, batch=batch: batch)
        profile_scales(model, data.config, loader, mesh)
        found.append(torch.stack([scale.weight[0] for scale in scales_of(model)]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)


def profiled_trace(config: Config, num_steps: int) -> tuple[dict[str, Tensor], Trace]:
    """(scales before the first step, the trace)."""
    _, model, mesh, _ = begin(config)  # An engine may leave shards of it.
    own = {name: p.detach() for name, p in model.parameters_by_name.items() if "_residual" in name}
    start = gather_whole(model, mesh, own)
    with mock.patch.object(meshes, "build_on_mesh", profiled):
        return start, trace(config, num_steps)


ENGINES = [
    # processes, parallel, other sections
    (2, {"tensor": 2, "sequence_parallel": True}, {}),
    (2, {"pipeline": 2}, {"train": {"micro_batch_size": 1}}),
    later(2, {}, {"train": {"micro_batch_size": 1}}),
    later(2, {"tensor": 2}, {}),
    later(2, {"zero_stage": 1}, {"train": {"micro_batch_size": 1}}),
    later(2, {"zero_stage": 3}, {"train": {"recompute": True}}),
    later(2, {"zero_stage": 3}, {"recurrence": {"kind": "ring", "depth": 3, "level_rank": 4}}),
    later(4, {"tensor": 2, "pipeline": 2}, {"train": {"precision": "fp64"}}),
]


@pytest.mark.parametrize(("processes", "parallel", "extra"), ENGINES)
def test_ranks_equal_one_process(world, corpus, processes, parallel, extra) -> None:
    """From the start: the same scales on every rank, whatever the mesh; to the last digit where
    products are not cut."""
    model = {**ADMIN, **extra.get("model", {})}
    config = config_of(corpus, "cycle", 1, parallel=parallel, **{**extra, "model": model})
    first, later = (1e-11, 1e-11) if config.train.precision == "fp64" else (2e-6, 2e-5)
    outcomes = world(processes).run(profiled_trace, config, 3)
    with mock.patch.object(meshes, "build_on_mesh", profiled):
        expected = reference(config, 3)
    alone = config.model_copy(update={"parallel": make_config().parallel})
    _, model_alone, *_ = begin(alone)
    for start, _ in outcomes:
        assert start
        for name, value in start.items():
            ours = model_alone.parameters_by_name[name].detach()
            if "tensor" in parallel:
                torch.testing.assert_close(value, ours, rtol=1e-6, atol=0)
            else:
                assert torch.equal(value, ours), name
            assert torch.equal(value, outcomes[0][0][name])
    compare(outcomes[0][1], expected, first, later)


def test_a_run_sets_them_once_and_keeps_them(corpus, tmp_path, monkeypatch) -> None:
    """They are in the checkpoint as any parameter; a resumed run does not set them anew."""
    profiles: list[Config] = []

    def spy(model: Transformer, config: Config, *rest: Any) -> None:
        profiles.append(config)
        profile_scales(model, config, *rest)

    monkeypatch.setattr(trainer, "profile_scales", spy)
    runs = {}
    for name, stops in (("whole", (4,)), ("halves", (2, 4))):
        for steps in stops:
            config = make_config(
                corpus,
                "cycle",
                run_dir=str(tmp_path / name),
                train={"steps": steps},
                model={**ADMIN, "init_std": 0.3},
            )
            assert train(config) == FINISHED
        runs[name], _ = load_model(tmp_path / name)
    assert len(profiles) == 2
    for name, parameter in runs["whole"].parameters_by_name.items():
        assert torch.equal(parameter, runs["halves"].parameters_by_name[name]), name
    moved = runs["whole"].parameters_by_name["blocks.0.loops.1.attention_residual.weight"]
    assert moved.min() > 1.1 and moved.std() > 0, "set, then trained"


def test_a_corpus_that_cannot_be_read_is_one_error(corpus) -> None:
    config = config_of(corpus, "cycle", 1, model=ADMIN)
    data = open_data(config, Mesh())
    with (
        mock.patch.object(data.loader, "first_samples", side_effect=DataError("gone")),
        pytest.raises(DataError, match="gone"),
    ):
        profile_scales(Transformer(data.config), data.config, data.loader, Mesh())


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"residual": "admin"}}, "residual=admin needs norm_position=post, not pre"),
        ({"model": ADMIN, "recurrence": {"kind": "block_recurrence", "num_blocks": 1, "num_loops": {
            "sampler": "poisson", "mean": 4}}}, "residual scales belong to one loop each"),
        ({"model": ADMIN, "recurrence": {"kind": "block_recurrence", "num_blocks": 1,
            "num_loops": 3}, "train": {"eval_depths": [4]}}, "residual scales are there for 3"),
    ],
)  # fmt: skip
def test_mistakes_are_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(**sections)
    assert said in str(caught.value)


def test_loops_without_scales_cannot_be_asked_for() -> None:
    recurrence = {"kind": "block_recurrence", "num_blocks": 2, "num_loops": 3}
    config = make_model_config(recurrence, **ADMIN)
    assert refuse_depth(config, 3) == ""
    assert "residual scales exist for 3 loops" in refuse_depth(config, 4)
