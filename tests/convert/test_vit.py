"""Hugging Face's Vision Transformers: converted, their logits, at other resolutions, folded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pictures import batch_pictures, objective
from torch import Tensor

from megarecur.checkpoint.load import load_model, open_tokenizer
from megarecur.config.load import load_config
from megarecur.convert.folding import FoldOptions
from megarecur.convert.hf import convert_hf, export_hf
from megarecur.convert.recursive import fold_hf
from megarecur.errors import ConfigError, DataError
from megarecur.model.resized import resize_model
from megarecur.model.transformer import Transformer

SHAPE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
         "intermediate_size": 48, "image_size": 16, "patch_size": 4, "num_labels": 7,
         "initializer_range": 0.2}  # fmt: skip


def save_vit(transformers: Any, folder: Path, **values: Any) -> Any:
    """A tiny random ViT with loud biases, saved, and in evaluation mode."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(**{**SHAPE, **values})
    model = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model


def our_logits(model: Transformer, pixels_BCHW: Tensor) -> Tensor:
    """Logits of classes."""
    labels = torch.zeros(len(pixels_BCHW), 1, dtype=torch.long)
    batch = batch_pictures(pixels_BCHW, labels, model.config.num_positions)
    with torch.no_grad():
        return objective(model, batch)[1]


@pytest.mark.parametrize(
    "values", [{}, {"num_channels": 1, "hidden_act": "relu"}, {"patch_size": 16, "num_labels": 3}]
)
def test_logits_are_those_of_transformers(
    tmp_path: Path, transformers: Any, values: dict[str, Any]
) -> None:
    source = save_vit(transformers, tmp_path / "hf", **values)
    convert_hf(tmp_path / "hf", tmp_path / "run")
    model, run = load_model(tmp_path / "run")
    pixels = torch.randn(3, values.get("num_channels", 3), 16, 16)
    with torch.no_grad():
        wanted = source(pixels).logits
    torch.testing.assert_close(our_logits(model, pixels), wanted, rtol=0.0, atol=1e-5)
    assert wanted.abs().max() > 1.0
    assert load_config(tmp_path / "run/config.yaml") == run.config
    assert run.config.data.tokenizer == "none" and open_tokenizer(run).vocab_size == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints", "config.yaml",
    ]  # fmt: skip


def test_two_classes_become_one_logit(tmp_path: Path, transformers: Any) -> None:
    """The difference of theirs: probabilities are the same."""
    source = save_vit(transformers, tmp_path / "hf", num_labels=2)
    convert_hf(tmp_path / "hf", tmp_path / "run")
    pixels = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        wanted = source(pixels).logits.softmax(-1)
    found = our_logits(load_model(tmp_path / "run")[0], pixels).softmax(-1)
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("size", [24, 8])
def test_positions_are_interpolated_as_in_transformers(
    tmp_path: Path, transformers: Any, size: int
) -> None:
    source = save_vit(transformers, tmp_path / "hf")
    convert_hf(tmp_path / "hf", tmp_path / "run")
    model = resize_model(load_model(tmp_path / "run")[0], size, "cpu")
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        wanted = source(pixels, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(our_logits(model, pixels), wanted, rtol=0.0, atol=1e-5)


def test_a_model_folds_into_shared_blocks(tmp_path: Path, transformers: Any) -> None:
    """With adapters of full rank a fold computes what the model did."""
    source = save_vit(transformers, tmp_path / "hf")
    options = FoldOptions("relaxed", loops=2, lora_rank=48, norms="own", init="average")
    fold_hf(tmp_path / "hf", tmp_path / "run", options)
    model, run = load_model(tmp_path / "run")
    assert run.config.num_blocks == 2 and run.config.reads_images
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        wanted = source(pixels).logits
    torch.testing.assert_close(our_logits(model, pixels), wanted, rtol=0.0, atol=1e-3)


def test_normalisation_is_that_of_the_preprocessor(
    tmp_path: Path, transformers: Any, caplog: pytest.LogCaptureFixture
) -> None:
    save_vit(transformers, tmp_path / "hf")
    convert_hf(tmp_path / "hf", tmp_path / "run")
    assert caplog.text.count("preprocessor_config.json does not state image_mean") == 1
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]}
    path = tmp_path / "hf/preprocessor_config.json"
    for named, values, mean in (
        ("given", statistics, (0.5, 0.4, 0.3)),
        ("none", statistics | {"do_normalize": False}, (0.0, 0.0, 0.0)),
    ):
        path.write_text(json.dumps(values))
        convert_hf(tmp_path / "hf", tmp_path / named)
        images = load_config(tmp_path / named / "config.yaml").data.images
        assert images is not None and images.mean == mean


def test_what_cannot_be_converted_is_refused(tmp_path: Path, transformers: Any) -> None:
    save_vit(transformers, tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good | {"qkv_bias": False, "problem_type": "regression"}))
    with pytest.raises(ConfigError, match=r"qkv_bias=False is not.*\n.*problem_type='regression'"):
        convert_hf(tmp_path / "hf", tmp_path / "run")
    path.write_text(json.dumps(good | {"num_channels": 4, "image_size": [16, 32]}))
    with pytest.raises(ConfigError, match=r"num_channels=4 is not.*\n.*image_size=\[16, 32\]: "):
        convert_hf(tmp_path / "hf", tmp_path / "run")
    path.write_text(json.dumps(good | {"image_size": 32}))
    with pytest.raises(DataError, match=r"position_embeddings: shape \[1, 17, 32\], config.json: "):
        convert_hf(tmp_path / "hf", tmp_path / "run")
    path.write_text(json.dumps(good | {"model_type": "deit"}))
    with pytest.raises(ConfigError, match=r"model_type='deit' is not supported; .*llama.* vit"):
        convert_hf(tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("unrolled", [None, True, False])
def test_pictures_have_no_export(tmp_path: Path, transformers: Any, unrolled: bool | None) -> None:
    save_vit(transformers, tmp_path / "hf")
    convert_hf(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"task\.kind=image.*have no export in this version"):
        export_hf(tmp_path / "run", tmp_path / "out", unrolled=unrolled)
    assert not (tmp_path / "out").exists()
