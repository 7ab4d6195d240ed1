"""Shards that are written without mosaicml-streaming: the same bytes as its writer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.preparing import tree

from megarecur.data.torchvision_stub import make_torchvision_importable
from megarecur.data_prep.mds import ShardWriter

RNG = np.random.default_rng(3)
TOKENS = [{"tokens": RNG.integers(0, 999, 50).astype(np.uint16)} for _ in range(31)]
PICTURES = [{"label": np.int32(i), "image": RNG.bytes(i * 7)} for i in range(40)]


@pytest.mark.parametrize(
    ("columns", "samples"),
    [
        ({"tokens": "ndarray:uint16:50"}, TOKENS),
        ({"tokens": "ndarray:uint16:50"}, []),
        ({"image": "bytes", "label": "int32"}, PICTURES),
    ],
)
def test_the_files_are_those_of_the_library(
    columns: dict[str, str], samples: list[Any], tmp_path: Path
) -> None:
    make_torchvision_importable()
    from streaming import MDSWriter

    theirs = MDSWriter(
        out=str(tmp_path / "theirs"), columns=columns, hashes=["xxh64"], size_limit=900
    )
    ours = ShardWriter(tmp_path / "ours", columns, 900)
    for writer in (theirs, ours):
        for sample in samples:
            writer.write(sample)
        writer.finish()
    assert tree(tmp_path / "ours") == tree(tmp_path / "theirs")
    assert not samples or len(tree(tmp_path / "ours")) > 4


@pytest.mark.parametrize("dtype", ["uint16", "int64"])
def test_an_array_of_another_type_or_length_is_refused(dtype: str, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, {"tokens": "ndarray:uint16:50"}, 900)
    with pytest.raises(ValueError, match="tokens is"):
        writer.write({"tokens": np.zeros(49 if dtype == "uint16" else 50, dtype)})
