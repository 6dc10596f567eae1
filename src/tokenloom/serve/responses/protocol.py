"""Bodies of `/v1/responses`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from tokenloom.engine.sampling_params import MAX_LOGPROBS
from tokenloom.errors import RequestError
from tokenloom.methods.registry import MAX_SPEC_CHARACTERS
from tokenloom.serve.chat_protocol import MAX_MESSAGES, ChatLogprob, ChatRequest, Message
from tokenloom.serve.protocol import Flag, Integer, Metadata, ModelName, Number, RequestBody, StopAtFirst

LOGPROBS = "message.output_text.logprobs"

ItemId = Annotated[str, Field(max_length=128)]
Verbosity = Literal["medium"]


class InputPart(BaseModel):
    """A piece of a message. `output_text` is how earlier answers come back."""

    type: Literal["input_text", "output_text"]
    text: str


def _kind_of_content(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<parts>" if isinstance(value, list) else None


InputContent = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[InputPart], StopAtFirst(), Field(min_length=1, max_length=MAX_MESSAGES), Tag("<parts>")],
    Discriminator(
        _kind_of_content,
        custom_error_type="content_type",
        custom_error_message="must be a string or an array of text parts",
    ),
]


class InputMessage(BaseModel):
    """One turn of a conversation. An item of `response.output` is one, too."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: InputContent


def _kind_of_input(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<items>" if isinstance(value, list) else None


Input = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[
        list[InputMessage], StopAtFirst(), Field(min_length=1, max_length=MAX_MESSAGES), Tag("<items>")
    ],
    Discriminator(
        _kind_of_input,
        custom_error_type="input_type",
        custom_error_message="must be a string or an array of messages",
    ),
]


class TextFormat(BaseModel):
    type: Literal["text"] = "text"


class TextOptions(BaseModel):
    """How the answer is to look: plain text."""

    format: TextFormat = TextFormat()
    verbosity: Verbosity = "medium"


class ObfuscationOptions(BaseModel):
    """Taken, and without effect: no event is padded."""

    include_obfuscation: Flag | None = None


class ResponseRequest(RequestBody):
    """POST /v1/responses. The second half extends OpenAI's API, as in chat completions."""

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "tools": ([],),
        "tool_choice": ("auto", "none"),
        "max_tool_calls": (),
        "conversation": (),
        "prompt": (),
        "reasoning": ({}, {"effort": "none"}),
        "truncation": ("disabled",),
        "context_management": ([],),
        "moderation": (),
        "image": (),
        "access_programs": (),
        "background_options": ({}, {"completion_window": "soonest"}),
    }

    model: ModelName
    input: Input
    instructions: str | None = None
    previous_response_id: ItemId | None = None
    max_output_tokens: Integer | None = Field(None, ge=1, lt=2**31)
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=16)] | None = None
    text: TextOptions | None = None
    stream: Flag | None = None
    stream_options: ObfuscationOptions | None = None
    store: Flag | None = None
    background: Flag | None = None
    parallel_tool_calls: Flag | None = None
    metadata: Metadata | None = None
    user: str | None = Field(None, max_length=512)
    safety_identifier: str | None = Field(None, max_length=128)
    prompt_cache_key: str | None = Field(None, max_length=512)

    seed: Integer | None = Field(None, ge=-(2**63), le=2**64 - 1)
    top_k: Integer | None = Field(None, ge=0, lt=2**31)
    min_p: Number | None = Field(None, ge=0, lt=1)
    repetition_penalty: Number | None = Field(None, gt=0)
    min_tokens: Integer | None = Field(None, ge=0, lt=2**31)
    ignore_eos: Flag | None = None
    priority: Integer | None = Field(None, ge=-(2**31), lt=2**31)
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    kv: str | None = Field(None, max_length=MAX_SPEC_CHARACTERS)
    draft: str | None = Field(None, max_length=MAX_SPEC_CHARACTERS)

    @model_validator(mode="after")
    def _check(self) -> ResponseRequest:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options: needs stream to be true", param="stream_options")
        if self.background and self.stream:
            raise RequestError("background: cannot be streamed", param="background")
        if self.background and self.store is False:
            raise RequestError("background: needs store, which is how its answer is read", param="background")
        return self

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())

    def as_chat(self, messages: list[Message]) -> ChatRequest:
        """The same request as a chat completion of `messages`."""
        return ChatRequest(
            model=self.model,
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            logprobs=self.wants_logprobs,
            top_logprobs=self.top_logprobs if self.wants_logprobs else None,
            **{name: getattr(self, name) for name in _AS_IN_CHAT},
        )


_AS_IN_CHAT = (
    *("temperature", "top_p", "stream", "user", "seed", "top_k", "min_p", "repetition_penalty"),
    *("min_tokens", "ignore_eos", "priority", "cache_salt", "kv", "draft"),
)


class InputTextPart(BaseModel):
    type: Literal["input_text"] = "input_text"
    text: str


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any]
    logprobs: list[ChatLogprob]


class OutputMessage(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class InputItem(BaseModel):
    """A message that went into a response, whoever wrote it."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    status: Literal["completed"] = "completed"
    content: list[InputTextPart | OutputText]


class InputItemList(BaseModel):
    object: Literal["list"] = "list"
    data: list[InputItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputDetails(BaseModel):
    """`cache_write_tokens` were computed for this response, and may be found in the cache by the next."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(BaseModel):
    """Every token is part of the answer here: `reasoning_tokens` is 0."""

    reasoning_tokens: Literal[0] = 0


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Incomplete(BaseModel):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class Failure(BaseModel):
    code: Literal["server_error"] = "server_error"
    message: str


Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class ResponseObject(BaseModel):
    """A response, finished or not. `store` says whether it can be asked for again."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    background: bool
    error: Failure | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float
    text: TextOptions
    tool_choice: Literal["auto"] = "auto"
    tools: list[Any] = []
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None


class ResponseDeleted(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True
