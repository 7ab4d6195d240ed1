"""Small studies of published rankings, each on a CPU within hours.

    python benchmarks/study.py NAME --minutes 60 [--jobs 2] [--data FOLDER]

NAME is one of the studies below. A study is a list of cells, each of them a run. Missing cells are
run, --jobs at a time, until the minutes are over; an interrupted cell resumes. The finished cells
are then printed as a table in Markdown and plotted. Runs are in runs/NAME. Scores of finished cells
are appended to benchmarks/scores/NAME.jsonl, and a cell that has them there is not run again: a
long study grows over days and machines. FOLDER holds the development data (default:
MEGARECUR_DATA).
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIGS = Path("configs/papers")
PICTURES, SCORES = Path("benchmarks/pictures"), Path("benchmarks/scores")
Command = tuple[object, ...]
THREADS: dict[str, str] = {}
"""Environment variables of a cell if several run in parallel."""


@dataclass(frozen=True)
class Cell:
    """One run of a study, evaluated only at its end."""

    row: str
    """Row of the table; runs with several seeds share one."""
    run: Path
    commands: tuple[Command, ...]
    """Arguments of the `megarecur` commands that make the run, in order; the last one trains."""
    makes: Path | None = None
    """Output of the first command, which other cells may have made already."""
    columns: tuple[str, ...] = ("val/loss",)
    """Keys of metrics.jsonl."""
    drawn: bool = True
    """Include the run in the picture. False: its scores are too far from the others."""

    def scores(self, kept: dict[str, list[float]]) -> list[float] | None:
        """Return one score per column; None for a run that is not finished.

        Args:
            kept: scores by name of the run, from earlier.
        """
        if self.run.name in kept:
            return kept[self.run.name]
        found = [[row[key] for row in read_lines(self.run / "metrics.jsonl") if key in row]
                 for key in self.columns]  # fmt: skip
        return [values[-1] for values in found] if all(found) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_scores(name: str, cells: list[Cell]) -> dict[str, list[float]]:
    """Return the kept scores of a study's cells, by name of the run."""
    known = {cell.run.name: cell.columns for cell in cells}
    found = {}
    for line in read_lines(SCORES / f"{name}.jsonl"):
        if all(key in line["scores"] for key in known.get(line["run"], ("",))):
            found[line["run"]] = [line["scores"][key] for key in known[line["run"]]]
    return found


def keep_scores(name: str, cell: Cell, scores: list[float]) -> None:
    """Append the scores of a finished cell to those that are kept."""
    SCORES.mkdir(parents=True, exist_ok=True)
    line = {"run": cell.run.name, "scores": dict(zip(cell.columns, scores, strict=True))}
    with open(SCORES / f"{name}.jsonl", "a", encoding="utf-8") as kept:
        kept.write(json.dumps(line) + "\n")


def megarecur(root: Path, *words: object) -> None:
    """Run a command, with its output in the log of the study."""
    with open(root / "study.log", "a") as log:
        command = [sys.executable, "-m", "megarecur.launch.cli", *map(str, words)]
        subprocess.run(command, check=True, stdout=log, stderr=log, env=os.environ | THREADS)


def prepare_books(root: Path, data: Path, vocab_size: int) -> None:
    """Prepare tokenizer and shards of the books in the development data, unless they exist.

    The validation shards hold the beginnings of the 14 held-out books.
    """
    tokenizer, books = root / "tokenizer.model", data / "lm_en/gutenberg"
    train, beginnings = sorted(books.glob("train-*")), root / "valid.jsonl"
    with lzma.open(books / "valid.jsonl.xz", "rt") as lines:
        texts = [json.loads(line)["text"][:50_000] for line in lines]
    beginnings.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if not tokenizer.exists():
        size = ("--vocab-size", vocab_size)
        megarecur(root, "prep", "tokenizer", train[0], "--out", tokenizer, *size)
    for part, files in (("train", train), ("val", [beginnings])):
        if not (root / "data" / part / "manifest.json").exists():
            aside = root / f"prep-{part}"
            megarecur(root, "prep", "shards", *files, "--out", aside, "--tokenizer", tokenizer)
            (root / "data").mkdir(exist_ok=True)
            (aside / "train").rename(root / "data" / part)


