"""Plan a fold: which source layers make each block of a recurrent model, and which options are
valid.

    fold = plan_fold(FoldOptions("cycle", loops=2), config)     # config: the dense source's
    fold.blocks, fold.sources, fold.made_of

Rules of Bae et al. 2024 (Relaxed Recursive Transformers) as Mixture-of-Recursions implements them,
with a natural extension to `reuse_map` and `loop`. No tensors here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from megarecur.config.run import Config
from megarecur.errors import ConfigError
from megarecur.recurrence.inventory import build_inventory

SCHEMES = (
    "relaxed",
    "cycle",
    "sequence",
    "middle_cycle",
    "middle_sequence",
    "reuse_map",
    "loop",
)
PLAIN = ("cycle", "sequence")
"""Schemes that support `layers`."""
INITS = ("stepwise", "average", "lower", "upper", "random")
LORA_INITS = ("svd", "zero")
NORMS = ("fold", "share", "own")

LINEARS = {
    "query": "attention.query",
    "key": "attention.key",
    "value": "attention.value",
    "output": "attention.output",
    "gate": "feed_forward.gate",
    "up": "feed_forward.up",
    "down": "feed_forward.down",
}
"""Linears of a block that adapters may change, with their names in the block."""
READS_NORM = {
    "query": "attention_norm",
    "key": "attention_norm",
    "value": "attention_norm",
    "gate": "feed_forward_norm",
    "up": "feed_forward_norm",
}
"""The norm whose output a linear reads with pre-norm; its gain can be folded into the rows."""


@dataclass(frozen=True)
class FoldOptions:
    """Options of a fold; None means a default that depends on the others."""

    scheme: str
    loops: int | None = None
    """Uses of each shared block; for `loop`, of the core."""
    layers: int | None = None
    """Number of layers of a plain model without sharing: a fold with one loop. The scheme decides
    which layers `average` joins: every K-th (cycle) or neighbours (sequence)."""
    init: str | None = None
    """Way to make a block from its layers. Default: average if adapters start from the SVD of the
    residual, otherwise stepwise; each is the better one there (Bae et al., tables F.1, G.2)."""
    lora_rank: int = 0
    """Rank of the adapters; 0 means no adapters."""
    lora_init: str | None = None
    norms: str | None = None
    """Treatment of each layer's norms. fold: the gain is folded into the linears that read it, and
    the shared gain is 1. share: norms are averaged or copied like the weights, as in the papers.
    own: every loop keeps its layer's. Default with adapters: fold if exact (then full rank
    equals the source without extra parameters), otherwise own; without adapters: share."""
    reuse_map: tuple[int, ...] | None = None
    prelude: str | None = None
    core: str | None = None
    coda: str | None = None
    """Layers of `loop`, such as "0-1" or "0,2,4-6"; "" or None means none."""
    strict: bool = False
    """Reject a number of loops that does not divide the layers, instead of dropping layers."""
    seed: int = 1
    """Seed of init random and of the adapters' Gaussian values."""


@dataclass(frozen=True)
class Fold:
    """A resolved fold. Layers count from 0; steps are those of the unrolled result."""

    options: FoldOptions
    """The options with every default filled in."""
    num_layers: int
    """Number of layers of the source."""
    recurrence: dict[str, Any]
    """The config section of the result."""
    blocks: tuple[int, ...]
    """The block of each step."""
    sources: tuple[int, ...]
    """The source layer that each step replaces."""
    made_of: tuple[tuple[int, ...], ...]
    """The source layers whose mean each block is; a single layer is copied."""

    @property
    def dropped(self) -> tuple[int, ...]:
        """Source layers that no step replaces and no block is made of."""
        used = {layer for layers in self.made_of for layer in layers} | set(self.sources)
        return tuple(sorted(set(range(self.num_layers)) - used))

    @property
    def loop_indices(self) -> tuple[int, ...]:
        """Number of earlier uses of the block, for each step."""
        return tuple(self.blocks[:i].count(block) for i, block in enumerate(self.blocks))

    def source_of(self, block: int, loop: int) -> int:
        """Return the source layer that use `loop` of a block replaces."""
        steps = zip(self.blocks, self.loop_indices, self.sources, strict=True)
        return next(source for b, i, source in steps if (b, i) == (block, loop))


