"""Jobs of Slurm without Slurm: profiles, scripts, submission, what a supervisor concludes."""

import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from datetime import datetime
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import yaml
from support.configs import make_config

from megarecur.config.load import to_yaml
from megarecur.errors import ConfigError, MegarecurError
from megarecur.launch import attempts, queue
from megarecur.launch.attempts import (
    Attempt,
    Outcome,
    Record,
    failing_step,
    own_job,
    step_reached,
)
from megarecur.launch.cli import main
from megarecur.launch.folder import Beat, read_beat, read_submitted
from megarecur.launch.inputs import View
from megarecur.launch.job import JobSpec, read_spec, resubmit, script_of
from megarecur.launch.local import make_folder
from megarecur.launch.outcome import Listener, close_lost, explain, numbers, read_notice
from megarecur.launch.profile import ClusterProfile, load_profile, seconds_of
from megarecur.launch.queue import Queue
from megarecur.launch.script import FORWARD, SUPERVISE, Job, render
from megarecur.launch.slurm import SlurmError, step_of, submit
from megarecur.launch.status import print_status, read_status
from megarecur.launch.submit import LaunchOptions, expand_sweep, launch_slurm
from megarecur.launch.supervise import (
    affordable,
    choose,
    end_leftovers,
    hold,
    is_time,
    requeue,
    requeue_without_bad_nodes,
)
from megarecur.launch.terminal import make_console
from megarecur.launch.watchdog import Watchdog, ask_for_stacks, without_stacks

ROOT = Path(__file__).resolve().parents[2]
JOB = Job(
    "tiny", 2, 4, Path("/runs/tiny/logs"), "slurm-%j.log", Path("/work"), Path("/runs/code"),
    comment="/runs/tiny",
)  # fmt: skip


def test_a_script_is_a_pure_function_of_job_and_profile() -> None:
    profile = ClusterProfile(
        partition="gpu",
        account="lab",
        time="1-00:00:00",
        gpu_type="h100",
        cpus_per_task=8,
        exclude=("bad1",),
        options=("--switches=1",),
        modules=("cuda/12",),
        setup=("ulimit -n 4096",),
        environment={"WORD": "two words", "N": 1},
        nccl={"IB_HCA": "mlx5"},
        interface="ib0",
        requeue=False,
    )
    job = Job(**{**vars(JOB), "gpus_per_node": 4, "exclude": ("bad2",), "dependency": "afterany:1"})
    assert render(job, profile, ["python", "supervise", "a b", "$RUN"]).splitlines() == [
        "#!/bin/bash",
        "#SBATCH --job-name=tiny",
        "#SBATCH --comment=/runs/tiny",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gpus-per-node=h100:4",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --time=1-00:00:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=lab",
        "#SBATCH --exclude=bad1,bad2",
        "#SBATCH --dependency=afterany:1",
        "#SBATCH --kill-on-invalid-dep=yes",
        "#SBATCH --signal=B:USR1@180",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=/runs/tiny/logs/slurm-%j.log",
        "#SBATCH --no-requeue",
        "#SBATCH --switches=1",
        *FORWARD.splitlines(),
        "",
        "set -e",
        "module load cuda/12",
        "ulimit -n 4096",
        "export NCCL_IB_HCA=mlx5",
        "export NCCL_SOCKET_IFNAME=ib0",
        "export GLOO_SOCKET_IFNAME=ib0",
        "export WORD='two words'",
        "export N=1",
        "export PYTHONPATH=/runs/code${PYTHONPATH:+:$PYTHONPATH}",
        "cd /work",
        *SUPERVISE.format(command="python supervise 'a b' \"$RUN\"").splitlines(),
    ]
    alone = render(replace(job, supervised=False), profile, ["python", "prepare"])
    assert alone.splitlines()[-1] == "exec python prepare" and "--signal" not in alone


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:01", 7201),
        ("1-2", 93_600),
        ("1-02:03:04", 93_784),
        ("UNLIMITED", math.inf),
        ("infinite", math.inf),
        ("-1", math.inf),
    ],
)
def test_time_limits(text, seconds) -> None:
    assert seconds_of(text) == seconds


def test_sweeps_are_all_combinations() -> None:
    points = expand_sweep(["optimizer.lr=1e-3,3e-4", "model.tied=true,[1,2]"])
    assert points[1] == ["optimizer.lr=1e-3", "model.tied=[1, 2]"] and len(points) == 4
    assert expand_sweep([]) == [[]]
    with pytest.raises(ConfigError, match="--sweep lr: must be"):
        expand_sweep(["lr"])


# -------------------------------------------------------------------------------- the command line


FAKE_SBATCH = """#!/bin/sh
for last; do :; done
if [ "$1" = --test-only ]; then cat > /dev/null; echo "sbatch: Job 7 to start now" >&2; exit 0; fi
cp "$last" "$(dirname "$0")/submitted.sh"; echo "Submitted batch job 17"
"""


