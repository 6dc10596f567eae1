"""What the engine counts. Counters only grow; gauges are of the moment."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from tokenloom.engine.outputs import FinishReason


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
    prompt_tokens: int = 0
    """Prompt tokens of finished and running requests, computed or taken from the prefix cache."""
    generation_tokens: int = 0
    iterations: int = 0
    batch_tokens: int = 0
    """Rows of all iterations together."""
    finished: deque[RequestTiming] = field(default_factory=lambda: deque(maxlen=65536))

    @property
    def kv_usage(self) -> float:
        """Share of the KV pool in use, 0 to 1."""
        return self.kv_blocks_used / self.kv_blocks_total if self.kv_blocks_total else 0.0

    def pop_finished(self) -> list[RequestTiming]:
        """Requests that finished since the last call."""
        return [self.finished.popleft() for _ in range(len(self.finished))]
