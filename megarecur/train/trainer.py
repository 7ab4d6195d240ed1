"""Training: `train()` is the table of contents."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megarecur.config.schema import Config
from megarecur.data.corpus import Corpus, open_corpus
from megarecur.data.loader import Loader, MicroBatch
from megarecur.data.tokenizer import load_tokenizer
from megarecur.errors import CheckpointError, DataError
from megarecur.model.transformer import LossTerm, Telemetry, Transformer
from megarecur.optim.engine import Engine, PlainEngine
from megarecur.optim.schedule import learning_rate
from megarecur.parallel.mesh import Mesh, open_mesh, same_error
from megarecur.recurrence.schemes import layer_map
from megarecur.train import checkpoint
from megarecur.train.evaluate import score_corpus, score_values
from megarecur.train.report import Report, StepResult
from megarecur.train.signals import StopFlag, watch_signals
from megarecur.train.state import TrainState, check_resume, open_run, save_state, write_config

log = logging.getLogger(__name__)

FINISHED, STOPPED = 0, 3
"""Exit codes: all steps done; saved and stopped by a signal."""


def train(config: Config, stop: StopFlag | None = None) -> int:
    """Train, or go on training, the run in config.run_dir. Returns the exit code.

    Args:
        config: the run.
        stop: where signals are noted; None: they are watched while this function runs.

    Raises:
        MegarecurError: for whatever the user can mend.
    """
    with ExitStack() as resources:
        stop = stop or resources.enter_context(watch_signals())
        mesh = resources.enter_context(open_mesh(config))
        run_dir = resources.enter_context(open_run(config, mesh))
        data = open_data(config, mesh)
        config, loader = data.config, resources.enter_context(closing(data.loader))
        model = Transformer(config, mesh.device)
        engine = PlainEngine(model, config, mesh)
        state = resume(run_dir, config, data, engine, mesh)
        with same_error(mesh):
            write_config(run_dir, config) if mesh.rank == 0 else None
            report = Report(run_dir, config, state, mesh)
        saved = validated = state.step
        if state.step and not report.is_validated(state.step):
            validated = 0  # The run ended between saving this step and scoring it.
        while True:
            number = stop.agreed(mesh)
            if is_due(state.step, config.train.eval_every, config) and validated < state.step:
                values, number = validate(model, data, mesh, state, stop)
                report.write(state, values, stop)
                validated = state.step
            if number:
                break
            if state.step == config.train.steps:
                report.finish(f"done: {state.step} steps, {state.tokens} tokens in {run_dir}")
                return FINISHED
            started = time.perf_counter()
            batches = [batch.to(mesh.device) for batch in loader.batch(state.step)]
            loader.prefetch(state.step + 1)
            waited = time.perf_counter() - started
            due = is_due(state.step + 1, config.train.log_every, config)
            result = forward_backward(model, engine, config, batches, state.step, mesh, due)
            result.lr = learning_rate(config.optimizer, state.step, config.train.steps)
            result.grad_norm, result.skipped = engine.step(result.lr)
            result.data_seconds, result.seconds = waited, time.perf_counter() - started
            state = state.advance(config, result.skipped)
            report.interval.add(result)
            if due:
                report.write(state, report.close_interval(state, result), stop)
            if is_due(state.step, config.checkpoint.every, config):
                save(run_dir, config, data, engine, mesh, state, report)
                saved = state.step
        if saved < state.step:
            save(run_dir, config, data, engine, mesh, state, report)
        report.finish(
            f"saved at step {state.step} and stopped by signal {number}; "
            "the same command goes on from there"
        )
        return STOPPED


def is_due(done: int, every: int, config: Config) -> bool:
    """Whether something done every so many steps, and at the end, is due; every 0: at the end."""
    return done == config.train.steps or (every > 0 and done % every == 0)


# ---------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    """What a run reads, and the config with what follows from it filled in."""

    config: Config
    loader: Loader
    validation: list[Corpus]
    tokenizer: str
    """Fingerprint."""


def open_data(config: Config, mesh: Mesh) -> Data:
    """Open and check tokenizer and corpora.

    Raises:
        DataError: on every rank, when any of them finds damage, or a tokenizer that differs.
    """
    with same_error(mesh):
        tokenizer = load_tokenizer(config.data.tokenizer)
        train, validation = (
            [
                open_corpus(
                    s.path,
                    config.data.tokenizer,
                    tokenizer.fingerprint,
                    config.data.verify,
                    part=mesh.dp_rank,
                    num_parts=mesh.dp,
                )
                for s in sources
            ]
            for sources in (config.data.train, config.data.val)
        )
    config = with_vocab_size(config, tokenizer.vocab_size)
    loader = Loader(
        [(corpus, s.weight) for corpus, s in zip(train, config.data.train, strict=True)],
        seq_length=config.data.seq_length,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp,
        seed=config.seed,
        shuffle=config.data.shuffle,
        mask_documents=config.data.mask_documents,
    )
    return Data(config, loader, validation, tokenizer.fingerprint)


def with_vocab_size(config: Config, vocab_size: int) -> Config:
    """The config with model.vocab_size resolved.

    Raises:
        DataError: fewer rows than the tokenizer has ids.
    """
    rows = config.model.vocab_size
    if rows is None:
        model = config.model.model_copy(update={"vocab_size": vocab_size})
        return config.model_copy(update={"model": model})
    if rows < vocab_size:
        raise DataError(
            f"model.vocab_size={rows} is below the {vocab_size} ids of "
            f"data.tokenizer={config.data.tokenizer}; raise it or leave it out"
        )
    return config


# ------------------------------------------------------------------------------- one optimizer step


def forward_backward(
    model: Transformer,
    engine: Engine,
    config: Config,
    batches: Sequence[MicroBatch],
    step: int,
    mesh: Mesh,
    telemetry: bool = False,
) -> StepResult:
    """Gradients of the objective over the global batch, left in the engine.

    The objective divides sums by counts over the global batch, known before the forward pass, so
    that it depends on neither dp, micro batch size nor padding.
    """
    steps = layer_map(config.recurrence)
    denominators = count_denominators(batches, mesh)
    result = StepResult()
    for batch in batches:
        seen: Telemetry | None = {} if telemetry else None
        ctx = model.context(batch, step, training=True, telemetry=seen)
        x, auxiliary = model.run(steps, model.embed(batch.tokens_BS, ctx), ctx, {})
        terms = model.loss(x, batch) | auxiliary
        engine.backward(objective(terms, denominators))
        for name, term in terms.items():
            share = term.total.detach() / denominators[term.denominator]
            result.losses[name] = result.losses.get(name, 0.0) + share
        for key, sums in (seen or {}).items():
            before = result.telemetry.get(key, (0.0, 0.0))
            result.telemetry[key] = (before[0] + sums[0], before[1] + sums[1])
    return result


def count_denominators(batches: Sequence[MicroBatch], mesh: Mesh) -> dict[str, float]:
    """Counted tokens of the global batch, at least 1; one all-reduce."""
    tokens = torch.tensor(float(sum(batch.num_tokens for batch in batches)), dtype=torch.float64)
    return {"tokens": max(float(mesh.sum_over_dp(tokens.to(mesh.device))), 1.0)}


def objective(terms: Mapping[str, LossTerm], denominators: Mapping[str, float]) -> Tensor:
    """The weighted sum of all loss terms."""
    parts = [t.total * (t.weight / denominators[t.denominator]) for t in terms.values()]
    return torch.stack(parts).sum()


# -------------------------------------------------------------------------- evaluate, save, resume


def validate(
    model: Transformer, data: Data, mesh: Mesh, state: TrainState, stop: StopFlag
) -> tuple[dict[str, float], int]:
    """(scores of the validation corpora, stop signal); at the end of a run all of them is read."""
    config = data.config
    samples = config.train.eval_samples if state.step < config.train.steps else 0
    scores = []
    for corpus in data.validation:
        score = score_corpus(model, corpus, config, mesh, samples, stop)
        if score is None:
            return {}, stop.agreed(mesh)
        scores.append(score)
    return score_values(scores, [source.path for source in config.data.val]), stop.agreed(mesh)


def save(
    run_dir: Path,
    config: Config,
    data: Data,
    engine: Engine,
    mesh: Mesh,
    state: TrainState,
    report: Report,
) -> None:
    """Write a checkpoint, then let go of old ones.

    Raises:
        CheckpointError: it could not be written; the earlier ones are untouched.
    """
    root = run_dir / "checkpoints"
    state = replace(state, interval=report.interval.carry(mesh))
    content = save_state(state, config, mesh, data.loader.state(state.step), data.tokenizer)
    checkpoint.save(root, state.step, engine.shards(), content, group=mesh.dp_group).result()
    with same_error(mesh):
        if mesh.rank == 0:
            checkpoint.remove_old(root, config.checkpoint.keep_last)


def resume(run_dir: Path, config: Config, data: Data, engine: Engine, mesh: Mesh) -> TrainState:
    """Load the newest good checkpoint, if there is one.

    Raises:
        ConfigError: a fixed field changed.
        CheckpointError: checkpoints that cannot be used, or nothing but damaged ones: starting over
            would write over what is left of the run.
    """
    root = run_dir / "checkpoints"
    path, damaged = checkpoint.find_checkpoint(root, group=mesh.dp_group)
    if path is None and damaged:
        raise CheckpointError(
            "\n".join(damaged) + f"\n{root}: holds nothing else; "
            "restore a checkpoint, or move the run folder away to start over"
        )
    for message in damaged if mesh.rank == 0 else []:
        log.warning(message)
    if path is None:
        return TrainState()
    saved = checkpoint.read_state(path)
    state = check_resume(saved, config, data.tokenizer, path)
    data.loader.check_state(saved["data"])
    shards = engine.shards()
    checkpoint.load(path, shards, group=mesh.dp_group)
    engine.load(shards)
    return state
