"""Translation of files by a run, for `megarecur translate`: reading, scores, output, pictures."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarecur.checkpoint.load import Run, load_model, open_tokenizer
from megarecur.data.tokenizer import Tokenizer
from megarecur.data_prep.compressed import open_whole
from megarecur.errors import CheckpointError, ConfigError, DataError
from megarecur.files import replace_file
from megarecur.inference.bleu import score_texts
from megarecur.inference.decoder import read_cross_attention
from megarecur.inference.translate import (
    Sentence,
    TranslateOptions,
    Translation,
    check_translation,
    encode_sentences,
    start_token,
    translate,
    truncate_sources,
)
from megarecur.model.transformer import Transformer
from megarecur.parallel.mesh import pick_device
from megarecur.recurrence.schemes import build_map

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Files:
    """The files of a translation."""

    source: Path
    reference: Path | None = None
    prefix: Path | None = None
    out: Path | None = None
    """Output; None: standard output."""

    @property
    def record(self) -> Path | None:
        """The file of scores and options beside the output."""
        return None if self.out is None else self.out.with_name(f"{self.out.name}.json")


@dataclass(frozen=True)
class Translated:
    """The results of `translate_files`."""

    lines: list[str]
    """Lines of output."""
    summary: list[str]
    """Speed and scores, for people."""
    record: dict[str, Any]
    """Options, counts, speed and scores."""
    model: Transformer
    run: Run
    tokenizer: Tokenizer
    sentences: list[Sentence]
    found: list[Translation]


def translate_files(
    run_dir: Path,
    files: Files,
    options: TranslateOptions,
    step: int | None = None,
    device: str = "auto",
    progress: Callable[[int], AbstractContextManager[object]] = lambda total: nullcontext(),
    advance: Callable[[int, int], None] = lambda sentences, tokens: None,
    line_to_draw: int | None = None,
) -> Translated:
    """Translate a file line by line; write the output and its record, if `files.out` is given.

    Args:
        progress: context entered with the number of sentences.
        advance: called with the finished sentences of each batch, and their tokens.
        line_to_draw: number of a line that the source must have.

    Raises:
        MegarecurError: no encoder-decoder run, wrong options, or files that cannot be read or do
            not match in their numbers of lines.
    """
    if files.out is not None and not files.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {files.out}: its folder does not exist; create it first")
    lines = read_lines(files.source)
    if not lines:
        raise DataError(f"{files.source}: is empty; give it a sentence per line")
    if line_to_draw is not None:
        check_line(line_to_draw, len(lines))
    beside = {
        name: read_matching(path, files.source, len(lines)) if path is not None else None
        for name, path in (("reference", files.reference), ("prefix", files.prefix))
    }
    model, run = load_model(run_dir, step, pick_device(device))
    tokenizer = open_tokenizer(run)
    sentences = encode_sentences(tokenizer, lines, beside["prefix"])
    check_translation(run.config, sentences, options)
    began = time.perf_counter()
    with progress(len(sentences)):
        found = translate(model, tokenizer, sentences, options, advance)
    seconds = time.perf_counter() - began
    if unfinished := [number for number, each in enumerate(found, 1) if not each.hypotheses]:
        raise CheckpointError(
            f"{run.checkpoint}: its probabilities are not finite for line {unfinished[0]}; use "
            "another checkpoint"
        )
    tokens = sum(len(h.tokens) + h.ended for each in found for h in each.hypotheses)
    record = describe(run, files, options) | {
        "sentences": len(found),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "sentences_per_second": round(len(found) / seconds, 3),
        "tokens_per_second": round(tokens / seconds, 3),
    }
    summary = [
        f"{len(found)} sentences, {tokens} tokens in {seconds:.1f} s: "
        f"{len(found) / seconds:.1f} sentences/s, {tokens / seconds:.0f} tokens/s "
        f"({record['search']}, length penalty {options.penalty})"
    ]
    if beside["reference"] is not None:
        scores = score_texts([each.texts[0] for each in found], beside["reference"])
        record |= scores
        summary += [
            f"{title} {scores[name]:.2f}  {scores[f'{name}_signature']}"
            for name, title in (("bleu", "BLEU"), ("chrf", "chrF"))
        ]
    output = list(format_lines(found, options))
    if files.out is not None:
        assert files.record is not None
        replace_file(files.out, "".join(f"{line}\n" for line in output))
        replace_file(files.record, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        summary.append(f"{files.out} (scores and options: {files.record})")
    return Translated(output, summary, record, model, run, tokenizer, sentences, found)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, plain or compressed; `-` is standard input.

    Only line feeds end lines, so that files have the numbers of lines that other tools count. A
    byte order mark, and white space around lines, are left out, as `prep pairs` does.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
    """
    if str(path) == "-":
        content = sys.stdin.buffer.read()
    else:
        with open_whole(path) as file:
            content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line} is not UTF-8; convert the file") from None
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.strip() for line in lines]


