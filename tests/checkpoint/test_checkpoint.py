"""Checkpoints: any mesh to any mesh, through crashes, flipped bits, full disks, hostile files."""

import copy
import errno
import itertools
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from math import prod

import pytest
import torch
import torch.distributed as dist
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from support.checkpoints import (
    LAYOUTS,
    TENSORS,
    assert_step,
    check_survivors,
    cut,
    flip,
    make_shards,
    names,
    place,
    run_on,
    save_steps,
    wait_for_new,
)
from support.harness import World

from megarecur import files
from megarecur.checkpoint.checkpoint import (
    TensorShard,
    boxes,
    find_checkpoint,
    load,
    read_state,
    save,
    verify,
)
from megarecur.checkpoint.index import (
    MIGRATIONS,
    DamagedCheckpoint,
    StateRecord,
    read_index,
    seal,
    unseal,
)
from megarecur.checkpoint.retention import remove_old
from megarecur.checkpoint.storage import ChunkReader
from megarecur.config.checkpoint import CheckpointConfig
from megarecur.errors import CheckpointError
from megarecur.parallel.shards import tiling_fault


def save_layouts(root):
    for layout in LAYOUTS:
        shards = make_shards(layout, *place(), step=7)
        save(root / layout, 7, shards, {"step": 7, "layout": layout}).result()


