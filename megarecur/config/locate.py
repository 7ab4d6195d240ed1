"""Locate the files of a run from any directory, also after the run folder has moved.

A config names corpora and tokenizer relative to the directory in which its run was started. The run
folder contains `origin.json`: that directory, the folder's own path at the time, and a hash of each
of those files. `load_config` reads it beside RUN/config.yaml and finds the files again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from megarecur.config.run import NO_TOKENIZER, Config
from megarecur.errors import ConfigError
from megarecur.files import replace_file
from megarecur.reading import read_bytes, read_object

ORIGIN = "origin.json"
NOT_A_FILE = ("bytes", NO_TOKENIZER)
"""Tokenizers without a file."""


def record_origin(run_dir: Path, config: Config, final: Path | None = None) -> None:
    """Write RUN/origin.json for a run that starts in the current directory.

    Args:
        final: the path to which the folder will be renamed; None: it stays where it is.
    """
    data = config.data
    names = {data.tokenizer, *(source.path for source in (*data.train, *data.val))}
    hashes = {name: identify(Path(name)) for name in sorted(names)}
    values = {
        "workdir": os.getcwd(),
        "run_dir": os.path.abspath(final or run_dir),
        "hashes": hashes,
    }
    replace_file(run_dir / ORIGIN, json.dumps(values, indent=2) + "\n")


def identify(path: Path) -> str | None:
    """Return a hash of a file, or of the manifest or index of a corpus; None if none exists."""
    places = [path, path / "manifest.json", path / "index.json"]
    file = next((place for place in places if place.is_file()), None)
    return None if file is None else xxhash.xxh3_128_hexdigest(read_bytes(file))


def relocate(values: dict[str, Any], path: Path) -> None:
    """Replace paths in the sections of RUN/config.yaml by this run folder and by existing files.

    A path that does not exist, or that leads to another file than at the start of the run, is
    replaced by the first of these that matches: a copy in the run folder (of the tokenizer), the
    path from the directory in which the run was started, and the path of a file that moved along
    with the run. If none matches, the path is kept. Other configs are not changed.

    Raises:
        ConfigError: origin.json is damaged.
    """
    folder = path.parent
    if path.name != "config.yaml" or not (folder / "checkpoints").is_dir():
        return
    if not isinstance(values.get("run_dir"), str) or (
        Path(values["run_dir"]).resolve() != folder.resolve()
    ):
        values["run_dir"] = str(folder)
    origin = read_origin(folder)
    for section, key, own in named_paths(values):
        name = section[key]
        section[key] = find(name, folder, origin, own)


def read_origin(folder: Path) -> dict[str, Any]:
    """Return the content of origin.json; empty for a run that has none."""
    path = folder / ORIGIN
    if not path.exists():
        return {}
    try:
        values = read_object(path)
        if not isinstance(values["hashes"], dict):
            raise TypeError("hashes is no mapping")
        return {"workdir": str(values["workdir"]), "run_dir": str(values["run_dir"]),
                "hashes": values["hashes"]}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: is damaged ({error!r}); remove it, and start the command in the directory "
            "that the run was started in"
        ) from None


def named_paths(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, bool]]:
    """Yield (section, key, whether the run may have a copy) of every path. The sections need not be
    valid."""
    places: list[tuple[Any, str, bool]] = [(values, "init_from", False)]
    data = values.get("data")
    if isinstance(data, dict):
        places.append((data, "tokenizer", True))
        for part in ("train", "val"):
            sources = data.get(part)
            places += [(s, "path", False) for s in (sources if isinstance(sources, list) else ())]
    places += [(values.get("distill"), key, False) for key in ("teacher", "stored")]
    for section, key, own in places:
        if isinstance(section, dict) and isinstance(section.get(key), str):
            yield section, key, own


def find(name: str, folder: Path, origin: dict[str, Any], own: bool) -> str:
    """Return the path of the file that a run's config names `name`."""
    bare, at, step = name.partition("@")  # RUN@STEP
    if name in NOT_A_FILE or "://" in name:
        return name
    known = origin.get("hashes", {}).get(name)

    def fits(place: Path) -> bool:
        return place.exists() and (known is None or identify(place) == known)

    if fits(Path(bare)):
        return name
    places = [folder / Path(bare).name] if own else []
    if origin:
        former = Path(origin["workdir"]) / bare
        places += [former, folder / os.path.relpath(former, origin["run_dir"])]
    for place in places:
        if fits(place):
            return os.path.abspath(place) + at + step
    return name
