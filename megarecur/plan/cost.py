"""What a run costs, from its config alone: parameters, executed FLOPs, memory, tokens.

Every function is pure. `config.model.vocab_size` must be resolved (`describe.resolve_vocab_size`).
Sizes are in parameters, FLOPs per token, bytes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, fields

from megarecur.config.schema import Config, ModelConfig, ParallelConfig
from megarecur.recurrence.depth import count_depths
from megarecur.recurrence.inventory import (
    ParameterSpec,
    build_inventory,
    feed_forward_owner,
    injection_block,
    is_embedding,
    is_frozen,
    signal_names,
    uses_muon,
)
from megarecur.recurrence.layer_map import LayerMap, Step, from_order
from megarecur.recurrence.schemes import build_map

# ----------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Elements of parameters; `non_embedding` leaves out embedding, positions and head."""

    total: int
    non_embedding: int


def count_parameters(config: Config) -> ParameterCount:
    """Unique parameters: what is stored and trained."""
    return _count(list(build_inventory(config).values()))


def count_adapters(config: Config) -> ParameterCount:
    """Those of them that belong to one loop of a block: adapters, norms, level signals."""
    return _count([spec for spec in build_inventory(config).values() if spec.loop is not None])


def count_unrolled_parameters(config: Config, steps: LayerMap) -> ParameterCount:
    """Parameters of the untied model that executes the same steps: blocks counted at each use."""
    shared = [s for s in build_inventory(config).values() if s.block is None]
    blocks = _by_block(config)
    return _count(shared + [s for step in steps for s in _used(blocks[step.block], step)])


def _count(specs: list[ParameterSpec]) -> ParameterCount:
    total = sum(spec.size for spec in specs)
    return ParameterCount(total, total - sum(s.size for s in specs if is_embedding(s.name)))


def _used(specs: list[ParameterSpec], step: Step) -> list[ParameterSpec]:
    """Of the parameters that a block uses, those that a step of the map does."""
    return [spec for spec in specs if spec.loop in (None, step.loop_index)]


def _by_block(config: Config) -> dict[int, list[ParameterSpec]]:
    """What each block uses, a feed-forward that another one owns included."""
    blocks: dict[int, list[ParameterSpec]] = defaultdict(list)
    for spec in build_inventory(config).values():
        if spec.block is not None:
            blocks[spec.block].append(spec)
    for block, specs in blocks.items():
        owner = feed_forward_owner(config.model, block)
        if owner != block:
            specs += [
                s for s in blocks[owner] if s.name.startswith(f"blocks.{owner}.feed_forward.")
            ]
    return blocks


# ---------------------------------------------------------------------------------------- FLOPs


@dataclass(frozen=True, slots=True)
class FlopEstimate:
    """FLOPs per token, averaged over a sequence of data.seq_length tokens.

    A product of matrices counts 2 per multiply-add. Attention counts all S x S scores, causal or
    not, as the field does, and all of them in blocks that see a window, as it computes them; norms,
    activations and look-ups are left out.
    """

    forward: int
    train: int
    """Forward and backward: 3 x forward, 1 x for steps without gradient. MFU is by this number."""
    forward_only: int
    """The part of `train` in steps without gradient."""
    recompute: int
    """Forward passes repeated by activation recompute; not part of `train`."""

    @property
    def hardware(self) -> int:
        """Everything the hardware does."""
        return self.train + self.recompute


def count_flops(config: Config, steps: LayerMap) -> FlopEstimate:
    """Executed FLOPs per token (recurrence.md, section 1.2)."""
    forward = train = forward_only = repeated = 0
    mixing = count_halting_flops(config)  # Not recomputed.
    for step, flops in zip(steps, count_step_flops(config, steps), strict=True):
        forward += flops
        train += 3 * flops if step.grad else flops
        forward_only += 0 if step.grad else flops
        repeated += flops - mixing if step.grad and config.train.recompute else 0
    written = count_memory_flops(config)
    forward, train = forward + written, train + 3 * written
    exits = sum(step.exit for step in steps[:-1])
    head = count_head_flops(config) * (1 + exits)
    train += 3 * head
    repeated += count_head_flops(config) * exits  # Their logits are made again in backward.
    return FlopEstimate(forward + head, train, forward_only, repeated)


