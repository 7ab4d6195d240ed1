"""Validation: loss, perplexity and bits per byte of whole corpora, over the replicas."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from megarecur.config.schema import Config
from megarecur.data.corpus import Corpus
from megarecur.data.loader import MicroBatch, validation_batches
from megarecur.data.tokenizer import load_tokenizer
from megarecur.errors import ConfigError, MegarecurError
from megarecur.inference.generate import encode_prompt, generate, run_with_exits, stream_text
from megarecur.model.temporal import Carried
from megarecur.model.transformer import Transformer
from megarecur.parallel.loss import IGNORED
from megarecur.parallel.mesh import Mesh, raise_first
from megarecur.plan.schedule import Scheduled, Schedules
from megarecur.train.signals import StopFlag

AnyBatch = TypeVar("AnyBatch", bound=MicroBatch)


@dataclass(frozen=True)
class Score:
    """How well a corpus is predicted."""

    loss: float
    """Nats per counted token."""
    tokens: int
    """Counted tokens."""
    num_bytes: float
    """Bytes of text they stand for, by the corpus's mean bytes per token."""
    by_position: tuple[float, ...] = ()
    """Loss at positions 0, 1, 2 to 3, 4 to 7, ... of a document; nan where there is none."""
    exits: tuple[float, ...] = ()
    """Nats per counted token at the early exits, after the first loop, the second, ..."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.loss * self.tokens / math.log(2.0) / max(self.num_bytes, 1e-9)


def evaluate(
    model: Transformer,
    corpora: Sequence[Corpus],
    config: Config,
    mesh: Mesh,
    max_samples: int = 0,
    num_loops: int | None = None,
) -> list[Score]:
    """Score every corpus; collective over dp. max_samples 0: all of it; num_loops: as below."""
    scores = (score_corpus(model, c, config, mesh, max_samples, None, num_loops) for c in corpora)
    return [score for score in scores if score is not None]


@torch.no_grad()
def score_corpus(
    model: Transformer,
    corpus: Corpus,
    config: Config,
    mesh: Mesh,
    max_samples: int,
    stop: StopFlag | None = None,
    num_loops: int | None = None,
    schedules: Schedules | None = None,
) -> Score | None:
    """One pass over (the start of) a corpus, every token predicted once; None when stopped.

    num_loops: loops to run instead of those trained with, where the scheme repeats a group.

    Raises:
        MegarecurError: on every rank, why one could not read the corpus.
    """
    scheduled = (schedules or Schedules(config)).forward(num_loops, exits=True)
    names = [step.exit_name for step in scheduled.steps if step.exit]
    # Losses and counted tokens of positions of equal bit length; failures to read; losses of exits.
    buckets = config.data.seq_length.bit_length() + 1
    sums = torch.zeros(3 + len(names), buckets, dtype=torch.float64, device=mesh.device)
    failures: list[MegarecurError] = []  # This rank goes on without data: others wait for it.
    batches = validation_batches(
        corpus,
        seq_length=config.data.seq_length,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp,
        mask_documents=config.data.mask_documents,
        max_samples=max_samples,
        failures=failures,
    )
    for ran in run_batches(model, mesh, scheduled, batches, failures, stop):
        if ran is None:
            return None
        batch, x, exits = ran
        if x is None:  # It ends on another pipeline rank.
            continue
        losses_N = model.loss(x, batch)["loss"].per_token
        assert losses_N is not None
        bucket_N = bit_lengths(batch.positions_BS.flatten())
        counted_N = (batch.labels_BS != IGNORED).flatten()
        sums[0].index_add_(0, bucket_N, losses_N.to(torch.float64))
        sums[1].index_add_(0, bucket_N, counted_N.to(torch.float64))
        for row, name in enumerate(names, 3):
            sums[row, 0] += model.loss(exits[name], batch)["loss"].total
    sums[2] += len(failures)
    losses, counts, failed, *of_exits = (mesh.sum_over_world(sums) / mesh.tp).tolist()
    if any(failed):
        raise_first(failures[0] if failures else None, mesh)
    return make_score(corpus, losses, counts, of_exits)


def make_score(
    corpus: Corpus,
    losses: Sequence[float],
    counts: Sequence[float],
    of_exits: Sequence[Sequence[float]] = (),
) -> Score:
    """Of sums of losses, and numbers of tokens, by bit length of the position; losses of exits."""
    tokens = sum(counts)
    num_bytes = tokens * corpus.num_bytes / corpus.num_tokens
    parts = tuple(a / n if n else math.nan for a, n in zip(losses, counts, strict=True))
    early = tuple(sum(row) / max(tokens, 1.0) for row in of_exits)
    return Score(sum(losses) / max(tokens, 1.0), int(tokens), num_bytes, parts, early)


@torch.no_grad()
def stream_corpus(
    model: Transformer,
    corpus: Corpus,
    config: Config,
    mesh: Mesh,
    max_documents: int = 0,
    num_loops: int | None = None,
) -> Score:
    """Every document read to its end in pieces, the temporal memory carried along: predicted with
    all that came before, not with what of it is in a window. In one process.

    Args:
        model: with a temporal memory.
        corpus: where documents are not masked, it is one document.
        config: of the run; pieces are the whole chunks that fit into data.seq_length.
        mesh: where it runs.
        max_documents: so many from the start; 0: all.
        num_loops: as for `score_corpus`. Early exits are not scored.

    Raises:
        ConfigError: the model has no memory to carry.
    """
    if config.temporal is None:
        raise ConfigError(
            "--streaming: the run has no temporal memory that could be carried from piece to "
            "piece; leave it out"
        )
    steps = Schedules(config).forward(num_loops, exits=False).steps
    length = config.data.seq_length // config.temporal.chunk_length * config.temporal.chunk_length
    begins = (corpus.documents if config.data.mask_documents else corpus.documents[:1]).tolist()
    edges = list(zip(begins, [*begins[1:], corpus.num_tokens], strict=True))
    buckets = corpus.num_tokens.bit_length() + 1
    sums = torch.zeros(2, buckets, dtype=torch.float64, device=mesh.device)
    for begin, end in edges[: max_documents or None]:
        carried = Carried()
        for start in range(begin, end - 1, length):
            ids = corpus.read(start, min(length + 1, end - start)).astype(np.int64)
            batch = one_row(torch.from_numpy(ids), start - begin).to(mesh.device)
            x = model.read_piece(steps, batch.tokens_BS, carried)
            losses_N = model.loss(x, batch)["loss"].per_token
            assert losses_N is not None
            bucket_N = bit_lengths(batch.positions_BS[0])
            sums[0].index_add_(0, bucket_N, losses_N.to(torch.float64))
            sums[1] += torch.bincount(bucket_N, minlength=buckets)
    losses, counts = sums.tolist()
    return make_score(corpus, losses, counts)


def one_row(ids: Tensor, position: int) -> MicroBatch:
    """Tokens and the next ones, which are a document from a position of it on."""
    positions_BS = torch.arange(position, position + len(ids) - 1)[None]
    nothing_B = torch.zeros(1, dtype=torch.long)
    return MicroBatch(
        ids[None, :-1], ids[None, 1:], positions_BS, torch.zeros_like(positions_BS), nothing_B,
        nothing_B, single_document=True,
    )  # fmt: skip


def bit_lengths(numbers: Tensor) -> Tensor:
    """0 for 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7, ..."""
    return torch.frexp(numbers.to(torch.float64)).exponent.long()  # of a fraction in [1/2, 1)


def run_batches(
    model: Transformer,
    mesh: Mesh,
    scheduled: Scheduled,
    batches: Iterable[AnyBatch],
    failures: Sequence[MegarecurError],
    stop: StopFlag | None,
) -> Iterator[tuple[AnyBatch, Tensor | None, dict[str, Tensor]] | None]:
    """Each batch with what its tokens come out as, and at exits; None once all ranks agree to stop,
    which they ask each other every few batches."""
    for i, batch in enumerate(batches):
        if stop is not None and i % 8 == 7:
            if failures:
                stop.fail(failures[0])
            if stop.agreed(mesh):
                yield None
                return
        batch = batch.to(mesh.device)
        ctx = model.context(batch, step=0, training=False)
        yield batch, *run_with_exits(model, mesh, scheduled, batch.tokens_BS, ctx)


def continue_prompts(
    model: Transformer, config: Config, mesh: Mesh, schedules: Schedules
) -> dict[str, str]:
    """What the model makes of train.sample_prompts, each with its prompt in front.

    Every rank does the same, since stages of ZeRO gather weights for it.
    """
    if not config.train.sample_prompts:
        return {}
    tokenizer = load_tokenizer(config.data.tokenizer)
    texts = {}
    for i, prompt in enumerate(config.train.sample_prompts):
        ids = encode_prompt(tokenizer, prompt)
        eos = (tokenizer.eos_id,)
        count = config.train.sample_tokens
        if (
            config.model.positions == "learned" and config.temporal is None
        ):  # The table ends; the text then ends with it.
            room = (config.model.max_positions or config.data.seq_length) + 1 - len(ids)
            count = min(count, room)
        if count < 1:
            continue
        new = generate(
            model,
            ids,
            max_new_tokens=count,
            seed=config.seed,
            sample=i,
            eos_ids=eos,
            use_cache=config.halting is None,
            mesh=mesh,
            schedules=schedules,
        )
        texts[f"samples/{i}"] = prompt + "".join(stream_text(tokenizer, ids, new))
    return texts


def score_values(scores: Sequence[Score], paths: Sequence[str]) -> dict[str, float]:
    """Scores as metrics: `val/loss` over all corpora, and each by name where there are several."""
    if not scores:
        return {}
    tokens = sum(score.tokens for score in scores)
    loss = sum(score.loss * score.tokens for score in scores) / max(tokens, 1)
    whole = Score(loss, tokens, sum(score.num_bytes for score in scores))
    values = {"val/loss": whole.loss, "val/bits_per_byte": whole.bits_per_byte}
    for i in range(len(scores[0].exits)):
        total = sum(score.exits[i] * score.tokens for score in scores)
        values[f"val/exit_{i + 1}/loss"] = total / max(tokens, 1)
    if len(scores) > 1:
        for name, score in zip(short_names(paths), scores, strict=True):
            values[f"val/{name}/loss"] = score.loss
            values[f"val/{name}/bits_per_byte"] = score.bits_per_byte
    return values


def short_names(paths: Sequence[str]) -> list[str]:
    """The shortest endings that tell paths apart: a/val and b/val become a.val and b.val."""
    parts = [Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = [".".join(part.strip("/") for part in p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{i}.{Path(path).name}" for i, path in enumerate(paths)]
