"""What is not worth saving is never saved over what is: parameters that are not finite, or give no
finite gradient; and runs that are past their last step."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.configs import make_config

from megarecur.checkpoint import checkpoint
from megarecur.errors import ConfigError
from megarecur.train import trainer
from megarecur.train.signals import StopFlag
from megarecur.train.trainer import DIVERGED, FINISHED, STOPPED, train

LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "zero 1": {"zero_stage": 1},
    "zero 2": {"zero_stage": 2},
    "zero 3": {"zero_stage": 3},
    "pipeline": {"pipeline": 2},
    "tensor": {"tensor": 2},
}


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def steps_kept(run_dir: Path) -> list[int]:
    """Steps of the checkpoints, each found to hold finite numbers only."""
    found = checkpoint.list_checkpoints(run_dir / "checkpoints")
    return [checkpoint.step_of(path.name) for path in found]


def poison(value: float, entry: str) -> Any:
    """A config's engine that spoils one element of one rank's state after four optimizer steps."""
    build = trainer.build_engine

    def build_spoiled(*args: Any) -> Any:
        made, calls = build(*args), []
        step = made.step

        def spoil(lr: float) -> tuple[float, bool]:
            outcome = step(lr)
            calls.append(lr)
            last = dist.get_world_size() - 1 if dist.is_initialized() else 0
            if len(calls) == 4 and rank() == last:
                chunks = [chunk for name, shard in made.shards().items() if name.startswith(entry)
                          for _, _, chunk in shard.chunks if chunk.numel()]  # fmt: skip
                chunks[-1].view(-1)[0] = value
            return outcome

        made.step = spoil
        return made

    return mock.patch.object(trainer, "build_engine", build_spoiled)


def spoiled_run(
    corpus: str, run_dir: str, parallel: dict[str, Any], value: float, entry: str, log_every: int,
    action: str,
) -> int:  # fmt: skip
    config = make_config(
        corpus, run_dir=run_dir, data={"val": []}, parallel=parallel,
        train={"steps": 12, "log_every": log_every}, checkpoint={"every": 3, "keep_last": 5},
        alarms={"action": action, "loss_spike": None},
    )  # fmt: skip
    with poison(value, entry):
        return train(config)


NAN, INFINITY = float("nan"), float("inf")


def assert_nothing_saved(run: Path) -> None:
    assert steps_kept(run) == [3]
    event = (run / "events.jsonl").read_text().splitlines()[-1]
    assert "is not finite" in event and '"action": "stop"' in event


@pytest.mark.parametrize(
    ("value", "entry", "log_every"), [(NAN, "blocks.", 1), (INFINITY, "exp_avg_sq.", 100)]
)
def test_state_that_is_not_finite_is_never_saved(value, entry, log_every, corpus, tmp_path) -> None:
    code = spoiled_run(str(corpus), str(tmp_path), {}, value, entry, log_every, "warn")
    assert code == DIVERGED
    assert_nothing_saved(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_of_one_rank_that_is_not_finite(layout, corpus, tmp_path, world) -> None:
    parallel = LAYOUTS[layout]
    case = (str(corpus), str(tmp_path), parallel, NAN, "", 1, "warn")
    assert world(2).run(spoiled_run, *case) == [DIVERGED, DIVERGED]
    assert_nothing_saved(tmp_path)


@pytest.mark.parametrize("log_every", [4, 12])
def test_a_roll_back_leaves_it_behind(log_every, corpus, tmp_path) -> None:
    code = spoiled_run(str(corpus), str(tmp_path), {}, NAN, "blocks.", log_every, "roll_back")
    assert code == FINISHED and steps_kept(tmp_path)[-1] == 12
    assert '"from": "step-00000003"' in (tmp_path / "events.jsonl").read_text()


def refused_gradients(config: Any, bad: range, stop: StopFlag | None = None, at: int = 0) -> int:
    """Train with gradients of these steps (counted from 1) that are not finite."""
    forward_backward = trainer.forward_backward

    def spoil(model: Any, engine: Any, *args: Any) -> Any:
        result, step = forward_backward(model, engine, *args), args[2] + 1
        if step in bad:
            engine.flat[0] = torch.nan
        if stop is not None and step == at:
            stop.note(10, None)
        return result

    with mock.patch.object(trainer, "forward_backward", spoil):
        return train(config, stop or StopFlag())


@pytest.mark.parametrize("log_every", [1, 100])
def test_parameters_without_a_finite_gradient_replace_nothing(corpus, tmp_path, log_every) -> None:
    def config(name: str, **alarms: Any) -> Any:
        return make_config(
            corpus, run_dir=str(tmp_path / name), data={"val": []},
            train={"steps": 14, "log_every": log_every}, alarms=alarms,
            checkpoint={"every": 2, "keep_last": 2},
        )  # fmt: skip

    assert refused_gradients(config("lost"), range(6, 99)) == DIVERGED
    assert steps_kept(tmp_path / "lost") == [2, 4]
    text = (tmp_path / "lost" / "events.jsonl").read_text()
    assert "9 gradients" in text
    # One that recovers is saved with its next finite gradient, not at the next due step.
    assert refused_gradients(config("back"), range(6, 9)) == FINISHED
    assert steps_kept(tmp_path / "back") == [12, 14]
    stop = StopFlag()
    assert refused_gradients(config("stopped"), range(6, 99), stop, 12) == STOPPED
    assert steps_kept(tmp_path / "stopped") == [2, 4]


def test_a_single_lost_gradient_only_delays_a_checkpoint(corpus, tmp_path) -> None:
    config = make_config(
        corpus, run_dir=str(tmp_path), data={"val": []}, train={"steps": 9},
        checkpoint={"every": 4, "keep_last": 9},
    )  # fmt: skip
    assert refused_gradients(config, range(4, 6)) == FINISHED
    assert steps_kept(tmp_path) == [6, 8, 9]


def test_a_run_past_its_last_step_is_refused(corpus, tmp_path) -> None:
    def config(steps: int) -> Any:
        return make_config(
            corpus, run_dir=str(tmp_path), data={"val": []}, train={"steps": steps},
            checkpoint={"every": 2},
        )  # fmt: skip

    assert train(config(4)) == FINISHED
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for steps in (1, 3):
        with pytest.raises(ConfigError, match=rf"train\.steps={steps}: .* 4 steps .*at least 4"):
            train(config(steps))
    passing = ("lease", "heartbeat.json")
    changed = {p for p, data in files.items() if p.name not in passing and p.read_bytes() != data}
    assert not changed
    assert train(config(4)) == FINISHED and train(config(5)) == FINISHED
