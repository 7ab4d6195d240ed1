"""Convert Hugging Face folders to run folders, and back.

    convert_hf(Path("models/llama"), Path("runs/llama"))        # a dense model at step 0
    export_hf(Path("runs/llama"), Path("models/back"))          # the same bytes of every tensor
    export_hf(Path("runs/shared"), Path("models/shared"))               # blocks stored once
    export_hf(Path("runs/shared"), Path("models/layers"), unrolled=True)

Both write beside their target and rename it, so a target is complete or absent.
"""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from megarecur.checkpoint import checkpoint
from megarecur.checkpoint.load import Run, open_run_folder, open_tokenizer, read_parameters
from megarecur.checkpoint.planning import Values
from megarecur.config.load import to_yaml, validate
from megarecur.config.model import ModelConfig
from megarecur.config.recurrence import Dense
from megarecur.config.run import Config
from megarecur.convert import compact
from megarecur.convert.architecture import Architecture, Entry, to_half_split
from megarecur.convert.checksum import KEY, ZEROS, find_mark
from megarecur.convert.source import (
    ARCHITECTURES,
    DTYPES,
    SAFETENSORS_DTYPES,
    SourceModel,
    placeholder_config,
)
from megarecur.convert.tokenizer import (
    complete_hf_tokenizer,
    describe_hf_tokenizer,
    end_sentences,
    find_pad_id,
    write_hf_tokenizer,
)
from megarecur.data.tokenizer import BYTES, load_tokenizer, tokenizer_fingerprint
from megarecur.errors import CheckpointError, ConfigError, DataError
from megarecur.files import create_file, create_folder, write_all
from megarecur.inference.translate import MORE_TOKENS, TranslateOptions, limit_of
from megarecur.parallel.shards import TensorShard, whole
from megarecur.private import read_inside
from megarecur.recurrence.inventory import build_inventory, signal_names
from megarecur.recurrence.layer_map import LayerMap, count_uses
from megarecur.recurrence.schemes import layer_map

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
PADDING, START = "pad_token_id", "decoder_start_token_id"


# --------------------------------------------------------------------------------------- convert


def convert_hf(hf_dir: str | Path, run_dir: str | Path, *, allow_pickles: bool = False) -> Path:
    """Convert a Hugging Face folder to a run folder: config.yaml, tokenizer, a checkpoint at step
    0.

    The run is dense, in fp32 (computing in bf16 if all tensors are). Everything in the config
    beyond the model (corpora, optimizer, batch) is a placeholder; there are no optimizer moments. A
    model of pictures (ViT) has no tokenizer. Returns the checkpoint's path. `allow_pickles`: see
    `SourceModel`.

    Raises:
        ConfigError: the model cannot be expressed, or the target is not empty.
        DataError: weights are missing, damaged, superfluous or of other shapes.
    """
    source = SourceModel(hf_dir, allow_pickles=allow_pickles)
    return write_run(source, Path(run_dir), {}, stream_dense)


