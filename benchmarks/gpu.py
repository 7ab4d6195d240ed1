"""Measure a GPU in twelve minutes: attention, training, memory, decoding, and the hardware itself.

    python benchmarks/gpu.py --out build/gpu [--sections attention training] [--tiny]

Each section is a process that ends within its seconds; what it measured until then is kept. A
section that ended well is not run again: delete OUT/NAME.jsonl to repeat it. OUT/gpu.json and
OUT/gpu.md hold all rows. Needs torch 2.11 or newer, no deepspeed and no streaming; pytest and
hypothesis for "tests", transformers for its row of "training", the config's corpus for "paper".
What is missing is named in its row. `--prepare` writes the corpus of the tests to build/gpu-corpus:
run it beforehand where streaming is installed. `--tiny` runs small shapes on any device.

The model of "training", "depth" and "decoding": 4 blocks of hidden 2,048, each run 5 times, some 1
billion executed parameters. MFU counts the attention that the documents need.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention import make_batch
from torch import Tensor, nn
from trained import Trained

from megarecur.attention.attend import attend
from megarecur.attention.documents import Boundaries
from megarecur.attention.plan import choose_backend
from megarecur.attention.scores import Scores
from megarecur.attention.visibility import Visibility, see_documents
from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.data.torchvision_stub import make_torchvision_importable
from megarecur.inference.cache import Cache
from megarecur.inference.engine import Engine
from megarecur.inference.generate import next_logits
from megarecur.inference.request import Request, count_pages
from megarecur.model.transformer import Transformer
from megarecur.parallel.linear import Weight
from megarecur.parallel.mesh import Mesh
from megarecur.plan.cost import count_flops, count_seen, estimate_memory
from megarecur.plan.schedule import Schedules
from megarecur.recurrence.depth import Depth, draw_depth
from megarecur.recurrence.schemes import layer_map
from megarecur.train.speed import peak_flops

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "build/gpu-corpus"
SECONDS = {
    "tests": 130, "attention": 80, "training": 200, "depth": 50, "weight_gradients": 20,
    "decoding": 50, "hardware": 115, "paper": 75,
}  # fmt: skip
"""Sections in their order, and the seconds after which each is ended."""
NO_MODEL = ("tests", "hardware", "paper")
"""Sections that run other programs."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Shapes:
    """Sizes of a measurement."""

    hidden: int = 2048
    ffn: int = 5632
    heads: int = 16
    vocabulary: int = 32_768
    length: int = 4096
    batch: int = 4
    document: int = 800
    """Mean tokens of a document of packed samples."""
    uses: int = 5
    layouts: tuple[tuple[int, int], ...] = ((8, 4096), (1, 32_768))
    """(samples, positions) of the attention section."""
    prompt: int = 512
    new: int = 32
    repeats: int = 5

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length


TINY = Shapes(64, 128, 4, 512, 128, 2, 40, 2, ((2, 256),), 16, 4, 2)


# ---------------------------------------------------------------------------------- measuring


