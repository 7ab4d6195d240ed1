"""Convert tokenizers of runs to Hugging Face's format: a sentencepiece model or plain bytes become
a tokenizer.json with the same ids, checked on text before it is written.

    write_hf_tokenizer("runs/quickstart/tokenizer.model", Path("out"))

As everywhere in megarecur, text that spells a special token is plain text (`split_special_tokens`),
and no tokens are added before or after it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megarecur.data.tokenizer import BYTES, HuggingFaceTokenizer, Tokenizer, load_tokenizer
from megarecur.errors import DataError
from megarecur.files import create_file
from megarecur.reading import read_object

NEVER = -1e6
"""Score of pieces that a unigram search must not choose."""
END_OF_BYTES = "<|endoftext|>"
"""Name of the bytes' end of document, which has no name in megarecur."""
SAMPLES = (
    "",
    "def f(x):\n\treturn {'a': x[1:-1] ** 2}  # 0123456789 3.14\r\n",
    "The  quick   brown\n\n\nfox jumps    over \t the lazy dog. ",
    " leading and trailing ",
    "naïve café Ångström ﬁ ½ … “quotes” – dashes—em",
    "Grüße, Привет мир, γειά σου, שלום, مرحبا, नमस्ते, 你好世界, こんにちは, 안녕하세요",
    "👋🏽 👨‍👩‍👧‍👦 🇫🇷 e\u0301 \u200b\ufeff \u00a0\u3000\u2028 \ufffd ▁ ▁▁x \U0010ffff",
    "<s>text</s> <unk> <|endoftext|> <0x41><0x0A> [BOS]",
    "\x00\x01\x07\x1f\x7f\x80",
)
"""Diverse texts on which tokenizers are compared."""
RUNS = " \n\t▁-=#*_.a0é漢"
"""Characters that occur in runs."""
LONGEST_RUN, PIECES_AT_ONCE = 40, 12


def write_hf_tokenizer(name: str, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
        name: path of a sentencepiece model, or `bytes`.

    Raises:
        DataError: the tokenizer does not exist, or cannot keep its ids in Hugging Face's format;
        nothing is written.
    """
    ours = load_tokenizer(name)
    if name == BYTES:
        theirs, specials = from_bytes()
        samples: Iterator[str] = iter(SAMPLES)
    else:
        content = Path(name).read_bytes()
        try:
            theirs, specials = from_sentencepiece(content)
        except Exception as error:  # the library raises plain exceptions
            raise DataError(f"{name}: cannot become a tokenizer.json ({error})") from error
        samples = sample_texts(content)
    theirs.encode_special_tokens = True
    unknown = theirs.token_to_id(specials.get("unk_token", ""))
    difference = find_difference(ours, theirs, unknown, samples)
    if difference is not None:
        raise DataError(f"{name}: a tokenizer.json would give other ids or text for {difference}")
    create_file(folder / "tokenizer.json", theirs.to_str(pretty=True))
    write_tokenizer_config(specials, folder)


def describe_hf_tokenizer(folder: Path) -> None:
    """Write the tokenizer_config.json that a lone tokenizer.json lacks and AutoTokenizer needs."""
    ours = load_tokenizer(folder / "tokenizer.json")
    assert isinstance(ours, HuggingFaceTokenizer)
    roles = {"bos_token": ours.bos_id, "eos_token": ours.eos_id, "pad_token": ours.pad_id}
    write_tokenizer_config(
        {role: ours.model.id_to_token(i) for role, i in roles.items() if i is not None}, folder
    )


def write_tokenizer_config(specials: dict[str, str], folder: Path) -> None:
    """Write tokenizer_config.json.

    Args:
        specials: special tokens by role, such as eos_token.
    """
    values = specials | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    write_values(fill_in_batching(values), folder)


def complete_hf_tokenizer(folder: Path) -> None:
    """Add missing values that batches need to a copied tokenizer_config.json; nothing else
    changes."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    try:
        values = read_object(path)
    except (ValueError, OSError) as error:
        raise DataError(
            f"{path}: is not valid JSON ({error}), so the export would not load it; correct it"
        ) from None
    if (completed := fill_in_batching(values)) != values:
        path.unlink()  # The folder is not published yet.
        write_values(completed, folder)


def fill_in_batching(values: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json's values with those that batches need: the inputs, and a token
    to pad with on the left, as generation needs."""
    generic = values.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
    if generic and values.get("model_input_names") is None:
        values = values | {"model_input_names": ["input_ids", "attention_mask"]}
    if values.get("pad_token") is None and values.get("eos_token") is not None:
        values = values | {"pad_token": values["eos_token"]}
    return {"padding_side": "left"} | values


def end_sentences(folder: Path) -> None:
    """Let a written tokenizer put the end token after every text and padding on the right, as
    encoder-decoders read sentences."""
    paths = [folder / name for name in ("tokenizer.json", "tokenizer_config.json")]
    if not all(path.is_file() for path in paths):
        return
    model, values = (read_described(path) for path in paths)
    end = values.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    index = find_token_id(model, end)
    if index is None:
        return
    special = {"SpecialToken": {"id": end, "type_id": 0}}
    model["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, special],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}}, special,
            {"Sequence": {"id": "B", "type_id": 0}}, special,
        ],
        "special_tokens": {end: {"id": end, "ids": [index], "tokens": [end]}},
    }  # fmt: skip
    for path in paths:
        path.unlink()  # The folder is not published yet.
    create_file(paths[0], json.dumps(model, indent=2, ensure_ascii=False) + "\n")
    write_values(values | {"padding_side": "right"}, folder)


def read_described(path: Path) -> dict[str, Any]:
    """Return the object of a tokenizer's JSON file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return read_object(path)
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}); download it again") from None


