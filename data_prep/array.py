"""Prepare a corpus by many processes that share only a file system: the tasks of job arrays.

The submitting process reads all inputs once and writes the plan. Each task does its share of one
phase: a pure function of the plan, the task's number and the number of tasks, balanced by bytes.
Finished pieces are kept, so a failed task can be rerun alone, on any machine. The corpus is
byte-identical to the one that a single machine writes.

The file system must let all machines lock files (flock).
"""

from __future__ import annotations

import fcntl
import heapq
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from megarecur.data.corpus import Manifest, read_manifest
from megarecur.data.tokenizer import load_tokenizer
from megarecur.data_prep.disk import explain_os_errors
from megarecur.data_prep.plan import PrepPlan, Request, make_plan, read_record, write_record
from megarecur.data_prep.progress import ProgressReport
from megarecur.data_prep.shards import (
    assemble,
    copy_tokenizer,
    decide_once,
    hold,
    is_begun,
    is_prepared,
    part_targets,
    part_tasks,
    partial_of,
    read_decision,
    read_sources,
    read_tasks,
    refuse_missing,
    resume_or_restart,
    tokenise_part,
)
from megarecur.data_prep.workers import Workers
from megarecur.errors import DataError

Phase = Literal["read", "tokenise", "assemble"]
Work = dict[Phase, list[int]]
"""Numbers of the tasks of each phase that have work left; {} if everything is done."""
RECORD = "record.json"
PATIENCE = 30.0
"""Seconds a task waits for the folder's lock, which the submitting process may still hold."""


def share(sizes: Sequence[int], tasks: int) -> list[list[int]]:
    """Return the pieces of work of each task: the largest first, to the task with least so far."""
    shares: list[list[int]] = [[] for _ in range(tasks)]
    held = [(0, 0, task) for task in range(tasks)]  # bytes, pieces, task
    for piece in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        num_bytes, pieces, task = held[0]
        shares[task].append(piece)
        heapq.heapreplace(held, (num_bytes + sizes[piece], pieces + 1, task))
    return [sorted(pieces) for pieces in shares]


def plan_remaining_work(request: Request, out: Path, tasks: int) -> Work:
    """Return the work that `begin` would find, without writing anything.

    Inputs are read only if a previous result of them may exist.

    Raises:
        DataError: see `begin`.
    """
    partial = partial_of(out)
    with explain_os_errors(partial):
        compare = out.exists() or partial.exists()
        plan = make_plan(request, load_tokenizer(request.tokenizer, request.eos), hashed=compare)
        if compare and is_prepared(out, plan):
            return {}
        return _remaining(plan, partial, tasks, begun=compare and is_begun(partial, plan.stamp))


@contextmanager
def begin(request: Request, out: Path, tasks: int) -> Iterator[Work]:
    """Read the inputs and write the plan for the tasks; yield the remaining work.

    Until the context ends, only tasks of this preparation can start.

    Raises:
        DataError: an input cannot be read, another process prepares this corpus, or OUT already
        holds something else.
    """
    partial = partial_of(out)
    with explain_os_errors(partial, "finished work is kept"):
        model = load_tokenizer(request.tokenizer, request.eos)
        plan = make_plan(request, model)
        if is_prepared(out, plan):
            shutil.rmtree(partial, ignore_errors=True)
            yield {}
            return
        with hold(partial) as lock:
            resume_or_restart(partial, plan.stamp)
            copy = copy_tokenizer(request.tokenizer, model, partial)
            write_record(partial / RECORD, request, plan, copy)
            work = _remaining(plan, partial, tasks, begun=True)
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield work


def run_task(
    request: Request,
    out: Path,
    phase: Phase,
    task: int,
    tasks: int,
    *,
    workers: int = 0,
    progress: ProgressReport | None = None,
) -> dict[str, Manifest]:
    """Do the remaining work of one task's share of one phase.

    Args:
        phase: read, tokenise (after all reading) or assemble (after all tokenising; one task).
        task: number of the task, from 0.
        workers: processes; 0 means one per core.

    Returns:
        After the last phase, the manifest of each split by name.

    Raises:
        DataError: the request was not submitted, the previous phase is not done, an input differs
        from the plan, or another process prepares this corpus.
    """
    if not 0 <= task < tasks:
        raise DataError(f"task {task}: must be at least 0 and below the number of tasks, {tasks}")
    partial = partial_of(out)
    with explain_os_errors(partial, "finished work is kept"):
        read_record(partial / RECORD, request)  # before the folder would be created
        number = workers or len(os.sched_getaffinity(0))
        together = phase != "assemble"
        with hold(partial, together, PATIENCE), Workers(number, progress) as pool:
            plan, tokenizer_file = read_record(partial / RECORD, request)
            if phase == "read":
                _read(plan, partial, task, tasks, pool)
                return {}
            read, _ = read_tasks(plan, partial)
            decision = decide_once(plan, partial, read)
            if phase == "tokenise":
                mine = share([n for sizes in decision.parts for n in sizes], tasks)[task]
                parts, sizes = part_tasks(partial, read, decision, tokenizer_file, mine)
                pool.run("tokenise", tokenise_part, parts, ".tokens", sizes)
                return {}
            files = [target.with_suffix(".tokens") for target in part_targets(read, decision)]
            refuse_missing(files, "tokenise")
            assemble(plan, out, partial, read, decision, tokenizer_file, progress)
    return {split: read_manifest(out / split) for split in plan.splits}


def _read(plan: PrepPlan, partial: Path, task: int, tasks: int, pool: Workers) -> None:
    """Do a share of the first phase; the last task also decides about the documents."""
    read, sizes = read_tasks(plan, partial, checked=True)
    mine = share(sizes, tasks)[task]
    pool.run("read", read_sources, [read[i] for i in mine], ".npz", [sizes[i] for i in mine])
    # Uses a listing, because network file systems cache failed look-ups of names.
    there = set(os.listdir(partial))
    if all(f"{each.target.name}.npz" in there for each in read):
        decide_once(plan, partial, read)


def _remaining(plan: PrepPlan, partial: Path, tasks: int, begun: bool) -> Work:
    """Return the tasks of each phase that have work left."""
    there = set(os.listdir(partial)) if begun else set[str]()
    read, sizes = read_tasks(plan, partial)
    done = [f"{each.target.name}.npz" in there for each in read]
    work: Work = {"read": _unfinished(done, sizes, tasks), "tokenise": [*range(tasks)]}
    if "decision.json" in there:
        decision = read_decision(partial)
        done = [f"{target.name}.tokens" in there for target in part_targets(read, decision)]
        work["tokenise"] = _unfinished(done, [n for part in decision.parts for n in part], tasks)
    return work | {"assemble": [0]}


def _unfinished(done: Sequence[bool], sizes: Sequence[int], tasks: int) -> list[int]:
    """Return the tasks with an unfinished piece of work."""
    shares = share(sizes, tasks)
    return [task for task in range(tasks) if not all(done[i] for i in shares[task])]
