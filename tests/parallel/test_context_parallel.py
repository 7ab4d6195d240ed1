"""Context parallelism: the same losses, gradients, checkpoints and texts as one process."""

import pytest
from support.harness import compare
from support.meshes import config_of, reference, trace

DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}

COVERING = [
    ("reuse_map", 2, {"context": 2}, {"model": DROPOUT}),
    ("loop", 4, {"context": 4}, {"model": {**DROPOUT, "attention_bias": "all"}}),
]


@pytest.mark.parametrize(("scheme", "processes", "parallel", "extra"), COVERING)
def test_ranks_equal_one_process(world, corpus, scheme, processes, parallel, extra) -> None:
    config = config_of(corpus, scheme, 1, **{"parallel": parallel, **extra})
    compare(world(processes).run(trace, config, 5)[0], reference(config, 5))
