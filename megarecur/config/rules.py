"""The table of conflicts between sections of a config, one row each.

`find_conflicts` evaluates all rows. A page of the documentation is generated from these rows
(`docs/config_pages.py`), and a test breaks and cures each of them by an example.
"""

from __future__ import annotations

from collections.abc import Sequence

from megarecur.config.rule import Rule
from megarecur.config.rules_attention import ATTENTION_RULES
from megarecur.config.rules_batches import BATCH_RULES
from megarecur.config.rules_images import IMAGE_RULES
from megarecur.config.rules_memory import HALTING_RULES, TEMPORAL_RULES
from megarecur.config.rules_model import MODEL_RULES
from megarecur.config.rules_objective import EXIT_RULES, SMOOTHING_RULES, TASK_RULES
from megarecur.config.rules_pairs import PAIR_RULES
from megarecur.config.rules_run import (
    CHECKPOINT_RULES,
    EVAL_TASKS_RULES,
    OPTIMIZER_RULES,
    PARALLEL_RULES,
)
from megarecur.config.run import Config

RULES = (
    *MODEL_RULES,
    *ATTENTION_RULES,
    *HALTING_RULES,
    *PAIR_RULES,
    *BATCH_RULES,
    *TEMPORAL_RULES,
    *TASK_RULES,
    *IMAGE_RULES,
    *SMOOTHING_RULES,
    *EXIT_RULES,
    *PARALLEL_RULES,
    *OPTIMIZER_RULES,
    *CHECKPOINT_RULES,
    *EVAL_TASKS_RULES,
)


def find_conflicts(config: Config, rules: Sequence[Rule] = RULES) -> list[str]:
    """Return the conflicts in a config, one message with its remedy for each broken rule.

    Rules about values that cannot be read (see `base.Section`) are skipped.
    """
    return [message for rule in rules if (message := rule.explain(config))]


def find_compile_conflict(config: Config) -> str | None:
    """Return the first reason why a config cannot be compiled; None if there is none."""
    forced = config.train.model_copy(update={"compile": True})
    return next(iter(find_conflicts(config.model_copy(update={"train": forced}))), None)
