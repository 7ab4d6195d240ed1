"""The stacks of a model: a decoder, and below it an encoder if the config has one.

Each stack has a scheme of its own. Its blocks are numbered after those of the stack before it, so
that block numbers are unique in a model.
"""

from __future__ import annotations

from dataclasses import dataclass

from megarecur.config.recurrence import RecurrenceConfig
from megarecur.config.run import Config
from megarecur.recurrence.layer_map import StackName


@dataclass(frozen=True)
class Stack:
    """One stack of a model."""

    name: StackName
    config: Config
    """The run as the stack sees it: `recurrence` and `model.causal` are its own."""
    first: int = 0
    """Number of its first block."""
    cross: bool = False
    """Whether its blocks attend to the output of the encoder."""

    @property
    def recurrence(self) -> RecurrenceConfig:
        """The scheme of the stack."""
        return self.config.recurrence

    @property
    def blocks(self) -> range:
        """Numbers of its blocks."""
        return range(self.first, self.first + self.recurrence.num_blocks)


def list_stacks(config: Config) -> tuple[Stack, ...]:
    """Return the stacks of a model, in the order in which they run."""
    if config.encoder is None:
        return (Stack("decoder", config),)
    decoder = config.model_copy(update={"encoder": None})
    first = config.encoder.num_blocks
    return Stack("encoder", config.encoder_view()), Stack("decoder", decoder, first, cross=True)


def stack_of(config: Config, block: int) -> Stack:
    """Return the stack that a block belongs to."""
    return next(stack for stack in list_stacks(config) if block in stack.blocks)
