"""The section `data.images`: how pictures are read, augmented and normalised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megarecur.config.base import Section, Size, free, show

Pixels = Annotated[int, Field(ge=0, le=1 << 16)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Ratio = Annotated[float, Field(ge=1e-2, le=1e2)]
Channels = Annotated[tuple[float, ...], Field(min_length=1, max_length=3)]


class ImagesConfig(Section):
    """Reading of pictures, for task.kind image. Training augments each picture by a function of
    (seed, picture, epoch), in this order: crop, flip, trivial_augment. Evaluation resizes the short
    side and cuts out the centre. The definitions are torchvision's."""

    crop: Literal["none", "padded", "resized"] = "none"
    """Crop to task.image_size in training. none: pictures must have that size. padded: a random
    window of the picture with `padding` black pixels around it (CIFAR's recipe). resized: a random
    window of random area and aspect ratio, resized (Inception's recipe, for photographs)."""
    padding: Pixels = 4
    """Black pixels on each side, for crop=padded."""
    scale: tuple[Share, Share] = (0.08, 1.0)
    """Smallest and largest share of the picture's area, for crop=resized."""
    ratio: tuple[Ratio, Ratio] = (0.75, 1.3333333333333333)
    """Smallest and largest ratio of width to height, for crop=resized."""
    flip: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Probability of a flip from left to right; 0 where sides matter, as in digits."""
    trivial_augment: bool = False
    """Apply one random operation of random strength (TrivialAugmentWide: Müller and Hutter
    2021)."""
    mean: Channels | None = None
    """Mean of each channel, of values in [0, 1], that is subtracted. Default: as measured over the
    training pictures; filled in at the start of a run."""
    std: Channels | None = None
    """Standard deviation of each channel, by which values are then divided. Default: as
    measured."""
    eval_resize: Size | None = free(None)
    """Short side to which pictures are resized in evaluation, before the centre is cut out.
    Default: task.image_size."""
    workers: Annotated[int, Field(ge=0, le=1024)] = free(2)
    """Processes per rank that decode and augment ahead of the model. 0: the loader's thread does.
    The result is the same with any number."""

    def find_problems(self) -> Iterator[str]:
        """Yield intervals that are empty, options without effect, and incomplete statistics."""
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                yield f"{name}={show((low, high))} must ascend; swap its numbers"
            if self.crop != "resized" and (low, high) != ImagesConfig.model_fields[name].default:
                yield f"{name} is for crop=resized, not {self.crop}; leave {name} out"
        if self.crop != "padded" and self.padding != ImagesConfig.model_fields["padding"].default:
            yield f"padding={self.padding} is for crop=padded, not {self.crop}; leave padding out"
        if (self.mean is None) != (self.std is None):
            yield (
                f"mean={show(self.mean)} with std={show(self.std)}: one without the other; set "
                "both, or leave both out"
            )
        elif self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            yield (
                f"mean={show(self.mean)} and std={show(self.std)} have different numbers of "
                "channels; give one number for each channel"
            )
        if self.std is not None and min(self.std) <= 0.0:
            yield f"std={show(self.std)} must be above 0; correct it"


NO_AUGMENTATION = ImagesConfig(flip=0.0)
"""The reading of pictures without the section `data.images`."""