# --------------------------------------------------------------------------------------- relaxed


def relaxed(root: Path, data: Path) -> list[Cell]:
    """Return the cells that compare ways to fold a dense model (Bae et al. 2025).

    8 layers trained on books become 4 blocks that run twice, and each fold is uptrained on a tenth
    of the tokens.
    """
    configs, dense, exported = CONFIGS / "relaxed_recursive", root / "dense", root / "dense-hf"
    prepare_books(root, data, 2048)
    megarecur(root, "train", configs / "dense-small.yaml")  # Returns at once if it is finished.
    if not exported.exists():
        megarecur(root, "export", dense, "--to", "hf", exported)

    def cell(
        init: str, rank: int = 0, start: str = "svd", distill: bool = False, seed: int = 1
    ) -> Cell:
        fold = root / (f"fold-{init}" + f"-{start}{rank}" * bool(rank))
        run = root / f"{fold.name.replace('fold', 'up')}{'-distilled' * distill}-seed{seed}"
        lora = ("--lora-rank", rank, "--lora-init", start) if rank else ()
        scheme = "relaxed" if rank else "cycle"
        convert = ("convert", exported, "--to", fold, "--scheme", scheme, "--loops", 2,
                   "--init", init, *lora)  # fmt: skip
        overrides = [f"run_dir={run}", f"init_from={fold}", f"seed={seed}"]
        overrides += [f"adapters={{rank: {rank}}}"] * bool(rank)
        overrides += [f"distill={{teacher: {dense}, weight: 0.5}}"] * distill
        row = f"{init}, rank {rank} by {start}" if rank else init.replace("random", "random layers")
        train = ("train", configs / "uptrain-small.yaml", *overrides)
        return Cell(row + ", distilled" * distill, run, (convert, train), fold)

    inits = ("stepwise", "average", "lower", "random")
    alone = ("train", configs / "uptrain-small.yaml", f"run_dir={root}/scratch")
    return [
        *(cell(init, seed=seed) for seed in (1, 2, 3) for init in inits),
        Cell("from scratch", root / "scratch", (alone,), drawn=False),
        *(cell("average", rank, start) for rank in (8, 32) for start in ("svd", "zero")),
        *(cell("stepwise", distill=True, seed=seed) for seed in (1, 2, 3)),
        *(cell("stepwise", rank, start) for rank in (8, 32) for start in ("svd", "zero")),
        cell("average", 32, distill=True),
    ]


# ------------------------------------------------------------------------------------------- ilr


def ilr(root: Path, data: Path) -> list[Cell]:
    """Return the cells that compare which layers to repeat (Nguyen & Lin 2025).

    Four maps are trained on books, without positions.
    """
    prepare_books(root, data, 1024)
    overrides = (
        f"data.train=[{{path: {root}/data/train}}]", f"data.val=[{{path: {root}/data/val}}]",
        f"data.tokenizer={root}/tokenizer.model", "data.seq_length=256", "train.steps=800",
        "train.eval_every=0", "train.eval_samples=512", "checkpoint.every=250",
    )  # fmt: skip
    names = {"1,1,1,1": "baseline-small", "4,2,1,1": "map-4211-small",
             "2,2,2,2": "map-2222-small", "1,1,2,4": "map-1124-small"}  # fmt: skip
    cells = []
    for seed in (1, 2, 3):
        for row, name in names.items():
            run = root / f"{name}-seed{seed}"
            own = (f"run_dir={run}", f"seed={seed}")
            cells.append(
                Cell(row, run, (("train", CONFIGS / f"ilr/{name}.yaml", *overrides, *own),))
            )
    return cells


# ------------------------------------------------------------------------------ dynamic halting


