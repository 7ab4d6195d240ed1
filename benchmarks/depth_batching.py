"""Throughput of continuous depth-wise batching beside the table of Bae et al. 2025 (Relaxed
Recursive Transformers, appendix K), with the costs that the paper leaves out.

    OMP_NUM_THREADS=1 python benchmarks/depth_batching.py TEXT [--steps 1000] [--lr 1e-3]
        [--requests 32] [--prompt 128] [--new 256] [--one-by-one 4] [--processes 1]
        [--models FOLDER] [--out PICTURE]

TEXT is a file of text, plain or .xz; its bytes are the tokens, and its last 5 % are validation
data. A dense model of 8 layers and folded ones of 4 blocks that run twice, with adapters of rank 0,
8 and 32, are trained from scratch for the same number of steps, the folded ones with exits. Then
each serves the same requests: the dense one one by one (the first few of them) and all at once,
folded ones at full depth, with an exit always after the first loop, and with one where the
likeliest token has a probability at which half of the validation tokens exit. The paper simulates
exits by an oracle, and counts the time of blocks alone; here everything counts, and the shares of
filling skipped keys and values and of the head with the exit rule are printed. Speeds are tokens
per second of CPU time, which neighbours on a busy machine disturb less than wall time; with
several processes, models are measured at the same time. `--models` keeps trained weights in a
folder, and trains only models that it lacks.

Quality is the loss of validation tokens, of which those that exit are scored after the first loop;
all of them see the keys and values of both loops.
"""

from __future__ import annotations

import argparse
import lzma
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.inference.engine import Engine
from megarecur.inference.request import Exit, Request
from megarecur.model.transformer import Transformer
from megarecur.optim.plain import PlainEngine
from megarecur.parallel.mesh import Mesh
from megarecur.recurrence.schemes import build_map

VOCABULARY, LENGTH, PAGE = 2048, 128, 16
"""Bytes use 256 rows of the vocabulary; the head has more, as that of a model of words."""
RANKS = (None, 0, 8, 32)
"""Ranks of adapters; None: the dense model."""
PAPER = {
    "dense, one by one": "1.00 (in batches)",
    "dense, all at once": "1.41",
    "rank 0, by rule": "2.66 (rank 0)",
    "rank 8, by rule": "2.00 (rank 64)",
    "rank 32, by rule": "1.59 (rank 512)",
}


@dataclass
class Row:
    """One side of the table."""

    name: str
    tokens: int
    seconds: float
    loops: float
    """Mean number of loops of a new token."""
    parts: dict[str, float]
    """CPU seconds by part."""
    loss: float
    """Loss of validation tokens, in nats."""

    @property
    def speed(self) -> float:
        """Tokens per CPU second."""
        return self.tokens / self.seconds


def build(recurrence: dict[str, Any], rank: int = 0, exits: bool = False) -> Transformer:
    """Return a model of this size."""
    return Transformer(Config.model_validate({
        "run_dir": "none",
        "model": {"hidden_size": 128, "num_heads": 4, "vocab_size": VOCABULARY},
        "recurrence": recurrence,
        "adapters": {"rank": rank} if rank else None,
        "exits": {"coefficient": 0.3} if exits else None,
        "data": {"train": [{"path": "none"}], "tokenizer": "bytes", "seq_length": LENGTH},
        "optimizer": {"lr": 3e-3},
        "train": {"steps": 1, "global_batch_size": 4, "micro_batch_size": 4},
    }))  # fmt: skip


def cut_batch(text_N: Tensor, begins: Sequence[int]) -> MicroBatch:
    """Return windows of a text as a micro batch."""
    windows = torch.stack([text_N[begin : begin + LENGTH + 1] for begin in begins])
    tokens_BS, labels_BS = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    positions_BS = torch.arange(LENGTH).expand_as(tokens_BS)
    samples_B = torch.arange(len(begins))
    return MicroBatch(tokens_BS, labels_BS, positions_BS, torch.zeros_like(tokens_BS), samples_B,
                      torch.zeros_like(samples_B), True)  # fmt: skip


def train(model: Transformer, text_N: Tensor, steps: int, lr: float) -> None:
    """Train a model for some steps of 4 windows, with a highest learning rate of `lr`."""
    engine = PlainEngine(model, model.config, Mesh())
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        begins = torch.randint(len(text_N) - LENGTH, (4,), generator=generator).tolist()
        batch = cut_batch(text_N, begins)
        ctx = model.context(batch, step=step, training=True)
        own_map, reads = build_map(model.config), dict[str, Tensor]()
        x, _ = model.run(own_map, model.embed(batch.tokens_BS, ctx), ctx, reads)
        exits = {s.exit_name: reads[s.exit_name] for s in own_map if s.exit}
        terms = model.loss(x, batch, exits)
        engine.backward(sum(t.total * t.weight for t in terms.values()) / batch.tokens_BS.numel())
        # Warm up, then decay to a tenth.
        engine.step(lr * min(1.0, (step + 1) / 20) * (1.0 - 0.9 * step / steps))


