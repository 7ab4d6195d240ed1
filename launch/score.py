"""Scoring a trained run, for `megarecur eval`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megarecur.checkpoint.load import load_model, open_tokenizer
from megarecur.config.data import Source
from megarecur.config.mistakes import show_value
from megarecur.config.run import Config
from megarecur.data.corpus import Corpus, read_manifest
from megarecur.data.open import check_rows, open_sources
from megarecur.data.tokenizer import Tokenizer, WordTokenizer
from megarecur.data_prep.grey import WORDS
from megarecur.errors import ConfigError
from megarecur.launch.classes import Scored
from megarecur.model.resized import resize_model
from megarecur.objective.extremes import Extremes
from megarecur.objective.next_token import TextScore
from megarecur.objective.task import TaskScore
from megarecur.parallel.mesh import Mesh, pick_device
from megarecur.recurrence.depth import refuse_depth
from megarecur.train.evaluate import evaluate_corpus, short_names, stream_corpus

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
    draw: Path | None = None,
    scored: list[Scored] | None = None,
) -> Iterator[str]:
    """Yield the scores of a run as lines of text, as soon as they are known.

    Args:
        data: corpora to score; none: those of data.val.
        samples: samples to read of each corpus, with `streaming` documents; 0: all.
        depth: numbers of loops to run, such as `1,2,4`; None: those trained with.
        streaming: read documents to their end, the temporal memory carried along.
        curves: filled with the loss by position, if given.
        image_size: size to which pictures are made, in pixels; None: that of training.
        draw: where pictures will be written; checked here.
        scored: filled with the scores of a classifier, if given.

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
    refuse_options(config, samples, streaming, draw)
    tokenizer = open_tokenizer(run)
    check_rows(config, tokenizer.vocab_size, run.tokenizer)
    config = fit_longest(config, sources)
    corpora = open_sources(config, sources, tokenizer, name=run.tokenizer)
    names = short_names([source.path for source in sources])
    for loops in depths:
        at = "" if loops is None else f"  depth {loops}:"
        for source, corpus, name in zip(sources, corpora, names, strict=True):
            extremes = None if draw is None else Extremes(first_grey=find_grey(tokenizer))
            score = (
                stream_corpus(model, corpus, config, mesh, samples, loops)
                if streaming
                else evaluate_corpus(
                    model, corpus, config, mesh, samples, num_loops=loops, extremes=extremes
                )
            )
            if scored is not None and extremes is not None and isinstance(score, TaskScore):
                own = name if loops is None else f"{name}.depth_{loops}"
                mean, std = find_statistics(config, corpus)
                scored.append(Scored(own, f"{source.path}{at}", score, extremes, mean, std))
            yield from score.lines(f"{source.path}:{at}", run.state["step"])
            if curves is not None and isinstance(score, TextScore):
                curves[f"{source.path}{at.rstrip(':')}"] = score.by_position


def find_grey(tokenizer: Tokenizer) -> int | None:
    """Return the id of black if the tokens are grey values; otherwise None."""
    if isinstance(tokenizer, WordTokenizer) and set(tokenizer.ids) == set(WORDS):
        return tokenizer.ids[WORDS[0]]
    return None


def find_statistics(config: Config, corpus: Corpus) -> tuple[Sequence[float], Sequence[float]]:
    """Return the mean and the standard deviation of each channel by which pictures are normalised:
    those of the config, or those of the corpus; 0 and 1 of other samples."""
    images, held = config.data.images, corpus.manifest.task or {}
    if images is not None and images.mean is not None and images.std is not None:
        return images.mean, images.std
    return held.get("mean") or (0.0,), held.get("std") or (1.0,)


def refuse_options(config: Config, samples: int, streaming: bool, draw: Path | None) -> None:
    """Refuse options that a run cannot be scored with.

    Raises:
        ConfigError: naming the option, and what to do instead.
    """
    task = config.task
    if draw is not None and task is not None:
        if task.kind == "token":
            raise ConfigError(
                "--draw: draws the classes of whole samples; the run has task.kind=token; omit it"
            )
        if draw.suffix in (".png", ".svg") or draw.is_file():
            raise ConfigError(
                f"--draw {draw}: a run with a task writes several files; name a folder"
            )
    elif draw is not None and draw.suffix not in (".png", ".svg"):
        raise ConfigError(f"--draw {draw}: the name must end in .png or .svg")
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
