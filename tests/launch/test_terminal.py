"""What is printed to files and pipes is whole."""

from __future__ import annotations

import pytest
from rich.console import Group
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from megarecur.launch.terminal import PAGE, show


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
