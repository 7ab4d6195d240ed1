"""Training: `train()` is the table of contents."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

from megarecur.config.schema import Config
from megarecur.data.corpus import Corpus, open_corpus
from megarecur.data.loader import Loader, MicroBatch
from megarecur.data.samples import TaskCorpus, TaskLoader, open_samples
from megarecur.data.tokenizer import Tokenizer, load_tokenizer
from megarecur.errors import CheckpointError, ConfigError, DataError, MegarecurError, MeshError
from megarecur.model.compile import CompiledModel, find_obstacle
from megarecur.model.telemetry import named
from megarecur.model.transformer import Transformer
from megarecur.optim.engine import Engine, build_engine
from megarecur.optim.schedule import learning_rate
from megarecur.parallel.mesh import Mesh, open_mesh, same_error, told_where
from megarecur.plan.order import order_hash
from megarecur.plan.schedule import Schedules
from megarecur.recurrence.depth import Depth, sample_depth
from megarecur.recurrence.schemes import build_map
from megarecur.train import checkpoint
from megarecur.train.alarms import Alarms, record_event
from megarecur.train.distill import load_teacher, with_teacher
from megarecur.train.evaluate import Score, continue_prompts, score_corpus, score_values
from megarecur.train.health import check_health
from megarecur.train.initial import load_initial
from megarecur.train.mirror import fetch_newest
from megarecur.train.profile import Profiler
from megarecur.train.report import Report, StepResult
from megarecur.train.saving import Saver
from megarecur.train.scales import profile_scales
from megarecur.train.signals import StopFlag, watch_signals
from megarecur.train.speed import measure_state
from megarecur.train.state import (
    TrainState,
    check_resume,
    is_reordered,
    open_run,
    save_state,
    steps_left_out,
    write_config,
)
from megarecur.train.step import build_model, forward_backward
from megarecur.train.task_scores import TaskScore, score_task, task_values

log = logging.getLogger(__name__)

FINISHED, DIVERGED, STOPPED = 0, 1, 3
"""Exit codes: all steps done; ended by an alarm; saved and stopped by a signal."""


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
        compiling, reason = choose_compiler(config, mesh)
        run_dir = resources.enter_context(open_run(config, mesh))
        health = check_health(config, run_dir, mesh)
        data = open_data(config, mesh)
        loader = resources.enter_context(closing(data)).loader
        config = with_teacher(data.config, data.tokenizer, data.loader.corpora, mesh)
        schedules = resources.enter_context(closing(open_schedules(config, mesh)))
        model = build_model(config, mesh, schedules)
        if config.model.residual == "admin" and not has_checkpoints(run_dir, mesh):
            profile_scales(model, config, data.loader, mesh)
        engine = build_engine(model, config, mesh)
        saver = resources.enter_context(Saver(run_dir, config, mesh))
        state = resume(run_dir, config, data, engine, schedules, mesh)
        teacher = load_teacher(config, mesh, model.project is not None)
        left_out = steps_left_out(run_dir, mesh)
        saver.prepare(engine.shards())
        with same_error(mesh):
            write_config(run_dir, config) if mesh.rank == 0 else None
            report = Report(run_dir, config, state, mesh)
        alarms = Alarms(config.alarms, report.rows(), state.rolled_back_at)
        for line in filter(None, (health, reason)):
            report.note(line)
        if mesh.pp > 1:
            report.note(schedules.describe(*step_to_take(config, mesh, state.step)))
        compiled = CompiledModel(model) if compiling else None
        profiler = Profiler(config.train.profile, run_dir, mesh)
        resources.callback(profiler.close)
        saved = validated = state.step
        if state.step and not report.is_validated(state.step):
            validated = 0  # The run ended between saving this step and scoring it.
        while True:
            saver.poll(stop)
            number = stop.agreed(mesh)
            if is_due(state.step, config.train.eval_every, config) and validated < state.step:
                report.beat(state.step, "evaluate")
                values, number = validate(model, data, mesh, schedules, state, stop)
                if values:
                    report.write_texts(state, continue_prompts(model, config, mesh, schedules))
                    report.write(state, values, stop)
                saver.scored()
                validated = state.step
            if number:
                break
            if state.step == config.train.steps:
                saver.finish()
                report.beat(state.step, "done")
                report.finish(f"done: {state.step} steps, {state.tokens} tokens in {run_dir}")
                return FINISHED
            report.beat(state.step, "train")
            profiler.begin(state.step)
            started = time.perf_counter()
            with named("data"):
                batches, unread = read_batches(loader, state.step, mesh)
            schedules.prepare(*step_to_take(config, mesh, state.step))
            schedules.prepare(*step_to_take(config, mesh, state.step + 1))
            waited = time.perf_counter() - started
            trained = state.step not in left_out
            due = trained and is_due(state.step + 1, config.train.log_every, config)
            if not trained:
                result = StepResult(depth=None, skipped=True)
                report.note(f"step {state.step + 1} is left out, as skipped_steps.json says")
            else:
                result = forward_backward(
                    model, engine, config, batches, state.step, mesh,
                    due, unread, schedules, teacher,
                )  # fmt: skip
                result.lr = learning_rate(config.optimizer, state.step, config.train.steps)
                what = f"reduction and update of step {state.step + 1}"
                with named("optimizer"), told_where(mesh, what):
                    result.grad_norm, result.skipped = engine.step(result.lr)
            result.data_seconds, result.seconds = waited, time.perf_counter() - started
            state = state.advance(config, result.skipped)
            if trained:
                report.interval.add(result)
            if due:
                values = report.close_interval(state, result) | saver.timings()
                held = measure_state(model, engine.shards())
                values |= report.tell_memory(held, build_map(config, result.depth))
                values |= report.tell_graphs(compiled)
                reasons = alarms.check(state.step, values)
                report.write(state, values | {"alarms/raised": len(reasons)}, stop)
                action, source = choose_action(reasons, alarms, saver, state, report)
                if action == "stop":
                    saver.finish()
                    report.beat(state.step, "diverged")
                    report.finish(f"stopped at step {state.step} by an alarm, unsaved")
                    return DIVERGED
                if source is not None:
                    load_checkpoint(source, engine, mesh)
                    state = state.rolled_back()
                    alarms.healthy_step = saved = state.step
                    save(saver, config, data, engine, schedules, state, report, last=False)
                    saver.wait()  # A run that dies now must not read those samples again.
            if saved < state.step and is_due(state.step, config.checkpoint.every, config):
                last = state.step == config.train.steps
                report.beat(state.step, "save")
                with named("save"):
                    save(saver, config, data, engine, schedules, state, report, last)
                saved = state.step
            if written := profiler.end(state.step - 1):
                report.note(written)
        report.beat(state.step, "save")
        if saved < state.step:
            save(saver, config, data, engine, schedules, state, report, last=True)
        saver.finish()
        report.beat(state.step, "stopped")
        mesh.max_over_world(0)  # Its word is there before the first process leaves.
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

    def close(self) -> None:
        """Stop reading ahead."""
        self.loader.close()
        for corpus in self.validation:
            corpus.close()


def open_data(config: Config, mesh: Mesh) -> Data:
    """Open and check tokenizer and corpora.

    Raises:
        DataError: on every rank, when any of them finds damage, or a tokenizer that differs.
    """
    with same_error(mesh):
        tokenizer = load_tokenizer(config.data.tokenizer)
        if config.task is not None:
            return open_task(with_vocab_size(config, tokenizer.vocab_size), tokenizer, mesh)
        train, validation = (
            [
                open_corpus(
                    s.path,
                    config.data.tokenizer,
                    tokenizer.fingerprint,
                    config.data.verify,
                    part=mesh.dp_rank,
                    num_parts=mesh.dp,
                    remote=s.remote,
                    cache_gb=s.cache_gb,
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
            shuffle_shards=config.data.shuffle_shards,
            mask_documents=config.data.mask_documents,
        )
    return Data(config, loader, validation, tokenizer.fingerprint)


def open_task(config: Config, tokenizer: Tokenizer, mesh: Mesh) -> Data:
    """The labelled samples of a task.

    Raises:
        DataError: damage, or corpora that do not fit the task.
    """
    assert config.task is not None
    train, validation = open_samples(config, mesh.dp_rank, mesh.dp)
    loader = TaskLoader(
        [(corpus, s.weight) for corpus, s in zip(train, config.data.train, strict=True)],
        config.task,
        multiple=config.parallel.tensor if config.parallel.sequence_parallel else 1,
        seq_length=config.data.seq_length,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp,
        seed=config.seed,
        shuffle=config.data.shuffle,
    )
    return Data(config, loader, list(validation), tokenizer.fingerprint)


def open_schedules(config: Config, mesh: Mesh) -> Schedules:
    """Where blocks live and in which order stages run; collective.

    Raises:
        MegarecurError: a placement or an order that cannot be.
        MeshError: ranks that choose different orders, and would wait for each other for ever.
    """
    with same_error(mesh):
        schedules = Schedules(config)
        chosen = schedules.training(*step_to_take(config, mesh, 0))
    if len(set(mesh.gather_objects(order_hash(chosen.order)))) > 1:
        raise MeshError(
            "the ranks chose different orders of the pipeline; run the same version of megarecur "
            "with the same config on all of them"
        )
    return schedules


def step_to_take(config: Config, mesh: Mesh, step: int) -> tuple[Depth | None, int]:
    """Depth and micro batches per replica of an optimizer step."""
    train = config.train
    depth = sample_depth(config.recurrence, config.seed, step)
    return depth, train.global_batch_size // (mesh.dp * train.micro_batch_size)


def read_batches(
    loader: Loader, step: int, mesh: Mesh
) -> tuple[list[MicroBatch], MegarecurError | None]:
    """This rank's micro batches, or why they cannot be read; those of the next steps are begun."""
    try:
        batches = [batch.to(mesh.device) for batch in loader.batch(step)]
    except MegarecurError as error:
        return [], error
    loader.prefetch(step + 1)
    return batches, None


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


