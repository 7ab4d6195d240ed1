"""The sections `objective`, `exits`, `distill` and `task`: the loss, and objectives besides it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megarecur.config.base import Coefficient, Probability, Section, Size, free, show


class ObjectiveConfig(Section):
    """The loss of the vocabulary's head."""

    label_smoothing: Probability = 0.0
    """Share of a label's probability that training spreads over the vocabulary: the target is
    (1 - e) at the label plus e / V everywhere (Szegedy et al. 2016; Vaswani et al. 2017 use 0.1),
    as in torch. fairseq spreads its e over the V - 1 other ids, and is the same at e (V - 1) / V.
    `train/loss` and `val/loss` are without it."""


class ExitConfig(Section):
    """Early exits: the final norm and the head also run after every loop except the last (Bae et
    al. 2025, Relaxed Recursive Transformers). To post-train a run without exits, start a new run
    with init_from and this section; with the section from the start, exits are trained jointly.

    Kinds with loops: cycle (a loop is a pass over all blocks), block_recurrence, and loop without a
    coda, which an exit would skip. Loops without gradient have no exit in training.
    """

    mode: Literal["aggressive", "weighted"] = "aggressive"
    """Weight of the loss after each loop. aggressive: 1 after the last, `coefficient` after each
    earlier one. weighted: i over the sum of all i after loop i."""
    coefficient: Coefficient | Annotated[tuple[Coefficient, ...], Field(min_length=1)] = 0.1
    """Weight of earlier loops: one number for all of them; or, if the number of loops is fixed, a
    list with one for every loop, the last one included. 0: measured, not trained."""
    distill: bool = False
    """Train exits towards the last loop's distribution, which is detached, by the forward KL
    divergence instead of cross-entropy."""
    distill_weight: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Weight of the divergence in an exit's loss with `distill`; cross-entropy has the rest."""

    def find_problems(self) -> Iterator[str]:
        """Yield weights that another field overrides."""
        if self.mode == "weighted" and self.coefficient != 0.1:
            yield (
                f"coefficient={show(self.coefficient)} has no effect with mode=weighted; omit it, "
                "or set mode to aggressive"
            )
        if self.distill_weight != 1.0 and not self.distill:
            yield (
                f"distill_weight={self.distill_weight} has no effect without distill; set "
                "distill to true, or leave distill_weight out"
            )
        if isinstance(self.coefficient, tuple) and self.coefficient[-1] == 0.0:
            yield (
                f"coefficient={show(self.coefficient)} would not train the last loop, whose number "
                "must be above 0; raise the last number"
            )


