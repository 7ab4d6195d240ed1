"""Muon for the matrices of blocks, AdamW for the rest."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.configs import SCHEMES, make_config
from support.harness import compare
from support.meshes import build_on_mesh, config_of, later, reference, trace, trace_steps
from torch import Tensor

from megarecur.checkpoint import checkpoint
from megarecur.config.run import Config
from megarecur.data.open import with_vocab_size
from megarecur.errors import ConfigError
from megarecur.model.transformer import Transformer
from megarecur.optim.muon import SharedMuon
from megarecur.optim.plain import PlainEngine
from megarecur.parallel.mesh import Mesh, Peers
from megarecur.plan.cluster import PRESETS
from megarecur.plan.cost import estimate_memory
from megarecur.plan.predict import Layout, make_draft
from megarecur.recurrence.schemes import layer_map
from megarecur.train.metrics import read_rows
from megarecur.train.speed import measure_state
from megarecur.train.trainer import FINISHED, train


def muon_config(
    corpus: Path | str = "corpus", scheme: str = "reuse_map", muon: Any = None, **sections: Any
) -> Config:
    """A tiny run that Muon trains."""
    rates = {"lr": 1e-3, "eps": 1e-5, "muon": muon or {}}
    sections["optimizer"] = {**rates, **sections.get("optimizer", {})}
    return make_config(corpus, scheme, **sections)


def build_trained_by_muon(config: Config) -> tuple[Transformer, PlainEngine]:
    """The model of a byte corpus, and its engine."""
    config = with_vocab_size(config, 257)
    model = Transformer(config)
    return model, PlainEngine(model, config, Mesh())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_matrices_of_blocks_are_muons_and_nothing_else(scheme: str) -> None:
    model, engine = build_trained_by_muon(
        muon_config(scheme=scheme, muon={"exclude": ["*.down.*"]}, model={"attention_bias": "all"})
    )
    moments = set(engine.moments)
    for name, parameter in model.parameters_by_name.items():
        matrix = name.startswith("blocks.") and parameter.ndim == 2
        muon = matrix and not fnmatchcase(name, "*.down.*")
        own = {f"momentum.{name}"} if muon else {f"exp_avg.{name}", f"exp_avg_sq.{name}"}
        assert own <= moments, name
        moments -= own
    assert not moments
    assert "momentum.blocks.0.attention.query.weight" in engine.moments


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """Five quintic Newton-Schulz iterations (Jordan et al. 2024) in double precision."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.double() / matrix.double().norm()
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_an_update_is_the_orthogonalised_momentum(adjust: str) -> None:
    """Against a reference in double precision: torch's iterations are in bf16, 2^-9 relative."""
    muon = {"lr": 0.03, "weight_decay": 0.2, "adjust_lr": adjust, "exclude": ["blocks.1.*"]}
    config = muon_config(muon=muon, optimizer={"clip_norm": None})
    model, engine = build_trained_by_muon(config)
    name = "blocks.0.feed_forward.up.weight"  # [64, 32]
    parameter = model.parameters_by_name[name]
    generator, momentum = torch.Generator().manual_seed(1), torch.zeros(parameter.shape)
    for _ in range(3):
        gradient = torch.randn(parameter.shape, generator=generator)
        before = parameter.detach().clone()
        parameter.grad.copy_(gradient)
        engine.step(config.optimizer.lr / 2)  # the schedule at half its height
        momentum = 0.95 * momentum + 0.05 * gradient
        direction = orthogonalised(0.05 * gradient + 0.95 * momentum)
        rate = 0.015 * (2**0.5 if adjust == "original" else 0.2 * 64**0.5)
        expected = before.double() * (1 - 0.015 * 0.2) - rate * direction
        change, wanted = parameter.detach().double() - before, expected - before
        assert (change - wanted).norm() < 2e-2 * wanted.norm()
        torch.testing.assert_close(engine.moments[f"momentum.{name}"], momentum)
    singular = torch.linalg.svdvals((parameter.detach() - before * (1 - 0.015 * 0.2)) / rate)
    assert singular.min() > 0.5 and singular.max() < 1.5


def test_processes_equal_one(world, corpus) -> None:
    """In double precision no gradient sits on the edge of the iterations' bf16, as a rounding of
    fp32 could: ten steps are equal. In fp32 the first step's gradients are."""
    for scheme, dp in (("reuse_map", 2), ("loop", 4)):
        config = muon_config(corpus, scheme, train={"precision": "fp64", "micro_batch_size": 1})
        compare(world(dp).run(trace, config, 10)[0], trace(config, 10), 1e-11, 1e-11)
    config = muon_config(corpus, train={"micro_batch_size": 1})
    compare(world(2).run(trace, config, 1)[0], trace(config, 1), 2e-6, 2e-5)


CUT = [
    # scheme, processes, parallel
    ("cycle", 2, {"tensor": 2}),
    ("cycle", 4, {"tensor": 4, "sequence_parallel": True}),
    ("loop", 2, {"pipeline": 2}),
    ("reuse_map", 2, {"zero_stage": 1}),
    ("loop", 4, {"zero_stage": 3, "shard_group": 2}),
    ("cycle", 4, {"zero_stage": 2, "tensor": 2, "sequence_parallel": True}),
    later("cycle", 4, {"tensor": 2, "pipeline": 2}),
    later("cycle", 4, {"zero_stage": 3, "pipeline": 2}),
    later("sequence", 8, {"zero_stage": 3, "pipeline": 2, "tensor": 2}),
]


