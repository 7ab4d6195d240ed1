"""Tokenizers: one interface, exact ids, exact text back, and training one."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.tokenizer import train_tokenizer
from megarecur.data.tokenizer import (
    SentencePieceTokenizer,
    load_tokenizer,
    tokenizer_fingerprint,
    tokenizer_vocab_size,
)
from megarecur.errors import DataError

SOURCES = [Path(json.__file__).with_name(name) for name in ("__init__.py", "decoder.py")]
TEXT = "".join(path.read_text() for path in SOURCES)
LINES = [line for line in TEXT.splitlines() if line.strip()]

texts = st.text(
    st.one_of(
        st.sampled_from(" \n\t ▁aeiou.,:()'=<s>\"defrtn0123é漢ａ́�\0"),
        st.integers(1, 0xD7FF).map(chr),
    )
) | st.lists(st.sampled_from(TEXT.split(" ")), max_size=40).map(" ".join)


def model(**options: object) -> bytes:
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


@pytest.fixture(scope="module")
def word_tokenizers() -> dict[str, SentencePieceTokenizer]:
    return {
        name: SentencePieceTokenizer(Path(name), model(model_type="bpe", **options))
        for name, options in MODELS.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_ids_of_words_are_the_ids_of_the_whole_text(
    name: str, word_tokenizers: dict[str, SentencePieceTokenizer]
) -> None:
    tokenizer = word_tokenizers[name]

    @settings(max_examples=150, deadline=None)
    @given(texts)
    def check(text: str) -> None:
        assert tokenizer.encode(text) == tokenizer.model.encode(text)

    assert tokenizer.words is not None
    check()
    assert tokenizer.encode(TEXT) == tokenizer.model.encode(TEXT)


def test_words_are_words(word_tokenizers: dict[str, SentencePieceTokenizer]) -> None:
    words = word_tokenizers["code"].words
    assert words is not None
    text = "def▁f(x):\n▁▁▁▁return▁x"
    found = words.pattern.findall(text)
    assert "".join(found) == text
    assert {"def", "▁f", "▁▁▁▁return", "▁x"} <= set(found)


def test_unigram_is_given_the_whole_text() -> None:
    tokenizer = SentencePieceTokenizer(Path("u"), model(model_type="unigram", vocab_size=300))
    assert tokenizer.words is None
    assert tokenizer.encode(TEXT) == tokenizer.model.encode(TEXT)


def test_bytes() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (257, 256, None)
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.decode([0xC3, 0xA9, 256, 65]) == "éA"
    assert tokenizer.dtype is np.uint16


def hugging_face(folder: Path, special: list[str]) -> Path:
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    trained.train_from_iterator(LINES, trainer)
    trained.enable_truncation(8)
    path = folder / "tokenizer.json"
    trained.save(str(path))
    return path


def test_hugging_face(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(hugging_face(tmp_path, ["<|endoftext|>", "<s>"]))
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (400, 0, 1)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    # Text that spells a special token stays text.
    assert 0 not in tokenizer.encode("a <|endoftext|> b")
    assert tokenizer.decode([0, *tokenizer.encode("x"), 0]) == "x"


def test_hugging_face_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no end-of-text token"):
        load_tokenizer(hugging_face(tmp_path, []))


def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    for name, content in {
        "empty": b"", "text": b"hello\n", "json": b'{"a": 1}', "binary": bytes(range(256)) * 9,
        "list": b"[1, 2",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{tmp_path / name}: .*; give|is empty") as caught:
            load_tokenizer(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="is a folder; give the tokenizer's file"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="no such tokenizer"):
        tokenizer_vocab_size(tmp_path / "none")


def test_training_is_deterministic_and_exact(tmp_path: Path) -> None:
    options = {"vocab_size": 600, "sample_bytes": 20_000}
    paths = [train_tokenizer(SOURCES, tmp_path / f"{i}.model", **options) for i in (0, 1)]
    assert tokenizer_fingerprint(paths[0]) == tokenizer_fingerprint(paths[1])
    tokenizer = load_tokenizer(paths[0])
    assert tokenizer_vocab_size(paths[0]) == tokenizer.vocab_size == 600
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    for source in sorted(SOURCES[0].parents[1].glob("a*.py")):
        text = source.read_text()
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not list(tmp_path.glob("*.partial"))

    @settings(max_examples=100, deadline=None)
    @given(texts)
    def restores(text: str) -> None:
        text = text.replace("▁", " ")
        assert tokenizer.decode(tokenizer.encode(text)) == text

    restores()


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too large for this text; choose at most"):
        train_tokenizer(SOURCES, tmp_path / "m", vocab_size=50_000)
    with pytest.raises(DataError, match=r"too small .*; choose at least"):
        train_tokenizer(SOURCES, tmp_path / "m", vocab_size=100)
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_tokenizer([tmp_path / "empty.txt"], tmp_path / "m", vocab_size=300)
    assert not (tmp_path / "m").exists()


def test_real_models(data_dir: Path) -> None:
    text = TEXT + "\n\nTo be, or not to be: – 漢字\t\n" * 50
    for file in sorted((data_dir / "tokenizers").glob("*.model")):
        tokenizer = load_tokenizer(file)
        assert isinstance(tokenizer, SentencePieceTokenizer)
        assert tokenizer.encode(text) == tokenizer.model.encode(text), file
    neox = load_tokenizer(data_dir / "tokenizers" / "gpt_neox_20b_tokenizer.json")
    assert (neox.vocab_size, neox.eos_id) == (50277, 0)
    assert neox.decode(neox.encode(text)) == text
