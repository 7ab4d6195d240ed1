"""Orders of pipelines, without torch: valid for any walk, and as fast as theory says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.walks import costs_of, equal_costs, loops, vee, visit, walks

from megarecur.errors import ConfigError, PlacementError
from megarecur.plan.generate import (
    greedy,
    interleaved,
    interleaved_zero_bubble,
    one_f_one_b,
    zbv,
)
from megarecur.plan.order import (
    Computes,
    Op,
    PipelineOrder,
    StageCost,
    add_messages,
    find_partner,
    order_hash,
    validate_order,
)
from megarecur.plan.simulate import CLOSED_FORMS, Timeline, choose_order, lower_bound, simulate
from megarecur.plan.walk import Stage, Walk, forward_only

MICROBATCHES = st.integers(1, 9)


def every_order(walk: Walk, num_microbatches: int, costs: Any) -> dict[str, Computes]:
    """Of every maker that the walk suits."""
    made = {name: form.make(walk, num_microbatches) for name, form in CLOSED_FORMS.items()}
    for i, (split, alternate) in enumerate(product((True, False), repeat=2)):
        in_flight = (1, 2.5, None, 1.5)[i]
        name = f"greedy, split={split}, alternate={alternate}, in flight {in_flight}"
        made[name] = greedy(
            walk, num_microbatches, costs, split=split, alternate=alternate, in_flight=in_flight
        )
    return {name: computes for name, computes in made.items() if computes is not None}


def simulate_computes(computes: Computes | None, walk: Walk, costs: Any) -> Timeline:
    assert computes is not None
    return simulate(add_messages(computes, walk, costs), walk, costs)


def parse(text: str) -> list[Op]:
    """Like "F0.0 B0.0"."""
    words = (word.split(".") for word in text.split())
    return [Op(head.rstrip("0123456789"), int(head.lstrip("FBIW")), int(m)) for head, m in words]  # type: ignore[arg-type]


def finishes_if_sends_block(order: PipelineOrder, walk: Walk) -> bool:
    """Whether an order ends even if every send and receive waits for the other. So generated orders
    run on a GPU whose allocator waits for all streams at any time."""
    position, pending = [0] * len(order), list(range(len(order)))
    while pending:
        rank = pending.pop()
        while position[rank] < len(order[rank]):
            partner = find_partner(order[rank][position[rank]])
            if partner is not None:
                other = walk[partner.stage].rank
                if order[other][position[other] : position[other] + 1] != (partner,):
                    break  # The other rank returns here when it has reached this message.
                position[other] += 1
                pending.append(other)
            position[rank] += 1
    return all(at == len(ops) for at, ops in zip(position, order, strict=True))


# --------------------------------------------------------------------------------------- validity


@settings(max_examples=80)
@given(st.data(), walks(), MICROBATCHES)
def test_every_order_is_valid_and_no_faster_than_the_bound(
    data: st.DataObject, walk: Walk, num_microbatches: int
) -> None:
    costs = data.draw(costs_of(walk))
    for name, computes in every_order(walk, num_microbatches, costs).items():
        for clock in (costs, None):
            order = add_messages(computes, walk, clock)
            assert validate_order(order, walk, num_microbatches) == [], name
            assert finishes_if_sends_block(order, walk), name
        timeline = simulate(order, walk, costs)
        split = any(op.kind == "I" for ops in computes for op in ops)
        bound = lower_bound(walk, costs, num_microbatches, split)
        assert timeline.makespan >= bound * (1 - 1e-9), name


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("num_microbatches", range(1, 12))
def test_closed_forms_take_any_number_of_micro_batches(ranks: int, num_microbatches: int) -> None:
    for walk in (loops(ranks, 1), loops(ranks, 2), loops(ranks, 3), vee(ranks)):
        costs = equal_costs(walk)
        for name, computes in every_order(walk, num_microbatches, costs).items():
            order = add_messages(computes, walk)
            assert validate_order(order, walk, num_microbatches) == [], name


def test_which_walk_suits_which_closed_form() -> None:
    suits = {
        name: [
            form.make(walk, 4) is not None
            for walk in (loops(3, 1), loops(3, 2), vee(3), visit(0, 1, 2, 1, 0), visit(1, 0))
        ]
        for name, form in CLOSED_FORMS.items()
    }
    assert suits == {
        "1f1b": [True, False, False, False, False],
        "interleaved": [False, True, False, False, False],
        "interleaved_zero_bubble": [True, True, False, False, False],
        "zbv": [False, False, True, False, False],
    }


def test_one_f_one_b_by_hand() -> None:
    walk = loops(2, 1)
    order = add_messages(one_f_one_b(walk, 2) or [], walk)
    assert [" ".join(map(str, ops)) for ops in order] == [
        "F0.0 SEND_F0.0 F0.1 SEND_F0.1 RECV_B0.0 B0.0 RECV_B0.1 B0.1",
        "RECV_F1.0 F1.0 RECV_F1.1 B1.0 SEND_B1.0 F1.1 B1.1 SEND_B1.1",
    ]


def test_a_backward_pass_waits_for_those_of_its_rank_that_hand_gradients_over() -> None:
    """Stage 0's gradient comes from stage 2 alone: a value read there. None comes back from 1."""
    walk = (
        Stage(0, 0, (), first=True, backward=True),
        Stage(1, 1, ()),
        Stage(2, 0, (), last=True, backward=True),
    )
    costs = equal_costs(walk)
    order = greedy(walk, 2, costs, split=False)
    assert order is not None and validate_order(order, walk, 2) == []
    for microbatch in (0, 1):
        early, late = (order[0].index(Op("B", stage, microbatch)) for stage in (2, 0))
        assert early < late
        problems = validate_order(swap(order, 0, early, late), walk, 2)
        assert f"rank 0: B0.{microbatch} comes before B2.{microbatch}" in problems


