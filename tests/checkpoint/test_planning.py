"""Plans of saves: every rectangle is written once, and a plan stands while the layout does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import LAYOUTS, assert_step, make_shards, place

from megarecur.checkpoint import planning
from megarecur.checkpoint.checkpoint import SavePlanner, load, write
from megarecur.checkpoint.planning import assign_writers, bits, decode_layout, describe_layout
from megarecur.errors import CheckpointError
from megarecur.parallel import shards as rectangles
from megarecur.parallel.shards import boxes, tiling_fault


@given(st.sampled_from(LAYOUTS), st.integers(1, 9))
@settings(max_examples=40)
def test_every_rectangle_is_written_once_by_a_rank_that_holds_it(layout, size) -> None:
    layouts = [describe_layout(make_shards(layout, rank, size))[0] for rank in range(size)]
    held = [decode_layout(each) for each in layouts]
    written = Counter(
        chunk
        for chunks, mask in zip(held, assign_writers(layouts), strict=True)
        for chunk, mine in zip(chunks, bits(mask), strict=False)
        if mine
    )
    assert written == Counter(set().union(*held))


def test_replicas_are_shared_out_by_bytes() -> None:
    layouts = [describe_layout(make_shards("replicated", rank, 4))[0] for rank in range(4)]
    assert len(set(layouts)) == 1
    chunks = decode_layout(layouts[0])
    sums = [
        sum(chunk.nbytes for chunk, mine in zip(chunks, bits(mask), strict=False) if mine)
        for mask in assign_writers(layouts)
    ]
    assert max(sums) <= max(chunk.nbytes for chunk in chunks)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), st.data())
@settings(max_examples=150)
def test_the_shortcut_for_many_chunks_answers_as_the_sweep_does(shape, data) -> None:
    count = 1
    for size in shape:
        count *= size
    edges = sorted(data.draw(st.lists(st.integers(0, count), max_size=5)))
    pairs = zip([0, *edges], [*edges, count], strict=True)
    chunks = [box for start, stop in pairs for box in boxes(shape, start, stop)]
    if data.draw(st.booleans()):
        chunks[data.draw(st.integers(0, len(chunks) - 1))] = data.draw(st.sampled_from(chunks))
    slow = tiling_fault(shape, chunks)
    with mock.patch.object(rectangles, "MANY", 0):
        assert tiling_fault(shape, chunks) == slow


GATHER = planning.gather_bytes


def plan_three_times() -> list[list[int]]:
    """Bytes that this rank sends to be planned: at first, again, and after rank 1 has changed."""
    rank, size = place()
    planner, shards, found = SavePlanner(), make_shards("zero", rank, size, step=1), []
    for changed in (False, False, True):
        sent: list[int] = []

        def count(own: bytes, group: object, sent: list[int] = sent) -> list[bytes]:
            sent.append(len(own))
            return GATHER(own, group)

        if changed and rank == 1:
            shards = dict(reversed(shards.items()))
        with mock.patch.object(planning, "gather_bytes", count):
            items = planner.plan(shards, "cannot save")
        written = [chunk.name for chunk, _ in items]
        assert list(dict.fromkeys(written)) == [name for name in shards if name in written]
        found.append(sent)
    assert planner.num_plans == 2
    return found


def test_only_differences_travel(world) -> None:
    for rank, (first, again, changed) in enumerate(world(4).run(plan_three_times)):
        assert first[0] == 16 and first[1] > 100 and again == []
        assert (changed[0] == 16 and changed[1] > 100) if rank == 1 else changed == [0, 0]


def save_with_one_planner(root: Path) -> int:
    """Save in layouts that change meanwhile, one of them wrong; returns the number of plans."""
    rank, size = place()
    planner = SavePlanner()
    for step, layout in enumerate(("rows", "rows", "mixed", "replicated"), 1):
        write(root, step, make_shards(layout, rank, size, step=step), {}, planner=planner)
        if step == 2:
            wrong = make_shards("rows", rank, size, step=9)
            del wrong["mask" if rank == 0 else "token_counts"]
            with pytest.raises(CheckpointError, match="mask: chunks hold"):
                write(root, 9, wrong, {}, planner=planner)
    for step in range(1, 5):
        target = make_shards("columns", rank, size)
        load(root / f"step-{step:08d}", target)
        assert_step(target, step)
    return planner.num_plans


def test_a_planner_follows_changes_of_the_layout(world, tmp_path) -> None:
    assert world(2).run(save_with_one_planner, tmp_path) == [3, 3]
