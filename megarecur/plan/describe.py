"""What `megarecur check` prints: a run in one picture of its layer map and a few tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megarecur.config.schema import (
    BlockRecurrence,
    Config,
    Custom,
    Dense,
    Loop,
    Looped,
    RecurrenceConfig,
    ReuseMap,
    Ring,
    Universal,
)
from megarecur.plan.cost import (
    ParameterCount,
    count_adapters,
    count_flops,
    count_memory_flops,
    count_parameters,
    count_tokens_per_step,
    count_total_tokens,
    count_unrolled_parameters,
    deepest_map,
    dense_twin,
    estimate_memory,
    expect_flops,
)
from megarecur.recurrence.depth import describe_loops, is_sampled
from megarecur.recurrence.layer_map import LayerMap, Step, count_uses
from megarecur.recurrence.schemes import build_map

MAX_ROWS, MAX_COLUMNS = 16, 48
"""Maps of more blocks or steps are drawn with a chain of blocks as one row and one mark."""

BLOCK_STYLES = ("cyan", "green", "yellow", "magenta", "blue", "red")


def describe(config: Config, width: int = 100) -> RenderableType:
    """Everything `check` has to say; `config.model.vocab_size` must be resolved."""
    steps = build_map(config)
    return Group(
        Text(),
        Text.assemble(("layer map  ", "bold"), describe_scheme(config.recurrence)),
        *describe_temporal(config),
        Padding(draw_layer_map(steps, width - 4), (1, 2)),
        _parameters(config, steps),
        *_paper(config),
        _compute(config, steps),
        _memory(config, deepest_map(config)),
        _tokens(config),
        _resolved(config),
    )


def print_description(config: Config) -> None:
    """Write `describe(config)` to the terminal, or plainly to a file or pipe."""
    console = make_console()
    console.print(describe(config, max(console.width, 60)))


def make_console() -> Console:
    """The terminal; elsewhere a page of 100 columns."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=100)


def resolve_vocab_size(config: Config, count: Callable[[str], int]) -> Config:
    """The config with `model.vocab_size` stated: left out, it is `count(data.tokenizer)`."""
    if config.model.vocab_size is not None:
        return config
    model = config.model.model_copy(update={"vocab_size": count(config.data.tokenizer)})
    return config.model_copy(update={"model": model})


def describe_scheme(recurrence: RecurrenceConfig) -> str:
    """One phrase: the scheme and its numbers."""
    match recurrence:
        case Dense():
            return f"dense, {count_noun(recurrence.num_layers, 'block')}"
        case ReuseMap():
            return f"reuse map [{', '.join(map(str, recurrence.reuse_map))}]"
        case BlockRecurrence():
            again = ", embedding added at each later loop" * (recurrence.injection == "add")
            blocks = count_noun(recurrence.num_blocks, "block")
            return f"{blocks} x {_loops(recurrence)}{again}"
        case Loop():
            return (
                f"loop, prelude {recurrence.prelude} / core {recurrence.core} x "
                f"{describe_loops(recurrence)} / coda {recurrence.coda}, "
                f"injection {recurrence.injection}, initial state {recurrence.initial_state}"
            )
        case Universal():
            halting = recurrence.halting
            halts = "" if halting.mode == "none" else f", halting by {halting.mode} means"
            if halting.mode == "token":
                halts = ", halting token by token"
            return f"universal, 1 block at most {recurrence.depth} times{halts}"
        case Custom():
            return f"custom order, {count_noun(max(recurrence.order) + 1, 'block')}"
        case Ring():
            ranks = f"{recurrence.level_rank}, of feed-forward {recurrence.feed_forward_rank}"
            return f"ring, 1 block at depth {recurrence.depth}, rank of signals {ranks}"
        case _:
            blocks = count_noun(recurrence.num_blocks, "block")
            return f"{recurrence.kind}, {blocks} at depth {recurrence.depth}"