def flip_flop(root: Path, data: Path) -> list[Cell]:
    """Return the cells that compare how well models remember a bit (Liu et al. 2023).

    As in Ray Chowdhury & Caragea 2024, models are trained on strings of 64 symbols with a noise
    share of 0.8, and tested at 0.8, 0.98 and 0.1, and on longer strings.
    """
    names = ("0.98", "0.1", "0.98x128")
    tests = (*(word for name in names for word in ("--test", name)), "--test-count", 2000)
    drawn = ("--length", 64, "--train", 50000, "--val", 2000, *tests)
    return task_cells(
        root, ("flip_flop", *drawn), "flip-flop", ("transformer", "gut", "tlb"),
        ("val", *(f"test_{name}" for name in names)), "glitch_rate", seq_length=128, steps=2000,
    )  # fmt: skip


def logic(root: Path, data: Path) -> list[Cell]:
    """Return the cells that compare logical inference beyond the trained length.

    Training has up to 6 operators, and accuracy is measured with 6 to 12 (Bowman et al. 2015).
    """
    return task_cells(
        root, ("logic", "--train", 300000), "logic", ("transformer", "ut", "gut"),
        ("test_06", "test_08", "test_10", "test_12"), "accuracy", seq_length=80, steps=10000,
    )  # fmt: skip


def task_cells(
    root: Path,
    drawn: Command,
    task: str,
    models: tuple[str, ...],
    tests: tuple[str, ...],
    measure: str,
    seq_length: int,
    steps: int,
) -> list[Cell]:
    """Return a cell per model and seed; the tests are the run's validation corpora."""
    if not (root / "data/train").exists():  # The training corpus is written last.
        megarecur(root, "prep", "task", *drawn, "--out", root / "data")
    paths = ", ".join(f"{{path: {root}/data/{test}}}" for test in tests)
    overrides = (
        f"data.train=[{{path: {root}/data/train}}]", f"data.val=[{paths}]",
        f"data.tokenizer={root}/data/tokenizer.words", f"train.steps={steps}",
        "train.eval_every=0", "checkpoint.every=500", f"data.seq_length={seq_length}",
    )  # fmt: skip
    cells = []
    for seed in (1, 2, 3):
        for model in models:
            run = root / f"{model}-seed{seed}"
            config = CONFIGS / f"dynamic_halt/{task}-{model}-small.yaml"
            own = (f"run_dir={run}", f"seed={seed}")
            columns = tuple(f"val/{test}/{measure}" for test in tests)
            train = ("train", config, *overrides, *own)
            cells.append(Cell(model.upper(), run, (train,), columns=columns))
    return cells


# ------------------------------------------------------------------------------------ translation

SHARED = "num_blocks: 3, depth: 6}"
SCHEMES = {
    "vanilla, N = 3": "{kind: dense, num_layers: 3}",
    "vanilla, N = 6": "{kind: dense, num_layers: 6}",
    "SEQUENCE, M = 3, N = 6": f"{{kind: sequence, {SHARED}",
    "CYCLE, M = 3, N = 6": f"{{kind: cycle, {SHARED}",
    "CYCLE (REV), M = 3, N = 6": f"{{kind: cycle_reverse, {SHARED}",
    "ring, N = 6, rank d/16": "{kind: ring, depth: 6, level_rank: 8, feed_forward_rank: 8}",
    "tied, N = 6, levels encoded": "{kind: cycle, num_blocks: 1, depth: 6}",
    "tied, N = 6": "{kind: cycle, num_blocks: 1, depth: 6}",
}
"""Schemes of both stacks, by row (Takase & Kiyono 2021; Heo et al. 2025)."""


def translation(root: Path, data: Path) -> list[Cell]:
    """Return the cells that compare ways to share layers in translation, on Multi30k.

    Both directions, the same batches for every scheme: three epochs, 1.3M target tokens. BLEU is of
    greedy translations of all 1,014 validation pairs. Blocks are pre-norm, since post-norm ones of
    six layers need more steps than there are.
    """
    folder, tokenizer = data / "translation/multi30k", root / "tokenizer.model"
    files = {
        part: {n: folder / f"{part}.{n}.xz" for n in ("de", "en")} for part in ("train", "val")
    }
    if not tokenizer.exists():
        megarecur(
            root, "prep", "tokenizer", *files["train"].values(), "--text-split", "line", "--pad",
            "--vocab-size", 8000, "--out", tokenizer,
        )  # fmt: skip
    cells = []
    for seed in (1, 2, 3):
        for source, target in (("de", "en"), ("en", "de")):
            pairs = root / f"{source}-{target}"
            if not (pairs / "train/manifest.json").exists():
                given: list[object] = []
                for prefix, part in (("--", "train"), ("--val-", "val")):
                    given += [f"{prefix}source", files[part][source]]
                    given += [f"{prefix}target", files[part][target]]
                given += ["--tokenizer", tokenizer, "--out", pairs]
                megarecur(root, "prep", "pairs", *given)
            cells += [translation_cell(root, pairs, row, seed) for row in SCHEMES]
    return cells


