"""Rules about the objective: tasks, label smoothing, exits and teachers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megarecur.config.objective import TaskConfig
from megarecur.config.recurrence import Cycle, Loop, Looped, RecurrenceConfig
from megarecur.config.rule import Rule
from megarecur.config.run import Config


def in_task(condition: Callable[[Config, TaskConfig], bool]) -> Callable[[Config], bool]:
    """Return a condition that applies only to runs with a task."""
    return lambda c: c.task is not None and condition(c, c.task)


def count_fixed_loops(recurrence: RecurrenceConfig) -> int | None:
    """Return the loops of a kind that can have exits; None if they differ from step to step."""
    if isinstance(recurrence, Cycle):
        return -(-recurrence.depth // recurrence.num_blocks)
    assert isinstance(recurrence, Looped)
    loops = recurrence.num_loops
    return loops if isinstance(loops, int) and recurrence.curriculum is None else None


def has_loops_to_exit(c: Config) -> bool:
    """Return True if a run with exits has loops to exit from."""
    coda = isinstance(c.recurrence, Loop) and c.recurrence.coda > 0
    return c.exits is not None and isinstance(c.recurrence, Cycle | Looped) and not coda


def find_wrong_weights(c: Config) -> Mapping[str, object]:
    """Return the number of loops of a run whose exits have a different number of coefficients."""
    if not has_loops_to_exit(c) or c.exits is None or not isinstance(c.exits.coefficient, tuple):
        return {}
    loops, given = count_fixed_loops(c.recurrence), len(c.exits.coefficient)
    wrong = loops is not None and loops > 1 and loops != given
    return {"loops": loops, "given": given} if wrong else {}


TASK_RULES = (
    Rule(
        keys=("model.causal", "task"),
        when=lambda c: c.task is None and not c.model.causal,
        reason="model.causal=false sees the next token, which it would have to predict",
        remedy="add a task section, or set causal to true",
    ),
    Rule(
        keys=("model.causal", "task.targets"),
        when=in_task(lambda c, task: not c.model.causal and task.targets == "next_token"),
        reason="model.causal=false sees the next token, which task.targets=next_token asks for",
        remedy="set causal to true, or leave targets out",
    ),
    Rule(
        keys=("task", "exits"),
        when=in_task(lambda c, task: c.exits is not None),
        reason="exits are for runs that predict text, which a task replaces",
        remedy="leave exits or task out",
    ),
    Rule(
        keys=("task", "distill"),
        when=in_task(lambda c, task: c.distill is not None),
        reason="distill is for runs that predict text, which a task replaces",
        remedy="leave distill or task out",
    ),
    Rule(
        keys=("task.pooling", "model.causal"),
        when=in_task(
            lambda c, task: c.model.causal and task.pooling == "first" and task.kind != "token"
        ),
        reason="task.pooling=first of a causal model (model.causal=true) has seen one token alone",
        remedy="set pooling to mean or end, or causal to false",
    ),
    Rule(
        keys=("task", "train.sample_prompts"),
        when=lambda c: c.classifies and bool(c.train.sample_prompts),
        reason="train.sample_prompts={train.sample_prompts} with a task: a classifier writes no "
        "text",
        remedy="leave sample_prompts or task out",
    ),
    Rule(
        keys=("task", "model.logit_softcap"),
        when=lambda c: c.classifies and c.model.logit_softcap is not None,
        reason="model.logit_softcap={model.logit_softcap} is for the vocabulary's head, which a "
        "task replaces",
        remedy="leave logit_softcap or task out",
    ),
    Rule(
        keys=("task", "data.mask_documents"),
        when=in_task(lambda c, task: not c.data.mask_documents),
        reason="data.mask_documents=false with a task: samples never read each other",
        remedy="leave mask_documents or task out",
    ),
    Rule(
        keys=("task", "data.shuffle_shards"),
        when=in_task(lambda c, task: bool(c.data.shuffle_shards)),
        reason="data.shuffle_shards={data.shuffle_shards} is for corpora of text, not of a task",
        remedy="leave shuffle_shards or task out",
    ),
    Rule(
        keys=("task", "data.train.remote", "data.val.remote"),
        when=in_task(lambda c, task: any(source.remote for source in (*c.data.train, *c.data.val))),
        reason="a remote is for corpora of text, not of a task",
        remedy="copy the corpus to this machine and leave remote out, or leave task out",
    ),
)
SMOOTHING_RULES = (
    Rule(
        keys=("objective.label_smoothing", "task"),
        when=lambda c: c.objective.label_smoothing > 0.0 and c.classifies,
        reason="objective.label_smoothing={objective.label_smoothing} is for the vocabulary's "
        "head, which a task replaces",
        remedy="leave label_smoothing or task out",
    ),
    Rule(
        keys=("objective.label_smoothing", "distill"),
        when=lambda c: c.objective.label_smoothing > 0.0 and c.distill is not None,
        reason="objective.label_smoothing={objective.label_smoothing} with distill: the teacher's "
        "distribution is the smooth target",
        remedy="leave label_smoothing or distill out",
    ),
    Rule(
        keys=("objective.label_smoothing", "exits"),
        when=lambda c: c.objective.label_smoothing > 0.0 and c.exits is not None,
        reason="objective.label_smoothing={objective.label_smoothing} with exits: the losses of "
        "exits are not smoothed",
        remedy="leave label_smoothing or exits out",
    ),
)
EXIT_RULES = (
    Rule(
        keys=("exits", "recurrence.kind"),
        when=lambda c: c.exits is not None and not isinstance(c.recurrence, Cycle | Looped),
        reason="exits: recurrence.kind={recurrence.kind} has no loops to exit after",
        remedy="leave exits out, or choose a kind that has: cycle, block_recurrence, or loop with "
        "coda=0",
    ),
    Rule(
        keys=("exits", "recurrence.coda"),
        when=lambda c: (
            c.exits is not None and isinstance(c.recurrence, Loop) and c.recurrence.coda > 0
        ),
        reason="exits: an exit after a loop of the core would skip recurrence.coda="
        "{recurrence.coda}",
        remedy="set coda to 0, or leave exits out",
    ),
    Rule(
        keys=("exits", "recurrence.num_loops", "recurrence.depth"),
        when=lambda c: has_loops_to_exit(c) and count_fixed_loops(c.recurrence) == 1,
        reason="exits: recurrence runs one loop, which has no earlier one to exit after",
        remedy="leave exits out, or run more loops",
    ),
    Rule(
        keys=("exits.coefficient", "recurrence.num_loops", "recurrence.curriculum"),
        when=lambda c: (
            has_loops_to_exit(c)
            and c.exits is not None
            and isinstance(c.exits.coefficient, tuple)
            and count_fixed_loops(c.recurrence) is None
        ),
        reason="exits.coefficient={exits.coefficient} has a number for each loop, but their number "
        "differs from step to step",
        remedy="give one number for all earlier loops",
    ),
    Rule(
        keys=("exits.coefficient", "recurrence.num_loops", "recurrence.depth"),
        when=find_wrong_weights,
        reason="exits.coefficient={exits.coefficient} has {given} numbers for {loops} loops",
        remedy="give one for every loop, the last one included, or one number for all earlier loops"
        "",
    ),
)
