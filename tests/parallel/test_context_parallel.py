"""Context parallelism: the same losses, gradients, checkpoints and texts as one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.configs import ENTRY
from support.harness import Trace, WorldError, compare
from support.meshes import (
    check_same_run,
    config_of,
    later,
    measure_activations,
    reference,
    trace,
    trace_both,
)

from megarecur.config.run import Config
from megarecur.data.open import with_vocab_size
from megarecur.model.context import Positions
from megarecur.parallel.context import ContextParallel
from megarecur.plan.cost import estimate_memory
from megarecur.recurrence.schemes import layer_map
from megarecur.train.metrics import read_rows
from megarecur.train.trainer import FINISHED, train

DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}
TENSOR = {"context": 2, "tensor": 2, "sequence_parallel": True}
SAMPLED = {
    "kind": "loop", "prelude": 1, "core": 1, "coda": 1, "backward_loops": 2,
    "num_loops": {"sampler": "poisson", "mean": 3, "min": 1, "max": 6},
}  # fmt: skip
RELAXED = {
    "recurrence": {"kind": "cycle", "num_blocks": 2, "depth": 4},
    "adapters": {"rank": 4, "norms": True},
    "exits": {"mode": "weighted"},
}

COVERING = [
    ("reuse_map", 2, {"context": 2}, {
        "model": {**DROPOUT, "sliding_window": 5, "qk_norm": True, "attention_softcap": 20.0},
        "recurrence": ENTRY, "train": {"recompute": "selective"},
    }),
    ("loop", 4, {"context": 4}, {"model": {**DROPOUT, "attention_bias": "all"},
                                 "train": {"recompute": True}}),
    ("loop", 4, TENSOR, {"model": {**DROPOUT, "num_kv_heads": 1, "positions": "learned"}}),
    ("dense", 4, {"context": 2}, {
        "model": {**DROPOUT, "num_kv_heads": 4, "positions": "alibi", "tie_embeddings": False,
                  "z_loss": 1e-3, "level_encoding": "sinusoidal"},
    }),
    ("cycle", 4, {"context": 2, "pipeline": 2}, {**RELAXED, "model": DROPOUT}),
    ("loop", 4, {"context": 2, "zero_stage": 3}, {
        "recurrence": SAMPLED,
        "model": {"positions": "sinusoidal", "num_kv_heads": 4},
    }),
    later("block_recurrence", 4, {"context": 4, "zero_stage": 2}, {"model": {
        "rope_scaling": {"kind": "dynamic", "factor": 2.0, "original_positions": 4},
    }}),
    later("cycle_reverse", 8, {"context": 2, "pipeline": 2, "tensor": 2}, {"model": DROPOUT}),
    later("dense", 2, {"context": 2}, {"train": {"attention": "dense"}, "model": DROPOUT}),
    later("dense", 2, {"context": 2, "zero_stage": 1}, {
        "recurrence": {"kind": "ring", "depth": 3, "level_rank": 8, "feed_forward_rank": 8},
        "model": {"positions": "xpos", "norm_position": "post"},
    }),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "processes", "parallel", "extra"), COVERING)
def test_ranks_equal_one_process(world, corpus, scheme, processes, parallel, extra) -> None:
    config = config_of(corpus, scheme, 1, **{"parallel": parallel, **extra})
    compare(world(processes).run(trace, config, 4)[0], reference(config, 4))


def test_double_precision_equals_to_the_last_digits(world, corpus) -> None:
    extra = {"train": {"precision": "fp64"}, "model": DROPOUT}
    config = config_of(corpus, "loop", 1, parallel={"context": 2}, **extra)
    compare(world(4).run(trace, config, 3)[0], reference(config, 3), 1e-11, 1e-11)


LONG = {
    "data": {"seq_length": 4096},
    "train": {"global_batch_size": 1, "micro_batch_size": 1},
    "recurrence": {"kind": "cycle", "num_blocks": 2, "depth": 3},
}


@pytest.mark.parametrize(
    ("processes", "parallel", "documents"),
    [
        (2, {"context": 2}, True),
        (4, {"context": 4}, False),
        (4, {"context": 2, "tensor": 2}, True),
        (4, {"context": 2, "pipeline": 2}, False),
    ],
)
def test_long_sequences_equal_one_process(world, corpus, processes, parallel, documents) -> None:
    data = {**LONG["data"], "mask_documents": documents}
    config = config_of(corpus, "dense", 1, **{**LONG, "data": data, "parallel": parallel})
    compare(world(processes).run(trace, config, 2)[0], reference(config, 2))


def test_a_compiled_block_exchanges_as_an_eager_one(world, corpus) -> None:
    config = config_of(corpus, "cycle", 1, parallel={"context": 2}, model=DROPOUT)
    compiled, eager = world(2).run(trace_both, config, 3)[0]
    assert compiled.graphs == 1
    compare(compiled.trace, eager.trace)
    compare(eager.trace, reference(config, 3))


# ------------------------------------------------------------------------------------------ faults


def local_rows(positions: Positions) -> tuple[torch.Tensor, torch.Tensor]:
    length = positions.cp.span(positions.index_BS.shape[1])[1]
    return positions.sample_ids_B[:, None], torch.arange(length)[None]


FAULTS: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "positions of dropout count from the rank's first": (Positions, "rows", local_rows),
    "mixed heads are not returned": (
        ContextParallel,
        "gather_heads",
        lambda cp, x: x.unflatten(1, (cp.size, -1)).movedim(1, 3).flatten(2, 3),
    ),
    "all ranks have the first labels": (
        ContextParallel,
        "own",
        lambda cp, values, dim=1: values.narrow(dim, 0, values.shape[dim] // cp.size),
    ),
}


def trace_with(config: Config, fault: str) -> Trace:
    with mock.patch.object(*FAULTS[fault]):
        return trace(config, 2)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(world, corpus, fault) -> None:
    config = config_of(corpus, "loop", 1, parallel={"context": 2}, model=DROPOUT)
    with pytest.raises(AssertionError) as caught:
        compare(world(2).run(trace_with, config, fault)[0], reference(config, 2))
    assert not isinstance(caught.value, WorldError)


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize(("context", "recompute"), [(2, "none"), (4, "none"), (4, "full")])
def test_activations_of_a_rank_are_its_share(world, corpus, context, recompute) -> None:
    """And the plan's figure is within a tenth of what autograd holds."""
    sections = {
        "recurrence": {"kind": "dense", "num_layers": 3},
        "model": {"num_kv_heads": 4},
        "data": {"seq_length": 256},
        "train": {"recompute": recompute, "micro_batch_size": 4},
    }

    def config(context: int) -> Config:
        return config_of(corpus, "dense", 1, parallel={"context": context}, **sections)

    whole, _ = measure_activations(config(1))
    for held, planned in world(context).run(measure_activations, config(context)):
        assert held == pytest.approx(whole / context, rel=0.15)
        assert planned == pytest.approx(held, rel=0.1)
    alone, shared = (
        estimate_memory(with_vocab_size(c, 257), layer_map(c.recurrence))
        for c in (config(1), config(context))
    )
    assert shared.activations == pytest.approx(alone.activations / context, rel=0.15)
    assert shared.logits == alone.logits // context and shared.moments == alone.moments