def translation_cell(root: Path, pairs: Path, row: str, seed: int) -> Cell:
    """Return the cell of a scheme, a direction and a seed."""
    name = re.sub(r"\W+", "-", row).strip("-").lower()
    run = root / f"{pairs.name}-{name}-seed{seed}"
    levels = ("model.positions=none", "model.level_encoding=sinusoidal")
    fast = ("train.precision=bf16", "train.compile=true")
    train = (
        "train", "configs/translation.yaml", f"run_dir={run}", f"seed={seed}", *fast,
        "train.steps=1380", "checkpoint.every=690", f"encoder={SCHEMES[row]}",
        f"recurrence={SCHEMES[row]}",
        f"data.train=[{{path: {pairs}/train}}]", f"data.val=[{{path: {pairs}/val}}]",
        f"data.tokenizer={root}/tokenizer.model", "train.eval_every=0", "train.eval_bleu=1014",
        *(levels if "levels" in row else ()),
    )  # fmt: skip
    columns = ("val/bleu", "val/loss", "speed/tokens_per_second")
    return Cell(f"{pairs.name}: {row}", run, (train,), columns=columns)


# ----------------------------------------------------------------------------------------- images

RING = "{kind: ring, depth: 6, level_rank: 8}"
TIED = ("recurrence={kind: cycle, num_blocks: 1, depth: 6}", "model.level_encoding=sinusoidal")
VANILLA = ("recurrence={kind: dense, num_layers: 6}",)
PICTURE_MODELS = {
    "ring": (128, (f"recurrence={RING}",)),
    "vanilla, equal FLOPs": (128, VANILLA),
    "one-wide, equal FLOPs": (128, (*VANILLA, "model.shared_feed_forward=true")),
    "universal, equal FLOPs": (128, TIED),
    "vanilla, equal parameters": (56, VANILLA),
    "one-wide, equal parameters": (88, (*VANILLA, "model.shared_feed_forward=true")),
    "universal, equal parameters": (144, TIED),
    "ring without attention signals": (
        128, ("recurrence={kind: ring, depth: 6, level_rank: 0, feed_forward_rank: 8}",)
    ),
    "ring without feed-forward signals": (
        128, ("recurrence={kind: ring, depth: 6, level_rank: 8, feed_forward_rank: 0}",)
    ),
}  # fmt: skip
"""Width and scheme by row. Equal to the ring's: its width, hence its FLOPs, or its parameters."""


def images(root: Path, data: Path) -> list[Cell]:
    """Return the cells that compare RingFormer with other ways to share layers, on CIFAR-10.

    As in Heo et al. 2025, with 32 pixels, 16 patches of 8, mean pooling; two epochs, the same
    pictures for all. Accuracy is of 2,000 test pictures.
    """
    if not (root / "cifar10/train/manifest.json").exists():
        megarecur(root, "prep", "images", data / "images/cifar10", "--out", root / "cifar10")
    return [picture_cell(root, row, seed) for seed in (1, 2, 3) for row in PICTURE_MODELS]


def picture_cell(root: Path, row: str, seed: int) -> Cell:
    """Return the cell of a model and a seed."""
    width, scheme = PICTURE_MODELS[row]
    run = root / f"{re.sub(r'[^a-z]+', '-', row.lower())}-seed{seed}"
    train = (
        "train", "configs/images.yaml", f"run_dir={run}", f"seed={seed}", *scheme,
        f"model.hidden_size={width}", f"model.ffn_hidden_size={4 * width}", "model.dropout=0.0",
        f"data.train=[{{path: {root}/cifar10/train}}]", f"data.val=[{{path: {root}/cifar10/val}}]",
        "data.images={crop: padded, padding: 4}", "task.image_size=32", "task.channels=3",
        "task.patch_size=8",
        "train.precision=bf16", "train.compile=true", "train.steps=780", "train.eval_every=0",
        "checkpoint.every=390",
    )  # fmt: skip
    columns = ("val/accuracy", "val/loss", "speed/tokens_per_second")
    return Cell(row, run, (train,), columns=columns)


