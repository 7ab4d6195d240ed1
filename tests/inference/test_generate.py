"""Decoding: the cache against full recomputation, the choice of tokens, text as it comes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from support import configs
from support.decoding import VOCAB, build_decoder, compare_with_recomputation

from megarecur.config.load import parse_yaml
from megarecur.data.tokenizer import ByteTokenizer, Tokenizer
from megarecur.errors import ConfigError
from megarecur.inference.cache import SMALLEST_CAPACITY, Cache
from megarecur.inference.generate import choose, encode_prompt, generate, stream_text

SCHEMES = {name: scheme for name, scheme in configs.SCHEMES.items() if name != "loop"}
for injection, state in product(("none", "add", "linear"), ("prelude", "zero", "random")):
    if injection != "none" or state == "prelude":
        SCHEMES[f"loop-{injection}-{state}"] = {
            "kind": "loop",
            "prelude": 1,
            "core": 2,
            "coda": 1,
            "num_loops": 2,
            "injection": injection,
            "initial_state": state,
        }
SCHEMES["reuse_map-add"] = {"kind": "reuse_map", "reuse_map": [3, 1, 2], "injection": "add"}
POSITIONS = ("rope", "alibi", "learned", "sinusoidal", "none")
KV_HEADS = (4, 2, 1)
# Every scheme with every position scheme, and every number of key heads with each of both.
CASES = [
    (scheme, positions, KV_HEADS[(i + j) % len(KV_HEADS)])
    for i, scheme in enumerate(SCHEMES)
    for j, positions in enumerate(POSITIONS)
]


@pytest.mark.parametrize(("scheme", "positions", "kv_heads"), CASES)
def test_cache_equals_recomputation(scheme: str, positions: str, kv_heads: int) -> None:
    """Logits within 1e-5, tokens equal, one entry per executed step of the map."""
    model = build_decoder(SCHEMES[scheme], positions=positions, num_kv_heads=kv_heads)
    compare_with_recomputation(model, Cache())


@pytest.mark.parametrize("norm_position", ["post", "sandwich"])
def test_cache_equals_recomputation_in_other_blocks(norm_position: str) -> None:
    """Other norm positions, LayerNorm, GELU, biases, a norm after the core."""
    recurrence = SCHEMES["loop-linear-random"]
    if norm_position != "post":
        recurrence = recurrence | {"final_norm_after_core": True}
    model = build_decoder(
        recurrence,
        norm_position=norm_position,
        norm="layer",
        feed_forward="gelu",
        attention_bias="all",
        feed_forward_bias=True,
        tie_embeddings=True,
        rope_interleaved=True,
    )
    compare_with_recomputation(model, Cache())


class CacheByBlock(Cache):
    """The planted fault: all uses of a block share one entry."""

    def append(self, step: tuple[int, int], *new: torch.Tensor) -> Any:
        """As Cache, the loop forgotten."""
        return super().append((step[0], 0), *new)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "dense"])
def test_cache_keyed_by_block_is_caught(scheme: str) -> None:
    """The comparison must see logits that differ, not merely the number of entries."""
    model = build_decoder(SCHEMES[scheme])
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        compare_with_recomputation(model, CacheByBlock())


def test_cache_grows() -> None:
    """More tokens than there was room for are kept, in any portions."""
    cache = Cache()
    whole = torch.randn(2, 3 * SMALLEST_CAPACITY, 2, 4, generator=torch.Generator().manual_seed(1))
    done = 0
    for size in (SMALLEST_CAPACITY - 1, 1, 1, SMALLEST_CAPACITY + 5):
        part = whole[:, done : done + size]
        for step in ((0, 0), (0, 1)):
            k, v = cache.append(step, part, -part)
            assert torch.equal(k, whole[:, : done + size])
            assert torch.equal(v, -whole[:, : done + size])
        cache.advance(size)
        done += size
    assert cache.length == done


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_generate_is_the_same_without_cache(scheme: str) -> None:
    """Greedy and sampled, token for token."""
    model = build_decoder(SCHEMES[scheme])
    prompt = [3, 1, 4, 1, 5]
    choices: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.9, "top_k": 20}]
    for options in choices:
        cached = list(generate(model, prompt, max_new_tokens=5, seed=7, **options))
        full = generate(model, prompt, max_new_tokens=5, seed=7, use_cache=False, **options)
        assert cached == list(full)
        assert len(cached) == 5


def test_samples_and_seeds_differ_and_repeat() -> None:
    """A sample is a function of (seed, sample) alone."""
    model = build_decoder(SCHEMES["reuse_map"])

    def draw(seed: int, sample: int) -> tuple[int, ...]:
        return tuple(generate(model, [2, 9], max_new_tokens=10, seed=seed, sample=sample))

    drawn = {(seed, sample): draw(seed, sample) for seed in (1, 2) for sample in (0, 1)}
    assert len(set(drawn.values())) == 4
    assert draw(2, 1) == drawn[2, 1]


def test_generate_stops_at_end_of_text() -> None:
    """The end is not part of the text."""
    model = build_decoder(SCHEMES["dense"])
    ids = list(generate(model, [2, 9], max_new_tokens=20, seed=4))
    end = ids[5]
    cut = list(generate(model, [2, 9], max_new_tokens=20, seed=4, eos_ids=[end, VOCAB]))
    assert cut == ids[: ids.index(end)]


def test_more_loops_than_trained_with() -> None:
    """num_loops changes what runs, and is the same as a model of that many loops."""
    prompt, options = [2, 9, 30], {"max_new_tokens": 8, "temperature": 0.0}
    deep = build_decoder(SCHEMES["block_recurrence"] | {"num_loops": 5})
    model = build_decoder(SCHEMES["block_recurrence"])
    wanted = list(generate(deep, prompt, **options))
    assert list(generate(model, prompt, num_loops=5, **options)) == wanted
    assert list(generate(model, prompt, **options)) != wanted


# --------------------------------------------------------------------------------------- choice


LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


NUM_DRAWS = 4000


def draw(logits_V: torch.Tensor, sample: int = 0, **options: Any) -> list[int]:
    """One draw at each of NUM_DRAWS positions."""
    positions = torch.arange(NUM_DRAWS)
    samples = torch.full_like(positions, sample)
    settings = {"temperature": 1.0, "seed": 5} | options
    chosen: list[int] = choose(
        logits_V.expand(NUM_DRAWS, -1), samples, positions, **settings
    ).tolist()
    return chosen


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    """Pearson's chi-square, 5 degrees of freedom: 20.5 is exceeded once in a thousand seeds."""
    counts = Counter(draw(LOGITS, temperature=temperature))
    expected = (LOGITS.double() / temperature).softmax(-1) * NUM_DRAWS
    square = sum((counts[i] - float(e)) ** 2 / float(e) for i, e in enumerate(expected))
    assert square < 20.5


