"""The configs of published rows: complete, of the published size, each with a twin for a CPU."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from support.pairs import collate, make_pairs
from support.pairs import objective as objective_of_pairs
from support.pictures import make_pictures
from support.pictures import objective as objective_of_pictures
from torch import Tensor

from megarecur.batch import END, START
from megarecur.config.load import load_config
from megarecur.config.run import Config
from megarecur.data.loader import MicroBatch
from megarecur.data.open import open_data
from megarecur.launch.check import describe
from megarecur.launch.cli import main
from megarecur.launch.terminal import make_console
from megarecur.model.transformer import Transformer
from megarecur.parallel.mesh import Mesh
from megarecur.plan.cost import count_parameters
from megarecur.plan.describe import resolve_vocab_size
from megarecur.recurrence.schemes import build_map

PAPERS = Path(__file__).parents[2] / "configs/papers"
FILES = sorted(PAPERS.glob("*/*.yaml"))
ROWS = [path for path in FILES if not path.stem.endswith("-small")]


def load(path: Path) -> Config:
    """With the vocabulary of the demo where none is stated."""
    return resolve_vocab_size(load_config(path), lambda tokenizer: 2048)


@pytest.mark.parametrize("path", ROWS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_row_has_the_published_size_or_says_why_not(path: Path) -> None:
    config = load(path)
    twin = load(path.with_stem(path.stem + "-small"))
    for ours, small in ((config.recurrence, twin.recurrence), (config.encoder, twin.encoder)):
        assert (ours is None) == (small is None)
        if ours is not None and small is not None:
            ranks = {"level_rank": 0, "feed_forward_rank": 0}
            assert vars(ours) | ranks == vars(small) | ranks
    assert count_parameters(twin).non_embedding < 5_000_000 and twin.paper is None
    if config.paper is None:  # No number was published.
        return
    count = count_parameters(config)
    ours = count.non_embedding if config.paper.without_embedding else count.total
    assert (ours == config.paper.parameters) != bool(config.paper.difference)


@pytest.mark.parametrize(
    "path", sorted(set(FILES) - set(ROWS)), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_a_twin_learns_from_a_batch(path: Path) -> None:
    config = load(path)
    model = Transformer(config)
    if config.encoder is not None:
        check_learning(model, *objective_of_pairs(model, collate(*make_pairs(4))))
        return
    if config.reads_images:
        check_learning(model, *objective_of_pictures(model, make_pictures(config, 4)))
        return
    tokens = torch.randint(2048, (4, 33), generator=torch.Generator().manual_seed(1))
    inputs, labels = tokens[:, :-1].clone(), tokens[:, 1:]
    positions = torch.arange(32).expand(4, 32)
    if config.task is not None and config.task.augment:
        inputs[:, 0], inputs[:, -1] = START, END
    if config.task is not None and config.task.num_classes is not None:
        rows = {"sequence": (4, 1), "pair": (2, 1), "token": (4, 32)}[config.task.kind]
        labels = torch.arange(rows[0] * rows[1]).view(rows) % config.task.num_classes
    batch = MicroBatch(
        inputs, labels, positions, torch.zeros_like(positions), torch.arange(4),
        torch.zeros(len(labels), dtype=torch.long), True,
    )  # fmt: skip
    ctx = model.context(batch, 0, training=True)
    x, terms = model.run(build_map(config), model.embed(batch.tokens_BS, ctx), ctx, {})
    terms |= model.loss(x, batch)
    check_learning(model, sum(term.total * term.weight for term in terms.values()))


def check_learning(model: Transformer, loss: Tensor, *_: object) -> None:
    loss.backward()
    for name, parameter in model.parameters_by_name.items():
        assert parameter.grad is not None, name
        assert parameter.grad.any() or ".signal_" in name, name  # A factor beside a zero one.


TASKS = ("listops", "listops-lra", "logic", "flip-flop", "pathfinder", "text", "retrieval")


@pytest.mark.parametrize("task", TASKS)
def test_a_header_prepares_what_its_config_reads(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command of every config of a task, on few samples and small files."""
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        for label in ("neg", "pos", "unsup") if part == "train" else ("neg", "pos"):
            folder = Path("data/aclImdb") / part / label
            folder.mkdir(parents=True)
            for i in range(20):
                (folder / f"{i}.txt").write_text(f"{label} {i}")
    Path("data/lra").mkdir()
    for part in ("train", "eval", "test"):
        rows = [f"{i % 2}.0\tP{i}\tQ{i}\tb'one {i}'\tb'two {i}'\n" for i in range(400)]
        Path(f"data/lra/new_aan_pairs.{part}.tsv").write_text("".join(rows))
    prepared: set[str] = set()
    for path in FILES:
        name = path.stem.removesuffix("-small")
        if path.parent.name != "dynamic_halt" or name.rpartition("-")[0] != task:
            continue
        (line,) = [line for line in path.read_text().splitlines() if "megarecur prep task" in line]
        command = line.removeprefix("#   megarecur ").split()
        if line not in prepared:
            few = [] if "labelled" in command else ["--train", "400" if task == "logic" else "40"]
            if task in ("listops", "listops-lra", "flip-flop", "pathfinder"):
                few += ["--test-count", "2", "--val", "4"]
            monkeypatch.setattr(sys, "argv", ["megarecur", *command, *few])
            with pytest.raises(SystemExit) as ended:
                main()
            assert not ended.value.code, line
            prepared.add(line)
        open_data(load_config(path), Mesh())
    assert prepared


