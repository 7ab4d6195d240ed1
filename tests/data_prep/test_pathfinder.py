"""Pathfinder: labels are proven by tracing the pictures; draws are functions of the seed. And
pictures as sequences of pixels."""

from __future__ import annotations

import io
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from megarecur.data.samples import TaskCorpus
from megarecur.data_prep import pathfinder, tasks
from megarecur.data_prep.grey import WORDS, to_grey
from megarecur.data_prep.pixels import prepare_pixels
from megarecur.data_prep.tasks import TaskRequest, prepare_task
from megarecur.errors import DataError
from megarecur.launch.cli import main

Pixel = tuple[int, int]


def find_circles(picture: NDArray[np.uint8]) -> list[Pixel]:
    """Middles of the circles: nothing else is white in all of a cross of five pixels."""
    white = np.pad(picture > 240, 1)
    cross = white[1:-1, 1:-1].copy()
    for dy, dx in ((0, 1), (2, 1), (1, 0), (1, 2)):
        cross &= white[dy : dy + 32, dx : dx + 32]
    return [(int(y), int(x)) for y, x in np.argwhere(cross)]


def trace(picture: NDArray[np.uint8], start: Pixel) -> set[Pixel]:
    """All pixels that are reached from one by jumps over at most sqrt(5) pixels between inked
    ones."""
    ink = {(int(y), int(x)) for y, x in np.argwhere(picture)}
    jumps = [(y, x) for y in range(-2, 3) for x in range(-2, 3) if y * y + x * x <= 5]
    reached, pending = {start}, [start]
    while pending:
        y, x = pending.pop()
        for near in ((y + dy, x + dx) for dy, dx in jumps):
            if near in ink and near not in reached:
                reached.add(near)
                pending.append(near)
    return reached


def is_connected(picture: NDArray[np.uint8]) -> bool:
    first, second = find_circles(picture)
    return second in trace(picture, first)


@pytest.mark.parametrize(("length", "count"), [(14, 40), (9, 40), (6, 40)])
def test_tracing_a_picture_gives_its_label(length: int, count: int) -> None:
    for number in range(count):
        for connected in (True, False):
            rng = random.Random(f"trace {number}")
            picture = pathfinder.draw_picture(rng, connected, length)
            assert is_connected(picture) == connected, (length, number)
            spread = len(trace(picture, find_circles(picture)[0]))
            assert spread > 2 * length, "a contour has at least two pixels a dash"


def test_contours_do_not_depend_on_the_label() -> None:
    """The two pictures of a seed differ only where the second circle is or would be."""
    for number in range(10):
        one, other = (
            pathfinder.draw_picture(random.Random(number), connected, 9)
            for connected in (True, False)
        )
        places = {*find_circles(one), *find_circles(other)}
        assert len(places) == 3
        for y, x in np.argwhere(one != other):
            assert min(np.hypot(y - a, x - b) for a, b in places) < 2.5


def test_pictures_are_drawn_by_the_published_numbers() -> None:
    """A distractor is brighter than a contour, black is most of a picture, and its edge is free."""
    pictures = np.stack([
        pathfinder.draw_picture(random.Random(number), True, 14) for number in range(10)
    ])  # fmt: skip
    edge = pictures.copy()
    edge[:, 1:-1, 1:-1] = 0
    assert edge.sum() == 0
    assert 0.6 < (pictures == 0).mean() < 0.95
    share = pathfinder.make_dash(0).shares.max()
    for contrast in (pathfinder.CONTOUR_CONTRAST, pathfinder.DISTRACTOR_CONTRAST):
        assert (pictures == min(round(255 * contrast * share), 255)).any()


