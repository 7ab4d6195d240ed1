"""Estimate what a run costs from its config alone: parameters, executed FLOPs, memory, tokens.

Every function is pure. `config.model.vocab_size` must be resolved (`describe.resolve_vocab_size`),
except that of a model of pictures, which has none. A token is a position: of pictures, a patch.
Sizes are in parameters, FLOPs per token, bytes.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import NamedTuple

from megarecur.config.model import ModelConfig
from megarecur.config.parallel import ParallelConfig
from megarecur.config.run import Config
from megarecur.config.train import Recompute
from megarecur.errors import ConfigError
from megarecur.recurrence.depth import count_depths
from megarecur.recurrence.inventory import (
    ParameterSpec,
    block_parameters,
    build_inventory,
    count_own_loops,
    feed_forward_owner,
    injection_block,
    is_embedding,
    is_frozen,
    loop_parameters,
    signal_names,
    uses_muon,
)
from megarecur.recurrence.layer_map import TARGET, LayerMap, Step, from_order
from megarecur.recurrence.schemes import build_map
from megarecur.recurrence.stacks import Stack, list_stacks, stack_of

# ----------------------------------------------------------------------------------- parameters


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Numbers of parameters; `non_embedding` excludes embedding, positions and head."""

    total: int
    non_embedding: int


def count_parameters(config: Config) -> ParameterCount:
    """Count unique parameters: those stored and trained."""
    return _count(list(build_inventory(config).values()))


def count_adapters(config: Config) -> ParameterCount:
    """Count the parameters that belong to one loop of a block: adapters, norms, level signals."""
    return _count([spec for spec in build_inventory(config).values() if spec.loop is not None])


def count_unrolled_parameters(config: Config, steps: LayerMap) -> ParameterCount:
    """Count the parameters of the untied model that executes the same steps: blocks at each use."""
    shared = [s for s in build_inventory(config).values() if s.block is None]
    blocks = _by_block(config)
    return _count(shared + [s for step in steps for s in _used(blocks, step)])


def _count(specs: list[ParameterSpec]) -> ParameterCount:
    total = sum(spec.size for spec in specs)
    return ParameterCount(total, total - sum(s.size for s in specs if is_embedding(s.name)))


MOST_PARAMETERS, MOST_BYTES = 10**14, 10**14
"""Upper limits of a model, and of one process's memory for a micro batch."""
BlockSpecs = dict[int, dict[int | None, list[ParameterSpec]]]
"""Parameters by block and by loop; loop None holds those of all loops."""


def _used(blocks: BlockSpecs, step: Step) -> list[ParameterSpec]:
    """Return the parameters of a block that a step of the map uses."""
    own = blocks[step.block]
    return own[None] + own[step.loop_index]


def _by_block(config: Config) -> BlockSpecs:
    """Return the parameters each block uses, including a feed-forward that another block owns."""
    blocks: BlockSpecs = defaultdict(lambda: defaultdict(list))
    for spec in build_inventory(config).values():
        if spec.block is not None:
            blocks[spec.block][spec.loop].append(spec)
    for block, specs in blocks.items():
        owner = feed_forward_owner(stack_of(config, block), block)
        if owner != block:
            beginning = f"blocks.{owner}.feed_forward."
            specs[None] += [s for s in blocks[owner][None] if s.name.startswith(beginning)]
    return blocks


# ---------------------------------------------------------------------------------------- FLOPs


@dataclass(frozen=True, slots=True)
class FlopEstimate:
    """FLOPs per token, averaged over a sequence of data.seq_length tokens.

    A product of matrices counts 2 per multiply-add. Attention counts the pairs of query and key
    that causality, documents and windows leave (`Seen`), not S x S as is usual, and not those that
    a backend computes in vain or again in backward. Norms, activations and look-ups are excluded.
    """

    forward: int
    train: int
    """Forward and backward: 3 x forward, 1 x for steps without gradient. MFU is computed from
    it."""
    forward_only: int
    """The part of `train` spent in steps without gradient."""
    recompute: int
    """Forward passes repeated by activation recompute, not part of `train`."""

    @property
    def hardware(self) -> int:
        """All FLOPs that the hardware executes."""
        return self.train + self.recompute


