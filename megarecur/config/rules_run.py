"""Rules about the run: the mesh, the optimizer, the schedule and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megarecur.config.optimizer import WarmupStableDecay
from megarecur.config.recurrence import Loop
from megarecur.config.rule import Rule
from megarecur.config.run import Config


def count_blocks_together(c: Config) -> int:
    """Return the number of last blocks that must stay on one pipeline rank."""
    loop = c.recurrence
    return loop.coda if isinstance(loop, Loop) and loop.final_norm_after_core else 1


def find_most_ranks(c: Config) -> Mapping[str, object]:
    """Return the number of blocks and the maximum pipeline size, if the pipeline exceeds it."""
    blocks, together = c.num_blocks, count_blocks_together(c)
    if c.parallel.pipeline <= blocks - together + 1:
        return {}
    stay = f", of which the last {together} stay together for final_norm_after_core"
    return {"blocks": f"{blocks}{stay if together > 1 else ''}", "most": blocks - together + 1}


def find_wrong_blocks(c: Config) -> Mapping[str, object]:
    """Return the blocks that a placement omits, or lists although they do not exist."""
    blocks, placement = c.num_blocks, c.parallel.placement
    if placement is None or len(placement) == blocks:
        return {}
    if len(placement) < blocks:
        wrong = f"blocks {list(range(len(placement), blocks))} are missing"
    else:
        wrong = f"blocks {list(range(blocks, len(placement)))} do not exist"
    return {"wrong": wrong, "blocks": blocks}


def splits_coda(c: Config) -> Mapping[str, object]:
    """Return the number of last blocks that must stay together, if a placement splits them."""
    blocks, together = c.num_blocks, count_blocks_together(c)
    placement = c.parallel.placement
    apart = (
        placement is not None
        and len(placement) == blocks
        and len(set(placement[blocks - together :])) > 1
    )
    return {"together": together} if apart else {}


def find_decay(c: Config) -> Mapping[str, object]:
    """Return the steps of decay and the minimum steps of a run, if the schedule does not fit."""
    schedule = c.optimizer.schedule
    decay = schedule.decay_steps if isinstance(schedule, WarmupStableDecay) else 0
    least = schedule.warmup_steps + decay
    return {"decay": decay, "least": least} if least > c.train.steps else {}


def rolls_back_too_far(c: Config) -> bool:
    """Return True if an alarm may find no checkpoint from before the last log step."""
    saving = c.checkpoint
    kept = (saving.keep_last - 1) * saving.every + 1
    rolls = c.alarms.action == "roll_back" and not saving.keep_every and saving.every > 0
    return rolls and kept < c.train.log_every


def divided_by_tensor(key: str, size: Callable[[Config], int | None]) -> Rule:
    """Return the rule that parallel.tensor divides a size, where the model has it."""
    return Rule(
        keys=("parallel.tensor", key),
        when=lambda c: (size(c) or 0) % c.parallel.tensor != 0,
        reason=f"parallel.tensor={{parallel.tensor}} does not divide {key}={{{key}}}",
        remedy=f"set {key} to a multiple of {{parallel.tensor}}, or lower tensor",
    )


def find_heads(c: Config) -> Mapping[str, object]:
    """Return the heads of a tensor-parallel rank, if the context ranks cannot share them."""
    heads, rest = divmod(c.model.num_heads, c.parallel.tensor)
    return {"heads": heads} if rest == 0 and heads % c.parallel.context else {}


def find_key_heads(c: Config) -> Mapping[str, object]:
    """Return the key heads of a tensor-parallel rank, if neither they nor the context ranks divide
    the other number."""
    heads, ranks = max(c.model.num_kv_heads // c.parallel.tensor, 1), c.parallel.context
    return {"heads": heads} if heads % ranks and ranks % heads else {}


def refused_with_context(
    key: str, is_set: Callable[[Config], bool], reason: str, remedy: str
) -> Rule:
    """Return the rule that sequences are not shared by ranks where a section is set."""
    return Rule(
        keys=("parallel.context", key),
        when=lambda c: c.parallel.context > 1 and is_set(c),
        reason=f"parallel.context={{parallel.context}} with {reason}",
        remedy=f"set context to 1, or {remedy}",
    )


CONTEXT_RULES = (
    Rule(
        keys=("parallel.context", "data.seq_length"),
        when=lambda c: c.data.seq_length % c.parallel.context != 0 and c.task is None,
        reason="parallel.context={parallel.context} does not divide data.seq_length="
        "{data.seq_length}",
        remedy="set data.seq_length to a multiple of {parallel.context}, or lower context",
    ),
    Rule(
        keys=("parallel.context", "parallel.tensor", "model.num_heads"),
        when=find_heads,
        reason="parallel.context={parallel.context} does not divide the {heads} head(s) of a "
        "tensor-parallel rank (model.num_heads={model.num_heads}, parallel.tensor="
        "{parallel.tensor})",
        remedy="lower context or tensor, or set model.num_heads to a multiple of their product",
    ),
    Rule(
        keys=("parallel.context", "parallel.tensor", "model.num_kv_heads"),
        when=find_key_heads,
        reason="parallel.context={parallel.context} does not divide the {heads} key head(s) of a "
        "tensor-parallel rank (model.num_kv_heads={model.num_kv_heads}, parallel.tensor="
        "{parallel.tensor}), nor the reverse",
        remedy="choose a context that divides them, or a multiple of them",
    ),
    refused_with_context(
        "recurrence.halting.mode",
        lambda c: c.halting is not None,
        "recurrence.halting.mode={recurrence.halting.mode}: ranks would halt at different steps, "
        "and attention needs all of them",
        "leave halting out",
    ),
    refused_with_context(
        "temporal",
        lambda c: c.temporal is not None,
        "temporal memory: chunks are read one after the other, so ranks would wait for each other",
        "leave temporal out",
    ),
    refused_with_context(
        "encoder",
        lambda c: c.encoder is not None,
        "an encoder: pairs of sentences are short, and padded to lengths that differ",
        "leave encoder out",
    ),
    refused_with_context(
        "task",
        lambda c: c.task is not None,
        "a task: its samples are short, padded to lengths that differ, and mostly classified as a "
        "whole",
        "leave task out",
    ),
)
"""Rules of context parallelism."""
PLACEMENT_RULES = (
    Rule(
        keys=("parallel.pipeline", "recurrence", "encoder"),
        when=find_most_ranks,
        reason="parallel.pipeline={parallel.pipeline} exceeds the number of blocks that can be "
        "divided among ranks ({blocks}, with recurrence.kind={recurrence.kind})",
        remedy="set it to at most {most}",
    ),
    Rule(
        keys=("parallel.placement", "recurrence", "encoder"),
        when=find_wrong_blocks,
        reason="parallel.placement={parallel.placement}: {wrong}",
        remedy="name one rank for each of the {blocks} block(s)",
    ),
    Rule(
        keys=("parallel.placement", "recurrence.final_norm_after_core"),
        when=splits_coda,
        reason="parallel.placement={parallel.placement}: the last {together} blocks stay together "
        "for recurrence.final_norm_after_core",
        remedy="give them one rank",
    ),
)
"""Rules that a config keeps whose blocks can be placed."""
PARALLEL_RULES = (
    *PLACEMENT_RULES,
    *CONTEXT_RULES,
    divided_by_tensor("model.num_heads", lambda c: c.model.num_heads),
    Rule(
        keys=("parallel.tensor", "model.num_kv_heads"),
        when=lambda c: (
            c.model.num_kv_heads % c.parallel.tensor != 0
            and c.parallel.tensor % c.model.num_kv_heads != 0
        ),
        reason="parallel.tensor={parallel.tensor} does not divide model.num_kv_heads="
        "{model.num_kv_heads}, nor the reverse",
        remedy="set model.num_kv_heads to a multiple of {parallel.tensor}, or to a divisor",
    ),
    divided_by_tensor("model.ffn_hidden_size", lambda c: c.model.ffn_hidden_size),
    divided_by_tensor("model.gate_hidden_size", lambda c: c.model.gate_hidden_size),
    divided_by_tensor(
        "temporal.update_ffn_hidden_size",
        lambda c: None if c.temporal is None else c.temporal.update_ffn_hidden_size,
    ),
    Rule(
        keys=("parallel.sequence_parallel", "parallel.tensor", "data.seq_length", "task.augment"),
        when=lambda c: (
            {"length": c.num_positions // c.parallel.context}
            if c.parallel.sequence_parallel
            and c.num_positions % c.parallel.context == 0
            and c.num_positions // c.parallel.context % c.parallel.tensor
            else False
        ),
        reason="parallel.sequence_parallel=true: parallel.tensor={parallel.tensor} does not divide "
        "data.seq_length={data.seq_length} ({length} positions of a context rank, START and END "
        "included)",
        remedy="choose a length that it divides, or set sequence_parallel to false",
    ),
    Rule(
        keys=("parallel.pipeline", "model.shared_feed_forward"),
        when=lambda c: c.parallel.pipeline > 1 and c.model.shared_feed_forward,
        reason="model.shared_feed_forward=true with parallel.pipeline={parallel.pipeline} would "
        "use one feed-forward on several ranks",
        remedy="set pipeline to 1, or shared_feed_forward to false",
    ),
    Rule(
        keys=("parallel.zero_stage", "parallel.pipeline"),
        when=lambda c: (
            c.parallel.zero_stage == 3
            and c.parallel.pipeline > 1
            and not c.parallel.shards_natively
        ),
        reason="parallel.zero_stage=3 with parallel.pipeline={parallel.pipeline} and "
        "parallel.zero_engine=deepspeed would gather every stage's weights for every micro batch",
        remedy="set zero_engine to native, zero_stage to 1, or pipeline to 1",
    ),
    Rule(
        keys=("parallel.zero_stage", "train.precision"),
        when=lambda c: (
            c.parallel.zero_stage > 0
            and c.train.precision == "fp64"
            and not c.parallel.shards_natively
        ),
        reason="parallel.zero_stage={parallel.zero_stage} of parallel.zero_engine=deepspeed runs "
        "in fp32 or bf16, not in train.precision=fp64",
        remedy="set zero_engine to native, zero_stage to 0, or precision to fp32",
    ),
)
OPTIMIZER_RULES = (
    Rule(
        keys=("optimizer.muon", "parallel.zero_stage", "parallel.zero_engine"),
        when=lambda c: (
            c.optimizer.muon is not None
            and c.parallel.zero_stage > 0
            and not c.parallel.shards_natively
        ),
        reason="optimizer.muon needs whole matrices, which parallel.zero_stage="
        "{parallel.zero_stage} of parallel.zero_engine=deepspeed cannot put together",
        remedy="set parallel.zero_engine to native, parallel.zero_stage to 0, or omit muon",
    ),
    Rule(
        keys=("optimizer.schedule.warmup_steps", "optimizer.schedule.decay_steps", "train.steps"),
        when=find_decay,
        reason="optimizer.schedule: warmup_steps={optimizer.schedule.warmup_steps} and decay_steps="
        "{decay} do not fit in train.steps={train.steps}",
        remedy="raise train.steps to at least {least}, or lower warmup_steps or decay_steps",
    ),
)
EVAL_TASKS_RULES = (
    Rule(
        keys=("train.eval_tasks", "task", "encoder"),
        when=lambda c: (
            c.train.eval_tasks is not None and (c.classifies or c.encoder is not None)
        ),
        reason="train.eval_tasks needs a model that predicts text; the run is a classifier or an "
        "encoder-decoder",
        remedy="leave eval_tasks out",
    ),
)  # fmt: skip
CHECKPOINT_RULES = (
    Rule(
        keys=("checkpoint.keep_best", "data.val"),
        when=lambda c: bool(c.checkpoint.keep_best) and not c.data.val,
        reason="checkpoint.keep_best={checkpoint.keep_best} needs data.val to score checkpoints, "
        "which is empty",
        remedy="name a corpus in data.val, or set keep_best to 0",
    ),
    Rule(
        keys=("alarms.action", "checkpoint.every"),
        when=lambda c: (
            c.alarms.action == "roll_back"
            and not c.checkpoint.keep_every
            and c.checkpoint.every == 0
        ),
        reason="alarms.action=roll_back needs checkpoints to go back to, and checkpoint.every=0 "
        "makes none",
        remedy="set checkpoint.every",
    ),
    Rule(
        keys=("alarms.action", "checkpoint.keep_last", "checkpoint.every", "train.log_every"),
        when=rolls_back_too_far,
        reason="alarms.action=roll_back looks at every train.log_every={train.log_every} steps, "
        "when checkpoint.keep_last={checkpoint.keep_last} of checkpoint.every={checkpoint.every} "
        "has nothing left from the log step before",
        remedy="raise keep_last or every, or lower log_every",
    ),
)
