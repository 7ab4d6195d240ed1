"""Scoring a trained run, for `megarecur eval`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megarecur.checkpoint.load import load_model, open_tokenizer
from megarecur.config.data import Source
from megarecur.config.mistakes import show_value
from megarecur.config.run import Config
from megarecur.data.corpus import read_manifest
from megarecur.data.open import check_rows, open_sources
from megarecur.errors import ConfigError
from megarecur.model.resized import resize_model
from megarecur.objective.next_token import TextScore
from megarecur.parallel.mesh import Mesh, pick_device
from megarecur.recurrence.depth import refuse_depth
from megarecur.train.evaluate import evaluate_corpus, stream_corpus

Curves = dict[str, tuple[float, ...]]
"""Loss by position of the token, by title."""


def score_run(
    run_dir: Path,
    step: int | None,
    data: Sequence[str],
    samples: int = 0,
    depth: str | None = None,
    streaming: bool = False,
    curves: Curves | None = None,
    device: str = "auto",
    image_size: int | None = None,
) -> Iterator[str]:
    """Yield the scores of a run as lines of text, as soon as they are known.

    Args:
        data: corpora to score; none: those of data.val.
        samples: samples to read of each corpus, with `streaming` documents; 0: all.
        depth: numbers of loops to run, such as `1,2,4`; None: those trained with.
        streaming: read documents to their end, the temporal memory carried along.
        curves: filled with the loss by position, if given.
        image_size: size to which pictures are made, in pixels; None: that of training.

    Raises:
        MegarecurError: no run, no corpora, or what they cannot be scored with.
    """
    mesh = Mesh(device=pick_device(device))
    model, run = load_model(run_dir, step, mesh.device)
    if image_size is not None:
        model = resize_model(model, image_size, mesh.device)
    config = run.config if image_size is None else model.config
    depths = parse_depths(depth, config)
    sources = [Source(path=path) for path in data] or list(config.data.val)
    if not sources:
        raise ConfigError(f"{run_dir}: its config has no data.val; name a corpus with --data")
    refuse_options(config, samples, streaming, curves is not None)
    tokenizer = open_tokenizer(run)
    check_rows(config, tokenizer.vocab_size, run.tokenizer)
    config = fit_longest(config, sources)
    corpora = open_sources(config, sources, tokenizer, name=run.tokenizer)
    for loops in depths:
        at = "" if loops is None else f"  depth {loops}:"
        for source, corpus in zip(sources, corpora, strict=True):
            score = (
                stream_corpus(model, corpus, config, mesh, samples, loops)
                if streaming
                else evaluate_corpus(model, corpus, config, mesh, samples, num_loops=loops)
            )
            yield from score.lines(f"{source.path}:{at}", run.state["step"])
            if curves is not None and isinstance(score, TextScore):
                curves[f"{source.path}{at.rstrip(':')}"] = score.by_position


def refuse_options(config: Config, samples: int, streaming: bool, draws: bool) -> None:
    """Refuse options that a run cannot be scored with.

    Raises:
        ConfigError: naming the option, and what to do instead.
    """
    if config.task is not None and draws:
        raise ConfigError("--draw: draws the loss by position of text; the run has a task")
    if config.task is not None and streaming:
        raise ConfigError("--streaming: reads text to its end; the run has a task")
    if streaming and samples and not config.data.mask_documents:
        raise ConfigError(
            f"--samples {samples} with --streaming: the run was trained with "
            "data.mask_documents=false, so all text is one document; omit --samples"
        )


def fit_longest(config: Config, sources: Sequence[Source]) -> Config:
    """Return the config with a seq_length that reads the longest samples of a task or pairs of
    sentences, where it can.

    Longer samples than those of training are what many tests are for.
    """
    task, table = config.task, config.model.positions == "learned" and not config.temporal
    cuts = config.data.truncate if task is None else task.truncate
    if (task is None and config.encoder is None) or cuts or table or config.reads_images:
        return config
    held = [read_manifest(source.path).task or {} for source in sources]
    keys = ("longest", "longest_source", "longest_target")
    longest = max((own.get(key, 0) for own in held for key in keys), default=0)
    length = max(config.data.seq_length, longest)
    data = config.data.model_copy(update={"seq_length": length})
    return config.model_copy(update={"data": data})


def parse_depths(text: str | None, config: Config) -> list[int | None]:
    """Return numbers of loops from `1,2,4`; [None], the config's own, by default.

    Raises:
        ConfigError: the text has no numbers, or depths that the scheme cannot run.
    """
    if text is None:
        return [None]
    parts = [part.strip() for part in text.split(",")]
    numbers = [part for part in parts if part.isascii() and part.isdigit() and len(part) < 10]
    wrong = [
        f"depth {show_value(part)}: is not a number of loops; write numbers such as 1,2,4"
        for part in parts
        if part not in numbers
    ]
    depths = [int(part) for part in numbers]
    wrong += [refusal for n in depths if (refusal := refuse_depth(config, n))]
    if wrong:
        raise ConfigError(f"--depth {text}:" + "".join(f"\n  {line}" for line in wrong))
    return [*depths]
