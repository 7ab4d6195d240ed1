"""Run evaluation as a Slurm job by submitit: the command `megarecur eval` on a node.

RUN/logs/eval/ script, output (JOB_0_log.out) and errors of each job
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megarecur.errors import ConfigError
from megarecur.launch.draft import Draft
from megarecur.launch.folder import check_run
from megarecur.launch.job import SNAPSHOT, snapshot_name, write_snapshot
from megarecur.launch.profile import MOST_SECONDS, ClusterProfile, load_profile, seconds_of
from megarecur.launch.script import refuse_line_break
from megarecur.launch.slurm import SlurmError, run

if TYPE_CHECKING:
    from submitit import Job

Executor = Literal["slurm", "local"]
"""Executor of the job; local is a process of this machine, for tests."""


def submit_evaluation(
    run_dir: Path,
    words: Sequence[str],
    *,
    cluster: str | None = None,
    gpus: int = 0,
    executor: Executor = "slurm",
) -> Job[str]:
    """Submit `megarecur eval` of a run, with a snapshot of the code; returns submitit's job, whose
    result is the command's output.

    Args:
        cluster: a profile's name or file; None uses Slurm's own defaults.

    Raises:
        ConfigError: the run or profile does not exist; Slurm is missing or rejects the job.
    """
    profile = ClusterProfile() if cluster is None else load_profile(cluster)
    run_dir = check_run(run_dir).absolute()
    if "%" in str(run_dir):
        raise ConfigError(
            f"{run_dir}: submitit writes no output below a folder with a % in its name; rename it, "
            "or omit --launch"
        )
    parameters = parameters_of(profile, run_dir, gpus)
    if executor == "slurm":
        for program in ("sbatch", "srun"):
            # Fails with a clear error if Slurm is missing, before anything is written.
            run(program, "--version")
    import submitit  # imported here, because it takes a second
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    folder, draft = run_dir / "logs" / "eval", Draft()
    code = run_dir / "launch" / snapshot_name()
    python = [profile.python or sys.executable, *SNAPSHOT]
    command = ["env", f"PYTHONPATH={code}", *python, "eval", str(run_dir), *words]
    try:
        draft.make_folder(folder)
        write_snapshot(code, draft)
        found = submitit.AutoExecutor(folder, cluster=executor, slurm_python=profile.python)
        found.update_parameters(**parameters)
        return found.submit(submitit.helpers.CommandFunction(command))
    except (FailedJobError, FailedSubmissionError) as error:
        draft.undo()
        raise SlurmError(f"sbatch rejected the job: {' '.join(str(error).split())}") from None
    except BaseException:
        draft.undo()
        raise


def parameters_of(profile: ClusterProfile, run_dir: Path, gpus: int) -> dict[str, Any]:
    """Return a profile as parameters of submitit; Slurm's parameters apply to Slurm alone.

    Raises:
        ConfigError: a value for sbatch contains a line break.
    """
    variables = [f"export {name}={quote(value)}" for name, value in profile.variables.items()]
    srun = list(profile.srun_options)
    if profile.container is not None:
        srun += profile.container.srun_options(str(Path.cwd()))
    kind = f"{profile.gpu_type}:" if profile.gpu_type else ""
    by_gres = profile.gpu_request == "gres"
    # submitit accepts only a number
    of_type = [("gpus-per-node", f"{kind}{gpus}")] if gpus and kind and not by_gres else []
    seconds = seconds_of(profile.time)
    no_limit = [("time", profile.time)] if math.isinf(seconds) else []
    more = dict([*of_type, *no_limit, *map(split_option, profile.options)])
    slurm = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "mem": profile.mem,
        "exclude": ",".join(profile.exclude) or None,
        "comment": str(run_dir),
        "gres": f"gpu:{kind}{gpus}" if gpus and by_gres else None,
        "setup": [
            *(f"module load {shlex.quote(name)}" for name in profile.modules),
            *profile.setup,
            *variables,
        ],
        "srun_args": srun,
        "exclusive": profile.exclusive,
        "additional_parameters": more,
    }
    found = {
        "name": f"eval-{run_dir.name}",
        "timeout_min": max(math.ceil(min(seconds, MOST_SECONDS) / 60), 1),
        "nodes": 1,
        "tasks_per_node": 1,
        "cpus_per_task": profile.cpus_per_task,
        "gpus_per_node": gpus if gpus and not (by_gres or kind) else None,
        **{f"slurm_{name}": value for name, value in slurm.items()},
    }
    # submitit writes these into lines of #SBATCH, and a rest behind a line break is run by bash.
    for name, value in (*found.items(), *more.items()):
        refuse_line_break("options", name)
        if isinstance(value, str):
            refuse_line_break(name, value)
    return {name: value for name, value in found.items() if value}


def quote(value: str) -> str:
    """Return a value quoted for bash, without expansion."""
    return "'" + value.replace("'", "'\\''") + "'"


def split_option(option: str) -> tuple[str, str | bool]:
    """Split --KEY=VALUE, or --KEY, of sbatch.

    Raises:
        ConfigError: the option has another form.
    """
    key, equals, value = option.strip().removeprefix("--").partition("=")
    if not option.strip().startswith("--") or " " in key:
        raise ConfigError(f"options: {option!r} must be written --KEY=VALUE for evaluation jobs")
    return key, value if equals else True
