"""Tokenizers: one interface, exact ids, exact text back, and training one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from support.tokenizers import LINES, MODELS, SOURCES, TEXT, texts, train_model

from megarecur.data.corpus import Corpus, warn_of_other_ends
from megarecur.data.tokenizer import (
    SentencePieceTokenizer,
    load_tokenizer,
    tokenizer_fingerprint,
    tokenizer_vocab_size,
)
from megarecur.data_prep.readers import Reading
from megarecur.data_prep.shards import prepare_shards
from megarecur.data_prep.tasks import TaskRequest, prepare_task
from megarecur.data_prep.tokenizer import train_tokenizer
from megarecur.errors import DataError


@pytest.fixture(scope="module")
def word_tokenizers() -> dict[str, SentencePieceTokenizer]:
    return {
        name: SentencePieceTokenizer(Path(name), train_model(model_type="bpe", **options))
        for name, options in MODELS.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_ids_of_words_are_the_ids_of_the_whole_text(
    name: str, word_tokenizers: dict[str, SentencePieceTokenizer]
) -> None:
    tokenizer = word_tokenizers[name]

    @settings(max_examples=150)
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
    tokenizer = SentencePieceTokenizer(Path("u"), train_model(model_type="unigram", vocab_size=300))
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


DEEPSEEK = "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize(
    ("special", "files", "eos", "end", "doubt"),
    [
        (["<s>", DEEPSEEK], {}, None, DEEPSEEK, ""),
        (["<|im_end|>", "<|endoftext|>"], {}, None, "<|endoftext|>", "first of several"),
        (["<|endoftext|>", "<|im_end|>"], {"t": "<|im_end|>"}, None, "<|im_end|>", ""),
        (["</s>", "<|eot|>"], {"t": {"content": "<|eot|>", "lstrip": False}}, None, "<|eot|>", ""),
        (["</s>", "<|eot|>"], {"g": 1}, None, "<|eot|>", ""),
        (["</s>", "<|eot|>"], {"g": [1]}, None, "<|eot|>", ""),
        (["</s>", "<|eot|>"], {"g": [1 << 40, 1, -1]}, None, "<|eot|>", ""),
        (["<|eot|>", "</s>"], {"g": [0, 1]}, None, "</s>", "one of several in generation_config"),
        (["<|a|>", "<|b|>", "</s>"], {"g": [1, 0, 999, None]}, None, "<|b|>", "one of several"),
        (["</s>", "<|eot|>"], {"t": "<|eot|>", "g": [1, 0]}, None, "<|eot|>", ""),
        (["</s>", "<|eot|>"], {"t": "</s>", "g": 1}, None, "</s>", "generation_config.json says"),
        (["</s>", "<|eot|>"], {"t": None, "g": None}, None, "</s>", ""),
        (["</s>", "<|eot|>"], {"t": "\ud800"}, None, "</s>", r"names '\ud800', which it"),
        (["</s>", "<|eot|>"], {"t": "<none>"}, None, "</s>", "names '<none>', which it does not"),
        (["</s>", "<|eot|>"], {"t": "</s>", "g": 0}, "<|eot|>", "<|eot|>", ""),
        (["</s>", "<|eot|>"], {}, "1", "<|eot|>", ""),
        (["<|turn|>"], {}, "<|turn|>", "<|turn|>", ""),
    ],
)
def test_what_ends_a_document(
    tmp_path: Path,
    special: list[str],
    files: dict[str, Any],
    eos: str | None,
    end: str,
    doubt: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The files beside decide, --eos overrides, doubts are told once; the corpus has what it needs
    to be read again."""
    path = hugging_face(tmp_path, special)
    if "t" in files:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": files["t"]}))
    if "g" in files:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": files["g"]}))
    tokenizer = load_tokenizer(path, eos)
    assert tokenizer.token_of(tokenizer.eos_id) == end
    assert doubt in tokenizer.end.doubt and bool(doubt) == bool(tokenizer.end.doubt)
    (tmp_path / "a.txt").write_text("some text")
    made = prepare_shards([tmp_path / "a.txt"], tmp_path / "out", path, eos=eos, workers=1)
    assert made["train"].eos_id == tokenizer.eos_id
    assert [m for m in caplog.messages if "choose by --eos" in m] == [tokenizer.end.doubt][
        : bool(doubt)
    ]
    again = load_tokenizer(tmp_path / "out/train/tokenizer.json")
    assert again.eos_id == tokenizer.eos_id and again.fingerprint == tokenizer.fingerprint
    assert Corpus(tmp_path / "out/train").read(0, made["train"].num_tokens)[-1] == again.eos_id


