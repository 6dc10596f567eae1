"""What iterations are made of, second by second: rows of prompts, answers, guesses and training."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace

KEEP_S = 180


@dataclass(slots=True)
class Iteration:
    """What one iteration held and took; the rows of a run's report."""

    at_s: float
    inference_rows: int = 0
    prefill_rows: int = 0
    drafted_rows: int = 0
    """Guesses; the other inference rows are decodes."""
    train_rows: int = 0
    piece_rows: int = 0
    """Rows times layers of backward work, and rows of the loss."""
    planned_ms: float = 0.0
    measured_ms: float = 0.0


@dataclass(slots=True)
class Rows:
    """Rows of some iterations by kind, and what these iterations took.

    `at_s` is the Unix second in which they ended. `decode` rows are the newest token of each answer,
    `drafted` ones the guesses that were verified behind them. `training` rows are forward rows.
    """

    at_s: int = 0
    iterations: int = 0
    prefill: int = 0
    decode: int = 0
    drafted: int = 0
    training: int = 0
    busy_ms: float = 0.0

    def add(self, record: Iteration) -> None:
        self.iterations += 1
        self.prefill += record.prefill_rows
        self.decode += record.inference_rows - record.prefill_rows - record.drafted_rows
        self.drafted += record.drafted_rows
        self.training += record.train_rows
        self.busy_ms += record.measured_ms


class Composition:
    """Adds up iterations: all of them, and those of each of the last `KEEP_S` seconds.

    Seconds without an iteration are left out. Added to by the engine's thread; read by any.
    """

    def __init__(self) -> None:
        self.total = Rows()
        self._seconds: deque[Rows] = deque(maxlen=KEEP_S)

    def add(self, record: Iteration) -> None:
        second = int(time.time())
        if not self._seconds or self._seconds[-1].at_s != second:
            self._seconds.append(Rows(second))
        self._seconds[-1].add(record)
        self.total.add(record)

    def seconds(self, now_s: float) -> list[Rows]:
        """The last seconds that are over at `now_s`, oldest first."""
        return [replace(rows) for rows in list(self._seconds) if now_s - KEEP_S <= rows.at_s < int(now_s)]
