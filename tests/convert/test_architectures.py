"""Architectures beside Llama against transformers: converted, continued, exported, unrolled."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.architectures import COMMON, SOURCES, packed_logits, save_source
from support.exports import TOKENS_BS, assert_same_tensors, run_logits, tensors_of, write_run

from megarecur.checkpoint.load import load_model
from megarecur.config.model import ModelConfig
from megarecur.convert.hf import convert_hf, export_hf
from megarecur.convert.llama import LLAMA
from megarecur.convert.source import ARCHITECTURES, SourceModel
from megarecur.errors import ConfigError, DataError
from megarecur.inference.generate import generate

CASES = [pytest.param(n, marks=pytest.mark.slow) if "," in n else n for n in SOURCES]

RECURSIVE: dict[str, dict[str, Any]] = {
    "qwen2": {"attention_bias": "qkv", "tie_embeddings": False},
    "qwen3": {"qk_norm": True, "rope_interleaved": True, "attention_bias": "qk"},
    "gpt_neox": {"norm": "layer", "feed_forward": "gelu_tanh", "parallel_residual": True}
    | {"num_kv_heads": 4, "rope_fraction": 0.7, "attention_bias": "qkv"}
    | {"tie_embeddings": False, "rope_interleaved": True},
    "gemma": {"scale_embeddings": True, "feed_forward": "geglu_tanh"},
    "gemma2": {"scale_embeddings": True, "feed_forward": "geglu", "norm_position": "peri"}
    | {"attention_softcap": 2.0, "logit_softcap": 3.0, "attention_scale": 0.5}
    | {"sliding_window": 5, "attention_types": ["sliding", "full"]},
    "gemma3_text": {"scale_embeddings": True, "feed_forward": "geglu_tanh", "qk_norm": True}
    | {"norm_position": "peri", "sliding_window": 5, "attention_types": ["full", "sliding"]}
    | {"rope_theta_local": 50.0, "rope_interleaved": True, "attention_bias": "all"},
    "mistral": {"sliding_window": 5, "rope_interleaved": True}
    | {"rope_scaling": {"kind": "llama3", "factor": 8.0, "original_positions": 16}},
    "olmo2": {"norm_position": "output", "qk_norm": True, "qk_norm_over": "all"}
    | {"rope_interleaved": True, "attention_bias": "qkv"}
    | {"rope_scaling": {"kind": "dynamic", "factor": 4.0, "original_positions": 16}},
    "olmo3": {"norm_position": "output", "qk_norm": True, "qk_norm_over": "all"}
    | {"sliding_window": 5, "attention_types": ["sliding", "full"]},
    "phi3": {"rope_fraction": 0.7, "tie_embeddings": False},
}
"""Our `model` section, as `write_run` takes it, by the model_type that it is exported to."""

CYCLE = {"kind": "cycle", "num_blocks": 2, "depth": 5}


LENGTHS = (1, 7, 24)


@pytest.mark.parametrize("name", CASES)
def test_converted_model_computes_and_continues_the_same(
    tmp_path: Path, transformers: Any, name: str
) -> None:
    """Logits at documents of several lengths, and what it says greedily with a cache."""
    source = save_source(transformers, tmp_path / "hf", name)
    convert_hf(tmp_path / "hf", tmp_path / "run")
    model, _ = load_model(tmp_path / "run")
    documents = [torch.arange(length) * 11 % 97 for length in LENGTHS]
    with torch.no_grad():
        wanted = torch.cat([source(d[None]).logits[0] for d in documents])
        torch.testing.assert_close(packed_logits(model, documents), wanted, rtol=0.0, atol=1e-4)
        assert wanted.abs().max() > 1.0
        prompt = [5, 3, 90, 17]
        said = list(generate(model, prompt, max_new_tokens=20, temperature=0.0))
        text = list(prompt)
        for _ in range(20):
            text.append(int(source(torch.tensor([text])).logits[0, -1].argmax()))
    assert said == text[len(prompt) :]
    again = generate(model, prompt, max_new_tokens=20, temperature=0.0, use_cache=False)
    assert list(again) == said


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
def test_export_gives_every_tensor_and_key_back(
    tmp_path: Path, transformers: Any, name: str, dtype: torch.dtype
) -> None:
    """Byte by byte, in the dtype they were stored in."""
    save_source(transformers, tmp_path / "hf", name, dtype)
    convert_hf(tmp_path / "hf", tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", tmp_path / "hf")
    config = transformers.AutoConfig.from_pretrained
    before, after = (config(tmp_path / which).to_dict() for which in ("hf", "back"))
    unread = ("rope_interleaved", "is_llama_config")
    for key in ("transformers_version", "_name_or_path", "classifier_dropout", *unread):
        before.pop(key, None), after.pop(key, None)
    assert {k: after.get(k) for k in before if before[k] is not None} == {
        k: v for k, v in before.items() if v is not None
    }


@pytest.mark.slow
def test_gains_of_a_gemma_in_fp32(tmp_path: Path, transformers: Any) -> None:
    """transformers rounds 1 + weight alike; exported, gains lack what was rounded off."""
    source = save_source(transformers, tmp_path / "hf", "gemma")
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if "norm" in name:
                parameter.add_(1e-3 * torch.randn(parameter.shape))
        wanted = source(TOKENS_BS).logits
    source.save_pretrained(tmp_path / "fine")
    convert_hf(tmp_path / "fine", tmp_path / "run")
    torch.testing.assert_close(run_logits(tmp_path / "run"), wanted, rtol=0.0, atol=1e-4)
    export_hf(tmp_path / "run", tmp_path / "back")
    before, after = tensors_of(tmp_path / "fine"), tensors_of(tmp_path / "back")
    for name, tensor in before.items():
        atol = 2**-23 if "norm" in name else 0.0
        torch.testing.assert_close(after[name], tensor, rtol=0.0, atol=atol)


@pytest.mark.parametrize("kind", RECURSIVE)
def test_unrolled_export_of_a_recursive_run(tmp_path: Path, transformers: Any, kind: str) -> None:
    """Loads in transformers without code of ours, and computes what the shared blocks do."""
    shape = {"num_kv_heads": 2, "head_dim": 6} | RECURSIVE[kind]
    write_run(tmp_path / "run", CYCLE, **shape)
    out = export_hf(tmp_path / "run", tmp_path / "hf", unrolled=True)
    assert json.loads((out / "config.json").read_text())["model_type"] == kind
    loaded, faults = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, attn_implementation="eager"
    )
    assert not faults["missing_keys"] and not faults["unexpected_keys"]
    assert loaded.config.num_hidden_layers == 5
    with torch.no_grad():
        wanted, found = run_logits(tmp_path / "run"), loaded.eval()(TOKENS_BS).logits
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-5)


def test_every_architecture_is_tested() -> None:
    """The lists above name all that are known but Llama, which has tests of its own."""
    assert {name.split(",")[0] for name in SOURCES} == ARCHITECTURES.keys()
    assert RECURSIVE.keys() == ARCHITECTURES.keys() - {"llama"}


def test_source_reads_a_layer_at_a_time(tmp_path: Path, transformers: Any) -> None:
    """Layers and the rest make the whole model, in fp32, under our names."""
    save_source(transformers, tmp_path / "hf", "qwen2", torch.bfloat16)
    source = SourceModel(tmp_path / "hf")
    assert (source.num_layers, source.dtype) == (3, "bfloat16")
    layer = dict(source.layer(1))
    assert all(name.startswith("blocks.1.") for name in layer)
    assert {t.dtype for t in layer.values()} == {torch.float32}
    stored = tensors_of(tmp_path / "hf")
    wanted = stored["model.layers.1.self_attn.q_proj.bias"].float()
    assert torch.equal(layer["blocks.1.attention.query.bias"], wanted)
    assert set(dict(source.outside())) == {"embedding.weight", "final_norm.weight", "head.weight"}


# ------------------------------------------------------------------------------------- refusals


def small(folder: Path, **changes: Any) -> Path:
    """A config.json alone."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(COMMON | changes))
    return folder


