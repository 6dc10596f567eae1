"""What a request asks of sampling, checked once so that the hot loop never has to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tokenloom.engine.logits_processor import LogitsMethod
from tokenloom.errors import RequestError

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_LOGIT_BIAS = 1024
MAX_N = 128


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    Attributes:
        temperature: 0 picks the most likely token; otherwise logits are divided by it, in [0, 2] by
            OpenAI's contract, here any finite value >= 0.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches it, in (0, 1].
        min_p: keep tokens with at least `min_p` times the probability of the most likely one, in [0, 1).
        repetition_penalty: divides positive and multiplies negative logits of every token seen in the
            prompt or the output (CTRL, arXiv 1909.05858); 1 is neutral.
        presence_penalty, frequency_penalty: subtracted once, and once per occurrence, for tokens of the
            output (OpenAI), in [-2, 2].
        logit_bias: added to the logits of the given token ids, each in [-100, 100].
        max_tokens: most tokens to generate; None goes on to the end of the context.
        min_tokens: neither an end token nor a stop id is sampled before this many tokens.
        stop: strings that end the text; they are not part of the answer.
        stop_token_ids: token ids that end the text, besides the model's own end tokens.
        include_stop: keep the stop string in the answer.
        ignore_eos: go on past the model's end tokens.
        n: how many independent answers; the prompt is computed once and shared.
        seed: makes the answer a function of the request alone; None draws a fresh one.
        logprobs: None for none, else how many alternatives (0..20) to report beside the chosen token.
            They are of the model's own distribution, before temperature, penalties and filters.
        prompt_logprobs: the same for each prompt token after the first.
        skip_special_tokens: leave special tokens out of the text.
        processors: hooks that edit the logits of each next token before all else does, such as a grammar
            (`tokenloom.structured`). They are heard although `min_tokens` or `ignore_eos` ask for more.

    Raises:
        RequestError: naming the field, when a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] | list[str] | str = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    n: int = 1
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    processors: tuple[LogitsMethod, ...] = ()

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "processors", tuple(self.processors))
        _number(self, "temperature", low=0.0)
        _number(self, "top_p", low=0.0, high=1.0, open_low=True)
        _number(self, "min_p", low=0.0, high=1.0, open_high=True)
        _number(self, "repetition_penalty", low=0.0, open_low=True)
        _number(self, "presence_penalty", low=-2.0, high=2.0)
        _number(self, "frequency_penalty", low=-2.0, high=2.0)
        _integer(self, "top_k", low=0)
        _integer(self, "min_tokens", low=0)
        _integer(self, "n", low=1, high=MAX_N)
        if self.max_tokens is not None:
            _integer(self, "max_tokens", low=0)
            if self.min_tokens > self.max_tokens:
                raise RequestError(
                    f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.max_tokens})",
                    param="min_tokens",
                )
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(self, name, low=0, high=MAX_LOGPROBS)
        if self.seed is not None:
            _integer(self, "seed", low=-(2**63), high=2**64 - 1)
        if len(stop) > MAX_STOP_STRINGS:
            raise RequestError(
                f"stop has {len(stop)} strings; at most {MAX_STOP_STRINGS} are allowed", param="stop"
            )
        if any(not isinstance(s, str) or not s for s in stop):
            raise RequestError("stop must hold non-empty strings", param="stop")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias has {len(self.logit_bias)} entries; at most {MAX_LOGIT_BIAS} are allowed",
                param="logit_bias",
            )
        for token, bias in self.logit_bias.items():
            if not isinstance(bias, (int, float)) or not -100.0 <= bias <= 100.0:
                raise RequestError(
                    f"logit_bias[{token}] is {bias!r}; it must be from -100 to 100", param="logit_bias"
                )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def edits_logits(self) -> bool:
        """Whether logits must be changed before the choice; False is the fast path."""
        return bool(
            self.processors
            or self.logit_bias
            or self.min_tokens
            or self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
        )


def _number(
    params: SamplingParams,
    name: str,
    *,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    value = getattr(params, name)
    bad_type = isinstance(value, bool) or not isinstance(value, (int, float))
    if bad_type or not math.isfinite(value):
        raise RequestError(f"{name} must be a finite number, not {value!r}", param=name)
    if value < low or value > high or (open_low and value == low) or (open_high and value == high):
        left, right = ("(" if open_low else "["), (")" if open_high or high == math.inf else "]")
        raise RequestError(f"{name} is {value}; it must be in {left}{low}, {high}{right}", param=name)


def _integer(params: SamplingParams, name: str, *, low: int, high: int | None = None) -> None:
    value = getattr(params, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer, not {value!r}", param=name)
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"from {low} to {high}"
        raise RequestError(f"{name} is {value}; it must be {bound}", param=name)
