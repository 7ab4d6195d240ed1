"""Runs as models of lm-evaluation-harness, on its own tasks with local documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.exports import write_run
from support.once import make_once

from megarecur.checkpoint.load import load_model
from megarecur.data.tokenizer import load_tokenizer
from megarecur.errors import ConfigError, DataError
from megarecur.inference.answers import Answers
from megarecur.inference.generate import generate
from megarecur.inference.likelihood import Pair, score_continuations

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from megarecur.inference.harness import HarnessModel, Scorer, load_tasks, score_tasks

LOOP = {"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": 3}
TOKENIZER = load_tokenizer("bytes")
SENTENCES = ("The small dog ran home.", "Rain fell.", "He put the red cup on a table.", "Why not?")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A looped run with random parameters."""
    return make_once(
        tmp_path_factory,
        "looped",
        lambda to: write_run(to / "run", LOOP, vocab_size=260, positions="learned",
                             max_positions=96),
    ) / "run"  # fmt: skip


@pytest.fixture(scope="module")
def model(run: Path) -> HarnessModel:
    return HarnessModel(run=run)


def ask(kind: str, *arguments: tuple[object, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def encode(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text))


def test_the_registry_knows_the_model(run: Path) -> None:
    found = get_model("megarecur").create_from_arg_string(
        f"run={run},depth=2", {"batch_size": 1, "max_batch_size": None, "device": "cpu"}
    )
    assert isinstance(found, HarnessModel) and found.depth == 2 and found.batch_size == 1


def test_log_likelihoods_are_those_of_the_model(model: HarnessModel) -> None:
    pairs = [
        ("Question: why?\nAnswer:", " because"),
        ("Trailing  ", "space"),
        ("", "no context"),
        ("x" * 200, " long context"),
    ]
    wanted = score_continuations(
        model.scorer.model,
        [
            Pair(encode("Question: why?\nAnswer:"), encode(" because")),
            # The harness moves spaces into the continuation.
            Pair(encode("Trailing"), encode("  space")),
            Pair((TOKENIZER.eos_id,), encode("no context")),
            Pair(encode("x" * (97 - 13)), encode(" long context")),
        ],
    )
    found = model.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([each[0] for each in wanted], abs=1e-5)
    assert [greedy for _, greedy in found] == [each[1] for each in wanted]


def test_rolling_windows_predict_every_token_once(model: HarnessModel) -> None:
    text = " ".join(SENTENCES) * 3
    ids = (TOKENIZER.eos_id, *encode(text))
    windows, first = [], 1
    while first < len(ids):
        last = min(first + 96, len(ids))
        windows.append(Pair(ids[max(last - 97, 0) : first], ids[first:last]))
        first = last
    wanted = score_continuations(model.scorer.model, windows)
    found = model.loglikelihood_rolling(
        ask("loglikelihood_rolling", (text,), ("",), (SENTENCES[0],)), disable_tqdm=True
    )
    assert len(windows) > 2
    assert found[0] == pytest.approx(sum(each[0] for each in wanted), abs=1e-4)
    assert found[1] == 0.0 and found[2] < 0.0


def test_texts_are_generated_up_to_a_stop_string(model: HarnessModel) -> None:
    prompts, depth2 = SENTENCES[1:3], model.at_depth(2)

    def alone(prompt: str, count: int, loops: int | None = None) -> str:
        ids = list(generate(
            model.scorer.model, encode(prompt), max_new_tokens=count, temperature=0.0,
            eos_ids=[TOKENIZER.eos_id], missing_ids=TOKENIZER.missing_ids(260), num_loops=loops,
        ))  # fmt: skip
        return TOKENIZER.decode(ids)

    wanted = [alone(prompt, 6) for prompt in prompts]
    stop = next(c for c in wanted[0] if c.isascii() and wanted[0].index(c) > 0)
    requests = [(prompt, {"until": [], "max_gen_toks": 6}) for prompt in prompts]
    requests.append((prompts[0], {"until": [stop], "max_gen_toks": 6, "do_sample": False}))
    requests.append((prompts[1], {"until": "\n\n", "max_new_tokens": 3}))
    found = model.generate_until(ask("generate_until", *requests))
    assert found == [*wanted, wanted[0].split(stop)[0], alone(prompts[1], 3)]
    assert depth2.generate_until(ask("generate_until", requests[0])) == [alone(prompts[0], 6, 2)]
    # A prompt longer than the positions loses its beginning.
    long = model.generate_until(ask("generate_until", ("y" * 300, {"max_gen_toks": 6})))
    assert long == [alone("y" * 90, 6)]
    with pytest.raises(ConfigError, match="max_gen_toks=96 of a task leaves no context"):
        model.generate_until(ask("generate_until", ("a", {"max_gen_toks": 96})))


def write_tasks(folder: Path) -> Path:
    """Documents of two tasks, whose right answers follow from their numbers."""
    arc = [
        {"query": f"Question: {text}", "choices": ["yes", "no", "it is"], "gold": number % 3}
        for number, text in enumerate(SENTENCES)
    ]
    lambada = [dict(zip(("context", "continuation"), text.rsplit(" ", 1), strict=True))
               for text in SENTENCES]  # fmt: skip
    for name, rows in {"arc_easy": arc, "lambada_openai": lambada}.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_tasks_are_scored_as_their_definitions_say(model: HarnessModel, tmp_path: Path) -> None:
    tasks = load_tasks(["arc_easy", "lambada_openai"], folder=write_tasks(tmp_path))
    for depth in (None, 1):
        own = model.at_depth(depth)
        assert own.scorer.model is model.scorer.model
        found = {(s.task, s.metric): s for s in score_tasks(own, tasks)}
        prompts = [f"Question: {text}\nAnswer:" for text in SENTENCES]
        answers = [" yes", " no", " it is"]
        values = [
            [each[0] for each in score_continuations(
                model.scorer.model, [Pair(encode(prompt), encode(a)) for a in answers],
                num_loops=depth,
            )]
            for prompt in prompts
        ]  # fmt: skip
        right = [v.index(max(v)) == number % 3 for number, v in enumerate(values)]
        acc = found["arc_easy", "acc"]
        assert acc.value == sum(right) / 4 and acc.samples == 4 and acc.depth == depth
        normed = [[v / (len(a) - 1) for v, a in zip(row, answers, strict=True)] for row in values]
        right = [v.index(max(v)) == number % 3 for number, v in enumerate(normed)]
        assert found["arc_easy", "acc_norm"].value == sum(right) / 4
        assert found["lambada_openai", "perplexity"].value > 1.0
        assert found["lambada_openai", "perplexity"].stderr is not None
        assert not found["lambada_openai", "perplexity"].higher_is_better


def test_examples_come_from_other_documents_or_a_file_of_their_own(
    model: HarnessModel, tmp_path: Path
) -> None:
    folder = write_tasks(tmp_path)

    def prompts() -> list[str]:
        tasks = load_tasks(["arc_easy"], shots=2, folder=folder)
        (score, *_) = score_tasks(model, tasks, limit=3)
        assert score.shots == 2 and score.samples == 3
        return [instance.args[0] for instance in tasks["arc_easy"].instances[::3]]

    for prompt, text in zip(prompts(), SENTENCES, strict=False):
        assert prompt.count("Question: ") == 3 and prompt.count(text) == 1
        assert prompt.endswith(f"{text}\nAnswer:")
    rows = [{"query": f"Question: {name}?", "choices": ["a", "b"], "gold": 0} for name in "klm"]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "arc_easy.train.jsonl").write_text(text, encoding="utf-8")
    for prompt in prompts():
        assert sum(f"Question: {name}?\nAnswer: a" in prompt for name in "klm") == 2


def test_wrong_tasks_are_reported_together(model: HarnessModel, tmp_path: Path) -> None:
    folder = write_tasks(tmp_path)
    (folder / "piqa.jsonl").write_text('{"goal": "a"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"piqa.jsonl:1: a document of piqa has no sol1"):
        load_tasks(["piqa"], folder=folder)
    with pytest.raises(ConfigError, match=r"missing files of tasks:\n.*boolq.jsonl"):
        load_tasks(["arc_easy", "boolq"], folder=folder)
    with pytest.raises(ConfigError, match="names no task"):
        load_tasks([])


def test_runs_that_predict_no_text_are_refused(model: HarnessModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="depth 0: must be at least 1 loop"):
        model.at_depth(0)
    with pytest.raises(ConfigError, match="is no run folder"):
        HarnessModel(run=tmp_path)
    dense, _ = load_model(write_dense(tmp_path))
    with pytest.raises(ConfigError, match=r"recurrence\.kind=dense has no loops"):
        HarnessModel(depth=2, scorer=Scorer(Answers(dense, TOKENIZER), None, (256,), 7))


def write_dense(folder: Path) -> Path:
    write_run(folder / "dense", {"kind": "dense", "num_layers": 1}, vocab_size=257)
    return folder / "dense"
