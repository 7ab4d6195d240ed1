"""A dense model folded into shared blocks, with low-rank adapters for what sharing loses.

    fold = plan_fold(FoldOptions("cycle", loops=2, lora_rank=64), source.config)
    folded = FoldedModel(fold, config, source.read)
    folded.value("blocks.0.loops.1.query.lora_b")

Values are made when their turn comes to be written, matrix by matrix: at no time is more in memory
than the few matrices that one of them is made of. Relaxed Recursive Transformers, Bae et al. 2024.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from megarecur.config.schema import Config
from megarecur.convert.folding import LINEARS, READS_NORM, Fold
from megarecur.parallel.random import initial_values
from megarecur.parallel.shards import Shard, whole
from megarecur.recurrence.inventory import build_inventory

TARGETS = {inner: target for target, inner in LINEARS.items()}
IN_BLOCK = re.compile(r"blocks\.(\d+)\.(?:loops\.(\d+)\.)?(.+)")


# ----------------------------------------------------------------------------------------- values


def mean(tensors: Sequence[Tensor] | Callable[[int], Tensor], count: int) -> Tensor:
    """The mean of `count` tensors, each needed only once; one tensor is returned as it is."""
    get = tensors if callable(tensors) else tensors.__getitem__
    total = get(0)
    if count == 1:
        return total
    total = total.clone()
    for i in range(1, count):
        total += get(i)
    return total / count


def fold_gain(weight: Tensor, gain: Tensor) -> Tensor:
    """W diag(g) [out, in]: what reads a norm of gain 1 as W reads one of gain g."""
    return weight * gain


def truncated_svd(residual: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest product of this rank: A = V^T [r, in], B = U S [out, r], and all singular values.

    The rank is capped at min(out, in). Singular vectors are known up to sign: compare products.
    """
    left, values, right = torch.linalg.svd(residual, full_matrices=False)
    rank = min(rank, len(values))
    return right[:rank].contiguous(), left[:, :rank] * values[:rank], values


def initial_pair(
    residual: Tensor, rank: int, gaussian: Callable[[], Tensor], lora_init: str
) -> tuple[Tensor, Tensor, float]:
    """First values of an adapter and the share of the residual's energy that they hold.

    svd: the nearest product. zero, and where nothing is left to hold: A Gaussian, B = 0.
    """
    rank = min(rank, *residual.shape)
    if lora_init == "svd" and bool(residual.any()):
        a, b, values = truncated_svd(residual, rank)
        energy = values.to(torch.float64).square()
        return a, b, float(energy[:rank].sum() / energy.sum())
    return gaussian(), residual.new_zeros(residual.shape[0], rank), 0.0


@dataclass(frozen=True)
class MatrixReport:
    """What a fold made of one linear in one step."""

    block: int
    loop: int
    source: int
    linear: str
    rank: int
    """0: no adapter."""
    cap: int
    weight_norm: float
    """Of the source's matrix, norm gains included where they were folded (Frobenius)."""
    residual_norm: float
    """Of its difference to the block's."""
    energy: float
    """Share of the residual's square that the adapter starts with."""


