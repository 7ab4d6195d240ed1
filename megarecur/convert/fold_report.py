"""The report of a fold, as numbers for files and as text. No tensors here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megarecur.config.run import Config
from megarecur.convert.folding import LINEARS, Fold
from megarecur.recurrence.inventory import ParameterSpec, build_inventory, is_embedding

Report = dict[str, Any]


def window_kinds(fold: Fold, source: Config) -> list[str]:
    """Return for each block whether it has a window, taken from the first of its source layers."""
    return ["sliding" if source.model.slides(made[0]) else "full" for made in fold.made_of]


def other_windows(fold: Fold, source: Config) -> list[int]:
    """Return the steps whose source layer has a window where their block has none, or vice
    versa."""
    kinds = window_kinds(fold, source)
    return [
        step
        for step, (block, layer) in enumerate(zip(fold.blocks, fold.sources, strict=True))
        if (kinds[block] == "sliding") != source.model.slides(layer)
    ]


def count_sizes(config: Config) -> dict[str, int]:
    """Return the parameters of a model: embedding and head, blocks, adapters, other; and sums."""
    sizes = dict.fromkeys(("embedding", "blocks", "adapters", "other"), 0)
    for spec in build_inventory(config).values():
        sizes[_kind(spec)] += spec.size
    total = sum(sizes.values())
    return {**sizes, "total": total, "non_embedding": total - sizes["embedding"]}


def _kind(spec: ParameterSpec) -> str:
    if is_embedding(spec.name):
        return "embedding"
    if spec.block is None:
        return "other"
    return "adapters" if ".loops." in spec.name else "blocks"


def build_report(
    fold: Fold,
    source: Config,
    result: Config,
    matrices: list[dict[str, Any]],
    unheld: Mapping[str, float],
    seconds: Mapping[str, float],
) -> Report:
    """Return all values of the report, for JSON.

    Args:
        unheld: norms and biases that sharing changes, with the largest relative change.
    """
    order = list(LINEARS)
    return {
        "options": {k: v for k, v in vars(fold.options).items() if v is not None},
        "num_layers": fold.num_layers,
        "dropped": list(fold.dropped),
        "blocks": [{"block": b, "made_of": list(layers)} for b, layers in enumerate(fold.made_of)],
        "steps": [
            {"block": block, "loop": loop, "source": source_layer}
            for block, loop, source_layer in zip(
                fold.blocks, fold.loop_indices, fold.sources, strict=True
            )
        ],
        "matrices": sorted(
            matrices, key=lambda m: (m["block"], m["loop"], order.index(m["linear"]))
        ),
        "windows": other_windows(fold, source),
        "unheld": dict(sorted(unheld.items(), key=lambda item: -item[1])),
        "sizes": {"source": count_sizes(source), "folded": count_sizes(result)},
        "seconds": {part: round(value, 3) for part, value in seconds.items()},
    }


def format_report(report: Report) -> str:
    """Format the report as text with lines of at most about 120 characters."""
    parts = [_summary(report), _blocks(report), _matrices(report), _sizes(report)]
    if report["unheld"]:
        parts.append(_unheld(report["unheld"]))
    if report["windows"]:
        steps = ", ".join(map(str, report["windows"]))
        parts.append(
            f"steps {steps}: the source's layer sees a sliding window where its block sees all, or "
            "the other way round; choose loops that keep the pattern to start from the source"
        )
    spent = ", ".join(f"{part} {value:.1f} s" for part, value in report["seconds"].items())
    return "\n\n".join([*parts, f"time: {spent}"]) + "\n"


def _summary(report: Report) -> str:
    options = report["options"]
    made = f"{len(report['blocks'])} blocks that run {len(report['steps'])} steps"
    if "layers" in options:
        made = f"{options['layers']} layers that share nothing"
    line = f"{report['num_layers']} layers folded into {made} (scheme {options['scheme']}"
    if options["scheme"] != "loop":
        line += f", init {options['init']}"
    if options["lora_rank"]:
        line += f", adapters of rank {options['lora_rank']} started by {options['lora_init']}"
    line += f", norms {options['norms']})"
    if report["dropped"]:
        line += f"\nlayers dropped: {', '.join(map(str, report['dropped']))}"
    return line


def _blocks(report: Report) -> str:
    rows = []
    for entry in report["blocks"]:
        layers = ", ".join(map(str, entry["made_of"]))
        uses = [step["source"] for step in report["steps"] if step["block"] == entry["block"]]
        made = f"mean of {layers}" if len(entry["made_of"]) > 1 else f"copy of {layers}"
        rows.append([str(entry["block"]), made, ", ".join(map(str, uses))])
    return _table(["block", "layers that made it", "layer that each loop stands for"], rows)


def _matrices(report: Report) -> str:
    """Return a row per step and a column per linear: residual, share held, rank."""
    cells: dict[tuple[int, int], dict[str, str]] = {}
    linears = []
    for matrix in report["matrices"]:
        share = matrix["residual_norm"] / max(matrix["weight_norm"], 1e-30)
        text = f"{share:.3f}" if share else "0"
        if matrix["rank"] and share:
            text += f" {100 * matrix['energy']:5.1f}%"
        if matrix["rank"]:
            text += f" r{matrix['rank']}"
        cells.setdefault((matrix["block"], matrix["loop"]), {})[matrix["linear"]] = text
        if matrix["linear"] not in linears:
            linears.append(matrix["linear"])
    rows = []
    for i, step in enumerate(report["steps"]):
        found = cells.get((step["block"], step["loop"]), {})
        where = [str(i), f"{step['block']}.{step['loop']}", str(step["source"])]
        rows.append(where + [found.get(linear, "-") for linear in linears])
    title = (
        "residual |W - W'| / |W| of each matrix, the share of its square that the adapter starts "
        "with, and the adapter's rank"
    )
    return title + "\n" + _table(["step", "block.loop", "layer", *linears], rows)


def _sizes(report: Report) -> str:
    before, after = report["sizes"]["source"], report["sizes"]["folded"]
    rows = [
        [part.replace("_", "-"), f"{before[part]:,}", f"{after[part]:,}"]
        for part in before
        if before[part] or after[part]
    ]
    return _table(["parameters", "source", "folded"], rows)


def _unheld(unheld: Mapping[str, float]) -> str:
    rows = [[name, f"{share:.3f}"] for name, share in unheld.items()]
    title = (
        "tied across loops although the layers differ, which no adapter corrects (largest "
        "difference, relative)"
    )
    return title + "\n" + _table(["parameter", "difference"], rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table with columns padded to their widest cell."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
