import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_bcd.block import Schedule
from colossal_bcd.block.schedule import probabilities

modes = st.sampled_from(["random", "ascending", "descending"])


@st.composite
def schedules(draw):
    num_blocks = draw(st.integers(1, 12))
    cuts = sorted(draw(st.lists(st.integers(0, num_blocks), max_size=3)))
    bounds = [0, *cuts, num_blocks]
    return Schedule(
        num_blocks=num_blocks,
        period=draw(st.integers(1, 5)),
        mode=draw(modes),
        seed=draw(st.integers(-5, 1000)),
        start_block=draw(st.none() | st.integers(0, num_blocks - 1)),
        ranges=tuple(itertools.pairwise(bounds)),
    )


@settings(max_examples=60, deadline=None)
@given(schedules(), st.integers(0, 4))
def test_schedule_activates_each_block_once_per_epoch(schedule, epoch):
    for start, stop in schedule.ranges:
        if start == stop:
            continue
        first = epoch * (stop - start) * schedule.period
        seen = []
        for step in range(first, first + (stop - start) * schedule.period):
            (active,) = [index for index in schedule.active(step) if start <= index < stop]
            seen.append(active)
        periods = [seen[i : i + schedule.period] for i in range(0, len(seen), schedule.period)]
        assert all(len(set(period)) == 1 for period in periods)
        assert sorted(period[0] for period in periods) == list(range(start, stop))


@settings(max_examples=30, deadline=None)
@given(schedules(), st.lists(st.integers(0, 200), min_size=2, max_size=5))
def test_schedule_is_a_pure_function_of_the_step(schedule, steps):
    twin = Schedule(**{name: getattr(schedule, name) for name in schedule.__dataclass_fields__})
    forward = [schedule.active(step) for step in steps]
    backward = [twin.active(step) for step in reversed(steps)]
    assert forward == backward[::-1]


@settings(max_examples=30, deadline=None)
@given(schedules())
def test_schedule_start_block_is_first_in_its_range(schedule):
    if schedule.start_block is not None:
        assert schedule.start_block in schedule.active(0)


def test_schedule_random_orders_differ_between_epochs_and_seeds():
    schedules = [Schedule(num_blocks=8, period=1, seed=seed) for seed in range(4)]
    assert len({schedule.order(0, epoch) for schedule in schedules for epoch in range(4)}) == 16


def test_schedule_random_order_is_the_same_on_every_platform_and_version():
    """Orders are not in the checkpoint: a changed formula would silently resume in another block."""
    assert Schedule(num_blocks=6, period=1, seed=0).order(0, 0) == (0, 3, 2, 4, 5, 1)
    assert Schedule(num_blocks=6, period=1, seed=7).order(0, 3) == (4, 5, 1, 3, 0, 2)


def test_schedule_random_start_block_is_only_first_in_the_first_epoch():
    firsts = [Schedule(num_blocks=9, period=1, start_block=4).order(0, epoch)[0] for epoch in range(8)]
    assert firsts[0] == 4
    assert set(firsts[1:]) != {4}


@pytest.mark.parametrize(
    ("mode", "start_block", "expected"),
    [
        ("ascending", None, [0, 0, 1, 1, 2, 2, 0]),
        ("ascending", 1, [1, 1, 2, 2, 0, 0, 1]),
        ("descending", None, [2, 2, 1, 1, 0, 0, 2]),
        ("descending", 1, [1, 1, 0, 0, 2, 2, 1]),
        ("fixed", None, [0] * 7),
        ("fixed", 2, [2] * 7),
    ],
)
def test_schedule_orders_of_the_modes(mode, start_block, expected):
    schedule = Schedule(num_blocks=3, period=2, mode=mode, start_block=start_block)
    assert [schedule.active(step) for step in range(7)] == [(index,) for index in expected]


def test_schedule_ranges_advance_independently():
    schedule = Schedule(num_blocks=5, period=2, mode="ascending", start_block=3, ranges=((0, 3), (3, 3), (3, 5)))
    assert [schedule.active(step) for step in range(0, 10, 2)] == [(0, 3), (1, 4), (2, 3), (0, 4), (1, 3)]


def test_schedule_fixed_ranges_stay_on_their_first_block():
    schedule = Schedule(num_blocks=4, period=1, mode="fixed", start_block=3, ranges=((0, 2), (2, 4)))
    assert {schedule.active(step) for step in range(9)} == {(0, 3)}