def test_a_corpus_that_ends_documents_otherwise_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = hugging_face(tmp_path, ["</s>", "<|eot|>"])
    (tmp_path / "a.txt").write_text("some text")
    prepare_shards([tmp_path / "a.txt"], tmp_path / "out", path, eos="<|eot|>", workers=1)
    corpus = Corpus(tmp_path / "out/train")
    own = corpus.path / "tokenizer.json"
    warn_of_other_ends([corpus], load_tokenizer(own), str(own))
    assert caplog.text == ""
    warn_of_other_ends([corpus], load_tokenizer(path), str(path))
    told = f"{corpus.path}: documents end with '<|eot|>' (1), but data.tokenizer={path}"
    assert told in caplog.text


def test_labelled_samples_end_as_the_tokenizer_says(tmp_path: Path) -> None:
    path = hugging_face(tmp_path, ["</s>", "<|eot|>"])
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = TaskRequest("labelled", (str(tmp_path / "a.jsonl"),), tokenizer=str(path))
    first = prepare_task(request, tmp_path / "first")["train"]
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|eot|>"}')
    with pytest.raises(DataError, match="was prepared with other options"):
        prepare_task(request, tmp_path / "first")
    second = prepare_task(request, tmp_path / "second")["train"]
    assert (first.eos_id, second.eos_id) == (0, 1)
    for copy in ("second/tokenizer.json", "second/train/tokenizer.json"):
        assert load_tokenizer(tmp_path / copy).eos_id == 1


def test_ends_that_are_not_there_are_refused(tmp_path: Path) -> None:
    path = hugging_face(tmp_path, ["</s>"])
    with pytest.raises(DataError, match=r"has no token 'none', which --eos.*such as '</s>' \(0\)"):
        load_tokenizer(path, "none")
    for absent in ("4000", "99999999999", "9" * 5000, "\udcff"):
        with pytest.raises(DataError, match=f"has no token {absent!a}".replace("\\", ".")):
            load_tokenizer(path, absent)
    with pytest.raises(DataError, match="--eos 5: bytes has its own end of documents"):
        load_tokenizer("bytes", "5")
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(DataError, match=r"generation_config\.json: cannot be read.*copy it again"):
        load_tokenizer(path)


def test_an_end_among_plain_words_gives_way_to_a_special_token(tmp_path: Path) -> None:
    """As in Phi-3, whose vocabulary has a plain </s>."""
    path = hugging_face(tmp_path, ["<|endoftext|>"])
    values = json.loads(path.read_text())
    values["added_tokens"].append(values["added_tokens"][0] | {"id": 400, "content": "</s>"})
    values["added_tokens"][-1]["special"] = False
    path.write_text(json.dumps(values))
    tokenizer = load_tokenizer(path)
    assert tokenizer.find_id("</s>") == 400
    assert (tokenizer.eos_id, tokenizer.end.doubt) == (0, "")


