"""Log-likelihoods of continuations, batched by length.

    found = score_continuations(model, [Pair((5, 6), (7,)), Pair((5,), (6, 8))])

Shapes: B samples, S positions, D hidden, V vocabulary, N positions that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.errors import ConfigError
from megarecur.inference.generate import run_forward
from megarecur.model.transformer import Transformer
from megarecur.parallel.loss import IGNORED
from megarecur.parallel.mesh import Mesh
from megarecur.plan.schedule import Scheduled, Schedules
from megarecur.recurrence.depth import refuse_depth

Advance = Callable[[int], object]
"""Called with the number of requests that have been answered since the last call."""


def advance_nothing(done: int) -> None:
    """Ignore progress."""


class Pair(NamedTuple):
    """A continuation to score, and the text before it; both have at least one token."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Likelihood(NamedTuple):
    """The score of a continuation."""

    log_likelihood: float
    """Sum of the log-probabilities of its tokens, in nats."""
    is_greedy: bool
    """Whether each token is the likeliest one at its place."""


Rows = list[tuple[tuple[int, ...], list[int]]]
"""Inputs of the model, and the numbers of the pairs that each of them scores."""


def find_most_positions(config: Config) -> int | None:
    """Return the maximum number of tokens that a model reads, as its exports state it; None if
    positions have no limit."""
    if config.temporal is not None:
        return None
    trained = config.data.seq_length if config.model.positions == "learned" else None
    return config.model.max_positions or trained


def refuse_scoring(config: Config, num_loops: int | None) -> str:
    """Return why a model scores no continuations; "" if it does."""
    if config.encoder is not None:
        return (
            "encoder: the run is an encoder-decoder, which scores no plain text; score its "
            "translations with `megarecur translate`"
        )
    if config.classifies:
        return (
            "task: the run is a classifier without a language-model head; score it with "
            "`megarecur eval` on corpora of its task"
        )
    if not config.model.causal:
        return "model.causal=false: tokens see later ones; use a run with causal=true"
    return "" if num_loops is None else refuse_depth(config, num_loops)


@torch.no_grad()
def score_continuations(
    model: Transformer,
    pairs: Sequence[Pair],
    *,
    num_loops: int | None = None,
    most_positions: int | None = None,
    batch_size: int = 64,
    batch_tokens: int = 8192,
    advance: Advance = advance_nothing,
    mesh: Mesh | None = None,
    schedules: Schedules | None = None,
) -> list[Likelihood]:
    """Return the log-likelihoods of continuations, in the order of `pairs`; collective.

    Long texts are scored first. Pairs of equal input, such as choices of one token, share a row.
    Replicas score different batches, which do not depend on their number.

    Args:
        model: this rank's part; all ranks pass the same pairs and options.
        num_loops: loops to run instead of the trained number, if the scheme repeats a group.
        most_positions: maximum number of tokens that the model reads; a longer context is cut from
            the left. None: `find_most_positions`.
        batch_size: maximum number of samples of a batch.
        batch_tokens: maximum number of tokens of a batch of several samples, padding included.
        advance: called with the number of pairs that a batch of each replica has scored.
        mesh: the ranks; None: one process.
        schedules: the walks of the run; None builds them.

    Raises:
        ConfigError: the model predicts no text, the depth has no parameters, or a continuation is
            longer than the positions.
    """
    config = model.config
    if refusal := refuse_scoring(config, num_loops):
        raise ConfigError(f"cannot score text: {refusal}")
    limit = most_positions or find_most_positions(config)
    mesh = mesh or Mesh(device=next(model.parameters()).device)
    scheduled = (schedules or Schedules(config)).forward(num_loops)
    found: dict[int, Likelihood] = {}
    batches = list(split_batches(pairs, limit, batch_size, batch_tokens))
    for first in range(0, len(batches), mesh.dp):
        # Those of a context have no positions of their own here, so they are replicas too.
        group = batches[first : first + mesh.dp]
        # A replica without a batch repeats one: ZeRO 3 gathers weights on all ranks at once.
        found |= score_rows(model, mesh, scheduled, group[mesh.dp_rank % len(group)], pairs)
        advance(sum(len(own) for rows in group for _, own in rows))
    for others in mesh.gather_objects(found):
        found |= others
    return [found[number] for number in range(len(pairs))]