def choose_compiler(config: Config, mesh: Mesh) -> tuple[bool, str]:
    """(whether every rank compiles, why not where `auto` had to choose so); collective.

    Raises:
        ConfigError: train.compile=true without what torch.compile needs.
    """
    wish = config.train.compile
    obstacle = find_obstacle(mesh.device) if wish else None
    with same_error(mesh):
        if wish is True and obstacle is not None:
            raise ConfigError(
                f"train.compile=true: {obstacle}; or run eagerly: train.compile=false"
            )
    obstacles = [found for found in mesh.gather_objects(obstacle) if found is not None]
    if obstacles:
        return False, f"train.compile=auto: running eagerly, as {obstacles[0]}"
    return bool(wish), ""


# -------------------------------------------------------------------------- evaluate, save, resume


def validate(
    model: Transformer,
    data: Data,
    mesh: Mesh,
    schedules: Schedules,
    state: TrainState,
    stop: StopFlag,
) -> tuple[dict[str, float], int]:
    """(scores of the validation corpora, stop signal); at the end of a run all of them is read.

    At train.eval_depths, losses are `val/depth_R/loss`, one curve per number of loops, always over
    train.eval_samples.
    """
    config = data.config
    some = config.train.eval_samples
    paths = [source.path for source in config.data.val]
    values: dict[str, float] = {}
    for depth in (None, *config.train.eval_depths):
        samples = 0 if depth is None and state.step == config.train.steps else some
        scores: list[Score] = []
        of_tasks: list[TaskScore] = []
        for corpus in data.validation:
            if isinstance(corpus, TaskCorpus):
                scored = score_task(model, corpus, config, mesh, samples, stop, depth, schedules)
                if scored is None:
                    return {}, stop.agreed(mesh)
                of_tasks.append(scored)
                continue
            score = score_corpus(model, corpus, config, mesh, samples, stop, depth, schedules)
            if score is None:
                return {}, stop.agreed(mesh)
            scores.append(score)
        prefix = "val/" if depth is None else f"val/depth_{depth}/"
        found = task_values(of_tasks, paths) if of_tasks else score_values(scores, paths)
        for name, value in found.items():
            values[prefix + name.removeprefix("val/")] = value
    return values, stop.agreed(mesh)


