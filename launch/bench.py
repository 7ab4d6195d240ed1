"""Measure this machine for `megarecur plan --hardware`: the command `megarecur bench hardware`.

Every figure is the median of repetitions of the code that training runs: a weight's forward and
backward products, attention forward and backward by backend, pointwise operations, all-reduces.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from megarecur.attention.attend import attend
from megarecur.attention.documents import from_lengths
from megarecur.attention.scores import Scores
from megarecur.attention.visibility import Visibility, see_documents
from megarecur.config.load import validate_section
from megarecur.config.rules_attention import Backend
from megarecur.data_prep.progress import ProgressReport
from megarecur.errors import ConfigError, MegarecurError, MeshError
from megarecur.files import replace_file
from megarecur.launch.output import say
from megarecur.model.norm import RMSNorm
from megarecur.parallel.linear import Weight
from megarecur.parallel.mesh import pick_device
from megarecur.plan.cluster import PRESETS, Cluster, Precision
from megarecur.plan.cost import count_pairs
from megarecur.reading import read_json

DTYPES: dict[Precision, torch.dtype] = {
    "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64,
}  # fmt: skip
SIDES = {"cpu": (128, 256, 512, 1024, 2048), "cuda": (512, 1024, 2048, 4096, 8192)}
"""Sides of square products with as many FLOPs as those measured."""
DOCUMENTS = {"cpu": (32, 128, 512, 2048), "cuda": (256, 1024, 4096, 16384)}
"""Mean tokens of a document."""
SAMPLE = {"cpu": 1024, "cuda": 16384}
"""Tokens of a sample, unless a document is longer."""
HEADS = {"cpu": (8, 64), "cuda": (16, 128)}
"""Heads and head_dim."""
TENSORS = {"cpu": (1, 8, 64), "cuda": (8, 64, 512)}
"""MiB of a tensor."""
COLD_MIB = {"cpu": 64, "cuda": 256}
"""MiB of inputs that take turns, so that none is in a cache, as between the passes of a model."""
MESSAGE_MIB = 64
SECONDS = 0.4
"""Seconds of repetitions of a figure, of which there are at least three."""
LONGEST = 2.0
"""Seconds of one repetition beyond which larger sizes of a series are skipped."""
MEET = timedelta(seconds=60)

Advance = Callable[[int], None]


def bench_hardware(out: Path, device: str = "auto", ranks: int | None = None) -> Cluster:
    """Measure this machine, and write its description as YAML.

    Args:
        out: file to write.
        device: auto, cpu or cuda.
        ranks: processes that share the machine; None: one for each GPU, or one on a CPU.

    Raises:
        ConfigError: `out` is no name of a YAML file.
        MeshError: the device does not exist, or processes cannot communicate.
    """
    if out.suffix not in (".yaml", ".yml") or out.is_dir():
        raise ConfigError(f"--out {out}: must name a .yaml file; rename it")
    found = pick_device(device)
    kind, most = found.type, torch.cuda.device_count() if found.type == "cuda" else count_cores()
    ranks = ranks or (most if kind == "cuda" else 1)
    if ranks > most:
        what = "GPUs" if kind == "cuda" else "cores"
        raise ConfigError(
            f"--ranks {ranks}: exceeds the {most} {what} here; set it to at most that"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    if kind == "cpu" and ranks > 1:
        torch.set_num_threads(count_cores() // ranks)
    backends = [b for b in get_args(Backend) if kind == "cuda" or b in ("dense", "segments")]
    series = [len(DTYPES) * len(SIDES[kind]), 2 * len(backends) * len(DOCUMENTS[kind])]
    total = sum(series) + len(TENSORS[kind]) + (ranks > 1)
    report = ProgressReport()
    notes: list[str] = []
    with report.phase("measuring", total, "figures"), torch.random.fork_rng(devices=[]):
        advance = report.advance
        rates: dict[str, Any] = {
            "products": {
                name: measure(
                    SIDES[kind], partial(rate_products, dtype=dtype, device=found), advance
                )
                for name, dtype in DTYPES.items()
            },
            "attention": measure_attention(backends, found, advance, notes),
            "pointwise_gb_s": measure(
                TENSORS[kind], partial(rate_pointwise, device=found), advance
            ),
            "launch_us": round(measure_launch(found) * 1e6, 2) if kind == "cuda" else 0.0,
        }
        values = describe_device(found, ranks, rates, notes)
        if ranks > 1:
            values["node"] = measure_link(ranks, kind)
            advance(1)
        else:
            notes.append("node: not measured, as there is one rank; the preset's")
    cluster = validate_section(Cluster, {"name": out.stem, **values}, str(out))
    heading = "".join(f"# {line}\n" for line in ("Written by `megarecur bench hardware`.", *notes))
    text = heading + yaml.safe_dump(values, sort_keys=False, default_flow_style=None)
    replace_file(out, text)
    say(text, end="")
    return cluster


def count_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def describe_device(
    device: torch.device, ranks: int, rates: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """Return the description of the machine; what cannot be measured is that of a preset, which
    `notes` say."""
    preset = PRESETS["cpu"]
    peaks: dict[str, float] = {
        name: max(curve.values()) for name, curve in rates["products"].items()
    }
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
    if device.type == "cuda":
        words = torch.cuda.get_device_name(device).lower().replace("-", " ").split()
        known = next((name for name in PRESETS if name in words), None)
        preset, memory = PRESETS[known or "h100"], torch.cuda.mem_get_info(device)[1]
        if known is not None:
            peaks = preset.peak_tflops.model_dump()
    is_sheet = peaks == preset.peak_tflops.model_dump()
    notes.append(f"peak_tflops: {'of the data sheet' if is_sheet else 'the best product here'}")
    notes.append(f"network: not measured; that of the preset {preset.name}")
    return {
        "device": device.type,
        "ranks_per_node": ranks,
        "peak_tflops": {name: peaks[name] for name in DTYPES},
        "rates": rates,
        "memory_gb": round(memory / 1e9, 2),
        "node": preset.node.model_dump(),
        "network": preset.network.model_dump(),
    }


# ------------------------------------------------------------------------------------- measuring


def pick_clock(device: torch.device) -> Callable[[], float]:
    """Return the clock of computation, in seconds: the processor time of a single thread, which
    other work on the machine does not add to; else the wall clock."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of a call, after one that is not counted, by `pick_clock`."""
    clock = pick_clock(device)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    wait()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < SECONDS:
        started = clock()
        call()
        wait()
        seconds.append(clock() - started)
        if sum(seconds) > 2 * LONGEST:
            break
    return median(seconds)


