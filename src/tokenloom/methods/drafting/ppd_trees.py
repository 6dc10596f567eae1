"""PPD's trees: which guesses are verified together, and below which of them prompt tokens hang.

A row of guesses costs time now; a prompt token costs time now and brings guesses in the next pass, if the
candidate that it hangs below wins. For each number of rows the trees here bring most tokens in the long run
(arXiv 2405.18628, section 4; the repository's two-stage pruning).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

Path = tuple[int, ...]
"""Ranks from the root down: (0, 2) is the third guess of the second prompt token below the first guess of the
first."""
Accuracy = tuple[tuple[float, ...], ...]
"""`[S][R]`: how often the guess of rank r of prompt token i is right."""

SIZES = (3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128)
"""Rows besides the known token's for which trees are made."""
_TRIED = 8
"""Numbers of candidates that are tried for a state at a time."""


@dataclass(frozen=True)
class StateTree:
    """What is verified where the last pass left guesses of m prompt tokens.

    Attributes:
        paths: the candidates, likeliest first, every one behind its parent.
        rates: how likely each becomes text.
        prompts: prompt tokens below the root, then below each candidate.
    """

    paths: tuple[Path, ...]
    rates: tuple[float, ...]
    prompts: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Rows besides the root's own."""
        return len(self.paths) + sum(self.prompts)

    @property
    def expected(self) -> float:
        """Candidates that become text, on average: the paper's f."""
        return sum(self.rates)

    def stops(self) -> list[float]:
        """How likely the root, and each candidate, is the last that becomes text."""
        where = {(): 0, **{path: i for i, path in enumerate(self.paths, 1)}}
        left = [1.0, *self.rates]
        for path, rate in zip(self.paths, self.rates, strict=True):
            left[where[path[:-1]]] -= rate
        return left


@dataclass(frozen=True)
class SizedTrees:
    """Trees of one size: `states[m - 1]` where m prompt tokens left guesses, m = 1 .. s.

    `tau` is how many candidates a pass accepts in the long run.
    """

    states: tuple[StateTree, ...]

    @property
    def num_prompts(self) -> int:
        return len(self.states)

    @property
    def num_rows(self) -> int:
        return max(state.num_rows for state in self.states)

    def transitions(self) -> np.ndarray:
        """How likely state m is followed by state n, `[s, s]`."""
        moves = np.zeros((len(self.states), len(self.states)))
        for m, state in enumerate(self.states):
            for prompts, stop in zip(state.prompts, state.stops(), strict=True):
                moves[m, prompts - 1] += stop
        return moves

    @property
    def tau(self) -> float:
        """The mean of the states' expected lengths, weighed by how often each is met."""
        moves = self.transitions()
        count = len(moves)
        # pi P = pi, and pi sums up to 1
        system = np.vstack((moves.T - np.eye(count), np.ones(count)))
        shares = np.linalg.lstsq(system, np.eye(count + 1)[count], rcond=None)[0]
        return float(shares @ [state.expected for state in self.states])


def likely_paths(accuracy: Accuracy, depth: int) -> Iterator[tuple[Path, float]]:
    """Rank paths of at most `depth` ranks, from the likeliest on, with the product of their accuracies."""
    heap: list[tuple[float, Path]] = [(-rate, (rank,)) for rank, rate in enumerate(accuracy[0])]
    heapq.heapify(heap)
    while heap:
        rate, path = heapq.heappop(heap)
        yield path, -rate
        if len(path) < depth:
            for rank, more in enumerate(accuracy[len(path)]):
                heapq.heappush(heap, (rate * more, (*path, rank)))


def build(accuracy: Accuracy, counts: Sequence[int], rows: int) -> SizedTrees | None:
    """Trees with so many candidates in each state, each pruned to `rows` rows.

    Every candidate begins with s = len(counts) prompt tokens; then the one whose loss costs least goes, until
    the rest fits: that of a node v with n prompt tokens costs stop(v) * (f(n) - f(n - 1)). One remains below
    each candidate, and the root keeps all.

    Returns:
        None where that is not enough.
    """
    size = len(counts)
    kept: list[tuple[list[Path], list[float]]] = []
    for m, count in enumerate(counts, 1):
        found = list(zip(range(count), likely_paths(accuracy, m), strict=False))
        kept.append(([path for _, (path, _) in found], [rate for _, (_, rate) in found]))
    worth = [0.0, *(sum(rates) for _, rates in kept)]
    states = []
    for paths, rates in kept:
        prompts = [size] * (1 + len(paths))
        stops = StateTree(tuple(paths), tuple(rates), tuple(prompts)).stops()

        def loss(node: int, prompts: list[int] = prompts, stops: list[float] = stops) -> tuple[float, int]:
            return stops[node] * (worth[prompts[node]] - worth[prompts[node] - 1]), node

        heap = [loss(node) for node in range(1, len(prompts))] if size > 1 else []
        heapq.heapify(heap)
        excess = len(paths) + sum(prompts) - rows
        while excess > 0 and heap:
            _, node = heapq.heappop(heap)
            prompts[node] -= 1
            excess -= 1
            if prompts[node] > 1:
                heapq.heappush(heap, loss(node))
        if excess > 0:
            return None
        states.append(StateTree(tuple(paths), tuple(rates), tuple(prompts)))
    return SizedTrees(tuple(states))


@lru_cache(maxsize=64)
def best(accuracy: Accuracy, rows: int) -> SizedTrees | None:
    """The trees of at most `rows` rows with the largest tau; None where nothing fits."""
    found: SizedTrees | None = None
    for size in range(1, len(accuracy) + 1):
        most = (rows - size) // 2  # each candidate has a prompt token
        if most < 1:
            break
        options = sorted({1 + round(i * (most - 1) / (_TRIED - 1)) for i in range(_TRIED)})
        counts, here = [most] * size, build(accuracy, [most] * size, rows)
        for _ in range(2):  # one state's candidates at a time
            for m in range(size):
                for option in options:
                    tried = [*counts[:m], option, *counts[m + 1 :]]
                    trees = build(accuracy, tried, rows)
                    if trees is not None and (here is None or trees.tau > here.tau):
                        counts, here = tried, trees
        if here is not None and (found is None or here.tau > found.tau):
            found = here
    return found


@lru_cache(maxsize=16)
def gains(accuracy: Accuracy, most: int) -> tuple[float, ...]:
    """What the first, second, ... of at most `most` rows adds to tau, evened out so that it never rises."""
    points = [(0, 0.0)]
    for rows in SIZES:
        trees = best(accuracy, rows) if rows <= most else None
        if trees is not None and trees.tau > points[-1][1]:
            point = (rows, trees.tau)
            while len(points) > 1 and _slope(points[-2], points[-1]) <= _slope(points[-1], point):
                points.pop()
            points.append(point)
    rates: list[float] = []
    for before, after in pairwise(points):
        rates += [_slope(before, after)] * (after[0] - before[0])
    return tuple(rates)


def sized(accuracy: Accuracy, rows: int) -> SizedTrees | None:
    """The trees of the largest of `SIZES` that `rows` rows hold."""
    fitting = [size for size in SIZES if size <= rows]
    return best(accuracy, fitting[-1]) if fitting else None


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
