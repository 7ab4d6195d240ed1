"""Exports of everything that shipped configs train, with the newest transformers 4 and 5.

`make transformers` makes the environments. An export is made here, with what the run computes
itself; `check_exports.py` compares it there. Shapes: S positions, V vocabulary.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.exports import CASES, our_logits, save_run, write_run
from support.once import make_once
from support.pair_exports import PAIRS, describe_pair_case, write_pair_run

from megarecur.batch import END, START
from megarecur.checkpoint.load import load_model
from megarecur.config.load import load_config, validate
from megarecur.config.recurrence import Looped
from megarecur.config.run import Config
from megarecur.convert import compact
from megarecur.convert.hf import export_hf
from megarecur.data.loader import MicroBatch
from megarecur.data.tokenizer import load_tokenizer
from megarecur.errors import ConfigError
from megarecur.inference.generate import generate
from megarecur.recurrence.schemes import layer_map

ROOT = Path(__file__).parents[2]
SHIPPED = [
    path
    for path in sorted((ROOT / "configs").glob("*.yaml"))
    + sorted((ROOT / "configs/papers").rglob("*.yaml"))
    if "kind: image" not in path.read_text(encoding="utf-8")
]
"""All configs but those of pictures, which have no export."""
ONE_STACK = [path for path in SHIPPED if "\nencoder:" not in path.read_text(encoding="utf-8")]
"""Configs without an encoder; those of encoder-decoders differ in sizes that PAIRS have too."""
TEXTS = ["def main(arguments):", "import os"]
THOROUGH = ("reuse_map", "loop, huginn", "cycle_reverse, alibi", "embedding again")
THOROUGH_PAIR = "ring below loop, pre"


def shrink(path: Path, run_dir: Path) -> Config:
    """A shipped config with all that it says of the computation, and small shapes."""
    values = load_config(path).model_dump(mode="json")
    model = values["model"]
    groups = model["num_heads"] // model["num_kv_heads"]
    heads = 4 if groups <= 4 else groups
    model |= {"hidden_size": 8 * heads, "num_heads": heads, "num_kv_heads": heads // groups}
    model |= {"head_dim": 8, "ffn_hidden_size": 48, "vocab_size": 257, "init_std": 0.2}
    model |= {"gate_hidden_size": 24 if model["gate"] else None}
    if values["temporal"] is not None:
        values["temporal"] |= {"chunk_length": 5, "num_slots": 3, "update_ffn_hidden_size": 16}
    if "level_rank" in values["recurrence"]:
        values["recurrence"] |= {"level_rank": 8, "feed_forward_rank": 4}
    values["data"] |= {"tokenizer": "bytes", "seq_length": 32}
    values["train"] |= {"precision": "fp32"}
    values |= {"run_dir": str(run_dir), "init_from": None, "distill": None}
    return validate(values, str(path))


def distinct(folder: Path) -> dict[str, Config]:
    """Shrunken shipped configs that differ in more than numbers of layers, loops and classes, and
    the weight of a loss, by name."""
    found: dict[str, Config] = {}
    for path in ONE_STACK:
        config = shrink(path, folder)
        recurrence = config.recurrence.model_dump(mode="json")
        for number in ("reuse_map", "num_blocks", "depth", "num_layers"):
            recurrence.pop(number, None)
        ignored = {*compact.TRAINING, "norm_eps", "hidden_size", "num_heads", "num_kv_heads"}
        model = config.model.model_dump(mode="json", exclude=ignored)
        task = config.task and config.task.model_dump(mode="json", exclude={"truncate"})
        if task:
            del task["num_classes"]
        if halting := recurrence.get("halting"):
            del halting["coefficient"]
        parts = (config.adapters, config.temporal)
        same = [recurrence, model, task, *(p and p.model_dump(mode="json") for p in parts)]
        found.setdefault(json.dumps(same), config.model_copy(update={"run_dir": path.stem}))
    return {config.run_dir: config for config in found.values()}


def describe_case(run_dir: Path, out: Path) -> dict[str, Any]:
    """A case of `check_exports.py`: what the run computes itself."""
    model, run = load_model(run_dir)
    seed, tokenizer = run.config.seed, load_tokenizer("bytes")
    ids = [tokenizer.encode(text) for text in TEXTS]
    logits = {f"logits.{i}": our_logits(run_dir, torch.tensor([row]), seed)[0] for i, row in
              enumerate(ids)}  # fmt: skip
    expected = out.with_name(out.name + ".safetensors")
    save_file(logits, expected)

    def continued(prompt: list[int], loops: int | None = None) -> list[int]:
        return list(generate(model, prompt, max_new_tokens=8, temperature=0.0, seed=seed,
                             num_loops=loops))  # fmt: skip

    case = {"folder": str(out), "expected": str(expected), "texts": TEXTS, "ids": ids}
    case["greedy"] = [continued(row) for row in ids]
    case["linear"] = "all-linear"
    if isinstance(run.config.recurrence, Looped) and not run.config.of_loops:
        case["loops"] = {str(n): continued(ids[1], n) for n in (1, 5)}
    return case


def make_cases(folder: Path) -> list[dict[str, Any]]:
    """Exports of all shipped configs, in every form that they have, and of further options.

    The library's tools are tried once with every class of models, kind of recurrence and task:
    beyond that, what they call is what the comparisons of each export call.
    """
    cases, tried = [], set()
    for name, config in distinct(folder).items():
        run_dir, forms = folder / name, 0
        save_run(config, run_dir)
        for unrolled in (False, True):
            out = folder / f"{name}.{'unrolled' if unrolled else 'compact'}"
            try:
                export_hf(run_dir, out, unrolled=unrolled)
            except ConfigError as error:
                assert unrolled, error  # Some form is always there.
                continue
            describe = describe_task_case if config.classifies else describe_case
            case, forms = describe(run_dir, out), forms + 1
            kind = json.loads((out / "config.json").read_text())["model_type"]
            key = kind, config.recurrence.kind, case.get("task")
            cases.append(case | {"tools": key not in tried})
            tried.add(key)
        assert forms, f"{name} has no export"
    for name in THOROUGH:
        recurrence, adapters, shape = CASES[name]
        run_dir = folder / f"options, {name}"
        write_run(run_dir, recurrence, adapters=adapters, **shape | {"vocab_size": 257})
        out = export_hf(run_dir, folder / f"options, {name}.compact", unrolled=False)
        # Of the blocks' code, which all share, a compiled loop shows most.
        thorough = {"thorough": True, "tools": True, "compiles": name == "loop, huginn"}
        cases.append(describe_case(run_dir, out) | thorough)
    for name in PAIRS:
        run_dir = folder / f"pairs, {name}"
        write_pair_run(run_dir, *PAIRS[name])
        out = export_hf(run_dir, folder / f"pairs, {name}.compact")
        tools = {"tools": name == THOROUGH_PAIR, "linear": "all-linear"}
        cases.append(describe_pair_case(run_dir, out) | tools)
    return cases


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CASES.json."""

    def make(folder: Path) -> None:
        (folder / "cases.json").write_text(json.dumps(make_cases(folder)))

    return make_once(tmp_path_factory, "exports", make) / "cases.json"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", ["4", "5"])
