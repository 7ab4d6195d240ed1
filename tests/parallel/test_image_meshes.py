"""Models of pictures on tensor, sequence, pipeline and ZeRO meshes: the losses and raw gradients of
one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from support.harness import Trace, compare
from support.meshes import count_graphs, later, trace_engine
from support.pictures import DENSE, make_pictures, picture_config

from megarecur.config.run import Config
from megarecur.data.samples import TaskBatch
from megarecur.model.transformer import Transformer
from megarecur.train.verify import TOLERANCES

CYCLE = {"kind": "cycle", "num_blocks": 2, "depth": 4}
REVERSE = {"kind": "cycle_reverse", "num_blocks": 2, "depth": 4}
RING = {"kind": "ring", "depth": 3, "level_rank": 3, "feed_forward_rank": 2}
TOKEN = {"kind": "universal", "depth": 3, "halting": {"mode": "token"}}
UNIFORM = {"sampler": "uniform", "min": 1, "max": 3}
SAMPLED = {"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": UNIFORM,
           "backward_loops": 1}  # fmt: skip
TOKEN_FIRST = {"pooling": "class_token", "image_size": 6}
"""Nine patches and a class token: two ranks have five positions each."""
STEPS = 2

SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "dense": (DENSE, TOKEN_FIRST, {}),
    "cycle": (CYCLE, {}, {"norm_position": "post", "residual": "admin"}),
    "reverse": (REVERSE, {"head_size": 8}, {"positions": "sinusoidal_2d"}),
    "ring": (RING, TOKEN_FIRST, {"positions": "sinusoidal"}),
    "sampled": (SAMPLED, {"num_classes": 2}, {"norm_position": "sandwich"}),
    "halting": (TOKEN, TOKEN_FIRST, {}),
}  # fmt: skip


def make(scheme: str, mesh: dict[str, Any], precision: str = "fp64") -> Config:
    recurrence, task, model = SCHEMES[scheme]
    train = {"global_batch_size": 8, "micro_batch_size": 2}
    model = {"dropout": 0.1, "num_kv_heads": 2, **model}
    return picture_config(recurrence, precision, model=model, task=task, parallel=mesh, train=train)


def read(config: Config, step: int, dp_rank: int, dp: int) -> list[TaskBatch]:
    """This replica's micro batches of a step."""
    size, own = config.train.micro_batch_size, config.train.global_batch_size // dp
    first = step * config.train.global_batch_size + dp_rank * own
    return [make_pictures(config, size, start) for start in range(first, first + own, size)]


def trace(config: Config, prepare: Callable[[Transformer], None] | None = None) -> Trace:
    return trace_engine(config, read, STEPS, prepare)


def trace_compiled(config: Config) -> tuple[Trace, int]:
    return count_graphs(trace, config)


@functools.cache
def alone(scheme: str, precision: str) -> Trace:
    """The trace of one process."""
    return trace(make(scheme, {}, precision))


TENSOR, PIPELINE = {"tensor": 2}, {"pipeline": 2}
SEQUENCE = {"tensor": 2, "sequence_parallel": True}
CASES = [
    ("dense", PIPELINE),
    ("reverse", PIPELINE),
    ("cycle", TENSOR),
    ("halting", TENSOR),
    ("ring", SEQUENCE),
    ("dense", {"zero_stage": 1}),
    ("reverse", {"zero_stage": 2}),
    ("dense", {"zero_stage": 3}),
    ("dense", {**SEQUENCE, "zero_stage": 2}),
    later("ring", {"zero_stage": 3}),
    later("sampled", {"zero_stage": 3}),
    later("reverse", {"pipeline": 2, "split_backward": True}),
    *(later(scheme, PIPELINE) for scheme in SCHEMES if scheme in ("cycle", "sampled")),
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
        ("dense", {"pipeline": 2, "tensor": 2, "sequence_parallel": True}),
        ("ring", {**SEQUENCE, "zero_stage": 1}),
        later("sampled", {"pipeline": 3}),
        later("ring", {"tensor": 4}),
        later("cycle", {"pipeline": 2, "zero_stage": 1}),
        later("dense", {**SEQUENCE, "zero_stage": 3}),
    ],
)
def test_four_ranks_compute_what_one_does(scheme: str, mesh: dict[str, Any], world: Any) -> None:
    precision = "fp32" if "zero_stage" in mesh else "fp64"
    config = make(scheme, mesh, precision)
    size = 3 if mesh.get("pipeline") == 3 else 4
    for found in world(size).run(trace, config):
        compare(found, alone(scheme, precision), *TOLERANCES[precision])


@pytest.mark.parametrize(
    ("scheme", "mesh"),
    [later("sampled", PIPELINE), later("ring", SEQUENCE)],
)
def test_compiled_blocks_compute_what_eager_ones_do(scheme: str, mesh: Any, world: Any) -> None:
    """One graph for each kind of block; a rank has the blocks it owns."""
    config = make(scheme, mesh)
    for found, graphs in world(2).run(trace_compiled, config):
        compare(found, alone(scheme, "fp64"), *TOLERANCES["fp64"])
        assert 1 <= graphs <= 6
