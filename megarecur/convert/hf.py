"""Hugging Face Llama folders to run folders, and back.

    convert_hf(Path("models/llama"), Path("runs/llama"))        # a dense model at step 0
    export_hf(Path("runs/llama"), Path("models/back"))          # the same bytes of every tensor
    export_hf(Path("runs/shared"), Path("models/shared"), unrolled=True)

Both write beside their target and rename, so that a target is complete or not there.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megarecur.config.load import to_yaml, validate
from megarecur.config.schema import Config
from megarecur.convert.llama import (
    config_to_llama,
    llama_blocks,
    model_from_llama,
    tensor_names,
    to_half_split,
)
from megarecur.data.tokenizer import BYTES, load_tokenizer, tokenizer_fingerprint
from megarecur.errors import ConfigError, DataError
from megarecur.parallel.shards import whole
from megarecur.recurrence.inventory import build_inventory
from megarecur.train import checkpoint
from megarecur.train.checkpoint_storage import sync_folder, write_all, write_file
from megarecur.train.load import Run, open_run_folder, read_parameters

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
TOKENIZER_FILES = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id")


# --------------------------------------------------------------------------------------- convert


def convert_hf(hf_dir: str | Path, run_dir: str | Path) -> Path:
    """Make a run folder of a Llama folder: config.yaml, tokenizer, a checkpoint at step 0.

    The run is dense, in fp32 (computing in bf16 if all tensors are). What a config needs beyond the
    model (corpora, optimizer, batch) is filled with placeholders; there are no optimizer moments.
    Returns the checkpoint's path.

    Raises:
        ConfigError: not a Llama that can be expressed, or a target that is not empty.
        DataError: weights that are missing, damaged, superfluous or of other shapes.
    """
    hf_dir, run_dir = Path(hf_dir), Path(run_dir)
    path = hf_dir / "config.json"
    values = read_json(path)
    model, num_layers = model_from_llama(values, str(path))
    files = find_weights(hf_dir)
    with written_aside(run_dir) as aside:
        tokenizer = copy_tokenizer(hf_dir, aside)
        config = placeholder_config(model, num_layers, run_dir, tokenizer or TOKENIZERS[0], path)
        tensors, dtype = read_llama(config, files)
        if dtype == "bfloat16":
            train = config.train.model_copy(update={"precision": "bf16"})
            config = config.model_copy(update={"train": train})
        state = {
            "step": 0,
            "tokens": 0,
            "skipped": 0,
            "data": {},
            "config": config.model_dump(mode="json"),
            "layer_map": config.recurrence.model_dump(mode="json"),
            "tokenizer": tokenizer_fingerprint(aside / tokenizer) if tokenizer else "",
            "versions": {"megarecur": version("megarecur"), "torch": torch.__version__},
            "hugging_face": {"dtype": dtype, **{k: values.get(k) for k in SPECIAL_TOKENS}},
        }
        write_file(aside / "config.yaml", to_yaml(config).encode())
        shards = {name: whole(tensor) for name, tensor in tensors.items()}
        saved = checkpoint.save(aside / "checkpoints", 0, shards, state).result()
    if tokenizer is None:
        log.warning(
            "%s has no tokenizer.json or tokenizer.model; put one at %s before giving the run text",
            hf_dir,
            config.data.tokenizer,
        )
    return run_dir / saved.relative_to(aside)


def placeholder_config(
    model: dict[str, Any], num_layers: int, run_dir: Path, tokenizer: str, origin: Path
) -> Config:
    """A valid config around a model section."""
    values = {
        "run_dir": str(run_dir),
        "model": model,
        "recurrence": {"kind": "dense", "num_layers": num_layers},
        "data": {
            "train": [{"path": "data/train"}],
            "tokenizer": str(run_dir / tokenizer),
            "seq_length": model["max_positions"],
        },
        "optimizer": {"lr": 1e-5},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
    }
    return validate(values, str(origin))


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read as JSON ({error}); give the folder of a Hugging Face Llama"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {type(values).__name__}, not an object")
    return values


def find_weights(hf_dir: Path) -> dict[str, Path]:
    """Every tensor of the folder, with the safetensors file that holds it."""
    index = hf_dir / "model.safetensors.index.json"
    if index.is_file():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in table.values()
        ):
            raise DataError(f"{index}: its weight_map does not name files of the folder")
        return {tensor: hf_dir / name for tensor, name in table.items()}
    single = hf_dir / "model.safetensors"
    if single.is_file():
        with open_safetensors(single) as file:
            return dict.fromkeys(file.keys(), single)
    pickles = sorted(p.name for p in hf_dir.glob("pytorch_model*.bin"))
    if pickles:
        raise ConfigError(
            f"{hf_dir / pickles[0]}: is a pickle, which can run any code and is never read; load "
            "it with transformers and save it again with safe_serialization=True"
        )
    raise ConfigError(f"{hf_dir}: has no model.safetensors (or model.safetensors.index.json)")


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file; errors name it."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}); download it again") from None


def read_llama(config: Config, files: dict[str, Path]) -> tuple[dict[str, Tensor], str]:
    """All parameters in fp32 by global name, and the dtype they are stored in.

    Where tensors are stored in several dtypes, that one is float32.
    """
    inventory = build_inventory(config)
    blocks = list(range(len({s.block for s in inventory.values()} - {None})))
    model = config.model
    bias = {"self_attn": model.attention_bias == "all", "mlp": model.feed_forward_bias}
    names = tensor_names(blocks, bias, model.tie_embeddings)
    tied_copy = model.tie_embeddings and "lm_head.weight" in files
    ignored = {name for name in files if name.endswith("rotary_emb.inv_freq")}
    if tied_copy:
        ignored.add("lm_head.weight")
    missing = sorted(names.keys() - files.keys())
    extra = sorted(files.keys() - names.keys() - ignored)
    problems = [f"{name}: missing" for name in missing]
    problems += [f"{name}: not part of a Llama of this config" for name in extra]
    tensors, dtypes = {}, set()
    for path in sorted({files[name] for name in names if name in files}):
        with open_safetensors(path) as file:
            held = set(file.keys())
            for theirs, ours in names.items():
                if files.get(theirs) != path:
                    continue
                if theirs not in held:
                    problems.append(f"{theirs}: not in {path.name}, where the index has it")
                    continue
                tensor = file.get_tensor(theirs)
                if tuple(tensor.shape) != inventory[ours].shape:
                    wanted = list(inventory[ours].shape)
                    problems.append(f"{theirs}: shape {list(tensor.shape)}, config.json: {wanted}")
                if tensor.dtype not in DTYPES.values():
                    problems.append(f"{theirs}: {tensor.dtype} is not one of {', '.join(DTYPES)}")
                dtypes.add(str(tensor.dtype).removeprefix("torch."))
                tensors[ours] = tensor.to(torch.float32)
    if tied_copy and not problems:
        problems += tied_head_fault(files["lm_head.weight"], tensors["embedding.weight"])
    if problems:
        folder = next(iter(files.values())).parent if files else "the folder"
        raise DataError(
            f"{folder}: {len(problems)} tensor(s) do not fit config.json; download both again"
            + "".join(f"\n  {problem}" for problem in problems[:20])
        )
    return tensors, dtypes.pop() if len(dtypes) == 1 else "float32"


def tied_head_fault(path: Path, embedding: Tensor) -> list[str]:
    """A head that is stored beside the embedding it is tied to must equal it."""
    with open_safetensors(path) as file:
        if torch.equal(file.get_tensor("lm_head.weight").to(torch.float32), embedding):
            return []
    return [
        "lm_head.weight: differs from model.embed_tokens.weight although tie_word_embeddings=true; "
        "set tie_word_embeddings to false in config.json"
    ]


def copy_tokenizer(source: Path, target: Path) -> str | None:
    """Copy the tokenizer's files that are there; returns the name of the one to use."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            write_file(target / name, (source / name).read_bytes())
    return next((name for name in TOKENIZERS if (target / name).is_file()), None)


