"""Division and cost of Muon's orthogonalization.

A rank that holds whole matrices orthogonalizes all of its own. Ranks that hold parts divide the
matrices among themselves: the owner of a matrix receives the parts of its momentum and sends back
the parts of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megarecur.config.run import Config
from megarecur.plan.cluster import Cluster, Link
from megarecur.plan.cost import parameter_bytes
from megarecur.recurrence.inventory import ParameterSpec, is_frozen, uses_muon

RESULT_BYTES = 2
"""Bytes of an element of an orthogonalized matrix, in bf16."""


@dataclass(frozen=True, slots=True)
class MuonCost:
    """Cost of one rank in an optimizer step."""

    sent: int = 0
    """Bytes that the rank sends to the owners of its parts, and results that it sends back."""
    seconds: float = 0.0
    """Time of the products and of the two exchanges."""


def divide_matrices(specs: Sequence[ParameterSpec], ranks: int) -> list[list[ParameterSpec]]:
    """Return the matrices that each rank owns: the most expensive ones first, each to the rank with
    the least work."""
    owned: list[list[ParameterSpec]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for spec in sorted(specs, key=lambda spec: (-spec.size * min(spec.shape), spec.name)):
        rank = load.index(min(load))
        owned[rank].append(spec)
        load[rank] += spec.size * min(spec.shape)
    return owned


def count_orthogonalization(shape: Sequence[int], iterations: int) -> int:
    """Return the FLOPs of quintic Newton-Schulz iterations of a matrix: with m rows, the fewer, and
    n columns, X X^T and B X take 2 m^2 n each, and the square of X X^T takes 2 m^3."""
    rows, columns = sorted(shape)
    return iterations * (4 * rows**2 * columns + 2 * rows**3)


def cost_muon(
    config: Config, specs: Sequence[ParameterSpec], peers: int, link: Link, cluster: Cluster
) -> MuonCost:
    """Return what Muon costs the busiest of the ranks that hold the same matrices.

    Args:
        specs: the parameters of a pipeline rank.
        peers: number of ranks that hold parts of the same matrices.
        link: between them.

    Every rank counts as holding an equal part of each matrix.
    """
    options, muon = config.optimizer, config.optimizer.muon
    if muon is None:
        return MuonCost()
    matrices = [
        spec
        for spec in specs
        if not is_frozen(options, spec.name) and uses_muon(options, spec.name, len(spec.shape))
    ]
    seconds = max(
        sum(
            flops / cluster.product_rate("bf16", (flops / muon.ns_steps / 6) ** (1 / 3))
            for flops in (count_orthogonalization(spec.shape, muon.ns_steps) for spec in owned)
        )
        for owned in divide_matrices(matrices, peers)
    )
    if peers == 1:
        return MuonCost(0, seconds)
    share = sum(spec.size for spec in matrices) * (peers - 1) // peers**2
    there, back = share * parameter_bytes(config), share * RESULT_BYTES
    return MuonCost(there + back, seconds + link.time(there) + link.time(back))
