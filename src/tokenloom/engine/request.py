"""A request, the sequences that answer it, and the part of their text that may be shown."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from tokenloom.cache.block_pool import BlockPool
from tokenloom.cache.block_table import BlockTable, block_digest, root_digest
from tokenloom.cache.cached_tokens import CachedTokens, CosSin
from tokenloom.cache.kv_cache import KVCache
from tokenloom.cache.policy import KVMethod, KVPolicy, SequenceShape
from tokenloom.engine.adapters import LoadedAdapter
from tokenloom.engine.draft import DraftMethod
from tokenloom.engine.outputs import DraftCounts, FinishReason, TokenLogprob
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.kernels import Kernels
from tokenloom.models.config import ModelConfig
from tokenloom.text.detokenizer import Detokenizer

if TYPE_CHECKING:
    from tokenloom.engine.drafting import Guessing


@dataclass(eq=False)
class Request:
    """What was asked. `sequences[0]` computes the prompt; the others fork from it (`params.n` in all)."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    kind: Literal["generate", "embed"] = "generate"
    priority: int = 0
    cache_salt: str | None = None
    adapter: LoadedAdapter | None = None
    kv: KVMethod | None = None
    draft: DraftMethod | None = None
    compress_upto: int | None = None
    """So many first tokens of the prompt are what `kv` compresses, before the others are computed."""
    arrival_s: float = field(default_factory=time.monotonic)

    sequences: list[Sequence] = field(default_factory=list)
    seed: int = 0
    forked: bool = False
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    hidden_sum: torch.Tensor | None = None
    scheduled_s: float | None = None
    first_token_s: float | None = None
    drafts: DraftCounts = field(default_factory=DraftCounts)

    def __post_init__(self) -> None:
        self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    @property
    def reads_prompt_rows(self) -> bool:
        """Whether every prompt row must be computed, so that cached KV cannot stand in for it."""
        return self.kind == "embed" or self.prompt_logprobs is not None

    def shape(self, config: ModelConfig, model: str) -> SequenceShape:
        """What a KV policy may know of this request's sequences, and of the model that answers it."""
        most = self.params.max_tokens
        return SequenceShape(
            len(self.prompt),
            max(0, config.max_position - len(self.prompt)) if most is None else most,
            config.num_layers,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            model,
            config.max_position,
            self.compress_upto,
        )

    @property
    def finished(self) -> bool:
        return bool(self.sequences) and all(s.finish_reason for s in self.sequences)


