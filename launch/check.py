"""The tables of `megarecur check`: layer map, parameters, FLOPs, memory and tokens of a run."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megarecur.attention.plan import describe_choices
from megarecur.config.base import show
from megarecur.config.recurrence import Loop
from megarecur.config.run import Config
from megarecur.config.train import Recompute
from megarecur.launch.configs import see_corpora
from megarecur.launch.drawing import draw_layer_map
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
    see_samples,
    with_recompute,
)
from megarecur.plan.describe import count_noun, describe_schemes, format_bytes, format_count
from megarecur.plan.waits import find_waits
from megarecur.recurrence.depth import draws_depth
from megarecur.recurrence.inventory import build_inventory
from megarecur.recurrence.layer_map import LayerMap
from megarecur.recurrence.schemes import build_map


def describe(config: Config, width: int = 100) -> RenderableType:
    """Return the whole output of `check`; `config.model.vocab_size` must be resolved."""
    steps = build_map(config)
    return Group(
        Text(),
        Text.assemble(("layer map  ", "bold"), describe_schemes(config)),
        *describe_temporal(config),
        *(Text.assemble(("attention  ", "bold"), line) for line in describe_choices(config)),
        *describe_waits(config),
        *describe_ranks(config),
        Padding(draw_layer_map(steps, width - 4), (1, 2)),
        _parameters(config, steps),
        *_paper(config),
        _compute(config, steps),
        _memory(config, deepest_map(config)),
        _tokens(config),
        _resolved(config),
    )


def describe_temporal(config: Config) -> list[Text]:
    """Return a line about the temporal memory, or [] without one."""
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


def describe_waits(config: Config) -> list[Text]:
    """Return a line about each reason for which a step waits for a GPU."""
    waits = find_waits(config) if config.train.device != "cpu" else []
    return [Text.assemble(("waits      ", "bold"), f"for a GPU: {line}") for line in waits]


def describe_ranks(config: Config) -> list[Text]:
    """Return a line about the matrices whose full rank is below that of the adapters."""
    if config.adapters is None:
        return []
    clipped: dict[int, dict[str, None]] = {}
    for name, spec in build_inventory(config).items():
        if name.endswith(".lora_a") and spec.shape[0] < config.adapters.rank:
            clipped.setdefault(spec.shape[0], {})[name.split(".")[-2]] = None
    if not clipped:
        return []
    parts = "; ".join(f"{', '.join(names)}: {rank}" for rank, names in sorted(clipped.items()))
    return [
        Text.assemble(
            ("adapters   ", "bold"),
            f"rank {config.adapters.rank} is clipped to the full rank of smaller matrices: {parts}",
        )
    ]


def make_table(title: str, *columns: str, width: int = 14) -> Table:
    """Return an empty table with a title, number columns, and row names in front."""
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
        row(f"  {config.of_loops}", count_adapters(config))
    row("unrolled", count_unrolled_parameters(config, steps))
    return Padding(table, (0, 0, 1, 0))


def _paper(config: Config) -> list[RenderableType]:
    """Return our number of parameters beside the published one."""
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
    found = see_corpora(config)
    seen = found or see_samples(config)
    flops, dense = expect_flops(config, seen), count_flops(config, dense_twin(steps), seen)
    mean = ", mean over the run's steps" if draws_depth(config) else ""
    table = make_table(
        f"executed FLOPs{mean} (dense: every block once)", "per token", "per step", "against dense"
    )
    tokens = count_tokens_per_step(config)
    rows = [("forward", flops.forward, dense.forward), ("training", flops.train, dense.train)]
    if flops.forward_only:
        rows.append(("  forward only", flops.forward_only, dense.train))
    if config.temporal is not None:
        rows.insert(1, ("  writing memory", count_memory_flops(config), dense.forward))
    if flops.recompute:
        rows.append(("with recompute", flops.hardware, dense.train))
    for name, count, other in rows:
        per_step = format_count(count * tokens)
        table.add_row(name, format_count(count), per_step, f"x {count / other:.2f}")
    keys = f"{seen.full:,.0f}"
    if config.encoder is not None:
        keys += f" target and {seen.cross:,.0f} source"
    if config.model.sliding_window is not None:
        keys += f", {seen.sliding:,.0f} in sliding blocks,"
    whole = "by the documents of data.train" if found else "with one document per sample"
    note = f"  attention counts {keys} keys per token, {whole}, not all {config.num_positions:,}"
    return Group(table, Padding(Text(note, "dim"), (0, 0, 1, 0)))


def _memory(config: Config, steps: LayerMap) -> RenderableType:
    memory = estimate_memory(config, steps)
    deepest = ", deepest step of the run" if draws_depth(config) else ""
    tensor = config.parallel.tensor
    shared = f" of the {tensor} that share each matrix" if tensor > 1 else ""
    if config.parallel.context > 1:
        shared += f", of the {config.parallel.context} that share each sequence"
    if config.parallel.pipeline > 1:
        shared += (
            f", all {config.parallel.pipeline} pipeline ranks together (per rank: megarecur plan)"
        )
    table = make_table(f"memory of one process{shared}{deepest}", "")
    rows = [
        ("parameters", memory.parameters),
        ("gradients", memory.gradients),
        ("optimizer moments", memory.moments),
        (f"{config.train.precision} copies", memory.copies),
        *_activations(config, steps),
        ("logits", memory.logits),
        ("attention mask", memory.mask),
    ]
    for name, count in rows:
        if count:
            unused = name.startswith("activations") and count != memory.activations
            table.add_row(name, format_bytes(count), style="dim" if unused else None)
    own = show_policy(config.train.recompute)
    table.add_row(f"total, recompute {own}", format_bytes(memory.total), style="bold")
    if config.train.offload_activations:
        where = "pinned host memory on CUDA; a CPU moves nothing"
        table.add_row("activations moved", where, style="dim")
    return Padding(table, (0, 0, 1, 0))


def _activations(config: Config, steps: LayerMap) -> list[tuple[str, int]]:
    """Return name and bytes of the activations under every policy of train.recompute."""
    policies: list[Recompute] = ["none", "selective", "full"]
    if config.train.recompute not in policies:
        policies.append(config.train.recompute)
    return [
        (
            f"activations, recompute {show_policy(policy)}",
            estimate_memory(with_recompute(config, policy), steps).activations,
        )
        for policy in policies
    ]


def show_policy(policy: Recompute) -> str:
    """Return a policy of train.recompute in words."""
    return policy if isinstance(policy, str) else f"of loops {show(policy.loops)}"


def _tokens(config: Config) -> RenderableType:
    train, seq_length = config.train, config.tokens_per_sample
    size = config.tokens_per_microbatch
    table = make_table("tokens", "")
    table.add_column()
    micro = train.micro_batch_size
    passes = train.global_batch_size // micro
    shape = f"{micro} x {seq_length}"
    if train.batch_tokens is not None:
        shape = f"targets, half of train.batch_tokens={train.batch_tokens:,}"
    rows = [
        ("per micro batch", size, shape),
        ("per step", count_tokens_per_step(config), f"{passes} micro batches"),
        ("total", count_total_tokens(config), f"{train.steps:,} steps"),
    ]
    for name, count, note in rows:
        table.add_row(name, f"{count:,}", Text(note, "dim"))
    unique = count_parameters(config).non_embedding
    ratio = count_total_tokens(config) / max(unique, 1)
    table.add_row("per unique parameter", f"{ratio:,.1f}", Text("without embedding", "dim"))
    return Padding(table, (0, 0, 1, 0))


def describe_input(config: Config) -> dict[str, object]:
    """Return the resolved size of the vocabulary or, of pictures, the positions by their key."""
    if not config.reads_images or config.task is None:
        return {"model.vocab_size": config.model.vocab_size}
    side, token = config.task.grid_size, " + class token" * config.task.has_class_token
    return {"data.seq_length": f"{config.data.seq_length} ({side} x {side} patches{token})"}


def _resolved(config: Config) -> RenderableType:
    """Return the values derived from others when a config omits them."""
    model, recurrence = config.model, config.recurrence
    values: dict[str, object] = {
        **describe_input(config),
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
