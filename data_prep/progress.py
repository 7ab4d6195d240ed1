"""Progress of long work: a bar on a terminal, otherwise one plain line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from megarecur.data_prep.console import EscapingConsole

SECONDS_BETWEEN_LINES = 5.0


class ProgressReport:
    """The progress of each phase of some work, with its rate and the time left."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or EscapingConsole(stderr=True)
        self.bar: Progress | None = None

    @contextmanager
    def phase(self, name: str, total_bytes: int, unit: str = "") -> Iterator[None]:
        """Show one phase of the work while the context lasts; with a `unit`, counts units instead
        of bytes."""
        self.name, self.total, self.unit = name, total_bytes, unit
        self.done = self.resumed = self.tokens = 0
        self.began = self.last_line = time.monotonic()
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description:<9}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task(name, total=max(total_bytes, 1), text="")
            self.bar.start()
        try:
            yield
        finally:
            if self.bar:
                self.bar.stop()
                self.bar = None
        if not self.console.is_terminal and self._is_due(self.began):
            self._line()

    def advance(self, num_bytes: int, tokens: int = 0, resumed: bool = False) -> None:
        """Count finished bytes; `resumed` ones were finished by an earlier, interrupted run."""
        self.done += num_bytes
        self.tokens += tokens
        self.resumed += num_bytes if resumed else 0
        if self.bar:
            self.bar.update(self.task, completed=self.done, text=self._text())
        elif not self.console.is_terminal and self._is_due(self.last_line):
            self._line()

    def _is_due(self, since: float) -> bool:
        return time.monotonic() - since >= SECONDS_BETWEEN_LINES

    def _line(self) -> None:
        self.last_line = time.monotonic()
        self.console.print(f"{self.name}: {self._text()}", highlight=False, markup=False)

    def _text(self) -> str:
        seconds = max(time.monotonic() - self.began, 1e-6)
        rate = (self.done - self.resumed) / seconds
        text = f"{self.done / 1e6:.1f}/{self.total / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s"
        if self.unit:
            text = f"{self.done:,}/{self.total:,} {self.unit}, {rate:,.0f}/s"
        if self.tokens and self.unit:
            text += f", {self.tokens / seconds:,.0f} tokens/s"
        elif self.tokens:
            text += f", {self.tokens / seconds / 1e6:.2f} M tokens/s"
        if self.done >= self.total:
            return f"{text}, {seconds:.1f} s"
        return f"{text}, {(self.total - self.done) / rate:.0f} s left" if rate else text


@contextmanager
def report_phase(
    report: ProgressReport | None, name: str, total_bytes: int, unit: str = ""
) -> Iterator[Callable[..., None]]:
    """Yield the report's `advance` for one phase of work, or without a report a function that does
    nothing."""
    if report is None:
        yield lambda *_, **__: None
        return
    with report.phase(name, total_bytes, unit):
        yield report.advance
