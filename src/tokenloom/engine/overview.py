"""What the engine holds at this moment: its requests, its KV blocks, its training. For people who watch.

Taken from any thread while the loop goes on: every container is copied at once, so that nothing breaks, but
what is seen of two of them may be an iteration apart. It costs the loop a moment of the interpreter's time,
and nothing when nobody asks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tokenloom.engine.composition import Rows

if TYPE_CHECKING:
    from tokenloom.engine.engine import Engine
    from tokenloom.engine.request import Request, Sequence

MOST_REQUESTS = 128
FREE, CACHED, RUNNING, TRAINING = "fcrt"
"""Letters of the block map."""

State = Literal["waiting", "prefill", "decode", "preempted"]


@dataclass(frozen=True, slots=True)
class RequestOverview:
    """One request. `computed_tokens` of its prompt and answer have their KV; `cached_tokens` of the prompt
    came from the prefix cache. `kv` and `draft` are specs in full, `adapter` a name; None: none."""

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


@dataclass(frozen=True, slots=True)
class BlocksOverview:
    """The KV pool: a letter per block (`FREE`, `CACHED`, `RUNNING`, `TRAINING`), in the pool's order."""

    block_size: int
    map: str


@dataclass(frozen=True, slots=True)
class TrainingOverview:
    """A job that trains: optimizer steps done, and the loss of the last one."""

    step: int
    loss: float | None


@dataclass(frozen=True, slots=True)
class Overview:
    """`requests` are at most `MOST_REQUESTS`, those that run first. `profiling`: jobs wait until this
    machine's latency profile is measured. `seconds`: see `Composition`."""

    requests: list[RequestOverview]
    num_requests: int
    blocks: BlocksOverview
    trainings: list[TrainingOverview]
    profiling: bool
    seconds: list[Rows]


def overview(engine: Engine) -> Overview:
    """Look at an engine; from any thread."""
    requests, coserver = list(engine.requests.values()), engine.coserver
    running = set(engine.scheduler.running)
    states = [(state_of(request, running), request) for request in requests]
    states.sort(key=lambda pair: pair[0] in ("waiting", "preempted"))
    now = time.monotonic()
    trainings = [t.progress for t in list(coserver.trainings)]
    return Overview(
        requests=[look_at_request(request, state, now) for state, request in states[:MOST_REQUESTS]],
        num_requests=len(requests),
        blocks=_blocks(engine, bool(trainings)),
        trainings=[TrainingOverview(p.step, p.last_metrics.get("train_loss")) for p in trainings],
        profiling=coserver.profiler is not None,
        seconds=coserver.composition.seconds(time.time()),
    )


def state_of(request: Request, running: set[Sequence]) -> State:
    """What becomes of a request; `running` as the scheduler has it."""
    sequences = list(request.sequences)
    if not any(sequence in running for sequence in sequences):
        return "waiting" if request.scheduled_s is None else "preempted"
    return "prefill" if sequences[0].num_pending > 1 or not sequences[0].num_output else "decode"


def look_at_request(request: Request, state: State, now: float) -> RequestOverview:
    """One request; now: on the monotonic clock."""
    sequences, first = list(request.sequences), request.first_token_s
    return RequestOverview(
        id=request.request_id,
        state=state,
        age_s=now - request.arrival_s,
        ttft_s=None if first is None else first - request.arrival_s,
        prompt_tokens=len(request.prompt),
        cached_tokens=request.cached_tokens,
        computed_tokens=max((s.num_computed for s in sequences), default=0),
        output_tokens=sum(s.num_output for s in sequences),
        max_tokens=request.params.max_tokens,
        choices=request.params.n,
        kv_blocks=len({block for s in sequences for block in s.blocks}),
        adapter=None if request.adapter is None else request.adapter.name,
        kv=None if request.kv is None else request.kv.spec,
        draft=None if request.draft is None else request.draft.spec,
    )


def _blocks(engine: Engine, trains: bool) -> BlocksOverview:
    """Blocks in use that no sequence holds are training's, where something trains."""
    in_use, cached = engine.pool.in_use(), engine.pool.cached()
    letters = [RUNNING if used and not trains else TRAINING if used else FREE for used in in_use]
    for block in cached:
        letters[block] = CACHED
    if trains:
        for sequence in list(engine.scheduler.running):
            for block in list(sequence.blocks):
                letters[block] = RUNNING
    return BlocksOverview(engine.pool.block_size, "".join(letters))
