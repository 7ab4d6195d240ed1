"""Encoder-decoders on tensor, sequence, pipeline and ZeRO meshes: the losses and raw gradients of
one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from support.harness import Trace, compare
from support.meshes import count_graphs, later, trace_engine
from support.pairs import DENSE, collate, make_pairs, pair_config

from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.model.transformer import Transformer
from megarecur.plan.predict import walk_over
from megarecur.plan.schedule import Schedules
from megarecur.plan.walk import Stage
from megarecur.recurrence.schemes import build_map
from megarecur.train.verify import TOLERANCES

CYCLE = {"kind": "cycle", "num_blocks": 2, "depth": 4}
REVERSE = {"kind": "cycle_reverse", "num_blocks": 2, "depth": 4}
RING = {"kind": "ring", "depth": 3, "level_rank": 3, "feed_forward_rank": 2}
TOKEN = {"kind": "universal", "depth": 3, "halting": {"mode": "token"}}
UNIFORM = {"sampler": "uniform", "min": 1, "max": 3}
SAMPLED = {"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": UNIFORM,
           "backward_loops": 1}  # fmt: skip
POST: dict[str, Any] = {"norm_position": "post"}
STEPS = 2

SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "dense": (DENSE, DENSE, {}),
    "cycle": (CYCLE, CYCLE, {**POST, "residual": "admin", "tie": "decoder"}),
    "reverse": (REVERSE, REVERSE, {"positions": "learned", "tie": "none"}),
    "ring": (RING, CYCLE, {**POST, "positions": "sinusoidal"}),
    "sampled": (SAMPLED, SAMPLED, {"norm_position": "sandwich"}),
    "halting": (TOKEN, DENSE, {}),
}  # fmt: skip


def make(scheme: str, mesh: dict[str, Any], precision: str = "fp64") -> Config:
    encoder, recurrence, model = SCHEMES[scheme]
    train = {"global_batch_size": 8, "micro_batch_size": 2}
    model = {"dropout": 0.1, "num_kv_heads": 2, **model}
    return pair_config(encoder, recurrence, precision, model=model, parallel=mesh, train=train)


def read(config: Config, step: int, dp_rank: int, dp: int) -> list[MicroBatch]:
    """This replica's micro batches of a step; each has its own lengths."""
    size, own = config.train.micro_batch_size, config.train.global_batch_size // dp
    found = []
    for first in range(dp_rank * own, (dp_rank + 1) * own, size):
        first += step * config.train.global_batch_size
        pairs = make_pairs(size, seed=first)
        found.append(collate(*pairs, first=first, multiple=2))
    return found


def trace(config: Config, prepare: Callable[[Transformer], None] | None = None) -> Trace:
    return trace_engine(config, read, STEPS, prepare, shared=frozenset({"embedding.weight"}))


def trace_compiled(config: Config) -> tuple[Trace, int]:
    return count_graphs(trace, config)


@functools.cache
def alone(scheme: str, precision: str) -> Trace:
    """The trace of one process."""
    return trace(make(scheme, {}, precision))


TENSOR, PIPELINE = {"tensor": 2}, {"pipeline": 2}
SEQUENCE = {"tensor": 2, "sequence_parallel": True}
CASES = [
    *((scheme, PIPELINE) for scheme in SCHEMES),
    ("cycle", TENSOR),
    ("ring", SEQUENCE),
    ("halting", TENSOR),
    ("dense", {"zero_stage": 1}),
    ("reverse", {"zero_stage": 2}),
    ("cycle", {"zero_stage": 3}),
    later("dense", {"zero_stage": 3}),
    later("sampled", {"zero_stage": 3}),
    later("reverse", {"pipeline": 2, "split_backward": True}),
    *(later(scheme, SEQUENCE) for scheme in SCHEMES if scheme not in ("ring", "halting")),
]


@pytest.mark.parametrize(("scheme", "mesh"), CASES)
def test_two_ranks_compute_what_one_does(scheme: str, mesh: dict[str, Any], world: Any) -> None:
    precision = "fp32" if "zero_stage" in mesh else "fp64"
    config = make(scheme, mesh, precision)
    for found in world(2).run(trace, config):
        compare(found, alone(scheme, precision), *TOLERANCES[precision])


@pytest.mark.parametrize(
    ("scheme", "mesh"),
    [
        ("sampled", {"pipeline": 4}),
        ("reverse", {"pipeline": 2, "tensor": 2, "sequence_parallel": True}),
        later("dense", {"pipeline": 4}),
        later("cycle", {"pipeline": 4}),
        later("ring", {"pipeline": 2, "tensor": 2}),
        later("cycle", {"pipeline": 2, "zero_stage": 1}),
    ],
)
def test_four_ranks_compute_what_one_does(scheme: str, mesh: dict[str, Any], world: Any) -> None:
    precision = "fp32" if "zero_stage" in mesh else "fp64"
    config = make(scheme, mesh, precision)
    for found in world(4).run(trace, config):
        compare(found, alone(scheme, precision), *TOLERANCES[precision])


@pytest.mark.parametrize(
    ("scheme", "mesh"),
    [later("ring", PIPELINE), later("reverse", SEQUENCE), later("sampled", TENSOR)],
)
def test_compiled_blocks_compute_what_eager_ones_do(scheme: str, mesh: Any, world: Any) -> None:
    """One graph for each kind of block, with its lengths free; a rank has the blocks it owns."""
    config = make(scheme, mesh)
    for found, graphs in world(2).run(trace_compiled, config):
        compare(found, alone(scheme, "fp64"), *TOLERANCES["fp64"])
        assert 1 <= graphs <= 6


def stages_of(scheme: str, ranks: int) -> tuple[Stage, ...]:
    config = make(scheme, {"pipeline": ranks})
    schedules = Schedules(config)
    schedules.close()
    return walk_over(config, build_map(config), schedules.placement)


def test_the_encoders_output_travels_once() -> None:
    """And its gradient returns once, as do the embedded targets."""
    walk = stages_of("dense", 4)
    assert [stage.rank for stage in walk] == [0, 1, 2, 3]
    assert [stage.receives for stage in walk] == [(), ("target",), ("target",), ("encoder",)]
    assert [stage.returns for stage in walk] == [(), ("target",), ("target",), ("encoder",)]
    assert [stage.enters for stage in walk] == ["encoder", "encoder", "encoder", "decoder"]
    walk = stages_of("cycle", 4)
    received = [(stage.rank, name) for stage in walk for name in stage.receives]
    assert received.count((3, "encoder")) == 1 and len(received) == len(set(received))
