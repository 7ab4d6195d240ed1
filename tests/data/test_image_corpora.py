"""Pictures: torchvision's definitions, the same bytes on any mesh and by any number of workers."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.image_corpora import draw_pixels, encode, make_corpus, make_image_config, write_folders

from megarecur.config.images import ImagesConfig
from megarecur.data import pictures
from megarecur.data.corpus import read_manifest
from megarecur.data.fit import find_misfits
from megarecur.data.images import (
    ImageCorpus,
    ImageLoader,
    open_images,
    scored_images,
    with_statistics,
)
from megarecur.data.open import build_loader, open_sources, read_in_order
from megarecur.data.pictures import NUM_DRAWS, Draws, Recipe, write_pixels
from megarecur.data.tokenizer import load_tokenizer
from megarecur.data.torchvision_stub import make_torchvision_importable
from megarecur.data_prep.images import ImageRequest, prepare_images
from megarecur.errors import DataError, MegarecurError
from megarecur.parallel.loss import IGNORED
from megarecur.parallel.mesh import Mesh

AUGMENTED = {"crop": "padded", "padding": 2, "trivial_augment": True}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 pictures of 3 classes, and 6 for validation."""
    return make_corpus(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def torchvision() -> Any:
    make_torchvision_importable()
    return pytest.importorskip("torchvision")


def picture(number: int, size: tuple[int, int], channels: int = 3) -> Image.Image:
    return Image.fromarray(draw_pixels(number, size, channels))


def test_draws_are_a_block_of_philox_at_the_counter_of_picture_and_epoch() -> None:
    draws = Draws(seed=2**63 - 1, source=3)
    for number, epoch in ((5, 0), (5, 1), (1 << 40, 7), (5, 0)):
        key = np.array([2**63 - 1, 3], np.uint64)
        philox = np.random.Philox(key=key, counter=[0, number, epoch, 0])
        assert draws.of(number, epoch) == np.random.Generator(philox).random(NUM_DRAWS).tolist()


# ---------------------------------------------------------------------- torchvision's definitions


@pytest.mark.parametrize(("size", "channels"), [((9, 13), 3), ((16, 16), 1)])
def test_operations_are_those_of_torchvision(
    torchvision: Any, size: tuple[int, int], channels: int
) -> None:
    from torchvision.transforms import InterpolationMode, autoaugment

    image = picture(1, size, channels)
    space = autoaugment.TrivialAugmentWide()._augmentation_space(pictures.BINS)
    assert list(space) == [name for name, *_ in pictures.OPERATIONS]
    for operation, (name, apply, _, _, signed) in enumerate(pictures.OPERATIONS):
        theirs, is_signed = space[name]
        assert signed == is_signed
        ours = pictures.magnitudes(operation)
        assert len(ours) == pictures.BINS
        np.testing.assert_allclose(ours, np.broadcast_to(theirs.numpy(), 31), atol=4e-6)
        for magnitude in ours[::3]:
            for value in (magnitude, -magnitude) if signed else (magnitude,):
                expected = autoaugment._apply_op(
                    image, name, value, interpolation=InterpolationMode.NEAREST, fill=None
                )
                assert np.array_equal(apply(image, value), expected), (name, value)


def test_every_operation_and_magnitude_is_drawn() -> None:
    drawn, image = set(), picture(1, (8, 8))
    for i in range(400):
        draws = Draws(1, 0).of(i, 0)
        drawn.add((int(draws[pictures.OPERATION] * 14), draws[pictures.SIGN] < 0.5))
        pictures.trivial_augment(image, draws)
    assert len(drawn) == 28


@pytest.mark.parametrize("size", [(8, 8), (9, 14), (30, 11)])
def test_evaluation_resizes_and_cuts_as_torchvision(
    torchvision: Any, size: tuple[int, int]
) -> None:
    from torchvision import transforms

    image = picture(2, size)
    for cut, resize in ((8, 8), (8, 10), (7, 10)):
        theirs = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(cut)])
        assert np.array_equal(theirs(image), pictures.cut_centre(image, cut, resize))


