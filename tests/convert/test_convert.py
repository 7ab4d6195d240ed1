"""Run folders and Hugging Face Llama folders, each made of the other; and loading what a run holds.

Shapes: B samples, S positions.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from support.configs import TEXT
from support.exports import (
    DENSE,
    REUSE_MAP,
    TOKENS_BS,
    all_logits,
    assert_same_tensors,
    contents,
    run_logits,
    tensors_of,
    write_run,
)
from torch import Tensor

from megarecur.checkpoint.load import load_model, open_run_folder, open_tokenizer, special_ids
from megarecur.config.load import load_config
from megarecur.convert import hf
from megarecur.convert.hf import convert_hf, export_hf
from megarecur.data.open import with_vocab_size
from megarecur.data.tokenizer import load_tokenizer
from megarecur.errors import CheckpointError, ConfigError, DataError
from megarecur.inference.generate import generate
from megarecur.launch.cli import main
from megarecur.recurrence.schemes import layer_map

LLAMAS: dict[str, dict[str, Any]] = {
    "grouped": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10},
    "tied, odd heads, biases": {
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 14,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-3,
        "rope_theta": 500.0,
    },
}


def save_llama(transformers: Any, folder: Path, shape: dict[str, Any], **options: Any) -> Any:
    """A random Llama, every tensor random, saved as transformers saves it."""
    values: dict[str, Any] = {"vocab_size": 97, "hidden_size": 40, "intermediate_size": 56}
    values |= {"num_hidden_layers": 3, "max_position_embeddings": 64, "rope_theta": 10000.0}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values | shape)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))
    llama.save_pretrained(folder, safe_serialization=True, **options)
    return llama


def write_llama(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """The same kind of folder by hand: one layer, no transformers needed."""
    values: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    values |= {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "hidden_act": "silu"}
    values |= {"num_attention_heads": 2, "num_hidden_layers": 1, "bos_token_id": 1}
    values |= {"eos_token_id": [2, 3], "tie_word_embeddings": False}
    values |= changes
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (11, 8)}
    for name, shape in {
        "input_layernorm": (8,),
        "post_attention_layernorm": (8,),
        **{f"self_attn.{x}_proj": (8, 8) for x in "qkvo"},
        "mlp.gate_proj": (12, 8),
        "mlp.up_proj": (12, 8),
        "mlp.down_proj": (8, 12),
    }.items():
        shapes[f"model.layers.0.{name}.weight"] = shape
    shapes |= {"model.norm.weight": (8,), "lm_head.weight": (11, 8)}
    generator = torch.Generator().manual_seed(1)
    tensors = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))
    return folder


# ------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("shape", LLAMAS.values(), ids=list(LLAMAS))
def test_llama_and_back(
    tmp_path: Path, transformers: Any, shape: dict[str, Any], sharded: bool
) -> None:
    """Logits as transformers computes them; exported, every byte and every key as before."""
    options = {"max_shard_size": "20KB"} if sharded else {}
    llama = save_llama(transformers, tmp_path / "hf", shape, **options)
    assert (tmp_path / "hf/model.safetensors.index.json").exists() == sharded
    path = convert_hf(tmp_path / "hf", tmp_path / "run")
    assert path == tmp_path / "run/checkpoints/step-00000000"
    with torch.no_grad():
        wanted = llama(TOKENS_BS).logits
    logits = run_logits(tmp_path / "run")
    assert wanted.abs().max() > 1.0
    torch.testing.assert_close(logits, wanted, rtol=0.0, atol=1e-4)

    export_hf(tmp_path / "run", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", tmp_path / "hf")
    before = json.loads((tmp_path / "hf/config.json").read_text())
    after = json.loads((tmp_path / "back/config.json").read_text())
    ignored = {"transformers_version", "pretraining_tp", "dtype"}
    assert {k: after.get(k) for k in before.keys() - ignored} == {
        k: v for k, v in before.items() if k not in ignored
    }
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        assert torch.equal(again(TOKENS_BS).logits, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_dtype_survives(tmp_path: Path, dtype: torch.dtype) -> None:
    """Half precision is exact in fp32 and written back as it was; another dtype on request."""
    write_llama(tmp_path / "hf", dtype)
    convert_hf(tmp_path / "hf", tmp_path / "run")
    config = load_config(tmp_path / "run/config.yaml")
    assert config.train.precision == ("bf16" if dtype == torch.bfloat16 else "fp32")
    export_hf(tmp_path / "run", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", tmp_path / "hf")
    values = json.loads((tmp_path / "back/config.json").read_text())
    assert values["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert (values["bos_token_id"], values["eos_token_id"]) == (1, [2, 3])
    defaults = json.loads((tmp_path / "back/generation_config.json").read_text())
    assert defaults == {"bos_token_id": 1, "eos_token_id": [2, 3]}
    export_hf(tmp_path / "run", tmp_path / "wide", dtype="float32")
    for name, tensor in tensors_of(tmp_path / "wide").items():
        assert torch.equal(tensor, tensors_of(tmp_path / "hf")[name].to(torch.float32))


@pytest.mark.parametrize("norms", [torch.float32, torch.float16])
def test_tensors_of_several_dtypes_come_back_as_they_were(
    tmp_path: Path, norms: torch.dtype
) -> None:
    """Matrices in bf16 beside norms that are wider, with values that bf16 cannot hold."""
    source = write_llama(tmp_path / "hf", torch.bfloat16, torch_dtype="bfloat16")

    def widen(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "norm" in name:
                tensors[name] = (tensor.float() + 0.001 * torch.arange(len(tensor))).to(norms)

    edit_tensors(source, widen)
    convert_hf(source, tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", source)
    values = json.loads((tmp_path / "back/config.json").read_text())
    assert values["torch_dtype"] == "bfloat16"
    export_hf(tmp_path / "run", tmp_path / "half", dtype="bfloat16")
    assert {t.dtype for t in tensors_of(tmp_path / "half").values()} == {torch.bfloat16}


def test_a_single_file_goes_before_an_index(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in transformers: a model saved anew beside shards of before is what is meant."""
    source = write_llama(tmp_path / "hf")
    weights = source / "model.safetensors"
    old = load_file(weights)
    shard = "model-00001-of-00001.safetensors"
    save_file(old, source / shard)
    edit_tensors(source, lambda t: t.update({NORM: t[NORM] + 1.0}))
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(old, shard)}))
    convert_hf(source, tmp_path / "run")
    assert f"{weights} is read and {index.name} is not" in caplog.text
    export_hf(tmp_path / "run", tmp_path / "back")
    assert torch.equal(tensors_of(tmp_path / "back")[NORM], old[NORM] + 1.0)


