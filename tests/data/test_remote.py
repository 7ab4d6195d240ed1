"""Corpora at a remote: the same batches through a bounded cache, and one clear error when not."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import make_config
from support.harness import fork_context

from megarecur.config.load import to_yaml
from megarecur.config.run import Config
from megarecur.data import remote as remote_module
from megarecur.data.corpus import Corpus
from megarecur.data.loader import Loader, MicroBatch, validation_batches
from megarecur.data.order import ShardOrder, WholeOrder
from megarecur.data.remote import CachedFiles, RemoteCorpus
from megarecur.data_prep.readers import Reading
from megarecur.data_prep.shards import prepare_shards
from megarecur.errors import ConfigError, DataError
from megarecur.train.metrics import read_rows
from megarecur.train.trainer import FINISHED, train

S = 512
SHARD = 34_000  # bytes, a little more than a chunk: shards are of one chunk
NUM_SHARDS = 9

# -------------------------------------------------------------------------------------------- order


@settings(max_examples=150)
@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=12),
    st.integers(1, 14),
    st.integers(1, 9),
    st.integers(0, 2**65),
    st.integers(0, 3),
)
def test_blocks_of_shards(
    tokens: list[int], n: int, seq_length: int, seed: int, source: int
) -> None:
    """Every window once an epoch, block after block, inside its shard."""
    starts = np.concatenate([[0], np.cumsum(tokens)])
    # The end of the stream may be padding, a whole shard of it too.
    num_tokens = int(starts[-1]) - tokens[-1] // 3
    order = ShardOrder(starts.tolist(), num_tokens, seq_length, n, seed, source)
    ends = np.minimum(starts[1:], num_tokens)
    sizes = np.maximum(ends - starts[:-1] - 1, 0) // seq_length
    assert order.num_windows == sizes.sum()
    if not order.num_windows:
        return
    per_epoch = order.num_windows
    numbers = np.arange(3 * per_epoch)
    windows = order.windows(numbers)
    token = order.starts(windows)
    shards = starts.searchsorted(token, "right") - 1
    assert (token >= starts[shards]).all() and (token + seq_length < ends[shards]).all()
    position = 0
    for epoch in windows.reshape(3, per_epoch):
        assert sorted(epoch.tolist()) == list(range(per_epoch))
        seen: list[int] = []
        while position % per_epoch or not seen:
            block, following = order.blocks(position, position)
            assert 1 <= len(block) <= n
            count = int(sizes[block].sum())
            assert set(shards[position : position + count]) == set(block)
            assert order.blocks(position, position + count - 1) == [block, following]
            seen += block
            position += count
        assert sorted(seen) == np.flatnonzero(sizes).tolist()
    # It can be asked for anywhere, in any order.
    for k in {0, per_epoch - 1, per_epoch, 2 * per_epoch + per_epoch // 2}:
        assert order.windows(numbers[k : k + 1]) == windows[k]
    if per_epoch > 20:
        assert len({tuple(epoch) for epoch in windows.reshape(3, per_epoch).tolist()}) == 3


@given(st.integers(1, 9), st.integers(2, 60), st.integers(1, 7), st.data())
def test_shards_read_in_order(num_shards: int, size: int, seq_length: int, data: Any) -> None:
    starts = [k * size for k in range(num_shards + 1)]
    order = WholeOrder(starts, starts[-1], seq_length, False, 1, 0)
    if not order.num_windows:
        return
    first = data.draw(st.integers(0, 3 * order.num_windows))
    last = data.draw(st.integers(first, first + 50))
    blocks = [block[0] for block in order.blocks(first, last)]
    steps = np.diff(blocks) % num_shards
    assert len(blocks) >= 2 and (steps == 1 % num_shards).all()
    read = order.starts(order.windows(np.arange(first, last + 1))) // size
    assert blocks[0] == read[0] and read[-1] == blocks[-2]
    whole = WholeOrder(starts, starts[-1], seq_length, True, 1, 0)
    assert [list(block) for block in whole.blocks(first, last)] == [list(range(num_shards))]


# ------------------------------------------------------------------------------------------ corpora


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 9 shards, each of 31 windows or, the last one, fewer; and a smaller `val`."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("home")
    lengths = rng.integers(200, 5000, 60)
    text = [rng.integers(97, 123, n, np.uint8).tobytes() for n in lengths]
    (folder / "text.txt").write_bytes(b"\n\0\n".join(text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megarecur.data_prep.shards.SHARD_BYTES", SHARD)
        prepare_shards(
            [folder / "text.txt"], folder / "out", "bytes",
            Reading(text_split="separator", separator="\0"), val_fraction=0.2, workers=1,
        )  # fmt: skip
    assert len(list((folder / "out" / "train").glob("shard.*"))) == NUM_SHARDS
    return folder / "out"


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Pauses that tests can wait for."""
    patch.setattr(remote_module, "PAUSES", (0.0, 0.01))
    patch.setattr(remote_module, "POLL", 0.005)
    patch.setattr(remote_module, "POLL_AHEAD", 0.01)


