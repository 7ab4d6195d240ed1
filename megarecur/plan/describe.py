"""Words for schemes, blocks, orders and numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megarecur.config.recurrence import (
    BlockRecurrence,
    Custom,
    Dense,
    Loop,
    Looped,
    RecurrenceConfig,
    ReuseMap,
    Ring,
    Universal,
)
from megarecur.config.run import Config
from megarecur.recurrence.depth import describe_loops

ORDER_NAMES = {
    "1f1b": "1F1B",
    "interleaved": "interleaved 1F1B",
    "interleaved_zero_bubble": "interleaved ZB",
    "zbv": "ZB-V",
    "greedy": "greedy",
}
"""Names of the families of pipeline orders."""


def resolve_vocab_size(config: Config, count: Callable[[str], int]) -> Config:
    """Return the config with `model.vocab_size` set; the default is `count(data.tokenizer)`. A
    model of pictures has none."""
    if config.model.vocab_size is not None or config.reads_images:
        return config
    model = config.model.model_copy(update={"vocab_size": count(config.data.tokenizer)})
    return config.model_copy(update={"model": model})


def describe_schemes(config: Config) -> str:
    """Describe the scheme of a run, or those of its encoder and decoder."""
    if config.encoder is None:
        return describe_scheme(config.recurrence)
    encoder, decoder = describe_scheme(config.encoder), describe_scheme(config.recurrence)
    return f"encoder: {encoder}; decoder: {decoder}"


def describe_scheme(recurrence: RecurrenceConfig) -> str:
    """Describe the scheme and its numbers in one phrase."""
    match recurrence:
        case Dense():
            return f"dense, {count_noun(recurrence.num_layers, 'block')}"
        case ReuseMap():
            again = ", a block's entry state added at each repetition"
            again *= recurrence.injection == "add"
            return f"reuse map [{', '.join(map(str, recurrence.reuse_map))}]{again}"
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


def _loops(recurrence: Looped) -> str:
    text = describe_loops(recurrence)
    return text + " loop" * text.isdigit() + "s" * (text.isdigit() and text != "1")


def count_noun(count: int, noun: str) -> str:
    """Format a count with its noun: "1 block", "2 blocks"."""
    return f"{count:,} {noun}" + ("s" if count != 1 else "")


def list_blocks(blocks: tuple[int, ...]) -> str:
    """Describe blocks, as in "block 3", "blocks 0-2 7" or "no block"."""
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
    """Format a span as "2" or "2-5"."""
    return str(first) if first == last else f"{first}-{last}"


def format_count(number: float) -> str:
    """Format a count of FLOPs, parameters or tokens: 1,234 as 1,234; 45,000,000 as 45.0 M."""
    for power, letter in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if number >= 10**power:
            return f"{number / 10**power:.1f} {letter}"
    return f"{number:,.0f}"


def format_bytes(number: int) -> str:
    """Format bytes in binary units."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number >= 2**power:
            return f"{number / 2**power:.1f} {unit}"
    return f"{number} B"


def format_seconds(seconds: float) -> str:
    """Format seconds in a suitable unit."""
    for power, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= power:
            return (
                f"{seconds / power:.3g} {unit}" if seconds < 1000 * power else f"{seconds:,.0f} s"
            )
    return f"{seconds * 1e9:.3g} ns"


def name_ranks(ranks: Sequence[int]) -> str:
    """Format ranks, for example `rank 3` or `ranks 0-3, 6`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    return ("ranks " if len(ranks) > 1 else "rank ") + ", ".join(texts)
