"""The output of a run's ranks in one stream: `megarecur logs`.

Each rank of an attempt under Slurm writes a file of its own, RUN/logs/attempt-003/rank-0002.log,
and lines have no time stamps. So they are merged by when they are read: in rounds, within a round
rank by rank, each file to its present end. Read once, that is one round: all of rank 0, then all of
rank 1. Followed, a round is half a second, and lines of different ranks come in order to within
that; lines of one rank are always in order.

Where torchrun's agents start the processes, a file, and the number in front, is that of an agent:
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

from launch.folder import check_run, find_logs, read_attempts, read_beat
from megarecur.errors import ConfigError

ROUND_SECONDS = 0.5
QUIET_SECONDS = 2.0
"""A run that says it is done may have this much more to print."""
BLOCK_BYTES = 1 << 20
RANK_FILE = re.compile(r"rank-(\d+)\.log")
COMES_BACK = ("requeued", "restarted")
"""Actions after the end of an attempt that another one follows."""


class RankOutput:
    """One rank's file, read as it grows."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path, self.rank = path, rank
        self.position = 0
        self.pending = b""
        """The begin of a line whose end has not been written yet."""

    def new_lines(self) -> Iterator[str]:
        """Whole lines since the last call."""
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < self.position:  # Begun anew.
                self.position, self.pending = 0, b""
            file.seek(self.position)
            while self.position < size and (block := file.read(BLOCK_BYTES)):
                self.position += len(block)
                *lines, self.pending = (self.pending + block).split(b"\n")
                yield from map(self.prefixed, lines)

    def rest(self) -> Iterator[str]:
        """The last line, where no more of it will come."""
        if self.pending:
            yield self.prefixed(self.pending)
            self.pending = b""

    def prefixed(self, line: bytes) -> str:
        """As a terminal would show it, its rank in front: a progress bar as it was at last."""
        text = line.decode("utf-8", errors="replace").rstrip("\r").rpartition("\r")[2]
        return f"[{self.rank}] {text}"


class AttemptOutput:
    """The output of the ranks of one attempt; files that appear later are found."""

    def __init__(self, folder: Path, rank: int | None) -> None:
        self.folder, self.only = folder, rank
        self.outputs: dict[int, RankOutput] = {}

    def find(self) -> list[int]:
        """Look for new files; the ranks that have one, whether shown or not."""
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
        """One round."""
        self.find()
        for rank in sorted(self.outputs):
            yield from self.outputs[rank].new_lines()

    def rest(self) -> Iterator[str]:
        """Last lines without an end, of an attempt that is over."""
        yield from self.new_lines()
        for rank in sorted(self.outputs):
            yield from self.outputs[rank].rest()


def show_logs(folder: Path, follow: bool, attempt: int | None, rank: int | None) -> None:
    """Print the output of an attempt, the newest unless named; Ctrl-C ends it.

    Args:
        folder: of the run.
        follow: go on with new lines, and with new attempts unless one is named, until the run is
            done or ends for good.
        attempt: its number.
        rank: the only one to show.

    Raises:
        ConfigError: no run, or no such attempt or rank; a run that was never under Slurm.
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
    except BrokenPipeError:  # The reader (`| head`) has gone away: no complaint at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def choose_attempt(run: Path, attempt: int | None, rank: int | None) -> tuple[int, AttemptOutput]:
    """The attempt to show.

    Raises:
        ConfigError: there is none, or none of this number, or it has no such rank.
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
    """Why there is no output of ranks, and where there is some."""
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
    """Print lines as they come.

    Raises:
        ConfigError: an attempt or rank that is not there and will not come.
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
    """Print the lines of one attempt until it is over, or the run is done and has fallen silent."""
    silent_since: float | None = None
    while True:
        # Asked before reading, so that all that was written until then is read.
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
    """Wait for the attempt after one that is over; None where none will come."""
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
    """Whether an attempt writes nothing more: its end is recorded, or another one has begun."""
    past = read_attempts(run)
    ended = any(each.number == number and each.ended is not None for each in past)
    return ended or max([*find_logs(run), number]) > number


def is_done(run: Path, number: int) -> bool:
    """Whether the run said in this attempt, not in one before, that all steps are done."""
    beat = read_beat(run)
    began = max((each.began for each in read_attempts(run) if each.number == number), default=0.0)
    return beat is not None and beat.phase == "done" and beat.time >= began


def emit(lines: Iterator[str]) -> bool:
    """Print lines; whether there were any."""
    printed = False
    for line in lines:
        print(line)
        printed = True
    sys.stdout.flush()
    return printed


def note(text: str) -> None:
    """What is not of a rank goes to stderr."""
    print(f"--- {text}", file=sys.stderr, flush=True)
