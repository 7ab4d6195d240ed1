"""The micro batch as the model reads it. Shapes: B samples, S positions."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megarecur.attention.documents import Boundaries

START, END = -1, -2
"""Ids of a task's learned START and END tokens."""


class Sentences(Protocol):
    """The interface of tokens in documents: the source sentences that an encoder reads, one to a
    row, or the part of a micro batch that it shares with them."""

    @property
    def tokens_BS(self) -> Tensor:
        """Ids."""

    @property
    def positions_BS(self) -> Tensor:
        """Positions of the tokens in their documents."""

    @property
    def documents_BS(self) -> Tensor:
        """Index of each token's document within its sample; -1 for padding."""

    @property
    def boundaries(self) -> Boundaries | None:
        """The boundaries of the documents; None: counted from `documents_BS` where needed."""

    @property
    def single_document(self) -> bool:
        """True if every sample is one document, without padding."""


class Batch(Sentences, Protocol):
    """The interface of a micro batch that the model reads."""

    @property
    def labels_BS(self) -> Tensor:
        """Ids of the next tokens, or IGNORED."""

    @property
    def sample_ids_B(self) -> Tensor:
        """Global sample ids."""

    @property
    def source(self) -> Sentences | None:
        """The source sentences of an encoder-decoder; None without an encoder."""

    @property
    def pixels_BCHW(self) -> Tensor | None:
        """The pictures, normalised; None where samples are tokens."""
