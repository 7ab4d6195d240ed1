"""The job of a run: its specification, its script, and its own folder, which never changes.

    RUN/launch/
      jobs/ID/config.yaml   the resolved config of one job
      jobs/ID/job.json      its specification
      jobs/ID/NAME.sh       the script, as submitted
      code-HASH/            the code that it runs
      config.yaml, job.json     copies of the newest job's that Slurm has accepted
      submitted.jsonl       every job that Slurm has accepted

A job reads only its own folder, however often it is requeued and whatever is launched later. ID is
a hash of the folder's contents, so repeating a launch uses the same folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import xxhash

import megarecur
from megarecur.config.load import to_yaml
from megarecur.config.run import Config
from megarecur.errors import ConfigError
from megarecur.files import append_row, replace_file
from megarecur.launch.draft import Draft
from megarecur.launch.profile import ClusterProfile
from megarecur.launch.script import Job, escape, render
from megarecur.launch.slurm import submit
from megarecur.reading import read_object

SPEC_FILE, CONFIG_FILE, SUBMITTED_FILE = "job.json", "config.yaml", "submitted.jsonl"
LAUNCH_VARIABLE = "MEGARECUR_LAUNCH"
"""Variable set in a job that continues another one: the id of the first."""
SOURCE = Path(megarecur.__file__).parent
"""The running package."""
MOST_LETTERS = 50
"""Maximum letters of a job's name in its file names, which may have 255 bytes."""
SNAPSHOT = ("-P", "-m", "megarecur.launch.cli")
"""Arguments of the snapshot's Python; -P imports nothing from the working directory."""


@dataclass(frozen=True)
class JobSpec:
    """The specification of a run's job; see `make_spec`."""

    id: str
    """Hash of the fields below and of the config."""
    name: str
    run_dir: Path
    workdir: Path
    """Folder of the submission, to which paths of the config are relative."""
    code: Path
    """The snapshot of the code."""
    nodes: int
    processes_per_node: int
    gpus_per_node: int
    profile: ClusterProfile

    @property
    def folder(self) -> Path:
        """The folder of this job."""
        return self.run_dir / "launch" / "jobs" / self.id

    @property
    def config(self) -> Path:
        """The resolved config of this job."""
        return self.folder / CONFIG_FILE

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.processes_per_node

    @property
    def tasks_per_node(self) -> int:
        """Slurm tasks of a node: its ranks, or one torchrun agent."""
        return 1 if self.profile.style == "torchrun" else self.processes_per_node

    @property
    def tasks(self) -> int:
        """Slurm tasks of the job."""
        return self.nodes * self.tasks_per_node

    def srun(self, logs: Path, attempt: int) -> list[str]:
        """Return the command that starts one attempt; each task writes its own file."""
        profile, container = self.profile, self.profile.container
        words = [
            "srun",
            f"--nodes={self.nodes}",
            f"--ntasks={self.tasks}",
            f"--ntasks-per-node={self.tasks_per_node}",
            "--kill-on-bad-exit=1",
            f"--output={escape(logs)}/rank-%4t.log",
            f"--job-name=attempt-{attempt}",
        ]
        words += [f"--cpus-per-task={profile.cpus_per_task}"] if profile.cpus_per_task else []
        if container is not None:
            words += container.srun_options()
        return [*words, *profile.srun_options, *self.python(), *self.command(attempt)]

    def python(self) -> list[str]:
        """Return the command line of megarecur in the snapshot, for tasks."""
        return [self.profile.python or sys.executable, *SNAPSHOT]

    def supervisor(self) -> list[str]:
        """Return the command line for the batch script, which runs outside any container."""
        inside = self.profile.container is not None
        return [sys.executable, *SNAPSHOT, "supervise"] if inside else [*self.python(), "supervise"]

    def command(self, attempt: int) -> list[str]:
        """Return the command of each task."""
        if self.profile.style == "srun":
            return ["train", str(self.config)]
        per_node = [f"--nproc={self.processes_per_node}", f"--join={self.nodes}"]
        return ["launch", str(self.config), *per_node]


def make_spec(
    config: Config,
    profile: ClusterProfile,
    *,
    nodes: int,
    processes_per_node: int,
    gpus_per_node: int,
    code: Path,
    name: str | None = None,
) -> JobSpec:
    """Return the specification of a run's job, submitted from here."""
    run_dir = Path(config.run_dir)
    spec = JobSpec(
        id="",
        name=name or run_dir.name,
        run_dir=run_dir,
        workdir=Path.cwd(),
        code=code,
        nodes=nodes,
        processes_per_node=processes_per_node,
        gpus_per_node=gpus_per_node,
        profile=profile,
    )
    content = write_spec(spec) + to_yaml(config)
    return replace(spec, id=xxhash.xxh3_64_hexdigest(content.encode()))


def write_spec(spec: JobSpec) -> str:
    """Return a specification as JSON."""
    values = asdict(spec) | {"profile": spec.profile.model_dump(mode="json")}
    return json.dumps(values, default=str, indent=1) + "\n"


