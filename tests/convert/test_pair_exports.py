"""Exports of encoder-decoders: the run's logits, losses and translations, in transformers.

`test_hub_versions.py` checks every case of PAIRS with the newest transformers 4 and 5.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.check_pairs import check_pairs
from support.exports import save_run
from support.pair_exports import (
    LOOP,
    PAIRS,
    describe_pair_case,
    make_batch,
    write_pair_run,
    write_word_tokenizer,
)
from support.pairs import DENSE, pair_config
from torch import Tensor

from megarecur.checkpoint.load import load_model
from megarecur.convert import compact
from megarecur.convert.hf import export_hf
from megarecur.data.tokenizer import load_tokenizer
from megarecur.data_prep.tokenizer import train_tokenizer
from megarecur.errors import ConfigError
from megarecur.recurrence.depth import Depth
from megarecur.recurrence.schemes import build_map

FAST = ("cycle below ring, post", "loop below reuse map, peri")


def load_pair(hub_model: Any, folder: str | Path) -> Any:
    """The model of a folder; every tensor has its place."""
    kind = hub_model.MegarecurForConditionalGeneration
    model, faults = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(faults.values()), faults
    return model.eval()


@pytest.mark.parametrize("name", FAST)
def test_exports_translate_as_the_run_does(tmp_path: Path, hub_model: Any, name: str) -> None:
    config = write_pair_run(tmp_path / "run", *PAIRS[name])
    out = export_hf(tmp_path / "run", tmp_path / "hf")
    load = partial(load_pair, hub_model)
    ours, _ = load_model(tmp_path / "run")
    assert {n: p.shape for n, p in load(out).named_parameters()} == {
        compact.hub_name(config, n): p.shape for n, p in ours.parameters_by_name.items()
    }
    check_pairs(describe_pair_case(tmp_path / "run", out), load, tools=name == FAST[0])


def test_random_initial_states_at_any_depth(tmp_path: Path, hub_model: Any) -> None:
    """Both stacks draw their own noise by sample and position."""
    loop = LOOP | {"initial_state": "random", "injection": "linear", "injection_bias": True}
    above = loop | {"final_norm_after_core": True}
    write_pair_run(tmp_path / "run", loop, above, {"norm_position": "sandwich", "tie": "none"})
    out = export_hf(tmp_path / "run", tmp_path / "hf")
    ours, run = load_model(tmp_path / "run")
    batch = make_batch(run.tokenizer)
    assert batch.source is not None
    ctx = ours.context(batch, step=0, training=False)
    for loops, below in ((3, 2), (2, 3)):
        config = hub_model.MegarecurConfig.from_pretrained(out)
        config.encoder["num_loops"] = below
        model = hub_model.MegarecurForConditionalGeneration.from_pretrained(out, config=config)
        steps, reads = build_map(run.config, Depth(loops, loops, below, below)), dict[str, Tensor]()
        with torch.no_grad():
            x = ours.enter(batch.tokens_BS, ctx, reads, batch.source)
            wanted = ours.logits(ours.run(steps, x, ctx, reads)[0])
            found = model.eval()(
                batch.source.tokens_BS, (batch.source.documents_BS >= 0).long(),
                batch.tokens_BS, num_loops=loops, sample_ids=batch.sample_ids_B,
            ).logits  # fmt: skip
        real = batch.labels_BS >= 0
        torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-3)


def test_settings_of_generation_and_the_model_card(tmp_path: Path) -> None:
    """`generate` needs no arguments: start, end, padding and length are written."""
    write_pair_run(tmp_path / "run", *PAIRS["ring below loop, pre"])
    out = export_hf(tmp_path / "run", tmp_path / "hf")
    chosen = json.loads((out / "generation_config.json").read_text())
    assert chosen == {
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1,
        "forced_eos_token_id": 2, "max_length": 41, "num_beams": 4, "early_stopping": True,
        "length_penalty": 1.0, "suppress_tokens": [0, 1, 24, 25],
    }  # fmt: skip
    values = json.loads((out / "config.json").read_text())
    assert values["is_encoder_decoder"] and values["decoder_start_token_id"] == 1
    assert values["auto_map"]["AutoModelForSeq2SeqLM"].endswith("ForConditionalGeneration")
    assert values["encoder"]["shared_embedding"]
    card = (out / "README.md").read_text()
    assert "- encoder: ring, 3 layers of 1 blocks" in card
    example = card.split("```python\n")[1].split("```")[0]
    compile(example, "README.md", "exec")
    assert len(example.splitlines()) == 5


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "tokenizer.json"])
def test_tokenizers_end_sentences(tmp_path: Path, transformers: Any, kind: str) -> None:
    """Sources and labels are our ids and the end token; padding is on the right."""
    lines = ["w1 w2", "", "w3 w4 w5 </s>"]
    name = "bytes"
    if kind == "sentencepiece":
        text = tmp_path / "text.txt"
        text.write_text("a w1 w2 dog\n" * 20 + "the w3 w4 w5 house\n" * 20)
        train_tokenizer([text], tmp_path / "joint.model", vocab_size=290, pad=True)
        name = str(tmp_path / "joint.model")
    if kind == "tokenizer.json":
        name = str(write_word_tokenizer(tmp_path / "tokenizer.json"))
    config = pair_config(DENSE, DENSE, "fp32", model={"vocab_size": 400, "max_positions": None})
    data = config.data.model_copy(update={"tokenizer": name})
    save_run(config.model_copy(update={"data": data}), tmp_path / "run")
    out = export_hf(tmp_path / "run", tmp_path / "hf")
    ours, theirs = load_tokenizer(name), transformers.AutoTokenizer.from_pretrained(out)
    pad = ours.eos_id if ours.pad_id is None else ours.pad_id
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, pad)
    wanted = [[*ours.encode(line), ours.eos_id] for line in lines]
    longest = max(map(len, wanted))
    batch = theirs(lines, text_target=lines, padding=True)
    assert batch["input_ids"] == [row + [pad] * (longest - len(row)) for row in wanted]
    assert theirs(text_target=lines)["input_ids"] == wanted
    texts = theirs.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert texts == [ours.decode(row[:-1]) for row in wanted]


def test_what_cannot_be_expressed_is_refused(tmp_path: Path) -> None:
    """All of it by name, in one message; nothing is written."""
    halting = {"kind": "universal", "depth": 3, "halting": {"mode": "token"}}
    write_pair_run(tmp_path / "run", halting, halting, {})
    with pytest.raises(ConfigError) as refused:
        export_hf(tmp_path / "run", tmp_path / "hf")
    for part in ("encoder.halting: ", "recurrence.halting: ", "`megarecur translate`"):
        assert part in str(refused.value)
    with pytest.raises(ConfigError, match=r"encoder\.kind=universal.*leave out --unrolled"):
        export_hf(tmp_path / "run", tmp_path / "hf", unrolled=True)
    assert not (tmp_path / "hf").exists()