class FoldedModel:
    """The parameters of a folded model, each made of the source's tensors when asked for.

    Args:
        fold: which layer makes what.
        config: of the result; its vocabulary must be resolved.
        read: a source tensor by its dense global name, in fp32.
    """

    def __init__(self, fold: Fold, config: Config, read: Callable[[str], Tensor]) -> None:
        self.fold, self.config = fold, config
        self.inventory = build_inventory(config)
        self.matrices: list[MatrixReport] = []
        self.unheld: dict[str, float] = {}
        """Norms and biases of the source that the result holds in part only: the largest relative
        difference, by name within a block."""
        self.seconds = {"reading": 0.0, "svd": 0.0}
        self._read = read
        self._base: tuple[str, Tensor] | None = None
        self._pair: tuple[str, Tensor, Tensor] | None = None
        self._measured: set[str] = set()

    def shards(self) -> dict[str, Shard]:
        """Every parameter without its values, in the order in which they are made most cheaply."""
        names = sorted(self.inventory, key=self._place)
        return {
            name: whole(torch.empty(self.inventory[name].shape, device="meta")) for name in names
        }

    def _place(self, name: str) -> tuple[int, str, int]:
        """Blocks one by one, linears one by one, the block's matrix before its adapters."""
        found = IN_BLOCK.fullmatch(name)
        if not found:
            return (-1, "", 0)
        block, loop, rest = found.groups()
        target = rest.removesuffix(".lora_a").removesuffix(".lora_b")
        return (int(block), LINEARS.get(target, rest.rpartition(".")[0]), int(loop or -1))

    def value(self, name: str) -> Tensor:
        """A parameter, in fp32."""
        found = IN_BLOCK.fullmatch(name)
        if not found:
            return self.read(name)
        block, loop, rest = int(found[1]), found[2], found[3]
        if loop is None:
            return self.base(block, rest)
        if rest.endswith((".lora_a", ".lora_b")):
            target, _, part = rest.rpartition(".")
            a, b = self.pair(block, int(loop), target)
            return a if part == "lora_a" else b
        return self.read(f"blocks.{self.fold.source_of(block, int(loop))}.{rest}")

    def read(self, name: str) -> Tensor:
        """A source tensor."""
        began = time.perf_counter()
        tensor = self._read(name)
        self.seconds["reading"] += time.perf_counter() - began
        return tensor

    def layer_value(self, layer: int, rest: str) -> Tensor:
        """What a source layer gives to a block's parameter, norm gains folded if they are to be."""
        tensor = self.read(f"blocks.{layer}.{rest}")
        if self.fold.options.norms != "fold":
            return tensor
        inner, _, kind = rest.rpartition(".")
        norm = READS_NORM.get(TARGETS.get(inner, ""))
        if norm is not None and kind == "weight":
            return fold_gain(tensor, self.read(f"blocks.{layer}.{norm}.weight"))
        return torch.ones_like(tensor) if inner in READS_NORM.values() else tensor

    def base(self, block: int, rest: str) -> Tensor:
        """A parameter of a shared block."""
        key = f"{block}.{rest}"
        if self._base is None or self._base[0] != key:
            layers = self.fold.made_of[block]
            made = mean(lambda i: self.layer_value(layers[i], rest), len(layers))
            self._base = (key, made)
            self._measure(block, rest, made)
        return self._base[1]

    def _measure(self, block: int, rest: str, made: Tensor) -> None:
        """Note what a block's parameter loses of each layer it stands for, adapters apart."""
        inner, _, kind = rest.rpartition(".")
        linear = kind == "weight" and inner in TARGETS
        if linear and f"blocks.{block}.loops.0.{TARGETS[inner]}.lora_a" in self.inventory:
            return  # Measured with its adapter.
        key = f"{block}.{rest}"
        if key in self._measured:
            return
        self._measured.add(key)
        steps = zip(self.fold.blocks, self.fold.loop_indices, self.fold.sources, strict=True)
        for owner, loop, source in steps:
            if owner != block:
                continue
            value = self.layer_value(source, rest)
            residual = value - made
            if linear:
                self._report(block, loop, TARGETS[inner], value, residual, 0, 0.0)
            elif bool(residual.any()):
                share = float(residual.norm() / value.norm().clamp_min(1e-30))
                self.unheld[rest] = max(self.unheld.get(rest, 0.0), share)

    def pair(self, block: int, loop: int, target: str) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of a linear in one use of a block."""
        key = f"blocks.{block}.loops.{loop}.{target}"
        if self._pair is not None and self._pair[0] == key:
            return self._pair[1:]
        rest = LINEARS[target] + ".weight"
        value = self.layer_value(self.fold.source_of(block, loop), rest)
        residual = value - self.base(block, rest)
        spec = self.inventory[key + ".lora_a"]
        options = self.fold.options
        assert options.lora_init is not None
        began = time.perf_counter()
        a, b, energy = initial_pair(
            residual,
            spec.shape[0],
            lambda: initial_values(spec, options.seed, torch.float32),
            options.lora_init,
        )
        self.seconds["svd"] += time.perf_counter() - began
        self._report(block, loop, target, value, residual, spec.shape[0], energy)
        self._pair = (key, a, b)
        return a, b

    def _report(
        self,
        block: int,
        loop: int,
        target: str,
        value: Tensor,
        residual: Tensor,
        rank: int,
        energy: float,
    ) -> None:
        self.matrices.append(
            MatrixReport(
                block=block,
                loop=loop,
                source=self.fold.source_of(block, loop),
                linear=target,
                rank=rank,
                cap=min(residual.shape),
                weight_norm=float(value.norm()),
                residual_norm=float(residual.norm()),
                energy=energy,
            )
        )

    def report(self) -> list[dict[str, object]]:
        """What was measured so far, for JSON."""
        return [asdict(matrix) for matrix in self.matrices]
