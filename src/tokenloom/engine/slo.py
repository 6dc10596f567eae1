"""How long the next iteration may take so that every request keeps its latency targets."""

from __future__ import annotations

import math
import time
from collections import deque

from tokenloom.config import Settings
from tokenloom.engine.scheduler import Plan, Scheduler

MAX_CREDIT = 0.5
HORIZON_TOKENS = 64
"""An answer may end before its limit: no more tokens than these are looked ahead."""
MEMORY_S = 20.0


class Prompts:
    """How often prompts came of late, and how long each held up the streams that were decoding."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int, float]] = deque()  # when, prompts finished, ms
        self._count, self._total_ms = 0, 0.0  # of `_recent`
        self._began_s = time.monotonic()

    def add(self, prompts: int, measured_ms: float) -> None:
        """An iteration computed rows of prompts, so many of which it finished."""
        self._recent.append((time.monotonic(), prompts, measured_ms))
        self._count += prompts
        self._total_ms += measured_ms
        self._forget()

    def expected(self, seconds: float) -> tuple[float, float]:
        """How many iterations the prompts of the next so many seconds will take, and milliseconds of each.

        Those of a burst rather than the mean: arrivals whose times vary twice as much as random ones' (CV 2,
        as in the traces of the paper): of n expected, n + 2 sqrt(n) come in one case of six. At least one
        prompt, whatever the rate.
        """
        self._forget()
        if self._count == 0:
            return 0.0, 0.0
        iterations = len(self._recent)
        passed_s = min(MEMORY_S, time.monotonic() - self._began_s)
        n = self._count * seconds / max(passed_s, 1.0)
        burst = max(1.0, n + 2 * math.sqrt(n))
        return burst * iterations / self._count, self._total_ms / iterations

    def _forget(self) -> None:
        while self._recent and self._recent[0][0] < time.monotonic() - MEMORY_S:
            _, prompts, measured_ms = self._recent.popleft()
            self._count -= prompts
            self._total_ms -= measured_ms


def iteration_budget_ms(plan: Plan, scheduler: Scheduler, settings: Settings, prompts: Prompts) -> float:
    """Milliseconds that the iteration may take, inference included. Negative: somebody is late already.

    The targets are planned for less a margin (`coserve.margin`). A request in decode should get its n-th
    token a target's time * (n - 1) after its first. The time until its last token is due is shared evenly
    among the tokens that it still lacks; where iterations with prompts take longer than that share, those of
    prompts that will arrive before are taken off first, with the tokens that they give. No iteration takes
    more than half a target's time more than the target. A request that waits for its first token shares what
    is left until its deadline among the iterations that its prompt, and those before it, still need beside
    the streams that are decoding.
    """
    slo, now = settings.slo, time.monotonic()
    share = 1 - settings.coserve.margin
    tpot_ms, ttft_ms = slo.tpot_ms * share, slo.ttft_ms * share
    budgets = []
    pending = 0
    decoding = sum(sequence.request.first_token_s is not None for sequence in scheduler.running)
    room = max(1, settings.scheduler.max_batch_tokens - decoding)
    for sequence in (*scheduler.running, *scheduler.waiting):
        first = sequence.request.first_token_s
        if first is None:
            pending += sequence.num_pending
            iterations = math.ceil(pending / room)
            due_ms = (sequence.request.arrival_s - now) * 1e3 + ttft_ms
            budgets.append(due_ms / iterations)
        elif sequence in plan.rows:
            count = sequence.num_output
            left = max(1, min((sequence.request.params.max_tokens or HORIZON_TOKENS) - count, HORIZON_TOKENS))
            due_ms = (first - now) * 1e3 + tpot_ms * (count + left - 1)
            expected, each_ms = prompts.expected(left * tpot_ms / 1e3)
            with_prompts = min(expected, left - 1)
            beside_ms = (due_ms - with_prompts * each_ms) / (left - with_prompts)
            budgets.append(min(due_ms / left, beside_ms, tpot_ms * (1 + MAX_CREDIT)))
    return min(budgets) if budgets else settings.ft.idle_iter_ms or slo.ttft_ms / 5
