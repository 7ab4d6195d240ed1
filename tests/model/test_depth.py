"""Loops per optimizer step: distributions, curricula, truncation; the same on all ranks."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from support.configs import make_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megarecur.config.load import validate
from megarecur.config.recurrence import RecurrenceConfig
from megarecur.data.formats import open_corpus
from megarecur.data.loader import validation_batches
from megarecur.data.open import with_vocab_size
from megarecur.data.tokenizer import ByteTokenizer
from megarecur.errors import ConfigError
from megarecur.launch.cli import evaluate_run
from megarecur.model.transformer import Transformer
from megarecur.parallel.loss import IGNORED
from megarecur.parallel.mesh import Mesh
from megarecur.plan.cost import count_flops, deepest_map, expect_flops
from megarecur.recurrence.depth import (
    Depth,
    count_depths,
    default_depth,
    describe_loops,
    draw_depth,
    is_sampled,
    sample_depth,
)
from megarecur.recurrence.schemes import layer_map
from megarecur.train.evaluate import evaluate_corpus
from megarecur.train.metrics import read_rows
from megarecur.train.trainer import FINISHED, train

ADAPTER: TypeAdapter[Any] = TypeAdapter(RecurrenceConfig)
DRAWS = 4000


def loop(num_loops: Any, **values: Any) -> Any:
    """The recurrence section of a loop."""
    values = {"kind": "loop", "prelude": 1, "core": 2, "coda": 1, "num_loops": num_loops, **values}
    return ADAPTER.validate_python(values)


def poisson(k: int, rate: float) -> float:
    """P(Poisson(rate) = k)."""
    return math.exp(k * math.log(rate) - rate - math.lgamma(k + 1))


def poisson_lognormal(k: int, mean: float, sigma: float) -> float:
    """P(Poisson(e^t) = k), t ~ N(log mean - sigma^2/2, sigma), by the trapezoidal rule."""
    centre, nodes = math.log(mean) - sigma**2 / 2, 400
    total = 0.0
    for i in range(nodes + 1):
        z = -8 + 16 * i / nodes
        density = math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        total += density * poisson(k, math.exp(centre + sigma * z)) * 16 / nodes
    return total


def chi_square_quantile(freedom: int, z: float = 3.09) -> float:
    """The value exceeded with probability 0.001 (Wilson and Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


def chi_square(found: Counter[int], expected: dict[int, float]) -> tuple[float, int]:
    """The statistic and its degrees of freedom; rare values are joined into one cell."""
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-6)
    common = {k: p for k, p in expected.items() if p * DRAWS >= 5}
    cells = [(found[k], p * DRAWS) for k, p in common.items()]
    rest = DRAWS - sum(wanted for _, wanted in cells)
    if rest > 1:
        cells.append((DRAWS - sum(count for count, _ in cells), rest))
    return sum((count - wanted) ** 2 / wanted for count, wanted in cells), len(cells) - 1


SAMPLERS: list[tuple[dict[str, Any], dict[int, float]]] = [
    ({"sampler": "uniform", "min": 1, "max": 7}, dict.fromkeys(range(1, 8), 1 / 7)),
    ({"sampler": "poisson", "mean": 4}, {k + 1: poisson(k, 3.0) for k in range(60)}),
    (
        {"sampler": "poisson", "mean": 4, "max": 6},
        {k + 1: poisson(k, 3.0) for k in range(5)}
        | {6: 1 - sum(poisson(k, 3.0) for k in range(5))},
    ),
    (
        {"sampler": "poisson_lognormal", "mean": 9},
        {k + 1: poisson_lognormal(k, 8.0, 0.5) for k in range(120)},
    ),
]


