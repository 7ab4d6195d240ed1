"""One rule between sections: which values conflict, why, and the remedy."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megarecur.config.base import UNREADABLE, Section, UnreadableError, show
from megarecur.config.run import Config

PLACEHOLDER = re.compile(r"\{([\w.]+)\}")
WITH_VALUE = re.compile(r"([\w.]+)=\{\1\}")


@dataclass(frozen=True)
class Rule:
    """A row of the table of conflicts.

    `reason` and `remedy` are templates: `{train.steps}` stands for a value of the config, `{most}`
    for a figure that `when` found.
    """

    keys: tuple[str, ...]
    """Keys in conflict."""
    when: Callable[[Config], bool | Mapping[str, object]]
    """Function that returns whether a config breaks the rule, or figures for the message if it
    does."""
    reason: str
    """Description of the conflict."""
    remedy: str
    """Change that resolves the conflict."""

    def explain(self, config: Config) -> str:
        """Return the message for a config; "" if it keeps the rule or cannot be read."""
        if not all(is_readable(config, key) for key in self.keys):
            return ""
        try:
            found = self.when(config)
            if not found:
                return ""
            values = {name: getattr(config, name) for name in type(config).model_fields}
            figures = {} if isinstance(found, bool) else found
            return _Values().vformat(f"{self.reason}; {self.remedy}", (), {**values, **figures})
        except UnreadableError:
            return ""

    def describe(self) -> tuple[str, str]:
        """Return reason and remedy as Markdown, with placeholders for values."""
        return _without_values(self.reason), _without_values(self.remedy)


def is_readable(config: Config, key: str) -> bool:
    """Return True if a key has a valid value, or is omitted."""
    value: Any = config
    for part in key.split("."):
        if value is UNREADABLE or not isinstance(value, Section):
            break
        value = getattr(value, part, None)
    return value is not UNREADABLE


class _Values(string.Formatter):
    """Formatter that writes values as a config file has them."""

    def format_field(self, value: Any, format_spec: str) -> str:
        """Return a value as written in a config file."""
        return format(value, format_spec) if format_spec else show(value)


def _without_values(template: str) -> str:
    return PLACEHOLDER.sub(r"*\1*", WITH_VALUE.sub(r"`\1`", template))
