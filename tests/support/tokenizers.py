"""Small sentencepiece models of Python text, and texts drawn for them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import sentencepiece
from hypothesis import strategies as st

SOURCES = [Path(json.__file__).with_name(name) for name in ("__init__.py", "decoder.py")]


TEXT = "".join(path.read_text() for path in SOURCES)


LINES = [line for line in TEXT.splitlines() if line.strip()]


texts = st.text(
    st.one_of(
        st.sampled_from(" \n\t ▁aeiou.,:()'=<s>\"defrtn0123é漢ａ́�\0"),
        st.integers(1, 0xD7FF).map(chr),
    )
) | st.lists(st.sampled_from(TEXT.split(" ")), max_size=40).map(" ".join)


def train_model(**options: object) -> bytes:
    """A small sentencepiece model of Python text, with newlines in its pieces."""
    writer = io.BytesIO()
    passages = [TEXT[i : i + 1000] for i in range(0, len(TEXT), 1000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(passages), model_writer=writer, minloglevel=2, **options
    )
    return writer.getvalue()


CODE = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


MODELS = {
    "code": {
        **CODE, "vocab_size": 700, "byte_fallback": True, "allow_whitespace_only_pieces": True,
        "add_dummy_prefix": False,
    },
    "plain": {"vocab_size": 400},
    "unknown pieces": {**CODE, "vocab_size": 300, "character_coverage": 0.98},
    "suffix": {**CODE, "vocab_size": 400, "treat_whitespace_as_suffix": True},
    "across words": {**CODE, "vocab_size": 500, "split_by_whitespace": False},
    "symbols": {**CODE, "vocab_size": 500, "user_defined_symbols": ["def f", "\n\n", "e ", "<s> "]},
}  # fmt: skip
