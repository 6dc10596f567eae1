"""The events of a streamed response, in the order in which OpenAI sends them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from tokenloom.serve.chat_protocol import ChatLogprob
from tokenloom.serve.responses.items import OutputItem, OutputText
from tokenloom.serve.responses.protocol import ResponseObject


class WholeEvent(BaseModel):
    """The response as it is at the beginning, and at the end: then `type` tells how it ended."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    sequence_number: int
    response: ResponseObject


class ItemEvent(BaseModel):
    """A message or a call begins, or is whole."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: OutputItem


class PartEvent(BaseModel):
    """The message's text begins, or is whole."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    part: OutputText


class TextDelta(BaseModel):
    """A piece of text, with the log-probabilities of its tokens if they were asked for."""

    type: Literal["response.output_text.delta"] = "response.output_text.delta"
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[ChatLogprob]


class TextDone(BaseModel):
    """The whole text."""

    type: Literal["response.output_text.done"] = "response.output_text.done"
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[ChatLogprob]


class ArgumentsDelta(BaseModel):
    """A piece of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"] = "response.function_call_arguments.delta"
    sequence_number: int
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(BaseModel):
    """All arguments of a call."""

    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"
    sequence_number: int
    item_id: str
    output_index: int
    name: str
    arguments: str


ResponseEvent = WholeEvent | ItemEvent | PartEvent | TextDelta | TextDone | ArgumentsDelta | ArgumentsDone


class EventWriter:
    """Numbers the events of one response. What is told of an item is told of the one that began last; a
    message has one part."""

    def __init__(self) -> None:
        self._sent = 0
        self._item_id = ""
        self._output_index = -1

    def whole(self, kind: Any, response: ResponseObject) -> WholeEvent:
        return WholeEvent(type=kind, sequence_number=self._number(), response=response)

    def added(self, item: OutputItem) -> ItemEvent:
        self._item_id = item.id
        self._output_index += 1
        return self._item("response.output_item.added", item)

    def item_done(self, item: OutputItem) -> ItemEvent:
        return self._item("response.output_item.done", item)

    def part(self, kind: Any, part: OutputText) -> PartEvent:
        return PartEvent(type=kind, part=part, content_index=0, **self._place())

    def text_delta(self, text: str, logprobs: list[ChatLogprob]) -> TextDelta:
        return TextDelta(delta=text, logprobs=logprobs, content_index=0, **self._place())

    def text_done(self, text: str, logprobs: list[ChatLogprob]) -> TextDone:
        return TextDone(text=text, logprobs=logprobs, content_index=0, **self._place())

    def arguments_delta(self, text: str) -> ArgumentsDelta:
        return ArgumentsDelta(delta=text, **self._place())

    def arguments_done(self, name: str, arguments: str) -> ArgumentsDone:
        return ArgumentsDone(name=name, arguments=arguments, **self._place())

    def _item(self, kind: Any, item: OutputItem) -> ItemEvent:
        number, index = self._number(), self._output_index
        return ItemEvent(type=kind, sequence_number=number, output_index=index, item=item)

    def _place(self) -> dict[str, Any]:
        index = self._output_index
        return {"sequence_number": self._number(), "item_id": self._item_id, "output_index": index}

    def _number(self) -> int:
        self._sent += 1
        return self._sent - 1
