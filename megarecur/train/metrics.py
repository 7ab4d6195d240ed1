"""Output of a run's metrics: metrics.jsonl, its copy for TensorBoard, and a progress line."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TextIO

from megarecur.config.load import to_yaml
from megarecur.config.run import Config
from megarecur.files import publish, replace_file
from megarecur.reading import escape, parse_metrics

log = logging.getLogger(__name__)

TAIL_BYTES = 1 << 20
"""Number of bytes at the end of metrics.jsonl that hold all rows of its last step, at any depth."""


HALTED_AT = "recurrence/halted_at"
"""Prefix of metrics that form one histogram: `recurrence/halted_at/03` is a share of tokens."""

METRICS = {
    "step": "optimizer steps done",
    "tokens": "tokens of all global batches so far",
    "train/loss": "cross-entropy per valid token in nats, mean over the interval; never smoothed",
    "train/smoothed_loss": "cross-entropy with the smoothed label, which training minimizes",
    "train/distill": "KL(teacher || student), with a teacher",
    "train/exit_{n}/loss": "cross-entropy of the exit after loop n",
    "train/exit_{n}/distill": "KL(last loop || exit after loop n)",
    "train/exit_{n}/z_loss": "mean of logsumexp(logits)^2 of the exit after loop n",
    "train/halting": "expected number of steps of a token, as the objective weighs it",
    "train/{encoder_}halting": "expected number of steps of a source token, with halting",
    "train/z_loss": "mean of logsumexp(logits)^2",
    "train/loss_of/{corpus}": "training loss by corpus, if there are several",
    "optim/lr": "learning rate",
    "optim/grad_norm": "global gradient norm before clipping",
    "optim/skipped": "optimizer steps skipped so far because a gradient was not finite",
    "speed/tokens_per_second": "tokens per second over all processes",
    "speed/step_seconds": "seconds per optimizer step",
    "speed/data_wait": "share of the time spent waiting for data",
    "speed/flops_per_token": "executed training FLOPs per token, without recompute; of attention "
    "those that the documents and windows of the batches need, not S x S",
    "speed/mfu": "executed training FLOPs as a share of the peak of the hardware",
    "speed/mfu_forward_only": "the same for loops without gradient",
    "speed/mfu_with_recompute": "the same with recompute counted",
    "speed/attention/{backend}": "1, named by the attention backend of the run",
    "speed/graphs": "graphs that torch.compile has made",
    "speed/save_seconds": "seconds for which saving blocked training",
    "speed/write_seconds": "seconds that writing the last checkpoint took",
    "memory/peak_bytes": "peak memory: of the GPU, on CPUs of the process",
    "memory/parameters": "bytes of parameters on this process",
    "memory/moments": "bytes of optimizer moments",
    "memory/gradients": "bytes of gradients",
    "memory/copies": "bytes of copies of weights in the compute dtype",
    "recurrence/num_loops": "mean number of loops, where it is drawn",
    "recurrence/backward_loops": "mean number of loops with gradient",
    "recurrence/residual_norm/{block}.{loop}": "|x_out|: RMS of the stream after this visit",
    "recurrence/relative_update/{block}.{loop}": "|x_out - x_in| / |x_in|",
    "recurrence/residual_ratio/{block}.{loop}": "|x_out| / |x_in|",
    "recurrence/fixed_point_distance/{block}.{loop}": "|x_out - x_out of the last visit| / |x_out|",
    "recurrence/gradient_share/{block}.{loop}": "share of this visit in its block's gradient",
    "recurrence/{encoder_}num_loops": "num_loops of an encoder",
    "recurrence/{encoder_}backward_loops": "backward_loops of an encoder",
    "recurrence/{encoder_}halting_depth": "halting_depth of an encoder",
    "recurrence/{encoder_}executed_share": "executed_share of an encoder",
    "recurrence/{encoder_}halted_at/{steps}": "halted_at of an encoder",
    "recurrence/halting_depth": "mean number of steps of a token, with halting",
    "recurrence/executed_share": "share of all steps that was computed, with halting",
    "recurrence/halted_at/{steps}": "share of tokens that took this number of steps",
    "val/loss": "validation loss per token in nats, over all corpora",
    "val/bits_per_byte": "validation loss per byte of text in bits",
    "val/exit_{n}/loss": "validation loss of the exit after loop n",
    "val/bleu": "BLEU of greedy translations of validation pairs (train.eval_bleu)",
    "val/accuracy": "share of scored predictions that are right, of a task",
    "val/top5_accuracy": "share of samples whose class is among the 5 likeliest, of more classes",
    "val/calibration_error": "expected calibration error in 15 bins, of a task",
    "val/halting_depth": "mean number of steps of a sample's tokens, of a task with halting",
    "val/glitch_rate": "share of scored tokens that are wrong (kind: token)",
    "val/last_accuracy": "share of samples whose last scored token is right (kind: token)",
    "val/accuracy_by_length/{tokens}": "accuracy by the length of the sample",
    "val/depth_{n}/{metric}": "a validation metric at n loops (train.eval_depths)",
    "val/{corpus}/{metric}": "a validation metric by corpus, if there are several",
    "task/{name}/{metric}": "a metric of a task of lm-evaluation-harness (train.eval_tasks)",
    "alarms/raised": "alarms raised at this log step",
}
"""Every key of a row of metrics.jsonl, which is also the tag in TensorBoard; {...} is any text."""


class Metrics:
    """Writer of a run's metrics, used by rank 0; keys of rows equal TensorBoard tags.

    A resumed run drops the rows of steps that it repeats, so that each step has one row.
    TensorBoard's files cannot be rewritten; a new file states the step from which TensorBoard
    ignores earlier files. If the evaluation of the resumed step is still missing, that is the
    resumed step itself, as earlier files may hold a part of its scores; its row is then written
    again.
    """

    def __init__(self, run_dir: Path, config: Config, step: int) -> None:
        self.path, self.folder = run_dir / "metrics.jsonl", run_dir / "tensorboard"
        self.config = f"```yaml\n{to_yaml(config)}```"
        drop_after(self.path, step)
        last = [row for row in read_rows(self.path, TAIL_BYTES) if row["step"] == step]
        scored = any("val/loss" in row for row in last)
        self.file = self.path.open("a+", encoding="utf-8")
        self.board = Board(self.folder, step + scored)
        # Tagged with the next step: a later resume from this same step replaces the text.
        self.board.add_text("config", self.config, step + 1)
        if not scored:
            self.draw_rows(last)

    def write(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Write one row. JSON has no infinity, so non-finite values become null."""
        finite = {tag: v if math.isfinite(v) else None for tag, v in values.items()}
        row = {"step": step, "tokens": tokens, **finite}
        self.draw(step, finite)  # First: TensorBoard can ignore it if the run is killed now.
        self.file.write(json.dumps(row, allow_nan=False) + "\n")
        self.file.flush()

    def restore(self) -> list[str]:
        """Recreate files that were deleted during the run; returns the missing paths.

        A deleted metrics.jsonl is copied from the file that is still open. TensorBoard's events are
        rebuilt from it, except for texts of earlier steps.
        """
        missing = []
        if is_gone(self.path, self.file):
            missing.append(str(self.path))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                self.file.seek(0)
                replace_file(self.path, self.file.read())
            self.file.close()
            self.file = self.path.open("a+", encoding="utf-8")
        if self.board.is_gone():
            missing.append(str(self.board.path))
            rows = read_rows(self.path)
            self.board.close()
            self.board = Board(self.folder, 0)
            self.board.add_text("config", self.config, rows[0]["step"] if rows else 0)
            self.draw_rows(rows)
        return missing

    def draw_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows of metrics.jsonl to TensorBoard."""
        for row in rows:
            self.draw(row["step"], {tag: row[tag] for tag in row.keys() - {"step", "tokens"}})

    def draw(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write the values of a row to TensorBoard, except those that are None."""
        for tag, value in values.items():
            if value is not None:
                self.board.add_scalar(tag, value, step)
        bars = sorted(tag for tag in values if tag.startswith(HALTED_AT + "/"))
        if bars:
            self.draw_histogram(step, HALTED_AT, [values[tag] or 0.0 for tag in bars])
        self.board.flush()

    def draw_histogram(self, step: int, tag: str, shares: Sequence[float]) -> None:
        """Write a histogram to TensorBoard; shares[i] is the share of the value i."""
        numbers = range(len(shares))
        self.board.add_histogram_raw(
            tag,
            step,
            min=0.0,
            max=float(len(shares) - 1),
            num=1.0,
            sum=sum(i * share for i, share in enumerate(shares)),
            sum_squares=sum(i * i * share for i, share in enumerate(shares)),
            bucket_limits=[i + 0.5 for i in numbers],
            bucket_counts=list(shares),
        )

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts by tag to TensorBoard, shown verbatim."""
        for tag, text in texts.items():
            indented = "\n".join("    " + line for line in text.splitlines())
            self.board.add_text(tag, indented, step)

    def close(self) -> None:
        """Sync and close all files."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.board.close()