class Sequence:
    """One answer being written: its tokens so far, its KV, and the text that was not shown yet.

    `num_computed` tokens have their KV in the table; the rest wait to be rows of a batch. A sequence in
    decode has exactly one such token, one in prefill (or after a preemption) many.
    """

    def __init__(self, request: Request, index: int, pool: BlockPool, detokenizer: Detokenizer) -> None:
        self.request = request
        self.index = index
        self.tokens = list(request.prompt)
        self.table = BlockTable(pool)
        self.num_computed = 0
        self.digests: list[bytes] = []
        adapter = request.adapter
        name, version = (adapter.name, adapter.version) if adapter is not None else ("", 0)
        namespace = request.kv.namespace if request.kv is not None else None
        self.root = root_digest(name, version, request.cache_salt, namespace)
        self.shape: SequenceShape | None = None
        self.policy: KVPolicy | None = None
        self.cached: CachedTokens | None = None
        self.owes_drop = False
        """Its policy could not let go of what will not be read again, for want of a block."""
        self.guessing: Guessing | None = None
        self.processors = [method.processor() for method in request.params.processors]
        self.failure: Exception | None = None
        """What a processor raised: the sequence ends before its next token."""
        self.text = StopText(request.params, detokenizer)
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.last_token_s = request.arrival_s

    @property
    def generates(self) -> bool:
        """Whether there is a token to be sampled once all others are computed."""
        return self.request.kind == "generate" and self.request.params.max_tokens != 0

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_pending(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def kv_start(self) -> int:
        """Index in the table of the next token to compute: its position, less what was dropped."""
        return self.num_computed - (self.cached.dropped if self.cached is not None else 0)

    @property
    def most_cached(self) -> int:
        """How many tokens must fit into the pool at a time for all of them to be computed."""
        most = len(self.tokens)
        if self.policy is not None and self.policy.holds is not None:
            most = min(most, max(len(self.request.prompt), self.policy.holds) + 1)
        return most

    @property
    def blocks(self) -> list[int]:
        """Every block that holds something of this sequence."""
        return self.table.blocks + (self.cached.blocks_apart if self.cached is not None else [])

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    def digest(self, block: int) -> bytes:
        """Digest of full block number `block` of this sequence and all that precedes it."""
        size = self.table.pool.block_size
        while len(self.digests) <= block:
            i = len(self.digests)
            parent = self.digests[-1] if self.digests else self.root
            self.digests.append(block_digest(parent, self.tokens[i * size : (i + 1) * size]))
        return self.digests[block]

    def num_cached(self) -> int:
        """Tokens from the front whose blocks the prefix cache has, as far as `match_prefix` would look."""
        pool, blocks = self.table.pool, range(self._matchable_blocks)
        return next((i for i in blocks if not pool.holds(self.digest(i))), len(blocks)) * pool.block_size

    def cold_digests(self, most: int) -> Iterator[bytes]:
        """The first digests, at most so many, that `match_prefix` would find in the tier."""
        pool, found = self.table.pool, 0
        for i in range(self._matchable_blocks):
            digest = self.digest(i)
            if found == most or not pool.holds(digest):
                return
            if not pool.is_resident(digest):
                found += 1
                yield digest

    @property
    def _matchable_blocks(self) -> int:
        """Full blocks that need not be computed: at least one token must be, and what the policy asks for."""
        most = len(self.tokens) - 1
        if self.policy is not None:
            most = min(most, len(self.request.prompt) - self.policy.last_rows)
        return max(0, most) // self.table.pool.block_size

    def match_prefix(self) -> int:
        """Adopt cached blocks from the front, leaving at least one token to compute; tokens adopted.

        Those that only the tier has come back if there is room for the whole sequence; it may be called again
        when there is.
        """
        pool, table, length = self.table.pool, self.table, len(self.tokens)
        room = -(-(length + (self.request.params.max_tokens or 0)) // pool.block_size)
        for i in range(len(table.blocks), self._matchable_blocks):
            block = pool.lookup(self.digest(i))
            if block is None and table.missing(length) <= pool.num_available:
                block = pool.restore(self.digest(i), table.blocks[-1] if table.blocks else None, room)
            if block is None:
                break
            table.adopt(block)
        if self.policy is not None:
            # Neither a part of what the policy computes together, nor a part of a block.
            tokens = len(self.table.blocks) * pool.block_size
            while (shared := self.policy.shared_tokens(tokens)) < tokens:
                tokens = shared // pool.block_size * pool.block_size
            self.table.cut(tokens // pool.block_size)
        self.num_computed = len(self.table.blocks) * pool.block_size
        return self.num_computed

    def publish_blocks(self, computed_before: int) -> None:
        """Index the blocks that became full since `computed_before` tokens were computed."""
        size, end = self.table.pool.block_size, self.num_computed
        if self.policy is not None:
            end = min(end, self.policy.shared_tokens(len(self.request.prompt)))
        for i in range(computed_before // size, end // size):
            self.table.pool.publish(self.table.blocks[i], self.digest(i))

    def govern(self, kv: KVCache, kernels: Kernels, shape: SequenceShape, cos_sin: CosSin) -> None:
        """Put the sequence under its request's KV method, before its first row."""
        if self.request.kv is not None:
            self.shape = shape
            self.policy = self.request.kv.policy(shape)
            self.cached = CachedTokens(kv, self.table, kernels, cos_sin)

    def release_kv(self) -> None:
        """Give all blocks back."""
        if self.cached is not None:
            self.cached.clear()
        self.table.clear()
        self.num_computed = 0
        self.owes_drop = False

    @torch.inference_mode()
    def drop_tokens(self) -> None:
        """Let the policy free what will not be read again.

        Raises:
            OutOfBlocks: it needs more first; nothing has changed. No row may be computed before it is done:
                it would read more than it does where there is room.
        """
        if self.policy is not None and self.cached is not None:
            self.owes_drop = True
            self.policy.drop(self.cached)
            self.owes_drop = False

    def restart_kv(self) -> None:
        """Give all blocks back; every token waits to be computed again, under a policy that knows nothing."""
        self.release_kv()
        if self.request.kv is not None and self.shape is not None:
            self.policy = self.request.kv.policy(self.shape)

    def fork(self, index: int, detokenizer: Detokenizer) -> Sequence:
        """A sibling that shares the KV of everything computed so far."""
        other = Sequence(self.request, index, self.table.pool, detokenizer)
        other.table = self.table.fork()
        other.num_computed = self.num_computed
        other.digests = list(self.digests)
        if self.policy is not None and self.cached is not None:
            other.shape, other.policy = self.shape, self.policy.fork()
            other.cached, other.owes_drop = self.cached.fork(other.table), self.owes_drop
        return other


class StopText:
    """Turns tokens into text that is safe to show.

    Characters are held back while they are incomplete or could still be the beginning of a stop string.
    """

    def __init__(self, params: SamplingParams, detokenizer: Detokenizer) -> None:
        self.stops = tuple(params.stop)
        self.include_stop = params.include_stop
        self.min_tokens = params.min_tokens
        self.detokenizer = detokenizer
        self.held = ""

    def push(self, token: int, num_output: int) -> tuple[str, str | None]:
        """Add one token; returns the text that may be shown now, and the stop string it completed."""
        new = self.detokenizer.push((token,))
        if not self.stops:
            return new, None
        text = self.held + new
        if num_output >= self.min_tokens:
            hits = [(text.find(stop), -len(stop), stop) for stop in self.stops if stop in text]
            if hits:
                at, _, stop = min(hits)
                self.held = ""
                return text[: at + len(stop) if self.include_stop else at], stop
        keep = max(_overlap(text, stop) for stop in self.stops)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def finish(self) -> str:
        """What is still held back, when no more tokens come."""
        rest = self.held + self.detokenizer.finish()
        self.held = ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
