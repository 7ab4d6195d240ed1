"""Fenced blocks, links, headings and metrics of the project's Markdown files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megarecur.train.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]

PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "slurm/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
)
"""What users read."""

FENCE = re.compile(r"^(?P<mark>```+)(?P<language>\w*)\n(?P<text>.*?)^(?P=mark)$", re.M | re.S)
NOT_RUN = re.compile(r"<!-- not run: (?P<why>[^>]+) -->\s*\Z")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+?)\s*$", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    why_not: str
    """Why it is not run; "" if it is."""

    @property
    def where(self) -> str:
        """Its place, such as docs/slurm.md:12."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text, blocks = page.read_text(encoding="utf-8"), []
    for found in FENCE.finditer(text):
        mark = NOT_RUN.search(text[: found.start()])
        line = text.count("\n", 0, found.start()) + 1
        why = mark["why"].strip() if mark else ""
        blocks.append(Block(page, line, found["language"], found["text"], why))
    return blocks


def read_prose(page: Path) -> str:
    """Return the text of a page without fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def read_anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page."""
    plain = (
        re.sub(r"[`*]|\]\([^)]*\)|\[", "", title) for title in HEADING.findall(read_prose(page))
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in plain}


def explain_metric(tag: str) -> str | None:
    """Return the meaning of a key of metrics.jsonl; None if METRICS does not list it."""
    if tag in METRICS:
        return METRICS[tag]
    for pattern, meaning in METRICS.items():
        parts = re.split(r"\{\w+\}", pattern)
        if len(parts) > 1 and re.fullmatch(".+".join(map(re.escape, parts)), tag):
            return meaning
    return None