def write_run(
    source: SourceModel,
    run_dir: Path,
    sections: dict[str, Any],
    make: Callable[[Config, SourceModel], tuple[dict[str, TensorShard], Values]],
    finish: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write a run folder of a source: config.yaml, tokenizer, a checkpoint at step 0.

    Args:
        sections: sections of the config, in place of a dense model's.
        make: returns the tensors to write, without values, and a function that makes each value
        when it is written.
        finish: adds files to its folder before the folder is published.

    Returns the checkpoint's path; raises the errors of `convert_hf`.
    """
    values, dtype, hf_dir = source.values, source.dtype, source.folder
    with written_aside(run_dir) as aside:
        task, of_pictures = source.config.task, source.config.reads_images
        images = source.config.data.images
        tokenizer = None if of_pictures else copy_tokenizer(hf_dir, aside)
        config = placeholder_config(
            source.config.model.model_dump(),
            None if task is None else task.model_dump(),
            None if images is None else images.model_dump(mode="json"),
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
        origin = {
            "model_type": source.architecture.model_type,
            "dtype": dtype,
            # Dtypes differ: kept for an export that restores every tensor.
            "dtypes": {name: d for name, d in source.dtypes.items() if d != dtype},
            "torch_dtype": values.get("torch_dtype") or values.get("dtype"),
        }
        fingerprint = tokenizer_fingerprint(aside / tokenizer) if tokenizer else ""
        if of_pictures:
            fingerprint = tokenizer_fingerprint(config.data.tokenizer)
        state = {
            "step": 0,
            "tokens": 0,
            "skipped": 0,
            "data": {},
            "config": config.model_dump(mode="json"),
            "layer_map": config.recurrence.model_dump(mode="json"),
            "tokenizer": fingerprint,
            "versions": {"megarecur": version("megarecur"), "torch": torch.__version__},
            "hugging_face": origin | read_special_ids(values, hf_dir / "config.json"),
        }
        create_file(aside / "config.yaml", to_yaml(config))
        shards, read = make(config, source)
        saved = checkpoint.save(aside / "checkpoints", 0, shards, state, values=read).result()
        finish(aside)
    if tokenizer is not None:
        warn_of_rows(run_dir / tokenizer, config.model.vocab_size or 0)
    if tokenizer is None and not of_pictures:
        log.warning(
            "%s has no tokenizer.json or tokenizer.model; put one at %s before giving the run text",
            hf_dir,
            config.data.tokenizer,
        )
    return run_dir / saved.relative_to(aside)


def warn_of_rows(path: Path, rows: int) -> None:
    """Warn if the tokenizer has more ids than the model has rows."""
    try:
        size = load_tokenizer(path).vocab_size
    except DataError as error:
        log.warning("%s", error)
        return
    if size > rows:
        log.warning(
            "%s has %d ids, the model %d rows (vocab_size of config.json): evaluation and training "
            "refuse it; remove the added tokens from %d on, or add rows to the model",
            path,
            size,
            rows,
            rows,
        )


def stream_dense(config: Config, source: SourceModel) -> tuple[dict[str, TensorShard], Values]:
    """Return every tensor of the source, read when it is written."""
    inventory = build_inventory(config)
    return {name: whole(torch.empty(s.shape, device="meta")) for name, s in inventory.items()}, (
        source.tensor
    )


def copy_tokenizer(source: Path, target: Path) -> str | None:
    """Copy the tokenizer's existing files; returns the name of the one to use.

    Raises:
        DataError: a file is a link that leads out of its folder.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            create_file(target / name, read_inside(source / name))
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

    An unrolled export needs no code of ours: a block is written as often as it runs, with the
    adapters of each loop added. Its architecture is the one that the run was converted from, or
    else the first known one that can express the model. A compact export writes each block once,
    with a modelling file (see `compact`).

    Args:
        unrolled: True, or False for compact; None means compact if blocks are shared.
        step: the checkpoint to export; None means the newest one.
        dtype: float32, bfloat16 or float16; None means float32, or the dtype the run was converted
        from if it has not been trained.

    Raises:
        ConfigError: the model cannot be expressed, or the target is not empty.
        CheckpointError: no usable checkpoint exists.
    """
    run_dir, out_dir = Path(run_dir), Path(out_dir)
    run = open_run_folder(run_dir, step)
    config, origin = run.config, run.state.get("hugging_face", {})
    if config.encoder is not None:
        if unrolled:
            raise ConfigError(
                f"{run_dir}: has an encoder (encoder.kind={config.encoder.kind}), and encoder-"
                "decoders are exported with a modelling file of their own; leave out --unrolled, "
                "or use --compact"
            )
        unrolled = False
    if config.reads_images:
        raise ConfigError(
            f"{run_dir}: classifies pictures (task.kind=image), which have no export in this "
            "version; such a model stays a megarecur run"
        )
    if config.task is not None and config.classifies:
        if unrolled:
            raise ConfigError(
                f"{run_dir}: has a task (task.kind={config.task.kind}), and no architecture of "
                "transformers has its head; --compact writes it with modelling files of its own"
            )
        unrolled = False
    if unrolled is None:
        unrolled = max(count_uses(layer_map(config.recurrence)).values()) == 1
    # No dtype was requested, so each tensor keeps the one it was converted from.
    stored = origin.get("dtypes", {}) if dtype is None and is_as_converted(config) else {}
    dtype = dtype or origin.get("dtype", "float32")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    folds = False
    if unrolled:
        architecture, folds = choose_architecture(config, origin.get("model_type"))
        config = fold_scale(config) if folds else config
        steps = layers_of(config, architecture)
        values = config_values(config, architecture, [step.block for step in steps], dtype)
        # Null values are written too: defaults of transformers may lie beyond a small vocabulary.
        values[PADDING] = origin.get(PADDING)
        if stored and origin.get("torch_dtype") in DTYPES:
            values["torch_dtype"] = origin["torch_dtype"]
    else:
        values = compact.config_values(config) | {"torch_dtype": dtype}
    with written_aside(out_dir) as aside:
        parameters = Parameters(run)
        if unrolled:
            if folds:
                parameters.fold_scale()
            tensors = unrolled_tensors(parameters, architecture, steps, config.model)
        else:
            tensors = compact_tensors(parameters)
            create_file(aside / compact.MODELLING, compact.modelling_code())
        values |= special_tokens(run)
        export_tokenizer(run, aside)
        pad = find_pad_id(aside)
        if config.encoder is not None:
            values |= {START: start_token(values), PADDING: pad}
            end_sentences(aside)
            create_file(aside / compact.CARD, compact.model_card(config, run_dir.name))
        write_json(aside / "config.json", values)
        if not (aside / "generation_config.json").exists():
            chosen = {key: values[key] for key in SPECIAL_TOKENS} | suppress_missing(run)
            if pad is not None:
                chosen[PADDING] = pad
            if config.encoder is not None:
                chosen |= search_options(config, values, chosen)
            write_json(aside / "generation_config.json", chosen)
        write_tensors(aside / "model.safetensors", tensors, dtype, stored)
    return out_dir


def is_as_converted(config: Config) -> bool:
    """Return True if every layer is a block of its own, as in a converted model."""
    return isinstance(config.recurrence, Dense) and config.adapters is None


def choose_architecture(config: Config, origin: str | None) -> tuple[Architecture, bool]:
    """Return the architecture of an export, and whether the scale of embeddings is folded into
    their table because the architecture has none.

    Args:
        origin: the `model_type` that the run was converted from, or None.

    Raises:
        ConfigError: no architecture can express the model; the message lists the obstacles of the
        nearest one.
    """
    known = sorted(ARCHITECTURES.values(), key=lambda a: a.model_type != origin)
    obstacles = [(a, a.find_obstacles(config.model)) for a in known]
    for architecture, found in obstacles:
        if not found:
            return architecture, False
    if config.model.scale_embeddings:
        folded = fold_scale(config).model
        for architecture in known:
            if not architecture.find_obstacles(folded):
                return architecture, True
    nearest, found = min(obstacles, key=lambda pair: len(pair[1]))
    raise ConfigError(
        f"no architecture of {', '.join(ARCHITECTURES)} can express this model; the nearest is "
        f"{nearest.title}:"
        + "".join(f"\n  {problem}" for problem in found)
        + "\n--compact writes it with a modelling file of its own"
    )


def layers_of(config: Config, architecture: Architecture) -> LayerMap:
    """Return the steps of the map, which are the layers of an unrolled export.

    Raises:
        ConfigError: the message lists every key whose value an unrolled export cannot express, with
        the remedy.
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
    """Return config.json without special tokens."""
    values = architecture.write_config(config.model, blocks)
    if values.get("max_position_embeddings") is None:
        values["max_position_embeddings"] = compact.count_positions(config)
    return values | {
        "architectures": [architecture.hf_class],
        "model_type": architecture.model_type,
        "num_hidden_layers": len(blocks),
        "torch_dtype": dtype,
        "use_cache": True,
    }


def fold_scale(config: Config) -> Config:
    """Return the config of the same model with the scale of embeddings in their table, which the
    head then does not share."""
    changes = {"scale_embeddings": False, "tie_embeddings": False}
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


class Stored(NamedTuple):
    """One tensor of an export; its value is made when it is written."""

    name: str
    shape: tuple[int, ...]
    value: Callable[[], Tensor]


class Parameters:
    """A checkpoint's parameters, also as seen by one loop of a block with adapters added."""

    def __init__(self, run: Run) -> None:
        self.config, self.inventory = run.config, build_inventory(run.config)
        master = torch.float64 if run.config.train.precision == "fp64" else torch.float32
        self.values = {n: torch.empty(s.shape, dtype=master) for n, s in self.inventory.items()}
        read_parameters(run.checkpoint, self.values)

    def fold_scale(self) -> None:
        """Multiply the embedding table by its scale; a tied head keeps the unscaled table."""
        name, head = "embedding.weight", "head.weight"
        if head not in self.values:
            self.inventory = self.inventory | {head: self.inventory[name]}
            self.values[head] = self.values[name]
        scale = self.config.model.hidden_size**0.5
        self.values[name] = self.values[name] * scale

    def of_loop(self, name: str, loop: int) -> str:
        """Return the name of the parameter that a loop uses for the block's `name`.

        `blocks.0.attention.query_norm.weight` is `blocks.0.loops.1.query_norm.weight` if loops have
        their own norms.
        """
        _, block, *inner = name.split(".")
        own = f"blocks.{block}.loops.{loop}.{'.'.join(inner[-2:])}"
        return own if own in self.inventory else name

    def shape(self, name: str, loop: int = 0) -> tuple[int, ...]:
        """Return the shape of a parameter; biases that we lack are as long as their matrix."""
        if name.startswith("blocks."):
            name = self.of_loop(name, loop)
        if name in self.inventory:
            return self.inventory[name].shape
        return self.inventory[name.removesuffix(".bias") + ".weight"].shape[:1]

    def value(self, name: str, loop: int = 0) -> Tensor:
        """Return the value in the order in which architectures rotate; biases that we lack are
        zero."""
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
    parameters: Parameters, architecture: Architecture, steps: LayerMap, model: ModelConfig
) -> list[Stored]:
    """Return the layers in order, by the architecture's names; `model` is the architecture's
    view."""
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
    """Return every parameter that the map uses, once, by our names."""
    return [
        Stored(
            compact.hub_name(parameters.config, name),
            parameters.inventory[name].shape,
            partial(parameters.values.__getitem__, name),
        )
        for name in compact.parameter_names(parameters.config)
    ]


