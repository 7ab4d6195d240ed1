"""Building blocks of all config sections: the base class, bounded numbers, free fields.

Sections are frozen pydantic models that reject unknown keys. A field is fixed unless it is declared
with `free(...)`: a run that resumes may change its free fields only. Omitted values that follow
from others (`head_dim`, ...) are filled in at validation, so that the resolved config of a run
folder states every one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    model_validator,
)
from pydantic_core import CoreSchema
from pydantic_core.core_schema import with_info_wrap_validator_function

CONFIG_VERSION: Literal[1] = 1

# Bounds of supported values: sizes, counts and factors beyond them overflow.
MOST_BLOCKS, MOST_STEPS = 4096, 16384
"""Maximum blocks of a model or loops of an optimizer step; and maximum steps of a layer map."""
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Length = Annotated[int, Field(gt=0, le=1 << 24)]
Size = Annotated[int, Field(gt=0, le=1 << 22)]
"""A dim of a matrix."""
SIZES: TypeAdapter[int] = TypeAdapter(Length)
Blocks = Annotated[int, Field(gt=0, le=MOST_BLOCKS)]
MaybeBlocks = Annotated[int, Field(ge=0, le=MOST_BLOCKS)]
Count = Annotated[int, Field(ge=0, le=99_999_999)]
"""Number of optimizer steps, which are written with 8 digits, or of samples."""
PositiveCount = Annotated[int, Field(gt=0, le=99_999_999)]
Ranks = Annotated[int, Field(gt=0, le=1 << 20)]
Epsilon = Annotated[float, Field(ge=1e-20, le=1e3)]
Factor = Annotated[float, Field(ge=1e-6, le=1e6)]
Coefficient = Annotated[float, Field(ge=0.0, le=1e4)]
Rate = Annotated[float, Field(ge=1e-30, le=10.0)]
Threshold = Annotated[float, Field(gt=0.0, le=1e30)]
Theta = Annotated[float, Field(ge=1.0, le=1e15)]
Deviation = Annotated[float, Field(gt=0.0, le=100.0)]


def free(default: Any = ..., **constraints: Any) -> Any:
    """Declare a field that may change when a run resumes."""
    return Field(default, json_schema_extra={"resume": "free"}, **constraints)


def derived() -> Any:
    """Declare a field that `fill_in`, of its section or of the whole config, computes if the file
    omits it."""
    return Field(json_schema_extra={"derived": True})


def as_size(value: Any) -> int | None:
    """Return a value of the file as a size; None if it is not a valid one."""
    try:
        return SIZES.validate_python(value)
    except ValueError:
        return None


def show(value: Any) -> str:
    """Return a value as written in a config file, on one line: true, null, [1, 2]."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        text = ", ".join(map(show, value))
        return f"[{text if len(text) <= 80 else text[:80] + '...'}]"
    text = "null" if value is None else str(value)
    return text if text.isprintable() else repr(text)


# ------------------------------------------------------------------- sections with mistakes in them


class UnreadableError(Exception):
    """Raised when code reads a value that is missing from the file or invalid."""


class Unreadable:
    """Stand-in for a value that is missing or invalid. Reading it raises an error.

    Raises:
        UnreadableError: from attribute access, comparison, arithmetic, iteration and isinstance.
    """

    def _refuse(self, *_: object) -> Any:
        raise UnreadableError

    __getattr__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = __int__ = __index__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __str__ = __format__ = _refuse
    __class__ = property(_refuse)
    __hash__ = object.__hash__


UNREADABLE: Any = Unreadable()
PARTIAL = "partial"
"""Validation context in which a section never fails: see `Section`."""


class SectionError(ValueError):
    """All errors in the values of one section, one message each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class Section(BaseModel):
    """Base class of the config's sections: frozen, and closed to unknown keys.

    With the validation context PARTIAL a section accepts every mapping: unknown keys are dropped,
    missing or invalid values become UNREADABLE, and `find_problems` is not called. Rules between
    sections can then be evaluated although other fields have errors.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    def find_problems(self) -> Iterator[str]:
        """Yield a message, with its remedy, for each conflict between fields of this section."""
        yield from ()

    @model_validator(mode="after")
    def check_section(self, info: ValidationInfo) -> Self:
        """Reject the section if it has problems; the error lists all of them."""
        if info.context != PARTIAL and (problems := list(self.find_problems())):
            raise SectionError(problems)
        return self

    @model_validator(mode="before")
    @classmethod
    def mark_missing(cls, values: Any, info: ValidationInfo) -> Any:
        """Replace missing values and drop unknown keys in the context PARTIAL."""
        if info.context != PARTIAL or not isinstance(values, dict):
            return values
        fields = cls.model_fields
        missing = {name: UNREADABLE for name, field in fields.items() if field.is_required()}
        return missing | {key: value for key, value in values.items() if key in fields}

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Let every field accept UNREADABLE, except those by which a union selects its section."""
        schema = handler(source)
        inner: Any = schema
        while inner["type"] != "model-fields":
            inner = inner["schema"]
        for name, field in inner["fields"].items():
            if (
                name not in ("kind", "sampler")
                or len(get_args(cls.__pydantic_fields__[name].annotation)) > 1
            ):
                owner = field["schema"] if field["schema"]["type"] == "default" else field
                owner["schema"] = with_info_wrap_validator_function(mark_invalid, owner["schema"])
        return schema


def mark_invalid(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    """Validate a field; in the context PARTIAL, replace an invalid value by UNREADABLE."""
    if value is UNREADABLE:
        return value
    try:
        return handler(value)
    except ValidationError:
        if info.context != PARTIAL:
            raise
        return UNREADABLE