# ---------------------------------------------------------------------------------------- export


def export_hf(
    run_dir: str | Path,
    out_dir: str | Path,
    *,
    unrolled: bool = False,
    step: int | None = None,
    dtype: str | None = None,
) -> Path:
    """Write a run's model as a native Llama folder.

    Args:
        run_dir: a run folder.
        out_dir: absent, or an empty folder.
        unrolled: write a block as often as it runs, which a Llama without sharing needs.
        step: the checkpoint to export; None: the newest one.
        dtype: float32, bfloat16 or float16; None: float32, or what the run was converted from as
            long as it has not been trained.

    Raises:
        ConfigError: a model that Llama cannot express, or a target that is not empty.
        CheckpointError: no checkpoint that can be used.
    """
    run_dir, out_dir = Path(run_dir), Path(out_dir)
    run = open_run_folder(run_dir, step)
    blocks = llama_blocks(run.config, unrolled)
    origin = run.state.get("hugging_face", {})
    dtype = dtype or origin.get("dtype", "float32")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    with written_aside(out_dir) as aside:
        values = config_to_llama(run.config, len(blocks), dtype) | special_tokens(run)
        write_json(aside / "config.json", values)
        copy_hf_tokenizer(run, aside)
        if not (aside / "generation_config.json").exists():
            write_json(
                aside / "generation_config.json", {key: values[key] for key in SPECIAL_TOKENS}
            )
        write_llama(aside / "model.safetensors", run, blocks, dtype)
    return out_dir


