"""The loop. `Engine.step()` is the table of contents of the whole system."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Protocol

import torch
from torch import Tensor

from tokenloom.batch import Batch
from tokenloom.cache.block_pool import BlockPool, OutOfBlocks
from tokenloom.cache.kv_cache import KVCache
from tokenloom.cache.policy import KVPolicy
from tokenloom.cache.tier import open_tier
from tokenloom.config import Settings
from tokenloom.engine.adapters import AdapterRegistry
from tokenloom.engine.build import build_batch
from tokenloom.engine.coserve import Coserver
from tokenloom.engine.drafting import Drafting
from tokenloom.engine.logits_processor import accept_token
from tokenloom.engine.outputs import Delta, FinishReason, StepOutput, TokenLogprob
from tokenloom.engine.prompt_rows import read_prompt_rows
from tokenloom.engine.publish import publish
from tokenloom.engine.request import Request, Sequence
from tokenloom.engine.sampler import sample_each
from tokenloom.engine.scheduler import Plan, Scheduler
from tokenloom.engine.setup import allocate_kv, choose_device, choose_dtype, choose_quantize
from tokenloom.engine.stats import EngineStats, RequestTiming
from tokenloom.engine.validation import validate
from tokenloom.errors import RequestError
from tokenloom.heap import keep_freed_memory, release_freed_memory
from tokenloom.kernels import get_kernels
from tokenloom.models.decoder import Decoder
from tokenloom.models.loader import ModelFiles, open_model
from tokenloom.models.weight_loader import WeightLoader
from tokenloom.text.detokenizer import Detokenizer


class PhaseTimer(Protocol):
    """Times the named phases of a step; see `tokenloom.bench.profile`."""

    def __call__(self, phase: str) -> AbstractContextManager[None]: ...


def _untimed(phase: str) -> AbstractContextManager[None]:
    return nullcontext()


class Engine:
    """One model, its KV pool, and the requests that it is answering. Not thread-safe: see `AsyncEngine`.

    Args:
        settings: the whole settings tree; `model`, `cache` and `scheduler` are read here.
        files: the opened model, or None to open `settings.model.name`.

    Raises:
        ModelError: the model cannot be found, read or held in memory.
        ConfigError: the second tier of the cache cannot be where it should.
    """

    def __init__(self, settings: Settings, files: ModelFiles | None = None) -> None:
        self.settings = settings
        files = files or open_model(settings.model.name)
        self.name = files.name
        self.config = files.config
        self.tokenizer = files.tokenizer
        self.device = choose_device(settings.model.device)
        self.dtype = choose_dtype(settings.model.dtype, files.config.dtype, self.device)
        if settings.model.threads:
            torch.set_num_threads(settings.model.threads)
        kernels = get_kernels(settings.model.backend, self.device)
        quantize = choose_quantize(settings.model.quantize, kernels, self.dtype)
        load = WeightLoader(files.weights, self.dtype, self.device, quantize)
        self.decoder = Decoder(files.config, load, kernels)
        release_freed_memory()
        keep_freed_memory()
        self.max_model_len = min(
            files.config.max_position, settings.model.max_model_len or files.config.max_position
        )
        self.adapters = AdapterRegistry(settings.adapters.max_loaded)
        self.end_tokens = files.config.eos_token_ids
        self.counters = EngineStats()
        self.timer: PhaseTimer = _untimed
        self.on_fault: Callable[[Sequence, Exception], None] = _raise
        """What a fault of one sequence alone comes to."""
        self.begin(allocate_kv(self.config, settings.cache, self.dtype, self.device, self.max_model_len))

    def begin(self, kv: KVCache) -> None:
        """Start from nothing, with no request and nothing cached, on this memory."""
        settings = self.settings
        self.kv = kv
        self.pool = BlockPool(kv.num_blocks, kv.block_size)
        self.pool.tier = open_tier(settings.cache, kv)
        self.scheduler = Scheduler(
            settings.scheduler,
            self.pool,
            prefix_caching=settings.cache.prefix_caching,
            copy_block=kv.copy_block,
        )
        self.coserver = Coserver(settings, self.scheduler, self.pool, self.decoder, kv)
        self.requests: dict[str, Request] = {}
        self.under_way: tuple[Plan, int] | None = None
        """The pass that the weights are computing, and its rows of training: nothing is changed by it yet."""
        self.drafting = Drafting(self)

    # -- requests ---------------------------------------------------------------------------------------

    def validate(self, request: Request) -> None:
        """Refuse what can never be served.

        Raises:
            RequestError: naming the field, with the numbers.
        """
        validate(self, request)

    def add(self, request: Request) -> None:
        """Queue a request. It is worked on from the next step.

        Raises:
            RequestError: see `validate`; or the id is in use.
        """
        self.validate(request)
        if request.request_id in self.requests:
            raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
        leader = self.new_sequence(request, 0)
        request.sequences = [leader]
        self.requests[request.request_id] = request
        self.scheduler.add(leader)
        self.counters.prompt_tokens += len(request.prompt)

    def new_sequence(self, request: Request, index: int) -> Sequence:
        """A choice of a request, of which nothing is computed."""
        sequence = Sequence(request, index, self.pool, self._detokenizer(request))
        shape = request.shape(self.config, self.name)
        sequence.govern(self.kv, self.decoder.kernels, shape, self.decoder.rope.cos_sin)
        return sequence

    def abort(self, request_id: str) -> StepOutput | None:
        """End a request now and free what it holds; None if it is not known (any more)."""
        return self.fail(request_id, "abort", None)

    def fail(self, request_id: str, reason: FinishReason, error: str | None) -> StepOutput | None:
        """End a request for a reason of ours; choices that were finished already stay as they were."""
        request = self.requests.get(request_id)
        if request is None:
            return None
        deltas = []
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                self.finish(sequence, reason)
                deltas.append(Delta(sequence.index, "", [], finish_reason=reason, error=error))
        deltas += [
            Delta(i, "", [], finish_reason=reason, error=error)
            for i in range(len(request.sequences), request.params.n)
        ]
        self.forget(request)
        return StepOutput(request_id, deltas, finished=True, cached_tokens=request.cached_tokens)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self.coserver.has_work

    # -- one iteration ----------------------------------------------------------------------------------

    def step(self) -> list[StepOutput]:
        """Run one iteration: every decode gets a token, prompts go on by a chunk, and training fills what
        the latency targets leave."""
        with self.timer("schedule"):
            plan = self.scheduler.schedule()
            self.drafting.plan(plan)
        with self.timer("train"):
            train_rows = self.coserver.before(plan)
        if not plan.rows and not train_rows:
            self.coserver.no_batch()
            return []
        return self.run_pass(plan, train_rows)

    def run_pass(self, plan: Plan, train_rows: int) -> list[StepOutput]:
        """One pass over the weights, and what comes of it. If it fails while `under_way`, run it again."""
        start = time.monotonic()
        self.under_way = plan, train_rows
        with self.timer("build"):
            batch = build_batch(self, plan, train_rows)
        with self.timer("layers"):
            hidden = self.decoder.forward(batch, self.kv)
        with self.timer("head"):
            logits = self.decoder.logits(hidden[batch.logits_rows]) if len(batch.logits_rows) else hidden
        self.under_way = None
        ready = self._advance(plan, batch, hidden)
        with self.timer("sample"):
            gains = self._write(plan, logits, *self._fork(plan, ready))
        took_ms = (time.monotonic() - start) * 1e3
        self.coserver.after(train_rows, took_ms)
        with self.timer("publish"):
            if plan.drafts:
                self.drafting.settle(plan, logits, hidden, None if train_rows else took_ms)
            return publish(self, ready, gains)

    def _advance(self, plan: Plan, batch: Batch, hidden: Tensor) -> list[Sequence]:
        """Account for the rows just computed; returns the sequences whose tokens are all computed."""
        ready = []
        faults: list[tuple[Sequence, Exception]] = []
        for (sequence, rows), segment in zip(plan.rows.items(), batch.segments, strict=False):
            before = sequence.num_computed
            sequence.num_computed += rows
            if sequence.num_pending == 0:
                ready.append(sequence)
            if self.scheduler.prefix_caching:
                sequence.publish_blocks(before)
            request = sequence.request
            try:
                if sequence.policy is not None:
                    with suppress(OutOfBlocks):  # the scheduler asks again
                        sequence.drop_tokens()
                if before < len(request.prompt) and request.reads_prompt_rows:
                    start = segment.span.start
                    read_prompt_rows(self.decoder, request, hidden[start : start + rows], before)
            except Exception as error:
                faults.append((sequence, error))
        for sequence, fault in faults:
            self.on_fault(sequence, fault)
        return ready

    def _fork(self, plan: Plan, ready: list[Sequence]) -> tuple[list[Sequence], list[int]]:
        """Start the siblings of prompts that are now computed.

        Returns:
            The sequences to sample for, and the row of logits of each.
        """
        sampling: list[Sequence] = []
        rows: list[int] = []
        row = 0
        for sequence in ready:
            if not sequence.generates:
                continue
            request = sequence.request
            if sequence.finish_reason is None:
                sampling.append(sequence)
                rows.append(row)
                if not request.forked and request.params.n > 1:
                    for index in range(1, request.params.n):
                        sibling = sequence.fork(index, self._detokenizer(request))
                        request.sequences.append(sibling)
                        self.scheduler.start(sibling)
                        sampling.append(sibling)
                        rows.append(row)
                request.forked = True
            draft = plan.drafts.get(sequence)
            if draft is not None:
                draft.first_row = row
                row += len(draft.tree)
            row += 1
        return sampling, rows

    def _write(
        self, plan: Plan, logits: Tensor, sampling: list[Sequence], rows: list[int]
    ) -> dict[Sequence, Delta]:
        """Sample a token for each sequence, and go on for as long as its draft had foretold the last one."""
        gains: dict[Sequence, Delta] = {}
        while sampling:
            here = logits if rows == list(range(len(logits))) else logits[rows]
            drawn = sample_each(here, sampling, self.end_tokens, self.decoder.kernels, self.on_fault)
            self.counters.generation_tokens += len(drawn)
            foretold = []
            for sequence, token, logprob in drawn:
                delta = self._extend(sequence, token, logprob)
                if sequence in gains:
                    gains[sequence].extend(delta)
                else:
                    gains[sequence] = delta
                draft = plan.drafts.get(sequence)
                if draft is not None and sequence.finish_reason is None and draft.follow(token):
                    self.drafting.keep(sequence, draft)
                    foretold.append((sequence, draft.row))
            sampling, rows = [sequence for sequence, _ in foretold], [row for _, row in foretold]
        return gains

    def _extend(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> Delta:
        """Add a sampled token to its sequence and say what may be shown of it."""
        params = sequence.request.params
        complete = bool(params.processors) and accept_token(sequence, token)
        sequence.tokens.append(token)
        if sequence.failure is not None:
            return self._give_up(sequence, sequence.failure)
        delta = Delta(sequence.index, "", [token], None if logprob is None else [logprob])
        is_end = token in self.end_tokens and not params.ignore_eos
        if (is_end or token in params.stop_token_ids) and sequence.num_output >= params.min_tokens:
            if params.include_stop:
                delta.text = sequence.text.push(token, sequence.num_output)[0]
            delta.text += sequence.text.finish()
            delta.stop_reason = None if is_end else token
            self.finish(sequence, "stop")
        else:
            delta.text, delta.stop_reason = sequence.text.push(token, sequence.num_output)
            if delta.stop_reason is not None:
                self.finish(sequence, "stop")
            elif complete:
                delta.text += sequence.text.finish()
                self.finish(sequence, "stop")
            elif sequence.num_output >= self.max_output(sequence.request):
                delta.text += sequence.text.finish()
                self.finish(sequence, "length")
        delta.finish_reason = sequence.finish_reason
        return delta

    def _give_up(self, sequence: Sequence, failure: Exception) -> Delta:
        """End one choice whose processor failed; the token that it was to choose is not shown."""
        fault = failure if isinstance(failure, RequestError) else None
        error = str(fault or f"the engine failed on this request ({type(failure).__name__})")
        sequence.finish_reason = "error"
        self.scheduler.remove(sequence)  # its drafter goes when the pass is settled
        param = fault.param if fault else None
        return Delta(sequence.index, "", [], finish_reason="error", error=error, param=param)

    def max_output(self, request: Request) -> int:
        """Most tokens that a choice may have: what was asked, what the context and the KV pool hold."""
        asked, prompt = request.params.max_tokens, len(request.prompt)
        context, pool_tokens = self.max_model_len, self.pool.num_blocks * self.pool.block_size
        policy = request.sequences[0].policy
        if policy is not None:
            context = self.context(policy)
            if policy.holds is not None and asked is not None and max(policy.holds, prompt) < pool_tokens:
                # Nothing that it needs grows: it ends where it was asked to.
                return min(asked, (self.settings.model.max_model_len or asked + prompt) - prompt)
        room = min(context, pool_tokens) - prompt
        return room if asked is None else min(asked, room)

    def context(self, policy: KVPolicy | None) -> int:
        """Most tokens of a prompt and its answer together."""
        if policy is None or not policy.compact:
            return self.max_model_len
        return self.settings.model.max_model_len or self.pool.num_blocks * self.pool.block_size

    # -- the end of a request ---------------------------------------------------------------------------

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End one choice and free what it holds."""
        sequence.finish_reason = reason
        self.scheduler.remove(sequence)
        if reason in ("abort", "error"):
            self.drafting.close(sequence)

    def forget(self, request: Request) -> None:
        """Account for a request, all of whose choices have ended."""
        del self.requests[request.request_id]
        self.counters.finished.append(RequestTiming.of(request, time.monotonic()))

    def stats(self) -> EngineStats:
        """Counters since the start, and gauges of this moment."""
        stats = self.counters
        stats.gauge(self.scheduler, self.pool)
        stats.kv_bytes_total, stats.draft_bytes = self.kv.num_bytes, self.drafting.num_bytes
        return stats

    def _detokenizer(self, request: Request) -> Detokenizer:
        return self.tokenizer.detokenizer(request.params.skip_special_tokens)


def _raise(sequence: Sequence, error: Exception) -> None:
    raise error