def test_exports_with_the_newest_transformers(cases: Path, version: str) -> None:
    """Everything in `check_exports.py`, of every export."""
    python = ROOT / f".venv/transformers{version}/bin/python"
    if not python.exists():
        pytest.skip(f"{python} is missing; `make transformers` makes it")
    answers = cases.with_name(f"answers{version}.json")
    done = subprocess.run(
        [python, "-I", ROOT / "tests/support/check_exports.py", cases, answers],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        | {"HF_HOME": str(cases.with_name(f"home{version}")), "HF_HUB_OFFLINE": "1"}
        | {"TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    answer = json.loads(answers.read_text())
    assert answer["version"].split(".")[0] == version
    failures = answer["failures"]
    assert not failures, "\n\n".join(f"{Path(k).name}:\n{v}" for k, v in failures.items())
    for case in json.loads(cases.read_text()):
        if "task" in case or "pairs" in case:
            continue
        found = answer["found"][case["folder"]]
        run_dir = Path(case["folder"]).with_suffix("")
        prompt, ids = case["ids"][1], found["beam"]
        assert ids[: len(prompt)] == prompt
        seed = load_config(run_dir / "config.yaml").seed
        scores = our_logits(run_dir, torch.tensor([ids[:-1]]), seed)[0].log_softmax(-1)
        new = torch.tensor(ids[len(prompt) :])
        score = scores[len(prompt) - 1 :].gather(-1, new[:, None]).sum()
        assert abs(float(score) - found["score"]) < 1e-4


def describe_task_case(run_dir: Path, out: Path) -> dict[str, Any]:
    """A case of a classifier: two sequences, or two pairs of them, of bytes."""
    model, run = load_model(run_dir)
    task = run.config.task
    assert task is not None
    ids = [[*range(n, n + 7 + 5 * (n % 3))] for n in (3, 40, 75, 110)]
    if task.kind != "pair":
        ids = ids[:2]
    ends = (START, END) if task.augment else ()
    rows = [[*ends[:1], *row, *ends[1:]] for row in ids]
    length = max(map(len, rows))
    tokens_BS = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    real_BS = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    batch = MicroBatch(
        tokens_BS=tokens_BS,
        labels_BS=torch.zeros(1, dtype=torch.long),
        positions_BS=torch.arange(length).repeat(len(rows), 1),
        documents_BS=real_BS.int() - 1,
        sample_ids_B=torch.arange(len(rows)),
        sources_B=torch.zeros(len(rows), dtype=torch.long),
        single_document=False,
    )
    with torch.no_grad():
        ctx = model.context(batch, 0, False)
        x = model.embed(tokens_BS, ctx)
        x, _ = model.run(layer_map(run.config.recurrence), x, ctx, {})
        logits = model.readout.class_logits(x, batch)
    if task.kind == "token":
        logits = logits[real_BS.flatten().bool()]
    assert logits.std() > 1e-3
    expected = out.with_name(out.name + ".safetensors")
    save_file({"logits": logits}, expected)
    return {"folder": str(out), "expected": str(expected), "task": task.kind, "ids": ids}


def test_every_shipped_config_has_an_export(tmp_path: Path) -> None:
    """At its own size: the compact form takes anything that a shipped config trains."""
    for path in SHIPPED:
        config = load_config(path)
        model = config.model.model_copy(update={"vocab_size": config.model.vocab_size or 259})
        values = compact.config_values(config.model_copy(update={"model": model}))
        assert values["num_hidden_layers"] == len(layer_map(config.recurrence)), path
