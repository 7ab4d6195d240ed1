"""A terminal for tables and progress, which obeys no control characters of what it shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult

from megarecur.reading import escape


class EscapingConsole(Console):
    """Rich's console; names and texts from elsewhere are escaped as they are shown, and brackets in
    them are no markup."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)
        self.push_render_hook(_Escaping())


class _Escaping(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Escaped(each) for each in renderables]


@dataclass
class _Escaped:
    content: ConsoleRenderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.content, options):
            # Segments of the console's own codes, which move the cursor, stay.
            yield segment if segment.control else segment._replace(text=escape(segment.text))