@pytest.fixture
def far(home: Path, tmp_path: Path) -> Path:
    """The corpora, where they may be damaged."""
    return Path(shutil.copytree(home, tmp_path / "far"))


def size_of(folder: Path) -> int:
    """Bytes of all files, downloads under way included."""
    sizes: dict[str, int] = {}
    for where, _, names in os.walk(folder, topdown=False):  # Downloads first.
        for name in names:
            path = os.path.join(where, name)
            # A shard that gets its place meanwhile is seen twice.
            key = name.removesuffix(".tmp") if name.startswith("shard") else path
            with suppress(FileNotFoundError):
                sizes[key] = max(sizes.get(key, 0), os.stat(path).st_size)
    return sum(sizes.values())


def room(home: Path, shards: int, split: str = "train") -> float:
    """The bound, in GB, that holds so many shards and no more."""
    names = ("manifest.json", "manifest.json", "index.json", "documents.npy")
    size = max(file.stat().st_size for file in (home / split).glob("shard.*"))
    return (sum((home / split / n).stat().st_size for n in names) + shards * size) / 1e9


def make(corpus: Corpus, **changes: Any) -> Loader:
    options: dict[str, Any] = {
        "seq_length": S, "global_batch_size": 8, "micro_batch_size": 4, "dp_rank": 0, "dp_size": 1,
        "seed": 1, "shuffle_shards": 2,
    }  # fmt: skip
    return Loader([(corpus, 1.0)], **(options | changes))


def assert_equal(a: list[MicroBatch], b: list[MicroBatch]) -> None:
    for left, right in zip(a, b, strict=True):
        for name in ("tokens_BS", "labels_BS", "positions_BS", "documents_BS", "sample_ids_B"):
            assert torch.equal(getattr(left, name), getattr(right, name)), name


