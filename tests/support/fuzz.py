"""Drawn configs, each refused by `check` or trained for two steps; and thousands of them by hand:

    PYTHONPATH=tests python -m support.fuzz /tmp/fuzz 10000      resumes after the last outcome

Outcomes are lines of FOLDER/outcomes.jsonl; what failed is also printed.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import yaml
from support.configs import TEXT
from support.drawn import draw_configs
from support.harness import World

from megarecur.config.load import load_config
from megarecur.config.run import Config
from megarecur.errors import MegarecurError
from megarecur.launch.cli import main as run_main

BATCH = 250
REMEDY = re.compile(
    r"\b(add|change|choose|convert|copy|correct|delete|did you mean|download|export|give|known|"
    r"leave|lower|make|move|must|name|not of the form|number|omit|prepare|put|raise|read|remove|"
    r"required|restore|run|save|set|should|start|take|train|use|write)\b"
)
BIG = (6e6, 4e9, 400)
"""Parameters, FLOPs of a step and steps of the map beyond which a config is only checked."""
REFUSED, TRAINED, LARGE, FAILED = "refused", "trained", "large", "failed"


# ----------------------------------------------------------------------------------- what there is


def make_data(folder: Path) -> None:
    """Small corpora of each kind, and a run to start from and to learn from."""
    from megarecur.data_prep.readers import Reading
    from megarecur.data_prep.shards import prepare_shards
    from megarecur.data_prep.tasks import TaskRequest, prepare_task

    if (folder / "ready").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "text.txt").write_text(TEXT[:6000], encoding="utf-8")
    reading = Reading(text_split="blank_line")
    sources = [folder / "text.txt"]
    prepare_shards(sources, folder / "text", "bytes", reading, val_fraction=0.05, workers=1)
    listops = {"train": 60, "val": 6, "max_length": 14, "min_length": 2}
    for name, options in (
        ("listops", listops),
        ("logic", {"train": 300, "train_operators": 3}),
        ("flip_flop", {"train": 60, "val": 6, "length": 16, "tests": ("0.1x12",), "test_count": 6}),
    ):
        prepare_task(TaskRequest(name, **options), folder / name)
    values = bases_of(folder)["text"] | {"run_dir": str(folder / "run")}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    code, message, _ = in_process("train", str(path))
    assert code == 0, message
    (folder / "ready").touch()


def bases_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Good values to vary: text, and a task of each kind."""

    def base(name: str, tokenizer: str, length: int, **sections: Any) -> dict[str, Any]:
        return {
            "seed": 3,
            "run_dir": "run",
            "model": {"hidden_size": 16, "num_heads": 2, "ffn_hidden_size": 16},
            "recurrence": {"kind": "cycle", "num_blocks": 2, "depth": 4},
            "data": {
                "train": [{"path": str(folder / name / "train")}],
                "val": [{"path": str(folder / name / "val")}],
                "tokenizer": tokenizer,
                "seq_length": length,
            },
            "optimizer": {"lr": 1e-3},
            "train": {
                "steps": 2,
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "log_every": 1,
                "eval_samples": 2,
                "device": "cpu",
            },
            "parallel": {},
            "checkpoint": {},
            "alarms": {},
            "health": {},
            **sections,
        }

    def task(name: str, length: int, **section: Any) -> dict[str, Any]:
        return base(name, str(folder / name / "tokenizer.words"), length, task=section)

    text = base("text", "bytes", 16)
    no_map = {name: value for name, value in text.items() if name != "recurrence"}
    looped = text | {"recurrence": {"kind": "loop", "prelude": 1, "core": 1, "coda": 0,
                                    "num_loops": 2}}  # fmt: skip
    temporal = text | {"temporal": {"chunk_length": 8, "num_slots": 2}}
    return {
        "text": text,
        "any text": text,
        "any map": no_map,
        "any other map": no_map,
        "any bf16": no_map | {"train": text["train"] | {"precision": "bf16"}},
        "looped": looped,
        "temporal": temporal,
        "adapters": looped | {"adapters": {"rank": 2}},
        "exits": looped | {"exits": {}},
        "distill": text | {"distill": {"teacher": str(folder / "run")}},
        "parallel": text | {"parallel": {"tensor": 2}},
        "pipeline": text | {"parallel": {"pipeline": 2}},
        "zero": text | {"parallel": {"zero_stage": 1}},
        "sequence": task("listops", 14, kind="sequence", num_classes=10),
        "pair": task("logic", 24, kind="pair", num_classes=7),
        "token": task("flip_flop", 16, kind="token", num_classes=2),
        "halting": text | {"recurrence": {"kind": "universal", "depth": 3,
                                          "halting": {"mode": "token"}}},
    }  # fmt: skip


