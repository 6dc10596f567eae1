"""What the engine knows of a training job: rows to add to its batches, and pieces of backward work."""

from __future__ import annotations

from typing import Protocol

from tokenloom.batch import BatchBuilder
from tokenloom.engine.latency_model import Features, LatencyModel


class TrainingProgress(Protocol):
    """How far a job is."""

    step: int
    """Optimizer steps done."""
    last_metrics: dict[str, float]
    """`train_loss` and others of the last step; empty before the first."""


class Training(Protocol):
    """A job that trains in the engine's iterations. All methods are called on the engine's thread.

    Work comes in passes. A pass begins with forward rows, which join the batch of an iteration; pieces of
    loss and backward follow, which run between batches. The caller chooses the size of each.
    """

    rows_run: int
    """Forward rows of finished passes."""

    @property
    def progress(self) -> TrainingProgress: ...

    def slots_needed(self) -> int | None:
        """KV slots that the next pass takes; 0 while one is under way; None when there is nothing to do."""

    def begin_pass(self) -> None:
        """Claim the next pass's memory. Raises OutOfBlocks; nothing is held then."""

    def forward_left(self) -> int:
        """Rows of the pass whose forward is still to come; 0 in the rest of the pass."""

    def forward_features(self, rows: int) -> Features:
        """What the next `rows` rows add to an iteration."""

    def add_rows(self, builder: BatchBuilder, rows: int) -> None:
        """Put the next `rows` rows into a batch; `forward_done` follows when it has run."""

    def forward_done(self, rows: int) -> None: ...

    def piece_rows(self) -> int:
        """Rows of the largest piece that can be run now, above 0 once the forward is done."""

    def piece_features(self, rows: int) -> Features: ...

    def run_piece(self, rows: int) -> None:
        """Run the next piece, at most `rows` rows of it; after the last one the pass is over."""

    def reclaim(self) -> bool:
        """Give back the memory of the pass at hand, which starts over later; False if there is none."""

    def fail(self, error: BaseException) -> None:
        """The job cannot go on; it gives back what it holds, and `slots_needed` is None from now on."""


class Profiler(Protocol):
    """Measures, cell by cell, what a latency model is fitted to."""

    def run_cell(self) -> LatencyModel | None:
        """Time the next cell; the fitted model after the last one."""
