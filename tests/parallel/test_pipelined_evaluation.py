"""Evaluation with several micro batches in flight: all ranks busy, and the scores of one at a
time."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.configs import make_config
from support.meshes import config_of, later, mesh_of
from support.pairs import DENSE, collate, make_pairs, pair_config

from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.data.open import open_data, with_vocab_size
from megarecur.parallel.mesh import Mesh
from megarecur.parallel.pipeline import Pipeline
from megarecur.plan.order import StageCost, validate_order
from megarecur.plan.schedule import Schedules
from megarecur.plan.simulate import simulate
from megarecur.progress import WAITING
from megarecur.train import evaluate
from megarecur.train.evaluate import IN_FLIGHT, evaluate_corpus, run_batches
from megarecur.train.step import build_model

WALKS: dict[str, tuple[dict[str, Any], float]] = {
    "dense": ({"kind": "dense", "num_layers": 4}, 1.0),
    "sequence": ({"kind": "sequence", "num_blocks": 4, "depth": 8}, 1.0),
    "block_recurrence": ({"kind": "block_recurrence", "num_blocks": 4, "num_loops": 2}, 2.3),
    "cycle": ({"kind": "cycle", "num_blocks": 4, "depth": 12}, 2.8),
    "cycle_reverse": ({"kind": "cycle_reverse", "num_blocks": 4, "depth": 8}, 3.3),
    "custom": ({"kind": "custom", "order": [0, 1, 2, 3, 2, 1, 0, 3, 1, 2, 3, 0]}, 3.3),
}
"""Maps of four blocks, and how much faster they are scored than one micro batch after another. A
rank that a walk visits once may start on the next micro batch in both cases."""
LEAST = 2.5
"""How much faster all are scored than by one rank at a time."""


@pytest.mark.parametrize("name", WALKS)
def test_four_ranks_are_busy(name: str) -> None:
    recurrence, faster = WALKS[name]
    config = make_config(recurrence=recurrence, parallel={"pipeline": 4})
    schedules = Schedules(with_vocab_size(config, 257))
    num = 4 * IN_FLIGHT
    one, many = schedules.forward(None, True), schedules.forward(None, True, num)
    in_turn = tuple(
        tuple(op._replace(microbatch=j) for j in range(num) for op in ops) for ops in one.order
    )
    for order, count in ((one.order, 1), (in_turn, num), (many.order, num)):
        assert validate_order(order, many.walk, count) == []
    costs = [StageCost(len(stage.steps), 0.0, 0.0, 0.01) for stage in many.walk]
    before, after = (simulate(order, many.walk, costs) for order in (in_turn, many.order))
    assert before.makespan / after.makespan >= faster * (1 - 1e-9)
    alone = num * simulate(one.order, many.walk, costs).makespan
    assert alone / after.makespan >= LEAST
    assert after.bubble < 0.2


class Counting(Pipeline):
    """A pipeline that records the most micro batches per order."""

    most = 0

    def run_in_turn(self, ops: Any) -> Any:
        Counting.most = max(Counting.most, *(op.microbatch + 1 for op in ops))
        return super().run_in_turn(ops)


def score_both(config: Config) -> list[tuple[str, int]]:
    """Scores of the validation corpus and of its exits, one micro batch at a time and several, and
    how many there were in an order."""
    mesh = mesh_of(config)
    data = open_data(config, mesh)
    schedules = Schedules(data.config)
    model = build_model(data.config, mesh, schedules)
    found = []
    for size in (1, 64):
        Counting.most = 0
        notes: list[str] = []
        cut = mock.patch.object(evaluate, "islice", lambda some, n, s=size: islice(some, min(n, s)))
        with cut, mock.patch.object(evaluate, "Pipeline", Counting):
            score = evaluate_corpus(
                model, data.validation[0], data.config, mesh, 40, schedules=schedules,
                note=notes.append,
            )  # fmt: skip
        assert notes[-1] == WAITING, "`status` tells by it who waits"
        notes = [text for text in notes if text != WAITING]
        assert notes == [f"batch {i + 1} of {len(notes)}" for i in range(len(notes))]
        found.append((repr(score), Counting.most))
    data.close()
    return found


@pytest.mark.parametrize(
    ("scheme", "mesh", "sections"),
    [
        ("loop", (1, 3, 3), {}),
        ("cycle", (1, 2, 2), {"exits": {}, "recurrence": {"kind": "cycle", "num_blocks": 2,
                                                          "depth": 6}}),
        later("cycle_reverse", (2, 2, 4), {"parallel": {"sequence_parallel": True}}),
        later("custom", (1, 3, 6), {}),
    ],
)  # fmt: skip
def test_scores_are_those_of_one_micro_batch_at_a_time(
    world, corpus: Path, scheme: str, mesh: tuple[int, int, int], sections: dict[str, Any]
) -> None:
    """To the last bit."""
    tensor, pipeline, processes = mesh
    parallel = {"pipeline": pipeline, **sections.get("parallel", {})}
    train = {"micro_batch_size": 1, "global_batch_size": 12}
    config = config_of(corpus, scheme, tensor, **{**sections, "parallel": parallel, "train": train})
    for alone, together in world(processes).run(score_both, config):
        assert alone[1] == 1 and together[1] == IN_FLIGHT * pipeline
        assert alone[0] == together[0] and "loss=" in alone[0]


def outputs_of_pairs(config: Config) -> list[list[Any]]:
    """Outputs of an encoder-decoder on this rank, one micro batch at a time and several."""
    mesh, schedules = mesh_of(config), Schedules(config)
    model = build_model(config, mesh, schedules)
    batches: list[MicroBatch] = [
        collate(*make_pairs(2, seed=i), first=2 * i, multiple=2) for i in range(5)
    ]
    found = []
    for size in (1, 64):
        cut = mock.patch.object(evaluate, "islice", lambda some, n, s=size: islice(some, min(n, s)))
        with torch.no_grad(), cut:
            ran = list(
                run_batches(
                    model, mesh, lambda n: schedules.forward(None, True, n), batches, [], None
                )
            )
        assert [batch.sample_ids_B.tolist() for batch, _, _ in ran] == [
            batch.sample_ids_B.tolist() for batch in batches
        ]
        found.append([x for _, x, _ in ran])
    return found


def test_lengths_of_pairs_may_differ(world) -> None:
    """Each micro batch has its own lengths of source and target."""
    config = pair_config(
        DENSE, DENSE, "fp32", parallel={"pipeline": 2},
        train={"global_batch_size": 8, "micro_batch_size": 2},
    )  # fmt: skip
    first, last = world(2).run(outputs_of_pairs, config)
    assert all(x is None for outputs in first for x in outputs)
    assert len({x.shape for x in last[0]}) > 1
    assert all(torch.equal(a, b) for a, b in zip(*last, strict=True))


def test_one_process_reads_one_micro_batch_at_a_time(corpus: Path) -> None:
    """It needs no more memory than before."""
    config = config_of(corpus, "cycle", 1, train={"micro_batch_size": 1})
    data = open_data(config, Mesh())
    schedules = Schedules(data.config)
    model, read = build_model(data.config, Mesh(), schedules), [0]

    def batches() -> Any:
        for batch in data.loader.batch(0):
            read[0] += 1
            yield batch

    schedule = lambda n: schedules.forward(None, True, n)  # noqa: E731
    for number, _ in enumerate(run_batches(model, Mesh(), schedule, batches(), [], None), 1):
        assert read[0] == number
    data.close()
