"""The checksum of an export, stored in the header of its safetensors file.

The safetensors format has no checksum of its own. Ours is the xxh3 of config.json, of the header
with zeros at its place, and of all values.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import xxhash

from megarecur.errors import DataError

KEY = "megarecur_xxh3"
ZEROS = "0" * 16
MOST_HEADER = 1 << 28


def find_mark(header: bytes) -> int:
    """Return the position of the checksum in the text of a header; -1 if there is none."""
    place = header.find(f'"{KEY}":"'.encode())
    return -1 if place < 0 else place + len(KEY) + 4


def check_checksum(path: Path, config: Path) -> None:
    """Compare a file of tensors and the config beside it with the checksum in its header.

    Files without a checksum were written by other programs and are not compared.

    Raises:
        DataError: the checksums differ.
    """
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8 or (length := struct.unpack("<Q", start)[0]) > MOST_HEADER:
            return  # The file has no tensors; its reader reports that.
        header = file.read(length)
        place = find_mark(header)
        if place < 0:
            return
        written = header[place : place + len(ZEROS)]
        digest = xxhash.xxh3_64(config.read_bytes())
        digest.update(header[:place] + ZEROS.encode() + header[place + len(ZEROS) :])
        for block in blocks_of(file):
            digest.update(block)
    if digest.hexdigest().encode() != written:
        raise DataError(
            f"{path}: does not match its checksum: it, or {config}, is damaged or was edited; "
            "export the model again, or save the folder once with transformers, which drops the "
            "checksum"
        )


def blocks_of(file: BinaryIO, size: int = 1 << 22) -> Iterator[bytes]:
    """Yield the rest of a file in blocks."""
    while block := file.read(size):
        yield block
