"""Pictures that are hostile or change while they are read: one error that names them."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.image_corpora import make_corpus, make_image_config

from megarecur.data.corpus import write_manifest
from megarecur.data.images import ImageCorpus, ImageLoader
from megarecur.data.mapped_files import hash_file
from megarecur.data.pictures import MAX_PIXELS, cut_centre, decode
from megarecur.data_prep.contact_sheet import draw_corpus
from megarecur.data_prep.image_encoding import DamagedPicture, Encoding, encode_picture
from megarecur.errors import DataError

# Pillow's own, which precedes our error and stops nothing.
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 pictures of 3 classes."""
    return make_corpus(tmp_path_factory.mktemp("pictures")) / "train"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "train"))


def claim(width: int, height: int) -> bytes:
    """A tiny PNG whose header claims a huge size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + data + chunk(b"IEND", b"")


def claim_jpeg(width: int, height: int) -> bytes:
    """A JPEG whose header claims a huge size."""
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    content = bytearray(file.getvalue())
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def replace_picture(corpus: Path, number: int, content: bytes) -> None:
    """Put another picture into a shard, with an index and a manifest that agree."""
    shard = corpus / "shard.00000.mds"
    old = shard.read_bytes()
    count = int.from_bytes(old[:4], "little")
    offsets = np.frombuffer(old, np.uint32, count + 1, 4)
    samples = [old[a:b] for a, b in pairwise(offsets.tolist())]
    samples[number] = struct.pack("<I", len(content)) + content + samples[number][-4:]
    ends = np.cumsum([offsets[0], *map(len, samples)]).astype(np.uint32)
    head = old[:4] + ends.tobytes() + old[8 + 4 * count : offsets[0]]
    shard.write_bytes(head + b"".join(samples))
    index = json.loads((corpus / "index.json").read_text())
    index["shards"][0]["raw_data"] |= {"bytes": shard.stat().st_size, "hashes": {}}
    (corpus / "index.json").write_text(json.dumps(index))
    values = json.loads((corpus / "manifest.json").read_text()) | {"identity": ""}
    for name in ("index.json", shard.name):
        values["files"][name] = {
            "bytes": (corpus / name).stat().st_size, "xxh64": hash_file(corpus / name)
        }  # fmt: skip
    (corpus / "manifest.json").write_bytes(write_manifest(values))


def open_loader(corpus: Path, workers: int) -> ImageLoader:
    config = make_image_config(corpus.parent, data={"images": {"workers": workers}})
    assert config.task is not None
    return ImageLoader(
        [(ImageCorpus(corpus), 1.0)], config.task, config.data.images, seq_length=4,
        global_batch_size=4, micro_batch_size=4, dp_rank=0, dp_size=1, seed=7,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- bombs

HUGE = [(10_000, 9_000), (60_000, 2_000), (60_000, 60_000), (1, MAX_PIXELS + 1)]
"""Above our limit, where Pillow only warns or says nothing, and above Pillow's."""


@pytest.mark.parametrize("size", HUGE)
def test_a_header_that_claims_too_many_pixels_is_refused(size: tuple[int, int]) -> None:
    contents = [claim(*size)] + ([claim_jpeg(*size)] if max(size) < 1 << 16 else [])
    for content in contents:
        with pytest.raises(ValueError, match=r"a decompression bomb: .*89,478,485"):
            decode(content, 3)
        with pytest.raises(DamagedPicture, match=r"a decompression bomb: .*89,478,485"):
            encode_picture(content, Encoding())


def test_no_thin_picture_is_resized_to_a_huge_one() -> None:
    thin = Image.new("L", (1, 400_000))
    file = BytesIO()
    thin.save(file, "PNG")
    for call in (lambda: cut_centre(thin, 224, 224),
                 lambda: encode_picture(file.getvalue(), Encoding(resize=224))):  # fmt: skip
        with pytest.raises((ValueError, DamagedPicture), match="bomb: 224 x 89,600,000 pixels"):
            call()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_names_a_bomb(copy: Path, workers: int) -> None:
    for size in HUGE[1:3]:
        replace_picture(copy, 5, claim(*size))
        with open_loader(copy, workers) as loader, pytest.raises(DataError) as error:
            for step in range(3):
                loader.batch(step)
        assert f"{copy}: picture 5 cannot be read: a decompression bomb: " in str(error.value)


def test_a_contact_sheet_names_a_bomb(copy: Path, tmp_path: Path) -> None:
    replace_picture(copy, 5, claim(*HUGE[0]))
    with pytest.raises(DataError, match="picture 5 cannot be read: a decompression bomb: 10,000 x"):
        draw_corpus(copy, tmp_path / "sheet.png")


# -------------------------------------------------------------------------- while they are read


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_cut_while_it_is_read_is_named(copy: Path, workers: int) -> None:
    shard = copy / "shard.00000.mds"
    with open_loader(copy, workers) as loader:
        loader.batch(0)
        os.truncate(shard, 0)  # Reading it would kill the process.
        with pytest.raises(DataError, match=r"shard\.00000\.mds: has 0 bytes instead of .* while"):
            for step in range(1, 12):
                loader.batch(step)


def test_a_shard_that_is_cut_before_workers_open_it_is_named(copy: Path) -> None:
    loader = open_loader(copy, workers=1)
    os.truncate(copy / "shard.00000.mds", 50)
    with loader, pytest.raises(DataError, match=r"shard\.00000\.mds has 50 bytes instead of"):
        loader.batch(0)


def test_a_shard_that_is_rewritten_while_it_is_read_is_named(copy: Path) -> None:
    shard = copy / "shard.00000.mds"
    corpus = ImageCorpus(copy)
    expected = corpus.pictures.read(3)
    os.utime(shard, ns=(1, 1))  # The same content is no harm.
    assert corpus.pictures.read(3) == expected
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    os.utime(shard, ns=(2, 2))
    with pytest.raises(DataError, match=r"shard\.00000\.mds: was rewritten while it was read"):
        corpus.pictures.read(3)


def test_labels_that_are_cut_while_they_are_read_are_named(copy: Path) -> None:
    corpus = ImageCorpus(copy)
    os.truncate(copy / "labels.npy", 0)
    with pytest.raises(DataError, match=r"labels\.npy: has 0 bytes instead of .* while"):
        int(corpus.labels[3])
