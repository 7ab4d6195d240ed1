"""Early exits: losses after each loop, on any mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import compare
from test_tensor_parallel import SEQUENCE, build, config_of, later, reference, trace

from megarecur.config.schema import Config

CYCLE = {"kind": "cycle", "num_blocks": 2, "depth": 6}
DISTILLED = {"coefficient": 0.3, "distill": True, "distill_weight": 0.7}
LOOP = {"kind": "loop", "prelude": 1, "core": 2, "coda": 0, "num_loops": 3}


def exits_of(corpus: Path, tensor: int = 1, exits: Any = DISTILLED, **sections: Any) -> Config:
    recurrence = sections.pop("recurrence", CYCLE)
    exits = {"exits": exits} if exits is not None else {}
    return config_of(corpus, "cycle", tensor, recurrence=recurrence, **exits, **sections)


DROPOUT = {"dropout": 0.1}
MESHES = [
    # processes, sections
    (2, {"tensor": 2}, {"model": {"z_loss": 1e-3, **DROPOUT}}),
    (2, {"tensor": 2, "sequence_parallel": True}, {"model": DROPOUT, "recurrence": LOOP}),
    (2, {"pipeline": 2}, {"model": DROPOUT}),
    (4, {"pipeline": 2, "tensor": 2}, {"train": {"recompute": True}, "model": {"tie_embeddings": False}}),
    (2, {"zero_stage": 1}, {"model": DROPOUT}),
    (2, {"zero_stage": 2}, {"train": {"recompute": True}}),
    (2, {"zero_stage": 3}, {"train": {"recompute": True}, "model": DROPOUT}),
    (2, {"zero_stage": 3}, {"model": {"tie_embeddings": False}}),
    (4, {"pipeline": 2, "zero_stage": 1}, {"recurrence": LOOP, "exits": {"mode": "weighted"}}),
]  # fmt: skip


@pytest.mark.parametrize(("processes", "parallel", "extra"), MESHES)
def test_exits_on_any_mesh_equal_one_process(world, corpus, processes, parallel, extra) -> None:
    train = {"micro_batch_size": 1, "global_batch_size": 4, **extra.get("train", {})}
    config = exits_of(corpus, parallel.get("tensor", 1), parallel=parallel,
                      **{**extra, "train": train})  # fmt: skip
    compare(world(processes).run(trace, config, 4)[0], reference(config, 4))