def test_shards_may_be_in_a_folder_below(tmp_path: Path) -> None:
    """As in transformers; above, or elsewhere, nothing is read."""
    source = write_llama(tmp_path / "hf")
    weights, shard = source / "model.safetensors", source / "shards/part.safetensors"
    stored = load_file(weights)
    shard.parent.mkdir()
    weights.rename(shard)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(stored, "shards/part.safetensors")}))
    convert_hf(source, tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "back")
    assert torch.equal(tensors_of(tmp_path / "back")[NORM], stored[NORM])
    for name in ("shards/../../part.safetensors", str(shard)):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(stored, name)}))
        with pytest.raises(DataError, match="leads outside its folder"):
            convert_hf(source, tmp_path / "again")


def test_stories260K_speaks(tmp_path: Path, data_dir: Path) -> None:
    """A trained Llama: reference logits, reference likelihood, its own tokens greedily."""
    source = data_dir / "checkpoints/stories260K/hf"
    if not source.is_dir():
        pytest.skip(f"no {source}")
    convert_hf(source, tmp_path / "run")
    model, _ = load_model(tmp_path / "run")
    reference = json.loads((source / "reference.json").read_text())
    ids = reference["ids"]
    logits = all_logits(model, torch.tensor([ids]))[0]
    last = torch.tensor(reference["last_logits"])
    torch.testing.assert_close(logits[-1], last, rtol=0.0, atol=1e-4)
    nll = -logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    wanted = torch.tensor(reference["nll_per_token"])
    torch.testing.assert_close(nll, wanted, rtol=0.0, atol=1e-4)
    assert nll.mean().item() == pytest.approx(reference["mean_nll"], abs=1e-5)
    greedy = generate(model, ids[:1], max_new_tokens=len(ids) - 1, temperature=0.0)
    assert list(greedy) == ids[1:]
    export_hf(tmp_path / "run", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", source)


# ----------------------------------------------------------------------------- export of sharing


SHARED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "reuse_map": (REUSE_MAP, {}),
    "sequence": ({"kind": "sequence", "num_blocks": 2, "depth": 4}, {"tie_embeddings": False}),
    "cycle": (
        {"kind": "cycle", "num_blocks": 2, "depth": 5},
        {"attention_bias": "qk", "rope_interleaved": True},
    ),
    "cycle_reverse": (
        {"kind": "cycle_reverse", "num_blocks": 3, "depth": 6},
        {"attention_bias": "qkv", "feed_forward_bias": True, "norm_eps": 1e-3},
    ),
    "loop": (
        {"kind": "loop", "prelude": 1, "core": 2, "coda": 1, "num_loops": 2, "injection": "none"},
        {"attention_bias": "all", "rope_theta": 300.0},
    ),
    "block_recurrence": (
        {"kind": "block_recurrence", "num_blocks": 2, "num_loops": 2, "injection": "none"},
        {"num_kv_heads": 4, "z_loss": 0.1, "dropout": 0.1},
    ),
    "custom": ({"kind": "custom", "order": [1, 0, 1, 2, 0]}, {"num_heads": 3, "num_kv_heads": 1}),
}