class Board:
    """A TensorBoard event file.

    The caller's thread writes it. The library's writer uses a thread that dies with a traceback if
    the file cannot be written.

    Args:
        purge_step: the step from which TensorBoard ignores the content of earlier files.
    """

    numbers = itertools.count()

    def __init__(self, folder: Path, purge_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self.make, self.event = summary, Event
        self.failed = False
        now = int(time.time())
        put_in_order(folder, now)
        stamp = f"{now:010d}.{socket.gethostname()}.{os.getpid()}.{next(self.numbers)}"
        self.path = folder / f"events.out.tfevents.{stamp}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file: IO[bytes] = self.path.open("wb")
        except OSError as error:
            self.give_up(error)
            return
        self.records = RecordWriter(self.file)
        self.add(file_version="brain.Event:2")
        self.add(step=purge_step, session_log=SessionLog(status=SessionLog.START))
        self.flush()

    def give_up(self, error: OSError) -> None:
        """Stop writing, because metrics.jsonl has every value; a full disk stays an error.

        Raises:
            OSError: the disk is full, so that nothing else of the run could be saved either.
        """
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise error
        self.failed = True
        log.warning(
            "%s: cannot be written (%s); training continues without TensorBoard's files, and "
            "metrics.jsonl holds every value", self.path, error.strerror,
        )  # fmt: skip

    def is_gone(self) -> bool:
        """Return True if the file was deleted or replaced."""
        return not self.failed and is_gone(self.path, self.file)

    def add(self, **fields: Any) -> None:
        """Write an event."""
        if self.failed:
            return
        try:
            self.records.write(self.event(wall_time=time.time(), **fields).SerializeToString())
        except OSError as error:
            self.give_up(error)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write a point of a curve."""
        self.add(step=step, summary=self.make.scalar(escape(tag, keep=""), value))

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Write a text in Markdown."""
        self.add(step=step, summary=self.make.text(escape(tag, keep=""), escape(text)))

    def add_histogram_raw(self, tag: str, step: int, **bars: Any) -> None:
        """Write a histogram; see torch.utils.tensorboard.summary.histogram_raw."""
        self.add(step=step, summary=self.make.histogram_raw(tag, **bars))

    def flush(self) -> None:
        """Flush all events to the operating system."""
        if self.failed:
            return
        try:
            self.records.flush()
        except OSError as error:
            self.give_up(error)

    def close(self) -> None:
        """Close the file."""
        if self.failed:
            return
        try:
            self.records.close()
        except OSError as error:
            self.give_up(error)


def is_gone(path: Path, file: IO[Any]) -> bool:
    """Return True if a path no longer refers to the file that was opened there."""
    try:
        return not os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return True


def put_in_order(folder: Path, now: int) -> None:
    """Rename event files so that a file created in this second is read after them.

    TensorBoard reads them in the order of their names, which begin with the second of their
    creation. The clock of the node that created them may have been ahead of this one's.

    Args:
        folder: the folder of event files; it may be missing.
        now: the current second in UNIX time.
    """
    for i, path in enumerate(sorted(folder.glob("events.out.tfevents.*"))):
        stamp, _, rest = path.name.removeprefix("events.out.tfevents.").partition(".")
        if not (stamp.isascii() and stamp.isdigit() and len(stamp) < 20 and int(stamp) >= now):
            continue
        with suppress(OSError):  # Only the order of points that TensorBoard draws depends on it.
            # ~ sorts after hostnames.
            publish(path, folder / f"events.out.tfevents.{now - 1:010d}.~{i:06d}.{rest}")


def read_rows(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """Return the complete rows of a metrics.jsonl, or of its last bytes.

    Lines truncated by a crash, or by the start of reading, are skipped.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        if last_bytes is not None:
            file.seek(max(file.seek(0, os.SEEK_END) - last_bytes, 0))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    rows, damaged = [], 0
    for number, line in enumerate(lines, 1):
        row = parse_metrics(line)
        if row is not None:
            rows.append(row)
        elif 1 < number < len(lines):  # A crash or the start of reading may truncate these.
            damaged += 1
    if damaged:
        log.warning("%s: %d damaged row(s) are passed over", path, damaged)
    return rows


def drop_after(path: Path, step: int) -> None:
    """Rewrite metrics.jsonl without the rows beyond a step."""
    rows = read_rows(path)
    if not path.exists():
        return
    kept = (json.dumps(row) + "\n" for row in rows if row["step"] <= step)
    replace_file(path, "".join(kept))


class Progress:
    """Progress display: one line per log step, rewritten in place on a terminal."""

    def __init__(self, num_steps: int, stream: TextIO | None = None) -> None:
        self.num_steps, self.stream = num_steps, stream or sys.stdout
        self.terminal = self.stream.isatty()
        self.open_line = False
        self.first: tuple[int, float] | None = None

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show step, loss, learning rate, gradient norm, speed and remaining time."""
        now = time.monotonic()
        if self.first is None:
            self.first = (step, now)
        done, since = step - self.first[0], now - self.first[1]
        left = since / done * (self.num_steps - step) if done else None
        parts = [f"step {step}/{self.num_steps}"]
        if "train/loss" in values:
            parts.append(f"loss {values['train/loss']:.4f}")
        if "optim/lr" in values:
            parts += [
                f"lr {values['optim/lr']:.2e}",
                f"grad {values['optim/grad_norm']:.3f}",
                f"tok/s {_thousands(values['speed/tokens_per_second'])}",
                f"mfu {100 * values['speed/mfu']:.0f}%",
                f"data wait {100 * values['speed/data_wait']:.1f}%",
            ]
        if "val/loss" in values:
            parts.append(f"val loss {values['val/loss']:.4f}")
            if "val/bleu" in values:
                parts.append(f"bleu {values['val/bleu']:.2f}")
            if "val/accuracy" in values:
                parts.append(f"accuracy {values['val/accuracy']:.4f}")
            else:
                parts.append(f"bits per byte {values['val/bits_per_byte']:.4f}")
        line = "  ".join([*parts, f"left {duration(left)}"])
        if not self.terminal:
            self.put(line + "\n")
            return
        # Keep the line of a validated step.
        self.open_line = "val/loss" not in values
        self.put("\r\x1b[K" + line + ("" if self.open_line else "\n"))

    def put(self, text: str) -> None:
        """Write text; a closed pipe (`| head`) or terminal must not end a run, and neither must a
        full disk of its output."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            self.stream = sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def note(self, text: str) -> None:
        """Print text on a separate line."""
        self.put(("\n" if self.open_line else "") + escape(text) + "\n")
        self.open_line = False


def _thousands(value: float) -> str:
    for unit in ("", "k", "M"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"


def duration(seconds: float | None) -> str:
    """Format a duration, for example 1h02m, 3m04s or 5s; ? if unknown."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
