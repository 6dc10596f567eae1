"""Token Recycling: the candidates that every pass computes and throws away foretell the next ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from tokenloom.engine.draft import Drafter, DraftPlace, Tree, Verified
from tokenloom.methods.drafting.adjacency import Adjacency, Store
from tokenloom.methods.registry import method

# Children of each node of the paper's tree "2.2.2" (80 nodes, depth 6; official repository), by rank path.
_PAPER80 = {
    "": 8,
    **{"0": 8, "1": 4, "2": 3, "3": 2, "4": 1, "5": 1, "6": 1, "7": 1},
    **{"00": 8, "01": 3, "02": 2, "03": 1, "04": 1, "05": 1, "06": 1, "07": 1, "10": 2, "11": 1},
    **{"20": 1, "30": 1, "40": 1, "50": 1},
    **{"000": 5, "001": 2, "002": 1, "003": 1, "004": 1, "010": 1, "020": 1, "100": 1, "200": 1, "300": 1},
    **{"0000": 3, "0001": 1, "0002": 1, "0010": 1, "0100": 1, "1000": 1},
    **{"00000": 2, "00010": 1},
}
# How often a rank is right, roughly: puts the nodes in order, of which a smaller tree takes the first.
_RANKS = (0.45, 0.15, 0.09, 0.06, 0.05, 0.04, 0.03, 0.02)

Path = tuple[int, ...]


def _in_order(paths: list[Path]) -> list[Path]:
    def likely(path: Path) -> float:
        product = 1.0
        for rank in path:
            product *= _RANKS[rank]
        return product

    return sorted(paths, key=lambda path: (-likely(path), path))


def _paths(children: dict[str, int]) -> list[Path]:
    return [(*map(int, node), rank) for node, count in children.items() for rank in range(count)]


PAPER80 = _in_order(_paths(_PAPER80))
TREES: dict[str, list[Path]] = {
    "auto": PAPER80,
    "paper80": PAPER80,
    **{f"n{count}": PAPER80[:count] for count in (4, 8, 16, 32)},
    "chain4": [(0,) * depth for depth in range(1, 5)],
}


@method(
    "token_recycling",
    hook="draft",
    title="Turning Trash into Treasure: Accelerating Inference with Token Recycling",
    arxiv="2408.08696",
    claim="a table of each token's last candidates grows a tree of guesses, with nothing to train",
)
@dataclass(frozen=True)
class TokenRecycling:
    """Token Recycling (Luo et al., arXiv 2408.08696): a table holds the k most likely successors that each
    token of the vocabulary had when it was last computed. A tree is read off it from the last token; the pass
    that verifies it gives new candidates for every token in it, right or wrong, and they replace the old
    ones.

    Parameters:
        k: candidates of a token.
        tree: auto: of the paper's tree the nodes that are worth their time, pass by pass. Or all of one:
            paper80 (the paper's, 80 nodes, depth 6), n4, n8, n16, n32 (its likeliest nodes), chain4 (first
            candidates, 4 in a row).
        scope: who shares a table: adapter (requests of one adapter), engine, request.
        conflict: whose candidates stay where a token is at several nodes: bfs_last (the deepest, as when
            nodes are written in order), accepted_wins (one that became text).

    A tenant's `cache_salt` keeps its table apart. The paper's table begins with zeros; here empty cells guess
    nothing.
    """

    k: int = 8
    tree: str = "auto"
    scope: str = "adapter"
    conflict: str = "bfs_last"

    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not 1 <= self.k <= 16:
            raise ValueError(f"k is {self.k}; it must be from 1 to 16")
        for knob, values in (
            ("tree", tuple(TREES)),
            ("scope", ("adapter", "engine", "request")),
            ("conflict", ("bfs_last", "accepted_wins")),
        ):
            if getattr(self, knob) not in values:
                raise ValueError(f"{knob} is {getattr(self, knob)!r}; it must be one of {', '.join(values)}")

    def check(self, engine: Any) -> None:
        if self.k > engine.config.vocab_size:
            raise ValueError(f"k is {self.k}, and the vocabulary has {engine.config.vocab_size} tokens")

    def drafter(self, place: DraftPlace) -> Drafter:
        if self.scope == "request":
            return Recycler(self, Adjacency(place.vocab_size, self.k))
        store = place.shared.setdefault("token_recycling", Store())
        return Recycler(self, store.table(place, self.k, self.scope))


@cache
def _steps(tree: str, k: int) -> list[tuple[int, int, tuple[str, int, int]]]:
    """Of each path of a tree: where its parent is (0: the root, then the paths), its last rank, and the key
    of its nodes."""
    paths = [path for path in TREES[tree] if max(path) < k]
    place = {(): 0, **{path: i for i, path in enumerate(paths, 1)}}
    return [(place[path[:-1]], path[-1], ("token_recycling", len(path), path[-1])) for path in paths]


class Recycler:
    """Grows trees off a table, and writes what their rows say into it."""

    def __init__(self, knobs: TokenRecycling, table: Adjacency) -> None:
        self.knobs, self.table = knobs, table
        self.fixed, self.wants = knobs.tree != "auto", knobs.k
        self._steps = _steps(knobs.tree, knobs.k)

    def propose(self, tokens: list[int], most: int) -> Tree:
        tree = Tree()
        known = self.table.successors(tokens[-1])
        if known[0] < 0:
            return tree
        successors = {tokens[-1]: known}
        where: list[int | None] = [-1]  # of the root, then of each path; an empty cell has no children
        for parent_path, rank, key in self._steps[:most]:
            parent = where[parent_path]
            if parent is None:
                where.append(None)
                continue
            last = tree.tokens[parent] if parent >= 0 else tokens[-1]
            if last not in successors:
                successors[last] = self.table.successors(last)
            token = successors[last][rank]
            where.append(tree.add(token, parent, key) if token >= 0 else None)
        return tree

    def glance(self, tokens: list[int], most: int) -> Tree:
        return Tree()  # its guesses are as good as their depth and rank, which weighing them has told

    def learn(self, verified: Verified) -> None:
        if not len(verified.top):
            return
        if len(verified.tokens) == 1:
            self.table.update(verified.tokens, verified.top[:, : self.knobs.k])
            return
        rows = sorted(range(len(verified.tokens)), key=verified.depths.__getitem__)
        if self.knobs.conflict == "accepted_wins":
            accepted = set(verified.accepted)
            rows = [r for r in rows if r not in accepted] + verified.accepted
        self.table.update([verified.tokens[r] for r in rows], verified.top[rows, : self.knobs.k])

    def close(self) -> None:
        self.table.save()
