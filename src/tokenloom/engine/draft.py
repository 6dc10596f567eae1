"""Guesses of tokens that the next pass verifies: the hook of drafting methods.

A pass reads all weights for one row as for a few. Tokens that are cheap to guess ride along as rows of their
own; the sampler then walks down the tree of guesses for as long as what it draws was foretold. Every token is
drawn as it would be without guesses, from the same logits with the same random number, so the text is the
same.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

Key = Hashable
GUESSES = 10
"""Most likely tokens that a prompt token's row is asked for (PPD's R)."""


class Tree:
    """Guesses of what follows a sequence's last token.

    Node i holds `tokens[i]` and follows node `parents[i]` < i, or the last token itself (-1). `keys[i]` says
    which nodes are expected to be right as often as this one, such as all of a drafter's depth and rank.

    `prompts[i]` prompt tokens (PPD, arXiv 2405.18628) hang below the last token (0) or node i - 1, one below
    the other: rows whose input is `vectors` `[S, hidden_size]`, from the first on. They are never text; what
    the model says there are guesses for the next pass.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.keys: list[Key] = []
        self.prompts: list[int] = [0]
        self.vectors: Tensor | None = None
        self._nodes: dict[tuple[int, int], int] = {}
        self.children: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_rows(self) -> int:
        """Rows that it takes besides the last token's own."""
        return len(self.tokens) + sum(self.prompts)

    def add(self, token: int, parent: int, key: Key) -> int:
        """The child of `parent` that holds `token`, which becomes a new node if there is none."""
        known = self._nodes.get((parent, token))
        if known is not None:
            return known
        node = self._nodes[parent, token] = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(1 if parent < 0 else self.depths[parent] + 1)
        self.keys.append(key)
        self.prompts.append(0)
        self.children.setdefault(parent, []).append(node)
        return node

    def child(self, parent: int, token: int) -> int | None:
        return self._nodes.get((parent, token))

    def keep(self, nodes: Sequence[int]) -> Tree:
        """The tree of these nodes alone, in this order; every parent comes before its children."""
        kept, where = Tree(), {-1: -1}
        kept.prompts[0], kept.vectors = self.prompts[0], self.vectors
        for node in nodes:
            where[node] = kept.add(self.tokens[node], where[self.parents[node]], self.keys[node])
            kept.prompts[1 + where[node]] = self.prompts[1 + node]
        return kept

    def within(self, rows: int) -> Tree:
        """As much of it as so many rows hold: nodes first, then prompt tokens."""
        if self.num_rows <= rows:
            return self
        kept = self.keep(range(min(rows, len(self))))
        left = rows - len(kept)
        for i, count in enumerate(kept.prompts):
            kept.prompts[i] = min(count, left)
            left -= kept.prompts[i]
        return kept


@dataclass(slots=True)
class Verified:
    """What a pass said about the rows of one draft: the known token first, then the nodes in order.

    Attributes:
        tokens: `[R]`, of the rows. depths: `[R]`, how far each is from the known one.
        accepted: the rows that became text, the first among them.
        top: int64 `[R, k]`, each row's k most likely next tokens, k being what some drafter `wants` at least;
            empty where nobody wants any.
        guesses: int64 `[m, GUESSES]`, most likely at each of the m prompt tokens below the last accepted row.
    """

    tokens: list[int]
    depths: list[int]
    accepted: list[int]
    top: np.ndarray
    guesses: np.ndarray = field(default_factory=lambda: np.empty((0, GUESSES), np.int64))


class Drafter(Protocol):
    """One sequence's drafter."""

    fixed: bool
    """Whether all that it proposes is verified; else only what is worth its time."""
    wants: int
    """How many of the most likely tokens of each row `learn` needs to see."""

    def propose(self, tokens: list[int], most: int) -> Tree:
        """Guess what follows `tokens`, by at most `most` nodes, the likely ones first.

        tokens: prompt and answer so far; since the last call some were added at the end.
        """

    def glance(self, tokens: list[int], most: int) -> Tree:
        """The same while its guesses were not worth their time lately: those alone that may be better than
        the last ones and cost next to nothing to find. An empty tree: it is asked again after a rest."""

    def learn(self, verified: Verified) -> None:
        """What became of the last proposal, of which some nodes, or all, may have been left out. Of passes
        without any it hears now and then."""

    def close(self) -> None:
        """The sequence is over."""


@runtime_checkable
class Planned(Protocol):
    """A drafter whose rows bring tokens only together: its trees are made for their size, and some of their
    rows pay in the next pass."""

    def gains(self, most: int) -> list[float]:
        """Tokens that the first, second, ... row brings in the long run, at most `most`; never rising."""

    def grow(self, tree: Tree, tokens: list[int], rows: int) -> None:
        """Add at most so many rows to a tree of guesses of what follows `tokens`."""


@dataclass(slots=True)
class DraftPlace:
    """Where a drafter works.

    Attributes:
        model: the model's name. vocab_size: of its head.
        scope: what shares knowledge: the adapter's name, and the tenant's salt.
        shared: what drafters keep beyond their sequence, by a key of their own, each with its `num_bytes`; it
            lives as long as the engine.
        home: the folder for what is kept beyond the engine; None: nothing is.
        engine: for drafters that run a model.
    """

    model: str
    vocab_size: int
    scope: tuple[str, str | None]
    shared: dict[Any, Any]
    home: Path | None
    engine: Any


class DraftMethod(Protocol):
    """What a spec such as `token_recycling+ngram` asks for, with its knobs."""

    @property
    def spec(self) -> str:
        """The spec in full, every knob included."""

    def check(self, engine: Any) -> None:
        """Raise RequestError (param "draft") where this engine cannot run it."""

    def drafter(self, place: DraftPlace) -> Drafter:
        """For one sequence, before its first decode."""


@dataclass(slots=True)
class Draft:
    """A tree in the batch, and the walk down it."""

    tree: Tree
    first_batch_row: int = 0
    """Of the batch: the row of the known token."""
    first_row: int = 0
    """Of the batch's logits: the row of the known token; those of the nodes follow."""
    path: list[int] = field(default_factory=list)
    results: list[tuple[Key, bool]] = field(default_factory=list)
    """Of each node whose parent became text: its key, and whether it did too."""

    @property
    def row(self) -> int:
        """Where the walk has come to, as a row of logits."""
        return self.first_row + 1 + self.path[-1] if self.path else self.first_row

    @property
    def prompt_rows(self) -> range:
        """Of the batch: the prompt tokens below where the walk has come to."""
        at = 1 + self.path[-1] if self.path else 0
        first = self.first_batch_row + 1 + len(self.tree) + sum(self.tree.prompts[:at])
        return range(first, first + self.tree.prompts[at])

    def follow(self, token: int) -> bool:
        """Go on to the child that holds the drawn token; False where there is none."""
        at = self.path[-1] if self.path else -1
        right = self.tree.child(at, token)
        self.results += [(self.tree.keys[node], node == right) for node in self.tree.children.get(at, ())]
        if right is not None:
            self.path.append(right)
        return right is not None
