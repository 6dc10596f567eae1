"""GET /live: what the engine does, once a second, for the dashboard and for `tokenloom top`.

A snapshot is built when somebody asks, from what /metrics reads and from a look at requests and blocks.
Nobody who reads slowly holds up anything: the next snapshot is built once the last one is sent, and who takes
none for `SEND_TIMEOUT_S` is dropped.
"""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from tokenloom.config import Settings
from tokenloom.engine.async_engine import AsyncEngine
from tokenloom.engine.latencies import Latencies
from tokenloom.engine.overview import Overview, State
from tokenloom.serve.errors import ERROR_RESPONSES, ApiError
from tokenloom.serve.generation import until_disconnect
from tokenloom.serve.security import refuse
from tokenloom.version import __version__

WINDOW_S = 60
"""Percentiles are of what ended in so many last seconds."""
MAX_LISTENERS = 32
MAX_CELLS = 4096
SEND_TIMEOUT_S = 10.0
HEARTBEAT_S = 5.0
REUSE_S = 0.2
"""Listeners share a snapshot that is no older."""

_LIKELY = "rtcf"  # which letter a cell of several blocks shows when two are as frequent


class _View(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class Seconds(_View):
    """Rows that the iterations of one second held, by kind; seconds without an iteration are left out.

    `decode` rows are the newest token of each answer, `drafted` the guesses verified with them, `training`
    forward rows of training. `busy_ms` is the time that its iterations took.
    """

    at_s: int
    iterations: int
    prefill: int
    decode: int
    drafted: int
    training: int
    busy_ms: float


class Latency(_View):
    """Milliseconds, of the last `window_s` seconds; null where there was none. `within`: share, 0 to 1, that
    met the target."""

    target_ms: float
    window_s: int
    count: int
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    within: float | None


class Totals(_View):
    """Counters since the server's start, those of /metrics."""

    iterations: int
    prompt_tokens: int
    generation_tokens: int
    prefix_queries_tokens: int
    prefix_hits_tokens: int
    preemptions: int
    draft_tokens: int
    draft_accepted: int
    training_tokens: int
    training_steps: int
    training_restarts: int


class Blocks(_View):
    """The KV pool. `map` has a letter for every `blocks_per_cell` blocks, the one that most of them have:
    `f` free, `c` cached prefixes, `r` running requests, `t` training."""

    total: int
    free: int
    cached: int
    running: int
    training: int
    block_size: int = Field(description="Tokens per block.")
    bytes: int
    tier_bytes: int
    blocks_per_cell: int
    map: str


class LiveRequest(_View):
    """A request; nothing of its text. Of its tokens `cached_tokens` came from the prefix cache."""

    id: str
    state: State
    age_s: float
    ttft_s: float | None
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    output_tokens: int
    max_tokens: int | None
    choices: int
    kv_blocks: int
    adapter: str | None
    kv: str | None
    draft: str | None


class LiveTraining(_View):
    """A job that trains: optimizer steps, and the last one's loss."""

    step: int
    loss: float | None


class LiveAdapter(_View):
    """An adapter in memory."""

    name: str
    version: int


class Snapshot(BaseModel):
    """The server at `at_s` (Unix seconds)."""

    at_s: float
    uptime_s: float
    version: str
    model: str
    max_model_len: int
    status: Literal["ready", "draining", "stopped"]
    running: int = Field(description="Sequences that hold KV.")
    waiting: int = Field(description="Sequences in the queue.")
    seconds: list[Seconds] = Field(
        description="What iterations were made of: the last three minutes in the first event of a stream, "
        "then what has come since the event before."
    )
    ttft: Latency = Field(description="Arrival to first token, queueing included; target: slo.ttft_ms.")
    itl: Latency = Field(description="From one event of a stream to the next; target: slo.tpot_ms.")
    totals: Totals
    blocks: Blocks
    requests: list[LiveRequest] = Field(description="Those that run first; at most 128.")
    num_requests: int
    trainings: list[LiveTraining]
    profiling: bool = Field(description="Jobs wait until this machine's latency profile is measured.")
    coserve: str = Field(description="coserve.mode.")
    adapters: list[LiveAdapter]


class Live:
    """Builds snapshots, and knows how many listen.

    For one event loop; the engine is read from a thread beside it.
    """

    def __init__(self, engine: AsyncEngine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.listeners = 0
        self._began_s = time.monotonic()
        self._last: asyncio.Task[Snapshot] | None = None
        self._last_s = 0.0

    async def snapshot(self) -> Snapshot:
        """A snapshot that is at most `REUSE_S` old."""
        now = time.monotonic()
        if self._last is None or now - self._last_s > REUSE_S:
            self._last_s = now
            self._last = asyncio.create_task(asyncio.to_thread(self.build))
        return await asyncio.shield(self._last)  # a listener that goes away takes nothing from the others

    def build(self) -> Snapshot:
        """The server as it is now."""
        engine, slo = self.engine, self.settings.slo
        stats, look = engine.stats(), engine.overview()
        return Snapshot(
            at_s=time.time(),
            uptime_s=time.monotonic() - self._began_s,
            version=__version__,
            model=engine.model_name,
            max_model_len=engine.max_model_len,
            status="ready" if engine.ready else "draining" if engine.alive else "stopped",
            running=stats.running,
            waiting=stats.waiting,
            seconds=[Seconds.model_validate(rows) for rows in look.seconds],
            ttft=_latency(stats.ttft, slo.ttft_ms),
            itl=_latency(stats.itl, slo.tpot_ms),
            totals=Totals(
                iterations=stats.iterations,
                prompt_tokens=stats.prompt_tokens,
                generation_tokens=stats.generation_tokens,
                prefix_queries_tokens=stats.prefix_queries_tokens,
                prefix_hits_tokens=stats.prefix_hits_tokens,
                preemptions=stats.preemptions,
                draft_tokens=stats.drafts.tokens,
                draft_accepted=stats.drafts.accepted,
                training_tokens=stats.training_tokens,
                training_steps=stats.training_steps,
                training_restarts=stats.training_restarts,
            ),
            blocks=_blocks(look, stats.kv_bytes_total, stats.tier_bytes),
            requests=[LiveRequest.model_validate(request) for request in look.requests],
            num_requests=look.num_requests,
            trainings=[LiveTraining.model_validate(training) for training in look.trainings],
            profiling=look.profiling,
            coserve=self.settings.coserve.mode,
            adapters=[LiveAdapter.model_validate(adapter) for adapter in engine.engine.adapters.list()],
        )


def _latency(latencies: Latencies, target_ms: float) -> Latency:
    found = latencies.percentiles(time.monotonic() - WINDOW_S, target_ms / 1e3)

    def ms(seconds: float | None) -> float | None:
        return None if seconds is None else seconds * 1e3

    return Latency(
        target_ms=target_ms,
        window_s=WINDOW_S,
        count=found.count,
        p50_ms=ms(found.p50_s),
        p90_ms=ms(found.p90_s),
        p99_ms=ms(found.p99_s),
        within=found.within,
    )


def _blocks(look: Overview, num_bytes: int, tier_bytes: int) -> Blocks:
    letters = look.blocks.map
    size = max(1, -(-len(letters) // MAX_CELLS))
    cells = letters
    if size > 1:
        parts = (letters[at : at + size] for at in range(0, len(letters), size))
        cells = "".join(max(_LIKELY, key=part.count) for part in parts)
    return Blocks(
        total=len(letters),
        free=letters.count("f"),
        cached=letters.count("c"),
        running=letters.count("r"),
        training=letters.count("t"),
        block_size=look.blocks.block_size,
        bytes=num_bytes,
        tier_bytes=tier_bytes,
        blocks_per_cell=size,
        map=cells,
    )


class LiveStream(Response):
    """Snapshots as server-sent events, until the client goes away, reads nothing, or the server stops."""

    media_type = "text/event-stream"

    def __init__(self, live: Live, interval_s: float) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.live, self.interval_s = live, interval_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.live.listeners >= MAX_LISTENERS:
            return await refuse(_too_many(), scope, receive, send)
        self.live.listeners += 1
        try:
            await until_disconnect(receive, self._send_all(send))
        except (ClientDisconnect, TimeoutError, asyncio.TimeoutError):
            return
        finally:
            self.live.listeners -= 1

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await _send(send, b"retry: 2000\n\n")
        known_s = 0
        while True:
            snapshot = await self.live.snapshot()
            new = [second for second in snapshot.seconds if second.at_s > known_s]
            known_s = new[-1].at_s if new else known_s
            data = snapshot.model_copy(update={"seconds": new}).model_dump_json()
            await _send(send, b"data: " + data.encode() + b"\n\n")
            if snapshot.status != "ready":
                break  # or the server could not close its connections
            await self._wait(send)
        await _send(send, b"", more=False)

    async def _wait(self, send: Send) -> None:
        """Until the next snapshot, with heartbeats if that is long; shorter if the server stops."""
        began = beat = asyncio.get_running_loop().time()
        while self.live.engine.ready and (now := asyncio.get_running_loop().time()) < began + self.interval_s:
            if now >= beat + HEARTBEAT_S:
                beat = now
                await _send(send, b": heartbeat\n\n")
            await asyncio.sleep(min(1.0, began + self.interval_s - now))


async def _send(send: Send, body: bytes, more: bool = True) -> None:
    message = {"type": "http.response.body", "body": body, "more_body": more}
    await asyncio.wait_for(send(message), SEND_TIMEOUT_S)


def _too_many() -> ApiError:
    return ApiError(
        429,
        f"{MAX_LISTENERS} listen already, which is the most this server takes; `once=true` still works",
        code="too_many_listeners",
        headers={"Retry-After": "5"},
    )


def live_router(engine: AsyncEngine, settings: Settings) -> APIRouter:
    """GET /live."""
    router = APIRouter(tags=["metrics"], responses=ERROR_RESPONSES)
    live = Live(engine, settings)
    event = {
        "type": "object",
        "properties": {"data": {"type": "string", "contentMediaType": "application/json"}},
        "required": ["data"],
    }
    answers: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "With `once` a snapshot; else server-sent events, each with one in its `data`.",
            "content": {"text/event-stream": {"schema": event}},
        }
    }

    @router.get("/live", response_model=Snapshot, responses=answers)
    async def watch(
        once: bool = False,
        interval_s: Annotated[float, Query(ge=0.25, le=60, allow_inf_nan=False)] = 1.0,
    ) -> Response:
        """What the server does: iterations, latencies, requests, KV blocks, training. No text of requests."""
        if once:
            snapshot = await live.snapshot()
            return Response(
                snapshot.model_dump_json(),
                media_type="application/json",
                headers={"Cache-Control": "no-store"},
            )
        return LiveStream(live, interval_s)

    return router
