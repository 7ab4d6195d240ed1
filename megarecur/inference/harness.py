"""Runs as models of lm-evaluation-harness, and its tasks on local files.

    model = HarnessModel(run="runs/looped", depth=2)
    found = score_tasks(model, load_tasks(["arc_easy"], shots=0, folder=Path("data/eval")))

Prompts, answer choices and metrics are those of the harness' own task definitions; only the data
may be local. Importing this module registers the model as `megarecur`.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import lm_eval
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megarecur.checkpoint.load import load_model, open_tokenizer, special_ids
from megarecur.data.tokenizer import Tokenizer
from megarecur.errors import ConfigError
from megarecur.inference.answers import Answers
from megarecur.inference.likelihood import Advance, Pair, find_most_positions, refuse_scoring
from megarecur.inference.request import Request
from megarecur.inference.task_files import FORMS, find_missing, find_task_file, read_task
from megarecur.model.transformer import Transformer
from megarecur.parallel.mesh import pick_device
from megarecur.progress import Note, note_nothing

VERSION = version("lm_eval")
FEWSHOT_SEED = 1234
"""The harness' own seed of the choice of examples."""
RESAMPLES = 1000
"""Bootstrap samples behind the standard errors of perplexities."""
MOST_NEW = 256
"""Maximum number of new tokens where a task names none, as in the harness' other models."""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names under which tasks limit the number of new tokens."""


@dataclass(frozen=True)
class Scorer:
    """A model with its tokenizer, as tasks need it."""

    answers: Answers
    bos_id: int | None
    """Id in front of every text; None if there is none."""
    eos_ids: tuple[int, ...]
    step: int
    """Optimizer step of the parameters."""

    @property
    def model(self) -> Transformer:
        """The model, or this rank's part of it."""
        return self.answers.model

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return self.answers.tokenizer


def open_scorer(run: str | Path, step: int | None = None, device: str = "auto") -> Scorer:
    """Load the model of a run and its tokenizer.

    Raises:
        MegarecurError: no run, no checkpoint, or another tokenizer.
    """
    model, loaded = load_model(run, step, pick_device(device))
    tokenizer = open_tokenizer(loaded)
    bos_id, eos_ids = special_ids(loaded, tokenizer)
    answers = Answers(model, tokenizer)
    return Scorer(answers, bos_id, tuple(eos_ids), loaded.state["step"])


@register_model("megarecur")
class HarnessModel(TemplateLM):  # type: ignore[misc]  # The harness has no annotations.
    """A run as the harness' model.

    Args:
        run: folder of a run; not needed with `scorer`.
        depth: loops to run instead of the trained number.
        step: checkpoint to use; None: the newest.
        max_length: maximum number of tokens that the model reads. None: the rows of a position
            table; without one, contexts are not cut, and rolling windows have data.seq_length.
        batch_size: maximum number of samples of a batch; auto: by tokens alone.
        max_batch_size: maximum number of samples of a batch with batch_size=auto.
        batch_tokens: maximum number of tokens of a batch.
        device: auto, cpu or cuda.
        scorer: the model itself, if it is loaded already.
        note: called with the progress after each batch.

    Raises:
        ConfigError: the run predicts no text, or the depth has no parameters.
        MegarecurError: no run, no checkpoint, or another tokenizer.
    """

    def __init__(
        self,
        run: str | Path = "",
        depth: int | None = None,
        step: int | None = None,
        max_length: int | None = None,
        batch_size: int | str = 64,
        max_batch_size: int | None = None,
        batch_tokens: int = 8192,
        device: str | None = None,
        scorer: Scorer | None = None,
        note: Note = note_nothing,
    ) -> None:
        super().__init__()
        self.note = note
        self.scorer = scorer or open_scorer(run, step, device or "auto")
        self.depth, self.batch_tokens = depth, int(batch_tokens)
        automatic = not str(batch_size).isdecimal()
        self.batch_size = (max_batch_size or 1 << 16) if automatic else max(int(batch_size), 1)
        config = self.scorer.model.config
        if refusal := refuse_scoring(config, depth):
            raise ConfigError(f"{run or 'the run'}: cannot be scored on tasks: {refusal}")
        self.most_positions = max_length or find_most_positions(config)
        self.max_length = self.most_positions or config.data.seq_length

    def at_depth(self, depth: int | None) -> HarnessModel:
        """Return the same model at another number of loops; nothing is loaded again."""
        return HarnessModel(
            depth=depth, scorer=self.scorer, batch_size=self.batch_size,
            batch_tokens=self.batch_tokens, max_length=self.most_positions, note=self.note,
        )  # fmt: skip

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token."""
        return self.scorer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: the begin-of-text token if there is one, else
        the end-of-document token."""
        return self.eot_token_id if self.scorer.bos_id is None else self.scorer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's fingerprint, for caches of requests."""
        return self.scorer.tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        """Return the ids of a text, after the begin-of-text token if there is one."""
        ids = self.scorer.tokenizer.encode(string)
        begins = self.scorer.bos_id is not None and add_special_tokens is not False
        return [self.prefix_token_id, *ids] if begins else ids

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]],
        disable_tqdm: bool = False,
        **kwargs: object,
    ) -> list[tuple[float, bool]]:
        pairs = [Pair(tuple(context), tuple(rest)) for _, context, rest in requests]
        found = self.scorer.answers.score(
            pairs, self.count_texts(len(pairs)), num_loops=self.depth,
            most_positions=self.most_positions, batch_size=self.batch_size,
            batch_tokens=self.batch_tokens,
        )  # fmt: skip
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, tuple(answer))
        return [(answer.log_likelihood, answer.is_greedy) for answer in found]

    def count_texts(self, total: int) -> Advance:
        """Return a function that notes how many of `total` requests are answered."""
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.note(f"{done} of {total} texts")

        return advance

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, read in windows of `max_length` tokens."""
        windows, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            for window in get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, 1
            ):
                context, rest = make_disjoint_window(window)
                windows.append((None, context, rest))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (found, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += found
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return continuations of texts, up to a stop string, the end of the document or the
        maximum number of new tokens; greedy unless a task sets do_sample.

        Raises:
            ConfigError: the maximum number of new tokens leaves no position for the context.
        """
        asked = [make_request(self, *request.args) for request in requests]
        return self.scorer.answers.continue_texts(asked, self.count_texts(len(asked)))