@torch.inference_mode()
def score(model: Transformer, text_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log probabilities [loops, N] of validation tokens after each loop that has an
    exit and after the last, and the highest probability of any token there."""
    begins = range(0, len(text_N) - LENGTH - 1, LENGTH)[:16]
    batch = cut_batch(text_N, begins)
    ctx, reads = model.context(batch, step=0, training=False), dict[str, Tensor]()
    own_map = build_map(model.config)
    x, _ = model.run(own_map, model.embed(batch.tokens_BS, ctx), ctx, reads)
    states = [*(reads[step.exit_name] for step in own_map if step.exit), x]
    log_p = torch.stack([model.logits(state).log_softmax(-1).flatten(0, 1) for state in states])
    labels_N1 = batch.labels_BS.flatten()[:, None]
    found = log_p.gather(-1, labels_N1.expand(len(states), -1, -1))[..., 0]
    return found, log_p.amax(-1).exp()


def serve(model: Transformer, requests: Sequence[Request], at_once: bool) -> tuple[Any, ...]:
    """Serve requests with a new engine; returns (tokens, CPU seconds, mean loops, CPU seconds by
    part)."""
    pages = sum(-(-request.most_tokens // PAGE) for request in requests)
    engine = Engine(model, num_pages=pages, page_size=PAGE)
    assert engine.passes is not None
    parts: dict[str, float] = {}

    def watch(owner: object, name: str, part: str) -> None:
        """Add the CPU time of a method to a part."""
        method: Callable[..., Any] = getattr(owner, name)

        def timed(*given: Any) -> Any:
            began = time.process_time()
            result = method(*given)
            parts[part] = parts.get(part, 0.0) + time.process_time() - began
            return result

        setattr(owner, name, timed)

    watch(engine.passes, "run", "blocks")
    watch(engine, "fill", "filled keys")
    watch(engine, "read_logits", "head and rule")
    watch(engine, "find_leaving", "head and rule")
    began = time.process_time()
    for request in requests:
        engine.submit(request)
        if not at_once:
            engine.run()
    engine.run()
    seconds, counts = time.process_time() - began, engine.counts
    parts["rest"] = seconds - sum(parts.values())
    return counts.tokens, seconds, counts.loops / counts.tokens, parts


def read_text(path: Path) -> Tensor:
    """Return the bytes of a file of text."""
    raw = path.read_bytes()
    if path.suffix == ".xz":
        raw = lzma.decompress(raw)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()


def draw(rows: Sequence[Row], out: Path) -> None:
    """Plot CPU time per token, by part, with a bar per side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="CPU milliseconds per new token", title="Depth-wise batching: time by part"
    )
    names = [row.name for row in rows]
    left = [0.0] * len(rows)
    for part in ("blocks", "head and rule", "filled keys", "rest"):
        widths = [1000 * row.parts.get(part, 0.0) / row.tokens for row in rows]
        axes.barh(names, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, end in zip(rows, left, strict=True):
        axes.text(end, row.name, f" {row.speed / rows[0].speed:.2f}x", va="center", fontsize=8)
    axes.set_xlim(right=1.1 * max(left))
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(out, dpi=130)


def measure(rank: int | None, options: argparse.Namespace) -> list[Row]:
    """Train and measure the folded model of a rank, or the dense one (None)."""
    text_N = read_text(options.text)
    cut = len(text_N) - len(text_N) // 20
    kept_N = text_N[cut:]
    recurrence: dict[str, Any] = {"kind": "cycle", "num_blocks": 4, "depth": 8}
    if rank is None:
        recurrence = {"kind": "dense", "num_layers": 8}
    model = build(recurrence, rank or 0, exits=rank is not None)
    file = None if options.models is None else options.models / f"{rank}.pt"
    if file is not None and file.exists():
        model.load_state_dict(torch.load(file))
    else:
        train(model, text_N[:cut], options.steps, options.lr)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), file)
    log_p, highest = score(model, kept_N)
    bound = float(highest[0].median())
    by_rule = torch.where(highest[0] >= bound, log_p[0], log_p[-1])
    cases = [
        (f"rank {rank}, no exits", None, options.requests, log_p[-1]),
        (f"rank {rank}, by rule", Exit("confidence", bound), options.requests, by_rule),
        (f"rank {rank}, always loop 1", Exit("loop", 1), options.requests, log_p[0]),
    ]
    if rank is None:
        cases = [
            ("dense, one by one", None, options.one_by_one, log_p[-1]),
            ("dense, all at once", None, options.requests, log_p[-1]),
        ]
    prompts = kept_N[: options.requests * options.prompt].view(options.requests, -1).tolist()
    rows = []
    # The first passes of a process are slower.
    serve(model, [Request(tokens=(1,), max_new_tokens=8, temperature=0.0)], True)
    for name, exit_, count, found in cases:
        requests = [
            Request(tokens=tuple(prompt), max_new_tokens=options.new, temperature=0.0, exit=exit_)
            for prompt in prompts[:count]
        ]
        at_once = name != "dense, one by one"
        rows.append(Row(name, *serve(model, requests, at_once), -float(found.mean())))
    return rows


def main() -> None:
    """Measure all models, print a table and write a picture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("text", type=Path)
    for name, default in (("steps", 1000), ("requests", 32), ("prompt", 128), ("new", 256),
                          ("one-by-one", 4), ("processes", 1)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/pictures/depth_batching.png"))
    options = parser.parse_args()
    work = partial(measure, options=options)
    if options.processes == 1:
        found = [work(rank) for rank in RANKS]
    else:
        with ProcessPoolExecutor(options.processes, get_context("fork")) as pool:
            found = list(pool.map(work, RANKS))
    rows = [row for own in found for row in own]
    print("| side | tokens per CPU second | ratio | of blocks alone | paper | head and rule |"
          " filled keys | mean loops | loss |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    alone = rows[0].parts["blocks"] / rows[0].tokens
    for row in rows:
        head, filled = (
            row.parts.get(part, 0.0) / row.seconds for part in ("head and rule", "filled keys")
        )
        print(
            f"| {row.name} | {row.speed:.0f} | {row.speed / rows[0].speed:.2f} | "
            f"{alone * row.tokens / row.parts['blocks']:.2f} | {PAPER.get(row.name, '')} | "
            f"{head:.0%} | {filled:.0%} | {row.loops:.2f} | {row.loss:.3f} |"
        )
    draw(rows, options.out)


if __name__ == "__main__":
    main()