@pytest.mark.parametrize(("sampler", "expected"), SAMPLERS)
def test_draws_follow_their_distribution(
    sampler: dict[str, Any], expected: dict[int, float]
) -> None:
    """A chi-square test at the 0.001 level; its own planted fault is the next distribution."""
    config = loop(sampler)
    depths = [sample_depth(config, 5, step) for step in range(DRAWS)]
    found = Counter(depth.num_loops for depth in depths if depth)
    statistic, freedom = chi_square(found, expected)
    assert statistic < chi_square_quantile(freedom)
    shifted = {k + 1: p for k, p in expected.items()}
    assert chi_square(found, shifted)[0] > chi_square_quantile(freedom)


def test_large_rates_do_not_underflow() -> None:
    """e^-1000 is 0 in floating point."""
    config = loop({"sampler": "poisson", "mean": 1001})
    values = [sample_depth(config, 1, step).num_loops for step in range(200)]
    assert sum(values) / 200 == pytest.approx(1001, abs=4 * math.sqrt(1000 / 200))
    assert max(values) < 1200


def test_steps_and_seeds_are_independent_and_repeatable() -> None:
    config = loop({"sampler": "uniform", "min": 1, "max": 50})
    first = [sample_depth(config, 1, step) for step in range(100)]
    assert first == [sample_depth(config, 1, step) for step in range(100)]
    assert first != [sample_depth(config, 2, step) for step in range(100)]
    assert len({depth.num_loops for depth in first}) > 25


def test_split_draws_both_kinds_apart() -> None:
    config = loop(
        {
            "sampler": "split",
            "forward_only": {"sampler": "uniform", "min": 0, "max": 3},
            "with_gradient": {"sampler": "uniform", "min": 1, "max": 3},
        }
    )
    pairs = Counter(
        (depth.num_loops - depth.backward_loops, depth.backward_loops)
        for depth in (sample_depth(config, 3, step) for step in range(DRAWS))
    )
    expected = {(n, k): 1 / 12 for n in range(4) for k in range(1, 4)}
    assert set(pairs) == set(expected)
    statistic = sum((pairs[pair] - DRAWS / 12) ** 2 / (DRAWS / 12) for pair in expected)
    assert statistic < chi_square_quantile(11)
    assert default_depth(config) == Depth(4, 2)


def test_truncation_keeps_gradient_in_the_last_loops() -> None:
    config = loop({"sampler": "uniform", "min": 1, "max": 6}, backward_loops=2)
    for step in range(50):
        depth = sample_depth(config, 1, step)
        assert depth.backward_loops == min(depth.num_loops, 2)
        grads = [s.grad for s in layer_map(config, depth)]
        forward_only = 2 * (depth.num_loops - depth.backward_loops)
        assert grads == [True] + [False] * forward_only + [True] * (2 * depth.backward_loops + 1)


@pytest.mark.parametrize(
    ("kind", "over", "expected"),
    [
        ("linear", "both", [(1, 1), (3, 3), (5, 5), (7, 7), (9, 9), (9, 9)]),
        ("linear", "forward", [(1, 1), (3, 3), (5, 5), (7, 7), (9, 9), (9, 9)]),
        ("linear", "backward", [(9, 1), (9, 3), (9, 5), (9, 7), (9, 9), (9, 9)]),
        # 1 - sqrt(1 - u) at u = 0, 1/4, 1/2, 3/4, 1: 0, 0.134, 0.293, 0.5, 1.
        ("1-sqrt", "both", [(1, 1), (2, 2), (3, 3), (5, 5), (9, 9), (9, 9)]),
    ],
)
def test_a_curriculum_grows_from_its_start(kind, over, expected) -> None:
    config = loop(9, curriculum={"kind": kind, "over": over, "steps": 100})
    steps = [0, 25, 50, 75, 100, 1000]
    assert [tuple(sample_depth(config, 1, step))[:2] for step in steps] == expected
    assert is_sampled(config) and default_depth(config) == Depth(9, 9)


