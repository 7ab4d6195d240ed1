"""Which ranks wait in a long phase, and for whom, from the reports of train/waiting.py."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megarecur.launch.folder import Beat
from megarecur.plan.describe import name_ranks
from megarecur.progress import REPORTS, WAITING
from megarecur.reading import read_object

MOST_NAMED = 4
"""Number of ranks whose progress is shown."""


@dataclass(frozen=True)
class Report:
    """The last report of one rank in a phase that takes long."""

    rank: int
    world: int
    host: str
    time: float
    """UNIX seconds, by the clock of the rank's node."""
    seconds: float
    """Age of the phase."""
    phase: str
    step: int
    detail: str
    count: int
    """Number of signs of progress within the phase."""

    @property
    def waits(self) -> bool:
        """True if the rank has done its part and waits for the others."""
        return self.detail.endswith(WAITING)


def read_reports(run: Path, beat: Beat | None, began: float = 0.0) -> list[Report]:
    """Return the reports about the phase of a run's heartbeat, by rank.

    Args:
        began: start of the attempt in UNIX seconds; older reports are of another one.
    """
    if beat is None:
        return []
    found = []
    for path in (run / REPORTS).glob("rank-*.json"):
        with suppress(OSError, ValueError, TypeError):
            report = Report(**read_object(path))
            if (report.phase, report.step) == (beat.phase, beat.step) and report.time >= began:
                found.append(report)
    return sorted(found, key=lambda report: report.rank)


def describe_waiting(reports: Sequence[Report]) -> str:
    """Return which ranks are behind and which wait for them; "" if no phase takes long."""
    if not reports:
        return ""
    waiting = [report.rank for report in reports if report.waits]
    busy = [report for report in reports if not report.waits]
    unheard = sorted(set(range(reports[0].world)) - {report.rank for report in reports})
    least = min((report.count for report in busy), default=0)
    behind = [report for report in busy if waiting or report.count == least]
    if not waiting and len(behind) == len(busy) and len(busy) > 1:
        behind = []  # All are equally far.
    parts = [
        f"rank {report.rank} on {report.host} is behind"
        + (f" ({report.detail})" if report.detail else "")
        for report in behind[:MOST_NAMED]
    ]
    if rest := [report.rank for report in behind[MOST_NAMED:]]:
        parts.append(f"{name_ranks(rest)} also")
    if unheard:
        parts.append(f"{name_ranks(unheard)} sent no report, and may hang or be past it")
    if waiting:
        parts.append(f"{name_ranks(waiting)} {'wait' if len(waiting) > 1 else 'waits'}")
    elif not behind:
        parts.append(f"{name_ranks([report.rank for report in busy])} are equally far")
    seconds = max(report.seconds for report in reports)
    return f"over {seconds:.0f} s in this phase: " + "; ".join(parts)
