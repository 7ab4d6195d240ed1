"""Hugging Face folders to run folders, and back.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarecur.config.load import to_yaml, validate
from megarecur.config.schema import Config
from megarecur.convert.architecture import Architecture, to_half_split
from megarecur.convert.source import (
    ARCHITECTURES,
    DTYPES,
    SAFETENSORS_DTYPES,
    SourceModel,
    placeholder_config,
)
from megarecur.data.tokenizer import BYTES, load_tokenizer, tokenizer_fingerprint
from megarecur.errors import ConfigError, DataError
from megarecur.parallel.shards import Shard, whole
from megarecur.recurrence.inventory import build_inventory
from megarecur.recurrence.layer_map import count_uses
from megarecur.recurrence.schemes import layer_map
from megarecur.train import checkpoint
from megarecur.train.checkpoint_planning import Values
from megarecur.train.checkpoint_storage import sync_folder, write_all, write_file
from megarecur.train.load import Run, open_run_folder, read_parameters

log = logging.getLogger(__name__)

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


def convert_hf(hf_dir: str | Path, run_dir: str | Path, *, allow_pickles: bool = False) -> Path:
    """Make a run folder of a Hugging Face folder: config.yaml, tokenizer, a checkpoint at step 0.

    The run is dense, in fp32 (computing in bf16 if all tensors are). What a config needs beyond the
    model (corpora, optimizer, batch) is filled with placeholders; there are no optimizer moments.
    Returns the checkpoint's path. `allow_pickles`: see `SourceModel`.

    Raises:
        ConfigError: not a model that can be expressed, or a target that is not empty.
        DataError: weights that are missing, damaged, superfluous or of other shapes.
    """
    source = SourceModel(hf_dir, allow_pickles=allow_pickles)
    return write_run(source, Path(run_dir), {}, stream_dense)


def write_run(
    source: SourceModel,
    run_dir: Path,
    sections: dict[str, Any],
    make: Callable[[Config, SourceModel], tuple[dict[str, Shard], Values]],
    finish: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Make a run folder of a source: config.yaml, tokenizer, a checkpoint at step 0.

    Args:
        source: the Hugging Face folder.
        run_dir: absent, or an empty folder.
        sections: of the config, in place of a dense model's.
        make: gives what to write: tensors without values, and what makes one when its turn comes.
        finish: adds files to the folder that it is given, before the folder is published.

    Returns the checkpoint's path; raises what `convert_hf` does.
    """
    values, dtype, hf_dir = source.values, source.dtype, source.folder
    with written_aside(run_dir) as aside:
        tokenizer = copy_tokenizer(hf_dir, aside)
        config = placeholder_config(
            source.config.model.model_dump(),
            source.num_layers,
            str(run_dir),
            str(run_dir / (tokenizer or TOKENIZERS[0])),
            hf_dir / "config.json",
        )
        if sections:
            changed = config.model_dump(mode="json") | sections
            config = validate(changed, str(hf_dir / "config.json"))
        if dtype == "bfloat16":
            train = config.train.model_copy(update={"precision": "bf16"})
            config = config.model_copy(update={"train": train})
        origin = {"model_type": source.architecture.model_type, "dtype": dtype}
        state = {
            "step": 0,
            "tokens": 0,
            "skipped": 0,
            "data": {},
            "config": config.model_dump(mode="json"),
            "layer_map": config.recurrence.model_dump(mode="json"),
            "tokenizer": tokenizer_fingerprint(aside / tokenizer) if tokenizer else "",
            "versions": {"megarecur": version("megarecur"), "torch": torch.__version__},
            "hugging_face": origin | {k: values.get(k) for k in SPECIAL_TOKENS},
        }
        write_file(aside / "config.yaml", to_yaml(config).encode())
        shards, read = make(config, source)
        saved = checkpoint.save(aside / "checkpoints", 0, shards, state, values=read).result()
        finish(aside)
    if tokenizer is None:
        log.warning(
            "%s has no tokenizer.json or tokenizer.model; put one at %s before giving the run text",
            hf_dir,
            config.data.tokenizer,
        )
    return run_dir / saved.relative_to(aside)


