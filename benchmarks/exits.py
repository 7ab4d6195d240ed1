"""Early exit by exit rules: tokens per second and quality against no exits.

    python benchmarks/exits.py RUN CORPUS [--windows 24] [--out benchmarks/pictures/exits.png]

RUN was trained with exits, CORPUS is a folder of validation shards. Text of the corpus is read
token by token with the cache: the first 64 tokens of a window are the prompt, each later one runs
until the rule lets it exit, and the distribution at its exit is scored against the next token. So
all rules predict the same tokens, and keys and values of skipped loops are those that generation
would see. `agrees` is the share of tokens whose most likely next token is that of all loops.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megarecur.checkpoint.load import load_model, open_tokenizer
from megarecur.data.formats import open_corpus
from megarecur.data.loader import validation_batches
from megarecur.inference.cache import Cache
from megarecur.inference.early import ExitRule, Kind, cut_loops, early_logits
from megarecur.inference.generate import next_logits
from megarecur.model.transformer import Transformer
from megarecur.parallel.mesh import Mesh
from megarecur.plan.schedule import Schedules

PROMPT = 64
RULES: list[tuple[Kind, float]] = [
    *(("confidence", threshold) for threshold in (0.95, 0.9, 0.7, 0.5, 0.3)),
    *(("entropy", threshold) for threshold in (0.5, 1.0, 2.0, 3.0)),
]


@dataclass
class Row:
    """Results of one rule, summed over its tokens."""

    name: str
    rule: ExitRule | None
    loss: float = 0.0
    """Summed loss, in nats."""
    seconds: float = 0.0
    likeliest: list[int] = field(default_factory=list)
    most: int = 0
    """Number of loops of the model."""

    @property
    def loops(self) -> float:
        """Mean number of loops per token."""
        return sum(self.rule.loops) / len(self.likeliest) if self.rule else self.most


def read_window(model: Transformer, window: torch.Tensor, row: Row) -> None:
    """Score every token after the prompt of a window [S + 1]."""
    loops, mesh = cut_loops(model.config, None), Mesh()
    forward, cache = Schedules(model.config).forward(), Cache(len(window))
    row.most = len(loops.loops)
    next_logits(model, mesh, forward, window[None, :PROMPT], cache)
    began = time.perf_counter()
    for position in range(PROMPT, len(window) - 1):
        token = window[None, position : position + 1]
        if row.rule is None:
            logits = next_logits(model, mesh, forward, token, cache)
            assert logits is not None
        else:
            logits = early_logits(model, loops, token, cache, row.rule)
        row.loss -= float(logits[0].log_softmax(-1)[window[position + 1]])
        row.likeliest.append(int(logits.argmax()))
    row.seconds += time.perf_counter() - began


def draw(rows: list[Row], out: Path) -> None:
    """Plot loss over speed, with a point per rule."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="tokens/s, all loops = 1", ylabel="loss of the next token (nats)",
        title="What leaving early buys and costs",
    )  # fmt: skip
    for kind in ("always", "confidence", "entropy"):
        own = [row for row in rows if row.name.startswith(kind)]
        speeds = [rows[0].seconds / row.seconds for row in own]
        losses = [row.loss / len(row.likeliest) for row in own]
        axes.plot(speeds, losses, "o-" if kind != "always" else "s", label=kind)
        for row, speed, loss in zip(own, speeds, losses, strict=True):
            axes.annotate(row.name.split(" ", 1)[1], (speed, loss), (4, 4),
                          textcoords="offset points", fontsize=8)  # fmt: skip
    axes.legend()
    figure.savefig(out, dpi=130)


def main() -> None:
    """Run all rules, print a table and write a picture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("corpus")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/pictures/exits.png"))
    options = parser.parse_args()
    model, loaded = load_model(options.run)
    fingerprint = open_tokenizer(loaded).fingerprint
    corpus = open_corpus(options.corpus, loaded.tokenizer, fingerprint)
    batches = validation_batches(
        corpus, seq_length=loaded.config.data.seq_length, micro_batch_size=1, dp_rank=0, dp_size=1,
        mask_documents=False, max_samples=options.windows, failures=[],
    )  # fmt: skip
    windows = torch.stack([torch.cat((b.tokens_BS[0], b.labels_BS[0, -1:])) for b in batches])
    rows = [Row("always all loops", None)]
    rows += [Row(f"{kind} {bound:g}", ExitRule(kind, bound)) for kind, bound in RULES]
    rows.append(Row("always one loop", ExitRule("entropy", 1e9)))
    read_window(model, windows[0], Row("", None))  # Warm up.
    for window in windows:  # Rules alternate, so that changes in the machine's speed affect all.
        for row in rows:
            read_window(model, window, row)
    print("| rule | loops per token | tokens/s | loss | agrees |\n|---|---|---|---|---|")
    for row in rows:
        count, first = len(row.likeliest), rows[0]
        same = zip(row.likeliest, first.likeliest, strict=True)
        agrees = sum(a == b for a, b in same) / count
        print(f"| {row.name} | {row.loops:.2f} | {first.seconds / row.seconds:.2f}x "
              f"({count / row.seconds:.0f}) | {row.loss / count:.4f} | {agrees:.1%} |")  # fmt: skip
    draw(rows, options.out)


if __name__ == "__main__":
    main()