def write_llama(path: Path, run: Run, blocks: list[int], dtype: str) -> None:
    """Write the layers in order, one tensor at a time: repeated layers cost no memory."""
    config = run.config
    inventory = build_inventory(config)
    master = torch.float64 if config.train.precision == "fp64" else torch.float32
    parameters = {name: torch.empty(s.shape, dtype=master) for name, s in inventory.items()}
    read_parameters(run.checkpoint, parameters)
    model = config.model
    bias = {"self_attn": model.attention_bias != "none", "mlp": model.feed_forward_bias}
    names = tensor_names(blocks, bias, model.tie_embeddings)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for theirs, ours in names.items():
        # Llama has biases on all four projections or on none: those we lack are zero.
        weight = ours.removesuffix(".bias") + ".weight"
        shape = inventory[ours if ours in inventory else weight].shape
        shape = shape[:1] if theirs.endswith(".bias") else shape
        start, end = end, end + prod(shape) * DTYPES[dtype].itemsize
        header[theirs] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb", buffering=0) as file:
        write_all(file, struct.pack("<Q", len(text)) + text, path)
        for theirs, ours in names.items():
            tensor = parameters.get(ours, torch.zeros(header[theirs]["shape"]))
            if model.rope_interleaved and (".q_proj." in theirs or ".k_proj." in theirs):
                tensor = to_half_split(tensor, model)
            stored = tensor.to(DTYPES[dtype]).contiguous().flatten().view(torch.uint8)
            write_all(file, stored.numpy().data, path)
        os.fsync(file.fileno())


def special_tokens(run: Run) -> dict[str, Any]:
    """Ids of begin and end of text: those the run was converted with, or its tokenizer's."""
    origin = run.state.get("hugging_face")
    if origin is not None:
        return {key: origin.get(key) for key in SPECIAL_TOKENS}
    try:
        tokenizer = load_tokenizer(run.tokenizer)
    except DataError:
        return dict.fromkeys(SPECIAL_TOKENS)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def copy_hf_tokenizer(run: Run, target: Path) -> None:
    """Copy the tokenizer where it is Hugging Face's, or came from such a folder."""
    source = Path(run.tokenizer)
    if run.tokenizer != BYTES and not source.is_file():
        log.warning("%s is missing; the export has no tokenizer", source)
    elif run.tokenizer == BYTES or not (
        "hugging_face" in run.state or source.read_bytes().lstrip()[:1] == b"{"
    ):
        log.warning("%s is no Hugging Face tokenizer and was not exported", run.tokenizer)
    else:
        copy_tokenizer(source.parent, target)
        if not (target / source.name).exists():
            write_file(target / "tokenizer.json", source.read_bytes())


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write and sync."""
    write_file(path, (json.dumps(values, indent=2) + "\n").encode())


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when all went well and is removed otherwise.

    Raises:
        ConfigError: `target` is there and not empty, or cannot be made.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target}: is there and not empty; choose another folder or remove it")
    absolute = Path(os.path.abspath(target))
    aside = absolute.with_name(absolute.name + ".tmp")
    try:
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
        yield aside
        sync_folder(aside)
        aside.rename(absolute)
        sync_folder(absolute.parent)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
