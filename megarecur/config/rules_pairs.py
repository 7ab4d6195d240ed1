"""Rules about encoder-decoders: those about schemes, applied to the encoder's, and those about what
does not go together with an encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from megarecur.config.rule import Rule
from megarecur.config.rules_memory import HALTING_RULES
from megarecur.config.rules_model import MODEL_RULES
from megarecur.config.run import Config

NOT_OF_ENCODERS = (
    "train.eval_depths", "temporal", "recurrence.final_norm_after_core", "model.parallel_residual",
)  # fmt: skip
"""Keys of rules about schemes that do not apply to an encoder, or that a rule below replaces."""


def of_encoders(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """Return the rules about a scheme as rules about the encoder's."""
    return tuple(
        of_encoder(rule)
        for rule in rules
        if any(key.startswith("recurrence") for key in rule.keys)
        and not set(rule.keys) & set(NOT_OF_ENCODERS)
    )


def of_encoder(rule: Rule) -> Rule:
    """Return a rule about a scheme as a rule about the encoder's."""

    def when(c: Config) -> bool | Mapping[str, object]:
        return c.encoder is not None and rule.when(c.encoder_view())

    return replace(
        rule,
        keys=tuple(key.replace("recurrence", "encoder") for key in rule.keys),
        when=when,
        reason=rule.reason.replace("recurrence.", "encoder."),
        remedy=rule.remedy.replace("recurrence.", "encoder."),
    )


PAIR_RULES = (
    *of_encoders((*MODEL_RULES, *HALTING_RULES)),
    Rule(
        keys=("encoder.final_norm_after_core", "recurrence"),
        when=lambda c: bool(getattr(c.encoder, "final_norm_after_core", False)),
        reason="encoder.final_norm_after_core=true: the final norm belongs to the decoder",
        remedy="omit it",
    ),
    Rule(
        keys=("encoder", "task"),
        when=lambda c: c.encoder is not None and c.task is not None,
        reason="encoder with task: an encoder-decoder predicts target sentences",
        remedy="leave one of them out",
    ),
    Rule(
        keys=("encoder", "temporal"),
        when=lambda c: c.encoder is not None and c.temporal is not None,
        reason="encoder with temporal: a memory from chunk to chunk belongs to one stack",
        remedy="leave one of them out",
    ),
    Rule(
        keys=("encoder", "distill"),
        when=lambda c: c.encoder is not None and c.distill is not None,
        reason="encoder with distill is not available in this version",
        remedy="leave one of them out",
    ),
    Rule(
        keys=("encoder", "model.sliding_window"),
        when=lambda c: c.encoder is not None and c.model.sliding_window is not None,
        reason="encoder with model.sliding_window={model.sliding_window} is not available in this "
        "version",
        remedy="leave one of them out",
    ),
    Rule(
        keys=("encoder", "model.parallel_residual"),
        when=lambda c: c.encoder is not None and c.model.parallel_residual,
        reason="encoder with model.parallel_residual=true: a decoder's three branches run one "
        "after the other",
        remedy="set parallel_residual to false",
    ),
    Rule(
        keys=("encoder", "train.sample_prompts"),
        when=lambda c: c.encoder is not None and bool(c.train.sample_prompts),
        reason="encoder with train.sample_prompts: an encoder-decoder translates sentences and "
        "continues no prompt",
        remedy="leave sample_prompts out",
    ),
    Rule(
        keys=("train.eval_bleu", "encoder"),
        when=lambda c: c.train.eval_bleu > 0 and c.encoder is None,
        reason="train.eval_bleu={train.eval_bleu}: a model without an encoder translates no "
        "sentences",
        remedy="leave eval_bleu out, or add an encoder",
    ),
    Rule(
        keys=("train.eval_bleu", "parallel.pipeline"),
        when=lambda c: c.train.eval_bleu > 0 and c.parallel.pipeline > 1,
        reason="train.eval_bleu={train.eval_bleu} with parallel.pipeline={parallel.pipeline}: "
        "a token would pass all stages before the next one begins",
        remedy="set eval_bleu to 0 and translate checkpoints with `megarecur translate`, or set "
        "pipeline to 1",
    ),
    Rule(
        keys=("train.eval_bleu", "parallel.zero_stage"),
        when=lambda c: c.train.eval_bleu > 0 and c.parallel.zero_stage == 3,
        reason="train.eval_bleu={train.eval_bleu} with parallel.zero_stage=3: ranks gather "
        "parameters together, but translate sentences of other lengths",
        remedy="set eval_bleu to 0 and translate checkpoints with `megarecur translate`, or set "
        "zero_stage to 2",
    ),
    Rule(
        keys=("model.tie", "encoder"),
        when=lambda c: c.model.tie is not None and c.encoder is None,
        reason="model.tie={model.tie} is about the three tables of an encoder-decoder",
        remedy="set tie_embeddings instead, or add an encoder",
    ),
    Rule(
        keys=("model.source_vocab_size", "model.tie", "encoder"),
        when=lambda c: c.model.source_vocab_size is not None and not c.separate_source,
        reason="model.source_vocab_size={model.source_vocab_size} needs an embedding of source "
        "sentences that has a table of its own",
        remedy="set model.tie to none or decoder, or leave source_vocab_size out",
    ),
)