def describe_temporal(config: Config) -> list[Text]:
    """A line about the temporal memory, if there is one."""
    temporal = config.temporal
    if temporal is None:
        return []
    chunks = -(-config.data.seq_length // temporal.chunk_length)
    return [
        Text.assemble(
            ("memory     ", "bold"),
            f"{count_noun(temporal.num_slots, 'slot')}, carried over "
            f"{count_noun(chunks, 'chunk')} of {count_noun(temporal.chunk_length, 'token')}, "
            f"{temporal.initial_memory} at first, {count_noun(temporal.updates, 'update')} each; "
            "FLOPs linear in the length",
        )
    ]


def _loops(recurrence: Looped) -> str:
    text = describe_loops(recurrence)
    return text + " loop" * text.isdigit() + "s" * (text.isdigit() and text != "1")


# ---------------------------------------------------------------------------------- the drawing


@dataclass(frozen=True, slots=True)
class _Column:
    """One or more consecutive steps drawn as one mark, in the row of their blocks."""

    blocks: tuple[int, ...]
    position: int
    step: Step
    """The first; only it may read, write or normalise."""
    exit: bool = False
    """Of the last."""


def draw_layer_map(steps: LayerMap, width: int = 96) -> Text:
    """The map as text: a row per block, a column per step, the walk as a line between them.

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
    """One column per step, or per chain of blocks where there is not room for each."""
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
    """Block to the maximal chain of consecutive blocks that always run in one go."""
    broken = {steps[0].block}  # blocks that cannot continue the chain of the block before them
    for before, step in pairwise(steps):
        marked = step.reads or step.writes or step.normalize or before.exit
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
    """Positions in the map, thinned where numbers would touch."""
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
    """One row of the walk: a mark where its blocks run, the line to the next step after it."""
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
    """The part of the line from row `start` to row `end` that falls into `row`."""
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
    """Rows below the walk: values kept and read, the normalise step, exits."""
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
        parts.append("■ blocks one after the other")
    if named:
        both = any(set(step.writes) & set(step.reads) for step in steps)
        parts.append("◆ kept" + (" and read" if both else "") + "  ▲ read")
    if any(step.normalize for step in steps):
        parts.append("N the final norm comes before the step")
    if any(not step.grad for step in steps):
        parts.append("○ forward only")
    if any(step.exit for step in steps):
        parts.append("▼ norm and head after the step")
    return "\n".join(parts)


# ----------------------------------------------------------------------------------- the tables


def make_table(title: str, *columns: str, width: int = 14) -> Table:
    """A table with a title, named columns of numbers, and names of rows in front."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 1, 0, 2),
        show_header=any(columns),
    )
    table.add_column(min_width=24)
    for column in columns:
        table.add_column(column, justify="right", min_width=width, header_style="dim")
    return table


def _parameters(config: Config, steps: LayerMap) -> RenderableType:
    table = make_table("parameters", "all", "without embedding")

    def row(name: str, count: ParameterCount) -> None:
        table.add_row(name, f"{count.total:,}", f"{count.non_embedding:,}")

    row("unique", count_parameters(config))
    if config.of_loops:
        row(f"of it {config.of_loops}", count_adapters(config))
    row("unrolled", count_unrolled_parameters(config, steps))
    return Padding(table, (0, 0, 1, 0))


def _paper(config: Config) -> list[RenderableType]:
    """Our number of parameters beside the published one."""
    if config.paper is None:
        return []
    paper, count = config.paper, count_parameters(config)
    ours = count.non_embedding if paper.without_embedding else count.total
    scope = " without embedding" * paper.without_embedding
    more = ours - paper.parameters
    verdict = "equal" if not more else f"{abs(more):,} {'more' if more > 0 else 'fewer'} here"
    if more and paper.difference:
        verdict += f": {paper.difference}"
    table = make_table(f"published: {paper.row}", "")
    if paper.published:
        table.add_row("result", paper.published)
    table.add_row(f"parameters{scope}", f"{paper.parameters:,}; {verdict}")
    return [Padding(table, (0, 0, 1, 0))]


def _compute(config: Config, steps: LayerMap) -> RenderableType:
    flops, dense = expect_flops(config), count_flops(config, dense_twin(steps))
    mean = ", mean over the run's steps" if is_sampled(config.recurrence) else ""
    table = make_table(
        f"executed FLOPs{mean} (dense: every block once)", "per token", "per step", "against dense"
    )
    tokens = count_tokens_per_step(config)
    rows = [("forward", flops.forward, dense.forward), ("training", flops.train, dense.train)]
    if flops.forward_only:
        rows.append(("  of it forward only", flops.forward_only, dense.train))
    if config.temporal is not None:
        rows.insert(1, ("  of it writing memory", count_memory_flops(config), dense.forward))
    if flops.recompute:
        rows.append(("with recompute", flops.hardware, dense.train))
    for name, count, other in rows:
        per_step = format_count(count * tokens)
        table.add_row(name, format_count(count), per_step, f"x {count / other:.2f}")
    return Padding(table, (0, 0, 1, 0))


