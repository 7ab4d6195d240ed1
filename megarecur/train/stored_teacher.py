"""What a teacher says about a run's samples, written down before the run: its likeliest tokens.

Samples are a function of (seed, step), so that a teacher need be asked about each only once, before
all runs that learn from it, and no run has to hold it. Of every position the k likeliest tokens are
kept; what is left of the distribution is spread evenly over all others.

    FOLDER/teacher.json              what it was made of and for, sizes and hashes of the others
    FOLDER/samples-00000.safetensors `ids` and `log_probs` [samples, S, k], int32 and float16
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from megarecur.config.schema import Config
from megarecur.config.write import write_aside
from megarecur.data.corpus import Corpus, find_fault, hash_file
from megarecur.data.loader import Loader, MicroBatch
from megarecur.errors import ConfigError, DataError
from megarecur.model.transformer import Batch
from megarecur.parallel.regions import TensorParallel
from megarecur.train.checkpoint_storage import write_file

RECORD = "teacher.json"
BYTES_PER_FILE = 2**28
ENTRY_BYTES = 6

Ask = Callable[[MicroBatch], Tensor]
"""Logits [N, V] of a micro batch's tokens."""


def describe_samples(config: Config, tokenizer: str, corpora: Sequence[Corpus]) -> dict[str, Any]:
    """What decides which tokens sample i of a run has."""
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
    """The teacher of a run that reads what was written down.

    Args:
        folder: made by `write_down`.
        tp: the ranks that share the vocabulary.
    """

    def __init__(self, folder: str | Path, tp: TensorParallel) -> None:
        self.folder, self.tp = Path(folder), tp
        record = read_record(folder)
        self.vocab_size = int(record["samples"]["model.vocab_size"])
        self.per_file = int(record["samples_per_file"])

    def logits(self, batch: Batch) -> Tensor:
        """[N, V] of a micro batch's tokens, up to a constant, or this rank's shard of the
        vocabulary."""
        kept = [self.read(int(sample)) for sample in batch.sample_ids_B.tolist()]
        device = batch.tokens_BS.device
        ids_NK, log_p_NK = (torch.cat(parts).to(device) for parts in zip(*kept, strict=True))
        log_p_NK = log_p_NK.to(torch.float32)
        first, end = (self.vocab_size * r // self.tp.size for r in (self.tp.rank, self.tp.rank + 1))
        rest = max(self.vocab_size - ids_NK.shape[1], 1)
        # Rounding may leave nothing, or less, for all others.
        left_N = (1.0 - log_p_NK.exp().sum(-1)).clamp_min(1e-6)
        # One column more takes what other ranks have.
        logits_NV = (left_N / rest).log()[:, None].repeat(1, end - first + 1)
        own_NK = (ids_NK >= first) & (ids_NK < end)
        logits_NV.scatter_(-1, torch.where(own_NK, ids_NK - first, end - first), log_p_NK)
        return logits_NV[:, :-1].contiguous()

    def read(self, sample: int) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities [S, k] of a sample."""
        number, row = divmod(sample, self.per_file)
        with safe_open(self.folder / file_name(number), "pt") as file:
            ids, log_probs = (file.get_slice(name)[row] for name in ("ids", "log_probs"))
        return ids.to(torch.int64), log_probs


def file_name(number: int) -> str:
    """Of the file that has samples number x samples_per_file and on."""
    return f"samples-{number:05d}.safetensors"


def read_record(folder: str | Path) -> dict[str, Any]:
    """What teacher.json says.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    path = Path(folder) / RECORD
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(
            f"{folder}: holds no teacher's distributions (no {RECORD}); make or complete them with "
            "`megarecur prep teacher CONFIG --out FOLDER`"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); make it anew") from None
    assert isinstance(record, dict)
    return record


def check_stored(
    config: Config, tokenizer: str, corpora: Sequence[Corpus], folder: str, hashed: bool
) -> str:
    """The fingerprint of what a teacher said, if it is about this run's samples.

    Raises:
        ConfigError: other samples, or too few; every difference is a line.
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
    ask: Ask,
    folder: Path,
    top_k: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Ask a teacher about all samples of a run. Files that are complete are not made again.

    Args:
        config: the run, with the vocabulary and the teacher's fingerprint resolved.
        tokenizer: fingerprint of the run's own.
        loader: of one replica, which reads every sample.
        ask: the teacher.
        folder: to make, or to complete.
        top_k: tokens to keep of each position.
        advance: told of tokens as they are done.

    Raises:
        ConfigError: top_k beyond the vocabulary, or a folder made for something else.
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
    if begun.exists() and json.loads(begun.read_text()) != record:
        raise ConfigError(
            f"{folder}: was begun with another config, teacher or top_k; choose another folder, or "
            "delete it"
        )
    write_aside(begun, json.dumps(record))
    files = {}
    for number, start in enumerate(range(0, config.train.steps, steps_per_file)):
        steps = range(start, min(start + steps_per_file, config.train.steps))
        path = folder / file_name(number)
        if not path.exists() or len_of(path) < len(steps) * size:
            write_samples(path, loader, ask, steps, top_k, advance)
        else:
            advance(len(steps) * size * length)
        files[path.name] = {"bytes": path.stat().st_size, "xxh64": hash_file(path)}
    write_aside(folder / RECORD, json.dumps(record | {"steps": config.train.steps, "files": files}))


def len_of(path: Path) -> int:
    """Samples of a file."""
    with safe_open(path, "pt") as file:
        return int(file.get_slice("ids").get_shape()[0])


def write_samples(
    path: Path, loader: Loader, ask: Ask, steps: range, top_k: int, advance: Callable[[int], None]
) -> None:
    """One file, aside and then renamed."""
    ids, log_probs = [], []
    for step in steps:
        for batch in loader.batch(step):
            log_p_NV = ask(batch).to(torch.float32).log_softmax(-1)
            top = log_p_NV.topk(top_k)
            shape = (*batch.tokens_BS.shape, top_k)
            ids.append(top.indices.to(torch.int32).view(shape).cpu())
            log_probs.append(top.values.to(torch.float16).view(shape).cpu())
            advance(batch.tokens_BS.numel())
    aside = path.with_suffix(".tmp")
    aside.unlink(missing_ok=True)
    tensors = {"ids": torch.cat(ids), "log_probs": torch.cat(log_probs)}
    write_file(aside, safetensors.torch.save(tensors))
    aside.rename(path)
