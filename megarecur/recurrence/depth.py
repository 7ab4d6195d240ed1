"""Sample the depth of an optimizer step: a pure function of (config, seed, step).

Every rank computes the same value, a resumed run repeats the same sequence, and no state is stored.
A draw maps one or two hashed uniform numbers through the inverse distribution function.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from statistics import NormalDist
from typing import NamedTuple

from megarecur.config.base import MOST_BLOCKS, MOST_STEPS
from megarecur.config.depth import (
    AroundMean,
    DepthCurriculum,
    Poisson,
    PoissonLogNormal,
    Split,
    Uniform,
)
from megarecur.config.mistakes import show_value
from megarecur.config.recurrence import Looped, RecurrenceConfig
from megarecur.config.run import Config


class Depth(NamedTuple):
    """Number of loops in one optimizer step, by whether they carry gradient."""

    num_loops: int
    backward_loops: int
    """Number of last loops that carry gradient; the loops before them run forward only."""
    encoder_loops: int = 0
    """Number of loops of an encoder; 0 if it repeats no group of blocks."""
    encoder_backward: int = 0
    """Number of the encoder's last loops that carry gradient."""


def draw_depth(config: Config, step: int) -> Depth | None:
    """Return the depth of an optimizer step; None if no stack repeats a group of blocks."""
    own = sample_depth(config.recurrence, config.seed, step)
    if config.encoder is None:
        return own
    encoder = sample_depth(config.encoder, config.seed, step, "encoder ")
    if encoder is None:
        return own
    return Depth(*(own or (1, 1))[:2], *encoder[:2])


def draws_depth(config: Config) -> bool:
    """Return True if optimizer steps of a run differ in depth."""
    encoder = config.encoder is not None and is_sampled(config.encoder)
    return encoder or is_sampled(config.recurrence)


def sample_depth(
    recurrence: RecurrenceConfig, seed: int, step: int, stack: str = ""
) -> Depth | None:
    """Return the depth of a scheme in an optimizer step; None if it repeats no group of blocks.

    Args:
        stack: prefix of the names of random draws, if the scheme is not the decoder's.
    """
    if not isinstance(recurrence, Looped):
        return None
    loops = recurrence.num_loops
    if isinstance(loops, Split):
        backward = draw(loops.with_gradient, seed, step, f"{stack}with_gradient")
        total = backward + draw(loops.forward_only, seed, step, f"{stack}forward_only")
    else:
        total = draw(loops, seed, step, f"{stack}num_loops")
        backward = min(recurrence.backward_loops or total, total)
    curriculum = recurrence.curriculum
    if curriculum is not None and curriculum.over in ("forward", "both"):
        total = grow(total, curriculum, step)
    if curriculum is not None and curriculum.over in ("backward", "both"):
        backward = grow(backward, curriculum, step)
    return Depth(total, min(backward, total))


def default_depth(recurrence: Looped) -> Depth:
    """Return the depth of evaluation and plots: rounded means, after the whole curriculum."""
    loops = recurrence.num_loops
    if isinstance(loops, Split):
        backward = round_half_up(mean(loops.with_gradient))
        return Depth(backward + round_half_up(mean(loops.forward_only)), backward)
    total = max(round_half_up(mean(loops)), 1)
    return Depth(total, min(recurrence.backward_loops or total, total))


