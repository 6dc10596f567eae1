"""Which sequences get how many rows of the next iteration."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field

from tokenloom.cache.block_pool import BlockPool, OutOfBlocks
from tokenloom.config import SchedulerSettings
from tokenloom.engine.request import Request, Sequence


@dataclass(slots=True)
class Plan:
    """One iteration: rows per sequence, decodes first, and the blocks to copy before it runs."""

    rows: dict[Sequence, int] = field(default_factory=dict)
    copies: list[tuple[int, int]] = field(default_factory=list)
    num_rows: int = 0


class Scheduler:
    """Continuous batching with chunked prefill and preemption by recompute.

    Every iteration is filled in this order: one row for each sequence in decode, then the next chunks
    of the prompts that are being computed, then new sequences from the queue. A sequence that cannot
    get a block takes it from the one that arrived last, which goes back to the queue with the tokens
    that it has and is computed again later.
    """

    def __init__(self, settings: SchedulerSettings, pool: BlockPool, *, prefix_caching: bool) -> None:
        self.settings = settings
        self.pool = pool
        self.prefix_caching = prefix_caching
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
        insort(self.waiting, sequence, key=self._rank)

    def _rank(self, sequence: Sequence) -> tuple[int, float, int]:
        request = sequence.request
        priority = request.priority if self.settings.policy == "priority" else 0
        return priority, request.arrival_s, sequence.index

    def start(self, sequence: Sequence) -> None:
        """Run a forked sequence at once: its prompt is computed already."""
        self.running.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that finished or was aborted, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.release_kv()

    def schedule(self) -> Plan:
        plan = Plan()
        preempted = self.num_preemptions
        for decoding in (True, False):
            for sequence in list(self.running):
                if (sequence.num_pending == 1) == decoding and sequence in self.running:
                    self._give_rows(plan, sequence)
        if self.num_preemptions == preempted:
            self._admit(plan)
        return plan

    def _give_rows(self, plan: Plan, sequence: Sequence) -> None:
        most, wanted = self.settings.max_batch_tokens - plan.num_rows, sequence.num_pending
        rows = min(wanted, most)
        if sequence.policy is not None:
            rows = sequence.policy.rows(sequence.num_computed, wanted, most)
        if rows == 0:
            return
        while True:
            try:
                self._claim_blocks(plan, sequence, rows)
            except OutOfBlocks:
                if self.reclaim():
                    continue
                victim = max(self.running, key=self._rank)
                self._preempt(plan, victim)
                if victim is sequence:
                    return
            else:
                plan.rows[sequence] = rows
                plan.num_rows += rows
                return

    def _claim_blocks(self, plan: Plan, sequence: Sequence, rows: int) -> None:
        table, start = sequence.table, sequence.kv_start
        room = -(-(len(sequence.tokens) + (sequence.request.params.max_tokens or 0)) // self.pool.block_size)
        table.grow(start + rows, room)
        if start % self.pool.block_size:  # the first row goes into a block that others may share
            copy = table.make_writable(start // self.pool.block_size)
            if copy is not None:
                plan.copies.append(copy)

    def _preempt(self, plan: Plan, victim: Sequence) -> None:
        plan.num_rows -= plan.rows.pop(victim, 0)
        self.running.remove(victim)
        victim.restart_kv()
        self.num_preemptions += 1
        self.add(victim)

    def _admit(self, plan: Plan) -> None:
        while self.waiting and plan.num_rows < self.settings.max_batch_tokens:
            sequence = self._next_waiting()
            request = sequence.request
            siblings = 1 if request.forked else request.params.n
            if self.running and len(self.running) + siblings > self.settings.max_running:
                return
            if self.prefix_caching and not request.reads_prompt_rows:
                hits = sequence.match_prefix()
            else:
                hits = 0
            while sequence.table.missing(sequence.most_cached) > self.pool.num_available and self.reclaim():
                continue
            if sequence.table.missing(sequence.most_cached) > self.pool.num_available:
                sequence.release_kv()
                return  # first come, first served: nobody overtakes
            self.waiting.remove(sequence)
            self._count_admission(request, hits)
            self.running.append(sequence)
            self._give_rows(plan, sequence)

    def _next_waiting(self) -> Sequence:
        """Who is admitted next: the first in line, or, by longest prefix match, whoever has most of its
        prompt in the prefix cache, unless the first has waited long enough (SGLang, arXiv 2312.07104)."""
        first = self.waiting[0]
        if self.settings.policy != "lpm" or len(self.waiting) == 1:
            return first
        if time.monotonic() - first.request.arrival_s > self.settings.lpm_wait_s:
            return first
        return max(self.waiting, key=Sequence.num_cached)  # of equals the first

    def _count_admission(self, request: Request, hits: int) -> None:
        if request.scheduled_s is None:
            request.scheduled_s = time.monotonic()
            request.cached_tokens = hits
            if self.prefix_caching and not request.reads_prompt_rows:
                self.prefix_queries += len(request.prompt)
                self.prefix_hits += hits
