"""Score a run on tasks of lm-evaluation-harness: `megarecur eval RUN --tasks arc_easy,piqa`.

RUN/scores.jsonl        a row for each task, depth and metric
RUN/plots/scores.png    scores by depth
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from megarecur.checkpoint.load import open_run_folder
from megarecur.config.recurrence import Looped
from megarecur.config.run import Config
from megarecur.errors import ConfigError
from megarecur.files import append_row
from megarecur.inference.likelihood import refuse_scoring
from megarecur.inference.task_files import check_harness, choose_folder
from megarecur.launch.folder import check_run
from megarecur.launch.score import parse_depths
from megarecur.plot.layer_map import save
from megarecur.plot.scores import draw_scores
from megarecur.progress import Note, note_nothing
from megarecur.reading import parse_row, read_bytes
from megarecur.recurrence.depth import default_depth

if TYPE_CHECKING:
    from megarecur.inference.harness import TaskScore

SCORES = "scores.jsonl"


def score_run_on_tasks(
    run_dir: Path,
    tasks: str,
    *,
    shots: int = 0,
    depth: str | None = None,
    folder: Path | None = None,
    limit: int | None = None,
    step: int | None = None,
    device: str = "auto",
    note: Note = note_nothing,
) -> list[dict[str, Any]]:
    """Score a run on tasks; append the scores to RUN/scores.jsonl and return these rows.

    Args:
        tasks: names of tasks, such as `arc_easy,piqa`.
        shots: number of examples in front of each question.
        depth: numbers of loops, such as `1,2,4`; None: those trained with.
        folder: folder with the tasks' files; None: `eval` below MEGARECUR_DATA if that is set, and
            for other tasks the data that the harness fetches.
        limit: number of documents of each task; None: all.

    Raises:
        ConfigError: unknown tasks, missing files, a depth without parameters, a run that predicts
            no text, or no harness; all mistakes but those of files are found before the model is
            loaded.
        MegarecurError: no run, or files that cannot be read.
    """
    config = open_run_folder(check_run(run_dir), step).config
    if refusal := refuse_scoring(config, None):
        raise ConfigError(f"{run_dir}: cannot be scored on tasks: {refusal}")
    depths = parse_depths(depth, config)
    check_harness("--tasks")
    from megarecur.inference import harness

    names = parse_tasks(tasks)
    where, required = choose_folder(folder)
    loaded = harness.load_tasks(names, shots, where, required)
    model = harness.HarnessModel(run=run_dir, step=step, device=device)
    done = model.scorer.step
    rows = []
    for loops in depths:
        at = f"depth {loops}: " if loops is not None else ""
        own = model.at_depth(loops)
        own.note = lambda detail, at=at: note(f"{at}{detail}")  # type: ignore[misc]
        for score in harness.score_tasks(own, loaded, limit):
            row = describe_score(score, config, done, harness.VERSION, limit)
            append_row(run_dir / SCORES, row)
            rows.append(row)
    return rows


def parse_tasks(text: str) -> list[str]:
    """Return the distinct names in a list such as arc_easy,piqa."""
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def describe_score(
    score: TaskScore, config: Config, step: int, version: str, limit: int | None
) -> dict[str, Any]:
    """Return a row of scores.jsonl. JSON has no infinity, so values that are not finite become
    null."""
    values = asdict(score)
    if score.depth is None and isinstance(config.recurrence, Looped):
        values["depth"] = default_depth(config.recurrence).num_loops
    for key in ("value", "stderr"):
        if values[key] is not None and not math.isfinite(values[key]):
            values[key] = None
    return {"step": step, **values, "limit": limit, "harness": version}


def draw_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the scores with their standard errors as a table of tasks by depth."""
    depths = list(dict.fromkeys(row["depth"] for row in rows))
    table = Table("task", "metric", "samples", box=None, pad_edge=False)
    for depth in depths:
        name = "score" if depth is None else f"{depth} loop{'s' * (depth != 1)}"
        table.add_column(name, justify="right")
    cells = {(row["task"], row["metric"], row["depth"]): row for row in rows}
    for task, metric in dict.fromkeys((row["task"], row["metric"]) for row in rows):
        found = [cells[task, metric, depth] for depth in depths]
        table.add_row(task, metric, str(found[0]["samples"]), *map(show_score, found))
    return table


def show_score(row: dict[str, Any]) -> str:
    """Return a value with its standard error, such as `0.2500 ± 0.0125`."""
    if row["value"] is None:
        return "not finite"
    spread = "" if row["stderr"] is None else f" ± {show_number(row['stderr'])}"
    return f"{show_number(row['value'])}{spread}"


def show_number(value: float) -> str:
    """Return a number with four places, or four digits if it is large."""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def read_scores(path: Path) -> list[dict[str, Any]]:
    """Return the rows of scores.jsonl; damaged lines are skipped."""
    rows: list[dict[str, Any]] = []
    with suppress(FileNotFoundError):
        for line in read_bytes(path).decode(errors="replace").splitlines():
            row = parse_row(line)
            if row is not None and _is_score(row):
                rows.append(row)
    return rows


def _is_score(row: dict[str, Any]) -> bool:
    """Return True if the entries of a row that are drawn have the types of `describe_score`."""
    number = (int, float, type(None))
    return (
        all(isinstance(row.get(key), str) for key in ("task", "metric"))
        and all(type(row.get(key)) in number for key in ("value", "stderr", "shots", "limit"))
        and type(row.get("depth")) in (int, type(None))
        and type(row.get("step")) is int
    )


def draw_picture(run_dir: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Draw RUN/plots/scores.png: the given scores, and earlier ones of the same tasks, checkpoint,
    shots and limit at other depths."""
    same = ("step", "task", "shots", "limit")
    groups = {tuple(row[key] for key in same) for row in rows}
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in [*read_scores(run_dir / SCORES), *rows]:
        if tuple(row.get(key) for key in same) in groups and row["value"] is not None:
            kept[row["task"], row["metric"], row["depth"]] = row
    path = run_dir / "plots" / "scores.png"
    shots, limit = rows[0]["shots"], rows[0]["limit"]
    title = f"step {rows[0]['step']}, {shots} examples"
    title += f", first {limit} documents" if limit is not None else ""
    save(draw_scores(list(kept.values()), title), path)
    return path