class DistillConfig(Section):
    """Distillation from a frozen teacher's distributions (Hinton et al. 2015), micro batch by micro
    batch. With exits, the teacher trains the last loop; exits learn from that with
    exits.distill."""

    teacher: str | None = free(None, min_length=1)
    """RUN or RUN@STEP: a run of any kind with the same vocabulary and tokenizer, or a converted
    model. With a pipeline, the whole teacher is on the rank of the head. Default: `stored` is the
    teacher."""
    stored: str | None = free(None, min_length=1)
    """Folder of a teacher's distributions for this run's samples, made by `megarecur prep teacher`.
    Default: `teacher` runs in the process."""
    weight: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Weight of the divergence in the loss; cross-entropy has the rest. 1: the teacher alone."""
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    """Divisor of the logits of teacher and student; the divergence is multiplied by its square."""
    kind: Literal["forward_kl"] = "forward_kl"
    """Divergence: KL(teacher || student)."""
    fingerprint: str | None = None
    """Hash of the teacher's checkpoint. Filled in at the start of a run, which cannot resume with
    another teacher."""

    def find_problems(self) -> Iterator[str]:
        """Yield an error unless exactly one teacher is set."""
        if (self.teacher is None) == (self.stored is None):
            yield (
                f"teacher={show(self.teacher)} with stored={show(self.stored)}: one of them must "
                "be set; set teacher to a run, or stored to a folder of stored distributions"
            )


class TaskConfig(Section):
    """Classification of samples instead of text prediction (`megarecur prep task` makes the
    corpora). The head is the final norm, a hidden layer with ReLU and the classes; two classes are
    one logit."""

    kind: Literal["sequence", "pair", "token", "image"]
    """Unit that is classified. sequence: a class per sample, from its pooled state. pair: a class
    per two sequences, from [u; v; u*v; |u-v|] of their pooled states. token: a class at each token
    that has a label. image: a class per picture, read as a sequence of patches (`megarecur prep
    images` makes the corpora)."""
    targets: Literal["labels", "next_token"] = "labels"
    """Prediction target. next_token, of kind token: every next token, by the ordinary head; labels
    say which predictions are scored."""
    num_classes: Size | None = None
    """Number of classes of the corpora. Omitted only with targets next_token."""
    pooling: Literal["mean", "end", "first", "class_token"] = "mean"
    """Pooling of a sequence's states into one: their mean, the last one or the first one.
    class_token, for images: that of a learned token before the patches (Dosovitskiy et al.
    2021)."""
    head_size: Annotated[int, Field(ge=0, le=1 << 22)] | None = None
    """Width of the hidden layer; 0: no hidden layer. Default: model.hidden_size; for images 0."""
    image_size: Size | None = None
    """Height and width of the pictures that the model reads, in pixels. For images only."""
    patch_size: Size | None = None
    """Height and width of a patch, in pixels; image_size is a multiple. For images only."""
    channels: Literal[1, 3] | None = None
    """Channels of the pictures, for images only: 1, grey, or 3, red, green and blue. Default: 3
    for images."""
    augment: bool = False
    """Put a learned START before a sequence and a learned END after its last token."""
    truncate: bool = False
    """Cut sequences longer than data.seq_length. false: reject them."""

    def find_problems(self) -> Iterator[str]:
        """Yield options that contradict each other or have no effect."""
        next_token = self.targets == "next_token"
        if next_token and self.kind != "token":
            yield (
                f"targets=next_token is for kind=token, not {self.kind}; leave targets out, or set "
                "kind to token"
            )
        if next_token and self.num_classes is not None:
            yield (
                f"num_classes={self.num_classes} with targets=next_token: the classes are the "
                "vocabulary; leave num_classes out"
            )
        if not next_token and (self.num_classes is None or self.num_classes < 2):
            yield (
                f"num_classes={show(self.num_classes)} must be at least 2; set it to the number of "
                "classes of the corpora"
            )
        yield from self.find_image_problems()
        if self.kind == "token" and (self.augment or self.pooling != "mean"):
            yield (
                f"kind=token classifies single tokens, and augment={show(self.augment)} and "
                f"pooling={self.pooling} are for whole sequences; leave augment and pooling out"
            )

    def find_image_problems(self) -> Iterator[str]:
        """Yield fields that images need, and fields that are for images or for tokens only."""
        if self.kind != "image":
            for key in ("image_size", "patch_size", "channels"):
                if (value := getattr(self, key)) is not None:
                    yield f"{key}={value} is for kind=image, not {self.kind}; leave {key} out"
            if self.pooling == "class_token":
                yield (
                    f"pooling=class_token is for kind=image, not {self.kind}; set pooling to "
                    "mean, or set augment to true and pooling to first"
                )
            return
        if self.image_size is None or self.patch_size is None:
            yield (
                f"kind=image with image_size={show(self.image_size)} and patch_size="
                f"{show(self.patch_size)} needs both; set them, such as 32 and 4"
            )
        elif self.image_size % self.patch_size:
            yield (
                f"patch_size={self.patch_size} does not divide image_size={self.image_size}; "
                "choose a divisor"
            )
        if self.pooling not in ("mean", "class_token"):
            yield (
                f"pooling={self.pooling} is for sequences of tokens, not kind=image; set it to "
                "mean or class_token"
            )
        for key in ("augment", "truncate"):
            if getattr(self, key):
                yield f"{key}=true is for sequences of tokens, not kind=image; leave {key} out"

    @property
    def num_channels(self) -> int:
        """Channels of the pictures."""
        return self.channels or 3

    @property
    def grid_size(self) -> int:
        """Patches in a row, and rows of patches, of a picture."""
        assert self.image_size is not None and self.patch_size is not None
        return self.image_size // self.patch_size

    @property
    def has_class_token(self) -> bool:
        """True if a learned token stands before the patches."""
        return self.pooling == "class_token"

    @property
    def num_patches(self) -> int:
        """Patches of a picture."""
        return self.grid_size**2

    @property
    def pixels_per_patch(self) -> int:
        """Values of a patch, over its channels, rows and columns."""
        assert self.patch_size is not None
        return self.num_channels * self.patch_size**2
