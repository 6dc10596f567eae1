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
    are guessed, or, of the latest few, behind the one before which most agrees.

    A text that repeats itself is foretold for as long as is asked: guesses that run into the end go on with
    what they began with. How many are worth their time is learned by how much of the text agrees: three
    tokens that happen to stand elsewhere say little, the twentieth of a passage that is copied much.

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


AGREEMENT = 16
"""More tokens than these that agree promise no more."""
PLACES = 8
"""Of so many latest places of the longest n-gram the one that agrees most is taken."""


class NgramDrafter:
    """The latest place of every n-gram, and of the longest those before it, as an index that grows with the
    text. A place is where the token behind the n-gram is."""

    wants = 0

    def __init__(self, knobs: Ngram) -> None:
        self.knobs, self.fixed = knobs, knobs.fixed
        self._behind: dict[tuple[int, ...], int] = {}
        self._earlier: dict[int, int] = {}
        self._indexed = 0

    def propose(self, tokens: list[int], most: int) -> Tree:
        self._index(tokens)
        tree, knobs = Tree(), self.knobs
        for size in range(min(knobs.longest, len(tokens) - 1), knobs.shortest - 1, -1):
            at = self._behind.get(tuple(tokens[-size:]))
            if at is None:
                continue
            at, agree = self._best(tokens, at, size)
            period, parent = len(tokens) - at, -1
            for i in range(min(knobs.tokens, most)):
                # Where it is tried, all guesses before it were right.
                parent = tree.add(tokens[at + i % period], parent, ("ngram", min(agree + i, AGREEMENT)))
            break
        return tree

    glance = propose
    """What it finds differs from place to place in the text."""

    def _best(self, tokens: list[int], at: int, size: int) -> tuple[int, int]:
        """Of the latest places of the last `size` tokens the one before which most agree, and how many do."""
        best, most = at, _agreement(tokens, at, size)
        if size < self.knobs.longest:
            return best, most
        for _ in range(PLACES - 1):
            if at not in self._earlier or most == AGREEMENT:
                break
            at = self._earlier[at]
            agree = _agreement(tokens, at, size)
            if agree > most:
                best, most = at, agree
        return best, most

    def _index(self, tokens: list[int]) -> None:
        """Take in all n-grams that something follows."""
        for end in range(max(1, self._indexed), len(tokens)):
            for size in range(self.knobs.shortest, min(self.knobs.longest, end) + 1):
                gram = tuple(tokens[end - size : end])
                if size == self.knobs.longest and gram in self._behind:
                    self._earlier[end] = self._behind[gram]
                self._behind[gram] = end
        self._indexed = len(tokens)

    def learn(self, verified: Verified) -> None:
        """The text is all that it knows."""

    def close(self) -> None:
        """Nothing outlives the sequence."""


def _agreement(tokens: list[int], at: int, known: int) -> int:
    """How many tokens before `at` are those before the end, at most AGREEMENT; the last `known` are."""
    end = len(tokens)
    for n in range(known, min(AGREEMENT, at)):
        if tokens[at - 1 - n] != tokens[end - 1 - n]:
            return n
    return max(known, min(AGREEMENT, at))
