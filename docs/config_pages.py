"""Pages about the config in Markdown: the reference of its keys, and what does not go together."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megarecur.config.base import Section
from megarecur.config.depth import find_excess, find_zero
from megarecur.config.json_schema import json_schema
from megarecur.config.mesh import world_rules
from megarecur.config.rules import RULES
from megarecur.config.run import Config
from megarecur.plan.rules import walk_rules

SECTIONS = "|".join(Config.model_fields)
KEY = re.compile(rf"(?<![`*\w.])((?:{SECTIONS})\.[a-z_.]*[a-z_](?:=\w+)?)")


def render_reference() -> str:
    """Return the reference of the config as Markdown: every section, key, type and default.

    Keys marked *free* may change when a run resumes.
    """
    schema = json_schema()
    sections = schema["$defs"]
    lines = [
        "## Top level",
        "",
        *_table({k: v for k, v in schema["properties"].items() if not _sections_of(v)}, sections),
    ]
    for name, field in schema["properties"].items():
        lines += _section(name, field, sections) if _sections_of(field) else []
    return "\n".join(lines).rstrip() + "\n"


def _section(path: str, field: Mapping[str, Any], sections: Mapping[str, Any]) -> list[str]:
    """Return the headings and tables of a section, and of the sections inside it."""
    lines = [f"## `{path}`", "", *_paragraphs(field.get("description", "")), *_resume(field)]
    names = _sections_of(field)
    for name in names:
        section = sections[name]
        tag = _tag_of(section)
        if tag:
            lines += [f"### `{path}: {{{tag}, ...}}`", ""]
        lines += [
            *_paragraphs(section.get("description", "")),
            *_table(section["properties"], sections),
        ]
    inner: dict[str, Mapping[str, Any]] = {}
    for name in names:
        for key, value in sections[name]["properties"].items():
            if _sections_of(value):
                inner.setdefault(key, value)
    for key, value in inner.items():
        lines += _section(f"{path}.{key}", value, sections)
    return lines


def _table(fields: Mapping[str, Any], sections: Mapping[str, Any]) -> list[str]:
    rows = ["| Key | Type | Default | Meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        free = " *Free.*" if field.get("resume") == "free" else ""
        text = f"{field.get('description', '')}{free}"
        cells = (f"`{name}`", _type_of(field, sections), _default_of(field), text.strip())
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return [*rows, ""] if fields else []


def _paragraphs(text: str) -> list[str]:
    return [text, ""] if text else []


def _resume(field: Mapping[str, Any]) -> list[str]:
    return ["*All fields are free.*", ""] if field.get("resume") == "free" else []


def _tag_of(section: Mapping[str, Any]) -> str:
    """Return `kind: NAME` of one of several sections; "" of a section without alternatives."""
    for key in ("kind", "sampler"):
        value = section["properties"].get(key, {}).get("const")
        if value is not None and key in section.get("required", ()):
            return f"{key}: {value}"
    return ""


def _sections_of(field: Mapping[str, Any]) -> list[str]:
    """Return the names of the sections that a field may hold, in the order of the schema."""
    parts = [field, *field.get("anyOf", ()), *field.get("oneOf", ()), field.get("items", {})]
    found = [part["$ref"].rpartition("/")[2] for part in parts if "$ref" in part]
    for part in parts[1:]:
        found += _sections_of(part) if part and "$ref" not in part else []
    return list(dict.fromkeys(found))


def _type_of(field: Mapping[str, Any], sections: Mapping[str, Any]) -> str:
    """Return a field's type and bounds in words."""
    choices = [*field.get("anyOf", ()), *field.get("oneOf", ())]
    if choices:
        types = [_type_of(choice, sections) for choice in choices]
        return " or ".join(dict.fromkeys(types))
    if "$ref" in field:
        tag = _tag_of(sections[field["$ref"].rpartition("/")[2]])
        return f"`{{{tag}, ...}}`" if tag else "section"
    if "const" in field:
        return f"`{_show(field['const'])}`"
    if "enum" in field:
        return ", ".join(f"`{_show(value)}`" for value in field["enum"])
    kind = field.get("type")
    if kind == "array":
        return f"list of {_type_of(field['items'], sections)}" if "items" in field else "list"
    if kind == "object":
        return f"mapping to {_type_of(field.get('additionalProperties', {}), sections)}"
    words = {"integer": "whole number", "string": "text", "boolean": "true or false"}
    return words.get(str(kind), str(kind)) + _bounds(field)


