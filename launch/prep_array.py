"""Prepare a corpus by Slurm: two job arrays and a job, each after the previous one.

    OUT.partial/    unfinished work, as on one machine
    OUT.slurm/      jobs.json; read.sh, tokenise.sh, assemble.sh; PHASE-after-JOB.sh, as they were
                    submitted, with their dependency; code-HASH, the code that they run; logs, one
                    per task

A failed task ends the jobs after it. The same command then submits the missing tasks; `sbatch
--array=7 OUT.slurm/read.sh` reruns one task.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from megarecur.data_prep.array import Phase, begin, plan_remaining_work
from megarecur.data_prep.plan import Request
from megarecur.data_prep.readers import WHOLE_FILES
from megarecur.errors import DataError
from megarecur.files import replace_file
from megarecur.launch.draft import Draft
from megarecur.launch.job import SNAPSHOT, snapshot_name, write_snapshot
from megarecur.launch.output import say
from megarecur.launch.profile import ClusterProfile, load_profile
from megarecur.launch.script import Job, render
from megarecur.launch.slurm import SlurmError, ask, cancel, submit
from megarecur.reading import read_object

ARRAYS = ("read", "tokenise")
Script = Callable[[Phase, Sequence[int], str | None], str]
"""Function from a phase, its task numbers and the job to run after, to a script."""


def submit_preparation(
    request: Request,
    out: Path,
    tasks: int,
    *,
    cluster: str | None = None,
    at_once: int | None = None,
    workers: int = 0,
    dry_run: bool = False,
) -> bool:
    """Submit the missing work of a corpus, and print it.

    Args:
        tasks: number of tasks of each phase.
        cluster: a profile's name or file; None uses Slurm's own defaults.
        at_once: maximum number of concurrent tasks.
        workers: processes of each task; 0 means one per core.
        dry_run: print the scripts; submit nothing and write nothing.

    Returns:
        True if there was work to do.

    Raises:
        ConfigError: the profile or Slurm is missing, or Slurm rejects a job; then no job stays
        submitted.
        DataError: an input cannot be read, jobs or a process prepare this corpus already, or OUT
            holds something else.
    """
    profile = ClusterProfile() if cluster is None else load_profile(cluster)
    code = folder_of(out) / snapshot_name()

    def script(phase: Phase, numbers: Sequence[int], after: str | None) -> str:
        many = phase in ARRAYS
        job = Job(
            name=f"prep-{phase}-{out.name}",
            nodes=1,
            tasks_per_node=1,
            logs=folder_of(out),
            log=f"{phase}-%A-%a.log" if many else f"{phase}-%j.log",
            workdir=Path.cwd(),
            code=code,
            array=write_array(numbers, at_once) if many else None,
            dependency=after and f"afterok:{after}",
            supervised=False,
        )
        return render(job, profile, command_of(request, out, phase, tasks, workers, profile))

    if dry_run:
        work, after = plan_remaining_work(request, out, tasks), None
        for phase, numbers in work.items():
            if numbers:
                say(f"# {phase}.sh\n{script(phase, numbers, after)}")
                after = f"JOB_OF_{phase.upper()}"
        return bool(work)
    if shutil.which("sbatch") is None:
        ask("sbatch")  # Fails with a clear error before inputs are read.
    refuse_while_queued(out)
    with begin(request, out, tasks) as work:
        if work:
            refuse_while_queued(out)  # by another submission while inputs were read
            _submit(work, out, script, code)
    return bool(work)


def _submit(work: dict[Phase, list[int]], out: Path, script: Script, code: Path) -> None:
    """Submit the jobs of some phases, each after the previous one; all of them or none."""
    folder, draft = folder_of(out), Draft()
    jobs: dict[str, str] = {}
    try:
        draft.make_folder(folder)
        write_snapshot(code, draft)
        for phase, numbers in work.items():
            if not numbers:
                say(f"{phase}: finished")
                continue
            after = list(jobs.values())[-1] if jobs else None
            plain = folder / f"{phase}.sh"
            draft.write(plain, script(phase, numbers, None))
            as_submitted = folder / f"{phase}-after-{after}.sh" if after else plain
            draft.write(as_submitted, script(phase, numbers, after))
            jobs[phase] = submit(as_submitted)
            count = f", {len(numbers)} tasks" if phase in ARRAYS else ""
            say(f"{phase}: job {jobs[phase]}{count}{f', after {after}' if after else ''}")
        replace_file(folder / "jobs.json", json.dumps(jobs))
    except BaseException:
        for job in jobs.values():
            cancel(job)
        draft.undo()
        raise
    say(f"scripts and logs: {folder}; after a failure, the same command submits what is missing")


def refuse_while_queued(out: Path) -> None:
    """Reject preparing a corpus that jobs prepare, running or waiting.

    Raises:
        DataError: the message names the jobs.
        SlurmError: jobs were submitted, and Slurm does not report their state.
    """
    file = folder_of(out) / "jobs.json"
    if not file.exists() or shutil.which("squeue") is None:
        return
    try:
        jobs = [str(job) for job in read_object(file).values()]
    except (ValueError, AttributeError):
        raise DataError(
            f"{file}: is damaged, so that jobs that prepare this corpus are not known; delete it "
            "once squeue shows none"
        ) from None
    try:
        found = ask("squeue", "--noheader", "--format=%F", f"--jobs={','.join(jobs)}").split()
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            raise
        return  # Slurm has forgotten them
    if alive := [job for job in jobs if job in found]:
        raise DataError(
            f"{out}: jobs {', '.join(alive)} are preparing this corpus; wait for them, or end "
            f"them with `scancel {' '.join(alive)}`"
        )


def folder_of(out: Path) -> Path:
    """Return the absolute folder of a preparation's scripts and logs, beside the result."""
    out = Path(os.path.abspath(out))
    return out.with_name(out.name + ".slurm")


