"""The hook at sampling: what a request may do to the logits of its next token.

A method such as a compiled grammar goes into `SamplingParams.processors`; each sequence has a processor of
its own from it. Sequences are always sampled in their true state, also on the walk down a draft's tree, so a
processor sees exactly the tokens that became text, one at a time. It lives as long as its sequence: a
preemption takes the KV away, not the processor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from tokenloom.engine.request import Sequence


class LogitsProcessor(Protocol):
    """Of one sequence. What it raises ends that sequence alone, with the reason "error"."""

    def apply(self, row: Tensor) -> None:
        """Edit the logits `[V]` of the next token in place, before penalties, biases and temperature.

        What is set to -inf cannot be drawn; something must be left.
        """

    def accept(self, token: int) -> bool:
        """`token` became text. Returns whether the answer is complete with it: it ends then, by "stop"."""


class LogitsMethod(Protocol):
    """Makes processors. All requests that hold it share it, so it keeps no state of any of them."""

    def processor(self) -> LogitsProcessor:
        """For one sequence, before its first token."""


def apply_processors(sequence: Sequence, row: Tensor) -> None:
    """Let a sequence's processors edit its logits `[V]`; a failure is left in `sequence.failure`."""
    try:
        for processor in sequence.processors:
            processor.apply(row)
    except Exception as error:  # a method may be anybody's: it takes down its own request only
        sequence.failure = error


def accept_token(sequence: Sequence, token: int) -> bool:
    """Tell a sequence's processors of its next token; whether one of them says that it is the last."""
    if sequence.failure is not None:
        return False
    try:
        return any([processor.accept(token) for processor in sequence.processors])
    except Exception as error:  # as above
        sequence.failure = error
        return False
