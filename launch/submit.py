"""Submit a config to Slurm's queue: check, write aside, submit, publish.

Nothing of a run changes before Slurm has accepted the job: files written for it are removed if
Slurm rejects it.
"""

from __future__ import annotations

import itertools
import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megarecur.config.run import Config
from megarecur.config.yaml_text import parse
from megarecur.errors import ConfigError
from megarecur.files import replace_file
from megarecur.launch.configs import load_run_config
from megarecur.launch.draft import Draft, drafting
from megarecur.launch.folder import has_finished, is_run, read_holder
from megarecur.launch.inputs import check_inputs, print_unchecked
from megarecur.launch.job import (
    JobSpec,
    array_script,
    make_spec,
    publish,
    script_name,
    script_of,
    snapshot_name,
    write_job,
)
from megarecur.launch.output import say
from megarecur.launch.profile import ClusterProfile, load_profile, seconds_of
from megarecur.launch.queue import ENDING_SECONDS, TASKS_FILE, QueuedJob, live_jobs, wait_for_ends
from megarecur.launch.slurm import NoAnswer, SlurmError, cancel, check, submit

SWEEP_FILE = "sweep.json"
OWN_OPTIONS = {
    "array": "--sweep and --at-once",
    "dependency": "--after",
    "error": "nothing, logs lie in the run folder",
    "exclude": "exclude in the profile",
    "gpus-per-node": "--gpus-per-node",
    "job-name": "--name",
    "nodes": "--nodes",
    "ntasks-per-node": "--processes-per-node",
    "no-requeue": "requeue in the profile",
    "open-mode": "nothing, requeued jobs append",
    "output": "nothing, logs lie in the run folder",
    "partition": "--partition",
    "requeue": "requeue in the profile",
    "signal": "save_seconds in the profile",
    "time": "--time",
}
"""Options of sbatch that are set here, and the replacement of each --option."""


@dataclass(frozen=True)
class LaunchOptions:
    """Command-line options beside config and overrides."""

    nodes: int = 1
    gpus_per_node: int = 0
    processes_per_node: int | None = None
    cluster: str | None = None
    name: str | None = None
    partition: str | None = None
    time: str | None = None
    options: tuple[str, ...] = ()
    """Options of sbatch, KEY=VALUE or KEY."""
    node_paths: tuple[str, ...] = ()
    """Folders that only the nodes see."""
    sweep: tuple[str, ...] = ()
    at_once: int | None = None
    failed_only: bool = False
    replace: bool = False
    after: tuple[str, ...] = ()
    dry_run: str | None = None
    """One of print, check, or None to submit."""


@dataclass(frozen=True)
class Launch:
    """One run, or the points of a sweep, ready to be submitted as one job."""

    base: Path
    """The run folder; for a sweep, the folder of its points."""
    name: str
    specs: Sequence[JobSpec]
    configs: Sequence[Config]
    points: Sequence[str]
    """Names of all points of the sweep; empty if it is not a sweep."""
    at_once: int | None

    def script(self, dependency: str | None) -> str:
        """Return the text for sbatch."""
        if not self.points:
            return script_of(self.specs[0], dependency)
        limit = f"%{self.at_once}" if self.at_once else ""
        array = f"0-{len(self.specs) - 1}{limit}"
        return array_script(self.specs, self.base, self.name, array, dependency)

    def write(self, dependency: str | None, draft: Draft) -> Path:
        """Write everything that the job reads; return its script."""
        draft.make_folder(self.base / "logs")
        for spec, config in zip(self.specs, self.configs, strict=True):
            write_job(spec, config, draft)
        text = self.script(dependency)
        folder = self.specs[0].folder
        if self.points:
            folder = self.base / "launch" / "sweeps" / xxhash.xxh3_64_hexdigest(text.encode())
            draft.make_folder(folder)
            runs = [str(spec.run_dir.resolve()) for spec in self.specs]
            draft.write(folder / TASKS_FILE, json.dumps(runs, indent=1) + "\n")
        path = folder / f"{script_name(self.name)}.sh"
        # The existing script has other dependencies.
        if path.exists() and path.read_text(encoding="utf-8") != text:
            path = path.with_stem(f"{path.stem}-{xxhash.xxh3_64_hexdigest(text.encode())}")
        draft.write(path, text)
        return path

    def publish(self, job: str) -> None:
        """Make a job that Slurm has accepted the newest one of its runs."""
        for task, spec in enumerate(self.specs):
            publish(spec, f"{job}_{task}" if self.points else job)
        if self.points:
            content = json.dumps({"points": list(self.points)}, indent=1) + "\n"
            replace_file(self.base / "launch" / SWEEP_FILE, content)


