"""Draw a layer map as text: a row per block, a column per step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from rich.text import Text

from megarecur.recurrence.layer_map import LayerMap, Step, count_uses

MAX_ROWS, MAX_COLUMNS = 16, 48
"""Maps of more blocks or steps are drawn with each chain of blocks as one row and one mark."""

BLOCK_STYLES = ("cyan", "green", "yellow", "magenta", "blue", "red")


@dataclass(frozen=True, slots=True)
class _Column:
    """Consecutive steps drawn as one mark, in the row of their blocks."""

    blocks: tuple[int, ...]
    position: int
    step: Step
    """The first step; only this one may read, write or normalise."""
    exit: bool = False
    """True if the last step has an exit."""


def draw_layer_map(steps: LayerMap, width: int = 96) -> Text:
    """Draw the map as text: a row per block, a column per step, the walk as a line between them.

    Columns beyond `width` continue in a further band. In maps of more than MAX_ROWS blocks or
    MAX_COLUMNS steps, blocks that always run one after the other share a row and a mark.
    """
    columns = _columns(steps)
    rows = sorted({column.blocks for column in columns})
    labels = [_row_label(blocks) for blocks in rows]
    names = sorted({name for step in steps for name in (*step.reads, *step.writes)})
    margin = 2 + max(len(label) for label in [*labels, *names, "final norm"])
    room = width - margin - 6  # 6: "  x 99" at the end of a row
    cell = next((c for c in (4, 3) if len(columns) * c <= room), 2)
    per_band = max(room // cell, 4)
    bands = [columns[i : i + per_band] for i in range(0, len(columns), per_band)]
    uses = count_uses(steps)
    picture = Text(no_wrap=True, overflow="ignore")
    for i, band in enumerate(bands):
        following = bands[i + 1][0] if i + 1 < len(bands) else None
        lines = [_header(band, margin, cell)]
        for row, (blocks, label) in enumerate(zip(rows, labels, strict=True)):
            cells = _walk_cells(band, following, rows, row, cell)
            if not cells.strip():
                continue
            times = f"  x{uses[blocks[0]]}" if i + 1 == len(bands) else ""
            style = BLOCK_STYLES[row % len(BLOCK_STYLES)]
            marks = Text(f"{cells:<{len(band) * cell}}" if times else cells, style)
            lines.append(Text.assemble(f"{label:<{margin}}", marks, (times, "dim")))
        lines += _notes(band, names, margin, cell)
        picture.append(Text("\n").join(lines))
        if following:
            picture.append("\n\n")
    legend = _legend(steps, columns, bool(names))
    if legend:
        picture.append(Text("\n\n" + legend, "dim"))
    return picture


def _columns(steps: LayerMap) -> list[_Column]:
    """Return one column per step, or per chain of blocks if steps do not fit."""
    chains: dict[int, tuple[int, ...]] = {step.block: (step.block,) for step in steps}
    if len(chains) > MAX_ROWS or len(steps) > MAX_COLUMNS:
        chains = _chains(steps)
    columns: list[_Column] = []
    for position, step in enumerate(steps):
        if chains[step.block][0] == step.block:
            end = steps[position + len(chains[step.block]) - 1]
            columns.append(_Column(chains[step.block], position, step, end.exit))
    return columns


def _chains(steps: LayerMap) -> dict[int, tuple[int, ...]]:
    """Map each block to the maximal chain of consecutive blocks that always run together."""
    broken = {steps[0].block}  # blocks that cannot continue the chain of the block before them
    for before, step in pairwise(steps):
        marked = step.injected or step.writes or step.normalize or before.exit
        if step.block != before.block + 1 or step.grad != before.grad or marked:
            broken |= {step.block, before.block + 1}
    broken.add(steps[-1].block + 1)
    chains: dict[int, tuple[int, ...]] = {}
    current: tuple[int, ...] = ()
    for block in sorted({step.block for step in steps}):
        current = (block,) if block in broken else (*current, block)
        chains.update(dict.fromkeys(current, current))
    return chains


def _row_label(blocks: tuple[int, ...]) -> str:
    if len(blocks) == 1:
        return f"block {blocks[0]}"
    return f"blocks {blocks[0]}-{blocks[-1]}"


def _header(band: list[_Column], margin: int, cell: int) -> Text:
    """Return positions in the map, thinned where numbers would touch."""
    line, free_from = "", 0
    for i, column in enumerate(band):
        number = str(column.position)
        if i * cell >= free_from and (cell > 2 or i % 5 == 0):
            line = f"{line:<{i * cell}}{number}"
            free_from = len(line) + 1
    return Text(f"{'step':<{margin}}{line}", "dim")


def _walk_cells(
    band: list[_Column],
    following: _Column | None,
    rows: list[tuple[int, ...]],
    row: int,
    cell: int,
) -> str:
    """Draw one row of the walk: a mark where its blocks run, and the line to the next step."""
    line = ""
    for i, column in enumerate(band):
        after = band[i + 1] if i + 1 < len(band) else following
        here = rows.index(column.blocks)
        mark = " "
        if here == row:
            mark = "●" if len(column.blocks) == 1 else "■"
            mark = mark if column.step.grad else "○"
        link = ""
        if after is not None:
            link = _link(row, here, rows.index(after.blocks), cell - 1)
        line += f"{mark}{link:<{cell - 1}}"
    return line.rstrip()


def _link(row: int, start: int, end: int, width: int) -> str:
    """Return the part of the line from row `start` to row `end` that falls into `row`."""
    left, right = "─" * ((width - 1) // 2), "─" * (width - 1 - (width - 1) // 2)
    if row == start == end:
        return "─" * width
    if row == start:
        return left + ("╮" if end > start else "╯")
    if row == end:
        return " " * len(left) + ("╰" if end > start else "╭") + right
    if min(start, end) < row < max(start, end):
        return " " * len(left) + "│"
    return ""


def _notes(band: list[_Column], names: list[str], margin: int, cell: int) -> list[Text]:
    """Return the rows below the walk: values kept and read, the normalise step, exits."""
    notes = []
    for name in names:
        marks = []
        for column in band:
            kept, read = name in column.step.writes, name in column.step.reads
            marks.append("◆" if kept else "▲" if read else " ")
        notes.append((name, marks))
    notes.append(("final norm", ["N" if column.step.normalize else " " for column in band]))
    notes.append(("exit", ["▼" if column.exit else " " for column in band]))
    return [
        Text(f"{name:<{margin}}" + "".join(f"{mark:<{cell}}" for mark in marks).rstrip())
        for name, marks in notes
        if any(mark != " " for mark in marks)
    ]


def _legend(steps: LayerMap, columns: list[_Column], named: bool) -> str:
    parts = []
    if any(len(column.blocks) > 1 for column in columns):
        parts.append("■ consecutive blocks")
    if named:
        both = any(set(step.writes) & set(step.reads) for step in steps)
        parts.append("◆ kept" + (" and read" if both else "") + "  ▲ read")
    if any(step.normalize for step in steps):
        parts.append("N final norm before the step")
    if any(not step.grad for step in steps):
        parts.append("○ forward only")
    if any(step.exit for step in steps):
        parts.append("▼ norm and head after the step")
    return "\n".join(parts)