@pytest.mark.parametrize("scheme", SHARED)
def test_unrolled_export_computes_the_same(tmp_path: Path, transformers: Any, scheme: str) -> None:
    """Shared blocks, other rotations and missing biases, as a Llama that transformers runs."""
    recurrence, model = SHARED[scheme]
    config = write_run(tmp_path / "run", recurrence, **model)
    out = export_hf(tmp_path / "run", tmp_path / "hf", unrolled=True)
    llama, faults = transformers.LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not faults["missing_keys"] and not faults["unexpected_keys"]
    assert llama.config.num_hidden_layers == len(layer_map(config.recurrence))
    assert ("lm_head.weight" in tensors_of(out)) != config.model.tie_embeddings
    with torch.no_grad():
        wanted = run_logits(tmp_path / "run")
        torch.testing.assert_close(llama.eval()(TOKENS_BS).logits, wanted, rtol=0.0, atol=1e-4)


def test_trained_run_exports_fp32_and_its_tokenizer_ids(tmp_path: Path) -> None:
    """A dense run needs no flag, and no code."""
    write_run(tmp_path / "run", DENSE)
    export_hf(tmp_path / "run", tmp_path / "hf")
    assert sorted(contents(tmp_path / "hf")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    values = json.loads((tmp_path / "hf/config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"]) == (None, 256)
    assert {t.dtype for t in tensors_of(tmp_path / "hf").values()} == {torch.float32}


def test_tokenizer_files_travel(tmp_path: Path) -> None:
    """Into the run folder, where the config points, and out again."""
    source = write_llama(tmp_path / "hf")
    files = {name: f'{{"of": "{name}"}}'.encode() for name in hf.TOKENIZER_FILES}
    for name, content in files.items():
        (source / name).write_bytes(content)
    convert_hf(source, tmp_path / "run")
    run = open_run_folder(tmp_path / "run")
    assert run.tokenizer == str(tmp_path / "run/tokenizer.json")
    export_hf(tmp_path / "run", tmp_path / "back")
    exported = contents(tmp_path / "back")
    # What batches need is added.
    described = json.loads(exported.pop("tokenizer_config.json"))
    assert described == {"of": files.pop("tokenizer_config.json") and "tokenizer_config.json",
                         "padding_side": "left"}  # fmt: skip
    assert {name: exported[name] for name in files} == files


def test_a_sentencepiece_model_goes_along(tmp_path: Path) -> None:
    """Beside the tokenizer.json that is made of it: llama.cpp reads the model itself."""
    texts = TEXT.splitlines()
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=content, vocab_size=400, model_type="bpe",
        byte_fallback=True, minloglevel=2, num_threads=1,
    )  # fmt: skip
    model = tmp_path / "tokenizer.model"
    model.write_bytes(content.getvalue())
    write_run(tmp_path / "run", DENSE, tokenizer=str(model), vocab_size=404)
    export_hf(tmp_path / "run", tmp_path / "hf")
    exported = contents(tmp_path / "hf")
    assert exported["tokenizer.model"] == content.getvalue() and "tokenizer.json" in exported
    chosen = json.loads(exported["generation_config.json"])
    assert chosen["suppress_tokens"] == [400, 401, 402, 403]


