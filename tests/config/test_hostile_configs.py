"""Configs and overrides that nobody writes: one clear error each, soon, and never a traceback.

PYTHONPATH=tests python tests/config/test_hostile_configs.py 3800
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from megarecur.config.load import load_config, parse_yaml, to_yaml
from megarecur.config.run import Config
from megarecur.config.yaml_text import ALIKE, MAX_DEPTH, MAX_VALUES, FastLoader, Loader
from megarecur.errors import ConfigError, MegarecurError
from megarecur.recurrence.depth import refuse_depth
from megarecur.recurrence.schemes import build_map

VARIANTS = 200
BASES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SCALARS = [
    "2026-11-30", "2001-99-99", "2001-01-01 00:00:00Z", "0b_", "0x_", "0b", "0o17", "017", "0_",
    "1_0", "1:30", "190:20:30.15", "!!int x", "!!int ''", "!!float x", "!!bool x", "!!null x",
    "!!str 7", "!!timestamp x", "!!binary aGk=", "!!binary é", "!!set {a, b}", "!!omap [a: 1]",
    "!!pairs [a: 1]", "!!map [1]", "!!seq {a: 1}", "!!int [1]", "!!str [1]",
    "!!python/name:os.system", "!x y", "!<x> y", "²", "٣", "１２", "1²", "9" * 4301,
    "-" + "9" * 4301, "0x" + "f" * 5000, "9" * 300, "9223372036854775808",
    "-9223372036854775809", "1e309", "-1e309", ".inf", "-.inf", ".nan", "1e-320", "1.", ".1",
    "1e3", "+1", "~", "null", "yes", "no", "on", "''", "' '", "'\\0'", '"\\0"', '"\\ud83d"',
    '"\\x1b[2J"', "\u202eabc", "x" * 5000, "[]", "{}", "[1]", "[[1]]", "{a: 1}", "{1: 2}",
    "{[1]: 2}", "{null: 1}", "{true: 1}", "{1: a, 1.0: b}", "? [1]\n: 2", "[" * 63 + "]" * 63,
    "[" * 600, "{a: " * 80 + "1" + "}" * 80, "&a [*a]", "&a {b: *a}", "*nothing", "&a 1",
    "<<: 1", "{<<: 1}", "{<<: [1]}", "{<<: {a: 1}}", "{<<: &m {a: *m}}", "=", "|", ">", "@", "`",
    "%", "- 1", "a: b: c", "\t", "[1, 2", "{a", "'", '"', "# only", "...", "---", "--- 1\n--- 2",
    "\ufeff1", "\x85", "\x07", "\u2028", "../x", "/", "~root", "$(id)", "x\ny", "CON", "://",
    "@7", "a@b@c", "bytes", "none",
]  # fmt: skip
"""Texts for the place of a value."""


def places(values: Any, prefix: str = "") -> list[str]:
    """The dotted names of all sections and values of a config."""
    inner: list[str] = []
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        inner.append(f"{prefix}{key}")
        if isinstance(value, dict | list):
            inner += places(value, f"{prefix}{key}.")
    return inner


def mutate(rng: Random, text: str) -> tuple[str, list[str]]:
    """A text of a config with a mistake in it, and overrides."""
    lines, overrides = text.splitlines(), []
    for _ in range(rng.choice((1, 1, 2))):
        kind, at = rng.randrange(7), rng.randrange(len(lines))
        scalar = rng.choice(SCALARS)
        key, colon, _ = lines[at].partition(":")
        if kind == 0 and colon:
            lines[at] = f"{key}: {scalar}"
        elif kind == 1:
            spot = rng.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:spot] + scalar + lines[at][spot:]
        elif kind == 2 and colon:
            indent = key[: len(key) - len(key.lstrip())]
            lines.insert(at, f"{indent}{scalar}: {rng.choice(SCALARS)}")
        elif kind == 3:
            del lines[at]
        else:
            names = places(yaml.safe_load(text))
            name = rng.choice(names)
            parts = name.split(".")
            if kind == 4:
                parts[rng.randrange(len(parts))] = rng.choice(SCALARS)
            elif kind == 5:
                parts.append(rng.choice(SCALARS))
            overrides.append(".".join(parts) + rng.choice(("=", "=", "=", "", "==")) + scalar)
    return "\n".join(lines) + "\n", overrides


def try_variant(text: str, overrides: list[str], folder: Path) -> tuple[str, str]:
    """What became of a variant, and why; a config that is accepted must be usable."""
    path = folder / "config.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    try:
        config = load_config(path, overrides)
        assert isinstance(load_config_again(folder, config), Config)
        build_map(config)
    except MegarecurError as error:
        message = str(error)
        longest = max(map(len, message.splitlines()))
        return ("refused", message) if longest < 2000 else ("long", message[:300])
    except Exception:
        return "traceback", traceback.format_exc()
    return "accepted", ""


def load_config_again(folder: Path, config: Config) -> Config:
    """A resolved config is written into the run folder and must be read back."""
    path = folder / "again.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    again = load_config(path)
    assert again == config
    return again


def fuzz(folder: Path, number: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How many variants had each outcome, and those that failed."""
    rng, texts = Random(seed), [path.read_text(encoding="utf-8") for path in BASES]
    found: Counter[str] = Counter()
    failed = []
    for i in range(number):
        text, overrides = mutate(rng, rng.choice(texts))
        began = time.monotonic()
        outcome, why = try_variant(text, overrides, folder)
        found[outcome] += 1
        found["slow"] += time.monotonic() - began > 60
        if outcome in ("traceback", "long"):
            failed.append(f"variant {i}: {overrides!r:.300}\n{why[-1500:]}")
    return found, failed


