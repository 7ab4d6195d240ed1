"""Translation by a model: the cache, batches, greedy decoding, scores, output and bad input."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import megarecur
from support.exports import DENSE as DENSE_DECODER
from support.exports import save_run, write_run
from support.models import build
from support.pairs import DENSE, pair_config

from megarecur.config.run import Config
from megarecur.data.tokenizer import ByteTokenizer
from megarecur.errors import DataError
from megarecur.inference.beam import LengthPenalty
from megarecur.inference.bleu import score_texts
from megarecur.inference.decoder import TranslationDecoder, collate_sources, read_cross_attention
from megarecur.inference.translate import (
    Sampling,
    TranslateOptions,
    Translation,
    encode_sentences,
    plan_batches,
    translate,
)
from megarecur.model.transformer import Transformer
from megarecur.recurrence.schemes import build_map

CYCLE = {"kind": "cycle", "num_blocks": 2, "depth": 4}
RING = {"kind": "ring", "depth": 3, "level_rank": 3, "feed_forward_rank": 2}
UNIVERSAL = {"kind": "universal", "depth": 3, "halting": {"mode": "token"}}
LOOP = {"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": 2}
STACKS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "cycle, cycle": (CYCLE, CYCLE, {"norm_position": "post"}),
    "dense, ring": (DENSE, RING, {"num_kv_heads": 2, "positions": "sinusoidal"}),
    "ring, loop": (RING, LOOP, {"positions": "learned", "max_positions": 64}),
    "universal, universal": (UNIVERSAL, UNIVERSAL, {}),
}
LINES = ["Ein Hund.", "", "Zwei Katzen schlafen im Garten.", "Der Ball", "ö", "Ein Hund."]
TOKENIZER = ByteTokenizer()
PENALTY = LengthPenalty("wu", 0.6)


def byte_config(name: str, precision: str = "fp64") -> Config:
    """A tiny encoder-decoder of bytes, whose weights are large enough to differ by input."""
    encoder, recurrence, model = STACKS[name]
    model = {"vocab_size": 257, "init_std": 0.3, "max_positions": None, **model}
    return pair_config(encoder, recurrence, precision, model=model)


def decode(config: Config, model: Transformer, **changes: Any) -> list[Translation]:
    options = TranslateOptions(max_tokens=9, use_cache=config.halting is None)
    sentences = encode_sentences(TOKENIZER, LINES)
    return translate(model, TOKENIZER, sentences, replace(options, **changes))


def tokens_of(found: list[Translation]) -> list[list[tuple[int, ...]]]:
    return [[hypothesis.tokens for hypothesis in each.hypotheses] for each in found]


@pytest.mark.parametrize("name", STACKS)
def test_batches_caches_and_single_sentences_give_the_same(name: str) -> None:
    config = byte_config(name)
    model = build(config)
    found = decode(config, model, nbest=4)
    assert len({text for each in tokens_of(found) for text in each}) > len(LINES)
    assert tokens_of(found)[0] == tokens_of(found)[-1], "equal sentences"
    for changes in ({"batch": 1}, {"batch": 4, "batch_tokens": 100}, {"use_cache": False}):
        again = decode(config, model, nbest=4, **changes)
        assert tokens_of(again) == tokens_of(found), changes
        for ours, theirs in zip(again, found, strict=True):
            scores = [[h.score for h in each.hypotheses] for each in (ours, theirs)]
            assert scores[0] == pytest.approx(scores[1], rel=1e-9)


@pytest.mark.parametrize("name", ["cycle, cycle", "ring, loop"])
def test_a_beam_of_one_is_greedy(name: str) -> None:
    """Greedy decoding here: the whole prefix anew for every token, one sentence at a time."""
    config = byte_config(name)
    model, steps = build(config), build_map(config)
    found = decode(config, model, beam=1)
    for line, each in zip(LINES, tokens_of(found), strict=True):
        source = collate_sources([[*TOKENIZER.encode(line), TOKENIZER.eos_id]])
        decoder = TranslationDecoder(model, steps, source, use_cache=False)
        text: list[int] = []
        token, total = TOKENIZER.eos_id, 0.0
        while len(text) < 8:
            log_p_V = decoder.advance(torch.tensor([token]), torch.tensor([0]))[0]
            token = int(log_p_V.argmax())
            total += float(log_p_V[token])
            if token == TOKENIZER.eos_id:
                break
            text.append(token)
        assert each == [tuple(text)]


def test_depth_prefixes_and_samples() -> None:
    config = byte_config("ring, loop")
    model = build(config)
    assert tokens_of(decode(config, model, num_loops=1)) != tokens_of(decode(config, model))
    assert decode(config, model, num_loops=2) == decode(config, model)
    sentences = encode_sentences(TOKENIZER, LINES, ["ab"] * 3 + [""] * 3)
    options = TranslateOptions(max_tokens=9, nbest=2)
    for each in translate(model, TOKENIZER, sentences, options)[:3]:
        assert all(text.startswith("ab") for text in each.texts)
    drawn = {"sampling": Sampling(seed=5), "nbest": 3}
    found = decode(config, model, **drawn)
    assert tokens_of(decode(config, model, batch=1, **drawn)) == tokens_of(found)
    assert tokens_of(found)[0] != tokens_of(found)[-1], "sentences draw for themselves"


def test_truncated_sources_keep_their_end() -> None:
    config = byte_config("dense, ring")  # data.seq_length is 16
    model = build(config)
    cut = encode_sentences(TOKENIZER, [LINES[2][:15]])
    options = TranslateOptions(max_tokens=9, truncate=True)
    whole = translate(model, TOKENIZER, encode_sentences(TOKENIZER, [LINES[2]]), options)
    assert whole == translate(model, TOKENIZER, cut, options)


def test_batches_are_of_like_length_and_within_limits() -> None:
    sentences = encode_sentences(TOKENIZER, ["x" * n for n in (3, 9, 1, 7, 7, 30)])
    assert plan_batches(sentences, TranslateOptions(batch=3)) == [[5, 1, 3], [4, 0, 2]]
    options = TranslateOptions(batch=3, beam=2, batch_tokens=40)
    assert plan_batches(sentences, options) == [[5], [1, 3], [4, 0], [2]]


def test_cross_attention_is_that_of_the_model() -> None:
    """Weights move the output: a value at a source token arrives by its weight."""
    config = byte_config("cycle, cycle")
    model, steps = build(config), build_map(config)
    source, target = [5, 9, 200, 256], [256, 8, 31]
    uses = read_cross_attention(model, steps, source, target)
    assert [(use.block, use.loop) for use in uses] == [(2, 0), (3, 0), (2, 1), (3, 1)]
    for use in uses:
        assert use.weights_SK.shape == (3, 4)
        np.testing.assert_allclose(use.weights_SK.sum(1), 1.0, rtol=1e-5)
    # A causal row does not depend on later tokens.
    fewer = read_cross_attention(model, steps, source, target[:2])
    for use, part in zip(uses, fewer, strict=True):
        np.testing.assert_allclose(use.weights_SK[:2], part.weights_SK, rtol=1e-5)
    # The mean over heads of softmax(q k) of the first use, computed from its parameters.
    block = model.runner.blocks["2"]
    seen: list[torch.Tensor] = []
    hook = block.cross_attention.register_forward_hook(lambda _, given, out: seen.extend(given[:2]))
    read_cross_attention(model, steps, source, target)
    hook.remove()
    x, encoded, head = seen[0][0], seen[1][0], config.model.head_dim
    q = (x @ block.cross_attention.query.weight.parameter.T).unflatten(-1, (-1, head))
    k = (encoded @ block.cross_attention.key.weight.parameter.T).unflatten(-1, (-1, head))
    expected = (torch.einsum("snh,knh->nsk", q, k) * head**-0.5).softmax(-1).mean(0)
    np.testing.assert_allclose(uses[0].weights_SK, expected.detach().numpy(), rtol=1e-5)


# --------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of bytes with learned positions, in fp32."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = byte_config("ring, loop", "fp32")
    config = config.model_copy(update={"run_dir": str(folder)})
    save_run(config, folder)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


def test_the_command_writes_translations_scores_and_a_picture(
    run: Path, source: Path, tmp_path: Path, capsys: Any
) -> None:
    references = tmp_path / "reference.txt.xz"
    references.write_bytes(lzma.compress("\n".join(LINES).encode()))
    out, picture = tmp_path / "out.txt", tmp_path / "cross.png"
    code, printed, error = megarecur(
        capsys, "translate", run, "--source", source, "--reference", references, "--out", out,
        "--max-tokens", 9, "--draw", picture, "--draw-line", 3,
    )  # fmt: skip
    assert code == 0, error
    lines = out.read_text(encoding="utf-8").split("\n")[:-1]
    assert len(lines) == len(LINES) and lines[0] == lines[-1]
    record = json.loads((tmp_path / "out.txt.json").read_text(encoding="utf-8"))
    assert record["search"] == "beam 4" and record["length_penalty"] == "wu 0.6"
    assert record["sentences"] == 6 and record["step"] == 7
    assert record["bleu_signature"] in printed and "sentences/s" in printed
    assert picture.stat().st_size > 5000
    code, again, _ = megarecur(capsys, "translate", run, "--source", source, "--max-tokens", 9)
    assert again.split("\n")[:-1] == lines
    code, several, _ = megarecur(
        capsys, "translate", run, "--source", source, "--max-tokens", 9, "--nbest", 2
    )
    rows = [line.split("\t") for line in several.split("\n")[:-1]]
    assert [row[0] for row in rows] == [str(i) for i in range(1, 7) for _ in range(2)]
    assert [row[2] for row in rows[::2]] == lines
    assert all(float(a[1]) >= float(b[1]) for a, b in zip(rows[::2], rows[1::2], strict=True))


def test_scores_are_those_of_sacrebleus_command(tmp_path: Path) -> None:
    texts = ["the cat sat on the mat .", "a dog", "it is raining (again), isn't it?"]
    references = ["the cat is on the mat.", "the dog barks", "it's raining again, isn't it?"]
    found = score_texts(texts, references)
    (tmp_path / "ref").write_text("\n".join(references) + "\n")
    (tmp_path / "out").write_text("\n".join(texts) + "\n")
    command = [
        sys.executable,
        "-m",
        "sacrebleu",
        "ref",
        "-i",
        "out",
        "-m",
        "bleu",
        "chrf",
        "-w",
        "9",
    ]
    theirs = json.loads(subprocess.check_output(command, cwd=tmp_path, text=True))
    assert [score["score"] for score in theirs] == pytest.approx(
        [found["bleu"], found["chrf"]], abs=1e-9
    )
    assert found["bleu_signature"] == theirs[0]["signature"]
    with pytest.raises(DataError, match="2 references for 3 translations"):
        score_texts(texts, references[:2])


def refused(capsys: Any, run: Path, source: Path, *options: object) -> str:
    code, _, error = megarecur(capsys, "translate", run, "--source", source, *options)
    assert code == 2 and "Traceback" not in error, error
    return error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beam", 258], "--beam 258: must be from 1 to the vocabulary's 257 tokens"),
        (["--beam", 2, "--nbest", 3], "--nbest 3: must be from 1 to --beam 2"),
        (["--depth", 0], "depth 0: must be at least 1 loop"),
        (["--batch", 0], "--batch 0: must be at least 1"),
        (["--batch", 10**12], "--batch 1000000000000: must be at most 65536"),
        (["--batch-tokens", 10**12], "--batch-tokens 1000000000000: must be at most"),
        (["--max-tokens", 10**12], "--max-tokens 1000000000000: must be at most 1048576"),
        (["--sample", "--nbest", 10**12], "--nbest 1000000000000: must be from 1 to 1024"),
        (["--length-penalty", -1], "--length-penalty -1.0: must be from 0 to 100"),
        (["--sample", "--top-p", 0], "--top-p 0.0: must be above 0"),
        (["--top-k", 3], "--top-k: only for samples; add --sample"),
        (["--draw", "x.pdf"], "--draw x.pdf: the name must end in .png or .svg"),
        (["--draw", "x.png", "--draw-line", 9], "--draw-line 9: the source has lines 1 to 6"),
        (["--out", "none/out.txt"], "--out none/out.txt: its folder does not exist"),
        (["--reference", "missing"], "missing: cannot be read"),
    ],
)
def test_wrong_options_are_refused(
    run: Path, source: Path, options: list[object], message: str, capsys: Any
) -> None:
    assert message in refused(capsys, run, source, *options)


def test_all_mistakes_are_reported_together(
    run: Path, source: Path, tmp_path: Path, capsys: Any
) -> None:
    long, prefixes = tmp_path / "long.txt", tmp_path / "prefixes.txt"
    long.write_text("short\n" + "x" * 64 + "\n" + "y" * 99 + "\n")
    prefixes.write_text("\n" + "\nabcdefghij\n")
    error = refused(
        capsys, run, long, "--prefix", prefixes, "--max-tokens", 9, "--beam", 0, "--nbest", 0
    )
    assert error.count("\n  ") == 4
    assert "line 2 of the source has 65 tokens with its end, more than the 64 learned" in error
    assert "(1 more lines too); split long sentences, or cut them with --truncate" in error
    assert "line 3 of the prefixes has 10 tokens" in error
    code, printed, _ = megarecur(
        capsys, "translate", run, "--source", long, "--truncate", "--max-tokens", 3
    )
    assert code == 0 and len(printed.split("\n")) == 4


def test_files_that_do_not_match_are_refused(
    run: Path, source: Path, tmp_path: Path, capsys: Any
) -> None:
    fewer, empty, binary = (tmp_path / name for name in ("fewer", "empty", "binary"))
    fewer.write_text("a\nb\n")
    empty.write_text("")
    binary.write_bytes(b"a\n\xff\xfe\n")
    assert f"fewer: has 2 lines, but {source} has 6" in refused(
        capsys, run, source, "--reference", fewer
    )
    assert "has 2 lines" in refused(capsys, run, source, "--prefix", fewer)
    assert "empty: is empty" in refused(capsys, run, empty)
    assert "binary: line 2 is not UTF-8" in refused(capsys, run, binary)


def test_an_encoder_decoder_continues_no_text(run: Path, capsys: Any) -> None:
    code, _, error = megarecur(capsys, "generate", run, "Ein Hund")
    assert code == 2 and "translate sentences with `megarecur translate`" in error


def test_a_decoder_only_run_is_refused(tmp_path: Path, source: Path, capsys: Any) -> None:
    write_run(tmp_path / "run", DENSE_DECODER, vocab_size=257)
    error = refused(capsys, tmp_path / "run", source)
    assert "with `megarecur generate`" in error
    assert "encoder is not set, so the run is no encoder-decoder; continue text with" in error
