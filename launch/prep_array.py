"""Preparing a corpus by Slurm: two job arrays and a job, each after the one before.

    OUT.partial/    unfinished work, as on one machine
    OUT.slurm/      jobs.json, read.sh, tokenise.sh and assemble.sh as they were submitted, but for
                    the dependency; logs, one per task

A task that fails ends the jobs after it. The same command then submits what is missing;
`sbatch --array=7 OUT.slurm/read.sh` runs a task again by itself.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from data_prep.array import Phase, begin, foresee
from data_prep.plan import Request
from data_prep.readers import WHOLE_FILES
from launch.profile import Profile, load_profile
from launch.script import Job, render
from launch.slurm import SlurmError, ask, cancel, submit
from megarecur.errors import DataError

CODE = Path(__file__).resolve().parents[1]
ARRAYS = ("read", "tokenise")
Script = Callable[[Phase, Sequence[int], str | None], str]
"""The script of a phase, of the numbers of its tasks, and of the job to run after."""


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
    """Submit what is missing of a corpus, and say so.

    Args:
        request: what is asked for.
        out: folder of the result.
        tasks: into how many each phase is divided.
        cluster: a profile's name or file; Slurm's own defaults if left out.
        at_once: tasks that may run at a time.
        workers: processes of each task; 0: as many as its cores.
        dry_run: print the scripts; submit nothing and write nothing.

    Returns:
        Whether there was anything to do.

    Raises:
        ConfigError: no such profile; no Slurm, or it refuses: then nothing stays submitted.
        DataError: an input cannot be read, jobs or a process prepare this corpus already, or OUT
            holds something else.
    """
    profile = Profile() if cluster is None else load_profile(cluster)

    def script(phase: Phase, numbers: Sequence[int], after: str | None) -> str:
        many = phase in ARRAYS
        job = Job(
            name=f"prep-{phase}-{out.name}",
            nodes=1,
            tasks_per_node=1,
            output=folder_of(out) / (f"{phase}-%A-%a.log" if many else f"{phase}-%j.log"),
            workdir=Path.cwd(),
            code=CODE,
            array=write_array(numbers, at_once) if many else None,
            dependency=after and f"afterok:{after}",
            signal=False,
        )
        return render(job, profile, command_of(request, out, phase, tasks, workers, profile))

    if dry_run:
        work, after = foresee(request, out, tasks), None
        for phase, numbers in work.items():
            if numbers:
                print(f"# {phase}.sh\n{script(phase, numbers, after)}")
                after = f"JOB_OF_{phase.upper()}"
        return bool(work)
    if shutil.which("sbatch") is None:
        ask("sbatch")  # says what is missing, before inputs are read
    refuse_while_queued(out)
    with begin(request, out, tasks) as work:
        if work:
            refuse_while_queued(out)  # by another submission, while inputs were read
            _submit(work, out, script)
    return bool(work)


def _submit(work: dict[Phase, list[int]], out: Path, script: Script) -> None:
    """Submit the jobs of some phases, each after the one before; all of them or none."""
    folder = folder_of(out)
    folder.mkdir(parents=True, exist_ok=True)
    jobs: dict[str, str] = {}
    try:
        for phase, numbers in work.items():
            if not numbers:
                print(f"{phase}: finished")
                continue
            after = list(jobs.values())[-1] if jobs else None
            (folder / f"{phase}.sh").write_text(script(phase, numbers, None))
            jobs[phase] = submit(script(phase, numbers, after), folder)
            (folder / "jobs.json").write_text(json.dumps(jobs))
            count = f", {len(numbers)} tasks" if phase in ARRAYS else ""
            print(f"{phase}: job {jobs[phase]}{count}{f', after {after}' if after else ''}")
    except BaseException:
        for job in jobs.values():
            cancel(job)
        raise
    print(f"scripts and logs: {folder}; after a failure, the same command submits what is missing")


def refuse_while_queued(out: Path) -> None:
    """Refuse to prepare a corpus that jobs prepare, running or waiting.

    Raises:
        DataError: naming the jobs.
        SlurmError: jobs were submitted, and Slurm does not say what became of them.
    """
    file = folder_of(out) / "jobs.json"
    if not file.exists() or shutil.which("squeue") is None:
        return
    jobs = json.loads(file.read_text()).values()
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
    """Where scripts and logs of a preparation lie: absolute, beside the result."""
    out = Path(os.path.abspath(out))
    return out.with_name(out.name + ".slurm")


def command_of(
    request: Request, out: Path, phase: Phase, tasks: int, workers: int, profile: Profile
) -> list[str]:
    """The words that do one task of a phase; each value is one word with its option."""
    reading = request.reading
    options: list[tuple[str, object]] = [("out", out), ("tokenizer", request.tokenizer)]
    options += [
        (name.replace("_", "-"), getattr(reading, name))
        for name in ("text_key", "template", "text_split", "separator", "errors")
        if getattr(reading, name) != getattr(WHOLE_FILES, name)
    ]
    options += [("exclude", pattern) for pattern in reading.exclude]
    options += [("val-fraction", request.val_fraction)] if request.val_fraction else []
    options += [("near-duplicates", request.near_duplicates)] if request.near_duplicates else []
    options += [("workers", workers)] if workers else []
    options += [("phase", phase), ("tasks", tasks)]
    return [
        *_enter(profile),
        profile.python or sys.executable,
        *("-m", "launch.cli", "prep", "shards"),
        *(f"--{name}={value}" for name, value in options),
        *([] if request.deduplicate else ["--no-deduplicate"]),
        *(["--task", "$SLURM_ARRAY_TASK_ID"] if phase in ARRAYS else []),
        "--",
        # bash would fill in a word that begins with a dollar sign.
        *(f"./{name}" if name.startswith("$") else name for name in request.inputs),
    ]


def _enter(profile: Profile) -> list[str]:
    """What brings a command into the profile's container, where there is one."""
    image = profile.container
    if image is None:
        return []
    words = ["srun", "--ntasks=1", *profile.srun_options, f"--container-image={image.image}"]
    words += [f"--container-mounts={','.join(image.mounts)}"] if image.mounts else []
    words += [f"--cpus-per-task={profile.cpus_per_task}"] if profile.cpus_per_task else []
    return [*words, f"--container-workdir={image.workdir or Path.cwd()}"]


def write_array(numbers: Sequence[int], at_once: int | None) -> str:
    """Ascending numbers as sbatch's --array takes them: 0-3,7%2."""
    breaks = [i for i, (a, b) in enumerate(pairwise(numbers), 1) if b != a + 1]
    runs = [numbers[i:j] for i, j in pairwise([0, *breaks, len(numbers)])]
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"{text}%{at_once}" if at_once else text


def cores() -> int:
    """Cores that this process may use; of a job of Slurm, no more than it was given."""
    own = len(os.sched_getaffinity(0))
    given = os.environ.get("SLURM_CPUS_ON_NODE", "")
    return min(own, int(given)) if given.isdigit() else own
