"""Fold a dense model into shared blocks, with low-rank adapters for the residuals of sharing.

    fold_hf(Path("models/llama"), Path("runs/folded"), FoldOptions("cycle", loops=2, lora_rank=64))

Values are made matrix by matrix when they are written, so memory never holds more than the few
matrices from which one is made. Relaxed Recursive Transformers, Bae et al. 2024.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megarecur.checkpoint.planning import Values
from megarecur.config.run import Config
from megarecur.convert.fold_report import Report, build_report, format_report, window_kinds
from megarecur.convert.folding import (
    LINEARS,
    READS_NORM,
    Fold,
    FoldOptions,
    linear_shapes,
    plan_fold,
)
from megarecur.convert.hf import write_run
from megarecur.convert.source import SourceModel
from megarecur.files import create_file
from megarecur.parallel.random import initial_values
from megarecur.parallel.shards import TensorShard, whole
from megarecur.recurrence.inventory import HEAD_NORMS, build_inventory

REPORT = "fold.json"
"""File of a run folder that reports the fold; fold.txt has it as text."""
TARGETS = {inner: target for target, inner in LINEARS.items()}
IN_BLOCK = re.compile(r"blocks\.(\d+)\.(?:loops\.(\d+)\.)?(.+)")


def fold_hf(
    hf_dir: str | Path,
    run_dir: str | Path,
    options: FoldOptions,
    *,
    allow_pickles: bool = False,
    progress: Callable[[int], AbstractContextManager[object]] = nullcontext,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Path:
    """Make a run folder of a dense Hugging Face model folded into shared blocks.

    Beside the files of `convert_hf`, the run has fold.json and fold.txt: source layers, the
    residual of each matrix and the share its adapter holds, sizes. Returns the checkpoint's path.

    Args:
        allow_pickles: see `SourceModel`.
        progress: context entered with the total bytes of layers to fold.
        advance: called with the bytes of each folded layer.

    Raises:
        ConfigError: invalid options, all listed; or an error of `convert_hf`.
        DataError: see `convert_hf`.
    """
    source = SourceModel(hf_dir, allow_pickles=allow_pickles)
    fold = plan_fold(options, source.config)
    began = time.perf_counter()
    made: list[FoldedModel] = []

    def make(config: Config, source: SourceModel) -> tuple[dict[str, TensorShard], Values]:
        folded = FoldedModel(fold, config, source.tensor)
        made.append(folded)
        stack.enter_context(progress(sum(map(folded.work, folded.inventory))))

        def value(name: str) -> Tensor:
            tensor = folded.value(name)
            advance(folded.work(name))
            return tensor

        return folded.shards(), value

    def finish(folder: Path) -> None:
        report = made[0].report(source.config, time.perf_counter() - began)
        create_file(folder / REPORT, json.dumps(report, indent=1) + "\n")
        create_file(folder / "fold.txt", format_report(report))

    with ExitStack() as stack:
        return write_run(source, Path(run_dir), sections_of(fold, source.config), make, finish)


def sections_of(fold: Fold, source: Config) -> dict[str, Any]:
    """Return the sections of the config that a fold sets."""
    sections: dict[str, Any] = {"recurrence": fold.recurrence}
    if fold.options.lora_rank:
        sections["adapters"] = {
            "rank": fold.options.lora_rank,
            "targets": list(linear_shapes(source)),
            "norms": fold.options.norms == "own",
            "biases": fold.options.norms != "share" and has_biases(source),
        }
    if source.model.sliding_window is not None:
        kinds = window_kinds(fold, source)
        model = source.model.model_dump(mode="json") | {"attention_types": kinds}
        if "sliding" not in kinds:
            model |= {"sliding_window": None, "rope_theta_local": None}
        sections["model"] = model
    return sections


def has_biases(source: Config) -> bool:
    """Return True if any linear of the source has a bias."""
    return source.model.attention_bias != "none" or source.model.feed_forward_bias


# ----------------------------------------------------------------------------------------- values


def mean(tensors: Sequence[Tensor] | Callable[[int], Tensor], count: int) -> Tensor:
    """Return the mean of `count` tensors, each needed only once; a single tensor is returned
    unchanged."""
    get = tensors if callable(tensors) else tensors.__getitem__
    total = get(0)
    if count == 1:
        return total
    total = total.clone()
    for i in range(1, count):
        total += get(i)
    return total / count


def fold_gain(weight: Tensor, gain: Tensor) -> Tensor:
    """Return W diag(g) [out, in], which reads a norm of gain 1 like W reads one of gain g."""
    return weight * gain


def truncated_svd(residual: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nearest product of this rank: A = V^T [r, in], B = U S [out, r], and all singular
    values.

    The rank is capped at min(out, in). Singular vectors are known up to sign: compare products.
    Uses eigenvectors of R R^T in double precision, several times faster than a singular value
    decomposition. Singular values below 1e-6 of the largest, beyond fp32 precision, count as 0.
    """
    if residual.shape[0] > residual.shape[1]:
        # Transposed, with the singular values moved from one factor to the other.
        a, b, values = truncated_svd(residual.T, rank)
        kept = values[: len(a)].to(torch.float64)
        unit = b.to(torch.float64) / torch.where(kept > 0, kept, 1.0)
        return _orthonormal(unit.T, kept > 0).to(a), (a.T * kept).to(a), values
    wide = residual.to(torch.float64)
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    values = squares.flip(0).clamp_min(0.0).sqrt()
    values = torch.where(values > 1e-6 * values[0], values, 0.0)
    rank = min(rank, len(values))
    left, kept = vectors.flip(1)[:, :rank], values[:rank]
    rows = (left.T @ wide) / torch.where(kept > 0, kept, 1.0)[:, None]
    a = _orthonormal(rows, kept > 0).to(residual.dtype)
    return a, (left * kept).to(residual.dtype), values.to(residual.dtype)


