"""The process that decodes pictures into memory that it shares with the loader.

It reads requests from its standard input and writes replies to its standard output. It imports
numpy and Pillow alone, so that it starts in a fraction of a second, and it ends when its input
does: no worker outlives its loader, however that ends. The messages:

    start      a length (int64), JSON of `Start`
    request    slot and number of pictures (int64), then (source, number, epoch) of each (int64)
    reply      slot and bytes of an error, 0 if there is none (int64), then the error as UTF-8
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megarecur.data.mapped_files import REMEDY
from megarecur.data.pictures import Draws, PictureShards, Recipe, write_pixels
from megarecur.errors import DataError, MegarecurError
from megarecur.reading import parse_object

IGNORED_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""Signals that Slurm or a terminal sends to all processes of a job; the loader decides what
follows."""


@dataclass(frozen=True)
class Start:
    """The first message to a worker."""

    folders: Sequence[str]
    """Corpora, by their place in the mixture."""
    shards: Sequence[Mapping[str, Mapping[str, Any]]]
    """Bytes and xxh64 of the shards of each corpus."""
    recipe: Recipe
    seed: int
    memory: int
    """File descriptor of the shared memory."""
    slots: int
    rows_per_slot: int

    def encode(self) -> bytes:
        """Return the message."""
        text = json.dumps(asdict(self)).encode()
        return np.int64(len(text)).tobytes() + text


def read_start(file: BinaryIO) -> Start:
    """Read the first message."""
    (length,) = np.frombuffer(file.read(8), np.int64).tolist()
    values = parse_object(file.read(length))
    recipe = values.pop("recipe")
    recipe |= {name: tuple(recipe[name]) for name in ("scale", "ratio")}
    return Start(recipe=Recipe(**recipe), **values)


class Decoder:
    """Reads pictures of corpora as pixels.

    Args:
        folders: the corpora, named in errors.
        shards: their encoded pictures.
        seed: seed of the augmentation.
    """

    def __init__(
        self, folders: Sequence[str], shards: Sequence[PictureShards], recipe: Recipe, seed: int
    ) -> None:
        self.folders, self.shards, self.recipe = folders, shards, recipe
        self.draws = [Draws(seed, source) for source in range(len(folders))]

    def write(self, rows_R3: NDArray[np.int64], out_RCHW: NDArray[np.uint8]) -> None:
        """Write the pixels of pictures (source, number, epoch); black for a source of -1.

        Raises:
            DataError: a picture cannot be decoded, or does not fit; the message names it.
        """
        for (source, number, epoch), out_CHW in zip(rows_R3.tolist(), out_RCHW, strict=True):
            if source < 0:
                out_CHW[:] = 0
                continue
            drawn = self.draws[source].of(number, epoch) if self.recipe.training else ()
            try:
                write_pixels(self.shards[source].read(number), self.recipe, drawn, out_CHW)
            except (OSError, ValueError, IndexError) as error:
                raise explain_picture(self.folders[source], number, error) from None


def explain_picture(folder: object, number: int, error: Exception) -> DataError:
    """Return an error that names a picture that cannot be decoded."""
    return DataError(
        f"{folder}: picture {number:,} cannot be read: {error}; set data.verify to true to find "
        "damaged files, and prepare the corpus again with `megarecur prep images`"
    )


def slot_array(
    memory: mmap.mmap, slot: int, recipe: Recipe, rows_per_slot: int
) -> NDArray[np.uint8]:
    """Return the pixels of a slot of the shared memory, uint8 [rows, C, H, W]."""
    size = rows_per_slot * recipe.bytes_per_picture
    shape = (rows_per_slot, recipe.channels, recipe.size, recipe.size)
    return np.frombuffer(memory, np.uint8, size, slot * size).reshape(shape)


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Decode what is requested until the requests end."""
    start = read_start(requests)
    decoder, unusable = None, b""
    try:
        shards = [
            PictureShards(Path(folder), files)
            for folder, files in zip(start.folders, start.shards, strict=True)
        ]
        decoder = Decoder(start.folders, shards, start.recipe, start.seed)
    except (OSError, ValueError, IndexError) as error:  # Since the loader opened them.
        unusable = f"the shards of {', '.join(start.folders)} changed ({error}); {REMEDY}".encode()
    memory = mmap.mmap(start.memory, 0)
    slots = [
        slot_array(memory, slot, start.recipe, start.rows_per_slot) for slot in range(start.slots)
    ]
    while len(head := requests.read(16)) == 16:
        slot, count = np.frombuffer(head, np.int64).tolist()
        rows_R3 = np.frombuffer(requests.read(24 * count), np.int64).reshape(count, 3)
        problem = unusable
        try:
            if decoder is not None:
                decoder.write(rows_R3, slots[slot][:count])
        except MegarecurError as error:
            problem = str(error).encode(errors="replace")
        replies.write(np.array([slot, len(problem)], np.int64).tobytes() + problem)
        replies.flush()


def main() -> None:
    """Run a worker."""
    for name in IGNORED_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    # Whatever a library prints must not get between the replies.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with suppress(BrokenPipeError):
        serve(sys.stdin.buffer, replies)
    os._exit(0)


if __name__ == "__main__":
    main()