@pytest.mark.parametrize(
    ("recurrence", "model", "message"),
    [
        (DENSE, {"positions": "alibi"}, "model.positions='alibi'"),
        (DENSE, {"norm": "layer"}, "model.norm='layer'"),
        (DENSE, {"norm_position": "sandwich"}, "model.norm_position='sandwich'"),
        (DENSE, {"norm_position": "post"}, "model.norm_position='post'"),
        (DENSE, {"feed_forward": "gelu"}, "model.feed_forward='gelu'"),
        (DENSE, {"gate": True, "scale_embeddings": True}, "model.gate=True"),
        (
            {"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": 2},
            {},
            "recurrence.injection='linear'",
        ),
        (
            {"kind": "block_recurrence", "num_blocks": 2, "num_loops": 2},
            {},
            "recurrence.injection='add'",
        ),
        (
            {"kind": "loop", "prelude": 0, "core": 1, "coda": 1, "num_loops": 2}
            | {"injection": "none", "final_norm_after_core": True},
            {},
            "recurrence.final_norm_after_core=True",
        ),
    ],
)
def test_what_llama_cannot_express_is_refused(
    tmp_path: Path, recurrence: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    """By key and value; nothing is written."""
    write_run(tmp_path / "run", recurrence, **model)
    with pytest.raises(ConfigError, match=message):
        export_hf(tmp_path / "run", tmp_path / "hf", unrolled=True)
    assert not (tmp_path / "hf").exists()


def test_export_refusals(tmp_path: Path) -> None:
    """A target in use, an unknown dtype, a missing step."""
    write_run(tmp_path / "run", REUSE_MAP)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ConfigError, match="full: exists and is not empty"):
        export_hf(tmp_path / "run", tmp_path / "full", unrolled=True)
    with pytest.raises(ConfigError, match="dtype='int8' is not one of float32"):
        export_hf(tmp_path / "run", tmp_path / "hf", unrolled=True, dtype="int8")
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; kept: 7"):
        export_hf(tmp_path / "run", tmp_path / "hf", unrolled=True, step=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "run"]