def test_a_corpus_is_a_function_of_the_seed(tmp_path: Path, monkeypatch) -> None:
    """Whether one process draws it or several."""
    request = TaskRequest(
        "pathfinder", train=20, val=6, test_count=4, tests=("9",), contour_length=6, seed=3
    )
    made = prepare_task(request, tmp_path / "a")
    monkeypatch.setattr(tasks, "MANY_PICTURES", 1)
    monkeypatch.setattr(tasks.os, "sched_getaffinity", lambda process: {0, 1})
    prepare_task(request, tmp_path / "b")
    assert sorted(made) == ["test", "test_9", "train", "val"]
    labels, seen = {}, set()
    for split in made:
        corpus, again = (TaskCorpus(tmp_path / name / split) for name in "ab")
        assert corpus.fingerprint == again.fingerprint
        assert corpus.classes == ["unconnected", "connected"] and corpus.longest == 1024
        labels[split] = corpus.labels.tolist()
        for number, label in enumerate(corpus.labels):
            ids, _ = corpus.document(number, 2000)
            picture = (ids.astype(np.int64) - 2).astype(np.uint8).reshape(32, 32)
            assert is_connected(picture) == bool(label)
            seen.add(picture.tobytes())
    assert len(seen) == 34
    assert [sum(values) * 2 for values in labels.values()] == [len(v) for v in labels.values()]
    assert labels["train"] != sorted(labels["train"])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--contour-length", "2"), "contours of 2 dashes: must have 3 to 18"),
        (("--test", "easy"), "--test easy: must be a number of dashes, such as 9"),
        (("--variant", "d8"), "--variant: not supported by pathfinder"),
        (("some.png",), "is drawn, not read from files"),
        (("--train", "0", "--val", "0", "--test-count", "0"), "raise --train or --val"),
    ],
)
def test_bad_requests(tmp_path: Path, monkeypatch, capsys, words, text) -> None:
    command = ["megarecur", "prep", "task", "pathfinder", *words, "--out", str(tmp_path / "x")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and text in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------- pixels


def test_grey_values_are_those_of_tensorflow() -> None:
    """Cut, not rounded, of 255.5 instead of 255: as `tf.image.rgb_to_grayscale` converts bytes."""
    colours = [[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]]
    found = to_grey(np.array([colours], np.uint8))
    expected = [
        int((0.2989 * r + 0.5870 * g + 0.1140 * b) / 255 * 255.5) for r, g, b in colours
    ]  # fmt: skip
    assert found.tolist() == [expected] and expected[:2] == [0, 255] and len(WORDS) == 256


def read_cifar(count: int) -> list[tuple[NDArray[np.uint8], int]]:
    """The first test pictures of CIFAR-10 in grey; noise where they are not on hand."""
    folder = Path(os.environ.get("MEGARECUR_DATA", "/nowhere")) / "images/cifar10"
    if not folder.is_dir():
        rng = np.random.default_rng(0)
        return [(rng.integers(0, 256, (32, 32), np.uint8), n % 10) for n in range(count)]
    from PIL import Image
    from pyarrow import parquet

    rows = parquet.read_table(folder / "test-00000-of-00001.parquet").slice(0, count).to_pylist()
    return [
        (to_grey(np.array(Image.open(io.BytesIO(row["image"]["bytes"])))), row["label"])
        for row in rows
    ]


def test_pictures_become_sequences_of_pixels(tmp_path: Path) -> None:
    pictures, classes = read_cifar(40), [f"class {n}" for n in range(10)]
    parts = {"train": lambda: pictures[:30], "test": lambda: pictures[30:]}
    made = prepare_pixels(tmp_path / "out", parts, classes, "stamp")
    assert list(made) == ["test", "train"]
    corpus = TaskCorpus(tmp_path / "out/train")
    assert corpus.kind == "sequence" and corpus.classes == classes and corpus.vocab_size == 258
    assert (tmp_path / "out/tokenizer.words").exists()
    for number, (picture, label) in enumerate(pictures[:30]):
        ids, _ = corpus.document(number, 2000)
        assert np.array_equal(ids.astype(np.int64) - 2, picture.reshape(-1))
        assert corpus.labels[number] == label
    before = (tmp_path / "out/train/manifest.json").stat().st_mtime_ns
    prepare_pixels(tmp_path / "out", parts, classes, "stamp")
    assert (tmp_path / "out/train/manifest.json").stat().st_mtime_ns == before
    with pytest.raises(DataError, match="exists and was prepared with other options"):
        prepare_pixels(tmp_path / "out", parts, classes, "another")


def test_pixels_need_one_size(tmp_path: Path) -> None:
    pictures = [(np.zeros((4, 4), np.uint8), 0), (np.zeros((4, 5), np.uint8), 1)]
    with pytest.raises(DataError, match="train: picture 1 is 5x4, others are 4x4; resize"):
        prepare_pixels(tmp_path / "out", {"train": lambda: pictures}, ["a", "b"], "stamp")
    assert not (tmp_path / "out").exists()


def test_prep_images_writes_grey_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of colours, with the classes of the folders; a second time it is done."""
    colours = {}
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(len(colours)).integers(0, 256, (4, 5, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
            colours[name, i] = pixels
    monkeypatch.chdir(tmp_path)
    words = ["prep", "images", "pictures", "--as-tokens", "grey", "--out", "out", "--workers", "1"]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["megarecur", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        assert "6 pictures of 20 pixels, 2 classes" in capsys.readouterr().out
    corpus = TaskCorpus("out/train")
    assert corpus.classes == ["cat", "dog"]
    expected = sorted((name, to_grey(pixels).ravel().tolist()) for (name, _), pixels in
                      colours.items())  # fmt: skip
    found = [
        (corpus.classes[corpus.labels[n]], (corpus.document(n, 99)[0].astype(int) - 2).tolist())
        for n in range(6)
    ]
    assert sorted(found) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pictures"]
