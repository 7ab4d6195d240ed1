"""Beam search and sampling over any decoder, batched over sentences; no model is needed here.

    found = beam_search(decoder, 64, beam=4, start=1, end=2, max_lengths=lengths)
    found[0][0].tokens                                  # the best translation of the first sentence

A decoder continues hypotheses: `advance(tokens, parents)` appends a token to each row and returns
the log probabilities of the next. Rows are hypotheses in the order of the sentences; `parents`
names the row of the previous call that each row continues, so that a decoder keeps its caches by
`index_select`. In the first call the rows are the sentences, and the token is the start token.

The search, for each sentence on its own:

1. Every live hypothesis offers its 2 x beam likeliest next tokens. All offers are sorted by the sum
   of log probabilities, and the best 2 x beam are candidates. Equal ones are sorted by the rank of
   the hypothesis that they continue, then by id.
2. A candidate that is the end token, and among the best `beam` candidates, is finished; below that,
   it is dropped. The best `beam` other candidates live on.
3. The sentence ends when `beam` hypotheses are finished, or none lives. A hypothesis with as many
   tokens as allowed, the end token included, can only be continued by the end token.
4. Finished hypotheses are sorted by their sum of log probabilities divided by the length penalty;
   equal ones by the time at which they finished, then by rank.

These are the rules of fairseq, and of Hugging Face with `early_stopping=True`. A beam of 1 is
greedy decoding. No rule reads another sentence, so that a result depends on the others of its batch
only as far as the decoder's numbers do.

Shapes: B sentences, K beam, R rows, V vocabulary, C offers of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from megarecur.inference.generate import choose

Penalty = Literal["wu", "fairseq"]
PENALTIES: tuple[Penalty, ...] = get_args(Penalty)


class StepDecoder(Protocol):
    """The interface of a decoder of many hypotheses."""

    def advance(self, tokens_R: Tensor, parents_R: Tensor) -> Tensor:
        """Append a token to hypotheses; return log probabilities [R, V] of the next tokens.

        Args:
            tokens_R: the token that each row appends.
            parents_R: the row of the previous call that each row continues; in the first call,
                the sentence. Rows of a sentence stay together, and sentences in order. A sentence
                whose rows no row continues has ended.
        """


@dataclass(frozen=True)
class LengthPenalty:
    """The divisor of a hypothesis's sum of log probabilities.

    wu: ((5 + n) / 6)^alpha (Wu et al. 2016, equation 14). fairseq: n^alpha, as fairseq's --lenpen
    and Hugging Face's length_penalty. n is the number of tokens with the end token.
    """

    kind: Penalty = "wu"
    alpha: float = 0.6

    def of(self, length: int) -> float:
        """Return the divisor for a number of tokens."""
        base = (5.0 + length) / 6.0 if self.kind == "wu" else float(length)
        return float(base**self.alpha)

    def __str__(self) -> str:
        return f"{self.kind} {self.alpha:g}"


class Hypothesis(NamedTuple):
    """A finished hypothesis."""

    tokens: tuple[int, ...]
    """Its ids, without start and end token."""
    log_p: float
    """Sum of the log probabilities of its tokens, end token included if `ended`."""
    score: float
    """`log_p` divided by the length penalty."""
    ended: bool = True
    """Whether it has an end token; a drawn one may reach the maximum length without."""


def beam_search(
    decoder: StepDecoder,
    num_sentences: int,
    *,
    beam: int,
    start: int,
    end: int,
    max_lengths: Sequence[int],
    penalty: LengthPenalty = LengthPenalty(),
    prefixes: Sequence[Sequence[int]] | None = None,
    nbest: int = 1,
    device: torch.device | str = "cpu",
) -> list[list[Hypothesis]]:
    """Return the best `nbest` hypotheses of each sentence, best first; rules in the module.

    Args:
        decoder: continues hypotheses of these sentences.
        beam: number of live hypotheses of a sentence.
        start: the first token of every row, which is no part of a hypothesis.
        end: the token that ends a hypothesis.
        max_lengths: the most tokens of each sentence, the end token included.
        prefixes: tokens with which each sentence must begin; their log probabilities count.
        nbest: hypotheses to return, at most `beam`; a sentence may have fewer.
        device: device of the tensors given to the decoder.

    Raises:
        ValueError: beam, nbest, a maximum length or a prefix is out of range.
    """
    prefixes = prefixes or [()] * num_sentences
    _check(num_sentences, beam, end, max_lengths, prefixes)
    if not 1 <= nbest <= beam:
        raise ValueError(f"nbest={nbest} must be from 1 to beam={beam}")
    finished: list[list[Hypothesis]] = [[] for _ in range(num_sentences)]
    active = list(range(num_sentences))
    totals_BK = torch.zeros(num_sentences, 1, dtype=torch.float64)
    history_BKT = torch.empty(num_sentences, 1, 0, dtype=torch.long)
    tokens_R = torch.full((num_sentences,), start, dtype=torch.long)
    parents_R = torch.arange(num_sentences)
    length = 0
    while active:
        length += 1
        log_p_RV = decoder.advance(tokens_R.to(device), parents_R.to(device))
        width = totals_BK.shape[1]
        forced = [forced_token(prefixes[i], max_lengths[i], length, end) for i in active]
        offers_RC, ids_RC = best_offers(log_p_RV, 2 * beam, forced, width)
        offers_BWC = totals_BK.unsqueeze(-1) + offers_RC.view(len(active), width, -1)
        # Stable: the order of the flat index, so of parents and of their offers, breaks ties.
        found_BC, flat_BC = offers_BWC.flatten(1).sort(dim=-1, descending=True, stable=True)
        found_BC, flat_BC = found_BC[:, : 2 * beam], flat_BC[:, : 2 * beam]
        parents_BC = flat_BC // offers_RC.shape[-1]
        ids_BC = ids_RC.view(len(active), -1).gather(1, flat_BC)
        ends_BC = (ids_BC == end) & (found_BC > -torch.inf)
        for row, rank in ends_BC[:, :beam].nonzero().tolist():
            # A hypothesis beyond the beam's size is a worse one of the last step.
            if len(finished[active[row]]) < beam:
                own = history_BKT[row, int(parents_BC[row, rank])].tolist()
                log_p = float(found_BC[row, rank])
                score = log_p / penalty.of(length)
                finished[active[row]].append(Hypothesis(tuple(own), log_p, score))
        # The best that do not end live on; missing ones (small vocabularies, forced tokens) are
        # rows of probability 0.
        kept_BK = ends_BC.long().sort(dim=-1, stable=True).indices[:, :beam]
        lives_BK = ~ends_BC.gather(1, kept_BK)
        totals_BK = torch.where(lives_BK, found_BC.gather(1, kept_BK), -torch.inf)
        ids_BK, from_BK = ids_BC.gather(1, kept_BK), parents_BC.gather(1, kept_BK)
        lives_B = (totals_BK > -torch.inf).any(1).tolist()
        stays = [row for row, i in enumerate(active) if len(finished[i]) < beam and lives_B[row]]
        rows = torch.tensor(stays, dtype=torch.long)
        totals_BK, ids_BK, from_BK = totals_BK[rows], ids_BK[rows], from_BK[rows]
        history_BKT = torch.cat(
            [
                history_BKT[rows].gather(1, from_BK.unsqueeze(-1).expand(-1, -1, length - 1)),
                ids_BK.unsqueeze(-1),
            ],
            -1,
        )
        tokens_R, parents_R = ids_BK.flatten(), (rows.unsqueeze(1) * width + from_BK).flatten()
        active = [active[row] for row in stays]
    # Sorting is stable: hypotheses are in the order of time and rank.
    return [sorted(each, key=lambda h: -h.score)[:nbest] for each in finished]


def sample(
    decoder: StepDecoder,
    num_sentences: int,
    *,
    num_samples: int,
    start: int,
    end: int,
    max_lengths: Sequence[int],
    sentence_ids: Sequence[int],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    penalty: LengthPenalty = LengthPenalty(),
    prefixes: Sequence[Sequence[int]] | None = None,
    device: torch.device | str = "cpu",
) -> list[list[Hypothesis]]:
    """Return `num_samples` drawn hypotheses of each sentence, in the order of their numbers.

    Every choice is a function of (seed, sentence id, number of the sample, position). Scores are
    those of the distribution before temperature, top-k and top-p. A hypothesis of the maximum
    length ends there, with or without an end token.

    Args:
        sentence_ids: number of each sentence, which decides its random choices.
        temperature: see `generate.choose`; so `top_k` and `top_p`.

    Raises:
        ValueError: a maximum length or a prefix is out of range.
    """
    prefixes = prefixes or [()] * num_sentences
    _check(num_sentences, num_samples, end, max_lengths, prefixes)
    rows = [(i, number) for i in range(num_sentences) for number in range(num_samples)]
    texts: dict[tuple[int, int], list[int]] = {row: [] for row in rows}
    sums = dict.fromkeys(rows, 0.0)
    ended: set[tuple[int, int]] = set()
    tokens_R = torch.full((num_sentences,), start, dtype=torch.long)
    parents_R = torch.arange(num_sentences)
    length = 0
    while rows:
        length += 1
        log_p_RV = decoder.advance(tokens_R.to(device), parents_R.to(device))
        if length == 1:
            log_p_RV = log_p_RV.repeat_interleave(num_samples, 0)
        numbers_R = [(number << 32) + sentence_ids[i] for i, number in rows]
        chosen_R = choose(
            log_p_RV,
            torch.tensor(numbers_R, device=log_p_RV.device),
            torch.full((len(rows),), length, device=log_p_RV.device),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        inside = [(k, prefixes[i][length - 1]) for k, (i, _) in enumerate(rows)
                  if length <= len(prefixes[i])]  # fmt: skip
        for k, token in inside:
            chosen_R[k] = token
        log_p_R = log_p_RV.gather(1, chosen_R[:, None])[:, 0].tolist()
        chosen = chosen_R.tolist()
        stays = []
        for k, row in enumerate(rows):
            sums[row] += log_p_R[k]
            if chosen[k] == end:
                ended.add(row)
                continue
            texts[row].append(chosen[k])
            if length < max_lengths[row[0]]:
                stays.append(k)
        of_row = [i for i, _ in rows] if length == 1 else list(range(len(rows)))
        parents_R = torch.tensor([of_row[k] for k in stays], dtype=torch.long)
        tokens_R = torch.tensor([chosen[k] for k in stays], dtype=torch.long)
        rows = [rows[k] for k in stays]
    found: list[list[Hypothesis]] = [[] for _ in range(num_sentences)]
    for row, text in texts.items():
        score = sums[row] / penalty.of(len(text) + (row in ended))
        found[row[0]].append(Hypothesis(tuple(text), sums[row], score, row in ended))
    return found


def forced_token(prefix: Sequence[int], max_length: int, length: int, end: int) -> int | None:
    """Return the only token allowed as number `length` (from 1) of a sentence; None if any is."""
    if length <= len(prefix):
        return prefix[length - 1]
    return end if length == max_length else None


def best_offers(
    log_p_RV: Tensor, count: int, forced: Sequence[int | None], width: int
) -> tuple[Tensor, Tensor]:
    """Return the best offers of each row on the CPU: log probabilities [R, C] in fp64, descending,
    and ids [R, C]. Equal ones are in the order of their ids.

    Args:
        count: offers of a row, if the vocabulary has as many.
        forced: the only token of each sentence; None: any token.
        width: rows of a sentence.
    """
    count = min(count, log_p_RV.shape[1])
    values_RC, ids_RC = log_p_RV.topk(min(count + 1, log_p_RV.shape[1]))
    # topk takes any of the tokens that are equal to its last one: rows where the next value equals
    # it are sorted whole. Tokens of probability 0 are never chosen.
    last_R1 = values_RC[:, count - 1 : count]
    tied_R = ((values_RC[:, count:] == last_R1) & (last_R1 > -torch.inf)).any(1)
    values_RC, ids_RC = values_RC[:, :count], ids_RC[:, :count]
    if bool(tied_R.any()):
        whole, order = log_p_RV[tied_R].sort(dim=1, descending=True, stable=True)
        values_RC[tied_R], ids_RC[tied_R] = whole[:, :count], order[:, :count]
    values_RC, ids_RC = values_RC.cpu().to(torch.float64), ids_RC.cpu()
    ids_RC, order = ids_RC.sort(1)
    values_RC, again = values_RC.gather(1, order).sort(dim=1, descending=True, stable=True)
    ids_RC = ids_RC.gather(1, again)
    for sentence, token in enumerate(forced):
        if token is not None:
            rows = slice(sentence * width, (sentence + 1) * width)
            values_RC[rows, 1:] = -torch.inf
            values_RC[rows, 0] = log_p_RV[rows, token].cpu().to(torch.float64)
            ids_RC[rows, 0] = token
    return values_RC, ids_RC


def _check(
    num_sentences: int,
    beam: int,
    end: int,
    max_lengths: Sequence[int],
    prefixes: Sequence[Sequence[int]],
) -> None:
    if num_sentences < 1 or beam < 1:
        raise ValueError(f"{num_sentences} sentences with beam={beam}: both must be at least 1")
    if not len(max_lengths) == len(prefixes) == num_sentences:
        raise ValueError("there must be a maximum length and a prefix for every sentence")
    for most, prefix in zip(max_lengths, prefixes, strict=True):
        if end in prefix:
            raise ValueError(f"the prefix {list(prefix)} contains the end token {end}")
        if most <= len(prefix):
            raise ValueError(
                f"a prefix of {len(prefix)} tokens leaves no room in {most} tokens for the end"
            )
