"""The tables of `megarecur plan`: one layout, or the best of many."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megarecur.launch.check import make_table
from megarecur.launch.drawing import draw_layer_map
from megarecur.plan.cost import count_head_flops, count_step_flops
from megarecur.plan.describe import (
    ORDER_NAMES,
    count_noun,
    describe_schemes,
    format_bytes,
    format_count,
    format_seconds,
    format_span,
    list_blocks,
)
from megarecur.plan.placement import balance
from megarecur.plan.predict import Layout, LayoutPlan
from megarecur.plan.search import Search
from megarecur.plan.walk import Stage, Walk
from megarecur.recurrence.layer_map import count_uses
from megarecur.recurrence.schemes import build_map

MOST_ROWS = 32
"""Maximum rows of a table; the middle rows of longer tables are omitted."""


# ------------------------------------------------------------------------------------ the search


def describe_search(found: Search, world: int, own: Layout | None = None) -> RenderableType:
    """Return the best layouts of a world as a table, with the config's layout `own` marked."""
    heading = Text.assemble(
        (f"\n{len(found.best)} best of {count_noun(found.layouts, 'layout')}", "bold"),
        f" of {count_noun(world, 'rank')}, by predicted time of a step "
        f"({found.simulated} simulated)\n",
    )
    names = ("tensor", "pipeline", "data", "ZeRO", "context", "order", "bubbles", "memory", "step",
             "tokens/s", "MFU")  # fmt: skip
    table = Table(box=None, padding=(0, 1, 0, 2), header_style="dim")
    for name in names:
        table.add_column(name, justify="left" if name == "order" else "right", no_wrap=True)
    for plan in found.best:
        layout = plan.layout
        table.add_row(
            *map(str, layout),
            ORDER_NAMES[plan.choice.name] if layout.pipeline > 1 else "-",
            f"{plan.bubble:.1%}",
            format_bytes(max(plan.memory)),
            format_seconds(plan.step_time),
            format_count(plan.tokens_per_second),
            f"{plan.mfu:.1%}",
            style="bold" if own is not None and layout == own else None,
        )
    parts: list[RenderableType] = [heading, table]
    if own is not None and any(plan.layout == own for plan in found.best):
        parts.append(Text("  bold: the config's own", "dim"))
    if not found.best:
        parts = [Text(f"\nno layout of {count_noun(world, 'rank')} fits\n", "bold red")]
    if found.families:
        parts.append(Text("\nrejected layouts", "bold"))
        reasons = Table(box=None, padding=(0, 1, 0, 2), header_style="dim")
        reasons.add_column("layouts", justify="right")
        contexts = any(layout.context > 1 for f in found.families for layout in f.layouts)
        reasons.add_column("tensor x pipeline" + " x context" * contexts)
        reasons.add_column("")
        for family in found.families:
            reasons.add_row(str(len(family.layouts)), family.name, Text(family.reason, "dim"))
        parts.append(reasons)
    return Group(*parts)


# -------------------------------------------------------------------------------------- one plan


def describe_plan(plan: LayoutPlan, width: int = 100) -> RenderableType:
    """Return everything about one layout: placement of blocks, walk, ranks and totals."""
    draft = plan.draft
    steps = build_map(draft.config)
    advice = balance(draft.config, draft.placement, steps).advice
    return Group(
        Text.assemble(("\nlayout  ", "bold"), f"{draft.layout} on {draft.cluster.name}"),
        Text.assemble(("layer map  ", "bold"), describe_schemes(draft.config)),
        Padding(draw_layer_map(steps, width - 4), (1, 2)),
        _placement(plan),
        _walk(draft.walk, width),
        _ranks(plan),
        _traffic(plan),
        _totals(plan),
        Text("\n" + advice if advice else "", "yellow"),
    )


def _placement(plan: LayoutPlan) -> RenderableType:
    draft = plan.draft
    placement = draft.placement
    table = make_table("placement of blocks", "rank", "uses", "share of work", width=6)
    uses = count_uses(build_map(draft.config))
    work = _work_of_blocks(plan)
    runs = [
        list(run) for _, run in groupby(uses, key=lambda b: (placement.owners[b], uses[b], work[b]))
    ]
    rows = [("embedding", str(placement.embedding), "", "")]
    for run in runs:
        name = list_blocks(tuple(run)) + (", each" if len(run) > 1 else "")
        rows.append((name, str(placement.owners[run[0]]), str(uses[run[0]]), f"{work[run[0]]:.1%}"))
    rows.append(("final norm, head", str(placement.head), "", f"{work[-1]:.1%}"))
    _add_rows(table, rows)
    return Padding(table, (0, 0, 1, 0))


def _work_of_blocks(plan: LayoutPlan) -> dict[int, float]:
    """Return the share of forward FLOPs by block, that of the head under -1."""
    config = plan.draft.config
    steps = build_map(config)
    shares: dict[int, float] = {-1: count_head_flops(config)}
    for step, flops in zip(steps, count_step_flops(config, steps), strict=True):
        shares[step.block] = shares.get(step.block, 0) + flops
    total = sum(shares.values())
    return {block: share / total for block, share in shares.items()}


def _walk(walk: Walk, width: int) -> RenderableType:
    """Return the ranks that the map visits, stage by stage."""
    table = make_table(
        f"the walk, {count_noun(len(walk), 'stage')}", "rank", "steps", "blocks", width=6
    )
    position, rows = 0, []
    for stage in walk:
        after = position + len(stage.steps)
        steps = "" if after == position else format_span(position, after - 1)
        rows.append((f"stage {stage.index}{_ends(stage)}", str(stage.rank), steps,
                     _shorten(stage)))  # fmt: skip
        position = after
    _add_rows(table, rows)
    return Padding(table, (0, 0, 1, 0))


