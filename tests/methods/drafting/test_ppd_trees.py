"""PPD's trees: their size, what they promise, and that they keep it."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from ppd_rig import ACCURACY
from tokenloom.methods.drafting.ppd_trees import (
    SIZES,
    SizedTrees,
    StateTree,
    best,
    build,
    gains,
    likely_paths,
    sized,
)

TABLE = tuple(map(tuple, ACCURACY.tolist()))
SOME = (3, 5, 12, 32, 64)


def trees_of(rows: int) -> SizedTrees:
    found = best(TABLE, rows)
    assert found is not None
    return found


def simulate(trees: SizedTrees, passes: int, seed: int) -> float:
    """Accepted candidates of a pass, if guess r of prompt token i is right as often as the table says."""
    draw = np.random.default_rng(seed)
    ranks = [draw.choice(11, passes, p=[*row, 1 - sum(row)]).tolist() for row in TABLE]
    places = [{(): 0, **{path: i for i, path in enumerate(tree.paths, 1)}} for tree in trees.states]
    state, accepted = trees.num_prompts, 0
    for guesses in zip(*ranks, strict=True):
        where, at = places[state - 1], ()
        while len(at) < len(guesses) and guesses[: len(at) + 1] in where:
            at = guesses[: len(at) + 1]
        accepted += len(at)
        state = trees.states[state - 1].prompts[where[at]]
    return accepted / passes


@pytest.mark.parametrize("rows", SOME)
def test_tau_is_what_a_simulation_of_the_chain_accepts(rows: int) -> None:
    trees = trees_of(rows)
    assert simulate(trees, 150_000, rows) == pytest.approx(trees.tau, rel=0.01)


def test_tau_of_two_states_by_hand() -> None:
    """State 1 has a candidate that is right half the time, with one prompt token; so has state 2, with a
    second one behind it that leaves two. After nothing accepted comes state 2."""
    accuracy = ((0.5, 0.0), (0.5, 0.0))
    one = StateTree(((0,),), (0.5,), (2, 1))
    two = StateTree(((0,), (0, 0)), (0.5, 0.25), (2, 1, 2))
    trees = SizedTrees((one, two))
    assert one.stops() == [0.5, 0.5] and two.stops() == [0.5, 0.25, 0.25]
    # pi1 = pi1 / 2 + pi2 / 4, pi1 + pi2 = 1
    assert trees.tau == pytest.approx(1 / 3 * 0.5 + 2 / 3 * 0.75)
    assert build(accuracy, (1, 2), 8) is not None


@pytest.mark.parametrize("rows", SOME)
def test_trees_hold_together(rows: int) -> None:
    trees = trees_of(rows)
    for m, state in enumerate(trees.states, 1):
        assert state.num_rows == len(state.paths) + sum(state.prompts) <= rows
        assert state.prompts[0] == trees.num_prompts and min(state.prompts) >= 1
        assert max(state.prompts) <= trees.num_prompts and max(map(len, state.paths)) <= m
        for i, path in enumerate(state.paths):
            assert len(path) == 1 or path[:-1] in state.paths[:i]
        assert sum(state.stops()) == pytest.approx(1) and min(state.stops()) > 0


def test_more_rows_promise_more() -> None:
    taus = [trees_of(rows).tau for rows in SIZES]
    assert taus == sorted(taus) and taus[-1] > 1.4 * taus[0]


def test_states_have_trees_of_their_own() -> None:
    """The paper's second claim: one tree for all states, of the same size, accepts less."""
    trees = trees_of(32)
    one = max(
        (build(TABLE, [count] * size, 32) for size, count in product((1, 2, 3), range(1, 16))),
        key=lambda found: found.tau if found is not None else 0.0,
    )
    assert one is not None and trees.tau >= one.tau


def test_paths_come_by_their_products() -> None:
    found = [item for _, item in zip(range(40), likely_paths(TABLE, 2), strict=False)]
    every = {(a,): TABLE[0][a] for a in range(10)} | {
        (a, b): TABLE[0][a] * TABLE[1][b] for a in range(10) for b in range(10)
    }
    expected = sorted(every.values(), reverse=True)[:40]
    assert [rate for _, rate in found] == pytest.approx(expected)
    assert all(rate == pytest.approx(every[path]) for path, rate in found)


def test_the_cheapest_prompt_tokens_go_first() -> None:
    trees = build(TABLE, (2, 4, 6), 20)
    assert trees is not None
    last = trees.states[-1]
    assert last.num_rows == 20
    worth = [0.0, *(state.expected for state in trees.states)]
    stops = last.stops()
    gone = [stops[v] * (worth[n] - worth[n - 1]) for v in range(1, 7) for n in range(last.prompts[v] + 1, 4)]
    left = [stops[v] * (worth[n] - worth[n - 1]) for v in range(1, 7) for n in range(2, last.prompts[v] + 1)]
    assert gone and left and max(gone) <= min(left) + 1e-12


def test_too_few_rows_hold_no_tree() -> None:
    assert build(TABLE, (3,), 6) is None
    assert best(TABLE, 2) is None and sized(TABLE, 2) is None


def test_gains_never_rise_and_add_up_to_tau() -> None:
    rates = gains(TABLE, 64)
    assert len(rates) == 64 and list(rates) == sorted(rates, reverse=True)
    assert sum(rates) == pytest.approx(trees_of(64).tau)


def test_a_size_in_between_takes_the_next_smaller_trees() -> None:
    assert sized(TABLE, 33) == best(TABLE, 32)