def count_flops(config: Config, steps: LayerMap, seen: Seen | None = None) -> FlopEstimate:
    """Return executed FLOPs per token (recurrence.md, section 1.2); of an encoder-decoder, per
    target token.

    Args:
        seen: keys that queries need; None: those of samples that are one document each.
    """
    forward = train = forward_only = repeated = 0
    views = {stack.name: stack.config for stack in list_stacks(config)}
    for step, flops in zip(steps, count_step_flops(config, steps, seen), strict=True):
        forward += flops
        train += 3 * flops if step.grad else flops
        forward_only += 0 if step.grad else flops
        again = step.grad and config.train.recomputes(step.loop_index)
        mixing = count_halting_flops(views[step.stack])  # Not recomputed.
        repeated += flops - mixing if again else 0
    written, cut = count_memory_flops(config), count_patch_flops(config)
    # Pixels need no gradient.
    forward, train = forward + written + cut, train + 3 * written + 2 * cut
    exits = sum(step.exit for step in steps[:-1])
    head = count_head_flops(config) * (1 + exits)
    train += 3 * head
    # Exit logits are recomputed in backward, as are those of chunks.
    repeated += count_head_flops(config) * (exits + is_chunked(config))
    return FlopEstimate(forward + head, train, forward_only, repeated)


def expect_flops(config: Config, seen: Seen | None = None) -> FlopEstimate:
    """Return executed FLOPs per token, averaged over the optimizer steps of the run."""
    shares = count_depths(config)
    each = [
        (share, count_flops(config, build_map(config, depth), seen))
        for depth, share in shares.items()
    ]

    totals = (
        sum(share * getattr(flops, field.name) for share, flops in each)
        for field in fields(FlopEstimate)
    )
    return FlopEstimate(*map(round, totals))


def deepest_map(config: Config) -> LayerMap:
    """Return the map of the run that keeps the most activations."""
    shares = count_depths(config)
    maps = (build_map(config, depth) for depth in shares)
    return max(maps, key=lambda steps: (sum(step.grad for step in steps), len(steps)))


def count_step_flops(config: Config, steps: LayerMap, seen: Seen | None = None) -> list[int]:
    """Return forward FLOPs per token of each step of the map, in order.

    Counts 2 per matrix parameter and 4 heads head_dim per seen key, for scores and their sum over
    values. The matrix of an injection counts if the step reads the injected value. Keys and values
    of a temporal memory are computed once per chunk, those of source sentences once per source
    token, as is all that an encoder computes.
    """
    blocks, flops = _by_block(config), []
    slots, seen = count_slots_per_token(config), seen or see_samples(config)
    views = {stack.name: stack.config for stack in list_stacks(config)}

    def rows(name: str) -> float:
        """Return the rows that a matrix multiplies, per token of its stack."""
        if name.endswith(SLOT_PRODUCTS):
            return slots
        return seen.source_share if name.endswith(SOURCE_PRODUCTS) else 1.0

    for step in steps:
        sizes = [
            spec.size * rows(spec.name)
            for spec in _used(blocks, step)
            if len(spec.shape) == 2
            and (step.injected or ".injection." not in spec.name)
            and ".halting." not in spec.name
        ]
        share = seen.source_share if step.stack == "encoder" else 1.0
        products = round(share * (2 * sum(sizes) + count_halting_flops(views[step.stack])))
        flops.append(products + count_score_flops(config, step, seen))
    return flops


SLOT_PRODUCTS = ("memory_attention.key.weight", "memory_attention.value.weight")
"""Matrices of a block applied to the temporal memory instead of the tokens."""
SOURCE_PRODUCTS = ("cross_attention.key.weight", "cross_attention.value.weight")
"""Matrices of a decoder's block applied to the encoder's output."""


class Seen(NamedTuple):
    """Mean number of keys that a query must see, itself included."""

    full: float
    """In blocks without a window."""
    sliding: float
    """In blocks with a sliding window."""
    encoder: float = 0.0
    """In an encoder, per target token."""
    cross: float = 0.0
    """In the decoder's attention to an encoder."""
    source_share: float = 1.0
    """Source tokens per target token, of an encoder-decoder."""


