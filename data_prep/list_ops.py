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
"""A node is an operator with this probability, where the depth allows it."""
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
DIGITS = tuple("0123456789")
WORDS = (*OPERATORS, "]", *DIGITS)
MOST_IN_VAIN = 20_000_000
"""Draws in a row that give nothing new, after which there is nothing more."""
DEEPEST = 200
"""Drawing recurses."""


@dataclass(frozen=True)
class Trees:
    """A distribution of trees."""

    max_depth: int = 20
    """Nodes of this depth, the root's being 1, are digits."""
    max_args: int = 5
    """An operator has 2 to this many arguments."""
    min_length: int = 1
    max_length: int | None = None
    """Tokens: a digit is 1, an operator 2 and its arguments'. Others are drawn again."""

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
"""By name; 200-300 and so on lie strictly between these lengths."""


class _TooLong(Exception):
    """A tree has become longer than it may be."""


def draw_tree(rng: random.Random, trees: Trees) -> tuple[list[str], int] | None:
    """(tokens, answer) of one tree; None where its length is not wanted."""
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
    """What an operator makes of its arguments; the median of an even number is the mean of the two
    middle ones, truncated."""
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
    raise ValueError(f"{operator!r} is no operator")


def draw_distinct(
    rng: random.Random, trees: Trees, seen: set[bytes], what: str
) -> Iterator[tuple[list[str], int]]:
    """Trees that are not in `seen`, which they are added to.

    Raises:
        DataError: there are none left, as far as drawing tells.
    """
    vain = 0
    while True:
        drawn = draw_tree(rng, trees)
        key = b"" if drawn is None else " ".join(drawn[0]).encode()
        # Long ones are kept as their digest: a set of a million lines would be gigabytes.
        key = key if len(key) < 32 else digest(key)
        if drawn is None or key in seen:
            vain += 1
            if vain == MOST_IN_VAIN:
                raise DataError(
                    f"{what}: {vain:,} trees in a row were drawn already or have another length "
                    f"({trees}); ask for fewer, or allow more depth, arguments or lengths"
                )
            continue
        vain = 0
        seen.add(key)
        yield drawn


def digest(key: bytes) -> bytes:
    """128 bits that stand for a line."""
    import xxhash

    return xxhash.xxh3_128_digest(key)


def flatten(line: str) -> list[str]:
    """Tokens of a tree in binary parentheses, `( ( ( [MAX 2 ) 9 ) ] )`, or without them."""
    return [word for word in line.split() if word not in "()"]


def evaluate(tokens: Sequence[str]) -> int:
    """The answer to a tree.

    Raises:
        ValueError: it is none; the message says where.
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
    """A distribution by its name.

    Raises:
        DataError: there is none.
    """
    if name not in VARIANTS:
        raise DataError(f"variant {name!r}: there is no such; choose of {', '.join(VARIANTS)}")
    return VARIANTS[name]


def with_limits(trees: Trees, **limits: int | None) -> Trees:
    """The same with those limits that are given."""
    return replace(trees, **{name: value for name, value in limits.items() if value is not None})