def test_a_stage_on_the_same_rank_and_one_without_gradient_need_no_message() -> None:
    walk = (
        Stage(0, 0, (), first=True),
        Stage(1, 0, ()),
        Stage(2, 1, (), last=True, backward=True),
    )
    costs = equal_costs(walk)
    order = add_messages(greedy(walk, 1, costs) or [], walk, costs)
    assert [" ".join(map(str, ops)) for ops in order] == [
        "F0.0 F1.0 SEND_F1.0",
        "RECV_F2.0 F2.0 I2.0 W2.0",
    ]


# ----------------------------------------------------------------------------------------- faults


def swap(order: PipelineOrder, rank: int, a: int, b: int) -> PipelineOrder:
    ops = list(order[rank])
    ops[a], ops[b] = ops[b], ops[a]
    return (*order[:rank], tuple(ops), *order[rank + 1 :])


def replaced(order: PipelineOrder, rank: int, ops: list[Op]) -> PipelineOrder:
    return (*order[:rank], tuple(ops), *order[rank + 1 :])


def find(order: PipelineOrder, *kinds: str) -> list[tuple[int, int]]:
    """(rank, position) of all operations of these kinds."""
    return [(r, i) for r, ops in enumerate(order) for i, op in enumerate(ops) if op.kind in kinds]


@st.composite
def orders(draw: st.DrawFn) -> tuple[PipelineOrder, Walk, int]:
    walk, num_microbatches = draw(walks()), draw(st.integers(2, 5))
    made = every_order(walk, num_microbatches, equal_costs(walk))
    computes = made[draw(st.sampled_from(sorted(made)))]
    return add_messages(computes, walk), walk, num_microbatches


faults = settings(max_examples=40)


