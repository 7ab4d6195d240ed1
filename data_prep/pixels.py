"""Make corpora of pictures as sequences of pixels, with a class for each picture.

data/cifar10_pixels/
  tokenizer.words   256 words, one for each grey value
  train/ test/      corpora of kind `sequence`, as `megarecur prep task` makes them
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from megarecur.data.corpus import Manifest, read_manifest
from megarecur.data.images import ImageCorpus
from megarecur.data_prep.disk import explain_os_errors
from megarecur.data_prep.grey import WORDS, spell, to_grey
from megarecur.data_prep.images import ImageRequest, make_plan, prepare_images
from megarecur.data_prep.progress import ProgressReport
from megarecur.data_prep.shards import hold, partial_of
from megarecur.data_prep.tasks import Sample, Task, is_made, train_last, write_splits
from megarecur.errors import DataError

GREY = "grey"
"""The kind of sequences, as `--as-tokens` names it."""
Picture = tuple[NDArray[np.uint8], int]
"""A grey picture, uint8 [H, W], and its class."""


def prepare_grey(
    request: ImageRequest,
    out: str | Path,
    *,
    workers: int = 0,
    progress: ProgressReport | None = None,
) -> dict[str, Manifest]:
    """Make the corpora of `prep images`, and write their pictures as sequences of grey values.

    Args:
        request: the pictures.
        out: folder of the result; OUT.pictures holds the corpora of pictures until it exists.
        workers: processes; 0 means one per core.

    Returns:
        The manifest of each split, by its name.

    Raises:
        ConfigError, DataError: as `prepare_images` and `prepare_pixels`.
    """
    out = Path(out)
    plan = make_plan(request)
    stamp = xxhash.xxh3_128_hexdigest(f"{GREY} {plan.stamp}".encode())
    if all(is_made(out / split, stamp) for split in plan.splits):
        return {split: read_manifest(out / split) for split in reversed(plan.splits)}
    aside = out.with_name(out.name + ".pictures")
    prepare_images(request, aside, workers=workers, progress=progress)
    corpora = {split: ImageCorpus(aside / split, verify=False) for split in plan.splits}
    made = prepare_pixels(
        out,
        {split: partial(read_grey, corpus) for split, corpus in corpora.items()},
        corpora["train"].classes,
        stamp,
        sources=[(str(i), source["name"]) for i, source in enumerate(plan.sources)],
        hashes={str(i): source["xxh64"] for i, source in enumerate(plan.sources)},
        total=sum(corpus.num_samples for corpus in corpora.values()),
        progress=progress,
    )
    shutil.rmtree(aside)
    return made


def read_grey(corpus: ImageCorpus) -> Iterator[Picture]:
    """Yield the pictures of a corpus as grey values, with their classes."""
    for number in range(corpus.num_samples):
        pixels = np.asarray(corpus.picture(number))
        yield (pixels if pixels.ndim == 2 else to_grey(pixels)), int(corpus.labels[number])


def prepare_pixels(
    out: str | Path,
    pictures: Mapping[str, Callable[[], Iterable[Picture]]],
    classes: Sequence[str],
    stamp: str,
    *,
    name: str = "pixels",
    sources: Sequence[tuple[str, str]] = (),
    hashes: Mapping[str, str] | None = None,
    total: int = 0,
    progress: ProgressReport | None = None,
) -> dict[str, Manifest]:
    """Write pictures as sequences of grey values: the corpora OUT/train and so on.

    Args:
        out: folder of the result; unfinished work in OUT.partial is restarted.
        pictures: for each split a function that yields its pictures, all of one size.
        classes: names of the classes, by their number.
        stamp: hash of the inputs and options; a corpus that has it is kept.
        name: name of the task in the manifest.
        sources: path and name of each file that was read.
        hashes: xxh64 of each source, by its path.
        total: number of pictures, for the progress report.

    Returns:
        The manifest of each split, by its name.

    Raises:
        DataError: pictures of different sizes, no pictures, or OUT holds something else.
    """
    out = Path(out)

    def samples() -> Iterator[Sample]:
        expected: tuple[int, ...] | None = None
        for split in splits:
            for number, (picture, label) in enumerate(pictures[split]()):
                expected = expected or picture.shape
                if picture.shape != expected:
                    raise DataError(
                        f"{split}: picture {number} is {show_size(picture.shape)}, others are "
                        f"{show_size(expected)}; resize them to one size"
                    )
                yield Sample(split, (spell(picture),), label)

    splits = train_last(list(pictures))
    task = Task(name, "sequence", classes, splits, total, samples, words=WORDS, sources=sources)
    with explain_os_errors(out):
        made = [split for split in splits if is_made(out / split, stamp)]
        if len(made) < len(splits):
            unfinished = partial_of(out)
            with hold(unfinished):
                write_splits(task, stamp, hashes or {}, out, unfinished, progress)
            shutil.rmtree(unfinished)
    return {split: read_manifest(out / split) for split in splits}


def show_size(shape: Sequence[int]) -> str:
    """Return the size of a picture as width x height."""
    return f"{shape[1]}x{shape[0]}"
