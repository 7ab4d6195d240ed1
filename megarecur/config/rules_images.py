"""Rules about classification of pictures (task.kind image)."""

from __future__ import annotations

from collections.abc import Mapping

from megarecur.config.rule import Rule
from megarecur.config.run import NO_TOKENIZER, Config


def find_other_length(c: Config) -> Mapping[str, object]:
    """Return the positions of a picture if data.seq_length differs from them."""
    if not c.reads_images or c.task is None or not (c.task.image_size and c.task.patch_size):
        return {}
    positions = c.task.num_patches + c.task.has_class_token
    return {"positions": positions} if c.data.seq_length != positions else {}


def has_other_table(c: Config) -> bool:
    """Return True if the table of learned positions has other rows than a picture has positions."""
    rows = c.model.max_positions
    return c.model.positions == "learned" and rows is not None and rows > c.num_positions


IMAGE_RULES = (
    Rule(
        keys=("task.kind", "model.causal"),
        when=lambda c: c.reads_images and c.model.causal,
        reason="task.kind=image with model.causal=true: a patch would see only the patches above "
        "and to the left of it",
        remedy="set causal to false",
    ),
    Rule(
        keys=("data.seq_length", "task.image_size", "task.patch_size", "task.pooling"),
        when=find_other_length,
        reason="data.seq_length={data.seq_length} is not the number of positions of a picture "
        "({positions}: patches, and the class token with task.pooling=class_token)",
        remedy="omit it",
    ),
    Rule(
        keys=("data.tokenizer", "task.kind"),
        when=lambda c: c.reads_images and c.data.tokenizer != NO_TOKENIZER,
        reason="data.tokenizer={data.tokenizer} with task.kind=image: pictures are no text",
        remedy="omit it",
    ),
    Rule(
        keys=("data.tokenizer", "task"),
        when=lambda c: c.data.tokenizer == NO_TOKENIZER and not c.reads_images,
        reason="data.tokenizer=none is for pictures",
        remedy="name a tokenizer, or set task.kind to image",
    ),
    Rule(
        keys=("model.vocab_size", "task.kind"),
        when=lambda c: c.reads_images and c.model.vocab_size is not None,
        reason="model.vocab_size={model.vocab_size} with task.kind=image: a model of pictures has "
        "no vocabulary",
        remedy="omit it",
    ),
    Rule(
        keys=("model.scale_embeddings", "task.kind"),
        when=lambda c: c.reads_images and c.model.scale_embeddings,
        reason="model.scale_embeddings=true with task.kind=image: a model of pictures has no "
        "embedding of tokens",
        remedy="omit it",
    ),
    Rule(
        keys=("model.positions", "task.kind"),
        when=lambda c: c.model.positions == "sinusoidal_2d" and not c.reads_images,
        reason="model.positions=sinusoidal_2d is for pictures, and there is no task.kind=image",
        remedy="set positions to sinusoidal, or task.kind to image",
    ),
    Rule(
        keys=("model.max_positions", "task.kind"),
        when=lambda c: c.reads_images and has_other_table(c),
        reason="model.max_positions={model.max_positions} is above the positions of a picture "
        "(data.seq_length={data.seq_length})",
        remedy="omit it",
    ),
    Rule(
        keys=("task.pooling", "temporal"),
        when=lambda c: c.temporal is not None and c.task is not None and c.task.has_class_token,
        reason="task.pooling=class_token with temporal memory: the class token is in the first "
        "chunk, which sees no later one",
        remedy="set pooling to mean, or leave temporal out",
    ),
)
