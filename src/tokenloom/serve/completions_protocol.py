"""Bodies of `/v1/completions`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from tokenloom.engine.outputs import FinishReason
from tokenloom.engine.sampling_params import MAX_LOGPROBS
from tokenloom.errors import RequestError
from tokenloom.serve.protocol import Flag, Integer, Prompt, PromptLogprobs, SamplingFields, Usage

MAX_BEST_OF = 20


class CompletionRequest(SamplingFields):
    """POST /v1/completions. `prompt`: text, a list of texts, token ids, or a list of lists of ids.

    `max_tokens` 0 with `echo` and `logprobs` scores the prompt and generates nothing.
    """

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {**SamplingFields.refused, "suffix": ("",)}

    prompt: Prompt
    max_tokens: Integer | None = Field(None, ge=0, lt=2**31)
    echo: Flag | None = None
    logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: Integer | None = Field(None, ge=1, le=MAX_BEST_OF)

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.best_of not in (None, 1, self.n or 1):
            raise RequestError(
                "best_of: choosing among more answers than n is not supported",
                param="best_of",
                code="unsupported_parameter",
            )
        return self


class CompletionLogprobs(BaseModel):
    """Parallel lists, one entry per token. `text_offset` is where each begins in the text, in characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = Field(None, description="The stop string or token id that ended it.")
    prompt_logprobs: PromptLogprobs | None = None


class CompletionResponse(BaseModel):
    """An answer, or one event of a streamed one: then each choice holds what it gained since the last."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