def test_a_curriculum_over_forward_leaves_truncation_alone() -> None:
    values = {"kind": "linear", "over": "forward", "steps": 10, "start": 2}
    config = loop(8, backward_loops=3, curriculum=values)
    drawn = [sample_depth(config, 1, step) for step in (0, 5, 10)]
    assert [tuple(depth)[:2] for depth in drawn] == [(2, 2), (5, 3), (8, 3)]


@settings(max_examples=60)
@given(
    least=st.integers(1, 4),
    spread=st.integers(0, 9),
    backward=st.integers(1, 20),
    start=st.integers(1, 12),
    over=st.sampled_from(["forward", "backward", "both"]),
    kind=st.sampled_from(["linear", "1-sqrt"]),
    step=st.integers(0, 300),
)
def test_every_depth_is_legal(least, spread, backward, start, over, kind, step) -> None:
    most = least + spread
    config = loop(
        {"sampler": "uniform", "min": least, "max": most},
        backward_loops=min(backward, most),
        curriculum={"kind": kind, "over": over, "steps": 200, "start": min(start, most)},
    )
    depth = sample_depth(config, 1, step)
    assert 1 <= depth.backward_loops <= depth.num_loops <= most
    steps = layer_map(config, depth)
    assert len(steps) == 2 + 2 * depth.num_loops and steps[-1].grad


def test_costs_are_those_of_what_runs() -> None:
    sampled = make_config(
        scheme="loop", recurrence={"num_loops": {"sampler": "uniform", "min": 1, "max": 5}},
        model={"vocab_size": 64}, train={"steps": 400},
    )  # fmt: skip
    shares = count_depths(sampled)
    assert sum(shares.values()) == pytest.approx(1.0) and len(shares) == 5
    each = {d: count_flops(sampled, layer_map(sampled.recurrence, d)).train for d in shares}
    mean = sum(share * each[depth] for depth, share in shares.items())
    assert expect_flops(sampled).train == round(mean)
    assert len(deepest_map(sampled)) == 2 + 5
    # Two forward-only loops cost two forward passes of the core more than none.
    none, two = (count_flops(sampled, layer_map(sampled.recurrence, Depth(n, 1))) for n in (1, 3))
    assert two.train - none.train == two.forward_only == two.forward - none.forward > 0


def test_loops_in_words() -> None:
    assert describe_loops(loop(4)) == "4"
    sampler = {"sampler": "poisson_lognormal", "mean": 8, "max": 30}
    text = describe_loops(loop(sampler, backward_loops=4))
    assert text == "poisson-lognormal of mean 8, at most 30 (gradient through the last 4)"


