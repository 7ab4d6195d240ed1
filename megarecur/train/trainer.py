"""The training loop: `train()` sets up a run, `loop()` takes its optimizer steps."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Container, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megarecur.checkpoint import checkpoint
from megarecur.checkpoint.identity import identify, owner_of
from megarecur.checkpoint.initial import load_initial
from megarecur.checkpoint.mirror import fetch_newest
from megarecur.checkpoint.saving import Saver, find_non_finite
from megarecur.config.run import Config
from megarecur.data.loader import Loader, MicroBatch
from megarecur.data.open import Data, open_data
from megarecur.errors import CheckpointError, MegarecurError, MeshError
from megarecur.model.compile import CompiledModel
from megarecur.model.telemetry import named
from megarecur.model.transformer import Transformer
from megarecur.objective.teacher import Teacher
from megarecur.optim.build import build_engine
from megarecur.optim.engine import Engine
from megarecur.optim.schedule import learning_rate
from megarecur.parallel.mesh import Mesh, annotate_rank_errors, open_mesh, same_error
from megarecur.plan.cost import check_size
from megarecur.plan.order import order_hash
from megarecur.plan.schedule import Schedules
from megarecur.progress import Note
from megarecur.recurrence.depth import Depth, draw_depth
from megarecur.recurrence.schemes import build_map
from megarecur.train.alarms import Alarms, record_event
from megarecur.train.compiler import choose_compiler
from megarecur.train.distill import load_teacher, with_teacher
from megarecur.train.eval_tasks import PREFIX, load_eval_tasks, score_eval_tasks
from megarecur.train.evaluate import continue_prompts, validate
from megarecur.train.flight_recorder import watch_for_hangs
from megarecur.train.health import check_health
from megarecur.train.heartbeat import Heartbeat
from megarecur.train.profile import Profiler
from megarecur.train.report import Report, StepResult
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
)
from megarecur.train.step import build_model, forward_backward
from megarecur.train.waiting import reporting_long_phases

log = logging.getLogger(__name__)

FINISHED, DIVERGED, STOPPED = 0, 1, 3
"""Exit codes: all steps are done; an alarm ended the run; a signal made it save and stop."""


@dataclass
class Run:
    """Components and progress of a running training."""

    config: Config
    mesh: Mesh
    data: Data
    schedules: Schedules
    model: Transformer
    engine: Engine
    teacher: Teacher | None
    compiled: CompiledModel | None
    saver: Saver
    report: Report
    alarms: Alarms
    profiler: Profiler
    beat: Heartbeat
    stop: StopFlag
    left_out: Container[int]
    """Steps that skipped_steps.json excludes."""
    state: TrainState
    saved: int
    """Step of the newest checkpoint."""
    validated: int
    """Step of the newest evaluation."""
    tasks: dict[str, Any]
    """Tasks of train.eval_tasks, on the first process."""
    scored: int
    """Step of the newest scores on tasks."""
    postponed: bool = False
    """Whether a checkpoint is due beside the regular ones: one of these waits for healthy
    parameters, or was deleted."""


def train(config: Config, stop: StopFlag | None = None) -> int:
    """Train, or resume, the run in config.run_dir. Returns the exit code.

    Args:
        stop: the flag that records signals; None: handlers are installed while this runs.

    Raises:
        MegarecurError: for any error that the user can fix.
    """
    with ExitStack() as resources:
        stop = stop or resources.enter_context(watch_signals())
        mesh = resources.enter_context(open_mesh(config))
        watch_for_hangs(mesh.device)
        compiling, reason = choose_compiler(config, mesh)
        folder = resources.enter_context(open_run(config, mesh))
        run_dir = folder.path
        beat = Heartbeat(run_dir, mesh.rank == 0)
        beat.enter("start", 0, "health check")
        resources.enter_context(reporting_long_phases(beat, run_dir, mesh))
        health = check_health(config, run_dir, mesh, note=beat.note("start"))
        beat.advance("start", "opening corpora")
        data = resources.enter_context(closing(open_data(config, mesh)))
        config = with_teacher(data.config, data.tokenizer, data.loader.corpora, mesh)
        check_size(config)
        schedules = resources.enter_context(closing(open_schedules(config, mesh)))
        beat.advance("start", "building the model")
        model = build_model(config, mesh, schedules)
        if config.model.residual == "admin" and not has_checkpoints(run_dir, mesh):
            profile_scales(model, config, data.loader, mesh)
        engine = build_engine(model, config, mesh)
        saver = resources.enter_context(Saver(run_dir, config, mesh, beat.note("save")))
        state, source = resume(run_dir, config, data, engine, schedules, mesh, beat.note("start"))
        origin = identify_run(saver, state, source, mesh)
        teacher = load_teacher(config, mesh, model.project is not None)
        left_out = steps_left_out(run_dir, mesh)
        saver.prepare(engine.shards())
        with same_error(mesh):
            folder.write_config(config) if mesh.rank == 0 else None
            report = Report(folder, config, state, mesh)
        alarms = Alarms(config.alarms, report.rows(), state.rolled_back_at)
        stays = config.train.offload_activations and mesh.device.type == "cpu"
        unmoved = "train.offload_activations=true moves nothing on a CPU" if stays else ""
        for line in filter(None, (health, origin, model.attention.describe(), reason, unmoved)):
            report.note(line)
        if mesh.pp > 1:
            report.note(schedules.describe(*step_to_take(config, mesh, state.step)))
        compiled = CompiledModel(model) if compiling else None
        tasks = load_eval_tasks(config, mesh)
        profiler = Profiler(config.train.profile, run_dir, mesh)
        resources.callback(profiler.close)
        # What a start has made stays: full collections, which stop all threads, pass over it.
        resources.callback(gc.unfreeze)
        gc.freeze()
        # An earlier job may have ended between saving a step and scoring it.
        validated = state.step if state.step and report.is_validated(state.step) else 0
        scored = state.step if state.step and report.is_validated(state.step, PREFIX) else 0
        return loop(
            Run(
                config, mesh, data, schedules, model, engine, teacher, compiled, saver, report,
                alarms, profiler, beat, stop, left_out, state, state.step, validated,
                tasks, scored,
            )
        )  # fmt: skip


def loop(run: Run) -> int:
    """Take optimizer steps until the last one, a signal or an alarm. Returns the exit code."""
    while True:
        run.saver.poll(run.stop.fail)
        signal = evaluate_if_due(run, run.stop.agreed(run.mesh))
        if not signal:
            signal = score_tasks_if_due(run)
        if signal:
            return end_stopped(run, signal)
        if run.state.step >= run.config.train.steps:
            return end_finished(run)
        result = train_one_step(run)
        reasons = log_and_check(run, result) if result is not None else []
        code = save_if_due(run, reasons)
        if code is not None:
            return code
        if written := run.profiler.end(run.state.step - 1):
            run.report.note(written)


def evaluate_if_due(run: Run, signal: int) -> int:
    """Score the validation corpora if it is due; returns the signal to stop for, 0 if none."""
    config, mesh, state, beat = run.config, run.mesh, run.state, run.beat
    if run.validated >= state.step or not is_due(state.step, config.train.eval_every, config):
        return signal
    beat.enter("evaluate", state.step)
    values, signal = validate(run.model, run.data, mesh, run.schedules, state, run.stop, beat)
    if values:
        note = beat.note("evaluate")
        texts = continue_prompts(run.model, config, mesh, run.schedules, note)
        run.report.write_texts(state, texts, run.stop)
        run.report.write(state, values, run.stop)
    beat.enter("save", state.step)
    run.saver.scored()
    run.validated = state.step
    return signal


def score_tasks_if_due(run: Run) -> int:
    """Score the run on train.eval_tasks if it is due; returns the signal to stop for, 0 if none."""
    config, state, asked = run.config, run.state, run.config.train.eval_tasks
    if asked is None or run.scored >= state.step or not is_due(state.step, asked.every, config):
        return 0
    run.beat.enter("evaluate", state.step)
    note = run.beat.note("evaluate", "tasks: ")
    values = score_eval_tasks(
        run.model, run.tasks, config, run.mesh, run.schedules, state.step, note
    )
    run.report.write(state, values, run.stop)
    run.scored = state.step
    return run.stop.agreed(run.mesh)


def train_one_step(run: Run) -> StepResult | None:
    """Take an optimizer step and advance `run.state`; returns None for an excluded step.

    Raises:
        MegarecurError: on every rank, the reason why a rank could not read its batches.
    """
    config, mesh, step = run.config, run.mesh, run.state.step
    run.beat.enter("train", step)
    run.profiler.begin(step)
    started = time.perf_counter()
    with named("data"):
        batches, unread = read_batches(run.data.loader, step, mesh)
    for ahead in (step, step + 1):
        run.schedules.prepare(*step_to_take(config, mesh, ahead))
    waited = time.perf_counter() - started
    if step in run.left_out:
        run.report.note(f"step {step + 1} is left out, as skipped_steps.json says")
        run.state = run.state.advance(config, skipped=True)
        return None
    telemetry = is_due(step + 1, config.train.log_every, config)
    result = forward_backward(
        run.model, run.engine, config, batches, step, mesh,
        telemetry, unread, run.schedules, run.teacher,
    )  # fmt: skip
    result.lr = learning_rate(config.optimizer, step, config.train.steps)
    with named("optimizer"), annotate_rank_errors(mesh, f"reduction and update of step {step + 1}"):
        result.grad_norm, result.skipped = run.engine.step(result.lr)
    result.data_seconds, result.seconds = waited, time.perf_counter() - started
    run.state = run.state.advance(config, result.skipped)
    run.report.interval.add(result)
    run.alarms.note_gradient(finite=not result.skipped)
    return result


def log_and_check(run: Run, result: StepResult) -> list[str]:
    """Write the metrics of an interval if it is due; returns the reasons for alarms."""
    config, state, report = run.config, run.state, run.report
    if not is_due(state.step, config.train.log_every, config):
        return []
    values = report.close_interval(state, result) | run.saver.timings()
    held = measure_state(run.model, run.engine)
    values |= report.report_memory(held, build_map(config, result.depth))
    values |= report.count_graphs(run.compiled)
    values |= {f"speed/attention/{run.model.attention.backend}": 1.0}
    reasons = run.alarms.check(state.step, values)
    report.write(state, values | {"alarms/raised": len(reasons)}, run.stop)
    lost = run.mesh.rank == 0 and run.stop.error is None and run.saver.is_lost()
    if run.mesh.max_over_world(int(lost)):
        report.note(f"{run.saver.newest} was deleted under the run; another one is saved now")
        run.postponed = True
    return reasons


def save_if_due(run: Run, reasons: Sequence[str]) -> int | None:
    """Save a checkpoint if it is due, or act on alarms. Returns the exit code, None to continue."""
    config, alarms, step = run.config, run.alarms, run.state.step
    due = run.postponed or is_due(step, config.checkpoint.every, config)
    last, saving = step == config.train.steps, due and run.saved < step
    broken = find_non_finite(run.engine.shards(), run.mesh) if saving else ""
    action, source = choose_action(run, reasons, broken)
    if action == "stop":
        return end_diverged(run, "by an alarm")
    if source is not None:
        roll_back(run, source)
    elif saving and last and alarms.lost:
        return end_diverged(run, f"as {alarms.streak_in_words}")
    elif saving and alarms.streak and not last:
        run.postponed = True  # These parameters may be the cause; good checkpoints must stay.
    elif saving:
        # A run whose folder another one holds now must not save into it.
        run.stop.agreed(run.mesh)
        run.postponed = False
        run.beat.enter("save", step)
        with named("save"):
            save(run, last)
        run.saved = step
    return None


def roll_back(run: Run, source: Path) -> None:
    """Load a checkpoint and save it under the current step; collective.

    The samples since that checkpoint are not read again.
    """
    run.beat.enter("save", run.state.step)
    load_checkpoint(source, run.engine, run.mesh, run.beat.note("save"))
    run.state = run.state.rolled_back()
    run.alarms.healthy_step = run.saved = run.state.step
    run.alarms.streak = 0
    save(run, last=False)
    run.saver.wait()  # A run that dies now must not read those samples again.


def end_finished(run: Run) -> int:
    """End a run whose steps are done. Returns the exit code; collective."""
    state, beat = run.state, run.beat
    beat.enter("save", state.step)
    run.saver.finish()
    beat.enter("done", state.step)
    run.report.finish(f"done: {state.step} steps, {state.tokens} tokens in {run.saver.run_dir}")
    return FINISHED


def end_stopped(run: Run, signal: int) -> int:
    """Save and end a run that a signal stops. Returns the exit code; collective."""
    state, beat = run.state, run.beat
    beat.enter("save", state.step)
    what = f"saved at step {state.step}"
    if run.saved < state.step:
        broken = find_non_finite(run.engine.shards(), run.mesh)
        if broken or run.alarms.lost:
            why = f"{broken} is not finite" if broken else run.alarms.streak_in_words
            what = f"not saved at step {state.step}, as {why},"
        else:
            save(run, last=True)
    run.saver.finish()
    beat.enter("stopped", state.step)
    run.mesh.max_over_world(0)  # The heartbeat is written before the first process exits.
    run.report.finish(
        f"{what} and stopped by signal {signal}; the same command resumes from "
        "the newest checkpoint"
    )
    return STOPPED


def end_diverged(run: Run, why: str) -> int:
    """End a run without saving its diverged parameters. Returns the exit code; collective."""
    step = run.state.step
    run.beat.enter("save", step)
    run.saver.finish()
    run.beat.enter("diverged", step)
    run.report.finish(f"stopped at step {step} {why}, unsaved")
    return DIVERGED


def is_due(done: int, every: int, config: Config) -> bool:
    """Return True if a periodic action is due: every `every` steps (0: never), and at the end."""
    return done >= config.train.steps or (every > 0 and done % every == 0)


# --------------------------------------------------------------------------------------- start


def open_schedules(config: Config, mesh: Mesh) -> Schedules:
    """Build the placement and pipeline orders, and check that all ranks agree; collective.

    Raises:
        MegarecurError: the placement or the order is invalid.
        MeshError: the ranks chose different orders, with which they would deadlock.
    """
    with same_error(mesh):
        schedules = Schedules(config)
        chosen = schedules.training(*step_to_take(config, mesh, 0))
    if not mesh.agrees_over_world(order_hash(chosen.order)):
        raise MeshError(
            "the ranks chose different orders of the pipeline; run the same version of megarecur "
            "with the same config on all of them"
        )
    return schedules


def step_to_take(config: Config, mesh: Mesh, step: int) -> tuple[Depth | None, int]:
    """Return depth and number of micro batches per replica of an optimizer step."""
    train = config.train
    depth = draw_depth(config, step)
    return depth, train.global_batch_size // (mesh.readers * train.micro_batch_size)


def read_batches(
    loader: Loader, step: int, mesh: Mesh
) -> tuple[list[MicroBatch], MegarecurError | None]:
    """Return this rank's micro batches, or the error of reading; prefetches the next step's."""
    try:
        batches = loader.batch(step)
    except MegarecurError as error:
        return [], error
    loader.prefetch(step + 1)
    return batches, None


# ------------------------------------------------------------------------------ save, resume


def save(run: Run, last: bool) -> None:
    """Start to save a checkpoint.

    Args:
        last: no optimizer step follows.

    Raises:
        CheckpointError: this or the previous save failed; earlier checkpoints are untouched.
    """
    config, mesh = run.config, run.mesh
    state = replace(run.state, interval=run.report.interval.carry(mesh))
    order = run.schedules.training(*step_to_take(config, mesh, state.step)).order
    cursor = run.data.loader.state(state.step)
    content = save_state(state, config, mesh, cursor, run.data.tokenizer, order_hash(order))
    run.saver.save(state.step, run.engine.shards(), content, last)


def resume(
    run_dir: Path,
    config: Config,
    data: Data,
    engine: Engine,
    schedules: Schedules,
    mesh: Mesh,
    note: Note,
) -> tuple[TrainState, str]:
    """Load the newest intact checkpoint if there is one, else the initial parameters.

    Returns:
        The state to start from, and the run that `init_from` has loaded, in words; else "".

    Raises:
        ConfigError: a fixed field has changed, or `init_from` does not name a run.
        CheckpointError: a checkpoint cannot be used, or all are damaged, here and in the mirror. A
            fresh start would overwrite the rest of the run.
    """
    root, mirror = run_dir / "checkpoints", config.checkpoint.mirror
    path, damaged = checkpoint.find_checkpoint(root, group=mesh.save_group, note=note)
    if path is None and mirror is not None:
        path, more = checkpoint.from_first_rank(
            lambda: fetch_newest(mirror, root, note), mesh.save_group
        )
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
        initial = config.init_from is not None
        source = load_initial(config, engine, data.tokenizer, mesh) if initial else ""
        return TrainState(), source
    saved = checkpoint.read_state(path)
    state = check_resume(saved, config, data.tokenizer, path)
    data.loader.check_state(saved["data"])
    load_checkpoint(path, engine, mesh, note)
    order = schedules.training(*step_to_take(config, mesh, state.step)).order
    if mesh.rank == 0 and is_reordered(saved, config, mesh, order_hash(order)):
        log.warning("the pipeline's order of operations is not the one %s was saved with, though "
                    "the mesh is: sums will differ in their last bits", path)  # fmt: skip
    return state, ""


def identify_run(saver: Saver, state: TrainState, source: str, mesh: Mesh) -> str:
    """Give the saver the run's identity; collective. Returns which run this is, and whether it is
    resumed or has its parameters from another.

    Args:
        source: the run that `init_from` has loaded, in words; "" if it has loaded none.

    Raises:
        ConfigError: the recorded identity is damaged, or the mirror belongs to another run.
    """
    text = ""
    with same_error(mesh):
        if mesh.rank == 0:
            path = saver.root / f"step-{state.step:08d}"
            resumed = path.is_dir()
            found = identify(saver.run_dir, path if resumed else None, source)
            saver.identify(found.run)
            name = saver.run_dir.resolve().name
            if resumed:
                saver.newest = path
                owner = owner_of(path) or found.run
                text = f"run {name} (ID {owner}) resumes at step {state.step}, from {path}"
            else:
                text = f"run {name} (ID {found.run}) starts"
                text += f" from the parameters of {source}" if source else ""
            if found.copy_of:
                text += f"; {saver.run_dir} is a copy of {found.copy_of}: now ID {found.run}"
    return text


def has_checkpoints(run_dir: Path, mesh: Mesh) -> bool:
    """Return True if any rank sees checkpoints, even damaged ones; collective."""
    found = checkpoint.list_checkpoints(run_dir / "checkpoints")
    return mesh.max_over_world(len(found)) > 0


def load_checkpoint(path: Path, engine: Engine, mesh: Mesh, note: Note) -> None:
    """Load the parameters and moments of a checkpoint into the engine; collective."""
    shards = engine.shards()
    checkpoint.load(path, shards, group=mesh.save_group, note=note)
    engine.load(shards)


def choose_action(run: Run, reasons: Sequence[str], broken: str) -> tuple[str, Path | None]:
    """Choose the action on alarms: the config's if possible, else stop; collective.

    The alarms and the action are printed, and recorded in events.jsonl.

    Args:
        broken: an entry of the state that is not finite, "" if none; the action is then never just
            a warning.

    Returns:
        The action, "" if nothing is wrong, and the checkpoint to roll back to.
    """
    alarms, saver, state, report = run.alarms, run.saver, run.state, run.report
    if not reasons and not broken:
        return "", None
    rule, source, reasons = alarms.config, None, list(reasons)
    action: str = rule.action
    if broken:
        reasons.append(f"{broken} is not finite")
        action = "stop" if action == "warn" else action
    if action == "roll_back" and state.roll_backs >= rule.max_roll_backs:
        action = "stop"
        reasons.append(f"alarms.max_roll_backs={rule.max_roll_backs} are used up")
    if action == "roll_back":
        saver.wait()
        # Every saved checkpoint is finite, and may be newer than the last log step.
        at_most = None if broken else alarms.healthy_step
        source, _ = checkpoint.find_checkpoint(
            saver.root, group=saver.mesh.save_group, at_most=at_most
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
