"""Conflicts that the walk over pipeline ranks shows, as rows like those of config/rules.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megarecur.config.rule import Rule
from megarecur.config.rules import find_conflicts
from megarecur.config.rules_objective import EXIT_RULES
from megarecur.config.rules_run import PLACEMENT_RULES
from megarecur.config.run import Config
from megarecur.errors import MegarecurError
from megarecur.plan.describe import resolve_vocab_size
from megarecur.plan.placement import EXIT_REASON, EXIT_REMEDY, assign_blocks, find_exit_apart
from megarecur.plan.predict import list_walks
from megarecur.plan.simulate import ORDER_REASON, ORDER_REMEDY, find_unsuited
from megarecur.recurrence.schemes import build_map

Figures = Mapping[str, object]


def walk_rules(count_tokens: Callable[[str], int]) -> tuple[Rule, ...]:
    """Return the rules about placement and walk of a config with several pipeline ranks.

    Args:
        count_tokens: returns the size of a tokenizer's vocabulary, which placement weighs; its
            errors are reported elsewhere, and then the rules are not evaluated.
    """

    def when_placed(find: Callable[[Config], Figures]) -> Callable[[Config], Figures]:
        def find_in(c: Config) -> Figures:
            if c.parallel.pipeline == 1 or not can_be_placed(c):
                return {}
            try:
                return find(resolve_vocab_size(c, count_tokens))
            except MegarecurError:
                return {}

        return find_in

    return (
        Rule(
            keys=("exits", "recurrence.depth", "parallel.pipeline", "parallel.placement"),
            when=when_placed(find_exits),
            reason=EXIT_REASON,
            remedy=EXIT_REMEDY,
        ),
        Rule(
            keys=("parallel.order", "parallel.pipeline", "parallel.placement", "recurrence"),
            when=when_placed(find_order),
            reason=ORDER_REASON,
            remedy=ORDER_REMEDY,
        ),
    )


def can_be_placed(c: Config) -> bool:
    """Return True if a config keeps the rules without which its blocks cannot be placed."""
    schemes = [scheme for scheme in (c.recurrence, c.encoder) if scheme is not None]
    problems = [problem for part in (c.parallel, *schemes) for problem in part.find_problems()]
    return not problems and not find_conflicts(c, (*PLACEMENT_RULES, *EXIT_RULES))


def find_exits(config: Config) -> Figures:
    """Return the figures of EXIT_REASON if an exit is not on the rank of the head."""
    if config.exits is None:
        return {}
    steps = build_map(config)
    return find_exit_apart(steps, assign_blocks(config, steps))


def find_order(config: Config) -> Figures:
    """Return the figures of ORDER_REASON if the order does not suit the walk of some depth."""
    wanted = config.parallel.order
    if wanted in ("auto", "greedy"):
        return {}
    walks = list_walks(config, assign_blocks(config, build_map(config)))
    return next((found for walk in walks if (found := find_unsuited(walk, wanted))), {})
