"""Parallel Prompt Decoding: behind trained prompt tokens the model guesses what comes after the next one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from tokenloom.cache.policy import SequenceShape
from tokenloom.engine.draft import Drafter, DraftPlace, Tree, Verified
from tokenloom.errors import RequestError
from tokenloom.methods.calibration import load, shape_of
from tokenloom.methods.drafting import ppd_trees
from tokenloom.methods.registry import method

FORGET = 0.99
"""What a pass leaves of earlier ones in the record of how good guesses are."""
TRUST = 4.0
"""The accuracies found in training weigh as much as so many accepted tokens."""


@method(
    "ppd",
    hook="draft",
    title="Hardware-Aware Parallel Prompt Decoding for Memory-Efficient Acceleration of LLM Inference",
    arxiv="2405.18628",
    claim="a few trained vectors behind each guess make the frozen model say what comes after it",
)
@dataclass(frozen=True)
class Ppd:
    """Parallel Prompt Decoding (Chen et al., arXiv 2405.18628; the idea is close to BiTA's, arXiv
    2401.12522): S trained vectors, as if they were tokens, follow the last token and every guess. What the
    model says at the i-th is a guess of the token i + 1 ahead, so that the pass that verifies some guesses
    makes the next ones. Its text is the model's own: acceptance is by the sampler's draws, not the paper's
    typical acceptance, which changes the distribution.

    Parameters:
        rows: 0: as many rows as are worth their time, pass by pass. Or verify trees of so many rows, guesses
            and prompt tokens together, in every pass: for experiments.

    `tokenloom train ppd` trains the vectors once for a model; for the default model they come along.
    """

    rows: int = 0

    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.rows and not ppd_trees.SIZES[0] <= self.rows <= ppd_trees.SIZES[-1]:
            raise ValueError(f"rows is {self.rows}; it must be 0, or from {ppd_trees.SIZES[0]} to 128")

    def check(self, engine: Any) -> None:
        self._learned(engine)

    def drafter(self, place: DraftPlace) -> Drafter:
        learned = self._learned(place.engine)
        return Prompter(self, learned, learned.records.setdefault(place.scope[0], Record()))

    @staticmethod
    def _learned(engine: Any) -> Learned:
        """What was trained for this model, read once."""
        shared = engine.drafting.shared
        if "ppd" not in shared:
            shared["ppd"] = _read(engine)
        found: Learned = shared["ppd"]
        return found


@dataclass
class Record:
    """How many guesses became text lately, and how many should have by the accuracies found in training."""

    expected: float = 0.0
    accepted: float = 0.0

    def add(self, expected: float, accepted: float) -> None:
        self.expected += expected
        self.accepted += accepted

    def forget(self, passes: int) -> None:
        """So that what did not pay is tried again some day."""
        self.expected *= FORGET**passes
        self.accepted *= FORGET**passes

    @property
    def skill(self) -> float:
        return (self.accepted + TRUST) / (self.expected + TRUST)


@dataclass
class Learned:
    """The trained vectors `[S, d]` in the engine's type, their accuracies, and how adapters do with them."""

    vectors: Tensor
    accuracy: ppd_trees.Accuracy
    records: dict[str, Record] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return self.vectors.numel() * self.vectors.element_size()


def _read(engine: Any) -> Learned:
    shape: SequenceShape = shape_of(engine, 1)
    try:
        stored = load("ppd", shape, hook="draft", made_by="train")
    except RequestError as error:
        raise ValueError(str(error).removeprefix("draft: ppd ")) from error
    vectors, accuracy = stored["embeddings"], stored["accuracy"]
    if vectors.ndim != 2 or vectors.shape[1] != engine.config.hidden_size or len(vectors) != len(accuracy):
        raise ValueError(
            f"vectors of shape {tuple(vectors.shape)} do not fit a model of width {engine.config.hidden_size}"
        )
    table = tuple(tuple(float(rate) for rate in row) for row in accuracy.tolist())
    ppd_trees.gains(table, ppd_trees.SIZES[-1])  # which takes a moment: here nobody's pass waits for it
    return Learned(vectors.to(engine.device, engine.dtype), table)


def refresh(engine: Any) -> None:
    """Vectors were trained anew: sequences that begin from now on use them."""
    engine.drafting.shared["ppd"] = _read(engine)


class Prompter:
    """One sequence's guesses: those that the last pass left."""

    wants = 0

    def __init__(self, knobs: Ppd, learned: Learned, record: Record) -> None:
        self.knobs, self.learned, self.record = knobs, learned, record
        self.fixed = knobs.rows > 0
        self.guesses = np.empty((0, 0), np.int64)
        """Of each prompt token below the last accepted one, likeliest first."""
        self.length = 0
        """Tokens of the text that they were made for."""
        self._asked_at = self._weighed_at = 0
        self._grown: dict[tuple[int, ...], float] = {}

    def propose(self, tokens: list[int], most: int) -> Tree:
        self._begin(tokens)
        tree = Tree()
        if self.fixed:
            self.grow(tree, tokens, min(self.knobs.rows, most))
        return tree

    def _begin(self, tokens: list[int]) -> None:
        self._asked_at, self._grown = len(tokens), {}

    def glance(self, tokens: list[int], most: int) -> Tree:
        return Tree()  # what its rows bring in the long run does not change from pass to pass

    def gains(self, most: int) -> list[float]:
        # Tokens stand for passes, of which there were no more.
        self.record.forget(self._asked_at - self._weighed_at if self._weighed_at else 1)
        self._weighed_at = self._asked_at
        return [rate * self.record.skill for rate in ppd_trees.gains(self.learned.accuracy, most)]

    def grow(self, tree: Tree, tokens: list[int], rows: int) -> None:
        self._begin(tokens)
        trees = ppd_trees.sized(self.learned.accuracy, rows)
        if trees is None:
            return
        tree.prompts[0], tree.vectors = trees.num_prompts, self.learned.vectors
        known = self.guesses if self.length == len(tokens) else self.guesses[:0]
        state = min(len(known), trees.num_prompts)
        if state == 0:
            return
        chosen = trees.states[state - 1]
        nodes: dict[ppd_trees.Path, int] = {(): -1}
        texts: dict[ppd_trees.Path, tuple[int, ...]] = {(): ()}
        for path, rate, prompts in zip(chosen.paths, chosen.rates, chosen.prompts[1:], strict=True):
            token = int(known[len(path) - 1, path[-1]])
            node = tree.add(token, nodes[path[:-1]], ("ppd", len(path), path[-1]))
            nodes[path], texts[path] = node, (*texts[path[:-1]], token)
            tree.prompts[1 + node] = prompts
            self._grown[texts[path]] = rate

    def learn(self, verified: Verified) -> None:
        text = tuple(verified.tokens[row] for row in verified.accepted[1:])
        if self._grown:
            right = sum(text[:depth] in self._grown for depth in range(1, len(text) + 1))
            self.record.add(sum(self._grown.values()), right)
        self.guesses, self.length = verified.guesses, self._asked_at + len(verified.accepted)

    def close(self) -> None:
        """What it knew of the sequence is of no use to others."""
