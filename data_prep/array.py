"""One preparation by many processes that share nothing but a file system: the tasks of job arrays.

Whoever submits looks at all inputs once and writes the plan down. Each task does its share of one
phase, by number: a pure function of the plan and of the number of tasks, balanced by bytes. What
is finished is left alone, so that a failed task can be run again by itself, anywhere. The corpus
is the one that a single machine writes, byte for byte.

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

from data_prep.files import explain_os_errors
from data_prep.plan import Plan, Request, make_plan, read_record, write_record
from data_prep.progress import ProgressReport
from data_prep.shards import (
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
from data_prep.workers import Workers
from megarecur.data.corpus import Manifest, read_manifest
from megarecur.data.tokenizer import load_tokenizer
from megarecur.errors import DataError

Phase = Literal["read", "tokenise", "assemble"]
Work = dict[Phase, list[int]]
"""The numbers of the tasks of each phase that have something left to do; {}: all is there."""
RECORD = "record.json"
PATIENCE = 30.0
"""Seconds a task waits for the folder: whoever submitted it may not have let go of it yet."""


def share(sizes: Sequence[int], tasks: int) -> list[list[int]]:
    """Which pieces of work each task does: the largest first, to whom has least so far."""
    shares: list[list[int]] = [[] for _ in range(tasks)]
    held = [(0, 0, task) for task in range(tasks)]  # bytes, pieces, task
    for piece in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        num_bytes, pieces, task = held[0]
        shares[task].append(piece)
        heapq.heapreplace(held, (num_bytes + sizes[piece], pieces + 1, task))
    return [sorted(pieces) for pieces in shares]


def foresee(request: Request, out: Path, tasks: int) -> Work:
    """What `begin` would find to do; nothing is written.

    Inputs are read only where there is something that may have been made of them.

    Raises:
        DataError: as `begin`.
    """
    partial = partial_of(out)
    with explain_os_errors(partial):
        compare = out.exists() or partial.exists()
        plan = make_plan(request, load_tokenizer(request.tokenizer), hashed=compare)
        if compare and is_prepared(out, plan):
            return {}
        return _remaining(plan, partial, tasks, begun=compare and is_begun(partial, plan))


@contextmanager
def begin(request: Request, out: Path, tasks: int) -> Iterator[Work]:
    """Look at the inputs and write down the plan, for tasks to follow; gives what is left to do.

    Until the context is left, nothing but tasks of this preparation can start.

    Raises:
        DataError: an input cannot be read, somebody else prepares this corpus, or OUT already
            holds something else.
    """
    partial = partial_of(out)
    with explain_os_errors(partial, "what is finished is kept"):
        model = load_tokenizer(request.tokenizer)
        plan = make_plan(request, model)
        if is_prepared(out, plan):
            shutil.rmtree(partial, ignore_errors=True)
            yield {}
            return
        with hold(partial) as lock:
            resume_or_restart(partial, plan)
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
    """Do what is left of one task's share of one phase.

    Args:
        request: as it was submitted.
        out: folder of the result.
        phase: read, tokenise (when all is read) or assemble (when all is tokenised; one task).
        task: its number, from 0.
        tasks: how many there are.
        workers: processes; 0: as many as cores.
        progress: told how far the work is.

    Returns:
        After the last phase the manifest of each split, by its name.

    Raises:
        DataError: nothing of the kind was submitted, the phase before is not done, an input is
            not the one that was planned for, or somebody else prepares this corpus.
    """
    if not 0 <= task < tasks:
        raise DataError(f"task {task}: must be at least 0 and below the number of tasks, {tasks}")
    partial = partial_of(out)
    with explain_os_errors(partial, "what is finished is kept"):
        read_record(partial / RECORD, request)  # before the folder would be made
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


def _read(plan: Plan, partial: Path, task: int, tasks: int, pool: Workers) -> None:
    """A share of the first phase; whoever is last decides about the documents too."""
    read, sizes = read_tasks(plan, partial, checked=True)
    mine = share(sizes, tasks)[task]
    pool.run("read", read_sources, [read[i] for i in mine], ".npz", [sizes[i] for i in mine])
    # A listing: to ask for names that are not there yet makes network file systems remember so.
    there = set(os.listdir(partial))
    if all(f"{each.target.name}.npz" in there for each in read):
        decide_once(plan, partial, read)


def _remaining(plan: Plan, partial: Path, tasks: int, begun: bool) -> Work:
    """The tasks of each phase that have something left to do."""
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
    """The tasks that have a piece of work that is not done."""
    shares = share(sizes, tasks)
    return [task for task in range(tasks) if not all(done[i] for i in shares[task])]
