"""Start, save and load at thousands of ranks, simulated without models on one machine.

    python benchmarks/scale.py [start] [save] [load] [descriptors] [--ranks 64 256 1024]
        [--real 64] [--lazily] [--draw]

Rank 0 runs megarecur's own code; what the other ranks would send it is made beforehand, so that its
time is that of one process. Times of the network are not included: the messages of a tree are at
most log2(N) deep. The state has 654 entries (218 parameters with two moments each) in two layouts:
`sliced`, in which every rank holds another slice of every entry, the worst case; `replicated`, in
which all ranks hold everything.

start: rank 0's share of meeting at the store, of opening the groups of a mesh (tensor 8, pipeline
4; torch's fake backend) and of judging the figures of the health check.
save: the first plan, the plan of a second save, the plan after one rank's layout has changed, and
the index. `held` is the longest time, in CPU time of the saving thread, for which it did not let
another thread run: that is how long training would stand still.
load: reading the index of the checkpoint that was saved, and planning one rank's reads.
descriptors: the most open files of each of 64 real processes during a whole run of two steps
(health check, groups of every kind, data, evaluation, two checkpoints), connected lazily and, as
gloo does by itself, all with all, unless --lazily. --real sets the number of processes.
--draw: extend the laws to 16,384 ranks in benchmarks/pictures/scale.png.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megarecur.checkpoint import planning
from megarecur.checkpoint.index import read_index
from megarecur.checkpoint.planning import SavePlanner, describe_layout, plan_reads
from megarecur.checkpoint.storage import FolderWriter
from megarecur.config.run import Config
from megarecur.config.train import HealthConfig
from megarecur.data_prep.readers import Reading
from megarecur.data_prep.shards import prepare_shards
from megarecur.parallel import mesh
from megarecur.parallel.mesh import agree_on_devices, build_mesh, meet
from megarecur.parallel.shards import TensorShard
from megarecur.train.health import Figures, find_faults, find_slow, report_health
from megarecur.train.signals import StopFlag
from megarecur.train.trainer import FINISHED, train

NUM_ENTRIES, ROWS, COLUMNS = 654, 16_384, 64
PARTS = ("start", "save", "load", "descriptors")
LAYOUTS = ("sliced", "replicated")
LIMIT = 16_384
"""Ranks to which the laws are drawn."""
Row = dict[str, float | str]


class Watch:
    """Seconds of a piece of work, and the longest time for which it kept the GIL."""

    def __init__(self) -> None:
        self.seconds = self.held = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        clock, over = time.pthread_getcpuclockid(threading.get_ident()), threading.Event()
        gaps = [0.0]

        def tick() -> None:
            last = time.clock_gettime(clock)
            while not over.is_set():
                time.sleep(0.001)
                now = time.clock_gettime(clock)
                gaps.append(now - last)
                last = now

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        began = time.thread_time()
        try:
            yield
        finally:
            self.seconds = time.thread_time() - began
            over.set()
            thread.join()
            self.held = max(gaps)


def measure(work: Callable[[], Any]) -> tuple[Any, Watch]:
    """Return what a piece of work returns, and its times."""
    watch = Watch()
    with watch():
        found = work()
    return found, watch


# ------------------------------------------------------------------------------------------- start


def config_of_mesh() -> Config:
    """Return a config whose groups are opened."""
    return Config.model_validate({
        "run_dir": "none", "optimizer": {"lr": 1e-3},
        "model": {"hidden_size": 64, "num_heads": 8, "ffn_hidden_size": 64, "vocab_size": 64},
        "recurrence": {"kind": "cycle", "num_blocks": 4, "depth": 8},
        "data": {"train": [{"path": "none"}], "tokenizer": "bytes", "seq_length": 16},
        "train": {"steps": 1, "global_batch_size": LIMIT, "micro_batch_size": 1},
        "parallel": {"tensor": 8, "pipeline": 4},
    })  # fmt: skip


def figures_of(rank: int) -> Figures:
    """Return what a sound process of an 8-GPU node would report."""
    return Figures(
        f"node-{rank // 8:05d}", rank, 1e-3, 2e-3, 3e-3, 4e-3, 10**12, f"GPU-{rank:032x}", 8, 2**36
    )


def simulate_start(size: int) -> Row:
    """Return the seconds of rank 0's share of a start."""
    store = dist.HashStore()
    for rank in range(1, size):
        store.set(f"here/{rank}", "")
        store.add("arrived", 1)
        store.set(f"device/{rank}", json.dumps([f"node-{rank // 8:05d}", "cpu", ""]))

    def gather() -> None:
        place = {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        with (
            mock.patch.dict(os.environ, place),
            mock.patch.object(mesh, "open_store", lambda *place: store),
            mock.patch.object(dist, "PrefixStore", lambda prefix, inner: inner),
        ):
            found, _ = meet(size)
            agree_on_devices(found, 0, size, "cpu", "")

    _, met = measure(gather)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        _, opened = measure(lambda: build_mesh(config_of_mesh(), torch.device("cpu")))
    finally:
        dist.destroy_process_group()
    sent = [json.dumps(asdict(figures_of(rank))).encode() for rank in range(size)]

    def judge() -> None:
        every, settings = [Figures(**json.loads(part)) for part in sent], HealthConfig()
        assert not find_faults(every) + find_slow(every, settings)
        report_health(every, [], [], 1.0)

    _, judged = measure(judge)
    return {"ranks": size, "meet, s": met.seconds, "groups, s": opened.seconds,
            "health, s": judged.seconds, "health bytes per rank": len(sent[0])}  # fmt: skip


# -------------------------------------------------------------------------------------------- save


def make_shards(layout: str, rank: int, size: int) -> dict[str, TensorShard]:
    """Return what a rank holds, without memory."""
    start, stop = 0, ROWS
    if layout == "sliced":
        start, stop = ROWS * rank // size, ROWS * (rank + 1) // size
    part = torch.empty(stop - start, COLUMNS, device="meta")
    chunk = ((start, 0), (stop - start, COLUMNS), part)
    return {
        f"blocks.{k // 27}.attention.part_{k}.weight": TensorShard((ROWS, COLUMNS), [chunk])
        for k in range(NUM_ENTRIES)
    }


class OtherRanks:
    """Messages of the ranks beside rank 0 while rank 0 plans."""

    def __init__(self, layouts: Sequence[bytes]) -> None:
        self.layouts = layouts
        self.changed = set(range(len(layouts)))
        self.asked: Sequence[bytes] = ()
        self.received = 0

    def gather(self, own: bytes, group: Any = None) -> list[bytes]:
        """Return stamps or, once ranks were asked, layouts."""
        if self.asked:
            parts = [own if a else b"" for a, own in zip(self.asked, self.layouts, strict=True)]
            self.asked = ()
        else:
            stamp = planning.xxhash.xxh3_128_digest
            parts = [stamp(b) if k in self.changed else b"" for k, b in enumerate(self.layouts)]
        self.received += sum(map(len, parts[1:]))
        return parts

    def scatter(self, parts: Sequence[bytes], group: Any = None) -> bytes:
        """Take what rank 0 sends."""
        if set(parts) <= {b"", b"x"}:
            self.asked = parts
        return parts[0]

    def reduce(self, values: torch.Tensor, group: Any = None) -> torch.Tensor:
        """Return the maximum over all ranks of the number that says whether a layout changed."""
        return torch.maximum(values, torch.tensor([int(bool(self.changed))]))

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Let planning talk to these ranks."""
        with (
            mock.patch.object(planning, "gather_bytes", self.gather),
            mock.patch.object(planning, "scatter_bytes", self.scatter),
            mock.patch.object(planning, "reduce_max", self.reduce),
        ):
            yield


def simulate_save(size: int, layout: str, root: Path) -> Row:
    """Return the figures of rank 0 in two saves of a world, and write its index."""
    shards = make_shards(layout, 0, size)
    own = describe_layout(shards)[0]
    layouts = [own] + [
        slice_of(own, rank, size) if layout == "sliced" else own for rank in range(1, size)
    ]
    gc.collect()
    gc.freeze()  # as training does
    others, planner = OtherRanks(layouts), SavePlanner()
    with others.patched():
        _, first = measure(lambda: planner.plan(shards, "cannot save"))
        first_bytes, others.received, others.changed = others.received, 0, set()
        _, second = measure(lambda: planner.plan(shards, "cannot save"))
        assert planner.num_plans == 1 and others.received == 0
        others.layouts = [*layouts[:-1], renamed(layouts[-1])] if layout == "sliced" else layouts
        others.changed = {size - 1}
        _, delta = measure(lambda: planner.plan(shards, "cannot save"))
        assert planner.num_plans == 2
        delta_bytes = others.received
    count = {rank: sum(len(e[3]) for e in entries) for rank, entries in planner.written()}
    assert sum(count.values()) == NUM_ENTRIES * (size if layout == "sliced" else 1)
    records = [bytes(8 * (2 + count[rank])) if rank in count else b"" for rank in range(size)]
    writer = FolderWriter(root / "step-00000001", {})
    writer.open_folder()
    _, index = measure(lambda: writer.finish(planner.written(), records))
    gc.unfreeze()
    return {
        "layout": layout, "ranks": size,
        "first plan, s": first.seconds, "held, s": first.held, "bytes per rank": first_bytes / size,
        "second plan, s": second.seconds, "held second, s": second.held,
        "changed plan, s": delta.seconds, "held changed, s": delta.held,
        "bytes of change": delta_bytes,
        "index, s": index.seconds, "held index, s": index.held,
        "index, MB": (writer.final / "index.json").stat().st_size / 1e6,
    }  # fmt: skip


def slice_of(first: bytes, rank: int, size: int) -> bytes:
    """Return a rank's layout, made from that of rank 0."""
    (start, sizes), text = (0, ROWS // size), planning.zlib.decompress(first).decode()
    box, start = f"[[[{start},0],[{sizes},{COLUMNS}]]]", sizes * rank
    made = text.replace(box, f"[[[{start},0],[{sizes},{COLUMNS}]]]")
    return planning.zlib.compress(made.encode(), 1)


def renamed(layout: bytes) -> bytes:
    """Return a layout with its entries in another order."""
    entries = json.loads(planning.zlib.decompress(layout))
    return planning.zlib.compress(json.dumps(entries[::-1]).encode(), 1)


# -------------------------------------------------------------------------------------------- load


def simulate_load(size: int, layout: str, path: Path) -> Row:
    """Return the seconds in which a rank reads the index and plans its reads on half the ranks."""
    index, read = measure(lambda: read_index(path))
    shards = make_shards(layout, 1, max(size // 2, 2))

    def plan() -> int:
        pairs = (plan_reads(index.tensors[name].chunks, shard) for name, shard in shards.items())
        return sum(len(found) for found in pairs)

    chunks, planned = measure(plan)
    return {"layout": layout, "ranks": size, "index, s": read.seconds,
            "reads, s": planned.seconds, "chunks read": chunks}  # fmt: skip


# ------------------------------------------------------------------------------------- descriptors


def config_of_run(folder: Path) -> Config:
    """Return a tiny run that opens groups of every kind, evaluates, and saves twice."""
    return Config.model_validate({
        "run_dir": f"{folder}/run", "optimizer": {"lr": 1e-3},
        "model": {"hidden_size": 32, "num_heads": 4, "ffn_hidden_size": 32},
        "recurrence": {"kind": "cycle", "num_blocks": 4, "depth": 8},
        "data": {"train": [{"path": f"{folder}/bytes/train"}],
                 "val": [{"path": f"{folder}/bytes/val"}], "tokenizer": "bytes",
                 "seq_length": 16},
        "train": {"steps": 2, "global_batch_size": 8, "micro_batch_size": 1, "device": "cpu",
                  "eval_every": 1, "eval_samples": 8, "eval_final": 8, "log_every": 1,
                  "sample_prompts": []},
        "health": {"enabled": True, "slow_factor": 1e6, "min_free_disk_gb": 0},
        "parallel": {"tensor": 2, "pipeline": 4, "zero_stage": 1, "shard_group": 2},
        "checkpoint": {"every": 1},
    })  # fmt: skip


def count_descriptors(rank: int, size: int, port: int, lazy: bool, folder: Path) -> None:
    """Train, and write the largest number of open files that this process had meanwhile."""
    torch.set_num_threads(1)
    os.environ.update(
        GLOO_SOCKET_IFNAME="lo", TORCH_GLOO_LAZY_INIT=str(int(lazy)), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
    )  # fmt: skip
    before, over = len(os.listdir("/proc/self/fd")), threading.Event()
    most = before

    def look() -> None:
        nonlocal most
        while not over.wait(0.1):
            most = max(most, len(os.listdir("/proc/self/fd")))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    code = train(config_of_run(folder), StopFlag())
    over.set()
    thread.join()
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    found = {"code": code, "open": most - before, "kilobytes": int(status)}
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


def measure_descriptors(size: int, lazy: bool) -> Row:
    """Return the open files per process of a real run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.utils.tensorboard", "__main__"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("\n\n".join(f"line {i} of a text" for i in range(1000)))
        reading = Reading(text_split="blank_line")
        prepare_shards([folder / "text.txt"], folder / "bytes", "bytes", reading,
                       val_fraction=0.1, workers=1)  # fmt: skip
        port = 20_000 + os.getpid() % 10_000 + lazy
        places = [(rank, size, port, lazy, folder) for rank in range(size)]
        processes = [context.Process(target=count_descriptors, args=place) for place in places]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        texts = [(folder / f"rank-{rank}.json").read_text() for rank in range(size)]
    ranks = [json.loads(text) for text in texts]
    assert all(rank["code"] == FINISHED for rank in ranks)
    found, largest = [rank["open"] for rank in ranks], max(rank["kilobytes"] for rank in ranks)
    return {"connected": "lazily" if lazy else "all with all", "ranks": size, "rank 0": found[0],
            "most of the others": max(found[1:]), "all": sum(found),
            "most resident MB": largest / 1e3}  # fmt: skip


# ----------------------------------------------------------------------------------------- results


def print_row(part: str, row: Row) -> None:
    """Print the figures of one simulation."""
    texts = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
    print(f"{part}: " + ", ".join(texts), flush=True)


CURVES = (
    ("save", "first plan, s", "first plan"),
    ("save", "changed plan, s", "plan after a change of one rank"),
    ("save", "index, s", "index"),
    ("save", "second plan, s", "plan of a second save"),
    ("load", "index, s", "reading the index"),
    ("load", "reads, s", "planning one rank's reads"),
    ("start", "groups, s", "opening groups"),
    ("start", "meet, s", "meeting at the store"),
    ("start", "health, s", "judging the health check"),
)


def draw(rows: dict[str, list[Row]], path: Path) -> None:
    """Draw times over ranks, and their laws, a + b N, to LIMIT ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 6.5), sharey=True)
    for place, layout in zip(axes, LAYOUTS, strict=True):
        for part, key, label in CURVES:
            points = [
                (int(row["ranks"]), max(float(row[key]), 1e-6))
                for row in rows[part]
                if row.get("layout", layout) == layout
            ]
            if len(points) < 2:
                continue
            (n1, t1), (n2, t2) = points[0], points[-1]
            slope = max((t2 - t1) / (n2 - n1), 0.0)
            (line,) = place.plot(*zip(*points, strict=True), "o")
            grid = [n1 * 2**k for k in range(20) if n1 * 2**k <= LIMIT]
            law = [t1 + slope * (n - n1) for n in grid]
            place.plot(grid, law, "--", color=line.get_color(), linewidth=1,
                       label=f"{label}: {float(f'{law[-1]:.2g}'):g} s")  # fmt: skip
        place.set_xscale("log", base=2)
        place.set_yscale("log")
        place.set_xticks([64, 256, 1024, 4096, 16384], ["64", "256", "1,024", "4,096", "16,384"])
        place.set_xlabel("ranks (dots: simulated; lines: a + b N)")
        place.set_title(f"{layout}: {NUM_ENTRIES} entries", fontsize=10)
        place.grid(alpha=0.3)
        place.legend(title=f"at {LIMIT:,} ranks", fontsize=8, title_fontsize=8,
                     loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)  # fmt: skip
    axes[0].set_ylabel("CPU seconds of rank 0 (load: of every rank)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--real", type=int, default=64)
    parser.add_argument("--lazily", action="store_true")
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    parts = options.parts or PARTS
    rows: dict[str, list[Row]] = {part: [] for part in PARTS}
    saves = "save" in parts or "load" in parts
    for size in options.ranks:
        if "start" in parts:
            rows["start"].append(simulate_start(size))
            print_row("start", rows["start"][-1])
        for layout in LAYOUTS if saves else ():
            with tempfile.TemporaryDirectory() as folder:
                rows["save"].append(simulate_save(size, layout, Path(folder)))
                print_row("save", rows["save"][-1])
                if "load" in parts:
                    path = Path(folder) / "step-00000001"
                    rows["load"].append(simulate_load(size, layout, path))
                    print_row("load", rows["load"][-1])
    for lazy in (True, False)[: 2 - options.lazily] if "descriptors" in parts else ():
        rows["descriptors"].append(measure_descriptors(options.real, lazy))
        print_row("descriptors", rows["descriptors"][-1])
    if options.draw:
        draw(rows, Path("benchmarks/pictures/scale.png"))


if __name__ == "__main__":
    main()
else:  # The server of processes has preloaded this: let collections keep its memory shared.
    gc.freeze()
