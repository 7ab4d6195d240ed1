"""Reading a config: YAML, then `key.sub=value` overrides, then the schema; all mistakes at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from megarecur.config.schema import CONFIG_VERSION, Config, Section
from megarecur.errors import ConfigError

SectionT = TypeVar("SectionT", bound=Section)


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice instead of keeping the last."""


def _mapping(loader: StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    twice = sorted({str(key) for key in keys if keys.count(key) > 1})
    if twice:
        raise yaml.constructor.ConstructorError(
            None, None, f"key {twice[0]!r} is written twice", node.start_mark
        )
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and validate a config.

    Raises:
        ConfigError: naming every mistake of the file and of the overrides.
    """
    values = read_sections(Path(path))
    problems = [p for override in overrides if (p := apply_override(values, override))]
    return validate(values, str(path), problems)


def read_sections(path: Path) -> dict[str, Any]:
    """The values of a YAML file, not validated.

    Raises:
        ConfigError: no such file, not YAML, or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a YAML file") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {type(values).__name__}, not sections such as `model:`")
    return values


def parse_yaml(text: str, origin: str) -> Any:
    """YAML to plain values, a ConfigError with line and column for text that is not YAML."""
    try:
        return yaml.load(text, StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None


def apply_override(values: dict[str, Any], override: str) -> str | None:
    """Set `key.sub=value` in place; the value is YAML. Returns what is wrong, if anything."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        return f"override {override!r} is not of the form key.sub=value"
    try:
        value = yaml.load(text, StrictLoader)
    except yaml.YAMLError:
        return f"override {override!r}: the value is not valid YAML"
    *parents, last = key.strip().split(".")
    section: Any = values
    for i, part in enumerate(parents):
        if isinstance(section, list) and not (part.isdigit() and int(part) < len(section)):
            return f"override {override!r}: {'.'.join(parents[:i])} {_entries(section)}"
        section = _enter(section, part, create=True)
        if not isinstance(section, dict | list):
            return f"override {override!r}: {'.'.join(parents[: i + 1])} is a value, not a section"
    if isinstance(section, list):
        if not last.isdigit() or int(last) >= len(section):
            return f"override {override!r}: {'.'.join(parents)} {_entries(section)}"
        section[int(last)] = value
    else:
        section[last] = value
    return None


def _entries(section: list[Any]) -> str:
    return f"has entries 0 to {len(section) - 1}" if section else "has no entries"


def _enter(section: Any, part: str, create: bool) -> Any:
    if isinstance(section, list):
        return section[int(part)] if part.isdigit() and int(part) < len(section) else None
    if isinstance(section, dict):
        if create and section.get(part) is None:
            section[part] = {}
        return section.get(part)
    return None


def validate(values: dict[str, Any], origin: str, problems: Sequence[str] = ()) -> Config:
    """Plain values to a Config.

    Raises:
        ConfigError: one line per mistake, each with its path, its value and the nearest valid name.
    """
    version = values.get("version", CONFIG_VERSION)
    if version != CONFIG_VERSION:
        raise ConfigError(
            f"{origin}: version {version!r} of the config is unknown here "
            f"(this megarecur reads version {CONFIG_VERSION}); use the release that wrote it"
        )
    return validate_section(Config, values, origin, problems)


def validate_section(
    schema: type[SectionT], values: dict[str, Any], origin: str, problems: Sequence[str] = ()
) -> SectionT:
    """Plain values to what a schema describes.

    Raises:
        ConfigError: as `validate`.
    """
    problems = list(problems)
    try:
        section = schema.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
        # A list whose only item is wrong is not also too short.
        inner = {e["loc"][:i] for e in errors for i in range(len(e["loc"]))}
        errors = [e for e in errors if not (e["type"] == "too_short" and e["loc"] in inner)]
        problems += [_describe(schema, e, values) for e in errors]
    if problems:
        plural = "s" if len(problems) > 1 else ""
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigError(f"{origin}: {len(problems)} problem{plural}{lines}")
    return section


def _describe(schema: type[Section], error: Any, values: dict[str, Any]) -> str:
    """One line: path, what is wrong, the value found."""
    path = _without_tags(schema, error["loc"], values)
    name = ".".join(path) or "config"
    kind, given = error["type"], error["input"]
    if kind == "extra_forbidden":
        known = _fields_at(schema, path[:-1], values)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "known keys: " + ", ".join(known)
        return f"{name}: unknown key; {hint}"
    if kind == "missing":
        return f"{name}: required, but missing"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        key = "sampler" if "sampler" in error["ctx"]["discriminator"] else "kind"
        expected = error["ctx"].get("expected_tags")
        if expected is None:
            return f"{name}: needs a `{key}`"
        tags = [tag.strip("' ") for tag in expected.split(",")]
        tag = str(error["ctx"]["tag"])
        near = difflib.get_close_matches(tag, tags, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(tags)
        return f"{name}.{key}: unknown {key} {tag!r}; {hint}"
    if kind == "value_error":
        return f"{name}: {error['ctx']['error']}"
    return f"{name}: {error['msg']} (got {given!r})"


def _without_tags(schema: type[Section], location: Iterable[Any], values: Any) -> list[str]:
    """The path as written in the file: pydantic also lists the union tag, which is no key."""
    path: list[str] = []
    tag_follows = False
    for part in location:
        if tag_follows:
            tag_follows = False
            continue
        model = _model_at(schema, path, values)
        field = model.model_fields.get(str(part)) if model else None
        tag_follows = field is not None and field.discriminator is not None
        path.append(str(part))
    return path


def _fields_at(schema: type[Section], path: Sequence[str], values: Any) -> list[str]:
    """Field names the schema knows at a path of the file."""
    model = _model_at(schema, path, values)
    return sorted(model.model_fields) if model else []


def _model_at(schema: type[Section], path: Sequence[str], values: Any) -> type[BaseModel] | None:
    """The section class the schema has at a path of the file, None for a value."""
    model: Any = schema
    section = values
    for part in path:
        inside_list = isinstance(section, list)
        section = _enter(section, part, create=False)
        if not inside_list and isinstance(model, type) and issubclass(model, BaseModel):
            field = model.model_fields.get(part)
            model = _section_type(field.annotation if field else None, section)
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def _section_type(annotation: Any, section: Any) -> Any:
    """The model class behind an annotation: a union's member by its tag, a tuple's item."""
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
    """The sections among the alternatives of an annotation."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    inner = (
        get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    )
    return [member for argument in inner for member in _members(argument)]


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that load_config reads back to an equal Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None)