def _orthonormal(rows: Tensor, known: Tensor) -> Tensor:
    """Return orthonormal rows [r, n]; rows not `known` are completed, so that they can be
    trained."""
    if bool(known.all()):
        return rows.contiguous()
    given = int(known.sum())  # known rows come first
    generator = torch.Generator().manual_seed(len(rows))
    more = torch.randn(len(rows) - given, rows.shape[1], generator=generator, dtype=rows.dtype)
    basis = torch.linalg.qr(torch.cat([rows[:given], more]).T).Q.T
    return torch.cat([rows[:given], basis[given:]])


def initial_pair(
    residual: Tensor, rank: int, gaussian: Callable[[], Tensor], lora_init: str
) -> tuple[Tensor, Tensor, float]:
    """Return an adapter's initial values and the share of the residual's energy that they hold.

    svd: the nearest product. zero, or a vanishing residual: A Gaussian, B = 0.
    """
    rank = min(rank, *residual.shape)
    if lora_init == "svd" and bool(residual.any()):
        a, b, values = truncated_svd(residual, rank)
        energy = values.to(torch.float64).square()
        return a, b, float(energy[:rank].sum() / energy.sum())
    return gaussian(), residual.new_zeros(residual.shape[0], rank), 0.0


@dataclass(frozen=True)
class MatrixReport:
    """The report of one linear in one step."""

    block: int
    loop: int
    source: int
    linear: str
    rank: int
    """Rank of the adapter; 0 means none."""
    cap: int
    weight_norm: float
    """Frobenius norm of the source's matrix, folded norm gains included."""
    residual_norm: float
    """Frobenius norm of its difference from the block's."""
    energy: float
    """Share of the residual's square that the adapter holds initially."""


class Pair(NamedTuple):
    """Initial values of an adapter."""

    name: str
    a: Tensor
    b: Tensor
    energy: float


