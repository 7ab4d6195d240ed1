"""Nothing between the first forward pass of a step and the norm of its gradients waits for the
device, except for what `plan.waits` names.

Meta tensors stand in for those of a GPU: they have no values, so that every read of one is an
error, and every copy between them and the CPU is seen. What CUDA itself would do is not tested.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support.configs import make_config
from support.pairs import make_pair_batch, pair_config
from support.pictures import make_pictures, picture_config
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megarecur.attention.plan import Choice
from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.data.open import open_data
from megarecur.launch.check import describe_waits
from megarecur.model.transformer import Transformer
from megarecur.optim import plain as engines
from megarecur.optim.plain import PlainEngine
from megarecur.parallel.mesh import Mesh
from megarecur.plan.waits import find_waits
from megarecur.train.step import forward_backward

CPU, META = torch.device("cpu"), torch.device("meta")

READS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2",
    "unique_dim", "repeat_interleave",
}  # fmt: skip
"""Operations that read values, or whose result has a size that depends on values."""


class Waits(TorchDispatchMode):
    """Counter of waits for the device, by the function of megarecur that does it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        """Copies to the device that wait for nothing (`parallel.transfer.send`)."""
        self.constants = Constants(self.found)

    def __enter__(self) -> Waits:
        self.constants.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.constants.__exit__(*error)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, function._schema.name.removeprefix("aten::")
        masked = [
            t for t in tree_leaves(args[1:2]) if isinstance(t, Tensor) and t.dtype == torch.bool
        ]
        if name in READS or (name.startswith("index") and masked):
            self.found[f"{name} in {caller()}"] += 1
        # Numbers that kernels take as arguments are tensors of the CPU without dims.
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim]
        devices = {t.device.type for t in read} | {str(kwargs.get("device") or "")} - {""}
        if read and len(devices) > 1:
            kind = self.sent if kwargs.get("non_blocking") else self.found
            kind[f"{name} in {caller()}"] += 1
        return function(*args, **kwargs)


class Constants(TorchFunctionMode):
    """Counts tensors made of numbers of the host; torch copies none of them to meta."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if function in (torch.tensor, torch.as_tensor) and device not in (None, "cpu", CPU):
            self.found[f"tensor in {caller()}"] += 1
        return function(*args, **kwargs)


def caller() -> str:
    """The innermost function of megarecur on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.startswith("megarecur.") and module != "megarecur.parallel.transfer":
            return f"{module.removeprefix('megarecur.')}.{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


def take_steps(
    config: Config, device: torch.device, attention: str | None, made: Sequence[MicroBatch] = ()
) -> tuple[Waits, ...]:
    """Return the waits of each of two steps over `made`, or over micro batches of the config's
    corpus; on the CPU, their updates included."""
    data, mesh = None if made else open_data(config, Mesh()), Mesh(device=device)
    config = config if data is None else data.config
    model = Transformer(config, device)
    if attention is not None:
        model.attention = Choice(attention, "the test's")  # type: ignore[arg-type]
    engine, seen = PlainEngine(model, config, mesh), []
    for step in range(2):
        read = made if data is None else data.loader.batch(step)
        batches = [batch.to(device) for batch in read]
        with Waits() as waits:
            result = forward_backward(model, engine, config, batches, step, mesh, step == 1)
            engine.reduce() if device == META else engine.step(1e-3)
        engine.reduced = False  # A step ends.
        assert result.losses["loss"].device == device
        seen.append(waits)
    return tuple(seen)


DROP = {"dropout": 0.1, "z_loss": 1e-4}
SAMPLED = {
    "kind": "loop", "prelude": 1, "core": 1, "coda": 1, "injection": "linear",
    "initial_state": "random", "num_loops": {"sampler": "uniform", "min": 1, "max": 4},
}  # fmt: skip
DISTILLED = {"coefficient": 0.3, "distill": True}
CASES: dict[str, dict[str, Any]] = {
    "dense": {"recurrence": {"kind": "dense", "num_layers": 1}, "model": DROP},
    "one document": {"scheme": "cycle", "data": {"mask_documents": False}},
    "recompute": {"scheme": "loop", "model": DROP, "train": {"recompute": True}},
    "selective": {"scheme": "cycle", "train": {"recompute": "selective"}},
    "sampled": {"recurrence": SAMPLED, "model": DROP},
    "exits": {"scheme": "block_recurrence", "exits": DISTILLED, "model": DROP},
    "alibi, windows": {"model": {"positions": "alibi", "sliding_window": 8}},
    "bf16": {"scheme": "loop", "model": DROP, "train": {"precision": "bf16"}},
}  # fmt: skip