def test_windows_are_cut_and_padded_as_torchvision(torchvision: Any) -> None:
    from torchvision.transforms import functional

    for number, size in enumerate(((8, 8), (7, 12), (20, 9))):
        image = picture(number, size)
        recipe = Recipe(size=8, channels=3, training=True, crop="padded", padding=3, flip=0.5)
        out_CHW = np.full((3, 8, 8), 9, np.uint8)
        flips = 0
        for epoch in range(20):
            draws = Draws(1, 0).of(number, epoch)
            top, left = pictures.padded_offset(image.size, recipe, draws)
            assert 0 <= top <= size[0] + 6 - 8 and 0 <= left <= size[1] + 6 - 8
            theirs = functional.crop(functional.pad(image, 3), top, left, 8, 8)
            if draws[pictures.FLIP] < 0.5:
                flips += 1
                theirs = functional.hflip(theirs)
            write_pixels(encode(np.asarray(image)), recipe, draws, out_CHW)
            assert np.array_equal(out_CHW, np.asarray(theirs).transpose(2, 0, 1))
            whole = replace(recipe, trivial_augment=True)
            write_pixels(encode(np.asarray(image)), whole, [*draws[:1], 0.0, *draws[2:]], out_CHW)
            assert np.array_equal(out_CHW, np.asarray(theirs).transpose(2, 0, 1))
        assert 3 < flips < 17


def test_resized_windows_have_the_distribution_of_torchvision(torchvision: Any) -> None:
    from torchvision.transforms import RandomResizedCrop, functional

    torch.manual_seed(1)
    image = picture(3, (40, 61))
    recipe = Recipe(size=8, channels=3, training=True, crop="resized", scale=(0.2, 1.0))
    draws = Draws(1, 0)
    ours, theirs = [], []
    for number in range(1500):
        left, top, width, height = window = pictures.resized_window(
            image.size, recipe, draws.of(number, 0)
        )
        assert 0 <= left <= 61 - width and 0 <= top <= 40 - height
        i, j, h, w = RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3])
        ours.append((width * height, width / height, left, top))
        theirs.append((w * h, w / h, j, i))
        if number < 20:
            expected = functional.resized_crop(image, top, left, height, width, [8, 8])
            assert np.array_equal(
                pictures.crop_resized(image, recipe, draws.of(number, 0)), expected
            )
    assert window
    for own, other in zip(np.array(ours).T, np.array(theirs).T, strict=True):
        error = np.hypot(own.std(), other.std()) / np.sqrt(len(ours))
        assert abs(own.mean() - other.mean()) < 4 * error
        assert own.std() == pytest.approx(other.std(), rel=0.1)


@pytest.mark.parametrize("size", [(4, 100), (100, 4)])
def test_a_picture_without_room_for_a_window_gives_its_centre(
    torchvision: Any, size: tuple[int, int]
) -> None:
    from torchvision.transforms import RandomResizedCrop

    image = picture(4, size)
    recipe = Recipe(size=8, channels=3, training=True, crop="resized", scale=(0.9, 1.0))
    left, top, width, height = pictures.resized_window(image.size, recipe, Draws(1, 0).of(0, 0))
    expected = RandomResizedCrop.get_params(image, [0.9, 1.0], [3 / 4, 4 / 3])
    assert (top, left, height, width) == expected


# ---------------------------------------------------------------------- the loader


def open_loader(
    corpus: Path, images: dict[str, Any] | None = None, dp: int = 1, rank: int = 0, **train: int
) -> ImageLoader:
    config = make_image_config(corpus, data={"images": {"workers": 0, **(images or {})}})
    config = config.model_copy(update={"train": config.train.model_copy(update=train)})
    (own,) = open_images(config, [f"{corpus}/train"])
    assert config.task is not None
    return ImageLoader(
        [(own, 1.0)], config.task, config.data.images, seq_length=4,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size, dp_rank=rank, dp_size=dp, seed=7,
    )  # fmt: skip


def read(loader: ImageLoader, steps: range) -> list[tuple[bytes, bytes, bytes]]:
    """Pixels, labels and ids of whole steps."""
    found = []
    with loader:
        for step in steps:
            batches = loader.batch(step)
            loader.prefetch(step + 1)
            pixels = torch.cat([b.pixels_BCHW for b in batches if b.pixels_BCHW is not None])
            labels, ids = (
                torch.cat([getattr(b, key) for b in batches])
                for key in ("labels_BS", "sample_ids_B")
            )
            found.append(tuple(t.contiguous().numpy().tobytes() for t in (pixels, labels, ids)))
    return found


