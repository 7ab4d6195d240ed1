"""Stored teacher distributions of a run's samples: the top-k tokens of every position.

Samples are a function of (seed, step). So the teacher evaluates each sample only once, before all
runs that learn from it, and no run has to hold the teacher in memory. For every position, the k
most likely tokens are stored. The remaining probability is spread evenly over all other tokens.

    FOLDER/teacher.json              teacher and samples; sizes and hashes of the other files
    FOLDER/samples-00000.safetensors `ids` and `log_probs` [samples, S, k], int32 and float16
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from megarecur.batch import Batch
from megarecur.config.run import Config
from megarecur.data.corpus import Corpus
from megarecur.data.loader import Loader, MicroBatch
from megarecur.data.mapped_files import find_fault, hash_file
from megarecur.errors import ConfigError, DataError
from megarecur.files import replace_file
from megarecur.parallel.context import WHOLE, ContextParallel
from megarecur.parallel.head_loss import Target
from megarecur.parallel.regions import TensorParallel
from megarecur.parallel.transfer import send
from megarecur.reading import open_tensors, read_json, read_object

RECORD = "teacher.json"
BYTES_PER_FILE = 2**28
ENTRY_BYTES = 6

TeacherLogits = Callable[[MicroBatch], Tensor]
"""Function that returns the logits [N, V] of a micro batch's tokens."""


def describe_samples(config: Config, tokenizer: str, corpora: Sequence[Corpus]) -> dict[str, Any]:
    """Return the settings that determine the tokens of a run's samples."""
    data = config.data
    return {
        "seed": config.seed,
        "train.global_batch_size": config.train.global_batch_size,
        "data.seq_length": data.seq_length,
        "data.shuffle": data.shuffle,
        "data.shuffle_shards": data.shuffle_shards,
        "data.mask_documents": data.mask_documents,
        "data.train": [[c.fingerprint, s.weight] for c, s in zip(corpora, data.train, strict=True)],
        "data.tokenizer": tokenizer,
        "model.vocab_size": config.model.vocab_size,
    }


