"""The description of one Hugging Face architecture, as far as conversion needs it.

A module per family (`llama.py`, ...) fills in an `Architecture`: how its config.json maps
to our `model` section and back, and which of its tensors hold which of ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megarecur.config.base import MOST_BLOCKS
from megarecur.config.mistakes import show_value
from megarecur.config.model import ModelConfig
from megarecur.config.run import Config

Values = dict[str, Any]
"""The values of a config.json."""
Read = Callable[[Tensor, ModelConfig], tuple[Tensor, ...]]
Write = Callable[[tuple[Tensor, ...], ModelConfig], Tensor]


class Entry(NamedTuple):
    """One of their tensors, and the tensors of ours that its values make.

    Names are those inside a layer and block (`self_attn.q_proj.weight`, `attention.query.weight`)
    or, outside the layers, whole names. Several values are joined along the first dim.
    """

    theirs: str
    ours: tuple[str, ...]
    read: Read = lambda tensor, model: (tensor,)
    """Converts their tensor, in fp32, to ours."""
    write: Write = lambda parts, model: parts[0]
    """Convert our tensors to theirs."""
    shape: Callable[[Config], tuple[int, ...]] | None = None
    """Returns the shape of their tensor; None: that of ours, joined."""


@dataclass(frozen=True)
class Names:
    """All tensors of an architecture. A layer's are named `{layers}.{number}.{theirs}`."""

    layers: str
    layer: list[Entry]
    first: list[Entry]
    """Entries before the layers: the embedding."""
    last: list[Entry]
    """Entries after the layers: the final norm, and the head if it is not tied."""
    head: str
    """Name of an untied head; beside a tied one it may be stored as a copy."""
    ignored: tuple[str, ...] = ()
    """Suffixes of the names of constants that old folders store."""

    def of_layer(self, layer: int, block: int) -> list[Entry]:
        """Return one layer's entries by full names; its values belong to one of our blocks."""
        return [
            e._replace(
                theirs=f"{self.layers}.{layer}.{e.theirs}",
                ours=tuple(f"blocks.{block}.{name}" for name in e.ours),
            )
            for e in self.layer
        ]

    def all(self, blocks: Iterable[int]) -> list[Entry]:
        """Return every entry in order; `blocks` are those that the layers run."""
        entries = list(self.first)
        for layer, block in enumerate(blocks):
            entries += self.of_layer(layer, block)
        return entries + self.last


@dataclass(frozen=True)
class Architecture:
    """The functions and tables by which convert and export handle an architecture."""

    model_type: str
    """The `model_type` of config.json."""
    hf_class: str
    """The class that transformers loads, such as LlamaForCausalLM."""
    read_config: Callable[[Values, list[str]], Values]
    """Maps config.json to our `model` section; appends unsupported values to the list."""
    write_config: Callable[[ModelConfig, list[int]], Values]
    """Maps our `model` section, and the block that each layer runs, to config.json."""
    wanted: dict[str, tuple[Any, ...]]
    """Values of our `model` section that the architecture can express, by key; other keys are
    free."""
    names: Callable[[ModelConfig], Names]
    read_task: Callable[[Values, list[str]], Values] | None = None
    """Maps config.json to our `task` section, as `read_config` does; None: a model of text."""
    obstacles: Callable[[ModelConfig], list[str]] = lambda model: []
    """Returns other properties of our model that the architecture cannot express, in words."""
    required: tuple[str, ...] = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "vocab_size",
    )
    accepted: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys of config.json whose other values change the computation. Errors name the first value
    that is not None; None allows a missing key."""

    @property
    def title(self) -> str:
        """Name for messages: Llama, GPTNeoX, ..."""
        return self.hf_class.removesuffix("ForCausalLM").removesuffix("ForImageClassification")

    def find_problems(self, values: Values) -> list[str]:
        """Return the missing and unsupported keys of a config.json."""
        problems = []
        for key in self.required:
            value = values.get(key)
            if value is None:
                problems.append(f"{key}: required, but missing; download config.json again")
            elif not isinstance(value, int) or value < 1:
                problems.append(
                    f"{key}={show_value(value)}: must be a whole number above 0; download "
                    "config.json again"
                )
            elif value > (most := MOST_BLOCKS if key == "num_hidden_layers" else 1 << 24):
                problems.append(
                    f"{key}={show_value(value)}: is too large, at most {most} is supported; "
                    "download config.json again"
                )
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
        """Return the values of our model that the architecture cannot express, by key."""
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
    "sinusoid_layout": ("split",),
    "rope_fraction": (1.0,),
    "rope_scaling_factor": (1.0,),
    "rope_scaling": (None,),
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
    "qk_norm_over": ("head",),
    "attention_scale": (None,),
    "attention_softcap": (None,),
    "logit_softcap": (None,),
    "sliding_window": (None,),
    "gate": (False,),
    "head_bias": (False,),
    "scale_embeddings": (False,),
}
"""Values of our `model` section that Llama can express; other architectures start from these."""


def wanted(free: tuple[str, ...] = (), **values: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """Return `Architecture.wanted` as its differences from Llama's."""
    return {key: allowed for key, allowed in PLAIN.items() if key not in free} | values


