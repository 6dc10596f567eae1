"""What is kept in reserve for prompts that will come."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from tokenloom.config import load_settings
from tokenloom.engine import slo
from tokenloom.engine.scheduler import Plan
from tokenloom.engine.slo import Prompts, iteration_budget_ms

SETTINGS = load_settings({"slo.tpot_ms": 20.0, "slo.ttft_ms": 1000.0, "coserve.margin": 0.0})


class Clock:
    """Time that passes when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(slo, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def decoding(clock: Clock, ahead_ms: float, num_output: int, max_tokens: int | None) -> Any:
    first = clock.now + ahead_ms / 1e3 - 0.02 * num_output
    request = SimpleNamespace(
        first_token_s=first, arrival_s=first, params=SimpleNamespace(max_tokens=max_tokens)
    )
    return Sequence(request, num_output)


class Sequence:
    """What the budget reads of one."""

    def __init__(self, request: Any, num_output: int) -> None:
        self.request, self.num_output, self.num_pending = request, num_output, 1


def budget(sequence: Any, prompts: Prompts) -> float:
    scheduler: Any = SimpleNamespace(running=[sequence], waiting=[])
    return iteration_budget_ms(Plan({sequence: 1}, num_rows=1), scheduler, SETTINGS, prompts)


def test_without_prompts_nothing_is_kept(clock: Clock) -> None:
    assert Prompts().expected(10.0) == (0.0, 0.0)


def test_a_rare_prompt_is_kept_for_once_whole(clock: Clock) -> None:
    prompts = Prompts()
    clock.now += 10.0
    prompts.add(0, 30.0)  # its first chunk
    prompts.add(1, 50.0)
    assert prompts.expected(0.01) == pytest.approx((2.0, 40.0))


def test_more_is_kept_the_more_often_they_come_and_the_longer_one_looks_ahead(clock: Clock) -> None:
    rare, often = Prompts(), Prompts()
    for _ in range(20):
        clock.now += 1.0
        often.add(2, 100.0)
    rare.add(4, 200.0)
    assert often.expected(1.0) == pytest.approx(((2 + 2 * 2**0.5) / 2, 100.0))
    assert rare.expected(1.0)[0] < often.expected(1.0)[0] < often.expected(2.0)[0]


def test_what_was_long_ago_is_forgotten(clock: Clock) -> None:
    prompts = Prompts()
    prompts.add(1, 80.0)
    clock.now += slo.MEMORY_S + 1.0
    assert prompts.expected(1.0) == (0.0, 0.0)


def every_second(clock: Clock, each_ms: float) -> Prompts:
    """A prompt of one iteration each second."""
    prompts = Prompts()
    for _ in range(20):
        clock.now += 1.0
        prompts.add(1, each_ms)
    return prompts


def test_time_until_the_last_token_less_that_of_long_prompts_is_shared_evenly(clock: Clock) -> None:
    prompts = every_second(clock, 100.0)
    iterations, each_ms = prompts.expected(0.4)  # 20 tokens of 20 ms
    assert (iterations, each_ms) == pytest.approx((0.4 + 2 * 0.4**0.5, 100.0))
    # The next token is due now: 19 more targets of time, for 20 tokens, some of which come with prompts.
    wanted = (19 * 20.0 - iterations * 100.0) / (20 - iterations)
    assert budget(decoding(clock, 0.0, 20, 40), prompts) == pytest.approx(wanted)
    # However far ahead: a gap of half a target more than the target, at most.
    assert budget(decoding(clock, 900.0, 20, 40), prompts) == pytest.approx(20.0 * 1.5)


def test_prompts_whose_iterations_are_no_longer_than_others_cost_streams_nothing(clock: Clock) -> None:
    prompts = every_second(clock, 15.0)
    assert budget(decoding(clock, 0.0, 20, 40), prompts) == pytest.approx(19 * 20.0 / 20)
    # A stream that is so late that they are longer than its share keeps their time back.
    late = decoding(clock, -200.0, 20, 40)
    assert budget(late, prompts) < (19 * 20.0 - 200.0) / 20


def test_the_last_token_comes_with_the_prompt_or_before_it(clock: Clock) -> None:
    prompts = every_second(clock, 25.0)
    assert budget(decoding(clock, 25.0, 39, 40), prompts) == pytest.approx(25.0)
    assert budget(decoding(clock, -1.0, 39, 40), prompts) < 0


def test_a_stream_that_is_late_catches_up_over_its_whole_answer(clock: Clock) -> None:
    prompts = Prompts()
    slightly, hopelessly = (decoding(clock, -late_ms, 20, 40) for late_ms in (60.0, 600.0))
    assert 0 < budget(slightly, prompts) < 20.0
    assert budget(hopelessly, prompts) < 0


def test_answers_without_a_limit_look_ahead_as_far_as_the_horizon(clock: Clock) -> None:
    prompts = every_second(clock, 25.0)
    unlimited = budget(decoding(clock, 70.0, 1, None), prompts)
    assert unlimited == pytest.approx(budget(decoding(clock, 70.0, 1, slo.HORIZON_TOKENS), prompts))


def test_a_waiting_prompt_shares_its_time_among_the_iterations_it_needs_beside_streams(clock: Clock) -> None:
    request = SimpleNamespace(first_token_s=None, arrival_s=clock.now, params=SimpleNamespace(max_tokens=8))
    prompt = Sequence(request, 0)
    prompt.num_pending = 2 * SETTINGS.scheduler.max_batch_tokens
    scheduler: Any = SimpleNamespace(running=[], waiting=[prompt])
    assert iteration_budget_ms(Plan({}), scheduler, SETTINGS, Prompts()) == pytest.approx(1000.0 / 2)
    # Two streams take two rows of each batch, so that the last four tokens need a third one.
    scheduler.running = [decoding(clock, 900.0, 20, 40) for _ in range(2)]
    assert iteration_budget_ms(Plan({}), scheduler, SETTINGS, Prompts()) == pytest.approx(1000.0 / 3)


def test_real_time_passes_too() -> None:
    prompts = Prompts()
    prompts.add(1, 10.0)
    time.sleep(0.01)
    assert prompts.expected(1e-6) == pytest.approx((1.0, 10.0))
