"""Names and values with quotes, line breaks or `$()` reach bash and Slurm as the literal text."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cluster import on_cluster
from support.configs import make_config
from support.runs import losses

from megarecur.config.load import to_yaml
from megarecur.data_prep.plan import Request
from megarecur.data_prep.readers import Reading
from megarecur.errors import ConfigError
from megarecur.launch.evaluation import parameters_of
from megarecur.launch.prep_array import command_of
from megarecur.launch.profile import ClusterProfile, Container
from megarecur.launch.script import Job, render

ODD = (
    "it's",
    'a "b"',
    "$(touch hacked)",
    "`touch hacked`",
    "$HOME",
    "a;touch hacked",
    "a\ntouch hacked\n",
    "a\u2028b",
    "#x & y | z > hacked",
    "\\",
    "*",
    "~",
    "-n",
    "é",
)
MODULE = {"BASH_FUNC_module%%": r"""() { printf '%s %s\0' "$@"; }"""}
"""A function in the place of the cluster's own command."""
SHOW = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]))"


def job_in(folder: Path) -> Job:
    return Job(name="n", nodes=1, tasks_per_node=1, logs=folder, log="%j.log", workdir=folder,
               code=folder / "code", supervised=False)  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("supervised", [False, True])
def test_bash_passes_on_the_literal_text(tmp_path: Path, odd: str, supervised: bool) -> None:
    """As the working directory, the code's folder, a word, a module, a variable and a choice."""
    workdir = tmp_path / odd
    workdir.mkdir()
    choices = {"CHOSEN": ("other", odd)}
    job = replace(job_in(tmp_path), workdir=workdir, code=workdir, supervised=supervised,
                  choices=choices)  # fmt: skip
    profile = ClusterProfile(environment={"ODD": odd}, modules=(odd,))
    words = [sys.executable, "-c", SHOW, f"--out={odd}", "$CHOSEN"]
    done = subprocess.run(
        ["bash", "-c", render(job, profile, words)],
        cwd=tmp_path,
        env={"SLURM_ARRAY_TASK_ID": "1", "PATH": "/usr/bin:/bin", "HOME": "/", **MODULE},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    loaded, shown = done.stdout.split("\0")
    arguments, folder, environ = json.loads(shown)
    assert loaded == f"load {odd}"
    assert arguments == [f"--out={odd}", odd] and folder == str(workdir)
    assert environ["ODD"] == odd and environ["PYTHONPATH"] == str(workdir)
    assert not list(tmp_path.rglob("hacked"))


@pytest.mark.parametrize("end", ["\ntouch hacked", "\n", "\r", "\u2028touch hacked", "\x0btouch"])
@pytest.mark.parametrize("what", ["name", "logs", "comment", "dependency"])
def test_a_value_for_slurm_has_one_line(tmp_path: Path, end: str, what: str) -> None:
    value = tmp_path / f"a{end}" if what == "logs" else f"a{end}"
    if what == "logs" and end in ("\n", "\r"):
        value = tmp_path / f"a{end}" / "b"
    with pytest.raises(ConfigError, match="contains a line break"):
        render(replace(job_in(tmp_path), **{what: value}), ClusterProfile(), ["true"])


@pytest.mark.parametrize(
    "profile",
    [{"partition": "a\ntouch b"}, {"options": ("--mail-user=a\ntouch b",)}, {"mem": "1G\n"}, {}],
)
def test_jobs_of_evaluations_have_no_line_of_another(tmp_path: Path, profile: dict) -> None:
    """submitit writes what it is given behind #SBATCH."""
    run = tmp_path if profile else tmp_path / "a\ntouch hacked"
    with pytest.raises(ConfigError, match="contains a line break"):
        parameters_of(ClusterProfile(**profile), run, 0)
    odd = parameters_of(ClusterProfile(modules=("it's $(b)",)), tmp_path, 0)
    assert "module load " + shlex.quote("it's $(b)") in odd["slurm_setup"]


@pytest.mark.parametrize("odd", ODD)
def test_words_for_containers_are_not_split(odd: str) -> None:
    container = Container(image=odd, mounts=(f"{odd}:{odd}",), workdir=odd)
    assert container.srun_options() == [
        f"--container-image={odd}",
        f"--container-mounts={odd}:{odd}",
        f"--container-workdir={odd}",
    ]
    profile = ClusterProfile(container=container)
    request = Request((odd,), odd, Reading(template="{text}"))
    words = command_of(request, Path(odd), "read", 2, 0, profile)
    assert f"--container-image={odd}" in words and f"--out={odd}" in words


# --------------------------------------------------------------------------------- a real cluster

NAME = 'it\'s a "b" $(touch hacked)`touch hacked`;touch hacked #x & y > hacked * ~ $HOME %j é'
"""Name of a job and of folders, with all that bash, sbatch and Slurm's patterns may take apart."""


@on_cluster
def test_slurm_passes_on_the_literal_text(slurm: Any, tmp_path: Path) -> None:
    """Through sbatch: the job's name, output, comment and folder; words and variables."""
    folder = tmp_path / NAME
    folder.mkdir()
    words = [sys.executable, "-c", SHOW, *(f"--out={odd}" for odd in ODD)]
    job = replace(job_in(folder), name=NAME, comment=str(folder))
    profile = ClusterProfile(
        environment={f"ODD{i}": odd for i, odd in enumerate(ODD)}, partition="main"
    )
    (tmp_path / "script.sh").write_text(render(job, profile, words))
    number = slurm.submit("script.sh", cwd=tmp_path)
    slurm.wait(number, "COMPLETED")
    assert slurm.run("squeue", "-ht", "all", "-o", "%j|%k", "-j", number) == f"{NAME}|{folder}\n"
    arguments, workdir, environ = json.loads((folder / f"{number}.log").read_text())
    assert arguments == words[3:] and workdir == str(folder)
    assert [environ[f"ODD{i}"] for i in range(len(ODD))] == list(ODD)
    assert not list(tmp_path.rglob("hacked"))


@on_cluster
def test_a_run_of_any_name_is_launched(slurm: Any, corpus: Path, tmp_path: Path) -> None:
    """Through sbatch, the supervisor and srun, from a folder of any name."""
    workdir, run = tmp_path / f"work {NAME}", tmp_path / NAME
    workdir.mkdir()
    config = make_config(corpus, run_dir=str(run), data={"val": []}, train={"steps": 2})
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ODD": NAME}
    profile = {"partition": "main", "time": "00:30:00", "environment": environment}
    (workdir / "config.yaml").write_text(to_yaml(config))
    (workdir / "profile.yaml").write_text(yaml.safe_dump(profile))
    said = slurm.run("megarecur", "launch", "config.yaml", "--nodes=2", "--processes-per-node=1",
                     "--cluster=profile.yaml", cwd=workdir)  # fmt: skip
    (number,) = re.findall(r"job (\d+)", said)[:1]
    slurm.wait(number, "COMPLETED")
    assert list(losses(run)) == [1, 2]
    assert slurm.run("squeue", "-ht", "all", "-o", "%j|%k", "-j", number) == f"{NAME}|{run}\n"
    logs = {path.name for path in (run / "logs").rglob("*.log")}
    assert logs == {f"slurm-{number}.log", "rank-0000.log", "rank-0001.log"}
    assert "finished" in (run / "attempts.jsonl").read_text()
    assert f"run: {run} (ID " in slurm.run("megarecur", "status", run)
    assert not list(tmp_path.rglob("hacked"))