def write_values(values: dict[str, Any], folder: Path) -> None:
    """Write tokenizer_config.json."""
    content = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    create_file(folder / "tokenizer_config.json", content)


def find_pad_id(folder: Path) -> int | None:
    """Return the id of the token that a written tokenizer pads with; None if unknown."""
    paths = [folder / name for name in ("tokenizer_config.json", "tokenizer.json")]
    if not all(path.is_file() for path in paths):
        return None
    values, model = (read_described(path) for path in paths)
    pad = values.get("pad_token")
    return find_token_id(model, pad.get("content") if isinstance(pad, dict) else pad)


def find_token_id(model: dict[str, Any], token: str | None) -> int | None:
    """Return the id of a token in a tokenizer.json; None if unknown."""
    given = model.get("added_tokens")
    added = {
        each.get("content"): each.get("id")
        for each in (given if isinstance(given, list) else ())
        if isinstance(each, dict) and isinstance(each.get("content"), str)
    }
    inner = model.get("model")
    vocabulary = inner.get("vocab") if isinstance(inner, dict) else None
    known = (vocabulary if isinstance(vocabulary, dict) else {}) | added
    index = known.get(token) if isinstance(token, str) else None
    return index if isinstance(index, int) else None


def from_bytes() -> tuple[Any, dict[str, str]]:
    """Return a tokenizer of the 256 bytes and an end of document, with the special tokens'
    names."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # GPT-2's spelling of bytes: printable ones unchanged, the others as characters from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=spelled, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_BYTES, normalized=False, special=True)])
    return tokenizer, {"eos_token": END_OF_BYTES}


def from_sentencepiece(content: bytes) -> tuple[Any, dict[str, str]]:
    """Return a sentencepiece model as a tokenizer.json, with the special tokens' names.

    Raises:
        DataError: the model has parts that the format lacks.
    """
    from sentencepiece import sentencepiece_model_pb2 as messages
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

    proto = messages.ModelProto.FromString(content)  # type: ignore[attr-defined]
    trainer, spec, kinds = proto.trainer_spec, proto.normalizer_spec, type(proto.pieces[0])
    if trainer.model_type not in (trainer.BPE, trainer.UNIGRAM):
        raise DataError("its model_type is neither bpe nor unigram")
    names = [p.piece for p in proto.pieces]
    unknown = next((p.piece for p in proto.pieces if p.type == kinds.UNKNOWN), None)
    if trainer.model_type == trainer.BPE:
        normal = {p.piece: p.score for p in proto.pieces if p.type == kinds.NORMAL}
        model = models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=find_merges(normal),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    else:
        scores = [p.score if p.type == kinds.NORMAL else NEVER for p in proto.pieces]
        model = models.Unigram(
            list(zip(names, scores, strict=True)),
            names.index(unknown) if unknown is not None else None,
            trainer.byte_fallback,
        )
    tokenizer = Tokenizer(model)

    normalize = []
    if spec.precompiled_charsmap:
        normalize.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        normalize.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        normalize.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        normalize.append(normalizers.Prepend(" "))
    decode: list[Any] = [decoders.ByteFallback(), decoders.Fuse()]
    if spec.escape_whitespaces:
        normalize.append(normalizers.Replace(" ", "▁"))
        decode.insert(0, decoders.Replace("▁", " "))
    if spec.add_dummy_prefix:
        decode.append(decoders.Strip(" ", 1, 0))
    if normalize:
        tokenizer.normalizer = normalizers.Sequence(normalize)
    tokenizer.decoder = decoders.Sequence(decode)

    special = [p.piece for p in proto.pieces if p.type in (kinds.CONTROL, kinds.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in special])
    given = [p.piece for p in proto.pieces if p.type == kinds.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(s, normalized=True, special=False) for s in given])
    roles = {"unk_token": unknown}
    for role in ("bos", "eos", "pad"):
        index = getattr(trainer, f"{role}_id")
        roles[f"{role}_token"] = names[index] if 0 <= index < len(names) else None
    return tokenizer, {role: name for role, name in roles.items() if name is not None}


def find_merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return the mergeable neighbours, in decreasing order of their joined piece's score.

    sentencepiece joins any two pieces that form a piece; a merge of tokenizers names both.
    """
    numbers = {piece: i for i, piece in enumerate(sorted(scores, key=lambda p: -scores[p]))}
    merges = []
    for piece in numbers:
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        found = [(a, b) for a, b in cuts if a in numbers and b in numbers]
        merges += sorted(found, key=lambda pair: (numbers[pair[0]], numbers[pair[1]]))
    return merges