def command_of(
    request: Request, out: Path, phase: Phase, tasks: int, workers: int, profile: ClusterProfile
) -> list[str]:
    """Return the words of the command of one task of a phase; each value is one word with its
    option."""
    reading = request.reading
    options: list[tuple[str, object]] = [("out", out), ("tokenizer", request.tokenizer)]
    options += [
        (name.replace("_", "-"), getattr(reading, name))
        for name in ("text_key", "template", "text_split", "separator", "errors", "quoting")
        if getattr(reading, name) != getattr(WHOLE_FILES, name)
    ]
    options += [("exclude", pattern) for pattern in reading.exclude]
    options += [("eos", request.eos)] if request.eos is not None else []
    options += [("val-fraction", request.val_fraction)] if request.val_fraction else []
    options += [("near-duplicates", request.near_duplicates)] if request.near_duplicates else []
    options += [("workers", workers)] if workers else []
    options += [("phase", phase), ("tasks", tasks)]
    return [
        *_enter(profile),
        profile.python or sys.executable,
        *(*SNAPSHOT, "prep", "shards"),
        *(f"--{name}={value}" for name, value in options),
        *([] if request.deduplicate else ["--no-deduplicate"]),
        *(["--task", "$SLURM_ARRAY_TASK_ID"] if phase in ARRAYS else []),
        "--",
        # bash would expand a word that begins with a dollar sign
        *(f"./{name}" if name.startswith("$") else name for name in request.inputs),
    ]


def _enter(profile: ClusterProfile) -> list[str]:
    """Return the words that enter the profile's container, if there is one."""
    image = profile.container
    if image is None:
        return []
    words = ["srun", "--ntasks=1", *profile.srun_options]
    words += [f"--cpus-per-task={profile.cpus_per_task}"] if profile.cpus_per_task else []
    return [*words, *image.srun_options(str(Path.cwd()))]


def write_array(numbers: Sequence[int], at_once: int | None) -> str:
    """Format ascending numbers for sbatch's --array: 0-3,7%2."""
    breaks = [i for i, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1]
    runs = [numbers[i:j] for i, j in pairwise([0, *breaks, len(numbers)])]
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"{text}%{at_once}" if at_once else text


def cores() -> int:
    """Return the number of cores that this process may use; in a Slurm job, its allocated cores."""
    own = len(os.sched_getaffinity(0))
    given = os.environ.get("SLURM_CPUS_ON_NODE", "")
    return min(own, int(given)) if given.isdigit() else own