def write_tensors(
    path: Path, tensors: list[Stored], dtype: str, exceptions: Mapping[str, str]
) -> None:
    """Write one tensor at a time, so that repeated tensors cost no memory. The checksum, which
    covers the config.json beside the file, is written last.

    Args:
        exceptions: other dtypes, by the tensor's name.
    """
    dtypes = [exceptions.get(tensor.name, dtype) for tensor in tensors]
    header: dict[str, Any] = {"__metadata__": {"format": "pt", KEY: ZEROS}}
    end = 0
    for tensor, name in zip(tensors, dtypes, strict=True):
        start, end = end, end + prod(tensor.shape) * DTYPES[name].itemsize
        header[tensor.name] = {
            "dtype": SAFETENSORS_DTYPES[name],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_64((path.parent / "config.json").read_bytes() + text)
    with open(path, "xb", buffering=0) as file:
        write_all(file, struct.pack("<Q", len(text)) + text, path)
        for tensor, name in zip(tensors, dtypes, strict=True):
            stored = tensor.value().to(DTYPES[name]).contiguous().flatten().view(torch.uint8)
            digest.update(stored.numpy().data)
            write_all(file, stored.numpy().data, path)
        file.seek(8 + find_mark(text))
        write_all(file, digest.hexdigest().encode(), path)


def read_special_ids(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the ids of special tokens in config.json, None for those that it lacks.

    Raises:
        ConfigError: a value is no id.
    """
    found = {key: values.get(key) for key in (*SPECIAL_TOKENS, PADDING)}
    for key, value in found.items():
        ids = value if key == "eos_token_id" and isinstance(value, list) else [value]
        if not all(i is None or (type(i) is int and -1 <= i < 1 << 31) for i in ids):
            raise ConfigError(f"{path}: {key}={value!a:.80} is no id of a token; correct it")
    return found


def special_tokens(run: Run) -> dict[str, Any]:
    """Return the ids of begin and end of text: those of the conversion, or the tokenizer's."""
    origin = run.state.get("hugging_face")
    if origin is not None:
        return {key: origin.get(key) for key in SPECIAL_TOKENS}
    try:
        tokenizer = load_tokenizer(run.tokenizer)
    except DataError:
        return dict.fromkeys(SPECIAL_TOKENS)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def start_token(values: Mapping[str, Any]) -> int | None:
    """Return the id that a decoder starts from: begin or, without one, end of text."""
    begin, end = (values[key] for key in SPECIAL_TOKENS)
    start: int | None = end if begin is None else begin
    return start


def search_options(
    config: Config, values: Mapping[str, Any], chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """Return generation settings by which transformers translates as `megarecur translate` does.

    Args:
        values: config.json.
        chosen: the other generation settings.
    """
    start, end = values[START], values["eos_token_id"]
    most = limit_of(config) or config.data.seq_length + MORE_TOKENS
    never = {*chosen.get("suppress_tokens", ()), start, values[PADDING]} - {end, None}
    return {
        START: start,
        "forced_eos_token_id": end,
        "max_length": 1 + most,  # The start token is counted.
        "num_beams": TranslateOptions().beam,
        "early_stopping": True,
        "length_penalty": 1.0,
        **({"suppress_tokens": sorted(never)} if never else {}),
    }


def suppress_missing(run: Run) -> dict[str, Any]:
    """Return generation settings that keep transformers from producing ids without a piece."""
    try:
        missing = load_tokenizer(run.tokenizer).missing_ids(run.config.model.vocab_size or 0)
    except DataError:
        return {}
    return {"suppress_tokens": missing} if missing else {}


def export_tokenizer(run: Run, target: Path) -> None:
    """Copy a Hugging Face tokenizer, or convert any other; warn if that is impossible."""
    source = Path(run.tokenizer)
    try:
        open_tokenizer(run)
    except (
        CheckpointError
    ) as error:  # Damaged, or changed since; the export uses the existing files.
        log.warning("%s", error)
    except DataError:
        pass  # Reported below, where it matters.
    if run.tokenizer != BYTES and not source.is_file():
        log.warning("%s is missing; the export has no tokenizer", source)
    elif run.tokenizer != BYTES and (
        "hugging_face" in run.state or source.read_bytes().lstrip()[:1] == b"{"
    ):
        copy_tokenizer(source.parent, target)
        if not (target / source.name).exists():
            create_file(target / "tokenizer.json", source.read_bytes())
        # transformers describes those of its own architectures itself.
        needs_class = "hugging_face" not in run.state or (target / compact.MODELLING).exists()
        is_alone = not (target / "tokenizer_config.json").exists()
        if needs_class and is_alone and (target / "tokenizer.json").exists():
            try:
                describe_hf_tokenizer(target)
            except DataError as error:
                log.warning("%s; AutoTokenizer will not read it", error)
        complete_hf_tokenizer(target)
    else:
        try:
            write_hf_tokenizer(run.tokenizer, target)
        except DataError as error:
            log.warning("%s; the export has no tokenizer", error)
            return
        if run.tokenizer != BYTES:  # A sentencepiece model, which llama.cpp reads.
            create_file(target / "tokenizer.model", source.read_bytes())


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file and sync it."""
    create_file(path, json.dumps(values, indent=2) + "\n")


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes `target` on success and is removed otherwise.

    Raises:
        ConfigError: `target` exists and is not empty, or cannot be created.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target}: exists and is not empty; choose another folder or remove it")
    try:
        with create_folder(Path(os.path.abspath(target))) as aside:
            yield aside
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error})") from None
