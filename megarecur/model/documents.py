"""The documents of packed samples: their starts, their lengths, and means over them.

Shapes: B samples, S positions, D hidden, U max documents per sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """The documents of each sample. Halting treats each separately and reads means over each."""

    real_BS: Tensor
    """Mask of tokens that are not padding."""
    length_BS: Tensor
    """Length of each token's document, in tokens; 1 at padding."""
    start_BS: Tensor
    """Position in the sample at which each token's document begins."""
    number_BS: Tensor
    """Number of each token's document within its sample, from 0."""
    most: int
    """U, the max documents per sample."""

    def select(self, rows: Tensor) -> Documents:
        """Return the documents of the samples `rows`, in this order."""
        return Documents(
            self.real_BS[rows],
            self.length_BS[rows],
            self.start_BS[rows],
            self.number_BS[rows],
            self.most,
        )


def begin_BS(documents_BS: Tensor) -> Tensor:
    """Return a mask of the first token of each document; padding (-1) begins none."""
    before_BS = F.pad(documents_BS[:, :-1], (1, 0), value=-1)
    return (documents_BS >= 0) & (documents_BS != before_BS)


def find_documents(documents_BS: Tensor | None, positions_BS: Tensor) -> Documents:
    """Return the documents, which are runs of equal numbers; None: every sample is one document."""
    batch, length = positions_BS.shape
    if documents_BS is None:
        zeros_BS = torch.zeros_like(positions_BS)
        real_BS = torch.ones_like(positions_BS, dtype=torch.bool)
        return Documents(real_BS, zeros_BS + length, zeros_BS, zeros_BS, 1)
    begins_BS, real_BS = begin_BS(documents_BS), documents_BS >= 0
    number_BS = (begins_BS.cumsum(1) - 1).clamp(min=0)
    most = int(number_BS.max()) + 1
    counts_BU = torch.zeros(batch, most, dtype=torch.long, device=documents_BS.device)
    counts_BU.scatter_add_(1, number_BS, real_BS.long())
    places = torch.arange(length, device=documents_BS.device)
    start_BS = torch.where(begins_BS, places, 0).cummax(1).values
    return Documents(
        real_BS, counts_BU.gather(1, number_BS).clamp(min=1), start_BS, number_BS, most
    )


def mean_so_far(x_BSD: Tensor, documents: Documents) -> Tensor:
    """Return [B, S, D]: for every token, the mean over its document up to and including itself."""
    sums_BSD = x_BSD.cumsum(1)
    places_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
    counts_BS = places_S - documents.start_BS + 1
    if documents.most > 1:
        before_BS = (documents.start_BS - 1).clamp(min=0)
        index = before_BS[..., None].expand_as(sums_BSD)
        first = (documents.start_BS == 0)[..., None]
        sums_BSD = sums_BSD - torch.where(first, 0.0, sums_BSD.gather(1, index))
    return sums_BSD / counts_BS[..., None]


def mean_of_documents(x_BSD: Tensor, documents: Documents) -> Tensor:
    """Return [B, U, D]: the mean over each document's tokens; 0 where a sample has fewer than U."""
    shares_BS = documents.real_BS / documents.length_BS.to(x_BSD.dtype)
    own = torch.arange(documents.most, device=x_BSD.device)[None, :, None]
    shares_BUS = torch.where(documents.number_BS[:, None, :] == own, shares_BS[:, None, :], 0.0)
    return shares_BUS @ x_BSD