def test_neighbouring_draws_are_independent() -> None:
    """Over samples at one position as over positions: pairs of draws follow the product."""
    same, n = float(LOGITS.double().softmax(-1).square().sum()), NUM_DRAWS
    first, second = draw(LOGITS, sample=0), draw(LOGITS, sample=1)
    across = sum(a == b for a, b in zip(first, second, strict=True))
    repeated = sum(a == b for a, b in pairwise(first))
    deviation = (n * same * (1.0 - same)) ** 0.5
    assert abs(across - n * same) < 4 * deviation
    assert abs(repeated - n * same) < 4 * deviation


def test_top_k_top_p_and_temperature_limit_the_choice() -> None:
    """Exactly the tokens that the options leave over are drawn."""
    p = LOGITS.softmax(-1).cumsum(-1)
    assert set(draw(LOGITS, top_k=1)) == {0}
    assert set(draw(LOGITS, top_k=3)) == {0, 1, 2}
    assert set(draw(LOGITS, top_k=99)) == set(range(6))
    assert set(draw(LOGITS, top_p=1e-6)) == {0}
    assert set(draw(LOGITS, top_p=float(p[1]) - 1e-4)) == {0, 1}
    assert set(draw(LOGITS, top_p=float(p[1]) + 1e-4)) == {0, 1, 2}
    assert set(draw(LOGITS, top_k=4, top_p=0.99)) == {0, 1, 2, 3}
    assert set(draw(LOGITS, temperature=0.0)) == {0}
    # The share of what is left, not of everything: 0.9 of the first two is both, 0.6 is one.
    assert set(draw(LOGITS, top_k=2, top_p=0.9)) == {0, 1}
    assert set(draw(LOGITS, top_k=2, top_p=0.6)) == {0}