class StoredTeacher:
    """A teacher that reads stored distributions.

    Args:
        folder: the output folder of `write_down`.
        tp: the ranks that share the vocabulary.
        cp: the ranks that share each sequence.
    """

    def __init__(self, folder: str | Path, tp: TensorParallel, cp: ContextParallel = WHOLE) -> None:
        self.folder, self.tp, self.cp = Path(folder), tp, cp
        record = read_record(folder)
        self.vocab_size = int(record["samples"]["model.vocab_size"])
        self.per_file = int(record["samples_per_file"])

    def target(self, batch: Batch) -> Target:
        """Return a function that gives logits of a slice of a micro batch's tokens, up to a
        constant: [n, V], or this rank's shard of V."""
        kept = [self.read(int(sample)) for sample in batch.sample_ids_B.tolist()]
        device = batch.tokens_BS.device
        ids_NK, log_p_NK = (send(torch.cat(parts), device) for parts in zip(*kept, strict=True))
        return lambda part: self.spread(ids_NK[part], log_p_NK[part].to(torch.float32))

    def spread(self, ids_NK: Tensor, log_p_NK: Tensor) -> Tensor:
        """Return logits [N, V] of the most likely tokens and the rest, or this rank's shard."""
        first, end = (self.vocab_size * r // self.tp.size for r in (self.tp.rank, self.tp.rank + 1))
        rest = max(self.vocab_size - ids_NK.shape[1], 1)
        # Rounding may leave zero or less for the other tokens.
        left_N = (1.0 - log_p_NK.exp().sum(-1)).clamp_min(1e-6)
        # An extra column takes the tokens of other ranks.
        logits_NV = (left_N / rest).log()[:, None].repeat(1, end - first + 1)
        own_NK = (ids_NK >= first) & (ids_NK < end)
        logits_NV.scatter_(-1, torch.where(own_NK, ids_NK - first, end - first), log_p_NK)
        return logits_NV[:, :-1].contiguous()

    def read(self, sample: int) -> tuple[Tensor, Tensor]:
        """Read the ids and log-probabilities [P, k] of this context rank's positions of a
        sample."""
        number, row = divmod(sample, self.per_file)
        path = self.folder / file_name(number)
        try:
            with open_tensors(path) as file:
                whole = (file.get_slice(name)[row] for name in ("ids", "log_probs"))
                ids, log_probs = (self.cp.own(values, dim=0) for values in whole)
        except (OSError, ValueError, IndexError) as error:
            raise DataError(
                f"{path}: cannot be read ({error}); delete it and run `megarecur prep teacher` "
                "again"
            ) from None
        return ids.to(torch.int64), log_probs


def file_name(number: int) -> str:
    """Return the name of the file whose first sample is number x samples_per_file."""
    return f"samples-{number:05d}.safetensors"


def read_record(folder: str | Path) -> dict[str, Any]:
    """Read teacher.json.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    path = Path(folder) / RECORD
    try:
        record = read_object(path)
    except FileNotFoundError:
        raise DataError(
            f"{folder}: holds no teacher's distributions (no {RECORD}); make or complete them with "
            "`megarecur prep teacher CONFIG --out FOLDER`"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); make it anew") from None
    return record


def read_begun(path: Path) -> Any:
    """Return the record of a folder that was begun; None if it cannot be read."""
    try:
        return read_json(path)
    except (ValueError, OSError):
        return None


def check_stored(
    config: Config, tokenizer: str, corpora: Sequence[Corpus], folder: str, hashed: bool
) -> str:
    """Check that stored distributions fit the run's samples; returns the teacher's fingerprint.

    Args:
        folder: the output folder of `write_down`.
        hashed: whether to check the hashes of files, not only their sizes.

    Raises:
        ConfigError: they are for other samples or too few steps; one line per difference.
        DataError: missing or damaged files.
    """
    record = read_record(folder)
    wrong = [
        f"{key} is {value}, they were made with {record['samples'].get(key)}"
        for key, value in describe_samples(config, tokenizer, corpora).items()
        if record["samples"].get(key) != value
    ]
    if config.train.steps > record["steps"]:
        wrong.append(f"train.steps={config.train.steps}, they end with step {record['steps']}")
    if wrong:
        raise ConfigError(
            f"distill.stored={folder} is not about the samples of this run:"
            + "".join(f"\n  {line}" for line in wrong)
            + "\n  use the config that they were made with, or make others"
        )
    faults = {
        name: find_fault(Path(folder) / name, f, hashed) for name, f in record["files"].items()
    }
    bad = [f"{Path(folder) / name} {fault}" for name, fault in faults.items() if fault]
    if bad:
        raise DataError("; ".join(bad[:5]) + "; delete them and run `megarecur prep teacher` again")
    return f"{record['teacher']}-top{record['top_k']}"


def write_down(
    config: Config,
    tokenizer: str,
    loader: Loader,
    ask: TeacherLogits,
    folder: Path,
    top_k: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Store a teacher's distributions for all samples of a run; complete files are kept.

    Args:
        config: the run, with the vocabulary and the teacher's fingerprint resolved.
        loader: a loader of one replica, which reads every sample.
        folder: the folder to create or complete.
        top_k: number of tokens to store per position.
        advance: called with the number of finished tokens.

    Raises:
        ConfigError: top_k exceeds the vocabulary, or the folder was started with other settings.
    """
    assert config.distill is not None and config.model.vocab_size is not None
    if not 0 < top_k <= config.model.vocab_size:
        raise ConfigError(
            f"top_k={top_k} must be at least 1 and at most model.vocab_size="
            f"{config.model.vocab_size}"
        )
    size, length = config.train.global_batch_size, config.data.seq_length
    steps_per_file = max(BYTES_PER_FILE // (size * length * top_k * ENTRY_BYTES), 1)
    record: dict[str, Any] = {
        "samples": describe_samples(config, tokenizer, loader.corpora),
        "teacher": config.distill.fingerprint,
        "top_k": top_k,
        "samples_per_file": steps_per_file * size,
    }
    folder.mkdir(parents=True, exist_ok=True)
    begun = folder / "begun.json"
    if begun.exists() and read_begun(begun) != record:
        raise ConfigError(
            f"{folder}: was begun with another config, teacher or top_k; choose another folder, or "
            "delete it"
        )
    replace_file(begun, json.dumps(record))
    files = {}
    for number, start in enumerate(range(0, config.train.steps, steps_per_file)):
        steps = range(start, min(start + steps_per_file, config.train.steps))
        path = folder / file_name(number)
        if not path.exists() or len_of(path) < len(steps) * size:
            write_samples(path, loader, ask, steps, top_k, advance)
        else:
            advance(len(steps) * size * length)
        files[path.name] = {"bytes": path.stat().st_size, "xxh64": hash_file(path)}
    replace_file(
        folder / RECORD, json.dumps(record | {"steps": config.train.steps, "files": files})
    )


def len_of(path: Path) -> int:
    """Return the number of samples in a file; 0 if it is damaged."""
    try:
        with open_tensors(path) as file:
            return int(file.get_slice("ids").get_shape()[0])
    except (ValueError, IndexError):
        return 0


def write_samples(
    path: Path,
    loader: Loader,
    ask: TeacherLogits,
    steps: range,
    top_k: int,
    advance: Callable[[int], None],
) -> None:
    """Write the file of the given steps."""
    ids, log_probs = [], []
    for step in steps:
        for batch in loader.batch(step):
            log_p_NV = ask(batch).to(torch.float32).log_softmax(-1)
            top = log_p_NV.topk(top_k)
            shape = (*batch.tokens_BS.shape, top_k)
            ids.append(top.indices.to(torch.int32).view(shape).cpu())
            log_probs.append(top.values.to(torch.float16).view(shape).cpu())
            advance(batch.tokens_BS.numel())
    tensors = {"ids": torch.cat(ids), "log_probs": torch.cat(log_probs)}
    replace_file(path, safetensors.torch.save(tensors))