GEMMA = {"num_key_value_heads": 1, "head_dim": 10}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mamba"},
            "model_type='mamba' is not supported.*" + ".*".join(ARCHITECTURES),
        ),
        ({}, "model_type=None is not supported"),
        (
            {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3},
            "layer_types has sliding_attention, but use_sliding_window",
        ),
        (
            {"model_type": "qwen3", "rope_scaling": {"rope_type": "longrope"}},
            "rope_scaling: rope_type='longrope' is not supported; only default, linear, dynamic",
        ),
        ({"model_type": "llama", "rope_theta": -1}, "rope_theta=-1: must be a number above 0"),
        ({"model_type": "llama", "rope_theta": "big"}, "rope_theta='big': must be a number"),
        (
            {"model_type": "llama", "rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            r"rope_theta=10000.0 and rope_parameters.rope_theta=500000.0 disagree.*delete",
        ),
        (
            {"model_type": "gpt_neox", "rotary_emb_base": 1e4, "rope_theta": 5e5},
            r"rotary_emb_base=10000.0 and rope_theta=500000.0 disagree",
        ),
        (
            {"model_type": "gpt_neox", "rotary_pct": 0.5}
            | {"rope_parameters": {"partial_rotary_factor": 0.25}},
            r"rotary_pct=0.5 and rope_parameters.partial_rotary_factor=0.25 disagree",
        ),
        (
            {"model_type": "gemma3_text", **GEMMA, "rope_local_base_freq": 1e4}
            | {"rope_parameters": {"sliding_attention": {"rope_theta": 2e4}}},
            r"rope_local_base_freq=10000.0 and rope_parameters.rope_theta=20000.0 disagree",
        ),
        (
            {"model_type": "mistral", "rope_scaling": {"type": "linear", "factor": 2.0}}
            | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            r"rope_scaling.rope_type='linear' and rope_parameters.rope_type='yarn' disagree",
        ),
        (
            {"model_type": "qwen2", "rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope_parameters: a rotation per type of layer is not supported",
        ),
        (
            {"model_type": "llama", "rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 is not supported; only 1.0 converts",
        ),
        (
            {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8}},
            "rope_scaling.low_freq_factor: required, but missing\n"
            "  rope_scaling.high_freq_factor: required",
        ),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0]}},
            "rope_scaling: rope_type='su' is not supported; only plain rotary positions",
        ),
        (
            {"model_type": "phi3", "rope_parameters": {"rope_type": "longrope"}},
            "rope_parameters: rope_type='longrope' is not supported",
        ),
        ({"model_type": "olmo3"}, "rope_theta: required, as versions of transformers differ"),
        (
            {"model_type": "mistral", "layer_types": ["full_attention"] * 3},
            "layer_types=.* is not supported; only a model with layer_types=null",
        ),
        ({"model_type": "gpt_neox", "hidden_act": "relu"}, "hidden_act='relu'.*'gelu' converts"),
        ({"model_type": "gpt_neox", "hidden_act": ["gelu"]}, r"hidden_act=\['gelu'\] is not"),
        ({"model_type": "gpt_neox", "rotary_pct": 0.1}, "rotates 1 dims"),
        (
            {"model_type": "gemma"},
            "num_key_value_heads: required, but missing; .*\n  head_dim: requ",
        ),
        ({"model_type": "gemma", **GEMMA, "hidden_act": "gelu"}, "name the one meant as hidden_ac"),
        ({"model_type": "gemma2", **GEMMA, "hidden_activation": "silu"}, "'silu' is not supported"),
        ({"model_type": "gemma2", **GEMMA, "layer_types": ["full_attention"]}, "with 3 of sliding"),
        ({"model_type": "gemma2", **GEMMA, "layer_types": 3}, "layer_types=3 is not supported"),
        ({"model_type": "gemma2", **GEMMA, "query_pre_attn_scalar": 0}, "must be above 0"),
        (
            {"model_type": "gemma2", **GEMMA, "rope_scaling": {"rope_type": "llama3"}},
            "rope_type='llama3' is not supported; only plain rotary positions convert",
        ),
        (
            {"model_type": "gemma3_text", **GEMMA, "use_bidirectional_attention": True},
            "use_bidirectional_attention=True is not supported; only .*=False",
        ),
        (
            {"model_type": "gemma3_text", **GEMMA, "num_hidden_layers": "3"},
            "must be a whole number",
        ),
        ({"model_type": "gemma3_text", **GEMMA, "num_hidden_layers": 0}, "must be a whole number"),
        (
            {"model_type": "gemma3_text", **GEMMA, "rope_parameters": {"rope_theta": 300.0}},
            "reads nothing of it here without full_attention and sliding_attention",
        ),
        (
            {"model_type": "olmo3", "rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
            "give a rotation for each of them",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """By key and value, before weights are looked for."""
    with pytest.raises(ConfigError, match=message):
        SourceModel(small(tmp_path / "hf", **changes))


ROPE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama3 as transformers 5 writes it": (
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
         | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
         | {"original_max_position_embeddings": 16}},
        {"rope_theta": 5e5, "rope_scaling_factor": 1.0}
        | {"rope_scaling": {"kind": "llama3", "factor": 8.0, "original_positions": 16}},
    ),
    "the same base twice": (
        {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 500000, "rope_type": "default"}},
        {"rope_theta": 5e5},
    ),
    "an old name of the kind": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling_factor": 2.0, "rope_theta": 1e4},
    ),
    "the newer name goes before": (
        {"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3]}},
        {"rope_scaling_factor": 1.0, "rope_scaling": None},
    ),
    "null": ({"rope_scaling": None, "rope_parameters": None, "rope_theta": None}, {}),
    "yarn's factor from lengths": (
        {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 16}},
        {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_positions": 16}},
    ),
    "yarn's factor of cos and sin": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 2.0,
                          "mscale_all_dim": 1.0}},
        {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_positions": 64}
         | {"attention_factor": (1 + 0.2 * math.log(4)) / (1 + 0.1 * math.log(4))}},
    ),
    "dynamic counts from max_position_embeddings": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}
         | {"original_max_position_embeddings": 16}},
        {"rope_scaling": {"kind": "dynamic", "factor": 4.0, "original_positions": 64}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROPE)
