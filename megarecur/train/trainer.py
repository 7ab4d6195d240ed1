"""Training: `train()` is the table of contents."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megarecur.config.schema import Config
from megarecur.data.corpus import Corpus, open_corpus
from megarecur.data.loader import Loader, MicroBatch
from megarecur.data.tokenizer import load_tokenizer
from megarecur.errors import DataError
from megarecur.model.transformer import LossTerm, Telemetry, Transformer
from megarecur.optim.engine import Engine, PlainEngine
from megarecur.optim.schedule import learning_rate
from megarecur.parallel.mesh import Mesh, open_mesh
from megarecur.plan.cost import count_flops
from megarecur.recurrence.layer_map import LayerMap
from megarecur.recurrence.schemes import layer_map
from megarecur.train import checkpoint
from megarecur.train.evaluate import evaluate, score_values
from megarecur.train.metrics import Metrics, Progress
from megarecur.train.signals import watch_signals
from megarecur.train.speed import peak_flops, peak_memory
from megarecur.train.state import TrainState, check_resume, open_run, save_state, write_config

log = logging.getLogger(__name__)

FINISHED, STOPPED = 0, 3
"""Exit codes: all steps done; saved and stopped by a signal."""


def train(config: Config) -> int:
    """Train, or go on training, the run in config.run_dir. Returns the exit code.

    Raises:
        MegarecurError: for whatever the user can mend.
    """
    with open_mesh(config) as mesh, open_run(config, mesh) as run_dir, watch_signals() as stop:
        data = open_data(config, mesh)
        config = data.config
        model = Transformer(config, mesh.device)
        engine = PlainEngine(model, config, mesh)
        state = resume(run_dir, config, data, engine, mesh)
        if mesh.rank == 0:
            write_config(run_dir, config)
        report = Report(run_dir, config, state, mesh)
        while state.step < config.train.steps:
            step = state.step
            started = time.perf_counter()
            batches = [batch.to(mesh.device) for batch in data.loader.batch(step)]
            data.loader.prefetch(step + 1)
            waited = time.perf_counter() - started
            due = is_due(step + 1, config.train.log_every, config.train.steps)
            steps = layer_map(config.recurrence)
            result = forward_backward(model, engine, steps, batches, step, mesh, telemetry=due)
            lr = learning_rate(config.optimizer, step, config.train.steps)
            grad_norm, skipped = engine.step(lr)
            state = TrainState(
                step + 1,
                state.tokens + config.train.global_batch_size * config.data.seq_length,
                state.skipped + skipped,
            )
            report.add(result, lr, grad_norm, waited, time.perf_counter() - started)
            values = report.interval(state) if due else {}
            if is_due(state.step, config.train.eval_every, config.train.steps):
                values |= validate(model, data, config, mesh, state)
            report.write(state, values)
            number = stop.agreed(mesh)
            if number or is_due(state.step, config.checkpoint.every, config.train.steps):
                save(run_dir, config, data, engine, mesh, state)
            if number:
                report.stopped(state, number)
                return STOPPED
        report.finished(state)
    return FINISHED


def is_due(done: int, every: int, last: int) -> bool:
    """Whether something done every so many steps, and at the end, is due; every 0: at the end."""
    return done == last or (every > 0 and done % every == 0)


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
    tokenizer = load_tokenizer(config.data.tokenizer)
    error, train, validation = "", list[Corpus](), list[Corpus]()
    try:
        train, validation = (
            [
                open_corpus(
                    s.path, config.data.tokenizer, tokenizer.fingerprint, config.data.verify
                )
                for s in sources
            ]
            for sources in (config.data.train, config.data.val)
        )
    except DataError as failure:
        error = str(failure)
    errors = sorted({e for e in mesh.gather_objects(error) if e})
    if errors:
        raise DataError("\n".join(errors))
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


@dataclass
class StepResult:
    """Sums over this rank's micro batches, each already divided by its global denominator."""

    losses: dict[str, Tensor]
    telemetry: dict[tuple[int, int], tuple[Tensor, Tensor]]


def forward_backward(
    model: Transformer,
    engine: Engine,
    steps: LayerMap,
    batches: Sequence[MicroBatch],
    step: int,
    mesh: Mesh,
    telemetry: bool = False,
) -> StepResult:
    """Gradients of the objective over the global batch, left in the engine.

    The objective divides sums by counts over the global batch, known before the forward pass, so
    that it depends on neither dp, micro batch size nor padding.
    """
    denominators = count_denominators(batches, mesh)
    result = StepResult({}, {})
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
    model: Transformer, data: Data, config: Config, mesh: Mesh, state: TrainState
) -> dict[str, float]:
    """Score the validation corpora, if there are any; at the end all of them is read."""
    if not data.validation:
        return {}
    samples = config.train.eval_samples if state.step < config.train.steps else 0
    scores = evaluate(model, data.validation, config, mesh, samples)
    return score_values(scores, [Path(source.path).name for source in config.data.val])


