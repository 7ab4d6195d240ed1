"""Pipeline parallelism with one owner per block: the same losses and gradients as one process."""

from pathlib import Path
from typing import Any

import pytest
from harness import compare
from test_tensor_parallel import SEQUENCE, check_same_run, config_of, reference, trace

from megarecur.config.schema import Config
from megarecur.train.trainer import FINISHED, train

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


MESHES = [
    # scheme, (tensor, pipeline, processes), ZeRO stage, sections
    ("cycle", (1, 2, 4), 1, {"model": DROPOUT}),
    ("cycle_reverse", (2, 2, 4), 0, {**SEQUENCE, "model": DROPOUT}),
    ("loop", (2, 2, 4), 1, {**SEQUENCE, "model": DROPOUT}),
    ("reuse_map", (1, 2, 4), 2, {"train": {"recompute": True}}),
    ("dense", (1, 2, 2), 1, {"model": {"positions": "learned", "norm": "layer"}}),
]


@pytest.mark.parametrize(("scheme", "mesh", "stage", "extra"), MESHES)
def test_pipelines_with_other_axes(world, corpus, scheme, mesh, stage, extra) -> None:
    tensor, pipeline, processes = mesh
    parallel = {"tensor": tensor, "zero_stage": stage, **extra.get("parallel", {})}
    train = {"micro_batch_size": 1, "global_batch_size": 6, **extra.get("train", {})}
    config = piped(corpus, scheme, pipeline, **{**extra, "train": train, "parallel": parallel})
    compare(world(processes).run(trace, config, 5)[0], reference(config, 5))


# -------------------------------------------------------------------------------------- whole runs


def run_of(corpus: Path, run_dir: Path, steps: int, pipeline: int, **parallel: Any) -> Config:
    train = {
        "steps": steps,
        "sample_prompts": ["def ", "str"],
        "sample_tokens": 8,
        "eval_every": 2,
        "eval_depths": [1, 4],
    }
    parallel = {"pipeline": pipeline, **parallel}
    sections = {"parallel": parallel, "train": train, "checkpoint": {"every": 2}}
    return config_of(corpus, "loop", parallel.get("tensor", 1), run_dir=str(run_dir), **sections)


def test_a_pipelined_run_evaluates_talks_and_goes_on_on_other_meshes(
    world, corpus, tmp_path
) -> None:
    alone, mesh = tmp_path / "alone", tmp_path / "mesh"
    assert train(run_of(corpus, alone, 8, 1)) == FINISHED
    on_four = run_of(corpus, mesh, 4, 2, tensor=2, sequence_parallel=True)
    on_three = run_of(corpus, mesh, 6, 3)
    assert set(world(4).run(train, on_four)) == {FINISHED}
    assert set(world(3).run(train, on_three)) == {FINISHED}
    assert train(run_of(corpus, mesh, 8, 1)) == FINISHED
    check_same_run(alone, mesh, 8)
