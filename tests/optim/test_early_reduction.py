"""Gradients of plain engines leave in buckets, during the backward pass of the last micro batch."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import pytest
from support.harness import Trace, WorldError, compare
from support.meshes import SEQUENCE, build_on_mesh, config_of, reference, trace_steps

from megarecur.config.run import Config
from megarecur.optim.plain import PlainEngine

SMALL = {"bucket_mb": 0.02}
"""Two blocks of these tests fill a bucket."""


TABLES = ("embedding.weight", "head.weight")


class Departure(NamedTuple):
    """The beginning of a bucket's reduction."""

    number: int
    running: bool
    """Whether a backward pass was running."""
    tables: list[str]
    """The embedding and the head, if they are in the bucket."""
    done: list[str]
    """Units whose gradients were then complete."""


def trace_departures(config: Config, num_steps: int) -> tuple[Trace, list[Departure], int]:
    """(trace, reductions in order, number of buckets)."""
    built, found = build_on_mesh(config), []

    def start(engine: PlainEngine, number: int, run: Any = PlainEngine.start_reduction) -> None:
        bucket, uses = engine.buckets[number], engine.uses
        if not bucket.left:
            tables = [name for name in bucket.names if name in TABLES]
            found.append(Departure(number, uses.differentiating, tables, sorted(uses.done)))
        run(engine, number)

    with mock.patch.object(PlainEngine, "start_reduction", start):
        trace = trace_steps(built, num_steps)
    return trace, found, len(built[2].buckets)


CASES = [
    # scheme, tensor, processes, sections
    ("cycle", 1, 2, {"model": {"dropout": 0.1, "tie_embeddings": False}}),
    ("dense", 1, 4, {"train": {"recompute": True, "global_batch_size": 16}}),
    ("loop", 2, 4, {**SEQUENCE, "model": {"num_kv_heads": 1}}),
    ("custom", 1, 2, {"train": {"precision": "fp64"}}),
    ("block_recurrence", 1, 4, {"parallel": {"pipeline": 2, "split_backward": False},
                                "train": {"micro_batch_size": 1, "global_batch_size": 4}}),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "tensor", "processes", "extra"), CASES)
def test_buckets_leave_early_and_change_nothing(
    world, corpus, scheme, tensor, processes, extra
) -> None:
    parallel = {**SMALL, **extra.get("parallel", {})}
    config = config_of(corpus, scheme, tensor, **{**extra, "parallel": parallel})
    traces = world(processes).run(trace_departures, config, 4)
    exact = config.train.precision == "fp64"
    compare(traces[0][0], reference(config, 4), *((1e-11, 1e-11) if exact else (2e-6, 2e-5)))
    for _, found, buckets in traces:
        assert buckets > 1 and len(found) == 4 * buckets  # Each leaves once per step.
        early = [left.number for left in found if left.running]
        # The embedding, in the last bucket, is done when the backward pass is.
        assert len(early) >= 4 * (buckets - 1)
    of_replicas = [[left.number for left in found] for _, found, _ in traces]
    step = config.parallel.pipeline * tensor
    assert all(of_replicas[rank] == of_replicas[rank % step] for rank in range(processes))


ALL = ["block 0", "block 1", "block 2"]
SPLIT = {"pipeline": 2, "placement": [0, 0, 1], "split_backward": False}


@pytest.mark.parametrize(
    ("tied", "extra", "expected"),
    [
        (False, {}, [[("head.weight", ["head"]), ("embedding.weight", [*ALL, "ends", "head"])]]),
        # Both uses of a tied table must be done.
        (True, {}, [[("embedding.weight", [*ALL, "ends", "head"])]]),
        # They are on two ranks, and the head's rank is done with its use first.
        (True, SPLIT, [[("embedding.weight", [*ALL[:2], "ends"])],
                       [("embedding.weight", ["head"])]]),
    ],
)  # fmt: skip
def test_the_head_leaves_when_it_is_done(world, corpus, tied, extra, expected) -> None:
    pipeline = extra.get("pipeline", 1)
    config = config_of(
        corpus, "dense", 1, model={"tie_embeddings": tied}, parallel={**SMALL, **extra}
    )
    traces = world(2 * pipeline).run(trace_departures, config, 1)
    found = [[(left.tables[0], left.done) for left in all_ if left.tables] for _, all_, _ in traces]
    assert found == expected * 2


def test_postponed_products_delay_the_reduction(world, corpus) -> None:
    """With zero-bubble orders the products of weight gradients come after the backward pass; each
    bucket leaves when the last of its own is done."""
    parallel = {**SMALL, "pipeline": 2, "order": "interleaved_zero_bubble"}
    train = {"micro_batch_size": 1, "global_batch_size": 8}
    config = config_of(corpus, "block_recurrence", 1, parallel=parallel, train=train)
    traces = world(4).run(trace_departures, config, 3)
    compare(traces[0][0], reference(config, 3))
    for rank, (_, departures, buckets) in enumerate(traces):
        first, last = departures[0], departures[buckets - 1]
        assert len(first.done) < len(last.done), "the first bucket waits for no other"
        assert last.done == [f"block {rank % 2}", "ends", *["head"] * (rank % 2)]


def leave_too_early(config: Config) -> Trace:
    """Reduce each bucket after the first micro batch."""
    built = build_on_mesh(config)
    with mock.patch.object(type(built[2].uses), "is_last", lambda *_: True):
        return trace_steps(built, 1)


def test_a_bucket_that_leaves_too_early_is_noticed(world, corpus) -> None:
    config = config_of(corpus, "cycle", 1, parallel=SMALL, train={"micro_batch_size": 1})
    with pytest.raises(AssertionError) as caught:
        compare(world(2).run(leave_too_early, config)[0], reference(config, 1))
    assert not isinstance(caught.value, WorldError)


def test_gradients_that_travel_in_bf16_are_close(world, corpus) -> None:
    """Each replica's gradient, and the sum of two, are rounded to 8 bits."""
    config = config_of(corpus, "cycle", 1, parallel={**SMALL, "reduce_dtype": "bf16"})
    found, _, _ = world(2).run(trace_departures, config, 1)[0]
    compare(found, reference(config, 1), 6e-3)
    with pytest.raises(AssertionError):
        compare(found, reference(config, 1))
