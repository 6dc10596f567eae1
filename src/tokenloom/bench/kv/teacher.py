"""An engine whose requests are told what to say, token by token, and which keeps its logits.

Everything else is the real engine: prompts go through it in chunks, then one row per iteration, and KV
policies see what they see in decoding.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenloom.cache.cached_tokens import CachedTokens
from tokenloom.cache.policy import KVMethod
from tokenloom.config import Settings
from tokenloom.engine.engine import Engine
from tokenloom.engine.outputs import Delta, TokenLogprob
from tokenloom.engine.request import Request, Sequence
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.engine.scheduler import Plan
from tokenloom.errors import RequestError
from tokenloom.models.loader import ModelFiles


@dataclass
class Run:
    """One request, from its prompt to its last token.

    Attributes:
        logits: row i is what predicted token i after the prompt, `[V]` each.
        tokens: the tokens after the prompt.
        step_ms: of each iteration with one row; ttft_ms: until the first token.
        kv_bytes: blocks of the pool in use when token i was predicted: `kv_bytes[0]` is what the prompt left.
        peak_bytes: the most that was in use at any time: the prompt before anything was dropped of it, and
            what was copied then.
        tokens_read: keys that each such row read, a mean over layers and kv heads (what a method reads to
            choose among them is not counted).
    """

    logits: list[Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ttft_ms: float = 0.0
    step_ms: list[float] = field(default_factory=list)
    kv_bytes: list[int] = field(default_factory=list)
    peak_bytes: int = 0
    tokens_read: list[float] = field(default_factory=list)


class TeacherEngine(Engine):
    """Runs one request at a time; see `run`.

    Args:
        reuse_prompts: whether a prompt's keys and values stay in the prefix cache for the next run.
    """

    def __init__(
        self, settings: Settings, files: ModelFiles | None = None, *, reuse_prompts: bool = False
    ) -> None:
        super().__init__(settings, files)
        self.reuse_prompts = reuse_prompts
        self._given: list[int] | None = None
        self._run: Run | None = None
        self._blocks_before = self._most_blocks = 0
        allocate = self.pool.allocate

        def watched(after: int | None = None, room: int = 1) -> int:
            block = allocate(after, room)
            self._most_blocks = max(self._most_blocks, self.pool.num_used)
            return block

        self.pool.allocate = watched  # type: ignore[method-assign]

    def run(
        self, prompt: list[int], given: list[int] | None, method: KVMethod | None = None, new_tokens: int = 0
    ) -> Run:
        """Compute a prompt, then feed it `given`, each token after the row that predicts it.

        Args:
            given: None: the engine's own greedy choice, `new_tokens` times.
            method: what the request's KV method is; None reads and keeps everything.

        Raises:
            RequestError: the engine cannot serve such a request.
        """
        if not self.reuse_prompts:
            self.pool.forget_prefixes()
        count = new_tokens if given is None else len(given)
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        request = Request("teacher", prompt, params, kv=method)
        run = Run()
        self._given, self._run = given, run
        self._blocks_before = self._most_blocks = self.pool.num_used
        self.add(request)
        sequence = request.sequences[0]
        if self.max_output(request) < count:
            self.abort(request.request_id)
            raise RequestError(
                f"a prompt of {len(prompt)} tokens and {count} more do not fit the context of "
                f"{self.context(sequence.policy)} tokens"
            )
        reads = _Reads(sequence, self.config.num_layers, self.config.num_kv_heads)
        start = time.perf_counter()
        try:
            while not request.finished:
                reads.before()
                decodes, began = bool(run.logits), time.perf_counter()
                self.step()
                ended = time.perf_counter()
                if decodes:
                    run.step_ms.append((ended - began) * 1e3)
                    run.tokens_read.append(reads.of_row())
                elif run.logits:
                    run.ttft_ms = (ended - start) * 1e3
        finally:
            self.abort(request.request_id)
            self._given = self._run = None
        run.tokens = sequence.output
        run.peak_bytes = self._bytes_of(self._most_blocks)
        return run

    def _bytes_of(self, blocks: int) -> int:
        return (blocks - self._blocks_before) * (self.kv.num_bytes // self.kv.num_blocks)

    def _write(
        self, plan: Plan, logits: Tensor, sampling: list[Sequence], rows: list[int]
    ) -> dict[Sequence, Delta]:
        if self._run is not None and sampling:
            row = logits[0].clone()
            self._run.logits.append(row if row.dtype == torch.float64 else row.float())
            self._run.kv_bytes.append(
                self._bytes_of(self.pool.num_used)
            )  # the last token's blocks are given back after this
        return super()._write(plan, logits, sampling, rows)

    def _extend(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> Delta:
        if self._given is not None:
            token = self._given[sequence.num_output]
        return super()._extend(sequence, token, logprob)


class _Reads:
    """Counts what one row reads: what its policy chose, and everything in the layers where it did not."""

    def __init__(self, sequence: Sequence, num_layers: int, num_kv_heads: int) -> None:
        self.sequence, self.num_layers, self.num_kv_heads = sequence, num_layers, num_kv_heads
        self.chosen = self.length = self.counted = 0
        policy = sequence.policy
        if policy is not None:
            attend = policy.attend

            def counting(layer: int, q: Tensor, cached: CachedTokens) -> Tensor | None:
                attended = attend(layer, q, cached)
                self.chosen += attended is not None or bool(cached.blocks_apart)
                return attended

            policy.attend = counting  # type: ignore[method-assign]

    def before(self) -> None:
        cached = self.sequence.cached
        self.chosen, self.length = 0, self.sequence.kv_start + 1
        self.counted = 0 if cached is None else cached.tokens_read

    def of_row(self) -> float:
        """Keys read since `before`, by one row: a mean over layers and kv heads."""
        cached = self.sequence.cached
        chosen = 0 if cached is None else cached.tokens_read - self.counted
        everything = (self.num_layers - self.chosen) * self.num_kv_heads * self.length
        return (chosen + everything) / (self.num_layers * self.num_kv_heads)
