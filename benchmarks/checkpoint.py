"""Cost of saving during training, and speed of saving and loading against a plain copy.

    python benchmarks/checkpoint.py [beside] [copy] [--steps 200] [--rounds 7] [--folder /dev/shm]

beside: a model of 14M unique parameters (hidden 384, 6 blocks run twice each, fp32 AdamW) takes
steps of 2 x 64 tokens and saves its 171 MB every 50 steps, in the background. It prints the share
of the time for which training was blocked, and the median step during a save against the median
step at other times of the same run.

copy: 1 GiB in 64 tensors, saved with `save` (planned, hashed, fsynced, renamed) and loaded into
existing tensors with `load` (hashed, compared), against writing the same bytes to one file with
fsync, and reading that file into the same tensors; `find` only verifies. The sides alternate;
medians of the rounds are printed. On tmpfs, where the disk costs nothing, the figures show the cost
of the software.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megarecur.checkpoint import checkpoint
from megarecur.checkpoint.saving import Saver
from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.model.transformer import Transformer
from megarecur.optim.plain import PlainEngine
from megarecur.parallel.mesh import Mesh
from megarecur.parallel.shards import whole
from megarecur.recurrence.schemes import layer_map

EVERY, BATCH, LENGTH, VOCABULARY = 50, 2, 64, 8192
NUM_TENSORS, ROWS, COLUMNS = 64, 2048, 2048


def make_config(run_dir: Path) -> Config:
    """Return the config of the run that saves."""
    return Config.model_validate({
        "run_dir": str(run_dir),
        "model": {"hidden_size": 384, "num_heads": 6, "ffn_hidden_size": 1088,
                  "vocab_size": VOCABULARY},
        "recurrence": {"kind": "reuse_map", "reuse_map": [2] * 6},
        "data": {"train": [{"path": "none"}], "tokenizer": "bytes", "seq_length": LENGTH},
        "optimizer": {"lr": 1e-4},
        "train": {"steps": 1, "global_batch_size": BATCH, "micro_batch_size": BATCH},
        "checkpoint": {"every": EVERY, "keep_last": 1},
    })  # fmt: skip


def make_step(config: Config, engine: PlainEngine) -> Callable[[], float]:
    """Return a function that runs one optimizer step on random tokens and returns its seconds."""
    generator = torch.Generator().manual_seed(0)
    tokens_BS, labels_BS = torch.randint(VOCABULARY, (2, BATCH, LENGTH), generator=generator)
    positions_BS = torch.arange(LENGTH).expand(BATCH, LENGTH)
    zeros_BS = torch.zeros_like(tokens_BS)
    ids_B = torch.arange(BATCH)
    batch = MicroBatch(
        tokens_BS, labels_BS, positions_BS, zeros_BS, ids_B, torch.zeros_like(ids_B), True
    )
    model, steps = engine.model, layer_map(config.recurrence)

    def step() -> float:
        began = time.perf_counter()
        ctx = model.context(batch, step=0, training=True)
        x, _ = model.run(steps, model.embed(batch.tokens_BS, ctx), ctx, {})
        engine.backward(model.loss(x, batch)["loss"].total / (BATCH * LENGTH))
        engine.step(config.optimizer.lr)
        return time.perf_counter() - began

    return step


def measure_beside(folder: Path, steps: int) -> None:
    """Train for `steps` steps, save every EVERY steps, and print the cost of the saves."""
    config = make_config(folder / "run")
    mesh = Mesh()
    engine = PlainEngine(Transformer(config), config, mesh)
    step = make_step(config, engine)
    for _ in range(5):
        step()
    alone: list[float] = []
    meanwhile: list[float] = []
    blocked = []
    with Saver(folder / "run", config, mesh) as saver:
        saver.prepare(engine.shards())
        began = time.perf_counter()
        for number in range(1, steps + 1):
            under_way = saver.handle is not None and not saver.handle.done()
            (meanwhile if under_way else alone).append(step())
            if number % EVERY == 0:
                before = time.perf_counter()
                saver.save(number, engine.shards(), {"step": number})
                blocked.append(time.perf_counter() - before)
        total = time.perf_counter() - began
        saver.finish()
    size = sum(t.nbytes for s in engine.shards().values() for *_, t in s.chunks)
    usual, slow = statistics.median(alone), statistics.median(meanwhile or [0.0])
    lost = sum(meanwhile) - usual * len(meanwhile)
    each = ", ".join(f"{1e3 * b:.0f}" for b in blocked)
    print(
        f"beside training, in {folder}: {size / 1e6:,.0f} MB every {EVERY} steps\n"
        f"  blocked {each} ms by the saves, {100 * sum(blocked) / total:.2f} % of the time; "
        f"the last writing took {saver.write_seconds:.2f} s\n"
        f"  step {1e3 * usual:.0f} ms alone ({len(alone)}), {1e3 * slow:.0f} ms while writing "
        f"({len(meanwhile)}): {100 * (slow / usual - 1):+.0f} %, {100 * lost / total:.1f} % of all"
    )


def memory(tensor: Tensor) -> memoryview:
    """Return a view of a tensor's bytes."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def write_plainly(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the bytes of the tensors to one file, with fsync."""
    with open(path, "xb", buffering=0) as file:
        for tensor in tensors.values():
            view = memory(tensor)
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())


def read_plainly(path: Path, tensors: dict[str, Tensor]) -> None:
    """Read the bytes of that file into the tensors."""
    with open(path, "rb", buffering=0) as file:
        for tensor in tensors.values():
            view = memory(tensor)
            while view:
                view = view[file.readinto(view) :]


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of one call, in seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure_copy(folder: Path, rounds: int) -> None:
    """Alternate the sides, and print medians."""
    tensors = {f"blocks.{i}.weight": torch.randn(ROWS, COLUMNS) for i in range(NUM_TENSORS)}
    shards = {name: whole(tensor) for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    file, root = folder / "plain", folder / "checkpoints"
    path = root / "step-00000001"
    times: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        for name, work in {
            "plain write": lambda: write_plainly(file, tensors),
            "save": lambda: checkpoint.save(root, 1, shards, {}).result(),
            "plain read": lambda: read_plainly(file, tensors),
            "load": lambda: checkpoint.load(path, shards),
            "find": lambda: checkpoint.find_checkpoint(root),
        }.items():
            times.setdefault(name, []).append(seconds(work))
        file.unlink()
        shutil.rmtree(root)
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    print(f"against a plain copy, in {folder}: {size / 2**30:.1f} GiB, medians of {rounds}")
    for ours, theirs in (("save", "plain write"), ("load", "plain read"), ("find", "plain read")):
        rates = [size / median[name] / 1e9 for name in (ours, theirs)]
        print(
            f"  {ours:4} {rates[0]:5.2f} GB/s   {theirs:11} {rates[1]:5.2f} GB/s   "
            f"ratio {rates[0] / rates[1]:.2f}"
        )


def main() -> None:
    """Run the parts named on the command line, or both if none is named."""
    words = sys.argv[1:]
    given = {"--steps": "200", "--rounds": "7", "--folder": "/dev/shm"}
    given |= {word: words[words.index(word) + 1] for word in given if word in words}
    parts = {"beside", "copy"} & set(words) or {"beside", "copy"}
    with tempfile.TemporaryDirectory(dir=given["--folder"]) as folder:
        if "beside" in parts:
            measure_beside(Path(folder), int(given["--steps"]))
        if "copy" in parts:
            measure_copy(Path(folder), int(given["--rounds"]))


if __name__ == "__main__":
    main()
