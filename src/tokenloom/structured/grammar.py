"""Grammars compiled by llguidance, and their masks over the vocabulary.

The library walks the vocabulary's trie beside the grammar's lexer and parser (an Earley parser over
derivatives of regular expressions), so nothing is precomputed per state and compiling takes milliseconds.

Two things happen outside the engine's loop: compiling, with the mask of the first token, and later masks.
Each is computed in a thread while the next pass runs (llguidance drops the GIL) and waited for at sampling.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from tokenloom.config import LimitSettings
from tokenloom.engine.engine import Engine
from tokenloom.errors import RequestError
from tokenloom.structured.spec import Source, Structured
from tokenloom.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CACHED = 64
MASK_TIMEOUT_S = 1.0
"""How long the engine waits for a mask before it gives the request up; most take far below a millisecond."""

# What one step may cost. The library's defaults let a grammar of 64 KiB compute for seconds.
LIMITS: dict[str, Any] = {
    "max_items_in_row": 1000,
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 10_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 20_000,
    "verbose_errors": False,
}

# Compiling recurses along references between rules. A grammar of 128 KiB can have so many that the usual
# stack of 8 MiB overflows, which would end the process.
_STACK_BYTES = 256 << 20


class Grammar:
    """A compiled grammar, which any number of sequences can follow (`LogitsMethod`).

    Args:
        start: the matcher before the first token; it is copied, never moved.
        first: bool `[V]`, which tokens cannot be the first.
        forget: called when following it failed, since copies share what failed.
    """

    def __init__(
        self, start: LLMatcher, first: Tensor, vocab_size: int, param: str, forget: Callable[[], None]
    ) -> None:
        self.start, self.first, self.vocab_size, self.param = start, first, vocab_size, param
        self.forget = forget

    def processor(self) -> GrammarProcessor:
        """At the grammar's beginning."""
        return GrammarProcessor(self)


class GrammarProcessor:
    """One sequence's way through a grammar (`LogitsProcessor`)."""

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self._matcher = grammar.start.deep_copy()
        self._banned: Tensor | Future[Tensor] = grammar.first

    def apply(self, row: Tensor) -> None:
        """Ban what the grammar does not allow next. Raises RequestError if it got too complex."""
        try:
            if isinstance(self._banned, Future):
                self._banned = self._result(self._banned)
        except RequestError:
            self.grammar.forget()
            raise
        banned = self._banned
        row.masked_fill_(banned.to(row.device, non_blocking=True), -torch.inf)

    def accept(self, token: int) -> bool:
        """Go on by a token; True if nothing can follow it. Raises RequestError as `apply` does."""
        if isinstance(self._banned, Future) and not self._banned.cancel():
            wait((self._banned,))  # nobody asked for it, and the matcher is at work on it
        if not self._matcher.consume_token(token):
            self.grammar.forget()
            raise self._fault(_first_line(self._matcher.get_error()))
        if self._matcher.is_stopped():
            return True
        self._banned = _threads("mask").submit(
            banned_tokens, self._matcher, self.grammar.vocab_size, self.grammar.param
        )
        return False

    def _result(self, future: Future[Tensor]) -> Tensor:
        if future.cancel():  # not begun: on the walk down a draft, or all threads are busy with others
            return banned_tokens(self._matcher, self.grammar.vocab_size, self.grammar.param)
        try:
            return future.result(MASK_TIMEOUT_S)
        except FutureTimeout:
            raise self._fault(f"took over {MASK_TIMEOUT_S:g} s to say what may follow") from None

    def _fault(self, problem: str) -> RequestError:
        return RequestError(f"{self.grammar.param}: {problem}", param=self.grammar.param)


def banned_tokens(matcher: LLMatcher, vocab_size: int, param: str) -> Tensor:
    """Which tokens cannot come next: bool `[V]`. Raises RequestError (`param`) if none can."""
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    allowed = np.unpackbits(bits, count=vocab_size, bitorder="little")
    if matcher.is_error() or not allowed.any():
        problem = _first_line(matcher.get_error()) or "no token of this model can follow"
        raise RequestError(f"{param}: {problem}", param=param)
    return torch.from_numpy(allowed == 0)


