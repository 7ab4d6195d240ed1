"""Captured passes: padded to a size and replayed over static buffers, they give the tokens of eager
ones. On the CPU a recorder stands in for CUDA graphs: its replay calls the captured function again.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from support.decoding import build_decoder, disturb
from support.engine_texts import MODELS, alone, build, draw_requests, read, serve
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megarecur.attention.plan import Choice
from megarecur.inference.engine import Engine
from megarecur.inference.graphs import Captured, Graphs, find_size, list_sizes
from megarecur.inference.passes import Item
from megarecur.inference.request import Draft, Exit, Request
from megarecur.model.transformer import Transformer
from megarecur.recurrence.schemes import layer_map

WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "lift_fresh",
         "lift_fresh_copy", "unique_dim", "_unique2"}  # fmt: skip
"""Operators that wait for the device, or copy new values to it."""


class Watch(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Recorder:
    """A capture whose replay calls the captured function again."""

    def __init__(self) -> None:
        self.replays, self.names = 0, set[str]()

    def __call__(self, run: Callable[[], Tensor]) -> Captured:
        # The warm-up of a CUDA graph runs the function once more.
        run()
        with Watch() as watch:
            output = run()
        self.names |= watch.names

        def replay() -> None:
            self.replays += 1
            output.copy_(run())

        return Captured(replay, output)


def capture_passes(engine: Engine) -> tuple[Graphs, Recorder]:
    """Let an engine on the CPU capture its passes."""
    assert engine.passes is not None
    steps = layer_map(engine.config.recurrence, engine.max_loops)
    recorder = Recorder()
    engine.passes.graphs = graphs = Graphs(engine.passes, steps, engine.max_texts, recorder)
    return graphs, recorder


def check_bounds(graphs: Graphs) -> None:
    """There is at most one captured pass per group and size."""
    groups = {group for group, _, _ in graphs.captured}
    assert len(graphs.captured) <= len(groups) * len(graphs.rows) * len(graphs.pages)
    for _, rows, pages in graphs.captured:
        assert rows in graphs.rows and pages in graphs.pages


@pytest.mark.parametrize("name", list(MODELS))
def test_texts_are_those_of_generate(name: str) -> None:
    """Whatever the arrivals, neighbours and page size; with preemptions."""
    random = Random(name)
    model, size = build(name), random.choice([1, 3, 4])
    requests = draw_requests(random, 7)
    most = max(-(-request.most_tokens // size) for request in requests)
    engine = Engine(
        model, page_size=size, num_pages=2 * most, chunk=random.choice([1, 3]), max_texts=5
    )
    graphs, recorder = capture_passes(engine)
    for request, handle in zip(requests, serve(engine, requests, random), strict=True):
        assert read(handle) == alone(model, request)
    check_bounds(graphs)
    assert recorder.replays > len(graphs.captured) > 0
    assert not recorder.names & WAITS


def test_a_capture_that_waits_is_noticed() -> None:
    """The check above sees values that are read from the device or copied to it."""
    recorder = Recorder()
    recorder(lambda: torch.ones(2) * 2)
    assert not recorder.names & WAITS
    for run in (lambda: torch.tensor([1.0]), lambda: torch.ones(2) * torch.ones(2).sum().item()):
        recorder = Recorder()
        recorder(run)
        assert recorder.names & WAITS


@pytest.mark.parametrize("adapters", [None, {"rank": 3, "norms": True}])
@pytest.mark.parametrize(
    "recurrence",
    [
        {"kind": "cycle", "num_blocks": 2, "depth": 6},
        {"kind": "loop", "prelude": 1, "core": 2, "coda": 1, "num_loops": 3,
         "injection": "linear", "final_norm_after_core": True},
    ],
)  # fmt: skip
def test_exits_and_drafts_are_those_of_eager_passes(recurrence: Any, adapters: Any) -> None:
    """With texts at different loops of a pass, skipped keys, preemptions, and a text that drafts,
    whose verifications have several rows and run eagerly."""
    model = disturb(build_decoder(recurrence, adapters, precision="fp64"))
    options: list[dict[str, Any]] = [
        {}, {"exit": Exit("loop", 1)}, {"exit": Exit("loop", 2, "share")},
        {"exit": Exit("confidence", 0.5)}, {"exit": Exit("oracle")}, {"draft": Draft(1, 3)},
    ]  # fmt: skip
    requests = [
        Request(tokens=(1, 2, 3, number), max_new_tokens=9, seed=number, **given)
        for number, given in enumerate(options)
    ]
    found = []
    for captures in (False, True):
        engine = Engine(model, page_size=2, num_pages=16, chunk=2, max_texts=4)
        graphs = capture_passes(engine)[0] if captures else None
        handles = serve(engine, requests, Random(4))
        found.append([list(handle) for handle in handles])
        assert engine.scheduler.preemptions
    assert graphs is not None
    check_bounds(graphs)
    assert found[0] == found[1]


@torch.inference_mode()
def start(model: Transformer, count: int) -> tuple[Engine, Graphs, list[Item]]:
    """Return an engine whose texts are about to decode, its graphs, and their items."""
    engine = Engine(model, page_size=2, num_pages=30)
    graphs, _ = capture_passes(engine)
    for number in range(count):
        engine.submit(Request(tokens=(1, 2, 3 + number), max_new_tokens=9, temperature=0.0))
    for _ in range(60):
        engine.step()
        texts = engine.scheduler.running
        if graphs.captured and all(text.num_new and text.item is None for text in texts):
            break
    for text in texts:
        engine.make_item(text)
    items = [text.item for text in texts if text.item is not None]
    assert len(items) == count
    return engine, graphs, items


@torch.inference_mode()
def test_padded_rows_write_to_no_page_of_a_text() -> None:
    """A pass of 3 texts is padded to 4 rows. It changes the places of its 3 rows at their loops,
    and the page that no text has."""
    engine, graphs, items = start(build("cycle"), 3)
    assert engine.passes is not None
    pool, step_of = engine.passes.pool, engine.passes.step_of
    places = {pool.num_slots * len(layer_map(engine.config.recurrence))}
    for item in items:
        position, visit = item.positions[0], item.visit
        page = int(item.table[position // pool.page_size])
        places |= {
            int(step_of[step.block, step.loop_index]) * pool.num_slots
            + page * pool.page_size + position % pool.page_size
            for step in visit.steps
        }  # fmt: skip
    # Rows of another pass may be left in the buffers.
    graphs.tables_TP.random_(0, pool.num_pages)
    graphs.integers_3T[0].random_(0, pool.page_size)
    graphs.x_TD.normal_()
    graphs.last = None
    before = [kept.clone() for kept in pool.rows]
    engine.passes.run(items)
    assert any(rows == 4 for _, rows, _ in graphs.captured)
    for kept, old in zip(pool.rows, before, strict=True):
        changed = (kept != old).flatten(1).any(1).nonzero()[:, 0].tolist()
        assert set(changed) == places


@torch.inference_mode()
def test_a_replay_reads_the_buffers_of_its_capture() -> None:
    """After new inputs are written into the same buffers, a replay gives what an eager pass gives
    for them; also at other loops."""
    model = build("loop")
    engine, graphs, items = start(model, 3)
    passes = engine.passes
    assert passes is not None
    buffers = [graphs.x_TD, graphs.integers_3T, graphs.tables_TP]
    addresses = [buffer.data_ptr() for buffer in buffers]
    generator, seen = torch.Generator().manual_seed(0), 0
    while any(item.index < len(item.visits) for item in items):
        if items[0].x_SD is not None:
            for item in items:
                item.x_SD = torch.randn(1, 24, generator=generator, dtype=torch.float64)
        number = len(graphs.captured)
        kept = [(item.index, item.x_SD, dict(item.reads)) for item in items]
        passes.run(items)
        found = [item.x_SD for item in items]
        for item, (index, x_SD, reads) in zip(items, kept, strict=True):
            item.index, item.x_SD, item.reads = index, x_SD, reads
        passes.last = None
        passes.run_eagerly(items)
        for item, x_SD in zip(items, found, strict=True):
            torch.testing.assert_close(item.x_SD, x_SD, rtol=0.0, atol=1e-12)
        seen += len(graphs.captured) == number
    assert seen > 2, "passes were replayed"
    assert [buffer.data_ptr() for buffer in buffers] == addresses


def test_other_passes_run_eagerly() -> None:
    engine = Engine(build("cycle"), page_size=2, max_texts=2)
    graphs, recorder = capture_passes(engine)
    handle = engine.submit(Request(tokens=(1, 2, 3), max_new_tokens=1, temperature=0.0))
    engine.run()
    assert len(list(handle)) == 1 and not graphs.captured and not recorder.replays
    # Injection in the middle of a group would need the values that items keep.
    (_, graphs, items) = start(build("cycle"), 2)
    assert graphs.accepts(items)
    assert not graphs.accepts(items * (graphs.rows[-1] // 2 + 1))
    graphs.marked = frozenset([items[0].visit.group[1]])
    assert not graphs.accepts(items)


def test_a_pass_that_cannot_be_captured_runs_eagerly() -> None:
    model = build("loop")
    engine = Engine(model)
    graphs, _ = capture_passes(engine)

    def refuse(run: Callable[[], Tensor]) -> Captured:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs.capture = refuse
    request = Request(tokens=(1, 2, 3), max_new_tokens=6, temperature=0.0)
    handle = engine.submit(request)
    with pytest.warns(UserWarning, match="graphs are off.*not permitted.*cuda_graphs=False"):
        engine.run()
    assert read(handle) == alone(model, request)
    assert engine.passes is not None and engine.passes.graphs is None


def test_the_cpu_captures_nothing() -> None:
    engine = Engine(build("cycle"))
    assert engine.passes is not None and engine.passes.graphs is None


def test_sizes() -> None:
    assert list_sizes(1, 64) == [1, 2, 4, 8, 16, 32, 64]
    assert list_sizes(8, 20) == [8, 16, 20]
    assert list_sizes(8, 3) == [3]
    assert [find_size([1, 2, 4, 6], count) for count in (1, 3, 4, 5)] == [1, 4, 4, 6]


@pytest.mark.cuda
@pytest.mark.parametrize("name", list(MODELS))
def test_cuda_graphs_give_the_texts_of_eager_passes(name: str) -> None:
    """In fp64, for which only the dense backend has a kernel on CUDA; and those of the CPU."""
    random, cpu = Random(name), build(name)
    model = Transformer(cpu.config, torch.device("cuda"))
    model.load_state_dict(cpu.state_dict())
    for weight in model.weights():
        weight.refresh()
    model.attention = Choice("dense", "the test's")
    requests = draw_requests(random, 7)
    for cuda_graphs in (False, True):
        engine = Engine(model, page_size=4, num_pages=20, chunk=3, cuda_graphs=cuda_graphs)
        assert engine.passes is not None
        for request, handle in zip(requests, serve(engine, requests, Random(name)), strict=True):
            assert read(handle) == alone(cpu, request)
        graphs = engine.passes.graphs
        assert (graphs is not None) == cuda_graphs
        if graphs is not None:
            assert isinstance(graphs, Graphs) and graphs.captured
            check_bounds(graphs)