# ------------------------------------------------------------------------------------ index rules


def spread(layers: Sequence[int], count: int, first: int = 0) -> list[int]:
    """Return `count` of the layers, evenly spaced, both ends included.

    The numbers match the authors' code: round(linspace(first, last, count)), halves to even, in
    floating point. Six layers numbered from 0, three: 0, 2, 5. Six numbered from 1 (between the
    first and the last of eight), three: 1, 4, 6, as 3.5 rounds to 4.

    Args:
        first: number of the first layer, which decides how halves round.
    """
    numbers = np.linspace(first, first + len(layers) - 1, count)
    return [layers[round(number) - first] for number in numbers]


def members(scheme: str, kept: Sequence[int], loops: int) -> list[list[int]]:
    """Return the kept layers that share each block: every K-th (cycle), or neighbours
    (sequence)."""
    num_blocks = len(kept) // loops
    if scheme == "cycle":
        return [list(kept[block::num_blocks]) for block in range(num_blocks)]
    return [list(kept[block * loops : (block + 1) * loops]) for block in range(num_blocks)]


def choose(
    init: str, kept: Sequence[int], groups: Sequence[Sequence[int]], seed: int, first: int = 0
) -> list[tuple[int, ...]]:
    """Return the layers that make each block: its own group's mean, or K of all kept, in order.

    `first` numbers the first of the kept layers, for `spread`.
    """
    if init == "average":
        return [tuple(group) for group in groups]
    count = len(groups)
    chosen = {
        "stepwise": lambda: spread(kept, count, first),
        "lower": lambda: list(kept[:count]),
        "upper": lambda: list(kept[len(kept) - count :]),
        "random": lambda: sorted(random.Random(seed).sample(list(kept), count)),
    }[init]()
    return [(layer,) for layer in chosen]


def choose_within(init: str, groups: Sequence[Sequence[int]], seed: int) -> list[tuple[int, ...]]:
    """Return the layers that make each block if groups differ in size: only layers of its own
    group.

    stepwise goes from the first layer of the first group to the last of the last; with groups of
    one size, one block after the other, that is `spread`. lower and upper take a group's ends.
    """
    if init == "average":
        return [tuple(group) for group in groups]
    if init == "stepwise" and len({len(group) for group in groups}) == 1:
        return choose(init, [layer for group in groups for layer in group], groups, seed)
    generator, start = random.Random(seed), 0
    made: list[tuple[int, ...]] = []
    for i, group in enumerate(groups):
        stop = start + len(group) - 1
        place = start + Fraction(i * (len(group) - 1), max(len(groups) - 1, 1))
        chosen = {
            "stepwise": round(place),
            "lower": start,
            "upper": stop,
            "random": generator.randint(start, stop),
        }[init]
        made.append((group[chosen - start],))
        start = stop + 1
    return made


