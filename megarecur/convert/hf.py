"""Hugging Face folders to run folders, and back.

    convert_hf(Path("models/llama"), Path("runs/llama"))        # a dense model at step 0
    export_hf(Path("runs/llama"), Path("models/back"))          # the same bytes of every tensor
    export_hf(Path("runs/shared"), Path("models/shared"))               # blocks stored once
    export_hf(Path("runs/shared"), Path("models/layers"), unrolled=True)

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
from functools import partial
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megarecur.config.load import to_yaml, validate
from megarecur.config.schema import Config
from megarecur.convert import compact
from megarecur.convert.architecture import Architecture, Entry, to_half_split
from megarecur.convert.source import (
    ARCHITECTURES,
    DTYPES,
    SAFETENSORS_DTYPES,
    SourceModel,
    placeholder_config,
)
from megarecur.convert.tokenizer import describe_hf_tokenizer, write_hf_tokenizer
from megarecur.data.tokenizer import BYTES, load_tokenizer, tokenizer_fingerprint
from megarecur.errors import ConfigError, DataError
from megarecur.parallel.shards import Shard, whole
from megarecur.recurrence.inventory import build_inventory, signal_names
from megarecur.recurrence.layer_map import LayerMap, count_uses
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
    unrolled: bool | None = None,
    step: int | None = None,
    dtype: str | None = None,
) -> Path:
    """Write a run's model as a folder that transformers loads.

    Unrolled, it needs no code of ours: a block is written as often as it runs, with the adapters
    of each loop added in. The architecture is the one that the run was converted from, or else the
    first of those we know that can express the model. Compact, a block is written once, and a
    modelling file with it (see `compact`).

    Args:
        run_dir: a run folder.
        out_dir: absent, or an empty folder.
        unrolled: True or False (compact); None: compact where blocks are shared.
        step: the checkpoint to export; None: the newest one.
        dtype: float32, bfloat16 or float16; None: float32, or what the run was converted from as
            long as it has not been trained.

    Raises:
        ConfigError: a model that cannot be expressed, or a target that is not empty.
        CheckpointError: no checkpoint that can be used.
    """
    run_dir, out_dir = Path(run_dir), Path(out_dir)
    run = open_run_folder(run_dir, step)
    config, origin = run.config, run.state.get("hugging_face", {})
    if config.task is not None:
        raise ConfigError(
            f"{run_dir}: has a task (task.kind={config.task.kind}), for which there is no export; "
            "use the run here, with `megarecur eval`"
        )
    if unrolled is None:
        unrolled = max(count_uses(layer_map(config.recurrence)).values()) == 1
    dtype = dtype or origin.get("dtype", "float32")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    if unrolled:
        architecture = choose_architecture(config, origin.get("model_type"))
        steps = layers_of(config, architecture)
        values = config_values(config, architecture, [step.block for step in steps], dtype)
    else:
        values = compact.config_values(config) | {"torch_dtype": dtype}
    with written_aside(out_dir) as aside:
        parameters = Parameters(run)
        if unrolled:
            tensors = unrolled_tensors(parameters, architecture, steps)
        else:
            tensors = compact_tensors(parameters)
            write_file(aside / compact.MODELLING, compact.modelling_code())
        values |= special_tokens(run)
        write_json(aside / "config.json", values)
        export_tokenizer(run, aside)
        if not (aside / "generation_config.json").exists():
            write_json(
                aside / "generation_config.json", {key: values[key] for key in SPECIAL_TOKENS}
            )
        write_tensors(aside / "model.safetensors", tensors, dtype)
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
        f"{nearest.title}:"
        + "".join(f"\n  {problem}" for problem in found)
        + "\n--compact writes it with a modelling file of its own"
    )


def layers_of(config: Config, architecture: Architecture) -> LayerMap:
    """The steps of the map, which are the layers of an unrolled export.

    Raises:
        ConfigError: naming every key whose value layers in a row cannot express, with the remedy.
    """
    steps, title, problems = layer_map(config.recurrence), architecture.title, []
    if any(step.reads or step.writes for step in steps):
        injection = getattr(config.recurrence, "injection", None)
        problems.append(
            f"recurrence.injection={injection!r}: a {title} layer reads the layer below and "
            "nothing else; only injection='none' can be unrolled, --compact writes any"
        )
    if any(step.normalize for step in steps):
        problems.append(
            f"recurrence.final_norm_after_core=True: {title} has no norm between layers; only "
            "False can be unrolled, --compact writes both"
        )
    if signal_names(config):
        problems.append(
            f"recurrence.kind={config.recurrence.kind!r}: {title} has no level signals; only "
            "level_rank=0 and feed_forward_rank=0 can be unrolled"
        )
    if config.halting is not None:
        problems.append(
            f"recurrence.halting.mode={config.halting.mode!r}: {title} runs all of its layers; "
            "such a model stays a megarecur run"
        )
    if problems:
        raise ConfigError(f"cannot export to {title}:" + "".join(f"\n  {p}" for p in problems))
    return steps


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


class Stored(NamedTuple):
    """One tensor of an export; its value is made when it is written."""

    name: str
    shape: tuple[int, ...]
    value: Callable[[], Tensor]


class Parameters:
    """A checkpoint's parameters, also as one loop of a block sees them, adapters added in."""

    def __init__(self, run: Run) -> None:
        self.config, self.inventory = run.config, build_inventory(run.config)
        master = torch.float64 if run.config.train.precision == "fp64" else torch.float32
        self.values = {n: torch.empty(s.shape, dtype=master) for n, s in self.inventory.items()}
        read_parameters(run.checkpoint, self.values)

    def of_loop(self, name: str, loop: int) -> str:
        """The name of what a loop uses where its block has `name`, or would have it.

        `blocks.0.attention.query_norm.weight` is `blocks.0.loops.1.query_norm.weight` where loops
        have norms of their own.
        """
        _, block, *inner = name.split(".")
        own = f"blocks.{block}.loops.{loop}.{'.'.join(inner[-2:])}"
        return own if own in self.inventory else name

    def shape(self, name: str, loop: int = 0) -> tuple[int, ...]:
        """Biases that an architecture has and we lack are as long as their matrix."""
        if name.startswith("blocks."):
            name = self.of_loop(name, loop)
        if name in self.inventory:
            return self.inventory[name].shape
        return self.inventory[name.removesuffix(".bias") + ".weight"].shape[:1]

    def value(self, name: str, loop: int = 0) -> Tensor:
        """In the order that architectures rotate in; biases that we lack are zero."""
        rotated = any(f".attention.{kind}" in name for kind in ("query", "key"))
        used = self.of_loop(name, loop) if name.startswith("blocks.") else name
        tensor = self.values.get(used)
        if tensor is None:
            return torch.zeros(self.shape(name, loop))
        delta = self.of_loop(name.removesuffix("weight") + "lora_a", loop)
        if delta in self.values and self.config.adapters is not None:
            a, b = self.values[delta].double(), self.values[delta[:-1] + "b"].double()
            tensor = (tensor + self.config.adapters.scale * (b @ a)).to(tensor.dtype)
        added = self.of_loop(name.removesuffix("bias") + "lora_bias", loop)
        if added in self.values:
            tensor = tensor + self.values[added]
        model = self.config.model
        return to_half_split(tensor, model) if model.rope_interleaved and rotated else tensor


