"""Averages of checkpoints against numpy, what reads them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import megarecur
from support.exports import REUSE_MAP, write_run

from megarecur.checkpoint import checkpoint
from megarecur.checkpoint.index import read_index
from megarecur.checkpoint.initial import load_initial
from megarecur.checkpoint.load import load_model, read_parameters
from megarecur.config.load import load_config
from megarecur.config.run import Config
from megarecur.convert.merge import merge_checkpoints
from megarecur.data.tokenizer import tokenizer_fingerprint
from megarecur.model.transformer import Transformer
from megarecur.optim.build import build_engine
from megarecur.parallel.mesh import Mesh
from megarecur.parallel.shards import TensorShard, whole
from megarecur.recurrence.inventory import build_inventory

STEPS = (10, 20, 30, 40)


def values_at(config: Config, step: int) -> dict[str, np.ndarray[Any, Any]]:
    """The parameters of a step: small and large ones, so that the order of sums shows."""
    random = np.random.default_rng(step)
    return {
        name: (random.normal(size=spec.shape) * 10.0 ** (step / 10)).astype(np.float32)
        for name, spec in build_inventory(config).items()
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of four checkpoints with moments, in two chunks each."""
    folder = tmp_path / "run"
    config = write_run(
        folder, REUSE_MAP, step=0, adapters={"rank": 2}, vocab_size=257, tie_embeddings=False
    )
    for step in STEPS:
        shards = {}
        for name, values in values_at(config, step).items():
            tensor = torch.from_numpy(values)
            half = tensor.shape[0] // 2
            parts = [
                ((0,) * tensor.ndim, (half, *tensor.shape[1:]), tensor[:half]),
                ((half, *(0,) * (tensor.ndim - 1)), tuple(tensor[half:].shape), tensor[half:]),
            ]
            shards[name] = TensorShard(tuple(tensor.shape), parts)
            shards["exp_avg." + name] = whole(tensor)
        state = {
            "step": step, "tokens": 5 * step, "tokenizer": tokenizer_fingerprint("bytes"),
            "config": config.model_dump(mode="json"),
        }  # fmt: skip
        checkpoint.save(folder / "checkpoints", step, shards, state).result()
    return folder


@pytest.mark.parametrize(
    ("choice", "steps"), [({"last": 3}, (20, 30, 40)), ({"steps": [40, 10]}, (10, 40))]
)
def test_average_is_that_of_numpy(
    run: Path, tmp_path: Path, choice: dict[str, Any], steps: tuple[int, ...]
) -> None:
    path = merge_checkpoints(run, tmp_path / "out", **choice)
    model, loaded = load_model(tmp_path / "out")
    assert loaded.checkpoint == path and path.name == f"step-{steps[-1]:08d}"
    assert loaded.state["tokens"] == 5 * steps[-1]
    assert loaded.state["merged"] == {"run": str(run), "steps": list(steps)}
    assert set(checkpoint.read_names(path)) == set(build_inventory(loaded.config))
    every = [values_at(loaded.config, step) for step in steps]
    for name, parameter in model.parameters_by_name.items():
        mean = np.mean(np.stack([each[name] for each in every]).astype(np.float64), axis=0)
        assert parameter.dtype == torch.float32
        np.testing.assert_array_equal(parameter.detach().numpy(), mean.astype(np.float32))


def test_a_new_run_starts_from_it(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge_checkpoints(run, out, last=2)
    config = load_config(out / "config.yaml")
    assert config.run_dir == str(out)
    config = config.model_copy(update={"init_from": str(out)})
    model = Transformer(config)
    engine = build_engine(model, config, Mesh())
    load_initial(config, engine, tokenizer_fingerprint("bytes"), Mesh())
    expected = {n: torch.zeros_like(p) for n, p in model.parameters_by_name.items()}
    read_parameters(out / "checkpoints/step-00000040", expected)
    for name, parameter in model.parameters_by_name.items():
        assert torch.equal(parameter, expected[name])


def test_memory_holds_a_tensor_and_not_a_model(run: Path, tmp_path: Path) -> None:
    config = load_config(run / "config.yaml")
    sizes = [8 * np.prod(spec.shape) for spec in build_inventory(config).values()]
    seen: list[int] = []
    merge_checkpoints(run, tmp_path / "out", last=4, advance=seen.append)
    assert sum(seen) == 2 * 4 * sum(sizes) / 2  # each checkpoint is checked and read
    live: list[int] = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out.is_meta:
                live.append(out.numel() * out.itemsize)
            return out

    with Counting():
        merge_checkpoints(run, tmp_path / "again", last=4)
    assert live and max(live) <= max(sizes)


def test_the_command_prints_the_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code, printed, _ = megarecur(capsys, "merge", run, "--steps", "10,20", "--out", out)
    assert code == 0 and printed.strip() == str(out / "checkpoints/step-00000020")
    assert json.loads((out / "origin.json").read_text())["run_dir"] == str(out)
    code, printed, _ = megarecur(capsys, "generate", out, "a", "--max-new-tokens", "2")
    assert code == 0 and printed.startswith("a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--last", "9"], "has 5 checkpoint(s), fewer than --last 9 (kept: 0, 10, 20, 30, 40)"),
        (["--last", "0"], "--last 0: must be at least 1"),
        (["--steps", "10,25,35"], "has no checkpoint of step 25, 35 (kept: 0, 10,"),
        (["--steps", "10,10"], "--steps 10,10: must name different steps"),
        (["--steps", "ten"], "--steps ten: must be numbers such as 100,200"),
        ([], "needs --last N or --steps 100,200"),
        (["--last", "1", "--steps", "10"], "needs --last N or --steps 100,200"),
    ],
)
def test_wrong_choices_are_refused(
    run: Path, tmp_path: Path, options: list[str], message: str, capsys: Any
) -> None:
    code, _, error = megarecur(capsys, "merge", run, *options, "--out", tmp_path / "out")
    assert code == 2 and message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_every_damaged_checkpoint_is_named(run: Path, tmp_path: Path, capsys: Any) -> None:
    for step, name in ((20, "head.weight"), (30, "exp_avg.head.weight"), (40, "final_norm.weight")):
        folder = run / f"checkpoints/step-{step:08d}"
        chunk = read_index(folder).tensors[name].chunks[-1]
        content = bytearray((folder / chunk.file).read_bytes())
        content[chunk.bytes[0]] ^= 1
        (folder / chunk.file).write_bytes(content)
    code, _, error = megarecur(capsys, "merge", run, "--last", 3, "--out", tmp_path / "out")
    assert code == 2 and "choose others with --steps" in error
    lines = error.splitlines()[1:]  # Moments are not read, so that step 30 is usable.
    assert len(lines) == 2 and "step-00000020" in lines[0] and "step-00000040" in lines[1]
    assert "checksum mismatch in head.weight" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    code, _, _ = megarecur(capsys, "merge", run, "--steps", "10,30", "--out", tmp_path / "out")
    assert code == 0


def test_an_existing_folder_stays(run: Path, tmp_path: Path, capsys: Any) -> None:
    code, _, error = megarecur(capsys, "merge", run, "--last", 2, "--out", run)
    assert code == 2 and "exists and is not empty" in error
    code, _, error = megarecur(capsys, "merge", tmp_path, "--last", 2, "--out", tmp_path / "out")
    assert code == 2 and "is no run folder" in error