def refuse_depth(config: Config, num_loops: int) -> str:
    """Return why a model cannot run `num_loops` loops; "" if it can."""
    recurrence = config.recurrence
    if num_loops < 1:
        return f"depth {num_loops}: must be at least 1 loop"
    if not isinstance(recurrence, Looped):
        return f"depth {num_loops}: recurrence.kind={recurrence.kind} has no loops; omit the depth"
    most = recurrence.most_loops
    own = config.of_loops
    if own and most is not None and num_loops > most:
        return f"depth {num_loops}: {own} exist for {most} loops; set the depth to at most {most}"
    blocks = getattr(recurrence, "core", 0) or getattr(recurrence, "num_blocks", 1)
    if num_loops > (most := min(MOST_BLOCKS, MOST_STEPS // blocks)):
        return f"depth {show_value(num_loops)}: is too large; set the depth to at most {most}"
    return ""


def is_sampled(recurrence: RecurrenceConfig) -> bool:
    """Return True if optimizer steps differ in depth."""
    if not isinstance(recurrence, Looped):
        return False
    return recurrence.curriculum is not None or not isinstance(recurrence.num_loops, int)


def count_depths(config: Config, most: int = 2000) -> dict[Depth | None, float]:
    """Return the depths of a run and the share of steps of each, from at most `most` steps."""
    if not draws_depth(config):
        return {draw_depth(config, 0): 1.0}
    num_steps = config.train.steps
    stride = -(-num_steps // most)
    found = Counter(draw_depth(config, step) for step in range(0, num_steps, stride))
    return {depth: count / found.total() for depth, count in found.items()}


# -------------------------------------------------------------------------------------- drawing


def draw(number: int | Uniform | AroundMean, seed: int, step: int, name: str) -> int:
    """Return `number` itself, or an integer drawn from the sampler by (seed, step, name)."""
    if isinstance(number, int):
        return number
    u, v = uniform_pair(seed, step, name)
    if isinstance(number, Uniform):
        return number.min + int(u * (number.max - number.min + 1))
    assert isinstance(number, AroundMean)
    rate = number.mean - number.min
    if isinstance(number, PoissonLogNormal):
        rate *= math.exp(number.sigma * NormalDist().inv_cdf(v) - number.sigma**2 / 2)
    most = MOST_BLOCKS if number.max is None else number.max
    # The rate is so high that any k will do, or so low that k is 0.
    rate = min(max(rate, 1e-300), 4.0 * MOST_BLOCKS)
    return min(number.min + inverse_poisson(u, rate), most)


def uniform_pair(seed: int, step: int, name: str) -> tuple[float, float]:
    """Return two numbers strictly between 0 and 1, of 52 bits each."""
    digest = hashlib.blake2b(f"depth {name} {seed} {step}".encode(), digest_size=16).digest()
    halves = (int.from_bytes(half, "little") >> 12 for half in (digest[:8], digest[8:]))
    u, v = ((half + 0.5) / 2**52 for half in halves)
    return u, v


def inverse_poisson(u: float, rate: float) -> int:
    """Return the least k with P(Poisson(rate) <= k) >= u, summed from log probabilities."""
    k, below, log_rate = 0, 0.0, math.log(rate)
    most = int(rate + 40 * math.sqrt(rate) + 40)  # beyond it, sums stop growing
    while k < most:
        below += math.exp(k * log_rate - rate - math.lgamma(k + 1))
        if below >= u:
            break
        k += 1
    return k


def mean(number: int | Uniform | AroundMean) -> float:
    """Return the mean of a number or sampler, ignoring caps."""
    if isinstance(number, AroundMean):
        return number.mean
    return (number.min + number.max) / 2 if isinstance(number, Uniform) else float(number)


def grow(loops: int, curriculum: DepthCurriculum, step: int) -> int:
    """Return the number of loops on the curriculum's way from `start` to `loops`."""
    share = min(step / curriculum.steps, 1.0)
    if curriculum.kind == "1-sqrt":
        share = 1 - math.sqrt(1 - share)
    return min(loops, curriculum.start + round_half_up((loops - curriculum.start) * share))


def round_half_up(value: float) -> int:
    """Round half up, where Python's `round` prefers even numbers: 2.5 to 3."""
    return math.floor(value + 0.5)


# ------------------------------------------------------------------------------------- in words


def describe_loops(recurrence: Looped) -> str:
    """Describe the loops in words, such as "4" or "uniform 1 to 7, the last 4 with gradient"."""
    loops = recurrence.num_loops
    if isinstance(loops, Split):
        text = (
            f"{describe_number(loops.forward_only)} forward only + "
            f"{describe_number(loops.with_gradient)} with gradient"
        )
    else:
        text = describe_number(loops)
    if recurrence.backward_loops is not None:
        text += f" (gradient through the last {recurrence.backward_loops})"
    if recurrence.curriculum is not None:
        curriculum = recurrence.curriculum
        text += f" ({curriculum.over} growing {curriculum.kind} over {curriculum.steps} steps)"
    return text


def describe_number(number: int | Uniform | Poisson | PoissonLogNormal) -> str:
    """Describe a number or sampler in words, such as "4" or "uniform 1 to 7"."""
    if isinstance(number, int):
        return str(number)
    if isinstance(number, Uniform):
        return f"uniform {number.min} to {number.max}"
    cap = "" if number.max is None else f", at most {number.max}"
    return f"{number.sampler.replace('_', '-')} of mean {number.mean:g}{cap}"
