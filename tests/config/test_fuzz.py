"""Drawn configs and damaged files: refused with a remedy, or all is well."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from support.configs import make_config
from support.damage import Damage
from support.drawn import PINNED, Drawer, draw_configs, leaves, sections_in
from support.fuzz import FAILED, LARGE, REFUSED, TRAINED, bases_of, make_data, texts_of, try_config
from support.once import make_once

from megarecur.config.depth import PoissonLogNormal
from megarecur.config.load import parse_yaml
from megarecur.config.run import Config
from megarecur.errors import ConfigError
from megarecur.recurrence.depth import draw

BATCHES, CONFIGS = 15, 20
TRIALS = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What drawn configs read."""
    return make_once(tmp_path_factory, "fuzz", lambda to: make_data(to / "data")) / "data"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(BATCHES))
def test_check_accepts_nothing_that_train_refuses(data, world, tmp_path, number) -> None:
    drawn = draw_configs(bases_of(data), texts_of(data), number, CONFIGS)
    tried = [(values, *try_config(values, tmp_path / "run", world)) for values in drawn]
    failed = [f"{why}\n{values}" for values, outcome, why in tried if outcome == FAILED]
    assert not failed, "\n\n".join(failed)
    outcomes = [outcome for _, outcome, _ in tried]
    assert {REFUSED, TRAINED} <= set(outcomes) <= {REFUSED, TRAINED, LARGE}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Damage:
    """A run, a corpus, a converted model and an export, to damage."""
    return Damage(tmp_path_factory.mktemp("damage"))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 60, TRIALS))
def test_damage_is_named_or_harmless(damaged, first) -> None:
    trials = [t for number in range(first, first + TRIALS) for t in damaged.trial(number)]
    failed = [str(trial) for trial in trials if trial.outcome == FAILED]
    assert not failed, "\n\n".join(failed)


def paths_in(values: Any, prefix: str = "") -> set[str]:
    """The names of all values of a config, those of lists without their places."""
    if isinstance(values, list):
        return {path for value in values for path in paths_in(value, prefix)} | {prefix}
    if not isinstance(values, dict):
        return {prefix}
    inner = [paths_in(value, f"{prefix}.{key}".lstrip(".")) for key, value in values.items()]
    return set().union(*inner) | {prefix}


def test_every_field_is_drawn() -> None:
    """Of every kind of section: strategies follow the schema."""
    drawn = [Drawer(Random(n), texts_of(Path()), 60, 0, 0).section(Config) for n in range(300)]
    found = {path for values in drawn for path in paths_in(values)}
    assert {leaf for leaf in leaves() if leaf.split(".")[-1] not in PINNED} <= found
    kinds = {values.get("recurrence", {}).get("kind") for values in drawn} - {None}
    assert len(kinds) == len(list(sections_in(Config.model_fields["recurrence"].annotation)))


@pytest.mark.parametrize(
    ("sections", "part"),
    [
        ({"model": {"hidden_size": 10**9}}, "model.hidden_size=1000000000 is too large"),
        ({"model": {"norm_eps": 1e-300}}, "model.norm_eps=1e-300 is too small; set"),
        ({"model": {"rope_theta": 1e-9}}, "model.rope_theta=1e-09 is too small; s"),
        ({"optimizer": {"lr": 1e30}}, "optimizer.lr=1e+30 is too large; set it to at most"),
        ({"optimizer": {"lr": 1e-320}}, "optimizer.lr=1e-320 is too small; set it to at least"),
        ({"alarms": {"window": 10**30}}, "is too large; set it to at most 1000000"),
        ({"data": {"seq_length": "9" * 5000}}, "data.seq_length="),
        ({"recurrence": {"kind": "dense", "num_layers": 10**6}}, "num_layers=1000000 is too large"),
        ({"recurrence": {"kind": "reuse_map", "reuse_map": [4000] * 5}}, "20000 steps of the lay"),
        (
            {"recurrence": {"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops":
                            {"sampler": "poisson_lognormal", "mean": 4, "sigma": 50}}},
            "num_loops.sigma=50 is too large; set it to at most 5",
        ),
        (
            {"recurrence": {"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops":
                            {"sampler": "poisson", "mean": 1e300}}},
            "num_loops.mean=1e+300 is too large; set it to at most",
        ),
    ],
)  # fmt: skip
def test_numbers_have_bounds(sections: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(**sections)
    assert part in str(caught.value)
    assert max(map(len, str(caught.value).splitlines())) < 300


@pytest.mark.parametrize("sigma", [1e-300, 0.5, 5.0])
@pytest.mark.parametrize("mean", [1.0000000000000002, 4096.0])
def test_samplers_work_up_to_their_bounds(sigma: float, mean: float) -> None:
    sampler = PoissonLogNormal(sampler="poisson_lognormal", mean=mean, sigma=sigma)
    assert all(1 <= draw(sampler, 1, step, "test") <= 4096 for step in range(300))


def test_sizes_written_as_texts_are_sizes() -> None:
    """What follows from them too."""
    plain, quoted = (
        make_config(model={"hidden_size": size, "num_heads": heads})
        for size, heads in ((32, 4), ("32", 4.0))
    )
    assert quoted == plain and isinstance(plain, Config) and plain.model.head_dim == 8


@pytest.mark.parametrize("text", ["a: " + "9" * 5000, "[" * 600, "a: &a [*a"])
def test_what_yaml_cannot_hold_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="file: not valid YAML"):
        parse_yaml(text, "file")