def count_pairs(length: int, causal: bool, window: int | None = None) -> int:
    """Return the pairs of query and key that attention over a document must compute.

    Args:
        length: tokens of the document.
        causal: whether a query sees only keys up to its own position.
        window: number of these that it sees, the last ones; None: all.
    """
    if not causal:
        return length * length
    reach = min(window or length, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def count_seen(config: Config, lengths: Iterable[int]) -> Seen:
    """Return the keys that queries see over documents of these lengths, or parts of documents that
    attention sees by themselves."""
    # A global batch may have 100,000 documents, but few lengths.
    counts, model = Counter(lengths), config.model
    tokens = max(sum(length * count for length, count in counts.items()), 1)
    full, sliding = (
        sum(count_pairs(length, model.causal, window) * n for length, n in counts.items()) / tokens
        for window in (None, model.sliding_window)
    )
    return Seen(full, sliding)


def see_samples(config: Config) -> Seen:
    """Return the keys that queries see if every sample is one document; with a temporal memory, in
    chunks."""
    whole, rest = divmod(config.num_positions, count_span(config))
    seen = count_seen(config, [count_span(config)] * whole + [rest] * (rest > 0))
    if config.encoder is None:
        return seen
    return seen._replace(encoder=float(config.num_positions), cross=float(config.num_positions))


def count_score_flops(config: Config, step: Step, seen: Seen) -> int:
    """Return forward FLOPs per token of a step's attention scores and the sum over their values,
    those of a temporal memory's slots and of source tokens included."""
    stack = stack_of(config, step.block)
    if stack.name == "encoder":
        keys = seen.encoder
    else:
        slides = config.model.slides(step.block - stack.first)
        keys = (seen.sliding if slides else seen.full) + seen.cross * stack.cross
    keys += 0 if config.temporal is None else config.temporal.num_slots
    return round(4 * keys * config.model.num_heads * config.model.head_dim)


def count_slots_per_token(config: Config) -> float:
    """Return temporal memory slots over all chunks of a sequence, per token; 0 without memory."""
    temporal, length = config.temporal, config.num_positions
    if temporal is None:
        return 0.0
    return -(-length // temporal.chunk_length) * temporal.num_slots / length


def count_memory_flops(config: Config) -> int:
    """Return forward FLOPs per token of the layers that write the temporal memory; 0 without
    memory.

    Keys and values are computed per token, everything else per slot, once per chunk.
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


def count_patch_flops(config: Config) -> int:
    """Return forward FLOPs per position of the projection of patches; 0 for a model of tokens."""
    if not config.reads_images or config.task is None:
        return 0
    size = config.model.hidden_size * config.task.pixels_per_patch
    return 2 * size * config.task.num_patches // config.num_positions


def count_halting_flops(config: Config) -> int:
    """Return forward FLOPs per token of the halting head, applied to every token, or to every
    sequence if means over whole documents decide."""
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
    """Return forward FLOPs per token of the head; a task head, applied once per sequence, is
    averaged over its tokens."""
    if config.classifies:
        own = [s for s in build_inventory(config).values() if s.name.startswith("task.")]
        flops = 2 * sum(spec.size for spec in own if len(spec.shape) == 2)
        assert config.task is not None
        return flops if config.task.kind == "token" else flops // config.tokens_per_sample
    return 2 * _vocab_size(config) * config.model.hidden_size


def dense_twin(steps: LayerMap) -> LayerMap:
    """Return the map that runs each of the same blocks once."""
    return tuple(
        replace(from_order([step.block])[0], stack=step.stack)
        for step in sorted(steps, key=lambda step: step.block)
        if step.loop_index == 0
    )


# --------------------------------------------------------------------------------------- memory


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one process, by kind; activations are those of one micro batch."""

    parameters: int
    gradients: int
    moments: int
    """Optimizer moments in the parameters' dtype: two for AdamW, one for Muon."""
    copies: int
    """Copies of matrices in the compute dtype; none if that is the parameters' own dtype."""
    activations: int
    """Bytes that backward needs, with those it makes again at its peak, under train.recompute; on
    the device, under train.offload_activations."""
    logits: int
    mask: int
    """Masks of all pairs of positions of a micro batch, with train.attention=dense."""
    gathered: int = 0
    """Whole copies and gradients of sharded weights that a pass has at most at a time."""

    @property
    def state(self) -> int:
        """Bytes kept between optimizer steps, gradients included."""
        return self.parameters + self.gradients + self.moments + self.copies

    @property
    def total(self) -> int:
        """Peak bytes, to first order; allocator and libraries are not counted."""
        return self.state + self.gathered + self.activations + self.logits + self.mask


def estimate_memory(config: Config, steps: LayerMap, dp: int = 1) -> MemoryEstimate:
    """Estimate the memory of the largest process of one of `dp` replicas.

    Tensor parallelism divides matrices, heads and vocabulary, context parallelism positions, ZeRO
    whatever its stage shards of the rest (`count_sharded`); `dp` counts the context ranks of a
    replica, too. Under DeepSpeed's stages 2 and 3 the gradients of a pass that are not reduced yet
    are left out; offloaded moments are on the CPU.
    """
    stage, offload = config.parallel.zero_stage, config.parallel.offload_optimizer
    tp = config.parallel.tensor
    parts = [dp if stage >= first else 1 for first in range(4)]
    specs = list(build_inventory(config).values())
    element, wide = element_bytes(config), parameter_bytes(config)

    def held(some: Iterable[ParameterSpec]) -> int:
        """Return the elements on the last tensor-parallel rank, which has the largest shards."""
        return sum(math.prod(spec.part(tp - 1, tp)[1]) for spec in some)

    size = held(specs)
    moving = [spec for spec in specs if not is_frozen(config.optimizer, spec.name)]
    trained = held(moving)
    muon = held(s for s in moving if uses_muon(config.optimizer, s.name, len(s.shape)))
    matrices = held(s for s in specs if has_copy(s))
    tokens = config.tokens_per_rank
    # Logits, which their gradient overwrites, and tanh's output. Those of one early exit exist at a
    # time, beside those of the last loop; a teacher's exist too.
    kinds = 1 + (config.model.logit_softcap is not None)
    kinds += sum(beside is not None for beside in (config.exits, config.distill))
    logits = count_logits(config, tokens)
    logit_bytes = kinds * element * logits + wide * min(logits, LOGIT_SLICE)
    state = {
        "parameters": -(-size // parts[3]) * wide,
        "gradients": -(-trained // parts[2]) * wide,
        "moments": 0 if offload else -(-(2 * trained - muon) // parts[1]) * wide,
        "copies": matrices * element if element < wide else 0,
        "gathered": size * wide if parts[3] > 1 else 0,
    }
    if config.parallel.shards_natively:
        state = count_sharded(config, specs, steps, dp)
    return MemoryEstimate(
        activations=tokens * estimate_activations(config, steps),
        logits=logit_bytes,
        mask=config.tokens_per_microbatch * count_mask_elements(config) * element,
        **state,
    )


PENDING = 2
"""Gradients of blocks that are being reduced while a backward pass goes on."""


def count_sharded(
    config: Config, specs: Sequence[ParameterSpec], steps: LayerMap, dp: int
) -> dict[str, int]:
    """Return the bytes of state under native sharding, by the fields of `MemoryEstimate`.

    Matrices are sharded, what products do not read is whole. With a pipeline, copies and gradients
    of a rank's blocks are whole for an optimizer step; else as long as a pass uses them.

    Args:
        specs: the parameters of the process.
        steps: its steps of the map.
        dp: number of replicas.
    """
    parallel, tp = config.parallel, config.parallel.tensor
    shards = parallel.shard_group or dp
    element, wide = element_bytes(config), parameter_bytes(config)
    size: dict[int | None, int] = {}
    gradient: dict[int | None, int] = {}
    small = small_trained = by_muon = 0
    for spec in specs:
        elements = math.prod(spec.part(tp - 1, tp)[1])
        is_trained = not is_frozen(config.optimizer, spec.name)
        if not has_copy(spec):
            small += elements
            small_trained += elements * is_trained
            continue
        size[spec.block] = size.get(spec.block, 0) + elements
        gradient[spec.block] = gradient.get(spec.block, 0) + elements * is_trained
        by_muon += elements * (is_trained and uses_muon(config.optimizer, spec.name, 2))
    shard = -(-sum(size.values()) // shards)
    own = -(-sum(gradient.values()) // shards)
    whole_step = parallel.pipeline > 1
    forward = [step.block for step in steps]
    backward = [step.block for step in reversed(steps) if step.grad]
    kept = sum(size.values()) * element
    copies = 0
    gathered = kept
    if parallel.zero_stage < 3:
        copies, gathered = kept, 0
    elif not whole_step:
        most = max((_most_live(uses, size, 1, 0) for uses in (forward, backward)), default=0)
        if parallel.gathered_blocks is not None:
            largest = sorted((n for b, n in size.items() if b is not None), reverse=True)
            most = min(most, sum(largest[: parallel.gathered_blocks]))
        gathered = (most + size.get(None, 0)) * element
    live = sum(gradient.values())
    if parallel.zero_stage >= 2 and not whole_step:
        live = _most_live(backward, gradient, 0, PENDING) + gradient.get(None, 0)
    return {
        "parameters": (shard + small) * wide,
        "gradients": (own + small_trained) * wide,
        "moments": (2 * (own + small_trained) - -(-by_muon // shards)) * wide,
        "copies": copies,
        "gathered": gathered + (live * wide if shards > 1 else 0),
    }


def _most_live(uses: Sequence[int], size: Mapping[int | None, int], ahead: int, behind: int) -> int:
    """Return the most elements of blocks that a pass has at a time.

    Args:
        uses: blocks in the order of their uses.
        size: elements of each block.
        ahead: blocks that are there before their use.
        behind: blocks that are still there after their last use.
    """
    order = [block for block, _ in groupby(uses)]
    first = {block: order.index(block) for block in order}
    last = {block: i for i, block in enumerate(order)}
    return max(
        (
            sum(size.get(b, 0) for b in first if first[b] - ahead <= i <= last[b] + behind)
            for i in range(len(order))
        ),
        default=0,
    )


def check_size(config: Config) -> None:
    """Reject a config that no machine has the memory for, or that recomputes loops it does not run.

    Raises:
        ConfigError: too many parameters, too large a micro batch, or a loop in train.recompute that
        is in no map. `config.model.vocab_size` must be resolved.
    """
    parameters = count_parameters(config).total
    if parameters > MOST_PARAMETERS:
        raise ConfigError(
            f"the model has {parameters:.3g} parameters, more than any cluster trains "
            f"({MOST_PARAMETERS:.0e}); lower model.hidden_size={config.model.hidden_size}, "
            f"model.ffn_hidden_size={config.model.ffn_hidden_size}, model.vocab_size="
            f"{config.model.vocab_size} or the number of blocks ({config.num_blocks})"
        )
    deepest, policy = deepest_map(config), config.train.recompute
    most = max(step.loop_index for step in deepest)
    if not isinstance(policy, str) and max(policy.loops) > most:
        raise ConfigError(
            f"train.recompute.loops={list(policy.loops)} names loop {max(policy.loops)}, but no "
            f"block runs more than {most + 1} time(s); name loops from 0 to {most}"
        )
    memory = estimate_memory(config, deepest)
    size = memory.activations + memory.logits + memory.mask
    if size > MOST_BYTES:
        raise ConfigError(
            f"a micro batch takes about {size:.3g} bytes of one process, more than any machine "
            f"has ({MOST_BYTES:.0e}); lower train.micro_batch_size={config.train.micro_batch_size} "
            f"or data.seq_length={config.data.seq_length}"
        )


MOST_LOGITS = 1 << 25
"""Logits that the loss has at a time; those of a micro batch with more are computed in chunks of
tokens, and again in backward (`parallel.head_loss`)."""

LOGIT_SLICE = 1 << 23
"""Logits of which the loss has copies in the wide dtype at a time."""


def chunk_tokens(tokens: int, vocab_size: int) -> int:
    """Return the number of tokens whose logits exist at a time in the loss, out of `tokens`."""
    chunks = -(-tokens * vocab_size // MOST_LOGITS)
    return -(-tokens // chunks)


def is_chunked(config: Config) -> bool:
    """Return True if the logits of a micro batch never exist whole."""
    tokens = config.tokens_per_rank
    return not config.classifies and chunk_tokens(tokens, vocab_shard(config)) < tokens


def vocab_shard(config: Config) -> int:
    """Return the size of the largest tensor-parallel shard of the vocabulary."""
    return -(-_vocab_size(config) // config.parallel.tensor)


def count_logits(config: Config, tokens: int) -> int:
    """Return the number of logits of `tokens` tokens that one tensor-parallel rank has at once."""
    if not config.classifies:
        return chunk_tokens(tokens, vocab_shard(config)) * vocab_shard(config)
    task = config.task
    assert task is not None and task.num_classes is not None
    return task.num_classes * (
        tokens if task.kind == "token" else tokens // config.tokens_per_sample
    )


def count_state_bytes(config: Config, specs: Iterable[ParameterSpec]) -> int:
    """Return the bytes of parameters with gradients, moments and copies, without ZeRO.

    Counted on the last tensor-parallel rank, which has the largest shards.
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
    """Return True if products use the parameter, so that it has a copy in the compute dtype."""
    unused = ("embedding.positions", "temporal.memory")
    return len(spec.shape) == 2 and not spec.name.endswith(unused)


def count_span(config: Config) -> int:
    """Return the maximum number of tokens that attention sees: a sequence, or a chunk of it."""
    return config.temporal.chunk_length if config.temporal else config.num_positions


def has_documents(config: Config) -> bool:
    """Return True if a sample may hold several documents or padding."""
    return (config.data.mask_documents or config.task is not None) and not config.reads_images


def count_mask_heads(config: Config) -> int:
    """Return the number of heads with different attention masks; 0 if plain causality needs no
    mask, as with every backend but train.attention=dense. Blocks with a window have a mask beside
    that of the others."""
    model = config.model
    if config.train.attention != "dense":
        return 0
    heads = int(has_documents(config))
    if model.positions == "alibi":
        heads = model.num_heads // (config.parallel.tensor * config.parallel.context)
    slides = model.sliding_window is not None and model.sliding_window < count_span(config)
    return heads + max(heads, 1) if slides else heads


def count_mask_elements(config: Config) -> int:
    """Return the elements of all masks per token; with documents, including those of reading and
    writing a temporal memory beside its initial slots."""
    elements = count_span(config) * count_mask_heads(config)
    has_masks = config.train.attention == "dense" and has_documents(config)
    if config.temporal is not None and has_masks:
        elements += 2 * config.temporal.num_slots + 1
    return elements


def estimate_activations(config: Config, steps: LayerMap) -> int:
    """Return bytes per token that exist on one tensor-parallel rank when backward starts: what it
    needs, by the policy of `train.recompute`, and what it makes again of one step."""
    ends = count_end_bytes(config) + count_memory_bytes(config) + count_patch_bytes(config)
    kept = count_kept_bytes(config, steps)
    if config.train.offload_activations:
        kept = min(kept, 2 * count_largest_step(config, steps))  # on their way out, or back
    return kept + ends + count_remade_bytes(config, steps)


def count_remade_bytes(config: Config, steps: LayerMap) -> int:
    """Return the maximum bytes per token that backward makes again at a time: all that a step
    keeps, or what `selective` leaves out of it; 0 if it makes nothing again."""
    graded = [step for step in steps if step.grad]
    share = count_span(config) / config.num_positions  # one chunk at a time is recomputed
    if any(config.train.recomputes(step.loop_index) for step in graded):
        return round(count_largest_step(config, steps, selective=False) * share)
    if config.train.recompute == "selective" and graded:
        whole = count_largest_step(config, steps, selective=False)
        return round((whole - count_largest_step(config, steps)) * share)
    return 0


def count_largest_step(config: Config, steps: LayerMap, selective: bool | None = None) -> int:
    """Return the maximum bytes per token that one of these steps keeps; see `count_step_bytes`."""
    names = {step.stack for step in steps}
    stacks = [stack for stack in list_stacks(config) if stack.name in names]
    return max((count_step_bytes(stack, selective) for stack in stacks), default=0)


def with_recompute(config: Config, policy: Recompute) -> Config:
    """Return the config with another policy of `train.recompute`."""
    return config.model_copy(
        update={"train": config.train.model_copy(update={"recompute": policy})}
    )


def count_stream_bytes(config: Config) -> int:
    """Return bytes per token of the residual stream on one tensor-parallel rank."""
    parallel = config.parallel
    shares = parallel.tensor if parallel.sequence_parallel else 1
    return config.model.hidden_size * element_bytes(config) // shares


def count_end_bytes(config: Config) -> int:
    """Return bytes per token that backward needs after the last step: input and output of the final
    norm, or the head's input."""
    return (2 if config.has_final_norm else 1) * count_stream_bytes(config)


def count_kept_bytes(config: Config, steps: LayerMap) -> int:
    """Return bytes per token that these steps keep from forward to backward, by the policy of
    `train.recompute`: the inputs of recomputed steps, all that backward needs of others. Final norm
    and head are excluded."""
    stream = count_stream_bytes(config)
    kept = stream * sum(len(step.writes) for step in steps)
    stacks = {stack.name: stack for stack in list_stacks(config)}
    for step in steps:
        if TARGET in step.reads and config.has_final_norm:
            kept += stream  # the input of the encoder's norm
        if not step.grad:
            continue
        stack, again = stacks[step.stack], config.train.recomputes(step.loop_index)
        kept += count_mixture_bytes(stack.config, again)
        if again:
            kept += stream
        else:
            unread = 2 * stream * (has_injection(stack) and not step.injected)
            kept += count_step_bytes(stack) - unread
    return kept


def count_mixture_bytes(config: Config, recomputed: bool) -> int:
    """Return bytes per token that one step of halting keeps beside a block, recomputed or not: the
    state it offers, the head's input and output, and for token-level halting the
    mixture that attention reads."""
    halting = config.halting
    if halting is None:
        return 0
    wide, element = max(4, element_bytes(config)), element_bytes(config)
    kept = wide * (1 if element == wide else 2)
    if halting.mode == "token" or config.model.causal:
        own = 0 if halting.mode == "token" and not halting.transition else 1 + halting.transition
        kept += element * (own + 2)
    if halting.mode == "token":  # The mixture's norm too, unless it is made again.
        kept += (1 if recomputed or config.train.recompute == "selective" else 2) * element
    return kept * config.model.hidden_size


def count_step_bytes(stack: Stack, selective: bool | None = None) -> int:
    """Return the maximum bytes per token that one step of a stack keeps, injection included.

    Args:
        stack: the stack.
        selective: leave out what `train.recompute: selective` makes again; None: as the config
            says.
    """
    config = stack.config
    model, parallel = config.model, config.parallel
    shares = parallel.tensor if parallel.sequence_parallel else 1
    span = count_span(config) if config.train.attention == "dense" else 0
    kept = count_kept_elements(model, span, parallel) + count_rank(config)
    if "feed_forward" in signal_names(config):  # the input sum, beside the stream
        kept += model.hidden_size // shares
    kept += count_read_elements(config) + count_cross_elements(stack)
    if config.train.recompute == "selective" if selective is None else selective:
        kept -= count_cheap_elements(config)
        kept -= model.hidden_size if stack.cross and model.norm_position != "output" else 0
    heads = model.num_heads // parallel.tensor
    scores = 4 * heads  # logsumexp of the scores, fp32
    looks = config.temporal is not None or stack.cross
    scores *= 2 if looks else 1
    if span and (model.attention_dropout or model.attention_softcap is not None):
        scores = heads * span * bool(model.attention_dropout)  # masks of dropout
    if model.dropout:
        scores += (3 if looks else 2) * model.hidden_size // shares
    injected = 2 * count_stream_bytes(config) if has_injection(stack) else 0
    return kept * element_bytes(config) + scores + injected


def count_cheap_elements(config: Config) -> int:
    """Return elements per token of a step that `train.recompute: selective` does not keep: outputs
    of norms, activations and, after norms of heads, rotations."""
    model, parallel, tp = config.model, config.parallel, config.parallel.tensor
    share = 1 / tp if parallel.sequence_parallel else 1.0
    norms = 0.0 if model.norm_position == "output" else 2.0 * share
    if model.norm_position == "sandwich":  # inputs of the inner norms are outputs of others
        norms += 2.0 * share
    if config.temporal is not None:
        norms += 1.0
    cheap = round(norms * model.hidden_size) + model.ffn_hidden_size // tp
    if model.gate_hidden_size is not None:
        cheap += model.gate_hidden_size // tp
    if model.qk_norm and parallel.context == 1:  # Otherwise they are exchanged, and kept.
        cheap += (model.num_heads + max(model.num_kv_heads, tp)) // tp * model.head_dim
    return cheap


def count_exchanged_elements(config: Config) -> int:
    """Return the elements per token that attention exchanges over context ranks: queries, keys and
    values there, mixed values back. Key heads are repeated where they are fewer than ranks."""
    model, parallel = config.model, config.parallel
    queries = model.num_heads // parallel.tensor
    keys = max(model.num_kv_heads // parallel.tensor, 1, parallel.context)
    return (2 * queries + 2 * keys) * model.head_dim


def count_deferred_bytes(config: Config, steps: LayerMap) -> int:
    """Return bytes per token kept between the backward pass of these steps' inputs and that of
    their weights: every product's input and output gradient. The head is excluded."""
    model, tp = config.model, config.parallel.tensor
    queries = model.num_heads // tp * model.head_dim
    keys = max(model.num_kv_heads // tp, 1) * model.head_dim
    ffn = model.ffn_hidden_size // tp
    views = {stack.name: stack for stack in list_stacks(config)}
    entered = 2 * model.hidden_size + queries + ffn
    left = queries + 2 * keys + 2 * model.hidden_size
    left += (2 if model.gated else 1) * ffn
    if model.gate_hidden_size is not None:
        entered += model.hidden_size + model.gate_hidden_size // tp
        left += model.hidden_size + model.gate_hidden_size // tp
    # Cross-attention's products of targets and of the encoder's output.
    crossed = 3 * model.hidden_size + 2 * queries + 2 * keys
    elements = 0
    for step in steps:
        if not step.grad:
            continue
        stack = views[step.stack]
        # the adapter's A output and its gradient
        elements += entered + left + 2 * count_rank(stack.config) + crossed * stack.cross
        if step.injected and has_injection(stack):
            elements += 3 * model.hidden_size
    return elements * element_bytes(config)


def count_kept_elements(model: ModelConfig, span: int, parallel: ParallelConfig) -> int:
    """Return elements per token that one step keeps for backward on one tensor-parallel rank.

    Args:
        model: shapes.
        span: keys of each token whose weights are kept if no fused kernel computes them; 0: none.
        parallel: size of the tensor-parallel group.
    """
    tp = parallel.tensor
    queries = model.num_heads // tp * model.head_dim
    keys = max(model.num_kv_heads // tp, 1) * model.head_dim
    inputs = 2  # inputs of two norms
    if model.norm_position in ("sandwich", "peri"):
        inputs += 2  # inputs of the output norms; their outputs are only added
    if model.parallel_residual:
        inputs -= 1  # both share one input
    # Under sequence parallelism backward gathers the outputs of the two norms again.
    norms = (2 + inputs) / (tp if parallel.sequence_parallel else 1)
    attention = 2 * queries + 2 * keys  # q, k, v and the output projection's input
    if model.qk_norm:
        attention += queries + keys  # inputs of the head norms
    if (
        parallel.context > 1
    ):  # Mixed values before their exchange; keys as often as ranks have them.
        attention += queries + 2 * max(parallel.context * model.head_dim - keys, 0)
    kept = 3 if model.gated else 1 if model.feed_forward == "relu" else 2
    feed_forward = kept * model.ffn_hidden_size // tp
    # Input and output of its GELU; the gate and the gated value.
    if model.gate_hidden_size is not None:
        feed_forward += 2 * model.gate_hidden_size // tp + 2 * model.hidden_size
    heads = model.num_heads // tp
    # The dense path keeps the weights, and those after dropout; before them tanh's output.
    matrices = 2 if model.attention_dropout else 0
    if model.attention_softcap is not None:
        matrices = max(matrices, 1) + 1
    scores = matrices * heads * span
    return round(norms * model.hidden_size) + attention + feed_forward + scores


def count_read_elements(config: Config) -> int:
    """Return elements per token that one step keeps for backward of reading the temporal memory:
    input and output of the norm, queries and read values; norms, keys and values of the slots."""
    model, tp = config.model, config.parallel.tensor
    if config.temporal is None:
        return 0
    queries = model.num_heads // tp * model.head_dim
    keys = max(model.num_kv_heads // tp, 1) * model.head_dim
    keeps_weights = config.train.attention == "dense" and model.attention_dropout > 0.0
    matrices = 2 * config.temporal.num_slots * model.num_heads // tp * keeps_weights
    slots = count_slots_per_token(config) * (model.hidden_size + 2 * keys)
    return round(2 * model.hidden_size + 2 * queries + matrices + slots)


def count_cross_elements(stack: Stack) -> int:
    """Return elements per token that one step keeps for backward of attention to an encoder: input
    and output of the norm, queries and mixed values, keys and values of as many source tokens."""
    model, tp = stack.config.model, stack.config.parallel.tensor
    if not stack.cross:
        return 0
    queries = model.num_heads // tp * model.head_dim
    keys = max(model.num_kv_heads // tp, 1) * model.head_dim
    return 2 * model.hidden_size + 2 * queries + 2 * keys


def count_memory_bytes(config: Config) -> int:
    """Return bytes per token that writing the temporal memory keeps for backward; 0 without
    memory."""
    temporal, model, tp = config.temporal, config.model, config.parallel.tensor
    if temporal is None:
        return 0
    hidden, queries = model.hidden_size, model.num_heads // tp * model.head_dim
    keys = max(model.num_kv_heads // tp, 1) * model.head_dim
    feed_forward = (3 if model.gated else 2) * temporal.update_ffn_hidden_size // tp
    of_slot = 4 * hidden + 2 * queries + feed_forward
    each = hidden + 2 * keys + count_slots_per_token(config) * of_slot
    return round(temporal.updates * each * element_bytes(config))


def count_patch_bytes(config: Config) -> int:
    """Return bytes per position of the patches that backward needs; 0 for a model of tokens."""
    if not config.reads_images or config.task is None:
        return 0
    size = config.task.num_patches * config.task.pixels_per_patch
    shares = config.parallel.tensor if config.parallel.sequence_parallel else 1
    return size * element_bytes(config) // (config.num_positions * shares)


def count_rank(config: Config) -> int:
    """Return the channels between the factors of all adapters and level signals of one step."""
    for stack in list_stacks(config):
        for block, loops in count_own_loops(stack).items():
            own = block_parameters(stack, block, depth=len(stack.blocks))  # Depth changes no shape.
            for loop in range(loops):
                # The factors applied to the block's input.
                channels = [
                    spec.shape[0]
                    for spec in loop_parameters(stack, own, loop)
                    if spec.name.endswith(".lora_a")
                    or (".signal_" in spec.name and spec.name.endswith(".b"))
                ]
                if channels:
                    return sum(channels)
    return 0


def has_injection(stack: Stack) -> bool:
    """Return True if a learned matrix transforms what the stack's map reads."""
    return injection_block(stack) is not None


# --------------------------------------------------------------------------------------- tokens


def count_tokens_per_step(config: Config) -> int:
    """Return the tokens of one optimizer step over all processes."""
    train = config.train
    return train.global_batch_size // train.micro_batch_size * config.tokens_per_microbatch


def count_total_tokens(config: Config) -> int:
    """Return the tokens of the whole run."""
    return config.train.steps * count_tokens_per_step(config)


def _vocab_size(config: Config) -> int:
    assert config.model.vocab_size is not None, "resolve the vocabulary first"
    return config.model.vocab_size


def parameter_bytes(config: Config) -> int:
    """Return the bytes of one element of parameters, gradients and moments."""
    return 8 if config.train.precision == "fp64" else 4


def element_bytes(config: Config) -> int:
    """Return the bytes of one element of activations."""
    return {"fp64": 8, "fp32": 4, "bf16": 2}[config.train.precision]
