"""Inspect a corpus: counts, lengths of documents, and decoded text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from megarecur.data.corpus import Corpus, Manifest, check_tokenizer
from megarecur.data.tokenizer import BYTES, load_tokenizer
from megarecur.errors import DataError

BAR_WIDTH = 40


@dataclass(frozen=True)
class Inspection:
    """The values that `render_inspection` shows."""

    path: Path
    manifest: Manifest
    fingerprint: str
    histogram: list[tuple[int, int]]
    """Pairs (n, documents of n to 2n - 1 tokens) for n = 1, 2, 4, ..., end of document included."""
    mean_length: float
    longest: int
    samples: list[tuple[int, str]]
    """Pairs (number of the document, the beginning of its text)."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of UTF-8 text per token, excluding ends of documents."""
        manifest = self.manifest
        return manifest.num_bytes / max(manifest.num_tokens - manifest.num_documents, 1)


def inspect_corpus(
    path: str | Path,
    *,
    num_samples: int = 3,
    sample_tokens: int = 120,
    seed: int = 1,
    tokenizer: str | Path | None = None,
    verify: bool = True,
) -> Inspection:
    """Inspect a corpus.

    Args:
        sample_tokens: tokens to show of each.
        tokenizer: by default, the corpus's copy.
        verify: compare every file with its hash.

    Raises:
        DataError: the corpus is damaged, the tokenizer is not the one that made it, or the number
        of samples is negative.
    """
    if num_samples < 0:
        raise DataError(f"num_samples={num_samples} must be at least 0; raise it")
    corpus = Corpus(path, verify=verify)
    manifest = corpus.manifest
    if tokenizer is None:
        copies = [file for file in manifest.files if file.startswith("tokenizer.")]
        tokenizer = BYTES if manifest.tokenizer == BYTES else corpus.path / "".join(copies[:1])
    model = load_tokenizer(tokenizer)
    check_tokenizer(path, manifest, str(tokenizer), model.fingerprint)
    ends = np.append(corpus.documents[1:], corpus.num_tokens)
    lengths = ends - corpus.documents
    counts = np.bincount(np.frexp(lengths.astype(np.float64))[1] - 1)
    chosen = np.random.default_rng(seed).choice(
        lengths.size, min(num_samples, lengths.size), replace=False
    )
    samples = []
    for number in sorted(chosen.tolist()):
        size = min(int(lengths[number]) - 1, sample_tokens)
        samples.append(
            (number, model.decode(corpus.read(int(corpus.documents[number]), size).tolist()))
        )
    return Inspection(
        path=corpus.path,
        manifest=manifest,
        fingerprint=corpus.fingerprint,
        histogram=[(1 << i, int(count)) for i, count in enumerate(counts)],
        mean_length=float(lengths.mean()),
        longest=int(lengths.max()),
        samples=samples,
    )


def describe_task(task: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the manifest's description of labelled samples."""
    counts = zip(task["classes"], task["of_classes"], strict=True)
    return [
        ("task", f"{task['name']}, {task['num_samples']:,} samples of kind {task['kind']}"),
        ("labels", ", ".join(f"{name}: {count:,}" for name, count in counts)),
    ]


def render_inspection(inspection: Inspection) -> RenderableType:
    """Render an inspection as tables for a terminal."""
    manifest = inspection.manifest
    facts = Table(box=None, show_header=False)
    for name, value in (
        ("tokens", f"{manifest.num_tokens:,}"),
        ("documents", f"{manifest.num_documents:,}"),
        ("bytes of text", f"{manifest.num_bytes:,}"),
        ("bytes per token", f"{inspection.bytes_per_token:.3f}"),
        ("tokens per document", f"{inspection.mean_length:,.0f} (longest {inspection.longest:,})"),
        ("duplicates removed", f"{manifest.duplicates_removed:,}"),
        ("near-duplicates removed", f"{manifest.near_duplicates_removed:,}"),
        ("documents skipped", f"{manifest.documents_skipped:,}"),
        ("tokenizer", f"{manifest.tokenizer}, vocabulary {manifest.vocab_size:,}"),
        ("input files", f"{len(manifest.sources):,}"),
        ("identity", inspection.fingerprint),
        *(describe_task(manifest.task) if manifest.task else ()),
    ):
        facts.add_row(name, Text(value))
    lengths = Table("tokens", "documents", "", box=None, title="Lengths of documents")
    most = max(count for _, count in inspection.histogram)
    for n, count in inspection.histogram:
        bar = "█" * -(-count * BAR_WIDTH // most)
        lengths.add_row(f"{n:,} to {2 * n - 1:,}", f"{count:,}", bar)
    panels = [
        Panel(Text(text), title=f"document {number:,}", title_align="left")
        for number, text in inspection.samples
    ]
    return Group(Text(str(inspection.path), style="bold"), facts, lengths, *panels)
