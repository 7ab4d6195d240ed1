"""An example and its remedy for each rule of `megarecur/config/rules.py`."""

from __future__ import annotations

import re

from megarecur.config.rules_pairs import PAIR_RULES

LOOP = "recurrence={kind: block_recurrence, num_blocks: 4, num_loops: 2}"
RING = "recurrence={kind: ring, depth: 4, level_rank: 8}"
HALTING = "recurrence={kind: universal, depth: 4, halting: {mode: token}}"
TEMPORAL = "temporal={chunk_length: 32, num_slots: 4}"
TASK = "task={kind: sequence, num_classes: 2}"
ENCODER = "encoder={kind: dense, num_layers: 2}"
CYCLE = "recurrence={kind: cycle, num_blocks: 4, depth: 8}"
ROLL_BACK = "alarms.action=roll_back"
CORE = (
    "recurrence={kind: loop, prelude: 1, core: 1, coda: 2, num_loops: 2, "
    "final_norm_after_core: true}"
)

IMAGE = "task={kind: image, num_classes: 9, image_size: 32, patch_size: 4}"
PICTURES = (
    IMAGE, "model.causal=false", "model.scale_embeddings=false", "data.seq_length=64",
    "data.tokenizer=none",
)  # fmt: skip
PAIRS = "encoder={kind: dense, num_layers: 2}"
Example = tuple[tuple[str, ...], tuple[str, ...]]
"""Overrides that break one rule, and overrides that follow its remedy."""


def of_encoder(text: str) -> str:
    """A key or an override of the scheme, as that of an encoder."""
    return re.sub(r"\brecurrence\b", "encoder", text)