@faults
@given(st.data(), orders())
def test_found_an_operation_dropped_or_doubled(
    data: st.DataObject, made: tuple[PipelineOrder, Walk, int]
) -> None:
    order, walk, num_microbatches = made
    rank = data.draw(st.integers(0, len(order) - 1))
    ops = list(order[rank])
    at = data.draw(st.integers(0, len(ops) - 1))
    dropped = validate_order(
        replaced(order, rank, ops[:at] + ops[at + 1 :]), walk, num_microbatches
    )
    assert any(f"rank {rank}: {ops[at]} is missing" in problem for problem in dropped)
    doubled = validate_order(replaced(order, rank, [*ops, ops[at]]), walk, num_microbatches)
    assert f"rank {rank}: {ops[at]} comes 2 times" in doubled


@faults
@given(st.data(), orders())
def test_found_an_operation_on_another_rank(
    data: st.DataObject, made: tuple[PipelineOrder, Walk, int]
) -> None:
    order, walk, num_microbatches = made
    assume(len(order) > 1)
    op = data.draw(st.sampled_from(order[0]))
    moved = replaced(order, 0, [some for some in order[0] if some != op])
    moved = replaced(moved, 1, [*moved[1], op])
    problems = validate_order(moved, walk, num_microbatches)
    assert f"rank 0: {op} is missing" in problems
    assert f"rank 1: {op} does not belong there" in problems


@faults
@given(st.data(), orders())
def test_found_receives_that_are_swapped(
    data: st.DataObject, made: tuple[PipelineOrder, Walk, int]
) -> None:
    order, walk, num_microbatches = made
    receives = find(order, "RECV_F", "RECV_B")
    pairs = [
        (rank, a, b)
        for rank, a in receives
        for other, b in receives
        if rank == other and a < b and order[rank][a].kind == order[rank][b].kind
        and order[rank][a].stage == order[rank][b].stage
    ]  # fmt: skip
    assume(pairs)
    assert validate_order(swap(order, *data.draw(st.sampled_from(pairs))), walk, num_microbatches)


@faults
@given(st.data(), orders())
def test_found_what_comes_before_what_it_needs(
    data: st.DataObject, made: tuple[PipelineOrder, Walk, int]
) -> None:
    """A receive, or any F, B, I or W, moved behind an operation of its stage that needs it."""
    order, walk, num_microbatches = made
    users = {"RECV_F": "F", "RECV_B": "BI", "F": "BI", "I": "W"}
    pairs = [
        (rank, early, late)
        for rank, early in find(order, *users)
        for late, op in enumerate(order[rank])
        if op[1:] == order[rank][early][1:] and op.kind in users[order[rank][early].kind]
    ]
    assume(pairs)
    rank, early, late = data.draw(st.sampled_from(pairs))
    ops = list(order[rank])
    ops.insert(late, ops.pop(early))
    problems = validate_order(replaced(order, rank, ops), walk, num_microbatches)
    assert f"rank {rank}: {order[rank][late]} comes before {order[rank][early]}" in problems


def test_found_a_send_before_its_operation() -> None:
    walk = loops(2, 1)
    order = swap(add_messages(one_f_one_b(walk, 2) or [], walk), 0, 0, 1)
    assert validate_order(order, walk, 2) == ["rank 0: SEND_F0.0 comes before F0.0"]


def test_two_ranks_may_both_send_first() -> None:
    """Their messages are of two directions, so neither waits for the other."""
    walk = loops(2, 2)
    order = add_messages(
        [
            parse("F0.0 F0.1 F2.0 F2.1 B2.0 B2.1 B0.0 B0.1"),
            parse("F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 B1.0 B1.1"),
        ],
        walk,
    )
    assert validate_order(order, walk, 2) == [] and finishes_if_sends_block(order, walk)
    first, second = list(order[0]), list(order[1])
    first.remove(Op("RECV_F", 2, 0))
    first.insert(first.index(Op("SEND_F", 0, 1)) + 1, Op("RECV_F", 2, 0))
    second.remove(Op("RECV_F", 1, 1))
    second.insert(second.index(Op("SEND_F", 1, 0)) + 1, Op("RECV_F", 1, 1))
    both = (tuple(first), tuple(second))
    assert not finishes_if_sends_block(both, walk)
    assert validate_order(both, walk, 2) == []
    costs = equal_costs(walk, 0.1)
    assert simulate(both, walk, costs).makespan == simulate(order, walk, costs).makespan


