"""Load the config of a run by all rules: on its sections, its pipeline and its processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megarecur.config.load import load_config
from megarecur.config.mesh import world_rules
from megarecur.config.rules import RULES
from megarecur.config.run import Config
from megarecur.errors import ConfigError
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
