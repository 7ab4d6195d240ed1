"""Train a sentencepiece tokenizer on a sample of the same files that shards are made from.

Decoding restores text exactly: there is no normalisation or dummy prefix, spaces and newlines are
kept, and bytes spell characters that the vocabulary lacks. (sentencepiece writes a space as U+2581,
so that a U+2581 in the text itself comes back as a space: the one exception.)
"""

from __future__ import annotations

import heapq
import io
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import xxhash

from megarecur.data_prep.disk import explain_os_errors
from megarecur.data_prep.progress import ProgressReport, report_phase
from megarecur.data_prep.readers import (
    WHOLE_FILES,
    Notes,
    Reading,
    Source,
    find_sources,
    read_documents,
    size_of,
)
from megarecur.errors import DataError
from megarecur.files import open_replacement

log = logging.getLogger(__name__)

PASSAGE_BYTES = 2048
SAMPLE_BYTES = 8 << 20
RESERVED, STAND_IN = "\u2585", "\u2584"
"""The mark that sentencepiece uses for unknown characters in training, where it drops any passage
that contains it; and a similar character (eighths of a block) that replaces it."""


def train_tokenizer(
    inputs: Sequence[str | Path],
    out: str | Path,
    reading: Reading = WHOLE_FILES,
    *,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    byte_fallback: bool = True,
    character_coverage: float = 0.9995,
    sample_bytes: int = SAMPLE_BYTES,
    seed: int = 1,
    pad: bool = False,
    progress: ProgressReport | None = None,
) -> Path:
    """Train a sentencepiece model on a sample of text and write it to `out`.

    The same inputs, options and library version give the same file.

    Args:
        inputs: files, globs, folders, or `hf:...` (see `readers.find_sources`).
        out: path of the model.
        vocab_size: number of pieces, special and byte pieces included.
        model_type: how text is cut; `bpe` is encoded several times faster here.
        byte_fallback: spell unknown characters in bytes, so that any text can be restored.
        character_coverage: share of the characters that get a piece of their own.
        sample_bytes: bytes of text to train on, in passages chosen by hash; 0 means all.
        pad: add a padding token after those for unknown text (0), begin (1) and end (2).
        progress: receives progress reports of the reading.

    Skipped documents, and characters replaced because the library cannot handle them, are logged.

    Returns:
        `out`.

    Raises:
        DataError: an input cannot be read, holds no text, or is too small or too varied for the
            requested vocabulary; or `out` cannot be written.
    """
    out = Path(out)
    if out.is_dir():
        raise DataError(f"{out}: is a folder; name a file in it, such as {out / 'my.model'}")
    with explain_os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        sources = find_sources(inputs, reading.exclude)
        passages = _sample(sources, reading, sample_bytes, seed, progress)
        if not passages:
            raise DataError(f"{inputs[0]}: no text to train a tokenizer on; use files with text")
        if reserved := sum(passage.count(RESERVED) for passage in passages):
            log.warning(
                "%d characters U+2585 of the sample were read as U+2584 while training: "
                "sentencepiece drops passages that hold them; decoding restores them%s",
                reserved, "" if byte_fallback else ", but for byte_fallback=False",
            )  # fmt: skip
        passages = [passage.replace(RESERVED, STAND_IN) for passage in passages]
        content = _train(passages, vocab_size, model_type, byte_fallback, character_coverage, pad)
        with open_replacement(out, shared=True) as file:
            file.write(content)
    return out


def _train(
    passages: Sequence[str],
    vocab_size: int,
    model_type: str,
    byte_fallback: bool,
    character_coverage: float,
    pad: bool,
) -> bytes:
    """Train a model that restores text exactly."""
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(passages),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=byte_fallback,
            character_coverage=character_coverage,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * PASSAGE_BYTES,
            # The sums of a parallel search depend on the number of threads, so it is fixed.
            num_threads=4,
            shuffle_input_sentence=False,
            input_sentence_size=0,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3 if pad else -1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise DataError(_explain(str(error), vocab_size, byte_fallback, pad)) from None
    return model.getvalue()


def _sample(
    sources: Sequence[Source],
    reading: Reading,
    sample_bytes: int,
    seed: int,
    progress: ProgressReport | None,
) -> list[str]:
    """Return passages of at most `sample_bytes` in total, those of the lowest hashes, in reading
    order."""
    kept: list[tuple[int, int, str]] = []  # a heap, highest hash first
    held = number = 0
    sizes = [size_of(source) for source in sources]
    notes = Notes()
    with report_phase(progress, "sample", sum(sizes)) as advance:
        for source, source_bytes in zip(sources, sizes, strict=True):
            for document in read_documents(source, reading, notes):
                for passage in _passages((document or b"").decode()):
                    number += 1
                    key = passage.encode() + number.to_bytes(8)
                    rank = xxhash.xxh3_64_intdigest(key, seed=seed)
                    heapq.heappush(kept, (-rank, number, passage))
                    held += len(passage)
                    while sample_bytes and held > sample_bytes and len(kept) > 1:
                        held -= len(heapq.heappop(kept)[2])
            advance(source_bytes)
    notes.tell()
    return [passage for _, _, passage in sorted(kept, key=lambda entry: entry[1])]


def _passages(text: str) -> Iterator[str]:
    """Cut a text into passages of about PASSAGE_BYTES, at line starts if there are any.

    A cut falls before a newline, since the trainer drops a newline that ends a passage.
    """
    begin = 0
    while begin < len(text):
        end = begin + PASSAGE_BYTES
        if end < len(text):
            newline = text.rfind("\n", begin + 1, end)
            end = newline if newline > begin else end
        yield text[begin:end]
        begin = end


def _explain(message: str, vocab_size: int, byte_fallback: bool, pad: bool) -> str:
    """Return the trainer's error with a remedy."""
    if match := re.search(r"value <= (\d+)", message):
        return (
            f"vocab_size={vocab_size} is too large for this text; choose at most {match[1]}, "
            "or use more text"
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size={vocab_size} is too small for the characters of this text; choose at "
            f"least {match[1]}, or lower character_coverage"
        )
    if byte_fallback and vocab_size < 260 + pad:
        return (
            f"vocab_size={vocab_size} is too small: byte_fallback needs 256 pieces and {3 + pad} "
            "special ones; choose more, or byte_fallback=False"
        )
    reason = message.strip().splitlines()[-1] if message.strip() else "no reason given"
    return f"sentencepiece could not train a tokenizer: {reason}; try another vocab_size"
