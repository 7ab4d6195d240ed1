"""The inventory: which parameters exist. Fixed for a run, whatever depth is executed.

Names are global and survive any mesh: the model, checkpoints and optimizer groups use these names
and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import get_args

from megarecur.config.schema import (
    AdapterTarget,
    Config,
    Loop,
    Looped,
    ModelConfig,
    OptimizerConfig,
    RecurrenceConfig,
)
from megarecur.errors import ConfigError
from megarecur.recurrence.layer_map import LayerMap, count_uses
from megarecur.recurrence.schemes import layer_map


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One unique parameter.

    `block` owns it (None: embedding, final norm, head). Initial values are normal with `std`
    around `mean`. Tensor parallelism cuts it along `cut` (None: every rank holds all of it), in
    units of `unit` rows or columns, such as those of one head. `partial`: every rank holds all of
    it and uses it for its own heads alone, so that its gradient is a sum over ranks.
    """

    name: str
    shape: tuple[int, ...]
    block: int | None
    std: float = 0.0
    mean: float = 0.0
    cut: int | None = None
    unit: int = 1
    loop: int | None = None
    """The only loop of its block that uses it; None: all do."""
    partial: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def part(self, rank: int, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(offset, sizes) of what a tensor-parallel rank of `size` holds.

        Where there are fewer units than ranks, neighbours hold the same one.
        """
        offset, sizes = [0] * len(self.shape), list(self.shape)
        if self.cut is not None:
            units = self.shape[self.cut] // self.unit
            first = units * rank // size
            last = max(units * (rank + 1) // size, first + 1)
            offset[self.cut], sizes[self.cut] = first * self.unit, (last - first) * self.unit
        return tuple(offset), tuple(sizes)

    def place(self, rank: int, size: int) -> tuple[slice, ...]:
        """Where in the whole tensor that part is."""
        offset, sizes = self.part(rank, size)
        return tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))

    def holders(self, size: int) -> int:
        """How many of `size` tensor-parallel ranks hold each element."""
        if self.cut is None:
            return size
        return max(size * self.unit // self.shape[self.cut], 1)


Inventory = dict[str, ParameterSpec]
HEAD_NORMS = ("query_norm", "key_norm")
"""Of attention, where model.qk_norm is set."""


def build_inventory(config: Config) -> Inventory:
    """Every parameter of the run by global name, in model order.

    `config.model.vocab_size` must be resolved.
    """
    model, steps = config.model, layer_map(config.recurrence)
    uses = count_most_uses(config.recurrence) if config.adapters else {}
    assert model.vocab_size is not None
    hidden = model.hidden_size
    table = (model.vocab_size, hidden)
    specs = [ParameterSpec("embedding.weight", table, None, model.init_std, cut=0)]
    if model.positions == "learned":
        rows = model.max_positions or config.data.seq_length
        specs.append(ParameterSpec("embedding.positions", (rows, hidden), None, model.init_std))
    for block in sorted({step.block for step in steps}):
        own = block_parameters(config, block, steps)
        specs += own
        for loop in range(uses.get(block, 0)):
            specs += adapter_parameters(config, own, loop)
    if model.norm_position != "post":
        specs += norm_parameters(model, "final_norm", None)
    if not model.tie_embeddings:
        specs.append(ParameterSpec("head.weight", table, None, model.init_std, cut=0))
    return {spec.name: spec for spec in specs}


def block_parameters(config: Config, block: int, steps: LayerMap) -> list[ParameterSpec]:
    """The parameters that live with one block."""
    model, recurrence = config.model, config.recurrence
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    scaled = model.init_std
    if model.init_scaling == "depth":
        scaled /= math.sqrt(2 * len(steps))
    prefix = f"blocks.{block}."

    def linear(
        name: str,
        rows: int,
        columns: int,
        bias: bool,
        std: float,
        cut: int | None = None,
        unit: int = 1,
    ) -> list[ParameterSpec]:
        shape = (rows, columns)
        weight = ParameterSpec(f"{prefix}{name}.weight", shape, block, std, cut=cut, unit=unit)
        if not bias:
            return [weight]
        along = 0 if cut == 0 else None  # A bias is cut with the outputs.
        name = f"{prefix}{name}.bias"
        return [weight, ParameterSpec(name, (rows,), block, cut=along, unit=unit)]

    def norm(name: str) -> list[ParameterSpec]:
        return [] if has_own_norms(config) else norm_parameters(model, prefix + name, block)

    biased, head, std = biased_projections(model), model.head_dim, model.init_std
    specs = []
    if block == injection_block(recurrence):
        specs += linear("injection", hidden, 2 * hidden, False, model.init_std)
    specs += norm("attention_norm")
    specs += linear("attention.query", queries, hidden, "q" in biased, std, 0, head)
    specs += linear("attention.key", keys, hidden, "k" in biased, std, 0, head)
    specs += linear("attention.value", keys, hidden, "v" in biased, std, 0, head)
    specs += linear("attention.output", hidden, queries, "o" in biased, scaled, 1, head)
    if not has_own_norms(config):
        specs += head_norm_parameters(model, f"{prefix}attention.", block)
    if model.norm_position in ("sandwich", "peri"):
        specs += norm("attention_output_norm")
    specs += norm("feed_forward_norm")
    if model.gated:
        specs += linear("feed_forward.gate", ffn, hidden, model.feed_forward_bias, std, 0)
    specs += linear("feed_forward.up", ffn, hidden, model.feed_forward_bias, std, 0)
    specs += linear("feed_forward.down", hidden, ffn, model.feed_forward_bias, scaled, 1)
    if model.norm_position in ("sandwich", "peri"):
        specs += norm("feed_forward_output_norm")
    return specs


def adapter_parameters(
    config: Config, block: list[ParameterSpec], loop: int
) -> list[ParameterSpec]:
    """What one loop of a block has of its own, from the parameters of the block: A [r, in] and
    B [out, r] for each matrix, what is added to biases [out], and norms.

    A starts with a deviation that keeps the scale of what it is given, B and biases at zero.
    """
    adapters, targets = config.adapters, adapter_targets(config)
    assert adapters is not None
    owner = block[0].block
    prefix, specs = f"blocks.{owner}.loops.{loop}.", []
    for matrix in block:
        _, target, kind = matrix.name.rsplit(".", 2)
        if target not in targets:
            continue
        if kind == "bias":
            added = replace(matrix, name=f"{prefix}{target}.lora_bias")
            specs += [added] if adapters.biases else []
            continue
        (rows, columns), unit = matrix.shape, matrix.unit
        rank = min(adapters.rank, rows, columns)
        # Cut as the matrix is: B by its outputs, or A by its inputs.
        a = ParameterSpec(f"{prefix}{target}.lora_a", (rank, columns), owner, columns**-0.5)
        b = ParameterSpec(f"{prefix}{target}.lora_b", (rows, rank), owner)
        if matrix.cut == 0:
            b = replace(b, cut=0, unit=unit)
        elif matrix.cut == 1:
            a = replace(a, cut=1, unit=unit)
        specs += [a, b]
    for norm in norm_names(config.model) if adapters.norms else ():
        specs += norm_parameters(config.model, prefix + norm, owner)
    if adapters.norms:
        specs += head_norm_parameters(config.model, prefix, owner)
    return [replace(spec, loop=loop) for spec in specs]


def adapter_targets(config: Config) -> tuple[str, ...]:
    """The linear layers that every loop adds to."""
    if config.adapters is None:
        return ()
    return config.adapters.targets or tuple(
        target for target in get_args(AdapterTarget) if target != "gate" or config.model.gated
    )


def biased_targets(config: Config) -> tuple[str, ...]:
    """Those of them that have a bias."""
    initials = biased_projections(config.model) + "gud" * config.model.feed_forward_bias
    return tuple(target for target in adapter_targets(config) if target[0] in initials)


def has_own_norms(config: Config) -> bool:
    """Whether every loop has norms of its own, in place of its block's."""
    return config.adapters is not None and config.adapters.norms


def norm_names(model: ModelConfig) -> tuple[str, ...]:
    """The norms of a block."""
    outputs = ("attention_output_norm", "feed_forward_output_norm")
    return (
        "attention_norm",
        "feed_forward_norm",
        *outputs[: 2 * (model.norm_position in ("sandwich", "peri"))],
    )


def count_most_uses(recurrence: RecurrenceConfig) -> dict[int, int]:
    """The most uses of each block at any optimizer step."""
    most = recurrence.most_loops if isinstance(recurrence, Looped) else None
    return count_uses(layer_map(recurrence, most))


def injection_block(recurrence: RecurrenceConfig) -> int | None:
    """The block that owns the learned injection adapter: the first of the core, if there is one."""
    if isinstance(recurrence, Loop) and recurrence.injection == "linear":
        return recurrence.prelude
    return None


def biased_projections(model: ModelConfig) -> str:
    """Initials of the attention projections (query, key, value, output) that carry a bias."""
    return {"none": "", "qk": "qk", "qkv": "qkv", "all": "qkvo"}[model.attention_bias]


def norm_parameters(model: ModelConfig, name: str, block: int | None) -> list[ParameterSpec]:
    """Gain, and for LayerNorm a bias."""
    specs = [ParameterSpec(name + ".weight", (model.hidden_size,), block, mean=1.0)]
    if model.norm == "layer":
        specs.append(ParameterSpec(name + ".bias", (model.hidden_size,), block))
    return specs


def head_norm_parameters(model: ModelConfig, prefix: str, block: int | None) -> list[ParameterSpec]:
    """Gains of the norms of queries and keys, over head_dim; none where there are no such norms."""
    return [
        ParameterSpec(f"{prefix}{name}.weight", (model.head_dim,), block, mean=1.0, partial=True)
        for name in (HEAD_NORMS if model.qk_norm else ())
    ]


def is_embedding(name: str) -> bool:
    """Whether the field's non-embedding count leaves this parameter out."""
    return name.startswith(("embedding.", "head."))


def check_patterns(optimizer: OptimizerConfig, names: Iterable[str]) -> None:
    """Refuse patterns that match no parameter, and a run that would train nothing.

    Raises:
        ConfigError: listing the patterns.
    """
    names = list(names)
    patterns = {
        "no_decay": optimizer.no_decay,
        "lr_multipliers": tuple(optimizer.lr_multipliers),
        "frozen": optimizer.frozen,
        "muon.exclude": optimizer.muon.exclude if optimizer.muon else (),
    }
    idle = [
        f"optimizer.{field}: {pattern!r} matches no parameter"
        for field, values in patterns.items()
        for pattern in values
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if all(is_frozen(optimizer, name) for name in names):
        idle.append("optimizer.frozen: every parameter is frozen, nothing would be trained")
    if idle:
        example = ", ".join(names[:3])
        raise ConfigError("\n".join([*idle, f"parameters have names such as {example}"]))


def is_frozen(optimizer: OptimizerConfig, name: str) -> bool:
    """Whether a pattern freezes the parameter."""
    return any(fnmatchcase(name, pattern) for pattern in optimizer.frozen)


def uses_muon(optimizer: OptimizerConfig, name: str, ndim: int) -> bool:
    """Whether Muon trains the parameter: matrices of blocks, patterns apart."""
    if optimizer.muon is None or ndim != 2 or not name.startswith("blocks."):
        return False
    return not any(fnmatchcase(name, pattern) for pattern in optimizer.muon.exclude)
