"""Loading speed against StreamingDataset's own iteration, at sequence length 2,048.

    python benchmarks/loading.py [CORPUS]

CORPUS is a prepared corpus (default: a synthetic one of 24 M tokens with documents of 900 tokens on
average). Both sides deliver int64 batches of 8 samples in shuffled order from local files, with one
process, one thread and whole epochs. The clock of each side starts after its first batch, so that
the time to open a corpus is not counted. StreamingDataset reads two corpora: rows of 2,048 tokens,
written from the same tokens, as its users would write them; and the corpus's own shards (chunks of
16,384 tokens, 8 samples each). It delivers tokens only; megarecur delivers tokens, shifted labels
and, in the row "with documents", positions and document numbers.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from megarecur.data.corpus import COLUMN, Corpus
from megarecur.data.loader import Loader
from megarecur.data.torchvision_stub import make_torchvision_importable

SEQ_LENGTH, BATCH, SECONDS = 2048, 8, 4.0


def synthetic_corpus(folder: Path) -> Corpus:
    """Prepare 24 M random bytes, in documents of lognormal length, by `prepare_shards`."""
    from megarecur.data_prep.readers import Reading
    from megarecur.data_prep.shards import prepare_shards

    rng = np.random.default_rng(0)
    lengths = rng.lognormal(6.3, 1.0, 27_000).astype(int) + 1
    letters = rng.integers(97, 123, int(lengths.sum()), np.uint8).tobytes()
    ends = np.cumsum(lengths)
    documents = (letters[e - n : e] for e, n in zip(ends, lengths, strict=True))
    (folder / "random.txt").write_bytes(b"\n\0\n".join(documents))
    reading = Reading(text_split="separator", separator="\0")
    prepare_shards([folder / "random.txt"], folder / "corpus", "bytes", reading)
    return Corpus(folder / "corpus" / "train")


def rows_per_second(name: str, epoch: Callable[[], Iterator[int]]) -> float:
    """Return samples per second after the first batch of each epoch, for about SECONDS."""
    rows, seconds = 0, 0.0
    while seconds < SECONDS:
        batches = epoch()
        next(batches)
        began = time.perf_counter()
        for n in batches:
            rows += n
            if time.perf_counter() - began > 2 * SECONDS:
                break
        seconds += time.perf_counter() - began
    rate = rows / seconds
    print(f"{name:44} {rate:10,.0f} samples/s {rate * SEQ_LENGTH / 1e6:8.1f} M tokens/s")
    return rate


def main() -> None:
    """Measure both sides, and print their speeds and ratios."""
    warnings.filterwarnings("ignore")
    make_torchvision_importable()
    from streaming import MDSWriter, StreamingDataset
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus = Corpus(sys.argv[1]) if len(sys.argv) > 1 else synthetic_corpus(folder)
        row_type = f"ndarray:{corpus.dtype.name}:{SEQ_LENGTH}"
        with MDSWriter(out=str(folder / "rows"), columns={COLUMN: row_type}) as writer:
            for start in range(0, corpus.num_tokens - SEQ_LENGTH, SEQ_LENGTH):
                writer.write({COLUMN: corpus.read(start, SEQ_LENGTH)})

        def theirs(local: Path, batch_size: int, predownload: int | None) -> Iterator[int]:
            dataset = StreamingDataset(
                local=str(local), shuffle=True, batch_size=batch_size, predownload=predownload
            )
            for batch in DataLoader(dataset, batch_size=batch_size):
                yield batch[COLUMN].long().numel() // SEQ_LENGTH

        def ours(mask_documents: bool) -> Iterator[int]:
            loader = Loader(
                [(corpus, 1.0)], seq_length=SEQ_LENGTH, global_batch_size=BATCH,
                micro_batch_size=BATCH, dp_rank=0, dp_size=1, seed=1, mask_documents=mask_documents,
            )  # fmt: skip
            for step in range(corpus.num_tokens // SEQ_LENGTH // BATCH):
                yield sum(len(batch.tokens_BS) for batch in loader.batch(step))

        plain = rows_per_second("megarecur, tokens and labels", lambda: ours(False))
        masked = rows_per_second("megarecur, with documents", lambda: ours(True))
        rows, chunks = folder / "rows", corpus.path
        for what, least, default in (("defaults", 20, None), ("predownload 4096", 5, 4096)):
            other = rows_per_second(
                f"StreamingDataset, rows, {what}", lambda d=default: theirs(rows, BATCH, d)
            )
            print(
                f"    ratio {plain / other:.1f} (with documents {masked / other:.1f}), "
                f"wanted {least}"
            )
            other = rows_per_second(
                f"StreamingDataset, our chunks, {what}", lambda d=default: theirs(chunks, 1, d)
            )
            print(f"    ratio {plain / other:.1f} (with documents {masked / other:.1f})")


if __name__ == "__main__":
    main()
