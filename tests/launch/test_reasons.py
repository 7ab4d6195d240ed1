"""Why an attempt ended: each cause injected as ranks, srun and Slurm report it."""

from pathlib import Path
from typing import Any

import pytest

from megarecur.launch.reasons import Evidence, TaskEnd, count_oom_kills, find_cause

NODES = ("a", "b")
TRACE = 'Traceback (most recent call last):\n  File "x.py", line 3, in f\n    g()\n'
LOST = (
    TRACE + "torch.distributed.DistBackendError: NCCL error in: ../NCCLUtils.hpp:5, remote process "
    "exited or there was a network error, NCCL version 2.27\nncclRemoteError: A call failed"
)
GLOO = TRACE + "RuntimeError: [/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:9"
STEP = "step 12/90  loss 5.1  lr 1.00e-03  grad 1.5  tok/s 2k  mfu 1%  data wait 0.0%  left 9s\n"


def ended(task: int, how: str = "Exited with exit code 1") -> TaskEnd:
    return TaskEnd(NODES[task // 2], (task,), how)


def of_rank(rank: int, text: str) -> str:
    return "".join(f"[rank{rank}]: {line}\n" for line in text.splitlines())


def explain(folder: Path, logs: dict[int, str], *ends: TaskEnd, **more: Any) -> Any:
    for rank, text in logs.items():
        (folder / f"rank-{rank:04}.log").write_text(text)
    return find_cause(Evidence(folder, NODES, 2, ends, **more))


CASES: dict[str, tuple[dict[int, str], tuple[TaskEnd, ...], dict[str, Any], str, str, tuple]] = {
    # name: (logs by rank, ends, more evidence, kind, part of the text, nodes to blame)
    "a full disk that one rank knows": (
        {0: STEP + TRACE + "OSError: [Errno 28] No space left on device: '/data/run/x'\n", 3: LOST},
        (ended(3), ended(0)), {}, "no space left on a disk", "rank 0 on a: OSError: [Errno 28]", (),
    ),
    "a full disk as this program reports it": (
        {0: "error: run_dir=/r: No space left on device; free some space and start again\n"},
        (ended(0),), {}, "no space left on a disk", "rank 0 on a: error: run_dir=/r", (),
    ),
    "a quota": (
        {2: TRACE + "OSError: [Errno 122] Disk quota exceeded: '/home/x'"}, (ended(2),), {},
        "no space left on a disk", "rank 2 on b", (),
    ),
    "a read-only disk": (
        {2: TRACE + "OSError: [Errno 30] Read-only file system: '/r/x'"}, (ended(2),), {},
        "a disk cannot be written", "rank 2 on b", (),
    ),
    "a broken disk": (
        {2: TRACE + "OSError: [Errno 5] Input/output error: '/r/x'"}, (ended(2),), {},
        "a disk fails", "rank 2 on b", ("b",),
    ),
    "memory, by Slurm's step": (
        {2: STEP + "slurmstepd: error: Detected 1 oom_kill event in StepId=17.0. Some of the step "
            "tasks have been OOM Killed.\n", 0: GLOO},
        (ended(2, "Out Of Memory"), ended(0)), {}, "out of memory", "oom_kill event", (),
    ),
    "memory, by srun alone": (
        {0: GLOO}, (ended(0), ended(2, "Out Of Memory")), {}, "out of memory",
        "rank 2 on b: Out Of Memory", (),
    ),
    "memory, by the job's state": (
        {}, (ended(2, "Killed"),), {"job": {"JobState": "OUT_OF_MEMORY"}}, "out of memory",
        "OUT_OF_MEMORY", (),
    ),
    "memory, by the kernel": (
        {0: GLOO}, (ended(1, "Killed"), ended(0)), {"oom_kills": 1}, "out of memory",
        "rank 1 on a: the kernel killed it", (),
    ),
    "memory, by Python": (
        {3: TRACE + "MemoryError\n"}, (ended(3),), {}, "out of memory", "rank 3 on b: MemoryError",
        (),
    ),
    "memory, by torch": (
        {3: TRACE + "RuntimeError: [enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator:"
            " can't allocate memory: you tried to allocate 9 bytes."}, (ended(3),), {},
        "out of memory", "rank 3 on b", (),
    ),
    "memory of a GPU": (
        {1: TRACE + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n",
         0: LOST}, (ended(0), ended(1)), {}, "out of GPU memory", "rank 1 on a", (),
    ),
    "a broken GPU": (
        {2: TRACE + "RuntimeError: CUDA error: uncorrectable ECC error encountered\n", 0: LOST},
        (ended(0), ended(2)), {}, "a GPU fails", "rank 2 on b", ("b",),
    ),
    "an exception, before those who miss that rank": (
        {0: LOST, 1: GLOO, 2: STEP + TRACE + "ValueError: odd shape\n", 3: GLOO},
        (ended(0), ended(1), ended(2)), {}, "exception", "rank 2 on b: ValueError: odd shape", (),
    ),
    "an exception with a module's name": (
        {1: TRACE + "pkg.deep.OddError: text: with colon\n"}, (ended(1),), {}, "exception",
        "pkg.deep.OddError: text: with colon", (),
    ),
    "an exception without words": (
        {1: TRACE + "AssertionError\n"}, (ended(1),), {}, "exception", "AssertionError", (),
    ),
    "communication alone": (
        {0: LOST, 1: LOST}, (ended(1), ended(0)), {}, "communication failed", "rank 1 on a: ", (),
    ),
    "a fault of a library": (
        {1: STEP + "Fatal Python error: Segmentation fault\n\nCurrent thread 0x1:\n  File x\n"},
        (ended(1, "Segmentation fault (core dumped)"),), {}, "exception", "Fatal Python error", (),
    ),
    "a signal without words": (
        {0: GLOO.replace("gloo", "odd") and ""}, (ended(0), ended(2, "Segmentation fault")), {},
        "signal", "rank 2 on b: Segmentation fault (SIGSEGV)", (),
    ),
    "a kill from outside": (
        {0: ""}, (ended(2, "Killed"), ended(0)), {}, "signal", "rank 2 on b: Killed (SIGKILL", (),
    ),
    "a bus error": (
        {}, (ended(2, "Bus error"),), {}, "signal", "/dev/shm", (),
    ),
    "an exit code with last words": (
        {2: "starting\nodd: cannot go on\n"}, (ended(2, "Exited with exit code 7"),), {},
        "exit code", "Exited with exit code 7, after: odd: cannot go on", (),
    ),
    "an exit code alone": (
        {}, (ended(2, "Exited with exit code 7"),), {}, "exit code", "exit code 7; log: ", (),
    ),
    "a program that is not there": (
        {2: "slurmstepd: error: execve(): /opt/python: No such file or directory\n"},
        (ended(2, "Exited with exit code 2"),), {}, "the program cannot be started", "execve()", (),
    ),
    "srun that cannot start": (
        {}, (), {"said": ["srun: error: Unable to create step for job 17: Job/step already "
                          "completing or completed"]},
        "the program cannot be started", "Slurm: srun: error: Unable to create step", (),
    ),
    "a warning of long ago": (
        {0: "checkpoint.mirror=/far: No space left on device; the next save tries again\n" + STEP
            + TRACE + "KeyError: 'odd'\n"}, (ended(0),), {}, "exception", "KeyError: 'odd'", (),
    ),
    "an exception as torch prints it where there are several ranks": (
        {0: of_rank(0, LOST), 2: STEP + of_rank(2, TRACE + "ValueError: odd shape"),
         3: of_rank(3, GLOO)},
        (ended(0), ended(2), ended(3)), {}, "exception", "rank 2 on b: ValueError: odd shape", (),
    ),
    "an exception of an odd name, before those who miss that rank": (
        {0: LOST, 2: STEP + TRACE + "zlib.error: Error -3 while decompressing\n", 3: GLOO},
        (ended(0), ended(2), ended(3)), {}, "exception", "rank 2 on b: zlib.error: Error -3", (),
    ),
    "an exception of an odd name, of several ranks": (
        {1: of_rank(1, TRACE + "StopIteration"), 0: of_rank(0, GLOO)},
        (ended(0), ended(1)), {}, "exception", "rank 1 on a: StopIteration", (),
    ),
    "memory, by numpy": (
        {3: TRACE + "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 7.45 GiB for an "
            "array with shape (9,)\n"}, (ended(3),), {}, "out of memory", "rank 3 on b", (),
    ),
    "memory that processes share": (
        {1: TRACE + "RuntimeError: DataLoader worker (pid 9) is killed by signal: Bus error. It is "
            "possible that dataloader's workers are out of shared memory.\n"}, (ended(1),), {},
        "out of memory", "rank 1 on a", (),
    ),
    "a node without GPUs": (
        {2: of_rank(2, TRACE + "RuntimeError: No CUDA GPUs are available"), 0: LOST},
        (ended(0), ended(2)), {}, "a GPU fails", "rank 2 on b", ("b",),
    ),
    "what a bar of progress has written over": (
        {1: TRACE + "reading 1%\rreading 9%\rKeyError: 'odd'\n"}, (ended(1),), {}, "exception",
        "rank 1 on a: KeyError: 'odd' (", (),
    ),
    "nothing": ({}, (), {}, "unknown", "", ()),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_most_specific_cause_is_found(tmp_path, name) -> None:
    logs, ends, more, kind, text, nodes = CASES[name]
    cause = explain(tmp_path, logs, *ends, **more)
    assert (cause.kind, cause.nodes) == (kind, nodes), cause.text
    assert text in cause.text
    if logs and kind not in ("signal", "unknown") and "by Slurm" not in cause.text:
        assert str(tmp_path) in cause.text, "the log's path"


def test_the_line_is_quoted_with_its_place(tmp_path) -> None:
    filler = "".join(f"warning {n}: nothing of note\n" for n in range(20_000))
    long = "ValueError: " + "x" * 1000
    cause = explain(tmp_path, {1: filler + TRACE + long + "\n"}, ended(1))
    assert cause.text.endswith(f"... ({tmp_path / 'rank-0001.log'}:20004)")
    assert len(cause.text) < 500


def test_the_kernel_counts_its_kills() -> None:
    assert count_oom_kills() >= 0
