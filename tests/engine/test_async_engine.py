"""The threaded loop: streams, aborts, full queues, draining, and an iteration that fails."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from faults import settled
from tokenloom.config import load_settings
from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.engine.engine import Engine
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.errors import EngineBusyError, EngineStoppedError, RequestError
from tokenloom.models.loader import open_model

LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


def make(folder: Path, **flags: Any) -> AsyncEngine:
    keys = {key.replace("__", "."): value for key, value in flags.items()}
    return AsyncEngine(Engine(load_settings({"cache.kv_bytes": 4 * 2**20, **keys}), open_model(str(folder))))


@pytest.fixture
async def served(folder: Path) -> AsyncIterator[AsyncEngine]:
    target = make(folder)
    target.start()
    yield target
    await asyncio.to_thread(target.shutdown)
    target.engine.pool.check()
    assert target.engine.pool.num_used == 0


async def test_concurrent_streams_get_their_own_tokens(served: AsyncEngine) -> None:
    async def one(i: int) -> list[int]:
        params = SamplingParams(temperature=1, seed=i, max_tokens=20, ignore_eos=True)
        return [
            t
            async for out in served.generate([i + 1] * 5, params, request_id=f"r{i}")
            for d in out.deltas
            for t in d.token_ids
        ]

    together = await asyncio.gather(*(one(i) for i in range(8)))
    assert [len(tokens) for tokens in together] == [20] * 8
    assert len({tuple(tokens) for tokens in together}) == 8


async def test_closing_a_stream_frees_its_blocks(served: AsyncEngine) -> None:
    stream = served.generate([1, 2, 3], LONG, request_id="r")
    await stream.__anext__()
    assert served.engine.pool.num_used > 0
    await stream.aclose()
    await settled(served)
    assert served.engine.pool.num_used == 0


async def test_a_lost_stream_is_aborted(served: AsyncEngine) -> None:
    stream = served.generate([1, 2, 3], LONG, request_id="r")
    await stream.__anext__()
    del stream
    gc.collect()
    await settled(served)


async def test_a_stream_never_read_is_aborted_when_closed(served: AsyncEngine) -> None:
    await served.generate([1, 2, 3], LONG, request_id="r").aclose()
    await settled(served)


async def test_bad_requests_are_refused_at_once(served: AsyncEngine) -> None:
    with pytest.raises(RequestError):
        served.generate([], LONG, request_id="r")
    stream = served.generate([1], LONG, request_id="twice")
    with pytest.raises(RequestError, match="twice"):
        served.generate([1], LONG, request_id="twice")
    await stream.aclose()


async def test_a_full_queue_is_busy_and_recovers(folder: Path) -> None:
    target = make(folder, scheduler__max_waiting=2, scheduler__max_running=1)
    target.start()
    streams = [target.generate([1], LONG, request_id="first")]
    await streams[0].__anext__()
    streams += [target.generate([1], LONG, request_id=f"r{i}") for i in range(2)]
    with pytest.raises(EngineBusyError, match="2") as refusal:
        target.generate([1], LONG, request_id="last")
    assert refusal.value.retry_after_s == 1  # nothing has ended yet
    for stream in streams:
        await stream.aclose()
    await settled(target)
    streams = [target.generate([1], LONG, request_id="again")]
    await streams[0].__anext__()
    streams += [target.generate([1], LONG, request_id=f"s{i}") for i in range(2)]
    with pytest.raises(EngineBusyError) as refusal:
        target.generate([1], LONG, request_id="t")
    assert 0 < refusal.value.retry_after_s < 1  # three have ended within milliseconds
    for stream in streams:
        await stream.aclose()
    await asyncio.to_thread(target.shutdown)


async def test_drain_lets_running_requests_finish_and_refuses_new_ones(folder: Path) -> None:
    target = make(folder)
    target.start()
    stream = target.generate([1], SamplingParams(max_tokens=50, ignore_eos=True), request_id="r")
    first = await stream.__anext__()
    drained = asyncio.create_task(target.drain(30))
    await asyncio.sleep(0)
    with pytest.raises(EngineStoppedError):
        target.generate([1], LONG, request_id="late")
    assert not target.ready
    rest = [out async for out in stream]
    await drained
    assert sum(len(d.token_ids) for out in [first, *rest] for d in out.deltas) == 50
    await asyncio.to_thread(target.shutdown)


async def test_drain_aborts_what_outlasts_it(folder: Path) -> None:
    target = make(folder)
    target.start()
    stream = target.generate([1], LONG, request_id="r")
    await stream.__anext__()
    await target.drain(0)
    last = [out async for out in stream][-1]
    assert last.finished and last.deltas[0].finish_reason == "abort"
    await asyncio.to_thread(target.shutdown)


async def test_a_failed_iteration_fails_its_requests_and_not_the_engine(
    served: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = served.engine.decoder.forward

    def broken(*args: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(served.engine.decoder, "forward", broken)
    outputs = [out async for out in served.generate([1, 2], LONG, request_id="r")]
    assert outputs[-1].deltas[0].finish_reason == "error"
    assert "no such kernel" not in (outputs[-1].deltas[0].error or "")
    monkeypatch.setattr(served.engine.decoder, "forward", forward)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    outputs = [out async for out in served.generate([1, 2], params, request_id="next")]
    assert outputs[-1].deltas[0].finish_reason == "length"


async def test_embedding_is_the_mean_of_hidden_states(served: AsyncEngine) -> None:
    vector = await served.embed([5, 6, 7], request_id="e")
    assert len(vector) == served.config.hidden_size
    single = [await served.embed([5], request_id="e1")]
    assert single[0] != vector
