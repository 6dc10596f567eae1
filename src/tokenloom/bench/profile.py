"""Where the time of an iteration goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median


class PhaseProfile:
    """Times the phases of each step; install it as `engine.timer`.

    On a GPU the phases that only launch kernels look short, and the one that waits for them long.
    """

    def __init__(self) -> None:
        self.times_s: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.times_s[phase].append(time.perf_counter() - start)

    def medians_ms(self) -> dict[str, float]:
        """Median milliseconds of each phase."""
        return {phase: median(times) * 1e3 for phase, times in self.times_s.items()}