@pytest.mark.parametrize(
    ("recurrence", "message"),
    [
        ({"num_loops": 0}, "recurrence.num_loops=0 is too small; set it above 0"),
        (
            {"num_loops": {"sampler": "unifrm", "max": 3}},
            "recurrence.num_loops.sampler: unknown sampler 'unifrm'; did you mean 'uniform'?",
        ),
        ({"num_loops": {"max": 3}}, "recurrence.num_loops: needs a `sampler`"),
        (
            {"num_loops": {"sampler": "uniform", "min": 5, "max": 3}},
            "recurrence.num_loops.max=3 is below min=5",
        ),
        (
            {"num_loops": {"sampler": "uniform", "max": 3, "mx": 4}},
            "recurrence.num_loops.mx: unknown key; did you mean 'max'?",
        ),
        (
            {"num_loops": {"sampler": "uniform", "min": 0, "max": 3}},
            "num_loops.min=0 would run no loop at some steps",
        ),
        ({"num_loops": {"sampler": "poisson", "mean": 1}}, "mean=1.0 must be above min=1"),
        (
            {"num_loops": {"sampler": "poisson", "mean": 4, "max": 3}},
            "max=3 must not be below mean=4.0",
        ),
        ({"num_loops": 3, "backward_loops": 4}, "backward_loops=4 is more than the 3 loops"),
        (
            {"num_loops": {"sampler": "poisson", "mean": 4}, "backward_loops": 9},
            "backward_loops=9 is more than the 8 loops that run with rare exceptions",
        ),
        (
            {"num_loops": 3, "curriculum": {"kind": "linear", "steps": 9, "start": 4}},
            "curriculum.start=4 is more than the 3 loops",
        ),
        (
            {"num_loops": 3, "backward_loops": 2, "injection": "none"},
            "injection=none with loops without gradient",
        ),
        (
            {
                "num_loops": {"sampler": "split", "forward_only": 2, "with_gradient": 2},
                "backward_loops": 2,
            },
            "num_loops draws loops with gradient by itself",
        ),
        (
            {"num_loops": {"sampler": "split", "forward_only": {"sampler": "poissn"},
                           "with_gradient": 2}},
            "recurrence.num_loops.forward_only.sampler: unknown sampler 'poissn'",
        ),
        (
            {"num_loops": 4, "curriculum": {"kind": "lineer", "steps": 3}},
            "recurrence.curriculum.kind='lineer' is unknown; choose 'linear' or '1-sqrt'",
        ),
    ],
)  # fmt: skip
def test_depths_that_cannot_be_are_refused(recurrence, message) -> None:
    values = json.loads(make_config(scheme="loop").model_dump_json())
    base = {"kind": "loop", "prelude": 1, "core": 1, "coda": 1}
    with pytest.raises(ConfigError) as error:
        validate({**values, "recurrence": {**base, **recurrence}}, "test")
    assert message in str(error.value)


# ------------------------------------------------------------------------------------ whole runs

SAMPLED = {"num_loops": {"sampler": "uniform", "min": 1, "max": 4}, "backward_loops": 2}


