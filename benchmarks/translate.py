"""Translation in batches against sentence by sentence: sentences per second of beam search.

    python benchmarks/translate.py RUN FILE [--sentences 128] [--batch 64] [--beam 4] [--rounds 3]

The first sentences of a file are translated in batches and one by one, by turns in one process, so
that changes in the machine's speed affect both. Both sides must find the same texts, up to ties in
the last bits. The median ratio of rounds is printed (target: at least 6 on 2 cores), and that of
processor time, for machines with other work.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

from megarecur.checkpoint.load import load_model, open_tokenizer
from megarecur.inference.translate import (
    TranslateOptions,
    check_translation,
    encode_sentences,
    translate,
)
from megarecur.launch.translate import read_lines
from megarecur.parallel.mesh import pick_device


def read_number(option: str, default: int) -> int:
    """Return the number given for an option of the command line."""
    return int(sys.argv[sys.argv.index(option) + 1]) if option in sys.argv else default


def main() -> None:
    """Measure both sides by turns and print the figures."""
    run_dir, file = Path(sys.argv[1]), Path(sys.argv[2])
    count, rounds = read_number("--sentences", 128), read_number("--rounds", 3)
    model, run = load_model(run_dir, None, pick_device("auto"))
    tokenizer = open_tokenizer(run)
    sentences = encode_sentences(tokenizer, read_lines(file)[:count])
    batched = TranslateOptions(beam=read_number("--beam", 4), batch=read_number("--batch", 64))
    single = replace(batched, batch=1)
    check_translation(run.config, sentences, batched)
    rates: dict[int, list[float]] = {}
    seconds: dict[int, list[float]] = {}
    """Processor time, of all threads."""
    texts: dict[int, list[str]] = {}
    for _ in range(rounds):
        for options in (batched, single):
            began, used = time.perf_counter(), time.process_time()
            found = translate(model, tokenizer, sentences, options)
            rates.setdefault(options.batch, []).append(len(found) / (time.perf_counter() - began))
            seconds.setdefault(options.batch, []).append(time.process_time() - used)
            texts[options.batch] = [each.texts[0] for each in found]
    equal = sum(a == b for a, b in zip(texts[batched.batch], texts[1], strict=True))
    for batch, found_rates in rates.items():
        shown = " ".join(f"{rate:.2f}" for rate in found_rates)
        print(f"batch {batch:3}: {statistics.median(found_rates):7.2f} sentences/s  ({shown})")
    used = statistics.median(seconds[1]) / statistics.median(seconds[batched.batch])
    ratios = [a / b for a, b in zip(rates[batched.batch], rates[1], strict=True)]
    print(
        f"beam {batched.beam}, {len(sentences)} sentences, {equal} texts equal: "
        f"{statistics.median(ratios):.2f} x  ({min(ratios):.2f} to {max(ratios):.2f}), "
        f"by processor time {used:.2f} x"
    )


if __name__ == "__main__":
    main()