def texts_of(folder: Path) -> dict[str, list[Any]]:
    """Values of fields that name files or presets."""
    return {
        "path": [str(folder / "text" / "train")],
        "tokenizer": ["bytes"],
        "init_from": [str(folder / "run"), f"{folder}/run@2"],
        "teacher": [str(folder / "run")],
        "cluster": ["cpu", "a100", "h100", "h200"],
        "exclude": ["*", "blocks.0.*", "blocks.*.query.weight"],
    }


# --------------------------------------------------------------------------------------- one config


def in_process(*words: str) -> tuple[int, str, str]:
    """Run a command here, through the command line's error boundary: (exit code, stderr, stdout).
    Whatever is no clean end is a code of -1."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    signals = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
    handlers = [signal.getsignal(number) for number in signals]
    try:
        with (
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
            mock.patch.object(sys, "argv", ["megarecur", *words]),
            # As in a process of its own, warnings go to stderr; pytest has handlers of its own.
            mock.patch.object(logging.getLogger(), "handlers", [logging.StreamHandler(stderr)]),
        ):
            run_main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        return -1, stderr.getvalue() + traceback.format_exc(), stdout.getvalue()
    finally:
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)
    return code, stderr.getvalue(), stdout.getvalue()


def find_fault_in(message: str) -> str:
    """Why an error message is not one clear error with remedies; "" if it is."""
    if not message.startswith("error: ") or "Traceback" in message:
        return "no error message"
    first, *rest = message.removeprefix("error: ").rstrip("\n").split("\n  ")
    for line in [first] if not rest or REMEDY.search(first) else rest:
        remedy = line.rpartition(";")[2] if ";" in line else line
        if not REMEDY.search(remedy):
            return f"no remedy in {line[:300]!r}"
    longest = max(map(len, message.splitlines()))
    return f"a line of {longest} characters" if longest > 1500 else ""


def try_config(values: dict[str, Any], folder: Path, worlds: Any) -> tuple[str, str]:
    """Check a config, and train it: (what became of it, why)."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    values = values | {"run_dir": str(folder / "run")}
    path = folder / "config.yaml"
    try:
        path.write_text(yaml.safe_dump(values, allow_unicode=False))
    except ValueError:  # Numbers that Python does not print.
        path.write_text(json.dumps(values, default=lambda v: "9"))
    code, message, _ = in_process("check", str(path))
    if code == 2:
        fault = find_fault_in(message)
        return (FAILED, fault + "\n" + message[:3000]) if fault else (REFUSED, message[:300])
    if code != 0:
        return FAILED, f"check ended with {code}: {message[-5000:]}"
    try:
        config = load_config(path)
        if is_large(config):
            return LARGE, ""
    except BaseException:
        return FAILED, traceback.format_exc()
    replica = config.parallel.tensor * config.parallel.pipeline
    micro_batches = config.train.global_batch_size // config.train.micro_batch_size
    world = replica * (2 if config.parallel.zero_stage and micro_batches % 2 == 0 else 1)
    if world > 4:
        return LARGE, f"needs {world} processes"
    if world == 1:
        outcome = train_two_steps(config)
    else:
        try:
            outcome = worlds(world).run(train_two_steps, config)[0]
        except AssertionError as error:
            outcome = f"{error}"
    return (FAILED, outcome[-6000:]) if outcome else (TRAINED, "")


def is_large(config: Config) -> bool:
    """Whether this machine should not train a config."""
    from megarecur.launch.configs import with_vocab_size
    from megarecur.plan.cost import count_flops, count_parameters, deepest_map

    config = with_vocab_size(config)
    steps = deepest_map(config)
    train = config.train
    flops = count_flops(config, steps).train * config.tokens_per_sample * train.global_batch_size
    if train.eval_depths and max(train.eval_depths) > 100:
        return True
    sizes = (count_parameters(config).total, flops, len(steps))
    return any(size > most for size, most in zip(sizes, BIG, strict=True))