def wait() -> None:
    """Wait for the device."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def measure(run: Callable[[], object], repeats: int) -> tuple[float, int]:
    """Return (median seconds, peak bytes of tensors on the GPU) of a function, after two calls that
    are not counted."""
    for _ in range(2):
        run()
    wait()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    return statistics.median(times), peak


@contextmanager
def fallible(row: Row) -> Iterator[None]:
    """Go on with the next row after an error, which the row keeps."""
    try:
        yield
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------- attention


def measure_attention(shapes: Shapes) -> Iterator[Row]:
    """Yield a row per layout, kind and backend: forward and backward pass of one layer."""
    head_dim, heads = shapes.hidden // shapes.heads, shapes.heads
    for batch, length in shapes.layouts:
        documents = make_batch(shapes.document, batch, length, shapes.vocabulary).boundaries
        assert documents is not None
        for kind, key_heads, window in (
            ("plain", heads, 0), ("GQA", heads // 4, 0), ("window", heads, length // 8),
        ):  # fmt: skip
            shape = ((batch, length, n, head_dim) for n in (heads, key_heads, key_heads, heads))
            q, k, v, grad = (torch.randn(s, device=DEVICE, dtype=torch.bfloat16) for s in shape)
            first: tuple[Tensor, ...] | None = None
            for backend in ("varlen", "flex", "segments", "dense"):
                row: Row = {"layout": f"{batch} x {length}", "kind": kind, "backend": backend}
                with fallible(row):
                    found, row["ms"], row["peak MiB"] = attend_once(
                        backend, (q, k, v), grad, documents, window, shapes.repeats
                    )
                    first = found if first is None else first
                    row["difference from the first"] = round(distance(found, first), 5)
                yield row


def attend_once(
    backend: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    documents: Boundaries,
    window: int,
    repeats: int,
) -> tuple[tuple[Tensor, ...], float, int]:
    """Return (output and gradients, milliseconds, peak MiB) of a backend."""
    if backend == "dense":
        seen = Visibility(mask=dense_mask(documents, window), backend="dense")
    else:
        named: Any = backend
        seen = see_documents(documents, documents, named, DEVICE, causal=True, window=window)
    leaves = [t.detach().requires_grad_() for t in qkv]
    run = torch.compile(attend) if backend == "flex" and DEVICE.type == "cuda" else attend

    def both() -> tuple[Tensor, ...]:
        out = run((leaves[0], leaves[1], leaves[2]), Scores(qkv[0].shape[-1] ** -0.5), seen, None)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    seconds, peak = measure(both, repeats)
    return both(), round(1e3 * seconds, 2), peak // 2**20


def dense_mask(documents: Boundaries, window: int) -> Tensor:
    """Return the mask [B, 1, S, S] of all pairs of positions."""
    place = torch.arange(documents.length, device=DEVICE)
    rows = torch.arange(documents.batch * documents.length, device=DEVICE)
    number = torch.bucketize(rows, documents.on_device[: documents.count + 1], right=True)
    number_BS = number.view(documents.batch, -1)
    seen = (number_BS[:, :, None] == number_BS[:, None]) & (place[:, None] >= place)
    if window:
        seen &= place[:, None] - place < window
    mask = torch.zeros(seen.shape, device=DEVICE, dtype=torch.bfloat16)
    return mask.masked_fill_(~seen, float("-inf"))[:, None]


def distance(found: tuple[Tensor, ...], first: tuple[Tensor, ...]) -> float:
    """Return the largest relative difference of output and gradients, by norm."""
    pairs = zip(found, first, strict=True)
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)


# ----------------------------------------------------------------------------------- training


def make_config(shapes: Shapes, recurrence: Row | None = None, **train: Any) -> Config:
    """Return the config of the looped model."""
    reuse = {"kind": "reuse_map", "reuse_map": [shapes.uses] * 4}
    return Config.model_validate({
        "run_dir": "none",
        "model": {"hidden_size": shapes.hidden, "num_heads": shapes.heads,
                  "ffn_hidden_size": shapes.ffn, "vocab_size": shapes.vocabulary},
        "recurrence": recurrence or reuse,
        "data": {"train": [{"path": "none"}], "tokenizer": "bytes", "seq_length": shapes.length},
        "optimizer": {"lr": 1e-4},
        "train": {"steps": 1, "global_batch_size": shapes.batch, "precision": "bf16",
                  "micro_batch_size": shapes.batch} | train,
    })  # fmt: skip


def measure_training(shapes: Shapes) -> Iterator[Row]:
    """Yield rows of the looped model, of each policy of recomputing, and of Hugging Face's."""
    packed, whole = (
        make_batch(mean, shapes.batch, shapes.length, shapes.vocabulary)
        for mean in (shapes.document, 0)
    )
    cases: list[tuple[str, MicroBatch, bool, Row]] = [
        ("packed, compiled", packed, True, {}),
        ("packed, eager", packed, False, {}),
        ("one document, compiled", whole, True, {}),
        ("packed, eager, recompute selective", packed, False, {"recompute": "selective"}),
        ("packed, compiled, recompute selective", packed, True, {"recompute": "selective"}),
        ("packed, compiled, recompute full", packed, True, {"recompute": "full"}),
        ("packed, compiled, recompute loops [0, 1]", packed, True,
         {"recompute": {"loops": [0, 1]}}),
        ("packed, compiled, offload", packed, True, {"offload_activations": True}),
    ]  # fmt: skip
    for name, batch, compiled, train in cases:
        row: Row = {"model": name}
        with fallible(row):
            row |= measure_case(shapes, name, batch, compiled, train)
        yield row
    row = {"model": "Hugging Face Llama, one document, compiled"}
    with fallible(row):
        seconds, bytes_ = measure(their_step(shapes, whole), shapes.repeats)
        row |= {"tokens/s": round(shapes.tokens / seconds), "peak MiB": bytes_ // 2**20}
    yield row


def measure_case(shapes: Shapes, name: str, batch: MicroBatch, compiled: bool, train: Row) -> Row:
    """Return the figures of the looped model. It is freed before the next one is built."""
    config = make_config(shapes, **train)
    if DEVICE.type == "cpu" and "offload_activations" in train:
        raise RuntimeError("activations are offloaded from a GPU only")
    trained = Trained(config, DEVICE, compiled)
    seconds, bytes_ = measure(lambda: trained.step(batch), shapes.repeats)
    steps = layer_map(config.recurrence)
    assert batch.boundaries is not None
    seen = count_seen(config, np.diff(batch.boundaries.edges).tolist())
    rate = count_flops(config, steps, seen).train * shapes.tokens / seconds
    found = {
        "attention": choose_backend(config, DEVICE.type).backend,
        "tokens/s": round(shapes.tokens / seconds),
        "MFU": round(rate / peak_flops(DEVICE, torch.bfloat16), 3),
        "peak MiB": bytes_ // 2**20,
        "planned MiB": estimate_memory(config, steps).total // 2**20,
        "waits": count_waits(trained, batch),
    }
    if name in ("packed, compiled", "packed, eager") and TRACES is not None:
        found["trace"] = write_trace(trained, batch, name)
    return found


TRACES: Path | None = None
"""The folder of traces; None: none are written."""


def write_trace(trained: Trained, batch: MicroBatch, name: str) -> str:
    """Write the trace of one step; returns its file's name."""
    assert TRACES is not None
    path = TRACES / f"{name.replace(', ', '-')}.json.gz"
    with torch.profiler.profile() as profile:
        trained.step(batch)
        wait()
    profile.export_chrome_trace(str(path))
    return path.name


def count_waits(trained: Trained, batch: MicroBatch) -> int | str:
    """Return how often the forward and the backward pass wait for the device."""
    if DEVICE.type != "cuda":
        return "CUDA only"
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained.differentiate(batch)
    torch.cuda.set_sync_debug_mode("default")
    trained.engine.step(trained.config.optimizer.lr)
    return sum("synchroniz" in str(one.message) for one in caught)


def their_step(shapes: Shapes, batch: MicroBatch) -> Callable[[], Tensor]:
    """Return a step of Llama of the same executed depth, as users of transformers write it."""
    if find_spec("transformers") is None:
        raise RuntimeError("transformers is not installed")
    make_torchvision_importable()
    from transformers import LlamaConfig, LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shapes.vocabulary, hidden_size=shapes.hidden, intermediate_size=shapes.ffn,
            num_hidden_layers=4 * shapes.uses, num_attention_heads=shapes.heads,
            max_position_embeddings=shapes.length, tie_word_embeddings=True,
            attn_implementation="sdpa", use_cache=False,
        )
    ).to(DEVICE)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    forward = torch.compile(model)

    def step() -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            out = forward(
                input_ids=batch.tokens_BS, shift_labels=batch.labels_BS, labels=batch.labels_BS
            )
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss: Tensor = out.loss.detach()
        return loss

    return step