def expect_flops(config: Config) -> FlopEstimate:
    """Executed FLOPs per token, averaged over the optimizer steps of the run."""
    shares = count_depths(config.recurrence, config.seed, config.train.steps)
    each = [
        (share, count_flops(config, build_map(config, depth))) for depth, share in shares.items()
    ]

    totals = (
        sum(share * getattr(flops, field.name) for share, flops in each)
        for field in fields(FlopEstimate)
    )
    return FlopEstimate(*map(round, totals))


def deepest_map(config: Config) -> LayerMap:
    """The map of the run that keeps the most activations."""
    shares = count_depths(config.recurrence, config.seed, config.train.steps)
    maps = (build_map(config, depth) for depth in shares)
    return max(maps, key=lambda steps: (sum(step.grad for step in steps), len(steps)))


def count_step_flops(config: Config, steps: LayerMap) -> list[int]:
    """Forward FLOPs per token of each step of the map, in order.

    2 per matrix parameter, 4 S heads head_dim for scores and their sum over values; the matrix of
    an injection counts where the step reads what it injects. Keys and values of a temporal memory
    are made once a chunk.
    """
    blocks, scores, flops = _by_block(config), count_score_flops(config), []
    slots = count_slots_per_token(config)
    for step in steps:
        sizes = [
            spec.size * (slots if spec.name.endswith(SLOT_PRODUCTS) else 1)
            for spec in _used(blocks[step.block], step)
            if len(spec.shape) == 2
            and (step.reads or ".injection." not in spec.name)
            and ".halting." not in spec.name
        ]
        flops.append(round(2 * sum(sizes)) + scores + count_halting_flops(config))
    return flops


SLOT_PRODUCTS = ("memory_attention.key.weight", "memory_attention.value.weight")
"""Matrices of a block that a temporal memory goes through, not the tokens."""


def count_score_flops(config: Config) -> int:
    """Forward FLOPs per token of one step's attention scores and the sum over their values; with a
    temporal memory, of those inside the chunks and of those of its slots."""
    seen, temporal = float(config.num_positions), config.temporal
    if temporal is not None:
        whole, rest = divmod(config.num_positions, temporal.chunk_length)
        seen = (whole * temporal.chunk_length**2 + rest**2) / config.num_positions
        seen += temporal.num_slots
    return round(4 * seen * config.model.num_heads * config.model.head_dim)


