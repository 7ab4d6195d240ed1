"""A real Slurm cluster of virtual nodes for tests: slurm/cluster.sh, and waiting for jobs.

Every worker of pytest-xdist that meets a Slurm test has a cluster of its own: it is up in a second,
its daemons idle, and tests may run in any order, crash nodes and cancel all jobs.
"""

import os
import subprocess
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "cluster.sh"
PATIENCE = 600.0
"""Seconds for a job to get somewhere: several processes that import torch on two cores."""
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "TIMEOUT"}


def on_cluster(test: Callable[..., None]) -> Callable[..., None]:
    """The marks of a test that uses the fixture `slurm`."""
    for mark in (pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)):
        test = mark(test)
    return test


class NoCluster(Exception):
    """What is missing for a cluster."""


class Cluster:
    """Nodes vn1 to vn4 of four CPUs and four pretended GPUs each; partitions main, short, grace,
    high. Commands of Slurm find it by SLURM_CONF, which the fixture sets."""

    def __init__(self, folder: Path) -> None:
        """Bring it up, with all that it writes under an empty folder.

        Raises:
            NoCluster: it cannot be made here, in the words of the script.
        """
        self.folder = folder
        self.conf = folder / "etc" / "slurm.conf"
        self.environ = {**os.environ, "SLURM_CLUSTER_DIR": str(folder)}
        # Takes the cluster down when its input ends: by `close`, or with this process, however
        # that ends.
        self._guard = subprocess.Popen(
            ["bash", "-c", 'read -r; exec "$0" down', SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self.environ,
            start_new_session=True,
        )
        try:
            self.script("up")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take it down, with all jobs."""
        self._guard.communicate(timeout=600)

    def script(self, *words: str) -> str:
        """What slurm/cluster.sh prints.

        Raises:
            NoCluster: it failed.
        """
        with open(self.folder.with_suffix(".out"), "w+") as out:  # Daemons would hold a pipe open.
            code = subprocess.run([SCRIPT, *words], stdout=out, stderr=out, env=self.environ)
            out.seek(0)
            said = out.read()
        if code.returncode:
            raise NoCluster(said.strip())
        return said

    def run(self, *command: object, check: bool = True, **options: Any) -> str:
        """What a command prints on stdout; options are those of subprocess.run."""
        words = [str(word) for word in command]
        found = subprocess.run(words, capture_output=True, text=True, timeout=600, **options)
        said = f"{' '.join(words)}: {found.returncode}\n{found.stdout}{found.stderr}"
        assert not check or found.returncode == 0, said
        return found.stdout

    def submit(self, *words: object, **options: Any) -> str:
        """The id of a job submitted by sbatch."""
        return self.run("sbatch", "--parsable", *words, **options).strip()

    def state(self, job: str) -> str:
        """Such as RUNNING; of an array, the states of its tasks, each once, joined by commas."""
        return ",".join(
            sorted(set(self.run("squeue", "-hrt", "all", "-o", "%T", "-j", job).split()))
        )

    def wait(self, job: str, states: Collection[str], timeout: float = PATIENCE) -> str:
        """The state of a job, or of all tasks of an array, as soon as it is among `states`.

        Raises:
            AssertionError: the job ended otherwise, or not in time: what is known of it.
        """
        states = {states} if isinstance(states, str) else set(states)
        deadline, ended = time.monotonic() + timeout, 0
        while not set((state := self.state(job)).split(",")) <= states:
            # A job that is requeued is shown as ended for a moment.
            ended = ended + 1 if set(state.split(",")) <= ENDED else 0
            assert ended < 10 and time.monotonic() < deadline, self.describe(job)
            time.sleep(0.3)
        return state

    def show(self, job: str) -> dict[str, str]:
        """The fields that scontrol shows of a job."""
        text = self.run("scontrol", "--oneliner", "show", "job", job).splitlines()[0]
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def log(self, job: str) -> str:
        """What a job has written."""
        path = Path(self.show(job)["StdOut"])
        return path.read_text() if path.exists() else ""

    def describe(self, job: str) -> str:
        """All that is known of a job, for messages."""
        return f"{self.run('scontrol', 'show', 'job', job, check=False)}\n{self.log(job)[-4000:]}"

    def crash(self, node: str) -> None:
        """Take a node's power away."""
        self.script("crash", node)

    def start(self, node: str) -> None:
        """Start a node again, and wait until Slurm uses it. A job on it must have been given up
        (`wait` for it), or it counts as running for ever."""
        self.script("start-node", node)
        deadline = time.monotonic() + PATIENCE
        while (state := self.run("sinfo", "-hn", node, "-p", "main", "-o", "%t").strip()) not in (
            "idle",
            "mix",
            "alloc",
        ):
            assert time.monotonic() < deadline, f"{node} is {state}"
            time.sleep(0.3)

    def cancel_all(self) -> None:
        """End every job, and wait until they have."""
        self.run("scancel", "--me", check=False)
        deadline = time.monotonic() + PATIENCE
        while left := self.run("squeue", "-h"):
            assert time.monotonic() < deadline, left
            time.sleep(0.3)
