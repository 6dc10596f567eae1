"""What a spec for the KV cache is put together from. A method is a dataclass that is one of these parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from tokenloom.cache.policy import KVPolicy, SequenceShape


class Part(ABC):
    """A method's knobs; at most one part of each role goes into a spec, unless they `join`."""

    role: ClassVar[str]
    conflicts: ClassVar[Mapping[str, str]] = {}
    """Roles that it excludes beside those that its own role does, and why."""

    def join(self, other: Part) -> Part | None:
        """One part that does what both do, where they have the same role; None: they exclude each other."""
        return None

    def excludes(self) -> Mapping[str, str]:
        """`conflicts`, for those whose knobs decide."""
        return self.conflicts

    def check(self, max_batch_tokens: int, max_running: int, quantized: bool) -> None:
        """Raise ValueError where an engine with these settings cannot run it."""
        return

    @property
    def changes_prompt(self) -> bool:
        """Whether keys and values of the prompt come out different from those of plain attention."""
        return False


class Scorer(Part):
    """Says once, when the prompt has been computed, which of its tokens are worth keeping."""

    role = "scorer"
    budget: int | float
    """Tokens kept of the prompt by each kv head, or the part of them."""
    window: int | float
    """The last tokens of the prompt, or the part of the budget that they are: always kept, and their queries
    are at hand when scores are computed."""
    sinks: int = 0
    """The first tokens, which are always kept."""
    reads_queries = True
    """Whether `score` looks at queries: if not, prefill runs as if there were no policy."""

    @abstractmethod
    def score(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        """How much each token is worth to each kv head; larger is kept. Called for one layer at a time.

        Args:
            keys, values: `[n, Hk, D]`, the whole prompt's; keys after RoPE.
            queries: `[window, Hq, D]`, after RoPE, of the last tokens (`[0, Hq, D]` unless `reads_queries`).

        Returns:
            `[Hk, n]`; what it says of the first `sinks` and the last `window` tokens does not count.
        """

    def score_layer(self, layer: int, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        """`score`, for those to whom it matters which layer this is."""
        return self.score(keys, values, queries)


class LayerBudget(Part):
    """Spreads the budget over layers."""

    role = "layer budget"

    @abstractmethod
    def spread(self, budget: int, window: int, prompt_tokens: int, num_layers: int) -> list[int]:
        """Tokens that each layer keeps; their mean is at most `budget`."""


class HeadBudget(Part):
    """Spreads a layer's budget over its heads."""

    role = "head budget"

    @abstractmethod
    def choose(self, scores: Tensor, count: int) -> list[Tensor]:
        """Tokens that each kv head keeps, ascending, `Hk * count` in all, by scores `[Hk, n]`."""


class Merger(Part):
    """Changes the values of what is kept by those of what is dropped."""

    role = "merger"

    @abstractmethod
    def merge(self, keys: Tensor, values: Tensor, kept: Tensor) -> Tensor:
        """New values `[k, D]` of one head's kept tokens `[k]`, ascending; keys, values `[n, D]`."""


class Evictor(Part):
    """Drops tokens all along, by a policy of its own."""

    role = "evictor"

    @abstractmethod
    def policy(self, shape: SequenceShape) -> KVPolicy:
        """For one sequence, before its first row."""


class Selector(Part):
    """Reads few of the cached tokens and drops none."""

    role = "selector"

    @abstractmethod
    def policy(self, shape: SequenceShape) -> KVPolicy:
        """For one sequence, before its first row."""


class Prefill(Part):
    """Chooses what rows of the prompt read; beside it, others choose for the rows that follow."""

    role = "prefill"

    @abstractmethod
    def policy(self, shape: SequenceShape) -> KVPolicy:
        """For one sequence, before its first row."""


class Storage(Part):
    """How all keys and values of the pool are stored."""

    role = "storage"


class Packer(Part):
    """Stores a sequence's older tokens by a codec, in memory of their own."""

    role = "codec"
    conflicts: ClassVar[Mapping[str, str]] = {
        "storage": "the pool's 8 bits are a codec already, and to round twice only adds to the error",
        "evictor": "an evictor goes on dropping tokens one by one, and packed ones are written once",
        "selector": "a selector reads single tokens, and packed ones are decoded all together",
        "prefill": "both govern the rows of the prompt, and what is packed then has not been tried",
        "layer budget": "packed tokens are the same number in every layer",
        "head budget": "packed tokens are the same number in every head",
    }

    def check(self, max_batch_tokens: int, max_running: int, quantized: bool) -> None:
        if quantized:
            raise ValueError("the server's cache is in 8 bits (cache.dtype=int8); codecs need a plain one")

    @abstractmethod
    def policy(self, shape: SequenceShape) -> KVPolicy:
        """For one sequence, before its first row."""
