"""From the input of a response to the messages that a chat template renders."""

from __future__ import annotations

import uuid

from tokenloom.errors import RequestError
from tokenloom.serve.chat_protocol import MAX_MESSAGES, Message
from tokenloom.serve.responses.protocol import (
    InputItem,
    InputMessage,
    InputTextPart,
    OutputMessage,
    OutputText,
    ResponseRequest,
)
from tokenloom.serve.responses.store import StoredResponse


def context_of(
    body: ResponseRequest, previous: StoredResponse | None
) -> tuple[tuple[Message, ...], tuple[InputItem, ...]]:
    """The conversation that is answered, as messages and as items: what was said before, then the input.

    Raises RequestError (param "input") if it has grown too long.
    """
    messages: list[Message] = []
    items: list[InputItem] = []
    if previous is not None:
        messages += previous.context
        items += previous.items
        for answer in previous.response.output:
            messages.append(Message(role="assistant", content=_text(answer)))
            items.append(InputItem(id=answer.id, role="assistant", content=list(answer.content)))
    for turn in _turns(body):
        messages.append(Message(role=turn.role, content=_text(turn)))
        items.append(_item(turn))
    if len(messages) > MAX_MESSAGES:
        raise RequestError(
            f"input: the conversation has {len(messages)} messages; at most {MAX_MESSAGES} are allowed",
            param="input",
        )
    return tuple(messages), tuple(items)


def with_instructions(body: ResponseRequest, context: tuple[Message, ...]) -> list[Message]:
    """All messages of the prompt. Instructions are of this request alone, and go first."""
    if body.instructions is None:
        return list(context)
    return [Message(role="system", content=body.instructions), *context]


def new_message_id() -> str:
    return f"msg_{uuid.uuid4().hex}"


def _turns(body: ResponseRequest) -> list[InputMessage]:
    if isinstance(body.input, str):
        return [InputMessage(role="user", content=body.input)]
    return body.input


def _text(turn: InputMessage | OutputMessage) -> str:
    return turn.content if isinstance(turn.content, str) else "\n".join(part.text for part in turn.content)


def _item(turn: InputMessage) -> InputItem:
    texts = [turn.content] if isinstance(turn.content, str) else [part.text for part in turn.content]
    content: list[InputTextPart | OutputText]
    if turn.role == "assistant":
        content = [OutputText(text=text, annotations=[], logprobs=[]) for text in texts]
    else:
        content = [InputTextPart(text=text) for text in texts]
    return InputItem(id=new_message_id(), role=turn.role, content=content)