def test_rotary_positions_are_read_wherever_they_are_written(name: str) -> None:
    """In the forms of transformers 4 and 5."""
    changes, wanted = ROPE[name]
    problems: list[str] = []
    found = LLAMA.read_config(COMMON | changes, problems)
    assert not problems
    model = ModelConfig.model_validate(found)
    other = ModelConfig.model_validate(LLAMA.read_config(COMMON, problems) | wanted)
    assert model == other


def test_layers_with_a_window_rotate_by_themselves() -> None:
    """Gemma 3 and OLMo 3 as transformers 5 writes them."""
    parameters = {
        "full_attention": {"rope_theta": 3e5, "rope_type": "yarn", "factor": 4.0},
        "sliding_attention": {"rope_theta": 2e4, "rope_type": "default"},
    }
    for kind in ("gemma3_text", "olmo3"):
        problems: list[str] = []
        values = COMMON | GEMMA | {"rope_parameters": parameters, "num_hidden_layers": 7}
        model = ARCHITECTURES[kind].read_config(values, problems)
        assert not problems
        assert (model["rope_theta"], model["rope_theta_local"]) == (3e5, 2e4)
        assert model["rope_scaling"]["kind"] == "yarn"


def test_a_pattern_that_transformers_does_not_read(transformers: Any) -> None:
    """Gemma 3 has two keys for it, of which one is of no effect."""
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        values = COMMON | GEMMA | {"num_hidden_layers": 7, key: 2}
        problems: list[str] = []
        model = ARCHITECTURES["gemma3_text"].read_config(values, problems)
        types = model["attention_types"]
        wanted = transformers.Gemma3TextConfig(**values).layer_types
        assert [f"{types[i % len(types)]}_attention" for i in range(7)] == wanted, key
        assert not problems


