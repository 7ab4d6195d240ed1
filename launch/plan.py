"""Plan one layout, or search all layouts of a world: `megarecur plan`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megarecur.config.run import Config
from megarecur.data_prep.console import EscapingConsole
from megarecur.errors import ConfigError
from megarecur.launch.configs import see_corpora
from megarecur.launch.layout import describe_plan, describe_search
from megarecur.launch.terminal import show
from megarecur.plan.cluster import Cluster, load_cluster
from megarecur.plan.cost import Seen
from megarecur.plan.predict import Layout, LayoutPlan, complete, make_draft
from megarecur.plan.search import list_layouts, search

SECONDS_BETWEEN_LINES = 5.0


def plan_config(
    config: Config,
    world: int,
    tensor: int | None,
    pipeline: int | None,
    context: int | None,
    zero_stage: int | None,
    hardware: str | None,
) -> LayoutPlan:
    """Print the plan of a layout, or the best ones; return the (best) plan.

    Args:
        config: with its vocabulary resolved.
        world: number of ranks.
        tensor: tensor-parallel ranks; None: any.
        pipeline: pipeline ranks; None: any.
        context: ranks that share a sequence; None: any, or the config's if tensor and pipeline are
            given.
        zero_stage: ZeRO stage; None: the config's, or in a search the first one that fits.
        hardware: name or file of the hardware; None: by train.device.

    Raises:
        ConfigError, MeshError, PlacementError: the config cannot be planned, or no layout fits.
    """
    cluster = load_cluster(hardware or default_hardware(config), "--hardware ")
    seen = see_corpora(config)
    if tensor and pipeline:
        (shape,) = list_layouts(world, tensor, pipeline, context or config.parallel.context)
        stage = config.parallel.zero_stage if zero_stage is None else zero_stage
        layout = shape._replace(zero_stage=stage)
        found = complete(make_draft(config, layout, cluster, seen=seen))
        show(lambda width: describe_plan(found, width))
        return found
    return search_layouts(config, cluster, world, tensor, pipeline, context, zero_stage, seen)


def search_layouts(
    config: Config,
    cluster: Cluster,
    world: int,
    tensor: int | None,
    pipeline: int | None,
    context: int | None,
    zero_stage: int | None,
    seen: Seen | None,
) -> LayoutPlan:
    """Print the best layouts of a world; return the plan of the first."""
    with shown_progress() as report:
        result = search(
            config,
            cluster,
            world,
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            zero_stage=zero_stage,
            seen=seen,
            report=report,
        )
    own = config.parallel
    layout = Layout(own.tensor, own.pipeline, world // own.replica, own.zero_stage, own.context)
    own_layout = layout if world % own.replica == 0 else None
    show(lambda _: describe_search(result, world, own_layout))
    if result.best:
        show(lambda width: describe_plan(result.best[0], width))
    if not result.best:
        raise ConfigError(
            f"--world-size {world}: none of its {result.layouts} layouts can run this config on "
            f"{cluster.name}; the reasons are listed above"
        )
    return result.best[0]


def default_hardware(config: Config) -> str:
    """Return the default hardware preset."""
    return "cpu" if config.train.device == "cpu" else "h100"


@contextmanager
def shown_progress() -> Iterator[Callable[[int, int], None]]:
    """Yield a progress report of a search: a changing line on a terminal, otherwise one every few
    seconds."""
    console = EscapingConsole(stderr=True)
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