@pytest.mark.parametrize("images", [AUGMENTED, {"crop": "resized", "scale": [0.3, 1.0]}])
def test_bytes_do_not_depend_on_workers_micro_batches_resuming_or_ranks(
    corpus: Path, images: dict[str, Any]
) -> None:
    expected = read(open_loader(corpus, images), range(4))
    assert len({pixels for pixels, _, _ in expected}) == 4
    assert read(open_loader(corpus, {**images, "workers": 2}), range(4)) == expected
    assert read(open_loader(corpus, images, micro_batch_size=4), range(4)) == expected
    assert read(open_loader(corpus, {**images, "workers": 1}), range(2, 4)) == expected[2:]
    halves = [read(open_loader(corpus, images, dp=2, rank=rank), range(4)) for rank in (0, 1)]
    for whole, *parts in zip(expected, *halves, strict=True):
        assert whole == tuple(b"".join(pieces) for pieces in zip(*parts, strict=True))


def test_a_picture_is_augmented_anew_in_each_epoch(corpus: Path) -> None:
    """12 pictures and steps of 4: steps 0 to 2 are the first epoch, 3 to 5 the second."""
    sizes = {"global_batch_size": 4, "micro_batch_size": 4}
    with open_loader(corpus, AUGMENTED, **sizes) as loader:
        windows = [loader.windows(loader.sample_ids(step))[1].tolist() for step in range(6)]
        pixels = [loader.batch(step)[0].pixels_BCHW for step in range(6)]
    by_epoch = [
        dict(zip(chain(*windows[a : a + 3]), torch.cat(pixels[a : a + 3]), strict=True))
        for a in (0, 3)
    ]
    assert set(by_epoch[0]) == set(by_epoch[1]) == set(range(12))
    changed = [not torch.equal(by_epoch[0][n], by_epoch[1][n]) for n in range(12)]
    assert sum(changed) >= 10
    plain = read(open_loader(corpus, {"flip": 0.0}, **sizes), range(6))
    assert len({pixels for pixels, _, _ in plain}) == 6


def test_a_micro_batch_has_normalised_pixels_and_the_labels_of_the_corpus(corpus: Path) -> None:
    with open_loader(corpus, {"flip": 0.0}, global_batch_size=12, micro_batch_size=6) as loader:
        first, second = loader.batch(0)
        (own,) = loader.task_corpora
    pixels = torch.cat([first.pixels_BCHW, second.pixels_BCHW])
    assert pixels.shape == (12, 3, 8, 8) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3), correction=0), torch.ones(3))
    assert first.tokens_BS.shape == (6, 4) and not first.tokens_BS.any()
    assert first.single_document and first.labels_BS.shape == (6, 1) and first.num_tokens == 6
    window = int(loader.windows(np.arange(12))[1][8])
    raw = np.asarray(pictures.decode(own.pictures.read(window), 3)).transpose(2, 0, 1) / 255
    expected = (raw - np.array(own.mean)[:, None, None]) / np.array(own.std)[:, None, None]
    np.testing.assert_allclose(second.pixels_BCHW[2], expected, atol=1e-5)
    assert int(second.labels_BS[2, 0]) == own.labels[window]
    assert sorted(torch.cat([first.labels_BS, second.labels_BS]).flatten().tolist()) == sorted(
        own.labels.tolist()
    )


