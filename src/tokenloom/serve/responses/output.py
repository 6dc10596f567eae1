"""The items of an answer while it is written: messages, and calls of functions."""

from __future__ import annotations

from collections.abc import Iterator

from tokenloom.serve.chat_protocol import ChatLogprob
from tokenloom.serve.responses.conversation import new_id
from tokenloom.serve.responses.events import EventWriter, ResponseEvent
from tokenloom.serve.responses.items import (
    FunctionCallItem,
    ItemStatus,
    OutputItem,
    OutputMessage,
    OutputText,
)
from tokenloom.serve.tools import CallWriter, ToolUse
from tokenloom.serve.tools_protocol import ToolCallDelta

Events = Iterator[ResponseEvent]


class OutputWriter:
    """Makes items of what is generated, and tells each step by events, which are made as they are read.

    Args:
        use: None if the answer is a text, whatever is in it.
    """

    def __init__(self, events: EventWriter, use: ToolUse | None) -> None:
        self.items: list[OutputItem] = []
        self._events = events
        self._calls = CallWriter(use) if use is not None else None
        self._current: OutputItem | None = None  # as it began; what it gained is in the next two
        self._text: list[str] = []
        self._logprobs: list[ChatLogprob] = []
        self._waiting: list[ChatLogprob] = []

    def begin(self) -> Events:
        """What is known before anything is generated: without tools, that there will be a message."""
        if self._calls is None:
            yield from self._begin_message()

    def push(self, text: str, logprobs: list[ChatLogprob], *, last: bool = False) -> Events:
        """A piece of the answer. `last`: no more comes."""
        if self._calls is None:
            if text or logprobs:
                yield from self._message_gains(text, logprobs)
            return
        # Text may be held back, since it may become a call: its log-probabilities go with what comes of it.
        self._waiting += logprobs
        for piece in self._calls.push(text, last=last):
            waited, self._waiting = self._waiting, []
            if isinstance(piece, str):
                yield from self._message_gains(piece, waited)
            else:
                yield from self._call_gains(piece)

    def end(self, *, cut: bool) -> Events:
        """The answer is over; `cut` if it had to end. There is always an item."""
        if self._current is None:
            yield from self._begin_message()
        yield from self._finish("incomplete" if cut else "completed")

    def _message_gains(self, text: str, logprobs: list[ChatLogprob]) -> Events:
        if not isinstance(self._current, OutputMessage):
            yield from self._finish("completed")
            yield from self._begin_message()
        self._text.append(text)
        self._logprobs += logprobs
        yield self._events.text_delta(text, logprobs)

    def _call_gains(self, piece: ToolCallDelta) -> Events:
        if piece.id is not None:
            yield from self._finish("completed")
            call = FunctionCallItem(
                id=new_id("fc"),
                call_id=piece.id,
                name=piece.function.name or "",
                arguments="",
                status="in_progress",
            )
            self._current = call
            yield self._events.added(call)
        if piece.function.arguments:
            self._text.append(piece.function.arguments)
            yield self._events.arguments_delta(piece.function.arguments)

    def _begin_message(self) -> Events:
        message = OutputMessage(id=new_id("msg"), status="in_progress", content=[])
        self._current = message
        yield self._events.added(message)
        yield self._events.part(
            "response.content_part.added", OutputText(text="", annotations=[], logprobs=[])
        )

    def _finish(self, status: ItemStatus) -> Events:
        item, text, logprobs = self._current, "".join(self._text), self._logprobs
        self._current, self._text, self._logprobs = None, [], []
        if item is None:
            return
        if isinstance(item, OutputMessage):
            part = OutputText(text=text, annotations=[], logprobs=logprobs)
            yield self._events.text_done(text, logprobs)
            yield self._events.part("response.content_part.done", part)
            whole: OutputItem = item.model_copy(update={"status": status, "content": [part]})
        else:
            yield self._events.arguments_done(item.name, text)
            whole = item.model_copy(update={"status": status, "arguments": text})
        self.items.append(whole)
        yield self._events.item_done(whole)
