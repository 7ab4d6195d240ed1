"""The same runs on a GPU; skipped, saying so, where there is none."""

import pytest
import torch
from support.configs import make_config
from support.harness import assert_gradients_close
from torch import nn

from megarecur.data.open import open_data
from megarecur.model.compile import CompiledModel
from megarecur.model.saved import CudaCopies
from megarecur.model.transformer import Transformer
from megarecur.optim.plain import PlainEngine
from megarecur.parallel.linear import Weight
from megarecur.parallel.mesh import Mesh
from megarecur.train.metrics import read_rows
from megarecur.train.step import forward_backward
from megarecur.train.trainer import FINISHED, train

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("mask_documents", [True, False])
@pytest.mark.parametrize("scheme", ["reuse_map", "loop"])
def test_gradients_equal_those_of_the_cpu(corpus, scheme, mask_documents) -> None:
    config = make_config(
        corpus, scheme, model={"dropout": 0.1}, train={"precision": "fp64"},
        data={"mask_documents": mask_documents},
    )  # fmt: skip
    found = []
    for device in ("cpu", "cuda"):
        mesh = Mesh(device=torch.device(device))
        data = open_data(config, mesh)
        engine = PlainEngine(Transformer(data.config, mesh.device), data.config, mesh)
        batches = [batch.to(mesh.device) for batch in data.loader.batch(0)]
        forward_backward(engine.model, engine, data.config, batches, 0, mesh)
        found.append({name: grad.cpu() for name, grad in engine.gradients().items()})
    assert_gradients_close(found[1], found[0], 1e-11)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_equals_eager(corpus, precision) -> None:
    config = make_config(corpus, "loop", train={"precision": precision})
    found = []
    for compiled in (False, True):
        mesh = Mesh(device=torch.device("cuda"))
        data = open_data(config, mesh)
        engine = PlainEngine(Transformer(data.config, mesh.device), data.config, mesh)
        made = CompiledModel(engine.model) if compiled else None
        for step in range(2):
            batches = [batch.to(mesh.device) for batch in data.loader.batch(step)]
            forward_backward(engine.model, engine, data.config, batches, step, mesh)
        found.append({name: grad.cpu() for name, grad in engine.gradients().items()})
    assert made is not None and made.graphs == 1
    assert_gradients_close(found[1], found[0], 1e-4 if precision == "fp32" else 3e-2)


def test_products_of_bf16_are_added_without_rounding() -> None:
    weight = Weight(nn.Parameter(torch.zeros(64, 48, device="cuda")), torch.bfloat16)
    weight.parameter.grad = torch.zeros_like(weight.parameter)
    dy, x = (torch.randn(256, n, device="cuda").to(torch.bfloat16) for n in (64, 48))
    with torch.no_grad():
        weight.add(dy, x)
    exact = dy.double().t() @ x.double()
    # One rounding to bf16 would be an error of 2e-3.
    assert (weight.parameter.grad - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full", {"loops": [0]}])
def test_moved_activations_return(corpus, monkeypatch, recompute, compiled) -> None:
    """However small: the same gradients as with everything kept on the device, or near them."""
    monkeypatch.setattr(CudaCopies, "leaves", lambda _, tensor: tensor.is_cuda)
    found = []
    for train_keys in (
        {},
        {"recompute": recompute},
        {"recompute": recompute, "offload_activations": True},
    ):
        config = make_config(corpus, "loop", model={"dropout": 0.1}, train=train_keys)
        mesh = Mesh(device=torch.device("cuda"))
        data = open_data(config, mesh)
        engine = PlainEngine(Transformer(data.config, mesh.device), data.config, mesh)
        assert (engine.model.host_copies is not None) == ("offload_activations" in train_keys)
        if compiled:
            CompiledModel(engine.model)
        for step in range(2):
            batches = [batch.to(mesh.device) for batch in data.loader.batch(step)]
            forward_backward(engine.model, engine, data.config, batches, step, mesh)
        found.append({name: grad.cpu() for name, grad in engine.gradients().items()})
    for gradients in found[1:]:
        assert_gradients_close(gradients, found[0], 1e-4)


@pytest.mark.parametrize("attention", ["auto", "segments"])
def test_nothing_waits_before_the_norm(corpus, attention) -> None:
    """CUDA's own check; `train/test_waits.py` has a stand-in for machines without a GPU."""
    config = make_config(
        corpus, "loop", model={"dropout": 0.1, "z_loss": 1e-4},
        train={"precision": "bf16", "attention": attention},
    )  # fmt: skip
    mesh = Mesh(device=torch.device("cuda"))
    data = open_data(config, mesh)
    engine = PlainEngine(Transformer(data.config, mesh.device), data.config, mesh)
    for step in range(3):
        batches = data.loader.batch(step)
        data.loader.prefetch(step + 1)
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            forward_backward(engine.model, engine, data.config, batches, step, mesh, step == 2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        norm, skipped = engine.step(1e-3)
        assert norm > 0.0 and not skipped


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_resumes_on_the_gpu(corpus, tmp_path, precision) -> None:
    for steps in (5, 10):
        config = make_config(
            corpus, run_dir=str(tmp_path / "run"), model={"dropout": 0.1},
            train={"device": "cuda", "precision": precision, "steps": steps},
        )  # fmt: skip
        assert train(config) == FINISHED
    rows = [r for r in read_rows(tmp_path / "run" / "metrics.jsonl") if "train/loss" in r]
    assert rows[-1]["step"] == 10 and rows[-1]["train/loss"] < rows[0]["train/loss"]