TABLE = "_to_copy in parallel.random.draw_keys"


def config_of(corpus: Path, sections: dict[str, Any]) -> Config:
    """A short run of two micro batches a step."""
    train = {"global_batch_size": 4, **sections.get("train", {})}
    data = {"seq_length": 16, **sections.get("data", {})}
    return make_config(corpus, **{**sections, "train": train, "data": data})


@pytest.mark.parametrize("case", CASES)
def test_nothing_waits_before_the_norm(corpus, monkeypatch, case) -> None:
    """One table of random keys is sent in a step, whatever the number of sites."""
    config = config_of(corpus, CASES[case])
    assert find_waits(config) == [] and describe_waits(config) == []
    monkeypatch.setattr(engines, "build_optimizers", lambda *args: [])  # None for meta.
    first, second = take_steps(config, META, "varlen")
    assert first.found == second.found == {}
    assert second.sent.pop("_to_copy in model.context.build_context", 0) in (0, 2)  # ALiBi's slopes
    assert second.sent == {TABLE: 1} and first.sent[TABLE] == 1


@pytest.mark.parametrize("case", ["pairs", "pictures"])
def test_other_inputs_wait_for_nothing_before_the_norm(monkeypatch, case) -> None:
    """Sentences with padding, which the decoder looks at, and pictures with labels of classes."""
    model = {"dropout": 0.1}
    if case == "pairs":
        layers = {"kind": "cycle", "num_blocks": 1, "depth": 2}
        config, made = pair_config(layers, layers, "fp32", model=model), [make_pair_batch(3)] * 2
    else:
        config = picture_config(precision="fp32", model=model)
        made = [make_pictures(config, 2)] * 2
    assert find_waits(config) == []
    monkeypatch.setattr(engines, "build_optimizers", lambda *args: [])
    first, second = take_steps(config, META, "varlen", made)
    assert first.found == second.found == {}
    assert second.sent[TABLE] == 1


def test_tables_of_segments_are_sent(corpus, monkeypatch) -> None:
    """Attention dropout on a GPU: tables of each micro batch are copied, but no copy waits."""
    config = config_of(corpus, {"scheme": "loop", "model": DROP | {"attention_dropout": 0.1}})
    monkeypatch.setattr(engines, "build_optimizers", lambda *args: [])
    first, second = take_steps(config, META, "segments")
    assert first.found == second.found == {}
    sent = {name.split()[-1] for name in first.sent | second.sent}
    assert {"parallel.random.draw_keys", "attention.segments.table"} <= sent
    assert sent <= {"parallel.random.draw_keys", "attention.segments.table",
                    "attention.documents.to"}  # fmt: skip


@pytest.mark.parametrize("case", ["exits", "sampled"])
def test_a_step_reads_the_norm_alone(corpus, case) -> None:
    for waits in take_steps(config_of(corpus, CASES[case]), CPU, None):
        assert waits.found == {"_local_scalar_dense in optim.plain.norm": 1}


UNIVERSAL = {"kind": "universal", "depth": 3, "halting": {"mode": "token"}}
NAMED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "halting": (
        {"recurrence": UNIVERSAL, "data": {"seq_length": 64}},
        {"model.halting.begin_step", "model.halting.drop_halted", "model.documents.find_documents"},
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_what_waits_is_named(corpus, case) -> None:
    sections, places = NAMED[case]
    config = config_of(corpus, sections)
    assert [line.split(".")[1] for line in find_waits(config)] == [case]
    assert case in str(describe_waits(config)[0])
    for waits in take_steps(config, CPU, None):
        assert {n.split()[-1] for n in waits.found} == places | {"optim.plain.norm"}


def test_the_mode_sees_faults() -> None:
    here, there = torch.ones(2), torch.ones(2, device=META)
    faults = (
        lambda: here.sum().item(), lambda: bool(here.any()), lambda: here[here > 0],
        lambda: there.tolist(), lambda: there.cpu(), lambda: here.to(META),
        lambda: there.copy_(here), lambda: torch.tensor([1, 2], device=META),
    )  # fmt: skip
    for fault in faults:
        # Meta tensors have no values to read.
        with suppress(RuntimeError, NotImplementedError), Waits() as waits:
            fault()
        assert waits.found.total() >= 1
