"""Corpora prepared in other processes that are killed, and what they leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megarecur.data.corpus import Corpus
from megarecur.data.tokenizer import load_tokenizer
from megarecur.data_prep.shards import hold

ROOT = Path(__file__).resolve().parents[2]


def texts(corpus: Corpus) -> list[str]:
    """Every document of a corpus of bytes."""
    tokenizer = load_tokenizer("bytes")
    tokens = corpus.read(0, corpus.num_tokens)
    ends = [*corpus.documents[1:].tolist(), corpus.num_tokens]
    return [
        tokenizer.decode(tokens[start : end - 1].tolist())
        for start, end in zip(corpus.documents.tolist(), ends, strict=True)
    ]


OPTIONS: dict[str, Any] = {"val_fraction": 0.1, "part_bytes": 3000}


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


Mark = tuple[int, int]


def marks(partial: Path) -> dict[str, Mark]:
    """Which files of unfinished work are finished; a file written again has another mark."""
    files = [path for suffix in ("npz", "tokens") for path in partial.glob(f"*.{suffix}")]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def kill_once(inputs: Sequence[str | Path], out: Path, when: Callable[[], bool]) -> bool:
    """Start preparing in another process and kill it; whether it was still at work."""
    program = (
        "import sys\nfrom megarecur.data_prep.shards import prepare_shards\n"
        "if __name__ == '__main__':\n"
        f"    prepare_shards(sys.argv[2:], sys.argv[1], 'bytes', workers=2, **{OPTIONS})\n"
    )
    script = out.with_name("prepare.py")
    script.write_text(program)
    process = subprocess.Popen(
        [sys.executable, str(script), str(out), *map(str, inputs)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        while process.poll() is None and not when():
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return process.returncode == -signal.SIGKILL


def wait_for_workers(partial: Path) -> None:
    """Wait until the workers of a killed process have noticed that it is gone: they hold its lock,
    and may still write."""
    if partial.exists():
        with hold(partial, patience=60.0):
            pass
