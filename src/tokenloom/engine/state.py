"""All that an engine holds, in detail, for somebody who looks for a fault. Nothing of any text.

Taken as `overview` is: from any thread, also from one beside a loop that hangs.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenloom.engine.overview import RequestOverview, State, look_at_request, state_of

if TYPE_CHECKING:
    from tokenloom.engine.async_engine import AsyncEngine
    from tokenloom.engine.coserve import Iteration
    from tokenloom.engine.request import Request, Sequence

MOST_FRAMES = 64


@dataclass(frozen=True, slots=True)
class SequenceState:
    """One choice of a request. `pending_tokens` wait to be rows; the next goes to `kv_start` in its blocks,
    which is not its position once a KV method has dropped tokens."""

    index: int
    tokens: int
    pending_tokens: int
    output_tokens: int
    kv_start: int
    kv_blocks: int
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class RequestState:
    """A request and its choices."""

    request: RequestOverview
    kind: str
    priority: int
    adapter_version: int | None
    sequences: list[SequenceState]


@dataclass(frozen=True, slots=True)
class LoopState:
    """The engine's loop. `inbox`: commands that it has not taken. `streams`: answers that somebody waits for.
    `idle_ms`: how long ago the last iteration ended although there is work; a loop that hangs shows here."""

    alive: bool
    ready: bool
    has_work: bool
    idle_ms: float | None
    inbox: int
    streams: int


@dataclass(frozen=True, slots=True)
class SchedulerState:
    """`running` and `waiting` name `request:choice`, in the scheduler's order."""

    policy: str
    running: list[str]
    waiting: list[str]
    max_running: int
    max_waiting: int
    max_batch_tokens: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class PoolState:
    """KV blocks. `shared`: held by more than one sequence; `indexed`: in the prefix index, in use or not."""

    num_blocks: int
    block_size: int
    free: int
    cached: int
    in_use: int
    shared: int
    indexed: int


@dataclass(frozen=True, slots=True)
class AdapterState:
    """An adapter in memory. `loaded_at`: Unix seconds; `last_used`: a count, the largest is the latest."""

    name: str
    version: int
    pinned: bool
    loaded_at: int
    last_used: int


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Training in the loop: each job's optimizer steps and rows run; whether a latency profile is there."""

    mode: str
    steps: list[int]
    rows_run: list[int]
    restarts: int
    profiling: bool
    profiled: bool


@dataclass(frozen=True, slots=True)
class IterationState:
    """One iteration. `ago_s`: since it was planned; `planned_ms` is 0 where nothing foretells latencies."""

    ago_s: float
    inference_rows: int
    prefill_rows: int
    drafted_rows: int
    train_rows: int
    piece_rows: int
    planned_ms: float
    measured_ms: float


@dataclass(frozen=True, slots=True)
class EngineState:
    """`iterations`: the last ones, the newest first."""

    loop: LoopState
    scheduler: SchedulerState
    requests: list[RequestState]
    pool: PoolState
    adapters: list[AdapterState]
    training: TrainingState
    iterations: list[IterationState]


def engine_state(outer: AsyncEngine, iterations: int) -> EngineState:
    """Everything, with that many of the last iterations."""
    engine, now = outer.engine, time.monotonic()
    scheduler, coserver = engine.scheduler, engine.coserver
    records = list(coserver.iterations)
    running = set(scheduler.running)
    ended_s = records[-1].at_s + records[-1].measured_ms / 1e3 if records else None
    has_work = engine.has_work
    trainings = list(coserver.trainings)
    return EngineState(
        loop=LoopState(
            alive=outer.alive,
            ready=outer.ready,
            has_work=has_work,
            idle_ms=(now - ended_s) * 1e3 if has_work and ended_s is not None else None,
            **outer.backlog(),
        ),
        scheduler=SchedulerState(
            policy=scheduler.settings.policy,
            running=[_name(s) for s in list(scheduler.running)],
            waiting=[_name(s) for s in list(scheduler.waiting)],
            max_running=scheduler.settings.max_running,
            max_waiting=scheduler.settings.max_waiting,
            max_batch_tokens=scheduler.settings.max_batch_tokens,
            preemptions=scheduler.num_preemptions,
        ),
        requests=[_request(r, state_of(r, running), now) for r in list(engine.requests.values())],
        pool=PoolState(engine.pool.num_blocks, engine.pool.block_size, **engine.pool.counts()),
        adapters=[
            AdapterState(a.name, a.version, a.pinned, a.loaded_at, a.last_used)
            for a in engine.adapters.list()
        ],
        training=TrainingState(
            mode=coserver.mode,
            steps=[t.progress.step for t in trainings],
            rows_run=[t.rows_run for t in trainings],
            restarts=coserver.num_restarts,
            profiling=coserver.profiler is not None,
            profiled=coserver.latency is not None,
        ),
        iterations=[_iteration(record, now) for record in reversed(records[len(records) - iterations :])],
    )


def thread_stacks() -> dict[str, list[str]]:
    """Where each thread of the process stands, `file:line function`, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        f"{names.get(ident, 'unknown')} ({ident})": [
            f"{frame.filename}:{frame.lineno} {frame.name}"
            for frame in traceback.extract_stack(stack)[-MOST_FRAMES:]
        ]
        for ident, stack in sys._current_frames().items()
    }


def _name(sequence: Sequence) -> str:
    return f"{sequence.request.request_id}:{sequence.index}"


def _request(request: Request, state: State, now: float) -> RequestState:
    return RequestState(
        request=look_at_request(request, state, now),
        kind=request.kind,
        priority=request.priority,
        adapter_version=None if request.adapter is None else request.adapter.version,
        sequences=[_sequence(sequence) for sequence in list(request.sequences)],
    )


def _sequence(sequence: Sequence) -> SequenceState:
    return SequenceState(
        index=sequence.index,
        tokens=len(sequence.tokens),
        pending_tokens=sequence.num_pending,
        output_tokens=sequence.num_output,
        kv_start=sequence.kv_start,
        kv_blocks=len(set(sequence.blocks)),
        finish_reason=sequence.finish_reason,
    )


def _iteration(record: Iteration, now: float) -> IterationState:
    return IterationState(
        ago_s=now - record.at_s,
        inference_rows=record.inference_rows,
        prefill_rows=record.prefill_rows,
        drafted_rows=record.drafted_rows,
        train_rows=record.train_rows,
        piece_rows=record.piece_rows,
        planned_ms=record.planned_ms,
        measured_ms=record.measured_ms,
    )