class FoldedModel:
    """The parameters of a folded model, made from the source's tensors on demand.

    Args:
        config: the config of the result; its vocabulary must be resolved.
        read: returns a source tensor by its dense global name, in fp32.
    """

    def __init__(self, fold: Fold, config: Config, read: Callable[[str], Tensor]) -> None:
        self.fold, self.config = fold, config
        self.inventory = build_inventory(config)
        self.matrices: list[MatrixReport] = []
        self.unheld: dict[str, float] = {}
        """Norms and biases of the source that the result holds only in part: the largest relative
        difference, by name within a block."""
        self.seconds = {"reading": 0.0, "svd": 0.0}
        self._read = read
        self._base: tuple[str, Tensor] | None = None
        self._pair: Pair | None = None
        self._measured: set[str] = set()

    def shards(self) -> dict[str, TensorShard]:
        """Return every parameter without values, in the cheapest order to make them."""
        names = sorted(self.inventory, key=self._place)
        return {
            name: whole(torch.empty(self.inventory[name].shape, device="meta")) for name in names
        }

    def _place(self, name: str) -> tuple[int, str, int]:
        """Return a sort key: by block, by linear, the block's matrix before its adapters."""
        found = IN_BLOCK.fullmatch(name)
        if not found:
            return (-1, "", 0)
        block, loop, rest = found.groups()
        target = rest.partition(".lora_")[0]
        return (int(block), LINEARS.get(target, rest.rpartition(".")[0]), int(loop or -1))

    def work(self, name: str) -> int:
        """Return the bytes of a layer that making a parameter handles, as a measure of progress."""
        spec = self.inventory[name]
        found = IN_BLOCK.fullmatch(name)
        if not found or name.endswith((".lora_b", ".lora_bias")):
            return 0
        target, _, part = found[3].rpartition(".")
        if part == "lora_a":
            spec = self.inventory[f"blocks.{found[1]}.{LINEARS[target]}.weight"]
        return 4 * spec.size

    def value(self, name: str) -> Tensor:
        """Return a parameter, in fp32."""
        found = IN_BLOCK.fullmatch(name)
        if not found:
            return self.read(name)
        block, loop, rest = int(found[1]), found[2], found[3]
        if loop is None:
            return self.base(block, rest)
        if rest.endswith(".lora_bias"):
            bias = LINEARS[rest.removesuffix(".lora_bias")] + ".bias"
            layer = self.fold.source_of(block, int(loop))
            return self.layer_value(layer, bias) - self.base(block, bias)
        if rest.endswith((".lora_a", ".lora_b")):
            target, _, part = rest.rpartition(".")
            a, b = self.pair(block, int(loop), target)
            return a if part == "lora_a" else b
        inner = f"attention.{rest}" if rest.rpartition(".")[0] in HEAD_NORMS else rest
        return self.read(f"blocks.{self.fold.source_of(block, int(loop))}.{inner}")

    def read(self, name: str) -> Tensor:
        """Return a source tensor."""
        began = time.perf_counter()
        tensor = self._read(name)
        self.seconds["reading"] += time.perf_counter() - began
        return tensor

    def layer_value(self, layer: int, rest: str) -> Tensor:
        """Return a source layer's value of a block's parameter, with norm gains folded if
        configured."""
        tensor = self.read(f"blocks.{layer}.{rest}")
        if self.fold.options.norms != "fold":
            return tensor
        inner, _, kind = rest.rpartition(".")
        norm = READS_NORM.get(TARGETS.get(inner, ""))
        if norm is not None and kind == "weight":
            return fold_gain(tensor, self.read(f"blocks.{layer}.{norm}.weight"))
        return torch.ones_like(tensor) if inner in READS_NORM.values() else tensor

    def base(self, block: int, rest: str) -> Tensor:
        """Return a parameter of a shared block."""
        key = f"{block}.{rest}"
        if self._base is None or self._base[0] != key:
            layers = self.fold.made_of[block]
            made = mean(lambda i: self.layer_value(layers[i], rest), len(layers))
            self._base = (key, made)
            self._measure(block, rest, made)
        return self._base[1]

    def _measure(self, block: int, rest: str, made: Tensor) -> None:
        """Record the difference of a block's parameter from each layer it replaces, without
        adapters."""
        inner, _, kind = rest.rpartition(".")
        linear = kind == "weight" and inner in TARGETS
        if linear and f"blocks.{block}.loops.0.{TARGETS[inner]}.lora_a" in self.inventory:
            return  # Measured with its adapter.
        if f"blocks.{block}.loops.0.{TARGETS.get(inner)}.lora_bias" in self.inventory:
            return  # It is kept exactly.
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
        """Return A [r, in] and B [out, r] of a linear in one use of a block."""
        key = f"blocks.{block}.loops.{loop}.{target}"
        if self._pair is not None and self._pair.name == key:
            return self._pair.a, self._pair.b
        rest = LINEARS[target] + ".weight"
        value = self.layer_value(self.fold.source_of(block, loop), rest)
        residual = value - self.base(block, rest)
        spec = self.inventory[key + ".lora_a"]
        options = self.fold.options
        assert options.lora_init is not None
        began = time.perf_counter()
        opposite = self._opposite(block, loop, target)
        if opposite is not None:
            a, b, energy = opposite.a, -opposite.b, opposite.energy
        else:
            a, b, energy = initial_pair(
                residual,
                spec.shape[0],
                lambda: initial_values(spec, options.seed, torch.float32),
                options.lora_init,
            )
        self.seconds["svd"] += time.perf_counter() - began
        self._report(block, loop, target, value, residual, spec.shape[0], energy)
        self._pair = Pair(key, a, b, energy)
        return a, b

    def _opposite(self, block: int, loop: int, target: str) -> Pair | None:
        """Return the adapter of the previous loop if this one is its negative: the mean of two
        layers is equally far from both."""
        layers = {self.fold.source_of(block, 0), self.fold.source_of(block, loop)}
        before = f"blocks.{block}.loops.0.{target}"
        found = self._pair is not None and self._pair.name == before and bool(self._pair.energy)
        two = len(self.fold.made_of[block]) == 2 and set(self.fold.made_of[block]) == layers
        return self._pair if found and two else None

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

    def report(self, source: Config, seconds: float) -> Report:
        """Return the report after every parameter was made; `seconds` is the total time."""
        matrices = [asdict(matrix) for matrix in self.matrices]
        spent = {**self.seconds, "all": seconds}
        return build_report(self.fold, source, self.config, matrices, self.unheld, spent)
