"""Exports of runs that share blocks: every block once, or unrolled with adapters added in.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.configs import TEXT, make_config
from support.exports import (
    ADAPTERS,
    CASES,
    CYCLE,
    LOOP,
    REPEATED,
    REUSE_MAP,
    TOKENS_BS,
    our_logits,
    write_run,
)
from torch import Tensor

from megarecur.checkpoint.load import load_model, open_tokenizer
from megarecur.config.load import to_yaml
from megarecur.config.model import ModelConfig
from megarecur.convert import compact
from megarecur.convert.hf import export_hf
from megarecur.convert.tokenizer import SAMPLES, write_hf_tokenizer
from megarecur.data.tokenizer import load_tokenizer
from megarecur.data_prep.tokenizer import train_tokenizer
from megarecur.errors import ConfigError
from megarecur.inference.generate import generate
from megarecur.recurrence.schemes import layer_map
from megarecur.train.trainer import FINISHED, train

FAST = ("reuse_map", "embedding again", "loop, random", "ring, pre")


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
    wanted = our_logits(tmp_path / "run", seed=config.seed)
    assert wanted.std() > 0.3
    samples_B = torch.arange(len(TOKENS_BS))
    with torch.no_grad():
        found = model(TOKENS_BS, sample_ids=samples_B).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)

    prompt = [3, 1, 4, 1, 5]
    tokens = list(generate(ours, prompt, max_new_tokens=16, temperature=0.0, seed=config.seed))
    assert continue_prompt(model, prompt, 16) == tokens
    depth = len(layer_map(config.recurrence))
    cached = model(TOKENS_BS[:, :7], use_cache=True, sample_ids=samples_B).past_key_values
    assert model.config.num_hidden_layers == len(cached) == depth
    # The rest of the text in one piece, after a cache that has several tokens already.
    with torch.no_grad():
        rest = model(TOKENS_BS[:, 7:], past_key_values=cached, sample_ids=samples_B).logits
    torch.testing.assert_close(rest, wanted[:, 7:], rtol=1e-5, atol=1e-5)


def test_static_caches_of_other_numbers_of_loops(tmp_path: Path, hub_model: Any) -> None:
    """A static cache is kept from call to call, and has an entry per layer."""
    recurrence, adapters, shape = CASES["loop, random"]
    write_run(tmp_path / "run", recurrence, adapters=adapters, **shape)
    model = load_compact(hub_model, export_hf(tmp_path / "run", tmp_path / "hf", unrolled=False))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    static = {"cache_implementation": "static", "disable_compile": True}
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    for loops in (1, 5, 2):
        wanted = model.generate(ids, use_cache=False, num_loops=loops, **options)
        assert torch.equal(model.generate(ids, num_loops=loops, **static, **options), wanted)


@pytest.mark.parametrize("name", ["one wide, gate", "reuse_map", "embedding again", "ring, post"])
def test_weights_of_offloaded_exports(tmp_path: Path, hub_model: Any, name: str) -> None:
    """As accelerate's: hooks hold weights back but for a module's own call, and move all arguments
    of it, modules and values of dicts too."""
    recurrence, adapters, shape = CASES[name]
    config = write_run(tmp_path / "run", recurrence, adapters=adapters, **shape)
    model = load_compact(hub_model, export_hf(tmp_path / "run", tmp_path / "hf", unrolled=False))
    wanted = our_logits(tmp_path / "run", seed=config.seed)
    for module in model.modules():
        if next(module.parameters(), None) is not None:
            offload(module)
    assert all(p.is_meta for p in model.parameters())
    with torch.no_grad():
        found = model(TOKENS_BS, sample_ids=torch.arange(len(TOKENS_BS))).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


class OffloadHook:
    """The interface of accelerate's hooks, which is not in this environment."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.weights = dict(module.named_parameters(recurse=False))
        self.post_forward(module, None)

    def pre_forward(self, module: torch.nn.Module, *arguments: Any) -> Any:
        for name, weight in self.weights.items():
            module._parameters[name] = weight
        return tuple(map(move, arguments))

    def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
        for name, weight in self.weights.items():
            module._parameters[name] = torch.nn.Parameter(weight.to("meta"))
        return output


def offload(module: torch.nn.Module) -> None:
    """Hold a module's own weights back but for its calls."""
    hook, forward = OffloadHook(module), module.forward

    def hooked(*arguments: Any, **keywords: Any) -> Any:
        output = forward(*hook.pre_forward(module, *arguments), **keywords)
        return hook.post_forward(module, output)

    module._hf_hook, module.forward = hook, hooked  # type: ignore[assignment]


def move(value: Any) -> Any:
    """Move an argument as accelerate does; a module whose weights are held back cannot be moved."""
    if hasattr(value, "to"):
        return value.to("cpu")
    if isinstance(value, Mapping):
        return {k: move(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return type(value)(*map(move, value)) if hasattr(value, "_fields") else tuple(
            map(move, value))  # fmt: skip
    return value


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
    config = write_run(tmp_path / "run", LOOP, z_loss=0.1)
    known = {*compact.SHAPES, *compact.BLOCK, *compact.TRAINING}
    assert known == set(ModelConfig.model_fields), "say where a new option of the model belongs"
    without = tuple(key for key in compact.TRAINING if key != "z_loss")
    monkeypatch.setattr(compact, "TRAINING", without)
    with pytest.raises(ConfigError) as refused:
        export_hf(tmp_path / "run", tmp_path / "hf")
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
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].tolist()
    found = model.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=None)
    answers.append([inputs.input_ids[0].tolist(), found[0].tolist(), logits])
print(json.dumps(answers))
"""


README = """
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("out", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
found = model.generate(**tokenizer("def main(", return_tensors="pt"), max_new_tokens=5)
print(found.shape[1])
"""


@pytest.mark.slow
def test_plain_python_loads_an_export_as_the_readme_says(tmp_path: Path) -> None:
    """In an environment of `make setup`, with any build of torch."""
    if not any("megarecur.launch" in e.value for e in entry_points(group="torch.backends")):
        pytest.skip("this environment is older than its pyproject.toml; `make setup` renews it")
    write_run(tmp_path / "run", CYCLE, vocab_size=257)
    export_hf(tmp_path / "run", tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-I", "-c", README],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > len("def main(")


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
        | {
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # Nor is this package's entry point there.
        },
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    for (ids, tokens, logits), answer in zip(wanted, answers, strict=True):
        assert answer[0] == ids and answer[1] == tokens
        assert (torch.tensor(answer[2]) - logits).abs().max() < 1e-5