# -------------------------------------------------------------------------------------- whole runs


def run_of(corpus: Path, run_dir: Path, steps: int, **parallel: Any) -> Config:
    train = {
        "steps": steps, "sample_prompts": ["def ", "str"], "sample_tokens": 8, "eval_every": 2,
    }  # fmt: skip
    sections = {"parallel": parallel, "train": train, "checkpoint": {"every": 2}}
    data = {"train": [{"path": f"{corpus}/train"}, {"path": f"{corpus}/val"}]}
    return config_of(corpus, "loop", 1, run_dir=str(run_dir), data=data, **sections)


def test_a_run_evaluates_and_talks_and_goes_on_on_other_sizes(world, corpus, tmp_path) -> None:
    """Context 2 with a pipeline, then 4, then 1: the metrics and texts of one process."""
    alone, mesh = tmp_path / "alone", tmp_path / "mesh"
    assert train(run_of(corpus, alone, 6)) == FINISHED
    assert set(world(4).run(train, run_of(corpus, mesh, 2, context=2, pipeline=2))) == {FINISHED}
    on_four = run_of(corpus, mesh, 4, context=4, zero_stage=1)
    assert set(world(4).run(train, on_four)) == {FINISHED}
    assert train(run_of(corpus, mesh, 6)) == FINISHED
    check_same_run(alone, mesh, 6)
    rows = [read_rows(run / "metrics.jsonl") for run in (alone, mesh)]
    for row, other in zip(*rows, strict=True):
        assert row["tokens"] == other["tokens"]
        for key in row:
            if key.startswith(("val/", "speed/flops_per_token")):
                assert other[key] == pytest.approx(row[key], rel=2e-4), key
