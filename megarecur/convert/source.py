"""Read a dense Hugging Face model, one layer at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarecur.config.load import validate
from megarecur.config.run import Config
from megarecur.convert.architecture import Architecture, Entry
from megarecur.convert.checksum import check_checksum
from megarecur.convert.gemma import GEMMA, GEMMA2, GEMMA3
from megarecur.convert.llama import LLAMA
from megarecur.convert.mistral import MISTRAL
from megarecur.convert.neox import NEOX
from megarecur.convert.olmo import OLMO2, OLMO3
from megarecur.convert.phi import PHI3
from megarecur.convert.qwen import QWEN2, QWEN3
from megarecur.convert.vit import VIT
from megarecur.errors import ConfigError, DataError
from megarecur.reading import check_inside, open_tensors
from megarecur.reading import read_json as read_value
from megarecur.recurrence.inventory import build_inventory

log = logging.getLogger(__name__)

ARCHITECTURES: dict[str, Architecture] = {
    a.model_type: a
    for a in (
        QWEN2,
        QWEN3,
        LLAMA,
        MISTRAL,
        OLMO2,
        OLMO3,
        PHI3,
        NEOX,
        GEMMA,
        GEMMA2,
        GEMMA3,
    )
}
"""Architectures by `model_type` of config.json. An export uses the first that can express the
model."""
OF_PICTURES: dict[str, Architecture] = {VIT.model_type: VIT}
"""Architectures of pictures, which are read only."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
PICKLE = ".bin"


