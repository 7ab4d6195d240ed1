"""Log-likelihoods through the harness: of a run, and of its compact export by the harness' own
Hugging Face backend, on documents of every task on hand."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from support.exports import write_run

from megarecur.convert.hf import export_hf
from megarecur.inference.task_files import FORMS

ROOT = Path(__file__).parents[2]
LOOP = {"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": 3, "injection": "linear"}
TASKS = sorted(set(FORMS) - {"openbookqa"})
DOCUMENTS = 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", ["4", "5"])
def test_a_run_scores_as_its_export(version: str, tmp_path: Path, data_dir: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    python = ROOT / f".venv/transformers{version}/bin/python"
    if not python.exists():
        pytest.skip(f"{python} is missing; `make transformers` makes it")
    from lm_eval.api.instance import Instance

    from megarecur.inference.harness import HarnessModel, load_tasks

    run, export = tmp_path / "run", tmp_path / "export"
    write_run(run, LOOP, vocab_size=257)
    export_hf(run, export, unrolled=False)
    pairs = []
    for task in load_tasks(TASKS, folder=data_dir / "eval").values():
        task.build_all_requests(limit=DOCUMENTS)
        pairs += [list(instance.args) for instance in task.instances]
    assert len(pairs) >= DOCUMENTS * (4 + 4 + 2 + 2 + 2 + 1)
    pairs.append(["", "a text without context"])
    texts = [pair[0] for pair in pairs[::9]]
    case, answers = tmp_path / "case.json", tmp_path / "answers.json"
    case.write_text(json.dumps({"folder": str(export), "pairs": pairs, "texts": texts}))
    done = subprocess.run(
        [python, "-I", ROOT / "tests/support/check_harness.py", case, answers],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        | {"TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    wanted = json.loads(answers.read_text())
    model = HarnessModel(run=run, max_length=32768)  # As the export states it.
    asked = [Instance("loglikelihood", {}, tuple(pair), i) for i, pair in enumerate(pairs)]
    found = model.loglikelihood(asked, disable_tqdm=True)
    for (value, greedy), (their_value, their_greedy), pair in zip(
        found, wanted["pairs"], pairs, strict=True
    ):
        assert abs(value - their_value) < 1e-4, pair
        assert greedy == their_greedy, pair
    asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    for value, theirs, text in zip(
        model.loglikelihood_rolling(asked), wanted["texts"], texts, strict=True
    ):
        assert abs(value - theirs) < 1e-4 * max(1.0, len(text) / 100), text
