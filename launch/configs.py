"""Load the config of a run by all rules: on its sections, its pipeline and its processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megarecur.config.load import load_config
from megarecur.config.mesh import world_rules
from megarecur.config.rules import RULES
from megarecur.config.run import Config
from megarecur.errors import ConfigError, DataError
from megarecur.plan.cost import Seen, count_seen, count_span
from megarecur.plan.describe import resolve_vocab_size
from megarecur.plan.rules import walk_rules


def load_run_config(
    path: Path, overrides: Sequence[str] | None = None, world: int | None = None
) -> Config:
    """Read, override and validate the config of a run, for `world` processes if they are known.

    Raises:
        ConfigError: lists every error, and every conflict that a rule finds.
    """
    rules = (*RULES, *walk_rules(count_tokens), *(world_rules(world) if world else ()))
    return load_config(path, overrides or (), rules)


def with_vocab_size(config: Config) -> Config:
    """Return the config with `model.vocab_size` set, by default read from its tokenizer.

    Raises:
        ConfigError: the tokenizer does not exist yet.
    """
    return resolve_vocab_size(config, count_tokens)


def count_tokens(path: str) -> int:
    """Return the size of a tokenizer's vocabulary.

    Raises:
        ConfigError: the tokenizer does not exist yet.
    """
    from megarecur.data.tokenizer import tokenizer_vocab_size

    if path != "bytes" and not Path(path).exists():
        raise ConfigError(
            f"data.tokenizer: {path} does not exist; prepare it with `megarecur prep`, "
            "or set model.vocab_size"
        )
    return tokenizer_vocab_size(path)


MOST_TOKENS_READ = 1 << 24
"""Tokens at the start of a corpus whose documents are measured."""


def see_corpora(config: Config) -> Seen | None:
    """Return the keys that queries see, by the documents of the training corpora; None if attention
    sees whole samples, or no corpus of text is here."""
    if not config.data.mask_documents or config.task is not None:
        return None
    found = []
    for source in config.data.train:
        path = Path(source.path)
        if config.encoder is None:
            lengths = list(measure_documents(path, config))
            seen = count_seen(config, lengths) if lengths else None
        else:
            seen = see_pairs(path, config)
        if seen is not None:
            found.append((source.weight, seen))
    if not found:
        return None
    total = sum(weight for weight, _ in found)
    return Seen(*(sum(weight * seen[i] for weight, seen in found) / total for i in range(5)))


def see_pairs(path: Path, config: Config) -> Seen | None:
    """Return the keys that queries see over a corpus of pairs of sentences, padding excluded; None
    if it is not a local corpus."""
    import numpy as np

    from megarecur.data.corpus import read_manifest

    try:
        tokens = read_manifest(path).num_tokens
        starts = np.load(path / "documents.npy", mmap_mode="r")
    except (DataError, OSError, ValueError):
        return None
    if len(starts) % 2 or not len(starts):
        return None
    most = config.data.seq_length
    source, target = np.minimum(np.diff(starts, append=tokens), most).reshape(-1, 2).T
    queries = max(int(target.sum()), 1)
    keys = float((target * (target + 1) // 2).sum() / queries)
    return Seen(
        keys,
        keys,
        float((source * source).sum() / queries),
        float((source * target).sum() / queries),
        float(source.sum() / queries),
    )


def measure_documents(path: Path, config: Config) -> Iterator[int]:
    """Yield the tokens of a corpus's documents, cut where samples or chunks of a temporal memory
    end; none if it is not a local corpus of megarecur's own."""
    import numpy as np

    from megarecur.data.corpus import read_manifest

    try:
        tokens = min(read_manifest(path).num_tokens, MOST_TOKENS_READ)
        starts = np.load(path / "documents.npy", mmap_mode="r")
    except (DataError, OSError, ValueError):
        return
    starts = starts[: starts.searchsorted(tokens)]
    samples = np.arange(0, tokens, config.num_positions)
    span = count_span(config)
    chunks = (samples[:, None] + np.arange(0, config.num_positions, span)).ravel()
    edges = np.unique(np.concatenate((starts, chunks[chunks < tokens], [tokens])))
    yield from np.diff(edges).tolist()