def load_layouts(paths, part, num_parts):
    """Load every path in every `num_parts`-th layout, in turn."""
    for i, path in enumerate(paths):
        for layout in LAYOUTS[(i // len(LAYOUTS) + part) % num_parts :: num_parts]:
            shards = make_shards(layout, *place())
            load(path, shards)
            assert_step(shards, 7)


# ------------------------------------------------------------------------------------ rectangles


@given(
    st.lists(st.integers(1, 6), max_size=4).map(tuple),
    st.lists(st.integers(0, 1300), min_size=1, max_size=6),
)
@settings(max_examples=300)
def test_boxes_are_the_flat_slice_in_order(shape, cuts):
    whole = torch.arange(prod(shape)).view(shape)
    edges = [0, *sorted(min(c, prod(shape)) for c in cuts), prod(shape)]
    tiles = []
    for start, stop in itertools.pairwise(edges):
        found = boxes(shape, start, stop)
        assert len(found) <= max(2 * len(shape) - 1, 1)
        flat = [cut(whole, offset, sizes).reshape(-1) for offset, sizes in found]
        assert torch.equal(
            torch.cat([torch.empty(0, dtype=torch.int64), *flat]), torch.arange(start, stop)
        )
        tiles += found
    assert tiling_fault(shape, tiles) == ""
    assert "hold" in tiling_fault(shape, tiles[1:])
    if len(tiles) > 1:  # then the volume may be right
        assert tiling_fault(shape, [*tiles[1:], tiles[-1]])


# ---------------------------------------------------------------------------- any mesh to any mesh


@pytest.mark.parametrize("num_parts", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_every_mesh_loads_every_other(world, tmp_path, num_parts):
    for size in (1, 2, 4):
        run_on(world, size, save_layouts, tmp_path / str(size))
    paths = [tmp_path / str(n) / layout / "step-00000007" for n in (1, 2, 4) for layout in LAYOUTS]
    for part, size in enumerate((1, 2, 4)):
        run_on(world, size, load_layouts, paths, part, num_parts)


def test_files_are_plain_safetensors_and_hold_replicas_once(world, tmp_path):
    world(4).run(save_steps, tmp_path, 3)
    path = tmp_path / "step-00000003"
    assert not verify(path)
    assert read_state(path) == {"step": 3}
    assert unseal(tmp_path / "latest") == "step-00000003"
    elements = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                name = key.partition("[")[0]
                tensor = tensors.get_tensor(key)
                assert tensor.dtype == TENSORS[name][1]
                elements += tensor.numel()
    assert elements == sum(prod(shape) for shape, _ in TENSORS.values())


def test_parameters_and_views(tmp_path):
    weight = torch.nn.Parameter(torch.randn(6, 4))
    turned = weight.detach().t()
    shards = {
        "w": TensorShard((6, 4), [((0, 0), (6, 4), weight)]),
        "t": TensorShard((4, 6), [((0, 0), (4, 6), turned)]),
    }
    path = save(tmp_path, 0, shards, {}).result()
    loaded = torch.nn.Parameter(torch.zeros(6, 4))
    target = torch.zeros(6, 4).t()
    load(
        path,
        {
            "w": TensorShard((6, 4), [((0, 0), (6, 4), loaded)]),
            "t": TensorShard((4, 6), [((0, 0), (4, 6), target)]),
        },
    )
    assert torch.equal(loaded, weight) and torch.equal(target, turned)
    assert loaded.grad_fn is None and loaded.requires_grad


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for owner, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(owner, name, refuse)
    path, _ = find_checkpoint(tmp_path)
    load(path, make_shards("mixed"))


# ----------------------------------------------------------------- what must not be saved or loaded


def save_wrong(root, fault):
    rank, _ = place()
    half = torch.zeros(4, 6)
    shard = {
        "plain": TensorShard((4, 6), [((0, 0), (4, 6), half[:, : 6 - rank])]),
        "unmarked": TensorShard((8, 6), [((0, 0), (4, 6), half)]),  # each claims the top
        "unequal": TensorShard((4, 6), [((0, 0), (4 - rank, 6), half[: 4 - rank])]),
        "overlap": TensorShard((8, 6), [((3 * rank, 0), (4, 6), half)]),
        "outside": TensorShard((8, 6), [((5 * rank, 0), (4, 6), half)]),
        "dtype": TensorShard(
            (8, 6), [((4 * rank, 0), (4, 6), half.to((torch.float32, torch.float16)[rank]))]
        ),
        "shape": TensorShard((8 + rank, 6), [((4 * rank, 0), (4, 6), half)]),
        "complex": TensorShard((8, 6), [((4 * rank, 0), (4, 6), half.to(torch.complex64))]),
    }[fault]
    handle = save(root, 1, {"w": shard}, {})
    assert handle.done()
    try:
        handle.result()
    except CheckpointError as error:
        return str(error), sorted(p.name for p in root.iterdir()) if root.exists() else []
    return None


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("plain", "is given as"),
        ("unmarked", "24 of 48 elements"),
        ("unequal", "overlap"),
        ("overlap", "overlap"),
        ("outside", "does not fit"),
        ("dtype", "disagree"),
        ("shape", "disagree"),
        ("complex", "cannot be saved"),
    ],
)
def test_wrong_shards_are_refused_on_every_rank(world, tmp_path, fault, reason):
    answers = world(2).run(save_wrong, tmp_path / "c", fault)
    (message, _), (same, _) = answers
    assert message == same and "w: " in message and reason in message
    assert not list((tmp_path / "c").glob("*")) if (tmp_path / "c").exists() else True


def load_wrong(path):
    shards = make_shards("rows", *place())
    del shards["mask"], shards["step"]
    if place()[0] == 0:
        shards["blocks.9.weight"] = TensorShard((2,), [((0,), (2,), torch.zeros(2))])
    shards["token_counts"] = TensorShard((8,), [((0,), (8,), torch.zeros(8, dtype=torch.int64))])
    norm = shards["blocks.1.norm.weight"]
    ((offset, sizes, tensor),) = norm.chunks
    shards["blocks.1.norm.weight"] = TensorShard(
        norm.global_shape, [(offset, sizes, tensor.float())]
    )
    with pytest.raises(CheckpointError) as caught:
        load(path, shards)
    assert not any(t.any() for shard in shards.values() for _, _, t in shard.chunks)
    return str(caught.value)


@pytest.mark.parametrize("size", [1, 2])
def test_all_mismatches_are_listed_together(world, tmp_path, size):
    save_steps(tmp_path, 1)
    messages = run_on(world, size, load_wrong, tmp_path / "step-00000001")
    assert len(set(messages)) == 1
    assert [line.strip() for line in messages[0].splitlines()[1:]] == [
        "blocks.9.weight: not in the checkpoint",
        "mask: in the checkpoint, not in this run",
        "step: in the checkpoint, not in this run",
        "blocks.1.norm.weight: torch.float64 in the checkpoint, torch.float32 here",
        "token_counts: shape [6] in the checkpoint, [8] here",
    ]


def test_partial_load_takes_what_it_asks_for(tmp_path):
    save_steps(tmp_path, 1)
    shards = {name: s for name, s in make_shards("rows").items() if name.startswith("blocks")}
    load(tmp_path / "step-00000001", shards, partial=True)
    assert_step(shards, 1)


def test_state_that_is_not_json_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"state of .* is not JSON"):
        save(tmp_path, 1, make_shards("rows", step=1), {"bad": {1, 2}}).result()
    assert not list(tmp_path.iterdir())


