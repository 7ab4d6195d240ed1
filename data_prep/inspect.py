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

from megarecur.data.corpus import Corpus, Manifest, check_tokenizer, read_manifest
from megarecur.data.fit import IMAGE, TRANSLATION
from megarecur.data.tokenizer import BYTES, load_tokenizer
from megarecur.data_prep.images import describe_sizes
from megarecur.data_prep.pairs import describe_dropped
from megarecur.errors import DataError
from megarecur.reading import escape

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
    pairs: list[tuple[int, str, str]]
    """Sentence pairs (number, source, target), which take the place of documents."""

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
    held = read_manifest(path)
    if held.task is not None and held.task["kind"] == IMAGE:
        from megarecur.data.images import ImageCorpus  # imports torch, which takes seconds

        images = ImageCorpus(path, verify=verify)
        return Inspection(images.path, held, images.fingerprint, [], 1.0, 1, [], [])
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
    is_paired = manifest.task is not None and manifest.task["kind"] == TRANSLATION
    size = lengths.size // 2 if is_paired else lengths.size
    drawn = np.random.default_rng(seed).choice(size, min(num_samples, size), replace=False)
    chosen = sorted(drawn.tolist())

    def decode(number: int) -> str:
        count = min(int(lengths[number]) - 1, sample_tokens)
        return model.decode(corpus.read(int(corpus.documents[number]), count).tolist())

    return Inspection(
        path=corpus.path,
        manifest=manifest,
        fingerprint=corpus.fingerprint,
        histogram=[(1 << i, int(count)) for i, count in enumerate(counts)],
        mean_length=float(lengths.mean()),
        longest=int(lengths.max()),
        samples=[] if is_paired else [(n, decode(n)) for n in chosen],
        pairs=[(n, decode(2 * n), decode(2 * n + 1)) for n in chosen] if is_paired else [],
    )


def describe_task(task: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the manifest's description of labelled samples, or of sentence pairs."""
    if task["kind"] == TRANSLATION:
        return [
            ("pairs", f"{task['num_pairs']:,}"),
            *(
                (side, f"{task[f'{side}_tokens']:,} tokens (longest {task[f'longest_{side}']:,})")
                for side in ("source", "target")
            ),
            ("longest pair", f"{task['longest_pair']:,} tokens"),
            ("dropped", describe_dropped(task["dropped"]) or "none"),
        ]
    counts = zip(task["classes"], task["of_classes"], strict=True)
    if task["kind"] == IMAGE:
        return [
            ("pictures", f"{task['num_samples']:,}"),
            ("sizes", describe_sizes(task)),
            ("channels", str(task["channels"])),
            *(
                (f"{key} of training", ", ".join(f"{value:.4f}" for value in task[key]))
                for key in ("mean", "std")
            ),
            ("classes", ", ".join(f"{name}: {count:,}" for name, count in counts)),
        ]
    return [
        ("task", f"{task['name']}, {task['num_samples']:,} samples of kind {task['kind']}"),
        ("labels", ", ".join(f"{name}: {count:,}" for name, count in counts)),
    ]


def render_inspection(inspection: Inspection) -> RenderableType:
    """Render an inspection as tables for a terminal."""
    manifest = inspection.manifest
    facts = Table(box=None, show_header=False)
    if manifest.task is not None and manifest.task["kind"] == IMAGE:
        for name, value in (
            *describe_task(manifest.task),
            ("bytes of pictures", f"{manifest.num_bytes:,}"),
            ("damaged and skipped", f"{manifest.documents_skipped:,}"),
            ("identity", inspection.fingerprint),
        ):
            facts.add_row(name, Text(escape(value)))
        return Group(Text(escape(str(inspection.path)), style="bold"), facts)
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
        facts.add_row(name, Text(escape(value)))
    lengths = Table("tokens", "documents", "", box=None, title="Lengths of documents")
    most = max(count for _, count in inspection.histogram)
    for n, count in inspection.histogram:
        bar = "█" * -(-count * BAR_WIDTH // most)
        lengths.add_row(f"{n:,} to {2 * n - 1:,}", f"{count:,}", bar)
    panels: list[RenderableType] = [
        Panel(Text(escape(text)), title=f"document {number:,}", title_align="left")
        for number, text in inspection.samples
    ]
    if inspection.pairs:
        sides = Table("pair", "source", "target", show_lines=True)
        for number, source, target in inspection.pairs:
            sides.add_row(f"{number:,}", Text(escape(source)), Text(escape(target)))
        panels.append(sides)
    return Group(Text(escape(str(inspection.path)), style="bold"), facts, lengths, *panels)
