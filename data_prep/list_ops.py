"""ListOps (Nangia & Bowman 2018): nested minima, maxima, medians and sums, with a digit as answer.

    [MAX 2 [MIN 3 9 ] 0 ]  ->  3

Trees are drawn as `make_data.py` of nyu-mll/spinn does. The variants are those of Ray Chowdhury &
Caragea's "Investigating Recurrent Transformers with Dynamic Halt" and of Long Range Arena.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megarecur.errors import DataError

VALUE_P = 0.25
"""Probability that a node is an operator, if the depth allows it."""
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
DIGITS = tuple("0123456789")
WORDS = (*OPERATORS, "]", *DIGITS)
MOST_IN_VAIN = 20_000_000
"""Consecutive draws without a new tree after which drawing stops."""
DEEPEST = 200
"""Maximum depth, because drawing recurses."""
LONGEST = 1 << 20
"""Maximum tokens of a tree that is not bounded: some distributions grow without end."""


@dataclass(frozen=True)
class Trees:
    """A distribution of trees."""

    max_depth: int = 20
    """Depth at which all nodes are digits; the root has depth 1."""
    max_args: int = 5
    """Maximum number of arguments of an operator; the minimum is 2."""
    min_length: int = 1
    max_length: int | None = None
    """Maximum tokens: a digit is 1, an operator 2 plus its arguments'. Longer trees are drawn
    again."""

    def __post_init__(self) -> None:
        problems = [
            f"--{name.replace('_', '-')} {value} must be at least {least}"
            for name, value, least in (
                ("max_depth", self.max_depth, 1),
                ("max_args", self.max_args, 2),
                ("min_length", self.min_length, 1),
            )
            if value < least
        ]
        if self.max_depth > DEEPEST:
            problems.append(f"--max-depth {self.max_depth} must be at most {DEEPEST}")
        if self.max_length is not None and self.max_length < self.min_length:
            problems.append(
                f"--max-length {self.max_length} is below --min-length {self.min_length}"
            )
        if problems:
            raise DataError("; ".join(problems))


VARIANTS = {
    "d8": Trees(8),
    "d14": Trees(14),
    "d20": Trees(20),
    "iid_arg": Trees(9, 5, 100, 1000),
    "ood_10arg": Trees(9, 10, 100, 1000),
    "ood_15arg": Trees(9, 15, 100, 1000),
    "lra": Trees(10, 10, 501, 1999),
    **{f"{n}-{n + 100}": Trees(20, 5, n + 1, n + 99) for n in range(200, 1000, 100)},
}
"""Distributions by name; 200-300 and so on are exclusive bounds of the length."""


class _TooLong(Exception):
    """A tree exceeds its maximum length."""


def draw_tree(rng: random.Random, trees: Trees) -> tuple[list[str], int] | None:
    """Draw (tokens, answer) of one tree; None if its length is not wanted."""
    tokens: list[str] = []
    most = trees.max_length

    def grow(depth: int) -> int:
        if depth >= trees.max_depth or rng.random() > VALUE_P:
            digit = int(rng.random() * 10)
            tokens.append(DIGITS[digit])
            return digit
        count = 2 + int(rng.random() * (trees.max_args - 1))
        operator = OPERATORS[int(rng.random() * len(OPERATORS))]
        tokens.append(operator)
        if most is not None and len(tokens) > most:
            raise _TooLong
        if len(tokens) > LONGEST:
            raise DataError(
                f"--max-args {trees.max_args} with --max-depth {trees.max_depth} gives trees of "
                f"more than {LONGEST} tokens; lower one, or set --max-length"
            )
        values = [grow(depth + 1) for _ in range(count)]
        tokens.append("]")
        return apply(operator, values)

    try:
        answer = grow(1)
    except _TooLong:
        return None
    if len(tokens) < trees.min_length or (most is not None and len(tokens) > most):
        return None
    return tokens, answer


def apply(operator: str, values: Sequence[int]) -> int:
    """Apply an operator to its arguments; the median of an even number is the truncated mean of the
    two middle ones."""
    if operator == "[MIN":
        return min(values)
    if operator == "[MAX":
        return max(values)
    if operator == "[SM":
        return sum(values) % 10
    if operator == "[MED":
        ordered, half = sorted(values), len(values) // 2
        return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) // 2
    if operator == "[FIRST":
        return values[0]
    if operator == "[LAST":
        return values[-1]
    raise ValueError(f"{operator!r} is not an operator")


def draw_distinct(
    rng: random.Random, trees: Trees, seen: set[bytes], what: str
) -> Iterator[tuple[list[str], int]]:
    """Yield trees not in `seen`, and add them to it.

    Raises:
        DataError: drawing finds no further trees.
    """
    vain = 0
    while True:
        drawn = draw_tree(rng, trees)
        key = b"" if drawn is None else " ".join(drawn[0]).encode()
        # Long lines are kept as digests, since a set of a million lines would take gigabytes.
        key = key if len(key) < 32 else digest(key)
        if drawn is None or key in seen:
            vain += 1
            if vain == MOST_IN_VAIN:
                raise DataError(
                    f"{what}: {vain:,} trees in a row were drawn already or have another length "
                    f"({trees}); request fewer, or allow more depth, arguments or lengths"
                )
            continue
        vain = 0
        seen.add(key)
        yield drawn


def digest(key: bytes) -> bytes:
    """Hash a line to 128 bits."""
    import xxhash

    return xxhash.xxh3_128_digest(key)


def flatten(line: str) -> list[str]:
    """Return the tokens of a tree in binary parentheses, `( ( ( [MAX 2 ) 9 ) ] )`, or without
    them."""
    return [word for word in line.split() if word not in "()"]


def evaluate(tokens: Sequence[str]) -> int:
    """Return the answer of a tree.

    Raises:
        ValueError: the tokens are not a tree; the message names the place.
    """
    stack: list[tuple[str, list[int]]] = [("", [])]
    for place, token in enumerate(tokens, 1):
        if token in DIGITS:
            stack[-1][1].append(int(token))
        elif token == "]":
            if len(stack) == 1:
                raise ValueError(f"token {place} closes nothing")
            operator, values = stack.pop()
            if not values:
                raise ValueError(f"token {place} closes {operator} without arguments")
            stack[-1][1].append(apply(operator, values))
        elif token.startswith("["):
            stack.append((token, []))
        else:
            raise ValueError(f"token {place}, {token!r}, is not ListOps")
    if len(stack) > 1 or len(stack[0][1]) != 1:
        raise ValueError("it is not one tree" if len(stack) == 1 else f"{stack[-1][0]} is open")
    return stack[0][1][0]


def parse_variant(name: str) -> Trees:
    """Return a distribution by its name.

    Raises:
        DataError: the name is unknown.
    """
    if name not in VARIANTS:
        raise DataError(f"variant {name!r}: unknown; choose one of {', '.join(VARIANTS)}")
    return VARIANTS[name]


def with_limits(trees: Trees, **limits: int | None) -> Trees:
    """Return the distribution with the given limits replaced."""
    return replace(trees, **{name: value for name, value in limits.items() if value is not None})
