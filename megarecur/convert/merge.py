"""Average checkpoints of a run into a new run, as fairseq's `average_checkpoints` does.

    merge_checkpoints(Path("runs/wmt"), Path("runs/wmt-average"), last=10)

Each parameter is the mean of its values, summed in fp64 and rounded once to the dtype of the
checkpoints (fp32; fp64 for runs of precision fp64). Tensors are averaged one at a time, so that
memory holds two of them, not two models. Averaging the last checkpoints stands for the
optimizer's own average of its iterates (Polyak & Juditsky 1992; Vaswani et al. 2017, section 6.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from importlib.metadata import version
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megarecur.checkpoint import checkpoint
from megarecur.checkpoint.index import DTYPES, DamagedCheckpoint, Index, read_index
from megarecur.checkpoint.storage import ChunkReader
from megarecur.config.load import load_config, to_yaml
from megarecur.config.locate import record_origin
from megarecur.config.run import Config
from megarecur.convert.hf import written_aside
from megarecur.data.tokenizer import copy_tokenizer_files
from megarecur.errors import CheckpointError, ConfigError
from megarecur.files import create_file
from megarecur.parallel.shards import whole
from megarecur.recurrence.inventory import build_inventory


def merge_checkpoints(
    run_dir: Path,
    out: Path,
    *,
    last: int | None = None,
    steps: Sequence[int] | None = None,
    progress: Callable[[int], AbstractContextManager[object]] = nullcontext,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Path:
    """Write a new run whose parameters are the mean of checkpoints of a run.

    The new run has the config and the tokenizer of the old one and a single checkpoint, named by
    the newest of the averaged steps, without optimizer state: `eval`, `translate`, `generate`,
    `export` and `init_from` read it. Returns the checkpoint's path.

    Args:
        run_dir: the run.
        out: folder to make.
        last: number of newest checkpoints to average; one of this and `steps` must be given.
        steps: steps of the checkpoints to average.
        progress: context entered with the total number of bytes to read.
        advance: called with the number of bytes of each checkpoint's tensor that was read.

    Raises:
        ConfigError: run_dir is not a run folder; a wrong choice of steps; `out` exists.
        CheckpointError: the run has fewer checkpoints than `last`, or lacks some of `steps`; or
            some are damaged or do not fit the run's config, all of which are listed.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(
            f"{run_dir}: is no run folder (it has no config.yaml); give the run_dir of a training "
            "run"
        )
    paths = choose_checkpoints(run_dir / "checkpoints", last, steps)
    config = load_config(run_dir / "config.yaml")
    indices = read_parameter_indices(paths, config)
    shapes = {name: spec.shape for name, spec in build_inventory(config).items()}
    dtypes = {name: DTYPES[indices[-1].tensors[name].dtype] for name in shapes}
    with ExitStack() as stack:
        # Before any work, so that an existing folder is refused at once.
        aside = stack.enter_context(written_aside(out))
        readers = [
            stack.enter_context(ChunkReader(path, index))
            for path, index in zip(paths, indices, strict=True)
        ]
        bytes_of = {name: prod(shapes[name]) * dtypes[name].itemsize for name in shapes}
        stack.enter_context(progress(2 * len(paths) * sum(bytes_of.values())))

        def advance_by(name: str) -> None:
            advance(bytes_of[name])

        check_parameters(readers, indices, list(shapes), advance_by)

        def average(name: str) -> Tensor:
            total = torch.zeros(shapes[name], dtype=torch.float64)
            for reader, index in zip(readers, indices, strict=True):
                for chunk in index.tensors[name].chunks:
                    part = tuple(
                        slice(o, o + n) for o, n in zip(chunk.offset, chunk.shape, strict=True)
                    )
                    total[part] += reader.read(name, chunk)
                advance_by(name)
            return (total / len(readers)).to(dtypes[name])

        copy_tokenizer_files(config.data.tokenizer, aside)
        record_origin(aside, config, out)
        config = config.model_copy(update={"run_dir": str(out)})
        create_file(aside / "config.yaml", to_yaml(config))
        newest = indices[-1].state
        names = ("step", "tokens", "skipped", "layer_map", "tokenizer", "hugging_face")
        state = {name: newest[name] for name in names if name in newest} | {
            "data": {},
            "config": config.model_dump(mode="json"),
            "merged": {
                "run": str(run_dir),
                "steps": [checkpoint.step_of(path.name) for path in paths],
            },
            "versions": {"megarecur": version("megarecur"), "torch": torch.__version__},
        }
        shards = {
            name: whole(torch.empty(shape, dtype=dtypes[name], device="meta"))
            for name, shape in shapes.items()
        }
        step = checkpoint.step_of(paths[-1].name)
        saved = checkpoint.save(aside / "checkpoints", step, shards, state, values=average).result()
    return out / saved.relative_to(aside)


