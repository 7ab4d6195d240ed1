"""The requests of OpenAI's completions API, their errors, and the fields that are our own.

https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, from_json

from megarecur.inference.request import Draft, Exit, ExitKind, Fill

MOST_STOPS, MOST_LOGPROBS, MOST_CHOICES = 4, 5, 128


class RequestError(Exception):
    """A request that is not served.

    Args:
        status: HTTP status.
        message: what is wrong, and the remedy.
        param: the field, if it is one.
        code: a word for programs.
        retry_after: seconds after which another try makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def describe(self) -> dict[str, Any]:
        """Return the error as OpenAI's API writes it."""
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }


class Fields(BaseModel):
    """Fields of JSON: known ones alone, and of exactly their types."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class ExitFields(Fields):
    """The rule by which new tokens exit early; see `inference.request.Exit`."""

    kind: ExitKind
    threshold: float | None = None
    fill: Fill = "state"


class DraftFields(Fields):
    """Self-speculation; see `inference.request.Draft`."""

    loops: int = 1
    tokens: int = 4


class StreamOptions(Fields):
    """Options of a stream."""

    include_usage: bool = False


class CompletionBody(Fields):
    """The body of a request for completions."""

    prompt: Any
    model: str | None = None
    max_tokens: int | None = Field(16, ge=0)
    temperature: float | None = Field(1.0, ge=0.0)
    top_p: float | None = Field(1.0, gt=0.0, le=1.0)
    n: int | None = Field(1, ge=1, le=MOST_CHOICES)
    stop: Any = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool | None = False
    seed: int | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Accepted, and without effect."""

    best_of: int | None = None
    suffix: str | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None

    top_k: int | None = Field(None, ge=1)
    depth: int | None = None
    exit: ExitFields | None = None
    draft: DraftFields | None = None


REMEDIES = {
    "missing": "is missing; add it",
    "extra_forbidden": "is unknown; omit it",
    "greater_than": "is too small; set it above {gt:g}",
    "greater_than_equal": "is too small; set it to at least {ge:g}",
    "less_than_equal": "is too large; set it to at most {le:g}",
    "finite_number": "is not finite; set it to a finite number",
    "int_type": "is not a whole number; set it to one",
    "float_type": "is not a number; set it to one",
    "bool_type": "is not true or false; set it to one of them",
    "string_type": "is not a string; set it to one",
    "model_type": "is not an object; write it as {{...}}",
    "dict_type": "is not an object; write it as {{...}}",
    "literal_error": "is unknown; choose {expected}",
}
"""Error message and remedy by pydantic's type of error."""


def read_body(content: bytes) -> CompletionBody:
    """Return the body of a request.

    Raises:
        RequestError: 400, with a line for each mistake.
    """
    try:
        values = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        message = f"the body is not JSON in UTF-8: {error}; correct it"
        raise RequestError(400, message, code="invalid_json") from None
    if not isinstance(values, dict):
        raise RequestError(400, "the body is not an object of JSON; write it as {...}")
    problems: list[tuple[str, str]] = []
    body = None
    try:
        body = CompletionBody.model_validate(values)
    except ValidationError as invalid:
        problems += [explain(error) for error in invalid.errors(include_url=False)]
    problems += find_mistakes(values, body)
    if problems or body is None:
        lines = "; ".join(dict.fromkeys(line for _, line in problems))
        raise RequestError(400, lines, param=problems[0][0])
    return body


def explain(error: ErrorDetails) -> tuple[str, str]:
    """Return the field of a mistake, and a line about it."""
    path = [str(part) for part in error["loc"]]
    kind, name = error["type"], ".".join(path)
    if kind not in ("missing", "extra_forbidden"):
        name += f"={show(error['input'])}"
    remedy = REMEDIES.get(kind)
    if remedy is None:
        return path[0], f"{name} is not valid: {error['msg']}; correct it"
    return path[0], f"{name} {remedy.format_map(error.get('ctx', {}))}"


def show(value: Any) -> str:
    """Return a value, shortened."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def find_mistakes(values: dict[str, Any], body: CompletionBody | None) -> list[tuple[str, str]]:
    """Return the mistakes that types do not show: (field, line)."""
    found = []
    if "prompt" in values and find_prompts(values["prompt"]) is None:
        line = "is not a string, a list of strings, a list of token ids, or a list of such lists"
        found.append(("prompt", f"prompt={show(values['prompt'])} {line}, none of them empty"))
    if find_stops(values.get("stop")) is None:
        line = f"is not a string or a list of 1 to {MOST_STOPS} strings, none of them empty"
        found.append(("stop", f"stop={show(values['stop'])} {line}"))
    if body is None:
        return found
    neutral = {"best_of": (None, body.n or 1), "suffix": (None, ""), "logit_bias": (None, {}),
               "presence_penalty": (None, 0), "frequency_penalty": (None, 0)}  # fmt: skip
    for name, allowed in neutral.items():
        if (given := getattr(body, name)) not in allowed:
            found.append((name, f"{name}={show(given)} is not supported; omit it"))
    if body.stream_options is not None and not body.stream:
        found.append(("stream_options", "stream_options without stream; set stream to true"))
    if body.max_tokens == 0 and not body.echo:
        found.append(("max_tokens", "max_tokens=0 without echo; set it to at least 1"))
    if body.exit is not None and body.exit.threshold is None and body.exit.kind != "confidence":
        needs = "exit.threshold is missing; add it, in nats"
        if body.exit.kind == "loop":
            needs = "exit.threshold is missing; add a number of loops"
        if body.exit.kind != "oracle":
            found.append(("exit", needs))
    return found


def find_prompts(value: Any) -> list[str | list[int]] | None:
    """Return the prompts of a body, each a text or ids; None if there are none."""

    def is_ids(part: Any) -> bool:
        return isinstance(part, list) and bool(part) and all(type(i) is int for i in part)

    if isinstance(value, str):
        return [value]
    if is_ids(value):
        return [value]
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(part, str) for part in value) or all(map(is_ids, value)):
        return value
    return None


def find_stops(value: Any) -> list[str] | None:
    """Return the strings that end a text; None if they are invalid."""
    if value is None:
        return []
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not 1 <= len(stops) <= MOST_STOPS:
        return None
    return stops if all(isinstance(stop, str) and stop for stop in stops) else None


def read_exit(fields: ExitFields | None) -> Exit | None:
    """Return the exit rule of a body."""
    if fields is None:
        return None
    assert fields.kind in get_args(ExitKind)
    return Exit(fields.kind, 0.9 if fields.threshold is None else fields.threshold, fields.fill)


def read_draft(fields: DraftFields | None) -> Draft | None:
    """Return the self-speculation of a body."""
    return None if fields is None else Draft(fields.loops, fields.tokens)


FinishReason = Literal["stop", "length"]