EXAMPLES: dict[tuple[str, ...], Example] = {
    (
        "train.attention",
        "train.device",
        "train.precision",
        "model.attention_dropout",
        "model.attention_softcap",
        "model.positions",
        "model.head_dim",
    ): (("train.attention=varlen", "train.device=cpu"), ("train.attention=auto",)),
    ("recurrence.final_norm_after_core", "model.norm_position", "model.final_norm"): (
        (CORE, "model.norm_position=post"),
        ("model.norm_position=pre",),
    ),
    ("model.max_positions", "data.seq_length", "temporal.chunk_length", "task.augment"): (
        ("model.positions=learned", "model.max_positions=9"),
        ("model.max_positions=128",),
    ),
    ("model.xpos_scale_base", "data.seq_length", "temporal.chunk_length"): (
        ("model.positions=xpos", "model.xpos_scale_base=1"),
        ("model.xpos_scale_base=2",),
    ),
    ("recurrence.level_rank", "model.hidden_size"): (
        ("recurrence={kind: ring, depth: 4, level_rank: 193, feed_forward_rank: 8}",),
        ("recurrence.level_rank=192",),
    ),
    ("recurrence.feed_forward_rank", "model.hidden_size"): (
        (RING, "recurrence.feed_forward_rank=193"),
        ("recurrence.feed_forward_rank=192",),
    ),
    ("recurrence.level_rank", "recurrence.feed_forward_rank", "model.norm_position"): (
        (RING, "model.norm_position=sandwich"),
        ("model.norm_position=pre",),
    ),
    ("recurrence.level_rank", "recurrence.feed_forward_rank", "model.parallel_residual"): (
        (RING, "model.parallel_residual=true"),
        ("model.parallel_residual=false",),
    ),
    ("adapters.norms", "recurrence.kind"): (
        (RING, "adapters={rank: 4, norms: true, targets: [up]}"),
        ("adapters.norms=false",),
    ),
    ("adapters.targets", "recurrence.level_rank"): (
        (RING, "adapters={rank: 4, targets: [query, up]}"),
        ("adapters.targets=[up]",),
    ),
    ("adapters.targets", "model.shared_feed_forward"): (
        ("model.shared_feed_forward=true", "adapters={rank: 4, targets: [query, up]}"),
        ("adapters.targets=[query]",),
    ),
    ("adapters.targets", "model.feed_forward"): (
        ("model.feed_forward=gelu", "adapters={rank: 4, targets: [gate, up]}"),
        ("adapters.targets=[up]",),
    ),
    ("recurrence.num_loops", "adapters", "model.residual"): (
        (
            LOOP,
            "recurrence.num_loops={sampler: poisson, mean: 4}",
            "adapters={rank: 4}",
        ),
        ("recurrence.num_loops.max=8",),
    ),
    ("train.eval_depths", "recurrence.num_loops", "adapters", "model.residual"): (
        (
            LOOP,
            "adapters={rank: 4}",
            "train.eval_depths=[1, 3]",
        ),
        ("train.eval_depths=[1, 2]",),
    ),
    ("train.eval_depths", "recurrence.kind"): (
        ("train.eval_depths=[1, 2]",),
        ("train.eval_depths=[]",),
    ),
    ("recurrence.halting.mode", "parallel.sequence_parallel"): (
        (HALTING, "parallel={tensor: 2, sequence_parallel: true}"),
        ("parallel.sequence_parallel=false",),
    ),
    ("recurrence.halting.mode", "train.compile"): (
        (HALTING, "train.compile=true"),
        ("train.compile=false",),
    ),
    ("recurrence.halting.mode", "adapters"): (
        (HALTING, "adapters={rank: 4}"),
        ("adapters=null",),
    ),
    ("recurrence.halting.mode", "model.residual"): (
        (
            HALTING,
            "model.norm_position=post",
            "model.residual=admin",
        ),
        ("model.residual=plain",),
    ),
    ("recurrence.halting.mode", "temporal"): (
        (HALTING, TEMPORAL),
        ("recurrence.halting.mode=global",),
    ),
    ("temporal.chunk_length", "data.seq_length"): (
        (TEMPORAL, "temporal.chunk_length=129"),
        ("temporal.chunk_length=64",),
    ),
    ("temporal.chunk_length", "data.seq_length", "train.compile"): (
        (
            TEMPORAL,
            "temporal.chunk_length=48",
            "train.compile=true",
        ),
        ("temporal.chunk_length=64",),
    ),
    ("temporal.backward_chunks", "temporal.chunk_length", "data.seq_length"): (
        (TEMPORAL, "temporal.backward_chunks=5"),
        ("temporal.backward_chunks=4",),
    ),
    ("temporal.backward_chunks", "temporal.pooling", "task"): (
        (TEMPORAL, "temporal.backward_chunks=1"),
        ("temporal.backward_chunks=2",),
    ),
    ("temporal", "model.norm_position", "model.parallel_residual"): (
        (TEMPORAL, "model.norm_position=post"),
        ("model.norm_position=pre",),
    ),
    ("temporal.pooling", "task.pooling"): (
        (
            TEMPORAL,
            "temporal.pooling=mean",
            "task={kind: sequence, num_classes: 2, pooling: end}",
        ),
        ("task.pooling=mean",),
    ),
    ("temporal", "model.attention_softcap"): (
        (TEMPORAL, "model.attention_softcap=50"),
        ("model.attention_softcap=null",),
    ),
    ("temporal", "parallel.pipeline"): (
        (TEMPORAL, "parallel.pipeline=2"),
        ("parallel.pipeline=1",),
    ),
    ("temporal", "parallel.sequence_parallel"): (
        (TEMPORAL, "parallel={tensor: 2, sequence_parallel: true}"),
        ("parallel.sequence_parallel=false",),
    ),
    ("parallel.tensor", "temporal.update_ffn_hidden_size"): (
        (
            TEMPORAL,
            "parallel.tensor=4",
            "temporal.update_ffn_hidden_size=190",
        ),
        ("temporal.update_ffn_hidden_size=192",),
    ),
    ("model.causal", "task"): (("model.causal=false",), ("model.causal=true",)),
    ("model.causal", "task.targets"): (
        ("task={kind: token, targets: next_token}", "model.causal=false"),
        ("model.causal=true",),
    ),
    ("task", "exits"): (
        (
            CYCLE,
            TASK,
            "exits={}",
        ),
        ("exits=null",),
    ),
    ("task", "distill"): (
        (TASK, "distill={teacher: runs/teacher}"),
        ("distill=null",),
    ),
    ("task.pooling", "model.causal"): (
        (TASK, "task.pooling=first"),
        ("task.pooling=end",),
    ),
    ("task", "train.sample_prompts"): (
        (TASK, "train.sample_prompts=[The]"),
        ("train.sample_prompts=[]",),
    ),
    ("task", "model.logit_softcap"): (
        (TASK, "model.logit_softcap=30"),
        ("model.logit_softcap=null",),
    ),
    ("task", "data.mask_documents"): (
        (TASK, "data.mask_documents=false"),
        ("data.mask_documents=true",),
    ),
    ("task", "data.shuffle_shards"): (
        (TASK, "data.shuffle_shards=4"),
        ("data.shuffle_shards=0",),
    ),
    ("task", "data.train.remote", "data.val.remote"): (
        (TASK, "data.val=[{path: data/cache, remote: data/quickstart/val}]"),
        ("data.val=[{path: data/quickstart/val}]",),
    ),
    ("task.kind", "model.causal"): ((*PICTURES, "model.causal=true"), ("model.causal=false",)),
    ("data.seq_length", "task.image_size", "task.patch_size", "task.pooling"): (
        (*PICTURES, "task.pooling=class_token"),
        ("data.seq_length=65",),
    ),
    ("data.tokenizer", "task.kind"): (
        (*PICTURES, "data.tokenizer=bytes"),
        ("data.tokenizer=none",),
    ),
    ("data.tokenizer", "task"): (("data.tokenizer=none",), ("data.tokenizer=bytes",)),
    ("model.vocab_size", "task.kind"): (
        (*PICTURES, "model.vocab_size=9"),
        ("model.vocab_size=null",),
    ),
    ("model.scale_embeddings", "task.kind"): (
        (*PICTURES, "model.scale_embeddings=true"),
        ("model.scale_embeddings=false",),
    ),
    ("model.positions", "task.kind"): (
        ("model.positions=sinusoidal_2d",),
        ("model.positions=sinusoidal",),
    ),
    ("model.max_positions", "task.kind"): (
        (*PICTURES, "model.positions=learned", "model.max_positions=65"),
        ("model.max_positions=null",),
    ),
    ("task.pooling", "temporal"): (
        (*PICTURES, TEMPORAL, "task.pooling=class_token", "data.seq_length=65"),
        ("task.pooling=mean", "data.seq_length=64"),
    ),
    ("data.images", "task.kind"): (("data.images={workers: 0}",), ("data.images=null",)),
    ("data.images.mean", "data.images.std", "task.channels"): (
        (*PICTURES, "data.images={mean: [0.5], std: [0.2]}"),
        ("data.images={mean: null}",),
    ),
    ("data.images.eval_resize", "task.image_size"): (
        (*PICTURES, "data.images={eval_resize: 31}"),
        ("data.images={eval_resize: 32}",),
    ),
    ("objective.label_smoothing", "task"): (
        (TASK, "objective.label_smoothing=0.1"),
        ("objective.label_smoothing=0",),
    ),
    ("objective.label_smoothing", "distill"): (
        ("distill={teacher: runs/teacher}", "objective.label_smoothing=0.1"),
        ("distill=null",),
    ),
    ("objective.label_smoothing", "exits"): (
        (CYCLE, "exits={}", "objective.label_smoothing=0.1"),
        ("exits=null",),
    ),
    ("train.batch_tokens", "encoder"): (
        ("train.batch_tokens=4096", "train.micro_batch_size=1"),
        ("train.batch_tokens=null",),
    ),
    ("train.batch_tokens", "train.micro_batch_size"): (
        (ENCODER, "train.batch_tokens=4096"),
        ("train.micro_batch_size=1",),
    ),
    ("data.truncate", "encoder"): (("data.truncate=true",), ("data.truncate=false",)),
    ("encoder", "data.shuffle_shards"): (
        (ENCODER, "data.shuffle_shards=4"),
        ("data.shuffle_shards=0",),
    ),
    ("encoder", "data.mask_documents"): (
        (ENCODER, "data.mask_documents=false"),
        ("data.mask_documents=true",),
    ),
    ("encoder", "data.train.remote", "data.val.remote"): (
        (ENCODER, "data.val=[{path: data/cache, remote: data/quickstart/val}]"),
        ("data.val=[{path: data/quickstart/val}]",),
    ),
    ("exits", "recurrence.kind"): (
        ("exits={}",),
        (CYCLE,),
    ),
    ("exits", "recurrence.coda"): (
        ("exits={}", "recurrence={kind: loop, prelude: 1, core: 1, coda: 1, num_loops: 2}"),
        ("recurrence.coda=0",),
    ),
    ("exits", "recurrence.num_loops", "recurrence.depth"): (
        (
            LOOP,
            "recurrence.num_loops=1",
            "exits={}",
        ),
        ("recurrence.num_loops=2",),
    ),
    ("exits.coefficient", "recurrence.num_loops", "recurrence.curriculum"): (
        (
            LOOP,
            "recurrence.num_loops={sampler: uniform, max: 4}",
            "exits={coefficient: [0.1, 1.0]}",
        ),
        ("exits.coefficient=0.1",),
    ),
    ("exits.coefficient", "recurrence.num_loops", "recurrence.depth"): (
        (LOOP, "exits={coefficient: [0.1, 0.1, 1.0]}"),
        ("exits.coefficient=[0.1, 1.0]",),
    ),
    ("parallel.tensor", "model.num_heads"): (
        ("parallel.tensor=2", "model.num_heads=3", "model.num_kv_heads=1"),
        ("model.num_heads=4",),
    ),
    ("parallel.tensor", "model.num_kv_heads"): (
        ("parallel.tensor=2", "model={hidden_size: 192, num_heads: 6, num_kv_heads: 3}"),
        ("model.num_kv_heads=2",),
    ),
    ("parallel.tensor", "model.ffn_hidden_size"): (
        ("parallel.tensor=4", "model.ffn_hidden_size=510"),
        ("model.ffn_hidden_size=512",),
    ),
    ("parallel.tensor", "model.gate_hidden_size"): (
        ("parallel.tensor=4", "model.gate=true", "model.gate_hidden_size=510"),
        ("model.gate_hidden_size=512",),
    ),
    ("parallel.sequence_parallel", "parallel.tensor", "data.seq_length", "task.augment"): (
        ("parallel={tensor: 4, sequence_parallel: true}", "data.seq_length=126"),
        ("data.seq_length=128",),
    ),
    ("parallel.context", "data.seq_length"): (
        ("parallel.context=4", "data.seq_length=126"),
        ("parallel.context=2",),
    ),
    ("parallel.context", "parallel.tensor", "model.num_heads"): (
        ("parallel={context: 4, tensor: 2}",),
        ("parallel={context: 2, tensor: 2}",),
    ),
    ("parallel.context", "parallel.tensor", "model.num_kv_heads"): (
        ("parallel.context=2", "model={hidden_size: 192, num_heads: 6, num_kv_heads: 3}"),
        ("parallel.context=3", "data.seq_length=126"),
    ),
    ("parallel.context", "recurrence.halting.mode"): (
        (HALTING, "parallel.context=2"),
        ("parallel.context=1",),
    ),
    ("parallel.context", "temporal"): (
        (TEMPORAL, "parallel.context=2"),
        ("parallel.context=1",),
    ),
    ("parallel.context", "encoder"): (
        (ENCODER, "parallel.context=2"),
        ("parallel.context=1",),
    ),
    ("parallel.context", "task"): (
        (TASK, "parallel.context=2"),
        ("parallel.context=1",),
    ),
    ("parallel.pipeline", "recurrence", "encoder"): (
        ("parallel.pipeline=9",),
        ("parallel.pipeline=4",),
    ),
    ("parallel.pipeline", "model.shared_feed_forward"): (
        ("parallel.pipeline=2", "model.shared_feed_forward=true"),
        ("parallel.pipeline=1",),
    ),
    ("parallel.zero_stage", "parallel.pipeline"): (
        ("parallel={zero_stage: 3, zero_engine: deepspeed, pipeline: 2}",),
        ("parallel.zero_stage=1",),
    ),
    ("parallel.zero_stage", "train.precision"): (
        ("parallel={zero_stage: 1, zero_engine: deepspeed}", "train.precision=fp64"),
        ("parallel.zero_stage=0",),
    ),
    ("parallel.placement", "recurrence", "encoder"): (
        ("parallel.placement=[0, 0]",),
        ("parallel.placement=[0, 0, 0, 0]",),
    ),
    ("parallel.placement", "recurrence.final_norm_after_core"): (
        (CORE, "parallel={pipeline: 3, placement: [0, 1, 1, 2]}"),
        ("parallel.placement=[0, 1, 2, 2]",),
    ),
    ("optimizer.muon", "parallel.zero_stage", "parallel.zero_engine"): (
        ("optimizer.muon={}", "parallel={zero_stage: 1, zero_engine: deepspeed}"),
        ("parallel.zero_stage=0",),
    ),
    ("optimizer.schedule.warmup_steps", "optimizer.schedule.decay_steps", "train.steps"): (
        ("train.steps=4",),
        ("optimizer.schedule.warmup_steps=4",),
    ),
    ("checkpoint.keep_best", "data.val"): (
        ("checkpoint.keep_best=1", "data.val=[]"),
        ("checkpoint.keep_best=0",),
    ),
    ("alarms.action", "checkpoint.every"): (
        (ROLL_BACK, "checkpoint.every=0"),
        ("checkpoint.every=100",),
    ),
    ("alarms.action", "checkpoint.keep_last", "checkpoint.every", "train.log_every"): (
        (ROLL_BACK, "checkpoint={every: 4, keep_last: 2}"),
        ("checkpoint.keep_last=4",),
    ),
    ("model.sinusoid_layout", "model.positions", "model.level_encoding"): (
        ("model.sinusoid_layout=interleaved",),
        ("model.positions=sinusoidal",),
    ),
    ("encoder.final_norm_after_core", "recurrence"): (
        (of_encoder(CORE),),
        ("encoder.final_norm_after_core=false",),
    ),
    ("encoder", "task"): ((PAIRS, TASK), ("task=null",)),
    ("encoder", "temporal"): ((PAIRS, TEMPORAL), ("temporal=null",)),
    ("encoder", "distill"): ((PAIRS, "distill={teacher: runs/other}"), ("distill=null",)),
    ("encoder", "model.sliding_window"): (
        (PAIRS, "model.sliding_window=32"),
        ("model.sliding_window=null", "model.attention_types=[full]"),
    ),
    ("encoder", "model.parallel_residual"): (
        (PAIRS, "model.parallel_residual=true"),
        ("model.parallel_residual=false",),
    ),
    ("encoder", "train.sample_prompts"): (
        (PAIRS, "train.sample_prompts=[def]"),
        ("train.sample_prompts=[]",),
    ),
    ("train.eval_bleu", "encoder"): (("train.eval_bleu=8",), ("train.eval_bleu=0",)),
    ("train.eval_bleu", "parallel.pipeline"): (
        (PAIRS, "train.eval_bleu=8", "parallel.pipeline=2"),
        ("train.eval_bleu=0",),
    ),
    ("train.eval_bleu", "parallel.zero_stage"): (
        (PAIRS, "train.eval_bleu=8", "parallel.zero_stage=3"),
        ("parallel.zero_stage=2",),
    ),
    ("train.eval_tasks", "task", "encoder"): (
        (PAIRS, "train.eval_tasks={tasks: [piqa]}"),
        ("train.eval_tasks=null",),
    ),
    ("model.tie", "encoder"): (("model.tie=none",), (PAIRS,)),
    ("model.source_vocab_size", "model.tie", "encoder"): (
        (PAIRS, "model.source_vocab_size=99", "model.tie=all", "model.tie_embeddings=true"),
        ("model.tie=none", "model.tie_embeddings=false"),
    ),
}
"""Examples on configs/quickstart.yaml, by the keys of their rules."""

