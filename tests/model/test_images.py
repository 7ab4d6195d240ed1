"""Models of pictures: patches, class tokens, positions, every scheme, other resolutions, and what
their configs refuse.

Shapes: B pictures, C channels, H and W pixels, S positions, D hidden.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.harness import assert_gradients_close
from support.meshes import aot_eager, later
from support.models import SCHEMES, assert_same, build
from support.pictures import DENSE, make_pictures, objective, picture_config, run
from torch import Tensor

from megarecur.config.load import to_yaml, validate
from megarecur.config.run import Config
from megarecur.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from megarecur.errors import ConfigError, DataError
from megarecur.launch.check import describe
from megarecur.launch.terminal import make_console
from megarecur.model.compile import CompiledModel
from megarecur.model.patches import cut_patches, fixed_positions, resize_positions
from megarecur.model.resized import resize_config, resize_model
from megarecur.model.transformer import Transformer
from megarecur.recurrence.inventory import build_inventory, is_with_embedding
from megarecur.train.verify import certified

RING = {"kind": "ring", "depth": 3, "level_rank": 3, "feed_forward_rank": 2}
UNIVERSAL = {"kind": "universal", "depth": 3, "halting": {"mode": "token"}}
GLOBAL = {"kind": "universal", "depth": 3, "halting": {"mode": "global"}}
CLASS_TOKEN = {"pooling": "class_token"}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{name: (scheme, {}) for name, scheme in SCHEMES.items()},
    "ring": (RING, {"model": {"attention_bias": "qkv", "feed_forward_bias": True}}),
    "token halting": (UNIVERSAL, {}),
    "global halting": (GLOBAL, {"model": {"gate": True}}),
    "adapters": (SCHEMES["cycle"], {"adapters": {"rank": 2, "norms": True}}),
    "admin": (SCHEMES["cycle"], {"model": {"norm_position": "post", "residual": "admin"}}),
    "one wide": (SCHEMES["dense"], {"model": {"shared_feed_forward": True}}),
    "memory": (DENSE, {"temporal": {"chunk_length": 5, "num_slots": 3}, "task": {}}),
    "read memory": (
        GLOBAL,
        {"temporal": {"chunk_length": 6, "num_slots": 3, "pooling": "mean"}, "task": {}},
    ),
}  # fmt: skip


def make(kind: str, **sections: Any) -> Config:
    """A config of a kind, with a class token where there is no memory."""
    recurrence, own = KINDS[kind]
    merged = {"task": CLASS_TOKEN, **own}
    for name, section in sections.items():
        merged[name] = {**merged.get(name, {}), **section}
    return picture_config(recurrence, **merged)


def build_loud(config: Config) -> Transformer:
    """The model, with factors of signals and adapters that start at zero moved off it."""
    model = build(config)
    for name, parameter in model.parameters_by_name.items():
        if not parameter.any():
            generator = torch.Generator().manual_seed(len(name))
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.refresh()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind: str) -> None:
    config = make(kind)
    _, logits, gradients = run(build_loud(config), make_pictures(config), training=True)
    assert logits.shape == (3, 5)
    assert not [name for name, gradient in gradients.items() if not gradient.any()]


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("kind", ["ring", "token halting", "loop_linear_random", "memory"])
def test_recompute_changes_no_bit(kind: str, recompute: str) -> None:
    dropout = {"dropout": 0.2, "attention_dropout": 0.1}
    found = []
    for policy in ("none", recompute):
        config = make(kind, model=dropout, train={"recompute": policy})
        found.append(run(build_loud(config), make_pictures(config), training=True))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("kind", ["ring", "token halting", "global halting", "memory"])
def test_a_picture_does_not_depend_on_the_others_of_its_batch(kind: str) -> None:
    config = make(kind, model={"dropout": 0.2})
    model = build_loud(config)
    loss, logits, gradients = run(model, make_pictures(config, 3), training=True)
    parts = [
        run(model, make_pictures(config, 1, first), training=True) for first in (100, 101, 102)
    ]
    torch.testing.assert_close(torch.stack([part[0] for part in parts]).sum(), loss)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), logits)
    sums = {name: sum((part[2][name] for part in parts), torch.zeros(())) for name in gradients}
    assert_gradients_close(sums, gradients, 1e-11)


# ----------------------------------------------------------------------- patches and positions


@pytest.mark.parametrize("pooling", ["mean", "class_token"])
@pytest.mark.parametrize(("size", "patch", "channels"), [(12, 4, 3), (6, 1, 1), (8, 8, 3)])
def test_a_model_is_a_vision_transformer(
    pooling: str, size: int, patch: int, channels: int
) -> None:
    """Against torch's own layers: a convolution with the stride of a patch, encoder layers, one
    linear layer of the pooled states."""
    config = picture_config(
        DENSE,
        model={"feed_forward": "gelu", "feed_forward_bias": True, "attention_bias": "all"},
        task={"image_size": size, "patch_size": patch, "channels": channels, "pooling": pooling},
    )
    model, batch = build(config), make_pictures(config)
    given = {name: p.detach() for name, p in model.parameters_by_name.items()}
    weight = given["patches.weight"].view(32, channels, patch, patch)
    x = F.conv2d(batch.pixels_BCHW.double(), weight, given["patches.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    if pooling == "class_token":
        x = torch.cat((given["class_token"].expand(3, 1, -1), x), 1)
    x = x + given["embedding.positions"]
    for block in range(2):
        layer = torch.nn.TransformerEncoderLayer(
            32, 4, 48, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64
        )
        own = {n.removeprefix(f"blocks.{block}."): p for n, p in given.items()}
        parts = [f"attention.{name}" for name in ("query", "key", "value")]
        layer.load_state_dict(
            {
                f"self_attn.in_proj_{kind}": torch.cat([own[f"{part}.{kind}"] for part in parts])
                for kind in ("weight", "bias")
            }
            | {
                f"{theirs}.{kind}": own[f"{ours}.{kind}"]
                for theirs, ours in {
                    "self_attn.out_proj": "attention.output", "norm1": "attention_norm",
                    "norm2": "feed_forward_norm", "linear1": "feed_forward.up",
                    "linear2": "feed_forward.down",
                }.items()
                for kind in ("weight", "bias")
            }
        )  # fmt: skip
        x = layer(x)
    x = F.layer_norm(x, (32,), given["final_norm.weight"], given["final_norm.bias"])
    pooled = x[:, 0] if pooling == "class_token" else x.mean(1)
    expected = F.linear(pooled, given["task.output.weight"], given["task.output.bias"])
    loss, logits, _ = run(model, batch)
    torch.testing.assert_close(logits, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        loss, F.cross_entropy(expected, batch.labels_BS[:, 0], reduction="sum")
    )


def test_patches_go_row_after_row() -> None:
    """And the values of a patch by channel, row and column."""
    pixels_BCHW = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patches = cut_patches(pixels_BCHW, 2)
    assert patches.shape == (2, 6, 12)
    for b, row, column in ((0, 0, 0), (0, 0, 2), (1, 1, 1)):
        square = pixels_BCHW[b, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(patches[b, 3 * row + column], square.flatten())


def test_sinusoids_of_two_dimensions() -> None:
    """Columns in the first half of the channels, rows in the second; a class token has none."""
    config = picture_config(model={"positions": "sinusoidal_2d"}, task=CLASS_TOKEN)
    table = fixed_positions(config, torch.float64, torch.device("cpu"))
    assert table is not None and table.shape == (1, 17, 32) and not table[0, 0].any()
    for row, column in ((0, 0), (0, 3), (2, 0), (3, 1)):
        for k in (0, 3, 7):
            rate = 10000.0 ** (-k / 7)
            found = table[0, 1 + 4 * row + column, [k, 8 + k, 16 + k, 24 + k]].tolist()
            waves = [f(place * rate) for place in (column, row) for f in (math.sin, math.cos)]
            assert found == pytest.approx(waves, abs=1e-12)


def test_every_position_is_its_own() -> None:
    """Without positions a model of mean pooling cannot tell where patches are; with any it can."""
    for positions in ("none", "learned", "sinusoidal", "sinusoidal_2d", "rope", "alibi", "xpos"):
        config = picture_config(model={"positions": positions, "init_std": 0.3})
        model, batch = build(config), make_pictures(config, 1)
        turned = replace(batch, pixels_BCHW=batch.pixels_BCHW.flip(-2).roll(3, 1))
        shifted = replace(batch, pixels_BCHW=batch.pixels_BCHW.roll((2, 4), (2, 3)))
        before, after = objective(model, batch)[1], objective(model, shifted)[1]
        assert torch.allclose(before, after, rtol=0, atol=1e-12) == (positions == "none")
        assert not torch.allclose(before, objective(model, turned)[1])


# ------------------------------------------------------------------------------ other resolutions


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "sinusoidal_2d", "rope"])
@pytest.mark.parametrize("pooling", ["mean", "class_token"])
def test_a_model_reads_pictures_of_another_size(positions: str, pooling: str) -> None:
    config = picture_config(RING, model={"positions": positions}, task={"pooling": pooling})
    model = build_loud(config)
    same = resize_model(model, 8, "cpu")
    assert_same(run(same, make_pictures(config)), run(model, make_pictures(config)))
    larger = resize_model(model, 12, "cpu")
    assert larger.config.num_positions == 36 + (pooling == "class_token")
    objective(larger, make_pictures(larger.config))
    table, token = "embedding.positions", int(pooling == "class_token")
    for name, parameter in larger.parameters_by_name.items():
        if name != table:
            assert torch.equal(parameter, model.parameters_by_name[name])
    if positions == "learned":
        before, after = model.parameters_by_name[table], larger.parameters_by_name[table]
        assert torch.equal(after[:token], before[:token])
        square = before[token:].view(4, 4, 32).permute(2, 0, 1)
        resized = F.interpolate(square[None], scale_factor=1.5, mode="bicubic")[0]
        torch.testing.assert_close(after[token:].T, resized.flatten(1).detach())


def test_interpolation_keeps_directions() -> None:
    """Rows stay rows: a table that varies along one of them varies along it alone, in order."""
    grid = torch.arange(8.0)
    table = torch.stack((grid[:, None].expand(8, 8), grid[None].expand(8, 8)), -1).flatten(0, 1)
    for size in (16, 5):
        resized = resize_positions(table, 0, size).view(size, size, 2)
        rows, columns = resized[..., 0], resized[..., 1]
        torch.testing.assert_close(rows, rows[:, :1].expand(size, size))
        torch.testing.assert_close(columns, rows.T)
        assert (rows[1:, 0] > rows[:-1, 0]).all() and abs(rows.mean() - 3.5) < 1e-5


def test_evaluation_cuts_out_the_same_share() -> None:
    data = {"train": [{"path": "none"}], "images": {"crop": "padded", "eval_resize": 10}}
    resized = resize_config(picture_config(data=data), 12)
    assert resized.data.images is not None and resized.data.images.eval_resize == 15


def test_a_size_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--image-size 9.*\n.*patch_size=2 does not divide"):
        resize_config(picture_config(), 9)
    text = validate(
        {
            "run_dir": "run", "model": {"hidden_size": 8, "num_heads": 1}, "recurrence": DENSE,
            "data": {"train": [{"path": "x"}], "tokenizer": "bytes", "seq_length": 8},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
        },
        "test",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="--image-size 9: the run classifies no pictures"):
        resize_config(text, 9)


# ------------------------------------------------------------------------------------- the config


def test_a_config_states_positions_and_no_tokenizer() -> None:
    config = picture_config(task=CLASS_TOKEN)
    assert config.data.seq_length == config.model.max_positions == 17
    assert config.data.tokenizer == "none" and config.model.vocab_size is None
    assert validate(_values(config), "again") == config
    names = build_inventory(config)
    assert "embedding.weight" not in names and "head.weight" not in names
    assert [n for n in names if is_with_embedding(n)] == [
        "patches.weight", "patches.bias", "class_token", "embedding.positions",
    ]  # fmt: skip
    assert names["task.output.weight"].shape == (5, 32)
    tokenizer = load_tokenizer("none")
    assert tokenizer.vocab_size == 0 and tokenizer.fingerprint == tokenizer_fingerprint("none")
    with pytest.raises(DataError, match="reads no text"):
        tokenizer.encode("a")


def _values(config: Config) -> dict[str, Any]:
    import yaml

    values: dict[str, Any] = yaml.safe_load(to_yaml(config))
    return values


REFUSED = {
    "patch_size=3 does not divide image_size=8": {"task": {"patch_size": 3}},
    "needs both; set them": {"task": {"patch_size": None}},
    "pooling=end is for sequences of tokens": {"task": {"pooling": "end"}},
    "augment=true is for sequences of tokens": {"task": {"augment": True}},
    "truncate=true is for sequences of tokens": {"task": {"truncate": True}},
    "model.causal=true": {"model": {"causal": True}},
    "is not the number of positions of a picture \\(16": {
        "data": {"train": [{"path": "none"}], "seq_length": 15}
    },
    "pictures are no text": {"data": {"train": [{"path": "none"}], "tokenizer": "bytes"}},
    "needs a hidden_size of at least 8 that 4 divides, not 6": {
        "model": {"positions": "sinusoidal_2d", "hidden_size": 6, "num_heads": 1}
    },
    "exits are for runs that predict text": {
        "recurrence": {"kind": "cycle", "num_blocks": 1, "depth": 2}, "exits": {},
    },
    "an encoder-decoder predicts target sentences": {"encoder": DENSE},
    "image_size=8 is for kind=image, not sequence": {"task": {"kind": "sequence"}},
    "does not divide data.seq_length=17": {
        "task": CLASS_TOKEN, "parallel": {"tensor": 2, "sequence_parallel": True},
    },
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_pictures_cannot_have_is_refused(message: str) -> None:
    sections = dict(REFUSED[message])
    with pytest.raises(ConfigError, match=message):
        picture_config(sections.pop("recurrence", DENSE), **sections)


def test_several_mistakes_are_reported_together() -> None:
    with pytest.raises(ConfigError, match="4 problems") as caught:
        picture_config(
            task={"patch_size": 3, "augment": True},
            model={"causal": True, "vocab_size": 9},
        )
    assert "required" not in str(caught.value)


# ------------------------------------------------------------------------- the rest of the system


def test_check_describes_pictures() -> None:
    config = picture_config(RING, "bf16", task={**CLASS_TOKEN, "image_size": 32, "patch_size": 4})
    console = make_console()
    with console.capture() as capture:
        console.print(describe(config))
    text = capture.get()
    assert "65 (8 x 8 patches + class token)" in text and "model.vocab_size" not in text
    assert "attention counts 65 keys per token" in text


@pytest.mark.parametrize(("size", "patch"), [(224, 16), (32, 4), (30, 5), (7, 7)])
@pytest.mark.parametrize("pooling", ["mean", "class_token"])
def test_verify_makes_pictures_short(size: int, patch: int, pooling: str) -> None:
    """Pictures stay, since the corpora decide them; patches grow."""
    config = picture_config(
        RING, task={"image_size": size, "patch_size": patch, "pooling": pooling},
        model={"num_heads": 4, "hidden_size": 64},
    )  # fmt: skip
    small = certified(config, True, 1)
    assert small.task is not None and small.task.image_size == size
    assert small.num_positions <= max(16, 1 + (pooling == "class_token"))
    assert small.model.hidden_size == 32
    whole = certified(config, False, 1)
    assert whole.task == config.task and whole.num_positions == config.num_positions


def test_verify_cuts_pictures_that_ranks_can_share() -> None:
    config = picture_config(
        task={**CLASS_TOKEN, "image_size": 45, "patch_size": 5},
        parallel={"tensor": 2, "sequence_parallel": True},
    )
    small = certified(config, True, 1)
    assert small.num_positions == 26, "25 patches of 9 pixels, and the class token"


@pytest.mark.parametrize("kind", [later("ring"), "cycle"])
def test_compiled_blocks_compute_what_eager_ones_do(kind: str) -> None:
    """By one graph, since all pictures have the same length."""
    config = make(kind, model={"dropout": 0.1})
    expected = run(build_loud(config), make_pictures(config), training=True)
    model = build_loud(config)
    compiled = CompiledModel(model, aot_eager)
    found = run(model, make_pictures(config), training=True)
    assert compiled.graphs == 1
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-12, atol=1e-12)
    assert_gradients_close(found[2], expected[2], 1e-11)
    run(model, make_pictures(config, 3, 7), training=True)
    assert compiled.news() == ""


def gradient_of(model: Transformer, config: Config) -> Tensor:
    return run(model, make_pictures(config))[2]["patches.weight"]


def test_bf16_sums_gradients_of_patches_in_fp32() -> None:
    config = picture_config(DENSE, "bf16", model={"hidden_size": 64, "init_std": 0.05})
    model = Transformer(config)
    found = gradient_of(model, config)
    wide = Transformer(picture_config(DENSE, "fp64", model={"hidden_size": 64, "init_std": 0.05}))
    for name, parameter in wide.parameters_by_name.items():
        parameter.data.copy_(model.parameters_by_name[name].data)
    expected = gradient_of(wide, wide.config)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.02 * expected.norm()