def sample_texts(content: bytes) -> Iterator[str]:
    """Yield diverse texts, runs of characters, and a sentencepiece model's own pieces, alone and
    among others."""
    from sentencepiece import sentencepiece_model_pb2 as messages

    proto = messages.ModelProto.FromString(content)  # type: ignore[attr-defined]
    yield from SAMPLES
    for character in RUNS:
        for length in range(1, LONGEST_RUN):
            yield f"x{character * length}y{character * (length // 3)}"
    kinds = type(proto.pieces[0])
    wanted = (kinds.NORMAL, kinds.USER_DEFINED)
    pieces = [p.piece.replace("▁", " ") for p in proto.pieces if p.type in wanted]
    yield from pieces
    chosen = random.Random(0)
    for _ in range(2):
        chosen.shuffle(pieces)
        for start in range(0, len(pieces), PIECES_AT_ONCE):
            yield "".join(pieces[start : start + PIECES_AT_ONCE])


def find_difference(
    ours: Tokenizer, theirs: Any, unknown: int | None, texts: Iterator[str]
) -> str | None:
    """Return the first text whose ids, or whose text decoded from ids, differ; with the ids.

    Unknown characters become a sign in one and vanish in the other, so they are not compared.
    """
    for text in texts:
        wanted = ours.encode(text)
        found = theirs.encode(text, add_special_tokens=False).ids
        if found != wanted:
            return f"{text[:80]!r} ({found[:16]} instead of {wanted[:16]})"
        if unknown not in wanted and theirs.decode(wanted) != ours.decode(wanted):
            return f"{text[:80]!r} ({theirs.decode(wanted)[:80]!r} read back)"
    return None
