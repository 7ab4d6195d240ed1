"""BLEU and chrF of translations by sacrebleu (Post 2018), whose figures can be compared.

scores = score_texts(["the cat"], ["the cat sat"])
scores["bleu"], scores["bleu_signature"]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megarecur.errors import DataError


def score_texts(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """Return `bleu` and `chrf` of detokenised texts, in 0 to 100, and their signatures.

    The texts are tokenised by sacrebleu (13a), as its own command does.

    Raises:
        DataError: there are other numbers of hypotheses and references, or none.
    """
    if len(hypotheses) != len(references) or not hypotheses:
        raise DataError(
            f"{len(references)} references for {len(hypotheses)} translations: there must be one "
            "line for each; correct the file of references"
        )
    from sacrebleu.metrics import BLEU, CHRF

    scores: dict[str, Any] = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        scores[name] = float(metric.corpus_score(list(hypotheses), [list(references)]).score)
        scores[f"{name}_signature"] = str(metric.get_signature())
    return scores
