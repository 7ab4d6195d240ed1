"""Retention: keep the newest checkpoints, every `keep_every` steps, the best by validation loss.

    remove_old(root, config.checkpoint, read_scores(run_dir / "metrics.jsonl"))

The score of a step may be written after its checkpoint. A run evaluates a step before it saves a
later one, and the newest checkpoint is always kept.
"""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from megarecur.checkpoint.checkpoint import TEMPORARY, list_checkpoints, step_of, verify
from megarecur.checkpoint.identity import owner_of
from megarecur.checkpoint.index import seal
from megarecur.config.checkpoint import CheckpointConfig
from megarecur.files import delete_folder, replace_file
from megarecur.reading import parse_metrics

log = logging.getLogger(__name__)

STILL_OPEN = (errno.EBUSY, errno.ENOTEMPTY, errno.ESTALE)
"""Errors of deleting a folder in which another process has files open, on network file systems."""


def steps_to_keep(
    steps: Collection[int], rule: CheckpointConfig, scores: Mapping[int, float]
) -> set[int]:
    """Return the steps whose checkpoints the rule keeps."""
    newest = sorted(steps)[-rule.keep_last :]
    milestones = [step for step in steps if rule.keep_every and step % rule.keep_every == 0]
    return {*newest, *milestones, *best_steps(steps, rule, scores)}


def best_steps(
    steps: Collection[int], rule: CheckpointConfig, scores: Mapping[int, float]
) -> list[int]:
    """Return the `keep_best` steps of lowest loss, lowest first; ties go to the later step."""
    scored = [step for step in steps if step in scores]
    return sorted(scored, key=lambda step: (scores[step], -step))[: rule.keep_best]


def read_scores(path: Path) -> dict[int, float]:
    """Return the validation loss by step from a metrics.jsonl."""
    scores: dict[int, float] = {}
    if not path.exists():
        return scores
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if '"val/loss"' not in line:  # parsing every row of a long run would be slow
                continue
            row = parse_metrics(line)  # None: truncated by a crash, or damaged.
            if row is not None and row.get("val/loss") is not None:
                scores[row["step"]] = row["val/loss"]
    return scores


def remove_old(
    root: Path,
    rule: CheckpointConfig,
    scores: Mapping[int, float] | None = None,
    *,
    good: Path | None = None,
    busy: Path | None = None,
    run: str | None = None,
) -> None:
    """Delete checkpoints that the rule does not keep, and leftovers of interrupted saves.

    Call it from one process, while no save is running. If all checkpoints to keep are damaged, the
    newest intact one is kept as well. `root/best` names the best checkpoint if the rule keeps it.

    Args:
        good: a checkpoint known to be intact, which is not read again.
        busy: a checkpoint that is being read and is not deleted yet.
        run: ID of the run; checkpoints that it did not write are neither deleted nor counted.
            None: all are its own.

    Raises:
        OSError: a file cannot be deleted or written.
    """
    root = Path(root)
    for path in list(root.iterdir()) if root.is_dir() else []:
        if TEMPORARY.fullmatch(path.name):
            _delete(path, shutil.rmtree if path.is_dir() else Path.unlink)
    paths = {
        step_of(path.name): path
        for path in list_checkpoints(root)
        if run is None or owner_of(path) == run
    }
    keep = steps_to_keep(paths, rule, scores or {})
    doomed = [path for step, path in paths.items() if step not in keep and path != busy]
    kept = [path for path in reversed(paths.values()) if path not in doomed]
    if doomed and good not in kept and all(verify(path) for path in kept):
        newest_good = next((path for path in reversed(doomed) if not verify(path)), None)
        doomed = [path for path in doomed if path != newest_good]
    point_to_best(root, next(iter(best_steps(paths, rule, scores or {})), None))
    for path in doomed:
        _delete(path, delete_folder)


def _delete(path: Path, delete: Callable[[Path], None]) -> None:
    """Delete a file or folder; what another process has open stays until the next call."""
    try:
        delete(path)
    except OSError as error:
        if error.errno not in STILL_OPEN:
            raise
        log.warning("%s is still in use and cannot be deleted yet; the next save tries again", path)


def point_to_best(root: Path, step: int | None) -> None:
    """Point `root/best` to the checkpoint of a step; None: remove the file."""
    best = root / "best"
    if step is None:
        best.unlink(missing_ok=True)
        return
    line = seal(f"step-{step:08d}")
    if best.exists() and best.read_bytes() == line:
        return
    replace_file(best, line)