def read_matching(path: Path, source: Path, count: int) -> list[str]:
    """Return the lines of a file that has one for each of `source`.

    Raises:
        DataError: it has another number of lines.
    """
    lines = read_lines(path)
    if len(lines) != count:
        raise DataError(
            f"{path}: has {len(lines)} lines, but {source} has {count}; line i of one must belong "
            "to line i of the other"
        )
    return lines


def describe(run: Run, files: Files, options: TranslateOptions) -> dict[str, Any]:
    """Return how translations are made, for the record."""
    drawn = options.sampling
    search = f"beam {options.beam}"
    if drawn is not None:
        search = (
            f"samples, temperature {drawn.temperature:g}, top-k {drawn.top_k}, top-p "
            f"{drawn.top_p:g}, seed {drawn.seed}"
        )
    return {
        "checkpoint": str(run.checkpoint),
        "step": run.state["step"],
        "source": str(files.source),
        "reference": None if files.reference is None else str(files.reference),
        "prefix": None if files.prefix is None else str(files.prefix),
        "search": search,
        "length_penalty": str(options.penalty),
        "nbest": options.nbest,
        "depth": options.num_loops,
        "batch": options.batch,
        "max_tokens": options.max_tokens,
    }


def format_lines(found: Sequence[Translation], options: TranslateOptions) -> Iterator[str]:
    """Yield a translation per line; with several of a sentence, its number, score and text between
    tabs."""
    for number, each in enumerate(found, 1):
        if options.nbest == 1:
            yield each.texts[0]
            continue
        for hypothesis, text in zip(each.hypotheses, each.texts, strict=True):
            yield f"{number}\t{hypothesis.score:.6f}\t{text}"


def draw_line(done: Translated, options: TranslateOptions, number: int, out: Path) -> None:
    """Draw the cross-attention of a line's best translation.

    Args:
        number: the line, from 1.
        out: the picture.
    """
    from megarecur.plot.attention import Panel, draw_cross_attention
    from megarecur.plot.layer_map import save

    sentence, config = done.sentences[number - 1], done.run.config
    if options.truncate:
        (sentence,) = truncate_sources(config, [sentence])
    best = done.found[number - 1].hypotheses[0]
    read = [start_token(done.tokenizer), *best.tokens]
    predicted = [*best.tokens, done.tokenizer.eos_id]
    if not best.ended:
        read, predicted = read[:-1], predicted[:-1]
    steps = build_map(config, options.num_loops)
    uses = read_cross_attention(done.model, steps, sentence.ids, read)
    from_ids, to_ids = (
        [name_token(done.tokenizer, i) for i in ids] for ids in (sentence.ids, predicted)
    )
    panels = [Panel(use.block, use.loop, use.weights_SK) for use in uses]
    title = f"{done.run.checkpoint.parent.parent}, line {number}"
    save(draw_cross_attention(panels, from_ids, to_ids, title), out)


def check_line(number: int, count: int) -> None:
    """Reject the number of a line that a file does not have."""
    if not 1 <= number <= count:
        raise ConfigError(f"--draw-line {number}: the source has lines 1 to {count}; choose one")


def name_token(tokenizer: Tokenizer, token: int) -> str:
    """Return the piece of an id, or its text."""
    return tokenizer.token_of(token) or tokenizer.decode([token]) or f"<{token}>"
