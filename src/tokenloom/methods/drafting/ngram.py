"""Prompt lookup: what followed the same few tokens earlier in the text follows them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tokenloom.engine.draft import Drafter, DraftPlace, Tree, Verified
from tokenloom.methods.registry import method


@method(
    "ngram",
    hook="draft",
    title="Prompt lookup decoding",
    claim="copies what followed the last few tokens when they stood earlier in the text",
)
@dataclass(frozen=True)
class Ngram:
    """Prompt lookup (Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding): the last `longest` tokens,
    else fewer, down to `shortest`, are looked for in prompt and answer; the tokens behind the latest place
    are guessed.

    A text that repeats itself is foretold for as long as is asked: guesses that run into the end go on with
    what they began with.

    Parameters:
        tokens: most guesses of a pass (his default).
        longest, shortest: tokens to match.
        fixed: verify all guesses in every pass, worth their time or not.
    """

    tokens: int = 10
    longest: int = 3
    shortest: int = 1
    fixed: bool = False

    order: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= 64:
            raise ValueError(f"tokens is {self.tokens}; it must be from 1 to 64")
        if not 1 <= self.shortest <= self.longest <= 16:
            raise ValueError(
                f"shortest={self.shortest}, longest={self.longest}: 1 <= shortest <= longest <= 16 expected"
            )

    def check(self, engine: Any) -> None:
        """Any engine runs it."""

    def drafter(self, place: DraftPlace) -> Drafter:
        return NgramDrafter(self)


class NgramDrafter:
    """The latest place of every n-gram, as an index that grows with the text."""

    wants = 0

    def __init__(self, knobs: Ngram) -> None:
        self.knobs, self.fixed = knobs, knobs.fixed
        self._behind: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def propose(self, tokens: list[int], most: int) -> Tree:
        self._index(tokens)
        tree, knobs = Tree(), self.knobs
        for size in range(min(knobs.longest, len(tokens) - 1), knobs.shortest - 1, -1):
            at = self._behind.get(tuple(tokens[-size:]))
            if at is None:
                continue
            period, parent = len(tokens) - at, -1
            for i in range(min(knobs.tokens, most)):
                parent = tree.add(tokens[at + i % period], parent, ("ngram", size, i))
            break
        return tree

    glance = propose
    """What it finds differs from place to place in the text."""

    def _index(self, tokens: list[int]) -> None:
        """Take in all n-grams that something follows."""
        for end in range(max(1, self._indexed), len(tokens)):
            for size in range(self.knobs.shortest, min(self.knobs.longest, end) + 1):
                self._behind[tuple(tokens[end - size : end])] = end
        self._indexed = len(tokens)

    def learn(self, verified: Verified) -> None:
        """The text is all that it knows."""

    def close(self) -> None:
        """Nothing outlives the sequence."""
