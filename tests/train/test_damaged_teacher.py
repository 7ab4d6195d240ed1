"""Stored distributions of a teacher that are damaged: one error that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megarecur.errors import DataError
from megarecur.parallel.regions import TensorParallel
from megarecur.train.stored_teacher import RECORD, StoredTeacher, file_name, len_of


def test_a_damaged_file_of_a_teacher_is_named(tmp_path: Path) -> None:
    record = {"samples": {"model.vocab_size": 8}, "samples_per_file": 1}
    (tmp_path / RECORD).write_text(json.dumps(record))
    teacher = StoredTeacher(tmp_path, TensorParallel())
    for content in (b"", (1 << 42).to_bytes(8, "little"), b"\x02" + bytes(7) + b"{}"):
        (tmp_path / file_name(0)).write_bytes(content)
        assert len_of(tmp_path / file_name(0)) == 0
        with pytest.raises(DataError, match=r"samples-00000\.safetensors: cannot be read"):
            teacher.read(0)
