"""One preparation by many tasks: shares, locks, kills, changed inputs, and the jobs of Slurm."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarecur.data.mapped_files import hash_file
from megarecur.data_prep import array
from megarecur.data_prep.array import begin, plan_remaining_work, run_task, share
from megarecur.data_prep.plan import Request
from megarecur.data_prep.readers import Reading
from megarecur.data_prep.shards import hold, partial_of, prepare_shards
from megarecur.errors import DataError
from megarecur.launch.cli import main
from megarecur.launch.prep_array import command_of, write_array
from megarecur.launch.profile import ClusterProfile

ROOT = Path(__file__).resolve().parents[2]
READING = Reading(text_split="blank_line", exclude=("*.skip",))
OPTIONS = ("--text-split", "blank_line", "--exclude", "*.skip", "--val-fraction", "0.1")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of texts: three that are a piece of reading each, and small ones that are one.

    Some documents are there twice, in one file and in two.
    """
    folder, rng = tmp_path_factory.mktemp("inputs"), random.Random(0)
    documents = ["".join(rng.choices("abc de\n", k=rng.randint(9, 3000))) for _ in range(500)]
    for name, count in (("a", 240), ("b", 9), ("c", 12), ("d", 350), ("e", 200)):
        some = (text.replace("\n\n", "\n").strip() for text in rng.choices(documents, k=count))
        (folder / f"{name}.txt").write_text("\n\n".join(some))
    (folder / "no.txt.skip").write_text("left out")
    return folder


