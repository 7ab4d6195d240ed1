"""Rules about the model: positions, levels, adapters and loops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from megarecur.config.adapters import AdapterTarget
from megarecur.config.recurrence import Loop, Looped, Ring
from megarecur.config.rule import Rule
from megarecur.config.run import Config


def lacks_final_norm(c: Config) -> bool:
    """Return True if the output of the core needs a final norm that does not exist."""
    loop = c.recurrence
    return isinstance(loop, Loop) and loop.final_norm_after_core and not c.has_final_norm


def find_longest(c: Config) -> int:
    """Return the maximum number of positions that attention sees: of a sequence, or a chunk."""
    return c.num_positions if c.temporal is None else c.temporal.chunk_length


def exceeds_positions(c: Config) -> Mapping[str, object]:
    """Return the longest sequence if the learned position table is too short for it."""
    longest, rows = find_longest(c), c.model.max_positions
    if c.reads_images:  # Their positions are added before chunks are cut.
        longest = c.num_positions
    beyond = c.model.positions == "learned" and rows is not None and rows < longest
    return {"longest": longest} if beyond else {}


def exceeds_xpos(c: Config) -> Mapping[str, object]:
    """Return the longest sequence if xpos would scale keys beyond the range of floats."""
    longest = find_longest(c)
    beyond = c.model.positions == "xpos" and longest > 64 * c.model.xpos_scale_base
    return {"longest": longest} if beyond else {}


def has_signals(c: Config) -> bool:
    """Return True if levels have signals."""
    ring = c.recurrence
    return isinstance(ring, Ring) and bool(ring.level_rank or ring.feed_forward_rank)


def find_targets(c: Config, wanted: set[str]) -> Mapping[str, object]:
    """Return the linear layers among `wanted` that have adapters."""
    if c.adapters is None:
        return {}
    found = sorted(wanted & set(c.adapters.targets or get_args(AdapterTarget)))
    return {"targets": ", ".join(found)} if found else {}


def find_loops_beyond(c: Config) -> Mapping[str, object]:
    """Return evaluation depths beyond the last loop that has its own parameters."""
    if not (c.of_loops and isinstance(c.recurrence, Looped)) or c.recurrence.most_loops is None:
        return {}
    most = c.recurrence.most_loops
    beyond = [depth for depth in c.train.eval_depths if depth > most]
    return {"beyond": beyond, "owners": c.of_loops, "most": most} if beyond else {}


MODEL_RULES = (
    Rule(
        keys=("recurrence.final_norm_after_core", "model.norm_position", "model.final_norm"),
        when=lacks_final_norm,
        reason="recurrence.final_norm_after_core needs a final norm, which model.norm_position="
        "{model.norm_position} with model.final_norm={model.final_norm} does not have",
        remedy="set model.norm_position to pre or sandwich and model.final_norm to true, or leave "
        "final_norm_after_core out",
    ),
    Rule(
        keys=("model.max_positions", "data.seq_length", "temporal.chunk_length", "task.augment"),
        when=exceeds_positions,
        reason="model.max_positions={model.max_positions} is below the longest sequence or chunk "
        "({longest} positions, with a task's START and END)",
        remedy="raise it to {longest}, or omit it",
    ),
    Rule(
        keys=("model.xpos_scale_base", "data.seq_length", "temporal.chunk_length"),
        when=exceeds_xpos,
        reason="the longest sequence or chunk ({longest} positions) is above 64 x "
        "model.xpos_scale_base={model.xpos_scale_base}: keys would be scaled beyond what floats "
        "hold",
        remedy="raise xpos_scale_base",
    ),
    Rule(
        keys=("model.sinusoid_layout", "model.positions", "model.level_encoding"),
        when=lambda c: (
            c.model.sinusoid_layout != "split"
            and "sinusoidal" not in (c.model.positions, c.model.level_encoding)
        ),
        reason="model.sinusoid_layout={model.sinusoid_layout} has no effect without sinusoidal "
        "positions or levels",
        remedy="set model.positions to sinusoidal, or leave sinusoid_layout out",
    ),
    # ---------------------------------------------------------------------------------- levels
    Rule(
        keys=("recurrence.level_rank", "model.hidden_size"),
        when=lambda c: (
            isinstance(c.recurrence, Ring) and c.recurrence.level_rank > c.model.hidden_size
        ),
        reason="recurrence.level_rank={recurrence.level_rank} is above model.hidden_size="
        "{model.hidden_size}, the full rank of a level signal",
        remedy="set it to at most {model.hidden_size}",
    ),
    Rule(
        keys=("recurrence.feed_forward_rank", "model.hidden_size"),
        when=lambda c: (
            isinstance(c.recurrence, Ring) and c.recurrence.feed_forward_rank > c.model.hidden_size
        ),
        reason="recurrence.feed_forward_rank={recurrence.feed_forward_rank} is above "
        "model.hidden_size={model.hidden_size}, the full rank of a level signal",
        remedy="set it to at most {model.hidden_size}",
    ),
    Rule(
        keys=("recurrence.level_rank", "recurrence.feed_forward_rank", "model.norm_position"),
        when=lambda c: has_signals(c) and c.model.norm_position not in ("pre", "post"),
        reason="recurrence.level_rank={recurrence.level_rank}: level signals are defined for "
        "model.norm_position post and pre, not {model.norm_position}",
        remedy="set model.norm_position to one of them, or level_rank and feed_forward_rank to 0",
    ),
    Rule(
        keys=("recurrence.level_rank", "recurrence.feed_forward_rank", "model.parallel_residual"),
        when=lambda c: has_signals(c) and c.model.parallel_residual,
        reason="model.parallel_residual=true: level signals (recurrence.level_rank="
        "{recurrence.level_rank}) need attention and feed-forward one after the other",
        remedy="set parallel_residual to false, or level_rank and feed_forward_rank to 0",
    ),
    # -------------------------------------------------------------------------------- adapters
    Rule(
        keys=("adapters.norms", "recurrence.kind"),
        when=lambda c: (
            isinstance(c.recurrence, Ring) and c.adapters is not None and c.adapters.norms
        ),
        reason="adapters.norms=true: with recurrence.kind=ring every level has norms of its own",
        remedy="leave adapters.norms out",
    ),
    Rule(
        keys=("adapters.targets", "recurrence.level_rank"),
        when=lambda c: (
            find_targets(c, {"query", "key", "value"})
            if isinstance(c.recurrence, Ring) and c.recurrence.level_rank
            else False
        ),
        reason="adapters.targets: {targets} have level signals already "
        "(recurrence.level_rank={recurrence.level_rank})",
        remedy="name other targets, or set level_rank to 0",
    ),
    Rule(
        keys=("adapters.targets", "model.shared_feed_forward"),
        when=lambda c: (
            find_targets(c, {"gate", "up", "down"}) if c.model.shared_feed_forward else False
        ),
        reason="adapters.targets: {targets} of one feed-forward for all blocks "
        "(model.shared_feed_forward) cannot be adapted in this version",
        remedy="name other targets, or set shared_feed_forward to false",
    ),
    Rule(
        keys=("adapters.targets", "model.feed_forward"),
        when=lambda c: (
            c.adapters is not None and "gate" in (c.adapters.targets or ()) and not c.model.gated
        ),
        reason="adapters.targets={adapters.targets}: model.feed_forward={model.feed_forward} has "
        "no gate",
        remedy="leave gate out",
    ),
    # ----------------------------------------------------------------------------------- loops
    Rule(
        keys=("recurrence.num_loops", "adapters", "model.residual"),
        when=lambda c: (
            {"owners": c.of_loops}
            if c.of_loops and isinstance(c.recurrence, Looped) and c.recurrence.most_loops is None
            else False
        ),
        reason="{owners} belong to one loop each, and recurrence.num_loops.sampler="
        "{recurrence.num_loops.sampler} has no largest number of loops",
        remedy="give its sampler a max, or leave {owners} out",
    ),
    Rule(
        keys=("train.eval_depths", "recurrence.num_loops", "adapters", "model.residual"),
        when=find_loops_beyond,
        reason="train.eval_depths={beyond}: {owners} are there for {most} loops",
        remedy="leave out depths above {most}",
    ),
    Rule(
        keys=("train.eval_depths", "recurrence.kind"),
        when=lambda c: bool(c.train.eval_depths) and not isinstance(c.recurrence, Looped),
        reason="train.eval_depths={train.eval_depths}: recurrence.kind={recurrence.kind} has no "
        "loops",
        remedy="leave eval_depths out",
    ),
)