def make_request(
    model: HarnessModel, context: str, options: Mapping[str, Any]
) -> tuple[Request, list[str]]:
    """Return a request of the engine, and its stop strings, from a task's generation options.

    Raises:
        ConfigError: see `HarnessModel.generate_until`.
    """
    count = next((int(options[name]) for name in LENGTHS if options.get(name)), MOST_NEW)
    tokens = model.tok_encode(context) or [model.prefix_token_id]
    limit = model.most_positions
    if limit is not None and count >= limit:
        raise ConfigError(
            f"max_gen_toks={count} of a task leaves no context in the {limit} positions of the "
            f"model; set max_gen_toks to at most {limit - 1}"
        )
    if limit is not None:
        tokens = tokens[-(limit - count) :]
    temperature = float(options.get("temperature") or 0.0)
    sampled = options.get("do_sample", temperature > 0.0)
    until = options.get("until") or []
    request = Request(
        tokens=tuple(tokens),
        max_new_tokens=count,
        temperature=(temperature or 1.0) if sampled else 0.0,
        top_k=options.get("top_k") or None,
        top_p=float(options.get("top_p") or 1.0),
        eos_ids=frozenset(model.scorer.eos_ids),
        num_loops=model.depth,
    )
    return request, [until] if isinstance(until, str) else [stop for stop in until if stop]