# ---------------------------------------------------------------------------------------- common

STUDIES: dict[str, Callable[[Path, Path], list[Cell]]] = {
    "relaxed": relaxed, "ilr": ilr, "flip_flop": flip_flop, "logic": logic,
    "translation": translation, "images": images,
}  # fmt: skip


def do(root: Path, cell: Cell) -> None:
    """Run the commands of a cell; skip the first one if its output exists."""
    made = cell.makes is not None and cell.makes.exists()
    for command in cell.commands[made:]:
        megarecur(root, *command)


def collect(cells: list[Cell], kept: dict[str, list[float]]) -> dict[str, list[list[float]]]:
    """Return the scores of finished runs by row, in order."""
    rows: dict[str, list[list[float]]] = {}
    for cell in cells:
        if (scores := cell.scores(kept)) is not None:
            rows.setdefault(cell.row, []).append(scores)
    return rows


def show(name: str, cells: list[Cell]) -> None:
    """Print the finished cells as a table in Markdown, and plot them."""
    kept = read_scores(name, cells)
    rows, columns = collect(cells, kept), cells[0].columns
    print(f"\n| {name} | {' | '.join(columns)} | seeds |\n|---|{'---|' * len(columns)}---|")
    for row, runs in rows.items():
        texts = []
        for values in zip(*runs, strict=True):
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            texts.append(f"{statistics.mean(values):.4f}{spread}")
        print(f"| {row} | {' | '.join(texts)} | {len(runs)} |")
    done = sum(map(len, rows.values()))
    print(f"\n{done} of {len(cells)} cells")
    near = collect([cell for cell in cells if cell.drawn], kept)
    if near:
        draw(name, near, columns)


def draw(name: str, rows: dict[str, list[list[float]]], columns: tuple[str, ...]) -> None:
    """Plot a panel per column, a line per row of the table, a dot per run and a bar at their
    mean."""
    from matplotlib.figure import Figure

    size = 2 + 3 * len(columns), 1 + 0.35 * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for i, (axes, column) in enumerate(zip(panels, columns, strict=True)):
        for y, runs in enumerate(rows.values()):
            values = [scores[i] for scores in runs]
            axes.plot(values, [y] * len(values), "o", color="tab:blue", alpha=0.6)
            axes.plot(statistics.mean(values), y, "|", color="black", markersize=14)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_title(column.removeprefix("val/").replace("/", ", "))
        axes.locator_params(axis="x", nbins=4)
        axes.margins(0.1)
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURES / f"study_{name}.png", dpi=120)


def main() -> None:
    """Run missing cells until the minutes are over, then show the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=STUDIES)
    parser.add_argument("--minutes", type=float, default=60.0, help="0: only print finished cells")
    parser.add_argument("--data", type=Path, default=os.environ.get("MEGARECUR_DATA"))
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side")
    options = parser.parse_args()
    if options.data is None:
        parser.error("name the development data: --data FOLDER, or MEGARECUR_DATA")
    began, root = time.monotonic(), Path("runs") / options.name
    root.mkdir(parents=True, exist_ok=True)
    cells = STUDIES[options.name](root, options.data)
    if options.jobs > 1:
        THREADS["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.jobs))

    kept = read_scores(options.name, cells)

    def work(cell: Cell) -> None:
        if cell.scores(kept) is None and time.monotonic() - began < 60 * options.minutes:
            do(root, cell)
            if (scores := cell.scores(kept)) is not None:
                keep_scores(options.name, cell, scores)
            print(f"{cell.run.name}: {scores}", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        for _ in pool.map(work, cells):
            pass
    show(options.name, cells)


if __name__ == "__main__":
    main()