def test_found_sends_that_wait_behind_others_of_their_direction() -> None:
    """A rank keeps four unfinished sends. The fifth waits for the first, and here no rank receives
    until all its sends of a stage have finished."""
    walk = forward_only(loops(2, 2))
    for num_microbatches, refused in ((9, False), (10, True)):
        numbers = range(num_microbatches)

        def run(stage: int, numbers: range = numbers) -> list[Op]:
            messages = ("RECV_F", "F", "SEND_F")[stage == 0 : 3 - (stage == 3)]
            return [Op(kind, stage, j) for j in numbers for kind in messages]  # type: ignore[arg-type]

        order = (tuple(run(0) + run(2)), tuple(run(1) + run(3)))
        problems = validate_order(order, walk, num_microbatches)
        stuck = "all ranks wait for each other: rank 0 at SEND_F0.5, rank 1 at SEND_F1.0"
        assert problems == ([stuck] if refused else [])


def test_found_receives_of_one_direction_that_are_swapped() -> None:
    """An activation and a gradient travel from rank 0 to rank 1. Receives from two ranks may be
    swapped: they are of two directions."""
    walk = loops(2, 2)
    made = interleaved(walk, 4) or []
    order = add_messages(made, walk)
    of_one = [
        i for i, op in enumerate(order[1]) if op.kind in ("RECV_F", "RECV_B")
    ]  # All come from rank 0.
    pairs = [
        (a, b)
        for a, b in pairwise(of_one)
        if {order[1][a].kind, order[1][b].kind} == {"RECV_F", "RECV_B"}
    ]
    assert pairs
    for a, b in pairs:
        problems = validate_order(swap(order, 1, a, b), walk, 4)
        assert any(problem.startswith("ranks 0 to 1: message ") for problem in problems)
    walk = loops(3, 1)
    order = add_messages(one_f_one_b(walk, 6) or [], walk, equal_costs(walk, 0.5))
    ops = order[1]
    a, b = next(
        (i, i + 1)
        for i in range(len(ops))
        if {op.kind for op in ops[i : i + 2]} == {"RECV_F", "RECV_B"}
    )
    costs = equal_costs(walk, 0.5)
    swapped = swap(order, 1, a, b)
    assert validate_order(swapped, walk, 6) == []
    assert simulate(swapped, walk, costs).makespan == simulate(order, walk, costs).makespan


def arrivals(order: PipelineOrder, walk: Walk, hop: float) -> dict[str, float]:
    """When each message arrives, if every operation takes one unit."""
    ranks = simulate(order, walk, (StageCost(1.0, 1.0, 1.0, hop),) * len(walk)).ranks
    return {str(op): end for ops in ranks for op, _, end in ops if op.kind.startswith("RECV")}


@pytest.mark.parametrize(
    ("hop", "expected"),
    # F0.1 is sent at 2. At a hop of 3, the message before it arrives at 4, and F1.0 travels back
    # from 5 to 8, while F0.1 is under way.
    [(3.0, (4.0, 7.0, 8.0, 11.0)), (0.5, (1.5, 2.5, 3.0, 4.0))],
)
def test_a_message_waits_for_those_of_its_direction_alone(
    hop: float, expected: tuple[float, ...]
) -> None:
    walk = forward_only(visit(0, 1, 0))
    costs = (StageCost(1.0, 1.0, 1.0, hop),) * len(walk)
    order = add_messages([parse("F0.0 F0.1 F2.0 F2.1"), parse("F1.0 F1.1")], walk, costs)
    names = ("RECV_F1.0", "RECV_F1.1", "RECV_F2.0", "RECV_F2.1")
    assert arrivals(order, walk, hop) == dict(zip(names, expected, strict=True))


