"""The events of a streamed response, in the order in which OpenAI sends them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from tokenloom.serve.chat_protocol import ChatLogprob
from tokenloom.serve.responses.protocol import OutputMessage, OutputText, ResponseObject


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
    """The message begins, or is whole."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    sequence_number: int
    output_index: int
    item: OutputMessage


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


ResponseEvent = WholeEvent | ItemEvent | PartEvent | TextDelta | TextDone


class EventWriter:
    """Numbers the events of one response, which has one message with one part."""

    def __init__(self, item_id: str) -> None:
        self.item_id = item_id
        self._sent = 0

    def whole(self, kind: Any, response: ResponseObject) -> WholeEvent:
        return WholeEvent(type=kind, sequence_number=self._number(), response=response)

    def item(self, kind: Any, item: OutputMessage) -> ItemEvent:
        return ItemEvent(type=kind, sequence_number=self._number(), output_index=0, item=item)

    def part(self, kind: Any, part: OutputText) -> PartEvent:
        return PartEvent(type=kind, part=part, **self._place())

    def delta(self, text: str, logprobs: list[ChatLogprob]) -> TextDelta:
        return TextDelta(delta=text, logprobs=logprobs, **self._place())

    def done(self, text: str, logprobs: list[ChatLogprob]) -> TextDone:
        return TextDone(text=text, logprobs=logprobs, **self._place())

    def _place(self) -> dict[str, Any]:
        return {
            "sequence_number": self._number(),
            "item_id": self.item_id,
            "output_index": 0,
            "content_index": 0,
        }

    def _number(self) -> int:
        self._sent += 1
        return self._sent - 1
