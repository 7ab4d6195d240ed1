"""The JSON Schema of a config: current, and it accepts every config that comes along."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from megarecur.config.json_schema import json_schema, write_schema
from megarecur.config.load import load_config, read_sections, to_yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SCHEMA = CONFIGS / "megarecur.schema.json"
SHIPPED = sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name != "cluster")
VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def test_the_schema_that_comes_along_is_current() -> None:
    assert SCHEMA.read_text() == write_schema(), "run: megarecur schema > configs/" + SCHEMA.name
    jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_configs_that_come_along_name_the_schema_and_fit_it(path: Path) -> None:
    line = path.read_text().splitlines()[0]
    start = "# yaml-language-server: $schema="
    assert line.startswith(start)
    assert os.path.samefile(path.parent / line.removeprefix(start), SCHEMA)
    values = read_sections(path)
    assert [error.message for error in VALIDATOR.iter_errors(values)] == []


def test_a_resolved_config_fits_the_schema(tmp_path: Path) -> None:
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(load_config(CONFIGS / "looped.yaml")))
    VALIDATOR.validate(read_sections(path))


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("model", {"hiden_size": 3}),
        ("model", {"hidden_size": 0}),
        ("train", {"steps": "lots"}),
        ("recurrence", {"kind": "cycel"}),
        ("parallel", {"order": "gpipe"}),
    ],
)
def test_mistakes_do_not_fit_the_schema(section: str, values: dict[str, Any]) -> None:
    config = read_sections(CONFIGS / "quickstart.yaml")
    config[section] = {**config.get(section, {}), **values}
    assert not VALIDATOR.is_valid(config)


def test_every_key_is_explained() -> None:
    """Editors show the descriptions: of the field, or of the section that it holds."""
    schema = json_schema()
    parts = [schema, *schema["$defs"].values()]
    silent = [
        f"{part.get('title')}.{key}"
        for part in parts
        for key, field in part["properties"].items()
        if not field.get("description") and "$ref" not in field
    ]
    assert silent == []