@pytest.mark.parametrize("paper", ["takase", "ringformer"])
def test_a_header_prepares_the_pairs_that_its_config_reads(
    paper: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["ein", "zwei", "drei", "vier", "hund", "katze", "maus", "baum", "haus", "berg"]
    for part, count in (("train", 400), ("val", 20)):
        for language in ("de", "en"):
            rows = [f"{words[i % 10]} {words[i * 3 % 10]} {language} {i}\n" for i in range(count)]
            Path(f"{part}.{language}").write_text("".join(rows))
    twins = [path for path in sorted(set(FILES) - set(ROWS)) if path.parent.name == paper]
    twins = [path for path in twins if load(path).encoder is not None]
    commands = {
        tuple(line.removeprefix("#   megarecur ").split())
        for path in twins
        for line in path.read_text().splitlines() if line.startswith("#   megarecur prep")
    }  # fmt: skip
    for command in sorted(commands, reverse=True):  # the tokenizer first
        few = ["--vocab-size", "300"] if "tokenizer" in command[:3] else []
        monkeypatch.setattr(sys, "argv", ["megarecur", *command, *few])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, command
    assert len(commands) == 2
    for path in twins:
        batch = open_data(load_config(path), Mesh()).loader.batch(0)[0]
        assert batch.source is not None and len(batch.source.tokens_BS) == len(batch.tokens_BS)


def test_check_shows_both_numbers() -> None:
    config = load(PAPERS / "ilr/map-4211.yaml")
    console = make_console()
    with console.capture() as capture:
        console.print(describe(config))
    assert "1,180,800; equal" in capture.get()
    model = config.model.model_copy(update={"positions": "learned", "max_positions": 1024})
    with console.capture() as capture:
        console.print(describe(config.model_copy(update={"model": model})))
    assert "131,072 more here" in capture.get()


def test_a_header_prepares_the_pictures_that_its_config_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every twin's command, with files like those of Hugging Face's CIFAR-10."""
    monkeypatch.chdir(tmp_path)
    write_cifar("train-00000-of-00001.parquet", 60)
    write_cifar("test-00000-of-00001.parquet", 20)
    prepared: set[str] = set()
    for path in sorted(set(FILES) - set(ROWS)):
        text = path.read_text()
        for line in (line for line in text.splitlines() if "megarecur prep images" in line):
            if line not in prepared:
                words = line.removeprefix("#   megarecur ").split()
                monkeypatch.setattr(sys, "argv", ["megarecur", *words, "--workers", "1"])
                with pytest.raises(SystemExit) as ended:
                    main()
                assert not ended.value.code, line
                prepared.add(line)
            data = open_data(load_config(path), Mesh())
            assert len(data.loader.batch(0)[0].labels_BS) == data.config.train.micro_batch_size
            data.close()
    assert len(prepared) == 2


def write_cifar(name: str, count: int) -> None:
    """Write a Parquet file of random pictures of 32 x 32 pixels and 10 classes."""
    pictures = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        pictures.append({"bytes": file.getvalue(), "path": None})
    labels = [number % 10 for number in range(count)]
    parquet.write_table(pyarrow.table({"img": pictures, "label": labels}), name)
