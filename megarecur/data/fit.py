"""Check by its manifest alone, before shards are opened, whether a corpus suits a config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarecur.config.images import NO_AUGMENTATION, ImagesConfig
from megarecur.config.objective import TaskConfig
from megarecur.config.run import Config
from megarecur.data.corpus import Manifest, check_tokenizer, read_manifest
from megarecur.data.tokenizer import tokenizer_fingerprint
from megarecur.errors import DataError

TRANSLATION = "translation"
"""Kind of a corpus of sentence pairs."""
IMAGE = "image"
"""Kind of a corpus of labelled pictures."""


def check_fit(config: Config, paths: Sequence[str], tokenizer: str) -> None:
    """Check by their manifests, together, whether a config can score corpora; whether it can train
    on them, its loader checks.

    Raises:
        DataError: a corpus was made with another tokenizer, or does not fit; all of these are
            reported.
    """
    named = [(path, read_manifest(path)) for path in paths]
    if config.task is None or config.task.kind != IMAGE:
        fingerprint = tokenizer_fingerprint(tokenizer)
        for path, manifest in named:
            check_tokenizer(path, manifest, tokenizer, fingerprint)
    problems = [p for path, m in named for p in find_misfits(Path(path), m, config, trained=False)]
    if problems:
        raise DataError("\n".join(problems))


def find_misfits(path: Path, manifest: Manifest, config: Config, trained: bool = True) -> list[str]:
    """Return why a config cannot read a corpus, one line each with its remedy.

    Args:
        trained: the corpus is used for training, not only for scoring.
    """
    held = manifest.task
    if config.encoder is not None:
        return find_pair_misfits(path, manifest, config, trained)
    if held is not None and held["kind"] == TRANSLATION:
        return [
            f"{path}: holds pairs of sentences, but the config has no encoder; add an encoder "
            "section, or use another corpus"
        ]
    if config.task is not None and config.task.kind == IMAGE:
        return find_image_misfits(path, manifest, config, trained)
    if held is not None and held["kind"] == IMAGE:
        return [
            f"{path}: holds pictures, but the config has no task.kind=image; add it, or use "
            "another corpus"
        ]
    if config.task is not None:
        return find_task_misfits(path, manifest, config)
    if held is not None:
        return [
            f"{path}: holds labelled samples, but the config has no task; add one, or use a corpus "
            "of text"
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


def find_pair_misfits(path: Path, manifest: Manifest, config: Config, trained: bool) -> list[str]:
    """Return why an encoder-decoder cannot read a corpus; see `find_misfits`."""
    held, data, most = manifest.task, config.data, config.train.batch_tokens
    if held is None or held["kind"] != TRANSLATION:
        content = "text" if held is None else "labelled samples"
        return [
            f"{path}: holds {content}, but a config with an encoder reads pairs of sentences; "
            "prepare a corpus with `megarecur prep pairs`, or remove the encoder section"
        ]
    problems, longest = [], max(held["longest_source"], held["longest_target"])
    if longest > data.seq_length and not data.truncate:
        problems.append(
            f"{path}: its longest sentence has {longest} tokens, its end included, but "
            f"data.seq_length={data.seq_length}; raise seq_length to {longest}, or set "
            "data.truncate to true" + ", or prepare the corpus with --max-length" * trained
        )
    # Truncated lengths are in the corpus itself: the loader checks them.
    if trained and most is not None and held["longest_pair"] > most and not data.truncate:
        problems.append(explain_long_pair(path, held["longest_pair"], most))
    return problems


def explain_long_pair(path: Path, longest: int, batch_tokens: int) -> str:
    """Return the problem of a pair that no batch has room for."""
    return (
        f"{path}: its longest pair has {longest} tokens, source and target together, but "
        f"train.batch_tokens={batch_tokens}; raise batch_tokens to at least {longest}, or prepare "
        "the corpus with --max-length"
    )


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


def find_image_misfits(path: Path, manifest: Manifest, config: Config, trained: bool) -> list[str]:
    """Return why a classifier of pictures cannot read a corpus; see `find_misfits`."""
    task, held = config.task, manifest.task
    assert task is not None
    if held is None or held["kind"] != IMAGE:
        content = "text" if held is None else f"samples of kind {held['kind']}"
        return [
            f"{path}: holds {content}, but task.kind=image reads pictures; prepare a corpus with "
            "`megarecur prep images`, or set another task"
        ]
    problems, classes = [], held["classes"]
    if task.num_classes is not None and len(classes) != task.num_classes:
        more = "more" if len(classes) > task.num_classes else "fewer"
        problems.append(
            f"{path}: has {len(classes)} classes ({', '.join(classes[:12])}"
            f"{', ...' if len(classes) > 12 else ''}), {more} than task.num_classes="
            f"{task.num_classes}; use pictures of the classes of training, whose number it is"
        )
    channels = task.num_channels
    if held["channels"] != channels:
        problems.append(
            f"{path}: has pictures of {held['channels']} channel(s), but task.channels={channels}; "
            f"set task.channels to {held['channels']}, or prepare the corpus with --channels "
            f"{channels}"
        )
    if trained:
        images = config.data.images or NO_AUGMENTATION
        problems += find_size_misfits(path, held, task, images)
    return problems


def find_size_misfits(
    path: Path, held: dict[str, Any], task: TaskConfig, images: ImagesConfig
) -> list[str]:
    """Return why the crop of training does not bring all pictures of a corpus to one size.

    Args:
        held: the manifest's description of the pictures.
    """
    size = task.image_size
    small, large = (f"{h} x {w}" for h, w in (held["smallest"], held["largest"]))
    sizes = small if small == large else f"from {small} to {large}"
    if images.crop == "none" and not held["smallest"] == held["largest"] == [size, size]:
        return [
            f"{path}: has pictures of {sizes} pixels (height x width), but task.image_size={size} "
            "and data.images.crop=none; set data.images.crop to resized, or prepare pictures of "
            "that size"
        ]
    if images.crop == "padded" and min(held["smallest"]) + 2 * images.padding < (size or 0):
        return [
            f"{path}: has pictures of {sizes} pixels (height x width), too few for a window of "
            f"task.image_size={size} with data.images.padding={images.padding}; set "
            "data.images.crop to resized, or lower task.image_size"
        ]
    return []
