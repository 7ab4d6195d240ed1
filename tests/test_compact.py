"""Exports of runs that share blocks: every block once, or unrolled with adapters added in.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import DENSE, REUSE_MAP, TOKENS_BS, write_run
from torch import Tensor

from configs import TEXT, make_config
from data_prep.tokenizer import train_tokenizer
from megarecur.config.load import to_yaml
from megarecur.config.schema import ModelConfig
from megarecur.convert import compact
from megarecur.convert.hf import export_hf
from megarecur.convert.tokenizer import SAMPLES, write_hf_tokenizer
from megarecur.data.tokenizer import load_tokenizer
from megarecur.data.torchvision_stub import make_torchvision_importable
from megarecur.errors import ConfigError
from megarecur.inference.generate import generate, run_forward
from megarecur.model.context import build_context
from megarecur.parallel.mesh import Mesh
from megarecur.plan.schedule import Schedules
from megarecur.recurrence.schemes import layer_map
from megarecur.train.load import load_model, open_tokenizer
from megarecur.train.trainer import FINISHED, train

CYCLE = {"kind": "cycle", "num_blocks": 2, "depth": 5}
LOOP = {"kind": "loop", "prelude": 1, "core": 2, "coda": 1, "num_loops": 3}
REPEATED = {"kind": "block_recurrence", "num_blocks": 2, "num_loops": 3}
ADAPTERS = {"rank": 3, "scale": 0.7, "norms": True}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]] = {
    "cycle": (CYCLE, {"rank": 4, "targets": ["query", "down"]}, {"rope_interleaved": True}),
    "loop": (
        LOOP,
        {"rank": 3, "biases": True},
        {"attention_bias": "qkv", "feed_forward_bias": True},
    ),
    "reuse_map": (
        REUSE_MAP,
        ADAPTERS,
        {"norm_position": "peri", "qk_norm": True, "scale_embeddings": True}
        | {"attention_softcap": 2.0, "logit_softcap": 3.0, "attention_scale": 0.5}
        | {"sliding_window": 5, "attention_types": ["sliding", "full"], "rope_theta_local": 50.0}
        | {"feed_forward": "geglu_tanh", "rope_scaling_factor": 2.0},
    ),
    "loop, huginn": (
        LOOP | {"final_norm_after_core": True, "injection": "add"},
        None,
        {"norm_position": "sandwich", "attention_bias": "qk", "tie_embeddings": False},
    ),
    "loop, from the prelude": (
        LOOP | {"initial_state": "prelude", "injection": "none"},
        None,
        {"num_heads": 3, "num_kv_heads": 1, "sliding_window": 4},
    ),
    "embedding again": (
        REPEATED,
        {"rank": 20, "norms": True},
        {"positions": "learned", "norm": "layer", "feed_forward": "gelu", "max_positions": 80},
    ),
    "cycle_reverse, alibi": (
        {"kind": "cycle_reverse", "num_blocks": 2, "depth": 4},
        None,
        {"positions": "alibi", "norm_position": "post", "feed_forward": "gelu_tanh"}
        | {"num_heads": 6, "head_dim": 4},
    ),
    "custom, sinusoidal": (
        {"kind": "custom", "order": [1, 0, 1, 2, 0]},
        {"rank": 2, "norms": True},
        {"positions": "sinusoidal", "norm": "layer", "attention_bias": "all"}
        | {"feed_forward": "geglu", "tie_embeddings": False},
    ),
    "dense": (
        DENSE,
        None,
        {"parallel_residual": True, "positions": "none", "norm": "layer", "norm_eps": 1e-3},
    ),
    "sequence": (
        {"kind": "sequence", "num_blocks": 2, "depth": 4},
        {"rank": 5, "norms": True},
        {"rope_fraction": 0.7, "qk_norm": True, "rope_interleaved": True},
    ),
}
"""Recurrence, adapters, and our `model` section as `write_run` takes it."""
FAST = ("reuse_map", "embedding again")


@pytest.fixture(scope="module")
def hub_model() -> Any:
    """The modelling file, imported where it lies; transformers' import costs seconds."""
    make_torchvision_importable()
    pytest.importorskip("transformers")
    from megarecur.convert import hub_model

    return hub_model


def load_compact(hub_model: Any, folder: Path) -> Any:
    """The model of a folder; every tensor has its place."""
    model, faults = hub_model.MegarecurForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(faults.values()), faults
    return model.eval()