def _bounds(field: Mapping[str, Any]) -> str:
    names = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {_show(field[name])}" for name, sign in names.items() if name in field]
    return f" {', '.join(bounds)}" if bounds else ""


def _default_of(field: Mapping[str, Any]) -> str:
    """Return a field's default as YAML; "" if its description states the default."""
    if "default" not in field or field["default"] is None or isinstance(field["default"], dict):
        return ""
    return f"`{_show(field['default'])}`"


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_show, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def render_rules() -> str:
    """Return the table of conflicts between sections as Markdown; *italics* stand for values."""
    lines = ["| Keys | Why | Remedy |", "|---|---|---|"]
    for rule in (*RULES, *walk_rules(len), *world_rules(2)):
        keys = "<br>".join(f"`{key}`" for key in rule.keys)
        lines.append(_row(keys, *map(_mark_keys, rule.describe())))
    return "\n".join(lines) + "\n"


def render_section_rules() -> str:
    """Return the table of conflicts inside sections as Markdown, from the messages in their code;
    *italics* stand for values."""
    lines = ["| Section | Why | Remedy |", "|---|---|---|"]
    for section, message in read_messages():
        reason, _, remedy = message.partition("; ")
        lines.append(_row(f"`{section}`", *map(_capitalise, (reason, remedy))))
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    first, *sentences = (cell.replace("|", "\\|") for cell in cells)
    return f"| {first} | {' | '.join(f'{text}.' for text in sentences)} |"


def read_messages() -> Iterator[tuple[str, str]]:
    """Yield the path of a section and a template, for each message about values of that section."""
    schema = json_schema()
    paths = dict(reversed(list(_paths_of(schema, "", schema["$defs"]))))  # The first of several.
    for section in [Config, *_subclasses(Section)]:
        heirs = [paths[heir.__name__] for heir in _subclasses(section) if heir.__name__ in paths]
        path = paths.get(section.__name__, *heirs[:1])
        for function in vars(section).values():
            if inspect.isfunction(function):
                yield from ((path, message) for message in _messages_of(function))
    for function in (find_excess, find_zero):
        yield from (("recurrence", message) for message in _messages_of(function))


def _paths_of(
    part: Mapping[str, Any], path: str, sections: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yield the name of every section in a schema, and the path of its key."""
    for key, field in part["properties"].items():
        for name in _sections_of(field):
            yield name, f"{path}{key}"
            yield from _paths_of(sections[name], f"{path}{key}.", sections)


def _subclasses(section: type[Section]) -> list[type[Section]]:
    direct = section.__subclasses__()
    return [*direct, *(heir for other in direct for heir in _subclasses(other))]


def _messages_of(function: Callable[..., object]) -> Iterator[str]:
    """Yield the messages that a function yields, with placeholders for their values."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Yield) and isinstance(node.value, ast.JoinedStr | ast.Constant):
            parts = getattr(node.value, "values", [node.value])
            text = "".join(_placeholder(part) for part in parts)
            text = re.sub(r"\b([\w.]+)=\*\w+\*", r"`\1`", text)
            yield re.sub(r"(?<![`\w.])([\w.]+=\w+)", r"`\1`", text)


def _placeholder(part: ast.expr) -> str:
    """Return constant text as it is, and a value as the name of its key in italics."""
    if isinstance(part, ast.Constant):
        return str(part.value)
    assert isinstance(part, ast.FormattedValue)
    name = re.sub(r"show\((.*)\)|(?:self|source)\.", r"\1", ast.unparse(part.value))
    name = name.removeprefix("self.")
    return f"*{name if name.isidentifier() else 'value'}*"


def _mark_keys(text: str) -> str:
    """Return a sentence with its keys set as code."""
    return _capitalise(KEY.sub(r"`\1`", text))


def _capitalise(text: str) -> str:
    """Return a sentence with a capital first letter, unless a key or a value comes first."""
    return text if re.match(r"[`*]|\w+[=.]", text) else text[:1].upper() + text[1:]
