"""Scores on tasks of lm-evaluation-harness during training (`train.eval_tasks`).

The first process builds the requests and reads the answers, which all processes compute.
"""

from __future__ import annotations

from typing import Any

from megarecur.config.run import Config
from megarecur.data.tokenizer import load_tokenizer
from megarecur.inference.answers import Answers
from megarecur.inference.task_files import check_harness, choose_folder
from megarecur.model.transformer import Transformer
from megarecur.parallel.mesh import Mesh, same_error
from megarecur.plan.schedule import Schedules
from megarecur.progress import Note

PREFIX = "task/"
"""Prefix of the metrics."""


def load_eval_tasks(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Return the tasks that score the run, on the first process; collective.

    Raises:
        MegarecurError: on every rank, unknown tasks, missing files, or no harness.
    """
    asked = config.train.eval_tasks
    found: dict[str, Any] = {}
    with same_error(mesh):
        if asked is not None and mesh.rank == 0:
            check_harness("train.eval_tasks")
            from megarecur.inference.harness import load_tasks

            found = load_tasks(asked.tasks, asked.shots, *choose_folder(asked.tasks_from))
    return found


def score_eval_tasks(
    model: Transformer,
    tasks: dict[str, Any],
    config: Config,
    mesh: Mesh,
    schedules: Schedules,
    step: int,
    note: Note,
) -> dict[str, float]:
    """Return metrics such as `task/piqa/acc`, on the first process; collective.

    Args:
        tasks: from `load_eval_tasks`.
    """
    asked = config.train.eval_tasks
    assert asked is not None
    values: dict[str, float] = {}
    with same_error(mesh):
        tokenizer = load_tokenizer(config.data.tokenizer)
    answers = Answers(model, tokenizer, mesh, schedules)
    with same_error(mesh):
        # Ranks communicate here, but in pairs of calls that an error cannot part.
        if mesh.rank > 0:
            answers.follow()
            return values
        try:
            from megarecur.inference.harness import HarnessModel, Scorer, score_tasks

            scorer = Scorer(answers, None, (tokenizer.eos_id,), step)
            scores = score_tasks(HarnessModel(scorer=scorer, note=note), tasks, asked.limit)
            values = {f"{PREFIX}{each.task}/{each.metric}": each.value for each in scores}
        finally:
            answers.close()
    return values
