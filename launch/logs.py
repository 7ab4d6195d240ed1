"""Print the output of a run's ranks as one stream: `megarecur logs`.

Each rank of an attempt under Slurm writes its own file, RUN/logs/attempt-003/rank-0002.log, and
lines have no time stamps. So lines are merged by reading time, in rounds: each round reads every
rank's file to its current end. Without --follow there is one round: all of rank 0, then all of rank
1. With --follow, a round takes half a second, and lines of different ranks are ordered to within
that; lines of one rank are always in order.

If torchrun's agents start the processes, each file, and the number in front, belongs to an agent:
one per node.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from megarecur.errors import ConfigError
from megarecur.launch.folder import check_run, find_logs, read_attempts, read_beat
from megarecur.launch.output import say

ROUND_SECONDS = 0.5
QUIET_SECONDS = 2.0
"""Seconds that a finished run may still print."""
BLOCK_BYTES = 1 << 20
RANK_FILE = re.compile(r"rank-(\d+)\.log")
COMES_BACK = ("requeued", "restarted")
"""Actions after which another attempt follows."""


class RankOutput:
    """One rank's file, read as it grows."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.rank = path, rank
        self.position = 0
        self.pending = b""
        """The beginning of a line whose end has not been written yet."""

    def new_lines(self) -> Iterator[str]:
        """Yield complete lines since the last call."""
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < self.position:  # the file was restarted
                self.position, self.pending = 0, b""
            file.seek(self.position)
            while self.position < size and (block := file.read(BLOCK_BYTES)):
                self.position += len(block)
                *lines, self.pending = (self.pending + block).split(b"\n")
                yield from map(self.prefixed, lines)

    def rest(self) -> Iterator[str]:
        """Yield the last line when no more of it will come."""
        if self.pending:
            yield self.prefixed(self.pending)
            self.pending = b""

    def prefixed(self, line: bytes) -> str:
        """Format a line as a terminal shows it, with its rank in front: a progress bar in its last
        state."""
        text = line.decode("utf-8", errors="replace").rstrip("\r").rpartition("\r")[2]
        return f"[{self.rank}] {text}"


class AttemptOutput:
    """The output of the ranks of one attempt; later files are found too."""

    def __init__(self, folder: Path, rank: int | None) -> None:
        self.folder, self.only = folder, rank
        self.outputs: dict[int, RankOutput] = {}

    def find(self) -> list[int]:
        """Look for new files; return the ranks that have one, whether shown or not."""
        ranks = []
        with suppress(FileNotFoundError):
            for path in self.folder.iterdir():
                if match := RANK_FILE.fullmatch(path.name):
                    rank = int(match[1])
                    ranks.append(rank)
                    if self.only in (None, rank) and rank not in self.outputs:
                        self.outputs[rank] = RankOutput(path, rank)
        return sorted(ranks)

    def new_lines(self) -> Iterator[str]:
        """Yield the lines of one round."""
        self.find()
        for rank in sorted(self.outputs):
            yield from self.outputs[rank].new_lines()

    def rest(self) -> Iterator[str]:
        """Yield last lines without an end, of a finished attempt."""
        yield from self.new_lines()
        for rank in sorted(self.outputs):
            yield from self.outputs[rank].rest()


def show_logs(folder: Path, follow: bool, attempt: int | None, rank: int | None) -> None:
    """Print the output of an attempt, by default the newest; Ctrl-C ends it.

    Args:
        follow: continue with new lines, and with new attempts unless one is named, until the run
        has ended.

    Raises:
        ConfigError: the run, attempt or rank does not exist, or the run was never under Slurm.
    """
    run = check_run(folder)
    try:
        if follow:
            follow_run(run, attempt, rank)
        else:
            number, output = choose_attempt(run, attempt, rank)
            emit(output.rest() if is_over(run, number) else output.new_lines())
            if not output.find():
                note(f"attempt {number} has written nothing yet")
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:  # The reader (`| head`) has ended; exit silently.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def choose_attempt(run: Path, attempt: int | None, rank: int | None) -> tuple[int, AttemptOutput]:
    """Return the attempt to show.

    Raises:
        ConfigError: the attempt or its rank does not exist.
    """
    found = find_logs(run)
    if not found:
        raise ConfigError(where_output_went(run))
    number = max(found) if attempt is None else attempt
    if number not in found:
        raise ConfigError(f"{run}: has no attempt {number}; there are {', '.join(map(str, found))}")
    output = AttemptOutput(found[number], rank)
    ranks = output.find()
    if rank is not None and ranks and rank not in ranks:
        raise ConfigError(
            f"{run}: attempt {number} has no rank {rank}; it has ranks {ranks[0]} to {ranks[-1]}"
        )
    return number, output