def count_slots_per_token(config: Config) -> float:
    """Slots of the temporal memory over all chunks of a sequence, by its tokens; 0 without one."""
    temporal, length = config.temporal, config.num_positions
    if temporal is None:
        return 0.0
    return -(-length // temporal.chunk_length) * temporal.num_slots / length


def count_memory_flops(config: Config) -> int:
    """Forward FLOPs per token of the layers that write the temporal memory; 0 without one.

    Keys and values are of the tokens, everything else is of the slots, once a chunk.
    """
    temporal, model = config.temporal, config.model
    if temporal is None:
        return 0
    slots, size = count_slots_per_token(config), 0.0
    for spec in build_inventory(config).values():
        if spec.name.startswith("temporal.updates.") and len(spec.shape) == 2:
            of_tokens = spec.name.endswith(("attention.key.weight", "attention.value.weight"))
            size += spec.size * (1.0 if of_tokens else slots)
    scores = 4 * temporal.num_slots * model.num_heads * model.head_dim
    return round(2 * size) + temporal.updates * scores


def count_halting_flops(config: Config) -> int:
    """Forward FLOPs per token of one application of the halting head, to every token; where means
    over whole documents decide, to every sequence."""
    if config.halting is None:
        return 0
    sizes = [
        spec.size
        for spec in build_inventory(config).values()
        if ".halting." in spec.name and len(spec.shape) == 2
    ]
    once = config.halting.mode == "global" and not config.model.causal
    return 2 * sum(sizes) // (config.num_positions if once else 1)


def count_head_flops(config: Config) -> int:
    """Forward FLOPs per token of one application of the head; that of a task, which looks at a
    sequence once, is shared out over its tokens."""
    if config.classifies:
        own = [s for s in build_inventory(config).values() if s.name.startswith("task.")]
        flops = 2 * sum(spec.size for spec in own if len(spec.shape) == 2)
        assert config.task is not None
        return flops if config.task.kind == "token" else flops // config.tokens_per_sample
    return 2 * _vocab_size(config) * config.model.hidden_size


def dense_twin(steps: LayerMap) -> LayerMap:
    """The map that runs each of the same blocks once."""
    return from_order(sorted({step.block for step in steps}))


# --------------------------------------------------------------------------------------- memory


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one process, by kind. Activations are those of one micro batch."""

    parameters: int
    gradients: int
    moments: int
    """AdamW's two, Muon's one, in the parameters' dtype."""
    copies: int
    """Matrices in the compute dtype; none where that is the parameters' own."""
    activations_kept: int
    activations_recomputed: int
    logits: int
    mask: int
    """Of documents and ALiBi, materialised for every pair of positions of a micro batch."""
    recompute: bool
    """Whether the config recomputes; decides which activations `total` counts."""
    gathered: int = 0
    """Whole parameters during a pass, where ZeRO 3 shards them: those of a stack of shared blocks
    are gathered together, once for all uses."""

    @property
    def activations(self) -> int:
        """The activations of the config as it stands."""
        return self.activations_recomputed if self.recompute else self.activations_kept

    @property
    def state(self) -> int:
        """What stays between optimizer steps, gradients included."""
        return self.parameters + self.gradients + self.moments + self.copies

    @property
    def total(self) -> int:
        """The peak, to first order: allocator and libraries come on top."""
        return self.state + self.gathered + self.activations + self.logits + self.mask


def estimate_memory(config: Config, steps: LayerMap, dp: int = 1) -> MemoryEstimate:
    """Memory of the largest process of one of `dp` replicas.

    Tensor parallelism divides matrices, heads and vocabulary, ZeRO what its stage shares out of the
    rest. Stages 2 and 3 also hold, until the last use of a block, the gradients of a pass that are
    not reduced yet; offloaded moments are on the CPU.
    """
    stage, offload = config.parallel.zero_stage, config.parallel.offload_optimizer
    tp = config.parallel.tensor
    parts = [dp if stage >= first else 1 for first in range(4)]
    specs = list(build_inventory(config).values())
    element, wide = element_bytes(config), parameter_bytes(config)

    def held(some: Iterable[ParameterSpec]) -> int:
        """Elements on the last tensor-parallel rank, whose shards are the largest."""
        return sum(math.prod(spec.part(tp - 1, tp)[1]) for spec in some)

    size = held(specs)
    moving = [spec for spec in specs if not is_frozen(config.optimizer, spec.name)]
    trained = held(moving)
    muon = held(s for s in moving if uses_muon(config.optimizer, s.name, len(s.shape)))
    matrices = held(s for s in specs if has_copy(s))
    tokens = config.train.micro_batch_size * config.tokens_per_sample
    kept, recomputed = estimate_activations(config, steps)
    # Logits, their form in the wide dtype, and the exponentials while they are summed. Of early
    # exits those of one are there at a time, beside the last loop's; a teacher's are there too.
    logit_bytes = element + wide + (wide if element < wide else 0)
    logit_bytes += element if config.model.logit_softcap is not None else 0  # tanh's output
    logit_bytes += element * sum(beside is not None for beside in (config.exits, config.distill))
    return MemoryEstimate(
        parameters=-(-size // parts[3]) * wide,
        gradients=-(-trained // parts[2]) * wide,
        moments=0 if offload else -(-(2 * trained - muon) // parts[1]) * wide,
        copies=matrices * element if element < wide else 0,
        activations_kept=tokens * kept,
        activations_recomputed=tokens * recomputed,
        logits=count_logits(config, tokens) * logit_bytes,
        mask=tokens * count_mask_elements(config) * element,
        recompute=config.train.recompute,
        gathered=size * wide if parts[3] > 1 else 0,
    )


def count_logits(config: Config, tokens: int) -> int:
    """Logits of so many tokens on one tensor-parallel rank."""
    if not config.classifies:
        return tokens * -(-_vocab_size(config) // config.parallel.tensor)
    task = config.task
    assert task is not None and task.num_classes is not None
    return task.num_classes * (
        tokens if task.kind == "token" else tokens // config.tokens_per_sample
    )


def count_state_bytes(config: Config, specs: Iterable[ParameterSpec]) -> int:
    """Bytes of parameters with their gradients, moments and copies, without ZeRO.

    On the last tensor-parallel rank, whose shards are the largest.
    """
    wide, element, tp = parameter_bytes(config), element_bytes(config), config.parallel.tensor
    size = 0
    for spec in specs:
        per_element = wide
        if not is_frozen(config.optimizer, spec.name):
            per_element += 3 * wide - 2 * wide * config.parallel.offload_optimizer
        if element < wide and has_copy(spec):
            per_element += element
        size += per_element * math.prod(spec.part(tp - 1, tp)[1])
    return size


def has_copy(spec: ParameterSpec) -> bool:
    """Whether products take it, so that there is a copy in their dtype."""
    return len(spec.shape) == 2 and spec.name not in ("embedding.positions", "temporal.memory")


def count_span(config: Config) -> int:
    """Tokens that attention may see at most: a sequence, or a chunk of it."""
    return config.temporal.chunk_length if config.temporal else config.num_positions


def has_documents(config: Config) -> bool:
    """Whether a sample may be of several documents, or have padding."""
    return config.data.mask_documents or config.task is not None


def count_mask_heads(config: Config) -> int:
    """Heads that attention's mask differs for: none without one, as plain causality needs none.
    Blocks that see a window have a mask beside that of the others."""
    model = config.model
    heads = int(has_documents(config))
    if model.positions == "alibi":
        heads = model.num_heads // config.parallel.tensor
    slides = model.sliding_window is not None and model.sliding_window < count_span(config)
    return heads + max(heads, 1) if slides else heads


def count_mask_elements(config: Config) -> int:
    """Of all masks, per token; where documents are masked, of reading and writing a temporal memory
    too, beside which the initial one lies."""
    elements = count_span(config) * count_mask_heads(config)
    if config.temporal is not None and has_documents(config):
        elements += 2 * config.temporal.num_slots + 1
    return elements


def estimate_activations(config: Config, steps: LayerMap) -> tuple[int, int]:
    """Bytes per token kept for backward: (everything, with recompute of each step).

    Recompute keeps the input of every step and, at the peak, everything of one step. Values that
    later steps read are kept in both. With tensor parallelism: those of one of its ranks.
    """
    ends = 2 * count_stream_bytes(config)  # input and output of the final norm
    ends += count_memory_bytes(config)
    kept = count_kept_bytes(config, steps, recompute=False) + ends
    if not any(step.grad for step in steps):
        return kept, kept
    recomputed = count_kept_bytes(config, steps, recompute=True) + ends
    share = count_span(config) / config.num_positions  # One chunk at a time is made again.
    return kept, recomputed + round(count_step_bytes(config) * share)


def count_stream_bytes(config: Config) -> int:
    """Bytes per token of the residual stream on one tensor-parallel rank."""
    parallel = config.parallel
    shares = parallel.tensor if parallel.sequence_parallel else 1
    return config.model.hidden_size * element_bytes(config) // shares


def count_kept_bytes(config: Config, steps: LayerMap, recompute: bool) -> int:
    """Bytes per token that these steps keep from their forward until their backward pass: all that
    it needs, or with recompute the inputs of the steps. Final norm and head are left out."""
    stream = count_stream_bytes(config)
    graded = [step for step in steps if step.grad]
    mixed = count_mixture_bytes(config) * len(graded)
    written = stream * sum(len(step.writes) for step in steps)
    if recompute:
        return stream * len(graded) + written + mixed
    pair = 2 * stream if has_injection(config) else 0
    joined = pair * sum(bool(step.reads) for step in graded)
    return (count_step_bytes(config) - pair) * len(graded) + joined + written + mixed


def count_mixture_bytes(config: Config) -> int:
    """Bytes per token that one step of halting keeps beside the block, whether the block recomputes
    or not: the state that it offers, what the head read and made, and of token-level halting the
    mixture that attention reads."""
    halting = config.halting
    if halting is None:
        return 0
    wide, element = max(4, element_bytes(config)), element_bytes(config)
    kept = wide * (1 if element == wide else 2)
    if halting.mode == "token" or config.model.causal:
        own = 0 if halting.mode == "token" and not halting.transition else 1 + halting.transition
        kept += element * (own + 2)
    if halting.mode == "token" and not config.train.recompute:
        kept += 2 * element
    return kept * config.model.hidden_size


def count_step_bytes(config: Config) -> int:
    """Bytes per token that one step keeps at most, what is injected included."""
    model, parallel = config.model, config.parallel
    kept = count_kept_elements(model, count_span(config), parallel) + count_rank(config)
    if "feed_forward" in signal_names(config):  # The sum that enters, beside the stream.
        kept += model.hidden_size // (parallel.tensor if parallel.sequence_parallel else 1)
    kept = (kept + count_read_elements(config)) * element_bytes(config)
    scores = 4 * model.num_heads // parallel.tensor  # logsumexp of the scores, fp32
    scores *= 2 if config.temporal is not None else 1
    return kept + scores + (2 * count_stream_bytes(config) if has_injection(config) else 0)


def count_deferred_bytes(config: Config, steps: LayerMap) -> int:
    """Bytes per token between the backward pass of these steps' inputs and that of their weights:
    what went into every product, and the gradient of what came out. The head is left out."""
    model, tp = config.model, config.parallel.tensor
    queries = model.num_heads // tp * model.head_dim
    keys = max(model.num_kv_heads // tp, 1) * model.head_dim
    ffn = model.ffn_hidden_size // tp
    entered = 2 * model.hidden_size + queries + ffn
    left = queries + 2 * keys + 2 * model.hidden_size
    left += (2 if model.gated else 1) * ffn
    if model.gate_hidden_size is not None:
        entered += model.hidden_size + model.gate_hidden_size // tp
        left += model.hidden_size + model.gate_hidden_size // tp
    graded = [step for step in steps if step.grad]
    # Of an adapter, what A gave and the gradient of that.
    each = entered + left + 2 * count_rank(config)
    injections = sum(bool(step.reads) for step in graded) if has_injection(config) else 0
    elements = each * len(graded) + 3 * model.hidden_size * injections
    return elements * element_bytes(config)


def count_kept_elements(model: ModelConfig, seq_length: int, parallel: ParallelConfig) -> int:
    """Elements per token that one step keeps for backward on one tensor-parallel rank, attention
    scores not materialised."""
    tp = parallel.tensor
    queries = model.num_heads // tp * model.head_dim
    keys = max(model.num_kv_heads // tp, 1) * model.head_dim
    inputs = 2  # of two norms; their outputs are gathered where sequences are cut
    if model.norm_position in ("sandwich", "peri"):
        inputs += 2  # what the output norms normalise; their own outputs are only added
    if model.parallel_residual:
        inputs -= 1  # both have the same
    norms = 2 + inputs / (tp if parallel.sequence_parallel else 1)
    attention = 2 * queries + 2 * keys  # q, k, v and the output's input
    if model.qk_norm:
        attention += queries + keys  # before their norms
    feed_forward = (3 if model.gated else 2) * model.ffn_hidden_size // tp
    if model.gate_hidden_size is not None:  # Around its GELU; the gate, and what it lets through.
        feed_forward += 2 * model.gate_hidden_size // tp + 2 * model.hidden_size
    heads = model.num_heads // tp
    # The math path: weights, and what dropout makes of them; before them tanh's output.
    matrices = 2 if model.attention_dropout else 0
    if model.attention_softcap is not None:
        matrices = max(matrices, 1) + 1
    scores = matrices * heads * seq_length
    return round(norms * model.hidden_size) + attention + feed_forward + scores


def count_read_elements(config: Config) -> int:
    """Elements per token that one step keeps for backward of reading the temporal memory: what is
    normed and what comes of it, queries and what they read; of the slots norms, keys, values."""
    model, tp = config.model, config.parallel.tensor
    if config.temporal is None:
        return 0
    queries = model.num_heads // tp * model.head_dim
    keys = max(model.num_kv_heads // tp, 1) * model.head_dim
    matrices = 2 * config.temporal.num_slots * model.num_heads // tp * bool(model.attention_dropout)
    slots = count_slots_per_token(config) * (model.hidden_size + 2 * keys)
    return round(2 * model.hidden_size + 2 * queries + matrices + slots)


def count_memory_bytes(config: Config) -> int:
    """Bytes per token that writing the temporal memory keeps for backward; 0 without one."""
    temporal, model, tp = config.temporal, config.model, config.parallel.tensor
    if temporal is None:
        return 0
    hidden, queries = model.hidden_size, model.num_heads // tp * model.head_dim
    keys = max(model.num_kv_heads // tp, 1) * model.head_dim
    feed_forward = (3 if model.gated else 2) * temporal.update_ffn_hidden_size // tp
    of_slot = 4 * hidden + 2 * queries + feed_forward
    each = hidden + 2 * keys + count_slots_per_token(config) * of_slot
    return round(temporal.updates * each * element_bytes(config))


def count_rank(config: Config) -> int:
    """Channels between the factors of all adapters and level signals of one step of the map."""
    # The factors that take what enters.
    pairs = (
        spec
        for spec in build_inventory(config).values()
        if spec.name.endswith(".lora_a") or (".signal_" in spec.name and spec.name.endswith(".b"))
    )
    first = next(pairs, None)
    if first is None:
        return 0
    same = [s for s in pairs if (s.block, s.loop) == (first.block, first.loop)]
    return sum(spec.shape[0] for spec in (first, *same))


def has_injection(config: Config) -> bool:
    """Whether what the map reads goes through a learned matrix."""
    return injection_block(config.recurrence) is not None


# --------------------------------------------------------------------------------------- tokens


def count_tokens_per_step(config: Config) -> int:
    """Tokens of one optimizer step over all processes."""
    return config.train.global_batch_size * config.tokens_per_sample


def count_total_tokens(config: Config) -> int:
    """Tokens of the whole run."""
    return config.train.steps * count_tokens_per_step(config)


def _vocab_size(config: Config) -> int:
    assert config.model.vocab_size is not None, "resolve the vocabulary first"
    return config.model.vocab_size


def parameter_bytes(config: Config) -> int:
    """Bytes of an element of parameters, gradients and moments."""
    return 8 if config.train.precision == "fp64" else 4


def element_bytes(config: Config) -> int:
    """Bytes of an element of activations."""
    return {"fp64": 8, "fp32": 4, "bf16": 2}[config.train.precision]
