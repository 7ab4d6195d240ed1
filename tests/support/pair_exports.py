"""Runs of tiny encoder-decoders to export, and what such a run computes itself.

Shapes: B pairs, S target positions, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file
from support.exports import save_run
from support.pairs import DENSE, collate, objective, pair_config
from torch import Tensor

from megarecur.checkpoint.load import load_model
from megarecur.config.recurrence import Looped
from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.data.tokenizer import load_tokenizer
from megarecur.inference.beam import LengthPenalty
from megarecur.inference.translate import (
    TranslateOptions,
    encode_sentences,
    start_token,
    translate,
)
from megarecur.model.transformer import Transformer

SEQUENCE = {"kind": "sequence", "num_blocks": 2, "depth": 4}
CYCLE = {"kind": "cycle", "num_blocks": 2, "depth": 4}
REVERSED = {"kind": "cycle_reverse", "num_blocks": 2, "depth": 4}
REUSE = {"kind": "reuse_map", "reuse_map": [2, 1], "injection": "add"}
BLOCKS = {"kind": "block_recurrence", "num_blocks": 2, "num_loops": 2}
LOOP = {"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": 2}
RING = {"kind": "ring", "depth": 3, "level_rank": 3, "feed_forward_rank": 2}
CUSTOM = {"kind": "custom", "order": [1, 0, 1, 2, 0]}
UNIVERSAL = {"kind": "universal", "depth": 3}
BIASED = {"attention_bias": "all", "feed_forward_bias": True}
WORDS = 20
ROWS = WORDS + 6
"""Rows of the embedding: special tokens, words, and two ids without a piece."""
LINES = ["w1 w2 w3", "", "w5 w4 w3 w2 w1 w0 w9 w9", "w7", "w19 w3 w11 w2", "w1 w2 w3"]
TARGETS = ["w4 w9", "w3 w2 w1 w18 w6 w6 w7", "", "w1", "w2 w2 w2", "w8"]

PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any] | None]] = {
    "cycle below ring, post": (
        CYCLE, RING,
        {"norm_position": "post", "positions": "sinusoidal", "sinusoid_layout": "interleaved"}
        | {"feed_forward": "gelu", "head_bias": True, "tie": "all", "scale_embeddings": True}
        | BIASED, None,
    ),
    "ring below loop, pre": (
        RING, LOOP,
        # With larger weights this model multiplies rounding by thousands.
        {"positions": "learned", "max_positions": 40, "tie": "all", "norm": "rms"}
        | {"init_std": 0.15}, None,
    ),
    "loop below reuse map, peri": (
        LOOP, REUSE,
        {"norm_position": "peri", "positions": "alibi", "tie": "decoder", "qk_norm": True},
        {"rank": 3, "norms": True, "biases": True},
    ),
    "reversed below sequence, Admin": (
        REVERSED, SEQUENCE,
        {"norm_position": "post", "residual": "admin", "positions": "none", "head_bias": True}
        | {"tie": "all", "norm": "rms"}, None,
    ),
    "custom below blocks, output": (
        CUSTOM, BLOCKS,
        {"norm_position": "output", "num_kv_heads": 2, "tie": "all", "scale_embeddings": True}
        | {"attention_softcap": 2.0, "logit_softcap": 6.0, "rope_interleaved": True}, None,
    ),
    "universal below custom, sandwich": (
        UNIVERSAL, CUSTOM,
        {"norm_position": "sandwich", "level_encoding": "sinusoidal", "positions": "none"}
        | {"tie": "decoder", "attention_bias": "qk"}, {"rank": 2, "targets": ["query", "down"]},
    ),
    "blocks below universal, pre": (
        BLOCKS, UNIVERSAL | {"depth": 2},
        {"positions": "xpos", "gate": True, "gate_hidden_size": 7, "tie": "none"}
        | {"source_vocab_size": 31}, None,
    ),
    "sequence below dense, shared feed-forward": (
        SEQUENCE, DENSE,
        {"shared_feed_forward": True, "positions": "sinusoidal", "tie": "decoder"}
        | {"feed_forward": "relu"}, None,
    ),
}  # fmt: skip
"""Encoder, recurrence, our `model` section, and adapters."""
SEARCHES = ({"beam": 1}, {"beam": 4}, {"beam": 4, "alpha": 0.0}, {"beam": 3, "alpha": 2.5})
MOST = 8
"""Most tokens of a translation in these searches."""


def write_word_tokenizer(path: Path) -> Path:
    """Write a tokenizer.json of words; returns its path."""
    names = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {word: i for i, word in enumerate([*names, *(f"w{i}" for i in range(WORDS))])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(names)
    path.write_text(made.to_str())
    return path


def write_pair_run(
    run_dir: Path,
    encoder: dict[str, Any],
    recurrence: dict[str, Any],
    model: dict[str, Any],
    adapters: dict[str, Any] | None = None,
) -> Config:
    """Write a run with random parameters, and its tokenizer beside it."""
    tokenizer = write_word_tokenizer(run_dir.parent / "tokenizer.json")
    shape = {"vocab_size": ROWS, "init_std": 0.3, "max_positions": None}
    config = pair_config(encoder, recurrence, "fp32", model=shape | model, adapters=adapters,
                         run_dir=str(run_dir))  # fmt: skip
    data = config.data.model_copy(update={"tokenizer": str(tokenizer)})
    config = config.model_copy(update={"data": data})
    return save_run(config, run_dir, change=strengthen)


def make_batch(path: Path | str) -> MicroBatch:
    """Return LINES and TARGETS, padded."""
    tokenizer = load_tokenizer(str(path))
    start, end = start_token(tokenizer), tokenizer.eos_id
    sources = [torch.tensor([*tokenizer.encode(line), end]) for line in LINES]
    targets = [torch.tensor([start, *tokenizer.encode(line), end]) for line in TARGETS]
    return collate(sources, targets)


def strengthen(model: Transformer) -> None:
    """Let branches outweigh the residual stream and biases: random models repeat a token, whatever
    they read."""
    for name, parameter in model.parameters_by_name.items():
        if name.endswith((".output.weight", ".down.weight", "output_norm.weight")):
            parameter.data.mul_(4.0)
        if name.endswith(".bias"):
            parameter.data.mul_(0.2)


def search(model: Transformer, tokenizer: Any, **given: Any) -> dict[str, Any]:
    """Translations of LINES: ids, texts and scores of the best."""
    penalty = LengthPenalty("fairseq", given.get("alpha", 1.0))
    options = TranslateOptions(beam=given["beam"], penalty=penalty, num_loops=given.get("loops"),
                               max_tokens=given.get("most", MOST))  # fmt: skip
    found = translate(model, tokenizer, encode_sentences(tokenizer, LINES), options)
    best = [each.hypotheses[0] for each in found]
    return given | {
        "ids": [list(h.tokens) for h in best],
        "texts": [each.texts[0] for each in found],
        "scores": [h.score for h in best],
    }


def describe_pair_case(run_dir: Path, out: Path) -> dict[str, Any]:
    """Return a case of `check_pairs.py`: what the run computes itself."""
    model, run = load_model(run_dir)
    config, tokenizer = run.config, load_tokenizer(run.tokenizer)
    start, end = start_token(tokenizer), tokenizer.eos_id
    sources = [[*tokenizer.encode(line), end] for line in LINES]
    targets = [[start, *tokenizer.encode(line), end] for line in TARGETS]
    batch = make_batch(run.tokenizer)
    with torch.no_grad():
        total, logits_BSV = objective(model, batch)
    assert logits_BSV.std() > 0.3
    tensors: dict[str, Tensor] = {"logits": logits_BSV.contiguous()}
    tensors["loss"] = (total / (batch.labels_BS >= 0).sum()).reshape(1).float()
    save_file(tensors, expected := out.with_name(out.name + ".safetensors"))
    searches = [search(model, tokenizer, **given) for given in SEARCHES]
    if isinstance(config.recurrence, Looped) and not config.of_loops:
        searches += [search(model, tokenizer, beam=4, loops=n) for n in (1, 3)]
    texts = {tuple(ids) for found in searches for ids in found["ids"]}
    assert len(texts) > 2
    return {
        "folder": str(out), "expected": str(expected), "lines": LINES, "sources": sources,
        "targets": targets, "searches": searches, "most": MOST, "pairs": True,
        "default": search(model, tokenizer, beam=4, most=count_most(config)),
        "blocks": config.recurrence.num_blocks,
    }  # fmt: skip


def count_most(config: Config) -> int:
    """Return the most tokens of a translation by the exported settings."""
    rows = config.model.max_positions if config.model.positions == "learned" else None
    return rows or config.data.seq_length + 50