def _memory(config: Config, steps: LayerMap) -> RenderableType:
    memory = estimate_memory(config, steps)
    deepest = ", deepest step of the run" if is_sampled(config.recurrence) else ""
    tensor = config.parallel.tensor
    shared = f" of the {tensor} that share each matrix" if tensor > 1 else ""
    if config.parallel.pipeline > 1:
        shared += f", all {config.parallel.pipeline} pipeline ranks together (each: megarecur plan)"
    table = make_table(f"memory of one process{shared}{deepest}", "")
    rows = [
        ("parameters", memory.parameters),
        ("gradients", memory.gradients),
        ("optimizer moments", memory.moments),
        (f"{config.train.precision} copies", memory.copies),
        ("activations", memory.activations_kept),
        ("activations with recompute", memory.activations_recomputed),
        ("logits", memory.logits),
        ("attention mask", memory.mask),
    ]
    unused = "activations" if memory.recompute else "activations with recompute"
    for name, count in rows:
        if count:
            style = "dim" if name == unused else None
            table.add_row(name, format_bytes(count), style=style)
    recompute = "recompute" if memory.recompute else "no recompute"
    table.add_row(f"total, {recompute}", format_bytes(memory.total), style="bold")
    return Padding(table, (0, 0, 1, 0))


def _tokens(config: Config) -> RenderableType:
    train, seq_length = config.train, config.tokens_per_sample
    table = make_table("tokens", "")
    table.add_column()
    micro = train.micro_batch_size
    passes = train.global_batch_size // micro
    rows = [
        ("per micro batch", micro * seq_length, f"{micro} x {seq_length}"),
        ("per step", count_tokens_per_step(config), f"{passes} micro batches"),
        ("in all", count_total_tokens(config), f"{train.steps:,} steps"),
    ]
    for name, count, note in rows:
        table.add_row(name, f"{count:,}", Text(note, "dim"))
    unique = count_parameters(config).non_embedding
    ratio = count_total_tokens(config) / max(unique, 1)
    table.add_row("per unique parameter", f"{ratio:,.1f}", Text("without embedding", "dim"))
    return Padding(table, (0, 0, 1, 0))


def _resolved(config: Config) -> RenderableType:
    """Values that may be left out of a config because they follow from others."""
    model, recurrence = config.model, config.recurrence
    values: dict[str, object] = {
        "model.vocab_size": model.vocab_size,
        "model.head_dim": model.head_dim,
        "model.num_kv_heads": model.num_kv_heads,
        "model.ffn_hidden_size": model.ffn_hidden_size,
    }
    if model.positions == "learned":
        values["model.max_positions"] = model.max_positions or config.num_positions
    if config.temporal is not None:
        values["temporal.update_ffn_hidden_size"] = config.temporal.update_ffn_hidden_size
    if isinstance(recurrence, Loop):
        values["recurrence.initial_state"] = recurrence.initial_state
        if recurrence.initial_state == "random":
            values["recurrence.initial_state_std"] = f"{recurrence.initial_state_std:.4g}"
    table = make_table("resolved values", "")
    for name, value in values.items():
        table.add_row(name, str(value))
    return table


def count_noun(count: int, noun: str) -> str:
    """1 block, 2 blocks."""
    return f"{count:,} {noun}" + ("s" if count != 1 else "")


def list_blocks(blocks: tuple[int, ...]) -> str:
    """Like "block 3", "blocks 0-2 7" or "no block"."""
    if not blocks:
        return "no block"
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    text = " ".join(format_span(run[0], run[-1]) for run in runs)
    return f"block{'s' * (len(blocks) > 1)} {text}"


def format_span(first: int, last: int) -> str:
    """2, or 2-5."""
    return str(first) if first == last else f"{first}-{last}"


def format_count(number: float) -> str:
    """1,234 as 1,234; 45,000,000 as 45.0 M: for counts of FLOPs, parameters and tokens."""
    for power, letter in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if number >= 10**power:
            return f"{number / 10**power:.1f} {letter}"
    return f"{number:,.0f}"


def format_bytes(number: int) -> str:
    """Bytes in binary units."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number >= 2**power:
            return f"{number / 2**power:.1f} {unit}"
    return f"{number} B"