def train_two_steps(config: Config) -> str:
    """Train until two steps are taken: "" if all is well, or what is not."""
    from megarecur.train import speed, trainer
    from megarecur.train.heartbeat import Heartbeat
    from megarecur.train.signals import StopFlag

    stop = StopFlag()
    enter = Heartbeat.enter

    def enter_and_stop(self: Heartbeat, phase: str, step: int, detail: str = "") -> None:
        if step >= 1 and phase == "train":
            stop.number = signal.SIGUSR1  # Obeyed once this step is done.
        enter(self, phase, step, detail)

    printed = io.StringIO()
    try:
        with (
            mock.patch.object(Heartbeat, "enter", enter_and_stop),
            mock.patch.object(speed, "measure_gemm", lambda *a, **k: 1e10),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            code = trainer.train(config, stop)
    except MegarecurError as error:
        return f"train refuses: {error}"
    except BaseException:
        return f"{traceback.format_exc()}\n{printed.getvalue()[-1500:]}"
    if code == trainer.DIVERGED and config.alarms.action != "warn":
        return ""
    if code not in (trainer.FINISHED, trainer.STOPPED):
        return f"exit code {code}\n{printed.getvalue()[-1500:]}"
    rows = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    wrong = {
        name: value
        for row in rows
        for name, value in json.loads(row).items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    return f"not finite: {wrong}" if wrong else ""


# ------------------------------------------------------------------------------------- many configs


@functools.cache
def world_of(size: int) -> World:
    """Worlds are kept."""
    return World(size)


def run_batch(folder: Path, number: int, begin: int) -> None:
    """Try a batch of configs from `begin` on, a line for each."""
    data = folder / "data"
    drawn = draw_configs(bases_of(data), texts_of(data), number, BATCH)
    with (folder / "outcomes.jsonl").open("a") as file:
        for index in range(begin, BATCH):
            values = drawn[index] if index < len(drawn) else drawn[0]
            name = number * BATCH + index
            (folder / "now").write_text(f"{name}")
            started = time.time()
            outcome, why = try_config(values, folder / "work", world_of)
            row = {"config": name, "outcome": outcome, "seconds": round(time.time() - started, 2)}
            if outcome == FAILED:
                row |= {"why": why}
                (folder / f"failed-{name}.yaml").write_text(repr(values))
            file.write(json.dumps(row) + "\n")
            file.flush()


def main() -> None:
    """Try configs until there are as many outcomes as asked for."""
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    first = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    make_data(folder / "data")
    torch.set_num_threads(1)
    outcomes = folder / "outcomes.jsonl"
    for number in range(first, first + -(-count // BATCH)):
        while True:
            done = [json.loads(line) for line in outcomes.read_text().splitlines()] if (
                outcomes.exists()) else []  # fmt: skip
            begin = sum(row["config"] // BATCH == number for row in done)
            if begin >= BATCH:
                break
            child = os.fork()
            if child == 0:
                os.setsid()
                run_batch(folder, number, begin)
                sys.stdout.flush()
                os._exit(0)
            reason = wait_for(child, outcomes)
            if reason:
                name = int((folder / "now").read_text())
                with outcomes.open("a") as file:
                    row = {"config": name, "outcome": FAILED, "why": reason}
                    file.write(json.dumps(row) + "\n")
        sys.stdout.write(f"{number} {Counter(row['outcome'] for row in done)}\n")
        sys.stdout.flush()


def wait_for(child: int, outcomes: Path) -> str:
    """Wait for a batch: "" if it ended well; it is ended where nothing happens for long."""
    quiet, last = time.monotonic(), -1
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return "" if status == 0 else f"the process ended with status {status}"
        size = outcomes.stat().st_size if outcomes.exists() else 0
        if size != last:
            quiet, last = time.monotonic(), size
        if time.monotonic() - quiet > 400:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hung"
        time.sleep(0.5)


if __name__ == "__main__":
    main()
