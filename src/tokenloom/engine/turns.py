"""When those who found the queue full should come back."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

FIRST_S = 1.0
"""What they are told while the pace is not known."""
LONGEST_S = 60.0
"""Clients give up on longer waits; the turns begin anew there."""
REMEMBERED = 32


class Turns:
    """Gives each refused request a time of its own, so that they come one after another and as fast as the
    server gets on, rather than all at once again and again: refusing takes time from those who were let in.

    The pace is that of the last `REMEMBERED` requests to end since the server was idle, or else what it was
    before. Those who never come back leave their turn to whoever does. `clock` gives seconds; any thread may
    call.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._ends: deque[float] = deque(maxlen=REMEMBERED)
        self._last = clock()
        self._pace_s: float | None = None

    def ended(self, *, idle: bool) -> None:
        """A request has ended, so that another moves up; `idle`: there is none."""
        with self._lock:
            now = self._clock()
            self._ends.append(now)
            if idle:  # what follows is nobody's pace
                self._pace_s = self._apart_s(now)
                self._ends.clear()

    def next_s(self) -> float:
        """Seconds until the next turn; it is given away with that."""
        with self._lock:
            now = self._clock()
            apart = self._apart_s(now)
            if apart is None:
                return FIRST_S
            self._last = max(self._last, now) + apart
            if self._last > now + LONGEST_S:
                self._last = now + apart
            return self._last - now

    def _apart_s(self, now: float) -> float | None:
        passed = now - self._ends[0] if self._ends else 0.0
        if len(self._ends) < 2 or passed <= 0:
            return self._pace_s
        return min(passed / (len(self._ends) - 1), LONGEST_S)