class Grammars:
    """Compiles the grammars of one model and keeps the last ones, failed ones too.

    Args:
        vocab_size: V of the model's logits.
        end_tokens: ids that end an answer; at least one.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, end_tokens: tuple[int, ...], limits: LimitSettings
    ) -> None:
        self.tokenizer, self.vocab_size, self.end_tokens = tokenizer, vocab_size, end_tokens
        self.limits = limits
        self._compiled: OrderedDict[Source, Future[Grammar]] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, wanted: Structured | Source) -> Grammar:
        """Wait for a compiled grammar.

        Raises:
            RequestError: naming the field: it is not a grammar, or too large, deep, slow or complex; or
                nothing that this model can write fits it.
        """
        source = wanted.source(self.limits) if isinstance(wanted, Structured) else wanted
        try:
            return self._start(source).result(self.limits.grammar_timeout_s)
        except FutureTimeout:
            raise self._too_slow(source) from None

    async def compile_async(self, source: Source) -> Grammar:
        """The same, without holding up the event loop."""
        # Shielded: others may wait for the same one.
        future = asyncio.shield(asyncio.wrap_future(self._start(source)))
        try:
            return await asyncio.wait_for(future, self.limits.grammar_timeout_s)
        except asyncio.TimeoutError:
            raise self._too_slow(source) from None

    def _too_slow(self, source: Source) -> RequestError:
        limit = f"{self.limits.grammar_timeout_s:g} s"
        return RequestError(f"{source.param}: takes more than {limit} to compile", param=source.param)

    def _start(self, source: Source) -> Future[Grammar]:
        with self._lock:
            future = self._compiled.get(source)
            if future is None:
                future = self._compiled[source] = _threads("grammar").submit(self._compile, source)
                while len(self._compiled) > MAX_CACHED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(source)
        return future

    def _forget(self, source: Source) -> None:
        with self._lock:
            self._compiled.pop(source, None)

    def _compile(self, source: Source) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        matcher = LLMatcher(self._tokenizer, source.text, log_level=0, limits=LLParserLimits(**LIMITS))
        if matcher.is_error():
            raise RequestError(f"{source.param}: {_first_line(matcher.get_error())}", param=source.param)
        first = banned_tokens(matcher.deep_copy(), self.vocab_size, source.param)
        return Grammar(matcher, first, self.vocab_size, source.param, lambda: self._forget(source))

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        words = TokenizerWrapper(_Words(self.tokenizer, self.vocab_size, self.end_tokens[0]))
        return LLTokenizer(words, n_vocab=self.vocab_size, eos_token=list(self.end_tokens))


class _Words:
    """A tokenizer as llguidance wants to see it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_token: int) -> None:
        self.tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.bos_token_id, self.eos_token_id = tokenizer.bos_token_id, end_token

    def __call__(self, text: bytes) -> list[int]:
        return self.tokenizer.encode(text.decode(), add_special_tokens=False)


def grammars_of(engine: Engine) -> Grammars:
    """The grammars of a model, whoever asks. Raises RequestError where the model has no end token."""
    if not engine.end_tokens:
        raise RequestError("structured output needs a model with an end token; this one has none")
    with _GRAMMARS_LOCK:
        grammars = _GRAMMARS.get(engine.tokenizer)
        if grammars is None:
            grammars = _GRAMMARS[engine.tokenizer] = Grammars(
                engine.tokenizer, engine.config.vocab_size, engine.end_tokens, engine.settings.limits
            )
    return grammars


_GRAMMARS: WeakKeyDictionary[Tokenizer, Grammars] = WeakKeyDictionary()
_GRAMMARS_LOCK = threading.Lock()


@cache
def _threads(name: str) -> ThreadPoolExecutor:
    """Two threads with a large stack, of which only what is used takes memory."""
    before = threading.stack_size(_STACK_BYTES)
    try:
        pool = ThreadPoolExecutor(2, thread_name_prefix=f"tokenloom-{name}")
        both = threading.Barrier(3)
        for _ in range(2):
            pool.submit(both.wait)
        both.wait()
    finally:
        threading.stack_size(before)
    return pool


def _first_line(message: Any) -> str:
    """The library's first line says what is wrong; the others show the grammar."""
    return str(message).partition("\n")[0][:300]
