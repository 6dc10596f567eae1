"""Bodies of `/v1/responses`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from tokenloom.engine.sampling_params import MAX_LOGPROBS
from tokenloom.errors import RequestError
from tokenloom.methods.registry import MAX_SPEC_CHARACTERS
from tokenloom.serve.chat_protocol import ChatRequest, Message
from tokenloom.serve.protocol import Flag, Integer, Metadata, ModelName, Number, RequestBody
from tokenloom.serve.response_format import (
    JSONObjectFormat,
    JSONSchema,
    JSONSchemaFormat,
    TextFormat,
    kind_of_format,
)
from tokenloom.serve.responses.items import Input, KeptItem, OutputItem
from tokenloom.serve.tools_protocol import MAX_TOOLS, FunctionDefinition, NamedFunction, NamedTool, Tool
from tokenloom.serve.tools_protocol import ToolChoice as ChatToolChoice

LOGPROBS = "message.output_text.logprobs"

ItemId = Annotated[str, Field(max_length=128)]
Verbosity = Literal["medium"]


class SchemaFormat(JSONSchema):
    """JSON that fits a schema. OpenAI has here in one object what chat completions nest."""

    model_config = ConfigDict(serialize_by_alias=True)

    type: Literal["json_schema"]


Format = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JSONObjectFormat, Tag("<json_object>")]
    | Annotated[SchemaFormat, Tag("<json_schema>")],
    Discriminator(
        kind_of_format,
        custom_error_type="text_format",
        custom_error_message="must be an object whose type is text, json_object or json_schema",
    ),
]


class TextOptions(BaseModel):
    """How the answer is to look."""

    format: Format = TextFormat(type="text")
    verbosity: Verbosity = "medium"

    @property
    def response_format(self) -> TextFormat | JSONObjectFormat | JSONSchemaFormat:
        """The same in chat completions."""
        if not isinstance(self.format, SchemaFormat):
            return self.format
        schema = self.format.model_dump(exclude={"type"}, by_alias=True)
        return JSONSchemaFormat(type="json_schema", json_schema=JSONSchema.model_validate(schema))


class _OfType(BaseModel):
    type: Literal["function"]


# The last base's fields come first: of a tool of another type that is told, not what it has not got.
class FunctionTool(FunctionDefinition, _OfType):
    """A function that the model may call."""

    @property
    def as_in_chat(self) -> Tool:
        given = self.model_dump(exclude={"type"}, exclude_unset=True)
        return Tool(type="function", function=FunctionDefinition.model_validate(given))


class FunctionChoice(NamedFunction, _OfType):
    """The function that must be called."""


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")] | Annotated[FunctionChoice, Tag("<tool>")],
    Discriminator(
        lambda value: "<word>" if isinstance(value, str) else "<tool>",
        custom_error_type="tool_choice",
        custom_error_message="must be none, auto, required or an object that names a function",
    ),
]


class ObfuscationOptions(BaseModel):
    """Taken, and without effect: no event is padded."""

    include_obfuscation: Flag | None = None


class ResponseRequest(RequestBody):
    """POST /v1/responses. The second half extends OpenAI's API, as in chat completions."""

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {
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
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
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
            response_format=None if self.text is None else self.text.response_format,
            tools=None if self.tools is None else [tool.as_in_chat for tool in self.tools],
            tool_choice=self._chat_choice(),
            **{name: getattr(self, name) for name in _AS_IN_CHAT},
        )

    def _chat_choice(self) -> ChatToolChoice | None:
        choice = self.tool_choice
        if not isinstance(choice, FunctionChoice):
            return choice
        return NamedTool(type="function", function=NamedFunction(name=choice.name))


_AS_IN_CHAT = (
    *("temperature", "top_p", "stream", "user", "seed", "top_k", "min_p", "repetition_penalty"),
    *("min_tokens", "ignore_eos", "priority", "cache_salt", "kv", "draft", "parallel_tool_calls"),
)


class InputItemList(BaseModel):
    object: Literal["list"] = "list"
    data: list[KeptItem]
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
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float
    text: TextOptions
    tool_choice: ToolChoice
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None


class ResponseDeleted(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True
