"""Every command of the documentation runs: page by page, in order, in one folder for each page.

Pages start from what `docs/getting-started.md` leaves behind, as users do, with small configs,
corpora and inputs of the names that the pages use. A block that is not run says why in a comment
before it.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from support.forks import Forks
from support.markdown import PAGES, ROOT, Block, explain_metric, read_blocks
from support.once import make_once

from megarecur.launch.folder import FILES

START = ROOT / "docs/getting-started.md"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SMALL = {
    "model": {"hidden_size": 32, "num_heads": 2, "num_kv_heads": 2, "ffn_hidden_size": 64},
    "data": {"seq_length": 32},
    "train": {
        "steps": 40, "global_batch_size": 4, "micro_batch_size": 2, "eval_every": 20,
        "eval_samples": 4, "eval_final": 4, "sample_tokens": 4,
    },
    "checkpoint": {"every": 20, "keep_last": 2},
}  # fmt: skip
"""Replaces values of the configs that commands train."""

FEW_SOURCES = """
import sysconfig
from pathlib import Path
from megarecur.data_prep import stdlib
stdlib.standard_library_sources = lambda: sorted(Path(sysconfig.get_path("stdlib")).glob("a*.py"))
"""
"""The demo's corpus is part of the library only."""


def runnable(page: Path) -> list[Block]:
    return [b for b in read_blocks(page) if b.language in ("sh", "python") and not b.why_not]


def make_inputs(folder: Path) -> None:
    """Configs and the files that pages name as the user's own."""
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.parent.name == "configs":
            for section, values in SMALL.items():
                config[section] |= values
            if "task" in config:  # Of pictures the length follows from their size.
                del config["data"]["seq_length"]
            if "encoder" in config:
                config["data"] |= {"seq_length": 64, "truncate": True}
                config["train"] |= {"micro_batch_size": 1, "batch_tokens": 256}
                config["optimizer"]["schedule"]["warmup_steps"] = 4
            if "curriculum" in config["recurrence"]:
                config["recurrence"]["curriculum"]["steps"] = 10
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(yaml.safe_dump(config), encoding="utf-8")
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("t*.py"))[:60]
    texts = [path.read_text(encoding="utf-8")[:3000] for path in sources]
    (folder / "books").mkdir()
    (folder / "texts").mkdir()
    for i, text in enumerate(texts):
        with lzma.open(folder / f"books/{i}.txt.xz", "wt", encoding="utf-8") as file:
            file.write(text)
    lines = [
        line.strip()
        for path in sources[:20]
        for line in path.open(encoding="utf-8")
        if line.strip()
    ]
    for split, own in (("train", lines[50:]), ("val", lines[:50])):
        for side, turn in (("de", 1), ("en", -1)):
            text = "".join(" ".join(line.split()[::turn]) + "\n" for line in own)
            (folder / f"{split}.{side}.xz").write_bytes(lzma.compress(text.encode()))
    import zstandard

    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts[:4])
    (folder / "texts/a.jsonl.zst").write_bytes(zstandard.compress(rows.encode()))
    for label in ("cat", "dog"):
        (folder / "photos" / label).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.default_rng(i).integers(0, 256, (44 + i, 60, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"photos/{label}/{label}{i}.jpg")
    for label in ("good", "bad"):
        (folder / "reviews" / label).mkdir(parents=True)
        for i in range(12):
            text = f"This book is {label}, for the reason number {i}.\n"
            (folder / "reviews" / label / f"{i}.txt").write_text(text, encoding="utf-8")


class Shell:
    """Runs blocks of pages in a folder."""

    def __init__(self, forks: Forks) -> None:
        self.forks = forks
        path = f"{forks.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        ranks = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        own = {k: v for k, v in os.environ.items() if k not in ranks and not k.startswith("SLURM_")}
        self.environment = own | {"PATH": path, "OMP_NUM_THREADS": "1"}

    def run(self, block: Block, folder: Path) -> None:
        """Run a block; every command of it must succeed."""
        command = ["bash", "-euo", "pipefail", "-c", block.text]
        if block.language == "python":
            command = [sys.executable, "-c", block.text]
        done = subprocess.run(
            command, cwd=folder, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200,
        )  # fmt: skip
        assert done.returncode == 0, f"{block.where}\n{block.text}\n{done.stdout[-4000:]}"


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    forks = Forks(tmp_path_factory.mktemp("forks"), FEW_SOURCES)
    yield Shell(forks)
    forks.close()


@pytest.fixture(scope="module")
def started(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which getting started was followed, and a dense model was exported."""
    dense = """
        megarecur train configs/quickstart.yaml run_dir=runs/dense-source train.steps=5 \
            optimizer.schedule.warmup_steps=1 'recurrence={kind: dense, num_layers: 4}'
        megarecur export runs/dense-source --to hf exported-dense
    """

    def follow(folder: Path) -> None:
        make_inputs(folder)
        for block in (*runnable(START), Block(START, 0, "sh", dense, "")):
            shell.run(block, folder)

    return make_once(tmp_path_factory, "started", follow)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if runnable(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_commands_of_a_page_run(page: Path, shell: Shell, started: Path, tmp_path: Path) -> None:
    blocks = runnable(page)
    folder = started if page == START else shutil.copytree(started, tmp_path / "work")
    if page != START:
        for block in blocks:
            shell.run(block, folder)
    names = {name.rstrip("/") for name in FILES}
    for run in folder.glob("runs/*"):
        extra = {p.name for p in run.iterdir() if not p.name.startswith("tokenizer")} - names
        assert not extra, f"{run.name}: {extra} are not in FILES of megarecur.launch.folder"
        metrics = run / "metrics.jsonl"
        for row in map(json.loads, metrics.read_text().splitlines() if metrics.exists() else ()):
            unknown = {tag for tag in row if explain_metric(tag) is None}
            assert not unknown, f"{run.name}: {unknown} are not in METRICS"


def test_a_failing_command_of_a_block_is_noticed(shell: Shell, tmp_path: Path) -> None:
    block = Block(START, 1, "sh", "megarecur check missing.yaml\ntrue\n", "")
    with pytest.raises(AssertionError, match=r"getting-started.md:1[^$]*missing.yaml"):
        shell.run(block, tmp_path)