def launch_slurm(path: Path, overrides: Sequence[str], options: LaunchOptions) -> None:
    """Submit a run, or a sweep of runs as one array; or print what would be submitted.

    Raises:
        ConfigError: mistakes of config, profile, sweep, sizes and inputs (all are listed), a job
        already at work on the run, or rejection by Slurm.
    """
    launch = prepare(path, overrides, options)
    if launch is None:
        say("every point of the sweep has finished, is in the queue, or was never launched")
        return
    runs = [spec.run_dir for spec in launch.specs]

    def ask() -> list[QueuedJob]:
        return [job for _, job in live_jobs(runs)]

    if options.dry_run is not None:
        old = ask() if options.replace or options.after else []
        script = launch.script(depend_on(old, options))
        say(script, end="")
        if options.dry_run == "check":
            say(check(script))
        return
    refuse_processes(runs)
    with drafting(launch.base / "launch") as draft:
        old = wait_for_ends(ask)
        if old and not options.replace and not options.after:
            raise refuse_jobs(launch.base, old)
        script_file = launch.write(depend_on(old, options), draft)
        try:
            job = submit(script_file)
        except NoAnswer as error:
            draft.keep()  # The job may have been accepted, and needs its folder.
            raise SlurmError(
                f"{error}, once `squeue` answers and shows no job of {launch.base}"
            ) from None
        try:
            for each in old if options.replace else ():
                cancel(each.label)
        except BaseException:
            cancel(job)  # The run stays that of its former jobs.
            raise
        draft.keep()
        launch.publish(job)
    many = f": {len(runs)} runs" if launch.points else ""
    say(f"submitted job {job}{many}")
    if options.replace and old:
        say(f"cancelled {', '.join(each.label for each in old)}; waiting until they are gone")
        take_over(job, old, ask)
    say(f"watch it: megarecur status {launch.base}")


def prepare(path: Path, overrides: Sequence[str], options: LaunchOptions) -> Launch | None:
    """Check a launch; return None if --failed-only leaves nothing to do.

    Raises:
        ConfigError: mistakes of config, profile, sweep, sizes and inputs; all are listed.
    """
    profile = choose_profile(options)
    processes = options.processes_per_node or options.gpus_per_node
    if not processes:
        raise ConfigError(
            "--gpus-per-node 0: needs the number of processes; add --processes-per-node"
        )
    if options.at_once is not None and options.at_once < 1:
        raise ConfigError(f"--at-once {options.at_once}: must be at least 1; raise it")
    if options.failed_only and not options.sweep:
        raise ConfigError("--failed-only: only for sweeps; add --sweep, or omit it")
    if options.replace and options.after:
        raise ConfigError(
            "--replace and --after: exclude each other; cancel the current job, or wait for it"
        )
    wrong = [job for job in options.after if not job.replace("_", "", 1).isdigit()]
    if wrong:
        raise ConfigError(f"--after {wrong[0]}: must be the id of a job, as squeue shows it")
    check_time(profile)
    expanded = expand_sweep(options.sweep)
    points = [point_name(point) for point in expanded] if options.sweep else []
    refuse_same_names(points)
    base: Path | None = None
    specs, configs, code = [], [], snapshot_name()
    for number, point in enumerate(expanded):
        config = load_run_config(path, [*overrides, *point], options.nodes * processes)
        base = base or Path(config.run_dir).absolute()
        run_dir = base / points[number] if points else base
        config = config.model_copy(update={"run_dir": str(run_dir)})
        refuse_odd_name(run_dir)
        spec = make_spec(
            config,
            profile,
            nodes=options.nodes,
            processes_per_node=processes,
            gpus_per_node=options.gpus_per_node,
            code=base / "launch" / code,
            name=None if points else options.name,
        )
        specs.append(spec)
        configs.append(config)
    assert base is not None
    if options.failed_only:
        failed = find_failed([spec.run_dir for spec in specs])
        configs = [c for c, spec in zip(configs, specs, strict=True) if spec.run_dir in failed]
        specs = [spec for spec in specs if spec.run_dir in failed]
        if not specs:
            return None
    unchecked = check_inputs(configs, profile, options.node_paths)
    print_unchecked(unchecked)
    return Launch(base, options.name or base.name, specs, configs, points, options.at_once)


def choose_profile(options: LaunchOptions) -> ClusterProfile:
    """Return the cluster's profile with the command line's overrides.

    Raises:
        ConfigError: the profile is missing or has mistakes, or an option is set by other means.
    """
    profile = load_profile(options.cluster) if options.cluster else ClusterProfile()
    own = [f"--option {key}: use {instead}" for key, instead in OWN_OPTIONS.items()
           if any(option.partition("=")[0] == key for option in options.options)]  # fmt: skip
    odd = [f"--option {option!r}: must be KEY=VALUE, as sbatch takes it, without dashes"
           for option in options.options if not option[:1].isalpha()]  # fmt: skip
    if own or odd:
        raise ConfigError("\n  ".join([*own, *odd]))
    changes: dict[str, object] = {
        name: value
        for name, value in (("partition", options.partition), ("time", options.time))
        if value is not None
    }
    changes["options"] = (*profile.options, *map(write_option, options.options))
    return profile.model_copy(update=changes)


def write_option(option: str) -> str:
    """Return KEY=VALUE, or KEY, as written after #SBATCH."""
    key, equals, value = option.partition("=")
    return f"--{key}{equals}{shlex.quote(value) if equals else ''}"