def split_batches(
    pairs: Sequence[Pair], limit: int | None, batch_size: int, batch_tokens: int
) -> Iterator[Rows]:
    """Yield the rows of batches, those of long texts first.

    Raises:
        ConfigError: see `score_continuations`.
    """
    numbers: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        if limit is not None and len(continuation) > limit:
            raise ConfigError(
                f"a continuation of {len(continuation)} tokens exceeds the {limit} positions of "
                "the model; use a model with more positions"
            )
        tokens = context + continuation
        first = 0 if limit is None else max(len(tokens) - limit - 1, 0)
        numbers.setdefault(tokens[first:-1], []).append(number)
    rows: Rows = []
    # Equal lengths are sorted by their ids, so that a batch does not depend on the order of pairs.
    for tokens in sorted(numbers, key=lambda tokens: (-len(tokens), tokens)):
        full = len(rows) == batch_size
        if rows and (full or len(rows[0][0]) * (len(rows) + 1) > batch_tokens):
            yield rows
            rows = []
        rows.append((tokens, numbers[tokens]))
    if rows:
        yield rows


def score_rows(
    model: Transformer, mesh: Mesh, scheduled: Scheduled, rows: Rows, pairs: Sequence[Pair]
) -> dict[int, Likelihood]:
    """Return the log-likelihoods of a batch by the numbers of their pairs, on the pipeline rank of
    the head; nothing on the others."""
    batch = pad_rows([tokens for tokens, _ in rows]).to(mesh.device)
    with model.tp.whole_sequences():
        ctx = model.context(batch, step=0, training=False, whole=True)
        x = run_forward(model, mesh, scheduled, batch.tokens_BS, ctx)
        if x is None:
            return {}
        # The head runs only where continuations are predicted.
        counts = [max(len(pairs[number].continuation) for number in own) for _, own in rows]
        read = [
            x[row, len(tokens) - count : len(tokens)]
            for row, ((tokens, _), count) in enumerate(zip(rows, counts, strict=True))
        ]
        logits_NV = model.all_logits(torch.cat(read)[None])[0]
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    found = {}
    for (_, own), logits_SV in zip(rows, logits_NV.split(counts), strict=True):
        log_p_SV = logits_SV.log_softmax(-1, dtype=wide)
        likeliest_S = log_p_SV.argmax(-1)
        for number in own:
            ids = torch.tensor(pairs[number].continuation, device=mesh.device)
            log_p_S = log_p_SV[-len(ids) :].gather(1, ids[:, None])
            greedy = bool((likeliest_S[-len(ids) :] == ids).all())
            found[number] = Likelihood(float(log_p_S.sum(dtype=torch.float64)), greedy)
    return found


def pad_rows(rows: Sequence[tuple[int, ...]]) -> MicroBatch:
    """Return texts as a batch padded on the right; each is a document, and the sample 0.

    A random initial state depends on the number of the sample, so a text's score does not depend on
    its row.
    """
    length = max(map(len, rows))
    tokens_BS = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    positions_BS = torch.arange(length).expand(len(rows), -1)
    lengths_B = torch.tensor([len(row) for row in rows])
    documents_BS = torch.where(positions_BS < lengths_B[:, None], 0, -1).int()
    nothing_B = torch.zeros(len(rows), dtype=torch.long)
    return MicroBatch(
        tokens_BS, torch.full_like(tokens_BS, IGNORED), positions_BS, documents_BS, nothing_B,
        nothing_B, single_document=min(map(len, rows)) == length,
    )  # fmt: skip
