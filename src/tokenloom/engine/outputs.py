"""What the engine gives back: pieces while a request runs, and the whole when it is done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token under the model, with the most likely alternatives.

    `top` holds (token id, log-probability), most likely first; it need not contain the token itself.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class DraftCounts:
    """What became of guesses, see `tokenloom.engine.draft`.

    Attributes:
        passes: those that verified guesses. tokens: guesses in them. accepted: those that became text.
        accepted_at: by how many tokens ahead of the known one a guess lay, how many became text.
    """

    passes: int = 0
    tokens: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=list)

    def add(self, tokens: int, accepted: int) -> None:
        """Count one pass."""
        self.passes += 1
        self.tokens += tokens
        self.accepted += accepted
        self.accepted_at += [0] * (accepted - len(self.accepted_at))
        for i in range(accepted):
            self.accepted_at[i] += 1


@dataclass(slots=True)
class Delta:
    """What one choice of a request gained in one iteration.

    `text` may be empty while `token_ids` is not: characters are held back until they are complete and
    can no longer be the start of a stop string. A delta with a `finish_reason` is the choice's last.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the text, if one did."""
    error: str | None = None
    param: str | None = None
    """The request's field at fault, where `error` is the request's own."""

    def extend(self, other: Delta) -> None:
        """Add what the same choice gained next."""
        self.text += other.text
        self.token_ids += other.token_ids
        if self.logprobs is not None and other.logprobs is not None:
            self.logprobs += other.logprobs
        self.finish_reason, self.stop_reason = other.finish_reason, other.stop_reason
        self.error, self.param = other.error, other.param


@dataclass(slots=True)
class StepOutput:
    """Everything that one request gained in one iteration."""

    request_id: str
    deltas: list[Delta]
    finished: bool = False
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """Set on the first output of a request that asked for them; entry 0 is None."""
    embedding: list[float] | None = None
    cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache."""
    drafts: DraftCounts | None = None
    """Of the request so far, where it drafts."""


@dataclass(slots=True)
class Completion:
    """One finished choice."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass(slots=True)
class RequestOutput:
    """A finished request."""

    request_id: str
    prompt_token_ids: list[int]
    completions: list[Completion]
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cached_tokens: int = 0
    embedding: list[float] | None = None
    drafts: DraftCounts | None = None

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.completions[0].text


def collect(output: RequestOutput, step: StepOutput) -> None:
    """Add what one iteration gave to the whole answer."""
    output.cached_tokens, output.drafts = step.cached_tokens, step.drafts
    if step.prompt_logprobs is not None:
        output.prompt_logprobs = step.prompt_logprobs
    if step.embedding is not None:
        output.embedding = step.embedding
    for delta in step.deltas:
        choice = output.completions[delta.index]
        choice.text += delta.text
        choice.token_ids += delta.token_ids
        if delta.logprobs is not None:
            choice.logprobs = (choice.logprobs or []) + delta.logprobs
        if delta.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
            choice.error = delta.error
