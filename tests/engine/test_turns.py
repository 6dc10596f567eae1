"""When refused requests are told to come back."""

from __future__ import annotations

import pytest

from tokenloom.engine.turns import FIRST_S, LONGEST_S, Turns


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def at_pace(clock: Clock, apart_s: float, ends: int = 40) -> Turns:
    turns = Turns(clock)
    for _ in range(ends):
        clock.now += apart_s
        turns.ended(idle=False)
    return turns


def test_a_second_while_nothing_is_known(clock):
    turns = Turns(clock)
    assert turns.next_s() == FIRST_S
    turns.ended(idle=False)
    assert turns.next_s() == FIRST_S


def test_turns_are_as_far_apart_as_ends_of_requests(clock):
    turns = at_pace(clock, 0.5)
    assert [turns.next_s() for _ in range(4)] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    clock.now += 1.5  # three of them have come, and as many have ended
    for _ in range(3):
        turns.ended(idle=False)
    assert turns.next_s() == pytest.approx(1.0, rel=0.2)


def test_turns_that_have_passed_are_not_made_up_for(clock):
    turns = at_pace(clock, 0.5)
    for _ in range(10):
        turns.next_s()
    clock.now += 15.5
    assert turns.next_s() == pytest.approx((31 * 0.5 + 15.5) / 31)  # it got on half as fast meanwhile


def test_a_server_that_stands_still_asks_for_longer_waits(clock):
    turns = at_pace(clock, 0.1)
    clock.now += 1000
    assert turns.next_s() == pytest.approx((31 * 0.1 + 1000) / 31)
    clock.now += 10_000_000
    assert turns.next_s() == LONGEST_S


def test_hours_without_requests_are_no_pace(clock):
    turns = at_pace(clock, 0.5)
    turns.ended(idle=True)
    clock.now += 3600
    before = 31 * 0.5 / 31
    assert turns.next_s() == pytest.approx(before, rel=0.05)
    turns.ended(idle=False)  # of a new burst: one end says nothing yet
    clock.now += 2
    assert turns.next_s() == pytest.approx(before, rel=0.05)
    clock.now += 2
    turns.ended(idle=False)
    assert turns.next_s() == pytest.approx(4)


def test_nobody_waits_longer_than_clients_do(clock):
    turns = at_pace(clock, 7.0)
    waits = [turns.next_s() for _ in range(30)]
    assert max(waits) <= LONGEST_S
    assert waits[:10] == pytest.approx([7, 14, 21, 28, 35, 42, 49, 56, 7, 14])