def parse_uses(text: str) -> tuple[int, ...]:
    """Parse the uses of each block from "4,2,1,1".

    Raises:
        ConfigError: the text is not such a list.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--reuse-map {text}: is not a list of numbers such as 4,2,1,1") from None


def parse_layers(text: str | None) -> list[int]:
    """Parse layers from "0-1" or "0,2,4-6"; raises ValueError."""
    layers: list[int] = []
    for part in (text or "").split(","):
        if part.strip():
            first, _, last = part.partition("-")
            start, stop = int(first), int(last or first)
            if stop < start:
                raise ValueError(part)
            layers += range(start, stop + 1)
    return layers


# --------------------------------------------------------------------------------------- the plan


def plan_fold(options: FoldOptions, config: Config) -> Fold:
    """Resolve options against the source's dense config.

    Raises:
        ConfigError: the message lists all invalid options.
    """
    num_layers = config.recurrence.num_blocks
    problems = unknown_words(options)
    if not problems:
        problems = unfit_options(options, config)
        problems += layer_problems(options, num_layers)
    if problems:
        raise ConfigError("cannot fold the model:" + "".join(f"\n  {line}" for line in problems))
    return arrange(with_defaults(options, config), num_layers)


def unknown_words(options: FoldOptions) -> list[str]:
    """Return options with unknown names."""
    words = {
        "--scheme": (options.scheme, SCHEMES),
        "--init": (options.init, INITS),
        "--lora-init": (options.lora_init, LORA_INITS),
        "--norms": (options.norms, NORMS),
    }
    return [
        f"{name} {value!r}: is not one of {', '.join(known)}"
        for name, (value, known) in words.items()
        if value is not None and value not in known
    ]


def unfit_options(options: FoldOptions, config: Config) -> list[str]:
    """Return options that contradict each other or do not suit this model."""
    scheme, problems = options.scheme, []
    if scheme == "relaxed" and options.lora_rank == 0:
        problems.append(
            "--scheme relaxed: is cycle with adapters; give --lora-rank, or choose --scheme cycle"
        )
    if options.lora_rank < 0:
        problems.append(f"--lora-rank {options.lora_rank}: must be 0 (no adapters) or more")
    if options.lora_init is not None and options.lora_rank == 0:
        problems.append(f"--lora-init {options.lora_init}: needs --lora-rank")
    if options.norms == "own" and options.lora_rank == 0:
        problems.append("--norms own: norms of each loop are kept with adapters; give --lora-rank")
    if options.norms == "fold" and not can_fold_norms(config):
        problems.append(
            f"--norms fold: gains of norm={config.model.norm!r}, "
            f"norm_position={config.model.norm_position!r} cannot go into the linears that follow "
            "(RMS norms before them can); choose own or share"
        )
    for name, value in (("prelude", options.prelude), ("core", options.core),
                        ("coda", options.coda)):  # fmt: skip
        if value is not None and scheme != "loop":
            problems.append(f"--{name} {value}: belongs to --scheme loop")
    if options.reuse_map is not None and scheme != "reuse_map":
        problems.append("--reuse-map: belongs to --scheme reuse_map")
    if scheme == "loop":
        if options.init is not None:
            problems.append(
                f"--init {options.init}: belongs to schemes that make a block of several layers; "
                "--scheme loop copies the layers it is given"
            )
        if options.lora_init == "svd":
            problems.append(
                "--lora-init svd: every loop of --scheme loop stands for the same layers, which "
                "leaves no residual; choose zero"
            )
    return problems


def layer_problems(options: FoldOptions, num_layers: int) -> list[str]:
    """Return options that ask for loops or layers that the source does not have."""
    scheme, loops = options.scheme, options.loops
    if options.layers is not None:
        return plain_problems(options, options.layers, num_layers)
    if scheme == "reuse_map":
        return reuse_problems(options, num_layers)
    problems = []
    if loops is None:
        problems.append(f"--loops: --scheme {scheme} needs the number of loops")
    elif loops < 1:
        problems.append(f"--loops {loops}: must be at least 1; raise it")
    if scheme == "loop":
        return problems + range_problems(options, num_layers)
    if problems or loops is None:
        return problems
    shared = num_layers - 2 * scheme.startswith("middle")
    what = "layers between the first and the last" if scheme.startswith("middle") else "layers"
    if loops > shared:
        return [f"--loops {loops}: the model has {max(shared, 0)} {what}; lower it"]
    return divisible(shared, shared // loops * loops, f"--loops {loops}", what, options.strict)


def plain_problems(options: FoldOptions, count: int, num_layers: int) -> list[str]:
    """Return the problems of --layers."""
    problems = []
    if options.scheme not in PLAIN:
        problems.append(
            f"--layers {count}: makes a plain model, which --scheme {options.scheme} does not; "
            f"omit --scheme, or choose {' or '.join(PLAIN)}"
        )
    if options.loops not in (None, 1):
        problems.append(
            f"--layers {count}: runs every layer once, not --loops {options.loops}; omit one of "
            "them"
        )
    if options.lora_rank > 0:
        problems.append(
            f"--lora-rank {options.lora_rank}: adapters belong to loops, of which --layers "
            f"{count} has one; omit it"
        )
    if count < 1:
        problems.append(f"--layers {count}: must be at least 1; raise it")
    elif count > num_layers:
        problems.append(f"--layers {count}: the model has {num_layers} layers; lower it")
    elif num_layers % count and options.strict:
        problems.append(f"--layers {count}: does not divide the {num_layers} layers; omit --strict")
    return problems


def divisible(have: int, kept: int, option: str, what: str, strict: bool) -> list[str]:
    """Return a problem if layers would have to be dropped and `strict` forbids that."""
    if have == kept or not strict:
        return []
    return [
        f"{option}: does not divide the {have} {what}; without --strict {have - kept} of them, "
        "evenly spread, would be dropped"
    ]


def reuse_problems(options: FoldOptions, num_layers: int) -> list[str]:
    """Return the problems of a reuse map."""
    uses, text = options.reuse_map, ",".join(map(str, options.reuse_map or ()))
    problems = []
    if options.loops is not None:
        problems.append(
            f"--loops {options.loops}: --scheme reuse_map takes --reuse-map; for as many uses of "
            "every block choose --scheme sequence"
        )
    if not uses:
        return [*problems, "--reuse-map: needs the uses of each block, such as 4,2,1,1"]
    if min(uses) < 1:
        problems.append(f"--reuse-map {text}: every block must run at least once; correct it")
    elif sum(uses) > num_layers:
        problems.append(f"--reuse-map {text}: takes {sum(uses)} layers, the model has {num_layers}")
    elif sum(uses) < num_layers and options.strict:
        problems.append(
            f"--reuse-map {text}: takes {sum(uses)} of {num_layers} layers; without --strict the "
            "others, evenly spread, would be dropped"
        )
    return problems


def range_problems(options: FoldOptions, num_layers: int) -> list[str]:
    """Return the problems of prelude, core and coda."""
    problems, owners = [], dict[int, str]()
    for name in ("prelude", "core", "coda"):
        text = getattr(options, name)
        try:
            layers = parse_layers(text)
        except ValueError:
            problems.append(f"--{name} {text}: is not a list of layers such as 0-1 or 0,2,4-6")
            continue
        if name == "core" and not layers:
            problems.append("--core: --scheme loop needs the layers to repeat, such as 2-5")
        outside = [layer for layer in layers if layer >= num_layers]
        if outside:
            problems.append(
                f"--{name} {text}: the model has layers 0 to {num_layers - 1}, not "
                f"{', '.join(map(str, outside))}"
            )
        taken = sorted({layer for layer in layers if layer in owners or layers.count(layer) > 1})
        if taken:
            others = sorted({owners.get(layer, name) for layer in taken})
            problems.append(
                f"--{name} {text}: layer(s) {', '.join(map(str, taken))} are also in "
                f"{' and '.join(others)}; a layer makes one block"
            )
        owners |= dict.fromkeys(layers, name)
    return problems


def with_defaults(options: FoldOptions, config: Config) -> FoldOptions:
    """Return the options with all defaults filled in."""
    has_lora = options.lora_rank > 0
    values = dict(vars(options))
    if options.lora_init is None:
        values["lora_init"] = "zero" if options.scheme == "loop" else "svd"
    if options.init is None:
        residuals = has_lora and values["lora_init"] == "svd"
        values["init"] = "average" if residuals else "stepwise"
    if options.norms is None:
        exact = "fold" if can_fold_norms(config) and not has_other_norms(config) else "own"
        values["norms"] = exact if has_lora and options.scheme != "loop" else "share"
    return FoldOptions(**values)


def can_fold_norms(config: Config) -> bool:
    """Return True if gains can be moved into the following linears: RMS norms, which have no
    bias."""
    return config.model.norm == "rms" and config.model.norm_position not in ("post", "output")


def has_other_norms(config: Config) -> bool:
    """Return True if blocks have norms not followed by a linear (after sublayers, on heads)."""
    names = {name.removeprefix("blocks.0.") for name in build_inventory(config)}
    found = {name.rpartition(".")[0] for name in names if "norm" in name and "blocks" not in name}
    return bool(found - {"attention_norm", "feed_forward_norm", "final_norm"})


def linear_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return (out, in) of each linear of a block of this model."""
    inventory = build_inventory(config)
    shapes = {
        target: inventory[name].shape
        for target, inner in LINEARS.items()
        if (name := f"blocks.0.{inner}.weight") in inventory
    }
    assert shapes
    return shapes


