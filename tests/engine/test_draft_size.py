"""How much is guessed: what brings most tokens in a millisecond, and nothing where guessing loses."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenloom.engine.draft import Draft, Tree
from tokenloom.engine.draft_size import GAIN, Acceptance, most_promising, path_rates


@st.composite
def rated_trees(draw: st.DrawFn) -> tuple[Tree, list[float]]:
    """A tree of at most 5 nodes, and how likely each of them becomes text."""
    tree = Tree()
    for token in range(draw(st.integers(0, 5))):
        tree.add(token, draw(st.integers(-1, len(tree) - 1)), token)
    rates: list[float] = []
    for parent in tree.parents:
        own = draw(st.sampled_from([0.0, 0.1, 0.4, 0.7, 1.0]))
        rates.append(own * (rates[parent] if parent >= 0 else 1.0))
    return tree, rates


@settings(max_examples=80, deadline=None)
@given(
    st.lists(rated_trees(), min_size=1, max_size=2), st.integers(1, 4), st.sampled_from([0.0, 0.1, 0.4, 1.0])
)
def test_no_other_choice_of_nodes_is_faster(
    trees: list[tuple[Tree, list[float]]], decodes: int, row_ms: float
) -> None:
    def time_of(n: int) -> float:
        return 1.0 + row_ms * n

    chosen = most_promising([rates for _, rates in trees], decodes, 64, time_of)
    tokens = decodes + sum(rates[i] for (_, rates), nodes in zip(trees, chosen, strict=True) for i in nodes)
    speed = tokens / time_of(sum(map(len, chosen)))
    nodes = [(t, i) for t, (tree, _) in enumerate(trees) for i in range(len(tree))]
    best = max(
        (decodes + sum(trees[t][1][i] for t, i in some)) / time_of(len(some))
        for size in range(len(nodes) + 1)
        for some in itertools.combinations(nodes, size)
    )
    assert speed == pytest.approx(best) or (not any(chosen) and best <= GAIN * decodes)
    for (tree, _), kept in zip(trees, chosen, strict=True):
        assert len(tree.keep(kept)) == len(kept)  # KeyError where a parent is missing


def test_nothing_is_guessed_where_every_row_costs_a_pass() -> None:
    assert most_promising([[0.95, 0.9]], 1, 64, lambda n: 1.0 + n) == [[]]


def test_less_is_guessed_beside_more_sequences() -> None:
    def time_of(n: int) -> float:
        return max(8.0, float(8 + n - 6))  # six rows are free

    alone = most_promising([[0.5] * 9], 1, 64, time_of)
    together = most_promising([[0.5] * 9] * 4, 4, 64, time_of)
    assert len(alone[0]) == 6 and sorted(map(len, together)) == [1, 1, 2, 2]


def test_no_more_rows_than_there_is_room_for() -> None:
    assert sum(map(len, most_promising([[0.9] * 9] * 3, 3, 5, lambda n: 1.0))) == 5


def test_a_nodes_chance_is_the_product_of_its_path() -> None:
    acceptance, tree = Acceptance(64.0), Tree()
    for right in (True, True, False, True):
        acceptance.count("a", right)
    tree.add(1, tree.add(2, -1, "a"), "a")
    a, aa = path_rates(tree, acceptance)
    assert aa == pytest.approx(a * a) and 0.5 < a < 0.75


def test_a_sequences_own_rate_prevails_over_the_engines() -> None:
    engine = Acceptance(512.0)
    for _ in range(100):
        engine.count("a", True)
    own = Acceptance(64.0, engine)
    assert own.rate("a") > 0.95
    for _ in range(30):
        own.count("a", False)
    assert own.rate("a") < 0.3 < engine.rate("a")


def test_old_results_weigh_less() -> None:
    acceptance = Acceptance(16.0)
    for right in [True] * 100 + [False] * 16:
        acceptance.count("a", right)
    assert acceptance.rate("a") < 0.5


def test_a_walk_counts_the_children_of_what_became_text() -> None:
    tree = Tree()
    tree.add(1, -1, "x")
    right = tree.add(2, -1, "y")
    tree.add(3, right, "z")
    draft = Draft(tree, first_row=10)
    assert draft.follow(2) and draft.row == 12
    assert not draft.follow(9) and draft.row == 12
    assert draft.results == [("x", False), ("y", True), ("z", False)]