def stream_dense(config: Config, source: SourceModel) -> tuple[dict[str, Shard], Values]:
    """Every tensor as the source has it, read when it is written."""
    inventory = build_inventory(config)
    return {name: whole(torch.empty(s.shape, device="meta")) for name, s in inventory.items()}, (
        source.tensor
    )


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
    """Write a run's model as a folder that transformers loads without code of ours.

    The architecture is the one that the run was converted from, or else the first of those we know
    that can express the model.

    Args:
        run_dir: a run folder.
        out_dir: absent, or an empty folder.
        unrolled: write a block as often as it runs, which a model without sharing needs.
        step: the checkpoint to export; None: the newest one.
        dtype: float32, bfloat16 or float16; None: float32, or what the run was converted from as
            long as it has not been trained.

    Raises:
        ConfigError: a model that no architecture can express, or a target that is not empty.
        CheckpointError: no checkpoint that can be used.
    """
    run_dir, out_dir = Path(run_dir), Path(out_dir)
    run = open_run_folder(run_dir, step)
    origin = run.state.get("hugging_face", {})
    architecture = choose_architecture(run.config, origin.get("model_type"))
    blocks = blocks_of_layers(run.config, architecture, unrolled)
    dtype = dtype or origin.get("dtype", "float32")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    with written_aside(out_dir) as aside:
        values = config_values(run.config, architecture, blocks, dtype) | special_tokens(run)
        write_json(aside / "config.json", values)
        copy_hf_tokenizer(run, aside)
        if not (aside / "generation_config.json").exists():
            write_json(
                aside / "generation_config.json", {key: values[key] for key in SPECIAL_TOKENS}
            )
        write_tensors(aside / "model.safetensors", run, architecture, blocks, dtype)
    return out_dir


def choose_architecture(config: Config, origin: str | None) -> Architecture:
    """Which one a run is exported to.

    Args:
        config: of the run.
        origin: the `model_type` that it was converted from, if it was.

    Raises:
        ConfigError: none can express the model; names what keeps the nearest one from it.
    """
    known = sorted(ARCHITECTURES.values(), key=lambda a: a.model_type != origin)
    obstacles = [(a, a.find_obstacles(config.model)) for a in known]
    for architecture, found in obstacles:
        if not found:
            return architecture
    nearest, found = min(obstacles, key=lambda pair: len(pair[1]))
    raise ConfigError(
        f"no architecture of {', '.join(ARCHITECTURES)} can express this model; the nearest is "
        f"{nearest.title}:" + "".join(f"\n  {problem}" for problem in found)
    )


def blocks_of_layers(config: Config, architecture: Architecture, unrolled: bool) -> list[int]:
    """The block that each layer of the export runs.

    Raises:
        ConfigError: naming every key whose value layers in a row cannot express, with the remedy.
    """
    steps, title, problems = layer_map(config.recurrence), architecture.title, []
    if any(step.reads or step.writes for step in steps):
        injection = getattr(config.recurrence, "injection", None)
        problems.append(
            f"recurrence.injection={injection!r}: a {title} layer reads the layer below and "
            "nothing else; only injection='none' can be exported"
        )
    if any(step.normalize for step in steps):
        problems.append(
            f"recurrence.final_norm_after_core=True: {title} has no norm between layers; only "
            "False can be exported"
        )
    shared = {block: uses for block, uses in count_uses(steps).items() if uses > 1}
    if shared and not unrolled:
        problems.append(
            f"recurrence.kind={config.recurrence.kind}: runs {len(shared)} block(s) more than "
            f"once, {title} layers share nothing; pass --unrolled to write {len(steps)} layers"
        )
    if problems:
        raise ConfigError(f"cannot export to {title}:" + "".join(f"\n  {p}" for p in problems))
    return [step.block for step in steps]


def config_values(
    config: Config, architecture: Architecture, blocks: list[int], dtype: str
) -> dict[str, Any]:
    """config.json, special tokens apart."""
    values = architecture.write_config(config.model, blocks)
    if values.get("max_position_embeddings") is None:
        values["max_position_embeddings"] = config.data.seq_length
    return values | {
        "architectures": [architecture.hf_class],
        "model_type": architecture.model_type,
        "num_hidden_layers": len(blocks),
        "torch_dtype": dtype,
        "use_cache": True,
    }


def write_tensors(
    path: Path, run: Run, architecture: Architecture, blocks: list[int], dtype: str
) -> None:
    """Write the layers in order, one tensor at a time: repeated layers cost no memory."""
    config = run.config
    inventory = build_inventory(config)
    master = torch.float64 if config.train.precision == "fp64" else torch.float32
    parameters = {name: torch.empty(s.shape, dtype=master) for name, s in inventory.items()}
    read_parameters(run.checkpoint, parameters)
    model = config.model
    entries = architecture.names(model).all(blocks)

    def shape_of(ours: str) -> tuple[int, ...]:
        # Biases that the architecture has and we lack are zero.
        if ours in inventory:
            return inventory[ours].shape
        return inventory[ours.removesuffix(".bias") + ".weight"].shape[:1]

    def value_of(ours: str) -> Tensor:
        tensor = parameters.get(ours)
        if tensor is None:
            return torch.zeros(shape_of(ours))
        rotated = any(f".attention.{name}" in ours for name in ("query", "key"))
        return to_half_split(tensor, model) if model.rope_interleaved and rotated else tensor

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for e in entries:
        parts = [shape_of(name) for name in e.ours]
        shape = [sum(part[0] for part in parts), *parts[0][1:]]
        start, end = end, end + prod(shape) * DTYPES[dtype].itemsize
        header[e.theirs] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb", buffering=0) as file:
        write_all(file, struct.pack("<Q", len(text)) + text, path)
        for e in entries:
            tensor = e.write(tuple(value_of(name) for name in e.ours), model)
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
