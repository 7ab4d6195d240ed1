"""The one reader of YAML: plain values, bounded in size, nesting and aliases.

Only null, true and false, numbers, text, lists and mappings exist. Dates stay text, other tags are
errors, and so are keys written twice, half characters, zero bytes, aliases that contain themselves,
and aliases that expand to more than MAX_VALUES values (a few lines of them could stand for
billions).
"""

from __future__ import annotations

import string
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import yaml

MAX_CHARACTERS = 1 << 22
MAX_VALUES = 200_000
"""Maximum number of values, those of aliases counted at each use."""
MAX_DEPTH = 64
MAX_KEY = 200
MAX_DIGITS = 1000
"""Maximum characters of a number; Python itself refuses 4,300 digits."""
ALIKE = frozenset(string.printable) - frozenset("!?|>%\t\r\v\f")
"""Characters of texts that libyaml reads as PyYAML's own parser does, if it accepts them."""
MERGE = "tag:yaml.org,2002:merge"
TAG = "tag:yaml.org,2002:"


class Loader(yaml.SafeLoader):
    """SafeLoader with the limits of this module."""

    yaml_constructors: ClassVar[dict[Any, Any]] = {}
    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {  # type: ignore[misc]
        first: [(tag, pattern) for tag, pattern in resolvers if tag != TAG + "timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.open_nodes = 0
        self.sizes: dict[yaml.Node, tuple[int, int]] = {}
        """Number of values and nesting of each finished node, aliases expanded."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, or return that of an alias, within the limits."""
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        self.open_nodes += 1
        if self.open_nodes > MAX_DEPTH:
            raise yaml.composer.ComposerError(
                None, None, f"nested more than {MAX_DEPTH} times", mark
            )
        node = super().compose_node(parent, index)
        self.open_nodes -= 1
        if node is None or node in self.sizes:
            return node
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        if parts and node.end_mark is None:  # An alias inside of what it stands for.
            raise yaml.composer.ComposerError(None, None, "an alias contains itself", mark)
        sizes = [self.sizes.get(part) for part in parts]
        if any(size is None for size in sizes):
            raise yaml.composer.ComposerError(None, None, "an alias contains itself", mark)
        count = 1 + sum(size[0] for size in sizes if size)
        depth = 1 + max((size[1] for size in sizes if size), default=0)
        if count > MAX_VALUES or depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(
                None, None,
                f"more than {MAX_VALUES} values, or nested more than {MAX_DEPTH} times", mark,
            )  # fmt: skip
        self.sizes[node] = (count, depth)
        return node


class FastLoader(Loader):
    """Loader with the parser of libyaml, which takes a ninth of the time."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        parser = yaml.CSafeLoader(text)
        methods = ("check_event", "peek_event", "get_event")
        vars(self).update({name: getattr(parser, name) for name in methods})


def _mapping(loader: Loader, node: yaml.Node) -> dict[Any, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise _error("is no mapping", node)
    keys = [loader.construct_object(k, deep=True) for k, _ in node.value if k.tag != MERGE]
    seen: set[str] = set()
    for key in keys:
        if isinstance(key, list | dict):
            raise _error("a list or a mapping cannot be a key", node)
        if len(str(key)) > MAX_KEY:
            raise _error(f"a key of {len(str(key))} characters, more than {MAX_KEY}", node)
        if repr(key) in seen:
            raise _error(f"key {key!r:.80} is written twice", node)
        seen.add(repr(key))
    loader.flatten_mapping(node)
    return {
        loader.construct_object(key, deep=True): loader.construct_object(value, deep=True)
        for key, value in node.value
    }


def _sequence(loader: Loader, node: yaml.Node) -> list[Any]:
    if not isinstance(node, yaml.SequenceNode):
        raise _error("is no list", node)
    return [loader.construct_object(value, deep=True) for value in node.value]


def _string(loader: Loader, node: yaml.Node) -> str:
    value = _scalar(node)
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _error(f"{value!a:.80} holds half of a character", node)
    if "\0" in value:
        raise _error(f"{value!a:.80} holds a zero byte, which no name can", node)
    return value


def _scalar(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise _error("is no single value", node)
    return str(node.value)


def _number(construct: Callable[[Any, Any], Any]) -> Callable[[Loader, yaml.Node], Any]:
    """Return a constructor of numbers or truth values whose every failure is a YAMLError."""

    def checked(loader: Loader, node: yaml.Node) -> Any:
        text = _scalar(node)
        if len(text) > MAX_DIGITS:
            raise _error(f"a number of {len(text)} characters, more than {MAX_DIGITS}", node)
        try:
            return construct(loader, node)
        except (ValueError, KeyError, IndexError, OverflowError, AttributeError):
            raise _error(f"{text!a:.80} is no {node.tag.removeprefix(TAG)}", node) from None

    return checked


def _unknown(loader: Loader, node: yaml.Node) -> Any:
    raise _error(f"tag {node.tag!a:.80} is unknown; only plain values can be given", node)


def _error(problem: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


Loader.add_constructor(TAG + "map", _mapping)
Loader.add_constructor(TAG + "seq", _sequence)
Loader.add_constructor(TAG + "str", _string)
for _kind in ("int", "float", "bool", "null"):
    _construct = getattr(yaml.SafeLoader, f"construct_yaml_{_kind}")
    Loader.add_constructor(TAG + _kind, _number(_construct))
Loader.add_constructor(None, _unknown)


def parse(text: str) -> Any:
    """Return the value of YAML.

    Raises:
        ValueError: it is not YAML, or exceeds a limit of this module; names line and column.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"has {len(text)} characters, more than {MAX_CHARACTERS}")
    try:
        if yaml.__with_libyaml__ and ALIKE.issuperset(text):
            with suppress(yaml.YAMLError):  # Errors of PyYAML's own parser quote the text.
                return yaml.load(text, FastLoader)
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (ValueError, RecursionError, OverflowError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from None
