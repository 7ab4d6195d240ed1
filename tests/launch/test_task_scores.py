"""`megarecur eval --tasks` and `--lengths`: a trained run by the command line, and bad input."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.configs import make_config
from support.exports import write_run
from support.once import make_once
from typer.testing import CliRunner

from megarecur.errors import ConfigError, MegarecurError
from megarecur.inference.task_files import check_harness, choose_folder
from megarecur.launch.cli import app
from megarecur.launch.lengths import parse_lengths, score_lengths
from megarecur.launch.tasks import draw_table, score_run_on_tasks
from megarecur.train.trainer import train

LOOP = {"kind": "loop", "prelude": 1, "core": 1, "coda": 1, "num_loops": 2}
WORDS = ("one two three", "red green blue", "a dog ran", "it was so")


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A looped run of two steps."""

    def make(folder: Path) -> None:
        config = make_config(corpus, recurrence=LOOP, run_dir=str(folder / "run"),
                             train={"steps": 2})  # fmt: skip
        assert train(config) == 0

    return make_once(tmp_path_factory, "scored", make) / "run"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Documents of a task."""
    rows = [{"text": text} for text in WORDS]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "lambada_openai.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def command(*words: object) -> str:
    """Run a command in this process; returns its output."""
    done = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def refuse(*words: object) -> str:
    """Run a command that a user must correct; returns the message."""
    with pytest.raises(MegarecurError) as caught:
        CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    return str(caught.value)


def test_a_run_is_scored_on_tasks_by_the_command_line(trained: Path, files: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    (trained / "scores.jsonl").unlink(missing_ok=True)
    words = ("eval", trained, "--tasks", "lambada_openai", "--tasks-from", files)
    shown = command(*words, "--depth", "1,2", "--limit", 3)
    assert "1 loop" in shown and "2 loops" in shown and "perplexity" in shown
    assert str(trained / "plots/scores.png") in shown
    rows = [json.loads(line) for line in (trained / "scores.jsonl").read_text().splitlines()]
    assert [(row["depth"], row["metric"]) for row in rows] == [
        (1, "perplexity"), (1, "acc"), (2, "perplexity"), (2, "acc"),
    ]  # fmt: skip
    for row in rows:
        assert (row["task"], row["step"], row["shots"]) == ("lambada_openai", 2, 0)
        assert row["samples"] == row["limit"] == 3 and row["harness"] and row["stderr"] is not None
    picture = (trained / "plots/scores.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    # Without --depth the trained number runs, and rows are appended.
    found = score_run_on_tasks(trained, "lambada_openai", folder=files, limit=3)
    assert [row["value"] for row in found] == [row["value"] for row in rows[2:]]
    assert found[0]["depth"] == 2 and draw_table(found).row_count == 2
    assert len((trained / "scores.jsonl").read_text().splitlines()) == 6


def test_a_folder_of_the_environment_is_the_default(
    trained: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    monkeypatch.setenv("MEGARECUR_DATA", str(files / "data"))
    (files / "data").mkdir()
    assert choose_folder(None) == (None, False)
    (files / "data/eval").mkdir()
    (files / "lambada_openai.jsonl").rename(files / "data/eval/lambada_openai.jsonl")
    assert {row["samples"] for row in score_run_on_tasks(trained, "lambada_openai")} == {4}


def test_what_cannot_be_scored_is_refused(trained: Path, files: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    names = ("--tasks-from", files, "--tasks")
    said = refuse("eval", trained, *names, "piqa,lambada_openai,boolq")
    assert "piqa.jsonl" in said and "boolq.jsonl" in said and "lambada" not in said
    said = refuse("eval", trained, *names, "lambada_openai", "--depth", "0,many")
    assert "depth 'many'" in said and "depth 0: must be at least 1 loop" in said
    assert "--tasks: names no task" in refuse("eval", trained, *names, ",")
    assert "no such folder" in refuse("eval", tmp_path / "none", *names, "lambada_openai")
    adapted = tmp_path / "adapted"
    loops = {"kind": "block_recurrence", "num_blocks": 1, "num_loops": 2}
    write_run(adapted, loops, adapters={"rank": 2}, vocab_size=257)
    said = refuse("eval", adapted, *names, "lambada_openai", "--depth", "3")
    assert "adapters exist for 2 loops; set the depth to at most 2" in said


def test_options_that_do_not_go_together_are_refused(trained: Path) -> None:
    for words, said in (
        (("--limit", "3", "--shots", "1"), "--shots, --limit: only for tasks"),
        (("--tasks", "piqa", "--samples", "3", "--lengths", "9"), "--samples, --lengths: not with"),
        (("--lengths", "9", "--streaming"), "--streaming: not with --lengths"),
    ):
        assert said in refuse("eval", trained, *words)


def test_a_missing_harness_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a)
    )
    with pytest.raises(ConfigError, match=r"pip install 'megarecur\[eval\]'"):
        check_harness("--tasks")


@pytest.mark.slow
@pytest.mark.timeout(1500)  # The harness reads the definitions of all of its tasks.
def test_the_harness_own_command_scores_a_run(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    task = {
        "task": "words", "dataset_path": "json", "output_type": "loglikelihood",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "words.jsonl")}},
        "test_split": "test", "doc_to_text": "{{a}}", "doc_to_target": "{{b}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "words.yaml").write_text(json.dumps(task), encoding="utf-8")
    rows = [{"a": text[:-2], "b": text[-2:]} for text in WORDS]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "words.jsonl").write_text(text, encoding="utf-8")
    words = [sys.executable, "-m", "megarecur.launch.lm_eval", "--model", "megarecur",
             "--model_args", f"run={trained},depth=1", "--tasks", str(tmp_path / "words.yaml"),
             "--device", "cpu", "--output_path", str(tmp_path / "out")]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "words" in done.stdout and "acc" in done.stdout
    (written,) = (tmp_path / "out").rglob("results*.json")
    assert json.loads(written.read_text())["n-samples"]["words"]["effective"] == 4


def test_perplexity_at_other_lengths(trained: Path) -> None:
    shown = command("eval", trained, "--lengths", "64,16", "--samples", 4)
    assert "16 tokens" in shown and "64 tokens" in shown and "8-15" in shown and "32-63" in shown
    for name in ("lengths", "positions"):
        assert str(trained / f"plots/{name}.png") in shown
        assert (trained / f"plots/{name}.png").read_bytes().startswith(b"\x89PNG")
    found = score_lengths(trained, "16,32", samples=4, depth="1,2")
    assert [(each.depth, each.length) for each in found] == [(1, 16), (1, 32), (2, 16), (2, 32)]
    assert {each.score.tokens for each in found} <= {128, 127, 126, 124, 120}
    # At the trained length and depth it is the score of `eval`.
    plain = command("eval", trained, "--samples", 4)
    assert f"perplexity {found[3].score.perplexity:.2f}" in plain
    assert found[0].score.loss != found[2].score.loss


def test_lengths_are_checked_together(trained: Path) -> None:
    config = make_config(model={"positions": "learned", "max_positions": 32})
    with pytest.raises(ConfigError) as caught:
        parse_lengths("16,64,x,1", config)
    lines = str(caught.value).splitlines()[1:]
    assert "64: the model has 32 learned positions" in lines[0] and len(lines) == 3
    assert parse_lengths("64,16,16", make_config()) == [16, 64]
    assert "must be a number of tokens" in refuse("eval", trained, "--lengths", "")
