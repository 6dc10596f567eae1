"""Bodies of `/v1/chat/completions`, and conversations wherever they are sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator
from pydantic_core import from_json

from tokenloom.engine.outputs import FinishReason
from tokenloom.engine.sampling_params import MAX_LOGPROBS
from tokenloom.errors import RequestError
from tokenloom.serve.protocol import (
    Flag,
    Integer,
    Metadata,
    ModelName,
    PromptLogprobs,
    RequestBody,
    SamplingFields,
    StopAtFirst,
    Usage,
)
from tokenloom.serve.tools_protocol import ToolCall, ToolCallDelta, ToolChoice, Tools

MAX_MESSAGES = 4096


class TextPart(BaseModel):
    """A piece of a message. Only text is taken: nothing is ever fetched or decoded for a request."""

    type: Literal["text"]
    text: str


def _kind_of_content(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<parts>" if isinstance(value, list) else None


Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[TextPart], StopAtFirst(), Field(min_length=1, max_length=MAX_MESSAGES), Tag("<parts>")],
    Discriminator(
        _kind_of_content,
        custom_error_type="content_type",
        custom_error_message="must be a string or an array of text parts",
    ),
]


class PastCall(ToolCall):
    """A call that the assistant made in an earlier turn."""

    def for_template(self) -> dict[str, Any]:
        """With the arguments as an object, which is what chat templates print."""
        try:
            arguments = from_json(self.function.arguments, allow_inf_nan=False)
        except ValueError:
            raise RequestError(
                "messages: the arguments of a tool call are not valid JSON", param="messages"
            ) from None
        return {
            "id": self.id,
            "type": self.type,
            "function": {"name": self.function.name, "arguments": arguments},
        }


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[PastCall], StopAtFirst(), Field(max_length=128)] | None = None
    tool_call_id: str | None = None

    def for_template(self, *, knows_developer: bool) -> dict[str, Any]:
        """What a chat template gets. Models that do not know `developer` read it as `system`."""
        role = "system" if self.role == "developer" and not knows_developer else self.role
        content = self.content
        message: dict[str, Any] = {
            "role": role,
            "content": content if isinstance(content, str) else "\n".join(p.text for p in content or ()),
        }
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


def _have_content(messages: list[Message]) -> None:
    for index, message in enumerate(messages):
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            where = f"messages[{index}].content"
            raise RequestError(f"{where}: is required", param=where)


Messages = Annotated[list[Message], StopAtFirst(), Field(min_length=1, max_length=MAX_MESSAGES)]


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions.

    Of `tools` the model is told by its chat template, or in words where that knows none.
    """

    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SamplingFields.refused,
        "functions": ([],),
        "function_call": ("none",),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "best_of": (1,),
        "echo": (False,),
        "chat_template": (),
        "chat_template_kwargs": ({},),
        "documents": ([],),
        "continue_final_message": (False,),
    }

    messages: Messages
    max_tokens: Integer | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: Integer | None = Field(None, ge=1, lt=2**31)
    logprobs: Flag | None = None
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    metadata: Metadata | None = None
    store: Flag | None = Field(None, description="Taken, and without effect: nothing is kept.")
    safety_identifier: str | None = Field(None, max_length=128)
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: Flag | None = None
    add_generation_prompt: Flag = True

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        _have_content(self.messages)
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs: needs logprobs to be true", param="top_logprobs")
        return self


class TokenizeRequest(RequestBody):
    """POST /tokenize: a text (`prompt`) or a conversation (`messages`), not both."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: Flag = True
    add_generation_prompt: Flag = True

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("prompt: give either prompt or messages", param="prompt")
        _have_content(self.messages or [])
        return self


class TopLogprob(BaseModel):
    token: str
    bytes: list[int]
    logprob: float


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


# "tool_calls": it ended where the engine says "stop", and there are calls.
ChatFinishReason = FinishReason | Literal["tool_calls"]


class ChatMessage(BaseModel):
    """`content` is null where there are calls and nothing else."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stop_reason: str | int | None = Field(None, description="The stop string or token id that ended it.")


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stop_reason: str | int | None = None


class ChatChunk(BaseModel):
    """One event of a streamed answer. `usage` is there if `stream_options.include_usage` asked for it."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