@pytest.fixture
def desk(tmp_path, corpus) -> Any:
    """A config, a profile, an sbatch that keeps what it is given, and how to call the command."""
    (tmp_path / "bin").mkdir()
    for program, text in (("sbatch", FAKE_SBATCH), ("srun", "#!/bin/sh\nexit 1\n")):
        (tmp_path / "bin" / program).write_text(text)
        (tmp_path / "bin" / program).chmod(0o755)
    (tmp_path / "profile.yaml").write_text("partition: main\ntime: '60'\n")
    train = {"steps": 4, "global_batch_size": 8, "micro_batch_size": 1}
    config = make_config(corpus, run_dir=str(tmp_path / "run"), train=train)
    (tmp_path / "config.yaml").write_text(to_yaml(config))

    def launch(*options: str, path: str = f"{tmp_path / 'bin'}:{os.environ['PATH']}") -> Any:
        words, out, err = (
            ["megarecur", "launch", str(tmp_path / "config.yaml")],
            StringIO(),
            StringIO(),
        )
        with (
            mock.patch.object(sys, "argv", [*words, *options]),
            mock.patch.dict(os.environ, PATH=path),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            try:
                code = main()
            except SystemExit as ended:
                code = ended.code
        return SimpleNamespace(returncode=code or 0, stdout=out.getvalue(), stderr=err.getvalue())

    return SimpleNamespace(folder=tmp_path, launch=launch)


def spec_of(run: Path) -> JobSpec:
    """The specification of the only job of a run."""
    (folder,) = (run / "launch" / "jobs").iterdir()
    return read_spec(folder)


def on(desk: Any, *options: str, **more: Any) -> Any:
    profile = f"--cluster={desk.folder / 'profile.yaml'}"
    return desk.launch("--nodes=2", "--processes-per-node=2", profile, *options, **more)


def test_what_a_dry_run_prints_is_what_is_submitted(desk) -> None:
    before = sorted(desk.folder.rglob("*"))
    printed = on(desk, "--dry-run")
    asked = on(desk, "--dry-run=check")
    assert asked.stdout == printed.stdout + "sbatch: Job 7 to start now\n"
    assert sorted(desk.folder.rglob("*")) == before, "a dry run writes nothing"
    done = on(desk)
    assert done.returncode == 0 and "job 17" in done.stdout, done.stderr
    assert (desk.folder / "bin/submitted.sh").read_text() == printed.stdout
    spec = spec_of(desk.folder / "run")
    assert (spec.world, spec.tasks, spec.profile.partition) == (4, 4, "main")
    assert script_of(spec) == printed.stdout
    # The job imports the snapshot, whatever becomes of the code that submitted it.
    snapshot = subprocess.run(
        [*spec.python()[:-1], "megarecur.launch.supervise"],
        env={**os.environ, "PYTHONPATH": str(spec.code)},
        cwd=spec.workdir,
    )
    assert snapshot.returncode == 0
    assert (spec.code / "megarecur/train/trainer.py").exists()
    assert not list(spec.code.rglob("*.tmp"))


def test_a_sweep_is_one_array(desk) -> None:
    done = on(desk, "--sweep", "optimizer.lr=1e-3,3e-4", "--at-once", "1")
    assert done.returncode == 0, done.stderr
    script = (desk.folder / "bin/submitted.sh").read_text()
    assert "#SBATCH --array=0-1%1" in script and 'supervise "$JOB"' in script
    for lr in ("1e-3", "3e-4"):
        spec = spec_of(desk.folder / "run" / f"optimizer.lr={lr}")
        values = yaml.safe_load(spec.config.read_text())
        assert values["optimizer"]["lr"] == float(lr) and values["run_dir"] == str(spec.run_dir)


@pytest.mark.parametrize(
    ("options", "profile", "message"),
    [
        ((), "partitoin: main", "partitoin: unknown key; did you mean 'partition'?"),
        ((), "time: soon", "'soon' is not a time limit"),
        (("--time=21",), "", "is shorter than starting and saving once"),
        (("--processes-per-node=3",), "", "global_batch_size=8 does not divide into 6 replicas"),
        (("parallel.tensor=4", "--nodes=3"), "", "6 processes do not divide into replicas"),
        (("--cluster=nowhere",), "", "--cluster nowhere: is no profile of configs/cluster"),
        (("--dry-run=maybe",), "", "must be --dry-run or --dry-run=check"),
        (("--sweep=init_from=a/b,a_b",), "", "2 of its runs would have the folder init_from=a_b"),
        (("--sweep=init_from=" + "x" * 300,), "", "File name too long"),
        (("--name=odd\nname",), "", "job-name='odd\\nname': contains a line break"),
        ((), "partition: |\n  main\n", "partition='main\\n': contains a line break"),
        ((), 'options: ["--a\\n--b"]', "contains a line break"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(desk, options, profile, message) -> None:
    (desk.folder / "profile.yaml").write_text(profile or "time: '60'\n")
    done = on(desk, *options)
    assert done.returncode == 2 and message in " ".join(done.stderr.split()), done.stderr
    assert "Traceback" not in done.stderr and not (desk.folder / "run").exists()


def test_no_sbatch_and_an_sbatch_that_refuses(desk) -> None:
    done = on(desk, path="/usr/bin:/bin" if not Path("/usr/bin/sbatch").exists() else "/nowhere")
    assert done.returncode == 2 and "sbatch: not found on PATH" in done.stderr
    refusal = "sbatch: error: invalid partition specified: main"
    (desk.folder / "bin/sbatch").write_text(f"#!/bin/sh\necho '{refusal}' >&2\nexit 1\n")
    for options in ((), ("--dry-run=check",)):
        done = on(desk, *options)
        assert done.returncode == 2 and "invalid partition specified: main" in done.stderr
        assert "Traceback" not in done.stderr


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of everything below a folder."""
    return {
        str(path.relative_to(folder)): (
            b"" if path.is_dir() else path.read_bytes(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
    }


def stub(desk: Any, **programs: str) -> None:
    """Put programs of Slurm in the place of those on the desk."""
    for program, text in programs.items():
        (desk.folder / "bin" / program).write_text(f"#!/bin/sh\n{text}\n")
        (desk.folder / "bin" / program).chmod(0o755)


def queued(run: Path, job: str, state: str = "RUNNING") -> str:
    """A squeue that shows one job, of a run or of a sweep's folder."""
    output = run / "logs" / "slurm-%j.log"
    return f"echo '{job.partition('_')[0]}|{job}|{state}|1:00:00|N/A|vn1|None|{run}|{output}|'"


REFUSAL = "echo 'sbatch: error: Batch job submission failed: no' >&2; exit 1"


def test_a_refused_launch_changes_nothing(desk) -> None:
    run, sbatch = desk.folder / "run", FAKE_SBATCH.removeprefix("#!/bin/sh\n")
    stub(desk, sbatch=REFUSAL, squeue="exit 0")
    (desk.folder / "elsewhere").mkdir()
    before = tree(desk.folder)
    sweep = ("--sweep", "optimizer.lr=1e-3,3e-4")
    for options in ((), sweep, ("run_dir=" + str(desk.folder / "elsewhere/deep/run"),)):
        done = on(desk, *options)
        assert done.returncode == 2, done.stderr
        assert done.stderr == "error: sbatch rejected the job: Batch job submission failed: no\n"
        assert tree(desk.folder) == before, "a run folder that was not there"
    stub(desk, sbatch=sbatch)
    assert on(desk).returncode == 0
    stub(desk, sbatch=REFUSAL)
    before = tree(desk.folder)
    for options in (("optimizer.lr=0.5",), (), ("--after", "3"), sweep):
        assert on(desk, *options).returncode == 2
        assert tree(desk.folder) == before, "a run that was launched before"
    first = spec_of(run)
    config = first.config.read_text()
    stub(desk, sbatch=sbatch)
    assert on(desk, "optimizer.lr=0.5", "--time=50").returncode == 0
    assert read_spec(first.folder) == first and first.config.read_text() == config
    assert "lr: 0.5" in (run / "launch" / "config.yaml").read_text()


def test_a_silent_sbatch_leaves_what_its_job_may_need(desk, monkeypatch) -> None:
    stub(desk, sbatch="exec sleep 60")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{desk.folder / 'bin'}:{os.environ['PATH']}")
    options = LaunchOptions(nodes=2, processes_per_node=2, time="60")
    with (
        mock.patch("megarecur.launch.submit.submit", lambda script: submit(script, 0.5)),
        pytest.raises(SlurmError, match=r"no answer for .*once `squeue` answers"),
    ):
        launch_slurm(desk.folder / "config.yaml", [], options)
    assert spec_of(desk.folder / "run").config.exists()
    assert not (desk.folder / "run/launch/config.yaml").exists()


def test_a_sweep_whose_sbatch_was_silent_is_at_work(desk, monkeypatch) -> None:
    """No run has recorded the array: its tasks are known by the list beside its script."""
    stub(desk, sbatch="exec sleep 60", squeue="exit 0")
    sweep = ("--sweep", "optimizer.lr=1e-3,3e-4")
    with mock.patch("megarecur.launch.submit.submit", lambda script: submit(script, 0.5)):
        done = on(desk, *sweep)
    assert done.returncode == 2 and "no answer for" in done.stderr
    run = desk.folder / "run"
    (script,) = (run / "launch/sweeps").glob("*/*.sh")
    shown = f"echo 'JobId=17 ArrayJobId=17 Command={script} WorkDir=/'"
    stub(desk, squeue=queued(run, "17_1"), scontrol=shown)
    queue.runs_of_array.cache_clear()
    done = on(desk, *sweep)
    assert done.returncode == 2 and "is that of job 17_1 (running)" in done.stderr
    points = sorted((run / "launch/sweeps").glob("*/tasks.json"))
    runs = [Path(each) for each in json.loads(points[0].read_text())]
    assert [folder for folder, _ in live_jobs_of(desk, monkeypatch, runs)] == [runs[1]]
    stub(desk, scontrol="exit 1")  # Slurm does not say: nobody is taken for it.
    queue.runs_of_array.cache_clear()
    assert live_jobs_of(desk, monkeypatch, runs) == []


def live_jobs_of(desk: Any, monkeypatch: Any, runs: list[Path]) -> Any:
    """The live jobs of runs, as the desk's Slurm shows them."""
    monkeypatch.setenv("PATH", f"{desk.folder / 'bin'}:{os.environ['PATH']}")
    return queue.live_jobs(runs)


def test_a_job_may_have_no_time_limit(desk) -> None:
    done = on(desk, "--dry-run", "--time=UNLIMITED")
    assert done.returncode == 0 and "#SBATCH --time=UNLIMITED\n" in done.stdout, done.stderr
    assert queue._seconds("UNLIMITED") is None


def test_a_run_at_work_is_not_launched_again(desk) -> None:
    run, sbatch = desk.folder / "run", FAKE_SBATCH.removeprefix("#!/bin/sh\n")
    assert on(desk).returncode == 0
    before = tree(run)
    for state in ("RUNNING", "PENDING", "SUSPENDED", "CONFIGURING"):
        stub(desk, squeue=queued(run, "17", state))
        for options in ((), ("optimizer.lr=0.5",)):
            done = on(desk, *options)
            assert done.returncode == 2 and f"is that of job 17 ({state.lower()})" in done.stderr
            assert "--replace" in done.stderr and "--after 17" in done.stderr
    done = desk.launch("--nproc=2")
    assert done.returncode == 2 and "is that of job 17" in done.stderr
    assert tree(run) == before
    # Slurm keeps silent: nobody knows.
    stub(desk, squeue="echo 'squeue: error: no controller' >&2; exit 1")
    done = on(desk)
    assert done.returncode == 2 and "no controller" in done.stderr and tree(run) == before
    # After it: Slurm waits.
    stub(desk, squeue=queued(run, "17"), sbatch=sbatch.replace("batch job 17", "batch job 18"))
    done = on(desk, "--after", "9")
    assert done.returncode == 0, done.stderr
    script = (desk.folder / "bin/submitted.sh").read_text()
    assert "#SBATCH --dependency=afterany:9:17\n" in script
    assert read_submitted(run) == ["17", "18"]
    # In its place, but not where it cannot be cancelled.
    before = tree(run)
    stub(desk, scancel='echo "$1" >> "$0.said"; test "$1" != 17')
    done = on(desk, "--replace", "optimizer.lr=0.5")
    assert done.returncode == 2 and "scancel 17" in done.stderr and tree(run) == before
    assert (desk.folder / "bin/scancel.said").read_text().split() == ["17", "18"]
    gone = 'test -s "$(dirname "$0")/scancel.said" || ' + queued(run, "17")
    (desk.folder / "bin/scancel.said").unlink()
    stub(desk, scancel='echo "$1" >> "$0.said"', squeue=gone)
    done = on(desk, "--replace", "optimizer.lr=0.5")
    assert done.stdout.startswith("submitted job 18\ncancelled 17;"), done.stderr
    script = (desk.folder / "bin/submitted.sh").read_text()
    assert "#SBATCH --dependency=afterany:17\n" in script


def test_points_of_a_sweep_are_known_one_by_one(desk) -> None:
    run, sweep = desk.folder / "run", ("--sweep", "optimizer.lr=1e-3,3e-4,1e-4")
    assert on(desk, *sweep).returncode == 0
    points = [run / f"optimizer.lr={lr}" for lr in ("1e-3", "3e-4", "1e-4")]
    assert [read_submitted(point) for point in points] == [["17_0"], ["17_1"], ["17_2"]]
    stub(desk, squeue=queued(run, "17_1"))
    done = on(desk, *sweep)
    assert done.returncode == 2 and "is that of job 17_1 (running)" in done.stderr
    one = f"run_dir={points[1]}"
    assert "is that of job 17_1" in on(desk, one, "optimizer.lr=3e-4").stderr
    assert on(desk, f"run_dir={points[0]}", "--dry-run").returncode == 0
    # Of those that have ended, one has finished.
    for point, reason in ((points[0], "finished"), (points[2], "crash")):
        rows = [{"event": "start", "attempt": 1, "job": "17", "time": 1.0},
                {"event": "end", "attempt": 1, "time": 2.0, "reason": reason}]  # fmt: skip
        (point / "attempts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = on(desk, *sweep, "--failed-only")
    assert done.returncode == 0, done.stderr
    script = (desk.folder / "bin/submitted.sh").read_text()
    assert "--array=0-0\n" in script and str(points[2]) in script
    assert not any(f"{point}/" in script for point in points[:2])
    (points[2] / "attempts.jsonl").unlink()
    (points[2] / "heartbeat.json").write_text('{"time": 1.0, "step": 4, "phase": "done"}')
    assert "every point of the sweep" in on(desk, *sweep, "--failed-only").stdout


def test_what_is_asked_for_once(desk) -> None:
    """Options of one launch, and clusters that want GPUs by gres."""
    options = ("--name", "my job", "--partition=fast", "--time=70", "--option=mail-user=a b")
    (desk.folder / "profile.yaml").write_text("gpu_request: gres\ngpu_type: a100\nrequeue: false")
    done = on(desk, *options, "--option=dependency-free", "--gpus-per-node=2")
    assert done.returncode == 0, done.stderr
    script = (desk.folder / "bin/submitted.sh").read_text()
    for line in ("--job-name='my job'", "--partition=fast", "--time=70", "--mail-user='a b'",
                 "--gres=gpu:a100:2", f"--comment={desk.folder / 'run'}"):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "--gpus-per-node" not in script
    assert [path.name for path in (desk.folder / "run").rglob("*.sh")] == ["my_job.sh"]
    for key, hint in (("dependency=afterany:1", "--after"), ("output=x", "logs lie in the run")):
        done = on(desk, f"--option={key}")
        assert done.returncode == 2 and hint in done.stderr
    # A job that goes on for another waits for that one only.
    waiting = ("--dependency=afterok:3", " -d afterok:4", "--begin=now+1hour", "--mail-user=me")
    spec = spec_of(desk.folder / "run")
    spec = replace(spec, profile=ClusterProfile(requeue=False, options=waiting))
    with mock.patch("megarecur.launch.job.submit", lambda file: file.read_text() and "23"):
        assert resubmit(spec, "17", ["vn3"], "12") == "23"
    (text,) = (f.read_text() for f in spec.folder.glob("*-after-17.sh"))
    assert text.count("afterany:17") == 1 and "afterok" not in text and "--begin" not in text
    assert "--mail-user=me" in text and "export MEGARECUR_LAUNCH=12\n" in text
    assert "--exclude=vn3" in text and read_submitted(spec.run_dir)[-1] == "23"


def test_a_percent_sign_in_a_run_folder(desk) -> None:
    run = desk.folder / "100%j of %a"
    assert on(desk, f"run_dir={run}").returncode == 0
    script = (desk.folder / "bin/submitted.sh").read_text()
    assert f"--output='{desk.folder}/100%%j of %%a/logs/slurm-%j.log'\n" in script
    words = spec_of(run).srun(run / "logs" / "attempt-001", 1)
    assert f"--output={desk.folder}/100%%j of %%a/logs/attempt-001/rank-%4t.log" in words
    done = on(desk, "run_dir=" + str(desk.folder / "a\\b"))
    assert done.returncode == 2 and "a folder with a backslash" in done.stderr


def test_inputs_are_looked_for_before_anything_is_submitted(desk, corpus) -> None:
    def refused(*overrides: str) -> str:
        done = on(desk, *overrides)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert not (desk.folder / "run").exists()
        return done.stderr

    (desk.folder / "a file").write_text("")
    (desk.folder / "other" / "checkpoints" / "step-00000004").mkdir(parents=True)
    (desk.folder / "other" / "config.yaml").write_text("{}")
    said = refused(
        "data.tokenizer=nowhere.model", "data.val=[{path: /nowhere/val}]", "init_from=nowhere@3",
        f"distill={{teacher: {desk.folder / 'other'}@5}}",
    )  # fmt: skip
    assert "4 problems" in said and "--node-path DIR" in said
    for part in ("nowhere.model: ", "data.val.0.path: /nowhere/val: there is no corpus",
                 "init_from=nowhere@3: ", "nowhere is not a run folder",
                 "has no checkpoint of step 5; kept: 4"):  # fmt: skip
        assert part in " ".join(said.split()), said
    assert "is a file" in refused(f"run_dir={desk.folder / 'a file' / 'run'}")
    assert "model.vocab_size=7 is below" in refused("model.vocab_size=7")
    assert "nothing*" in refused("optimizer.frozen=[nothing*]")
    damaged = desk.folder / "corpus"
    shutil.copytree(corpus / "train", damaged)
    next(damaged.glob("shard*")).unlink()
    assert "shard.00000.mds missing" in refused(f"data.val=[{{path: {damaged}}}]")
    text = (desk.folder / "config.yaml").read_text()
    (desk.folder / "words.txt").write_text("{}")
    assert "is not a tokenizer" in refused(f"data.tokenizer={desk.folder / 'words.txt'}")
    remote = f"{{path: {desk.folder / 'cache'}, remote: 's3://bucket/c'}}"
    done = on(desk, f"data.train=[{remote}]", "data.val=[{path: /scratch/val}]",
              "--node-path=/scratch", "checkpoint.mirror=s3://bucket/run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "not checked: data.train.0.remote=s3://bucket/c" in done.stderr
    assert "not checked: data.val.0.path=/scratch/val: only the nodes see it" in done.stderr
    assert "not checked: checkpoint.mirror=s3://bucket/run" in done.stderr
    (desk.folder / "config.yaml").write_text(text.replace(str(corpus / "val"), "/nowhere"))
    done = desk.launch("--nproc=2")
    assert done.returncode == 2 and "data.val.0.path: /nowhere: there is no corpus" in done.stderr


def test_a_container_sees_what_is_mounted(tmp_path) -> None:
    container = {"image": "x", "mounts": [f"{tmp_path}:/data:ro", "/home"]}
    view = View(ClusterProfile(container=container))
    assert view.find("/data/a/b") == tmp_path / "a/b" and view.find("/home/me") == Path("/home/me")
    assert view.find("/scratch") is None and view.find("relative") is None
    view = View(ClusterProfile(container=container | {"workdir": "/data"}))
    assert view.find("relative") == tmp_path / "relative"


def test_nodes_or_processes(desk) -> None:
    for options in ((), ("--nodes=2", "--nproc=2")):
        done = desk.launch(*options)
        assert done.returncode == 2 and "needs --nproc for this machine, or --nodes" in done.stderr


# --------------------------------------------------------------------------------- conclusions


def make_spec(run_dir: Path, **profile: Any) -> JobSpec:
    code = run_dir / "code"
    return JobSpec("1a", "run", run_dir, run_dir, code, 2, 2, 0, ClusterProfile(**profile))


def listener(*lines: str) -> Listener:
    process = SimpleNamespace(stderr=[line + "\n" for line in lines])
    found = Listener(process)
    found.thread.join()
    return found


EARLIER, LATER = (
    datetime.fromtimestamp(time.time() + seconds).isoformat(timespec="seconds")
    for seconds in (-5, 86_400)  # Later than any run of these tests ends.
)


def concluded(
    tmp_path: Path, *lines: str, phase: str | None = "train", told=(), code=1, **fields: str
) -> Outcome:
    attempt = Attempt(1, "17", ["a", "b"], tmp_path, 0)

    def describe(job: str, patience: float = 0.0) -> dict[str, str]:
        if "" in fields:
            raise SlurmError("no answer")
        return fields

    with (
        mock.patch("megarecur.launch.outcome.describe_job", describe),
        mock.patch("megarecur.launch.outcome.expand", lambda nodes: [nodes]),
        mock.patch("megarecur.launch.outcome.down_nodes", lambda nodes: []),
    ):
        said = listener(*lines)
        return explain(code, phase, said, list(told), make_spec(tmp_path), attempt)


def test_why_an_attempt_ended(tmp_path) -> None:
    """The lines are srun's own."""
    crash = concluded(
        tmp_path,
        "srun: error: b: task 2: Killed",
        "srun: launch/slurm: _step_signal: Terminating StepId=17.0",
        "srun: error: a: tasks 0-1: Exited with exit code 1",
        "srun: error: b: task 3: Exited with exit code 1",
    )
    assert crash.reason == "crash" and not crash.nodes, "memory may be short anywhere"
    assert crash.detail.startswith("rank 2 on b: Killed (SIGKILL, as the kernel does")
    assert str(tmp_path / "rank-0002.log") in crash.detail
    lost = concluded(tmp_path, "srun: error: a: tasks 0-1: Exited with exit code 1")
    assert lost.reason == "node failure" and lost.nodes == ["b"]
    gone = concluded(tmp_path, "srun: error: Node failure on b")
    assert gone == Outcome("node failure", "Slurm lost b", ["b"])
    (tmp_path / "rank-0000.log").write_text("step 1\nerror: no such corpus\n")
    wrong = concluded(tmp_path, "srun: error: a: tasks 0-3: Exited with exit code 2", phase=None)
    log = tmp_path / "rank-0000.log"
    assert wrong == Outcome("bad input", f"error: no such corpus ({log})")
    for faults, reason, nodes in (({"b": ["disk"]}, "node failure", ["b"]),
                                  ({"a": ["disk"], "b": ["disk"]}, "bad input", [])):  # fmt: skip
        found = {node: {"faults": faults.get(node, [])} for node in ("a", "b")}
        health = {"time": time.time() + 60, "nodes": found}
        (tmp_path / "health.json").write_text(json.dumps(health))
        line = "srun: error: a: tasks 0-3: Exited with exit code 2"
        unfit = concluded(tmp_path, line, phase=None)
        assert (unfit.reason, unfit.nodes) == (reason, nodes)
    assert concluded(tmp_path, phase="done", code=0).reason == "finished"
    assert concluded(tmp_path, phase="diverged").reason == "diverged"
    for told, fields, reason in (
        ([10], {}, "time limit"),
        ([12], {}, "SIGUSR2"),
        ([15], {"JobState": "COMPLETING", "PreemptTime": "2026-01-02T03:04:05"}, "preempted"),
        ([15], {"JobState": "PENDING"}, "requeued"),
        ([15], {"JobState": "COMPLETING", "Restarts": "1", "EndTime": LATER}, "requeued"),
        ([15], {"JobState": "COMPLETING", "Restarts": "0", "EndTime": EARLIER}, "cancelled"),
        # Cancelled while it was being requeued.
        ([15], {"JobState": "COMPLETING", "Restarts": "1", "EndTime": EARLIER}, "cancelled"),
        ([15], None, "outage"),
        ([], {"JobState": "CANCELLED"}, "cancelled"),
        ([], {"JobState": "RUNNING", "PreemptTime": "None"}, "asked to stop"),
    ):
        found = concluded(tmp_path, phase="stopped", told=told, code=3, **(fields or {"": None}))
        assert found.reason == reason, (told, fields)
    unsaved = concluded(tmp_path, phase="save", told=[10], JobState="COMPLETING")
    assert unsaved.reason == "out of time"
    cancelled = concluded(tmp_path, phase="train", told=[15], JobState="CANCELLED")
    assert cancelled == Outcome("cancelled", "before it had started to train")
    beat = {"time": time.time() + 60.0, "step": 12, "phase": "train"}
    (tmp_path / "heartbeat.json").write_text(json.dumps(beat))
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    for step, detail in ((10, "nothing was unsaved, at step 10"), (11, "step 11 not saved"),
                         (12, "steps 11 to 12 not saved")):  # fmt: skip
        (tmp_path / "heartbeat.json").write_text(json.dumps(beat | {"step": step}))
        assert concluded(tmp_path, told=[15], JobState="CANCELLED") == Outcome("cancelled", detail)
    assert numbers("[0,3-5]") == [0, 3, 4, 5]


def test_a_clock_that_is_set_back_moves_no_limit(tmp_path, monkeypatch) -> None:
    """The time limit, the heartbeats of an attempt, and the name of a folder of stacks."""
    record, end = Record(tmp_path), datetime.fromtimestamp(time.time() + 3600.0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    described = {"EndTime": end.isoformat(timespec="seconds")}
    monkeypatch.setattr("megarecur.launch.attempts.describe_job", lambda job: described)
    beat = {"time": time.time(), "step": 3, "phase": "train"}
    (tmp_path / "heartbeat.json").write_text(json.dumps(beat))
    attempt = record.begin(["a"])
    spec = make_spec(tmp_path)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 86_400.0)
    assert 3000.0 < attempt.ends - time.monotonic() < 3601.0
    due = time.monotonic() + spec.profile.save_seconds
    assert is_time(signal.SIGUSR1, replace(attempt, ends=due), spec)
    early = replace(attempt, ends=due + 60.0)
    assert not is_time(signal.SIGUSR1, early, spec), "Slurm sends it up to a minute early"
    assert step_reached(tmp_path, attempt) is None, "no heartbeat is of this attempt"
    beat |= {"time": time.time(), "step": 9}
    (tmp_path / "heartbeat.json").write_text(json.dumps(beat))
    assert step_reached(tmp_path, attempt) == failing_step(tmp_path, attempt) == 9
    (lost,) = [row for row in record.rows() if row["event"] == "start"]
    assert lost["beat"] == attempt.beat
    folders = {make_folder(tmp_path / "logs" / "local-20261201-030000-7") for _ in range(3)}
    assert len(folders) == 3 and all(folder.is_dir() for folder in folders)


class History:
    """Attempts of a run as its folder records them."""

    def __init__(self, folder: Path, **profile: Any) -> None:
        self.folder, self.record = folder, Record(folder)
        self.spec = make_spec(folder, **profile)

    def add(
        self, reason: str, checkpoint: int, reached: int, told=(), nodes=(), phase="train"
    ) -> str:
        """One attempt that ended so; what is done about it."""
        step = max((int(p.name[5:]) for p in self.folder.glob("checkpoints/*")), default=0)
        attempt = Attempt(len(self.record.rows()) // 2 + 1, "17", ["a", "b"], self.folder, step)
        self.record.append({"event": "start", "attempt": attempt.number, "step": step})
        (self.folder / f"checkpoints/step-{checkpoint:08d}").mkdir(parents=True, exist_ok=True)
        beat = {"time": time.time() + 60.0, "step": reached, "phase": phase}
        (self.folder / "heartbeat.json").write_text(json.dumps(beat))
        self.outcome = Outcome(reason, "", list(nodes))
        action = choose(self.outcome, self.record, self.spec, attempt, told)
        self.record.end(attempt, self.outcome, action)
        return action


def test_only_failures_without_progress_are_counted(tmp_path) -> None:
    history = History(tmp_path, retries=2)
    assert history.add("crash", 10, 12) == "restarted"
    assert history.add("crash", 20, 25) == "restarted"  # A newer checkpoint each time.
    assert history.add("crash", 20, 21) == "restarted"
    assert history.add("crash", 20, 23, nodes=["b"]) == "requeued"
    assert history.record.blamed() == ["b"]
    for _ in range(5):
        assert history.add("preempted", 20, 22) == "requeued"
    assert history.add("stalled", 20, 24) == "given up"
    assert "3 times in a row without a newer checkpoint" in history.outcome.detail
    assert history.add("time limit", 30, 30) == "requeued"
    assert history.add("crash", 30, 31, told=[10]) == "requeued"  # No time to start here again.
    assert history.add("finished", 40, 40) == "done"
    assert history.add("bad input", 40, 40) == "stopped"


def test_a_step_that_fails_twice_is_told_and_left_out(tmp_path) -> None:
    history = History(tmp_path, skip_failing_step=True)
    history.add("crash", 10, 12)
    assert "twice" not in history.outcome.detail
    history.add("crash", 10, 12)
    assert "step 13 has failed twice, it is left out" in history.outcome.detail
    assert json.loads((tmp_path / "skipped_steps.json").read_text()) == [12]
    history = History(tmp_path / "other")
    (tmp_path / "other").mkdir()
    history.add("crash", 10, 12), history.add("crash", 10, 12)
    assert "step 13 has failed twice" in history.outcome.detail
    assert not (tmp_path / "other/skipped_steps.json").exists()


@pytest.mark.parametrize("damage", [b"[12", b"\xff\xfe", b'"all"', b"{}x", b"[" * 9999])
def test_a_damaged_list_of_skipped_steps_stays(tmp_path, damage) -> None:
    """The run names it as it starts again; the supervisor goes on."""
    path = tmp_path / "skipped_steps.json"
    path.write_bytes(damage)
    history = History(tmp_path, skip_failing_step=True)
    history.add("crash", 10, 12), history.add("crash", 10, 12)
    detail = history.outcome.detail
    assert f"it cannot be left out: {path} is damaged; correct or delete it" in detail
    assert path.read_bytes() == damage


@pytest.mark.parametrize("phase", ["start", "evaluate", "save"])
def test_what_is_no_step_is_never_left_out(tmp_path, phase) -> None:
    """Such as the evaluation after the last step."""
    history = History(tmp_path, skip_failing_step=True)
    for _ in range(2):
        history.add("stalled", 120, 120, phase=phase)
        assert "twice" not in history.outcome.detail
    history.add("stalled", 120, 120)
    assert "twice" not in history.outcome.detail, "once"
    assert not (tmp_path / "skipped_steps.json").exists()


def test_an_attempt_that_ended_without_a_word_is_put_down_to_its_batch_node(tmp_path) -> None:
    record = Record(tmp_path)
    start = {"event": "start", "attempt": 1, "job": "17", "nodes": ["a"], "batch_node": "a"}
    record.append(start | {"step": 0, "time": 1.0})
    with record.path.open("a") as file:
        file.write('{"event": "en')  # A power cut.
    with mock.patch("megarecur.launch.outcome.describe_nodes", return_value=[]):
        close_lost(record)
    (end,) = record.ends()
    assert (end["attempt"], end["reason"], end["nodes"]) == (1, "node failure", ["a"])


@pytest.mark.parametrize(("anew", "reason"), [("ab", "outage"), ("a", "node failure")])
def test_an_outage_of_most_nodes_blames_none(tmp_path, anew, reason) -> None:
    record, now = Record(tmp_path), time.time()
    start = {"event": "start", "attempt": 1, "job": "17", "nodes": ["a", "b"], "batch_node": "a"}
    record.append(start | {"step": 0, "time": now})
    moment = {node: LATER if node in anew else EARLIER for node in "ab"}
    nodes = [{"NodeName": node, "SlurmdStartTime": moment[node]} for node in "ab"]
    with mock.patch("megarecur.launch.outcome.describe_nodes", return_value=nodes):
        close_lost(record)
    (end,) = record.ends()
    assert (end["reason"], end["nodes"]) == (reason, [] if len(anew) > 1 else ["a"])


def test_an_attempt_that_slurm_killed_is_not_put_down_to_a_node(tmp_path) -> None:
    record = Record(tmp_path)
    start = {"event": "start", "attempt": 1, "job": "17", "nodes": ["a"], "batch_node": "a"}
    record.append(start | {"step": 0, "time": 1.0})
    record.told(Attempt(1, "17", ["a"], tmp_path, 0))
    close_lost(record)
    assert [(row["reason"], row["nodes"]) for row in record.ends()] == [("requeued", [])]
    assert not record.failures() and not record.blamed()


@pytest.mark.parametrize(
    ("notice", "reason", "action"),
    [("DUE TO PREEMPTION ", "preempted", "requeued"),
     ("DUE TO JOB REQUEUE ", "requeued", "requeued"),
     ("DUE TO NODE FAILURE ", "node failure", "requeued"), ("", "cancelled", "stopped"),
     ("DUE TO TIME LIMIT ", "out of time", "requeued")],
)  # fmt: skip
def test_slurm_says_in_the_output_why_it_ended_a_job(tmp_path, notice, reason, action) -> None:
    output, now = tmp_path / "slurm-17.log", time.time()
    moments = [datetime.fromtimestamp(now + s).isoformat(timespec="seconds") for s in (-900, 5)]
    output.write_text(
        f"slurmstepd-a: error: *** JOB 17 ON a CANCELLED AT {moments[0]} DUE TO PREEMPTION ***\n"
        f"slurmstepd-a: error: *** JOB 17 ON a CANCELLED AT {moments[1]} {notice}***\n"
    )
    record = Record(tmp_path)
    start = {"event": "start", "attempt": 1, "job": "17", "nodes": ["a"], "batch_node": "a"}
    record.append(start | {"step": 0, "time": now, "output": str(output)})
    close_lost(record)
    (end,) = record.ends()
    assert (end["reason"], end["action"], end["nodes"]) == (reason, action, [])
    assert read_notice(str(output), now + 60) is None


@pytest.mark.parametrize(
    ("fields", "reason", "detail"),
    [({"JobState": "FAILED", "ExitCode": "0:9"}, "supervisor killed", "job 17 is FAILED"),
     ({"JobState": "CANCELLED"}, "cancelled", "job 17 was cancelled"),
     ({"JobState": "NODE_FAIL"}, "node failure", "Slurm lost a node of job 17"),
     ({}, "supervisor killed", "Slurm no longer knows job 17")],
)  # fmt: skip
def test_an_earlier_job_that_ended_without_a_word_blames_no_node(
    tmp_path, fields, reason, detail
) -> None:
    record = Record(tmp_path)
    start = {"event": "start", "attempt": 1, "job": "17", "nodes": ["a"], "batch_node": "a"}
    record.append(start | {"step": 0, "time": time.time()})
    with (
        mock.patch.dict(os.environ, SLURM_JOB_ID="18"),
        mock.patch("megarecur.launch.outcome.job_fields", lambda job: fields),
    ):
        close_lost(record)
    (end,) = record.ends()
    assert (end["reason"], end["nodes"]) == (reason, []) and detail in end["detail"]


def test_a_supervisor_that_was_killed_is_started_again(tmp_path) -> None:
    """By the script, which passes signals on and ends as the supervisor does."""
    program = tmp_path / "supervisor"
    program.write_text(
        "#!/bin/bash\n"
        'echo "${MEGARECUR_SUPERVISOR_ENDED:-first} $1" >> said\n'
        '[ -n "$MEGARECUR_SUPERVISOR_ENDED" ] || kill -KILL $$\n'
        "trap 'echo USR1 >> said; exit 3' USR1\n"
        "kill -USR1 $PPID; for n in {1..600}; do sleep 0.1; done\n"
    )
    program.chmod(0o755)
    job = Job(**{**vars(JOB), "workdir": tmp_path})
    script = render(job, ClusterProfile(), [str(program), "a b"])
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True)
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "said").read_text().splitlines() == ["first a b", "137 a b", "USR1"]
    # One that always dies is given up; one that is ended by SIGTERM is not started again.
    for text, turns, code in (("kill -SEGV $$", 10, 139), ("kill -TERM $$", 1, 143)):
        program.write_text(f"#!/bin/bash\necho >> turns\n{text}\n")
        (tmp_path / "turns").unlink(missing_ok=True)
        done = subprocess.run(["bash"], input=script, text=True, capture_output=True)
        assert done.returncode == code and len((tmp_path / "turns").read_text()) == turns


def test_signals_before_the_supervisor_are_kept(tmp_path) -> None:
    """Slurm may announce a time limit while a job's setup runs."""
    code = (
        "import os; from megarecur.launch.supervise import note_signals; "
        "print([int(n) for n in note_signals()], 'MEGARECUR_EARLY_SIGNALS' in os.environ)"
    )
    job = Job(**{**vars(JOB), "workdir": tmp_path})
    profile = ClusterProfile(setup=["kill -USR1 $$", "kill -TERM $$"])
    script = render(job, profile, [sys.executable, "-c", code])
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"[{int(signal.SIGUSR1)}, {int(signal.SIGTERM)}] False\n"


def test_a_killed_supervisor_blames_no_node_and_ends_what_it_left(tmp_path) -> None:
    record = Record(tmp_path)
    start = {"event": "start", "attempt": 1, "job": "17", "nodes": ["a"], "batch_node": "a"}
    record.append(start | {"step": 0, "time": 1.0})
    asked: list[tuple[str, ...]] = []
    answers = iter(["17.batch\n17.0\n", "17.batch\n"])

    def ask(*command: str, **_: Any) -> str:
        asked.append(command)
        return next(answers) if command[0] == "squeue" else ""

    environ = {"SLURM_JOB_ID": "17", "MEGARECUR_SUPERVISOR_ENDED": "137"}
    with (
        mock.patch("megarecur.launch.supervise.ask", ask),
        mock.patch.dict(os.environ, environ),
        mock.patch("time.sleep"),
    ):
        end_leftovers()
        close_lost(record)
    assert [command for command in asked if command[0] == "scancel"] == [
        ("scancel", "--signal=KILL", "17.0")
    ]
    (end,) = record.ends()
    assert (end["reason"], end["nodes"]) == ("supervisor killed", [])
    assert "ended by signal 9" in end["detail"] and len(record.failures()) == 1


def test_a_long_name_gives_short_files(desk) -> None:
    done = on(desk, f"--name={'ä' * 200}")
    assert done.returncode == 0, done.stderr
    assert f"--job-name='{'ä' * 200}'" in (desk.folder / "bin/submitted.sh").read_text()


def test_exit_codes_are_read_whole(tmp_path) -> None:
    """255 is no 2, and 30 no 3."""
    (tmp_path / "rank-0001.log").write_text("error: odd\n")
    for code, reason in ((2, "bad input"), (255, "crash"), (20, "crash")):
        lines = [f"srun: error: {node}: Exited with exit code {code}"
                 for node in ("a: task 1", "b: task 2")]  # fmt: skip
        assert concluded(tmp_path, *lines).reason == reason, code
    for code in (3, 30, 13):
        line = f"srun: error: a: task 1: Exited with exit code {code}"
        assert listener(line).failed() == (code != 3), code


def test_a_disk_that_fails_on_one_node_does_not_end_the_run(tmp_path) -> None:
    lines = [f"srun: error: {node}: Exited with exit code 2"
             for node in ("a: tasks 0-1", "b: tasks 2-3")]  # fmt: skip
    for rank in range(4):
        (tmp_path / f"rank-{rank:04}.log").write_text("error: no corpus\n")
    assert concluded(tmp_path, *lines).reason == "bad input"
    text = "error: /data/x.bin cannot be read: Input/output error\n"
    (tmp_path / "rank-0002.log").write_text(text)
    outcome = concluded(tmp_path, *lines)
    assert outcome.reason == "crash" and outcome.nodes == ["b"], outcome
    (tmp_path / "rank-0000.log").write_text(text)  # As where all ranks are told.
    outcome = concluded(tmp_path, *lines)
    assert outcome.reason == "crash" and outcome.nodes == [], outcome


def test_a_damaged_record_is_read_as_far_as_it_is_good(tmp_path, monkeypatch, capsys) -> None:
    record, path = Record(tmp_path), tmp_path / "attempts.jsonl"
    for number in (1, 2, 3):
        record.append(
            {"event": "start", "attempt": number, "job": "17", "time": time.time(), "step": 0,
             "nodes": ["a", "b"], "logs": f"logs/attempt-{number:03}", "batch_node": "a"}
        )  # fmt: skip
        record.end(Attempt(number, "17", ["a", "b"], tmp_path, 0), Outcome("crash"), "restarted")
    (tmp_path / "config.yaml").write_text("train: {steps: 9}\n")
    whole, ends = path.read_bytes(), record.ends()
    assert len(ends) == 3 and "OSError" not in capsys.readouterr().out
    draw = random.Random(1)
    for _ in range(300):
        place = draw.randrange(len(whole))
        changed = bytes([draw.randrange(256)]) * draw.randrange(4)
        path.write_bytes(whole[:place] + changed + whole[place + 1 :])
        assert sum(row in ends for row in record.ends()) >= 2
        record.failures(), record.blamed()
        print_status(read_status(tmp_path, Queue()), make_console())
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:1], b'{"event": "odd\xff\n', *lines[2:]]))
    before = path.read_bytes()
    close_lost(record)
    assert path.read_bytes() == before, "the first attempt was long over"
    (tmp_path / "logs/attempt-007").mkdir(parents=True)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with mock.patch("megarecur.launch.attempts.end_of", lambda job: 0.0):
        assert record.begin(["a"]).number == 8, "logs are never written over"


@pytest.mark.parametrize("content", ["[]", "1", '"x"', "null", '{"step": []}', '{"time": 1e400}'])
def test_a_heartbeat_of_another_form_is_none(tmp_path, content) -> None:
    (tmp_path / "heartbeat.json").write_text(content)
    assert read_beat(tmp_path) is None


def test_last_words_are_written_on_a_full_disk(tmp_path, capsys) -> None:
    record = Record(tmp_path)
    (tmp_path / "launch").mkdir()
    record.keep_reserve()
    reserve = tmp_path / "launch" / "reserve"
    assert reserve.stat().st_size > 0
    append = attempts.append_row

    def full(path: Path, row: dict[str, Any]) -> None:
        if reserve.exists():
            raise OSError(28, "No space left on device")
        append(path, row)

    with mock.patch.object(attempts, "append_row", full):
        record.append({"event": "end", "attempt": 1})
    assert record.rows() == [{"event": "end", "attempt": 1}]
    with mock.patch.object(attempts, "append_row", side_effect=OSError(28, "No space")):
        record.append({"event": "end", "attempt": 2})
    assert '"attempt": 2' in capsys.readouterr().out


def slurm_says(answers: dict[str, str]) -> Any:
    """In place of `ask`: answers by the first word, and what was asked."""
    asked: list[tuple[str, ...]] = []

    def ask(*command: str, **_: Any) -> str:
        asked.append(command)
        if command[0] == "sinfo" and "sinfo" not in answers:
            raise SlurmError("sinfo: no answer")
        return answers.get(" ".join(command[:2]), answers.get(command[0], ""))

    return mock.patch.multiple("megarecur.launch.supervise", ask=ask), asked


ARRAY = {"SLURM_JOB_ID": "18", "SLURM_ARRAY_JOB_ID": "18", "SLURM_ARRAY_TASK_ID": "3"}


def test_a_run_of_a_sweep_leaves_its_sisters_alone(tmp_path) -> None:
    """One task of an array has the array's own number."""
    patch, asked = slurm_says({})
    steps = "18_1.4\n18_3.0\n18_3.1\n18_3.batch\n"
    fields = {"JobState": "RUNNING"}
    with (
        patch,
        mock.patch.dict(os.environ, ARRAY),
        mock.patch("megarecur.launch.supervise.describe_job", lambda job: fields),
        mock.patch("megarecur.launch.outcome.expand", lambda nodes: [nodes]),
    ):
        with mock.patch("megarecur.launch.slurm.ask", return_value=steps):
            assert step_of(own_job()) == "18_3.1"
        assert not requeue(make_spec(tmp_path, exclude=("c",)), 0.0, ["b"], [])
    assert ("scontrol", "requeue", "18_3") in asked
    assert asked[-1] == ("scontrol", "update", "JobId=18_3", "ExcNodeList=c,b")
    asked.clear()
    # Cancelled: gone, or about to be, before Slurm has requeued it or after.
    for state, restarts in (("CANCELLED", "0"), ("COMPLETING", "0"), ("COMPLETING", "1")):
        fields |= {"JobState": state, "Restarts": restarts, "EndTime": EARLIER}
        for anew in (False, True):
            with (
                patch,
                mock.patch.dict(os.environ, ARRAY),
                mock.patch("megarecur.launch.supervise.describe_job", return_value=fields),
                mock.patch("megarecur.launch.supervise.resubmit", side_effect=AssertionError),
            ):
                spec = make_spec(tmp_path, requeue=not anew)
                assert requeue(spec, 0.0, [], [15]) == "cancelled"
    assert not asked
    # Cancelled between the question and the requeue: Slurm has put it back, and forgets the cancel.
    output = tmp_path / "slurm.log"
    fields |= {"JobState": "PENDING", "Restarts": "1"}
    moment = datetime.now().isoformat(timespec="seconds")
    for why, ends, last in ((" DUE TO JOB REQUEUE", "", "requeue"), ("", "cancelled", "scancel")):
        output.write_text(f"slurmstepd: error: *** JOB 21 ON a CANCELLED AT {moment}{why} ***\n")
        with (
            patch,
            mock.patch.dict(os.environ, ARRAY),
            mock.patch("megarecur.launch.supervise.describe_job", return_value=fields),
            mock.patch("megarecur.launch.supervise.is_requeued", return_value=False),
            mock.patch("megarecur.launch.supervise.own_output", return_value=str(output)),
        ):
            assert requeue(make_spec(tmp_path), 0.0, [], []) == ends
        assert last in asked[-1]


def test_nodes_are_left_out_while_enough_are_left(tmp_path) -> None:
    record, spec = Record(tmp_path), make_spec(tmp_path)
    assert affordable(spec, record) == [], "nobody is asked where nobody is blamed"
    for number, node in enumerate("cba"):
        lost = Attempt(number, "17", ["a", "b"], tmp_path, 0)
        record.end(lost, Outcome("node failure", "", [node]), "requeued")
    for listed, left_out in (
        ("a b c d", ["a", "b"]),
        ("a b", []),
        ("a b c d e f", ["a", "b", "c"]),
    ):
        patch, _ = slurm_says({"sinfo": listed})
        with patch, mock.patch("megarecur.launch.outcome.expand", str.split):
            assert affordable(spec, record) == left_out
    with slurm_says({})[0]:
        assert affordable(spec, record) == [], "a controller that does not answer"
    with (
        slurm_says({"sinfo": "a b c d"})[0],
        mock.patch("megarecur.launch.supervise.requeue") as again,
    ):
        again.return_value = ""
        assert requeue_without_bad_nodes(spec, record, ["a", "d"], [])
        assert not requeue_without_bad_nodes(spec, record, ["a", "d"], []), "once"
    assert again.call_count == 1


def test_one_job_at_a_time_holds_a_run(tmp_path) -> None:
    with (
        mock.patch.dict(os.environ, SLURM_JOB_ID="17"),
        hold(tmp_path, 0.0),
        pytest.raises(ConfigError, match="is in use by job 17"),
        hold(tmp_path, 0.5),
    ):
        pass


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"\xff\x1b[2J")])
def test_a_damaged_lease_lets_no_second_job_in(tmp_path, damage) -> None:
    with mock.patch.dict(os.environ, SLURM_JOB_ID="17"):
        with hold(tmp_path, 0.0):
            damage(tmp_path / "supervisor.lease")
            with pytest.raises(ConfigError, match="is in use by") as caught, hold(tmp_path, 0.0):
                pass
            assert "\x1b" not in str(caught.value)
        with hold(tmp_path, 0.0):
            pass


