"""Reading a config: YAML, `key.sub=value` overrides, schema. All errors are reported at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel

from megarecur.config.base import CONFIG_VERSION, PARTIAL, Section, UnreadableError
from megarecur.config.locate import relocate
from megarecur.config.mistakes import enter, is_entry, read_section, show_value
from megarecur.config.rule import Rule
from megarecur.config.rules import RULES, find_conflicts
from megarecur.config.run import Config
from megarecur.config.yaml_text import MAX_CHARACTERS, MAX_KEY, parse
from megarecur.errors import ConfigError
from megarecur.reading import read_text

SectionT = TypeVar("SectionT", bound=Section)


def load_config(
    path: str | Path, overrides: Sequence[str] = (), rules: Sequence[Rule] = RULES
) -> Config:
    """Read, override and validate a config by the given rules between its sections.

    Raises:
        ConfigError: lists every error of the file and of the overrides.
    """
    values = read_sections(Path(path))
    relocate(values, Path(path))
    problems = [p for override in overrides if (p := apply_override(values, override))]
    return validate(values, str(path), problems, rules)


def read_sections(path: Path) -> dict[str, Any]:
    """Return the values of a YAML file, not validated.

    Raises:
        ConfigError: the file does not exist, is not YAML, or is not a mapping.
    """
    try:
        text = read_text(path, 4 * MAX_CHARACTERS)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a YAML file") from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: holds {type(values).__name__}, not sections; write sections such as `model:`"
        )
    return values


def parse_yaml(text: str, origin: str) -> Any:
    """Parse YAML into plain values.

    Raises:
        ConfigError: the text is not YAML; names line and column.
    """
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(f"{origin}: not valid YAML: {error}; correct it there") from None


def apply_override(values: dict[str, Any], override: str) -> str | None:
    """Set `key.sub=value` in place; the value is YAML. Returns an error message, or None."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        return f"override {show_value(override)} is not of the form key.sub=value; write it as one"
    if len(key) > MAX_KEY:
        return f"override {show_value(override)}: no key has {len(key)} characters; correct it"
    try:
        value = parse(text)
    except ValueError:
        return f"override {show_value(override)}: the value is not valid YAML; correct it"
    *parents, last = key.strip().split(".")
    section: Any = values
    for i, part in enumerate(parents):
        if isinstance(section, list) and not is_entry(section, part):
            shown = show_value(override)
            return f"override {shown}: {'.'.join(parents[:i])} {_entries(section)}"
        section = enter(section, part, create=True)
        if not isinstance(section, dict | list):
            key = ".".join(parents[: i + 1])
            shown = show_value(override)
            return f"override {shown}: {key} is a value, not a section; give {key} a value"
    if isinstance(section, list):
        if not is_entry(section, last):
            return f"override {show_value(override)}: {'.'.join(parents)} {_entries(section)}"
        section[int(last)] = value
    else:
        section[last] = value
    return None


def _entries(section: list[Any]) -> str:
    if not section:
        return "has no entries; set the whole list"
    return f"has entries 0 to {len(section) - 1}; name one of them, or set the whole list"


def validate(
    values: dict[str, Any],
    origin: str,
    problems: Sequence[str] = (),
    rules: Sequence[Rule] = RULES,
) -> Config:
    """Convert plain values to a Config.

    Raises:
        ConfigError: one line for each error, with its path, its value and a remedy, and one for
            each rule between sections that the values break.
    """
    version = values.get("version", CONFIG_VERSION)
    if version != CONFIG_VERSION:
        raise ConfigError(
            f"{origin}: version {show_value(version)} of the config is unknown here "
            f"(this megarecur reads version {CONFIG_VERSION}); use the release that wrote it"
        )
    config, mistakes = read_section(Config, values)
    if config is None:
        partial = Config.model_validate(values, context=PARTIAL)
        mistakes += [line for line in _readable_problems(partial) if line not in mistakes]
    conflicts = find_conflicts(partial if config is None else config, rules)
    return _accept(config, origin, [*problems, *mistakes, *conflicts])


def _readable_problems(section: Section, path: str = "") -> Iterator[str]:
    """Yield the problems inside the sections of a partial config, as far as it can be read."""
    with suppress(UnreadableError):
        yield from (path + problem for problem in section.find_problems())
    for name, value in section:
        if type(value) is tuple:
            parts = {f"{path}{name}.{i}.": part for i, part in enumerate(value)}
        else:
            parts = {f"{path}{name}.": value}
        for inner, part in parts.items():
            if issubclass(type(part), Section):  # isinstance raises for an unreadable value.
                yield from _readable_problems(part, inner)


def validate_section(schema: type[SectionT], values: dict[str, Any], origin: str) -> SectionT:
    """Convert plain values to the section that a schema describes.

    Raises:
        ConfigError: one line for each error, with its path, its value and a remedy.
    """
    section, mistakes = read_section(schema, values)
    return _accept(section, origin, mistakes)


def _accept(section: SectionT | None, origin: str, problems: Sequence[str]) -> SectionT:
    if problems or section is None:
        plural = "s" if len(problems) > 1 else ""
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigError(f"{origin}: {len(problems)} problem{plural}{lines}")
    return section


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML that load_config reads back to an equal Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None)


def flatten(config: BaseModel) -> dict[str, tuple[Any, str]]:
    """Return every leaf field of a config: path -> (value, "fixed" or "free")."""
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
    """Return one line for each fixed field in which a resumed config differs from the run's."""
    old, now = flatten(saved), flatten(new)
    lines = []
    for path in sorted(old.keys() | now.keys()):
        rules = {leaves[path][1] for leaves in (old, now) if path in leaves}
        value, other = old.get(path, (None,))[0], now.get(path, (None,))[0]
        if "fixed" in rules and value != other:
            lines.append(f"{path}: {other!r}, but the run was made with {value!r}")
    return lines
