"""Splits of Hugging Face datasets as sources of text, streamed by the library datasets.

    hf://allenai/c4:en@train        a dataset of the Hub, its config and its split
    hf:exports/mine@train a local folder that the library can load, or has saved

Each of a split's own shards (usually its files) is one source, read by one task and never held
whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import xxhash

from megarecur.data.mapped_files import hash_file
from megarecur.data_prep.tables import columns_of
from megarecur.errors import ConfigError, DataError
from megarecur.reading import read_object

PREFIX = "hf:"
SYNTAX = "hf://NAME[:CONFIG][@SPLIT] for one of the Hub, hf:FOLDER[@SPLIT] for a local one"
COMMIT = re.compile(r"^hf://datasets/[^@]+@([0-9a-f]{40})/")
UNKNOWN_BYTES = 1 << 22


@dataclass(frozen=True)
class HubShard:
    """One shard of a split."""

    path: str
    """Name on the Hub, or absolute path of a folder."""
    config: str | None
    split: str
    revision: str | None
    """Commit of the Hub whose files were listed, so that all tasks read the same ones."""
    index: int
    num_shards: int
    size: int
    """Stored bytes, or an estimate."""
    digest: str
    """Identity of the content."""
    file: str | None = None
    """The local file of the shard, if it is exactly one file."""

    @property
    def name(self) -> str:
        """Name in manifests: the folder's name without its location."""
        name = Path(self.path).name if os.path.isabs(self.path) else self.path
        config = f":{self.config}" if self.config else ""
        return f"{PREFIX}{name}{config}@{self.split}/{self.index:05}-of-{self.num_shards:05}"

    def __str__(self) -> str:
        return self.name


def find_shards(entry: str) -> list[HubShard]:
    """Return the shards of the split that `hf:...` names, in the dataset's own order.

    Raises:
        ConfigError: the library is not installed.
        DataError: the dataset, config or split does not exist.
    """
    if find_spec("datasets") is None:
        raise ConfigError(
            f"{entry}: needs the library datasets, which is not installed; "
            "pip install 'megarecur[hub]', or give files"
        )
    path, config, split = _parse(entry)
    datasets = _import()
    try:
        builder = datasets.load_dataset_builder(**_request(path, config))
        files_of = builder.config.data_files or {}
        splits = [str(name) for name in files_of or builder.info.splits or {}]
        chosen = split or ("train" if "train" in splits or len(splits) != 1 else splits[0])
        if chosen in splits:
            files = list(files_of[chosen]) if files_of else []
            origins = list(getattr(files_of.get(chosen), "origin_metadata", []))
            commits = {found[1] for file in files if (found := COMMIT.match(file))}
            revision = commits.pop() if len(commits) == 1 else None
            num_shards = _load(path, config, chosen, revision).num_shards
            split_bytes = getattr((builder.info.splits or {}).get(chosen), "num_bytes", None)
    except Exception as error:  # the library raises its own errors, network errors, and ValueError
        raise DataError(
            f"{entry}: datasets cannot open it ({_reason(error)}); use {SYNTAX}"
        ) from None
    if chosen not in splits:
        raise DataError(f"{entry}: has no split {chosen}, but {', '.join(splits)}; use {SYNTAX}")
    identities = [_identify(file, origins[i : i + 1]) for i, file in enumerate(files)]
    if len(files) != num_shards:  # The library decides which file is in which shard.
        identities = [json.dumps([identities, i]) for i in range(num_shards)]
    guess = (split_bytes or 0) // num_shards or UNKNOWN_BYTES
    local = len(files) == num_shards and all(map(os.path.isfile, files))
    return [
        HubShard(
            path, config, chosen, revision, i, num_shards,
            size=os.path.getsize(files[i]) if local else guess,
            digest=_digest(config, identity),
            file=files[i] if local else None,
        )
        for i, identity in enumerate(identities)
    ]  # fmt: skip


