"""The harness' log-likelihoods of an export, by its Hugging Face backend.

    python tests/support/check_harness.py CASE.json ANSWERS.json

CASE.json holds a folder and [context, continuation] pairs. Needs lm-evaluation-harness,
transformers and torch; nothing of this project but the modelling file in the folder.
"""

import json
import sys
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


def main(case: Path, answers: Path) -> None:
    """Score the pairs, and whole texts in rolling windows."""
    asked = json.loads(case.read_text(encoding="utf-8"))
    model = HFLM(
        pretrained=asked["folder"], trust_remote_code=True, device="cpu", dtype="float32",
        batch_size=4,
    )  # fmt: skip
    pairs = [Instance("loglikelihood", {}, tuple(p), i) for i, p in enumerate(asked["pairs"])]
    texts = [Instance("loglikelihood_rolling", {}, (t,), i) for i, t in enumerate(asked["texts"])]
    found = {
        "pairs": model.loglikelihood(pairs, disable_tqdm=True),
        "texts": model.loglikelihood_rolling(texts, disable_tqdm=True),
    }
    answers.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