# -------------------------------------------------------------------- depth, gradients, decoding


def measure_depth(shapes: Shapes) -> Iterator[Row]:
    """Yield the time of random depth over that of fixed depth, at equal executed FLOPs."""
    batch = make_batch(shapes.document, shapes.batch, shapes.length, shapes.vocabulary)
    loop = {"kind": "loop", "prelude": 1, "core": 2, "coda": 1,
            "num_loops": {"sampler": "uniform", "min": 1, "max": 7}}  # fmt: skip
    config = make_config(shapes, loop)
    for compiled in (True, False):
        row: Row = {"model": "compiled" if compiled else "eager"}
        with fallible(row):
            trained, drawn = Trained(config, DEVICE, compiled), drawn_depths(config)
            for loops in (1, 7, 4):
                trained.step(batch, Depth(loops, loops))
            times = []
            for depths in ([4] * len(drawn), drawn) * 2:
                wait()
                began = time.perf_counter()
                for loops in depths:
                    trained.step(batch, Depth(loops, loops))
                wait()
                times.append(time.perf_counter() - began)
            row["random over fixed"] = round((times[1] + times[3]) / (times[0] + times[2]), 3)
            row["graphs"] = trained.compiled.graphs if trained.compiled else 0
        yield row


def drawn_depths(config: Config) -> list[int]:
    """Return the numbers 1 to 7 in the order in which the sampler first draws them."""
    order: list[int] = []
    step = 0
    while len(order) < 7:
        depth = draw_depth(config, step)
        assert depth is not None
        if depth.num_loops not in order:
            order.append(depth.num_loops)
        step += 1
    return order