@pytest.fixture(scope="module")
def expected(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The hash of every file that one machine writes."""
    out = tmp_path_factory.mktemp("expected") / "out"
    prepare_shards([inputs], out, "bytes", READING, val_fraction=0.1, workers=1)
    return hashes(out)


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in files}


def finished(partial: Path) -> dict[str, tuple[int, int]]:
    """The finished pieces of work; one that is written again has another mark."""
    files = [path for suffix in ("npz", "tokens") for path in partial.glob(f"*.{suffix}")]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def request_of(*inputs: Path) -> Request:
    return Request(tuple(map(str, inputs)), "bytes", READING, val_fraction=0.1)


def command(inputs: Path, out: Path, *more: object) -> list[str]:
    words = ("prep", "shards", inputs, "--out", out, "--tokenizer", "bytes", *OPTIONS, *more)
    return [sys.executable, "-m", "megarecur.launch.cli", *map(str, words)]


def start(words: Sequence[str]) -> subprocess.Popen[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, env=environ, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and messages."""
    _, message = process.communicate(timeout=600)
    return process.returncode, message


def all_tasks(
    request: Request, out: Path, tasks: int, phases: Sequence[str] = array.Phase.__args__
) -> None:
    """Do phases in this process."""
    for phase in phases:
        for task in range(1 if phase == "assemble" else tasks):
            run_task(request, out, phase, task, tasks, workers=1)


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run `megarecur prep shards ...` here: its exit code and all that it prints."""

    def run(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["megarecur", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err, shown.err
        return int(ended.value.code or 0), shown.out + shown.err

    return run


# ------------------------------------------------------------------------------------------ shares


@given(st.lists(st.integers(0, 1000), max_size=50), st.integers(1, 20))
def test_shares_hold_every_piece_once_and_are_even(sizes: list[int], tasks: int) -> None:
    shares = share(sizes, tasks)
    assert len(shares) == tasks and shares == share(sizes, tasks)
    assert sorted(i for mine in shares for i in mine) == list(range(len(sizes)))
    held = [sum(sizes[i] for i in mine) for mine in shares]
    assert max(held) - min(held) <= max(sizes, default=0)


@given(st.sets(st.integers(0, 40), min_size=1))
def test_numbers_of_an_array(numbers: set[int]) -> None:
    text, _, at_once = write_array(sorted(numbers), 3).partition("%")
    runs = [[*map(int, run.split("-"))] for run in text.split(",")]
    assert [i for run in runs for i in range(run[0], run[-1] + 1)] == sorted(numbers)
    assert at_once == "3" and "%" not in write_array(sorted(numbers), None)


# ------------------------------------------------------------------------------------------- tasks


def test_processes_write_what_one_machine_writes(
    inputs: Path, expected: dict[str, str], tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    """By the hidden options; one task is killed half-way and run again alone."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with begin(request_of(inputs), out, 2) as work:
        assert work == {"read": [0, 1], "tokenise": [0, 1], "assemble": [0]}
    killed = (
        "import os, signal, sys; from megarecur.data_prep import array\n"
        "from megarecur.launch.cli import main\n"
        "real, done = array.read_sources, []\n"
        "def read_one(task):\n"
        "    if done: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    done.append(real(task)); return 0\n"
        "array.read_sources = read_one; sys.argv[0] = 'megarecur'; main()"
    )

    def words(phase: str, task: int) -> list[str]:
        return command(inputs, out, "--phase", phase, "--task", task, "--tasks", 2, "--workers", 1)

    victim = start([sys.executable, "-c", killed, *words("read", 1)[3:]])
    other = start(words("read", 0))
    assert finish(victim)[0] == -signal.SIGKILL and finish(other) == (0, "")
    read = finished(partial)
    assert len(read) == 3 and plan_remaining_work(request_of(inputs), out, 2)["read"] == [1]
    code, message = finish(start(words("tokenise", 0)))
    assert code == 2 and "1 of 4 pieces of the phase read are not finished" in message
    assert finish(start(words("read", 1))) == (0, "")
    assert read.items() < finished(partial).items()
    for process in [start(words("tokenise", task)) for task in (0, 1)]:
        assert finish(process) == (0, "")
    assert cli(*words("assemble", 0)[3:])[0] == 0  # here, where its libraries are imported
    assert hashes(out) == expected and not partial.exists()


@pytest.mark.parametrize("tasks", [1, 3, 40])
def test_any_number_of_tasks(
    inputs: Path, expected: dict[str, str], tmp_path: Path, tasks: int
) -> None:
    out, request = tmp_path / "out", request_of(inputs)
    with begin(request, out, tasks):
        pass
    all_tasks(request, out, tasks)
    assert hashes(out) == expected
    with begin(request, out, tasks) as work:
        assert work == {} == plan_remaining_work(request, out, tasks)


def test_one_machine_and_tasks_go_on_with_each_other(
    inputs: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out, request, partial = tmp_path / "out", request_of(inputs), tmp_path / "out.partial"
    with begin(request, out, 4) as work:
        assert work["read"] == [0, 1, 2, 3]
    all_tasks(request, out, 4, ["read"])
    run_task(request, out, "tokenise", 2, 4, workers=1)
    kept = finished(partial)
    # Another number of tasks divides what is left otherwise, and leaves what is finished alone.
    with begin(request, out, 2) as work:
        assert work == {"read": [], "tokenise": [0, 1], "assemble": [0]}
    all_tasks(request, out, 2, ["read", "tokenise"])
    assert kept.items() < finished(partial).items()
    prepare_shards([inputs], out, "bytes", READING, val_fraction=0.1, workers=1)
    assert hashes(out) == expected


def test_near_duplicates_are_decided_once(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasketch", reason="needs the extra dedup")
    prepare_shards([inputs / "b.txt"], tmp_path / "one", "bytes", READING, near_duplicates=0.5)
    request = Request((str(inputs / "b.txt"),), "bytes", READING, near_duplicates=0.5)
    with begin(request, tmp_path / "out", 2):
        pass
    all_tasks(request, tmp_path / "out", 2, ["read"])
    monkeypatch.setattr("megarecur.data_prep.shards.find_near_duplicates", None)
    all_tasks(request, tmp_path / "out", 2)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "one")


def test_a_tokenizer_keeps_its_name(tmp_path: Path, inputs: Path) -> None:
    from megarecur.data_prep.tokenizer import train_tokenizer

    model = train_tokenizer([inputs / "b.txt"], tmp_path / "books.model", READING, vocab_size=270)
    prepare_shards([inputs / "b.txt"], tmp_path / "one", model, READING, workers=1)
    request = Request((str(inputs / "b.txt"),), str(model), READING)
    with begin(request, tmp_path / "out", 2):
        pass
    model.unlink()  # tasks use the copy
    all_tasks(request, tmp_path / "out", 2)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "one")


@pytest.mark.parametrize("content", [b"more text\n", b"not UTF-8: \xff", None])
def test_inputs_that_changed_are_named(tmp_path: Path, content: bytes | None) -> None:
    file, out = tmp_path / "a.txt", tmp_path / "out"
    file.write_bytes(before := b"some text\n")
    request = request_of(tmp_path)
    with begin(request, out, 1):
        pass
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
        os.utime(file, (1, 1))
    message = "cannot be read" if content is None else "changed since this work was submitted"
    with pytest.raises(DataError, match=f"{file}: {message}"):
        run_task(request, out, "read", 0, 1, workers=1)
    assert not finished(tmp_path / "out.partial")
    file.write_bytes(before)
    run_task(request, out, "read", 0, 1, workers=1)
    # What is finished is of the bytes that were planned for, whatever the file holds now.
    file.unlink()
    run_task(request, out, "read", 0, 1, workers=1)


def test_tasks_refuse_what_was_not_submitted(inputs: Path, tmp_path: Path) -> None:
    out, request = tmp_path / "out", request_of(inputs)
    with pytest.raises(DataError, match=r"record\.json: missing"):
        run_task(request, out, "read", 0, 1)
    assert not any(tmp_path.iterdir())
    with begin(request, out, 1):
        pass
    with pytest.raises(DataError, match=r"submitted with val_fraction=0\.1, not 0\.0"):
        run_task(Request(request.inputs, "bytes", READING), out, "read", 0, 1)
    with pytest.raises(DataError, match="submitted with inputs="):
        run_task(request_of(inputs / "a.txt"), out, "read", 0, 1)
    with pytest.raises(DataError, match="task 1: must be"):
        run_task(request, out, "read", 1, 1)
    all_tasks(request, out, 1, ["read"])
    with pytest.raises(DataError, match="pieces of the phase tokenise are not finished"):
        run_task(request, out, "assemble", 0, 1)
    assert not out.exists()


def test_tasks_share_the_folder_with_each_other_only(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array, "PATIENCE", 0.0)
    out, request, refused = tmp_path / "out", request_of(inputs), "another process is preparing"
    with begin(request, out, 1):
        run_task(request, out, "read", 0, 1, workers=1)  # before the submission is over
        with pytest.raises(DataError, match=refused), begin(request, out, 1):
            pass
    with hold(partial_of(out), shared=True):  # another task
        run_task(request, out, "tokenise", 0, 1, workers=1)
        with pytest.raises(DataError, match=refused):
            prepare_shards([inputs], out, "bytes", READING, val_fraction=0.1, workers=1)
        with pytest.raises(DataError, match=refused), begin(request_of(inputs / "a.txt"), out, 1):
            pass
        with pytest.raises(DataError, match=refused):
            run_task(request, out, "assemble", 0, 1)
    kept = finished(partial_of(out))
    with hold(partial_of(out)), pytest.raises(DataError, match=refused):  # a plain run
        run_task(request, out, "tokenise", 0, 1)
    assert finished(partial_of(out)) == kept and len(kept) > 4


# ---------------------------------------------------------------------------------------- the jobs


@pytest.fixture
def slurm_stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH whose sbatch counts jobs, and refuses from number `full` on."""
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {
        "sbatch": 'n=$(ls "$HERE" | grep -c job-); test -e "$HERE/full-$n" && '
        '{ echo "sbatch: error: queue is full" >&2; exit 1; }; for f; do :; done; '
        'cp "$f" "$HERE/job-$((41 + n))"; echo "Submitted batch job $((41 + n))"',
        "squeue": 'cat "$HERE/queue" 2>/dev/null || '
        "{ echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1; }",
        "scancel": 'echo "$@" >> "$HERE/cancelled"',
        "srun": "exit 1",
    }
    for name, text in programs.items():
        (folder / name).write_text(f'#!/bin/bash\nHERE="$(dirname "$0")"\n{text}\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_a_dry_run_prints_three_scripts_and_writes_nothing(
    inputs: Path, tmp_path: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    profile = tmp_path / "here.yaml"
    profile.write_text("partition: long\nmem: 8G\ncontainer: {image: books.sqsh}\n")
    odd = ("--text-key", "$text", "--exclude", "it's.txt", "--near-duplicates", 0.0)
    words = (*command(inputs, tmp_path / "my out")[3:], *odd, "--launch", "slurm", "--tasks", 256)
    code, text = cli(*words, "--at-once", 8, "--cluster", profile, "--workers", 2, "--dry-run")
    assert code == 0 and sorted(tmp_path.iterdir()) == [profile]
    read, tokenise, assemble = text.split("#!/bin/bash\n")[1:]
    # There are four pieces to read; how many to tokenise shows when they are read.
    for script, numbers in ((read, "0-3%8"), (tokenise, "0-255%8")):
        assert f"--array={numbers}\n" in script and '--task "$SLURM_ARRAY_TASK_ID" -- ' in script
    assert "--array" not in assemble and "TASK_ID" not in assemble
    assert "--dependency" not in read and "--kill-on-invalid-dep" not in read
    for script, before in ((tokenise, "READ"), (assemble, "TOKENISE")):
        assert f"--dependency=afterok:JOB_OF_{before}\n" in script
        assert "#SBATCH --kill-on-invalid-dep=yes\n" in script
    for script, phase in ((read, "read"), (tokenise, "tokenise"), (assemble, "assemble")):
        assert f"--phase={phase} --tasks=256" in script and "--workers=2" in script
        assert "srun --ntasks=1 --container-image=books.sqsh" in script
        assert "'--text-key=$text'" in script and "'--exclude=it'\"'\"'s.txt'" in script
        assert f"'--out={tmp_path}/my out'" in script and "#SBATCH --partition=long" in script


def test_bash_fills_in_no_word_of_the_user() -> None:
    request = Request(("$a.txt", "hf:b"), "$t.model", Reading(template="${x}{text}"))
    words = command_of(request, Path("$out"), "read", 2, 0, ClusterProfile())
    assert [word for word in words if word.startswith("$")] == ["$SLURM_ARRAY_TASK_ID"]
    assert words[-3:] == ["--", "./$a.txt", "hf:b"]


def test_every_way_of_reading_reaches_the_jobs() -> None:
    """A job is told whatever is not the default; a new option must be as well."""
    asked = {
        "text_key": "body", "text_split": "separator", "separator": "<end>", "errors": "skip",
        "template": "{a}", "quoting": "none", "exclude": ("b*", "c"),
    }  # fmt: skip
    assert set(asked) == {field.name for field in fields(Reading)}
    reading = Reading(**asked)  # type: ignore[arg-type]
    request = Request(("a.txt",), "t.json", reading, eos="<|end|>")
    words = command_of(request, Path("out"), "read", 2, 0, ClusterProfile())
    for name, value in (asked | {"eos": "<|end|>"}).items():
        for each in value if isinstance(value, tuple) else (value,):
            assert f"--{name.replace('_', '-')}={each}" in words


def test_jobs_are_submitted_after_each_other(
    inputs: Path, tmp_path: Path, slurm_stub: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    out = tmp_path / "out"
    words = (*command(inputs, out)[3:], "--launch", "slurm", "--tasks", 3)
    code, text = cli(*words)
    assert code == 0 and "read: job 41, 3 tasks\ntokenise: job 42, 3 tasks, after 41" in text
    jobs = [(slurm_stub / f"job-{number}").read_text() for number in (41, 42, 43)]
    assert "dependency" not in jobs[0] and "--dependency=afterok:41\n" in jobs[1]
    assert "--dependency=afterok:42\n" in jobs[2] and "--array=0-2\n" in jobs[1]
    folder = tmp_path / "out.slurm"
    assert "dependency" not in (folder / "tokenise.sh").read_text()
    assert (folder / "tokenise-after-41.sh").read_text() == jobs[1]
    # Tasks import a copy of the code, whatever is edited while they wait.
    (code,) = folder.glob("code-*")
    assert (code / "megarecur/data_prep/array.py").read_bytes() == Path(array.__file__).read_bytes()
    assert all(
        f"export PYTHONPATH={code}$" in job and " -P -m megarecur.launch.cli" in job for job in jobs
    )
    # While they are queued, nobody else begins.
    (slurm_stub / "queue").write_text("41\n43\n7\n")
    for other in (words, command(inputs, out)[3:]):
        code, text = cli(*other)
        assert code == 2 and "jobs 41, 43 are preparing this corpus" in text
    (slurm_stub / "queue").unlink()
    # Afterwards, only what is missing is submitted.
    request = request_of(inputs)
    for task in (0, 2):
        run_task(request, out, "read", task, 3, workers=1)
    assert cli(*words)[0] == 0
    assert "--array=1\n" in (slurm_stub / "job-44").read_text()
    all_tasks(request, out, 3, ["read"])
    run_task(request, out, "tokenise", 0, 3, workers=1)
    code, text = cli(*words, "--dry-run")
    assert code == 0 and "# read.sh" not in text and "--array=1-2\n" in text
    code, text = cli(*words)
    assert "read: finished\ntokenise: job 47, 2 tasks\nassemble: job 48, after 47" in text
    all_tasks(request, out, 3)
    code, text = cli(*words)
    assert code == 0 and "is prepared" in text and not (slurm_stub / "job-49").exists()


def test_what_cannot_be_submitted(
    inputs: Path,
    tmp_path: Path,
    slurm_stub: Path,
    cli: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = command(inputs, tmp_path / "out")[3:]
    for words, message in (
        (("--launch", "slurm"), "needs --tasks"),
        (("--launch", "slurm", "--tasks", 0), "--tasks"),
        (("--launch", "slurm", "--tasks", 2, "--at-once", 0), "--at-once"),
        (("--launch", "cloud", "--tasks", 2), "'--launch'"),
        (("--launch", "slurm", "--tasks", 2, "--cluster", "nowhere"), "--cluster nowhere"),
        (("--tasks", 2), "add --launch slurm"),
        (("--dry-run",), "add --launch slurm"),
    ):
        code, text = cli(*plain, *words)
        assert code == 2 and message in text
    assert not (tmp_path / "out.partial").exists()
    # All jobs, or none of them.
    (slurm_stub / "full-2").touch()
    code, text = cli(*plain, "--launch", "slurm", "--tasks", 2)
    assert code == 2 and "queue is full" in text
    assert (slurm_stub / "cancelled").read_text().split() == ["41", "42"]
    for content in ("{", "[1]", "\0"):
        (tmp_path / "out.slurm").mkdir(exist_ok=True)
        (tmp_path / "out.slurm" / "jobs.json").write_text(content)
        code, text = cli(*plain, "--launch", "slurm", "--tasks", 2)
        assert code == 2 and "jobs.json: is damaged" in " ".join(text.split())
    monkeypatch.setenv("PATH", str(tmp_path))
    code, text = cli(*plain, "--launch", "slurm", "--tasks", 2)
    assert code == 2 and "sbatch: not found" in text


def wait_for_queue(seconds: float = 120.0) -> None:
    """Wait until no job of a preparation is left."""
    end = time.monotonic() + seconds
    asked = ["squeue", "--noheader", "--format=%j %T %r"]
    while "prep-" in (left := subprocess.run(asked, capture_output=True, text=True).stdout):
        assert time.monotonic() < end, left
        time.sleep(0.5)


@pytest.mark.slurm
@pytest.mark.slow
def test_slurm_prepares_what_one_machine_does(
    slurm: object,
    inputs: Path,
    expected: dict[str, str],
    tmp_path: Path,
    cli: Callable[..., tuple[int, str]],
) -> None:
    """A task fails and ends what waits for it; alone, and by the same command, it is mended."""
    out, mended, profile = tmp_path / "my out", tmp_path / "mended", tmp_path / "here.yaml"
    held = tmp_path / "held"
    lines = [
        f"while test -e {held}; do sleep 0.2; done",
        f"test -e {mended} || test ${{SLURM_ARRAY_TASK_ID:-0}} != 1",
    ]
    profile.write_text(json.dumps({"time": "00:10:00", "setup": lines}))
    held.touch()
    words = (*command(inputs, out, "--workers", 1)[3:], "--launch", "slurm")
    words = (*words, "--tasks", 3, "--cluster", profile)
    code, text = cli(*words)
    assert code == 0 and "read: job" in text, text
    code, text = cli(*command(inputs, out)[3:])
    assert code == 2 and "are preparing this corpus" in text
    held.unlink()  # Until here tasks wait: on a slow machine they could have ended.
    wait_for_queue()
    read = finished(partial_of(out))
    assert plan_remaining_work(request_of(inputs), out, 3)["read"] == [1] and not out.exists()
    mended.touch()
    script = tmp_path / "my out.slurm" / "read.sh"
    subprocess.run(["sbatch", "--array=1", str(script)], check=True, timeout=600)
    wait_for_queue()
    assert read.items() < finished(partial_of(out)).items()
    mended.unlink()
    code, text = cli(*words)
    assert code == 0 and "read: finished" in text
    wait_for_queue()
    assert not out.exists() and plan_remaining_work(request_of(inputs), out, 3)["tokenise"] == [1]
    kept = finished(partial_of(out))
    mended.touch()
    code, text = cli(*words)
    assert code == 0 and "tokenise: job" in text and "1 tasks" in text
    assert kept.keys() <= finished(partial_of(out)).keys() or out.exists()
    wait_for_queue()
    logs = "\n".join(log.read_text() for log in script.parent.glob("assemble-*.log"))
    assert hashes(out) == expected, logs
    assert not partial_of(out).exists() and "documents" in logs
    for log in (*script.parent.glob("read-*-0.log"), *script.parent.glob("assemble-*.log")):
        assert "has finished in" in log.read_text(), log