class Watch:
    """Samples the size of a cache from a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.largest, self.samples, self.done = folder, 0, 0, threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        while not self.done.is_set():
            # Meanwhile nothing is deleted to make room for something else, which would count too.
            lock = self.folder / ".cache" / "locks" / "room"
            with ExitStack() as stack:
                if lock.exists():
                    fcntl.flock(stack.enter_context(open(lock)), fcntl.LOCK_EX)
                self.largest = max(self.largest, size_of(self.folder))
            self.samples += 1
            time.sleep(0.01)  # Others want the lock too.

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


@pytest.mark.parametrize(
    ("order", "shards"),
    [({"shuffle_shards": 2}, 4), ({"shuffle": False}, 2), ({"shuffle_shards": 0}, None)],
    ids=["blocks", "in order", "whole"],
)
def test_the_same_batches_from_a_remote(
    home: Path, tmp_path: Path, order: dict[str, Any], shards: int | None
) -> None:
    bound = None if shards is None else room(home, shards)
    local, cached = Corpus(home / "train"), tmp_path / "cache"
    far = RemoteCorpus(cached, str(home / "train"), bound)
    assert far.fingerprint == local.fingerprint
    plain, loader = make(local, **order), make(far, **order)
    steps = 2 * -(-plain.num_windows[0] // 8)
    with closing(loader), Watch(cached) as watch:
        for step in range(steps):
            assert_equal(loader.batch(step), plain.batch(step))
            loader.prefetch(step + 1)
    assert watch.samples > 3
    here = len(list(cached.glob("shard.*")))
    if bound is None or shards is None:
        assert here == NUM_SHARDS
    else:
        whole = size_of(home / "train")
        assert watch.largest <= bound * 1e9 < whole and here <= shards
        assert loader.check_state(plain.state(steps)) is None
        # Any step can be read next, as a resume does.
        far = RemoteCorpus(cached, str(home / "train"), bound)
        with closing(make(far, **order)) as loader:
            for step in (steps - 3, 1, 30):
                assert_equal(loader.batch(step), plain.batch(step))


def test_ranks_read_the_same_samples(home: Path) -> None:
    local = Corpus(home / "train")
    for step in (0, 7, 70):
        parts = [make(local, dp_rank=r, dp_size=2).batch(step)[0] for r in range(2)]
        assert_equal(make(local).batch(step), parts)


def test_blocks_need_only_their_shards(home: Path, tmp_path: Path) -> None:
    corpus = RemoteCorpus(tmp_path / "cache", str(home / "train"), room(home, 4))
    loader = make(corpus)
    with closing(loader):
        loader.batch(0)
        wait_until(lambda: len(list((tmp_path / "cache").glob("shard.*"))) == 4)
        time.sleep(0.1)
        block, following = loader.orders[0].blocks(0, 0)
        assert cached_shards(tmp_path / "cache") == sorted((*block, *following))


def cached_shards(folder: Path) -> list[int]:
    return sorted(int(file.name[6:11]) for file in folder.glob("shard.*"))


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_validation_reads_ahead_in_order(home: Path, tmp_path: Path) -> None:
    local = Corpus(home / "val")
    bound = room(home, 2, "val")
    for samples in (0, 3):
        cache = tmp_path / f"cache{samples}"
        with closing(RemoteCorpus(cache, str(home / "val"), bound)) as corpus, Watch(cache) as w:
            options = {"seq_length": S, "micro_batch_size": 4, "max_samples": samples}
            batches = list(validation_batches(corpus, **options))
            assert_equal(batches, list(validation_batches(local, **options)))
        assert w.largest <= bound * 1e9
        if samples:
            assert cached_shards(cache) == [0, 1]


def test_least_recently_needed_goes_first(home: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with closing(RemoteCorpus(cache, str(home / "train"), room(home, 5))) as corpus:
        for block in ([0, 1], [2, 3], [0], [4], [5]):
            corpus.follow([block])
            for k in block:
                assert corpus.shards[k].size
        # 1, 2, 3 were needed less recently than 0.
        assert cached_shards(cache) == [0, 2, 3, 4, 5]
        corpus.follow([[6, 7]])
        assert corpus.shards[6].size and corpus.shards[7].size
        assert cached_shards(cache) == [0, 4, 5, 6, 7]


@pytest.mark.parametrize("order", [{"shuffle_shards": 3}, {"shuffle": False}])
def test_a_bound_that_is_too_small_names_the_least(
    home: Path, tmp_path: Path, order: dict[str, Any]
) -> None:
    def open_with(bound: float) -> Loader:
        return make(RemoteCorpus(tmp_path / "cache", str(home / "train"), bound), **order)

    for bound in (1e-5, room(home, 1), *([room(home, 5)] if "shuffle" not in order else [])):
        with pytest.raises(ConfigError) as caught:
            open_with(bound)
    least = named_bound(caught)
    with closing(open_with(least)) as loader:
        for step in range(20):
            loader.batch(step)
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "cache"))):
        open_with(least - 2e-6)


def named_bound(caught: pytest.ExceptionInfo[ConfigError]) -> float:
    found = re.search(r"raise cache_gb to (\S+) or more", str(caught.value))
    assert found is not None
    return float(found[1])


# ------------------------------------------------------------------------------------------- damage


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "damaged": (damage, "does not match its hash"),
    "truncated": (truncate, "bytes instead of"),
    "vanished": (Path.unlink, "is missing"),
}


@contextmanager
def mended_after(attempts: int, file: Path, original: Path) -> Iterator[Counter[str]]:
    """Let a remote file be whole again after some downloads of it, all of which are counted."""
    from streaming.base.storage import LocalDownloader

    counts: Counter[str] = Counter()
    download = LocalDownloader.download

    def counting(self: Any, remote: str, local: str, timeout: float) -> None:
        counts[Path(remote).name] += 1
        if Path(remote) == file and counts[file.name] > attempts:
            shutil.copy(original, file)
        download(self, remote, local, timeout)

    LocalDownloader.download = counting
    try:
        yield counts
    finally:
        LocalDownloader.download = download


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_that_passes_is_got_over(
    home: Path, far: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    shard = far / "train" / "shard.00003.mds"
    break_it, text = FAULTS[kind]
    break_it(shard)
    corpus = RemoteCorpus(tmp_path / "cache", str(far / "train"))
    with (
        mended_after(2, shard, home / "train" / shard.name) as counts,
        closing(make(corpus, shuffle_shards=0)) as loader,
    ):
        plain = make(Corpus(home / "train"), shuffle_shards=0)
        for step in range(plain.num_windows[0] // 8):
            assert_equal(loader.batch(step), plain.batch(step))
    assert counts[shard.name] == 3
    assert f"{shard} " in caplog.text and text in caplog.text and "attempt 3 of 3" in caplog.text


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_that_stays_is_one_clear_error(far: Path, tmp_path: Path, kind: str) -> None:
    shard = far / "train" / "shard.00003.mds"
    break_it, text = FAULTS[kind]
    break_it(shard)
    corpus = RemoteCorpus(tmp_path / "cache", str(far / "train"), room(far, 4))
    pattern = rf"{shard} .*{text}.* after 3 attempt\(s\).*copy it there again"
    with closing(make(corpus)) as loader, pytest.raises(DataError, match=pattern):
        for step in range(100):
            loader.batch(step)
            loader.prefetch(step + 1)
    assert cached_shards(tmp_path / "cache").count(3) == 0
    assert not list((tmp_path / "cache" / ".cache" / "fetching").iterdir())


@pytest.mark.parametrize("name", ["manifest.json", "index.json", "documents.npy"])
def test_what_describes_the_corpus_must_be_whole(far: Path, tmp_path: Path, name: str) -> None:
    (far / "train" / name).write_bytes(b"{")
    with pytest.raises(DataError, match=rf"{far / 'train' / name} .*after 3 attempt"):
        RemoteCorpus(tmp_path / "cache", str(far / "train"))
    (far / "train" / name).unlink()
    with pytest.raises(DataError, match=rf"{far / 'train' / name} is missing"):
        RemoteCorpus(tmp_path / "cache", str(far / "train"))


def test_a_cache_is_used_again_and_checked(far: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def read_all(verify: bool) -> Counter[str]:
        with (
            mended_after(99, Path(), Path()) as counts,
            closing(RemoteCorpus(cache, str(far / "train"), verify=verify)) as corpus,
        ):
            whole = corpus.read(0, corpus.num_tokens)
            assert (whole == Corpus(far / "train").read(0, corpus.num_tokens)).all()
        return +Counter({name: n for name, n in counts.items() if name.startswith("shard")})

    assert read_all(True) == Counter(file.name for file in (far / "train").glob("shard.*"))
    assert not read_all(True) and not read_all(False)
    damage(cache / "shard.00004.mds")
    truncate(cache / "shard.00005.mds")
    (cache / "shard.00006.mds").unlink()
    assert sorted(read_all(True)) == [f"shard.0000{k}.mds" for k in (4, 5, 6)]


def test_what_a_killed_download_left_is_cleaned_up(home: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    RemoteCorpus(cache, str(home / "train"))
    left = cache / ".cache" / "fetching" / "shard.00001.mds" / "1"
    running = left.parents[1] / "shard.00002.mds" / "1"
    for folder in (left, running):
        folder.mkdir(parents=True)
        (folder / "shard.mds.tmp").write_bytes(bytes(5000))
    files = CachedFiles(cache, str(home / "train"))
    with files.hold("shard.00002.mds.fetch"):
        RemoteCorpus(cache, str(home / "train"))
        assert not left.parent.exists() and running.exists()
    # Here too, where room is wanted while the run goes on.
    corpus = RemoteCorpus(cache, str(home / "train"), room(home, 2))
    left.mkdir(parents=True)
    (left / "shard.mds.tmp").write_bytes(bytes(5000))
    with closing(corpus):
        corpus.follow([[3, 4]])
        assert corpus.shards[3].size and corpus.shards[4].size
    assert not left.parent.exists()


def test_shards_that_others_need_stay_unless_a_reader_starves(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, bound = tmp_path / "cache", room(home, 2)
    first, second = (RemoteCorpus(cache, str(home / "train"), bound) for _ in range(2))
    with closing(first), closing(second):
        first.follow([[0, 1]])
        kept = [first.shards[k] for k in (0, 1)]
        expected = [array.copy() for array in kept]
        reader = threading.Thread(target=lambda: second.read(second.starts[5], 10))
        second.follow([[5]])
        reader.start()
        time.sleep(0.2)
        assert reader.is_alive() and cached_shards(cache) == [0, 1]
        first.follow([[1]])
        reader.join(10)
        assert not reader.is_alive() and cached_shards(cache) == [1, 5]
        monkeypatch.setattr(remote_module, "STARVING", 0.1)
        second.follow([[7, 8]])
        assert second.shards[7].size and second.shards[8].size
        # What was mapped stays readable.
        assert all((a == b).all() for a, b in zip(kept, expected, strict=True))
        assert (first.read(first.starts[1], 100) == expected[1][:100]).all()


def test_folders_that_are_not_caches_are_refused(far: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds a corpus of its own.*empty folder"):
        RemoteCorpus(far / "val", str(far / "train"))
    RemoteCorpus(tmp_path / "cache", str(far / "train"))
    with pytest.raises(DataError, match=r"caches another corpus .*empty the folder"):
        RemoteCorpus(tmp_path / "cache", str(far / "val"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be a cache"):
        RemoteCorpus(tmp_path / "file", str(far / "train"))
    with pytest.raises(DataError, match="quux://a: cannot be read"):
        RemoteCorpus(tmp_path / "other", "quux://a")


def test_a_reader_does_not_wait_for_ever(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "PATIENCE", 0.2)
    corpus = RemoteCorpus(tmp_path / "cache", str(home / "train"))
    lock = corpus.shards._files.lock("shard.00000.mds.fetch", fcntl.LOCK_EX)
    assert lock is not None
    with closing(corpus), pytest.raises(DataError, match=r"shard.00000.mds did not arrive in 0.2"):
        corpus.read(0, 10)
    os.close(lock)
    with pytest.raises(DataError, match="before the run ended"):
        corpus.read(0, 10)


# ------------------------------------------------------------------------------------------ configs


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({"train": [{"path": "c", "remote": "s3://b/c", "cache_gb": 1}]},
         ("train.0.cache_gb=1", "shuffle_shards")),
        ({"train": [{"path": "c", "cache_gb": 1}]}, ("cache_gb=1", "remote")),
        ({"train": [{"path": "c", "remote": "http://b/c"}]}, ("http://", "s3, gs, sftp, hf")),
        ({"train": [{"path": "c"}], "shuffle": False, "shuffle_shards": 3},
         ("shuffle_shards=3", "shuffle=true")),
        ({"train": [{"path": "c", "remote": "s3://b/c"}], "val": [{"path": "c"}]},
         ("path=c", "a folder of its own")),
    ],
)  # fmt: skip
def test_configs_that_cannot_be(data: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(data={"val": [], **data})
    for part in parts:
        assert part in str(caught.value)


def test_check_downloads_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megarecur.launch.cli import main

    (tmp_path / "config.yaml").write_text(to_yaml(cached_run(home, tmp_path)))
    monkeypatch.setattr(sys, "argv", ["megarecur", "check", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code and "tokens" in capsys.readouterr().out
    assert not (tmp_path / "cache").exists()


# --------------------------------------------------------------------------------------------- runs


def cached_run(far: Path, folder: Path, remote: bool = True, **sections: Any) -> Config:
    """A run of more than an epoch in blocks of two shards, through caches that hold two of them."""
    sources = {
        split: [
            {"path": f"{folder}/cache/{split}", "remote": f"{far}/{split}",
             "cache_gb": room(far, 4 if split == "train" else 2, split)}
            if remote else {"path": f"{far}/{split}"}
        ]
        for split in ("train", "val")
    }  # fmt: skip
    model = {"hidden_size": 16, "num_heads": 2, "num_kv_heads": 1, "ffn_hidden_size": 16}
    changes = {
        "model": model,
        "recurrence": {"kind": "reuse_map", "reuse_map": [1]},
        "data": {**sources, "seq_length": S, "shuffle_shards": 2, "mask_documents": False},
        "train": {"steps": 20, "global_batch_size": 16, "micro_batch_size": 8, "eval_samples": 8},
        "checkpoint": {"every": 5, "keep_last": 9},
    }
    for name, update in sections.items():
        changes[name] = {**changes.get(name, {}), **update}
    return make_config(run_dir=str(folder / "run"), **changes)


def train_and_val_losses(folder: Path) -> dict[int, tuple[float, ...]]:
    """Losses, of training and validation, by step."""
    rows = read_rows(folder / "run" / "metrics.jsonl")
    return {
        row["step"]: tuple(row[k] for k in ("train/loss", "val/loss") if k in row) for row in rows
    }


@pytest.fixture(scope="module")
def straight(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from local shards."""
    folder = tmp_path_factory.mktemp("straight")
    assert train(cached_run(home, folder, remote=False)) == FINISHED
    return folder


