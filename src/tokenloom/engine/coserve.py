"""How much of an iteration training gets: FlexLLM's hybrid token scheduler."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from tokenloom.batch import BatchBuilder
from tokenloom.cache.block_pool import BlockPool, OutOfBlocks
from tokenloom.cache.kv_cache import KVCache
from tokenloom.config import Settings
from tokenloom.engine.composition import Composition, Iteration
from tokenloom.engine.drafting import features_of
from tokenloom.engine.latency_model import Features, LatencyModel, bisect_rows
from tokenloom.engine.rivals import Rivals
from tokenloom.engine.scheduler import Plan, Scheduler
from tokenloom.engine.slo import Prompts, iteration_budget_ms
from tokenloom.engine.training import Profiler, Training
from tokenloom.models.decoder import Decoder

logger = logging.getLogger("tokenloom.engine")

PROFILE_WAIT_S = 600.0
"""Cells of the profile wait so long for a moment without requests, which they would make late."""
DOUBT_AFTER = 64


class Coserver:
    """Gives training its part of each iteration (FlexLLM, arXiv 2402.18789). Inference is planned first and
    never looks at training.

    `before` runs when the iteration's inference is planned: it runs backward pieces and says how many
    training rows join the batch. `after` hears how long the batch took.
    """

    def __init__(
        self,
        settings: Settings,
        scheduler: Scheduler,
        pool: BlockPool,
        decoder: Decoder,
        kv: KVCache,
    ) -> None:
        self.settings = settings
        self.mode = settings.coserve.mode
        self.scheduler, self.pool = scheduler, pool
        self.decoder, self.kv = decoder, kv
        self.latency: LatencyModel | None = None
        self.profiler: Profiler | None = None
        self.arrivals: Callable[[], bool] = lambda: False
        """Whether something came in since the iteration was planned; idle training stops for it."""
        self.trainings: list[Training] = []
        self.iterations: deque[Iteration] = deque(maxlen=65536)
        self.composition = Composition()
        self.num_restarts = 0
        self._current: Training | None = None
        self.record = Iteration(0.0)
        """Of the iteration at hand."""
        self._features = Features()
        self._prefill_rows = 0
        self._profile_asked_s: float | None = None
        self._prompts = Prompts()
        self._prompts_done = 0  # by the iteration at hand
        self._skipped = 0  # iterations in a row in which training got nothing
        self.rivals = Rivals(self)
        scheduler.reclaim = self.reclaim

    # -- jobs -------------------------------------------------------------------------------------------

    def add(self, training: Training) -> None:
        self.trainings.append(training)

    def remove(self, training: Training) -> None:
        """Forget a job; what it holds is given back."""
        self.settle()
        if training in self.trainings:
            self.trainings.remove(training)
        training.reclaim()
        if self._current is training:
            self._current = None

    def settle(self) -> None:
        """Wait for the work that runs beside the engine's thread, if any; a job whose work failed is over."""
        error = self.rivals.settle()
        if error is not None and self._current is not None:
            self.fail(self._current, error)

    @property
    def has_work(self) -> bool:
        return self.mode != "off" and any(t.slots_needed() is not None for t in self.trainings)

    def reclaim(self) -> bool:
        """Inference needs blocks: the pass at hand gives up its own and starts over later."""
        self.settle()
        for training in self.trainings:
            if training.reclaim():
                self.num_restarts += 1
                return True
        return False

    def next(self) -> Training | None:
        """The job whose turn it is, with a pass under way; jobs take turns, pass by pass."""
        if self._current is not None and self._current.slots_needed() == 0:
            return self._current
        for training in list(self.trainings):
            needed = training.slots_needed()
            if needed is None or not self._room_for(training, needed):
                continue
            try:
                training.begin_pass()
            except OutOfBlocks:
                continue
            except Exception as error:
                self.fail(training, error)
                continue
            # The next pass is another job's, where there is one.
            self.trainings.remove(training)
            self.trainings.append(training)
            self._current = training
            return training
        return None

    def _room_for(self, training: Training, slots: int) -> bool:
        size = self.pool.block_size
        needed = -(-slots // size) + 2
        share = 1.0 if self.mode == "ft_only" else self.settings.ft.mem_frac
        allowed = int(self.pool.num_blocks * share)
        if needed > allowed:
            error = MemoryError(
                f"one training pass needs {needed} blocks of {size} tokens and may have {allowed} of "
                f"{self.pool.num_blocks} (ft.mem_frac, cache.kv_bytes): shorten max_seq_tokens or retain less"
            )
            self.fail(training, error)
            return False
        busy = self.scheduler.has_work
        reserve = self.pool.num_blocks // 10 if busy else 0
        return not self.scheduler.waiting and self.pool.num_available - needed >= reserve

    def fail(self, training: Training, error: BaseException) -> None:
        """End a job for what its work raised."""
        if not isinstance(error, MemoryError):
            logger.exception("a training job failed", exc_info=error)
        if training in self.trainings:
            self.trainings.remove(training)
        if self._current is training:
            self._current = None
        training.fail(error)

    # -- one iteration ----------------------------------------------------------------------------------

    def before(self, plan: Plan) -> int:
        """Run the pieces that training is given before this iteration's batch.

        Returns:
            How many training rows join the batch; `add_rows` adds them.
        """
        self.record = Iteration(time.monotonic(), inference_rows=plan.num_rows)
        self._features = features_of(plan)
        drafted = sum(len(draft.tree) for draft in plan.drafts.values())
        self.record.drafted_rows = plan.num_rows - sum(plan.rows.values())
        self.record.prefill_rows = sum(
            rows for sequence, rows in plan.rows.items() if rows > 1 or not sequence.num_output
        )
        self._prefill_rows = plan.num_rows - drafted - sum(rows == 1 for rows in plan.rows.values())
        self._prompts_done = sum(
            sequence.request.first_token_s is None and sequence.num_computed + rows == len(sequence.tokens)
            for sequence, rows in plan.rows.items()
        )
        if self.mode == "off" or not self.trainings:
            return 0
        try:
            if self.mode == "coserve":
                return self._coserve(plan)
            return self.rivals.before(plan)
        except Exception as error:
            if self._current is None:
                raise
            self.fail(self._current, error)
            return 0

    def add_rows(self, builder: BatchBuilder, rows: int) -> None:
        """Put the rows that `before` promised at the end of the batch."""
        assert self._current is not None
        self._features = self._features + self._current.forward_features(rows)
        self._current.add_rows(builder, rows)
        self.record.train_rows = rows

    def after(self, rows: int, measured_ms: float) -> None:
        """The batch has run, with that many training rows."""
        if rows and self._current is not None:
            self._current.forward_done(rows)
        if self.latency is not None:
            self.record.planned_ms += self.latency.planned(self._features)
            self.latency.observe(self._features, measured_ms)
        self.record.measured_ms += measured_ms
        self._record_done()
        if self._prefill_rows:
            share = self.record.inference_rows / (self.record.inference_rows + rows)
            self._prompts.add(self._prompts_done, share * measured_ms)

    def abandon(self) -> Training | None:
        """A batch with rows of training failed: the pass starts over. Whose they were."""
        training = self._current
        if training is not None:
            training.reclaim()
            self.num_restarts += 1
        return training

    def blame(self, training: Training, error: BaseException) -> None:
        """Batches fail with this job's rows and run without them."""
        if training in self.trainings:
            self.fail(training, error)

    def no_batch(self) -> None:
        """The iteration had no batch, only pieces."""
        if self.record.piece_rows:
            self._record_done()

    def _record_done(self) -> None:
        self.iterations.append(self.record)
        self.composition.add(self.record)

    # -- co-serving -------------------------------------------------------------------------------------

    def _coserve(self, plan: Plan) -> int:
        if self.latency is None:
            self._profile(plan)
        if self.latency is None:
            return 0
        training = self.next()
        if training is None:
            return 0
        budget = iteration_budget_ms(plan, self.scheduler, self.settings, self._prompts)
        base = self.latency.planned(self._features) if plan.rows else 0.0
        rows = self._fill(training, plan, budget - base, base)
        if rows or self.record.piece_rows:
            self._skipped = 0
            return rows
        self._skipped += 1
        every = self.settings.ft.min_progress
        due = self._skipped >= every > 0
        # An estimate that is too high would never be corrected if nothing ran because of it.
        doubtful = not plan.rows or (budget > base and self._skipped >= DOUBT_AFTER)
        if due or doubtful:
            self._skipped = 0
            return self._smallest(training)
        return 0

    def _fill(self, training: Training, plan: Plan, room_ms: float, base_ms: float) -> int:
        """Pieces while they fit into `room_ms`, then forward rows; returns the rows."""
        start = time.monotonic()
        current: Training | None = training
        while current is not None:
            room = room_ms - (time.monotonic() - start) * 1e3
            if room <= 0 or (self.record.piece_rows and self.arrivals()):
                return 0
            if current.forward_left():
                if self.record.piece_rows and not plan.rows:
                    return 0  # the idle iteration has done its part; look for arrivals first
                return self._rows_within(current, plan, base_ms + room)
            rows = self._piece_within(current, plan, room)
            if not rows:
                return 0
            self.run_piece(current, rows)
            current = self.next()
        return 0

    def _rows_within(self, training: Training, plan: Plan, budget_ms: float) -> int:
        """The most forward rows with which the batch stays within the budget.

        0 if they are too few to be worth what a window costs whatever its size: the time that streams gain
        meanwhile pays for a larger one later.
        """
        features, planned = self._features, self._estimate(plan)
        limit = min(training.forward_left(), self.settings.ft.max_fwd_tokens)
        rows = bisect_rows(limit, lambda n: planned(features + training.forward_features(n)) <= budget_ms)
        return rows if rows >= min(self.settings.ft.min_rows, limit) else 0

    def _piece_within(self, training: Training, plan: Plan, room_ms: float) -> int:
        """The most rows of the next piece that fit; 0 if they are too few to be worth a piece."""
        planned = self._estimate(plan)
        limit = min(training.piece_rows(), self.settings.ft.bwd_window)
        rows = bisect_rows(limit, lambda n: planned(training.piece_features(n)) <= room_ms)
        return rows if rows >= min(self.settings.ft.min_rows, limit) else 0

    def _estimate(self, plan: Plan) -> Callable[[Features], float]:
        """Beside requests what 95 % of iterations stay below; alone, with no target at stake, the mean."""
        assert self.latency is not None
        return self.latency.planned if plan.rows else self.latency.corrected

    def _smallest(self, training: Training) -> int:
        if training.forward_left():
            return min(training.forward_left(), self.settings.ft.min_rows)
        self.run_piece(training, min(training.piece_rows(), self.settings.ft.min_rows))
        return 0

    def run_piece(self, training: Training, rows: int) -> None:
        """Run a piece between two batches, and account for it."""
        features = training.piece_features(rows)
        start = time.monotonic()
        training.run_piece(rows)
        measured_ms = (time.monotonic() - start) * 1e3
        self.record.piece_rows += features.bwd_rows + features.loss_rows
        self.record.measured_ms += measured_ms
        if self.latency is not None:
            self.record.planned_ms += self.latency.planned(features)
            self.latency.observe(features, measured_ms)

    def _profile(self, plan: Plan) -> None:
        """One cell of the profile, in a moment without inference (or when there has been none for long)."""
        if self.profiler is None:
            return
        now = time.monotonic()
        if self._profile_asked_s is None:
            self._profile_asked_s = now
        if not self.scheduler.has_work or now - self._profile_asked_s > PROFILE_WAIT_S:
            try:
                self.latency = self.profiler.run_cell()
            except Exception as error:  # without a profile nothing can be trained beside requests
                self.profiler = None
                for training in list(self.trainings):
                    self.fail(training, error)
            if self.latency is not None:
                self.profiler = None
