"""Configs drawn from the schema: every field, kind and sampler, small, wild or of a wrong type.

Strategies are made of the pydantic models themselves, so that a new field is drawn without new
code; only what names files, or a machine, is listed here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megarecur.config.run import Config

NEVER = ("run_dir", "device", "remote", "mirror")
"""Never drawn: a wrong value would write, or connect, elsewhere."""
PINNED = (*NEVER, "version", "compile", "fingerprint", "cache_gb", "stored")
"""What depends on the machine or on other files; drawn only when wild, if at all."""
TEXTS = ("", "x", "*", "embedding.*", "blocks.0.*", "nothing.*", "ä\n%s{}", "\x00", "-1", "h100")
WHOLE = (0, 1, 1, 2, 2, 2, 3, 4, 4, 6, 8, 8, 16, 16)
REAL = (0.0, 1e-6, 1e-3, 0.1, 0.5, 0.9, 1.0, 1.5, 2.0, 8.0)
JUNK: tuple[Any, ...] = (
    None, True, "", "3", "x", [], {}, [[]], {"kind": "x"}, -1, 0, 2.5, -1e-300, 5e-324, 1e-30, 1e4,
    1e38, 1e308, math.nan, math.inf, -math.inf, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64,
    10**30, 10**400, -(2**63), "9" * 5000, "1e-3",
)  # fmt: skip


def draw_configs(
    bases: Mapping[str, dict[str, Any]],
    texts: Mapping[str, Sequence[Any]],
    number: int,
    count: int,
) -> list[dict[str, Any]]:
    """`count` configs, as plain values, of the drawing `number`: always the same ones.

    Args:
        bases: values that make good configs, to vary.
        texts: for fields that name files: values by the name of the field.
        number: of the drawing; decides all.
        count: configs to draw.
    """
    found: list[dict[str, Any]] = []

    @seed(number)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(config_values(bases, texts))
    def collect(values: dict[str, Any]) -> None:
        found.append(values)

    collect()
    return found[:count]


@st.composite
def config_values(
    draw: Any, bases: Mapping[str, dict[str, Any]], texts: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
    """One config: a base with sections and fields of it drawn anew, few or many."""
    # Of a generator: hypothesis's own choices repeat each other, and hundreds make a config.
    random = draw(st.randoms(use_true_random=True))
    base = random.choice(list(bases.values()))
    density, wildness = random.choice([0.5, 1, 1, 2, 4]), random.choice([0, 0, 0, 0, 1, 5])
    edges = random.choice([0, 0, 5, 25])
    values = Drawer(random, texts, density, wildness, edges).section(Config, base)
    assert isinstance(values, dict)
    return values


class Drawer:
    """Draws values of annotations.

    Args:
        random: decides.
        texts: values of fields that name files.
        density: percent of fields with a default, or a value in the base, that are drawn.
        wildness: percent of values that are of a wrong type, or at or beyond the bounds.
        edges: percent of numbers that are a bound.
    """

    def __init__(
        self,
        random: Random,
        texts: Mapping[str, Sequence[Any]],
        density: float,
        wildness: int,
        edges: int,
    ) -> None:
        self.random, self.texts = random, texts
        self.density, self.wildness, self.edges = density, wildness, edges

    def chance(self, percent: float) -> bool:
        """True so often."""
        return self.random.random() * 100 < percent

    def section(self, model: type[BaseModel], base: Mapping[str, Any] | None = None) -> Any:
        """Values of a section, starting from those of a base if there is one."""
        values: dict[str, Any] = {}
        for name, field in model.model_fields.items():
            given = base is not None and name in base
            section = find_section(field) if given and isinstance(base[name], dict) else None
            if name in NEVER or (name in PINNED and not (self.wildness and self.chance(5))):
                drawn = False
            elif section is not None:
                # A whole section anew is mostly refused where others rely on it.
                values[name] = self.section(section, base[name])
                continue
            elif given:
                drawn = self.chance(self.density)
            elif field.is_required():
                drawn = not self.chance(2 if base is None else 90)
            else:
                drawn = self.chance(self.density)
            if drawn:
                values[name] = self.value(field.annotation, field.metadata, name)
            elif given:
                values[name] = base[name]
        if self.wildness and self.chance(1):
            values[self.random.choice(["unknown", "", "kind", "hiden_size"])] = 1
        return values

    def value(self, annotation: Any, metadata: Sequence[Any], name: str) -> Any:
        """A value of an annotation; wild at times."""
        if self.wildness and self.chance(self.wildness):
            edges = list(bounds(metadata)) if annotation in (int, float) else []
            return self.random.choice([*JUNK, *edges, *edges, *edges])
        origin, arguments = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            more = [m for m in arguments[1:] if not isinstance(m, FieldInfo)]
            of_fields = [x for m in arguments[1:] if isinstance(m, FieldInfo) for x in m.metadata]
            return self.value(arguments[0], [*metadata, *more, *of_fields], name)
        if origin is Literal:
            return self.random.choice(arguments)
        if origin in (Union, UnionType):
            if NoneType in arguments and self.chance(20):
                return None
            return self.value(
                self.random.choice([a for a in arguments if a is not NoneType]), metadata, name
            )
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return self.section(annotation)
        if origin is tuple:
            return self.items(arguments, metadata, name)
        if origin is dict:
            keys = self.random.sample(TEXTS, self.random.randint(0, 2))
            return {key: self.value(arguments[1], [], name) for key in keys}
        if annotation is bool:
            return self.random.random() < 0.5
        if annotation in (int, float) and self.chance(self.edges):
            return self.random.choice(inside(list(bounds(metadata)), metadata) or [1])
        if annotation is int:
            return self.random.choice(
                inside(WHOLE, metadata) or [b for b in bounds(metadata) if b == b]
            )
        if annotation is float:
            return self.random.choice(inside(REAL, metadata) or list(bounds(metadata)))
        if annotation is str:
            known = self.texts.get(name)
            return self.random.choice(TEXTS if known is None or self.wildness >= 10 else known)
        raise NotImplementedError(f"{name}: draws nothing of {annotation} yet")

    def items(self, arguments: tuple[Any, ...], metadata: Sequence[Any], name: str) -> list[Any]:
        """A list, as long as a tuple's annotation says."""
        if arguments[-1] is not ...:
            return [self.value(argument, [], name) for argument in arguments]
        least = max([m.min_length for m in metadata if hasattr(m, "min_length")], default=0)
        length = self.random.randint(least, 4)
        return [self.value(arguments[0], [], name) for _ in range(length)]


