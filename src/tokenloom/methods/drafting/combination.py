"""From a spec to a drafting method: parts guess one after another, into one tree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tokenloom.engine.draft import Drafter, DraftPlace, Planned, Tree, Verified
from tokenloom.errors import RequestError
from tokenloom.methods.registry import Entry, parse, spec_of


class Part(Protocol):
    """One method of a spec."""

    order: int
    """Who is asked first. What was found in the text is right more often than what was seen elsewhere."""

    def check(self, engine: Any) -> None:
        """Raise ValueError where this engine cannot run it."""

    def drafter(self, place: DraftPlace) -> Drafter:
        """For one sequence."""


@dataclass(frozen=True)
class Combination:
    """A parsed spec; see `tokenloom.engine.draft.DraftMethod`."""

    named: tuple[tuple[Entry, Part], ...]

    @property
    def spec(self) -> str:
        return "+".join(spec_of(entry, part) for entry, part in self.named)

    def check(self, engine: Any) -> None:
        for entry, part in self.named:
            try:
                part.check(engine)
            except ValueError as error:
                raise RequestError(f"draft: {entry.name}: {error}", param="draft") from error

    def drafter(self, place: DraftPlace) -> Drafter:
        parts = [part for _, part in sorted(self.named, key=lambda named: named[1].order)]
        drafters = [part.drafter(place) for part in parts]
        return drafters[0] if len(drafters) == 1 else Together(drafters)


class Together:
    """Several drafters: each fills what those before it left of the tree."""

    def __init__(self, drafters: list[Drafter]) -> None:
        self.drafters = drafters
        self.fixed = any(drafter.fixed for drafter in drafters)
        self._planned = next((drafter for drafter in drafters if isinstance(drafter, Planned)), None)
        self.wants = max(drafter.wants for drafter in drafters)

    def propose(self, tokens: list[int], most: int) -> Tree:
        return _together([drafter.propose for drafter in self.drafters], tokens, most)

    def glance(self, tokens: list[int], most: int) -> Tree:
        return _together([drafter.glance for drafter in self.drafters], tokens, most)

    def gains(self, most: int) -> list[float]:
        return self._planned.gains(most) if self._planned is not None else []

    def grow(self, tree: Tree, tokens: list[int], rows: int) -> None:
        if self._planned is not None:
            self._planned.grow(tree, tokens, rows)

    def learn(self, verified: Verified) -> None:
        for drafter in self.drafters:
            drafter.learn(verified)

    def close(self) -> None:
        for drafter in self.drafters:
            drafter.close()


def _together(guesses: list[Callable[[list[int], int], Tree]], tokens: list[int], most: int) -> Tree:
    """One tree, which each fills as far as those before have left room."""
    tree = guesses[0](tokens, most)
    for guess in guesses[1:]:
        if tree.num_rows >= most:
            break
        more = guess(tokens, most - tree.num_rows)
        if not len(tree):
            tree = more
            continue
        where = {-1: -1}
        for node, (token, parent, key) in enumerate(zip(more.tokens, more.parents, more.keys, strict=True)):
            where[node] = tree.add(token, where[parent], key)
        if more.vectors is not None:
            tree.vectors = more.vectors
            for node, count in enumerate(more.prompts, -1):
                tree.prompts[1 + where[node]] = count
    return tree


def draft_method(spec: str) -> Combination | None:
    """The drafting method that a spec asks for; None where it asks for nothing.

    Raises:
        RequestError: (param "draft") the spec is wrong, or names a method twice.
    """
    named = tuple(parse(spec, "draft"))
    names = [entry.name for entry, _ in named]
    for name in names:
        if names.count(name) > 1:
            raise RequestError(f"draft: {name} is named twice", param="draft")
    return Combination(named) if named else None
