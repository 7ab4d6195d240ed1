"""The choice of the attention backend: a pure function of the config and the device."""

from __future__ import annotations

from dataclasses import dataclass

from megarecur.config.rules_attention import PREFERRED, Backend, find_attention_obstacle
from megarecur.config.run import Config
from megarecur.errors import ConfigError

MEANINGS: dict[Backend, str] = {
    "dense": "scores of all pairs of tokens, hidden by a mask",
    "segments": "documents by themselves, grouped by length",
    "varlen": "documents by themselves, in one flash kernel",
    "flex": "documents by themselves, in one generated kernel",
}


@dataclass(frozen=True)
class Choice:
    """A backend of attention, and why it was chosen."""

    backend: Backend
    reason: str

    def describe(self) -> str:
        """Return a line about the choice."""
        return f"attention: {self.explain()}"

    def explain(self) -> str:
        """Return the backend, its meaning, and the reason."""
        return f"{self.backend} ({MEANINGS[self.backend]}), {self.reason}"


def choose_backend(config: Config, device: str) -> Choice:
    """Return the backend of a run on a kind of device (cpu, cuda).

    Raises:
        ConfigError: `train.attention` names a backend that cannot run here.
    """
    asked = config.train.attention
    if asked != "auto":
        if obstacle := find_attention_obstacle(config, asked, device):
            raise ConfigError(
                f"train.attention={asked}: {obstacle}; set attention to auto, or change the other "
                "key"
            )
        return Choice(asked, f"as train.attention={asked}")
    passed: list[str] = []
    for backend in PREFERRED.get(device, ("segments",)):
        obstacle = find_attention_obstacle(config, backend, device)
        if not obstacle:
            why = f"the fastest on {device}" + "".join(f"; not {name}" for name in passed)
            return Choice(backend, why + slow_part(config, backend, device))
        passed.append(f"{backend}: {obstacle}")
    raise AssertionError("segments runs every config")


def describe_choices(config: Config) -> list[str]:
    """Return a line about the choice on each device that the run may have.

    Raises:
        ConfigError: `train.attention` names a backend that can run on none of them.
    """
    asked, device = config.train.attention, config.train.device
    devices = ["cpu", "cuda"] if device == "auto" else [device]
    if asked != "auto":
        return [choose_backend(config, devices[-1]).explain()]
    return [choose_backend(config, device).explain() for device in devices]


def slow_part(config: Config, backend: Backend, device: str) -> str:
    """Return what no fused kernel computes, in words; "" if all is fused."""
    model, parts = config.model, []
    if backend != "segments":
        return ""
    if model.attention_dropout:
        parts.append(f"model.attention_dropout={model.attention_dropout}")
    if model.attention_softcap is not None:
        parts.append(f"model.attention_softcap={model.attention_softcap}")
    if device != "cpu":
        return "; scores are computed in PyTorch, in blocks of queries"
    if not parts:
        return ""
    return f"; {' and '.join(parts)} in PyTorch, in blocks of queries"
