"""Whose turn it is when nobody knows how long answers get: skip-join multi-level feedback queues."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tokenloom.config import SchedulerSettings
from tokenloom.engine.request import Sequence


@dataclass(slots=True)
class Standing:
    """Where a sequence stands in the queues. Times are the scheduler's clock, in seconds."""

    level: int
    joined_s: float
    """Since when it is in this level; inside a level the first to join goes first."""
    served_s: float
    """When it last got rows; before that, when it came."""
    used: int = 0
    """Rows of this level's quantum."""
    known: int = 0
    """Tokens that were computed or found in the cache: to compute them again is not charged."""


class Mlfq:
    """Skip-join MLFQ (FastServe, arXiv 2305.05920).

    Level i has a quantum of `mlfq_quantum * 2**i` rows; a level goes before all those below it. A sequence
    joins at the first level whose quantum covers its prompt, so that a long prompt never blocks short ones.
    Who has used its quantum goes down a level; the last level has no end. Who got no rows for
    `mlfq_starvation_s` goes up to the first level, and there before all who have waited less.

    The paper counts quanta in time, after a profile of first iterations; rows need no profile, and are the
    same whatever runs beside.
    """

    def __init__(self, settings: SchedulerSettings) -> None:
        self.settings = settings
        self._standings: dict[Sequence, Standing] = {}

    def quantum(self, level: int) -> int:
        """Rows that a sequence may have in a level."""
        return self.settings.mlfq_quantum << level

    def join(self, sequence: Sequence, cached_tokens: int, now_s: float) -> None:
        """A new sequence, of whose tokens so many need not be computed; after a preemption it stands where it
        stood."""
        if sequence in self._standings:
            return
        rows = sequence.num_pending - cached_tokens
        last = self.settings.mlfq_levels - 1
        level = next((i for i in range(last) if self.quantum(i) >= rows), last)
        came_s = sequence.request.arrival_s
        self._standings[sequence] = Standing(level, came_s, now_s)

    def found(self, sequence: Sequence, tokens: int) -> None:
        """So many tokens from its front are in the cache: they are not charged."""
        standing = self._standings[sequence]
        standing.known = max(standing.known, tokens)

    def fork(self, sequence: Sequence, sibling: Sequence) -> None:
        """A sibling stands where the one stands whose prompt it shares."""
        of = self._standings[sequence]
        self._standings[sibling] = replace(of, known=sibling.num_computed)

    def leave(self, sequence: Sequence) -> None:
        self._standings.pop(sequence, None)

    def level(self, sequence: Sequence) -> int:
        return self._standings[sequence].level

    def rank(self, sequence: Sequence) -> tuple[int, float]:
        """Smaller goes first."""
        standing = self._standings[sequence]
        return standing.level, standing.joined_s

    def serve(self, sequence: Sequence, now_s: float) -> None:
        """It gets rows in the iteration at hand."""
        self._standings[sequence].served_s = now_s

    def update(self, sequences: Iterable[Sequence], now_s: float) -> None:
        """Charge what was computed since the last call; demote and promote."""
        for sequence in sequences:
            standing = self._standings[sequence]
            rows = sequence.num_computed - standing.known
            if rows > 0:
                standing.known += rows
                standing.used += rows
            last = standing.level == self.settings.mlfq_levels - 1
            if standing.used >= self.quantum(standing.level) and not last:
                standing.level, standing.used, standing.joined_s = standing.level + 1, 0, now_s
            if now_s - standing.served_s >= self.settings.mlfq_starvation_s and standing.level > 0:
                # It has waited since then: before all who joined the first level later.
                standing.level, standing.used, standing.joined_s = 0, 0, standing.served_s
