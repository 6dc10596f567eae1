"""Durations as clients see them: counted by bucket since the start, and the last ones themselves."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

import numpy as np

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Upper bounds of the buckets; what is above the last one has a bucket of its own."""
KEEP = 4096


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of the durations of a stretch of time, in seconds; None where there were none.

    `within` is the share of them that met the target, 0 to 1.
    """

    count: int
    p50_s: float | None = None
    p90_s: float | None = None
    p99_s: float | None = None
    within: float | None = None


class Latencies:
    """Added to by the engine's thread; read by any."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.total_s = 0.0
        self._recent: deque[tuple[float, float]] = deque(maxlen=KEEP)  # when, how long

    def add(self, seconds: float, now: float) -> None:
        """Count one duration that ended at `now`, on the clock of `time.monotonic`."""
        self.counts[bisect_left(BUCKETS_S, seconds)] += 1
        self.total_s += seconds
        self._recent.append((now, seconds))

    def percentiles(self, since: float, target_s: float) -> Percentiles:
        """Of the durations that ended after `since`, or of the last `KEEP` of them."""
        recent = [seconds for at, seconds in list(self._recent) if at >= since]
        if not recent:
            return Percentiles(0)
        p50, p90, p99 = np.percentile(recent, (50, 90, 99))
        within = sum(seconds <= target_s for seconds in recent) / len(recent)
        return Percentiles(len(recent), float(p50), float(p90), float(p99), within)
