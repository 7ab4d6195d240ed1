"""What one architecture of Hugging Face is, as far as converting needs to know.

A module per family (`llama.py`, ...) fills in an `Architecture`: how its config.json maps
to our `model` section and back, and which of its tensors hold which of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megarecur.config.schema import ModelConfig

Values = dict[str, Any]
"""Of a config.json."""
Read = Callable[[Tensor, ModelConfig], tuple[Tensor, ...]]
Write = Callable[[tuple[Tensor, ...], ModelConfig], Tensor]


class Entry(NamedTuple):
    """One of their tensors, and which of ours its values make.

    Names are those inside a layer and block (`self_attn.q_proj.weight`, `attention.query.weight`)
    or, outside of the layers, whole ones. Values are joined along the first dim where there are
    several.
    """

    theirs: str
    ours: tuple[str, ...]
    read: Read = lambda tensor, model: (tensor,)
    """Theirs, in fp32, to ours."""
    write: Write = lambda parts, model: parts[0]
    """Back."""


@dataclass(frozen=True)
class Names:
    """All tensors of an architecture. A layer's are called `{layers}.{number}.{theirs}`."""

    layers: str
    layer: list[Entry]
    first: list[Entry]
    """Before the layers: the embedding."""
    last: list[Entry]
    """After the layers: the final norm, and the head where it is not tied."""
    head: str
    """What an untied head is called; beside a tied one it may be stored as a copy."""
    ignored: tuple[str, ...] = ()
    """Ends of names of constants that old folders store."""

    def of_layer(self, layer: int, block: int) -> list[Entry]:
        """One layer's entries by whole names; its values are those of a block of ours."""
        return [
            e._replace(
                theirs=f"{self.layers}.{layer}.{e.theirs}",
                ours=tuple(f"blocks.{block}.{name}" for name in e.ours),
            )
            for e in self.layer
        ]

    def all(self, blocks: Iterable[int]) -> list[Entry]:
        """Every entry in order; `blocks` are those that the layers run."""
        entries = list(self.first)
        for layer, block in enumerate(blocks):
            entries += self.of_layer(layer, block)
        return entries + self.last


@dataclass(frozen=True)
class Architecture:
    """The functions that convert and export use, and nothing else they would have to know."""

    model_type: str
    """As in config.json."""
    hf_class: str
    """That transformers loads, such as LlamaForCausalLM."""
    read_config: Callable[[Values, list[str]], Values]
    """config.json to our `model` section; what is not supported is appended to the list."""
    write_config: Callable[[ModelConfig, list[int]], Values]
    """Our `model` section, and the block that each layer runs, to config.json."""
    wanted: dict[str, tuple[Any, ...]]
    """The values of our `model` section that it can express, by key; those left out are free."""
    names: Callable[[ModelConfig], Names]
    obstacles: Callable[[ModelConfig], list[str]] = lambda model: []
    """What else of a model of ours it cannot express, in words."""
    required: tuple[str, ...] = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "vocab_size",
    )
    accepted: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys of config.json whose other values change what is computed. The first value that is not
    None is the one that an error names; None allows a key that is left out."""

    @property
    def title(self) -> str:
        """For messages: Llama, GPTNeoX, ..."""
        return self.hf_class.removesuffix("ForCausalLM")

    def find_problems(self, values: Values) -> list[str]:
        """What a config.json lacks, or has that is not supported."""
        problems = []
        for key in self.required:
            value = values.get(key)
            if value is None:
                problems.append(f"{key}: required, but missing")
            elif not isinstance(value, int) or value < 1:
                problems.append(f"{key}={value!r}: must be a whole number above 0")
        accepted = {
            "architectures": (None, [self.hf_class]),
            "quantization_config": (None,),
        } | self.accepted
        for key, allowed in accepted.items():
            value = values.get(key)
            if value not in allowed:
                wanted = next((a for a in allowed if a is not None), None)
                shown = "null" if wanted is None else repr(wanted)
                problems.append(
                    f"{key}={value!r} is not supported; only a model with {key}={shown} converts"
                )
        return problems

    def find_obstacles(self, model: ModelConfig) -> list[str]:
        """What of a model of ours it cannot express, by key and value."""
        problems = []
        for key, allowed in self.wanted.items():
            value = getattr(model, key)
            if value not in allowed:
                shown = " or ".join(repr(a) for a in allowed)
                problems.append(
                    f"model.{key}={value!r}: {self.title} has {key}={shown} only; such a model "
                    "stays a megarecur run"
                )
        return problems + self.obstacles(model)


PLAIN: dict[str, tuple[Any, ...]] = {
    "positions": ("rope",),
    "level_encoding": ("none",),
    "rope_fraction": (1.0,),
    "rope_scaling_factor": (1.0,),
    "rope_theta_local": (None,),
    "norm": ("rms",),
    "final_norm": (True,),
    "final_norm_eps": (None,),
    "norm_position": ("pre",),
    "residual": ("plain",),
    "parallel_residual": (False,),
    "feed_forward": ("swiglu",),
    "shared_feed_forward": (False,),
    "qk_norm": (False,),
    "attention_scale": (None,),
    "attention_softcap": (None,),
    "logit_softcap": (None,),
    "sliding_window": (None,),
    "gate": (False,),
    "scale_embeddings": (False,),
}
"""What Llama can express of our `model` section, and where others start from."""


def wanted(free: tuple[str, ...] = (), **values: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """`Architecture.wanted`, as far as it differs from Llama's."""
    return {key: allowed for key, allowed in PLAIN.items() if key not in free} | values


def entry(theirs: str, *ours: str) -> Entry:
    """A tensor that holds the same values as ours."""
    return Entry(theirs, ours)


def linear(theirs: str, ours: str, bias: bool) -> list[Entry]:
    """A linear layer."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [entry(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in kinds]


def read_rope(
    values: Values, problems: list[str], kinds: tuple[str, ...] = ("default",)
) -> tuple[float, float]:
    """The base of rotary positions, and what positions are divided by.

    Newer files keep everything of the rotation in one place.

    Args:
        values: of config.json.
        problems: kinds that are not supported are appended, by name.
        kinds: supported ones, of default and linear.
    """
    rope: Values = {}
    for key in ("rope_parameters", "rope_scaling"):
        found = values.get(key) or {}
        if not isinstance(found, dict):
            found = {"rope_type": found}
        kind = found.get("rope_type", found.get("type", "default"))
        if kind not in kinds:
            only = "plain rotary positions convert" if len(kinds) == 1 else " and ".join(kinds)
            problems.append(
                f"{key}: rope_type={kind!r} is not supported; only {only}, choose a model without "
                "context extension"
            )
        rope |= found
    theta = values.get("rope_theta") or rope.get("rope_theta") or 10000.0
    return theta, rope.get("factor", 1.0) if "linear" in kinds else 1.0


def to_half_split(rows: Tensor, model: ModelConfig) -> Tensor:
    """Reorder the rows of a query or key weight (or bias) that rotates dims (2i, 2i + 1) as pairs.

    All these architectures rotate (i, i + head_dim/2). Queries and keys are reordered alike, which
    leaves their products as they were.
    """
    order = torch.arange(model.head_dim)
    order[: model.rotary_dims] = order[: model.rotary_dims].view(-1, 2).t().flatten()
    return rows.unflatten(0, (-1, model.head_dim))[:, order].flatten(0, 1)
