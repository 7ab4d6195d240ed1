"""Logical inference (Bowman, Manning & Potts 2015): the relation of two propositional formulas.

    ( not a )    ( a ( and b ) )    ->  |

The generator follows `generate_neg_set_data.py`: six variables, four of them in a pair, and the
natural logic relations of MacCartney & Manning over the sets of worlds where each side holds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

VARIABLES = tuple("abcdef")
RELATIONS = ("=", "<", ">", "^", "|", "v", "#")
OPERATORS = ("and", "or", "not")
WORDS = ("(", ")", *OPERATORS, *VARIABLES)
MAX_LENGTH, SUBSET, NEGATION_P = 12.0, 4, 1 / 3
CHOICES = ("and", "or", "and", "or", "", "", "", "", "")
"""Choices of a formula's operator; an empty one is a variable."""
MOST_OPERATORS = 12
"""Pairs with more operators than this share one bin."""
WORLDS = 1 << len(VARIABLES)
ALL = (1 << WORLDS) - 1
TRUTH = {
    name: sum(1 << world for world in range(WORLDS) if world >> i & 1)
    for i, name in enumerate(VARIABLES)
}
"""Worlds where each variable holds, as bits of a number."""


def draw_formula(
    rng: random.Random, variables: Sequence[str], max_length: float = MAX_LENGTH
) -> tuple[str, int, int]:
    """Draw (formula, the worlds where it holds, number of operators)."""
    operator = CHOICES[int(rng.random() * len(CHOICES))]
    if not operator or max_length < 2:
        text = variables[int(rng.random() * len(variables))]
        worlds, count = TRUTH[text], 0
    else:
        left, a, m = draw_formula(rng, variables, max_length / 2)
        right, b, n = draw_formula(rng, variables, max_length / 2)
        text, count = f"( {left} ( {operator} {right} ) )", m + n + 1
        worlds = a & b if operator == "and" else a | b
    if rng.random() < NEGATION_P:
        return f"( not {text} )", ALL & ~worlds, count + 1
    return text, worlds, count


def draw_pair(rng: random.Random) -> tuple[str, str, str, int] | None:
    """Draw (relation, left, right, most operators of a side); None if a side always or never
    holds."""
    variables = rng.sample(VARIABLES, SUBSET)
    left, a, m = draw_formula(rng, variables)
    right, b, n = draw_formula(rng, variables)
    if {a, b} & {0, ALL}:
        return None
    return relate(a, b), left, right, max(m, n)


def relate(a: int, b: int) -> str:
    """Return the relation between two sets of worlds, by which parts of the universe are empty."""
    both, left, right, neither = a & b, a & ~b, b & ~a, ALL & ~(a | b)
    found = {
        (True, False, False, True): "=",
        (True, False, True, True): "<",
        (True, True, False, True): ">",
        (False, True, True, False): "^",
        (False, True, True, True): "|",
        (True, True, True, False): "v",
    }
    return found.get((bool(both), bool(left), bool(right), bool(neither)), "#")


def evaluate(formula: str) -> int:
    """Return the worlds where a formula holds.

    Raises:
        ValueError: it is not a formula; the message says why.
    """
    words = formula.split()
    place = 0

    def take(*wanted: str) -> str:
        nonlocal place
        word = words[place] if place < len(words) else "the end"
        if word not in wanted:
            raise ValueError(f"word {place + 1} is {word!r}, not {' or '.join(wanted)}")
        place += 1
        return word

    def parse() -> int:
        word = take("(", *VARIABLES)
        if word != "(":
            return TRUTH[word]
        if place < len(words) and words[place] == "not":
            take("not")
            worlds = ALL & ~parse()
        else:
            left = parse()
            take("(")
            operator = take("and", "or")
            right = parse()
            take(")")
            worlds = left & right if operator == "and" else left | right
        take(")")
        return worlds

    worlds = parse()
    if place < len(words):
        raise ValueError(f"word {place + 1}, {words[place]!r}, comes after the formula's end")
    return worlds


def count_operators(formula: str) -> int:
    """Count the operators and, or and not."""
    return sum(word in OPERATORS for word in formula.split())
