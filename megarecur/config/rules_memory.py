"""Rules about halting and the temporal memory."""

from __future__ import annotations

from collections.abc import Mapping

from megarecur.config.rule import Rule
from megarecur.config.run import Config


def exceeds_chunks(c: Config) -> Mapping[str, object]:
    """Return the number of chunks per sequence if the backward pass would span more."""
    if c.temporal is None or c.temporal.backward_chunks is None:
        return {}
    chunks = -(-c.data.seq_length // c.temporal.chunk_length)
    return {"chunks": chunks} if c.temporal.backward_chunks > chunks else {}


HALTING_RULES = (
    Rule(
        keys=("recurrence.halting.mode", "parallel.sequence_parallel"),
        when=lambda c: c.halting is not None and c.parallel.sequence_parallel,
        reason="recurrence.halting.mode={recurrence.halting.mode} reads whole sequences, which "
        "parallel.sequence_parallel=true cuts",
        remedy="set sequence_parallel to false",
    ),
    Rule(
        keys=("recurrence.halting.mode", "train.compile"),
        when=lambda c: c.halting is not None and bool(c.train.compile),
        reason="train.compile={train.compile} with recurrence.halting.mode="
        "{recurrence.halting.mode} is not available in this version",
        remedy="set compile to false",
    ),
    Rule(
        keys=("recurrence.halting.mode", "adapters"),
        when=lambda c: c.halting is not None and c.adapters is not None,
        reason="adapters belong to one loop each, and with recurrence.halting.mode="
        "{recurrence.halting.mode} replicas may run different ones",
        remedy="leave adapters out, or set halting.mode to none",
    ),
    Rule(
        keys=("recurrence.halting.mode", "model.residual"),
        when=lambda c: c.halting is not None and c.model.residual == "admin",
        reason="the residual scales of model.residual=admin belong to one loop each, and with "
        "recurrence.halting.mode={recurrence.halting.mode} replicas may run different ones",
        remedy="set residual to plain, or halting.mode to none",
    ),
    Rule(
        keys=("recurrence.halting.mode", "temporal"),
        when=lambda c: (
            c.temporal is not None and c.halting is not None and c.halting.mode == "token"
        ),
        reason="recurrence.halting.mode=token with temporal memory is not available in this "
        "version",
        remedy="set halting.mode to global or none, or leave temporal out",
    ),
)
TEMPORAL_RULES = (
    Rule(
        keys=("temporal.chunk_length", "data.seq_length"),
        when=lambda c: c.temporal is not None and c.temporal.chunk_length > c.data.seq_length,
        reason="temporal.chunk_length={temporal.chunk_length} is above data.seq_length="
        "{data.seq_length}, so that no sequence has a second chunk",
        remedy="lower it, or leave temporal out",
    ),
    Rule(
        keys=("temporal.chunk_length", "data.seq_length", "train.compile"),
        when=lambda c: (
            c.temporal is not None
            and bool(c.train.compile)
            and c.data.seq_length % c.temporal.chunk_length != 0
        ),
        reason="temporal.chunk_length={temporal.chunk_length} must divide data.seq_length="
        "{data.seq_length} for train.compile={train.compile}, which takes chunks of one length",
        remedy="change one of them, or set compile to false",
    ),
    Rule(
        keys=("temporal.backward_chunks", "temporal.chunk_length", "data.seq_length"),
        when=exceeds_chunks,
        reason="temporal.backward_chunks={temporal.backward_chunks} is more than the {chunks} "
        "chunk(s) of a sequence",
        remedy="lower it to at most {chunks}, or omit it for the full backward",
    ),
    Rule(
        keys=("temporal.backward_chunks", "temporal.pooling", "task"),
        when=lambda c: (
            c.temporal is not None and c.temporal.backward_chunks == 1 and not c.reads_memory
        ),
        reason="temporal.backward_chunks=1 cuts the memory off wherever it is read, so that the "
        "layers that write it would never be trained",
        remedy="set it to 2 or more, or omit it",
    ),
    Rule(
        keys=("temporal", "model.norm_position", "model.parallel_residual"),
        when=lambda c: (
            c.temporal is not None and (c.model.norm_position != "pre" or c.model.parallel_residual)
        ),
        reason="temporal memory is read between attention and feed-forward, which needs "
        "model.norm_position=pre (it is {model.norm_position}) and model.parallel_residual=false",
        remedy="set norm_position to pre and parallel_residual to false, or leave temporal out",
    ),
    Rule(
        keys=("temporal.pooling", "task.pooling"),
        when=lambda c: c.reads_memory and c.task is not None and c.task.pooling != "mean",
        reason="task.pooling={task.pooling} with temporal.pooling={temporal.pooling}: the head "
        "reads one of them",
        remedy="leave the other out",
    ),
    Rule(
        keys=("temporal", "model.attention_softcap"),
        when=lambda c: c.temporal is not None and c.model.attention_softcap is not None,
        reason="model.attention_softcap={model.attention_softcap} with temporal memory is not "
        "available in this version",
        remedy="leave one of them out",
    ),
    Rule(
        keys=("temporal", "parallel.pipeline"),
        when=lambda c: c.temporal is not None and c.parallel.pipeline > 1,
        reason="temporal memory across more than one pipeline stage (parallel.pipeline="
        "{parallel.pipeline}) is not available in this version",
        remedy="set pipeline to 1",
    ),
    Rule(
        keys=("temporal", "parallel.sequence_parallel"),
        when=lambda c: c.temporal is not None and c.parallel.sequence_parallel,
        reason="parallel.sequence_parallel=true with temporal memory is not available in this "
        "version: a chunk is a piece of the sequence already",
        remedy="set sequence_parallel to false",
    ),
)