def logits_of(model: Any, tokens_BS: Tensor) -> Tensor:
    """Logits [B, S, V]."""
    with torch.no_grad():
        logits: Tensor = model(tokens_BS).logits
    return logits


@torch.no_grad()
def our_logits(run_dir: Path, tokens_BS: Tensor = TOKENS_BS) -> Tensor:
    """The same of a run, in one pass."""
    model, run = load_model(run_dir)
    positions_BS = torch.arange(tokens_BS.shape[1]).expand(tokens_BS.shape)
    ctx = build_context(run.config.model, positions_BS, model.dtype)
    x = run_forward(model, Mesh(), Schedules(run.config).forward(), tokens_BS, ctx)
    assert x is not None
    return model.all_logits(x)


def continue_prompt(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedily, with a cache."""
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
        use_cache=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return list(found[0, len(prompt) :].tolist())


# ---------------------------------------------------------------------------------------- compact


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_compact_export_computes_the_same(tmp_path: Path, hub_model: Any, name: str) -> None:
    """Any map, injection and option: logits, and tokens by a cache of an entry per layer."""
    recurrence, adapters, shape = CASES[name]
    config = write_run(tmp_path / "run", recurrence, adapters=adapters, **shape)
    out = export_hf(tmp_path / "run", tmp_path / "hf", unrolled=False)
    model = load_compact(hub_model, out)
    ours, _ = load_model(tmp_path / "run")
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in ours.parameters_by_name.items()
    }
    wanted = our_logits(tmp_path / "run")
    assert wanted.std() > 0.3
    torch.testing.assert_close(logits_of(model, TOKENS_BS), wanted, rtol=1e-5, atol=1e-5)

    prompt = [3, 1, 4, 1, 5]
    tokens = list(generate(ours, prompt, max_new_tokens=16, temperature=0.0))
    assert continue_prompt(model, prompt, 16) == tokens
    depth = len(layer_map(config.recurrence))
    cached = model(TOKENS_BS[:, :7], use_cache=True).past_key_values
    assert model.config.num_hidden_layers == len(cached) == depth
    # The rest of the text in one piece, after a cache that has several tokens already.
    with torch.no_grad():
        rest = model(TOKENS_BS[:, 7:], past_key_values=cached).logits
    torch.testing.assert_close(rest, wanted[:, 7:], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cycle", "reuse_map", "cycle_reverse, alibi"])
def test_padded_batches_and_losses(tmp_path: Path, hub_model: Any, name: str) -> None:
    """Texts of two lengths, padded on the left as generation wants it; labels, gradients, bf16."""
    recurrence, adapters, shape = CASES[name]
    write_run(tmp_path / "run", recurrence, adapters=adapters, **shape)
    model = load_compact(hub_model, export_hf(tmp_path / "run", tmp_path / "hf"))
    long, short = [3, 1, 4, 1, 5, 9, 2], [6, 5, 3]
    ids = torch.tensor([long, [0] * 4 + short])
    padding = torch.ones_like(ids)
    padding[1, :4] = 0
    found = model.generate(
        ids, attention_mask=padding, max_new_tokens=9, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    for row, prompt in zip(found, (long, short), strict=True):
        assert row[7:].tolist() == continue_prompt(model, prompt, 9)
    output = model(ids[:1], labels=ids[:1], output_hidden_states=True)
    wanted = torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(output.loss, wanted)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    model.save_pretrained(tmp_path / "again")
    again = load_compact(hub_model, tmp_path / "again")
    assert torch.equal(logits_of(again, TOKENS_BS), logits_of(model, TOKENS_BS))
    assert logits_of(model.to(torch.bfloat16), TOKENS_BS).isfinite().all()


def test_what_the_modelling_file_cannot_express_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it by key and value, in one message; nothing is written."""
    config = write_run(tmp_path / "run", LOOP | {"initial_state": "random"}, z_loss=0.1)
    known = {*compact.SHAPES, *compact.BLOCK, *compact.TRAINING, *compact.REFUSED}
    assert known == set(ModelConfig.model_fields), "say where a new option of the model belongs"
    without = tuple(key for key in compact.TRAINING if key != "z_loss")
    monkeypatch.setattr(compact, "TRAINING", without)
    with pytest.raises(ConfigError) as refused:
        export_hf(tmp_path / "run", tmp_path / "hf")
    assert "recurrence.initial_state='random'" in str(refused.value)
    assert "model.z_loss=0.1" in str(refused.value)
    assert not (tmp_path / "hf").exists()
    assert to_yaml(config) == (tmp_path / "run/config.yaml").read_text()


def test_depths_that_are_drawn_export_the_mean(tmp_path: Path, hub_model: Any) -> None:
    """As evaluation runs it; adapters of loops beyond it stay behind."""
    loops = {"sampler": "uniform", "min": 1, "max": 5}
    write_run(tmp_path / "run", REPEATED | {"num_loops": loops}, adapters=ADAPTERS)
    model = load_compact(hub_model, export_hf(tmp_path / "run", tmp_path / "hf"))
    assert model.config.num_hidden_layers == 6 and len(model.blocks[0].loops) == 3
    wanted = our_logits(tmp_path / "run")
    torch.testing.assert_close(logits_of(model, TOKENS_BS), wanted, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------- unrolled

NATIVE = {
    "llama": {},
    "qwen3": {"qk_norm": True, "rope_interleaved": True, "attention_bias": "qk"},
    "gpt_neox": {"norm": "layer", "feed_forward": "gelu_tanh", "parallel_residual": True}
    | {"num_kv_heads": 4, "rope_fraction": 0.7, "attention_bias": "qkv"}
    | {"tie_embeddings": False, "rope_interleaved": True},
    "gemma2": {"scale_embeddings": True, "feed_forward": "geglu", "norm_position": "peri"}
    | {"attention_softcap": 2.0, "logit_softcap": 3.0, "attention_scale": 0.5}
    | {"sliding_window": 5, "attention_types": ["sliding", "full"]},
}
"""Our `model` section by the model_type that it is exported to."""


@pytest.mark.parametrize("norms", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "kind", [k if k in ("llama", "qwen3") else pytest.param(k, marks=pytest.mark.slow)
             for k in NATIVE],
)  # fmt: skip
def test_unrolled_export_adds_adapters_in(
    tmp_path: Path, hub_model: Any, kind: str, norms: bool
) -> None:
    """Every layer is the block with the deltas and norms of its loop."""
    import transformers

    adapters = {"rank": 3, "scale": 0.7, "norms": norms, "biases": True}
    write_run(tmp_path / "run", CYCLE, adapters=adapters, **NATIVE[kind])
    out = export_hf(tmp_path / "run", tmp_path / "hf", unrolled=True)
    assert json.loads((out / "config.json").read_text())["model_type"] == kind
    model = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    wanted = our_logits(tmp_path / "run")
    torch.testing.assert_close(logits_of(model.eval(), TOKENS_BS), wanted, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------- trained models

TRAINED: dict[str, dict[str, Any]] = {
    "cycle": {"recurrence": CYCLE, "adapters": ADAPTERS},
    "reuse_map": {"recurrence": REUSE_MAP},
    "loop": {"recurrence": LOOP, "adapters": {"rank": 3}},
}


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Run folders by name, after a few steps, far enough from the start."""
    folder = tmp_path_factory.mktemp("trained")

    @cache
    def run_of(name: str) -> Path:
        config = make_config(
            corpus,
            run_dir=str(folder / name),
            train={"steps": 3, "global_batch_size": 4, "micro_batch_size": 4},
            optimizer={"lr": 5e-3},
            **TRAINED[name],
        )
        assert train(config) == FINISHED
        model, _ = load_model(folder / name)
        moved = [p.abs().max() for n, p in model.parameters_by_name.items() if "lora_b" in n]
        assert all(top > 1e-3 for top in moved) and bool(moved) == ("adapters" in TRAINED[name])
        return folder / name

    return run_of


@pytest.mark.parametrize("name", TRAINED)
def test_trained_runs(
    trained: Callable[[str], Path], tmp_path: Path, hub_model: Any, name: str
) -> None:
    """Both exports give our logits within 1e-5, and our tokens."""
    import transformers

    run_dir = trained(name)
    ours, run = load_model(run_dir)
    tokenizer = open_tokenizer(run)
    prompt = tokenizer.encode("str: ")
    tokens_BS = torch.tensor([tokenizer.encode(TEXT[:30])])
    wanted = our_logits(run_dir, tokens_BS)
    tokens = list(generate(ours, prompt, max_new_tokens=12, temperature=0.0))
    model = load_compact(hub_model, export_hf(run_dir, tmp_path / "compact"))
    assert (logits_of(model, tokens_BS) - wanted).abs().max() < 1e-5
    assert continue_prompt(model, prompt, 12) == tokens
    if name == "loop":
        with pytest.raises(ConfigError, match="only injection='none' can be unrolled, --compact"):
            export_hf(run_dir, tmp_path / "layers", unrolled=True)
        return
    out = export_hf(run_dir, tmp_path / "layers", unrolled=True)
    layers = transformers.LlamaForCausalLM.from_pretrained(out).eval()
    assert (logits_of(layers, tokens_BS) - wanted).abs().max() < 1e-5
    assert continue_prompt(layers, prompt, 12) == tokens
    # It would be noticed if a loop's deltas were left out.
    if "adapters" in TRAINED[name]:
        tensors = load_file(tmp_path / "compact/model.safetensors")
        tensors["blocks.0.loops.2.value.lora_b"].zero_()
        save_file(tensors, tmp_path / "compact/model.safetensors", {"format": "pt"})
        broken = load_compact(hub_model, tmp_path / "compact")
        assert (logits_of(broken, tokens_BS) - wanted).abs().max() > 1e-4


def test_auto_tokenizer_gives_our_ids(tmp_path: Path, hub_model: Any) -> None:
    """Of a sentencepiece model trained here, of bytes, and of a tokenizer.json that has no
    description; both exports carry it."""
    import transformers

    source = tmp_path / "text.txt"
    source.write_text(TEXT)
    train_tokenizer([source], tmp_path / "tokenizer.model", vocab_size=400)
    write_run(tmp_path / "run", CYCLE, vocab_size=400)
    plain = (tmp_path / "run/config.yaml").read_text()
    lone = tmp_path / "lone"
    lone.mkdir()
    write_hf_tokenizer(str(tmp_path / "tokenizer.model"), lone)
    (lone / "tokenizer_config.json").unlink()
    for name in ("bytes", str(tmp_path / "tokenizer.model"), str(lone / "tokenizer.json")):
        text = plain.replace("tokenizer: bytes", f"tokenizer: {name}")
        (tmp_path / "run/config.yaml").write_text(text)
        ours = load_tokenizer(name)
        for unrolled in (False, True):
            out = tmp_path / f"{Path(name).name}-{unrolled}"
            export_hf(tmp_path / "run", out, unrolled=unrolled)
            theirs = transformers.AutoTokenizer.from_pretrained(out)
            assert len(theirs) == ours.vocab_size
            assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
            values = json.loads((out / "config.json").read_text())
            assert values["eos_token_id"] == ours.eos_id
            for sample in (*SAMPLES, TEXT[:2000]):
                ids = ours.encode(sample)
                assert theirs(sample)["input_ids"] == ids
                assert theirs.decode(ids) == ours.decode(ids)
            assert theirs.decode([ours.eos_id], skip_special_tokens=True) == ""


ALONE = """
import json, sys
# Neither the code that trained the model nor a library that may be broken is there.
sys.modules["megarecur"] = sys.modules["torchvision"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
answers = []
for folder, text in json.loads(sys.argv[1]):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, faults = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(faults.values()), faults
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].tolist()
    found = model.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=None)
    answers.append([inputs.input_ids[0].tolist(), found[0].tolist(), logits])
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_a_fresh_process_needs_transformers_and_torch_only(
    trained: Callable[[str], Path], tmp_path: Path
) -> None:
    """Ids, logits and tokens by the Auto classes, offline, without this package."""
    text, folders, wanted = "str.upper: café \n\t</s>", [], []
    for name in TRAINED:
        run_dir = trained(name)
        ours, run = load_model(run_dir)
        ids = open_tokenizer(run).encode(text)
        tokens = list(generate(ours, ids, max_new_tokens=16, temperature=0.0))
        logits = our_logits(run_dir, torch.tensor([ids]))[0, -1]
        for unrolled in (False,) if name == "loop" else (False, True):
            out = export_hf(run_dir, tmp_path / f"{name}-{unrolled}", unrolled=unrolled)
            folders.append([str(out), text])
            wanted.append((ids, ids + tokens, logits))
    # -I: neither PYTHONPATH nor the folder it is started from.
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, json.dumps(folders)],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    for (ids, tokens, logits), answer in zip(wanted, answers, strict=True):
        assert answer[0] == ids and answer[1] == tokens
        assert (torch.tensor(answer[2]) - logits).abs().max() < 1e-5
