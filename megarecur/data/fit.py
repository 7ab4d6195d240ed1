"""Check by its manifest alone, before shards are opened, whether a corpus suits a config."""

from __future__ import annotations

from pathlib import Path

from megarecur.config.run import Config
from megarecur.data.corpus import Manifest


def find_misfits(path: Path, manifest: Manifest, config: Config, trained: bool = True) -> list[str]:
    """Return why a config cannot read a corpus, one line each with its remedy.

    Args:
        trained: the corpus is used for training, not only for scoring.
    """
    if config.task is not None:
        return find_task_misfits(path, manifest, config)
    if manifest.task is not None:
        return [
            f"{path}: holds labelled samples, but the config has no task; add one, or use a "
            "corpus of "
            "text"
        ]
    if trained and not config.data.shuffle_shards:
        return find_short(path, manifest.num_tokens, config.data.seq_length)
    return []


def find_short(path: Path, num_tokens: int, seq_length: int) -> list[str]:
    """Return a problem if a corpus is too short for one sample."""
    if num_tokens > seq_length:
        return []
    return [
        f"{path}: has {num_tokens} tokens, too few for one sample of data.seq_length={seq_length} "
        "and its next token; lower seq_length, or add text"
    ]


def find_task_misfits(path: Path, manifest: Manifest, config: Config) -> list[str]:
    """Return why a corpus cannot be read for a config's task."""
    task, seq_length, held = config.task, config.data.seq_length, manifest.task
    assert task is not None
    if held is None:
        return [
            f"{path}: holds text without labels, and the config has a task; prepare a corpus with "
            "`megarecur prep task`, or remove the task section"
        ]
    classes, longest, problems = held["classes"], held["longest"], []
    if held["kind"] != task.kind:
        problems.append(
            f"{path}: has samples of kind {held['kind']}, but task.kind={task.kind}; set "
            f"task.kind to {held['kind']}, or use another corpus"
        )
    if task.num_classes not in (None, len(classes)):
        problems.append(
            f"{path}: has {len(classes)} classes ({', '.join(classes[:12])}), but task.num_classes="
            f"{task.num_classes}; set it to {len(classes)}"
        )
    if longest > seq_length and not task.truncate:
        problems.append(
            f"{path}: its longest sequence has {longest} tokens, but data.seq_length={seq_length}; "
            f"raise seq_length to {longest}, or set task.truncate to true"
        )
    if held.get("ahead", False) and not config.model.causal:  # Not in the first corpora.
        problems.append(
            f"{path}: its labels are tokens that follow, which model.causal=false sees; set causal "
            "to true, or use another corpus"
        )
    return problems