def arrange(options: FoldOptions, num_layers: int) -> Fold:
    """Return the fold of valid options."""
    scheme, loops, layers = options.scheme, options.loops or 1, list(range(num_layers))
    assert options.init is not None
    recurrence: dict[str, Any]
    if options.layers is not None:
        return fold_to_plain(options, options.layers, num_layers)
    if scheme == "loop":
        prelude, core, coda = map(parse_layers, (options.prelude, options.core, options.coda))
        made: list[tuple[int, ...]] = [(layer,) for layer in (*prelude, *core, *coda)]
        recurrence = plain_loop(len(prelude), len(core), len(coda), loops)
        sources = [*prelude, *core * loops, *coda]
        order = [made.index((layer,)) for layer in sources]
        return Fold(options, num_layers, recurrence, tuple(order), tuple(sources), tuple(made))
    if scheme == "reuse_map":
        uses = options.reuse_map or ()
        return fold_neighbours(options, num_layers, uses, spread(layers, sum(uses)))
    kind, middle = scheme.removeprefix("middle_"), scheme.startswith("middle")
    kind = "cycle" if kind == "relaxed" else kind
    inner = layers[1:-1] if middle else layers
    inner = spread(inner, len(inner) // loops * loops, int(middle))
    groups = members(kind, inner, loops)
    made = choose(options.init, inner, groups, options.seed, int(middle))
    count = len(groups)
    order = [i % count if kind == "cycle" else i // loops for i in range(len(inner))]
    recurrence = {"kind": kind, "num_blocks": count, "depth": len(inner)}
    if middle:
        order = [0, *(block + 1 for block in order), count + 1]
        made = [(0,), *made, (num_layers - 1,)]
        inner = [0, *inner, num_layers - 1]
        recurrence = (
            plain_loop(1, count, 1, loops)
            if kind == "cycle"
            else {"kind": "reuse_map", "reuse_map": [1, *[loops] * count, 1]}
        )
    return Fold(options, num_layers, recurrence, tuple(order), tuple(inner), tuple(made))


def fold_to_plain(options: FoldOptions, count: int, num_layers: int) -> Fold:
    """Return the fold to `count` layers that run once each.

    No layer is dropped beforehand: the ends of `stepwise` are those of the model. If `count` does
    not divide the layers, `average` omits the last ones, like the authors.
    """
    assert options.init is not None
    layers, loops = list(range(num_layers)), num_layers // count
    groups = members(options.scheme, layers[: count * loops], loops)
    made = choose(options.init, layers, groups, options.seed)
    recurrence = {"kind": "dense", "num_layers": count}
    sources = tuple(made_of[0] for made_of in made)
    return Fold(options, num_layers, recurrence, tuple(range(count)), sources, tuple(made))


def plain_loop(prelude: int, core: int, coda: int, loops: int) -> dict[str, Any]:
    """Return a loop without injection: a dense model whose core repeats."""
    return {
        "kind": "loop",
        "prelude": prelude,
        "core": core,
        "coda": coda,
        "num_loops": loops,
        "injection": "none",
    }


def fold_neighbours(
    options: FoldOptions, num_layers: int, uses: Sequence[int], kept: Sequence[int]
) -> Fold:
    """Return the fold in which each block is made of as many consecutive layers as it has uses."""
    assert options.init is not None
    groups, start = [], 0
    for count in uses:
        groups.append(list(kept[start : start + count]))
        start += count
    made = choose_within(options.init, groups, options.seed)
    order = [block for block, count in enumerate(uses) for _ in range(count)]
    recurrence = {"kind": "reuse_map", "reuse_map": list(uses)}
    return Fold(options, num_layers, recurrence, tuple(order), tuple(kept), tuple(made))