def measure_weight_gradients(shapes: Shapes) -> Iterator[Row]:
    """Yield the error of a weight's gradient over 64 uses of 8 micro batches, over that of one."""
    rows, generator = min(shapes.tokens, 2048), torch.Generator(DEVICE).manual_seed(0)
    errors = []
    for uses in (1, 64 * 8):
        weight = Weight(
            nn.Parameter(torch.zeros(shapes.hidden, shapes.hidden, device=DEVICE)), torch.bfloat16
        )
        weight.parameter.grad = torch.zeros_like(weight.parameter)
        exact = torch.zeros_like(weight.parameter, dtype=torch.float64)
        for _ in range(uses):
            dy, x = (
                torch.randn(rows, shapes.hidden, device=DEVICE, generator=generator).bfloat16()
                for _ in range(2)
            )
            with torch.no_grad():
                weight.add(dy, x)
                exact += dy.double().t() @ x.double()
        errors.append(float((weight.parameter.grad - exact).norm() / exact.norm()))
    yield {"one use": errors[0], "512 uses": errors[1], "ratio": errors[1] / errors[0],
           "wanted": "at most 1.2"}  # fmt: skip


def measure_decoding(shapes: Shapes) -> Iterator[Row]:
    """Yield tokens per second of greedy decoding, with the cache, and with the engine without and
    with CUDA graphs."""
    config = make_config(shapes)
    model, mesh = Transformer(config, DEVICE), Mesh(device=DEVICE)
    scheduled = Schedules(config).forward(None)
    for batch in (1, 64):
        row: Row = {"samples": batch}
        with fallible(row), torch.no_grad():
            tokens = torch.ones(batch, shapes.prompt, dtype=torch.int64, device=DEVICE)
            samples = torch.arange(batch, device=DEVICE)
            cache = Cache(shapes.prompt + shapes.new + 4)
            wait()
            began = time.perf_counter()
            logits = next_logits(model, mesh, scheduled, tokens, cache, 0, samples)
            wait()
            row["prompt tokens/s"] = round(tokens.numel() / (time.perf_counter() - began))
            assert logits is not None
            for i in range(shapes.new + 2):
                if i == 2:
                    wait()
                    began = time.perf_counter()
                assert logits is not None
                token = logits.argmax(-1, keepdim=True)
                logits = next_logits(model, mesh, scheduled, token, cache, 0, samples)
            wait()
            row["new tokens/s"] = round(batch * shapes.new / (time.perf_counter() - began))
        for name, cuda_graphs in (("engine", False), ("engine, CUDA graphs", True)):
            with fallible(row):
                row[f"{name}: new tokens/s"] = round(serve(model, shapes, batch, cuda_graphs))
        yield row


def serve(model: Transformer, shapes: Shapes, batch: int, cuda_graphs: bool) -> float:
    """Return new tokens per second of the engine, after a round that warms up and captures."""
    pages = batch * count_pages(shapes.new, 16)
    engine = Engine(model, num_pages=pages, max_texts=batch, cuda_graphs=cuda_graphs)
    seconds = 0.0
    for _ in range(2):
        wait()
        began = time.perf_counter()
        for number in range(batch):
            engine.submit(Request(tokens=(number,), max_new_tokens=shapes.new, temperature=0.0))
        engine.run()
        wait()
        seconds = time.perf_counter() - began
    return batch * shapes.new / seconds


# ------------------------------------------------------------------------------ other programs


def run_tests(out: Path) -> Row:
    """Run `pytest -m cuda`."""
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        return {"error": f"not installed: {', '.join(missing)}"}
    flags = ["-p", "no:cacheprovider", "-o", "addopts=--strict-markers", "-o", "timeout=0"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "cuda", "-q", *flags, ROOT / "tests"],
        capture_output=True, text=True, cwd=ROOT,
        env=os.environ | ({"MEGARECUR_TEST_CORPUS": str(CORPUS)} if CORPUS.exists() else {}),
    )  # fmt: skip
    (out / "tests.txt").write_text(done.stdout + done.stderr)
    return {"result": (done.stdout.strip() or done.stderr.strip()).splitlines()[-1][:200]}


