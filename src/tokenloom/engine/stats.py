"""What the engine counts. Counters only grow; gauges are of the moment."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokenloom.engine.composition import Iteration, Rows
from tokenloom.engine.latencies import Latencies
from tokenloom.engine.outputs import DraftCounts, FinishReason

if TYPE_CHECKING:
    from tokenloom.cache.block_pool import BlockPool
    from tokenloom.engine.coserve import Coserver
    from tokenloom.engine.request import Request
    from tokenloom.engine.scheduler import Scheduler
    from tokenloom.engine.training import Training


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """How one finished request fared. All times are in seconds.

    `ttft_s` is arrival to first token, queueing included; `tpot_s` is (last token - first token) /
    (tokens - 1) of the longest choice, None below two tokens.
    """

    arrival_s: float
    queued_s: float
    ttft_s: float | None
    e2e_s: float
    tpot_s: float | None
    prefill_s: float | None
    decode_s: float | None
    prompt_tokens: int
    generation_tokens: int
    finish_reason: FinishReason

    @classmethod
    def of(cls, request: Request, now: float) -> RequestTiming:
        """Of a request that is over; now: on the clock of `Request.arrival_s`."""
        first, last = request.first_token_s, max(s.last_token_s for s in request.sequences)
        longest = max(s.num_output for s in request.sequences)
        scheduled = request.scheduled_s
        return cls(
            arrival_s=request.arrival_s,
            queued_s=(scheduled or now) - request.arrival_s,
            ttft_s=first - request.arrival_s if first else None,
            e2e_s=now - request.arrival_s,
            tpot_s=(last - first) / (longest - 1) if first and longest > 1 else None,
            prefill_s=first - scheduled if first and scheduled else None,
            decode_s=last - first if first else None,
            prompt_tokens=len(request.prompt),
            generation_tokens=sum(s.num_output for s in request.sequences),
            finish_reason=request.sequences[0].finish_reason or "abort",
        )


@dataclass(slots=True)
class EngineStats:
    """A snapshot of the engine."""

    running: int = 0
    """Sequences that hold KV."""
    waiting: int = 0
    """Sequences in the queue."""
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    kv_bytes_total: int = 0
    prefix_queries_tokens: int = 0
    prefix_hits_tokens: int = 0
    preemptions: int = 0
    restarts: int = 0
    """Of the engine's loop, after a failure or a hang."""
    kv_blocks_cached: int = 0
    """Blocks that nobody uses and the prefix cache keeps."""
    prefix_reads_saved: int = 0
    """Cached tokens that attention did not read again, since it read them for another sequence; per layer."""
    tier_bytes: int = 0
    """Bytes of blocks in the second tier."""
    tier_demotions: int = 0
    """Blocks that went down to it."""
    tier_hits_tokens: int = 0
    """Tokens whose blocks came back from it."""
    tier_corrupt: int = 0
    """Blocks that could not come back, since they were not as they had been written."""
    prompt_tokens: int = 0
    """Prompt tokens of finished and running requests, computed or taken from the prefix cache."""
    generation_tokens: int = 0
    iterations: int = 0
    batch_tokens: int = 0
    """Rows of all iterations together."""
    rows: Rows = field(default_factory=Rows)
    """Of all iterations, by kind."""
    ttft: Latencies = field(default_factory=Latencies)
    """Arrival to first token, queueing included."""
    itl: Latencies = field(default_factory=Latencies)
    """From one event of a stream to the next; a draft that is right brings several tokens in one."""
    training_jobs: int = 0
    """Jobs that train now."""
    training_rows: int = 0
    """Forward rows of training in all iterations; passes that started over count again."""
    training_tokens: int = 0
    """Rows of finished training passes: each token once per pass that counted."""
    training_steps: int = 0
    """Optimizer steps."""
    training_restarts: int = 0
    """Training passes that gave their memory to inference and started over."""
    training_loss: float | None = None
    """Of the last optimizer step of any job."""
    kv_blocks_training: int = 0
    """Blocks in use that no sequence holds."""
    drafts: DraftCounts = field(default_factory=DraftCounts)
    draft_bytes: int = 0
    """What drafters keep beyond their sequences: tables, the caches of draft models."""
    finished: deque[RequestTiming] = field(default_factory=lambda: deque(maxlen=65536))

    @property
    def kv_usage(self) -> float:
        """Share of the KV pool in use, 0 to 1."""
        return self.kv_blocks_used / self.kv_blocks_total if self.kv_blocks_total else 0.0

    def gauge(self, scheduler: Scheduler, pool: BlockPool) -> None:
        """Take over what these have counted, and how they are now."""
        self.running, self.waiting = len(scheduler.running), len(scheduler.waiting)
        self.prefix_queries_tokens, self.prefix_hits_tokens = scheduler.prefix_queries, scheduler.prefix_hits
        self.preemptions = scheduler.num_preemptions
        self.kv_blocks_used, self.kv_blocks_total = pool.num_used, pool.num_blocks
        self.kv_blocks_cached = pool.num_cached
        tier = pool.tier
        if tier is not None:
            self.tier_bytes, self.tier_demotions = tier.num_bytes, tier.demotions
            self.tier_hits_tokens, self.tier_corrupt = tier.hits * pool.block_size, tier.corrupt

    def pop_finished(self) -> list[RequestTiming]:
        """Requests that finished since the last call."""
        return [self.finished.popleft() for _ in range(len(self.finished))]


class TrainingCounter:
    """Adds up what training jobs do, while they come and go. For the engine's thread."""

    def __init__(self, stats: EngineStats, coserver: Coserver) -> None:
        self.stats, self.coserver = stats, coserver
        self._seen: dict[Training, tuple[int, int]] = {}
        self._record: Iteration | None = None

    def count(self) -> None:
        """Take in what the jobs have done since the last call. Called before and after each iteration: a job
        is to be seen both at its beginning and at its end."""
        stats, trainings = self.stats, self.coserver.trainings
        if not trainings and not self._seen:
            return
        record = self.coserver.iterations[-1] if self.coserver.iterations else None
        if record is not None and record is not self._record:
            self._record = record
            stats.training_rows += record.train_rows
        now: dict[Training, tuple[int, int]] = {}
        for training in trainings:
            rows, step = now[training] = training.rows_run, training.progress.step
            rows_before, step_before = self._seen.get(training, (0, step))
            stats.training_tokens += rows - rows_before
            if step > step_before:
                stats.training_steps += step - step_before
                stats.training_loss = training.progress.last_metrics["train_loss"]
        self._seen = now