def save(
    saver: Saver,
    config: Config,
    data: Data,
    engine: Engine,
    schedules: Schedules,
    state: TrainState,
    report: Report,
    last: bool,
) -> None:
    """Begin to write a checkpoint; `last`: no optimizer step follows.

    Raises:
        CheckpointError: one could not be written; the earlier ones are untouched.
    """
    state = replace(state, interval=report.interval.carry(saver.mesh))
    order = schedules.training(*step_to_take(config, saver.mesh, state.step)).order
    cursor = data.loader.state(state.step)
    content = save_state(state, config, saver.mesh, cursor, data.tokenizer, order_hash(order))
    saver.save(state.step, engine.shards(), content, last)


def resume(
    run_dir: Path, config: Config, data: Data, engine: Engine, schedules: Schedules, mesh: Mesh
) -> TrainState:
    """Load the newest good checkpoint, if there is one, or the parameters to start from.

    Raises:
        ConfigError: a fixed field changed, or `init_from` names no run.
        CheckpointError: checkpoints that cannot be used, or nothing but damaged ones, here and in
            the mirror: starting over would write over what is left of the run.
    """
    root, mirror = run_dir / "checkpoints", config.checkpoint.mirror
    path, damaged = checkpoint.find_checkpoint(root, group=mesh.save_group)
    if path is None and mirror is not None:
        path, more = checkpoint.from_first_rank(lambda: fetch_newest(mirror, root), mesh.save_group)
        damaged = [*damaged, *more]
        if path is not None and mesh.rank == 0:
            log.warning("%s has no checkpoint to go on from; %s was fetched from %s",
                        root, path.name, mirror)  # fmt: skip
    if path is None and damaged:
        raise CheckpointError(
            "\n".join(damaged) + f"\n{root}: holds nothing else; "
            "restore a checkpoint, or move the run folder away to start over"
        )
    for message in damaged if mesh.rank == 0 else []:
        log.warning(message)
    if path is None:
        if config.init_from is not None:
            load_initial(config, engine, data.tokenizer, mesh)
        return TrainState()
    saved = checkpoint.read_state(path)
    state = check_resume(saved, config, data.tokenizer, path)
    data.loader.check_state(saved["data"])
    load_checkpoint(path, engine, mesh)
    order = schedules.training(*step_to_take(config, mesh, state.step)).order
    if mesh.rank == 0 and is_reordered(saved, config, mesh, order_hash(order)):
        log.warning("the pipeline's order of operations is not the one %s was saved with, though "
                    "the mesh is: sums will differ in their last bits", path)  # fmt: skip
    return state