class SourceModel:
    """A dense Hugging Face folder, of which one layer at a time is in memory.

        source = SourceModel("models/llama")
        source.config.model                      # our `model` section
        dict(source.outside())                   # embedding.weight, final_norm.weight, head.weight
        for i in range(source.num_layers):
            for name, tensor in source.layer(i): # blocks.{i}.attention.query.weight, ...
                ...

    Making one checks the whole folder from its headers alone: names, shapes, dtypes. Values are
    read on demand, always in fp32, under our global names and in our model's form: fused matrices
    are split, gains are the actual factors. Nothing is cached.

    Args:
        hf_dir: folder with config.json and safetensors.
        allow_pickles: read pytorch_model.bin if there are no safetensors. Only tensors are taken
            from it (`torch.load(weights_only=True)`), but a pickle is not a safe format.

    Attributes:
        architecture: maps its names to ours.
        values: values of its config.json.
        config: a dense `Config` around its `model` section; all other values are placeholders.
        num_layers: blocks of `config`, each used once.
        dtype: dtype of the stored tensors (float32, bfloat16 or float16); float32 if they differ.
        dtypes: dtype of each stored tensor, by its name in the folder.

    Raises:
        ConfigError: the architecture, or a value of config.json, is not supported.
        DataError: tensors are missing, damaged, superfluous or of other shapes (all are listed).
    """

    def __init__(self, hf_dir: str | Path, *, allow_pickles: bool = False) -> None:
        self.folder = Path(hf_dir)
        path = self.folder / "config.json"
        self.values = read_json(path)
        self.architecture = find_architecture(self.values, path)
        model, task, self.num_layers = read_model(self.architecture, self.values, path)
        images = None if task is None else read_normalisation(self.folder)
        self.config = placeholder_config(
            model, task, images, self.num_layers, "run", "tokenizer.json", path
        )
        self.files = find_weights(self.folder, allow_pickles)
        for file in sorted(set(self.files.values())):
            if file.suffix != PICKLE and file.is_file():
                check_checksum(file, path)
        self.names = self.architecture.names(self.config.model)
        self.dtypes = self.check()
        several = set(self.dtypes.values())
        self.dtype = several.pop() if len(several) == 1 else "float32"
        entries = self.names.all(range(self.num_layers))
        self._entries = {name: e for e in entries for name in e.ours}

    def tensor(self, name: str) -> Tensor:
        """Return one of our tensors by its global name, in fp32."""
        return next(t for n, t in self.read([self._entries[name]]) if n == name)

    def layer(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Yield (global name, tensor) of every parameter of `blocks.{index}`, in fp32."""
        return self.read(self.names.of_layer(index, index))

    def outside(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (global name, tensor) outside the layers: embedding, final norm, untied head."""
        return self.read([*self.names.first, *self.names.last])

    def read(self, entries: Iterable[Entry]) -> Iterator[tuple[str, Tensor]]:
        """Yield our tensors made from some of theirs, in fp32; each file is opened once."""
        by_file: dict[Path, list[Entry]] = {}
        for e in entries:
            by_file.setdefault(self.files[e.theirs], []).append(e)
        for path, some in by_file.items():
            with open_weights(path) as file:
                for e in some:
                    stored = file.get_tensor(e.theirs).to(torch.float32)
                    yield from zip(e.ours, e.read(stored, self.config.model), strict=True)

    def check(self) -> dict[str, str]:
        """Compare every tensor's name, shape and dtype with config.json; return the dtypes."""
        inventory, names, files = build_inventory(self.config), self.names, self.files
        entries = {e.theirs: e for e in names.all(range(self.num_layers))}
        tied_copy = self.config.model.tie_embeddings and names.head in files
        extra = sorted(
            name
            for name in files.keys() - entries.keys()
            if not name.endswith(names.ignored or ("\0",))
            and not (tied_copy and name == names.head)
        )
        title = self.architecture.title
        problems = [f"{name}: missing" for name in sorted(entries.keys() - files.keys())]
        problems += [f"{name}: not part of a {title} of this config" for name in extra]
        dtypes = {}
        for path in sorted({files[name] for name in entries if name in files}):
            with open_weights(path) as file:
                held = set(file.keys())
                for theirs, e in entries.items():
                    if files.get(theirs) != path:
                        continue
                    if theirs not in held:
                        problems.append(f"{theirs}: not in {path.name}, where the index has it")
                        continue
                    shape, dtype = file.describe(theirs)
                    parts = [inventory[name].shape for name in e.ours]
                    wanted = [sum(part[0] for part in parts), *parts[0][1:]]
                    if e.shape is not None:
                        wanted = list(e.shape(self.config))
                    if shape != wanted:
                        problems.append(f"{theirs}: shape {shape}, config.json: {wanted}")
                    if dtype not in DTYPES:
                        problems.append(
                            f"{theirs}: torch.{dtype} is not one of {', '.join(DTYPES)}"
                        )
                    dtypes[theirs] = dtype
        if tied_copy and not problems:
            problems += self.find_tied_fault()
        if problems:
            raise DataError(
                f"{self.folder}: {len(problems)} tensor(s) do not fit config.json; download both "
                "again" + "".join(f"\n  {problem}" for problem in problems[:20])
                + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
            )  # fmt: skip
        return dtypes

    def find_tied_fault(self) -> list[str]:
        """Return the fault if a head stored beside its tied embedding differs from it."""
        tables = []
        for name in (self.names.first[0].theirs, self.names.head):
            with open_weights(self.files[name]) as file:
                tables.append(file.get_tensor(name).to(torch.float32))
        if torch.equal(*tables):
            return []
        return [
            f"{self.names.head}: differs from {self.names.first[0].theirs} although "
            "tie_word_embeddings=true; set tie_word_embeddings to false in config.json"
        ]


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file."""
    try:
        values = read_value(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read as JSON ({error}); give the folder of a Hugging Face model"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: holds {type(values).__name__}, not an object; download it again"
        )
    return values


def find_architecture(values: dict[str, Any], path: Path) -> Architecture:
    """Return the architecture that config.json names.

    Raises:
        ConfigError: the message lists the known ones.
    """
    kind = values.get("model_type")
    architectures = ARCHITECTURES | OF_PICTURES
    if kind not in architectures:
        known = ", ".join(architectures)
        raise ConfigError(
            f"{path}: model_type={kind!r} is not supported; convert a model of one of {known}"
        )
    return architectures[kind]


def read_model(
    architecture: Architecture, values: dict[str, Any], path: Path
) -> tuple[dict[str, Any], dict[str, Any] | None, int]:
    """Return our `model` section, our `task` section if it classifies pictures, and the number of
    layers.

    Raises:
        ConfigError: the message lists every key with an unsupported value, with the remedy.
    """
    problems = architecture.find_problems(values)
    model = {} if problems else architecture.read_config(values, problems)
    task = None
    if architecture.read_task is not None:
        task = architecture.read_task(values, problems)
    if problems:
        raise ConfigError(f"{path}: cannot be converted" + "".join(f"\n  {p}" for p in problems))
    return model, task, values["num_hidden_layers"]


def placeholder_config(
    model: dict[str, Any],
    task: dict[str, Any] | None,
    images: dict[str, Any] | None,
    num_layers: int,
    run_dir: str,
    tokenizer: str,
    origin: Path,
) -> Config:
    """Return a valid dense config around a model section and, of pictures, the sections `task` and
    `data.images`."""
    data: dict[str, Any] = {"train": [{"path": "data/train"}]}
    if task is not None:
        data["images"] = images
    else:
        data |= {"tokenizer": tokenizer, "seq_length": model["max_positions"]}
    values = {
        "run_dir": run_dir,
        "model": model,
        "recurrence": {"kind": "dense", "num_layers": num_layers},
        "task": task,
        "data": data,
        "optimizer": {"lr": 1e-5},
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
    }
    return validate(values, str(origin))


def read_normalisation(folder: Path) -> dict[str, Any] | None:
    """Return our section `data.images` with the mean and deviation by which a model's pictures are
    normalised, from preprocessor_config.json; None, with a warning, if it does not state them."""
    path = folder / "preprocessor_config.json"
    values = read_json(path) if path.is_file() else {}
    if values.get("do_normalize") is False:
        channels = len(values.get("image_mean") or (0.0,) * 3)
        return {"mean": [0.0] * channels, "std": [1.0] * channels}
    if values.get("image_mean") is None or values.get("image_std") is None:
        log.warning(
            "%s does not state image_mean and image_std, by which pictures are normalised; set "
            "data.images.mean and data.images.std before giving the run pictures",
            path,
        )
        return None
    return {"mean": values["image_mean"], "std": values["image_std"]}


# --------------------------------------------------------------------------------------- weights


def find_weights(hf_dir: Path, allow_pickles: bool = False) -> dict[str, Path]:
    """Return every tensor of the folder, with the file that holds it.

    Safetensors have priority over pickles, and a single file over an index of several, as in
    transformers.
    """
    for stem, ending in (("model", ".safetensors"), ("pytorch_model", PICKLE)):
        if ending == PICKLE and not allow_pickles:
            continue
        index = hf_dir / f"{stem}{ending}.index.json"
        single = hf_dir / f"{stem}{ending}"
        if single.is_file():
            if index.is_file():
                log.warning(
                    "%s is read and %s is not, as in transformers; remove the one that is stale",
                    single,
                    index.name,
                )
            with open_weights(single) as file:
                return dict.fromkeys(file.keys(), single)
        if index.is_file():
            table = read_json(index).get("weight_map")
            if not isinstance(table, dict) or not all(
                isinstance(name, str) and name.endswith(ending) for name in table.values()
            ):
                raise DataError(f"{index}: its weight_map does not name files of the folder")
            try:
                check_inside(hf_dir, table.values())
            except ValueError as error:
                raise DataError(f"{index}: {error}; download it again") from None
            return {tensor: hf_dir / name for tensor, name in table.items()}
    pickles = sorted(p.name for p in hf_dir.glob(f"pytorch_model*{PICKLE}"))
    if pickles and not allow_pickles:
        raise ConfigError(
            f"{hf_dir / pickles[0]}: is a pickle, which can run any code and is read only on "
            "request; load it with transformers and save it again with safe_serialization=True, "
            "or pass --allow-pickles, which reads only tensors from it"
        )
    raise ConfigError(
        f"{hf_dir}: has no model.safetensors (or model.safetensors.index.json); download it again"
    )


class Tensors:
    """An open file of tensors: safetensors, or the contents of a pickle."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def keys(self) -> list[str]:
        """Names."""
        return list(self.file.keys())

    def get_tensor(self, name: str) -> Tensor:
        """Return the stored values of a tensor."""
        opened = self.file
        tensor: Tensor = opened[name] if isinstance(opened, dict) else opened.get_tensor(name)
        return tensor

    def describe(self, name: str) -> tuple[list[int], str]:
        """Return shape and dtype (float32, bfloat16, int8, ...), from the header if there is
        one."""
        if isinstance(self.file, dict):
            tensor = self.file[name]
            return list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        header = self.file.get_slice(name)
        code = header.get_dtype()
        dtype = next((d for d, c in SAFETENSORS_DTYPES.items() if c == code), None)
        if dtype is None:
            dtype = str(self.file.get_tensor(name).dtype).removeprefix("torch.")
        return list(header.get_shape()), dtype


@contextmanager
def open_weights(path: Path) -> Iterator[Tensors]:
    """Open a file of tensors; errors name it."""
    if path.suffix == PICKLE:
        yield Tensors(load_pickle(path))
        return
    try:
        with open_tensors(path) as file:
            yield Tensors(file)
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}); download it again") from None


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickle, mapped from the file if its format allows it."""
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged or hostile file may raise any error.
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: cannot be read ({line}); download it again") from None
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise DataError(f"{path}: does not map names to tensors; download it again")
    size = path.stat().st_size
    for name, tensor in found.items():
        # A pickle may describe a tensor of any shape over a few bytes.
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > size:
            raise DataError(
                f"{path}: {name!a:.80} claims {list(tensor.shape)} {tensor.dtype}, more than the "
                f"file's {size} bytes; download it again"
            )
    return found
