"""Tokenizers written as a tokenizer.json: the same ids, or a refusal."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from support.exports import contents, write_run
from support.tokenizers import MODELS, SOURCES, texts, train_model

from megarecur.convert.hf import export_hf
from megarecur.convert.tokenizer import write_hf_tokenizer
from megarecur.data.tokenizer import Tokenizer, load_tokenizer
from megarecur.data_prep.tokenizer import train_tokenizer
from megarecur.errors import DataError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """(ours, theirs) by kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    names = {"bytes": "bytes"}
    for kind, options in {
        "trained here": {},
        "without byte fallback": {"byte_fallback": False, "character_coverage": 0.98},
    }.items():
        path = folder / f"{kind}.model"
        train_tokenizer(SOURCES, path, vocab_size=600, **options)  # type: ignore[arg-type]
        names[kind] = str(path)
    # As Llama's: a space is put before every text.
    prefixed = folder / "prefixed.model"
    prefixed.write_bytes(
        train_model(**MODELS["code"] | {"model_type": "bpe", "add_dummy_prefix": True})
    )
    names["prefixed"] = str(prefixed)
    found = {}
    for kind, name in names.items():
        (folder / kind).mkdir()
        write_hf_tokenizer(name, folder / kind)
        theirs = tokenizers.Tokenizer.from_file(str(folder / kind / "tokenizer.json"))
        theirs.encode_special_tokens = True  # split_special_tokens of tokenizer_config.json
        values = json.loads((folder / kind / "tokenizer_config.json").read_text())
        assert values["split_special_tokens"] is True
        found[kind] = load_tokenizer(name), theirs
    return found


@settings(max_examples=150)
@given(texts)
def test_same_ids_of_any_text(written: dict[str, tuple[Tokenizer, Any]], text: str) -> None:
    for kind, (ours, theirs) in written.items():
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids, kind
        if kind != "without byte fallback":
            assert theirs.decode(ids) == ours.decode(ids), kind
        # Our own reader of such files says the same.
        assert theirs.get_vocab_size() == ours.vocab_size


def test_a_model_that_cannot_be_expressed_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With the text and the ids that would differ; the export goes on without."""
    path = tmp_path / "suffix.model"
    path.write_bytes(train_model(**MODELS["suffix"]))
    with pytest.raises(DataError, match=r"suffix.model: a tokenizer.json would give other ids"):
        write_hf_tokenizer(str(path), tmp_path)
    config = write_run(tmp_path / "run", {"kind": "cycle", "num_blocks": 1, "depth": 2})
    file = tmp_path / "run/config.yaml"
    file.write_text(file.read_text().replace("tokenizer: bytes", f"tokenizer: {path}"))
    assert config.data.tokenizer == "bytes"
    caplog.set_level(logging.WARNING)
    export_hf(tmp_path / "run", tmp_path / "hf")
    assert "instead of" in caplog.text and "the export has no tokenizer" in caplog.text
    assert not {"tokenizer.json", "tokenizer_config.json"} & set(contents(tmp_path / "hf"))
