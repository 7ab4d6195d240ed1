"""The decoder of a translation model as beam search uses it, and its cross-attention.

    decoder = TranslationDecoder(model, steps, collate_sources(sources))
    beam_search(decoder, len(sources), beam=4, ...)

Shapes: B sentences, R rows (hypotheses), S target positions, K source positions, N heads,
H head_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megarecur.data.loader import SourceSentences
from megarecur.data.pairs import pad_sources
from megarecur.inference.cache import Cache, context_after
from megarecur.model.attention import CrossAttention
from megarecur.model.context import CrossView, see_source
from megarecur.model.transformer import Transformer
from megarecur.recurrence.layer_map import LayerMap, Step


def collate_sources(sources: Sequence[Sequence[int]]) -> SourceSentences:
    """Return sentences, each with its end token, padded to the longest."""
    # Padding is seen by no token, so that its id does not matter.
    return pad_sources([np.array(ids, np.int64) for ids in sources], pad_id=0)


class TranslationDecoder:
    """A decoder of many hypotheses (`beam.StepDecoder`), for the sentences of one batch.

    Keys and values of the target are kept by (block, loop) and reordered with the hypotheses. Those
    of source sentences are made once per sentence and use of a block; each hypothesis has a copy,
    made when its search begins and when a sentence of the batch has ended.

    Args:
        model: the whole model; with tensor parallelism this rank's part, and all ranks make the
            same calls.
        steps: the map.
        source: the source sentences, on the model's device.
        banned: ids that are never predicted, such as rows of the vocabulary without a piece.
        use_cache: keep keys and values; False recomputes all of them for every token.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Transformer,
        steps: LayerMap,
        source: SourceSentences,
        *,
        banned: Collection[int] = (),
        use_cache: bool = True,
    ) -> None:
        self.model, self.steps, self.source = model, steps, source
        device = source.tokens_BS.device
        self.banned = torch.tensor(sorted(banned), dtype=torch.long, device=device)
        with model.tp.whole_sequences():
            # A random initial state is the same for every sentence, whatever its batch and beam.
            same_B = torch.zeros(len(source.tokens_BS), dtype=torch.long, device=device)
            self.encoded = model.encode(steps, source, same_B)
        self.cache = Cache() if use_cache else None
        self.sentences_R = torch.arange(len(source.tokens_BS), device=device)
        """The sentence of each row."""
        self.history_RS = torch.empty(len(self.sentences_R), 0, dtype=torch.long, device=device)
        """Tokens of each row, without a cache."""
        self.cross = self.look_at(self.sentences_R)

    def look_at(self, sentences_R: Tensor) -> CrossView:
        """Return the view of rows whose queries see the tokens of their sentences."""
        model, source = self.model, self.source
        rows = replace(
            source,
            tokens_BS=source.tokens_BS[sentences_R],
            documents_BS=source.documents_BS[sentences_R],
        )
        # A query is one token: a mask is as small as the documents, and one product serves all.
        seen = see_source(rows, (len(sentences_R), 1), "dense", model.dtype, separates=True)
        return CrossView(seen, self.cache)

    @torch.no_grad()
    def advance(self, tokens_R: Tensor, parents_R: Tensor) -> Tensor:
        """Append a token to each row; return log probabilities [R, V] of the next tokens, fp32 or
        fp64. Arguments: see `beam.StepDecoder`."""
        sentences_R = self.sentences_R[parents_R]
        moved = not torch.equal(sentences_R, self.sentences_R)
        if self.cache is None:
            self.history_RS = torch.cat([self.history_RS[parents_R], tokens_R[:, None]], 1)
        elif moved or not torch.equal(parents_R, torch.arange(len(parents_R)).to(parents_R)):
            self.cache.select(parents_R, of_source=moved)
        if moved:
            self.sentences_R, self.cross = sentences_R, self.look_at(sentences_R)
        new_RS = self.history_RS if self.cache is None else tokens_R[:, None]
        same_R = torch.zeros_like(sentences_R)
        seed = self.model.config.seed
        ctx = context_after(self.model, new_RS, self.cache, seed, same_R)
        ctx = replace(ctx, cross=self.cross)
        # With a cache, the encoder's output is read in the first call only.
        encoded = self.encoded if self.cache is not None else self.encoded[sentences_R]
        with self.model.tp.whole_sequences():
            x = self.model.decode(self.steps, new_RS, encoded, ctx)
            logits_RV = self.model.all_logits(x[:, -1:])[:, 0]
        if self.cache is not None:
            self.cache.advance(1)
        wide = torch.promote_types(logits_RV.dtype, torch.float32)
        return logits_RV.log_softmax(-1, dtype=wide).index_fill_(-1, self.banned, -torch.inf)


# -------------------------------------------------------------------------------- cross-attention


@dataclass(frozen=True)
class CrossUse:
    """The cross-attention of one use of a block, for one sentence."""

    block: int
    loop: int
    weights_SK: NDArray[np.float32]
    """Weights of source tokens for each predicted target token, mean over heads; rows sum to 1."""


@torch.no_grad()
def read_cross_attention(
    model: Transformer, steps: LayerMap, source: Sequence[int], target: Sequence[int]
) -> list[CrossUse]:
    """Return the cross-attention of every use of a decoder block, in the order of the map.

    Args:
        source: ids of a sentence, with its end token.
        target: ids that the decoder reads, from the start token on; the row of each is its
            attention while the next token is predicted.
    """
    device = next(model.parameters()).device
    sentence = collate_sources([source]).to(device)
    encoded, cache, uses = model.encode(steps, sentence), Cache(), list[CrossUse]()
    tokens_1S = torch.tensor([list(target)], device=device)
    ctx = context_after(model, tokens_1S, None, source=sentence)
    assert ctx.cross is not None
    ctx = replace(ctx, cross=replace(ctx.cross, cache=cache))
    with recording(model, uses):
        model.decode(steps, tokens_1S, encoded, ctx)
    return uses


@contextmanager
def recording(model: Transformer, uses: list[CrossUse]) -> Iterator[None]:
    """Append the weights of each cross-attention that runs in this context, of one sentence whose
    keys are in the view's cache."""

    def record(module: CrossAttention, given: tuple[Any, ...], out: Tensor) -> None:
        x_1SD, _, view, _, _, step = given
        assert isinstance(step, Step) and view.cache is not None
        kept = view.cache.find((step.block, step.loop_index))
        assert kept is not None
        q_NSH = module.query(x_1SD)[0].unflatten(-1, (-1, module.head_dim)).transpose(0, 1)
        k_NKH = kept[0][0].transpose(0, 1)
        k_NKH = k_NKH.repeat_interleave(len(q_NSH) // len(k_NKH), 0)
        scores_NSK = (q_NSH @ k_NKH.transpose(1, 2)).float() * module.scores.scale
        if (cap := module.scores.softcap) is not None:
            scores_NSK = cap * torch.tanh(scores_NSK / cap)
        weights_SK = scores_NSK.softmax(-1).mean(0).cpu().numpy()
        uses.append(CrossUse(step.block, step.loop_index, weights_SK))

    hooks = [
        module.register_forward_hook(record)
        for module in model.modules()
        if isinstance(module, CrossAttention)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
