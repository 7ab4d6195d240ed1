"""Checkpoints of tensors whose values follow from name and step, cut in every layout."""

import contextlib
import time
from math import prod

import torch
import torch.distributed as dist
import xxhash

from megarecur.checkpoint.checkpoint import (
    TensorShard,
    boxes,
    find_checkpoint,
    load,
    read_state,
    save,
)
from megarecur.checkpoint.retention import remove_old
from megarecur.config.checkpoint import CheckpointConfig

TENSORS = {
    "blocks.0.attention.query.weight": ((12, 7), torch.bfloat16),
    "blocks.0.attention.query.weight.exp_avg": ((12, 7), torch.float32),
    "blocks.1.norm.weight": ((9,), torch.float64),
    "blocks.1.loops.2.lora_a": ((5, 3, 4), torch.float32),
    "token_counts": ((6,), torch.int64),
    "mask": ((3, 5), torch.bool),
    "step": ((), torch.int64),
    "nothing": ((0, 4), torch.float32),
}


LAYOUTS = ("rows", "columns", "zero", "replicated", "owner", "mixed")


def value(name, step, scale=1):
    """The whole tensor `name` as it is at `step`; `scale` multiplies its first dim."""
    shape, dtype = TENSORS[name]
    shape = (shape[0] * scale, *shape[1:]) if shape else shape
    seed = xxhash.xxh32_intdigest(f"{name} {step}")
    return torch.randint(-99, 99, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rectangles(layout, name, shape, rank, size):
    """The (offset, sizes) of `name` that `rank` owns under `layout`."""
    everything = [((0,) * len(shape), shape)]
    place = list(TENSORS).index(name)
    if layout == "mixed":
        layout = LAYOUTS[place % 5]
    if layout == "owner":
        return everything if place % size == rank else None
    if layout == "replicated" or not shape:
        return everything
    if layout == "zero":
        count = -(-prod(shape) // size)  # cuts inside rows; the last slices may be empty
        return boxes(shape, count * rank, min(count * (rank + 1), prod(shape)))
    dim = 0 if layout == "rows" else len(shape) - 1
    edges = [shape[dim] * r // size for r in (rank, rank + 1)]
    offset, sizes = [0] * len(shape), list(shape)
    offset[dim], sizes[dim] = edges[0], edges[1] - edges[0]
    return [(tuple(offset), tuple(sizes))]


def cut(whole, offset, sizes):
    return whole[tuple(slice(o, o + s) for o, s in zip(offset, sizes, strict=True))]


def make_shards(layout, rank=0, size=1, step=None, scale=1):
    """What a rank owns at `step`; with None, tensors to be loaded into."""
    shards = {}
    for name in TENSORS:
        whole = value(name, step or 0, scale)
        found = rectangles(layout, name, tuple(whole.shape), rank, size)
        if found is not None:
            parts = [
                (o, s, cut(whole, o, s) if step is not None else cut(torch.zeros_like(whole), o, s))
                for o, s in found
            ]
            shards[name] = TensorShard(tuple(whole.shape), parts)
    return shards


def assert_step(shards, step, scale=1):
    for name, shard in shards.items():
        for offset, sizes, tensor in shard.chunks:
            assert torch.equal(tensor, cut(value(name, step, scale), offset, sizes)), name


def place():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def save_steps(root, *steps):
    for step in steps:
        save(root, step, make_shards("mixed", *place(), step=step), {"step": step}).result()


def run_on(world, size, case, *args):
    return [case(*args)] if size == 1 else world(size).run(case, *args)


def flip(file, position, bit=0):
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


def wait_for_new(root, since, suffixes=("", ".tmp")):
    """Until a step's folder has changed; any step, as a busy machine may look when one is gone."""
    deadline = time.monotonic() + 200  # a new world on a busy machine imports for long

    def changed(path):
        with contextlib.suppress(FileNotFoundError):
            return path.name[13:] in suffixes and path.stat().st_mtime > since

    while not any(changed(path) for path in root.glob("step-*")):
        assert time.monotonic() < deadline, f"{root} has nothing new"
        time.sleep(0.001)


def check_survivors(root, oldest):
    """The newest good checkpoint holds one step's values; returns its step."""
    path, messages = find_checkpoint(root)
    assert not messages
    if path is None:
        assert oldest == 0
        return 0
    step = read_state(path)["step"]
    assert path.name == f"step-{step:08d}" and step >= oldest
    shards = make_shards("columns")
    load(path, shards)
    assert_step(shards, step)
    remove_old(root, CheckpointConfig(keep_last=2))
    assert not list(root.glob("*.tmp"))
    return step


def names(root):
    return sorted(p.name for p in root.iterdir())
