"""Speed of reading pictures against torchvision's ImageFolder with DataLoader.

    python benchmarks/images.py [--workers 2] [--rounds 5] [--batches 60] [CIFAR]

CIFAR is the folder of CIFAR-10's parquet files (default: MEGARECUR_DATA/images/cifar10). Both sides
decode, augment, normalise and batch in the same number of worker processes, and the main process
only receives float32 batches of 128. Three settings:

    CIFAR-10          32 x 32: random crop with padding 4, flip. Theirs is a folder of PNG files, as
                      ImageFolder is used for it; ours the corpus of `prep images` of that folder
    with augmentation the same, with TrivialAugmentWide
    photographs       JPEG of 500 x 375 pixels, drawn (enlarged CIFAR pictures with noise): random
                      resized crop to 224, flip; both read the same files

The settings of both sides alternate for several rounds in one run, and the ratio is the median of
the rounds', so that a machine with other work disturbs both alike. Processor seconds of all
processes per 1,000 pictures are measured too. The clock starts after the first batches, and runs
over many more than either side reads ahead.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megarecur.config.images import ImagesConfig
from megarecur.config.objective import TaskConfig
from megarecur.data.images import ImageCorpus, ImageLoader
from megarecur.data.torchvision_stub import make_torchvision_importable
from megarecur.data_prep.images import ImageRequest, prepare_images

BATCH, WARM_UP = 128, 4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
Batches = Callable[[], Iterator[int]]


def write_cifar(source: Path, folder: Path, count: int) -> None:
    """Write CIFAR-10 pictures as PNG files in folders of classes."""
    from megarecur.data_prep.image_inputs import FieldNames, find_inputs, read_unit
    from megarecur.data_prep.labelled import Mistakes

    file = str(source / "train-00000-of-00001.parquet")
    rows = (
        row
        for unit in find_inputs([file], "train", FieldNames(), ()).units["train"]
        for row in read_unit(unit, Mistakes())
    )
    for number, (_, content, label) in zip(range(count), rows, strict=False):
        (folder / label).mkdir(parents=True, exist_ok=True)
        Image.open(BytesIO(bytes(content))).save(folder / label / f"{number}.png")


def write_photographs(cifar: Path, folder: Path, count: int) -> None:
    """Write JPEG files of 500 x 375 pixels: enlarged pictures with the noise of a camera."""
    rng = np.random.default_rng(1)
    files = sorted(cifar.rglob("*.png"), key=lambda file: int(file.stem))
    for number, file in zip(range(count), files, strict=False):
        image = Image.open(file).resize((500, 375), Image.Resampling.BICUBIC)
        noisy = np.asarray(image) + rng.normal(0, 12, (375, 500, 3))
        (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        out = folder / file.parent.name / f"{number}.jpg"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, quality=90)


def open_ours(corpus: Path, size: int, workers: int, **images: Any) -> tuple[Batches, ImageLoader]:
    """Return our batches, which go on through epochs, and their loader."""
    own = ImageCorpus(corpus, verify=False)
    task = TaskConfig(kind="image", num_classes=len(own.classes), image_size=size, patch_size=4)
    loader = ImageLoader(
        [(own, 1.0)], task, ImagesConfig(workers=workers, mean=MEAN, std=STD, **images),
        seq_length=(size // 4) ** 2, global_batch_size=BATCH, micro_batch_size=BATCH, dp_rank=0,
        dp_size=1, seed=1,
    )  # fmt: skip

    def batches() -> Iterator[int]:
        step = 0
        while True:
            (batch,) = loader.batch(step)
            step += 1
            loader.prefetch(step)
            assert batch.pixels_BCHW is not None and batch.pixels_BCHW.dtype == torch.float32
            yield len(batch.pixels_BCHW)

    return batches, loader


def open_theirs(folder: Path, workers: int, transforms: list[Any]) -> Batches:
    """Return the batches of ImageFolder and DataLoader, which go on through epochs."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, Normalize, ToTensor

    dataset = ImageFolder(str(folder), Compose([*transforms, ToTensor(), Normalize(MEAN, STD)]))
    loader = torch.utils.data.DataLoader(
        dataset, BATCH, shuffle=True, num_workers=workers, persistent_workers=True, drop_last=True
    )

    def batches() -> Iterator[int]:
        while True:
            for pixels, _ in loader:
                yield len(pixels)

    return batches


