"""`megarecur plan`: one layout, or a search among all of a world's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from megarecur.config.schema import Config
from megarecur.errors import ConfigError
from megarecur.plan.cluster import Cluster, load_cluster
from megarecur.plan.predict import Layout, Plan, complete, make_draft
from megarecur.plan.report import print_plan, print_search
from megarecur.plan.search import list_layouts, search

SECONDS_BETWEEN_LINES = 5.0


def plan_config(
    config: Config,
    world: int,
    tensor: int | None,
    pipeline: int | None,
    zero_stage: int | None,
    cluster_name: str | None,
) -> Plan:
    """Print the plan of a layout, or the best ones; returns the (best) plan.

    Raises:
        ConfigError, MeshError, PlacementError: what cannot be planned, or no layout that fits.
    """
    cluster = load_cluster(cluster_name or default_cluster(config))
    if tensor and pipeline:
        (size,) = list_layouts(world, tensor, pipeline)
        stage = config.parallel.zero_stage if zero_stage is None else zero_stage
        found = complete(make_draft(config, Layout(*size, stage), cluster))
        print_plan(found)
        return found
    return search_layouts(config, cluster, world, tensor, pipeline, zero_stage)


def search_layouts(
    config: Config,
    cluster: Cluster,
    world: int,
    tensor: int | None,
    pipeline: int | None,
    zero_stage: int | None,
) -> Plan:
    """Print the best layouts of a world; returns the plan of the first."""
    with shown_progress() as report:
        result = search(
            config,
            cluster,
            world,
            tensor=tensor,
            pipeline=pipeline,
            zero_stage=zero_stage,
            report=report,
        )
    own = config.parallel
    replica = own.tensor * own.pipeline
    layout = Layout(own.tensor, own.pipeline, world // replica, own.zero_stage)
    print_search(result, world, layout if world % replica == 0 else None)
    if not result.best:
        raise ConfigError(
            f"--world-size {world}: none of its {result.layouts} layouts can run this config on "
            f"{cluster.name}; the reasons are listed above"
        )
    return result.best[0]


def default_cluster(config: Config) -> str:
    """The preset meant where none is named."""
    return "cpu" if config.train.device == "cpu" else "h100"


@contextmanager
def shown_progress() -> Iterator[Callable[[int, int], None]]:
    """How far a search is: a line that changes on a terminal; else one every few seconds."""
    console = Console(stderr=True, highlight=False)
    last = time.monotonic()
    status = console.status("planning") if console.is_terminal else None

    def report(done: int, total: int) -> None:
        nonlocal last
        text = f"planning: {done / total:.0%} of the layouts"
        if status is not None:
            status.update(text)
        elif time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            console.print(text)

    if status is None:
        yield report
        return
    with status:
        yield report