def entry(theirs: str, *ours: str) -> Entry:
    """Return the entry of a tensor with the same values as ours."""
    return Entry(theirs, ours)


def linear(theirs: str, ours: str, bias: bool) -> list[Entry]:
    """Return the entries of a linear layer."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [entry(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in kinds]


# ------------------------------------------------------------------------------------- rotation


SCALED = ("rope_scaling_factor", "rope_scaling")
"""Keys of ours that `write_rope` writes; free if an architecture supports every kind."""
KINDS = ("default", "linear", "dynamic", "yarn", "llama3")
"""Kinds of rotary positions, as transformers names them."""


def read_rope(
    values: Values,
    problems: list[str],
    *,
    kinds: tuple[str, ...] = KINDS,
    thetas: tuple[str, ...] = ("rope_theta",),
    fractions: tuple[str, ...] = (),
    defaults: tuple[float, float] = (10000.0, 1.0),
) -> Values:
    """Return our keys of rotary positions.

    Older files keep the base beside `rope_scaling`, newer ones everything in `rope_parameters`.
    Versions of transformers differ in which place they read, so a file whose places disagree is
    rejected.

    Args:
        thetas: keys of the base outside of `rope_parameters`.
        fractions: keys of the rotating share of dims outside of it; if empty, all dims must rotate.
        defaults: base and share if the file has none.
    """
    rope, where = gather_rope(values, problems)
    kind = rope.get("rope_type", "default")
    if kind not in kinds:
        only = "plain rotary positions convert" if len(kinds) == 1 else f"{', '.join(kinds)} do"
        problems.append(
            f"{where or 'rope_parameters'}: rope_type={kind!r} is not supported; only {only}, "
            "choose another model"
        )
        kind = "default"
    theta = agree("rope_theta", thetas, values, rope, where, problems)
    factor = "partial_rotary_factor"
    fraction = agree(factor, (*fractions, factor), values, rope, where, problems)
    fraction = defaults[1] if fraction is None else fraction
    if not fractions and fraction != 1.0:
        problems.append(f"partial_rotary_factor={fraction!r} is not supported; only 1.0 converts")
    ours: Values = {
        "rope_theta": defaults[0] if theta is None else theta,
        "rope_fraction": fraction,
        "rope_scaling_factor": 1.0,
        "rope_scaling": None,
    }
    if kind == "linear":
        ours["rope_scaling_factor"] = read_number(rope, "factor", where, problems)
    elif kind != "default":
        ours["rope_scaling"] = read_scaling(kind, rope, where, values, problems)
    return ours


def gather_rope(values: Values, problems: list[str]) -> tuple[Values, str]:
    """Return the rotation section of a file, and the key that holds it."""
    rope: Values = {}
    where = ""
    for key in ("rope_scaling", "rope_parameters"):
        found = values.get(key) or {}
        if not isinstance(found, dict):
            found = {"rope_type": found}
        if any(isinstance(value, dict) for value in found.values()):
            problems.append(
                f"{key}: a rotation per type of layer is not supported; convert another model"
            )
            continue
        if "type" in found:  # Old files use this name; the newer name has priority.
            found = {"rope_type": found["type"]} | found
        for name, value in found.items():
            if value is None or name == "type":
                continue
            if rope.get(name, value) != value:
                problems.append(
                    f"rope_scaling.{name}={rope[name]!r} and rope_parameters.{name}={value!r} "
                    "disagree; delete the wrong one"
                )
            rope[name] = value
        where = key if found else where
    return rope, where


def agree(
    name: str,
    outside: tuple[str, ...],
    values: Values,
    rope: Values,
    where: str,
    problems: list[str],
) -> float | None:
    """Return a number that may appear in several places of a file, all of which must agree."""
    found = {key: values[key] for key in outside if values.get(key) is not None}
    if name in rope:
        found[f"{where}.{name}"] = rope[name]
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            problems.append(f"{key}={value!r}: must be a number above 0")
            return None
    if len(set(found.values())) > 1:
        said = " and ".join(f"{key}={value!r}" for key, value in found.items())
        problems.append(
            f"{said} disagree, and versions of transformers differ in which one they take; delete "
            "the wrong one"
        )
    return next(iter(found.values()), None)


def read_number(
    rope: Values, name: str, where: str, problems: list[str], default: float | None = None
) -> float:
    """Return a number above 0 from the rotation section of a file."""
    value = rope.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        said = "required, but missing" if value is None else "must be a number above 0"
        problems.append(f"{where}.{name}{'' if value is None else f'={value!r}'}: {said}")
        return 1.0
    return value


def read_scaling(
    kind: str, rope: Values, where: str, values: Values, problems: list[str]
) -> Values:
    """Return our section `rope_scaling`."""
    longest = read_number(values, "max_position_embeddings", "config.json", problems, 2048)
    name = "original_max_position_embeddings"
    # transformers counts from max_position_embeddings, ignoring all other keys.
    if kind == "dynamic":
        factor = read_number(rope, "factor", where, problems)
        return {"kind": kind, "factor": factor, "original_positions": longest}
    original = agree(name, (name,), values, rope, where, problems) or longest
    ratio = longest / original if kind == "yarn" else None
    factor = read_number(rope, "factor", where, problems, ratio)
    scaling: Values = {"kind": kind, "factor": factor, "original_positions": original}
    if kind == "llama3":
        for end in ("low_freq_factor", "high_freq_factor"):
            scaling[end] = read_number(rope, end, where, problems)
        return scaling
    scaling["beta_fast"] = read_number(rope, "beta_fast", where, problems, 32.0)
    scaling["beta_slow"] = read_number(rope, "beta_slow", where, problems, 1.0)
    scaling["truncate"] = bool(rope.get("truncate", True))
    if rope.get("attention_factor") is not None:
        scaling["attention_factor"] = read_number(rope, "attention_factor", where, problems)
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        above, below = (
            1.0 + 0.1 * read_number(rope, key, where, problems) * math.log(factor)
            for key in ("mscale", "mscale_all_dim")
        )
        scaling["attention_factor"] = above / below
    return scaling


def write_rope(model: ModelConfig) -> Values:
    """Return the values that `read_rope` reads, in a form that all versions of transformers
    accept."""
    scaling, theirs = model.rope_scaling, None
    if model.rope_scaling_factor != 1.0:
        theirs = {"rope_type": "linear", "factor": model.rope_scaling_factor}
    elif scaling is not None:
        # Llama 3's numbers are required; the others may be omitted.
        rest = scaling.model_dump(
            exclude={"kind", "original_positions"}, exclude_defaults=scaling.kind != "llama3"
        )
        theirs = {"rope_type": scaling.kind, **rest}
        if scaling.kind == "llama3" or scaling.original_positions != written_positions(model):
            theirs["original_max_position_embeddings"] = scaling.original_positions
    return {"rope_theta": model.rope_theta, "rope_scaling": theirs}


def written_positions(model: ModelConfig) -> int | None:
    """Return max_position_embeddings, from which transformers counts under dynamic scaling."""
    scaling = model.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        return scaling.original_positions
    return model.max_positions


# -------------------------------------------------------------------------------------- windows


TYPES = {"sliding_attention": "sliding", "full_attention": "full"}
"""Types of layers, from theirs to ours."""


def read_windows(
    values: Values, problems: list[str], defaults: list[str], window: int | None
) -> Values:
    """Return our keys of sliding windows.

    Args:
        defaults: their type of each layer if the file has none.
    """
    types, layers = values.get("layer_types") or defaults, values.get("num_hidden_layers")
    fits = isinstance(types, list) and len(types) == layers
    if not fits or any(t not in TYPES for t in map(str, types)):
        problems.append(
            f"layer_types={types!r} is not supported; only a model with {layers} of "
            f"{', '.join(TYPES)} converts"
        )
        return {}
    ours = [TYPES[t] for t in types]
    if "sliding" not in ours:
        return {"sliding_window": None, "attention_types": ["full"]}
    shortest = next(p for p in range(1, len(ours) + 1)
                    if all(kind == ours[i % p] for i, kind in enumerate(ours)))  # fmt: skip
    return {"sliding_window": window, "attention_types": ours[:shortest]}


def write_types(model: ModelConfig, blocks: list[int]) -> list[str]:
    """Return `layer_types`; a layer has the type of the block it runs."""
    theirs = {ours: name for name, ours in TYPES.items()}
    return [theirs["sliding" if model.slides(b) else "full"] for b in blocks]


def read_layer_ropes(
    values: Values, problems: list[str], defaults: dict[str, float], local: str = ""
) -> Values:
    """Return our keys of rotary positions if layers with a window have their own rotation.

    Older files have a base for them under the key `local`, newer ones a rotation for each type of
    layer. Theirs is never scaled.

    Args:
        defaults: the base of each type of layer if the file has none.
        local: the key; if empty, all layers share one base.
    """
    keys = {"full_attention": "rope_theta", "sliding_attention": local or "rope_theta"}
    found = values.get("rope_parameters")
    if found and not (isinstance(found, dict) and found.keys() & keys.keys()):
        problems.append(
            f"rope_parameters={found!r}: transformers reads nothing of it here without "
            f"{' and '.join(keys)}; give a rotation for each of them"
        )
    if not isinstance(found, dict) or not found.keys() & keys.keys():
        rope = read_rope(values, problems, defaults=(defaults["full_attention"], 1.0))
        theta = rope["rope_theta"]
        if local:
            theta = agree(local, (local,), values, {}, "", problems)
            theta = defaults["sliding_attention"] if theta is None else theta
        return rope | {"rope_theta_local": theta}
    full, sliding = (
        read_rope(
            values | {"rope_parameters": found.get(kind)} | scaled,
            problems,
            kinds=kinds,
            thetas=(keys[kind],),
            defaults=(defaults[kind], 1.0),
        )
        for kind, kinds, scaled in (
            ("full_attention", KINDS, {}),
            ("sliding_attention", ("default",), {"rope_scaling": None}),
        )
    )
    return full | {"rope_theta_local": sliding["rope_theta"]}


def find_scaled_windows(title: str, model: ModelConfig) -> list[str]:
    """Return the obstacle for architectures that do not scale the rotation of layers with a
    window."""
    scaled = model.rope_scaling_factor != 1.0 or model.rope_scaling is not None
    if not (scaled and model.sliding_window is not None and model.rope_theta_local is None):
        return []
    key = "rope_scaling" if model.rope_scaling is not None else "rope_scaling_factor"
    return [
        f"model.{key}={getattr(model, key)!r}: {title} scales no layers that see a window, which "
        "it does without rope_theta_local; such a model stays a megarecur run"
    ]


def find_mixed_windows(title: str, model: ModelConfig) -> list[str]:
    """Return the obstacle for architectures whose layers all have a window, or all have none."""
    if len(set(model.attention_types)) == 1:
        return []
    return [
        f"model.attention_types={list(model.attention_types)}: all layers of {title} are alike; "
        "such a model stays a megarecur run"
    ]


def to_half_split(rows: Tensor, model: ModelConfig) -> Tensor:
    """Reorder the rows of a query or key weight (or bias) that rotates dims (2i, 2i + 1) as pairs.

    All these architectures rotate (i, i + head_dim/2). Queries and keys are reordered in the same
    way, so their products are unchanged.
    """
    order = torch.arange(model.head_dim)
    order[: model.rotary_dims] = order[: model.rotary_dims].view(-1, 2).t().flatten()
    heads: Tensor = rows.unflatten(0, (-1, model.head_dim))
    return heads[:, order].flatten(0, 1)