def test_a_message_waits_until_its_receive_is_reached() -> None:
    walk = forward_only(visit(0, 1))
    order = add_messages([parse("F0.0 F0.1"), parse("F1.0 F1.1")], walk)
    late = replaced(
        order, 1, [Op("RECV_F", 1, 0), *parse("F1.0"), Op("RECV_F", 1, 1), *parse("F1.1")]
    )
    early = replaced(order, 1, [Op("RECV_F", 1, 0), Op("RECV_F", 1, 1), *parse("F1.0 F1.1")])
    assert arrivals(late, walk, 1.5)["RECV_F1.1"] == 5.0
    assert arrivals(early, walk, 1.5)["RECV_F1.1"] == 4.0


def test_receives_are_reached_before_the_operation_in_progress() -> None:
    """The transfer overlaps with it, as the generator's clock says."""
    walk = forward_only(visit(0, 1))
    costs = (StageCost(1.0, 1.0, 1.0, 0.5), StageCost(3.0, 1.0, 1.0))
    order = add_messages([parse("F0.0 F0.1"), parse("F1.0 F1.1")], walk, costs)
    assert " ".join(map(str, order[1])) == "RECV_F1.0 RECV_F1.1 F1.0 F1.1"
    assert simulate(order, walk, costs).makespan == 7.5


def test_operations_that_cannot_run_get_no_messages() -> None:
    walk = loops(2, 1)
    with pytest.raises(ValueError, match=r"cannot run: rank 0 at B0.0, rank 1 at B1.0"):
        add_messages([parse("B0.0 F0.0"), parse("B1.0 F1.0")], walk)
    order = add_messages(one_f_one_b(walk, 1) or [], walk)
    with pytest.raises(ValueError, match=r"deadlocks: rank 1 at RECV_F1.0"):
        simulate(replaced(order, 0, [Op("F", 0, 0)]), walk, equal_costs(walk))


# ------------------------------------------------------------------------------------------ speed

Maker = Callable[[Walk, int], Computes | None]


@pytest.mark.parametrize(
    ("make", "walk_of", "bubbles", "peaks"),
    [
        (one_f_one_b, lambda p: loops(p, 1), (27.3, 15.8, 17.9, 22.5), (4, 8)),
        (interleaved, lambda p: loops(p, 2), (15.8, 8.6, 9.9, 12.3), (5.5, 11.5)),
        (interleaved, lambda p: loops(p, 4), (8.6, 4.5, 5.2, 10.7), (4.8, 9.8)),
        (interleaved_zero_bubble, lambda p: loops(p, 2), (5.9, 3.0, 3.5, 6.9), (4, 8)),
        (interleaved_zero_bubble, lambda p: loops(p, 4), (3.0, 1.5, 1.8, 6.8), (4, 8)),
        (zbv, vee, (5.9, 3.0, 3.5, 6.6), (4, 8)),
    ],
    ids=["1f1b", "interleaved 2", "interleaved 4", "zero bubble 2", "zero bubble 4", "zbv"],
)
def test_bubbles_and_peaks_of_closed_forms(
    make: Maker,
    walk_of: Callable[[int], Walk],
    bubbles: tuple[float, ...],
    peaks: tuple[float, float],
) -> None:
    """pipeline.md, section 5: (p, m, hop) = (4, 8, 0), (4, 16, 0), (8, 32, 0), (8, 32, 0.1)."""
    found, live = [], {}
    for ranks, num_microbatches, hop in ((4, 8, 0.0), (4, 16, 0.0), (8, 32, 0.0), (8, 32, 0.1)):
        walk = walk_of(ranks)
        timeline = simulate_computes(make(walk, num_microbatches), walk, equal_costs(walk, hop))
        found.append(round(100 * timeline.bubble, 1))
        live[ranks] = max(timeline.peak_live) * ranks / len(walk)
    assert tuple(found) == bubbles
    assert (live[4], live[8]) == pytest.approx(peaks, abs=0.051)  # The table rounds 4.75 up.


