"""Labelled pictures: corpora of `megarecur prep images`, and batches of pixels.

    data/cifar10/train/
      ...            as every corpus, but shards hold a column of pictures (see `pictures.py`)
      labels.npy     int32, the class of each picture

The order of pictures is that of text, a pure function of (seed, epoch, position), and augmentation
is one of (seed, picture, epoch). A step's pictures are decoded together, ahead of the model, and
cut into micro batches. Shapes: B pictures of a micro batch, R of a rank's step, S positions, C, H,
W of pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from megarecur.attention.documents import whole_samples
from megarecur.config.images import NO_AUGMENTATION, ImagesConfig
from megarecur.config.objective import TaskConfig
from megarecur.config.run import Config
from megarecur.data.corpus import Corpus
from megarecur.data.decoding import Decoders, Request
from megarecur.data.fit import IMAGE, check_fit, find_size_misfits
from megarecur.data.loader import MicroBatch
from megarecur.data.picture_worker import explain_picture
from megarecur.data.pictures import PictureShards, Recipe, check_columns, decode
from megarecur.data.samples import TaskBatch, TaskCorpus, TaskLoader
from megarecur.errors import DataError, MegarecurError
from megarecur.parallel.loss import IGNORED

BATCHES_AHEAD = 2
"""Micro batches of an evaluation that are requested ahead of the one that is used."""


class ImageCorpus(TaskCorpus):
    """An open corpus of labelled pictures; arguments and errors are those of `Corpus`."""

    def __init__(
        self, path: str | Path, verify: bool = True, part: int = 0, num_parts: int = 1
    ) -> None:
        super().__init__(path, verify, part, num_parts)
        held: dict[str, Any] = self.manifest.task or {}
        if held["kind"] != IMAGE:
            raise DataError(
                f"{self.path}: holds no pictures; prepare a corpus with `megarecur prep images`"
            )
        self.channels: int = held["channels"]
        self.mean: list[float] = held["mean"]
        """Mean of each channel of the training pictures, of values in [0, 1]."""
        self.std: list[float] = [value or 1.0 for value in held["std"]]
        """Their standard deviation; 1 for a channel of one value."""

    def _open_shards(
        self, described: list[dict[str, Any]]
    ) -> tuple[Sequence[NDArray[Any]], list[int]]:
        """Map the shards, and return them with the number of pictures of each."""
        for shard in described:
            check_columns(shard)
        names = [str(shard["raw_data"]["basename"]) for shard in described]
        self.pictures = PictureShards(self.path, {n: self.manifest.files[n] for n in names})
        return self.pictures.shards, self.pictures.sizes

    def picture(self, number: int) -> Image.Image:
        """Return a decoded picture, in mode L or RGB.

        Raises:
            DataError: it cannot be decoded, or its shard changed.
        """
        try:
            return decode(self.pictures.read(number), self.channels)
        except (ValueError, IndexError) as error:
            raise explain_picture(self.path, number, error) from None

    def read(self, start: int, n: int) -> NDArray[Any]:
        """Refuse to read tokens.

        Raises:
            DataError: always.
        """
        raise DataError(f"{self.path}: holds pictures, not tokens; use a corpus of text")


def open_images(
    config: Config, paths: Sequence[str], verify: bool = True, part: int = 0, num_parts: int = 1
) -> list[ImageCorpus]:
    """Open corpora of pictures, checked together.

    Raises:
        DataError: a corpus that is damaged or does not fit the task, or corpora whose classes
            differ; all those that do not fit are reported.
    """
    check_fit(config, paths, config.data.tokenizer)
    corpora = [ImageCorpus(path, verify, part, num_parts) for path in paths]
    problems = [
        f"{corpus.path}: its classes ({', '.join(corpus.classes[:8])}) are not those of "
        f"{corpora[0].path} ({', '.join(corpora[0].classes[:8])}), so that a number means another "
        "class; prepare both from inputs of the same classes"
        for corpus in corpora[1:]
        if corpus.classes != corpora[0].classes
    ]
    if problems:
        raise DataError("\n".join(problems))
    return corpora


def with_statistics(config: Config, corpora: Sequence[Corpus]) -> Config:
    """Return the config of a run with data.images.mean and std resolved: as given, or as measured
    over the training corpora, weighted as they are mixed.

    Args:
        corpora: those of data.train.
    """
    images = config.data.images or NO_AUGMENTATION
    own = [corpus for corpus in corpora if isinstance(corpus, ImageCorpus)]
    if not own or images.mean is not None:
        return config
    weights = np.array([source.weight for source in config.data.train])
    weights /= weights.sum()
    means_KC, stds_KC = (np.array([getattr(c, key) for c in own]) for key in ("mean", "std"))
    mean_C = weights @ means_KC
    std_C = np.sqrt(weights @ (stds_KC**2 + means_KC**2) - mean_C**2)
    if len(own) == 1:  # without rounding
        mean_C, std_C = means_KC[0], stds_KC[0]
    measured = {"mean": tuple(mean_C.tolist()), "std": tuple(std_C.tolist())}
    data = config.data.model_copy(update={"images": images.model_copy(update=measured)})
    return config.model_copy(update={"data": data})


def make_decoders(
    corpora: Sequence[ImageCorpus],
    task: TaskConfig,
    images: ImagesConfig | None,
    *,
    training: bool,
    seed: int,
) -> Decoders:
    """Return what decodes pictures as a config says.

    Args:
        corpora: by their place in the mixture.
        images: None means without augmentation.
        training: augment them; otherwise resize them and cut out the centre.
    """
    images = images or NO_AUGMENTATION
    assert task.image_size is not None
    recipe = Recipe(
        size=task.image_size,
        channels=corpora[0].channels,
        training=training,
        crop=images.crop,
        padding=images.padding,
        scale=images.scale,
        ratio=images.ratio,
        flip=images.flip,
        trivial_augment=images.trivial_augment,
        resize=images.eval_resize or task.image_size,
    )
    return Decoders(
        [corpus.path for corpus in corpora],
        [corpus.pictures for corpus in corpora],
        recipe,
        images.mean or tuple(corpora[0].mean),
        images.std or tuple(corpora[0].std),
        seed=seed,
        workers=images.workers,
    )


class ImageLoader(TaskLoader):
    """The training data of one data-parallel rank; other arguments are those of `TaskLoader`.

    Args:
        seq_length: positions of a picture: patches, and a class token if there is one.

    Raises:
        DataError: pictures that no crop brings to one size.
    """

    def __init__(
        self,
        sources: Sequence[tuple[ImageCorpus, float]],
        task: TaskConfig,
        images: ImagesConfig | None,
        *,
        seq_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        shuffle: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        corpora = [corpus for corpus, _ in sources]
        problems = [
            problem
            for corpus in corpora
            for problem in find_size_misfits(
                corpus.path, corpus.manifest.task or {}, task, images or NO_AUGMENTATION
            )
        ]
        if problems:
            raise DataError("\n".join(problems))
        self.decoders = make_decoders(corpora, task, images, training=True, seed=seed)
        self._ahead: dict[int, Request] = {}
        self._ahead_lock = Lock()
        super().__init__(
            sources, task, seq_length=seq_length, global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size, dp_rank=dp_rank, dp_size=dp_size, seed=seed,
            shuffle=shuffle, device=device,
        )  # fmt: skip

    def close(self) -> None:
        """Stop building batches, and end the workers."""
        super().close()
        self._ahead.clear()
        self.decoders.close()

    def _rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return source, number and epoch of samples by their ids, which ascend by one."""
        sources, numbers, windows = self._find(ids)
        sizes = np.array(self.num_windows)
        return np.stack([sources, windows, numbers // sizes[sources]], axis=1)

    def _step_ids(self, step: int) -> NDArray[np.int64]:
        first = step * self.global_batch_size + self.dp_rank * self.rank_batch_size
        return np.arange(first, first + self.rank_batch_size)

    def _build(self, step: int) -> list[MicroBatch]:
        with self._ahead_lock:  # After a jump, two threads may build steps.
            request = self._ahead.pop(step, None)
            if request is None:
                request = self.decoders.request(self._rows(self._step_ids(step)))
            for stale in [s for s in self._ahead if s != step + 1]:
                self.decoders.drop(self._ahead.pop(stale))
            if step + 1 not in self._ahead:
                # So that workers go on while the pixels of this step are normalised.
                self._ahead[step + 1] = self.decoders.request(self._rows(self._step_ids(step + 1)))
        pixels_RCHW = self.decoders.finish(request)
        ids = self._step_ids(step)
        size = self.micro_batch_size
        return [
            self._make(
                pixels_RCHW[row : row + size], request.rows_R3[row : row + size], ids[row:][:size]
            )
            for row in range(0, len(ids), size)
        ]

    def _collate(self, ids: NDArray[Any]) -> MicroBatch:
        """Collate samples by their ids, which ascend by one."""
        request = self.decoders.request(self._rows(ids))
        return self._make(self.decoders.finish(request), request.rows_R3, ids)

    def _make(
        self, pixels: NDArray[np.float32], rows_R3: NDArray[np.int64], ids: NDArray[np.int64]
    ) -> TaskBatch:
        corpora = self.task_corpora
        labels = [int(corpora[source].labels[number]) for source, number, _ in rows_R3.tolist()]
        return make_batch(pixels, labels, ids, rows_R3[:, 0], self.seq_length)


def make_batch(
    pixels_BCHW: NDArray[np.float32],
    labels: Sequence[int],
    ids_B: NDArray[np.int64],
    sources_B: NDArray[np.int64],
    seq_length: int,
) -> TaskBatch:
    """Return pictures and their labels as a micro batch, whose tokens are zeros."""
    B = len(labels)
    labels_B1 = torch.tensor(labels, dtype=torch.int64)[:, None]
    return TaskBatch(
        tokens_BS=torch.zeros(B, seq_length, dtype=torch.int64),
        labels_BS=labels_B1,
        positions_BS=torch.arange(seq_length).repeat(B, 1),
        documents_BS=torch.zeros(B, seq_length, dtype=torch.int32),
        sample_ids_B=torch.from_numpy(ids_B),
        sources_B=torch.from_numpy(np.ascontiguousarray(sources_B)),
        single_document=True,
        boundaries=whole_samples(B, seq_length, torch.device("cpu")),
        pixels_BCHW=torch.from_numpy(pixels_BCHW),
        lengths_N=torch.full((B,), seq_length),
        scored=labels_B1 != IGNORED,
    )


def scored_images(
    corpus: ImageCorpus,
    task: TaskConfig,
    images: ImagesConfig | None,
    *,
    seq_length: int,
    micro_batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    max_samples: int = 0,
    failures: list[MegarecurError],
) -> Iterator[TaskBatch]:
    """Yield a corpus in order, cut over data-parallel ranks. Each rank yields the same number of
    micro batches; missing samples of the last ones are black and have no label.

    Args:
        images: with the statistics of the training pictures; None means those of the corpus.
        failures: receives the reason why the corpus cannot be read; all further batches are black.
    """
    count = min(corpus.num_samples, max_samples or corpus.num_samples)
    stride, size = dp_size * micro_batch_size, task.image_size
    assert size is not None
    own = np.arange(micro_batch_size) + dp_rank * micro_batch_size
    batches = [own + first for first in range(0, count, stride)]
    sources = np.zeros_like(own)
    decoders = make_decoders([corpus], task, images, training=False, seed=0)
    ahead: deque[Request] = deque()
    requested = 0
    try:
        for ids in batches:
            pixels_BCHW = np.zeros((micro_batch_size, corpus.channels, size, size), np.float32)
            labels = [IGNORED] * micro_batch_size
            try:
                while not failures and requested < len(batches) and len(ahead) <= BATCHES_AHEAD:
                    wanted = batches[requested]
                    rows = np.where(wanted < count, 0, -1), wanted, sources
                    ahead.append(decoders.request(np.stack(rows, axis=1)))
                    requested += 1
                if not failures:
                    pixels_BCHW = decoders.finish(ahead.popleft())
                    labels = [int(corpus.labels[i]) if i < count else IGNORED for i in ids]
            except MegarecurError as error:
                failures.append(error)
            yield make_batch(pixels_BCHW, labels, ids, sources, seq_length)
    finally:
        decoders.close()