def find_section(field: FieldInfo) -> type[BaseModel] | None:
    """The section class of a field that has one kind of section only."""
    options = [field.annotation, *get_args(field.annotation)]
    found = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
    return found[0] if len(found) == 1 and not field.discriminator else None


def limits(metadata: Sequence[Any]) -> tuple[float, bool, float, bool]:
    """(lower bound, whether it is allowed, upper bound, whether it is allowed)."""
    low, low_in, high, high_in = -math.inf, True, math.inf, True
    flat = [
        m
        for item in metadata
        for m in (item if isinstance(item, annotated_types.GroupedMetadata) else [item])
    ]
    for rule in flat:
        if isinstance(rule, annotated_types.Ge):
            low, low_in = rule.ge, True
        if isinstance(rule, annotated_types.Gt):
            low, low_in = rule.gt, False
        if isinstance(rule, annotated_types.Le):
            high, high_in = rule.le, True
        if isinstance(rule, annotated_types.Lt):
            high, high_in = rule.lt, False
    return low, low_in, high, high_in


def inside(values: Sequence[float], metadata: Sequence[Any]) -> list[float]:
    """Those within the bounds."""
    low, low_in, high, high_in = limits(metadata)
    return [
        v
        for v in values
        if (v >= low if low_in else v > low) and (v <= high if high_in else v < high)
    ]


def bounds(metadata: Sequence[Any]) -> Iterator[float]:
    """The bounds, and what lies beside them."""
    low, _, high, _ = limits(metadata)
    for bound in (low, high):
        if math.isfinite(bound):
            yield bound
            if isinstance(bound, int):
                yield from (bound - 1, bound + 1)
            else:
                yield from (math.nextafter(bound, -math.inf), math.nextafter(bound, math.inf))
    if math.isinf(high):
        yield sys.float_info.max


def leaves(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """The paths of all fields, those of every kind of section among them."""
    for name, field in model.model_fields.items():
        sections = list(sections_in(field.annotation))
        if not sections:
            yield prefix + name
        for section in sections:
            yield from leaves(section, f"{prefix}{name}.")


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Section classes among the alternatives of an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not Literal:
        for argument in get_args(annotation):
            yield from sections_in(argument)


def default_of(field: FieldInfo) -> Any:
    """A field's default; None where there is none."""
    return None if field.default is PydanticUndefined else field.default
