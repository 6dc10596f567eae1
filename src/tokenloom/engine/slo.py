"""How long the next iteration may take so that every request keeps its latency targets."""

from __future__ import annotations

import math
import time

from tokenloom.config import Settings
from tokenloom.engine.request import Sequence
from tokenloom.engine.scheduler import Plan, Scheduler

MAX_CREDIT = 0.5


def iteration_budget_ms(plan: Plan, scheduler: Scheduler, settings: Settings) -> float:
    """Milliseconds that the iteration may take, inference included. Negative: somebody is late already.

    A request in decode should get its n-th token `tpot_ms` * (n - 1) after its first. What it is ahead of
    that it may spend, up to half a token's time at once, so that a moment of luck is not used to stall it;
    what it is behind is taken off. A request that waits for its first token shares what is left until its
    deadline among the iterations that its prompt, and those before it, still need.
    """
    slo, now = settings.slo, time.monotonic()
    budgets = []
    pending = 0
    late_starters: list[Sequence] = []
    for sequence in (*scheduler.running, *scheduler.waiting):
        first = sequence.request.first_token_s
        if first is None:
            late_starters.append(sequence)
        elif sequence in plan.rows:
            due_ms = (first - now) * 1e3 + slo.tpot_ms * max(1, sequence.num_output)
            budgets.append(min(due_ms, slo.tpot_ms * (1 + MAX_CREDIT)))
    for sequence in late_starters:
        pending += sequence.num_pending
        iterations = math.ceil(pending / settings.scheduler.max_batch_tokens)
        due_ms = (sequence.request.arrival_s - now) * 1e3 + slo.ttft_ms
        budgets.append(due_ms / iterations)
    if not budgets:
        return settings.ft.idle_iter_ms or slo.ttft_ms / 10
    budget = min(budgets)
    return budget * (1 - settings.coserve.margin) if budget > 0 else budget