# ---------------------------------------------------------------------------- refusals of convert


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not supported"),
        ({"architectures": ["LlamaModel"]}, r"architectures=\['LlamaModel'\] is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported.*'silu'"),
        ({"sliding_window": 128}, "sliding_window=128 is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling: rope_type='longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: required, but missing"),
        ({"rope_parameters": {"rope_type": "su"}}, "rope_parameters: rope_type='su'"),
        ({"rope_scaling": "dynamic"}, "rope_scaling.factor: required, but missing"),
        ({"vocab_size": None}, "vocab_size: required, but missing"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3 must divide num_heads=2"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """By key and value; nothing is written."""
    write_llama(tmp_path / "hf", **changes)
    with pytest.raises(ConfigError, match=message):
        convert_hf(tmp_path / "hf", tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_rope_theta_is_found_in_either_place(tmp_path: Path) -> None:
    """Older files have it at the top, newer ones under rope_parameters."""
    new = {"rope_type": "default", "rope_theta": 777.0}
    for i, changes in enumerate(({"rope_theta": 777.0}, {"rope_parameters": new})):
        convert_hf(write_llama(tmp_path / f"hf{i}", **changes), tmp_path / f"run{i}")
        assert load_config(tmp_path / f"run{i}/config.yaml").model.rope_theta == 777.0


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), "model.norm.weight: missing"),
        (lambda t: t.update(extra=torch.ones(2)), "extra: not part of a Llama"),
        (lambda t: t.update({NORM: torch.ones(9)}), r"norm.weight: shape \[9\], config.json: \[8"),
        (lambda t: t.update({NORM: torch.ones(8, dtype=torch.int8)}), "torch.int8 is not one of"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    """Each tensor by name; nothing is written."""
    edit_tensors(write_llama(tmp_path / "hf"), change)
    with pytest.raises(DataError, match=message):
        convert_hf(tmp_path / "hf", tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_harmless_extras_are_left_out(tmp_path: Path) -> None:
    """Old folders store the rotation's frequencies, and tied heads twice."""
    source = write_llama(tmp_path / "hf", tie_word_embeddings=True)
    with pytest.raises(DataError, match=r"differs from model.embed_tokens.weight although tie"):
        convert_hf(source, tmp_path / "run")
    head, frequencies = "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(
        source,
        lambda t: t.update(
            {head: t["model.embed_tokens.weight"].clone(), frequencies: torch.ones(2)}
        ),
    )
    convert_hf(source, tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "back")
    assert tensors_of(source).keys() - tensors_of(tmp_path / "back").keys() == {head, frequencies}


def test_folders_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    """No config, no weights, pickles, half a download, an index that leads astray."""
    with pytest.raises(ConfigError, match=r"none/config.json: cannot be read"):
        convert_hf(tmp_path / "none", tmp_path / "run")
    source = write_llama(tmp_path / "hf")
    weights = source / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-5])
    with pytest.raises(DataError, match=r"model.safetensors: cannot be read .* download it again"):
        convert_hf(source, tmp_path / "run")
    weights.unlink()
    with pytest.raises(ConfigError, match=r"has no model.safetensors"):
        convert_hf(source, tmp_path / "run")
    (source / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ConfigError, match=r"pytorch_model.bin: is a pickle.*safe_serialization"):
        convert_hf(source, tmp_path / "run")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NORM: "../elsewhere.safetensors"}}))
    with pytest.raises(DataError, match="leads outside its folder"):
        convert_hf(source, tmp_path / "run")
    (source / "part.safetensors").write_bytes(content)
    names = [*load_file(source / "part.safetensors"), "model.layers.0.self_attn.q_proj.weight"]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "part.safetensors")}))
    convert_hf(source, tmp_path / "run")
    edit = load_file(source / "part.safetensors")
    edit.pop(NORM)
    save_file(edit, source / "part.safetensors")
    with pytest.raises(DataError, match=r"model.norm.weight: not in part.safetensors"):
        convert_hf(source, tmp_path / "again")