def check_time(profile: ClusterProfile) -> None:
    """Reject a time limit that leaves no time to train.

    Raises:
        ConfigError: the message names the limit.
    """
    try:
        seconds = seconds_of(profile.time)
    except ValueError as error:
        raise ConfigError(f"--time {error}") from None
    least = profile.start_seconds + profile.save_seconds
    if seconds < least:
        raise ConfigError(
            f"time={profile.time} is shorter than starting and saving once: start_seconds="
            f"{profile.start_seconds:g} + save_seconds={profile.save_seconds}; "
            f"allow at least {least / 60:.0f} minutes, or lower those of the profile"
        )


def refuse_odd_name(run_dir: Path) -> None:
    """Reject a run folder into which Slurm cannot write output.

    Raises:
        ConfigError: its path contains a backslash or a line break.
    """
    if any(letter in str(run_dir) for letter in "\\\n\r"):
        raise ConfigError(
            f"run_dir={str(run_dir)!r}: Slurm cannot write output into a folder with a "
            "backslash or a line break in its path; choose another name"
        )


# ----------------------------------------------------------------------------------------- sweeps


def expand_sweep(sweep: Sequence[str]) -> list[list[str]]:
    """Return all combinations of `key.sub=value,value` as lists of overrides; [[]] without any.

    Raises:
        ConfigError: an entry has another form.
    """
    axes = []
    for entry in sweep:
        key, equals, text = entry.partition("=")
        try:
            values = parse(f"[{text}]")
        except ValueError:
            values = []
        if not equals or not key or not values or len(set(map(str, values))) < len(values):
            raise ConfigError(f"--sweep {entry}: must be key.sub=value,value, each value once")
        axes.append([f"{key}={v if isinstance(v, str) else json.dumps(v)}" for v in values])
    return [list(point) for point in itertools.product(*axes)]


def point_name(point: Sequence[str]) -> str:
    """Return the name of the folder of a sweep's point."""
    return "-".join(point).replace("/", "_")


def refuse_same_names(points: Sequence[str]) -> None:
    """Reject a sweep in which several runs would have the same folder.

    Raises:
        ConfigError: the message names it.
    """
    for name in points:
        if points.count(name) > 1:
            raise ConfigError(
                f"--sweep: {points.count(name)} of its runs would have the folder {name}, in whose "
                "name / becomes _; use other values"
            )


def find_failed(runs: Sequence[Path]) -> list[Path]:
    """List the launched runs that have ended without finishing, for whatever reason."""
    live = {run for run, _ in live_jobs(runs)}
    return [run for run in runs if is_run(run) and run not in live and not has_finished(run)]


# ------------------------------------------------------------------------------ other jobs of it


def refuse_processes(runs: Sequence[Path]) -> None:
    """Reject run folders in which a process of this machine trains.

    Raises:
        ConfigError: the message names folder and process.
    """
    for run in runs:
        holder = read_holder(run)
        if holder is not None and holder.alive:
            raise ConfigError(
                f"run_dir={run} is in use by process {holder.pid} of this machine; wait for it, "
                f"stop it with `kill {holder.pid}`, or choose another run_dir"
            )


def refuse_jobs(base: Path, jobs: Sequence[QueuedJob]) -> ConfigError:
    """Return the error for run folders that jobs train in, or wait to."""
    labels = [job.label for job in jobs]
    shown = ", ".join(f"{job.label} ({job.state.lower()})" for job in jobs[:8])
    more = f" and {len(jobs) - 8} more" if len(jobs) > 8 else ""
    return ConfigError(
        f"run_dir={base} is that of job{'s' if len(jobs) > 1 else ''} {shown}{more}; cancel and "
        f"take over with --replace, start after it with --after {labels[0]}, or choose another "
        "run_dir"
    )


def depend_on(old: Sequence[QueuedJob], options: LaunchOptions) -> str | None:
    """Return the dependency of a job that continues others, or comes after them."""
    if not options.replace and not options.after:
        return None
    jobs = dict.fromkeys([*options.after, *(job.label for job in old)])
    return f"afterany:{':'.join(jobs)}" if jobs else None


def take_over(job: str, old: Sequence[QueuedJob], ask: Callable[[], list[QueuedJob]]) -> None:
    """Wait until the cancelled jobs that a new one continues have ended.

    The new job depends on them, so that Slurm does not start it before. A successor that one of
    them submitted meanwhile is cancelled too.

    Raises:
        SlurmError: a job cannot be cancelled, or Slurm does not answer.
    """
    cancelled = {each.label for each in old}
    until = time.monotonic() + ENDING_SECONDS
    while left := [each for each in ask() if each.label.partition("_")[0] != job]:
        for each in left:
            if each.label not in cancelled:
                cancel(each.label)
        cancelled |= {each.label for each in left}
        if time.monotonic() > until:
            say(f"job {job} starts when Slurm has cleaned up after them")
            return
        time.sleep(0.5)
