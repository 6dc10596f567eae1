"""How many guesses are worth verifying: expected tokens against measured time (PPD, arXiv 2405.18628).

PPD chooses one tree size per machine before it serves. Here the choice is made for each pass, over the trees
of all sequences in it, by what was accepted lately and by how long a pass of so many rows takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenloom.engine.draft import Key, Tree

FIRST_RATE = 0.3
"""How often a node is thought to be right before any like it was tried, as if seen in so many trials: """
FIRST_TRIALS = 2.0
ENGINE_TRIALS, SEQUENCE_TRIALS = 512.0, 64.0
"""Counts are halved when they reach this, so that the latest ones weigh most."""
BELIEF = 6.0
"""A sequence's own rates are mixed with the engine's, which weigh as much as so many trials."""
GAIN = 1.03
"""What a draft must promise over none: a guess that is only just worth its time is not."""


class Acceptance:
    """How often nodes were right when their parents were, by key."""

    def __init__(self, most: float, behind: Acceptance | None = None) -> None:
        self._counts: dict[Key, list[float]] = {}
        self._most, self._behind = most, behind

    def rate(self, key: Key) -> float:
        tried, right = self._counts.get(key, (0.0, 0.0))
        if self._behind is None:
            return (right + FIRST_RATE * FIRST_TRIALS) / (tried + FIRST_TRIALS)
        return (right + self._behind.rate(key) * BELIEF) / (tried + BELIEF)

    def count(self, key: Key, right: bool) -> None:
        counts = self._counts.setdefault(key, [0.0, 0.0])
        counts[0] += 1.0
        counts[1] += right
        if counts[0] >= self._most:
            counts[0] /= 2
            counts[1] /= 2
        if self._behind is not None:
            self._behind.count(key, right)


def path_rates(tree: Tree, acceptance: Acceptance) -> list[float]:
    """How likely each node is to become text: the product of the rates on its path."""
    rates: list[float] = []
    for parent, key in zip(tree.parents, tree.keys, strict=True):
        rates.append(acceptance.rate(key) * (rates[parent] if parent >= 0 else 1.0))
    return rates


def most_promising(
    rates: Sequence[Sequence[float]], decodes: int, room: int, time_of: Callable[[int], float]
) -> list[list[int]]:
    """Which nodes to verify, so that most tokens come in a millisecond.

    Args:
        rates: for each tree, of its nodes, how likely they become text; never more than their parents.
        decodes: sequences that get a token in any case.
        room: most nodes, of all trees together.
        time_of: milliseconds of the pass with so many nodes. Where more of them take less time, what lies
            beyond may be missed.

    Returns:
        The chosen nodes of each tree, parents before children; none where guessing would lose.
    """
    # The best n nodes are the n most likely ones: a parent is as likely as its child, and comes first.
    order = sorted((-rate, node, t) for t, tree in enumerate(rates) for node, rate in enumerate(tree))[:room]
    best, speed = 0, GAIN * decodes / time_of(0)
    expected, most = float(decodes), decodes - sum(rate for rate, _, _ in order)
    for n, (rate, _, _) in enumerate(order, 1):
        expected -= rate
        time_ms = time_of(n)
        if expected / time_ms > speed:
            best, speed = n, expected / time_ms
        elif most / time_ms <= speed:
            break  # not even all nodes in the time of these
    chosen: list[list[int]] = [[] for _ in rates]
    for _, node, t in order[:best]:
        chosen[t].append(node)
    return chosen