def _ends(stage: Stage) -> str:
    parts = ["embedding"] * stage.first + ["head"] * stage.last
    parts += [f"reads {name}" for name in stage.receives]
    parts += ["forward only"] * (not stage.backward)
    return f" ({', '.join(parts)})" if parts else ""


def _shorten(stage: Stage) -> str:
    blocks = [step.block for step in stage.steps]
    text = " ".join(map(str, blocks))
    return text if len(text) <= 40 else f"{text[:18].rsplit(' ', 1)[0]} ... {blocks[-1]}"


def _ranks(plan: LayoutPlan) -> RenderableType:
    draft = plan.draft
    deepest = ", at the deepest step" if draft.deepest is not None else ""
    table = make_table(
        "pipeline ranks, and memory per process" + deepest,
        "parameters", "state", "activations", "all", "sent a step", "idle", width=5,
    )  # fmt: skip
    rows = []
    for rank, activations, memory in zip(draft.ranks, plan.activations, plan.memory, strict=True):
        idle = 1 - rank.work * draft.num_microbatches / plan.pipeline_time
        rows.append((
            f"rank {rank.rank}, {list_blocks(rank.blocks)}",
            format_count(rank.unique),
            format_bytes(rank.state),
            format_bytes(activations),
            format_bytes(memory),
            format_bytes(rank.traffic.total),
            f"{idle:.1%}",
        ))  # fmt: skip
    _add_rows(table, rows)
    unique = sum(rank.unique for rank in draft.ranks)
    note = f"  {unique:,} parameters in all, each on one pipeline rank"
    if draft.tied_time:
        note += "; the tied embedding is copied to the head's"
    return Group(table, Padding(Text(note, "dim"), (0, 0, 1, 0)))


def _traffic(plan: LayoutPlan) -> RenderableType:
    kinds = {
        "pipeline": "activations and their gradients, between stages",
        "tensor": "collectives inside steps of the map, embedding and head",
        "context": "heads and positions that attention exchanges",
        "data": "gradients over the replicas" + ", parameters" * (plan.layout.zero_stage > 0),
        "tied": "gradient of the tied embedding, between its two ends",
    }
    table = make_table("bytes sent per step by one process (largest)", "")
    table.add_column()
    for kind, note in kinds.items():
        most = max(getattr(rank.traffic, kind) for rank in plan.draft.ranks)
        if most:
            table.add_row(kind, format_bytes(most), Text(note, "dim"))
    if plan.layout.world == 1:
        table.add_row("none", "", Text("there is only one process", "dim"))
    return Padding(table, (0, 0, 1, 0))


def _totals(plan: LayoutPlan) -> RenderableType:
    draft = plan.draft
    mean = ", at the mean depth" if draft.deepest is not None else ""
    table = make_table(f"a step{mean}, predicted from formulas, not measured", "")
    table.add_column()
    micro = draft.config.train.micro_batch_size
    note = f"of {count_noun(micro, 'sample')}"
    if draft.layout.data > 1:
        note += f", for each of {draft.layout.data:,} replicas"

    def row(name: str, value: str, note: str = "", style: str | None = None) -> None:
        table.add_row(name, value, Text(note, "dim"), style=style)

    row("micro batches", f"{draft.num_microbatches:,}", note)
    if draft.layout.pipeline > 1:
        bound = f"at most {draft.efficiency:.1%} of the ranks' time is used (busiest rank)"
        row("order", ORDER_NAMES[plan.choice.name], f"{plan.bubble:.1%} bubbles; {bound}")
    more = draft.num_microbatches - plan.simulated
    far = f"{plan.simulated} micro batches simulated, the others extrapolated" if more else ""
    if plan.tried != draft.config.parallel.order:
        row("", "", "a long walk: only this closed form was tried")
    row("pipeline", format_seconds(plan.pipeline_time), far)
    if draft.reduction_time:
        row("reduction", format_seconds(draft.reduction_time), "of gradients, not overlapped")
    if draft.update_time:
        row("optimizer", format_seconds(draft.update_time), "by memory bandwidth")
    row("step", format_seconds(plan.step_time), style="bold")
    row("tokens per second", format_count(plan.tokens_per_second))
    peak = format_count(draft.cluster.peak(draft.config.train.precision))
    keys = f"attention counts {draft.seen.full:,.0f} of {draft.config.num_positions:,} keys"
    note = f"of {peak}FLOP/s for each of {plan.layout.world:,} ranks; {keys}"
    row("MFU", f"{plan.mfu:.1%}", note)
    room, need = draft.cluster.memory, max(plan.memory)
    if plan.fits:
        row("peak memory per rank", format_bytes(need), f"of {format_bytes(room)}  usable")
    else:
        over = f"DOES NOT FIT {format_bytes(room)}: {format_bytes(need - room)} too much"
        row("peak memory per rank", format_bytes(need), over, "red")
    return table


def _add_rows(table: Table, rows: Sequence[tuple[str, ...]]) -> None:
    """Add all rows to a table, or only the first and last ones of many."""
    if len(rows) <= MOST_ROWS:
        for row in rows:
            table.add_row(*row)
        return
    half = MOST_ROWS // 2
    for row in rows[:half]:
        table.add_row(*row)
    table.add_row(f"... {len(rows) - 2 * half} more ...", style="dim")
    for row in rows[-half:]:
        table.add_row(*row)