def test_no_variant_of_a_config_ends_in_a_traceback(tmp_path: Path) -> None:
    found, failed = fuzz(tmp_path, VARIANTS, seed=23)
    assert not failed, "\n\n".join(failed)
    assert found["refused"] > VARIANTS // 3 and found["accepted"]


def test_libyaml_reads_plain_texts_as_the_other_parser_does() -> None:
    rng, texts, read = Random(29), [path.read_text(encoding="utf-8") for path in BASES], 0
    for _ in range(VARIANTS // 2):
        text, _ = mutate(rng, rng.choice(texts))
        if not ALIKE.issuperset(text):
            continue
        try:
            value = yaml.load(text, FastLoader)
        except (yaml.YAMLError, ValueError):
            continue
        assert repr(value) == repr(yaml.load(text, Loader)), text
        read += 1
    assert read > VARIANTS // 6


def test_aliases_are_counted_at_each_use() -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    for above, name in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{name}: &{name} [{','.join([f'*{above}'] * 10)}]\n"
    merges = "a: &a {x: 1}\n"
    for above, name in zip("abcdefgh", "bcdefghi", strict=True):
        merges += f"{name}: &{name} {{<<: [{','.join([f'*{above}'] * 20)}]}}\n"
    for text in (bomb, merges):
        with pytest.raises(ConfigError, match=f"file: not valid YAML: more than {MAX_VALUES} val"):
            parse_yaml(text, "file")
    assert parse_yaml("{a: &a [1, 2], b: *a, c: [*a, *a]}", "file")["c"] == [[1, 2], [1, 2]]


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? ", "&a [", "!!seq ["])
def test_nesting_is_bounded(opening: str) -> None:
    for count in (MAX_DEPTH + 1, 5000):
        with pytest.raises(ConfigError, match="file: not valid YAML"):
            parse_yaml(opening * count, "file")


def test_large_files_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    for place in (path, Path("/dev/zero")):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(place)


def test_dates_are_texts() -> None:
    assert parse_yaml("a: 2026-11-30", "file") == {"a": "2026-11-30"}
    assert parse_yaml("[007, 0b11, 1_000, 1e3, .5]", "file") == [7, 3, 1000, "1e3", 0.5]


@pytest.mark.parametrize("loops", [5_000_000, 3_000_000, 10**30, 4097])
def test_a_depth_of_millions_is_refused_before_its_map_is_made(loops: int) -> None:
    quick = load_config(
        BASES[0].parent / "quickstart.yaml",
        ["recurrence={kind: loop, prelude: 1, core: 2, coda: 1, num_loops: 2}"],
    )
    assert "is too large; set the depth to at most 4096" in refuse_depth(quick, loops)
    assert not refuse_depth(quick, 4096)
    for key in ("num_loops", "core"):
        values = {"kind": "loop", "prelude": 1, "core": 2, "coda": 1, "num_loops": 2, key: loops}
        with pytest.raises(ConfigError, match=rf"recurrence\.{key}.* is too large"):
            load_config(BASES[0].parent / "quickstart.yaml", [f"recurrence={json.dumps(values)}"])


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        counts, mistakes = fuzz(Path(name), int(sys.argv[1]), seed=1)
        sys.stdout.write("\n\n".join([*mistakes, str(counts)]) + "\n")
