"""The default corpus, available everywhere: the sources of the running Python's standard
library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from megarecur.data.corpus import Manifest
from megarecur.data.tokenizer import tokenizer_vocab_size
from megarecur.data_prep.progress import ProgressReport
from megarecur.data_prep.readers import Reading
from megarecur.data_prep.shards import prepare_shards
from megarecur.data_prep.tokenizer import train_tokenizer
from megarecur.errors import DataError

# Slim installations lack the tests; user-installed packages are not part of the library.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def standard_library_sources() -> list[Path]:
    """Return every .py file of the standard library, sorted, without test folders.

    Raises:
        DataError: this Python has no sources on disk.
    """
    root = Path(sysconfig.get_path("stdlib"))
    sources = [
        path
        for path in sorted(root.rglob("*.py"))
        if not LEFT_OUT & set(path.relative_to(root).parts) and path.stat().st_size
    ]
    if not sources:
        raise DataError(f"{root}: this Python has no library sources; use your own text instead")
    return sources


def prepare_quickstart(
    out: str | Path = "data/quickstart",
    *,
    vocab_size: int = 2048,
    val_fraction: float = 0.05,
    workers: int = 0,
    progress: ProgressReport | None = None,
) -> dict[str, Manifest]:
    """Make OUT/tokenizer.model, OUT/train and OUT/val from the standard library, unless they exist.

    Raises:
        DataError: OUT has a tokenizer of another size; see also `train_tokenizer` and
        `prepare_shards`.
    """
    sources = standard_library_sources()
    tokenizer = Path(out) / "tokenizer.model"
    if not tokenizer.exists():
        train_tokenizer(sources, tokenizer, vocab_size=vocab_size, progress=progress)
    elif (found := tokenizer_vocab_size(tokenizer)) != vocab_size:
        raise DataError(
            f"{tokenizer}: has {found} ids, not the --vocab-size of {vocab_size}; delete {out}, or "
            "choose another --out"
        )
    return prepare_shards(
        sources,
        out,
        tokenizer,
        Reading(errors="skip"),
        val_fraction=val_fraction,
        workers=workers,
        progress=progress,
    )
