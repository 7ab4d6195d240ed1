"""List the files of a folder: through links, each once, without hidden files and known metadata.

Excluded files are counted and logged with their names. Only folders are filtered: a file that is
named explicitly is read, whatever its name.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from megarecur.errors import DataError

METADATA_FILES = (
    "dataset_info.json", "dataset_infos.json", "dataset_dict.json",  # Hugging Face datasets
    "_SUCCESS", "_metadata", "_common_metadata", "_committed_*", "_started_*", "*.crc",  # Spark
    "Thumbs.db", "desktop.ini",
)  # fmt: skip
METADATA_FOLDERS = (
    "__MACOSX", "__pycache__", "lost+found", "@eaDir", "$RECYCLE.BIN", "System Volume Information",
    "_temporary", "_delta_log", "_spark_metadata",
)  # fmt: skip
HIDDEN, METADATA, EXCLUDED = "hidden", "metadata", "excluded"
AGAIN, NOWHERE = "reached again by a link", "broken links"
SHOWN = 3
"""Number of names reported for each reason."""


@dataclass
class Listing:
    """The files found, and those excluded."""

    files: list[Path] = field(default_factory=list)
    left_out: dict[str, list[Path]] = field(default_factory=dict)
    """Excluded files and folders by the reason; nothing below an excluded folder is listed."""

    def leave_out(self, reason: str, path: Path) -> None:
        """Record something that is not read."""
        self.left_out.setdefault(reason, []).append(path)

    def keep(self, wanted: Callable[[Path], bool], reason: str) -> None:
        """Exclude files for which `wanted` is False."""
        for path in self.files:
            if not wanted(path):
                self.leave_out(reason, path)
        self.files = [path for path in self.files if wanted(path)]

    def describe(self) -> str:
        """Return how many were excluded, by the reason, with some names; "" if none."""
        parts = []
        for reason, paths in self.left_out.items():
            names = [path.name for path in paths[:SHOWN]]
            more = ["..."] if len(paths) > SHOWN else []
            parts.append(f"{len(paths):,} {reason} ({', '.join([*names, *more])})")
        return "excluded: " + "; ".join(parts) if parts else ""


def is_excluded(path: Path, relative: Path, patterns: Iterable[str]) -> bool:
    """Return True if a pattern matches a path: as a whole, below its folder, or by its name."""
    names = {path.as_posix(), relative.as_posix(), path.name}
    return any(fnmatch.fnmatchcase(n, p.rstrip("/") or p) for p in patterns for n in names)


def list_folder(
    folder: Path,
    exclude: Sequence[str] = (),
    hidden: bool = False,
    metadata: Sequence[str] = METADATA_FILES,
) -> Listing:
    """List all files below a folder, except metadata and, by default, hidden files.

    Linked sub-folders are read too, after real ones; a folder reached again, perhaps in a cycle, is
    read once.

    Args:
        exclude: patterns of files and folders to exclude (see `is_excluded`).
        metadata: patterns of the names of files that are metadata.

    Raises:
        DataError: a folder cannot be listed.
    """
    listing = Listing()
    visited: set[tuple[int, int]] = set()
    pending = [folder]
    while pending:
        links: list[Path] = []
        for top in pending:
            links += _walk(top, folder, listing, visited, exclude, hidden, metadata)
        pending = sorted(links)
    listing.files.sort()
    return listing


def _walk(
    top: Path,
    folder: Path,
    listing: Listing,
    visited: set[tuple[int, int]],
    exclude: Sequence[str],
    hidden: bool,
    metadata: Sequence[str],
) -> list[Path]:
    """List everything below `top` without following links; return the links to folders."""
    links: list[Path] = []
    for place, folders, names in os.walk(top, onerror=_refuse):
        here = Path(place)
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in visited:
            listing.leave_out(AGAIN, here)
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        below = []
        for name in sorted(folders):
            path = here / name
            if reason := _reason_against(path, folder, exclude, hidden, METADATA_FOLDERS):
                listing.leave_out(reason, path)
            elif path.is_symlink():
                links.append(path)
            else:
                below.append(name)
        folders[:] = below
        for name in sorted(names):
            path = here / name
            if reason := _reason_against(path, folder, exclude, hidden, metadata):
                listing.leave_out(reason, path)
            elif path.is_file():
                listing.files.append(path)
            else:
                listing.leave_out(NOWHERE if path.is_symlink() else "no regular files", path)
    return links


def _reason_against(
    path: Path, folder: Path, exclude: Sequence[str], hidden: bool, metadata: Sequence[str]
) -> str:
    """Return why a file or folder is not read; "" if it is."""
    if exclude and is_excluded(path, path.relative_to(folder), exclude):
        return EXCLUDED
    if path.name.startswith(".") and not hidden:
        return HIDDEN
    if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in metadata):
        return METADATA
    return ""


def _refuse(error: OSError) -> NoReturn:
    """Raise an error for a folder that cannot be listed, which `os.walk` would skip."""
    raise DataError(
        f"{error.filename}: cannot be listed ({error.strerror}); make it readable, or exclude it "
        "by --exclude"
    ) from None


def list_matches(pattern: str, exclude: Sequence[str] = ()) -> Listing:
    """List the files that a glob matches, `**` at any depth and through links like `list_folder`.
    Metadata is excluded unless its name is spelled out. `exclude` also applies to the folders
    that the glob passes."""
    parts = Path(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    base = Path(*parts[:fixed])
    listing = Listing()
    if "**" in parts:
        start = parts.index("**")
        wanted = parts[start:]
        hidden = any(part.startswith(".") for part in wanted)
        folders = [base] if start == fixed else _glob(Path(*parts[:start]))
        for folder in folders:
            if folder.is_dir():
                below = list_folder(folder, (), hidden, metadata=())
                below.left_out.pop(HIDDEN, None)  # No glob matches hidden files.
                for reason, paths in below.left_out.items():
                    listing.left_out.setdefault(reason, []).extend(paths)
                listing.files += [
                    p for p in below.files if _matches(p.relative_to(folder).parts, wanted)
                ]
    else:
        for path in _glob(Path(pattern)):
            if path.is_dir():
                listing.leave_out("folders that the glob matches", path)
            elif path.is_file():
                listing.files.append(path)
            else:
                listing.leave_out(NOWHERE, path)

    def is_kept(path: Path) -> bool:
        relative = path.relative_to(base)
        through = [base / parent for parent in relative.parents if parent.parts]
        return not any(is_excluded(p, p.relative_to(base), exclude) for p in (path, *through))

    listing.keep(is_kept, EXCLUDED)
    if glob.has_magic(parts[-1]):
        listing.keep(
            lambda path: not any(fnmatch.fnmatchcase(path.name, m) for m in METADATA_FILES),
            METADATA,
        )
    return listing


def _glob(pattern: Path) -> list[Path]:
    """Return the matches of a glob without `**`, broken links included."""
    return [Path(match) for match in sorted(glob.glob(str(pattern)))]


def _matches(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    """Return True if the parts of a path match those of a glob: `**` matches any number of parts
    that are not hidden, another pattern one, hidden only if the pattern begins with a dot."""
    if not wanted:
        return not parts
    if wanted[0] == "**":
        if _matches(parts, wanted[1:]) or (len(wanted) == 1 and parts and not _is_hidden(parts)):
            return True
        return bool(parts) and parts[0][:1] != "." and _matches(parts[1:], wanted)
    if not parts or (parts[0][:1] == "." and wanted[0][:1] != "."):
        return False
    return fnmatch.fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])


def _is_hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith(".") for part in parts)
