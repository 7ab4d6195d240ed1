"""Validation: run corpora through the model on all replicas and score them by its objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megarecur.config.run import Config
from megarecur.data.corpus import Corpus
from megarecur.data.loader import MicroBatch
from megarecur.data.open import Data, read_in_order
from megarecur.data.tokenizer import load_tokenizer
from megarecur.errors import ConfigError, MegarecurError
from megarecur.inference.generate import encode_prompt, generate, stream_text
from megarecur.model.context import Context
from megarecur.model.temporal import Carried
from megarecur.model.transformer import Transformer
from megarecur.objective.extremes import Extremes
from megarecur.objective.next_token import STEPS, NextToken, Ran, TextScore, make_score
from megarecur.objective.task import Score, Task, build_objective
from megarecur.parallel.mesh import Mesh, raise_first
from megarecur.parallel.pipeline import Pipeline
from megarecur.plan.schedule import Scheduled, Schedules
from megarecur.plan.walk import Stage
from megarecur.progress import WAITING, Note, note_nothing
from megarecur.reading import escape
from megarecur.recurrence.layer_map import StackName
from megarecur.train.bleu import score_bleu
from megarecur.train.heartbeat import Heartbeat
from megarecur.train.signals import StopFlag
from megarecur.train.state import TrainState


class EvaluationStopped(Exception):
    """Raised when all ranks agreed to stop in the middle of an evaluation."""


def validate(
    model: Transformer,
    data: Data,
    mesh: Mesh,
    schedules: Schedules,
    state: TrainState,
    stop: StopFlag,
    beat: Heartbeat,
) -> tuple[dict[str, float], int]:
    """Score the validation corpora. Returns metrics, none if stopped, and the stop signal.

    The evaluation at the end of a run reads train.eval_final samples. For each number of loops R in
    train.eval_depths, the metrics are `val/depth_R/loss` and so on, always over train.eval_samples.
    """
    config = data.config
    some, final = config.train.eval_samples, config.train.eval_final
    paths = [source.path for source in config.data.val]
    values: dict[str, float] = {}
    for depth in (None, *config.train.eval_depths):
        samples = some
        if depth is None and state.step == config.train.steps:
            samples = 0 if final == "all" else final
        scores: list[Score] = []
        for corpus, path in zip(data.validation, paths, strict=True):
            loops = f" with {depth} loops" if depth is not None else ""
            note = beat.note("evaluate", f"{path}{loops}: ")
            run = (model, corpus, config, mesh, samples)
            try:
                scores.append(evaluate_corpus(*run, stop, depth, schedules, note))
            except EvaluationStopped:
                return {}, stop.agreed(mesh)
        prefix = "val/" if depth is None else f"val/depth_{depth}/"
        found = model.objective.metrics(scores, short_names(paths))
        values |= {prefix + name: value for name, value in found.items()}
    if config.train.eval_bleu:
        note = beat.note("evaluate")
        found = score_bleu(model, data.validation, short_names(paths), config, mesh, note)
        values |= {f"val/{name}": value for name, value in found.items()}
    return values, stop.agreed(mesh)


@torch.no_grad()
def evaluate_corpus(
    model: Transformer,
    corpus: Corpus,
    config: Config,
    mesh: Mesh,
    max_samples: int = 0,
    stop: StopFlag | None = None,
    num_loops: int | None = None,
    schedules: Schedules | None = None,
    note: Note = note_nothing,
    extremes: Extremes | None = None,
) -> Score:
    """Score a corpus, or its first samples, in one pass; collective.

    Args:
        corpus: text or labelled samples, depending on the run's objective.
        max_samples: maximum number of samples to read; 0: all.
        stop: the flag that records signals.
        num_loops: number of loops to run instead of the trained one, if the scheme repeats a group.
        schedules: the run's walks; None: built here.
        note: called after each micro batch.
        extremes: receives the samples of this process that a picture shows, for a task.

    Raises:
        EvaluationStopped: all ranks agreed to stop.
        MegarecurError: on every rank, the reason why a rank could not read the corpus.
    """
    plans = schedules or Schedules(config)
    schedule = partial(plans.forward, num_loops, True)
    failures: list[MegarecurError] = []  # After a failure this rank continues: others wait for it.
    batches, samples = read_in_order(config, corpus, mesh, max_samples, failures)
    total = -(-samples // (mesh.readers * config.train.micro_batch_size))

    def add_up(sums: Tensor) -> Tensor:
        note(WAITING)
        flat = torch.cat([sums.flatten(), sums.new_tensor([float(len(failures))])])
        flat = mesh.sum_over_world(flat) / mesh.tp  # Context ranks count their own positions.
        if flat[-1]:
            raise_first(failures[0] if failures else None, mesh)
        return flat[:-1].view_as(sums)

    ran = noted(run_batches(model, mesh, schedule, batches, failures, stop), total, note)
    names = [step.exit_name for step in schedule(1).steps if step.exit]
    objective = build_objective(config, model.readout)
    if isinstance(objective, Task):
        return objective.score(ran, corpus, add_up, names, extremes)
    return objective.score(ran, corpus, add_up, names)


@torch.no_grad()
def stream_corpus(
    model: Transformer,
    corpus: Corpus,
    config: Config,
    mesh: Mesh,
    max_documents: int = 0,
    num_loops: int | None = None,
) -> TextScore:
    """Score documents read in pieces, with the temporal memory carried from piece to piece.

    Each token is predicted from the whole document before it, not only from a window. Runs in one
    process.

    Args:
        model: a model with temporal memory.
        corpus: a text corpus; without document masks it counts as one document.
        config: the run; a piece has as many whole chunks as fit into data.seq_length.
        mesh: the single process.
        max_documents: number of documents to read from the start; 0: all.
        num_loops: see `evaluate_corpus`. Early exits are not scored.

    Raises:
        ConfigError: the model has no temporal memory.
    """
    if config.temporal is None:
        raise ConfigError(
            "--streaming: the run has no temporal memory that could be carried from piece to "
            "piece; omit it"
        )
    steps = Schedules(config).forward(num_loops, exits=False).steps
    length = config.data.seq_length // config.temporal.chunk_length * config.temporal.chunk_length
    begins = (corpus.documents if config.data.mask_documents else corpus.documents[:1]).tolist()
    edges = list(zip(begins, [*begins[1:], corpus.num_tokens], strict=True))
    buckets = corpus.num_tokens.bit_length() + 1
    sums = torch.zeros(2, buckets, dtype=torch.float64, device=mesh.device)
    objective = NextToken(config, model.readout)
    for begin, end in edges[: max_documents or None]:
        carried = Carried()
        for start in range(begin, end - 1, length):
            ids = corpus.read(start, min(length + 1, end - start)).astype(np.int64)
            batch = one_row(torch.from_numpy(ids), start - begin).to(mesh.device)
            x = model.read_piece(steps, batch.tokens_BS, carried)
            objective.count(batch, x, (), sums)
    losses, counts = sums.tolist()
    return make_score(corpus, losses, counts)


def one_row(ids: Tensor, position: int) -> MicroBatch:
    """Return ids as a batch of one sample, with the next ids as labels.

    Args:
        ids: [S + 1], consecutive ids of a document.
        position: of the first id in its document.
    """
    positions_BS = torch.arange(position, position + len(ids) - 1)[None]
    nothing_B = torch.zeros(1, dtype=torch.long)
    return MicroBatch(
        ids[None, :-1], ids[None, 1:], positions_BS, torch.zeros_like(positions_BS), nothing_B,
        nothing_B, single_document=True,
    )  # fmt: skip


def noted(ran: Iterable[Ran], total: int, note: Note) -> Iterator[Ran]:
    """Yield the outputs of micro batches, and call `note` after each one is scored."""
    for done, each in enumerate(ran, 1):
        yield each
        note(f"batch {done} of {total}")


IN_FLIGHT = 4
"""Micro batches in one order of an evaluation, per pipeline rank. All ranks have work but while the
first one travels to the last rank, a share of at most 1 / (1 + IN_FLIGHT)."""
CHECKED = 8
"""Micro batches between two checks for signals, per pipeline rank."""


class Evaluation:
    """The stages' computation of micro batches that are scored (`parallel.pipeline.Program`).

    Args:
        batches: the micro batches of one order; each is moved to the device when it is first used.
    """

    def __init__(
        self, model: Transformer, batches: Sequence[MicroBatch], device: torch.device
    ) -> None:
        self.model, self.batches, self.device = model, list(batches), device
        self.contexts: dict[int, Context] = {}
        self.outputs: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        """Output of the map and hidden states of its exits by micro batch, on their rank."""
        self.finished: dict[int, Ran] = {}
        self.taken = 0

    def shape(self, microbatch: int, stack: StackName) -> tuple[int, ...]:
        """Return the shape of the hidden state of a stack on this rank."""
        batch = self.batches[microbatch]
        read = batch.source if stack == "encoder" and batch.source is not None else batch
        return self.model.hidden_shape(read.tokens_BS)

    def forward(
        self, stage: Stage, microbatch: int, x: Tensor | None, reads: dict[str, Tensor]
    ) -> tuple[Tensor, None]:
        """Return (outgoing hidden state, None)."""
        if microbatch not in self.contexts:
            batch = self.batches[microbatch] = self.batches[microbatch].to(self.device)
            self.contexts[microbatch] = self.model.context(batch, step=0, training=False)
        batch, ctx = self.batches[microbatch], self.contexts[microbatch]
        if stage.first:
            x = self.model.enter(batch.tokens_BS, ctx, reads, batch.source, batch.pixels_BCHW)
        assert x is not None
        x, _ = self.model.run(stage.steps, x, ctx, reads)
        if stage.last:
            self.outputs[microbatch] = x, {name: reads[name] for name in stage.exits}
        return x, None

    def forget(self, microbatch: int) -> None:
        """Finish a micro batch after its last forward pass on this rank."""
        x, others = self.outputs.pop(microbatch, (None, dict[str, Tensor]()))
        taken = self.contexts.pop(microbatch).recorder.taken
        if taken:
            steps_B, tokens_B = torch.stack(taken).sum(0).double().unbind(1)
            others[STEPS] = steps_B / tokens_B.clamp(min=1.0)
        self.finished[microbatch] = self.batches[microbatch], x, others

    def take(self) -> Iterator[Ran]:
        """Yield finished micro batches, in order: sums over them depend on no pipeline."""
        while self.taken in self.finished:
            yield self.finished.pop(self.taken)
            self.taken += 1


def run_batches(
    model: Transformer,
    mesh: Mesh,
    schedule: Callable[[int], Scheduled],
    batches: Iterable[MicroBatch],
    failures: Sequence[MegarecurError],
    stop: StopFlag | None,
) -> Iterator[Ran]:
    """Yield each batch with the outputs of its tokens, and by name those at exits and, with
    halting, the mean steps of each row; in order, as soon as they are computed.

    Pipeline ranks run several micro batches at a time, so that all of them have work.

    Args:
        schedule: returns the order of a number of micro batches.

    Raises:
        EvaluationStopped: all ranks agreed to stop; they check every few batches.
    """
    size = 1 if mesh.pp == 1 else IN_FLIGHT * mesh.pp
    begun, due, batches = 0, CHECKED * mesh.pp - 1, iter(batches)
    while some := list(islice(batches, size)):
        if stop is not None and begun >= due:
            due += CHECKED * mesh.pp
            if failures:
                stop.fail(failures[0])
            if stop.agreed(mesh):
                raise EvaluationStopped
        begun += len(some)
        scheduled = schedule(len(some))
        program = Evaluation(model, some, mesh.device)
        pipeline = Pipeline(mesh, scheduled.walk, program, model.dtype)
        for _ in pipeline.run_in_turn(scheduled.order[mesh.pp_rank]):
            yield from program.take()
        for batch in some[program.taken :]:  # The walk of this depth may not visit this rank.
            yield batch.to(mesh.device), None, {}


def continue_prompts(
    model: Transformer, config: Config, mesh: Mesh, schedules: Schedules, note: Note = note_nothing
) -> dict[str, str]:
    """Sample continuations of train.sample_prompts; returns prompt and continuation by tag.

    All ranks run this, since ZeRO stages gather weights collectively.
    """
    if not config.train.sample_prompts:
        return {}
    tokenizer = load_tokenizer(config.data.tokenizer)
    texts = {}
    for i, prompt in enumerate(config.train.sample_prompts):
        ids = encode_prompt(tokenizer, prompt)
        eos = (tokenizer.eos_id,)
        count = config.train.sample_tokens
        # The table of positions limits the text's length.
        if config.model.positions == "learned" and config.temporal is None:
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
            missing_ids=tokenizer.missing_ids(config.model.vocab_size or 0),
            use_cache=config.halting is None,
            mesh=mesh,
            schedules=schedules,
        )
        text = prompt
        for piece in stream_text(tokenizer, ids, new):
            text += piece
            note(f"continuing prompt {i + 1} of {len(config.train.sample_prompts)}")
        texts[f"samples/{i}"] = text
    return texts


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the shortest distinct suffixes of paths: a/val and b/val become a.val and b.val.

    Control characters, which names of metrics may not have, are escaped.
    """
    paths = [escape(path, keep="") for path in paths]
    parts = [Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = [".".join(part.strip("/") for part in p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{i}.{Path(path).name}" for i, path in enumerate(paths)]
