"""Tokenisation speed against independent sentencepiece processes.

    python benchmarks/tokenisation.py [--model MODEL] [--processes N] FILES...

FILES are inputs of `megarecur prep shards` (MEGARECUR_DATA's lm_en/gutenberg/train-*.jsonl.xz, for
example). The reference is N processes, each with its own SentencePieceProcessor and its share of
the paragraphs (texts cut at blank lines) in memory; only `encode` is timed, from the first start to
the last end. Ours is measured twice: the same N processes encode whole documents in memory with our
tokenizer, timed in the same way; and `prepare_shards` with N workers runs from compressed files to
verified shards, timed as a whole, imports included. Without --model, a BPE model of 8,192 pieces is
trained first.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from megarecur.data.tokenizer import load_tokenizer
from megarecur.data_prep.readers import Reading, find_sources, read_documents
from megarecur.data_prep.shards import prepare_shards
from megarecur.data_prep.tokenizer import train_tokenizer


def encode(kind: str, model: str, texts: list[str], barrier: Any, results: Any) -> None:
    """Run one process: wait for the others, encode its share, report (begin, end, tokens)."""
    if kind == "paragraphs":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=model)
        texts = [paragraph for text in texts for paragraph in text.split("\n\n")]
    else:
        tokenizer = load_tokenizer(model)
    barrier.wait()
    began, tokens = time.perf_counter(), 0
    for text in texts:
        tokens += len(
            processor.encode(text) if kind == "paragraphs" else tokenizer.encode_array(text)
        )
    results.put((began, time.perf_counter(), tokens))


def measure(kind: str, model: str, documents: list[str], processes: int) -> float:
    """Return tokens per second of all processes together."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    shares = [documents[i::processes] for i in range(processes)]
    workers = [
        context.Process(target=encode, args=(kind, model, share, barrier, results))
        for share in shares
    ]
    for worker in workers:
        worker.start()
    begins, ends, tokens = zip(*(results.get() for _ in workers), strict=True)
    for worker in workers:
        worker.join()
    rate = sum(tokens) / (max(ends) - min(begins))
    print(f"{kind:28} {sum(tokens):12,} tokens {rate / 1e6:8.2f} M tokens/s")
    return rate


def main() -> None:
    """Measure both sides, and print their speeds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("files", nargs="+")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or str(
            train_tokenizer(options.files, Path(folder) / "tokenizer.model", vocab_size=8192)
        )
        documents = [
            (document or b"").decode()
            for source in find_sources(options.files)
            for document in read_documents(source, Reading())
        ]
        theirs = measure("paragraphs", model, documents, options.processes)
        ours = measure("whole documents, ours", model, documents, options.processes)
        began = time.perf_counter()
        manifest = prepare_shards(
            options.files, Path(folder) / "out", model, workers=options.processes
        )["train"]
        rate = manifest.num_tokens / (time.perf_counter() - began)
        name, tokens = "files to shards, ours", manifest.num_tokens
        print(f"{name:28} {tokens:12,} tokens {rate / 1e6:8.2f} M tokens/s")
    print(
        f"ratio {ours / theirs:.2f} in memory, {rate / theirs:.2f} from files to shards; wanted 0.9"
    )


if __name__ == "__main__":
    main()
