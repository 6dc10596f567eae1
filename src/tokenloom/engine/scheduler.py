"""Which sequences get how many rows of the next iteration."""

from __future__ import annotations

import logging
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tokenloom.cache.block_pool import BlockPool, OutOfBlocks
from tokenloom.config import SchedulerSettings
from tokenloom.engine.draft import Draft
from tokenloom.engine.mlfq import Mlfq
from tokenloom.engine.request import Request, Sequence
from tokenloom.logs import fields

logger = logging.getLogger("tokenloom.engine")


@dataclass(slots=True)
class Plan:
    """One iteration: rows per sequence, decodes first."""

    rows: dict[Sequence, int] = field(default_factory=dict)
    num_rows: int = 0
    drafts: dict[Sequence, Draft] = field(default_factory=dict)
    """Of sequences in decode whose next tokens are guessed: rows besides their own."""

    def drop(self, sequence: Sequence) -> None:
        """Without this one, if it is there."""
        self.num_rows -= self.rows.pop(sequence, 0)
        self.drafts.pop(sequence, None)


class Scheduler:
    """Continuous batching with chunked prefill and preemption by recompute.

    Every iteration is filled in this order: one row for each sequence in decode, then the next chunks
    of the prompts that are being computed, then new sequences from the queue. A sequence that cannot
    get a block takes it from the one that arrived last, which goes back to the queue with the tokens
    that it has and is computed again later.

    With policy `mlfq` the order of all three is that of the queues, and a sequence that is not among the
    first `max_running` gets no row, running or not: its KV stays until somebody above it needs the blocks.

    Args:
        copy_block: (from, to) copies the content of a block, before another may take the first one.
        clock: seconds, of the kind that `Request.arrival_s` is in.
    """

    def __init__(
        self,
        settings: SchedulerSettings,
        pool: BlockPool,
        *,
        prefix_caching: bool,
        copy_block: Callable[[int, int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.pool = pool
        self.prefix_caching = prefix_caching
        self.copy_block = copy_block
        self.clock = clock
        self.mlfq = Mlfq(settings) if settings.policy == "mlfq" else None
        self.reclaim: Callable[[], bool] = lambda: False
        """Asked for blocks before a sequence is preempted or has to wait: whether some became free."""
        self.waiting: list[Sequence] = []  # in the order of _rank
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.prefix_queries = 0  # tokens
        self.prefix_hits = 0  # tokens

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        if self.mlfq is not None:
            self.mlfq.join(sequence, sequence.num_cached() if self._reuses(sequence) else 0, self.clock())
        insort(self.waiting, sequence, key=self._rank)

    def _rank(self, sequence: Sequence) -> tuple[int, float, int]:
        request = sequence.request
        if self.mlfq is not None:
            return *self.mlfq.rank(sequence), sequence.index
        priority = request.priority if self.settings.policy == "priority" else 0
        return priority, request.arrival_s, sequence.index

    def start(self, sequence: Sequence) -> None:
        """Run a forked sequence at once: its prompt is computed already."""
        if self.mlfq is not None:
            self.mlfq.fork(sequence.request.sequences[0], sequence)
        self.running.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that finished or was aborted, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if self.mlfq is not None:
            self.mlfq.leave(sequence)
        sequence.release_kv()

    def schedule(self) -> Plan:
        plan = Plan()
        if self.mlfq is not None:
            self._by_level(plan, self.mlfq)
        else:
            self._in_order(plan)
        if self.pool.tier is not None:
            self.pool.tier.read_ahead(self._wanted(self.pool.tier.read_ahead_blocks))
        return plan

    def _in_order(self, plan: Plan) -> None:
        preempted = self.num_preemptions
        for decoding in (True, False):
            for sequence in list(self.running):
                if (sequence.num_pending == 1) == decoding and sequence in self.running:
                    self._give_rows(plan, sequence)
        if self.num_preemptions == preempted:
            self._admit(plan)

    def _by_level(self, plan: Plan, mlfq: Mlfq) -> None:
        now = self.clock()
        mlfq.update(self.running, now)
        mlfq.update(self.waiting, now)
        self.waiting.sort(key=self._rank)
        waiting, admitting = set(self.waiting), True
        chosen = self._first(sorted(self.running + self.waiting, key=self._rank))
        for decoding in (True, False):
            for sequence in chosen:
                if sequence in self.running:
                    if (sequence.num_pending == 1) == decoding and sequence not in plan.rows:
                        self._give_rows(plan, sequence)
                elif not decoding and sequence in waiting and plan.num_rows < self.settings.max_batch_tokens:
                    admitting = admitting and self._admit_one(plan, sequence)
        for sequence in plan.rows:
            mlfq.serve(sequence, now)

    def _first(self, order: list[Sequence]) -> list[Sequence]:
        """As many from the front as may run, siblings to come included; at least one."""
        room = self.settings.max_running
        for i, sequence in enumerate(order):
            room -= _siblings(sequence)
            if room < 0 and i > 0:
                return order[:i]
        return order

    def _give_rows(self, plan: Plan, sequence: Sequence) -> None:
        most, wanted = self.settings.max_batch_tokens - plan.num_rows, sequence.num_pending
        rows = min(wanted, most)
        if sequence.policy is not None:
            rows = sequence.policy.rows(sequence.num_computed, wanted, most)
        if rows == 0:
            return
        while True:
            try:
                if sequence.owes_drop:
                    sequence.drop_tokens()
                self._claim_blocks(sequence, rows)
            except OutOfBlocks:
                if self.reclaim():
                    continue
                if sequence.owes_drop and len(self.running) == 1:
                    sequence.owes_drop = False  # there will never be room: better to read more than nothing
                    continue
                victim = max(self.running, key=self._rank)
                self._preempt(plan, victim)
                if victim is sequence:
                    return
            else:
                plan.rows[sequence] = rows
                plan.num_rows += rows
                return

    def _claim_blocks(self, sequence: Sequence, rows: int) -> None:
        table, start = sequence.table, sequence.kv_start
        room = -(-(len(sequence.tokens) + (sequence.request.params.max_tokens or 0)) // self.pool.block_size)
        table.grow(start + rows, room)
        if start % self.pool.block_size:  # the first row goes into a block that others may share
            copy = table.make_writable(start // self.pool.block_size)
            if copy is not None:
                self.copy_block(*copy)

    def _preempt(self, plan: Plan, victim: Sequence) -> None:
        plan.drop(victim)
        self.set_aside(victim)
        self.num_preemptions += 1
        self.add(victim)
        logger.debug("preempted", extra=fields(request=victim.request.request_id, tokens=len(victim.tokens)))

    def set_aside(self, sequence: Sequence) -> None:
        """Let one that runs go without its blocks; `add` takes it back."""
        self.running.remove(sequence)
        sequence.restart_kv()

    def _admit(self, plan: Plan) -> None:
        while self.waiting and plan.num_rows < self.settings.max_batch_tokens:
            sequence = self._next_waiting()
            if self.running and len(self.running) + _siblings(sequence) > self.settings.max_running:
                return
            if not self._admit_one(plan, sequence):
                return  # first come, first served: nobody overtakes

    def _admit_one(self, plan: Plan, sequence: Sequence) -> bool:
        """Give a waiting sequence its first rows; False: there are not blocks enough for its tokens."""
        hits = sequence.match_prefix() if self._reuses(sequence) else 0
        if not self._make_room(plan, sequence):
            sequence.release_kv()
            return False
        if self.pool.tier is not None and self._reuses(sequence):
            hits = sequence.match_prefix()  # what there was no room for before
        self.waiting.remove(sequence)
        if self.mlfq is not None:
            self.mlfq.found(sequence, hits)
        self._count_admission(sequence.request, hits)
        self.running.append(sequence)
        self._give_rows(plan, sequence)
        return True

    def _make_room(self, plan: Plan, sequence: Sequence) -> bool:
        """Whether there are blocks for all of a sequence's tokens, if need be those of training or, with
        mlfq, of sequences that stand below it."""

        def missing() -> int:
            return sequence.table.missing(sequence.most_cached) - self.pool.num_available

        while missing() > 0 and self.reclaim():
            continue
        if missing() > 0 and self.mlfq is not None:
            rank = self._rank(sequence)
            below = sorted((s for s in self.running if self._rank(s) > rank), key=self._rank)
            held = Counter(block for s in below for block in s.blocks)
            freed = sum(self.pool.refs(block) == count for block, count in held.items())
            while freed >= missing() > 0 and below:
                self._preempt(plan, below.pop())
        return missing() <= 0

    def _reuses(self, sequence: Sequence) -> bool:
        """Whether cached blocks may stand in for rows of this sequence."""
        return self.prefix_caching and not sequence.request.reads_prompt_rows

    def _wanted(self, most: int) -> list[bytes]:
        """Blocks that the tier has of sequences that wait, at most so many, in the order of their turn."""
        wanted: dict[bytes, None] = {}
        for sequence in self.waiting:
            if len(wanted) >= most:
                break
            if self._reuses(sequence):
                wanted.update(dict.fromkeys(sequence.cold_digests(most - len(wanted))))
        return list(wanted)

    def _next_waiting(self) -> Sequence:
        """Who is admitted next: the first in line, or, by longest prefix match, whoever has most of its
        prompt in the prefix cache, unless the first has waited long enough (SGLang, arXiv 2312.07104)."""
        first = self.waiting[0]
        if self.settings.policy != "lpm" or len(self.waiting) == 1:
            return first
        if self.clock() - first.request.arrival_s > self.settings.lpm_wait_s:
            return first
        return max(self.waiting, key=Sequence.num_cached)  # of equals the first

    def _count_admission(self, request: Request, hits: int) -> None:
        if request.scheduled_s is None:
            request.scheduled_s = self.clock()
            request.cached_tokens = hits
            if self.prefix_caching and not request.reads_prompt_rows:
                self.prefix_queries += len(request.prompt)
                self.prefix_hits += hits


def _siblings(sequence: Sequence) -> int:
    """Sequences that run once this one's prompt is computed."""
    return 1 if sequence.request.forked else sequence.request.params.n