def test_schedule_switches_after_exactly_period_steps():
    schedule = Schedule(num_blocks=2, period=3)
    assert [step for step in range(10) if schedule.is_switch(step)] == [3, 6, 9]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_blocks": 0}, ValueError, "number of blocks: got 0"),
        ({"period": 0}, ValueError, "switch_block_every: got 0, expected an int of at least 1"),
        ({"period": 2.0}, TypeError, "switch_block_every: got 2.0"),
        ({"period": True}, TypeError, "switch_block_every"),
        ({"mode": "up"}, ValueError, "switch_mode: got 'up', expected one of 'random'"),
        ({"seed": 1.5}, TypeError, "seed: got 1.5"),
        ({"start_block": 4}, ValueError, "start_block: got 4, expected .* 0 to 3"),
        ({"start_block": -1}, ValueError, "start_block: got -1"),
        ({"start_block": math.nan}, TypeError, "start_block"),
        ({"ranges": ((0, 2),)}, ValueError, "block_ranges"),
        ({"ranges": ((0, 2), (1, 4))}, ValueError, "block_ranges"),
        ({"ranges": ((2, 4), (0, 2))}, ValueError, "block_ranges"),
        ({"ranges": ((0, 5),)}, ValueError, "block_ranges"),
        ({"ranges": ((0, 3), (3, 2), (2, 4))}, ValueError, "block_ranges"),
        ({"ranges": ((0, 4.0),)}, TypeError, "block_ranges"),
        ({"ranges": (0, 4)}, TypeError, r"block_ranges: got \(0, 4\), expected pairs"),
        ({"ranges": ((0, 2, 4),)}, TypeError, "block_ranges"),
    ],
)
def test_schedule_refuses_wrong_numbers(change, error, message):
    with pytest.raises(error, match=message):
        Schedule(**{"num_blocks": 4, "period": 2, **change})


def test_probabilities_are_shares_of_norms_and_an_equal_part():
    assert probabilities([3.0, 1.0], 0.0) == [0.75, 0.25]
    assert probabilities([3.0, 1.0], 0.2) == pytest.approx([0.8 * 0.75 + 0.1, 0.8 * 0.25 + 0.1])
    assert probabilities([3.0, 1.0], 1.0) == [0.5, 0.5]
    assert probabilities([2.0, None, 1.0, None], 0.0) == pytest.approx([2 / 7, 2 / 7, 1 / 7, 2 / 7])
    assert probabilities([None] * 4, 0.1) == pytest.approx([0.25] * 4)
    assert probabilities([0.0, 0.0], 0.0) == [0.5, 0.5]


def importance(**options):
    return Schedule(**{"num_blocks": 4, "period": 1, "mode": "importance", **options})


def test_schedule_importance_draws_by_probability():
    """Of 4000 epochs of 4 draws; within four standard deviations of a binomial."""
    norms, floor, counts = [8.0, 4.0, 0.0, 1.0], 0.2, [0] * 4
    schedule = importance(seed=11)
    for epoch in range(1, 4001):
        schedule = schedule.draw(4 * epoch, norms, floor)
        for step in range(4 * epoch, 4 * epoch + 4):
            counts[schedule.active(step)[0]] += 1
    for count, share in zip(counts, probabilities(norms, floor), strict=True):
        assert abs(count - 16000 * share) < 4 * math.sqrt(16000 * share * (1 - share))
    assert counts[2] > 0, "the floor keeps every block alive"


def test_schedule_importance_draws_epochs_apart_and_with_replacement():
    orders = [importance(seed=seed).draw(4 * epoch, [1.0] * 4, 0.1).drawn[0][1] for seed in (0, 1) for epoch in (1, 2)]
    assert len(set(orders)) == 4
    assert any(len(set(order)) < 4 for order in orders)


@settings(max_examples=30, deadline=None)
@given(schedules())
def test_schedule_importance_begins_with_a_permutation(schedule):
    first = dataclasses.replace(schedule, mode="importance")
    for index, (start, stop) in enumerate(first.ranges):
        assert sorted(first.order(index, 0)) == list(range(start, stop))
        assert first.order(index, 0) == dataclasses.replace(schedule, mode="random").order(index, 0)


def test_schedule_importance_draws_when_an_epoch_of_a_range_begins():
    schedule = importance(num_blocks=6, period=2, ranges=((0, 2), (2, 3), (3, 3), (3, 6)))
    begins = {step: schedule.epochs_that_begin(step) for step in range(13)}
    assert {step: ranges for step, ranges in begins.items() if ranges} == {4: (0,), 6: (3,), 8: (0,), 12: (0, 3)}
    norms = [1.0] * 6
    drawn = schedule.draw(4, norms, 0.1).draw(6, norms, 0.1)
    assert [epoch for epoch, _ in drawn.drawn] == [1, 0, 0, 1]
    assert all(3 <= index < 6 for index in drawn.drawn[3][1])
    assert drawn.active(6)[1] == 2
    with pytest.raises(ValueError, match="a step in epoch 2 of blocks 0 to 1, expected one in epoch 1, whose order"):
        drawn.active(8)


def test_schedule_other_modes_draw_nothing():
    assert Schedule(num_blocks=4, period=1).epochs_that_begin(4) == ()
