"""Errors in the values of a section, one line each: path, value, what is wrong, remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from megarecur.config.base import Section, SectionError

SectionT = TypeVar("SectionT", bound=Section)


def is_entry(section: list[Any], part: str) -> bool:
    """Return True if a part of a key is a valid index of a list, of at most 9 digits."""
    return part.isdecimal() and len(part) < 10 and int(part) < len(section)


def enter(section: Any, part: str, create: bool) -> Any:
    """Return the value at a part of a key, or None; with `create`, make missing sections."""
    if isinstance(section, list):
        return section[int(part)] if is_entry(section, part) else None
    if isinstance(section, dict):
        if create and section.get(part) is None:
            section[part] = {}
        return section.get(part)
    return None


def read_section(
    schema: type[SectionT], values: dict[str, Any]
) -> tuple[SectionT | None, list[str]]:
    """Return the section, or None if there are errors; and the errors."""
    try:
        return schema.model_validate(values), []
    except ValidationError as invalid:
        errors = [(_without_tags(schema, e["loc"], values), e) for e in invalid.errors()]
    # A list with an invalid item is not also reported as too short, or as not being a number.
    inner = {tuple(path[:i]) for path, _ in errors for i in range(len(path))}
    errors = [(p, e) for p, e in errors if e["type"] not in REMEDIES or tuple(p) not in inner]
    lines: list[str] = []
    alternatives: dict[str, list[str]] = {}
    for path, error in errors:
        if error["type"] in REMEDIES:
            name = f"{'.'.join(path) or 'config'}={show_value(error['input'])}"
            alternatives.setdefault(name, []).append(_remedy(error))
            lines += [name] * (len(alternatives[name]) == 1)
        else:
            lines += _describe(schema, path, error, values)
    return None, [
        _join(line, alternatives[line]) if line in alternatives else line for line in lines
    ]


def _remedy(error: ErrorDetails) -> str:
    context = dict(error.get("ctx", {}))
    if "expected" in context:
        context["expected"] = context["expected"].replace("False, True", "false, true")
    return REMEDIES[error["type"]].format_map(context)


def _join(name: str, alternatives: Sequence[str]) -> str:
    """Return one line about a value: why no alternative accepts it, and what they accept."""
    parts = [alternative.partition("; ") for alternative in dict.fromkeys(alternatives)]
    reasons, remedies = [part[0] for part in parts], [part[2] for part in parts]
    return f"{name} {' and '.join(reasons)}; {', or '.join(remedies)}"


REMEDIES = {
    "greater_than": "is too small; set it above {gt}",
    "greater_than_equal": "is too small; set it to at least {ge}",
    "less_than": "is too large; set it below {lt}",
    "less_than_equal": "is too large; set it to at most {le}",
    "finite_number": "is not finite; set it to a finite number",
    "literal_error": "is unknown; choose {expected}",
    "string_too_short": "is too short; give at least {min_length} character",
    "too_short": "has too few entries; give at least {min_length}",
    "too_long": "has too many entries; give at most {max_length}",
    "int_type": "is not a whole number; set it to one",
    "int_parsing": "is not a whole number; set it to one",
    "int_from_float": "is not a whole number; set it to one",
    "int_parsing_size": "has more than 4300 digits; set it to a smaller number",
    "float_type": "is not a number; set it to one",
    "float_parsing": "is not a number; set it to one",
    "bool_type": "is not true or false; set it to one of them",
    "bool_parsing": "is not true or false; set it to one of them",
    "string_type": "is not text; put it in quotes, or set it to a text",
    "dict_type": "is not a section; write it as {{key: value}}",
    "model_type": "is not a section; write it as {{key: value}}",
    "model_attributes_type": "is not a section; write it as {{key: value}}",
    "tuple_type": "is not a list; write it as [a, b]",
    "list_type": "is not a list; write it as [a, b]",
    "invalid_key": "is not text; put the key in quotes",
}
"""Error message and remedy by pydantic's type of error."""


def _describe(
    schema: type[Section], path: Sequence[str], error: Any, values: dict[str, Any]
) -> list[str]:
    """Return one line for each error: path, value, what is wrong, remedy."""
    name = ".".join(path) or "config"
    kind, given = error["type"], error["input"]
    context = error.get("ctx", {})
    if kind == "extra_forbidden":
        known = _fields_at(schema, path[:-1], values)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "known keys: " + ", ".join(known)
        return [f"{name}: unknown key; {hint}"]
    if kind == "missing":
        return [f"{name}: required, but missing; add it"]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        key = "sampler" if "sampler" in context["discriminator"] else "kind"
        expected = context.get("expected_tags")
        if expected is None:
            return [f"{name}: needs a `{key}`; add it to the section"]
        tags = [tag.strip("' ") for tag in expected.split(",")]
        tag = show_value(context["tag"])
        near = difflib.get_close_matches(tag.strip("'"), tags, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(tags)
        return [f"{name}.{key}: unknown {key} {tag}; {hint}"]
    if kind == "value_error":
        if isinstance(context["error"], SectionError):
            return [".".join([*path, problem]) for problem in context["error"].problems]
        return [f"{name}: {context['error']}"]
    return [f"{name}={show_value(given)} is not valid; {error['msg']}"]


def show_value(value: Any, most: int = 80) -> str:
    """Return a value as Python writes it, cut to `most` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return "a value too long to print"
    return text if len(text) <= most else f"{text[:most]}..."


def _without_tags(schema: type[Section], location: Iterable[Any], values: Any) -> list[str]:
    """Return the path as written in the file. Pydantic's also lists alternatives of unions."""
    path: list[str] = []
    tag_follows = tagged = False
    section: Any = values
    for part in location:
        if not tagged and (tag_follows or _is_alternative(part, section)):
            tagged = True
            continue
        tagged = False
        section = enter(section, str(part), create=False)
        model = _model_at(schema, path, values)
        field = model.model_fields.get(str(part)) if model else None
        tag_follows = field is not None and field.discriminator is not None
        path.append(str(part))
    return path


def _is_alternative(part: Any, section: Any) -> bool:
    """Return True if a part of pydantic's path names an alternative of a union, not a key."""
    if not isinstance(section, dict):
        return isinstance(part, str)
    return part not in section and part in (section.get("kind"), section.get("sampler"))


def _fields_at(schema: type[Section], path: Sequence[str], values: Any) -> list[str]:
    """Return the field names of the schema at a path of the file."""
    model = _model_at(schema, path, values)
    return sorted(model.model_fields) if model else []


def _model_at(schema: type[Section], path: Sequence[str], values: Any) -> type[BaseModel] | None:
    """Return the section class of the schema at a path of the file; None for a value."""
    model: Any = schema
    section = values
    for part in path:
        inside_list = isinstance(section, list)
        section = enter(section, part, create=False)
        if not inside_list and isinstance(model, type) and issubclass(model, BaseModel):
            field = model.model_fields.get(part)
            model = _section_type(field.annotation if field else None, section)
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def _section_type(annotation: Any, section: Any) -> Any:
    """Return the model class of an annotation: a union's member by its tag, a tuple's item."""
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0]
    members = _members(annotation)
    for member in members:
        for key in ("kind", "sampler"):
            tag = member.model_fields.get(key)
            given = section.get(key) if isinstance(section, dict) else None
            if tag is not None and given in get_args(tag.annotation):
                return member
    return members[0] if len(members) == 1 else annotation


def _members(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections among the alternatives of an annotation."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    inner = (
        get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    )
    return [member for argument in inner for member in _members(argument)]
