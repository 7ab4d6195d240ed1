"""The curves of runs that were killed and resumed, as TensorBoard reads them."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support.boards import assert_one_line, curves_of, open_board
from support.configs import make_config
from support.harness import fork_context

from megarecur.launch import status
from megarecur.launch.queue import Queue
from megarecur.train.metrics import Metrics, read_rows


def train_run(corpus: Path, run_dir: Path, **sections: Any) -> int:
    """In a second of its own, as real runs are: one of the same second renames the file before,
    which a board that is reading it would lose."""
    from megarecur.train.trainer import train

    while any(run_dir.glob(f"tensorboard/events.out.tfevents.{int(time.time())}.*")):
        time.sleep(0.05)
    sections = {"checkpoint": {"every": 4}, **sections}
    scoring = {"eval_every": 2, "eval_samples": 8, "sample_prompts": ["def"], "sample_tokens": 2}
    sections["train"] = {"steps": 100_000} | scoring | sections["train"]
    return train(make_config(corpus, run_dir=str(run_dir), **sections))


def scalars_of(folder: Path) -> dict[str, list[int]]:
    """Steps by tag as the older reader of scripts has them, which forgets scalars but no texts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def served_curves(folder: Path) -> dict[str, list[int]]:
    """Steps by tag as the data server has them, which TensorBoard starts where it is installed."""
    from tensorboard.context import RequestContext
    from tensorboard.data.server_ingester import (
        NoDataServerError,
        SubprocessServerDataIngester,
        get_server_binary,
    )
    from tensorboard.util.grpc_util import ChannelCredsType

    try:
        binary = get_server_binary()
    except NoDataServerError:
        pytest.skip("TensorBoard's data server is not installed")
    server = SubprocessServerDataIngester(
        binary, str(folder), reload_interval=1, channel_creds_type=ChannelCredsType.LOCAL
    )
    try:
        server.start()
        what = {"experiment_id": "", "downsample": 10**6}
        until, found = time.monotonic() + 200, {}
        while not found and time.monotonic() < until:
            time.sleep(0.1)
            found = dict(
                server.data_provider.read_scalars(RequestContext(), plugin_name="scalars", **what)
            )
        texts = server.data_provider.read_tensors(RequestContext(), plugin_name="text", **what)
        both = [(tag, points) for runs in (found, texts) for tags in runs.values()
                for tag, points in tags.items()]  # fmt: skip
        return {tag: [point.step for point in points] for tag, points in both}
    finally:
        server._stdin_handle.close()  # It ends by this.


def end_early(
    run_dir: Path, corpus: Path, at: str, step: int, drawn: bool = False, **train: int
) -> None:
    """Train until a row with this key is to be written at or after a step: it is not written, or
    only to TensorBoard."""

    def draw(self: Metrics, now: int, values: dict[str, float]) -> None:
        ends = at in values and now >= step
        if drawn or not ends:
            original(self, now, values)
        if ends:
            raise SystemExit

    original = Metrics.draw
    with mock.patch.object(Metrics, "draw", draw), pytest.raises(SystemExit):
        train_run(corpus, run_dir, train=train)


def kill(run_dir: Path, corpus: Path) -> None:
    """Train in a process of its own and kill it after some steps; `megarecur status` notices."""
    process = fork_context().Process(target=train_run, args=(corpus, run_dir), kwargs={"train": {}})
    process.start()
    while process.is_alive() and not (
        checkpoint_steps(run_dir)
        and any(row["step"] >= 7 for row in read_rows(run_dir / "metrics.jsonl"))
    ):
        time.sleep(0.01)
    alive = status.read_status(run_dir, Queue())
    process.kill()
    process.join()
    dead = status.read_status(run_dir, Queue())
    assert alive.state == "running" and f"process {process.pid} of this machine" in alive.why
    assert dead.state == "ended" and dead.step >= 7 and dead.tokens_per_second > 0


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tensorboard_shows_one_line_over_restarts(corpus, tmp_path, killed: bool) -> None:
    """Ended, resumed, resumed again from the same checkpoint, ended while a step is scored."""
    folder = tmp_path / "tensorboard"
    # As TensorBoard reads several files: one after the other, or all of them again and again.
    boards = [open_board(folder), open_board(folder, event_file_active_filter=lambda _: True)]
    if killed:
        kill(tmp_path, corpus)
    else:
        end_early(tmp_path, corpus, "train/loss", 8)
    for board in boards:
        curves_of(board)  # TensorBoard has seen the rows that will be repeated.
    saved = checkpoint_steps(tmp_path)[-1]
    for _ in range(2):
        drop_checkpoints(tmp_path, saved)
        assert train_run(corpus, tmp_path, train={"steps": saved + 3}) == 0
        for board in boards:
            assert_one_line(board, tmp_path)
    drop_checkpoints(tmp_path, saved)
    longer = {"steps": saved + 4, "eval_every": 4}
    # The texts of this step are written, its scores are not, or only to TensorBoard.
    for drawn in (False, True):
        end_early(tmp_path, corpus, "val/loss", saved + 4, drawn, **longer)
    assert train_run(corpus, tmp_path, train=longer) == 0
    for board in [*boards, open_board(folder)]:
        assert_one_line(board, tmp_path)


def checkpoint_steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-????????"))


def drop_checkpoints(run: Path, after: int) -> None:
    """Forget the checkpoints after a step, as if the run had died before."""
    for step in checkpoint_steps(run):
        if step > after:
            shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    (run / "checkpoints" / "latest").unlink(missing_ok=True)


def test_event_files_are_read_in_order_though_a_clock_was_ahead(tmp_path) -> None:
    config = make_config()
    for ahead, step in ((0, 0), (3600, 4), (0, 4), (0, 4), (1800, 8), (0, 8)):
        now = time.time() + ahead
        with mock.patch("time.time", lambda now=now: now):
            metrics = Metrics(tmp_path, config, step)
            for each in range(step + 1, step + 8):
                metrics.write(each, each, {"train/loss": 1.0})
            metrics.close()
        assert_one_line(open_board(tmp_path / "tensorboard"), tmp_path)
    assert scalars_of(tmp_path / "tensorboard") == {"train/loss": list(range(1, 16))}
    served = served_curves(tmp_path / "tensorboard")
    assert served == {"train/loss": list(range(1, 16)), "config/text_summary": [1, 5, 9]}
