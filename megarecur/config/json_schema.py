"""The JSON Schema of a config, with which editors complete and explain keys."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from megarecur.config.run import Config


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a config file; field docstrings become its descriptions."""
    schema = Config.model_json_schema()
    for part in _walk(schema):
        if isinstance(part.get("description"), str):
            part["description"] = " ".join(part["description"].split())
        part.pop("discriminator", None)  # An OpenAPI keyword; editors read `oneOf` instead.
        if "required" in part and "properties" in part:
            fields = part["properties"]
            part["required"] = [
                key for key in part["required"] if not fields[key].pop("derived", 0)
            ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "megarecur config",
    }


def write_schema() -> str:
    """Return the JSON Schema as the text of configs/megarecur.schema.json."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def _walk(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        for value in schema.values():
            yield from _walk(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _walk(value)
