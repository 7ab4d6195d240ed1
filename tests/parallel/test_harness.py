"""The harness itself: it must say what went wrong, and where, and then go on."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from support.harness import WorldError, assert_gradients_close


def sum_of_ranks(tensor):
    tensor = tensor + dist.get_rank()
    dist.all_reduce(tensor)
    return os.getpid(), tensor


def raise_on(rank):
    if dist.get_rank() == rank:
        raise ValueError("planted")
    dist.barrier()


def hang_on(rank):
    if dist.get_rank() == rank:
        sleep_soundly()
    dist.barrier()


def sleep_soundly():
    time.sleep(1000)


def die_on(rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def test_world_is_started_once(world):
    first = world(2).run(sum_of_ranks, torch.ones(3))
    second = world(2).run(sum_of_ranks, torch.zeros(3))
    assert [pid for pid, _ in first] == [pid for pid, _ in second]
    assert all(torch.equal(total, torch.full((3,), 3.0)) for _, total in first)


def test_exception_names_rank_and_line_and_world_recovers(world):
    with pytest.raises(WorldError, match=r"(?s)rank 1 of 2: Traceback.*raise_on.*planted"):
        world(2).run(raise_on, 1)
    assert len(world(2).run(sum_of_ranks, torch.ones(1))) == 2


def test_hang_shows_the_stacks_of_every_rank(world):
    with pytest.raises(WorldError) as caught:
        world(2).run(hang_on, 0, timeout=1.0)
    rank_0, rank_1 = str(caught.value).split("--- rank 1")
    assert "still running" in rank_0 and "sleep_soundly" in rank_0
    assert "barrier" in rank_1 and "hang_on" in rank_1
    assert len(world(2).run(sum_of_ranks, torch.ones(1))) == 2


def test_death_is_reported(world):
    with pytest.raises(WorldError, match=r"rank 1 of 2: died with exit code -9"):
        world(2).run(die_on, 1)


def gradients():
    generator = torch.Generator().manual_seed(0)
    return {
        "large": 100 * torch.randn(8, 8, generator=generator),
        "small": 1e-3 * torch.randn(8, generator=generator),
        "zero": torch.zeros(4),
    }


def test_gradients_equal_up_to_rounding_are_close():
    noisy = {name: g * (1 + 1e-7) + 1e-9 for name, g in gradients().items()}
    assert_gradients_close(noisy, gradients(), tol=2e-6)


@pytest.mark.parametrize(
    "fault",
    [
        lambda g: g | {"large": g["large"] / 2},  # a shared gradient divided per stage
        lambda g: g | {"large": g["large"] * 0.75},  # one of four microbatches dropped
        lambda g: g | {"zero": torch.full((4,), 1.0)},  # should not have been reached
        lambda g: g | {"large": g["large"].clone().index_fill_(0, torch.tensor(0), 0.0)},
        lambda g: g | {"small": torch.full((8,), float("nan"))},
    ],
)
def test_planted_faults_are_named(fault):
    faulty = fault(gradients())
    (name,) = [n for n, g in gradients().items() if not torch.equal(g, faulty[n])]
    with pytest.raises(AssertionError, match=rf"1 of 3 gradients.*\n  {name}: "):
        assert_gradients_close(faulty, gradients(), tol=2e-6)


def test_missing_gradient_is_named():
    with pytest.raises(AssertionError, match=r"missing \['small'\]"):
        assert_gradients_close(
            {k: g for k, g in gradients().items() if k != "small"}, gradients(), 1
        )