def test_given_statistics_replace_measured_ones(corpus: Path) -> None:
    same = {"flip": 0.0, "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    with open_loader(corpus, same) as loader:
        pixels = loader.batch(0)[0].pixels_BCHW
    assert pixels is not None and pixels.min() >= 0.0 and 0.5 < pixels.max() <= 1.0
    np.testing.assert_allclose(pixels * 255, (pixels * 255).round(), atol=1e-4)


def test_a_run_fills_in_the_statistics_of_its_training_corpora(corpus: Path) -> None:
    config = make_image_config(corpus)
    paths = [f"{corpus}/train", f"{corpus}/val"]
    a, b = open_images(config, paths)
    mixed = [{"path": paths[0], "weight": 3.0}, {"path": paths[0], "weight": 1.0}]
    for train in ([{"path": paths[0]}], mixed):
        chosen = make_image_config(corpus, data={"train": train})
        images = with_statistics(chosen, [a] * len(train)).data.images
        assert images is not None and images.workers == 0
        assert images.mean == pytest.approx(a.mean) and images.std == pytest.approx(a.std)
    given = make_image_config(
        corpus, data={"images": {"mean": [0.5] * 3, "std": [0.2] * 3, "workers": 0}}
    )
    assert with_statistics(given, [a]) == given
    assert b.mean == a.mean, "validation is normalised as training is"


def test_a_killed_worker_is_one_error_and_none_is_left_behind(corpus: Path) -> None:
    loader = open_loader(corpus, {"workers": 2})
    loader.batch(0)
    processes = [worker.process for worker in loader.decoders._workers]
    processes[0].kill()
    with pytest.raises(DataError, match=r"data\.images\.workers: process \d+.*killed by SIGKILL"):
        for step in range(1, 50):
            loader.batch(step)
    loader.close()
    assert [process.poll() is not None for process in processes] == [True, True]
    assert loader.batch(0)[0].pixels_BCHW is not None, "a closed loader can be used again"
    again = [worker.process for worker in loader.decoders._workers]
    loader.close()
    assert all(process.poll() == 0 for process in again)


def test_workers_end_with_a_loader_that_is_killed(corpus: Path) -> None:
    facts = {"shard.00000.mds": read_manifest(corpus / "train").files["shard.00000.mds"]}
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from megarecur.data.decoding import Decoders\n"
        "from megarecur.data.pictures import PictureShards, Recipe\n"
        f"folder = Path({str(corpus / 'train')!r})\n"
        f"shards = PictureShards(folder, {facts!r})\n"
        "recipe = Recipe(size=8, channels=3, training=True)\n"
        "d = Decoders([folder], [shards], recipe, [0.0] * 3, [1.0] * 3,\n"
        "             seed=1, workers=2)\n"
        "d.finish(d.request(np.zeros((8, 3), np.int64)))\n"
        "assert 'torch' not in sys.modules, 'workers start quickly'\n"
        "print(*[w.process.pid for w in d._workers], flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(is_running(pid) for pid in pids)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 30
    while any(is_running(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_that_no_hash_was_compared_for_names_the_picture(
    tmp_path: Path, workers: int
) -> None:
    corpus = make_corpus(tmp_path)
    shard = corpus / "train/shard.00000.mds"
    shards = ImageCorpus(corpus / "train", verify=False).pictures
    begin = int(shards.offsets[0][5])
    with open(shard, "r+b") as file:
        file.seek(begin + 12)
        file.write(bytes(40))
    with pytest.raises(DataError, match=r"shard\.00000\.mds does not match its hash"):
        ImageCorpus(corpus / "train")
    config = make_image_config(corpus)
    own = ImageCorpus(corpus / "train", verify=False)
    assert config.task is not None
    images = ImagesConfig(workers=workers)
    loader = ImageLoader(
        [(own, 1.0)], config.task, images, seq_length=4, global_batch_size=4,
        micro_batch_size=2, dp_rank=0, dp_size=1, seed=7,
    )  # fmt: skip
    with loader, pytest.raises(DataError, match=r"train: picture 5 cannot be read"):
        for step in range(3):
            loader.batch(step)
    failures: list[MegarecurError] = []
    batches = list(
        scored_images(own, config.task, images, seq_length=4, micro_batch_size=2, failures=failures)
    )
    assert len(batches) == 6 and "picture 5" in str(failures[0])
    assert [batch.num_tokens for batch in batches] == [2, 2, 0, 0, 0, 0]


# ---------------------------------------------------------------------- validation


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("most", [0, 4])
def test_validation_reads_every_picture_once_over_ranks(
    corpus: Path, workers: int, most: int
) -> None:
    config = make_image_config(corpus, data={"images": {"workers": workers}})
    (own,) = open_images(config, [f"{corpus}/val"])
    ids, labels, counts = [], [], []
    for rank in range(2):
        failures: list[MegarecurError] = []
        assert config.task is not None
        batches = scored_images(
            own, config.task, config.data.images, seq_length=4, micro_batch_size=2, dp_rank=rank,
            dp_size=2, max_samples=most, failures=failures,
        )  # fmt: skip
        read = list(batches)
        assert not failures
        counts.append(len(read))
        for batch in read:
            counted = batch.labels_BS[:, 0] != IGNORED
            ids += batch.sample_ids_B[counted].tolist()
            labels += batch.labels_BS[counted, 0].tolist()
    assert counts[0] == counts[1] and sorted(ids) == list(range(most or 6))
    assert labels == own.labels[ids].tolist()


def test_validation_resizes_pictures_of_any_size(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, size=(20, 14))
    config = make_image_config(corpus, data={"images": {"workers": 0, "crop": "resized"}})
    (own,) = open_images(config, [f"{corpus}/val"])
    batches, samples = read_in_order(config, own, Mesh(), 4, [])
    first, _ = batches
    pixels = first.pixels_BCHW
    assert samples == 4
    assert pixels is not None and pixels.shape == (2, 3, 8, 8)
    image = pictures.cut_centre(pictures.decode(own.pictures.read(1), 3), 8, 8)
    raw = np.asarray(image).transpose(2, 0, 1) / 255
    expected = (raw - np.array(own.mean)[:, None, None]) / np.array(own.std)[:, None, None]
    np.testing.assert_allclose(pixels[1], expected, atol=1e-5)


# ---------------------------------------------------------------------- bad input


def test_corpora_that_do_not_fit_are_reported_together(corpus: Path, tmp_path: Path) -> None:
    config = make_image_config(corpus, task={"num_classes": 2, "channels": 1})
    with pytest.raises(DataError) as error:
        open_images(config, [f"{corpus}/train", f"{corpus}/val"])
    assert str(error.value).count("has 3 classes") == 2
    assert "more than task.num_classes=2; use pictures of the classes of training" in str(
        error.value
    )
    assert str(error.value).count("has pictures of 3 channel(s), but task.channels=1") == 2
    more = write_folders(tmp_path / "more", classes=4)
    prepare_images(ImageRequest((str(more),)), tmp_path / "out", workers=1)
    with pytest.raises(DataError, match=r"has 4 classes .*more than task\.num_classes=3"):
        open_images(make_image_config(corpus), [f"{corpus}/train", f"{tmp_path}/out/train"])


def test_corpora_whose_classes_have_other_names_are_refused(corpus: Path, tmp_path: Path) -> None:
    folder = write_folders(tmp_path / "more")
    (folder / "class_0").rename(folder / "dog")
    prepare_images(ImageRequest((str(folder),)), tmp_path / "out", workers=1)
    with pytest.raises(DataError, match=r"its classes \(class_1, class_2, dog\) are not those of"):
        open_images(make_image_config(corpus), [f"{corpus}/train", f"{tmp_path}/out/train"])


@pytest.mark.parametrize(
    ("size", "images", "expected"),
    [
        ((8, 9), {}, r"pictures of 8 x 9 pixels \(height x width\), but task\.image_size=8"),
        ((8, 9), {"crop": "padded", "padding": 0}, ""),
        ((3, 9), {"crop": "padded", "padding": 2}, "too few for a window of task.image_size=8"),
        ((3, 9), {"crop": "padded", "padding": 3}, ""),
        ((8, 9), {"crop": "resized"}, ""),
        ((8, 8), {}, ""),
    ],
)
def test_sizes_that_no_crop_makes_equal_are_refused(
    tmp_path: Path, size: tuple[int, int], images: dict[str, Any], expected: str
) -> None:
    corpus = make_corpus(tmp_path, size=size)
    config = make_image_config(corpus, data={"images": {"workers": 0, **images}})
    manifest = read_manifest(corpus / "train")
    if expected:
        with pytest.raises(DataError, match=expected):
            build_loader(config, open_images(config, [f"{corpus}/train"]), Mesh())
        assert find_misfits(corpus / "train", manifest, config)
        return
    with build_loader(config, open_images(config, [f"{corpus}/train"]), Mesh()) as loader:
        assert len(loader.batch(0)) == 4
    assert not find_misfits(corpus / "train", manifest, config)


def test_pictures_and_text_do_not_stand_in_for_each_other(corpus: Path, tmp_path: Path) -> None:
    text = make_image_config(corpus).model_copy(update={"task": None})
    with pytest.raises(DataError, match=r"holds pictures, but the config has no task\.kind=image"):
        open_sources(text, text.data.train, load_tokenizer("bytes"), name="bytes")
    manifest = replace(read_manifest(corpus / "train"), task=None)
    (problem,) = find_misfits(corpus / "train", manifest, make_image_config(corpus))
    assert "holds text, but task.kind=image reads pictures" in problem


@pytest.fixture(autouse=True)
def no_worker_is_left() -> Iterator[None]:
    """No test leaves a child process running."""
    yield
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    pids = [int(word) for word in children.read_text().split()] if children.exists() else []
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids if is_running(pid)]
    assert not [c for c in commands if b"picture_worker" in c]
