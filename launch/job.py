"""From a config to a job in Slurm's queue: check, snapshot, script, submit."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash
import yaml

from launch.profile import Profile, load_profile, seconds_of
from launch.script import Job, render
from launch.slurm import check, submit
from megarecur.config.load import load_config, to_yaml
from megarecur.config.mesh import check_world
from megarecur.config.schema import Config
from megarecur.config.write import write_aside
from megarecur.errors import ConfigError

PACKAGES = ("megarecur", "data_prep", "launch")
ORDER_FILE = "order.json"
SNAPSHOT = ("-P", "-m", "launch.cli")
"""-P: not what lies in the workdir."""


@dataclass(frozen=True)
class Order:
    """All that the job of a run needs to know, kept in RUN/launch/order.json."""

    run_dir: Path
    config: Path
    """The resolved config of this job."""
    workdir: Path
    """Where it was submitted: relative paths of the config start here."""
    code: Path
    """The snapshot of the code."""
    nodes: int
    processes_per_node: int
    gpus_per_node: int
    profile: Profile
    time: str | None = None

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.nodes * self.processes_per_node

    @property
    def tasks_per_node(self) -> int:
        """Of Slurm: the ranks, or one agent of torchrun."""
        return 1 if self.profile.style == "torchrun" else self.processes_per_node

    @property
    def tasks(self) -> int:
        """Of Slurm, in all."""
        return self.nodes * self.tasks_per_node

    def srun(self, logs: Path, attempt: int) -> list[str]:
        """The command that starts one attempt; each task writes a file of its own."""
        profile, container = self.profile, self.profile.container
        words = [
            "srun",
            f"--nodes={self.nodes}",
            f"--ntasks={self.tasks}",
            f"--ntasks-per-node={self.tasks_per_node}",
            "--kill-on-bad-exit=1",
            f"--output={logs}/rank-%4t.log",
            f"--job-name=attempt-{attempt}",
        ]
        words += [f"--cpus-per-task={profile.cpus_per_task}"] if profile.cpus_per_task else []
        if container is not None:
            words.append(f"--container-image={container.image}")
            words += [f"--container-mounts={','.join(container.mounts)}"] * bool(container.mounts)
            words += [f"--container-workdir={container.workdir}"] if container.workdir else []
        return [*words, *profile.srun_options, *self.python(), *self.command(attempt)]

    def python(self) -> list[str]:
        """The command line of megarecur in the snapshot, for tasks."""
        return [self.profile.python or sys.executable, *SNAPSHOT]

    def supervisor(self) -> list[str]:
        """The same for the batch script, which runs outside any container."""
        inside = self.profile.container is not None
        return [sys.executable, *SNAPSHOT, "supervise"] if inside else [*self.python(), "supervise"]

    def command(self, attempt: int) -> list[str]:
        """What each task runs."""
        if self.profile.style == "srun":
            return ["train", str(self.config)]
        per_node = [f"--nproc={self.processes_per_node}", f"--join={self.nodes}"]
        return ["launch", str(self.config), *per_node]


def launch_slurm(
    path: Path,
    overrides: Sequence[str],
    *,
    nodes: int,
    gpus_per_node: int,
    processes_per_node: int | None,
    cluster: str | None,
    time: str | None,
    sweep: Sequence[str],
    at_once: int | None,
    dry_run: str | None,
) -> None:
    """Submit a run, or a sweep of runs as one array; or say what would be submitted.

    Raises:
        ConfigError: every mistake of config, profile, sweep and sizes; Slurm's refusal.
    """
    profile = load_profile(cluster) if cluster else Profile()
    processes = processes_per_node or gpus_per_node
    if not processes:
        raise ConfigError("--gpus-per-node 0: say how many processes by --processes-per-node")
    points = expand_sweep(sweep)
    source = Path(__file__).resolve().parents[1]
    configs = [load_config(path, [*overrides, *point]) for point in points]
    orders = []
    for config, point in zip(configs, points, strict=True):
        check_job(config, nodes * processes, profile, time)
        base = Path(config.run_dir).absolute()
        run_dir = base / "-".join(point).replace("/", "_") if point else base
        orders.append(
            Order(
                run_dir=run_dir,
                config=run_dir / "launch" / "config.yaml",
                workdir=Path.cwd(),
                code=base / "launch" / f"code-{hash_code(source)}",
                nodes=nodes,
                processes_per_node=processes,
                gpus_per_node=gpus_per_node,
                profile=profile,
                time=time,
            )
        )
    script = write_script(orders, at_once)
    if dry_run is not None:
        print(script, end="")
        if dry_run == "check":
            print(check(script))
        return
    for order, config in zip(orders, configs, strict=True):
        config = config.model_copy(update={"run_dir": str(order.run_dir)})
        write_order(order, to_yaml(config), source)
    job = submit(script, orders[0].run_dir / "launch" / "submitted")
    print(f"submitted job {job}: {len(orders)} run(s)" if len(orders) > 1 else f"job {job}")
    for order in orders:
        print(f"watch it: megarecur status {order.run_dir}")


def check_job(config: Config, world: int, profile: Profile, time: str | None) -> None:
    """Refuse what cannot run, before it waits in a queue for hours.

    Raises:
        MeshError: ranks that do not factor into the config's mesh.
        ConfigError: a time limit that leaves no time to train.
    """
    check_world(config, world)
    limit = time or profile.time
    try:
        seconds = seconds_of(limit)
    except ValueError as error:
        raise ConfigError(f"--time {error}") from None
    least = profile.start_seconds + profile.save_seconds
    if seconds < least:
        raise ConfigError(
            f"time={limit} is shorter than starting and saving once: start_seconds="
            f"{profile.start_seconds:g} + save_seconds={profile.save_seconds}; "
            f"allow at least {least / 60:.0f} minutes, or lower those of the profile"
        )


def expand_sweep(sweep: Sequence[str]) -> list[list[str]]:
    """All combinations of `key.sub=value,value` as lists of overrides; [[]] without any.

    Raises:
        ConfigError: an entry of another form.
    """
    axes = []
    for entry in sweep:
        key, equals, text = entry.partition("=")
        try:
            values = yaml.safe_load(f"[{text}]")
        except yaml.YAMLError:
            values = []
        if not equals or not key or not values or len(set(map(str, values))) < len(values):
            raise ConfigError(f"--sweep {entry}: must be key.sub=value,value, each value once")
        axes.append([f"{key}={v if isinstance(v, str) else json.dumps(v)}" for v in values])
    return [list(point) for point in itertools.product(*axes)]


def write_script(orders: Sequence[Order], at_once: int | None) -> str:
    """The script of one run, or of an array of them."""
    first = orders[0]
    if len(orders) == 1:
        return script_of(first)
    if at_once is not None and at_once < 1:
        raise ConfigError(f"--at-once {at_once}: must be at least 1")
    limit = f"%{at_once}" if at_once else ""
    job = replace(
        job_of(first),
        array=f"0-{len(orders) - 1}{limit}",
        name=first.run_dir.parent.name,
        output=first.run_dir.parent / "logs" / "slurm-%A_%a.log",
        choices={"RUN": tuple(str(order.run_dir) for order in orders)},
    )
    return render(job, first.profile, [*first.supervisor(), "$RUN"])


def script_of(order: Order, dependency: str | None = None, exclude: Sequence[str] = ()) -> str:
    """The script of one run."""
    job = replace(job_of(order), dependency=dependency, exclude=tuple(exclude))
    return render(job, order.profile, [*order.supervisor(), str(order.run_dir)])


def job_of(order: Order) -> Job:
    """What a run asks Slurm for."""
    return Job(
        name=order.run_dir.name,
        nodes=order.nodes,
        tasks_per_node=order.tasks_per_node,
        gpus_per_node=order.gpus_per_node,
        time=order.time,
        output=order.run_dir / "logs" / "slurm-%j.log",
        workdir=order.workdir,
        code=order.code,
    )


def submit_order(order: Order, dependency: str, exclude: Sequence[str]) -> str:
    """Submit a run once more. Returns the job's id."""
    script = script_of(order, dependency, exclude)
    return submit(script, order.run_dir / "launch" / "submitted")