def unrolled_tensors(
    parameters: Parameters, architecture: Architecture, steps: LayerMap
) -> list[Stored]:
    """The layers in order, by the architecture's names."""
    model = parameters.config.model
    names = architecture.names(model)

    def stored(e: Entry, loop: int = 0) -> Stored:
        parts = [parameters.shape(name, loop) for name in e.ours]

        def value() -> Tensor:
            return e.write(tuple(parameters.value(name, loop) for name in e.ours), model)

        return Stored(e.theirs, (sum(part[0] for part in parts), *parts[0][1:]), value)

    layers = [
        stored(e, step.loop_index)
        for layer, step in enumerate(steps)
        for e in names.of_layer(layer, step.block)
    ]
    return [*map(stored, names.first), *layers, *map(stored, names.last)]


def compact_tensors(parameters: Parameters) -> list[Stored]:
    """Every parameter that the map uses, once, by our names."""
    return [
        Stored(name, parameters.inventory[name].shape, partial(parameters.values.__getitem__, name))
        for name in compact.parameter_names(parameters.config)
    ]


def write_tensors(path: Path, tensors: list[Stored], dtype: str) -> None:
    """Write one tensor at a time: what repeats costs no memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + prod(tensor.shape) * DTYPES[dtype].itemsize
        header[tensor.name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb", buffering=0) as file:
        write_all(file, struct.pack("<Q", len(text)) + text, path)
        for tensor in tensors:
            stored = tensor.value().to(DTYPES[dtype]).contiguous().flatten().view(torch.uint8)
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


def export_tokenizer(run: Run, target: Path) -> None:
    """Copy the tokenizer where it is Hugging Face's, or came from such a folder; make one of any
    other. Where that cannot be done a warning says so."""
    source = Path(run.tokenizer)
    if run.tokenizer != BYTES and not source.is_file():
        log.warning("%s is missing; the export has no tokenizer", source)
    elif run.tokenizer != BYTES and (
        "hugging_face" in run.state or source.read_bytes().lstrip()[:1] == b"{"
    ):
        copy_tokenizer(source.parent, target)
        if not (target / source.name).exists():
            write_file(target / "tokenizer.json", source.read_bytes())
        # transformers describes those of its own architectures itself.
        needs_class = "hugging_face" not in run.state or (target / compact.MODELLING).exists()
        is_alone = not (target / "tokenizer_config.json").exists()
        if needs_class and is_alone and (target / "tokenizer.json").exists():
            try:
                describe_hf_tokenizer(target)
            except DataError as error:
                log.warning("%s; AutoTokenizer will not read it", error)
    else:
        try:
            write_hf_tokenizer(run.tokenizer, target)
        except DataError as error:
            log.warning("%s; the export has no tokenizer", error)


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