@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize("shape", ["loops 2", "loops 4", "V", "loops and V"])
def test_greedy_reaches_the_bound_in_a_quarter_more_memory(ranks: int, shape: str) -> None:
    walk = {
        "loops 2": loops(ranks, 2),
        "loops 4": loops(ranks, 4),
        "V": vee(ranks),
        "loops and V": visit(*[*range(ranks)] * 2, *reversed(range(ranks))),
    }[shape]
    costs = equal_costs(walk)
    timeline = simulate_computes(
        greedy(walk, 4 * ranks, costs, in_flight=1.25 * ranks), walk, costs
    )
    assert timeline.makespan == pytest.approx(lower_bound(walk, costs, 4 * ranks))
    assert max(timeline.peak_live) <= 1.25 * len(walk)


def test_the_map_of_the_reference_that_has_no_closed_form() -> None:
    """123123321 on three ranks, 12 micro batches: 110 thirds of a rank's forward at peak 3."""
    walk = visit(0, 1, 2, 0, 1, 2, 2, 1, 0)
    costs = equal_costs(walk)
    timeline = simulate_computes(greedy(walk, 12, costs, in_flight=3), walk, costs)
    assert 3 * timeline.makespan == pytest.approx(110)
    assert 3 * lower_bound(walk, costs, 12) == pytest.approx(110)
    assert max(timeline.peak_live) == 9


def test_a_greedy_order_that_alternates_is_near_the_bound_without_w() -> None:
    """Where each F waits behind all that B can do, two loops on 8 ranks take 16 % more, not 2 %."""
    walk = loops(8, 2)
    costs = equal_costs(walk)
    bound = lower_bound(walk, costs, 32, split=False)
    over = [
        simulate_computes(
            greedy(walk, 32, costs, split=False, alternate=alternate, in_flight=8), walk, costs
        ).makespan
        / bound
        for alternate in (False, True)
    ]
    assert over[0] > 1.15 and over[1] < 1.02


def test_a_greedy_order_has_its_messages() -> None:
    walk = visit(0, 1, 2, 1, 0)
    costs = equal_costs(walk, hop=0.1)
    order = greedy(walk, 5, costs)
    assert order is not None and validate_order(order, walk, 5) == []
    assert add_messages(order, walk, costs) == order


def test_one_rank_never_waits() -> None:
    walk = visit(0)
    for split in (True, False):
        choice = choose_order(walk, 5, equal_costs(walk), split=split)
        assert choice.timeline.bubble == pytest.approx(0.0)
        assert max(choice.timeline.peak_live) == 1
        assert all(op.kind in "FB" for op in choice.order[0])


def test_bytes_are_kept_from_forward_to_backward_and_for_w() -> None:
    walk = visit(0)
    costs = (StageCost(1, 1, 1, 0, activation=10, deferred=4),)
    ops = parse("F0.0 I0.0 F0.1 W0.0 I0.1 W0.1")
    timeline = simulate((tuple(ops),), walk, costs)
    assert (timeline.peak_bytes, timeline.peak_live) == ((14,), (2,))
    assert timeline.ranks[0][3] == (Op("W", 0, 0), 3.0, 4.0)


# ----------------------------------------------------------------------------------------- choice


