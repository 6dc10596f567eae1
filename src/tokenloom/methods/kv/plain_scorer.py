"""From a function that scores tokens to a method that can be named in a spec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenloom.methods.kv.budget import at_least, check_budget, check_window
from tokenloom.methods.kv.parts import Scorer
from tokenloom.methods.registry import method

Score = Callable[[Tensor, Tensor, Tensor], Tensor]


def scorer(
    name: str,
    *,
    budget: int | float = 1024,
    window: int | float = 32,
    sinks: int = 4,
    reads_queries: bool = True,
    title: str = "",
    claim: str = "a scorer of one's own",
    arxiv: str = "",
) -> Callable[[Score], Score]:
    """Register `score(keys, values, queries)` as the scorer `name`; see `Scorer.score` for the shapes.

    Args:
        budget, window, sinks: defaults of its knobs.
        reads_queries: False where `score` does without them: prefill then runs as if there were no policy.
        title, claim, arxiv: what `tokenloom methods` says of it.

    Example:
        >>> @scorer("long_keys", reads_queries=False)
        ... def long_keys(keys, values, queries):
        ...     return keys.norm(dim=-1).t()
        >>> LLM().generate("...", kv="long_keys(budget=256)+pyramid")
    """
    reads, defaults = reads_queries, (budget, window, sinks)

    def register(score: Score) -> Score:
        @method(name, hook="kv", title=title or name, claim=claim, arxiv=arxiv)
        @dataclass(frozen=True)
        class Plain(Scorer):
            """Keeps the prompt's tokens with the highest scores.

            Attributes:
                budget: tokens kept of the prompt by each kv head, or the part of them.
                window, sinks: of which so many (or such a part) are the last, and so many the first.
            """

            budget: int | float = defaults[0]
            window: int | float = defaults[1]
            sinks: int = defaults[2]
            reads_queries = reads

            def __post_init__(self) -> None:
                check_budget(self.budget)
                check_window(self.window)
                at_least(0, sinks=self.sinks)

            def score(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
                return score(keys, values, queries)

        return score

    return register


def from_press(press: Any) -> Score:
    """The score of a kvpress `ScorerPress` that looks at keys and values alone (KnormPress, KeyDiffPress,
    LeverageScorePress, ...), to be registered with `scorer(..., reads_queries=False)`."""

    def score(keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        batched = (part.transpose(0, 1)[None] for part in (keys, values))  # [1, Hk, n, D]
        return press.score(None, None, *batched, None, {})[0]

    return score