def test_top_k_keeps_k_of_equal_logits() -> None:
    """Ties do not widen the choice."""
    assert len(set(draw(torch.zeros(9), top_k=3))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -0.1}, "temperature=-0.1 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan must be 0"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0"),
        ({"num_loops": 0}, "depth 0: must be at least 1 loop"),
        ({"num_loops": 2}, "recurrence.kind=dense has no loops"),
        ({"tokens": []}, "the prompt has no tokens"),
        ({"tokens": [1, VOCAB]}, f"id {VOCAB} of the prompt is outside model.vocab_size={VOCAB}"),
        ({"tokens": [-1]}, "id -1 of the prompt"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    """At the call, before the first token is asked for."""
    model = build_decoder(SCHEMES["dense"])
    settings: dict[str, Any] = {"tokens": [1], "max_new_tokens": 3} | options
    with pytest.raises(ConfigError, match=message):
        generate(model, **settings)


def test_learned_positions_end() -> None:
    """All of them are used, none beyond."""
    model = build_decoder(SCHEMES["dense"], positions="learned", max_positions=160)
    assert len(list(generate(model, [1] * 158, max_new_tokens=3))) == 3
    with pytest.raises(ConfigError, match=r"160 learned.*set max_new_tokens to at most 3"):
        generate(model, [1] * 158, max_new_tokens=4)
    with pytest.raises(ConfigError, match="shorten the prompt"):
        generate(model, [1] * 161, max_new_tokens=1)


# ------------------------------------------------------------------------------------------- text


class Pieces(Tokenizer):
    """Ids are pieces as sentencepiece has them: a space in front, dropped at the very start."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces

    def encode_array(self, text: str) -> Any:
        """Not used here."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """Pieces side by side."""
        return "".join(self.pieces[i] for i in ids).replace("▁", " ").removeprefix(" ")


def test_prompt_begins_as_texts_of_the_model_do() -> None:
    """With the begin of text where the model knows one; never empty."""
    tokenizer = ByteTokenizer()
    assert encode_prompt(tokenizer, "ab") == [97, 98]
    assert encode_prompt(tokenizer, "ab", 256) == [256, 97, 98]
    assert encode_prompt(tokenizer, "", 5) == [5]
    assert encode_prompt(tokenizer, "") == [tokenizer.eos_id]


def test_stream_of_bytes_is_the_whole_text() -> None:
    """Characters of one to four bytes come whole, in order, and nothing else comes."""
    tokenizer = ByteTokenizer()
    text = "a é € 🙂 z — 🙂🙂\n"
    prompt = tokenizer.encode("né ")
    pieces = list(stream_text(tokenizer, prompt, tokenizer.encode(text)))
    assert "".join(pieces) == text
    assert pieces == list(text)


def test_stream_flushes_what_never_became_a_character() -> None:
    """Broken bytes show as one mark each time, at the latest at the end."""
    tokenizer = ByteTokenizer()
    euro = "€".encode()
    assert "".join(stream_text(tokenizer, [65], [*euro[:2], 66])) == "\ufffdB"
    assert "".join(stream_text(tokenizer, [65], [66, *euro[:2]])) == "B\ufffd"
    assert list(stream_text(tokenizer, [65], [])) == []


def test_stream_keeps_spaces_and_skips_empty_tokens() -> None:
    """A piece's own space is kept, also after tokens without text."""
    tokenizer = Pieces(["", "▁Once", "▁upon", "▁", "a", "▁time"])
    ids = [2, 3, 4, 0, 0, 5, 3]
    for prompt in ([0, 1], [1]):
        text = "".join(stream_text(tokenizer, prompt, ids))
        assert text == tokenizer.decode([*prompt, *ids])[len("Once") :] == " upon a time "
    assert "".join(stream_text(tokenizer, [0], [1, 2])) == "Once upon"


def test_stream_yields_before_the_next_token_is_made() -> None:
    """Text comes as soon as it is complete."""
    tokenizer, made = ByteTokenizer(), []

    def ids() -> Any:
        for i in tokenizer.encode("xyz"):
            made.append(i)
            yield i

    stream = stream_text(tokenizer, [65], ids())
    assert next(stream) == "x"
    assert len(made) == 1


def test_a_prompt_that_is_not_utf8_is_one_error() -> None:
    """As a terminal of another encoding gives it; of a config, when it is read."""
    tokenizer = ByteTokenizer()
    with pytest.raises(ConfigError, match=r"the prompt 'caf\\udce9': byte 3 \(0xe9\) is not UTF-8"):
        encode_prompt(tokenizer, os.fsdecode(b"caf\xe9"))
    with pytest.raises(ConfigError, match=r"character 1 \(\\ud83d\) is half a surrogate pair"):
        encode_prompt(tokenizer, "a\ud83d")
    with pytest.raises(ConfigError, match=r"given: not valid YAML.*holds half of a character"):
        parse_yaml('sample_prompts: ["\\ud83d"]', "given")
