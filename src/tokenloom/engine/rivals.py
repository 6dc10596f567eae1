"""The ways to share a machine with training that co-serving is compared with (FlexLLM, section 8)."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from tokenloom.batch import BatchBuilder
from tokenloom.engine.scheduler import Plan
from tokenloom.engine.slo import Prompts, iteration_budget_ms
from tokenloom.engine.training import Training

if TYPE_CHECKING:
    from tokenloom.engine.coserve import Coserver

SPATIAL_WAIT_S = 0.05
DYNAMIC_BOUNDS = (32, 1024)


class Rivals:
    """Sharing by time, in space, or not at all; `host` has the jobs and does the accounts."""

    def __init__(self, host: Coserver) -> None:
        self.host = host
        self._since_pass = 0  # temporal sharing: inference iterations since the last training pass
        self._every = host.settings.coserve.temporal_every
        self._queue_before = 0
        self._thread: ThreadPoolExecutor | None = None
        self._unit: Future[None] | None = None

    def before(self, plan: Plan) -> int:
        """Run what training is given before this iteration's batch; returns the rows that join the batch."""
        if self.host.mode == "spatial":
            return self._spatial(plan)
        if self.host.mode == "ft_only":
            return self._alone()
        return self._temporal(plan)

    def _alone(self) -> int:
        """Only training: as large windows as the settings allow."""
        host, ft, start = self.host, self.host.settings.ft, time.monotonic()
        while (training := host.next()) is not None and not host.arrivals():
            if training.forward_left():
                return min(training.forward_left(), max(ft.max_fwd_tokens, ft.bwd_window))
            host.run_piece(training, min(training.piece_rows(), ft.bwd_window))
            if time.monotonic() - start > 0.5:
                return 0
        return 0

    def _temporal(self, plan: Plan) -> int:
        """A whole pass, forward and backward, each `every` iterations; nothing else runs meanwhile."""
        self._since_pass += bool(plan.rows)
        if plan.rows and self._since_pass < self._every:
            return 0
        training = self.host.next()
        if training is None:
            return 0
        if self.host.mode == "dynamic_temporal":
            self._adapt()
        self._since_pass = 0
        while training.slots_needed() == 0:
            self._unit_of(training)
        return 0

    def _adapt(self) -> None:
        """Twice as rare when the queue grows or a request is late, else twice as often (the rule is ours: the
        paper does not print its own)."""
        scheduler, settings = self.host.scheduler, self.host.settings
        queue = len(scheduler.waiting)
        plan = Plan({s: 1 for s in scheduler.running})
        late = bool(plan.rows) and iteration_budget_ms(plan, scheduler, settings, Prompts()) < 0
        low, high = DYNAMIC_BOUNDS
        wanted = self._every * 2 if queue > self._queue_before or late else self._every // 2
        self._every, self._queue_before = min(max(wanted, low), high), queue

    def _spatial(self, plan: Plan) -> int:
        """The same work in a thread of its own, beside inference and with no budget."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenloom-training")
        if self._unit is not None:
            if not self._unit.done():
                if not plan.rows:
                    self._wait(SPATIAL_WAIT_S)
                return 0
            self.host.settle()
        training = self.host.next()
        if training is not None:
            self._unit = self._thread.submit(self._unit_of, training)
        return 0

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._unit is not None and not self._unit.done() and not self.host.arrivals():
            if time.monotonic() > deadline:
                return
            time.sleep(0.001)

    def settle(self) -> BaseException | None:
        """Wait for the work that runs beside the engine's thread, if any; what it raised."""
        unit, self._unit = self._unit, None
        return unit.exception() if unit is not None else None

    def _unit_of(self, training: Training) -> None:
        """A window of forward rows in a batch of its own, or one piece."""
        host = self.host
        if not training.forward_left():
            host.run_piece(training, min(training.piece_rows(), host.settings.ft.bwd_window))
            return
        rows = min(training.forward_left(), host.settings.ft.max_fwd_tokens)
        builder = BatchBuilder(host.decoder.device)
        training.add_rows(builder, rows)
        host.decoder.forward(builder.build(), host.kv)
        training.forward_done(rows)
        host.record.train_rows += rows