def read_spec(folder: Path) -> JobSpec:
    """Read the specification in a job's folder.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    path = folder / SPEC_FILE
    try:
        values = read_object(path)
        paths = {key: Path(values[key]) for key in ("run_dir", "workdir", "code")}
        profile = ClusterProfile.model_validate(values["profile"])
        return JobSpec(**values | paths | {"profile": profile})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); `megarecur launch CONFIG --nodes N` submits a job "
            "with a new one"
        ) from None


# ------------------------------------------------------------------------------------- its script


def array_script(
    specs: Sequence[JobSpec], base: Path, name: str, array: str, dependency: str | None
) -> str:
    """Return the script of an array of runs, whose folders lie in `base`."""
    first = specs[0]
    job = replace(
        job_of(first),
        array=array,
        name=name,
        comment=str(base),
        logs=base / "logs",
        log="slurm-%A_%a.log",
        dependency=dependency,
        choices={"JOB": tuple(str(spec.folder) for spec in specs)},
    )
    return render(job, first.profile, [*first.supervisor(), "$JOB"])


def script_of(spec: JobSpec, dependency: str | None = None, exclude: Sequence[str] = ()) -> str:
    """Return the script of one run."""
    job = replace(job_of(spec), dependency=dependency, exclude=tuple(exclude))
    return render(job, spec.profile, [*spec.supervisor(), str(spec.folder)])


def job_of(spec: JobSpec) -> Job:
    """Return the Slurm request of a run."""
    return Job(
        name=spec.name,
        comment=str(spec.run_dir),
        nodes=spec.nodes,
        tasks_per_node=spec.tasks_per_node,
        gpus_per_node=spec.gpus_per_node,
        logs=spec.run_dir / "logs",
        log="slurm-%j.log",
        workdir=spec.workdir,
        code=spec.code,
    )


def script_name(name: str) -> str:
    """Return the name of a script's file: that of its job, in letters that need no quotes."""
    plain = re.sub(r"[^\w.=+-]+", "_", name).strip("._")
    return plain[:MOST_LETTERS] or "job"


def resubmit(spec: JobSpec, after: str, exclude: Sequence[str], launch: str) -> str:
    """Submit a run once more, to start when job `after` has ended. Returns the new job's id.

    Dependencies and start time of the user's job, `launch`, are not repeated, since they were met.
    """
    options = lasting_options(spec.profile.options)
    environment = spec.profile.environment | {LAUNCH_VARIABLE: launch}
    profile = spec.profile.model_copy(update={"options": options, "environment": environment})
    again = replace(spec, profile=profile)
    file = spec.folder / f"{script_name(spec.name)}-after-{after}.sh"
    replace_file(file, script_of(again, f"afterany:{after}", exclude))
    job = submit(file)
    note_submission(spec, job)
    return job


def lasting_options(options: Sequence[str]) -> tuple[str, ...]:
    """Return the options of sbatch without those that only delay the first start."""
    once = re.compile(r"\s*(--(dependency|begin|hold)\b|-[dbH])")
    return tuple(option for option in options if not once.match(option))


# --------------------------------------------------------------------------------- the run folder


def write_job(spec: JobSpec, config: Config, draft: Draft) -> None:
    """Write the folder of a job, and the snapshot of the code if missing; each is complete or
    absent.

    Raises:
        OSError: they cannot be written.
    """
    draft.make_folder(spec.run_dir / "logs")
    write_snapshot(spec.code, draft)
    if spec.folder.exists():
        return  # Its name proves its contents.
    draft.make_folder(spec.folder.parent)
    with draft.made_whole(spec.folder) as aside:
        replace_file(aside / CONFIG_FILE, to_yaml(config))
        replace_file(aside / SPEC_FILE, write_spec(spec))


def publish(spec: JobSpec, job: str) -> None:
    """Make a job that Slurm has accepted the newest one of its run.

    Args:
        job: id in Slurm; ARRAY_TASK for a task of an array.
    """
    for name in (CONFIG_FILE, SPEC_FILE):
        replace_file(spec.run_dir / "launch" / name, (spec.folder / name).read_text("utf-8"))
    note_submission(spec, job)


def note_submission(spec: JobSpec, job: str) -> None:
    """Record that Slurm has accepted a job."""
    row = {"job": job, "spec": spec.id, "time": time.time()}
    append_row(spec.run_dir / "launch" / SUBMITTED_FILE, row)


def write_snapshot(code: Path, draft: Draft) -> None:
    """Copy the running package into a folder named by `snapshot_name`, if it is missing."""
    if code.exists():
        return
    draft.make_folder(code.parent)
    with draft.made_whole(code) as aside:
        for file in code_files(SOURCE):
            target = aside / SOURCE.name / file.relative_to(SOURCE)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def snapshot_name() -> str:
    """Return the name of a folder for a copy of the current code."""
    digest = xxhash.xxh3_64()
    for file in code_files(SOURCE):
        digest.update(str(file.relative_to(SOURCE)).encode() + b"\0" + file.read_bytes())
    return f"code-{digest.hexdigest()}"


def code_files(package: Path) -> list[Path]:
    """List the files of a package, those below symbolic links included: in a checkout `launch` and
    `data_prep` are links."""
    folders = os.walk(package, followlinks=True)
    found = (Path(folder, name) for folder, _, names in folders for name in names)
    return sorted(file for file in found if file.suffix != ".pyc")
