"""metrics.jsonl is the truth; TensorBoard mirrors it; one line tells how the run goes."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from megarecur.config.load import to_yaml
from megarecur.config.schema import Config

TAIL_BYTES = 1 << 20
"""Of metrics.jsonl: holds all rows of its last step, whatever the depth."""


HALTED_AT = "recurrence/halted_at"
"""Metrics `recurrence/halted_at/03` are the bars of one histogram: shares of tokens by steps."""


class Metrics:
    """Where rank 0 writes a run's numbers; flat keys equal TensorBoard tags.

    A resumed run drops the rows of steps it is about to repeat, so that curves stay single-valued.
    TensorBoard's files cannot be rewritten; they are told from which step on to forget what they
    hold. Where the step that the run goes on from is yet to be scored, that is this step itself,
    for a part of its scores may be there: its row is written once more.
    """

    def __init__(self, run_dir: Path, config: Config, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = run_dir / "metrics.jsonl"
        drop_after(self.path, step)
        last = [row for row in read_rows(self.path, TAIL_BYTES) if row["step"] == step]
        scored = any("val/loss" in row for row in last)
        self.file = self.path.open("a", encoding="utf-8")
        folder = run_dir / "tensorboard"
        put_in_order(folder, int(time.time()))
        self.board = SummaryWriter(str(folder), purge_step=step + scored)
        # At the step to come: whoever goes on from the same step again takes this one's place.
        self.board.add_text("config", f"```yaml\n{to_yaml(config)}```", step + 1)
        for row in last if not scored else ():
            self.draw(step, {tag: row[tag] for tag in row.keys() - {"step", "tokens"}})

    def write(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """One row. JSON has no infinity: what is not finite becomes null."""
        finite = {tag: v if math.isfinite(v) else None for tag, v in values.items()}
        row = {"step": step, "tokens": tokens, **finite}
        self.draw(step, finite)  # First: of a run killed in between, TensorBoard can forget it.
        self.file.write(json.dumps(row, allow_nan=False) + "\n")
        self.file.flush()

    def draw(self, step: int, values: Mapping[str, float | None]) -> None:
        """The values of a row that are there, for TensorBoard."""
        for tag, value in values.items():
            if value is not None:
                self.board.add_scalar(tag, value, step)
        bars = sorted(tag for tag in values if tag.startswith(HALTED_AT + "/"))
        if bars:
            self.draw_histogram(step, HALTED_AT, [values[tag] or 0.0 for tag in bars])
        self.board.flush()

    def draw_histogram(self, step: int, tag: str, shares: Sequence[float]) -> None:
        """Shares of 0, 1, 2, ..."""
        numbers = range(len(shares))
        self.board.add_histogram_raw(
            tag,
            min=0.0,
            max=float(len(shares) - 1),
            num=1.0,
            sum=sum(i * share for i, share in enumerate(shares)),
            sum_squares=sum(i * i * share for i, share in enumerate(shares)),
            bucket_limits=[i + 0.5 for i in numbers],
            bucket_counts=list(shares),
            global_step=step,
        )

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Texts by tag, shown as they are."""
        for tag, text in texts.items():
            indented = "\n".join("    " + line for line in text.splitlines())
            self.board.add_text(tag, indented, step)

    def close(self) -> None:
        """Make everything durable."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.board.close()


def put_in_order(folder: Path, now: int) -> None:
    """Rename event files so that one made in this second is read after them.

    They are read in the order of their names, which begin with the second they were made in, and
    the clock of the node that made them may have been ahead of this one's.

    Args:
        folder: of the event files; it need not be there.
        now: this second, in UNIX time.
    """
    for i, path in enumerate(sorted(folder.glob("events.out.tfevents.*"))):
        stamp, _, rest = path.name.removeprefix("events.out.tfevents.").partition(".")
        if stamp.isdigit() and int(stamp) >= now:
            # ~ comes after the names of hosts.
            path.rename(folder / f"events.out.tfevents.{now - 1:010d}.~{i:06d}.{rest}")


def read_rows(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """Whole rows of a metrics.jsonl, or of its last bytes; a line cut short by a crash, or by
    where reading began, is left out."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        if last_bytes is not None:
            file.seek(max(file.seek(0, os.SEEK_END) - last_bytes, 0))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def drop_after(path: Path, step: int) -> None:
    """Rewrite metrics.jsonl without rows beyond a step; aside, then renamed."""
    rows = read_rows(path)
    if not path.exists():
        return
    aside = path.with_suffix(".jsonl.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


class Progress:
    """One line per log step: rewritten in place on a terminal, plain elsewhere."""

    def __init__(self, num_steps: int, stream: TextIO | None = None) -> None:
        self.num_steps, self.stream = num_steps, stream or sys.stdout
        self.terminal = self.stream.isatty()
        self.open_line = False
        self.first: tuple[int, float] | None = None

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Step, loss, rate, gradient norm, speed, time left."""
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
            if "val/accuracy" in values:
                parts.append(f"accuracy {values['val/accuracy']:.4f}")
            else:
                parts.append(f"bits per byte {values['val/bits_per_byte']:.4f}")
        line = "  ".join([*parts, f"left {duration(left)}"])
        if not self.terminal:
            self.put(line + "\n")
            return
        # A validated step keeps its line.
        self.open_line = "val/loss" not in values
        self.put("\r\x1b[K" + line + ("" if self.open_line else "\n"))

    def put(self, text: str) -> None:
        """Write; a reader that has gone away (`| head`) must not end a run."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except BrokenPipeError:
            self.stream = sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def note(self, text: str) -> None:
        """A line of its own."""
        self.put(("\n" if self.open_line else "") + text + "\n")
        self.open_line = False


def _thousands(value: float) -> str:
    for unit in ("", "k", "M"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"


def duration(seconds: float | None) -> str:
    """Like 1h02m, 3m04s or 5s; ? when unknown."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