def digest_again(shard: HubShard) -> str:
    """Return the current identity of a shard's source.

    Only local files that form one shard each are hashed again. Remote shards are read at the
    recorded commit; others keep the recorded identity.
    """
    if shard.file is None:
        return shard.digest
    return _digest(shard.config, _identify(shard.file, ()))


def read_shard(shard: HubShard, fields: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of one shard, streamed.

    Raises:
        DataError: the shard cannot be read, or lacks a column.
    """
    number = 0
    try:
        rows = _load(shard.path, shard.config, shard.split, shard.revision)
        rows = rows.shard(shard.num_shards, shard.index)
        if rows.column_names is not None:
            rows = rows.select_columns(columns_of(shard, fields, rows.column_names))
        for number, row in enumerate(rows, 1):
            if number == 1:
                columns_of(shard, fields, list(row))
            yield f"{shard}: row {number}", row
    except DataError:
        raise
    except Exception as error:  # errors of the library, the network, or the format
        raise DataError(
            f"{shard}: datasets cannot read on after row {number} ({_reason(error)}); run the same "
            "command again; finished work is kept"
        ) from None


def read_column_names(shard: HubShard) -> list[str]:
    """Return the columns of a shard.

    Raises:
        DataError: the dataset cannot be read.
    """
    try:
        rows = _load(shard.path, shard.config, shard.split, shard.revision)
        return list(rows.column_names or next(iter(rows), {}))
    except Exception as error:  # errors of the library, the network, or the format
        raise DataError(f"{shard}: datasets cannot read it ({_reason(error)})") from None


def _parse(entry: str) -> tuple[str, str | None, str | None]:
    """Return path or name, config and split; a folder's name may contain an @ or a colon."""
    rest = entry.removeprefix(PREFIX).removeprefix("//")
    path, config, split = rest, "", ""
    if not os.path.exists(path) and "@" in path:
        path, _, split = path.rpartition("@")
    if not os.path.exists(path) and ":" in path:
        path, _, config = path.rpartition(":")
    if not path or (rest.endswith(("@", ":")) and not os.path.exists(rest)):
        raise DataError(f"{entry}: names no dataset; use {SYNTAX}")
    return os.path.abspath(path) if os.path.exists(path) else path, config or None, split or None


def _digest(config: str | None, identity: Any) -> str:
    return xxhash.xxh64_hexdigest(json.dumps([config, identity]).encode())


def _identify(file: str, origin: Sequence[Any]) -> Any:
    """Return values that change with a file's content; for a remote file, its commit or tag."""
    return hash_file(Path(file)) if os.path.isfile(file) else [file, *map(list, origin)]


def _import() -> Any:
    """Import the library without its progress bars."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    return datasets


@cache
def _load(path: str, config: str | None, split: str, revision: str | None) -> Any:
    """Return a split to be streamed, opened once per process."""
    options = {"revision": revision} if revision else {}
    return _import().load_dataset(**_request(path, config), split=split, streaming=True, **options)


def _request(path: str, config: str | None) -> dict[str, Any]:
    """Return arguments for the library; in a folder that it saved, names do not determine
    splits."""
    folder = Path(path)
    if (folder / "dataset_dict.json").is_file():
        parts = {name: folder / name for name in _json(folder / "dataset_dict.json")["splits"]}
    elif (folder / "state.json").is_file():
        parts = {"train": folder}
    else:
        return {"path": path, "name": config}
    listed = {name: _json(part / "state.json")["_data_files"] for name, part in parts.items()}
    files = {n: [str(parts[n] / each["filename"]) for each in listed[n]] for n in parts}
    return {"path": "arrow", "name": config, "data_files": files}


def _json(file: Path) -> Any:
    try:
        return read_object(file)
    except ValueError as error:
        raise DataError(f"{file}: is damaged ({error}); download the data set again") from None


def _reason(error: Exception) -> str:
    """Return an exception of the library in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