def die_at_step_8(config: Config) -> None:
    """Train in a process of its own, which is killed."""
    original = Loader.batch

    def batch(self: Loader, step: int) -> list[MicroBatch]:
        if step == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, step)

    Loader.batch = batch  # type: ignore[method-assign]
    train(config)


@pytest.fixture(scope="module")
def killed(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, and of its caches, that was killed."""
    folder = tmp_path_factory.mktemp("killed")
    process = fork_context().Process(target=die_at_step_8, args=(cached_run(home, folder),))
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL
    assert 1 <= len(cached_shards(folder / "cache" / "train")) <= 4
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("emptied", [False, True], ids=["warm", "emptied"])
def test_a_run_is_killed_and_goes_on(
    home: Path, straight: Path, killed: Path, tmp_path: Path, emptied: bool
) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "killed"))
    if emptied:
        shutil.rmtree(folder / "cache")
    config = cached_run(home, folder)
    with Watch(folder / "cache" / "train") as watch:
        assert train(config) == FINISHED
    assert train_and_val_losses(folder) == train_and_val_losses(straight)
    bound = config.data.train[0].cache_gb
    assert bound is not None and 0 < watch.largest <= bound * 1e9 < size_of(home / "train")


def test_order_is_part_of_the_run(home: Path, straight: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.shuffle_shards: 3"):
        train(cached_run(home, straight, remote=False, data={"shuffle_shards": 3}))


def train_counting(config: Config, watched: str) -> tuple[int, Counter[str], int, list[list[int]]]:
    """On a rank: exit code, its downloads of each shard, largest size of a cache, ids it read."""
    ids: list[list[int]] = []
    original = Loader.batch

    def batch(self: Loader, step: int) -> list[MicroBatch]:
        found = original(self, step)
        ids.append([i for each in found for i in each.sample_ids_B.tolist()])
        return found

    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        hurry(patch)
        patch.setattr(remote_module, "STARVING", 1e9)  # It takes no force to go on.
        patch.setattr(Loader, "batch", batch)
        remote_module.make_torchvision_importable()
        counts = stack.enter_context(mended_after(99, Path(), Path()))
        watch = stack.enter_context(Watch(Path(watched)))
        return train(config), counts, watch.largest, ids


@pytest.mark.slow
def test_two_ranks_share_a_cache(world: Any, home: Path, straight: Path, tmp_path: Path) -> None:
    """Losses and samples are those of one process."""
    config = cached_run(home, tmp_path)
    cache = tmp_path / "cache" / "train"
    results = world(2).run(train_counting, config, str(cache))
    assert [code for code, *_ in results] == [FINISHED, FINISHED]
    bound = config.data.train[0].cache_gb
    assert bound is not None
    assert all(0 < largest <= bound * 1e9 for *_, largest, _ in results)
    ids = [a + b for a, b in zip(*(read for *_, read in results), strict=True)]
    assert ids == [list(range(16 * step, 16 * step + 16)) for step in range(20)]
    for step, values in train_and_val_losses(straight).items():
        assert train_and_val_losses(tmp_path)[step] == pytest.approx(values, rel=1e-4)


def test_two_ranks_download_each_shard_once(world: Any, home: Path, tmp_path: Path) -> None:
    train_cache, val = f"{tmp_path}/cache", [{"path": f"{home}/val"}]
    data = {"train": [{"path": train_cache, "remote": f"{home}/train"}], "val": val}
    config = cached_run(home, tmp_path, data={**data, "shuffle_shards": 0}, train={"steps": 4})
    results = world(2).run(train_counting, config, train_cache)
    counts = results[0][1] + results[1][1]
    shards = {name: n for name, n in counts.items() if name.startswith("shard")}
    assert shards == dict.fromkeys((f"shard.0000{k}.mds" for k in range(NUM_SHARDS)), 1)


def fail_to_train(config: Config) -> tuple[int, str, float]:
    """On a rank, through the command line: exit code, what it said, and seconds."""
    import contextlib
    import io

    from megarecur.launch.cli import main

    path = Path(config.run_dir).parent / f"config-{os.getpid()}.yaml"
    path.write_text(to_yaml(config))
    text = io.StringIO()
    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(text):
        hurry(patch)
        patch.setattr(sys, "argv", ["megarecur", "train", str(path)])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0), text.getvalue(), time.monotonic() - started


@pytest.mark.parametrize(
    ("split", "kind"),
    [
        ("train", "vanished"),
        ("val", "damaged"),
        *(
            pytest.param(split, kind, marks=pytest.mark.slow)
            for split, kind in (("train", "damaged"), ("train", "truncated"), ("val", "truncated"),
                                ("val", "vanished"))
        ),
    ],
)  # fmt: skip
def test_a_fault_that_stays_ends_every_rank(
    world: Any, far: Path, tmp_path: Path, split: str, kind: str
) -> None:
    """Only one rank of two reads the shard of the fault in validation."""
    shard = far / split / ("shard.00003.mds" if split == "train" else "shard.00001.mds")
    break_it, text = FAULTS[kind]
    config = cached_run(far, tmp_path, train={"eval_every": 3, "eval_samples": 64, "steps": 40})
    break_it(shard)
    for code, message, seconds in world(2).run(fail_to_train, config):
        assert code == 2, message
        message = message[message.index("error: ") :]  # After warnings of the first two attempts.
        assert "Traceback" not in message
        assert str(shard) in message and text in message and "3 attempt(s)" in message
        assert seconds < 30
    json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
