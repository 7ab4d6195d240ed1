"""torch.compile of the block against eager: the same losses and gradients, from two graphs.

Most cases stop before code is generated (`aot_eager` runs the traced forward and backward graphs as
they are): what Inductor makes of them takes a minute a graph, and is checked in the slow tests.
"""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.configs import ENTRY, make_config
from support.engines import (
    aot_eager,
    build_engine_of,
    engine_config,
    maps_of,
    plain,
    reference_maps,
    run_steps,
    trace_compiled,
)
from support.harness import compare
from support.meshes import SEQUENCE, config_of, later, mesh_of, trace_both

from megarecur.config.load import to_yaml, validate
from megarecur.config.run import Config
from megarecur.data_prep.tasks import TaskRequest, prepare_task
from megarecur.errors import ConfigError
from megarecur.model.compile import CompiledModel, find_obstacle
from megarecur.parallel.mesh import Mesh
from megarecur.train.compiler import choose_compiler
from megarecur.train.metrics import read_rows
from megarecur.train.trainer import FINISHED, train

DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}
CASES = [
    ("loop", {"model": DROPOUT}),
    ("cycle", {"model": {"norm_position": "sandwich", "attention_bias": "all", "qk_norm": True},
               "train": {"recompute": "selective"}}),
    ("sequence", {"model": {"norm_position": "post", "norm": "layer", "feed_forward": "gelu",
                            "positions": "learned"}}),
    ("reuse_map", {"recurrence": ENTRY, "train": {"recompute": True},
                   "model": {**DROPOUT, "z_loss": 1e-3}}),
    ("cycle_reverse", {"model": {"positions": "alibi", "rope_interleaved": False}}),
    ("block_recurrence", {"model": {"rope_interleaved": True, "tie_embeddings": False}}),
    ("custom", {"data": {"seq_length": 16, "mask_documents": False}}),
    ("dense", {"optimizer": {"clip_norm": 0.5, "frozen": ["blocks.1.*"]}}),
    ("cycle", {"exits": {"distill": True}, "adapters": {"rank": 3}}),
]  # fmt: skip


def case_of(corpus: Path, scheme: str, extra: dict, stage: int = 0) -> Config:
    sections = {name: dict(values) for name, values in extra.items()}
    data = sections.pop("data", {})
    config = engine_config(corpus, scheme, stage, 2, **sections)
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


@pytest.mark.parametrize(
    ("scheme", "extra"),
    [case if i in (0, 1, 3) else pytest.param(*case, marks=pytest.mark.slow)
     for i, case in enumerate(CASES)],
)  # fmt: skip
def test_compiled_equals_eager(corpus, scheme, extra) -> None:
    config = case_of(corpus, scheme, extra)
    found, graphs = trace_compiled(config, 5)
    compare(found, reference_maps(config, 5))
    # Frozen weights have no gradient, which makes a graph of their own.
    assert graphs == (2 if config.optimizer.frozen else 1)


def test_two_graphs_serve_every_depth(corpus) -> None:
    """One with and one without gradient, over 1 to 6 loops, truncated and whole."""
    config = case_of(corpus, "loop", {"model": DROPOUT})
    maps = maps_of(config, [3, 1, 6], backward=2) + maps_of(config, [2, 4, 5])
    found, graphs = trace_compiled(config, len(maps), maps)
    compare(found, reference_maps(config, len(maps), maps))
    assert graphs == 2


def test_graphs_made_later_are_told_with_their_reason(corpus) -> None:
    config, model, engine = build_engine_of(case_of(corpus, "reuse_map", {}))
    compiled = CompiledModel(model, aot_eager)
    run_steps(config, model, engine, range(1))
    assert compiled.graphs == 1
    assert not compiled.news() and not compiled.news()
    shorter = config.model_copy(update={"data": config.data.model_copy(update={"seq_length": 8})})
    run_steps(shorter, model, engine, range(1))
    assert compiled.graphs == 2
    assert "of the block 2 in all" in (news := compiled.news()) and "size mismatch" in news
    assert not compiled.news()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_shards_equal_the_plain_engine(world, corpus, stage, recompute) -> None:
    config = case_of(corpus, "loop", {"model": DROPOUT, "train": {"recompute": recompute}}, stage)
    maps = maps_of(config, [3, 1, 4, 2], backward=2)
    found, graphs = world(2).run(trace_compiled, config, len(maps), maps)[0]
    compare(found, reference_maps(config, len(maps), maps))
    assert graphs == 2