def test_files_beside_a_sentencepiece_model_decide_too(tmp_path: Path) -> None:
    content = train_model(model_type="bpe", vocab_size=400, user_defined_symbols=["<|im_end|>"])
    (tmp_path / "tokenizer.model").write_bytes(content)
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    assert tokenizer.token_of(tokenizer.eos_id) == "</s>"
    config = {"eos_token": {"content": "<|im_end|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    assert tokenizer.token_of(tokenizer.eos_id) == "<|im_end|>" and tokenizer.end.is_given
    assert tokenizer.find_id("no such piece") is None


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

    @settings(max_examples=100)
    @given(texts)
    def restores(text: str) -> None:
        text = text.replace("▁", " ")
        assert tokenizer.decode(tokenizer.encode(text)) == text

    restores()


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_no_passage_is_dropped_from_the_sample(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it holds: what stands in it alone gets into the vocabulary. U+2585 is a mark of
    sentencepiece itself; it is counted, and comes back."""
    odd = [
        "\u2585",
        "\u2584",
        "\0",
        "\x1b",
        "\x85",
        "\u2028",
        "\ufeff",
        "\ufffe",
        "\ufffd",
        "\u200b",
    ]
    odd += ["<s>", "</s>", "<unk>", "<0x41>", "\t", "\r\n", "\ue000", "\U0010ffff"]
    markers = [chr(0x4E00 + i) for i in range(len(odd))]
    lines = [
        f"{mark} a line with {text} within, {mark}" for text, mark in zip(odd, markers, strict=True)
    ]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in (*lines, TEXT) for _ in range(9))
    )
    path = train_tokenizer(
        [tmp_path / "a.jsonl"], tmp_path / "m", vocab_size=480, character_coverage=1.0,
        model_type=model_type,  # type: ignore[arg-type]
    )  # fmt: skip
    tokenizer = load_tokenizer(path)
    assert [mark for mark in markers if tokenizer.find_id(mark) is None] == []
    assert "9 characters U+2585 of the sample were read as U+2584" in caplog.text
    for line in lines:
        assert tokenizer.decode(tokenizer.encode(line)) == line


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too large for this text; choose at most"):
        train_tokenizer(SOURCES, tmp_path / "m", vocab_size=50_000)
    with pytest.raises(DataError, match=r"too small .*; choose at least"):
        train_tokenizer(SOURCES, tmp_path / "m", vocab_size=100)
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_tokenizer([tmp_path / "empty.txt"], tmp_path / "m", vocab_size=300)
    assert not (tmp_path / "m").exists()


def test_a_joint_vocabulary_of_several_files_has_padding_where_asked(tmp_path: Path) -> None:
    for name, text in (("de", "ein großer Hund\n"), ("en", "a big dog\n")):
        (tmp_path / name).write_text(text * 300, encoding="utf-8")
    files, reading = [tmp_path / "de", tmp_path / "en"], Reading(text_split="line")
    made = train_tokenizer(files, tmp_path / "m", reading, vocab_size=290, pad=True)
    joint = load_tokenizer(made)
    assert (joint.bos_id, joint.eos_id, joint.pad_id) == (1, 2, 3)
    assert {joint.find_id(word) is None for word in ("▁Hund", "▁dog")} == {False}
    assert joint.decode([1, *joint.encode("a big Hund"), 2, 3, 3]) == "a big Hund"
    plain = load_tokenizer(train_tokenizer(files, tmp_path / "n", reading, vocab_size=290))
    assert plain.pad_id is None


def test_real_models(data_dir: Path) -> None:
    text = TEXT + "\n\nTo be, or not to be: – 漢字\t\n" * 50
    for file in sorted((data_dir / "tokenizers").glob("*.model")):
        tokenizer = load_tokenizer(file)
        assert isinstance(tokenizer, SentencePieceTokenizer)
        assert tokenizer.encode(text) == tokenizer.model.encode(text), file
    neox = load_tokenizer(data_dir / "tokenizers" / "gpt_neox_20b_tokenizer.json")
    assert (neox.vocab_size, neox.eos_id) == (50277, 0)
    assert neox.decode(neox.encode(text)) == text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_named(tmp_path: Path, encoding: str) -> None:
    """Editors write them, and no reader of tokenizers takes them."""
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": {}}', encoding=encoding)
    with pytest.raises(DataError, match=r"begins with a byte-order mark.*save it as UTF-8 without"):
        load_tokenizer(path)
