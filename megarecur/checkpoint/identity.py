"""Identity of a run, by which it knows its own checkpoints.

    RUN/identity.json             {"run": ID, "folder": the run folder when it last started, ...}
    step-XXXXXXXX/index.json      {"state": {"run": ID, ...}, ...}

A path says little: a mirror may belong to another run, and a run folder may be a copy. So a run
deletes only checkpoints that carry its ID, here and in its mirror. A copy of a run folder gets an
ID of its own. Checkpoints of earlier versions carry none; they are read, and never deleted.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megarecur.checkpoint.index import read_index
from megarecur.errors import CheckpointError, ConfigError
from megarecur.files import replace_file
from megarecur.reading import read_object

FILE = "identity.json"


@dataclass(frozen=True)
class Identity:
    """ID of a run, and the folder that its folder is a copy of."""

    run: str
    copy_of: str = ""
    """Folder of the original; "" if this folder is no copy, or was known as one before."""
    source: str = ""
    """The run that the parameters are from, in words; "" if this run has initialized them."""


def identify(run_dir: Path, newest: Path | None, source: str = "") -> Identity:
    """Return the identity of a run folder, and record it; call it while holding the lease.

    Args:
        newest: the checkpoint that the run resumes from. A folder without a recorded identity
            continues the run that wrote it, such as one that was fetched from a mirror.
        source: of a new run, see `Identity`.

    Raises:
        ConfigError: the recorded identity is damaged.
        OSError: it cannot be written.
    """
    file, folder = run_dir / FILE, str(run_dir.resolve())
    recorded = _read(file)
    if recorded is None:
        known = owner_of(newest) if newest is not None else None
        found = Identity(known or uuid.uuid4().hex, source=source)
    elif _is_original(Path(recorded["folder"]), run_dir, recorded["run"]):
        copied = f"copied from {recorded['folder']} (run {recorded['run']})"
        found = Identity(uuid.uuid4().hex, recorded["folder"], copied)
    else:
        found = Identity(recorded["run"], source=source or recorded.get("source", ""))
    values = {"run": found.run, "folder": folder, "source": found.source}
    if values != recorded:
        replace_file(file, json.dumps(values, indent=1) + "\n")
    return found


def owner_of(path: Path) -> str | None:
    """Return the ID of the run that wrote a checkpoint; None if it carries none or is damaged."""
    try:
        found = (path / "index.json").stat()
        return _owner_of(path, found.st_ino, found.st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=4096)
def _owner_of(path: Path, inode: int, changed: int) -> str | None:
    """Return `owner_of` for an index as it lies there; each is parsed once, not at every save."""
    try:
        return owner_in(read_index(path).state)
    except CheckpointError:
        return None


def owner_in(state: dict[str, Any]) -> str | None:
    """Return the ID of a run in the state of a checkpoint; None if there is none."""
    run = state.get("run")
    return run if isinstance(run, str) and run else None


def _read(file: Path) -> dict[str, str] | None:
    """Return the recorded identity of a run folder; None if it has none."""
    try:
        found = read_object(file)
        values = {key: found[key] for key in ("run", "folder")}
        if not all(isinstance(value, str) and value for value in values.values()):
            raise TypeError("its values are no texts")
        source = found.get("source", "")
        return values | {"source": source if isinstance(source, str) else ""}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file}: is damaged ({error}); delete it, the run then takes its identity from its "
            "newest checkpoint"
        ) from None


def _is_original(recorded: Path, here: Path, run: str) -> bool:
    """Return True if the folder that recorded an identity still has it, and is not this one."""
    try:
        if os.path.samefile(recorded, here):
            return False
        original = _read(recorded / FILE)
    except (OSError, ConfigError, ValueError):
        return False
    return original is not None and original["run"] == run
