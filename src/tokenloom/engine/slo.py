"""How long the next iteration may take so that every request keeps its latency targets."""

from __future__ import annotations

import math
import time

from tokenloom.config import Settings
from tokenloom.engine.scheduler import Plan, Scheduler

MAX_CREDIT = 0.5


def iteration_budget_ms(
    plan: Plan, scheduler: Scheduler, settings: Settings, reserve_ms: float = 0.0
) -> float:
    """Milliseconds that the iteration may take, inference included. Negative: somebody is late already.

    The targets are planned for less a margin (`coserve.margin`). A request in decode should get its n-th
    token a target's time * (n - 1) after its first. What it is ahead of that it may spend, up to half a
    token's time at once, but for a reserve: a prompt that arrives will hold it up, and its last tokens must
    not be too few to make up for that. A request that waits for its first token shares what is left until
    its deadline among the iterations that its prompt, and those before it, still need.

    Args:
        reserve_ms: how long an arriving prompt is expected to hold up the others.
    """
    slo, now = settings.slo, time.monotonic()
    share = 1 - settings.coserve.margin
    tpot_ms, ttft_ms = slo.tpot_ms * share, slo.ttft_ms * share
    budgets = []
    pending = 0
    for sequence in (*scheduler.running, *scheduler.waiting):
        first = sequence.request.first_token_s
        if first is None:
            pending += sequence.num_pending
            iterations = math.ceil(pending / settings.scheduler.max_batch_tokens)
            due_ms = (sequence.request.arrival_s - now) * 1e3 + ttft_ms
            budgets.append(due_ms / iterations)
        elif sequence in plan.rows:
            due_ms = (first - now) * 1e3 + tpot_ms * max(1, sequence.num_output)
            budgets.append(min(due_ms - reserve_ms, tpot_ms * (1 + MAX_CREDIT)))
    return min(budgets) if budgets else settings.ft.idle_iter_ms or slo.ttft_ms / 5