def has_checkpoints(run_dir: Path, mesh: Mesh) -> bool:
    """Whether any rank sees some, whatever their state; collective."""
    found = checkpoint.list_checkpoints(run_dir / "checkpoints")
    return mesh.max_over_world(len(found)) > 0


def load_checkpoint(path: Path, engine: Engine, mesh: Mesh) -> None:
    """Give the engine the parameters and moments of a checkpoint; collective."""
    shards = engine.shards()
    checkpoint.load(path, shards, group=mesh.save_group)
    engine.load(shards)


def choose_action(
    reasons: Sequence[str], alarms: Alarms, saver: Saver, state: TrainState, report: Report
) -> tuple[str, Path | None]:
    """What to do about alarms (the config's choice, where it can be done), and from which
    checkpoint to go on; collective. What happened is told and recorded."""
    if not reasons:
        return "", None
    rule, source, reasons = alarms.config, None, list(reasons)
    action: str = rule.action
    if action == "roll_back" and state.roll_backs >= rule.max_roll_backs:
        action = "stop"
        reasons.append(f"alarms.max_roll_backs={rule.max_roll_backs} are used up")
    if action == "roll_back":
        saver.wait()
        source, _ = checkpoint.find_checkpoint(
            saver.root, group=saver.mesh.save_group, at_most=alarms.healthy_step
        )
        if source is None:
            action = "stop"
            reasons.append("there is no checkpoint from before to roll back to")
    event = {"step": state.step, "alarms": reasons, "action": action}
    if source is not None:
        event["from"] = source.name
    with same_error(saver.mesh):
        if saver.mesh.rank == 0:
            record_event(saver.run_dir, **event)
    done = f"{action} to {source.name}" if source is not None else action
    report.note(f"alarm at step {state.step}: {'; '.join(reasons)}: {done}")
    return action, source