def test_the_watchdog_knows_a_stall_from_a_slow_phase(tmp_path) -> None:
    now, beat = [0.0], [Beat(0.0, 7, "train")]
    profile = ClusterProfile(stall_factor=5.0, stall_seconds=2.0, start_seconds=100.0)
    dog = Watchdog(profile, lambda: beat[0], lambda: now[0])

    def later(seconds: float, **said: Any) -> str:
        now[0] += seconds
        beat[0] = replace(beat[0], **said)
        return dog.stalled()

    assert not later(99.0), "an old heartbeat is none"
    for step in range(8, 14):
        assert not later(1.0, step=step)
    assert not later(4.9)
    assert later(0.2) == "training at step 13 sent no heartbeat for 5 s (stall_seconds: 5 s)"
    assert not later(0.0, step=14)
    assert not later(50.0, phase="save") and not later(60.0)
    assert not later(1.0, phase="train", step=15) and later(6.0)
    clock = itertools.count(0, 101)
    assert Watchdog(profile, lambda: None, lambda: next(clock)).stalled()
    (tmp_path / "stacks-1.txt").write_text("Thread")
    (tmp_path / "stacks-2.txt").touch()
    assert without_stacks(tmp_path, 4) == [0, 2, 3]


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "configs/cluster").iterdir()))
def test_shipped_profiles_are_found_from_anywhere(tmp_path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = ROOT / f"configs/cluster/{name}.yaml"
    assert load_profile(name) == load_profile(str(path))
    own = tmp_path / "configs/cluster" / path.name
    own.parent.mkdir(parents=True)
    own.write_text("account: lab")
    assert load_profile(name).account == "lab", "one of your own comes first"


def test_a_profile_by_name_and_its_mistakes_together(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs/cluster"
    folder.mkdir(parents=True)
    (folder / "ours.yaml").write_text("account: lab")
    assert load_profile("ours").account == "lab"
    (folder / "ours.yaml").write_text("retries: -1\nstyle: mpirun\nenvironment: {1x: 2}")
    with pytest.raises(MegarecurError) as error:
        load_profile("ours")
    assert all(word in str(error.value) for word in ("3 problems", "retries", "style", "1x"))


def test_ranks_are_silent_where_slurm_does_not_answer(tmp_path: Path) -> None:
    with mock.patch("megarecur.launch.slurm.ask", side_effect=SlurmError("squeue: timed out")):
        assert ask_for_stacks("17", tmp_path, 2) == [0, 1]