@pytest.mark.parametrize("bf16_products", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_bf16_is_the_same_from_gathered_weights(
    corpus, monkeypatch, bf16_products
) -> None:
    """ZeRO 3 has a weight's copy for a while only; the graph must be given it."""
    monkeypatch.setattr("megarecur.parallel.linear.has_bf16_products", lambda device: bf16_products)
    config = case_of(corpus, "loop", {"train": {"precision": "bf16"}}, 3)
    found, graphs = trace_compiled(config, 2)
    expected, _ = trace_compiled(plain(config), 2)
    compare(found, expected, 2e-6, 2e-2)
    assert graphs == 1


# --------------------------------------------------------------------------------------- meshes


SAMPLED = {"num_loops": {"sampler": "uniform", "min": 1, "max": 4}, "backward_loops": 2}


def sampled(config: Config) -> Config:
    """The config with a drawn number of loops, of which the last two have gradients."""
    values = config.recurrence.model_dump() | SAMPLED
    return config.model_copy(update={"recurrence": type(config.recurrence).model_validate(values)})


@pytest.mark.parametrize(
    ("tensor", "processes", "sections"),
    [
        (1, 2, {"parallel": {"pipeline": 2}, "train": {"recompute": True}}),
        later(2, 2, {**SEQUENCE, "model": {"qk_norm": True, "qk_norm_over": "all"}}),
        later(2, 4, {"parallel": {"pipeline": 2, "zero_stage": 1}, "train": {"precision": "bf16"}}),
    ],
)
def test_two_graphs_serve_every_mesh_and_depth(world, corpus, tensor, processes, sections) -> None:
    """The messages, the postponed products and the results are those of eager mode."""
    sections = {**sections, "model": {**DROPOUT, **sections.get("model", {})}}
    config = sampled(config_of(corpus, "loop", tensor, **sections))
    ranks = world(processes).run(trace_both, config, 3)
    tolerances = (2e-2, 2e-2) if config.train.precision == "bf16" else (2e-6, 2e-5)
    for compiled, eager in ranks:
        compare(compiled.trace, eager.trace, *tolerances)
        assert compiled.postponed == eager.postponed
        assert compiled.graphs <= 2
    assert tensor > 1 or ranks[0][0].postponed, "the order of the first mesh splits backward"


# -------------------------------------------------------------------------------------- tasks


def test_two_graphs_serve_every_length_of_a_task(tmp_path) -> None:
    """One for the first length, and one for all others."""
    prepare_task(TaskRequest("listops", train=60, val=10, max_length=28, min_length=2), tmp_path)
    values = {
        "data": {
            "train": [{"path": f"{tmp_path}/train"}], "val": [{"path": f"{tmp_path}/val"}],
            "tokenizer": f"{tmp_path}/tokenizer.words", "seq_length": 28,
        },
        "train": {"global_batch_size": 8, "micro_batch_size": 2, "compile": True},
        "model": DROPOUT, "optimizer": {"lr": 1e-4},
    }  # fmt: skip
    config = make_config("none", "cycle", **values).model_dump()
    config["model"]["causal"] = False
    config["task"] = {"kind": "sequence", "num_classes": 10, "augment": True, "pooling": "end"}
    compiled, eager = trace_both(validate(config, "test"), 2)
    compare(compiled.trace, eager.trace)
    # One graph suffices where torch learned in an earlier test that lengths vary.
    assert len(compiled.lengths) > 3 and compiled.graphs <= 2


# ------------------------------------------------------------------------------------- Inductor


def needs_a_compiler() -> None:
    if obstacle := find_obstacle(torch.device("cpu")):
        pytest.skip(obstacle)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_inductor_equals_eager(corpus) -> None:
    needs_a_compiler()
    config = case_of(corpus, "loop", {"model": DROPOUT})
    maps = maps_of(config, [3, 1, 6], backward=2) + maps_of(config, [2, 4])
    found, graphs = trace_compiled(config, len(maps), maps, True)
    compare(found, reference_maps(config, len(maps), maps))
    assert graphs == 2


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_inductor_in_bf16_is_as_close_to_fp64_as_eager(corpus) -> None:
    needs_a_compiler()

    def first(precision: str, compiled: bool) -> dict[str, torch.Tensor]:
        config = case_of(corpus, "loop", {"train": {"precision": precision}})
        found = trace_compiled(config, 1, (), True)[0] if compiled else reference_maps(config, 1)
        return {name: value.double() for name, value in found[0][1].items()}

    exact = first("fp64", False)
    total = sum(value.square().sum() for value in exact.values()) ** 0.5

    def error(found: dict[str, torch.Tensor]) -> float:
        parts = [(found[n] - e).norm() / max(e.norm(), 1e-3 * total) for n, e in exact.items()]
        return float(torch.stack(parts).square().mean().sqrt())

    assert error(first("bf16", True)) <= 1.1 * error(first("bf16", False))


@pytest.mark.slow
def test_a_compiled_run_evaluates_resumes_and_shows_its_graphs(corpus, tmp_path) -> None:
    needs_a_compiler()
    config = case_of(
        corpus,
        "loop",
        {
            "train": {
                "compile": True,
                "steps": 4,
                "eval_every": 1,
                "eval_samples": 8,
                "eval_depths": [1, 6],
            }
        },
    )
    config = sampled(config).model_copy(update={"run_dir": str(tmp_path / "run")})
    eager = config.model_copy(update={
        "run_dir": str(tmp_path / "eager"),
        "train": config.train.model_copy(update={"compile": False}),
    })  # fmt: skip
    half = config.model_copy(update={"train": config.train.model_copy(update={"steps": 2})})
    assert train(eager) == train(half) == train(config) == FINISHED
    rows, expected = (
        {row["step"]: row for row in read_rows(Path(c.run_dir) / "metrics.jsonl")
         if "train/loss" in row} for c in (config, eager)
    )  # fmt: skip
    assert 1 <= rows[4]["speed/graphs"] <= 2 and "speed/graphs" not in expected[4]
    for step in rows:
        assert rows[step]["train/loss"] == pytest.approx(expected[step]["train/loss"], rel=2e-5)


# ------------------------------------------------------------------------------- without a compiler


def test_without_a_compiler_the_run_is_refused(corpus, tmp_path) -> None:
    config = case_of(corpus, "loop", {"train": {"compile": True}})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "megarecur.launch.cli", "train", "config.yaml"]
    env = {**os.environ, "CXX": "/none/such", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "there is no C++ compiler (/none/such)" in done.stderr
    assert "train.compile=false" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_auto_runs_eagerly_and_says_so(corpus, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("megarecur.train.compiler.find_obstacle", lambda device: "no compiler")
    config = case_of(corpus, "reuse_map", {"train": {"compile": "auto", "steps": 2}})
    config = config.model_copy(update={"run_dir": str(tmp_path / "run")})
    assert train(config) == FINISHED
    assert "running eagerly, as no compiler" in capsys.readouterr().out
    compiled = config.train.model_copy(update={"compile": True})
    with pytest.raises(ConfigError, match="no compiler; or run eagerly"):
        train(config.model_copy(update={"run_dir": str(tmp_path / "b"), "train": compiled}))
    assert not (tmp_path / "b").exists()


def test_cuda_compiles_by_default(corpus, monkeypatch) -> None:
    """CPUs run eagerly unless asked; a config that cannot be compiled does too, and says so."""
    monkeypatch.setattr("megarecur.train.compiler.find_obstacle", lambda device: None)
    config, gpu = case_of(corpus, "loop", {}), Mesh(device=torch.device("cuda"))
    assert config.train.compile is None
    assert choose_compiler(config, gpu) == (True, "")
    assert choose_compiler(config, Mesh()) == (False, "")
    halting = {"kind": "universal", "depth": 3, "halting": {"mode": "token"}}
    compiles, reason = choose_compiler(make_config(corpus, "cycle", recurrence=halting), gpu)
    assert not compiles
    assert reason.startswith("train.compile=auto: running eagerly, as train.compile=true with rec")


def choose_where_rank_1_has_none(config: Config) -> tuple[bool, str] | str:
    obstacle = "no compiler" if dist.get_rank() == 1 else None
    with mock.patch("megarecur.train.compiler.find_obstacle", return_value=obstacle):
        try:
            return choose_compiler(config, mesh_of(config))
        except ConfigError as error:
            return str(error)


def test_ranks_compile_together_or_not_at_all(world, corpus) -> None:
    config = case_of(corpus, "loop", {"train": {"compile": "auto"}})
    for compiles, reason in world(2).run(choose_where_rank_1_has_none, config):
        assert not compiles and reason.endswith("running eagerly, as no compiler")
    config = case_of(corpus, "loop", {"train": {"compile": True}})
    for message in world(2).run(choose_where_rank_1_has_none, config):
        assert message.startswith("train.compile=true: no compiler")
