"""Load a run and serve it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megarecur.checkpoint.load import load_model, open_tokenizer
from megarecur.config.recurrence import Looped
from megarecur.config.run import Config
from megarecur.errors import ConfigError
from megarecur.inference.engine import Engine
from megarecur.inference.generate import check_options
from megarecur.inference.request import count_pages
from megarecur.parallel.mesh import pick_device
from megarecur.recurrence.depth import count_depths, default_depth, refuse_depth
from megarecur.serving.service import Limits, Service, check_libraries

PAGE_SIZE = 16
LEAST_PAGES = 256


@dataclass(frozen=True)
class ServeOptions:
    """The options of `megarecur serve`."""

    host: str = "127.0.0.1"
    port: int = 8000
    step: int | None = None
    device: str = "auto"
    pages: int | None = None
    """Pages of the pool; None: room for 16 texts of data.seq_length tokens."""
    max_texts: int = 64
    max_depth: int | None = None
    """Most loops of a request; None: the most of training."""
    limits: Limits = field(default_factory=Limits)
    cuda_graphs: bool = True
    """On CUDA, capture decode passes as graphs."""


def serve(run: Path, options: ServeOptions, announce: Callable[[str], None]) -> int:
    """Serve a run until a signal; returns the exit code.

    Args:
        announce: called with a line that names the address, once requests are accepted.

    Raises:
        ConfigError: a run that continues no text, missing libraries, or a port in use.
        CheckpointError: the run has no usable checkpoint.
    """
    check_libraries()
    from megarecur.serving.server import open_socket, serve_forever

    with open_socket(options.host, options.port) as listening:
        service = open_service(run, options)
        host, port = listening.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        ready = partial(announce, f"serving {service.name} at http://{host}:{port}")
        return serve_forever(service, listening, ready)


def open_service(run: Path, options: ServeOptions) -> Service:
    """Return a service of a run.

    Raises:
        ConfigError: a run that continues no text, or more pages than fit into memory.
        CheckpointError: the run has no usable checkpoint.
    """
    model, loaded = load_model(run, options.step, pick_device(options.device))
    config = loaded.config
    check_options(config, [0], 1, 1.0, None, 1.0, None)
    tokenizer = open_tokenizer(loaded)
    pages = options.pages
    if pages is None:
        pages = max(LEAST_PAGES, 16 * count_pages(config.data.seq_length, PAGE_SIZE))
    try:
        engine = Engine(
            model,
            num_pages=pages,
            page_size=PAGE_SIZE,
            max_texts=options.max_texts,
            max_loops=find_deepest(config, options.max_depth),
            missing_ids=tokenizer.missing_ids(config.model.vocab_size or 0),
            cuda_graphs=options.cuda_graphs,
        )
    except (RuntimeError, MemoryError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--pages {pages}: no memory ({reason}); lower it") from None
    return Service(engine, tokenizer, loaded, run.resolve().name, options.limits)


def find_deepest(config: Config, max_depth: int | None) -> int | None:
    """Return the most loops of a request; None if the scheme has no loops.

    Raises:
        ConfigError: `max_depth` loops cannot run.
    """
    if not isinstance(config.recurrence, Looped):
        if max_depth is not None:
            raise ConfigError(f"--max-depth: {refuse_depth(config, max_depth)}")
        return None
    usual = default_depth(config.recurrence).num_loops
    if max_depth is None:
        return max([usual, *(depth.num_loops for depth in count_depths(config) if depth)])
    if refusal := refuse_depth(config, max_depth):
        raise ConfigError(f"--max-depth: {refusal}")
    if max_depth < usual:
        raise ConfigError(
            f"--max-depth {max_depth} is less than the {usual} loops of a request without a depth; "
            "raise it"
        )
    return max_depth
