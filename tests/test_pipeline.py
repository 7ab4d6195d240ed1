"""Pipeline parallelism with one owner per block: the same losses and gradients as one process."""

from pathlib import Path
from typing import Any

import pytest
from harness import compare
from test_tensor_parallel import config_of, reference, trace

DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}


def piped(corpus: Path, scheme: str, pipeline: int, micro: int = 1, **sections: Any):
    """A parity config of `micro` micro batches per replica of one."""
    tensor = sections.get("parallel", {}).get("tensor", 1)
    sections["parallel"] = {"pipeline": pipeline, **sections.get("parallel", {})}
    return config_of(corpus, scheme, tensor, **sections)


COVERING = [
    ("dense", 2, 2, {}),
    ("cycle", 2, 2, {"model": DROPOUT}),
    ("cycle_reverse", 2, 2, {"model": DROPOUT}),
    ("sequence", 2, 4, {}),
    ("reuse_map", 2, 2, {}),
    ("block_recurrence", 2, 2, {"model": DROPOUT}),
    ("loop", 3, 3, {"model": DROPOUT}),
    ("custom", 3, 3, {"model": {"tie_embeddings": False}}),
]


@pytest.mark.parametrize(("scheme", "pipeline", "processes", "extra"), COVERING)
def test_ranks_equal_one_process(world, corpus, scheme, pipeline, processes, extra) -> None:
    train = {"micro_batch_size": 1, "global_batch_size": 4}
    config = piped(corpus, scheme, pipeline, train=train, **extra)
    compare(world(processes).run(trace, config, 5)[0], reference(config, 5))