def save(
    run_dir: Path, config: Config, data: Data, engine: Engine, mesh: Mesh, state: TrainState
) -> None:
    """Write a checkpoint, then let go of old ones.

    Raises:
        CheckpointError: it could not be written; the earlier ones are untouched.
    """
    root = run_dir / "checkpoints"
    content = save_state(state, config, mesh, data.loader.state(state.step), data.tokenizer)
    checkpoint.save(root, state.step, engine.shards(), content, group=mesh.dp_group).result()
    if mesh.rank == 0:
        checkpoint.remove_old(root, config.checkpoint.keep_last)


def resume(run_dir: Path, config: Config, data: Data, engine: Engine, mesh: Mesh) -> TrainState:
    """Load the newest good checkpoint, if there is one.

    Raises:
        ConfigError: a fixed field changed.
        CheckpointError: checkpoints that cannot be used.
    """
    path, damaged = checkpoint.find_checkpoint(run_dir / "checkpoints", group=mesh.dp_group)
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


# ------------------------------------------------------------------------------------------ report


class Report:
    """Gathers numbers between log steps and writes them on rank 0; one reduction per log."""

    def __init__(self, run_dir: Path, config: Config, state: TrainState, mesh: Mesh) -> None:
        self.run_dir, self.config, self.mesh = run_dir, config, mesh
        steps = layer_map(config.recurrence)
        self.keys = [(step.block, step.loop_index) for step in steps]
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.peak = peak_flops(mesh.device, dtype) * mesh.dp
        self.flops_per_token = count_flops(config, steps).train
        self.reset()
        if mesh.rank == 0:
            self.metrics = Metrics(run_dir, config, state.step)
            self.progress = Progress(config.train.steps)
            if state.step:
                self.progress.note(f"resumed {run_dir} at step {state.step}")

    def reset(self) -> None:
        """Start a new interval."""
        self.losses: dict[str, Tensor] = {}
        self.num_steps, self.waited, self.seconds = 0, 0.0, 0.0

    def add(
        self, result: StepResult, lr: float, grad_norm: float, waited: float, seconds: float
    ) -> None:
        """One optimizer step."""
        for name, value in result.losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value
        self.result, self.lr, self.grad_norm = result, lr, grad_norm
        self.num_steps += 1
        self.waited += waited
        self.seconds += seconds

    def interval(self, state: TrainState) -> dict[str, float]:
        """The numbers since the last log step, reduced over replicas; collective."""
        names = list(self.losses)
        sums = [self.losses[name] / self.num_steps for name in names]
        for key in self.keys:
            sums += self.result.telemetry[key]
        reduced = self.mesh.sum_over_dp(torch.stack([s.to(torch.float64) for s in sums])).tolist()
        tokens = self.config.train.global_batch_size * self.config.data.seq_length
        rate = tokens * self.num_steps / self.seconds
        values = {f"train/{name}": reduced[i] for i, name in enumerate(names)}
        values |= {
            "optim/lr": self.lr,
            "optim/grad_norm": self.grad_norm,
            "optim/skipped": state.skipped,
            "speed/tokens_per_second": rate,
            "speed/mfu": rate * self.flops_per_token / self.peak,
            "speed/data_wait": self.waited / self.seconds,
            "speed/step_seconds": self.seconds / self.num_steps,
            "memory/peak_bytes": peak_memory(self.mesh.device),
        }
        for i in range(len(self.keys)):
            norm, update = reduced[len(names) + 2 * i :][:2]
            values[f"recurrence/residual_norm/{i:02d}"] = norm / tokens
            values[f"recurrence/relative_update/{i:02d}"] = update / tokens
        self.reset()
        return values

    def write(self, state: TrainState, values: dict[str, float]) -> None:
        """One row and one line, if there is something to tell."""
        if values and self.mesh.rank == 0:
            self.metrics.write(state.step, state.tokens, values)
            self.progress.show(state.step, values)

    def stopped(self, state: TrainState, number: int) -> None:
        """Say that a signal ended the run early."""
        if self.mesh.rank == 0:
            self.metrics.close()
            self.progress.note(
                f"saved at step {state.step} and stopped by signal {number}; "
                "the same command goes on from there"
            )

    def finished(self, state: TrainState) -> None:
        """Say where things are."""
        if self.mesh.rank == 0:
            self.metrics.close()
            self.progress.note(f"done: {state.step} steps, {state.tokens} tokens in {self.run_dir}")