@settings(max_examples=40)
@given(st.data(), walks(), MICROBATCHES, st.booleans())
def test_the_choice_keeps_within_memory_and_is_the_best(
    data: st.DataObject, walk: Walk, num_microbatches: int, split: bool
) -> None:
    costs = data.draw(costs_of(walk))
    alone = [0] * (1 + max(stage.rank for stage in walk))
    for stage, cost in zip(walk, costs, strict=True):
        alone[stage.rank] += cost.activation * stage.backward
    times = data.draw(st.sampled_from([1, 1.5, 2, 4]))
    caps = tuple(int(times * size) for size in alone)
    choice = choose_order(walk, num_microbatches, costs, memory_cap=caps, split=split)
    assert validate_order(choice.order, walk, num_microbatches) == []
    assert all(p <= cap for p, cap in zip(choice.timeline.peak_bytes, caps, strict=True))
    assert split or not any(op.kind in "IW" for ops in choice.order for op in ops)
    free = choose_order(walk, num_microbatches, costs, split=split)
    for name, form in CLOSED_FORMS.items():
        computes = form.make(walk, num_microbatches)
        if computes is not None and (split or not form.split):
            makespan = simulate_computes(computes, walk, costs).makespan
            assert free.timeline.makespan <= makespan * 1.0011, name


def test_what_is_chosen_where() -> None:
    def names(walk: Walk, **wishes: Any) -> str:
        return choose_order(walk, 8, equal_costs(walk), **wishes).name

    assert names(loops(4, 1), split=False) == "1f1b"
    assert names(loops(4, 2), split=False) == "interleaved"
    assert names(loops(4, 2)) == "interleaved_zero_bubble"
    assert names(vee(4)) == "zbv"
    assert names(visit(0, 1, 2, 1, 0)) == "greedy"
    for name in ("interleaved", "interleaved_zero_bubble", "greedy"):
        assert names(loops(4, 2), wanted=name) == name


@pytest.mark.parametrize(
    ("walk", "wishes", "part"),
    [
        (loops(2, 2), {"wanted": "1f1b"}, "order=1f1b requires a walk over ranks 0..p-1 once"),
        (loops(2, 1), {"wanted": "interleaved"}, "this one visits 0 1; set parallel.order to"),
        (visit(0, 1, 0), {"wanted": "zbv"}, "zbv requires a walk over ranks 0..p-1 p-1..0"),
        (vee(2), {"wanted": "zbv", "split": False}, "set parallel.split_backward to true"),
    ],
)
def test_families_that_do_not_suit_are_refused(
    walk: Walk, wishes: dict[str, Any], part: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_order(walk, 4, equal_costs(walk), **wishes)
    assert part in str(caught.value)


def test_too_little_memory_is_refused_with_the_numbers() -> None:
    walk = loops(2, 2)
    costs = tuple(StageCost(1, 1, 1, 0, activation=1000 * (1 + s.index)) for s in walk)
    with pytest.raises(PlacementError) as caught:
        choose_order(walk, 4, costs, memory_cap=(4000, 5999))
    assert "rank 1 keeps 6,000 bytes of activations of each micro batch and has room for 5,999" in (
        str(caught.value)
    )
    assert choose_order(walk, 4, costs, memory_cap=6000).timeline.peak_bytes[1] == 6000
    with pytest.raises(PlacementError, match=r"set parallel\.order to auto"):
        choose_order(walk, 4, costs, memory_cap=6000, wanted="interleaved")


def test_the_hash_is_that_of_the_order_in_every_process() -> None:
    walk = visit(0, 1, 2, 1, 0)
    choice = choose_order(walk, 6, equal_costs(walk))
    code = (
        "from support.walks import *; from megarecur.plan.simulate import *;"
        "from megarecur.plan.order import order_hash; walk = visit(0, 1, 2, 1, 0);"
        "print(order_hash(choose_order(walk, 6, equal_costs(walk)).order))"
    )
    again = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert again.stdout.strip() == order_hash(choice.order)
    assert len(order_hash(choice.order)) == 16
    assert order_hash(swap(choice.order, 0, 0, 1)) != order_hash(choice.order)
