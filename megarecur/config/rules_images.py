"""Rules about classification of pictures: the model (task.kind image) and how they are read
(data.images)."""

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


def find_other_channels(c: Config) -> Mapping[str, object]:
    """Return the numbers of channels of the statistics and of the pictures, if they differ."""
    if c.task is None or c.data.images is None or c.data.images.mean is None:
        return {}
    given, channels = len(c.data.images.mean), c.task.num_channels
    return {"given": given, "channels": channels} if given != channels else {}


def resizes_too_small(c: Config) -> bool:
    """Return True if evaluation resizes pictures below the size that the model reads."""
    images, size = c.data.images, None if c.task is None else c.task.image_size
    return (
        size is not None
        and images is not None
        and images.eval_resize is not None
        and images.eval_resize < size
    )


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
    Rule(
        keys=("data.images", "task.kind"),
        when=lambda c: c.data.images is not None and (c.task is None or c.task.kind != "image"),
        reason="data.images: how pictures are read, but the run has no task.kind=image",
        remedy="leave data.images out, or set task.kind to image",
    ),
    Rule(
        keys=("data.images.mean", "data.images.std", "task.channels"),
        when=find_other_channels,
        reason="data.images.mean={data.images.mean} has {given} channel(s), but pictures have "
        "{channels} (task.channels)",
        remedy="give one number for each channel, or leave mean and std out",
    ),
    Rule(
        keys=("data.images.eval_resize", "task.image_size"),
        when=resizes_too_small,
        reason="data.images.eval_resize={data.images.eval_resize} is below task.image_size="
        "{task.image_size}: nothing would be left to cut out",
        remedy="raise it to at least {task.image_size}, or omit it",
    ),
)
