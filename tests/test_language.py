"""Docstrings open with a sentence that stands alone, and no coy words stand in code or messages."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path
    for folder in ("megarecur", "launch", "data_prep", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
FRAGMENTS = re.compile(
    r"(Of|The same|As|Back|What|Whatever|Those|Them|They|It|Whom?|Whose|Whoever|Where|When|Why|How"
    r"|Like|From|So|And|Nothing|Unless|Not)\b(?! many |-)"
)
"""Openings that leave out the subject or the verb."""
COY = re.compile(
    r"\b(begun anew|mend(s|ed|ing)?|so many|whoever|nobody(?:'s)?|is asked|is told|are told"
    r"|told of|tells of|tell of|leave (?:it|them) out|for want of|for ever|goes on with it"
    r"|no node's|as ever)\b"
    r"|\bwhat there is\b|\bwhat is to come\b",
    re.IGNORECASE,
)
"""Words and phrases for which the field has plainer ones."""


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and text of every docstring, those of attributes included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            text = node.value.value
            if isinstance(text, str):
                yield node.lineno, text.strip()


def prose(source: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and text of every comment and every string with a space in it."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def find_faults(path: Path) -> list[str]:
    """Return the fragments and coy words of a file, with their places."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    name = path.relative_to(ROOT).as_posix()
    return [
        f"{name}:{line}: opens with a fragment: {text.splitlines()[0]}"
        for line, text in docstrings(tree)
        if FRAGMENTS.match(text)
    ] + [
        f"{name}:{line}: {found[0]!r}"
        for line, text in prose(source, tree)
        if (found := COY.search(text))
    ]


def test_docstrings_stand_alone_and_no_words_are_coy() -> None:
    faults = [fault for path in FILES for fault in find_faults(path)]
    assert not faults, "\n".join(faults)


def test_fragments_and_coy_words_are_found(tmp_path: Path) -> None:
    for text in ("Of the rank.", "The same, cut.", "As `Order`.", "What runs.", "It ends."):
        assert FRAGMENTS.match(text), text
    for text in ("Return the rank.", "Whether it ends.", "Often read.", "Ask for stacks."):
        assert not FRAGMENTS.match(text), text
    for text in ("mend it", "so many ranks", "the user is told", "waits for ever"):
        assert COY.search(text), text
    for text in ("recommend it", "forever", "amended", "tokens"):
        assert not COY.search(text), text