EXAMPLES |= {
    tuple(map(of_encoder, keys)): (tuple(map(of_encoder, broken)), tuple(map(of_encoder, cure)))
    for keys, (broken, cure) in EXAMPLES.items()
    if tuple(map(of_encoder, keys)) in {rule.keys for rule in PAIR_RULES} - EXAMPLES.keys()
}
WORLD_EXAMPLES: dict[tuple[str, ...], Example] = {
    ("parallel.tensor", "parallel.pipeline", "parallel.context"): (
        ("parallel.tensor=4",),
        ("parallel.tensor=2",),
    ),
    ("train.global_batch_size", "train.micro_batch_size"): (
        ("train.micro_batch_size=8",),
        ("train.micro_batch_size=4",),
    ),
    ("parallel.shard_group",): (
        ("parallel={zero_stage: 1, shard_group: 3}",),
        ("parallel.shard_group=2",),
    ),
}
"""Examples for two processes, by the keys of the rules about the number of processes."""
WALK_EXAMPLES: dict[tuple[str, ...], Example] = {
    ("exits", "recurrence.depth", "parallel.pipeline", "parallel.placement"): (
        (
            "recurrence={kind: cycle, num_blocks: 4, depth: 6}",
            "exits={}",
            "parallel={pipeline: 2, placement: [0, 0, 1, 1]}",
        ),
        ("recurrence.depth=8",),
    ),
    ("parallel.order", "parallel.pipeline", "parallel.placement", "recurrence"): (
        ("parallel={pipeline: 2, order: zbv}", CYCLE),
        ("parallel.order=auto",),
    ),
}
"""Examples by the keys of the rules about placement and walk."""
