"""Folders of Hugging Face that claim more than they hold: one error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megarecur.convert.hf import read_special_ids
from megarecur.convert.source import load_pickle, open_weights
from megarecur.errors import ConfigError, DataError


def test_weights_that_claim_too_much_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    head = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})
    for content in (
        (1 << 42).to_bytes(8, "little") + b"{}",
        len(head).to_bytes(8, "little") + head.encode() + bytes(16),
    ):
        path.write_bytes(content)
        refused = pytest.raises(DataError, match=r"model\.safetensors: cannot be read .*again")
        with refused, open_weights(path):
            pytest.fail("it was opened")


def test_a_pickle_holds_what_its_tensors_claim(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    sound = {"a": torch.ones(3, 2)}
    torch.save(sound, path)
    assert load_pickle(path)["a"].equal(sound["a"])
    for hostile in (torch.ones(1).expand(1 << 40), torch.ones(2, 2).to_sparse()):
        torch.save({"a": hostile}, path)
        with pytest.raises(DataError, match=r"pytorch_model\.bin: 'a' claims .*download it again"):
            load_pickle(path)


def test_special_ids_are_ids(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    sound: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": -1}
    assert read_special_ids(sound, path) == sound
    assert set(read_special_ids({}, path).values()) == {None}
    for key in sound:
        for wrong in ("x", 1.5, True, 1 << 40, -2, {}, [[1]], ["x"]):
            with pytest.raises(ConfigError, match=rf"config\.json: {key}=.* is no id"):
                read_special_ids(sound | {key: wrong}, path)