def prepare() -> None:
    """Write the corpus of the tests."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.configs import write_corpus

    print(f"the corpus of the tests is in {write_corpus(CORPUS)}")


def run_hardware(out: Path) -> Row:
    """Measure the hardware: `megarecur bench hardware`."""
    path = out / "hardware.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "megarecur.launch.cli", "bench", "hardware", "--out", str(path)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    if done.returncode:
        return {"error": (done.stderr.strip() or done.stdout.strip()).splitlines()[-1][:200]}
    return {"file": path.name}


def run_paper(out: Path, seconds: int) -> Row:
    """Train configs/papers/ilr/map-4211.yaml for the seconds that are left."""
    run_dir = out / "map-4211"
    command = [
        sys.executable, "-m", "megarecur.launch.cli", "train",
        "configs/papers/ilr/map-4211.yaml", f"run_dir={run_dir}",
    ]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, errors = process.communicate(timeout=seconds - 25)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # It saves a checkpoint, and ends.
            _, errors = process.communicate()
    lines = run_dir / "metrics.jsonl"
    if not lines.exists():
        return {"error": " ".join(errors.split())[:200]}
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    last = [row for row in rows if "train/loss" in row][-1]
    kept = ("step", "train/loss", "speed/tokens_per_second", "speed/mfu")
    return {name: last[name] for name in kept if name in last}


# --------------------------------------------------------------------------------- the script


MEASURED: dict[str, Callable[[Shapes], Iterator[Row]]] = {
    "attention": measure_attention,
    "training": measure_training,
    "depth": measure_depth,
    "weight_gradients": measure_weight_gradients,
    "decoding": measure_decoding,
}


def run_section(name: str, out: Path, shapes: Shapes) -> None:
    """Print the rows of a section as JSON, one by one."""
    global TRACES
    TRACES = out
    if name == "tests":
        rows: Iterator[Row] = iter([run_tests(out)])
    elif name == "hardware":
        rows = iter([run_hardware(out)])
    elif name == "paper":
        rows = iter([run_paper(out, SECONDS[name])])
    else:
        rows = MEASURED[name](shapes)
    for row in rows:
        print(json.dumps(row), flush=True)


def run_bounded(name: str, out: Path, tiny: bool) -> list[Row]:
    """Run a section in a process of its own; returns its rows, with one about a failure."""
    command = [sys.executable, __file__, "--out", str(out), "--section", name]
    aside = out / f"tmp-{name}.jsonl"
    with aside.open("w") as rows, (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *(["--tiny"] if tiny else [])], stdout=rows, stderr=log, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=SECONDS[name])
            fault = f"ended with code {code}; see {name}.log" if code else ""
        except subprocess.TimeoutExpired:
            fault = f"ended after its {SECONDS[name]} seconds"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = [json.loads(line) for line in aside.read_text().splitlines() if line.endswith("}")]
    if fault:
        return [*found, {"fault": fault}]
    aside.replace(out / f"{name}.jsonl")
    return found


def make_table(rows: list[Row]) -> str:
    """Return rows as a table in Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names)]
    lines += [[str(row.get(name, "")) for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Run the sections that have not ended well yet, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--prepare", action="store_true", help="write the corpus of the tests")
    parser.add_argument("--sections", nargs="+", choices=SECONDS, default=list(SECONDS))
    parser.add_argument("--tiny", action="store_true", help="small shapes on any device")
    parser.add_argument("--section", choices=SECONDS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.prepare:
        prepare()
        return
    shapes = TINY if given.tiny else Shapes()
    given.out.mkdir(parents=True, exist_ok=True)
    out = given.out.resolve()
    if given.section:
        run_section(given.section, out, shapes)
        return
    if DEVICE.type != "cuda" and not given.tiny:
        sys.exit("no CUDA device; --tiny tries the script without one")
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    facts = {"device": name, "torch": torch.__version__, "python": sys.version.split()[0]}
    results: dict[str, list[Row]] = {}
    left = sum(SECONDS[name] for name in given.sections)
    for section in given.sections:
        path = out / f"{section}.jsonl"
        print(f"{section}: at most {SECONDS[section]} s, {left} s for all that is left", flush=True)
        if path.exists():
            results[section] = [json.loads(line) for line in path.read_text().splitlines()]
        else:
            results[section] = run_bounded(section, out, given.tiny)
        left -= SECONDS[section]
        print(make_table(results[section]), flush=True)
        tables = [f"## {name}\n\n{make_table(rows)}\n" for name, rows in results.items()]
        (out / "gpu.json").write_text(json.dumps(facts | {"sections": results}, indent=1))
        (out / "gpu.md").write_text(f"{make_table([facts])}\n\n" + "\n".join(tables))


if __name__ == "__main__":
    main()
