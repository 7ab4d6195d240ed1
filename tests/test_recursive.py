"""Folding dense models into shared blocks: which layer goes where, adapters, norms, reports.

Shapes: B samples, S positions; A [r, in] and B [out, r] are an adapter's factors.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import make_config
from test_parity import Case, cases, read_case
from torch import Tensor

from megarecur.config.schema import Config
from megarecur.convert.folding import Fold, FoldOptions, arrange, plan_fold, spread
from megarecur.convert.recursive import initial_pair, mean, truncated_svd
from megarecur.errors import ConfigError
from megarecur.recurrence.schemes import layer_map


def dense_config(num_layers: int = 6, **model: Any) -> Config:
    return make_config(
        model={"vocab_size": 11, **model}, recurrence={"kind": "dense", "num_layers": num_layers}
    )


def plan(num_layers: int, scheme: str, **options: Any) -> Fold:
    return plan_fold(FoldOptions(scheme, **options), dense_config(num_layers))


# ------------------------------------------------------------------------------------ which layer


@pytest.mark.parametrize(
    ("num_layers", "count", "expected"),
    [
        (18, 9, [1, 3, 5, 7, 9, 12, 14, 16, 18]),
        (18, 6, [1, 4, 8, 11, 15, 18]),
        (22, 11, [1, 3, 5, 7, 9, 11, 14, 16, 18, 20, 22]),
        (16, 8, [1, 3, 5, 7, 10, 12, 14, 16]),
        (6, 3, [1, 3, 6]),
    ],
)
def test_stepwise_picks_the_published_layers(
    num_layers: int, count: int, expected: list[int]
) -> None:
    assert spread(range(1, num_layers + 1), count) == expected
    fold = plan(num_layers, "cycle", loops=num_layers // count, init="stepwise")
    assert [layers[0] + 1 for layers in fold.made_of] == expected


def test_reuse_map_makes_each_block_of_its_own_neighbours() -> None:
    uses = (4, 2, 1, 1)
    made = {
        init: plan(8, "reuse_map", reuse_map=uses, init=init).made_of
        for init in ("average", "stepwise", "lower", "upper", "random")
    }
    assert made["average"] == ((0, 1, 2, 3), (4, 5), (6,), (7,))
    assert made["lower"] == ((0,), (4,), (6,), (7,))
    assert made["upper"] == ((3,), (5,), (6,), (7,))
    assert made["stepwise"] == ((0,), (4,), (6,), (7,))
    assert all(a[0] in b for a, b in zip(made["random"], made["average"], strict=True))
    fold = plan(10, "reuse_map", reuse_map=uses, init="lower")
    assert fold.sources == tuple(spread(range(10), 8)) and len(fold.dropped) == 2


def test_equal_groups_step_as_the_even_spread_does() -> None:
    for count, loops in ((3, 2), (2, 4), (5, 3), (4, 4)):
        by_map = plan(count * loops, "reuse_map", reuse_map=(loops,) * count, init="stepwise")
        by_loops = plan(count * loops, "sequence", loops=loops, init="stepwise")
        assert by_map.made_of == by_loops.made_of


def test_loop_takes_layers_by_index_and_drops_the_others() -> None:
    fold = plan(9, "loop", prelude="0-1", core="3,5-6", coda="8", loops=2)
    assert fold.sources == (0, 1, 3, 5, 6, 3, 5, 6, 8)
    assert fold.blocks == (0, 1, 2, 3, 4, 2, 3, 4, 5)
    assert fold.made_of == ((0,), (1,), (3,), (5,), (6,), (8,))
    assert fold.dropped == (2, 4, 7)


@pytest.mark.parametrize("num_layers", [5, 6, 8, 9])
@pytest.mark.parametrize(
    "options",
    [
        FoldOptions("cycle", loops=2),
        FoldOptions("relaxed", loops=3, lora_rank=2),
        FoldOptions("sequence", loops=2),
        FoldOptions("middle_cycle", loops=3),
        FoldOptions("middle_sequence", loops=2),
        FoldOptions("reuse_map", reuse_map=(2, 1, 2)),
        FoldOptions("loop", loops=3, core="1-2", coda="4"),
        FoldOptions("loop", loops=2, prelude="0", core="3"),
    ],
    ids=lambda options: options.scheme,
)
def test_the_config_runs_what_the_fold_says(options: FoldOptions, num_layers: int) -> None:
    fold = plan_fold(options, dense_config(num_layers))
    steps = layer_map(make_config(recurrence=fold.recurrence).recurrence)
    assert tuple(step.block for step in steps) == fold.blocks
    assert tuple(step.loop_index for step in steps) == fold.loop_indices
    assert not any(step.reads for step in steps)
    for block, loop, source in zip(fold.blocks, fold.loop_indices, fold.sources, strict=True):
        assert fold.source_of(block, loop) == source
    assert len(fold.made_of) == max(fold.blocks) + 1


def test_random_is_a_function_of_the_seed() -> None:
    picks = {
        seed: plan(12, "cycle", loops=3, init="random", seed=seed).made_of for seed in range(20)
    }
    assert len(set(picks.values())) > 5
    assert picks[3] == plan(12, "cycle", loops=3, init="random", seed=3).made_of
    for made in picks.values():
        layers = [layer for (layer,) in made]
        assert layers == sorted(set(layers)) and len(layers) == 4


# ------------------------------------------------------------------------------------ bad options


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({"scheme": "ring", "loops": 2, "init": "best"}, ["'ring'", "'best'", "stepwise"]),
        ({"scheme": "cycle"}, ["--loops", "needs the number"]),
        ({"scheme": "cycle", "loops": 0}, ["--loops 0"]),
        ({"scheme": "cycle", "loops": 7}, ["--loops 7", "6 layers"]),
        ({"scheme": "cycle", "loops": 4, "strict": True}, ["does not divide the 6", "2 evenly"]),
        ({"scheme": "middle_cycle", "loops": 3, "strict": True}, ["does not divide the 4"]),
        ({"scheme": "relaxed", "loops": 2}, ["--lora-rank"]),
        ({"scheme": "relaxed", "loops": 2, "lora_rank": 33}, ["--lora-rank 33", "most is 32"]),
        ({"scheme": "cycle", "loops": 2, "lora_rank": -1}, ["--lora-rank -1"]),
        (
            {"scheme": "cycle", "loops": 2, "lora_init": "svd", "norms": "own", "coda": "5"},
            ["--lora-init svd", "--norms own", "--coda 5"],
        ),
        ({"scheme": "cycle", "loops": 2, "reuse_map": (2, 1)}, ["--reuse-map"]),
        ({"scheme": "reuse_map", "loops": 2}, ["--loops 2", "4,2,1,1"]),
        ({"scheme": "reuse_map", "reuse_map": (4, 3)}, ["7 layers", "has 6"]),
        ({"scheme": "reuse_map", "reuse_map": (4, 0)}, ["at least once"]),
        ({"scheme": "reuse_map", "reuse_map": (2, 2), "strict": True}, ["4 of 6"]),
        (
            {"scheme": "loop", "loops": 2, "prelude": "0-1", "core": "1-6", "coda": "x",
             "init": "lower", "lora_rank": 2, "lora_init": "svd"},
            ["--core 1-6", "not 6", "also in prelude", "--coda x",
             "--init lower", "--lora-init svd"],
        ),
        ({"scheme": "loop", "loops": 2}, ["--core"]),
        ({"scheme": "loop", "loops": 2, "core": "3-2"}, ["--core 3-2"]),
    ],
)  # fmt: skip
def test_bad_options_are_all_named_at_once(options: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_fold(FoldOptions(**options), dense_config(6))
    for message in messages:
        assert message in str(caught.value)


def test_layer_norms_cannot_be_folded() -> None:
    config = dense_config(4, norm="layer", feed_forward="gelu")
    with pytest.raises(ConfigError, match="--norms fold.*own or share"):
        plan_fold(FoldOptions("relaxed", loops=2, lora_rank=2, norms="fold"), config)
    assert plan_fold(FoldOptions("relaxed", loops=2, lora_rank=2), config).options.norms == "own"


def test_defaults_follow_from_the_rest() -> None:
    plain = plan(6, "cycle", loops=2).options
    assert (plain.init, plain.norms) == ("stepwise", "share")
    relaxed = plan(6, "relaxed", loops=2, lora_rank=4).options
    assert (relaxed.init, relaxed.lora_init, relaxed.norms) == ("average", "svd", "fold")
    sandwich = dense_config(6, norm_position="sandwich")
    own = plan_fold(FoldOptions("relaxed", loops=2, lora_rank=4), sandwich).options
    assert own.norms == "own"


# ---------------------------------------------------------------------------------- first values


def singular_values(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix.to(torch.float64))


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9)])
def test_adapters_hold_what_eckart_and_young_say(shape: tuple[int, int]) -> None:
    residual = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    values, before = singular_values(residual), float("inf")
    for rank in range(1, min(shape) + 3):
        a, b, share = initial_pair(residual, rank, lambda: pytest.fail("not zero"), "svd")
        capped = min(rank, *shape)
        assert a.shape == (capped, shape[1]) and b.shape == (shape[0], capped)
        missed = float((residual - b @ a).norm() ** 2)
        assert missed == pytest.approx(float((values[rank:] ** 2).sum()), rel=1e-4, abs=1e-9)
        assert share == pytest.approx(1 - missed / float((values**2).sum()), abs=1e-6)
        assert missed < before or rank > capped
        before = missed
        # All singular values are in B: A's rows are orthonormal.
        torch.testing.assert_close(a @ a.T, torch.eye(capped), atol=1e-5, rtol=0)


def test_nothing_left_and_zero_start_without_a_change() -> None:
    gaussian = torch.ones(3, 8)
    for residual, init in ((torch.zeros(5, 8), "svd"), (torch.ones(5, 8), "zero")):
        a, b, share = initial_pair(residual, 3, lambda: gaussian, init)
        assert a is gaussian and b.shape == (5, 3) and not b.any() and share == 0.0


def test_average_of_two_gives_opposite_adapters() -> None:
    first, second = torch.randn(2, 10, 14, generator=torch.Generator().manual_seed(5))
    shared = mean([first, second], 2)
    (a1, b1, _), (a2, b2, _) = (truncated_svd(w - shared, 4) for w in (first, second))
    signs = torch.sign((a1 * a2).sum(1))
    torch.testing.assert_close(a1, a2 * signs[:, None], atol=1e-5, rtol=0)
    torch.testing.assert_close(b1, -b2 * signs, atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------------------- parity


def case_fold(case: Case, init: str) -> Fold:
    c = case["config"]
    options = FoldOptions(c["sharing"], loops=c["num_recursion"], init=init, norms="share")
    return arrange(replace(options, lora_rank=c["rank_requested"], lora_init="svd"), c["layers"])


@pytest.mark.parametrize(
    "path", [p for p in cases("relaxed_recursive") if "init_" in p.id or p.marks]
)
def test_parity_relaxed_recursive_first_values(path: Path) -> None:
    """Sources, ties, shared weights, residuals and products B A of every strategy."""
    case, arrays = read_case(path)
    weight, gain = arrays["source.weight"], arrays["source.input_layernorm"]
    assert case["strategies"]
    for init, expected in case["strategies"].items():
        fold = case_fold(case, init)
        assert set(case["original_layers_kept"]) == set(fold.sources)
        assert list(fold.sources) == case["original_layers_kept"]
        first = [fold.blocks.index(block) for block in fold.blocks]
        assert first == expected["tie_first_index"]
        if init == "random":  # Their generator chose: take its choice, and look at ours for form.
            ours = fold.made_of
            assert all(len(layers) == 1 for layers in ours) and list(ours) == sorted(set(ours))
            made = dict(zip(fold.blocks, expected["origin_by_layer_after"], strict=True))
            made_of = tuple((made[block]["copy_of"],) for block in sorted(made))
            fold = replace(fold, made_of=made_of)
        for block, origin in zip(fold.blocks, expected["origin_by_layer_after"], strict=True):
            theirs = origin["mean_of"] if "mean_of" in origin else [origin["copy_of"]]
            assert list(fold.made_of[block]) == theirs
        for prefix, dtype in (("", torch.float32), ("f64.", torch.float64)):
            stored = {
                key.removeprefix(f"{prefix}{init}."): value
                for key, value in arrays.items()
                if key.startswith(f"{prefix}{init}.")
            }
            assert prefix or {"layer_weight", "residual", "lora_delta"} <= stored.keys()
            compare_values(fold, expected, weight.to(dtype), gain.to(dtype), stored)


def compare_values(
    fold: Fold, expected: Case, weight: Tensor, gain: Tensor, stored: dict[str, Tensor]
) -> None:
    """What `fold` makes of all layers' `weight` and norm `gain`, with what they stored of it."""
    shared = {
        "layer_weight": [share(weight, fold, block) for block in fold.blocks],
        "layer_input_layernorm": [share(gain, fold, block) for block in fold.blocks],
        "residual": [],
        "lora_delta": [],
    }
    rank = fold.options.lora_rank
    for step, scale in zip(expected["residual_layers"], expected["scaling"], strict=True):
        residual = weight[fold.sources[step]] - shared["layer_weight"][step]
        some = torch.ones(expected["rank"], residual.shape[1], dtype=residual.dtype)
        a, b, _ = initial_pair(residual, rank, lambda some=some: some, "svd")
        assert a.shape[0] == expected["rank"]
        shared["residual"].append(residual)
        shared["lora_delta"].append(scale * (b @ a))
    for name, values in shared.items():
        if name in stored:
            close(torch.stack(values), stored[name])


def share(tensor: Tensor, fold: Fold, block: int) -> Tensor:
    layers = fold.made_of[block]
    return mean([tensor[layer] for layer in layers], len(layers))


def close(actual: Tensor, expected: Tensor) -> None:
    tol = 1e-11 if expected.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual, expected, atol=tol, rtol=tol)