def where_output_went(run: Path) -> str:
    """Return why there is no output of ranks, and where to look."""
    batch = sorted((run / "logs").glob("slurm-*.log"))
    if batch:
        return f"{run}: no attempt has begun; the batch script wrote {batch[-1]}"
    if (run / "launch").is_dir():
        return f"{run}: its job has not begun; --follow waits for it, `megarecur status` says why"
    return (
        f"{run}: was not started by `megarecur launch --nodes`, so its output went to the terminal "
        "or file of the command that trained it, and no copy is kept; "
        "`megarecur status` and metrics.jsonl have its numbers"
    )


def follow_run(run: Path, attempt: int | None, rank: int | None) -> None:
    """Print lines as they arrive.

    Raises:
        ConfigError: the attempt or rank does not exist and will not appear.
    """
    if attempt is None and not find_logs(run) and (run / "launch").is_dir():
        note("waiting for the first attempt")
        while not find_logs(run):
            time.sleep(ROUND_SECONDS)
    number: int | None
    number, output = choose_attempt(run, attempt, rank)
    while number is not None:
        note(f"attempt {number}")
        follow_attempt(run, number, output)
        number = None if attempt is not None else next_attempt(run, number)
        if number is not None:
            output = AttemptOutput(find_logs(run)[number], rank)


def follow_attempt(run: Path, number: int, output: AttemptOutput) -> None:
    """Print the lines of one attempt until it has ended, or the run is done and silent."""
    silent_since: float | None = None
    while True:
        # checked before reading, so that everything written until then is read
        over, done = is_over(run, number), is_done(run, number)
        printed, now = emit(output.new_lines()), time.monotonic()
        if over:
            break
        if not done or printed or silent_since is None:
            silent_since = now
        elif now - silent_since >= QUIET_SECONDS:
            break
        time.sleep(ROUND_SECONDS)
    emit(output.rest())
    for past in read_attempts(run):
        if past.number == number and past.ended is not None:
            note(f"attempt {number} ended: {past.why}; {past.action}")


def next_attempt(run: Path, number: int) -> int | None:
    """Wait for the attempt after a finished one; return None if none will come."""
    while True:
        later = [each for each in find_logs(run) if each > number]
        if later:
            return later[0]
        past = {each.number: each for each in read_attempts(run)}.get(number)
        ended = past is not None and past.ended is not None and past.action not in COMES_BACK
        if ended or is_done(run, number):
            return None
        time.sleep(ROUND_SECONDS)


def is_over(run: Path, number: int) -> bool:
    """Return True if an attempt has ended: its end is recorded, or another one has started."""
    past = read_attempts(run)
    ended = any(each.number == number and each.ended is not None for each in past)
    return ended or max([*find_logs(run), number]) > number


def is_done(run: Path, number: int) -> bool:
    """Return True if the run reported in this attempt that all steps are done."""
    beat = read_beat(run)
    began = max((each.began for each in read_attempts(run) if each.number == number), default=0.0)
    return beat is not None and beat.phase == "done" and beat.time >= began


def emit(lines: Iterator[str]) -> bool:
    """Print lines; return True if there were any."""
    printed = False
    for line in lines:
        say(line)
        printed = True
    sys.stdout.flush()
    return printed


def note(text: str) -> None:
    """Print a message to stderr that is not a rank's output."""
    say(f"--- {text}", file=sys.stderr, flush=True)
