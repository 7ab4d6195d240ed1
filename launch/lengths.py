"""Perplexity of a run at other lengths of the samples: `megarecur eval RUN --lengths 512,1024`.

The table is that of intra-layer recurrence's comparison of position encodings.

    RUN/plots/lengths.png      perplexity by length
    RUN/plots/positions.png    loss by position at each length
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from megarecur.checkpoint.load import load_model, open_tokenizer
from megarecur.config.data import Source
from megarecur.config.run import Config
from megarecur.data.open import check_rows, open_sources
from megarecur.errors import ConfigError
from megarecur.inference.likelihood import find_most_positions, refuse_scoring
from megarecur.launch.score import parse_depths
from megarecur.objective.next_token import TextScore
from megarecur.parallel.mesh import Mesh, pick_device
from megarecur.plot.layer_map import save
from megarecur.plot.run import draw_positions
from megarecur.plot.scores import draw_lengths
from megarecur.train.evaluate import evaluate_corpus, short_names

MOST = 1 << 20
"""Maximum length of a sample."""


class AtLength(NamedTuple):
    """The score of a corpus at a length of the samples."""

    corpus: str
    depth: int | None
    length: int
    score: TextScore

    @property
    def title(self) -> str:
        """The corpus, and the depth if one was given."""
        return self.corpus if self.depth is None else f"{self.corpus}, {self.depth} loops"


def score_lengths(
    run_dir: Path,
    lengths: str,
    *,
    step: int | None = None,
    data: Sequence[str] = (),
    samples: int = 0,
    depth: str | None = None,
    device: str = "auto",
    note: Callable[[str], object] = lambda detail: None,
) -> list[AtLength]:
    """Return the scores of a run's validation corpora cut into samples of other lengths.

    Args:
        lengths: tokens of a sample, such as `512,1024`.
        data: corpora to score; none: those of data.val.
        samples: number of samples of the longest length; shorter ones read the same tokens. 0: all.
        depth: numbers of loops, such as `1,2,4`; None: those trained with.

    Raises:
        MegarecurError: lengths that are no numbers or exceed the positions, a run that predicts no
            text, no corpora, or what `eval` rejects too.
    """
    mesh = Mesh(device=pick_device(device))
    model, run = load_model(run_dir, step, mesh.device)
    config = run.config
    if refusal := refuse_scoring(config, None):
        raise ConfigError(f"{run_dir}: has no perplexity by length: {refusal}")
    numbers, depths = parse_lengths(lengths, config), parse_depths(depth, config)
    sources = [Source(path=path) for path in data] or list(config.data.val)
    if not sources:
        raise ConfigError(f"{run_dir}: its config has no data.val; name a corpus with --data")
    tokenizer = open_tokenizer(run)
    check_rows(config, tokenizer.vocab_size, run.tokenizer)
    corpora = open_sources(config, sources, tokenizer, name=run.tokenizer)
    names, tokens = short_names([source.path for source in sources]), samples * max(numbers)
    found = []
    for loops in depths:
        for name, corpus in zip(names, corpora, strict=True):
            for length in numbers:
                own = with_length(config, length)
                count = -(-tokens // length)
                score = evaluate_corpus(model, corpus, own, mesh, count, num_loops=loops)
                assert isinstance(score, TextScore)
                found.append(AtLength(name, loops, length, score))
                note(f"{found[-1].title}: {length} tokens")
    return found


def with_length(config: Config, length: int) -> Config:
    """Return the config with samples of another length, and about as many tokens of a batch."""
    tokens = config.train.micro_batch_size * config.data.seq_length
    data = config.data.model_copy(update={"seq_length": length})
    train = config.train.model_copy(update={"micro_batch_size": max(tokens // length, 1)})
    return config.model_copy(update={"data": data, "train": train})


def parse_lengths(text: str, config: Config) -> list[int]:
    """Return lengths from `512,1024`, in order.

    Raises:
        ConfigError: the text has no numbers, or lengths that exceed the positions of the model.
    """
    most, problems, found = find_most_positions(config), [], set()
    if config.model.positions != "learned":
        most = None
    for part in (part.strip() for part in text.split(",")):
        length = int(part) if part.isascii() and part.isdecimal() and len(part) < 10 else 0
        if not 2 <= length <= MOST:
            problems.append(f"{part or 'nothing'}: must be a number of tokens from 2 to {MOST}")
        elif most is not None and length > most:
            problems.append(
                f"{length}: the model has {most} learned positions; set it to at most {most}"
            )
        found.add(length)
    if problems:
        raise ConfigError(f"--lengths {text}:" + "".join(f"\n  {line}" for line in problems))
    return sorted(found)


def draw_tables(found: Sequence[AtLength]) -> tuple[Table, Table]:
    """Return tables of perplexity by length, and of loss by position in the document."""
    lengths = sorted({each.length for each in found})
    by_length = Table("perplexity", box=None, pad_edge=False)
    by_position = Table("loss at positions", box=None, pad_edge=False)
    cells = {(each.title, each.length): each.score for each in found}
    titles = list(dict.fromkeys(each.title for each in found))
    for length in lengths:
        by_length.add_column(f"{length} tokens", justify="right")
    for title in titles:
        row = [f"{cells[title, length].perplexity:.3f}" for length in lengths]
        by_length.add_row(title, *row)
        for length in lengths:
            by_position.add_column(f"{title}, {length}" if len(titles) > 1 else f"{length} tokens",
                                   justify="right")  # fmt: skip
    columns = [cells[title, length].by_position for title in titles for length in lengths]
    for bucket in range(max(map(len, columns))):
        values = [column[bucket] if bucket < len(column) else math.nan for column in columns]
        if any(map(math.isfinite, values)):
            shown = [f"{value:.4f}" if math.isfinite(value) else "" for value in values]
            by_position.add_row(name_bucket(bucket), *shown)
    return by_length, by_position


def name_bucket(bucket: int) -> str:
    """Return the positions that a value of `TextScore.by_position` covers, such as 4-7."""
    first, last = (1 << bucket) >> 1, (1 << bucket) - 1
    return str(first) if first == last else f"{first}-{last}"


def draw_pictures(run_dir: Path, found: Sequence[AtLength]) -> list[Path]:
    """Draw RUN/plots/lengths.png and RUN/plots/positions.png."""
    perplexities: dict[str, dict[int, float]] = {}
    for each in found:
        perplexities.setdefault(each.title, {})[each.length] = each.score.perplexity
    curves = {f"{each.title}, {each.length} tokens": each.score.by_position for each in found}
    paths = [run_dir / "plots" / f"{name}.png" for name in ("lengths", "positions")]
    save(draw_lengths(perplexities), paths[0])
    save(draw_positions(curves), paths[1])
    return paths