def test_tensors_that_do_not_fit_are_listed_together(tmp_path: Path, transformers: Any) -> None:
    """Missing, superfluous, and of other shapes, fused ones among them."""
    save_source(transformers, tmp_path / "hf", "gpt_neox")
    tensors = tensors_of(tmp_path / "hf")
    layer = "gpt_neox.layers.1.attention"
    tensors[f"{layer}.query_key_value.bias"] = torch.ones(119)
    tensors[f"{layer}.masked_bias"] = torch.ones(())  # Harmless: old folders have it.
    tensors["extra"] = tensors.pop(f"{layer}.dense.bias")
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(DataError, match=r"3 tensor\(s\) do not fit") as caught:
        convert_hf(tmp_path / "hf", tmp_path / "run")
    for line in (
        f"{layer}.dense.bias: missing",
        "extra: not part of a GPTNeoX of this config",
        f"{layer}.query_key_value.bias: shape [119], config.json: [120]",
    ):
        assert line in str(caught.value)
    assert not (tmp_path / "run").exists()


class Hostile:
    def __reduce__(self) -> Any:
        return print, ("run",)


@pytest.mark.parametrize("sharded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_pickles_are_read_when_asked_for(
    tmp_path: Path, transformers: Any, sharded: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same run as of safetensors; code in a pickle is not run."""
    save_source(transformers, tmp_path / "hf", "gpt_neox")
    convert_hf(tmp_path / "hf", tmp_path / "run")
    tensors = tensors_of(tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").unlink()
    names = ["pytorch_model-1.bin", "pytorch_model-2.bin"] if sharded else ["pytorch_model.bin"]
    for i, name in enumerate(names):
        part = {k: t for j, (k, t) in enumerate(tensors.items()) if j % len(names) == i}
        # The second in the old format, which cannot be mapped.
        torch.save(part, tmp_path / "hf" / name, _use_new_zipfile_serialization=i == 0)
    if sharded:
        table = {k: names[j % 2] for j, k in enumerate(tensors)}
        index = tmp_path / "hf/pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": table}))
    with pytest.raises(ConfigError, match=r"is a pickle.*--allow-pickles"):
        convert_hf(tmp_path / "hf", tmp_path / "again")
    convert_hf(tmp_path / "hf", tmp_path / "again", allow_pickles=True)
    assert torch.equal(run_logits(tmp_path / "again"), run_logits(tmp_path / "run"))
    for content, message in (({"a": Hostile()}, "cannot be read"), ([1], "does not map names")):
        torch.save(content, tmp_path / "hf" / names[0])
        with pytest.raises(DataError, match=rf"{names[0]}: .*{message}"):
            convert_hf(tmp_path / "hf", tmp_path / "worse", allow_pickles=True)
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"norm": "layer", "feed_forward": "gelu"},
            "the nearest is GPTNeoX:\n  model.num_kv_heads",
        ),
        ({"qk_norm": True, "logit_softcap": 9.0}, "is Qwen3:\n  model.logit_softcap=9.0"),
        (
            {**RECURSIVE["gemma3_text"], "rope_theta_local": None, "rope_scaling_factor": 2.0},
            "is Gemma3:\n  model.rope_scaling_factor=2.0",
        ),
    ],
)
def test_what_no_architecture_can_express_is_refused(
    tmp_path: Path, model: dict[str, Any], message: str
) -> None:
    """By what keeps the nearest one from it; nothing is written."""
    write_run(tmp_path / "run", CYCLE, **model)
    with pytest.raises(ConfigError, match=message):
        export_hf(tmp_path / "run", tmp_path / "hf", unrolled=True)
    assert not (tmp_path / "hf").exists()
