"""Rules about `train.attention`, and which attention backends support a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from megarecur.config.rule import Rule
from megarecur.config.run import Config

Backend = Literal["dense", "segments", "varlen", "flex"]

PREFERRED: dict[str, tuple[Backend, ...]] = {
    "cpu": ("segments",),
    "cuda": ("varlen", "flex", "segments"),
}
"""Backends of attention by device, the fastest first. `segments` runs every config."""


def pick_backend(c: Config, device: str) -> Backend:
    """Return the backend that a run uses on a kind of device (cpu, cuda): the one that
    `train.attention` names, or the first that supports the config."""
    if c.train.attention != "auto":
        return c.train.attention
    fitting = (b for b in PREFERRED[device] if not find_attention_obstacle(c, b, device))
    return next(fitting)


def find_attention_obstacle(c: Config, backend: str, device: str) -> str:
    """Return why a backend of attention cannot run a config on a device, "" if it can.

    Args:
        c: the run.
        backend: value of `train.attention`.
        device: cpu, cuda, or auto for a device that is not known yet.
    """
    model = c.model
    if backend not in ("varlen", "flex"):
        return ""
    if device == "cpu":
        return "it needs a GPU, and the run is on train.device=cpu"
    if rate := model.attention_dropout:
        return f"it has no dropout as a function of coordinates (model.attention_dropout={rate})"
    if c.train.precision == "fp64":
        return "it has no train.precision=fp64"
    if backend == "flex":
        return ""
    if c.train.precision != "bf16":
        return f"its kernel needs train.precision=bf16, not {c.train.precision}"
    if model.attention_softcap is not None:
        return f"it has no softcap (model.attention_softcap={model.attention_softcap})"
    if model.positions == "alibi":
        return "it has no bias of scores (model.positions=alibi)"
    if model.head_dim % 8 or model.head_dim > 256:
        return f"its kernel needs a head_dim that 8 divides, at most 256, not {model.head_dim}"
    return ""


def find_asked_obstacle(c: Config) -> Mapping[str, object]:
    """Return why `train.attention` cannot run, if it cannot."""
    cause = find_attention_obstacle(c, c.train.attention, c.train.device)
    return {"cause": cause} if cause else {}


ATTENTION_RULES = (
    Rule(
        keys=(
            "train.attention", "train.device", "train.precision", "model.attention_dropout",
            "model.attention_softcap", "model.positions", "model.head_dim",
        ),
        when=find_asked_obstacle,
        reason="train.attention={train.attention}: {cause}",
        remedy="set attention to auto, or change the other key",
    ),
)  # fmt: skip