@pytest.mark.parametrize(("scheme", "processes", "parallel"), CUT)
def test_cut_matrices_are_updated_whole(world, corpus, scheme, processes, parallel) -> None:
    """Four tensor-parallel ranks hold each of the two key heads twice. A pattern leaves one kind of
    matrix to AdamW, another is frozen."""
    optimizer = {
        "muon": {"lr": 1e-3, "exclude": ["*.down.*"]}, "frozen": ["blocks.0.attention.value.*"],
        "lr_multipliers": {"blocks.1.*": 0.5},
    }  # fmt: skip
    train_config = {"precision": "fp64", "micro_batch_size": 1, "global_batch_size": 4}
    config = config_of(
        corpus, scheme, 1, optimizer=optimizer, train=train_config, parallel=parallel
    )
    compare(world(processes).run(trace, config, 6)[0], reference(config, 6), 1e-11, 1e-11)


def orthogonalise_once(config: Config) -> tuple[list[str], int]:
    """The matrices that this rank orthogonalizes in a step, and the bytes that it sends."""
    built, bytes_sent = build_on_mesh(config), 0
    exchange = Peers.exchange

    def counted(peers: Peers, sent: Tensor, counts: list[int], received: list[int]) -> Tensor:
        nonlocal bytes_sent
        bytes_sent += (sum(counts) - counts[peers.rank]) * sent.element_size()
        return exchange(peers, sent, counts, received)

    with mock.patch.object(Peers, "exchange", counted):
        trace_steps(built, 1)
    (muon,) = [o for o in built[2].optimizers if isinstance(o, SharedMuon)]
    return muon.owned[muon.peers.rank], bytes_sent


def test_each_matrix_has_one_owner_and_plan_counts_what_travels(world, corpus) -> None:
    train_config = {"micro_batch_size": 1, "global_batch_size": 4}
    parallel = {"zero_stage": 1, "tensor": 2}
    config = config_of(
        corpus, "cycle", 1, optimizer={"muon": {}}, train=train_config, parallel=parallel
    )
    ranks = world(4).run(orthogonalise_once, config)
    names = [name for rank, _ in ranks for name in rank]
    assert len(names) == len(set(names)) == 14 and all(len(rank) >= 3 for rank, _ in ranks)
    draft = make_draft(with_vocab_size(config, 257), Layout(2, 1, 2, 1), PRESETS["h100"])
    # Shards of a block do not cut each of its matrices in equal parts.
    assert sum(sent for _, sent in ranks) == pytest.approx(4 * draft.ranks[0].traffic.muon, rel=0.1)


def test_a_run_learns_and_resumes_exactly(corpus, tmp_path) -> None:
    def run(name: str, steps: int) -> list[float]:
        config = muon_config(
            corpus, run_dir=str(tmp_path / name), model={"dropout": 0.1}, checkpoint={"every": 5},
            optimizer={"lr_multipliers": {"blocks.1.*": 0.5}, "frozen": ["blocks.2.*"]},
            train={"steps": steps, "precision": "bf16"}, data={"val": []},
        )  # fmt: skip
        assert train(config) == FINISHED
        rows = read_rows(tmp_path / name / "metrics.jsonl")
        return [row["train/loss"] for row in rows if "train/loss" in row]

    straight = run("straight", 20)
    run("resumed", 10)
    assert run("resumed", 20) == straight
    assert straight[-1] < straight[0] - 0.5
    files = [
        (tmp_path / name / "checkpoints" / "step-00000020" / "rank-00000.safetensors").read_bytes()
        for name in ("straight", "resumed")
    ]
    assert files[0] == files[1]
    state = checkpoint.read_index(tmp_path / "straight" / "checkpoints" / "step-00000020")
    assert "momentum.blocks.0.attention.key.weight" in state.tensors
    assert "exp_avg.embedding.weight" in state.tensors
    assert not any("blocks.2" in name for name in state.tensors if name.startswith("momentum."))


def test_memory_counts_one_moment_for_each_matrix() -> None:
    plain = with_vocab_size(make_config(), 257)
    muon = with_vocab_size(muon_config(), 257)
    steps = layer_map(plain.recurrence)
    model, engine = build_trained_by_muon(muon_config())
    assert estimate_memory(muon, steps).moments == 4 * sum(
        moment.numel() for moment in engine.moments.values()
    )
    assert estimate_memory(muon, steps).moments < estimate_memory(plain, steps).moments
    estimate, held = estimate_memory(muon, steps), measure_state(model, engine)
    assert held["parameters"] == estimate.parameters and held["gradients"] == estimate.gradients
    assert held["moments"] == estimate.moments + 4  # the count of updates
    assert len(model.parameters_by_name) < len(engine.moments)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"parallel": {"zero_stage": 1, "zero_engine": "deepspeed"}},
            "optimizer.muon needs whole matrices, which parallel.zero_stage=1 of",
        ),
        ({"muon": {"lr": 0}}, "optimizer.muon.lr=0 is too small; set it to at least 1e-30"),
        ({"muon": {"adjust_lr": "rms"}}, "optimizer.muon.adjust_lr='rms' is unknown; choose 'orig"),
        ({"muon": {"momentm": 0.9}}, "optimizer.muon.momentm: unknown key; did you mean 'momen"),
    ],
)
def test_what_muon_cannot_do_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        muon_config(**sections)
    assert message in str(error.value)


def test_a_pattern_that_excludes_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.muon\.exclude: 'blokcs\.\*' matches no"):
        build_trained_by_muon(muon_config(muon={"exclude": ["blokcs.*"]}))
