"""What a sequence keeps and reads of its keys and values: the hook of KV methods."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from tokenloom.cache.cached_tokens import CachedTokens


class KVPolicy:
    """One sequence's policy; this base reads everything and keeps everything.

    A token's *position* is its place in the text (or what `seen_at` says), its *index* its place in
    the cache; they differ once tokens have been dropped. A policy lives as long as its sequence's keys and
    values: after a preemption a new one starts with the first row.
    """

    holds: int | None = None
    """After the prompt, never more tokens than this are cached, all at positions within the context: an
    answer may be longer than that. None: the cache grows with the answer."""

    heeds_context = False
    """Whether it matters to this policy where the shape's `context_tokens` end."""

    compact = False
    """Whether what `seen_at` says stays within the model's context however long prompt and answer are."""

    last_rows = 1
    """So many rows of the prompt, the last ones, must be computed even where the prefix cache has them."""

    def rows(self, start: int, wanted: int, most: int) -> int:
        """How many of the `wanted` rows from position `start` the next iteration computes, at most `most`."""
        return min(wanted, most)

    def seen_at(self, start: int, rows: int) -> Sequence[int]:
        """Where the model sees tokens at places `start .. start + rows` of the text."""
        return range(start, start + rows)

    def attends(self, start: int, stop: int) -> bool:
        """Whether `attend` must be called for the rows at positions `start .. stop`."""
        return False

    def attend(self, layer: int, q: Tensor, cached: CachedTokens) -> Tensor | None:
        """Attention of this sequence's rows, once their keys and values are stored.

        Args:
            q: `[n, Hq, D]`, after RoPE; the rows are the last n tokens of `cached`.

        Returns:
            `[n, Hq, D]`; None: they read everything before them.
        """
        return None

    def drop(self, cached: CachedTokens) -> None:
        """Free what need not be kept, after an iteration that computed rows of this sequence.

        Where the pool has no block for it, OutOfBlocks passes through; it is asked again before the next row.
        """

    def shared_tokens(self, prompt_tokens: int) -> int:
        """How many tokens from the start have the keys and values that any request in the same namespace
        (`KVMethod.namespace`) would have computed, so that their blocks may be shared."""
        return prompt_tokens

    def fork(self) -> KVPolicy:
        """Another one in the same state, for a sequence that goes on from here on its own."""
        return copy.deepcopy(self)


@dataclass(frozen=True, slots=True)
class SequenceShape:
    """What a policy may know before its sequence begins."""

    prompt_tokens: int
    max_tokens: int
    """Most tokens that follow the prompt."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    model: str = ""
    """The model's name: what was measured of a model once is found by it."""
    max_position: int = 2**31
    """How many positions the model knows."""
    compress_upto: int | None = None
    """What is dropped of the prompt is chosen among so many first tokens, once these are computed, before the
    rest of it is; None: among all, once all are."""

    @property
    def context_tokens(self) -> int:
        """How many tokens of the prompt are computed before anything is dropped of it."""
        return self.prompt_tokens if self.compress_upto is None else self.compress_upto


class KVMethod(Protocol):
    """What a spec such as `snapkv(budget=1024)+pyramid` asks for, with its knobs."""

    @property
    def spec(self) -> str:
        """The spec in full, every knob included."""

    @property
    def namespace(self) -> str | None:
        """What keeps prompt blocks apart from those computed without it; None: they are the same."""

    @property
    def keeps_all(self) -> bool:
        """Whether every token is kept, and read by all that follow."""

    def check(self, max_batch_tokens: int, max_running: int, quantized: bool) -> None:
        """Raise RequestError (param "kv") where an engine with these settings cannot run it."""

    def policy(self, shape: SequenceShape) -> KVPolicy:
        """For one sequence, before its first row.

        Raises:
            RequestError: (param "kv") something that it needs to know about the model is missing. Requests
                are refused for it when they arrive.
        """
