"""From the input of a response to the messages that a chat template renders."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from tokenloom.errors import RequestError
from tokenloom.serve.chat_protocol import MAX_MESSAGES, Message, PastCall
from tokenloom.serve.responses.items import (
    CallOutputItem,
    FunctionCallItem,
    InputCall,
    InputCallOutput,
    InputContent,
    InputItem,
    InputMessage,
    InputTextPart,
    KeptItem,
    MessageItem,
    OutputItem,
    OutputText,
)
from tokenloom.serve.responses.protocol import ResponseRequest
from tokenloom.serve.responses.store import StoredResponse
from tokenloom.serve.tools_protocol import FunctionCall


def items_of(body: ResponseRequest, previous: StoredResponse | None) -> tuple[KeptItem, ...]:
    """The conversation that is answered: what was said before, then the input.

    Raises RequestError (param "input") if it has grown too long.
    """
    items: list[KeptItem] = []
    if previous is not None:
        items += previous.items
        items += [_said(item) for item in previous.response.output]
    given = [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    items += map(_kept, given)
    if len(items) > MAX_MESSAGES:
        raise RequestError(
            f"input: the conversation has {len(items)} items; at most {MAX_MESSAGES} are allowed",
            param="input",
        )
    return tuple(items)


def messages_of(body: ResponseRequest, items: Iterable[KeptItem]) -> list[Message]:
    """All messages of the prompt. Instructions are of this request alone, and go first.

    Calls are of the assistant's message before them, as they were when it wrote them.

    Raises RequestError (param "input") for the output of a call that is not there.
    """
    messages = []
    if body.instructions is not None:
        messages.append(Message(role="system", content=body.instructions))
    called: set[str] = set()
    for item in items:
        if isinstance(item, MessageItem):
            messages.append(Message(role=item.role, content=item.text))
        elif isinstance(item, FunctionCallItem):
            called.add(item.call_id)
            if not messages or messages[-1].role != "assistant":
                messages.append(Message(role="assistant", tool_calls=[]))
            function = FunctionCall(name=item.name, arguments=item.arguments)
            last = messages[-1]
            last.tool_calls = [*(last.tool_calls or []), PastCall(id=item.call_id, function=function)]
        elif item.call_id in called:
            messages.append(Message(role="tool", tool_call_id=item.call_id, content=item.text))
        else:
            raise RequestError(
                f"input: there is no function_call with the call_id {item.call_id!r} of an output before it",
                param="input",
            )
    return messages


def new_id(kind: str) -> str:
    """Of an item: `msg`, `fc` or `fco`."""
    return f"{kind}_{uuid.uuid4().hex}"


def _said(item: OutputItem) -> KeptItem:
    if isinstance(item, FunctionCallItem):
        return item
    return MessageItem(id=item.id, role="assistant", content=list(item.content))


def _kept(item: InputItem) -> KeptItem:
    if isinstance(item, InputCall):
        given = item.model_dump(include={"call_id", "name", "arguments"})
        return FunctionCallItem(id=new_id("fc"), status="completed", **given)
    if isinstance(item, InputCallOutput):
        output = item.output if isinstance(item.output, str) else _parts(item.output)
        return CallOutputItem(id=new_id("fco"), call_id=item.call_id, output=output)
    content: list[InputTextPart | OutputText] = [*_parts(item.content)]
    if item.role == "assistant":
        content = [OutputText(text=part.text, annotations=[], logprobs=[]) for part in content]
    return MessageItem(id=new_id("msg"), role=item.role, content=content)


def _parts(content: InputContent) -> list[InputTextPart]:
    texts = [content] if isinstance(content, str) else [part.text for part in content]
    return [InputTextPart(text=text) for text in texts]