def test_an_intact_checkpoint_is_not_overwritten_but_a_damaged_one_is(tmp_path):
    save_steps(tmp_path, 1)
    with pytest.raises(CheckpointError, match="step-00000001 exists and is intact"):
        save_steps(tmp_path, 1)
    flip(tmp_path / "step-00000001" / "rank-00000.safetensors", -1)
    assert find_checkpoint(tmp_path)[0] is None
    save_steps(tmp_path, 1)
    assert find_checkpoint(tmp_path) == (tmp_path / "step-00000001", [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]


# ----------------------------------------------------------------------------------- flipped bytes


def test_a_flipped_bit_anywhere_is_found_and_named(world, tmp_path):
    root = tmp_path / "good"
    world(2).run(save_steps, root, 1, 2)
    newest = root / "step-00000002"
    rng = random.Random(1)
    for file in sorted(newest.iterdir()):
        original = file.read_bytes()
        positions = {0, 1, 7, 8, len(original) - 1, *rng.sample(range(len(original)), 25)}
        for position in sorted(positions):
            flip(file, position, rng.randrange(8))
            damage = verify(newest)
            assert damage and str(file) in damage[0], (file, position)
            header = int.from_bytes(original[:8], "little") + 8
            if file.suffix == ".safetensors" and position >= header:
                assert any(f"checksum mismatch in {name}" in damage[0] for name in TENSORS)
            if file.suffix == ".safetensors":
                with pytest.raises(CheckpointError, match=file.name):
                    load(newest, make_shards("rows"))
            path, (message,) = find_checkpoint(root)
            assert path == root / "step-00000001" and file.name in message
            file.write_bytes(original)
    assert find_checkpoint(root) == (newest, [])


def test_every_byte_of_the_sealed_lines_is_guarded(tmp_path):
    save_steps(tmp_path, 1)
    for file in (tmp_path / "latest", tmp_path / "step-00000001" / "index.xxh3"):
        original = file.read_bytes()
        for position in range(len(original)):
            flip(file, position, position % 8)
            with pytest.raises(CheckpointError, match=file.name):
                unseal(file)
            file.write_bytes(original)
    flip(tmp_path / "latest", 5)
    path, (message,) = find_checkpoint(tmp_path)
    assert path == tmp_path / "step-00000001" and str(tmp_path / "latest") in message


@pytest.mark.parametrize("size", [1, 4])
def test_ranks_agree_on_the_newest_good_one(world, tmp_path, size):
    world(4).run(save_steps, tmp_path, 1, 2, 3)
    (tmp_path / "step-00000004.tmp").mkdir()
    os.truncate(tmp_path / "step-00000003" / "rank-00001.safetensors", 1000)
    (tmp_path / "step-00000002" / "rank-00002.safetensors").unlink()
    answers = run_on(world, size, find_checkpoint, tmp_path)
    assert all(answer == answers[0] for answer in answers)
    path, (truncated, missing) = answers[0]
    assert path == tmp_path / "step-00000001"
    assert "rank-00001.safetensors: 1000 bytes long" in truncated and "holds" in truncated
    assert "rank-00002.safetensors is missing" in missing


def test_no_checkpoint_at_all(tmp_path):
    assert find_checkpoint(tmp_path / "none") == (None, [])
    with pytest.raises(CheckpointError, match=r"index\.xxh3 is missing"):
        read_state(tmp_path)


# ----------------------------------------------------------------------------------- hostile files


def first_chunk(index):
    return index["tensors"]["token_counts"]["chunks"][0]


def add_overlap(index):
    """A chunk twice and another not at all: the volume is right."""
    tensor = index["tensors"]["blocks.1.norm.weight"]
    tensor["chunks"][1] = copy.deepcopy(tensor["chunks"][0])


HOSTILE = {
    "traversal": lambda i: first_chunk(i).update(file="../../etc/passwd"),
    "absolute": lambda i: i["files"].update({"/etc/passwd": i["files"].popitem()[1]}),
    "newline": lambda i: first_chunk(i).update(file="rank-00000.safetensors\n"),
    "negative": lambda i: first_chunk(i).update(offset=[-1]),
    "huge_bytes": lambda i: first_chunk(i).update(bytes=[0, 2**50]),
    "huge_shape": lambda i: i["tensors"]["token_counts"].update(shape=[2**50]),
    "dtype": lambda i: i["tensors"]["token_counts"].update(dtype="os.system"),
    "other_dtype": lambda i: i["tensors"]["token_counts"].update(dtype="F32"),
    "overlap": add_overlap,
    "hole": lambda i: i["tensors"]["blocks.1.norm.weight"]["chunks"].pop(),
    "unlisted": lambda i: first_chunk(i).update(file="rank-00009.safetensors"),
    "text": lambda i: first_chunk(i).update(offset=["0"]),
    "true": lambda i: first_chunk(i).update(offset=[False]),
    "fraction": lambda i: first_chunk(i).update(bytes=[0.0, 48.0]),
    "unknown_key": lambda i: i.update(run="rm -rf"),
    "other_format": lambda i: i.update(format="other"),
    "list": lambda i: i.update(tensors=[]),
}


def rewrite_index(path, body):
    (path / "index.json").write_bytes(body)
    (path / "index.xxh3").write_bytes(seal(xxhash.xxh3_128_hexdigest(body)))


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_index_is_refused(world, tmp_path, attack):
    world(2).run(save_steps, tmp_path, 1)
    path = tmp_path / "step-00000001"
    index = json.loads((path / "index.json").read_text())
    HOSTILE[attack](index)
    rewrite_index(path, json.dumps(index).encode())
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load(path, make_shards("rows"))
    assert verify(path) and find_checkpoint(tmp_path)[0] is None


@pytest.mark.parametrize("body", [b"", b"[" * 100_000, b"[]", b"{", b"\xff\xfe", b"1" * 5000])
def test_hostile_json_is_refused(tmp_path, body):
    save_steps(tmp_path, 1)
    rewrite_index(tmp_path / "step-00000001", body)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_state(tmp_path / "step-00000001")


def test_a_consistent_lie_about_size_allocates_nothing(tmp_path):
    save_steps(tmp_path, 1)
    path = tmp_path / "step-00000001"
    index = json.loads((path / "index.json").read_text())
    file = index["files"]["rank-00000.safetensors"]
    last = max(
        ((t, c) for t in index["tensors"].values() for c in t["chunks"]),
        key=lambda p: p[1]["bytes"],
    )
    grown = (last[1]["bytes"][0] - file["bytes"]) + 8 * 2**50
    last[0].update(dtype="U8", shape=[grown + file["bytes"] - last[1]["bytes"][0]])
    last[1].update(offset=[0], shape=last[0]["shape"])
    last[1]["bytes"][1] = last[1]["bytes"][0] + last[0]["shape"][0]
    file["bytes"] = last[1]["bytes"][1]
    rewrite_index(path, json.dumps(index).encode())
    assert any("bytes long" in line for line in verify(path))


def test_other_versions_migrate_or_are_refused_by_name(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    path = tmp_path / "step-00000001"
    index = json.loads((path / "index.json").read_text())
    rewrite_index(path, json.dumps(index | {"version": 99}).encode())
    with pytest.raises(CheckpointError, match=r"version 99; .* upgrade"):
        find_checkpoint(tmp_path)  # not damaged: an older one must not be taken instead
    rewrite_index(path, json.dumps(index | {"version": 0}).encode())
    with pytest.raises(CheckpointError, match="version 0, which is no longer read"):
        read_state(path)
    monkeypatch.setitem(
        MIGRATIONS,
        0,
        lambda raw: raw | {"version": 1, "state": {"migrated": True}},
    )
    assert read_state(path) == {"migrated": True}


# ---------------------------------------------------------------------------------- crashes, disks


def save_until_killed(root, step):
    while True:
        save_steps(root, step)
        if place()[0] == 0:
            remove_old(root, CheckpointConfig(keep_last=2))
        dist.barrier()
        step += 1


@pytest.mark.parametrize(
    ("kills", "seed"), [(3, 0), *[pytest.param(5, s, marks=pytest.mark.slow) for s in (1, 2, 3, 4)]]
)
def test_killed_ranks_leave_a_good_checkpoint(tmp_path, kills, seed):
    rng = random.Random(seed)
    step = 0
    for _ in range(kills):
        world, since = World(4), time.time()
        world.submit(save_until_killed, tmp_path, step + 1)
        wait_for_new(tmp_path, since)
        time.sleep(rng.uniform(0, 0.4))
        os.kill(world.pids[rng.randrange(4)], 9)
        outcomes = world.collect(timeout=30)
        assert all(error for error, _ in outcomes)
        step = check_survivors(tmp_path, step)
    assert step > 0


def save_on_full_disk(root, full_rank, room):
    """Let writes of one rank fail as on a full disk once `room` bytes are written."""
    whole, left = files.write_all, [room]

    def write_all(file, data, path):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        whole(file, data, path)

    if place()[0] == full_rank:
        files.write_all = write_all
    try:
        save_steps(root, 2)
    except CheckpointError as error:
        return str(error)
    finally:
        files.write_all = whole
    return None


@pytest.mark.parametrize(
    "full_rank, room, file",
    [
        (2, 0, "rank-00002.safetensors"),
        (1, 500, "rank-00001.safetensors"),
        (0, 2500, "index.json"),
        (0, 8000, "latest.tmp"),
    ],
)
def test_full_disk_is_one_error_and_loses_nothing(world, tmp_path, full_rank, room, file):
    world(4).run(save_steps, tmp_path, 1)
    if file == "latest.tmp":  # just not enough for the last file
        first = tmp_path / "step-00000001"
        room = sum((first / f).stat().st_size for f in ("rank-00000.safetensors", "index.json"))
        room += (first / "index.xxh3").stat().st_size + 10
    messages = world(4).run(save_on_full_disk, tmp_path, full_rank, room)
    assert len(set(messages)) == 1
    assert messages[0].startswith(f"cannot save {tmp_path}")
    assert "no space left" in messages[0] and file in messages[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert find_checkpoint(tmp_path) == (tmp_path / "step-00000001", [])
    world(4).run(save_steps, tmp_path, 2)
    assert find_checkpoint(tmp_path) == (tmp_path / "step-00000002", [])


FULL_DISK_SCRIPT = """
import sys; from pathlib import Path; import torch
from megarecur.errors import CheckpointError
from megarecur.checkpoint.checkpoint import TensorShard, save, find_checkpoint
root, kept = Path(sys.argv[1]), torch.arange(250_000.0)
shards = {"w": TensorShard((250_000,), [((0,), (250_000,), kept)])}
save(root, 1, shards, {}).result()
try:
    save(root, 2, shards, {}).result()
except CheckpointError as error:
    assert "no space left" in str(error) and "rank-00000.safetensors" in str(error), error
    assert find_checkpoint(root) == (root / "step-00000001", [])
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000001"]
    print("refused")
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["size=1500k", "nr_inodes=7"])
def test_a_disk_that_is_really_full(tmp_path, limit):
    """On a small tmpfs, in a mount namespace of its own."""
    if not shutil.which("unshare"):
        pytest.skip("needs unshare(1)")
    inside = f'mount -t tmpfs -o {limit} none "{tmp_path}" || exit 77; exec "$@"'
    namespaces = ["unshare", "--mount"] + (["--user", "--map-root-user"] if os.getuid() else [])
    command = [*namespaces, "sh", "-c", inside, "sh", sys.executable, "-c", FULL_DISK_SCRIPT]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=600)
    if done.returncode in (1, 77) and "Traceback" not in done.stderr:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    assert done.stdout.strip() == "refused", done.stderr


# --------------------------------------------------------------------------------------- retention


def test_retention_keeps_the_newest_and_sweeps(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4)
    (tmp_path / "step-00000005.tmp").mkdir()
    (tmp_path / "step-00000005.tmp" / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / "latest.tmp").write_bytes(b"half")
    (tmp_path / "notes.tmp").write_bytes(b"a user's own")
    remove_old(tmp_path, CheckpointConfig(keep_last=2))
    assert names(tmp_path) == ["latest", "notes.tmp", "step-00000003", "step-00000004"]
    remove_old(tmp_path, CheckpointConfig(keep_last=9))
    assert len(names(tmp_path)) == 4
    remove_old(tmp_path / "none", CheckpointConfig(keep_last=1))


def test_retention_never_removes_the_newest_good_one(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4)
    for step in (3, 4):
        flip(tmp_path / f"step-0000000{step}" / "rank-00000.safetensors", -1)
    remove_old(tmp_path, CheckpointConfig(keep_last=1))
    assert names(tmp_path) == ["latest", "step-00000002", "step-00000004"]
    assert find_checkpoint(tmp_path)[0] == tmp_path / "step-00000002"


WRONG = [None, True, -1, 1.5, 1 << 70, "x", [], [1], {}, {"a": 1}]
FREE = {
    "order_hash": (None, "x"), "tokenizer": (None, "x"), "config": (None, {}, {"a": 1}),
    "interval": ({}, {"a": 1}), "data": ({}, {"a": 1}), "versions": ({}, {"a": 1}),
    "mesh": ({}, {"a": 1}), "layer_map": ([], [1], {}, {"a": 1}),
    "hugging_face": ({}, {"a": 1}),
}  # fmt: skip
"""Values among WRONG that an entry of the state may have."""
NESTED = {
    ("hugging_face", "eos_token_id"): (None, -1, [], [1]),
    ("hugging_face", "bos_token_id"): (None, -1),
    ("hugging_face", "pad_token_id"): (None, -1),
    ("hugging_face", "dtypes"): ({},),
    ("config", "model"): ({}, {"a": 1}), ("config", "data"): ({}, {"a": 1}),
    ("config", "train"): ({}, {"a": 1}),
}  # fmt: skip


def test_no_entry_of_the_state_has_a_wrong_type(tmp_path):
    """As a crafted checkpoint has it, with checksums that fit."""
    save_steps(tmp_path, 1)
    path = tmp_path / "step-00000001"
    index = json.loads((path / "index.json").read_text())
    places = {(key,): FREE.get(key, ()) for key in StateRecord.model_fields} | NESTED
    for keys, free in places.items():
        for wrong in WRONG:
            inner = {keys[1]: wrong} if len(keys) == 2 else wrong
            index["state"] = {"step": 1, keys[0]: inner}
            rewrite_index(path, json.dumps(index).encode())
            if any(type(wrong) is type(value) and wrong == value for value in free):
                assert read_state(path)[keys[0]] == inner
                continue
            with pytest.raises(CheckpointError, match=rf"index\.json: .*{keys[-1]}"):
                read_state(path)


def test_no_chunk_is_allocated_before_its_file_is_measured(tmp_path):
    """An index that claims terabytes fails by the size of the file."""
    save_steps(tmp_path, 1)
    path = tmp_path / "step-00000001"
    index = json.loads((path / "index.json").read_text())
    name, huge, digest = "rank-00000.safetensors", 1 << 45, "0" * 16
    index["files"] = {name: {"bytes": 8 + huge, "header_bytes": 8, "header_xxh3": digest}}
    chunk = {"offset": [0], "shape": [huge], "file": name, "bytes": [8, 8 + huge], "xxh3": digest}
    index["tensors"] = {"mask": {"dtype": "U8", "shape": [huge], "chunks": [chunk]}}
    rewrite_index(path, json.dumps(index).encode())
    found = read_index(path)
    damage = pytest.raises(DamagedCheckpoint, match=r"rank-00000\.safetensors: \d+ bytes long")
    with ChunkReader(path, found) as reader, damage:
        reader.read("mask", found.tensors["mask"].chunks[0])


def test_a_pipe_in_place_of_an_index_does_not_hang(tmp_path):
    save_steps(tmp_path, 1)
    path = tmp_path / "step-00000001"
    for name in ("index.json", "index.xxh3"):
        (path / name).unlink()
        os.mkfifo(path / name)
        with pytest.raises(DamagedCheckpoint, match="is no regular file"):
            read_index(path)
