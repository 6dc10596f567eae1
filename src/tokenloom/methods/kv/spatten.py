"""SpAtten: tokens, heads, values and low bits that attention can do without; four switches of one policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from tokenloom.cache.policy import KVPolicy, SequenceShape
from tokenloom.methods.kv.budget import at_least, one_of, part
from tokenloom.methods.kv.parts import Part, Selector
from tokenloom.methods.kv.spatten_policy import SpAtten
from tokenloom.methods.registry import method

_TITLE = "SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning"
_ARXIV = "2012.09852"


class Switch(Selector):
    """One of the four; those of a spec make one policy. All of them act on rows after the prompt."""

    kind: ClassVar[str]

    @property
    def switches(self) -> tuple[Switch, ...]:
        return (self,)

    def join(self, other: Part) -> Part | None:
        if not isinstance(other, Switch):
            return None
        both = self.switches + other.switches
        return Switches(both) if len({switch.kind for switch in both}) == len(both) else None

    def policy(self, shape: SequenceShape) -> KVPolicy:
        knobs: dict[str, Any] = {switch.kind: switch for switch in self.switches}
        return SpAtten(shape, **knobs)


@dataclass(frozen=True)
class Switches(Switch):
    """Several of them, each of another kind."""

    several: tuple[Switch, ...]

    @property
    def switches(self) -> tuple[Switch, ...]:
        return self.several


@dataclass(frozen=True)
class Ramp:
    """How much of something each layer prunes (Section III-A): first nothing, then from r_start to r_end."""

    r_start: float
    r_end: float
    skip_front: float

    def __post_init__(self) -> None:
        part(r_start=self.r_start, r_end=self.r_end, skip_front=self.skip_front)
        if self.r_end < self.r_start:
            raise ValueError(f"r_end must be at least r_start={self.r_start}, not {self.r_end}")

    def keep(self, layer: int, num_layers: int, count: int) -> int:
        """How many of `count` that leaves in a layer, at least one."""
        front = int(self.skip_front * num_layers)
        if layer < front:
            return count
        ratio = self.r_start + (self.r_end - self.r_start) * (layer - front) / max(1, num_layers - 1 - front)
        return max(1, int(count * (1 - ratio) + 1e-9))


class Cascade(Switch):
    """What prunes by a ramp over the layers."""

    r_start: float
    r_end: float
    skip_front: float

    @property
    def ramp(self) -> Ramp:
        return Ramp(self.r_start, self.r_end, self.skip_front)


@method(
    "spatten_token",
    hook="kv",
    title=f"{_TITLE}: cascade token pruning",
    arxiv=_ARXIV,
    claim="tokens that got little attention in all layers so far are not read by deeper ones",
)
@dataclass(frozen=True)
class SpAttenToken(Cascade):
    """Sums the attention that tokens get over heads, layers and rows; each layer reads the best of those that
    the one before it read (Section III-A). Nothing is dropped: the next row starts from all of them.

    Attributes:
        r_start, r_end: the part pruned in the first layer that prunes, and in the last.
        skip_front: the part of the layers that read everything.
        protect_sink, protect_recent: so many first and last tokens are always read; the paper's are 0.
        row_norm: divide what a prompt's rows pay a token by how many could see it; the paper does not.
        score_rows: so many last rows of the prompt are summed over; 0: all. Those must be computed even where
            the prefix cache has their keys, and cost a second attention.
    """

    r_start: float = 0.2
    r_end: float = 0.8
    skip_front: float = 0.15
    protect_sink: int = 4
    protect_recent: int = 32
    row_norm: bool = True
    score_rows: int = 0
    kind = "token"
    conflicts: ClassVar[Mapping[str, str]] = {
        "scorer": "it sums importance by token, and the scorer's heads keep different ones"
    }

    def __post_init__(self) -> None:
        at_least(0, protect_sink=self.protect_sink, score_rows=self.score_rows)
        at_least(1, protect_recent=self.protect_recent)
        _ = self.ramp


@method(
    "spatten_head",
    hook="kv",
    title=f"{_TITLE}: cascade head pruning",
    arxiv=_ARXIV,
    claim="heads whose number gave little output in all layers so far are silent in deeper ones",
)
@dataclass(frozen=True)
class SpAttenHead(Cascade):
    """Sums |output| of heads by their number over layers and rows; each layer hears the loudest of those that
    the one before it heard (Section III-A). A kv head's tokens are read while one of its group is heard.

    Attributes:
        r_start, r_end: the part pruned in the first layer that prunes, and in the last.
        skip_front: the part of the layers that hear all heads.
        score_rows: so many last rows of the prompt are summed over.
    """

    r_start: float = 0.0
    r_end: float = 0.2
    skip_front: float = 0.3
    score_rows: int = 32
    kind = "head"

    def __post_init__(self) -> None:
        at_least(1, score_rows=self.score_rows)
        _ = self.ramp


@method(
    "spatten_local_v",
    hook="kv",
    title=f"{_TITLE}: local value pruning",
    arxiv=_ARXIV,
    claim="values that a row hardly attends to are not read",
)
@dataclass(frozen=True)
class SpAttenLocalV(Switch):
    """Each head reads the values of the `keep` largest probabilities, which stay as they are (Section III-C).

    Attributes:
        keep: the part of the values read.
    """

    keep: float = 0.5
    kind = "local_v"

    def __post_init__(self) -> None:
        part(keep=self.keep)


@method(
    "spatten_pq",
    hook="kv",
    title=f"{_TITLE}: progressive quantisation",
    arxiv=_ARXIV,
    claim="keys' high bits are read first, their low bits only where no token stands out",
)
@dataclass(frozen=True)
class SpAttenPQ(Switch):
    """Computes probabilities from keys of `hi` bits, and again from all bits in heads where none of them
    reaches `threshold` (Section III-D). The planes lie beside the pool's own keys: this shows what is read
    and what it does to answers, and saves no memory.

    Attributes:
        hi, lo: bits of the two planes.
        threshold: 0: low bits are never read; above 1: always.
        exclude_sinks: so many first tokens do not count for the threshold: they attract attention everywhere.
        steps: block: a channel's keys share a step for 16 tokens. tensor: all of a layer's share one.
    """

    hi: int = 8
    lo: int = 4
    threshold: float = 0.1
    exclude_sinks: int = 4
    steps: str = "block"
    kind = "pq"

    def __post_init__(self) -> None:
        at_least(2, hi=self.hi)
        at_least(0, lo=self.lo, threshold=self.threshold, exclude_sinks=self.exclude_sinks)
        one_of(("block", "tensor"), steps=self.steps)
        if self.hi + self.lo > 16:
            raise ValueError(f"hi + lo must be at most 16, not {self.hi + self.lo}")