def depths_of(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Loops by step, as logged."""
    return {
        row["step"]: (row["recurrence/num_loops"], row["recurrence/backward_loops"])
        for row in read_rows(run_dir / "metrics.jsonl")
        if "recurrence/num_loops" in row
    }


def train_until(corpus: Path, run_dir: Path, steps: int) -> int:
    """Train to a step; every step is logged, checkpoints are at the end."""
    config = make_config(
        corpus, "loop", run_dir=str(run_dir), recurrence=SAMPLED, train={"steps": steps},
        model={"dropout": 0.1},
    )  # fmt: skip
    return train(config)


def run_on_ranks(corpus: str, run_dir: str, steps: int) -> list[tuple[int, int]]:
    """Train, and what this rank drew."""
    assert train_until(Path(corpus), Path(run_dir), steps) == FINISHED
    config = make_config(corpus, "loop", recurrence=SAMPLED)
    assert dist.get_world_size() == 2
    return [tuple(draw_depth(config, s))[:2] for s in range(steps)]


def test_depths_are_the_same_on_ranks_and_after_resume(corpus, tmp_path, world) -> None:
    assert train_until(corpus, tmp_path / "straight", 8) == FINISHED
    for steps in (3, 8):
        assert train_until(corpus, tmp_path / "resumed", steps) == FINISHED
    straight = depths_of(tmp_path / "straight")
    assert len(set(straight.values())) > 1 and len(straight) == 8
    assert depths_of(tmp_path / "resumed") == straight
    drawn = world(2).run(run_on_ranks, str(corpus), str(tmp_path / "ranks"), 8)
    assert drawn[0] == drawn[1] == [tuple(map(int, straight[s + 1])) for s in range(8)]
    assert depths_of(tmp_path / "ranks") == straight

    def losses(name: str) -> list[float]:
        return [row["train/loss"] for row in read_rows(tmp_path / name / "metrics.jsonl")
                if "train/loss" in row]  # fmt: skip

    assert losses("resumed") == losses("straight")
    assert losses("ranks") == pytest.approx(losses("straight"), abs=1e-4)
    rows = read_rows(tmp_path / "straight" / "metrics.jsonl")
    for row in (row for row in rows if "train/loss" in row):
        loops, backward = straight[row["step"]]
        assert ("speed/mfu_forward_only" in row) == (loops > backward)
        steps = {key for key in row if key.startswith("recurrence/residual_norm/")}
        assert len(steps) == 2 + loops


def test_evaluation_by_depth_in_training_and_on_the_command_line(corpus, tmp_path, capsys) -> None:
    """One row and one curve per depth, the same numbers in both places; samples as text."""
    config = make_config(
        corpus, "loop", run_dir=str(tmp_path / "run"), recurrence=SAMPLED,
        train={"steps": 2, "eval_depths": [1, 3, 5], "sample_prompts": ["The "],
               "sample_tokens": 5},
    )  # fmt: skip
    assert train(config) == FINISHED
    row = next(r for r in read_rows(tmp_path / "run" / "metrics.jsonl") if "val/loss" in r)
    # The mean of 1 to 4 is 2.5, and evaluation rounds it up.
    assert row["val/depth_3/loss"] == row["val/loss"]
    assert len({row[f"val/depth_{depth}/loss"] for depth in (1, 3, 5)}) == 3
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert board.Scalars("val/depth_5/loss")[0].value == pytest.approx(row["val/depth_5/loss"])
    text = board.Tensors("samples/0/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.startswith("    The ")

    capsys.readouterr()
    picture = tmp_path / "positions.png"
    evaluate_run(tmp_path / "run", depth="1,3,5", samples=0, device="cpu", draw=picture)
    *lines, last = capsys.readouterr().out.splitlines()
    assert "drawn to" in last and picture.stat().st_size
    for depth, line in zip((1, 3, 5), lines, strict=True):
        assert f"depth {depth}: loss {row[f'val/depth_{depth}/loss']:.4f}" in line
    with pytest.raises(ConfigError, match=r"(?s)'x': is not a number.*depth 0: must be at least 1"):
        evaluate_run(tmp_path / "run", depth="0,x", samples=0, device="cpu")


def test_losses_by_position_are_means_of_tokens(corpus, tmp_path) -> None:
    """Position 0 of a document is predicted from nothing before it; the parts make the whole."""
    config = with_vocab_size(make_config(corpus, "loop", data={"seq_length": 64}), 257)
    part = open_corpus(corpus / "val", "bytes", ByteTokenizer().fingerprint)
    model = Transformer(config)
    score = evaluate_corpus(model, part, config, Mesh())
    assert len(score.by_position) == 8 and math.isnan(score.by_position[7])
    found: list[list[float]] = [[] for _ in range(8)]
    for batch in validation_batches(part, seq_length=64, micro_batch_size=2):
        ctx = model.context(batch, step=0, training=False)
        with torch.no_grad():
            x, _ = model.run(
                layer_map(config.recurrence), model.embed(batch.tokens_BS, ctx), ctx, {}
            )
            log_p_BSV = model.all_logits(x).log_softmax(-1)
        counted_BS = batch.labels_BS != IGNORED
        ids_N = batch.labels_BS[counted_BS]
        losses_N = -log_p_BSV[counted_BS].gather(-1, ids_N[:, None])[:, 0]
        positions_N = batch.positions_BS[counted_BS]
        for position, loss in zip(positions_N.tolist(), losses_N.tolist(), strict=True):
            found[position.bit_length()].append(loss)
    assert sum(map(len, found)) == score.tokens
    means = [sum(losses) / len(losses) for losses in found[:7]]
    assert list(score.by_position[:7]) == pytest.approx(means, rel=1e-5)
    assert sum(map(sum, found)) / score.tokens == pytest.approx(score.loss, rel=1e-5)


def test_depths_of_schemes_without_loops_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"eval_depths=\[2\].*recurrence.kind=cycle has no loops"):
        make_config(scheme="cycle", train={"eval_depths": [2]})