# --------------------------------------------------------------------------------- the run folder


def write_order(order: Order, config: str, source: Path) -> None:
    """Make the run folder ready: config, code, order; each whole or not there.

    Raises:
        OSError: it cannot be written.
    """
    folder = order.run_dir / "launch"
    folder.mkdir(parents=True, exist_ok=True)
    for logs in {order.run_dir / "logs", order.code.parents[1] / "logs"}:
        logs.mkdir(parents=True, exist_ok=True)
    if not order.code.exists():
        aside = order.code.with_name(f"{order.code.name}.{os.getpid()}.tmp")
        for file in code_files(source):
            target = aside / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        try:
            aside.rename(order.code)
        except FileExistsError:  # Another launch was quicker, with the same code.
            shutil.rmtree(aside)
    write_aside(order.config, config)
    values: dict[str, Any] = asdict(order) | {"profile": order.profile.model_dump(mode="json")}
    write_aside(folder / ORDER_FILE, json.dumps(values, default=str, indent=1) + "\n")


def read_order(run_dir: Path) -> Order:
    """The order of a run folder.

    Raises:
        ConfigError: there is none.
    """
    path = run_dir.absolute() / "launch" / ORDER_FILE
    if not path.exists():
        raise ConfigError(
            f"{path}: not there; `megarecur launch CONFIG --nodes N` makes it and submits the job"
        )
    values = json.loads(path.read_text())
    paths = {key: Path(values[key]) for key in ("run_dir", "config", "workdir", "code")}
    return Order(**values | paths | {"profile": Profile.model_validate(values["profile"])})


def code_files(root: Path) -> list[Path]:
    """The files of the packages that a run imports."""
    found = (file for package in PACKAGES for file in (root / package).rglob("*"))
    return sorted(f for f in found if f.is_file() and f.suffix != ".pyc")


def hash_code(root: Path) -> str:
    """A short name of the code as it is now."""
    digest = xxhash.xxh3_64()
    for file in code_files(root):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