def test_target_is_complete_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure leaves nothing, what a kill left is replaced, an empty folder is taken."""
    source = write_llama(tmp_path / "hf")
    (tmp_path / "run.tmp").mkdir()
    (tmp_path / "run.tmp/left").touch()
    (tmp_path / "run").mkdir()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device", "model")

    with monkeypatch.context() as patch:
        patch.setattr(hf, "create_file", fail)
        with pytest.raises(ConfigError, match=r"run: cannot be written .*No space left"):
            convert_hf(source, tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "run"]
    convert_hf(source, tmp_path / "run")
    before = contents(tmp_path / "run")
    assert "left" not in before
    with pytest.raises(ConfigError, match="run: exists and is not empty"):
        convert_hf(source, tmp_path / "run")
    assert contents(tmp_path / "run") == before
    with monkeypatch.context() as patch:
        patch.setattr(hf, "write_all", fail)
        with pytest.raises(ConfigError, match=r"out: cannot be written .*No space left"):
            export_hf(tmp_path / "run", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "run"]


def test_folder_without_tokenizer_says_where_one_belongs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Converting works, speaking does not yet."""
    convert_hf(write_llama(tmp_path / "hf"), tmp_path / "run")
    assert f"put one at {tmp_path / 'run/tokenizer.json'}" in caplog.text
    with pytest.raises(DataError, match=r"run/tokenizer.json: no such tokenizer"):
        open_tokenizer(open_run_folder(tmp_path / "run"))


# ---------------------------------------------------------------------------------------- loading


def test_damaged_checkpoint_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """To the one before, with a warning; asked for by step, it is an error."""
    run_dir = tmp_path / "run"
    write_run(run_dir, REUSE_MAP, step=7, attention_bias="all")
    older = run_logits(run_dir)
    write_run(run_dir, REUSE_MAP, step=9, attention_bias="all")
    newer = run_logits(run_dir)
    assert not torch.equal(older, newer)
    assert load_model(run_dir, step=7)[1].state["step"] == 7
    file = run_dir / "checkpoints/step-00000009/rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    caplog.set_level(logging.WARNING)
    assert torch.equal(run_logits(run_dir), older)
    assert "step-00000009 is damaged and was skipped" in caplog.text
    with pytest.raises(CheckpointError, match=r"step-00000009 is damaged.*choose another step"):
        load_model(run_dir, step=9)
    shutil.rmtree(run_dir / "checkpoints/step-00000007")
    with pytest.raises(CheckpointError, match=r"has no checkpoint to load \(.*step-00000009"):
        load_model(run_dir)


def test_copies_are_refreshed(tmp_path: Path) -> None:
    """bf16 compute reads the loaded values, not the initial ones."""
    source = write_llama(tmp_path / "hf", torch.bfloat16)
    convert_hf(source, tmp_path / "run")
    model, _ = load_model(tmp_path / "run")
    assert model.embedding is not None and model.embedding.copy is not None
    assert torch.equal(model.embedding.copy, tensors_of(source)["model.embed_tokens.weight"])


def test_runs_that_cannot_be_loaded_are_refused(tmp_path: Path) -> None:
    """No run, no checkpoint, another tokenizer."""
    with pytest.raises(ConfigError, match="is no run folder"):
        load_model(tmp_path)
    config = write_run(tmp_path / "run", DENSE)
    run = open_run_folder(tmp_path / "run")
    tokenizer = open_tokenizer(run)
    assert special_ids(run, tokenizer) == (None, [256])
    run.state["hugging_face"] = {"bos_token_id": 1, "eos_token_id": [2, 3]}
    assert special_ids(run, tokenizer) == (1, [2, 3])
    run.state["tokenizer"] = "0" * 32
    with pytest.raises(CheckpointError, match=f"was trained with {'0' * 32}"):
        open_tokenizer(run)
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert config.data.tokenizer == "bytes"
    with pytest.raises(CheckpointError, match="has no checkpoint to load; train the run first"):
        load_model(tmp_path / "run")


# ------------------------------------------------------------------------------- the command line


def write_tokenizer(path: Path, size: int) -> None:
    """A tokenizer.json of bytes and an end token, padded with tokens up to a size; id 260 is not
    there."""
    vocabulary = {chr(0x100 + i): i for i in range(256)} | {"</s>": 256}
    vocabulary |= {f"token {i}": i for i in range(257, size) if i != 260}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "</s>"}
    path.write_text(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))


