"""The inventory: the parameters that exist, fixed for a run at any executed depth.

Names are global and survive any mesh: the model, checkpoints and optimizer groups use these names
and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import get_args

from megarecur.config.adapters import AdapterTarget
from megarecur.config.model import ModelConfig
from megarecur.config.optimizer import OptimizerConfig
from megarecur.config.recurrence import Loop, Looped, RecurrenceConfig, Ring
from megarecur.config.run import Config
from megarecur.errors import ConfigError
from megarecur.recurrence.layer_map import count_uses
from megarecur.recurrence.schemes import layer_map
from megarecur.recurrence.stacks import Stack, list_stacks


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
    """The only loop of its block that uses it; None if all loops do."""
    partial: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def part(self, rank: int, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return (offset, sizes) of the part that a tensor-parallel rank of `size` holds.

        With fewer units than ranks, neighbouring ranks hold the same unit.
        """
        offset, sizes = [0] * len(self.shape), list(self.shape)
        if self.cut is not None:
            units = self.shape[self.cut] // self.unit
            first = units * rank // size
            last = max(units * (rank + 1) // size, first + 1)
            offset[self.cut], sizes[self.cut] = first * self.unit, (last - first) * self.unit
        return tuple(offset), tuple(sizes)

    def place(self, rank: int, size: int) -> tuple[slice, ...]:
        """Return the slices of the whole tensor that the rank's part covers."""
        offset, sizes = self.part(rank, size)
        return tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))

    def holders(self, size: int) -> int:
        """Return how many of `size` tensor-parallel ranks hold each element."""
        if self.cut is None:
            return size
        return max(size * self.unit // self.shape[self.cut], 1)


Inventory = dict[str, ParameterSpec]
EMBEDDINGS = ("source_embedding", "embedding")
"""Embeddings of source sentences and of targets; a model without an encoder has the latter only."""
CLASS_TOKEN = "class_token"
"""The learned token before the patches of a picture."""
HEAD_NORMS = ("query_norm", "key_norm")
"""Norms of attention heads, present if model.qk_norm is set."""
SIGNALS = ("query", "key", "value", "feed_forward")
"""Linear layers that receive level signals."""
SCALES = ("attention_residual", "feed_forward_residual")
"""Residual scales, one before each of the two residual additions, present if model.residual is
admin."""
CROSS_SCALE = "cross_attention_residual"
"""The third residual scale of blocks that attend to an encoder."""
ENCODER_NORM = "encoder_norm"
"""Norm of the encoder's output, if the model has a final norm."""
SIGNAL_STD = 1e-6
"""Initial deviation of the first factor of a level signal, as in the authors' RingFormer code."""


def build_inventory(config: Config) -> Inventory:
    """Return every parameter of the run by global name, in model order.

    `config.model.vocab_size` must be resolved, unless the model reads pictures.
    """
    model = config.model
    specs = patch_parameters(config) if config.reads_images else token_parameters(config)
    for stack in list_stacks(config):
        if stack.cross and stack.config.has_final_norm:
            # It lives with the decoder's first block, which is the first to need it.
            specs += norm_parameters(model, ENCODER_NORM, stack.first)
        steps, loops = layer_map(stack.recurrence), count_own_loops(stack)
        for block in stack.blocks:
            own = block_parameters(stack, block, len(steps))
            specs += own
            for loop in range(loops.get(block, 0)):
                specs += loop_parameters(stack, own, loop)
    specs += temporal_parameters(config)
    if config.has_final_norm:
        specs += norm_parameters(model, "final_norm", None)
    if config.classifies:
        specs += task_parameters(config)
    else:
        assert model.vocab_size is not None
        table = (model.vocab_size, model.hidden_size)
        if not model.tie_embeddings:
            specs.append(ParameterSpec("head.weight", table, None, model.init_std, cut=0))
        if model.head_bias:
            specs.append(ParameterSpec("head.bias", table[:1], None, cut=0))
    if model.init_scaling == "xavier":
        specs = [with_xavier(spec) for spec in specs]
    return {spec.name: spec for spec in specs}


def with_xavier(spec: ParameterSpec) -> ParameterSpec:
    """Return the spec with the standard deviation of Glorot & Bengio 2010 if it is a matrix applied
    to hidden states; for query, key and value divided by sqrt(2), as in fairseq."""
    owner, _, kind = spec.name.rpartition(".")
    if len(spec.shape) != 2 or kind != "weight" or owner in (*EMBEDDINGS, "head"):
        return spec
    gain = 0.5**0.5 if owner.endswith((".query", ".key", ".value")) else 1.0
    return replace(spec, std=gain * math.sqrt(2.0 / sum(spec.shape)))


def embedding_names(config: Config) -> tuple[str, ...]:
    """Return the names of the embeddings: of source and target sentences, or of tokens."""
    return EMBEDDINGS if config.encoder is not None else EMBEDDINGS[-1:]


def token_parameters(config: Config) -> list[ParameterSpec]:
    """Return the specs of the embeddings of tokens, with their learned positions."""
    model, specs = config.model, list[ParameterSpec]()
    assert model.vocab_size is not None
    hidden, std = model.hidden_size, model.init_std
    for name in embedding_names(config):
        if name == "embedding":
            table = (model.vocab_size, hidden)
            specs.append(ParameterSpec(f"{name}.weight", table, None, std, cut=0))
        elif config.separate_source:
            table = (model.source_vocab_size or model.vocab_size, hidden)
            specs.append(ParameterSpec(f"{name}.weight", table, None, std, cut=0))
        if model.positions == "learned":
            rows = model.max_positions or config.num_positions
            specs.append(ParameterSpec(f"{name}.positions", (rows, hidden), None, std))
    return specs


def patch_parameters(config: Config) -> list[ParameterSpec]:
    """Return the specs of the embedding of pictures: the projection of patches, with the values of
    a patch by channel, row and column; the class token; learned positions.

    Tensor-parallel ranks hold all of it, like norms.
    """
    task, model = config.task, config.model
    assert task is not None
    hidden, std = model.hidden_size, model.init_std
    specs = linear_parameters("patches", (hidden, task.pixels_per_patch), None, True, std)
    if task.has_class_token:
        specs.append(ParameterSpec(CLASS_TOKEN, (hidden,), None, std))
    if model.positions == "learned":
        shape = (config.num_positions, hidden)
        specs.append(ParameterSpec("embedding.positions", shape, None, std))
    return specs


def block_parameters(stack: Stack, block: int, depth: int) -> list[ParameterSpec]:
    """Return the parameters that live with one block.

    Args:
        depth: unrolled depth of the stack, which may scale initial values.
    """
    config = stack.config
    model = config.model
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    scaled = std = model.init_std
    if model.init_scaling == "depth":
        scaled /= math.sqrt((3 if stack.cross else 2) * depth)
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
        return linear_parameters(f"{prefix}{name}", shape, block, bias, std, cut, unit)

    own_norms, names = has_own_norms(config), norm_names(model, stack.cross)

    def norm(name: str) -> list[ParameterSpec]:
        exists = name in names and not own_norms
        return norm_parameters(model, prefix + name, block) if exists else []

    specs = []
    if block == injection_block(stack):
        biased = has_injection_bias(stack.recurrence)
        specs += linear("injection", hidden, 2 * hidden, biased, std)
    if config.halting is not None:
        read = hidden * (1 + config.halting.transition)
        specs += linear("halting.up", hidden, read, True, std)
        specs += linear("halting.down", 1, hidden, True, std)
    specs += norm("attention_norm")
    specs += attention_parameters(model, f"{prefix}attention", block, scaled)
    if not own_norms:
        specs += head_norm_parameters(model, f"{prefix}attention.", block)
    specs += norm("attention_output_norm")
    if stack.cross:
        specs += norm("cross_attention_norm")
        specs += attention_parameters(model, f"{prefix}cross_attention", block, scaled)
        specs += norm("cross_attention_output_norm")
    if config.temporal is not None:
        specs += norm_parameters(model, f"{prefix}memory_attention_norm", block)
        specs += norm_parameters(model, f"{prefix}memory_norm", block)
        specs += attention_parameters(model, f"{prefix}memory_attention", block, scaled)
    specs += norm("feed_forward_norm")
    if block == feed_forward_owner(stack, block):
        specs += feed_forward_parameters(model, f"{prefix}feed_forward", block, ffn, scaled)
    specs += norm("feed_forward_output_norm")
    if model.gate:
        assert model.gate_hidden_size is not None
        specs += linear("gate.up", model.gate_hidden_size, hidden, True, std, 0)
        specs += linear("gate.down", hidden, model.gate_hidden_size, True, std, 1)
    return specs


def linear_parameters(
    name: str,
    shape: tuple[int, int],
    block: int | None,
    bias: bool,
    std: float,
    cut: int | None = None,
    unit: int = 1,
) -> list[ParameterSpec]:
    """Return the specs of a matrix [out, in] and of its bias if it has one."""
    weight = ParameterSpec(f"{name}.weight", shape, block, std, cut=cut, unit=unit)
    if not bias:
        return [weight]
    along = 0 if cut == 0 else None  # A bias is cut with the outputs.
    return [weight, ParameterSpec(f"{name}.bias", shape[:1], block, cut=along, unit=unit)]


def attention_parameters(
    model: ModelConfig, name: str, block: int | None, output_std: float
) -> list[ParameterSpec]:
    """Return the specs of the four projections of an attention, without head norms."""
    hidden, head, std = model.hidden_size, model.head_dim, model.init_std
    queries, keys = model.num_heads * head, model.num_kv_heads * head
    biased, specs = biased_projections(model), []
    for layer, rows in (("query", queries), ("key", keys), ("value", keys)):
        bias = layer[0] in biased
        specs += linear_parameters(f"{name}.{layer}", (rows, hidden), block, bias, std, 0, head)
    shape = (hidden, queries)
    return specs + linear_parameters(
        f"{name}.output", shape, block, "o" in biased, output_std, 1, head
    )


def feed_forward_parameters(
    model: ModelConfig, name: str, block: int | None, ffn: int, output_std: float
) -> list[ParameterSpec]:
    """Return the specs of the matrices of a feed-forward of width ffn."""
    hidden, bias, specs = model.hidden_size, model.feed_forward_bias, []
    for layer in ("gate", "up") if model.gated else ("up",):
        shape = (ffn, hidden)
        specs += linear_parameters(f"{name}.{layer}", shape, block, bias, model.init_std, 0)
    shape = (hidden, ffn)
    return specs + linear_parameters(f"{name}.down", shape, block, bias, output_std, 1)


def temporal_parameters(config: Config) -> list[ParameterSpec]:
    """Return the specs of the temporal memory: initial slots, layers that write it, readout norm.

    Slots start as far apart as normed tokens are: each chunk updates all slots alike, so nearly
    equal slots would stay equal.
    """
    model, temporal = config.model, config.temporal
    if temporal is None:
        return []
    shape = (temporal.num_slots, model.hidden_size)
    std = 1.0 if temporal.initial_memory == "random" else 0.0
    specs = [ParameterSpec("temporal.memory", shape, None, std)]
    for layer in range(temporal.updates):
        name = f"temporal.updates.{layer}."
        specs += norm_parameters(model, f"{name}memory_norm", None)
        specs += norm_parameters(model, f"{name}input_norm", None)
        specs += attention_parameters(model, f"{name}attention", None, model.init_std)
        specs += norm_parameters(model, f"{name}feed_forward_norm", None)
        specs += feed_forward_parameters(
            model,
            f"{name}feed_forward",
            None,
            temporal.update_ffn_hidden_size,
            model.init_std,
        )
    if temporal.pooling is not None:
        specs += norm_parameters(model, "temporal.norm", None)
    return specs


def task_parameters(config: Config) -> list[ParameterSpec]:
    """Return the specs of a task's head and, if present, of its START and END tokens.

    The hidden layer is cut by its outputs and the classes by their inputs, like a feed-forward.
    """
    task, model = config.task, config.model
    assert task is not None and task.num_classes is not None
    hidden, std = model.hidden_size, model.init_std
    ends = ("task.start", "task.end") if task.augment else ()
    specs = [ParameterSpec(name, (hidden,), None, std) for name in ends]
    features = hidden * (4 if task.kind == "pair" else 1)
    size = head_width(config)
    if size:
        specs.append(ParameterSpec("task.hidden.weight", (size, features), None, std, cut=0))
        specs.append(ParameterSpec("task.hidden.bias", (size,), None, cut=0))
    logits = 1 if task.num_classes == 2 else task.num_classes
    specs.append(ParameterSpec("task.output.weight", (logits, size or features), None, std, cut=1))
    # Every tensor-parallel rank adds its share of the bias to its share of the sum.
    specs.append(ParameterSpec("task.output.bias", (logits,), None, partial=True))
    return specs


def head_width(config: Config) -> int:
    """Return the width of the hidden layer of a task's head; 0: the head is linear."""
    assert config.task is not None
    if config.task.head_size is not None:
        return config.task.head_size
    return 0 if config.reads_images else config.model.hidden_size


def feed_forward_owner(stack: Stack, block: int) -> int:
    """Return the block whose feed-forward a block uses."""
    return stack.first if stack.config.model.shared_feed_forward else block


def loop_parameters(stack: Stack, block: list[ParameterSpec], loop: int) -> list[ParameterSpec]:
    """Return the parameters that one loop of a block has of its own, derived from the block's
    parameters: deltas of its matrices, level signals, norms, residual scales."""
    owner, config = block[0].block, stack.config
    prefix = f"blocks.{owner}.loops.{loop}."
    specs = adapter_parameters(config, block, prefix) + signal_parameters(config, block, prefix)
    if has_own_norms(config):
        for norm in norm_names(config.model, stack.cross):
            specs += norm_parameters(config.model, prefix + norm, owner)
        specs += head_norm_parameters(config.model, prefix, owner)
    shape = (config.model.hidden_size,)
    specs += [
        ParameterSpec(f"{prefix}{name}.weight", shape, owner, mean=1.0)
        for name in scale_names(config.model, stack.cross)
    ]
    return [replace(spec, loop=loop) for spec in specs]


def adapter_parameters(
    config: Config, block: list[ParameterSpec], prefix: str
) -> list[ParameterSpec]:
    """Return the adapters A [r, in] and B [out, r] of each targeted matrix, and deltas of biases
    [out].

    A starts with a deviation that preserves the scale of its input, B and biases at zero.
    """
    adapters, targets = config.adapters, adapter_targets(config)
    if adapters is None:
        return []
    owner, specs = block[0].block, []
    for matrix in block:
        _, part, target, kind = f".{matrix.name}".rsplit(".", 3)
        if part not in ("attention", "feed_forward") or target not in targets:
            continue  # All loops share the reading of memory and the gate.
        if kind == "bias":
            added = replace(matrix, name=f"{prefix}{target}.lora_bias")
            specs += [added] if adapters.biases else []
            continue
        (rows, columns), unit = matrix.shape, matrix.unit
        rank = min(adapters.rank, rows, columns)
        # Cut like the matrix: B by its outputs, or A by its inputs.
        a = ParameterSpec(f"{prefix}{target}.lora_a", (rank, columns), owner, columns**-0.5)
        b = ParameterSpec(f"{prefix}{target}.lora_b", (rows, rank), owner)
        if matrix.cut == 0:
            b = replace(b, cut=0, unit=unit)
        elif matrix.cut == 1:
            a = replace(a, cut=1, unit=unit)
        specs += [a, b]
    return specs


def signal_parameters(
    config: Config, block: list[ParameterSpec], prefix: str
) -> list[ParameterSpec]:
    """Return the factors of a level's signals a b x: b [r, in], and a [out, r], which is the A of
    the paper transposed and starts at zero."""
    ring, hidden, owner = config.recurrence, config.model.hidden_size, block[0].block
    if not isinstance(ring, Ring):
        return []
    std = SIGNAL_STD if ring.signal_init == "authors" else hidden**-0.5
    matrices = {spec.name.removeprefix(f"blocks.{owner}."): spec for spec in block}
    specs = []
    for name in signal_names(config):
        rank = ring.feed_forward_rank if name == "feed_forward" else ring.level_rank
        b = ParameterSpec(f"{prefix}signal_{name}.b", (rank, hidden), owner, std)
        a = ParameterSpec(f"{prefix}signal_{name}.a", (hidden, rank), owner)
        if name != "feed_forward":  # Cut with the outputs of the matrix, which may be fewer.
            matrix = matrices[f"attention.{name}.weight"]
            a = replace(a, shape=(matrix.shape[0], rank), cut=0, unit=matrix.unit)
        specs += [b, a]
    return specs


def signal_names(config: Config) -> tuple[str, ...]:
    """Return the names of the level signals that every loop has."""
    ring = config.recurrence
    if not isinstance(ring, Ring):
        return ()
    of_attention = SIGNALS[:-1] if ring.level_rank else ()
    return (*of_attention, *(SIGNALS[-1:] if ring.feed_forward_rank else ()))


def adapter_targets(config: Config) -> tuple[str, ...]:
    """Return the linear layers that have an adapter in every loop."""
    if config.adapters is None:
        return ()
    return config.adapters.targets or tuple(
        target for target in get_args(AdapterTarget) if target != "gate" or config.model.gated
    )


def biased_targets(config: Config) -> tuple[str, ...]:
    """Return the adapted linear layers that have a bias."""
    initials = biased_projections(config.model) + "gud" * config.model.feed_forward_bias
    return tuple(target for target in adapter_targets(config) if target[0] in initials)


def has_own_norms(config: Config) -> bool:
    """Return True if every loop has its own norms in place of the block's."""
    adapted = config.adapters is not None and config.adapters.norms
    return adapted or isinstance(config.recurrence, Ring)


def norm_names(model: ModelConfig, cross: bool = False) -> tuple[str, ...]:
    """Return the names of a block's norms; `cross`: of one that attends to an encoder."""
    branches = ("attention", *(("cross_attention",) if cross else ()), "feed_forward")
    inputs = tuple(f"{branch}_norm" for branch in branches)
    outputs = tuple(f"{branch}_output_norm" for branch in branches)
    return {"sandwich": inputs + outputs, "peri": inputs + outputs, "output": outputs}.get(
        model.norm_position, inputs
    )


def scale_names(model: ModelConfig, cross: bool = False) -> tuple[str, ...]:
    """Return the names of the residual scales of every use of a block; `cross`: of one that attends
    to an encoder."""
    if model.residual != "admin":
        return ()
    return (SCALES[0], CROSS_SCALE, SCALES[1]) if cross else SCALES


def count_own_loops(stack: Stack) -> dict[int, int]:
    """Return the number of loops with their own parameters by block; empty if all loops are
    alike."""
    if not stack.config.of_loops:
        return {}
    uses = count_most_uses(stack.recurrence)
    return {stack.first + block: count for block, count in uses.items()}


def count_most_uses(recurrence: RecurrenceConfig) -> dict[int, int]:
    """Return the largest number of uses of each block at any optimizer step."""
    most = recurrence.most_loops if isinstance(recurrence, Looped) else None
    return count_uses(layer_map(recurrence, most))


def injection_block(stack: Stack) -> int | None:
    """Return the block that owns the learned injection adapter: the first core block, or None."""
    recurrence = stack.recurrence
    if isinstance(recurrence, Loop) and recurrence.injection == "linear":
        return stack.first + recurrence.prelude
    return None


def has_injection_bias(recurrence: RecurrenceConfig) -> bool:
    """Return True if the learned injection adapter has a bias."""
    return isinstance(recurrence, Loop) and recurrence.injection_bias


def biased_projections(model: ModelConfig) -> str:
    """Return initials of the attention projections (query, key, value, output) that have a bias."""
    return {"none": "", "qk": "qk", "qkv": "qkv", "all": "qkvo"}[model.attention_bias]


def norm_parameters(model: ModelConfig, name: str, block: int | None) -> list[ParameterSpec]:
    """Return the specs of a norm: a gain, and for LayerNorm a bias."""
    specs = [ParameterSpec(name + ".weight", (model.hidden_size,), block, mean=1.0)]
    if model.norm == "layer":
        specs.append(ParameterSpec(name + ".bias", (model.hidden_size,), block))
    return specs


def head_norm_parameters(model: ModelConfig, prefix: str, block: int | None) -> list[ParameterSpec]:
    """Return the gains of the query and key norms; empty without such norms.

    Norms over all heads together are cut like the heads.
    """
    if not model.qk_norm:
        return []
    head, heads = model.head_dim, (model.num_heads, model.num_kv_heads)
    if model.qk_norm_over == "all":
        return [
            ParameterSpec(f"{prefix}{name}.weight", (n * head,), block, mean=1.0, cut=0, unit=head)
            for name, n in zip(HEAD_NORMS, heads, strict=True)
        ]
    return [
        ParameterSpec(f"{prefix}{name}.weight", (head,), block, mean=1.0, partial=True)
        for name in HEAD_NORMS
    ]


def is_with_embedding(name: str) -> bool:
    """Return True if a parameter of no block lives with the embedding, False if with the head."""
    ends = ("task.start", "task.end", CLASS_TOKEN)
    return name.partition(".")[0] in (*EMBEDDINGS, "patches") or name in ends


def is_embedding(name: str) -> bool:
    """Return True if the field's non-embedding count excludes this parameter."""
    return name.partition(".")[0] in (*EMBEDDINGS, "head", "patches", CLASS_TOKEN)


def check_patterns(optimizer: OptimizerConfig, names: Iterable[str]) -> None:
    """Reject patterns that match no parameter, and a run that would train nothing.

    Raises:
        ConfigError: a pattern matches nothing, or every parameter is frozen.
    """
    names = list(names)
    patterns = {
        "no_decay": optimizer.no_decay,
        "lr_multipliers": tuple(optimizer.lr_multipliers),
        "frozen": optimizer.frozen,
        "muon.exclude": optimizer.muon.exclude if optimizer.muon else (),
    }
    example = ", ".join(names[:3])
    idle = [
        f"optimizer.{field}: {pattern[:80]!r} matches no parameter (of names such as {example}); "
        "correct or remove it"
        for field, values in patterns.items()
        for pattern in values
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if all(is_frozen(optimizer, name) for name in names):
        idle.append(
            "optimizer.frozen: every parameter is frozen, so nothing would be trained; "
            "remove some patterns"
        )
    if idle:
        raise ConfigError("\n".join(idle))


def is_frozen(optimizer: OptimizerConfig, name: str) -> bool:
    """Return True if a pattern freezes the parameter."""
    return any(fnmatchcase(name, pattern) for pattern in optimizer.frozen)


def uses_muon(optimizer: OptimizerConfig, name: str, ndim: int) -> bool:
    """Return True if Muon trains the parameter: matrices of blocks, except excluded patterns."""
    if optimizer.muon is None or ndim != 2 or not name.startswith("blocks."):
        return False
    return not any(fnmatchcase(name, pattern) for pattern in optimizer.muon.exclude)