def cpu_seconds(pids: list[int]) -> float:
    """Return the processor time of this process and of some children, in seconds."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def children() -> list[int]:
    """Return the process ids of this process's children."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return found


def measure(batches: Iterator[int], num_batches: int) -> tuple[float, float]:
    """Return pictures per second, and processor seconds per 1,000 pictures."""
    for _ in range(WARM_UP):
        next(batches)
    pids = children()
    used, began = cpu_seconds(pids), time.perf_counter()
    count = sum(next(batches) for _ in range(num_batches))
    elapsed = time.perf_counter() - began
    return count / elapsed, 1000 * (cpu_seconds(pids) - used) / count


def compare(
    name: str,
    num_batches: int,
    rounds: int,
    ours: Callable[[], tuple[Batches, ImageLoader]],
    theirs: Callable[[], Batches],
) -> None:
    """Print the medians of several rounds of both sides, and of their ratios."""
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        batches, loader = ours()
        with loader:
            found["ours"].append(measure(batches(), num_batches))
        iterator = theirs()()
        found["theirs"].append(measure(iterator, num_batches))
        iterator.close()
        del iterator
    own, other = (np.array(found[side]) for side in ("ours", "theirs"))
    ratios = own[:, 0] / other[:, 0]
    print(
        f"{name}: {statistics.median(own[:, 0]):,.0f} against "
        f"{statistics.median(other[:, 0]):,.0f} pictures/s, {statistics.median(ratios):.2f} times "
        f"({ratios.min():.2f} to {ratios.max():.2f}); processor "
        f"{statistics.median(own[:, 1]):.2f} against {statistics.median(other[:, 1]):.2f} s per "
        f"1,000, {statistics.median(other[:, 1] / own[:, 1]):.2f} times",
        flush=True,
    )


def main() -> None:
    """Measure all settings."""
    data = Path(os.environ.get("MEGARECUR_DATA", "../shared/data"))
    parser = argparse.ArgumentParser()
    parser.add_argument("cifar", nargs="?", type=Path, default=data / "images/cifar10")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=60, help="measured; a quarter of photos")
    parser.add_argument("--count", type=int, default=10_000, help="pictures of CIFAR-10 to read")
    arguments = parser.parse_args()
    make_torchvision_importable()
    from torchvision import transforms

    with tempfile.TemporaryDirectory() as name:
        folder, workers, rounds = Path(name), arguments.workers, arguments.rounds
        write_cifar(arguments.cifar, folder / "cifar", arguments.count)
        write_photographs(folder / "cifar", folder / "photographs", arguments.batches * 10)
        for source in ("cifar", "photographs"):
            request = ImageRequest((str(folder / source),))
            prepare_images(request, folder / f"{source}-corpus", workers=workers)
        cropped = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        cifar = folder / "cifar-corpus/train"
        compare(
            "CIFAR-10",
            arguments.batches,
            rounds,
            lambda: open_ours(cifar, 32, workers, crop="padded"),
            lambda: open_theirs(folder / "cifar", workers, cropped),
        )
        compare(
            "with TrivialAugmentWide",
            arguments.batches,
            rounds,
            lambda: open_ours(cifar, 32, workers, crop="padded", trivial_augment=True),
            lambda: open_theirs(
                folder / "cifar", workers, [*cropped, transforms.TrivialAugmentWide()]
            ),
        )
        resized = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
        compare(
            "photographs",
            arguments.batches // 4,
            rounds,
            lambda: open_ours(folder / "photographs-corpus/train", 224, workers, crop="resized"),
            lambda: open_theirs(folder / "photographs", workers, resized),
        )


if __name__ == "__main__":
    main()
