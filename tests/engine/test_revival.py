"""The engine's loop dies or hangs: it is started again, and streams go on, no token lost or said twice."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from faults import POISON, answer, answers, healthy_answers, make, params, patch_forward, settled
from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.engine.engine import Engine
from tokenloom.engine.revival import successor
from tokenloom.engine.scheduler import Plan, Scheduler
from tokenloom.errors import EngineStoppedError


@pytest.fixture(scope="module")
def healthy(folder: Path) -> list[Any]:
    """What six requests of two choices answer when nothing goes wrong."""
    return healthy_answers(folder, n=2)


@pytest.fixture
def schedule(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Scheduler, int], None]], None]:
    """Have a function look at each scheduling and its number before it is done, whatever engine does it."""
    plain = Scheduler.schedule

    def patch(fault: Callable[[Scheduler, int], None]) -> None:
        count = 0

        def faulty(self: Scheduler) -> Plan:
            nonlocal count
            count += 1
            fault(self, count)
            return plain(self)

        monkeypatch.setattr(Scheduler, "schedule", faulty)

    return patch


async def closed(target: AsyncEngine, restarts: int) -> None:
    await settled(target)
    target.engine.pool.check()
    assert target.engine.pool.num_used == 0
    assert target.engine.counters.restarts == restarts
    await asyncio.to_thread(target.shutdown)


@pytest.mark.parametrize("at", [1, 2, 9])
async def test_streams_go_on_when_the_loop_dies(
    folder: Path, healthy: list[Any], schedule: Any, at: int
) -> None:
    def fault(scheduler: Scheduler, count: int) -> None:
        if count == at:
            raise SystemExit("the thread is gone")

    schedule(fault)
    target = make(folder)
    target.start()
    assert await answers(target, [], n=2) == healthy
    await closed(target, 1)


@pytest.mark.parametrize(
    ("methods", "flags"),
    [
        ({"kv": "snapkv(budget=8,window=4)"}, {}),
        ({"draft": "ngram(fixed=True)"}, {}),
        ({}, {"cache__tier": "host", "cache__tier_bytes": 2**20}),
        ({}, {"scheduler__policy": "mlfq", "scheduler__mlfq_quantum": 4}),
    ],
)
async def test_methods_tiers_and_policies_begin_again_with_it(
    folder: Path, schedule: Any, methods: dict[str, str], flags: dict[str, Any]
) -> None:
    target = make(folder, **flags)
    target.start()
    expected = await answers(target, [], **methods)

    def fault(scheduler: Scheduler, count: int) -> None:
        if count == 8:
            raise RuntimeError

    schedule(fault)
    assert await answers(target, [], **methods) == expected
    await closed(target, 1)


async def test_requests_that_come_while_the_loop_is_started_again_wait_for_it(
    folder: Path, healthy: list[Any], schedule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    came, begun = threading.Event(), threading.Event()

    def fault(scheduler: Scheduler, count: int) -> None:
        if count == 1:
            raise SystemExit("the thread is gone")

    def slowly(engine: Engine, *, deserted: bool) -> Engine:
        begun.set()
        assert came.wait(20)
        return successor(engine, deserted=deserted)

    schedule(fault)
    monkeypatch.setattr("tokenloom.engine.async_engine.successor", slowly)
    target = make(folder)
    target.start()
    first = asyncio.create_task(answer(target, [20], 9))
    assert await asyncio.to_thread(begun.wait, 20)
    assert not target.ready
    others = asyncio.create_task(answers(target, [], n=2))
    await asyncio.sleep(0)
    came.set()
    assert await others == healthy
    assert (await first)[2] == ["length"]
    await closed(target, 1)


class Unrepeated:
    """Bans every token that the answer already holds."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def processor(self) -> Unrepeated:
        return Unrepeated()

    def apply(self, row: Tensor) -> None:
        row[self.seen] = -torch.inf

    def accept(self, token: int) -> bool:
        self.seen.append(token)
        return False


async def test_processors_of_logits_know_what_was_said_before(folder: Path, schedule: Any) -> None:
    target = make(folder)
    target.start()
    expected = await answers(target, [], n=2, processors=(Unrepeated(),))

    def fault(scheduler: Scheduler, count: int) -> None:
        if count == 8:
            raise RuntimeError

    schedule(fault)
    found = await answers(target, [], n=2, processors=(Unrepeated(),))
    assert found == expected
    assert all(len(set(tokens)) == len(tokens) for one in found for tokens in one[0].values())
    await closed(target, 1)


async def test_streams_go_on_when_an_iteration_hangs_and_its_thread_comes_back(
    folder: Path, healthy: list[Any]
) -> None:
    passes, awake = 0, threading.Event()
    target = make(folder, watchdog__iteration_s=0.4)

    def fault(batch: Any, hidden: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 6:
            awake.wait(20)

    patch_forward(target, fault)
    target.start()
    hung = target._life.thread
    got = asyncio.create_task(answers(target, [], n=2))
    while target.engine.counters.restarts == 0:
        await asyncio.sleep(0.01)
    awake.set()  # the old thread goes on beside the new one, and what it has to say is not heard
    assert await got == healthy
    assert hung is not None
    await asyncio.to_thread(hung.join, 10)
    assert not hung.is_alive()
    await closed(target, 1)


async def test_what_the_client_has_stopped_for_stays_ended(folder: Path, schedule: Any) -> None:
    expected = await _stopping(make(folder))

    def fault(scheduler: Scheduler, count: int) -> None:
        if count == 4:
            raise RuntimeError

    schedule(fault)
    assert await _stopping(make(folder)) == expected


async def _stopping(target: AsyncEngine) -> Any:
    """Two choices with a stop string, which at least one of them meets."""
    target.start()
    got = await answer(target, [20, 31, 32], 3, n=2, max_tokens=12, stop=["e"])
    await settled(target)
    await asyncio.to_thread(target.shutdown)
    return got


async def test_a_request_with_which_the_loop_dies_twice_is_not_tried_again(
    folder: Path, healthy: list[Any], schedule: Any
) -> None:
    def fault(scheduler: Scheduler, count: int) -> None:
        if any(s.tokens[0] == POISON and s.num_output for s in scheduler.running):
            raise RuntimeError

    schedule(fault)
    target = make(folder)
    target.start()
    assert (await answer(target, [POISON, 3], 9))[2] == ["error"]
    assert await answers(target, [], n=2) == healthy
    await closed(target, 2)


async def test_after_too_many_restarts_the_engine_is_given_up(folder: Path, schedule: Any) -> None:
    def fault(scheduler: Scheduler, count: int) -> None:
        raise RuntimeError

    given_up = threading.Event()
    schedule(fault)
    target = make(folder, watchdog__max_restarts=1)
    target.on_failure = given_up.set
    target.start()
    stream = target.generate([1, 2], params(0), request_id="r")
    last = [output async for output in stream][-1]
    assert last.finished and last.deltas[0].finish_reason == "abort"
    assert given_up.wait(5)
    assert target.failed and not target.alive and not target.ready
    with pytest.raises(EngineStoppedError):
        target.generate([1], params(0), request_id="next")
    await asyncio.to_thread(target.shutdown)


async def test_a_jump_of_the_clock_is_no_hang(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make(folder, watchdog__iteration_s=10)
    target.start()
    monotonic = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + 1e6)
    assert (await answer(target, [1, 2], 0))[2] == ["length"]
    await closed(target, 0)
