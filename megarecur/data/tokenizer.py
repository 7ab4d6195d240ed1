"""Tokenizers behind one interface: sentencepiece, Hugging Face tokenizer.json, bytes, word lists.

    tokenizer = load_tokenizer("data/quickstart/tokenizer.model")
    tokenizer.encode("def f(x):")     # ids, without special tokens

Text that spells a special token (`</s>`) is encoded as text, never as the special token.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import string
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megarecur.config.locate import NOT_A_FILE
from megarecur.config.run import NO_TOKENIZER
from megarecur.errors import DataError
from megarecur.files import replace_file
from megarecur.private import read_inside
from megarecur.reading import check_links, parse_object, read_bytes, read_json

BYTES = "bytes"
BEGIN_NAMES = (
    "<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[BOS]", "<|im_start|>",
    "<｜begin▁of▁sentence｜>",
)  # fmt: skip
END_NAMES = (
    "</s>", "<|endoftext|>", "<eos>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<|im_end|>",
    "[EOS]", "<|eos|>",
)  # fmt: skip
"""Names of the end-of-text token in common families; DeepSeek's has full-width bars, U+FF5C. The
first existing one is used if nothing else decides."""
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
CONFIG_FILE, GENERATION_FILE = "tokenizer_config.json", "generation_config.json"
"""Files beside a Hugging Face tokenizer that name the end-of-text token."""
COMPANIONS = (CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", GENERATION_FILE)
"""Files beside a Hugging Face tokenizer that describe it further."""
LONGEST_WORD_KEPT, MOST_WORDS_KEPT = 64, 1 << 18


class Tokenizer(ABC):
    """A map from text to ids and back."""

    name: str
    fingerprint: str
    """xxh3-128 of the tokenizer's file, in hexadecimal."""
    vocab_size: int
    eos_id: int
    """Id that ends every document of a corpus."""
    bos_id: int | None
    end: End
    """The rule that found `eos_id`."""
    pad_id: int | None = None
    """Id of padding; None if there is no such token."""

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """The narrowest type in which shards can store ids."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def find_id(self, token: str) -> int | None:
        """Return the id of a token by its name; None if there is no such token."""
        return None

    def find_ids(self, tokens: Sequence[str]) -> list[int]:
        """Return the ids of the existing tokens among these, in their order."""
        return [i for i in map(self.find_id, tokens) if i is not None]

    def token_of(self, token_id: int) -> str | None:
        """Return the name of a token; None if there is no such token, or if tokens have no
        names."""
        return None

    @abstractmethod
    def encode_array(self, text: str) -> NDArray[Any]:
        """Return the ids of a text as an integer array, without special tokens."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, without special tokens."""

    def missing_ids(self, rows: int) -> list[int]:
        """Return the ids without a piece, among those that a model with `rows` rows may choose."""
        return list(range(self.vocab_size, rows))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids


class ByteTokenizer(Tokenizer):
    """A tokenizer of the 256 bytes of UTF-8, and 256 as end of document."""

    def __init__(self) -> None:
        self.name = BYTES
        self.fingerprint = xxhash.xxh3_128_hexdigest(BYTES.encode())
        self.vocab_size, self.eos_id, self.bos_id = 257, 256, None
        self.end = End(self.eos_id, False, "")

    def encode_array(self, text: str) -> NDArray[Any]:
        """Return the bytes of the text's UTF-8."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some bytes; invalid UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class NoTokenizer(Tokenizer):
    """The tokenizer of pictures, which has no ids."""

    def __init__(self) -> None:
        self.name = NO_TOKENIZER
        self.fingerprint = xxhash.xxh3_128_hexdigest(NO_TOKENIZER.encode())
        self.vocab_size, self.eos_id, self.bos_id = 0, -1, None
        self.end = End(self.eos_id, False, "")

    def encode_array(self, text: str) -> NDArray[Any]:
        """Refuse a text.

        Raises:
            DataError: always.
        """
        raise DataError(f"{NO_TOKENIZER}: the tokenizer of pictures reads no text; name another")

    def decode(self, ids: Sequence[int]) -> str:
        """Return an empty text."""
        return ""


class WordTokenizer(Tokenizer):
    """A tokenizer of words between white space, for tasks with known words: 0 ends a document, 1 is
    any unknown word, the others follow in the order of their list.

        {"megarecur": "words", "words": ["[MIN", "[MAX", "]", "0", "1"]}
    """

    mark = b'{"megarecur": "words"'
    """The first bytes of its file."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.name = path.name
        self.fingerprint = xxhash.xxh3_128_hexdigest(content)
        words = parse_object(content).get("words")
        if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
            raise DataError(f"{path}: has no list of words; prepare it again")
        self.words = ("<eos>", "<unk>", *words)
        self.ids = {word: i for i, word in enumerate(words, 2)}
        self.vocab_size, self.eos_id, self.bos_id = len(self.words), 0, None
        self.end = End(self.eos_id, False, "")

    def encode_array(self, text: str) -> NDArray[Any]:
        """Return the ids of the words of a text."""
        return np.array([self.ids.get(word, 1) for word in text.split()], np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Return words with a space between them."""
        return " ".join(self.words[i] for i in ids if i)

    @classmethod
    def describe(cls, words: Sequence[str]) -> bytes:
        """Return the content of the file of these words."""
        rest = json.dumps({"words": list(words)}, ensure_ascii=False)
        return cls.mark + b", " + rest[1:].encode()


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model.

    BPE over a whole book is about half as fast as over its paragraphs, and words repeat. So a text
    is encoded word by word, each distinct word once. It is cut where the ids provably do not
    change:

    1. Encoding is two steps, normalise and segment. The text is normalised as a whole, by the
       model's own normaliser (so the dummy prefix, collapsed whitespace and character maps are
       unchanged), and then encoded in words by a twin of the model that normalises nothing.
    2. BPE only ever joins two neighbours into a piece of the vocabulary. Between characters `a`
       and `b` that no piece (nor user-defined symbol) contains side by side, nothing is ever
       joined, and the two sides do not depend on each other.
    3. A run of unknown pieces becomes one unknown id, so that without byte fallback a word must
       begin with a character that the vocabulary knows.

    Other models encode the whole text: a unigram search sums float32 scores from the start of the
    text, so cuts could change near ties, and shorter texts are no faster.
    """

    def __init__(self, path: Path, content: bytes, eos: str | None = None) -> None:
        import sentencepiece

        self.name = path.name
        self.fingerprint = xxhash.xxh3_128_hexdigest(content)
        self.model = sentencepiece.SentencePieceProcessor()
        self.model.LoadFromSerializedProto(content)
        self.vocab_size = self.model.vocab_size()
        self.bos_id = self.model.bos_id() if self.model.bos_id() >= 0 else None
        self.pad_id = self.model.pad_id() if self.model.pad_id() >= 0 else None
        own = self.model.eos_id()
        self.end = find_end(self, path, [own] if own >= 0 else self.find_ids(END_NAMES), eos)
        self.eos_id = self.end.eos_id
        self.words = _find_words(content)

    def find_id(self, token: str) -> int | None:
        """Return the id of a piece by its name; None if there is no such piece."""
        found: int = self.model.piece_to_id(token)
        return found if self.model.id_to_piece(found) == token else None

    def token_of(self, token_id: int) -> str | None:
        """Return the name of a piece; None if there is no such piece."""
        if not 0 <= token_id < self.vocab_size:
            return None
        name: str = self.model.id_to_piece(token_id)
        return name

    def encode_array(self, text: str) -> NDArray[Any]:
        """Return the ids of a text, equal to the model's own for the whole text."""
        if self.words is None:
            ids: NDArray[Any] = self.model.encode(text, out_type="numpy")
            return ids
        words = self.words.pattern.findall(self.model.normalize(text))
        return np.frombuffer(b"".join(map(self.words.__getitem__, words)), np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, without control tokens."""
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
    """Find where a BPE model's normalised text may be cut, with a model that does not normalise."""
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
    # A word is any character and its successors up to the next start. It continues over a start
    # that some piece joins to the previous character.
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
    """A tokenizer of a Hugging Face tokenizer.json."""

    def __init__(self, path: Path, content: bytes, eos: str | None = None) -> None:
        # One text per call and one process per core: its own threads would only interfere.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import tokenizers

        self.name = path.name
        self.fingerprint = xxhash.xxh3_128_hexdigest(content)
        self.model = tokenizers.Tokenizer.from_str(content.decode())
        self.model.no_padding()
        self.model.no_truncation()
        self.model.encode_special_tokens = True
        # Ids may have gaps; the embedding needs a row up to the highest.
        self.vocab_size = 1 + max(self.model.get_vocab(with_added_tokens=True).values())
        self.bos_id = next(iter(self.find_ids(BEGIN_NAMES)), None)
        named = read_token(_read_json(path.with_name(CONFIG_FILE)).get("pad_token"))
        self.pad_id = next(iter(self.find_ids([*([named] if named else []), *PAD_NAMES])), None)
        added = self.model.get_added_tokens_decoder()
        special = [i for i in self.find_ids(END_NAMES) if i in added and added[i].special]
        self.end = find_end(self, path, self.find_ids(END_NAMES), eos, special)
        self.eos_id = self.end.eos_id

    def find_id(self, token: str) -> int | None:
        """Return the id of a token by its name; None if there is no such token."""
        found: int | None = self.model.token_to_id(token)
        return found

    def token_of(self, token_id: int) -> str | None:
        """Return the name of a token; None if there is no such token."""
        name: str | None = self.model.id_to_token(token_id) if token_id >= 0 else None
        return name

    def missing_ids(self, rows: int) -> list[int]:
        """Return the ids that have no piece, gaps among them."""
        return sorted(set(range(rows)) - set(self.model.get_vocab(True).values()))

    def encode_array(self, text: str) -> NDArray[Any]:
        """Return the ids of a text."""
        return np.array(self.model.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, without special tokens."""
        return str(self.model.decode([int(i) for i in ids], skip_special_tokens=True))


@dataclass(frozen=True)
class End:
    """The token that ends a document."""

    eos_id: int
    is_given: bool
    """True unless it is the first token of the usual names in the tokenizer's file."""
    doubt: str
    """Other possible ends, and how to choose; "" if the end is certain."""


def find_end(
    tokenizer: Tokenizer,
    path: Path,
    usual: Sequence[int],
    eos: str | None,
    special: Sequence[int] = (),
) -> End:
    """Return the token that ends a document. The first of these that exists decides: `eos`; the
    eos_token of the tokenizer_config.json beside the tokenizer's file; among the ids in the
    generation_config.json there, the first candidate, or else the first id; the first candidate.
    Candidates are special tokens of the usual names, or else any tokens of those names.

    Args:
        tokenizer: finds ids by names.
        usual: ids of the usual names.
        eos: a token's name, or its id in digits, that overrides all.

    Raises:
        DataError: no token ends documents, or no token has the name `eos`.
    """
    candidates = list(dict.fromkeys(special or usual))
    first = usual[0] if usual else None
    if eos is not None:
        is_id = eos.isdecimal() and len(eos) < 10 and tokenizer.token_of(int(eos)) is not None
        end = int(eos) if is_id else _find_id(tokenizer, eos)
        if end is None:
            raise DataError(
                f"{path}: has no token {eos!r}, which --eos names as the end of documents; set it "
                f"to a token's name or id{_names(tokenizer, candidates, ', such as ')}"
            )
        return End(end, end != first, "")
    named, listed, doubt = _read_ends(tokenizer, path)
    if named is not None:
        if listed and named not in listed:
            doubt = f", the eos_token of {CONFIG_FILE}, but {GENERATION_FILE} says "
            doubt += _names(tokenizer, listed)
        end = named
    elif listed:
        end = next((i for i in candidates if i in listed), listed[0])
        if len(listed) > 1:
            doubt = f", one of several in {GENERATION_FILE}: {_names(tokenizer, listed)}"
    elif not candidates:
        raise DataError(
            f"{path}: has no end-of-text token, which ends every document of a corpus (looked for "
            f"{', '.join(END_NAMES)}, and for {CONFIG_FILE} and {GENERATION_FILE} beside it); name "
            "it by --eos"
        )
    else:
        end = candidates[0]
        if len(candidates) > 1:
            doubt = f", the first of several tokens that may: {_names(tokenizer, candidates)}"
    if doubt:
        doubt = f"{path}: documents end with {_names(tokenizer, [end])}{doubt}; choose by --eos"
    return End(end, end != first, doubt)


def _read_ends(tokenizer: Tokenizer, path: Path) -> tuple[int | None, list[int], str]:
    """Return (id of tokenizer_config.json's eos_token, ids of generation_config.json's
    eos_token_id, contradictions between them), as far as files and tokens exist."""
    token = read_token(_read_json(path.with_name(CONFIG_FILE)).get("eos_token"))
    named = None if token is None else _find_id(tokenizer, token)
    odd = f", since {CONFIG_FILE} names {token!r}, which it does not have"
    found = _read_json(path.with_name(GENERATION_FILE)).get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    listed = [
        i for i in ids
        if type(i) is int and i < tokenizer.vocab_size and tokenizer.token_of(i) is not None
    ]  # fmt: skip
    return named, list(dict.fromkeys(listed)), odd if token is not None and named is None else ""


def _find_id(tokenizer: Tokenizer, token: str) -> int | None:
    """Return the id of a token by its name; None if there is no such token, or the name is not
    text."""
    try:
        return tokenizer.find_id(token)
    except UnicodeEncodeError:
        return None


def read_token(value: Any) -> str | None:
    """Return the name of a special token in tokenizer_config.json, given as a name or an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _read_json(file: Path) -> dict[str, Any]:
    """Return the content of a file beside a tokenizer; empty if it does not exist.

    Raises:
        DataError: the file is damaged.
    """
    try:
        check_links(file.parent, file)
        value = read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, OSError) as error:
        raise DataError(
            f"{file}: cannot be read, but names the end of a text ({error}); copy it again, or "
            "remove "
            "it"
        ) from None
    return value if isinstance(value, dict) else {}


def _names(tokenizer: Tokenizer, ids: Sequence[int], before: str = "") -> str:
    """Format names and ids with a prefix; "" if there are none."""
    named = (f"{tokenizer.token_of(i)!r} ({i})" for i in ids)
    return before + ", ".join(named) if ids else ""


def describe_end(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the files, by name, that a copy of the tokenizer needs to end documents in the same
    way; empty if its own file suffices."""
    if not tokenizer.end.is_given:
        return {}
    values = {"eos_token": tokenizer.token_of(tokenizer.eos_id)}
    return {CONFIG_FILE: (json.dumps(values, indent=2) + "\n").encode()}


def load_tokenizer(path: str | Path, eos: str | None = None) -> Tokenizer:
    """Load a sentencepiece model, a Hugging Face tokenizer.json, a list of words, `bytes`, or
    `none`, which pictures have.

    Args:
        path: path of the tokenizer, or one of the words.
        eos: the token that ends documents, by name or id; overrides the tokenizer and the files
        beside it (see `find_end`).

    Raises:
        DataError: the file does not exist, has another format, or has no end of documents.
    """
    path = Path(path)
    has_file = str(path) not in NOT_A_FILE
    content = _read(path) if has_file else b""
    has_fixed_end = not has_file or content.startswith(WordTokenizer.mark)
    if eos is not None and has_fixed_end:
        raise DataError(f"--eos {eos}: {path} has its own end of documents; omit --eos")
    if not has_file:
        return ByteTokenizer() if str(path) == BYTES else NoTokenizer()
    if has_fixed_end:
        return _build(path, lambda: WordTokenizer(path, content), "a list of words")
    if content.lstrip()[:1] == b"{":
        kind = "a Hugging Face tokenizer.json"
        return _build(path, lambda: HuggingFaceTokenizer(path, content, eos), kind)
    return _build(path, lambda: SentencePieceTokenizer(path, content, eos), "a model")


def _build(path: Path, build: Callable[[], Tokenizer], kind: str) -> Tokenizer:
    """Build a tokenizer from its file's content; any error of a library becomes a DataError."""
    try:
        return build()
    except DataError:
        raise
    except Exception as error:  # each library raises its own, some of them plain Exception
        reason = str(error).strip().splitlines()[-1][:200] if str(error).strip() else "no reason"
        raise DataError(
            f"{path}: is not a tokenizer (read as {kind}: {reason}); give a sentencepiece model, "
            f"a Hugging Face tokenizer.json or `{BYTES}`"
        ) from error


def tokenizer_vocab_size(path: str | Path) -> int:
    """Return the vocabulary size of a tokenizer, without heavy imports.

    Raises:
        DataError: see `load_tokenizer`.
    """
    return load_tokenizer(path).vocab_size


def tokenizer_fingerprint(path: str | Path) -> str:
    """Return the fingerprint of a tokenizer's file, without loading it."""
    content = str(path).encode() if str(path) in NOT_A_FILE else _read(Path(path))
    return xxhash.xxh3_128_hexdigest(content)


def copy_tokenizer_files(name: str, folder: Path) -> None:
    """Copy a tokenizer, and the files beside a tokenizer.json, into a folder; existing equal files
    stay.

    Raises:
        DataError: a file beside the tokenizer is a link that leads out of its folder.
    """
    source = Path(name)
    if name in NOT_A_FILE or not source.is_file():
        return
    content = source.read_bytes()
    files = {source.name: content}
    # The sentencepiece model from which a tokenizer.json was made is copied too.
    models = ("tokenizer.model",) if content.lstrip()[:1] == b"{" else ()
    beside = (source.with_name(companion) for companion in (*COMPANIONS, *models))
    files |= {path.name: read_inside(path) for path in beside if path.is_file()}
    for file, content in files.items():
        target = folder / file
        if target.is_file() and target.read_bytes() == content:
            continue
        replace_file(target, content)


def _read(path: Path) -> bytes:
    """Return the content of a tokenizer's file."""
    if path.is_dir():
        inside = [p.name for p in sorted(path.iterdir()) if p.suffix in (".model", ".json")]
        hint = f"; perhaps {path / inside[0]}" if inside else ""
        raise DataError(f"{path}: is a folder; give the tokenizer's file{hint}")
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such tokenizer; make one with `megarecur prep tokenizer`, or give "
            f"the path of a model or tokenizer.json, or `{BYTES}`"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if not content:
        raise DataError(f"{path}: is empty; give a sentencepiece model or a tokenizer.json")
    if content.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(
            f"{path}: begins with a byte-order mark, which no tokenizer has; save it as UTF-8 "
            "without one"
        )
    return content