# ------------------------------------------------------------------------------------------ tasks


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task at a depth."""

    task: str
    depth: int | None
    """Number of loops; None: the trained number."""
    shots: int
    metric: str
    value: float
    stderr: float | None
    """Standard error; None if the harness has none."""
    samples: int
    """Number of scored documents."""
    higher_is_better: bool


def load_tasks(
    names: Sequence[str], shots: int = 0, folder: Path | None = None, required: bool = True
) -> dict[str, Any]:
    """Return the harness' tasks by name, with the documents of local files.

    Args:
        names: tasks of the harness; groups too, if they have no local file.
        shots: number of examples in front of a question. They come from NAME.train.jsonl, or else
            are other documents of the scored file.
        folder: folder of the files; None: the harness fetches its own data.
        required: whether every task needs a file; otherwise the harness fetches what is missing.

    Raises:
        ConfigError: unknown tasks, missing files, or data that cannot be fetched.
        DataError: a file that cannot be read, or without the fields of its task.
    """
    if not names:
        raise ConfigError("--tasks: names no task; name some, such as arc_easy,piqa")
    manager = open_manager(names)
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        raise ConfigError(
            "unknown tasks:"
            + "".join(
                f"\n  {name}: lm-evaluation-harness {VERSION} has no such task"
                f"{suggest(name, manager)}; correct it"
                for name in unknown
            )
        )
    if folder is not None and required:
        find_missing(folder, names)
    found: dict[str, Any] = {}
    for name in names:
        path = None if folder is None else find_task_file(folder, name)
        overrides: dict[str, Any] = {"task": name, "num_fewshot": shots}
        if path is not None and folder is not None:
            overrides |= use_documents(name, path, find_task_file(folder, f"{name}.train"))
        with quiet():
            try:
                loaded = manager.load({"group": "chosen", "task": [overrides]})
            except Exception as error:  # The harness and datasets raise almost anything.
                raise ConfigError(explain_failure(name, path, folder, error)) from None
        found |= loaded["tasks"]
    return found


def open_manager(names: Sequence[str]) -> TaskManager:
    """Return the index of the harness' tasks; only of the folders with the named ones, if these
    are known, since reading all 14,000 definitions takes long."""
    root = Path(lm_eval.__file__).parent / "tasks"
    if all(name in FORMS and (root / FORMS[name].folder).is_dir() for name in names):
        folders = sorted({str(root / FORMS[name].folder) for name in names})
        return TaskManager(include_defaults=False, include_path=folders)
    return TaskManager()


def suggest(name: str, manager: TaskManager) -> str:
    """Return a hint at tasks of a similar name; "" if there are none."""
    from difflib import get_close_matches

    close = get_close_matches(name, manager.all_tasks, n=3)
    return f" (similar: {', '.join(close)})" if close else ""


def use_documents(name: str, path: Path, train: Path | None) -> dict[str, Any]:
    """Return the changes to a task's definition by which it reads local files.

    Raises:
        DataError: see `task_files.read_task`.
    """
    splits = {"test": datasets.Dataset.from_list(read_task(name, path))}
    if train is not None:
        splits["train"] = datasets.Dataset.from_list(read_task(name, train))
    held = datasets.DatasetDict(splits)

    def hand_over(**options: object) -> datasets.DatasetDict:
        """Return the documents, whatever the definition asks of its own data set."""
        return held

    return {
        "custom_dataset": hand_over,
        "dataset_kwargs": None,
        "test_split": "test",
        "validation_split": None,
        "training_split": None if train is None else "train",
        # With the scored split the harness excludes the document it asks for.
        "fewshot_split": "test" if train is None else "train",
    }


def explain_failure(name: str, path: Path | None, folder: Path | None, error: Exception) -> str:
    """Return the message for a task that cannot be loaded."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if path is not None:
        return f"{path}: its fields do not fit the task {name} ({said}); correct them"
    where = "--tasks-from" if folder is None else f"{folder}: has no file of {name}; add it"
    return (
        f"{name}: the harness cannot fetch its data ({said}); name a folder with {name}.jsonl by "
        f"{where}, or connect to the network"
    )


def score_tasks(
    model: HarnessModel, tasks: Mapping[str, Any], limit: int | None = None
) -> list[TaskScore]:
    """Score a model on tasks.

    Args:
        tasks: from `load_tasks`.
        limit: number of documents of each task, the first ones; None: all.

    Raises:
        MegarecurError: the model cannot run the requests of a task.
    """
    for task in tasks.values():
        task.set_fewshot_seed(FEWSHOT_SEED)  # Equal examples at every depth.
    with quiet(), patch.dict(os.environ, DISABLE_MULTIPROC="1"):
        found = evaluate(
            lm=model, task_dict={"tasks": dict(tasks)}, limit=limit, bootstrap_iters=RESAMPLES,
            log_samples=False,
        )  # fmt: skip
    return [score for name in tasks for score in read_scores(name, found, model.depth)]


def read_scores(task: str, found: Mapping[str, Any], depth: int | None) -> Iterator[TaskScore]:
    """Yield the metrics of a task from the harness' results, whose keys are METRIC,FILTER."""
    values = found["results"][task]
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, float | int):
            continue
        error = values.get(f"{metric}_stderr,{filtered}")
        yield TaskScore(
            task=task,
            depth=depth,
            shots=int(found["n-shot"].get(task) or 0),
            metric=metric if filtered == "none" else f"{metric}/{filtered}",
            value=float(value),
            stderr=float(error) if isinstance(error, float | int) else None,
            samples=int(found["n-samples"][task]["effective"]),
            higher_is_better=bool(found["higher_is_better"][task].get(metric, True)),
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars, prints and logs of the harness and the libraries that it calls."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
