"""Tokenizers behind one interface: sentencepiece models, Hugging Face tokenizer.json, plain bytes,
and lists of words.

    tokenizer = load_tokenizer("data/quickstart/tokenizer.model")
    tokenizer.encode("def f(x):")     # ids, without special tokens

Text that spells a special token (`</s>`) is encoded as text, never as the special token.
"""

from __future__ import annotations

import json
import os
import re
import string
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megarecur.errors import DataError

BYTES = "bytes"
BEGIN_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[BOS]", "<|im_start|>")
END_NAMES = (
    "</s>",
    "<|endoftext|>",
    "<eos>",
    "<|end_of_text|>",
    "<|end▁of▁sentence|>",
    "<|im_end|>",
    "[EOS]",
    "<|eos|>",
)
LONGEST_WORD_KEPT, MOST_WORDS_KEPT = 64, 1 << 18


class Tokenizer(ABC):
    """Turns text into ids and back."""

    name: str
    fingerprint: str
    """xxh3-128 of the tokenizer's file, in hexadecimal."""
    vocab_size: int
    eos_id: int
    """Ends every document of a corpus."""
    bos_id: int | None

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """The narrowest type that shards may store ids in."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """The ids of a text as an integer array, without special tokens."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; special tokens are left out."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and 256 as end of document."""

    def __init__(self) -> None:
        self.name = BYTES
        self.fingerprint = xxhash.xxh3_128_hexdigest(BYTES.encode())
        self.vocab_size, self.eos_id, self.bos_id = 257, 256, None

    def encode_array(self, text: str) -> np.ndarray:
        """The bytes of the text's UTF-8."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some bytes; what is not UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class WordTokenizer(Tokenizer):
    """Words between white space, for tasks whose words are known: 0 ends a document, 1 is any
    unknown word, the others follow in the order of their list.

        {"megarecur": "words", "words": ["[MIN", "[MAX", "]", "0", "1"]}
    """

    mark = b'{"megarecur": "words"'
    """How its file begins."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.name = path.name
        self.fingerprint = xxhash.xxh3_128_hexdigest(content)
        words = json.loads(content).get("words")
        if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
            raise DataError(f"{path}: has no list of words; prepare it again")
        self.words = ("<eos>", "<unk>", *words)
        self.ids = {word: i for i, word in enumerate(words, 2)}
        self.vocab_size, self.eos_id, self.bos_id = len(self.words), 0, None

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of the words of a text."""
        return np.array([self.ids.get(word, 1) for word in text.split()], np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Words with a space between them."""
        return " ".join(self.words[i] for i in ids if i)

    @classmethod
    def describe(cls, words: Sequence[str]) -> bytes:
        """The content of the file of these words."""
        rest = json.dumps({"words": list(words)}, ensure_ascii=False)
        return cls.mark + b", " + rest[1:].encode()


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model.

    BPE over a whole book is about half as fast as over its paragraphs, and words repeat. So a text
    is encoded word by word, each word once, cut where its ids provably do not change:

    1. Encoding is two steps, normalise and segment. The text is normalised as a whole, by the
       model's own normaliser (so the dummy prefix, collapsed whitespace and character maps are as
       ever), and then encoded in words by a twin of the model that normalises nothing.
    2. BPE only ever joins two neighbours into a piece of the vocabulary. Between characters `a`
       and `b` that no piece (nor user-defined symbol) contains side by side, nothing is ever
       joined, and what happens on one side does not depend on the other.
    3. A run of unknown pieces becomes one unknown id, so that without byte fallback a word must
       begin with a character that the vocabulary knows.

    Other models are given the whole text: a unigram search adds up float32 scores from the start of
    the text, so that a near tie could be decided otherwise, and gains nothing from shorter texts.
    """

    def __init__(self, path: Path, content: bytes) -> None:
        import sentencepiece

        self.name = path.name
        self.fingerprint = xxhash.xxh3_128_hexdigest(content)
        self.model = sentencepiece.SentencePieceProcessor()
        self.model.LoadFromSerializedProto(content)
        self.vocab_size = self.model.vocab_size()
        self.bos_id = self.model.bos_id() if self.model.bos_id() >= 0 else None
        self.eos_id = self.model.eos_id()
        if self.eos_id < 0:
            named = (self.model.piece_to_id(name) for name in END_NAMES)
            self.eos_id = next((i for i in named if i != self.model.unk_id()), -1)
        if self.eos_id < 0:
            raise DataError(
                f"{path}: has no end-of-sequence token, which ends every document of a corpus; "
                "train it with eos_id >= 0"
            )
        self.words = _find_words(content)

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of a text, the same as the model's own for the text in one piece."""
        if self.words is None:
            ids: np.ndarray = self.model.encode(text, out_type="numpy")
            return ids
        words = self.words.pattern.findall(self.model.normalize(text))
        return np.frombuffer(b"".join(map(self.words.__getitem__, words)), np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; control tokens are left out."""
        text: str = self.model.decode([int(i) for i in ids])
        return text


class Words(dict[str, bytes]):
    """The ids (int32) of every word met so far; `pattern` finds the words of a normalised text."""

    def __init__(self, pattern: re.Pattern[str], model: Any) -> None:
        super().__init__()
        self.pattern, self.model = pattern, model

    def __missing__(self, word: str) -> bytes:
        ids = array("i", self.model.encode(word)).tobytes()
        if len(word) <= LONGEST_WORD_KEPT:
            if len(self) >= MOST_WORDS_KEPT:
                self.clear()
            self[word] = ids
        return ids


def _find_words(content: bytes) -> Words | None:
    """Where a BPE model's normalised text may be cut, with the model that does not normalise."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as messages

    proto = messages.ModelProto.FromString(content)  # type: ignore[attr-defined]
    trainer, kinds = proto.trainer_spec, type(proto.pieces[0])
    if trainer.model_type != trainer.BPE:
        return None
    in_text = (kinds.NORMAL, kinds.USER_DEFINED, kinds.UNUSED)
    pieces = {p.piece: p.type for p in proto.pieces if p.type in in_text}
    space = "▁" if proto.normalizer_spec.escape_whitespaces else " "
    starts = [
        c
        for c in (space, "\n", *string.punctuation, *"“”‘’—")
        if trainer.byte_fallback or pieces.get(c) in (kinds.NORMAL, kinds.USER_DEFINED)
    ]
    if space not in starts:
        return None
    # A word is any character and what follows up to the next start; it goes on over a start that
    # some piece joins to the character before it.
    rest = f"[^{''.join(map(re.escape, starts))}]*+"
    joined = []
    for c in starts:
        before = {a for piece in pieces for a, b in pairwise(piece) if b == c}
        if before:
            c = re.escape(c)
            joined.append(f"{c}(?<=[{''.join(map(re.escape, sorted(before)))}]{c}){rest}")
    pattern = f".{rest}" + (f"(?:{'|'.join(joined)})*+" if joined else "")
    spec = proto.normalizer_spec
    spec.name, spec.precompiled_charsmap = "identity", b""
    spec.add_dummy_prefix = spec.remove_extra_whitespaces = spec.escape_whitespaces = False
    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(proto.SerializeToString())
    return Words(re.compile(pattern, re.DOTALL), model)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json."""

    def __init__(self, path: Path, content: bytes) -> None:
        # One text per call and one process per core: its own threads would only get in the way.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import tokenizers

        self.name = path.name
        self.fingerprint = xxhash.xxh3_128_hexdigest(content)
        self.model = tokenizers.Tokenizer.from_str(content.decode())
        self.model.no_padding()
        self.model.no_truncation()
        self.model.encode_special_tokens = True
        # Ids may have gaps: the embedding needs a row up to the highest.
        self.vocab_size = 1 + max(self.model.get_vocab(with_added_tokens=True).values())
        self.bos_id = self._find(BEGIN_NAMES)
        end = self._find(END_NAMES)
        if end is None:
            raise DataError(
                f"{path}: has no end-of-text token, which ends every document of a corpus "
                f"(looked for {', '.join(END_NAMES)}); add one of these names to it"
            )
        self.eos_id = end

    def _find(self, names: Sequence[str]) -> int | None:
        ids = (self.model.token_to_id(name) for name in names)
        return next((i for i in ids if i is not None), None)

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of a text."""
        return np.array(self.model.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; special tokens are left out."""
        return str(self.model.decode([int(i) for i in ids], skip_special_tokens=True))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a sentencepiece model, a Hugging Face tokenizer.json, a list of words, or `bytes`.

    Raises:
        DataError: there is no such file, or it is none of these.
    """
    if str(path) == BYTES:
        return ByteTokenizer()
    path = Path(path)
    content = _read(path)
    build: type[HuggingFaceTokenizer | SentencePieceTokenizer | WordTokenizer]
    build = HuggingFaceTokenizer if content.lstrip()[:1] == b"{" else SentencePieceTokenizer
    if content.startswith(WordTokenizer.mark):
        build = WordTokenizer
    try:
        return build(path, content)
    except DataError:
        raise
    except Exception as error:  # each library raises its own, some of them plain Exception
        kind = "a Hugging Face tokenizer.json" if build is HuggingFaceTokenizer else "a model"
        reason = str(error).strip().splitlines()[-1][:200] if str(error).strip() else "no reason"
        raise DataError(
            f"{path}: is not a tokenizer (read as {kind}: {reason}); give a sentencepiece model, "
            f"a Hugging Face tokenizer.json or `{BYTES}`"
        ) from error


def tokenizer_vocab_size(path: str | Path) -> int:
    """The vocabulary of a tokenizer, quickly: nothing heavy is imported.

    Raises:
        DataError: as `load_tokenizer`.
    """
    return load_tokenizer(path).vocab_size


def tokenizer_fingerprint(path: str | Path) -> str:
    """The fingerprint of a tokenizer's file, without loading it."""
    content = BYTES.encode() if str(path) == BYTES else _read(Path(path))
    return xxhash.xxh3_128_hexdigest(content)


def _read(path: Path) -> bytes:
    """The content of a tokenizer's file."""
    if path.is_dir():
        inside = [p.name for p in sorted(path.iterdir()) if p.suffix in (".model", ".json")]
        hint = f"; perhaps {path / inside[0]}" if inside else ""
        raise DataError(f"{path}: is a folder; give the tokenizer's file{hint}")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{path}: there is no such tokenizer; make one with `megarecur prep tokenizer`, give "
            f"the path of a model or tokenizer.json, or `{BYTES}`"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not content:
        raise DataError(f"{path}: is empty; give a sentencepiece model or a tokenizer.json")
    return content
