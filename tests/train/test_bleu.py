"""BLEU of validation pairs during training: on every mesh that decodes, and where it is logged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.meshes import mesh_of
from support.pairs import pair_config

from megarecur.config.run import Config
from megarecur.data.tokenizer import ByteTokenizer
from megarecur.inference.bleu import score_texts
from megarecur.plan.schedule import Schedules
from megarecur.train.bleu import Pairs, score_bleu, translate_pairs
from megarecur.train.step import build_model

CYCLE = {"kind": "cycle", "num_blocks": 2, "depth": 4}
TOKENIZER = ByteTokenizer()
NAMES = ["a/val", "b/val"]


class FewPairs:
    """Pairs of texts, as a corpus has them."""

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        self.pairs, self.num_pairs = pairs, len(pairs)

    def pair(self, number: int, most: int) -> tuple[Any, Any]:
        source, target = (
            np.array([*TOKENIZER.encode(text)[: most - 1], TOKENIZER.eos_id])
            for text in self.pairs[number]
        )
        return source, target


TEXTS = [("Ein Hund.", "A dog."), ("", "Nothing"), ("Zwei Katzen", "Two cats"), ("Ball", "A ball")]
CORPORA = [FewPairs(TEXTS), FewPairs(TEXTS[:1])]


def bleu_config(**parallel: Any) -> Config:
    model = {"vocab_size": 257, "init_std": 0.3, "positions": "learned", "max_positions": 16}
    return pair_config(CYCLE, CYCLE, model=model, train={"eval_bleu": 3}, parallel=parallel)


def translate_on(config: Config) -> tuple[Any, dict[str, float]]:
    """The translations of the first corpus, and the metrics of both."""
    mesh = mesh_of(config)
    model = build_model(config, mesh, Schedules(config))
    found = translate_pairs(model, CORPORA[0], config, mesh, TOKENIZER)
    return found, score_bleu(model, CORPORA, NAMES, config, mesh)


def test_metrics_are_scores_of_the_first_pairs() -> None:
    assert isinstance(CORPORA[0], Pairs)
    (texts, references), values = translate_on(bleu_config())
    assert references == ["A dog.", "Nothing", "Two cats"] and len(texts) == 3
    assert set(values) == {"bleu", "a/val/bleu", "b/val/bleu"}
    assert values["a/val/bleu"] == score_texts(texts, references)["bleu"]


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2, "sequence_parallel": True}])
def test_ranks_find_what_one_process_finds(world: Any, parallel: dict[str, Any]) -> None:
    alone = translate_on(bleu_config())
    for found in world(2).run(translate_on, bleu_config(**parallel)):
        assert found == alone