def test_ids_without_a_piece_are_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows above the tokenizer's ids, and gaps in them, however likely they are."""
    write_tokenizer(tmp_path / "tokenizer.json", 262)
    config = write_run(
        tmp_path / "run", DENSE, tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=300
    )
    tokenizer = load_tokenizer(config.data.tokenizer)
    missing = tokenizer.missing_ids(300)
    assert missing == [260, *range(262, 300)]
    model, _ = load_model(tmp_path / "run")
    embedding = model.parameters_by_name["embedding.weight"]
    embedding.data[missing] *= 50.0  # Tied: these have by far the largest logits.
    model.refresh()
    for temperature in (0.0, 1.0):
        options: dict[str, Any] = {"max_new_tokens": 30, "temperature": temperature, "top_k": 5}
        ids = list(generate(model, [1, 2], **options))
        assert set(ids) & set(missing)
        ids = list(generate(model, [1, 2], missing_ids=missing, **options))
        assert len(ids) == 30 and not set(ids) & set(missing)


def test_a_tokenizer_with_more_ids_than_rows_is_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By `convert` as a warning; `eval` and training refuse it alike."""
    source = write_llama(tmp_path / "hf")
    rows = json.loads((source / "config.json").read_text())["vocab_size"]
    write_tokenizer(source / "tokenizer.json", rows + 259)
    run = tmp_path / "run"
    convert_hf(source, run)
    size = load_tokenizer(run / "tokenizer.json").vocab_size
    assert size > rows
    assert f"{run / 'tokenizer.json'} has {size} ids, the model {rows} rows" in caplog.text
    message = f"model.vocab_size={rows} is below the {size} ids of data.tokenizer="
    assert run_command(monkeypatch, "eval", run, "--data", tmp_path / "corpus") == 2
    assert message in capsys.readouterr().err
    config = load_config(run / "config.yaml")
    with pytest.raises(DataError, match=message):
        with_vocab_size(config, size)


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `megarecur ARGUMENTS`, run here."""
    monkeypatch.setattr(sys, "argv", ["megarecur", *map(str, arguments)])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_commands_parse_as_documented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`export RUN --to hf DIR --unrolled`, `convert HF_DIR --to RUN`, `generate RUN TEXT`."""
    run, back = tmp_path / "run", tmp_path / "back"
    write_run(run, REUSE_MAP, vocab_size=257)
    assert run_command(monkeypatch, "export", run, "--to", "hf", tmp_path / "compact") == 0
    assert "modeling_megarecur.py" in contents(tmp_path / "compact")
    command = ("export", run, "--to", "hf", tmp_path / "hf", "--unrolled")
    assert run_command(monkeypatch, *command) == 0
    assert run_command(monkeypatch, "convert", tmp_path / "hf", "--to", back) == 0
    capsys.readouterr()
    options = ("--max-new-tokens", 12, "--top-k", 50, "--top-p", 0.9, "--seed", 3, "--samples", 2)
    assert run_command(monkeypatch, "generate", run, "Aé", *options) == 0
    shared = capsys.readouterr().out
    assert shared.startswith("--- sample 1 of 2\nAé")
    assert run_command(monkeypatch, "generate", run, "Aé", *options, "--no-cache") == 0
    assert capsys.readouterr().out == shared
    # The same model without sharing says the same.
    assert run_command(monkeypatch, "generate", back, "Aé", *options) == 0
    assert capsys.readouterr().out == shared
    assert run_command(monkeypatch, "generate", run, "x", "--temperature", "-1") == 2
    assert run_command(monkeypatch, "generate", tmp_path, "x") == 2
    assert run_command(monkeypatch, "export", run, "--to", "gguf", tmp_path / "other") == 2
    assert "--to gguf: the format must be hf" in capsys.readouterr().err