def choose_checkpoints(root: Path, last: int | None, steps: Sequence[int] | None) -> list[Path]:
    """Return the checkpoints to average, oldest first.

    Raises:
        ConfigError: not exactly one of `last` and `steps`, fewer than one, or a step given twice.
        CheckpointError: too few checkpoints, or none of some steps.
    """
    if (last is None) == (steps is None):
        raise ConfigError("merge: needs --last N or --steps 100,200, not both; give one of them")
    found = {checkpoint.step_of(path.name): path for path in checkpoint.list_checkpoints(root)}
    kept = f"kept: {', '.join(map(str, found)) or 'none'}"
    if steps is None:
        assert last is not None
        if last < 1:
            raise ConfigError(f"--last {last}: must be at least 1; raise it")
        if len(found) < last:
            raise CheckpointError(
                f"{root}: has {len(found)} checkpoint(s), fewer than --last {last} ({kept}); lower "
                "--last, or train with a larger checkpoint.keep_last"
            )
        return [found[step] for step in sorted(found)[-last:]]
    if not steps or len(set(steps)) < len(steps):
        raise ConfigError(
            f"--steps {','.join(map(str, steps))}: must name different steps; give each once"
        )
    missing = sorted(set(steps) - found.keys())
    if missing:
        raise CheckpointError(
            f"{root}: has no checkpoint of step {', '.join(map(str, missing))} ({kept}); choose "
            "others"
        )
    return [found[step] for step in sorted(steps)]


def read_parameter_indices(paths: Sequence[Path], config: Config) -> list[Index]:
    """Return the indices of checkpoints that have every parameter of a config.

    Raises:
        CheckpointError: an index is damaged, or parameters are missing or of another shape or
            dtype; all of them are listed.
    """
    indices: list[Index] = []
    faults: list[str] = []
    inventory = build_inventory(config)
    for path in paths:
        try:
            index = read_index(path)
        except DamagedCheckpoint as error:
            faults.append(str(error))
            continue
        for name, spec in inventory.items():
            found = index.tensors.get(name)
            if found is None:
                faults.append(f"{path}: has no parameter {name} of this run")
            elif tuple(found.shape) != tuple(spec.shape):
                faults.append(f"{path}: {name} has shape {found.shape}, here {list(spec.shape)}")
            elif indices and found.dtype != indices[0].tensors[name].dtype:
                faults.append(f"{path}: {name} is {found.dtype}, unlike {paths[0].name}'s")
        indices.append(index)
    refuse(faults)
    return indices


def check_parameters(
    readers: Sequence[ChunkReader],
    indices: Sequence[Index],
    names: Sequence[str],
    advance: Callable[[str], None],
) -> None:
    """Verify the bytes of every parameter before anything is written.

    Raises:
        CheckpointError: listing everything that is damaged.
    """
    faults: dict[str, None] = {}
    for reader, index in zip(readers, indices, strict=True):
        for name in names:
            for chunk in index.tensors[name].chunks:
                try:
                    reader.check(name, chunk)
                except DamagedCheckpoint as error:
                    faults[str(error)] = None
            advance(name)
    refuse(list(faults))


def refuse(faults: Sequence[str]) -> None:
    """Raise the faults of checkpoints as one error, if there are any."""
    if faults:
        raise CheckpointError(
            "merge: some checkpoints cannot be averaged; restore them, or choose others with "
            "--steps:" + "".join(f"\n  {fault}" for fault in faults)
        )