def measure(
    sizes: Iterable[int], rate: Callable[[int], tuple[float, float]], advance: Advance
) -> dict[int, float]:
    """Return the rate of each size, of increasing ones until one takes too long.

    Args:
        sizes: increasing sizes.
        rate: returns a rate and the seconds of one repetition.
        advance: called for each size.
    """
    curve: dict[int, float] = {}
    seconds = 0.0
    for size in sizes:
        if seconds < LONGEST / 8:  # The next size takes up to 8 times as long.
            found, seconds = rate(size)
            curve[size] = float(f"{found:.4g}")
        advance(1)
    return curve


def make_cold(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return tensors [rows, columns] which together are larger than the caches."""
    first = torch.randn(rows, columns, device=device).to(dtype)
    count = max(2, (COLD_MIB[device.type] << 20) // first.nbytes)
    return [first, *(first.clone() for _ in range(count - 1))]


def rate_products(side: int, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Return 10^12 FLOP/s, and seconds, of a weight's three products: forward, the gradient of the
    input, and that of the weight, added to its sum. As in models there are more rows than columns:
    4 side rows, and side / 2 inputs and outputs."""
    wide = torch.promote_types(dtype, torch.float32)
    columns = side // 2
    parameter = nn.Parameter(torch.randn(columns, columns, dtype=wide, device=device))
    parameter.grad = torch.zeros_like(parameter)
    weight = Weight(parameter, dtype)
    inputs = itertools.cycle(make_cold(4 * side, columns, weight.product_dtype, device))

    def call() -> tuple[Tensor, Tensor]:
        x, dy = next(inputs), next(inputs)
        weight.add(dy, x)
        return F.linear(x, weight.value()), dy @ weight.value()

    with torch.no_grad():
        seconds = time_call(call, device)
    return 6.0 * side**3 / seconds / 1e12, seconds


def measure_attention(
    backends: Iterable[Backend], device: torch.device, advance: Advance, notes: list[str]
) -> dict[str, dict[str, dict[int, float]]]:
    """Return rates by backend, precision and tokens of a document; `notes` name what cannot run."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    sizes = DOCUMENTS[device.type]
    for backend in backends:
        for name in ("bf16", "fp32"):
            if backend == "varlen" and name == "fp32":
                for _ in sizes:
                    advance(1)
                continue
            dtype = torch.bfloat16 if name == "bf16" else torch.float32
            try:
                rate = partial(rate_attention, backend, dtype=dtype, device=device)
                curve = measure(sizes, rate, advance)
            except (RuntimeError, MegarecurError, ImportError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                notes.append(f"attention.{backend}.{name}: not measured ({reason})")
                continue
            found.setdefault(backend, {})[name] = curve
    return found


def rate_attention(
    backend: Backend, document: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """Return 10^12 FLOP/s, and seconds, of attention forward and backward over a sample, whose
    documents have from half to one and a half times the tokens, few of them equally many, as in
    corpora; of dense over all its pairs."""
    heads, width = HEADS[device.type]
    length = document if backend == "dense" else max(3 * document, SAMPLE[device.type])
    count = length // document
    lengths = [document // 2 + document * i // max(count - 1, 1) for i in range(count)]
    lengths[-1] += length - sum(lengths)
    shape = 1, length, heads, width
    q, k, v = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3))
    grad = torch.ones_like(q)
    if backend == "dense":
        mask = torch.full((1, 1, length, length), float("-inf"), dtype=dtype, device=device)
        seen, pairs = Visibility(mask=mask.triu_(1)), length**2
    else:
        edges = from_lengths(np.array(lengths), 1, length).to(device)
        seen = see_documents(edges, edges, backend, device, causal=True)
        pairs = sum(count_pairs(length, causal=True) for length in lengths)

    def call() -> object:
        out = attend((q, k, v), Scores(width**-0.5), seen, None)
        return torch.autograd.grad(out, (q, k, v), grad)

    seconds = time_call(call, device)
    return 12.0 * pairs * heads * width / seconds / 1e12, seconds


def rate_pointwise(mebibytes: int, device: torch.device) -> tuple[float, float]:
    """Return 10^9 bytes per second, and seconds, of a gated activation and an addition of fp32
    tensors: eight passes over one. What is made stays for a while, as activations do: in memory
    that was just freed, and is in a cache, the same takes two thirds of the time."""
    cold = make_cold(mebibytes, 1 << 18, torch.float32, device)
    inputs, kept = itertools.cycle(cold), deque[Tensor](maxlen=len(cold))

    def call() -> None:
        a, b = next(inputs), next(inputs)
        kept.append(F.silu(a).mul_(b))
        kept.append(kept[-1] + b)

    seconds = time_call(call, device)
    return 8.0 * (mebibytes << 20) / seconds / 1e9, seconds


def measure_launch(device: torch.device) -> float:
    """Return the host's seconds per operation of a norm, forward and backward."""
    norm = RMSNorm("norm", lambda _: nn.Parameter(torch.ones(64, device=device)), 1e-5)
    x, operations, repeats = torch.ones(1, 64, device=device, requires_grad=True), 15, 200
    grad = torch.ones_like(x)

    def call() -> None:
        for _ in range(repeats):
            torch.autograd.grad(norm(x), x, grad)

    return time_call(call, device) / (operations * repeats)


# ------------------------------------------------------------------------------------ collectives


def measure_link(ranks: int, kind: str) -> dict[str, float]:
    """Return the link between processes of this machine, by all-reduces over nccl or gloo.

    Raises:
        MeshError: the processes failed, or did not meet.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(reduce_together, (ranks, kind, folder), nprocs=ranks)
        except Exception as error:  # Whatever a process raised, with its traceback as the text.
            last = str(error).strip().splitlines()[-1]
            raise MeshError(
                f"--ranks {ranks}: the processes could not communicate ({last}); measure one rank "
                "with --ranks 1"
            ) from None
        small, large = read_json(Path(folder, "seconds.json"))
    rounds = 2 * (ranks - 1).bit_length()
    sent = 2 * (ranks - 1) / ranks * (MESSAGE_MIB << 20)
    bandwidth = sent / max(large - small, 1e-9) / 1e9
    return {
        "bandwidth_gb_s": float(f"{bandwidth:.4g}"),
        "latency_us": float(f"{small / rounds * 1e6:.4g}"),
        "attainable": 1.0,
    }


def reduce_together(rank: int, ranks: int, kind: str, folder: str) -> None:
    """Time all-reduces of one number and of a large message; rank 0 writes both medians."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", init_method=f"file://{folder}/meet",
        rank=rank, world_size=ranks, timeout=MEET,
    )  # fmt: skip
    found = [median(time_reductions(size, device)) for size in (1, MESSAGE_MIB << 18)]
    if rank == 0:
        Path(folder, "seconds.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def time_reductions(elements: int, device: torch.device) -> Iterator[float]:
    """Yield the seconds of a few all-reduces, the same number on every rank."""
    message = torch.ones(elements, device=device)
    for repetition in range(9):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(message)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repetition:
            yield time.perf_counter() - started