def flatten(config: BaseModel) -> dict[str, tuple[Any, str]]:
    """Every leaf field of a config: path -> (value, "fixed" or "free")."""
    leaves: dict[str, tuple[Any, str]] = {}

    def visit(model: BaseModel, prefix: str, inherited: str) -> None:
        for name, field in type(model).model_fields.items():
            extra = field.json_schema_extra
            rule = inherited
            if isinstance(extra, dict):
                rule = str(extra.get("resume", inherited))
            value = getattr(model, name)
            items = list(enumerate(value)) if isinstance(value, tuple) else []
            if isinstance(value, BaseModel):
                visit(value, f"{prefix}{name}.", rule)
            elif items and all(isinstance(item, BaseModel) for _, item in items):
                for i, item in items:
                    visit(item, f"{prefix}{name}.{i}.", rule)
            else:
                leaves[prefix + name] = (value, rule)

    visit(config, "", "fixed")
    return leaves


def changed_fixed_fields(saved: Config, new: Config) -> list[str]:
    """One line per fixed field in which a resumed config differs from the one of its run."""
    old, now = flatten(saved), flatten(new)
    lines = []
    for path in sorted(old.keys() | now.keys()):
        rules = {leaves[path][1] for leaves in (old, now) if path in leaves}
        value, other = old.get(path, (None,))[0], now.get(path, (None,))[0]
        if "fixed" in rules and value != other:
            lines.append(f"{path}: {other!r}, but the run was made with {value!r}")
    return lines
