"""What is printed to files and pipes is whole, and terminals obey nothing that comes from data."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Group
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from megarecur.data_prep.console import EscapingConsole
from megarecur.launch.output import say
from megarecur.launch.terminal import PAGE, show
from megarecur.train.evaluate import short_names
from megarecur.train.metrics import Progress


@pytest.mark.parametrize("columns", [3, 40])
@pytest.mark.parametrize("terminal_width", ["20", "80", "300"])
def test_no_cell_is_cut_short(capsys, monkeypatch, columns: int, terminal_width: str) -> None:
    monkeypatch.setenv("COLUMNS", terminal_width)
    table = Table(box=None)
    cells = [f"{number * 12345.678:.3f}" for number in range(columns)]
    for cell in cells:
        table.add_column(cell + " unit", no_wrap=True)
    table.add_row(*cells)
    long = " ".join(["word"] * 60)
    show(lambda _: Group(Padding(table, 1), Text(long), Panel(Text("in a panel"))))
    out = capsys.readouterr().out
    assert "…" not in out
    assert all(cell + " unit" in out for cell in cells)
    assert long in out


def test_pictures_take_a_page_where_there_is_no_terminal(capsys) -> None:
    show(lambda width: Text(f"{width} columns"))
    assert capsys.readouterr().out == f"{PAGE} columns\n"


HOSTILE = "a\x1b]52;c;eA==\x07b\u202ec\r[red]d[/nothing]"
"""Writes the clipboard, turns text around, overwrites the line, and is markup of rich."""
SHOWN = "a\\x1b]52;c;eA==\\x07b\\u202ec"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_say_escapes_for_terminals_and_messages(monkeypatch) -> None:
    screen, pipe, messages = Screen(), io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", messages)
    for file in (screen, pipe, sys.stderr):
        say(HOSTILE, file=file)
    assert screen.getvalue() == messages.getvalue() == f"{SHOWN}\\r[red]d[/nothing]\n"
    assert pipe.getvalue() == HOSTILE + "\n"
    say("one", 2, end="", file=pipe)
    assert pipe.getvalue().endswith("\none 2")


@pytest.mark.parametrize("kind", [str, Text])
def test_a_console_shows_its_own_codes_alone(kind) -> None:
    console = EscapingConsole(
        file=Screen(), force_terminal=True, color_system="standard", width=120
    )
    table = Table(box=None)
    table.add_column("name")
    table.add_row(kind(HOSTILE))
    for content in (table, Panel(kind(HOSTILE)), kind(HOSTILE)):
        console.print(content)
    out = console.file.getvalue()
    assert out.count(SHOWN.partition("\\x07")[0]) == 3 and out.count("[/nothing]") == 3
    assert "\x1b]" not in out and "\x07" not in out and "\u202e" not in out
    assert "\x1b[1m" in out, "the console's own codes stay"


def test_notes_of_training_and_names_of_metrics_are_escaped() -> None:
    screen = Screen()
    Progress(10, screen).note(HOSTILE)
    assert "\x1b" not in screen.getvalue() and SHOWN in screen.getvalue()
    assert short_names(["x/a\x1bb", "y/c\nd"]) == ["a\\x1bb", "c\\nd"]
