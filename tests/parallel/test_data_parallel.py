"""Data-parallel processes against one process: losses, raw gradients, norms; and planted faults."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.configs import SCHEMES, make_config
from support.harness import Trace, WorldError, compare

from megarecur.config.run import Config
from megarecur.data.open import open_data
from megarecur.model.transformer import Transformer
from megarecur.optim.plain import PlainEngine
from megarecur.parallel.mesh import Mesh, build_mesh
from megarecur.train.step import forward_backward

SHARED = "blocks.0.attention.query.weight"


def trace_with(config: Config, num_steps: int, fault: str = "") -> Trace:
    """(loss, raw gradients, norm, skipped) of each optimizer step on this rank's mesh."""
    mesh = build_mesh(config, torch.device("cpu")) if dist.is_initialized() else Mesh()
    data = open_data(config, mesh)
    model = Transformer(data.config)
    engine = PlainEngine(model, data.config, mesh)
    found: Trace = []
    for step in range(num_steps):
        batches = data.loader.batch(step)
        if fault == "microbatch dropped" and mesh.rank == mesh.dp - 1:
            batches = [*batches[:-1], batches[0]]
        grad = model.parameters_by_name[SHARED].grad
        if fault == "not finite" and mesh.rank == 0 and step == 1:
            grad[0, 0] = float("nan")  # Backward adds to it; afterwards a bucket may be under way.
        result = forward_backward(model, engine, config, batches, step, mesh)
        if fault == "shared gradient divided":
            engine.reduce()
            grad.div_(3)
        loss = float(mesh.sum_over_dp(result.losses["loss"].clone()))
        gradients = engine.gradients()
        norm, skipped = engine.step(config.optimizer.lr)
        found.append((loss, gradients if mesh.rank == 0 else {}, norm, skipped))
    return found


COVERING = [
    ("reuse_map", 2, 1, {}),
    ("cycle", 4, 2, {"model": {"dropout": 0.1, "attention_dropout": 0.1}}),
    ("loop", 2, 4, {"train": {"recompute": True}, "model": {"dropout": 0.1}}),
    ("block_recurrence", 4, 1, {"model": {"z_loss": 1e-3, "norm_position": "sandwich"}}),
    ("sequence", 2, 2, {"model": {"positions": "alibi", "tie_embeddings": False}}),
    ("cycle_reverse", 4, 1, {"model": {"positions": "learned", "norm": "layer"}}),
    ("dense", 4, 2, {"data": {"mask_documents": False}}),
    ("custom", 2, 1, {"model": {"feed_forward": "gelu", "attention_bias": "all"}}),
]


def dp_config(
    corpus: Path, scheme: str, micro: int, extra: dict, precision: str = "fp32"
) -> Config:
    """A parity config; small rates keep the two runs' rounding from growing."""
    sections = {name: dict(update) for name, update in extra.items()}
    train = {"steps": 10, "global_batch_size": 8, "micro_batch_size": micro}
    sections["train"] = {**train, "precision": precision, **sections.get("train", {})}
    return make_config(corpus, scheme, **sections)


@pytest.mark.parametrize(("scheme", "dp", "micro", "extra"), COVERING)
def test_processes_equal_one_over_ten_steps(world, corpus, scheme, dp, micro, extra) -> None:
    config = dp_config(corpus, scheme, micro, extra)
    compare(world(dp).run(trace_with, config, 10)[0], trace_with(config, 10), 2e-6, 2e-5)


@pytest.mark.parametrize(("scheme", "dp"), [("reuse_map", 2), ("loop", 4)])
def test_processes_equal_one_in_double_precision(world, corpus, scheme, dp) -> None:
    config = dp_config(corpus, scheme, 2, {"model": {"dropout": 0.1}}, "fp64")
    compare(world(dp).run(trace_with, config, 3)[0], trace_with(config, 3), 1e-11, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("dp", "precision"), [(2, "fp64"), (4, "fp32")])
def test_every_scheme_equals_one_process(world, corpus, scheme, dp, precision) -> None:
    config = dp_config(corpus, scheme, 1, {"model": {"dropout": 0.1}}, precision)
    first, later = (2e-6, 2e-5) if precision == "fp32" else (1e-11, 1e-11)
    compare(world(dp).run(trace_with, config, 10)[0], trace_with(config, 10), first, later)


@pytest.mark.parametrize("fault", ["shared gradient divided", "microbatch dropped"])
def test_planted_faults_are_caught(world, corpus, fault) -> None:
    config = dp_config(corpus, "reuse_map", 2, {})
    expected = trace_with(config, 1)
    compare(world(2).run(trace_with, config, 1)[0], expected, 2e-6, 2e-5)
    with pytest.raises(AssertionError) as caught:
        compare(world(2).run(trace_with, config, 1, fault)[0], expected, 2e-6, 2e-5)
    assert not isinstance(caught.value, WorldError)


@pytest.mark.parametrize("micro", [1, 4, 8])
def test_micro_batch_size_changes_nothing(corpus, micro) -> None:
    extra = {"model": {"dropout": 0.1, "z_loss": 1e-3}}
    expected = trace_with(dp_config(corpus, "reuse_map", 2, extra, "fp64"), 2)
    compare(
        trace_with(dp_config(corpus, "reuse_map", micro, extra, "fp64"), 2),
        expected,
        1e-11,
        1e-11,
    )


def test_a_gradient_that_is_not_finite_skips_the_step_on_every_rank(world, corpus) -> None:
    config = dp_config(corpus, "reuse_map", 2, {})
    for found in world(2).run(trace_with, config, 3, "not finite"):
        assert [skipped for *_, skipped in found] == [False, True, False]
    # The step after the skipped one starts from the weights before it.
    assert found[2][0] < found[0][0]
