"""Items of `/v1/responses`: what conversations and answers are made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from tokenloom.serve.chat_protocol import MAX_MESSAGES, ChatLogprob
from tokenloom.serve.protocol import StopAtFirst
from tokenloom.serve.tools_protocol import FunctionName

CallId = Annotated[str, Field(min_length=1, max_length=128)]


class InputPart(BaseModel):
    """A piece of a message. `output_text` is how earlier answers come back."""

    type: Literal["input_text", "output_text"]
    text: str


def _text_or_list(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


InputContent = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[InputPart], StopAtFirst(), Field(min_length=1, max_length=MAX_MESSAGES), Tag("<list>")],
    Discriminator(
        _text_or_list,
        custom_error_type="content_type",
        custom_error_message="must be a string or an array of text parts",
    ),
]


class InputMessage(BaseModel):
    """One turn of a conversation. A message of `response.output` is one, too."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: InputContent


class InputCall(BaseModel):
    """A call that the model made, as `response.output` has it."""

    type: Literal["function_call"]
    call_id: CallId
    name: FunctionName
    arguments: str


class InputCallOutput(BaseModel):
    """What the function of a call returned."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: InputContent


_KINDS = ("message", "function_call", "function_call_output")


def _kind_of_item(value: Any) -> str | None:
    kind = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in _KINDS else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("<message>")]
    | Annotated[InputCall, Tag("<function_call>")]
    | Annotated[InputCallOutput, Tag("<function_call_output>")],
    Discriminator(
        _kind_of_item,
        custom_error_type="item_type",
        custom_error_message="must be a message, a function_call or a function_call_output",
    ),
]


Input = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[InputItem], StopAtFirst(), Field(min_length=1, max_length=MAX_MESSAGES), Tag("<list>")],
    Discriminator(
        _text_or_list,
        custom_error_type="input_type",
        custom_error_message="must be a string or an array of items",
    ),
]


class InputTextPart(BaseModel):
    type: Literal["input_text"] = "input_text"
    text: str


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any]
    logprobs: list[ChatLogprob]


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class FunctionCallItem(BaseModel):
    """A call of a function; `arguments` is JSON as the model wrote it. `call_id` names it where its output is
    sent back."""

    id: str
    type: Literal["function_call"] = "function_call"
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


OutputItem = OutputMessage | FunctionCallItem


class MessageItem(BaseModel):
    """A message that went into a response, whoever wrote it."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    status: Literal["completed"] = "completed"
    content: list[InputTextPart | OutputText]

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content)


class CallOutputItem(BaseModel):
    """What a function returned."""

    id: str
    type: Literal["function_call_output"] = "function_call_output"
    call_id: str
    output: str | list[InputTextPart]
    status: Literal["completed"] = "completed"

    @property
    def text(self) -> str:
        return self.output if isinstance(self.output, str) else "\n".join(part.text for part in self.output)


KeptItem = MessageItem | FunctionCallItem | CallOutputItem
"""What a conversation is kept as, and how it is listed."""
